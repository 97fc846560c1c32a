"""Tokens a second of decoding with random weights, after a warm-up in this process.

    python gpu_decode.py ours|batches OPTIONS        one length of prompt without end; completions of many prompts
    python gpu_decode.py nanogpt OPTIONS             nanoGPT's own GPT.generate, one sequence

OPTIONS is JSON: device, shape, prompt and new (tokens), batch_sizes, done (names not to measure again), and for nanogpt
its folder. Prints each figure as a line of JSON.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch
from torch import nn

from nanoforge.device import peak_memory_mb

ROUNDS = 3
SECONDS = 8.0  # after which no further round begins
TEMPERATURE, TOP_K = 0.8, 200


def measure(name: str, tokens: int, draw: Callable[[], object], device: torch.device, ran: str) -> None:
    """Print a figure; an error costs only its own."""
    try:
        record = time_draws(tokens, draw, device)
    except RuntimeError as error:
        record = {"value": None, "error": str(error).strip().partition("\n")[0]}
    print("json", json.dumps({"name": name, "unit": "tokens/s", "ran": ran, **record}), flush=True)


def time_draws(tokens: int, draw: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Draw once to warm up, then in rounds."""

    def seconds_of_draw() -> float:
        start = time.perf_counter()
        draw()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    warm_up = seconds_of_draw()
    rounds = [seconds_of_draw()]
    while len(rounds) < ROUNDS and sum(rounds) < SECONDS:
        rounds.append(seconds_of_draw())
    peak = peak_memory_mb(device)
    return {
        "value": tokens / statistics.median(rounds),
        "windows": [tokens / second for second in rounds],
        "warm_up_s": round(warm_up, 2),
        "peak_memory_mb": peak and round(peak),
    }


def build_ours(options: dict[str, Any], device: torch.device) -> nn.Module:
    from model import GPT, GPTConfig

    shape = {name: value for name, value in options["shape"].items() if name not in ("vocab_size", "batch_size")}
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_sizes=(options["shape"]["vocab_size"],), bias=False, **shape)).eval().to(device)
    model.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model


def decode_ours(options: dict[str, Any], device: torch.device) -> None:
    """As sample.py does: prompts of one length without an end, weights cast once."""
    from nanoforge.models.generation import SamplingParams, generate_batch

    model = build_ours(options, device)
    model.to(model.compute_dtype)  # type: ignore[arg-type]
    prompt, new = options["prompt"], options["new"]
    for batch_size in options["batch_sizes"]:
        for compiled in (False, True):
            name = f"B{batch_size} {'compiled' if compiled else 'eager'}"
            if name in options["done"]:
                continue
            sampling = SamplingParams(max_new_tokens=new, temperature=TEMPERATURE, top_k=TOP_K, compiled=compiled)
            draw = partial(generate_batch, model, [[0] * prompt] * batch_size, sampling)
            ran = f"{batch_size} x ({prompt} + {new}) tokens, top_k {TOP_K}, compiled: {compiled}"
            measure(name, batch_size * new, draw, device, ran)


def decode_batches(options: dict[str, Any], device: torch.device) -> None:
    """As rollouts and evaluations do: prompts of several lengths, weights as they are trained, or cast."""
    from nanoforge.models.generation import SamplingParams, generate_batch

    prompt, new = options["prompt"], options["new"]
    sampling = SamplingParams(max_new_tokens=new)
    for dtype in (torch.float32, torch.bfloat16):
        model = build_ours(options, device).to(dtype)
        weights = str(dtype).removeprefix("torch.")
        for with_cudnn in (False, True):
            if device.type == "cuda":  # device.varying_shapes leaves cuDNN on where the plain kernel is not allowed
                torch.backends.cuda.enable_math_sdp(enabled=not with_cudnn)
                torch.backends.cuda.enable_cudnn_sdp(enabled=with_cudnn)
            for batch_size in options["batch_sizes"]:
                name = f"B{batch_size} {weights} weights{' with cuDNN' if with_cudnn else ''}"
                if name not in options["done"]:
                    prompts = [[0] * (prompt + row % 8) for row in range(batch_size)]
                    ran = f"generate_batch, {batch_size} x {new} new tokens, {weights} weights, cuDNN: {with_cudnn}"
                    measure(name, batch_size * new, partial(generate_batch, model, prompts, sampling), device, ran)


def decode_nanogpt(options: dict[str, Any], device: torch.device) -> None:
    """As its sample.py does: float32 weights under autocast, no cache."""
    os.chdir(options["folder"])
    sys.path[0] = options["folder"]
    from model import GPT, GPTConfig  # type: ignore[attr-defined]  # nanoGPT's

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    shape = {name: value for name, value in options["shape"].items() if name != "batch_size"}
    model: Any = GPT(GPTConfig(dropout=0.0, bias=False, **shape)).eval().to(device)
    idx = torch.zeros(1, options["prompt"], dtype=torch.long, device=device)
    new = options["new"]
    autocast = torch.amp.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    with torch.no_grad(), autocast:
        ran = f"nanoGPT's GPT.generate, 1 x ({options['prompt']} + {new}) tokens, top_k {TOP_K}"
        measure("B1 nanoGPT", new, lambda: model.generate(idx, new, TEMPERATURE, TOP_K), device, ran)


def main() -> None:
    which, options = sys.argv[1], json.loads(sys.argv[2])
    decode = {"ours": decode_ours, "batches": decode_batches, "nanogpt": decode_nanogpt}[which]
    decode(options, torch.device(options["device"]))


if __name__ == "__main__":
    main()
