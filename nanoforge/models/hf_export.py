"""A model in Hugging Face's layout, for programs that know nothing of this one.

    write_model(Path("hf"), HFModel(shape, weights, tokenizer), program, torch.float32, max_bytes=5 * 10**9)

Where a family of transformers holds the model, the files are that family's. Where none does, the model's own source
goes along: configuration_nanoforge.py, modeling_nanoforge.py and nanoforge_gpt.py, a copy of model.py without what
needs this program. Knows nothing of runs.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanoforge.data.tokenization import Tokenizer
from nanoforge.data.tokenizer_export import TOKENIZER_CLASS
from nanoforge.errors import UserError
from nanoforge.files import atomic_write, read_text, write_json, write_text
from nanoforge.models import families, pretrained
from nanoforge.models.family import Family

Shape = Mapping[str, Any]  # all fields of GPTConfig
CODE = Path(__file__).parent / "hf_code"
NOT_OF_GPT = ("vocab_sizes", "vocabulary", "tie_weights")  # fields that config.json has under other names
TABLES = ("wte.weight", "head.weight")  # of a vocabulary


class Program(NamedTuple):
    """What the copy of model.py is made of."""

    source: str  # of model.py
    defaults: Mapping[str, Any]  # of train_args.TrainArgs, which model.py names


class Written(NamedTuple):
    """What an export has become."""

    config: Mapping[str, Any]  # config.json
    family: Family | None  # None: the model's own source goes along
    reasons: Mapping[str, str]  # family -> why it can't hold the model, the nearest family first
    n_parameters: int
    has_tokenizer: bool

    @property
    def description(self) -> str:
        """One line."""
        if self.family is not None:
            return f"{self.family.architecture}, which AutoModelForCausalLM loads"
        nearest, reason = next(iter(self.reasons.items()))
        return (
            "with its own source, for AutoModelForCausalLM with trust_remote_code=True "
            f"(of the families, {nearest} is the nearest, and lacks {reason})"
        )


class HFModel(NamedTuple):
    """What is written."""

    shape: Shape
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer | None


# ---------------------------------------------------------------------------------------------------------------------
# the copy of model.py

PROGRAM_MODULES = ("nanoforge.distributed", "nanoforge.errors", "train_args")  # that model.py imports
REGISTRATION = {"LIBRARY", "operator"}  # what makes operators of torch, which a process has once
# Methods that transformers replaces.
LOADERS = ("from_args", "without_weights", "from_weights", "load_weights", "fit_weights")
STANDALONE = '''

class UserError(ValueError):
    """A setting of the model that can't be."""


def did_you_mean(name: str, available: object) -> str:
    return ""
'''


def self_contained(program: Program) -> str:
    """model.py without the imports of this program and what needs them; defaults of arguments as numbers."""
    lines = program.source.splitlines()
    tree = ast.parse(program.source)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    dropped = [node for node in imports if isinstance(node, ast.ImportFrom) and node.module in PROGRAM_MODULES]
    methods = [
        node
        for owner in tree.body
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.FunctionDef) and node.name in LOADERS
    ]
    operators = [
        node
        for node in tree.body
        if any(isinstance(part, ast.Name) and part.id in REGISTRATION for part in ast.walk(node))
    ]
    for node in sorted([*dropped, *methods, *operators], key=lambda node: -node.lineno):
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        end = node.end_lineno or first
        del lines[first - 1 : end]
        if node in dropped and node is dropped[-1]:
            lines.insert(first - 1, STANDALONE)
    text = "\n".join(lines) + "\n"
    return re.sub(r"\bTrainArgs\.(\w+)", lambda match: repr(program.defaults[match[1]]), text)


def custom_config(model: HFModel) -> dict[str, Any]:
    """config.json of a model that goes with its own source."""
    names = {} if model.tokenizer is None else {"tokenizer_class": TOKENIZER_CLASS}  # which pipelines look for
    return {
        "architectures": ["NanoforgeForCausalLM"],
        "model_type": pretrained.OWN_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_nanoforge.NanoforgeConfig",
            "AutoModelForCausalLM": "modeling_nanoforge.NanoforgeForCausalLM",
        },
        "gpt": {name: value for name, value in model.shape.items() if name not in NOT_OF_GPT},
        "vocab_size": sum(model.shape["vocab_sizes"]),
        "tie_word_embeddings": model.shape["tie_weights"],
        **names,
    }


def write_code(to: Path, program: Program) -> None:
    """Write the Python files of a model that no family holds."""
    for name in ("configuration_nanoforge.py", "modeling_nanoforge.py"):
        write_text(to / name, read_text(CODE / f"{name}.txt"))
    write_text(to / "nanoforge_gpt.py", self_contained(program))


# ---------------------------------------------------------------------------------------------------------------------
# rows of the vocabulary


def comes_from_a_model(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer is that of a loaded model, whose rows are kept as they are."""
    base = getattr(tokenizer, "base", None)
    return tokenizer.control is not None or (base is not None and comes_from_a_model(base))


def fit_rows(model: HFModel) -> HFModel:
    """The model without the rows that pad its vocabulary. Raises UserError if the tokenizer has more ids than rows."""
    if model.shape["vocabulary"] != "one":
        flag = "--multicontext" if model.shape["vocabulary"] == "contexts" else "--multidataset_wte"
        raise UserError(f"{flag}: a model with several vocabularies has no form that other programs load")
    rows = sum(model.shape["vocab_sizes"])
    if model.tokenizer is None:
        return model._replace(shape={**model.shape, "vocab_sizes": (rows,)})
    vocab_size = model.tokenizer.vocab_size
    if vocab_size > rows:
        raise UserError(f"the tokenizer has {vocab_size} ids, and the model {rows} rows for them")
    if comes_from_a_model(model.tokenizer):
        vocab_size = rows
    weights = CutWeights(model.weights, vocab_size) if vocab_size < rows else model.weights
    return HFModel({**model.shape, "vocab_sizes": (vocab_size,)}, weights, model.tokenizer)


class CutWeights(Mapping[str, Tensor]):
    """Weights with the first rows only of a vocabulary's tables."""

    def __init__(self, weights: Mapping[str, Tensor], rows: int):
        self.weights = weights
        self.rows = rows

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name][: self.rows] if name in TABLES else self.weights[name]

    def __contains__(self, name: object) -> bool:
        return name in self.weights  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


# ---------------------------------------------------------------------------------------------------------------------
# config.json and generation_config.json


def token_settings(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ids that begin, end and pad a sequence, by Hugging Face's names; None instead of a family's own defaults."""
    if tokenizer is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    ends = list(tokenizer.end_ids)
    pad_name = tokenizer.special_tokens.get("pad_token", "")
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.control_tokens.get(pad_name, tokenizer.eos_id),
    }


def in_a_family(
    model: HFModel, known: Mapping[str, Family] = families.FAMILIES
) -> tuple[HFModel, Family | None, dict[str, str]]:
    """The model, perhaps with neutral parameters more, and the family that holds it, or why each one can't.

    known: other families than those of transformers.
    """
    family, reasons = families.fitting_family(model.shape, known)
    may_fill = model.shape["norm_placement"] == "pre" and not model.shape["qk_norm_joint"]
    for change in NEUTRAL_CHANGES if family is None and may_fill else ():
        filled = with_neutral(model, change)
        family, others = families.fitting_family(filled.shape, known)
        if family is not None:
            return filled, family, {}
        reasons = {name: min(reasons[name], others[name], key=families.count_misfits) for name in reasons}
    return model, family, families.nearest_first(reasons)


def with_neutral(model: HFModel, change: Shape) -> HFModel:
    """The model as one with more parameters, at the values that leave its outputs as they are."""
    norm = {"rmsnorm_nogain": "rmsnorm"}.get(model.shape["norm"], model.shape["norm"])
    shape = {**model.shape, "norm": norm, **change}
    shape["qk_norm_gain"] = shape["qk_norm_gain"] and shape["qk_norm"]
    return HFModel(shape, NeutralWeights(model.weights, shape), model.tokenizer)


# What a family may demand of a model that could do without it: zeros as biases, ones as gains of norms.
NEUTRAL_CHANGES: tuple[dict[str, Any], ...] = ({}, {"qk_norm_gain": True}, {"bias": True})


class NeutralWeights(Mapping[str, Tensor]):
    """Weights, and the neutral ones that the shape has beyond them."""

    def __init__(self, weights: Mapping[str, Tensor], shape: Shape):
        self.weights = weights
        self.shapes = neutral_sizes(weights, shape)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.weights:
            return self.weights[name]
        fill = torch.zeros if name.endswith("bias") else torch.ones
        return fill(self.shapes[name])

    def __contains__(self, name: object) -> bool:
        return name in self.weights or name in self.shapes  # without reading it

    def __iter__(self) -> Iterator[str]:
        yield from self.weights
        yield from self.shapes

    def __len__(self) -> int:
        return len(self.weights) + len(self.shapes)


def neutral_sizes(weights: Mapping[str, Tensor], shape: Shape) -> dict[str, int]:
    """The sizes of the vectors that a model of the shape has and the weights lack."""
    norms = {"norm": shape["n_embd"]}
    for i in range(shape["n_layer"]):
        norms |= {f"blocks.{i}.norm_1": shape["n_embd"], f"blocks.{i}.norm_2": shape["n_embd"]}
        if shape["qk_norm_gain"]:
            norms |= {f"blocks.{i}.attn.{part}_norm.norm": shape["head_dim"] for part in "qk"}
    sizes = {f"{name}.weight": size for name, size in norms.items()}
    if shape["bias"]:
        sizes |= {f"{name}.bias": size for name, size in norms.items()}
        layers = [name.removesuffix(".weight") for name in weights if name.startswith("blocks.")]
        linear = [name for name in layers if name.endswith((".qkv", ".proj", ".up", ".gate"))]
        sizes |= {f"{name}.bias": len(weights[f"{name}.weight"]) for name in linear}
    return {name: size for name, size in sizes.items() if name not in weights}


def config_of(model: HFModel, family: Family | None, dtype: torch.dtype) -> dict[str, Any]:
    """config.json."""
    config = custom_config(model) if family is None else family.write_config(model.shape)
    return {**config, "torch_dtype": str(dtype).removeprefix("torch."), **token_settings(model.tokenizer)}


# ---------------------------------------------------------------------------------------------------------------------
# weights

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, as Hugging Face writes it. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if not size:
        raise UserError(f"--max_shard_size={text}: not a size such as 5GB or 500MB")
    return size


def write_weights(to: Path, tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> int:
    """Write model.safetensors, or several files of at most max_bytes (or one tensor) with an index.

    Returns the number of parameters. No more than one file's tensors are in memory at a time.
    """
    parts: list[tuple[Path, list[str]]] = []
    total = n_parameters = 0
    for shard in shards_of(tensors, max_bytes):
        path = to / f"model-{len(parts) + 1:05}.safetensors"
        with atomic_write(path) as tmp_path:
            save_file(shard, tmp_path, metadata={"format": "pt"})
        parts.append((path, [*shard]))
        total += sum(tensor.nbytes for tensor in shard.values())
        n_parameters += sum(tensor.numel() for tensor in shard.values())
    if len(parts) == 1:
        parts[0][0].replace(to / "model.safetensors")
        return n_parameters
    weight_map: dict[str, str] = {}
    for path, names in parts:
        name = f"{path.stem}-of-{len(parts):05}.safetensors"
        path.replace(to / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(to / "model.safetensors.index.json", index)
    return n_parameters


def shards_of(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in groups of at most max_bytes, or of one."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def named_tensors(model: HFModel, family: Family | None, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) by the family's names, or by ours."""
    ours = ((pretrained.OWN_PREFIX + name, model.weights[name]) for name in model.weights)
    for name, tensor in ours if family is None else family.write_tensors(model.weights, model.shape):
        yield name, tensor.to(dtype).contiguous()


def write_model(to: Path, model: HFModel, program: Program, dtype: torch.dtype, max_bytes: int) -> Written:
    """Write config.json, the weights and generation_config.json, and the source that they need. Raises UserError."""
    model, family, reasons = in_a_family(fit_rows(model))
    config = config_of(model, family, dtype)
    n_parameters = write_weights(to, named_tensors(model, family, dtype), max_bytes)
    if family is None:
        write_code(to, program)
    generation = {name: ids for name, ids in token_settings(model.tokenizer).items() if ids is not None}
    write_json(to / "generation_config.json", generation)
    write_json(to / "config.json", config)  # last: a folder without it holds no model
    return Written(config, family, reasons, n_parameters, model.tokenizer is not None)


def refuse_existing_model(to: Path) -> None:
    """Raises UserError when a folder holds a model already, whose files the new ones would mix with."""
    if (to / "config.json").exists():
        raise UserError(f"--to={to}: holds a model already; use another folder, or delete that one first")


def only_tokenizer(tokenizers: Mapping[str, Tokenizer] | None) -> Tokenizer | None:
    """The tokenizer of a model with one vocabulary; None where it is not known."""
    known = [tokenizer for tokenizer in (tokenizers or {}).values() if tokenizer.kind != "numbers"]
    return known[0] if known else None
