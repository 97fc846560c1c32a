"""A run of bench.py: its arguments, the device, the two programs that are compared, and the file of results."""

import itertools
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.common import (
    ROOT,
    SCRIPTS,
    Case,
    Figures,
    Measurement,
    ProcessResult,
    describe_setup,
    device_file_name,
    run_process,
    to_flags,
)
from benchmarks.datasets import write_random_dataset
from nanoforge.device import get_device
from nanoforge.errors import UserError
from nanoforge.files import write_json

if TYPE_CHECKING:
    from bench import BenchArgs

UNMEASURED_STEPS = 5  # the first steps of a training run warm up
GPU_LOG_INTERVAL = 10  # steps that are timed together: each line that is printed waits for the GPU
RANDOM_TOKENS = 10**7  # of the dataset of a case with a vocabulary


def get_device_name(device: torch.device) -> str:
    """cpu, or the GPU's name as a file name."""
    if device.type == "cpu":
        return "cpu"
    return device_file_name(torch.cuda.get_device_name(device))


def median_step_ms(step_ms: list[float], steps: int, log_interval: int) -> float:
    """The median ms a step of a run, from the mean of each stretch between two lines. Raises UserError without any.

    step_ms: without that of a first line of one step. What warms up is left out.
    """
    measured = step_ms[min(UNMEASURED_STEPS, steps // 2) :] if log_interval == 1 else step_ms[1:]
    if not measured:
        raise UserError(
            f"--steps={steps}: must be at least {2 * log_interval}, of which the first {log_interval} warm up"
        )
    return statistics.median(measured)


class Session:
    """What the sections share."""

    def __init__(self, args: "BenchArgs", folder: Path):
        """folder: for temporary files. Raises UserError when the peer's dataset is missing."""
        self.args = args
        self.folder = folder
        self.device = get_device(args.device)
        self.on_cpu = self.device.type == "cpu"
        self.nanogpt = Path(args.peer).resolve() if args.peer else None
        default_data_dir = (self.nanogpt or ROOT) / "data"
        self.data_dir = Path(args.data_dir or default_data_dir).resolve()
        if self.nanogpt is not None and not (self.data_dir / "shakespeare_char" / "meta.pkl").exists():
            script = self.nanogpt / "data/shakespeare_char/prepare.py"
            raise UserError(f"--peer={args.peer}: its dataset is not prepared; run python {script}")
        self.device_name = get_device_name(self.device)
        self.results_path = Path(args.out) / f"{self.device_name}.json"
        self.log_interval = 1 if self.on_cpu else GPU_LOG_INTERVAL
        self.results: Figures = {}
        if self.results_path.exists():
            self.results = json.loads(self.results_path.read_text())

    def new_folder(self) -> Path:
        """An empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    # -- results

    def write(self, section: str, figures: Iterable[tuple[str, Figures]]) -> None:
        """Put a section into the file of results, beside the others: each figure as soon as it is there."""
        key = section if self.args.peer_kind == "nanogpt" else f"{section} ({self.args.peer_kind})"
        self.results_path.parent.mkdir(parents=True, exist_ok=True)
        written: Figures = {"about": describe_setup("bench.py")}
        for name, figure in figures:
            written[name] = figure
            self.results = {"device": self.device_name, **self.results, key: written}
            write_json(self.results_path, self.results)

    # -- training with either program

    def find_dataset(self, case: Case) -> Path:
        """The folder of a case's dataset: shakespeare_char, or random tokens, which are made when first needed.

        nanoGPT takes a path as well as a name. Without a meta.pkl it makes GPT-2's 50,304 rows.
        """
        if "vocab_size" not in case:
            return self.data_dir / "shakespeare_char"
        folder = self.folder / "data" / "random"
        if not folder.exists():
            write_random_dataset(folder, RANDOM_TOKENS)
        return folder

    def train_ours(self, case: Case, dtype: str, steps: int, **more: object) -> Measurement:
        """Train with this program's train.py: ms a step, tokens a second, peak MB, and the run's folder."""
        out_dir, dataset = self.new_folder(), self.find_dataset(case)
        flags = {
            "bias": False,
            "dataset": dataset.name,
            "data_dir": dataset.parent,
            "device": self.device.type,
            "compile": not self.on_cpu,
            "max_iters": steps,
            "eval_interval": 10**6,
            "eval_iters": 1,
            "log_interval": self.log_interval,
            "out_dir": out_dir,
            "dtype": dtype,
        }
        result = run_process([sys.executable, str(ROOT / "train.py"), *to_flags(**flags | case | more)])
        lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
        step_ms = [line["step_ms"] for line in lines if line["event"] == "train"]
        if self.log_interval > 1:
            step_ms = step_ms[1:]  # the first step has a line of its own
        ms = median_step_ms(step_ms, steps, self.log_interval)
        return training_measurement(case, ms, result.peak_bytes, out_dir)

    def train_nanogpt(self, case: Case, steps: int, **more: object) -> Measurement:
        """Train with nanoGPT's train.py: the same measurements."""
        assert self.nanogpt is not None
        out_dir = self.new_folder()
        flags = {
            "bias": False,
            "dropout": 0.0,
            "dataset": self.find_dataset(case),
            "device": self.device.type,
            "compile": not self.on_cpu,
            "gradient_accumulation_steps": 1,
            "max_iters": steps,
            "eval_interval": 10**6,
            "eval_iters": 1,
            "log_interval": self.log_interval,
            "out_dir": out_dir,
            "dtype": "float32" if self.on_cpu else "bfloat16",
        }
        shape = {name: value for name, value in case.items() if name != "vocab_size"}
        result = run_process([sys.executable, "train.py", *to_flags(**flags | shape | more)], cwd=self.nanogpt)
        step_ms = read_nanogpt_step_ms(result, self.log_interval)
        ms = median_step_ms(step_ms, steps, self.log_interval)
        return training_measurement(case, ms, result.peak_bytes, out_dir)

    def run_transformers(self, task: str, case: Case, **more: object) -> Measurement:
        """Run `train` or `generate` with transformers' GPT-2, in a process of its own."""
        options = json.dumps({"dropout": 0.0} | case | more)
        result = run_process([sys.executable, str(SCRIPTS / "transformers_gpt2.py"), task, self.device.type, options])
        return json.loads(result.output.splitlines()[-1])


def read_nanogpt_step_ms(result: ProcessResult, log_interval: int = 1) -> list[float]:
    """Milliseconds of each iteration of nanoGPT's train.py, as it prints them.

    With a longer log_interval it prints the host's time of a single iteration, which waits for no GPU. Then they are
    the time between two lines, divided by their iterations.
    """
    if log_interval == 1:
        return [float(ms) for ms in re.findall(r"^iter \d+: loss \S+, time ([\d.]+)ms", result.output, re.M)]
    lines = zip(result.line_seconds, result.output.splitlines(), strict=False)
    seconds = [second for second, line in lines if re.match(r"iter \d+: loss", line)]
    return [(end - start) / log_interval * 1e3 for start, end in itertools.pairwise(seconds)]


def training_measurement(case: Case, ms: float, peak_bytes: int, out_dir: Path) -> Measurement:
    tokens = case["batch_size"] * case["block_size"]  # of a step
    return {
        "ms": ms,
        "peak_mb": peak_bytes / 2**20,
        "tokens_per_second": tokens / ms * 1e3,
        "out": str(out_dir),
    }
