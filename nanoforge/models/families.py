"""Families of open models: how config.json and the names of tensors of each map onto this program's model, and back.

A family is one entry of FAMILIES, a table: settings of config.json and the fields of GPTConfig that they are, the
fields that all of its models share, and the names of its modules. The same table loads a model and writes one. Knows
nothing of files.

    family = family_of({"model_type": "llama", ...})
    shape = family.read_config(config)              # {"n_layer": 30, "norm": "rmsnorm", ...}
    weights = family.read_tensors(reader, shape)    # "blocks.0.attn.qkv.weight" -> q_proj, k_proj and v_proj together
    config = family.write_config(shape)             # raises NoFit if the family lacks what the shape has
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from nanoforge.errors import UserError, did_you_mean

Shape = dict[str, Any]  # fields of GPTConfig
Config = dict[str, Any]  # config.json


class NoFit(Exception):
    """A family can't hold a model of this shape. The message names what is in the way, separated by commas."""


# ---------------------------------------------------------------------------------------------------------------------
# settings: each reads some of config.json into fields of the shape, and writes it from them


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


def activation_setting(name: str, *, default: str) -> Setting:
    """The activation of the MLP, by Hugging Face's names. default: the family's own."""
    ours = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "swish": "silu"}
    theirs = {"gelu_tanh": "gelu_pytorch_tanh", ours.get(default, default): default}

    def read(config: Config) -> Shape:
        value = config.get(name) or default
        return {"activation": ours.get(value, value)}

    return Setting(("activation",), read, lambda shape: {name: theirs.get(shape["activation"], shape["activation"])})


def mlp_setting(name: str, *, default_ratio: float = 0) -> Setting:
    """The hidden dimension of the MLP; null in a file: default_ratio x n_embd."""

    def read(config: Config) -> Shape:
        n_embd = config.get("hidden_size") or config["n_embd"]
        return {"mlp_ratio": (config.get(name) or default_ratio * n_embd) / n_embd}

    return Setting(("mlp_ratio",), read, lambda shape: {name: mlp_hidden(shape)})


def mlp_hidden(shape: Mapping[str, Any]) -> int:
    """The hidden dimension of the MLP."""
    return round(shape["mlp_ratio"] * shape["n_embd"])


ROPE_TYPES = {  # rope_type -> its numbers
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}


def read_scaling(parameters: Mapping[str, Any], context: int) -> dict[str, Any]:
    """RoPE scaling with all of its numbers. context: of the model. Raises UserError for kinds that the model lacks."""
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type == "default":
        return {}
    names = ROPE_TYPES.get(rope_type)
    if names is None:
        raise UserError(f"config.json: rope_type={rope_type} is not supported, only {', '.join(ROPE_TYPES)}")
    known = {"original_max_position_embeddings": context, **drop_nulls(parameters)}
    if rope_type == "yarn":
        if known.get("truncate") is False:
            raise UserError("config.json: truncate=false of rope_type=yarn is not supported, only true")
        known = {"beta_fast": 32, "beta_slow": 1, "attention_factor": yarn_attention_factor(known), **known}
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(f"config.json: rope_type={rope_type} has no {', '.join(missing)}")
    return {"rope_type": rope_type, **{name: known[name] for name in names}}


def yarn_attention_factor(parameters: Mapping[str, Any]) -> float:
    """What YaRN multiplies queries and keys by where a file does not say it (Peng et al. 2023, equation 22)."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(max(parameters.get("factor", 1), 1)) + 1

    weight, other_weight = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(weight) / scale(other_weight) if weight and other_weight else scale(1)


def drop_nulls(config: Mapping[str, Any]) -> Config:
    return {name: value for name, value in config.items() if value is not None}


def read_rope(config: Config) -> Shape:
    """The RoPE of all layers: rope_parameters of newer files, or rope_theta and rope_scaling of older ones."""
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or parameters
    base: float = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    fraction: float = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return {
        "rope_base": float(base),
        "rope_scaling": read_scaling(scaling, config["max_position_embeddings"]),
        "rotary_fraction": float(fraction),
    }


def read_whole_rope(config: Config) -> Shape:
    """Raises UserError for heads that are rotated in part."""
    rope = read_rope(config)
    if rope["rotary_fraction"] != 1:
        raise UserError(f"config.json: partial_rotary_factor={rope['rotary_fraction']} is not supported, only 1")
    return rope


def write_rope(shape: Shape) -> Config:
    """As older files have it, which newer versions of transformers read too."""
    if shape["rotary_fraction"] != 1:
        raise NoFit(f"rotary_fraction={shape['rotary_fraction']}")
    return {"rope_theta": shape["rope_base"], "rope_scaling": shape["rope_scaling"] or None}


ROPE = Setting(("rope_base", "rope_scaling", "rotary_fraction"), read_whole_rope, write_rope)


def read_neox_rope(config: Config) -> Shape:
    parameters = config.get("rope_parameters") or {}
    old = {"rope_theta": config.get("rotary_emb_base", 10000), "partial_rotary_factor": config.get("rotary_pct", 0.25)}
    return read_rope({**config, "rope_parameters": {**old, **parameters}})


NEOX_ROPE = Setting(
    ("rope_base", "rope_scaling", "rotary_fraction"),
    read_neox_rope,
    lambda shape: {
        "rotary_emb_base": shape["rope_base"],
        "rotary_pct": shape["rotary_fraction"],
        "rope_scaling": shape["rope_scaling"] or None,
    },
)


def read_gemma_rope(config: Config) -> Shape:
    """Gemma 3's windowed layers have a base of their own, and no scaling."""
    layers = config.get("rope_parameters") or {}
    whole = layers.get("full_attention", {"rope_theta": config.get("rope_theta") or 1000000.0})
    local = layers.get("sliding_attention", {"rope_theta": config.get("rope_local_base_freq") or 10000.0})
    if read_scaling(local, 0):
        raise UserError("config.json: a scaled RoPE of sliding_attention is not supported")
    rope = read_rope({**config, "rope_parameters": whole})
    return {**rope, "window_rope_base": float(local["rope_theta"])}


def write_gemma_rope(shape: Shape) -> Config:
    local = shape["window_rope_base"] or shape["rope_base"]
    if not shape["window_rope_base"] and shape["rope_scaling"]:
        raise NoFit("rope_scaling, of sliding-window layers as well")
    return {**write_rope(shape), "rope_local_base_freq": local}


GEMMA_ROPE = Setting((*ROPE.fields, "window_rope_base"), read_gemma_rope, write_gemma_rope)


def shorten_pattern(letters: str) -> str:
    """The shortest pattern that, repeated, begins with these letters."""
    for length in range(1, len(letters)):
        if all(letters[i] == letters[i % length] for i in range(len(letters))):
            return letters[:length]
    return letters


def layer_letters(config: Config) -> str:
    """L or S of each layer: layer_types, or what older files have in its place."""
    n_layer, size = config["num_hidden_layers"], config.get("sliding_window")
    kinds = config.get("layer_types")
    if kinds:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown:
            raise UserError(f"config.json: layer_types {', '.join(sorted(unknown))} are not supported")
        return "".join("S" if kind == "sliding_attention" and size else "L" for kind in kinds)
    is_qwen = config["model_type"].startswith("qwen")
    if not size or not config.get("use_sliding_window", not is_qwen):
        return "L" * n_layer
    if config["model_type"] == "gemma3_text":
        period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        return "".join("S" if (layer + 1) % period else "L" for layer in range(n_layer))
    first = config.get("max_window_layers", 28) if is_qwen else 0
    return "".join("S" if layer >= first else "L" for layer in range(n_layer))


def read_window(config: Config) -> Shape:
    letters = layer_letters(config)
    size = config["sliding_window"] if "S" in letters else 0
    return {"window": shorten_pattern(letters), "window_size": size}


def layer_types(shape: Shape) -> list[str]:
    """Hugging Face's name of each layer's attention."""
    window = shape["window"]
    letters = [window[layer % len(window)] for layer in range(shape["n_layer"])]
    return ["sliding_attention" if letter == "S" else "full_attention" for letter in letters]


def write_mixed_window(shape: Shape) -> Config:
    """For families whose layers may differ."""
    kinds = layer_types(shape)
    is_windowed = "sliding_attention" in kinds
    return {
        "layer_types": kinds,
        "use_sliding_window": is_windowed,
        "sliding_window": shape["window_size"] if is_windowed else None,
        "max_window_layers": 0 if is_windowed else shape["n_layer"],
    }


def write_equal_window(shape: Shape) -> Config:
    """For families whose layers are all alike."""
    kinds = set(layer_types(shape))
    if len(kinds) > 1:
        raise NoFit(f"window={shape['window']}")
    return {"sliding_window": shape["window_size"] if kinds == {"sliding_attention"} else None}


def write_gemma_window(shape: Shape) -> Config:
    return {"layer_types": layer_types(shape), "sliding_window": shape["window_size"] or shape["block_size"]}


MIXED_WINDOW = Setting(("window", "window_size"), read_window, write_mixed_window)
EQUAL_WINDOW = Setting(("window", "window_size"), read_window, write_equal_window)
GEMMA_WINDOW = Setting(("window", "window_size"), read_window, write_gemma_window)


def read_head_dim(config: Config) -> Shape:
    return {"head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]}


def write_equal_head_dim(shape: Shape) -> Config:
    """For families without a setting for it."""
    if shape["head_dim"] * shape["n_head"] != shape["n_embd"]:
        raise NoFit(f"head_dim={shape['head_dim']}")
    return {}


HEAD_DIM = Setting(("head_dim",), read_head_dim, lambda shape: {"head_dim": shape["head_dim"]})
EQUAL_HEAD_DIM = Setting(("head_dim",), read_head_dim, write_equal_head_dim)
GPT2_HEAD_DIM = Setting(
    ("head_dim",), lambda config: {"head_dim": config["n_embd"] // config["n_head"]}, write_equal_head_dim
)

VOCAB = Setting(
    ("vocab_sizes",),
    lambda config: {"vocab_sizes": (config["vocab_size"],)},
    lambda shape: {"vocab_size": sum(shape["vocab_sizes"])},
)
GEMMA_SCALES = Setting(
    ("embedding_scale", "attention_scale"),
    lambda config: {
        "embedding_scale": config["hidden_size"] ** 0.5,
        "attention_scale": config.get("query_pre_attn_scalar", 256) ** -0.5,
    },
    lambda shape: write_gemma_scales(shape),
)


def write_gemma_scales(shape: Shape) -> Config:
    if shape["embedding_scale"] != shape["n_embd"] ** 0.5:
        raise NoFit(f"embedding_scale={shape['embedding_scale']}")
    scale = shape["attention_scale"] or shape["head_dim"] ** -0.5
    scalar = scale**-2
    return {"query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar}


def read_tanh_softcap(config: Config) -> Shape:
    return {"logit_softcap": float(config.get("final_logit_softcapping") or 0.0), "softcap": "tanh"}


def write_tanh_softcap(shape: Shape) -> Config:
    if shape["logit_softcap"] and shape["softcap"] != "tanh":
        raise NoFit(f"softcap={shape['softcap']}")
    return {"final_logit_softcapping": shape["logit_softcap"] or None}


TANH_SOFTCAP = Setting(("logit_softcap", "softcap"), read_tanh_softcap, write_tanh_softcap)


def sizes(*, context: str = "max_position_embeddings") -> tuple[Setting, ...]:
    """The sizes of a model, by the names that most families use."""
    return (
        VOCAB,
        same("block_size", context),
        same("n_layer", "num_hidden_layers"),
        same("n_embd", "hidden_size"),
        same("n_head", "num_attention_heads"),
    )


def kv_heads() -> Setting:
    """Grouped heads; older files without the setting have as many as query heads."""

    def read(config: Config) -> Shape:
        return {"n_kv_head": config.get("num_key_value_heads") or config["num_attention_heads"]}

    return Setting(("n_kv_head",), read, lambda shape: {"num_key_value_heads": shape["n_kv_head"]})


def equal_kv_heads() -> Setting:
    """For families without grouped heads."""

    def write(shape: Shape) -> Config:
        if shape["n_kv_head"] != shape["n_head"]:
            raise NoFit(f"n_kv_head={shape['n_kv_head']}")
        return {}

    return Setting(("n_kv_head",), lambda config: {"n_kv_head": 0}, write)


def tied(*, default: bool) -> Setting:
    return same("tie_weights", "tie_word_embeddings", default=default)


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
    gguf: "GGUF | None" = None  # what .gguf files have in another way; None: llama.cpp lacks the family

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

    def tensor_maps(
        self, shape: Mapping[str, Any], names: Names | None = None, row_orders: Mapping[str, RowOrder] | None = None
    ) -> Iterator[TensorMap]:
        """The maps of all parameters that the family may have. names, row_orders: of another format than its own."""
        offset_or_weight = "offset" if shape["norm"] == "rmsnorm_offset" else "weight"
        for ours, theirs in (names or self.names).modules(shape["n_layer"]):
            module = re.sub(r"^blocks\.\d+\.", "", ours)
            order = (self.row_orders if row_orders is None else row_orders).get(module)
            for parameter in ("weight", "bias"):
                own = offset_or_weight if parameter == "weight" and "norm" in module else parameter
                yield TensorMap(
                    ours=f"{ours}.{own}",
                    theirs=[f"{name}.{parameter}" for name in theirs],
                    transposed=names is None and module in self.transposed,
                    order=None if order is None else order(shape),
                    shift=1.0 if own == "offset" and self.stores_gains else 0.0,
                )

    def read_tensors(
        self,
        reader: TensorReader,
        shape: Mapping[str, Any],
        names: Names | None = None,
        row_orders: Mapping[str, RowOrder] | None = None,
    ) -> FamilyWeights:
        """Weights by our names. Raises UserError for a tensor that the model has no place for, or a missing part."""
        available = reader.names()
        unused = {name for name in available if not UNUSED.search(name)}
        prefix = (names or self.names).optional_prefix
        maps = {}
        for tensor_map in self.tensor_maps(shape, names, row_orders):
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

    def write_tensors(
        self,
        weights: Mapping[str, Tensor],
        shape: Mapping[str, Any],
        names: Names | None = None,
        row_orders: Mapping[str, RowOrder] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of a format from our weights, one at a time."""
        for tensor_map in self.tensor_maps(shape, names, row_orders):
            if tensor_map.ours in weights:
                yield from tensor_map.split(weights[tensor_map.ours], shape).items()


# ---------------------------------------------------------------------------------------------------------------------
# orders of rows


def interleaved_qkv(shape: Mapping[str, Any]) -> Tensor:
    """GPT-NeoX's fused rows, (H, 3, D), as queries, keys, values; then its partial rotary halves."""
    H, D = shape["n_head"], shape["head_dim"]
    rows = torch.arange(3 * H * D).view(H, 3, D)
    halves = rotary_halves(D, shape["rotary_fraction"])
    return torch.cat((rows[:, 0][:, halves].flatten(), rows[:, 1][:, halves].flatten(), rows[:, 2].flatten()))


def rotary_halves(D: int, fraction: float) -> Tensor:
    """Entries of a head so that RoPE turns pairs (i, i + D / 2): of r rotated ones, (0 .. r / 2) begin the first half
    and (r / 2 .. r) the second; the others fill both."""
    r = 2 * int(fraction * D / 2)
    rest = torch.arange(r, D).view(2, -1)
    return torch.cat((torch.arange(r // 2), rest[0], torch.arange(r // 2, r), rest[1]))


def reordered_heads(shape: Mapping[str, Any], order: Tensor) -> Tensor:
    """Rows of queries, keys and values, with the entries of each query and key head in this order (D,)."""
    q_rows, k_rows, v_rows = qkv_rows(shape)
    rows = torch.arange(q_rows + k_rows).view(-1, shape["head_dim"])[:, order].flatten()
    return torch.cat((rows, torch.arange(q_rows + k_rows, q_rows + k_rows + v_rows)))


def swapped_halves(shape: Mapping[str, Any]) -> Tensor:
    """nanochat turns heads by negative angles: its halves swapped turn by positive ones."""
    return reordered_heads(shape, torch.arange(shape["head_dim"]).roll(shape["head_dim"] // 2))


def paired_halves(shape: Mapping[str, Any]) -> Tensor:
    """llama.cpp turns the pairs (2 i, 2 i + 1) of Llama's heads, not (i, i + D / 2)."""
    return reordered_heads(shape, torch.arange(shape["head_dim"]).view(-1, 2).t().flatten())


def partial_halves(shape: Mapping[str, Any]) -> Tensor:
    """llama.cpp has GPT-NeoX's rows as queries, keys, values, and turns the first entries of a head."""
    return reordered_heads(shape, rotary_halves(shape["head_dim"], shape["rotary_fraction"]))


# ---------------------------------------------------------------------------------------------------------------------
# GGUF: keys of metadata without the architecture's prefix. Beside them, the config has vocab_size and, where the file
# has that tensor, rope_freqs.weight.


def gguf_activation(*names: str) -> Setting:
    """llama.cpp has one for each architecture; others: those that are nearly the same."""

    def write(shape: Shape) -> Config:
        if shape["activation"] not in names:
            raise NoFit(f"activation={shape['activation']}")
        return {}

    return Setting(("activation",), lambda config: {"activation": names[0]}, write)


def gguf_head_dim(config: Config) -> Shape:
    head_dim = config.get("attention.key_length") or config["embedding_length"] // config["attention.head_count"]
    if config.get("attention.value_length", head_dim) != head_dim:
        raise UserError(f"attention.value_length={config['attention.value_length']}: not attention.key_length")
    return {"head_dim": head_dim}


def gguf_sizes(eps: str) -> tuple[Setting, ...]:
    """What all architectures have. eps: the name of the epsilon of their norms."""
    return (
        VOCAB,
        same("block_size", "context_length"),
        same("n_layer", "block_count"),
        same("n_embd", "embedding_length"),
        same("n_head", "attention.head_count"),
        Setting(
            ("n_kv_head",),
            lambda config: {"n_kv_head": config.get("attention.head_count_kv") or config["attention.head_count"]},
            lambda shape: {"attention.head_count_kv": shape["n_kv_head"]},
        ),
        Setting(
            ("mlp_ratio",),
            lambda config: {"mlp_ratio": config["feed_forward_length"] / config["embedding_length"]},
            lambda shape: {"feed_forward_length": mlp_hidden(shape)},
        ),
        same("norm_eps", f"attention.{eps}"),
    )


GGUF_HEAD_DIM = Setting(
    ("head_dim",),
    gguf_head_dim,
    lambda shape: {"attention.key_length": shape["head_dim"], "attention.value_length": shape["head_dim"]},
)
GGUF_EQUAL_HEAD_DIM = Setting(("head_dim",), gguf_head_dim, write_equal_head_dim)


def read_gguf_yarn(config: Config) -> dict[str, Any]:
    factor = float(config["rope.scaling.factor"])
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": config["rope.scaling.original_context_length"],
        "beta_fast": config.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": config.get("rope.scaling.yarn_beta_slow", 1.0),
        "attention_factor": config.get("rope.scaling.attn_factor", 1.0) * yarn_attention_factor({"factor": factor}),
    }


def write_gguf_yarn(scaling: dict[str, Any]) -> Config:
    return {
        "rope.scaling.factor": float(scaling["factor"]),
        "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(scaling["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(scaling["beta_slow"]),
        "rope.scaling.attn_factor": scaling["attention_factor"] / yarn_attention_factor(scaling),
    }


def read_gguf_linear(config: Config) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": float(config["rope.scaling.factor"])}


def write_gguf_linear(scaling: dict[str, Any]) -> Config:
    return {"rope.scaling.factor": float(scaling["factor"])}


# RoPE scalings that llama.cpp has for all architectures, by rope.scaling.type: how each is read and written.
GGUF_SCALINGS = {
    "linear": (read_gguf_linear, write_gguf_linear),
    "yarn": (read_gguf_yarn, write_gguf_yarn),
}


def gguf_rope(*, partial: bool = False, llama3: bool = False) -> Setting:
    """partial: rotates a part of a head; llama3: has Llama 3's scaling, as a tensor of factors."""

    def read(config: Config) -> Shape:
        head_dim = gguf_head_dim(config)["head_dim"]
        base = float(config.get("rope.freq_base", 10000.0))
        scaling: dict[str, Any] = {}
        kind = config.get("rope.scaling.type", "none")
        if "rope_freqs.weight" in config:
            scaling = llama3_of_factors(config["rope_freqs.weight"], base, head_dim)
        elif kind in GGUF_SCALINGS:
            read_numbers, _ = GGUF_SCALINGS[kind]
            scaling = read_numbers(config)
        elif kind != "none":
            raise UserError(f"rope.scaling.type={kind} is not supported, only {', '.join(GGUF_SCALINGS)}")
        fraction = config.get("rope.dimension_count", head_dim) / head_dim
        return {"rope_base": base, "rope_scaling": scaling, "rotary_fraction": fraction}

    def write(shape: Shape) -> Config:
        scaling, head_dim = shape["rope_scaling"], shape["head_dim"]
        if shape["rotary_fraction"] != 1 and not partial:
            raise NoFit(f"rotary_fraction={shape['rotary_fraction']}")
        config = {
            "rope.freq_base": float(shape["rope_base"]),
            "rope.dimension_count": 2 * int(shape["rotary_fraction"] * head_dim / 2),
        }
        if not scaling:
            return config
        kind = scaling["rope_type"]
        if kind in GGUF_SCALINGS:
            _, write_numbers = GGUF_SCALINGS[kind]
            return {**config, "rope.scaling.type": kind, **write_numbers(scaling)}
        if kind == "llama3" and llama3:
            return {**config, "rope_freqs.weight": llama3_factors(scaling, shape["rope_base"], head_dim)}
        raise NoFit(f"rope_scaling={scaling}")

    return Setting(("rope_base", "rope_scaling", "rotary_fraction"), read, write)


def llama3_factors(scaling: Mapping[str, Any], base: float, head_dim: int) -> Tensor:
    """What llama.cpp divides the frequencies by, (D / 2,): 1 for fast ones, factor for slow ones, between them both."""
    frequency = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    wavelength = 2 * math.pi / frequency
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelength - low) / (high - low)
    blended = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return blended.where(smooth < 1, 1.0).where(smooth > 0, float(scaling["factor"]))


def llama3_of_factors(factors: Tensor, base: float, head_dim: int) -> dict[str, Any]:
    """The scaling with these factors; the file does not have its numbers. Raises UserError for another kind."""
    for exponent in range(4, 22):
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,  # as of all models of Meta's
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2**exponent,
        }
        expected = llama3_factors(scaling, base, head_dim)
        if factors.shape == expected.shape and torch.allclose(factors, expected, rtol=1e-4):
            return scaling
    raise UserError("rope_freqs.weight: not the RoPE scaling of a Llama 3, and no other is supported")


GEMMA_PERIOD = 6  # of layers with full attention, where the file does not say


def read_gguf_window(config: Config) -> Shape:
    period = config.get("attention.sliding_window_pattern", GEMMA_PERIOD)
    is_windowed = "attention.sliding_window" in config and period > 1
    letters = [("L" if (layer + 1) % period == 0 else "S") for layer in range(config["block_count"])]
    return {
        "window": shorten_pattern("".join(letters)) if is_windowed else "L",
        "window_size": config["attention.sliding_window"] if is_windowed else 0,
        "window_rope_base": float(config.get("rope.freq_base_swa", 10000.0)),
    }


def write_gguf_window(shape: Shape) -> Config:
    letters = [shape["window"][layer % len(shape["window"])] for layer in range(shape["n_layer"])]
    period = next((layer + 1 for layer, letter in enumerate(letters) if letter == "L"), len(letters) + 1)
    expected = [("L" if (layer + 1) % period == 0 else "S") for layer in range(len(letters))]
    if letters != expected:
        raise NoFit(f"window={shape['window']}")
    return {
        "attention.sliding_window": shape["window_size"] or shape["block_size"],
        "attention.sliding_window_pattern": period,
        "rope.freq_base_swa": float(shape["window_rope_base"] or shape["rope_base"]),
    }


GGUF_WINDOW = Setting(("window", "window_size", "window_rope_base"), read_gguf_window, write_gguf_window)
GEMMA_27B_LAYERS = 62  # llama.cpp scales the attention of a model of as many layers by n_embd / n_head


def gguf_gemma_scale(n_layer: int, n_embd: int, n_head: int, head_dim: int) -> float:
    """What llama.cpp multiplies a Gemma's scores by."""
    return float(n_embd // n_head if n_layer == GEMMA_27B_LAYERS else head_dim) ** -0.5


def read_gguf_scales(config: Config) -> Shape:
    n_embd = config["embedding_length"]
    scale = gguf_gemma_scale(
        n_layer=config["block_count"],
        n_embd=n_embd,
        n_head=config["attention.head_count"],
        head_dim=gguf_head_dim(config)["head_dim"],
    )
    return {"embedding_scale": n_embd**0.5, "attention_scale": scale}


def write_gguf_scales(shape: Shape) -> Config:
    scale = gguf_gemma_scale(**{name: shape[name] for name in ("n_layer", "n_embd", "n_head", "head_dim")})
    write_gemma_scales(shape)
    if abs((shape["attention_scale"] or shape["head_dim"] ** -0.5) - scale) > 1e-6:
        raise NoFit(f"attention_scale={shape['attention_scale']}")
    return {}


GGUF_NAMES = Names(
    outer={"wte": "token_embd", "position": "position_embd", "norm": "output_norm", "head": "output"},
    layer_prefix="blk.{i}.",
    layer={
        "norm_1": "attn_norm",
        "attn.qkv": "attn_q attn_k attn_v",
        "attn.q_norm.norm": "attn_q_norm",
        "attn.k_norm.norm": "attn_k_norm",
        "attn.proj": "attn_output",
        "post_norm_1": "post_attention_norm",
        "norm_2": "ffn_norm",
        "mlp.gate": "ffn_gate",
        "mlp.up": "ffn_up",
        "mlp.proj": "ffn_down",
        "post_norm_2": "post_ffw_norm",
    },
)
FUSED_GGUF_NAMES = replace(GGUF_NAMES, layer={**GGUF_NAMES.layer, "attn.qkv": "attn_qkv"})
RMS_SIZES = gguf_sizes("layer_norm_rms_epsilon")
LAYER_NORM_SIZES = gguf_sizes("layer_norm_epsilon")

# ---------------------------------------------------------------------------------------------------------------------
# the families

OUTER = {"wte": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
LLAMA_ATTENTION = {
    "norm_1": "input_layernorm",
    "attn.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.q_norm.norm": "self_attn.q_norm",
    "attn.k_norm.norm": "self_attn.k_norm",
    "attn.proj": "self_attn.o_proj",
}
GATED_MLP = {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
LLAMA_NAMES = Names(
    outer=OUTER,
    layer_prefix="model.layers.{i}.",
    layer={**LLAMA_ATTENTION, "norm_2": "post_attention_layernorm", **GATED_MLP},
    optional_prefix="model.",
)
LLAMA_FIXED = {"norm": "rmsnorm", "position": "rope", "mlp": "gated"}
LLAMA_SETTINGS = (
    *sizes(),
    kv_heads(),
    HEAD_DIM,
    mlp_setting("intermediate_size"),
    activation_setting("hidden_act", default="silu"),
    same("norm_eps", "rms_norm_eps", default=1e-6),
    ROPE,
)
NO_BIAS = {"attention_bias": False, "mlp_bias": False}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fixed=LLAMA_FIXED,
    settings=(*LLAMA_SETTINGS, tied(default=False)),
    names=LLAMA_NAMES,
    required=NO_BIAS,
    gguf=GGUF(
        architecture="llama",
        settings=(*RMS_SIZES, GGUF_HEAD_DIM, gguf_activation("silu"), gguf_rope(llama3=True)),
        names=GGUF_NAMES,
        row_orders={"attn.qkv": paired_halves},
    ),
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fixed=LLAMA_FIXED,
    settings=(*LLAMA_SETTINGS, EQUAL_WINDOW, tied(default=False)),
    names=LLAMA_NAMES,
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fixed={**LLAMA_FIXED, "qkv_bias": True},
    settings=(*LLAMA_SETTINGS, MIXED_WINDOW, tied(default=False)),
    names=LLAMA_NAMES,
    gguf=GGUF("qwen2", (*RMS_SIZES, GGUF_HEAD_DIM, gguf_activation("silu"), gguf_rope()), GGUF_NAMES),
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed={**LLAMA_FIXED, "qk_norm": True, "qk_norm_gain": True},
    settings=(*LLAMA_SETTINGS, MIXED_WINDOW, tied(default=False)),
    names=LLAMA_NAMES,
    required={"attention_bias": False},
    gguf=GGUF("qwen3", (*RMS_SIZES, GGUF_HEAD_DIM, gguf_activation("silu"), gguf_rope()), GGUF_NAMES),
)
OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    fixed={**LLAMA_FIXED, "norm_placement": "post", "qk_norm": True, "qk_norm_gain": True, "qk_norm_joint": True},
    settings=(
        *(setting for setting in LLAMA_SETTINGS if setting is not HEAD_DIM),
        EQUAL_HEAD_DIM,
        tied(default=False),
    ),
    names=Names(
        outer=OUTER,
        layer_prefix="model.layers.{i}.",
        layer={
            **{ours: theirs for ours, theirs in LLAMA_ATTENTION.items() if ours != "norm_1"},
            "post_norm_1": "post_attention_layernorm",
            "post_norm_2": "post_feedforward_layernorm",
            **GATED_MLP,
        },
        optional_prefix="model.",
    ),
    required={"attention_bias": False},
    gguf=GGUF("olmo2", (*RMS_SIZES, GGUF_EQUAL_HEAD_DIM, gguf_activation("silu"), gguf_rope()), GGUF_NAMES),
)
GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    fixed={
        "norm": "rmsnorm_offset",
        "position": "rope",
        "mlp": "gated",
        "norm_placement": "both",
        "qk_norm": True,
        "qk_norm_gain": True,
    },
    settings=(
        *sizes(),
        kv_heads(),
        HEAD_DIM,
        mlp_setting("intermediate_size"),
        activation_setting("hidden_activation", default="gelu_pytorch_tanh"),
        same("norm_eps", "rms_norm_eps", default=1e-6),
        GEMMA_ROPE,
        GEMMA_WINDOW,
        GEMMA_SCALES,
        TANH_SOFTCAP,
        tied(default=True),
    ),
    names=Names(
        outer=OUTER,
        layer_prefix="model.layers.{i}.",
        layer={
            **LLAMA_ATTENTION,
            "post_norm_1": "post_attention_layernorm",
            "norm_2": "pre_feedforward_layernorm",
            "post_norm_2": "post_feedforward_layernorm",
            **GATED_MLP,
        },
        optional_prefix="model.",
    ),
    required={"attention_bias": False, "attn_logit_softcapping": None, "use_bidirectional_attention": False},
    gguf=GGUF(
        architecture="gemma3",
        settings=(
            *RMS_SIZES,
            GGUF_HEAD_DIM,
            gguf_activation("gelu_tanh"),
            gguf_rope(),
            GGUF_WINDOW,
            Setting(("embedding_scale", "attention_scale"), read_gguf_scales, write_gguf_scales),
        ),
        names=GGUF_NAMES,
    ),
)
ARCEE = Family(
    model_type="arcee",
    architecture="ArceeForCausalLM",
    fixed={"norm": "rmsnorm", "position": "rope", "mlp": "plain"},
    settings=(*LLAMA_SETTINGS, tied(default=False)),
    names=Names(
        outer=OUTER,
        layer_prefix="model.layers.{i}.",
        layer={
            **LLAMA_ATTENTION,
            "norm_2": "post_attention_layernorm",
            "mlp.up": "mlp.up_proj",
            "mlp.proj": "mlp.down_proj",
        },
        optional_prefix="model.",
    ),
    required=NO_BIAS,
    gguf=GGUF(
        architecture="arcee",
        settings=(*RMS_SIZES, GGUF_HEAD_DIM, gguf_activation("relu2"), gguf_rope(llama3=True)),
        names=GGUF_NAMES,
        row_orders={"attn.qkv": paired_halves},
    ),
)
NANOCHAT = Family(
    model_type="nanochat",
    architecture="NanoChatForCausalLM",
    fixed={
        "norm": "rmsnorm_nogain",
        "position": "rope",
        "mlp": "plain",
        "qk_norm": True,
        "embedding_norm": True,
    },
    settings=(
        *(setting for setting in LLAMA_SETTINGS if setting is not HEAD_DIM),
        EQUAL_HEAD_DIM,
        TANH_SOFTCAP,
        tied(default=False),
    ),
    names=Names(
        outer={"wte": "model.embed_tokens", "head": "lm_head"},
        layer_prefix="model.layers.{i}.",
        layer={
            "attn.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
            "attn.proj": "self_attn.o_proj",
            "mlp.up": "mlp.fc1",
            "mlp.proj": "mlp.fc2",
        },
        optional_prefix="model.",
    ),
    required={"attention_bias": False},
    row_orders={"attn.qkv": swapped_halves},
)
GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    fixed={"norm": "layernorm", "position": "rope", "mlp": "plain", "bias": True},
    settings=(
        *sizes(),
        equal_kv_heads(),
        EQUAL_HEAD_DIM,
        mlp_setting("intermediate_size"),
        activation_setting("hidden_act", default="gelu"),
        same("norm_eps", "layer_norm_eps", default=1e-5),
        same("parallel_residual", "use_parallel_residual", default=True),
        NEOX_ROPE,
        tied(default=False),
    ),
    names=Names(
        outer={"wte": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out"},
        layer_prefix="gpt_neox.layers.{i}.",
        layer={
            "norm_1": "input_layernorm",
            "norm_2": "post_attention_layernorm",
            "attn.qkv": "attention.query_key_value",
            "attn.proj": "attention.dense",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.proj": "mlp.dense_4h_to_h",
        },
        optional_prefix="gpt_neox.",
    ),
    required={"attention_bias": True},
    row_orders={"attn.qkv": interleaved_qkv},
    gguf=GGUF(
        architecture="gptneox",
        settings=(
            *LAYER_NORM_SIZES,
            GGUF_EQUAL_HEAD_DIM,
            gguf_activation("gelu", "gelu_tanh"),
            gguf_rope(partial=True),
            same("parallel_residual", "use_parallel_residual", default=True),
        ),
        names=FUSED_GGUF_NAMES,
        row_orders={"attn.qkv": partial_halves},
    ),
)
STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    fixed={"norm": "layernorm", "position": "rope", "mlp": "plain", "bias": True},
    settings=(
        *sizes(),
        kv_heads(),
        EQUAL_HEAD_DIM,
        mlp_setting("intermediate_size"),
        activation_setting("hidden_act", default="gelu_pytorch_tanh"),
        same("norm_eps", "norm_epsilon", default=1e-5),
        ROPE,
        EQUAL_WINDOW,
        tied(default=True),
    ),
    names=Names(
        outer=OUTER,
        layer_prefix="model.layers.{i}.",
        layer={
            **LLAMA_ATTENTION,
            "norm_2": "post_attention_layernorm",
            "mlp.up": "mlp.c_fc",
            "mlp.proj": "mlp.c_proj",
        },
        optional_prefix="model.",
    ),
    required={"use_bias": True},  # without, its norms alone have biases
    gguf=GGUF(
        architecture="starcoder2",
        settings=(*LAYER_NORM_SIZES, GGUF_EQUAL_HEAD_DIM, gguf_activation("gelu_tanh", "gelu"), gguf_rope()),
        names=GGUF_NAMES,
    ),
)
GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fixed={"norm": "layernorm", "position": "learned", "mlp": "plain", "bias": True},
    settings=(
        VOCAB,
        same("block_size", "n_positions", "n_ctx"),
        same("n_layer", "n_layer"),
        same("n_embd", "n_embd"),
        same("n_head", "n_head"),
        equal_kv_heads(),
        GPT2_HEAD_DIM,
        mlp_setting("n_inner", default_ratio=4),
        activation_setting("activation_function", default="gelu_new"),
        same("norm_eps", "layer_norm_epsilon", default=1e-5),
        tied(default=True),
    ),
    names=Names(
        outer={"wte": "transformer.wte", "position": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"},
        layer_prefix="transformer.h.{i}.",
        layer={
            "norm_1": "ln_1",
            "attn.qkv": "attn.c_attn",
            "attn.proj": "attn.c_proj",
            "norm_2": "ln_2",
            "mlp.up": "mlp.c_fc",
            "mlp.proj": "mlp.c_proj",
        },
        optional_prefix="transformer.",
    ),
    required={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    transposed=frozenset({"attn.qkv", "attn.proj", "mlp.up", "mlp.proj"}),
    gguf=GGUF(
        architecture="gpt2",
        settings=(*LAYER_NORM_SIZES, GGUF_EQUAL_HEAD_DIM, gguf_activation("gelu_tanh", "gelu")),
        names=FUSED_GGUF_NAMES,
    ),
)

# In the order in which a model that is written out tries them.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (GPT2, LLAMA, QWEN3, QWEN2, MISTRAL, ARCEE, OLMO2, NANOCHAT, GEMMA3, STARCODER2, GPT_NEOX)
}


def family_of(config: Config) -> Family:
    """The family of a config.json. Raises UserError."""
    model_type = str(config.get("model_type", ""))
    experts = [name for name, value in config.items() if "experts" in name and value]
    if experts:
        raise UserError(f"config.json: {experts[0]}={config[experts[0]]}: mixtures of experts are not supported")
    if model_type not in FAMILIES:
        raise UserError(
            f"config.json: model_type={model_type} is not supported, only {', '.join(FAMILIES)}"
            f"{did_you_mean(model_type, FAMILIES)}"
        )
    quantization = config.get("quantization_config")
    if quantization:
        raise UserError(
            f"config.json: quantization_config ({quantization.get('quant_method')}) is not supported; "
            "take the model's unquantized weights, or a .gguf"
        )
    return FAMILIES[model_type]


def fitting_family(
    shape: Mapping[str, Any], known: Mapping[str, Family] = FAMILIES
) -> tuple[Family | None, dict[str, str]]:
    """The first family that can hold a model of this shape, and why each one before it can't.

    known: other families than those of transformers.
    """
    reasons = {}
    for name, family in known.items():
        try:
            family.write_config(shape)
        except NoFit as reason:
            reasons[name] = str(reason)
            continue
        return family, reasons
    return None, reasons


def count_misfits(reason: str) -> int:
    """How much is in the way, of the message of a NoFit."""
    return reason.count(", ")


def nearest_first(reasons: Mapping[str, str]) -> dict[str, str]:
    """Families with why each one can't hold a model, the nearest first."""
    return dict(sorted(reasons.items(), key=lambda item: count_misfits(item[1])))
