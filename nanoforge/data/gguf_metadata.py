"""The keys and values at the start of a .gguf file, and nothing of its tensors.

The gguf package reads them too, in seconds for a large vocabulary: it makes an array of every value. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nanoforge.errors import UserError

NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9


def read_metadata(path: Path) -> dict[str, Any]:
    """Key -> number, boolean, text, or a list of them. Raises UserError."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            version, _, n_keys = struct.unpack("<IQQ", read(file, 20))
            if version not in (2, 3):
                raise ValueError(f"version {version}")
            return {read_string(file): read_value(file, *struct.unpack("<I", read(file, 4))) for _ in range(n_keys)}
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, KeyError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: not a whole GGUF file of this machine's byte order ({error})") from None


def read(file: BinaryIO, n_bytes: int) -> bytes:
    data = file.read(n_bytes)
    if len(data) < n_bytes:
        raise ValueError("it ends too early")
    return data


def read_string(file: BinaryIO) -> str:
    (n_bytes,) = struct.unpack("<Q", read(file, 8))
    return read(file, n_bytes).decode("utf-8", "replace")


def read_value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return read_string(file)
    if kind == ARRAY:
        of_kind, length = struct.unpack("<IQ", read(file, 12))
        return read_array(file, of_kind, length)
    return read_array(file, kind, 1)[0]


def read_array(file: BinaryIO, kind: int, length: int) -> list[Any]:
    if kind in (STRING, ARRAY):
        return [read_value(file, kind) for _ in range(length)]
    dtype = np.dtype(NUMBERS[kind])
    return np.frombuffer(read(file, length * dtype.itemsize), dtype).tolist()
