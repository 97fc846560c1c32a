"""Paths as people type them: ~ after an =, names that are too long, folders that can't be written."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, file_size_limit

import configurator
import evaluate
import export
import report
import sample
import train_args
from data.prepare import PrepareArgs
from nanoforge import files

TABLES = (train_args.TrainArgs, sample.SampleArgs, evaluate.EvaluateArgs, report.ReportArgs, PrepareArgs)
PATHS = {(table, spec.name): spec for table in TABLES for spec in configurator.arg_specs(table).values() if spec.path}


@pytest.mark.parametrize("key", PATHS, ids=lambda key: f"{key[0].__name__}.{key[1]}")
def test_a_leading_tilde_is_the_home_folder(key: tuple[type, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/some/home")
    value = configurator.convert(PATHS[key], "~/a")
    assert value in (os.path.expanduser("~/a"), (os.path.expanduser("~/a"),))
    assert configurator.convert(PATHS[key], "a~/b") in ("a~/b", ("a~/b",))


def test_the_table_knows_its_paths():
    names = {name for _, name in PATHS}
    assert names >= {"out_dir", "data_dir", "init_from", "train_file", "dataset_list", "json", "tasks", "out", "input"}
    assert configurator.arg_specs(export.ExportArgs)["to"].path


@pytest.mark.parametrize("flag", ["--out_dir", "--init_from", "--data_dir", "--task_name"])
@pytest.mark.parametrize("path", ["x" * 256, "a/" + "é" * 128 + "/b"])
def test_names_that_no_file_system_allows_are_refused(capsys: pytest.CaptureFixture[str], flag: str, path: str):
    with pytest.raises(SystemExit) as end:
        train_args.parse([f"{flag}={path}"])
    assert end.value.code == 2
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "init_from"),
    [
        (["--resume=1"], "resume"),
        (["--resume", "1"], "resume"),
        (["--resume=Yes"], "resume"),
        (["--resume"], "resume"),
        (["--resume=0"], "scratch"),
        (["--no-resume"], "scratch"),
        (["--init_from=gpt2", "--resume=false"], "gpt2"),
    ],
)
def test_resume_takes_what_other_flags_take(tmp_path: Path, argv: list[str], init_from: str):
    (tmp_path / "train_config.json").write_text("{}")
    assert train_args.parse([f"--out_dir={tmp_path}", *argv]).init_from == init_from


def test_resume_with_a_folder_says_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        train_args.parse(["--resume=out/a"])
    assert "--out_dir" in capsys.readouterr().err


def test_a_file_that_cant_be_opened_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def main(args: Any):
        (tmp_path / "missing" / "file").write_text("")

    with pytest.raises(SystemExit) as end:
        configurator.run(main, None)
    error = capsys.readouterr().err
    assert end.value.code == 2 and str(tmp_path / "missing" / "file") in error and error.count("\n") == 1


def test_ctrl_c_during_the_imports_has_no_traceback():
    code = (
        "import os, signal, configurator; configurator.exit_on_interrupt()\n"
        "try: os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException: print('caught')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_write_to_a_full_disk_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def main(args: Any):
        files.write_text(tmp_path / "page.html", "x" * 1000)

    with file_size_limit(100), pytest.raises(SystemExit) as end:
        configurator.run(main, None)
    assert end.value.code == 2
    assert capsys.readouterr().err.count(f"{tmp_path / 'page.html'}: File too large") == 1
    assert list(tmp_path.iterdir()) == []
