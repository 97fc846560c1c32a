"""How time and memory grow with the sizes, on this machine:

    python -m benchmarks.growth              about 12 minutes on two cores; 8 GB of disk for a while

Milliseconds of a step against the width and against the context, with fits; peak memory against the micro-batch, with
and without activation checkpointing and chunked loss; prepare against the corpus; batches against the bin, over many
shards. Writes benchmarks/growth_<device>.json and .png.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import ROOT, resident_mb, run_process, to_flags
from benchmarks.datasets import VAL_TOKENS, VOCAB_SIZE, random_tokens, write_random_dataset
from model import GPT, GPTConfig
from nanoforge.data import batches, tokenization
from nanoforge.data.token_bins import Meta
from nanoforge.device import choose_dtype, get_device, tune_malloc
from nanoforge.files import write_json
from nanoforge.training import optimizers

WIDTHS = (64, 128, 192, 256, 384, 512, 768)
CONTEXTS = (64, 128, 256, 512, 1024, 2048)
DEPTH, TOKENS_PER_STEP = 4, 4096
WARMUP_STEPS, TIMED_STEPS = 2, 5
MICRO_BATCHES = (1, 2, 4, 8, 16)
MEMORY_FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation checkpointing": {"activation_checkpointing": True},
    "chunked loss": {"loss_chunk": 256},
    "both": {"activation_checkpointing": True, "loss_chunk": 256},
}
CORPUS_MB = (1, 4, 16, 64, 256, 1024)
BIN_TOKENS = (10**6, 10**7, 10**8, 10**9, 4 * 10**9)
SHARD_TOKENS = 10**8
METHODS = ("random", "without_replacement")
BATCH_SIZE, BLOCK_SIZE, TIMED_BATCHES = 64, 1024, 640

Point = dict[str, Any]  # JSON: a measurement


# ---------------------------------------------------------------------------------------------------------------------
# measurements


def time_step(device: torch.device, width: int, context: int) -> Point:
    """A training step of TOKENS_PER_STEP tokens in the automatic precision: median ms, FLOPs."""
    config = GPTConfig(
        vocab_sizes=(65,), block_size=context, n_layer=DEPTH, n_head=width // 64, n_embd=width, bias=False
    )
    model = GPT(config).to(device)
    model.compute_dtype, _ = choose_dtype("auto", device)
    optimizer = optimizers.Optimizer("adamw", model, optimizers.OptimConfig(), model.muon_splits())
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    idx = torch.randint(65, (max(1, TOKENS_PER_STEP // context), context), device=device)
    times = []
    for _ in range(WARMUP_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        loss = model(idx, idx).mean()
        loss.backward()
        optimizer.clip_grad_norm(scaler, 1.0)
        optimizer.update(scaler)
        loss.item()
        times.append(time.perf_counter() - start)
    return {
        "width": width,
        "context": context,
        "ms": 1e3 * statistics.median(times[WARMUP_STEPS:]),
        "flops": model.flops_per_token() * idx.numel(),
    }


def measure_steps(device: torch.device) -> Point:
    """Steps of all widths and contexts, with straight lines through them."""
    tune_malloc()
    widths = [time_step(device, width, 256) for width in WIDTHS]
    contexts = [time_step(device, 256, context) for context in CONTEXTS]
    ms_per_flop, ms_fixed = np.polyfit([point["flops"] for point in widths], [point["ms"] for point in widths], 1)
    ms_per_token, ms_without_attention = np.polyfit(CONTEXTS, [point["ms"] for point in contexts], 1)
    return {
        "widths": widths,
        "contexts": contexts,
        "ms_per_gflop": ms_per_flop * 1e9,
        "ms_fixed": ms_fixed,
        "ms_per_context_token": ms_per_token,
        "ms_without_attention": ms_without_attention,
        "context_where_attention_is_half": ms_without_attention / ms_per_token,
    }


def measure_memory(folder: Path, device: torch.device) -> dict[str, list[float]]:
    """Peak MB of training processes: 4 layers, width 256, context 256, on GPT-2's vocabulary."""
    write_random_dataset(folder / "numbers", 10**5)
    out_dir = folder / "run"
    common = to_flags(
        n_layer=4,
        n_head=4,
        n_embd=256,
        block_size=256,
        max_iters=2,
        eval_interval=10**6,
        eval_iters=1,
        data_dir=folder,
        dataset="numbers",
        device=device.type,
        out_dir=out_dir,
    )
    peaks: dict[str, list[float]] = {name: [] for name in MEMORY_FLAGS}
    for name, flags in MEMORY_FLAGS.items():
        for batch_size in MICRO_BATCHES:
            shutil.rmtree(out_dir, ignore_errors=True)
            result = run_process([sys.executable, "train.py", *common, *to_flags(**flags, batch_size=batch_size)])
            peaks[name].append(result.peak_bytes / 2**20)
            print(f"memory, {name}, micro-batch {batch_size}: {peaks[name][-1]:,.0f} MB", flush=True)
    return peaks


def measure_prepare(folder: Path) -> list[Point]:
    """Seconds and peak MB of data/prepare.py with characters, on this program's source over and over."""
    source = b"".join(path.read_bytes() for path in sorted(ROOT.rglob("*.py"))).decode().encode("ascii", "ignore")
    megabyte = (source * (2**20 // len(source) + 1))[: 2**20]
    corpus = folder / "corpus.txt"
    flags = to_flags(input=corpus, name="prepared", data_dir=folder, tokenizer="char")
    points = []
    for size in CORPUS_MB:
        with corpus.open("wb") as file:
            for _ in range(size):
                file.write(megabyte)
        result = run_process([sys.executable, "data/prepare.py", *flags])
        points.append({"mb": size, "seconds": result.seconds, "peak_mb": result.peak_bytes / 2**20})
        print(f"prepare {size} MB: {result.seconds:.2f} s, {points[-1]['peak_mb']:.0f} MB", flush=True)
        corpus.unlink()
        shutil.rmtree(folder / "prepared")
    return points


def measure_batches(folder: Path) -> list[Point]:
    """ms to make a batch, seconds to open the bins, and the process's memory, over shards of up to SHARD_TOKENS."""
    data_dir = folder / "large"
    data_dir.mkdir()
    generator = np.random.default_rng(0)
    random_tokens(generator, VAL_TOKENS).tofile(data_dir / "val.bin")
    points = []
    written = 0
    for n_tokens in BIN_TOKENS:
        if n_tokens <= SHARD_TOKENS:  # one shard, of another size than before
            for old in data_dir.glob("train_*"):
                old.unlink()
            written = 0
        while written < n_tokens:
            size = min(SHARD_TOKENS, n_tokens - written)
            random_tokens(generator, size).tofile(data_dir / f"train_{written // SHARD_TOKENS:06d}.bin")
            written += size
        for method in METHODS:
            points.append(time_batches(data_dir, n_tokens, method))
    return points


def time_batches(data_dir: Path, n_tokens: int, method: str) -> Point:
    metas = {data_dir.name: Meta(VOCAB_SIZE, "uint16", tokenization.NumberTokenizer(VOCAB_SIZE), {})}
    sampling = batches.WindowSampling(BLOCK_SIZE, BATCH_SIZE, method, seed=0)
    start = time.perf_counter()
    data = batches.open_data(data_dir.parent, [(data_dir.name,)], metas, {}, batches.make_mixture([1]), sampling)
    open_seconds = time.perf_counter() - start
    windows = data.source.iter_windows(0, 0, BATCH_SIZE)
    times = []
    for _ in range(TIMED_BATCHES):
        start = time.perf_counter()
        batches.to_batch(next(windows), pin=False)
        times.append(1e3 * (time.perf_counter() - start))
    point = {
        "tokens": n_tokens,
        "shards": len(list(data_dir.glob("train_*"))),
        "method": method,
        "ms": statistics.mean(times),
        "open_seconds": open_seconds,
        "resident_mb": resident_mb(),
    }
    print(
        f"batches from {n_tokens:,} tokens, {method}: {point['ms']:.3f} ms, opened in {open_seconds:.2f} s, "
        f"{point['resident_mb']:.0f} MB",
        flush=True,
    )
    return point


# ---------------------------------------------------------------------------------------------------------------------
# the figure


def draw(figures: Point, path: Path) -> None:
    sheet = Figure(figsize=(13, 7.5), layout="constrained")
    width, context, memory, seconds, peak, batch = sheet.subplots(2, 3).flat
    draw_widths(width, figures["step"])
    draw_contexts(context, figures["step"])
    draw_memory(memory, figures["memory"])
    draw_prepare(seconds, peak, figures["prepare"])
    draw_batches(batch, figures["batches"])
    for axes in sheet.axes:
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    sheet.savefig(path, dpi=100)


def draw_widths(axes: Axes, step: Point) -> None:
    gflop = np.array([point["flops"] for point in step["widths"]]) / 1e9
    axes.plot(gflop, [point["ms"] for point in step["widths"]], "o")
    fit = step["ms_fixed"] + step["ms_per_gflop"] * gflop
    axes.plot(gflop, fit, "-", label=f"{max(0, step['ms_fixed']):.0f} ms + {step['ms_per_gflop']:.2f} ms / GFLOP")
    axes.set(
        xlabel=f"GFLOP a step (widths {WIDTHS[0]} to {WIDTHS[-1]}, {DEPTH} layers)",
        ylabel="ms a step",
        xscale="log",
        yscale="log",
        title="Step against model size",
    )


def draw_contexts(axes: Axes, step: Point) -> None:
    T = np.array(CONTEXTS)
    axes.plot(T, [point["ms"] for point in step["contexts"]], "o")
    fit = step["ms_without_attention"] + step["ms_per_context_token"] * T
    half = step["context_where_attention_is_half"]
    axes.plot(T, fit, "-", label=f"attention is half from T = {half:,.0f}")
    axes.set(
        xlabel=f"context T ({TOKENS_PER_STEP} tokens a step, width 256)",
        ylabel="ms a step",
        ylim=(0, None),
        title="Step against context",
    )


def draw_memory(axes: Axes, peaks: dict[str, list[float]]) -> None:
    for name, values in peaks.items():
        axes.plot(MICRO_BATCHES, values, "o-", label=name)
    axes.set(
        xlabel="micro-batch (x 256 tokens)",
        ylabel="peak MB of the process",
        ylim=(0, None),
        title="Memory (4 x 256, vocabulary 50,257)",
    )


def draw_prepare(seconds: Axes, peak: Axes, points: list[Point]) -> None:
    sizes = [point["mb"] for point in points]
    seconds.plot(sizes, [point["seconds"] for point in points], "o-")
    seconds.set(xlabel="MB of text", ylabel="seconds", xscale="log", yscale="log", title="Prepare (characters): time")
    peak.plot(sizes, [point["peak_mb"] for point in points], "o-")
    peak.set(xlabel="MB of text", ylabel="peak MB", xscale="log", ylim=(0, None), title="Prepare: memory")


def draw_batches(axes: Axes, points: list[Point]) -> None:
    for method in METHODS:
        of_method = [point for point in points if point["method"] == method]
        axes.plot([point["tokens"] for point in of_method], [point["ms"] for point in of_method], "o-", label=method)
    axes.set(
        xlabel=f"tokens of the bins (shards of {SHARD_TOKENS:.0e})",
        ylabel=f"ms a batch of {BATCH_SIZE} x {BLOCK_SIZE}",
        xscale="log",
        ylim=(0, None),
        title="Batches",
    )


def main() -> None:
    device = get_device("auto")
    with tempfile.TemporaryDirectory(prefix="growth") as name:
        folder = Path(name)
        figures = {
            "step": measure_steps(device),
            "memory": measure_memory(folder, device),
            "prepare": measure_prepare(folder),
            "batches": measure_batches(folder),
        }
    setup = {"torch": torch.__version__, "threads": torch.get_num_threads(), "micro_batches": MICRO_BATCHES}
    path = ROOT / "benchmarks" / f"growth_{device.type}.json"
    write_json(path, setup | figures)
    draw(figures, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
