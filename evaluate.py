"""How good a trained model is: losses on held-out data, and accuracy on tasks whose answers can be checked.

    python evaluate.py --out_dir=out/run                              losses on its datasets; rewards of a DPO, KTO or
                                                                      GRPO run
    python evaluate.py --out_dir=out/run --tasks arithmetic,gsm8k     accuracy of greedy completions
    python evaluate.py --out_dir=out/run --tasks gsm8k --decode=standard --num_passes=8        pass@k, majority@k
    python evaluate.py --out_dir=out/run --lm_eval=hellaswag,arc_easy                          tasks of lm-eval

A task is a dataset with a val.jsonl of prompts and answers, or a path to such a file; rows with choices are scored by
their log-likelihoods. Prints a table and writes evaluation.json to the run's folder, where evaluations.jsonl keeps the
results of every call.
"""

import gc
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import configurator
from common_args import DeviceArgs, LoadArgs, load_errors
from configurator import Rules, arg, arg_group, arg_table, with_set

# ---------------------------------------------------------------------------------------------------------------------
# arguments


class Decoding(NamedTuple):
    """The sampling parameters of a value of --decode."""

    temperature: float
    top_k: int
    top_p: float


DECODINGS = {  # as in agent_tunix
    "greedy": Decoding(temperature=0.0, top_k=0, top_p=1.0),
    "standard": Decoding(temperature=0.7, top_k=50, top_p=0.95),
    "liberal": Decoding(temperature=0.85, top_k=2000, top_p=1.0),
}
DEFAULT_MAX_NEW_TOKENS = 256
TASKS = with_set("tasks")
HARNESS = with_set("lm_eval")


@arg_group
class LossArgs:
    """losses"""

    datasets: tuple[str, ...] = arg(
        (),
        "datasets whose validation loss is taken (default: the run's own); one for each context, if it has several",
        path=True,
    )
    data_dir: str = arg("", "folder of the dataset folders (default: the run's, otherwise data)", path=True)
    max_windows: int = arg(0, "maximum windows, or examples, per dataset (0: all)", low=0)


@arg_group
class TaskArgs:
    """tasks"""

    tasks: tuple[str, ...] = arg(
        (), "datasets with a val.jsonl of prompts and answers or choices, paths to such files, or hf:NAME", path=True
    )
    decode: str = arg(
        "greedy",
        "greedy, or sampling. standard: temperature 0.7, top_k 50, top_p 0.95; liberal: 0.85, 2000, 1",
        choices=tuple(DECODINGS),
        needs=TASKS,
    )
    num_passes: int = arg(1, "completions sampled per problem, for pass@k and majority@k", low=1, needs=TASKS)
    max_new_tokens: int = arg(0, "maximum completion length (0: the run's, otherwise 256)", low=0, needs=TASKS)
    max_problems: int = arg(0, "maximum problems per task, the first ones (0: all)", low=0, needs=TASKS)
    seed: int = arg(1337, "random seed of sampling", low=0, high=2**32 - 1)


@arg_group
class HarnessArgs:
    """lm-eval"""

    lm_eval: tuple[str, ...] = arg(
        (), "tasks of lm-eval (pip install lm-eval) by name, pattern or YAML file; losses then need --datasets"
    )
    num_fewshot: int = arg(-1, "examples before each question (-1: as the task says)", low=-1, needs=HARNESS)
    limit: float = arg(0.0, "maximum examples per task, below 1 a fraction of them (0: all)", low=0, needs=HARNESS)
    apply_chat_template: bool = arg(False, "put the model's chat template around prompts", needs=HARNESS)
    system_instruction: str = arg("", "system message of each chat, or text before each prompt", needs=HARNESS)
    include_path: str = arg("", "folder of more task YAML files", path=True, needs=HARNESS)
    gen_kwargs: dict[str, object] = arg(
        {}, 'generation settings over the tasks\', as JSON: {"max_gen_toks": 64}', needs=HARNESS
    )
    fewshot_seed: int = arg(1234, "random seed of the choice of few-shot examples", low=0, needs=HARNESS)


@arg_group
class SystemArgs(DeviceArgs):
    """system"""

    batch_size: int = arg(64, "windows, examples, problems or requests per batch", low=1)
    json: str = arg("", "file to write (default: evaluation.json in out_dir)", path=True)


@arg_table
class EvaluateArgs(LoadArgs, LossArgs, TaskArgs, HarnessArgs, SystemArgs):
    """The arguments of evaluate.py."""


def check(args: EvaluateArgs, source: dict[str, str]) -> Iterator[str]:
    """Errors of arguments that conflict."""
    yield from load_errors(args)
    if args.num_passes > 1 and args.decode == "greedy":
        yield "--num_passes: greedy completions are all the same; use --decode=standard or liberal"
    if args.init_from != "resume" and not args.json:
        yield "--json: required without a run; name the file to write"


if __name__ == "__main__":
    configurator.exit_on_interrupt()
    ARGUMENTS = configurator.parse(EvaluateArgs, sys.argv[1:], __doc__, Rules(check=check))
    gc.disable()  # a sixth of the seconds that torch takes to import

import dataclasses
import itertools
import json
import math
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builders import LoadedModel, build_run, example_sources, load_model, prepare_data, with_template
from nanoforge import files
from nanoforge.console import ProgressBar, plural, print_to_stderr
from nanoforge.data import batches, hub_datasets, tables, token_bins, tokenization
from nanoforge.data.tables import Row
from nanoforge.device import explain_out_of_memory, varying_shapes
from nanoforge.distributed import Ranks
from nanoforge.errors import UserError
from nanoforge.models.generation import SamplingParams, generate_batch, uniform_draws
from nanoforge.models.likelihood import Pair, score_continuations
from nanoforge.posttraining import lm_eval_model, multiple_choice, prompt_format, row_shapes
from nanoforge.posttraining.accuracy import majority_at_k, pass_at_k, wilson_interval
from nanoforge.posttraining.answers import extract_vote, is_correct, partial_credit
from nanoforge.posttraining.chat_template import completion_end_ids
from nanoforge.posttraining.example_rows import RowFormat, RowSource, place_of, read_example_rows
from nanoforge.posttraining.examples import Collator, ExampleEncoder, encode_rows
from nanoforge.posttraining.losses import per_token_logps
from nanoforge.posttraining.multiple_choice import ChoiceQuestion
from nanoforge.posttraining.objective_specs import OBJECTIVES
from nanoforge.posttraining.prompt_format import PromptTemplate
from nanoforge.posttraining.rewards import format_score
from nanoforge.run_dir import RunRecord, run_of_checkpoint
from nanoforge.training import checkpoint
from nanoforge.training.evaluation import evaluate
from nanoforge.training.signals import Signals
from train_args import TrainArgs

NUM_SAMPLES = 5  # completions of a task that evaluation.json shows


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how."""

    args: EvaluateArgs
    loaded: LoadedModel
    device: torch.device
    run: TrainArgs | None  # the arguments of the run in out_dir
    template: PromptTemplate | None  # of a soft prompt

    @property
    def data_dir(self) -> Path:
        """The folder of the dataset folders."""
        if self.args.data_dir:
            return Path(self.args.data_dir)
        return Path(self.run.data_dir if self.run else "data")

    def columns(self, source: RowSource) -> dict[str, str]:
        """field -> column of the run's own data, where it maps them; of other data nothing. Raises UserError."""
        run = self.run
        if run is None or not run.columns:
            return {}
        own_splits = example_sources(dataclasses.replace(run, data_dir=str(self.data_dir))).values()
        is_own = any(source in splits.values() for splits in own_splits)
        return row_shapes.parse_columns(run.columns, None) if is_own else {}

    @property
    def prompt_offset(self) -> int:
        """The id of the first virtual token of a soft prompt."""
        return self.loaded.prompt_offsets[0] if self.loaded.prompt_offsets else 0

    @property
    def has_chat_template(self) -> bool:
        """Whether chats become tokens by a template of the model."""
        return self.loaded.tokenizer.chat_template != ""

    @property
    def max_new_tokens(self) -> int:
        """The maximum length of a completion."""
        if self.args.max_new_tokens:
            return self.args.max_new_tokens
        if self.run and self.run.objective != "lm":
            return self.run.max_new_tokens
        return DEFAULT_MAX_NEW_TOKENS

    def iter_batches(self, size: int, title: str, unit: str) -> Iterator[range]:
        """The numbers below `size` in batches; shows their progress."""
        with closing(ProgressBar(title, unit, size)) as progress:
            for start in range(0, size, self.args.batch_size):
                numbers = range(start, min(start + self.args.batch_size, size))
                yield numbers
                progress.add(len(numbers))


def load_evaluation(args: EvaluateArgs) -> Evaluation:
    """The model on its device, with what its run says of data. Raises UserError."""
    loaded = load_model(args.init_from, args.out_dir, args.checkpoint, args.base_model, print_to_stderr)
    run = loaded.args if args.init_from == "resume" else None
    template = None
    if run and run.adapter == "soft_prompt":
        template = prompt_format.parse(run.prompt_format)
    loaded = with_template(loaded, args.chat_template, args.chat_template_kwargs)
    device = loaded.to(args.device, args.dtype)
    return Evaluation(args=args, loaded=loaded, device=device, run=run, template=template)


# ---------------------------------------------------------------------------------------------------------------------
# losses


Losses = dict[str, dict[str, float]]  # dataset -> metric -> value


def evaluate_losses(evaluation: Evaluation) -> Losses:
    """The losses on the datasets of the arguments, or on the run's own data. Raises UserError."""
    args, run = evaluation.args, evaluation.run
    if args.datasets:
        names = args.datasets
    elif run is None or (args.lm_eval and not args.tasks):
        return {}
    elif run.objective not in ("lm", "sft"):
        return {} if args.tasks else objective_metrics(evaluation, run)
    elif run.validation_file:
        path = Path(run.validation_file)
        return {path.stem: example_loss(evaluation, path)}
    elif run.train_file:
        return {name: example_loss(evaluation, splits["val"]) for name, splits in example_sources(run).items()}
    else:
        names = tuple(name for streams in run.mixture for name in streams)

    if run and run.data_format == "examples":
        return {name: example_loss(evaluation, validation_rows(evaluation, name)) for name in names}
    for name in names:
        token_bins.prepare_if_missing(evaluation.data_dir / name, "bins")
    if evaluation.loaded.model.config.vocabulary == "contexts":
        return text_losses(evaluation, names)
    return {name: metrics for name in names for metrics in text_losses(evaluation, [name]).values()}


def validation_rows(evaluation: Evaluation, name: str) -> RowSource:
    """The validation examples of a dataset's folder, or of a dataset of the hub. Raises UserError."""
    if hub_datasets.is_hub(name):
        run = evaluation.run
        return hub_datasets.sides(name, run.val_fraction if run else TrainArgs.val_fraction)["val"]
    folder = evaluation.data_dir / name
    token_bins.prepare_if_missing(folder, "examples")
    return folder / "val.jsonl"


@varying_shapes()
def objective_metrics(evaluation: Evaluation, run: TrainArgs) -> Losses:
    """The metrics of preferences and rewards that training logs, on all validation examples of the run: those of its
    objective, with its reference model. Raises UserError."""
    args, loaded, folder = evaluation.args, evaluation.loaded, evaluation.loaded.folder
    assert folder is not None
    if args.chat_template or args.chat_template_kwargs:
        raise UserError(
            f"--chat_template: the metrics of a run with --objective={run.objective} are those of its own template; "
            "give --tasks or --datasets, or leave it out"
        )
    batch_size = min(args.batch_size, args.max_windows or args.batch_size)
    run_args = dataclasses.replace(
        run,
        init_from="resume",
        out_dir=str(folder),
        data_dir=str(evaluation.data_dir),
        base_model=args.base_model,
        batch_size=batch_size,
        eval_iters=args.max_windows // batch_size or sys.maxsize,
        reference="auto",  # a cache is as good, but is written
        beta=0.0 if OBJECTIVES[run.objective].is_online else run.beta,  # rewards need no reference model
        dtype=str(loaded.model.compute_dtype).removeprefix("torch."),
        parallel="ddp",
        compile="false",
    )
    prepare_data(run_args)
    ranks = Ranks(0, 1, evaluation.device)
    parts = build_run(run_args, RunRecord.load(folder), ranks, print_to_stderr)
    parts.model.load_weights(checkpoint.load_tensors(folder, "model"), str(folder))
    results = evaluate(parts.model, {"val": parts.data.eval_datasets["val"]}, ranks, Signals())
    assert results is not None, "no signal is handled here"
    return {
        dataset.name: {f"val_{name}": value for name, value in result.metrics.items()}
        for dataset, result in zip(parts.data.eval_datasets["val"], results["val"], strict=True)
    }


def open_contexts(evaluation: Evaluation, names: Sequence[str]) -> tuple[list[token_bins.TokenBin], list[int]]:
    """The val.bin of each aligned dataset, in the model's order, and where its vocabulary begins. Raises UserError."""
    loaded = evaluation.loaded
    vocabularies = list(loaded.tokenizers)
    has_contexts = loaded.model.config.vocabulary == "contexts"
    if has_contexts and len(names) != len(vocabularies):
        raise UserError(
            f"--datasets: the model reads {len(vocabularies)} contexts ({', '.join(vocabularies)}); name an aligned "
            "dataset for each"
        )
    if has_contexts and set(names) == set(vocabularies):
        names = vocabularies
    bins, offsets = [], []
    for i, name in enumerate(names):
        number = i
        if not has_contexts:
            number = vocabularies.index(name) if name in vocabularies else 0
        meta = token_bins.read_meta(evaluation.data_dir / name)
        if not tokenization.same_tokenizer(meta.tokenizer, loaded.tokenizers[vocabularies[number]]):
            raise UserError(f"--datasets={name}: has another tokenizer than the model's {vocabularies[number]}")
        bins.append(token_bins.TokenBin(evaluation.data_dir / name, "val", meta, name))
        offsets.append(loaded.model.vocabulary.vocab_offsets[number])
    return bins, offsets


class Window(NamedTuple):
    """Consecutive targets of a shard."""

    shard: int
    start: int
    length: int


def cut_windows(sizes: Iterable[int], block_size: int, most: int) -> list[Window]:
    """Windows of block_size one after the other, the last one of a shard shorter: each token but a shard's first is a
    target once. Those of a length follow each other. most: of the first windows (0: all)."""
    windows = [
        Window(shard, start, min(block_size, size - 1 - start))
        for shard, size in enumerate(sizes)
        for start in range(0, size - 1, block_size)
    ]
    return sorted(windows[: most or len(windows)], key=lambda window: -window.length)


@torch.no_grad()
def text_losses(evaluation: Evaluation, names: Sequence[str]) -> Losses:
    """The losses on val.bin of a dataset, or of the aligned datasets of a multicontext model. Raises UserError.

    Where the model's sequences begin with a token of their own, that one stands in the place of a window's first token,
    which is context alone.
    """
    model = evaluation.loaded.model
    bins, offsets = open_contexts(evaluation, names)
    sizes = batches.aligned_sizes(bins).tolist()
    run = evaluation.loaded.args
    block_size = min(model.config.block_size, run.block_size) if run else model.config.block_size  # as in training
    windows = cut_windows(sizes, block_size, evaluation.args.max_windows)
    if not windows:
        raise UserError(f"--datasets={bins[0].name}: {bins[0].paths[0]} has one token, of which none is predicted")
    ends = torch.tensor([without_bytes(val, offset) for val, offset in zip(bins, offsets, strict=True)])  # (K, 2)
    sums = torch.zeros(2, len(bins), dtype=torch.float64)  # of all losses, and of those of end tokens
    n_tokens = 0
    for numbers in evaluation.iter_batches(len(windows), "+".join(val.name for val in bins), "windows"):
        chunk = windows[numbers.start : numbers.stop]
        for length, same_length in itertools.groupby(chunk, key=lambda window: window.length):
            places = np.array([(window.shard, window.start) for window in same_length])
            ids = [read_windows(val, places, length + 1) + offset for val, offset in zip(bins, offsets, strict=True)]
            batch = batches.to_batch(np.stack(ids, axis=1), pin=False).to(evaluation.device)
            losses = model(batch.idx, batch.targets).view(len(places), len(bins), length)
            is_end = (batch.targets.view_as(losses)[..., None] == ends.to(losses.device)[:, None]).any(-1)
            sums += torch.stack((losses.sum((0, 2)), (losses * is_end).sum((0, 2)))).cpu()
            n_tokens += len(places) * length
    totals, end_totals = sums.tolist()
    results = {
        val.name: loss_metrics(total, n_tokens) | bits_per_byte(val, total, end_total, n_tokens)
        for val, total, end_total in zip(bins, totals, end_totals, strict=True)
    }
    if len(bins) > 1:
        results["+".join(results)] = loss_metrics(sum(totals) / len(bins), n_tokens)
    return results


def read_windows(val: token_bins.TokenBin, places: np.ndarray, length: int) -> np.ndarray:
    """(n, length) int64: windows from places (n, 2), (shard, start), each after the token that begins a sequence."""
    ids = val.read_windows(places[:, 0], places[:, 1], length).astype(np.int64)
    bos_id = val.meta.tokenizer.bos_id
    if bos_id is not None:
        ids[:, 0] = bos_id
    return ids


def without_bytes(val: token_bins.TokenBin, offset: int) -> list[int]:
    """The model's ids of the tokens that end and begin a document; an id that no token has where there is none."""
    tokenizer = val.meta.tokenizer
    return [-(2**31) if i is None else i + offset for i in (tokenizer.eos_id, tokenizer.bos_id)]


def bits_per_byte(val: token_bins.TokenBin, total: float, end_total: float, n_tokens: int) -> dict[str, float]:
    """The cost of a text in bits per byte, with the losses of end tokens, which have no bytes, and without them.

    So have the tokens that begin documents. Empty where the bytes are not known. total, end_total: losses of n_tokens
    targets, and of the end tokens among them.
    """
    if not val.bytes:
        return {}
    bits = 1 / math.log(2) / (n_tokens * val.bytes / val.tokens)
    metrics = {"bits_per_byte": total * bits}
    if (val.meta.tokenizer.eos_id, val.meta.tokenizer.bos_id) != (None, None):
        metrics["bits_per_byte_without_end_tokens"] = (total - end_total) * bits
    return metrics


@torch.no_grad()
@varying_shapes()
def example_loss(evaluation: Evaluation, source: RowSource) -> dict[str, float]:
    """The loss on the completions of validation examples, end tokens included. Raises UserError."""
    args, model, run, template = evaluation.args, evaluation.loaded.model, evaluation.run, evaluation.template
    target_field = (run.target_field if run else "") or "completion"
    fields = OBJECTIVES["sft"].fields if template is None else [[*template.fields, target_field]]
    row_format = RowFormat(
        fields=fields,
        example_type="prompt_completion",
        needed_by="--datasets",
        is_template=template is not None,
        has_chat_template=evaluation.has_chat_template,
        columns=evaluation.columns(source),
    )
    rows, _ = read_example_rows(source, row_format)
    encoder = ExampleEncoder(
        tokenizer=evaluation.loaded.tokenizer,
        max_tokens=model.config.block_size,
        overflow="drop",
        template=template,
        prompt_offset=evaluation.prompt_offset,
        target_field=target_field,
        truncation_field=run.truncation_field if run else "",
    )
    examples, n_dropped, _ = encode_rows(
        rows[: args.max_windows or len(rows)], encoder, "prompt_completion", str(source)
    )
    total_loss = 0.0
    n_tokens = 0
    for numbers in evaluation.iter_batches(len(examples), str(source), "examples"):
        chunk = examples[numbers.start : numbers.stop]
        batch = Collator()(chunk, range(len(chunk))).to(evaluation.device)
        loss_mask = batch.extras["loss_mask"]
        total_loss -= float(per_token_logps(model, batch.tokens, loss_mask).sum())
        n_tokens += int(loss_mask.sum())
    metrics = loss_metrics(total_loss, n_tokens)
    if n_dropped:
        metrics["left_out"] = n_dropped
    return metrics


def loss_metrics(total_loss: float, n_tokens: int) -> dict[str, float]:
    """The mean loss, its perplexity and the number of tokens."""
    mean = total_loss / n_tokens
    return {"val_loss": mean, "perplexity": math.exp(mean), "tokens": n_tokens}


# ---------------------------------------------------------------------------------------------------------------------
# tasks

ProblemScore = dict[str, float]  # metric -> value in [0, 1]


class Answer(NamedTuple):
    """A completion of a problem."""

    text: str  # without the end token
    n_tokens: int
    ended: bool  # by itself


class Answers(NamedTuple):
    """The completions of all problems."""

    of_problems: list[list[Answer]]  # num_passes of each
    n_cut_prompts: int  # prompts longer than the context, of which the end was read


def evaluate_task(evaluation: Evaluation, task: str) -> dict[str, Any]:
    """Accuracy and its relatives over the problems of a task, with what the completions are like. Raises UserError."""
    args = evaluation.args
    source = task_rows(evaluation, task)
    if multiple_choice.has_choices(source):
        return evaluate_choices(evaluation, task, source)
    problems = read_problems(evaluation, source)
    problems = problems[: args.max_problems or len(problems)]
    answers, n_cut_prompts = answer_problems(evaluation, problems, title=task)
    scores = []
    samples = []
    for problem, problem_answers in zip(problems, answers, strict=True):
        texts = [answer.text for answer in problem_answers]
        scores.append(score_problem(problem["answer"], texts, args.num_passes))
    for problem, problem_answers in zip(problems[:NUM_SAMPLES], answers[:NUM_SAMPLES], strict=True):
        completion = problem_answers[0].text
        samples.append({"prompt": problem["prompt"], "answer": problem["answer"], "completion": completion})
    return {
        **aggregate(scores),
        "n": len(problems),
        "passes": args.num_passes,
        **describe_lengths(answers),
        "cut_prompts": n_cut_prompts,
        "samples": samples,
    }


def task_rows(evaluation: Evaluation, task: str) -> RowSource:
    """The rows of a file, of a dataset's val.jsonl, or of a dataset of the hub. Raises UserError."""
    is_file = not hub_datasets.is_hub(task) and tables.file_suffix(Path(task)) in tables.SUFFIXES
    return Path(task) if is_file else validation_rows(evaluation, task)


def evaluate_choices(evaluation: Evaluation, task: str, source: RowSource) -> dict[str, Any]:
    """Accuracy by the log-likelihoods of the choices of a task, which needs no completions. Raises UserError."""
    args, loaded = evaluation.args, evaluation.loaded
    for name in ("num_passes", "max_new_tokens", "decode"):
        if getattr(args, name) != getattr(EvaluateArgs, name):
            raise UserError(f"--{name}: --tasks={task} has choices, of which none is sampled; evaluate it by itself")
    fields = evaluation.template.fields if evaluation.template else ()
    questions = multiple_choice.read_questions(source, fields, evaluation.columns(source), args.max_problems)
    encoder = ExampleEncoder(
        tokenizer=loaded.tokenizer,
        max_tokens=loaded.model.config.block_size,
        template=evaluation.template,
        prompt_offset=evaluation.prompt_offset,
    )
    pairs = [encode_question(question, encoder) for question in questions]
    all_pairs = list(itertools.chain.from_iterable(pairs))
    with closing(ProgressBar(task, "choices", len(all_pairs))) as progress:
        scored = iter(score_continuations(loaded.model, all_pairs, args.batch_size, on_scored=progress.add))

    scores, samples = [], []
    for question in questions:
        choices = question.choices
        logps = [score.logp for score in itertools.islice(scored, len(choices))]
        scores.append(multiple_choice.choice_metrics(logps, choices, question.answer))
        shown = {"prompt": question.row.get("prompt"), "choices": choices, "answer": choices[question.answer]}
        samples.append({**shown, "log_likelihoods": logps})
    lengths = [max(len(context) + len(choice) - 1 for context, choice in of_question) for of_question in pairs]
    return {
        **aggregate(scores),
        "n": len(questions),
        "choices": len(all_pairs) / len(questions),
        "cut_prompts": sum(length > loaded.model.config.block_size for length in lengths),
        "samples": samples[:NUM_SAMPLES],
    }


def encode_question(question: ChoiceQuestion, encoder: ExampleEncoder) -> list[Pair]:
    """The prompt with each choice. Raises UserError that names the row."""
    try:
        return multiple_choice.encode_choices(question, encoder)
    except (UserError, UnicodeError) as error:
        raise UserError(f"--tasks: {place_of(question.row, 'a question')}: {error}") from None


def read_problems(evaluation: Evaluation, source: RowSource) -> list[Row]:
    """The problems, each with a prompt and its answer. Those of a soft prompt need the fields of its template instead
    of a prompt. Raises UserError."""
    columns = evaluation.columns(source)
    if evaluation.template is None:
        row_format = RowFormat(
            fields=OBJECTIVES["grpo"].fields,
            example_type="prompt_only",
            needed_by="--tasks",
            has_chat_template=evaluation.has_chat_template,
            columns=columns,
        )
        return read_example_rows(source, row_format).rows
    names = evaluation.template.fields
    row_format = RowFormat([[*names, "answer"]], "prompt_only", "--tasks", is_template=True, columns=columns)
    rows, _ = read_example_rows(source, row_format)
    problems = []
    for row in rows:
        shown_prompt = " ".join(str(row[name]) for name in names)  # in the samples, unless the row has a prompt
        problems.append({"prompt": shown_prompt, **row, "answer": str(row["answer"])})
    return problems


def answer_problems(evaluation: Evaluation, problems: Sequence[Row], title: str) -> Answers:
    """num_passes completions of each problem. Raises UserError."""
    args, model, tokenizer = evaluation.args, evaluation.loaded.model, evaluation.loaded.tokenizer
    encoder = ExampleEncoder(
        tokenizer=tokenizer,
        max_tokens=model.config.block_size,
        template=evaluation.template,
        prompt_offset=evaluation.prompt_offset,
    )
    sampling = SamplingParams(
        max_new_tokens=evaluation.max_new_tokens,
        n=args.num_passes,
        end_ids=completion_end_ids(tokenizer),
        vocab_size=tokenizer.vocab_size,
        **DECODINGS[args.decode]._asdict(),
    )
    prompts = encode_prompts(encoder, problems, source=title)
    n_cut = sum(len(ids) > model.config.block_size for ids in prompts)
    answers: list[list[Answer]] = [[] for _ in problems]
    for batch in evaluation.iter_batches(len(problems), title, "problems"):
        completions = generate_batch(
            model,
            prompts=prompts[batch.start : batch.stop],
            sampling=sampling,
            uniform=uniform_draws(args.seed, first=batch.start * args.num_passes),
        )
        for number, completion in enumerate(completions):
            ids = completion.ids[:-1] if completion.ended else completion.ids
            answer = Answer(tokenizer.decode(ids), n_tokens=len(completion.ids), ended=completion.ended)
            answers[batch.start + number // args.num_passes].append(answer)
    return Answers(answers, n_cut)


def encode_prompts(encoder: ExampleEncoder, problems: Sequence[Row], source: str) -> list[list[int]]:
    """The ids of the prompts. Raises UserError that names the row."""
    prompts = []
    for number, problem in enumerate(problems, start=1):
        try:
            prompts.append(encoder.encode_prompt(problem))
        except (UserError, UnicodeError) as error:
            raise UserError(f"--tasks={source}: row {number}: {error}") from None
    return prompts


def score_problem(reference: str, completions: Sequence[str], num_passes: int) -> ProblemScore:
    """What the completions of one problem are worth; nothing if there are none."""
    n_correct = sum(is_correct(completion, reference) for completion in completions)
    n_in_format = sum(format_score(completion) == 1 for completion in completions)
    votes = [extract_vote(completion, reference) for completion in completions]
    score = {
        "accuracy": n_correct / num_passes,
        "partial": sum(partial_credit(completion, reference) for completion in completions) / num_passes,
        "format": n_in_format / num_passes,
    }
    powers = {2**exponent for exponent in range(1, num_passes.bit_length())}
    for k in sorted(powers | {num_passes} - {1}):
        score[f"pass@{k}"] = pass_at_k(num_passes, n_correct, k)
        score[f"majority@{k}"] = majority_at_k(votes, reference, k) if votes else 0.0
    return score


def aggregate(scores: Sequence[ProblemScore]) -> dict[str, dict[str, float]]:
    """For each metric the mean over the problems, with a confidence interval of 95 %."""
    n = len(scores)
    metrics = {}
    for name in scores[0]:
        total = sum(score[name] for score in scores)
        low, high = wilson_interval(total, n)
        metrics[name] = {"value": total / n, "low": low, "high": high}
    return metrics


def describe_lengths(answers: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """The mean length of completions, and how many of them ended by themselves."""
    completions = [answer for problem_answers in answers for answer in problem_answers]
    n = max(1, len(completions))
    return {
        "mean_tokens": sum(answer.n_tokens for answer in completions) / n,
        "ended": sum(answer.ended for answer in completions) / n,
    }


# ---------------------------------------------------------------------------------------------------------------------
# lm-eval


def check_harness(evaluation: Evaluation) -> None:
    """Refuse what lm-eval's tasks can't be asked of. Raises UserError."""
    tokenizer = evaluation.loaded.tokenizer
    if evaluation.template is not None:
        raise UserError("--lm_eval: the run is a soft prompt, whose format lm-eval's tasks don't have; use --tasks")
    if evaluation.args.apply_chat_template and not tokenizer.chat_template:
        raise UserError("--apply_chat_template: the model's tokenizer has none; name one with --chat_template=FILE")
    lm_eval_model.import_lm_eval()


def evaluate_harness(evaluation: Evaluation) -> dict[str, Any]:
    """The results of lm-eval's tasks. Raises UserError."""
    args, loaded = evaluation.args, evaluation.loaded
    model = lm_eval_model.HarnessModel(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=args.batch_size,
        seed=args.seed,
        apply_template=args.apply_chat_template,
    )
    options = lm_eval_model.HarnessOptions(
        tasks=args.lm_eval,
        num_fewshot=None if args.num_fewshot < 0 else args.num_fewshot,
        limit=args.limit or None,
        include_path=args.include_path,
        gen_kwargs=args.gen_kwargs,
        fewshot_seed=args.fewshot_seed,
        apply_chat_template=args.apply_chat_template,
        system_instruction=args.system_instruction,
    )
    return lm_eval_model.run_harness(model, options)


# ---------------------------------------------------------------------------------------------------------------------


def describe_task(task: Mapping[str, Any], decode: str) -> str:
    """What was made of each problem of a task."""
    if "choices" in task:
        return f"{task['choices']:.3g} choices each (log-likelihood)"
    completions = "1 completion" if task["passes"] == 1 else f"{task['passes']} completions"
    return f"{completions} each ({decode}), {task['mean_tokens']:.1f} tokens, {task['ended']:.1%} ended"


def print_results(results: dict[str, Any]) -> None:
    """A line for each dataset, and for each task a line and its metrics."""
    print(results["checkpoint"])
    for name, metrics in results["losses"].items():
        cells = [
            f"{key} {value:,.4f}" if isinstance(value, float) else f"{key} {value:,}" for key, value in metrics.items()
        ]
        print(f"  {name:20} {'  '.join(cells)}")
    for name, task in results["tasks"].items():
        print(f"  {name:20} n {task['n']:,}, {describe_task(task, results['decode'])}")
        if task["cut_prompts"]:
            prompts = plural(task["cut_prompts"], "prompt")
            print(f"    {prompts} longer than the context: the model read the end")
        for key, value in task.items():
            if isinstance(value, dict):
                print(f"    {key:18} {value['value']:7.2%}   (95 %: {value['low']:.2%} to {value['high']:.2%})")
    if "lm_eval" in results:
        print(lm_eval_model.format_results(results["lm_eval"]))


def main(args: EvaluateArgs) -> dict[str, Any]:
    """Print the results and write them as JSON. Raises UserError."""
    if args.init_from != "resume" and not (args.tasks or args.datasets or args.lm_eval):
        raise UserError("--tasks, --datasets, --lm_eval: one is required without a run; name what to evaluate on")
    evaluation = load_evaluation(args)
    files.check_writable(results_path(args).parent, "--json")  # before the work
    if args.lm_eval:
        check_harness(evaluation)
    with explain_out_of_memory(f"a smaller --batch_size than {args.batch_size} needs less"):
        results = {
            "checkpoint": evaluation.loaded.source,
            "decode": args.decode,
            "seed": args.seed,
            "dtype": str(evaluation.loaded.model.compute_dtype).removeprefix("torch."),
            "losses": evaluate_losses(evaluation),
            "tasks": {task: evaluate_task(evaluation, task) for task in args.tasks},
        }
        if args.lm_eval:
            results["lm_eval"] = evaluate_harness(evaluation)
    print_results(results)
    write_results(args, results)
    return results


def results_path(args: EvaluateArgs) -> Path:
    """The file of this call's results."""
    folder = run_of_checkpoint(Path(args.out_dir)) or Path(args.out_dir)  # nothing is written into a checkpoint
    return Path(args.json or folder / "evaluation.json")


def write_results(args: EvaluateArgs, results: dict[str, Any]) -> None:
    """Write the results to --json; without it to the run's evaluation.json, and to evaluations.jsonl, which keeps those
    of every call."""
    path = results_path(args)
    files.write_json(path, results)
    print(path)
    if not args.json:
        line = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), **results}
        history = path.parent / "evaluations.jsonl"
        try:
            with history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            print_to_stderr(f"{history}: does not keep this call ({error.strerror})")


if __name__ == "__main__":
    configurator.run(main, ARGUMENTS)
