"""What the files in a run's folder say about the run: its state, its results, the lines of its metrics. Starts nothing.

Besides what train.py writes (run_dir.py), whoever started the run keeps in its folder:

    run.json       its arguments: a config for train.py
    log.txt        the console output of all attempts
    exit_status    of the last attempt; absent while one is running
    .sweep.lock    held by the process that runs an attempt (flock)
    pruned         exists once a search has stopped the run for good

Imports no torch.
"""

import json
import os
import signal
from pathlib import Path
from typing import NamedTuple

from nanoforge.console import plural
from nanoforge.files import lock_file
from nanoforge.run_dir import METRICS_FILE, TRAIN_LOCK_FILE

CONFIG_FILE = "run.json"
LOG_FILE = "log.txt"
STATUS_FILE = "exit_status"
SWEEP_LOCK_FILE = ".sweep.lock"
PRUNED_FILE = "pruned"

FINISHED = ("done", "pruned", "diverged")  # states in which nothing is left to do
NEEDS_WORK = ("new", "stopped", "failed")  # states in which something is left to do and no process does it
# Signals that ask a run to save and end: of users, schedulers (SIGUSR2: SGE, submitit), a terminal that closes
# (SIGHUP; SIGBREAK on Windows) and a limit of CPU time (SIGXCPU). Windows has few of them.
STOP_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOP_SIGNALS = tuple(signal.Signals[name] for name in STOP_NAMES if hasattr(signal, name))
STOP_STATUSES: dict[int | None, str] = {128 + stop: stop.name for stop in STOP_SIGNALS}

MAX_STEP = 2**53  # a float still holds every integer up to here
LOG_TAIL_BYTES = 20_000


def stop_signals() -> list[signal.Signals]:
    """STOP_SIGNALS, without the SIGHUP that a process under nohup ignores."""
    hang_up = getattr(signal, "SIGHUP", None)
    return [stop for stop in STOP_SIGNALS if stop != hang_up or signal.getsignal(stop) != signal.SIG_IGN]


# ---------------------------------------------------------------------------------------------------------------------
# files of the folder


class MetricsLines:
    """The lines of a metrics.jsonl as they are read, with what a resumed run logged again replaced."""

    def __init__(self) -> None:
        self.lines: list[dict] = []
        self.n_broken = 0
        self.n_replaced = 0
        self.last_step = 0

    def add(self, text: str) -> bool:
        """Append a line; False where it is not a line of metrics."""
        try:
            line = json.loads(text)
            step, event = line["step"], line["event"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        if not isinstance(event, str) or not isinstance(step, int) or isinstance(step, bool) or abs(step) > MAX_STEP:
            return False
        if event in ("train", "eval"):  # a save is logged when it is over, which may be some steps later
            if step < self.last_step:
                self.drop_from(step, event)
            self.last_step = step
        self.lines.append(line)
        return True

    def drop_from(self, step: int, event: str) -> None:
        """Forget training and evaluation lines from a step on: a run was resumed there without trimming its file."""
        kept = [
            line
            for line in self.lines
            if line["event"] not in ("train", "eval")
            or line["step"] < step
            or (line["step"] == step and line["event"] != event)
        ]
        self.n_replaced += len(self.lines) - len(kept)
        self.lines = kept


def read_metrics(path: Path, warnings: list[str]) -> list[dict]:
    """The valid lines of a metrics.jsonl; of steps that were logged twice, the later lines. Appends to `warnings`."""
    try:
        texts = path.read_bytes().decode("utf-8", "replace").split("\n")
    except FileNotFoundError:
        warnings.append(f"no {METRICS_FILE}")
        return []
    except OSError as error:
        warnings.append(f"{METRICS_FILE} can't be read ({error.strerror})")
        return []
    metrics = MetricsLines()
    for text in texts[:-1]:
        if text and not metrics.add(text):
            metrics.n_broken += 1
    if texts[-1] and not metrics.add(texts[-1]):
        warnings.append("its last line is incomplete")
    if metrics.n_broken:
        warnings.append(f"{plural(metrics.n_broken, 'broken line')} in {METRICS_FILE} ignored")
    if metrics.n_replaced:
        lines = plural(metrics.n_replaced, "earlier line")
        warnings.append(f"steps go back in {METRICS_FILE}: {lines} ignored")
    return metrics.lines


def log_tail(folder: Path, count: int = 5) -> list[str]:
    """The last lines of the run's console log, blank ones left out."""
    return tail(folder / LOG_FILE, count)


def tail(path: Path, count: int = 5) -> list[str]:
    """The last lines of a file, blank ones left out; none where it can't be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return lines[-count:]


def read_exit_status(folder: Path) -> int | None:
    """The exit status of the last attempt, or None."""
    try:
        return int((folder / STATUS_FILE).read_text())
    except (OSError, ValueError):
        return None


def read_scores(folder: Path) -> tuple[tuple[str, float], ...]:
    """Accuracies that evaluate.py wrote to evaluation*.json: accuracy/TASK if greedy, else accuracy/TASK/DECODE; of
    lm-eval's tasks those with an acc."""
    scores: dict[str, float] = {}
    for path in sorted(folder.glob("evaluation*.json")):
        try:
            evaluation = json.loads(path.read_text(encoding="utf-8"))
            suffix = "" if evaluation["decode"] == "greedy" else f"/{evaluation['decode']}"
            accuracies = {
                f"accuracy/{Path(task).name}{suffix}": float(values["accuracy"]["value"])
                for task, values in evaluation["tasks"].items()
            }
            for task, values in evaluation.get("lm_eval", {}).get("results", {}).items():
                if "acc,none" in values:
                    accuracies[f"accuracy/{task}"] = float(values["acc,none"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # incomplete, or another program's file
        scores |= accuracies
    return tuple(scores.items())


def has_checkpoint(folder: Path) -> bool:
    """Whether the run can be resumed."""
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())


def is_locked(path: Path) -> bool:
    """Whether a process on this machine holds a lock file.

    To find out, the lock is held in shared mode for an instant; those who acquire it try more than once.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not lock_file(handle, shared=True)
    finally:
        os.close(handle)


def is_running(folder: Path) -> bool:
    """Whether a process trains in the folder, or is about to."""
    return is_locked(folder / TRAIN_LOCK_FILE) or is_locked(folder / SWEEP_LOCK_FILE)


# ---------------------------------------------------------------------------------------------------------------------
# the status of a run


class RunStatus(NamedTuple):
    """The state of a run and its results.

    It is new, running, done, pruned (by a search), diverged (its loss or weights are not finite; it would be again),
    stopped, failed, or a queue's own state.
    """

    state: str
    reason: str = ""
    step: int | None = None
    loss: float | None = None  # of the last training step logged
    val_loss: float | None = None  # of the last evaluation
    best_val_loss: float | None = None
    reward: float | None = None  # as loss, of a run that learns from rewards
    val_reward: float | None = None
    best_val_reward: float | None = None
    best_step: int | None = None
    seconds: float | None = None
    evaluations: tuple[tuple[int, float], ...] = ()  # (step, val_loss)
    scores: tuple[tuple[str, float], ...] = ()  # (name, accuracy), by evaluate.py
    is_trained: bool = False  # training is finished; evaluations that follow it may still fail


def last_note(lines: list[dict]) -> str:
    """The note that ends a metrics.jsonl: a run that ends by itself says why. Empty where the last line is no note."""
    if not lines or lines[-1]["event"] != "note":
        return ""
    return str(lines[-1].get("text", ""))


def describe_status(status: int) -> str:
    """An exit status, which a shell gives as 128 + the signal and Python as the signal with a minus."""
    number = -status if status < 0 else status - 128
    if number not in list(signal.Signals):
        return f"status {status}"
    return f"killed by {signal.Signals(number).name}"


def state_and_reason(folder: Path, lines: list[dict], *, running: bool | None = None) -> tuple[str, str]:
    """(state, reason) of a run, from its folder and its metrics.jsonl's lines. running: None looks at the locks."""
    if running is None:
        running = is_running(folder)
    if running:
        return "running", ""
    if (folder / PRUNED_FILE).exists():
        return "pruned", ""
    note, status = last_note(lines), read_exit_status(folder)
    if note.startswith("finished") and not status:
        return "done", note
    if note.startswith("stopped by"):
        return "stopped", note.partition(";")[0]
    if note.startswith(("diverged: ", "failed: ")) and status in (None, 1, 2):
        state, _, reason = note.partition(": ")
        return state, reason
    if status in STOP_STATUSES:
        return "stopped", note.partition(";")[0] or f"stopped by {STOP_STATUSES[status]}"
    if status is not None:
        reason = describe_status(status)
        return "failed", f"{reason} after its training" if note.startswith("finished") else reason
    if lines or (folder / LOG_FILE).exists():
        return "stopped", "ended without an exit status (killed or crashed)"
    return "new", ""


def first_compared_step(lines: list[dict]) -> int:
    """The step after which val_loss is measured as at the end: evaluations until then are compared with none later.

    Before any step there are the initial weights, which are no result.
    """
    steps = [line.get("compare_val_loss_after") for line in lines if line["event"] == "note"]
    return max((step for step in steps if isinstance(step, int)), default=0)


def run_status(folder: Path, *, running: bool | None = None) -> RunStatus:
    """The status of the run in a folder. running: None looks at the locks."""
    lines = read_metrics(folder / METRICS_FILE, warnings=[])
    train = [line for line in lines if line["event"] == "train"]
    evaluations = [
        (line["step"], line["val_loss"])
        for line in lines
        if line["event"] == "eval" and line.get("val_loss") is not None
    ]
    first_step = first_compared_step(lines)
    trained = [(loss, step) for step, loss in evaluations if step > first_step]
    rewards = [(line["step"], line["val_reward"]) for line in lines if line["event"] == "eval" and "val_reward" in line]
    best_val_loss, best_step = min(trained, default=(None, None))
    state, reason = state_and_reason(folder, lines, running=running)
    return RunStatus(
        state=state,
        reason=reason,
        step=max((line["step"] for line in lines), default=None),
        loss=train[-1].get("loss") if train else None,
        val_loss=evaluations[-1][1] if evaluations else None,
        best_val_loss=best_val_loss,
        reward=train[-1].get("reward") if train else None,
        val_reward=rewards[-1][1] if rewards else None,
        best_val_reward=max((reward for step, reward in rewards if step and reward is not None), default=None),
        best_step=best_step,
        seconds=lines[-1].get("seconds") if lines else None,
        evaluations=tuple(evaluations),
        scores=read_scores(folder),
        is_trained=last_note(lines).startswith("finished"),
    )
