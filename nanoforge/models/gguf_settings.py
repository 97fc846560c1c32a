"""Settings of a .gguf file's metadata, as llama.cpp has them: how each is read and written.

Keys lack the architecture's prefix. Beside them, the config has vocab_size and, where the file has that tensor,
rope_freqs.weight.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanoforge.errors import UserError
from nanoforge.models.family import Config, Names, NoFit, Setting, Shape, same
from nanoforge.models.hf_settings import (
    VOCAB,
    mlp_hidden,
    shorten_pattern,
    write_equal_head_dim,
    write_gemma_scales,
    yarn_attention_factor,
)


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
