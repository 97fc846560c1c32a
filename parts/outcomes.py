"""What the folders of runs tell: their states, their numbers, and tables of them. Starts nothing.

A run's folder has, besides what train.py writes, of whoever started it:

    run.json       its arguments: a config for train.py
    log.txt        what it printed, all attempts
    exit_status    of the last attempt; absent while one is made
    .sweep.lock    held by whoever makes an attempt (flock)
    pruned         by a search that gave it up
"""

import csv
import fcntl
import io
import json
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

from parts.grid import brief

LOG, CONFIG, STATUS, LOCK, PRUNED = "log.txt", "run.json", "exit_status", ".sweep.lock", "pruned"
ENDED = ("done", "pruned")  # states in which nothing is left to do
IDLE = ("new", "stopped", "failed")  # and those in which nobody does it
STOPS = {128 + number: number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}


class Outcome(NamedTuple):
    """Of one run: its state (new, running, done, pruned, stopped, failed, or a queue's word), and what it has reached."""

    state: str
    why: str = ""
    step: int | None = None
    loss: float | None = None  # of the last training batch told
    val_loss: float | None = None  # of the last evaluation
    best_val_loss: float | None = None
    best_step: int | None = None
    seconds: float | None = None
    evaluations: tuple[tuple[int, float], ...] = ()  # (step, val_loss)
    trained: bool = False  # to the end; what follows may still fail


def lines(path: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl."""
    told = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return told
    for line in text.splitlines():
        try:
            value = json.loads(line)
            if isinstance(value, dict) and "event" in value and "step" in value:
                told.append(value)
        except ValueError:
            continue  # the broken last line of a run that was killed, or is being written
    return told


def locked(folder: Path) -> bool:
    """Whether a process makes an attempt at the run. It asks for an instant's share of the lock: whoever wants it tries again a little later."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def begun(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from."""
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())


def tail(folder: Path, count: int = 5) -> list[str]:
    """The last lines of the run's log."""
    try:
        with (folder / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            words = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in words.splitlines() if line.strip()][-count:]


def read(folder: Path, running: bool | None = None) -> Outcome:
    """The outcome that a run's folder tells; `running` where that is known otherwise than from its lock."""
    told = lines(folder / "metrics.jsonl")
    train, evals = ([line for line in told if line["event"] == event] for event in ("train", "eval"))
    evaluations = tuple((line["step"], line["val_loss"]) for line in evals if line.get("val_loss") is not None)
    best = min(((loss, step) for step, loss in evaluations if step), default=(None, None))  # of what was learned
    reached = {
        "step": max((line["step"] for line in told), default=None), "loss": train[-1].get("loss") if train else None, "val_loss": evaluations[-1][1] if evaluations else None,
        "best_val_loss": best[0], "best_step": best[1], "seconds": told[-1].get("seconds") if told else None, "evaluations": evaluations,
    }  # fmt: skip
    last = str(told[-1].get("text", "")) if told and told[-1]["event"] == "note" else ""
    trained = last.startswith("finished")
    try:
        status = int((folder / STATUS).read_text())
    except (OSError, ValueError):
        status = None
    if locked(folder) if running is None else running:
        state, why = "running", ""
    elif (folder / PRUNED).exists():
        state, why = "pruned", ""
    elif trained and not status:
        state, why = "done", ""
    elif last.startswith("stopped by") or status in STOPS:
        state, why = "stopped", last.partition(";")[0] or f"by {signal.Signals(STOPS[status]).name}"
    elif status is not None:
        state, why = "failed", (f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}") + (" after its training" if trained else "")
    else:
        state, why = ("stopped", "its end was not seen") if told or (folder / LOG).exists() else ("new", "")
    return Outcome(state, why, **reached, trained=trained)


# ---------------------------------------------------------------------------------------------------------------------
# tables

NUMBERS = ("step", "loss", "val_loss", "best_val_loss", "best_step", "seconds")


def rows(names: list[str], told: list[dict[str, Any]], outcomes: list[Outcome]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: what varies, the state, what was reached, the run's name."""
    columns = list(dict.fromkeys(name for one in told for name in one))
    header = [*columns, "state", *NUMBERS, "run"]
    return header, [[*(one.get(name) for name in columns), outcome.state, *(getattr(outcome, number) for number in NUMBERS), name] for name, one, outcome in zip(names, told, outcomes, strict=True)]


def as_csv(header: list[str], table: list[list[Any]]) -> str:
    """Whole numbers as they are told; nothing where there is nothing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if cell is None else cell if isinstance(cell, int | float | str) and not isinstance(cell, bool) else brief(cell) for cell in row] for row in table])
    return out.getvalue()


def shown(cell: Any, name: str = "") -> str:
    if cell is None:
        return ""
    return f"{cell:.4f}" if "loss" in name and isinstance(cell, float) else f"{cell:.1f}" if name == "seconds" else brief(cell)


def as_markdown(header: list[str], table: list[list[Any]]) -> str:
    """A table of Markdown, its numbers short."""
    cells = [header, ["---"] * len(header), *([shown(cell, name).replace("|", "\\|").replace("\n", " ") for name, cell in zip(header, row, strict=True)] for row in table)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"


def as_text(header: list[str], table: list[list[Any]]) -> str:
    """The table in columns, for a terminal; columns with nothing in them are left out."""
    cells = [[shown(cell, name) for name, cell in zip(header, row, strict=True)] for row in table]
    kept = [i for i in range(len(header)) if any(row[i] for row in cells)]
    widths = {i: max(len(header[i]), *(len(row[i]) for row in cells)) for i in kept}
    return "\n".join("  ".join(row[i].ljust(widths[i]) for i in kept).rstrip() for row in [header, *cells])
