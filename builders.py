"""Builds what a run is made of from its arguments, in the order of this file: data, tokenizers, base weights, model,
adapter, reference model, source and objective; then the optimizer's settings, and a trained model for other commands.

Here, before training, the kinds of runs differ; what comes out is the same for all of them, and train.py's loop asks
for no mode. To add an objective, write a `build_<name>` and one entry of objective_specs.OBJECTIVES that names it.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from model import GPT, GPTConfig
from nanoforge import console
from nanoforge.console import print_line
from nanoforge.data import batches, hub_datasets, row_splits, token_bins, tokenization
from nanoforge.data.batches import Batch, Metrics
from nanoforge.data.tables import Row
from nanoforge.data.token_bins import SPLITS, Meta
from nanoforge.data.tokenization import Tokenizer
from nanoforge.device import (
    AUTO_DTYPES,
    choose_dtype,
    compile_flex_attention,
    find_bfloat16_units,
    get_device,
    missing_compiler,
)
from nanoforge.distributed import Ranks, apply_fsdp, has_process_group
from nanoforge.errors import UserError
from nanoforge.models import adapters, pretrained, quantized
from nanoforge.models.generation import SamplingParams
from nanoforge.models.pretrained import Pretrained
from nanoforge.posttraining import prompt_format, rollouts, row_shapes
from nanoforge.posttraining.chat_template import completion_end_ids, with_chat_template, with_fixed_date
from nanoforge.posttraining.example_rows import RowFormat, RowSource, read_example_rows
from nanoforge.posttraining.examples import (
    ANY_WIDTH,
    Collator,
    ExampleEncoder,
    Examples,
    ExampleSource,
    KTOCollator,
    PreferenceCollator,
    Widths,
    encode_rows,
    extend_tokenizer,
    pack,
)
from nanoforge.posttraining.objective_specs import OBJECTIVES
from nanoforge.posttraining.objectives import DPO, GRPO, KTO, SFT, LanguageModel, Objective
from nanoforge.posttraining.prompt_format import PromptTemplate
from nanoforge.posttraining.reference import ReferenceCache, ReferenceModel
from nanoforge.posttraining.rewards import NEED_ANSWER, parse_rewards
from nanoforge.posttraining.rollouts import RolloutConfig, RolloutSource, Sampler, Scorer
from nanoforge.run_dir import RECORD_FILE, RunRecord
from nanoforge.training import checkpoint, memory, schedules
from nanoforge.training.grad_guard import GradGuard
from nanoforge.training.optimizers import OptimConfig, Optimizer
from train_args import TrainArgs, load_args

T = TypeVar("T")
Log = Callable[[str], None]
Rows = dict[str, dict[str, list[Row]]]  # dataset -> split -> rows

# ---------------------------------------------------------------------------------------------------------------------
# what is built


@dataclass(frozen=True)
class EvalDataset:
    """A dataset to evaluate on.

    batches(model) yields the metrics of each batch, and whether this rank has a part in it.
    """

    name: str
    streams: Sequence[Any]
    batches: Callable[[nn.Module], Iterator[tuple[Metrics, bool]]]
    n_batches: int
    examples: Examples | None = None


EvalDatasets = dict[str, list[EvalDataset]]  # split -> datasets


@dataclass(frozen=True)
class RunData:
    """What a run reads, and what it learns from that."""

    source: batches.Source
    objective: Objective
    eval_datasets: EvalDatasets
    eval_weights: np.ndarray  # of the datasets in the validation loss
    sampler: Sampler | None = None  # generates completions for the prompts of examples


class RunParts(NamedTuple):
    """What build_run makes."""

    args: TrainArgs  # with what the loaded weights and this machine decided
    tokenizers: dict[str, Tokenizer]  # one for each vocabulary of the model
    model: GPT  # on the device, perhaps sharded
    models: Sequence[GPT]  # this one, and a reference model apart from it
    data: RunData
    base: dict[str, str]  # source and sha256 of the weights that the run needs to resume
    dtype_reason: str


@dataclass(frozen=True)
class BuildContext:
    """What an objective's builder works with, besides the arguments."""

    model: GPT
    tokenizers: dict[str, Tokenizer]
    reference: ReferenceModel | None
    mixture: batches.Mixture
    ranks: Ranks
    metas: dict[str, Meta]  # of token bins, by dataset
    examples: dict[str, list[Examples]]  # split -> datasets

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of examples, and the first one of token bins."""
        return next(iter(self.tokenizers.values()))


def build_run(args: TrainArgs, record: RunRecord | None, ranks: Ranks, log: Log) -> RunParts:
    """Everything but the optimizer. record: of the run that is resumed. Raises UserError."""
    # 1. The base weights, and the data with their tokenizers.
    base = load_base(args, record, log)
    inputs = read_inputs(args, base, log)

    # 2. The model on the CPU, and its precision. Hashing reads all weights, so it comes before they are in memory.
    start = start_args(args, record)
    base_record = describe_base(start, base, record)
    model, loaded_shape = build_model(start, inputs.tokenizers, base, record, log)
    args = dataclasses.replace(args, **loaded_shape)
    dtype, dtype_reason = agree_on_dtype(args.dtype, ranks)
    model.compute_dtype = dtype
    add_flex_attention(args, model, ranks.device, log)
    args = dataclasses.replace(args, dtype=str(dtype).removeprefix("torch."))  # a resumed run goes on in it

    # 3. The adapter; the reference model is the model as it is now. Then both go to the device.
    add_adapter(start, model, next(iter(inputs.tokenizers.values())), base)
    reference = build_reference(args, model)
    identity = reference_identity(args, model)
    place_models(args, apart(model, reference), ranks, log)

    # 4. The source and the objective.
    examples = {}
    if inputs.rows:
        examples = encode_examples(args, inputs, model, log)
    if identity:
        assert reference is not None
        collate = PreferenceCollator(batch_widths(args, ranks.device))
        cache = ReferenceCache(reference, identity, args.batch_size, ranks, log, collate)
        examples, reference = cache.add(examples, example_folders(args)), None
    context = BuildContext(
        model=model,
        tokenizers=inputs.tokenizers,
        reference=reference,
        mixture=build_mixture(args),
        ranks=ranks,
        metas=inputs.metas,
        examples=examples,
    )
    data = OBJECTIVES[args.objective].load_builder()(args, context)
    return RunParts(
        args=args,
        tokenizers=inputs.tokenizers,
        model=model,
        models=apart(model, reference),
        data=data,
        base=base_record,
        dtype_reason=dtype_reason,
    )


def agree_on_dtype(dtype_name: str, ranks: Ranks) -> tuple[torch.dtype, str]:
    """The precision of activations, and why: what all ranks can compute in, should their devices differ."""
    dtype, reason = choose_dtype(dtype_name, ranks.device)
    agreed = AUTO_DTYPES[ranks.all_reduce_max(AUTO_DTYPES.index(dtype))]
    return agreed, reason if agreed == dtype else "auto: the devices of other ranks have no bfloat16"


def add_flex_attention(args: TrainArgs, model: GPT, device: torch.device, log: Log) -> None:
    """Give a model on CUDA flex_attention for what it attends to in part; say where that can't be."""
    has_windows = min(model.spans.values()) < model.config.block_size
    has_several_texts = args.packing or OBJECTIVES[args.objective].is_paired  # in a sequence
    if device.type != "cuda" or not (has_windows or has_several_texts):
        return
    obstacle = flex_attention_obstacle(args, model, device)
    if not obstacle:
        model.flex_attention = compile_flex_attention()
        return
    if has_windows:
        log(f"no flex_attention, since {obstacle}: sliding windows are slower than --window=L")
    if has_several_texts:
        log(f"no flex_attention, since {obstacle}: packed examples and pairs attend behind a mask, which is slower")


def flex_attention_obstacle(args: TrainArgs, model: GPT, device: torch.device) -> str:
    """What is in the way of flex_attention, if anything is."""
    if args.attention_kernel != "auto":
        return f"--attention_kernel={args.attention_kernel} is another kernel"
    if model.config.dropout:
        return f"it has no dropout, and --dropout={model.config.dropout:g}"
    if model.config.head_dim < 16:
        return f"it needs heads of at least 16, and these are of {model.config.head_dim}"
    missing = missing_compiler(device)
    return f"it needs {missing}" if missing else ""


def build_mixture(args: TrainArgs) -> batches.Mixture:
    """Equal weights unless the arguments give others."""
    n_datasets = 1 if args.train_file else len(args.mixture)
    return batches.make_mixture(
        args.dataset_sampling_probs or [1.0] * n_datasets,
        args.dataset_sampling_probs_final,
        transition=args.dataset_sampling_probs_transition_method,
        transition_steps=args.max_iters,
        per=args.dataset_mixing,
        interleave=args.dataset_interleaving,
    )


# ---------------------------------------------------------------------------------------------------------------------
# data and tokenizers


class Inputs(NamedTuple):
    """The data of a run before they meet the model: token bins have metas, examples have rows."""

    metas: dict[str, Meta]
    rows: Rows
    tokenizers: dict[str, Tokenizer]  # one for each vocabulary of the model, by the name of its (first) dataset


def read_inputs(args: TrainArgs, base: Pretrained | None, log: Log) -> Inputs:
    """Read what the objective reads. Raises UserError."""
    if OBJECTIVES[args.objective].reads_examples:
        tokenizer = example_tokenizer(args, base)
        rows = read_rows(args, log, has_chat_template=tokenizer.chat_template != "")
        return Inputs({}, rows, {next(iter(rows)): tokenizer_for_rows(args, tokenizer, rows)})
    metas = {name: token_bins.read_meta(folder) for name, folder in args.folders.items()}
    return Inputs(metas, {}, bin_tokenizers(args, metas))


def example_sources(args: TrainArgs) -> dict[str, dict[str, RowSource]]:
    """dataset -> split -> a file, or a part of the rows of one or of a dataset of the hub. Raises UserError."""
    if args.train_file:
        path = Path(args.train_file)
        if not args.validation_file:
            return {path.stem: {**row_splits.file_sides(path, args.val_fraction)}}
        return {path.stem: {"train": path, "val": Path(args.validation_file)}}
    sources: dict[str, dict[str, RowSource]] = {}
    for (name,) in args.mixture:
        if hub_datasets.is_hub(name):
            sources[name] = {**hub_datasets.sides(name, args.val_fraction)}
        else:
            sources[name] = {split: args.folders[name] / f"{split}.jsonl" for split in SPLITS}
    return sources


def example_folders(args: TrainArgs) -> dict[str, Path]:
    """dataset -> the folder of its files."""
    return {
        name: source.parent if isinstance(source, Path) else source.folder
        for name, splits in example_sources(args).items()
        for source in splits.values()
    }


def prepare_data(args: TrainArgs) -> None:
    """Make what is missing: datasets by their prepare.py, those of the hub by a download. Raises UserError."""
    for folder in args.folders.values():
        token_bins.prepare_if_missing(folder, args.data_format)
    hub_datasets.preload(args.hub_names)


def fingerprints(args: TrainArgs) -> dict[str, dict[str, str]]:
    """dataset -> file -> hash of the data, which a resumed run compares."""
    if OBJECTIVES[args.objective].reads_examples:
        return {name: fingerprint_rows(sources) for name, sources in example_sources(args).items()}
    return {name: token_bins.fingerprint_files(sorted(folder.glob("*.bin"))) for name, folder in args.folders.items()}


def fingerprint_rows(sources: Mapping[str, RowSource]) -> dict[str, str]:
    """A hash of each file, or of the rows of each split."""
    files = [source for source in sources.values() if isinstance(source, Path)]
    rows = {split: source.fingerprint() for split, source in sources.items() if not isinstance(source, Path)}
    return token_bins.fingerprint_files(files) | rows


def val_weights(args: TrainArgs, names: Sequence[tuple[str, ...]]) -> list[float]:
    """The weight of each dataset in val_loss, in the order of these names if they are the run's."""
    weights = build_mixture(args).final_weights.tolist()
    by_name = dict(zip(args.mixture, weights, strict=True))
    return [by_name[name] for name in names] if set(names) == by_name.keys() else weights


def count_eval_rows(args: TrainArgs, datasets: Sequence[EvalDataset]) -> list[float]:
    """The rows of each dataset on which a loss is measured."""
    n_asked = args.eval_iters * args.batch_size
    return [n_asked if dataset.examples is None else min(n_asked, len(dataset.examples.rows)) for dataset in datasets]


def parse_template(args: TrainArgs) -> PromptTemplate | None:
    """--prompt_format, parsed."""
    return prompt_format.parse(args.prompt_format) if args.prompt_format else None


def row_format(args: TrainArgs, *, has_chat_template: bool) -> RowFormat:
    """What a row has to hold: the objective's fields, or those of the prompt format and the completion."""
    spec = OBJECTIVES[args.objective]
    template = parse_template(args)
    fields: Sequence[Sequence[str]] = spec.fields
    if template is not None:
        completion_fields = [field for field in spec.fields[0] if field != "prompt"]
        if args.target_field:
            completion_fields = [args.target_field]
        fields = [[*template.fields, *completion_fields]]
    rewards = [item.strip().partition(":")[0] for item in args.reward.split(",")]
    if spec.is_online and not {*NEED_ANSWER} & {*rewards}:
        fields = [*fields, *([name for name in names if name != "answer"] for names in fields)]
    return RowFormat(
        fields=fields,
        example_type=spec.example_type,
        needed_by=f"--objective={args.objective}",
        is_template=template is not None,
        has_chat_template=has_chat_template,
        columns=row_shapes.parse_columns(args.columns, None if template else row_shapes.PARTS),
    )


def read_rows(args: TrainArgs, log: Log, *, has_chat_template: bool) -> Rows:
    """The rows of every dataset and split. has_chat_template: as RowFormat has it. Raises UserError."""
    form = row_format(args, has_chat_template=has_chat_template)
    rows: Rows = {}
    for name, sources in example_sources(args).items():
        rows[name] = {}
        for split, source in sources.items():
            rows[name][split], notes = read_example_rows(source, form, args.bad_rows)
            for note in notes:
                log(note)
    return rows


def bin_tokenizers(args: TrainArgs, metas: dict[str, Meta]) -> dict[str, Tokenizer]:
    """The tokenizers of token bins, one for each vocabulary of the model. Raises UserError."""
    tokenizers = {name: meta.tokenizer for name, meta in metas.items()}
    if args.vocabulary != "one":
        return tokenizers
    first = next(iter(tokenizers))
    for name, tokenizer in tokenizers.items():
        if not tokenization.same_tokenizer(tokenizer, tokenizers[first]):
            raise UserError(
                f"--dataset_list: {first} ({tokenizers[first].kind}, {metas[first].vocab_size} ids) and {name} "
                f"({tokenizer.kind}, {metas[name].vocab_size} ids) have different tokenizers; prepare both with one, "
                "or give each its own embedding and head with --multidataset_wte"
            )
    return {first: tokenizers[first]}


def example_tokenizer(args: TrainArgs, base: Pretrained | None) -> Tokenizer:
    """The tokenizer of the base weights, or else of the dataset, with --chat_template; of a resumed run its own.

    Raises UserError.
    """
    if args.init_from == "resume":
        return next(iter(tokenization.load(args.resumed_folder / "tokenizer.json").values()))
    tokenizer = dataset_tokenizer(args) if base is None else base_tokenizer(args, base)
    return with_fixed_date(with_chat_template(tokenizer, args.chat_template, args.chat_template_kwargs))


def tokenizer_for_rows(args: TrainArgs, tokenizer: Tokenizer, rows: Rows) -> Tokenizer:
    """The tokenizer with the tokens that the rows need; a resumed run's has them. Raises UserError."""
    if args.init_from == "resume":
        return tokenizer
    all_rows = [row for splits in rows.values() for split_rows in splits.values() for row in split_rows]
    extended = extend_tokenizer(tokenizer, all_rows if not args.prompt_format else [])  # its fields are texts
    if extended is not tokenizer and args.adapter == "soft_prompt":
        raise UserError(
            f"--adapter=soft_prompt: the base lacks the tokens {', '.join(extended.added_ids)}, and a soft prompt "
            "leaves the vocabulary as it is; use --adapter=lora, or fine-tune all weights on such examples first"
        )
    return extended


def dataset_tokenizer(args: TrainArgs) -> Tokenizer:
    """The tokenizer of the first dataset that has one, or bytes."""
    for folder in args.folders.values():
        if (folder / "meta.json").exists():
            return token_bins.read_meta(folder).tokenizer
    return tokenization.ByteTokenizer()


def base_tokenizer(args: TrainArgs, base: Pretrained) -> Tokenizer:
    """The one tokenizer of the base weights. Raises UserError."""
    if base.tokenizers is None:
        raise UserError(f"--init_from={args.init_from}: the tokenizer of these weights is unknown; examples need it")
    if len(base.tokenizers) > 1:
        raise UserError(f"--init_from={args.init_from}: has several vocabularies; examples need one")
    return next(iter(base.tokenizers.values()))


# ---------------------------------------------------------------------------------------------------------------------
# base weights and model


def load_base(args: TrainArgs, record: RunRecord | None, log: Log) -> Pretrained | None:
    """The weights that the run starts from; of a resumed run those that it started from, if it needs them still.

    Raises UserError.
    """
    if args.init_from == "scratch":
        return None
    if args.init_from != "resume":
        return pretrained.load(args.weights_source, log, args.base_model)
    if args.adapter == "none" and not args.needs_reference:
        if args.base_model:
            raise UserError(f"--base_model: the run in {args.out_dir} needs no base")
        return None
    assert record is not None
    if "source" not in record.base:
        raise UserError(missing_base_error(args, record))
    return pretrained.load_base(args.resumed_folder, record, log, args.base_model)


def missing_base_error(args: TrainArgs, record: RunRecord) -> str:
    """Why a resumed run lacks the weights of its reference model: it began without one."""
    changed = [
        f"--{name}={console.format_value(getattr(args, name))} (before: {console.format_value(record.args[name])})"
        for name in ("objective", "beta")
        if record.args.get(name, getattr(args, name)) != getattr(args, name)
    ]
    if not changed:
        return f"--init_from=resume: the run in {args.out_dir} records no base weights; start a new run"
    return (
        f"{', '.join(changed)}: needs a reference model, the weights that training started from, and the run in "
        f"{args.out_dir} began without one and did not record them; resume it as before, or start a new run from it "
        f"with --init_from={args.out_dir} and another --out_dir"
    )


def describe_base(start: TrainArgs, base: Pretrained | None, record: RunRecord | None) -> dict[str, str]:
    """What a resumed run needs to build what training started from, if it needs that: the base weights' source and
    sha256, and how the values that they lack were drawn."""
    if base is None or (start.adapter == "none" and not start.needs_reference):
        return record.base if record is not None else {}  # --beta=0 needs none, and may end with the next resume
    if start.init_from == "resume" and record is not None:
        sha256 = record.base["sha256"]  # load_base has compared them
    else:
        sha256 = adapters.hash_weights(base.weights)
    return {"source": base.source, "sha256": sha256, "seed": str(start.seed), "prompt_init": start.prompt_init}


def start_args(args: TrainArgs, record: RunRecord | None) -> TrainArgs:
    """The arguments that the model is built from. What it started from follows from the seed that the run began with,
    also when it is resumed with another."""
    if args.init_from == "resume" and record is not None:
        began = {name: record.args[name] for name in ("seed", "prompt_init") if name in record.args} | record.base
        args = dataclasses.replace(
            args, seed=int(began.get("seed", args.seed)), prompt_init=began.get("prompt_init", args.prompt_init)
        )
    if args.without_dropout:
        args = dataclasses.replace(args, dropout=0.0, lora_dropout=0.0)
    return args


def build_model(
    args: TrainArgs, tokenizers: dict[str, Tokenizer], base: Pretrained | None, record: RunRecord | None, log: Log
) -> tuple[GPT, dict[str, Any]]:
    """(model on the CPU with initial or loaded weights, the arguments that loaded weights decide). Raises UserError."""
    torch.manual_seed(args.seed)
    context = record.model.get("context", 0) if record is not None else 0
    if base is None:
        return build_from_scratch(args, tokenizers, context), {}
    if args.init_from == "resume":
        assert record is not None
        config = GPTConfig.from_args(args, vocab_sizes=tuple(record.model["vocab_sizes"]), context=context)
        return GPT.from_weights(config, base.weights, "the base", grow=True, keep=keep_base(args)), {}
    return build_from_base(args, tokenizers, base, log)


def build_from_scratch(args: TrainArgs, tokenizers: dict[str, Tokenizer], context: int = 0) -> GPT:
    """A model with a vocabulary for each tokenizer. context: of a resumed run's weights. Raises UserError."""
    vocab_sizes = tuple(tokenizer.vocab_size for tokenizer in tokenizers.values())
    if args.vocab_size:
        if args.vocab_size < vocab_sizes[0]:
            raise UserError(f"--vocab_size={args.vocab_size}: less than the tokenizer's {vocab_sizes[0]}")
        vocab_sizes = (args.vocab_size,)
    return GPT(GPTConfig.from_args(args, vocab_sizes=vocab_sizes, context=context))


def build_from_base(
    args: TrainArgs, tokenizers: dict[str, Tokenizer], base: Pretrained, log: Log
) -> tuple[GPT, dict[str, Any]]:
    """A model of the base's shape and weights, and the arguments that this shape decides. Raises UserError.

    Every field of the shape is the base's, those that its format has no name for at their defaults. Its context may be
    cropped. Examples may add tokens to the vocabulary; text has to be tokenized as the base's was.
    """
    reads_examples = OBJECTIVES[args.objective].reads_examples
    base_vocab_size = sum(base.shape["vocab_sizes"])
    vocab_sizes = [tokenizer.vocab_size for tokenizer in tokenizers.values()]
    if not reads_examples:
        if base.tokenizers is not None and not same_tokenizer(base.tokenizers, tokenizers):
            raise UserError(
                f"--init_from={args.init_from}: the weights' tokenizer is not that of the data "
                f"({', '.join(tokenizers)}); prepare the data with the weights' tokenizer"
            )
        if sum(vocab_sizes) > base_vocab_size:
            raise UserError(
                f"--init_from={args.init_from}: the data has {sum(vocab_sizes)} tokens, the weights {base_vocab_size}"
            )
    whole = GPTConfig(**known_fields(base.shape, base.source))  # derived sizes follow from the base's own context
    if args.block_size > whole.block_size and args.block_size != TrainArgs.block_size:
        log(f"--block_size={args.block_size}: the weights of --init_from have {whole.block_size}, which stands")
    if args.block_size < whole.block_size:
        log(f"--block_size={args.block_size}: the run reads less than the context of {whole.block_size} of its weights")
    shape = {name: value for name, value in dataclasses.asdict(whole).items() if name not in pretrained.TRAINING_FIELDS}
    if args.prompt_format and args.max_tokens > whole.block_size:
        raise UserError(
            f"--max_tokens={args.max_tokens}: the model's context has {whole.block_size} tokens; use no more"
        )
    is_cropped = args.block_size < whole.block_size and whole.position != "learned"  # these positions are gone
    shape |= {
        "block_size": min(args.block_size, whole.block_size),
        "context": whole.block_size if is_cropped else 0,
        "vocab_sizes": (max(base_vocab_size, *vocab_sizes),),
    }
    config = GPTConfig.from_args(args, **shape)
    model = GPT.from_weights(
        config, base.weights, f"--init_from={args.init_from}", grow=reads_examples, keep=keep_base(args)
    )
    arguments = {field.name for field in dataclasses.fields(args)}
    loaded_shape = {name: value for name, value in shape.items() if name in arguments}
    return model, loaded_shape | {"vocab_size": sum(shape["vocab_sizes"])}


def keep_base(args: TrainArgs) -> Callable[[str, torch.Tensor], nn.Parameter | nn.Module] | None:
    """How a frozen base holds a weight; None without an adapter: all weights are float32, and trained."""
    if args.adapter == "none":
        return None
    dtype: torch.dtype = getattr(torch, args.base_dtype)
    if args.quantize_base != "none":
        quantized.check_package(args.quantize_base)

    def keep(name: str, tensor: torch.Tensor) -> nn.Parameter | nn.Module:
        if args.quantize_base != "none" and name.startswith("blocks.") and tensor.dim() == 2:
            return quantized.QuantizedWeight(tensor, args.quantize_base)
        weight = tensor.to(dtype)
        if dtype == torch.float16 and not weight.isfinite().all():
            raise UserError(f"--base_dtype=float16: {name} has values beyond its range; use bfloat16")
        return nn.Parameter(weight)

    return keep


def known_fields(shape: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A shape without what this version's GPTConfig lacks and the model does not use. Raises UserError for the rest."""
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    unknown = [f"{name}={value}" for name, value in shape.items() if name not in known and value]
    if unknown:
        raise UserError(f"{source}: this version's model has no {', '.join(unknown)}; use the version that wrote it")
    return {name: value for name, value in shape.items() if name in known}


def same_tokenizer(base: dict[str, Tokenizer], data: dict[str, Tokenizer]) -> bool:
    """Whether the base weights and the data have one tokenizer each, and the same."""
    if len(base) != 1 or len(data) != 1:
        return False
    return tokenization.same_tokenizer(*base.values(), *data.values())


# ---------------------------------------------------------------------------------------------------------------------
# adapter, reference model, device


def add_adapter(args: TrainArgs, model: GPT, tokenizer: Tokenizer, base: Pretrained | None) -> None:
    """Add the adapter, if there is one, and freeze the base. Raises UserError.

    The rows of tokens that the base's tokenizer lacks, the last ones of the tokenizer, are trained beside a LoRA.
    """
    if args.adapter == "none":
        return
    if args.adapter == "lora":
        adapters.add_lora(
            model, args.lora_targets, rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout
        )
        if base is not None and base.tokenizers is not None and len(base.tokenizers) == 1:
            first = base_tokenizer(args, base).vocab_size
            if tokenizer.vocab_size > first:
                adapters.add_token_rows(model, first, tokenizer.vocab_size - first)
    elif args.adapter == "soft_prompt":
        seeds = prompt_format.parse(args.prompt_format).init_ids(tokenizer)
        embedding = model.wte.weight.detach()
        initial = adapters.initial_prompt(embedding, seeds, args.prompt_init, tokenizer.vocab_size)
        adapters.add_soft_prompt(model, initial, args.prompt_provider)
    adapters.freeze_base(model)


def reference_kind(args: TrainArgs) -> str:
    """What --reference is in this run: none, adapter, copy or cache."""
    if not args.needs_reference:
        return "none"
    if args.reference != "auto":
        return args.reference
    return "copy" if args.adapter == "none" else "adapter"


def build_reference(args: TrainArgs, model: GPT) -> ReferenceModel | None:
    """The model before training, with its adapter disabled: a frozen copy, or the model itself. None without one."""
    kind = reference_kind(args)
    if kind == "none":
        return None
    # A copy is called without gradients. Frozen parameters would be other graphs of a compiled model than the model's.
    reference = copy.deepcopy(model) if kind == "copy" else model
    return ReferenceModel(reference, partial(adapters.disable_adapter, reference))


def apart(model: GPT, reference: ReferenceModel | None) -> list[GPT]:
    """The model, and the reference model if it is another."""
    if reference is None or reference.model is model:
        return [model]
    assert isinstance(reference.model, GPT)
    return [model, reference.model]


def place_models(args: TrainArgs, models: Sequence[GPT], ranks: Ranks, log: Log) -> None:
    """Move the models to the device; shard them under FSDP."""
    for module in models:
        module.to(ranks.device)
    if args.parallel != "fsdp":
        return
    if not has_process_group():
        log("--parallel=fsdp: there is one process, so nothing is sharded")
        return
    for module in models:
        apply_fsdp(
            module,
            module.blocks,
            ranks,
            dtype=module.compute_dtype,
            reshard_after_forward=args.fsdp_reshard,
            cpu_offload=args.fsdp_offload,
        )


# ---------------------------------------------------------------------------------------------------------------------
# examples, and the identity of a reference model whose log-probabilities are cached


def encode_examples(args: TrainArgs, inputs: Inputs, model: GPT, log: Log) -> dict[str, list[Examples]]:
    """split -> datasets of examples as token sequences. Raises UserError."""
    spec = OBJECTIVES[args.objective]
    encoder = build_encoder(args, next(iter(inputs.tokenizers.values())), model.wte.weight.size(0))
    examples: dict[str, list[Examples]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for index, (name, splits) in enumerate(inputs.rows.items()):
            encoded, n_dropped, notes = encode_rows(
                splits[split], encoder, spec.example_type, source=f"{name}, {split}", bad_rows=args.bad_rows
            )
            for note in notes:
                log(note)
            if n_dropped:
                log(
                    f"{name}, {split}: --overflow={args.overflow} dropped {n_dropped} examples of more than "
                    f"{encoder.max_tokens} tokens"
                )
            if args.packing:
                encoded = pack(encoded, encoder.max_tokens)
            n_evaluated = args.eval_iters * args.batch_size
            if split == "val" and n_evaluated < len(encoded):
                log(
                    f"{name}, val: evaluations read the first {n_evaluated:,} of {len(encoded):,} examples, "
                    "--eval_iters x --batch_size"
                )
            examples[split].append(Examples(name, encoded, args.seed, index))
    return examples


def max_example_tokens(args: TrainArgs) -> int:
    """Tokens of an example: with --prompt_format also bounded by --max_tokens, as in ruprompts."""
    if args.prompt_format and args.max_tokens:
        return min(args.block_size, args.max_tokens)
    return args.block_size


def build_encoder(args: TrainArgs, tokenizer: Tokenizer, prompt_offset: int) -> ExampleEncoder:
    """How the arguments turn rows into token sequences. prompt_offset: id of the first virtual token."""
    spec = OBJECTIVES[args.objective]
    target_field = args.target_field
    if not target_field and spec.example_type == "prompt_completion":
        target_field = "completion"
    return ExampleEncoder(
        tokenizer=tokenizer,
        max_tokens=max_example_tokens(args),
        overflow=args.overflow,
        train_on_prompt=args.loss_on == "all",
        max_completion_tokens=args.max_new_tokens if spec.is_online else 0,
        template=parse_template(args),
        prompt_offset=prompt_offset,
        target_field=target_field,
        truncation_field=args.truncation_field,
    )


def reference_identity(args: TrainArgs, model: GPT) -> str:
    """All that the reference model's log-probabilities depend on besides the tokens: weights, shape and precision.

    Empty unless they are cached.
    """
    if reference_kind(args) != "cache":
        return ""
    shape = {name: value for name, value in vars(model.config).items() if name not in pretrained.TRAINING_FIELDS}
    return f"{adapters.hash_reference(model)} {sorted(shape.items())} {model.compute_dtype}"


# ---------------------------------------------------------------------------------------------------------------------
# source and objective: a builder for each entry of objective_specs.OBJECTIVES


def build_lm(args: TrainArgs, context: BuildContext) -> RunData:
    """Language modeling on all of the text of token bins."""
    model, ranks = context.model, context.ranks
    data = batches.open_data(
        Path(args.data_dir),
        names=args.mixture,
        metas=context.metas,
        vocab_offsets=dict(zip(context.tokenizers, model.vocabulary.vocab_offsets, strict=True)),
        mixture=context.mixture,
        sampling=batches.WindowSampling(args.block_size, args.global_batch_size, args.sampling_method, args.seed),
    )
    for dataset in [*data.source.datasets, *data.eval_datasets["val"]]:
        if dataset.short_shards and ranks.is_main:
            names = ", ".join(path.name for path in dataset.short_shards)
            print_line(f"{dataset.name}: not read, since shorter than a window of {args.block_size} tokens: {names}")
    objective = LanguageModel()

    def eval_dataset(dataset: batches.Dataset) -> EvalDataset:
        eval_batches = partial(
            dataset.eval_batches,
            args.eval_iters,
            args.batch_size,
            ranks.rank,
            ranks.world_size,
            pin=ranks.device.type == "cuda",
        )
        metrics = partial(evaluate_objective, objective, eval_batches, ranks.device)
        return EvalDataset(dataset.name, dataset.streams, metrics, args.eval_iters)

    eval_datasets = map_splits(eval_dataset, data.eval_datasets)
    return RunData(data.source, objective, eval_datasets, data.eval_weights)


def build_sft(args: TrainArgs, context: BuildContext) -> RunData:
    """Supervised fine-tuning on completions, chats or texts."""
    return example_data(args, context, SFT(), build_collator(args, context))


def build_dpo(args: TrainArgs, context: BuildContext) -> RunData:
    """Direct preference optimization, and its relatives, on pairs of completions."""
    objective = DPO(
        loss=args.dpo_loss,
        beta=args.beta,
        label_smoothing=args.label_smoothing,
        reference=context.reference,
    )
    collator = build_collator(args, context)
    return example_data(args, context, objective, PreferenceCollator(collator.widths, collator.world_size))


def build_kto(args: TrainArgs, context: BuildContext) -> RunData:
    """Kahneman-Tversky optimization on labelled completions. Raises UserError."""
    for split, datasets in context.examples.items():
        for dataset in datasets:
            if len(dataset.rows) < 2:
                raise UserError(
                    f"--objective=kto: {dataset.name}, {split}: has one example; each needs another's completion"
                )
    train_rows = [example.row for dataset in context.examples["train"] for example in dataset.rows]
    n_desirable = sum(bool(row["label"]) for row in train_rows)
    desirable_weight, undesirable_weight = kto_weights(
        args.desirable_weight, args.undesirable_weight, n_desirable, len(train_rows) - n_desirable
    )
    assert context.reference is not None
    objective = KTO(
        beta=args.beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        reference=context.reference,
        ranks=context.ranks,
    )
    collator = build_collator(args, context)
    collate = KTOCollator(collator.widths, collator.world_size, max_tokens=max_example_tokens(args))
    return example_data(args, context, objective, collate, at_once=True)


def kto_weights(desirable: str, undesirable: str, n_desirable: int, n_undesirable: int) -> tuple[float, float]:
    """The weights of desirable and undesirable examples; `auto` gives both kinds the same total. Raises UserError."""
    if not n_desirable or not n_undesirable:
        raise UserError(
            f"--objective=kto: needs desirable and undesirable examples, got {n_desirable} and {n_undesirable}"
        )
    if desirable == "auto":
        return float(undesirable) * n_undesirable / n_desirable, float(undesirable)
    if undesirable == "auto":
        return float(desirable), float(desirable) * n_desirable / n_undesirable
    return float(desirable), float(undesirable)


def build_grpo(args: TrainArgs, context: BuildContext) -> RunData:
    """Group relative policy optimization on the model's own completions."""
    objective = GRPO(
        loss_type=args.loss_type,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon_high or args.epsilon,
        beta=args.beta,
        importance_sampling_level=args.importance_sampling_level,
        temperature=args.temperature,
        max_completion_tokens=args.max_new_tokens,
        reference=context.reference,
    )
    sampler = build_sampler(args, context)
    scorer = Scorer(parse_rewards(args.reward), context.tokenizer, args.max_new_tokens)
    rollout = RolloutConfig(
        sampler=sampler,
        scorer=scorer,
        scale_rewards=args.scale_rewards,
        mask_truncated=args.mask_truncated,
        steps_per_rollout=args.num_iterations,
        widths=batch_widths(args, context.ranks.device),
    )
    source = RolloutSource(
        context.examples["train"], context.mixture, args.global_batch_size, args.seed, rollout=rollout
    )

    def eval_dataset(examples: Examples) -> EvalDataset:
        def metrics(model: nn.Module) -> Iterator[tuple[Metrics, bool]]:  # the sampler has the model
            return rollouts.evaluate_rewards(sampler, scorer, examples, args.eval_iters, args.batch_size)

        return EvalDataset(examples.name, examples.streams, metrics, count_eval_batches(args, examples), examples)

    eval_datasets = map_splits(eval_dataset, context.examples)
    return RunData(source, objective, eval_datasets, context.mixture.final_weights, sampler)


# ---------------------------------------------------------------------------------------------------------------------
# what the builders share


def example_data(
    args: TrainArgs, context: BuildContext, objective: Objective, collate: Collator, *, at_once: bool = False
) -> RunData:
    """Steps of examples, each once an epoch, and evaluations of the objective on them.

    at_once: as evaluate_objective has it.
    """
    ranks = context.ranks

    def eval_dataset(examples: Examples) -> EvalDataset:
        eval_batches = partial(examples.eval_batches, args.eval_iters, args.batch_size, ranks, collate)
        metrics = partial(evaluate_objective, objective, eval_batches, ranks.device, at_once=at_once)
        return EvalDataset(examples.name, examples.streams, metrics, count_eval_batches(args, examples), examples)

    train = context.examples["train"]
    return RunData(
        source=ExampleSource(train, context.mixture, args.global_batch_size, args.seed, collate=collate),
        objective=objective,
        eval_datasets=map_splits(eval_dataset, context.examples),
        eval_weights=context.mixture.final_weights,
        sampler=build_sampler(args, context),
    )


def count_eval_batches(args: TrainArgs, examples: Examples) -> int:
    """Batches of an evaluation, of which a small dataset has fewer than eval_iters."""
    return min(args.eval_iters, -(-len(examples.rows) // args.batch_size))


def map_splits(build: Callable[[T], EvalDataset], datasets: Mapping[str, Sequence[T]]) -> EvalDatasets:
    """Every dataset of every split, built."""
    return {split: [build(dataset) for dataset in split_datasets] for split, split_datasets in datasets.items()}


def evaluate_objective(
    objective: Objective,
    eval_batches: Callable[[], Iterator[tuple[Batch, bool]]],
    device: torch.device,
    model: nn.Module,
    *,
    at_once: bool = False,
) -> Iterator[tuple[Metrics, bool]]:
    """The objective's metrics of each batch, and whether this rank has a part in it.

    at_once: all batches are prepared together, as KTO's reference point is a mean over all of them.
    """
    groups = [list(eval_batches())] if at_once else ([pair] for pair in eval_batches())
    for group in groups:
        prepared = objective.prepare(model, [batch.to(device) for batch, _ in group])
        for batch, (_, has_rows) in zip(prepared, group, strict=True):
            _, metrics = objective(model, batch, with_metrics=True)
            yield metrics, has_rows


def build_collator(args: TrainArgs, context: BuildContext) -> Collator:
    """Batches of examples."""
    return Collator(batch_widths(args, context.ranks.device), context.ranks.world_size)


def batch_widths(args: TrainArgs, device: torch.device) -> Widths:
    """The widths of batches. Compiled models, and some kernels of GPUs, are made anew for each: there they are few."""
    if not OBJECTIVES[args.objective].reads_examples:
        return Widths(step=args.block_size, largest=args.block_size)
    if device.type != "cuda" and args.compile != "true":
        return ANY_WIDTH
    return Widths.up_to(args.block_size * (2 if OBJECTIVES[args.objective].is_paired else 1))  # a pair is one row


def build_sampler(args: TrainArgs, context: BuildContext) -> Sampler:
    """The model's own completions of prompts."""
    sampling = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        n=args.num_generations,
        end_ids=completion_end_ids(context.tokenizer),
        vocab_size=context.tokenizer.vocab_size,
        logps=True,
    )
    return Sampler(context.model, context.tokenizer, sampling, context.ranks)


# ---------------------------------------------------------------------------------------------------------------------
# optimizer and schedule


def optim_config(args: TrainArgs, ranks: Ranks) -> OptimConfig:
    """The settings of the optimizer. Muon iterates in bfloat16 unless a rank would only emulate it."""
    emulated = ranks.all_reduce_max(not find_bfloat16_units(ranks.device))
    return OptimConfig(
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.beta1, args.beta2),
        momentum=args.momentum,
        muon_lr=args.muon_learning_rate,
        muon_weight_decay=args.muon_weight_decay,
        muon_momentum=args.muon_momentum,
        muon_momentum_warmup=args.muon_momentum_warmup,
        cautious_weight_decay=args.cautious_weight_decay,
        aux_eps=args.aux_eps,
        muon_dtype=torch.float32 if emulated else torch.bfloat16,
        kwargs=args.optimizer_kwargs,
        embedding_lr=args.embedding_learning_rate,
        head_lr=args.head_learning_rate,
        ema_decay=args.ema_decay,
    )


def build_state(args: TrainArgs, model: GPT, ranks: Ranks) -> checkpoint.TrainState:
    """What training changes: the model, and what changes it."""
    return checkpoint.TrainState(
        model=model,
        optimizer=Optimizer(args.optimizer, model, optim_config(args, ranks), model.muon_splits()),
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=model.compute_dtype == torch.float16),
        guard=GradGuard(args.spike_skip, ranks.device),
    )


def plan_memory(args: TrainArgs, model: GPT, rows: int) -> memory.MemoryPlan:
    """What a step needs on one rank, with micro-batches of so many rows of full length."""
    rows *= 2 if OBJECTIVES[args.objective].is_paired else 1
    lora_rank = args.lora_rank if args.adapter == "lora" else 0
    plan = memory.plan_memory(model, rows * args.block_size, args.optimizer, lora_rank)
    has_copy = reference_kind(args) == "copy"
    return plan._replace(
        reference=plan.frozen + plan.trainable if has_copy else 0,
        optimizer=plan.optimizer + (plan.trainable if args.ema_decay else 0),
    )


def lr_scale(args: TrainArgs) -> Callable[[float], float]:
    """Position in the schedule (Pace.position) -> learning rate divided by the peak learning rate."""
    floor = min(1.0, args.min_lr / args.peak_lr) if args.peak_lr else 0.0
    return schedules.make_schedule(
        args.schedule,
        warmup=args.warmup_iters,
        steps=args.lr_decay_iters,
        floor=floor,
        step_size=args.lr_step_size,
        gamma=args.lr_step_gamma,
        decay_fraction=args.wsd_decay_fraction,
    )


# ---------------------------------------------------------------------------------------------------------------------
# a trained model, for the other commands


@dataclass(frozen=True)
class LoadedModel:
    """A model to sample from or to evaluate, in eval mode."""

    model: GPT
    tokenizers: dict[str, tokenization.Tokenizer]  # of each vocabulary, by the name of its dataset
    source: str  # what it was loaded from: a path (of a run: its checkpoint's), or a name on the hub
    folder: Path | None = None  # the checkpoint, if this program wrote it
    prompt_offsets: tuple[int, ...] = ()  # id of the first virtual token of each soft prompt
    unread: Pretrained | None = None  # the weights, where the model has none of its own: it is on the meta device

    @cached_property
    def args(self) -> TrainArgs | None:
        """The arguments of its run, if it comes from one. Raises UserError."""
        return None if self.folder is None else load_args(self.folder)

    @property
    def tokenizer(self) -> tokenization.Tokenizer:
        """The tokenizer of a model with one vocabulary. Raises UserError."""
        if len(self.tokenizers) > 1:
            raise UserError(f"{self.source}: has several vocabularies ({', '.join(self.tokenizers)}); this needs one")
        return next(iter(self.tokenizers.values()))

    def to(self, device_name: str, dtype_name: str) -> torch.device:
        """Move the model to --device, with activations of --dtype; returns the device. Raises UserError."""
        device = get_device(device_name)
        self.model.to(device)
        self.model.compute_dtype, _ = choose_dtype(dtype_name, device)
        return device


def load_model(
    init_from: str,
    out_dir: str = "",
    checkpoint_name: str = "best",
    base_model: str = "",
    log: Callable[[str], None] = print_line,
    *,
    reads_weights: bool = True,
) -> LoadedModel:
    """The model that --init_from names: weights as train.py takes them, or with `resume` the run in out_dir.

    checkpoint_name: of the run: best, last, or a step. base_model: of an adapter, where its base is. reads_weights:
    False for a model of which only the shape and the tokenizers are needed. Raises UserError.
    """
    source = init_from
    if init_from == "resume":
        source = str(checkpoint.resolve(Path(out_dir), checkpoint_name, log))
        if RunRecord.load(Path(source)).args.get("adapter") == "soft_prompt":
            return load_soft_prompts([Path(source)], base_model, log)
    loaded = pretrained.load(source, log, base_model)
    config = GPTConfig(**known_fields(loaded.shape, source))
    model = GPT.from_weights(config, loaded.weights, source) if reads_weights else GPT.without_weights(config)
    tokenizers = loaded.tokenizers or {"tokens": tokenization.NumberTokenizer(sum(model.config.vocab_sizes))}
    is_ours = (Path(loaded.source) / RECORD_FILE).exists()
    folder = Path(loaded.source) if is_ours else None
    return LoadedModel(model.eval(), tokenizers, source, folder, unread=None if reads_weights else loaded)


def with_template(loaded: LoadedModel, chat_template: str, variables: Mapping[str, Any]) -> LoadedModel:
    """The model with --chat_template and --chat_template_kwargs, if they are set. Raises UserError."""
    tokenizers = {
        name: with_chat_template(tokenizer, chat_template, variables) for name, tokenizer in loaded.tokenizers.items()
    }
    return dataclasses.replace(loaded, tokenizers=tokenizers)


def load_soft_prompts(
    folders: list[Path], base_model: str = "", log: Callable[[str], None] = print_line
) -> LoadedModel:
    """The base model that these checkpoints share, with the virtual tokens of all of them.

    base_model: where it is, if not where it was. Raises UserError.
    """
    # 1. They must have one base.
    records = [RunRecord.load(folder) for folder in folders]
    for folder, record in zip(folders, records, strict=True):
        if record.args.get("adapter") != "soft_prompt":
            raise UserError(f"{folder}: not a run with --adapter=soft_prompt; sample from it with --out_dir")
        if record.base["sha256"] != records[0].base["sha256"]:
            raise UserError(f"{folder}: was trained on another base than {folders[0]}; run them apart")

    # 2. The base, with the shape that its runs gave it.
    base = pretrained.load_base(folders[0], records[0], log, base_model)
    config = GPTConfig(**known_fields(pretrained.whole_shape(records[0]), str(folders[0])))
    model = GPT.from_weights(config, base.weights, records[0].base["source"], grow=True)

    # 3. Their virtual tokens, one prompt after the other, behind the vocabulary.
    prompts = []
    for folder, record in zip(folders, records, strict=True):
        weights = checkpoint.load_tensors(folder, "model")
        prompts.append(adapters.load_prompt(weights, record.args["prompt_provider"]))
    offsets = [model.wte.weight.size(0)]
    for prompt in prompts[:-1]:
        offsets.append(offsets[-1] + len(prompt))
    adapters.add_soft_prompt(model, torch.cat(prompts), "tensor")
    tokenizers = {"tokens": next(iter(tokenization.load(folders[0] / "tokenizer.json").values()))}
    return LoadedModel(model.eval(), tokenizers, str(folders[0]), folders[0], tuple(offsets))
