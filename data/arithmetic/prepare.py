"""Sums of two numbers, such as 17+58=75, a line each, by characters: a synthetic dataset whose answers can be checked.

All pairs of numbers below 10^digits in a shuffled order; every tenth sum is for validation. The bins hold the lines,
the JSONL files the same sums as prompt, completion and answer. With --kind=preferences there is JSONL alone, in a
folder of its own: right answers against those that are off by one.

    python data/arithmetic/prepare.py
    python data/arithmetic/prepare.py --kind=preferences --out_dir=data/arithmetic_dpo               pairs, for DPO
    python data/arithmetic/prepare.py --kind=preferences --out_dir=data/arithmetic_kto --unpaired=8  labels, for KTO
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from configurator import Rules, arg, arg_table, with_value
from nanoforge.data import corpus, tables, token_bins
from nanoforge.data.documents import TextChunk
from nanoforge.data.tables import Row
from nanoforge.data.token_bins import SPLITS
from nanoforge.data.tokenization import CharTokenizer
from nanoforge.rng import hash_u64, permute

FOLDER = Path(__file__).resolve().parent
CHARS = "\n+0123456789="
SUMS_PER_CHUNK = 1000


@arg_table
class PrepareArgs:
    """prepare"""

    digits: int = arg(2, "digits of the largest number", low=1, high=4)
    sums: int = arg(200_000, "maximum number of sums", low=20)
    seed: int = arg(0, "random seed of the order, and of the direction of wrong answers", low=0)
    kind: str = arg(
        "sums",
        "sums: bins, and problems with their answers; preferences: right answers and wrong ones",
        choices=("sums", "preferences"),
    )
    unpaired: int = arg(
        0,
        "labelled rows instead of pairs: wrong answers per right answer, each of another sum (0: pairs)",
        low=0,
        needs=with_value("kind", "preferences"),
    )
    out_dir: str = arg(str(FOLDER), "folder to write to", path=True)
    overwrite: bool = arg(False, "replace a dataset that is there already")


def check(args: PrepareArgs, source: dict[str, str]) -> Iterator[str]:
    """Preferences must not replace the sums of this folder."""
    if args.kind == "preferences" and Path(args.out_dir).resolve() == FOLDER:
        yield "--out_dir: --kind=preferences needs a folder of its own; this one is for the sums"


class Sum(NamedTuple):
    """One sum, and its split."""

    number: int
    split: str
    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> int:
        return self.a + self.b


def iter_sums(digits: int, max_sums: int, seed: int) -> Iterator[list[Sum]]:
    """The sums in their order, SUMS_PER_CHUNK at a time."""
    n_pairs = 100**digits
    order = permute(np.arange(min(n_pairs, max_sums)), n_pairs, seed)
    for start in range(0, len(order), SUMS_PER_CHUNK):
        chunk = []
        for number, pair in enumerate(order[start : start + SUMS_PER_CHUNK].tolist(), start=start):
            a, b = divmod(pair, 10**digits)
            chunk.append(Sum(number, "val" if number % 10 == 9 else "train", a, b))
        yield chunk


def iter_text(digits: int, max_sums: int, seed: int) -> Iterator[TextChunk]:
    """The lines of the sums: a chunk of each split for every chunk of sums."""
    for sums in iter_sums(digits, max_sums, seed):
        for split in SPLITS:
            lines = [f"{item.prompt}{item.answer}\n" for item in sums if item.split == split]
            yield TextChunk(split, "".join(lines))


def iter_problems(digits: int, max_sums: int, seed: int) -> Iterator[tuple[str, Row]]:
    """The sums as (split, row)."""
    for sums in iter_sums(digits, max_sums, seed):
        for item in sums:
            answer = str(item.answer)
            yield item.split, {"prompt": item.prompt, "completion": answer, "answer": answer}


def iter_pairs(digits: int, max_sums: int, seed: int) -> Iterator[tuple[str, Row]]:
    """The sums as (split, row) of a chosen answer, the right one, and a rejected one, off by one."""
    for item, wrong in iter_wrong_answers(digits, max_sums, seed):
        yield item.split, {"prompt": item.prompt, "chosen": str(item.answer), "rejected": str(wrong)}


def iter_labelled(digits: int, max_sums: int, seed: int, n_wrong: int) -> Iterator[tuple[str, Row]]:
    """The sums as (split, row) of an answer and its label: in each split one right answer, then n_wrong wrong ones."""
    seen = dict.fromkeys(SPLITS, 0)
    for item, wrong in iter_wrong_answers(digits, max_sums, seed):
        label = seen[item.split] % (n_wrong + 1) == 0
        seen[item.split] += 1
        answer = item.answer if label else wrong
        yield item.split, {"prompt": item.prompt, "completion": str(answer), "label": label}


def iter_wrong_answers(digits: int, max_sums: int, seed: int) -> Iterator[tuple[Sum, int]]:
    """Each sum with an answer that is one too large or too small, by a hash; never below 0, as there is no minus."""
    for sums in iter_sums(digits, max_sums, seed):
        numbers = np.array([item.number for item in sums])
        is_larger = hash_u64(seed, numbers) % 2 == 1
        for item, larger in zip(sums, is_larger.tolist(), strict=True):
            offset = 1 if larger or item.answer == 0 else -1
            yield item, item.answer + offset


def main(args: PrepareArgs) -> None:
    folder = Path(args.out_dir)
    token_bins.refuse_existing(folder, "train.*", overwrite=args.overwrite)
    if args.kind == "sums":
        tokenizer = CharTokenizer(CHARS, has_eos=True)
        corpus.write_dataset(folder, lambda: iter_text(args.digits, args.sums, args.seed), tokenizer)
        rows = iter_problems(args.digits, args.sums, args.seed)
    elif args.unpaired:
        rows = iter_labelled(args.digits, args.sums, args.seed, args.unpaired)
    else:
        rows = iter_pairs(args.digits, args.sums, args.seed)
    tables.write_splits(folder, rows, SPLITS)


if __name__ == "__main__":
    configurator.run(main, configurator.parse(PrepareArgs, sys.argv[1:], __doc__, Rules(check=check)))
