"""Adapters in the layout of the `peft` library, for the model of transformers with the same base.

A LoRA becomes adapter_model.safetensors with the names of the base's family. Where one of our layers is several of
theirs, they share its A and have their rows of its B. Rows of new tokens become peft's trainable tokens, and a soft
prompt its prompt tuning. Knows nothing of how adapters are trained.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanoforge.data import hub
from nanoforge.data.tokenization import Tokenizer
from nanoforge.errors import UserError
from nanoforge.files import atomic_write, read_text, write_json
from nanoforge.models import adapters, families, hf_export, pretrained
from nanoforge.models.family import Family, TensorMap
from nanoforge.models.hf_export import HFModel
from nanoforge.run_dir import RunRecord

PREFIX = "base_model.model."  # of all names in peft's files
NEW_ROWS = ".token_adapter.trainable_tokens_delta"  # peft's name: they are no delta


class Adapter(NamedTuple):
    """A trained adapter."""

    record: RunRecord
    weights: Mapping[str, Tensor]  # by the names of adapters.py
    shape: Mapping[str, Any]  # of the model: all fields of GPTConfig
    tokenizer: Tokenizer
    source: str  # of its base, as Pretrained has it
    prompt_is_first: bool  # whether all virtual tokens of the prompt format stand before the rest of it


def write_adapter(to: Path, adapter: Adapter, dtype: torch.dtype) -> tuple[Path, str]:
    """Write adapter_config.json and adapter_model.safetensors; the latter's path, and what the base needs to be.

    Raises UserError.
    """
    kind = adapter.record.args["adapter"]
    tensors, config = WRITERS[kind](adapter)
    path = to / "adapter_model.safetensors"
    with atomic_write(path) as tmp_path:
        stored = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        save_file(stored, tmp_path, metadata={"format": "pt"})
    write_json(to / "adapter_config.json", {**shared_config(adapter), **config})
    return path, needs_of_base(adapter, grows=any(name.endswith(NEW_ROWS) for name in tensors))


def needs_of_base(adapter: Adapter, *, grows: bool) -> str:
    """What a user of the adapter does with the base first."""
    needs = ""
    if not hub.is_hub_name(adapter.source) and not base_config(adapter.source):
        needs += f"; its base is no model of transformers: export.py hf {adapter.source} makes one"
    if grows:
        rows = sum(adapter.shape["vocab_sizes"])
        needs += f"; the base needs {rows} rows before peft loads it: resize_token_embeddings({rows})"
    return needs


def shared_config(adapter: Adapter) -> dict[str, Any]:
    """The part of adapter_config.json that all kinds have."""
    name, _, revision = adapter.source.partition("@") if hub.is_hub_name(adapter.source) else (adapter.source, "", "")
    return {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "inference_mode": True,
    }


# ---------------------------------------------------------------------------------------------------------------------
# the base's family


def base_family(adapter: Adapter) -> Family | None:
    """The family of the base: of its config.json or, of a base that is a run, as export.py hf writes it.

    None: the base goes with its own source. Raises UserError.
    """
    config = base_config(adapter.source)
    if not config:
        _, family, _ = hf_export.in_a_family(HFModel(adapter.shape, {}, None))
        return family
    return None if config.get("model_type") == pretrained.OWN_TYPE else families.family_of(config)


def base_config(source: str) -> dict[str, Any]:
    """The config.json of a base; empty where it has none. Raises UserError."""
    folder = hub.fetch(source, ["config.json"]) if hub.is_hub_name(source) else Path(source)
    path = (folder if folder.is_dir() else folder.parent) / "config.json"
    return json.loads(read_text(path)) if path.is_file() else {}


def tensor_maps(adapter: Adapter, family: Family | None) -> dict[str, TensorMap]:
    """Our weight -> how the base has it. LoRA's matrices are (out, in) in every family."""
    if family is None:
        return {}
    return {
        tensor_map.ours: dataclasses.replace(tensor_map, transposed=False)
        for tensor_map in family.tensor_maps(adapter.shape)
    }


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


def lora_files(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the part of adapter_config.json, of a LoRA. Raises UserError."""
    family = base_family(adapter)
    maps = tensor_maps(adapter, family)
    tensors: dict[str, Tensor] = {}
    layers: set[str] = set()  # within a block
    tables: dict[str, list[int]] = {}  # name -> ids of new tokens
    for name, tensor in adapter.weights.items():
        owner, _, parameter = name.rpartition(".")
        weight = f"{owner.removesuffix('.rows')}.weight"  # head.rows.new_rows -> head.weight
        tensor_map = maps.get(weight) or TensorMap(weight, [pretrained.OWN_PREFIX + weight])
        modules = [module_of(theirs) for theirs in tensor_map.theirs]
        if parameter == "new_rows":
            vocab_size = adapter.tokenizer.vocab_size
            tables[modules[0].rpartition(".")[2]] = list(range(vocab_size - len(tensor), vocab_size))
            tensors[PREFIX + modules[0] + NEW_ROWS] = tensor
            continue
        parts = [tensor] * len(modules)
        if parameter == "lora_B":
            parts = list(tensor_map.split(tensor, adapter.shape).values())
        for module, part in zip(modules, parts, strict=True):
            tensors[f"{PREFIX}{module}.{parameter}.weight"] = part.clone()
            layers.add(within_block(module))
    args = adapter.record.args
    config = {
        "peft_type": "LORA",
        "r": args["lora_rank"],
        "lora_alpha": args["lora_alpha"],
        "lora_dropout": args["lora_dropout"],
        "target_modules": sorted(layers),
        "fan_in_fan_out": family is families.GPT2,
        "bias": "none",
        **({"trainable_token_indices": tables} if tables else {}),
    }
    return tensors, config


def module_of(theirs: str) -> str:
    """The module of a weight. GPT-NeoX's files keep the name that its head had before transformers 5."""
    module = theirs.removesuffix(".weight")
    return "lm_head" if module == "embed_out" else module


def within_block(module: str) -> str:
    """model.layers.0.self_attn.q_proj -> self_attn.q_proj"""
    parts = module.split(".")
    (number,) = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[number + 1 :])


# ---------------------------------------------------------------------------------------------------------------------
# soft prompts


def prompt_files(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the part of adapter_config.json, of a soft prompt.

    peft puts the virtual tokens before all others. Raises UserError for a prompt format that has them elsewhere.
    """
    template = adapter.record.args["prompt_format"]
    prompt = adapters.load_prompt(adapter.weights, adapter.record.args["prompt_provider"])
    if not adapter.prompt_is_first:
        raise UserError(
            f"--prompt_format={template!r}: peft puts virtual tokens before everything else, and here they stand "
            "elsewhere; sample from the run with sample.py --prompt_dir"
        )
    if adapter.tokenizer.bos_id is not None:
        raise UserError(
            "the model's tokenizer begins a text with a token, which stands before the virtual tokens here and behind "
            "them in peft; sample from the run with sample.py --prompt_dir"
        )
    if base_family(adapter) is not None:
        prompt = prompt * adapter.shape["embedding_scale"]  # which families apply to tokens alone
    config = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": len(prompt),
        "token_dim": adapter.shape["n_embd"],
        "num_transformer_submodules": 1,
        "num_attention_heads": adapter.shape["n_head"],
        "num_layers": adapter.shape["n_layer"],
        "prompt_tuning_init": "RANDOM",
    }
    return {"prompt_embeddings": prompt}, config


WRITERS = {"lora": lora_files, "soft_prompt": prompt_files}
