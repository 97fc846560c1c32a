"""Reading run folders in every state, damaged ones too."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from model import GPT, GPTConfig
from nanoforge import run_dir
from nanoforge.errors import UserError
from nanoforge.report import read_runs


def load(folder: Path) -> read_runs.LoadedRun:
    return read_runs.read_run(folder, folder.name, 400)


def append(folder: Path, text: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


def test_a_real_run_is_read_as_it_was(run):
    done = run("--max_iters=8", "--log_interval=2", name="real")
    loaded = load(done.out_dir)
    assert (loaded.state, loaded.step, loaded.tokens, loaded.remarks) == ("done", 8, 8 * 32, [])
    assert loaded.final_loss == done.evals[-1]["val_loss"]
    assert loaded.best_loss == min(line["val_loss"] for line in done.evals[1:])
    assert list(loaded.evals["tokens"]) == [32 * line["step"] for line in done.evals]
    assert loaded.train["loss"].tolist() == done.losses
    shape = {key: tuple(value) if isinstance(value, list) else value for key, value in done.config["_model"].items()}
    model = GPT(GPTConfig(**shape))
    assert loaded.flops_per_token == model.flops_per_token()
    assert loaded.parameters == model.count_parameters()


def test_a_run_of_an_older_version_has_no_counts(write_run):
    folder = write_run("older")
    record = json.loads((folder / "train_config.json").read_text())
    del record["_counts"]
    (folder / "train_config.json").write_text(json.dumps(record))
    loaded = load(folder)
    assert (loaded.parameters, loaded.flops_per_token) == (None, None)
    assert any("FLOP" in remark for remark in loaded.remarks)
    assert loaded.state == "done"


def test_runs_in_every_state(write_run, payload_of, tmp_path: Path):
    out = tmp_path / "out"
    assert load(write_run("done")).state == "done"
    broken = write_run("broken", note="")
    append(broken, '{"event": "train", "step": 21, "lo')
    assert load(broken).state == "stopped"
    assert load(broken).remarks == ["its last line is incomplete"]
    assert load(broken).step == 20
    failed = write_run("failed", note="")
    (failed / "exit_status").write_text("1\n")
    (failed / "log.txt").write_text("step 20\nRuntimeError: out of memory\n")
    assert (load(failed).state, load(failed).reason) == ("failed", "status 1")
    assert load(failed).log_tail[-1] == "RuntimeError: out of memory"
    stopped = write_run("stopped", note="stopped by SIGTERM; --init_from=resume goes on")
    assert (load(stopped).state, load(stopped).reason) == ("stopped", "stopped by SIGTERM")
    running = write_run("running", note="")
    with run_dir.RunLock(running) as lock:
        lock.acquire()
        assert load(running).state == "running"
    (out / "new").mkdir()
    (out / "new" / "train_config.json").write_text("{}")
    assert load(out / "new").state == "new"
    (out / "odd").mkdir()
    (out / "odd" / "metrics.jsonl").write_text("")
    (out / "odd" / "train_config.json").write_text("[" * 100_000)
    assert load(out / "odd").state == "new"
    assert "train_config.json" in load(out / "odd").remarks[0]
    shown = payload_of(out)
    states = {run["name"]: run["state"] for run in shown["runs"]}
    assert states == {
        "broken": "stopped",
        "done": "done",
        "failed": "failed",
        "new": "new",
        "odd": "new",
        "running": "stopped",
        "stopped": "stopped",
    }
    assert any("6 of 7 runs" in remark for remark in shown["remarks"]), shown["remarks"]


def test_odd_records_are_read(write_run):
    """Parts of a record that have another type than train.py writes."""
    folder = write_run("run")
    record = json.loads((folder / "train_config.json").read_text())
    record |= {"_counts": [1], "_about": "x", "_data": 3, "batch_size": "8", "dataset": {"a": [None, {}]}}
    (folder / "train_config.json").write_text(json.dumps(record))
    assert load(folder).tokens == 64 * 20
    for text in ("[1]", "\udcff", "7", ""):
        (folder / "train_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert load(folder).remarks, text


def test_lines_without_meaning_are_ignored(write_run):
    folder = write_run("run")
    lines = [
        "[1]",
        '{"event": "train"}',
        '{"event": "train", "step": "x"}',
        "[" * 5000,
        '{"event": 7, "step": 1}',
        "\ud800".encode("utf-8", "surrogatepass").decode("latin1"),
    ]
    odd_values = f'"loss": NaN, "lr": true, "grad_norm": {"9" * 400}, "reward": "1.5", "deep": {{"a": 1}}'
    lines += [f'{{"event": "train", "step": 21, {odd_values}}}']
    lines += ['{"event": "train", "step": 22, "loss": null, "reward": 2}']
    append(folder, "".join(line + "\n" for line in lines))
    loaded = load(folder)
    assert "6 broken lines in metrics.jsonl ignored" in loaded.remarks
    assert "loss is not finite in 2 lines" in loaded.remarks
    assert loaded.train["reward"][-1] == 2
    assert math.isnan(loaded.train["reward"][-2])
    assert math.isnan(loaded.train["grad_norm"][-2])
    assert loaded.step == 22
    assert loaded.train["tokens"].tolist() == [64 * step for step in range(1, 23)], "on at the same pace"


def test_a_step_that_was_logged_twice_counts_as_logged_last(write_run):
    folder = write_run("run", note="")
    lines = [{"event": "note", "step": 10, "seconds": 1, "text": "resuming out/checkpoints/000010"}]
    for step in (11, 12):
        lines.append({"event": "train", "step": step, "seconds": step / 10, "loss": 9.0})
    append(folder, "".join(json.dumps(line) + "\n" for line in lines))
    loaded = load(folder)
    assert loaded.train["step"].tolist() == list(range(1, 13))
    assert loaded.train["loss"][-2:].tolist() == [9, 9]
    assert loaded.step == 15, "a checkpoint of step 15 was logged"
    assert "resumed once" in loaded.remarks
    assert any("steps go back" in remark for remark in loaded.remarks)


def test_thinning_keeps_means_maxima_and_the_best():
    generator = np.random.default_rng(0)
    loss, grad_norm = generator.normal(size=10_000), generator.random(10_000)
    loss[123] = math.nan
    thinned = read_runs.thin_out({"step": np.arange(1.0, 10_001), "loss": loss, "grad_norm": grad_norm}, 100)
    assert len(thinned["step"]) == 100
    assert thinned["step"][0] == 50.5
    assert thinned["grad_norm"].max() == grad_norm.max()
    assert thinned["loss"][2:].mean() == pytest.approx(loss[200:].mean())
    assert thinned["loss"][1] == pytest.approx(np.nanmean(loss[100:200]))
    evals = {"step": np.arange(1000.0), "val_loss": np.where(np.arange(1000) == 777, 1.0, 2.0)}
    picked = read_runs.thin_out(evals, 20)
    assert len(picked["step"]) <= 21
    assert {0.0, 777.0, 999.0} <= set(picked["step"])


def test_runs_are_found_below_folders_and_named_apart(write_run, tmp_path: Path):
    folder = write_run("a/one")
    write_run("b/one")
    (folder / "checkpoints" / "000020").mkdir(parents=True)
    (folder / "checkpoints" / "000020" / "train_config.json").write_text("{}")
    (tmp_path / "table.csv").touch()
    folders, empty_paths = read_runs.find_runs([str(tmp_path / "out"), str(folder), str(tmp_path / "table.csv")])
    assert read_runs.names_of(folders) == ["a/one", "b/one"]
    assert read_runs.names_of(folders[:1]) == ["one"]
    assert empty_paths == [str(tmp_path / "table.csv")]
    with pytest.raises(UserError, match="no such folder"):
        read_runs.find_runs([str(tmp_path / "nowhere")])
