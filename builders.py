"""What a run is made of, from its arguments: the data and their tokenizers, the model with its adapter, the source and the objective.

Here, before anything is trained, the kinds of runs differ; what comes out is the same for all of them, and train.py's loop asks for no mode.
"""

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import GPT, GPTConfig
from nanoforge import distributed
from nanoforge.console import print_line
from nanoforge.data import batches, token_bins, tokenization
from nanoforge.data.batches import Metrics
from nanoforge.device import choose_dtype, get_device
from nanoforge.errors import UserError
from nanoforge.models import adapters, pretrained
from nanoforge.posttraining import examples, losses, objectives, prompt_format, rollouts
from nanoforge.posttraining.answers import to_problem
from nanoforge.posttraining.examples import Examples
from nanoforge.posttraining.rewards import parse_rewards
from nanoforge.run_dir import RECORD_FILE, RunRecord
from nanoforge.training import checkpoint, optimizers, schedules
from train_args import TrainArgs, load_args

# ---------------------------------------------------------------------------------------------------------------------
# data


@dataclass(frozen=True)
class EvalDataset:
    """A dataset to evaluate on. batches(model) yields the metrics of each batch, and whether this rank has a part in it."""

    name: str
    streams: Sequence
    batches: Callable[[torch.nn.Module], Iterator[tuple[Metrics, bool]]]
    examples: Examples | None = None


@dataclass(frozen=True)
class RunData:
    """What a run reads, and what it learns from that."""

    source: batches.Source
    objective: objectives.Objective
    eval_datasets: dict[str, list[EvalDataset]]  # by split
    eval_weights: np.ndarray  # of the datasets in the validation loss
    sampler: rollouts.Answers | None = None  # generates completions for the prompts of examples


class RunParts(NamedTuple):
    """What build_run makes."""

    args: TrainArgs  # with what the loaded weights and this machine decided
    tokenizers: dict[str, tokenization.Tokenizer]  # one for each vocabulary of the model
    model: GPT  # on the device, perhaps sharded
    data: RunData
    base: dict[str, str]  # source and sha256 of the weights that the run needs to resume
    dtype_reason: str


def example_files(args) -> dict[str, dict[str, Path]]:
    """Of each dataset the files of its splits."""
    if args.train_file:
        return {Path(args.train_file).stem: {"train": Path(args.train_file), "val": Path(args.validation_file)}}
    return {
        name: {split: folder / f"{split}.jsonl" for split in token_bins.SPLITS} for name, folder in args.folders.items()
    }


def fingerprints(args) -> dict[str, dict[str, str]]:
    """What is resumed only on the same data: a hash of each file, by dataset."""
    if args.objective == "lm":
        return {
            name: token_bins.fingerprint_files(sorted(folder.glob("*.bin"))) for name, folder in args.folders.items()
        }
    return {name: token_bins.fingerprint_files(files.values()) for name, files in example_files(args).items()}


def read_examples(args) -> dict[str, dict[str, list[dict]]]:
    """The rows of each dataset's splits. Raises UserError."""
    if args.prompt_format:
        template = prompt_format.parse(args.prompt_format)
        others = {
            "sft": [args.target_field or "completion"],
            "dpo": ["chosen", "rejected"],
            "kto": ["completion", "label"],
            "grpo": ["answer"],
        }[args.objective]
        fields = [*template.fields, *others]
    else:
        fields = []
    adapted = (
        dict
        if args.objective != "grpo"
        else to_problem
        if not fields
        else lambda row: row | {"answer": str(row.get("answer", ""))}
    )
    return {
        name: {split: examples.read_rows(path, args.objective, adapted, fields) for split, path in files.items()}
        for name, files in example_files(args).items()
    }


def vocabularies(args, metas: dict[str, token_bins.Meta]) -> dict[str, tokenization.Tokenizer]:
    """The tokenizer of each vocabulary that the model needs, by the name of its (first) dataset. Raises UserError."""
    tokenizers = {name: meta.tokenizer for name, meta in metas.items()}
    if args.vocabulary != "one":
        return tokenizers
    first = next(iter(tokenizers))
    for name, tokenizer in tokenizers.items():
        if not tokenization.same_tokenizer(tokenizer, tokenizers[first]):
            raise UserError(
                f"--dataset_list: {first} ({tokenizers[first].kind}, {metas[first].vocab_size} ids) and {name} ({tokenizer.kind}, {metas[name].vocab_size} ids) "
                "have different tokenizers; prepare both with one, or give each its own embedding and head with --multidataset_wte"
            )
    return {first: tokenizers[first]}


def example_tokenizer(
    args, base: pretrained.Pretrained | None, rows: dict[str, dict[str, list[dict]]]
) -> dict[str, tokenization.Tokenizer]:
    """The tokenizer of examples: that of the weights, or from scratch of the dataset, with the tokens that the examples need. Raises UserError."""
    name = next(iter(rows))
    if args.init_from == "resume":
        return tokenization.load(Path(args.out_dir) / "tokenizer.json")
    if base is None:
        meta = next((folder for folder in args.folders.values() if (folder / "meta.json").exists()), None)
        known = token_bins.read_meta(meta).tokenizer if meta else tokenization.ByteTokenizer()
    elif base.tokenizers is None or len(base.tokenizers) > 1:
        raise UserError(
            f"--init_from={args.init_from}: has {'several vocabularies' if base.tokenizers else 'no tokenizer that is known'}; examples need one"
        )
    else:
        known = next(iter(base.tokenizers.values()))
    needed = examples.needed_tokens(
        known, (row for splits in rows.values() for some in splits.values() for row in some)
    )
    if needed is not known and args.adapter != "none":
        raise UserError(
            f"--adapter={args.adapter}: the base has no {', '.join(needed.added_ids)}, and its embedding can't learn them; train it with all weights on such examples first"
        )
    return {name: needed}


# ---------------------------------------------------------------------------------------------------------------------
# model


def load_base(args, began: RunRecord | None, say) -> pretrained.Pretrained | None:
    """The weights that the run begins with, or began with where a resumed one needs them; None otherwise. Raises UserError."""
    if args.init_from == "scratch":
        return None
    if args.init_from != "resume":
        return pretrained.load(args.weights_source, say)
    if args.adapter == "none" and not args.needs_reference:
        return None
    if "source" not in began.base:
        raise UserError(
            f"--init_from=resume: {args.out_dir} does not tell what its reference is; it began from scratch"
        )
    return pretrained.load_base(began.base, say)


def build_model(
    args, tokenizers: dict[str, tokenization.Tokenizer], base: pretrained.Pretrained | None, began: RunRecord | None
) -> tuple[GPT, dict]:
    """The model on the CPU, with initial or loaded weights, and the arguments that the loaded weights decide. Raises UserError."""
    sizes = tuple(tokenizer.vocab_size for tokenizer in tokenizers.values())
    torch.manual_seed(args.seed)
    if (
        args.init_from == "resume" and base is not None
    ):  # its arguments are known; the shape follows from them and the base's vocabulary
        model = GPT(GPTConfig.from_args(args, vocab_sizes=tuple(began.model["vocab_sizes"])))
        model.load_weights(base.weights, "the base", grow=True)
        return model, {}
    if base is None:
        if args.vocab_size and args.vocab_size < sizes[0]:
            raise UserError(f"--vocab_size={args.vocab_size}: less than the tokenizer's {sizes[0]}")
        sizes = (args.vocab_size,) if args.vocab_size else sizes
        return GPT(GPTConfig.from_args(args, vocab_sizes=sizes)), {}
    if (
        args.objective == "lm"
        and base.tokenizers is not None
        and not (
            len(base.tokenizers) == len(tokenizers) == 1
            and tokenization.same_tokenizer(*base.tokenizers.values(), *tokenizers.values())
        )
    ):
        raise UserError(
            f"--init_from={args.init_from}: the weights' tokenizer is not that of the data ({', '.join(tokenizers)}); prepare the data with the weights' tokenizer"
        )
    known = sum(base.shape["vocab_sizes"])
    if args.objective == "lm" and sum(sizes) > known:
        raise UserError(f"--init_from={args.init_from}: the weights know {known} tokens, the data has {sum(sizes)}")
    shape = base.shape | {
        "block_size": min(args.block_size, base.shape["block_size"]),
        "vocab_sizes": (max(known, *sizes),),
    }
    model = GPT(GPTConfig.from_args(args, **shape))
    model.load_weights(base.weights, f"--init_from={args.init_from}", grow=args.objective != "lm")
    names = {field.name for field in dataclasses.fields(args)}
    return model, {name: value for name, value in shape.items() if name in names} | {
        "vocab_size": sum(shape["vocab_sizes"])
    }


def adapt(args, model: GPT, tokenizer: tokenization.Tokenizer) -> None:
    """Put the adapter on the model, as the arguments say; the base learns no more. Raises UserError."""
    if args.adapter == "lora":
        adapters.add_lora(
            model, args.lora_targets, rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout
        )
    if args.adapter == "soft_prompt":
        seeds = prompt_format.parse(args.prompt_format).seeds(tokenizer)
        adapters.add_soft_prompt(
            model,
            adapters.initial_prompt(model.wte.weight.detach(), seeds, args.prompt_init, tokenizer.vocab_size),
            args.prompt_provider,
        )
    if args.adapter != "none":
        adapters.freeze_base(model)


# ---------------------------------------------------------------------------------------------------------------------
# source and objective


def open_bins(
    args,
    metas: dict[str, token_bins.Meta],
    tokenizers: dict[str, tokenization.Tokenizer],
    model: GPT,
    mixture: batches.Mixture,
    ranks: distributed.Ranks,
) -> RunData:
    """All of the text, by windows. Raises UserError."""
    firsts = dict(zip(tokenizers, model.vocabulary.firsts, strict=True))
    rows, pin = args.batch_size * args.gradient_accumulation_steps, ranks.device.type == "cuda"
    windows = batches.open_data(
        Path(args.data_dir),
        args.mixture,
        metas,
        firsts,
        mixture,
        batches.WindowSampling(args.block_size, rows, args.sampling_method, args.seed),
    )
    objective = objectives.LanguageModel()

    def told(dataset: batches.Dataset, net: torch.nn.Module) -> Iterator[tuple[dict, bool]]:
        for batch, counts in dataset.eval_batches(
            args.eval_iters, args.batch_size, ranks.rank, ranks.world_size, pin=pin
        ):
            yield objective(net, batch.to(ranks.device), with_metrics=True)[1], counts

    evaluated = {
        split: [EvalDataset(d.name, d.streams, partial(told, d)) for d in some]
        for split, some in windows.eval_datasets.items()
    }
    return RunData(windows.source, objective, evaluated, windows.eval_weights)


def open_examples(
    args,
    rows: dict[str, dict[str, list[dict]]],
    tokenizer: tokenization.Tokenizer,
    model: GPT,
    reference: objectives.ReferenceModel | None,
    mixture: batches.Mixture,
    ranks: distributed.Ranks,
    say,
) -> RunData:
    """Examples, and the objective that learns from them. Raises UserError."""
    a, V = args, model.wte.weight.size(0)
    template = prompt_format.parse(a.prompt_format) if a.prompt_format else None
    limit = min(a.block_size, a.max_tokens or a.block_size) if template else a.block_size
    coder = examples.ExampleEncoder(
        tokenizer,
        limit,
        a.overflow,
        a.loss_on == "all",
        a.max_new_tokens if a.objective == "grpo" else 0,
        template,
        V,
        a.target_field or "completion" * (a.objective == "sft"),
        a.truncation_field,
    )
    opened = {
        split: [examples.Examples(name, splits[split], a.objective, coder, a.seed, number, f"{name}, {split}", a.packing) for number, (name, splits) in enumerate(rows.items())]
        for split in token_bins.SPLITS
    }  # fmt: skip
    for split, some in opened.items():
        for dataset in some:
            if dataset.dropped:
                say(
                    f"{dataset.name}, {split}: {dataset.dropped} examples too long for {limit} tokens are left out, as --overflow says"
                )
    width, total = a.block_size if a.compile else 0, a.batch_size * a.gradient_accumulation_steps
    collate = (
        examples.KTOCollator(width, ranks.world_size, limit)
        if a.objective == "kto"
        else examples.Collator(width, ranks.world_size)
    )
    answers = rollouts.Answers(
        model,
        ranks,
        parse_rewards(a.reward) if a.objective == "grpo" else [],
        a.num_generations,
        a.max_new_tokens,
        a.temperature,
        a.top_k,
        a.top_p,
    )
    if a.objective == "grpo":
        objective = objectives.GRPO(
            loss_type=a.loss_type,
            epsilon_low=a.epsilon,
            epsilon_high=a.epsilon_high or a.epsilon,
            beta=a.beta,
            importance_sampling_level=a.importance_sampling_level,
            temperature=a.temperature,
            max_completion_tokens=a.max_new_tokens,
            reference=reference,
        )
        source = rollouts.RolloutSource(
            opened["train"], mixture, total, a.seed, answers, a.num_iterations, a.scale_rewards, a.mask_truncated
        )
        told = {
            split: [partial(rollouts.evaluation, answers, dataset, a.eval_iters, a.batch_size) for dataset in some]
            for split, some in opened.items()
        }
    else:
        if a.objective == "sft":
            objective = objectives.SFT()
        elif a.objective == "dpo":
            objective = objectives.DPO(
                loss=a.dpo_loss, beta=a.beta, label_smoothing=a.label_smoothing, reference=reference
            )
        else:
            good = sum(bool(item.row["label"]) for dataset in opened["train"] for item in dataset.items)
            bad = sum(dataset.n_windows for dataset in opened["train"]) - good
            if lone := [
                f"{dataset.name}, {split}"
                for split, some in opened.items()
                for dataset in some
                if dataset.n_windows < 2
            ]:
                raise UserError(f"--objective=kto: {lone[0]}: has one example; each needs another's completion")
            desirable_weight, undesirable_weight = kto_weights(a.desirable_weight, a.undesirable_weight, good, bad)
            objective = objectives.KTO(
                beta=a.beta,
                desirable_weight=desirable_weight,
                undesirable_weight=undesirable_weight,
                reference=reference,
                ranks=ranks,
            )
        source = examples.ExampleSource(opened["train"], mixture, total, a.seed, collate)

        def measured(dataset: examples.Examples, net: torch.nn.Module) -> Iterator[tuple[dict, bool]]:
            for batch, counts in dataset.eval_batches(
                a.eval_iters, a.batch_size, ranks.rank, ranks.world_size, collate
            ):
                yield objective(net, objective.prepare(net, [batch.to(ranks.device)])[0], with_metrics=True)[1], counts

        told = {split: [partial(measured, dataset) for dataset in some] for split, some in opened.items()}
    evaluated = {
        split: [EvalDataset(d.name, [d], how, d) for d, how in zip(opened[split], hows, strict=True)]
        for split, hows in told.items()
    }
    return RunData(source, objective, evaluated, mixture.final_weights, answers)


@torch.no_grad()
def look_up_reference(args, data: RunData, model: GPT, weights: str, ranks: distributed.Ranks) -> None:
    """Give all examples the log-probabilities that the model has for them before it learns; they are kept beside the data, by a hash of all that
    they follow from. The ranks share the work."""
    for split, some in data.eval_datasets.items():
        for dataset in (one.examples for one in some):
            said = [
                array.tobytes()
                for item in dataset.items
                for sequence in item.sequences
                for array in (sequence.ids, sequence.mask)
            ]
            key = hashlib.sha256(b" ".join(said) + f"{weights} {args.dtype}".encode()).hexdigest()[:16]
            path = example_files(args)[dataset.name][split].parent / f"reference_{split}_{key}.safetensors"
            with ranks.main_first():
                there = path.exists()
            if ranks.all_reduce_max(not there):
                told = torch.zeros(len(dataset.items), 2)
                collate, size = examples.Collator(), args.batch_size
                for first in range(0, len(dataset.items), size * ranks.world_size):  # all ranks call the model as often
                    mine = range(first + ranks.rank * size, min(first + (ranks.rank + 1) * size, len(dataset.items)))
                    batch = (
                        collate(dataset.items, mine.start, mine.stop, 1) if mine else collate(dataset.items, 0, 1, 1)
                    ).to(ranks.device)
                    logp = (
                        losses.per_token_logps(model.eval(), batch.tokens, batch.extras["loss_mask"])
                        .sum(1)
                        .view(2, -1)
                        .T.cpu()
                    )
                    if mine:
                        told[mine.start : mine.stop] = logp
                told = ranks.all_reduce_(told)
                with ranks.main_first():
                    if ranks.is_main:
                        checkpoint.write_tensors(path, {"logps": told})
            known = checkpoint.read_tensors(path)["logps"].tolist()
            dataset.items = [
                item._replace(reference=tuple(values)) for item, values in zip(dataset.items, known, strict=True)
            ]
    model.train()


def kto_weights(desirable: str, undesirable: str, good: int, bad: int) -> tuple[float, float]:
    """The weights of desirable and undesirable rows; `auto`: as much in all as the others have, of which there are good and bad. Raises UserError."""
    if not (good and bad):
        raise UserError(f"--objective=kto: {good} desirable and {bad} undesirable examples; both are needed")
    if desirable == "auto":
        return float(undesirable) * bad / good, float(undesirable)
    return float(desirable), float(desirable) * good / bad if undesirable == "auto" else float(undesirable)


# ---------------------------------------------------------------------------------------------------------------------
# all of it


def build_run(args: TrainArgs, began: RunRecord | None, ranks: distributed.Ranks, say) -> RunParts:
    """(arguments, with what loaded weights and this machine decide of them; tokenizers; model, on the device and sharded; data; where the weights
    came from, if that must be known to resume: source and sha256; why the precision was chosen).

    began: what train_config.json tells of the run that is resumed. Raises UserError.
    """
    base = load_base(args, began, say)
    if args.objective == "lm":
        metas = {name: token_bins.read_meta(folder) for name, folder in args.folders.items()}
        tokenizers = vocabularies(args, metas)
    else:
        rows = read_examples(args)
        tokenizers = example_tokenizer(args, base, rows)
    tokenizer = next(iter(tokenizers.values()))
    model, shape = build_model(args, tokenizers, base, began)
    args = dataclasses.replace(args, **shape)
    told = (
        {"source": base.source, "sha256": adapters.hash_weights(base.weights)}
        if base is not None and (args.adapter != "none" or args.needs_reference)
        else {}
    )
    n_datasets = 1 if args.train_file else len(args.mixture)
    mixture = batches.make_mixture(
        args.dataset_sampling_probs or [1.0] * n_datasets,
        args.dataset_sampling_probs_final,
        transition=args.dataset_sampling_probs_transition_method,
        transition_steps=args.max_iters,
        per=args.dataset_mixing,
        interleave=args.dataset_interleaving,
    )
    model.compute_dtype, reason = choose_dtype(args.dtype, ranks.device)
    if ranks.all_reduce_max(model.compute_dtype == torch.bfloat16):  # the ranks' measurements may differ
        model.compute_dtype = torch.bfloat16
    args = dataclasses.replace(
        args, dtype=str(model.compute_dtype).removeprefix("torch.")
    )  # a resumed run goes on in it
    kind = (
        {"auto": "copy" if args.adapter == "none" else "adapter"}.get(args.reference, args.reference)
        if args.needs_reference
        else "none"
    )
    still = copy.deepcopy(model).requires_grad_(False).eval() if kind == "copy" else model
    adapt(args, model, tokenizer)
    for part in (model, still):
        part.to(ranks.device)
    if args.parallel == "fsdp" and ranks.world_size == 1:
        say("--parallel=fsdp: one process holds all, nothing is sharded")
    elif args.parallel == "fsdp":
        for part in dict.fromkeys((model, still)):
            distributed.apply_fsdp(
                part,
                part.blocks,
                ranks,
                dtype=model.compute_dtype,
                reshard_after_forward=args.fsdp_reshard,
                cpu_offload=args.fsdp_offload,
            )
    if args.objective == "lm":
        data = open_bins(args, metas, tokenizers, model, mixture, ranks)
    else:
        reference = {
            "adapter": objectives.ReferenceModel(model, partial(adapters.disable_adapter, model)),
            "copy": objectives.ReferenceModel(still, nullcontext),
        }.get(kind)
        data = open_examples(args, rows, tokenizer, model, reference, mixture, ranks, say)
        if kind == "cache":
            look_up_reference(args, data, model, told["sha256"], ranks)
    return RunParts(args, tokenizers, model, data, told, reason)


# ---------------------------------------------------------------------------------------------------------------------
# optimizer and schedule


def optim_config(args) -> optimizers.OptimConfig:
    """The arguments that optimizers take."""
    return optimizers.OptimConfig(
        args.learning_rate, args.weight_decay, (args.beta1, args.beta2), args.momentum,
        args.muon_learning_rate, args.muon_weight_decay, args.muon_momentum, args.optimizer_kwargs,
        args.embedding_learning_rate, args.head_learning_rate,
    )  # fmt: skip


def lr_scale(args):
    """step -> learning rate over the largest one."""
    floor = min(1.0, args.min_lr / args.learning_rate) if args.learning_rate else 0.0
    plan = schedules.Plan(
        1.0,
        floor,
        args.warmup_iters,
        args.lr_decay_iters,
        args.lr_step_size,
        args.lr_step_gamma,
        args.wsd_decay_fraction,
    )
    return lambda step: schedules.learning_rate(args.schedule, plan, step)


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
        """Move the model to the device that --device names, with the activations that --dtype names; the device. Raises UserError."""
        device = get_device(device_name)
        self.model.to(device)
        self.model.compute_dtype, _ = choose_dtype(dtype_name, device)
        return device


def load_model(
    init_from: str, out_dir: str = "", checkpoint_name: str = "best", log: Callable[[str], None] = print_line
) -> LoadedModel:
    """The model that --init_from names: weights as train.py takes them, or with `resume` the run in out_dir, at the checkpoint that
    checkpoint_name names: best, last, or a step. Raises UserError."""
    source = init_from
    if init_from == "resume":
        source = str(checkpoint.resolve(Path(out_dir), checkpoint_name, log))
        if RunRecord.load(Path(source)).args.get("adapter") == "soft_prompt":
            return load_soft_prompts([Path(source)], log)
    loaded = pretrained.load(source, log)
    model = GPT(GPTConfig(**loaded.shape))
    model.load_weights(loaded.weights, source)
    tokenizers = loaded.tokenizers or {"tokens": tokenization.NumberTokenizer(sum(model.config.vocab_sizes))}
    is_ours = (Path(loaded.source) / RECORD_FILE).exists()
    return LoadedModel(model.eval(), tokenizers, source, Path(loaded.source) if is_ours else None)


def load_soft_prompts(folders: list[Path], log: Callable[[str], None] = print_line) -> LoadedModel:
    """The base that the soft prompts in these checkpoints share, with the virtual tokens of all of them. Raises UserError."""
    # 1. They must have one base.
    records = [RunRecord.load(folder) for folder in folders]
    for folder, record in zip(folders, records, strict=True):
        if record.args.get("adapter") != "soft_prompt":
            raise UserError(f"{folder}: not a run with --adapter=soft_prompt; sample from it with --out_dir")
        if record.base["sha256"] != records[0].base["sha256"]:
            raise UserError(f"{folder}: was trained on another base than {folders[0]}; run them apart")

    # 2. The base, with the shape that its runs gave it.
    base = pretrained.load_base(records[0].base, log)
    model = GPT(GPTConfig(**pretrained.shape_of_record(records[0])))
    model.load_weights(base.weights, records[0].base["source"], grow=True)

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
