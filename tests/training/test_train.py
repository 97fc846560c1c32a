"""The run as a whole: resumed equals uninterrupted, two ranks equal one, and nothing is lost or overwritten."""

import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    TINY,
    RunFiles,
    ScriptProcess,
    equal_tensors,
    fork_to_end,
    metric,
    read_run,
    run_on_ranks,
    run_python,
    run_script,
    start_ranks,
    wait_for_exit,
    wait_for_line,
)
from torch.utils._python_dispatch import TorchDispatchMode

import builders
import configurator
import train
import train_args
from model import GPT, GPTConfig
from nanoforge import console, device, run_state
from nanoforge.errors import UserError
from nanoforge.run_dir import RunRecord
from nanoforge.training import checkpoint, signals
from nanoforge.training.optimizers import Optimizer

HARD = [
    "--dropout=0.1",
    "--gradient_accumulation_steps=3",
    "--optimizer=muon",
    "--training_mode=multidataset",
    "--dataset_list",
    "a",
    "b",
    "--dataset_sampling_probs",
    "3",
    "1",
    "--dataset_mixing=sequence",
    "--sampling_method=without_replacement",
    "--lr_scheduler=cosine",
    "--lr_decay_iters=8",
    "--max_iters=8",
    "--eval_interval=4",
    "--log_data_hash",
]
MIXTURE = ["--training_mode=multidataset", "--dataset_list"]
CONTEXTS = ["--training_mode=multicontext", "--multicontext_datasets"]


@pytest.fixture(autouse=True)
def restore_nondeterminism():
    """--deterministic is set for a whole process, which these tests share."""
    yield
    torch.use_deterministic_algorithms(mode=False)


# ---------------------------------------------------------------------------------------------------------------------
# precision


@pytest.mark.slow
def test_automatic_precision_follows_from_the_instructions_and_is_kept(run, monkeypatch: pytest.MonkeyPatch):
    """On a CPU it is bfloat16 exactly where there are instructions for it; a resumed run keeps it."""
    capabilities = {"avx2": True, "avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    native = run("--dtype=auto", "--max_iters=1", name="native")
    assert native.config["dtype"] == "bfloat16"
    assert "avx512_bf16" in native.console
    capabilities["avx512_bf16"] = False
    emulated = run("--dtype=auto", "--max_iters=1", name="emulated")
    assert emulated.config["dtype"] == "float32"
    assert run("--init_from=resume", "--max_iters=2", name="native").config["dtype"] == "bfloat16"


def test_no_measurement_decides_the_precision(monkeypatch: pytest.MonkeyPatch):
    """No clock is read: a busy machine makes the same run as a quiet one. CPU features of x86 and of ARM count."""

    def no_clock():
        raise AssertionError("the precision depends on a time")

    monkeypatch.setattr(device.time, "perf_counter", no_clock)
    cpu = torch.device("cpu")
    for features, dtype in [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "amx_tile": True}, torch.float32),
        ({"neon": True, "bf16": False}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert device.choose_dtype("auto", cpu)[0] == dtype
        assert device.choose_dtype("bfloat16", cpu)[0] == torch.bfloat16


@pytest.mark.slow
def test_bfloat16_learns_as_float32_does(run):
    """The loss curves differ less than those of two seeds."""
    flags = ["--max_iters=60", "--eval_interval=60", "--learning_rate=1e-2"]
    float32 = run(*flags, name="float32").losses
    bfloat16 = run(*flags, "--dtype=bfloat16", name="bfloat16").losses
    other_seed = run(*flags, "--seed=7", name="seed").losses

    def max_gap(losses: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(losses, float32, strict=True))

    assert max_gap(bfloat16) < 0.5 * max_gap(other_seed)
    assert bfloat16[-1] < bfloat16[0] - 0.5


@pytest.mark.slow
def test_float16_overflow_anywhere_skips_the_step_everywhere(run, monkeypatch: pytest.MonkeyPatch):
    """One infinite gradient in a matrix of Muon's: no parameter of AdamW's moves either, and the scale is halved."""
    original = Optimizer.clip_grad_norm

    def clip_grad_norm(self, scaler, max_norm):
        self.parameters[3].grad[0] = math.inf
        return original(self, scaler, max_norm)

    monkeypatch.setattr(Optimizer, "clip_grad_norm", clip_grad_norm)
    start = run("--dtype=float16", "--max_iters=0", "--optimizer=muon", name="start")
    done = run("--dtype=float16", "--max_iters=3", "--optimizer=muon", name="overflow")
    assert equal_tensors(start.last.weights, done.last.weights)
    assert done.last.progress["scaler"]["scale"] == 2.0**13
    assert metric(done, "grad_norm") == [None] * 3, "strict JSON has no Infinity"


@pytest.mark.slow
def test_float16_keeps_its_scaler(run):
    scaler = run("--dtype=float16").last.progress["scaler"]
    assert scaler["scale"] > 1 and scaler["_growth_tracker"] == 4
    resumed = run("--init_from=resume", "--max_iters=6")
    assert resumed.last.progress["scaler"]["_growth_tracker"] == 6


# ---------------------------------------------------------------------------------------------------------------------
# the same run: repeated, resumed, in other batches, on other ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--compile", "--deterministic", "--n_layer=1"],
        ["--optimizer=adamw", "--ema_decay=0.5"],
        ["--optimizer=lion"],
        ["--dtype=bfloat16"],
    ],
    ids=["eager", "compiled", "adamw", "lion", "bfloat16"],
)
def test_resumed_run_is_bit_identical(run, flags, monkeypatch):
    """N steps = N/2 steps, resume, N/2 steps: weights, optimizer state, losses and data hashes."""
    graphs = functools.partial(torch.compile, backend="aot_eager_decomp_partition")  # inductor's, run as they are
    monkeypatch.setattr(torch, "compile", graphs)
    whole = run(*HARD, *flags, name="whole")
    run(*HARD, *flags, "--max_iters=4", "--lr_decay_iters=8", name="resumed")
    resumed = run("--init_from=resume", "--max_iters=8", name="resumed")
    assert metric(resumed, "step") == list(range(1, 9))
    assert resumed.losses == whole.losses
    assert metric(resumed, "data_hash") == metric(whole, "data_hash")
    assert equal_tensors(resumed.last.weights, whole.last.weights)
    assert equal_tensors(resumed.last.optimizer, whole.last.optimizer)
    assert resumed.last.progress["optimizer"] == whole.last.progress["optimizer"]
    assert [line["val_loss"] for line in resumed.evals] == [line["val_loss"] for line in whole.evals]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ScheduleFreeSGD", "NestedStates"])
def test_a_packages_optimizer_trains_evaluates_saves_and_resumes(run: Callable[..., RunFiles], name: str):
    """Bit for bit as never stopped, and as evaluated once. Evaluated and saved are the weights of its eval()."""
    flags = [f"--optimizer=package_optimizers:{name}", "--learning_rate=0.1", "--dropout=0.1", "--lr_scheduler=linear"]
    flags += ["--lr_decay_iters=8", "--optimizer_kwargs={}"]
    whole = run(*flags, "--max_iters=8", name="whole")
    run(*flags, "--max_iters=4", name="parts")
    parts = run("--init_from=resume", "--max_iters=8", name="parts")
    rarely = run(*flags, "--max_iters=8", "--eval_interval=8", name="rarely")
    for other in (parts, rarely):
        assert other.losses == whole.losses
        assert equal_tensors(dict(other.last.weights), dict(whole.last.weights))
        assert equal_tensors(dict(other.last.optimizer), dict(whole.last.optimizer))
        assert other.last.progress["optimizer"] == whole.last.progress["optimizer"]
    assert [line["val_loss"] for line in parts.evals] == [line["val_loss"] for line in whole.evals]
    if name == "ScheduleFreeSGD":
        for parameter, x in whole.last.weights.items():
            y, z = (whole.last.optimizer[key] for key in (f"trained/{parameter}", f"0/{parameter}/z"))
            torch.testing.assert_close(x, y + (1 - 1 / 0.9) * (z - y))
            assert not torch.equal(x, y)
        tuned = run(f"--init_from={whole.out_dir}/checkpoints/000008", "--max_iters=0", name="tuned")
        assert tuned.evals[0]["val_loss"] == whole.evals[-1]["val_loss"]


@pytest.mark.slow
def test_runs_repeat_bit_for_bit_and_seeds_differ(run):
    first = run("--dropout=0.2", name="first")
    again = run("--dropout=0.2", name="again")
    other = run("--dropout=0.2", "--seed=7", name="other")
    assert first.losses == again.losses
    assert equal_tensors(first.last.weights, again.last.weights)
    assert first.losses != other.losses


@pytest.mark.slow
def test_evaluating_and_logging_change_nothing_learned(run):
    often = run("--eval_interval=1", "--log_interval=1", "--dropout=0.2", name="often")
    rarely = run("--eval_interval=4", "--log_interval=4", "--dropout=0.2", name="rarely")
    assert equal_tensors(often.last.weights, rarely.last.weights)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "batch",
    [
        ["--batch_size=64"],
        ["--batch_size=6", "--gradient_accumulation_steps=3"],
        ["--batch_size=4", "--gradient_accumulation_steps=2", "--optimizer=muon"],
    ],
)
def test_two_ranks_train_the_same_run(data_dir: Path, tmp_path: Path, batch):
    """The same global batches, and losses within 1e-5: averaged gradients are those of the whole batch."""
    flags = [*TINY, f"--data_dir={data_dir}", "--dataset=a", "--log_data_hash", "--max_iters=6", *batch]
    one, two = (run_on_ranks(tmp_path / name, ranks, *flags) for name, ranks in (("one", 1), ("two", 2)))
    assert metric(one, "data_hash") == metric(two, "data_hash")
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert [line["val_loss"] for line in two.evals] == pytest.approx([line["val_loss"] for line in one.evals], rel=1e-5)
    assert metric(two, "grad_norm") == pytest.approx(metric(one, "grad_norm"), rel=1e-4)
    assert one.last.progress["tokens"] == two.last.progress["tokens"]


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_dont_divide_the_batch_are_refused_with_those_that_do(data_dir: Path, tmp_path: Path):
    flags = [*TINY, f"--data_dir={data_dir}", "--dataset=a", "--batch_size=9", f"--out_dir={tmp_path / 'x'}"]
    processes = start_ranks(flags, ranks=2, log=tmp_path / "log")
    assert all(wait_for_exit(process) for process in processes)
    text = (tmp_path / "log").read_text()
    assert text.count("2 ranks don't divide the 9 sequences") == 1 and "1, 3, 9" in text
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_accumulation_equals_a_large_batch(run):
    large = run("--batch_size=8", name="large")
    small = run("--batch_size=2", "--gradient_accumulation_steps=4", name="small")
    assert small.losses == pytest.approx(large.losses, rel=1e-6)


@pytest.mark.slow
def test_activation_checkpointing_changes_no_number(run):
    plain = run("--dropout=0.3", name="plain")
    checkpointed = run("--dropout=0.3", "--activation_checkpointing", name="checkpointed")
    assert equal_tensors(plain.last.weights, checkpointed.last.weights)


def test_max_iters_are_updates(run):
    """AdamW's own counter witnesses the number of updates."""
    done = run("--max_iters=5")
    assert done.progress.step == done.steps[-1] == 5
    assert {int(value) for name, value in done.last.optimizer.items() if name.endswith("/step")} == {5}
    assert [line["step"] for line in done.evals] == [0, 2, 4, 5]


class CountReads(TorchDispatchMode):
    """Counts the tensors that are read on the host (aten::_local_scalar_dense)."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_hot_loop_reads_nothing_back(run, optimizer):
    """40 steps read as many tensors as 10 when neither logs in between."""
    flags = [f"--optimizer={optimizer}", "--log_interval=1000", "--eval_interval=1000", "--dropout=0.1"]
    counts = []
    for steps in (10, 40):
        with CountReads() as reads:
            run(*flags, f"--max_iters={steps}", name=f"{steps}")
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


# ---------------------------------------------------------------------------------------------------------------------
# resume


@pytest.mark.slow
def test_resume_drops_what_was_logged_after_the_checkpoint(run):
    first = run()
    later_line = json.dumps({"event": "train", "step": 5, "seconds": 1.0, "loss": 0.5})
    with (first.out_dir / "metrics.jsonl").open("a") as file:
        file.write(later_line + '\n{"event": "tra')
    resumed = run("--init_from=resume", "--max_iters=6")
    assert metric(resumed, "step") == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in resumed.evals] == [0, 2, 4, 6]
    assert 0.5 not in resumed.losses
    assert metric(resumed, "seconds") == sorted(metric(resumed, "seconds"))


@pytest.mark.slow
def test_resume_keeps_the_runs_arguments_unless_they_are_set(run):
    run("--learning_rate=0.005", "--n_layer=3")
    resumed = run("--init_from=resume", "--max_iters=5", "--weight_decay=0.3")
    assert resumed.config["learning_rate"] == resumed.train[-1]["lr"] == 0.005
    assert resumed.config["n_layer"] == 3
    assert resumed.config["weight_decay"] == 0.3


def test_resume_refuses_another_shape(run, capsys: pytest.CaptureFixture[str]):
    done = run()
    with pytest.raises(SystemExit) as end:
        train_args.parse(["--init_from=resume", f"--out_dir={done.out_dir}", "--n_layer=5", "--n_embd=18"])
    stderr = capsys.readouterr().err
    assert end.value.code == 2
    assert "--n_layer=5" in stderr and "has 2" in stderr and "--n_embd=18" in stderr


def test_resume_refuses_another_optimizer(run):
    run()
    with pytest.raises(UserError, match="optimizer"):
        run("--init_from=resume", "--optimizer=sgd", "--max_iters=6")


@pytest.mark.slow
def test_resume_skips_a_damaged_checkpoint(run):
    done = run("--max_iters=6")
    path = done.out_dir / "checkpoints/000006/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    resumed = run("--init_from=resume")
    assert "skipping checkpoint" in resumed.console and "its sha256 differs" in resumed.console
    assert "resuming" in resumed.console and "000004" in resumed.console
    assert equal_tensors(resumed.last.weights, done.last.weights)
    assert metric(resumed, "step") == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_checkpoint_that_was_being_replaced_is_not_lost(run):
    """A save killed between its two renames left the old checkpoint under another name: it is restored."""
    done = run()
    last = done.out_dir / "checkpoints/000004"
    last.rename(last.with_suffix(".old"))
    resumed = run("--init_from=resume", "--max_iters=5")
    assert "resuming" in resumed.console and "000004" in resumed.console
    assert metric(resumed, "step") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("flags", "reordered"),
    [
        ([*MIXTURE, "a", "b", "--multidataset_wte"], ["--dataset_list", "b", "a"]),
        ([*CONTEXTS, "a", "upper"], ["--multicontext_datasets", "upper", "a"]),
    ],
    ids=["mixture", "contexts"],
)
def test_resume_refuses_vocabularies_in_another_order(run, flags, reordered):
    """The rows of each dataset in the model follow from the order."""
    run(*flags)
    with pytest.raises(UserError, match=r"in this order|another tokenizer"):
        run("--init_from=resume", *reordered, "--max_iters=6")


@pytest.mark.slow
def test_resume_with_another_batch_size_continues_the_counts(run):
    first = run("--max_tokens=96", "--max_iters=100")
    resumed = run("--init_from=resume", "--batch_size=8", "--max_tokens=256")
    assert first.progress.step == 3
    assert resumed.progress.step == 3 + math.ceil((256 - 96) / 64)
    assert resumed.progress.tokens == 96 + 3 * 64
    assert "global batch" in resumed.console


def forget_counts(folder: Path) -> None:
    """Make a checkpoint one of an older version."""
    progress = json.loads((folder / "progress.json").read_text())
    del progress["sequences"]
    (folder / "progress.json").write_text(json.dumps(progress))
    checkpoint.write_manifest(folder)


@pytest.mark.slow
@pytest.mark.parametrize("is_old", [False, True])
def test_a_mixture_resumed_with_other_weights_goes_on_in_each_dataset(run: Callable[..., RunFiles], *, is_old: bool):
    """tokens/DATASET never falls, and the new weights decide what is drawn from then on; also from a checkpoint of an
    older version, which has no counts."""
    flags = [*MIXTURE, "a", "b", "--dataset_mixing=sequence", "--sampling_method=without_replacement"]
    first = run(*flags, "--dataset_sampling_probs", "9", "1", "--max_iters=8")
    before = first.evals[-1]
    if is_old:
        forget_counts(first.out_dir / "checkpoints/000008")
    resumed = run("--init_from=resume", "--dataset_sampling_probs", "1", "9", "--max_iters=16")
    after = resumed.evals[-1]
    assert before["tokens/a"] > before["tokens/b"]
    drawn = {name: after[f"tokens/{name}"] - before[f"tokens/{name}"] for name in "ab"}
    assert min(drawn.values()) >= 0 and drawn["b"] > drawn["a"]
    assert sum(drawn.values()) == 8 * 4 * 8
    assert "--dataset_sampling_probs=1.0 9.0 (was 9.0 1.0)" in resumed.console
    assert resumed.last.progress["sequences"] == {name: after[f"tokens/{name}"] // 8 for name in "ab"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [["--seed=7"], ["--eval_iters=3"], ["--batch_size=8"], ["--dataset=b", "--allow_data_change"]],
    ids=["seed", "eval_iters", "batch_size", "dataset"],
)
def test_a_best_loss_is_forgotten_when_val_loss_is_measured_on_something_else(
    run: Callable[..., RunFiles], flags: list[str]
):
    """With a rate of 0 every later loss is equal to the best, or is the first of another kind."""
    first = run("--learning_rate=0", "--early_stop_patience=9")
    resumed = run("--init_from=resume", *flags, "--max_iters=6")
    assert first.progress.best_step == 2 and first.progress.worse_evaluations == 1
    assert (resumed.progress.best_step, resumed.progress.worse_evaluations) == (6, 0)
    assert json.loads((resumed.out_dir / "best.json").read_text())["step"] == 6
    assert "best.json" in resumed.console
    again = run("--init_from=resume", "--max_iters=8")
    assert (again.progress.best_step, again.progress.worse_evaluations) == (6, 1)


@pytest.mark.slow
def test_a_best_loss_stands_while_val_loss_is_measured_alike(
    run: Callable[..., RunFiles], data_dir: Path, tmp_path: Path
):
    """In other batches of as many rows, with another training text."""
    shutil.copytree(data_dir / "a", tmp_path / "data/a")
    run("--learning_rate=0", f"--data_dir={tmp_path / 'data'}")
    path = tmp_path / "data/a/train.bin"
    np.fromfile(path, dtype=np.uint16)[::-1].tofile(path)
    flags = ["--batch_size=2", "--eval_iters=2", "--gradient_accumulation_steps=2", "--weight_decay=0.3"]
    flags += ["--allow_data_change"]
    resumed = run("--init_from=resume", *flags, "--max_iters=6")
    assert resumed.progress.best_step == 2
    assert "best.json" not in resumed.console


@pytest.mark.slow
def test_resume_refuses_other_datasets_and_takes_the_same_under_another_name(
    run: Callable[..., RunFiles], data_dir: Path, tmp_path: Path
):
    """Datasets that the run has not seen, or that are gone."""
    run()
    with pytest.raises(UserError, match=r"b/train.bin.*--allow_data_change"):
        run("--init_from=resume", "--dataset=b", "--max_iters=6")
    shutil.copytree(data_dir / "a", tmp_path / "elsewhere/renamed")
    moved = run("--init_from=resume", f"--data_dir={tmp_path / 'elsewhere'}", "--dataset=renamed", "--max_iters=6")
    assert moved.progress.step == 6 and "best.json" not in moved.console
    assert moved.last.progress["sequences"] == {"renamed": 24}
    run(*MIXTURE, "a", "b", name="two")
    with pytest.raises(UserError, match=r"b/val.bin"):
        run("--init_from=resume", "--dataset_list", "a", name="two")


@pytest.mark.slow
def test_a_schedule_that_ends_before_the_run_is_reported_at_its_start(run: Callable[..., RunFiles]):
    """Resumed with a doubled max_iters, a run of --depth stays at its last learning rate."""
    depth = ["--depth=2", "--aspect=16", "--optimizer=muon", "--lr_scheduler=linear", "--min_lr=0", "--warmup_iters=0"]
    tiny = [flag for flag in TINY if not flag.startswith(("--n_", "--max_iters"))]
    first = run(*tiny, *depth, "--max_iters=4", "--overwrite")
    assert "--lr_decay_iters" not in first.console
    resumed = run("--init_from=resume", "--max_iters=8")
    assert "--lr_decay_iters=4" in resumed.console
    assert metric(resumed, "lr")[4:] == [0.0] * 4
    short = run("--max_iters=2", "--warmup_iters=5", name="short")
    assert "--warmup_iters=5" in short.console
    halfway = run("--lr_scheduler=cosine", "--lr_decay_iters=100", "--max_tokens=64", name="halfway")
    assert "--lr_decay_iters=100" in halfway.console


@pytest.mark.parametrize("scheduler", ["exponential", "linear", "cosine", "wsd"])
def test_muon_decays_to_min_lr_where_learning_rate_is_zero(scheduler: str):
    """min_lr is the last rate of the first peak that isn't 0; the embedding's and the head's stay at 0."""
    flags = ["--optimizer=muon", "--learning_rate=0", "--muon_learning_rate=0.02", "--min_lr=0.002", "--warmup_iters=9"]
    args = train_args.parse([*flags, f"--lr_scheduler={scheduler}", "--lr_decay_iters=100"])
    scale = builders.lr_scale(args)
    assert [scale(step) for step in (9, 100, 200)] == pytest.approx([1, 0.1, 0.1])
    assert all(0.1 <= scale(step) <= 1 for step in range(100))


@pytest.mark.slow
@pytest.mark.parametrize("first_part", [3, 5])
def test_early_stopping_counts_alike_in_one_part_and_in_two(run: Callable[..., RunFiles], first_part: int):
    """No loss is better than that of step 2. The evaluation that ends the first part, at no interval, isn't counted."""
    flags = ["--early_stop_patience=3", "--learning_rate=0"]
    whole = run(*flags, "--max_iters=60", name="whole")
    run(*flags, f"--max_iters={first_part}", name="parts")
    parts = run("--init_from=resume", "--max_iters=60", name="parts")
    assert parts.progress.step == whole.progress.step == 8
    older = {k: v for k, v in whole.last.progress.items() if k != "patience_val_loss"}
    assert checkpoint.Progress.from_json(older).patience_val_loss == whole.last.progress["best_val_loss"]


@pytest.mark.slow
def test_resume_restores_a_lost_tokenizer_and_best_json(run):
    done = run()
    (done.out_dir / "tokenizer.json").unlink()
    (done.out_dir / "best.json").unlink()
    resumed = run("--init_from=resume", "--max_iters=6", "--learning_rate=0")
    assert resumed.steps[-1] == 6
    assert (done.out_dir / "tokenizer.json").exists()
    best = json.loads((done.out_dir / "best.json").read_text())
    assert best["val_loss"] == min(line["val_loss"] for line in resumed.evals if line["step"])


# ---------------------------------------------------------------------------------------------------------------------
# signals


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_with_a_checkpoint(data_dir: Path, tmp_path: Path, number):
    flags = [*TINY, f"--data_dir={data_dir}", "--dataset=a", f"--out_dir={tmp_path / 'x'}"]
    process = ScriptProcess(*flags, "--max_iters=100000", "--eval_interval=100000", "--log_interval=10")
    wait_for_line(process, "step 20:")
    process.send_signal(number)
    process.stdout.read()
    assert process.wait(30) == 128 + number
    stopped = read_run(tmp_path / "x")
    assert stopped.last.progress["step"] == stopped.steps[-1] >= 20


def signal_itself(monkeypatch: pytest.MonkeyPatch, number: int, step: int) -> None:
    """This process signals itself in a step of the next run."""
    original = Optimizer.update
    n_steps = 0

    def update(self, scaler, skip):
        nonlocal n_steps
        n_steps += 1
        if n_steps == step:
            os.kill(os.getpid(), number)
        original(self, scaler, skip)

    monkeypatch.setattr(Optimizer, "update", update)


@pytest.mark.parametrize("number", run_state.STOP_SIGNALS, ids=lambda number: number.name)
def test_every_stop_signal_saves_and_is_a_status_of_a_stopped_run(
    run: Callable[..., RunFiles], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
):
    handler = signal.signal(number, signal.SIG_DFL)
    signal_itself(monkeypatch, number, step=3)
    try:
        with pytest.raises(SystemExit) as end:
            run("--max_iters=100", "--eval_interval=100")
    finally:
        signal.signal(number, handler)
    assert end.value.code == 128 + number
    assert read_run(tmp_path / "run").steps == [3]
    assert run_state.run_status(tmp_path / "run").state == "stopped"


def test_nohup_ignores_a_terminal_that_closes(run: Callable[..., RunFiles], monkeypatch: pytest.MonkeyPatch):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_itself(monkeypatch, signal.SIGHUP, step=2)
        assert run("--max_iters=4").progress.step == 4
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_a_repeated_signal_of_a_limit_of_cpu_time_is_no_second_request(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
    with signals.Signals() as received:
        os.kill(os.getpid(), signal.SIGXCPU)
        os.kill(os.getpid(), signal.SIGXCPU)
        assert received.number == signal.SIGXCPU


@pytest.mark.slow
def test_a_signal_during_evaluation_is_obeyed_at_once(data_dir: Path, tmp_path: Path):
    """An evaluation of minutes is left at once, and the resumed run makes it: as if nothing had happened."""
    flags = [*TINY, f"--data_dir={data_dir}", "--dataset=a", "--max_iters=20", "--eval_interval=20"]
    out_dir = f"--out_dir={tmp_path / 'x'}"
    process = ScriptProcess(*flags, "--eval_iters=200000", "--log_interval=20", out_dir)
    process.stdout.readline()
    time.sleep(6)  # the evaluation before the first step has started
    signaled_at = time.monotonic()
    for _ in range(3):  # a scheduler signals the processes, and torchrun passes its own on
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    process.stdout.read()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert time.monotonic() - signaled_at < 5
    assert read_run(tmp_path / "x").steps == [0]

    run_script("--init_from=resume", out_dir, "--eval_iters=1")
    run_script(*flags, "--eval_iters=1", f"--out_dir={tmp_path / 'whole'}")
    resumed, whole = read_run(tmp_path / "x"), read_run(tmp_path / "whole")
    assert equal_tensors(resumed.last.weights, whole.last.weights)
    assert [line["step"] for line in resumed.evals] == [0, 20]


SLEEPER = """
import time
from nanoforge.training.signals import Signals

with Signals() as signals:
    print("ready", flush=True)
    time.sleep(9)
    print(signals.number)
    time.sleep(9)
"""


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path: Path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    process = ScriptProcess(script=tmp_path / "sleeper.py")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(3) == 130


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_save_together_on_a_signal(data_dir: Path, tmp_path: Path):
    flags = [*TINY, f"--data_dir={data_dir}", "--dataset=a", f"--out_dir={tmp_path / 'x'}"]
    flags += ["--max_iters=100000", "--eval_interval=100000", "--log_interval=10"]
    process = ScriptProcess(*flags, ranks=2)
    wait_for_line(process, "step 20:")
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    assert process.wait(40) != 0
    assert read_run(tmp_path / "x").steps[-1] >= 20


# ---------------------------------------------------------------------------------------------------------------------
# the run's folder


@pytest.mark.slow
def test_an_out_dir_that_holds_a_run_is_not_overwritten(run):
    out_dir = run().out_dir

    def contents() -> dict:
        return {path: path.read_bytes() for path in out_dir.rglob("*") if path.is_file()}

    before = contents()
    with pytest.raises(UserError, match="--overwrite"):
        run()
    assert contents() == before
    again = run("--overwrite", "--max_iters=2")
    assert again.steps == [2] and len(again.train) == 2


def test_overwrite_keeps_a_linked_folder(run, tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    again = run("--overwrite", "--max_iters=2")
    assert again.steps == [2]
    assert (tmp_path / "disk/000002").is_dir()


def test_an_out_dir_that_cant_be_written_is_an_error(run, tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="--out_dir"):
        run()


@pytest.mark.slow
def test_a_runs_config_is_a_config_that_deletes_nothing(run, tmp_path: Path):
    """Also after --overwrite and after a resume, which keeps where the run came from."""
    run()
    first = run("--overwrite")
    run("--init_from=resume", "--max_iters=5")
    config_path = first.out_dir / "train_config.json"
    config = json.loads(config_path.read_text())
    assert (config["init_from"], config["overwrite"], config["max_iters"]) == ("scratch", False, 5)
    with pytest.raises(UserError, match="--overwrite"):
        train.main(train_args.parse([str(config_path)]))
    train.main(train_args.parse([str(config_path), f"--out_dir={tmp_path / 'again'}"]))
    assert read_run(tmp_path / "again").losses == read_run(first.out_dir).losses


@pytest.mark.slow
def test_the_record_has_the_models_counts_and_one_without_them_loads(run):
    done = run()
    record = RunRecord.load(done.out_dir)
    model = GPT(GPTConfig(**record.model | {"vocab_sizes": tuple(record.model["vocab_sizes"])}))
    assert record.counts == {"parameters": model.count_parameters(), "flops_per_token": model.flops_per_token()}
    older = {name: value for name, value in done.config.items() if name not in ("_counts", "_base")}
    (done.out_dir / "train_config.json").write_text(json.dumps(older))
    record = RunRecord.load(done.out_dir)
    assert record.counts == record.base == {}
    assert record.args["n_layer"] == 2
    assert run("--init_from=resume", "--max_iters=5").progress.step == 5


def test_runs_without_git(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "git_commit" not in run().config["_about"]


def test_notes_are_logged_in_the_metrics_too(run):
    lines = [json.loads(line) for line in (run().out_dir / "metrics.jsonl").read_text().splitlines()]
    (note,) = (line for line in lines if line["event"] == "note")
    assert note["text"].startswith("finished:")
    assert note["step"] == 4


def test_best_checkpoint_outlives_later_worse_ones(run):
    """A learning rate that ruins the model after step 2: best.json stays with the better step."""
    done = run("--max_iters=8", "--lr_scheduler=none", "--learning_rate=3e-2", "--weight_decay=0")
    best = json.loads((done.out_dir / "best.json").read_text())
    losses = {line["step"]: line["val_loss"] for line in done.evals if line["step"]}
    assert best["val_loss"] == min(losses.values()) == losses[best["step"]]
    assert done.steps == sorted({best["step"], 6, 8})


@pytest.mark.slow
def test_a_damaged_best_checkpoint_gives_way_to_the_newest(run):
    done = run("--learning_rate=0", "--max_iters=8")  # step 2 stays the best
    assert done.steps == [2, 6, 8]
    (done.out_dir / "checkpoints/000002/progress.json").write_text("{}")
    sampled = run_script(f"--out_dir={done.out_dir}", "--max_new_tokens=5", script="sample.py")
    assert "skipping the best checkpoint" in sampled.stderr
    assert sampled.stdout


def test_a_run_folder_is_complete(run):
    done = run()
    lines = done.console.splitlines()
    labels = ["run ", "model ", "data ", "a step ", "length ", "device ", "time ", "estimated time: "]
    for label in labels:
        assert any(line.startswith(label) for line in lines), label
    run_files = {".lock", "train_config.json", "metrics.jsonl", "tokenizer.json", "best.json", "checkpoints"}
    assert {path.name for path in done.out_dir.iterdir()} == run_files
    checkpoint_files = checkpoint.REQUIRED_FILES | {"manifest.json"}
    assert {path.name for path in (done.out_dir / "checkpoints/000004").iterdir()} == checkpoint_files
    assert configurator.arg_specs(train_args.TrainArgs).keys() <= done.config.keys()
    train_keys = {"event", "step", "seconds", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_ms"}
    for line in done.train:
        assert train_keys <= line.keys()
    for line in done.evals:
        assert {"event", "step", "seconds", "train_loss", "val_loss", "bits_per_byte"} <= line.keys()
        assert line["bits_per_byte"] == pytest.approx(line["val_loss"] / math.log(2)), "a character is one byte"


def test_a_loss_that_is_not_finite_ends_the_run_unsaved(run, tmp_path: Path):
    with pytest.raises(SystemExit, match="nothing was saved"):
        run("--learning_rate=1e30", "--grad_clip=0", "--max_iters=50", "--optimizer=sgd")
    assert run_state.run_status(tmp_path / "run").state == "diverged", "not killed"
    with pytest.raises(UserError) as refused:
        run("--learning_rate=1e-3")
    assert "--overwrite" in str(refused.value) and "--init_from=resume" not in str(refused.value), "it has none"


def test_an_error_while_training_is_the_state_of_the_run(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **values: object) -> None:
        raise OSError("no more steps")

    monkeypatch.setattr(train.StepLogger, "log_step", fail)
    with pytest.raises(OSError, match="no more steps"):
        run()
    assert run_state.run_status(tmp_path / "run")[:2] == ("failed", "OSError: no more steps")
    for status in ("-9", "137"):  # of a later attempt, as Python and as a shell have it
        (tmp_path / "run/exit_status").write_text(status)
        assert run_state.run_status(tmp_path / "run")[:2] == ("failed", "killed by SIGKILL")


# ---------------------------------------------------------------------------------------------------------------------
# mixtures, contexts, other runs' weights


@pytest.mark.slow
def test_one_context_is_a_plain_run(run):
    assert run(*CONTEXTS, "a", name="one").losses == run(name="plain").losses


def test_datasets_whose_folders_have_one_name_are_distinguished(run, tmp_path: Path, data_dir: Path):
    for parent, name in (("x", "a"), ("y", "b")):
        shutil.copytree(data_dir / name, tmp_path / f"data/{parent}/same")
    line = run(f"--data_dir={tmp_path / 'data'}", *MIXTURE, "x/same", "y/same").evals[-1]
    assert line["val_loss"] == pytest.approx((line["val_loss/x/same"] + line["val_loss/y/same"]) / 2)


def test_val_loss_of_a_mixture_is_the_weighted_mean(run):
    done = run(*MIXTURE, "a", "b", "--dataset_sampling_probs", "30", "10")
    line = done.evals[-1]
    assert line["val_loss"] == pytest.approx(0.75 * line["val_loss/a"] + 0.25 * line["val_loss/b"], rel=1e-6)
    assert line["tokens/a"] + line["tokens/b"] == done.progress.tokens
    assert line["epochs/a"] == pytest.approx(line["tokens/a"] / 8 / ((1548 - 1) // 8))


def test_multicontext_loss_is_the_mean_of_the_contexts(run):
    done = run(*CONTEXTS, "a", "upper", "--max_iters=30", "--learning_rate=1e-2", "--eval_interval=30")
    line = done.evals[-1]
    assert line["val_loss"] == pytest.approx((line["val_loss/a"] + line["val_loss/upper"]) / 2, rel=1e-6)
    assert line["val_loss/upper"] < math.log(2) < line["val_loss/a"]


def test_separate_embeddings_for_datasets_with_other_tokenizers(run):
    with pytest.raises(UserError, match="--multidataset_wte"):
        run(*MIXTURE, "a", "c")
    done = run(*MIXTURE, "a", "c", "--multidataset_wte", "--max_iters=2")
    val_loss = done.evals[0]["val_loss/c"]
    assert val_loss == pytest.approx(math.log(11), abs=0.1), "a softmax over c's own 11 characters alone"
    assert done.last.weights["wte.weight"].shape[0] == done.config["_model"]["vocab_sizes"][0] + 11


def test_fine_tuning_starts_from_another_runs_weights(run):
    first = run(name="first")
    best = checkpoint.resolve(first.out_dir, "best")
    tuned = run(f"--init_from={first.out_dir}", "--max_iters=0", name="tuned")
    assert equal_tensors(tuned.last.weights, checkpoint.load(best).weights)
    with pytest.raises(UserError, match="tokenizer"):
        run(f"--init_from={first.out_dir}", "--dataset=c", name="other")


PREPARE = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from helpers import TEXT, write_char_dataset
write_char_dataset(Path(__file__).parent, TEXT * 9)
"""


@pytest.mark.slow
def test_train_prepares_a_dataset_whose_bins_are_missing(tmp_path: Path, run):
    folder = tmp_path / "data/made"
    folder.mkdir(parents=True)
    (folder / "prepare.py").write_text(PREPARE)
    done = run(f"--data_dir={tmp_path / 'data'}", "--dataset=made", "--max_iters=1")
    assert "prepare.py" in done.console
    assert len(done.train) == 1


# ---------------------------------------------------------------------------------------------------------------------
# the process


TRAIN_AND_LIST_MODULES = """
import sys
import train, train_args
train.main(train_args.parse(sys.argv[1:]))
print([name for name in ("wandb", "tensorboard", "matplotlib") if name in sys.modules])
"""


@pytest.mark.slow
def test_an_untracked_run_never_imports_wandb(data_dir: Path, tmp_path: Path):
    flags = [*TINY, f"--data_dir={data_dir}", "--dataset=a", f"--out_dir={tmp_path}/x"]
    (tmp_path / "script.py").write_text(TRAIN_AND_LIST_MODULES)
    done = fork_to_end(run_python, [str(tmp_path / "script.py"), *flags])
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_help_is_quick_and_imports_no_torch():
    command = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), "--help"]
    seconds = []  # of the CPU: other processes take none of them
    for _ in range(3):
        started_at = os.times()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds.append(os.times().children_user - started_at.children_user)
    assert done.returncode == 0
    assert "--learning_rate" in done.stdout
    assert "torch" not in done.stderr
    assert min(seconds) < 0.5


@pytest.mark.slow
def test_a_closed_pipe_does_not_end_the_run(data_dir: Path, tmp_path: Path):
    flags = [*TINY, f"--data_dir={data_dir}", "--dataset=a", "--max_iters=40", f"--out_dir={tmp_path / 'x'}"]
    process = ScriptProcess(*flags)
    process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(60) == 0 and "Traceback" not in stderr
    assert read_run(tmp_path / "x").steps[-1] == 40


def test_model_flops_per_token():
    """6 N + 12 layers x width x context, by hand, for GPT-2's shape."""
    model = GPT(GPTConfig(vocab_sizes=(100,), n_layer=3, n_head=2, n_embd=32, block_size=16, bias=False))
    weights = 3 * (12 * 32 * 32) + 100 * 32
    assert model.flops_per_token() == 6 * weights + 12 * 3 * 32 * 16


@pytest.mark.slow
def test_evaluations_show_their_progress(run: Callable, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All batches of both splits, also where a small dataset has fewer than eval_iters: 110 and 20 rows of sums."""
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", -1.0)
    examples = [f"--init_from={base}", "--dataset=sums", "--eval_samples=0", "--block_size=32"]
    rewards = ["--reward=correct", "--max_new_tokens=4", "--num_generations=2"]
    for name, flags, n_batches in (
        ("lm", ["--eval_iters=3"], 6),
        ("sft", ["--objective=sft", *examples, "--eval_iters=8"], 8 + 5),
        ("grpo", ["--objective=grpo", *examples, *rewards, "--eval_iters=1"], 2),
    ):
        lines = re.findall(r"^evaluating: (\d+) of (\d+) batches$", run(*flags, name=name).console, re.M)
        once = [(str(i + 1), str(n_batches)) for i in range(n_batches)]
        assert lines == once * (len(lines) // n_batches) and len(lines) >= 3 * n_batches
