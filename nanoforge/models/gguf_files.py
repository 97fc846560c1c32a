"""Models in .gguf files, llama.cpp's format: read a tensor at a time, with its shape and its tokenizer.

Quantized tensors become float32. Knows nothing of runs.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanoforge.data import gguf_metadata, model_tokenizers
from nanoforge.data.tokenization import Tokenizer
from nanoforge.errors import UserError
from nanoforge.models import families
from nanoforge.models.family import Family

HEAD = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
# Keys that don't change what the model computes, or that the others decide.
IGNORED_KEYS = ("vocab_size", "attention.key_length", "attention.value_length", "rope.dimension_count")
IGNORED_PREFIXES = ("rope.scaling.",)

# ---------------------------------------------------------------------------------------------------------------------
# tensors


class GGUFReader:
    """The tensors of a file, or of several that llama.cpp has split one into, each read when it is asked for."""

    def __init__(self, paths: list[Path]):
        self.headers = {path: gguf_metadata.read_header(path) for path in paths}
        self.metadata = self.headers[paths[0]].metadata
        self.places = {name: (path, info) for path in paths for name, info in self.headers[path].tensors.items()}

    def names(self) -> set[str]:
        return self.places.keys() - {ROPE_FACTORS}

    def read(self, name: str) -> Tensor:
        """float32. Raises KeyError, and UserError for a tensor that is cut off or of an unknown type."""
        path, info = self.places[name]
        try:
            values = import_gguf().quants.dequantize(self.read_bytes(name), info.kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise UserError(f"{path}: {name} can't be read ({type(error).__name__}: {error})") from None
        return torch.from_numpy(np.asarray(values, dtype=np.float32))

    def read_bytes(self, name: str) -> np.ndarray:
        """As the file has it: (..., bytes of a row). Raises KeyError, and ValueError for one that is cut off."""
        gguf = import_gguf()
        path, info = self.places[name]
        n_per_block, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(info.kind)]
        *rows, width = info.shape
        n_row_bytes = width // n_per_block * n_bytes
        with path.open("rb") as file:
            file.seek(info.offset)
            data = np.fromfile(file, dtype=np.uint8, count=math.prod(rows) * n_row_bytes)
        return data.reshape(*rows, n_row_bytes)


def import_gguf() -> Any:
    """The gguf package. Raises UserError."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(".gguf files need a package: pip install gguf") from None
    return gguf


def files_of(path: Path) -> list[Path]:
    """The file, and those that it names as the rest of a split one. Raises UserError."""
    n_files = gguf_metadata.read_metadata(path).get("split.count", 1)
    if n_files < 2:
        return [path]
    stem = path.stem.rpartition("-of-")[0].rpartition("-")[0]
    paths = [path.with_name(f"{stem}-{i + 1:05}-of-{n_files:05}.gguf") for i in range(n_files)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise UserError(f"{path}: is one of {n_files} files, and {missing[0]} is not beside it; download it too")
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# shape and tokenizer


class GGUFModel(NamedTuple):
    shape: dict[str, Any]  # fields of GPTConfig
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer | None  # None: the file has none


def load(path: Path) -> GGUFModel:
    """The model in a .gguf file. Raises UserError."""
    reader = GGUFReader(files_of(path))
    try:
        family = family_of(reader.metadata)
        shape = read_shape(reader, family)
        weights = family.read_tensors(reader, shape)
        has_tokenizer = "tokenizer.ggml.tokens" in reader.metadata
        tokenizer = model_tokenizers.from_gguf(reader.metadata) if has_tokenizer else None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({type(error).__name__}: {error})") from None
    return GGUFModel(shape, weights, tokenizer)


def gguf_families() -> dict[str, Family]:
    """By architecture, as .gguf files have them."""
    known = [family.in_gguf() for family in families.FAMILIES.values() if family.gguf is not None]
    return {family.model_type: family for family in known}


def family_of(metadata: Mapping[str, Any]) -> Family:
    """Raises UserError for an architecture that is not known."""
    known = gguf_families()
    architecture = metadata.get("general.architecture")
    if architecture not in known:
        raise UserError(f"general.architecture={architecture} is not supported, only {', '.join(known)}")
    return known[architecture]


def read_shape(reader: GGUFReader, family: Family) -> dict[str, Any]:
    """The fields of GPTConfig. Raises UserError for a key that the model has no part for."""
    config = read_config(reader, family)
    shape = family.read_config(config)
    shape["tie_weights"] = HEAD not in reader.names()
    for key in config.keys() - family.write_config(shape).keys():
        if key not in IGNORED_KEYS and not key.startswith(IGNORED_PREFIXES):
            raise UserError(f"{family.model_type}.{key}={config[key]} is not supported")
    return shape


def read_config(reader: GGUFReader, family: Family) -> dict[str, Any]:
    """The keys of the architecture, without its name before them."""
    prefix = f"{family.model_type}."
    config = {
        key.removeprefix(prefix): shortest(value) for key, value in reader.metadata.items() if key.startswith(prefix)
    }
    config["vocab_size"] = reader.places["token_embd.weight"][1].shape[0]
    if ROPE_FACTORS in reader.places:
        config[ROPE_FACTORS] = reader.read(ROPE_FACTORS)
    return config


def shortest(value: Any) -> Any:
    """A float32 as the number that was meant: 1e-05 for 9.99999974e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
