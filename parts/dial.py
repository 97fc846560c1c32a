"""One dial for a model's size: the width, heads, batch, horizon and learning rates that a depth asks for.

The forms of the rules are those of nanochat (Karpathy 2025); their constants were measured with configs/depth.py on a CPU (docs/scaling.md).
Knows no torch.
"""

import math
from collections.abc import Mapping
from typing import Any

BATCH, BATCH_TOKENS, BATCH_POWER = 8192, 8e6, 0.4  # so many tokens a step are right for so many of training, and how they grow with them
MUON, ADAM, ADAM_WIDTH = 0.02, 0.01, 128  # learning rates at BATCH tokens a step, AdamW's at that width
MICRO_TOKENS = 65536  # most tokens of a micro-batch


def brief(rate: float) -> float:
    """To three digits."""
    return float(f"{rate:.3g}")


def head_width(width: int) -> int:
    """32 below a width of 256, 64 below 768, else 128."""
    return 32 if width < 256 else 64 if width < 768 else 128


def turned(depth: int, aspect: int, tokens_per_weight: float, block_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of train.py that follow from `depth`; those in `given` stand, and the others follow from them.

    aspect: width over depth; widths are rounded up to whole heads. tokens_per_weight: training tokens over the 12 L C^2 weights of the blocks.
    """
    layers = given.get("n_layer", depth)
    wished = depth * aspect
    width = given.get("n_embd", math.ceil(wished / head_width(wished)) * head_width(wished))
    tokens = tokens_per_weight * 12 * layers * width**2
    rows = 2 ** max(0, round(math.log2(BATCH * (tokens / BATCH_TOKENS) ** BATCH_POWER / block_size)))  # of a step
    micro = given.get("batch_size", min(rows, 2 ** max(0, int(math.log2(MICRO_TOKENS / block_size)))))
    accumulation = given.get("gradient_accumulation_steps", max(1, round(rows / micro)))
    step = micro * accumulation * block_size
    steps = given.get("max_iters", max(1, round(tokens / step)))
    noise = math.sqrt(step / BATCH)
    return {
        "n_layer": layers,
        "n_embd": width,
        "n_head": width // head_width(width),
        "batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "max_iters": steps,
        "lr_decay_iters": max(1, steps),
        "muon_learning_rate": brief(MUON * noise),
        "learning_rate": brief(ADAM * noise * (width / ADAM_WIDTH) ** -0.5),
    }
