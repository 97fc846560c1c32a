"""Hyper-parameter search with optuna: TPE proposes points of a grid, the median of the others prunes. Knows nothing of training.

The study is a file: a search that was interrupted goes on, first with the trials that had not ended. optuna is imported only where it is used.
"""

from pathlib import Path
from typing import Any

from nanoforge.errors import UserError
from nanoforge.sweeps.grid import Grid, Point, Range, excluded, merged

STARTUP = 5  # trials before any is pruned


class Tpe:
    """A study of `count` trials in the file `path`."""

    def __init__(self, path: Path, grid: Grid, count: int, seed: int, normal):
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ModuleNotFoundError:
            raise UserError("--search=tpe: needs a package: pip install optuna") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.grid, self.count, self.normal = optuna, grid, count, normal
        made = {f"axis {i}" if not isinstance(axis, Range) else axis.name: axis for i, axis in enumerate(grid.axes)}
        d = optuna.distributions
        self.axes = made
        self.space: dict[str, Any] = {
            name: d.CategoricalDistribution(range(len(axis))) if not isinstance(axis, Range)
            else (d.IntDistribution if axis.whole else d.FloatDistribution)(axis.low, axis.high, log=axis.log) for name, axis in made.items()
        }  # fmt: skip
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP)
        self.study = optuna.create_study(storage=storage, pruner=pruner, study_name="sweep", load_if_exists=True)
        state = optuna.trial.TrialState
        told = self.study.get_trials(deepcopy=False)
        self.study.sampler = optuna.samplers.TPESampler(
            seed=seed + 1_000_003 * len(told), constant_liar=True
        )  # going on, it proposes other points than at first
        if any(trial.distributions and trial.distributions != self.space for trial in told):
            raise UserError(f"{path}: is of a search of another grid; take another --out_dir")
        self.unfinished = [
            optuna.trial.Trial(self.study, trial._trial_id)
            for trial in told
            if trial.state == state.RUNNING and trial.params
        ]
        self.numbers = [trial.number for trial in told if trial.state != state.FAIL]

    def point(self, params: dict[str, Any]) -> Point:
        """The point of a trial's parameters; numbers to three digits."""
        choice = merged(
            tuple(
                axis.choice(params[name]) if isinstance(axis, Range) else axis[params[name]]
                for name, axis in self.axes.items()
            )
        )
        return Point({**self.grid.fixed, **choice.values}, choice.told)

    def points(self) -> list[Point]:
        """Those of all trials so far."""
        return [
            self.point(trial.params)
            for trial in self.study.get_trials(deepcopy=False)
            if trial.number in set(self.numbers) and trial.params
        ]

    def ask(self):
        """The next trial and its point, or None when there were enough."""
        if self.unfinished:
            trial = self.unfinished.pop(0)
            return trial, self.point(trial.params)
        for _ in range(1000):
            if len(self.numbers) >= self.count:
                return None
            trial = self.study.ask(self.space)
            point = self.point(trial.params)
            if not any(excluded(point, item, self.normal) for item in self.grid.exclude):
                self.numbers.append(trial.number)
                return trial, point
            self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        raise UserError("exclude: leaves next to no point to search")

    def prune(self, trial, evaluations: tuple[tuple[int, float], ...]) -> bool:
        """Tell what a trial has reached; whether to give it up."""
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        learned = [(step, loss) for step, loss in evaluations if step]  # not what the weights begin with
        for step, loss in learned:
            if step not in known:
                trial.report(loss, step)
        return bool(learned) and trial.should_prune()

    def tell(self, trial, loss: float | None, pruned: bool) -> None:
        """Tell how a trial ended; one that failed or was stopped stays open, for the next time."""
        if pruned:
            self.study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
        elif loss is not None:
            self.study.tell(trial, loss)
