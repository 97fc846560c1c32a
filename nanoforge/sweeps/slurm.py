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
SAVE_SECONDS = 120  # before the end of its time a job is asked to save, unless `signal` says otherwise
SIGNAL_SECONDS = 60  # Slurm's own, of a `signal` without a number
TRAINING_DIRECTIVES = {"open-mode": "append", "signal": f"B:USR1@{SAVE_SECONDS}"}
SIGNAL_SLACK = 120  # seconds by which Slurm may send it too early, and a job's script begin too late
MAX_REQUEUES = 10  # of a job by itself, unless `requeue` has another number
LOCK_SECONDS = 180  # a restarted job waits: a file server frees the lock of a lost node after a while
TRAINING_ONLY = (
    *("N", "n", "ntasks", "ntasks-per-node", "job-name", "J", "output", "o", "error", "e"),
    *("signal", "requeue", "no-requeue"),
)
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
    setup: str = ""  # lines for the shell, before all others: module load, source


@dataclass(frozen=True)
class Script:
    """What a script is written for."""

    name: str  # the job's
    job: Job
    folders: list[Path]  # of the runs: one, or the tasks of an array
    log_dir: Path
    is_array: bool = False
    max_at_once: int = 0  # tasks of an array (0: all)
    is_one_of_several: bool = False  # runs, which then need names of their own


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
        nodes = max_nodes(directives)
        processes = gpus_per_node(directives, nodes) or tasks_per_node(directives, nodes)
    except (ValueError, TypeError, ZeroDivisionError):
        raise UserError("slurm: nodes and tasks must be whole numbers, gres such as gpu:4") from None
    return Shape(max(1, nodes), max(1, processes))


def max_nodes(directives: dict[str, Any]) -> int:
    """The number of nodes, of a range such as 1-4 the largest. Raises ValueError."""
    return int(str(directives.get("nodes", directives.get("N", 1))).rpartition("-")[2])


def rank_counts(directives: dict[str, Any]) -> list[int]:
    """The numbers of ranks that a training may have: one for each number of nodes in a range. Raises UserError."""
    shape = shape_of(directives)
    least, dash, _ = str(directives.get("nodes", directives.get("N", 1))).partition("-")
    first = int(least) if dash and least.isdigit() else shape.nodes
    return [nodes * shape.processes_per_node for nodes in range(first, shape.nodes + 1)]


def parse_seconds(text: str) -> int | None:
    """The seconds of a time as sbatch takes it, or None: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    >>> parse_seconds("2:00:00"), parse_seconds("90"), parse_seconds("1-12")
    (7200, 5400, 129600)
    """
    days, dash, clock = text.strip().rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, days or "0"]) or len(parts) > 3:
        return None
    units = (86400, 3600, 60, 1)
    if dash:
        return sum(int(part) * unit for part, unit in zip([days, *parts], units, strict=False))
    first_unit = 2 if len(parts) < 3 else 1  # minutes, or hours
    return sum(int(part) * unit for part, unit in zip(parts, units[first_unit:], strict=False))


def time_limit(directives: dict[str, Any]) -> int | None:
    """Seconds until Slurm ends a job of these directives; None where the partition says."""
    return parse_seconds(str(directives.get("time", directives.get("t", ""))))


def save_seconds(directives: dict[str, Any]) -> int:
    """Seconds that a training has to save, before the end of its job's time."""
    name, _, seconds = str(directives.get("signal", "")).partition("@")
    if seconds.isdigit():
        return int(seconds)
    return SIGNAL_SECONDS if name else SAVE_SECONDS


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


def ending_errors(directives: dict[str, Any]) -> list[str]:
    """What is wrong with how a job is asked to save and requeued."""
    errors = []
    limit, seconds = time_limit(directives), save_seconds(directives)
    if limit is not None and limit <= seconds:
        errors.append(
            f"slurm: time: {limit} seconds are over when the job is asked to save, {seconds} seconds before their end; "
            'raise time, or lower that number, as in signal: "B:USR1@30"'
        )
    signal = str(directives.get("signal", "B:USR1"))
    if not re.fullmatch(r"B:(SIG)?(USR1|10|TERM|15)(@\d+)?", signal, re.IGNORECASE):
        errors.append(f"slurm: signal: {signal}: the script waits for B:USR1@SECONDS, or B:TERM@SECONDS")
    if max_requeues(directives) is None:
        errors.append("slurm: requeue: must be true, false, or how many times a job may requeue itself")
    return errors


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
    errors += ending_errors(directives)
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
    if merged.get("requeue"):
        merged["requeue"] = True  # the number is the script's
    lines = []
    for key, value in merged.items():
        flag, separator = (f"-{key}", " ") if len(key) == 1 else (f"--{key}", "=")
        if value is True:
            lines.append(f"#SBATCH {flag}")
        elif value is not False:
            lines.append(f"#SBATCH {flag}{separator}{quote_directive(str(value))}")
    return lines


def max_requeues(directives: dict[str, Any]) -> int | None:
    """How often a job may requeue itself: a number, 0 where `requeue` is not true, None for what is neither."""
    text = str(directives.get("requeue", "")).lower()
    if text.isdigit():
        return int(text)
    return {"": 0, "false": 0, "true": MAX_REQUEUES}.get(text)


def may_requeue(directives: dict[str, Any]) -> bool:
    """Whether a job that is preempted may requeue itself: unless the user forbids it."""
    return "no-requeue" not in directives and str(directives.get("requeue", "true")).lower() not in ("false", "0")


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


MARK = "# Written by sweep.py, which replaces it when it writes the scripts of this sweep again."


def remove_scripts(folder: Path) -> None:
    """Delete the scripts that a sweep wrote before, so that a folder holds no others than those of this time.

    Jobs in the queue have copies of theirs.
    """
    for path in folder.glob("*.sh"):
        if MARK in path.read_text(encoding="utf-8", errors="replace"):
            path.unlink()


class BashTemplate(string.Template):
    """A script with @name or @{name} to fill in, as bash itself uses $."""

    delimiter = "@"


HEAD = BashTemplate("""#!/bin/bash
@directives

@mark
@{setup}set -u
@{exports}cd @working_dir || exit 1
""")

# tee also writes to /dev/null: it goes on, and the training with it, when the disks of both logs are full.
TRAIN = BashTemplate("""
runs=(
@runs
)
run=${runs[@task]}
@{names}exec > >(tee -a "$run/@log" /dev/null) 2>&1
tee=$!
echo "--- $(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}"

# One process at a time trains a run; 75 is a lock held by another one. A file system without locks can't tell.
exec 9>> "$run/@lock"
if flock -E 75 -w @lock_seconds 9; [ $? = 75 ]; then
    echo "another process trains this run"
    exit 1
fi
rm -f "$run/@status"

# A run that has a checkpoint is resumed with its own arguments.
checkpoints() { compgen -G "$run/checkpoints/[0-9]*/manifest.json"; }
found=$(checkpoints)
if [ -n "$found" ]; then
    arguments=(--init_from=resume "--out_dir=$run")
else
    arguments=("$run/@config" "--out_dir=$run" --overwrite)
fi

# The first signal is passed on: the training saves and exits. A second one would end it at once.
stopped=
child=
# shellcheck disable=SC2317  # the traps call it
stop() {
    [ -z "$stopped" ] || return
    stopped=$1
@{early}    [ -z "$child" ] || kill -s "$stopped" "$child"
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

@start @train "${arguments[@@]}" &
child=$!
[ -z "$stopped" ] || kill -s "$stopped" "$child"
# A signal ends `wait` early.
while wait "$child"; status=$?; [ "$status" -gt 128 ] && kill -0 "$child" 2> /dev/null; do :; done
wait "$child"
status=$?
echo "$status" > "$run/@status"
echo "--- $(date '+%F %T') status $status${stopped:+, stopped by $stopped}"
@{requeue}exec > /dev/null 2>&1
wait "$tee"
exit "$status"
""")

REQUEUE = BashTemplate("""
if [ "$stopped" = USR1 ] && [ "$status" -ne 0 ]; then
    limit=@limit
    [ "$early" = 0 ] || limit=@preempted_limit
    if [ "$limit" = 0 ]; then
        echo "the job's time is over; submit it again to go on, or set requeue: true"
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$limit" ]; then
        echo "not requeued: it was $limit times; submit it again to go on, or set requeue to a higher number"
    elif [ "$early" = 0 ] && [ "$(checkpoints)" = "$found" ]; then
        echo "not requeued: nothing was saved since this start; give the job more time"
    else
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
""")

EVALUATE = BashTemplate("""
runs=(
@runs
)
run=${runs[@task]}
@python @evaluate "--out_dir=$run" "--json=$run/@output" @flags 2>&1 | tee -a "$run/@log" /dev/null
status=${PIPESTATUS[0]}
[ "$status" -eq 0 ] || echo "$status" > "$run/@status"
exit "$status"
""")

TORCHRUN = (
    "{python} -m torch.distributed.run --nproc_per_node={processes} "
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout={seconds}"
)  # {seconds} that the ranks have to save
FREE_PORT = 'import socket; at = socket.socket(); at.bind(("", 0)); print(at.getsockname()[1])'


def training_script(script: Script, train: Path) -> str:
    """The script that trains a run, or in an array one of several. `train` is train.py."""
    directives = script.job.directives
    shape = shape_of(directives)
    limit = max_requeues(directives) or 0
    requeue = REQUEUE.substitute(limit=limit, preempted_limit=limit or MAX_REQUEUES).lstrip("\n")
    seconds = (time_limit(directives) or 0) - save_seconds(directives) - SIGNAL_SLACK
    early = f"    early=$((SECONDS < {max(0, seconds)}))  # long before the end of the time: preempted\n"
    body = TRAIN.substitute(
        runs=run_lines(script),
        task=task_index(script),
        names=name_line(script),
        log=run_state.LOG_FILE,
        lock=run_state.SWEEP_LOCK_FILE,
        lock_seconds=LOCK_SECONDS,
        status=run_state.STATUS_FILE,
        config=run_state.CONFIG_FILE,
        start=start_command(shape, script.job.python, save_seconds(directives)),
        train=quote(str(train)),
        early=early if may_requeue(directives) else "",
        requeue=requeue if may_requeue(directives) else "",
    )
    return head(script, default_directives(script) | TRAINING_DIRECTIVES, shape.processes_per_node) + body


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
        task=task_index(script),
        python=quote(script.job.python),
        evaluate=quote(str(evaluate)),
        output=output,
        flags=" ".join(quote(flag) for flag in flags),
        log=run_state.LOG_FILE,
        status=run_state.STATUS_FILE,
    )
    return head(script, default_directives(script), processes=1) + body


def head(script: Script, defaults: dict[str, Any], processes: int) -> str:
    """The part that all scripts begin with: directives, the user's lines, exported variables, the working directory.

    processes: of the script on each node, which share its CPUs.
    """
    exports = srun_environment(script.job.directives) | script.job.environment
    export_lines = [f"export {name}={quote(str(value))}\n" for name, value in exports.items()]
    setup = f"{script.job.setup.rstrip()}\n" if script.job.setup.strip() else ""
    return HEAD.substitute(
        directives="\n".join(directive_lines(script.job.directives, defaults)),
        mark=MARK,
        setup=setup,
        exports=threads_line(script.job, processes) + "".join(export_lines),
        working_dir=quote(script.job.working_dir),
    )


def task_index(script: Script) -> str:
    """Which run a job trains; one alone may have the variable of an array from the job that submitted it."""
    return "$SLURM_ARRAY_TASK_ID" if script.is_array else "0"


def run_lines(script: Script) -> str:
    return "\n".join(f"    {quote(str(folder))}" for folder in script.folders)


def cpus_per_node(directives: dict[str, Any]) -> int:
    """The CPUs that a job asks for on each node; 0 where it does not."""
    cpus, cpus_per_gpu = str(directives.get("cpus-per-task", directives.get("c"))), str(directives.get("cpus-per-gpu"))
    if cpus_per_gpu.isdigit():
        return int(cpus_per_gpu) * gpus_per_node(directives, max_nodes(directives))
    return int(cpus) * tasks_per_node(directives, max_nodes(directives)) if cpus.isdigit() else 0


def srun_environment(directives: dict[str, Any]) -> dict[str, str]:
    """What srun needs on several nodes: since Slurm 22.05 it does not take cpus-per-task from the job."""
    cpus = cpus_per_node(directives)
    return {"SRUN_CPUS_PER_TASK": str(cpus)} if cpus and shape_of(directives).nodes > 1 else {}


def threads_line(job: Job, processes: int) -> str:
    """OMP_NUM_THREADS, unless the user sets it: the CPUs of a node over its processes."""
    if "OMP_NUM_THREADS" in job.environment:
        return ""
    cpus = cpus_per_node(job.directives)
    if cpus:
        return f"export OMP_NUM_THREADS={max(1, cpus // processes)}\n"
    return (
        f"threads=$((${{SLURM_CPUS_ON_NODE:-1}} / {processes}))\n"
        "export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))\n"
    )


def name_line(script: Script) -> str:
    """A name of its own for each run of several, which share the environment."""
    if "WANDB_NAME" not in script.job.environment or not script.is_one_of_several:
        return ""
    return 'export WANDB_NAME="$WANDB_NAME-${run##*/}"\n'


def start_command(shape: Shape, python: str, seconds_to_save: int) -> str:
    """What train.py is started with: Python, torchrun, or srun with a torchrun on each node.

    Several nodes meet on a free port of the first one, where the script runs.
    """
    if shape.ranks == 1:
        return quote(python)
    torchrun = TORCHRUN.format(
        python=quote(python), processes=shape.processes_per_node, seconds=max(5, seconds_to_save - 10)
    )
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


class QueuedJob(NamedTuple):
    """A job in the queue."""

    state: str  # in small letters: pending, running, ...
    reason: str  # why it does not run, in Slurm's words: Priority, launch failed requeued held, ...

    def describe(self, job: str) -> str:
        """The job's id and, where someone has to act, why it waits and what helps."""
        text = f"job {job}"
        if self.state == "pending" and self.reason not in ROUTINE_REASONS:
            text += f" waits: {self.reason}"
            if "held" in self.reason.lower():
                text += f"; when its cause is gone (a full disk of a node?): scontrol release {job}"
        return text


ROUTINE_REASONS = ("None", "Priority", "Resources", "Dependency", "BeginTime", "JobArrayTaskLimit", "Cleaning")


def read_queue() -> dict[str, QueuedJob]:
    """The user's jobs in the queue, by their ids (12, or 12_3 in an array). Raises UserError."""
    if not shutil.which("squeue"):
        raise UserError(
            "squeue: not installed on this machine, and some of these runs were handed to Slurm; "
            "if you know that they have ended, delete slurm/jobs.json"
        )
    result = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i|%T|%r"], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"squeue: {result.stderr.strip()}")
    queue = {}
    for line in result.stdout.splitlines():
        fields = line.split("|", 2)
        if len(fields) == 3:
            job, state, reason = fields
            queue[job] = QueuedJob(state.lower(), reason.strip("()"))
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
