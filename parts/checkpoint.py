"""Checkpoints: save whole or not at all, verify, load, find the newest good one.

    checkpoints/000040/  model.safetensors  optimizer.safetensors  progress.json  train_config.json  tokenizer.json
                         manifest.json: size and sha256 of every other file, written last

A checkpoint is written beside, synced, then renamed. No pickle is written or read.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from parts.mistakes import Mistake

LEFTOVER, REPLACED = ".tmp", ".old"
NEEDED = {"model.safetensors", "optimizer.safetensors", "progress.json", "train_config.json", "tokenizer.json"}


class Checkpoint(NamedTuple):
    folder: Path
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    progress: dict


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have a file's or a folder's content on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file: readers see the old one or the new one, whole."""
    beside = path.with_name(path.name + LEFTOVER)
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def save(checkpoints: Path, step: int, weights: dict[str, Tensor], optimizer: dict[str, Tensor], progress: dict, copied: list[Path]) -> Path:
    """Write checkpoints/<step>, with copies of the files `copied`; an older one of the same step is replaced."""
    final = checkpoints / f"{step:06d}"
    beside = checkpoints / f"{step:06d}{LEFTOVER}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, beside / "model.safetensors")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in optimizer.items()}, beside / "optimizer.safetensors")
    write_json(beside / "progress.json", progress)
    for path in copied:
        shutil.copyfile(path, beside / path.name)
    files = sorted(beside.iterdir())
    for path in files:
        sync(path)
    write_json(beside / "manifest.json", {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files})
    sync(beside / "manifest.json")
    sync(beside)
    replaced = checkpoints / f"{step:06d}{REPLACED}"
    if final.exists():
        os.rename(final, replaced)  # `newest` brings it back if this process ends here
    os.rename(beside, final)
    sync(checkpoints)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if missing := NEEDED - manifest.keys():
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


def steps(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints there, ascending."""
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()) if checkpoints.is_dir() else []


def newest(checkpoints: Path, say=print) -> Path:
    """The newest undamaged checkpoint; says which ones it passes over. Raises Mistake when there is none."""
    for path in checkpoints.glob(f"*{REPLACED}"):
        if not path.with_suffix("").exists():
            os.rename(path, path.with_suffix(""))
    for step in reversed(steps(checkpoints)):
        folder = checkpoints / f"{step:06d}"
        wrong = damage(folder)
        if wrong is None:
            return folder
        say(f"passing over {folder}: {wrong}")
    raise Mistake(f"{checkpoints}: holds no whole checkpoint to go on from; begin the run anew with --overwrite")


def best_step(out_dir: Path) -> int | None:
    """The step that best.json names, or None."""
    try:
        return int(json.loads((out_dir / "best.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def chosen(out_dir: Path, which: str, say=print) -> Path:
    """The checkpoint of a run that `which` names: best (the newest where there is none), last, or a step. Raises Mistake."""
    checkpoints = out_dir / "checkpoints"
    if not steps(checkpoints):
        raise Mistake(f"{out_dir}: holds no checkpoints; train a model there first, or name another folder with --out_dir")
    step = best_step(out_dir) if which == "best" else None if which == "last" else int(which)
    if step is None:
        if which == "best":
            say(f"{out_dir / 'best.json'} names no best checkpoint; taking the newest")
        return newest(checkpoints, say)
    folder = checkpoints / f"{step:06d}"
    wrong = damage(folder) if folder.exists() else f"the run has those of steps {', '.join(map(str, steps(checkpoints)))}"
    if wrong is None:
        return folder
    if which == "best":
        say(f"passing over the best checkpoint, {folder}: {wrong}")
        return newest(checkpoints, say)
    raise Mistake(f"--checkpoint={which}: {wrong}; take another one")


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint that `newest` or `chosen` found whole, into memory of its own: safetensors only maps the file."""
    progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    weights, optimizer = ({k: v.clone() for k, v in load_file(folder / f"{name}.safetensors").items()} for name in ("model", "optimizer"))
    return Checkpoint(folder, weights, optimizer, progress)


def prune(checkpoints: Path, keep: set[int]) -> None:
    """Delete all checkpoints but those of the steps to keep, and what an interrupted save left."""
    for path in checkpoints.glob("*"):
        if path.suffix in (LEFTOVER, REPLACED) or (path.name.isdigit() and int(path.name) not in keep):
            shutil.rmtree(path, ignore_errors=True)


RUN_FILES = ("train_config.json", "metrics.jsonl", "tokenizer.json", "best.json", "loss.png", "wandb_id", "checkpoints", "tensorboard")


def held(out_dir: Path) -> list[Path]:
    """What a folder holds of a run."""
    return [out_dir / name for name in RUN_FILES if (out_dir / name).exists()]


def refuse_held(out_dir: Path) -> None:
    """Raises Mistake when the folder holds a run."""
    if found := held(out_dir):
        raise Mistake(f"{out_dir}: already holds a run ({found[0].name}); continue it with --init_from=resume, replace it with --overwrite, or take another --out_dir")


def claim(out_dir: Path) -> None:
    """Make the folder of a new run, or empty it of an old one. Raises Mistake when it can't be written."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass  # it can be written to
        for path in held(out_dir):
            remove(path)
    except OSError as error:
        raise Mistake(f"--out_dir={out_dir}: can't be written ({error.strerror})") from None


def remove(path: Path) -> None:
    """Delete a file or a folder; a link to a folder stays, and what is in there goes."""
    if path.is_symlink() and path.is_dir():
        for inner in path.iterdir():
            remove(inner)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
