"""Problems of reasoning-gym, whose tasks are generated and graded by programs, as JSONL (pip install reasoning-gym).

    python data/reasoning_gym/prepare.py --task=basic_arithmetic,spell_backward
    python data/reasoning_gym/prepare.py --task=chain_sum --config='{"chain_sum": {"max_terms": 3}}' --chat
    python train.py --objective=grpo --dataset=reasoning_gym --reward=reasoning_gym --init_from=MODEL

A row has the prompt, which asks for <answer>..</answer>, the right answer in these tags as completion, the answer, and
what the task's scorer needs: task, config, metadata. A task may have no such answer; then its rows have prompts alone.
No problem is both in train and in val. The package's tasks: https://github.com/open-thought/reasoning-gym.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from configurator import Rules, arg, arg_table
from nanoforge.data import token_bins
from nanoforge.data.tables import Row, write_splits
from nanoforge.errors import UserError
from nanoforge.posttraining import package_rewards
from nanoforge.posttraining.example_rows import as_messages

INSTRUCTION = "Write the final answer alone between <answer> and </answer>."
TRIES = 3  # problems that are generated for each one that is kept: small tasks repeat themselves


@arg_table
class PrepareArgs:
    """prepare"""

    task: tuple[str, ...] = arg(("basic_arithmetic",), "tasks of reasoning-gym, in equal numbers")
    config: dict[str, Any] = arg({}, 'settings of tasks as JSON, such as {"chain_sum": {"max_terms": 3}}')
    rows: int = arg(5000, "number of problems for training", low=1)
    val_rows: int = arg(500, "number of problems for validation", low=1)
    seed: int = arg(0, "random seed of the problems", low=0)
    instruction: str = arg(INSTRUCTION, "last line of each prompt; without one, completions are plain answers")
    chat: bool = arg(False, "write prompts and completions as messages of a user and an assistant, for chat models")
    out_dir: str = arg(str(Path(__file__).parent), "folder to write to", path=True)
    overwrite: bool = arg(False, "replace a dataset that is there already")


def check(args: PrepareArgs, source: dict[str, str]) -> Iterator[str]:
    """Errors of tasks and their settings."""
    if len({*args.task}) < len(args.task):
        yield f"--task={' '.join(args.task)}: has a task twice"
    if len(args.task) > min(args.rows, args.val_rows):
        yield f"--rows, --val_rows: must be at least the number of tasks, {len(args.task)}"
    for name, config in args.config.items():
        if name not in args.task or not isinstance(config, dict) or {"seed", "size"} & {*config}:
            yield f"--config: {name} must be one of --task, with an object of its settings (not seed or size)"


def share(total: int, number: int, parts: int) -> int:
    """The size of one of several nearly equal parts."""
    return total // parts + (number < total % parts)


def iter_entries(task: str, config: dict[str, Any], seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Different problems of a task, at most `count`. Raises UserError for one that can't be kept in a file."""
    problems = package_rewards.create_task(task, **config, seed=seed, size=TRIES * count)
    scorer = package_rewards.create_task(task, **config)
    random.seed(seed)  # a few tasks draw from the global generator
    seen: set[str] = set()
    for i in range(TRIES * count):
        entry = problems[i]
        if entry["question"] in seen:
            continue
        seen.add(entry["question"])
        try:
            read_back = json.loads(json.dumps(entry))
        except (TypeError, ValueError) as error:
            raise UserError(f"--task: {task} has problems that JSON can't hold ({error}); leave it out") from None
        if problems.score_answer(entry["answer"], entry) != scorer.score_answer(entry["answer"], read_back):
            raise UserError(f"--task: {task} grades otherwise what was written to a file; leave it out")
        yield entry
        if len(seen) == count:
            return


def to_row(args: PrepareArgs, task: str, entry: dict[str, Any]) -> Row:
    """A problem as a row."""
    prompt = f"{entry['question'].rstrip()}\n{args.instruction}".rstrip()
    answer = entry["answer"]
    row: Row = {"prompt": as_messages(prompt, "user") if args.chat else f"{prompt}\n"}
    if answer:
        completion = f"<answer>{answer}</answer>" if args.instruction else str(answer)
        row["completion"] = as_messages(completion, "assistant") if args.chat else completion
        row["answer"] = answer
    return row | {"task": task, "config": args.config.get(task, {}), "metadata": entry["metadata"]}


def iter_rows(args: PrepareArgs) -> Iterator[tuple[str, Row]]:
    """(split, row) of the tasks in turn; the first problems of each are for validation. Raises UserError."""
    streams = []
    for number, task in enumerate(args.task):
        n_val = share(args.val_rows, number, len(args.task))
        count = n_val + share(args.rows, number, len(args.task))
        entries = list(iter_entries(task, args.config.get(task, {}), args.seed, count))
        if len(entries) <= n_val:
            raise UserError(f"--task: {task} has {len(entries)} different problems; lower --val_rows")
        if len(entries) < count:
            print(f"{task}: {len(entries):,} different problems among {TRIES * count:,}, instead of {count:,}")
        streams.append(
            [("val" if i < n_val else "train", to_row(args, task, entry)) for i, entry in enumerate(entries)]
        )
    for i in range(max(map(len, streams))):
        yield from (stream[i] for stream in streams if i < len(stream))


def main(args: PrepareArgs) -> None:
    folder = Path(args.out_dir)
    token_bins.refuse_existing(folder, "train.*", overwrite=args.overwrite)
    write_splits(folder, iter_rows(args), token_bins.SPLITS)


if __name__ == "__main__":
    configurator.run(main, configurator.parse(PrepareArgs, sys.argv[1:], __doc__, Rules(check=check)))
