"""The run as a whole: resumed equals uninterrupted, two ranks equal one, and nothing is lost or overwritten."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, TINY, equal_tensors, read_run, run_script

import configurator
import train
import train_args
from model import GPT, GPTConfig
from nanoforge.errors import UserError
from nanoforge.training import checkpoint
from nanoforge.training.optimizers import Optimizer

HARD = ["--dropout=0.1", "--gradient_accumulation_steps=3", "--optimizer=muon", "--training_mode=multidataset", "--dataset_list", "a", "b",
        "--dataset_sampling_probs", "3", "1", "--dataset_mixing=sequence", "--sampling_method=without_replacement", "--lr_scheduler=cosine",
        "--lr_decay_iters=8", "--max_iters=8", "--eval_interval=4", "--log_data_hash"]  # fmt: skip


def test_automatic_precision_is_measured_told_and_kept(run, monkeypatch):
    """On CPU the faster of float32 and bfloat16; a resumed run goes on in it."""
    from nanoforge import device

    speed = {torch.bfloat16: 3e11, torch.float32: 2e11}
    monkeypatch.setattr(device, "measure_matmul_flops", lambda device, dtype, n=0: speed[dtype])
    done = run("--dtype=auto", "--max_iters=1")
    assert (
        done.config["dtype"] == "bfloat16"
        and "bfloat16 (its matrix products take 0.67 of float32's time here)" in done.console
    )
    speed[torch.bfloat16] = 1e9
    assert (
        "float32 (bfloat16's matrix products take 2e+02 of its time here)"
        in run("--dtype=auto", "--max_iters=1", name="slow").console
    )
    assert run("--init_from=resume", "--max_iters=2").config["dtype"] == done.config["dtype"]


def test_bfloat16_learns_as_float32_does(run):
    """The loss curve within the noise between seeds, which is measured here too."""
    curves = {}
    for name, flags in {"float32": [], "bfloat16": ["--dtype=bfloat16"], "seed": ["--seed=7"]}.items():
        curves[name] = run("--max_iters=60", "--eval_interval=60", "--learning_rate=1e-2", *flags, name=name).losses
    gap = lambda a, b: max(abs(x - y) for x, y in zip(curves[a], curves[b], strict=True))  # noqa: E731
    assert (
        gap("float32", "bfloat16") < 0.5 * gap("float32", "seed")
        and curves["bfloat16"][-1] < curves["bfloat16"][0] - 0.5
    )


@pytest.mark.parametrize("how", ["eager", "compiled", "adamw", "lion", "bfloat16"])
def test_resumed_run_is_bit_identical(run, how):
    """N steps = N/2 steps, resume, N/2 steps: weights, optimizer state, losses and data hashes."""
    flags = (
        HARD
        + {
            "eager": [],
            "compiled": ["--compile", "--deterministic", "--n_layer=1"],
            "adamw": ["--optimizer=adamw"],
            "lion": ["--optimizer=lion"],
            "bfloat16": ["--dtype=bfloat16"],
        }[how]
    )
    whole = run(*flags, name="whole")
    run(*flags, "--max_iters=4", "--lr_decay_iters=8", name="parts")
    parts = run("--init_from=resume", "--max_iters=8", name="parts")
    assert [line["step"] for line in parts.train] == list(range(1, 9))
    assert parts.losses == whole.losses
    assert [line["data_hash"] for line in parts.train] == [line["data_hash"] for line in whole.train]
    assert equal_tensors(parts.last.weights, whole.last.weights)
    assert equal_tensors(parts.last.optimizer, whole.last.optimizer)
    assert parts.last.progress["optimizer"] == whole.last.progress["optimizer"]
    assert [line["val_loss"] for line in parts.evals] == [line["val_loss"] for line in whole.evals]


def test_runs_repeat_bit_for_bit_and_seeds_differ(run):
    first, again, other = (
        run("--dropout=0.2", name="1"),
        run("--dropout=0.2", name="2"),
        run("--dropout=0.2", "--seed=7", name="3"),
    )
    assert first.losses == again.losses and equal_tensors(first.last.weights, again.last.weights)
    assert first.losses != other.losses


def test_evaluating_and_logging_change_nothing_learned(run):
    often = run("--eval_interval=1", "--log_interval=1", "--dropout=0.2", name="often")
    rarely = run("--eval_interval=4", "--log_interval=4", "--dropout=0.2", name="rarely")
    assert equal_tensors(often.last.weights, rarely.last.weights)


@pytest.mark.parametrize(
    "shape",
    [
        ["--batch_size=64"],
        ["--batch_size=6", "--gradient_accumulation_steps=3"],
        ["--batch_size=4", "--gradient_accumulation_steps=2", "--optimizer=muon"],
    ],
)
def test_two_ranks_train_the_same_run(data_dir, tmp_path, shape):
    """The same global batches, losses within 1e-5: averaged gradients are those of the whole batch."""
    flags = [*TINY, f"--data_dir={data_dir}", "--dataset=a", "--log_data_hash", "--max_iters=6", *shape]
    run_script(*flags, f"--out_dir={tmp_path / 'one'}")
    run_script(*flags, f"--out_dir={tmp_path / 'two'}", ranks=2)
    one, two = read_run(tmp_path / "one"), read_run(tmp_path / "two")
    assert [line["data_hash"] for line in one.train] == [line["data_hash"] for line in two.train]
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert [line["val_loss"] for line in two.evals] == pytest.approx([line["val_loss"] for line in one.evals], rel=1e-5)
    assert [line["grad_norm"] for line in two.train] == pytest.approx(
        [line["grad_norm"] for line in one.train], rel=1e-4
    )
    assert one.last.progress["tokens"] == two.last.progress["tokens"]


def test_ranks_that_dont_divide_the_batch_are_told_which_do(data_dir, tmp_path):
    done = run_script(
        *TINY,
        f"--data_dir={data_dir}",
        "--dataset=a",
        "--batch_size=9",
        f"--out_dir={tmp_path / 'x'}",
        ranks=2,
        check=False,
    )
    assert done.returncode != 0 and "2 ranks don't divide the 9 sequences" in done.stderr and "1, 3, 9" in done.stderr
    assert done.stderr.count("don't divide") == 1 and not (tmp_path / "x").exists()


def test_accumulation_equals_a_large_batch(run):
    large = run("--batch_size=8", name="large")
    small = run("--batch_size=2", "--gradient_accumulation_steps=4", name="small")
    assert small.losses == pytest.approx(large.losses, rel=1e-6)


def test_activation_checkpointing_changes_no_number(run):
    plain, checkpointed = (
        run("--dropout=0.3", name="plain"),
        run("--dropout=0.3", "--activation_checkpointing", name="checkpointed"),
    )
    assert equal_tensors(plain.last.weights, checkpointed.last.weights)


def test_max_iters_are_updates(run):
    """AdamW's own counter witnesses the number of updates."""
    done = run("--max_iters=5")
    assert done.progress.step == 5 and done.steps[-1] == 5
    assert {int(value) for name, value in done.last.optimizer.items() if name.endswith("/step")} == {5}
    assert [line["step"] for line in done.evals] == [0, 2, 4, 5]


def test_out_dir_that_holds_a_run_is_not_overwritten(run):
    first = run()
    before = {path: path.read_bytes() for path in first.out_dir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already holds a run"):
        run()
    assert before == {path: path.read_bytes() for path in first.out_dir.rglob("*") if path.is_file()}
    again = run("--overwrite", "--max_iters=2")
    assert again.steps == [2] and len(again.train) == 2


def test_resume_drops_what_was_told_after_the_checkpoint(run):
    first = run()
    with (first.out_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "train", "step": 5, "seconds": 1.0, "loss": 0.5}) + '\n{"event": "tra')
    resumed = run("--init_from=resume", "--max_iters=6")
    assert [line["step"] for line in resumed.train] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in resumed.evals] == [0, 2, 4, 6]
    assert all(line["loss"] != 0.5 for line in resumed.train)
    seconds = [line["seconds"] for line in resumed.train]
    assert seconds == sorted(seconds)


def test_resume_keeps_the_runs_arguments_unless_told(run):
    run("--learning_rate=0.005", "--n_layer=3")
    resumed = run("--init_from=resume", "--max_iters=5", "--weight_decay=0.3")
    assert (
        resumed.config["learning_rate"] == 0.005
        and resumed.config["n_layer"] == 3
        and resumed.config["weight_decay"] == 0.3
    )
    assert resumed.train[-1]["lr"] == 0.005


def test_resume_refuses_another_shape(run, capsys):
    done = run()
    with pytest.raises(SystemExit) as end:
        train_args.parse(["--init_from=resume", f"--out_dir={done.out_dir}", "--n_layer=5", "--n_embd=18"])
    told = capsys.readouterr().err
    assert end.value.code == 2 and "--n_layer=5" in told and "has 2" in told and "--n_embd=18" in told


def test_resume_refuses_another_optimizer(run):
    run()
    with pytest.raises(UserError, match="optimizer"):
        run("--init_from=resume", "--optimizer=sgd", "--max_iters=6")


def test_resume_passes_over_a_damaged_checkpoint(run):
    done = run("--max_iters=6")
    path = done.out_dir / "checkpoints/000006/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    resumed = run("--init_from=resume")
    assert (
        "skipping checkpoint" in resumed.console
        and "its sha256 differs" in resumed.console
        and "resuming" in resumed.console
        and "000004" in resumed.console
    )
    assert equal_tensors(resumed.last.weights, done.last.weights)
    assert [line["step"] for line in resumed.train] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_with_a_checkpoint(data_dir, tmp_path, number):
    flags = [
        *TINY,
        f"--data_dir={data_dir}",
        "--dataset=a",
        "--max_iters=100000",
        "--eval_interval=100000",
        "--log_interval=10",
    ]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags, f"--out_dir={tmp_path / 'x'}"], stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step 20:"):
            break
    process.send_signal(number)
    process.stdout.read()
    assert process.wait(30) == 128 + number
    stopped = read_run(tmp_path / "x")
    assert stopped.steps and stopped.steps[-1] >= 20 and stopped.last.progress["step"] == stopped.steps[-1]


def test_a_signal_during_evaluation_is_not_kept_waiting(data_dir, tmp_path):
    """An evaluation of minutes is left at once, and made by the resumed run: as if nothing had happened."""
    flags = [
        *TINY,
        f"--data_dir={data_dir}",
        "--dataset=a",
        "--max_iters=20",
        "--eval_interval=20",
        "--eval_iters=200000",
        f"--out_dir={tmp_path / 'x'}",
    ]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags, "--log_interval=20"], stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    time.sleep(6)  # the evaluation before the first step lasts
    began = time.monotonic()
    for _ in range(3):  # a scheduler signals the processes, and torchrun passes its own on
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    process.stdout.read()
    assert process.wait(20) == 128 + signal.SIGTERM and time.monotonic() - began < 5
    assert read_run(tmp_path / "x").steps == [0]
    run_script("--init_from=resume", f"--out_dir={tmp_path / 'x'}", "--eval_iters=1")
    run_script(*flags, "--eval_iters=1", f"--out_dir={tmp_path / 'whole'}")
    resumed, whole = read_run(tmp_path / "x"), read_run(tmp_path / "whole")
    assert equal_tensors(resumed.last.weights, whole.last.weights) and [line["step"] for line in resumed.evals] == [
        0,
        20,
    ]


def test_a_second_signal_ends_at_once(data_dir, tmp_path):
    code = "import signal, sys, time; from nanoforge.training.signals import Signals; s = Signals(); s.__enter__(); print('ready', flush=True); time.sleep(9); print(s.number); time.sleep(9)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(3) == 130


def test_two_ranks_save_together_on_a_signal(data_dir, tmp_path):
    flags = [
        *TINY,
        f"--data_dir={data_dir}",
        "--dataset=a",
        "--max_iters=100000",
        "--eval_interval=100000",
        "--log_interval=10",
        f"--out_dir={tmp_path / 'x'}",
    ]
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train.py"),
    ]
    process = subprocess.Popen(
        [*start, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("step 20:"):
            break
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    assert process.wait(40) != 0
    assert read_run(tmp_path / "x").steps[-1] >= 20


def test_a_loss_that_is_not_finite_ends_the_run_unsaved(run):
    with pytest.raises(SystemExit) as end:
        run("--learning_rate=1e30", "--grad_clip=0", "--max_iters=50", "--optimizer=sgd")
    assert "nothing was saved" in str(end.value.code)


def test_an_untracked_run_never_imports_wandb(data_dir, tmp_path):
    code = f"import sys; sys.argv = ['train.py']; import train, train_args; train.main(train_args.parse({[*TINY, f'--data_dir={data_dir}', '--dataset=a', f'--out_dir={tmp_path}/x']!r})); print([m for m in ('wandb', 'tensorboard', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_help_is_quick_and_imports_no_torch():
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        told = subprocess.run(
            [sys.executable, "-X", "importtime", ROOT / "train.py", "--help"], capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - begin)
    assert told.returncode == 0 and "--learning_rate" in told.stdout and "torch" not in told.stderr
    assert min(seconds) < 0.5


def test_a_runs_config_is_a_config_that_deletes_nothing(run, tmp_path):
    """Also after --overwrite and after a resume, which keeps telling where the run came from."""
    run()
    first = run("--overwrite")
    run("--init_from=resume", "--max_iters=5")
    config = json.loads((first.out_dir / "train_config.json").read_text())
    assert config["init_from"] == "scratch" and config["overwrite"] is False and config["max_iters"] == 5
    with pytest.raises(UserError, match="already holds a run"):
        train.main(train_args.parse([str(first.out_dir / "train_config.json")]))
    train.main(train_args.parse([str(first.out_dir / "train_config.json"), f"--out_dir={tmp_path / 'again'}"]))
    assert read_run(tmp_path / "again").losses == read_run(first.out_dir).losses


def test_runs_without_git(run, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "git_commit" not in run().config["_about"]


def test_remarks_are_told_in_the_metrics_too(run):
    done = run()
    notes = [json.loads(line) for line in (done.out_dir / "metrics.jsonl").read_text().splitlines() if '"note"' in line]
    assert [note["text"].split(":")[0] for note in notes] == ["finished"] and notes[0]["step"] == 4


def test_a_checkpoint_that_was_being_replaced_is_not_lost(run):
    """Killed between the two renames of a save: the old one is there again."""
    done = run()
    last = done.out_dir / "checkpoints/000004"
    last.rename(last.with_suffix(".old"))
    resumed = run("--init_from=resume", "--max_iters=5")
    assert (
        "resuming" in resumed.console
        and "000004" in resumed.console
        and [line["step"] for line in resumed.train] == [1, 2, 3, 4, 5]
    )


def test_a_damaged_best_checkpoint_gives_way_to_the_newest(run):
    done = run("--learning_rate=0", "--max_iters=8")  # step 2 stays the best
    assert done.steps == [2, 6, 8]
    (done.out_dir / "checkpoints/000002/progress.json").write_text("{}")
    told = run_script(f"--out_dir={done.out_dir}", "--max_new_tokens=5", script="sample.py")
    assert "skipping the best checkpoint" in told.stderr and told.stdout


def test_resume_refuses_vocabularies_in_another_order(run):
    """Each dataset's rows in the model follow from the order."""
    for name, flags, turned in (
        (
            "wte",
            ["--training_mode=multidataset", "--multidataset_wte", "--dataset_list", "a", "b"],
            ["--dataset_list", "b", "a"],
        ),
        (
            "contexts",
            ["--training_mode=multicontext", "--multicontext_datasets", "a", "upper"],
            ["--multicontext_datasets", "upper", "a"],
        ),
    ):
        run(*flags, name=name)
        with pytest.raises(UserError, match=r"in this order|another tokenizer"):
            run("--init_from=resume", *turned, "--max_iters=6", name=name)


def test_resume_with_another_batch_size_counts_on(run):
    first = run("--max_tokens=96", "--max_iters=100")
    resumed = run("--init_from=resume", "--batch_size=8", "--max_tokens=256")
    assert (
        first.progress.step == 3
        and resumed.progress.step == 3 + math.ceil((256 - 96) / 64)
        and resumed.progress.tokens == 96 + 3 * 64
    )
    assert "another number of sequences before" in resumed.console


def test_resume_restores_a_lost_tokenizer_and_best_json(run):
    done = run()
    (done.out_dir / "tokenizer.json").unlink()
    (done.out_dir / "best.json").unlink()
    resumed = run("--init_from=resume", "--max_iters=6", "--learning_rate=0")
    assert resumed.steps[-1] == 6 and (done.out_dir / "tokenizer.json").exists()
    assert json.loads((done.out_dir / "best.json").read_text())["val_loss"] == min(
        line["val_loss"] for line in resumed.evals if line["step"]
    )


def test_one_context_is_a_plain_run(run):
    assert (
        run("--training_mode=multicontext", "--multicontext_datasets", "a", name="one").losses
        == run(name="plain").losses
    )


def test_datasets_of_one_folder_name_are_told_apart(run, tmp_path, data_dir):
    for parent, name in (("x", "a"), ("y", "b")):
        shutil.copytree(data_dir / name, tmp_path / f"data/{parent}/same")
    line = run(
        f"--data_dir={tmp_path / 'data'}", "--training_mode=multidataset", "--dataset_list", "x/same", "y/same"
    ).evals[-1]
    assert line["val_loss"] == pytest.approx((line["val_loss/x/same"] + line["val_loss/y/same"]) / 2)


def test_a_reader_that_goes_away_does_not_end_the_run(data_dir, tmp_path):
    flags = [*TINY, f"--data_dir={data_dir}", "--dataset=a", "--max_iters=40", f"--out_dir={tmp_path / 'x'}"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait(60) == 0 and "Traceback" not in told and read_run(tmp_path / "x").steps[-1] == 40


def test_overwrite_keeps_a_linked_folder(run, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    again = run("--overwrite", "--max_iters=2")
    assert again.steps == [2] and (tmp_path / "disk/000002").is_dir()


def test_an_out_dir_that_cant_be_written_is_told(run, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="can't be written"):
        run()


def test_best_checkpoint_outlives_later_worse_ones(run):
    """A rate that ruins the model after step 2: best.json stays with the better step."""
    done = run(
        "--max_iters=8",
        "--eval_interval=2",
        "--lr_scheduler=none",
        "--learning_rate=3e-2",
        "--warmup_iters=0",
        "--weight_decay=0",
    )
    best = json.loads((done.out_dir / "best.json").read_text())
    losses = {line["step"]: line["val_loss"] for line in done.evals if line["step"]}
    assert best["val_loss"] == min(losses.values()) and losses[best["step"]] == best["val_loss"]
    assert done.steps == sorted({best["step"], 6, 8})


def test_val_loss_of_a_mixture_is_the_weighted_mean(run):
    done = run("--training_mode=multidataset", "--dataset_list", "a", "b", "--dataset_sampling_probs", "30", "10")
    line = done.evals[-1]
    assert line["val_loss"] == pytest.approx(0.75 * line["val_loss/a"] + 0.25 * line["val_loss/b"], rel=1e-6)
    assert line["tokens/a"] + line["tokens/b"] == done.progress.tokens
    assert line["epochs/a"] == pytest.approx(line["tokens/a"] / 8 / ((1548 - 1) // 8))


def test_multicontext_loss_is_the_mean_of_the_contexts(run):
    done = run(
        "--training_mode=multicontext",
        "--multicontext_datasets",
        "a",
        "upper",
        "--max_iters=30",
        "--learning_rate=1e-2",
        "--eval_interval=30",
    )
    line = done.evals[-1]
    assert line["val_loss"] == pytest.approx((line["val_loss/a"] + line["val_loss/upper"]) / 2, rel=1e-6)
    assert line["val_loss/upper"] < math.log(2) < line["val_loss/a"]


def test_separate_embeddings_for_datasets_with_other_tokenizers(run):
    with pytest.raises(UserError, match="different tokenizers"):
        run("--training_mode=multidataset", "--dataset_list", "a", "c")
    done = run("--training_mode=multidataset", "--dataset_list", "a", "c", "--multidataset_wte", "--max_iters=2")
    line = done.evals[0]
    assert line["val_loss/c"] == pytest.approx(math.log(11), abs=0.1), "a softmax over c's own 11 characters alone"
    assert done.last.weights["wte.weight"].shape[0] == done.config["_model"]["vocab_sizes"][0] + 11


def test_fine_tuning_starts_from_another_runs_weights(run):
    first = run(name="first")
    best = checkpoint.resolve(first.out_dir, "best")
    tuned = run(f"--init_from={first.out_dir}", "--max_iters=0", name="tuned")
    assert equal_tensors(tuned.last.weights, checkpoint.load(best).weights)
    with pytest.raises(UserError, match="tokenizer"):
        run(f"--init_from={first.out_dir}", "--dataset=c", name="other")


def test_a_run_folder_is_whole(run):
    done = run()
    for words in (
        "run      ",
        "model    ",
        "data     ",
        "a step   ",
        "length   ",
        "device   ",
        "time     at least",
        "estimated time: ",
    ):
        assert words in done.console
    assert {path.name for path in done.out_dir.iterdir()} == {
        ".lock",
        "train_config.json",
        "metrics.jsonl",
        "tokenizer.json",
        "best.json",
        "checkpoints",
    }
    files = {
        "model.safetensors",
        "optimizer.safetensors",
        "progress.json",
        "train_config.json",
        "tokenizer.json",
        "manifest.json",
    }
    assert {path.name for path in (done.out_dir / "checkpoints" / "000004").iterdir()} == files
    assert configurator.arg_specs(train_args.TrainArgs).keys() <= done.config.keys()
    for line in done.train:
        assert {
            "event",
            "step",
            "seconds",
            "loss",
            "lr",
            "grad_norm",
            "tokens",
            "tokens_per_second",
            "step_ms",
        } <= line.keys()
    for line in done.evals:
        assert {"event", "step", "seconds", "train_loss", "val_loss", "bits_per_byte"} <= line.keys()
        assert line["bits_per_byte"] == pytest.approx(line["val_loss"] / math.log(2))  # a byte is a character here


@pytest.fixture(autouse=True)
def nondeterministic_again():
    """--deterministic holds for a process; these tests share theirs."""
    yield
    torch.use_deterministic_algorithms(False)


def test_float16_overflow_anywhere_skips_the_step_everywhere(run, monkeypatch):
    """One infinite gradient in one matrix that Muon trains: no parameter of AdamW moves either, and the scale is halved."""
    original = Optimizer.clip_grad_norm

    def poisoned(self, scaler, max_norm):
        self.parameters[3].grad[0] = math.inf
        return original(self, scaler, max_norm)

    monkeypatch.setattr(Optimizer, "clip_grad_norm", poisoned)
    start = run("--dtype=float16", "--max_iters=0", "--optimizer=muon", name="start")
    done = run("--dtype=float16", "--max_iters=3", "--optimizer=muon", name="overflow")
    assert equal_tensors(start.last.weights, done.last.weights) and done.last.progress["scaler"]["scale"] == 2.0**13
    assert [line["grad_norm"] for line in done.train] == [None] * 3, "strict JSON has no Infinity"


def test_float16_keeps_its_scaler(run):
    half = run("--dtype=float16", name="half")
    scaler = half.last.progress["scaler"]
    assert scaler["scale"] > 1 and scaler["_growth_tracker"] == 4
    resumed = run("--init_from=resume", "--max_iters=6", name="half")
    assert resumed.last.progress["scaler"]["_growth_tracker"] == 6


def test_train_prepares_a_dataset_whose_bins_are_missing(tmp_path, run):
    folder = tmp_path / "data/made"
    folder.mkdir(parents=True)
    (folder / "prepare.py").write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nfrom pathlib import Path\nfrom helpers import TEXT, write_char_dataset\nwrite_char_dataset(Path(__file__).parent, TEXT * 9)\n"
    )
    done = run(f"--data_dir={tmp_path / 'data'}", "--dataset=made", "--max_iters=1")
    assert "no bins yet; running" in done.console and len(done.train) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_hot_loop_reads_nothing_back(run, optimizer):
    """Tensors read on the host (aten::_local_scalar_dense) are as many for 40 steps as for 10 when neither logs in between."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    counts = []
    for steps in (10, 40):
        with Reads() as reads:
            run(
                f"--optimizer={optimizer}",
                f"--max_iters={steps}",
                "--log_interval=1000",
                "--eval_interval=1000",
                "--dropout=0.1",
                name=f"{steps}",
            )
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_model_flops_per_token():
    """6 N + 12 layers x width x context, by hand, for GPT-2's shape."""
    model = GPT(GPTConfig(vocab_sizes=(100,), n_layer=3, n_head=2, n_embd=32, block_size=16, bias=False))
    products = 3 * (12 * 32 * 32) + 100 * 32
    assert model.flops_per_token() == 6 * products + 12 * 3 * 32 * 16
