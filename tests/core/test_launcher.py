"""An error is silent only on a rank where another one is known to report it."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, TINY, start_ranks, wait_for_exit

import builders
import train_args
from nanoforge import distributed, launcher
from nanoforge.errors import UserError

COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("env", "is_main", "names"),
    [
        ({}, True, ""),
        ({"RANK": "3", "LOCAL_RANK": "3"}, True, ""),  # left over
        ({"WORLD_SIZE": "4"}, True, "RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "4", "RANK": "3"}, True, "MASTER_ADDR, MASTER_PORT"),
        (COMPLETE | {"RANK": "2"}, True, "RANK=2"),
        (COMPLETE, False, ""),
        (COMPLETE | {"RANK": "0"}, True, ""),
    ],
)
def test_variables_of_a_launcher_count_only_together(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    env: dict[str, str],
    is_main: bool,
    names: str,
):
    for name in COMPLETE:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert launcher.is_main_process() is is_main
    assert (launcher.local_rank() == 0) is (launcher.world_size() == 1 or "LOCAL_RANK" not in env)
    assert names in (launcher.environment_error() or "")
    if names:
        with pytest.raises(SystemExit) as end:
            train_args.parse(["--device=cpu"])
        assert end.value.code == 2 and names in capsys.readouterr().err


def test_a_left_over_rank_hides_no_error():
    env = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | {"RANK": "3"}
    done = subprocess.run([sys.executable, ROOT / "train.py", "--no_such=1"], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "--no_such" in done.stderr


def fail_on_rank_1() -> None:
    """Its machine lacks the data."""
    original = builders.fingerprints

    def fingerprints(args: Any):
        if os.environ["RANK"] == "1":
            raise UserError("train.bin: no such file")
        return original(args)

    builders.fingerprints = fingerprints


@pytest.mark.slow
@pytest.mark.distributed
def test_the_rank_that_fails_alone_is_named_by_the_main_rank(data_dir: Path, tmp_path: Path):
    flags = [*TINY, f"--data_dir={data_dir}", "--dataset=a", f"--out_dir={tmp_path / 'x'}"]
    log = tmp_path / "log"
    processes = start_ranks(flags, ranks=2, log=log, prepare=fail_on_rank_1)
    assert all(wait_for_exit(process) for process in processes)
    text = log.read_text()
    assert text.count("rank 1 failed: train.bin: no such file") == 1
    assert text.count("train.bin: no such file") == 2  # once by rank 1 itself
    assert not (tmp_path / "x").exists()


def test_a_port_that_is_taken_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        for name, value in (COMPLETE | {"RANK": "0", "MASTER_PORT": str(server.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="MASTER_PORT"), distributed.join_ranks("cpu"):
            pass
