"""Turn what a run saved into files for elsewhere:

    python export.py consolidate out/run/checkpoints/000040 [--dtype=bfloat16]
    python export.py merge out/lora --to=out/merged
    python export.py peft out/lora --to=out/adapter

consolidate: the shards of an FSDP run to one model.safetensors beside them, in one process on the CPU; what was written is read again
and compared with the shards. The optimizer's state is not read.
merge: a LoRA and its base to weights that --init_from and sample.py --init_from take.
peft: a LoRA on a GPT-2 in the layout of the `peft` library, to be put on transformers' GPT2LMHeadModel with the same base.
A run's folder stands for its best checkpoint (consolidate: its last).
"""

import sys
from dataclasses import dataclass

import configurator
from configurator import OnlyWith, Rules, arg

ACTIONS = ("consolidate", "merge", "peft")
ACTION = sys.argv[1] if len(sys.argv) > 1 else ""


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """export"""

    to: str = arg("", "folder to write to", needs=OnlyWith("merge and peft", lambda a: ACTION in ("merge", "peft")))
    dtype: str = arg("float32", "of the weights that are written", choices=("float32", "bfloat16", "float16"))


if __name__ == "__main__":
    asked = sys.argv[1:3] if len(sys.argv) > 2 and not sys.argv[2].startswith("-") else []
    if sys.argv[1:] != ["--help"] and (not asked or asked[0] not in ACTIONS):
        configurator.exit_with_errors(
            [
                f"say what to do and with which folder: python export.py consolidate out/run/checkpoints/000040 (there is: {', '.join(ACTIONS)})"
            ]
        )
    ARGUMENTS = configurator.parse(
        ExportArgs, sys.argv[3:] if asked else sys.argv[1:], __doc__,
        Rules(check=lambda a, source: ["--to: say which folder to write to"] * (ACTION in ("merge", "peft") and not a.to)),
    )  # fmt: skip

import json
import os
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nanoforge import files
from nanoforge.errors import UserError
from nanoforge.models import pretrained
from nanoforge.training import checkpoint


def consolidate(folder: Path, dtype: torch.dtype) -> Path:
    """Write folder/model.safetensors from folder/model/, verified; the manifest then lists it too. Raises UserError."""
    if (folder / "checkpoints").is_dir():
        folder = checkpoint.resolve(folder, "last")
    if wrong := checkpoint.verify(folder):
        raise UserError(wrong)
    if not (folder / "model").is_dir():
        raise UserError(f"{folder}: nothing to consolidate; its model.safetensors is whole")
    shards = checkpoint.load_tensors(folder, "model")
    target, beside = folder / "model.safetensors", folder / f"model.safetensors{files.TMP_SUFFIX}"
    save_file({name: tensor.to(dtype) for name, tensor in shards.items()}, beside)
    with safe_open(beside, framework="pt") as file:
        if set(file.keys()) != set(shards) or not all(
            torch.equal(file.get_tensor(name), shards[name].to(dtype)) for name in shards
        ):
            raise SystemExit(f"{beside}: what was written differs from the shards")
    os.replace(beside, target)
    checkpoint.write_manifest(folder)
    return target


def lora_run(folder: Path) -> tuple[Path, dict]:
    """The checkpoint of a LoRA, and what its run was told. Raises UserError."""
    if (folder / "checkpoints").is_dir():
        folder = checkpoint.resolve(folder, "best")
    if wrong := checkpoint.verify(folder):
        raise UserError(wrong)
    config = json.loads((folder / "train_config.json").read_text(encoding="utf-8"))
    if config.get("adapter") != "lora":
        raise UserError(f"{folder}: not a run with --adapter=lora")
    return folder, config


def merge(folder: Path, to: Path, dtype: torch.dtype) -> Path:
    """Write a folder of weights: the base with the LoRA in it, the arguments that tell the shape, and the tokenizer. Raises UserError."""
    folder, config = lora_run(folder)
    loaded = pretrained.load_checkpoint(folder)
    to.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: weight.to(dtype).contiguous() for name, weight in loaded.weights.items()}, to / "model.safetensors"
    )
    files.write_json(to / "train_config.json", config | {"adapter": "none", "_base": {}})
    (to / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    checkpoint.write_manifest(to)
    return to / "model.safetensors"


TO_PEFT = (
    (r"^blocks\.(\d+)\.", r"base_model.model.transformer.h.\1."),
    (r"\.attn\.qkv\.", ".attn.c_attn."),
    (r"\.mlp\.up\.", ".mlp.c_fc."),
    (r"\.proj\.", ".c_proj."),
    (r"\.(lora_[AB])$", r".\1.weight"),
)


def peft(folder: Path, to: Path, dtype: torch.dtype) -> Path:
    """Write adapter_config.json and adapter_model.safetensors. Raises UserError for a model that is no GPT-2."""
    folder, config = lora_run(folder)
    model = config["_model"]
    gpt2 = {
        "norm": "layernorm",
        "position": "learned",
        "mlp": "plain",
        "qk_norm": False,
        "bias": True,
        "tie_weights": True,
        "logit_softcap": 0.0,
        "window": "L",
        "n_kv_head": 0,
    }
    if odd := [f"{name}={model[name]}" for name, usual in gpt2.items() if model[name] != usual]:
        raise UserError(
            f"{folder}: {', '.join(odd)}: no GPT-2, which is what transformers could put it on; merge it instead"
        )
    to.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in checkpoint.load_tensors(folder, "model").items():
        for pattern, new in TO_PEFT:
            name = re.sub(pattern, new, name)
        tensors[name] = tensor.to(dtype).contiguous()
    save_file(tensors, to / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".h.")[1].split(".", 1)[1].rsplit(".lora_", 1)[0] for name in tensors})
    about = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": config["_base"]["source"], "r": config["lora_rank"], "lora_alpha": config["lora_alpha"],
        "lora_dropout": config["lora_dropout"], "target_modules": targets, "fan_in_fan_out": True, "bias": "none", "inference_mode": True,
    }  # fmt: skip
    files.write_json(to / "adapter_config.json", about)
    return to / "adapter_model.safetensors"


def main(given) -> None:
    action, folder, a = given
    dtype = getattr(torch, a.dtype)
    path = (
        consolidate(folder, dtype)
        if action == "consolidate"
        else {"merge": merge, "peft": peft}[action](folder, Path(a.to), dtype)
    )
    print(
        f"{path}: {path.stat().st_size / 2**20:,.1f} MB{', compared with the shards' if action == 'consolidate' else ''}"
    )


if __name__ == "__main__":
    configurator.run(main, (asked[0], Path(asked[1]), ARGUMENTS))
