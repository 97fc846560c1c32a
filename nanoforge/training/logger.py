"""Logs of a run: console, metrics.jsonl, and if asked trackers (trackers.py) and a picture of the loss.

`RunLogger` writes events, on the main rank; on other ranks it is silent. `StepLogger` reads a training step's metrics
back from the device and logs them. Trackers and matplotlib are imported only when they are asked for, and what happens
to them ends no run.
"""

import contextlib
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from tqdm import tqdm

from nanoforge.console import Curve, draw_to_files, format_duration, print_line
from nanoforge.device import peak_memory_mb
from nanoforge.distributed import Ranks
from nanoforge.files import write_text
from nanoforge.run_dir import METRICS_FILE
from nanoforge.run_state import read_metrics
from nanoforge.training.grad_guard import GradGuard
from nanoforge.training.trackers import Tracker, numbers_of

CONSOLE_METRICS = ("reward", "rewards/accuracies", "rewards/margins", "kl")  # printed, where an objective has them


def trim_metrics(path: Path, step: int, *, evaluated: bool) -> None:
    """Drop from a metrics.jsonl what a run resumed at a step logs again.

    These are lines of later steps, the broken last line of a killed run, and an evaluation at this step, unless the
    checkpoint was made after it (`evaluated`).
    """
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            is_logged_before = line["step"] < step
            is_at_step = line["step"] == step and (evaluated or line["event"] != "eval")
        except (ValueError, KeyError, TypeError):
            continue
        if is_logged_before or is_at_step:
            kept.append(text + "\n")
    write_text(path, "".join(kept))


class RunLogger:
    """Logs events of a run. A silent one, on the ranks other than the main one, does nothing."""

    def __init__(
        self, out_dir: Path, *, silent: bool, start_step: int, evaluated: bool, seconds: float, total_steps: int
    ) -> None:
        """evaluated: whether metrics.jsonl has the evaluation at start_step; seconds: of training before that step."""
        self.out_dir = out_dir
        self.path = out_dir / METRICS_FILE
        self.silent = silent
        self.last_step = start_step
        self.started_at = time.perf_counter() - seconds
        self.file: IO[bytes] | None = None
        self.bar: tqdm | None = None
        self.curve = Curve()
        self.trackers: dict[str, Tracker] = {}
        self.failed: set[str] = set()  # what has been reported to fail
        self.line_is_torn = False  # the last line was written in part
        if silent:
            return
        with contextlib.suppress(OSError):  # a full disk; readers drop the later lines as well
            trim_metrics(self.path, start_step, evaluated=evaluated)
        self.file = self.path.open("ab", buffering=0)
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including those before a resume."""
        return time.perf_counter() - self.started_at

    def track(self, name: str, start: Callable[[], Tracker]) -> None:
        """Log to a tracker too from now on."""
        if self.silent:
            return
        with self.without_failing(name):
            self.trackers[name] = start()

    @contextlib.contextmanager
    def without_failing(self, name: str) -> Iterator[None]:
        """For what training does not depend on: its first error is reported, and training goes on."""
        try:
            yield
        except Exception as error:
            tracker = self.trackers.pop(name, None)
            if tracker is not None:
                with contextlib.suppress(Exception):
                    tracker.close()
            if name not in self.failed:
                self.failed.add(name)
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                self.note(self.last_step, f"{name} failed ({reason}); training goes on without it")

    def print(self, message: str) -> None:
        """Print a line on the console."""
        if message and not self.silent:
            print_line(message)

    def advance(self) -> None:
        """Advance the progress bar, if there is one, by a step."""
        if self.bar is not None:
            self.bar.update()

    def event(self, event: str, step: int, message: str, **values: Any) -> None:
        """Print a message, and write a line to metrics.jsonl at once; numbers also go to the trackers."""
        if self.silent:
            return
        self.print(message)
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[key] = None  # JSON has no nan
        line = {"event": event, "step": step, "seconds": round(self.seconds, 3), **values}
        self.write(json.dumps(line, allow_nan=False))
        if event == "train":
            self.show_curve(values.get("loss"))
        numbers = numbers_of(event, values)
        self.last_step = step
        for name, tracker in list(self.trackers.items()):
            with self.without_failing(name):
                tracker.log(numbers, step)

    def show_curve(self, loss: float | None) -> None:
        """Show the loss and its curve behind the progress bar, if there is one."""
        if self.bar is not None and loss is not None:
            self.curve.add(loss)
            self.bar.set_postfix_str(f"loss {loss:.4f} {self.curve.draw(sys.stderr.encoding)}", refresh=False)

    def write(self, line: str) -> None:
        """Append a line to metrics.jsonl. A full disk loses the line, not the run."""
        assert self.file is not None
        data = (line + "\n").encode()
        separator = b"\n" if self.line_is_torn else b""
        try:
            n_written = os.write(self.file.fileno(), separator + data)
            self.line_is_torn = n_written < len(data)
        except OSError as error:
            n_written = 0
            self.print(f"{self.path}: {error}")
        if n_written < len(data):
            self.print(f"{self.path}: a line is lost: {line}")

    def note(self, step: int, text: str) -> None:
        """Print a note and write it to metrics.jsonl."""
        self.event("note", step, text, text=text)

    def close(self) -> None:
        """Close the file, the progress bar and the trackers."""
        for name, tracker in list(self.trackers.items()):
            with self.without_failing(name):
                tracker.close()
        for resource in (self.bar, self.file):
            if resource is not None:
                resource.close()


# ---------------------------------------------------------------------------------------------------------------------
# training steps


@dataclass(kw_only=True)
class StepLogger:
    """Logs training steps: their metrics, read back from the device, and the speed since the step logged before."""

    logger: RunLogger
    ranks: Ranks
    guard: GradGuard
    log_interval: int
    total_steps: int
    peak_tokens_per_second: float | None  # of all ranks together, at the devices' peak FLOPs; None where it isn't known
    log_data_hash: bool
    n_logged: int = 0

    def restart(self, step: int, tokens: int) -> None:
        """Measure the speed from here: an evaluation or a save is no part of it."""
        self.start_time = time.perf_counter()
        self.start_step = step
        self.start_tokens = tokens

    def is_due(self, step: int) -> bool:
        """Whether a step is logged."""
        return step == 1 or step % self.log_interval == 0

    def log_step(
        self, step: int, tokens: int, metrics: Mapping[str, Tensor], *, lr: float, grad_norm: Tensor, data_hash: int
    ) -> int:
        """Log the step just made: a collective, which waits for the device once. Returns how many steps in a row were
        skipped at most.

        tokens: seen so far. metrics: (sum, count) over this rank's micro-batches. grad_norm: a scalar on the device.
        data_hash: of this rank's rows.
        """
        guard = self.guard
        scalars = (grad_norm, guard.skipped, guard.max_consecutive)
        means, (norm, n_skipped, max_consecutive) = read_step(metrics, scalars, self.ranks)
        seconds_per_step = (time.perf_counter() - self.start_time) / (step - self.start_step)
        tokens_per_second = (tokens - self.start_tokens) / (step - self.start_step) / seconds_per_step
        line: dict[str, Any] = {
            "loss": means.pop("loss"),
            "lr": lr,
            "grad_norm": norm,
            "tokens": tokens,
            "step_ms": seconds_per_step * 1e3,
            "tokens_per_second": tokens_per_second,
            "skipped": int(n_skipped),
            **means,
        }
        peak_memory = peak_memory_mb(self.ranks.device)
        if peak_memory is not None:
            line["peak_memory_mb"] = round(peak_memory, 1)
        if self.peak_tokens_per_second:
            line["mfu"] = tokens_per_second / self.peak_tokens_per_second
        if self.log_data_hash:
            line["data_hash"] = sum_hashes(data_hash, self.ranks)
        self.logger.event("train", step, format_train_line(step, line), **line)
        self.n_logged += 1
        if self.n_logged == 1:  # modules and the model stay: the garbage collector need not look at them again
            gc.freeze()
            gc.enable()
        if self.n_logged == 2:  # the first line's time includes what is made at the first step
            n_left = self.total_steps - step
            duration = format_duration(n_left * seconds_per_step)
            self.logger.print(f"estimated time: {duration} for {n_left:,} more steps, without evaluations")
        self.restart(step, tokens)
        return int(max_consecutive)


def read_step(
    metrics: Mapping[str, Tensor], scalars: Sequence[Tensor], ranks: Ranks
) -> tuple[dict[str, float], list[float]]:
    """(means over all ranks, nan where nothing was counted; the scalars), copied from the device together.

    metrics: (2, ...) sums and counts of each rank. scalars: the same on all ranks.
    """
    pairs = [metric.reshape(2, -1).sum(1).to(ranks.device, torch.float32) for metric in metrics.values()]
    sums, counts = ranks.all_reduce_(torch.stack(pairs)).T
    values = torch.cat((sums / counts, torch.stack([scalar.to(ranks.device, torch.float32) for scalar in scalars])))
    numbers = values.tolist()
    return dict(zip(metrics, numbers[: len(metrics)], strict=True)), numbers[len(metrics) :]


def sum_hashes(data_hash: int, ranks: Ranks) -> str:
    """The sum of the ranks' hashes mod 2^64, in hexadecimal."""
    signed = data_hash - 2**64 if data_hash >= 2**63 else data_hash
    return f"{int(ranks.all_reduce_(torch.tensor(signed))) % 2**64:016x}"


def format_train_line(step: int, metrics: Mapping[str, Any]) -> str:
    """A training step on the console."""
    parts = [f"loss {metrics['loss']:.4f}"]
    parts += [f"{name} {metrics[name]:.3f}" for name in CONSOLE_METRICS if name in metrics]
    parts += [f"{metrics['step_ms']:.1f} ms", f"{metrics['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in metrics:
        parts.append(f"mfu {metrics['mfu']:.1%}")
    parts.append(f"lr {metrics['lr']:.2e}")
    if metrics["skipped"]:
        parts.append(f"{metrics['skipped']} skipped")
    return f"step {step}: {', '.join(parts)}"


# ---------------------------------------------------------------------------------------------------------------------
# the picture


def draw_loss(metrics_path: Path, picture_path: Path) -> None:
    """Plot training and validation loss against steps, as a PNG."""
    draw_to_files()
    from matplotlib.figure import Figure

    lines = read_metrics(metrics_path, warnings=[])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    curves: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("train", "loss", {"color": "#9ecae1", "linewidth": 1, "label": "training batches"}),
        ("eval", "train_loss", {"color": "#3182bd", "marker": "o", "markersize": 3, "label": "train_loss"}),
        ("eval", "val_loss", {"color": "#e6550d", "marker": "o", "markersize": 3, "label": "val_loss"}),
    )
    for event, key, style in curves:  # a loss that is not finite is null
        points = [(line["step"], line[key]) for line in lines if line["event"] == event and line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    if points:  # of val_loss
        best = min(points, key=lambda point: point[1])
        axes.annotate(f"{best[1]:.3f}", best, xytext=(0, 8), textcoords="offset points", ha="center", color="#e6550d")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(metrics_path.parent.name, parse_math=False)  # the name may have a dollar
    axes.grid(alpha=0.25)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(picture_path, dpi=120)
