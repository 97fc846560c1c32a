"""Grids become the runs that they say, all mistakes are told before one begins, and runs are neither lost, mixed nor made twice.

Where only starting and stopping matters, a stand-in for train.py trains: it takes its arguments, tells metrics and obeys signals, in 0.1 s.
"""

import ast
import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, TINY, equal_tensors, read_run, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sweep
import train_args
from nanoforge import console
from nanoforge.errors import UserError
from nanoforge.sweeps import grid, hf_keys, local, summary

BASE = "".join(f"{flag[2:].replace('=', ': ', 1)}\n" for flag in TINY)


@pytest.fixture
def swept(tmp_path, monkeypatch, capsys):
    """swept("--flag", yaml="lines of a grid") runs the command in this process: (status, what it printed, what it told as mistakes)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.yaml").write_text("")

    def swept(*argv: str, yaml: str | None = None):
        if yaml is not None:
            (tmp_path / "g.yaml").write_text(yaml)
        with pytest.raises(SystemExit) as end:
            sweep.command([*(["g.yaml"] if (tmp_path / "g.yaml").read_text() else []), *argv])
        return end.value.code, *capsys.readouterr()

    return swept


def names(out: str) -> list[str]:
    """The runs of a printed table."""
    return [
        line.split()[-1]
        for line in out.splitlines()
        if "-" in line and not line.startswith(("---", " ")) and "=" in line.split()[-1]
    ]


def results(folder: Path = Path("o")) -> list[dict[str, str]]:
    """The rows of results.csv."""
    return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


def told(swept, yaml: str, *argv: str) -> list[dict[str, str]]:
    """What varies in the runs of a grid, as results.csv has it."""
    code, _, err = swept("--collect", "--out_dir=o", *argv, yaml=yaml)
    assert code == 0, err
    rows = results()
    reached = {"state", *summary.NUMBERS, "run"}
    return [{name: value for name, value in row.items() if name not in reached} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# grids


def test_a_grid_is_the_product_of_its_lists(swept):
    yaml = "learning_rate: [1e-5, 0.0003]\noptimizer: [adamw, muon, lion]\nn_layer: 2\n"
    expected = [
        {"learning_rate": rate, "optimizer": name}
        for rate, name in itertools.product(["1e-05", "0.0003"], ["adamw", "muon", "lion"])
    ]
    assert told(swept, yaml) == expected
    assert told(swept, "", "--learning_rate=1e-5,3e-4", "--optimizer=adamw,muon,lion", "--n_layer=2") == expected
    assert told(swept, yaml, "--optimizer=adamw", "--n_layer=1,2")[:2] == [
        {"learning_rate": "1e-05", "n_layer": "1"},
        {"learning_rate": "1e-05", "n_layer": "2"},
    ]


def test_zip_groups_exclude_seeds_and_base(swept, tmp_path):
    (tmp_path / "a.py").write_text("n_layer = 3\nweight_decay = 0.5\nbeta1 = 0.8\n")
    yaml = (
        "base: a.py\nweight_decay: 0.25\nzip: {n_embd: [64, 128], n_head: [2, 4]}\ngroups:\n  small: {n_layer: 2}\n  large: {n_layer: 4, dropout: [0, 0.1]}\n"
        "exclude:\n- {n_embd: 128, dropout: 0.1}\n- {group: small, n_embd: [64, 100]}\nseeds: 2\n"
    )
    rows = told(swept, yaml)
    assert [tuple(row.values()) for row in rows] == [
        ("64", "4", "large", "0.0", "1337"), ("64", "4", "large", "0.0", "1338"), ("64", "4", "large", "0.1", "1337"), ("64", "4", "large", "0.1", "1338"),
        ("128", "4", "small", "", "1337"), ("128", "4", "small", "", "1338"), ("128", "4", "large", "0.0", "1337"), ("128", "4", "large", "0.0", "1338"),
    ] or {(row["n_embd"], row["group"], row["dropout"], row["seed"]) for row in rows} == {
        (embd, group, drop, seed) for seed in ("1337", "1338")
        for embd, group, drop in (("64", "large", "0.0"), ("64", "large", "0.1"), ("128", "small", ""), ("128", "large", "0.0"))
    }  # fmt: skip
    wrong: list[str] = []
    asked = sweep.ask(["g.yaml"], wrong)
    space = grid.read(asked.spec, set(), set(), set(), ("seed", 1337), wrong)
    runs = sweep.Checker(asked).runs(grid.product(space, sweep.normal, wrong))
    assert not wrong and {(run.everything["weight_decay"], run.everything["beta1"]) for run in runs} == {(0.25, 0.8)}
    assert {run.everything["n_layer"] for run in runs if run.told["group"] == "large"} == {4}


def test_list_valued_arguments_take_lists_of_lists(swept):
    head = "training_mode: multidataset\n"
    assert len(told(swept, head + "dataset_list: [a, b]\nn_layer: [1, 2]\n")) == 2
    assert told(swept, head + "dataset_list: [[a, b], [a, c]]\n") == [{"dataset_list": "a+b"}, {"dataset_list": "a+c"}]
    assert told(swept, head, "--dataset_list=[[a, b], [a, c]]") == [{"dataset_list": "a+b"}, {"dataset_list": "a+c"}]
    assert told(swept, 'optimizer_kwargs: [{"eps": 1e-8}, {"eps": 1e-10}]\n') == [
        {"optimizer_kwargs": "eps=1e-8"},
        {"optimizer_kwargs": "eps=1e-10"},
    ]


def test_scalars_of_yaml_are_what_they_look_like(tmp_path):
    """PyYAML's own reading of the same lines, by YAML 1.1, is the witness that they need this."""
    import yaml

    text = "a: 1e-5\nb: 2:00:00\nc: 010\nd: yes\ne: 2024-01-01\nf: None\ng: 1_000\nh: true\ni: ~\nj: -1.5E+3\nk: .5\nl: 'None'\nm: <<\nn: 0x10\n"
    typed, verbatim = grid.read_yaml(text.replace("m: <<\n", ""), "x")
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
    assert verbatim == {
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
    theirs = yaml.safe_load(text.replace("m: <<\n", ""))
    assert theirs["a"] == "1e-5" and theirs["b"] == 7200 and theirs["c"] == 8 and theirs["d"] is True
    with pytest.raises(UserError, match="line 3: duplicate key: a"):
        grid.read_yaml(
            "b:\n  c: 1\n  a: 1\n  a: 2\n".replace("b:\n  c", "b: 1\nc: {}\nd:\n  c")[len("b: 1\nc: {}\n") :].replace(
                "d:\n", "b: 1\nd:\n"
            ),
            "x",
        )


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


def test_all_mistakes_of_all_runs_are_told_before_anything_is_written(swept, tmp_path):
    yaml = (
        "lerning_rate: 1\nlearning_rate: []\nn_head: [2, 5]\nn_embd: 64\nbatch_size: [4, 0]\noptimizer: [adamw, muo]\nout_dir: [a, b]\ndropout: [[0.1], [0.2]]\nzip: {n_layer: [1, 2], beta1: [0.9]}\n"
        "exclude: {seeed: 3}\nweight_decay: {low: 1, high: 0}\neval_only: true\n"
    )
    code, out, err = swept("--learning_rte=3", "--launcher=lokal", yaml=yaml)
    assert code == 2 and out == "" and "Traceback" not in err
    for part in (
        "--learning_rte: no such argument; did you mean --learning_rate?", "--launcher=lokal: must be one of", "g.yaml: lerning_rate: no such argument; did you mean learning_rate?",
        "learning_rate: an empty list", "out_dir: the folder of the sweep; must be one path, not a list", "dropout: takes single values", "zip: n_layer has 2, beta1 has 1", "exclude: seeed: not in this grid",
        "weight_decay: a range has low and high",
    ):  # fmt: skip
        assert part in err, part
    code, out, err = swept(
        "--learning_rate=1e-3",
        yaml="n_head: [2, 5]\nn_embd: 64\nbatch_size: [4, 0]\noptimizer: [adamw, muo]\noverwrite: true\n",
    )
    assert code == 2 and "5 errors" not in out
    for part in (
        "--n_embd=64: must be divisible by --n_head=5 (n_head=5",
        "--batch_size=0: must be at least 1 (n_head=2,bs=0",
        "--optimizer=muo: must be one of",
        "--overwrite: the sweep decides",
    ):
        assert part in err, part
    assert [path.name for path in tmp_path.iterdir()] == ["g.yaml"]


@pytest.mark.parametrize(("yaml", "words"), [
    ("learning_rate: [1e-3, 0.001]\n", "two equal runs: learning_rate=1e-3"),
    ("optimizer: [adamw, lion]\nmuon_learning_rate: [0.1, 0.2]\n", "--muon_learning_rate: has an effect only with --optimizer=muon"),
    ("optimizer: [adamw, muon]\nmuon_learning_rate: [0.1, 0.2]\n", "two equal runs: optimizer=adamw"),
    ("learning_rate: {low: 1e-5, high: 1e-2}\n", "a range needs --search"),
    ("exclude: {n_layer: 5}\nn_layer: [1, 2]\n", "no run is like this"),
    ("exclude: {n_layer: [1, 2]}\nn_layer: [1, 2]\n", "exclude: leaves no run"),
    ("n_layer: [1, 2]\nzip: {n_layer: [1, 2], n_head: [1, 2]}\n", "n_layer: is varied by its own list and by zip 1"),
    ("init_from: resume\n", "--init_from=resume: the sweep decides which runs go on"),
    ("evaluation: {tasks: arithmetic, num_passes: 4}\n", "evaluation: --num_passes: the likeliest answer is always the same"),
    ("evaluation: {task: arithmetic, decode: gredy}\n", "evaluation: --task: no such argument; did you mean --tasks?"),
    ("slurm: {nodes: two}\n", "slurm: nodes and tasks must be whole numbers"),
    ("environment: {1A: 3}\n", "environment: 1A: is no name of a variable"),
    ("seeds: none\n", "seeds: must be how many"),
    ("a: [\n", "g.yaml: not YAML"),
    ("venv: /nowhere\n", "venv: /nowhere/bin/python: no such program"),
])  # fmt: skip
def test_a_mistake_is_told(swept, yaml, words):
    code, _, err = swept(*(["--launcher=local"] if "no such program" in words else []), yaml=yaml)
    if words != "g.yaml":
        assert code == 2 and words in err, err


def test_an_argument_without_effect_in_some_runs_is_passed_over_there(swept):
    rows = told(swept, "optimizer: [adamw, muon]\nmuon_learning_rate: 0.1\n")
    assert [row["optimizer"] for row in rows] == ["adamw", "muon"]


LINES = [
    "learning_rate: [1e-3, 3e-4]", "n_layer: {low: 1, high: 3}", "zip: {n_embd: [64, 128], n_head: [2, 4]}", "groups: {a: {n_layer: 2}, b: {dropout: [0, 0.1]}}", "exclude: {learning_rate: 1e-3}",
    "seeds: 2", "slurm: {nodes: 2, time: 2:00:00}", "environment: {A: 1}", "evaluation: {tasks: [a, b]}", "dataset_list: [[a], [b]]", "out_dir: o", "venv: /nowhere", "optimizer_kwargs: [{eps: 1}]",
    "execution: {algorithm: [dpo, kto], output_dir: /tmp/o}", "rl_config_args: {beta: 0.1, max_steps: 5}", "model_config_args: {model_name_or_path: [a, b]}",
]  # fmt: skip
WRONG = [
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


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lines=st.lists(st.sampled_from(LINES), max_size=5, unique=True),
    wrong=st.lists(st.tuples(st.integers(0, 4), st.sampled_from(WRONG)), max_size=2),
    search=st.booleans(),
)
def test_any_grid_is_a_table_or_mistakes(swept, lines, wrong, search):
    for place, words in wrong:
        if lines:
            at = place % len(lines)
            lines[at] = f"{lines[at].split(':')[0]}: {words}"
    code, out, err = swept(*(["--search=random:3"] if search else []), yaml="\n".join(lines))
    assert (code == 0 and "runs in" in out) or (code == 2 and err and "Traceback" not in err)


# ---------------------------------------------------------------------------------------------------------------------
# names


def test_folders_are_named_by_what_varies_and_a_hash_of_all_arguments(swept):
    def folders(yaml: str, *argv: str) -> list[str]:
        return names(swept("--out_dir=o", *argv, yaml=yaml)[1])

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
    ), "a default told is the same run"
    assert not {name[-6:] for name in one} & {
        name[-6:] for name in folders("learning_rate: [1e-4, 3e-4]\nn_layer: 5\n", "--optimizer=muon,lion")
    }


def test_names_are_safe_for_file_systems_and_bounded():
    told = {"init_from": "/a/b c/weird:näme?*", "optimizer_kwargs": {"x": "y" * 300}, "window": "../.."}
    name = grid.label(told, {})
    assert name.startswith("init_from=weird_n_me__,") and len(name) <= grid.LONGEST and not set(name) & set("/ :?*\\")
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
out = pathlib.Path(next(word for word in sys.argv if word.startswith("--out_dir=")).split("=", 1)[1])
config = json.loads((out / "run.json").read_text())
resumed, lr = "--init_from=resume" in sys.argv, config.get("learning_rate", 1e-3)
stop = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: stop.append(number))
def tell(event, step, **values):
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, "step": step, "seconds": step / 10, **values}) + "\\n")
def save(step):
    (out / "checkpoints" / f"{step:06d}").mkdir(parents=True, exist_ok=True)
first = max((int(path.name) for path in (out / "checkpoints").glob("*")), default=0) if resumed else 0
if not resumed:
    (out / "metrics.jsonl").write_text("")
print("environment", os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS"), os.environ.get("EXTRA"), flush=True)
with (out.parent / "starts").open("a") as file:
    print(out.name, first, time.time(), file=file)
for step in range(first + 1, config.get("max_iters", 3500) + 1):
    if (out.parent / "fail").exists() and lr == 0.5:
        sys.exit("a reason to fail")
    tell("train", step, loss=1 / step + lr)
    tell("eval", step, train_loss=1.0, val_loss=1 / step + lr)
    time.sleep(float(os.environ.get("PACE", 0)))
    if stop:
        save(step)
        tell("note", step, text=f"stopped by {signal.Signals(stop[0]).name}; goes on")
        sys.exit(128 + stop[0])
save(step)
with (out.parent / "starts").open("a") as file:
    print(out.name, "end", time.time(), file=file)
tell("note", step, text="finished: so many steps")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch, data_dir):
    """A grid of three runs of the stand-in, in the folder o."""
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(sweep, "prepare_data", lambda runs: None)
    return "learning_rate: [0.25, 0.5, 0.75]\nmax_iters: 3\nout_dir: o\n"


def starts() -> list[list[str]]:
    return [line.split() for line in Path("o/starts").read_text().splitlines()]


def test_a_failed_run_is_shown_with_its_last_words_and_tried_again(swept, stand_in):
    Path("o").mkdir()
    Path("o/fail").touch()
    code, out, _ = swept("--launcher=local", yaml=stand_in)
    assert (
        code == 1
        and out.count(": done, val_loss") == 2
        and ": failed (status 1)" in out
        and "    a reason to fail" in out
    )
    code, out, _ = swept("--status")
    assert code == 1 and "failed, status 1" in out and "    a reason to fail" in out
    Path("o/fail").unlink()
    code, out, _ = swept("--launcher=local")
    assert (
        code == 0
        and "2 of 3 runs are done" in out
        and [word for name, word, _ in starts() if word != "end"] == ["0"] * 4
    )
    assert swept("--status")[0] == 0
    assert swept("--collect")[0] == 0
    rows = results()
    assert [(row["learning_rate"], row["state"], row["step"], float(row["best_val_loss"])) for row in rows] == [
        (f"{lr}", "done", "3", 1 / 3 + lr) for lr in (0.25, 0.5, 0.75)
    ]
    assert len(Path("o/results.md").read_text().splitlines()) == 5


def test_so_many_run_at_once_with_gpus_dealt_out(swept, stand_in, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setenv("PACE", "0.3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code, out, err = swept(
        "--launcher=local", "-j", "2", "--learning_rate=1,2,3,4", yaml=stand_in + "environment: {EXTRA: 1e-05}\n"
    )
    assert code == 0, out + err
    logs = [path.read_text() for path in sorted(Path("o").glob("*/log.txt"))]
    seen = [next(line.split()[1:] for line in log.splitlines() if line.startswith("environment")) for log in logs]
    assert (
        {one[0] for one in seen} == {"4", "5"}
        and {one[1:][0] for one in seen} == {str(max(1, os.cpu_count() // 2))}
        and {one[2] for one in seen} == {"1e-05"}
    )
    events = sorted((float(at), -1 if word == "end" else 1) for _, word, at in starts())
    assert max(itertools.accumulate(change for _, change in events)) == 2
    assert (
        local.deal(["0", "1", "2", "3"], 2, 2) == [["0", "1"], ["2", "3"]]
        and local.deal(["0"], 2, 1) == [["0"], ["0"]]
        and local.deal([], 1, 1) == [[]]
    )


def test_several_gpus_of_a_run_are_used_by_torchrun(swept, stand_in, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr(local, "run", lambda draw, places, *rest: print(places, draw().commands()[0]) or 0)
    out = swept("--launcher=local", "--gpus_per_run=2", yaml=stand_in)[1]
    assert (
        "[['0', '1'], ['2', '3']]" in out
        and "'-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'" in out
    )


def begin(stand_in: str, *argv: str, pace: str = "0.2") -> subprocess.Popen:
    """The command in a process of its own, with the stand-in."""
    Path("g.yaml").write_text(stand_in)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pathlib, sweep; sweep.TRAIN = pathlib.Path('train.py').absolute(); sweep.prepare_data = lambda runs: None; sweep.configurator.run(sweep.command, sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, "g.yaml", *argv],
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_has_its_runs_save_and_goes_on(swept, stand_in, number):
    process = begin(
        stand_in + "exclude: {learning_rate: 0.75}\n", "--launcher=local", "-j2", "--max_iters=200", pace="0.1"
    )
    wait_for_starts(2)
    time.sleep(0.5)
    process.send_signal(number)
    out = process.communicate(timeout=30)[0]
    assert process.returncode == 128 + number and out.count("stopped (stopped by SIGTERM)") == 2
    assert all(list(path.glob("checkpoints/*")) for path in Path("o").glob("lr=*"))
    code, out, _ = swept(
        "--launcher=local", "-j2", "--max_iters=200", yaml=stand_in + "exclude: {learning_rate: 0.75}\n"
    )
    assert code == 0 and all(int(word) > 0 for word in [word for _, word, _ in starts() if word != "end"][2:]), (
        "they went on where they were"
    )


def test_two_sweeps_over_one_folder_start_no_run_twice(swept, stand_in):
    processes = [begin(stand_in, "--launcher=local", "--learning_rate=1,2,3,4,5,6", pace="0.6") for _ in range(2)]
    outs = [process.communicate(timeout=60)[0] for process in processes]
    begun = [name for name, word, _ in starts() if word != "end"]
    assert len(begun) == len(set(begun)) == 6, outs
    assert "is run by another process" in "".join(outs)
    assert swept("--status", "--learning_rate=1,2,3,4,5,6", yaml=stand_in)[1].count("done") == 6


def test_a_run_outlives_a_launcher_that_was_killed_and_is_not_begun_again(swept, stand_in):
    process = begin(stand_in, "--launcher=local", "--learning_rate=1", "--max_iters=20", pace="0.2")
    wait_for_starts(1)
    process.kill()
    process.communicate()
    code, out, _ = swept("--launcher=local", "--learning_rate=1", "--max_iters=20", yaml=stand_in)
    assert code == 1 and "is run by another process" in out and "running" in out and len(starts()) == 1
    wait_for_starts(2)
    time.sleep(0.5)
    assert swept("--launcher=local", "--learning_rate=1", "--max_iters=20")[0] == 0 and len(starts()) == 2


def test_a_folder_with_another_run_is_never_mixed_in(swept, stand_in):
    assert swept("--launcher=local", yaml=stand_in)[0] == 0
    path = next(Path("o").glob("lr=*/run.json"))
    config = json.loads(path.read_text())
    config["_all"]["n_layer"] = 7  # as after a change of the table's default
    path.write_text(json.dumps(config))
    code, _, err = swept("--launcher=local")
    assert code == 2 and f"{path.parent.name}: holds a run with another n_layer" in err


def test_a_run_has_what_was_given_though_it_is_the_default(swept, stand_in):
    """Otherwise --depth would put its own in that place."""
    yaml = f"base: {ROOT / 'configs/depth.py'}\ndepth: 2\nbatch_size: 2\ngradient_accumulation_steps: 1\nout_dir: o\n"
    assert swept("--launcher=slurm", yaml=yaml)[0] == 0
    (path,) = Path("o").glob("*/run.json")
    again, asked = (
        train_args.parse([str(config), *more])
        for config, more in (
            (path, []),
            (ROOT / "configs/depth.py", ["--depth=2", "--batch_size=2", "--gradient_accumulation_steps=1"]),
        )
    )
    assert again.gradient_accumulation_steps == 1 and again == asked


def test_an_evaluation_follows_its_training(swept, stand_in, tmp_path, monkeypatch):
    found = {"decode": "greedy", "tasks": {"a": {"accuracy": {"value": 0.25}}}}
    (tmp_path / "evaluate.py").write_text(
        f"import sys; print('evaluated', *sys.argv[1:])\nif sys.argv[3] == '--tasks=a': open(sys.argv[2][7:], 'w').write({json.dumps(found)!r})\n"
    )
    monkeypatch.setattr(sweep, "EVALUATE", tmp_path / "evaluate.py")
    assert (
        swept("--launcher=local", "--learning_rate=1", yaml=stand_in + "evaluation: {tasks: [a, b], num_passes: 2}\n")[
            0
        ]
        == 0
    )
    log = next(Path("o").glob("*/log.txt")).read_text()
    told = [line.split()[2:] for line in log.splitlines() if line.startswith("evaluated")]
    assert [(Path(words[0]).name, *words[1:]) for words in told] == [
        ("evaluation_1.json", "--tasks=a", "--num_passes=2"),
        ("evaluation_2.json", "--tasks=b", "--num_passes=2"),
    ]
    assert swept("--collect", "--learning_rate=1")[0] == 0 and results()[0]["accuracy/a"] == "0.25"
    (tmp_path / "evaluate.py").write_text("import sys; '--print_config' in sys.argv or sys.exit('no such task')\n")
    yaml = stand_in + "evaluation: {tasks: c}\n"
    code, out, _ = swept("--launcher=local", "--learning_rate=2", yaml=yaml)
    assert code == 1 and "failed (status 1 after its training)" in out and "    no such task" in out
    (tmp_path / "evaluate.py").write_text("")
    count = len(starts())
    assert swept("--launcher=local", "--learning_rate=2", yaml=yaml)[0] == 0 and len(starts()) == count, (
        "what was trained is not trained again"
    )


def test_a_grid_with_one_run_killed_and_one_failing_is_done_the_second_time(data_dir, tmp_path):
    """With train.py itself: two are passed over, one goes on from its checkpoint and one begins again; each ends as it does alone."""
    yaml = (
        BASE
        + f"data_dir: {data_dir}\ndataset: [a, b]\noptimizer: [adamw, muon]\ndropout: 0.1\nmax_iters: 200\ncheckpoint_interval: 10\neval_interval: 200\n"
    )
    (tmp_path / "g.yaml").write_text(yaml.replace("max_iters: 4\n", "").replace("eval_interval: 2\n", ""))
    words = [tmp_path / "g.yaml", f"--out_dir={tmp_path / 'o'}"]
    listed = names(run_script(*words, script="sweep.py").stdout)
    assert len(listed) == 4
    hurt, failing = (tmp_path / "o" / name for name in (listed[0], listed[2]))
    failing.mkdir(parents=True)
    (failing / "checkpoints").symlink_to("/nowhere/at/all")  # can't be written
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sweep.py"), *map(str, words), "--launcher=local", "-j2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not any(path.name.isdigit() for path in hurt.glob("checkpoints/*")) or not (hurt / ".lock").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(int((hurt / ".lock").read_text().split()[1]), signal.SIGKILL)
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
        if path.is_file() and path.parent not in (hurt, failing)
    }
    (failing / "checkpoints").unlink()
    again = run_script(*words, "--launcher=local", "-j2", script="sweep.py")
    assert (
        "2 of 4 runs are done" in again.stdout
        and again.stdout.count("begins") == 2
        and "resuming" in (hurt / "log.txt").read_text()
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    table = run_script(*words, "--collect", script="sweep.py").stdout.splitlines()
    assert len(table) == 6 and all("| done | 200 |" in line for line in table[2:])
    rows = {row["run"]: row for row in results(tmp_path / "o")}
    assert {(row["dataset"], row["optimizer"]) for row in rows.values()} == set(
        itertools.product("ab", ("adamw", "muon"))
    )
    for run in (hurt, failing):
        run_script(run / "run.json", f"--out_dir={tmp_path / 'alone' / run.name}")
        ours, alone = read_run(run), read_run(tmp_path / "alone" / run.name)
        assert (
            equal_tensors(ours.last.weights, alone.last.weights)
            and [line["loss"] for line in ours.train] == alone.losses
        )
        assert float(rows[run.name]["val_loss"]) == alone.evals[-1]["val_loss"]


# ---------------------------------------------------------------------------------------------------------------------
# search

SPACE = "learning_rate: {low: 1e-5, high: 1e-2, log: true}\nn_layer: {low: 1, high: 4}\noptimizer: [adamw, muon]\nmax_iters: 30\nout_dir: o\n"


def test_random_points_are_in_their_ranges_and_more_of_them_extend_fewer(swept):
    few, many = (told(swept, SPACE, f"--search=random:{count}") for count in (10, 40))
    assert len(many) == 40 and all(row in many for row in few)
    rates = sorted(float(row["learning_rate"]) for row in many)
    assert 1e-5 <= rates[0] < 1e-4 and 1e-3 < rates[-1] <= 1e-2 and 8 < sum(rate < 10**-3.5 for rate in rates) < 32, (
        "evenly in the logarithm"
    )
    assert {row["n_layer"] for row in many} == set("1234") and {row["optimizer"] for row in many} == {"adamw", "muon"}
    assert told(swept, SPACE, "--search=random:10", "--search_seed=1") != few
    assert len(told(swept, "n_layer: [1, 2]\n", "--search=random:40")) == 2


def test_both_ends_of_ranges_are_checked_before_a_search_begins(swept):
    code, _, err = swept(
        "--search=tpe:4", "--launcher=local", yaml=SPACE.replace("low: 1, high: 4", "low: -1, high: 4")
    )
    assert code == 2 and "--n_layer=-1: must be at least 1" in err and not Path("o").exists()


def test_tpe_finds_the_lower_end_gives_up_the_worst_and_goes_on_after_an_interruption(swept, stand_in):
    """The stand-in's loss is its learning rate plus 1 / step: the smaller, the better, and the median of the others prunes."""
    pytest.importorskip("optuna")
    yaml = "learning_rate: {low: 1e-3, high: 1.0}\nmax_iters: 30\nout_dir: o\n"
    os.environ["PACE"] = "0.02"
    try:
        process = begin(yaml, "--launcher=local", "--search=tpe:16", "-j2", pace="0.02")
        wait_for_starts(6)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        code, out, _ = swept("--launcher=local", "--search=tpe:16", "-j2", yaml=yaml)
    finally:
        del os.environ["PACE"]
    assert code == 0 and swept("--collect", "--search=tpe:16")[0] == 0, out
    rows = results()
    assert len(rows) == 16 and {row["state"] for row in rows} == {"done", "pruned"}, out
    assert float(rows[0]["learning_rate"]) < 0.1
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert any(int(row["step"]) < 30 for row in pruned) and min(float(row["learning_rate"]) for row in pruned) > min(
        float(row["learning_rate"]) for row in rows
    )
    count = len(starts())
    assert swept("--launcher=local", "--search=tpe:16", "-j2", yaml=yaml)[0] == 0 and len(starts()) == count


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
def guide(tmp_path) -> str:
    """The guide's example, in which a list stands where its second part has one."""
    for name in ("one", "two", "data", "venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"data/{split}.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 1000)
    return GUIDE.format(**{name: tmp_path / name for name in ("one", "two", "data", "venv", "out")})


def translated(guide: str, **changes) -> list[dict]:
    """The arguments of its runs, by the translation alone."""
    wrong: list[str] = []
    typed, verbatim = grid.read_yaml(guide, "x")
    hf_keys.check_file(typed, wrong)
    spec = hf_keys.flatten(typed, verbatim, wrong) | changes
    del spec["execution.output_dir"]
    space = grid.read(
        spec,
        {f"{section}.{key}" for section in hf_keys.KEY_SECTIONS for key in hf_keys.LIST_KEYS},
        set(),
        set(),
        ("seed", 1),
        wrong,
    )
    assert not wrong, wrong
    return [
        hf_keys.arguments(point.values, sweep.slurm.shape(sweep_section(point.values)).ranks, sweep.count_examples)
        for point in grid.product(space, sweep.normal, wrong)
    ]


def sweep_section(values: dict) -> dict:
    return {name.partition(".")[2]: value for name, value in values.items() if name.startswith("slurm.")}


def test_the_guides_keys_become_our_arguments(guide, tmp_path):
    runs = translated(guide)
    assert [(run["objective"], Path(run["init_from"]).name, run["learning_rate"]) for run in runs] == list(
        itertools.product(["dpo", "kto"], ["one", "two"], [5e-6, 1e-5, 1e-6])
    )
    steps = -(-2 * 1000 // (2 * 8 * 2 * 4))  # epochs x examples / (a device's x accumulation x nodes x GPUs)
    expected = {
        "data_dir": str(tmp_path), "dataset": "data", "beta": 0.2, "block_size": 8192, "overflow": "truncate_target", "batch_size": 2, "gradient_accumulation_steps": 64, "max_epochs": 2, "max_iters": steps, "dtype": "bfloat16",
        "eval_interval": -(-steps * 5 // 100), "wandb_log": True, "wandb_project": "salamandra_alignment", "wandb_run_name": "test_alignment", "activation_checkpointing": True,
        "attention_kernel": "flash", "parallel": "fsdp", "fsdp_offload": True, "lr_scheduler": "linear", "lr_decay_iters": steps, "min_lr": 0.0, "warmup_iters": 0, "weight_decay": 0.0, "beta2": 0.999,
    }  # fmt: skip
    for run in runs:
        assert {name: run.get(name) for name in expected} == expected


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("warmup_ratio", 0.1, {"warmup_iters": 2}), ("warmup_steps", 7, {"warmup_iters": 7}), ("max_steps", 90, {"max_iters": 90, "lr_decay_iters": 90, "eval_interval": 5}),
    ("lr_scheduler_type", "constant", {"lr_scheduler": "none"}), ("eval_steps", 10, {"eval_interval": 10}), ("eval_strategy", "epoch", {"eval_interval": 8}),
    ("eval_strategy", False, {"eval_interval": 16}), ("save_total_limit", 5, {"keep_last": 5}), ("logging_steps", 3, {"log_interval": 3}), ("report_to", ["wandb", "tensorboard"], {"tensorboard_log": True}),
    ("optim", "adafactor", {"optimizer": "adafactor"}), ("adam_epsilon", 1e-6, {"optimizer_kwargs": {"eps": 1e-6}}), ("max_grad_norm", 0.5, {"grad_clip": 0.5}), ("seed", 7, {"seed": 7}),
    ("bf16", False, {"dtype": "bfloat16"}), ("fp16", False, {"dtype": "bfloat16"}), ("save_steps", 4, {"checkpoint_interval": 4}),
])  # fmt: skip
def test_further_keys_are_translated(guide, key, value, expected):
    more = {"rl_config_args.save_strategy": "steps"} if key == "save_steps" else {}
    for run in translated(guide, **{f"rl_config_args.{key}": value}, **more):
        assert {name: run.get(name) for name in expected} == expected


def test_keys_of_one_algorithm_are_translated(guide):
    only = re.sub(r"\n *beta: .*", "", guide)
    for key, value, expected in (
        ("completion_only_loss", False, "all"),
        ("assistant_only_loss", True, "completion"),
        ("max_length", 64, None),
    ):
        (run, *_) = translated(only, **{"execution.algorithm": "sft", f"rl_config_args.{key}": value})
        assert run.get("loss_on") == expected and run["objective"] == "sft"
    with pytest.raises(UserError, match="completion_only_loss and assistant_only_loss differ"):
        translated(
            only,
            **{
                "execution.algorithm": "sft",
                "rl_config_args.completion_only_loss": False,
                "rl_config_args.assistant_only_loss": True,
            },
        )
    assert (
        translated(
            guide,
            **{
                "execution.algorithm": "dpo",
                "rl_config_args.precompute_ref_log_probs": True,
                "rl_config_args.disable_dropout": True,
            },
        )[0]["reference"]
        == "cache"
    )
    with pytest.raises(UserError, match="disable_dropout"):
        translated(guide, **{"execution.algorithm": "dpo", "rl_config_args.disable_dropout": False})


def test_what_has_no_equal_is_told_together_before_anything_is_written(swept, guide, tmp_path):
    bad = (
        guide.replace("beta: 0.2", "beta: 0.2\n    neftune_noise_alpha: 5\n    push_to_hub: true")
        .replace("attn_implementation", "attn_implementatoin")
        .replace(f'output_dir: "{tmp_path / "out"}"', "output_dir: [a, b]")
    )
    bad = bad.replace("slurm:\n", "slrm:\n").replace('venv: "', 'vnv: "')
    code, _, err = swept("--launcher=slurm", yaml=bad)
    assert code == 2
    for part in ("neftune_noise_alpha: has no equal", "push_to_hub: has no equal", "attn_implementatoin: has no equal here; did you mean attn_implementation?",
                 "output_dir: must be one absolute path, not a list", "slrm: no such section; did you mean slurm?", "vnv: no such key; did you mean venv?"):  # fmt: skip
        assert part in err, part
    assert not (tmp_path / "out").exists()
    (tmp_path / "data/train.jsonl").unlink()
    code, _, err = swept(yaml=guide)
    assert code == 2 and err.count("train.jsonl is not there") == 1
    code, _, err = swept(
        yaml=guide.replace("report_to: ", "optim: paged\n    report_to: ").replace("DSZero3Offload", "DSZero9")
    )
    assert code == 2 and "optim=paged: must be one of" in err and "distributed_config: DSZero9" in err


def test_the_guides_example_gives_twelve_jobs(swept, guide, tmp_path):
    code, _, err = swept("--launcher=slurm", yaml=guide)
    assert code == 0, err
    scripts = sorted((tmp_path / "out/slurm").glob("*.sh"))
    assert len(scripts) == len({script.name for script in scripts}) == 12
    assert all(
        "#SBATCH --time=2:00:00\n" in script.read_text()
        and "--nproc_per_node=4" in script.read_text()
        and "export WANDB_NAME=test_alignment\n" in script.read_text()
        for script in scripts
    )


def test_the_page_documents_every_key():
    page = (ROOT / "docs/sweeps.md").read_text()
    for key, row in hf_keys.KEYS.items():
        assert f"`{key}`" in page and row.words in page, key


def test_every_argument_of_the_translation_is_in_the_table():
    rows = sweep.ROWS.keys()
    words = {
        node.args[0].value
        for node in ast.walk(ast.parse((ROOT / "nanoforge/sweeps/hf_keys.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "same"
    }
    assert words <= rows, words - rows


# ---------------------------------------------------------------------------------------------------------------------
# the examples


@pytest.mark.parametrize("path", sorted((ROOT / "configs/grids").glob("*.yaml")), ids=lambda path: path.name)
def test_the_example_grids_are_whole(path):
    text = path.read_text()
    if "execution:" in text:
        pytest.skip("its models and data are the user's")
    search = ["--search=random:5"] if "low:" in text else []
    assert "runs in" in run_script(path.relative_to(ROOT), *search, script="sweep.py").stdout
