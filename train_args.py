"""The argument table of train.py: one row an argument. Imports no torch.

`parse()` gives the frozen arguments; what follows from them (the mixture, the schedule's name) are properties of theirs.
What the rows mean to each other is told by their `needs` and in `check`.
"""

import dataclasses
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import configurator
from configurator import OnlyWith, Resolved, Rules, arg
from nanoforge import config_files
from nanoforge.errors import UserError, did_you_mean
from nanoforge.posttraining import prompt_format
from nanoforge.training import depth
from nanoforge.training.schedules import SCHEDULES

OPTIMIZERS = ("adamw", "adam", "sgd", "nadam", "radam", "rmsprop", "adagrad", "adafactor", "lion", "muon")
DPO_LOSSES = ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "apo_zero")
SMOOTHED = ("sigmoid", "robust", "sigmoid_norm")
GPT2_TYPES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

# ---------------------------------------------------------------------------------------------------------------------
# when an argument has an effect

MULTIDATASET = OnlyWith("--training_mode=multidataset", lambda a: a.training_mode == "multidataset")
DRAWN = OnlyWith(
    "--training_mode=multidataset without --dataset_interleaving",
    lambda a: a.training_mode == "multidataset" and not a.dataset_interleaving,
)
FINAL_PROBS = OnlyWith("--dataset_sampling_probs_final", lambda a: bool(a.dataset_sampling_probs_final))
DECAYING = OnlyWith("a schedule that decays (--decay_lr or --lr_scheduler)", lambda a: a.schedule != "none")
DECAY_HORIZON = OnlyWith(
    "--lr_scheduler=linear|cosine|exponential|wsd or --decay_lr",
    lambda a: a.schedule in ("linear", "cosine", "exponential", "wsd"),
)
FSDP = OnlyWith("--parallel=fsdp", lambda a: a.parallel == "fsdp")


def objective_in(*names: str) -> OnlyWith:
    return OnlyWith("--objective=" + "|".join(names), lambda a: a.objective in names)


EXAMPLES = objective_in("sft", "dpo", "kto", "grpo")
LORA = OnlyWith("--adapter=lora", lambda a: a.adapter == "lora")
SOFT_PROMPT = OnlyWith("--adapter=soft_prompt", lambda a: a.adapter == "soft_prompt")
TASK = OnlyWith("--task_name", lambda a: bool(a.task_name))
DEPTH = OnlyWith("--depth", lambda a: a.depth > 0)
FROM_SCRATCH = OnlyWith(
    "--init_from=scratch (loaded weights bring theirs)", lambda a: a.init_from in ("scratch", "resume")
)


def optimizer_in(*names: str) -> OnlyWith:
    return OnlyWith("--optimizer=" + "|".join(names), lambda a: a.optimizer in names)


# ---------------------------------------------------------------------------------------------------------------------
# the table


# fmt: off
@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """run"""
    out_dir: str = arg("out",
        "folder of the run: checkpoints, metrics.jsonl, train_config.json",
        inherit=False, alias=("output_dir",))
    task_name: str = arg("", "without --out_dir: the run goes to outputs/TASK_NAME/DATE_TIME", inherit=False)
    debug: bool = arg(False, "with --task_name: to outputs/debug/TASK_NAME/DATE_TIME", inherit=False, needs=TASK)
    overwrite: bool = arg(False, "start anew in an out_dir that already holds a run, deleting that run", inherit=False)
    init_from: str = arg("scratch",
        "scratch, resume (continue the run in out_dir), gpt2 or gpt2-medium|large|xl (from the hub), or a PATH to weights: "
            "a run, a checkpoint, a folder or file of GPT-2's safetensors, nanoGPT's ckpt.pt",
        inherit=False)
    gpt2_type: str = arg("gpt2",
        "which GPT-2 --init_from=gpt2 loads",
        choices=GPT2_TYPES, needs=OnlyWith("--init_from=gpt2", lambda a: a.init_from == "gpt2"), inherit=False)
    allow_data_change: bool = arg(False,
        "resume on bins that differ from those that the run began with",
        inherit=False, needs=OnlyWith("--init_from=resume", lambda a: a.init_from == "resume"))
    eval_only: bool = arg(False, "evaluate once, write no checkpoint, and stop", inherit=False)
    seed: int = arg(1337, "all randomness follows from it: weights, data order, dropout", low=0, high=2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class DataArgs:
    """data"""
    data_dir: str = arg("data", "folder that holds the dataset folders")
    training_mode: str = arg("single",
        "one dataset, a mixture of several, or aligned streams whose embeddings are summed",
        choices=("single", "multidataset", "multicontext"))
    dataset: str = arg("shakespeare_char",
        "folder in data_dir; made by its prepare.py if its bins are missing",
        needs=OnlyWith("--training_mode=single", lambda a: a.training_mode == "single"))
    train_file: str = arg("",
        "examples: a .jsonl, .csv or .tsv file (none: train.jsonl in the dataset's folder)",
        needs=EXAMPLES)
    validation_file: str = arg("", "examples to validate on (none: val.jsonl in the dataset's folder)", needs=EXAMPLES)
    overflow: str = arg("error",
        "of examples longer than block_size (or than --max_tokens, with --prompt_format): an error, drop them, or cut their end",
        needs=EXAMPLES, choices=("error", "drop", "truncate_target"))
    sampling_method: str = arg("random",
        "windows at random, each once an epoch in random order, or in order; examples always come once an epoch in random order",
        choices=("random", "without_replacement", "sequential"), needs=objective_in("lm"))
    dataset_list: tuple[str, ...] = arg((), "the datasets of a mixture", needs=MULTIDATASET)
    dataset_sampling_probs: tuple[float, ...] = arg((),
        "weight of each dataset, of any positive scale (none: equal); with --dataset_interleaving whole numbers: how many in a row",
        needs=MULTIDATASET)
    dataset_sampling_probs_final: tuple[float, ...] = arg((), "weights reached at max_iters", needs=DRAWN)
    dataset_sampling_probs_transition_method: str = arg("linear",
        "how weights go from first to final",
        choices=("linear", "cosine", "exponential"), needs=FINAL_PROBS)
    dataset_mixing: str = arg("batch",
        "draw a dataset for each whole batch or for each sequence",
        choices=("batch", "sequence"), needs=MULTIDATASET)
    dataset_interleaving: bool = arg(False, "take the datasets in turn instead of at random", needs=MULTIDATASET)
    multidataset_wte: bool = arg(False,
        "each dataset has its own embedding and head (they may differ in tokenizer)",
        needs=MULTIDATASET, model_shape=True)
    multicontext_datasets: tuple[str, ...] = arg((),
        "aligned datasets of equal length, one context each",
        needs=OnlyWith("--training_mode=multicontext", lambda a: a.training_mode == "multicontext"))


@dataclass(frozen=True, kw_only=True)
class DepthArgs:
    """depth"""
    depth: int = arg(0,
        "one dial for the size: layers, and from them width, heads, batch, steps, rates and weight decay by the rules of docs/depth.md; what is given stands (0: none)",
        low=0, needs=FROM_SCRATCH)
    aspect: int = arg(64, "width over depth", low=1, needs=DEPTH)
    tokens_per_weight: float = arg(20.0, "training tokens over the weights of the blocks", above=0, needs=DEPTH)


@dataclass(frozen=True, kw_only=True)
class BatchArgs:
    """batch"""
    batch_size: int = arg(64,
        "sequences in a micro-batch; with accumulation this makes the optimizer's batch, whatever the number of ranks",
        low=1)
    gradient_accumulation_steps: int = arg(1, "micro-batches in one optimizer step", low=1)
    block_size: int = arg(256,
        "tokens of context; loaded weights with a longer context are cropped to it, with a shorter one keep theirs",
        low=1, model_shape=True)


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """model"""
    n_layer: int = arg(6, "blocks", low=1, model_shape=True, needs=FROM_SCRATCH)
    n_head: int = arg(6, "attention heads", low=1, model_shape=True, needs=FROM_SCRATCH)
    n_kv_head: int = arg(0,
        "heads of keys and values, shared by groups of query heads (0: n_head)",
        low=0, model_shape=True, needs=FROM_SCRATCH)
    n_embd: int = arg(384, "width", low=1, model_shape=True, needs=FROM_SCRATCH)
    vocab_size: int = arg(0,
        "rows of embedding and head (0: the tokenizer's); 50304 pads GPT-2's for speed",
        low=0, model_shape=True, needs=FROM_SCRATCH)
    bias: bool = arg(False, "biases in linear layers and LayerNorm", model_shape=True, needs=FROM_SCRATCH)
    norm: str = arg("layernorm",
        "layernorm, rmsnorm, or rmsnorm_nogain",
        choices=("layernorm", "rmsnorm", "rmsnorm_nogain"), model_shape=True, needs=FROM_SCRATCH)
    position: str = arg("learned",
        "learned positions, rotary (rope), or none",
        choices=("learned", "rope", "none"), model_shape=True, needs=FROM_SCRATCH)
    rope_base: float = arg(10000.0,
        "base of the rotary frequencies",
        above=0, model_shape=True, needs=OnlyWith("--position=rope", lambda a: a.position == "rope"))
    activation: str = arg("gelu",
        "any of torch.nn.functional by its name, gelu_tanh, or relu2 (ReLU squared)",
        model_shape=True, needs=FROM_SCRATCH)
    mlp: str = arg("plain",
        "plain, or gated (SwiGLU with --activation=silu)",
        choices=("plain", "gated"), model_shape=True, needs=FROM_SCRATCH)
    mlp_ratio: float = arg(4.0, "hidden width of the MLP over n_embd", above=0, model_shape=True, needs=FROM_SCRATCH)
    qk_norm: bool = arg(False,
        "RMS-normalise queries and keys, before they are rotated",
        model_shape=True, needs=FROM_SCRATCH)
    window: str = arg("L",
        "attention of the layers, repeated: L long (all of the block), S short (window_size)",
        model_shape=True, needs=FROM_SCRATCH)
    window_size: int = arg(0,
        "tokens that a short layer sees, itself included (0: half of block_size)",
        low=0, model_shape=True, needs=OnlyWith("an S in --window", lambda a: "S" in a.window))
    logit_softcap: float = arg(0.0,
        "bound c on the logits: c z / sqrt(z^2 + c^2) (0: none)",
        low=0, model_shape=True, needs=FROM_SCRATCH)
    embedding_norm: bool = arg(False,
        "RMS-normalise the embedding, before the first block",
        model_shape=True, needs=FROM_SCRATCH)
    value_residual: bool = arg(False,
        "mix each layer's values with the first layer's, in learned parts",
        model_shape=True, needs=FROM_SCRATCH)
    residual_scalars: bool = arg(False,
        "each block sees r x + a x0, of the stream x and the embedding x0, with learned r and a",
        model_shape=True, needs=FROM_SCRATCH)
    tie_weights: bool = arg(True, "the head is the token embedding", model_shape=True, needs=FROM_SCRATCH)
    zero_init: bool = arg(False,
        "output projections of attention and MLP (and an untied head) start at zero",
        needs=OnlyWith("--init_from=scratch", lambda a: a.init_from == "scratch"))
    dropout: float = arg(0.0, "chance that an activation is dropped in training", low=0, high=0.999)


@dataclass(frozen=True, kw_only=True)
class ObjectiveArgs:
    """objective"""
    objective: str = arg("lm",
        "lm: all of the text; on examples in JSONL sft: completions; dpo, kto: preferences; grpo: rewards of the model's own answers",
        choices=("lm", "sft", "dpo", "kto", "grpo"))
    loss_on: str = arg("completion",
        "learn completions and their end tokens, or all of the text",
        choices=("completion", "all"), needs=objective_in("sft"))
    packing: bool = arg(False,
        "put several examples into a sequence, where each sees itself alone",
        needs=objective_in("sft"))
    beta: float = arg(0.1,
        "strength of the tie to the reference model (grpo: weight of the divergence from it; 0: none)",
        low=0, needs=objective_in("dpo", "kto", "grpo"))
    reference: str = arg("auto",
        "what the reference is: the model with its adapter switched off, log-probabilities computed beforehand and kept beside the data, or a frozen copy (auto: adapter where there is one, else copy)",
        choices=("auto", "adapter", "cache", "copy"), needs=objective_in("dpo", "kto", "grpo"))
    dpo_loss: str = arg("sigmoid", "loss of a pair", choices=DPO_LOSSES, needs=objective_in("dpo"))
    label_smoothing: float = arg(0.0,
        "part of the preferences that is taken to be wrong",
        low=0, high=0.499, needs=OnlyWith("--dpo_loss=sigmoid|sigmoid_norm|robust", lambda a: a.objective == "dpo" and a.dpo_loss in SMOOTHED))
    desirable_weight: str = arg("1",
        "weight of desirable completions, or auto: as much of them in all as of undesirable ones",
        needs=objective_in("kto"))
    undesirable_weight: str = arg("1", "weight of undesirable completions, or auto", needs=objective_in("kto"))
    reward: str = arg("correct:1",
        "rewards and weights: correct, format, length, or module:function; as in correct:1,format:0.5,module:function:0.2",
        needs=objective_in("grpo"))
    num_generations: int = arg(8,
        "answers to each prompt; batch_size x gradient_accumulation_steps counts answers",
        low=2, needs=objective_in("grpo"))
    max_new_tokens: int = arg(64, "tokens of an answer", low=1, needs=EXAMPLES)
    temperature: float = arg(1.0, "of the answers", above=0, needs=objective_in("grpo"))
    top_k: int = arg(0, "answers take only the k likeliest tokens (0: all)", low=0, needs=objective_in("grpo"))
    top_p: float = arg(1.0,
        "answers take only the likeliest tokens that together reach p",
        above=0, high=1, needs=objective_in("grpo"))
    num_iterations: int = arg(1, "steps on the same answers", low=1, needs=objective_in("grpo"))
    loss_type: str = arg("grpo",
        "tokens to a loss: mean of the answers' means; over the micro-batch's tokens; over the longest possible; over all of the step's tokens",
        choices=("grpo", "bnpo", "dr_grpo", "dapo"), needs=objective_in("grpo"))
    scale_rewards: str = arg("group",
        "divide advantages by the standard deviation of the group, of the batch, or not",
        choices=("group", "batch", "none"), needs=objective_in("grpo"))
    importance_sampling_level: str = arg("token",
        "ratios of probabilities for each token, or for a whole answer",
        choices=("token", "sequence"), needs=objective_in("grpo"))
    epsilon: float = arg(0.2, "how far below 1 a ratio counts", low=0, high=1, needs=objective_in("grpo"))
    epsilon_high: float = arg(0.0, "how far above 1 a ratio counts (0: epsilon)", low=0, needs=objective_in("grpo"))
    mask_truncated: bool = arg(False, "learn nothing from answers that did not end", needs=objective_in("grpo"))
    eval_samples: int = arg(3,
        "answers told at each evaluation, the likeliest ones to the first validation examples",
        low=0, needs=EXAMPLES)


@dataclass(frozen=True, kw_only=True)
class AdapterArgs:
    """adapter"""
    adapter: str = arg("none",
        "train all weights, low-rank additions to the linear layers, or rows of a prompt",
        choices=("none", "lora", "soft_prompt"), model_shape=True)
    lora_rank: int = arg(8, "rank of the additions", low=1, model_shape=True, needs=LORA)
    lora_alpha: float = arg(16.0, "the additions count alpha / rank", above=0, model_shape=True, needs=LORA)
    lora_dropout: float = arg(0.0,
        "chance that an addition's input is dropped in training",
        low=0, high=0.999, needs=LORA)
    lora_targets: tuple[str, ...] = arg((),
        "ends of the names of the linear layers, such as attn.qkv mlp.up (none: all in the blocks)",
        model_shape=True, needs=LORA)
    prompt_format: str = arg("",
        "'<P*60>{toxic}<P*20>': 60 trainable rows, a field of the example, 20 more; <P>text</P> begins as the text",
        model_shape=True, needs=SOFT_PROMPT)
    prompt_provider: str = arg("tensor",
        "rows as they are, or with what an LSTM adds to them",
        choices=("tensor", "lstm"), model_shape=True, needs=SOFT_PROMPT)
    prompt_init: str = arg("vocab",
        "rows begin as random rows of the token embedding, or normal",
        choices=("vocab", "normal"), needs=SOFT_PROMPT)
    target_field: str = arg("", "the field to be learned (none: completion)", needs=SOFT_PROMPT)
    truncation_field: str = arg("", "the field that is cut where an example is too long", needs=SOFT_PROMPT)


@dataclass(frozen=True, kw_only=True)
class DurationArgs:
    """how long"""
    max_iters: int = arg(3500, "optimizer steps, counted from the start of the run", low=0, alias=("steps",))
    max_tokens: int = arg(0,
        "stop after so many training tokens (0: no bound); with --prompt_format: tokens of an example (0: block_size)",
        low=0)
    max_epochs: float = arg(0.0, "stop after so many passes over the training data (0: no bound)", low=0)
    max_seconds: float = arg(0.0, "stop after so many seconds of training, resumed parts together (0: no bound)", low=0)
    early_stop_patience: int = arg(0, "stop after so many evaluations without a better val_loss (0: never)", low=0)


@dataclass(frozen=True, kw_only=True)
class OptimizerArgs:
    """optimizer"""
    optimizer: str = arg("adamw",
        "adamw, adam, sgd, nadam, radam, rmsprop, adagrad, adafactor, lion, muon (Muon for hidden matrices, AdamW for the rest), or package:Class")
    learning_rate: float = arg(1e-3, "largest learning rate", low=0)
    embedding_learning_rate: float = arg(0.0, "largest learning rate of the token embedding (0: learning_rate)", low=0)
    head_learning_rate: float = arg(0.0,
        "largest learning rate of an untied head (0: learning_rate)",
        low=0, needs=OnlyWith("--no-tie_weights", lambda a: not a.tie_weights))
    weight_decay: float = arg(0.1, "of matrices (embeddings included); vectors are never decayed", low=0)
    beta1: float = arg(0.9,
        "first beta of Adam's kind",
        low=0, high=0.9999, needs=optimizer_in("adamw", "adam", "nadam", "radam", "lion", "muon"))
    beta2: float = arg(0.99,
        "second beta of Adam's kind",
        low=0, high=0.99999, needs=optimizer_in("adamw", "adam", "nadam", "radam", "lion", "muon"))
    momentum: float = arg(0.9, "of sgd and rmsprop", low=0, high=0.9999, needs=optimizer_in("sgd", "rmsprop"))
    muon_learning_rate: float = arg(0.02,
        "largest learning rate of the matrices that Muon trains",
        low=0, needs=optimizer_in("muon"))
    muon_weight_decay: float = arg(0.0, "of the matrices that Muon trains", low=0, needs=optimizer_in("muon"))
    muon_momentum: float = arg(0.95, "Nesterov momentum of Muon", low=0, high=0.9999, needs=optimizer_in("muon"))
    optimizer_kwargs: dict[str, Any] = arg({},
        'further arguments of the optimizer (of Muon, with muon), as JSON: {"eps": 1e-10}')
    spike_skip: float = arg(0.0,
        "skip steps whose gradient norm is so many standard deviations, robustly estimated, above the median of the last 128 (0: none)",
        low=0)
    skip_patience: int = arg(10,
        "so many steps skipped in a row, for outlying or non-finite gradients: back to the newest checkpoint once, then the end",
        low=1)
    grad_clip: float = arg(1.0, "largest norm of the gradient (0: not clipped)", low=0)


@dataclass(frozen=True, kw_only=True)
class ScheduleArgs:
    """schedule"""
    lr_scheduler: str = arg("none", "how the learning rate goes on after the warm-up", choices=SCHEDULES)
    decay_lr: bool = arg(False, "with --lr_scheduler=none: cosine, as in nanoGPT")
    warmup_iters: int = arg(100, "steps of linear warm-up, with every schedule", low=0)
    lr_decay_iters: int = arg(3500, "step at which the decay is over", low=1, needs=DECAY_HORIZON)
    min_lr: float = arg(1e-4, "learning rate after the decay", low=0, needs=DECAYING)
    lr_step_size: int = arg(1000,
        "steps between drops",
        low=1, needs=OnlyWith("--lr_scheduler=step", lambda a: a.schedule == "step"))
    lr_step_gamma: float = arg(0.1,
        "factor of a drop",
        above=0, high=1, needs=OnlyWith("--lr_scheduler=step", lambda a: a.schedule == "step"))
    wsd_decay_fraction: float = arg(0.4,
        "part of lr_decay_iters that decays, linearly",
        above=0, high=1, needs=OnlyWith("--lr_scheduler=wsd", lambda a: a.schedule == "wsd"))


@dataclass(frozen=True, kw_only=True)
class CheckpointArgs:
    """evaluation and checkpoints"""
    eval_interval: int = arg(250, "steps between evaluations; each is followed by a checkpoint", low=1)
    eval_iters: int = arg(200,
        "batches of batch_size an evaluation reads from each split; the same ones every time",
        low=1)
    checkpoint_interval: int = arg(0,
        "steps between checkpoints besides those of evaluations (0: only those)",
        low=0, alias=("save_freq",))
    keep_last: int = arg(2, "how many of the newest checkpoints are kept, besides the best", low=1)
    keep_every: int = arg(0, "keep also each checkpoint of a step that this divides (0: none)", low=0)
    always_save_checkpoint: bool = arg(True,
        "save at every evaluation; otherwise only when val_loss improves, and at the end")


@dataclass(frozen=True, kw_only=True)
class LoggingArgs:
    """logging"""
    log_interval: int = arg(10, "steps between lines of training metrics", low=1, alias=("log_freq",))
    log_data_hash: bool = arg(False, "add data_hash, a hash of the step's global batch, to the training metrics")
    plot_loss: bool = arg(False, "draw the loss curve to out_dir/loss.png after every evaluation (needs matplotlib)")
    wandb_log: bool = arg(False, "log to Weights & Biases; a resumed run continues the same one there")
    wandb_project: str = arg("nanoforge", "project on wandb", needs=OnlyWith("--wandb_log", lambda a: a.wandb_log))
    wandb_run_name: str = arg("",
        "name on wandb (none: the name of out_dir)",
        needs=OnlyWith("--wandb_log", lambda a: a.wandb_log))
    tensorboard_log: bool = arg(False, "log to out_dir/tensorboard (needs tensorboard)")


@dataclass(frozen=True, kw_only=True)
class SystemArgs:
    """system"""
    device: str = arg("auto", "auto, cpu, cuda, cuda:N or mps")
    parallel: str = arg("ddp",
        "several ranks: each holds all (ddp), or its shards of weights, gradients and optimizer state (fsdp: FSDP2)",
        choices=("ddp", "fsdp"))
    fsdp_reshard: bool = arg(True,
        "forget a block's gathered weights after its forward: less memory, one more gathering",
        needs=FSDP)
    fsdp_offload: bool = arg(False, "keep shards, gradients and optimizer state in host memory", needs=FSDP)
    rank_timeout: int = arg(600, "seconds that a rank waits for another before it ends the run", low=1)
    dtype: str = arg("auto",
        "precision of activations and matrix products; weights stay float32",
        choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = arg(False, "torch.compile the model, with static shapes")
    attention_kernel: str = arg("auto",
        "on a CUDA GPU: which of scaled_dot_product_attention's kernels (auto: torch's choice)",
        choices=("auto", "flash", "cudnn", "efficient", "math"))
    activation_checkpointing: bool = arg(False,
        "keep only the blocks' inputs and compute the rest again in backward: less memory, more time")
    loss_chunk: int = arg(0,
        "make the logits of so many tokens at a time, and again in backward: less memory where the vocabulary is large (0: all at once)",
        low=0)
    deterministic: bool = arg(False, "deterministic algorithms: bit-identical runs, compiled ones too")
# fmt: on


@dataclass(frozen=True, kw_only=True)
class TrainArgs(
    RunArgs,
    DataArgs,
    DepthArgs,
    BatchArgs,
    ModelArgs,
    ObjectiveArgs,
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
    def schedule(self) -> str:
        """The schedule's name; --decay_lr alone means cosine, as in nanoGPT."""
        return "cosine" if self.decay_lr and self.lr_scheduler == "none" else self.lr_scheduler

    @cached_property
    def mixture(self) -> list[tuple[str, ...]]:
        """The datasets of the mixture, each a tuple of its aligned streams' names."""
        if self.training_mode == "multidataset":
            return [(name,) for name in self.dataset_list]
        return [self.multicontext_datasets if self.training_mode == "multicontext" else (self.dataset,)]

    @cached_property
    def vocabulary(self) -> str:
        """How the streams' vocabularies meet in the model: an entry of model.VOCABULARIES."""
        if self.training_mode == "multicontext":
            return "contexts" if len(self.multicontext_datasets) > 1 else "one"
        return "separate" if self.multidataset_wte else "one"

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The datasets' folders; of --train_file none."""
        return {} if self.train_file else {name: Path(self.data_dir) / name for names in self.mixture for name in names}

    @cached_property
    def data_format(self) -> str:
        """What of its datasets' folders the run reads: "bins" or "examples"."""
        return "bins" if self.objective == "lm" else "examples"

    @cached_property
    def group_size(self) -> int:
        """How many rows of a step stay together on a rank: answers to a prompt."""
        return self.num_generations if self.objective == "grpo" else 1

    @cached_property
    def needs_reference(self) -> bool:
        """Whether the objective compares with the model that the run began with."""
        return self.objective in ("dpo", "kto") or (self.objective == "grpo" and self.beta > 0)

    @cached_property
    def task_folder(self) -> Path:
        """Where the runs of --task_name are."""
        return Path("outputs", *(["debug"] if self.debug else []), self.task_name)

    @cached_property
    def max_train_tokens(self) -> int:
        """Training tokens after which the run is over; with --prompt_format --max_tokens means an example's, as in ruprompts."""
        return 0 if self.prompt_format else self.max_tokens

    @cached_property
    def weights_source(self) -> str:
        """What --init_from names, with --gpt2_type worked in."""
        return self.gpt2_type if self.init_from == "gpt2" else self.init_from

    @cached_property
    def global_batch_size(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        return self.batch_size * self.gradient_accumulation_steps

    @cached_property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head


def resumed_config(args: TrainArgs) -> str | None:
    """Path of the config of the run to resume, whose values lie under the command line's. Raises UserError."""
    if args.init_from != "resume":
        return None
    path = os.path.join(args.out_dir, "train_config.json")
    if not os.path.exists(path):
        raise UserError(f"--init_from=resume: no run in {args.out_dir} (no {path}); name its folder with --out_dir")
    return path


def derive(args: TrainArgs, source: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """What --depth makes of the arguments that nothing set."""
    if not args.depth or args.init_from != "scratch":
        return "", {}
    is_set = {name: getattr(args, name) for name, origin in source.items() if origin != configurator.DEFAULT}
    values = depth.derive_args(args.depth, args.aspect, args.tokens_per_weight, args.block_size, is_set)
    return f"--depth={args.depth}", values


# ---------------------------------------------------------------------------------------------------------------------
# arguments that don't fit each other: each function calls must(what holds, what to say otherwise)


def check_start(a, source: dict[str, str], must) -> None:
    loads = a.init_from not in ("scratch", "resume", *GPT2_TYPES)
    must(not loads or Path(a.init_from).exists(),
         f"--init_from={a.init_from}: no such file or folder; otherwise scratch, resume, {', '.join(GPT2_TYPES)}"
         + did_you_mean(a.init_from, ("scratch", "resume", *GPT2_TYPES)))  # fmt: skip
    must(
        not (a.overwrite and a.init_from == "resume"),
        "--overwrite: deletes the run that --init_from=resume would continue; give one of them",
    )
    if loads or a.init_from in GPT2_TYPES:
        must(
            a.vocabulary == "one",
            "--init_from: loaded weights have one vocabulary; they go with --training_mode=single, or multidataset without --multidataset_wte",
        )
    must(not a.needs_reference or a.init_from != "scratch", f"--objective={a.objective}: compares with the model that it begins with, which must have been trained: --init_from=gpt2, a run or weights"
         + " (or --beta=0)" * (a.objective == "grpo"))  # fmt: skip
    must(
        a.adapter == "none" or a.init_from != "scratch",
        f"--adapter={a.adapter}: needs a base that was trained: --init_from=gpt2, a run or weights",
    )
    must(
        not (a.task_name and a.init_from == "resume" and source["out_dir"] == "default"),
        "--task_name: begins a run; resume one with --out_dir",
    )
    must(not a.task_name or a.task_name == Path(a.task_name).name, f"--task_name={a.task_name}: must be a plain name")
    for flag in ("overwrite", "plot_loss", "wandb_log", "tensorboard_log"):
        must(
            not (a.eval_only and source[flag] == "command line" and getattr(a, flag)),
            f"--{flag}: has no effect with --eval_only, which writes nothing",
        )


def check_model(a, source: dict[str, str], must) -> None:
    n_kv_head = a.n_kv_head or a.n_head
    must(a.n_embd % a.n_head == 0, f"--n_embd={a.n_embd}: must be a multiple of --n_head={a.n_head}")
    must(a.n_head % n_kv_head == 0, f"--n_kv_head={a.n_kv_head}: must divide --n_head={a.n_head}")
    must(
        a.position != "rope" or a.n_embd % a.n_head or a.n_embd // a.n_head % 2 == 0,
        f"--position=rope: needs an even head width, not n_embd / n_head = {a.n_embd // a.n_head}",
    )
    must(set(a.window) <= set("LS") and a.window != "", f"--window={a.window}: must be made of the letters L and S")
    must(
        not a.loss_chunk or a.vocabulary == "one",
        "--loss_chunk: needs one vocabulary, not one for each context or dataset",
    )


def check_data(a, source: dict[str, str], must) -> None:
    if a.training_mode == "multidataset":
        must(len(a.dataset_list) >= 1, "--dataset_list: --training_mode=multidataset needs it")
        must(len(set(a.dataset_list)) == len(a.dataset_list), "--dataset_list: a dataset is named twice")
        for name in ("dataset_sampling_probs", "dataset_sampling_probs_final"):
            weights = getattr(a, name)
            if weights:
                must(
                    len(weights) == len(a.dataset_list),
                    f"--{name}: {len(weights)} weights for {len(a.dataset_list)} datasets",
                )
                must(
                    all(weight >= 0 for weight in weights) and sum(weights) > 0,
                    f"--{name}: weights must not be negative, and not all zero",
                )
        if a.dataset_interleaving:
            must(
                all(count == int(count) and count >= 1 for count in a.dataset_sampling_probs),
                "--dataset_sampling_probs: with --dataset_interleaving they are whole numbers, at least 1",
            )
        both = a.dataset_sampling_probs + a.dataset_sampling_probs_final
        must(not (a.dataset_sampling_probs_transition_method == "exponential" and a.dataset_sampling_probs_final) or all(both),
             "--dataset_sampling_probs_transition_method=exponential: needs weights above 0")  # fmt: skip
        must(
            not (a.multidataset_wte and a.vocab_size),
            "--vocab_size: with --multidataset_wte each dataset brings its own",
        )
    if a.training_mode == "multicontext":
        must(len(a.multicontext_datasets) >= 1, "--multicontext_datasets: --training_mode=multicontext needs it")
        must(
            len(set(a.multicontext_datasets)) == len(a.multicontext_datasets),
            "--multicontext_datasets: a dataset is named twice",
        )
        must(not a.vocab_size, "--vocab_size: with --training_mode=multicontext each context brings its own")
    if a.objective != "lm":
        must(
            a.training_mode != "multicontext",
            f"--objective={a.objective}: has examples, not aligned streams; --training_mode=single or multidataset",
        )
        must(not a.multidataset_wte, f"--multidataset_wte: --objective={a.objective} has one vocabulary")
        must(
            bool(a.train_file) == bool(a.validation_file),
            "--train_file, --validation_file: give both, or neither for the dataset's own",
        )
        must(not a.train_file or a.training_mode == "single", "--train_file: goes with --training_mode=single")
        for flag in ("train_file", "validation_file"):
            must(not getattr(a, flag) or Path(getattr(a, flag)).is_file(), f"--{flag}={getattr(a, flag)}: no such file")


def check_objective(a, source: dict[str, str], must) -> None:
    must(
        not (a.reference == "adapter" and a.adapter == "none"),
        "--reference=adapter: there is none to switch off; take copy or cache, or --adapter=lora",
    )
    must(
        not (a.reference == "cache" and a.objective != "dpo"),
        f"--reference=cache: goes with dpo; the sequences of {a.objective} are not known beforehand",
    )
    must(a.objective != "dpo" or a.dpo_loss != "ipo" or a.beta > 0, "--beta=0: ipo divides by it")
    for flag in ("desirable_weight", "undesirable_weight"):
        must(
            getattr(a, flag) == "auto" or is_weight(getattr(a, flag)),
            f"--{flag}={getattr(a, flag)}: must be a number of at least 0, or auto",
        )
    must(
        not (a.desirable_weight == a.undesirable_weight == "auto"),
        "--desirable_weight=auto: follows from undesirable_weight, which then is a number",
    )
    if a.objective == "kto":
        must(
            a.batch_size * a.gradient_accumulation_steps >= 2,
            "--batch_size=1: kto's reference point pairs each prompt with another row's completion; at least 2 rows make a step",
        )
    if a.objective == "grpo":
        rows = a.batch_size * a.gradient_accumulation_steps
        must(
            rows % a.num_generations == 0,
            f"--num_generations={a.num_generations}: must divide the {rows} answers of a step (--batch_size x --gradient_accumulation_steps)",
        )
        for flag in ("max_iters", "eval_interval", "checkpoint_interval"):
            must(
                getattr(a, flag) % a.num_iterations == 0,
                f"--{flag}={getattr(a, flag)}: must be a multiple of --num_iterations={a.num_iterations}; a run is saved between two draws of answers",
            )
        must(
            a.max_new_tokens < a.block_size,
            f"--max_new_tokens={a.max_new_tokens}: leaves no room for a prompt in --block_size={a.block_size}",
        )
        must(not a.loss_chunk or a.temperature == 1, "--loss_chunk: knows no --temperature other than 1")
    must(not a.target_field or a.objective == "sft", "--target_field: goes with --objective=sft")
    must(not a.truncation_field or a.objective == "sft", "--truncation_field: goes with --objective=sft")
    if a.adapter == "soft_prompt":
        try:
            prompt_format.parse(a.prompt_format).check(a.target_field or "completion", a.truncation_field or None)
        except UserError as mistake:
            must(False, str(mistake) if a.prompt_format else "--adapter=soft_prompt: needs --prompt_format")
        must(a.objective != "lm", "--adapter=soft_prompt: goes with examples: --objective=sft, dpo, kto or grpo")
        must(
            not (a.prompt_provider == "lstm" and a.parallel == "fsdp"),
            "--prompt_provider=lstm: does not go with --parallel=fsdp, which takes the LSTM's weights apart; a prompt is small: take ddp",
        )
        must(not a.packing, "--packing: does not go with --adapter=soft_prompt")


def check_training(a, source: dict[str, str], must) -> None:
    must(
        not a.depth or a.optimizer == "muon" or not source["learning_rate"].startswith("--depth"),
        f"--depth={a.depth}: its rates are those of --optimizer=muon (configs/depth.py); give --learning_rate too",
    )
    must(
        a.optimizer in OPTIMIZERS or ":" in a.optimizer,
        f"--optimizer={a.optimizer}: must be one of {', '.join(OPTIMIZERS)} or package:Class"
        + did_you_mean(a.optimizer, OPTIMIZERS),
    )
    if a.schedule != "none":
        must(
            a.min_lr <= a.learning_rate or a.learning_rate == 0,
            f"--min_lr={a.min_lr:g}: the schedule would end above --learning_rate={a.learning_rate:g}",
        )
        must(
            a.schedule != "exponential" or a.min_lr > 0,
            "--min_lr=0: an exponential schedule never reaches 0; give a small one",
        )
    if a.schedule in ("linear", "cosine", "exponential", "wsd"):
        must(
            a.warmup_iters <= a.lr_decay_iters,
            f"--warmup_iters={a.warmup_iters}: longer than --lr_decay_iters={a.lr_decay_iters}",
        )
    must(
        not (source["decay_lr"] == "command line" and not a.decay_lr and a.schedule != "none"),
        f"--no-decay_lr: contradicts --lr_scheduler={a.lr_scheduler}",
    )
    for flag, package in (("wandb_log", "wandb"), ("tensorboard_log", "tensorboard"), ("plot_loss", "matplotlib")):
        must(
            not getattr(a, flag) or find_spec(package) is not None, f"--{flag}: needs a package: pip install {package}"
        )
    must(
        not (a.parallel == "fsdp" and a.dtype == "float16"),
        "--dtype=float16: its loss scaling does not go with --parallel=fsdp; take bfloat16",
    )
    kind, _, index = a.device.partition(":")
    must(
        kind in ("auto", "cpu", "cuda", "mps") and (index == "" or (kind == "cuda" and index.isdigit())),
        f"--device={a.device}: must be auto, cpu, cuda, cuda:N or mps",
    )


def check(a, source: dict[str, str]) -> list[str]:
    """What is wrong with arguments beside each other."""
    wrong: list[str] = []

    def must(holds: bool, words: str) -> None:
        if not holds:
            wrong.append(words)

    for part in (check_start, check_model, check_data, check_objective, check_training):
        part(a, source, must)
    return wrong


def is_weight(words: str) -> bool:
    try:
        return 0 <= float(words) < float("inf")
    except ValueError:
        return False


RULES = Rules(resumed_config=resumed_config, derive=derive, check=check)


def load_args(folder: Path) -> TrainArgs:
    """The arguments of a run, from the train_config.json in its folder or in a checkpoint's. Raises UserError if that can't be read."""
    path = str(folder / "train_config.json")
    return resolve([(path, config_files.read_file(path))]).args


def resolve(layers: list[tuple[str, dict[str, Any]]]) -> Resolved:
    """What train.py would make of these layers of (source, values); never exits."""
    return configurator.resolve(TrainArgs, layers, RULES)


RESUME = dict.fromkeys(("--resume", "--resume=true", "--resume=True"), "--init_from=resume") | dict.fromkeys(
    ("--resume=false", "--resume=False"), "--init_from=scratch"
)


def parse_flags(argv: list[str]) -> TrainArgs:
    """The arguments that a command line asks for; prints all errors at once and exits with status 2."""
    argv = [RESUME.get(text, text) for text in argv]
    return configurator.parse(TrainArgs, argv, "Train a GPT: see README.md.", RULES)


def was_restarted() -> bool:
    """Whether torchrun or Slurm started this process again, with the command that began the run."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in counts)


def parse(argv: list[str] | None = None) -> TrainArgs:
    """The arguments of a run; prints all errors at once and exits with status 2.

    After a restart by torchrun or Slurm they are those with which the run continues.
    """
    args = parse_flags(sys.argv[1:] if argv is None else argv)
    if not was_restarted() or args.init_from == "resume" or args.eval_only:
        return args
    out_dir = Path(args.out_dir)
    if args.task_name and args.out_dir == "out":  # the run to continue is the newest of the task
        runs = sorted(args.task_folder.glob("*/train_config.json"))
        if not runs:
            return args
        out_dir = runs[-1].parent
    checkpoints = out_dir / "checkpoints"
    if checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir()):
        return parse_flags(["--init_from=resume", f"--out_dir={out_dir}"])
    return dataclasses.replace(args, overwrite=True, out_dir=str(out_dir))
