"""The experiment file of rl_salamandra_alignment: its sections, and the Hugging Face trainers' keys in our arguments' names.

    execution           algorithm, venv, output_dir (one absolute path), distributed_config
    slurm               directives of sbatch
    rl_script_args, model_config_args, rl_config_args       keys of trl's ScriptArguments, ModelConfig and trainers' configurations
    environment         exported
    evaluation          flags of evaluate.py, for a job that follows

Any value may be a list except output_dir. `KEYS` is the table of all keys, `DEFAULTS` what a key that is left out means, as in those trainers.
A key that is not in the table is a mistake. Knows nothing of the argument table; the check against it follows.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge.errors import UserError, did_you_mean

EXECUTION = ("algorithm", "venv", "output_dir", "distributed_config")
KEY_SECTIONS = ("rl_script_args", "model_config_args", "rl_config_args")
SECTIONS = ("execution", "slurm", *KEY_SECTIONS, "environment", "evaluation")
OURS = ("slurm", "environment", "evaluation")  # sections that a grid of ours may have too
LIST_KEYS = ("report_to", "lora_target_modules")  # a list is one value of these

ALGORITHMS = ("sft", "dpo", "kto", "grpo")
DISTRIBUTED: dict[str, dict[str, Any]] = {
    "DDP": {"parallel": "ddp"},
    "MultiGPU": {"parallel": "ddp"},
    "DSZero1": {"parallel": "fsdp", "fsdp_reshard": False},
    "DSZero2": {"parallel": "fsdp", "fsdp_reshard": False},
    "DSZero2Offload": {"parallel": "fsdp", "fsdp_reshard": False, "fsdp_offload": True},
    "DSZero3": {"parallel": "fsdp"},
    "DSZero3Offload": {"parallel": "fsdp", "fsdp_offload": True},
    "FSDP": {"parallel": "fsdp"},
}


@dataclass(frozen=True)
class Experiment:
    """The keys of one run, with the defaults beneath, and what some of them are worked out from."""

    algorithm: str
    keys: dict[str, Any]
    ranks: int
    examples: Callable[[str], int]  # how many a dataset's folder has to train on; raises UserError

    @property
    def sequences(self) -> int:
        """Of one step."""
        return (
            int(self.keys["per_device_train_batch_size"]) * int(self.keys["gradient_accumulation_steps"]) * self.ranks
        )

    @property
    def steps(self) -> int:
        """Of the whole run."""
        if int(self.keys["max_steps"]) > 0:
            return int(self.keys["max_steps"])
        return math.ceil(float(self.keys["num_train_epochs"]) * self.epoch)

    @property
    def epoch(self) -> float:
        """Steps of one pass over the examples; in GRPO each prompt is answered num_generations times."""
        if not isinstance(self.keys.get("dataset_name"), str):
            raise UserError("dataset_name: missing; a dataset's folder")
        answers = int(self.keys["num_generations"]) if self.algorithm == "grpo" else 1
        return self.examples(self.keys["dataset_name"]) * answers / self.sequences

    def interval(self, key: str) -> int:
        """Steps from a whole number of them or, below 1, from a part of the run."""
        value = float(self.keys[key])
        if value < 0 or (value >= 1 and value != int(value)):
            raise UserError("must be a whole number of steps, or a part of the run below 1")
        return max(1, math.ceil(value * self.steps) if value < 1 else int(value))

    def every(self, strategy: str, key: str, never: int) -> int:
        """Steps between two events that a strategy (no, steps, epoch) and its key ask for."""
        match str(self.keys[strategy]).lower():
            case "no" | "false":  # no without quotes is YAML 1.1's false
                return never
            case "steps":
                return self.interval(key)
            case "epoch":
                return max(1, math.ceil(self.epoch))
        raise UserError("must be no, steps or epoch")


Ours = dict[str, Any]


class Key(NamedTuple):
    """What a key of the trainers becomes: the arguments `to(value, experiment)`, told as `words`."""

    words: str
    to: Callable[[Any, Experiment], Ours]
    algorithms: tuple[str, ...] = ALGORITHMS


def same(name: str) -> Callable[[Any, Experiment], Ours]:
    return lambda value, x: {name: value}


def nothing(value: Any, x: Experiment) -> Ours:
    return {}


def one_of(words: dict[str, Ours]) -> Callable[[Any, Experiment], Ours]:
    """The arguments of a word of few."""

    def to(value: Any, x: Experiment) -> Ours:
        if str(value).lower() not in words:
            raise UserError(f"must be one of {', '.join(words)}{did_you_mean(str(value), words)}")
        return words[str(value).lower()]

    return to


def only(value: Any, why: str) -> Callable[[Any, Experiment], Ours]:
    """A key of which one value alone has an equal here."""

    def to(given: Any, x: Experiment) -> Ours:
        if given != value:
            raise UserError(f"only {value} has an equal here: {why}")
        return {}

    return to


def precision(value: Any, x: Experiment) -> Ours:
    bf16, fp16 = (x.keys[key] is True for key in ("bf16", "fp16"))
    if bf16 and fp16:
        raise UserError("bf16 and fp16 are both true; one of them")
    kind = (
        "bfloat16"
        if bf16
        else "float16"
        if fp16
        else str(x.keys.get("torch_dtype", x.keys.get("dtype", "float32"))).lower()
    )
    return {"dtype": "auto" if kind == "auto" else kind}


def schedule(value: Any, x: Experiment) -> Ours:
    names = {"linear": "linear", "cosine": "cosine", "constant": "none", "constant_with_warmup": "none"}
    if value not in names:
        raise UserError(f"must be one of {', '.join(names)}")
    given, part = float(x.keys["warmup_steps"]), float(x.keys["warmup_ratio"])
    warmup = 0 if value == "constant" else int(given) if given >= 1 else math.ceil((given or part) * x.steps)
    return {
        "lr_scheduler": names[value],
        "warmup_iters": warmup,
        **({} if names[value] == "none" else {"lr_decay_iters": max(1, x.steps, warmup), "min_lr": 0.0}),
    }


def trackers(value: Any, x: Experiment) -> Ours:
    names = value if isinstance(value, list) else [value]
    if unknown := [str(name) for name in names if name not in ("wandb", "tensorboard", "none")]:
        raise UserError(f"{', '.join(unknown)}: must be wandb, tensorboard or none")
    return {flag: True for name, flag in (("wandb", "wandb_log"), ("tensorboard", "tensorboard_log")) if name in names}


def loss(value: Any, x: Experiment) -> Ours:
    return (
        only("kto", "KTO has one loss")(value, x)
        if x.algorithm == "kto"
        else {"dpo_loss" if x.algorithm == "dpo" else "loss_type": value}
    )


def loss_on(value: Any, x: Experiment) -> Ours:
    told = {x.keys[key] for key in ("completion_only_loss", "assistant_only_loss") if x.keys.get(key) is not None}
    if len(told) > 1:
        raise UserError("completion_only_loss and assistant_only_loss differ; here one choice is for all examples")
    return {"loss_on": "completion" if value else "all"}


def longest(value: Any, x: Experiment) -> Ours:
    return {"block_size": value} | ({} if x.algorithm == "grpo" else {"overflow": "truncate_target"})


def dataset(value: Any, x: Experiment) -> Ours:
    folder = Path(str(value).rstrip("/"))
    return {"data_dir": str(folder.parent), "dataset": folder.name}


DPO, KTO, GRPO, SFT = ("dpo",), ("kto",), ("grpo",), ("sft",)
NO_EFFECT = "nothing: no effect on what is learned here"

KEYS: dict[str, Key] = {
    # the script and the model
    "dataset_name": Key("data_dir and dataset: a dataset's folder", dataset),
    "model_name_or_path": Key("init_from", same("init_from")),
    "torch_dtype": Key("dtype, where neither bf16 nor fp16 is true; weights stay float32", nothing),
    "dtype": Key("as torch_dtype", nothing),
    "attn_implementation": Key("attention_kernel: flash_attention_2 is flash, sdpa auto, eager math", one_of({
        "flash_attention_2": {"attention_kernel": "flash"}, "sdpa": {"attention_kernel": "auto"}, "eager": {"attention_kernel": "math"}})),
    "use_peft": Key("adapter=lora", lambda value, x: {"adapter": "lora"} if value else {}),
    "lora_r": Key("lora_rank, with use_peft", lambda value, x: {"lora_rank": value} if x.keys.get("use_peft") else {}),
    "lora_alpha": Key("lora_alpha, with use_peft", lambda value, x: {"lora_alpha": value} if x.keys.get("use_peft") else {}),
    "lora_dropout": Key("lora_dropout, with use_peft", lambda value, x: {"lora_dropout": value} if x.keys.get("use_peft") else {}),
    "lora_target_modules": Key("lora_targets, with use_peft", lambda value, x: {"lora_targets": value} if x.keys.get("use_peft") else {}),
    # how long, and how much at a time
    "per_device_train_batch_size": Key("batch_size", same("batch_size")),
    "gradient_accumulation_steps": Key("gradient_accumulation_steps, times the number of ranks", lambda value, x: {"gradient_accumulation_steps": int(value) * x.ranks}),
    "num_train_epochs": Key("max_epochs, and max_iters from the examples of train.jsonl", lambda value, x: {} if int(x.keys["max_steps"]) > 0 else {"max_epochs": value, "max_iters": x.steps}),
    "max_steps": Key("max_iters, where it is above 0", lambda value, x: {"max_iters": value} if int(value) > 0 else {}),
    "max_length": Key("block_size: the longest example; the end of longer ones is cut (overflow=truncate_target), but in GRPO", longest),
    "max_seq_length": Key("as max_length", longest, SFT),
    # the optimizer
    "learning_rate": Key("learning_rate", same("learning_rate")),
    "lr_scheduler_type": Key("lr_scheduler: linear, cosine, constant or constant_with_warmup; min_lr 0, lr_decay_iters all steps", schedule),
    "warmup_steps": Key("warmup_iters; below 1 a part of all steps", nothing),
    "warmup_ratio": Key("warmup_iters, as a part of all steps", nothing),
    "optim": Key("optimizer: adamw_torch, adamw_torch_fused, adamw_hf, adafactor, sgd, rmsprop, lion_32bit", one_of({
        "adamw_torch": {"optimizer": "adamw"}, "adamw_torch_fused": {"optimizer": "adamw"}, "adamw_hf": {"optimizer": "adamw"},
        "adafactor": {"optimizer": "adafactor"}, "sgd": {"optimizer": "sgd"}, "rmsprop": {"optimizer": "rmsprop"}, "lion_32bit": {"optimizer": "lion"}})),
    "weight_decay": Key("weight_decay", same("weight_decay")),
    "adam_beta1": Key("beta1", same("beta1")),
    "adam_beta2": Key("beta2", same("beta2")),
    "adam_epsilon": Key("optimizer_kwargs: eps", lambda value, x: {"optimizer_kwargs": {"eps": float(value)}}),
    "max_grad_norm": Key("grad_clip", same("grad_clip")),
    "seed": Key("seed", same("seed")),
    "data_seed": Key("nothing: the data follows from seed too; must be equal to it", lambda value, x: only(x.keys["seed"], "all randomness follows from seed")(value, x)),
    # precision and memory
    "bf16": Key("dtype=bfloat16", precision),
    "fp16": Key("dtype=float16", nothing),
    "gradient_checkpointing": Key("activation_checkpointing", same("activation_checkpointing")),
    "torch_compile": Key("compile", same("compile")),
    # evaluating, saving, telling
    "eval_strategy": Key("eval_interval: no is at the end alone", lambda value, x: {"eval_interval": x.every("eval_strategy", "eval_steps", max(1, x.steps))}),
    "evaluation_strategy": Key("as eval_strategy", lambda value, x: {"eval_interval": x.every("evaluation_strategy", "eval_steps", max(1, x.steps))}),
    "eval_steps": Key("eval_interval, with eval_strategy=steps; below 1 a part of all steps", nothing),
    "save_strategy": Key("checkpoint_interval; each evaluation saves too", lambda value, x: {"checkpoint_interval": x.every("save_strategy", "save_steps", 0)}),
    "save_steps": Key("checkpoint_interval, with save_strategy=steps; below 1 a part of all steps", nothing),
    "save_total_limit": Key("keep_last", same("keep_last")),
    "logging_strategy": Key("log_interval", lambda value, x: {"log_interval": x.every("logging_strategy", "logging_steps", max(1, x.steps))}),
    "logging_steps": Key("log_interval; below 1 a part of all steps", lambda value, x: {} if "logging_strategy" in x.keys else {"log_interval": x.interval("logging_steps")}),
    "report_to": Key("wandb_log, tensorboard_log", trackers),
    "run_name": Key("wandb_run_name, with report_to=wandb", lambda value, x: {"wandb_run_name": value} if trackers(x.keys["report_to"], x).get("wandb_log") else {}),
    # objectives
    "beta": Key("beta", same("beta"), (*DPO, *KTO, *GRPO)),
    "loss_type": Key("dpo_loss in DPO, loss_type in GRPO; in KTO kto alone", loss, (*DPO, *KTO, *GRPO)),
    "label_smoothing": Key("label_smoothing", same("label_smoothing"), DPO),
    "desirable_weight": Key("desirable_weight", same("desirable_weight"), KTO),
    "undesirable_weight": Key("undesirable_weight", same("undesirable_weight"), KTO),
    "packing": Key("packing", same("packing"), SFT),
    "completion_only_loss": Key("loss_on: true is completion, false all", loss_on, SFT),
    "assistant_only_loss": Key("as completion_only_loss; left out it is true, where trl learns whole conversations", loss_on, SFT),
    "precompute_ref_log_probs": Key("reference=cache", lambda value, x: {"reference": "cache"} if value else {}, DPO),
    "disable_dropout": Key("nothing: dropout is off unless dropout says otherwise; must be true", only(True, "dropout is off unless dropout says otherwise"), (*DPO, *KTO, *GRPO)),
    "num_generations": Key("num_generations", same("num_generations"), GRPO),
    "num_iterations": Key("num_iterations", same("num_iterations"), GRPO),
    "epsilon": Key("epsilon", same("epsilon"), GRPO),
    "epsilon_high": Key("epsilon_high", same("epsilon_high"), GRPO),
    "scale_rewards": Key("scale_rewards", same("scale_rewards"), GRPO),
    "max_completion_length": Key("max_new_tokens", same("max_new_tokens"), GRPO),
    "temperature": Key("temperature", same("temperature"), GRPO),
    "top_k": Key("top_k", same("top_k"), GRPO),
    "top_p": Key("top_p", same("top_p"), GRPO),
    "reward_funcs": Key("reward", same("reward"), GRPO),
    # what this program does not need to be told
    "max_prompt_length": Key("nothing: prompts are not cut; block_size bounds the whole example", nothing, (*DPO, *KTO, *GRPO)),
    **{key: Key(NO_EFFECT, nothing) for key in (
        "per_device_eval_batch_size", "remove_unused_columns", "dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory", "ddp_find_unused_parameters",
        "gradient_checkpointing_kwargs", "trust_remote_code", "disable_tqdm", "log_level", "overwrite_output_dir")},
    **{key: Key("nothing: computed for each run", lambda value, x: only(None, "it is computed for each run")(value, x)) for key in ("output_dir", "logging_dir", "local_rank")},
}  # fmt: skip

DEFAULTS: dict[str, Any] = {  # of transformers.TrainingArguments, where training depends on them
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3, "max_steps": -1, "learning_rate": 5e-5, "lr_scheduler_type": "linear",
    "warmup_steps": 0, "warmup_ratio": 0, "optim": "adamw_torch", "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "max_grad_norm": 1.0, "seed": 42,
    "bf16": False, "fp16": False, "eval_strategy": "no", "eval_steps": 500, "report_to": "none",
}  # fmt: skip
OF_ALGORITHM: dict[str, dict[str, Any]] = {  # of trl's
    "sft": {"learning_rate": 2e-5, "max_length": 1024},
    "dpo": {"learning_rate": 1e-6, "max_length": 1024, "beta": 0.1},
    "kto": {"learning_rate": 1e-6, "max_length": 1024, "beta": 0.1},
    "grpo": {"learning_rate": 1e-6, "beta": 0.0, "num_generations": 8},
}
# How a varied key is named in tables and folders: as the argument that it becomes.
COLUMNS = {"algorithm": "objective", "model_name_or_path": "init_from", "dataset_name": "dataset", "per_device_train_batch_size": "batch_size", "num_train_epochs": "max_epochs",
           "max_length": "block_size", "adam_beta1": "beta1", "adam_beta2": "beta2", "max_grad_norm": "grad_clip", "lora_r": "lora_rank", "optim": "optimizer",
           "lr_scheduler_type": "lr_scheduler"}  # fmt: skip


def is_experiment(spec: dict) -> bool:
    """Whether a file is of rl_salamandra_alignment's kind."""
    return any(section in spec for section in SECTIONS if section not in OURS)


def flatten(spec: dict, verbatim: dict, wrong: list[str], sections: Iterable[str] = SECTIONS) -> dict[str, Any]:
    """The sections' values by "section.key", those that are None left out; of slurm and environment as the text that the file has."""
    flat: dict[str, Any] = {}
    for section in sections:
        values = spec.get(section)
        if values is None:
            continue
        if not isinstance(values, dict):
            wrong.append(f"{section}: must hold names with values")
            continue
        told = verbatim[section] if section in ("slurm", "environment") else values
        flat |= {f"{section}.{key}": told[key] for key, value in values.items() if value is not None}
    return flat


def check_file(spec: dict, wrong: list[str]) -> None:
    """What of a whole file is wrong, whatever its values are."""
    wrong += [
        f"{name}: no such section{did_you_mean(name, SECTIONS)}; there are {', '.join(SECTIONS)}"
        for name in spec
        if name not in SECTIONS
    ]
    execution, algorithms = spec.get("execution") or {}, set()
    if isinstance(execution, dict):
        wrong += [
            f"execution: {key}: no such key{did_you_mean(key, EXECUTION)}" for key in execution if key not in EXECUTION
        ]
        out = execution.get("output_dir")
        if not isinstance(out, str) or not Path(out).is_absolute():
            wrong.append(
                f"execution: output_dir: must be one absolute path{', not a list' if isinstance(out, list) else ''}"
            )
        if not execution.get("algorithm"):
            wrong.append(f"execution: algorithm: missing; {', '.join(ALGORITHMS)}")
        algorithms = execution.get("algorithm")
        algorithms = {str(name).lower() for name in (algorithms if isinstance(algorithms, list) else [algorithms])}
    for section in KEY_SECTIONS:
        for key in spec[section] if isinstance(spec.get(section), dict) else ():
            if key not in KEYS:
                wrong.append(f"{section}: {key}: has no equal here{did_you_mean(str(key), KEYS)}")
            elif algorithms & {*ALGORITHMS} and not algorithms & {*KEYS[key].algorithms}:
                wrong.append(
                    f"{section}: {key}: has no effect in {' and '.join(sorted(algorithms))}, only in {', '.join(KEYS[key].algorithms)}"
                )


def arguments(point: dict[str, Any], ranks: int, examples: Callable[[str], int]) -> Ours:
    """Our arguments for the values of one run, by "section.key". Raises UserError, all that is wrong in one, a line each."""
    algorithm = str(point.get("execution.algorithm", "")).lower()
    if algorithm not in ALGORITHMS:
        raise UserError(f"execution: algorithm: {algorithm}: must be one of {', '.join(ALGORITHMS)}")
    given = {name.partition(".")[2]: value for name, value in point.items() if name.partition(".")[0] in KEY_SECTIONS}
    if "evaluation_strategy" in given:
        given["eval_strategy"] = given.pop("evaluation_strategy")
    x = Experiment(algorithm, DEFAULTS | OF_ALGORITHM[algorithm] | given, ranks, examples)
    ours: Ours = {"objective": algorithm}
    wrong: dict[str, None] = {}
    distributed = point.get("execution.distributed_config", "DDP")
    try:
        ours |= one_of({name.lower(): values for name, values in DISTRIBUTED.items()})(distributed, x)
    except UserError:
        wrong[f"execution: distributed_config: {distributed}: must be one of {', '.join(DISTRIBUTED)}"] = None
    for key, value in x.keys.items():
        try:
            if key in KEYS and algorithm in KEYS[key].algorithms:  # `check_file` tells of others
                ours |= KEYS[key].to(value, x)
        except UserError as mistake:
            words = str(mistake)
            wrong[words if words.startswith("dataset_name") else f"{key}={value}: {words}"] = None
        except (ValueError, TypeError, ArithmeticError):
            wrong[f"{key}={value}: must be a number"] = None
    if ours.get("wandb_log"):  # which train.py gives to wandb itself
        ours = {
            name: point[f"environment.{key}"]
            for key, name in (("WANDB_PROJECT", "wandb_project"), ("WANDB_NAME", "wandb_run_name"))
            if point.get(f"environment.{key}")
        } | ours
    if wrong:
        raise UserError("\n".join(wrong))
    return ours
