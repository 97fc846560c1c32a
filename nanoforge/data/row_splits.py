"""Splits of rows that are no files of their own: which rows are for training, and which are put aside for validation.

A row's hash decides its side, so that the same rows are put aside each time, whatever their order, and equal rows are
on the same side. Imports neither torch nor numpy.
"""

import datetime
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanoforge.data import tables
from nanoforge.data.tables import Row
from nanoforge.errors import UserError

SIDES = ("train", "val")


class RowSplit(ABC):
    """The rows for training, or those for validation, in the order of their file or dataset."""

    @abstractmethod
    def numbered_rows(self) -> Iterator[tuple[int, Row]]:
        """(line or number, row). Raises UserError."""

    @abstractmethod
    def describe(self) -> str:
        """Where the rows come from, and which part of them these are. Raises UserError."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The folder that the rows lie in. Raises UserError."""

    def fingerprint(self) -> str:
        """The number of rows, and a hash of them that no cache or file format changes. Raises UserError."""
        n_rows = 0
        digest = hashlib.sha256()
        for _, row in self.numbered_rows():
            n_rows += 1
            digest.update(encode_row(row))
        return f"{n_rows} rows, {digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class FileSplit(RowSplit):
    """One side of a file."""

    path: Path
    side: str  # train or val
    val_fraction: float  # of the rows, for validation

    def __str__(self) -> str:
        return str(self.path)

    @property
    def folder(self) -> Path:
        return self.path.parent

    def numbered_rows(self) -> Iterator[tuple[int, Row]]:
        is_val = choose_file_rows(self.path, self.path.stat().st_mtime_ns, self.val_fraction)
        return select(tables.numbered_rows(self.path), is_val, self.side)

    def describe(self) -> str:
        return f"{self.path}, {describe_share(self.side, self.val_fraction, 'the rows')}"


def file_sides(path: Path, val_fraction: float) -> dict[str, FileSplit]:
    """train and val of a file."""
    return {side: FileSplit(path, side, val_fraction) for side in SIDES}


@functools.lru_cache(maxsize=32)
def choose_file_rows(path: Path, mtime_ns: int, val_fraction: float) -> Sequence[bool]:
    """As choose_val_rows, of a file in the state of this time."""
    return choose_val_rows((row for _, row in tables.numbered_rows(path)), val_fraction, path)


def choose_val_rows(rows: Iterable[Row], val_fraction: float, source: object) -> Sequence[bool]:
    """Of each row whether it is for validation: those with the smallest hashes, at least one row, and not all.

    source: of the rows, for errors. Raises UserError.
    """
    keys = [hash_row(row) for row in rows]
    if len(set(keys)) < 2:
        raise UserError(f"{source}: needs two different rows, one to train on and one for validation")
    n_val = max(1, round(val_fraction * len(keys)))
    largest = sorted(keys)[n_val - 1]
    if largest == max(keys):
        largest = max(key for key in keys if key < largest)
    return [key <= largest for key in keys]


def select(numbered_rows: Iterable[tuple[int, Row]], is_val: Sequence[bool], side: str) -> Iterator[tuple[int, Row]]:
    """The rows of one side."""
    for numbered_row, for_val in zip(numbered_rows, is_val, strict=True):
        if for_val == (side == "val"):
            yield numbered_row


def describe_share(side: str, val_fraction: float, whole: str) -> str:
    """Which part of the whole a side is."""
    use, share = ("validation, ", val_fraction) if side == "val" else ("", 1 - val_fraction)
    return f"{use}{share:.3g} of {whole} by a hash of each row (--val_fraction)"


def encode_row(row: Row) -> bytes:
    return json.dumps(row, sort_keys=True, default=encode_value).encode() + b"\n"


def encode_value(value: object) -> str:
    """What JSON has no form for: dates and bytes as text; of pictures and the like, which are not read, the kind."""
    is_text = isinstance(value, datetime.date | datetime.time | datetime.timedelta | bytes)
    return str(value) if is_text else type(value).__name__


def hash_row(row: Row) -> int:
    """A hash of a row, below 2^64."""
    return int.from_bytes(hashlib.blake2b(encode_row(row), digest_size=8).digest(), "big")
