"""Every argument of the table has a test that sees its effect: a function here, named after it. A new row without one fails."""

import importlib.machinery
import itertools
import math
import shutil
import sys
import types

import pytest
import torch
from conftest import WORDS, equal_tensors, skip_without_gpt2

import train_args
from parts import parallel, pretrained
from parts.mistakes import Mistake

MIX = ["--training_mode=multidataset", "--dataset_list", "a", "b"]
V = len(set(WORDS))
EFFECTS = {}


def effect(function):
    """Registers the test of the argument that the function is named after."""
    EFFECTS[function.__name__.rstrip("_")] = function
    return function


def lrs(done) -> list[float]:
    return [line["lr"] for line in done.train]


def shapes(done) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in done.last.weights.items()}


@pytest.mark.parametrize("name", [row.name for group in train_args.TABLE.values() for row in group])
def test_argument_has_its_effect(name, run, tmp_path, monkeypatch, data_dir):
    assert name in EFFECTS, f"--{name} has no test of its effect"
    given = {"run": run, "tmp_path": tmp_path, "monkeypatch": monkeypatch, "data_dir": data_dir}
    function = EFFECTS[name]
    function(**{key: given[key] for key in function.__code__.co_varnames[: function.__code__.co_argcount]})


def test_no_effect_is_tested_of_an_argument_that_is_not_there():
    assert not EFFECTS.keys() - {row.name for group in train_args.TABLE.values() for row in group}


# ---------------------------------------------------------------------------------------------------------------------
# run


@effect
def out_dir(run, tmp_path):
    assert (run(name="here").out_dir / "checkpoints").is_dir() and list(tmp_path.iterdir()) == [tmp_path / "here"]


@effect
def overwrite(run):
    run()
    with pytest.raises(Mistake):
        run()
    assert len(run("--overwrite", "--max_iters=1").train) == 1


@effect
def init_from(run):
    first = run("--max_iters=3")
    assert [line["step"] for line in run("--init_from=resume", "--max_iters=5").train] == [1, 2, 3, 4, 5]
    loaded = run(f"--init_from={first.out_dir}", "--max_iters=0", name="loaded")
    assert equal_tensors(loaded.last.weights, pretrained.load(str(first.out_dir)).weights)


@effect
def gpt2_type(run, tmp_path, monkeypatch):
    """The hub's answer is a small GPT-2 on the disk; what is asked for is seen."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv(*next(iter(skip_without_gpt2().items())))
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "hub")
    from parts import corpus

    corpus.write_dataset(tmp_path / "data/text", lambda: [corpus.Piece("train", "hello world " * 30), corpus.Piece("val", "hello world " * 30)], "gpt2")
    asked = []
    monkeypatch.setattr(pretrained, "download", lambda name, file: (asked.append(name), tmp_path / "hub" / file)[1])
    done = run("--init_from=gpt2", "--gpt2_type=gpt2-large", f"--data_dir={tmp_path / 'data'}", "--dataset=text", "--max_iters=1")
    assert set(asked) == {"gpt2-large"}
    assert done.config["bias"] is True and done.config["activation"] == "gelu_tanh" and done.config["n_layer"] == 1 and done.config["block_size"] == 8
    resumed = run("--init_from=resume", "--max_iters=2")
    assert resumed.config["bias"] is True and len(resumed.train) == 2


@effect
def eval_only(run):
    done = run("--eval_only")
    assert "val_loss" in done.console and not done.out_dir.exists()


@effect
def seed(run):
    assert run("--seed=1", name="1").losses != run("--seed=2", name="2").losses


# ---------------------------------------------------------------------------------------------------------------------
# data


@effect
def data_dir(run, tmp_path, data_dir):
    shutil.copytree(data_dir / "a", tmp_path / "elsewhere/only_here")
    assert run(f"--data_dir={tmp_path / 'elsewhere'}", "--dataset=only_here").losses == run(name="a").losses


@effect
def training_mode(run):
    assert len([key for key in run(*MIX).evals[0] if key.startswith("val_loss/")]) == 2


@effect
def dataset(run):
    assert shapes(run("--dataset=c"))["wte.weight"] == (11, 16)


@effect
def sampling_method(run):
    losses = {method: run(f"--sampling_method={method}", name=method).losses for method in ("random", "without_replacement", "sequential")}
    assert len({tuple(loss) for loss in losses.values()}) == 3
    one = run("--sampling_method=sequential", "--log_data_hash", "--max_epochs=1", "--batch_size=1", "--max_iters=9999", "--eval_interval=9999", name="epoch")
    assert one.progress.step == (1548 - 1) // 8


@effect
def dataset_list(run):
    assert {"val_loss/a", "val_loss/b"} <= run(*MIX).evals[0].keys()


@effect
def dataset_sampling_probs(run):
    done = run(*MIX, "--dataset_sampling_probs", "0", "7")
    assert done.evals[-1]["tokens/a"] == 0 and done.evals[-1]["tokens/b"] == done.progress.tokens


@effect
def dataset_sampling_probs_final(run):
    done = run(*MIX, "--dataset_sampling_probs", "1", "0", "--dataset_sampling_probs_final", "0", "1", "--max_iters=40", "--dataset_mixing=sequence", "--batch_size=16", "--eval_interval=10")
    tokens = [line["tokens/b"] for line in done.evals]
    parts = [(b - a) / (10 * 16 * 8) for a, b in itertools.pairwise(tokens)]
    assert parts == sorted(parts) and parts[0] < 0.25 and parts[-1] > 0.75
    assert done.evals[-1]["val_loss"] == pytest.approx(done.evals[-1]["val_loss/b"]), "the final weights make val_loss"


@effect
def dataset_sampling_probs_transition_method(run):
    flags = [*MIX, "--dataset_sampling_probs", "9", "1", "--dataset_sampling_probs_final", "1", "9", "--max_iters=40", "--dataset_mixing=sequence", "--batch_size=16", "--eval_interval=10"]
    early = {method: run(*flags, f"--dataset_sampling_probs_transition_method={method}", name=method).evals[1]["tokens/b"] for method in ("linear", "cosine", "exponential")}
    assert early["linear"] > early["cosine"], "a cosine begins slowly"
    assert early["exponential"] not in (early["linear"], early["cosine"])


@effect
def dataset_mixing(run):
    tokens = lambda done: {line["tokens/a"] % (4 * 8) for line in done.evals}  # noqa: E731
    assert tokens(run(*MIX, "--eval_interval=1", name="batch")) == {0}
    assert tokens(run(*MIX, "--eval_interval=1", "--dataset_mixing=sequence", name="sequence")) != {0}


@effect
def dataset_interleaving(run):
    done = run(*MIX, "--dataset_interleaving", "--dataset_sampling_probs", "2", "1", "--max_iters=6", "--eval_interval=1")
    assert [line["tokens/b"] // 32 for line in done.evals] == [0, 0, 0, 1, 1, 1, 2]


@effect
def multidataset_wte(run):
    assert shapes(run("--training_mode=multidataset", "--dataset_list", "a", "c", "--multidataset_wte"))["wte.weight"][0] == V + 11


@effect
def multicontext_datasets(run):
    done = run("--training_mode=multicontext", "--multicontext_datasets", "a", "upper")
    assert {"val_loss/a", "val_loss/upper"} <= done.evals[0].keys() and shapes(done)["wte.weight"][0] == V + 2


# ---------------------------------------------------------------------------------------------------------------------
# batch


@effect
def batch_size(run):
    assert run("--batch_size=7").progress.tokens == 4 * 7 * 8


@effect
def gradient_accumulation_steps(run):
    done = run("--gradient_accumulation_steps=3")
    assert done.progress.tokens == 4 * 3 * 4 * 8 and "3 x 4 on each" in done.console


@effect
def block_size(run):
    assert shapes(run("--block_size=16"))["position.weight"] == (16, 16)


# ---------------------------------------------------------------------------------------------------------------------
# model: shapes here, what each variant computes in test_model.py


@effect
def n_layer(run):
    assert "blocks.2.attn.qkv.weight" in shapes(run("--n_layer=3")) and "blocks.2.attn.qkv.weight" not in shapes(run(name="two"))


@effect
def n_head(run):
    assert run("--n_head=4", name="4").losses != run("--n_head=2", name="2").losses


@effect
def n_kv_head(run):
    assert shapes(run("--n_kv_head=1"))["blocks.0.attn.qkv.weight"] == (16 + 2 * 8, 16)


@effect
def n_embd(run):
    assert shapes(run("--n_embd=24"))["wte.weight"][1] == 24


@effect
def vocab_size(run):
    assert shapes(run("--vocab_size=64"))["wte.weight"] == (64, 16)
    with pytest.raises(Mistake, match="less than the tokenizer's 30"):
        run("--vocab_size=29", name="less")


@effect
def bias(run):
    assert {"norm.bias", "blocks.0.attn.qkv.bias", "blocks.1.mlp.up.bias"} <= shapes(run("--bias")).keys() and not [n for n in shapes(run(name="no")) if "bias" in n]


@effect
def norm(run):
    assert not [name for name in shapes(run("--norm=rmsnorm_nogain")) if "norm" in name] and run("--norm=rmsnorm", name="r").losses != run(name="l").losses


@effect
def position(run):
    assert "position.weight" not in shapes(run("--position=rope")) and run("--position=none", name="none").losses != run("--position=rope", name="rope").losses


@effect
def rope_base(run):
    assert run("--position=rope", "--rope_base=3", name="3").losses != run("--position=rope", name="10000").losses


@effect
def activation(run):
    assert len({tuple(run(f"--activation={name}", "--learning_rate=0.1", name=name).losses) for name in ("gelu", "gelu_tanh", "relu2", "silu")}) == 4


@effect
def mlp(run):
    assert "blocks.0.mlp.gate.weight" in shapes(run("--mlp=gated"))


@effect
def mlp_ratio(run):
    assert shapes(run("--mlp_ratio=2.5"))["blocks.0.mlp.up.weight"] == (40, 16)


@effect
def qk_norm(run):
    assert run("--qk_norm", name="on").losses != run(name="off").losses


@effect
def window(run):
    assert run("--window=S", name="S").losses != run("--window=L", name="L").losses


@effect
def window_size(run):
    assert run("--window=S", "--window_size=2", name="2").losses != run("--window=S", name="half").losses
    assert run("--window=S", "--window_size=4", name="4").losses == run("--window=S", name="also_half").losses


@effect
def logit_softcap(run):
    done = run("--logit_softcap=0.001")
    assert done.losses == pytest.approx([math.log(V)] * 4, abs=0.002), "bounded logits can't tell tokens apart"


@effect
def embedding_norm(run):
    """What a position is, can't be told from the embedding's length any more: the first step's loss differs, the shapes don't."""
    done, plain = run("--embedding_norm"), run(name="plain")
    assert done.losses[0] != plain.losses[0] and shapes(done) == shapes(plain)


@effect
def value_residual(run):
    assert shapes(run("--value_residual")).keys() - shapes(run(name="plain")).keys() == {"blocks.1.attn.first_values"}


@effect
def residual_scalars(run):
    done = run("--residual_scalars", "--learning_rate=0.1")
    assert done.last.weights["blocks.1.scales"].tolist() != [1.0, 0.0] and done.losses[0] == run("--learning_rate=0.1", name="plain").losses[0]


@effect
def tie_weights(run):
    assert "head.weight" in shapes(run("--no-tie_weights")) and "head.weight" not in shapes(run(name="tied"))


@effect
def zero_init(run):
    done = run("--zero_init", "--max_iters=0", "--no-tie_weights")
    assert done.last.weights["blocks.0.attn.proj.weight"].abs().max() == 0 == done.last.weights["head.weight"].abs().max()


@effect
def dropout(run):
    done = run("--dropout=0.5")
    assert done.losses != run(name="none").losses and done.evals[0]["val_loss"] == run(name="again").evals[0]["val_loss"], "not in evaluation"


# ---------------------------------------------------------------------------------------------------------------------
# how long


@effect
def max_iters(run):
    assert run("--max_iters=3").progress.step == 3


@effect
def max_tokens(run):
    assert run("--max_tokens=65").progress.step == 3  # 32 a step


@effect
def max_epochs(run):
    assert run("--max_epochs=0.5", "--max_iters=100", "--eval_interval=100", "--log_interval=50").progress.step == math.ceil(0.5 * 193 / 4)


@effect
def max_seconds(run):
    done = run("--max_seconds=1", "--max_iters=1000000", "--eval_interval=1000000", "--log_interval=1000000")
    assert 1 <= done.progress.step < 1000000 and done.steps == [done.progress.step] and "finished: 1 seconds" in done.console
    assert done.evals[-1]["step"] == done.progress.step


@effect
def early_stop_patience(run):
    done = run("--early_stop_patience=3", "--learning_rate=0", "--max_iters=100", "--eval_interval=2")
    assert done.progress.step == 8, "the first at 2 is the best, then three no better ones"


# ---------------------------------------------------------------------------------------------------------------------
# optimizer and schedule: what each computes in test_optim.py


@effect
def optimizer(run):
    assert len({tuple(run(f"--optimizer={name}", name=name.replace(":", "_")).losses) for name in (*train_args.OPTIMIZERS, "torch.optim:Adamax")}) == 11


@effect
def learning_rate(run):
    done = run("--learning_rate=0")
    assert equal_tensors(done.last.weights, run("--max_iters=0", name="start").last.weights) and lrs(run("--learning_rate=0.25", name="q"))[0] == 0.25


@effect
def weight_decay(run):
    norm = lambda done: done.last.weights["wte.weight"].norm()  # noqa: E731
    assert norm(run("--weight_decay=100", name="much")) < 0.9 * norm(run("--weight_decay=0", name="none"))


@effect
def beta1(run):
    assert run("--beta1=0", name="0").losses != run(name="9").losses


@effect
def beta2(run):
    assert run("--beta2=0.5", name="5").losses != run(name="99").losses


@effect
def momentum(run):
    assert run("--optimizer=sgd", "--momentum=0", name="0").losses != run("--optimizer=sgd", name="9").losses


@effect
def muon_learning_rate(run):
    """At 0 the hidden matrices stay, the embedding does not."""
    start, done = run("--max_iters=0", name="start").last.weights, run("--optimizer=muon", "--muon_learning_rate=0").last.weights
    assert torch.equal(start["blocks.0.mlp.up.weight"], done["blocks.0.mlp.up.weight"]) and not torch.equal(start["wte.weight"], done["wte.weight"])


@effect
def embedding_learning_rate(run):
    """All rates are 0 but this one: the embedding alone learns."""
    start, done = run("--max_iters=0", name="start").last.weights, run("--learning_rate=0", "--embedding_learning_rate=0.1").last.weights
    assert {name for name in start if not torch.equal(start[name], done[name])} == {"wte.weight"}


@effect
def head_learning_rate(run):
    start, done = (run("--no-tie_weights", *flags, name=flags[0].strip("-")).last.weights for flags in (["--max_iters=0"], ["--learning_rate=0", "--head_learning_rate=0.1"]))
    assert {name for name in start if not torch.equal(start[name], done[name])} == {"head.weight"}


@effect
def muon_weight_decay(run):
    norm = lambda done: done.last.weights["blocks.0.mlp.up.weight"].norm()  # noqa: E731
    assert norm(run("--optimizer=muon", "--muon_weight_decay=10", name="much")) < 0.9 * norm(run("--optimizer=muon", name="none"))


@effect
def muon_momentum(run):
    assert run("--optimizer=muon", "--muon_momentum=0", name="0").losses != run("--optimizer=muon", name="95").losses


@effect
def optimizer_kwargs(run):
    assert run('--optimizer_kwargs={"eps": 10}', name="eps").losses != run(name="none").losses


@effect
def grad_clip(run):
    clipped, free = run("--grad_clip=0.001", "--optimizer=sgd", "--momentum=0", name="clipped"), run("--grad_clip=0", "--optimizer=sgd", "--momentum=0", name="free")
    assert clipped.train[0]["grad_norm"] == free.train[0]["grad_norm"] > 0.01, "told before it is clipped"
    assert clipped.losses[1:] != free.losses[1:]


@effect
def lr_scheduler(run):
    flags = ["--warmup_iters=1", "--lr_decay_iters=4", "--learning_rate=0.01", "--min_lr=0.001"]
    seen = {name: lrs(run(f"--lr_scheduler={name}", *(flags if name in ("linear", "cosine", "exponential", "wsd") else [f for f in flags if "iters=4" not in f]), name=name))
            for name in ("linear", "cosine", "exponential", "step", "inverse_sqrt", "wsd")}  # fmt: skip
    assert all(rates[:2] == pytest.approx([0.005, 0.01]) for rates in seen.values())
    assert seen["linear"][3] == pytest.approx(0.004) and seen["exponential"][3] == pytest.approx(0.01 * 0.1 ** (2 / 3)) and seen["step"][3] == 0.01


@effect
def decay_lr(run):
    rates = lrs(run("--decay_lr", "--lr_decay_iters=4", "--min_lr=0", "--learning_rate=1"))
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])
    assert lrs(run("--no-decay_lr", name="no")) == [1e-3] * 4


@effect
def warmup_iters(run):
    assert lrs(run("--warmup_iters=3", "--learning_rate=1")) == pytest.approx([0.25, 0.5, 0.75, 1.0])


@effect
def lr_decay_iters(run):
    assert lrs(run("--decay_lr", "--lr_decay_iters=2", "--min_lr=0.0005"))[2:] == pytest.approx([0.0005, 0.0005])


@effect
def min_lr(run):
    assert lrs(run("--lr_scheduler=linear", "--lr_decay_iters=3", "--min_lr=0.0004"))[-1] == pytest.approx(0.0004)


@effect
def lr_step_size(run):
    assert lrs(run("--lr_scheduler=step", "--lr_step_size=2", "--learning_rate=1", "--min_lr=0")) == pytest.approx([1, 1, 0.1, 0.1])


@effect
def lr_step_gamma(run):
    assert lrs(run("--lr_scheduler=step", "--lr_step_size=1", "--lr_step_gamma=0.5", "--learning_rate=1", "--min_lr=0")) == pytest.approx([1, 0.5, 0.25, 0.125])


@effect
def wsd_decay_fraction(run):
    assert lrs(run("--lr_scheduler=wsd", "--lr_decay_iters=4", "--wsd_decay_fraction=0.5", "--learning_rate=1", "--min_lr=0")) == pytest.approx([1, 1, 1, 0.5])


# ---------------------------------------------------------------------------------------------------------------------
# evaluation, logging, system


@effect
def eval_interval(run):
    assert [line["step"] for line in run("--eval_interval=3").evals] == [0, 3, 4]


@effect
def eval_iters(run):
    """Three batches of 4 windows are the same windows as one batch of 12."""
    three, one = run("--eval_iters=3", name="3"), run("--eval_iters=1", "--batch_size=12", name="1")
    assert three.evals[0]["val_loss"] == pytest.approx(one.evals[0]["val_loss"], rel=1e-6)
    assert three.evals[0]["val_loss"] != run("--eval_iters=1", name="less").evals[0]["val_loss"]


@effect
def always_save_checkpoint(run):
    flags = ["--learning_rate=0", "--max_iters=6"]  # only the evaluation at step 2 is the best so far
    saves = lambda done: done.console.count("saved ")  # noqa: E731
    assert saves(run(*flags, name="always")) == 3 and saves(run(*flags, "--no-always_save_checkpoint", name="better")) == 2


@effect
def log_interval(run):
    assert [line["step"] for line in run("--log_interval=2", "--max_iters=5").train] == [1, 2, 4]


@effect
def log_data_hash(run):
    assert all(len(line["data_hash"]) == 16 for line in run("--log_data_hash").train) and "data_hash" not in run(name="no").train[0]


@effect
def plot_loss(run):
    pytest.importorskip("matplotlib")
    picture = (run("--plot_loss").out_dir / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


@effect
def wandb_log(run, monkeypatch):
    """The real wandb, offline: a resumed run goes on under the same id."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    first = run("--wandb_log", "--wandb_project=mine", "--wandb_run_name=me", "--max_iters=2")
    run("--init_from=resume", "--max_iters=3")
    folders = [path.name for path in (first.out_dir / "wandb").glob("offline-run-*")]
    assert len(folders) >= 1 and {name.rsplit("-", 1)[1] for name in folders} == {(first.out_dir / "wandb_id").read_text()}


def given_to_wandb(run, monkeypatch, *flags) -> dict:
    """What wandb.init is called with, seen by a stand-in."""
    seen = {}
    stand_in = types.ModuleType("wandb")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    stand_in.init = lambda **given: seen.update(given) or types.SimpleNamespace(log=lambda *_, **__: seen.update(logged=True), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    run("--wandb_log", *flags)
    assert seen["logged"] and len(seen["id"]) == 8 and seen["config"]["n_layer"] == 2
    return seen


@effect
def wandb_project(run, monkeypatch):
    assert given_to_wandb(run, monkeypatch, "--wandb_project=theirs")["project"] == "theirs"


@effect
def wandb_run_name(run, monkeypatch):
    assert given_to_wandb(run, monkeypatch, "--wandb_run_name=me")["name"] == "me"


@effect
def tensorboard_log(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run("--tensorboard_log")
    events = EventAccumulator(str(done.out_dir / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(done.losses)


@effect
def device(run):
    assert "device   cpu" in run("--device=cpu").console
    if not torch.cuda.is_available():
        with pytest.raises(Mistake, match="no CUDA GPU"):
            run("--device=cuda", name="cuda")


@effect
def dtype(run):
    half = run("--dtype=bfloat16", name="half")
    assert half.losses != run(name="whole").losses and "bfloat16" in half.console and half.last.weights["wte.weight"].dtype == torch.float32


@effect
def attention_kernel(run, monkeypatch):
    with pytest.raises(Mistake, match="only a CUDA GPU"):
        run("--attention_kernel=flash")
    given = {}
    monkeypatch.setattr(parallel, "ATTENTION_KERNELS", {name: lambda on, name=name: given.update({name: on}) for name in parallel.ATTENTION_KERNELS})
    parallel.choose_attention_kernel("cudnn", torch.device("cuda"))
    assert given == {"flash": False, "cudnn": True, "efficient": False, "math": False}


@effect
def compile(run, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: (given.append(options), model)[1])  # what it computes is in test_model.py
    run("--compile")
    assert given == [{"dynamic": False}], "the model alone"
    run("--compile", "--optimizer=muon", name="muon")
    assert given[1:] == [{"dynamic": False}] * 2, "the model, and Muon's iteration"


@effect
def activation_checkpointing(run):
    import model

    seen = []
    original = model.checkpoint
    model.checkpoint = lambda *args, **options: (seen.append(1), original(*args, **options))[1]
    try:
        run("--activation_checkpointing", "--max_iters=1", "--eval_interval=5")
    finally:
        model.checkpoint = original
    assert seen


@effect
def loss_chunk(run, monkeypatch):
    """The same losses, with the logits of no more than 5 tokens at once."""
    import model

    rows = []
    original = model.ChunkedLoss.logits
    monkeypatch.setattr(model.ChunkedLoss, "logits", lambda x, *given: rows.append(len(x)) or original(x, *given))
    assert run("--loss_chunk=5").losses == pytest.approx(run(name="plain").losses, rel=1e-5) and max(rows) == 5


@effect
def deterministic(run):
    try:
        run("--deterministic", "--max_iters=1")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------------------------------------------
# what keeps a run safe; test_faults.py and test_sharding.py have the whole of it


@effect
def checkpoint_interval(run):
    assert run("--checkpoint_interval=3", "--max_iters=7", "--eval_interval=100", "--keep_last=9").steps == [3, 6, 7]


@effect
def keep_last(run):
    assert run("--keep_last=3", "--checkpoint_interval=1", "--max_iters=6", "--eval_interval=6").steps == [4, 5, 6]


@effect
def keep_every(run):
    assert run("--keep_every=3", "--keep_last=1", "--checkpoint_interval=1", "--max_iters=8", "--eval_interval=8").steps == [3, 6, 8]


@effect
def allow_data_change(run, tmp_path, data_dir):
    shutil.copytree(data_dir / "a", tmp_path / "data/a")
    run(f"--data_dir={tmp_path / 'data'}")
    path = tmp_path / "data/a/train.bin"
    path.write_bytes(path.read_bytes()[::-1][1:] + b"\0")
    with pytest.raises(Mistake, match="not what this run began with"):
        run("--init_from=resume", "--max_iters=5")
    assert run("--init_from=resume", "--max_iters=5", "--allow_data_change").steps[-1] == 5


@effect
def spike_skip(run):
    """Above a hundredth of a deviation nearly half of the norms are outliers, once 32 are known."""
    flags = ["--max_iters=60", "--eval_interval=100", "--skip_patience=99"]
    assert run(*flags, name="none").train[-1]["skipped"] == 0
    skipped = [line["skipped"] for line in run(*flags, "--spike_skip=0.01", name="some").train]
    assert skipped[31] == 0 and 3 < skipped[-1] < 25


@effect
def skip_patience(run):
    with pytest.raises(SystemExit, match="2 steps in a row were skipped"):
        run("--max_iters=99", "--eval_interval=100", "--spike_skip=1e-6", "--skip_patience=2", "--learning_rate=0")


@effect
def parallel_(run):
    assert "one process holds all, nothing is sharded" in run("--parallel=fsdp").console


def given_to_fsdp(monkeypatch, *flags: str) -> dict:
    """What FSDP2 is told for each module."""
    given = {}
    monkeypatch.setattr(parallel, "init_device_mesh", lambda *shape: None)
    monkeypatch.setattr(parallel, "fully_shard", lambda module, **options: given.update(options))
    args = train_args.parse(["--parallel=fsdp", *flags])
    parallel.shard(torch.nn.Linear(1, 1), [], parallel.Ranks(0, 2, torch.device("cpu")), torch.bfloat16, args.fsdp_reshard, args.fsdp_offload)
    return given


@effect
def fsdp_reshard(monkeypatch):
    assert given_to_fsdp(monkeypatch)["reshard_after_forward"] is True
    assert given_to_fsdp(monkeypatch, "--no-fsdp_reshard")["reshard_after_forward"] is False


@effect
def fsdp_offload(monkeypatch):
    assert type(given_to_fsdp(monkeypatch)["offload_policy"]).__name__ == "OffloadPolicy"
    assert type(given_to_fsdp(monkeypatch, "--fsdp_offload")["offload_policy"]).__name__ == "CPUOffloadPolicy"


@effect
def rank_timeout(run, monkeypatch):
    given, plain = [], parallel.ranks
    monkeypatch.setattr(parallel, "ranks", lambda device, timeout: (given.append(timeout), plain(device, timeout))[1])
    run("--rank_timeout=7")
    assert given == [7]
