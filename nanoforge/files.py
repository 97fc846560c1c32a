"""Files: reading text, atomic writes, hashes and downloads. Imports no torch."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanoforge.errors import UserError

TMP_SUFFIX = ".tmp"  # of unfinished files and folders, which no reader opens


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder. It is renamed to `path` at the end, or deleted on an error.

    Readers see the old file or the new one, never a part of it. Two processes may write at once: the temporary name
    contains the process id.
    """
    tmp_path = path.with_name(f".{path.name}.{os.getpid()}{TMP_SUFFIX}")
    try:
        yield tmp_path
        os.replace(tmp_path, path)
    finally:
        tmp_path.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """The text of a file, as `decode_text` gives it. Raises UserError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    return decode_text(data, str(path))


def decode_text(data: bytes, source: str) -> str:
    """UTF-8 as text, without a byte order mark, its lines ending with LF. source: for the UserError of other bytes."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 ({error.reason} at byte {error.start}); convert it first") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically, as UTF-8."""
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def download(url: str, path: Path) -> Path:
    """The file at `path`, downloaded from the URL if it is missing. Raises UserError when that fails."""
    import urllib.error
    import urllib.request

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
