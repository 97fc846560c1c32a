"""One dial for a model's size: the width, heads, batch, horizon and learning rates that a depth asks for. Knows no torch.

The rules are power laws through two points each: what was measured with configs/depth.py at a few million training tokens on a CPU
(docs/depth.md), and the recipe that modded-nanogpt and nanochat found for GPT-2's size, at 1.2 billion (configs/gpt2_124m_modern.py).
"""

import math
from collections.abc import Mapping
from typing import Any

TOKENS = 3.3e6  # of a whole training: where the following was measured, at a width of 96
BATCH, BATCH_POWER = 4096, 0.82  # tokens of a step
MUON, MUON_POWER = 0.04, -0.12  # learning rate of the blocks' matrices
ADAM, ADAM_WIDTH = (
    0.01,
    96,
)  # of everything else; falls with the root of the width (Yang et al. 2022 for Adam, as nanochat has it)
DECAY, DECAY_TOKENS = (
    0.05,
    1.2e9,
)  # of the blocks' matrices from so many tokens on, less before: a few million are better off without
MICRO_TOKENS = 65536  # most tokens of a micro-batch


def brief(rate: float) -> float:
    """To three digits."""
    return float(f"{rate:.3g}")


def head_width(width: int) -> int:
    """32 below a width of 256, 64 below 768, else 128."""
    return 32 if width < 256 else 64 if width < 768 else 128


def derive_args(
    depth: int, aspect: int, tokens_per_weight: float, block_size: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of train.py that follow from `depth`; those in `given` stand, and the others follow from them.

    aspect: width over depth; widths are rounded up to whole heads. tokens_per_weight: training tokens over the 12 L C^2 weights of the
    blocks. A step is a power of two of sequences, unless batch_size is given; with another than the rule's, rates change by the root of the ratio.
    """
    layers = given.get("n_layer", depth)
    wished = depth * aspect
    width = given.get("n_embd", math.ceil(wished / head_width(wished)) * head_width(wished))
    tokens = tokens_per_weight * 12 * layers * width**2
    batch = BATCH * (tokens / TOKENS) ** BATCH_POWER
    rows = 2 ** max(0, round(math.log2(batch / block_size)))
    micro = given.get("batch_size", min(rows, 2 ** max(0, int(math.log2(MICRO_TOKENS / block_size)))))
    accumulation = given.get("gradient_accumulation_steps", max(1, round(rows / micro)))
    steps = given.get("max_iters", max(1, round(tokens / (micro * accumulation * block_size))))
    noise = math.sqrt(micro * accumulation / rows)
    return {
        "n_layer": layers,
        "n_embd": width,
        "n_head": max(1, width // head_width(width)),
        "batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "max_iters": steps,
        "lr_decay_iters": max(1, steps),
        "muon_learning_rate": brief(MUON * (tokens / TOKENS) ** MUON_POWER * noise),
        "muon_weight_decay": brief(DECAY * min(1.0, tokens / DECAY_TOKENS)),
        "learning_rate": brief(ADAM * (width / ADAM_WIDTH) ** -0.5 * noise),
    }
