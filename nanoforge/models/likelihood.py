"""Log-likelihoods: how probable a model finds given continuations of given contexts.

    pairs = [encode_pair(tokenizer, "The sky is", choice) for choice in (" blue", " green")]
    blue, green = score_continuations(model, pairs, batch_size=64)

What sequences of a batch have in common at their beginnings (the question before its choices, the examples before the
question) is read once, and the KV cache serves them all. Knows nothing of tasks, rows or metrics.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nanoforge.data.tokenization import Tokenizer
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


@torch.no_grad()
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
    """The sequences to read: the longest first, those of one context together. Raises UserError."""
    config: Any = model.config
    vocab_rows = model.get_parameter("wte.weight").size(0)
    numbers_of: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not 0 < len(continuation) <= config.block_size:
            raise UserError(f"a continuation has {len(continuation)} tokens; it may have 1 to {config.block_size}")
        read = cut_context([*context, *continuation][:-1], config.block_size, vocab_rows, halve=False)
        numbers_of.setdefault(tuple(read), []).append(number)

    rows_of: dict[tuple[int, ...], list[Row]] = {}  # of each context
    for ids, numbers in numbers_of.items():
        row = Row(ids, numbers, max(len(pairs[number].continuation) for number in numbers))
        rows_of.setdefault(ids[: len(ids) + 1 - row.n_targets], []).append(row)
    groups = [sorted(rows, key=lambda row: -len(row.ids)) for rows in rows_of.values()]
    groups.sort(key=lambda rows: -len(rows[0].ids))
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
    # 1. The rows, padded at their ends, which causal attention never reads.
    device = device_of(model)
    lengths = np.array([len(row.ids) for row in rows])
    first_needed = lengths - np.array([row.n_targets for row in rows])
    columns = np.arange(lengths.max())
    idx = np.zeros((len(rows), len(columns)), dtype=np.int64)
    is_token = columns < lengths[:, None]
    idx[is_token] = np.concatenate([row.ids for row in rows])
    is_needed = is_token & (columns >= first_needed[:, None])

    # 2. Read their beginnings once; each row continues from its own.
    start = shared_length(idx, limit=int(first_needed.min()))
    cache = None
    if start:
        beginnings, row_of = np.unique(idx[:, :start], axis=0, return_inverse=True)
        cache = KVCache(model, len(beginnings), len(columns))
        prefix = torch.from_numpy(beginnings).to(device)
        model(prefix, cache=cache, position_ids=cache.advance(start), logits_at=slice(0))
        cache.select(torch.from_numpy(row_of).to(device))

    # 3. Read the rest, where all the logits that are needed lie.
    rest = torch.from_numpy(idx[:, start:]).to(device)
    logits_at = torch.from_numpy(is_needed[:, start:]).to(device)
    return model(rest, cache=cache, position_ids=slice(start, len(columns)), logits_at=logits_at)


def shared_length(idx: np.ndarray, limit: int) -> int:
    """The length of the beginnings, at most `limit`, with which the fewest tokens are read. idx: (B, T).

    With it each different beginning is read once, and the rest of every row.
    """
    n_rows, width = idx.shape
    ordered = idx[np.lexsort(idx.T[::-1])]
    n_common = np.cumprod(ordered[1:] == ordered[:-1], axis=1).sum(1)  # (B - 1,) tokens that neighbours begin with
    best, fewest = 0, n_rows * width
    for length in np.unique(n_common.clip(max=limit)).tolist():
        n_beginnings = 1 + int((n_common < length).sum())
        n_read = n_beginnings * length + n_rows * (width - length)
        if n_read < fewest:
            best, fewest = length, n_read
    return best
