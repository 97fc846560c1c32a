"""Shells complete the arguments of the tables: each script is run by its shell, where that is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

import configurator
import sample
import train_args

BASH = """
try() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
  _nanoforge 2>/dev/null  # compopt works only while readline completes
  echo "${COMPREPLY[*]}"
}
"""
TRIES = {  # words as bash splits them, at = too
    "python train.py --norm = rmsnorm_": "rmsnorm_nogain rmsnorm_offset",
    "python3 ./train.py --norm l": "layernorm",
    "torchrun --standalone train.py --log_i": "--log_interval=",
    "python train.py --no-plot": "--no-plot_loss",
    "python train.py --tensorb": "--tensorboard_log",
    "python train.py --learning_rate = R": "",
    "python train.py --out_dir = REA": "README.md",
    "python train.py configs/quickst": "configs/quickstart.py",
    "python sample.py --temp": "--temperature=",
    "python other.py READ": "README.md",
}


def script(shell: str, capsys: pytest.CaptureFixture[str], command: str = "train") -> str:
    """What --completion prints for a command."""
    table: type = {"train": train_args.TrainArgs, "sample": sample.SampleArgs}[command]
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as end:
        monkeypatch.setattr("sys.argv", [f"somewhere/{command}.py"])
        configurator.parse(table, [f"--completion={shell}"], "")
    assert end.value.code == 0
    return capsys.readouterr().out


def run_shell(*command: str) -> str:
    """The output of a shell; skips the test where it is not installed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bash_completes_flags_choices_and_files_of_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [script("bash", capsys), script("bash", capsys, "sample"), BASH, *(f"try {words}" for words in TRIES)]
    assert run_shell("bash", "-c", "\n".join(lines)).split("\n")[:-1] == list(TRIES.values())


def test_fish_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.fish").write_text(script("fish", capsys))
    typed = "complete -C 'python train.py --norm=l'; complete -C 'python train.py --lr_sche'"
    found = run_shell("fish", "--no-config", "-c", f"source {tmp_path}/c.fish; {typed}")
    assert [line.split("\t")[0] for line in found.splitlines()] == ["--norm=layernorm", "--lr_scheduler"]


def test_zsh_reads_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.zsh").write_text(script("zsh", capsys))
    defined = run_shell(
        "zsh", "-f", "-c", f"compdef() {{ echo $* }}; source {tmp_path}/c.zsh; which _nanoforge_train_py"
    )
    assert defined.startswith("_nanoforge python") and "--norm=[normalization layer]" in defined


def test_help_of_a_topic(capsys: pytest.CaptureFixture[str]) -> None:
    """A group by its title, an argument by its name, alias or other programs' name, or else a word of the help."""
    parser = configurator.build_parser(configurator.arg_groups(train_args.TrainArgs), "")
    flags = {f"--{name}" for name in configurator.arg_specs(train_args.TrainArgs)}

    def shown(*argv: str) -> set[str]:
        with pytest.raises(SystemExit) as end:
            parser.parse_known_args(list(argv))
        assert end.value.code == 0
        return {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip().startswith("--")}

    optimizer = {f"--{spec.name}" for spec in configurator.arg_groups(train_args.TrainArgs)["optimizer"]}
    assert shown("--help", "optimizer") == shown("--help=Optimizer") == optimizer
    assert shown("--help", "wd") == {"--weight_decay"} and "--learning_rate" in shown("-h", "lr")
    assert shown("--help", "bitsandbytes") == {"--quantize_base"}
    assert shown("--help") > flags and shown("--help", "configs/quickstart.py") > flags
    with pytest.raises(configurator.UserError, match=r"--help=optimzer: .*; did you mean optimizer"):
        parser.parse_known_args(["--help=optimzer"])
