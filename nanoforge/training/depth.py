"""A model's size from one number, its depth: width, heads, batch, steps and learning rates follow. Imports no torch.

The rules are power laws through two points each: what was measured with configs/depth.py at a few million training
tokens on a CPU (docs/depth.md), and the recipe that modded-nanogpt and nanochat found for GPT-2's size, at 1.2 billion
(configs/gpt2_124m_modern.py).
"""

import math
from collections.abc import Mapping
from typing import Any

MEASURED_TOKENS = 3.3e6  # training tokens of the measured anchor
MEASURED_WIDTH = 96
MAX_MICRO_BATCH_TOKENS = 65536

# ---------------------------------------------------------------------------------------------------------------------
# the rules


def head_dim(width: int) -> int:
    """32 below a width of 256, 64 below 768, else 128."""
    if width < 256:
        return 32
    return 64 if width < 768 else 128


def training_tokens(n_layer: int, width: int, tokens_per_weight: float) -> float:
    """So many for each of the 12 L C^2 weights of the blocks."""
    return tokens_per_weight * 12 * n_layer * width**2


def batch_tokens(tokens: float) -> float:
    """Tokens of a step, from the training tokens of the run."""
    return 4096 * (tokens / MEASURED_TOKENS) ** 0.82


def muon_lr(tokens: float) -> float:
    """Learning rate of the blocks' matrices."""
    return 0.04 * (tokens / MEASURED_TOKENS) ** -0.12


def muon_weight_decay(tokens: float) -> float:
    """Weight decay of the blocks' matrices: 0.05 from 1.2 billion tokens on; a few million are better off without."""
    return 0.05 * min(1.0, tokens / 1.2e9)


def adam_lr(width: int) -> float:
    """Learning rate of everything else: it falls with the root of the width (Yang et al. 2022, for Adam; nanochat)."""
    return 0.01 * (width / MEASURED_WIDTH) ** -0.5


# ---------------------------------------------------------------------------------------------------------------------


def round_to_digits(value: float) -> float:
    """To three significant digits."""
    return float(f"{value:.3g}")


def power_of_two(exponent: float) -> int:
    """2^exponent, the exponent cut to an integer of at least 0."""
    return 2 ** max(0, int(exponent))


def shape(depth: int, aspect: int, fixed: Mapping[str, Any]) -> tuple[int, int]:
    """(width, heads): heads of about `head_dim`, as many as divide the width into even parts and n_kv_head divides.

    Where n_embd is not fixed, the width is rounded up to whole heads.
    """
    size = head_dim(fixed.get("n_embd", depth * aspect))
    kv_heads = fixed.get("n_kv_head") or 1
    if "n_embd" not in fixed:
        heads = fixed.get("n_head", kv_heads * math.ceil(depth * aspect / size / kv_heads))
        if "n_head" in fixed:
            size = 8 * math.ceil(depth * aspect / heads / 8)
        return heads * size, heads
    width = fixed["n_embd"]
    fitting = [n for n in range(kv_heads, width + 1, kv_heads) if width % n == 0]
    if width % 2 == 0:  # rotary embeddings turn pairs
        fitting = [n for n in fitting if width // n % 2 == 0] or fitting
    heads = min(fitting, key=lambda n: abs(math.log(width / n / size)), default=max(1, width // size))
    return width, heads


def derive_args(
    depth: int, aspect: int, tokens_per_weight: float, block_size: int, fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of train.py that follow from `depth`; the others follow from those that are `fixed`.

    aspect: width over depth; widths are rounded up to whole heads. A step has a power of two of sequences, unless
    batch_size is fixed; with another batch than the rule's, learning rates change by the root of the ratio. A fixed
    max_tokens stands for tokens_per_weight; a fixed max_iters decides the tokens by which the rates follow.
    """
    # 1. Shape.
    n_layer = fixed.get("n_layer", depth)
    width, heads = shape(depth, aspect, fixed)

    # 2. Batch and steps.
    tokens = fixed.get("max_tokens") or training_tokens(n_layer, width, tokens_per_weight)
    sequences = power_of_two(round(math.log2(batch_tokens(tokens) / block_size)))
    max_micro_batch = power_of_two(math.log2(MAX_MICRO_BATCH_TOKENS / block_size))
    micro_batches = fixed.get("gradient_accumulation_steps", 1)
    batch_size = fixed.get("batch_size", max(1, min(sequences // micro_batches, max_micro_batch)))
    accumulation = fixed.get("gradient_accumulation_steps", max(1, round(sequences / batch_size)))
    global_batch_size = batch_size * accumulation
    steps = fixed.get("max_iters", max(1, round(tokens / (global_batch_size * block_size))))

    # 3. Learning rates, by the tokens that the run reads.
    if "max_iters" in fixed:
        run_tokens = steps * global_batch_size * block_size
        tokens = max(1, min(run_tokens, fixed.get("max_tokens") or run_tokens))
    batch_factor = math.sqrt(global_batch_size / sequences)
    return {
        "n_layer": n_layer,
        "n_embd": width,
        "n_head": heads,
        "batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_iters": steps,
        "lr_decay_iters": max(1, steps),
        "muon_learning_rate": round_to_digits(muon_lr(tokens) * batch_factor),
        "muon_weight_decay": round_to_digits(muon_weight_decay(tokens)),
        "learning_rate": round_to_digits(adam_lr(width) * batch_factor),
    }
