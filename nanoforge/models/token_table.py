"""The tokens of a completion with their probabilities, one a line: what --logprobs prints.

" Paris"  0.9312   " Paris" 0.9312   " the" 0.0211   " a" 0.0104

Probabilities are the model's own: of temperature 1, before a penalty or a filter.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanoforge.console import paint

GREEN, YELLOW, RED = 32, 33, 31
LIKELY, POSSIBLE = 0.5, 0.1  # probabilities from which on a token is green and yellow

Spell = Callable[[int], str]  # a token's id -> its text


def format_tokens(
    ids: Sequence[Any], logprobs: Sequence[Any], top_logprobs: Sequence[Any], contexts: Mapping[str, Spell]
) -> str:
    """A line for each token of each context; with several, its context's name first.

    ids, logprobs, top_logprobs: of a request. contexts: name -> how its tokens are spelled.
    """
    rows = []
    for token_ids, token_logprobs, top in zip(ids, logprobs, top_logprobs, strict=True):
        by_context = [(token_ids, token_logprobs, top)]
        if len(contexts) > 1:
            by_context = list(zip(token_ids, token_logprobs, top, strict=True))
        for (name, spell), (token_id, logprob, others) in zip(contexts.items(), by_context, strict=True):
            alternatives = [f"{quote(spell(other))} {math.exp(value):.4f}" for other, value in others]
            rows.append((name, quote(spell(token_id)), math.exp(logprob), alternatives))
    name_width = max((len(name) for name, *_ in rows), default=0) if len(contexts) > 1 else 0
    width = max((len(text) for _, text, *_ in rows), default=0)
    lines = []
    for name, text, probability, alternatives in rows:
        start = f"{name:{name_width}} | " if name_width else ""
        colored = paint(f"{text:{width}}  {probability:.4f}", color_of(probability))
        lines.append("   ".join((start + colored, *alternatives)).rstrip())
    return "\n".join(lines)


def quote(text: str) -> str:
    """A token's text on one line, its spaces visible."""
    return json.dumps(text, ensure_ascii=False)


def color_of(probability: float) -> int:
    if probability >= LIKELY:
        return GREEN
    return YELLOW if probability >= POSSIBLE else RED
