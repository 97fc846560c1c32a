"""Tasks on short words, as JSONL: a synthetic text-to-text dataset whose answers can be checked.

train.jsonl and val.jsonl name the task: {"prompt": "reverse:abcd>", "completion": "dcba"}; the tasks are copy, reverse,
upper and double. hidden_train.jsonl and hidden_val.jsonl do not name it: {"word": "abcd", "answer": "dcba"}, always the
task of --hidden. No word is both in train and in val.

    python data/strings/prepare.py
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from configurator import arg, arg_table
from nanoforge.data import token_bins
from nanoforge.data.tables import Row, write_splits
from nanoforge.data.tokenization import CharTokenizer
from nanoforge.rng import hash_u64

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MIN_LETTERS = 2


def copy(word: str) -> str:
    return word


def reverse(word: str) -> str:
    return word[::-1]


def upper(word: str) -> str:
    return word.upper()


def double(word: str) -> str:
    """aabbcc of abc."""
    return "".join(letter * 2 for letter in word)


TASKS: dict[str, Callable[[str], str]] = {"copy": copy, "reverse": reverse, "upper": upper, "double": double}


@arg_table
class PrepareArgs:
    """prepare"""

    words: int = arg(20_000, "number of words, of which about a tenth is for validation", low=20)
    longest: int = arg(6, "letters of the longest words; the shortest have two", low=2, high=20)
    hidden: str = arg("reverse", "task that hidden_*.jsonl does not name", choices=tuple(TASKS))
    seed: int = arg(0, "random seed of the words", low=0)
    out_dir: str = arg(str(Path(__file__).resolve().parent), "folder to write to", path=True)
    overwrite: bool = arg(False, "replace a dataset that is there already")


def hash_below(n: int, *key: int) -> int:
    """A hash of the key in [0, n)."""
    return int(hash_u64(*key) % np.uint64(n))


def iter_words(n_words: int, max_letters: int, seed: int) -> Iterator[tuple[str, str]]:
    """Different words as (split, word); the split follows from the word alone."""
    n_possible = sum(26**length for length in range(MIN_LETTERS, max_letters + 1))
    n_words = min(n_words, n_possible // 2)  # so that new ones are found soon
    seen: set[str] = set()
    number = 0
    while len(seen) < n_words:
        number += 1
        length = MIN_LETTERS + hash_below(max_letters - 1, seed, 0, number)
        word = "".join(LETTERS[hash_below(26, seed, 1, number, position)] for position in range(length))
        if word not in seen:
            seen.add(word)
            is_val = hash_below(10, seed, 2, *map(ord, word)) == 0
            yield "val" if is_val else "train", word


def main(args: PrepareArgs) -> None:
    folder = Path(args.out_dir)
    token_bins.refuse_existing(folder, "train.*", overwrite=args.overwrite)
    words = list(iter_words(args.words, args.longest, args.seed))
    write_splits(folder, iter_named(words), token_bins.SPLITS)
    hidden_splits = [f"hidden_{split}" for split in token_bins.SPLITS]
    write_splits(folder, iter_hidden(words, TASKS[args.hidden]), hidden_splits)
    tokenizer = CharTokenizer(LETTERS + LETTERS.upper() + ":>", has_eos=True)
    token_bins.write_meta(folder, tokenizer, {})


def iter_named(words: list[tuple[str, str]]) -> Iterator[tuple[str, Row]]:
    """Every task on every word, as (split, row)."""
    for split, word in words:
        for name, task in TASKS.items():
            yield split, {"prompt": f"{name}:{word}>", "completion": task(word), "answer": task(word)}


def iter_hidden(words: list[tuple[str, str]], task: Callable[[str], str]) -> Iterator[tuple[str, Row]]:
    """One task on every word, not named, as (split, row)."""
    for split, word in words:
        yield f"hidden_{split}", {"word": word, "answer": task(word)}


if __name__ == "__main__":
    configurator.run(main, configurator.parse(PrepareArgs, sys.argv[1:], __doc__))
