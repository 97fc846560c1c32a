"""The dial for the size: what follows from a depth, and that what is given stands."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_args
from nanoforge.report import scaling
from nanoforge.training.depth import derive_args


def turned(depth: int, *flags: str):
    return train_args.parse(["configs/depth.py", f"--depth={depth}", *flags])


@given(
    depth=st.integers(1, 48),
    aspect=st.integers(8, 128),
    ratio=st.floats(1, 200),
    block=st.sampled_from([64, 128, 1000, 4096]),
)
def test_what_follows_is_a_run_of_the_tokens_asked_for(depth, aspect, ratio, block):
    values = derive_args(depth, aspect, ratio, block, {})
    assert (
        values["n_layer"] == depth
        and values["n_embd"] % values["n_head"] == 0
        and values["n_embd"] // values["n_head"] in (32, 64, 128)
    )
    assert depth * aspect <= values["n_embd"] < depth * aspect + 128
    rows = values["batch_size"] * values["gradient_accumulation_steps"]
    assert math.log2(rows).is_integer() and (values["batch_size"] * block <= 65536 or values["batch_size"] == 1)
    tokens = ratio * 12 * depth * values["n_embd"] ** 2
    assert values["max_iters"] == values["lr_decay_iters"] == max(1, round(tokens / (rows * block)))


def test_the_weights_that_tokens_are_counted_by_are_those_of_the_blocks():
    shape = {
        "n_embd": 96,
        "n_layer": 3,
        "n_head": 3,
        "n_kv_head": 0,
        "mlp_ratio": 4.0,
        "mlp": "plain",
        "vocab_sizes": [0],
    }
    values = derive_args(3, 32, 10, 100, {"batch_size": 1, "gradient_accumulation_steps": 1})
    assert values["max_iters"] == round(10 * scaling.matrices(shape) / 100)


def test_the_rules_meet_the_recipe_for_gpt2s_size():
    """configs/gpt2_124m_modern.py, for 14 tokens a weight."""
    values = derive_args(12, 64, 14, 1024, {})
    assert (values["n_layer"], values["n_embd"], values["n_head"]) == (12, 768, 6) and values["batch_size"] * values[
        "gradient_accumulation_steps"
    ] * 1024 == 2**19
    assert values["muon_learning_rate"] == pytest.approx(0.02, rel=0.05) and values[
        "muon_weight_decay"
    ] == pytest.approx(0.05, rel=0.02)


def test_rates_follow_the_root_of_a_batch_that_is_not_the_rules_and_of_the_width():
    ruled = derive_args(4, 32, 10, 128, {})
    rows = ruled["batch_size"] * ruled["gradient_accumulation_steps"]
    for times in (0.25, 4):
        other = derive_args(4, 32, 10, 128, {"batch_size": int(rows * times), "gradient_accumulation_steps": 1})
        for name in ("learning_rate", "muon_learning_rate"):
            assert other[name] / ruled[name] == pytest.approx(times**0.5, rel=0.01)
    assert derive_args(3, 128, 10, 128, {})["learning_rate"] / derive_args(3, 32, 10, 128, {})[
        "learning_rate"
    ] == pytest.approx(0.5, rel=0.01)


def test_what_is_given_stands_and_the_others_follow_from_it(tmp_path, capsys):
    plain, wide = turned(4), turned(4, "--n_embd=512", "--batch_size=8", "--learning_rate=0.5")
    assert (wide.n_layer, wide.n_embd, wide.batch_size, wide.learning_rate) == (
        4,
        512,
        8,
        0.5,
    ) and wide.n_head == 512 // 64
    assert wide.max_iters * wide.batch_size * wide.gradient_accumulation_steps * wide.block_size == pytest.approx(
        plain.tokens_per_weight * 12 * 4 * 512**2, rel=0.01
    )
    told = capsys.readouterr().err
    assert f"--depth=4 gives --n_layer=4 --n_embd={plain.n_embd}" in told and "--n_embd=512" not in told
    (tmp_path / "c.py").write_text("n_embd = 64\n")
    assert turned(4, str(tmp_path / "c.py")).n_embd == 64
    with pytest.raises(SystemExit):
        turned(4, "--optimizer=adamw")
    assert "--optimizer=muon" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        turned(4, "--n_embd=100")
    assert "--n_embd=100: must be divisible by --n_head" in capsys.readouterr().err
