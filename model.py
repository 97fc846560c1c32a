"""The GPT, whole: token ids in, logits or per-token losses out. Knows nothing of data, training or files.

The default is GPT-2's architecture (Radford et al. 2019). Variants are entries of the dicts NORMS, ACTIVATIONS, POSITIONS, MLPS
and VOCABULARIES, or plain numbers; they are chosen in `__init__` and never asked about in `forward`.

Weights are kept in float32; every layer casts its own to the dtype of the activations, which `GPT.compute_dtype` sets at the
embedding. So there is no autocast, and the residual stream itself is in bfloat16 when the products are.

Shapes: B sequences, T tokens, C = n_embd, H = n_head, D = C / H, V = sum of the vocabularies, K contexts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanoforge.distributed import shard_like
from nanoforge.errors import UserError, did_you_mean


@dataclass(frozen=True)
class GPTConfig:
    """The model's shape; names and meanings are those of the argument table."""

    vocab_sizes: tuple[int, ...] = (50257,)  # one, or one for each context or dataset: V is their sum
    vocabulary: str = "one"
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0
    n_embd: int = 768
    bias: bool = True
    norm: str = "layernorm"
    position: str = "learned"
    rope_base: float = 10000.0
    activation: str = "gelu"
    mlp: str = "plain"
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    window: str = "L"
    window_size: int = 0
    logit_softcap: float = 0.0
    embedding_norm: bool = False
    value_residual: bool = False
    residual_scalars: bool = False
    tie_weights: bool = True
    zero_init: bool = False
    dropout: float = 0.0
    activation_checkpointing: bool = False
    loss_chunk: int = 0

    @classmethod
    def from_args(cls, values: object, **more) -> "GPTConfig":
        """The fields that an arguments object has by the same names, and `more`."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: getattr(values, name) for name in names if hasattr(values, name)} | more)


class Cache(Protocol):
    """What attention asks of a cache (nanoforge/models/generation.py has one)."""

    def update(self, layer: int, k: Tensor, v: Tensor, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v, (B, H_kv, T, D), of a layer at `positions`; the layer's keys and values to attend to, (B, H_kv, S, D)."""


# ---------------------------------------------------------------------------------------------------------------------
# linear layers and norms that cast their float32 weights to the activations' dtype


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias (Ba et al. 2016)."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x, self.weight.shape, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype), 1e-5
        )


class RMSNormCPU(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) in half the passes over memory, and half the time, that torch's rms_norm takes on CPUs."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        mean_square = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
            .square_()
            .div_(x.size(-1))
        )
        scale = mean_square.add_(eps).rsqrt_().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        return torch.addcmul(grad, y, (grad * y).mean(-1, keepdim=True), value=-1) * scale, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a learned gain if asked (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, gain: bool):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        y = RMSNormCPU.apply(x, 1e-5) if x.device.type == "cpu" else F.rms_norm(x, (self.width,), eps=1e-5)
        return y if self.weight is None else y * self.weight.to(x.dtype)


NORMS = {
    "layernorm": LayerNorm,
    "rmsnorm": lambda width, bias: RMSNorm(width, gain=True),
    "rmsnorm_nogain": lambda width, bias: RMSNorm(width, gain=False),
}

# ---------------------------------------------------------------------------------------------------------------------
# positions: `embed` adds to the token embeddings, `rotate` turns queries and keys


class Position(nn.Module):
    """None at all; the others override what they do."""

    def __init__(self, config: GPTConfig):
        super().__init__()

    def embed(self, x: Tensor, where: slice | Tensor) -> Tensor:  # x: (B, T, C), at positions `where`
        return x

    def rotate(self, q: Tensor, where: slice | Tensor) -> Tensor:  # q: (B, heads, T, D)
        return q


class LearnedPosition(Position):
    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.block_size, config.n_embd))

    def embed(self, x: Tensor, where: slice | Tensor) -> Tensor:
        return x + self.weight[where].to(x.dtype)


class RotaryPosition(Position):
    """Rotary embedding (Su et al. 2021); the halves of a head are the pairs, as in GPT-NeoX and Llama."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        D = config.n_embd // config.n_head
        frequency = config.rope_base ** (-torch.arange(0, D, 2).float() / D)
        angle = torch.outer(torch.arange(config.block_size).float(), frequency)  # (block_size, D / 2)
        self.register_buffer("cos", torch.cat((angle.cos(), angle.cos()), dim=1), persistent=False)  # (block_size, D)
        self.register_buffer("sin", torch.cat((-angle.sin(), angle.sin()), dim=1), persistent=False)

    def rotate(self, q: Tensor, where: slice | Tensor) -> Tensor:
        cos, sin = self.cos[where].to(q.dtype).unsqueeze(-3), self.sin[where].to(q.dtype).unsqueeze(-3)
        return torch.addcmul(
            q * cos, q.roll(q.size(-1) // 2, dims=-1), sin
        )  # the halves (a, b) to (a cos - b sin, a sin + b cos)


POSITIONS = {"learned": LearnedPosition, "rope": RotaryPosition, "none": Position}

# ---------------------------------------------------------------------------------------------------------------------
# attention and MLP

ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021
}


def activation(name: str):
    """An entry of ACTIVATIONS or a function of torch.nn.functional that maps a tensor to one of its shape. Raises UserError."""
    function = ACTIVATIONS.get(name) or getattr(F, name, None)
    try:
        assert not name.startswith("_") and function(torch.zeros(2, 4)).shape == (2, 4)
    except Exception:
        near = did_you_mean(name, [*ACTIVATIONS, *(n for n in dir(F) if n[0].islower())])
        raise UserError(
            f"--activation={name}: not an activation of torch.nn.functional, nor {' or '.join(ACTIVATIONS)}{near}"
        ) from None
    return function


def seen(queries: Tensor, keys: Tensor, span: int) -> Tensor:
    """Which keys queries see, by their positions: those of the last `span`, their own included; (..., queries, keys)."""
    distance = queries[..., None] - keys
    return (distance >= 0) & (distance < span)


def visible(where: slice | Tensor, S: int, span: int, device: torch.device) -> Tensor:
    """Which of S keys the queries at positions `where` see: (T, S), or of sequences that differ (B, 1, T, S).

    Keys are at the positions from 0 on, but where `where` is as long as they are: then it is theirs too, and starts again at 0 with every
    document of a packed sequence, which sees itself alone.
    """
    keys = torch.arange(S, device=device)
    if isinstance(where, Tensor) and where.dim() == 2 and where.size(1) == S:
        return (seen(keys, keys, span) & (where[:, :, None] - where[:, None, :] == keys[:, None] - keys))[:, None]
    mask = seen(keys[where] if isinstance(where, slice) else where, keys, span)
    return mask[:, None] if mask.dim() == 3 else mask


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, span: int, dropout: float, chunk: int = 128) -> Tensor:
    """Causal attention of q (B, H, T, D) to the last `span` of k, v (B, H_kv, T, D): each chunk of queries against just the keys that
    it reaches. The probabilities are kept for backward, so memory grows with T x span."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    q, T, places = q * q.size(-1) ** -0.5, q.size(2), torch.arange(q.size(2), device=q.device)
    out = []
    for first in range(0, T, chunk):
        last, start = min(T, first + chunk), max(0, first - span + 1)
        hidden = q.new_zeros(()).where(seen(places[first:last], places[start:last], span), -math.inf)
        scores = q[:, :, first:last] @ k[:, :, start:last].mT + hidden  # (B, H, queries, keys)
        out.append(F.dropout(scores.softmax(-1), dropout, dropout > 0) @ v[:, :, start:last])
    return torch.cat(out, dim=2)


class Attention(nn.Module):
    """Causal self-attention with grouped heads, sliding window and cache."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.fused = [
            heads * self.head_dim for heads in (self.n_head, self.n_kv_head, self.n_kv_head)
        ]  # rows of q, k, v
        self.qkv = Linear(config.n_embd, sum(self.fused), bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.normalise = RMSNorm(self.head_dim, gain=False) if config.qk_norm else nn.Identity()
        self.dropout = config.dropout
        self.first_values = (
            nn.Parameter(torch.empty(1)) if config.value_residual and layer else None
        )  # their part in this layer's

        short = config.window[layer % len(config.window)] == "S"
        self.span = (
            min(config.block_size, config.window_size or max(1, config.block_size // 2)) if short else config.block_size
        )
        self.full = self.span == config.block_size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, where: slice | Tensor) -> Tensor:
        """Of queries at positions `where` to keys from 0 on: (B, heads, T, D)."""
        T, S, dropout = q.size(2), k.size(2), self.dropout if self.training else 0.0
        if (
            q.device.type == "cpu"
            and q.dtype == torch.bfloat16
            and 1 < T == S
            and T * self.span <= 2**20
            and isinstance(where, slice)
        ):
            return chunked_attention(
                q, k, v, self.span, dropout
            )  # scaled_dot_product_attention's backward is 2 to 4 times as slow there
        plain = (
            self.full and isinstance(where, slice) and T in (1, S)
        )  # a whole square is causal, one new token sees every key
        mask = None if plain else visible(where, S, self.span, q.device)
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=plain and T > 1, enable_gqa=self.n_kv_head != self.n_head
        )

    def forward(
        self, x: Tensor, first: Tensor | None, position: Position, where: slice | Tensor, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """first: the first layer's values, None in that layer itself; they come back beside the output."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in self.qkv(x).split(self.fused, dim=-1)
        )  # (B, heads, T, D)
        q, k = position.rotate(self.normalise(q), where), position.rotate(self.normalise(k), where)
        if self.first_values is not None:  # Zhou et al. 2024
            v = torch.lerp(v, first, self.first_values.to(v.dtype))
        first = v if first is None else first
        if cache is not None:
            k, v = cache.update(self.layer, k, v, where)
        y = self.proj(self.attend(q, k, v, where).transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training), first


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        hidden = round(config.mlp_ratio * config.n_embd)
        self.up = Linear(config.n_embd, hidden, bias=config.bias)
        self.proj = Linear(hidden, config.n_embd, bias=config.bias)
        self.activation = activation(config.activation)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.proj(self.activation(self.up(x))), self.dropout, self.training)


class GatedMLP(MLP):
    """One half of the hidden layer gates the other (Shazeer 2020); --mlp_ratio=2.667 has as many parameters as a plain one."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.gate = Linear(self.up.in_features, self.up.out_features, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.proj(self.activation(self.gate(x)) * self.up(x)), self.dropout, self.training)


MLPS = {"plain": MLP, "gated": GatedMLP}


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.norm_1 = NORMS[config.norm](config.n_embd, config.bias)
        self.attn = Attention(config, layer)
        self.norm_2 = NORMS[config.norm](config.n_embd, config.bias)
        self.mlp = MLPS[config.mlp](config)
        self.scales = (
            nn.Parameter(torch.empty(2)) if config.residual_scalars else None
        )  # of the stream and of the embedding

    def forward(self, x: Tensor, x0: Tensor, first: Tensor | None, *place) -> tuple[Tensor, Tensor]:
        """The stream x (B, T, C) and the first layer's values, from the stream, the embedding x0, and these values; `place` is the attention's."""
        if self.scales is not None:
            x = self.scales[0].to(x.dtype) * x + self.scales[1].to(x.dtype) * x0
        y, first = self.attn(self.norm_1(x), first, *place)
        x = x + y
        return x + self.mlp(self.norm_2(x)), first


class CheckpointedBlock(Block):
    """Keeps its input alone and computes the rest again in backward (Chen et al. 2016)."""

    def forward(self, *inputs) -> tuple[Tensor, Tensor]:
        return checkpoint(super().forward, *inputs, use_reentrant=False)


# ---------------------------------------------------------------------------------------------------------------------
# vocabularies: ids of all of them share one embedding and one head; the rows of each follow those of the one before


class OneVocabulary:
    """One softmax over all rows. ids: (B, T)."""

    def __init__(self, sizes: tuple[int, ...]):
        self.sizes = sizes
        self.firsts = [sum(sizes[:i]) for i in range(len(sizes))]  # first row of each vocabulary

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings of the ids, (*ids.shape, C), to the stream (B, T, C)."""
        return x

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each target, float32, in the shape of targets; logits: (B, T, V)."""
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)

    def next_token_logits(self, logits: Tensor, last: Tensor) -> list[tuple[int, Tensor]]:
        """For each next token to draw: (first row, logits (B, size)); logits: (B, V), last: the ids before it, (B,) or (B, K)."""
        return [(0, logits)]


class ContextVocabularies(OneVocabulary):
    """Aligned contexts: embeddings are summed, each context has a softmax of its own. ids: (B, K, T)."""

    def embed(self, x: Tensor) -> Tensor:
        return x.sum(dim=1)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        parts = zip(logits.split(self.sizes, dim=-1), targets.unbind(1), self.firsts, strict=True)
        return torch.stack(
            [super(ContextVocabularies, self).losses(part, target - first) for part, target, first in parts], dim=1
        )

    def next_token_logits(self, logits: Tensor, last: Tensor) -> list[tuple[int, Tensor]]:
        return list(zip(self.firsts, logits.split(self.sizes, dim=-1), strict=True))


class SeparateVocabularies(OneVocabulary):
    """Each dataset has rows and a softmax of its own: the rows of other datasets are masked. ids: (B, T)."""

    def masked(self, logits: Tensor, ids: Tensor) -> Tensor:
        row = torch.arange(logits.size(-1), device=logits.device)
        owner_of_row, owner = (
            sum((x >= first).long() for first in self.firsts[1:]) for x in (row, ids)
        )  # which dataset's
        return logits.masked_fill(owner[..., None] != owner_of_row, -math.inf)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().losses(self.masked(logits, targets), targets)

    def next_token_logits(self, logits: Tensor, last: Tensor) -> list[tuple[int, Tensor]]:
        return [(0, self.masked(logits, last))]


VOCABULARIES = {"one": OneVocabulary, "contexts": ContextVocabularies, "separate": SeparateVocabularies}

# ---------------------------------------------------------------------------------------------------------------------
# bounded logits, and a loss that never holds all logits


def softcap(bound: float):
    """z -> c z / sqrt(z^2 + c^2): smooth, within (-c, c), slope 1 at 0."""
    return lambda z: bound * z.float() * torch.rsqrt(z.float().square() + bound**2)


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of each target (B, T), float32, from x (B, T, C) and the head (V, C): the logits of `chunk` tokens at a time, made
    once more in backward, so that memory grows with chunk x V instead of B x T x V. bound: of the softcap, 0 for none."""

    @staticmethod
    def logits(x: Tensor, head: Tensor, bound: float) -> tuple[Tensor, Tensor | float]:
        """(logits, their slope by the products), float32."""
        z = (x @ head.T).float()
        if not bound:
            return z, 1.0
        shrink = torch.rsqrt(z.square() + bound**2)
        return bound * z * shrink, bound**3 * shrink**3

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, bound: float, chunk: int) -> Tensor:
        ctx.save_for_backward(x, head, targets)
        ctx.bound, ctx.chunk = bound, chunk
        rows = zip(x.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
        weight = head.to(x.dtype)
        return torch.cat(
            [
                F.cross_entropy(ChunkedLoss.logits(part, weight, bound)[0], target, reduction="none")
                for part, target in rows
            ]
        ).view_as(targets)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, head, targets = ctx.saved_tensors
        weight, into_x, into_head = head.to(x.dtype), [], torch.zeros_like(head)
        for part, target, g in zip(
            *(t.split(ctx.chunk) for t in (x.flatten(0, 1), targets.flatten(), grad.flatten())), strict=True
        ):
            logits, slope = ChunkedLoss.logits(part, weight, ctx.bound)
            error = logits.softmax(-1)
            error[torch.arange(len(target), device=target.device), target] -= 1.0
            error = (error * slope * g[:, None]).to(x.dtype)  # (chunk, V)
            into_x.append(error @ weight)
            into_head += error.T @ part
        return torch.cat(into_x).view_as(x), into_head, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    compute_dtype = torch.float32  # of activations and matrix products

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        V = sum(config.vocab_sizes)
        block = CheckpointedBlock if config.activation_checkpointing else Block
        self.vocabulary = VOCABULARIES[config.vocabulary](config.vocab_sizes)
        self.wte = nn.Embedding(V, config.n_embd)
        self.position = POSITIONS[config.position](config)
        self.embedding_norm = RMSNorm(config.n_embd, gain=False) if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.n_layer))
        self.norm = NORMS[config.norm](config.n_embd, config.bias)
        self.head = Linear(config.n_embd, V, bias=False)
        if config.tie_weights:
            self.head.weight = self.wte.weight
        self.softcap = softcap(config.logit_softcap) if config.logit_softcap else nn.Identity()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial weights.

        | what                                  | drawn from                                          |
        |---------------------------------------|-----------------------------------------------------|
        | linear layers, token embedding, head  | N(0, 0.02)                                          |
        | learned positions                     | N(0, 0.02)                                          |
        | output projections of attention, MLP  | N(0, 0.02 / sqrt(2 n_layer)), or 0 with zero_init   |
        | untied head                           | N(0, 0.02), or 0 with zero_init                     |
        | biases; gains of norms                | 0; 1                                                |
        | scales of the stream; of the embedding| 1; 0                                                |
        | the first layer's part in the values  | 1/2                                                 |
        """
        scale = 0.0 if self.config.zero_init else 1.0
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("scales"):
                parameter.copy_(torch.tensor([1.0, 0.0]))
            elif name.endswith("first_values"):
                parameter.fill_(0.5)
            elif parameter.dim() < 2:
                parameter.fill_(1.0)
            elif name.endswith("proj.weight"):
                parameter.normal_(0, 0.02 / math.sqrt(2 * self.config.n_layer)).mul_(scale)
            else:
                parameter.normal_(0, 0.02).mul_(scale if name == "head.weight" else 1.0)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        position_ids: slice | Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Logits (B, T, V), or with targets the loss of each of them, float32 and in their shape, of the logits over the temperature.

        idx, targets: ids, (B, T), or (B, K, T) of K contexts, at positions below block_size: from 0 on, or at position_ids: with a cache a slice, (1,) or (B, 1)
        (see KVCache), and of documents packed one after the other (B, T), which start again at 0 with each.
        """
        where = slice(0, idx.size(-1)) if position_ids is None else position_ids
        x = self.vocabulary.embed(self.wte(idx).to(self.compute_dtype))  # (B, T, C)
        x = x0 = F.dropout(self.embedding_norm(self.position.embed(x, where)), self.config.dropout, self.training)
        first = None
        for block in self.blocks:
            x, first = block(x, x0, first, self.position, where, cache)
        x = self.norm(x)
        if targets is not None and self.config.loss_chunk:
            return ChunkedLoss.apply(x, self.head.weight, targets, self.config.logit_softcap, self.config.loss_chunk)
        logits = self.softcap(self.head(x))
        if targets is None:
            return logits
        return self.vocabulary.losses(logits if temperature == 1 else logits / temperature, targets)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor], where: str, grow: bool = False) -> None:
        """Copy weights by the names of the parameters that learn; longer learned positions are cropped, and with `grow` rows of the vocabulary that
        the weights have not stay as they are. Raises UserError unless all fit."""
        parameters = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        if strange := sorted(weights.keys() ^ parameters.keys()):
            whose = "the weights have no" if strange[0] in parameters else "the model has no"
            raise UserError(f"{where}: {whose} {strange[0]}{f' and {len(strange) - 1} more' if strange[1:] else ''}")
        for name, parameter in parameters.items():
            given = weights[name][: self.config.block_size] if name == "position.weight" else weights[name]
            if grow and name in ("wte.weight", "head.weight") and len(given) < len(parameter):
                given = torch.cat((given, parameter[len(given) :]))
            if given.shape != parameter.shape:
                raise UserError(
                    f"{where}: {name} is {tuple(given.shape)} there and {tuple(parameter.shape)} in this model"
                )
            parameter.copy_(shard_like(given, parameter))

    def muon_splits(self) -> dict[str, list[int]]:
        """Names of the weights that hold several matrices one above the other, with the rows of each."""
        return {f"blocks.{i}.attn.qkv.weight": block.attn.fused for i, block in enumerate(self.blocks)}

    def count_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs of a training token: 6 a weight in a product, 12 T C a layer for attention
        (PaLM, Chowdhery et al. 2022, appendix B); the windows' shorter spans are counted as such."""
        weights = sum(
            p.numel()
            for name, p in self.named_parameters()
            if p.dim() == 2 and name not in ("wte.weight", "position.weight")
        )
        weights += self.wte.weight.numel() * self.config.tie_weights
        spans = sum(block.attn.span for block in self.blocks)
        return 6.0 * weights + 12.0 * spans * self.config.n_embd
