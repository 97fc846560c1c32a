"""The start of a .gguf file: its keys and values, and which tensors follow where.

The gguf package reads them too, in seconds for a large vocabulary: it makes an array of every value. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from nanoforge.errors import UserError

NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]  # as PyTorch has it; the file lists it backward
    kind: int  # ggml's number of its type
    offset: int  # of its first byte in the file


class Header(NamedTuple):
    metadata: dict[str, Any]  # key -> number, boolean, text, or a list of them
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Raises UserError."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            version, n_tensors, n_keys = struct.unpack("<IQQ", read(file, 20))
            if version not in (2, 3):
                raise ValueError(f"version {version}")
            metadata = {read_string(file): read_value(file, *struct.unpack("<I", read(file, 4))) for _ in range(n_keys)}
            infos = dict(read_tensor_info(file) for _ in range(n_tensors))
            alignment = metadata.get("general.alignment", 32)
            start = -(-file.tell() // alignment) * alignment
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, KeyError, OverflowError, MemoryError, struct.error) as error:
        raise UserError(f"{path}: not a whole GGUF file of this machine's byte order ({error})") from None
    return Header(metadata, {name: info._replace(offset=start + info.offset) for name, info in infos.items()})


def read_metadata(path: Path) -> dict[str, Any]:
    """Key -> number, boolean, text, or a list of them. Raises UserError."""
    return read_header(path).metadata


def read_tensor_info(file: BinaryIO) -> tuple[str, TensorInfo]:
    """A tensor's name, and where it lies behind the start of all tensors."""
    name = read_string(file)
    (n_dims,) = struct.unpack("<I", read(file, 4))
    *shape, kind, offset = struct.unpack(f"<{n_dims}QIQ", read(file, 8 * n_dims + 12))
    return name, TensorInfo(tuple(reversed(shape)), kind, offset)


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
