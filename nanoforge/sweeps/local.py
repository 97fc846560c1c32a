"""Runs commands as processes on this machine, several at a time, each with its share of the GPUs.

A command that gets SIGTERM is expected to save and exit. Each task is protected by a lock that its process inherits:
while that process lives, even if this one is gone, no other launcher starts the task. Knows nothing of what they do.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from nanoforge import run_state
from nanoforge.console import print_to_stderr
from nanoforge.files import lock_file

POLL_SECONDS = 0.2
REPEAT_SECONDS = 0.5  # within which a signal is the same request: a terminal that closes sends two

Command = list[str]


@dataclass
class Task:
    """Commands to run one after the other for a folder."""

    name: str
    folder: Path
    commands: Callable[[], list[Command]]  # called with the folder's lock held; may return none
    environment: dict[str, str] = field(default_factory=dict)
    data: Any = None  # the caller's


# ---------------------------------------------------------------------------------------------------------------------
# GPUs and locks


def visible_gpus() -> list[str]:
    """The GPUs that may be assigned, by the names that CUDA_VISIBLE_DEVICES takes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return [name for name in names if name and name != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    return result.stdout.split() if result.returncode == 0 else []


def assign_gpus(gpus: list[str], n_slots: int, gpus_per_slot: int) -> list[list[str]]:
    """The GPUs of each slot; slots take turns where there are fewer GPUs than they need.

    >>> assign_gpus(["0", "1", "2", "3"], n_slots=2, gpus_per_slot=2)
    [['0', '1'], ['2', '3']]
    """
    if not gpus:
        return [[] for _ in range(n_slots)]
    size = min(gpus_per_slot, len(gpus))
    return [[gpus[(slot * gpus_per_slot + i) % len(gpus)] for i in range(size)] for slot in range(n_slots)]


@dataclass(frozen=True)
class Slots:
    """Where tasks run at the same time, one in each slot."""

    gpus: list[list[str]]  # of each slot; all empty without GPUs
    threads: int  # OMP_NUM_THREADS of each task

    @property
    def processes_per_task(self) -> int:
        return len(self.gpus[0]) or 1


def gpu_slots(jobs: int, gpus_per_run: int) -> Slots:
    """`jobs` slots on this machine; with 0 as many as its GPUs suffice for, or one without GPUs."""
    gpus = visible_gpus()
    n_slots = jobs or max(1, len(gpus) // gpus_per_run)
    return Slots(assign_gpus(gpus, n_slots, gpus_per_run), threads=max(1, (os.cpu_count() or 1) // n_slots))


def acquire_lock(folder: Path) -> int | None:
    """The folder's lock as a file descriptor that a child may inherit, or None if another process holds it."""
    descriptor = os.open(folder / run_state.SWEEP_LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    if lock_file(descriptor):
        return descriptor
    os.close(descriptor)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# one task


class Attempt:
    """One task in one slot: its commands, as processes, until all have ended or one has failed."""

    def __init__(self, task: Task, gpus: list[str], threads: int):
        self.task = task
        self.exit_status: int | None = None  # of the last command
        self.stopped = False
        self.pruned = False
        self.start_time = time.monotonic()
        self.environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **task.environment}
        if gpus:
            self.environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        self.process: subprocess.Popen | None = None
        self.remaining: list[Command] = []
        self.lock: int | None = None
        self.locked_elsewhere = False
        try:
            self.start()
        except OSError as error:  # a full disk, or a folder that can't be written
            print_to_stderr(f"{task.folder}: could not be started ({error})")
        if self.process is None:
            self.release_lock()

    def start(self) -> None:
        """Start the first command, unless another process runs this task or nothing is left to do."""
        self.task.folder.mkdir(parents=True, exist_ok=True)
        self.lock = acquire_lock(self.task.folder)
        self.locked_elsewhere = self.lock is None
        if not self.locked_elsewhere:
            self.remaining = self.task.commands()
        if self.remaining:
            (self.task.folder / run_state.STATUS_FILE).unlink(missing_ok=True)
            self.start_next()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start_time

    def start_next(self) -> None:
        """Start the next command, in a session of its own: Ctrl-C reaches only this process, which passes it on."""
        assert self.lock is not None
        command = self.remaining.pop(0)
        if hasattr(os, "killpg"):
            options: dict[str, Any] = {"start_new_session": True, "pass_fds": (self.lock,)}
        else:  # Windows
            options = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        with (self.task.folder / run_state.LOG_FILE).open("ab", buffering=0) as log:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            with contextlib.suppress(OSError):
                log.write(f"--- {now} {subprocess.list2cmdline(command)}\n".encode())
            self.process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **options,
            )

    def poll(self) -> bool:
        """Start the next command if one has succeeded; whether the attempt has ended."""
        if self.process is None:
            return True
        if self.process.poll() is None:
            return False
        self.exit_status = self.process.returncode
        if self.exit_status == 0 and self.remaining and not self.stopped:
            self.start_next()
            return False
        with contextlib.suppress(OSError):  # a full disk
            (self.task.folder / run_state.STATUS_FILE).write_text(f"{self.exit_status}\n")
        self.release_lock()
        return True

    def stop(self) -> None:
        """Have the command save and exit."""
        self.stopped = True
        if self.is_alive():
            assert self.process is not None
            self.process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))  # the former on Windows

    def kill(self) -> None:
        """End the command and its children at once."""
        self.stopped = True
        if self.is_alive():
            assert self.process is not None
            if not hasattr(os, "killpg"):  # Windows
                self.process.kill()
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def release_lock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None
            self.process = None


# ---------------------------------------------------------------------------------------------------------------------
# all tasks


class Signals:
    """Within a `with`, collects STOP_SIGNALS instead of being ended by them."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.last_time = 0.0
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in run_state.stop_signals():
            self.handlers[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received or time.monotonic() - self.last_time > REPEAT_SECONDS:
            self.received.append(number)
            self.last_time = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Callbacks:
    """What a pool asks and reports."""

    next_task: Callable[[], Task | None]  # None: no more tasks
    on_start: Callable[[Task], None]
    on_end: Callable[[Attempt], None]
    should_prune: Callable[[Attempt], bool] = lambda attempt: False  # asked of each running attempt at every poll


class Pool:
    """Attempts at tasks, at most one in each slot at a time."""

    def __init__(self, slots: Slots, callbacks: Callbacks):
        self.slots = slots
        self.callbacks = callbacks
        self.attempts: dict[int, Attempt] = {}  # by slot
        self.exhausted = False  # next_task has no more

    def collect(self) -> None:
        """Report the attempts that have ended, and stop those that are to be pruned."""
        for slot, attempt in list(self.attempts.items()):
            if attempt.poll():
                del self.attempts[slot]
                self.callbacks.on_end(attempt)
            elif not attempt.stopped and self.callbacks.should_prune(attempt):
                attempt.pruned = True
                attempt.stop()

    def fill(self, signals: Signals) -> None:
        """Start tasks in the free slots, unless a signal arrives."""
        for slot, gpus in enumerate(self.slots.gpus):
            while slot not in self.attempts and not self.exhausted and not signals.received:
                self.start_next_task(slot, gpus)

    def start_next_task(self, slot: int, gpus: list[str]) -> None:
        """Start the next task in a slot; one with nothing left to run ends at once and leaves the slot free."""
        task = self.callbacks.next_task()
        if task is None:
            self.exhausted = True
            return
        attempt = Attempt(task, gpus, self.slots.threads)
        if attempt.process is None:
            self.callbacks.on_end(attempt)
            return
        self.attempts[slot] = attempt
        self.callbacks.on_start(task)

    def stop(self) -> None:
        for attempt in self.attempts.values():
            attempt.stop()

    def kill(self) -> None:
        for attempt in self.attempts.values():
            attempt.kill()


def run_tasks(slots: Slots, callbacks: Callbacks) -> int:
    """Run tasks, one in each slot at a time, until there are no more.

    The first of STOP_SIGNALS has the commands save and exit; the second ends them at once. Returns 0, or the number of
    the first signal.
    """
    pool = Pool(slots, callbacks)
    n_handled = 0  # signals
    with Signals() as signals:
        try:
            while True:
                pool.collect()
                pool.fill(signals)
                for _ in signals.received[n_handled:]:
                    if n_handled == 0:
                        pool.stop()
                    else:
                        pool.kill()
                    n_handled += 1
                if not pool.attempts and (signals.received or pool.exhausted):
                    return signals.received[0] if signals.received else 0
                time.sleep(POLL_SECONDS)
        finally:
            pool.stop()  # after an error in this process: none is left here otherwise
