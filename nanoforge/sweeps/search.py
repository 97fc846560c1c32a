"""Hyperparameter search with optuna: TPE proposes points of a grid, the median of the other trials prunes.

The study is a file. An interrupted search continues: first with the trials that had not ended, then with new ones.
Knows nothing of training; imports optuna only when a search is made.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge.errors import UserError
from nanoforge.sweeps.grid import Axis, Canonical, Grid, Point, Range, argument_names, is_excluded

Trial = Any  # optuna.trial.Trial
FrozenTrial = Any  # optuna.trial.FrozenTrial: a trial in the study, read only
Distribution = Any  # optuna.distributions.BaseDistribution

SPACE_KEY = "search"  # attribute of a study: SearchSpace.describe()
STARTUP_TRIALS = 5  # before any is pruned
SEED_STRIDE = 1_000_003  # a continued search samples with another seed, so it proposes other points than at first
MAX_PROPOSALS = 1000  # in a row that `exclude` may reject


def different_names(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names that two descriptions of a search don't agree on, in the order of the second."""
    names = dict.fromkeys([*now, *recorded])
    return [name for name in names if name not in recorded or name not in now or recorded[name] != now[name]]


class Search(NamedTuple):
    """What --search asks for: random:N or tpe:N."""

    method: str
    n_points: int


def parse_search(text: str) -> Search | None:
    """The search of a text such as tpe:40, or None if it is not one."""
    method, _, count = text.partition(":")
    if method in ("random", "tpe") and count.isdigit() and int(count) > 0:
        return Search(method, int(count))
    return None


def drop_unfinished_line(path: Path) -> None:
    """Cut the end of a journal whose writer was killed within a line; one that still writes is given a second."""
    if not path.exists() or path.read_bytes()[-1:] in (b"", b"\n"):
        return
    size = path.stat().st_size
    time.sleep(1)
    if path.stat().st_size == size:
        with path.open("r+b") as file:
            file.truncate(path.read_bytes().rfind(b"\n") + 1)


@dataclass(frozen=True)
class SearchSpace:
    """What is searched: a grid, and the arguments of all its runs that don't vary, by which a study knows it again."""

    grid: Grid
    fixed: dict[str, Any]
    canonical: Canonical

    def describe(self) -> dict[str, Any]:
        """The fixed arguments and the axes, by name, as JSON has them."""
        described = dict(self.fixed)
        for axis in self.grid.axes:
            if isinstance(axis, Range):
                described[axis.name] = {"low": axis.low, "high": axis.high, "log": axis.log}
            else:
                described[" and ".join(argument_names(axis))] = [
                    [self.canonical(name, value) for name, value in choice.values.items()] for choice in axis
                ]
        return json.loads(json.dumps(described, default=str))


class TPESearch:
    """A study of `n_trials` in the file `path`. Raises UserError without optuna, or if it belongs to another search."""

    def __init__(self, path: Path, space: SearchSpace, n_trials: int, seed: int):
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ModuleNotFoundError:
            raise UserError("--search=tpe: needs a package: pip install optuna") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna = optuna
        self.grid = grid = space.grid
        self.n_trials = n_trials
        self.canonical = space.canonical
        self.axes: dict[str, Axis] = {}
        for i, axis in enumerate(grid.axes):
            self.axes[axis.name if isinstance(axis, Range) else f"axis {i}"] = axis
        self.space = {name: self.distribution(axis) for name, axis in self.axes.items()}

        # 1. Open the study, or begin it.
        drop_unfinished_line(path)
        try:
            self.study = optuna.create_study(
                storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))),
                pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
                study_name="sweep",
                load_if_exists=True,
            )
        except json.JSONDecodeError:
            raise UserError(f"{path}: damaged; choose another --out_dir, or move it away to search anew") from None
        trials = self.trials()
        self.study.sampler = optuna.samplers.TPESampler(seed=seed + SEED_STRIDE * len(trials), constant_liar=True)
        described = space.describe()
        if SPACE_KEY not in self.study.user_attrs and not trials:
            self.study.set_user_attr(SPACE_KEY, described)
        differences = different_names(self.study.user_attrs.get(SPACE_KEY, {}), described)
        if differences:
            raise UserError(
                f"{path}: belongs to a search with another {', '.join(differences)}; "
                "set them as they were, or choose another --out_dir"
            )

        # 2. What is left of an interrupted search.
        states = optuna.trial.TrialState
        self.unfinished: list[Trial] = [
            optuna.trial.Trial(self.study, trial._trial_id)
            for trial in trials
            if trial.state == states.RUNNING and trial.params
        ]
        self.numbers = [trial.number for trial in trials if trial.state != states.FAIL]  # of the trials that count

    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def distribution(self, axis: Axis) -> Distribution:
        """Where optuna samples an axis; a choice by its index."""
        distributions = self.optuna.distributions
        if not isinstance(axis, Range):
            return distributions.CategoricalDistribution(range(len(axis)))
        if axis.is_integer:
            return distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        return distributions.FloatDistribution(axis.low, axis.high, log=axis.log)

    def point(self, params: dict[str, Any]) -> Point:
        """The point of a trial's parameters."""
        choices = []
        for name, axis in self.axes.items():
            if isinstance(axis, Range):
                choices.append(axis.choice(params[name]))
            else:
                choices.append(axis[params[name]])
        return self.grid.point(choices)

    def points(self) -> list[Point]:
        """The points of all trials so far."""
        numbers = set(self.numbers)
        return [self.point(trial.params) for trial in self.trials() if trial.number in numbers and trial.params]

    def ask(self) -> tuple[Trial, Point] | None:
        """The next trial and its point, or None after enough. Raises UserError if `exclude` leaves almost no point."""
        if self.unfinished:
            trial = self.unfinished.pop(0)
            return trial, self.point(trial.params)
        for _ in range(MAX_PROPOSALS):
            if len(self.numbers) >= self.n_trials:
                return None
            trial = self.study.ask(self.space)
            point = self.point(trial.params)
            if not is_excluded(self.grid, point, self.canonical):
                self.numbers.append(trial.number)
                return trial, point
            self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        raise UserError("exclude: leaves almost no point to search")

    def should_prune(self, trial: Trial, evaluations: tuple[tuple[int, float], ...]) -> bool:
        """Report a trial's (step, val_loss) so far; whether the trial is worse than the median of the others."""
        reported = self.trials()[trial.number].intermediate_values
        after_training = [
            (step, loss) for step, loss in evaluations if step > 0
        ]  # step 0 evaluates the initial weights
        for step, loss in after_training:
            if step not in reported:
                trial.report(loss, step)
        return bool(after_training) and trial.should_prune()

    def finish(self, trial: Trial, loss: float | None, *, pruned: bool) -> None:
        """Record how a trial ended; one that diverged counts as pruned, which is worse than any that was not.

        Without a loss it failed or was stopped, and stays open for the next search.
        """
        if pruned:
            self.study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
        elif loss is not None:
            self.study.tell(trial, loss)
