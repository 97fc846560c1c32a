"""Scripts for Slurm's sbatch, and the state of its queue. Knows no argument of the training that the scripts run.

A script trains one run, or as a job array one of several runs: under torchrun if there are several processes, with a
c10d rendezvous on the first node if there are several nodes. Two minutes before the end of the job's time Slurm signals
the batch shell (--signal=B:USR1@120), which passes the signal on; the training saves and exits, and the job requeues
itself. A run's folder gets the same files as from a launcher on this machine (nanoforge/run_state.py).
"""

import contextlib
import json
import re
import shutil
import string
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge import run_state
from nanoforge.errors import UserError
from nanoforge.files import write_json

JOBS_FILE = "jobs.json"  # next to the scripts
REQUEUE_DIRECTIVES = {"requeue": True, "open-mode": "append", "signal": "B:USR1@120"}
SHUTDOWN_SECONDS = 110  # that torchrun gives its workers to save, of the 120 of REQUEUE_DIRECTIVES
TRAINING_ONLY = ("N", "n", "ntasks", "ntasks-per-node", "job-name", "J", "output", "o", "error", "e", "signal")
NOT_GPUS = ("shard", "mps", "tmpfs")  # other resources of gres


class Shape(NamedTuple):
    """The processes of a training."""

    nodes: int
    processes_per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.processes_per_node


class Job(NamedTuple):
    """What a script needs besides its runs; equal jobs can share an array."""

    directives: dict[str, Any]  # of sbatch: text, or True for one without a value
    environment: dict[str, str]
    python: str
    working_dir: str


@dataclass(frozen=True)
class Script:
    """What a script is written for."""

    name: str  # the job's
    job: Job
    folders: list[Path]  # of the runs: one, or the tasks of an array
    log_dir: Path
    is_array: bool = False
    max_at_once: int = 0  # tasks of an array (0: all)


# ---------------------------------------------------------------------------------------------------------------------
# directives


def count_gpus(resources: Any) -> int:
    """The GPUs in the value of a directive such as gpu:4, gpu:h100:4 or 4; other resources don't count."""
    total = 0
    for resource in str(resources).split(","):
        parts = re.sub(r"\(.*?\)", "", resource).strip().split(":")
        kind, number = parts[0], parts[-1]
        is_gpu = kind in ("gpu", "gres/gpu") or len(parts) == 1 or (number.isdigit() and kind not in NOT_GPUS)
        if is_gpu and number.isdigit():
            total += int(number)
        elif kind == "gpu":
            total += 1
    return total


def shape_of(directives: dict[str, Any]) -> Shape:
    """Nodes, and processes on each: one for each of its GPUs, else for each task, else one. Raises UserError."""
    try:
        nodes = int(directives.get("nodes", directives.get("N", 1)))
        processes = gpus_per_node(directives, nodes) or tasks_per_node(directives, nodes)
    except (ValueError, TypeError, ZeroDivisionError):
        raise UserError("slurm: nodes and tasks must be whole numbers, gres such as gpu:4") from None
    return Shape(max(1, nodes), max(1, processes))


def gpus_per_node(directives: dict[str, Any], nodes: int) -> int:
    per_node = [count_gpus(directives[key]) for key in ("gres", "gpus-per-node") if key in directives]
    if any(per_node):
        return max(per_node)
    total = count_gpus(directives.get("gpus", directives.get("G", 0)))
    return total // nodes if total else 0


def tasks_per_node(directives: dict[str, Any], nodes: int) -> int:
    per_node = int(directives.get("ntasks-per-node", 0))
    if per_node:
        return per_node
    tasks = int(directives.get("ntasks", directives.get("n", 1)))
    return -(-tasks // nodes)  # rounded up


def section_errors(directives: dict[str, Any], environment: dict[str, Any]) -> list[str]:
    """What can't be written into a script."""
    errors = []
    for key, value in directives.items():
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", key):
            errors.append(f"slurm: {key}: not the name of a directive")
        if not isinstance(value, str | int | float) or "\n" in str(value):
            errors.append(f"slurm: {key}: must be one line of text")
        if key in ("array", "a"):
            errors.append(f"slurm: {key}: is set by --array")
    for key, value in environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            errors.append(f"environment: {key}: not the name of a variable")
        if not isinstance(value, str | int | float):
            errors.append(f"environment: {key}: must be text")
    return errors


def default_directives(script: Script) -> dict[str, Any]:
    """Directives of every script, unless the user sets them: the job's name and log, the size of an array."""
    log_dir = str(script.log_dir).replace("%", "%%")
    if not script.is_array:
        return {"job-name": script.name, "output": f"{log_dir}/%x-%j.out"}
    limit = f"%{script.max_at_once}" if script.max_at_once else ""
    return {
        "job-name": script.name,
        "output": f"{log_dir}/%x-%A_%a.out",
        "array": f"0-{len(script.folders) - 1}{limit}",
    }


def directive_lines(directives: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """The #SBATCH lines: the user's directives, verbatim, over the defaults."""
    merged = dict(defaults)
    for key, value in directives.items():
        merged[key] = {"true": True, "false": False}.get(str(value).lower(), value)
    if "no-requeue" in directives:
        merged.pop("requeue", None)
    lines = []
    for key, value in merged.items():
        flag, separator = (f"-{key}", " ") if len(key) == 1 else (f"--{key}", "=")
        if value is True:
            lines.append(f"#SBATCH {flag}")
        elif value is not False:
            lines.append(f"#SBATCH {flag}{separator}{quote_directive(str(value))}")
    return lines


def is_requeued(directives: dict[str, Any]) -> bool:
    return "no-requeue" not in directives and str(directives.get("requeue", True)).lower() != "false"


# ---------------------------------------------------------------------------------------------------------------------
# scripts


def quote(text: str) -> str:
    """Text as one word of bash, with nothing in it expanded.

    In double quotes: for a $ in the single quotes of shlex.quote, shellcheck warns that it is not expanded.
    """
    if re.fullmatch(r"[A-Za-z0-9/._-]+", text):
        return text
    escaped = re.sub(r'(["\\$`])', r"\\\1", text)
    return f'"{escaped}"'


def quote_directive(value: str) -> str:
    """A directive's value, in quotes where sbatch would otherwise end it."""
    if not re.search(r"[\s#\"']", value):
        return value
    escaped = value.replace('"', '\\"')
    return f'"{escaped}"'


class BashTemplate(string.Template):
    """A script with @name or @{name} to fill in, as bash itself uses $."""

    delimiter = "@"


HEAD = BashTemplate("""#!/bin/bash
@directives

# Written by sweep.py.
set -u
@{exports}cd @working_dir || exit 1
""")

TRAIN = BashTemplate("""
runs=(
@runs
)
run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}
exec > >(tee -a "$run/@log") 2>&1
tee=$!
echo "--- $(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}"
exec 9>> "$run/@lock"
if ! flock -w 60 9; then
    echo "another process trains this run"
    exit 1
fi
rm -f "$run/@status"

# A run that has a checkpoint is resumed with its own arguments.
if compgen -G "$run/checkpoints/[0-9]*" > /dev/null; then
    arguments=(--init_from=resume "--out_dir=$run")
else
    arguments=("$run/@config" "--out_dir=$run" --overwrite)
fi

# Signals are passed on: the training saves and exits.
stopped=
child=
trap 'stopped=USR1; [ -z "$child" ] || kill -s USR1 "$child"' USR1
trap 'stopped=TERM; [ -z "$child" ] || kill -s TERM "$child"' TERM

@start @train "${arguments[@@]}" &
child=$!
# A signal ends `wait` early.
while wait "$child"; status=$?; [ "$status" -gt 128 ] && kill -0 "$child" 2> /dev/null; do :; done
wait "$child"
status=$?
echo "$status" > "$run/@status"
echo "--- $(date '+%F %T') status $status${stopped:+, stopped by $stopped}"
exec > /dev/null 2>&1
wait "$tee"
@{requeue}exit "$status"
""")

REQUEUE = """if [ "$stopped" = USR1 ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
"""

EVALUATE = BashTemplate("""
runs=(
@runs
)
run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}
@python @evaluate "--out_dir=$run" "--json=$run/@output" @flags 2>&1 | tee -a "$run/@log"
status=${PIPESTATUS[0]}
[ "$status" -eq 0 ] || echo "$status" > "$run/@status"
exit "$status"
""")

TORCHRUN = (
    "{python} -m torch.distributed.run --nproc_per_node={processes} "
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout={seconds}"
)
FREE_PORT = 'import socket; at = socket.socket(); at.bind(("", 0)); print(at.getsockname()[1])'


def training_script(script: Script, train: Path) -> str:
    """The script that trains a run, or in an array one of several. `train` is train.py."""
    directives = script.job.directives
    body = TRAIN.substitute(
        runs=run_lines(script),
        log=run_state.LOG_FILE,
        lock=run_state.SWEEP_LOCK_FILE,
        status=run_state.STATUS_FILE,
        config=run_state.CONFIG_FILE,
        start=start_command(shape_of(directives), script.job.python),
        train=quote(str(train)),
        requeue=REQUEUE if is_requeued(directives) else "",
    )
    return head(script, default_directives(script) | REQUEUE_DIRECTIVES) + body


def evaluation_script(script: Script, evaluate: Path, output: str, flags: list[str]) -> str:
    """The script that evaluates a trained run, in one process, and writes the file `output` into its folder.

    `evaluate` is evaluate.py. If it fails, the run has failed.
    """
    directives = {key: value for key, value in script.job.directives.items() if key not in TRAINING_ONLY}
    if "nodes" in directives:
        directives["nodes"] = 1
    script = replace(script, job=script.job._replace(directives=directives))
    body = EVALUATE.substitute(
        runs=run_lines(script),
        python=quote(script.job.python),
        evaluate=quote(str(evaluate)),
        output=output,
        flags=" ".join(quote(flag) for flag in flags),
        log=run_state.LOG_FILE,
        status=run_state.STATUS_FILE,
    )
    return head(script, default_directives(script)) + body


def head(script: Script, defaults: dict[str, Any]) -> str:
    """The part that all scripts begin with: directives, exported variables, the working directory."""
    exports = srun_environment(script.job.directives) | script.job.environment
    return HEAD.substitute(
        directives="\n".join(directive_lines(script.job.directives, defaults)),
        exports="".join(f"export {name}={quote(str(value))}\n" for name, value in exports.items()),
        working_dir=quote(script.job.working_dir),
    )


def run_lines(script: Script) -> str:
    return "\n".join(f"    {quote(str(folder))}" for folder in script.folders)


def srun_environment(directives: dict[str, Any]) -> dict[str, str]:
    """What srun needs on several nodes: since Slurm 22.05 it does not take cpus-per-task from the job."""
    cpus = str(directives.get("cpus-per-task", directives.get("c")))
    tasks = str(directives.get("ntasks-per-node", 1))
    if shape_of(directives).nodes > 1 and cpus.isdigit() and tasks.isdigit():
        return {"SRUN_CPUS_PER_TASK": str(int(cpus) * int(tasks))}
    return {}


def start_command(shape: Shape, python: str) -> str:
    """What train.py is started with: Python, torchrun, or srun with a torchrun on each node.

    Several nodes meet on a free port of the first one, where the script runs.
    """
    if shape.ranks == 1:
        return quote(python)
    torchrun = TORCHRUN.format(python=quote(python), processes=shape.processes_per_node, seconds=SHUTDOWN_SECONDS)
    if shape.nodes == 1:
        return f"{torchrun} --standalone"
    return (
        f"port=$({quote(python)} -c '{FREE_PORT}')\n"
        'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 '
        "--kill-on-bad-exit=0 \\\n    "
        f'{torchrun} \\\n    --nnodes="$SLURM_JOB_NUM_NODES" --rdzv_backend=c10d --rdzv_endpoint="$(hostname):$port" '
        '\\\n    --rdzv_id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \\\n   '
    )


# ---------------------------------------------------------------------------------------------------------------------
# the queue


def submit(script: Path, after_job: str = "", *, is_array: bool = False) -> str:
    """Hand a script to sbatch, after the success of `after_job` if there is one; the job's id. Raises UserError."""
    if not shutil.which("sbatch"):
        raise UserError("--submit: sbatch is not installed on this machine")
    command = ["sbatch", "--parsable"]
    if after_job:
        kind = "aftercorr" if is_array else "afterok"  # of an array: task by task
        command += [f"--dependency={kind}:{after_job}", "--kill-on-invalid-dep=yes"]
    result = subprocess.run([*command, str(script)], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"sbatch {script}: {result.stderr.strip()}")
    return result.stdout.strip().split(";")[0]


def read_queue() -> dict[str, str]:
    """The user's jobs in the queue, id (12, or 12_3 in an array) -> state in small letters. Raises UserError."""
    if not shutil.which("squeue"):
        raise UserError(
            "squeue: not installed on this machine, and some of these runs were handed to Slurm; "
            "if you know that they have ended, delete slurm/jobs.json"
        )
    result = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i %T"], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"squeue: {result.stderr.strip()}")
    queue = {}
    for line in result.stdout.splitlines():
        fields = line.split()
        if len(fields) == 2:
            job, state = fields
            queue[job] = state.lower()
    return queue


class Jobs:
    """The job that each run was last handed to, run's name -> job's id: a file next to the scripts."""

    def __init__(self, path: Path):
        self.path = path
        self.ids: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):  # no run was handed over yet
            self.ids = json.loads(path.read_text(encoding="utf-8"))

    def update(self, ids: dict[str, str]) -> None:
        self.ids |= ids
        write_json(self.path, self.ids)
