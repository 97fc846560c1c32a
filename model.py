"""The GPT, whole: token ids in, logits or per-token losses out. Knows nothing of data, training or files.

The default is GPT-2's architecture (Radford et al. 2019). Variants are entries of the dicts NORMS, ACTIVATIONS, POSITIONS, MLPS
and VOCABULARIES, or plain numbers; they are chosen in `__init__` and never asked about in `forward`.

Weights are kept in float32; every layer casts its own to the dtype of the activations, which `GPT.compute_dtype` sets at the
embedding. So there is no autocast, and the residual stream itself is in bfloat16 when the products are.

Shapes: B sequences, T tokens, C = n_embd, H = n_head, D = C / H, V = sum of the vocabularies, K contexts.
"""

import math
from dataclasses import dataclass, fields
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from parts.mistakes import Mistake, did_you_mean


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
    tie_weights: bool = True
    zero_init: bool = False
    dropout: float = 0.0
    activation_checkpointing: bool = False

    @classmethod
    def of(cls, values: object, **more) -> "GPTConfig":
        """The fields that an arguments object has by the same names, and `more`."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: getattr(values, name) for name in names if hasattr(values, name)} | more)


class KeyValueCache(Protocol):
    """What attention asks of a cache (parts/generate.py has one)."""

    length: int  # tokens cached so far, the same for all layers and sequences

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v of shape (B, H_kv, T, D) to a layer's; all of them, (B, H_kv, length + T, D), come back."""


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
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype), 1e-5)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a learned gain if asked (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, gain: bool):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), None if self.weight is None else self.weight.to(x.dtype), 1e-5)


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

    def embed(self, x: Tensor, start: int) -> Tensor:  # x: (B, T, C), whose first token stands at position `start`
        return x

    def rotate(self, q: Tensor, start: int) -> Tensor:  # q: (B, heads, T, D)
        return q


class LearnedPosition(Position):
    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.block_size, config.n_embd))

    def embed(self, x: Tensor, start: int) -> Tensor:
        return x + self.weight[start : start + x.size(1)].to(x.dtype)


class RotaryPosition(Position):
    """Rotary embedding (Su et al. 2021); the halves of a head are the pairs, as in GPT-NeoX and Llama."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        D = config.n_embd // config.n_head
        frequency = config.rope_base ** (-torch.arange(0, D, 2).float() / D)
        angle = torch.outer(torch.arange(config.block_size).float(), frequency)  # (block_size, D / 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotate(self, q: Tensor, start: int) -> Tensor:
        T = q.size(2)
        cos, sin = self.cos[start : start + T].to(q.dtype), self.sin[start : start + T].to(q.dtype)  # (T, D / 2)
        a, b = q.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


POSITIONS = {"learned": LearnedPosition, "rope": RotaryPosition, "none": Position}

# ---------------------------------------------------------------------------------------------------------------------
# attention and MLP

ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021
}


def activation(name: str):
    """An entry of ACTIVATIONS or a function of torch.nn.functional that maps a tensor to one of its shape. Raises Mistake."""
    function = ACTIVATIONS.get(name) or getattr(F, name, None)
    try:
        assert not name.startswith("_") and function(torch.zeros(2, 4)).shape == (2, 4)
    except Exception:
        near = did_you_mean(name, [*ACTIVATIONS, *(n for n in dir(F) if n[0].islower())])
        raise Mistake(f"--activation={name}: not an activation of torch.nn.functional, nor {' or '.join(ACTIVATIONS)}{near}") from None
    return function


class Attention(nn.Module):
    """Causal self-attention with grouped heads, sliding window and cache."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.fused = [heads * self.head_dim for heads in (self.n_head, self.n_kv_head, self.n_kv_head)]  # rows of q, k, v
        self.qkv = Linear(config.n_embd, sum(self.fused), bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.normalise = RMSNorm(self.head_dim, gain=False) if config.qk_norm else nn.Identity()
        self.dropout = config.dropout

        short = config.window[layer % len(config.window)] == "S"
        self.span = min(config.block_size, config.window_size or max(1, config.block_size // 2)) if short else config.block_size
        self.full = self.span == config.block_size

    def mask(self, start: int, end: int, device: torch.device) -> Tensor:
        """Which keys [0, end) the queries [start, end) see: those of the last `span` positions, (queries, keys)."""
        key = torch.arange(end, device=device)
        distance = key[start:, None] - key[None, :]
        return (distance >= 0) & (distance < self.span)

    def forward(self, x: Tensor, position: Position, cache: KeyValueCache | None) -> Tensor:
        B, T, C = x.shape
        start = 0 if cache is None else cache.length
        q, k, v = (part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in self.qkv(x).split(self.fused, dim=-1))  # (B, heads, T, D)
        q, k = position.rotate(self.normalise(q), start), position.rotate(self.normalise(k), start)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        S = start + T  # keys
        plain = self.full and T in (1, S)  # a whole square is causal, one new token sees every key: no mask is needed
        y = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=None if plain else self.mask(start, S, x.device),
            is_causal=plain and T > 1,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.n_kv_head != self.n_head,
        )  # fmt: skip
        y = self.proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


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

    def forward(self, x: Tensor, position: Position, cache: KeyValueCache | None) -> Tensor:
        x = x + self.attn(self.norm_1(x), position, cache)
        return x + self.mlp(self.norm_2(x))


class CheckpointedBlock(Block):
    """Keeps its input alone and computes the rest again in backward (Chen et al. 2016)."""

    def forward(self, x: Tensor, position: Position, cache: KeyValueCache | None) -> Tensor:
        return checkpoint(super().forward, x, position, cache, use_reentrant=False)


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

    def choices(self, logits: Tensor, last: Tensor) -> list[tuple[int, Tensor]]:
        """For each next token to draw: (first row, logits (B, size)); logits: (B, V), last: the ids before it, (B,) or (B, K)."""
        return [(0, logits)]


class ContextVocabularies(OneVocabulary):
    """Aligned contexts: embeddings are summed, each context has a softmax of its own. ids: (B, K, T)."""

    def embed(self, x: Tensor) -> Tensor:
        return x.sum(dim=1)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        parts = zip(logits.split(self.sizes, dim=-1), targets.unbind(1), self.firsts, strict=True)
        return torch.stack([super(ContextVocabularies, self).losses(part, target - first) for part, target, first in parts], dim=1)

    def choices(self, logits: Tensor, last: Tensor) -> list[tuple[int, Tensor]]:
        return list(zip(self.firsts, logits.split(self.sizes, dim=-1), strict=True))


class SeparateVocabularies(OneVocabulary):
    """Each dataset has rows and a softmax of its own: the rows of other datasets are masked. ids: (B, T)."""

    def masked(self, logits: Tensor, ids: Tensor) -> Tensor:
        row = torch.arange(logits.size(-1), device=logits.device)
        owner_of_row, owner = (sum((x >= first).long() for first in self.firsts[1:]) for x in (row, ids))  # which dataset's
        return logits.masked_fill(owner[..., None] != owner_of_row, -math.inf)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().losses(self.masked(logits, targets), targets)

    def choices(self, logits: Tensor, last: Tensor) -> list[tuple[int, Tensor]]:
        return [(0, self.masked(logits, last))]


VOCABULARIES = {"one": OneVocabulary, "contexts": ContextVocabularies, "separate": SeparateVocabularies}

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
        """
        scale = 0.0 if self.config.zero_init else 1.0
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() < 2:
                parameter.fill_(1.0)
            elif name.endswith("proj.weight"):
                parameter.normal_(0, 0.02 / math.sqrt(2 * self.config.n_layer)).mul_(scale)
            else:
                parameter.normal_(0, 0.02).mul_(scale if name == "head.weight" else 1.0)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Logits (B, T, V), or with targets the loss of each of them, float32 and in their shape.

        idx, targets: ids, (B, T), or (B, K, T) of K contexts; T plus the cache's length is at most block_size. A cache is
        read and extended.
        """
        start = 0 if cache is None else cache.length
        x = self.vocabulary.embed(self.wte(idx).to(self.compute_dtype))  # (B, T, C)
        x = F.dropout(self.position.embed(x, start), self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, self.position, cache)
        logits = self.softcap(self.head(self.norm(x)))
        return logits if targets is None else self.vocabulary.losses(logits, targets)

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor], where: str) -> None:
        """Copy weights by the parameters' names; longer learned positions are cropped. Raises Mistake unless all fit."""
        parameters = dict(self.named_parameters())
        if strange := sorted(weights.keys() ^ parameters.keys()):
            whose = "the weights have no" if strange[0] in parameters else "the model has no"
            raise Mistake(f"{where}: {whose} {strange[0]}{f' and {len(strange) - 1} more' if strange[1:] else ''}")
        for name, parameter in parameters.items():
            given = weights[name][: self.config.block_size] if name == "position.weight" else weights[name]
            if given.shape != parameter.shape:
                raise Mistake(f"{where}: {name} is {tuple(given.shape)} there and {tuple(parameter.shape)} in this model")
            parameter.copy_(given)

    def fused_rows(self) -> dict[str, list[int]]:
        """Names of the weights that hold several matrices one above the other, with the rows of each."""
        return {f"blocks.{i}.attn.qkv.weight": block.attn.fused for i, block in enumerate(self.blocks)}

    def count_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs of a training token: 6 a weight in a product, 12 T C a layer for attention
        (PaLM, Chowdhery et al. 2022, appendix B); the windows' shorter spans are counted as such."""
        weights = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and name not in ("wte.weight", "position.weight"))
        weights += self.wte.weight.numel() * self.config.tie_weights
        spans = sum(block.attn.span for block in self.blocks)
        return 6.0 * weights + 12.0 * spans * self.config.n_embd


def softcap(bound: float):
    """z -> c z / sqrt(z^2 + c^2): smooth, within (-c, c), slope 1 at 0."""
    return lambda z: bound * z.float() * torch.rsqrt(z.float().square() + bound**2)
