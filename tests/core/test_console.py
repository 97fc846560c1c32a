"""A console that is full, closed or of another encoding costs its lines alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from nanoforge import console

COMMAND = """
import sys
from pathlib import Path
import configurator

def main(path):
    print("é Σ", flush=True)
    print("é Σ", file=sys.stderr, flush=True)
    Path(path).touch()

configurator.run(main, sys.argv[1], output_is_required="required" in sys.argv)
"""


def run_command(shell_line: str, *argv: str, encoding: str = "utf-8") -> subprocess.CompletedProcess:
    """Run COMMAND by a shell, which redirects its output."""
    command = ["sh", "-c", f'exec "$@" {shell_line}', "sh", sys.executable, "-c", COMMAND, *argv]
    env = os.environ | {"PYTHONIOENCODING": encoding}
    return subprocess.run(command, capture_output=True, cwd=ROOT, env=env)


@pytest.mark.parametrize("redirection", ["> /dev/full", "2> /dev/full", "> /dev/full 2>&1", ">&- 2>&-"])
def test_a_console_that_cant_be_written_ends_nothing(redirection: str, tmp_path: Path):
    done = run_command(redirection, str(tmp_path / "reached"))
    assert done.returncode == 0
    assert Path(tmp_path / "reached").exists()
    assert b"Traceback" not in done.stderr


def test_characters_that_the_console_does_not_have_are_escaped(tmp_path: Path):
    assert run_command("", str(tmp_path / "reached"), encoding="ascii").stdout == b"\\xe9 \\u03a3\n"
    assert run_command("", str(tmp_path / "reached"), encoding="latin-1").stdout == b"\xe9 \\u03a3\n"
    assert run_command("", str(tmp_path / "reached")).stdout.decode() == "é Σ\n"


def test_output_that_a_command_is_run_for_is_a_failure(tmp_path: Path):
    done = run_command("> /dev/full", str(tmp_path / "reached"), "required")
    assert done.returncode == 1
    assert not Path(tmp_path / "reached").exists()
    assert done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr


def test_a_curve_has_all_values_in_its_width() -> None:
    """Means of equally many: a fall is a fall at any length."""
    for count in (1, 2, 19, 20, 21, 1000, 12345):
        curve = console.Curve()
        for value in range(count, 0, -1):
            curve.add(float(value))
        text = curve.draw()
        heights = [console.Curve.BLOCKS.index(block) for block in text]
        assert len(text) <= console.Curve.WIDTH and heights == sorted(heights, reverse=True)
        assert len(text) >= min(count, console.Curve.WIDTH // 2) and (count == 1 or (heights[0], heights[-1]) == (7, 0))
    half = console.Curve()
    for step in range(10_240):
        half.add(float(step < 5_120))
    assert half.draw().count("█") == half.draw().count("▁") == len(half.draw()) / 2  # each mean is of equally many
    assert console.Curve().draw() == curve.draw("ascii") == ""
