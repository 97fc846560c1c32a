"""Generation: sampling parameters, a KV cache, and the decoding of many requests together.

Knows nothing of tokenizers, prompts as text, or rewards.

`generate_batch` completes prompts of different lengths, each `n` times, to a token that ends them or to
max_new_tokens: for evaluations and rollouts. `complete` does so for requests, each with its own sampling parameters.
Under both is a `Decoder`, which requests may join and leave at any time (continuous batching, Yu et al. 2022):

    with decoding(model):
        decoder = Decoder(model)
        request = Request(prompt_ids, SamplingParams(max_new_tokens=64, logprobs=3), uniform_draws(seed))
        decoder.join([request])                 # read its prompt; other requests may be in the batch
        while decoder.any_active:
            decoder.advance()                   # draw a token of each request, on a GPU up to LOOK_EVERY tokens
            ...                                 # read request.ids, .logprobs, .top_logprobs; call request.cancel()
        request.finish_reason                   # "end", "stop", "length" or "cancelled"; "": it goes on
        decoder.context_of(request)             # keys and values, for the read_before of a request that begins alike

What a request draws follows from its prompt, its parameters and its random numbers, `uniform(number, token)`; who
shares the batch changes it by rounding alone. Text, and strings that stop it, are text_stream.py's.

The Decoder works as gpt-fast does: the prompts are read together but for their last tokens; `decode_one_token` reads
the last token of every row and draws the next. On CUDA the host looks at what was drawn every LOOK_EVERY tokens only.
Between two looks a step reads and writes tensors at fixed addresses, so it is captured as a CUDA graph and replayed.

Past block_size a context is cut to its last half and read again. Every token is thus drawn with at least half a block
of context, at the cost of one prefill every half block. Virtual tokens of a soft prompt always stay.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoforge import rng
from nanoforge.device import varying_shapes
from nanoforge.distributed import is_sharded
from nanoforge.models.cpu_kernels import find_linears, replace_layers

# ---------------------------------------------------------------------------------------------------------------------
# sampling


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn. The defaults keep every id and never stop early.

    The penalty acts on the logits, as transformers' does: of ids in the prompt or the completion, positive ones are
    divided by it and negative ones multiplied (CTRL, Keskar et al. 2019). The filters act on the tempered distribution
    in this order: top_k; top_p, the smallest set of likeliest ids whose probabilities reach p (Holtzman et al. 2020);
    min_p, ids at least p times as likely as the likeliest one (Nguyen et al. 2024).
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1  # completions of each prompt
    end_ids: tuple[int, ...] = ()  # each ends a completion
    vocab_size: int | None = None  # ids that may be drawn are below it: padding rows are not; None: all
    is_complete: Callable[[list[int]], bool] | None = None  # whether the ids of a completion are enough, without an end
    logps: bool = False  # whether completions have log-probabilities, as training computes them
    logprobs: int | None = None  # how many alternatives to report, beside the log-probability of each id; None: neither
    compiled: bool = False  # whether decode_one_token is compiled


# (numbers of completions, numbers of tokens), which broadcast, -> numbers in [0, 1) that alone decide the draws
UniformDraws = Callable[[np.ndarray, np.ndarray], np.ndarray]


def uniform_draws(*key: int, first: int = 0) -> UniformDraws:
    """Random numbers that are a function of (key, completion, token). first: number of the first completion."""
    return lambda completions, tokens: rng.uniform(*key, completions + first, tokens)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """The logits (B, V) with those of seen ids, (B, V) of bool, made less likely by a repetition penalty above 1."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def logits_to_probs(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Probabilities of the next ids, (B, V), from logits (B, V). What a filter drops has probability 0.

    For temperatures above 0.
    """
    logits = logits.float()
    if sampling.temperature != 1:  # below their largest, for a temperature near 0
        logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-6)
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


def decoding_copy(model: nn.Module, *, streamed: bool = False) -> nn.Module:
    """A model that computes the same, with weights that are cast already, and whose blocks are not compiled: their
    graphs are for training's shapes. All else is shared; without a difference it is the model itself.

    streamed: with faster layers, where the CPU has them.
    """
    dtype: Any = model.compute_dtype
    replaced = set(find_linears(model).values()) if streamed else set()
    read = {  # but for weights that faster layers are made of
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not (module in replaced and name == "weight")
    }
    cast = {id(p): nn.Parameter(p.to(dtype), requires_grad=False) for p in castable_weights(model) if id(p) in read}
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    if not (cast or is_compiled or replaced):
        return model
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared | cast)
    if replaced:
        replace_layers(copied, lambda weight: weight.to(dtype))
    return copied


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

    def append(self, other: "KVCache") -> None:
        """Put the sequences of another cache behind these."""
        size = max(self.size, other.size)
        self.grow(size)
        other.grow(size)
        self.layers = [torch.cat(layers) for layers in zip(self.layers, other.layers, strict=True)]
        self.rows = torch.arange(len(self.layers[0]), device=self.rows.device)[:, None]

    def grow(self, size: int) -> None:
        """Make room for `size` tokens."""
        if size > self.size:
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
# requests


class Completion(NamedTuple):
    ids: list[Any]  # the token that ends it included; of K contexts, K ids each
    logps: list[float]  # of each id among all rows of the head, at the temperature, before any filter: as in training
    ended: bool  # by one of end_ids, not by max_new_tokens
    logprobs: list[Any] = []  # of each id, as the model gives it: temperature 1, before any filter  # noqa: RUF012
    top_logprobs: list[Any] = []  # of each id, the likeliest instead: [(id, log-probability), ...]  # noqa: RUF012


def no_draws(completions: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The random numbers of a greedy completion, which reads none."""
    return np.zeros(np.broadcast_shapes(completions.shape, tokens.shape))


@dataclass(eq=False)
class Request:
    """A completion that is asked for, and what of it is known to the host: what was drawn up to the last look."""

    prompt: Any  # ids: (T,), or (K, T) of K contexts
    sampling: SamplingParams
    uniform: UniformDraws = no_draws
    number: int = 0  # which completion it is for `uniform`
    read_before: "ReadContext | None" = None  # of a request whose prompt may begin alike: that much isn't read again

    ids: list[Any] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    top_logprobs: list[Any] = field(default_factory=list)
    finish_reason: str = ""  # "end": one of end_ids; "stop": is_complete; "length": max_new_tokens; "cancelled"

    def __post_init__(self) -> None:
        self.prompt = np.atleast_2d(np.asarray(self.prompt, dtype=np.int64))  # (K, T)

    @property
    def is_active(self) -> bool:
        return not self.finish_reason

    @property
    def needs_looks(self) -> bool:
        """Whether something but its length may end it."""
        return bool(self.sampling.end_ids) or self.sampling.is_complete is not None

    def cancel(self) -> None:
        """Let it end here, unless it has."""
        self.finish_reason = self.finish_reason or "cancelled"

    def text_ids(self) -> list[Any]:
        """Its ids without the token that ends it."""
        return self.ids[:-1] if self.finish_reason == "end" else self.ids

    def add(self, tokens: "LookedAt", row: int) -> None:
        """Take what was drawn in this row, up to where the completion ends."""
        sampling = self.sampling
        for at, ids in enumerate(tokens.ids[row]):
            if self.finish_reason:
                return
            self.ids.append(ids if len(ids) > 1 else ids[0])
            if sampling.logps:
                self.logps.append(tokens.logps[row][at])
            if sampling.logprobs is not None:
                self._add_logprobs(tokens, row, at)
            if not set(sampling.end_ids).isdisjoint(ids):
                self.finish_reason = "end"
            elif sampling.is_complete is not None and sampling.is_complete(self.ids):
                self.finish_reason = "stop"
            elif len(self.ids) == sampling.max_new_tokens:
                self.finish_reason = "length"

    def _add_logprobs(self, tokens: "LookedAt", row: int, at: int) -> None:
        by_context = []
        for top_ids, top_logprobs in zip(tokens.top_ids[row][at], tokens.top_logprobs[row][at], strict=True):
            top = list(zip(top_ids, top_logprobs, strict=True))[: self.sampling.logprobs]
            by_context.append([(token_id, logprob) for token_id, logprob in top if logprob > -math.inf])
        logprobs = tokens.logprobs[row][at]
        self.logprobs.append(logprobs if len(logprobs) > 1 else logprobs[0])
        self.top_logprobs.append(by_context if len(by_context) > 1 else by_context[0])

    def completion(self) -> Completion:
        return Completion(self.ids, self.logps, self.finish_reason == "end", self.logprobs, self.top_logprobs)


class ReadContext(NamedTuple):
    """What was read of a request, kept for a later one."""

    ids: np.ndarray  # (K, T)
    layers: list[Tensor]  # keys and values, (1, 2 H_kv, T, D) of each layer

    def common_length(self, ids: np.ndarray) -> int:
        """How many tokens of other ids, (K, T), are the same from the start."""
        n = min(self.ids.shape[1], ids.shape[1])
        differs = (self.ids[:, :n] != ids[:, :n]).any(axis=0)
        return int(differs.argmax()) if differs.any() else n


class LookedAt(NamedTuple):
    """What rows have drawn since the last look, by row and token."""

    ids: list[list[list[int]]]  # (R, count, K)
    logps: list[list[float]]  # (R, count)
    logprobs: list[list[list[float]]]  # (R, count, K)
    top_ids: list[list[list[list[int]]]]  # (R, count, K, k)
    top_logprobs: list[list[list[list[float]]]]  # (R, count, K, k)


# ---------------------------------------------------------------------------------------------------------------------
# one step


LOOK_EVERY = 16  # tokens
MAX_GRAPHS = 64  # of a compiled step; beyond them it fails


class RowGroup(NamedTuple):
    """Rows that draw with the same sampling parameters."""

    rows: Any  # their numbers, a tensor; all of them: a slice
    sampling: SamplingParams


@dataclass
class DecodeState:
    """What a step reads and writes beside the cache. R sequences draw K ids each, one for each context.

    Where shapes are static, `positions` and `at` are tensors: a step then needs nothing of the host.
    """

    ids: Tensor  # (R, K) drawn, but not read yet
    uniform: Tensor  # (LOOK_EVERY, R, K) numbers in [0, 1) that decide the draws of a block of tokens
    drawn: Tensor  # (LOOK_EVERY, R, K) the block's ids
    logps: Tensor  # (LOOK_EVERY, R) their log-probabilities, as in training
    positions: Any  # of `ids`: a slice or (R, 1)
    at: Any  # which token of the block is drawn next: a slice or (1,)
    logprobs: Tensor | None  # (LOOK_EVERY, R, K) the model's log-probabilities of the block's ids, if asked for
    top_ids: Tensor | None  # (LOOK_EVERY, R, K, k) the likeliest ids instead
    top_logprobs: Tensor | None  # (LOOK_EVERY, R, K, k)
    seen: Tensor | None  # (R, V) ids that the row has read or drawn, if a repetition penalty needs them

    def advance(self) -> None:
        """To the next token."""
        for name in ("positions", "at"):
            index = getattr(self, name)
            if isinstance(index, Tensor):
                index.add_(1)
            else:
                setattr(self, name, slice(index.start + 1, index.stop + 1))


def draw(model: nn.Module, logits: Tensor, state: DecodeState, groups: Sequence[RowGroup]) -> None:
    """Draw the ids of every row from logits (R, V), into the state."""
    logits = logits.float()
    vocabulary: Any = model.vocabulary
    last_ids = state.ids if state.ids.size(1) > 1 else state.ids[:, 0]
    u = state.uniform[state.at][0]
    for k, (offset, choices) in enumerate(vocabulary.next_token_logits(logits, last_ids)):
        seen = None if state.seen is None else state.seen[:, offset : offset + choices.size(1)]
        drawn = sample_rows(choices, u[:, k], seen, groups)
        torch.add(drawn, offset, out=state.ids[:, k])
        if state.logprobs is not None:
            report_logprobs(choices[:, : groups[0].sampling.vocab_size], drawn, offset, k, state)
    state.drawn[state.at] = state.ids[None]
    if state.seen is not None:
        state.seen.scatter_(1, state.ids, value=True)
    sampling = groups[0].sampling
    if sampling.logps:
        tempered = logits if sampling.temperature in (0, 1) else logits / sampling.temperature
        logps = tempered.log_softmax(-1)
        state.logps[state.at] = logps.gather(1, state.ids).T


def sample_rows(logits: Tensor, u: Tensor, seen: Tensor | None, groups: Sequence[RowGroup]) -> Tensor:
    """An id of each row, (R,), from logits (R, V), u (R,) and seen (R, V), by the parameters of its group."""
    drawn = []
    for rows, sampling in groups:
        choices = logits[rows]
        if seen is not None and sampling.repetition_penalty != 1:
            choices = penalize(choices, seen[rows], sampling.repetition_penalty)
        drawn.append(sample(choices, u[rows], sampling))
    if len(groups) == 1:
        return drawn[0]
    ids = torch.empty_like(u, dtype=torch.long)
    for (rows, _), group_ids in zip(groups, drawn, strict=True):
        ids[rows] = group_ids
    return ids


def report_logprobs(choices: Tensor, drawn: Tensor, offset: int, k: int, state: DecodeState) -> None:
    """Write the log-probabilities of the ids drawn for context k, (R,), and of the likeliest ones, into the state."""
    assert state.logprobs is not None and state.top_ids is not None and state.top_logprobs is not None
    logprobs = choices.log_softmax(-1)  # (R, V)
    state.logprobs[state.at, :, k] = logprobs.gather(1, drawn[:, None]).T
    count = min(state.top_ids.size(-1), logprobs.size(-1))  # a vocabulary may have fewer than are asked for
    if count:
        top = logprobs.topk(count, dim=-1)
        state.top_ids[state.at, :, k, :count] = top.indices[None] + offset
        state.top_logprobs[state.at, :, k, :count] = top.values[None]


def decode_one_token(model: nn.Module, cache: KVCache, state: DecodeState, groups: Sequence[RowGroup]) -> None:
    """Read the last ids of every row and draw the next. It changes the cache and the state, and reads no host."""
    tokens = state.ids[..., None] if state.ids.size(1) > 1 else state.ids  # (R, K, 1) or (R, 1)
    logits = model(tokens, cache=cache, position_ids=state.positions)[:, -1]
    draw(model, logits, state, groups)
    state.advance()


@functools.cache
def compiled_step(device_type: str) -> Callable[..., None]:
    """decode_one_token, compiled: one graph for each size of the cache, which batches greater than 1 share."""
    options: Any = {"coordinate_descent_tuning": True} if device_type == "cuda" else None
    return torch.compile(decode_one_token, fullgraph=True, dynamic=False, options=options)


@contextmanager
def decoding(model: nn.Module, *, compiled: bool = False) -> Iterator[None]:
    """Where a Decoder works: without autograd, with kernels for shapes that vary, and room for compiled graphs: sizes
    of the cache times sampling parameters are more than torch makes of a function by default."""
    no_autograd = torch.no_grad() if is_sharded(model) else torch.inference_mode()
    with no_autograd, varying_shapes():
        if not compiled:
            yield
            return
        with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
            yield


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
    """Decodes many requests together: `join` takes new ones, `advance` draws the next tokens of all.

    A row of the batch is a request; one that has finished stays until enough have. All rows draw a token at each step,
    so the host knows their positions without a look at the device. All requests have the same vocab_size and logps.
    """

    cache: KVCache
    state: DecodeState
    step: Callable[[], None]

    def __init__(self, model: nn.Module, any_rank: Callable[[bool], bool] = bool, *, compiled: bool = False):
        """any_rank: whether something holds on this rank -> whether it holds on any, for sharded models."""
        self.device = device_of(model)
        streamed = self.device.type == "cpu" and not compiled
        self.model = model if is_sharded(model) else decoding_copy(model, streamed=streamed)
        self.any_rank, self.compiled = any_rank, compiled
        self.is_static = self.device.type == "cuda" or compiled
        self.is_replayed = self.device.type == "cuda" and not is_sharded(model)  # no graph has collectives
        config: Any = model.config
        self.block_size: int = config.block_size
        self.vocab_rows = model.get_parameter("wte.weight").size(0)  # ids from here on are virtual tokens
        self.n_contexts = len(config.vocab_sizes) if config.vocabulary == "contexts" else 1

        self.requests: list[Request] = []  # of each row
        self.lengths = np.zeros(0, dtype=np.int64)  # (R,) tokens of each row's context, its last ids included
        self.num_drawn = 0  # tokens of the block, of each row
        self.num_looked = 0  # of these, before the last look

    @property
    def any_active(self) -> bool:
        return any(request.is_active for request in self.requests)

    def active_rows(self) -> np.ndarray:
        """(R,) of bool."""
        return np.array([request.is_active for request in self.requests], dtype=bool)

    def join(self, requests: Sequence[Request]) -> None:
        """Read the prompts of requests but for their last tokens, and put them into the batch. A prompt that several
        share, as one array, is read once; one whose beginning was read before goes in by itself."""
        self.look()
        new = [request for request in requests if request.read_before is None]
        for group in ([new] if new else []) + [[request] for request in requests if request.read_before is not None]:
            self._join(group)

    def _join(self, requests: Sequence[Request]) -> None:
        # 1. Read the end of each prompt that fits the context.
        prompts = {id(request.prompt): request.prompt for request in requests}
        row_of_prompt = {key: row for row, key in enumerate(prompts)}
        prompt_of_row = [row_of_prompt[id(request.prompt)] for request in requests]
        contexts = [cut_context(prompt, self.block_size, self.vocab_rows, halve=False) for prompt in prompts.values()]
        lengths = np.array([context.shape[-1] for context in contexts])[prompt_of_row]
        most = max(int(n) + request.sampling.max_new_tokens for n, request in zip(lengths, requests, strict=True))
        cache = self._read([context[:, :-1] for context in contexts], most, requests[0].read_before)
        ids = torch.from_numpy(np.stack([context[:, -1] for context in contexts])).to(self.device)  # (P, K)
        if prompt_of_row != list(range(len(prompts))):
            rows = torch.tensor(prompt_of_row, device=self.device)
            cache.select(rows)
            ids = ids[rows]

        # 2. The new rows take the places of those that have finished.
        if self.any_active:
            self._keep(np.flatnonzero(self.active_rows()))
            self.cache.append(cache)
            self._set_rows(
                [*self.requests, *requests], np.concatenate((self.lengths, lengths)), torch.cat((self.state.ids, ids))
            )
        else:
            self.cache = cache
            self._set_rows(list(requests), lengths, ids)

    def advance(self, *, look_often: bool = False) -> None:
        """Draw the next tokens of every request, and look at them: as many as can be drawn before a look is due.

        look_often: one, unless a look waits for a device.
        """
        self.retire()
        self.slide()
        look_often = look_often or is_sharded(self.model) or any(request.needs_looks for request in self.requests)
        self.decode(LOOK_EVERY if self.is_replayed or not look_often else 1)
        self.look()

    def retire(self) -> None:
        """Drop finished rows from the batch once they are more than a quarter of it. In static shapes the batch is
        halved, so there are few."""
        active = self.active_rows()
        n_kept = len(active)
        n_active = max(1, int(active.sum()))  # one at least: other ranks may go on
        if self.is_static:
            while n_active <= n_kept // 2 > 1:  # a batch of 1 would be compiled by itself
                n_kept //= 2
        elif n_active < MIN_ACTIVE * n_kept:
            n_kept = n_active
        if n_kept < len(active):
            self._keep(np.sort((~active).argsort(kind="stable")[:n_kept]))
            self._set_rows(self.requests, self.lengths, self.state.ids)

    def slide(self) -> None:
        """Cut the contexts that are full to their last half, and read all but their last ids."""
        active = self.active_rows()
        full = np.flatnonzero((self.lengths > self.block_size) & active)
        if self.any_rank(len(full) > 0):
            contexts = []
            for row in full:
                request = self.requests[row]
                text = np.concatenate(
                    (request.prompt, np.array(request.ids, dtype=np.int64).reshape(-1, self.n_contexts).T), axis=1
                )
                contexts.append(cut_context(text, self.block_size, self.vocab_rows, halve=True))
            none = np.zeros((self.n_contexts, 0), dtype=np.int64)  # other ranks read theirs
            cache = self._read([context[:, :-1] for context in contexts] or [none])
            if len(full):
                self.cache.replace(torch.from_numpy(full).to(self.device), cache)
                self.lengths[full] = [context.shape[-1] for context in contexts]
        # What finished rows draw is not kept: they go no further than the others.
        self.lengths[~active] = np.minimum(self.lengths[~active], max(self.lengths[active], default=1))

    def decode(self, most: int) -> None:
        """Read the last ids of every row and draw the next, at most so many times without a look."""
        if self.num_drawn == LOOK_EVERY:
            self._begin_block()
        at = self.num_drawn
        n_left = [r.sampling.max_new_tokens - len(r.ids) for r in self.requests if r.is_active]
        longest = int(self.lengths.max())
        n_steps = min(most, LOOK_EVERY - at, max(n_left, default=1), self.block_size - longest + 1)

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
        self.num_drawn += n_steps
        self.lengths += n_steps

    def look(self) -> None:
        """Wait for the device, and give every request what it has drawn since the last look, to its end."""
        if self.num_looked == self.num_drawn:
            return
        new = slice(self.num_looked, self.num_drawn)
        self.num_looked = self.num_drawn
        state = self.state
        kept = (state.drawn, state.logps, state.logprobs, state.top_ids, state.top_logprobs)
        tokens = LookedAt(*([] if tensor is None else tensor[new].transpose(0, 1).tolist() for tensor in kept))
        for row, request in enumerate(self.requests):
            request.add(tokens, row)

    def context_of(self, request: Request) -> ReadContext | None:
        """What has been read of a request, for the `read_before` of later ones: to be asked for before the batch
        advances again. None: its context was cut."""
        ids = np.concatenate(
            (request.prompt, np.array(request.ids, dtype=np.int64).reshape(-1, self.n_contexts).T), axis=1
        )[:, :-1]
        if ids.shape[1] > self.block_size or request not in self.requests:
            return None
        row = self.requests.index(request)
        return ReadContext(ids, [layer[row : row + 1, :, : ids.shape[1]].clone() for layer in self.cache.layers])

    def _read(self, contexts: Sequence[np.ndarray], length: int = 0, read_before: ReadContext | None = None) -> KVCache:
        """Read contexts, (K, T), into a new cache. length: that contexts will reach; read_before: of the only one.

        They are one batch, padded on the right: causal attention never reads the padding, and later tokens replace it.
        """
        width = max(1, *(context.shape[1] for context in contexts))
        padded = np.zeros((len(contexts), self.n_contexts, width), dtype=np.int64)
        for row, context in enumerate(contexts):
            padded[row, :, : context.shape[1]] = context
        idx = torch.from_numpy(padded).to(self.device)
        size = round_up(width + 1) if self.is_static else max(width, min(self.block_size, length))
        cache = KVCache(self.model, len(contexts), size)
        idx = idx if self.n_contexts > 1 else idx[:, 0]
        n_known = read_before.common_length(contexts[0]) if read_before is not None else 0
        if read_before is not None and n_known:
            for layer, known in zip(cache.layers, read_before.layers, strict=True):
                layer[:, :, :n_known] = known[:, :, :n_known]
            cache.advance(n_known)
        if n_known < width:
            unread = idx[..., n_known:]
            positions = cache.advance(width - n_known)
            self.model(unread, cache=cache, position_ids=positions, logits_at=slice(0))  # no logits are needed
        return cache

    def _keep(self, kept: np.ndarray) -> None:
        """Keep these rows of the batch."""
        if len(kept) == len(self.requests):
            return
        rows = torch.from_numpy(kept).to(self.device)
        self.cache.select(rows)
        self.state.ids = self.state.ids[rows]
        self.requests = [self.requests[row] for row in kept]
        self.lengths = self.lengths[kept]

    def _set_rows(self, requests: list[Request], lengths: np.ndarray, ids: Tensor) -> None:
        """Begin a block of tokens with these rows, of which all that was drawn is known."""
        self.requests, self.lengths = requests, lengths
        self.groups = group_rows(requests, self.device)
        block = (LOOK_EVERY, len(requests))
        asked = [request.sampling.logprobs for request in requests if request.sampling.logprobs is not None]
        zeros = partial(torch.zeros, device=self.device)
        contexts = (*block, self.n_contexts)
        top = (*contexts, max(asked, default=0))
        self.state = DecodeState(
            ids=ids,
            uniform=zeros(contexts),
            drawn=zeros(contexts, dtype=torch.long),
            logps=zeros(block),
            positions=slice(0),
            at=slice(0, 1),
            logprobs=zeros(contexts) if asked else None,
            top_ids=zeros(top, dtype=torch.long) if asked else None,
            top_logprobs=zeros(top) - math.inf if asked else None,
            seen=self._seen(),
        )
        self._begin_block()
        self._make_step()

    def _seen(self) -> Tensor | None:
        """(R, V): which ids each row has read or drawn, if a repetition penalty needs them."""
        if all(request.sampling.repetition_penalty == 1 for request in self.requests):
            return None
        seen = np.zeros((len(self.requests), self.vocab_rows), dtype=bool)
        for row, request in enumerate(self.requests):
            ids = np.concatenate((request.prompt.ravel(), np.array(request.ids, dtype=np.int64).ravel()))
            seen[row, ids[ids < self.vocab_rows]] = True
        return torch.from_numpy(seen).to(self.device)

    def _begin_block(self) -> None:
        """The random numbers that decide the next LOOK_EVERY tokens of each row."""
        self.num_drawn = self.num_looked = 0
        rows_of: dict[UniformDraws, list[int]] = {}  # many rows share their numbers' function
        for row, request in enumerate(self.requests):
            if request.sampling.temperature:
                rows_of.setdefault(request.uniform, []).append(row)
        if not rows_of:
            return
        u = np.zeros((LOOK_EVERY, len(self.requests), self.n_contexts))
        for uniform, rows in rows_of.items():
            numbers = np.array([self.requests[row].number for row in rows])[:, None] * self.n_contexts
            tokens = np.arange(LOOK_EVERY)[:, None] + [len(self.requests[row].ids) for row in rows]  # (LOOK_EVERY, r)
            u[:, rows] = uniform(numbers + np.arange(self.n_contexts), tokens[..., None])
        self.state.uniform.copy_(torch.from_numpy(u))

    def _make_step(self) -> None:
        """The next step, whose tensors stay where they are until the batch or the cache changes."""
        decode, state = decode_one_token, self.state
        if self.is_static:
            state.positions = torch.zeros(len(self.lengths), 1, device=self.device, dtype=torch.long)
            state.at = torch.zeros(1, device=self.device, dtype=torch.long)
        if self.compiled:
            decode = compiled_step(self.device.type)
            mark_dynamic_rows(self.cache, state)
        step = partial(decode, self.model, self.cache, state, self.groups)
        self.step = ReplayedStep(step) if self.is_replayed else step


def group_rows(requests: Sequence[Request], device: torch.device) -> tuple[RowGroup, ...]:
    """The rows by the sampling parameters that decide a draw."""
    rows_of: dict[tuple[Any, ...], list[int]] = {}
    for row, request in enumerate(requests):
        sampling = request.sampling
        key = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
        rows_of.setdefault(key, []).append(row)
    if len(rows_of) == 1:
        return (RowGroup(slice(None), requests[0].sampling),)
    return tuple(RowGroup(torch.tensor(rows, device=device), requests[rows[0]].sampling) for rows in rows_of.values())


def mark_dynamic_rows(cache: KVCache, state: DecodeState) -> None:
    """Let batches of any size but 1 share a compiled step."""
    by_row = (state.ids, state.positions, cache.rows, *cache.layers, state.seen)
    by_token = (state.uniform, state.drawn, state.logps, state.logprobs, state.top_ids, state.top_logprobs)
    if len(state.ids) == 1:
        return
    for dimension, tensors in enumerate((by_row, by_token)):
        for tensor in tensors:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def complete(
    model: nn.Module,
    requests: Sequence[Request],
    any_rank: Callable[[bool], bool] = bool,
    on_token: Callable[[Any], None] | None = None,
    *,
    compiled: bool = False,
) -> None:
    """Draw requests to their ends. on_token is called with each id of the first one, but not with one that ends it."""
    with decoding(model, compiled=compiled):
        run(Decoder(model, any_rank, compiled=compiled), requests, on_token)


def run(decoder: Decoder, requests: Sequence[Request], on_token: Callable[[Any], None] | None) -> None:
    """As `complete`, with a decoder that has no other requests."""
    n_shown = 0
    decoder.join(requests)
    while decoder.any_rank(decoder.any_active):
        decoder.advance(look_often=on_token is not None)
        if on_token is not None:
            shown = requests[0].text_ids()
            for ids in shown[n_shown:]:
                on_token(ids)
            n_shown = len(shown)


class Engine(Protocol):
    """What completes requests: this module, or llama.cpp."""

    def complete(self, requests: Sequence[Request], on_token: Callable[[Any], None] | None = None) -> None:
        """Draw requests to their ends, as the function of this name."""


class TorchEngine:
    """Completes requests again and again. A single one is read from where it differs from the single one before."""

    def __init__(self, model: nn.Module, *, compiled: bool = False):
        self.decoder = Decoder(model, compiled=compiled)
        self.read_before: ReadContext | None = None

    def complete(self, requests: Sequence[Request], on_token: Callable[[Any], None] | None = None) -> None:
        """As the function of this name. What was read for a single one is kept, also when on_token raises."""
        with decoding(self.decoder.model, compiled=self.decoder.compiled):
            if len(requests) > 1:
                run(self.decoder, requests, on_token)
                return
            (request,) = requests
            request.read_before = self.read_before
            try:
                run(self.decoder, requests, on_token)
            finally:
                request.cancel()  # if it did not end
                self.read_before = self.decoder.context_of(request) or self.read_before


def generate_batch(
    model: nn.Module,
    prompts: Sequence[Any],
    sampling: SamplingParams,
    uniform: UniformDraws | None = None,
    any_rank: Callable[[bool], bool] = bool,
    on_token: Callable[[Any], None] | None = None,
) -> list[Completion]:
    """Completions of prompts of any lengths, the `n` of a prompt one after the other, as `complete` draws them.

    prompts: ids, (T,), or (K, T) of K contexts.
    """
    requests = make_requests(prompts, sampling, uniform or uniform_draws(0))
    complete(model, requests, any_rank, on_token, compiled=sampling.compiled)
    return [request.completion() for request in requests]


def make_requests(prompts: Sequence[Any], sampling: SamplingParams, uniform: UniformDraws) -> list[Request]:
    """`n` requests of each prompt, which share it, numbered in turn."""
    requests: list[Request] = []
    for prompt in prompts:
        ids = np.atleast_2d(np.asarray(prompt, dtype=np.int64))
        for _ in range(sampling.n):
            requests.append(Request(ids, sampling, uniform, number=len(requests)))
    return requests
