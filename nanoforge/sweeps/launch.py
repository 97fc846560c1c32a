"""Starts planned runs: on this machine with local.py, by Slurm with slurm.py. Knows no argument by name."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanoforge import run_state
from nanoforge.run_state import RunStatus
from nanoforge.sweeps import local, plan, slurm
from nanoforge.sweeps.grid import Point
from nanoforge.sweeps.plan import PlannedRun, Scripts
from nanoforge.sweeps.search import TPESearch, Trial

# ---------------------------------------------------------------------------------------------------------------------
# on this machine


def build_task(run: PlannedRun, scripts: Scripts, n_processes: int, data: Any = None) -> local.Task:
    return local.Task(
        name=run.name,
        folder=run.folder,
        commands=lambda: plan.remaining_commands(run, scripts, n_processes),
        environment=run.job.environment,
        data=data,
    )


def print_start(task: local.Task) -> None:
    print(f"starts {task.name}", flush=True)


def print_end(attempt: local.Attempt, counter: str) -> RunStatus:
    """Print a line about an attempt that has ended; the run's status."""
    status = run_state.run_status(attempt.task.folder)
    line = f"{counter} {attempt.task.name}: "
    if attempt.locked_elsewhere:
        line += "is run by another process"
    elif status.reason and status.state != "done":
        line += f"{status.state} ({status.reason})"
    else:
        line += status.state
    if status.best_val_reward is not None:
        line += f", val_reward {status.best_val_reward:.4f}"
    elif status.best_val_loss is not None:
        line += f", val_loss {status.best_val_loss:.4f}"
    if attempt.exit_status is not None:
        line += f" in {attempt.seconds:.0f}s"
    print(line, flush=True)
    return status


class GridLauncher:
    """Runs a list of runs, in order."""

    def __init__(self, runs: list[PlannedRun], n_total: int, scripts: Scripts):
        self.queue = iter(runs)
        self.n_total = n_total  # runs of the sweep, those that are done included
        self.n_ended = n_total - len(runs)
        self.scripts = scripts

    def run(self, slots: local.Slots) -> int:
        """Run them all; 0, or the signal that ended the sweep."""

        def next_task() -> local.Task | None:
            run = next(self.queue, None)
            return build_task(run, self.scripts, slots.processes_per_task) if run else None

        return local.run_tasks(slots, local.Callbacks(next_task, print_start, self.on_end))

    def on_end(self, attempt: local.Attempt) -> None:
        self.n_ended += 1
        print_end(attempt, f"[{self.n_ended}/{self.n_total}]")


class TPELauncher:
    """Runs the points that a search proposes, and reports to it how their runs end."""

    def __init__(self, search: TPESearch, plan_point: Callable[[Point], PlannedRun], scripts: Scripts):
        self.search = search
        self.plan_point = plan_point
        self.scripts = scripts

    def run(self, slots: local.Slots) -> int:
        """Run the search to its end; 0, or the signal that ended the sweep."""

        def next_task() -> local.Task | None:
            proposal = self.search.ask()
            if proposal is None:
                return None
            trial, point = proposal
            return build_task(self.plan_point(point), self.scripts, slots.processes_per_task, data=trial)

        callbacks = local.Callbacks(next_task, print_start, self.on_end, self.should_prune)
        return local.run_tasks(slots, callbacks)

    def should_prune(self, attempt: local.Attempt) -> bool:
        status = run_state.run_status(attempt.task.folder)
        return self.search.should_prune(attempt.task.data, status.evaluations)

    def on_end(self, attempt: local.Attempt) -> None:
        trial: Trial = attempt.task.data
        if attempt.pruned and attempt.exit_status:
            (attempt.task.folder / run_state.PRUNED_FILE).touch()
        status = print_end(attempt, f"[trial {trial.number + 1}]")
        loss = status.best_val_loss if status.state == "done" else None
        self.search.finish(trial, loss, pruned=status.state in ("pruned", "diverged"))


# ---------------------------------------------------------------------------------------------------------------------
# by Slurm


@dataclass(frozen=True)
class SlurmLauncher:
    """Writes scripts for runs into a folder, and hands them to sbatch."""

    folder: Path
    sweep_name: str
    scripts: Scripts
    is_array: bool
    max_at_once: int  # tasks of an array (0: all)

    @property
    def log_dir(self) -> Path:
        return self.folder / "logs"

    def launch(self, runs: list[PlannedRun], *, submit: bool) -> None:
        """Write the scripts of the runs, submit them if asked to, and print their paths. Raises UserError."""
        if runs:
            slurm.remove_scripts(self.folder)
        jobs = slurm.Jobs(self.folder / slurm.JOBS_FILE)
        for name, group in self.groups(runs).items():
            training, evaluations = self.write_scripts(name, group)
            if submit:
                job = slurm.submit(training)
                jobs.update({run.name: f"{job}_{i}" if self.is_array else job for i, run in enumerate(group)})
                for evaluation in evaluations:
                    slurm.submit(evaluation, after_job=job, is_array=self.is_array)
                print(f"job {job}: {training}")
            else:
                print(training)
            for evaluation in evaluations:
                print(f"    then {evaluation}")

    def groups(self, runs: list[PlannedRun]) -> dict[str, list[PlannedRun]]:
        """Name of a script -> its runs: each run alone, or in an array all that share directives and evaluations."""
        if not self.is_array:
            return {run.name: [run] for run in runs}
        groups: dict[str, list[PlannedRun]] = {}
        for run in runs:
            groups.setdefault(json.dumps([run.job, run.evaluations]), []).append(run)
        if len(groups) == 1:
            return {"array": runs}
        return {f"array-{number}": group for number, group in enumerate(groups.values(), 1)}

    def write_scripts(self, name: str, group: list[PlannedRun]) -> tuple[Path, list[Path]]:
        """Write the script that trains a group of runs, and those of the evaluations that follow; their paths."""
        training = slurm.Script(
            name=self.sweep_name if self.is_array else name,
            job=group[0].job,
            folders=[run.folder for run in group],
            log_dir=self.log_dir,
            is_array=self.is_array,
            max_at_once=self.max_at_once,
            is_one_of_several=any(run.varying for run in group),
        )
        path = self.folder / f"{name}.sh"
        path.write_text(slurm.training_script(training, self.scripts.train), encoding="utf-8")
        evaluation_paths = []
        for output, flags in group[0].evaluations.items():
            evaluation = replace(training, name=f"evaluate-{name}")
            evaluation_path = self.folder / f"{name}.{Path(output).stem}.sh"
            text = slurm.evaluation_script(evaluation, self.scripts.evaluate, output, flags)
            evaluation_path.write_text(text, encoding="utf-8")
            evaluation_paths.append(evaluation_path)
        return path, evaluation_paths
