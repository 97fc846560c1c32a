"""The folder of a run: its record (train_config.json), its best step (best.json), and the lock of the process in it.

What the files say about a run's state is in run_state.py. Imports no torch.
"""

import contextlib
import itertools
import json
import os
import platform
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from nanoforge.config_files import RECORD_FILE
from nanoforge.errors import UserError
from nanoforge.files import TMP_SUFFIX, check_writable, lock_file, read_text, report_missing_locks, write_json

Fingerprints = dict[str, dict[str, str]]  # dataset -> file -> hash of its content

METRICS_FILE = "metrics.jsonl"
BEST_FILE = "best.json"
TRAIN_LOCK_FILE = ".lock"
TRACKER_FILES = ("wandb_id", "trackio_run")
REPLACED_SUFFIX = ".old"  # of a checkpoint while another one takes its name
DAMAGED_SUFFIX = ".damaged"  # of one that a resumed run has skipped
NEEDED_SUFFIX = ".needed"  # of a file beside a checkpoint that lists the runs whose base it is
UNUSED_SUFFIXES = (TMP_SUFFIX, REPLACED_SUFFIX, DAMAGED_SUFFIX)
RUN_FILES = (
    RECORD_FILE,
    METRICS_FILE,
    "tokenizer.json",
    BEST_FILE,
    "loss.png",
    *TRACKER_FILES,
    "checkpoints",
    "tensorboard",
    "evaluation.json",
    "evaluations.jsonl",
)


# ---------------------------------------------------------------------------------------------------------------------
# the record

PARTS = ("model", "counts", "data", "base", "about", "run", "budget")  # besides the arguments


@dataclass(frozen=True)
class RunRecord:
    """What a run is: the content of train_config.json.

    The file is a config as well: names that begin with an underscore are ignored there. Fields that an older version
    did not write are empty.
    """

    args: dict[str, Any]  # every argument with its value
    model: dict[str, Any] = field(default_factory=dict)  # the fields of model.py's GPTConfig
    counts: dict[str, float] = field(default_factory=dict)  # of the model: parameters, flops_per_token
    data: Fingerprints = field(default_factory=dict)  # dataset -> file -> fingerprint
    base: dict[str, str] = field(default_factory=dict)  # source and sha256 of the weights that the run needs to resume
    about: dict[str, str] = field(default_factory=dict)  # versions, and the git commit
    run: dict[str, Any] = field(default_factory=dict)  # its identity: id, folder, attempts (restarts.py), parent
    budget: dict[str, Any] = field(default_factory=dict)  # what a budget chose, and why (pilot.py)

    @classmethod
    def load(cls, folder: Path) -> "RunRecord":
        """The record in a run's folder or in a checkpoint. Raises UserError when it can't be read."""
        path = folder / RECORD_FILE
        try:
            values = json.loads(read_text(path))
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}: not the record of a run")
        args = {name: value for name, value in values.items() if not name.startswith("_")}
        parts = {name: values.get(f"_{name}") or {} for name in PARTS}
        return cls(args, **parts)

    def save(self, folder: Path) -> None:
        """Write train_config.json."""
        write_json(folder / RECORD_FILE, self.args | {f"_{name}": getattr(self, name) for name in PARTS})

    def check_data(self, data: Fingerprints, *, allow_change: bool, log: Callable[[str], None]) -> None:
        """Compare fingerprints with those of the record. Raises UserError when they differ, unless that is allowed."""
        changed = changed_files(self.data, data)
        if not changed:
            return
        message = f"{', '.join(changed)}: not the data that this run began with"
        if not allow_change:
            raise UserError(
                f"--init_from=resume: {message}; restore it, or continue with the new data by --allow_data_change"
            )
        log(f"{message}; continuing because of --allow_data_change")


def changed_files(before: Fingerprints, now: Fingerprints) -> list[str]:
    """DATASET/FILE of what differs; a dataset whose files are the same under another name does not."""
    if not before:  # of a record of an older version
        return []
    renamed = renamed_datasets(before, now)
    changed = []
    for dataset in before.keys() | now.keys():
        if dataset in renamed or dataset in renamed.values():
            continue
        old_files, new_files = before.get(dataset, {}), now.get(dataset, {})
        names = old_files.keys() | new_files.keys()
        changed += [f"{dataset}/{file}" for file in names if old_files.get(file) != new_files.get(file)]
    return sorted(changed)


def renamed_datasets(before: Fingerprints, now: Fingerprints) -> dict[str, str]:
    """Old name -> new name of datasets that have other names, and files of the same content in the same order."""
    new = {dataset: files for dataset, files in now.items() if dataset not in before}
    renamed = {}
    for dataset in before.keys() - now.keys():
        same = [name for name in new if list(new[name].values()) == list(before[dataset].values())]
        if same:
            renamed[dataset] = same[0]
            del new[same[0]]
    return renamed


def identify(out_dir: Path, before: dict[str, Any], *, is_branch: bool) -> dict[str, Any]:
    """The identity of the run in a folder. before: that in the record which it goes on from; {} for a new run.

    A branch off another run's checkpoint is a run of its own. So is a copy of a folder, as long as the original stands.
    """
    folder = str(out_dir.absolute())
    new = {"id": secrets.token_hex(16), "folder": folder, "attempts": []}
    if "id" not in before:
        return new
    original = Path(before["folder"])
    if is_branch or (holds_run(original, before["id"]) and not original.samefile(out_dir)):
        return new | {"parent": {"id": before["id"], "folder": before["folder"]}}
    return before | {"folder": folder}


def holds_run(folder: Path, run_id: str) -> bool:
    """Whether a folder holds the run of this identity."""
    try:
        return RunRecord.load(folder).run.get("id") == run_id
    except UserError:
        return False


def forget_trackers(out_dir: Path, record: RunRecord) -> None:
    """Forget the tracker's run of a folder that is a copy of another run's: what follows is not that run's."""
    if RunRecord.load(out_dir).run.get("id", record.run["id"]) != record.run["id"]:
        for name in TRACKER_FILES:
            (out_dir / name).unlink(missing_ok=True)


def describe_software(repository: Path, packages: dict[str, str]) -> dict[str, str]:
    """Versions of Python and of packages, and the commit of a git repository, where git is installed."""
    about = {"python": platform.python_version(), **packages}
    if shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True)
        about["git_commit"] = git.stdout.strip()
    return about


def read_best_step(out_dir: Path) -> int | None:
    """The step that best.json names, or None."""
    try:
        return int(json.loads((out_dir / BEST_FILE).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_best(out_dir: Path, *, step: int, val_loss: float) -> None:
    """Write best.json: the step with the lowest validation loss."""
    write_json(out_dir / BEST_FILE, {"step": step, "val_loss": val_loss})


# ---------------------------------------------------------------------------------------------------------------------
# names of checkpoints


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return checkpoints / f"{step:06d}"


def holds_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, perhaps a damaged one."""
    return any((folder / name).exists() for name in ("manifest.json", "progress.json"))


def is_checkpoint(path: Path) -> bool:
    """Whether a path in the folder of checkpoints is one, perhaps damaged, and no other file or folder."""
    return path.name.isdigit() and path == step_folder(path.parent, int(path.name)) and holds_checkpoint(path)


def run_of_checkpoint(folder: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in, if it lies in one."""
    checkpoints = folder.absolute().parent
    if checkpoints.name != "checkpoints" or not (checkpoints.parent / RECORD_FILE).exists():
        return None
    return folder.parent.parent if len(folder.parts) > 2 else checkpoints.parent


def mark_needed(source: Path, out_dir: Path) -> None:
    """Have a checkpoint kept, as long as the run in out_dir has it as its base; other weights need no mark.

    Raises OSError when its folder can't be written to.
    """
    mark = source.with_suffix(NEEDED_SUFFIX)
    if run_of_checkpoint(source) is None or str(out_dir.absolute()) in read_mark(mark):
        return
    with mark.open("a", encoding="utf-8") as file:  # several runs may begin at once
        file.write(f"{out_dir.absolute()}\n")


def read_mark(mark: Path) -> list[str]:
    """The runs that a mark lists; none where there is no mark."""
    try:
        return mark.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def runs_on_base(folder: Path, *, certain: bool) -> list[str]:
    """The runs whose base a checkpoint is. One whose folder is gone may have been moved: it is not certain."""
    runs = []
    for name in read_mark(folder.with_suffix(NEEDED_SUFFIX)):
        try:
            needs = Path(RunRecord.load(Path(name)).base.get("source", "")).resolve() == folder.resolve()
        except UserError:
            needs = not certain
        runs += [name] if needs else []
    return runs


def refuse_deleting_bases(folders: Iterable[Path]) -> None:
    """Raises UserError when one of the checkpoints is another run's base."""
    for folder in folders:
        runs = runs_on_base(folder, certain=True)
        if runs:
            raise UserError(
                f"--overwrite: would delete {folder}, the base of {', '.join(runs)}; "
                "move or delete that first, or use another --out_dir"
            )


def find_checkpoint(out_dir: Path, name: str) -> Path:
    """The checkpoint that train.py's --checkpoint names: best, a step, or a path. Raises UserError without one."""
    checkpoints = out_dir / "checkpoints"
    if name == "best" or name.isdecimal():
        step = read_best_step(out_dir) if name == "best" else int(name)
        folder = step_folder(checkpoints, -1 if step is None else step)
    else:
        folder = Path(name).parent if Path(name).is_file() else Path(name)
    if holds_checkpoint(folder):
        return folder
    steps = [path.name for path in sorted(checkpoints.glob("*")) if is_checkpoint(path)]
    there = f"; {checkpoints} has {', '.join(steps)}" if steps else f"; {checkpoints} has none"
    raise UserError(f"--checkpoint={name}: no such checkpoint{there}")


# ---------------------------------------------------------------------------------------------------------------------
# the lock


class RunLock:
    """Held by the process that trains in a folder, and released when that process ends, however it ends.

    A file system without locks, or a lock file that this user can't write, is reported, and does not end the run.
    """

    def __init__(self, out_dir: Path):
        self.path = out_dir / TRAIN_LOCK_FILE
        self.file: IO[str] | None = None

    def acquire(self) -> None:
        """Raises UserError when another process holds it."""
        if self.file is not None:
            return
        try:
            file = self.path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            report_missing_locks(f"{self.path}: {error.strerror}")
            return
        if not lock_file(file.fileno()):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(f"{self.path.parent}: {holder} is training there; wait for it or use another --out_dir")
        self.file = file
        with contextlib.suppress(OSError):  # a full disk
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}".encode())

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


# ---------------------------------------------------------------------------------------------------------------------
# the folder of a new run


def create_distinct(folder: Path) -> Path:
    """Create a folder of this name, or with _2, _3, ... behind it if it is there. Raises UserError."""
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{path}: can't be created ({error.strerror})") from None
    raise AssertionError


@contextlib.contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove a folder that a run was to have, if nothing was written there."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def existing_run_files(out_dir: Path) -> list[Path]:
    """The files and folders of a run that a folder holds."""
    return [out_dir / name for name in RUN_FILES if (out_dir / name).exists()]


def refuse_existing_run(out_dir: Path, differences: str = "") -> None:
    """Raises UserError when the folder holds a run. differences: between its arguments and those asked for now."""
    existing = existing_run_files(out_dir)
    if existing:
        has_checkpoint = any((out_dir / "checkpoints").glob("[0-9]*/manifest.json"))
        way_out = "continue it with --init_from=resume, " if has_checkpoint else "it has no checkpoint yet; "
        raise UserError(
            f"{out_dir}: already holds a run ({existing[0].name}){differences}; "
            f"{way_out}replace it with --overwrite, or use another --out_dir"
        )


def prepare_out_dir(out_dir: Path, lock: RunLock, *, overwrite: bool) -> None:
    """Create the folder of a new run, or delete the run in it, if that is wanted.

    Raises UserError when it is not writable, when another process trains in it, or has begun a run there meanwhile.
    """
    try:
        check_writable(out_dir, "--out_dir")
        lock.acquire()
        if not overwrite:
            refuse_existing_run(out_dir)
        refuse_deleting_bases((out_dir / "checkpoints").glob("[0-9]*"))
        for path in existing_run_files(out_dir):
            remove(path)
    except OSError as error:
        raise UserError(f"--out_dir={out_dir}: can't be written ({error.strerror})") from None


def remove(path: Path) -> None:
    """Delete a file or a folder of a run; of the folder of checkpoints those, and the folder if nothing else is in it.

    A link to a folder stays, and the content of that folder goes.
    """
    if path.name == "checkpoints" and path.is_dir():
        for child in path.iterdir():
            if is_checkpoint(child) or (child.stem.isdigit() and child.suffix in UNUSED_SUFFIXES):
                shutil.rmtree(child)
            elif child.stem.isdigit() and child.suffix == NEEDED_SUFFIX:
                child.unlink()
        if not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
    elif path.is_symlink() and path.is_dir():
        for child in path.iterdir():
            remove(child)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
