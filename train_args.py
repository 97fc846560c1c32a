"""The arguments of train.py: one typed field each, the values derived from them, and their checks. Imports no torch.

`parse()` returns the TrainArgs of a command line. A field's `needs` says when it has an effect; the `..._errors`
functions find arguments that conflict. To add an argument, add its field to a group and use it.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import configurator
from common_args import BASE_MODEL_HELP, DeviceArgs, base_model_errors, device_errors
from configurator import OnlyWith, Resolved, Rules, arg, arg_group, arg_table, with_set, with_value
from nanoforge import config_files, launcher
from nanoforge.data import hub, hub_datasets
from nanoforge.errors import UserError, did_you_mean
from nanoforge.posttraining import row_shapes
from nanoforge.posttraining.objective_specs import OBJECTIVES
from nanoforge.sweeps import hf_other_keys
from nanoforge.training import budget, depth
from nanoforge.training.schedules import SCHEDULES, other_names

OPTIMIZERS = ("adamw", "adam", "sgd", "nadam", "radam", "rmsprop", "adagrad", "adafactor", "lion", "muon")
ON_DEVICE_OPTIMIZERS = ("adamw", "adam", "lion", "muon")  # whose steps need nothing of the host
DPO_LOSSES = ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "apo_zero")
SMOOTHED = ("sigmoid", "robust", "sigmoid_norm")  # DPO losses with label smoothing
ROPE_SCALING_NUMBERS = {  # rope_type -> the numbers that --rope_scaling has for it
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}
DECAYS_TO_MIN_LR = ("linear", "cosine", "exponential", "wsd")  # schedules that reach min_lr at lr_decay_iters
ROLLOUT_INTERVALS = ("max_iters", "eval_interval", "checkpoint_interval")
BUDGETS = ("time_budget", "flops_budget", "token_budget")
BUDGET_CONFIG = Path(__file__).parent / "configs/depth.py"  # the architecture that its law was measured with
NOT_WITH_BUDGET = (
    "depth",
    "max_iters",
    "lr_decay_iters",
    "max_tokens",
    "max_epochs",
    "max_seconds",
    "warmup_ratio",
    "auto_find_batch_size",
)
SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
COUNTS = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}

# ---------------------------------------------------------------------------------------------------------------------
# when an argument has an effect

RESUME = with_value("init_from", "resume")
FROM_SCRATCH = OnlyWith(
    "--init_from=scratch (loaded weights bring theirs)", lambda args: args.init_from in ("scratch", "resume")
)
ALWAYS = OnlyWith("", lambda args: True)
ROPE = OnlyWith(
    f"--position=rope, and {FROM_SCRATCH.description}",
    lambda args: args.position == "rope" and FROM_SCRATCH.holds(args),
)
WINDOWS = OnlyWith(
    f"an S in --window, and {FROM_SCRATCH.description}",
    lambda args: "S" in args.window and FROM_SCRATCH.holds(args),
)
WINDOWED_ROPE = OnlyWith(
    f"--position=rope, an S in --window, and {FROM_SCRATCH.description}",
    lambda args: ROPE.holds(args) and WINDOWS.holds(args),
)
QK_NORM = OnlyWith(f"--qk_norm, and {FROM_SCRATCH.description}", lambda args: args.qk_norm and FROM_SCRATCH.holds(args))
SOFTCAP = OnlyWith(
    f"--logit_softcap, and {FROM_SCRATCH.description}",
    lambda args: args.logit_softcap > 0 and FROM_SCRATCH.holds(args),
)
BUDGET = OnlyWith("|".join(f"--{name}" for name in BUDGETS), lambda args: bool(args.budget))
MULTIDATASET = with_value("training_mode", "multidataset")
SAMPLED_DATASETS = OnlyWith(
    "--training_mode=multidataset without --dataset_interleaving",
    lambda args: args.training_mode == "multidataset" and not args.dataset_interleaving,
)
EXAMPLES = OnlyWith(
    f"--objective={'|'.join(name for name, spec in OBJECTIVES.items() if spec.reads_examples)}",
    lambda args: OBJECTIVES[args.objective].reads_examples,
)
SHARED_ROWS = OnlyWith(
    "--dataset=hf:NAME, or --train_file without --validation_file",
    lambda args: bool(args.hub_names or (args.train_file and not args.validation_file)),
)
EXAMPLES_OF_NEW_RUN = OnlyWith(
    f"{EXAMPLES.description}, and not --init_from=resume, which keeps its run's template",
    lambda args: EXAMPLES.holds(args) and args.init_from != "resume",
)
LM = with_value("objective", "lm")
SFT = with_value("objective", "sft")
DPO = with_value("objective", "dpo")
KTO = with_value("objective", "kto")
GRPO = with_value("objective", "grpo")
WITH_REFERENCE = with_value("objective", "dpo", "kto", "grpo")
LABEL_SMOOTHING = OnlyWith(
    f"--dpo_loss={'|'.join(SMOOTHED)}", lambda args: args.objective == "dpo" and args.dpo_loss in SMOOTHED
)
LORA = with_value("adapter", "lora")
SOFT_PROMPT = with_value("adapter", "soft_prompt")
ADAPTER = with_value("adapter", "lora", "soft_prompt")
ADAM = with_value("optimizer", "adamw", "adam", "nadam", "radam", "lion", "muon")
MUON = with_value("optimizer", "muon")
DECAYING = OnlyWith("a schedule that decays (--decay_lr or --lr_scheduler)", lambda args: args.schedule != "none")
DECAY_HORIZON = OnlyWith(
    f"--lr_scheduler={'|'.join(DECAYS_TO_MIN_LR)} or --decay_lr", lambda args: args.schedule in DECAYS_TO_MIN_LR
)
STEP_SCHEDULE = with_value("lr_scheduler", "step")
FSDP = with_value("parallel", "fsdp")

# ---------------------------------------------------------------------------------------------------------------------
# the table: one class a group of --help, one field an argument


# fmt: off
@arg_group
class RunArgs:
    """run"""

    out_dir: str = arg("out", "run folder: checkpoints, metrics.jsonl, train_config.json",
        inherit=False, alias=("output_dir",), path=True)
    task_name: str = arg("", "without --out_dir: write the run to outputs/TASK_NAME/DATE_TIME",
        inherit=False, path=True)
    debug: bool = arg(False, "with --task_name: write to outputs/debug/TASK_NAME/DATE_TIME",
        inherit=False, needs=with_set("task_name"))
    overwrite: bool = arg(False, "start over in an out_dir that already holds a run, deleting that run", inherit=False)
    init_from: str = arg("scratch", "scratch, resume (continue the run in out_dir), ORG/NAME[@REVISION] of a model "
        "on the Hugging Face hub, gpt2|gpt2-medium|gpt2-large|gpt2-xl, or a PATH: a run, a checkpoint, "
        "a model's folder or file (docs/models.md), or nanoGPT's ckpt.pt",
        inherit=False, alias=("model_name_or_path",), path=True)
    gpt2_type: str = arg("gpt2", "GPT-2 size that --init_from=gpt2 loads",
        choices=hub.GPT2_NAMES, inherit=False, needs=with_value("init_from", "gpt2"))
    checkpoint: str = arg("last", "checkpoint to resume from: last, best, a step, or the PATH of one, which with "
        "another out_dir begins a branch; --overwrite deletes later ones in out_dir",
        inherit=False, needs=RESUME, alias=("resume_from_checkpoint",), path=True)
    base_model: str = arg("", BASE_MODEL_HELP, inherit=False, alias=("base_model_name_or_path",), path=True)
    allow_data_change: bool = arg(False, "resume even if the dataset's token bins have changed since the run started",
        inherit=False, needs=RESUME)
    doctor: bool = arg(False, "check this machine and these arguments, time a step, and exit; writes nothing",
        inherit=False)
    eval_only: bool = arg(False, "evaluate once and exit; writes no checkpoint", inherit=False)
    seed: int = arg(1337, "random seed of weights, data order, dropout and sampling",
        low=0, high=2**32 - 1, val_loss=LM)


@arg_group
class DataArgs:
    """data"""

    data_dir: str = arg("data", "folder that contains the dataset folders", path=True)
    training_mode: str = arg("single", "single: one dataset; multidataset: a mixture of datasets; "
        "multicontext: aligned token streams whose embeddings are summed",
        choices=("single", "multidataset", "multicontext"))
    dataset: str = arg("shakespeare_char", "dataset folder in data_dir; its prepare.py runs if token bins are missing; "
        "examples also from the Hugging Face hub: hf:NAME[:CONFIG][@REVISION][#SPLIT[/VALIDATION_SPLIT]]",
        needs=with_value("training_mode", "single"), path=True)
    train_file: str = arg("", "training examples: JSONL, JSON, CSV, TSV, parquet (none: dataset's train.jsonl)",
        needs=EXAMPLES, path=True)
    validation_file: str = arg("", "validation examples: JSONL, JSON, CSV, TSV, parquet (none: dataset's val.jsonl, "
        "or with train_file a part of that)",
        needs=EXAMPLES, path=True)
    val_fraction: float = arg(0.1, "fraction of the rows for validation, by a hash of each: of train_file "
        "without validation_file, of an hf: dataset without a validation or test split",
        above=0, high=0.5, needs=SHARED_ROWS)
    columns: tuple[str, ...] = arg((), "columns of the examples as FIELD=COLUMN: prompt=question,completion=answer "
        "(none: by the names of TRL, ShareGPT, Alpaca)", needs=EXAMPLES, val_loss=ALWAYS, alias=("column_map",))
    overflow: str = arg("error", "what to do with examples longer than block_size (max_tokens, with --prompt_format)",
        choices=("error", "drop", "truncate_target"), needs=EXAMPLES, val_loss=ALWAYS)
    bad_rows: str = arg("error", "what to do with rows of examples that a field makes unusable: "
        "stop with file, line and field, or skip and count them",
        choices=("error", "skip"), needs=EXAMPLES, val_loss=ALWAYS)
    sampling_method: str = arg("random", "training windows: random, shuffled without replacement, or sequential",
        choices=("random", "without_replacement", "sequential"), needs=LM)
    dataset_list: tuple[str, ...] = arg((), "datasets of the mixture", needs=MULTIDATASET, path=True)
    dataset_sampling_probs: tuple[float, ...] = arg((), "sampling weight of each dataset, normalized (none: equal); "
        "with --dataset_interleaving: consecutive turns of each dataset, whole numbers",
        needs=MULTIDATASET)
    dataset_sampling_probs_final: tuple[float, ...] = arg((), "sampling weights at max_iters (none: constant)",
        needs=SAMPLED_DATASETS)
    dataset_sampling_probs_transition_method: str = arg("linear",
        "interpolation from initial to final sampling weights",
        choices=("linear", "cosine", "exponential"), needs=with_set("dataset_sampling_probs_final"))
    dataset_mixing: str = arg("batch", "sample a dataset for each global batch, or for each sequence",
        choices=("batch", "sequence"), needs=MULTIDATASET)
    dataset_interleaving: bool = arg(False, "take the datasets in turn (round-robin) instead of at random",
        needs=MULTIDATASET)
    multidataset_wte: bool = arg(False, "give each dataset its own token embedding and head; tokenizers may differ",
        model_shape=True, needs=MULTIDATASET)
    multicontext_datasets: tuple[str, ...] = arg((), "aligned datasets of equal length, one context each",
        needs=with_value("training_mode", "multicontext"), path=True)


@arg_group
class DepthArgs:
    """depth (scaling rules)"""

    depth: int = arg(0, "number of layers from which width, heads, batch size, steps, learning rates and weight decay "
        "follow by the scaling rules of docs/depth.md; arguments that are set keep their values (0: off)",
        low=0, needs=FROM_SCRATCH)
    aspect: int = arg(64, "aspect ratio: n_embd / depth", low=1, needs=with_set("depth"))
    tokens_per_weight: float = arg(20.0, "training tokens per parameter of the transformer layers",
        above=0, needs=with_set("depth"))


@arg_group
class BudgetArgs:
    """budget instead of a size (docs/budget.md)"""

    time_budget: float = arg(0.0, "seconds, or 90s, 10m, 1h30m: measure this machine and this text for a moment, "
        "choose size, batch, rates and steps for the lowest val_loss, and end in time; arguments that are set keep "
        "their values (0: off)", low=0, units=SECONDS, model_shape=True, needs=FROM_SCRATCH)
    flops_budget: float = arg(0.0, "the same for FLOPs of training, as 1e15 (0: off)",
        low=0, units=COUNTS, model_shape=True, needs=FROM_SCRATCH)
    token_budget: int = arg(0, "the same for tokens of training, as 20M: the size for which they are the best use of "
        "compute (0: off)", low=0, units=COUNTS, model_shape=True, needs=FROM_SCRATCH)
    budget_chooses: tuple[str, ...] = arg((), "arguments that the budget chooses (none: those of its list, in "
        "docs/budget.md, that are not set)", inherit=False, needs=BUDGET)


@arg_group
class BatchArgs:
    """batch"""

    batch_size: int = arg(64, "micro-batch size, in sequences; batch_size x gradient_accumulation_steps "
        "is the global (effective) batch size for any number of ranks", low=1, alias=("micro_batch_size",))
    auto_find_batch_size: bool = arg(False, "choose the micro-batch by memory and speed and keep the global batch of "
        "batch_size x gradient_accumulation_steps; --batch_size=auto says the same", inherit=False)
    gradient_accumulation_steps: int = arg(1, "gradient accumulation: micro-batches per optimizer step", low=1)
    block_size: int = arg(256, "context length in tokens; loaded weights with a longer context are cropped to it",
        low=1, model_shape=True)


@arg_group
class ModelArgs:
    """model"""

    n_layer: int = arg(6, "transformer layers",
        low=1, model_shape=True, needs=FROM_SCRATCH, alias=("num_hidden_layers",))
    n_head: int = arg(6, "attention heads",
        low=1, model_shape=True, needs=FROM_SCRATCH, alias=("num_attention_heads",))
    n_kv_head: int = arg(0, "key/value heads of grouped-query attention (0: n_head)",
        low=0, model_shape=True, needs=FROM_SCRATCH, alias=("num_key_value_heads", "n_kv_heads"))
    n_embd: int = arg(384, "embedding dimension", low=1, model_shape=True, needs=FROM_SCRATCH, alias=("hidden_size",))
    head_dim: int = arg(0, "dimension of an attention head (0: n_embd / n_head)",
        low=0, model_shape=True, needs=FROM_SCRATCH)
    vocab_size: int = arg(0, "rows of token embedding and head (0: the tokenizer's); 50304 pads GPT-2's for speed",
        low=0, model_shape=True, needs=FROM_SCRATCH)
    bias: bool = arg(False, "biases in linear layers and LayerNorm", model_shape=True, needs=FROM_SCRATCH)
    qkv_bias: bool = arg(False, "biases of queries, keys and values, also without --bias (Qwen2)",
        model_shape=True, needs=FROM_SCRATCH)
    norm: str = arg("layernorm", "normalization layer; rmsnorm_nogain has no learned gain, that of rmsnorm_offset is "
        "1 + a learned offset (Gemma)",
        choices=("layernorm", "rmsnorm", "rmsnorm_nogain", "rmsnorm_offset"), model_shape=True, needs=FROM_SCRATCH)
    norm_eps: float = arg(1e-5, "epsilon of the norms, added to the mean square or the variance",
        above=0, model_shape=True, needs=FROM_SCRATCH, alias=("rms_norm_eps", "layer_norm_epsilon"))
    norm_placement: str = arg("pre", "normalize the inputs of attention and MLP (pre), "
        "their outputs (post, as OLMo 2), or both (Gemma)",
        choices=("pre", "post", "both"), model_shape=True, needs=FROM_SCRATCH)
    parallel_residual: bool = arg(False, "attention and MLP read the same residual stream (GPT-NeoX)",
        model_shape=True, needs=FROM_SCRATCH, alias=("use_parallel_residual",))
    position: str = arg("learned", "position encoding: learned embeddings, rotary embeddings (RoPE), or none",
        choices=("learned", "rope", "none"), model_shape=True, needs=FROM_SCRATCH)
    rope_base: float = arg(10000.0, "RoPE base frequency (theta)",
        above=0, model_shape=True, needs=ROPE, alias=("rope_theta",))
    rope_scaling: dict[str, Any] = arg({}, "RoPE scaling for a longer context, as JSON: "
        '{"rope_type": "linear", "factor": 4}, or llama3 or yarn with their numbers', model_shape=True, needs=ROPE)
    rotary_fraction: float = arg(1.0, "share of a head that RoPE rotates (GPT-NeoX: 0.25)",
        above=0, high=1, model_shape=True, needs=ROPE, alias=("partial_rotary_factor", "rotary_pct"))
    window_rope_base: float = arg(0.0, "RoPE base frequency of sliding-window layers, without scaling "
        "(Gemma 3; 0: as the others)", low=0, model_shape=True, needs=WINDOWED_ROPE)
    activation: str = arg("gelu", "MLP activation: any function of torch.nn.functional, gelu_tanh, "
        "or relu2 (squared ReLU)", model_shape=True, needs=FROM_SCRATCH)
    mlp: str = arg("plain", "plain, or gated (SwiGLU with --activation=silu)",
        choices=("plain", "gated"), model_shape=True, needs=FROM_SCRATCH)
    mlp_ratio: float = arg(4.0, "MLP hidden dimension / n_embd", above=0, model_shape=True, needs=FROM_SCRATCH)
    qk_norm: bool = arg(False, "QK-norm: RMSNorm of queries and keys, before RoPE",
        model_shape=True, needs=FROM_SCRATCH)
    qk_norm_gain: bool = arg(False, "learned gains in QK-norm, of the kind of --norm (Qwen3, Gemma 3)",
        model_shape=True, needs=QK_NORM)
    qk_norm_joint: bool = arg(False, "QK-norm over all heads together instead of each (OLMo 2)",
        model_shape=True, needs=QK_NORM)
    attention_scale: float = arg(0.0, "factor of the attention scores (0: 1 / sqrt(head_dim))",
        low=0, model_shape=True, needs=FROM_SCRATCH)
    window: str = arg("L", "attention pattern, repeated over the layers: L full attention, S sliding window",
        model_shape=True, needs=FROM_SCRATCH)
    window_size: int = arg(0, "sliding window of S layers in tokens, the current one included (0: half of block_size)",
        low=0, model_shape=True, needs=WINDOWS)
    logit_softcap: float = arg(0.0, "soft cap c of the logits (0: none)",
        low=0, model_shape=True, needs=FROM_SCRATCH, alias=("final_logit_softcapping",))
    softcap: str = arg("rsqrt", "function of --logit_softcap: rsqrt, c z / sqrt(z^2 + c^2), or tanh, c tanh(z / c)",
        choices=("rsqrt", "tanh"), model_shape=True, needs=SOFTCAP)
    embedding_scale: float = arg(1.0, "factor of the token embeddings (Gemma: sqrt(n_embd))",
        above=0, model_shape=True, needs=FROM_SCRATCH)
    embedding_norm: bool = arg(False, "RMSNorm of the embedding, before the first layer",
        model_shape=True, needs=FROM_SCRATCH)
    value_residual: bool = arg(False, "value residual: mix the first layer's values into each layer's, learned weights",
        model_shape=True, needs=FROM_SCRATCH)
    residual_scalars: bool = arg(False, "input of each layer is r x + a x0: residual stream x, embedding x0, "
        "learned r and a", model_shape=True, needs=FROM_SCRATCH)
    tie_weights: bool = arg(True, "share weights of token embedding and head",
        model_shape=True, needs=FROM_SCRATCH, alias=("tie_word_embeddings",))
    init_std: float = arg(0.02, "standard deviation of the initial weights of linear layers",
        low=0, needs=with_value("init_from", "scratch"), alias=("initializer_range",))
    embedding_init_std: float = arg(0.02, "standard deviation of the token embedding's initial weights",
        low=0, needs=with_value("init_from", "scratch"))
    zero_init: bool = arg(False, "zero-initialize output projections of attention and MLP, and an untied head",
        needs=with_value("init_from", "scratch"))
    dropout: float = arg(0.0, "dropout probability", low=0, high=0.999)


@arg_group
class ObjectiveArgs:
    """objective"""

    objective: str = arg("lm", "lm: language modeling on token bins; sft: supervised fine-tuning; "
        "dpo: preference pairs; kto: labelled completions; grpo: reinforcement learning on rewards",
        choices=OBJECTIVES.keys(), val_loss=ALWAYS)  # a view, so that objectives can be registered later
    beta: float = arg(0.1, "DPO/KTO beta; GRPO: KL coefficient (0: no reference model is loaded)",
        low=0, needs=WITH_REFERENCE, val_loss=with_value("objective", "dpo", "kto"))
    reference: str = arg("auto", "reference model: adapter (base with adapter disabled), "
        "cache (precomputed log-probs), copy (frozen copy); auto: adapter if there is one, else copy",
        choices=("auto", "adapter", "cache", "copy"), needs=WITH_REFERENCE)
    disable_dropout: bool = arg(True, "no dropout, as in TRL: --dropout and --lora_dropout are not applied, "
        "so that the policy starts as the reference model", needs=WITH_REFERENCE)
    max_new_tokens: int = arg(64, "maximum completion length, in tokens",
        low=1, needs=EXAMPLES, val_loss=GRPO, alias=("max_completion_length", "max_generation_steps"))
    chat_template: str = arg("", "jinja file, or a folder's chat_template.jinja, with which chats become tokens "
        "(none: the model's own template, or else a token for each role)",
        inherit=False, needs=EXAMPLES_OF_NEW_RUN, alias=("chat_template_path",), path=True)
    chat_template_kwargs: dict[str, Any] = arg({}, "variables of the chat template as JSON, such as "
        '{"enable_thinking": false}; a row may have others in a column of this name',
        inherit=False, needs=EXAMPLES_OF_NEW_RUN)
    eval_samples: int = arg(3, "greedy validation completions to log at each evaluation", low=0, needs=EXAMPLES)


@arg_group
class SFTArgs:
    """SFT"""

    loss_on: str = arg("completion", "loss mask: completions with their end tokens only, or all tokens",
        choices=("completion", "all"), needs=SFT, val_loss=ALWAYS)
    packing: bool = arg(False, "pack several examples into one sequence; attention stays within an example",
        needs=SFT, val_loss=ALWAYS)


@arg_group
class PreferenceArgs:
    """DPO and KTO"""

    dpo_loss: str = arg("sigmoid", "DPO loss of a pair's reward margin",
        choices=DPO_LOSSES, needs=DPO, val_loss=ALWAYS)
    label_smoothing: float = arg(0.0, "assumed fraction of flipped labels (cDPO, rDPO)",
        low=0, high=0.499, needs=LABEL_SMOOTHING, val_loss=ALWAYS)
    desirable_weight: str = arg("1", "KTO loss weight of desirable completions, "
        "or auto: same total weight as undesirable ones", needs=KTO, val_loss=ALWAYS)
    undesirable_weight: str = arg("1", "KTO loss weight of undesirable completions, or auto",
        needs=KTO, val_loss=ALWAYS)


@arg_group
class GRPOArgs:
    """GRPO"""

    reward: str = arg("correct:1", "reward functions with weights: correct, format, length, math_verify, "
        "reasoning_gym or module:function, as in correct:1,format:0.5,module:function:0.2",
        needs=GRPO, val_loss=ALWAYS, alias=("reward_funcs",))
    num_generations: int = arg(8, "completions sampled per prompt (group size); must divide the global batch size, "
        "which counts completions", low=2, needs=GRPO, alias=("group_size",))
    temperature: float = arg(1.0, "sampling temperature for rollouts", above=0, needs=GRPO)
    top_k: int = arg(0, "top-k sampling for rollouts (0: all tokens)", low=0, needs=GRPO)
    top_p: float = arg(1.0, "top-p (nucleus) sampling for rollouts (1: all tokens)", above=0, high=1, needs=GRPO)
    num_iterations: int = arg(1, "optimizer steps per rollout batch (mu)", low=1, needs=GRPO)
    loss_type: str = arg("grpo", "loss normalization: grpo per sequence, bnpo per local token, dr_grpo constant, "
        "dapo per global token", choices=("grpo", "bnpo", "dr_grpo", "dapo"), needs=GRPO)
    scale_rewards: str = arg("group", "advantage normalization by the standard deviation of the group, of the batch, "
        "or none", choices=("group", "batch", "none"), needs=GRPO)
    importance_sampling_level: str = arg("token", "importance ratio per token, or per sequence (GSPO)",
        choices=("token", "sequence"), needs=GRPO)
    epsilon: float = arg(0.2, "PPO clip range, lower bound 1 - epsilon", low=0, high=1, needs=GRPO)
    epsilon_high: float = arg(0.0, "clip range, upper bound 1 + epsilon_high (0: epsilon)", low=0, needs=GRPO)
    mask_truncated: bool = arg(False, "exclude completions cut at max_new_tokens from the loss",
        needs=GRPO, alias=("mask_truncated_completions",))


@arg_group
class AdapterArgs:
    """adapter"""

    adapter: str = arg("none", "none: train all weights; lora: LoRA; soft_prompt: prompt tuning with virtual tokens",
        choices=("none", "lora", "soft_prompt"), model_shape=True)
    base_dtype: str = arg("float32", "dtype in which the frozen base is kept; the adapter is float32 "
        "(docs/memory.md)", choices=("float32", "bfloat16", "float16"), needs=ADAPTER)
    quantize_base: str = arg("none", "quantize the linear layers of the frozen base (QLoRA; needs bitsandbytes): "
        "nf4 takes 0.56 bytes a weight, int8 1", choices=("none", "nf4", "int8"), needs=LORA)
    lora_rank: int = arg(8, "LoRA rank", low=1, model_shape=True, needs=LORA, alias=("lora_r",))
    lora_alpha: float = arg(16.0, "LoRA scaling numerator: updates are multiplied by alpha / rank",
        above=0, model_shape=True, needs=LORA)
    lora_dropout: float = arg(0.0, "dropout probability of the LoRA input", low=0, high=0.999, needs=LORA)
    lora_targets: tuple[str, ...] = arg((), "LoRA target modules: name suffixes of linear layers, "
        "such as attn.qkv mlp.up (none: all linear layers)",
        model_shape=True, needs=LORA, alias=("lora_target_modules", "target_modules"))
    prompt_format: str = arg("", "prompt template: in '<P*60>{toxic}<P*20>', 60 virtual tokens, "
        "a field of the example, 20 virtual tokens; <P>text</P> initializes virtual tokens from text",
        model_shape=True, needs=SOFT_PROMPT)
    prompt_provider: str = arg("tensor", "virtual tokens: an embedding table, or reparameterized by an LSTM",
        choices=("tensor", "lstm"), model_shape=True, needs=SOFT_PROMPT)
    prompt_init: str = arg("vocab", "initial virtual tokens: random rows of the token embedding, or normal noise",
        choices=("vocab", "normal"), needs=SOFT_PROMPT)
    target_field: str = arg("", "field of the example to train on (none: completion)",
        needs=SOFT_PROMPT, val_loss=ALWAYS)
    truncation_field: str = arg("", "field to truncate in examples that are too long",
        needs=SOFT_PROMPT, val_loss=ALWAYS)


@arg_group
class DurationArgs:
    """training duration (the first limit reached ends the run)"""

    max_iters: int = arg(3500, "optimizer steps, counted from the start of the run",
        low=0, alias=("steps", "max_steps"))
    max_tokens: int = arg(0, "maximum training tokens (0: no limit); "
        "with --prompt_format: maximum tokens of an example (0: block_size)",
        low=0, val_loss=with_set("prompt_format"))
    max_epochs: float = arg(0.0, "maximum passes over the training data (0: no limit)",
        low=0, alias=("num_train_epochs",))
    max_seconds: float = arg(0.0, "maximum training time in seconds, over all resumes (0: no limit)", low=0)
    early_stop_patience: int = arg(0, "early stopping: evaluations in a row (those at eval_interval count) "
        "without a better val_loss (0: off)",
        low=0, alias=("early_stopping_patience",))


@arg_group
class OptimizerArgs:
    """optimizer"""

    optimizer: str = arg("adamw", "adamw, adam, sgd, nadam, radam, rmsprop, adagrad, adafactor, lion, "
        "muon (Muon for hidden matrices, AdamW for the rest), or package:Class")
    learning_rate: float = arg(1e-3, "peak learning rate, reached after warmup", low=0, alias=("lr",))
    embedding_learning_rate: float = arg(0.0, "peak learning rate of the token embedding (0: learning_rate)", low=0)
    head_learning_rate: float = arg(0.0, "peak learning rate of an untied head (0: learning_rate)",
        low=0, needs=OnlyWith("--no-tie_weights", lambda args: not args.tie_weights))
    weight_decay: float = arg(0.1, "weight decay of matrices, embeddings included; biases and norms have none", low=0)
    beta1: float = arg(0.9, "Adam beta1", low=0, high=0.9999, needs=ADAM, alias=("adam_beta1",))
    beta2: float = arg(0.99, "Adam beta2", low=0, high=0.99999, needs=ADAM, alias=("adam_beta2",))
    momentum: float = arg(0.9, "momentum of SGD and RMSprop",
        low=0, high=0.9999, needs=with_value("optimizer", "sgd", "rmsprop"))
    muon_learning_rate: float = arg(0.02, "peak learning rate of the matrices that Muon trains", low=0, needs=MUON)
    muon_weight_decay: float = arg(0.0, "weight decay of the matrices that Muon trains", low=0, needs=MUON)
    muon_momentum: float = arg(0.95, "Nesterov momentum of Muon", low=0, high=0.9999, needs=MUON)
    muon_momentum_warmup: int = arg(0, "steps in which Muon's momentum rises from 0.85 to muon_momentum (0: none)",
        low=0, needs=MUON)
    cautious_weight_decay: bool = arg(False, "muon_weight_decay only where the update makes a weight smaller too",
        needs=OnlyWith("--optimizer=muon with --muon_weight_decay",
            lambda args: args.optimizer == "muon" and args.muon_weight_decay > 0))
    aux_eps: float = arg(1e-8, "epsilon of AdamW, which trains what Muon does not", above=0, needs=MUON)
    optimizer_kwargs: dict[str, Any] = arg({}, "further optimizer arguments as JSON, such as "
        '{"eps": 1e-10}; with muon they go to Muon')
    ema_decay: float = arg(0.0, "EMA of weights: decay of their moving average, which is evaluated and saved, and from "
        "which the run is sampled and exported (0: the last weights)", low=0, high=0.999999)
    spike_skip: float = arg(0.0, "skip steps whose grad norm exceeds median + k robust standard deviations "
        "of the last 128 steps (0: off)", low=0)
    skip_patience: int = arg(10, "skipped steps in a row (grad norm spikes or non-finite gradients) before the run "
        "rolls back to the newest checkpoint, once, then ends", low=1)
    grad_clip: float = arg(1.0, "gradient clipping: max gradient norm (0: off)", low=0, alias=("max_grad_norm",))


@arg_group
class ScheduleArgs:
    """learning rate schedule"""

    lr_scheduler: str = arg("none", "learning rate schedule after warmup; none: constant", choices=tuple(SCHEDULES),
        value_hints=other_names())
    decay_lr: bool = arg(False, "with --lr_scheduler=none: cosine decay, as in nanoGPT")
    warmup_iters: int = arg(100, "learning rate warmup, linear, in steps", low=0, alias=("warmup_steps",))
    warmup_ratio: float = arg(0.0, "warmup as a part of max_iters, where warmup_iters is not set (0: warmup_iters)",
        low=0, high=1)
    lr_decay_iters: int = arg(3500, "step at which the decay reaches min_lr; max_iters unless it is set",
        low=1, needs=DECAY_HORIZON)
    min_lr: float = arg(1e-4, "final learning rate of the decay; other peaks (muon_learning_rate, ...) "
        "end at the same ratio", low=0, needs=DECAYING)
    lr_step_size: int = arg(1000, "step schedule: steps between drops", low=1, needs=STEP_SCHEDULE)
    lr_step_gamma: float = arg(0.1, "step schedule: factor of each drop", above=0, high=1, needs=STEP_SCHEDULE)
    wsd_decay_fraction: float = arg(0.4, "warmup-stable-decay: fraction of lr_decay_iters in the linear cooldown, "
        "which begins after the warmup",
        above=0, high=1, needs=with_value("lr_scheduler", "wsd"))


@arg_group
class CheckpointArgs:
    """evaluation and checkpoints"""

    eval_interval: int = arg(250, "steps between evaluations; a checkpoint follows each (--checkpoint_at_eval)",
        low=1, alias=("eval_steps", "eval_interval_steps"))
    eval_iters: int = arg(200, "evaluation batches per split, of batch_size sequences, the same ones every time; "
        "of examples each is read once at most", low=1)
    checkpoint_interval: int = arg(0, "steps between checkpoints in addition to those at evaluations (0: none)",
        low=0, alias=("save_freq", "save_steps", "save_interval_steps"))
    keep_last: int = arg(2, "number of newest checkpoints to keep; the best one is kept too", low=1)
    keep_every: int = arg(0, "also keep every checkpoint whose step is a multiple of this (0: none)", low=0)
    checkpoint_at_eval: bool = arg(True, "save a checkpoint at evaluations; off: only every checkpoint_interval steps "
        "and at the end, and the best one is the best of these")
    always_save_checkpoint: bool = arg(True, "save at every evaluation; off: only if val_loss improves, and at the end",
        needs=with_set("checkpoint_at_eval"))


@arg_group
class LoggingArgs:
    """logging"""

    log_interval: int = arg(10, "steps between logged training metrics", low=1, alias=("log_freq", "logging_steps"))
    log_data_hash: bool = arg(False, "log data_hash, a hash of the step's global batch")
    plot_loss: bool = arg(False, "plot the loss curve to out_dir/loss.png after every evaluation (needs matplotlib)")
    wandb_log: bool = arg(False, "log to Weights & Biases; a resumed run continues there")
    wandb_project: str = arg("nanoforge", "Weights & Biases project", needs=with_set("wandb_log"))
    wandb_run_name: str = arg("", "Weights & Biases run name (none: the name of out_dir)", needs=with_set("wandb_log"))
    trackio_log: bool = arg(False, "log to trackio on this machine, or to TRACKIO_SPACE_ID (needs trackio); a resumed "
        "run continues there")
    trackio_project: str = arg("nanoforge", "trackio project", needs=with_set("trackio_log"))
    trackio_run_name: str = arg("", "trackio run name (none: the name of out_dir with four digits)",
        needs=with_set("trackio_log"))
    tensorboard_log: bool = arg(False, "log to out_dir/tensorboard (needs tensorboard)")


@arg_group
class SystemArgs(DeviceArgs):
    """system"""

    parallel: str = arg("ddp", "multi-GPU training: ddp replicates the model, "
        "fsdp (FSDP2) shards weights, gradients and optimizer state", choices=("ddp", "fsdp"))
    fsdp_reshard: bool = arg(True, "reshard_after_forward (ZeRO-3; off: ZeRO-2)",
        needs=FSDP, alias=("reshard_after_forward", "fsdp_reshard_after_forward"))
    fsdp_offload: bool = arg(False, "CPU offload of weights, gradients and optimizer state",
        needs=FSDP, alias=("fsdp_cpu_offload",))
    rank_timeout: int = arg(600, "seconds a rank waits for the others before it ends the run",
        low=1, alias=("ddp_timeout",))
    compile: str = arg("auto", "torch.compile the model, with static shapes (auto: on CUDA, for more than 200 steps)",
        choices=("auto", "true", "false"), alias=("torch_compile",))
    cuda_graph: bool = arg(False, "train by a CUDA graph of a whole step: faster on one GPU where a small model's "
        "kernels take less time than launching them")
    attention_kernel: str = arg("auto", "attention on CUDA. "
        "auto: flex_attention for windows, packed examples and pairs, "
        "else the kernel that PyTorch prefers, but none of cuDNN where lengths vary. "
        "Others: that kernel of scaled_dot_product_attention alone",
        choices=("auto", "flash", "cudnn", "efficient", "math"))
    activation_checkpointing: bool = arg(False, "activation (gradient) checkpointing: "
        "recompute each layer in backward; less memory, more time", alias=("gradient_checkpointing",))
    loss_chunk: int = arg(0, "chunked cross-entropy: tokens per chunk; saves memory with a large vocabulary (0: off)",
        low=0)
    deterministic: bool = arg(False, "deterministic algorithms: bit-identical runs, with --compile too")
# fmt: on


@arg_table
class TrainArgs(
    RunArgs,
    DataArgs,
    DepthArgs,
    BudgetArgs,
    BatchArgs,
    ModelArgs,
    ObjectiveArgs,
    SFTArgs,
    PreferenceArgs,
    GRPOArgs,
    AdapterArgs,
    DurationArgs,
    OptimizerArgs,
    ScheduleArgs,
    CheckpointArgs,
    LoggingArgs,
    SystemArgs,
):
    """The arguments of a run, and what follows from them."""

    @cached_property
    def global_batch_size(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        return self.batch_size * self.gradient_accumulation_steps

    @cached_property
    def budget(self) -> budget.Budget | None:
        """What --time_budget and its relatives give, if one is set."""
        if not (self.time_budget or self.flops_budget or self.token_budget):
            return None
        return budget.Budget(self.time_budget, self.flops_budget, self.token_budget)

    @cached_property
    def schedule(self) -> str:
        """Name of the learning rate schedule; --decay_lr alone means cosine, as in nanoGPT."""
        return "cosine" if self.decay_lr and self.lr_scheduler == "none" else self.lr_scheduler

    @cached_property
    def peak_lr(self) -> float:
        """The peak learning rate that ends at min_lr, by whose ratio all rates decay: the first one that is not 0."""
        rates = [self.learning_rate, self.embedding_learning_rate, self.head_learning_rate]
        if self.optimizer == "muon":
            rates.insert(1, self.muon_learning_rate)
        return next(filter(None, rates), 0.0)

    @cached_property
    def decay_end(self) -> int | None:
        """The step at which the schedule reaches min_lr, if it has one."""
        return self.lr_decay_iters if self.schedule in DECAYS_TO_MIN_LR else None

    @cached_property
    def mixture(self) -> list[tuple[str, ...]]:
        """The datasets of the mixture, each as the names of its aligned streams."""
        if self.training_mode == "multidataset":
            return [(name,) for name in self.dataset_list]
        if self.training_mode == "multicontext":
            return [self.multicontext_datasets]
        return [(self.dataset,)]

    @cached_property
    def vocabulary(self) -> str:
        """How the model combines the vocabularies of its streams: an entry of model.VOCABULARIES."""
        if self.training_mode == "multicontext":
            return "contexts" if len(self.multicontext_datasets) > 1 else "one"
        return "separate" if self.multidataset_wte else "one"

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The folder of each dataset; none with --train_file, nor of a dataset of the hub."""
        if self.train_file:
            return {}
        names = [name for streams in self.mixture for name in streams]
        return {name: Path(self.data_dir) / name for name in names if not hub_datasets.is_hub(name)}

    @cached_property
    def hub_names(self) -> tuple[str, ...]:
        """The datasets of the hub, hf:NAME."""
        if self.train_file:
            return ()
        return tuple(name for streams in self.mixture for name in streams if hub_datasets.is_hub(name))

    @cached_property
    def data_format(self) -> str:
        """What the run reads from its dataset folders: "bins" or "examples"."""
        return "examples" if OBJECTIVES[self.objective].reads_examples else "bins"

    @cached_property
    def group_size(self) -> int:
        """Sequences of a step that one rank must hold together: the completions of one prompt."""
        return self.num_generations if OBJECTIVES[self.objective].is_online else 1

    @cached_property
    def needs_reference(self) -> bool:
        """Whether the objective needs a reference model."""
        return OBJECTIVES[self.objective].needs_reference(self)

    @cached_property
    def without_dropout(self) -> bool:
        """Whether the model is trained without dropout, whatever --dropout and --lora_dropout say."""
        return self.disable_dropout and WITH_REFERENCE.holds(self)

    @cached_property
    def val_loss_settings(self) -> dict[str, Any]:
        """The arguments on which val_loss depends, besides the data and the number of evaluated rows."""
        settings = {}
        for name, spec in configurator.arg_specs(TrainArgs).items():
            conditions = [spec.val_loss, spec.needs or ALWAYS] if spec.val_loss else []
            if conditions and all(condition.holds(self) for condition in conditions):
                settings[name] = getattr(self, name)
        return settings

    @cached_property
    def task_folder(self) -> Path:
        """Folder of the runs of --task_name."""
        return Path("outputs/debug" if self.debug else "outputs", self.task_name)

    @cached_property
    def named_checkpoint(self) -> Path | None:
        """The checkpoint that --checkpoint names for a resumed run; None for the last one. Raises UserError."""
        if self.init_from != "resume" or self.checkpoint == "last":
            return None
        from nanoforge import run_dir  # here, since few command lines need it

        return run_dir.find_checkpoint(Path(self.out_dir), self.checkpoint)

    @cached_property
    def resumed_folder(self) -> Path:
        """The folder whose record a resumed run goes on from: a named checkpoint, or else out_dir. Raises UserError."""
        return self.named_checkpoint or Path(self.out_dir)

    @cached_property
    def begins_run(self) -> bool:
        """Whether out_dir holds no part of the run yet: it is new, or a branch off a checkpoint that lies elsewhere."""
        if self.init_from != "resume":
            return True
        folder = self.named_checkpoint
        return folder is not None and folder.resolve().parent != Path(self.out_dir, "checkpoints").resolve()

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What a command asks for besides its folder and the defaults, as JSON has it: how a restart knows its run."""
        values = {}
        table: type = type(self)  # mypy does not take it for a hashable
        for name, spec in configurator.arg_specs(table).items():
            if name not in ("out_dir", "overwrite") and getattr(self, name) != spec.default:
                values[name] = getattr(self, name)
        return json.loads(json.dumps(values))

    @cached_property
    def names_task_alone(self) -> bool:
        """Whether the run's folder follows from --task_name."""
        return bool(self.task_name) and self.out_dir == "out"

    @cached_property
    def max_train_tokens(self) -> int:
        """Training tokens after which the run ends (0: no limit); with --prompt_format max_tokens bounds an example."""
        return 0 if self.prompt_format else self.max_tokens

    @cached_property
    def weights_source(self) -> str:
        """--init_from, with --gpt2_type applied."""
        return self.gpt2_type if self.init_from == "gpt2" else self.init_from


# ---------------------------------------------------------------------------------------------------------------------
# arguments of TRL, transformers and nanoGPT whose meaning differs here, and what to use

HINTS = {
    "attn_implementation": "use --attention_kernel=flash, cudnn, efficient or math",
    "adam_epsilon": 'use --optimizer_kwargs={"eps": 1e-8}',
    "assistant_only_loss": "use --loss_on=completion (default) or all",
    "checkpoint_dir": "use --out_dir",
    "backend": "nccl on CUDA and gloo on CPU follow from --device",
    "bf16": "use --dtype=bfloat16",
    "completion_only_loss": "use --loss_on=completion (default) or all",
    "data_seed": "data order follows from --seed",
    "dataset_config": "use --dataset=hf:NAME:CONFIG",
    "dataset_name": "use --dataset=hf:NAME for examples of the hub, or --dataset=FOLDER for a folder in --data_dir",
    "dataset_test_split": "use --dataset=hf:NAME#SPLIT/VALIDATION_SPLIT",
    "dataset_text_field": "use --columns=text=COLUMN for examples, data/prepare.py --field for token bins",
    "dataset_train_split": "use --dataset=hf:NAME#SPLIT",
    "eval_strategy": "use --eval_interval, in steps",
    "field_instruction": "use --columns=prompt=COLUMN",
    "field_messages": "use --columns=messages=COLUMN",
    "field_output": "use --columns=completion=COLUMN",
    "fp16": "use --dtype=float16",
    "fsdp": "use --parallel=fsdp",
    "logging_strategy": "use --log_interval, in steps",
    "lr_scheduler_type": "use --lr_scheduler with --min_lr and --lr_decay_iters",
    "max_length": "use --block_size (and --overflow=truncate_target to truncate longer examples)",
    "max_prompt_length": "use --block_size, which bounds prompt and completion together: "
    "max_prompt_length + --max_new_tokens",
    "model": "use --init_from",
    "num_batches": "use --max_iters",
    "num_epochs": "use --max_epochs",
    "scheduler": "use --lr_scheduler",
    "template": "use --prompt_format",
    "train": "use --train_file",
    "validation": "use --validation_file",
    "wandb_disabled": "nothing goes to Weights & Biases without --wandb_log",
    "max_seq_length": "use --block_size (and --overflow=truncate_target to truncate longer examples)",
    "no_cuda": "use --device=cpu",
    "num_virtual_tokens": "write the number in --prompt_format, as in '<P*20>{prompt}'",
    "optim": f"use --optimizer={'|'.join(OPTIMIZERS)}",
    "overwrite_output_dir": "use --overwrite, which deletes the run in --out_dir",
    "per_device_eval_batch_size": "evaluation uses --batch_size",
    "per_device_train_batch_size": "use --batch_size; --batch_size x --gradient_accumulation_steps is the global batch "
    "size, whatever the number of ranks",
    "precompute_ref_log_probs": "use --reference=cache",
    "report_to": "use --wandb_log, --trackio_log or --tensorboard_log",
    "reward_weights": "write the weights in --reward, as in correct:1,format:0.5",
    "run_name": "use --wandb_run_name",
    "save_strategy": "use --checkpoint_interval, in steps, with --no-checkpoint_at_eval or --no-always_save_checkpoint",
    "save_total_limit": "use --keep_last, which counts the newest checkpoints; the best one is kept too",
    "steps_per_generation": "each global batch is one rollout batch; --num_iterations sets its optimizer steps",
    "torch_dtype": "weights are float32; use --dtype for mixed precision, --base_dtype for an adapter's base",
    "use_cpu": "use --device=cpu",
    "load_in_4bit": "use --quantize_base=nf4",
    "load_in_8bit": "use --quantize_base=int8",
    "use_peft": "use --adapter=lora",
}
KEY_HINTS = {  # keys of trainers' configs that become no argument
    **{key: f"leave it out: {reason}" for key, reason in hf_other_keys.WITHOUT_EFFECT.items()},
    **{key: f"not supported: {reason}" for key, (reason, *_) in hf_other_keys.NOT_SUPPORTED.items()},
}


# ---------------------------------------------------------------------------------------------------------------------
# the folder that is named, and values beneath those that are set

Layer = tuple[str, dict[str, Any]]  # the source of values, and the values


def locate_layers(layers: list[Layer]) -> list[Layer]:
    """The layers with the folder, and for a resumed run the checkpoint, that they name by where a file lies.

    A run's train_config.json may be a copy, or moved: its folder is the one around it, whatever it says. A checkpoint
    that is named by its path is of the run around it, unless an out_dir is set.
    """
    from nanoforge import run_dir

    layers = spell_out_auto(layers)
    is_resumed = [values["init_from"] for _, values in layers if "init_from" in values][-1:] == ["resume"]
    has_out_dir = any(name in values for _, values in layers for name in ("out_dir", "output_dir"))
    located = []
    for source, values in layers:
        folder = Path(source).parent
        is_record = Path(source).name == config_files.RECORD_FILE
        if is_record and run_dir.holds_checkpoint(folder):
            resumed = {"checkpoint": str(folder)} if is_resumed else {}
            rest = {name: value for name, value in values.items() if name != "out_dir"}
            located.append((source, rest | out_dir_around(folder) | resumed))
        elif is_record and len(run_dir.existing_run_files(folder)) > 1:
            located.append((source, values | {"out_dir": str(folder)}))
        else:
            named = values.get("checkpoint", values.get("resume_from_checkpoint", ""))
            checkpoint = Path(str(named)).expanduser()
            is_path = not has_out_dir and run_dir.holds_checkpoint(checkpoint)
            located.append((source, values | out_dir_around(checkpoint) if is_path else values))
    return located


def spell_out_auto(layers: list[Layer]) -> list[Layer]:
    """The layers with --batch_size=auto as what it means: the batch_size beneath it stands. A later number ends it."""
    spelled_out = []
    is_auto = False
    for source, values in layers:
        names = [name for name in ("batch_size", "micro_batch_size") if name in values]
        if any(values[name] == "auto" for name in names):
            values = {name: value for name, value in values.items() if name not in names}
            values["auto_find_batch_size"] = is_auto = True
        elif names and is_auto and "auto_find_batch_size" not in values:
            values = values | {"auto_find_batch_size": False}
        spelled_out.append((source, values))
    return spelled_out


def out_dir_around(folder: Path) -> dict[str, str]:
    """The out_dir of the run that a checkpoint lies in; nothing where it lies in none."""
    from nanoforge import run_dir

    run_folder = run_dir.run_of_checkpoint(folder)
    return {"out_dir": str(run_folder)} if run_folder else {}


def resumed_config(args: TrainArgs) -> str | None:
    """Path of the config of the run to resume, whose values lie under the command line's. Raises UserError."""
    if args.init_from != "resume":
        return None
    if args.named_checkpoint:
        return str(args.named_checkpoint / config_files.RECORD_FILE)
    path = os.path.join(args.out_dir, config_files.RECORD_FILE)
    if os.path.exists(os.path.join(args.out_dir, "progress.json")):
        raise UserError(f"--out_dir={args.out_dir}: is a checkpoint; resume from it with --checkpoint={args.out_dir}")
    if not os.path.exists(path):
        raise UserError(f"--init_from=resume: no run in {args.out_dir} (no {path}); set --out_dir to the run's folder")
    return path


def derive(args: TrainArgs, source: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """The values that --depth and others give to the arguments that are not set."""
    is_set = {name: getattr(args, name) for name, origin in source.items() if origin != configurator.DEFAULT}
    flags: list[str] = []
    values: dict[str, Any] = {}
    if args.budget and args.init_from == "scratch":
        flags += [f"--{name}={getattr(args, name):g}" for name in BUDGETS if getattr(args, name)]
        values = budget_values(is_set)
    if args.depth and args.init_from == "scratch":
        flags.append(f"--depth={args.depth}")
        values = depth.derive_args(args.depth, args.aspect, args.tokens_per_weight, args.block_size, is_set)
    max_iters = args.max_iters if "max_iters" in is_set else values.get("max_iters", args.max_iters)
    if args.warmup_ratio and "warmup_iters" not in is_set:
        flags.append(f"--warmup_ratio={args.warmup_ratio:g}")
        values["warmup_iters"] = math.ceil(args.warmup_ratio * max_iters)
    if args.schedule in DECAYS_TO_MIN_LR and max_iters != TrainArgs.lr_decay_iters and "lr_decay_iters" not in values:
        flags.append(f"--max_iters={max_iters}")
        values["lr_decay_iters"] = max(1, max_iters)
    if args.prompt_format and args.max_tokens > args.block_size:
        flags.append(f"--max_tokens={args.max_tokens}")
        values["block_size"] = args.max_tokens
    values = {name: value for name, value in values.items() if name not in is_set}
    return (", ".join(flags), values) if values else ("", {})


def budget_values(is_set: Mapping[str, Any]) -> dict[str, Any]:
    """What a budget gives before it is measured: the architecture, which arguments it chooses, and a size that fits
    those that are set."""
    values: dict[str, Any] = {}
    for _, layer in config_files.read_layers(str(BUDGET_CONFIG)):
        values |= layer
    values["n_embd"], values["n_head"] = depth.shape(TrainArgs.n_layer, TrainArgs.aspect, is_set)
    values["budget_chooses"] = tuple(name for name in budget.CHOSEN if name not in is_set)
    return {name: value for name, value in values.items() if name != "depth"}


# ---------------------------------------------------------------------------------------------------------------------
# arguments that conflict: each function yields the errors it finds; `source` says where each value came from


def run_errors(args: TrainArgs, source: dict[str, str]) -> Iterator[str]:
    """Errors of the run's folder and mode."""
    if args.overwrite and args.init_from == "resume" and args.checkpoint == "last":
        yield (
            "--overwrite: would delete the run that --init_from=resume continues; use one of them, "
            "or name with --checkpoint an older checkpoint whose successors it deletes"
        )
    if args.init_from == "resume" and args.begins_run and source["out_dir"] == configurator.DEFAULT:
        yield f"--checkpoint={args.checkpoint}: lies in no run's folder; set --out_dir to a new one"
    if args.task_name and args.init_from == "resume" and source["out_dir"] == configurator.DEFAULT:
        yield "--task_name: starts a new run; to resume one, set --out_dir"
    if args.task_name and args.task_name != Path(args.task_name).name:
        yield f"--task_name={args.task_name}: must be a plain name, not a path"
    if args.eval_only:
        for flag in ("overwrite", "plot_loss", "wandb_log", "trackio_log", "tensorboard_log", "auto_find_batch_size"):
            if source[flag] == configurator.COMMAND_LINE and getattr(args, flag):
                yield f"--{flag}: has no effect with --eval_only, which writes nothing"


def budget_errors(args: TrainArgs, source: dict[str, str]) -> Iterator[str]:
    """Errors of a budget, which chooses what a size would set."""
    flags = [f"--{name}" for name in BUDGETS if getattr(args, name)]
    if len(flags) > 1:
        yield f"{' and '.join(flags)}: a run has one budget; keep one of them"
    if not flags or args.init_from == "resume":
        return
    for name in NOT_WITH_BUDGET:
        origin = source[name]
        is_chosen = origin == configurator.DEFAULT or origin.startswith("--") or is_record(origin)
        if not is_chosen:
            yield f"--{name}={configurator.format_arg(getattr(args, name))}: {flags[0]} decides it; set one of them"
    if args.objective != "lm" or args.training_mode != "single":
        yield f"{flags[0]}: works with --objective=lm on one dataset; set sizes and --max_iters for other runs"
    if args.eval_only:
        yield f"--eval_only: has no effect with {flags[0]}, which trains"
    unknown = set(args.budget_chooses) - set(budget.CHOSEN)
    if unknown:
        yield f"--budget_chooses={' '.join(sorted(unknown))}: must be of {' '.join(budget.CHOSEN)}"
    if args.optimizer != "muon" and "learning_rate" in args.budget_chooses:
        yield f"{flags[0]}: chooses learning rates for --optimizer=muon; set --learning_rate"


def is_record(origin: str) -> bool:
    """Whether a value comes from the record of a run."""
    return Path(origin).name == config_files.RECORD_FILE


def weights_errors(args: TrainArgs) -> Iterator[str]:
    """Errors of --init_from and of what needs pretrained weights."""
    error = hub.source_error(args.init_from, ("scratch", "resume", *hub.GPT2_NAMES))
    if error:
        yield f"--init_from={args.init_from}: {error}"
    yield from base_model_errors(args.base_model)
    if args.init_from not in ("scratch", "resume") and args.vocabulary != "one":
        yield "--init_from: loaded weights have one vocabulary; use --training_mode=single, or no --multidataset_wte"
    if args.init_from == "scratch" and args.needs_reference:
        alternative = " (or --beta=0)" if args.objective == "grpo" else ""
        yield f"--objective={args.objective}: requires pretrained weights; set --init_from{alternative}"
    if args.init_from == "scratch" and args.adapter != "none":
        yield f"--adapter={args.adapter}: requires pretrained weights; set --init_from"


def model_errors(args: TrainArgs) -> Iterator[str]:
    """Errors of the model's shape."""
    head_dim = args.head_dim or args.n_embd // args.n_head
    if args.n_embd % args.n_head and not args.head_dim:
        yield f"--n_embd={args.n_embd}: must be divisible by --n_head={args.n_head}, or set --head_dim"
    elif args.position == "rope" and head_dim % 2:
        yield f"--position=rope: head_dim must be even, got {head_dim}"
    yield from rope_scaling_errors(args.rope_scaling)
    if args.n_kv_head and args.n_head % args.n_kv_head:
        yield f"--n_kv_head={args.n_kv_head}: must divide --n_head={args.n_head}"
    if not args.window or set(args.window) - set("LS"):
        yield f"--window={args.window}: must consist of the letters L and S"
    if args.loss_chunk and args.vocabulary != "one":
        yield "--loss_chunk: works with a single vocabulary only, not one per context or dataset"


def rope_scaling_errors(scaling: dict[str, Any]) -> Iterator[str]:
    """Errors of --rope_scaling."""
    if not scaling:
        return
    rope_type = scaling.get("rope_type")
    if rope_type not in ROPE_SCALING_NUMBERS:
        yield f"--rope_scaling: rope_type={rope_type} must be {' or '.join(ROPE_SCALING_NUMBERS)}"
        return
    for name in ROPE_SCALING_NUMBERS[rope_type]:
        value = scaling.get(name)
        if not isinstance(value, int | float) or value <= 0:
            yield f"--rope_scaling: {rope_type} needs {name}, a number above 0; got {value}"
    unknown = scaling.keys() - {"rope_type", *ROPE_SCALING_NUMBERS[rope_type]}
    if unknown:
        yield f"--rope_scaling: {rope_type} has no {', '.join(sorted(unknown))}"


def mixture_errors(args: TrainArgs) -> Iterator[str]:
    """Errors of --training_mode=multidataset."""
    if not args.dataset_list:
        yield "--dataset_list: required by --training_mode=multidataset"
    if len(set(args.dataset_list)) < len(args.dataset_list):
        yield "--dataset_list: contains a dataset twice"
    for name in ("dataset_sampling_probs", "dataset_sampling_probs_final"):
        weights = getattr(args, name)
        if weights and len(weights) != len(args.dataset_list):
            yield f"--{name}: {len(weights)} weights for {len(args.dataset_list)} datasets"
        if weights and (min(weights) < 0 or sum(weights) <= 0):
            yield f"--{name}: weights must not be negative, and not all zero"
    has_fractions = any(turns < 1 or turns != int(turns) for turns in args.dataset_sampling_probs)
    if args.dataset_interleaving and has_fractions:
        yield "--dataset_sampling_probs: must be whole numbers of at least 1 with --dataset_interleaving"
    has_zeros = not all(args.dataset_sampling_probs + args.dataset_sampling_probs_final)
    is_exponential = args.dataset_sampling_probs_transition_method == "exponential"
    if args.dataset_sampling_probs_final and is_exponential and has_zeros:
        yield "--dataset_sampling_probs_transition_method=exponential: requires weights above 0"
    if args.multidataset_wte and args.vocab_size:
        yield "--vocab_size: has no effect with --multidataset_wte; each dataset has its own"


def multicontext_errors(args: TrainArgs) -> Iterator[str]:
    """Errors of --training_mode=multicontext."""
    if not args.multicontext_datasets:
        yield "--multicontext_datasets: required by --training_mode=multicontext"
    if len(set(args.multicontext_datasets)) < len(args.multicontext_datasets):
        yield "--multicontext_datasets: contains a dataset twice"
    if args.vocab_size:
        yield "--vocab_size: has no effect with --training_mode=multicontext; each context has its own"


def example_errors(args: TrainArgs) -> Iterator[str]:
    """Errors of the datasets of objectives that read examples."""
    if args.training_mode == "multicontext":
        yield f"--objective={args.objective}: reads examples; use --training_mode=single or multidataset"
    if args.multidataset_wte:
        yield f"--multidataset_wte: --objective={args.objective} works with a single vocabulary only"
    if args.validation_file and not args.train_file:
        yield "--validation_file: requires --train_file; without both, the dataset's own are read"
    if args.train_file and args.training_mode != "single":
        yield "--train_file: requires --training_mode=single"
    yield from columns_errors(args)
    for flag in ("train_file", "validation_file"):
        path = getattr(args, flag)
        if path and not Path(path).is_file():
            yield f"--{flag}={path}: no such file"


def hub_errors(args: TrainArgs) -> Iterator[str]:
    """Errors of datasets of the hub."""
    flag = {"single": "dataset", "multidataset": "dataset_list"}.get(args.training_mode, "multicontext_datasets")
    for name in args.hub_names:
        if not OBJECTIVES[args.objective].reads_examples:
            yield (
                f"--{flag}={name}: --objective={args.objective} reads token bins; make them with "
                f"data/prepare.py --input={name} --name=NAME, then --{flag}=NAME"
            )
        elif error := hub_datasets.name_error(name):
            yield f"--{flag}={error}"


def columns_errors(args: TrainArgs) -> Iterator[str]:
    """Errors of --columns."""
    try:
        row_shapes.parse_columns(args.columns, None if args.prompt_format else row_shapes.PARTS)
    except UserError as error:
        yield str(error)


def is_weight(text: str) -> bool:
    """Whether the text is a finite number of at least 0."""
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False


def preference_errors(args: TrainArgs) -> Iterator[str]:
    """Errors of the reference model, DPO and KTO."""
    if args.reference == "adapter" and args.adapter == "none":
        yield "--reference=adapter: there is no adapter to disable; use copy or cache, or --adapter=lora"
    if args.reference == "cache" and args.objective != "dpo":
        yield f"--reference=cache: works with --objective=dpo only; {args.objective} has no fixed sequences"
    if args.objective == "dpo" and args.dpo_loss == "ipo" and args.beta == 0:
        yield "--beta=0: must be above 0 with --dpo_loss=ipo, which divides by it"
    for flag in ("desirable_weight", "undesirable_weight"):
        weight = getattr(args, flag)
        if weight != "auto" and not is_weight(weight):
            yield f"--{flag}={weight}: must be auto or a number of at least 0"
    if args.desirable_weight == args.undesirable_weight == "auto":
        yield "--desirable_weight=auto: requires a number for --undesirable_weight"
    if args.objective == "kto" and args.global_batch_size < 2:
        yield "--batch_size=1: KTO estimates the KL from mismatched pairs; the global batch needs at least 2 examples"


def grpo_errors(args: TrainArgs) -> Iterator[str]:
    """Errors of GRPO."""
    if args.global_batch_size % args.num_generations:
        yield (
            f"--num_generations={args.num_generations}: must divide the global batch size of "
            f"{args.global_batch_size} (--batch_size x --gradient_accumulation_steps)"
        )
    for flag in ROLLOUT_INTERVALS:
        steps = getattr(args, flag)
        if steps % args.num_iterations:
            yield (
                f"--{flag}={steps}: must be a multiple of --num_iterations={args.num_iterations}; "
                "a run is saved between rollouts"
            )
    if args.max_new_tokens >= args.block_size:
        yield f"--max_new_tokens={args.max_new_tokens}: leaves no room for a prompt in --block_size={args.block_size}"
    if args.loss_chunk and args.temperature != 1:
        yield "--loss_chunk: requires --temperature=1"


def prompt_errors(args: TrainArgs) -> Iterator[str]:
    """Errors of soft prompts."""
    for flag in ("target_field", "truncation_field"):
        if getattr(args, flag) and args.objective != "sft":
            yield f"--{flag}: requires --objective=sft"
    if args.adapter != "soft_prompt":
        return
    yield from prompt_format_errors(args)
    if not OBJECTIVES[args.objective].reads_examples:
        yield "--adapter=soft_prompt: requires examples; use --objective=sft, dpo, kto or grpo"
    if args.prompt_provider == "lstm" and args.parallel == "fsdp":
        yield "--prompt_provider=lstm: cannot be sharded by --parallel=fsdp; use --parallel=ddp"
    if args.packing:
        yield "--packing: not supported with --adapter=soft_prompt"


def prompt_format_errors(args: TrainArgs) -> Iterator[str]:
    """Errors of --prompt_format and of the length that it bounds. A run that began with some of them goes on."""
    if not args.prompt_format:
        yield "--prompt_format: required by --adapter=soft_prompt"
        return
    from nanoforge.posttraining import prompt_format  # here, since few runs need it

    try:
        template = prompt_format.parse(args.prompt_format)
        template.check_fields(args.target_field or "completion", args.truncation_field or None)
    except UserError as error:
        yield str(error)
    if args.init_from == "resume":
        return
    if args.max_tokens > args.block_size:
        yield f"--max_tokens={args.max_tokens}: more than --block_size={args.block_size}; raise that"
    first, last = args.prompt_format[0], args.prompt_format[-1]
    if first == last and first in "\"'":
        yield (
            f"--prompt_format={args.prompt_format}: has the inner quotes that Hydra needs; leave them out, "
            f"or write \\{first} for literal ones"
        )


def optimizer_errors(args: TrainArgs, source: dict[str, str]) -> Iterator[str]:
    """Errors of optimizer and learning rate schedule."""
    if args.depth and args.optimizer != "muon" and source["learning_rate"].startswith("--depth"):
        yield f"--depth={args.depth}: sets learning rates for --optimizer=muon (configs/depth.py); set --learning_rate"
    if args.optimizer not in OPTIMIZERS and ":" not in args.optimizer:
        suggestion = did_you_mean(args.optimizer, OPTIMIZERS)
        yield f"--optimizer={args.optimizer}: must be one of {', '.join(OPTIMIZERS)} or package:Class{suggestion}"
    if args.schedule != "none" and args.peak_lr and args.min_lr > args.peak_lr:
        yield f"--min_lr={args.min_lr:g}: must not be above the peak of {args.peak_lr:g} (--learning_rate)"
    if args.schedule == "exponential" and args.min_lr == 0:
        yield "--min_lr=0: must be above 0 with an exponential schedule"
    if args.schedule in DECAYS_TO_MIN_LR and args.warmup_iters > args.lr_decay_iters:
        yield f"--warmup_iters={args.warmup_iters}: must not be above --lr_decay_iters={args.lr_decay_iters}"
    ratio_source, warmup_source = source["warmup_ratio"], source["warmup_iters"]
    is_recorded = ratio_source.endswith(config_files.RECORD_FILE) and ratio_source == warmup_source
    if args.warmup_ratio and "--warmup_ratio" not in warmup_source and not is_recorded:
        yield f"--warmup_ratio={args.warmup_ratio:g}: --warmup_iters={args.warmup_iters} is set; set one of them"
    if source["decay_lr"] == configurator.COMMAND_LINE and not args.decay_lr and args.schedule != "none":
        yield f"--no-decay_lr: conflicts with --lr_scheduler={args.lr_scheduler}"


def system_errors(args: TrainArgs) -> Iterator[str]:
    """Errors of packages, precision and device."""
    packages = {"wandb_log": "wandb", "trackio_log": "trackio"}
    packages |= {"tensorboard_log": "tensorboard", "plot_loss": "matplotlib"}
    for flag, package in packages.items():
        if getattr(args, flag) and find_spec(package) is None:
            yield f"--{flag}: requires a package: pip install {package}"
    if args.quantize_base != "none" and find_spec("bitsandbytes") is None:
        yield f"--quantize_base={args.quantize_base}: requires a package: pip install bitsandbytes"
    if args.quantize_base != "none" and args.parallel == "fsdp":
        yield f"--quantize_base={args.quantize_base}: cannot be sharded by --parallel=fsdp; use ddp, or --base_dtype"
    if args.parallel == "fsdp" and args.dtype == "float16":
        yield "--dtype=float16: its loss scaling does not work with --parallel=fsdp; use bfloat16"
    yield from cuda_graph_errors(args)
    yield from attention_kernel_errors(args)
    yield from device_errors(args)
    environment_error = launcher.environment_error()
    if environment_error:
        yield environment_error


def cuda_graph_errors(args: TrainArgs) -> Iterator[str]:
    """What a CUDA graph of a step can't hold: other ranks, what the host decides, and shapes that change."""
    if not args.cuda_graph:
        return
    if args.device.partition(":")[0] in ("cpu", "mps"):
        yield f"--cuda_graph: needs a CUDA GPU, not --device={args.device}; leave it out"
    if launcher.world_size() > 1 or args.parallel == "fsdp":
        yield "--cuda_graph: is for one GPU; leave it out with several ranks and with --parallel=fsdp"
    if args.objective != "lm":
        yield f"--cuda_graph: needs batches of one shape, as --objective=lm has, not --objective={args.objective}"
    if args.optimizer not in ON_DEVICE_OPTIMIZERS:
        names = ", ".join(ON_DEVICE_OPTIMIZERS)
        yield f"--cuda_graph: a step of --optimizer={args.optimizer} needs the host; choose one of {names}"
    if args.dtype == "float16":
        yield "--cuda_graph: the loss scaling of --dtype=float16 needs the host; use bfloat16"
    if args.activation_checkpointing:
        yield "--cuda_graph: --activation_checkpointing saves random states on the host; leave one of them out"


def attention_kernel_errors(args: TrainArgs) -> Iterator[str]:
    """Errors of kernels that can't do what other arguments need."""
    if args.attention_kernel == "cudnn" and args.deterministic:
        yield "--attention_kernel=cudnn: is not deterministic; with --deterministic use auto or flash"
    masked = {
        "--window": "S" in args.window,
        "--packing": args.packing,
        f"--objective={args.objective}": OBJECTIVES[args.objective].is_online or OBJECTIVES[args.objective].is_paired,
    }
    flags = [flag for flag, needs_mask in masked.items() if needs_mask]
    if args.attention_kernel == "flash" and flags:
        yield f"--attention_kernel=flash: has no masks, needed by {' and '.join(flags)}; use auto, efficient or cudnn"


def check(args: TrainArgs, source: dict[str, str]) -> Iterator[str]:
    """All errors of arguments that conflict."""
    yield from run_errors(args, source)
    yield from budget_errors(args, source)
    yield from weights_errors(args)
    yield from model_errors(args)
    if args.training_mode == "multidataset":
        yield from mixture_errors(args)
    if args.training_mode == "multicontext":
        yield from multicontext_errors(args)
    yield from hub_errors(args)
    if OBJECTIVES[args.objective].reads_examples:
        yield from example_errors(args)
    yield from preference_errors(args)
    if args.objective == "grpo":
        yield from grpo_errors(args)
    yield from prompt_errors(args)
    yield from optimizer_errors(args, source)
    yield from system_errors(args)


# ---------------------------------------------------------------------------------------------------------------------
# reading arguments

RULES = Rules(locate=locate_layers, resumed_config=resumed_config, derive=derive, check=check, hints=KEY_HINTS | HINTS)


def spell_out_resume(argv: list[str]) -> tuple[list[str], list[str]]:
    """--resume, --resume=VALUE, --resume VALUE and --no-resume as --init_from, and the errors of their values."""
    spelled_out: list[str] = []
    errors: list[str] = []
    rest = iter(configurator.join_bare_flags(argv, {"--resume": ()}))
    for text in rest:
        flag, _, value = text.partition("=")
        if text == "--no-resume":
            flag, value = "--resume", "false"
        elif text == "--resume":
            value = next(rest)
        if flag != "--resume":
            spelled_out.append(text)
            continue
        try:
            is_resumed = configurator.convert_bool(value)
        except UserError as error:
            errors.append(f"--resume={value}: {error}; to resume a run, --resume --out_dir=RUN")
            continue
        if is_resumed:
            spelled_out.append("--init_from=resume")
        elif not any(text.startswith("--init_from") for text in argv):
            spelled_out.append("--init_from=scratch")
    return spelled_out, errors


def resolve(layers: list[tuple[str, dict[str, Any]]]) -> Resolved:
    """What train.py would make of these layers of (source, values); never exits."""
    return configurator.resolve(TrainArgs, layers, RULES)


def load_args(folder: Path) -> TrainArgs:
    """The arguments of a run, from the train_config.json in its folder or in a checkpoint's. Raises UserError."""
    path = str(folder / "train_config.json")
    return resolve([(path, config_files.read_file(path))]).args


def parse(argv: list[str] | None = None) -> TrainArgs:
    """The arguments that a command line asks for; prints all errors at once and exits with status 2."""
    argv = sys.argv[1:] if argv is None else argv
    # transformers' resume_from_checkpoint is a path, or true: the last one
    argv = ["--resume" if text.lower() == "--resume_from_checkpoint=true" else text for text in argv]
    argv, errors = spell_out_resume(argv)
    if errors:
        configurator.exit_with_errors(errors)
    if any(text.startswith("--resume_from_checkpoint") for text in argv):
        argv = ["--init_from=resume", *argv]
    return configurator.parse(TrainArgs, argv, "Train a GPT: see README.md.", RULES)
