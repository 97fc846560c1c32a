"""Experiment files of rl_salamandra_alignment: the keys of Hugging Face's trainers become arguments of train.py.

    execution           algorithm, venv, setup, output_dir (an absolute path), distributed_config
    slurm               directives of sbatch
    rl_script_args      keys of TRL's ScriptArguments
    model_config_args   keys of TRL's ModelConfig
    rl_config_args      keys of TRL's trainer configs
    environment         exported variables
    evaluation          flags of evaluate.py, for a job that follows each training

Any value may be a list, except output_dir. `KEYS` is the table of all keys, with those of hf_other_keys.py, which
become no argument; `DEFAULTS` and `ALGORITHM_DEFAULTS` say what an absent key means in those trainers. A key that is
not in the table is an error. Knows nothing of the types and limits of the arguments, which are checked afterwards.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge.errors import UserError, did_you_mean
from nanoforge.sweeps.hf_other_keys import NOT_SUPPORTED, WITHOUT_EFFECT

EXECUTION_KEYS = ("algorithm", "venv", "setup", "output_dir", "distributed_config")
KEY_SECTIONS = ("rl_script_args", "model_config_args", "rl_config_args")
JOB_SECTIONS = ("slurm", "environment", "evaluation")  # a grid file may have these too
TEXT_SECTIONS = ("slurm", "environment")  # values stay the text that the file has: 2:00:00 and 010 are not numbers
SECTIONS = ("execution", "slurm", *KEY_SECTIONS, "environment", "evaluation")
LIST_KEYS = (  # one value of these may be a list
    *("report_to", "lora_target_modules", "reward_funcs", "reward_weights", "loss_weights", "debug", "fsdp", "tools"),
    *("lora_target_parameters", "lora_modules_to_save", "optim_target_modules", "include_for_metrics", "label_names"),
)

ALGORITHMS = ("sft", "dpo", "kto", "grpo")
SFT = ("sft",)
DPO = ("dpo",)
KTO = ("kto",)
GRPO = ("grpo",)
WITH_REFERENCE = ("dpo", "kto", "grpo")

Arguments = dict[str, Any]  # argument of train.py -> value


# ---------------------------------------------------------------------------------------------------------------------
# what a key is translated with


@dataclass(frozen=True)
class Experiment:
    """The keys of one run over their defaults, and the numbers of steps that follow from them."""

    algorithm: str
    keys: dict[str, Any]
    ranks: int
    count_examples: Callable[[str, str], int]  # (folder or hf:NAME, algorithm) -> examples; raises UserError

    def integer(self, key: str) -> int:
        return int(self.keys[key])

    @property
    def sequences_per_step(self) -> int:
        """The global batch size."""
        per_device = self.integer("per_device_train_batch_size")
        return per_device * self.integer("gradient_accumulation_steps") * self.ranks

    @property
    def steps_per_epoch(self) -> Fraction:
        """Steps of one pass over the examples; GRPO samples num_generations completions of each."""
        name = self.keys.get("dataset_name")
        if not isinstance(name, str):
            raise UserError("dataset_name: missing; it is the folder of a dataset, or its name on the hub")
        sequences = self.count_examples(hub_dataset(self.keys) or name, self.algorithm)
        if self.algorithm == "grpo":
            sequences *= self.integer("num_generations")
        return Fraction(sequences, self.sequences_per_step)

    @property
    def total_steps(self) -> int:
        if self.integer("max_steps") > 0:
            return self.integer("max_steps")
        return self.whole_rollouts(math.ceil(Fraction(str(self.keys["num_train_epochs"])) * self.steps_per_epoch))

    def whole_rollouts(self, steps: int) -> int:
        """Steps, in GRPO rounded up so that none is between two steps on the same rollouts."""
        if self.algorithm != "grpo":
            return steps
        per_rollout = max(1, int(self.keys.get("num_iterations", 1)))
        return math.ceil(steps / per_rollout) * per_rollout

    @property
    def warmup_steps(self) -> int:
        """From warmup_steps, a fraction of all steps if below 1, or else from warmup_ratio."""
        steps = float(self.keys["warmup_steps"])
        if steps >= 1:
            return int(steps)
        fraction = steps or float(self.keys["warmup_ratio"])
        return math.ceil(fraction * self.total_steps)

    def interval(self, key: str) -> int:
        """Steps from a key that holds a number of steps or, below 1, a fraction of the run."""
        value = float(self.keys[key])
        if value <= 0 or (value >= 1 and value != int(value)):
            raise UserError(f"{key}={value:g}: must be a whole number of steps, or a fraction of the run below 1")
        steps = math.ceil(value * self.total_steps) if value < 1 else int(value)
        return self.whole_rollouts(max(1, steps))

    def interval_of(self, strategy: Any, steps_key: str, never: int) -> int:
        """Steps between two events by a strategy (no, steps or epoch) and the key that goes with steps."""
        match str(strategy).lower():
            case "no" | "false":  # an unquoted no is false in YAML 1.1
                return never
            case "steps":
                return self.interval(steps_key)
            case "epoch":
                return self.whole_rollouts(max(1, math.ceil(self.steps_per_epoch)))
        raise UserError("must be no, steps or epoch")


Translate = Callable[[Any, Experiment], Arguments]  # (value of the key, the experiment) -> arguments; raises UserError


class Key(NamedTuple):
    """What a key of the trainers becomes, as text for docs/sweeps.md and as a function; the algorithms that have it."""

    becomes: str
    translate: Translate
    algorithms: tuple[str, ...] = ALGORITHMS


# Kinds of keys: each returns an entry of the table.


def renamed(argument: str, algorithms: tuple[str, ...] = ALGORITHMS) -> Key:
    """The value as it is, under another name."""
    return Key(argument, lambda value, experiment: {argument: value}, algorithms)


def lora(argument: str) -> Key:
    """An argument of the adapter, which use_peft switches on."""

    def translate(value: Any, experiment: Experiment) -> Arguments:
        return {argument: value} if experiment.keys.get("use_peft") else {}

    return Key(f"{argument}, with use_peft", translate)


def switch(becomes: str, arguments: Arguments, algorithms: tuple[str, ...] = ALGORITHMS) -> Key:
    """Arguments that are set if the key is true."""
    return Key(becomes, lambda value, experiment: arguments if value else {}, algorithms)


class NotSupportedError(UserError):
    """A key whose value has no equal here."""


def not_supported(reason: str, *neutral: Any) -> Key:
    """A key that is refused, unless its value is one of those that ask for nothing."""

    def translate(value: Any, experiment: Experiment) -> Arguments:
        if value not in neutral:
            raise NotSupportedError(reason)
        return {}

    return Key(f"not supported: {reason}", translate)


def ignored(becomes: str, algorithms: tuple[str, ...] = ALGORITHMS) -> Key:
    """A key without an effect of its own: nothing follows from it, or another key's function reads it."""
    return Key(becomes, lambda value, experiment: {}, algorithms)


def of_hub(becomes: str, reason: str, *neutral: Any) -> Key:
    """A key that is a part of the name of a dataset of the hub, and is refused beside a folder."""
    beside_folder = not_supported(reason, *neutral)

    def translate(value: Any, experiment: Experiment) -> Arguments:
        return {} if hub_dataset(experiment.keys) else beside_folder.translate(value, experiment)

    return Key(f"{becomes}; of a folder not supported: {reason}", translate)


# A dataset of the hub.

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
LIBRARY_FILES = ("dataset_dict.json", "state.json", "*.parquet", "data/*.parquet")  # of the datasets library


def hub_dataset(keys: dict[str, Any]) -> str:
    """hf:NAME of dataset_name with its configuration and splits; empty for a folder that has or makes train.jsonl.

    As for the datasets library, what is there as a folder is one: org/name is on the hub unless org is a folder here.
    """
    text = str(keys.get("dataset_name", ""))
    folder = Path(text)
    if folder.is_dir():
        is_ours = any((folder / name).exists() for name in ("train.jsonl", "prepare.py"))
        is_hub = not is_ours and any(any(folder.glob(name)) for name in LIBRARY_FILES)
    else:
        is_hub = text.startswith("hf:") or (HUB_NAME.fullmatch(text) is not None and not folder.parent.is_dir())
    if not is_hub:
        return ""
    name, _, splits = text.removeprefix("hf:").partition("#")
    name, at, revision = name.partition("@")
    if keys.get("dataset_config"):
        name += f":{keys['dataset_config']}"
    if not splits and ("dataset_train_split" in keys or "dataset_test_split" in keys):
        splits = "/".join([keys.get("dataset_train_split", "train"), *filter(None, [keys.get("dataset_test_split")])])
    return f"hf:{name}{at}{revision}" + (f"#{splits}" if splits else "")


# Functions from a key's value to arguments.


def one_of(choices: dict[str, Arguments]) -> Translate:
    """The arguments of one of a few names, in any case."""

    def translate(value: Any, experiment: Experiment) -> Arguments:
        name = str(value).lower()
        if name not in choices:
            raise UserError(f"must be one of {', '.join(choices)}{did_you_mean(str(value), choices)}")
        return choices[name]

    return translate


def only(supported: Any, reason: str) -> Translate:
    """No arguments; every value but one is refused."""

    def translate(value: Any, experiment: Experiment) -> Arguments:
        if value != supported:
            raise UserError(f"only {supported} is supported: {reason}")
        return {}

    return translate


def to_dataset(value: Any, experiment: Experiment) -> Arguments:
    name = hub_dataset(experiment.keys)
    if name:
        return {"dataset": name}
    folder = Path(str(value).rstrip("/"))
    return {"data_dir": str(folder.parent), "dataset": folder.name}


def to_model(value: Any, experiment: Experiment) -> Arguments:
    """From model_name_or_path and model_revision."""
    name, revision = str(value), str(experiment.keys.get("model_revision", "main"))
    if revision == "main":
        return {"init_from": value}
    if Path(name).exists():
        raise UserError(f"model_revision={revision}: is of models on the hub; name the folder of that revision")
    return {"init_from": f"{name}@{revision}"}


def to_accumulation(value: Any, experiment: Experiment) -> Arguments:
    return {"gradient_accumulation_steps": int(value) * experiment.ranks}


def to_epochs(value: Any, experiment: Experiment) -> Arguments:
    if experiment.integer("max_steps") > 0:
        return {}
    return {"max_epochs": value, "max_iters": experiment.total_steps}


def to_max_iters(value: Any, experiment: Experiment) -> Arguments:
    return {"max_iters": value} if int(value) > 0 else {}


def to_block_size(value: Any, experiment: Experiment) -> Arguments:
    if experiment.algorithm == "grpo":
        return {"block_size": value}
    return {"block_size": value, "overflow": "truncate_target"}


SCHEDULES = {  # lr_scheduler_type -> lr_scheduler
    "linear": "linear",
    "polynomial": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "inverse_sqrt": "inverse_sqrt",
    "warmup_stable_decay": "wsd",
    "constant": "none",
    "constant_with_warmup": "none",
}


def to_schedule(value: Any, experiment: Experiment) -> Arguments:
    """From lr_scheduler_type, lr_scheduler_kwargs and the steps of the warmup."""
    if value not in SCHEDULES:
        raise UserError(f"must be one of {', '.join(SCHEDULES)}{did_you_mean(str(value), SCHEDULES)}")
    options = dict(experiment.keys.get("lr_scheduler_kwargs", {}))
    warmup = 0 if value == "constant" else experiment.warmup_steps
    arguments: Arguments = {"lr_scheduler": SCHEDULES[value], "warmup_iters": warmup}
    if SCHEDULES[value] != "none":
        arguments["min_lr"] = final_learning_rate(str(value), options, float(experiment.keys["learning_rate"]))
    if SCHEDULES[value] not in ("none", "inverse_sqrt"):
        arguments["lr_decay_iters"] = max(1, experiment.total_steps, warmup)
    if value == "inverse_sqrt" and not warmup:
        raise UserError("needs warmup_steps, which is its time scale")
    if value == "warmup_stable_decay":
        n_decay = float(options.pop("num_decay_steps", 0))
        if n_decay <= 0 or options.pop("decay_type", "") != "linear":
            raise UserError("needs lr_scheduler_kwargs: {num_decay_steps: N, decay_type: linear}")
        arguments["wsd_decay_fraction"] = n_decay / arguments["lr_decay_iters"]
    if options:
        raise UserError(f"lr_scheduler_kwargs: {', '.join(options)}: not supported with this schedule")
    return arguments


def final_learning_rate(schedule: str, options: dict[str, Any], peak: float) -> float:
    """min_lr, from those of lr_scheduler_kwargs that say it, which are taken out of `options`."""
    if schedule == "polynomial":
        if float(options.pop("power", 1)) != 1:
            raise UserError("lr_scheduler_kwargs: power must be 1, which is linear")
        return float(options.pop("lr_end", 1e-7))
    rate = float(options.pop("min_lr_rate", options.pop("min_lr_ratio", 0)))
    return float(options.pop("min_lr", rate * peak))


def to_adam_epsilon(value: Any, experiment: Experiment) -> Arguments:
    return {"optimizer_kwargs": {"eps": float(value)}}


def to_rslora(value: Any, experiment: Experiment) -> Arguments:
    """Rank-stabilised LoRA scales by alpha / sqrt(rank), LoRA by alpha / rank."""
    if not (value and experiment.keys.get("use_peft")):
        return {}
    return {"lora_alpha": float(experiment.keys["lora_alpha"]) * math.sqrt(experiment.integer("lora_r"))}


def to_reward(value: Any, experiment: Experiment) -> Arguments:
    """From reward_funcs and reward_weights: names with weights."""
    names = value if isinstance(value, list) else [value]
    weights = experiment.keys.get("reward_weights")
    if weights is None:
        return {"reward": ",".join(str(name) for name in names)}
    weights = weights if isinstance(weights, list) else [weights]
    if len(weights) != len(names):
        raise UserError(f"reward_weights: {len(weights)} weights for {len(names)} functions")
    return {"reward": ",".join(f"{name}:{weight}" for name, weight in zip(names, weights, strict=True))}


def to_rollout_steps(value: Any, experiment: Experiment) -> Arguments:
    """Nothing, where the rollouts of a step are its own batch: TRL's default."""
    keys, batch = experiment.keys, experiment.sequences_per_step
    accumulation = experiment.integer("gradient_accumulation_steps")
    if (
        keys.get("steps_per_generation", accumulation) != accumulation
        or keys.get("generation_batch_size", batch) != batch
    ):
        raise UserError("each step has its own rollouts; leave steps_per_generation and generation_batch_size out")
    return {}


def to_data_seed(value: Any, experiment: Experiment) -> Arguments:
    return only(experiment.keys["seed"], "all randomness follows from seed")(value, experiment)


def to_dtype(value: Any, experiment: Experiment) -> Arguments:
    """From bf16, fp16 and torch_dtype together."""
    bf16 = experiment.keys["bf16"] is True
    fp16 = experiment.keys["fp16"] is True
    if bf16 and fp16:
        raise UserError("bf16 and fp16 are both true; choose one of them")
    if bf16:
        return {"dtype": "bfloat16"}
    if fp16:
        return {"dtype": "float16"}
    dtype = experiment.keys.get("torch_dtype", experiment.keys.get("dtype", "float32"))
    return {"dtype": str(dtype).lower()}


def to_eval_interval(value: Any, experiment: Experiment) -> Arguments:
    at_the_end = max(1, experiment.total_steps)
    steps_key = "eval_steps" if "eval_steps" in experiment.keys else "logging_steps"  # as in transformers
    return {"eval_interval": experiment.interval_of(value, steps_key, never=at_the_end)}


def to_checkpoint_interval(value: Any, experiment: Experiment) -> Arguments:
    """Saving has its own interval, whatever that of evaluations is."""
    if str(value).lower() == "best":
        return {"always_save_checkpoint": False}
    interval = experiment.interval_of(value, "save_steps", never=0)
    return {"checkpoint_at_eval": False, "checkpoint_interval": interval}


def to_log_interval(value: Any, experiment: Experiment) -> Arguments:
    at_the_end = max(1, experiment.total_steps)
    return {"log_interval": experiment.interval_of(value, "logging_steps", never=at_the_end)}


TRACKERS = ("wandb", "trackio", "tensorboard")


def to_trackers(value: Any, experiment: Experiment) -> Arguments:
    names = value if isinstance(value, list) else [value]
    unknown = [str(name) for name in names if name not in (*TRACKERS, "none")]
    if unknown:
        raise UserError(f"{', '.join(unknown)}: must be {', '.join(TRACKERS)} or none")
    return {f"{name}_log": True for name in TRACKERS if name in names}


def to_run_name(value: Any, experiment: Experiment) -> Arguments:
    trackers = to_trackers(experiment.keys["report_to"], experiment)
    return {f"{name}_run_name": value for name in ("wandb", "trackio") if f"{name}_log" in trackers}


def to_project(value: Any, experiment: Experiment) -> Arguments:
    trackers = to_trackers(experiment.keys["report_to"], experiment)
    return {"trackio_project": value} if "trackio_log" in trackers else {}


def to_loss(value: Any, experiment: Experiment) -> Arguments:
    if experiment.algorithm in ("sft", "kto"):
        return only("kto" if experiment.algorithm == "kto" else "nll", "there is one loss")(value, experiment)
    return {"dpo_loss" if experiment.algorithm == "dpo" else "loss_type": value}


def to_cached_reference(value: Any, experiment: Experiment) -> Arguments:
    return {"reference": "cache"} if value and experiment.algorithm == "dpo" else {}


def to_loss_on(value: Any, experiment: Experiment) -> Arguments:
    """From completion_only_loss or assistant_only_loss."""
    settings = [experiment.keys.get(key) for key in ("completion_only_loss", "assistant_only_loss")]
    if len({setting for setting in settings if setting is not None}) > 1:
        raise UserError("completion_only_loss and assistant_only_loss differ; one choice holds for all examples")
    return {"loss_on": "completion" if value else "all"}


# ---------------------------------------------------------------------------------------------------------------------
# the table

# --attention_kernel=flash has no masks, which the packages of these names have: auto takes flash where it can.
ATTENTION_KERNELS: dict[str, Arguments] = {
    "flash_attention_2": {"attention_kernel": "auto"},
    "flash_attention_3": {"attention_kernel": "auto"},
    "flex_attention": {"attention_kernel": "auto"},
    "sdpa": {"attention_kernel": "auto"},
    "eager": {"attention_kernel": "math"},
}
OPTIMIZERS: dict[str, Arguments] = {
    "adamw_torch": {"optimizer": "adamw"},
    "adamw_torch_fused": {"optimizer": "adamw"},
    "adamw_hf": {"optimizer": "adamw"},
    "adafactor": {"optimizer": "adafactor"},
    "sgd": {"optimizer": "sgd"},
    "rmsprop": {"optimizer": "rmsprop"},
    "lion_32bit": {"optimizer": "lion"},
}
DISTRIBUTED: dict[str, Arguments] = {  # execution.distributed_config
    "DDP": {"parallel": "ddp"},
    "MultiGPU": {"parallel": "ddp"},
    "DSZero1": {"parallel": "fsdp", "fsdp_reshard": False},
    "DSZero2": {"parallel": "fsdp", "fsdp_reshard": False},
    "DSZero2Offload": {"parallel": "fsdp", "fsdp_reshard": False, "fsdp_offload": True},
    "DSZero3": {"parallel": "fsdp"},
    "DSZero3Offload": {"parallel": "fsdp", "fsdp_offload": True},
    "FSDP": {"parallel": "fsdp"},
}
DISTRIBUTED_CHOICES = {name.lower(): arguments for name, arguments in DISTRIBUTED.items()}

PER_RUN = "nothing: each run gets its own"

KEYS: dict[str, Key] = {
    # the data and the model
    "dataset_name": Key("dataset: hf:NAME of the hub, or with data_dir the folder of a dataset", to_dataset),
    "dataset_config": of_hub(
        "dataset: the configuration in hf:NAME:CONFIG", "a dataset is one folder; name that", "default", "main"
    ),
    "dataset_train_split": of_hub("dataset: the split in hf:NAME#SPLIT", "training reads train.jsonl", "train"),
    "dataset_test_split": of_hub(
        "dataset: the second split in hf:NAME#SPLIT/SPLIT", "evaluation reads val.jsonl", "test", "validation", "val"
    ),
    "model_name_or_path": Key("init_from", to_model),
    "model_revision": ignored("the revision in init_from=NAME@REVISION; of a folder it must be main"),
    "chat_template_path": renamed("chat_template"),
    "chat_template_kwargs": renamed("chat_template_kwargs"),
    "torch_dtype": ignored("dtype, unless bf16 or fp16 is true; weights stay float32"),
    "dtype": ignored("as torch_dtype"),
    "attn_implementation": Key(
        "attention_kernel: eager is math, flash_attention_2 and 3, sdpa and flex_attention are auto",
        one_of(ATTENTION_KERNELS),
    ),
    "use_peft": switch("adapter=lora", {"adapter": "lora"}),
    "lora_r": lora("lora_rank"),
    "lora_alpha": lora("lora_alpha"),
    "lora_dropout": lora("lora_dropout"),
    "lora_target_modules": lora("lora_targets"),
    "use_rslora": Key("lora_alpha times the square root of lora_r, with use_peft", to_rslora),
    # the batch and the duration
    "per_device_train_batch_size": renamed("batch_size"),
    "gradient_accumulation_steps": Key(
        "gradient_accumulation_steps, multiplied by the number of ranks", to_accumulation
    ),
    "num_train_epochs": Key("max_epochs, and max_iters from the number of training examples", to_epochs),
    "max_steps": Key("max_iters, if it is above 0", to_max_iters),
    "max_length": Key(
        "block_size; the end of longer examples is cut (overflow=truncate_target), except in GRPO", to_block_size
    ),
    "max_seq_length": Key("as max_length", to_block_size, SFT),
    # the optimizer and its schedule
    "learning_rate": renamed("learning_rate"),
    "lr_scheduler_type": Key(f"lr_scheduler: {', '.join(SCHEDULES)}; lr_decay_iters is all steps", to_schedule),
    "lr_scheduler_kwargs": ignored("min_lr: lr_end, min_lr, min_lr_rate; wsd_decay_fraction: num_decay_steps"),
    "warmup_steps": ignored("warmup_iters; below 1 a fraction of all steps"),
    "warmup_ratio": ignored("warmup_iters, as a fraction of all steps"),
    "optim": Key(f"optimizer: {', '.join(OPTIMIZERS)}", one_of(OPTIMIZERS)),
    "weight_decay": renamed("weight_decay"),
    "adam_beta1": renamed("beta1"),
    "adam_beta2": renamed("beta2"),
    "adam_epsilon": Key("optimizer_kwargs: eps", to_adam_epsilon),
    "max_grad_norm": renamed("grad_clip"),
    "seed": renamed("seed"),
    "data_seed": Key("nothing: the data order follows from seed too; it must equal seed", to_data_seed),
    # precision and memory
    "bf16": Key("dtype=bfloat16", to_dtype),
    "fp16": ignored("dtype=float16"),
    "auto_find_batch_size": renamed("auto_find_batch_size"),
    "gradient_checkpointing": renamed("activation_checkpointing"),
    "activation_checkpointing": renamed("activation_checkpointing"),
    "full_determinism": renamed("deterministic"),
    "use_cpu": switch("device=cpu", {"device": "cpu"}),
    "no_cuda": switch("device=cpu", {"device": "cpu"}),
    "ddp_timeout": renamed("rank_timeout"),
    "torch_compile": renamed("compile"),
    # evaluation, checkpoints, logging
    "eval_strategy": Key("eval_interval; no evaluates at the end only", to_eval_interval),
    "evaluation_strategy": ignored("as eval_strategy"),
    "eval_steps": ignored(
        "eval_interval, with eval_strategy=steps; below 1 a fraction of all steps; absent, that of logging_steps"
    ),
    "save_strategy": Key(
        "checkpoint_interval, with checkpoint_at_eval off; best saves where val_loss improves", to_checkpoint_interval
    ),
    "save_steps": ignored("checkpoint_interval, with save_strategy=steps; below 1 a fraction of all steps"),
    "save_total_limit": renamed("keep_last"),
    "logging_strategy": Key("log_interval", to_log_interval),
    "logging_steps": ignored("log_interval, with logging_strategy=steps; below 1 a fraction of all steps"),
    "report_to": Key("wandb_log, trackio_log, tensorboard_log", to_trackers),
    "run_name": Key("wandb_run_name with report_to=wandb, trackio_run_name with trackio", to_run_name),
    "project": Key("trackio_project, with report_to=trackio; for wandb WANDB_PROJECT is read", to_project),
    # objectives
    "beta": renamed("beta", WITH_REFERENCE),
    "loss_type": Key("dpo_loss in DPO, loss_type in GRPO; SFT has nll only, KTO kto only", to_loss),
    "label_smoothing": renamed("label_smoothing", DPO),
    "desirable_weight": renamed("desirable_weight", KTO),
    "undesirable_weight": renamed("undesirable_weight", KTO),
    "packing": renamed("packing", SFT),
    "completion_only_loss": Key("loss_on: true is completion, false is all", to_loss_on, SFT),
    "assistant_only_loss": Key(
        "as completion_only_loss; the default is true, where TRL trains on whole conversations", to_loss_on, SFT
    ),
    "precompute_ref_log_probs": Key("reference=cache in DPO; in KTO nothing", to_cached_reference, (*DPO, *KTO)),
    "disable_dropout": renamed("disable_dropout", WITH_REFERENCE),
    "num_generations": renamed("num_generations", GRPO),
    "num_iterations": renamed("num_iterations", GRPO),
    "epsilon": renamed("epsilon", GRPO),
    "epsilon_high": renamed("epsilon_high", GRPO),
    "scale_rewards": renamed("scale_rewards", GRPO),
    "max_completion_length": renamed("max_new_tokens", GRPO),
    "temperature": renamed("temperature", GRPO),
    "top_k": renamed("top_k", GRPO),
    "top_p": renamed("top_p", GRPO),
    "reward_funcs": Key("reward: names with their weights", to_reward, GRPO),
    "reward_weights": ignored("the weights of reward", GRPO),
    "importance_sampling_level": renamed("importance_sampling_level", GRPO),
    "mask_truncated_completions": renamed("mask_truncated", GRPO),
    "steps_per_generation": Key("nothing: each step has its own rollouts", to_rollout_steps, GRPO),
    "generation_batch_size": Key("nothing: each step has its own rollouts", to_rollout_steps, GRPO),
    # of a run
    "output_dir": Key(PER_RUN, only(None, "each run gets its own")),
    "logging_dir": Key(PER_RUN, only(None, "each run gets its own")),
    "local_rank": Key(PER_RUN, only(-1, "each run gets its own")),
    # the others
    **{key: ignored(f"nothing: {reason}") for key, reason in WITHOUT_EFFECT.items()},
    **{key: not_supported(*reason_and_values) for key, reason_and_values in NOT_SUPPORTED.items()},
}

DEFAULTS: dict[str, Any] = {  # transformers.TrainingArguments, where training depends on them
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3,
    "max_steps": -1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "warmup_ratio": 0,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "max_grad_norm": 1.0,
    "seed": 42,
    "bf16": False,
    "fp16": False,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 500,
    "logging_strategy": "steps",
    "logging_steps": 10,  # TRL's
    "lora_r": 16,  # these three are TRL's ModelConfig's
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "report_to": "none",
}
ALGORITHM_DEFAULTS: dict[str, dict[str, Any]] = {  # TRL's trainer configs
    "sft": {"learning_rate": 2e-5, "max_length": 1024},
    "dpo": {"learning_rate": 1e-6, "max_length": 1024, "beta": 0.1},
    "kto": {"learning_rate": 1e-6, "max_length": 1024, "beta": 0.1},
    "grpo": {"learning_rate": 1e-6, "beta": 0.0, "num_generations": 8, "loss_type": "dapo"},
}
COLUMNS = {  # a key that varies is named in tables and folders as the argument that it becomes
    "algorithm": "objective",
    "model_name_or_path": "init_from",
    "dataset_name": "dataset",
    "per_device_train_batch_size": "batch_size",
    "num_train_epochs": "max_epochs",
    "max_length": "block_size",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "max_grad_norm": "grad_clip",
    "lora_r": "lora_rank",
    "optim": "optimizer",
    "lr_scheduler_type": "lr_scheduler",
}


def keys_of_argument(name: str) -> list[str]:
    """The keys that become just this argument, by section.key."""
    return [f"{section}.{key}" for key, row in KEYS.items() if row.becomes == name for section in KEY_SECTIONS]


def argument_of_key(key: str) -> str:
    """The argument that a key becomes, first of all; "nothing", "not" or another word where it becomes none."""
    return re.split(r"\W", KEYS[key].becomes, maxsplit=1)[0] if key in KEYS else ""


def column(name: str) -> str:
    """The column of a name that varies: of "section.key" the argument that the key becomes, or else the key."""
    if "." not in name:
        return name
    key = name.rpartition(".")[2]
    return COLUMNS.get(key, key)


# ---------------------------------------------------------------------------------------------------------------------
# the file


def is_experiment(spec: dict[str, Any]) -> bool:
    """Whether a YAML file is an experiment file: it has a section that a grid file can't have."""
    return any(section in spec for section in SECTIONS if section not in JOB_SECTIONS)


def flatten(
    spec: dict[str, Any], as_text: dict[str, Any], sections: Iterable[str] = SECTIONS
) -> tuple[dict[str, Any], list[str]]:
    """The values of sections by "section.key", without those that are None, and the errors.

    `as_text` is the same file with all scalars as text; the values of TEXT_SECTIONS are taken from it.
    """
    flat: dict[str, Any] = {}
    errors: list[str] = []
    for section in sections:
        values = spec.get(section)
        if values is None:
            continue
        if not isinstance(values, dict):
            errors.append(f"{section}: must map names to values")
            continue
        source = as_text[section] if section in TEXT_SECTIONS else values
        for key, value in values.items():
            if value is not None:
                flat[f"{section}.{key}"] = source[key]
    return flat, errors


def file_errors(spec: dict[str, Any]) -> list[str]:
    """The errors in the names of an experiment file, whatever its values are."""
    errors = [
        f"{name}: no such section{did_you_mean(name, SECTIONS)}; the sections are {', '.join(SECTIONS)}"
        for name in spec
        if name not in SECTIONS
    ]
    execution = spec.get("execution") or {}
    algorithms: set[str] = set()
    if isinstance(execution, dict):
        errors += execution_errors(execution)
        value = execution.get("algorithm")
        algorithms = {str(name).lower() for name in (value if isinstance(value, list) else [value])}
    for section in KEY_SECTIONS:
        values = spec.get(section)
        if isinstance(values, dict):
            errors += [f"{section}: {error}" for error in key_errors(values, algorithms)]
    return errors


def execution_errors(execution: dict[str, Any]) -> list[str]:
    """The errors in the execution section."""
    errors = [
        f"execution: {key}: no such key{did_you_mean(str(key), EXECUTION_KEYS)}"
        for key in execution
        if key not in EXECUTION_KEYS
    ]
    output_dir = execution.get("output_dir")
    if isinstance(output_dir, list):
        errors.append("execution: output_dir: must be one absolute path, not a list")
    elif not isinstance(output_dir, str) or not Path(output_dir).is_absolute():
        errors.append("execution: output_dir: must be one absolute path")
    if not execution.get("algorithm"):
        errors.append(f"execution: algorithm: missing; it is one of {', '.join(ALGORITHMS)}")
    return errors


def key_errors(keys: Iterable[str], algorithms: set[str]) -> list[str]:
    """The keys that are not in the table, or that none of the file's algorithms has."""
    errors = []
    has_known_algorithm = bool(algorithms & set(ALGORITHMS))
    for key in keys:
        if key not in KEYS:
            errors.append(f"{key}: is not supported{did_you_mean(str(key), KEYS)}")
        elif has_known_algorithm and not algorithms & set(KEYS[key].algorithms):
            used, needed = " and ".join(sorted(algorithms)), ", ".join(KEYS[key].algorithms)
            errors.append(f"{key}: has no effect in {used}, only in {needed}")
    return errors


# ---------------------------------------------------------------------------------------------------------------------
# one run


def to_arguments(values: dict[str, Any], ranks: int, count_examples: Callable[[str, str], int]) -> Arguments:
    """The arguments of train.py for the values of one run, by "section.key".

    `count_examples(folder, algorithm)`: as the function below. Raises UserError, one line for each error.
    """
    # 1. The algorithm, its keys over their defaults.
    algorithm = str(values.get("execution.algorithm", "")).lower()
    if algorithm not in ALGORITHMS:
        raise UserError(f"execution: algorithm: {algorithm}: must be one of {', '.join(ALGORITHMS)}")
    keys = DEFAULTS | ALGORITHM_DEFAULTS[algorithm] | keys_of(values)
    experiment = Experiment(algorithm, keys, ranks, count_examples)
    arguments: Arguments = {"objective": algorithm}

    # 2. The keys of the execution section, then those of the trainers.
    errors: list[str] = []
    distributed = values.get("execution.distributed_config", "DDP")
    if str(distributed).lower() in DISTRIBUTED_CHOICES:
        arguments |= DISTRIBUTED_CHOICES[str(distributed).lower()]
    else:
        errors.append(f"execution: distributed_config: {distributed}: must be one of {', '.join(DISTRIBUTED)}")
    for key, value in keys.items():
        if key not in KEYS or algorithm not in KEYS[key].algorithms:
            continue  # file_errors reports it
        try:
            arguments |= KEYS[key].translate(value, experiment)
        except NotSupportedError as error:
            errors.append(f"{key}: is not supported: {error}")
        except UserError as error:
            message = str(error)
            errors.append(message if message.startswith("dataset_name") else f"{key}={value}: {message}")
        except (ValueError, TypeError, ArithmeticError):
            errors.append(f"{key}={value}: must be a number")
    if errors:
        raise UserError("\n".join(dict.fromkeys(errors)))

    # 3. The environment that wandb would read; train.py passes it to wandb as arguments.
    if arguments.get("wandb_log"):
        arguments = wandb_arguments(values) | arguments
    return arguments


def keys_of(values: dict[str, Any]) -> dict[str, Any]:
    """The trainers' keys of one run, without their sections."""
    keys = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        if section in KEY_SECTIONS:
            keys[key] = value
    if "evaluation_strategy" in keys:  # the older name of eval_strategy
        keys["eval_strategy"] = keys.pop("evaluation_strategy")
    return keys


def count_examples(folder: str, algorithm: str) -> int:
    """The number of training examples in a dataset's folder, at least 1. KTO takes a pair apart. Raises UserError."""
    path = Path(folder) / "train.jsonl"
    try:
        with path.open("rb") as file:
            first = next((line for line in file if line.strip()), b"")
            n_rows = max(1, 1 + sum(1 for line in file if line.strip()))
    except OSError:
        raise UserError(
            f"dataset_name={folder}: {path} not found; "
            "num_train_epochs, warmup_ratio and fractions of a run need the number of its examples"
        ) from None
    try:
        row = json.loads(first)
    except ValueError:
        return n_rows  # which is reported when the rows are read
    return 2 * n_rows if algorithm == "kto" and is_pair(row) else n_rows


def is_pair(row: Any) -> bool:
    """Whether a row has a chosen and a rejected completion, and no label."""
    return isinstance(row, dict) and {"chosen", "rejected"} <= row.keys() and "label" not in row


def wandb_arguments(values: dict[str, Any]) -> Arguments:
    arguments = {}
    for variable, argument in (("WANDB_PROJECT", "wandb_project"), ("WANDB_NAME", "wandb_run_name")):
        value = values.get(f"environment.{variable}")
        if value:
            arguments[argument] = value
    return arguments
