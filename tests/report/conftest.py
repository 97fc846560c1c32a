"""Fixtures of the report's tests: run folders as train.py writes them, and what the page shows of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import HOSTILE, N_STEPS, falling_loss, metrics_lines, tiny_model

from nanoforge.report import page
from nanoforge.report.read_runs import RunReader


@pytest.fixture
def write_run(tmp_path: Path):
    """write_run(name, note=, loss=, eval_metrics=, **args) writes out/name: 20 steps of 64 tokens, 5 evaluations."""

    def write_run(
        name: str,
        *,
        note: str = f"finished: {N_STEPS} steps",
        loss: Callable[[int], float] = falling_loss,
        eval_metrics: dict | None = None,
        **args,
    ) -> Path:
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        args = {
            "out_dir": str(folder),
            "dataset": "a",
            "learning_rate": 1e-3,
            "seed": 1,
            "batch_size": 8,
            "gradient_accumulation_steps": 1,
            "block_size": 8,
        } | args
        model = tiny_model(args.get("n_embd", 16))
        counts = {"parameters": model.count_parameters(), "flops_per_token": model.flops_per_token()}
        record = args | {"_counts": counts, "_about": {"git_commit": "0" * 40}}
        (folder / "train_config.json").write_text(json.dumps(record))
        lines = metrics_lines(loss, eval_metrics or {}, note)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write_run


@pytest.fixture
def write_hostile_run(write_run):
    """write_hostile_run() writes a run whose name, arguments, notes, metrics and samples attack a page."""

    def write_hostile_run() -> Path:
        samples = [{"prompt": HOSTILE, "completion": HOSTILE, "reward": 0.5}, {"completion": 7}, "bare", {}]
        metrics = {"samples": samples, HOSTILE: 1.0, "val_loss/<i>": 2.0, "constructor": 3.0, "__proto__": 4.0}
        return write_run("run <b>$\\frac$", note=HOSTILE, dataset=HOSTILE, eval_metrics=metrics)

    return write_hostile_run


@pytest.fixture
def payload_of():
    """payload_of(path, ...) is what the page shows of the runs there."""

    def payload_of(*paths: Path, by: str = "best") -> dict:
        runs, empty_paths = RunReader([str(path) for path in paths], 400).read()
        return page.payload(runs, empty_paths, by)

    return payload_of
