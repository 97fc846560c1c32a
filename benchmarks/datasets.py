"""Datasets of random tokens, of GPT-2's vocabulary, for benchmarks that need no text."""

from pathlib import Path

import numpy as np

from nanoforge.data import token_bins
from nanoforge.data.tokenization import NumberTokenizer

VOCAB_SIZE = 50257
CHUNK_TOKENS = 10**7
VAL_TOKENS = 10**5


def random_tokens(generator: np.random.Generator, n: int) -> np.ndarray:
    return generator.integers(0, VOCAB_SIZE, n, dtype=np.uint16)


def write_random_dataset(folder: Path, train_tokens: int) -> None:
    """A dataset of random tokens, written in chunks."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, n_tokens in (("train.bin", train_tokens), ("val.bin", VAL_TOKENS)):
        with (folder / name).open("wb") as file:
            for start in range(0, n_tokens, CHUNK_TOKENS):
                random_tokens(generator, min(CHUNK_TOKENS, n_tokens - start)).tofile(file)
    token_bins.write_meta(folder, NumberTokenizer(VOCAB_SIZE), {})
