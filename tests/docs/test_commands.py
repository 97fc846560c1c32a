"""Every command of every page has arguments that the command takes: they are parsed and checked in this process.

What only the reader's files could show is left out: a run, a model or a file that a page names is not there.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from generated_pages import generate, load
from helpers import ROOT
from page_commands import PAGES, Command, inline, of_page

import bench
import configurator
import evaluate
import export
import report
import sample
import sweep
import train_args
from configurator import Rules

READERS_FILES = re.compile(r"no such (file|checkpoint)|no run in|can't be read|has no (train|sample)\.py")
LEFT_OUT = re.compile(r"require[ds]|is needed|needs a value|usage: ")  # where ... stands for more, or within a line
ELLIPSIS = "..."
# Commands of other programs: what they do is not this program's.
OTHER_PROGRAMS = (
    r"python3 -m venv \.venv",
    r"source \.venv/bin/activate",
    r"(\.venv/bin/)?pip install .*",
    r"\.venv/bin/(ruff|mypy|pre-commit) ?.*",
    r"\.venv/bin/python -m pytest( .*)?",
    r"git clone .*",
    r"curl .*",
    r"python clean\.py",  # of the page itself
    r"\(?cd .*",
    r"M=.*",  # a variable of the shell
)


class RefusedError(Exception):
    """What a command says of its arguments before it ends."""


def parse_sweep(argv: list[str]) -> None:
    _, errors = sweep.read_request(argv)
    if errors:
        configurator.exit_with_errors(errors)


def parse_report(argv: list[str]) -> None:
    folders, flags = report.split_folders(argv)
    assert folders
    configurator.parse(report.ReportArgs, flags, "")


def parse_other(script: str, argv: list[str]) -> None:
    """A script with a table of its own; a prepare.py without one has data/prepare.py's with other defaults."""
    module, defaults = load(script), []
    if hasattr(module, "parse"):
        module.parse(argv)
        return
    if script.endswith("prepare.py") and not generate.tables_of(module):
        module, defaults = load("data/prepare.py"), ["--input=x", "--name=x"]
    tables = generate.tables_of(module)
    if tables:
        check = getattr(module, "check", None)
        rules = Rules(check=lambda args, source: list(check(args, source))) if check else Rules()
        configurator.parse(tables[0], [*defaults, *argv], "", rules)


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "train.py": train_args.parse,
    "sample.py": lambda argv: configurator.parse(sample.SampleArgs, argv, "", Rules(check=sample.check)),
    "evaluate.py": lambda argv: configurator.parse(evaluate.EvaluateArgs, argv, "", Rules(check=evaluate.check)),
    "export.py": export.parse,
    "sweep.py": parse_sweep,
    "report.py": parse_report,
    "bench.py": bench.parse,
}


def refuse(errors: list[str]) -> NoReturn:
    raise RefusedError("\n".join(errors))


def check(command: Command, *, is_whole: bool) -> list[str]:
    """What the command's script says against its arguments, but for what is no fault of the page.

    is_whole: of a command within a line nothing is missing.
    """
    argv = [word for word in command.argv if word != ELLIPSIS]
    is_whole = is_whole and argv == command.argv
    try:
        if command.script in PARSERS:
            PARSERS[command.script](argv)
        else:
            parse_other(command.script, argv)
    except RefusedError as refused:
        errors = [error for error in str(refused).splitlines() if not READERS_FILES.search(error)]
        return [f"{command}\n{error}" for error in errors if is_whole or not LEFT_OUT.search(error)]
    except SystemExit as end:
        assert not end.code
    return []


@pytest.fixture(autouse=True)
def workplace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder with the configs and no runs."""
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configurator, "exit_with_errors", refuse)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_understood(page: Path):
    refused = [error for command in inline(page) for error in check(command, is_whole=False)]
    for command in of_page(page):
        if not any(re.fullmatch(pattern, command.text) for pattern in OTHER_PROGRAMS):
            assert command.script, f"{command}: a command of this program, or a line for OTHER_PROGRAMS?"
            refused += check(command, is_whole=True)
    assert not refused, "\n".join(refused)
