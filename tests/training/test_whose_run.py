"""Whose run is this: what a restart continues and a user names, and what resuming, pruning and overwriting spare."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import TINY, RunFiles, equal_tensors, metric, read_run

import start
import train
import train_args
from builders import load_model
from nanoforge import run_dir, run_state
from nanoforge.errors import UserError
from nanoforge.models import pretrained
from nanoforge.report import read_runs
from nanoforge.training import checkpoint

Runner = Callable[..., RunFiles]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "c", "SLURM_RESTART_COUNT": "0"}
ARRAY = SLURM | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
JOBS = {
    "torchrun": (TORCHRUN, TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"}),
    "elastic": (TORCHRUN, TORCHRUN),  # a host has joined: torchrun counts no restart
    "slurm": (SLURM, SLURM | {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_NUM_NODES": "1"}),
    "array": (ARRAY, ARRAY | {"SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "1"}),
}


def contents(folder: Path) -> dict[Path, bytes]:
    """All files of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def set_job(monkeypatch: Patch, env: dict[str, str]) -> None:
    for name in [*TORCHRUN, *ARRAY]:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


# ---------------------------------------------------------------------------------------------------------------------
# restarts


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_restart_continues_what_its_job_began(run: Runner, monkeypatch: Patch, job: str):
    first, second = JOBS[job]
    set_job(monkeypatch, first)
    done = run("--checkpoint_interval=1", "--keep_last=9")
    run_id = run_dir.RunRecord.load(done.out_dir).run["id"]
    for step in (3, 4):
        shutil.rmtree(done.out_dir / f"checkpoints/{step:06d}")
    set_job(monkeypatch, second)
    resumed = run("--checkpoint_interval=1", "--keep_last=9")
    assert "resuming" in resumed.console and "000002" in resumed.console
    assert equal_tensors(resumed.last.weights, done.last.weights)
    assert metric(resumed, "step") == [1, 2, 3, 4]
    assert run_dir.RunRecord.load(done.out_dir).run["id"] == run_id

    shutil.rmtree(done.out_dir / "checkpoints")
    again = run("--checkpoint_interval=1", "--keep_last=9")
    assert again.losses == done.losses, "what had no checkpoint began anew"


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("n_checkpoints", [0, 1])
def test_a_restart_leaves_another_run_alone(run: Runner, monkeypatch: Patch, job: str, n_checkpoints: int):
    """The refusal that torchrun takes for a crash stands, and lists the arguments that differ."""
    done = run("--max_iters=2", "--learning_rate=0.5")
    if not n_checkpoints:
        shutil.rmtree(done.out_dir / "checkpoints/000002")
        (done.out_dir / "checkpoints/notes.txt").write_text("mine")
    before = contents(done.out_dir)
    for env in JOBS[job]:
        set_job(monkeypatch, env)
        with pytest.raises(UserError, match=r"--max_iters=3 \(there 2\).*--overwrite"):
            run("--max_iters=3", "--learning_rate=0.5")
        assert contents(done.out_dir) == before


@pytest.mark.parametrize("job", ["torchrun", "slurm"])
def test_a_restart_with_edited_arguments_is_refused(run: Runner, monkeypatch: Patch, job: str):
    """With --overwrite too: a config that was edited while the job waited deletes no work."""
    first, second = JOBS[job]
    set_job(monkeypatch, first)
    done = run("--max_iters=2", "--overwrite")
    set_job(monkeypatch, second)
    before = contents(done.out_dir)
    with pytest.raises(UserError, match=r"--max_iters=3 \(there 2\)"):
        run("--max_iters=3", "--overwrite")
    assert contents(done.out_dir) == before


@pytest.mark.slow
def test_a_torchrun_of_the_same_id_starts_over_when_asked_to(run: Runner, monkeypatch: Patch):
    """Its user has chosen the id: the same command with --overwrite is a new one once the run has finished."""
    set_job(monkeypatch, TORCHRUN)
    first = run("--max_iters=2", "--overwrite")
    second = run("--max_iters=2", "--overwrite")
    assert "resuming" not in second.console and second.losses == first.losses


@pytest.mark.slow
def test_a_restarted_task_takes_the_folder_that_it_began(data_dir: Path, tmp_path: Path, monkeypatch: Patch):
    """Two runs of one task, of which the first is restarted; both began in the same second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start.time, "strftime", lambda _: "20260101_000000")
    flags = [*TINY, f"--data_dir={data_dir}", "--dataset=a", "--task_name=t"]
    for job, seed in (("1", "--seed=1"), ("2", "--seed=2")):
        set_job(monkeypatch, SLURM | {"SLURM_JOB_ID": job})
        train.main(train_args.parse([*flags, seed]))
    first, second = (tmp_path / f"outputs/t/20260101_000000{suffix}" for suffix in ("", "_2"))
    before = contents(second)
    shutil.rmtree(first / "checkpoints/000004")
    set_job(monkeypatch, SLURM | {"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "1"})
    train.main(train_args.parse([*flags, "--seed=1"]))
    assert read_run(first).steps[-1] == 4
    assert contents(second) == before
    train.main(train_args.parse([*flags, "--seed=3"]))  # a further run of the same job
    shutil.rmtree(second.with_name("20260101_000000_3"))
    with pytest.raises(UserError):
        train.main(train_args.parse([*flags, "--seed=3", "--dataset=none"]))
    assert len(list((tmp_path / "outputs/t").iterdir())) == 2, "what failed before it began leaves no folder"


# ---------------------------------------------------------------------------------------------------------------------
# what a user names


def resume(*flags: object) -> None:
    train.main(train_args.parse(["--resume=true", *map(str, flags)]))


@pytest.mark.slow
@pytest.mark.parametrize("origin_is_gone", ["", "gone"])
def test_a_copied_folder_is_resumed_where_its_config_lies(run: Runner, tmp_path: Path, origin_is_gone: str):
    first = run("--max_iters=4", name="a")
    (first.out_dir / run_dir.TRACKER_FILES[0]).write_text("tracked")
    copy = tmp_path / "b"
    shutil.copytree(first.out_dir, copy)
    if origin_is_gone:
        shutil.rmtree(first.out_dir)
    before = contents(first.out_dir)
    resume(f"--config_path={copy / 'checkpoints/000004/train_config.json'}", "--max_iters=6")
    assert contents(first.out_dir) == before
    assert read_run(copy).steps[-1] == 6
    resume(f"--config_path={copy / 'train_config.json'}", "--max_iters=8")
    assert read_run(copy).steps[-1] == 8 and contents(first.out_dir) == before

    record = run_dir.RunRecord.load(copy)
    assert record.args["out_dir"] == str(copy)
    assert ("parent" in record.run) == (not origin_is_gone), "a copy beside its original is another run"
    assert (copy / run_dir.TRACKER_FILES[0]).exists() == bool(origin_is_gone)


@pytest.mark.slow
def test_a_config_overwrites_the_folder_that_it_lies_in(run: Runner, tmp_path: Path):
    first = run("--max_iters=2", name="a")
    shutil.copytree(first.out_dir, tmp_path / "b")
    before = contents(first.out_dir)
    train.main(train_args.parse([str(tmp_path / "b/train_config.json"), "--overwrite", "--max_iters=3"]))
    assert read_run(tmp_path / "b").steps[-1] == 3
    assert contents(first.out_dir) == before


@pytest.mark.slow
def test_an_older_checkpoint_is_honoured(run: Runner, tmp_path: Path):
    """In its folder it would replace later ones, which is refused; it may begin a branch, or replace them if asked."""
    first = run("--checkpoint_interval=1", "--keep_last=9", "--max_iters=4", "--dropout=0.1", name="a")
    before = contents(first.out_dir)
    config = f"--config_path={first.out_dir / 'checkpoints/000003/train_config.json'}"
    for named in ([config], ["--checkpoint=3", f"--out_dir={first.out_dir}"]):
        with pytest.raises(UserError, match=r"000004.*--out_dir.*--overwrite"):
            resume(*named)
    assert contents(first.out_dir) == before

    by_path = [f"--resume_from_checkpoint={first.out_dir / 'checkpoints/000003'}"]
    for named, name in ((by_path, "b"), ([config], "c")):
        resume(*named, f"--out_dir={tmp_path / name}")
        branch = read_run(tmp_path / name)
        assert contents(first.out_dir) == before
        assert {2, 3, 4} >= set(branch.steps) >= {3, 4}
        assert metric(branch, "step") == [1, 2, 3, 4] and branch.losses == first.losses
        assert equal_tensors(branch.last.weights, first.last.weights)
        assert run_dir.RunRecord.load(branch.out_dir).run["parent"]["folder"] == str(first.out_dir)
        with pytest.raises(UserError, match="already holds a run"):
            resume(*named, f"--out_dir={tmp_path / name}")

    resume("--checkpoint=1", f"--out_dir={first.out_dir}", "--overwrite", "--max_iters=2")
    again = read_run(first.out_dir)
    assert again.steps == [1, 2] and again.losses == first.losses[:2]


@pytest.mark.slow
def test_the_newest_checkpoint_may_be_named_and_a_restart_goes_on_from_there(run: Runner, monkeypatch: Patch):
    first = run("--max_iters=4", name="a")
    command = [f"--config_path={first.out_dir / 'checkpoints/000004/train_config.json'}", "--steps=8"]
    set_job(monkeypatch, SLURM)
    resume(*command)
    assert read_run(first.out_dir).steps == [4, 6, 8], "what the command names is kept"
    shutil.rmtree(first.out_dir / "checkpoints/000008")
    set_job(monkeypatch, SLURM | {"SLURM_RESTART_COUNT": "1"})
    resume(*command)
    assert metric(read_run(first.out_dir), "step") == list(range(1, 9))
    set_job(monkeypatch, {})
    train.main(train_args.parse(["--resume_from_checkpoint=True", f"--out_dir={first.out_dir}", "--max_iters=9"]))
    assert read_run(first.out_dir).steps[-1] == 9


@pytest.mark.slow
def test_names_of_checkpoints_that_are_none_are_refused(run: Runner, tmp_path: Path, capsys: Capture):
    first = run("--max_iters=2", name="a")
    folder = first.out_dir / "checkpoints/000002"
    shutil.copytree(folder, tmp_path / "alone")
    for flags, message in (
        (["--checkpoint=3", f"--out_dir={first.out_dir}"], "000002"),
        ([f"--checkpoint={first.out_dir}", f"--out_dir={first.out_dir}"], "000002"),
        ([f"--out_dir={folder}"], f"--checkpoint={folder}"),
        ([f"--checkpoint={tmp_path / 'alone'}"], "--out_dir"),
        ([f"--config_path={tmp_path / 'alone/train_config.json'}"], "--out_dir"),
        (["--overwrite", f"--out_dir={first.out_dir}"], "--checkpoint"),
    ):
        with pytest.raises(SystemExit) as end:
            resume(*flags)
        assert end.value.code == 2 and message in capsys.readouterr().err
    resume(f"--checkpoint={tmp_path / 'alone'}", f"--out_dir={tmp_path / 'b'}", "--max_iters=3")
    assert read_run(tmp_path / "b").steps == [2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert [note for note in notes if not note.exists()] == []


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.safetensors", "train_config.json"])
def test_a_file_inside_a_checkpoint_names_it_or_is_refused_by_name(run: Runner, part: str):
    folder = run("--max_iters=2").out_dir / "checkpoints/000002"
    if part == "model.safetensors":
        by_file, by_folder = pretrained.load(str(folder / part)), pretrained.load(str(folder))
        assert equal_tensors(by_file.weights, by_folder.weights) and by_file.source == by_folder.source
        return
    with pytest.raises(UserError, match=f"{part}.*{folder}"):
        pretrained.load(str(folder / part))


@pytest.mark.slow
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


# ---------------------------------------------------------------------------------------------------------------------
# the base of an adapter

LORA = ["--adapter=lora", "--max_iters=2", "--learning_rate=1e-2"]


@pytest.fixture
def on_base(run: Runner) -> tuple[RunFiles, RunFiles]:
    """A run, and a LoRA on its best checkpoint, in one folder."""
    first = run("--max_iters=4", name="both/a")
    return first, run(*LORA, f"--init_from={first.out_dir}", name="both/lora")


def logits(out_dir: Path, base_model: str = "") -> torch.Tensor:
    idx = torch.arange(8).view(1, 8)
    with torch.no_grad():
        return load_model("resume", str(out_dir), base_model=base_model).model(idx)


def test_a_base_is_found_beside_its_run_or_where_the_user_says(on_base: tuple[RunFiles, RunFiles], tmp_path: Path):
    lora = on_base[1]
    expected = logits(lora.out_dir)
    base_checkpoint = Path(lora.config["_base"]["source"])
    shutil.move(tmp_path / "both", tmp_path / "moved")
    moved = tmp_path / "moved/lora"
    assert torch.equal(logits(moved), expected)
    shutil.copytree(tmp_path / "moved/a/checkpoints" / base_checkpoint.name, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "moved/a")
    with pytest.raises(UserError, match=rf"{base_checkpoint}.*--base_model") as refused:
        logits(moved)
    assert "--init_from" not in str(refused.value)
    assert torch.equal(logits(moved, str(tmp_path / "elsewhere")), expected)

    weights = checkpoint.read_tensors(tmp_path / "elsewhere/model.safetensors")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "elsewhere", other)
    checkpoint.write_tensors(other / "model.safetensors", {name: tensor + 1 for name, tensor in weights.items()})
    checkpoint.write_manifest(other)
    with pytest.raises(UserError, match="does not hold the weights"):
        logits(moved, str(other))
    with pytest.raises(UserError, match="need no base"):
        load_model(str(other), base_model=str(other))

    resume(f"--out_dir={moved}", f"--base_model={tmp_path / 'elsewhere'}", "--max_iters=3")
    record = run_dir.RunRecord.load(moved)
    assert record.base["source"] == str(tmp_path / "elsewhere") and record.args["base_model"] == ""
    assert logits(moved).isfinite().all()


@pytest.mark.slow
def test_a_base_is_neither_pruned_nor_overwritten(run: Runner, on_base: tuple[RunFiles, RunFiles], tmp_path: Path):
    base, lora = on_base
    step = int(Path(lora.config["_base"]["source"]).name)
    expected = logits(lora.out_dir)
    run("--init_from=resume", "--max_iters=12", "--keep_last=1", name="both/a")
    assert step in read_run(base.out_dir).steps
    assert torch.equal(logits(lora.out_dir), expected)
    shutil.copytree(base.out_dir, tmp_path / "copy")
    run_dir.write_best(tmp_path / "copy", step=12, val_loss=0.0)
    assert torch.equal(logits(lora.out_dir, str(tmp_path / "copy")), expected), "the run is named, its step known"
    before = contents(base.out_dir)
    with pytest.raises(UserError, match=str(lora.out_dir)):
        run("--overwrite", name="both/a")
    assert contents(base.out_dir) == before
    shutil.rmtree(lora.out_dir)
    assert run("--overwrite", "--max_iters=2", name="both/a").steps == [2]
    assert not list((base.out_dir / "checkpoints").glob("*.needed"))


# ---------------------------------------------------------------------------------------------------------------------
# before the start


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--wandb_log"],
        ["--tensorboard_log"],
        ["--plot_loss"],
        ["--dataset=none"],
        ["--optimizer=no:Class"],
        ["--init_from=none"],
        ["--batch_size=3", "--gradient_accumulation_steps=1", "--objective=sft"],
    ],
    ids=lambda flags: flags[0],
)
def test_what_fails_before_training_claims_and_deletes_nothing(run: Runner, monkeypatch: Patch, flags: list[str]):
    """The real wandb without a login, and packages that are there but broken."""
    wandb = pytest.importorskip("wandb") if "--wandb_log" in flags else None
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    if wandb:
        wandb.teardown()  # it keeps the settings of other tests in this process
    for module in ("torch.utils.tensorboard", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    done = run("--max_iters=2")
    before = contents(done.out_dir)
    for name, more in (("run", ["--overwrite"]), ("new", [])):
        with pytest.raises((UserError, SystemExit)):
            run(*flags, *more, name=name)
    assert contents(done.out_dir) == before
    assert not done.out_dir.with_name("new").exists()
    if wandb:
        wandb.teardown()


@pytest.mark.slow
def test_a_finished_run_names_what_is_to_be_raised(run: Runner):
    run("--max_iters=2")
    assert "--max_iters=2" in run("--init_from=resume").console
    assert "--max_tokens=64" in run("--init_from=resume", "--max_tokens=64", "--max_iters=5").console
    assert "--max_iters=3" not in run("--init_from=resume", "--max_iters=3", "--max_tokens=0").console


@pytest.mark.slow
def test_a_folder_reached_by_a_link_is_the_same_run(run: Runner, tmp_path: Path):
    first = run("--max_iters=2", name="a")
    (first.out_dir / run_dir.TRACKER_FILES[0]).write_text("tracked")
    (tmp_path / "latest").symlink_to(first.out_dir)
    run_id = run_dir.RunRecord.load(first.out_dir).run["id"]
    assert run("--init_from=resume", "--max_iters=3", name="latest").steps == [2, 3]
    assert run_dir.RunRecord.load(first.out_dir).run["id"] == run_id
    assert (first.out_dir / run_dir.TRACKER_FILES[0]).exists()


@pytest.mark.slow
def test_losses_of_other_data_are_not_compared(run: Runner):
    """The best that sweeps and reports read is that of best.json, which begins anew with another dataset."""
    first = run("--max_iters=4", "--learning_rate=1e-2")
    resumed = run("--init_from=resume", "--dataset=b", "--allow_data_change", "--max_iters=6", "--learning_rate=1")
    best = json.loads((first.out_dir / "best.json").read_text())
    status = run_state.run_status(first.out_dir)
    assert (status.best_step, status.best_val_loss) == (best["step"], best["val_loss"]) and best["step"] > 4
    assert min(line["val_loss"] for line in resumed.evals) < best["val_loss"]
    loaded = read_runs.read_run(first.out_dir, "run", 100)
    assert (loaded.best_step, loaded.best_loss) == (best["step"], best["val_loss"])
