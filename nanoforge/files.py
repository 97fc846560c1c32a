"""Files: reading text, atomic writes, locks, hashes and downloads. Imports no torch.

Every command imports this first, --help too, so what is seldom used is imported where it is used.
"""

import errno
import functools
import importlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from nanoforge.console import ProgressBar, print_to_stderr
from nanoforge.errors import UserError

DOWNLOAD_BYTES = 2**20  # read at once
TMP_SUFFIX = ".tmp"  # of unfinished files and folders, which no reader opens
LOCK_ATTEMPTS = 10  # with LOCK_PAUSE between them: another process may share the lock for an instant, to look at it
LOCK_PAUSE = 0.1  # seconds
WINDOWS_LOCK_BYTE = 2**30  # beyond the file's text, which others may read


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder. It is renamed to `path` at the end, or deleted on an error.

    Readers see the old file or the new one, never a part of it. Two processes may write at once: the temporary name
    contains the process id.
    """
    tmp_path = path.with_name(f".{path.name}.{os.getpid()}{TMP_SUFFIX}")
    try:
        tmp_path.touch()
        mode = tmp_path.stat().st_mode
        yield tmp_path
        tmp_path.chmod(mode)  # what a new file has here; safetensors makes its files their owner's alone
        os.replace(tmp_path, path)
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None  # a write to a full disk names none
        raise
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


def check_writable(folder: Path, flag: str) -> None:
    """Make a folder, if it is missing. Raises UserError, which names the flag, where no file can be made in it."""
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag}: {folder} can't be written ({error.strerror}); choose another place") from None


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically, as UTF-8."""
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows syncs only what it may write
    except PermissionError:
        if is_folder:
            return  # Windows opens no folders
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def download_name(url: str) -> str:
    """The file name of a download: the last part of the address, after a hash of all of it.

    https://host/a/input.txt?download=true -> 0f1e2d3c-input.txt, another one than that of https://host/b/input.txt.
    """
    import hashlib
    from urllib.parse import unquote

    name = unquote(re.split("[?#]", url)[0].rpartition("/")[2])
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    safe_name = re.sub(r"[^\w.-]", "_", name)[-100:]
    return f"{digest}-{safe_name}"


def download(url: str, path: Path) -> Path:
    """The file at `path`, downloaded from the URL if it is missing: whole, or not at all. Raises UserError."""
    import urllib.request
    from http.client import HTTPException
    from urllib.parse import quote

    if path.exists():
        return path
    address = quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # spaces and letters of other scripts; the rest stays
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "nanoforge"})
        with urllib.request.urlopen(request, timeout=30) as response:
            if response.headers.get_content_type() == "text/html" and path.suffix not in (".html", ".htm"):
                raise UserError(
                    f"{url}: is a web page; give the address of the file itself, or a copy with --input FILE"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as tmp_path:
                save_response(response, tmp_path, f"downloading {path.name}")
    except (HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{url}: download failed ({reason}); offline, pass a local copy with --input FILE") from None
    return path


def save_response(response: Any, path: Path, title: str) -> None:
    """Write what a server sends to a file, with its progress. Raises OSError when the connection breaks off."""
    size = int(response.headers.get("Content-Length") or 0)  # 0: unknown
    n_bytes = 0
    with closing(ProgressBar(title, "bytes", size)) as progress, path.open("wb") as file:
        while data := response.read(DOWNLOAD_BYTES):
            file.write(data)
            n_bytes += len(data)
            progress.add(len(data))
        file.flush()
        os.fsync(file.fileno())
    if size and n_bytes != size:
        raise OSError(f"{n_bytes:,} of {size:,} bytes came")


# ---------------------------------------------------------------------------------------------------------------------
# locks


def lock_file(handle: int, *, shared: bool = False) -> bool:
    """Lock an open file until it is closed or this process ends, however it ends; False if another process holds it.

    shared: only to look whether another process holds it. Where the file system has no locks nobody does, which is
    reported once.
    """
    for attempt in range(1 if shared else LOCK_ATTEMPTS):
        if attempt:
            time.sleep(LOCK_PAUSE)
        try:
            lock_now(handle, shared=shared)
            return True
        except BlockingIOError:
            continue
        except OSError as error:
            if not shared:
                report_missing_locks(error.strerror)
            return True
    return False


@functools.cache
def report_missing_locks(reason: str) -> None:
    """Print, once, that nothing is locked."""
    print_to_stderr(f"files can't be locked here ({reason}): nothing keeps a second run out of a folder")


def lock_now(handle: int, *, shared: bool) -> None:
    """flock(2), or its like on Windows, which does not share. Raises BlockingIOError if another process holds the
    lock, and OSError where there are no locks."""
    try:
        import fcntl
    except ImportError:
        lock_on_windows(handle)
        return
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def lock_on_windows(handle: int) -> None:
    """Lock a byte of the file; others may not read it. Raises as lock_now does."""
    try:
        msvcrt: Any = importlib.import_module("msvcrt")
    except ImportError:
        raise OSError(errno.ENOSYS, "this system has no locks") from None
    position = os.lseek(handle, 0, os.SEEK_CUR)
    os.lseek(handle, WINDOWS_LOCK_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise BlockingIOError(error.errno, error.strerror) from None
        raise
    finally:
        os.lseek(handle, position, os.SEEK_SET)
