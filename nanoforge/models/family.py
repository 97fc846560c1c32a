"""What a family of models is: a table that maps config.json and tensors of its files onto this program's model.

The tables themselves are in families.py, the kinds of settings in hf_settings.py and gguf_settings.py. The same table
reads a model and writes one. Knows nothing of files.

    shape = family.read_config(config)              # {"n_layer": 30, "norm": "rmsnorm", ...}
    weights = family.read_tensors(reader, shape)    # "blocks.0.attn.qkv.weight" -> q_proj, k_proj and v_proj together
    config = family.write_config(shape)             # raises NoFit if the family lacks what the shape has
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from nanoforge.errors import UserError

Shape = dict[str, Any]  # fields of GPTConfig
Config = dict[str, Any]  # config.json


class NoFit(Exception):
    """A family can't hold a model of this shape. The message names what is in the way, separated by commas."""


# ---------------------------------------------------------------------------------------------------------------------
# settings: each reads some of a config into fields of the shape, and writes it from them


@dataclass(frozen=True)
class Setting:
    """Settings of config.json, and the fields of the shape that they decide."""

    fields: tuple[str, ...]
    read: Callable[[Config], Shape]
    write: Callable[[Shape], Config]  # raises NoFit


def same(field_name: str, name: str, *others: str, default: Any = None) -> Setting:
    """A field that config.json has under another name; others: names of older files; default: where there is none."""

    def read(config: Config) -> Shape:
        for known in (name, *others):
            if config.get(known) is not None:
                return {field_name: config[known]}
        if default is None:
            raise UserError(f"config.json: has no {name}")
        return {field_name: default}

    return Setting((field_name,), read, lambda shape: {name: shape[field_name]})


def neutral(shape: Mapping[str, Any]) -> Shape:
    """The fields without an effect in this shape, and their neutral values: a family holds any model without them."""
    fields: Shape = {}
    if shape["position"] != "rope":
        fields |= {"rope_base": 10000.0, "rope_scaling": {}, "rotary_fraction": 1.0, "window_rope_base": 0.0}
    if not shape["qk_norm"]:
        fields |= {"qk_norm_gain": False, "qk_norm_joint": False}
    if not shape["logit_softcap"]:
        fields["softcap"] = "rsqrt"
    if "S" not in shape["window"]:
        fields["window_rope_base"] = 0.0
    if "S" not in shape["window"] or (shape["window_size"] >= shape["block_size"] and not shape["window_rope_base"]):
        fields |= {"window": "L", "window_size": 0}
    if shape["bias"]:
        fields["qkv_bias"] = False
    return fields


# What a model has unless its family says otherwise.
PLAIN: Shape = {
    "vocabulary": "one",
    "bias": False,
    "qkv_bias": False,
    "norm_placement": "pre",
    "parallel_residual": False,
    "rope_base": 10000.0,
    "rope_scaling": {},
    "rotary_fraction": 1.0,
    "window_rope_base": 0.0,
    "qk_norm": False,
    "qk_norm_gain": False,
    "qk_norm_joint": False,
    "attention_scale": 0.0,
    "window": "L",
    "window_size": 0,
    "logit_softcap": 0.0,
    "softcap": "rsqrt",
    "embedding_scale": 1.0,
    "embedding_norm": False,
    "value_residual": False,
    "residual_scalars": False,
}

# ---------------------------------------------------------------------------------------------------------------------
# tensors


class TensorReader(Protocol):
    """The tensors of a file or of several, read one at a time."""

    def names(self) -> set[str]: ...

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Names:
    """The modules of a format that make up each of ours: one, or several whose rows follow each other."""

    outer: Mapping[str, str]
    layer_prefix: str  # with {i} for the layer
    layer: Mapping[str, str]  # names separated by spaces; ours begin with blocks.{i}.
    optional_prefix: str = ""  # that files of a model without its head leave out

    def modules(self, n_layer: int) -> Iterator[tuple[str, list[str]]]:
        """(our module, their modules) of the whole model."""
        for ours, theirs in self.outer.items():
            yield ours, [theirs]
        for i in range(n_layer):
            prefix = self.layer_prefix.format(i=i)
            for ours, theirs in self.layer.items():
                yield f"blocks.{i}.{ours}", [prefix + name for name in theirs.split()]


RowOrder = Callable[[Mapping[str, Any]], Tensor]  # shape -> the row of theirs that each row of ours is
UNUSED = re.compile(r"(\.|^)(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)$")  # buffers


@dataclass(frozen=True)
class TensorMap:
    """How one of our parameters is made of tensors of a format, and they of it."""

    ours: str
    theirs: list[str]
    transposed: bool = False  # theirs are (in, out)
    order: Tensor | None = None  # row of theirs, joined, for each row of ours
    shift: float = 0.0  # theirs - ours

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Our parameter, float32."""
        parts = [tensor.t() if self.transposed and tensor.dim() == 2 else tensor for tensor in tensors]
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), out=torch.empty(0))  # float32, in one copy
        joined = whole.float().contiguous()
        if self.order is not None:
            joined = joined[self.order]
        return joined - self.shift if self.shift else joined

    def split(self, tensor: Tensor, shape: Mapping[str, Any]) -> dict[str, Tensor]:
        """Their tensors from our parameter, or from something with the same rows, such as the B of a LoRA."""
        if self.order is not None:
            tensor = torch.empty_like(tensor).index_copy_(0, self.order, tensor)
        tensor = tensor + self.shift if self.shift else tensor  # + 0 would lose the sign of -0
        row_counts = qkv_rows(shape) if len(self.theirs) == 3 else [len(tensor)]
        parts = tensor.split(row_counts)
        if self.transposed:
            parts = tuple(part.t() if part.dim() == 2 else part for part in parts)
        return {name: part.contiguous() for name, part in zip(self.theirs, parts, strict=True)}


def qkv_rows(shape: Mapping[str, Any]) -> list[int]:
    """The rows of queries, keys and values."""
    kv_rows = (shape["n_kv_head"] or shape["n_head"]) * shape["head_dim"]
    return [shape["n_head"] * shape["head_dim"], kv_rows, kv_rows]


class FamilyWeights(Mapping[str, Tensor]):
    """Weights by model.py's names, each read from its file when it is asked for."""

    def __init__(self, reader: TensorReader, maps: Mapping[str, TensorMap]):
        self.reader = reader
        self.maps = maps

    def __getitem__(self, name: str) -> Tensor:
        tensor_map = self.maps[name]
        return tensor_map.join([self.reader.read(theirs) for theirs in tensor_map.theirs])

    def __contains__(self, name: object) -> bool:
        return name in self.maps  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)


# ---------------------------------------------------------------------------------------------------------------------
# a family


@dataclass(frozen=True)
class GGUF:
    """What llama.cpp has of a family: its keys, as settings of a config whose names lack the architecture's."""

    architecture: str
    settings: tuple[Setting, ...]
    names: Names
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields that llama.cpp can't vary, though the family can
    row_orders: Mapping[str, RowOrder] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A kind of model of transformers."""

    model_type: str  # of config.json
    architecture: str  # class of transformers
    fixed: Mapping[str, Any]  # fields of the shape that all of its models share, beyond PLAIN
    settings: tuple[Setting, ...]
    names: Names
    required: Mapping[str, Any] = field(default_factory=dict)  # settings that the model has fixed -> the only value
    transposed: frozenset[str] = frozenset()  # our modules whose weights are (in, out) in its files
    row_orders: Mapping[str, RowOrder] = field(default_factory=dict)  # our module, without blocks.{i}. -> order
    stores_gains: bool = False  # whether its files hold 1 + w of norms that keep w (rmsnorm_offset)
    gguf: GGUF | None = None  # what .gguf files have in another way; None: llama.cpp lacks the family

    def in_gguf(self) -> "Family":
        """The family as .gguf files have it: their keys in place of config.json's settings, their names of tensors."""
        assert self.gguf is not None
        return replace(
            self,
            model_type=self.gguf.architecture,
            fixed={**self.fixed, **self.gguf.fixed},
            settings=self.gguf.settings,
            names=self.gguf.names,
            required={},
            transposed=frozenset(),
            row_orders=self.gguf.row_orders,
            stores_gains=True,
        )

    def read_config(self, config: Config) -> Shape:
        """The shape of a config.json. Raises UserError for settings that the model lacks."""
        for name, value in self.required.items():
            if config.get(name, value) not in (value, None):
                raise UserError(f"config.json: {name}={config[name]} is not supported, only {value}")
        shape = {**PLAIN, **self.fixed}
        for setting in self.settings:
            shape |= setting.read(config)
        shape["n_kv_head"] = shape["n_kv_head"] or shape["n_head"]
        if shape["n_head"] % shape["n_kv_head"]:
            raise UserError(f"{shape['n_head']} attention heads don't share {shape['n_kv_head']} key/value heads")
        return shape | neutral(shape)

    def write_config(self, shape: Mapping[str, Any]) -> Config:
        """The config.json of a shape. Raises NoFit with what the family lacks."""
        shape = {**shape, **neutral(shape)}
        fixed = {**PLAIN, **self.fixed}
        decided = {name for setting in self.settings for name in setting.fields}
        misfits = [
            f"{name}={shape[name]}"
            for name, value in fixed.items()
            if name not in decided and shape.get(name, value) != value
        ]
        config: Config = {"architectures": [self.architecture], "model_type": self.model_type, **self.required}
        for setting in self.settings:
            try:
                config |= setting.write(shape)
            except NoFit as misfit:
                misfits.append(str(misfit))
        if misfits:
            raise NoFit(", ".join(misfits))
        return config

    def tensor_maps(self, shape: Mapping[str, Any]) -> Iterator[TensorMap]:
        """The maps of all parameters that the family may have."""
        offset_or_weight = "offset" if shape["norm"] == "rmsnorm_offset" else "weight"
        for ours, theirs in self.names.modules(shape["n_layer"]):
            module = re.sub(r"^blocks\.\d+\.", "", ours)
            order = self.row_orders.get(module)
            for parameter in ("weight", "bias"):
                own = offset_or_weight if parameter == "weight" and "norm" in module else parameter
                yield TensorMap(
                    ours=f"{ours}.{own}",
                    theirs=[f"{name}.{parameter}" for name in theirs],
                    transposed=module in self.transposed,
                    order=None if order is None else order(shape),
                    shift=1.0 if own == "offset" and self.stores_gains else 0.0,
                )

    def read_tensors(self, reader: TensorReader, shape: Mapping[str, Any]) -> FamilyWeights:
        """Weights by our names. Raises UserError for a tensor that the model has no place for, or a missing part."""
        available = reader.names()
        unused = {name for name in available if not UNUSED.search(name)}
        prefix = self.names.optional_prefix
        maps = {}
        for tensor_map in self.tensor_maps(shape):
            theirs = tensor_map.theirs
            if theirs[0] not in available:
                theirs = [name.removeprefix(prefix) for name in theirs]
            missing = [name for name in theirs if name not in available]
            if len(missing) == len(theirs):
                continue  # a bias, say, that the model lacks; or else load_weights names it
            if missing:
                raise UserError(f"the weights have no {missing[0]}")
            unused -= {*theirs}
            if tensor_map.ours == "head.weight" and shape["tie_weights"]:
                continue
            maps[tensor_map.ours] = replace(tensor_map, theirs=theirs)
        if unused:
            others = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            raise UserError(f"the model has no place for the tensor {sorted(unused)[0]}{others}")
        return FamilyWeights(reader, maps)

    def write_tensors(self, weights: Mapping[str, Tensor], shape: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of its files from our weights, one at a time."""
        for tensor_map in self.tensor_maps(shape):
            if tensor_map.ours in weights:
                yield from tensor_map.split(weights[tensor_map.ours], shape).items()
