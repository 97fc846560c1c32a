"""GSM8K, school mathematics in words: 7,473 problems to train on, 1,319 to validate (its test set), as JSONL.

    python data/gsm8k/prepare.py [--chat] [--input FOLDER | --input train.jsonl test.jsonl]

A row has the prompt, which asks for <reasoning>..</reasoning><answer>..</answer>, the worked solution in that format as
completion, and the answer. With --chat, prompt and completion are messages, for models with a chat template. Text
becomes tokens by the tokenizer of the weights that are trained.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from configurator import arg, arg_table
from nanoforge.data import token_bins
from nanoforge.data.tables import Row, read_rows, write_splits
from nanoforge.errors import UserError
from nanoforge.files import download
from nanoforge.posttraining.answers import to_problem
from nanoforge.posttraining.example_rows import as_messages

URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
FILES = {"train": "train.jsonl", "val": "test.jsonl"}  # split -> GSM8K's own name


@arg_table
class PrepareArgs:
    """prepare"""

    input: tuple[str, ...] = arg(
        (),
        "folder with GSM8K's own train.jsonl and test.jsonl, or these two files (default: downloads them)",
        split=False,
        path=True,
    )
    chat: bool = arg(False, "write prompts and completions as messages of a user and an assistant, for chat models")
    out_dir: str = arg(str(Path(__file__).parent), "folder to write to", path=True)
    overwrite: bool = arg(False, "replace a dataset that is there already")


def find_files(inputs: Sequence[str], out_dir: Path) -> dict[str, Path]:
    """The file of each split, by --input or downloaded. Raises UserError."""
    if not inputs:
        return {split: download(URL + name, out_dir / f"input_{name}") for split, name in FILES.items()}
    found = {}
    for path in expand_folders(inputs):
        if path.name not in FILES.values() or not path.is_file():
            names = " and ".join(FILES.values())
            raise UserError(f"--input: {path} does not exist, or is neither of GSM8K's {names}")
        found[path.name] = path
    missing = [name for name in FILES.values() if name not in found]
    if missing:
        names = " and ".join(missing)
        raise UserError(f"--input: GSM8K's {names} is missing; give the folder that holds both files, or both files")
    return {split: found[name] for split, name in FILES.items()}


def expand_folders(inputs: Sequence[str]) -> list[Path]:
    """Paths of files; a folder stands for both files in it."""
    paths = []
    for path in map(Path, inputs):
        if path.is_dir():
            paths += [path / name for name in FILES.values()]
        else:
            paths.append(path)
    return paths


def iter_problems(files: dict[str, Path], *, chat: bool) -> Iterator[tuple[str, Row]]:
    """(split, row) for every problem. Raises UserError."""
    for split, path in files.items():
        for problem in read_rows(path, to_problem):
            yield split, to_chat(problem) if chat else problem


def to_chat(problem: Row) -> Row:
    """The problem with its prompt and completion as messages."""
    prompt = as_messages(problem["prompt"].rstrip(), "user")
    return {**problem, "prompt": prompt, "completion": as_messages(problem["completion"], "assistant")}


def main(args: PrepareArgs) -> None:
    out_dir = Path(args.out_dir)
    token_bins.refuse_existing(out_dir, "train.*", overwrite=args.overwrite)
    files = find_files(args.input, out_dir)
    write_splits(out_dir, iter_problems(files, chat=args.chat), splits=tuple(FILES))


if __name__ == "__main__":
    configurator.run(main, configurator.parse(PrepareArgs, sys.argv[1:], __doc__))
