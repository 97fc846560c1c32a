"""Every key of metrics.jsonl, with its unit and meaning: docs/metrics.md is made from these tables. Imports no torch.

A key may end in <name>: one for each dataset or reward. An evaluation has the objective's metrics as `val_` and their
key. A run that logs another key fails the tests: add it here.
"""

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple


class Metric(NamedTuple):
    """A key of metrics.jsonl."""

    key: str
    unit: str
    meaning: str


EVENTS = {
    "train": "a training step, every `--log_interval` steps",
    "eval": "an evaluation, every `--eval_interval` steps, before the first step and at the end",
    "save": "a checkpoint that is written whole",
    "note": "something in words: a resume, a rollback, a limit, the end",
}

EVERY_LINE = (
    Metric("event", "", "what the line is about: train, eval, save or note"),
    Metric("step", "steps", "optimizer steps made so far, over all resumes"),
    Metric("seconds", "s", "time since training began, over all resumes, evaluations and saves included"),
)

OF_EVENT = {
    "train": (
        Metric("loss", "", "the training loss of this step's global batch: nats per token, for lm and sft"),
        Metric("lr", "", "learning rate of this step; other peaks, such as Muon's, follow the same schedule"),
        Metric("grad_norm", "", "norm of the gradient over all parameters, before clipping"),
        Metric("tokens", "tokens", "tokens read so far, over all ranks"),
        Metric("step_ms", "ms", "mean time of a step since the last such line; evaluations and saves are left out"),
        Metric("tokens_per_second", "tokens/s", "tokens of all ranks over the same time"),
        Metric("skipped", "steps", "steps skipped so far: gradients not finite, or spikes with `--spike_skip`"),
        Metric("peak_memory_mb", "MB", "most memory in use so far: of the GPU, or of the process on a CPU"),
        Metric("mfu", "fraction", "FLOPs of the model over the GPU's peak in 16 bits; only where the peak is known"),
        Metric("data_hash", "hex", "hash of the step's global batch, for any number of ranks (`--log_data_hash`)"),
    ),
    "eval": (
        Metric("train_loss", "", "loss on `--eval_iters` batches of training data, the same ones every time"),
        Metric("val_loss", "", "loss on the validation data; of grpo the negative mean reward"),
        Metric("val_loss/<dataset>", "", "the same for each dataset of a mixture, or for each context"),
        Metric("bits_per_byte", "bits", "val_loss in bits per byte of text, which compares tokenizers"),
        Metric("epochs", "epochs", "passes over the training data so far"),
        Metric("epochs/<dataset>", "epochs", "the same for each dataset of a mixture"),
        Metric("tokens/<dataset>", "tokens", "tokens read so far of each dataset of a mixture"),
        Metric("samples", "", "greedy completions of the first validation examples: a list of prompt and completion"),
    ),
    "save": (
        Metric("blocked_ms", "ms", "how long training waited for the save"),
        Metric("written_ms", "ms", "how long the thread took that wrote it"),
    ),
    "note": (
        Metric("text", "", "what happened"),
        Metric("compare_val_loss_after", "steps", "losses of this step and before are of other data: don't compare"),
    ),
}

TOKEN_METRICS = (
    Metric("entropy", "nats", "mean entropy of the model's predictions at the loss tokens"),
    Metric("mean_token_accuracy", "fraction", "how often the likeliest token is the target, at the loss tokens"),
)
PREFERENCES = (
    Metric("rewards/chosen", "", "beta times the log-ratio of policy and reference, of chosen completions"),
    Metric("rewards/rejected", "", "the same of rejected completions"),
    Metric("logps/chosen", "nats", "the policy's log-probability of a chosen completion, the sum over its tokens"),
    Metric("logps/rejected", "nats", "the same of rejected completions"),
)
OF_OBJECTIVE = {
    "sft": TOKEN_METRICS,
    "dpo": (
        *PREFERENCES,
        Metric("rewards/margins", "", "rewards/chosen minus rewards/rejected"),
        Metric("rewards/accuracies", "fraction", "pairs whose chosen completion has the higher reward"),
        *TOKEN_METRICS,
    ),
    "kto": (
        *PREFERENCES,
        Metric("kl", "nats", "KTO's reference point: the mean log-ratio of mismatched completions, at least 0"),
        *TOKEN_METRICS,
    ),
    "grpo": (
        Metric("reward", "", "mean reward of the completions, the weighted sum of `--reward`"),
        Metric("reward_std", "", "standard deviation of the rewards in a group, mean over groups"),
        Metric(
            "frac_reward_zero_std", "fraction", "groups whose completions all have the same reward: nothing to learn"
        ),
        Metric("rewards/<reward>", "", "mean of each reward, without its weight"),
        Metric("completions/mean_length", "tokens", "mean length of the completions"),
        Metric("completions/min_length", "tokens", "the shortest completion"),
        Metric("completions/max_length", "tokens", "the longest completion"),
        Metric("completions/mean_terminated_length", "tokens", "mean length of those that ended by themselves"),
        Metric("completions/clipped_ratio", "fraction", "completions cut at `--max_new_tokens`"),
        Metric("kl", "nats", "KL divergence of policy and reference per token, the k3 estimate"),
        Metric("clip_ratio/low", "fraction", "loss tokens whose ratio is below 1 - epsilon and clipped"),
        Metric("clip_ratio/high", "fraction", "loss tokens whose ratio is above 1 + epsilon_high and clipped"),
        Metric("rollout_logp_error", "nats", "difference of the log-probabilities of sampling and of training, mean"),
        *TOKEN_METRICS,
    ),
}


def documented_keys(event: str) -> list[str]:
    """The keys that a line of an event may have, with <name> for those that have one for each dataset or reward."""
    of_objectives = [metric.key for metrics in OF_OBJECTIVE.values() for metric in metrics]
    keys = [metric.key for metric in (*EVERY_LINE, *OF_EVENT.get(event, ()))]
    if event == "train":
        return keys + of_objectives
    if event == "eval":
        return keys + [f"val_{key}" for key in of_objectives]
    return keys


@functools.cache
def key_pattern(event: str) -> re.Pattern[str]:
    """Matches the keys of an event."""
    return re.compile("|".join(re.sub(r"<\w+>", ".+", re.escape(key)) for key in documented_keys(event)))


def undocumented(event: str, keys: Iterable[str]) -> list[str]:
    """The keys of a line that are in no table."""
    return [key for key in keys if not key_pattern(event).fullmatch(key)]
