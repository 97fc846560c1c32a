"""Sums of two numbers, such as 17+58=75, a line each, by characters: a synthetic dataset whose answers can be checked.

All pairs of numbers below 10^digits in a shuffled order; every tenth sum is held out for validation.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from configurator import Row
from parts import corpus
from parts.batches import permute
from parts.corpus import Piece
from parts.text import CharTokenizer

TABLE = {
    "prepare": [
        Row("digits", 2, "of the largest number", low=1, high=4),
        Row("sums", 200_000, "at most so many", low=20),
        Row("seed", 0, "of the order", low=0),
        Row("out_dir", str(Path(__file__).parent), "folder to write to"),
    ]
}


def sums(digits: int, count: int, seed: int) -> Iterator[Piece]:
    """The sums, a thousand lines a piece."""
    pairs = 100**digits
    order = permute(np.arange(min(pairs, count)), pairs, seed)
    for first in range(0, len(order), 1000):
        lines = {"train": [], "val": []}
        for number, pair in enumerate(order[first : first + 1000].tolist(), start=first):
            a, b = divmod(pair, 10**digits)
            lines["val" if number % 10 == 9 else "train"].append(f"{a}+{b}={a + b}\n")
        yield from (Piece(split, "".join(some)) for split, some in lines.items())


def main(a) -> None:
    corpus.write_dataset(Path(a.out_dir), lambda: sums(a.digits, a.sums, a.seed), CharTokenizer("\n+0123456789="))


if __name__ == "__main__":
    configurator.run(main, configurator.parse(TABLE, sys.argv[1:], __doc__))
