"""Files written whole or not at all, their hashes, and downloads. Imports no torch."""

import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanoforge.errors import UserError

TMP_SUFFIX = ".tmp"  # of what is not finished: a reader never takes it, the next writer replaces it


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; at the end it is renamed to `path`, on an error it is deleted.

    Readers see the old file or the new one, never a part. The name has the process's id, so two writers don't meet.
    """
    tmp_path = path.with_name(f".{path.name}.{os.getpid()}{TMP_SUFFIX}")
    try:
        yield tmp_path
        os.replace(tmp_path, path)
    finally:
        tmp_path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file, UTF-8, whole or not at all."""
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def download(url: str, path: Path) -> Path:
    """The file at `path`, downloaded if it is not there. Raises UserError that says what to do offline."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as tmp_path, urllib.request.urlopen(url, timeout=30) as response:
            tmp_path.write_bytes(response.read())
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{url}: download failed ({reason}); offline, pass a local copy with --input FILE") from None
    return path
