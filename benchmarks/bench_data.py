"""Section data: preparing a large text by characters, and batches of 64 x 1024 from a large bin."""

import ast
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import (
    ROOT,
    Figures,
    Measurement,
    Side,
    compare,
    print_table,
    resident_mb,
    run_process,
    take_turns,
    to_flags,
)
from benchmarks.datasets import VOCAB_SIZE, write_random_dataset
from benchmarks.session import Session
from nanoforge.data import batches, tokenization
from nanoforge.data.token_bins import Meta
from nanoforge.distributed import RankSlice

BATCH_SIZE, BLOCK_SIZE = 64, 1024
TIMED_BATCHES = 50


def measure(session: Session) -> Iterator[tuple[str, Figures]]:
    yield "prepare", measure_prepare(session)
    yield "batches", measure_batches(session)


# ---------------------------------------------------------------------------------------------------------------------
# prepare


def measure_prepare(session: Session) -> Figures:
    """Seconds and peak MB of a character-level prepare."""
    folder = session.folder / "text"
    folder.mkdir()
    corpus = folder / "input.txt"
    if session.nanogpt is not None:
        text = (session.data_dir / "shakespeare_char" / "input.txt").read_bytes()
    else:
        text = bytes(32 + i % 95 for i in range(10**6))
    with corpus.open("wb") as file:
        for _ in range(session.args.text_mb * 2**20 // len(text) + 1):
            file.write(text)

    flags = to_flags(input=corpus, name="large", data_dir=session.folder, tokenizer="char", overwrite=True)
    sides: dict[str, Side] = {"ours": partial(time_prepare, [str(ROOT / "data" / "prepare.py"), *flags])}
    if session.nanogpt is not None:
        script = shutil.copy(session.nanogpt / "data" / "shakespeare_char" / "prepare.py", folder)
        sides["peer"] = partial(time_prepare, [str(script)])
    print(f"data: prepare {corpus.stat().st_size / 2**20:.0f} MB of characters", flush=True)
    results = take_turns(session.args.pairs, sides)
    figures = {key: compare(results, key, lower_is_better=True) for key in ("seconds", "peak_mb")}
    print_table("prepare, seconds", figures["seconds"])
    print_table("prepare, peak MB", figures["peak_mb"])
    return figures


def time_prepare(script: list[str]) -> Measurement:
    result = run_process([sys.executable, *script])
    return {"seconds": result.seconds, "peak_mb": result.peak_bytes / 2**20}


# ---------------------------------------------------------------------------------------------------------------------
# batches


def measure_batches(session: Session) -> Figures:
    """ms to make a batch, int64 on the CPU, and the memory of this process while many batches are made.

    Ours is timed without the thread that makes batches in advance, the peer's with its get_batch.
    """
    cpu = torch.device("cpu")
    folder = session.folder / "bin" / "large"
    write_random_dataset(folder, session.args.bin_tokens)
    metas = {"large": Meta(VOCAB_SIZE, "uint16", tokenization.NumberTokenizer(VOCAB_SIZE), {})}
    data = batches.open_data(
        folder.parent,
        [("large",)],
        metas,
        {},
        batches.make_mixture([1]),
        batches.WindowSampling(BLOCK_SIZE, BATCH_SIZE, "random", seed=0),
    )
    windows = data.source.iter_windows(0, 0, BATCH_SIZE)
    calls: dict[str, Callable[[], Any]] = {"ours": lambda: batches.to_batch(next(windows), pin=False).to(cpu)}
    if session.nanogpt is not None:
        calls["peer"] = partial(load_nanogpt_get_batch(session.nanogpt, folder), "train")
    for call in calls.values():  # warm-up
        time_calls(call)
    sides: dict[str, Side] = {name: partial(time_calls, call) for name, call in calls.items()}
    table = compare(take_turns(4 * session.args.pairs, sides), "ms", lower_is_better=True)
    print_table("batches, ms", table)

    rows = RankSlice(0, BATCH_SIZE, micro_batch_size=BATCH_SIZE)
    stream = data.source.stream(0, rows, cpu, hashed=False)
    memory = []
    for number in range(session.args.batches):
        next(stream)
        if number % (session.args.batches // 10) == 0:
            memory.append(round(resident_mb(), 1))
    stream.close()
    print(f"  resident MB over {session.args.batches:,} batches: {memory}")
    return {"ms": table, "resident_mb": memory}


def load_nanogpt_get_batch(nanogpt: Path, data_dir: Path) -> Callable[[str], Any]:
    """The function get_batch of nanoGPT's train.py, alone, with the globals that it reads."""
    tree = ast.parse((nanogpt / "train.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_batch"]
    names: dict[str, Any] = {
        "np": np,
        "torch": torch,
        "os": os,
        "data_dir": str(data_dir),
        "block_size": BLOCK_SIZE,
        "batch_size": BATCH_SIZE,
        "device_type": "cpu",
        "device": "cpu",
    }
    exec(compile(ast.Module(list(functions), []), "nanoGPT's get_batch", "exec"), names)
    return names["get_batch"]


def time_calls(call: Callable[[], Any]) -> Measurement:
    start = time.perf_counter()
    for _ in range(TIMED_BATCHES):
        call()
    return {"ms": (time.perf_counter() - start) / TIMED_BATCHES * 1e3}
