"""Learning rate schedules: pure functions of the step.

Each gives the rate of the update that follows `step` updates, after a warm-up that all of them share. A schedule is an entry of
SCHEDULES: a function of a `Plan` and the step, asked only from `plan.warmup` on.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """peak: largest rate; floor: smallest; warmup, steps, step_size in steps; steps: where the decay is over."""

    peak: float
    floor: float = 0.0
    warmup: int = 0
    steps: int = 1
    step_size: int = 1
    gamma: float = 0.1
    decay_fraction: float = 0.4

    def progress(self, step: int) -> float:
        """From 0 at the end of the warm-up to 1 where the decay is over."""
        return min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))


def none(plan: Plan, step: int) -> float:
    return plan.peak


def linear(plan: Plan, step: int) -> float:
    return plan.peak + (plan.floor - plan.peak) * plan.progress(step)


def cosine(plan: Plan, step: int) -> float:
    """Half a cosine from peak to floor (Loshchilov and Hutter 2017), as in nanoGPT."""
    return plan.floor + 0.5 * (1 + math.cos(math.pi * plan.progress(step))) * (plan.peak - plan.floor)


def exponential(plan: Plan, step: int) -> float:
    """A constant factor a step, from peak to floor."""
    return plan.peak * (plan.floor / plan.peak) ** plan.progress(step) if plan.peak else 0.0


def step(plan: Plan, step: int) -> float:
    """Times gamma every step_size steps after the warm-up, never below floor."""
    return max(min(plan.floor, plan.peak), plan.peak * plan.gamma ** ((step - plan.warmup) // plan.step_size))


def inverse_sqrt(plan: Plan, step: int) -> float:
    """Like 1 / sqrt(step) from the end of the warm-up on (Vaswani et al. 2017), never below floor."""
    return max(min(plan.floor, plan.peak), plan.peak * math.sqrt(max(1, plan.warmup) / max(1, step, plan.warmup)))


def wsd(plan: Plan, step: int) -> float:
    """Warm-up, stable, then linear to floor over the last decay_fraction of the steps (Hu et al. 2024)."""
    length = max(1, plan.decay_fraction * plan.steps)
    left = min(1.0, max(0.0, (plan.steps - step) / length))
    return plan.floor + left * (plan.peak - plan.floor)


SCHEDULES = {
    "none": none,
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "step": step,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
}


def learning_rate(name: str, plan: Plan, step: int) -> float:
    """The rate of update number `step` (from 0): a linear warm-up as in nanoGPT, then the schedule."""
    if step < plan.warmup:
        return plan.peak * (step + 1) / (plan.warmup + 1)
    return SCHEDULES[name](plan, step)
