"""Generation: a KV cache, prefill and decode, and the choice of the next token.

Past block_size the context is cut to its last half and read again, so every token is drawn from the model's exact output for between
half a block and a whole block of context, at a cost of one prefill every half block.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Cache:
    """Keys and values of all layers, room for block_size tokens allocated once (the model's KeyValueCache).

    Read in slices, attention sees just what is there; read at `spot`, a tensor, all of the room behind a mask, in shapes that
    never change, as a compiled step needs them.
    """

    def __init__(self, layers: int, batch: int, heads: int, size: int, head_dim: int, device: torch.device, dtype: torch.dtype):
        self.keys = torch.zeros(layers, batch, heads, size, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.spot = torch.zeros(1, device=device, dtype=torch.long)
        self.length = 0
        self.where: slice | Tensor = slice(0, 0)

    def read(self, tokens: int, still: bool) -> None:
        """The next forward reads so many more tokens, at the spot if `still`."""
        self.where = self.spot.fill_(self.length) if still else slice(self.length, self.length + tokens)
        self.length += tokens

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer][:, :, self.where] = k
        self.values[layer][:, :, self.where] = v
        end = self.where.stop if isinstance(self.where, slice) else self.keys.size(3)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, generator: torch.Generator) -> Tensor:
    """Draw one id a row, (B,), from logits (B, V). Temperature 0 takes the likeliest; top_k 0, top_p 1 and min_p 0 keep all.

    The filters work on the tempered distribution, in this order: top_k; top_p, the smallest set of likeliest ids whose
    probabilities reach p (Holtzman et al. 2020); min_p, ids at least p times as likely as the likeliest (Nguyen et al. 2024).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / max(temperature, 1e-6)
    if top_k:
        kept = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    if top_p < 1:
        probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        late = probabilities.cumsum(-1) - probabilities >= top_p  # those before it already reach p
        logits = logits.masked_fill(late.scatter(-1, order, late), float("-inf"))
    probabilities = logits.softmax(-1)
    if min_p:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0.0)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


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
