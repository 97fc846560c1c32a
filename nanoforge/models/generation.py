"""Generation: sampling parameters, a KV cache, and the decoding of one text or of many.

Knows nothing of tokenizers, prompts as text, or rewards.

`generate` continues prompts of one length without end and hands over each token as it is drawn. Past block_size the
context is cut to its last half and read again. Every token is thus drawn from the model's exact output for at least
half a block of context, at the cost of one prefill every half block.

`generate_batch` completes prompts of different lengths, each `n` times, until a token that ends them. Its
`BatchDecoder` prefills once, then decodes a token of every sequence at a time, and retires finished sequences. Past
block_size it cuts each sequence's context in the same way; virtual tokens of a soft prompt always stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# sampling


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn. The defaults keep every id and never stop early.

    The filters act on the tempered distribution in this order: top_k; top_p, the smallest set of likeliest ids whose
    probabilities reach p (Holtzman et al. 2020); min_p, ids at least p times as likely as the likeliest one (Nguyen et
    al. 2024).
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    n: int = 1  # completions of each prompt
    end_ids: tuple[int, ...] = ()  # each ends a completion
    vocab_size: int | None = None  # ids that may be drawn are below it: padding rows are not; None: all
    is_complete: Callable[[list[int]], bool] | None = None  # whether the ids of a completion are enough, without an end


def logits_to_probs(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Probabilities of the next ids, (B, V), from logits (B, V). What a filter drops has probability 0.

    For temperatures above 0.
    """
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-6)
    if sampling.top_k:
        top = logits.topk(min(sampling.top_k, logits.size(-1)), dim=-1).values
        logits = logits.masked_fill(logits < top[:, -1:], float("-inf"))
    if sampling.top_p < 1:
        sorted_probs, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        dropped = sorted_probs.cumsum(-1) - sorted_probs >= sampling.top_p  # likelier ids already reach p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    probs = logits.softmax(-1)
    if sampling.min_p:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs


def sample_next_token(logits: Tensor, sampling: SamplingParams, generator: torch.Generator) -> Tensor:
    """One id a row, (B,), from logits (B, V)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(logits_to_probs(logits, sampling), 1, generator=generator)[:, 0]


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """The ids, (B,), at which the cumulative probs, (B, V), pass u, (B,) in [0, 1): u alone decides the draw.

    The probs need not sum to 1. An id of probability 0 is never drawn: u may be rounded to 1, its product stays below.
    """
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:].contiguous()
    threshold = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, threshold, right=True)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# KV cache


def device_of(model: nn.Module) -> torch.device:
    return model.get_parameter("wte.weight").device


class KVCache:
    """Keys and values of all layers, allocated once for `size` tokens of each sequence.

    The caller asks `advance` for the positions of the next tokens and passes positions to the model's forward:

        logits = model(tokens, cache=cache, position_ids=cache.advance(tokens.size(1)))

    Positions are a slice, the same of all sequences: attention then reads the tokens so far. Or they are `static_pos`,
    a tensor (1,) at a fixed address: attention reads all `size` slots behind a mask, in shapes that never change, as a
    compiled step needs. Or they are a tensor (B, T): each sequence has its own.
    """

    def __init__(self, model: nn.Module, batch_size: int, size: int):
        config: Any = model.config
        dtype: Any = model.compute_dtype
        device = device_of(model)
        n_kv_head, head_dim = config.n_kv_head, config.head_dim
        shape = (config.n_layer, batch_size, n_kv_head, size, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.static_pos = torch.zeros(1, device=device, dtype=torch.long)
        self.size = size
        self.length = 0  # tokens read so far, by the longest sequence

    def advance(self, num_tokens: int) -> slice:
        """Count the next tokens as read; their positions."""
        start = self.length
        self.length = min(start + num_tokens, self.size)
        return slice(start, self.length)

    def advance_static(self) -> Tensor:
        """Count the next token as read; its position, as `static_pos`."""
        return self.static_pos.fill_(self.advance(1).start)

    def reset(self) -> None:
        """Forget all tokens. Old keys need no zeros: they lie behind the positions that attention reads."""
        self.length = 0

    def select(self, rows: Tensor) -> None:
        """Keep the sequences of these rows, (rows,), in this order; a row may be repeated."""
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]

    def replace(self, rows: Tensor, other: "KVCache") -> None:
        """Put the sequences of another cache in the place of these rows, (rows,)."""
        self.keys[:, rows, :, : other.size] = other.keys
        self.values[:, rows, :, : other.size] = other.values

    def num_keys(self, positions: slice | Tensor) -> int:
        """How many keys attention reads for these positions."""
        if isinstance(positions, slice):
            return positions.stop
        return self.length if positions.dim() == 2 else self.size

    def update(self, layer: int, k: Tensor, v: Tensor, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's k and v, (B, H_kv, T, D), at `positions`; its keys and values to read, (B, H_kv, S, D)."""
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(positions, Tensor) and positions.dim() == 2:
            rows = torch.arange(len(k), device=k.device)[:, None]
            keys[rows, :, positions] = k.transpose(1, 2)  # (B, T, H_kv, D)
            values[rows, :, positions] = v.transpose(1, 2)
        else:
            keys[:, :, positions] = k
            values[:, :, positions] = v
        end = self.num_keys(positions)
        return keys[:, :, :end], values[:, :, :end]


# ---------------------------------------------------------------------------------------------------------------------
# one length of prompt, without end


LAST = (slice(None), slice(-1, None))  # the last position of each text, as logits_at


class UncachedReader:
    """Reads the whole context at every token: what the cache is checked against. size: of the longest context."""

    def __init__(self, model: nn.Module, batch_size: int, size: int):
        self.model = model

    def reset(self) -> None:
        """The context was cut."""

    def next_logits(self, context: Tensor) -> Tensor:
        """Logits (B, V) of the token after the context, (B, T) or (B, K, T)."""
        return self.model(context, logits_at=LAST)[:, -1]


class CachedReader(UncachedReader):
    """Reads only the tokens that are not in the cache yet: prefill, then one at a time."""

    def __init__(self, model: nn.Module, batch_size: int, size: int):
        super().__init__(model, batch_size, size)
        self.cache = KVCache(model, batch_size, size)

    def reset(self) -> None:
        self.cache.reset()

    def next_logits(self, context: Tensor) -> Tensor:
        unread = context[..., self.cache.length :]
        positions = self.cache.advance(unread.size(-1))
        return self.model(unread, cache=self.cache, position_ids=positions, logits_at=LAST)[:, -1]


class CompiledReader(CachedReader):
    """Compiles the step that reads one token; on a GPU it is replayed as a CUDA graph."""

    def __init__(self, model: nn.Module, batch_size: int, size: int):
        super().__init__(model, batch_size, -(-size // 256) * 256)  # each size is compiled, so there are few
        for tensor in (self.cache.keys, self.cache.values, self.cache.static_pos):
            torch._dynamo.mark_static_address(tensor)
        mode = "reduce-overhead" if self.cache.keys.is_cuda else None
        self.compiled_model = torch.compile(model, dynamic=False, mode=mode)

    def next_logits(self, context: Tensor) -> Tensor:
        if context.size(-1) != self.cache.length + 1:
            return super().next_logits(context)
        token = context[..., -1:].clone(memory_format=torch.contiguous_format)  # other strides would recompile
        return self.compiled_model(token, cache=self.cache, position_ids=self.cache.advance_static())[:, -1]


READERS = {"uncached": UncachedReader, "cached": CachedReader, "compiled": CompiledReader}


@torch.inference_mode()
def generate(
    model: nn.Module,
    idx: Tensor,
    sampling: SamplingParams,
    generator: torch.Generator,
    on_token: Callable[[Tensor], None] | None = None,
    decode: str = "cached",
) -> Tensor:
    """Continue idx, (B, T) or (B, K, T) of K contexts, by exactly max_new_tokens ids: (B, T + new) or (B, K, T + new).

    on_token is called with the new ids of each step, (B,) or (B, K). decode is a key of READERS.
    """
    config: Any = model.config
    vocabulary: Any = model.vocabulary
    prompt_length, block_size = idx.size(-1), config.block_size
    tokens = torch.cat((idx, idx.new_zeros(*idx.shape[:-1], sampling.max_new_tokens)), dim=-1)
    reader = READERS[decode](model, idx.size(0), min(block_size, tokens.size(-1)))
    start = max(0, prompt_length - block_size)  # of the context
    for end in range(prompt_length, tokens.size(-1)):
        # 1. Past block_size, the context is cut to its last half and read again.
        if end - start > block_size:
            start = end - max(1, block_size // 2)
            reader.reset()
        # 2. Read what is new in the context.
        logits = reader.next_logits(tokens[..., start:end])  # (B, V)
        # 3. Draw a token, of several contexts one each.
        drawn = []
        for offset, choices in vocabulary.next_token_logits(logits, tokens[..., end - 1]):
            drawn.append(offset + sample_next_token(choices[:, : sampling.vocab_size], sampling, generator))
        tokens[..., end] = torch.stack(drawn, dim=-1).view(idx.shape[:-1])  # (B,) or (B, K)
        if on_token is not None:
            on_token(tokens[..., end])
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# prompts of different lengths, until the end-of-sequence token


class Completion(NamedTuple):
    ids: list[int]  # the token that ends it included
    logps: list[float]  # of each id among all rows of the head, at the temperature, before any filter: as in training
    ended: bool  # by one of end_ids, not by max_new_tokens


def cut_context(ids: Sequence[int], block_size: int, vocab_rows: int, *, halve: bool) -> list[int]:
    """The end of a text that fits the context, or with `halve` half of it.

    Virtual tokens of a soft prompt, ids of vocab_rows and above, always stay, in their places; the text has the rest.
    """
    tokens = np.array(ids)
    kept = tokens >= vocab_rows
    room = block_size - int(kept.sum())
    if halve:
        room //= 2
    kept[np.flatnonzero(~kept)[-max(1, room) :]] = True
    return tokens[kept].tolist()


MIN_ACTIVE = 0.75  # finished rows are dropped when less than this fraction of the batch is active


class BatchDecoder:
    """Decodes completions of many prompts together: `prefill`, then `step` and `retire` in turn.

    Completion i belongs to prompt i // n. A row of the batch is a completion that has not retired. What the next
    forward reads of a row is on the device; what was drawn is kept on the host, by completion.

    uniform: (completions, token index) -> numbers in [0, 1) that alone decide the draws; None: torch's generator.
    any_rank: whether something holds on this rank -> whether it holds on any, for sharded models.
    """

    cache: KVCache
    completion_of_row: np.ndarray  # (R,)
    last_tokens: Tensor  # (R,) drawn, but not read yet
    positions: Tensor  # (R,) of the last tokens

    def __init__(
        self,
        model: nn.Module,
        sampling: SamplingParams,
        uniform: Callable[[np.ndarray, int], np.ndarray] | None = None,
        any_rank: Callable[[bool], bool] = bool,
    ):
        self.model, self.sampling, self.uniform, self.any_rank = model, sampling, uniform, any_rank
        self.device = device_of(model)
        config: Any = model.config
        self.block_size: int = config.block_size
        self.vocab_rows = model.get_parameter("wte.weight").size(0)  # ids from here on are virtual tokens
        self.end_ids = np.array(sampling.end_ids, dtype=np.int64)
        self.num_drawn = 0  # tokens of each active completion

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts and draw the first token of every completion."""
        # 1. Read the end of each prompt that fits the context; keep the logits at its last token.
        sampling = self.sampling
        contexts = [cut_context(prompt, self.block_size, self.vocab_rows, halve=False) for prompt in prompts]
        lengths = torch.tensor([len(context) for context in contexts])
        size = min(self.block_size, int(lengths.max()) + sampling.max_new_tokens)
        self.cache, logits = self._read(contexts, size)  # logits: (P, V)

        # 2. A row for each of the n completions of a prompt.
        prompt_of_row = torch.arange(len(prompts)).repeat_interleave(sampling.n)
        self.cache.select(prompt_of_row.to(self.device))
        lengths = lengths[prompt_of_row]
        self.positions = lengths.to(self.device)
        self.completion_of_row = np.arange(len(lengths))

        # 3. What is drawn, by completion.
        self.prompts = [prompts[i] for i in prompt_of_row]
        self.context_lengths = lengths.numpy().copy()  # tokens in the context, the last one included
        self.ids = np.zeros((len(lengths), sampling.max_new_tokens), dtype=np.int64)
        self.logps = np.zeros((len(lengths), sampling.max_new_tokens))
        self.num_tokens = np.zeros(len(lengths), dtype=np.int64)
        self.ended = np.zeros(len(lengths), dtype=bool)
        self.finished = np.zeros(len(lengths), dtype=bool)
        self._draw(logits[prompt_of_row.to(logits.device)])

    def step(self) -> None:
        """Read the last token of every row, at its own position, and draw the next."""
        rows = self.completion_of_row
        full = np.flatnonzero(~self.finished[rows] & (self.context_lengths[rows] > self.block_size))
        if self.any_rank(len(full) > 0):
            self._slide(full)
        self.cache.advance(1)
        self.positions = self.positions.clamp(max=self.cache.size - 1)  # finished rows stay within the cache
        position_ids = self.positions[:, None]  # (R, 1)
        logits = self.model(self.last_tokens[:, None], cache=self.cache, position_ids=position_ids)[:, -1]
        self.positions = self.positions + 1
        self._draw(logits)

    def retire(self) -> None:
        """Drop the finished rows from the batch once they are more than a quarter of it."""
        active = np.flatnonzero(~self.finished[self.completion_of_row])
        if len(active) >= MIN_ACTIVE * len(self.completion_of_row):
            return
        kept = active if len(active) else np.zeros(1, dtype=np.int64)  # one at least: other ranks may go on
        rows = torch.from_numpy(kept).to(self.device)
        self.cache.select(rows)
        self.last_tokens, self.positions = self.last_tokens[rows], self.positions[rows]
        self.completion_of_row = self.completion_of_row[kept]

    @property
    def any_active(self) -> bool:
        return not self.finished[self.completion_of_row].all()

    def completions(self) -> list[Completion]:
        """What was drawn, in the prompts' order, the n completions of a prompt one after the other."""
        drawn = zip(self.ids.tolist(), self.logps.tolist(), self.num_tokens.tolist(), self.ended.tolist(), strict=True)
        return [Completion(ids[:count], logps[:count], ended) for ids, logps, count, ended in drawn]

    def _read(self, contexts: Sequence[Sequence[int]], size: int = 0) -> tuple[KVCache, Tensor]:
        """Read contexts into a new cache of at least `size` tokens: the cache, and the logits at their ends, (P, V).

        They are one batch, padded on the right: causal attention never reads the padding, and later tokens replace it.
        """
        width = max(1, *map(len, contexts))
        idx = torch.zeros(len(contexts), width, dtype=torch.long)
        for row, context in enumerate(contexts):
            idx[row, : len(context)] = torch.tensor(context)
        cache = KVCache(self.model, len(contexts), max(size, width))
        rows, ends = torch.arange(len(contexts)), torch.tensor([max(1, len(context)) - 1 for context in contexts])
        at_ends = (rows.to(self.device), ends.to(self.device))
        positions = cache.advance(width)
        return cache, self.model(idx.to(self.device), cache=cache, position_ids=positions, logits_at=at_ends)

    def _slide(self, full: np.ndarray) -> None:
        """Cut the contexts of these rows, (rows,), to a half, as `generate` does; read all but their last tokens."""
        completions = self.completion_of_row[full]
        contexts = []
        for completion in completions:
            text = [*self.prompts[completion], *self.ids[completion, : self.num_drawn].tolist()]
            contexts.append(cut_context(text, self.block_size, self.vocab_rows, halve=True))
        lengths = np.array([len(context) for context in contexts], dtype=np.int64)
        unread = [context[:-1] for context in contexts] or [[]]  # one at least: other ranks read theirs
        cache, _ = self._read(unread)
        if len(full):
            rows = torch.from_numpy(full).to(self.device)
            self.cache.replace(rows, cache)
            self.positions[rows] = torch.from_numpy(lengths - 1).to(self.device)
            self.context_lengths[completions] = lengths

    def _draw(self, logits: Tensor) -> None:
        """Draw a token of every row from logits (R, V), and keep those of unfinished completions."""
        sampling, rows = self.sampling, self.completion_of_row
        logits = logits.float()
        logps = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
        logits = logits[:, : sampling.vocab_size]
        if sampling.temperature == 0:
            drawn = logits.argmax(-1)
        else:
            u = torch.rand(len(rows)) if self.uniform is None else torch.from_numpy(self.uniform(rows, self.num_drawn))
            drawn = inverse_cdf(logits_to_probs(logits, sampling), u.float().to(self.device))
        self.last_tokens = drawn
        drawn_logps = logps.gather(1, drawn[:, None])[:, 0]

        active = ~self.finished[rows]
        kept, kept_ids = rows[active], drawn.cpu().numpy()[active]
        self.ids[kept, self.num_drawn] = kept_ids
        self.logps[kept, self.num_drawn] = drawn_logps.cpu().numpy()[active]
        self.num_tokens[kept] += 1
        self.ended[kept] = (kept_ids[:, None] == self.end_ids).any(1)
        self.finished[kept] = self.ended[kept]
        self.num_drawn += 1
        if sampling.is_complete is not None:
            for completion in kept[~self.ended[kept]]:
                self.finished[completion] = sampling.is_complete(self.ids[completion, : self.num_drawn].tolist())
        self.context_lengths += 1


@torch.no_grad()
def generate_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    uniform: Callable[[np.ndarray, int], np.ndarray] | None = None,
    any_rank: Callable[[bool], bool] = bool,
    on_token: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Completions of prompts of any lengths, the `n` of a prompt one after the other.

    Each ends with one of end_ids, or after max_new_tokens. uniform, any_rank: see BatchDecoder. on_token is called with
    each id of the first completion, but not with one that ends it.
    """
    decoder = BatchDecoder(model, sampling, uniform, any_rank)
    decoder.prefill(prompts)
    report_token(decoder, on_token)
    while decoder.num_drawn < sampling.max_new_tokens and any_rank(decoder.any_active):
        decoder.retire()
        decoder.step()
        report_token(decoder, on_token)
    return decoder.completions()


def report_token(decoder: BatchDecoder, on_token: Callable[[int], None] | None) -> None:
    """Call on_token with the id that was just drawn for the first completion."""
    if on_token is not None and not decoder.ended[0] and decoder.num_tokens[0] == decoder.num_drawn:
        on_token(int(decoder.ids[0, decoder.num_drawn - 1]))
