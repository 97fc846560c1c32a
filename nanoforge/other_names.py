"""Names that people type for arguments, from other programs or by habit -> the arguments of this project's commands.

The keys of Hugging Face's trainers are in sweeps/hf_keys.py; names that already work are aliases in the tables.
Imported when a name is not known.
"""

from collections.abc import Iterable

from nanoforge.errors import did_you_mean

NAMES: dict[str, str] = {  # argument, or several of different commands -> names
    # the batch and the length of a run
    "batch_size": "bs mbs batch batchsize micro_bs micro_batch train_batch_size device_batch_size",
    "gradient_accumulation_steps": "gas accum accum_steps grad_accum grad_accum_steps gradient_accumulation "
    "accumulation_steps accumulate_grad_batches total_batch_size global_batch_size effective_batch_size",
    "block_size": "ctx n_ctx seq_len seqlen seq_length sequence_length sequence_len max_seq_len context context_len "
    "context_length context_size context_window n_positions max_position_embeddings",
    "max_iters": "iters iterations n_iters num_iters max_iterations n_steps num_steps total_steps train_steps "
    "max_train_steps num_train_steps training_steps",
    "max_tokens": "num_tokens n_tokens token_limit train_tokens",
    "max_epochs": "epochs epoch n_epochs num_epochs max_epoch",
    "early_stop_patience": "patience early_stop early_stopping",
    # the model
    "n_layer": "layers layer n_layers num_layers num_layer nlayer",
    "n_head": "heads head n_heads num_heads num_head nhead",
    "n_kv_head": "kv_heads num_kv_heads n_kv_groups num_query_groups n_query_groups",
    "n_embd": "dim d_model n_embed n_embedding emb_dim embed_dim embedding_dim embd model_dim width hidden hidden_dim",
    "mlp_ratio": "d_ff ffn_dim mlp_dim intermediate_size n_inner",
    "activation": "act act_fn hidden_act activation_function",
    "vocab_size": "vocab n_vocab",
    "dropout": "drop attn_dropout attention_dropout resid_pdrop attn_pdrop embd_pdrop p_dropout",
    "rope_base": "theta rope rope_freq_base",
    "tie_weights": "tie tied weight_tying tie_embeddings",
    "activation_checkpointing": "grad_checkpointing grad_ckpt checkpoint_activations use_gradient_checkpointing",
    # the optimizer and its schedule
    "learning_rate": "lr lrate max_lr peak_lr base_lr",
    "weight_decay": "wd decay weight_decay_rate l2",
    "optimizer": "opt optimiser",
    "beta1": "b1 beta_1 adam_b1",
    "beta2": "b2 beta_2 adam_b2",
    "grad_clip": "clip clip_grad clip_norm gradient_clip gradient_clipping gradient_clip_val clip_grad_norm",
    "lr_scheduler": "schedule scheduler sched lr_schedule lr_decay lr_decay_style",
    "warmup_iters": "warmup n_warmup num_warmup_steps lr_warmup_steps lr_warmup_iters",
    "min_lr": "lr_min final_lr end_lr lr_end",
    "ema_decay": "ema use_ema",
    # evaluation, checkpoints, logging
    "eval_interval": "eval_every eval_freq val_every val_interval val_check_interval evaluate_every",
    "eval_iters": "eval_batches val_iters val_steps limit_val_batches",
    "checkpoint_interval": "save_every save_interval ckpt_interval checkpoint_every",
    "log_interval": "log_every log_steps log_every_n_steps print_every",
    "wandb_log": "wandb use_wandb log_wandb",
    "wandb_run_name": "wandb_name",
    "tensorboard_log": "tb tensorboard use_tensorboard log_tensorboard",
    # folders, weights, data
    "out_dir out to": "output outdir output_path save_dir save_path run_dir results_dir run checkpoint_dir",
    "init_from": "ckpt ckpt_path checkpoint_path load load_from pretrained from_pretrained model model_id model_name "
    "model_path weights",
    "checkpoint": "resume_from load_checkpoint",
    "dataset name": "data dataset_path",
    "data_dir": "data_path data_root dataset_dir",
    "train_file": "train_data train_path train_dataset",
    "validation_file": "val_file val_data eval_file eval_data validation_data",
    "seed": "random_seed manual_seed rng_seed",
    # the device
    "device": "cuda gpu gpus cpu mps device_map accelerator",
    "dtype": "amp precision mixed_precision autocast fp32 float16 bfloat16 float32 half",
    "parallel": "strategy ddp fsdp zero deepspeed",
    "attention_kernel": "flash flash_attn flash_attention use_flash_attention sdpa",
    # fine-tuning
    "objective": "algo algorithm method trainer loss",
    "adapter": "lora use_lora peft",
    "lora_rank": "rank r lora_dim",
    "lora_alpha": "alpha",
    "lora_targets": "lora_modules lora_layers",
    "quantize_base": "qlora load_in_4bit load_in_8bit quantize quantization",
    "base_model": "base",
    "beta": "kl kl_coef kl_coeff kl_beta dpo_beta",
    "reference": "ref ref_model reference_model",
    "num_generations": "n_generations rollouts num_rollouts rollouts_per_prompt n_samples_per_prompt",
    "epsilon": "clip_eps clip_range eps_clip cliprange",
    "reward": "rewards reward_func reward_fn reward_function",
    # sampling and evaluation
    "start prompt_dir": "prompt prompts input text question message query",
    "num_samples": "n num n_samples num_return_sequences",
    "max_new_tokens": "max_tokens max_gen_len gen_len length n_predict n_tokens num_tokens max_completion_tokens "
    "max_gen_toks max_length",
    "temperature": "temp t",
    "top_k": "k topk",
    "top_p": "p topp nucleus nucleus_p",
    "min_p": "minp",
    "system": "sys system_prompt system_message",
    "chat": "interactive conversation instruct",
    "lm_eval": "eval_tasks benchmark benchmarks",
    "num_passes": "k_passes n_passes pass_k",
    "num_fewshot": "fewshot few_shot n_shot shots",
    # sweeps, reports, exports
    "jobs": "n_jobs workers num_workers max_workers max_parallel",
    "type": "outtype out_type quant ftype",
}


def arguments_called(name: str) -> list[str]:
    """The arguments, of any command, that a name stands for."""
    return [argument for ours, names in NAMES.items() if name in names.split() for argument in ours.split()]


def similar_argument(name: str, known: Iterable[str], translated: str = "") -> str:
    """'; did you mean X?' for the argument of a command that a name stands for, or that is most similar to it.

    known: the command's arguments. Both may begin with dashes. translated: what a table of other programs has for it.
    """
    known = list(known)
    plain = name.removeprefix("--").lower().replace("-", "_")
    for candidate in (translated, plain, *arguments_called(plain)):
        for text in (f"--{candidate}", candidate):
            if text in known:
                return f"; did you mean {text}?"
    return did_you_mean(name, known)
