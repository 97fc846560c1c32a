"""Settings of Hugging Face's config.json, by all names that files have for them: how each is read and written.

They are the parts of which the families' tables are made. Knows nothing of a single family.
"""

import math
from collections.abc import Mapping
from typing import Any

from nanoforge.errors import UserError
from nanoforge.models.family import Config, NoFit, Setting, Shape, same


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
