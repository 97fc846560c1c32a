"""Which job this process is an attempt of, and whether a run in a folder is the one that this job began.

Slurm requeues a job, and torchrun restarts its processes, with the command that began the run. Such a restart continues
the run that its own job began with these arguments, and no other. Imports no torch.
"""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge import run_dir
from nanoforge.errors import UserError
from nanoforge.run_dir import METRICS_FILE, RunRecord
from nanoforge.run_state import last_note, read_metrics


class Job(NamedTuple):
    """What started this process, by a name that stays over its restarts."""

    name: str
    restarted: bool  # whether this is known not to be its first attempt


def current_jobs() -> list[Job]:
    """The Slurm job and the torchrun of this process, if there are any."""
    env = os.environ
    jobs = []
    if "SLURM_JOB_ID" in env:
        job_id = env["SLURM_JOB_ID"]
        if "SLURM_ARRAY_TASK_ID" in env:
            job_id = f"{env.get('SLURM_ARRAY_JOB_ID', job_id)}_{env['SLURM_ARRAY_TASK_ID']}"
        name = " ".join(["slurm", env.get("SLURM_CLUSTER_NAME", ""), job_id])
        jobs.append(Job(name, env.get("SLURM_RESTART_COUNT", "0") != "0"))
    run_id = env.get("TORCHELASTIC_RUN_ID", "")
    if run_id == "none":  # torchrun on several nodes without --rdzv_id: the agent of the main rank has a folder of logs
        run_id = " ".join([platform.node(), *Path(env.get("TORCHELASTIC_ERROR_FILE", "")).parts[-4:-3]])
    if run_id:
        jobs.append(Job(f"torchrun {run_id}", env.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))
    return jobs


def add_attempt(attempts: list[dict[str, Any]], asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The attempts at a run with this one, unless its jobs are known. asked: TrainArgs.asked."""
    known = {name for attempt in attempts for name in attempt["jobs"]}
    jobs = [job.name for job in current_jobs()]
    return attempts if attempts and known.issuperset(jobs) else [*attempts, {"jobs": jobs, "asked": dict(asked)}]


def was_begun_here(out_dir: Path, asked: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether this job began the run in a folder, with the same arguments.

    A Slurm job has to be requeued. torchrun need not count a restart: it does not when a host joins or leaves.
    """
    jobs = [job for job in current_jobs() if job.restarted or job.name.startswith("torchrun")]
    if not any(attempt["asked"] == asked for attempt in own_attempts(out_dir, jobs)):
        return False
    # with --overwrite, an id that the user chose may also be that of an earlier torchrun, which has finished
    return not overwrite or any(job.restarted for job in jobs) or not is_finished(out_dir)


def refuse_edited(out_dir: Path, asked: Mapping[str, Any]) -> None:
    """Raises UserError when this job was restarted and began the run in the folder with other arguments."""
    own = own_attempts(out_dir, [job for job in current_jobs() if job.restarted])
    if own and all(attempt["asked"] != asked for attempt in own):
        raise UserError(
            f"{out_dir}: this job began the run there with other arguments"
            f"{describe_differences(own[0]['asked'], asked)}; "
            "continue it with --init_from=resume, or use another --out_dir"
        )


def own_attempts(out_dir: Path, jobs: list[Job]) -> list[dict[str, Any]]:
    """The attempts of these jobs at the run in a folder."""
    names = {job.name for job in jobs}
    return [attempt for attempt in read_attempts(out_dir) if names.intersection(attempt["jobs"])]


def read_attempts(out_dir: Path) -> list[dict[str, Any]]:
    """The attempts at the run in a folder, the first one first; none where there is no run."""
    try:
        return RunRecord.load(out_dir).run.get("attempts", [])
    except UserError:
        return []


def refuse_existing_run(out_dir: Path, asked: Mapping[str, Any]) -> None:
    """Raises UserError when the folder holds a run; it lists the arguments with which that began, where they differ."""
    attempts = read_attempts(out_dir)
    run_dir.refuse_existing_run(out_dir, describe_differences(attempts[0]["asked"], asked) if attempts else "")


def is_finished(out_dir: Path) -> bool:
    """Whether the run in a folder has come to its end."""
    return last_note(read_metrics(out_dir / METRICS_FILE, warnings=[])).startswith("finished")


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """': --lr=0.1 (there 0.2), ...' for the arguments that differ, which are not the defaults; '' without any."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    texts = []
    for name in names:
        there = before.get(name, "the default")
        texts.append(f"--{name}={now[name]} (there {there})" if name in now else f"no --{name} (there {there})")
    return f": {', '.join(texts)}" if texts else ""
