"""Section train: the time of a training step, its share of what the device can do, and the shares of its parts."""

import contextlib
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import torch
from torch.profiler import profile, record_function

import train
import train_args
from benchmarks.common import (
    CASES,
    DEFAULT_CASES,
    Case,
    Figures,
    Measurement,
    Side,
    compare,
    print_table,
    summarize,
    take_turns,
    to_flags,
)
from benchmarks.session import Session
from nanoforge import distributed
from nanoforge.device import measure_matmul_flops, tune_malloc
from nanoforge.run_dir import RunRecord
from nanoforge.training import logger

PROFILED_STEPS = 10
MATMUL_SIZES = {"cpu": (384, 512, 768, 1024, 2048), "cuda": (4096, 8192)}


def measure(session: Session) -> Iterator[tuple[str, Figures]]:
    """Each case in the automatic precision and in float32, and the peer."""
    for name in session.args.cases or DEFAULT_CASES[session.device.type]:
        print(f"train {name}: {CASES[name]}", flush=True)
        figures = measure_case(session, CASES[name])
        print_table(f"train {name}, ms a step", figures["ms"])
        yield name, figures


def sides_of(session: Session, case: Case) -> dict[str, Side]:
    steps = session.args.steps
    sides: dict[str, Side] = {"ours": partial(session.train_ours, case, "auto", steps)}
    if session.on_cpu:
        sides["ours float32"] = partial(session.train_ours, case, "float32", steps)
    if session.args.peer_kind == "hf":
        sides["peer"] = partial(session.run_transformers, "train", case, steps=steps)
    elif session.nanogpt is not None:
        sides["peer"] = partial(session.train_nanogpt, case, steps)
    return sides


def measure_case(session: Session, case: Case) -> Figures:
    results = take_turns(session.args.pairs, sides_of(session, case))
    figures: Figures = {
        "ms": compare(results, "ms", lower_is_better=True),
        "tokens_per_second": compare(results, "tokens_per_second", lower_is_better=False),
    }
    if session.args.peer_kind == "nanogpt":
        figures["peak_mb"] = {name: summarize([run["peak_mb"] for run in runs]) for name, runs in results.items()}
    for name, runs in results.items():
        if name == "peer":
            continue
        speed = figures["tokens_per_second"][name]["median"]
        figures[f"of peak, {name}"] = share_of_peak(session, name, runs[0], speed)
    figures["parts"] = parts_of_a_step(session, case)
    shares = [f"{name} {share:.1%}" for name, share in figures["parts"].items()]
    print(f"  parts of a step: {', '.join(shares)}")
    return figures


@cache
def peak_of_products(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest matrix product here."""
    return max(measure_matmul_flops(device, dtype, size) for size in MATMUL_SIZES[device.type])


def share_of_peak(session: Session, name: str, run: Measurement, tokens_per_second: float) -> Figures:
    """The model's FLOP/s, and which share that is of the FLOP/s of the fastest matrix product here."""
    record = RunRecord.load(Path(run["out"]))
    dtype = getattr(torch, record.args["dtype"])
    peak = peak_of_products(session.device, dtype)
    flops = record.counts["flops_per_token"] * tokens_per_second
    print(
        f"  {name}: {record.args['dtype']}, {flops / 1e9:,.0f} of the {peak / 1e9:,.0f} GFLOP/s "
        f"that matrix products reach here: {flops / peak:.0%}"
    )
    return {"dtype": record.args["dtype"], "measured_peak_flops": peak, "flops": flops, "utilisation": flops / peak}


def parts_of_a_step(session: Session, case: Case) -> dict[str, float]:
    """Each part's share of the time of ten steps made of train.py's parts, by torch's profiler.

    Each part waits for the device.
    """
    out_dir, dataset = session.new_folder(), session.find_dataset(case)
    flags = to_flags(
        **case,
        data_dir=dataset.parent,
        dataset=dataset.name,
        out_dir=out_dir,
        device=session.device.type,
    )
    args = train_args.parse(flags)
    synchronize = (lambda: None) if session.on_cpu else torch.cuda.synchronize
    tune_malloc()
    with distributed.join_ranks(args.device) as ranks:
        run = train.build(args, ranks, lambda message: None)
        log = logger.RunLogger(out_dir, silent=False, start_step=0, evaluated=False, seconds=0.0, total_steps=20)
        stream = run.data.source.stream(0, run.rank_slice, ranks.device, hashed=False)

        def step(number: int) -> None:
            with record_function("part: data"):
                batch = next(stream).batches[0]
                synchronize()
            with record_function("part: forward"):
                loss = run.raw_model(batch.idx, batch.targets).mean()
                synchronize()
            with record_function("part: backward"):
                loss.backward()
                synchronize()
            with record_function("part: optimizer"):
                norm = run.state.optimizer.clip_grad_norm(run.state.scaler, args.grad_clip)
                run.state.optimizer.update(run.state.scaler)
                synchronize()
            with record_function("part: logging"), contextlib.redirect_stdout(None):
                log.event("train", number, "", loss=float(loss.detach()), grad_norm=float(norm))

        for number in range(5):  # warm-up
            step(number)
        with profile() as profiler:
            for number in range(5, 5 + PROFILED_STEPS):
                step(number)
        log.close()
        stream.close()
    times = {}
    for event in profiler.key_averages():
        if event.key.startswith("part: "):
            times[event.key.removeprefix("part: ")] = event.cpu_time_total
    total = sum(times.values())
    return {name: time / total for name, time in times.items()}
