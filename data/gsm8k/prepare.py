"""GSM8K, school mathematics in words: 7,473 problems to train on, 1,319 to validate (its test set), as JSONL.

    python data/gsm8k/prepare.py [--input FOLDER | --input train.jsonl test.jsonl]

A row has the prompt, which asks for <reasoning>..</reasoning><answer>..</answer>, the worked solution in that format as completion,
and the answer. Text becomes tokens by the tokenizer of the weights that are trained.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from configurator import arg
from nanoforge.data import tables, token_bins
from nanoforge.errors import UserError
from nanoforge.files import download
from nanoforge.posttraining.answers import to_problem

URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
NAMES = {"train": "train.jsonl", "val": "test.jsonl"}  # GSM8K's own


@dataclass(frozen=True, kw_only=True)
class PrepareArgs:
    """prepare"""

    input: tuple[str, ...] = arg(
        (),
        "the folder with GSM8K's own train.jsonl and test.jsonl, or these two files; none: they are downloaded",
        split=False,
    )
    out_dir: str = arg(str(Path(__file__).parent), "folder to write to")


def sources(inputs: tuple[str, ...], folder: Path) -> dict[str, Path]:
    """The file of each split. Raises UserError."""
    if not inputs:
        return {split: download(URL + name, folder / f"input_{name}") for split, name in NAMES.items()}
    given = [path for path in map(Path, inputs) if not path.is_dir()]
    given += [path / name for path in map(Path, inputs) if path.is_dir() for name in NAMES.values()]
    found = {path.name: path for path in given if path.is_file()}
    for path in given:
        if path.name not in found or path.name not in NAMES.values():
            raise UserError(f"--input: {path} is not there, or is neither of GSM8K's {' and '.join(NAMES.values())}")
    if missing := [name for name in NAMES.values() if name not in found]:
        raise UserError(
            f"--input: {' and '.join(missing)} of GSM8K is missing too; give the folder that holds both, or both files"
        )
    return {split: found[name] for split, name in NAMES.items()}


def rows(files: dict[str, Path]) -> Iterator[tuple[str, dict]]:
    for split, path in files.items():
        for problem in tables.read_rows(path, to_problem):
            yield split, problem


def main(a) -> None:
    folder = Path(a.out_dir)
    tables.write_splits(folder, rows(sources(a.input, folder)), token_bins.SPLITS)


if __name__ == "__main__":
    configurator.run(main, configurator.parse(PrepareArgs, sys.argv[1:], __doc__))
