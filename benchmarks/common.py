"""What all benchmarks share: processes and their peak memory, sides that take turns, and figures of what they measured.

Knows nothing of what is measured. Imports no torch.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "benchmarks" / "scripts"  # run in processes of their own

# A model shape and a batch size, in arguments that both programs have by the same names. With vocab_size it reads token
# ids, else the characters of shakespeare_char.
Case = dict[str, Any]
Measurement = dict[str, Any]  # of one run of one side: ms, seconds, tokens_per_second, peak_mb, ...
Side = Callable[[], Measurement]
Figures = dict[str, Any]  # JSON: what a section writes

# GPT-2's 124.4 M parameters; its 50,257 tokens padded to a multiple of 64, as nanoGPT does.
GPT2: Case = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304}
CASES: dict[str, Case] = {
    "10.6M": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16},
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12},
    "tiny": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 2},
    "124M": {**GPT2, "batch_size": 12},
    "124Mx32": {**GPT2, "batch_size": 32},
    "124Mx64": {**GPT2, "batch_size": 64},
    "shakespeare_char": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "dropout": 0.2},
}
DEFAULT_CASES = {"cpu": ("10.6M", "small"), "cuda": ("124M", "124Mx32", "124Mx64", "shakespeare_char")}


# ---------------------------------------------------------------------------------------------------------------------
# processes


class ProcessResult(NamedTuple):
    """Of a process that ended well."""

    output: str  # stdout and stderr
    seconds: float
    peak_bytes: int  # of the largest process among it and its children
    seconds_to_text: float | None  # until a line of its output held the text that was waited for
    line_seconds: list[float]  # from the start until each line of the output came


def to_flags(**values: object) -> list[str]:
    """to_flags(seed=1) -> ["--seed=1"]"""
    return [f"--{name}={value}" for name, value in values.items()]


def start_process(argv: Sequence[str], cwd: Path = ROOT, *, own_group: bool = False) -> subprocess.Popen[str]:
    """Start a command whose output is read line by line; the last one says its seconds and its peak memory.

    A child's peak memory counts from the fork, when it is as large as its parent. So a small process starts and
    measures it: scripts/meter.py. own_group: it can be ended with all that it starts.
    """
    return subprocess.Popen(
        [sys.executable, "-IS", str(SCRIPTS / "meter.py"), *argv],
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0 if own_group else None,
    )


def share_cores(processes: int) -> None:
    """Give each process that is started from here on its share of the cores."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))


def run_process(argv: Sequence[str], cwd: Path = ROOT, wait_for: str = "") -> ProcessResult:
    """Run a command and measure it. Raises UserError with the last lines of its output if it fails."""
    lines: list[str] = []
    line_seconds: list[float] = []
    seconds_to_text = None
    start = time.perf_counter()
    with start_process(argv, cwd) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            line_seconds.append(time.perf_counter() - start)
            if wait_for and seconds_to_text is None and wait_for in line:
                seconds_to_text = line_seconds[-1]
    output, _, measured = "".join(lines).rpartition("meter ")
    if process.returncode:
        last_lines = "\n".join(output.splitlines()[-8:])
        raise UserError(f"{' '.join(argv[-6:])}: failed\n{last_lines}")
    seconds, max_rss = measured.split()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, else kilobytes
    return ProcessResult(
        output=output,
        seconds=float(seconds),
        peak_bytes=int(max_rss) * unit,
        seconds_to_text=seconds_to_text,
        line_seconds=line_seconds,
    )


def device_file_name(name: str) -> str:
    """A device's name as the name of a file."""
    return re.sub(r"\W+", "_", name.lower())


def describe_setup(script: str) -> dict[str, Any]:
    """The machine's cores, versions, git commit, and the command without the folders of its paths."""
    commit = ""
    if shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    command = [re.sub(r"^(--(peer|data_dir|out|model)=).*/(.)", r"\1\3", arg) for arg in sys.argv[1:]]
    return {
        "cores": cores,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "numpy": importlib.metadata.version("numpy"),
        "commit": commit,
        "command": " ".join([script, *command]),
    }


def resident_mb() -> float:
    """Memory of this process that is in RAM now (on Linux; elsewhere its peak)."""
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"VmRSS:\s+(\d+)", status.read_text())
        assert match is not None
        return int(match[1]) / 1024
    import resource  # here, since Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---------------------------------------------------------------------------------------------------------------------
# sides that take turns, and their figures


def take_turns(rounds: int, sides: dict[str, Side]) -> dict[str, list[Measurement]]:
    """Run each side once a round, in order: ours, peer, ours, peer, ... Prints each measurement."""
    results: dict[str, list[Measurement]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, run_side in sides.items():
            measurement = run_side()
            results[name].append(measurement)
            values = [f"{key} {value:,.4g}" for key, value in measurement.items() if isinstance(value, float)]
            print(f"  {number + 1}/{rounds} {name}: {', '.join(values)}", flush=True)
    return results


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median, maximum and number of some values."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "n": len(values)}


def compare(results: dict[str, list[Measurement]], key: str, *, lower_is_better: bool) -> Figures:
    """Each side's figures of `key`.

    Where there is a peer, each other side also has its ratio to the peer, round by round; above 1 is faster.
    """
    table: Figures = {name: summarize([run[key] for run in runs]) for name, runs in results.items()}
    for name in results:
        if name == "peer" or "peer" not in results:
            continue
        ratios = []
        for ours, peer in zip(results[name], results["peer"], strict=True):
            ratios.append(peer[key] / ours[key] if lower_is_better else ours[key] / peer[key])
        table[name]["ratios"] = [round(ratio, 3) for ratio in ratios]
        table[name]["ratio"] = statistics.median(ratios)
    return table


def print_table(title: str, table: Figures) -> None:
    """One line for each side of a table by `compare`."""
    for name, row in table.items():
        line = f"{title:34} {name:14} {row['median']:12,.4g}  ({row['min']:,.4g} to {row['max']:,.4g})"
        if "ratio" in row:
            line += f"  ratio {row['ratio']:.2f} of {row['ratios']}"
        print(line, flush=True)
