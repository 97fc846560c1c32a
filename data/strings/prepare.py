"""Tasks on short words, as JSONL: a synthetic text-to-text dataset whose answers can be checked.

train.jsonl, val.jsonl name the task: {"prompt": "reverse:abcd>", "completion": "dcba"}; the tasks are copy, reverse, upper and double.
hidden_train.jsonl, hidden_val.jsonl do not: {"word": "abcd", "answer": "dcba"}, always the one of --hidden. No word is both in train and val.

    python data/strings/prepare.py
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from configurator import arg
from nanoforge.data import tables, token_bins
from nanoforge.data.tokenization import CharTokenizer
from nanoforge.rng import hash_u64

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TASKS = {
    "copy": lambda word: word,
    "reverse": lambda word: word[::-1],
    "upper": str.upper,
    "double": lambda word: "".join(letter * 2 for letter in word),
}


@dataclass(frozen=True, kw_only=True)
class PrepareArgs:
    """prepare"""

    words: int = arg(20_000, "words, of which every tenth is for validation", low=20)
    longest: int = arg(6, "letters of the longest word; the shortest has two", low=2, high=20)
    hidden: str = arg("reverse", "the task that is not named", choices=tuple(TASKS))
    seed: int = arg(0, "of the words", low=0)
    out_dir: str = arg(str(Path(__file__).resolve().parent), "folder to write to")


def words(count: int, longest: int, seed: int) -> Iterator[tuple[str, str]]:
    """Different words, with their splits, which follow from the word alone."""
    seen, number = set(), 0
    room = sum(26**length for length in range(2, longest + 1))
    while len(seen) < min(count, room // 2):
        number += 1
        length = 2 + int(hash_u64(seed, 0, number) % np.uint64(longest - 1))
        word = "".join(LETTERS[int(hash_u64(seed, 1, number, place) % np.uint64(26))] for place in range(length))
        if word not in seen:
            seen.add(word)
            yield ("val" if int(hash_u64(seed, 2, *map(ord, word)) % np.uint64(10)) == 0 else "train"), word


def main(a) -> None:
    folder, some = Path(a.out_dir), list(words(a.words, a.longest, a.seed))
    named = (
        (split, {"prompt": f"{name}:{word}>", "completion": task(word), "answer": task(word)})
        for split, word in some
        for name, task in TASKS.items()
    )
    tables.write_splits(folder, named, token_bins.SPLITS)
    tables.write_splits(
        folder,
        ((f"hidden_{split}", {"word": word, "answer": TASKS[a.hidden](word)}) for split, word in some),
        [f"hidden_{split}" for split in token_bins.SPLITS],
    )
    token_bins.write_meta(folder, CharTokenizer(LETTERS + LETTERS.upper() + ":>", has_eos=True), {})


if __name__ == "__main__":
    configurator.run(main, configurator.parse(PrepareArgs, sys.argv[1:], __doc__))
