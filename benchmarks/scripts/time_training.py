"""Train with one of the two programs and nothing else: whoever reads the lines takes the time between two of them.

    python time_training.py ours [--profile=TRACE] [--one_rank] [--recompiles] FLAG ...
    python time_training.py nanogpt FOLDER FLAG ...

Ours is train.py without its evaluations and checkpoints; nanoGPT's train.py is unmodified, its flags say the same.
--profile: of five steps, the time of each kernel, and a trace. --one_rank: in a process group of this rank alone, under
which FSDP2 shards what it otherwise leaves whole. --recompiles: torch prints each. The last lines are JSON.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from nanoforge.device import best_device_type, peak_memory_mb

PROFILED = range(20, 25)  # steps, once everything is compiled
N_KERNELS = 40


class StepProfiler:
    """Counts steps, and profiles those of PROFILED."""

    def __init__(self, trace: str):
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities)
        self.trace = trace
        self.steps = 0

    def advance(self) -> None:
        self.steps += 1
        if self.steps == PROFILED.start:
            self.wait()
            self.profiler.start()
        elif self.steps == PROFILED.stop:
            self.wait()
            self.profiler.stop()
            self.profiler.export_chrome_trace(self.trace)
            print("json", json.dumps(self.table()), flush=True)

    def wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def table(self) -> dict[str, Any]:
        """The kernels of a step by their time, the longest first; without a GPU the operations."""
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        events = sorted(self.profiler.key_averages(), key=lambda event: -getattr(event, key))
        rows = []
        for event in events[:N_KERNELS]:
            ms = getattr(event, key) / 1e3 / len(PROFILED)
            rows.append({"name": event.key[:120], "ms": round(ms, 4), "calls": event.count / len(PROFILED)})
        total = sum(getattr(event, key) for event in events) / 1e3 / len(PROFILED)
        return {"kernels": rows, "ms_of_all": total}


def train_ours(flags: list[str], trace: str) -> None:
    import train
    import train_args
    from nanoforge.training.logger import RunLogger
    from nanoforge.training.signals import Signals
    from run import Run

    args = train_args.parse(flags)

    def skip(run: Run, logger: RunLogger, signals: Signals, *, is_last: bool) -> None:
        run.progress.evaluated_at = run.progress.step

    train.evaluate_and_save = skip
    if trace:
        profiler = StepProfiler(trace)
        advance = RunLogger.advance

        def advance_and_profile(logger: RunLogger) -> None:
            advance(logger)
            profiler.advance()

        RunLogger.advance = advance_and_profile  # type: ignore[method-assign, assignment]
    train.main(args)


def train_nanogpt(folder: str, flags: list[str]) -> None:
    os.chdir(folder)
    sys.path[0] = folder
    sys.argv = ["train.py", *flags]
    runpy.run_path("train.py", run_name="__main__")


def main() -> None:
    program, *arguments = sys.argv[1:]
    if program == "nanogpt":
        train_nanogpt(arguments[0], arguments[1:])
    else:
        if "--one_rank" in arguments:
            arguments.remove("--one_rank")
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if "--recompiles" in arguments:
            arguments.remove("--recompiles")
            torch._logging.set_logs(recompiles=True)
        traces = [argument.partition("=")[2] for argument in arguments if argument.startswith("--profile=")]
        flags = [argument for argument in arguments if not argument.startswith("--profile=")]
        train_ours(flags, traces[0] if traces else "")
    peak = peak_memory_mb(torch.device(best_device_type()))
    print("json", json.dumps({"peak_memory_mb": peak and round(peak)}), flush=True)


if __name__ == "__main__":
    main()
