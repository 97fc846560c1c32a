"""Rewards that answers have earned, dealt out to other ones: the control of what rewards teach (docs/reinforcement.md)."""

import random

from nanoforge.posttraining import tasks

DICE = random.Random(0)
POOL = [1.0] * 85 + [
    0.0
] * 171  # the rewards that wait to be dealt, as many as a step has answers; at first a third of them are ones


def reward(completion: str, problem: dict, tokens: int, limit: int, ended: bool) -> float:
    """The reward of an earlier answer, any; this one's own takes its place."""
    place = DICE.randrange(len(POOL))
    dealt, POOL[place] = POOL[place], tasks.correct(completion, problem, tokens, limit, ended)
    return dealt
