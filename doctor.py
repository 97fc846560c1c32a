"""python train.py --doctor: what this machine has, what is missing, and what a step of the configured run takes.

The other arguments count: `python train.py configs/modern.py --batch_size=8 --doctor` looks at that run. Nothing is
written and no network is asked. torch and all that needs it are imported late, so that it works where they don't: what
fails is reported. The exit status is 1 where something is broken that the run needs.
"""

import contextlib
import dataclasses
import importlib
import io
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanoforge import environment, launcher, run_dir
from nanoforge.console import format_duration, plural
from nanoforge.data import hub
from nanoforge.errors import UserError
from train_args import TrainArgs

ROOT = Path(__file__).resolve().parent
LABEL_WIDTH = 11
REQUIRED = "required"
MAX_STEP_SECONDS = 2.0  # of the step that is timed: of a larger one, some rows
RANDOM_BYTES = 200_000  # on which a step is timed where there are no token bins yet
USED_SHARE = 0.9  # of the memory that is available
MAX_ROWS = 2**16  # of a micro-batch
N_TIMED = 1  # steps, after one that warms up


class Report:
    """Prints what is found, and keeps what is broken. Silent on ranks other than the main one."""

    def __init__(self, *, silent: bool) -> None:
        self.silent = silent
        self.problems: list[str] = []

    def say(self, label: str, text: str) -> None:
        """A line, or several below each other."""
        if not self.silent:
            print(f"{label:<{LABEL_WIDTH}} " + text.replace("\n", "\n" + "".ljust(LABEL_WIDTH + 1)), flush=True)

    def problem(self, label: str, text: str) -> None:
        """What the run can't do without."""
        self.problems.append(f"{label}: {text}")
        self.say(label, f"BROKEN: {text}")


def main(args: TrainArgs) -> None:
    """Report on all of it. Raises SystemExit with status 1 where something is broken."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    report = Report(silent=not launcher.is_main_process())
    if not report.silent:
        describe_python(report)
        describe_packages(report)
        describe_machine(report, args)
        describe_data(report, args)
    torch = import_torch(report)
    if torch is not None:
        with reported(report, "step"):
            describe_step(report, args, torch)
    for problem in report.problems:
        report.say("problem", problem)
    if report.problems:
        raise SystemExit(1)
    report.say("result", "nothing is broken that this command needs")


@contextlib.contextmanager
def reported(report: Report, label: str) -> Iterator[None]:
    """What fails here is a problem, whatever it is."""
    try:
        yield
    except UserError as error:
        report.problem(label, str(error))
    except Exception as error:
        report.problem(label, f"{type(error).__name__}: {error}")


def gigabytes(n_bytes: float | None) -> str:
    """Bytes as GB."""
    return "an unknown amount" if n_bytes is None else f"{n_bytes / 1e9:,.1f} GB"


# ---------------------------------------------------------------------------------------------------------------------
# without torch


def describe_python(report: Report) -> None:
    """Versions of Python, of the system and of this project."""
    commit = run_dir.describe_software(ROOT, {}).get("git_commit") or "not in git"
    changed = environment.output_of("git", "status", "--porcelain", "--untracked-files=no", cwd=ROOT)
    report.say("python", f"{platform.python_version()} on {platform.platform()}")
    report.say("project", f"{ROOT}, commit {commit[:12]}{', with changes' if changed else ''}")


def describe_packages(report: Report) -> None:
    """The packages of requirements.txt apart from torch, and the optional ones with what each gives."""
    required = [
        package._replace(purpose=REQUIRED) for package in environment.read_requirements(ROOT / "requirements.txt")
    ]
    optional = environment.read_requirements(ROOT / "requirements-optional.txt")
    found = environment.look_for(package for package in [*required, *optional] if package.name != "torch")
    lines = []
    for package in found:
        state = package.version or "missing"
        if package.error:
            state += f" FAILS ({package.error})"
        lines.append(f"{package.name:<18} {state:<12} {package.purpose}")
    report.say("packages", "\n".join(lines))
    missing = [package.name for package in found if package.purpose == REQUIRED and not package.version]
    if missing:
        report.say("packages", f"{', '.join(missing)} missing: pip install -r requirements.txt")


def describe_machine(report: Report, args: TrainArgs) -> None:
    """Cores, memory, the disk of out_dir."""
    limit = environment.core_limit()
    allowed = f", a container's limit of {limit:g}" if limit else ""
    threads = os.environ.get("OMP_NUM_THREADS")
    set_by = f", OMP_NUM_THREADS={threads}" if threads else ""
    cores = f"{environment.usable_cores()} of {os.cpu_count()} cores{allowed}{set_by}"
    report.say("cpu", f"{environment.processor()}, {cores}")
    report.say("memory", f"{gigabytes(environment.available_memory())} available")
    folder = Path(args.out_dir)
    parent = environment.existing_parent(folder)
    report.say("disk", f"{gigabytes(environment.free_disk(folder))} free for out_dir {folder}")
    if not os.access(parent, os.W_OK):
        report.problem("disk", f"--out_dir={folder}: {parent} can't be written; choose another place")


def describe_data(report: Report, args: TrainArgs) -> None:
    """Which data are there, by the files of their folders."""
    for name in args.hub_names:
        report.say("data", f"{name}: of the hub, downloaded when the run starts unless it is in the cache")
    for path in filter(None, (args.train_file, args.validation_file)):
        report.say("data", f"{path}: {Path(path).stat().st_size:,} bytes")
    for folder in args.folders.values():
        missing = missing_files(folder, args.data_format)
        files = sorted(path for suffix in ("*.bin", "*.jsonl") for path in folder.glob(suffix))
        if not missing:
            size = sum(path.stat().st_size for path in files)
            report.say("data", f"{folder}: {plural(len(files), 'file')}, {size:,} bytes")
        elif (folder / "prepare.py").exists():
            report.say("data", f"{folder}: not there yet; its prepare.py makes it when the run starts")
        else:
            report.problem("data", f"{folder}: no {' and no '.join(missing)}, and no prepare.py to make it")


def missing_files(folder: Path, data_format: str) -> list[str]:
    """The files of a dataset that are not there."""
    try:
        from nanoforge.data import token_bins
    except ImportError:  # without numpy, which is reported with the packages
        return []
    return token_bins.missing_files(folder, data_format)


def import_torch(report: Report) -> Any:
    """torch; None where it is missing or broken."""
    try:
        torch: Any = importlib.import_module("torch")
    except Exception as error:  # a broken package raises anything
        report.problem("torch", f"can't be imported ({error}); pip install -r requirements.txt")
        return None
    driver = environment.nvidia_driver()
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    report.say("torch", f"{torch.__version__}, built for {built_for}, {plural(torch.get_num_threads(), 'thread')}")
    if driver and not torch.cuda.is_available():
        report.say("gpu", f"NVIDIA's driver {driver} is here, but this torch can't use it: it may need another build")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        report.say("gpu", f"{index}: {gpu.name}, {gigabytes(gpu.total_memory)}, {capability}, driver {driver}")
    return torch


# ---------------------------------------------------------------------------------------------------------------------
# a step


def describe_step(report: Report, args: TrainArgs, torch: Any) -> None:
    """Precision, compilers, one timed step, and what fits into memory. Raises what fails."""
    import start
    from nanoforge import device, distributed
    from nanoforge.models import cpu_kernels

    with distributed.join_ranks(args.device, args.rank_timeout) as ranks, start.explain_failures(args, ranks):
        dtype, reason = device.choose_dtype(args.dtype, ranks.device)
        report.say("precision", f"{str(dtype).removeprefix('torch.')} on {ranks.device} ({reason})")
        missing = device.missing_compiler(ranks.device)
        report.say("compiler", f"--compile needs {missing}" if missing else "--compile can work here")
        if ranks.device.type == "cpu" and not cpu_kernels.load_library():
            report.say("compiler", "no C compiler: sampling on this CPU is slower")
        if missing and args.compile == "true":
            report.problem("compiler", f"--compile: needs {missing}; install it, or leave --compile out")
        if args.init_from not in ("scratch", "resume") and hub.is_hub_name(args.init_from):
            report.say("weights", f"{args.init_from}: of the hub; only the cache is looked at here")
        available = device.available_memory(ranks.device)
        with random_data(report, args) as timed_args:
            if timed_args is not None:
                time_step(report, timed_args, ranks, available)


@contextlib.contextmanager
def random_data(report: Report, args: TrainArgs) -> Iterator[TrainArgs | None]:
    """The arguments, with random bytes for token bins that are not there yet; None where no step is possible."""
    absent = [name for name, folder in args.folders.items() if missing_files(folder, args.data_format)]
    if not absent:
        yield args
        return
    if args.data_format == "examples":
        report.say("step", "not timed: there are no examples yet")
        yield None
        return
    from nanoforge.data import corpus
    from nanoforge.data.documents import TextChunk
    from nanoforge.data.tokenization import ByteTokenizer

    report.say("step", f"on random bytes, a vocabulary of {ByteTokenizer.vocab_size}: the data are not there yet")
    text = "".join(chr(32 + byte % 95) for byte in os.urandom(RANDOM_BYTES))
    chunks = [TextChunk("train", text), TextChunk("val", text)]
    with tempfile.TemporaryDirectory(prefix="doctor") as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            for name in args.folders:
                corpus.write_dataset(Path(folder, name), lambda: chunks, ByteTokenizer())
        yield dataclasses.replace(args, data_dir=folder)


def time_step(report: Report, args: TrainArgs, ranks: Any, available: int | None) -> None:
    """Train for a few steps of the configured model, or of some rows of it on a slow device; then what fits.

    available: bytes for tensors before the model was built.
    """
    import pilot
    import run
    from nanoforge import device, distributed

    record = run_dir.RunRecord.load(args.resumed_folder) if args.init_from == "resume" else None
    trial = pilot.Trial(args, ranks, record)
    args, model, source = trial.args, trial.raw_model, trial.data.source
    report.say("model", run.describe_model(model, args))

    # 1. The rows that are timed: a micro-batch, or what a slow device does in seconds.
    rows = distributed.rank_slice(args.global_batch_size, args.batch_size, ranks, group_size=args.group_size)
    tokens_a_row = source.tokens_per_step / source.rows
    flops = device.measure_matmul_flops(ranks.device, model.compute_dtype)
    n_affordable = MAX_STEP_SECONDS * flops / (tokens_a_row * model.flops_per_token())
    n_groups = min(rows.micro_batch_size, max(1, int(n_affordable))) // args.group_size
    n_rows = max(1, n_groups) * args.group_size
    trial.read(distributed.RankSlice(rows.start, rows.start + n_rows, min(n_rows, rows.micro_batch_size)))

    # 2. Its time.
    first = trial.train(range(1))
    seconds = trial.train(range(1, 1 + N_TIMED)) / N_TIMED
    tokens_per_second = n_rows * tokens_a_row * ranks.world_size / seconds
    speed = f"{tokens_per_second * model.flops_per_token() / flops / ranks.world_size:.0%} of matrix products' speed"
    peak = device.peak_flops(device_name(ranks.device))
    if peak:
        speed = f"mfu {tokens_per_second * model.flops_per_token() / peak / ranks.world_size:.1%}, {speed}"
    report.say(
        "step",
        f"{plural(n_rows, 'sequence')} in {seconds * 1e3:,.1f} ms (the first in {first:,.1f} s): "
        f"{tokens_per_second:,.0f} tokens/s, {speed}, eager",
    )
    step_seconds = source.tokens_per_step / tokens_per_second
    report.say(
        "run",
        f"a step of {plural(source.rows, 'sequence')} about {step_seconds:,.2f} s; {args.max_iters:,} steps "
        f"{format_duration(args.max_iters * step_seconds)}, without evaluations",
    )
    describe_fit(report, trial, rows.micro_batch_size, available)


def device_name(device: Any) -> str:
    """The GPU's name; empty for others."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def describe_fit(report: Report, trial: Any, n_rows: int, available: int | None) -> None:
    """The plan of a step's memory, the largest micro-batch that fits, and the size of checkpoints."""
    import builders
    from nanoforge.training import memory, summary

    args, model = trial.args, trial.raw_model
    plan = builders.plan_memory(args, model, n_rows)
    report.say("memory", summary.describe_memory(plan, has_adapter=args.adapter != "none"))
    if available is not None:
        most = memory.largest_rows(
            lambda rows: builders.plan_memory(args, model, rows).peak, int(USED_SHARE * available), MAX_ROWS
        )
        report.say("fits", f"micro-batches of up to {plural(most, 'sequence')} in {gigabytes(available)}")
        if plan.peak > available:
            report.problem(
                "memory", f"--batch_size={args.batch_size}: needs about {gigabytes(plan.peak)}; use --batch_size=auto"
            )
    saved = (args.keep_last + 1) * (plan.trainable + plan.optimizer)
    if saved > environment.free_disk(Path(args.out_dir)):
        report.problem("disk", f"--out_dir={args.out_dir}: checkpoints need {gigabytes(saved)}")
