"""Scripts for Slurm's sbatch, and what its queue tells. Knows no argument of the training that the scripts run.

A script runs one run, or as a job array one of several: under torchrun where there are several processes, with a c10d rendezvous on the first
node where there are several nodes. Two minutes before its end Slurm signals the batch shell (--signal=B:USR1@120), which passes it on; the
training saves and ends, and the job requeues itself. A run's folder gets the same files as from a launcher on this machine (nanoforge/run_state.py).
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge import run_state
from nanoforge.errors import UserError

TASKS = ("ntasks-per-node",)
GRACE = 110  # seconds that torchrun leaves its workers to save, of the 120 of DIRECTIVES
DIRECTIVES = {"requeue": True, "open-mode": "append", "signal": "B:USR1@120"}


class Shape(NamedTuple):
    """How many nodes, and processes of training on each."""

    nodes: int
    processes: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.processes


class Job(NamedTuple):
    """What a script needs besides its runs; jobs that are equal can share an array."""

    directives: dict[str, Any]  # of sbatch: text, or True for one without a value
    environment: dict[str, str]
    python: str
    folder: str  # the working directory


def count(text: Any) -> int:
    """The number in a directive such as gpu:4, gpu:h100:4 or 4; of several resources that of the GPUs; 0 where there is none."""
    total = 0
    for part in str(text).split(","):
        words = re.sub(r"\(.*?\)", "", part).strip().split(":")
        if (
            words[0] in ("gpu", "gres/gpu")
            or len(words) == 1
            or (words[-1].isdigit() and words[0] not in ("shard", "mps", "tmpfs"))
        ):
            total += int(words[-1]) if words[-1].isdigit() else int(words[0] == "gpu")
    return total


def shape(directives: dict[str, Any]) -> Shape:
    """Nodes and processes by the directives: a process for each GPU of a node, else as many as it has tasks, else one. Raises UserError."""
    d = {"nodes": directives.get("N", 1), **directives}
    try:
        nodes = int(d["nodes"])
        per_node = max((count(d[key]) for key in ("gres", "gpus-per-node") if key in d), default=0)
        if not per_node and ("gpus" in d or "G" in d):
            per_node = count(d.get("gpus", d.get("G"))) // nodes
        if not per_node:
            per_node = int(d.get("ntasks-per-node", 0)) or -(-int(d.get("ntasks", d.get("n", 1))) // nodes)
    except (ValueError, TypeError, ZeroDivisionError):
        raise UserError("slurm: nodes and tasks must be whole numbers, gres such as gpu:4") from None
    return Shape(max(1, nodes), max(1, per_node))


def check(section: dict[str, Any], environment: dict[str, Any]) -> list[str]:
    """What can't be written into a script."""
    wrong = [
        f"slurm: {key}: is no name of a directive" for key in section if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", key)
    ]
    wrong += [
        f"slurm: {key}: must be one line of text"
        for key, value in section.items()
        if not isinstance(value, str | int | float) or "\n" in str(value)
    ]
    wrong += [f"slurm: {key}: is set by --array" for key in section if key in ("array", "a")]
    wrong += [
        f"environment: {key}: is no name of a variable"
        for key in environment
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key)
    ]
    wrong += [
        f"environment: {key}: must be text"
        for key, value in environment.items()
        if not isinstance(value, str | int | float)
    ]
    return wrong


def directives(given: dict[str, Any], computed: dict[str, Any]) -> list[str]:
    """The #SBATCH lines: what was given, verbatim, over what is computed."""
    switches = {"true": True, "false": False}
    merged = {**computed, **{key: switches.get(str(value).lower(), value) for key, value in given.items()}}
    if "no-requeue" in given:
        merged.pop("requeue", None)
    told = []
    for key, value in merged.items():
        flag = f"-{key}" if len(key) == 1 else f"--{key}"
        if value is not False:
            told.append(
                f"#SBATCH {flag}"
                if value is True
                else f"#SBATCH {flag}{' ' if len(key) == 1 else '='}{quoted(str(value))}"
            )
    return told


def quote(words: str) -> str:
    """Text as one word of bash, in double quotes (in single ones shellcheck wonders whether a $ was meant)."""
    return words if re.fullmatch(r"[A-Za-z0-9/._-]+", words) else '"' + re.sub(r'(["\\$`])', r"\\\1", words) + '"'


def quoted(value: str) -> str:
    """A directive's value, in quotes where sbatch would otherwise end it."""
    return '"' + value.replace('"', '\\"') + '"' if re.search(r"[\s#\"']", value) else value


def requeues(given: dict[str, Any]) -> bool:
    return "no-requeue" not in given and str(given.get("requeue", True)).lower() != "false"


HEAD = """#!/bin/bash
{directives}

# Written by sweep.py.
set -u
{exports}cd {folder} || exit 1
"""

TRAIN = """
runs=(
{runs}
)
run=${{runs[${{SLURM_ARRAY_TASK_ID:-0}}]}}
exec > >(tee -a "$run/{log}") 2>&1
tee=$!
echo "--- $(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${{SLURM_RESTART_COUNT:-0}}"
exec 9>> "$run/{lock}"
if ! flock -w 60 9; then
    echo "another process trains this run"
    exit 1
fi
rm -f "$run/{status}"

# A run that was begun goes on by its own arguments.
if compgen -G "$run/checkpoints/[0-9]*" > /dev/null; then
    arguments=(--init_from=resume "--out_dir=$run")
else
    arguments=("$run/{config}" "--out_dir=$run" --overwrite)
fi

# Signals are passed on: the training saves and ends.
stopped=
child=
trap 'stopped=USR1; [ -z "$child" ] || kill -s USR1 "$child"' USR1
trap 'stopped=TERM; [ -z "$child" ] || kill -s TERM "$child"' TERM

{start} {train} "${{arguments[@]}}" &
child=$!
while wait "$child"; status=$?; [ "$status" -gt 128 ] && kill -0 "$child" 2> /dev/null; do :; done  # a signal ends `wait` early
wait "$child"
status=$?
echo "$status" > "$run/{status}"
echo "--- $(date '+%F %T') status $status${{stopped:+, stopped by $stopped}}"
exec > /dev/null 2>&1
wait "$tee"
{requeue}exit "$status"
"""

REQUEUE = """if [ "$stopped" = USR1 ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
"""

EVALUATE = """
runs=(
{runs}
)
run=${{runs[${{SLURM_ARRAY_TASK_ID:-0}}]}}
{python} {evaluate} "--out_dir=$run" "--json=$run/{told}" {flags} 2>&1 | tee -a "$run/{log}"
status=${{PIPESTATUS[0]}}
[ "$status" -eq 0 ] || echo "$status" > "$run/{status}"
exit "$status"
"""


def start(shape: Shape, python: str) -> str:
    """How the training is started: by Python, by torchrun, or by torchrun on every node, which meet on a free port of the first, this one."""
    if shape.ranks == 1:
        return quote(python)
    torchrun = f"{quote(python)} -m torch.distributed.run --nproc_per_node={shape.processes} --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout={GRACE}"
    if shape.nodes == 1:
        return f"{torchrun} --standalone"
    return (
        f"port=$({quote(python)} -c 'import socket; at = socket.socket(); at.bind((\"\", 0)); print(at.getsockname()[1])')\n"
        'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \\\n    '
        f'{torchrun} \\\n    --nnodes="$SLURM_JOB_NUM_NODES" --rdzv_backend=c10d --rdzv_endpoint="$(hostname):$port" \\\n    '
        '--rdzv_id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \\\n   '
    )


def head(job: Job, computed: dict[str, Any]) -> str:
    exports = {key: str(value) for key, value in job.environment.items()}
    cpus, tasks = job.directives.get("cpus-per-task", job.directives.get("c")), job.directives.get("ntasks-per-node", 1)
    if (
        str(cpus).isdigit() and str(tasks).isdigit() and shape(job.directives).nodes > 1
    ):  # srun no longer takes it from the job
        exports = {"SRUN_CPUS_PER_TASK": str(int(cpus) * int(tasks))} | exports
    words = "".join(f"export {key}={quote(value)}\n" for key, value in exports.items())
    return HEAD.format(
        directives="\n".join(directives(job.directives, computed)), exports=words, folder=quote(job.folder)
    )


def computed(name: str, logs: Path, runs: int, at_once: int, array: bool) -> dict[str, Any]:
    """Directives that are not given: the job's name and its log; for an array its size."""
    log = str(logs).replace("%", "%%") + ("/%x-%A_%a.out" if array else "/%x-%j.out")
    return {"job-name": name, "output": log} | (
        {"array": f"0-{runs - 1}" + (f"%{at_once}" if at_once else "")} if array else {}
    )


def training(name: str, job: Job, runs: list[Path], train: Path, logs: Path, array: bool, at_once: int) -> str:
    """The script that trains a run, or in an array one of several."""
    return head(job, computed(name, logs, len(runs), at_once, array) | DIRECTIVES) + TRAIN.format(
        runs="\n".join(f"    {quote(str(run))}" for run in runs), log=run_state.LOG_FILE, lock=run_state.SWEEP_LOCK_FILE, status=run_state.STATUS_FILE, config=run_state.CONFIG_FILE,
        start=start(shape(job.directives), job.python), train=quote(str(train)), requeue=REQUEUE if requeues(job.directives) else "",
    )  # fmt: skip


def evaluation(
    name: str,
    job: Job,
    runs: list[Path],
    evaluate: Path,
    told: str,
    flags: list[str],
    logs: Path,
    array: bool,
    at_once: int,
) -> str:
    """The script that evaluates what was trained, on one node, in one process, and writes the file `told` beside it. If it fails, that is the run's state."""
    own = {
        key: value
        for key, value in job.directives.items()
        if key not in ("N", "n", "ntasks", "ntasks-per-node", "job-name", "J", "output", "o", "error", "e", "signal")
    }
    own = {key: 1 if key == "nodes" else value for key, value in own.items()}
    return head(job._replace(directives=own), computed(name, logs, len(runs), at_once, array)) + EVALUATE.format(
        runs="\n".join(f"    {quote(str(run))}" for run in runs), python=quote(job.python), evaluate=quote(str(evaluate)), told=told, flags=" ".join(map(quote, flags)), log=run_state.LOG_FILE, status=run_state.STATUS_FILE,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# the queue


def submit(script: Path, after: str = "", array: bool = False) -> str:
    """Hand a script to sbatch, after another job's success if there is one; the new job's id. Raises UserError."""
    if not shutil.which("sbatch"):
        raise UserError("--submit: there is no sbatch here")
    depends = (
        [f"--dependency={'aftercorr' if array else 'afterok'}:{after}", "--kill-on-invalid-dep=yes"] if after else []
    )
    done = subprocess.run(["sbatch", "--parsable", *depends, str(script)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch {script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def queue() -> dict[str, str]:
    """The user's jobs in the queue, id (12, or 12_3 of an array) -> state in small letters. Raises UserError."""
    if not shutil.which("squeue"):
        raise UserError(
            "squeue: not there, and some of these runs were handed to Slurm; where it is known that they are over, delete slurm/jobs.json"
        )
    done = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i %T"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"squeue: {done.stderr.strip()}")
    return {words[0]: words[1].lower() for line in done.stdout.splitlines() if len(words := line.split()) == 2}


class Jobs:
    """Which job each run was last handed to: a file beside the scripts."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.ids: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.ids = {}

    def note(self, ids: dict[str, str]) -> None:
        self.ids |= ids
        beside = self.path.with_name(self.path.name + ".tmp")
        beside.write_text(json.dumps(self.ids, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)
