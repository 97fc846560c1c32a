"""Learning rate schedules: pure functions of the step. Each gives the learning rate over its peak.

All share a linear warmup; a schedule is asked only for steps from `warmup` on. A step is the number of updates made
before. A new schedule is one function and its entry in SCHEDULES; it names the values that it needs:

    warmup          steps of the warmup
    steps           where the decay ends
    floor           smallest value, as a part of the peak
    step_size       steps between two drops
    gamma           factor of a drop
    decay_fraction  part of the steps in which wsd decays
"""

import functools
import inspect
import math
from collections.abc import Callable


def progress(step: int, warmup: int, steps: int) -> float:
    """From 0 at the end of the warmup to 1 where the decay ends."""
    return min(1.0, (step - warmup) / max(1, steps - warmup))


def constant(step: int) -> float:
    return 1.0


def linear(step: int, warmup: int, steps: int, floor: float) -> float:
    return 1.0 + (floor - 1.0) * progress(step, warmup, steps)


def cosine(step: int, warmup: int, steps: int, floor: float) -> float:
    """Half a cosine (Loshchilov and Hutter 2017), as in nanoGPT."""
    return floor + 0.5 * (1 + math.cos(math.pi * progress(step, warmup, steps))) * (1.0 - floor)


def exponential(step: int, warmup: int, steps: int, floor: float) -> float:
    """The same factor every step, down to the floor."""
    return floor ** progress(step, warmup, steps)


def step_decay(step: int, warmup: int, floor: float, step_size: int, gamma: float) -> float:
    """Times gamma every step_size steps after the warmup, never below the floor."""
    return max(floor, gamma ** ((step - warmup) // step_size))


def inverse_sqrt(step: int, warmup: int, floor: float) -> float:
    """Like 1 / sqrt(step) after the warmup (Vaswani et al. 2017), never below the floor."""
    return max(floor, math.sqrt(max(1, warmup) / max(1, step, warmup)))


def wsd(step: int, warmup: int, steps: int, floor: float, decay_fraction: float) -> float:
    """Warmup, stable, decay: linear to the floor over the last decay_fraction of the steps (Hu et al. 2024).

    The decay begins after the warmup, from the peak.
    """
    decay_steps = max(1, min(decay_fraction * steps, steps - warmup))
    remaining = min(1.0, max(0.0, (steps - step) / decay_steps))
    return floor + remaining * (1.0 - floor)


SCHEDULES: dict[str, Callable[..., float]] = {
    "none": constant,
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "step": step_decay,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
}


TO_ZERO = "--min_lr=0; the warm-up is --warmup_iters"
# Names of transformers' get_scheduler and of its functions -> what to use instead; the last part may be with_warmup.
OTHER_NAMES = {
    "constant": "use --lr_scheduler=none; the warm-up is --warmup_iters",
    "linear": f"use --lr_scheduler=linear {TO_ZERO}",
    "cosine": f"use --lr_scheduler=cosine {TO_ZERO}",
    "cosine_with_min_lr": "use --lr_scheduler=cosine with --min_lr; the warm-up is --warmup_iters",
    "cosine_warmup_with_min_lr": "use --lr_scheduler=cosine with --min_lr; the warm-up is --warmup_iters",
    "cosine_with_restarts": f"there are no restarts; use --lr_scheduler=cosine {TO_ZERO}",
    "cosine_with_hard_restarts": f"there are no restarts; use --lr_scheduler=cosine {TO_ZERO}",
    "polynomial": f"of power 1 it is --lr_scheduler=linear {TO_ZERO}",
    "polynomial_decay": f"of power 1 it is --lr_scheduler=linear {TO_ZERO}",
    "inverse_sqrt": "use --lr_scheduler=inverse_sqrt",
    "wsd": "use --lr_scheduler=wsd with --wsd_decay_fraction",
    "warmup_stable_decay": "use --lr_scheduler=wsd with --wsd_decay_fraction",
    "reduce_lr_on_plateau": "no schedule here depends on losses; use --lr_scheduler=cosine, or --early_stop_patience",
    "reduce_on_plateau": "no schedule here depends on losses; use --lr_scheduler=cosine, or --early_stop_patience",
    "greedy": "no schedule here depends on losses; use --lr_scheduler=cosine, or --early_stop_patience",
}


def other_names() -> dict[str, str]:
    """OTHER_NAMES in all their forms: linear_schedule_with_warmup, get_linear_schedule_with_warmup and the like."""
    ends = ("", "_schedule", "_with_warmup", "_schedule_with_warmup")
    forms = {
        f"{start}{name}{end}": hint for name, hint in OTHER_NAMES.items() for end in ends for start in ("", "get_")
    }
    return {name: hint for name, hint in forms.items() if name not in SCHEDULES}


def make_schedule(name: str, *, warmup: int, **values: float) -> Callable[[float], float]:
    """step -> learning rate over its peak: a linear warmup as in nanoGPT, then the schedule.

    values: at least those that the schedule names as its parameters.
    """
    values["warmup"] = warmup
    parameters = inspect.signature(SCHEDULES[name]).parameters.keys() - {"step"}
    after_warmup = functools.partial(SCHEDULES[name], **{parameter: values[parameter] for parameter in parameters})

    def scale(step: float) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return after_warmup(step)

    return scale


def schedule_remarks(
    scale: Callable[[int], float], *, peak: float, warmup: int, decay_end: int | None, steps: int
) -> list[str]:
    """What of its schedule a run of so many steps does not reach, or outlives.

    scale, warmup: as make_schedule's. peak: the learning rate that is scaled. decay_end: None where nothing decays to a
    fixed step.
    """
    if steps < 1:
        return []
    last_lr = f"{peak * scale(steps - 1):.3g}"
    if steps <= warmup:
        return [
            f"--warmup_iters={warmup}: the run ends after {steps} steps, within its warm-up; "
            f"its last learning rate is {last_lr}, its peak would be {peak:.3g}"
        ]
    if decay_end is not None and steps < decay_end:
        return [
            f"--lr_decay_iters={decay_end}: the run ends after {steps} steps, before its decay does; "
            f"its last learning rate is {last_lr}"
        ]
    if decay_end is not None and steps > decay_end:
        return [
            f"--lr_decay_iters={decay_end}: the decay ends before the run; "
            f"from there to step {steps} the learning rate is {last_lr}"
        ]
    return []
