"""What follows from --depth, and that explicit arguments stay."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_args
from model import GPT, GPTConfig
from nanoforge.training.depth import derive_args
from train_args import TrainArgs


def parse(depth: int, *flags: str) -> TrainArgs:
    return train_args.parse(["configs/depth.py", f"--depth={depth}", *flags])


def batch_rows(values: dict) -> int:
    return values["batch_size"] * values["gradient_accumulation_steps"]


@given(
    depth=st.integers(1, 48),
    aspect=st.integers(8, 128),
    tokens_per_weight=st.floats(1, 200),
    block_size=st.sampled_from([64, 128, 1000, 4096]),
)
def test_the_run_has_the_tokens_asked_for(depth, aspect, tokens_per_weight, block_size):
    values = derive_args(depth, aspect, tokens_per_weight, block_size, {})
    width, heads, rows = values["n_embd"], values["n_head"], batch_rows(values)
    assert values["n_layer"] == depth
    assert depth * aspect <= width < depth * aspect + 128
    assert width % heads == 0 and width // heads in (32, 64, 128)
    assert math.log2(rows).is_integer()
    assert values["batch_size"] * block_size <= 65536 or values["batch_size"] == 1
    tokens = tokens_per_weight * 12 * depth * width**2
    assert values["max_iters"] == values["lr_decay_iters"] == max(1, round(tokens / (rows * block_size)))


def test_the_weights_that_tokens_are_counted_by_are_those_of_the_blocks():
    model = GPT(GPTConfig(vocab_sizes=(1,), n_layer=3, n_head=3, n_embd=96))
    weights = sum(parameter.numel() for parameter in model.blocks.parameters() if parameter.ndim == 2)
    values = derive_args(3, 32, 10, 100, {"batch_size": 1, "gradient_accumulation_steps": 1})
    assert values["max_iters"] == round(10 * weights / 100)


def test_the_rules_meet_the_recipe_for_gpt2s_size():
    """configs/gpt2_124m_modern.py, for 14 tokens a weight."""
    values = derive_args(12, 64, 14, 1024, {})
    assert (values["n_layer"], values["n_embd"], values["n_head"]) == (12, 768, 6)
    assert batch_rows(values) * 1024 == 2**19
    assert values["muon_learning_rate"] == pytest.approx(0.02, rel=0.05)
    assert values["muon_weight_decay"] == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize("name", ["learning_rate", "muon_learning_rate"])
@pytest.mark.parametrize("ratio", [0.25, 4])
def test_learning_rates_follow_the_root_of_an_explicit_batch(name, ratio):
    by_rule = derive_args(4, 32, 10, 128, {})
    batch = {"batch_size": int(batch_rows(by_rule) * ratio), "gradient_accumulation_steps": 1}
    assert derive_args(4, 32, 10, 128, batch)[name] / by_rule[name] == pytest.approx(ratio**0.5, rel=0.01)


def test_the_learning_rate_falls_with_the_root_of_the_width():
    narrow, wide = derive_args(3, 32, 10, 128, {}), derive_args(3, 128, 10, 128, {})
    assert wide["learning_rate"] / narrow["learning_rate"] == pytest.approx(0.5, rel=0.01)


def test_explicit_arguments_stay_and_the_others_follow_from_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    by_rule = parse(4)
    args = parse(4, "--n_embd=512", "--batch_size=8", "--learning_rate=0.5")
    assert (args.n_layer, args.n_embd, args.batch_size, args.learning_rate) == (4, 512, 8, 0.5)
    assert args.n_head == 512 // 64
    tokens = args.max_iters * args.global_batch_size * args.block_size
    assert tokens == pytest.approx(by_rule.tokens_per_weight * 12 * 4 * 512**2, rel=0.01)

    message = capsys.readouterr().err
    assert f"--depth=4 gives --n_layer=4 --n_embd={by_rule.n_embd}" in message
    assert "--n_embd=512" not in message

    (tmp_path / "c.py").write_text("n_embd = 64\n")
    assert parse(4, str(tmp_path / "c.py")).n_embd == 64


@pytest.mark.parametrize("width", [*range(8, 400, 8), 1000, 1001, 997])
def test_heads_divide_any_explicit_width(width: int):
    """Where it is even, into even parts, as rotary embeddings need; near the rule's size where there is one near."""
    n_head = derive_args(12, 64, 20, 1024, {"n_embd": width})["n_head"]
    assert width % n_head == 0
    assert width % 2 or width // n_head % 2 == 0
    if width % 32 == 0:
        assert width // n_head == (32 if width < 256 else 64 if width % 64 == 0 else width // n_head)
    grouped = derive_args(12, 64, 20, 1024, {"n_embd": width * 12, "n_kv_head": 6})
    assert grouped["n_head"] % 6 == 0 == width * 12 % grouped["n_head"]


def test_explicit_heads_and_widths_make_a_model():
    assert parse(12, "--n_embd=1000").n_head == 10
    args = parse(12, "--n_head=10")
    assert args.n_embd % 10 == 0 and 0 <= args.n_embd - 12 * 64 < 80
    assert parse(12, "--n_kv_head=4").n_head % 4 == 0
    for fixed in ({"n_embd": 100}, {"n_head": 3}, {"n_kv_head": 2}):
        values = derive_args(2, 32, 20, 64, fixed) | fixed
        shape = {name: values[name] for name in ("n_layer", "n_embd", "n_head")}
        GPT(GPTConfig(vocab_sizes=(9,), position="rope", n_kv_head=fixed.get("n_kv_head", 0), **shape))


def test_an_explicit_accumulation_is_filled_by_the_micro_batch():
    assert batch_rows(derive_args(12, 64, 20, 1024, {"gradient_accumulation_steps": 32})) == 512
    by_rule = derive_args(4, 32, 10, 128, {})
    halves = derive_args(4, 32, 10, 128, {"gradient_accumulation_steps": 2})
    assert by_rule["gradient_accumulation_steps"] == 1 and halves["batch_size"] * 2 == by_rule["batch_size"]
    rates = ("max_iters", "learning_rate", "muon_learning_rate")
    assert [halves[name] for name in rates] == [by_rule[name] for name in rates]


def test_rates_follow_the_tokens_that_an_explicit_length_reads():
    by_rule = derive_args(12, 64, 20, 1024, {})
    short = derive_args(12, 64, 20, 1024, {"max_iters": 100})
    tokens = 100 * batch_rows(short) * 1024
    assert batch_rows(short) == batch_rows(by_rule) and short["lr_decay_iters"] == 100
    assert short["muon_learning_rate"] == pytest.approx(0.04 * (tokens / 3.3e6) ** -0.12, rel=0.005)
    assert short["muon_weight_decay"] == pytest.approx(0.05 * tokens / 1.2e9, rel=0.005)
    assert derive_args(12, 64, 20, 1024, {"max_iters": by_rule["max_iters"]}) == by_rule

    weights = 12 * 12 * 768**2
    bounded = derive_args(12, 64, 20, 1024, {"max_tokens": 14 * weights})
    assert bounded == derive_args(12, 64, 14, 1024, {})


@pytest.mark.parametrize("flag, message", [("--optimizer=adamw", "--optimizer=muon"), ("--n_embd=997", "head_dim")])
def test_arguments_that_do_not_fit_a_depth_are_refused(flag, message, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(4, flag)
    assert message in capsys.readouterr().err
