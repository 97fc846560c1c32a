"""How good a trained model is: losses on held-out data, and answers to tasks that can be checked.

    python evaluate.py --out_dir=out/run                                            loss, perplexity, bits a byte of its own datasets
    python evaluate.py --out_dir=out/run --tasks arithmetic,gsm8k                   accuracy of the likeliest answers
    python evaluate.py --out_dir=out/run --tasks arithmetic --decode=standard --num_passes=8

A task is a dataset with a val.jsonl of prompts and answers, or a path to such a file. Prints a table and writes evaluation.json beside the run.
"""

import gc
import sys
from dataclasses import dataclass

import configurator
import train_args
from common_args import DeviceArgs, LoadArgs, checkpoint_errors
from configurator import OnlyWith, Rules, arg, arg_group

DECODE = {
    "greedy": (0.0, 0, 1.0),
    "standard": (0.7, 50, 0.95),
    "liberal": (0.85, 2000, 1.0),
}  # temperature, top_k, top_p, as in agent_tunix
TASKS = OnlyWith("--tasks", lambda a: bool(a.tasks))


@arg_group
class LossArgs:
    """losses"""

    datasets: tuple[str, ...] = arg((), "datasets to take losses on (none: the run's own)")
    data_dir: str = arg("", "folder that holds the dataset folders (none: the run's, otherwise data)")
    max_windows: int = arg(0, "so many windows of a dataset, or examples, at most (0: all)", low=0)


@arg_group
class TaskArgs:
    """tasks"""

    tasks: tuple[str, ...] = arg((), "datasets with a val.jsonl of prompts and answers, or paths to such files")
    decode: str = arg(
        "greedy",
        "the likeliest tokens; or drawn, standard: temperature 0.7, top_k 50, top_p 0.95; liberal: 0.85, 2000, 1",
        choices=tuple(DECODE),
        needs=TASKS,
    )
    num_passes: int = arg(1, "answers to each problem, for pass@k and majority@k", low=1, needs=TASKS)
    max_new_tokens: int = arg(0, "tokens of an answer (0: the run's, otherwise 256)", low=0, needs=TASKS)
    max_problems: int = arg(0, "so many problems of a task, the first ones (0: all)", low=0, needs=TASKS)
    seed: int = arg(1337, "of the draws", low=0, high=2**32 - 1, needs=TASKS)


@arg_group
class SystemArgs(DeviceArgs):
    """system"""

    batch_size: int = arg(64, "windows, examples or problems at once", low=1)
    json: str = arg("", "file to write (none: evaluation.json in out_dir)")


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(LoadArgs, LossArgs, TaskArgs, SystemArgs):
    """The arguments of evaluate.py."""


def check(a, source: dict[str, str]) -> list[str]:
    wrong = list(checkpoint_errors(a))
    wrong += ["--num_passes: the likeliest answer is always the same; take --decode=standard or liberal"] * (
        a.num_passes > 1 and a.decode == "greedy"
    )
    return wrong + ["--json: say where to write; there is no run"] * (a.init_from != "resume" and not a.json)


if __name__ == "__main__":
    ARGUMENTS = configurator.parse(EvaluateArgs, sys.argv[1:], __doc__, Rules(check=check))
    gc.disable()  # a sixth of the seconds that torch takes to import

import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import sample
from model import GPT, GPTConfig
from nanoforge import files, rng
from nanoforge.data import batches, token_bins, tokenization
from nanoforge.device import choose_dtype, get_device
from nanoforge.errors import UserError
from nanoforge.models import generation, pretrained
from nanoforge.posttraining import accuracy, answers, examples, prompt_format, rewards
from nanoforge.posttraining.losses import per_token_logps
from nanoforge.posttraining.objective_specs import OBJECTIVES
from nanoforge.training import checkpoint


def say(words: str) -> None:
    print(words, file=sys.stderr)


class Subject:
    """The model, its tokenizers, and the arguments of its run, if it comes from one."""

    def __init__(self, a):
        """Raises UserError."""
        self.folder = checkpoint.resolve(Path(a.out_dir), a.checkpoint, say) if a.init_from == "resume" else None
        self.run = train_args.load_args(self.folder) if self.folder else None
        self.template, self.first_row = None, 0
        if self.run and self.run.adapter == "soft_prompt":
            self.model, tokenizer, (self.first_row,) = sample.base_with_prompts([self.folder])
            self.tokenizers, self.template = {"tokens": tokenizer}, prompt_format.parse(self.run.prompt_format)
        else:
            loaded = pretrained.load(str(self.folder or a.init_from), say)
            self.model = GPT(GPTConfig(**loaded.shape))
            self.model.load_weights(loaded.weights, str(self.folder or a.init_from))
            self.tokenizers = loaded.tokenizers or {
                "tokens": tokenization.NumberTokenizer(sum(self.model.config.vocab_sizes))
            }
        self.device = get_device(a.device)
        self.model.to(self.device).eval()
        self.model.compute_dtype, _ = choose_dtype(a.dtype, self.device)
        self.data_dir = Path(a.data_dir or (self.run.data_dir if self.run else "data"))
        self.target, self.truncated = (
            ((self.run.target_field or "completion"), self.run.truncation_field) if self.run else ("completion", "")
        )

    @property
    def tokenizer(self) -> tokenization.Tokenizer:
        """The only one. Raises UserError."""
        if len(self.tokenizers) > 1:
            raise UserError("--tasks: the model has several vocabularies; tasks and examples need one")
        return next(iter(self.tokenizers.values()))


# ---------------------------------------------------------------------------------------------------------------------
# losses


@torch.no_grad()
def loss_of_text(subject: Subject, name: str, a) -> dict[str, float]:
    """Over the windows of val.bin, one after the other, so that each token is predicted once. Raises UserError."""
    meta = token_bins.read_meta(subject.data_dir / name)
    names = list(subject.tokenizers)
    own = names.index(name) if name in names else 0
    if not tokenization.same_tokenizer(meta.tokenizer, list(subject.tokenizers.values())[own]):
        raise UserError(f"--datasets={name}: has another tokenizer than the model")
    model, T = subject.model, subject.model.config.block_size
    val = token_bins.TokenBin(subject.data_dir / name, "val", meta, name)
    windows = batches.Dataset([val], min(T, val.tokens - 1), "sequential", 0, 0, [model.vocabulary.vocab_offsets[own]])
    count = min(windows.n_windows, a.max_windows or windows.n_windows)
    total = tokens = 0.0
    for first in tqdm(range(0, count, a.batch_size), desc=name, disable=not sys.stderr.isatty(), leave=False):
        batch = batches.to_batch(windows.gather(np.arange(first, min(first + a.batch_size, count))), pin=False).to(
            subject.device
        )
        losses = model(batch.idx, batch.targets)
        total, tokens = total + float(losses.sum()), tokens + losses.numel()
    told = {"val_loss": total / tokens, "perplexity": math.exp(total / tokens), "tokens": int(tokens)}
    return told | ({"bits_per_byte": total / tokens / math.log(2) * val.tokens / val.bytes} if val.bytes else {})


@torch.no_grad()
def loss_of_examples(subject: Subject, path: Path, a) -> dict[str, float]:
    """Over the completions of the examples in a file, their end tokens included. Raises UserError."""
    fields = [*subject.template.fields, subject.target] if subject.template else []
    rows = examples.read_example_rows(
        path,
        fields=[fields] if fields else OBJECTIVES["sft"].fields,
        needed_by="--objective=sft",
        parse_row=lambda row: answers.to_problem(row) if "question" in row else row,
    )
    rows = rows[: a.max_windows or len(rows)]
    coder = examples.ExampleEncoder(
        subject.tokenizer, subject.model.config.block_size, "drop", template=subject.template, prompt_offset=subject.first_row, target_field=subject.target, truncation_field=subject.truncated,
    )  # fmt: skip
    encoded, n_dropped = examples.encode_rows(rows, coder, "prompt_completion", str(path))
    total = tokens = 0.0
    for first in tqdm(
        range(0, len(encoded), a.batch_size), desc=str(path), disable=not sys.stderr.isatty(), leave=False
    ):
        some = encoded[first : first + a.batch_size]
        batch = examples.Collator()(some, range(len(some))).to(subject.device)
        total, tokens = (
            total - float(per_token_logps(subject.model, batch.tokens, batch.extras["loss_mask"]).sum()),
            tokens + int(batch.extras["loss_mask"].sum()),
        )
    told = {"val_loss": total / tokens, "perplexity": math.exp(total / tokens), "tokens": int(tokens)}
    return told | ({"left_out": n_dropped} if n_dropped else {})


def losses(subject: Subject, a) -> dict[str, dict[str, float]]:
    """Of each dataset; of a run on aligned contexts, which are read together, and of one on preferences or rewards only if asked. Raises UserError."""
    run, told = subject.run, {}
    own = (
        run is not None and run.training_mode != "multicontext" and run.objective in ("lm", "sft")
    )  # without its reference a loss of preferences means little
    for name in a.datasets or (run.folders if own else ()):
        folder, reads = subject.data_dir / name, run.data_format if run else "bins"
        token_bins.prepare_if_missing(folder, reads)
        told[name] = (
            loss_of_text(subject, name, a) if reads == "bins" else loss_of_examples(subject, folder / "val.jsonl", a)
        )
    if own and run.validation_file and not a.datasets:
        told[Path(run.validation_file).stem] = loss_of_examples(subject, Path(run.validation_file), a)
    return told


# ---------------------------------------------------------------------------------------------------------------------
# tasks


def problems_of(subject: Subject, task: str) -> list[dict]:
    """The problems of a dataset's val.jsonl, or of a file; for a soft prompt with the fields of its format. Raises UserError."""
    path = Path(task)
    if path.suffix != ".jsonl":
        token_bins.prepare_if_missing(subject.data_dir / task, "examples")
        path = subject.data_dir / task / "val.jsonl"
    if subject.template is not None:
        fields = [*subject.template.fields, "answer"]
        rows = examples.read_example_rows(path, [fields], needed_by="--tasks")
        return [
            {"prompt": " ".join(str(row[field]) for field in subject.template.fields)}
            | row
            | {"answer": str(row["answer"])}
            for row in rows
        ]
    return examples.read_example_rows(path, OBJECTIVES["grpo"].fields, "--tasks", answers.to_problem)


def judged(subject: Subject, task: str, a) -> dict:
    """What the answers to a task are worth; the proportions with an interval of 95 % over the problems."""
    problems = problems_of(subject, task)
    problems = problems[: a.max_problems or len(problems)]
    tokenizer, model = subject.tokenizer, subject.model
    coder = examples.ExampleEncoder(
        tokenizer, model.config.block_size, template=subject.template, prompt_offset=subject.first_row
    )
    prompts = [coder.encode_prompt(row) for row in problems]
    temperature, top_k, top_p = DECODE[a.decode]
    longest = a.max_new_tokens or (subject.run.max_new_tokens if subject.run and subject.run.objective != "lm" else 256)
    sampling = generation.SamplingParams(
        max_new_tokens=longest,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        n=a.num_passes,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
    )
    said: list[list[str]] = [[] for _ in problems]
    lengths, ended = [], 0
    fit = [
        number for number, ids in enumerate(prompts) if len(ids) < model.config.block_size
    ]  # the others can't be answered
    for first in tqdm(range(0, len(fit), a.batch_size), desc=task, disable=not sys.stderr.isatty(), leave=False):
        some = fit[first : first + a.batch_size]
        completions = generation.generate_batch(
            model,
            prompts=[prompts[number] for number in some],
            sampling=sampling,
            uniform=lambda number, token, first=first: rng.uniform(a.seed, first * a.num_passes + number, token),
        )
        for place, answer in enumerate(completions):
            said[some[place // a.num_passes]].append(tokenizer.decode(answer.ids[:-1] if answer.ended else answer.ids))
            lengths.append(len(answer.ids))
            ended += answer.ended
    n, passes = len(problems), a.num_passes
    right = [
        sum(answers.is_correct(words, row["answer"]) for words in some)
        for some, row in zip(said, problems, strict=True)
    ]

    def given(words: str, answer: str) -> str | None:
        """What a completion gives as its answer; where a text is asked for and none is marked, all of it."""
        return (
            answers.extract_answer(words)
            if answers.parse_number(answer) is not None
            else answers.marked_answer(words) or words
        )

    def mean(values: list[float]) -> dict[str, float]:
        middle = sum(values) / n
        return dict(zip(("value", "low", "high"), (middle, *accuracy.wilson_interval(sum(values), n)), strict=True))

    told = {
        "accuracy": mean([count / passes for count in right]),
        "partial": mean([sum(answers.partial_credit(words, row["answer"]) for words in some) / passes for some, row in zip(said, problems, strict=True)]),
        "format": mean([sum(rewards.format_score(words) == 1 for words in some) / passes for some, row in zip(said, problems, strict=True)]),
    }  # fmt: skip
    for k in (2**i for i in range(1, passes.bit_length())):
        told[f"pass@{k}"] = mean([accuracy.pass_at_k(passes, count, k) for count in right])
        told[f"majority@{k}"] = mean(
            [
                accuracy.majority_at_k([given(words, row["answer"]) for words in some], row["answer"], k)
                if some
                else 0.0
                for some, row in zip(said, problems, strict=True)
            ]
        )
    told |= {
        "n": n,
        "passes": passes,
        "mean_tokens": sum(lengths) / max(1, len(lengths)),
        "ended": ended / max(1, len(lengths)),
        "too_long_to_answer": n - len(fit),
    }
    return told | {
        "samples": [
            {"prompt": row["prompt"], "answer": row["answer"], "completion": some[0]}
            for some, row in zip(said[:5], problems[:5], strict=True)
            if some
        ]
    }


# ---------------------------------------------------------------------------------------------------------------------


def main(a) -> dict:
    """Prints and writes what was found. Raises UserError."""
    if not a.tasks and a.init_from != "resume" and not a.datasets:
        raise UserError("--tasks, --datasets: say what to evaluate on; there is no run that knows")
    subject = Subject(a)
    told = {
        "checkpoint": str(subject.folder or a.init_from), "decode": a.decode, "seed": a.seed, "dtype": str(subject.model.compute_dtype).removeprefix("torch."),
        "losses": losses(subject, a), "tasks": {task: judged(subject, task, a) for task in a.tasks},
    }  # fmt: skip
    print(told["checkpoint"])
    for name, values in told["losses"].items():
        print(
            f"  {name:20} "
            + "  ".join(
                f"{key} {value:,.4f}" if isinstance(value, float) else f"{key} {value:,}"
                for key, value in values.items()
            )
        )
    for name, values in told["tasks"].items():
        print(
            f"  {name:20} n {values['n']:,}, {values['passes']} answer{'s' * (values['passes'] > 1)} to each ({a.decode}), {values['mean_tokens']:.1f} tokens, {values['ended']:.1%} ended"
        )
        for key, value in values.items():
            if isinstance(value, dict):
                print(f"    {key:18} {value['value']:7.2%}   (95 %: {value['low']:.2%} to {value['high']:.2%})")
    path = Path(a.json or Path(a.out_dir) / "evaluation.json")
    files.write_json(path, told)
    print(path)
    return told


if __name__ == "__main__":
    configurator.run(main, ARGUMENTS)
