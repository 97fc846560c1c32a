"""Section startup: seconds from the start of the process to the end of the first step, and to the end of --help."""

import sys
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


def measure(session: Session) -> Figures:
    ours = [str(ROOT / "train.py"), *to_flags(data_dir=session.data_dir)]
    sides: dict[str, Side] = {"ours": partial(time_first_step, session, ours, cwd=ROOT, first_line="step 1: loss")}
    if session.nanogpt is not None:
        dtype = "float32" if session.on_cpu else "bfloat16"
        peer = ["train.py", *to_flags(dropout=0.0, gradient_accumulation_steps=1, dtype=dtype)]
        sides["peer"] = partial(time_first_step, session, peer, cwd=session.nanogpt, first_line="iter 0: loss")
    for run_side in sides.values():
        run_side()  # brings the files into the page cache
    first_step = compare(take_turns(session.args.pairs, sides), "seconds", lower_is_better=True)
    show_help = compare(take_turns(session.args.pairs, {"ours": time_help}), "seconds", lower_is_better=True)
    print_table("to the first step, s", first_step)
    print_table("--help, s", show_help)
    return {"first step": first_step, "help": show_help}


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
