"""Families of open models, one table each: what config.json and the tensors of its files are in this program's model.

    family = family_of({"model_type": "llama", ...})

family.py says what a table is. To add a family is to add one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanoforge.errors import UserError, did_you_mean
from nanoforge.models.family import GGUF, Config, Family, Names, NoFit, Setting, qkv_rows, same
from nanoforge.models.gguf_settings import (
    FUSED_GGUF_NAMES,
    GGUF_EQUAL_HEAD_DIM,
    GGUF_HEAD_DIM,
    GGUF_NAMES,
    GGUF_WINDOW,
    LAYER_NORM_SIZES,
    RMS_SIZES,
    gguf_activation,
    gguf_rope,
    read_gguf_scales,
    write_gguf_scales,
)
from nanoforge.models.hf_settings import (
    EQUAL_HEAD_DIM,
    EQUAL_WINDOW,
    GEMMA_ROPE,
    GEMMA_SCALES,
    GEMMA_WINDOW,
    GPT2_HEAD_DIM,
    HEAD_DIM,
    MIXED_WINDOW,
    NEOX_ROPE,
    ROPE,
    TANH_SOFTCAP,
    VOCAB,
    activation_setting,
    equal_kv_heads,
    kv_heads,
    mlp_setting,
    sizes,
    tied,
)

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
