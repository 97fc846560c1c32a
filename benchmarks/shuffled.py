"""Rewards earned by other completions: the control of what rewards teach (docs/reinforcement.md).

python train.py ... --reward=benchmarks.shuffled:reward
"""

import random
from typing import Any

from nanoforge.posttraining.rewards import Sample, correct_reward

RNG = random.Random(0)
# The rewards that wait to be dealt, as many as a step has completions; at first a third of them are ones.
POOL = [1.0] * 85 + [0.0] * 171


def reward(*fields: Any) -> float:
    """The reward of an earlier completion, drawn from the pool; this completion's own reward takes its place."""
    index = RNG.randrange(len(POOL))
    drawn = POOL[index]
    POOL[index] = correct_reward(Sample(*fields))
    return drawn
