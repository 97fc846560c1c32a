"""Files of weights, read a tensor at a time: safetensors and PyTorch's, in one file or several with an index.

Knows nothing of families. Nothing in a PyTorch file is executed.
"""

import json
import math
import mmap
import zipfile
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanoforge import files
from nanoforge.errors import UserError

# In the order in which a folder's files are looked for.
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
COMPILED_PREFIX = "_orig_mod."  # of the names of a compiled model
DTYPES = {  # of safetensors
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}


class Place(NamedTuple):
    """Where a tensor lies."""

    path: Path
    start: int  # byte of the file
    dtype: str
    shape: list[int]


class SafetensorsReader:
    """The tensors of safetensors files. They are read, not mapped: a file that is replaced later changes no weights."""

    def __init__(self, paths: list[Path]):
        self.places: dict[str, Place] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt"):  # checks the header
                    pass
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a safetensors file ({error})") from None
            with path.open("rb") as file:
                header_size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_size))
            for name, entry in header.items():
                if name != "__metadata__":
                    start = 8 + header_size + entry["data_offsets"][0]
                    place = Place(path, start, entry["dtype"], entry["shape"])
                    self.places[name.removeprefix(COMPILED_PREFIX)] = place

    def names(self) -> set[str]:
        return {*self.places}

    def read(self, name: str) -> Tensor:
        """Raises KeyError, and UserError for a dtype that torch's computations lack."""
        place = self.places[name]
        if place.dtype not in DTYPES:
            raise UserError(f"{place.path}: {name} has the dtype {place.dtype}, not one of {', '.join(DTYPES)}")
        dtype = DTYPES[place.dtype]
        size = math.prod(place.shape) * dtype.itemsize
        if not size:
            return torch.empty(place.shape, dtype=dtype)
        memory = mmap.mmap(-1, size)  # what malloc gives would stay in its heap, between tensors of other sizes
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.start)
            read_into(file, memoryview(memory))
        return torch.frombuffer(memory, dtype=dtype).view(place.shape)


def read_into(file: FileIO, buffer: memoryview) -> None:
    """Fill the buffer from the file, which may give a part of it at a time. Raises UserError where it ends before."""
    while len(buffer):
        count = file.readinto(buffer)
        if not count:
            raise UserError(f"{file.name}: ends within a tensor; it was changed while it was read")
        buffer = buffer[count:]


class TensorsReader:
    """Tensors in memory, or mapped into it."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = {name.removeprefix(COMPILED_PREFIX): tensor for name, tensor in tensors.items()}

    def names(self) -> set[str]:
        return {*self.tensors}

    def read(self, name: str) -> Tensor:
        """Raises KeyError."""
        return self.tensors[name]


def load_torch_file(path: Path) -> dict[str, Any]:
    """What a PyTorch file holds, mapped into memory unless it is of a version before 1.6. Raises UserError."""
    if path.suffix not in TORCH_SUFFIXES:
        raise UserError(f"{path}: no file of weights ({', '.join(('.safetensors', '.gguf', *TORCH_SUFFIXES))})")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load raises nearly anything on a broken file
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a PyTorch file of weights ({type(error).__name__}: {reason})") from None


def open_weights(path: Path) -> SafetensorsReader | TensorsReader:
    """The weights in a file, or in a folder: whole or, with an index beside them, in several. Raises UserError."""
    paths = weight_paths(path)
    if paths[0].suffix == ".safetensors":
        return SafetensorsReader(paths)
    tensors: dict[str, Tensor] = {}
    for file in paths:
        tensors |= load_torch_file(file)
    return TensorsReader(tensors)


def weight_paths(path: Path) -> list[Path]:
    """The files of a model's weights. Raises UserError."""
    if path.is_file():
        return [path]
    for name in WHOLE_FILES:
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(files.read_text(index))["weight_map"].values()))
            missing = [shard for shard in shards if not (path / shard).is_file()]
            if missing:
                raise UserError(f"{index}: lists {missing[0]}, which is not there; download the model again")
            return [path / shard for shard in shards]
    raise UserError(f"{path}: has no {' or '.join(WHOLE_FILES)}, and no index of several files")
