"""Files of weights, read a tensor at a time: safetensors and PyTorch's, in one file or several with an index.

Knows nothing of families. Nothing in a PyTorch file is executed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanoforge import files
from nanoforge.errors import UserError

# In the order in which a folder's files are looked for.
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")


COMPILED_PREFIX = "_orig_mod."  # of the names of a compiled model


class SafetensorsReader:
    """The tensors of safetensors files. A file is open only while one of its tensors is read, so that no pages of it
    stay in memory."""

    def __init__(self, paths: list[Path]):
        self.places: dict[str, tuple[Path, str]] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    names = file.keys()
                self.places |= {name.removeprefix(COMPILED_PREFIX): (path, name) for name in names}
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a safetensors file ({error})") from None

    def names(self) -> set[str]:
        return {*self.places}

    def read(self, name: str) -> Tensor:
        """Raises KeyError."""
        path, own_name = self.places[name]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(own_name)


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
    """What a PyTorch file holds. Raises UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
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
