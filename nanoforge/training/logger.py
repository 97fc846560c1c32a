"""What a run tells: console, metrics.jsonl, and if asked wandb, tensorboard and a picture of the loss.

Only the main rank has a RunLogger that writes; the others' are silent. wandb and tensorboard are imported only when they are asked for.
"""

import json
import math
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanoforge.console import print_line


def keep_until(path: Path, step: int, evaluated: bool) -> None:
    """Drop what a resumed run will tell again from metrics.jsonl: lines later than its step, those of an evaluation which the
    checkpoint doesn't know of, and the broken last line of a killed run."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            told = json.loads(line)
            if told["step"] < step or (told["step"] == step and (told["event"] not in ("eval", "save") or evaluated)):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(kept), encoding="utf-8")
    os.replace(beside, path)


class RunLogger:
    """Tells events of a run. `silent` ranks do nothing."""

    def __init__(
        self, out_dir: Path, *, silent: bool, start_step: int, evaluated: bool, seconds: float, total_steps: int
    ):
        self.silent, self.start_step, self.out_dir, self.metrics = (
            silent,
            start_step,
            out_dir,
            out_dir / "metrics.jsonl",
        )
        self.began = time.perf_counter() - seconds
        self.file = self.bar = self.wandb = self.tensorboard = None
        if silent:
            return
        keep_until(self.metrics, start_step, evaluated)
        self.file, self.torn = self.metrics.open("ab", buffering=0), False
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return time.perf_counter() - self.began

    def track_wandb(self, project: str, name: str, config: dict) -> None:
        """Log to wandb from now on: to the run that this out_dir began, if it did."""
        if self.silent:
            return
        import wandb

        path = self.out_dir / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(4))
        self.wandb = wandb.init(
            project=project,
            name=name,
            id=path.read_text().strip(),
            resume="allow",
            config=config,
            dir=str(self.out_dir),
        )

    def track_tensorboard(self) -> None:
        """Log to out_dir/tensorboard from now on."""
        if self.silent:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.tensorboard = SummaryWriter(str(self.out_dir / "tensorboard"), purge_step=self.start_step + 1)

    def print(self, words: str) -> None:
        """A line on the console."""
        if words and not self.silent:
            print_line(words)

    def advance(self) -> None:
        """One more step on the progress bar, if there is one."""
        if self.bar is not None:
            self.bar.update()

    def event(self, event: str, step: int, words: str, **values: Any) -> None:
        """A line on the console and one in metrics.jsonl, flushed at once; numbers also go to the trackers."""
        if self.silent:
            return
        self.print(words)
        values = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        line = {"event": event, "step": step, "seconds": round(self.seconds, 3), **values}
        self.write(json.dumps(line, allow_nan=False))
        numbers = {
            f"{event}/{key}": value
            for key, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if self.wandb is not None and numbers:
            self.wandb.log(numbers, step=step)
        if self.tensorboard is not None:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, step)

    def write(self, line: str) -> None:
        """Append to metrics.jsonl. A full disk costs the line, not the run; the next one begins anew."""
        data = (line + "\n").encode()
        try:
            written = os.write(self.file.fileno(), (b"\n" if self.torn else b"") + data)
            self.torn = written < len(data)
        except OSError as error:
            written = 0
            self.print(f"{self.metrics}: {error}")
        if written < len(data):
            self.print(f"{self.metrics}: a line is lost: {line}")

    def note(self, step: int, words: str) -> None:
        """A remark, on the console and in metrics.jsonl."""
        self.event("note", step, words, text=words)

    def close(self) -> None:
        for thing in (self.bar, self.file, self.tensorboard):
            if thing is not None:
                thing.close()
        if self.wandb is not None:
            self.wandb.finish()


def draw_loss(metrics: Path, picture: Path) -> None:
    """The loss curve of a run: training and validation loss against steps, as a PNG."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    train = [(line["step"], line["loss"]) for line in lines if line["event"] == "train" and math.isfinite(line["loss"])]
    evals = [line for line in lines if line["event"] == "eval"]
    if train:
        axes.plot(*zip(*train, strict=True), color="#9ecae1", linewidth=1, label="training batches")
    for key, color in (("train_loss", "#3182bd"), ("val_loss", "#e6550d")):
        points = [(line["step"], line[key]) for line in evals if math.isfinite(line[key])]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=key)
    best = min(evals, key=lambda line: line["val_loss"], default=None)
    if best:
        axes.annotate(
            f"{best['val_loss']:.3f}",
            (best["step"], best["val_loss"]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color="#e6550d",
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=metrics.parent.name)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)
