"""Measure this program, alone or in turn with a peer (ours, peer, ours, peer, ...), and write benchmarks/<device>.json.

    python bench.py all --peer=../nanoGPT       a checkout of nanoGPT; its own script has prepared data/shakespeare_char
    python bench.py train --peer_kind=hf        transformers' GPT2LMHeadModel in a plain loop, and its generate
    python bench.py sample --pairs=9

Sections: train (time and parts of a step), sample (tokens a second), data (prepare, batches), startup, race (to the
peer's final loss), all. Each is a module of benchmarks/. The peer's own files run unmodified, in processes of their
own, on the same data and shapes. A ratio above 1 says that this program is faster.
"""

import sys
import tempfile
from pathlib import Path

import configurator
from benchmarks.common import CASES
from configurator import OnlyWith, Rules, arg, arg_group, arg_table

SECTIONS = ("train", "sample", "data", "startup", "race")
NANOGPT = OnlyWith("--peer of --peer_kind=nanogpt", lambda args: args.peer != "" and args.peer_kind == "nanogpt")


@arg_group
class SubjectArgs:
    """what"""

    device: str = arg("auto", "auto, cpu or cuda")
    peer: str = arg("", "folder of the peer's checkout (none: this program alone, unless --peer_kind=hf)", path=True)
    peer_kind: str = arg("nanogpt", "nanogpt (needs --peer) or hf (transformers)", choices=("nanogpt", "hf"))
    data_dir: str = arg("", "folder that holds shakespeare_char (none: the peer's data, or ours)", path=True)
    cases: tuple[str, ...] = arg((), "shapes to measure (none: those of the device)")
    out: str = arg("benchmarks", "folder of the results", path=True)


@arg_group
class AmountArgs:
    """how much"""

    pairs: int = arg(5, "times that each side runs, in turn", low=1)
    steps: int = arg(20, "steps of a training run that is timed", low=2)
    text_mb: int = arg(100, "megabytes of text to prepare", low=1)
    bin_tokens: int = arg(10**9, "tokens of the bin that batches come from", low=10**5)
    batches: int = arg(10_000, "batches during which memory is watched", low=100)
    seeds: int = arg(3, "seeds of each side of the race", low=1)
    race_config: str = arg(
        "", "our config in the race (none: configs/shakespeare_cpu.py or shakespeare_gpu.py)", path=True
    )
    peer_lr: tuple[float, ...] = arg((1e-3,), "learning rates of the peer in the race", needs=NANOGPT)
    peer_iters: int = arg(2000, "iterations of the peer in the race", low=2, needs=NANOGPT)


@arg_table
class BenchArgs(SubjectArgs, AmountArgs):
    """The arguments of bench.py."""


def check(args: BenchArgs, source: dict[str, str]) -> list[str]:
    """The errors in the arguments."""
    errors = []
    for case in args.cases:
        if case not in CASES:
            errors.append(f"--cases: no {case}; choose from {', '.join(CASES)}")
    if args.peer and args.peer_kind == "nanogpt":
        for name in ("train.py", "sample.py"):
            if not (Path(args.peer) / name).exists():
                errors.append(f"--peer={args.peer}: has no {name}; pass a checkout of nanoGPT")
    return errors


def main(request: tuple[str, BenchArgs]) -> None:
    section, args = request
    from benchmarks import bench_data, bench_race, bench_sample, bench_startup, bench_train
    from benchmarks.session import Session

    modules = {
        "train": bench_train,
        "sample": bench_sample,
        "data": bench_data,
        "startup": bench_startup,
        "race": bench_race,
    }
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        session = Session(args, Path(folder))
        for name in SECTIONS if section == "all" else [section]:
            print(f"== {name}", flush=True)
            session.write(name, modules[name].measure(session))  # each figure as soon as it is there
        print(f"written: {session.results_path}")


def parse(argv: list[str]) -> tuple[str, BenchArgs]:
    """(section, arguments); the first argument names the section unless it is a flag."""
    section = argv[0] if argv and not argv[0].startswith("-") else "all"
    if section != "all" and section not in SECTIONS:
        configurator.exit_with_errors([f"{section}: no such section; choose from {', '.join(SECTIONS)} and all"])
    flags = [arg for arg in argv if arg != section]
    return section, configurator.parse(BenchArgs, flags, __doc__, Rules(check=check))


if __name__ == "__main__":
    configurator.run(main, parse(sys.argv[1:]))
