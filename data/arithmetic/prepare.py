"""Sums of two numbers, such as 17+58=75, a line each, by characters: a synthetic dataset whose answers can be checked.

All pairs of numbers below 10^digits in a shuffled order; every tenth sum is held out for validation. The bins hold the lines, the
JSONL files the same sums as prompt, completion and answer. With --kind=preferences there is JSONL alone, in a folder of its own:
right answers against those that are off by one.

    python data/arithmetic/prepare.py
    python data/arithmetic/prepare.py --kind=preferences --out_dir=data/arithmetic_dpo               chosen and rejected, for DPO
    python data/arithmetic/prepare.py --kind=preferences --out_dir=data/arithmetic_kto --unpaired=8  labels, for KTO
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from configurator import OnlyWith, Rules, arg
from nanoforge.data import corpus, tables, token_bins
from nanoforge.data.corpus import TextChunk
from nanoforge.data.tokenization import CharTokenizer
from nanoforge.rng import hash_u64, permute

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class PrepareArgs:
    """prepare"""

    digits: int = arg(2, "of the largest number", low=1, high=4)
    sums: int = arg(200_000, "at most so many", low=20)
    seed: int = arg(0, "of the order, and of what is wrong by one more or one less", low=0)
    kind: str = arg(
        "sums",
        "sums: bins, and problems with their answers; preferences: right answers and wrong ones",
        choices=("sums", "preferences"),
    )
    unpaired: int = arg(
        0,
        "rows with a label instead of pairs: so many wrong answers to a right one, each of another sum; 0: pairs",
        low=0,
        needs=OnlyWith("--kind=preferences", lambda a: a.kind == "preferences"),
    )
    out_dir: str = arg(str(HERE), "folder to write to")


def check(a, source: dict[str, str]) -> list[str]:
    taken = a.kind == "preferences" and Path(a.out_dir).resolve() == HERE
    return ["--out_dir: --kind=preferences needs a folder of its own; this one is for the sums"] if taken else []


def numbers(digits: int, count: int, seed: int) -> Iterator[list[tuple[int, str, int, int]]]:
    """The sums as (number, split, a, b), a thousand at once."""
    pairs = 100**digits
    order = permute(np.arange(min(pairs, count)), pairs, seed)
    for first in range(0, len(order), 1000):
        yield [
            (number, "val" if number % 10 == 9 else "train", *divmod(pair, 10**digits))
            for number, pair in enumerate(order[first : first + 1000].tolist(), start=first)
        ]


def sums(digits: int, count: int, seed: int) -> Iterator[TextChunk]:
    """The sums' lines, a thousand a piece."""
    for group in numbers(digits, count, seed):
        lines = {"train": [], "val": []}
        for _, split, a, b in group:
            lines[split].append(f"{a}+{b}={a + b}\n")
        yield from (TextChunk(split, "".join(some)) for split, some in lines.items())


def problems(digits: int, count: int, seed: int) -> Iterator[tuple[str, dict]]:
    """The same sums as (split, row)."""
    for group in numbers(digits, count, seed):
        for _, split, a, b in group:
            yield split, {"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)}


def preferences(digits: int, count: int, seed: int, unpaired: int) -> Iterator[tuple[str, dict]]:
    """The same sums as (split, row): the right answer and one off by one, up or down by a hash; or, unpaired, one of the two, the first
    right and the next `unpaired` wrong."""
    seen = {"train": 0, "val": 0}
    for group in numbers(digits, count, seed):
        ups = hash_u64(seed, np.array([number for number, *_ in group])) % 2
        for (_, split, a, b), up in zip(group, ups.tolist(), strict=True):
            wrong = a + b + (1 if up or a + b == 0 else -1)  # never below 0: there is no minus among the characters
            if unpaired:
                label = seen[split] % (unpaired + 1) == 0
                yield split, {"prompt": f"{a}+{b}=", "completion": str(a + b if label else wrong), "label": label}
            else:
                yield split, {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(wrong)}
            seen[split] += 1


def main(a) -> None:
    folder = Path(a.out_dir)
    if a.kind == "preferences":
        tables.write_splits(folder, preferences(a.digits, a.sums, a.seed, a.unpaired), token_bins.SPLITS)
        return
    corpus.write_dataset(folder, lambda: sums(a.digits, a.sums, a.seed), CharTokenizer("\n+0123456789=", has_eos=True))
    tables.write_splits(folder, problems(a.digits, a.sums, a.seed), token_bins.SPLITS)


if __name__ == "__main__":
    configurator.run(main, configurator.parse(PrepareArgs, sys.argv[1:], __doc__, Rules(check=check)))
