"""Models written as .gguf files, which llama.cpp runs. The way back is gguf_files.load.

export(model, Path("run.gguf"), "q8_0", chat_template)
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoforge.data import gguf_tokenizers
from nanoforge.errors import UserError
from nanoforge.files import atomic_write
from nanoforge.models import gguf_files, hf_export
from nanoforge.models.family import Family

# type -> general.file_type, llama.cpp's number of the mix. Each is also the name of a type of tensors.
TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9}
WORD_TENSORS = ("token_embd.weight", "output.weight")  # which types of 4 and 5 bits leave in 8, as llama.cpp does
NOT_OF_GGUF = ("architectures", "model_type")  # of what a family writes


def export(model: hf_export.HFModel, path: Path, kind: str, chat_template: str) -> str:
    """Write a model with its tokenizer; the architecture that it has there.

    kind: an entry of TYPES, for matrices. Memory holds a tensor at a time. Raises UserError.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError("the model's tokenizer is not known, and llama.cpp needs one; export.py hf takes it without")
    return write(model, path, kind, lambda size: gguf_tokenizers.to_gguf(tokenizer, size, chat_template))


def write(model: hf_export.HFModel, path: Path, kind: str, vocabulary: Callable[[int], dict[str, Any]]) -> str:
    """As `export`. vocabulary: from a number of tokens to the keys and values of the file that describe them."""
    gguf = gguf_files.import_gguf()
    model, family = fit(model)
    config = {key: value for key, value in family.write_config(model.shape).items() if key not in NOT_OF_GGUF}
    factors = config.pop(gguf_files.ROPE_FACTORS, None)
    metadata = {
        "general.type": "model",
        "general.name": path.stem,
        "general.file_type": TYPES[kind],
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{family.model_type}.{key}": value for key, value in config.items()},
        **vocabulary(config["vocab_size"]),
    }
    with atomic_write(path) as tmp_path:
        writer = gguf.GGUFWriter(tmp_path, family.model_type, use_temp_file=True)
        for key, value in metadata.items():
            add_key(writer, key, value)
        for name, tensor in tensors_of(model, family, factors):
            add_tensor(writer, name, tensor, kind)
        finish(writer)
    return family.model_type


def finish(writer: Any) -> None:
    """Write the file of a GGUFWriter that has all keys and tensors."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fit(model: hf_export.HFModel) -> tuple[hf_export.HFModel, Family]:
    """The model as llama.cpp can have it, and the architecture. Raises UserError that names what is in the way."""
    model, family, reasons = hf_export.in_a_family(hf_export.fit_rows(model), gguf_files.gguf_families())
    if family is None:
        nearest, reason = next(iter(reasons.items()))
        flags = re.sub(r"(^|, )(?=\w+=)", r"\1--", reason)
        raise UserError(
            f"llama.cpp has no architecture for this model; the nearest is {nearest}, but for {flags}; "
            "export.py hf takes any model"
        )
    return model, family


def add_key(writer: Any, key: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


def tensors_of(model: hf_export.HFModel, family: Family, factors: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor), one at a time."""
    if factors is not None:
        yield gguf_files.ROPE_FACTORS, factors
    for name, tensor in family.write_tensors(model.weights, model.shape):
        if name != gguf_files.HEAD or not model.shape["tie_weights"]:
            yield name, tensor


def add_tensor(writer: Any, name: str, tensor: Tensor, kind: str) -> None:
    """Quantizes a matrix; vectors and positions stay float32."""
    gguf = gguf_files.import_gguf()
    qtype = gguf.GGMLQuantizationType[type_of(name, tuple(tensor.shape), kind).upper()]
    values = tensor.detach().to(torch.float32).contiguous().numpy()
    writer.add_tensor(name, gguf.quants.quantize(values, qtype), raw_dtype=qtype)


def type_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type of a tensor in a file of a kind."""
    if len(shape) < 2 or name == "position_embd.weight":
        return "f32"
    if kind.startswith(("q4", "q5")) and name in WORD_TENSORS:
        kind = "q8_0"
    is_block = kind.startswith("q")
    return "f16" if is_block and shape[-1] % 32 else kind
