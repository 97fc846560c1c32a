"""The tables of docs/scale.md: what a run would need on H100s or H200s, from the model's counts and a few constants.

    python -m benchmarks.scale

Nothing here is measured. The constants are below; docs/scale.md explains the formulas.
"""

from typing import NamedTuple

import torch

from model import GPT, GPTConfig

PEAK_FLOPS = 989e12  # dense bfloat16 FLOP/s of an H100 or H200
UTILIZATION = 0.42  # share of it that one GPU reaches
NVLINK = 350e9  # bytes/s that a ring gets out of NVLink
NETWORK = 40e9  # bytes/s out of each GPU's 400 Gb/s network card
GPUS_PER_NODE = 8
MEMORY = 120e9  # bytes of a GPU for weights, gradients and optimizer
HIDDEN_SHARE = 2 / 3  # of a step, backward, behind which communication is hidden
GPUS = (1, 8, 16, 64, 128, 512)


class Case(NamedTuple):
    """A model, and the tokens of its optimizer step."""

    config: GPTConfig
    tokens_per_step: int


GPT2_124M = GPTConfig(vocab_sizes=(50304,), n_layer=12, n_head=12, n_embd=768, block_size=1024, bias=False)
GPT2_XL = GPTConfig(vocab_sizes=(50304,), n_layer=48, n_head=25, n_embd=1600, block_size=1024, bias=False)
LLAMA_7B = GPTConfig(
    vocab_sizes=(50304,),
    n_layer=32,
    n_head=32,
    n_embd=4096,
    block_size=4096,
    bias=False,
    position="rope",
    tie_weights=False,
)
CASES = {"124M": Case(GPT2_124M, 2**19), "1.5B": Case(GPT2_XL, 2**20), "7B": Case(LLAMA_7B, 2**22)}
MEMORY_COLUMNS = (
    "model",
    "parameters",
    "GFLOP a token",
    "weights, gradients, AdamW",
    "bfloat16 weights of a step",
    "activations of 1,024 tokens",
    "the same, checkpointed",
    "logits of 1,024 tokens",
)


def make_model(config: GPTConfig) -> GPT:
    """A model without weights."""
    with torch.device("meta"):
        return GPT(config)


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def memory_row(name: str, config: GPTConfig) -> list[str]:
    model = make_model(config)
    N, C, L, V = model.count_parameters(), config.n_embd, config.n_layer, sum(config.vocab_sizes)
    sizes = {
        "weights, gradients, AdamW": 16 * N,
        "bfloat16 weights": 2 * N,
        "activations": 32 * C * L * 1024,
        "checkpointed activations": (2 * C * L + 32 * C) * 1024,
        "logits": 14 * V * 1024,
    }
    counts = [f"{N / 1e6:,.0f} M", f"{model.flops_per_token() / 1e9:.2f}"]
    return [name, *counts, *(f"{size / 1e9:.2f} GB" for size in sizes.values())]


def ring_seconds(n_bytes: float, gpus: int) -> float:
    """One pass of a ring over all ranks, a reduce-scatter or an all-gather.

    It runs over NVLink within a node, and over each GPU's network card between nodes.
    """
    bandwidth = NVLINK if gpus <= GPUS_PER_NODE else NETWORK * GPUS_PER_NODE
    return n_bytes * (gpus - 1) / gpus / bandwidth


def speed_cell(case: Case, model: GPT, gpus: int) -> str:
    """Tokens a day, the share of the time in which GPUs compute, and the parallelism."""
    N = model.count_parameters()
    fits = 18 * N < MEMORY
    if case.tokens_per_step / case.config.block_size < gpus:
        return "too few sequences"
    if gpus == 1 and not fits:
        return "does not fit"
    compute = case.tokens_per_step * model.flops_per_token() / (gpus * PEAK_FLOPS * UTILIZATION)
    if fits:
        parallelism = "DDP"
        communication = 2 * ring_seconds(4 * N, gpus)  # gradients in float32, all-reduced once a step
    else:
        parallelism = "FSDP"  # weights gathered in bfloat16 twice, gradients scattered in float32
        communication = 2 * ring_seconds(2 * N, gpus) + ring_seconds(4 * N, gpus)
    waiting = max(0.0, communication - HIDDEN_SHARE * compute)
    tokens_per_day = 86400 * case.tokens_per_step / (compute + waiting)
    return f"{tokens_per_day / 1e9:,.1f} G ({compute / (compute + waiting):.0%}, {parallelism})"


def main() -> None:
    print_table(list(MEMORY_COLUMNS), [memory_row(name, case.config) for name, case in CASES.items()])
    print()
    gpu_columns = ["1 GPU" if gpus == 1 else f"{gpus} GPUs" for gpus in GPUS]
    rows = []
    for name, case in CASES.items():
        model = make_model(case.config)
        rows.append([name, f"{case.tokens_per_step:,}", *(speed_cell(case, model, gpus) for gpus in GPUS)])
    print_table(["model", "tokens a step", *gpu_columns], rows)


if __name__ == "__main__":
    main()
