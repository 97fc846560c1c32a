"""Checkpoints: save atomically, verify, load, find the newest undamaged one, delete old ones.

    checkpoints/000040/  model.safetensors  optimizer.safetensors  progress.json  train_config.json  tokenizer.json
                         manifest.json: size and sha256 of every other file, written last

A sharded run has folders model/ and optimizer/ instead, in which each rank writes one safetensors file
(torch.distributed.checkpoint). A checkpoint is written to a temporary folder, synced, then renamed. Pickle is not used.

`Manager` does this for a run that trains: a snapshot in memory, the files in a thread, then best.json and pruning.
"""

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanoforge.distributed import Ranks, cpu_snapshot, is_sharded, local_shard
from nanoforge.errors import DivergedError, UserError
from nanoforge.files import TMP_SUFFIX, atomic_write, fsync, sha256, write_json
from nanoforge.run_dir import (
    DAMAGED_SUFFIX,
    METRICS_FILE,
    REPLACED_SUFFIX,
    is_checkpoint,
    read_best_step,
    refuse_deleting_bases,
    runs_on_base,
    step_folder,
    write_best,
)
from nanoforge.training.grad_guard import GradGuard
from nanoforge.training.logger import RunLogger
from nanoforge.training.optimizers import Optimizer

COPIED_FILES = ("train_config.json", "tokenizer.json")
WEIGHT_FILES = {"model.safetensors", *COPIED_FILES}
REQUIRED_FILES = WEIGHT_FILES | {"optimizer.safetensors", "progress.json"}


# ---------------------------------------------------------------------------------------------------------------------
# files of tensors


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replace a safetensors file atomically. Raises UserError when it can't be written."""
    try:
        with atomic_write(path) as tmp_path:
            save_file(tensors, tmp_path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't be written ({error})") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, copied: safetensors only maps the file, which may change."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def write_shards(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup) -> None:
    """Write DTensors, each rank its shards to a safetensors file of its own. Other tensors are equal on all ranks.

    A collective of the group: when it returns on one rank, all files are complete. Raises OSError on all ranks if it
    fails on one.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:  # a BaseException
        failures = [f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items()]
        raise OSError("; ".join(failures)) from None


class Shards(Mapping[str, Tensor]):
    """Full tensors from a folder that `write_shards` filled, each assembled on access."""

    def __init__(self, folder: Path) -> None:
        # name -> (file, offset in the full tensor) of each shard
        self.pieces: dict[str, list[tuple[Path, list[int]]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                sharding = json.loads(file.metadata()["DCP_SHARDING_INFO"])
                for name in file.keys():  # noqa: SIM118
                    self.pieces.setdefault(name, []).append((path, sharding[name]["saved_offsets"]))

    def __getitem__(self, name: str) -> Tensor:
        offsets: list[list[int]] = []
        shards: list[Tensor] = []
        for path, offset in self.pieces[name]:
            with safe_open(path, framework="pt") as file:
                offsets.append(offset)
                shards.append(file.get_tensor(name))
        if shards[0].dim() == 0:
            return shards[0]
        placed = list(zip(offsets, shards, strict=True))  # each shard with its offset
        shape = [max(offset[d] + shard.size(d) for offset, shard in placed) for d in range(shards[0].dim())]
        full = shards[0].new_empty(shape)
        for offset, shard in placed:
            region = tuple(slice(start, start + size) for start, size in zip(offset, shard.shape, strict=True))
            full[region] = shard
        return full

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


# ---------------------------------------------------------------------------------------------------------------------
# write a checkpoint


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer steps
    tokens: int = 0
    seconds: float = 0.0
    best_val_loss: float = math.inf
    best_step: int = -1
    worse_evaluations: int = 0  # of those at eval_interval, since the best one of them
    patience_val_loss: float = math.inf  # of that one
    evaluated_at: int = -1  # step of the last evaluation
    rollbacks: int = 0  # to a checkpoint, after too many skipped steps
    sequences: dict[str, int] = field(default_factory=dict)  # drawn of each dataset; empty in older checkpoints
    pace: dict[str, Any] = field(default_factory=dict)  # the state of a TimedPace; empty without a time budget

    def to_json(self) -> dict[str, Any]:
        """For progress.json, which has null where there is no loss."""
        values = asdict(self)
        return {name: None if value == math.inf else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Progress":
        """From progress.json, which has further keys. Fields that an older version didn't write keep their defaults."""
        values = {"patience_val_loss": values.get("best_val_loss")} | dict(values)
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        present: dict[str, Any] = {name: math.inf if value is None else value for name, value in known.items()}
        return cls(**present)

    def forget_best(self) -> None:
        """Compare no later loss with those until now."""
        self.best_val_loss = self.patience_val_loss = math.inf
        self.best_step = -1
        self.worse_evaluations = 0

    def count_evaluation(self, val_loss: float, *, at_interval: bool, is_saved: bool = True) -> None:
        """Take up an evaluation's loss. The best one is the best that is saved. Early stopping counts those at
        eval_interval alone: the evaluation that ends a run is no part of the run that goes on."""
        if is_saved and val_loss < self.best_val_loss:
            self.best_val_loss = val_loss
            self.best_step = self.step
        if at_interval:
            is_better = val_loss < self.patience_val_loss
            self.worse_evaluations = 0 if is_better else self.worse_evaluations + 1
            self.patience_val_loss = min(self.patience_val_loss, val_loss)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in host memory. Nothing in it changes while training goes on."""

    progress: Progress
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]  # of the training, what is no tensor: joins the progress in progress.json
    copied_files: dict[str, bytes]


def save(
    checkpoints: Path, snapshot: Snapshot, group: dist.ProcessGroup | None = None, *, is_main: bool = True
) -> Path:
    """Write a snapshot to checkpoints/<step>. A folder of that name that holds no checkpoint is replaced.

    With a group the tensors are sharded over its ranks: a collective, in which the main rank writes the other files.
    Raises OSError or SafetensorError, and then an older checkpoint is unchanged and nothing of the new one is left.
    """
    final = step_folder(checkpoints, snapshot.progress.step)
    try:
        write_files(final.with_suffix(TMP_SUFFIX), snapshot, group, is_main=is_main)
        if is_main:
            rename(final.with_suffix(TMP_SUFFIX), final)
    except BaseException:
        if is_main:
            remove_unfinished(checkpoints)
        raise
    return final


def write_files(tmp_folder: Path, snapshot: Snapshot, group: dist.ProcessGroup | None, *, is_main: bool) -> None:
    """Write all files of a checkpoint to a new folder. Raises OSError or SafetensorError."""
    # 1. An empty folder.
    create_empty(tmp_folder, group, is_main=is_main)
    # 2. The tensors.
    if group is None:
        save_file(snapshot.weights, tmp_folder / "model.safetensors")
        save_file(snapshot.optimizer, tmp_folder / "optimizer.safetensors")
    else:
        write_shards(tmp_folder / "model", snapshot.weights, group)
        write_shards(tmp_folder / "optimizer", snapshot.optimizer, group)
    if not is_main:
        return
    # 3. The other files, and the manifest once all of them are on the disk.
    write_json(tmp_folder / "progress.json", snapshot.progress.to_json() | snapshot.state)
    for name, content in snapshot.copied_files.items():
        (tmp_folder / name).write_bytes(content)
    write_manifest(tmp_folder)


def rename(tmp_folder: Path, final: Path) -> None:
    """Give a checkpoint its name. If the process ends between the renames, `newest` restores the older checkpoint."""
    replaced = final.with_suffix(REPLACED_SUFFIX)
    if final.exists():
        os.rename(final, replaced)
    os.rename(tmp_folder, final)
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def named_by_step(checkpoints: Path, suffix: str) -> list[Path]:
    """The folders that this program has named by a step and a suffix."""
    return [path for path in checkpoints.glob(f"*{suffix}") if path.stem.isdigit()]


def restore_replaced(checkpoints: Path) -> None:
    """Give back the names of checkpoints that a failed or interrupted save was about to replace."""
    for path in named_by_step(checkpoints, REPLACED_SUFFIX):
        if not path.with_suffix("").exists():
            os.rename(path, path.with_suffix(""))


def remove_unfinished(checkpoints: Path) -> None:
    """Delete what failed or interrupted saves left: they may fill the disk."""
    restore_replaced(checkpoints)
    for path in named_by_step(checkpoints, TMP_SUFFIX):
        shutil.rmtree(path, ignore_errors=True)


def create_empty(folder: Path, group: dist.ProcessGroup | None, *, is_main: bool) -> None:
    """The main rank creates the folder, all ranks wait for it. Raises OSError on all of them if that fails."""
    error = None
    if is_main:
        try:
            remove_unfinished(folder.parent)
            folder.mkdir(parents=True)
        except OSError as os_error:
            error = os_error
    if group is not None:
        any_failed = torch.tensor(int(error is not None))
        dist.all_reduce(any_failed, dist.ReduceOp.MAX, group=group)
        if any_failed and error is None:
            error = OSError("the main rank could not create the folder")
    if error is not None:
        raise error


def write_manifest(folder: Path) -> None:
    """Sync all files of a checkpoint to the disk, then write their sizes and hashes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    subfolders = {path.parent for path in paths} - {folder}
    for path in [*paths, *sorted(subfolders)]:
        fsync(path)
    manifest = {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        manifest[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / "manifest.json", manifest)
    fsync(folder / "manifest.json")
    fsync(folder)


# ---------------------------------------------------------------------------------------------------------------------
# verify, find and load a checkpoint


def verify(folder: Path, required: set[str] = REQUIRED_FILES) -> str | None:
    """Compare a checkpoint with its manifest, which lists at least the required files. Returns the error, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        missing = required - {unsharded_name(name) for name in manifest}
        if missing:
            return f"{folder / 'manifest.json'} does not list {', '.join(sorted(missing))}"
        for name, expected in manifest.items():
            error = verify_file(folder / name, expected["bytes"], expected["sha256"])
            if error:
                return error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / 'manifest.json'} can't be read ({error})"
    return None


def unsharded_name(name: str) -> str:
    """model/shard-00001-... -> model.safetensors, the file that the shards stand for; any other name as it is."""
    folder, separator, _ = name.partition("/")
    return f"{folder}.safetensors" if separator else name


def verify_file(path: Path, size: int, digest: str) -> str | None:
    """Compare a file with its entry in the manifest. Returns the error, or None."""
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != size:
        return f"{path} has {path.stat().st_size} bytes instead of {size}"
    if sha256(path) != digest:
        return f"{path} was changed after it was written (its sha256 differs)"
    return None


def list_steps(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(path.name) for path in checkpoints.iterdir() if is_checkpoint(path))


def is_whole(folder: Path) -> bool:
    """Whether the folder is a checkpoint whose files were all written; their content is not read."""
    return (folder / "manifest.json").exists()


def newest(checkpoints: Path, log: Callable[[str], None] = print) -> Path:
    """The newest undamaged checkpoint; logs those that it skips. Raises UserError when there is none."""
    with suppress(OSError):  # another user's run
        restore_replaced(checkpoints)
    for step in reversed(list_steps(checkpoints)):
        folder = step_folder(checkpoints, step)
        error = verify(folder)
        if error is None:
            return folder
        log(f"skipping checkpoint {folder}: {error}")
    raise UserError(f"{checkpoints}: no undamaged checkpoint to resume from; start the run again with --overwrite")


def resolve(out_dir: Path, name: str, log: Callable[[str], None] = print) -> Path:
    """The checkpoint of a run that --checkpoint names: best (or the newest, if there is none), last, or a step.

    Instead of the run's folder, that of a checkpoint names it. Raises UserError when there is no checkpoint, or the one
    that is named is damaged.
    """
    if is_whole(out_dir):
        return named(out_dir, name)
    checkpoints = out_dir / "checkpoints"
    steps = list_steps(checkpoints)
    if not steps and (out_dir / "ckpt.pt").exists():
        raise UserError(f"{out_dir}: holds nanoGPT's ckpt.pt, not a run of this program; pass it as --init_from")
    if not steps:
        raise UserError(f"{out_dir}: no checkpoints; train a model there first, or name another folder with --out_dir")
    if name == "last":
        return newest(checkpoints, log)
    step = read_best_step(out_dir) if name == "best" else int(name)
    if step is None:
        log(f"{out_dir / 'best.json'}: names no best checkpoint; using the newest")
        return newest(checkpoints, log)
    folder = step_folder(checkpoints, step)
    error = verify(folder) if folder.exists() else f"the run has checkpoints of steps {', '.join(map(str, steps))}"
    if error is None:
        return folder
    if name == "best":
        log(f"skipping the best checkpoint, {folder}: {error}")
        return newest(checkpoints, log)
    raise UserError(f"--checkpoint={name}: {error}; choose another one")


def named(folder: Path, name: str = "") -> Path:
    """The checkpoint in a folder that is named instead of its run's; verified. Raises UserError."""
    if name.isdigit() and step_folder(folder.parent, int(name)).name != folder.name:
        raise UserError(f"--checkpoint={name}: {folder} is another checkpoint; name the folder of its run")
    error = verify(folder)
    if error:
        raise UserError(f"{error}; choose another checkpoint")
    return folder


class Checkpoint(NamedTuple):
    """A loaded checkpoint."""

    folder: Path
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    progress: dict[str, Any]


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint that `newest` or `resolve` has verified."""
    return Checkpoint(
        folder=folder,
        weights=load_tensors(folder, "model"),
        optimizer=load_tensors(folder, "optimizer"),
        progress=json.loads((folder / "progress.json").read_text(encoding="utf-8")),
    )


def load_tensors(folder: Path, name: str) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint's "model" or "optimizer". Sharded ones are read on access."""
    if (folder / name).is_dir():
        return Shards(folder / name)
    return read_tensors(folder / f"{name}.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# delete old checkpoints


def steps_to_keep(steps: list[int], best_step: int | None, keep_last: int, keep_every: int) -> set[int]:
    """The best step, the last ones, and the multiples of keep_every (0: none), of ascending steps."""
    kept = set(steps[-keep_last:])
    if best_step is not None:
        kept.add(best_step)
    if keep_every:
        kept.update(step for step in steps if step % keep_every == 0)
    return kept


def prune(checkpoints: Path, steps: Iterable[int], last_step: int) -> None:
    """Delete the checkpoints of these steps, what interrupted saves left, and damaged ones up to the last step.

    Anything else in the folder is not this program's, and stays.
    """
    for step in steps:
        shutil.rmtree(step_folder(checkpoints, step), ignore_errors=True)
    leftovers = named_by_step(checkpoints, TMP_SUFFIX) + named_by_step(checkpoints, REPLACED_SUFFIX)
    damaged = [path for path in named_by_step(checkpoints, DAMAGED_SUFFIX) if int(path.stem) <= last_step]
    for path in leftovers + damaged:
        shutil.rmtree(path, ignore_errors=True)


def delete_later(checkpoints: Path, step: int) -> None:
    """Delete the checkpoints after a step, from which a run goes on another way. Raises UserError for one that
    another run needs as its base."""
    later = [other for other in list_steps(checkpoints) if other > step]
    refuse_deleting_bases(step_folder(checkpoints, other) for other in later)
    prune(checkpoints, later, step)


def refuse_later(out_dir: Path, step: int) -> None:
    """Raises UserError when a run has whole checkpoints after the one from which it shall go on."""
    folders = [step_folder(out_dir / "checkpoints", other) for other in list_steps(out_dir / "checkpoints")]
    later = [folder.name for folder in folders if int(folder.name) > step and verify(folder) is None]
    if later:
        raise UserError(
            f"--checkpoint={step}: {out_dir} has later checkpoints ({', '.join(later)}), which would be replaced; "
            "branch off with another --out_dir, delete them with --overwrite, or resume from the last "
            f"(--init_from=resume --out_dir={out_dir})"
        )


def branch(source: Path, out_dir: Path, best_step: int) -> None:
    """Copy a checkpoint, the best one before it, and the metrics to the folder of a run that goes on from there.

    Raises UserError when they can't be copied.
    """
    checkpoints = out_dir / "checkpoints"
    try:
        for folder in {source, step_folder(source.parent, best_step)}:
            if folder == source or verify(folder) is None:
                tmp_folder = (checkpoints / folder.name).with_suffix(TMP_SUFFIX)
                shutil.copytree(folder, tmp_folder, dirs_exist_ok=True)
                os.rename(tmp_folder, step_folder(checkpoints, read_step(folder)))
        metrics_path = source.parent.parent / METRICS_FILE
        if source.parent.name == checkpoints.name and metrics_path.exists():
            shutil.copy(metrics_path, out_dir / METRICS_FILE)
    except OSError as error:
        raise UserError(f"--checkpoint={source}: can't be copied to {out_dir} ({error})") from None


def read_step(folder: Path) -> int:
    """The step of a checkpoint, whose folder may have been renamed."""
    return int(json.loads((folder / "progress.json").read_text(encoding="utf-8"))["step"])


def set_aside_damaged(checkpoints: Path, last_step: int) -> None:
    """Rename the checkpoints after the one that a run resumes from: they are damaged, and would count as newer."""
    for step in list_steps(checkpoints):
        folder = step_folder(checkpoints, step)
        if step > last_step:
            shutil.rmtree(folder.with_suffix(DAMAGED_SUFFIX), ignore_errors=True)
            os.rename(folder, folder.with_suffix(DAMAGED_SUFFIX))


# ---------------------------------------------------------------------------------------------------------------------
# save while training goes on


class SaveResult(NamedTuple):
    """The result of one save: its folder, or the error."""

    step: int
    folder: Path | None
    error: Exception | None
    blocked_ms: float  # for which training waited
    written_ms: float  # that the thread took


class CheckpointSaver:
    """Runs one save at a time in a thread. Errors of the disk are results; other errors are raised by `result`."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.last_result: SaveResult | None = None
        self.step = 0  # of the save started last

    def start(self, step: int, write: Callable[[], Path], blocked_since: float) -> None:
        """Start a save. Call `result` for the one before it first."""
        assert self.thread is None
        self.step = step
        started_at = time.perf_counter()

        def run() -> None:
            folder, error = None, None
            try:
                folder = write()
            except Exception as raised:
                error = raised
            self.last_result = SaveResult(
                step=step,
                folder=folder,
                error=error,
                blocked_ms=1e3 * (started_at - blocked_since),
                written_ms=1e3 * (time.perf_counter() - started_at),
            )

        # Not a daemon: the process does not end in the middle of a save.
        self.thread = threading.Thread(target=run, name="save")
        self.thread.start()

    def result(self, *, wait: bool) -> SaveResult | None:
        """The result of the save, once; None without a save, or when it is not over and not waited for."""
        if self.thread is None or (self.thread.is_alive() and not wait):
            return None
        self.thread.join()
        self.thread = None
        result = self.last_result
        assert result is not None
        if result.error is not None and not isinstance(result.error, OSError | SafetensorError):
            raise result.error
        return result


class TrainState(NamedTuple):
    """The objects that training changes; a checkpoint holds their state."""

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    guard: GradGuard

    def load(self, checkpoint: Checkpoint) -> None:
        """Load the state of all but the model. Raises UserError when the optimizer's does not fit."""
        progress = checkpoint.progress
        self.optimizer.load_state_dict(checkpoint.optimizer, progress["optimizer"])
        if self.scaler.is_enabled() and progress["scaler"]:
            self.scaler.load_state_dict(progress["scaler"])
        self.guard.load_state_dict(progress.get("guard", {"skipped": 0, "norms": []}))  # older checkpoints have none


class Manager:
    """The checkpoints of a run that trains: saves them, logs the results, writes best.json, deletes old checkpoints."""

    def __init__(self, out_dir: Path, state: TrainState, ranks: Ranks, *, keep_last: int, keep_every: int):
        self.out_dir = out_dir
        self.folder = out_dir / "checkpoints"
        self.state = state
        self.ranks = ranks
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.resumed_step = -1  # of the checkpoint that the command names: its restart will name it again
        self.saver = CheckpointSaver()
        self.is_sharded = is_sharded(state.model)

    @property
    def last_step(self) -> int:
        """The step of the save started last; 0 before any."""
        return self.saver.step

    def save(self, progress: Progress, logger: RunLogger) -> None:
        """Start to save a checkpoint: a snapshot now, its files in a thread. Waits for the save before.

        A checkpoint that is there, such as the one that the run resumed from, is not written again.
        A collective where the run is sharded. Raises DivergedError when a tensor is not finite.
        """
        if not self.ranks.is_main and not self.is_sharded:
            return
        self.log_finished_save(logger, progress.step, wait=True)
        if self.is_saved(progress.step):
            if self.ranks.is_main:
                self.write_best(progress)
            return
        blocked_since = time.perf_counter()
        snapshot = self.snapshot(replace(progress, seconds=logger.seconds))
        self.saver.start(snapshot.progress.step, partial(self.write, snapshot), blocked_since)

    def is_saved(self, step: int) -> bool:
        """Whether there is a checkpoint of this step, as the main rank sees it: a collective where it is sharded."""
        saved = self.ranks.is_main and is_whole(step_folder(self.folder, step))
        return bool(self.ranks.all_reduce_max(saved)) if self.is_sharded else saved

    def is_base(self, step: int) -> bool:
        """Whether a checkpoint is the base of other runs, which can't do without it."""
        return bool(runs_on_base(step_folder(self.folder, step), certain=False))

    def write_best(self, progress: Progress) -> None:
        """Write best.json if the best checkpoint is there."""
        if is_whole(step_folder(self.folder, progress.best_step)):
            write_best(self.out_dir, step=progress.best_step, val_loss=progress.best_val_loss)

    def snapshot(self, progress: Progress) -> Snapshot:
        """Copy trainable weights and training state to host memory. Raises DivergedError when one is not finite."""
        model, optimizer, scaler, guard = self.state
        optimizer_tensors, optimizer_values = optimizer.state_dict()
        with optimizer.evaluation_weights():
            weights = {name: cpu_snapshot(weight) for name, weight in model.named_parameters() if weight.requires_grad}
        tensors = {name: cpu_snapshot(tensor) for name, tensor in optimizer_tensors.items()}
        for name, tensor in (weights | tensors).items():
            if tensor.is_floating_point() and not local_shard(tensor).isfinite().all():
                raise DivergedError(f"{name} is not finite at step {progress.step}: stopped, nothing was saved")
        return Snapshot(
            progress=progress,
            weights=weights,
            optimizer=tensors,
            state={"optimizer": optimizer_values, "scaler": scaler.state_dict(), "guard": guard.state_dict()},
            copied_files=self.copied_files,
        )

    @cached_property
    def copied_files(self) -> dict[str, bytes]:
        """The run's own files that each checkpoint holds too; they don't change while it trains."""
        return {name: (self.out_dir / name).read_bytes() for name in COPIED_FILES}

    def write(self, snapshot: Snapshot) -> Path:
        """What the thread does: write the files, then best.json, then delete old checkpoints."""
        group = self.ranks.save_group if self.is_sharded else None
        folder = save(self.folder, snapshot, group, is_main=self.ranks.is_main)
        if not self.ranks.is_main:
            return folder
        self.write_best(snapshot.progress)
        step = snapshot.progress.step
        steps = [
            other for other in list_steps(self.folder) if other <= step and is_whole(step_folder(self.folder, other))
        ]
        keep = steps_to_keep(steps, read_best_step(self.out_dir), self.keep_last, self.keep_every)
        old = set(steps) - keep - {self.resumed_step}
        prune(self.folder, [step for step in old if not self.is_base(step)], step)
        return folder

    def log_finished_save(self, logger: RunLogger, step: int, *, wait: bool) -> None:
        """Log the result of the save, if it is over, at this step. Training goes on after a failed save."""
        result = self.saver.result(wait=wait)
        if result is None:
            return
        if result.error is not None:
            logger.note(
                step,
                f"could not save step {result.step}: {result.error}; "
                "older checkpoints are unchanged, and the next save tries again",
            )
            return
        logger.event(
            "save",
            result.step,
            f"saved {result.folder}",
            blocked_ms=result.blocked_ms,
            written_ms=result.written_ms,
        )

    def finish(self, logger: RunLogger, step: int) -> None:
        """Wait for the last save and log it. Raises SystemExit if it failed."""
        self.log_finished_save(logger, step, wait=True)
        result = self.saver.last_result
        if result is not None and result.error is not None:
            raise SystemExit(f"the last save, of step {result.step}, failed; the newest checkpoint is older")

    def close(self) -> None:
        """Wait for a save that is still being written."""
        self.saver.result(wait=True)
