"""The scripts for Slurm: clean under bash and shellcheck, and run by a real Slurm of two nodes on this machine.

Slurm is installed and started where that is possible: by root, on Debian, with a network (or where slurm-wlm and munge
are installed). It lives in a folder of its own, with its own key and sockets, and ends with the tests.
"""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, TINY, equal_tensors, free_port, read_run, run_on_ranks, run_script

import sweep
from nanoforge import run_state
from nanoforge.errors import UserError
from nanoforge.sweeps import slurm

NASTY = "a 'b' \"c\" $HOME `id` \\ ; #"
SECTION = {
    "job-name": "x",
    "nodes": "2",
    "cpus-per-task": "80",
    "gres": "gpu:4",
    "time": "2:00:00",
    "account": "bsc88",
    "qos": "acc_debug",
}


def script(
    directives: dict, environment: dict | None = None, folders: list[Path] | None = None, **changes
) -> slurm.Script:
    """A script for the job of one run."""
    job = slurm.Job(directives, environment or {}, "/venv/bin/python", "/work dir")
    return dataclasses.replace(slurm.Script("name", job, folders or [Path("/out/a")], Path("/logs")), **changes)


def directives_of(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


# ---------------------------------------------------------------------------------------------------------------------
# what is written


@pytest.mark.parametrize(
    "directives",
    [
        {},
        {"gres": "gpu:4"},
        SECTION,
        {"nodes": "2", "ntasks-per-node": "3", "no-requeue": "true"},
        {"output": "a b-%j.out", "exclusive": "true", "p": "main"},
    ],
)
@pytest.mark.parametrize("array", [False, True])
def test_scripts_are_clean(tmp_path: Path, directives: dict[str, str], array: object):
    folders = [Path("/out/lr=3e-4,optimizer=muon-1f3c9a"), Path("/out/it's $HOME/b")][: 2 if array else 1]
    one = script(
        directives,
        {"WANDB_NAME": NASTY, "EMPTY": ""},
        folders,
        log_dir=Path("/logs 100%"),
        is_array=array,
        max_at_once=2,
    )
    texts = {
        "train.sh": slurm.training_script(one, ROOT / "train.py"),
        "evaluate.sh": slurm.evaluation_script(one, ROOT / "evaluate.py", "evaluation.json", ["--tasks=a b"]),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        subprocess.run(["bash", "-n", str(tmp_path / name)], check=True)
        if shutil.which("shellcheck"):
            result = subprocess.run(["shellcheck", str(tmp_path / name)], capture_output=True, text=True)
            assert result.returncode == 0, result.stdout


def test_directives_are_verbatim_and_the_others_have_defaults():
    lines = directives_of(slurm.training_script(script(SECTION), ROOT / "train.py"))
    assert [f"--{key}={value}" for key, value in SECTION.items()] == [
        line for line in lines if line.split("=")[0].removeprefix("--") in SECTION
    ]
    assert {"--signal=B:USR1@120", "--open-mode=append", "--output=/logs/%x-%j.out"} <= set(lines)
    directives = {"signal": "B:USR1@60", "output": "mine", "no-requeue": "true"}
    text = slurm.training_script(script(directives, is_array=True, max_at_once=4), ROOT / "train.py")
    lines = directives_of(text)
    assert {"--signal=B:USR1@60", "--output=mine", "--array=0-0%4"} <= set(lines)
    assert "--requeue" not in lines and "scontrol requeue" not in text


GRID = "learning_rate: [1e-3, 2e-3]\nwandb_log: true\nout_dir: o\nsetup: [module load cuda]\n"
SBATCH = """#!/bin/bash
case "$*" in *dependency*) echo "no evaluations today" >&2; exit 1;; esac
echo 5
"""


def test_a_sweep_leaves_the_scripts_and_jobs_of_its_last_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Single scripts don't stay beside an array; a job that was handed over is known even if the next one fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sweep, "prepare_data", lambda runs: None)
    for name, text in (("sbatch", SBATCH), ("squeue", "#!/bin/bash\necho '5|PENDING|Priority'\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run_sweep(yaml: str, *argv: str) -> str:
        (tmp_path / "g.yaml").write_text(yaml)
        with pytest.raises(SystemExit):
            sweep.command(["g.yaml", *argv])
        return capsys.readouterr().out

    yaml = GRID + "environment: {WANDB_NAME: mine}\n"
    run_sweep(yaml, "--launcher=slurm")
    (tmp_path / "o/slurm/mine.sh").write_text("echo mine\n")
    assert len(list((tmp_path / "o/slurm").glob("lr=*.sh"))) == 2
    run_sweep(yaml, "--launcher=slurm", "--array")
    assert {path.name for path in (tmp_path / "o/slurm").glob("*.sh")} == {"array.sh", "mine.sh"}
    assert "\nmodule load cuda\nset -u\n" in (tmp_path / "o/slurm/array.sh").read_text()
    names = {json.loads(path.read_text())["wandb_run_name"] for path in tmp_path.glob("o/*/run.json")}
    assert names == {f"mine-{path.parent.name}" for path in tmp_path.glob("o/*/run.json")} and len(names) == 2
    with pytest.raises(UserError, match="no evaluations today"):
        run_sweep(yaml + "evaluation: {tasks: x}\n", "--launcher=slurm", "--submit")
    assert list(json.loads((tmp_path / "o/slurm/jobs.json").read_text()).values()) == ["5"]
    assert run_sweep(yaml, "--status").count("pending") == 1
    (tmp_path / "squeue").write_text("#!/bin/bash\necho '5|PENDING|(launch failed requeued held)'\n")
    out = run_sweep(yaml, "--status")
    assert "launch failed requeued held" in out and "scontrol release 5" in out


# ---------------------------------------------------------------------------------------------------------------------
# what a script does, with stand-ins for Slurm's programs and for train.py

STAND_IN = """
import os, pathlib, signal, sys, time
out = pathlib.Path(next(flag for flag in sys.argv if flag.startswith("--out_dir=")).split("=", 1)[1])
print("trains", *sys.argv[1:], os.environ.get("WANDB_NAME"), os.environ["OMP_NUM_THREADS"], flush=True)
def save(number, frame):
    if os.environ.get("SAVES") == "1":
        step = len(list(out.glob("checkpoints/*"))) + 1
        (out / f"checkpoints/{step:06d}").mkdir(parents=True)
        (out / f"checkpoints/{step:06d}/manifest.json").touch()
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
if os.environ.get("SIGNAL"):
    os.kill(os.getppid(), getattr(signal, os.environ["SIGNAL"]))  # Slurm signals the shell of the script
    time.sleep(20)
"""


@pytest.fixture
def run_script_of(tmp_path: Path):
    """run_script_of(directives, SIGNAL="SIGUSR1") runs a script of one run: (exit status, output)."""
    run, bin_dir = tmp_path / "run", tmp_path / "bin"
    run.mkdir()
    bin_dir.mkdir()
    (tmp_path / "train.py").write_text(STAND_IN)
    for name, line in (("scontrol", 'echo "scontrol $*"'), ("no_locks", "echo flock: no locks; exit 71")):
        (bin_dir / name).write_text(f"#!/bin/bash\n{line}\n")
        (bin_dir / name).chmod(0o755)

    def run_script_of(directives: dict, environment: dict | None = None, setup: str = "", **variables: str):
        if variables.pop("LOCKS", "1") == "0":
            (bin_dir / "no_locks").rename(bin_dir / "flock")
        job = slurm.Job(directives, environment or {}, sys.executable, str(tmp_path), setup)
        one = slurm.Script("name", job, [run], tmp_path, is_one_of_several=True)
        (tmp_path / "train.sh").write_text(slurm.training_script(one, tmp_path / "train.py"))
        ids = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "PATH": f"{bin_dir}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", tmp_path / "train.sh"],
            env={**os.environ, **ids, **variables},
            capture_output=True,
            text=True,
            timeout=30,
        )
        return done.returncode, done.stdout + done.stderr

    return run_script_of


LONG = {"time": "2:00:00"}  # a signal in the first seconds is a preemption
SHORT = {"time": "3"}  # it is the end of the time


@pytest.mark.parametrize(
    ("directives", "variables", "is_requeued"),
    [
        (SHORT, {"SAVES": "1"}, False),
        (SHORT | {"requeue": "true"}, {"SAVES": "1"}, True),
        (SHORT | {"requeue": "true"}, {"SAVES": "0"}, False),
        (SHORT | {"requeue": "3"}, {"SAVES": "1", "SLURM_RESTART_COUNT": "2"}, True),
        (SHORT | {"requeue": "3"}, {"SAVES": "1", "SLURM_RESTART_COUNT": "3"}, False),
        (SHORT | {"requeue": "true"}, {"SAVES": "1", "SLURM_RESTART_COUNT": str(slurm.MAX_REQUEUES)}, False),
        (LONG, {"SAVES": "0"}, True),
        (LONG, {"SAVES": "1", "SLURM_RESTART_COUNT": str(slurm.MAX_REQUEUES)}, False),
        (LONG | {"no-requeue": "true"}, {"SAVES": "1"}, False),
        (LONG | {"requeue": "false"}, {"SAVES": "1"}, False),
        ({}, {"SAVES": "1"}, False),
    ],
)
def test_a_job_requeues_itself_where_asked_or_preempted_a_number_of_times(
    run_script_of: Callable[..., Any], directives: dict[str, str], variables: dict[str, str], is_requeued: object
):
    code, out = run_script_of(directives, SIGNAL="SIGUSR1", **variables)
    assert code == 128 + signal.SIGUSR1 and ("scontrol requeue 7" in out) == is_requeued, out
    assert "scontrol requeue" not in run_script_of(directives, SIGNAL="SIGTERM", **variables)[1]


def test_a_script_lives_without_locks_and_with_full_disks(run_script_of: Callable[..., Any], tmp_path: Path):
    with (tmp_path / "run/.sweep.lock").open("w") as lock:
        code, out = run_script_of({}, LOCKS="0")
        assert code == 0 and "no locks" in out and "trains" in out
        (tmp_path / "bin/flock").unlink()
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = (tmp_path / "train.sh").read_text()
        (tmp_path / "train.sh").write_text(text.replace(f"-w {slurm.LOCK_SECONDS}", "-w 0"))
        held = subprocess.run(["bash", tmp_path / "train.sh"], capture_output=True, text=True, env=os.environ | IDS)
        assert held.returncode == 1 and "another process trains this run" in held.stdout
    (tmp_path / "run/log.txt").unlink()
    (tmp_path / "run/log.txt").symlink_to("/dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(["bash", tmp_path / "train.sh"], stdout=full, stderr=full, env=os.environ | IDS)
    assert done.returncode == 0 and (tmp_path / "run/exit_status").read_text() == "0\n"


IDS = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}


def test_a_script_has_the_users_lines_threads_and_a_name_for_each_run(
    run_script_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    name = {"WANDB_NAME": "mine"}
    code, out = run_script_of({"cpus-per-task": "8", "gres": "gpu:1"}, name, setup="echo loaded $NOT_SET\nA=1\n")
    assert code == 0 and "loaded" in out and "mine-run 8\n" in out, "`set -u` follows the user's lines"
    out = run_script_of({}, SLURM_CPUS_ON_NODE="6", SLURM_ARRAY_TASK_ID="3")[1]
    assert " 6\n" in out, "of a job that a task of an array has submitted, too"
    assert " 3\n" in run_script_of({}, {"OMP_NUM_THREADS": "3"}, SLURM_CPUS_ON_NODE="6")[1]


@pytest.mark.parametrize(
    ("directives", "threads"),
    [
        (SECTION, "20"),  # 80 CPUs of a node over the ranks of its 4 GPUs
        ({"cpus-per-task": "20", "ntasks-per-node": "4"}, "20"),
        ({"cpus-per-task": "2", "gres": "gpu:4"}, "1"),
        ({"c": "7", "ntasks": "4", "nodes": "2", "gpus": "4"}, "7"),
        ({"cpus-per-gpu": "6", "gres": "gpu:4"}, "6"),
    ],
)
def test_threads_are_the_cpus_of_a_node_over_its_ranks(directives: dict[str, str], threads: str):
    assert f"\nexport OMP_NUM_THREADS={threads}\n" in slurm.training_script(script(directives), ROOT / "train.py")
    job = script(directives, {"OMP_NUM_THREADS": "5"})
    assert slurm.training_script(job, ROOT / "train.py").count("OMP_NUM_THREADS") == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-0:30", 88200), ("2-1:0:5", 176405)),
        *(("", None), ("UNLIMITED", None), ("x-1", None)),
    ],
)
def test_times_are_read_as_sbatch_reads_them(text: str, seconds: int | None):
    """As the page of sbatch lists them: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    assert slurm.parse_seconds(text) == seconds


def test_the_environment_is_exported_as_it_is(tmp_path: Path):
    environment = {"A": NASTY, "EMPTY": "", "PLAIN": "1e-05"}
    job = slurm.Job({}, environment, "python", str(tmp_path))
    text = slurm.training_script(slurm.Script("name", job, [tmp_path], tmp_path), ROOT / "train.py")
    head = text.split("\nruns=(")[0] + "\nenv -0\n"
    result = subprocess.run(["bash", "-c", head], capture_output=True, text=True, check=True)
    exported = dict(line.split("=", 1) for line in result.stdout.split("\0") if line)
    assert {name: exported[name] for name in environment} == environment


@pytest.mark.parametrize(
    ("directives", "expected"),
    [
        ({}, (1, 1)),
        (SECTION, (2, 4)),
        ({"gres": "gpu:h100:2"}, (1, 2)),
        ({"gpus-per-node": "4", "nodes": "3"}, (3, 4)),
        ({"gpus": "8", "nodes": "2"}, (2, 4)),
        ({"N": "2", "ntasks-per-node": "3"}, (2, 3)),
        ({"ntasks": "4", "nodes": "2"}, (2, 2)),
        ({"gres": "shard:2,gpu:1"}, (1, 1)),
        ({"nodes": "1-3", "gres": "gpu:2"}, (3, 2)),
    ],
)
def test_nodes_and_processes_follow_from_the_directives(directives: dict[str, str], expected: Any):
    assert slurm.shape_of(directives) == expected


def test_what_cannot_be_written_is_an_error():
    errors = slurm.section_errors(
        {"nodes": 2, "bad key": 1, "time": "1\n2", "array": "0-3"}, {"OK": "1", "1BAD": "2", "LIST": [1]}
    )
    assert len(errors) == 5
    assert len(slurm.section_errors({"time": "2", "requeue": "often"}, {})) == 2
    assert slurm.section_errors({"time": "2", "signal": "B:USR1@30", "requeue": "3"}, {}) == []
    assert len(slurm.section_errors({"signal": "USR1@30"}, {})) == 1, "the batch shell would not get it"
    assert slurm.section_errors({"signal": "B:SIGTERM", "time": "1:01"}, {}) == [], "60 seconds, says sbatch's page"


# ---------------------------------------------------------------------------------------------------------------------
# a real one

PACKAGES = ("slurm-wlm", "munge", "shellcheck")
CONF = """ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket
SlurmUser=root
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool.%n
SlurmctldLogFile={dir}/ctld.log
SlurmdLogFile={dir}/slurmd.%n.log
SlurmctldPidFile={dir}/ctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=1 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until condition() is true; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not true after {seconds} seconds"
        time.sleep(0.2)


def install() -> None:
    """Have Slurm's programs on this machine, or skip the test and say why."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a Slurm of one machine is started by root on Linux")
    if all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged")):
        return
    if not Path("/etc/debian_version").exists():
        pytest.skip("Slurm is not installed; the test installs it on Debian only")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]):
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        except (OSError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"Slurm can't be installed: {error}")
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["no message"]
            pytest.skip(f"Slurm can't be installed: {' '.join(command)}: {lines[-1]}")


def output_of(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    """The environment in which Slurm's commands reach a cluster of two nodes, n1 and n2."""
    install()
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    try:
        socket.gethostbyname(host)
    except OSError:
        with open("/etc/hosts", "a") as hosts:
            hosts.write(f"127.0.0.1 {host}\n")
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(
        CONF.format(host=host, dir=folder, port=free_port(), port1=free_port(), port2=free_port())
    )
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    munged = [
        "munged",
        "--foreground",
        "--force",
        *(f"--{name}-file={folder / f'munge.{name}'}" for name in ("key", "pid", "log", "seed")),
        f"--socket={folder / 'munge.socket'}",
    ]
    commands = [munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    daemons = []
    try:
        for command in commands:
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            if command is munged:
                wait_for((folder / "munge.socket").exists)
        nodes = ["sinfo", "-h", "-o", "%T %D"]
        try:
            wait_for(lambda: output_of(nodes, environment).split() == ["idle", "2"], 30)
        except AssertionError:
            logs = "\n".join(path.read_text(errors="replace")[-600:] for path in folder.glob("*.log"))
            pytest.fail(f"Slurm does not start:\n{logs}")
        yield environment
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        wait_for(lambda: not output_of(["squeue", "-h"], environment).strip(), 30)
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def queue(cluster: dict[str, str]) -> list[str]:
    return output_of(["squeue", "-h", "-o", "%i %T"], cluster).splitlines()


def write_grid(path: Path, data_dir: Path, yaml: str) -> Path:
    """A grid of tiny runs; both nodes are this machine, whose name torchrun would look up."""
    tiny = [flag for flag in TINY if not flag.startswith(("--max_iters", "--eval_interval"))]
    lines = [flag.removeprefix("--").replace("=", ": ", 1) for flag in [*tiny, f"--data_dir={data_dir}", "--dataset=a"]]
    path.write_text("\n".join([*lines, "environment: {PET_LOCAL_ADDR: 127.0.0.1, OMP_NUM_THREADS: 1}", yaml]))
    return path


def test_an_evaluation_that_fails_is_the_state_of_its_run(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "note", "step": 3, "seconds": 1, "text": "finished: 3 steps"}\n')
    (tmp_path / "evaluate.py").write_text("import sys; print('no such task'); sys.exit(int(sys.argv[3][-1]))\n")
    for status, state in (("0", ("done", "finished: 3 steps")), ("3", ("failed", "status 3 after its training"))):
        job = slurm.Job({}, {}, sys.executable, str(tmp_path))
        one = slurm.Script("name", job, [tmp_path], tmp_path)
        text = slurm.evaluation_script(one, tmp_path / "evaluate.py", "evaluation.json", [f"--n={status}"])
        (tmp_path / "evaluate.sh").write_text(text)
        assert subprocess.run(["bash", tmp_path / "evaluate.sh"]).returncode == int(status)
        assert run_state.run_status(tmp_path)[:2] == state and run_state.log_tail(tmp_path)[-1] == "no such task"


@pytest.mark.slow
@pytest.mark.slurm
def test_a_job_array_and_a_preempted_two_node_job_end_as_if_undisturbed(
    cluster: dict[str, str],
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The two-node job gets USR1 in its batch shell, as from Slurm before the end of the time, and requeues itself.

    While Slurm holds it back (two minutes, which are cut short here) the array runs; an evaluation follows each of its
    trainings. Submitting again submits nothing.
    """
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "evaluate.py").write_text("import sys\nprint('evaluated', *sys.argv[1:])\n")
    monkeypatch.setattr(sweep, "EVALUATE", tmp_path / "evaluate.py")
    two = write_grid(
        tmp_path / "two 100%.yaml",
        data_dir,
        "max_iters: 600\neval_interval: 600\ndropout: 0.1\nslurm: {nodes: 2, ntasks-per-node: 1, time: '10'}\n",
    )
    three = write_grid(
        tmp_path / "three.yaml",
        data_dir,
        "max_iters: 4\neval_interval: 2\nlearning_rate: [1e-3, 1e-2]\noptimizer: [adamw, sgd]\n"
        "exclude: {optimizer: sgd, learning_rate: 1e-3}\nslurm: {time: 5}\nevaluation: {tasks: x}\n",
    )

    def run_sweep(path: Path, *argv: str) -> str:
        with pytest.raises(SystemExit) as end:
            sweep.command([str(path), f"--out_dir={tmp_path / path.stem}", *argv])
        assert end.value.code == 0
        return capsys.readouterr().out

    assert "1 run submitted" in run_sweep(two, "--launcher=slurm", "--submit")
    (job,) = json.loads((tmp_path / "two 100%/slurm/jobs.json").read_text()).values()
    run = next(path for path in (tmp_path / "two 100%").iterdir() if path.name != "slurm")

    def log() -> str:
        return (run / "log.txt").read_text() if (run / "log.txt").exists() else ""

    wait_for(lambda: "step 50:" in log(), 120)
    assert "running" in run_sweep(two, "--status")
    assert "3 runs submitted" in run_sweep(three, "--launcher=slurm", "--array", "--submit")
    assert len(list((tmp_path / "three/slurm").glob("*.sh"))) == 2, "one of training, one of evaluation"
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    wait_for(lambda: "stopped by SIGUSR1" in log() and f"{job} PENDING" in queue(cluster))
    assert "pending" in run_sweep(two, "--status") and "0 runs submitted of 1" in run_sweep(
        two, "--launcher=slurm", "--submit"
    )
    assert "0 runs submitted of 3" in run_sweep(three, "--launcher=slurm", "--array", "--submit"), (
        "they are in the queue"
    )
    wait_for(lambda: len(queue(cluster)) == 1, 120)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)

    assert run_sweep(three, "--status").count("done") == 3 and "0 runs submitted of 3" in run_sweep(
        three, "--launcher=slurm", "--submit"
    )
    runs = [path for path in (tmp_path / "three").iterdir() if path.name != "slurm"]
    logs = "".join(path.read_text() for path in (tmp_path / "three/slurm/logs").glob("evaluate*"))
    assert all(
        f"evaluated --out_dir={path} --json={path}/evaluation.json --tasks=x\n" in text
        for path in runs
        for text in (logs, (path / "log.txt").read_text())
    )
    for path in runs:
        run_script(path / "run.json", f"--out_dir={tmp_path / 'alone' / path.name}")
        assert read_run(path).losses == read_run(tmp_path / "alone" / path.name).losses

    b = run_on_ranks(tmp_path / "whole", 2, str(run / "run.json"))
    wait_for(lambda: not queue(cluster), 120)
    assert "start 1" in log() and "resuming" in log() and "done" in run_sweep(two, "--status")
    a = read_run(run)
    assert [(line["step"], line["loss"]) for line in a.train] == [(line["step"], line["loss"]) for line in b.train]
    assert [line["val_loss"] for line in a.evals] == [line["val_loss"] for line in b.evals] and equal_tensors(
        a.last.weights, b.last.weights
    )
