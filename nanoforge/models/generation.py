"""Generation: a KV cache, prefill and decode, and the choice of the next token.

`generate` continues prompts of one length without end: past block_size the context is cut to its last half and read again, so every token is
drawn from the model's exact output for between half a block and a whole block of context, at a cost of one prefill every half block.
`complete` answers prompts of different lengths, each several times, until an end token.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Cache:
    """Keys and values of all layers, room for block_size tokens allocated once (the model's KVCache).

    Read in slices, attention sees just what is there; read at `spot`, a tensor, all of the room behind a mask, in shapes that
    never change, as a compiled step needs them; read at `places`, (batch, 1), each sequence at its own.
    """

    def __init__(
        self, layers: int, batch: int, heads: int, size: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ):
        self.keys = torch.zeros(layers, batch, heads, size, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.spot = torch.zeros(1, device=device, dtype=torch.long)
        self.length = 0
        self.where: slice | Tensor = slice(0, 0)

    def read(self, tokens: int, still: bool) -> None:
        """The next forward reads so many more tokens, at the spot if `still`."""
        self.where = self.spot.fill_(self.length) if still else slice(self.length, self.length + tokens)
        self.length += tokens

    def read_at(self, places: Tensor, longest: int) -> None:
        """The next forward reads one token of each sequence, at its place, (batch, 1), all below `longest`."""
        self.where, self.length = places, longest

    def take(self, rows: Tensor) -> None:
        """Keep these sequences, in this order, any of them several times."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.where, Tensor) and self.where.dim() == 2:
            rows = torch.arange(len(k), device=k.device)
            self.keys[layer][rows, :, self.where[:, 0]] = k[:, :, 0]
            self.values[layer][rows, :, self.where[:, 0]] = v[:, :, 0]
            return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]
        self.keys[layer][:, :, self.where] = k
        self.values[layer][:, :, self.where] = v
        end = self.where.stop if isinstance(self.where, slice) else self.keys.size(3)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def probabilities(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Of the next ids, (B, V), from logits (B, V), at a temperature above 0. top_k 0, top_p 1 and min_p 0 keep all; what is not kept has 0,
    the rest is in proportion.

    The filters work on the tempered distribution, in this order: top_k; top_p, the smallest set of likeliest ids whose
    probabilities reach p (Holtzman et al. 2020); min_p, ids at least p times as likely as the likeliest (Nguyen et al. 2024).
    """
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / max(temperature, 1e-6)
    if top_k:
        kept = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        late = ordered.cumsum(-1) - ordered >= top_p  # those before it already reach p
        logits = logits.masked_fill(late.scatter(-1, order, late), float("-inf"))
    kept = logits.softmax(-1)
    return kept.masked_fill(kept < min_p * kept.amax(-1, keepdim=True), 0.0) if min_p else kept


def choose(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, generator: torch.Generator
) -> Tensor:
    """Draw one id a row, (B,), from logits (B, V) by their `probabilities`. Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, temperature, top_k, top_p, min_p), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(
    model,
    idx: Tensor,
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    known: list[int] | None = None,
    on_token: Callable[[Tensor], None] = lambda ids: None,
    cached: bool = True,
    compiled: bool = False,
) -> Tensor:
    """Continue idx, (B, T) or (B, K, T) of K contexts, by max_new_tokens ids drawn with `choose`.

    known: of each vocabulary, how many of its first ids may be drawn (padding rows may not); on_token is called with each step's
    new ids, (B,) or (B, K). cached=False computes every step anew: the yardstick of the cache. compiled: the step of one token is
    compiled, and on a GPU replayed as a CUDA graph.
    """
    config = model.config
    block = config.block_size
    dtype, heads = model.compute_dtype, config.n_kv_head or config.n_head

    cache = Cache(config.n_layer, idx.size(0), heads, block, config.n_embd // config.n_head, idx.device, dtype)
    step = model
    if compiled:
        for tensor in (cache.keys, cache.values, cache.spot):
            torch._dynamo.mark_static_address(tensor)
        step = torch.compile(model, dynamic=False, mode="reduce-overhead" if idx.is_cuda else None)
    context = idx[..., -block:]
    unread = context  # tokens of the context that are not in the cache yet
    for _ in range(max_new_tokens):
        if context.size(-1) > block:
            context = unread = context[..., -max(1, block // 2) :]
            cache.length = 0
        if cached:
            still = compiled and unread.size(-1) == 1
            cache.read(unread.size(-1), still)
            logits = (step if still else model)(unread, cache=cache)[:, -1]  # (B, V)
        else:
            logits = model(context)[:, -1]
        drawn = []
        for number, (first, part) in enumerate(model.vocabulary.choices(logits, idx[..., -1])):
            if known is not None:
                part = part[:, : known[number]]
            drawn.append(first + choose(part, temperature, top_k, top_p, min_p, generator))
        unread = torch.stack(drawn, -1).view(*idx.shape[:-1], 1)  # (B, 1) or (B, K, 1)
        idx, context = torch.cat((idx, unread), -1), torch.cat((context, unread), -1)
        on_token(unread[..., 0])
    return idx


class Completion(NamedTuple):
    ids: list[int]  # the end token included
    logps: list[float]  # of each id, among all that the model may give, at the temperature
    ended: bool  # by the end token


@torch.no_grad()
def complete(
    model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end: int | None,
    known: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repeats: int = 1,
    uniform: Callable[[np.ndarray, int], np.ndarray] | None = None,
    anyone: Callable[[bool], bool] = bool,
) -> list[Completion]:
    """Answers of the model to prompts of any lengths, `repeats` to each, those to one prompt following each other. At most max_new_tokens,
    or up to block_size.

    The prompts are read once, together, padded behind: no token sees what is behind it, and what is read later takes the padding's place. Then
    all answers go on token by token, each at its own place; those that are over leave the cache.

    end: the id that ends an answer, one of it; known: how many of the first ids may be drawn; temperature 0 takes the likeliest.
    uniform: (answers' numbers, token) -> numbers in [0, 1) that decide the draws, so that these depend on nothing else; None: random.
    anyone: whether another rank has answers under way, where all must call the model together.
    """
    config, device = model.config, model.wte.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    idx = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        idx[row, : len(prompt)] = torch.tensor(prompt)
    cache = Cache(
        config.n_layer,
        len(prompts),
        config.n_kv_head or config.n_head,
        min(config.block_size, width + max_new_tokens),
        config.n_embd // config.n_head,
        device,
        model.compute_dtype,
    )
    cache.read(width, still=False)
    logits = model(idx.to(device), cache=cache)[torch.arange(len(prompts)), lengths - 1].float()  # (P, V)
    cache.take(torch.arange(len(prompts), device=device).repeat_interleave(repeats))
    logits, place = (
        logits.repeat_interleave(repeats, 0),
        lengths.repeat_interleave(repeats),
    )  # place: of the token to be drawn
    number = np.arange(len(prompts) * repeats)  # of each row of the cache, which answer it is
    room = config.block_size - np.array([len(prompt) for prompt in prompts]).repeat(
        repeats
    )  # tokens that fit behind each answer's prompt
    ids: list[list[int]] = [[] for _ in number]
    logps: list[list[float]] = [[] for _ in number]
    ended, over = np.zeros(len(number), dtype=bool), np.zeros(len(number), dtype=bool)
    for token in range(max_new_tokens):
        logits = logits[:, :known]
        likely = (logits / (temperature or 1.0)).log_softmax(-1)
        if temperature == 0:
            drawn = logits.argmax(-1)
        else:
            kept = probabilities(logits, temperature, top_k, top_p, min_p).cumsum(-1)
            u = torch.rand(len(number)) if uniform is None else torch.from_numpy(uniform(number, token)).float()
            drawn = torch.searchsorted(kept, u.to(device)[:, None] * kept[:, -1:], right=True)[:, 0].clamp(
                max=known - 1
            )
        told = likely.gather(1, drawn[:, None])[:, 0].tolist()
        for row, (answer, new) in enumerate(zip(number.tolist(), drawn.tolist(), strict=True)):
            if over[answer] or token >= room[answer]:
                over[answer] = True
                continue
            ids[answer].append(new)
            logps[answer].append(told[row])
            ended[answer] = over[answer] = new == end
        under_way = np.flatnonzero(~over[number])
        if token + 1 == max_new_tokens or not anyone(len(under_way) > 0):
            break
        if len(under_way) < 0.75 * len(number):
            rows = torch.from_numpy(under_way if len(under_way) else np.zeros(1, dtype=np.int64)).to(
                device
            )  # one at least: other ranks may go on
            cache.take(rows)
            number, drawn, place = number[rows.cpu().numpy()], drawn[rows], place[rows]
        place = place.clamp(max=cache.keys.size(3) - 1)  # of those that are over
        cache.read_at(place[:, None], min(cache.length + 1, cache.keys.size(3)))
        logits = model(drawn[:, None], cache=cache)[:, -1].float()
        place = place + 1
    return [Completion(*answer) for answer in zip(ids, logps, ended.tolist(), strict=True)]
