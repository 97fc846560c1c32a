"""Runs commands as processes of this machine, some at a time, each with its share of the GPUs. Knows nothing of what they do.

A command that is stopped (SIGTERM) is expected to save and end. Each is held by a lock that the process inherits: as long as it lives,
whatever becomes of this one, no other launcher begins it.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoforge import run_state

POLL = 0.2  # seconds


@dataclass
class Task:
    """Commands to be run in turn for a folder; which ones, perhaps none, is asked when its lock is held."""

    name: str
    folder: Path
    commands: Callable[[], list[list[str]]]
    environment: dict[str, str] = field(default_factory=dict)
    data: Any = None  # the caller's


def gpus() -> list[str]:
    """The GPUs that may be dealt out, by the names that CUDA_VISIBLE_DEVICES takes."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    told = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return told.stdout.split() if told.returncode == 0 else []


def deal(names: list[str], jobs: int, each: int) -> list[list[str]]:
    """The GPUs of each of `jobs` places, `each` a place; where there are fewer, places share them in turn."""
    return [
        [names[(place * each + i) % len(names)] for i in range(min(each, len(names)))] if names else []
        for place in range(jobs)
    ]


def take(folder: Path) -> int | None:
    """The run's lock as a file descriptor that a child may inherit, or None when another process holds it."""
    handle = os.open(folder / run_state.SWEEP_LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(10):  # somebody may just be looking
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            time.sleep(0.1)
    os.close(handle)
    return None


class Attempt:
    """One task being run in one place."""

    def __init__(self, task: Task, devices: list[str], threads: int):
        self.task, self.status, self.stopped, self.given_up, self.began = task, None, False, False, time.monotonic()
        self.environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **task.environment}
        if devices:
            self.environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        task.folder.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen | None = None
        self.lock = take(task.folder)
        self.elsewhere = self.lock is None
        self.left = [] if self.elsewhere else task.commands()
        if self.left:
            (task.folder / run_state.STATUS_FILE).unlink(missing_ok=True)
            self.begin()
        else:
            self.release()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def begin(self) -> None:
        """Start the next command."""
        words = self.left.pop(0)
        with (self.task.folder / run_state.LOG_FILE).open("a", encoding="utf-8") as log:
            print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {subprocess.list2cmdline(words)}", file=log, flush=True)
            self.process = subprocess.Popen(
                words, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=(self.lock,),  # a terminal's Ctrl-C is for this process, which passes it on once
            )  # fmt: skip

    def over(self) -> bool:
        """Whether all commands have ended, or one failed."""
        if self.process is None:
            return True
        if self.process.poll() is None:
            return False
        self.status = self.process.returncode
        if self.status == 0 and self.left and not self.stopped:
            self.begin()
            return False
        (self.task.folder / run_state.STATUS_FILE).write_text(f"{self.status}\n")
        self.release()
        return True

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Have the command save and end, or with SIGKILL end at once, with its children."""
        self.stopped = True
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number) if number == signal.SIGKILL else self.process.send_signal(number)

    def release(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock, self.process = None, None


def run(
    draw: Callable[[], Task | None],
    places: list[list[str]],
    threads: int,
    started: Callable[[Task], None],
    ended: Callable[[Attempt], None],
    watch: Callable[[Attempt], bool] = lambda attempt: False,
) -> int:
    """Run the tasks that `draw` gives, one in each place at a time, until it gives none. `watch`, called now and then, says whether an attempt
    is given up. Returns 0, or the number of the signal that ended it: a first one has the commands save and end, a second one ends them at once."""
    attempts: dict[int, Attempt] = {}
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: caught.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    told, exhausted = 0, False
    try:
        while True:
            for place, attempt in list(attempts.items()):
                if attempt.over():
                    del attempts[place]
                    ended(attempt)
                elif not attempt.stopped and watch(attempt):
                    attempt.given_up = True
                    attempt.stop()
            for place in range(len(places)):
                while not (caught or exhausted or place in attempts):
                    task = draw()
                    exhausted = task is None
                    if task is not None:
                        attempt = Attempt(task, places[place], threads)
                        if attempt.process is None:
                            ended(attempt)
                            continue
                        attempts[place] = attempt
                        started(task)
            for _ in caught[told:]:
                for attempt in attempts.values():
                    attempt.stop(signal.SIGTERM if told == 0 else signal.SIGKILL)
                told += 1
            if not attempts and (caught or exhausted):
                return caught[0] if caught else 0
            time.sleep(POLL)
    finally:
        for attempt in attempts.values():  # an error of ours
            attempt.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
