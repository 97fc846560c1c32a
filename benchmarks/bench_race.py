"""Section race: our recipe and nanoGPT's, to nanoGPT's final loss on the held-out tokens.

Seconds are those of training steps, without start-up and evaluation; `wall` is the whole process. The first step, in
which a side may compile, counts as the median one on both sides. Both are measured by `held_out_loss`. Draws
race_<device>.png.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.common import CASES, ROOT, SCRIPTS, Case, Figures, run_process, to_flags
from benchmarks.session import Session, read_nanogpt_step_ms
from builders import load_model
from model import GPT
from nanoforge.errors import UserError
from nanoforge.run_dir import RunRecord

Run = dict[str, Any]  # seed, wall, curve, loss, parameters; curve: [{"step", "seconds", "tokens", "loss"}, ...]
COLORS = ("#e6550d", "#3182bd", "#31a354", "#756bb1", "#636363")
MEASURES = ("step", "tokens", "seconds")


class Race(NamedTuple):
    """What both sides have in common."""

    session: Session
    case: Case
    val_path: Path

    @property
    def block_size(self) -> int:
        return self.case["block_size"]


def measure(session: Session) -> Iterator[tuple[str, Figures]]:
    """The runs so far after each seed, at last the goals. Raises UserError without nanoGPT."""
    if session.nanogpt is None:
        raise UserError("race: needs --peer, whose final loss is the goal")
    args = session.args
    case = CASES["small" if session.on_cpu else "shakespeare_char"]
    race = Race(session, case, session.data_dir / "shakespeare_char" / "val.bin")
    runs: dict[str, list[Run]] = {"ours": []}
    for lr in args.peer_lr:
        runs[f"peer, lr {lr:g}"] = []
    for seed in range(args.seeds):
        add_run(runs, "ours", run_ours(race, seed))
        for lr in args.peer_lr:
            add_run(runs, f"peer, lr {lr:g}", run_nanogpt(race, seed, lr))
        yield "runs", runs
    goals = {name: reach_goal(name, runs) for name in runs if name != "ours"}
    draw(runs, goals, Path(args.out) / f"race_{session.device_name}.png")
    yield "goals", goals


def add_run(runs: dict[str, list[Run]], name: str, run: Run) -> None:
    runs[name].append(run)
    last = run["curve"][-1]
    print(
        f"  seed {run['seed']} {name}: loss {last['loss']:.4f} after {last['step']} steps, {last['seconds']:.1f} s",
        flush=True,
    )


def held_out_loss(model: GPT, val_path: Path, block_size: int) -> float:
    """Mean loss of all tokens of a uint16 bin in consecutive windows of block_size, in float32."""
    tokens = torch.from_numpy(np.fromfile(val_path, dtype=np.uint16).astype(np.int64))
    n_windows = (len(tokens) - 1) // block_size
    n_targets = n_windows * block_size
    idx = tokens[:n_targets].view(n_windows, block_size)
    targets = tokens[1 : n_targets + 1].view(n_windows, block_size)
    device = model.wte.weight.device

    compute_dtype, training = model.compute_dtype, model.training
    model.eval()
    model.compute_dtype = torch.float32
    total = 0.0
    with torch.no_grad():
        for x, y in zip(idx.split(256), targets.split(256), strict=True):
            total += float(model(x.to(device), y.to(device)).sum(dtype=torch.float64))
    model.train(training)
    model.compute_dtype = compute_dtype
    return total / n_targets


# ---------------------------------------------------------------------------------------------------------------------
# the two sides


def run_ours(race: Race, seed: int) -> Run:
    session = race.session
    out_dir = session.new_folder()
    default_config = "shakespeare_cpu.py" if session.on_cpu else "shakespeare_gpu.py"
    config = session.args.race_config or str(ROOT / "configs" / default_config)
    flags = to_flags(
        data_dir=session.data_dir,
        dataset="shakespeare_char",
        out_dir=out_dir,
        seed=seed,
        device=session.device.type,
        log_interval=1,
        eval_interval=10,
        eval_iters=1,
    )
    script = [sys.executable, "-m", "benchmarks.scripts.race_ours"]
    measuring = [str(race.val_path), str(race.block_size), str(out_dir / "curve.json")]
    start = time.perf_counter()
    run_process([*script, *measuring, config, *flags])
    wall = time.perf_counter() - start

    lines = [json.loads(text) for text in (out_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]  # every one, from step 1 on
    tokens = [0, *(line["tokens"] for line in steps)]
    seconds = typical_first([line["step_ms"] / 1e3 for line in steps])
    curve = []
    for step, loss in json.loads((out_dir / "curve.json").read_text()):
        curve.append({"step": step, "seconds": sum(seconds[:step]), "tokens": tokens[step], "loss": loss})
    return {
        "seed": seed,
        "wall": wall,
        "curve": curve,
        "loss": curve[-1]["loss"],
        "parameters": RunRecord.load(out_dir).counts["parameters"],
    }


def typical_first(seconds: list[float]) -> list[float]:
    """The seconds of each step, of the first one the median of all: it may compile."""
    return [statistics.median(seconds), *seconds[1:]]


def run_nanogpt(race: Race, seed: int, lr: float) -> Run:
    session = race.session
    iterations = session.args.peer_iters
    eval_interval = max(1, iterations // 20)
    out_dir = session.new_folder()
    flags = {
        "dropout": 0.0,
        "max_iters": iterations,
        "lr_decay_iters": iterations,
        "learning_rate": lr,
        "min_lr": lr / 10,
        "beta2": 0.99,
        "warmup_iters": 100,
        "eval_interval": eval_interval,
        "eval_iters": 1,
        "log_interval": 1,
        "always_save_checkpoint": True,
        "bias": False,
        "device": session.device.type,
        "compile": not session.on_cpu,
        "dtype": "float32" if session.on_cpu else "bfloat16",
        "gradient_accumulation_steps": 1,
        "dataset": "shakespeare_char",
        "out_dir": out_dir,
    }
    script = [sys.executable, str(SCRIPTS / "race_nanogpt.py"), str(seed), "train.py"]
    assert session.nanogpt is not None
    result = run_process([*script, *to_flags(**flags | race.case)], cwd=session.nanogpt)

    # The evaluation before an iteration is part of the time printed for it: such an iteration counts as the median one.
    printed = typical_first([ms / 1e3 for ms in read_nanogpt_step_ms(result)])
    seconds = [printed[0] if i % eval_interval == 0 else printed[i] for i in range(len(printed))]
    curve, parameters = nanogpt_curve(race, out_dir, seconds)
    return {
        "seed": seed,
        "lr": lr,
        "wall": result.seconds,
        "curve": curve,
        "loss": curve[-1]["loss"],
        "parameters": parameters,
    }


def nanogpt_curve(race: Race, out_dir: Path, seconds: list[float]) -> tuple[list[dict[str, Any]], int]:
    """The held-out loss of each checkpoint, and the model's parameters. seconds: of each iteration."""
    curve = []
    for path in sorted(out_dir.glob("ckpt_*.pt")):
        model = load_model(str(path)).model
        step = int(path.stem.removeprefix("ckpt_"))
        curve.append(
            {
                "step": step,
                "seconds": sum(seconds[:step]),
                "tokens": step * race.case["batch_size"] * race.block_size,
                "loss": held_out_loss(model, race.val_path, race.block_size),
            }
        )
    return curve, model.count_parameters()


# ---------------------------------------------------------------------------------------------------------------------
# the result


def reach_goal(name: str, runs: dict[str, list[Run]]) -> Figures:
    """The goal (the peer's mean final loss), what it took the peer (median), and when each of our runs reached it."""
    goal = statistics.mean(run["loss"] for run in runs[name])
    peer = {key: statistics.median(run["curve"][-1][key] for run in runs[name]) for key in MEASURES}
    reached = [next((point for point in run["curve"] if point["loss"] <= goal), None) for run in runs["ours"]]
    figures: Figures = {"goal": goal, "peer": peer, "ours": reached}
    print(f"race to {name}'s loss {goal:.4f}: it took {peer['step']} steps, {peer['seconds']:.1f} s")
    points = [point for point in reached if point is not None]
    if len(points) < len(reached):
        print("  ours did not reach it with every seed")
        return figures
    ours = {key: statistics.median(point[key] for point in points) for key in MEASURES}
    ratio = {key: peer[key] / ours[key] for key in MEASURES}
    print(
        f"  ours {ours['step']} steps, {ours['seconds']:.1f} s: {ratio['step']:.1f} x fewer steps, "
        f"{ratio['tokens']:.1f} x tokens, {ratio['seconds']:.1f} x seconds"
    )
    return figures | {"ratio": ratio}


def draw(runs: dict[str, list[Run]], goals: Figures, path: Path) -> None:
    """Held-out loss against steps and against seconds, every seed of every side."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colors = dict(zip(runs, COLORS, strict=False))
    lowest_goal = min(goal["goal"] for goal in goals.values())
    for axes, key, label in ((left, "step", "optimizer steps"), (right, "seconds", "seconds of training")):
        for name, of_side in runs.items():
            for i, run in enumerate(of_side):
                x = [point[key] for point in run["curve"]]
                y = [point["loss"] for point in run["curve"]]
                axes.plot(x, y, color=colors[name], linewidth=1.2, label=name if i == 0 else None)
        for name, goal in goals.items():
            axes.axhline(goal["goal"], color=colors[name], linewidth=0.8, linestyle=":")
        axes.set(xscale="log", xlabel=label, ylim=(lowest_goal - 0.15, 3.0))
        axes.grid(alpha=0.25, which="both")
    left.set_ylabel("loss on the held-out text (nats per character)")
    left.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
