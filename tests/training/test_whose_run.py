"""Whose run is this: what a restart continues and a user names, and what resuming, pruning and overwriting spare."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import RunFiles, equal_tensors

import train_args
from nanoforge.errors import UserError
from nanoforge.models import pretrained

Runner = Callable[..., RunFiles]
Capture = pytest.CaptureFixture[str]


def test_a_damaged_newer_checkpoint_costs_no_whole_one(run: Runner):
    """With keep_last=1, what is saved after it is kept, and the damaged one counts nowhere."""
    done = run("--max_iters=6", "--eval_interval=6", "--checkpoint_interval=2", "--keep_last=3")
    (done.out_dir / "checkpoints/000006/model.safetensors").write_bytes(b"")
    shorter = ["--init_from=resume", "--eval_interval=100", "--checkpoint_interval=100", "--keep_last=1"]
    assert run(*shorter, "--max_iters=5").steps == [5]
    resumed = run("--init_from=resume", "--max_iters=6")
    assert "000005" in resumed.console
    assert resumed.steps == [6] and equal_tensors(resumed.last.weights, done.last.weights)
    assert [path.name for path in (done.out_dir / "checkpoints").iterdir()] == ["000006"]


def test_a_whole_checkpoint_is_never_written_again(run: Runner):
    """The run goes on from one that was made before its evaluation: best.json alone learns of that."""
    done = run("--max_iters=3", "--eval_interval=100", "--checkpoint_interval=2", "--keep_last=9")
    shutil.rmtree(done.out_dir / "checkpoints/000003")
    folder = done.out_dir / "checkpoints/000002"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    resumed = run("--init_from=resume", "--max_iters=2")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert [line["step"] for line in resumed.evals] == [0, 2]
    assert json.loads((done.out_dir / "best.json").read_text())["step"] == 2


def test_what_is_not_a_checkpoint_stays_in_the_folder_of_checkpoints(run: Runner, tmp_path: Path):
    """Pruning and --overwrite delete what a run has written, and nothing else."""
    notes = [
        tmp_path / "run/checkpoints" / name
        for name in ("notes.txt", "mine.old/a", "12/a", "20240101/a", "backup/000002/a")
    ]
    for note in notes:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("mine")
    run("--overwrite", "--keep_last=1")
    run("--overwrite", "--keep_last=1")
    assert all(note.exists() for note in notes)


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.safetensors", "train_config.json"])
def test_a_file_inside_a_checkpoint_names_it_or_is_refused_by_name(run: Runner, part: str):
    folder = run("--max_iters=2").out_dir / "checkpoints/000002"
    if part == "model.safetensors":
        by_file, by_folder = pretrained.load(str(folder / part)), pretrained.load(str(folder))
        assert equal_tensors(by_file.weights, by_folder.weights) and by_file.source == by_folder.source
        return
    with pytest.raises(UserError, match=f"{part}.*{folder}"):
        pretrained.load(str(folder / part))


@pytest.mark.parametrize("as_config", ["", "--config_path="])
def test_a_record_of_another_version_resumes(run: Runner, capsys: Capture, as_config: str):
    """An argument that is gone is a remark; a value that is no longer allowed is refused until a flag overrides it."""
    done = run("--max_iters=2")
    path = done.out_dir / "train_config.json"
    changed = {"gone_argument": 3, "optimizer_kwargs": [], "schedule_free": {"a": [1]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    flags = [f"{as_config}{path}"] if as_config else []
    with pytest.raises(SystemExit) as end:
        run("--init_from=resume", *flags)
    assert end.value.code == 2 and "--optimizer_kwargs" in capsys.readouterr().err
    resumed = run("--init_from=resume", *flags, "--optimizer_kwargs={}", "--max_iters=3")
    assert resumed.steps == [2, 3]
    assert not changed.keys() & resumed.config.keys() - {"optimizer_kwargs"}


def test_a_remark_names_what_another_versions_record_has(run: Runner, capsys: Capture):
    done = run("--max_iters=2")
    path = done.out_dir / "train_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gone_argument": 3}))
    train_args.parse(["--init_from=resume", f"--out_dir={done.out_dir}"])
    assert "gone_argument" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_args.parse(["--gone_argument=3"])
