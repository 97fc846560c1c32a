"""How time and memory grow with the sizes, on this machine:

    python -m benchmarks.growth              about 12 minutes on two cores; 8 GB of disk for a while

Milliseconds a step against the width and against the context, with the fits; peak memory against the micro-batch, with and without
activation checkpointing and chunked loss; prepare against the corpus; batches against the bin, over many shards.
Writes benchmarks/growth_<device>.json and .png.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.common import ROOT, resident_mb, run_process, to_flags
from model import GPT, GPTConfig
from nanoforge.data import batches, tokenization
from nanoforge.data.token_bins import Meta
from nanoforge.device import choose_dtype, get_device, tune_malloc
from nanoforge.training import optimizers

WIDTHS, DEPTH, CONTEXTS, TOKENS = (64, 128, 192, 256, 384, 512, 768), 4, (64, 128, 256, 512, 1024, 2048), 4096
MICRO_BATCHES = (1, 2, 4, 8, 16)
SAVERS = {
    "plain": {},
    "activation checkpointing": {"activation_checkpointing": True},
    "chunked loss": {"loss_chunk": 256},
    "both": {"activation_checkpointing": True, "loss_chunk": 256},
}
CORPUS_MB = (1, 4, 16, 64, 256, 1024)
BIN_TOKENS, SHARD_TOKENS = (10**6, 10**7, 10**8, 10**9, 4 * 10**9), 10**8


def step_ms(device: torch.device, width: int, context: int, steps: int = 5) -> dict[str, float]:
    """A training step of TOKENS tokens in the automatic precision: median ms, weights in products, FLOPs."""
    dtype, _ = choose_dtype("auto", device)
    model = GPT(
        GPTConfig(vocab_sizes=(65,), block_size=context, n_layer=DEPTH, n_head=width // 64, n_embd=width, bias=False)
    ).to(device)
    model.compute_dtype = dtype
    optimizer, scaler = (
        optimizers.Optimizer("adamw", model, optimizers.OptimConfig(), model.muon_splits()),
        torch.amp.GradScaler(device.type, enabled=False),
    )
    idx, times = torch.randint(65, (max(1, TOKENS // context), context), device=device), []
    for _ in range(2 + steps):
        begin = time.perf_counter()
        loss = model(idx, idx).mean()
        loss.backward()
        optimizer.clip_grad_norm(scaler, 1.0)
        optimizer.update(scaler)
        loss.item()
        times.append(time.perf_counter() - begin)
    return {
        "width": width,
        "context": context,
        "ms": 1e3 * statistics.median(times[2:]),
        "flops": model.flops_per_token() * idx.numel(),
    }


def grow_step(device: torch.device) -> dict:
    tune_malloc()
    widths = [step_ms(device, width, 256) for width in WIDTHS]
    contexts = [step_ms(device, 256, context) for context in CONTEXTS]
    by_width = np.polyfit([p["flops"] for p in widths], [p["ms"] for p in widths], 1)
    by_context = np.polyfit(CONTEXTS, [p["ms"] for p in contexts], 1)
    told = {
        "widths": widths,
        "contexts": contexts,
        "ms_per_gflop": by_width[0] * 1e9,
        "ms_fixed": by_width[1],
        "ms_per_context_token": by_context[0],
        "ms_without_attention": by_context[1],
    }
    told["context_where_attention_is_half"] = by_context[1] / by_context[0]
    return told


def grow_memory(folder: Path, device: torch.device) -> dict[str, list[float]]:
    """Peak MB of training processes: 4 x 256 on GPT-2's vocabulary, context 256."""
    data = folder / "numbers"
    data.mkdir()
    for name in ("train.bin", "val.bin"):
        np.random.default_rng(0).integers(0, 50257, 10**5, dtype=np.uint16).tofile(data / name)
    (data / "meta.json").write_text(
        json.dumps(
            {
                "dtype": "uint16",
                "vocab_size": 50257,
                "files": {},
                "tokenizer": tokenization.to_json(tokenization.NumberTokenizer(50257)),
            }
        )
    )
    shape = {
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 256,
        "block_size": 256,
        "max_iters": 2,
        "eval_interval": 10**6,
        "eval_iters": 1,
        "data_dir": folder,
        "dataset": "numbers",
        "device": device.type,
    }
    told: dict[str, list[float]] = {}
    for name, saver in SAVERS.items():
        for batch in MICRO_BATCHES:
            out = folder / "run"
            shutil.rmtree(out, ignore_errors=True)
            done = run_process([sys.executable, "train.py", *to_flags(**shape, **saver, batch_size=batch, out_dir=out)])
            told.setdefault(name, []).append(done.peak_bytes / 2**20)
            print(f"memory, {name}, micro-batch {batch}: {told[name][-1]:,.0f} MB", flush=True)
    return told


def grow_prepare(folder: Path) -> list[dict[str, float]]:
    """Seconds and peak MB of data/prepare.py with characters."""
    sources = b"".join(path.read_bytes() for path in sorted(ROOT.rglob("*.py"))).decode().encode("ascii", "ignore")
    megabyte, told = (sources * (2**20 // len(sources) + 1))[: 2**20], []
    for size in CORPUS_MB:
        corpus = folder / "corpus.txt"
        with corpus.open("wb") as file:
            for _ in range(size):
                file.write(megabyte)
        done = run_process(
            [
                sys.executable,
                "data/prepare.py",
                *to_flags(input=corpus, name="prepared", data_dir=folder, tokenizer="char"),
            ]
        )
        told.append({"mb": size, "seconds": done.seconds, "peak_mb": done.peak_bytes / 2**20})
        print(f"prepare {size} MB: {done['seconds']:.2f} s, {told[-1]['peak_mb']:.0f} MB", flush=True)
        corpus.unlink()
        shutil.rmtree(folder / "prepared")
    return told


def grow_batches(folder: Path) -> list[dict[str, float]]:
    """ms a batch of 64 x 1024, the seconds to open the bins, and the process's size, over shards of up to SHARD_TOKENS tokens."""
    data, draw, told, written = folder / "large", np.random.default_rng(0), [], 0
    data.mkdir()
    draw.integers(0, 50257, 10**5, dtype=np.uint16).tofile(data / "val.bin")
    for tokens in BIN_TOKENS:
        if tokens <= SHARD_TOKENS:
            for old in data.glob("train_*"):
                old.unlink()
            written = 0
        while written < tokens:
            size = min(SHARD_TOKENS, tokens - written)
            draw.integers(0, 50257, size, dtype=np.uint16).tofile(data / f"train_{written // SHARD_TOKENS:06d}.bin")
            written += size
        for method in ("random", "without_replacement"):
            metas = {"large": Meta(50257, "uint16", tokenization.NumberTokenizer(50257), {})}
            begin = time.perf_counter()
            opened = batches.open_data(
                folder, [("large",)], metas, {}, batches.make_mixture([1]), batches.WindowSampling(1024, 64, method, 0)
            )
            open_seconds, rows, times = time.perf_counter() - begin, opened.source.iter_windows(0, 0, 64), []
            for _ in range(640):
                begin = time.perf_counter()
                batches.to_batch(next(rows), pin=False)
                times.append(1e3 * (time.perf_counter() - begin))
            told.append(
                {
                    "tokens": tokens,
                    "shards": len(list(data.glob("train_*"))),
                    "method": method,
                    "ms": statistics.mean(times),
                    "open_seconds": open_seconds,
                    "resident_mb": resident_mb(),
                }
            )
            print(
                f"batches from {tokens:,} tokens, {method}: {told[-1]['ms']:.3f} ms, opened in {open_seconds:.2f} s, {told[-1]['resident_mb']:.0f} MB",
                flush=True,
            )
    return told


def draw(told: dict, picture: Path) -> None:
    sheet = Figure(figsize=(13, 7.5), layout="constrained")
    width, context, memory, seconds, peak, batch = sheet.subplots(2, 3).flat
    step = told["step"]
    gflop = np.array([p["flops"] for p in step["widths"]]) / 1e9
    width.plot(gflop, [p["ms"] for p in step["widths"]], "o")
    width.plot(
        gflop,
        step["ms_fixed"] + step["ms_per_gflop"] * gflop,
        "-",
        label=f"{max(0, step['ms_fixed']):.0f} ms + {step['ms_per_gflop']:.2f} ms / GFLOP",
    )
    width.set(
        xlabel=f"GFLOP a step (widths {WIDTHS[0]} to {WIDTHS[-1]}, {DEPTH} layers)",
        ylabel="ms a step",
        xscale="log",
        yscale="log",
        title="Step against model size",
    )
    T = np.array(CONTEXTS)
    context.plot(T, [p["ms"] for p in step["contexts"]], "o")
    context.plot(
        T,
        step["ms_without_attention"] + step["ms_per_context_token"] * T,
        "-",
        label=f"attention is half from T = {step['context_where_attention_is_half']:,.0f}",
    )
    context.set(
        xlabel=f"context T ({TOKENS} tokens a step, width 256)",
        ylabel="ms a step",
        ylim=(0, None),
        title="Step against context",
    )
    for name, values in told["memory"].items():
        memory.plot(MICRO_BATCHES, values, "o-", label=name)
    memory.set(
        xlabel="micro-batch (x 256 tokens)",
        ylabel="peak MB of the process",
        ylim=(0, None),
        title="Memory (4 x 256, vocabulary 50,257)",
    )
    sizes = [p["mb"] for p in told["prepare"]]
    seconds.plot(sizes, [p["seconds"] for p in told["prepare"]], "o-")
    seconds.set(xlabel="MB of text", ylabel="seconds", xscale="log", yscale="log", title="Prepare (characters): time")
    peak.plot(sizes, [p["peak_mb"] for p in told["prepare"]], "o-")
    peak.set(xlabel="MB of text", ylabel="peak MB", xscale="log", ylim=(0, None), title="Prepare: memory")
    for method in ("random", "without_replacement"):
        points = [p for p in told["batches"] if p["method"] == method]
        batch.plot([p["tokens"] for p in points], [p["ms"] for p in points], "o-", label=method)
    batch.set(
        xlabel=f"tokens of the bins (shards of {SHARD_TOKENS:.0e})",
        ylabel="ms a batch of 64 x 1024",
        xscale="log",
        ylim=(0, None),
        title="Batches",
    )
    for axes in sheet.axes:
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    sheet.savefig(picture, dpi=100)


def main() -> None:
    device = get_device("auto")
    with tempfile.TemporaryDirectory(prefix="growth") as name:
        folder = Path(name)
        told = {
            "step": grow_step(device),
            "memory": grow_memory(folder, device),
            "prepare": grow_prepare(folder),
            "batches": grow_batches(folder),
        }
    (ROOT / "benchmarks" / f"growth_{device.type}.json").write_text(
        json.dumps(
            {"torch": torch.__version__, "threads": torch.get_num_threads(), "micro_batches": MICRO_BATCHES, **told},
            indent=1,
        )
        + "\n"
    )
    draw(told, ROOT / "benchmarks" / f"growth_{device.type}.png")


if __name__ == "__main__":
    main()
