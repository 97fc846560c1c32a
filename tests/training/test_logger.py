"""Trackers and pictures that fail end no run: each is reported once, in the metrics too."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import OperatorCounts, RunFiles, file_size_limit

from nanoforge.distributed import Ranks
from nanoforge.training import logger as logging
from nanoforge.training import trackers
from nanoforge.training.grad_guard import GradGuard
from nanoforge.training.logger import RunLogger
from nanoforge.training.trackers import Tracker


@pytest.fixture
def logger(tmp_path: Path):
    logger = RunLogger(tmp_path, silent=False, start_step=0, evaluated=False, seconds=0.0, total_steps=10)
    yield logger
    logger.close()


def notes(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["text"] for line in lines if line["event"] == "note"]


def test_a_tracker_that_fails_is_reported_once_and_left_out(logger: RunLogger, tmp_path: Path):
    logged = []

    def fail(*_):
        raise ConnectionResetError("gone")

    logger.track("broken", lambda: Tracker(log=fail, close=fail))
    logger.track("absent", fail)
    logger.track("whole", lambda: Tracker(log=lambda numbers, step: logged.append((step, numbers)), close=fail))
    for step in (1, 2):
        logger.event("train", step, "", loss=float(step))
    logger.close()
    assert [(step, numbers) for step, numbers in logged if numbers] == [
        (1, {"train/loss": 1.0}),
        (2, {"train/loss": 2.0}),
    ]
    assert [note.split()[0] for note in notes(tmp_path)] == ["absent", "broken", "whole"]
    assert all("gone" in note for note in notes(tmp_path))


def test_a_terminal_shows_the_loss_and_its_curve_behind_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger = RunLogger(tmp_path, silent=False, start_step=0, evaluated=False, seconds=0.0, total_steps=3)
    for step, loss in enumerate((4.0, None, 2.0), start=1):
        logger.event("train", step, "", loss=loss)
        logger.advance()
    assert logger.bar is not None and logger.bar.postfix == "loss 2.0000 █▁"
    logger.close()
    assert "3/3" in capsys.readouterr().err


def test_tensorboard_on_a_full_disk(logger: RunLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("tensorboard")
    logger.track("tensorboard", lambda: trackers.start_tensorboard(tmp_path / "tensorboard", 0))
    with file_size_limit(300):  # it writes in a thread, and the metrics find no room either
        for step in range(1, 1000):
            logger.event("train", step, "", loss=0.5)
            if not logger.trackers:
                break
            time.sleep(0.005)
        assert not logger.trackers
    logger.event("train", 1000, "", loss=0.5)
    logger.close()
    console = capsys.readouterr()
    assert sum(line.startswith("tensorboard failed") for line in console.out.splitlines()) == 1
    assert "Traceback" not in console.err


@pytest.mark.slow
def test_wandb_whose_process_is_killed(logger: RunLogger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger.track("wandb", lambda: trackers.start_wandb(tmp_path, "project", "name", {}))
    logger.event("train", 1, "", loss=0.5)
    assert notes(tmp_path) == []
    children = subprocess.run(["pgrep", "-f", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True)
    for pid in children.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
        os.waitpid(int(pid), 0)
    for step in range(2, 6):
        logger.event("train", step, "", loss=0.5)
    logger.close()
    assert sum("wandb" in note for note in notes(tmp_path)) == 1
    assert (tmp_path / "metrics.jsonl").read_text().count('"event": "train"') == 5


def test_a_picture_of_losses_that_are_null_in_a_folder_with_a_dollar(tmp_path: Path):
    """matplotlib reads what stands between dollars as mathematics."""
    folder = tmp_path / r"a$_b$\frac"
    folder.mkdir()
    lines = [
        {"event": "train", "step": 1, "loss": 2.0},
        {"event": "train", "step": 2, "loss": None},
        {"event": "eval", "step": 2, "train_loss": None, "val_loss": None},
        {"event": "eval", "step": 4, "train_loss": 1.0, "val_loss": 1.5},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for content in ("", text, text + '{"event": "tr'):
        (folder / "metrics.jsonl").write_text(content)
        logging.draw_loss(folder / "metrics.jsonl", folder / "loss.png")
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
        (folder / "loss.png").unlink()


def test_a_picture_that_cant_be_drawn_is_reported_once(
    run: Callable[..., RunFiles], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.draw_loss", fail)
    done = run("--plot_loss", "--max_iters=4", "--eval_interval=2")
    assert done.steps[-1] == 4
    assert sum("--plot_loss" in note for note in notes(tmp_path / "run")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# training steps


def test_a_logged_step_reads_the_device_once(logger: RunLogger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All its metrics, the norm of the gradient and the counts of skipped steps in one copy, and 0 / 0 as null."""
    copies = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: copies.append(tensor) or to_list(tensor))
    cpu = torch.device("cpu")
    guard = GradGuard(0.0, cpu)
    for norm in (1.0, math.nan, math.inf, 2.0):
        guard.should_skip(torch.tensor(norm))
    step_logger = logging.StepLogger(
        logger=logger,
        ranks=Ranks(0, 1, cpu),
        guard=guard,
        log_interval=1,
        total_steps=4,
        peak_tokens_per_second=None,
        log_data_hash=False,
    )
    step_logger.restart(3, 30)
    metrics = {"loss": torch.tensor([[6.0, 3.0], [2.0, 1.0]]), "kl": torch.tensor([0.0, 0.0])}
    with OperatorCounts() as operators:
        max_consecutive = step_logger.log_step(4, 40, metrics, lr=0.5, grad_norm=torch.tensor(2.0), data_hash=0)
    assert (len(copies), operators.numbers_read, max_consecutive) == (1, 0, 2)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert [line[name] for name in ("loss", "kl", "grad_norm", "skipped", "tokens")] == [3.0, None, 2.0, 2, 40]
