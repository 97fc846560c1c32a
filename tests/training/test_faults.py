"""Runs that are killed, starved of disk, fed bad bytes and bad numbers: nothing is lost. tests/README.md has the table of these faults.

Processes are real; those that only need to die quickly are forked from one that has torch loaded already.
"""

import contextlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial

import pytest
import torch
from helpers import ROOT, TINY, equal_tensors, read_run, run_script, start_ranks, wait_for_exit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import configurator
import train
import train_args
from nanoforge.errors import UserError
from nanoforge.training import checkpoint
from nanoforge.training.optimizers import Optimizer


def die_at(which: int) -> None:
    """SIGKILL at the which-th call of a save that changes the disk, that of step 4 and later."""
    calls = [0]

    def deadly(module, name: str) -> None:
        plain = getattr(module, name)

        def call(*args, **kwargs):
            done = plain(*args, **kwargs)
            if any(name in str(args[0]) for name in ("000004", "000008", "best.json", "checkpoints")):
                calls[0] += 1
                if calls[0] == which:
                    os.kill(os.getpid(), signal.SIGKILL)
            return done

        setattr(module, name, call)

    for module, name in ((checkpoint, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
        deadly(module, name)


def full_disk(which: int) -> None:
    """Files can't grow beyond 3 KB while step `which` is saved."""
    plain = checkpoint.save

    def save(checkpoints, snapshot, group, *, is_main):
        if snapshot.progress.step != which:
            return plain(checkpoints, snapshot, group, is_main=is_main)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
        try:
            return plain(checkpoints, snapshot, group, is_main=is_main)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    checkpoint.save = save


@pytest.fixture
def fork(data_dir, tmp_path):
    """fork("--flag=...", name="run", fault="die_at:3") begins a run, or resumes it, and gives its process."""

    def fork(*flags: str, name: str = "run", fault: str = ""):
        out_dir = tmp_path / name
        begun = checkpoint.list_steps(out_dir / "checkpoints")
        given = (
            ["--init_from=resume"]
            if begun
            else [*TINY, f"--data_dir={data_dir}", "--dataset=a", "--dropout=0.1", "--overwrite"]
        )
        before = None
        if fault:
            name_of_fault, _, which = fault.partition(":")
            before = partial({"die_at": die_at, "full_disk": full_disk}[name_of_fault], int(which))
        (process,) = start_ranks([*given, f"--out_dir={out_dir}", *flags], 1, tmp_path / f"{name}.log", before)
        return process

    return fork


def assert_same_end(tmp_path, one: str, other: str) -> None:
    """Bit for bit the same weights, optimizer state, counters and told losses."""
    a, b = read_run(tmp_path / one), read_run(tmp_path / other)
    assert a.steps[-1] == b.steps[-1]
    assert equal_tensors(a.last.weights, b.last.weights) and equal_tensors(a.last.optimizer, b.last.optimizer)
    assert [(line["step"], line["loss"]) for line in a.train] == [(line["step"], line["loss"]) for line in b.train]
    assert not list((tmp_path / one / "checkpoints").glob("*.tmp")) and not list(
        (tmp_path / one / "checkpoints").glob("*.old")
    )


# ---------------------------------------------------------------------------------------------------------------------
# 1. kills


def test_fifty_kills_at_random_moments_change_nothing(fork, tmp_path):
    flags = [
        "--checkpoint_interval=1",
        "--eval_interval=7",
        "--optimizer=muon",
        "--sampling_method=without_replacement",
    ]
    moments, kills = random.Random(0), 0
    while kills < 50:
        process = fork(*flags, "--max_iters=100000")
        time.sleep(moments.uniform(0.05, 0.7))
        process.kill()
        kills += wait_for_exit(process) == -signal.SIGKILL
    last = checkpoint.list_steps(tmp_path / "run/checkpoints")[-1] + 3
    assert last > 20, "the run got on between the kills"
    assert wait_for_exit(fork(*flags, f"--max_iters={last}")) == 0
    assert wait_for_exit(fork(*flags, f"--max_iters={last}", name="undisturbed")) == 0
    assert_same_end(tmp_path, "run", "undisturbed")


def test_a_kill_after_every_file_of_a_save_changes_nothing(fork, tmp_path):
    flags = ["--checkpoint_interval=4", "--eval_interval=100", "--max_iters=10", "--keep_last=1"]
    assert wait_for_exit(fork(*flags, name="undisturbed")) == 0
    for which in range(1, 100):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        status = wait_for_exit(fork(*flags, fault=f"die_at:{which}"))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert wait_for_exit(fork(*flags)) == 0
        assert_same_end(tmp_path, "run", "undisturbed")
    assert which > 20, "each file of two saves, their folders and renames"


# ---------------------------------------------------------------------------------------------------------------------
# 2. a full disk


def test_a_full_disk_costs_one_checkpoint(fork, tmp_path):
    flags = ["--checkpoint_interval=2", "--eval_interval=100", "--max_iters=8"]
    assert wait_for_exit(fork(*flags, fault="full_disk:4")) == 0
    done, log = read_run(tmp_path / "run"), (tmp_path / "run.log").read_text()
    assert "could not save step 4" in log and "File too large" in log and done.steps == [6, 8]
    assert [line["step"] for line in done.train] == list(range(1, 9)), "training went on"
    assert not list((tmp_path / "run/checkpoints").glob("*.tmp"))


def test_a_full_disk_at_the_last_save_is_a_failure_with_the_older_ones_intact(fork, tmp_path):
    flags = ["--checkpoint_interval=2", "--eval_interval=100", "--max_iters=8"]
    assert wait_for_exit(fork(*flags, fault="full_disk:8")) == 1
    assert (
        read_run(tmp_path / "run").steps == [4, 6]
        and "the last save, of step 8, failed" in (tmp_path / "run.log").read_text()
    )
    assert all(checkpoint.verify(tmp_path / f"run/checkpoints/{step:06d}") is None for step in (4, 6))
    assert wait_for_exit(fork(*flags)) == 0 and wait_for_exit(fork(*flags, name="undisturbed")) == 0
    assert_same_end(tmp_path, "run", "undisturbed")


def test_metrics_survive_a_full_disk(tmp_path, capsys):
    """Lines for which there is no room are told on the console; those after it are whole again."""
    from nanoforge.training.logger import RunLogger

    log = RunLogger(tmp_path, silent=False, start_step=0, evaluated=False, seconds=0.0, total_steps=10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    log.note(1, "x" * 200)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
        log.note(2, "y" * 200)
        log.note(3, "z" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.note(4, "w")
    log.close()
    whole = []
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            whole.append(json.loads(line)["step"])
    assert whole == [1, 4] and capsys.readouterr().out.count("a line is lost") == 2


# ---------------------------------------------------------------------------------------------------------------------
# 3. bad bytes


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped byte": flip,
    "a truncated file": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a deleted file": lambda path: path.unlink(),
}
FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "progress.json",
    "train_config.json",
    "tokenizer.json",
    "manifest.json",
)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(run, kind, tmp_path):
    whole = run("--checkpoint_interval=1", "--max_iters=4", name="whole")
    for name in FILES:
        shutil.rmtree(tmp_path / "hurt", ignore_errors=True)
        shutil.copytree(whole.out_dir, tmp_path / "hurt")
        DAMAGES[kind](tmp_path / "hurt/checkpoints/000004" / name)
        resumed = run("--init_from=resume", name="hurt")
        assert (
            "skipping checkpoint" in resumed.console
            and (name in resumed.console or name == "manifest.json")
            and "resuming" in resumed.console
            and "000003" in resumed.console
        )
        assert equal_tensors(resumed.last.weights, whole.last.weights)


# ---------------------------------------------------------------------------------------------------------------------
# 5. a rank that is gone


def torchrun(*flags: str, ranks: int = 2, script=ROOT / "train.py", options: tuple = ()) -> subprocess.Popen:
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        *options,
        str(script),
    ]
    return subprocess.Popen(
        [*start, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def workers(process: subprocess.Popen) -> list[int]:
    """Process ids of torchrun's ranks, in order."""
    told = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid), "--sort=pid"], capture_output=True, text=True
    ).stdout
    return [int(pid) for pid in told.split()]


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_killed_rank_ends_the_run_or_restarts_it(data_dir, tmp_path, restarts):
    flags = [
        *TINY,
        f"--data_dir={data_dir}",
        "--dataset=a",
        "--eval_interval=100000",
        "--checkpoint_interval=20",
        "--rank_timeout=20",
    ]
    process = torchrun(
        *flags, "--max_iters=600", f"--out_dir={tmp_path / 'run'}", options=(f"--max-restarts={restarts}",)
    )
    for line in process.stdout:
        if "step 60:" in line:
            break
    os.kill(workers(process)[1], signal.SIGKILL)
    began = time.monotonic()
    told = process.stdout.read()
    assert (process.wait(60) == 0) == bool(restarts) and time.monotonic() - began < 60, told
    if restarts:
        run_script(*flags, "--max_iters=600", f"--out_dir={tmp_path / 'whole'}", ranks=2)
        assert "resuming" in told
        assert_same_end(tmp_path, "run", "whole")


# ---------------------------------------------------------------------------------------------------------------------
# 6. numbers that are none

POISONED = """
import math, os, sys
sys.path.insert(0, {root!r})
import torch, train, train_args
from nanoforge import distributed
plain = distributed.wrap_ddp
steps, rank = {steps!r}, int(os.environ.get("RANK", 0))
def wrap_ddp(model, ranks):
    count = [0]
    def hook(grad):
        count[0] += 1
        return grad * math.nan if rank == {rank} and count[0] in steps else grad
    next(model.parameters()).register_hook(hook)
    return plain(model, ranks)
distributed.wrap_ddp = wrap_ddp
train.main(train_args.parse(sys.argv[1:]))
"""


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(data_dir, tmp_path):
    """Two steps, the second poisoned on rank 1: what one clean step leaves."""
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED.format(root=str(ROOT), steps=[2], rank=1))
    flags = [*TINY, f"--data_dir={data_dir}", "--dataset=a", "--eval_interval=100", "--optimizer=muon", "--dropout=0.1"]
    process = torchrun(*flags, "--max_iters=2", f"--out_dir={tmp_path / 'hurt'}", script=script)
    told = process.stdout.read()
    assert process.wait(60) == 0, told
    run_script(*flags, "--max_iters=1", f"--out_dir={tmp_path / 'clean'}", ranks=2)
    hurt, clean = read_run(tmp_path / "hurt"), read_run(tmp_path / "clean")
    assert equal_tensors(hurt.last.weights, clean.last.weights) and equal_tensors(
        hurt.last.optimizer, clean.last.optimizer
    )
    assert (
        [line["skipped"] for line in hurt.train] == [0, 1]
        and "1 skipped" in told
        and hurt.train[1]["grad_norm"] is None
    )


def poison(monkeypatch, steps, value=math.nan) -> None:
    """Gradients of these steps, by how many the process has made, are not finite, or `value` times as large."""
    plain, count = Optimizer.clip_grad_norm, [0]

    def clip(self, scaler, max_norm):
        count[0] += 1
        if count[0] in steps:
            for parameter in self.parameters:
                parameter.grad *= value
        return plain(self, scaler, max_norm)

    monkeypatch.setattr(Optimizer, "clip_grad_norm", clip)


@pytest.mark.parametrize("optimizer", train_args.OPTIMIZERS)
def test_a_skipped_step_leaves_every_optimizer_as_it_was(run, monkeypatch, optimizer):
    clean = run(f"--optimizer={optimizer}", "--max_iters=2", "--weight_decay=0.1", name="clean")
    poison(monkeypatch, [3])
    hurt = run(f"--optimizer={optimizer}", "--max_iters=3", "--weight_decay=0.1", name="hurt")
    assert equal_tensors(hurt.last.weights, clean.last.weights) and equal_tensors(
        hurt.last.optimizer, clean.last.optimizer
    )
    assert [line["skipped"] for line in hurt.train] == [0, 0, 1]


def test_a_poisoned_first_step_is_skipped_too(run, monkeypatch):
    start = run("--max_iters=0", "--optimizer=muon", name="start")
    poison(monkeypatch, [1])
    assert equal_tensors(run("--max_iters=1", "--optimizer=muon", name="hurt").last.weights, start.last.weights)


def test_too_many_skipped_steps_go_back_once(run, monkeypatch):
    """Three in a row, the patience: back to the checkpoint of step 4, and on as if nothing had been."""
    flags = ["--max_iters=10", "--eval_interval=4", "--skip_patience=3", "--dropout=0.1"]
    whole = run(*flags, name="whole")
    poison(monkeypatch, [6, 7, 8])
    hurt = run(*flags, name="hurt")
    assert "going back to the newest checkpoint" in hurt.console and hurt.progress.rollbacks == 1
    assert hurt.losses == whole.losses and [line["step"] for line in hurt.train] == list(range(1, 11))
    assert equal_tensors(hurt.last.weights, whole.last.weights)


def test_too_many_skipped_steps_twice_are_the_end(run, monkeypatch, tmp_path):
    poison(monkeypatch, range(6, 100))
    with pytest.raises(SystemExit, match=r"3 steps in a row were skipped .* again"):
        run("--max_iters=100", "--eval_interval=4", "--skip_patience=3")
    assert checkpoint.newest(tmp_path / "run/checkpoints").name == "000004"


def test_weights_that_are_not_finite_are_never_saved(run, monkeypatch, tmp_path):
    plain = Optimizer.update

    def update(self, scaler, skip):
        plain(self, scaler, skip)
        self.optimizers[0].param_groups[0]["params"][0].data[0, 0] = math.inf

    monkeypatch.setattr(Optimizer, "update", update)
    with pytest.raises(SystemExit, match="not finite"):
        run("--max_iters=4", "--eval_interval=100", "--checkpoint_interval=2")
    assert checkpoint.list_steps(tmp_path / "run/checkpoints") == []


def test_outlying_gradients_are_skipped_and_the_window_is_saved(run, monkeypatch):
    """An outlier 1,000 times as large as usual, 40 steps on, before or after a resume: that step alone is skipped."""
    flags = ["--max_iters=44", "--eval_interval=100", "--spike_skip=8"]
    poison(monkeypatch, [40], 1000.0)
    whole = run(*flags, name="whole")
    assert [line["step"] for line in whole.train if line["skipped"]] == [40, 41, 42, 43, 44] and whole.train[-1][
        "skipped"
    ] == 1
    monkeypatch.undo()
    run("--max_iters=38", *flags[1:], name="parts")
    poison(monkeypatch, [2], 1000.0)
    parts = run("--init_from=resume", "--max_iters=44", name="parts")
    assert equal_tensors(parts.last.weights, whole.last.weights)


# ---------------------------------------------------------------------------------------------------------------------
# 7. data that changed


def test_changed_data_is_refused_on_resume(run, data_dir, tmp_path):
    shutil.copytree(data_dir / "a", tmp_path / "data/a")
    where = f"--data_dir={tmp_path / 'data'}"
    run(where)
    flip(tmp_path / "data/a/train.bin")
    with pytest.raises(UserError, match=r"a/train.bin: .* --allow_data_change"):
        run("--init_from=resume", "--max_iters=6")
    resumed = run("--init_from=resume", "--max_iters=6", "--allow_data_change")
    assert "--allow_data_change" in resumed.console and resumed.steps[-1] == 6
    assert run("--init_from=resume", "--max_iters=8").steps[-1] == 8, "the new data is the run's now"


# ---------------------------------------------------------------------------------------------------------------------
# 8. two runs in one folder


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(fork, run, tmp_path):
    first = fork("--max_iters=1000000", "--checkpoint_interval=5", "--eval_interval=1000000")
    while not checkpoint.list_steps(tmp_path / "run/checkpoints"):
        time.sleep(0.05)
    for flags in (["--init_from=resume"], ["--overwrite"]):
        with pytest.raises(UserError, match=f"process {first.pid} .* is training there"):
            run(*flags)
    assert first.is_alive()
    first.kill()
    wait_for_exit(first)
    newest = checkpoint.list_steps(tmp_path / "run/checkpoints")[-1]
    assert run("--init_from=resume", f"--max_iters={newest}").progress.step == newest


# ---------------------------------------------------------------------------------------------------------------------
# 9. patience


def test_an_evaluation_longer_than_the_timeout_hangs_nothing(data_dir, tmp_path):
    flags = [
        *TINY,
        f"--data_dir={data_dir}",
        "--dataset=a",
        "--max_iters=2",
        "--eval_interval=2",
        "--eval_iters=1500",
        "--rank_timeout=1",
        "--early_stop_patience=1",
    ]
    began = time.monotonic()
    run_script(*flags, f"--out_dir={tmp_path / 'run'}", ranks=2)
    assert read_run(tmp_path / "run").steps[-1] == 2 and time.monotonic() - began > 2


# ---------------------------------------------------------------------------------------------------------------------
# 10. payloads


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_nothing_in_a_file_is_executed(run, tmp_path, data_dir, capsys):
    """A pickle with a call as meta.pkl and as ckpt.pt; a config and a tokenizer that name one."""
    trap = tmp_path / "sprung"
    bad = tmp_path / "data/bad"
    shutil.copytree(data_dir / "a", bad)
    (bad / "meta.json").unlink()
    (bad / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 10, "itos": Payload(trap)}))
    with pytest.raises(UserError):
        run(f"--data_dir={tmp_path / 'data'}", "--dataset=bad", name="pkl")
    torch.save({"model": {}, "model_args": Payload(trap)}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError):
        run(f"--init_from={tmp_path / 'ckpt.pt'}", name="pt")
    (tmp_path / "c.py").write_text(f"n_layer = __import__('os').mkdir({str(trap)!r})\n")
    with pytest.raises(SystemExit):
        train_args.parse([str(tmp_path / "c.py")])
    done = run()
    (done.out_dir / "tokenizer.json").write_text(json.dumps({"kind": f"__import__('os').mkdir({str(trap)!r})"}))
    refused = run_script(f"--out_dir={done.out_dir}", script="sample.py", check=False)
    assert refused.returncode in (0, 2) and "Traceback" not in refused.stderr
    assert not trap.exists()


# ---------------------------------------------------------------------------------------------------------------------
# 11. data that ends


def test_data_that_ends_is_a_whole_run(run):
    done = run("--max_epochs=0.05", "--max_iters=100000", "--eval_interval=100")
    assert done.steps[-1] == done.progress.step == math.ceil(0.05 * 193 / 4)


# ---------------------------------------------------------------------------------------------------------------------
# 12. any command line

ROWS = configurator.arg_specs(train_args.TrainArgs)
# Not drawn: what leaves this machine, takes minutes to compile, or is fixed below.
DRAWN = sorted(
    ROWS.keys()
    - {
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
)
ODD = st.one_of(
    st.integers(-3, 40).map(str),
    st.sampled_from(
        [
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
    ),
)


@st.composite
def argument_line(draw) -> list[str]:
    line = []
    for name in draw(st.lists(st.sampled_from(DRAWN), max_size=5)):
        row = ROWS[name]
        fitting = (
            st.sampled_from(row.choices)
            if row.choices
            else st.sampled_from(["true", "false"])
            if isinstance(row.default, bool)
            else st.integers(1, 12).map(str)
        )
        line.append(f"--{draw(st.sampled_from(['', '', '', '', 'x']))}{name}={draw(st.one_of(fitting, fitting, ODD))}")
    return line


def told_or_trained(line: list[str], data_dir, capsys) -> None:
    """A mistake is told with status 2 before anything is trained; otherwise the run runs."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            args = train_args.parse(
                [*TINY, f"--data_dir={data_dir}", *line, "--max_iters=1", "--eval_iters=1", f"--out_dir={folder}/run"]
            )
            train.main(args)
        except SystemExit as end:
            assert end.code == 2 or "not finite" in str(end.code), (line, end.code)
            told = capsys.readouterr().err
            assert end.code != 2 or (told.strip() and "Traceback" not in told)
        except UserError as mistake:
            assert str(mistake)
        capsys.readouterr()


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(line=argument_line())
def test_random_argument_lines_are_told_or_run(line, data_dir, capsys):
    told_or_trained(line + ([] if any("training_mode" in flag for flag in line) else ["--dataset=a"]), data_dir, capsys)


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
    ".yaml": "dataset: a\nn_embd: 16\nlearning_rate: 1e-3\nnorm: rmsnorm\nwindow: LS\noptimizer: muon\ndecay_lr: true\n",
}


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(list(CONFIGS)),
    cuts=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 6), st.text(max_size=3)), min_size=1, max_size=3),
)
def test_mutated_configs_are_told_or_run(kind, cuts, data_dir, capsys, tmp_path_factory):
    words = CONFIGS[kind]
    for place, length, put in cuts:
        place %= len(words)
        words = words[:place] + put + words[place + length :]
    config = tmp_path_factory.mktemp("configs") / f"mutated{kind}"
    config.write_text(words, encoding="utf-8", errors="surrogatepass")
    told_or_trained([str(config)], data_dir, capsys)


# ---------------------------------------------------------------------------------------------------------------------
# commands as other trainers' users type them


def test_other_names_of_arguments_and_resuming_by_a_checkpoints_config(data_dir, tmp_path):
    (tmp_path / "x.json").write_text(
        json.dumps(
            {flag.split("=")[0][2:]: flag.split("=")[1] for flag in TINY}
            | {"dataset": "a", "data_dir": str(data_dir), "eval_interval": 1000, "steps": 10}
        )
    )
    out = tmp_path / "outputs/a"
    run_script(
        f"--config_path={tmp_path / 'x.json'}", f"--output_dir={out}", "--steps", 40, "--log_freq", 5, "--save_freq", 20
    )
    assert read_run(out).steps == [20, 40]
    told = run_script(
        f"--config_path={out}/checkpoints/000040/train_config.json", "--resume=true", "--steps=100"
    ).stdout
    resumed = read_run(out)
    assert "resuming" in told and resumed.steps == [80, 100] and [line["step"] for line in resumed.train][-1] == 100
    run_script(
        f"--config_path={tmp_path / 'x.json'}", f"--output_dir={tmp_path / 'whole'}", "--steps=100", "--log_freq=5"
    )
    assert equal_tensors(resumed.last.weights, read_run(tmp_path / "whole").last.weights)
