"""Weights from elsewhere: GPT-2 from the hub or a local folder, nanoGPT's ckpt.pt, and this program's own runs.

All come as `Pretrained`: the model's shape by the argument table's names, weights by the model's names, and tokenizers.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanoforge.data import tokenization
from nanoforge.errors import UserError, did_you_mean
from nanoforge.models import adapters
from nanoforge.training import checkpoint

HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
NOT_SHAPE = ("dropout", "zero_init", "activation_checkpointing", "loss_chunk")  # of a model's configuration


class Pretrained(NamedTuple):
    shape: dict  # fields of the model's configuration
    weights: Mapping[str, Tensor]
    tokenizers: dict[str, tokenization.Tokenizer] | None  # None: not known
    source: str = ""  # what `load` finds them by again: a path, of a run that of the checkpoint, or a name of the hub


def load(source: str, say=print) -> Pretrained:
    """Weights from `gpt2`, `gpt2-medium`, ... of the hub, or from a path. Raises UserError."""
    path = Path(source)
    if not path.exists() and source not in HUB:
        raise UserError(
            f"--init_from={source}: no such file or folder, and not one of {', '.join(HUB)}{did_you_mean(source, HUB)}"
        )
    if not path.exists():
        return load_gpt2(download(source, "config.json"), download(source, "model.safetensors"))._replace(source=source)
    whole = (path / "checkpoints").is_dir()
    path = checkpoint.resolve(path, "best", say) if whole else path
    return read(path, source, whole, say)._replace(source=str(path.resolve()))


def read(path: Path, source: str, whole: bool, say) -> Pretrained:
    """Weights of a file or a folder that --init_from=source led to; `whole`: a checkpoint that was verified. Raises UserError."""
    if path.suffix == ".pt":
        return load_nanogpt(path)
    if whole:
        return load_own(path, say)
    if (path / "manifest.json").exists():
        if wrong := checkpoint.verify(path, checkpoint.WEIGHT_FILES):
            raise UserError(wrong)
        return load_own(path, say)
    weights = path / "model.safetensors" if path.is_dir() else path
    if weights.suffix != ".safetensors" or not weights.exists():
        raise UserError(f"--init_from={source}: neither a run nor a checkpoint, and it has no model.safetensors")
    return load_gpt2(weights.with_name("config.json"), weights)


def download(name: str, file: str) -> Path:
    """A file of a model of the hub, from the cache or the network. Raises UserError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it tells each of its retries
    try:
        return Path(hf_hub_download(f"openai-community/{name}", file))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"--init_from={name}: {file} can't be downloaded ({type(error).__name__}); offline, give the path of a folder with GPT-2's config.json and model.safetensors"
        ) from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2's and nanoGPT's names

RENAMED = (
    (r"^(_orig_mod\.)?(transformer\.)?", ""),
    (r"^wpe\.", "position."),
    (r"^ln_f\.", "norm."),
    (r"^h\.(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm_\1."),
    (r"\.attn\.c_attn\.", ".attn.qkv."),
    (r"\.mlp\.c_fc\.", ".mlp.up."),
    (r"\.c_proj\.", ".proj."),
    (r"^lm_head\.", "head."),
)


def renamed(weights: dict[str, Tensor], transposed: bool) -> dict[str, Tensor]:
    """Weights by the model's names; GPT-2's own files hold its linear layers transposed (Conv1D), nanoGPT's don't."""
    out = {}
    for name, tensor in weights.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if re.search(r"\.attn\.(masked_)?bias$", name):
            continue  # the causal mask, which older files keep
        linear = transposed and re.search(r"\.(qkv|proj|up)\.weight$", name)
        out[name] = (tensor.t() if linear else tensor).float().contiguous()
    if "head.weight" in out and torch.equal(out["head.weight"], out["wte.weight"]):
        del out["head.weight"]  # tied
    return out


def shape_of(weights: dict[str, Tensor], n_head: int | None, activation: str) -> dict:
    """The shape that renamed weights have; without n_head heads are 64 wide. Raises UserError when they are no GPT-2's."""
    try:
        (V, C), (block_size, _) = weights["wte.weight"].shape, weights["position.weight"].shape
        hidden = weights["blocks.0.mlp.up.weight"].size(0)
    except KeyError as error:
        raise UserError(f"--init_from: these are no weights of a GPT-2 ({error} is missing)") from None
    return {
        "vocab_sizes": (V,), "vocabulary": "one", "block_size": block_size, "n_head": n_head or max(1, C // 64), "n_embd": C,
        "n_layer": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "n_kv_head": 0, "bias": "norm.bias" in weights, "norm": "layernorm", "position": "learned", "activation": activation,
        "mlp": "plain", "mlp_ratio": hidden / C, "qk_norm": False, "window": "L", "window_size": 0, "logit_softcap": 0.0,
        "tie_weights": "head.weight" not in weights,
    }  # fmt: skip


def gpt2_tokenizers(shape: dict) -> dict[str, tokenization.Tokenizer] | None:
    """GPT-2's where the vocabulary has its size, which nanoGPT pads."""
    return (
        {"gpt2": tokenization.TiktokenTokenizer.from_name("gpt2")}
        if shape["vocab_sizes"][0] in (50257, 50304)
        else None
    )


def load_gpt2(config_path: Path, weights_path: Path) -> Pretrained:
    """Hugging Face's GPT-2: config.json (heads, activation) and model.safetensors. Without a config heads are 64 wide."""
    weights = renamed(read_safetensors(weights_path), transposed=True)
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
    odd = {
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    }
    for name, usual in odd.items():
        if config.get(name, usual) != usual:
            raise UserError(f"{config_path}: {name}={config[name]} is a variant this model has not")
    activation = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(
        name := config.get("activation_function", "gelu_new"), name
    )
    shape = shape_of(weights, config.get("n_head"), activation)
    return Pretrained(shape, weights, gpt2_tokenizers(shape))


def load_nanogpt(path: Path) -> Pretrained:
    """nanoGPT's ckpt.pt, read with weights_only=True: nothing in it is executed."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        weights, args = saved["model"], saved["model_args"]
        n_head = args["n_head"]
    except Exception as error:  # torch.load raises nearly anything on a broken file
        raise UserError(
            f"{path}: not a checkpoint of nanoGPT ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from None
    weights = renamed(weights, transposed=False)
    shape = shape_of(weights, n_head, "gelu")
    return Pretrained(shape, weights, gpt2_tokenizers(shape))


def load_own(folder: Path, say=print) -> Pretrained:
    """A checkpoint of this program. LoRA comes merged into the base that it was trained on, which must be where it was. Raises UserError."""
    config = json.loads((folder / "train_config.json").read_text(encoding="utf-8"))
    shape = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config["_model"].items()
        if name not in NOT_SHAPE
    }
    weights, adapter = checkpoint.load_tensors(folder, "model"), config.get("adapter", "none")
    if adapter == "soft_prompt":
        raise UserError(
            f"{folder}: holds a soft prompt, not weights; sample.py takes it as --prompt_dir, and its base is {config['_base']['source']}"
        )
    if adapter == "lora":
        weights = adapters.merged(
            load_base(config["_base"], say).weights, weights, config["lora_alpha"] / config["lora_rank"]
        )
    return Pretrained(shape, weights, tokenization.load(folder / "tokenizer.json"))


def load_base(base: Mapping[str, str], say=print) -> Pretrained:
    """The weights that a run began with, by the `source` and `sha256` that it tells. Raises UserError when they are not what they were."""
    loaded = load(base["source"], say)
    if adapters.fingerprint(loaded.weights) != base["sha256"]:
        raise UserError(f"{base['source']}: does not hold the weights that the run began with")
    return loaded
