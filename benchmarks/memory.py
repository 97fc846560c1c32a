"""The tables of docs/memory.md: what a LoRA and full fine-tuning of two models need, from their shapes.

    python -m benchmarks.memory

Weights are counted on models without data; the rest are the formulas of nanoforge/training/memory.py.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from model import GPT, GPTConfig
from nanoforge.models import adapters
from nanoforge.models.quantized import FORMATS
from nanoforge.training.memory import MemoryPlan, cache_bytes, cast_bytes, layer_values, plan_memory

LLAMA = GPTConfig(
    vocab_sizes=(32000,),
    block_size=4096,
    bias=False,
    norm="rmsnorm",
    position="rope",
    mlp="gated",
    activation="silu",
    tie_weights=False,
)
MODELS = {
    "Llama 3.2 1B": replace(
        LLAMA,
        vocab_sizes=(128256,),
        n_layer=16,
        n_head=32,
        n_kv_head=8,
        n_embd=2048,
        head_dim=64,
        mlp_ratio=4.0,
        tie_weights=True,
    ),
    "Llama 2 7B": replace(
        LLAMA, n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, head_dim=128, mlp_ratio=11008 / 4096
    ),
}
RANK = 16  # of a LoRA on all linear layers
SEQUENCE = 2048  # tokens
CARDS = {"24 GB": 24 * 2**30, "80 GB": 80 * 2**30}
RESERVED = 1.5e9  # of a card: CUDA's context, the kernels' workspace, fragments
LEAN = {"activation_checkpointing": True, "loss_chunk": 256}
MOST = 64  # sequences


KINDS: dict[str, torch.dtype | None] = {  # dtype of the frozen base
    "LoRA, base in float32": torch.float32,
    "LoRA, base in bfloat16": torch.bfloat16,
    "all weights": None,
}


@functools.cache
def build(name: str, base_dtype: torch.dtype | None) -> GPT:
    """A model without data; with a base_dtype a frozen one, with a LoRA."""
    with torch.device("meta"):
        model = GPT(MODELS[name])
        model.compute_dtype = torch.bfloat16
        if base_dtype is not None:
            model.to(base_dtype)
            adapters.add_lora(model, [], rank=RANK, alpha=RANK, dropout=0.0)
            adapters.freeze_base(model)
    return model


def plan(name: str, base_dtype: torch.dtype | None, sequences: int = 1, **changes: Any) -> MemoryPlan:
    """Of a step in bfloat16 with AdamW; base_dtype: None for full fine-tuning."""
    model = build(name, base_dtype)
    model.config = replace(MODELS[name], **changes)
    return plan_memory(model, sequences * SEQUENCE, "adamw", 0 if base_dtype is None else RANK)


def most_sequences(name: str, base_dtype: torch.dtype | None, card: int, **changes: Any) -> str:
    """Sequences of a micro-batch for which a card has room."""
    fitting = [n for n in range(1, MOST + 1) if plan(name, base_dtype, n, **changes).peak <= card - RESERVED]
    return str(max(fitting, default="-")) if len(fitting) < MOST else f"{MOST} or more"


def format_bytes(n_bytes: float) -> str:
    """In GB, MB or kB of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.2f} {unit}"
    return f"{n_bytes / 1e3:,.1f} kB"


def quantized_bytes(name: str, form: str) -> float:
    """Of a base with --quantize_base and --base_dtype=bfloat16, without the scales of int8, one a row."""
    linears = sum(p.numel() for key, p in build(name, None).named_parameters() if "blocks." in key and p.dim() == 2)
    return plan(name, torch.bfloat16).frozen + (FORMATS[form].bytes - 2) * linears


def bytes_of(name: str) -> dict[str, str]:
    """What each part of a model's training takes."""
    config = MODELS[name]
    one, whole, full = (plan(name, dtype) for dtype in (torch.bfloat16, torch.float32, None))
    checkpointed = plan(name, torch.bfloat16, activation_checkpointing=True)
    return {
        "parameters": f"{build(name, None).count_parameters():,}",
        "base, float32": format_bytes(whole.frozen),
        "base, bfloat16": format_bytes(one.frozen),
        "base, linear layers in nf4, the rest in bfloat16": format_bytes(quantized_bytes(name, "nf4")),
        "base, linear layers in int8, the rest in bfloat16": format_bytes(quantized_bytes(name, "int8")),
        f"LoRA of rank {RANK}": format_bytes(one.trainable),
        "its gradients": format_bytes(one.gradients),
        "AdamW's moments": format_bytes(one.optimizer),
        "reference: adapter disabled": "0",
        "reference: copy": format_bytes(one.frozen + one.trainable),
        "activations of a token in a layer": format_bytes(layer_values(config, RANK) * 2),
        f"activations of {SEQUENCE} tokens": format_bytes(one.activations),
        "checkpointed: inputs of the layers": format_bytes(checkpointed.activations),
        "checkpointed: one layer again": format_bytes(checkpointed.recomputed),
        f"logits of {SEQUENCE} tokens": format_bytes(one.logits),
        "logits with --loss_chunk=256": format_bytes(plan(name, None, loss_chunk=256).logits),
        f"KV cache of a completion, {SEQUENCE} tokens": format_bytes(cache_bytes(config, 1, SEQUENCE, torch.bfloat16)),
        "all weights: float32, with gradients and AdamW": format_bytes(full.state),
        "all weights: casts that backward keeps": format_bytes(
            cast_bytes(build(name, None).parameters(), torch.bfloat16)
        ),
    }


def rows_of_bytes() -> Iterator[list[str]]:
    """A part, and what it takes in each model."""
    columns = [bytes_of(name) for name in MODELS]
    for part in columns[0]:
        yield [part, *(column[part] for column in columns)]


def rows_of_cards() -> Iterator[list[str]]:
    """How many sequences a card has room for."""
    for kind, base_dtype in KINDS.items():
        for title, changes in ((kind, {}), (f"{kind}, lean", LEAN)):
            fits = [most_sequences(name, base_dtype, card, **changes) for name in MODELS for card in CARDS.values()]
            yield [title, *fits]


def table(columns: Sequence[str], rows: Iterator[list[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = [list(columns), ["---"] * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def tables() -> list[list[str]]:
    """Those of docs/memory.md."""
    cards = [f"{model}, {card}" for model in MODELS for card in CARDS]
    return [
        table(["", *MODELS], rows_of_bytes()),
        table([f"sequences of {SEQUENCE} tokens in a micro-batch", *cards], rows_of_cards()),
    ]


if __name__ == "__main__":
    print("\n\n".join("\n".join(lines) for lines in tables()))
