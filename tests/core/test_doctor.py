"""--doctor: what it finds, what it calls broken, and that it works where torch and other packages don't."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, TINY

import doctor
import train_args
from nanoforge import device, environment
from nanoforge.environment import Package
from nanoforge.training import memory


@pytest.fixture
def examine(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """The exit status and what is printed, with two packages to look for; nothing may be written."""
    monkeypatch.setattr(environment, "look_for", lambda packages: [Package("numpy", "", "2.0"), Package("optuna", "x")])

    monkeypatch.setattr(device, "measure_matmul_flops", lambda *args: 1e10)

    def examine(*flags: str) -> tuple[int, str]:
        data = [] if any(flag.startswith("--data_dir") for flag in flags) else [f"--data_dir={data_dir}"]
        args = train_args.parse([*TINY, "--dataset=a", *data, f"--out_dir={tmp_path}/out", "--doctor", *flags])
        status = 0
        try:
            doctor.main(args)
        except SystemExit as end:
            status = int(str(end.code))
        assert not (tmp_path / "out").exists()
        return status, capsys.readouterr().out

    return examine


def found(text: str, label: str) -> str:
    """The first line with a label."""
    return next(line for line in text.splitlines() if line.startswith(f"{label} "))


def test_a_whole_machine(examine: Callable[..., tuple[int, str]]) -> None:
    status, text = examine()
    assert status == 0 and "BROKEN" not in text
    assert "float32 on cpu (as asked)" in found(text, "precision") and "tokens/s" in found(text, "step")
    assert "2 layers x 16" in found(text, "model") and "optuna             missing      x" in text


def test_data_that_are_not_there_yet(examine: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Those that a prepare.py makes are no fault, and a step is timed on random bytes; others are."""
    folder = tmp_path / "data/a"
    folder.mkdir(parents=True)
    status, text = examine(f"--data_dir={tmp_path}/data")
    assert status == 1 and f"data: {folder}" in found(text, "problem")
    (folder / "prepare.py").touch()
    status, text = examine(f"--data_dir={tmp_path}/data")
    assert status == 0 and "vocabulary 257" in found(text, "model") and [*folder.iterdir()] == [folder / "prepare.py"]


def test_a_batch_beyond_the_memory(examine: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which fit is by the plan: one more does not."""
    monkeypatch.setattr(environment, "available_memory", lambda: 10**6)
    status, text = examine("--batch_size=512")
    most = int(found(text, "fits").split()[5])
    assert status == 1 and "--batch_size=512" in found(text, "problem") and 0 < most < 512
    assert memory.largest_rows(lambda rows: 100 + 7 * rows, 100 + 7 * most, 2**16) == most
    assert memory.largest_rows(lambda rows: 100 + 7 * rows, 106, 2**16) == 0


def test_what_fails_is_named(examine: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that raises an error, and packages that are there and can't be imported."""
    monkeypatch.setattr("pilot.Trial", lambda *args: 1 / 0)
    status, text = examine()
    assert status == 1 and "ZeroDivisionError" in found(text, "problem")


def test_packages_are_looked_for_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_one").mkdir()
    (tmp_path / "broken_one/__init__.py").write_text("raise OSError('libx.so: not found')")
    (tmp_path / "broken_one-1.5.dist-info").mkdir()
    (tmp_path / "broken_one-1.5.dist-info/METADATA").write_text("Name: broken-one\nVersion: 1.5\n")
    (tmp_path / "requirements.txt").write_text("# comment\n-r a.txt\nbroken-one>=1   # gives x\nabsent-one\ntqdm\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken, absent, tqdm = environment.look_for(environment.read_requirements(tmp_path / "requirements.txt"))
    assert broken == Package("broken-one", "gives x", "1.5", "OSError: libx.so: not found")
    assert absent == Package("absent-one") and tqdm.version and not tqdm.error


def test_without_torch() -> None:
    code = (
        "import sys, runpy; sys.modules['torch'] = None; from nanoforge import environment; "
        "environment.look_for = lambda packages: []; sys.argv = ['train.py', '--doctor', '--out_dir=/tmp']; "
        "runpy.run_path('train.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "torch: can't be imported" in found(done.stdout, "problem"), done.stderr


def test_limits_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cgroup version 2, then version 1."""
    monkeypatch.setattr(environment, "CGROUPS", tmp_path)
    assert environment.core_limit() is None
    for name, text in {"cpu.max": "150000 100000", "memory.max": "5000", "memory.current": "2000"}.items():
        (tmp_path / name).write_text(f"{text}\n")
    assert (environment.core_limit(), environment.available_memory()) == (1.5, 3000)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert environment.core_limit() is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert environment.core_limit() == 2
