"""Runs that are killed, starved of disk, or fed bad bytes and numbers lose nothing. tests/README.md lists the faults.

Processes are real. Those that only have to die quickly are forked from one that has torch loaded already.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    TINY,
    RunFiles,
    ScriptProcess,
    equal_tensors,
    file_size_limit,
    metric,
    read_run,
    run_on_ranks,
    run_script,
    start_ranks,
    wait_for_exit,
    wait_for_line,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

import configurator
import train
import train_args
from nanoforge import distributed, files, run_dir, run_state
from nanoforge.errors import UserError
from nanoforge.sweeps import local
from nanoforge.training import checkpoint
from nanoforge.training.checkpoint import Snapshot
from nanoforge.training.logger import RunLogger
from nanoforge.training.optimizers import Optimizer

# ---------------------------------------------------------------------------------------------------------------------
# faults, and runs that have them


def die_at(n: int) -> None:
    """SIGKILL after the n-th call that changes the disk in a save, of step 4 or later."""
    saved_names = ("000004", "000008", "best.json", "checkpoints")
    n_calls = 0

    def make_deadly(module: object, name: str) -> None:
        original = getattr(module, name)

        def call(*args, **kwargs):
            nonlocal n_calls
            result = original(*args, **kwargs)
            if any(saved_name in str(args[0]) for saved_name in saved_names):
                n_calls += 1
                if n_calls == n:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, call)

    make_deadly(checkpoint, "fsync")
    make_deadly(os, "rename")
    make_deadly(os, "replace")
    make_deadly(shutil, "rmtree")


def full_disk(step: int) -> None:
    """The disk is full while this step is saved."""
    original = checkpoint.save

    def save(checkpoints: Path, snapshot: Snapshot, *args, **kwargs) -> Path:
        limit = file_size_limit(3000) if snapshot.progress.step == step else contextlib.nullcontext()
        with limit:
            return original(checkpoints, snapshot, *args, **kwargs)

    checkpoint.save = save


@pytest.fixture
def fork(data_dir: Path, tmp_path: Path):
    """fork("--flag=...", name="run", fault=partial(die_at, 3)) starts or resumes a run and returns its process."""

    def fork(*flags: str, name: str = "run", fault: Callable[[], None] | None = None):
        out_dir = tmp_path / name
        if checkpoint.list_steps(out_dir / "checkpoints"):
            defaults = ["--init_from=resume"]
        else:
            defaults = [*TINY, f"--data_dir={data_dir}", "--dataset=a", "--dropout=0.1", "--overwrite"]
        log = tmp_path / f"{name}.log"
        (process,) = start_ranks([*defaults, f"--out_dir={out_dir}", *flags], ranks=1, log=log, prepare=fault)
        return process

    return fork


def assert_same_end(out_dir: Path, expected_out_dir: Path) -> None:
    """Bit for bit the same weights, optimizer state, steps and logged losses; and nothing left of interrupted saves."""
    run, expected = read_run(out_dir), read_run(expected_out_dir)
    assert run.steps[-1] == expected.steps[-1]
    assert equal_tensors(run.last.weights, expected.last.weights)
    assert equal_tensors(run.last.optimizer, expected.last.optimizer)
    assert metric(run, "step") == metric(expected, "step")
    assert run.losses == expected.losses
    assert {path.suffix for path in (out_dir / "checkpoints").iterdir()} == {""}


# ---------------------------------------------------------------------------------------------------------------------
# 1. kills


@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_nothing(fork, tmp_path: Path):
    flags = [
        "--checkpoint_interval=1",
        "--eval_interval=7",
        "--optimizer=muon",
        "--sampling_method=without_replacement",
    ]
    rng = random.Random(0)
    n_kills = 0
    while n_kills < 50:
        process = fork(*flags, "--max_iters=100000")
        time.sleep(rng.uniform(0.05, 0.7))
        process.kill()
        n_kills += wait_for_exit(process) == -signal.SIGKILL
    last_step = checkpoint.list_steps(tmp_path / "run/checkpoints")[-1] + 3
    assert last_step > 20, "the run advanced between the kills"
    assert wait_for_exit(fork(*flags, f"--max_iters={last_step}")) == 0
    assert wait_for_exit(fork(*flags, f"--max_iters={last_step}", name="undisturbed")) == 0
    assert_same_end(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_kill_after_every_file_of_a_save_changes_nothing(fork, tmp_path: Path):
    flags = ["--checkpoint_interval=4", "--eval_interval=100", "--max_iters=10", "--keep_last=1"]
    assert wait_for_exit(fork(*flags, name="undisturbed")) == 0
    for n in range(1, 100):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        status = wait_for_exit(fork(*flags, fault=partial(die_at, n)))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert wait_for_exit(fork(*flags)) == 0
        assert_same_end(tmp_path / "run", tmp_path / "undisturbed")
    assert n > 20, "each file of two saves, their folders and renames"


# ---------------------------------------------------------------------------------------------------------------------
# 2. a full disk


@pytest.mark.slow
def test_a_full_disk_costs_one_checkpoint(fork, tmp_path: Path):
    flags = ["--checkpoint_interval=2", "--eval_interval=100", "--max_iters=8"]
    assert wait_for_exit(fork(*flags, fault=partial(full_disk, 4))) == 0
    done = read_run(tmp_path / "run")
    log = (tmp_path / "run.log").read_text()
    assert "could not save step 4" in log and "File too large" in log
    assert done.steps == [6, 8]
    assert metric(done, "step") == list(range(1, 9)), "training continued"
    assert not list((tmp_path / "run/checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("with_older", [True, False])
def test_failed_saves_leave_no_file(tmp_path: Path, *, with_older: bool):
    """Nor do those of a process that was killed while it saved: they could fill the disk."""
    tensors = {"weight": torch.zeros(1000)}
    snapshot = Snapshot(checkpoint.Progress(step=4), tensors, tensors, {}, {"train_config.json": b"{}"})
    if with_older:
        checkpoint.save(tmp_path, snapshot)
    (tmp_path / "000002.tmp").mkdir()
    before = {path for path in tmp_path.rglob("*") if "000002" not in str(path)}
    with file_size_limit(3000), pytest.raises((OSError, SafetensorError)):
        checkpoint.save(tmp_path, snapshot)
    assert set(tmp_path.rglob("*")) == before
    assert not with_older or checkpoint.verify(tmp_path / "000004", {"progress.json"}) is None


@pytest.mark.slow
def test_a_full_disk_at_the_last_save_is_a_failure_with_the_older_ones_intact(fork, tmp_path: Path):
    flags = ["--checkpoint_interval=2", "--eval_interval=100", "--max_iters=8"]
    assert wait_for_exit(fork(*flags, fault=partial(full_disk, 8))) == 1
    assert read_run(tmp_path / "run").steps == [4, 6]
    assert "the last save, of step 8, failed" in (tmp_path / "run.log").read_text()
    for step in (4, 6):
        assert checkpoint.verify(tmp_path / f"run/checkpoints/{step:06d}") is None
    assert wait_for_exit(fork(*flags)) == 0
    assert wait_for_exit(fork(*flags, name="undisturbed")) == 0
    assert_same_end(tmp_path / "run", tmp_path / "undisturbed")


def test_metrics_survive_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Lines that the disk has no room for are printed on the console; later lines are complete again."""
    logger = RunLogger(tmp_path, silent=False, start_step=0, evaluated=False, seconds=0.0, total_steps=10)
    logger.note(1, "x" * 200)
    with file_size_limit(300):
        logger.note(2, "y" * 200)
        logger.note(3, "z" * 200)
    logger.note(4, "w")
    logger.close()
    steps = []
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            steps.append(json.loads(line)["step"])
    assert steps == [1, 4]
    assert capsys.readouterr().out.count("a line is lost") == 2


# ---------------------------------------------------------------------------------------------------------------------
# 3. bad bytes


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_byte, truncate, Path.unlink], ids=["flipped", "truncated", "deleted"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(run, damage, tmp_path: Path):
    undamaged = run("--checkpoint_interval=1", "--max_iters=4", name="undamaged")
    for name in sorted({*checkpoint.REQUIRED_FILES, "manifest.json"}):
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        shutil.copytree(undamaged.out_dir, tmp_path / "damaged")
        damage(tmp_path / "damaged/checkpoints/000004" / name)
        resumed = run("--init_from=resume", name="damaged")
        lines = resumed.console.splitlines()
        skipped = next(line for line in lines if line.startswith("skipping checkpoint"))
        resuming = next(line for line in lines if line.startswith("resuming"))
        assert "000004" in skipped
        assert name in skipped or name == "manifest.json"
        assert "000003" in resuming
        assert equal_tensors(resumed.last.weights, undamaged.last.weights)


# ---------------------------------------------------------------------------------------------------------------------
# 4. a rank that is killed


def worker_pids(torchrun: ScriptProcess) -> list[int]:
    """Process ids of torchrun's ranks, in order."""
    ps = ["ps", "-o", "pid=", "--ppid", str(torchrun.pid), "--sort=pid"]
    return [int(pid) for pid in subprocess.run(ps, capture_output=True, text=True).stdout.split()]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_killed_rank_ends_the_run_or_restarts_it(data_dir: Path, tmp_path: Path, restarts):
    flags = [
        *TINY,
        f"--data_dir={data_dir}",
        "--dataset=a",
        "--eval_interval=100000",
        "--checkpoint_interval=20",
        "--rank_timeout=20",
        f"--max_iters={300 if restarts else 100000}",
    ]
    process = ScriptProcess(
        *flags, f"--out_dir={tmp_path / 'run'}", ranks=2, torchrun_options=[f"--max-restarts={restarts}"]
    )
    wait_for_line(process, "step 60:")
    os.kill(worker_pids(process)[1], signal.SIGKILL)
    killed_at = time.monotonic()
    output = process.stdout.read()
    assert (process.wait(60) == 0) == bool(restarts), output
    assert time.monotonic() - killed_at < 60
    if restarts:
        run_on_ranks(tmp_path / "undisturbed", 2, *flags)
        assert "resuming" in output
        assert_same_end(tmp_path / "run", tmp_path / "undisturbed")


# ---------------------------------------------------------------------------------------------------------------------
# 5. numbers that are not finite


def poison_rank_1() -> None:
    """Its second backward has a gradient that is not finite."""
    original = distributed.wrap_ddp
    n_backwards = 0

    def poison(grad: torch.Tensor) -> torch.Tensor:
        nonlocal n_backwards
        n_backwards += 1
        return grad * math.nan if n_backwards == 2 else grad

    def wrap_ddp(model: torch.nn.Module, ranks: distributed.Ranks) -> torch.nn.Module:
        if ranks.rank == 1:
            next(model.parameters()).register_hook(poison)
        return original(model, ranks)

    distributed.wrap_ddp = wrap_ddp


@pytest.mark.slow
@pytest.mark.distributed
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(data_dir: Path, tmp_path: Path):
    """Two steps, the second with a bad gradient on rank 1, leave what one good step leaves."""
    flags = [*TINY, f"--data_dir={data_dir}", "--dataset=a", "--eval_interval=100", "--optimizer=muon", "--dropout=0.1"]
    poisoned = run_on_ranks(tmp_path / "poisoned", 2, *flags, "--max_iters=2", prepare=poison_rank_1)
    clean = run_on_ranks(tmp_path / "clean", 2, *flags, "--max_iters=1")
    assert equal_tensors(poisoned.last.weights, clean.last.weights)
    assert equal_tensors(poisoned.last.optimizer, clean.last.optimizer)
    assert metric(poisoned, "skipped") == [0, 1]
    assert "1 skipped" in poisoned.console
    assert poisoned.train[1]["grad_norm"] is None


def poison_gradients(monkeypatch, steps: Collection[int], factor: float = math.nan) -> None:
    """Multiply the gradients of these steps, counted from now on in this process."""
    original = Optimizer.clip_grad_norm
    n_steps = 0

    def clip_grad_norm(self, scaler, max_norm):
        nonlocal n_steps
        n_steps += 1
        if n_steps in steps:
            for parameter in self.parameters:
                parameter.grad *= factor
        return original(self, scaler, max_norm)

    monkeypatch.setattr(Optimizer, "clip_grad_norm", clip_grad_norm)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", train_args.OPTIMIZERS)
def test_a_skipped_step_leaves_every_optimizer_as_it_was(run, monkeypatch: pytest.MonkeyPatch, optimizer):
    flags = [f"--optimizer={optimizer}", "--weight_decay=0.1", "--ema_decay=0.9"]
    clean = run(*flags, "--max_iters=2", name="clean")
    poison_gradients(monkeypatch, [3])
    poisoned = run(*flags, "--max_iters=3", name="poisoned")
    assert equal_tensors(poisoned.last.weights, clean.last.weights)
    assert equal_tensors(poisoned.last.optimizer, clean.last.optimizer)
    assert metric(poisoned, "skipped") == [0, 0, 1]


def test_a_poisoned_first_step_is_skipped_too(run, monkeypatch: pytest.MonkeyPatch):
    start = run("--max_iters=0", "--optimizer=muon", name="start")
    poison_gradients(monkeypatch, [1])
    poisoned = run("--max_iters=1", "--optimizer=muon", name="poisoned")
    assert equal_tensors(poisoned.last.weights, start.last.weights)


@pytest.mark.slow
def test_too_many_skipped_steps_roll_back_once(run, monkeypatch: pytest.MonkeyPatch):
    """Three in a row exhaust the patience: the run continues from the checkpoint of step 4, as if they had not been."""
    flags = ["--max_iters=10", "--eval_interval=4", "--skip_patience=3", "--dropout=0.1", "--ema_decay=0.9"]
    undisturbed = run(*flags, name="undisturbed")
    poison_gradients(monkeypatch, [6, 7, 8])
    poisoned = run(*flags, name="poisoned")
    assert "going back to the newest checkpoint" in poisoned.console
    assert poisoned.progress.rollbacks == 1
    assert poisoned.losses == undisturbed.losses
    assert metric(poisoned, "step") == list(range(1, 11))
    assert equal_tensors(poisoned.last.weights, undisturbed.last.weights)


@pytest.mark.slow
def test_too_many_skipped_steps_twice_end_the_run(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    poison_gradients(monkeypatch, range(6, 100))
    with pytest.raises(SystemExit, match=r"3 steps in a row were skipped .* again"):
        run("--max_iters=100", "--eval_interval=4", "--skip_patience=3")
    assert checkpoint.newest(tmp_path / "run/checkpoints").name == "000004"


def test_weights_that_are_not_finite_are_never_saved(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    original = Optimizer.update

    def update(self, scaler, skip):
        original(self, scaler, skip)
        self.optimizers[0].param_groups[0]["params"][0].data[0, 0] = math.inf

    monkeypatch.setattr(Optimizer, "update", update)
    with pytest.raises(SystemExit, match="not finite"):
        run("--max_iters=4", "--eval_interval=100", "--checkpoint_interval=2")
    assert checkpoint.list_steps(tmp_path / "run/checkpoints") == []


@pytest.mark.slow
def test_outlying_gradients_are_skipped_and_the_window_is_saved(run, monkeypatch: pytest.MonkeyPatch):
    """A gradient a thousand times as large as usual in step 40, after a resume or not: that step alone is skipped."""
    flags = ["--eval_interval=100", "--spike_skip=8"]
    poison_gradients(monkeypatch, [40], factor=1000.0)
    whole = run(*flags, "--max_iters=44", name="whole")
    assert metric(whole, "skipped") == [0] * 39 + [1] * 5
    monkeypatch.undo()
    run(*flags, "--max_iters=38", name="resumed")
    poison_gradients(monkeypatch, [2], factor=1000.0)
    resumed = run("--init_from=resume", "--max_iters=44", name="resumed")
    assert equal_tensors(resumed.last.weights, whole.last.weights)


# ---------------------------------------------------------------------------------------------------------------------
# 6. data that changed, or that ends


@pytest.mark.slow
def test_changed_data_is_refused_on_resume(run, data_dir: Path, tmp_path: Path):
    shutil.copytree(data_dir / "a", tmp_path / "data/a")
    run(f"--data_dir={tmp_path / 'data'}")
    flip_byte(tmp_path / "data/a/train.bin")
    with pytest.raises(UserError, match=r"a/train.bin: .* --allow_data_change"):
        run("--init_from=resume", "--max_iters=6")
    resumed = run("--init_from=resume", "--max_iters=6", "--allow_data_change")
    assert "--allow_data_change" in resumed.console
    assert resumed.steps[-1] == 6
    assert run("--init_from=resume", "--max_iters=8").steps[-1] == 8, "the new data now belongs to the run"


def test_data_that_ends_is_a_finished_run(run):
    done = run("--max_epochs=0.05", "--max_iters=100000", "--eval_interval=100")
    assert done.steps[-1] == done.progress.step == math.ceil(0.05 * 193 / 4)


# ---------------------------------------------------------------------------------------------------------------------
# 7. two runs in one folder


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(fork, run, tmp_path: Path):
    checkpoints = tmp_path / "run/checkpoints"
    first = fork("--max_iters=1000000", "--checkpoint_interval=5", "--eval_interval=1000000")
    while not checkpoint.list_steps(checkpoints):
        time.sleep(0.05)
    for flag in ("--init_from=resume", "--overwrite"):
        with pytest.raises(UserError, match=f"process {first.pid} .* is training there"):
            run(flag)
    assert first.is_alive()
    first.kill()
    wait_for_exit(first)
    newest = checkpoint.list_steps(checkpoints)[-1]
    assert run("--init_from=resume", f"--max_iters={newest}").progress.step == newest


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_reported_once(
    run: Callable[..., RunFiles],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    number: int,
):
    """As some network file systems are. Only EWOULDBLOCK means that another process holds the lock."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    files.report_missing_locks.cache_clear()
    lock = local.acquire_lock(tmp_path)
    assert lock is not None
    os.close(lock)
    assert run("--max_iters=2", name="a").progress.step == 2
    assert run("--init_from=resume", "--max_iters=4", name="a").progress.step == 4
    assert not run_state.is_running(tmp_path / "a")


def test_a_lock_that_others_look_at_is_waited_for(tmp_path: Path):
    """A reader of runs shares the lock for an instant."""
    with (tmp_path / ".lock").open("w") as looked_at, run_dir.RunLock(tmp_path) as lock:
        assert files.lock_file(looked_at.fileno(), shared=True)
        threading.Timer(0.15, looked_at.close).start()
        lock.acquire()
        assert lock.file is not None


@pytest.mark.slow
def test_a_lock_file_that_cant_be_written_ends_no_run(run: Callable[..., RunFiles], tmp_path: Path):
    done = run("--max_iters=2")
    (done.out_dir / ".lock").unlink()
    (done.out_dir / ".lock").mkdir()  # permissions don't stop root
    assert run("--init_from=resume", "--max_iters=4").progress.step == 4


# ---------------------------------------------------------------------------------------------------------------------
# 8. an evaluation longer than the timeout of a rank


@pytest.mark.slow
@pytest.mark.distributed
def test_an_evaluation_longer_than_the_timeout_hangs_nothing(data_dir: Path, tmp_path: Path):
    flags = [
        *TINY,
        f"--data_dir={data_dir}",
        "--dataset=a",
        "--max_iters=2",
        "--eval_interval=2",
        "--eval_iters=800",
        "--rank_timeout=1",
        "--early_stop_patience=1",
    ]
    started_at = time.monotonic()
    assert run_on_ranks(tmp_path / "run", 2, *flags).steps[-1] == 2
    assert time.monotonic() - started_at > 2


# ---------------------------------------------------------------------------------------------------------------------
# 9. payloads


class Payload:
    """Unpickling it creates a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
def test_nothing_in_a_file_is_executed(run, tmp_path: Path, data_dir: Path):
    """A call in the pickles meta.pkl and ckpt.pt, in a config, and in a tokenizer."""
    trap = tmp_path / "sprung"
    bad_dataset = tmp_path / "data/bad"
    shutil.copytree(data_dir / "a", bad_dataset)
    (bad_dataset / "meta.json").unlink()
    (bad_dataset / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 10, "itos": Payload(trap)}))
    with pytest.raises(UserError):
        run(f"--data_dir={tmp_path / 'data'}", "--dataset=bad", name="pkl")

    torch.save({"model": {}, "model_args": Payload(trap)}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError):
        run(f"--init_from={tmp_path / 'ckpt.pt'}", name="pt")

    call = f"__import__('os').mkdir({str(trap)!r})"
    (tmp_path / "c.py").write_text(f"n_layer = {call}\n")
    with pytest.raises(SystemExit):
        train_args.parse([str(tmp_path / "c.py")])

    done = run()
    (done.out_dir / "tokenizer.json").write_text(json.dumps({"kind": call}))
    refused = run_script(f"--out_dir={done.out_dir}", script="sample.py", check=False)
    assert refused.returncode in (0, 2) and "Traceback" not in refused.stderr
    assert not trap.exists()


# ---------------------------------------------------------------------------------------------------------------------
# 10. any command line, any config

SPECS = configurator.arg_specs(train_args.TrainArgs)
# Not drawn: what reaches the network, takes minutes to compile, or is fixed by the test.
NOT_DRAWN = {
    "out_dir",
    "data_dir",
    "dataset",
    "wandb_log",
    "tensorboard_log",
    "plot_loss",
    "compile",
    "init_from",
    "gpt2_type",
    "device",
    "eval_only",
    "deterministic",
    "resume",
    "max_iters",
    "eval_iters",
}
DRAWN = sorted(SPECS.keys() - NOT_DRAWN)
ODD_TEXTS = [
    "",
    "0.5",
    "1e-3",
    "-1e9",
    "nan",
    "inf",
    "true",
    "False",
    "None",
    "a",
    "a,b",
    "a a",
    "{}",
    '{"eps": 1}',
    "adamw",
    "no:such",
    "../..",
    "é",
    "\x00",
    "9" * 40,
]
ODD_VALUES = st.one_of(st.integers(-3, 40).map(str), st.sampled_from(ODD_TEXTS))


def valid_values(name: str) -> st.SearchStrategy[str]:
    """Values that are probably valid."""
    spec = SPECS[name]
    if spec.choices:
        return st.sampled_from(tuple(spec.choices))
    if isinstance(spec.default, bool):
        return st.sampled_from(["true", "false"])
    return st.integers(1, 12).map(str)


@st.composite
def argument_lines(draw: st.DrawFn) -> list[str]:
    """Up to five flags; a third of their values are odd, a fifth of their names do not exist."""
    line = []
    for name in draw(st.lists(st.sampled_from(DRAWN), max_size=5)):
        prefix = draw(st.sampled_from(["", "", "", "", "x"]))
        value = draw(st.one_of(valid_values(name), valid_values(name), ODD_VALUES))
        line.append(f"--{prefix}{name}={value}")
    return line


def assert_refused_or_trained(line: list[str], data_dir: Path, capsys) -> None:
    """An error is printed, with status 2, before anything is trained; or the run trains."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--max_iters=1", "--eval_iters=1", f"--out_dir={folder}/run"]
        try:
            train.main(train_args.parse([*TINY, f"--data_dir={data_dir}", *line, *fixed]))
        except SystemExit as end:
            stderr = capsys.readouterr().err
            assert end.code == 2 or "not finite" in str(end.code), (line, end.code)
            assert end.code != 2 or (stderr.strip() and "Traceback" not in stderr)
        except UserError as error:
            assert str(error)
        capsys.readouterr()


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(line=argument_lines())
def test_random_argument_lines_are_refused_or_train(line, data_dir: Path, capsys: pytest.CaptureFixture[str]):
    names_data = any("training_mode" in flag for flag in line)
    assert_refused_or_trained(line if names_data else [*line, "--dataset=a"], data_dir, capsys)


CONFIGS = {
    ".py": (ROOT / "configs" / "modern_base.py").read_text()
    + f"base = {str(ROOT / 'configs' / 'modern.py')!r}\n"
    + "dataset = 'a'\nn_head = 2\nn_embd = 16\nblock_size = 8\nbatch_size = 4\nwarmup_iters = 0\n",
    ".json": json.dumps(
        {
            "dataset": "a",
            "n_embd": 16,
            "n_head": 2,
            "learning_rate": 1e-3,
            "decay_lr": True,
            "window": "SL",
            "norm": "rmsnorm",
            "optimizer_kwargs": {},
        },
        indent=1,
    ),
    ".yaml": (
        "dataset: a\nn_embd: 16\nlearning_rate: 1e-3\nnorm: rmsnorm\nwindow: LS\noptimizer: muon\ndecay_lr: true\n"
    ),
}
EDIT = st.tuples(st.integers(0, 1000), st.integers(0, 6), st.text(max_size=3))  # (position, deleted, inserted)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(suffix=st.sampled_from(list(CONFIGS)), edits=st.lists(EDIT, min_size=1, max_size=3))
def test_mutated_configs_are_refused_or_train(
    suffix, edits, data_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
):
    text = CONFIGS[suffix]
    for position, n_deleted, inserted in edits:
        position %= len(text)
        text = text[:position] + inserted + text[position + n_deleted :]
    config = tmp_path_factory.mktemp("configs") / f"mutated{suffix}"
    config.write_text(text, encoding="utf-8", errors="surrogatepass")
    assert_refused_or_trained([str(config)], data_dir, capsys)


# ---------------------------------------------------------------------------------------------------------------------
# commands as users of other trainers type them


@pytest.mark.slow
def test_other_names_of_arguments_and_resuming_by_a_checkpoints_config(data_dir: Path, tmp_path: Path):
    config = dict(flag.removeprefix("--").split("=") for flag in TINY if not flag.startswith("--max_iters"))
    config |= {"dataset": "a", "data_dir": str(data_dir), "eval_interval": 1000, "steps": 10}
    config_path = tmp_path / "x.json"
    config_path.write_text(json.dumps(config))
    out_dir = tmp_path / "outputs/a"
    flags = [f"--config_path={config_path}", "--log_freq", 5]
    run_script(*flags, f"--output_dir={out_dir}", "--steps", 40, "--save_freq", 20)
    assert read_run(out_dir).steps == [20, 40]

    saved_config = out_dir / "checkpoints/000040/train_config.json"
    output = run_script(f"--config_path={saved_config}", "--resume=true", "--steps=100").stdout
    resumed = read_run(out_dir)
    assert "resuming" in output
    assert resumed.steps == [40, 80, 100]  # a restart of the command would name 40 again
    assert metric(resumed, "step")[-1] == 100

    run_script(*flags, f"--output_dir={tmp_path / 'whole'}", "--steps=100")
    assert equal_tensors(resumed.last.weights, read_run(tmp_path / "whole").last.weights)
