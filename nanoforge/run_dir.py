"""What the folders of runs tell: their states, their numbers, and tables of them. Starts nothing.

A run's folder has, besides what train.py writes, of whoever started it:

    run.json       its arguments: a config for train.py
    log.txt        what it printed, all attempts
    exit_status    of the last attempt; absent while one is made
    .sweep.lock    held by whoever makes an attempt (flock)
    pruned         by a search that gave it up
"""

import fcntl
import json
import os
import platform
import shutil
import signal
import tempfile
from pathlib import Path
from typing import NamedTuple

from nanoforge.errors import UserError

METRICS, TRAINING = "metrics.jsonl", ".lock"  # train.py's own
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
    scores: tuple[tuple[str, float], ...] = ()  # accuracies on tasks, by evaluate.py
    trained: bool = False  # to the end; what follows may still fail


def read_lines(path: Path, remarks: list[str]) -> list[dict]:
    """The whole lines of a metrics.jsonl, later tellings of a step in place of earlier ones."""
    try:
        words = path.read_bytes().decode("utf-8", "replace").split("\n")
    except OSError as error:
        remarks.append(
            f"no {METRICS}" if isinstance(error, FileNotFoundError) else f"{METRICS} can't be read ({error.strerror})"
        )
        return []
    told: list[dict] = []
    broken = again = reached = 0
    for i, word in enumerate(words):
        try:
            line = json.loads(word) if word else None
            if line is None:
                continue
            step, event = line["step"], line["event"]
            if not isinstance(event, str) or not isinstance(step, int) or isinstance(step, bool) or abs(step) > 2**53:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            broken += i < len(words) - 1
            if i == len(words) - 1:
                remarks.append("its last line is broken off")
            continue
        if event in ("train", "eval"):  # of saves is told when they are over
            if step < reached:  # taken up at an earlier step, without clearing what follows it
                kept = [
                    other
                    for other in told
                    if other["step"] < step
                    or (other["step"] == step and other["event"] != event)
                    or other["event"] not in ("train", "eval")
                ]
                told, again = kept, again + len(told) - len(kept)
            reached = step
        told.append(line)
    if broken:
        remarks.append(f"{broken} broken line{'s' * (broken > 1)} in {METRICS}, left out")
    if again:
        remarks.append(f"steps go back in {METRICS}: {again} earlier line{'s' * (again > 1)} left out")
    return told


def locked(path: Path) -> bool:
    """Whether a process here holds a lock. It asks for an instant's share of it: whoever wants the lock tries again a little later."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without locks
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


def going(folder: Path) -> bool:
    """Whether a process trains in the folder, or is starting to."""
    return locked(folder / TRAINING) or locked(folder / LOCK)


def ending(lines: list[dict]) -> str:
    """The note with which a run that could end by itself ended; empty where its last line is no note."""
    return str(lines[-1].get("text", "")) if lines and lines[-1]["event"] == "note" else ""


def state(folder: Path, lines: list[dict], running: bool | None = None) -> tuple[str, str]:
    """(state, why) of a run from its folder and the lines of its metrics.jsonl; `running` where that is known otherwise than from its locks."""
    last = ending(lines)
    try:
        status = int((folder / STATUS).read_text())
    except (OSError, ValueError):
        status = None
    if going(folder) if running is None else running:
        return "running", ""
    if (folder / PRUNED).exists():
        return "pruned", ""
    if last.startswith("finished") and not status:
        return "done", last
    if last.startswith("stopped by") or status in STOPS:
        return "stopped", last.partition(";")[0] or f"stopped by {signal.Signals(STOPS[status]).name}"
    if status is not None:
        return "failed", (f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}") + (
            " after its training" if last.startswith("finished") else ""
        )
    return ("stopped", "its end was not told: killed or failed") if lines or (folder / LOG).exists() else ("new", "")


def scores(folder: Path) -> tuple[tuple[str, float], ...]:
    """The accuracies in what evaluate.py left there: accuracy/TASK of the likeliest answers, accuracy/TASK/DECODE of drawn ones."""
    told = {}
    for path in sorted(folder.glob("evaluation*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            way = "" if found["decode"] == "greedy" else f"/{found['decode']}"
            told |= {
                f"accuracy/{Path(task).name}{way}": float(values["accuracy"]["value"])
                for task, values in found["tasks"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # being written, or another program's
    return tuple(told.items())


def read(folder: Path, running: bool | None = None) -> Outcome:
    """The outcome that a run's folder tells; `running` where that is known otherwise than from its lock."""
    told = read_lines(folder / METRICS, [])
    train, evals = ([line for line in told if line["event"] == event] for event in ("train", "eval"))
    evaluations = tuple((line["step"], line["val_loss"]) for line in evals if line.get("val_loss") is not None)
    best = min(((loss, step) for step, loss in evaluations if step), default=(None, None))  # of what was learned
    reached = {
        "step": max((line["step"] for line in told), default=None), "loss": train[-1].get("loss") if train else None, "val_loss": evaluations[-1][1] if evaluations else None,
        "best_val_loss": best[0], "best_step": best[1], "seconds": told[-1].get("seconds") if told else None, "evaluations": evaluations,
    }  # fmt: skip
    return Outcome(
        *state(folder, told, running), **reached, trained=ending(told).startswith("finished"), scores=scores(folder)
    )


# ---------------------------------------------------------------------------------------------------------------------
# the folder of a run that begins


def best_step(out_dir: Path) -> int | None:
    """The step that best.json names, or None."""
    try:
        return int(json.loads((out_dir / "best.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class RunLock:
    """Held by the process that trains in a folder, and gone with that process however it ends (flock(2))."""

    def __init__(self, out_dir: Path):
        self.path, self.file = out_dir / ".lock", None

    def take(self) -> None:
        """Raises UserError when another process has it."""
        if self.file is not None:
            return
        file = self.path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            who = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{self.path.parent}: {who} is training there; wait for it or take another --out_dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        self.file = file

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        if self.file is not None:
            self.file.close()


RUN_FILES = (
    "train_config.json",
    "metrics.jsonl",
    "tokenizer.json",
    "best.json",
    "loss.png",
    "wandb_id",
    "checkpoints",
    "tensorboard",
)


def existing_run_files(out_dir: Path) -> list[Path]:
    """What a folder holds of a run."""
    return [out_dir / name for name in RUN_FILES if (out_dir / name).exists()]


def refuse_existing_run(out_dir: Path) -> None:
    """Raises UserError when the folder holds a run."""
    if found := existing_run_files(out_dir):
        raise UserError(
            f"{out_dir}: already holds a run ({found[0].name}); continue it with --init_from=resume, replace it with --overwrite, or take another --out_dir"
        )


def prepare_out_dir(out_dir: Path, lock: RunLock) -> None:
    """Make the folder of a new run, or empty it of an old one. Raises UserError when it can't be written or another process trains there."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass  # it can be written to
        lock.take()
        for path in existing_run_files(out_dir):
            remove(path)
    except OSError as error:
        raise UserError(f"--out_dir={out_dir}: can't be written ({error.strerror})") from None


def remove(path: Path) -> None:
    """Delete a file or a folder; a link to a folder stays, and what is in there goes."""
    if path.is_symlink() and path.is_dir():
        for inner in path.iterdir():
            remove(inner)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
