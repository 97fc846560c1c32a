"""Section startup: seconds from the start of the process to the end of the first step, and to the end of --help."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.common import (
    CASES,
    ROOT,
    Figures,
    Measurement,
    Side,
    compare,
    print_table,
    run_process,
    take_turns,
    to_flags,
)
from benchmarks.session import Session


def measure(session: Session) -> Iterator[tuple[str, Figures]]:
    """Of both programs to the first step, of ours to the end of --help."""
    ours = [str(ROOT / "train.py"), *to_flags(data_dir=session.data_dir)]
    sides: dict[str, Side] = {"ours": partial(time_first_step, session, ours, cwd=ROOT, first_line="step 1: loss")}
    if session.nanogpt is not None:
        dtype = "float32" if session.on_cpu else "bfloat16"
        peer = ["train.py", *to_flags(dropout=0.0, gradient_accumulation_steps=1, dtype=dtype)]
        sides["peer"] = partial(time_first_step, session, peer, cwd=session.nanogpt, first_line="iter 0: loss")
    for run_side in sides.values():
        run_side()  # brings the files into the page cache
    for name, of_figure in (("first step", sides), ("help", {"ours": time_help})):
        figures = compare(take_turns(session.args.pairs, of_figure), "seconds", lower_is_better=True)
        print_table(f"{name}, s", figures)
        yield name, figures


def time_first_step(session: Session, command: list[str], *, cwd: Path, first_line: str) -> Measurement:
    """Seconds until a train.py has printed its first step."""
    flags = to_flags(
        **CASES["small"],
        dataset="shakespeare_char",
        device=session.device.type,
        compile=False,
        eval_iters=1,
        log_interval=1,
        bias=False,
        max_iters=1,
        out_dir=session.new_folder(),
    )
    result = run_process([sys.executable, *command, *flags], cwd=cwd, wait_for=first_line)
    return {"seconds": result.seconds_to_text}


def time_help() -> Measurement:
    return {"seconds": run_process([sys.executable, str(ROOT / "train.py"), "--help"]).seconds}
