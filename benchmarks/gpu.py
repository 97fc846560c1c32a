"""All measurements on one CUDA GPU; on a bare machine with torch and no network:

    python -m benchmarks.prepare_gpu --peer=../nanoGPT          before, where there is a network: fills .bench/
    python benchmarks/gpu.py --stage=A --seconds=540            then B, then C; again where one was cut short
    python benchmarks/gpu.py --dry_run                          the plan: rows, minutes, and what is there already
    python benchmarks/gpu.py --rehearse --out=/tmp/rehearsal    every row with tiny shapes, without a GPU

Writes each figure to benchmarks/<gpu>.json as soon as it has it, and skips those that are there: a run that is killed
keeps its figures, and the next one goes on. Stops before its seconds end. Rows are in order of what they are worth: if
there is time for one stage only, it is A. Everything printed is also in <gpu>.log. What the rows are: gpu_rows.py.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder, whose modules have names of packages

import configurator
from benchmarks import common
from benchmarks.gpu_rows import REAL, ROWS, TINY, Record, Row, RowFailedError, Sizes
from configurator import Rules, arg, arg_table
from nanoforge.errors import UserError
from nanoforge.files import write_json

MARGIN = 8.0  # seconds between the last process and the end of --seconds
STAGES = ("A", "B", "C")
DATA_ROW = "data"  # what the others read; part of every stage


@arg_table
class GpuArgs:
    """what"""

    stage: tuple[str, ...] = arg((), "stages and rows, as A or A0 B3 (none: A, B, C)")
    seconds: float = arg(540.0, "what this command may take", above=0)
    peer: str = arg(".bench/nanoGPT", "nanoGPT, with shakespeare_char prepared", path=True)
    data_dir: str = arg(
        ".bench/data", "folder of the dataset `source`, which is made there if it is missing", path=True
    )
    out: str = arg("benchmarks", "folder of <gpu>.json, its log and its trace", path=True)
    rehearse: bool = arg(False, "tiny shapes on the CPU, compiled by nothing, to check the script")
    dry_run: bool = arg(False, "print the plan, and measure nothing")


def check(args: GpuArgs, source: dict[str, str]) -> Iterator[str]:
    names = {row.name for row in ROWS}
    for name in args.stage:
        if name not in names and name not in STAGES:
            yield f"--stage={name}: must be one of {', '.join(STAGES)} or a row: {', '.join(sorted(names))}"
    if not args.dry_run and not (Path(args.peer) / "train.py").exists():
        yield f"--peer={args.peer}: has no train.py; python -m benchmarks.prepare_gpu fills .bench/"


class OutOfTimeError(Exception):
    """The seconds of the command are over."""


class Line(NamedTuple):
    seconds: float  # since its process started
    text: str


class Bench:
    """What the rows measure with: the sizes, processes with a deadline, and the file of figures."""

    def __init__(self, args: GpuArgs, sizes: Sizes):
        self.args, self.sizes = args, sizes
        self.device = "cpu" if args.rehearse else "cuda"
        self.peer, self.data_dir, self.out = (Path(name).resolve() for name in (args.peer, args.data_dir, args.out))
        self.deadline = time.monotonic() + args.seconds - MARGIN
        self.name = "cpu" if args.rehearse else common.device_file_name(gpu_name())
        self.path = self.out / f"{self.name}.json"
        results = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.results: dict[str, Any] = {"device": self.name, "gpu": {"figures": {}, "rows": {}, "failed": {}}} | results
        self.log: IO[str] | None = None

    @property
    def gpu(self) -> dict[str, Any]:
        """What this script writes: figures, the seconds of finished rows, and the errors of others."""
        return self.results["gpu"]

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def has(self, name: str) -> bool:
        """Whether a figure is there; one that could not be measured is tried again."""
        return "error" not in self.gpu["figures"].get(name, {"error": ""})

    def unfinished(self, rows: list[Row]) -> list[Row]:
        """The rows that are not whole; the data are made anew where a machine has kept none."""
        return [row for row in rows if row.name == DATA_ROW or row.name not in self.gpu["rows"]]

    def done(self, row: str) -> list[str]:
        """The figures of a row that are there, without the row's name."""
        start = f"{row} "
        return [name.removeprefix(start) for name in self.gpu["figures"] if name.startswith(start) and self.has(name)]

    def put(self, name: str, record: Record) -> None:
        """Write a figure."""
        self.gpu["figures"][name] = record
        self.write()
        value = record["value"]
        text = f"{value:,.4g}" if isinstance(value, float) else str(value)
        self.print(f"   {name}: {text} {record.get('unit', '')} {record.get('error', '')}")

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.results)

    def print(self, text: str) -> None:
        print(text, flush=True)
        if self.log is not None:
            print(text, file=self.log, flush=True)

    def run(self, *argv: str) -> Iterator[Line]:
        """The lines of a Python command of this program, as they come.

        Raises OutOfTimeError, once the process is ended, when the seconds are over, and RowFailedError when it fails.
        """
        lines = [""]
        start = time.perf_counter()
        process = common.start_process([sys.executable, *argv], ROOT, own_group=True)
        timer = threading.Timer(max(0.0, self.seconds_left), end, [process.pid])
        timer.start()
        try:
            assert process.stdout is not None
            for text in process.stdout:
                lines.append(text.rstrip("\n"))
                if self.log is not None:
                    print(lines[-1], file=self.log, flush=True)
                yield Line(time.perf_counter() - start, lines[-1])
            process.wait()
        finally:
            timer.cancel()
            end(process.pid)
            process.wait()
        if self.seconds_left <= 0 and process.returncode:
            raise OutOfTimeError
        if process.returncode:
            raise RowFailedError("\n".join(lines[-8:]))

    def run_json(self, *argv: str) -> Iterator[dict[str, Any]]:
        """The objects of a command's lines of JSON, as they come."""
        for line in self.run(*argv):
            if line.text.startswith("json "):
                yield json.loads(line.text.removeprefix("json "))


def end(group: int) -> None:
    """End a process with all that it started, if it has not ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def gpu_name() -> str:
    """The name of the first GPU. Raises UserError."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError("nvidia-smi names no GPU here; --rehearse measures tiny shapes on the CPU") from None


def measure(bench: Bench, row: Row) -> None:
    """Measure the figures of a row that are missing. Raises OutOfTimeError."""
    bench.print(f"== {row.name}: {row.what} ({row.minutes:g} min)")
    start = time.perf_counter()
    bench.gpu["failed"].pop(row.name, None)
    try:
        errors = []
        for name, record in row.measure(bench, row):
            bench.put(name, {"commit": bench.gpu["about"]["commit"][:12], **record})
            errors += [f"{name}: {record['error']}"] if "error" in record else []
        if errors:
            raise RowFailedError("; ".join(errors))
        bench.gpu["rows"][row.name] = round(time.perf_counter() - start, 1)
    except RowFailedError as error:
        bench.gpu["failed"][row.name] = str(error)
        bench.print(f"   {row.name} failed, the next one follows: {error}")
    bench.write()


def chosen_rows(args: GpuArgs) -> list[Row]:
    chosen = args.stage or STAGES
    return [row for row in ROWS if row.name == DATA_ROW or row.name in chosen or row.name[0] in chosen]


def print_plan(rows: list[Row]) -> None:
    for row in rows:
        print(f"{row.name:5} {row.minutes:4.1f} min  {row.what}")
    print(f"{sum(row.minutes for row in rows):10.1f} min in all")


def main(args: GpuArgs) -> None:
    rows = chosen_rows(args)
    if args.dry_run:
        print_plan(rows)
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the process under way ends with it
    if args.rehearse:
        from benchmarks import rehearsal

        rehearsal.start()
    bench = Bench(args, TINY if args.rehearse else REAL)
    cache = ROOT / ".bench" / "cache"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    if (ROOT / ".bench" / "tiktoken").exists():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(ROOT / ".bench" / "tiktoken"))
    bench.gpu["about"] = common.describe_setup("benchmarks/gpu.py")
    bench.out.mkdir(parents=True, exist_ok=True)
    with (bench.out / f"{bench.name}.log").open("a") as bench.log:
        for row in bench.unfinished(rows):
            needed = 0.0 if args.rehearse else row.minutes * 60
            if bench.seconds_left < needed:
                bench.print(f"== {row.name}: not begun; it takes about {needed:.0f} s of {bench.seconds_left:.0f} left")
                continue
            try:
                measure(bench, row)
            except OutOfTimeError:
                bench.write()
                bench.print(f"   {row.name}: the seconds are over; what it has is kept")
                break
    n_failed = len(bench.gpu["failed"])
    bench.log = None
    bench.print(
        f"{bench.path}: {len(bench.gpu['figures'])} figures" + (f", {n_failed} rows failed" if n_failed else "")
    )


if __name__ == "__main__":
    configurator.run(main, configurator.parse(GpuArgs, sys.argv[1:], __doc__, Rules(check=check)))
