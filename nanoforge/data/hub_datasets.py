"""Datasets of the Hugging Face hub, and folders in its formats, read through the `datasets` library.

    hf:org/name                      the split train, and validation or test if there is one
    hf:org/name:config@revision      a configuration; a branch, a tag or a commit
    hf:org/name#train_prefs          a split; with #TRAIN/VAL the one for validation too, as in #train[:90%]/train[90%:]
    hf:FOLDER                        parquet, JSONL, ... as `datasets` finds them, or what save_to_disk has written

What was loaded once is read from the cache of `datasets`, also without a network. Imports neither torch nor numpy;
`datasets` is imported when it is used.
"""

import functools
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge.data.row_splits import SIDES, RowSplit, choose_val_rows, describe_share, select
from nanoforge.data.tables import Row
from nanoforge.errors import UserError, did_you_mean

PREFIX = "hf:"
SYNTAX = "hf:NAME[:CONFIG][@REVISION][#SPLIT[/VALIDATION_SPLIT]]"
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test", "eval")  # what stands for train in a split's name
DISK_FILES = ("dataset_dict.json", "state.json")  # of save_to_disk
BATCH_ROWS = 1000
COMMIT = re.compile("[0-9a-f]{7,40}")


def is_hub(name: str) -> bool:
    """Whether a dataset is named as one of the hub."""
    return name.startswith(PREFIX)


# ---------------------------------------------------------------------------------------------------------------------
# names


@dataclass(frozen=True)
class HubDataset:
    """What an hf:NAME names."""

    name: str  # of the hub, or a folder
    config: str = ""
    revision: str = ""
    split: str = ""
    val_split: str = ""

    @classmethod
    def parse(cls, text: str) -> "HubDataset":
        """From text that begins with hf:. Raises UserError."""
        place, has_split, splits = text.removeprefix(PREFIX).partition("#")
        split, has_val, val_split = splits.partition("/")
        folder = Path(os.path.expanduser(place))
        name, config, revision = str(folder), "", ""
        if not place or not folder.is_dir():
            place, has_revision, revision = place.partition("@")
            name, has_config, config = place.partition(":")
            is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
            if not is_name or (has_revision and not revision) or (has_config and not config):
                raise UserError(f"{text}: must be {SYNTAX} with a NAME such as org/name, or hf: and a folder")
        if (has_split and not split) or (has_val and not val_split):
            raise UserError(f"{text}: must be {SYNTAX}, with splits such as train and test")
        return cls(name, config, revision, split, val_split)

    def __str__(self) -> str:
        parts = [("", self.name), (":", self.config), ("@", self.revision)]
        return PREFIX + "".join(mark + part for mark, part in parts if part)


def name_error(name: str) -> str:
    """Why an hf:NAME can't be read at all; empty if it can."""
    try:
        HubDataset.parse(name)
    except UserError as error:
        return str(error)
    if importlib.util.find_spec("datasets") is None:
        return missing_package(name)
    return ""


def missing_package(name: object) -> str:
    return f"{name}: needs a package: pip install datasets"


# ---------------------------------------------------------------------------------------------------------------------
# loading


def import_datasets(source: object) -> Any:
    """The library. Raises UserError."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(missing_package(source)) from None
    return datasets


def loading_error(source: object, done: str, error: Exception) -> UserError:
    """What the library raises is nearly anything when the hub can't be reached."""
    reason = (str(error).splitlines() or [""])[0]
    return UserError(
        f"{source}: can't be read{done} ({type(error).__name__}: {reason:.200}); "
        f"check the name ({SYNTAX}) and the network, or give files instead"
    )


def stream(dataset: HubDataset, split: str) -> Iterator[Row]:
    """The rows of a split, or of the one that the name has, as they arrive; at once if they are here.

    Raises UserError.
    """
    datasets = import_datasets(dataset)
    if Path(dataset.name).is_dir() or datasets.config.HF_HUB_OFFLINE:
        yield from HubSplit(dataset, "train", val_fraction=0).iter_split(dataset.split or split)
        return
    options = {"revision": dataset.revision} if dataset.revision else {}
    n_rows = 0
    try:
        rows = datasets.load_dataset(
            dataset.name, dataset.config or None, split=dataset.split or split, streaming=True, **options
        )
        for row in rows:
            n_rows += 1
            yield row
    except Exception as error:
        raise loading_error(dataset, f" after {n_rows:,} rows", error) from None


class LoadedDataset(NamedTuple):
    """The splits of a dataset, memory-mapped."""

    splits: dict[str, Any]  # datasets.Dataset
    folder: Path  # of its files
    commit: str  # of the hub; empty for a folder


@functools.lru_cache(maxsize=32)
def load(name: str, config: str, revision: str) -> LoadedDataset:
    """A dataset of the hub, downloaded unless the cache has it, or a folder. Raises UserError."""
    source = HubDataset(name, config, revision)
    datasets = import_datasets(source)
    is_folder = Path(name).is_dir()
    try:
        if is_folder and any((Path(name) / file).exists() for file in DISK_FILES):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config or None, revision=revision or None)
    except Exception as error:
        raise loading_error(source, "", error) from None
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    files = [file["filename"] for split in splits.values() for file in split.cache_files]
    folder = Path(files[0]).parent if files else Path(name)
    if is_folder:
        return LoadedDataset(splits, folder, "")
    check_revision(source, folder.name)
    return LoadedDataset(splits, folder, folder.name)


def check_revision(source: HubDataset, commit: str) -> None:
    """Raises UserError where the library, without a network, gives another commit of its cache than was asked for."""
    import datasets

    wanted = source.revision
    is_commit = COMMIT.fullmatch(wanted) is not None
    if is_commit and not commit.startswith(wanted):
        raise UserError(f"{source}: the newest commit in the cache is {commit}; connect to the network, or ask for it")
    if wanted and not is_commit and datasets.config.HF_HUB_OFFLINE:
        raise UserError(f"{source}: which commit {wanted} is, only the network knows; the cache has @{commit}")


# ---------------------------------------------------------------------------------------------------------------------
# splits


@dataclass(frozen=True)
class HubSplit(RowSplit):
    """One side of a dataset of the hub."""

    dataset: HubDataset
    side: str  # train or val
    val_fraction: float  # of the rows, for validation, where the dataset has no split for it

    def __str__(self) -> str:
        split = f"#{self.dataset.split}" if self.dataset.split else ""
        return f"{self.dataset}{split}, {self.side}"

    @property
    def loaded(self) -> LoadedDataset:
        """The dataset. Raises UserError."""
        return load(self.dataset.name, self.dataset.config, self.dataset.revision)

    @property
    def folder(self) -> Path:
        return self.loaded.folder

    @functools.cached_property
    def split_names(self) -> tuple[str, str]:
        """The splits for training and validation; an empty one for validation if there is none. Raises UserError."""
        split = self.dataset.split or "train"
        names = list(self.loaded.splits)
        check_split(self.dataset, split, names)
        if self.dataset.val_split:
            return split, self.dataset.val_split
        base = split.partition("[")[0].partition("+")[0]
        candidates = [base.replace("train", name) for name in VALIDATION_NAMES if "train" in base]
        return split, next((name for name in candidates if name in names), "")

    def numbered_rows(self) -> Iterator[tuple[int, Row]]:
        """(number, row) from 1 on. Raises UserError."""
        split, val_split = self.split_names
        if val_split:
            rows = self.iter_split(val_split if self.side == "val" else split)
            yield from enumerate(rows, start=1)
            return
        is_val = choose_hub_rows(self.dataset, split, self.val_fraction)
        yield from select(enumerate(self.iter_split(split), start=1), is_val, self.side)

    def iter_split(self, text: str) -> Iterator[Row]:
        """The rows of a split, or of parts of splits as the library writes them: train[:10%]+test. Raises UserError."""
        datasets = import_datasets(self.dataset)
        splits = self.loaded.splits
        check_split(self.dataset, text, list(splits))
        try:
            parts = datasets.ReadInstruction.from_spec(text).to_absolute({name: len(splits[name]) for name in splits})
            chosen = [(splits[part.splitname], range(part.from_ or 0, part.to)) for part in parts]
        except (ValueError, AssertionError) as error:
            raise UserError(f"{self.dataset}#{text}: {error}; write a split as in train[:90%]") from None
        try:
            for split, numbers in chosen:
                for batch in split.select(numbers).iter(batch_size=BATCH_ROWS):
                    yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        except Exception as error:  # of a file that is damaged, or gone from the cache
            raise loading_error(self.dataset, f", {text}", error) from None

    def describe(self) -> str:
        """Where the rows come from: the commit, the split, the part of it."""
        split, val_split = self.split_names
        commit = f" at {self.loaded.commit[:12]}" if self.loaded.commit else ""
        if val_split:
            return f"{self.dataset}{commit}, {val_split if self.side == 'val' else split}"
        return f"{self.dataset}{commit}, {describe_share(self.side, self.val_fraction, split)}"


@functools.lru_cache(maxsize=32)
def choose_hub_rows(dataset: HubDataset, split: str, val_fraction: float) -> Sequence[bool]:
    """As choose_val_rows, of a split."""
    return choose_val_rows(HubSplit(dataset, "train", val_fraction).iter_split(split), val_fraction, dataset)


def check_split(dataset: HubDataset, text: str, names: Sequence[str]) -> None:
    """Raises UserError for a split that is none of the dataset's."""
    for part in text.split("+"):
        name = part.partition("[")[0]
        if name not in names:
            example = next((other for other in names if "train" in other), names[0])
            raise UserError(
                f"{dataset}#{text}: no such split{did_you_mean(name, names)}; it has {', '.join(names)}; "
                f"name one as in {dataset}#{example}"
            )


def sides(name: str, val_fraction: float) -> dict[str, HubSplit]:
    """train and val of an hf:NAME. Raises UserError."""
    dataset = HubDataset.parse(name)
    return {side: HubSplit(dataset, side, val_fraction) for side in SIDES}


def preload(names: Iterable[str]) -> None:
    """Download what the cache lacks. Raises UserError."""
    for name in names:
        dataset = HubDataset.parse(name)
        load(dataset.name, dataset.config, dataset.revision)
