"""Pretrained weights: models of the hub or of local folders and files, nanoGPT's ckpt.pt, and this program's own runs.

All of them come as `Pretrained`: the model's shape by GPTConfig's names, the weights by model.py's names, and the
tokenizers. Knows nothing of the model itself.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanoforge import files
from nanoforge.console import print_line
from nanoforge.data import hub, model_tokenizers, token_bins, tokenization
from nanoforge.errors import UserError
from nanoforge.models import adapters, families, gguf_files, weight_files
from nanoforge.models.family import FamilyWeights, TensorMap, TensorReader, same
from nanoforge.run_dir import RECORD_FILE, RunRecord, run_of_checkpoint
from nanoforge.training import checkpoint

NO_BASE_NEEDED = "--base_model: {} holds whole weights, which need no base"
# Of GPTConfig; they are no shape.
TRAINING_FIELDS = ("dropout", "init_std", "embedding_init_std", "zero_init", "activation_checkpointing", "loss_chunk")


class Pretrained(NamedTuple):
    shape: dict[str, Any]  # fields of GPTConfig
    weights: Mapping[str, Tensor]
    tokenizers: dict[str, tokenization.Tokenizer] | None  # None: unknown
    source: str = ""  # finds the same weights again: an absolute path (of a run: its checkpoint's), or org/name@commit


def load(source: str, log: Callable[[str], None] = print_line, base_model: str = "") -> Pretrained:
    """Weights from a path, org/name[@revision] of the hub, or a name in hub.GPT2_NAMES. Raises UserError.

    base_model: of a LoRA, where its base is.
    """
    error = hub.source_error(source, hub.GPT2_NAMES)
    if error:
        raise UserError(f"--init_from={source}: {error}")
    if Path(source).exists():
        return load_path(Path(source), log, base_model)
    return load_hub(f"openai-community/{source}" if source in hub.GPT2_NAMES else source, log)


def load_path(path: Path, log: Callable[[str], None] = print_line, base_model: str = "") -> Pretrained:
    """Weights from a run (its best checkpoint), a checkpoint or its model.safetensors, nanoGPT's ckpt.pt, or GPT-2's.

    Raises UserError.
    """
    path = checkpoint_of_file(path)
    if (path / "ckpt.pt").exists():  # nanoGPT's out_dir
        path = path / "ckpt.pt"
    path = only_gguf(path)
    is_run = (path / "checkpoints").is_dir()
    if is_run:
        path = checkpoint.resolve(path, "best", log)  # verified
    elif (path / "manifest.json").exists():
        error = checkpoint.verify(path, checkpoint.WEIGHT_FILES)
        if error:
            raise UserError(error)

    if is_run or (path / "manifest.json").exists():
        loaded = load_checkpoint(path, log, base_model)
    elif path.suffix == ".pt":
        loaded = load_nanogpt(path, log)
    elif path.suffix == ".gguf":
        loaded = load_gguf(path)
    else:
        loaded = load_hf(path, log)
    if base_model and not (path / RECORD_FILE).exists():
        raise UserError(NO_BASE_NEEDED.format(path))
    return loaded._replace(source=str(path.resolve()))


def checkpoint_of_file(path: Path) -> Path:
    """The checkpoint whose weights the path names, its model.safetensors or model/; any other path as it is.

    Raises UserError for another file of a checkpoint or a run.
    """
    folder = path.parent
    if (folder / RECORD_FILE).exists() and path.name in ("model.safetensors", "model"):
        return folder
    if path.name == "checkpoints" and (folder / RECORD_FILE).exists():
        raise UserError(f"--init_from={path}: holds the checkpoints of {folder}; name that folder, or one of them")
    owner = folder.parent if folder.name in ("model", "optimizer") else folder
    if path.suffix in (".safetensors", ".json", ".jsonl") and (owner / RECORD_FILE).exists():
        raise UserError(f"--init_from={path}: a part of {owner}; name that folder")
    return path


# Weights of a model on the hub; consolidated.safetensors, onnx, gguf and other copies of its weights stay there.
HUB_SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
HUB_TORCH_FILES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def load_hub(name: str, log: Callable[[str], None] = print_line) -> Pretrained:
    """A model of the hub, org/name[@revision], from the local cache or the network. Raises UserError.

    Its source has the commit, so that the very same weights are found again, also offline.
    """
    try:
        folder = hub.fetch(name, [*hub.MODEL_FILES, *HUB_SAFETENSORS])
        commit = f"{name.partition('@')[0]}@{folder.name}"
        if not any(path for pattern in HUB_SAFETENSORS for path in folder.glob(pattern)):
            hub.fetch(commit, [*hub.MODEL_FILES, *HUB_TORCH_FILES])
    except UserError as error:
        raise UserError(f"--init_from={error}") from None
    try:
        return load_hf(folder, log)._replace(source=commit)
    except UserError as error:
        raise UserError(f"--init_from={str(error).replace(str(folder), name)}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's layout: config.json, weights, and the tokenizer's files

GPT2_HEAD_DIM = 64  # of every GPT-2 that OpenAI released


def load_hf(path: Path, log: Callable[[str], None] = print_line) -> Pretrained:
    """A model of one of the families, from its folder or from a file of weights beside its config.json.

    Raises UserError.
    """
    folder = path if path.is_dir() else path.parent
    reader = weight_files.open_weights(path)
    config_path = folder / "config.json"
    config = json.loads(files.read_text(config_path)) if config_path.exists() else {}
    model_type = config.get("model_type", "gpt2")
    if model_type == "gpt2":
        config = complete_gpt2_config(reader, config, log, config_path)
    try:
        if model_type == OWN_TYPE:
            shape, weights = read_own_export(reader, config)
        else:
            family = families.family_of(config)
            shape = family.read_config(config)
            weights = family.read_tensors(reader, shape)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{config_path}: can't be read ({type(error).__name__}: {error})") from None
    tokenizer = model_tokenizers.load_folder(folder)
    tokenizers = gpt2_tokenizers(shape) if tokenizer is None else {model_type: tokenizer}
    return Pretrained(shape, weights, tokenizers)


# What export.py hf writes of a model that no family holds: its own shape, and its own names behind a prefix.
OWN_TYPE = "nanoforge"
OWN_PREFIX = "model."


def read_own_export(reader: TensorReader, config: Mapping[str, Any]) -> tuple[dict[str, Any], FamilyWeights]:
    """The shape and the weights of such a model. Raises KeyError for a config.json that is no such export's."""
    is_tied = config["tie_word_embeddings"]
    shape = {**config["gpt"], "vocab_sizes": (config["vocab_size"],), "tie_weights": is_tied}
    names = {name.removeprefix(OWN_PREFIX): name for name in reader.names()}
    if is_tied:
        names.pop("head.weight", None)
    maps = {ours: TensorMap(ours, [theirs]) for ours, theirs in names.items()}
    return shape, FamilyWeights(reader, maps)


def complete_gpt2_config(
    reader: TensorReader, config: dict[str, Any], log: Callable[[str], None], path: Path
) -> dict[str, Any]:
    """The config of a GPT-2 with the sizes of its weights and, where it does not say how many, heads of 64.

    Raises UserError.
    """
    try:
        sizes = gpt2_sizes(reader)
        hidden = reader.read(reader_name(reader, "transformer.h.0.mlp.c_fc.weight")).size(1)
    except KeyError as error:
        raise UserError(f"{path.parent}: not the weights of a GPT-2 ({error} is missing)") from None
    config = {"model_type": "gpt2", "n_inner": hidden, **sizes, **config}
    if "n_head" in config:
        return config
    n_embd = config["n_embd"]
    if n_embd % GPT2_HEAD_DIM:
        raise UserError(
            f"{path.parent}: no config.json says how many heads these weights have, and n_embd={n_embd} is no "
            f"multiple of {GPT2_HEAD_DIM}; put the model's config.json beside the weights"
        )
    problem = "does not say n_head" if path.exists() else "is missing"
    log(
        f"{path}: {problem}; taken as {n_embd // GPT2_HEAD_DIM} heads of {GPT2_HEAD_DIM} and "
        f"{config.get('activation_function', 'gelu_new')}, as GPT-2 has: put the model's own config.json there if that "
        "is not so"
    )
    return {**config, "n_head": n_embd // GPT2_HEAD_DIM}


def reader_name(reader: TensorReader, name: str) -> str:
    """The name that a tensor of a GPT-2 has in a file, whose names may lack transformer."""
    return name if name in reader.names() else name.removeprefix("transformer.")


def gpt2_sizes(reader: TensorReader) -> dict[str, Any]:
    """What the tensors of a GPT-2 say of its config. Raises KeyError."""
    vocab_size, n_embd = reader.read(reader_name(reader, "transformer.wte.weight")).shape
    head = "lm_head.weight"
    is_tied = head not in reader.names() or torch.equal(
        reader.read(head), reader.read(reader_name(reader, "transformer.wte.weight"))
    )
    return {
        "vocab_size": vocab_size,
        "n_embd": n_embd,
        "n_positions": len(reader.read(reader_name(reader, "transformer.wpe.weight"))),
        "n_layer": sum(name.endswith(".ln_1.weight") for name in reader.names()),
        "tie_word_embeddings": is_tied,
    }


def gpt2_tokenizers(shape: Mapping[str, Any]) -> dict[str, tokenization.Tokenizer] | None:
    """GPT-2's tokenizer if the vocabulary has its size, or the size to which nanoGPT pads it."""
    if shape["vocab_sizes"][0] not in (50257, 50304):
        return None
    return {"gpt2": tokenization.TiktokenTokenizer.from_name("gpt2")}


# ---------------------------------------------------------------------------------------------------------------------
# llama.cpp's .gguf


def only_gguf(path: Path) -> Path:
    """The .gguf file of a folder that has no other weights; any other path as it is. Raises UserError for several."""
    paths = sorted(path.glob("*.gguf")) if path.is_dir() and not any(path.glob("*.safetensors")) else []
    first_parts = [file for file in paths if not re.search(r"-\d{5}-of-\d{5}$", file.stem) or "-00001-of-" in file.stem]
    if len(first_parts) > 1:
        names = ", ".join(file.name for file in first_parts)
        raise UserError(f"--init_from={path}: has several models ({names}); name one of these files")
    return first_parts[0] if first_parts else path


def load_gguf(path: Path) -> Pretrained:
    """Raises UserError."""
    loaded = gguf_files.load(path)
    tokenizers = {"gguf": loaded.tokenizer} if loaded.tokenizer is not None else gpt2_tokenizers(loaded.shape)
    return Pretrained(loaded.shape, loaded.weights, tokenizers)


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT

NANOGPT = dataclasses.replace(
    families.GPT2,
    fixed={"norm": "layernorm", "position": "learned", "mlp": "plain", "activation": "gelu", "mlp_ratio": 4.0},
    settings=(
        *(setting for setting in families.GPT2.settings if setting.fields[0] not in ("activation", "mlp_ratio")),
        same("bias", "bias"),
    ),
    transposed=frozenset(),
)


def load_nanogpt(path: Path, log: Callable[[str], None]) -> Pretrained:
    """nanoGPT's ckpt.pt, read with weights_only=True: nothing in it is executed. Raises UserError."""
    try:
        saved = weight_files.load_torch_file(path)
        reader = weight_files.TensorsReader(saved["model"])
        bias = reader_name(reader, "transformer.ln_f.bias") in reader.names()
        shape = NANOGPT.read_config({**gpt2_sizes(reader), "n_head": saved["model_args"]["n_head"], "bias": bias})
        weights = NANOGPT.read_tensors(reader, shape)
        dataset = str(saved.get("config", {}).get("dataset", ""))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a checkpoint of nanoGPT ({type(error).__name__}: {error})") from None
    except UserError as error:
        raise UserError(f"{path}: not a checkpoint of nanoGPT ({error})") from None
    tokenizers = nanogpt_tokenizers(path, dataset, shape["vocab_sizes"][0], log) or gpt2_tokenizers(shape)
    if tokenizers is None:
        log(
            f"{path}: its tokenizer is not known, so texts are token numbers; put the meta.pkl of its dataset"
            f"{f' {dataset!r}' if dataset else ''} beside it"
        )
    return Pretrained(shape, weights, tokenizers)


def nanogpt_tokenizers(
    path: Path, dataset: str, vocab_size: int, log: Callable[[str], None]
) -> dict[str, tokenization.Tokenizer] | None:
    """The tokenizer of the data that a ckpt.pt was trained on: of the meta file beside it, or in nanoGPT's data/.

    None without one of the weights' vocabulary, which may be padded to a multiple of 64.
    """
    folders = [path.parent]
    if dataset and Path(dataset).name == dataset:
        folders += [path.parent.parent / "data" / dataset, Path("data") / dataset]
    for folder in folders:
        if not any((folder / name).exists() for name in ("meta.pkl", "meta.json")):
            continue
        meta = token_bins.read_meta(folder)
        if vocab_size in (meta.vocab_size, -(-meta.vocab_size // 64) * 64):
            return {dataset or "tokens": meta.tokenizer}
        log(f"{folder}: its meta file has {meta.vocab_size} ids and the weights have {vocab_size}; not used")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# this program's own runs


def shape_of_record(record: RunRecord) -> dict[str, Any]:
    """The fields of GPTConfig in a run's record; lists were tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record.model.items()}


def whole_shape(record: RunRecord) -> dict[str, Any]:
    """The shape in a run's record, with the whole context of its weights, of which training may have read less."""
    shape = shape_of_record(record)
    return {**shape, "block_size": shape.get("context") or shape["block_size"], "context": 0}


def load_checkpoint(folder: Path, log: Callable[[str], None] = print_line, base_model: str = "") -> Pretrained:
    """A checkpoint of this program, with LoRA merged into its base. Raises UserError."""
    record = RunRecord.load(folder)
    weights = checkpoint.load_tensors(folder, "model")
    tokenizers = tokenization.load(folder / "tokenizer.json")
    adapter = record.args.get("adapter", "none")
    if adapter == "soft_prompt":
        raise UserError(
            f"{folder}: holds a soft prompt, not weights; sample.py takes it as --prompt_dir, export.py peft writes it "
            f"for others, and its base is {record.base['source']}"
        )
    if adapter == "lora":
        scale = record.args["lora_alpha"] / record.args["lora_rank"]
        vocab_size = sum(tokenizer.vocab_size for tokenizer in tokenizers.values())
        base = load_base(folder, record, log, base_model)
        weights = adapters.merge_lora(base.weights, weights, scale, vocab_size)
    elif base_model:
        raise UserError(NO_BASE_NEEDED.format(folder))
    shape = {name: value for name, value in whole_shape(record).items() if name not in TRAINING_FIELDS}
    if "position.weight" in weights:  # a base's may be longer than the run's context
        weights = {**weights, "position.weight": weights["position.weight"][: shape["block_size"]]}
    return Pretrained(shape, weights, tokenizers)


def load_base(
    folder: Path, record: RunRecord, log: Callable[[str], None] = print_line, base_model: str = ""
) -> Pretrained:
    """The weights that a run began with, by their hash: from base_model if that is given, or else from where they were.

    folder: of the run, or of its checkpoint. Raises UserError when they are not there.
    """
    errors = []
    for place in named_places(base_model, record) if base_model else base_places(folder, record):
        try:
            loaded = load(place, log)
        except UserError as error:
            errors.append(str(error).removeprefix("--init_from="))
            continue
        if adapters.hash_weights(loaded.weights) == record.base["sha256"]:
            return loaded
        errors.append(f"{place}: does not hold the weights that the run began with")
    raise UserError(
        f"{folder}: was trained on the base {record.base['source']}, and needs it; {'; '.join(errors)}; "
        "give its place with --base_model=PATH"
    )


def named_places(base_model: str, record: RunRecord) -> list[str]:
    """What --base_model names: weights, or a run, whose best checkpoint may by now be another than the base."""
    same_step = Path(base_model, "checkpoints", Path(record.base["source"]).name)
    return [str(same_step), base_model] if same_step.exists() else [base_model]


def base_places(folder: Path, record: RunRecord) -> list[str]:
    """Where the base of a run may be: where it was, and, if both were moved, at the same place beside the run."""
    source = record.base["source"]
    run_folder = run_of_checkpoint(folder) or folder
    before = record.run.get("folder") or os.path.abspath(record.args.get("out_dir", "out"))
    beside = os.path.normpath(run_folder.absolute() / os.path.relpath(source, before))
    is_elsewhere = not os.path.isabs(source)  # on the hub
    return [source] if is_elsewhere or beside == source else [source, beside]
