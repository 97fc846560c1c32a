"""The runs of a sweep: their folders and configs, the commands that are left to run, their states.

Knows no argument by name and starts nothing: sweep.py makes the runs, local.py and slurm.py start them.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge import run_state
from nanoforge.console import format_value
from nanoforge.files import write_json
from nanoforge.run_state import RunStatus
from nanoforge.sweeps import grid, slurm, summary

VARYING_KEY = "_told"  # in run.json; no config reads names with an underscore
EFFECTIVE_KEY = "_all"


class Scripts(NamedTuple):
    """The programs that a run consists of."""

    train: Path
    evaluate: Path


@dataclass(frozen=True)
class PlannedRun:
    """One run: its folder, its arguments for train.py, and how it is started."""

    folder: Path
    varying: dict[str, Any]  # column -> value, of what varies in the sweep
    arguments: dict[str, Any]  # those that were set or derived and have an effect
    effective: dict[str, Any]  # all that have an effect, with their defaults
    datasets: dict[Path, str]  # folder -> what is read of it
    job: slurm.Job
    evaluations: dict[str, list[str]]  # file in the run's folder -> flags of evaluate.py

    @property
    def name(self) -> str:
        return self.folder.name


# ---------------------------------------------------------------------------------------------------------------------
# from a point to a run


class PointErrors:
    """The errors of points, each once, with the labels of the points that have it."""

    def __init__(self) -> None:
        self.labels: dict[str, list[str]] = {}  # error -> labels

    def add(self, error: str, label: str = "") -> None:
        self.labels.setdefault(error, []).append(label)

    def messages(self, n_points: int) -> list[str]:
        """The errors, each with the first point that has it, unless all points have it."""
        messages = []
        for error, labels in self.labels.items():
            if labels[0] and len(labels) < n_points:
                messages.append(f"{error} ({labels[0]})")
            else:
                messages.append(error)
        return messages


def split_sections(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The values of a point: those of arguments, and by section those that are named "section.key"."""
    arguments: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, dot, key = name.partition(".")
        if dot:
            sections.setdefault(section, {})[key] = value
        else:
            arguments[name] = value
    return arguments, sections


def run_folder(out_dir: Path, varying: dict[str, Any], identity: dict[str, Any], short_names: dict[str, str]) -> Path:
    """The folder of a run: what varies, and a hash of all that makes the run another one (`identity`)."""
    parts = [grid.label(varying, short_names), grid.fingerprint(identity)]
    return out_dir / "-".join(part for part in parts if part)


def evaluation_flags(section: dict[str, Any]) -> dict[str, list[str]]:
    """File -> flags of evaluate.py, of each evaluation that follows a training: the product of the section's lists."""
    if not section:
        return {}
    alternatives = []
    for name, value in section.items():
        items = value if isinstance(value, list) else [value]
        alternatives.append([f"--{name}={format_value(item) if isinstance(item, bool) else item}" for item in items])
    evaluations = [list(flags) for flags in itertools.product(*alternatives)]
    if len(evaluations) == 1:
        return {"evaluation.json": evaluations[0]}
    return {f"evaluation_{number}.json": flags for number, flags in enumerate(evaluations, 1)}


def distinct(runs: list[PlannedRun]) -> list[PlannedRun]:
    """Each run once, though a search may have proposed it twice."""
    return list({run.folder: run for run in runs}.values())


# ---------------------------------------------------------------------------------------------------------------------
# the folder of a run


def write_config(run: PlannedRun) -> None:
    """Write run.json: a config of train.py."""
    run.folder.mkdir(parents=True, exist_ok=True)
    values = {**run.arguments, VARYING_KEY: run.varying, EFFECTIVE_KEY: run.effective}
    write_json(run.folder / run_state.CONFIG_FILE, values)


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the file, all arguments with an effect) of a run.json; empty where it can't be read."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config, dict(config[EFFECTIVE_KEY])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, {}


def recorded_defaults(out_dir: Path) -> list[dict[str, Any]]:
    """Of each run in a sweep's folder, the arguments that had an effect and were defaults."""
    configs = [read_config(path) for path in sorted(out_dir.glob(f"*/{run_state.CONFIG_FILE}"))]
    return [{name: value for name, value in effective.items() if name not in config} for config, effective in configs]


SAME_RUN = ("compile",)  # arguments that change how fast a run is, and not what it is


def conflicting_run(run: PlannedRun) -> str | None:
    """An error if the run's folder holds a run with other arguments, after a default has changed for example."""
    _, existing = read_config(run.folder / run_state.CONFIG_FILE)
    planned = json.loads(json.dumps(run.effective))  # with tuples as lists
    names = [name for name in planned if name in existing and planned[name] != existing[name]]
    names = [name for name in names if name not in SAME_RUN]
    if not names:
        return None
    return f"{run.folder}: holds a run with another {', '.join(names)}; move it away"


def remaining_commands(run: PlannedRun, scripts: Scripts, n_processes: int) -> list[list[str]]:
    """What is left to do of a run: train.py, resumed if it can be, then evaluate.py. Writes run.json for a new run.

    To be called with the run's lock held: no other process is running it.
    """
    status = run_state.run_status(run.folder, running=False)
    if status.state in run_state.FINISHED:
        return []
    evaluations = [
        [run.job.python, str(scripts.evaluate), f"--out_dir={run.folder}", f"--json={run.folder / file}", *flags]
        for file, flags in run.evaluations.items()
    ]
    if status.is_trained and evaluations:
        return evaluations
    start = [run.job.python]
    if n_processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    if run_state.has_checkpoint(run.folder):
        arguments = ["--init_from=resume", f"--out_dir={run.folder}"]
    else:
        write_config(run)
        arguments = [str(run.folder / run_state.CONFIG_FILE), f"--out_dir={run.folder}", "--overwrite"]
    return [[*start, str(scripts.train), *arguments], *evaluations]


# ---------------------------------------------------------------------------------------------------------------------
# the states of all runs


def run_statuses(runs: list[PlannedRun], slurm_dir: Path) -> list[RunStatus]:
    """The status of each run, by its folder, or by Slurm's queue for a run that is in there.

    Raises UserError if some runs were handed to Slurm and its queue can't be read.
    """
    jobs = slurm.Jobs(slurm_dir / slurm.JOBS_FILE).ids
    queue: dict[str, slurm.QueuedJob] = {}
    if any(run.name in jobs for run in runs):
        queue = slurm.read_queue()
    statuses = []
    for run in runs:
        status = run_state.run_status(run.folder)
        job = jobs.get(run.name, "")
        if job in queue:
            status = status._replace(state=queue[job].state, reason=queue[job].describe(job))
        statuses.append(status)
    return statuses


def table_of_runs(runs: list[PlannedRun], statuses: list[RunStatus]) -> summary.Table:
    return summary.table_of_runs([run.name for run in runs], [run.varying for run in runs], statuses)


def print_table(runs: list[PlannedRun], statuses: list[RunStatus]) -> None:
    print(summary.as_text(table_of_runs(runs, statuses)))


def newest_log(run: PlannedRun, slurm_dir: Path, job: str) -> Path:
    """The run's log.txt, or the log of its job, which also has what Slurm says: a time limit, a lost node."""
    logs = [run.folder / run_state.LOG_FILE, *(slurm_dir / "logs").glob(f"*-{job}.out")]
    return max(logs, key=lambda log: log.stat().st_mtime if log.exists() else 0.0)


def print_failed(runs: list[PlannedRun], statuses: list[RunStatus], slurm_dir: Path) -> None:
    """Print why runs have failed, have diverged or were stopped, with their last console output, and why jobs wait."""
    jobs = slurm.Jobs(slurm_dir / slurm.JOBS_FILE).ids
    for run, status in zip(runs, statuses, strict=True):
        if status.state in ("failed", "diverged", "stopped"):
            log = newest_log(run, slurm_dir, jobs.get(run.name, ""))
            print(f"\n{run.name}: {status.state}, {status.reason}; {log} ends with")
            print("\n".join(f"    {line}" for line in run_state.tail(log)))
        elif " waits: " in status.reason:
            print(f"\n{run.name}: {status.state}, {status.reason}")
