"""The end of a run: a block of `key: value` lines that can be searched, and the three commands that come next."""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanoforge import device
from nanoforge.console import format_value
from nanoforge.data.tokenization import Tokenizer
from nanoforge.errors import UserError
from nanoforge.posttraining import prompt_format
from nanoforge.posttraining.example_rows import ROLES
from nanoforge.posttraining.examples import Example
from nanoforge.run_state import read_metrics
from nanoforge.training.logger import RunLogger
from run import Run

ROOT = Path(__file__).resolve().parent
BEGIN = "---"  # the line before the block
KEY_WIDTH = 20
N_PROMPTS = 100  # examples among which the shortest prompt is looked for

Metrics = Mapping[str, Any]  # a line of metrics.jsonl


def print_closing(run: Run, logger: RunLogger, status: str, reason: str) -> None:
    """Print what the run has reached and what comes next, on the main rank: a collective. status: finished, stopped."""
    ranks = run.ranks
    peak = ranks.all_reduce_max(round(device.peak_memory_mb(ranks.device) or 0))
    if not ranks.is_main:
        return
    values = {"status": status, "reason": reason, "out_dir": run.args.out_dir, **measured(run, logger, peak)}
    lines = [BEGIN, *(f"{name + ':':<{KEY_WIDTH}} {format_number(value)}" for name, value in values.items()), "next:"]
    commands = [sample_command(run), script("report.py", run.args.out_dir), go_on_command(run)]
    logger.print("\n".join([*lines, *(f"    {quote(command)}" for command in commands)]))


# ---------------------------------------------------------------------------------------------------------------------
# what was reached


def measured(run: Run, logger: RunLogger, peak_memory_mb: int) -> dict[str, Any]:
    """What is known of the run by the names of metrics.jsonl: over all its resumes, from that file."""
    progress = run.progress
    lines = read_metrics(logger.path, warnings=[])
    evals = [line for line in lines if line["event"] == "eval"]
    best = [line for line in evals if line["step"] == progress.best_step]
    is_known = progress.best_step >= 0
    values: dict[str, Any] = {
        "best_val_loss": progress.best_val_loss if is_known else None,
        "best_step": progress.best_step if is_known else None,
        **(of_validation(best[-1]) if best else {}),
        "val_loss": evals[-1].get("val_loss") if evals else None,
        "step": progress.step,
        "tokens": progress.tokens,
        "parameters": run.raw_model.count_parameters(),
        "seconds": round(logger.seconds, 1),
        "tokens_per_second": median(lines, "tokens_per_second"),
        "mfu": median(lines, "mfu"),
        "peak_memory_mb": max([peak_memory_mb, *numbers(lines, "peak_memory_mb")]) or None,
    }
    return {name: value for name, value in values.items() if value is not None}


def of_validation(best: Metrics) -> dict[str, Any]:
    """Further metrics of the best evaluation: bits_per_byte, val_reward and others, those of single datasets apart."""
    return {
        name: value
        for name, value in best.items()
        if name == "bits_per_byte" or (name.startswith("val_") and not name.startswith("val_loss"))
    }


def numbers(lines: Iterable[Metrics], name: str) -> list[float]:
    """A metric's values."""
    return [line[name] for line in lines if isinstance(line.get(name), int | float)]


def median(lines: Iterable[Metrics], name: str) -> float | None:
    """The median of a metric; None where it was not measured."""
    values = numbers(lines, name)
    return statistics.median(values) if values else None


def format_number(value: Any) -> str:
    """Whole numbers in full, others with six digits, no separators: as float() reads them."""
    return f"{value:.6g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# the commands


def script(name: str, *flags: str) -> list[str]:
    """The command that runs a script of this project from the current folder."""
    return ["python", name if Path.cwd() == ROOT else str(ROOT / name), *flags]


def quote(command: Sequence[str]) -> str:
    """A command as the shell reads it."""
    return subprocess.list2cmdline(command) if sys.platform == "win32" else shlex.join(command)


def go_on_command(run: Run) -> list[str]:
    """Resumes the run on as many ranks, with what has ended it raised to the double; a time budget can't be raised, so
    another run goes on from the weights of this one."""
    args, ranks = run.args, run.ranks
    names = [limit.removeprefix("--").partition("=")[0] for limit in run.reached_limits()]
    if "time_budget" in names:
        record = os.path.join(args.out_dir, "train_config.json")
        return script("train.py", record, f"--init_from={args.out_dir}", f"--out_dir={args.out_dir}-more")
    command = script("train.py", "--init_from=resume", f"--out_dir={args.out_dir}")
    command += [f"--{name}={format_value(2 * getattr(args, name) or 1)}" for name in names]
    if ranks.world_size > 1 and os.environ.get("LOCAL_WORLD_SIZE") == str(ranks.world_size):
        return ["torchrun", "--standalone", f"--nproc_per_node={ranks.world_size}", *command[1:]]
    return command


def sample_command(run: Run) -> list[str]:
    """Asks the model for what it was trained for: a conversation, a completion of an example's prompt, or a text."""
    args = run.args
    examples = run.data.eval_datasets["val"][0].examples
    if args.adapter == "soft_prompt":
        template = prompt_format.parse(args.prompt_format)
        rows = [example.row for example in examples.rows[:1]] if examples else []
        fields = {name: rows[0].get(name, "...") if rows else "..." for name in template.fields}
        return script("sample.py", f"--prompt_dir={args.out_dir}", f"--fields={json.dumps(fields)}")
    command = script("sample.py", f"--out_dir={args.out_dir}")
    if examples is None:
        return [*command, *start_flags(run.tokenizers.values())]
    if is_chat(examples.rows, next(iter(run.tokenizers.values()))):
        return [*command, "--chat"]
    prompts = [example.row["prompt"] for example in examples.rows[:N_PROMPTS] if example.row.get("prompt")]
    start = [f"--start={min(prompts, key=len)}"] if prompts else start_flags(run.tokenizers.values())
    return [*command, "--stop_at_end", *start]


def is_chat(examples: Sequence[Example], tokenizer: Tokenizer) -> bool:
    """Whether the examples are messages; of packed ones, whose rows are not kept, the tokenizer says it."""
    row = examples[0].row if examples else {}
    if not row:
        return bool(tokenizer.chat_template) or ROLES["assistant"] in tokenizer.added_ids
    return "messages" in row or any(isinstance(row.get(name), list) for name in ("prompt", "chosen"))


def start_flags(tokenizers: Iterable[Tokenizer]) -> list[str]:
    """None where sample.py's own start, a newline, is a text of these tokenizers; else a token of each."""
    tokenizers = list(tokenizers)
    try:
        for tokenizer in tokenizers:
            tokenizer.encode("\n")
    except UserError:
        return ["--start", *(tokenizer.decode([0]) for tokenizer in tokenizers)]
    return []
