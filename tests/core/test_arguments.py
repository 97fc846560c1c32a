"""Every argument has a test of its effect: a function here with its name. A new argument without one fails."""

import importlib.machinery
import inspect
import itertools
import json
import math
import re
import runpy
import shutil
import struct
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    COMMIT,
    ROOT,
    TEXT,
    TINY,
    RunFiles,
    cache_model,
    equal_tensors,
    gpt2_tokenizer_env,
    offline_cache,
    read_run,
)

import configurator
import train
import train_args
from nanoforge import distributed
from nanoforge.device import ATTENTION_KERNELS, set_attention_kernel
from nanoforge.errors import UserError
from nanoforge.models import pretrained

MIX = ["--training_mode=multidataset", "--dataset_list", "a", "b"]
V = len(set(TEXT))
EFFECTS = {}


def effect(function):
    """Registers the test of the argument that the function is named after."""
    EFFECTS[function.__name__.rstrip("_")] = function
    return function


def lrs(done) -> list[float]:
    return [line["lr"] for line in done.train]


def shapes(done) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in done.last.weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(configurator.arg_specs(train_args.TrainArgs)))
def test_argument_has_its_effect(
    name, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path, base: Path
):
    assert name in EFFECTS, f"--{name} has no test of its effect"
    fixtures = {"run": run, "tmp_path": tmp_path, "monkeypatch": monkeypatch, "data_dir": data_dir, "base": base}
    function = EFFECTS[name]
    function(**{parameter: fixtures[parameter] for parameter in inspect.signature(function).parameters})


def test_no_effect_is_tested_of_an_argument_that_is_not_there():
    assert not EFFECTS.keys() - configurator.arg_specs(train_args.TrainArgs).keys()


# ---------------------------------------------------------------------------------------------------------------------
# run


@effect
def out_dir(run, tmp_path):
    assert (run(name="here").out_dir / "checkpoints").is_dir() and list(tmp_path.iterdir()) == [tmp_path / "here"]


@effect
def overwrite(run):
    run()
    with pytest.raises(UserError):
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
    """The cache of the hub has one GPT-2, a small one. A resumed run finds it by its commit."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv(*next(iter(gpt2_tokenizer_env().items())))
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path / "small")
    from nanoforge.data import corpus
    from nanoforge.data.documents import TextChunk

    chunks = [TextChunk("train", "hello world " * 30), TextChunk("val", "hello world " * 30)]
    corpus.write_dataset(tmp_path / "data/text", lambda: chunks, "gpt2")
    flags = ["--init_from=gpt2", f"--data_dir={tmp_path / 'data'}", "--dataset=text", "--max_iters=1", "--adapter=lora"]
    with offline_cache(tmp_path / "cache") as cache:
        snapshot = cache_model(cache, "openai-community/gpt2-large", tmp_path / "small")
        with pytest.raises(UserError, match=r"--init_from=openai-community/gpt2: .*HF_HOME"):
            run(*flags, name="other")
        done = run(*flags, "--gpt2_type=gpt2-large")
        assert (done.config["bias"], done.config["activation"]) == (True, "gelu_tanh")
        assert (done.config["n_layer"], done.config["block_size"]) == (1, 8)
        (snapshot.parents[1] / "refs/main").write_text("f" * 40)  # the branch has moved on
        resumed = run("--init_from=resume", "--max_iters=2")
    assert resumed.config["bias"] is True and len(resumed.train) == 2
    assert resumed.config["_base"]["source"] == f"openai-community/gpt2-large@{COMMIT}"


@effect
def doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/core/test_doctor.py has what it finds."""
    calls: list[train_args.TrainArgs] = []
    monkeypatch.setattr("doctor.main", calls.append)
    monkeypatch.setattr("sys.argv", ["train.py", "--doctor", "--n_layer=3"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert (end.value.code, [args.n_layer for args in calls]) == (0, [3])


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
def bad_rows(run: Callable, tmp_path: Path):
    rows = [{"text": "abc"}, {"text": None}, {"text": "abd"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--objective=sft", f"--train_file={tmp_path}/a.jsonl", f"--validation_file={tmp_path}/a.jsonl"]
    with pytest.raises(UserError, match=r"a\.jsonl:2: text: "):
        run(*flags)
    assert "a.jsonl:2: text: " in run(*flags, "--bad_rows=skip", name="skip").console


@effect
def columns(run: Callable, tmp_path: Path):
    """The rows under other names are those under TRL's."""
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(9)]
    for name, keys in (("trl", ("prompt", "completion")), ("other", ("q", "a"))):
        lines = [json.dumps(dict(zip(keys, row.values(), strict=True))) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))

    def flags(name: str) -> list[str]:
        files = [f"--train_file={tmp_path}/{name}.jsonl", f"--validation_file={tmp_path}/{name}.jsonl"]
        return ["--objective=sft", "--block_size=8", *files]

    mapped = run(*flags("other"), "--columns=prompt=q,completion=a", name="mapped")
    assert mapped.losses == run(*flags("trl"), name="trl").losses
    with pytest.raises(UserError, match=r"other\.jsonl:1: has the fields q, a; .*--columns"):
        run(*flags("other"))


@effect
def val_fraction(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the hub's rows, here in a folder of save_to_disk, half are for validation."""
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(20)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    flags = ["--objective=sft", "--block_size=8", f"--dataset=hf:{tmp_path}/saved"]
    record = run(*flags, "--val_fraction=0.5", name="half").config["_data"]
    assert [file.partition(",")[0] for files in record.values() for file in files.values()] == ["10 rows", "10 rows"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = run(*flags[:2], f"--train_file={tmp_path}/a.jsonl", "--val_fraction=0.5", name="file").config["_data"]
    assert list(file["a"].values()) == list(record[f"hf:{tmp_path}/saved"].values()), "of a lone file too"
    record = run(*flags, name="tenth").config["_data"]
    assert [file.partition(",")[0] for files in record.values() for file in files.values()] == ["18 rows", "2 rows"]


@effect
def sampling_method(run):
    losses = {
        method: run(f"--sampling_method={method}", name=method).losses
        for method in ("random", "without_replacement", "sequential")
    }
    assert len({tuple(loss) for loss in losses.values()}) == 3
    one = run(
        "--sampling_method=sequential",
        "--log_data_hash",
        "--max_epochs=1",
        "--batch_size=1",
        "--max_iters=9999",
        "--eval_interval=9999",
        name="epoch",
    )
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
    done = run(
        *MIX,
        "--dataset_sampling_probs",
        "1",
        "0",
        "--dataset_sampling_probs_final",
        "0",
        "1",
        "--max_iters=40",
        "--dataset_mixing=sequence",
        "--batch_size=16",
        "--eval_interval=10",
    )
    tokens = [line["tokens/b"] for line in done.evals]
    parts = [(b - a) / (10 * 16 * 8) for a, b in itertools.pairwise(tokens)]
    assert parts == sorted(parts) and parts[0] < 0.25 and parts[-1] > 0.75
    assert done.evals[-1]["val_loss"] == pytest.approx(done.evals[-1]["val_loss/b"]), "the final weights make val_loss"


@effect
def dataset_sampling_probs_transition_method(run):
    flags = [
        *MIX,
        "--dataset_sampling_probs",
        "9",
        "1",
        "--dataset_sampling_probs_final",
        "1",
        "9",
        "--max_iters=40",
        "--dataset_mixing=sequence",
        "--batch_size=16",
        "--eval_interval=10",
    ]
    early = {
        method: run(*flags, f"--dataset_sampling_probs_transition_method={method}", name=method).evals[1]["tokens/b"]
        for method in ("linear", "cosine", "exponential")
    }
    assert early["linear"] > early["cosine"], "a cosine begins slowly"
    assert early["exponential"] not in (early["linear"], early["cosine"])


@effect
def dataset_mixing(run):
    tokens = lambda done: {line["tokens/a"] % (4 * 8) for line in done.evals}  # noqa: E731
    assert tokens(run(*MIX, "--eval_interval=1", name="batch")) == {0}
    assert tokens(run(*MIX, "--eval_interval=1", "--dataset_mixing=sequence", name="sequence")) != {0}


@effect
def dataset_interleaving(run):
    done = run(
        *MIX, "--dataset_interleaving", "--dataset_sampling_probs", "2", "1", "--max_iters=6", "--eval_interval=1"
    )
    assert [line["tokens/b"] // 32 for line in done.evals] == [0, 0, 0, 1, 1, 1, 2]


@effect
def multidataset_wte(run):
    assert (
        shapes(run("--training_mode=multidataset", "--dataset_list", "a", "c", "--multidataset_wte"))["wte.weight"][0]
        == V + 11
    )


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
def auto_find_batch_size(run: Callable[..., RunFiles]) -> None:
    """tests/training/test_micro_batch.py has what it chooses."""
    done = run("--auto_find_batch_size", "--max_iters=1", "--eval_iters=2")
    assert done.config["batch_size"] * done.config["gradient_accumulation_steps"] == 4
    assert f"--batch_size={done.config['batch_size']}" in done.console


@effect
def gradient_accumulation_steps(run):
    done = run("--gradient_accumulation_steps=3")
    assert done.progress.tokens == 4 * 3 * 4 * 8 and "3 x 4 on each" in done.console


@effect
def block_size(run):
    assert shapes(run("--block_size=16"))["position.weight"] == (16, 16)


# ---------------------------------------------------------------------------------------------------------------------
# depth: the rules are tested in test_depth.py


def train_depth(data_dir, out_dir, *flags):
    flags = [
        "--depth=1",
        "--aspect=32",
        "--tokens_per_weight=0.5",
        *flags,
        "--dataset=a",
        f"--data_dir={data_dir}",
        "--block_size=8",
        "--eval_iters=1",
        "--device=cpu",
        f"--out_dir={out_dir}",
    ]
    return read_run(out_dir, train.main(train_args.parse(["configs/depth.py", *flags])))


@effect
def depth(data_dir, tmp_path):
    done = train_depth(data_dir, tmp_path / "run", "--depth=2", "--aspect=16")
    assert (
        shapes(done)["blocks.1.mlp.proj.weight"] == (32, 128)
        and (done.config["n_head"], done.config["depth"]) == (1, 2)
        and done.steps[-1] == done.config["max_iters"]
    )
    again = train_args.parse(["--init_from=resume", f"--out_dir={tmp_path / 'run'}"])
    assert (again.depth, again.max_iters, again.batch_size) == (2, done.config["max_iters"], done.config["batch_size"])


@effect
def aspect(data_dir, tmp_path):
    assert shapes(train_depth(data_dir, tmp_path / "run", "--aspect=64", "--tokens_per_weight=0.01"))[
        "blocks.0.mlp.proj.weight"
    ] == (64, 256)


@effect
def tokens_per_weight(data_dir, tmp_path):
    done = train_depth(data_dir, tmp_path / "run", "--tokens_per_weight=0.3")
    assert done.progress.tokens == pytest.approx(0.3 * 12 * 32**2, rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# budget: what it chooses in tests/training/test_budget.py


def train_budget(data_dir: Path, out_dir: Path, *flags: str):
    """A run with a budget, from a size of one layer."""
    fixed = ["--dataset=a", "--n_layer=1", "--block_size=8", "--batch_size=4", "--device=cpu", "--dtype=float32"]
    flags = (f"--data_dir={data_dir}", *fixed, f"--out_dir={out_dir}", *flags)
    return read_run(out_dir, train.main(train_args.parse(list(flags))))


@effect
def time_budget(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", time.process_time)  # other processes make no difference
    done = train_budget(data_dir, tmp_path / "run", "--time_budget=0.7s", "--n_embd=16")
    assert done.progress.pace["knots"][-1][1] == done.progress.step != done.config["max_iters"]


@effect
def flops_budget(data_dir: Path, tmp_path: Path) -> None:
    done = train_budget(data_dir, tmp_path / "run", "--flops_budget=20M", "--n_embd=16")
    assert done.progress.tokens * done.config["_counts"]["flops_per_token"] == pytest.approx(20e6, rel=0.05)


@effect
def token_budget(data_dir: Path, tmp_path: Path) -> None:
    assert train_budget(data_dir, tmp_path / "run", "--token_budget=0.64K").progress.tokens == 640


@effect
def budget_chooses(data_dir: Path, tmp_path: Path) -> None:
    flags = ["--token_budget=640", "--budget_chooses=n_embd,n_head,max_iters,eval_interval,eval_iters"]
    done = train_budget(data_dir, tmp_path / "run", *flags)
    assert done.progress.tokens == 640 and done.config["learning_rate"] == train_args.TrainArgs.learning_rate


# ---------------------------------------------------------------------------------------------------------------------
# model: shapes here, what each variant computes in test_model.py


@effect
def n_layer(run):
    assert "blocks.2.attn.qkv.weight" in shapes(run("--n_layer=3")) and "blocks.2.attn.qkv.weight" not in shapes(
        run(name="two")
    )


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
def head_dim(run):
    assert shapes(run("--head_dim=12"))["blocks.0.attn.qkv.weight"] == (3 * 2 * 12, 16)


@effect
def vocab_size(run):
    assert shapes(run("--vocab_size=64"))["wte.weight"] == (64, 16)
    with pytest.raises(UserError, match="less than the tokenizer's 30"):
        run("--vocab_size=29", name="less")


@effect
def bias(run):
    assert {"norm.bias", "blocks.0.attn.qkv.bias", "blocks.1.mlp.up.bias"} <= shapes(run("--bias")).keys() and not [
        n for n in shapes(run(name="no")) if "bias" in n
    ]


@effect
def qkv_bias(run):
    biases = {name for name in shapes(run("--qkv_bias")) if "bias" in name}
    assert biases == {"blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"}


@effect
def norm(run):
    assert (
        not [name for name in shapes(run("--norm=rmsnorm_nogain")) if "norm" in name]
        and run("--norm=rmsnorm", name="r").losses != run(name="l").losses
    )
    offset = run("--norm=rmsnorm_offset", "--weight_decay=0", "--max_iters=0", name="offset").last.weights
    assert {name: tensor.abs().max() for name, tensor in offset.items() if "norm" in name} == dict.fromkeys(
        (f"{block}.offset" for block in ("norm", *(f"blocks.{i}.norm_{j}" for i in (0, 1) for j in (1, 2)))), 0
    )


@effect
def norm_eps(run):
    assert run("--norm_eps=1", name="large").losses[0] != run(name="small").losses[0]


@effect
def norm_placement(run):
    places = {"pre": {"norm_1", "norm_2"}, "post": {"post_norm_1", "post_norm_2"}}
    places["both"] = places["pre"] | places["post"]
    for placement, expected in places.items():
        names = shapes(run(f"--norm_placement={placement}", name=placement))
        assert {name.split(".")[2] for name in names if name.startswith("blocks.0.") and "norm" in name} == expected


@effect
def parallel_residual(run):
    """The attention of the first layer has another effect on the loss; there is nothing more to learn."""
    parallel, plain = run("--parallel_residual", name="parallel"), run(name="plain")
    assert parallel.losses[0] != plain.losses[0] and shapes(parallel) == shapes(plain)


@effect
def position(run):
    assert (
        "position.weight" not in shapes(run("--position=rope"))
        and run("--position=none", name="none").losses != run("--position=rope", name="rope").losses
    )


@effect
def rope_base(run):
    assert run("--position=rope", "--rope_base=3", name="3").losses != run("--position=rope", name="10000").losses


@effect
def rope_scaling(run):
    scaled = run("--position=rope", '--rope_scaling={"rope_type": "linear", "factor": 4}', name="scaled")
    assert scaled.losses != run("--position=rope", name="plain").losses
    assert scaled.config["rope_scaling"] == {"rope_type": "linear", "factor": 4}
    for value, message in (
        ({"rope_type": "dynamic"}, "rope_type=dynamic"),
        ({"rope_type": "yarn", "factor": 4, "beta_fast": 32}, "yarn needs original_max_position_embeddings"),
        ({"rope_type": "linear", "factor": 4, "truncate": 1}, "linear has no truncate"),
    ):
        assert message in next(train_args.rope_scaling_errors(value))


@effect
def rotary_fraction(run):
    assert run("--position=rope", "--rotary_fraction=0.5", name="half").losses != run("--position=rope").losses


@effect
def window_rope_base(run):
    """As --rope_base, where all layers are windowed."""
    flags = ["--position=rope", "--window=S"]
    windowed = run(*flags, "--window_rope_base=3", name="windowed").losses
    assert windowed == run(*flags, "--rope_base=3", name="all").losses != run(*flags, name="neither").losses


@effect
def activation(run):
    assert (
        len(
            {
                tuple(run(f"--activation={name}", "--learning_rate=0.1", name=name).losses)
                for name in ("gelu", "gelu_tanh", "relu2", "silu")
            }
        )
        == 4
    )


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
def qk_norm_gain(run):
    done = run("--qk_norm", "--qk_norm_gain", "--norm=rmsnorm")
    assert shapes(done)["blocks.1.attn.k_norm.norm.weight"] == (8,)


@effect
def qk_norm_joint(run):
    flags = ["--qk_norm", "--qk_norm_gain", "--norm=rmsnorm", "--n_kv_head=1"]
    joint = shapes(run(*flags, "--qk_norm_joint"))
    assert (joint["blocks.0.attn.q_norm.norm.weight"], joint["blocks.0.attn.k_norm.norm.weight"]) == ((16,), (8,))


@effect
def attention_scale(run):
    plain = run(name="plain").losses
    assert run("--attention_scale=3", name="3").losses != plain
    assert run(f"--attention_scale={8**-0.5}", name="default").losses == plain


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
    assert done.losses == pytest.approx([math.log(V)] * 4, abs=0.002), "bounded logits are nearly uniform"


@effect
def softcap(run):
    losses = {name: run("--logit_softcap=0.1", f"--softcap={name}", name=name).losses for name in ("rsqrt", "tanh")}
    assert losses["rsqrt"] != losses["tanh"]


@effect
def embedding_scale(run):
    assert run("--embedding_scale=4", name="4").losses[0] != run(name="1").losses[0]


@effect
def embedding_norm(run):
    """The first step's loss differs, the shapes of the weights don't."""
    done, plain = run("--embedding_norm"), run(name="plain")
    assert done.losses[0] != plain.losses[0] and shapes(done) == shapes(plain)


@effect
def value_residual(run):
    assert shapes(run("--value_residual")).keys() - shapes(run(name="plain")).keys() == {"blocks.1.attn.first_values"}


@effect
def residual_scalars(run):
    done = run("--residual_scalars", "--learning_rate=0.1")
    assert (
        done.last.weights["blocks.1.scales"].tolist() != [1.0, 0.0]
        and done.losses[0] == run("--learning_rate=0.1", name="plain").losses[0]
    )


@effect
def tie_weights(run):
    assert "head.weight" in shapes(run("--no-tie_weights")) and "head.weight" not in shapes(run(name="tied"))


@effect
def init_std(run):
    """The same draws, of another scale; of all but the embedding."""
    flags = ["--max_iters=0", "--no-tie_weights", "--norm=rmsnorm_nogain"]
    small, large = (run(*flags, f"--init_std={std}", name=str(std)).last.weights for std in (0.02, 0.08))
    for name, weight in large.items():
        torch.testing.assert_close(weight, small[name] * (1 if name == "wte.weight" else 4))


@effect
def embedding_init_std(run):
    """The same draws, of another scale; of the embedding alone."""
    small, large = (
        run("--max_iters=0", f"--embedding_init_std={std}", name=str(std)).last.weights for std in (0.02, 1.0)
    )
    assert {name for name in small if not torch.equal(small[name], large[name])} == {"wte.weight"}
    torch.testing.assert_close(large["wte.weight"], small["wte.weight"] * 50)


@effect
def zero_init(run):
    done = run("--zero_init", "--max_iters=0", "--no-tie_weights")
    assert (
        done.last.weights["blocks.0.attn.proj.weight"].abs().max() == 0 == done.last.weights["head.weight"].abs().max()
    )


@effect
def dropout(run):
    done = run("--dropout=0.5")
    assert (
        done.losses != run(name="none").losses and done.evals[0]["val_loss"] == run(name="again").evals[0]["val_loss"]
    ), "not in evaluation"


# ---------------------------------------------------------------------------------------------------------------------
# how long


@effect
def max_iters(run):
    assert run("--max_iters=3").progress.step == 3


@effect
def max_tokens(run, base):
    assert run("--max_tokens=65").progress.step == 3  # 32 a step
    with pytest.raises(
        UserError, match="exceeds --max_tokens=10 "
    ):  # of the 3 rows and the 6 to 8 tokens of an example
        run(*soft(base), "--max_tokens=10", name="soft")
    assert run(*soft(base), "--max_tokens=11", name="more").progress.step == 4


@effect
def max_epochs(run):
    assert run(
        "--max_epochs=0.5", "--max_iters=100", "--eval_interval=100", "--log_interval=50"
    ).progress.step == math.ceil(0.5 * 193 / 4)
    assert "--max_iters=4: ends the run" in run("--max_epochs=0.5", name="cut").console


@effect
def max_seconds(run):
    done = run("--max_seconds=1", "--max_iters=1000000", "--eval_interval=1000000", "--log_interval=1000000")
    assert (
        1 <= done.progress.step < 1000000
        and done.steps == [done.progress.step]
        and "finished: 1 seconds" in done.console
    )
    assert done.evals[-1]["step"] == done.progress.step


@effect
def early_stop_patience(run):
    done = run("--early_stop_patience=3", "--learning_rate=0", "--max_iters=100", "--eval_interval=2")
    assert done.progress.step == 8, "the first at 2 is the best, then three no better ones"


# ---------------------------------------------------------------------------------------------------------------------
# optimizer and schedule: what each computes in test_optim.py


@effect
def optimizer(run):
    assert (
        len(
            {
                tuple(run(f"--optimizer={name}", name=name.replace(":", "_")).losses)
                for name in (*train_args.OPTIMIZERS, "torch.optim:Adamax")
            }
        )
        == 11
    )


@effect
def learning_rate(run):
    done = run("--learning_rate=0")
    assert (
        equal_tensors(done.last.weights, run("--max_iters=0", name="start").last.weights)
        and lrs(run("--learning_rate=0.25", name="q"))[0] == 0.25
    )


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
    start, done = (
        run("--max_iters=0", name="start").last.weights,
        run("--optimizer=muon", "--muon_learning_rate=0").last.weights,
    )
    assert torch.equal(start["blocks.0.mlp.up.weight"], done["blocks.0.mlp.up.weight"]) and not torch.equal(
        start["wte.weight"], done["wte.weight"]
    )


@effect
def embedding_learning_rate(run):
    """All rates are 0 but this one: the embedding alone learns."""
    start, done = (
        run("--max_iters=0", name="start").last.weights,
        run("--learning_rate=0", "--embedding_learning_rate=0.1").last.weights,
    )
    assert {name for name in start if not torch.equal(start[name], done[name])} == {"wte.weight"}


@effect
def head_learning_rate(run):
    start, done = (
        run("--no-tie_weights", *flags, name=flags[0].strip("-")).last.weights
        for flags in (["--max_iters=0"], ["--learning_rate=0", "--head_learning_rate=0.1"])
    )
    assert {name for name in start if not torch.equal(start[name], done[name])} == {"head.weight"}


@effect
def muon_weight_decay(run):
    norm = lambda done: done.last.weights["blocks.0.mlp.up.weight"].norm()  # noqa: E731
    assert norm(run("--optimizer=muon", "--muon_weight_decay=10", name="much")) < 0.9 * norm(
        run("--optimizer=muon", name="none")
    )


@effect
def muon_momentum(run):
    assert run("--optimizer=muon", "--muon_momentum=0", name="0").losses != run("--optimizer=muon", name="95").losses


@effect
def muon_momentum_warmup(run: Callable):
    """As with that momentum, as long as it lasts: at step 2 of 4 it is in the middle of 0.85 and 0.95."""
    start = run("--optimizer=muon", "--muon_momentum=0.85", name="85")
    flags = ["--optimizer=muon", "--muon_momentum_warmup=4"]
    warm = run(*flags, name="warm")
    assert warm.losses[:2] == start.losses[:2] and warm.losses[2:] != start.losses[2:]
    assert run("--optimizer=muon", "--muon_momentum_warmup=0", name="0").losses != warm.losses


@effect
def cautious_weight_decay(run: Callable):
    flags = ["--optimizer=muon", "--muon_weight_decay=10"]
    norms = []
    for flag in ("--no-cautious_weight_decay", "--cautious_weight_decay"):
        norms.append(run(*flags, flag, name=flag).last.weights["blocks.0.mlp.up.weight"].norm())
    assert norms[0] < norms[1] < run("--optimizer=muon", name="none").last.weights["blocks.0.mlp.up.weight"].norm()


@effect
def aux_eps(run: Callable):
    """AdamW's, which stands still with a large one; Muon has its own."""
    before = run("--max_iters=0", "--optimizer=muon", name="start").last.weights
    after = run("--optimizer=muon", "--aux_eps=1e12", "--weight_decay=0", name="eps").last.weights
    assert torch.equal(before["wte.weight"], after["wte.weight"])
    assert not torch.equal(before["blocks.0.mlp.up.weight"], after["blocks.0.mlp.up.weight"])


@effect
def optimizer_kwargs(run):
    assert run('--optimizer_kwargs={"eps": 10}', name="eps").losses != run(name="none").losses


@effect
def ema_decay(run):
    """Another model is evaluated and saved, and the same one trained."""
    average, last = run("--ema_decay=0.9", name="average"), run(name="last")
    assert average.losses == last.losses and average.evals[-1]["val_loss"] != last.evals[-1]["val_loss"]
    trained = {name: average.last.optimizer[f"trained/{name}"] for name in last.last.weights}
    assert equal_tensors(trained, last.last.weights) and not equal_tensors(average.last.weights, trained)


@effect
def grad_clip(run):
    clipped, free = (
        run("--grad_clip=0.001", "--optimizer=sgd", "--momentum=0", name="clipped"),
        run("--grad_clip=0", "--optimizer=sgd", "--momentum=0", name="free"),
    )
    assert clipped.train[0]["grad_norm"] == free.train[0]["grad_norm"] > 0.01, "logged before it is clipped"
    assert clipped.losses[1:] != free.losses[1:]


@effect
def lr_scheduler(run):
    flags = ["--warmup_iters=1", "--lr_decay_iters=4", "--learning_rate=0.01", "--min_lr=0.001"]
    without_horizon = [flag for flag in flags if not flag.startswith("--lr_decay_iters")]
    seen = {}
    for name in ("linear", "cosine", "exponential", "step", "inverse_sqrt", "wsd"):
        more = without_horizon if name in ("step", "inverse_sqrt") else flags
        seen[name] = lrs(run(f"--lr_scheduler={name}", *more, name=name))
    assert all(rates[:2] == pytest.approx([0.005, 0.01]) for rates in seen.values())
    assert (
        seen["linear"][3] == pytest.approx(0.004)
        and seen["exponential"][3] == pytest.approx(0.01 * 0.1 ** (2 / 3))
        and seen["step"][3] == 0.01
    )


@effect
def decay_lr(run):
    rates = lrs(run("--decay_lr", "--lr_decay_iters=4", "--min_lr=0", "--learning_rate=1"))
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])
    assert lrs(run("--no-decay_lr", name="no")) == [1e-3] * 4


@effect
def warmup_iters(run):
    assert lrs(run("--warmup_iters=3", "--learning_rate=1")) == pytest.approx([0.25, 0.5, 0.75, 1.0])


@effect
def warmup_ratio(tmp_path: Path, data_dir: Path):
    """Rounded up, as transformers does."""
    flags = [flag for flag in TINY if not flag.startswith("--warmup_iters")]
    flags += [f"--data_dir={data_dir}", "--dataset=a", f"--out_dir={tmp_path}/run", "--learning_rate=1"]
    train.main(train_args.parse([*flags, "--warmup_ratio=0.6"]))
    assert lrs(read_run(tmp_path / "run")) == pytest.approx([0.25, 0.5, 0.75, 1.0])


@effect
def lr_decay_iters(run):
    """Unless it is set, the decay ends with the run; the summary has the rate of the last step."""
    assert lrs(run("--decay_lr", "--lr_decay_iters=2", "--min_lr=0.0005"))[2:] == pytest.approx([0.0005, 0.0005])
    follows = run("--lr_scheduler=linear", "--learning_rate=1", "--min_lr=0", name="follows")
    assert lrs(follows) == pytest.approx([1, 0.75, 0.5, 0.25]) and "at the last step 0.25" in follows.console
    assert follows.config["lr_decay_iters"] == 4


@effect
def min_lr(run):
    assert lrs(run("--lr_scheduler=linear", "--lr_decay_iters=3", "--min_lr=0.0004"))[-1] == pytest.approx(0.0004)


@effect
def lr_step_size(run):
    assert lrs(run("--lr_scheduler=step", "--lr_step_size=2", "--learning_rate=1", "--min_lr=0")) == pytest.approx(
        [1, 1, 0.1, 0.1]
    )


@effect
def lr_step_gamma(run):
    assert lrs(
        run("--lr_scheduler=step", "--lr_step_size=1", "--lr_step_gamma=0.5", "--learning_rate=1", "--min_lr=0")
    ) == pytest.approx([1, 0.5, 0.25, 0.125])


@effect
def wsd_decay_fraction(run):
    assert lrs(
        run("--lr_scheduler=wsd", "--lr_decay_iters=4", "--wsd_decay_fraction=0.5", "--learning_rate=1", "--min_lr=0")
    ) == pytest.approx([1, 1, 1, 0.5])


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
def checkpoint_at_eval(run):
    flags = ["--max_iters=6", "--eval_interval=1", "--keep_last=99", "--no-checkpoint_at_eval"]
    done = run(*flags, "--checkpoint_interval=4", name="own_interval")
    assert done.steps == [4, 6] and len(done.evals) == 7
    best = json.loads((done.out_dir / "best.json").read_text())
    saved = {line["step"]: line["val_loss"] for line in done.evals if line["step"] in done.steps}
    assert (best["val_loss"], best["step"]) == min((loss, step) for step, loss in saved.items())
    assert run(*flags, name="at_the_end").steps == [6]


@effect
def always_save_checkpoint(run):
    flags = ["--learning_rate=0", "--max_iters=6"]  # only the evaluation at step 2 is the best so far
    saves = lambda done: done.console.count("saved ")  # noqa: E731
    assert (
        saves(run(*flags, name="always")) == 3 and saves(run(*flags, "--no-always_save_checkpoint", name="better")) == 2
    )


@effect
def log_interval(run):
    assert [line["step"] for line in run("--log_interval=2", "--max_iters=5").train] == [1, 2, 4]


@effect
def log_data_hash(run):
    assert (
        all(len(line["data_hash"]) == 16 for line in run("--log_data_hash").train)
        and "data_hash" not in run(name="no").train[0]
    )


@effect
def plot_loss(run):
    pytest.importorskip("matplotlib")
    picture = (run("--plot_loss").out_dir / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def read_wandb_history(path: Path) -> list[dict]:
    """The rows that wandb kept, from its own file: a LevelDB log of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, block, position, record, rows = path.read_bytes(), 2**15, 7, b"", []
    while position + 7 <= len(data):
        if block - position % block < 7:  # no header fits in the block's rest
            position += block - position % block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)  # checksum, size, 1 or 4: a record's end
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            history = wandb_internal_pb2.Record.FromString(record).history.item
            rows.append({item.nested_key[0]: json.loads(item.value_json) for item in history})
            record = b""
    return [row for row in rows if row]


@effect
def wandb_log(run, monkeypatch):
    """The real wandb, offline: a resumed run goes on under the same id, and keeps all metrics, of late saves too."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    first = run("--wandb_log", "--wandb_project=mine", "--wandb_run_name=me", "--max_iters=4", "--eval_interval=1")
    lines = [json.loads(line) for line in (first.out_dir / "metrics.jsonl").read_text().splitlines()]
    path = next(first.out_dir.glob("wandb/offline-run-*/*.wandb"))
    rows = read_wandb_history(path)
    deadline = time.monotonic() + 20
    while len(rows) < sum(line["event"] != "note" for line in lines) and time.monotonic() < deadline:
        time.sleep(0.05)  # wandb's own process may still be writing
        rows = read_wandb_history(path)
    for event, key in (("train", "loss"), ("eval", "val_loss"), ("save", "written_ms")):
        kept = [(row["step"], row[f"{event}/{key}"]) for row in rows if f"{event}/{key}" in row]
        assert kept == [(line["step"], line[key]) for line in lines if line["event"] == event] != []
    run("--init_from=resume", "--max_iters=5")
    folders = [path.name for path in (first.out_dir / "wandb").glob("offline-run-*")]
    assert len(folders) >= 1 and {name.rsplit("-", 1)[1] for name in folders} == {
        (first.out_dir / "wandb_id").read_text()
    }


def wandb_init_options(run, monkeypatch, *flags) -> dict:
    """What wandb.init is called with, seen by a stand-in."""
    seen = {}
    stand_in = types.ModuleType("wandb")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    stand_in.init = lambda **options: (
        seen.update(options)
        or types.SimpleNamespace(
            log=lambda *_, **__: seen.update(logged=True),
            finish=lambda: None,
            define_metric=lambda *_, **__: None,
            step=0,
        )
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    run("--wandb_log", *flags)
    assert seen["logged"] and len(seen["id"]) == 8 and seen["config"]["n_layer"] == 2
    return seen


@effect
def wandb_project(run, monkeypatch):
    assert wandb_init_options(run, monkeypatch, "--wandb_project=theirs")["project"] == "theirs"


@effect
def wandb_run_name(run, monkeypatch):
    assert wandb_init_options(run, monkeypatch, "--wandb_run_name=me")["name"] == "me"


def trackio_calls(run: Callable[..., RunFiles], monkeypatch: pytest.MonkeyPatch, *flags: str) -> list[Any]:
    """What trackio.init is called with, and what is logged, seen by a stand-in."""
    calls: list[Any] = []
    stand_in = types.ModuleType("trackio")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
    log = lambda numbers, step: calls.append((step, numbers))  # noqa: E731
    stand_in.init = lambda **options: calls.append(options) or types.SimpleNamespace(log=log, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    run("--trackio_log", *flags, "--max_iters=1")
    return calls


@effect
def trackio_log(run: Callable[..., RunFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run goes on by its name."""
    calls = trackio_calls(run, monkeypatch)
    run("--init_from=resume", "--max_iters=2")
    first, second = (call for call in calls if isinstance(call, dict))
    assert (first["name"], first["resume"]) == (second["name"], "allow") and first["config"]["n_layer"] == 2
    assert re.fullmatch(r"run-[0-9a-f]{4}", calls[0]["name"]) and not [
        key for key in calls[0]["config"] if key[0] == "_"
    ]
    assert [call[0] for call in calls if isinstance(call, tuple) and "train/loss" in call[1]] == [1, 2]


@effect
def trackio_project(run: Callable[..., RunFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackio_calls(run, monkeypatch, "--trackio_project=theirs")[0]["project"] == "theirs"


@effect
def trackio_run_name(run: Callable[..., RunFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackio_calls(run, monkeypatch, "--trackio_run_name=me")[0]["name"] == "me"


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
        with pytest.raises(UserError, match="no CUDA GPU"):
            run("--device=cuda", name="cuda")


@effect
def dtype(run):
    half = run("--dtype=bfloat16", "--max_iters=1", name="half")
    assert (
        half.losses != run("--max_iters=1", name="single").losses
        and "bfloat16" in half.console
        and half.last.weights["wte.weight"].dtype == torch.float32
    )


@effect
def attention_kernel(run, monkeypatch):
    with pytest.raises(UserError, match="only a CUDA GPU"):
        run("--attention_kernel=flash")
    enabled = {}
    monkeypatch.setattr(
        "nanoforge.device.ATTENTION_KERNELS",
        {name: lambda on, name=name: enabled.update({name: on}) for name in ATTENTION_KERNELS},
    )
    set_attention_kernel("cudnn", torch.device("cuda"))
    assert enabled == {"flash": False, "cudnn": True, "efficient": False, "math": False}
    set_attention_kernel("auto", torch.device("cuda"))
    assert enabled == dict.fromkeys(ATTENTION_KERNELS, True)


@effect
def compile(run, monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: (calls.append(options), model)[1]
    )  # what it computes is in test_model.py
    run("--compile")
    assert calls == [{"dynamic": False}] * 4, "the embedding, two blocks, the head with the loss"
    run("--compile", "--optimizer=muon", name="muon")
    assert len(calls) > 8, "and Muon's step"
    run("--no-compile", name="eager")
    run(name="auto")
    assert len(calls) == 9, "auto: not on a CPU"


@effect
def cuda_graph(run, monkeypatch):
    """What a captured step computes is in test_train_step.py."""
    captured = []
    monkeypatch.setattr("run.CapturedStep", lambda step, device: (captured.append(step), step)[1])
    assert run("--cuda_graph", "--device=auto", "--dropout=0").losses == run(name="plain").losses
    assert captured


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
    original = model.chunk_losses
    monkeypatch.setattr(model, "chunk_losses", lambda x, *rest: rows.append(len(x)) or original(x, *rest))
    assert run("--loss_chunk=5").losses == pytest.approx(run(name="plain").losses, rel=1e-5) and max(rows) == 5


@effect
def deterministic(run):
    try:
        run("--deterministic", "--max_iters=1")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------------------------------------------
# what keeps a run safe; more in test_faults.py and test_sharding.py


@effect
def checkpoint_interval(run):
    assert run("--checkpoint_interval=3", "--max_iters=7", "--eval_interval=100", "--keep_last=9").steps == [3, 6, 7]


@effect
def keep_last(run):
    assert run("--keep_last=3", "--checkpoint_interval=1", "--max_iters=6", "--eval_interval=6").steps == [4, 5, 6]


@effect
def keep_every(run):
    assert run(
        "--keep_every=3", "--keep_last=1", "--checkpoint_interval=1", "--max_iters=8", "--eval_interval=8"
    ).steps == [3, 6, 8]


@effect
def checkpoint_(run: Callable[..., RunFiles], tmp_path: Path):
    done = run("--checkpoint_interval=1", "--keep_last=9")
    named = f"--checkpoint={done.out_dir / 'checkpoints/000003'}"
    assert "000003" in run("--init_from=resume", named, name="branch").console
    assert "000002" in run("--init_from=resume", "--checkpoint=2", "--overwrite", "--max_iters=2").console


@effect
def base_model(run: Callable[..., RunFiles], tmp_path: Path):
    first = run("--max_iters=2", name="a")
    run("--adapter=lora", f"--init_from={first.out_dir}", "--max_iters=2", name="lora")
    first.out_dir.rename(tmp_path / "b")
    with pytest.raises(UserError, match="--base_model"):
        run("--init_from=resume", "--max_iters=3", name="lora")
    resumed = run("--init_from=resume", f"--base_model={tmp_path / 'b'}", "--max_iters=3", name="lora")
    assert resumed.steps[-1] == 3


@effect
def allow_data_change(run, tmp_path, data_dir):
    shutil.copytree(data_dir / "a", tmp_path / "data/a")
    run(f"--data_dir={tmp_path / 'data'}")
    path = tmp_path / "data/a/train.bin"
    path.write_bytes(path.read_bytes()[::-1][1:] + b"\0")
    with pytest.raises(UserError, match="--allow_data_change"):
        run("--init_from=resume", "--max_iters=5")
    assert run("--init_from=resume", "--max_iters=5", "--allow_data_change").steps[-1] == 5


@effect
def spike_skip(run):
    """Above a hundredth of a deviation nearly half of the norms are outliers, after the first 32."""
    flags = ["--max_iters=60", "--eval_interval=100", "--skip_patience=99"]
    assert run(*flags, name="none").train[-1]["skipped"] == 0
    skipped = [line["skipped"] for line in run(*flags, "--spike_skip=0.01", name="often").train]
    assert skipped[31] == 0 and 3 < skipped[-1] < 25


@effect
def skip_patience(run):
    with pytest.raises(SystemExit, match="2 steps in a row were skipped"):
        run("--max_iters=99", "--eval_interval=100", "--spike_skip=1e-6", "--skip_patience=2", "--learning_rate=0")


@effect
def parallel_(run):
    assert "--parallel=fsdp: " in run("--parallel=fsdp").console


def fsdp_options(monkeypatch, *flags: str) -> dict:
    """The options that FSDP2 gets for each module."""
    options_seen = {}
    monkeypatch.setattr(distributed, "init_device_mesh", lambda *shape: None)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, **options: options_seen.update(options))
    args = train_args.parse(["--parallel=fsdp", *flags])
    distributed.apply_fsdp(
        torch.nn.Linear(1, 1),
        [],
        distributed.Ranks(0, 2, torch.device("cpu")),
        dtype=torch.bfloat16,
        reshard_after_forward=args.fsdp_reshard,
        cpu_offload=args.fsdp_offload,
    )
    return options_seen


@effect
def fsdp_reshard(monkeypatch):
    assert fsdp_options(monkeypatch)["reshard_after_forward"] is True
    assert fsdp_options(monkeypatch, "--no-fsdp_reshard")["reshard_after_forward"] is False


@effect
def fsdp_offload(monkeypatch):
    assert type(fsdp_options(monkeypatch)["offload_policy"]).__name__ == "OffloadPolicy"
    assert type(fsdp_options(monkeypatch, "--fsdp_offload")["offload_policy"]).__name__ == "CPUOffloadPolicy"


@effect
def rank_timeout(run, monkeypatch):
    timeouts = []
    original = distributed.join_ranks
    monkeypatch.setattr(
        distributed, "join_ranks", lambda device, timeout: (timeouts.append(timeout), original(device, timeout))[1]
    )
    run("--rank_timeout=7")
    assert timeouts == [7]


# ---------------------------------------------------------------------------------------------------------------------
# examples, objectives and adapters; what each computes is tested in test_examples.py, test_objectives.py,
# test_rollouts.py and test_adapters.py


def dpo(base) -> list[str]:
    return ["--objective=dpo", "--dataset=pairs", f"--init_from={base}", "--eval_samples=0"]


def kto(base) -> list[str]:
    """A step takes all 12 examples, 4 of them desirable; the policy is still the reference: losses in closed form."""
    return [
        "--objective=kto",
        "--dataset=labelled",
        f"--init_from={base}",
        "--eval_samples=0",
        "--batch_size=12",
        "--max_iters=1",
    ]


GRPO = [
    "--objective=grpo",
    "--dataset=sums",
    "--beta=0",
    "--num_generations=2",
    "--max_new_tokens=3",
    "--reward=length",
    "--temperature=3",
    "--eval_samples=0",
]


def sft(base) -> list[str]:
    return ["--objective=sft", "--dataset=sums", f"--init_from={base}", "--eval_samples=0"]


def soft(base, prompt_format: str = "<P*3>{prompt}") -> list[str]:
    return [*sft(base), "--adapter=soft_prompt", f"--prompt_format={prompt_format}", "--block_size=16"]


def write_rows(path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@effect
def task_name(tmp_path, monkeypatch, data_dir):
    monkeypatch.chdir(tmp_path)
    train.main(train_args.parse([*TINY, f"--data_dir={data_dir}", "--dataset=a", "--max_iters=1", "--task_name=detox"]))
    (folder,) = tmp_path.glob("outputs/detox/*")
    assert (folder / "train_config.json").exists() and abs(
        time.mktime(time.strptime(folder.name, "%Y%m%d_%H%M%S")) - time.time()
    ) < 60
    train.main(
        train_args.parse(
            [
                *TINY,
                f"--data_dir={data_dir}",
                "--dataset=a",
                "--max_iters=1",
                "--task_name=detox",
                f"--out_dir={tmp_path / 'mine'}",
            ]
        )
    )
    assert (tmp_path / "mine/train_config.json").exists(), "--out_dir stands"


@effect
def debug(tmp_path, monkeypatch, data_dir):
    monkeypatch.chdir(tmp_path)
    train.main(
        train_args.parse(
            [*TINY, f"--data_dir={data_dir}", "--dataset=a", "--max_iters=1", "--task_name=detox", "--debug"]
        )
    )
    assert (
        len(list(tmp_path.glob("outputs/debug/detox/*/train_config.json"))) == 1
        and not (tmp_path / "outputs/detox").exists()
    )


@effect
def train_file(run, tmp_path, base):
    train, validation = (
        write_rows(tmp_path / f"{name}.jsonl", *[{"prompt": f"{i}+{i}=", "completion": name}] * 4)
        for i, name in ((1, "22"), (4, "9"))
    )
    done = run(
        "--objective=sft",
        f"--init_from={base}",
        f"--train_file={train}",
        f"--validation_file={validation}",
        "--max_iters=20",
        "--learning_rate=0.03",
        "--eval_interval=20",
    )
    assert done.losses[-1] < 0.1 and done.evals[-1]["samples"][0]["completion"] == "22", "what was learned is said"


@effect
def validation_file(run, tmp_path, base):
    one, two = (write_rows(tmp_path / f"{name}.jsonl", {"prompt": "4+4=", "completion": name}) for name in ("8", "99"))
    flags = ["--objective=sft", f"--init_from={base}", f"--train_file={one}", "--max_iters=1"]
    first, second = run(*flags, f"--validation_file={one}", name="1"), run(*flags, f"--validation_file={two}", name="2")
    assert (
        first.losses == second.losses
        and first.evals[0]["val_loss"] == first.evals[0]["train_loss"] < second.evals[0]["val_loss"]
    )


@effect
def overflow(run, base, data_dir):
    """The sums have 6 to 8 tokens."""
    with pytest.raises(UserError, match="longer than 7 tokens, by up to 1"):
        run(*sft(base), "--block_size=7")
    dropped = run(*sft(base), "--block_size=7", "--overflow=drop", name="drop")
    cut = run(*sft(base), "--block_size=7", "--overflow=truncate_target", name="cut")
    rows = [json.loads(line) for line in (data_dir / "sums/train.jsonl").read_text().splitlines()]
    longer = sum(len(row["prompt"] + row["completion"]) + 1 > 7 for row in rows)
    assert longer and f"dropped {longer} examples" in dropped.console
    assert "dropped" not in cut.console
    assert dropped.evals[-1]["epochs"] == pytest.approx(16 / (len(rows) - longer))
    assert cut.evals[-1]["epochs"] == pytest.approx(16 / len(rows))


@effect
def objective(run, base):
    keys = [set(run(*flags, "--max_iters=1", "--block_size=8", name=name).train[0]) for name, flags in
            {"lm": [], "sft": sft(base), "dpo": dpo(base), "kto": kto(base), "grpo": GRPO}.items()]  # fmt: skip
    assert (
        all("loss" in metrics for metrics in keys)
        and "entropy" not in keys[0]
        and all("entropy" in metrics for metrics in keys[1:])
    )
    assert [sum(name in metrics for metrics in keys) for name in ("rewards/accuracies", "kl", "reward")] == [1, 2, 1]


@effect
def loss_on(run, base, tmp_path):
    """With an empty prompt all is completion, but its first token, before which there is nothing."""
    assert run(*sft(base), "--loss_on=all", name="all").losses != run(*sft(base), name="completion").losses
    joined = write_rows(tmp_path / "joined.jsonl", *[{"prompt": "", "completion": "1+1=2"}] * 4)
    split = write_rows(tmp_path / "split.jsonl", *[{"prompt": "1+1=", "completion": "2"}] * 4)
    flags = ["--objective=sft", f"--init_from={base}"]
    losses = [
        run(*flags, f"--train_file={file}", f"--validation_file={file}", f"--loss_on={on}", name=f"{n}").losses
        for n, (file, on) in enumerate(((joined, "completion"), (split, "all"), (split, "completion")))
    ]
    assert losses[0] == losses[1] != losses[2]


@effect
def chat_template(run: Callable[..., RunFiles], base: Path, tmp_path: Path) -> None:
    """One that writes a prompt and a completion makes a chat the same example; a resumed run keeps it."""
    template = tmp_path / "sums.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'result' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    texts = write_rows(tmp_path / "texts.jsonl", *[{"prompt": "1+1=", "completion": "2"}] * 4)
    chat = {"prompt": [{"role": "user", "content": "1+1="}], "completion": [{"role": "result", "content": "2"}]}
    chats = write_rows(tmp_path / "chats.jsonl", *[chat] * 4)
    files = {file: [f"--train_file={file}", f"--validation_file={file}"] for file in (texts, chats)}
    flags = ["--objective=sft", f"--init_from={base}"]
    plain = run(*flags, *files[texts], name="texts")
    with pytest.raises(UserError, match=r"chats\.jsonl:1: completion: .*'result'"):
        run(*flags, *files[chats], name="refused")
    first = run(*flags, *files[chats], f"--chat_template_path={template}", "--max_iters=2", name="chats")
    template.unlink()
    assert first.losses == plain.losses[:2]
    assert run("--init_from=resume", "--max_iters=4", name="chats").losses[-2:] == plain.losses[-2:]


@effect
def chat_template_kwargs(run: Callable[..., RunFiles], base: Path, tmp_path: Path) -> None:
    """A variable that is text before each message."""
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ sign }}{{ m.content }}{% endfor %}")
    rows = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": text}]} for text in "2"]
    rows_with_sign = [
        {"messages": [{**message, "content": "+" + message["content"]} for message in rows[0]["messages"]]}
    ]
    losses = []
    for name, chats, sign in (("a", rows, "+"), ("b", rows_with_sign, ""), ("c", rows, "=")):
        file = write_rows(tmp_path / f"{name}.jsonl", *chats * 4)
        flags = ["--objective=sft", f"--init_from={base}", f"--train_file={file}", f"--validation_file={file}"]
        template = [f"--chat_template={tmp_path}/t.jinja", "--chat_template_kwargs", json.dumps({"sign": sign})]
        losses.append(run(*flags, *template, "--loss_on=all", name=name).losses)
    assert losses[0] == losses[1] != losses[2]


@effect
def packing(run, base):
    """24 tokens of context hold three or four sums of 6 to 8."""
    packed, plain = (
        run(*sft(base), "--packing", "--block_size=24", name="packed"),
        run(*sft(base), "--block_size=24", name="plain"),
    )
    assert (
        packed.progress.tokens > 2.9 * plain.progress.tokens
        and packed.evals[-1]["epochs"] > 2.9 * plain.evals[-1]["epochs"]
    )


@effect
def beta(run, base):
    """At 0 there is nothing to learn: every pair's loss stays log 2."""
    assert run(*dpo(base), "--beta=0", "--learning_rate=0.1", name="0").losses == pytest.approx([math.log(2)] * 4)
    losses = [run(*dpo(base), f"--beta={value}", name=value).losses for value in ("0.1", "0.5")]
    assert losses[0][0] == losses[1][0] and losses[0][1:] != losses[1][1:]


@effect
def disable_dropout(run: Callable[..., RunFiles], base: Path) -> None:
    """Without it, dropout is in the policy alone."""
    flags = [*dpo(base), "--dropout=0.3", "--max_iters=1"]
    off, on = (run(*flags, flag, name=flag[2:]) for flag in ("--disable_dropout", "--no-disable_dropout"))
    assert off.losses == pytest.approx([0.693147], abs=1e-6) and abs(on.losses[0] - 0.693147) > 1e-4


@effect
def reference(run, base, tmp_path, data_dir):
    """Every kind is the initial model; cache keeps its log-probs in the dataset's folder."""
    shutil.copytree(data_dir / "pairs", tmp_path / "data/pairs")
    flags = [*dpo(base), f"--data_dir={tmp_path / 'data'}", "--learning_rate=0.01"]
    n_cached = lambda: len(list((tmp_path / "data/pairs").glob("reference_*.safetensors")))  # noqa: E731
    auto, copied = run(*flags, name="auto"), run(*flags, "--reference=copy", name="copy")
    assert auto.losses == copied.losses and not n_cached()
    assert (
        run(*flags, "--reference=cache", name="cache").losses == pytest.approx(copied.losses, rel=1e-5)
        and n_cached() == 2
    )
    lora = [
        run(*flags, "--adapter=lora", f"--reference={kind}", name=f"lora_{kind}").losses
        for kind in ("auto", "adapter", "copy")
    ]
    assert lora[0] == lora[1] == pytest.approx(lora[2], rel=1e-5)


@effect
def dpo_loss(run, base):
    """In closed form before anything is learned, where all log-ratios are 0."""
    first = {
        "sigmoid": math.log(2),
        "hinge": 1.0,
        "ipo": 25.0,
        "robust": math.log(2),
        "sigmoid_norm": math.log(2),
        "apo_zero": 1.0,
    }
    losses = {
        name: run(
            *dpo(base),
            f"--dpo_loss={name}",
            *(["--label_smoothing=0.1"] if name == "robust" else []),
            "--learning_rate=0.01",
            name=name,
        ).losses
        for name in train_args.DPO_LOSSES
    }
    assert {name: values[0] for name, values in losses.items()} == pytest.approx(first, rel=1e-5) and len(
        {tuple(values) for values in losses.values()}
    ) == 6


@effect
def label_smoothing(run, base):
    losses = [run(*dpo(base), f"--label_smoothing={e}", name=e).losses for e in ("0", "0.4")]
    assert losses[0][0] == losses[1][0] == pytest.approx(math.log(2)) and losses[0][1:] != losses[1][1:]
    with pytest.raises(SystemExit):
        train_args.parse([*dpo(base), "--dpo_loss=hinge", "--label_smoothing=0.1"])


@effect
def desirable_weight(run, base):
    assert run(*kto(base), "--desirable_weight=3").losses == pytest.approx([0.5 * (4 * 3 + 8) / 12], rel=1e-5)
    assert run(*kto(base), "--desirable_weight=auto", name="auto").losses == pytest.approx(
        [0.5 * (4 * 2 + 8) / 12], rel=1e-5
    )


@effect
def undesirable_weight(run, base):
    assert run(*kto(base), "--undesirable_weight=3").losses == pytest.approx([0.5 * (4 + 8 * 3) / 12], rel=1e-5)
    assert run(*kto(base), "--undesirable_weight=auto", name="auto").losses == pytest.approx(
        [0.5 * (4 + 8 * 0.5) / 12], rel=1e-5
    )


@effect
def reward(run, tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(
        "def long(completion, problem, tokens, limit, ended):\n    return tokens / limit\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = run(*GRPO, "--reward=correct:1,length:0.25,odd:long:0.5", "--max_iters=1").train[0]
    assert line["reward"] == pytest.approx(
        line["rewards/correct"] + 0.25 * line["rewards/length"] + 0.5 * line["rewards/odd:long"]
    )
    assert line["rewards/odd:long"] == pytest.approx(line["completions/mean_length"] / 3)


@effect
def num_generations(run):
    """A step's 8 answers are to 4 prompts or to 2, of 110."""
    epochs = [run(*GRPO, "--batch_size=8", f"--num_generations={n}", name=n).evals[-1]["epochs"] for n in ("2", "4")]
    assert epochs == pytest.approx([4 * 4 / 110, 4 * 2 / 110])


@effect
def max_new_tokens(run):
    assert {
        run(*GRPO, "--batch_size=32", "--temperature=99", f"--max_new_tokens={n}", "--max_iters=1", name=n).train[0][
            "completions/max_length"
        ]
        for n in ("1", "2")
    } == {1, 2}


@effect
def temperature(run, base):
    """A high one draws, and learns from, a nearly uniform distribution."""
    flags = [*GRPO, f"--init_from={base}", "--max_iters=1"]
    cold, hot = (run(*flags, f"--temperature={t}", name=t).train[0] for t in ("0.5", "1000"))
    assert (
        cold["entropy"] < 1
        and hot["entropy"] == pytest.approx(math.log(13), abs=1e-3)
        and max(cold["rollout_logp_error"], hot["rollout_logp_error"]) < 1e-4
    )


@effect
def top_k(run):
    greedy, free = (
        run(*GRPO, "--batch_size=32", "--num_generations=8", "--max_iters=1", f"--top_k={k}", name=k).train[0]
        for k in ("1", "0")
    )
    assert greedy["frac_reward_zero_std"] == 1 > free["frac_reward_zero_std"]


@effect
def top_p(run):
    greedy, free = (
        run(*GRPO, "--batch_size=32", "--num_generations=8", "--max_iters=1", f"--top_p={p}", name=p).train[0]
        for p in ("1e-6", "1")
    )
    assert greedy["frac_reward_zero_std"] == 1 > free["frac_reward_zero_std"]


@effect
def num_iterations(run):
    hashes = {
        n: [line["data_hash"] for line in run(*GRPO, f"--num_iterations={n}", "--log_data_hash", name=n).train]
        for n in ("1", "2")
    }
    assert len(set(hashes["1"])) == 4 and hashes["2"][0] == hashes["2"][1] != hashes["2"][2] == hashes["2"][3]
    assert hashes["2"][0] == hashes["1"][0]


def grpo_losses(run, flag: str, *values: str, more: tuple = ()) -> list[tuple]:
    """Losses and gradients' norms with each value of a flag, the second step being one more on the same answers."""
    flags = [
        *GRPO,
        "--batch_size=8",
        "--gradient_accumulation_steps=2",
        "--num_iterations=2",
        "--learning_rate=0.05",
        "--max_iters=2",
        *more,
    ]
    return [
        tuple((line["loss"], line["grad_norm"]) for line in run(*flags, f"{flag}={value}", name=value).train)
        for value in values
    ]


@effect
def loss_type(run):
    assert len(set(grpo_losses(run, "--loss_type", "grpo", "bnpo", "dr_grpo", "dapo"))) == 4


@effect
def scale_rewards(run):
    assert len(set(grpo_losses(run, "--scale_rewards", "group", "batch", "none"))) == 3


@effect
def importance_sampling_level(run):
    token, sequence = grpo_losses(run, "--importance_sampling_level", "token", "sequence")
    assert token[0] == pytest.approx(sequence[0]) and token[1] != pytest.approx(sequence[1])


@effect
def epsilon(run):
    """At 1 no ratio is too low."""
    flags = [
        *GRPO,
        "--batch_size=16",
        "--num_iterations=2",
        "--learning_rate=0.05",
        "--max_iters=2",
        "--epsilon_high=99",
    ]
    narrow, wide = (run(*flags, f"--epsilon={e}", name=e).train[1] for e in ("1e-6", "1"))
    assert (
        narrow["clip_ratio/low"] > 0 == wide["clip_ratio/low"]
        and narrow["clip_ratio/high"] == wide["clip_ratio/high"] == 0
    )


@effect
def epsilon_high(run):
    flags = [*GRPO, "--batch_size=16", "--num_iterations=2", "--learning_rate=0.05", "--max_iters=2", "--epsilon=1"]
    narrow, wide = (run(*flags, f"--epsilon_high={e}", name=e).train[1] for e in ("1e-6", "99"))
    assert narrow["clip_ratio/high"] > 0 == wide["clip_ratio/high"]


@effect
def mask_truncated(run, tmp_path, monkeypatch):
    """Hardly an answer of one token ends; the others teach nothing."""
    (tmp_path / "even.py").write_text(
        "def even(completion, problem, tokens, limit, ended):\n    return float(completion[:1] in '02468')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = [
        *GRPO,
        "--reward=even:even",
        "--max_new_tokens=1",
        "--num_generations=8",
        "--batch_size=8",
        "--max_iters=1",
        "--seed=3",
    ]
    masked, plain = (run(*flags, f"--mask_truncated={on}", name=on).train[0] for on in ("true", "false"))
    assert masked["completions/clipped_ratio"] == plain["completions/clipped_ratio"] == 1
    assert masked["grad_norm"] == 0 < plain["grad_norm"]


@effect
def eval_samples(run, base):
    flags = [flag for flag in sft(base) if "eval_samples" not in flag]
    assert [
        len(run(*flags, f"--eval_samples={n}", "--max_iters=1", name=n).evals[0].get("samples", [])) for n in ("0", "2")
    ] == [0, 2]


@effect
def adapter(run, base):
    assert {
        name.rpartition(".")[2] for name in shapes(run(*sft(base), "--adapter=lora", "--max_iters=1", name="lora"))
    } == {"lora_A", "lora_B"}
    assert shapes(run(*soft(base), "--max_iters=1", name="soft")) == {"wte.prompt.rows": (3, 16)}


@effect
def base_dtype(run: Callable, base: Path):
    """The base's values are rounded, and the adapter's are not (tests/models/test_base_dtype.py)."""
    flags = [*sft(base), "--adapter=lora", "--max_iters=1"]
    whole, half = (run(*flags, f"--base_dtype={dtype}", name=dtype) for dtype in ("float32", "bfloat16"))
    assert whole.losses != half.losses and whole.losses == pytest.approx(half.losses, abs=0.05)
    assert "the base in bfloat16" in half.console
    assert {tensor.dtype for tensor in half.last.weights.values()} == {torch.float32}


@effect
def quantize_base(run: Callable, base: Path):
    """Losses of other weights, near by (tests/models/test_quantized.py has them exactly), and of as many. What 4 bits
    cost depends on what the base has learned, which is not the same on each machine."""
    pytest.importorskip("bitsandbytes")
    flags = [*sft(base), "--adapter=lora", "--max_iters=1"]
    done = {name: run(*flags, f"--quantize_base={name}", name=name) for name in ("none", "int8", "nf4")}
    losses = [lines.evals[0]["val_loss"] for lines in done.values()]
    assert len(set(losses)) == 3 and losses == pytest.approx([losses[0]] * 3, abs=0.2)
    counts = [re.search(r"([\d.]+) M parameters", lines.console)[1] for lines in done.values()]
    assert len(set(counts)) == 1


@effect
def lora_rank(run, base):
    assert shapes(run(*sft(base), "--adapter=lora", "--lora_rank=3", "--max_iters=1"))["blocks.0.attn.qkv.lora_A"] == (
        3,
        16,
    )


@effect
def lora_alpha(run, base):
    """The gradient of B is proportional to it."""
    norms = [
        run(*sft(base), "--adapter=lora", f"--lora_alpha={alpha}", "--max_iters=1", name=alpha).train[0]["grad_norm"]
        for alpha in ("4", "12")
    ]
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-4)


@effect
def lora_dropout(run, base):
    """B is 0 at first, so that only the gradient differs."""
    flags = [*sft(base), "--adapter=lora", "--learning_rate=0.1", "--eval_interval=9"]
    none, much = (run(*flags, f"--lora_dropout={p}", name=p) for p in ("0", "0.9"))
    assert (
        none.losses[0] == much.losses[0]
        and none.losses[1:] != much.losses[1:]
        and none.evals[0]["val_loss"] == much.evals[0]["val_loss"]
    )


@effect
def lora_targets(run, base):
    done = run(*sft(base), "--adapter=lora", "--lora_targets", "attn.qkv", "up", "--max_iters=1")
    assert set(shapes(done)) == {
        f"blocks.{i}.{name}.lora_{ab}" for i in range(2) for name in ("attn.qkv", "mlp.up") for ab in "AB"
    }


@effect
def prompt_format(run, base):
    assert shapes(run(*soft(base, "<P*2>{prompt}<P>1+1</P>"), "--max_iters=1"))["wte.prompt.rows"] == (5, 16)


@effect
def prompt_provider(run, base):
    lstm, tensor = (
        run(*soft(base), f"--prompt_provider={name}", "--learning_rate=0.01", name=name) for name in ("lstm", "tensor")
    )
    assert (
        "wte.prompt.lstm.weight_ih_l0" in shapes(lstm)
        and lstm.losses[0] == tensor.losses[0]
        and lstm.losses[1:] != tensor.losses[1:]
    )


@effect
def prompt_init(run, base):
    """Distinct rows of the embedding, or none of them but of their size."""
    embedding = pretrained.load(str(base)).weights["wte.weight"]
    vocab, normal = (
        run(*soft(base, "<P*8>{prompt}"), f"--prompt_init={name}", "--max_iters=0", name=name).last.weights[
            "wte.prompt.rows"
        ]
        for name in ("vocab", "normal")
    )
    nearest = lambda rows: (rows[:, None] - embedding).norm(dim=-1).min(1)  # noqa: E731
    assert nearest(vocab).values.max() == 0 and len(set(nearest(vocab).indices.tolist())) == 8
    assert nearest(normal).values.min() > 0 and float(normal.std()) == pytest.approx(float(embedding.std()), rel=0.3)


@effect
def target_field(run, base, tmp_path):
    """The same as a completion of that text."""
    both, one = (
        write_rows(tmp_path / f"{n}.jsonl", *[row] * 4)
        for n, row in enumerate(({"sum": "1+1=", "good": "2", "bad": "9+9"}, {"sum": "1+1=", "completion": "9+9"}))
    )
    flags = [*soft(base, "<P*3>{sum}"), "--eval_samples=1", "--max_iters=2"]
    good, bad, plain = (
        run(*flags, f"--train_file={file}", f"--validation_file={file}", *target, name=f"{n}").losses
        for n, (file, target) in enumerate(((both, ["--target_field=good"]), (both, ["--target_field=bad"]), (one, [])))
    )
    assert good != bad == plain


@effect
def truncation_field(run, base, tmp_path):
    """Cut to its first 5 characters, the example is one that has no more."""
    long, short = (
        write_rows(tmp_path / f"{len(text)}.jsonl", *[{"sum": text, "completion": "2"}] * 4)
        for text in ("1+1+1+1+1+1+1=", "1+1+1")
    )
    flags = [*soft(base, "<P*3>{sum}="), "--max_tokens=11"]
    with pytest.raises(UserError, match="exceeds"):
        run(*flags, f"--train_file={long}", f"--validation_file={long}")
    losses = [
        run(*flags, f"--train_file={file}", f"--validation_file={file}", "--truncation_field=sum", name=f"{n}").losses
        for n, file in enumerate((long, short))
    ]
    assert losses[0] == losses[1]
