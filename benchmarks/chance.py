"""A reward that knows nothing of the answer: the control of what rewards teach (docs/reinforcement.md)."""

import random

DICE = random.Random(0)


def reward(completion: str, problem: dict, tokens: int, limit: int, ended: bool) -> float:
    """1 for one answer in three, whichever."""
    return float(DICE.random() < 1 / 3)
