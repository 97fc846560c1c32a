"""Grids become the runs they describe, errors are reported before the first run, no run is lost or repeated.

Where only starting and stopping matters, a stand-in for train.py trains: it takes the arguments, logs metrics and obeys
signals, in 0.1 s.
"""

import ast
import csv
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, TINY, equal_tensors, read_run, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sweep
import train_args
from nanoforge import console
from nanoforge.data.hub_datasets import HubDataset
from nanoforge.errors import UserError
from nanoforge.sweeps import grid, grid_file, hf_keys, hf_other_keys, local, slurm, summary

BASE = "\n".join(
    flag.removeprefix("--").replace("=", ": ", 1)
    for flag in TINY
    if not flag.startswith(("--max_iters", "--eval_interval"))
)


@pytest.fixture
def run_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """run_sweep("--flag", yaml="lines of a grid") runs the command in this process: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.yaml").write_text("")

    def run_sweep(*argv: str, yaml: str | None = None):
        if yaml is not None:
            (tmp_path / "g.yaml").write_text(yaml)
        with pytest.raises(SystemExit) as end:
            sweep.command([*(["g.yaml"] if (tmp_path / "g.yaml").read_text() else []), *argv])
        return end.value.code, *capsys.readouterr()

    return run_sweep


def run_names(out: str) -> list[str]:
    """The runs of a printed table."""
    return re.findall(r"\S+=\S+-[0-9a-f]{6}$", out, re.MULTILINE)


def results(folder: Path = Path("o")) -> list[dict[str, str]]:
    """The rows of results.csv."""
    return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


def varying(run_sweep: Callable[..., Any], yaml: str, *argv: str) -> list[dict[str, str]]:
    """What varies in the runs of a grid, as results.csv has it."""
    code, _, err = run_sweep("--collect", "--out_dir=o", *argv, yaml=yaml)
    assert code == 0, err
    status_columns = {"state", *summary.NUMBERS, "run"}
    return [{name: value for name, value in row.items() if name not in status_columns} for row in results()]


def points_of(spec: dict) -> list[grid.Point]:
    """All points of a grid without errors."""
    space, errors = grid.parse_grid(spec, sweep.argument_types(spec))
    assert not errors, errors
    points, errors = grid.product(space, sweep.canonical)
    assert not errors, errors
    return points


# ---------------------------------------------------------------------------------------------------------------------
# grids


def test_a_grid_is_the_product_of_its_lists(run_sweep: Callable[..., Any]):
    yaml = "learning_rate: [1e-5, 0.0003]\noptimizer: [adamw, muon, lion]\nn_layer: 2\n"
    expected = [
        {"learning_rate": rate, "optimizer": name}
        for rate, name in itertools.product(["1e-05", "0.0003"], ["adamw", "muon", "lion"])
    ]
    assert varying(run_sweep, yaml) == expected
    assert varying(run_sweep, "", "--learning_rate=1e-5,3e-4", "--optimizer=adamw,muon,lion", "--n_layer=2") == expected
    assert varying(run_sweep, yaml, "--optimizer=adamw", "--n_layer=1,2")[:2] == [
        {"learning_rate": "1e-05", "n_layer": "1"},
        {"learning_rate": "1e-05", "n_layer": "2"},
    ]


def test_zip_groups_exclude_seeds_and_base(run_sweep: Callable[..., Any], tmp_path: Path):
    (tmp_path / "a.py").write_text("n_layer = 3\nweight_decay = 0.5\nbeta1 = 0.8\n")
    yaml = """
base: a.py
weight_decay: 0.25
zip: {n_embd: [64, 128], n_head: [2, 4]}
groups:
  small: {n_layer: 2}
  large: {n_layer: 4, dropout: [0, 0.1]}
exclude:
- {n_embd: 128, dropout: 0.1}
- {group: small, n_embd: [64, 100]}
seeds: 2
"""
    rows = varying(run_sweep, yaml)
    assert list(rows[0]) == ["n_embd", "n_head", "group", "dropout", "seed"]
    assert [tuple(row.values()) for row in rows] == [
        ("64", "2", "large", "0.0", "1337"),
        ("64", "2", "large", "0.0", "1338"),
        ("64", "2", "large", "0.1", "1337"),
        ("64", "2", "large", "0.1", "1338"),
        ("128", "4", "small", "", "1337"),
        ("128", "4", "small", "", "1338"),
        ("128", "4", "large", "0.0", "1337"),
        ("128", "4", "large", "0.0", "1338"),
    ]
    request, errors = sweep.read_request(["g.yaml"])
    runs = sweep.Planner(request).plan_runs(points_of(request.spec))
    assert not errors and {(run.effective["weight_decay"], run.effective["beta1"]) for run in runs} == {(0.25, 0.8)}
    assert {run.effective["n_layer"] for run in runs if run.varying["group"] == "large"} == {4}


@pytest.mark.parametrize(
    ("yaml", "argv", "seeds"),
    [
        ("seeds: 3\n", [], [1337, 1338, 1339]),
        ("seeds: 3\nseed: 7\n", [], [7, 8, 9]),
        ("seeds: 3\n", ["--seed=7"], [7, 8, 9]),
        ("seeds: 3\nseed: 5\n", ["--seed", "7"], [7, 8, 9]),
        ("seeds: 2\nbase: a.py\n", [], [21, 22]),
        ("seeds: 2\nbase: a.py\n", ["--seed=1e3"], [1000, 1001]),
        ("seeds: [1, 2]\n", [], [1, 2]),
        ("seeds: [1, 2]\n", ["--seed=7"], []),
        ("seeds: 3\n", ["--seed=4,9"], [4, 9]),
        ("seed: [1, 2]\n", ["--seed=7"], []),
    ],
)
def test_the_command_lines_seed_is_the_first_of_a_number_of_seeds(
    run_sweep: Callable[..., Any], tmp_path: Path, yaml: str, argv: list[str], seeds: list[int]
):
    (tmp_path / "a.py").write_text("seed = 21\n")
    rows = varying(run_sweep, yaml, *argv)
    assert [int(row["seed"]) for row in rows if row] == seeds and len(rows) == max(1, len(seeds))
    request, _ = sweep.read_request(["g.yaml", *argv])
    space, _ = grid.parse_grid(request.spec, sweep.argument_types(request.spec, request.base_configs))
    points, _ = grid.product(space, sweep.canonical)
    assert [run.effective["seed"] for run in sweep.Planner(request).plan_runs(points)] == (seeds or [7])


def test_list_valued_arguments_take_lists_of_lists(run_sweep: Callable[..., Any]):
    head = "training_mode: multidataset\n"
    assert len(varying(run_sweep, head + "dataset_list: [a, b]\nn_layer: [1, 2]\n")) == 2
    assert varying(run_sweep, head + "dataset_list: [[a, b], [a, c]]\n") == [
        {"dataset_list": "a+b"},
        {"dataset_list": "a+c"},
    ]
    assert varying(run_sweep, head, "--dataset_list=[[a, b], [a, c]]") == [
        {"dataset_list": "a+b"},
        {"dataset_list": "a+c"},
    ]
    assert varying(run_sweep, 'optimizer_kwargs: [{"eps": 1e-8}, {"eps": 1e-10}]\n') == [
        {"optimizer_kwargs": "eps=1e-8"},
        {"optimizer_kwargs": "eps=1e-10"},
    ]


def test_scalars_of_yaml_are_what_they_look_like(tmp_path: Path):
    """PyYAML alone reads the same lines by YAML 1.1, which is the witness that this is needed."""
    import yaml

    text = (
        "a: 1e-5\nb: 2:00:00\nc: 010\nd: yes\ne: 2024-01-01\nf: None\ng: 1_000\nh: true\ni: ~\nj: -1.5E+3\n"
        "k: .5\nl: 'None'\nn: 0x10\n"
    )
    typed, as_text = grid_file.read_yaml(text, "x")
    assert typed == {
        "a": 1e-5,
        "b": "2:00:00",
        "c": 10,
        "d": "yes",
        "e": "2024-01-01",
        "f": None,
        "g": 1000,
        "h": True,
        "i": None,
        "j": -1500.0,
        "k": 0.5,
        "l": "None",
        "n": "0x10",
    }
    assert as_text == {
        "a": "1e-5",
        "b": "2:00:00",
        "c": "010",
        "d": "yes",
        "e": "2024-01-01",
        "f": None,
        "g": "1_000",
        "h": "true",
        "i": None,
        "j": "-1.5E+3",
        "k": ".5",
        "l": "None",
        "n": "0x10",
    }
    yaml_1_1 = yaml.safe_load(text)
    assert yaml_1_1["a"] == "1e-5" and yaml_1_1["b"] == 7200 and yaml_1_1["c"] == 8 and yaml_1_1["d"] is True
    with pytest.raises(UserError, match=r"x: .*line 3: duplicate key: a\b"):
        grid_file.read_yaml("b: 1\nd:\n  a: 1\n  a: 2\n", "x")


# ---------------------------------------------------------------------------------------------------------------------
# errors


def test_all_errors_of_all_runs_are_reported_before_anything_is_written(run_sweep: Callable[..., Any], tmp_path: Path):
    yaml = """
lerning_rate: 1
learning_rate: []
n_head: [2, 5]
n_embd: 64
batch_size: [4, 0]
optimizer: [adamw, muo]
out_dir: [a, b]
dropout: [[0.1], [0.2]]
zip: {n_layer: [1, 2], beta1: [0.9]}
exclude: {seeed: 3}
weight_decay: {low: 1, high: 0}
eval_only: true
"""
    code, out, err = run_sweep("--learning_rte=3", "--launcher=lokal", yaml=yaml)
    assert code == 2 and out == "" and "Traceback" not in err
    for part in (
        "--learning_rte: no such argument; did you mean --learning_rate?",
        "--launcher=lokal: must be one of",
        "g.yaml: lerning_rate: no such argument; did you mean learning_rate?",
        "learning_rate: the list is empty",
        "out_dir: the folder of the sweep must be one path",
        "dropout: takes single values",
        "zip: n_layer has 2, beta1 has 1",
        "exclude: seeed: not in this grid",
        "weight_decay: a range is {low: 1e-5, high: 1e-2}",
    ):
        assert part in err, part
    code, out, err = run_sweep(
        "--learning_rate=1e-3",
        yaml="n_head: [2, 5]\nn_embd: 64\nbatch_size: [4, 0]\noptimizer: [adamw, muo]\noverwrite: true\n",
    )
    assert code == 2 and "5 errors" not in out
    for part in (
        "--n_embd=64: must be divisible by --n_head=5, or set --head_dim (n_head=5",
        "--batch_size=0: must be at least 1 (n_head=2,bs=0",
        "--optimizer=muo: must be one of",
        "--overwrite: the sweep decides",
    ):
        assert part in err, part
    assert [path.name for path in tmp_path.iterdir()] == ["g.yaml"]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("learning_rate: [1e-3, 0.001]\n", "two equal runs: learning_rate=1e-3"),
        ("optimizer: [adamw, lion]\nmuon_learning_rate: [0.1, 0.2]\n", "--muon_learning_rate: "),
        ("optimizer: [adamw, muon]\nmuon_learning_rate: [0.1, 0.2]\n", "two equal runs: optimizer=adamw"),
        ("learning_rate: {low: 1e-5, high: 1e-2}\n", "learning_rate: a range needs --search"),
        ("exclude: {n_layer: 5}\nn_layer: [1, 2]\n", 'exclude: "n_layer": [5]: matches no run'),
        ("exclude: {n_layer: [1, 2]}\nn_layer: [1, 2]\n", "exclude: leaves no run"),
        (
            "n_layer: [1, 2]\nzip: {n_layer: [1, 2], n_head: [1, 2]}\n",
            "n_layer: is varied by its own list and by zip 1",
        ),
        ("init_from: resume\n", "--init_from=resume: "),
        ("evaluation: {tasks: arithmetic, num_passes: 4}\n", "evaluation: --num_passes: "),
        (
            "evaluation: {task: arithmetic, decode: gredy}\n",
            "evaluation: --task: no such argument; did you mean --tasks?",
        ),
        ("slurm: {nodes: two}\n", "slurm: nodes and tasks must be whole numbers"),
        ("slurm: {nodes: 3}\n", "slurm: 3 ranks (nodes x their processes) don't divide the 64 sequences"),
        ("slurm: {nodes: 1-4, gres: 'gpu:4'}\n", "slurm: 12 ranks (nodes x their processes) don't divide"),
        (
            "slurm: {gres: 'gpu:16'}\nobjective: grpo\nbeta: 0\n",
            "slurm: 16 ranks (nodes x their processes) don't divide the 8 groups of 8",
        ),
        ("slurm: {time: 1}\n", "slurm: time: 60 seconds are over when"),
        ("environment: {1A: 3}\n", "environment: 1A: "),
        ("seeds: none\n", "seeds: must be a number of seeds"),
        ("seeds: [1, 2]\nseed: 3\n", "seeds: lists the seeds, which leaves seed=3 without effect"),
        ("a: [\n", "g.yaml: not YAML"),
        ("venv: /nowhere\n", "venv: /nowhere/bin/python: no such program"),
    ],
)
def test_an_error_is_reported(run_sweep: Callable[..., Any], yaml: str, message: str):
    launcher = ["--launcher=local"] if "venv" in yaml else []
    code, _, err = run_sweep(*launcher, yaml=yaml)
    assert code == 2 and message in err, err


def test_an_argument_without_effect_in_some_runs_is_ignored_there(run_sweep: Callable[..., Any]):
    rows = varying(run_sweep, "optimizer: [adamw, muon]\nmuon_learning_rate: 0.1\n")
    assert [row["optimizer"] for row in rows] == ["adamw", "muon"]


LINES = [
    "learning_rate: [1e-3, 3e-4]",
    "n_layer: {low: 1, high: 3}",
    "zip: {n_embd: [64, 128], n_head: [2, 4]}",
    "groups: {a: {n_layer: 2}, b: {dropout: [0, 0.1]}}",
    "exclude: {learning_rate: 1e-3}",
    "seeds: 2",
    "slurm: {nodes: 2, time: 2:00:00}",
    "environment: {A: 1}",
    "evaluation: {tasks: [a, b]}",
    "dataset_list: [[a], [b]]",
    "out_dir: o",
    "venv: /nowhere",
    "optimizer_kwargs: [{eps: 1}]",
    "execution: {algorithm: [dpo, kto], output_dir: /tmp/o}",
    "rl_config_args: {beta: 0.1, max_steps: 5}",
    "model_config_args: {model_name_or_path: [a, b]}",
]
ODD_VALUES = [
    "",
    "[]",
    "{}",
    "[1, [2]]",
    "null",
    "true",
    "{a: 1}",
    "[{}]",
    "x",
    "1e400",
    "-5",
    "[a, b]",
    "[[1], [2]]",
    "{low: 2, high: 1}",
    "2024-01-01",
    "'",
    "*a",
    "!!python/name:os.system ''",
]


@pytest.mark.slow
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lines=st.lists(st.sampled_from(LINES), max_size=5, unique=True),
    changes=st.lists(st.tuples(st.integers(0, 4), st.sampled_from(ODD_VALUES)), max_size=2),
    search=st.booleans(),
)
def test_any_grid_is_a_table_or_errors(run_sweep: Callable[..., Any], lines: list[str], changes: Any, search: object):
    for number, value in changes:
        if lines:
            i = number % len(lines)
            lines[i] = f"{lines[i].split(':')[0]}: {value}"
    code, out, err = run_sweep(*(["--search=random:3"] if search else []), yaml="\n".join(lines))
    assert (code == 0 and re.search(r"\d runs? in ", out)) or (code == 2 and err and "Traceback" not in err)


# ---------------------------------------------------------------------------------------------------------------------
# what is shown


def test_runs_that_learn_from_rewards_are_shown_by_them(run_sweep: Callable[..., Any]):
    """The loss of an evaluation is the negative reward: the order is the same, the sign is the reader's."""
    yaml = "objective: grpo\nbeta: 0\nlearning_rate: [1, 2]\nout_dir: o\n"
    for name, rewards in zip(run_names(run_sweep(yaml=yaml)[1]), ([0.5, 0.25, 0.125], [0.5, 0.75, 0.625]), strict=True):
        lines = [
            {"event": "eval", "step": step, "seconds": 1, "val_loss": -reward, "val_reward": reward}
            for step, reward in zip((0, 10, 20), rewards, strict=True)
        ]
        lines.append({"event": "train", "step": 20, "seconds": 1, "loss": 0.0, "reward": rewards[-1]})
        (Path("o") / name).mkdir(parents=True)
        (Path("o") / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = run_sweep("--status")[1]
    assert "best_val_reward" in out and "val_loss" not in out and "-0." not in out
    out = run_sweep("--collect")[1]
    rows = results()
    assert [row["learning_rate"] for row in rows] == ["2.0", "1.0"], "the best first"
    names = ("reward", "val_reward", "best_val_reward", "best_val_loss", "best_step")
    assert [float(rows[0][name]) for name in names] == [0.625, 0.625, 0.75, -0.75, 10]
    assert [float(rows[1][name]) for name in names] == [0.125, 0.125, 0.25, -0.25, 10]
    assert "0.7500" in out and "val_loss" not in out


# ---------------------------------------------------------------------------------------------------------------------
# names


def test_folders_are_named_by_what_varies_and_a_hash_of_all_arguments(run_sweep: Callable[..., Any]):
    def folders(yaml: str, *argv: str) -> list[str]:
        return run_names(run_sweep("--out_dir=o", *argv, yaml=yaml)[1])

    one = folders("learning_rate: [1e-4, 3e-4]\noptimizer: muon\n", "--optimizer=muon,lion")
    assert [name.rpartition("-")[0] for name in one] == [
        "lr=1e-4,optimizer=muon",
        "lr=1e-4,optimizer=lion",
        "lr=3e-4,optimizer=muon",
        "lr=3e-4,optimizer=lion",
    ]
    assert all(len(name.rpartition("-")[2]) == 6 for name in one) and len(set(one)) == 4
    assert one == folders(
        "optimizer: [muon, lion]\nn_layer: 6\nlearning_rate: [0.0001, 3.0e-4]\n".replace(
            "optimizer: [muon, lion]\nn_layer: 6\n", ""
        ),
        "--optimizer=muon,lion",
        "--n_layer=6",
    ), "a default that is set makes the same run"
    assert not {name[-6:] for name in one} & {
        name[-6:] for name in folders("learning_rate: [1e-4, 3e-4]\nn_layer: 5\n", "--optimizer=muon,lion")
    }


def test_names_are_safe_for_file_systems_and_bounded():
    values = {"init_from": "/a/b c/weird:näme?*", "optimizer_kwargs": {"x": "y" * 300}, "window": "../.."}
    name = grid.label(values, {})
    assert name.startswith("init_from=weird_n_me__,")
    assert len(name) <= grid.MAX_LABEL_LENGTH and not set(name) & set("/ :?*\\")
    assert [
        console.format_value(value) for value in (3e-4, 0.1, 1000.0, 1e-5, 0.00012345, 7, True, (1, 2), 0.0, -2.5e-7)
    ] == [
        "3e-4",
        "0.1",
        "1e3",
        "1e-5",
        "1.2345e-4",
        "7",
        "true",
        "1+2",
        "0",
        "-2.5e-7",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# on this machine

STAND_IN = """
import json, os, pathlib, signal, sys, time
out = pathlib.Path(next(flag for flag in sys.argv if flag.startswith("--out_dir=")).split("=", 1)[1])
config = json.loads((out / "run.json").read_text())
resumed, lr = "--init_from=resume" in sys.argv, config.get("learning_rate", 1e-3)
received = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: received.append(number))
def log(event, step, **values):
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, "step": step, "seconds": step / 10, **values}) + "\\n")
def save(step):
    (out / "checkpoints" / f"{step:06d}").mkdir(parents=True, exist_ok=True)
first = max((int(path.name) for path in (out / "checkpoints").glob("*")), default=0) if resumed else 0
if not resumed:
    (out / "metrics.jsonl").write_text("")
print("environment", *map(os.environ.get, ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "EXTRA")), flush=True)
with (out.parent / "starts").open("a") as file:
    print(out.name, first, time.time(), file=file)
for step in range(first + 1, config.get("max_iters", 3500) + 1):
    if (out.parent / "fail").exists() and lr == 0.5:
        sys.exit("a reason to fail")
    log("train", step, loss=1 / step + lr)
    log("eval", step, train_loss=1.0, val_loss=1 / step + lr)
    time.sleep(float(os.environ.get("PACE", 0)))
    if received:
        save(step)
        log("note", step, text=f"stopped by {signal.Signals(received[0]).name}; resume it")
        sys.exit(128 + received[0])
save(step)
with (out.parent / "starts").open("a") as file:
    print(out.name, "end", time.time(), file=file)
log("note", step, text="finished: all steps")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path):
    """A grid of three runs of the stand-in, in the folder o."""
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(sweep, "prepare_data", lambda runs: None)
    return "learning_rate: [0.25, 0.5, 0.75]\nmax_iters: 3\nout_dir: o\n"


def starts() -> list[list[str]]:
    return [line.split() for line in Path("o/starts").read_text().splitlines()]


@pytest.mark.slow
def test_a_failed_run_is_shown_with_the_end_of_its_log_and_retried(run_sweep: Callable[..., Any], stand_in: str):
    Path("o").mkdir()
    Path("o/fail").touch()
    code, out, _ = run_sweep("--launcher=local", yaml=stand_in)
    assert (
        code == 1
        and out.count(": done, val_loss") == 2
        and ": failed (status 1)" in out
        and "    a reason to fail" in out
    )
    code, out, _ = run_sweep("--status")
    assert code == 1 and "failed, status 1" in out and "    a reason to fail" in out
    Path("o/fail").unlink()
    code, out, _ = run_sweep("--launcher=local")
    assert (
        code == 0
        and "2 of 3 runs are done" in out
        and [event for _, event, _ in starts() if event != "end"] == ["0"] * 4
    )
    assert run_sweep("--status")[0] == 0
    assert run_sweep("--collect")[0] == 0
    rows = results()
    assert [(row["learning_rate"], row["state"], row["step"], float(row["best_val_loss"])) for row in rows] == [
        (f"{lr}", "done", "3", 1 / 3 + lr) for lr in (0.25, 0.5, 0.75)
    ]
    assert len(Path("o/results.md").read_text().splitlines()) == 5


@pytest.mark.slow
def test_j_runs_at_a_time_with_gpus_assigned(
    run_sweep: Callable[..., Any], stand_in: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setenv("PACE", "0.3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code, out, err = run_sweep(
        "--launcher=local", "-j", "2", "--learning_rate=1,2,3,4", yaml=stand_in + "environment: {EXTRA: 1e-05}\n"
    )
    assert code == 0, out + err
    logs = [path.read_text() for path in sorted(Path("o").glob("*/log.txt"))]
    environments = [line.split()[1:] for log in logs for line in log.splitlines() if line.startswith("environment")]
    gpus, threads, extra = zip(*environments, strict=True)
    assert set(gpus) == {"4", "5"} and set(threads) == {str(max(1, os.cpu_count() // 2))} and set(extra) == {"1e-05"}
    events = sorted((float(seconds), -1 if event == "end" else 1) for _, event, seconds in starts())
    assert max(itertools.accumulate(change for _, change in events)) == 2
    assert local.assign_gpus(["0", "1", "2", "3"], 2, 2) == [["0", "1"], ["2", "3"]]
    assert local.assign_gpus(["0"], 2, 1) == [["0"], ["0"]]
    assert local.assign_gpus([], 1, 1) == [[]]


def test_several_gpus_of_a_run_are_used_by_torchrun(
    run_sweep: Callable[..., Any], stand_in: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")

    def print_first_command(slots: local.Slots, callbacks: local.Callbacks) -> int:
        task = callbacks.next_task()
        assert task is not None
        print(slots.gpus, task.commands()[0])
        return 0

    monkeypatch.setattr(local, "run_tasks", print_first_command)
    out = run_sweep("--launcher=local", "--gpus_per_run=2", yaml=stand_in)[1]
    assert (
        "[['0', '1'], ['2', '3']]" in out
        and "'-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'" in out
    )


START = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import sweep
sweep.TRAIN = pathlib.Path("train.py").absolute()
sweep.prepare_data = lambda runs: None
sweep.configurator.run(sweep.command, sys.argv[1:])
"""


def start_sweep(yaml: str, *argv: str, pace: str = "0.2") -> subprocess.Popen:
    """The command in a process of its own, with the stand-in."""
    Path("g.yaml").write_text(yaml)
    return subprocess.Popen(
        [sys.executable, "-c", START, "g.yaml", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PACE": pace},
    )


def wait_for_starts(count: int) -> None:
    end = time.monotonic() + 30
    while not Path("o/starts").exists() or len(starts()) < count:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_has_its_runs_save_and_is_resumed(run_sweep: Callable[..., Any], stand_in: str, number: Any):
    process = start_sweep(
        stand_in + "exclude: {learning_rate: 0.75}\n", "--launcher=local", "-j2", "--max_iters=200", pace="0.1"
    )
    wait_for_starts(2)
    time.sleep(0.5)
    process.send_signal(number)
    out = process.communicate(timeout=30)[0]
    assert process.returncode == 128 + number and out.count("stopped (stopped by SIGTERM)") == 2
    assert all(list(path.glob("checkpoints/*")) for path in Path("o").glob("lr=*"))
    code, out, _ = run_sweep(
        "--launcher=local", "-j2", "--max_iters=200", yaml=stand_in + "exclude: {learning_rate: 0.75}\n"
    )
    first_steps = [int(event) for _, event, _ in starts() if event != "end"]
    assert code == 0 and all(step > 0 for step in first_steps[2:]), "they were resumed"


@pytest.mark.slow
def test_two_sweeps_over_one_folder_start_no_run_twice(run_sweep: Callable[..., Any], stand_in: str):
    processes = [start_sweep(stand_in, "--launcher=local", "--learning_rate=1,2,3,4,5,6", pace="0.6") for _ in range(2)]
    outs = [process.communicate(timeout=60)[0] for process in processes]
    started = [name for name, event, _ in starts() if event != "end"]
    assert len(started) == len(set(started)) == 6, outs
    assert "is run by another process" in "".join(outs)
    assert run_sweep("--status", "--learning_rate=1,2,3,4,5,6", yaml=stand_in)[1].count("done") == 6


@pytest.mark.slow
def test_a_run_outlives_a_launcher_that_was_killed_and_is_not_started_again(
    run_sweep: Callable[..., Any], stand_in: str
):
    process = start_sweep(stand_in, "--launcher=local", "--learning_rate=1", "--max_iters=20", pace="0.2")
    wait_for_starts(1)
    process.kill()
    process.communicate()
    code, out, _ = run_sweep("--launcher=local", "--learning_rate=1", "--max_iters=20", yaml=stand_in)
    assert code == 1 and "is run by another process" in out and "running" in out and len(starts()) == 1
    wait_for_starts(2)
    time.sleep(0.5)
    assert run_sweep("--launcher=local", "--learning_rate=1", "--max_iters=20")[0] == 0 and len(starts()) == 2


@pytest.mark.slow
def test_a_folder_with_another_run_is_refused(run_sweep: Callable[..., Any], stand_in: str):
    assert run_sweep("--launcher=local", yaml=stand_in)[0] == 0
    path = next(Path("o").glob("lr=*/run.json"))
    config = json.loads(path.read_text())
    config["_all"]["n_layer"] = 7  # as after a change of the table's default
    path.write_text(json.dumps(config))
    code, _, err = run_sweep("--launcher=local")
    assert code == 2 and f"{path.parent.name}: holds a run with another n_layer" in err


@pytest.mark.slow
def test_a_sweep_that_is_started_again_keeps_the_defaults_with_which_it_began(
    run_sweep: Callable[..., Any], stand_in: str, monkeypatch: pytest.MonkeyPatch
):
    assert run_sweep("--launcher=local", "--learning_rate=1,2", yaml=stand_in)[0] == 0
    before = {path.name for path in Path("o").glob("lr=*")}
    specs = {**sweep.TRAIN_SPECS, "weight_decay": dataclasses.replace(sweep.TRAIN_SPECS["weight_decay"], default=0.5)}
    monkeypatch.setattr(sweep, "TRAIN_SPECS", specs)  # as after an update of this program
    code, out, _ = run_sweep("--launcher=local", "--learning_rate=1,2,3", yaml=stand_in)
    assert code == 0 and "2 of 3 runs are done" in out and "--weight_decay=0.1: " in out
    (new,) = {path for path in Path("o").glob("lr=*") if path.name not in before}
    assert json.loads((new / "run.json").read_text())["weight_decay"] == 0.1


def test_a_run_has_what_was_set_even_if_it_is_the_default(run_sweep: Callable[..., Any], stand_in: str):
    """Otherwise --depth would derive another value."""
    yaml = f"base: {ROOT / 'configs/depth.py'}\ndepth: 2\nbatch_size: 2\ngradient_accumulation_steps: 1\nout_dir: o\n"
    assert run_sweep("--launcher=slurm", yaml=yaml)[0] == 0
    (path,) = Path("o").glob("*/run.json")
    by_sweep = train_args.parse([str(path)])
    by_hand = train_args.parse(
        [str(ROOT / "configs/depth.py"), "--depth=2", "--batch_size=2", "--gradient_accumulation_steps=1"]
    )
    assert by_sweep.gradient_accumulation_steps == 1 and vars(by_sweep) == vars(by_hand)


EVALUATE = """
import json, sys
print("evaluated", *sys.argv[1:])
if sys.argv[3] == "--tasks=a":
    with open(sys.argv[2].removeprefix("--json="), "w") as file:
        json.dump({"decode": "greedy", "tasks": {"a": {"accuracy": {"value": 0.25}}}}, file)
"""


@pytest.mark.slow
def test_an_evaluation_follows_its_training(
    run_sweep: Callable[..., Any], stand_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    monkeypatch.setattr(sweep, "EVALUATE", tmp_path / "evaluate.py")
    yaml = stand_in + "evaluation: {tasks: [a, b], num_passes: 2}\n"
    assert run_sweep("--launcher=local", "--learning_rate=1", yaml=yaml)[0] == 0
    log = next(Path("o").glob("*/log.txt")).read_text()
    flags = [line.split()[2:] for line in log.splitlines() if line.startswith("evaluated")]
    assert [(Path(json_flag).name, *others) for json_flag, *others in flags] == [
        ("evaluation_1.json", "--tasks=a", "--num_passes=2"),
        ("evaluation_2.json", "--tasks=b", "--num_passes=2"),
    ]
    assert run_sweep("--collect", "--learning_rate=1")[0] == 0 and results()[0]["accuracy/a"] == "0.25"
    (tmp_path / "evaluate.py").write_text("import sys; '--print_config' in sys.argv or sys.exit('no such task')\n")
    yaml = stand_in + "evaluation: {tasks: c}\n"
    code, out, _ = run_sweep("--launcher=local", "--learning_rate=2", yaml=yaml)
    assert code == 1 and "failed (status 1 after its training)" in out and "    no such task" in out
    (tmp_path / "evaluate.py").write_text("")
    count = len(starts())
    assert run_sweep("--launcher=local", "--learning_rate=2", yaml=yaml)[0] == 0 and len(starts()) == count, (
        "what was trained is not trained again"
    )


@pytest.mark.slow
def test_a_grid_with_one_run_killed_and_one_failing_is_done_the_second_time(data_dir: Path, tmp_path: Path):
    """With train.py itself: two are skipped, one is resumed and one starts over; each ends as it does alone."""
    yaml = f"""{BASE}
data_dir: {data_dir}
dataset: [a, b]
optimizer: [adamw, muon]
dropout: 0.1
max_iters: 200
checkpoint_interval: 10
eval_interval: 200
"""
    (tmp_path / "g.yaml").write_text(yaml)
    argv = [tmp_path / "g.yaml", f"--out_dir={tmp_path / 'o'}"]
    listed = run_names(run_script(*argv, script="sweep.py").stdout)
    assert len(listed) == 4
    killed, failing = (tmp_path / "o" / name for name in (listed[0], listed[2]))
    failing.mkdir(parents=True)
    (failing / "checkpoints").symlink_to("/nowhere/at/all")  # can't be written
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sweep.py"), *map(str, argv), "--launcher=local", "-j2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not any(path.name.isdigit() for path in killed.glob("checkpoints/*")) or not (killed / ".lock").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(int((killed / ".lock").read_text().split()[1]), signal.SIGKILL)
    out = process.communicate(timeout=300)[0]
    assert (
        process.returncode == 1
        and out.count(": done") == 2
        and "killed by SIGKILL" in out
        and "the last save, of step 200, failed" in out.split(f"{failing.name}: failed")[-1]
    ), out
    before = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "o").glob("*/metrics.jsonl")
        if path.is_file() and path.parent not in (killed, failing)
    }
    (failing / "checkpoints").unlink()
    again = run_script(*argv, "--launcher=local", "-j2", script="sweep.py")
    assert (
        "2 of 4 runs are done" in again.stdout
        and again.stdout.count("starts") == 2
        and "resuming" in (killed / "log.txt").read_text()
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    table = run_script(*argv, "--collect", script="sweep.py").stdout.splitlines()
    assert len(table) == 6 and all("| done | 200 |" in line for line in table[2:])
    rows = {row["run"]: row for row in results(tmp_path / "o")}
    assert {(row["dataset"], row["optimizer"]) for row in rows.values()} == set(
        itertools.product("ab", ("adamw", "muon"))
    )
    for run in (killed, failing):
        run_script(run / "run.json", f"--out_dir={tmp_path / 'alone' / run.name}")
        swept, alone = read_run(run), read_run(tmp_path / "alone" / run.name)
        assert (
            equal_tensors(swept.last.weights, alone.last.weights)
            and [line["loss"] for line in swept.train] == alone.losses
        )
        assert float(rows[run.name]["val_loss"]) == alone.evals[-1]["val_loss"]


# ---------------------------------------------------------------------------------------------------------------------
# search

SPACE = """
learning_rate: {low: 1e-5, high: 1e-2, log: true}
n_layer: {low: 1, high: 4}
optimizer: [adamw, muon]
max_iters: 30
out_dir: o
"""


def test_random_points_are_in_their_ranges_and_more_of_them_extend_fewer(run_sweep: Callable[..., Any]):
    few, many = (varying(run_sweep, SPACE, f"--search=random:{count}") for count in (10, 40))
    assert len(many) == 40 and all(row in many for row in few)
    rates = sorted(float(row["learning_rate"]) for row in many)
    assert 1e-5 <= rates[0] < 1e-4 and 1e-3 < rates[-1] <= 1e-2 and 8 < sum(rate < 10**-3.5 for rate in rates) < 32, (
        "evenly in the logarithm"
    )
    assert {row["n_layer"] for row in many} == set("1234") and {row["optimizer"] for row in many} == {"adamw", "muon"}
    assert varying(run_sweep, SPACE, "--search=random:10", "--search_seed=1") != few
    assert len(varying(run_sweep, "n_layer: [1, 2]\n", "--search=random:40")) == 2


def test_both_ends_of_ranges_are_checked_before_a_search_starts(run_sweep: Callable[..., Any]):
    code, _, err = run_sweep(
        "--search=tpe:4", "--launcher=local", yaml=SPACE.replace("low: 1, high: 4", "low: -1, high: 4")
    )
    assert code == 2 and "--n_layer=-1: must be at least 1" in err and not Path("o").exists()


@pytest.mark.slow
def test_tpe_finds_the_lower_end_prunes_the_worst_and_continues_after_an_interruption(
    run_sweep: Callable[..., Any], stand_in: str
):
    """The stand-in's loss is its learning rate plus 1 / step: lower is better, and the median of the others prunes."""
    pytest.importorskip("optuna")
    yaml = "learning_rate: {low: 1e-3, high: 1.0}\nmax_iters: 30\nout_dir: o\n"
    os.environ["PACE"] = "0.02"
    try:
        process = start_sweep(yaml, "--launcher=local", "--search=tpe:16", "-j2", pace="0.02")
        wait_for_starts(6)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        code, out, _ = run_sweep("--launcher=local", "--search=tpe:16", "-j2", yaml=yaml)
    finally:
        del os.environ["PACE"]
    assert code == 0 and run_sweep("--collect", "--search=tpe:16")[0] == 0, out
    rows = results()
    assert len(rows) == 16 and {row["state"] for row in rows} == {"done", "pruned"}, out
    assert float(rows[0]["learning_rate"]) < 0.1
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert any(int(row["step"]) < 30 for row in pruned) and min(float(row["learning_rate"]) for row in pruned) > min(
        float(row["learning_rate"]) for row in rows
    )
    count = len(starts())
    assert run_sweep("--launcher=local", "--search=tpe:16", "-j2", yaml=yaml)[0] == 0 and len(starts()) == count


TPE = """
base: a.py
learning_rate: {low: 1e-5, high: 1e-2, log: true}
optimizer: [adamw, muon, lion]
zip: {n_embd: [64, 128], n_head: [2, 4]}
max_iters: 30
out_dir: o
"""


@pytest.mark.slow
def test_a_study_is_continued_by_the_same_search_alone(run_sweep: Callable[..., Any], tmp_path: Path):
    """optuna knows choices by their index: with other ones it would give the scores of adamw to lion."""
    pytest.importorskip("optuna")
    (tmp_path / "a.py").write_text("dropout = 0.25\n")

    def open_study(yaml: str, *argv: str):
        (tmp_path / "g.yaml").write_text(yaml)
        request, errors = sweep.read_request(["g.yaml", "--search=tpe:4", *argv])
        space, more_errors = grid.parse_grid(request.spec, sweep.argument_types(request.spec))
        assert not errors and not more_errors
        request.out_dir.mkdir(exist_ok=True)
        return sweep.open_search(request, space, sweep.Planner(request), 4)

    trial, _ = open_study(TPE).ask()
    for old, new, names in (
        ("[adamw, muon, lion]", "[adamw, muon, sgd]", "another optimizer;"),
        ("[adamw, muon, lion]", "[lion, muon, adamw]", "another optimizer;"),
        ("low: 1e-5", "low: 1e-6", "another learning_rate;"),
        ("log: true", "log: false", "another learning_rate;"),
        ("n_embd: [64, 128]", "n_embd: [64, 256]", "another n_embd and n_head;"),
        ("max_iters: 30", "max_iters: 40", "another max_iters;"),
        ("max_iters: 30", "max_iters: 30\nmuon_momentum: 0.9", "another muon_momentum;"),
        ("base: a.py", "", "another dropout;"),
    ):
        with pytest.raises(UserError, match=names):
            open_study(TPE.replace(old, new))
    with pytest.raises(UserError, match="another dropout;"):
        open_study(TPE, "--launcher=local", "--dropout=0.5")
    with Path("o/study.journal").open("a") as journal:
        journal.write('{"op_code": 4, "wor')  # killed while writing
    same = open_study(TPE + "n_layer: 6\nexclude: {optimizer: lion}\n", "--search_seed=5", "--max_iters=3e1")
    assert [trial.params for trial in same.trials()] == [trial.params]
    same.finish(trial, 0.5, pruned=False)
    assert [trial.value for trial in open_study(TPE).trials()] == [0.5]
    Path("o/study.journal").write_text("no journal\n")
    with pytest.raises(UserError, match="journal: damaged"):
        open_study(TPE)


# ---------------------------------------------------------------------------------------------------------------------
# the experiment file of rl_salamandra_alignment

GUIDE = """
execution:
    algorithm: ["dpo", "kto"]
    venv: "{venv}"
    output_dir: "{out}"
    distributed_config: "DSZero3Offload"

slurm:
    job-name: "<your_slurm_job_name>"
    # output: None
    # error: None
    nodes: 2
    cpus-per-task: 80
    gres: "gpu:4"
    time: "2:00:00"
    account: "bsc88"
    qos: "acc_debug"

rl_script_args:
    dataset_name: "{data}"

model_config_args:
    model_name_or_path: ["{one}", "{two}"]
    # output_dir: None
    attn_implementation: "flash_attention_2"
    torch_dtype: "bfloat16"

rl_config_args:
    # RL configs are subclasses of transformers.TrainingArguments

    # Different RL algorithms have different uses of beta.
    # However, in most of them, it is the weight of the KL-divergence (Loss=reward+Beta*KL)
    beta: 0.2
    max_length: 8192
    max_prompt_length: 128 # Default. When specified, you use the default data collator
    remove_unused_columns: false
    dataset_num_proc: 1
    # ====
    # From `TrainingArguments`:
    # ===
    learning_rate: [5.0e-6, 1.0e-5, 1.0e-6]
    num_train_epochs: 2
    bf16: true
    eval_strategy: "steps"
    eval_steps: 0.05

    # logging_dir: None
    # local_rank: None
    report_to: "wandb"
    # These arguments help to manage GPU memory
    per_device_train_batch_size: 2
    per_device_eval_batch_size: 2
    gradient_accumulation_steps: 8
    gradient_checkpointing: true

environment:
    # Bash environment variables
    WANDB_PROJECT: "salamandra_alignment"
    WANDB_NAME: "test_alignment"
    # WANDB_DIR: None
"""


@pytest.fixture
def guide(tmp_path: Path) -> str:
    """The guide's example, with lists where its second part has them."""
    for name in ("one", "two", "data", "venv/bin"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").touch()
    for split in ("train", "val"):
        (tmp_path / f"data/{split}.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 1000)
    return GUIDE.format(**{name: tmp_path / name for name in ("one", "two", "data", "venv", "out")})


def translated(guide: str, count_examples: Callable = hf_keys.count_examples, **changes) -> list[dict]:
    """The arguments of its runs, by the translation alone."""
    values, as_text = grid_file.read_yaml(guide, "x")
    spec, errors = hf_keys.flatten(values, as_text)
    assert not errors and not hf_keys.file_errors(values)
    spec = {name: value for name, value in (spec | changes).items() if value is not None}
    del spec["execution.output_dir"]
    ranks = slurm.shape_of(grid_slurm_section(spec)).ranks
    return [hf_keys.to_arguments(point.values, ranks, count_examples) for point in points_of(spec)]


def grid_slurm_section(spec: dict) -> dict:
    return {name.removeprefix("slurm."): value for name, value in spec.items() if name.startswith("slurm.")}


def test_the_keys_of_the_guide_become_arguments(guide: str, tmp_path: Path):
    runs = translated(guide)
    assert [(run["objective"], Path(run["init_from"]).name, run["learning_rate"]) for run in runs] == list(
        itertools.product(["dpo", "kto"], ["one", "two"], [5e-6, 1e-5, 1e-6])
    )
    for run in runs:
        # epochs x examples / (a device's x accumulation x nodes x GPUs); TRL's KTO makes two examples of a pair
        steps = -(-2 * (2000 if run["objective"] == "kto" else 1000) // (2 * 8 * 2 * 4))
        expected = guide_arguments(tmp_path, steps)
        assert {name: run.get(name) for name in expected} == expected


def guide_arguments(tmp_path: Path, steps: int) -> dict:
    """What the guide's keys become, for a run of so many steps."""
    return {
        "data_dir": str(tmp_path),
        "dataset": "data",
        "beta": 0.2,
        "block_size": 8192,
        "overflow": "truncate_target",
        "batch_size": 2,
        "gradient_accumulation_steps": 64,
        "max_epochs": 2,
        "max_iters": steps,
        "dtype": "bfloat16",
        "eval_interval": -(-steps * 5 // 100),
        "wandb_log": True,
        "wandb_project": "salamandra_alignment",
        "wandb_run_name": "test_alignment",
        "activation_checkpointing": True,
        "attention_kernel": "auto",
        "parallel": "fsdp",
        "fsdp_offload": True,
        "lr_scheduler": "linear",
        "lr_decay_iters": steps,
        "min_lr": 0.0,
        "warmup_iters": 0,
        "weight_decay": 0.0,
        "beta2": 0.999,
        "checkpoint_at_eval": False,
        "checkpoint_interval": 500,
        "log_interval": 10,
    }


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("warmup_ratio", 0.1, {"warmup_iters": 4}),
        ("warmup_steps", 7, {"warmup_iters": 7}),
        ("max_steps", 90, {"max_iters": 90, "lr_decay_iters": 90, "eval_interval": 5}),
        ("lr_scheduler_type", "constant", {"lr_scheduler": "none"}),
        ("eval_steps", 10, {"eval_interval": 10}),
        ("eval_strategy", "epoch", {"eval_interval": 16}),
        ("eval_strategy", False, {"eval_interval": 32}),
        ("save_total_limit", 5, {"keep_last": 5}),
        ("logging_steps", 3, {"log_interval": 3}),
        ("report_to", ["wandb", "tensorboard"], {"tensorboard_log": True}),
        ("optim", "adafactor", {"optimizer": "adafactor"}),
        ("adam_epsilon", 1e-6, {"optimizer_kwargs": {"eps": 1e-6}}),
        ("max_grad_norm", 0.5, {"grad_clip": 0.5}),
        ("seed", 7, {"seed": 7}),
        ("bf16", False, {"dtype": "bfloat16"}),
        ("fp16", False, {"dtype": "bfloat16"}),
        ("save_steps", 4, {"checkpoint_interval": 4, "checkpoint_at_eval": False}),
        ("save_strategy", "steps", {"checkpoint_interval": 500, "checkpoint_at_eval": False}),
        ("save_strategy", "epoch", {"checkpoint_interval": 16, "checkpoint_at_eval": False}),
        ("eval_steps", None, {"eval_interval": 10}),
        ("save_strategy", "no", {"checkpoint_interval": 0, "checkpoint_at_eval": False}),
        ("save_strategy", "best", {"always_save_checkpoint": False, "checkpoint_at_eval": None}),
        ("logging_strategy", "steps", {"log_interval": 10}),
        ("logging_strategy", "epoch", {"log_interval": 16}),
        ("lr_scheduler_type", "inverse_sqrt", None),
        ("lr_scheduler_type", "polynomial", {"lr_scheduler": "linear", "min_lr": 1e-7}),
        ("lr_scheduler_kwargs", {"min_lr_rate": 0.5, "min_lr": 3e-7}, {"lr_scheduler": "linear", "min_lr": 3e-7}),
        ("lr_scheduler_kwargs", {"num_cycles": 3}, None),
        ("full_determinism", True, {"deterministic": True}),
        ("ddp_timeout", 1800, {"rank_timeout": 1800}),
        ("use_cpu", True, {"device": "cpu"}),
        ("disable_dropout", False, {"disable_dropout": False}),
        ("sync_ref_model", False, {}),
        ("sync_ref_model", True, None),
        ("truncation_mode", "keep_end", None),
        ("load_best_model_at_end", True, {}),
        ("save_steps", 0, None),
    ],
)
def test_further_keys_are_translated(guide: str, key: str, value: Any, expected: Any):
    """expected: None where the key is refused by its name."""
    changes = {"execution.algorithm": "kto", f"rl_config_args.{key}": value}
    if expected is None:
        with pytest.raises(UserError, match=key):
            translated(guide, **changes)
        return
    for run in translated(guide, **changes):
        assert {name: run.get(name) for name in expected} == expected


def test_keys_of_one_algorithm_are_translated(guide: str):
    sft = {"execution.algorithm": "sft"}
    dpo = {"execution.algorithm": "dpo"}
    without_beta = re.sub(r"\n *beta: .*", "", guide)
    for key, value, expected in (
        ("completion_only_loss", False, "all"),
        ("assistant_only_loss", True, "completion"),
        ("max_length", 64, None),
    ):
        run = translated(without_beta, **sft, **{f"rl_config_args.{key}": value})[0]
        assert run.get("loss_on") == expected and run["objective"] == "sft"
    differing = {"rl_config_args.completion_only_loss": False, "rl_config_args.assistant_only_loss": True}
    with pytest.raises(UserError, match="completion_only_loss and assistant_only_loss differ"):
        translated(without_beta, **sft, **differing)
    cached = {"rl_config_args.precompute_ref_log_probs": True, "rl_config_args.disable_dropout": True}
    assert translated(guide, **dpo, **cached)[0]["reference"] == "cache"
    assert translated(guide, **dpo, **{"rl_config_args.disable_dropout": False})[0]["disable_dropout"] is False


def test_unsupported_keys_are_reported_together_before_anything_is_written(
    run_sweep: Callable[..., Any], guide: str, tmp_path: Path
):
    bad = (
        guide.replace("beta: 0.2", "beta: 0.2\n    neftune_noise_alpha: 5\n    push_to_hub: true")
        .replace("attn_implementation", "attn_implementatoin")
        .replace(f'output_dir: "{tmp_path / "out"}"', "output_dir: [a, b]")
    )
    bad = bad.replace("slurm:\n", "slrm:\n").replace('venv: "', 'vnv: "')
    code, _, err = run_sweep("--launcher=slurm", yaml=bad)
    assert code == 2
    for part in (
        "neftune_noise_alpha: is not supported",
        "push_to_hub: is not supported",
        "attn_implementatoin: is not supported; did you mean attn_implementation?",
        "output_dir: must be one absolute path, not a list",
        "slrm: no such section; did you mean slurm?",
        "vnv: no such key; did you mean venv?",
    ):
        assert part in err, part
    assert not (tmp_path / "out").exists()
    (tmp_path / "data/train.jsonl").unlink()
    code, _, err = run_sweep(yaml=guide)
    assert code == 2 and err.count("train.jsonl not found") == 1
    code, _, err = run_sweep(
        yaml=guide.replace("report_to: ", "optim: paged\n    report_to: ").replace("DSZero3Offload", "DSZero9")
    )
    assert code == 2 and "optim=paged: must be one of" in err and "distributed_config: DSZero9" in err


def test_the_guides_example_gives_twelve_jobs(
    run_sweep: Callable[..., Any], guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    code, _, err = run_sweep("--launcher=slurm", yaml=guide)
    assert code == 0, err
    scripts = sorted((tmp_path / "out/slurm").glob("*.sh"))
    assert len(scripts) == len({script.name for script in scripts}) == 12
    assert all(
        "#SBATCH --time=2:00:00\n" in script.read_text()
        and "--nproc_per_node=4" in script.read_text()
        and "export WANDB_NAME=test_alignment\n" in script.read_text()
        for script in scripts
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"two/model.safetensors": None}, "two: no weights in this folder"),
        ({"data/val.jsonl": None}, "val.jsonl not there"),
        ({"data/val.jsonl": '{"prompt": "a", "chosen": "b"}'}, "val.jsonl:1: has the fields prompt, chosen;"),
        ({"data/train.jsonl": '{"prompt": "a", "chosen": null, "rejected": "c"}'}, "train.jsonl:1: chosen: must be"),
        ({".netrc": "machine example.org login user password x"}, "not logged in to api.wandb.ai"),
    ],
)
def test_what_runs_will_read_is_checked_before_anything_is_written(
    run_sweep: Callable[..., Any],
    guide: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x")
    for name, text in change.items():
        (tmp_path / name).unlink()
        if text is not None:
            (tmp_path / name).write_text(f"{text}\n")
    try:
        code, _, err = run_sweep("--launcher=slurm", yaml=guide)
    except UserError as error:  # of a dataset that is not there, which the command prints
        code, err = 2, str(error)
    assert code == 2 and not (tmp_path / "out").exists(), err
    errors = [line for line in err.splitlines() if not line.endswith(" errors")]
    assert 1 <= len(errors) <= 2 and all(message in line for line in errors), "one of DPO, one of KTO at most"


def test_the_command_line_wins_over_lists_of_an_experiment_file(run_sweep: Callable[..., Any], guide: str):
    code, out, err = run_sweep("--learning_rate=1e-4", "--beta=0.1,0.3", "--init_from=scratch", yaml=guide)
    assert code == 2 and err.count("requires pretrained weights") == 2, "of DPO and of KTO; else it would be whole"
    code, out, err = run_sweep("--learning_rate=1e-4", "--beta=0.1,0.3", yaml=guide)
    assert code == 0 and len(run_names(out)) == 2 * 2 * 2, "algorithms x models x betas"


@pytest.mark.parametrize("keys, expected", [
    ({}, "hf:org/name"),
    ({"dataset_config": "main"}, "hf:org/name:main"),
    ({"dataset_train_split": "train_prefs"}, "hf:org/name#train_prefs"),
    ({"dataset_test_split": "test"}, "hf:org/name#train/test"),
    ({"dataset_config": "main", "dataset_train_split": "a", "dataset_test_split": "b"}, "hf:org/name:main#a/b"),
    ({"dataset_name": "org/name@1234567", "dataset_config": "main"}, "hf:org/name:main@1234567"),
    ({"dataset_name": "hf:org/name#a/b", "dataset_train_split": "c"}, "hf:org/name#a/b"),
])  # fmt: skip
def test_a_dataset_of_the_hub_is_named_by_trls_keys(keys: dict, expected: str):
    """What trl's script passes to load_dataset: name, configuration, and the splits of its result."""
    assert hf_keys.hub_dataset({"dataset_name": "org/name", **keys}) == expected
    parsed = HubDataset.parse(expected)
    assert parsed.name == "org/name" and parsed.config == keys.get("dataset_config", "")


def test_a_folder_is_a_folder_unless_it_is_one_of_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/ours", "data/parquet", "data/empty"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data/ours/train.jsonl").touch()
    for name in ("ours", "parquet"):
        (tmp_path / f"data/{name}/train.parquet").touch()
    names = ("data/ours", "data/parquet", "data/empty", "data/missing", "org/name", "name", "/no/where")
    is_hub = [bool(hf_keys.hub_dataset({"dataset_name": name})) for name in names]
    assert is_hub == [False, True, False, False, True, False, False]


@pytest.mark.slow
def test_the_steps_of_a_dataset_of_the_hub_follow_from_its_rows(guide: str, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"{i}", "chosen": "a", "rejected": "b"} for i in range(640)]
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows[:512]), "test": datasets.Dataset.from_list(rows[512:])}
    ).save_to_disk(tmp_path / "saved")
    changes = {"rl_script_args.dataset_name": str(tmp_path / "saved"), "rl_config_args.num_train_epochs": 1}
    runs = translated(guide, count_examples=sweep.count_examples, **changes)
    for run in runs:
        assert run["dataset"] == f"hf:{tmp_path}/saved" and "data_dir" not in run
        assert run["max_iters"] == (8 if run["objective"] == "kto" else 4), "of 128 sequences; KTO takes pairs apart"
    with pytest.raises(UserError, match="dataset_config: is not supported"):
        translated(guide, **{"rl_script_args.dataset_config": "x"})


def test_a_model_of_the_hub_is_named_with_its_revision(guide: str, tmp_path: Path):
    name, revision = "model_config_args.model_name_or_path", "model_config_args.model_revision"
    for keys, expected in (
        ({name: "org/name"}, "org/name"),
        ({name: "org/name", revision: "main"}, "org/name"),
        ({name: "org/name", revision: "v2"}, "org/name@v2"),
        ({name: str(tmp_path), revision: "main"}, str(tmp_path)),
    ):
        assert {run["init_from"] for run in translated(guide, **keys)} == {expected}
    with pytest.raises(UserError, match="model_revision=v2"):
        translated(guide, **{name: str(tmp_path), revision: "v2"})


def test_the_table_has_every_key_of_trl():
    """The sources of TRL's and transformers' configs are the witness, read without the seconds of importing them."""
    if not all(importlib.util.find_spec(name) for name in ("trl", "transformers")):
        pytest.skip("needs trl and transformers")
    trl, transformers = (Path(importlib.util.find_spec(name).origin).parent for name in ("trl", "transformers"))
    paths = [trl / f"trainer/{name}_config.py" for name in ("base", "sft", "dpo", "kto", "grpo", "model")]
    paths += [trl / "experimental/kto/kto_config.py", trl / "scripts/utils.py", transformers / "training_args.py"]
    fields = {}
    for tree in (ast.parse(path.read_text()) for path in paths if path.exists()):
        classes = [item for item in ast.walk(tree) if isinstance(item, ast.ClassDef)]
        for line in itertools.chain.from_iterable(item.body for item in classes if not item.name.startswith("Dataset")):
            if isinstance(line, ast.AnnAssign) and not ast.unparse(line.annotation).startswith("ClassVar"):
                fields[line.target.id] = line.value
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    assert len(fields) > 150 and fields.keys() <= hf_keys.KEYS.keys(), fields.keys() - hf_keys.KEYS.keys()
    for name, (_, *neutral) in hf_other_keys.NOT_SUPPORTED.items():  # what TRL does by default is taken
        keywords = getattr(fields.get(name), "keywords", [])
        default = [item.value for item in keywords if item.arg == "default"]
        if default and name != "use_bias_correction_kl":
            assert ast.literal_eval(default[0]) in [None, *neutral], name


def test_every_argument_of_the_translation_is_in_the_table():
    tree = ast.parse((ROOT / "nanoforge/sweeps/hf_keys.py").read_text())
    renamed = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in ("renamed", "lora")
        and isinstance(node.args[0], ast.Constant)
    }
    assert len(renamed) >= 30 and renamed <= sweep.TRAIN_SPECS.keys(), renamed - sweep.TRAIN_SPECS.keys()


# ---------------------------------------------------------------------------------------------------------------------
# the examples


@pytest.mark.parametrize("path", sorted((ROOT / "configs/grids").glob("*.yaml")), ids=lambda path: path.name)
def test_the_example_grids_are_whole(path: Any):
    text = path.read_text()
    if "execution:" in text:
        pytest.skip("its models and data are the user's")
    search = ["--search=random:5"] if "low:" in text else []
    assert "runs in" in run_script(path.relative_to(ROOT), *search, script="sweep.py").stdout
