"""Log-likelihoods: how probable a model finds given continuations of given contexts.

    pairs = [encode_pair(tokenizer, "The sky is", choice) for choice in (" blue", " green")]
    blue, green = score_continuations(model, pairs, batch_size=64)

What sequences of a batch have in common at their beginnings (the question before its choices, the examples before the
question) is read once, and the KV cache serves them all. Knows nothing of tasks, rows or metrics.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nanoforge.data.tokenization import Tokenizer
from nanoforge.device import varying_shapes
from nanoforge.errors import UserError
from nanoforge.models.generation import KVCache, cut_context, device_of

# ---------------------------------------------------------------------------------------------------------------------
# texts to ids


class Pair(NamedTuple):
    """A context, of one token at least, and what may follow it, also of one at least."""

    context: Sequence[int]
    continuation: Sequence[int]


def encode_sequence(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that begins a sequence."""
    return begin_sequence(tokenizer, tokenizer.encode(text).tolist())


def begin_sequence(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids with the tokenizer's beginning-of-sequence token, if it puts one and they don't have it."""
    if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id]:
        return ids
    return [tokenizer.bos_id, *ids]


def prefix_id(tokenizer: Tokenizer) -> int:
    """The token that stands before a text without a context, as in lm-eval: the beginning-of-sequence token, also where
    the tokenizer does not add it itself, otherwise the end-of-sequence token. Raises UserError."""
    bos_id = tokenizer.control_tokens.get(tokenizer.special_tokens.get("bos_token", ""), tokenizer.bos_id)
    token_id = tokenizer.eos_id if bos_id is None else bos_id
    if token_id is None:
        raise UserError(
            "a text without a context needs a token before it, and the model's tokenizer has no end-of-sequence "
            "token; use a model whose tokenizer has one"
        )
    return token_id


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, encode: Callable[[str], list[int]] | None = None
) -> Pair:
    """The ids of two texts as lm-eval makes them. Raises UserError.

    Both are encoded as one text, so that spaces at the end of the context join the continuation; the context then has
    the ids that it has alone. encode: of a text that begins a sequence, if not encode_sequence.
    """
    encode = encode or partial(encode_sequence, tokenizer)
    whole = encode(context + continuation)
    context = context.rstrip()
    if context:
        context_ids = encode(context)
        return Pair(context_ids, whole[len(context_ids) :])
    first_id = prefix_id(tokenizer)
    return Pair([first_id], whole[1:] if whole[:1] == [first_id] else whole)


# ---------------------------------------------------------------------------------------------------------------------
# ids to log-likelihoods

MAX_LOGITS = 2**28  # at a time: a gigabyte of float32


class Score(NamedTuple):
    """What a model makes of a continuation."""

    logp: float  # summed over its tokens
    is_greedy: bool  # each of its tokens is the likeliest one


class Row(NamedTuple):
    """A sequence that the model reads, and the continuations that its logits predict."""

    ids: tuple[int, ...]
    numbers: list[int]  # of the pairs that end in another last token only, such as the choices A, B, C and D
    n_targets: int  # logits that are needed, at the end

    @property
    def beginning(self) -> tuple[int, ...]:
        """The ids whose logits are not needed."""
        return self.ids[: len(self.ids) - self.n_targets]


@torch.no_grad()
@varying_shapes()
def score_continuations(
    model: nn.Module,
    pairs: Sequence[Pair],
    batch_size: int,
    on_scored: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """The log-likelihood of each continuation. Of a context that is too long the end is read.

    batch_size: sequences at a time. on_scored: is called with the number of pairs that a batch has scored. Raises
    UserError for a continuation longer than block_size.
    """
    config: Any = model.config
    scores = [Score(0.0, is_greedy=True)] * len(pairs)
    max_targets = MAX_LOGITS // sum(config.vocab_sizes)
    for rows in iter_batches(make_rows(model, pairs), batch_size, max_targets):
        continuations = {number: pairs[number].continuation for row in rows for number in row.numbers}
        for number, score in score_rows(model, rows, continuations).items():
            scores[number] = score
        on_scored(len(continuations))
    return scores


def make_rows(model: nn.Module, pairs: Sequence[Pair]) -> list[Row]:
    """The sequences to read: those of one context together, the longest contexts first. Raises UserError."""
    config: Any = model.config
    vocab_rows = model.get_parameter("wte.weight").size(0)
    numbers_of: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not 0 < len(continuation) <= config.block_size:
            raise UserError(f"a continuation has {len(continuation)} tokens; it may have 1 to {config.block_size}")
        text = np.array([*context, *continuation][:-1])
        read = cut_context(text, config.block_size, vocab_rows, halve=False).tolist()
        numbers_of.setdefault(tuple(read), []).append(number)

    rows_of: dict[tuple[int, ...], list[Row]] = {}  # of each beginning
    for ids, numbers in numbers_of.items():
        row = Row(ids, numbers, max(len(pairs[number].continuation) for number in numbers))
        rows_of.setdefault(row.beginning, []).append(row)
    groups = [sorted(rows, key=lambda row: -row.n_targets) for rows in rows_of.values()]
    groups.sort(key=lambda rows: (-len(rows[0].beginning), -rows[0].n_targets))
    return [row for rows in groups for row in rows]


def iter_batches(rows: Sequence[Row], batch_size: int, max_targets: int) -> Iterator[list[Row]]:
    """Consecutive rows: at most batch_size, and of max_targets logits unless one row has more."""
    batch: list[Row] = []
    n_targets = 0
    for row in rows:
        if batch and (len(batch) == batch_size or n_targets + row.n_targets > max_targets):
            yield batch
            batch, n_targets = [], 0
        batch.append(row)
        n_targets += row.n_targets
    if batch:
        yield batch


def score_rows(model: nn.Module, rows: Sequence[Row], continuations: dict[int, Sequence[int]]) -> dict[int, Score]:
    """The scores of the rows' continuations, by number."""
    # 1. Which token each logit predicts: of a row the logits at its end are needed.
    positions: list[int] = []  # among the logits of all rows
    targets: list[int] = []
    owners: list[int] = []  # the place of each target's continuation in `numbers`
    numbers: list[int] = []
    end = 0
    for row in rows:
        end += row.n_targets
        for number in row.numbers:
            continuation = continuations[number]
            positions += range(end - len(continuation), end)
            targets += continuation
            owners += [len(numbers)] * len(continuation)
            numbers.append(number)

    # 2. Their log-probabilities.
    logits = read_rows(model, rows).float()  # (N, V)
    target_ids, at = torch.tensor(targets, device=logits.device), torch.tensor(positions, device=logits.device)
    logps = (logits[at, target_ids] - logits.logsumexp(-1)[at]).double().cpu().numpy()
    is_other = (logits.argmax(-1)[at] != target_ids).cpu().numpy()

    # 3. Sums over each continuation.
    sums = np.bincount(owners, weights=logps).tolist()
    n_others = np.bincount(owners, weights=is_other).tolist()
    return {number: Score(sums[i], n_others[i] == 0) for i, number in enumerate(numbers)}


def read_rows(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """The logits at the last n_targets tokens of each row, one row after the other: (N, V)."""
    # 1. A row is its beginning, of which no logits are needed and which others may have too, and its rest.
    beginnings = list(dict.fromkeys(row.beginning for row in rows))
    common = common_beginning(beginnings)  # the examples before all questions
    longest = max(map(len, beginnings))
    n_split = len(common) + len(beginnings) * (longest - len(common)) + len(rows) * max(row.n_targets for row in rows)
    if n_split >= len(rows) * max(len(row.ids) for row in rows):  # tokens to read
        beginnings, common, longest = [()], (), 0
    number_of = {beginning: number for number, beginning in enumerate(beginnings)}
    numbers = [number_of.get(row.beginning, 0) for row in rows]

    # 2. Read what all begin with, then the beginnings. Padding lies behind what a row's rest may see.
    device = device_of(model)
    rests = [row.ids[len(beginnings[number]) :] for row, number in zip(rows, numbers, strict=True)]
    width = max(map(len, rests))
    cache = KVCache(model, 1, longest + width) if longest else None
    for parts in ([common], [beginning[len(common) :] for beginning in beginnings]):
        if cache is not None and any(parts):
            cache.select(torch.zeros(len(parts), dtype=torch.long, device=device))
            n_read = max(map(len, parts))
            model(pad(parts, device), cache=cache, position_ids=cache.advance(n_read), logits_at=slice(0))

    # 3. Read the rests, each at its own positions. Padding repeats the last token at its position.
    lengths = torch.tensor([len(rest) for rest in rests], device=device)[:, None]
    columns = torch.arange(width, device=device)
    positions: Tensor | slice = slice(0, width)
    if cache is not None:
        cache.select(torch.tensor(numbers, device=device))
        cache.advance(width)
        starts = torch.tensor([len(beginnings[number]) for number in numbers], device=device)[:, None]
        positions = starts + torch.minimum(columns, lengths - 1)
    n_targets = torch.tensor([row.n_targets for row in rows], device=device)[:, None]
    is_needed = (columns >= lengths - n_targets) & (columns < lengths)
    return model(pad(rests, device), cache=cache, position_ids=positions, logits_at=is_needed)


def common_beginning(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What several sequences begin with: the first and the last in order have no more in common than all."""
    first, last = min(sequences), max(sequences)
    if len(sequences) == 1:
        return ()
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return tuple(pair[0] for pair in pairs)


def pad(parts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, T): each row padded at its end with its last id, with 0 if it is empty."""
    width = max(map(len, parts))
    padded = [[*part, *itertools.repeat(part[-1] if part else 0, width - len(part))] for part in parts]
    return torch.tensor(padded, dtype=torch.long, device=device)
