"""Children without their start: a rehearsal's processes are forks of this one, in which torch is imported already.

`start` replaces common.start_process, through which all benchmarks start their processes, and torch.compile by what
compiles nothing. The commands and what they print stay the same.
"""

import importlib
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks import common
from benchmarks.common import ROOT

PRELOADED = (
    "nanoforge.training.optimizers",
    "nanoforge.posttraining.objectives",
    "nanoforge.models.pretrained",
    "torch._inductor.cpp_builder",  # which train.py asks for a compiler
)


def compile_nothing(function: Callable[..., Any] | None = None, **options: object) -> Any:
    """What torch.compile is in a rehearsal: the function itself, also as a decorator with options."""
    return (lambda decorated: decorated) if function is None else function


class Fork:
    """What common.start_process gives, of a fork."""

    def __init__(self, argv: Sequence[str], cwd: Path, *, own_group: bool):
        read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            os.dup2(write, 1)
            os.dup2(write, 2)
            os.close(write)
            if own_group:
                os.setpgid(0, 0)
            os._exit(run(argv, cwd))
        os.close(write)
        if own_group:
            os.setpgid(self.pid, self.pid)
        self.stdout: IO[str] = os.fdopen(read, errors="replace")

    def __enter__(self) -> "Fork":
        return self

    def __exit__(self, *error: object) -> None:
        self.stdout.close()
        self.wait()

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def run(argv: Sequence[str], cwd: Path) -> int:
    """Run `python SCRIPT ...` or `python -m MODULE ...` in this process; its exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout, sys.stderr = (
        os.fdopen(1, "w", buffering=1, closefd=False),
        os.fdopen(2, "w", buffering=1, closefd=False),
    )
    os.chdir(cwd)
    if cwd != ROOT:
        sys.modules.pop("model", None)  # nanoGPT has one of its own
    start = time.perf_counter()
    code = 0
    try:
        _, first, *rest = argv
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            sys.path[0] = str(Path(first).resolve().parent)
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    print("meter", time.perf_counter() - start, 1, flush=True)
    return code


def start_fork(argv: Sequence[str], cwd: Path = ROOT, *, own_group: bool = False) -> Fork:
    return Fork(argv, cwd, own_group=own_group)


def start() -> None:
    """From here on processes are forks of this one."""
    torch.set_num_threads(1)
    torch.compile = compile_nothing  # type: ignore[assignment]
    for name in PRELOADED:  # none of the root's, whose names nanoGPT's have too
        importlib.import_module(name)
    common.start_process = start_fork  # type: ignore[assignment]
