"""Texts that a model continues: the only one, or those of aligned contexts, printed below each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanoforge.data.tokenization import Tokenizer


@dataclass(frozen=True)
class ContextText:
    """A text to continue: the only one, or that of a context."""

    name: str  # of its vocabulary
    tokenizer: Tokenizer
    offset: int  # of its vocabulary in the model
    prompt: np.ndarray  # (T,)

    def local_ids(self, ids: np.ndarray) -> list[int]:
        """The tokenizer's ids from the model's, (T,), without the one that begins a text."""
        local: list[int] = (ids - self.offset).tolist()
        begins = self.tokenizer.bos_id is not None and local[:1] == [self.tokenizer.bos_id]
        return local[1:] if begins else local

    def spell(self, token_id: int) -> str:
        """The text of one of the model's ids."""
        return self.tokenizer.decode_continuation([token_id - self.offset])


def format_sample(streams: Sequence[ContextText], sample: np.ndarray) -> str:
    """A sample as text; sample: (K, T)."""
    if len(streams) == 1:
        return streams[0].tokenizer.decode(streams[0].local_ids(sample[0]))
    tokens = []
    for stream, ids in zip(streams, sample, strict=True):
        first, *rest = stream.local_ids(ids)
        decode = stream.tokenizer.decode_continuation
        tokens.append([stream.tokenizer.decode([first]), *(decode([token]) for token in rest)])
    return align_contexts([stream.name for stream in streams], tokens)


def align_contexts(names: list[str], tokens: list[list[str]]) -> str:
    """The contexts' tokens, (K, T), below each other. A line ends where a token of the first context ends one."""
    lines: list[list[str]] = []
    line = [""] * len(names)  # of each context
    for column in zip(*tokens, strict=True):
        width = max(len(token.strip("\n")) for token in column)
        line = [text + token.replace("\n", "").ljust(width) for text, token in zip(line, column, strict=True)]
        if "\n" in column[0]:
            lines.append(line)
            line = [""] * len(names)
    lines.append(line)
    name_width = max(map(len, names))
    return "\n".join(f"{name:{name_width}} | {text}" for line in lines for name, text in zip(names, line, strict=True))
