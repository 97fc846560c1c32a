"""How fast a run goes through its schedule: one position a step, or as the clock asks. Imports no torch.

A schedule is written for `length` steps. A run with a time budget may have more steps or fewer: what counts is that its
schedule ends when its time does. So the position in the schedule is a piecewise linear function of the step. Its knots
are added while the run goes on. At each of them the steps that remain are the remaining seconds over the seconds of a
step, and from there the position goes straight to the end of the schedule.

                      knot: a step takes three times as long
    position  0 ------*-----------------> length
    step      0      40                80          (at first 120 steps were expected)

The position of a step follows from the knots alone, and they are saved with the run. So a resumed run goes on as one
that was never stopped.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

INTERVAL = 0.02  # of the budget: between two knots, and over which the time of a step is averaged
LAST_INTERVAL = 0.1  # of the steps that remain: knots become dense towards the end
FIRST_STEPS = 3  # their time is not averaged, since they warm up, or wait for the compiler


class Knot(NamedTuple):
    """What was planned at a step."""

    step: int
    end: int  # the step at which the schedule ends, as foreseen here
    seconds: float  # of training before it
    paused: float  # seconds of these for evaluations and checkpoints
    step_seconds: float  # expected of a step from here on
    next_step: int  # of the next knot


class Pace:
    """The pace of a run without a time budget: the position is the step."""

    def __init__(self, length: int) -> None:
        """length: steps of the schedule."""
        self.length = length

    @property
    def end(self) -> int:
        """The step at which the schedule ends, as far as is known."""
        return self.length

    def position(self, step: int) -> float:
        """The place in the schedule, from 0 to `length`, of a step."""
        return step

    def plan(self, step: int, clock: Callable[[], float]) -> None:
        """Plan the steps that remain, where that is due. clock: seconds of training so far, the same on all ranks."""

    def pausing(self, clock: Callable[[], float]) -> contextlib.AbstractContextManager[None]:
        """Around what takes time and is no step: an evaluation, or a checkpoint."""
        return contextlib.nullcontext()

    def state(self, seconds: float) -> dict[str, Any]:
        """What a checkpoint holds. seconds: of training so far."""
        return {}


class TimedPace(Pace):
    """The pace of a run whose schedule ends after `budget` seconds, those of evaluations and checkpoints among them."""

    def __init__(
        self, length: int, budget: float, *, step_seconds: float, eval_interval: int, state: Mapping[str, Any]
    ) -> None:
        """step_seconds: expected of the first steps. eval_interval: steps between evaluations. state: of a checkpoint,
        or empty."""
        super().__init__(length)
        self.budget = budget
        self.first_step_seconds = step_seconds
        self.eval_interval = eval_interval
        self.paused: float = state.get("paused", 0.0)
        self.longest_pause: float = state.get("longest_pause", 0.0)
        self.pause_began: float | None = None
        self.knots: tuple[Knot, ...] = ()
        self.line = (0, 0.0, length)  # (step, position, end): from this step the position goes straight to the end
        for knot in state.get("knots", ()):
            self.add(Knot(*knot))

    def state(self, seconds: float) -> dict[str, Any]:
        pause = 0.0 if self.pause_began is None else seconds - self.pause_began
        return {
            "knots": [list(knot) for knot in self.knots],
            "paused": self.paused + pause,
            "longest_pause": max(self.longest_pause, pause),
        }

    @property
    def end(self) -> int:
        return self.line[2]

    def position(self, step: int) -> float:
        start, position, end = self.line
        if step >= end:
            return self.length
        return position + (self.length - position) * (step - start) / (end - start)

    def add(self, knot: Knot) -> None:
        """Bend the line at a knot, where it has come by then."""
        self.line = (knot.step, self.position(knot.step), knot.end)
        self.knots = (*self.knots, knot)

    @contextlib.contextmanager
    def pausing(self, clock: Callable[[], float]) -> Iterator[None]:
        self.pause_began = clock()
        yield
        pause = clock() - self.pause_began
        self.pause_began = None
        self.paused += pause
        self.longest_pause = max(self.longest_pause, pause)

    def plan(self, step: int, clock: Callable[[], float]) -> None:
        if self.knots and (step < self.knots[-1].next_step or step >= self.end):
            return
        seconds = clock()

        # 1. The seconds of a step: of the last ones, and before.
        step_seconds = self.first_step_seconds
        if self.knots:
            step_seconds = average_step_seconds(
                self.knots[-1], step, seconds, self.paused, window=INTERVAL * self.budget
            )

        # 2. The steps that remain, besides the evaluations between them and at the end.
        left = self.budget - seconds - self.longest_pause
        end = step + count_steps(
            left,
            step_seconds,
            first=self.eval_interval - step % self.eval_interval,
            interval=self.eval_interval,
            pause=self.longest_pause,
        )

        # 3. The next knot.
        n_steps = min(INTERVAL * self.budget / step_seconds, LAST_INTERVAL * (end - step), max(FIRST_STEPS, step))
        next_step = step + max(1, round(n_steps))
        self.add(Knot(step, end, seconds, self.paused, step_seconds, next_step))


def count_steps(seconds: float, step_seconds: float, *, first: int, interval: int, pause: float) -> int:
    """The steps that fit into some seconds, with a pause after the `first` ones and then after every `interval`."""
    if seconds <= first * step_seconds + pause:
        return max(0, min(first, round(seconds / step_seconds)))
    n_intervals, seconds = divmod(seconds - first * step_seconds - pause, interval * step_seconds + pause)
    return first + int(n_intervals) * interval + min(interval, round(seconds / step_seconds))


def average_step_seconds(last: Knot, step: int, seconds: float, paused: float, *, window: float) -> float:
    """Seconds of a step, averaged over about `window` seconds: those since the last knot weigh as long as they took.

    The run's first steps weigh nothing.
    """
    stepping = (seconds - last.seconds) - (paused - last.paused)
    if last.step == 0 or stepping <= 0:
        return last.step_seconds
    weight = 1 - math.exp(-stepping / window)
    return weight * stepping / (step - last.step) + (1 - weight) * last.step_seconds
