"""Checkpoints: save whole or not at all, verify, load, find the newest good one.

    checkpoints/000040/  model.safetensors  optimizer.safetensors  progress.json  train_config.json  tokenizer.json
                         manifest.json: size and sha256 of every other file, written last

A sharded run has folders model/ and optimizer/ instead, which torch.distributed.checkpoint fills with one safetensors file a rank.

A checkpoint is written beside, synced, then renamed. No pickle is written or read. A `CheckpointSaver` does so in a thread, from a snapshot.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from nanoforge import run_dir
from nanoforge.errors import UserError
from nanoforge.files import TMP_SUFFIX, fsync, sha256, write_json

REPLACED_SUFFIX = ".old"
WEIGHT_FILES = {"model.safetensors", "train_config.json", "tokenizer.json"}
REQUIRED_FILES = WEIGHT_FILES | {"optimizer.safetensors", "progress.json"}


class Checkpoint(NamedTuple):
    folder: Path
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    progress: dict


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replace a safetensors file: readers see the old one or the new one, whole. Raises UserError where it can't be written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}{TMP_SUFFIX}")
    try:
        save_file(tensors, beside)
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't be written ({error})") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own."""
    return {key: tensor.clone() for key, tensor in load_file(path).items()}


def save_shards(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup) -> None:
    """Write tensors of which each rank holds its shards (DTensors; others are the same on all ranks), a safetensors file a rank. All ranks of the
    group must call it; when it is over on one, all files are whole. Raises OSError on all ranks if it failed on one."""
    try:
        dcp.save(
            dict(tensors),
            storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True),
            process_group=group,
        )
    except CheckpointException as error:  # which is no Exception
        raise OSError("; ".join(f"rank {rank}: {told[0]}" for rank, told in error.failures.items())) from None


def save(
    checkpoints: Path,
    step: int,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    progress: dict,
    copied: dict[str, bytes],
    group: dist.ProcessGroup | None = None,
    main: bool = True,
) -> Path:
    """Write checkpoints/<step>, tensors on the CPU and the files `copied` as they are; an older one of the same step is replaced.

    With a group the tensors are sharded over its ranks: all of them call this, and the main one writes all but their shards.
    """
    final = checkpoints / f"{step:06d}"
    beside = checkpoints / f"{step:06d}{TMP_SUFFIX}"
    failed = None
    try:
        if main:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
    except OSError as error:
        failed = error
    if group is not None:  # none writes before the folder is there, or waits for one that can't be made
        told = torch.tensor(int(failed is not None))
        dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
        failed = failed or (OSError("the main rank could not make the folder") if told else None)
    if failed:
        raise failed
    if group is None:
        save_file(weights, beside / "model.safetensors")
        save_file(optimizer, beside / "optimizer.safetensors")
    else:
        save_shards(beside / "model", weights, group)
        save_shards(beside / "optimizer", optimizer, group)
    if not main:
        return final
    write_json(beside / "progress.json", progress)
    for name, content in copied.items():
        (beside / name).write_bytes(content)
    write_manifest(beside)
    replaced = checkpoints / f"{step:06d}{REPLACED_SUFFIX}"
    if final.exists():
        os.rename(final, replaced)  # `newest` brings it back if this process ends here
    os.rename(beside, final)
    fsync(checkpoints)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def write_manifest(folder: Path) -> None:
    """Have all files of a checkpoint on the disk, and then their sizes and hashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    for path in {*files, *(path.parent for path in files)} - {folder}:
        fsync(path)
    write_json(
        folder / "manifest.json",
        {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files},
    )
    fsync(folder / "manifest.json")
    fsync(folder)


class SaveResult(NamedTuple):
    """Of a save: the folder, or the error that kept it from being; ms that training stood still for it, and that its thread took."""

    step: int
    folder: Path | None
    error: Exception | None
    blocked_ms: float
    written_ms: float


class CheckpointSaver:
    """Runs one save at a time in a thread. An error of the disk is an outcome; any other is raised by `outcome`."""

    def __init__(self):
        self.thread: threading.Thread | None = None
        self.ended: SaveResult | None = None
        self.step = 0  # of the save begun last

    @property
    def failed(self) -> bool:
        """Whether the last save that ended failed."""
        return self.ended is not None and self.ended.error is not None

    def begin(self, step: int, work: Callable[[], Path], since: float) -> None:
        """Start a save, for which training has stood still since that time; the one before must be over and its outcome taken."""
        assert self.thread is None
        begin = time.perf_counter()
        self.step = step

        def run() -> None:
            folder, error = None, None
            try:
                folder = work()
            except Exception as raised:
                error = raised
            self.ended = SaveResult(step, folder, error, 1e3 * (begin - since), 1e3 * (time.perf_counter() - begin))

        self.thread = threading.Thread(
            target=run, name="save"
        )  # not a daemon: the process does not end in the middle of it
        self.thread.start()

    def outcome(self, wait: bool) -> SaveResult | None:
        """The outcome of the save that was begun, once; None when there is none, or it is not over and is not waited for."""
        if self.thread is None or (self.thread.is_alive() and not wait):
            return None
        self.thread.join()
        self.thread = None
        if self.ended.error is not None and not isinstance(self.ended.error, OSError | SafetensorError):
            raise self.ended.error
        return self.ended


def verify(folder: Path, needed: set[str] = REQUIRED_FILES) -> str | None:
    """What is wrong with a checkpoint, which must have the needed files, by its manifest; or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        whole = {f"{name.split('/')[0]}.safetensors" if "/" in name else name for name in manifest}  # of shards too
        if missing := needed - whole:
            return f"{folder / 'manifest.json'} does not list {', '.join(sorted(missing))}"
        for name, known in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != known["bytes"]:
                return f"{path} has {path.stat().st_size} bytes instead of {known['bytes']}"
            if sha256(path) != known["sha256"]:
                return f"{path} is not what was written (its sha256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / 'manifest.json'} can't be read ({error})"
    return None


def list_steps(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints there, ascending."""
    return (
        sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()) if checkpoints.is_dir() else []
    )


def newest(checkpoints: Path, log: Callable[[str], None] = print) -> Path:
    """The newest undamaged checkpoint; says which ones it passes over. Raises UserError when there is none."""
    for path in checkpoints.glob(f"*{REPLACED_SUFFIX}"):
        if not path.with_suffix("").exists():
            os.rename(path, path.with_suffix(""))
    for step in reversed(list_steps(checkpoints)):
        folder = checkpoints / f"{step:06d}"
        wrong = verify(folder)
        if wrong is None:
            return folder
        log(f"passing over {folder}: {wrong}")
    raise UserError(f"{checkpoints}: holds no whole checkpoint to go on from; begin the run anew with --overwrite")


def resolve(out_dir: Path, which: str, log: Callable[[str], None] = print) -> Path:
    """The checkpoint of a run that `which` names: best (the newest where there is none), last, or a step. Raises UserError."""
    checkpoints = out_dir / "checkpoints"
    if not list_steps(checkpoints):
        raise UserError(
            f"{out_dir}: holds no checkpoints; train a model there first, or name another folder with --out_dir"
        )
    step = run_dir.read_best_step(out_dir) if which == "best" else None if which == "last" else int(which)
    if step is None:
        if which == "best":
            log(f"{out_dir / 'best.json'} names no best checkpoint; taking the newest")
        return newest(checkpoints, log)
    folder = checkpoints / f"{step:06d}"
    wrong = (
        verify(folder)
        if folder.exists()
        else f"the run has those of steps {', '.join(map(str, list_steps(checkpoints)))}"
    )
    if wrong is None:
        return folder
    if which == "best":
        log(f"passing over the best checkpoint, {folder}: {wrong}")
        return newest(checkpoints, log)
    raise UserError(f"--checkpoint={which}: {wrong}; take another one")


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint that `newest` or `resolve` found whole, into memory of its own: safetensors only maps the file."""
    progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    return Checkpoint(folder, load_tensors(folder, "model"), load_tensors(folder, "optimizer"), progress)


def load_tensors(folder: Path, name: str) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint's "model" or "optimizer", in memory of their own; those of shards are read when they are asked for."""
    if (folder / name).is_dir():
        return Shards(folder / name)
    return read_tensors(folder / f"{name}.safetensors")


class Shards(Mapping[str, Tensor]):
    """Whole tensors from a folder that `save_shards` wrote, each put together when it is asked for."""

    def __init__(self, folder: Path):
        self.parts: dict[str, list[tuple[Path, list[int]]]] = {}  # name -> (file, place in the whole) of each part
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
                for key in file.keys():  # noqa: SIM118
                    self.parts.setdefault(key, []).append((path, places[key]["saved_offsets"]))

    def __getitem__(self, name: str) -> Tensor:
        parts = []
        for path, place in self.parts[name]:
            with safe_open(path, framework="pt") as file:
                parts.append((place, file.get_tensor(name)))
        if not parts[0][0]:
            return parts[0][1]  # a scalar
        whole = parts[0][1].new_empty(
            [max(place[d] + part.size(d) for place, part in parts) for d in range(parts[0][1].dim())]
        )
        for place, part in parts:
            whole[tuple(slice(first, first + size) for first, size in zip(place, part.shape, strict=True))] = part
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def steps_to_keep(all_steps: list[int], best: int | None, last: int, every: int) -> set[int]:
    """Steps to keep: the best, the `last` ones, and the multiples of `every` (0: none)."""
    return {best, *all_steps[-last:], *(step for step in all_steps if every and step % every == 0)} - {None}


def prune(checkpoints: Path, keep: set[int]) -> None:
    """Delete all checkpoints but those of the steps to keep, and what an interrupted save left."""
    for path in checkpoints.glob("*"):
        if path.suffix in (TMP_SUFFIX, REPLACED_SUFFIX) or (path.name.isdigit() and int(path.name) not in keep):
            shutil.rmtree(path, ignore_errors=True)
