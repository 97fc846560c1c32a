"""Generation: sampling parameters, a KV cache, and the decoding of completions of many prompts together.

Knows nothing of tokenizers, prompts as text, or rewards.

`generate_batch` is the one way to draw: for sample.py, evaluations and rollouts. It completes prompts of different
lengths, each `n` times, to a token that ends them or to max_new_tokens. Its `Decoder` works as gpt-fast does: `prefill`
reads the prompts, `decode_one_token` reads the last token of every sequence and draws the next.

On CUDA the host looks at what was drawn every LOOK_EVERY tokens only. Between two looks a step reads and writes tensors
at fixed addresses, so it is captured as a CUDA graph and replayed.

Past block_size a context is cut to its last half and read again. Every token is thus drawn with at least half a block
of context, at the cost of one prefill every half block. Virtual tokens of a soft prompt always stay.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoforge import rng
from nanoforge.device import varying_shapes
from nanoforge.distributed import is_sharded

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
    logps: bool = False  # whether completions have log-probabilities
    compiled: bool = False  # whether decode_one_token is compiled


# (numbers of completions, numbers of tokens), which broadcast, -> numbers in [0, 1) that alone decide the draws
UniformDraws = Callable[[np.ndarray, np.ndarray], np.ndarray]


def uniform_draws(*key: int, first: int = 0) -> UniformDraws:
    """Random numbers that are a function of (key, completion, token). first: number of the first completion."""
    return lambda completions, tokens: rng.uniform(*key, completions + first, tokens)


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


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """The ids, (B,), at which the cumulative probs, (B, V), pass u, (B,) in [0, 1): u alone decides the draw.

    The probs need not sum to 1. An id of probability 0 is never drawn: u may be rounded to 1, its product stays below.
    """
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:].contiguous()
    threshold = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, threshold, right=True)[:, 0]


def sample(logits: Tensor, u: Tensor, sampling: SamplingParams) -> Tensor:
    """An id of each row, (B,), from logits (B, V) and u, (B,) in [0, 1)."""
    logits = logits[:, : sampling.vocab_size]
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return inverse_cdf(logits_to_probs(logits, sampling), u)


# ---------------------------------------------------------------------------------------------------------------------
# weights


def device_of(model: nn.Module) -> torch.device:
    return model.get_parameter("wte.weight").device


def castable_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights that are not in the compute dtype, and that a forward casts to it before it computes with them."""
    exact = [module for module in model.modules() if getattr(module, "needs_exact_weights", False)]
    kept = {id(parameter) for module in exact for parameter in module.parameters()}
    dtype: Any = model.compute_dtype
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype and id(parameter) not in kept:
            yield parameter


def cast_weights(model: nn.Module) -> None:
    """Cast the weights to the compute dtype, in place, for a model that is only sampled from."""
    dtype: Any = model.compute_dtype
    for parameter in castable_weights(model):
        parameter.data = parameter.data.to(dtype)


def decoding_copy(model: nn.Module) -> nn.Module:
    """A model that computes the same, with weights that are cast already, and whose blocks are not compiled: their
    graphs are for training's shapes. All else is shared; without a difference it is the model itself."""
    dtype: Any = model.compute_dtype
    cast = {id(p): nn.Parameter(p.to(dtype), requires_grad=False) for p in castable_weights(model)}
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    if not (cast or is_compiled):
        return model
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared | cast)


# ---------------------------------------------------------------------------------------------------------------------
# KV cache


def round_up(length: int) -> int:
    """Tokens to 64, 128, 256, 512 and on by 512: shapes that graphs are made for, so there are few."""
    return -(-length // 512) * 512 if length > 256 else max(64, 1 << (length - 1).bit_length())


class KVCache:
    """Keys and values of each layer, allocated once for `size` tokens of each sequence.

    The caller asks `advance` for the positions of the next tokens and passes positions to the model's forward:

        logits = model(tokens, cache=cache, position_ids=cache.advance(tokens.size(1)))

    Positions are a slice, the same of all sequences, or a tensor (B, T): each sequence has its own.
    """

    def __init__(self, model: nn.Module, batch_size: int, size: int):
        config: Any = model.config
        dtype: Any = model.compute_dtype
        shape = (batch_size, 2 * config.n_kv_head, size, config.head_dim)
        device = device_of(model)
        # Of each layer (B, 2 H_kv, size, D), keys first: one kernel writes both.
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.rows = torch.arange(batch_size, device=device)[:, None]
        self.length = 0  # tokens that attention reads at positions (B, T)

    @property
    def size(self) -> int:
        return self.layers[0].size(2)

    def advance(self, num_tokens: int) -> slice:
        """Count the next tokens as read; their positions."""
        start = self.length
        self.length = min(start + num_tokens, self.size)
        return slice(start, self.length)

    def select(self, rows: Tensor) -> None:
        """Keep the sequences of these rows, (rows,), in this order; a row may be repeated."""
        self.layers = [layer[rows] for layer in self.layers]
        self.rows = torch.arange(len(rows), device=rows.device)[:, None]

    def replace(self, rows: Tensor, other: "KVCache") -> None:
        """Put the sequences of another cache in the place of these rows, (rows,)."""
        for layer, other_layer in zip(self.layers, other.layers, strict=True):
            layer[rows, :, : other.size] = other_layer

    def grow(self, size: int) -> None:
        """Make room for `size` tokens."""
        self.layers = [F.pad(layer, (0, 0, 0, size - self.size)) for layer in self.layers]

    def num_keys(self, positions: slice | Tensor) -> int:
        """How many keys attention reads for these positions."""
        return positions.stop if isinstance(positions, slice) else self.length

    def update(self, layer: int, k: Tensor, v: Tensor, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's k and v, (B, H_kv, T, D), at `positions`; its keys and values to read, (B, H_kv, S, D)."""
        kept, new = self.layers[layer], torch.cat((k, v), dim=1)
        if isinstance(positions, slice):
            kept[:, :, positions] = new
        else:
            kept[self.rows, :, positions] = new.transpose(1, 2)  # (B, T, 2 H_kv, D); compiled, it is made in place
        keys, values = kept[:, :, : self.num_keys(positions)].chunk(2, dim=1)
        return keys, values


# ---------------------------------------------------------------------------------------------------------------------
# one step


LOOK_EVERY = 16  # tokens
MAX_GRAPHS = 64  # of a compiled step; beyond them it fails


@dataclass
class DecodeState:
    """What a step reads and writes beside the cache. R sequences draw K ids each, one for each context.

    Where shapes are static, `positions` and `at` are tensors: a step then needs nothing of the host.
    """

    ids: Tensor  # (R, K) drawn, but not read yet
    uniform: Tensor  # (LOOK_EVERY, R, K) numbers in [0, 1) that decide the draws of a block of tokens
    drawn: Tensor  # (LOOK_EVERY, R, K) the block's ids
    logps: Tensor  # (LOOK_EVERY, R) their log-probabilities
    positions: Any  # of `ids`: a slice or (R, 1)
    at: Any  # which token of the block is drawn next: a slice or (1,)

    def advance(self) -> None:
        """To the next token."""
        for name in ("positions", "at"):
            index = getattr(self, name)
            if isinstance(index, Tensor):
                index.add_(1)
            else:
                setattr(self, name, slice(index.start + 1, index.stop + 1))


def draw(model: nn.Module, logits: Tensor, state: DecodeState, sampling: SamplingParams) -> None:
    """Draw the ids of every row from logits (R, V), into the state."""
    logits = logits.float()
    vocabulary: Any = model.vocabulary
    last_ids = state.ids if state.ids.size(1) > 1 else state.ids[:, 0]
    u = state.uniform[state.at][0]
    for k, (offset, choices) in enumerate(vocabulary.next_token_logits(logits, last_ids)):
        torch.add(sample(choices, u[:, k], sampling), offset, out=state.ids[:, k])
    state.drawn[state.at] = state.ids[None]
    if sampling.logps:
        logps = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
        state.logps[state.at] = logps.gather(1, state.ids).T


def decode_one_token(model: nn.Module, cache: KVCache, state: DecodeState, sampling: SamplingParams) -> None:
    """Read the last ids of every row and draw the next. It changes the cache and the state, and reads no host."""
    tokens = state.ids[..., None] if state.ids.size(1) > 1 else state.ids  # (R, K, 1) or (R, 1)
    logits = model(tokens, cache=cache, position_ids=state.positions)[:, -1]
    draw(model, logits, state, sampling)
    state.advance()


@functools.cache
def compiled_step(device_type: str) -> Callable[..., None]:
    """decode_one_token, compiled: one graph for each size of the cache, which batches greater than 1 share."""
    options: Any = {"coordinate_descent_tuning": True} if device_type == "cuda" else None
    return torch.compile(decode_one_token, fullgraph=True, dynamic=False, options=options)


def allow_graphs(*, compiled: bool) -> AbstractContextManager[None]:
    """Sizes of the cache times sampling parameters are more graphs than torch makes of a function by default."""
    return torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS) if compiled else nullcontext()


def capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph whose `replay` does what the step does, to the same tensors."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


class ReplayedStep:
    """A step of which CUDA launches all kernels at once: the first call runs it, the second one captures it."""

    def __init__(self, step: Callable[[], None]):
        self.step = step
        self.has_run = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self.has_run:
            self.has_run = True
            self.step()
            return
        self.graph = self.graph or capture(self.step)
        self.graph.replay()


# ---------------------------------------------------------------------------------------------------------------------
# completions of many prompts


class Completion(NamedTuple):
    ids: list[Any]  # the token that ends it included; of K contexts, K ids each
    logps: list[float]  # of each id among all rows of the head, at the temperature, before any filter: as in training
    ended: bool  # by one of end_ids, not by max_new_tokens


def cut_context(ids: np.ndarray, block_size: int, vocab_rows: int, *, halve: bool) -> np.ndarray:
    """The end of a text, (..., T), that fits the context, or with `halve` half of it.

    Virtual tokens of a soft prompt, ids of vocab_rows and above, always stay, in their places; the text has the rest.
    """
    kept = np.asarray((ids >= vocab_rows).reshape(-1, ids.shape[-1]).any(axis=0))
    room = block_size - int(kept.sum())
    if halve:
        room //= 2
    kept[np.flatnonzero(~kept)[-max(1, room) :]] = True
    return ids[..., kept]


MIN_ACTIVE = 0.75  # finished rows are dropped when less than this fraction of the batch is active


class Decoder:
    """Decodes completions of many prompts together: `prefill`, then `retire`, `slide`, `decode` and `look` in turn.

    Completion i belongs to prompt i // n. A row of the batch is a completion that has not retired. All rows draw a
    token at each step, so the host knows their positions without a look at the device. What was drawn is known to it
    by completion, up to the last look.
    """

    cache: KVCache
    state: DecodeState
    lengths: np.ndarray  # (R,) tokens of each row's context, its last ids included

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Any],
        sampling: SamplingParams,
        uniform: UniformDraws,
        any_rank: Callable[[bool], bool] = bool,
    ):
        self.model = model if is_sharded(model) else decoding_copy(model)
        self.sampling, self.uniform, self.any_rank = sampling, uniform, any_rank
        self.device = device_of(model)
        self.is_static = self.device.type == "cuda" or sampling.compiled
        self.is_replayed = self.device.type == "cuda" and not is_sharded(model)  # no graph has collectives
        config: Any = model.config
        self.block_size: int = config.block_size
        self.vocab_rows = model.get_parameter("wte.weight").size(0)  # ids from here on are virtual tokens
        self.n_contexts = len(config.vocab_sizes) if config.vocabulary == "contexts" else 1
        self.prompts = [np.asarray(prompt, dtype=np.int64).reshape(self.n_contexts, -1) for prompt in prompts]
        self.end_ids = np.array(sampling.end_ids, dtype=np.int64)

        # What is drawn, by completion.
        count = len(prompts) * sampling.n
        self.ids = np.zeros((count, sampling.max_new_tokens, self.n_contexts), dtype=np.int64)
        self.logps = np.zeros((count, sampling.max_new_tokens))
        self.num_tokens = np.zeros(count, dtype=np.int64)
        self.ended = np.zeros(count, dtype=bool)
        self.finished = np.zeros(count, dtype=bool)
        self.num_drawn = 0  # tokens of each active completion
        self.num_looked = 0  # of these, before the last look
        self.completion_of_row = np.arange(count)  # (R,)

    @property
    def any_active(self) -> bool:
        return not self.finished[self.completion_of_row].all()

    def prefill(self) -> None:
        """Read the prompts and draw the first token of every completion."""
        # 1. Read the end of each prompt that fits the context; keep the logits at its last token.
        contexts = [cut_context(prompt, self.block_size, self.vocab_rows, halve=False) for prompt in self.prompts]
        lengths = np.array([context.shape[-1] for context in contexts])
        self.cache, logits = self._read(contexts, int(lengths.max()) + self.sampling.max_new_tokens)  # logits: (P, V)

        # 2. A row for each of the n completions of a prompt.
        n, rows = self.sampling.n, self.completion_of_row
        last_ids = torch.from_numpy(np.stack([context[:, -1] for context in contexts])).to(self.device)
        if n > 1:
            prompt_of_row = torch.from_numpy(rows // n).to(self.device)
            self.cache.select(prompt_of_row)
            logits, last_ids = logits[prompt_of_row], last_ids[prompt_of_row]
        self.lengths = lengths.repeat(n)

        # 3. Draw.
        block = (LOOK_EVERY, len(rows))
        self.state = DecodeState(
            ids=last_ids,
            uniform=torch.zeros(*block, self.n_contexts, device=self.device),
            drawn=torch.zeros(*block, self.n_contexts, device=self.device, dtype=torch.long),
            logps=torch.zeros(block, device=self.device),
            positions=slice(0),
            at=slice(0, 1),
        )
        self._begin_block()
        draw(self.model, logits, self.state, self.sampling)
        self._count(1)
        self._make_step()

    def retire(self) -> None:
        """Drop finished rows from the batch once they are more than a quarter of it. In static shapes the batch is
        halved, so there are few."""
        finished = self.finished[self.completion_of_row]
        n_kept = len(finished)
        n_active = max(1, n_kept - int(finished.sum()))  # one at least: other ranks may go on
        if self.is_static:
            while n_active <= n_kept // 2 > 1:  # a batch of 1 would be compiled by itself
                n_kept //= 2
        elif n_active < MIN_ACTIVE * n_kept:
            n_kept = n_active
        if n_kept == len(finished):
            return
        kept = np.sort(finished.argsort(kind="stable")[:n_kept])
        rows = torch.from_numpy(kept).to(self.device)
        self.cache.select(rows)
        state = self.state
        state.ids = state.ids[rows]
        state.uniform, state.drawn, state.logps = state.uniform[:, rows], state.drawn[:, rows], state.logps[:, rows]
        self.completion_of_row, self.lengths = self.completion_of_row[kept], self.lengths[kept]
        self._make_step()

    def slide(self) -> None:
        """Cut the contexts that are full to their last half, and read all but their last ids."""
        is_full = self.lengths > self.block_size
        finished = self.finished[self.completion_of_row]
        self.lengths[is_full & finished] = 1  # what they draw is not kept
        full = np.flatnonzero(is_full & ~finished)
        if not self.any_rank(len(full) > 0):
            return
        contexts = []
        for completion in self.completion_of_row[full]:
            prompt, drawn = self.prompts[completion // self.sampling.n], self.ids[completion, : self.num_drawn].T
            text = np.concatenate((prompt, drawn), axis=1)
            contexts.append(cut_context(text, self.block_size, self.vocab_rows, halve=True))
        unread = [context[:, :-1] for context in contexts] or [self.prompts[0][:, :0]]  # other ranks read theirs
        cache, _ = self._read(unread)
        if len(full):
            self.cache.replace(torch.from_numpy(full).to(self.device), cache)
            self.lengths[full] = [context.shape[-1] for context in contexts]

    def decode(self, most: int) -> None:
        """Read the last ids of every row and draw the next, at most so many times without a look."""
        at = self.num_drawn % LOOK_EVERY
        if at == 0:
            self._begin_block()
        n_left = self.sampling.max_new_tokens - self.num_drawn
        longest = int(self.lengths.max())
        n_steps = min(most, LOOK_EVERY - at, n_left, self.block_size - longest + 1)

        positions = torch.from_numpy(self.lengths[:, None] - 1)
        if self.is_static:
            if longest + n_steps - 1 > self.cache.size:
                self.cache.grow(round_up(longest + n_steps - 1))
                self._make_step()
            self.state.at.fill_(at)
            self.state.positions.copy_(positions)
            self.cache.length = self.cache.size
        else:
            self.state.at = slice(at, at + 1)
            is_even = (self.lengths == longest).all()
            self.state.positions = slice(longest - 1, longest) if is_even else positions
        for step in range(n_steps):
            if not self.is_static:
                self.cache.length = longest + step
            self.step()
        self._count(n_steps)

    def look(self) -> None:
        """Wait for the device; keep what was drawn since the last look, of every completion to its end."""
        if self.num_looked == self.num_drawn:
            return
        # 1. Read it. What finished rows went on to draw lies behind their ends.
        rows, start = self.completion_of_row, self.num_looked
        count = self.num_drawn - start
        at = start % LOOK_EVERY
        drawn = self.state.drawn[at : at + count].transpose(0, 1).cpu().numpy()  # (R, count, K)
        self.ids[rows, start : start + count] = drawn
        if self.sampling.logps:
            self.logps[rows, start : start + count] = self.state.logps[at : at + count].T.cpu().numpy()
        self.num_looked = self.num_drawn

        # 2. Where completions end.
        is_end = (drawn == self.end_ids[:, None, None, None]).any((0, 3))  # (R, count)
        ended = is_end.any(1)
        n_kept = np.where(ended, is_end.argmax(1) + 1, count)
        finished = ended.copy()
        active = np.flatnonzero(~self.finished[rows])
        if self.sampling.is_complete is not None:
            for row in active:
                for kept in range(1, n_kept[row] + 1 - ended[row]):
                    if self.sampling.is_complete(self.ids[rows[row], : start + kept, 0].tolist()):
                        n_kept[row], ended[row], finished[row] = kept, False, True
                        break
        completions = rows[active]
        self.num_tokens[completions] += n_kept[active]
        self.ended[completions], self.finished[completions] = ended[active], finished[active]

    def completions(self) -> list[Completion]:
        """What was drawn, in the prompts' order, the n completions of a prompt one after the other."""
        ids = self.ids[..., 0] if self.n_contexts == 1 else self.ids
        drawn = zip(ids.tolist(), self.logps.tolist(), self.num_tokens.tolist(), self.ended.tolist(), strict=True)
        return [Completion(ids[:n], logps[:n] if self.sampling.logps else [], ended) for ids, logps, n, ended in drawn]

    def _read(self, contexts: Sequence[np.ndarray], length: int = 0) -> tuple[KVCache, Tensor]:
        """Read contexts, (K, T), into a new cache: the cache, and the logits at their ends, (P, V).

        They are one batch, padded on the right: causal attention never reads the padding, and later tokens replace it.
        length: that contexts will reach.
        """
        width = max(1, *(context.shape[1] for context in contexts))
        padded = np.zeros((len(contexts), self.n_contexts, width), dtype=np.int64)
        for row, context in enumerate(contexts):
            padded[row, :, : context.shape[1]] = context
        idx = torch.from_numpy(padded).to(self.device)
        size = round_up(width + 1) if self.is_static else max(width, min(self.block_size, length))
        cache = KVCache(self.model, len(contexts), size)
        ends = torch.tensor([max(1, context.shape[1]) - 1 for context in contexts])
        at_ends = (torch.arange(len(contexts), device=self.device), ends.to(self.device))
        idx = idx if self.n_contexts > 1 else idx[:, 0]
        return cache, self.model(idx, cache=cache, position_ids=cache.advance(width), logits_at=at_ends)

    def _begin_block(self) -> None:
        """The random numbers that decide the next LOOK_EVERY tokens."""
        if self.sampling.temperature:
            tokens = np.arange(self.num_drawn, self.num_drawn + LOOK_EVERY)[:, None]
            numbers = self.completion_of_row[:, None] * self.n_contexts + np.arange(self.n_contexts)
            u = torch.from_numpy(self.uniform(numbers.reshape(1, -1), tokens)).float()
            self.state.uniform.copy_(u.view_as(self.state.uniform))

    def _count(self, n_tokens: int) -> None:
        """Every row has drawn so many tokens."""
        self.num_drawn += n_tokens
        self.lengths += n_tokens

    def _make_step(self) -> None:
        """The next step, whose tensors stay where they are until the batch or the cache changes."""
        decode, state = decode_one_token, self.state
        if self.is_static:
            state.positions = torch.zeros(len(self.lengths), 1, device=self.device, dtype=torch.long)
            state.at = torch.zeros(1, device=self.device, dtype=torch.long)
        if self.sampling.compiled:
            decode = compiled_step(self.device.type)
            mark_dynamic_rows(self.cache, state)
        step = partial(decode, self.model, self.cache, state, self.sampling)
        self.step = ReplayedStep(step) if self.is_replayed else step


def mark_dynamic_rows(cache: KVCache, state: DecodeState) -> None:
    """Let batches of any size but 1 share a compiled step."""
    if len(state.ids) > 1:
        for tensor in (state.ids, state.positions, cache.rows, *cache.layers):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        for tensor in (state.uniform, state.drawn, state.logps):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)


def generate_batch(
    model: nn.Module,
    prompts: Sequence[Any],
    sampling: SamplingParams,
    uniform: UniformDraws | None = None,
    any_rank: Callable[[bool], bool] = bool,
    on_token: Callable[[Any], None] | None = None,
) -> list[Completion]:
    """Completions of prompts of any lengths, the `n` of a prompt one after the other.

    Each ends with one of end_ids, or after max_new_tokens. prompts: ids, (T,), or (K, T) of K contexts.
    any_rank: whether something holds on this rank -> whether it holds on any, for sharded models. on_token is called
    with each id of the first completion, or its K ids, but not with one that ends it.
    """
    n_shown = 0
    no_autograd = torch.no_grad() if is_sharded(model) else torch.inference_mode()
    with no_autograd, varying_shapes(), allow_graphs(compiled=sampling.compiled):
        decoder = Decoder(model, prompts, sampling, uniform or uniform_draws(0), any_rank)
        needs_looks = sampling.end_ids or sampling.is_complete or on_token or is_sharded(model)  # ranks go in step
        most = LOOK_EVERY if decoder.is_replayed or not needs_looks else 1
        decoder.prefill()
        while True:
            decoder.look()
            if on_token is not None:
                n_shown = report_tokens(decoder, on_token, n_shown)
            if decoder.num_drawn == sampling.max_new_tokens or not any_rank(decoder.any_active):
                return decoder.completions()
            decoder.retire()
            decoder.slide()
            decoder.decode(most)


def report_tokens(decoder: Decoder, on_token: Callable[[Any], None], start: int) -> int:
    """Call on_token with the first completion's ids from `start` on; how many there are by now."""
    n_tokens = int(decoder.num_tokens[0])
    for ids in decoder.ids[0, start : n_tokens - bool(decoder.ended[0])].tolist():
        on_token(ids if len(ids) > 1 else ids[0])
    return n_tokens
