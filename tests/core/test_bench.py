"""bench.py: its arithmetic against closed forms, and its sections end to end with tiny shapes and a peer made of a few lines."""

import json
import sys

import pytest
import torch
from helpers import run_script

import bench
from model import GPT, GPTConfig

PEER = """
import sys, torch
options = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
for i in range(int(options["max_iters"]) + 1):
    print(f"iter {i}: loss 4.{i}, time {1000 if i < 3 else 80 + i}.50ms, mfu 1%")
"""


@pytest.fixture
def peer(tmp_path, data_dir):
    """A folder that looks like nanoGPT's checkout, with the dataset beside it."""
    folder = tmp_path / "peer"
    (folder / "data" / "shakespeare_char").mkdir(parents=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        (folder / "data" / "shakespeare_char" / name).write_bytes((data_dir / "a" / name).read_bytes())
    (folder / "data" / "shakespeare_char" / "meta.pkl").touch()
    (folder / "train.py").write_text(PEER)
    (folder / "sample.py").touch()
    return folder


def test_figures_and_ratios():
    runs = {"ours": [{"ms": 2.0}, {"ms": 4.0}, {"ms": 3.0}], "peer": [{"ms": 4.0}, {"ms": 4.0}, {"ms": 9.0}]}
    told = bench.compare(runs, "ms", faster_is_less=True)
    assert told["ours"] == {"min": 2.0, "median": 3.0, "max": 4.0, "n": 3, "ratios": [2.0, 1.0, 3.0], "ratio": 2.0}
    assert (
        bench.compare(runs, "ms", faster_is_less=False)["ours"]["ratios"] == [0.5, 1.0, 0.333]
        and "ratio" not in told["peer"]
    )


def test_sides_take_turns():
    order = []
    bench.in_turn(3, {"a": lambda: order.append("a") or {}, "b": lambda: order.append("b") or {}})
    assert order == list("ababab")


def test_the_memory_of_a_process_is_its_own():
    """Not that of the one which measures, nor less than what it holds."""
    here = bytearray(300 * 2**20)
    empty, full = (
        bench.shell([sys.executable, "-c", f"held = bytearray({mb} * 2**20)"])["peak_bytes"] / 2**20 for mb in (0, 100)
    )
    assert 0 < empty < 60 and 100 < full < 160 and len(here)


def test_held_out_loss_reads_every_token_once(tmp_path):
    """A model that knows nothing loses log V on each; one that is sure of the next token of a cycle loses nothing."""
    import numpy as np

    (np.arange(100) % 7).astype(np.uint16).tofile(tmp_path / "val.bin")
    model = GPT(
        GPTConfig(
            vocab_sizes=(7,),
            block_size=8,
            n_layer=1,
            n_head=1,
            n_embd=8,
            bias=False,
            tie_weights=False,
            zero_init=True,
            position="none",
        )
    )
    assert bench.held_out_loss(model, tmp_path / "val.bin", 8) == pytest.approx(
        torch.tensor(7.0).log().item(), rel=1e-6
    )
    with torch.no_grad():
        model.wte.weight.copy_(torch.eye(7, 8) * 100)
        model.head.weight.copy_(torch.eye(7, 8).roll(1, 0) * 100)
    assert bench.held_out_loss(model, tmp_path / "val.bin", 8) < 1e-6 and model.training


def test_training_in_turn_with_a_peer(peer, tmp_path):
    done = run_script(
        "train",
        f"--peer={peer}",
        "--cases=tiny",
        "--pairs=2",
        "--steps=8",
        "--device=cpu",
        f"--out={tmp_path}/results",
        script="bench.py",
    )
    results = json.loads((tmp_path / "results" / "cpu.json").read_text())
    tiny = results["train"]["tiny"]
    assert tiny["ms"]["peer"]["median"] == 86.5, "the first four of nine are left out"
    ours = tiny["ms"]["ours float32"]
    assert (
        ours["n"] == len(ours["ratios"]) == 2
        and ours["ratio"] == pytest.approx(86.5 / ours["median"], rel=0.5)
        and "ratio" in done.stdout
    )
    assert sum(tiny["parts"].values()) == pytest.approx(1.0) and set(tiny["parts"]) == {
        "data",
        "forward",
        "backward",
        "optimizer",
        "logging",
    }
    share = tiny["of peak, ours float32"]
    assert (
        share["utilisation"] == pytest.approx(share["flops"] / share["measured_peak_flops"])
        and results["train"]["about"]["torch"] == torch.__version__
    )
    again = run_script(
        "startup",
        "--pairs=1",
        "--device=cpu",
        f"--data_dir={peer}/data",
        f"--out={tmp_path}/results",
        script="bench.py",
    )
    assert json.loads((tmp_path / "results" / "cpu.json").read_text()).keys() == {"device", "train", "startup"}, (
        again.stdout
    )


def test_sampling_in_turn_with_transformers(peer, tmp_path):
    pytest.importorskip("transformers")
    run_script(
        "sample",
        "--peer_kind=hf",
        "--cases=small",
        "--pairs=1",
        "--device=cpu",
        f"--data_dir={peer}/data",
        f"--out={tmp_path}",
        script="bench.py",
    )
    told = json.loads((tmp_path / "cpu.json").read_text())["sample (hf)"]
    assert told["batch of 16"]["ours"]["ratio"] > 0 and "peer" not in told["past the block"]


def test_mistakes_are_told_in_a_line(tmp_path):
    for argv, words in (
        (["run"], "no such section"),
        (["train", f"--peer={tmp_path}"], "no train.py there"),
        (["train", "--cases=huge"], "no huge"),
        (["race", "--device=cpu"], "needs --peer"),
    ):
        done = run_script(*argv, script="bench.py", check=False)
        assert done.returncode == 2 and words in done.stderr, done.stderr
