"""The GPT: token ids in, logits or per-token losses out. Knows nothing of data, training or files.

The default architecture is GPT-2's (Radford et al. 2019). Variants are entries of the dicts NORMS, ACTIVATIONS,
POSITIONS, MLPS and VOCABULARIES, or plain numbers. They are chosen in `__init__`; `forward` asks for none of them.

Weights are float32. Every layer casts its weights to the dtype of its input, which `GPT.compute_dtype` sets at the
embedding. There is no autocast, and the residual stream has the dtype of the matrix products.

Shapes: B sequences, T tokens, C = n_embd, H = n_head, H_kv = n_kv_head, D = C / H, S keys, K contexts,
V = sum(vocab_sizes).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanoforge.distributed import shard_like
from nanoforge.errors import UserError, did_you_mean
from train_args import TrainArgs


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The model's shape. train_args.py has the meanings and the defaults."""

    vocab_sizes: tuple[int, ...]  # one, or one of each context or dataset
    vocabulary: str = "one"  # an entry of VOCABULARIES
    block_size: int = TrainArgs.block_size
    n_layer: int = TrainArgs.n_layer
    n_head: int = TrainArgs.n_head
    n_kv_head: int = TrainArgs.n_kv_head
    n_embd: int = TrainArgs.n_embd
    bias: bool = TrainArgs.bias
    norm: str = TrainArgs.norm
    position: str = TrainArgs.position
    rope_base: float = TrainArgs.rope_base
    activation: str = TrainArgs.activation
    mlp: str = TrainArgs.mlp
    mlp_ratio: float = TrainArgs.mlp_ratio
    qk_norm: bool = TrainArgs.qk_norm
    window: str = TrainArgs.window
    window_size: int = TrainArgs.window_size
    logit_softcap: float = TrainArgs.logit_softcap
    embedding_norm: bool = TrainArgs.embedding_norm
    value_residual: bool = TrainArgs.value_residual
    residual_scalars: bool = TrainArgs.residual_scalars
    tie_weights: bool = TrainArgs.tie_weights
    zero_init: bool = TrainArgs.zero_init
    dropout: float = TrainArgs.dropout
    activation_checkpointing: bool = TrainArgs.activation_checkpointing
    loss_chunk: int = TrainArgs.loss_chunk

    def __post_init__(self) -> None:
        """Fix the sizes that follow from others, so that a model loaded with another block_size keeps its own."""
        object.__setattr__(self, "n_kv_head", self.n_kv_head or self.n_head)
        if "S" in self.window:
            object.__setattr__(self, "window_size", self.window_size or max(1, self.block_size // 2))

    @classmethod
    def from_args(cls, args: TrainArgs, **overrides: Any) -> "GPTConfig":
        """The arguments of the same names, but for the overrides."""
        names = {field.name for field in fields(cls)}
        values = {name: getattr(args, name) for name in names if hasattr(args, name)}
        return cls(**values | overrides)


# Positions of the tokens that a forward reads: a slice or (T,), the same for all sequences, or (B, T), one row each.
Positions = slice | Tensor


class Cache(Protocol):
    """The part of a KV cache that attention calls (nanoforge/models/generation.py has one)."""

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Write a layer's k and v, (B, H_kv, T, D), at `positions`; its keys and values to read, (B, H_kv, S, D)."""
        ...


# ---------------------------------------------------------------------------------------------------------------------
# linear layers and norms: they cast their float32 weights to the dtype of their input


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias (Ba et al. 2016)."""

    def __init__(self, width: int, *, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, 1e-5)


class RMSNormCPU(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) for CPUs: half the passes over memory, and half the time, of torch's rms_norm.

    As torch's, it rounds once: the scale is the sum of two numbers of x's dtype, and addcmul adds in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        exact_scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        scale = exact_scale.to(x.dtype)
        if dtype == x.dtype:
            y = x * scale
        else:
            rest = exact_scale.sub_(scale).to(x.dtype)
            y = (x * rest).addcmul_(x, scale)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        projection = (grad * y).mean(-1, keepdim=True)
        return (y * (projection * -scale)).addcmul_(grad, scale), None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a learned gain if asked for (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, *, gain: bool):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        y = RMSNormCPU.apply(x, 1e-5) if x.device.type == "cpu" else F.rms_norm(x, (self.width,), eps=1e-5)
        return y if self.weight is None else y * self.weight.to(x.dtype)


def layer_norm(config: GPTConfig) -> nn.Module:
    return LayerNorm(config.n_embd, bias=config.bias)


def rms_norm(config: GPTConfig) -> nn.Module:
    return RMSNorm(config.n_embd, gain=True)


def rms_norm_no_gain(config: GPTConfig) -> nn.Module:
    return RMSNorm(config.n_embd, gain=False)


NORMS = {"layernorm": layer_norm, "rmsnorm": rms_norm, "rmsnorm_nogain": rms_norm_no_gain}

# ---------------------------------------------------------------------------------------------------------------------
# positions: `embed` adds to the token embeddings, `rotate` turns queries and keys


class Position(nn.Module):
    """No positions. The others override `embed` or `rotate`."""

    def __init__(self, config: GPTConfig):
        super().__init__()

    def embed(self, x: Tensor, positions: Positions) -> Tensor:  # x: (B, T, C)
        return x

    def rotate(self, q: Tensor, positions: Positions) -> Tensor:  # q: (B, heads, T, D)
        return q


class LearnedPosition(Position):
    """A learned embedding of each position, added to the token embeddings."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.block_size, config.n_embd))

    def embed(self, x: Tensor, positions: Positions) -> Tensor:
        return x + self.weight[positions].to(x.dtype)


class RotaryPosition(Position):
    """Rotary embedding (Su et al. 2021).

    (a, b) -> (a cos - b sin, a sin + b cos), where a and b are the halves of a head, as in GPT-NeoX and Llama.
    """

    cos: Tensor  # (block_size, D)
    sin: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        D = config.n_embd // config.n_head
        frequency = config.rope_base ** (-torch.arange(0, D, 2).float() / D)  # (D / 2,)
        angle = torch.outer(torch.arange(config.block_size).float(), frequency)  # (block_size, D / 2)
        cos = torch.cat((angle.cos(), angle.cos()), dim=1)
        sin = torch.cat((-angle.sin(), angle.sin()), dim=1)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def rotate(self, q: Tensor, positions: Positions) -> Tensor:
        cos = self.cos[positions].to(q.dtype).unsqueeze(-3)  # (1, T, D) or (B, 1, T, D)
        sin = self.sin[positions].to(q.dtype).unsqueeze(-3)
        rotated = q * cos  # before the roll: its gradient then comes first, and keeps the layout of q
        return torch.addcmul(rotated, q.roll(q.size(-1) // 2, dims=-1), sin)


POSITIONS = {"learned": LearnedPosition, "rope": RotaryPosition, "none": Position}

# ---------------------------------------------------------------------------------------------------------------------
# attention


def window_mask(query_positions: Tensor, key_positions: Tensor, span: int) -> Tensor:
    """True where a query sees a key, which is none of the future and one of the last `span`: (..., queries, keys)."""
    distance = query_positions[..., None] - key_positions
    return (distance >= 0) & (distance < span)


def attention_mask(positions: Positions, num_keys: int, span: int, device: torch.device) -> Tensor:
    """True where a query at `positions` sees one of S keys: (T, S), or (B, 1, T, S) if sequences differ."""
    key_positions = torch.arange(num_keys, device=device)

    # 1. Packed documents: as many keys as positions, which restart at 0 in every document. Tokens see their own
    #    document only. Two tokens share it if their distance by position is their distance in the row.
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.size(1) == num_keys:
        distance = positions[:, :, None] - positions[:, None, :]  # (B, T, T)
        same_document = distance == key_positions[:, None] - key_positions
        return (window_mask(key_positions, key_positions, span) & same_document)[:, None]

    # 2. One text a sequence: key i is at position i.
    query_positions = key_positions[positions] if isinstance(positions, slice) else positions
    mask = window_mask(query_positions, key_positions, span)
    return mask[:, None] if mask.dim() == 3 else mask


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, span: int, dropout: float, chunk: int = 128) -> Tensor:
    """Causal attention of q, (B, H, T, D), to the last `span` tokens of k and v, (B, H_kv, T, D).

    It takes a chunk of queries at a time. Memory grows with T x span: the probabilities are kept for backward.
    """
    # 1. Give each query head its own keys and values; scale the queries once.
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))  # (B, H, T, D)
    q = q * q.size(-1) ** -0.5
    T = q.size(2)
    positions = torch.arange(T, device=q.device)

    outputs = []
    for start in range(0, T, chunk):
        # 2. The queries [start, end) reach the keys [first_key, end).
        end = min(T, start + chunk)
        first_key = max(0, start - span + 1)
        # 3. Of these keys, hide the future and what the window has passed.
        visible = window_mask(positions[start:end], positions[first_key:end], span)
        bias = q.new_zeros(()).where(visible, -math.inf)
        # 4. Attend.
        scores = q[:, :, start:end] @ k[:, :, first_key:end].mT + bias  # (B, H, queries, keys)
        probs = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
        outputs.append(probs @ v[:, :, first_key:end])
    return torch.cat(outputs, dim=2)


MAX_CHUNKED_SCORES = 2**20  # T x span up to which chunked_attention is the faster one


class Attention(nn.Module):
    """Causal self-attention with grouped heads, a sliding window and a KV cache."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.dropout = config.dropout

        q_size, kv_size = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.qkv_sizes = [q_size, kv_size, kv_size]
        self.qkv = Linear(config.n_embd, sum(self.qkv_sizes), bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.qk_norm = RMSNorm(self.head_dim, gain=False) if config.qk_norm else nn.Identity()
        has_value_residual = config.value_residual and layer > 0
        self.first_values = nn.Parameter(torch.empty(1)) if has_value_residual else None  # share of v1 in the values

        self.span = config.block_size  # tokens that a query sees, its own included
        if config.window[layer % len(config.window)] == "S":
            self.span = min(config.block_size, config.window_size)
        self.sees_all = self.span == config.block_size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """q, (B, H, T, D), at `positions`, to k and v, (B, H_kv, S, D), at positions from 0 on: (B, H, T, D)."""
        T, S = q.size(2), k.size(2)
        dropout = self.dropout if self.training else 0.0
        in_order = isinstance(positions, slice)
        grouped = self.n_kv_head != self.n_head

        # 1. bfloat16 on a CPU: the backward of scaled_dot_product_attention takes 2 to 4 times as long there.
        is_cpu_bfloat16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
        if is_cpu_bfloat16 and in_order and 1 < T == S and T * self.span <= MAX_CHUNKED_SCORES:
            return chunked_attention(q, k, v, self.span, dropout)

        # 2. No mask: a whole square is causal, and a single new token sees every key.
        if self.sees_all and in_order and T in (1, S):
            return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=T > 1, enable_gqa=grouped)

        # 3. Windows, packed documents, and caches that are read in part or whose sequences differ.
        mask = attention_mask(positions, S, self.span, q.device)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=grouped)

    def forward(
        self, x: Tensor, v1: Tensor | None, position: Position, positions: Positions, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """The output, (B, T, C), and v1, the values of the first layer, (B, H_kv, T, D); that layer gets None."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(self.qkv_sizes, dim=-1)
        q, k, v = (part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in (q, k, v))  # (B, heads, T, D)
        q = position.rotate(self.qk_norm(q), positions)
        k = position.rotate(self.qk_norm(k), positions)
        if self.first_values is not None:  # value residual (Zhou et al. 2024)
            assert v1 is not None
            v = torch.lerp(v, v1, self.first_values.to(v.dtype))
        if v1 is None:
            v1 = v
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)
        y = self.attend(q, k, v, positions)
        y = self.proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training), v1


# ---------------------------------------------------------------------------------------------------------------------
# MLP and block

Activation = Callable[[Tensor], Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's approximation of GELU (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def relu_squared(x: Tensor) -> Tensor:
    """ReLU squared (So et al. 2021)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {"gelu_tanh": gelu_tanh, "relu2": relu_squared}


def get_activation(name: str) -> Activation:
    """An entry of ACTIVATIONS, or a function of torch.nn.functional that keeps a tensor's shape. Raises UserError."""
    function: Any = ACTIVATIONS.get(name) or getattr(F, name, None)
    if not name.startswith("_") and keeps_shape(function):
        return function
    names = [*ACTIVATIONS, *(name for name in dir(F) if name[0].islower())]
    raise UserError(
        f"--activation={name}: not an activation of torch.nn.functional, nor {' or '.join(ACTIVATIONS)}"
        f"{did_you_mean(name, names)}"
    )


def keeps_shape(function: Any) -> bool:
    """Whether a function maps a tensor alone to one of its shape."""
    try:
        return function(torch.zeros(2, 4)).shape == (2, 4)
    except Exception:  # torch.nn.functional has functions, classes and modules of all kinds
        return False


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        hidden = round(config.mlp_ratio * config.n_embd)
        self.up = Linear(config.n_embd, hidden, bias=config.bias)
        self.proj = Linear(hidden, config.n_embd, bias=config.bias)
        self.activation = get_activation(config.activation)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(self.activation(self.up(x)))
        return F.dropout(y, self.dropout, self.training)


class GatedMLP(MLP):
    """One half of the hidden layer gates the other (Shazeer 2020).

    With mlp_ratio=2.667 it has as many parameters as a plain MLP with 4.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.gate = Linear(self.up.in_features, self.up.out_features, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(self.activation(self.gate(x)) * self.up(x))
        return F.dropout(y, self.dropout, self.training)


MLPS = {"plain": MLP, "gated": GatedMLP}


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.norm_1 = NORMS[config.norm](config)
        self.attn = Attention(config, layer)
        self.norm_2 = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)
        self.scales = (
            nn.Parameter(torch.empty(2)) if config.residual_scalars else None
        )  # of the stream, of the embedding

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        v1: Tensor | None,
        position: Position,
        positions: Positions,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream x, (B, T, C), and the first layer's values v1; x0 is the embedding."""
        if self.scales is not None:
            x = self.scales[0].to(x.dtype) * x + self.scales[1].to(x.dtype) * x0
        y, v1 = self.attn(self.norm_1(x), v1, position, positions, cache)
        x = x + y
        x = x + self.mlp(self.norm_2(x))
        return x, v1


class CheckpointedBlock(Block):
    """Keeps only its input and recomputes the rest in backward (Chen et al. 2016)."""

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        return checkpoint(super().forward, *inputs, use_reentrant=False)


# ---------------------------------------------------------------------------------------------------------------------
# vocabularies: all of them share one embedding and one head, in which their rows follow each other


class OneVocabulary:
    """One softmax over all rows. ids: (B, T)."""

    def __init__(self, vocab_sizes: tuple[int, ...]):
        self.vocab_sizes = vocab_sizes
        self.vocab_offsets = [sum(vocab_sizes[:i]) for i in range(len(vocab_sizes))]  # first row of each vocabulary

    def embed(self, x: Tensor) -> Tensor:
        """The stream, (B, T, C), from the embeddings of the ids, (*ids.shape, C)."""
        return x

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each target, float32, in the shape of targets. logits: (B, T, V)."""
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return losses.view_as(targets)

    def next_token_logits(self, logits: Tensor, last_ids: Tensor) -> list[tuple[int, Tensor]]:
        """For each token to draw next: (offset of its vocabulary, logits (B, size)).

        logits: (B, V); last_ids: the ids before it, (B,) or (B, K).
        """
        return [(0, logits)]


class ContextVocabularies(OneVocabulary):
    """Aligned contexts: embeddings are summed, and each context has its own softmax. ids: (B, K, T)."""

    def embed(self, x: Tensor) -> Tensor:
        return x.sum(dim=1)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = []
        parts = zip(logits.split(self.vocab_sizes, dim=-1), targets.unbind(1), self.vocab_offsets, strict=True)
        for context_logits, context_targets, offset in parts:
            losses.append(super().losses(context_logits, context_targets - offset))  # (B, T)
        return torch.stack(losses, dim=1)

    def next_token_logits(self, logits: Tensor, last_ids: Tensor) -> list[tuple[int, Tensor]]:
        return list(zip(self.vocab_offsets, logits.split(self.vocab_sizes, dim=-1), strict=True))


class SeparateVocabularies(OneVocabulary):
    """Each dataset has its own rows and softmax; the rows of other datasets are masked. ids: (B, T)."""

    def vocab_index(self, ids: Tensor) -> Tensor:
        """Which vocabulary each id belongs to, in the shape of ids."""
        index = torch.zeros_like(ids)
        for offset in self.vocab_offsets[1:]:
            index = index + (ids >= offset)
        return index

    def mask_other_vocabularies(self, logits: Tensor, ids: Tensor) -> Tensor:
        """logits, (..., V), with -inf at the rows of other vocabularies than that of ids, (...)."""
        rows = torch.arange(logits.size(-1), device=logits.device)
        is_other = self.vocab_index(ids)[..., None] != self.vocab_index(rows)
        return logits.masked_fill(is_other, -math.inf)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().losses(self.mask_other_vocabularies(logits, targets), targets)

    def next_token_logits(self, logits: Tensor, last_ids: Tensor) -> list[tuple[int, Tensor]]:
        return [(0, self.mask_other_vocabularies(logits, last_ids))]


VOCABULARIES = {"one": OneVocabulary, "contexts": ContextVocabularies, "separate": SeparateVocabularies}

# ---------------------------------------------------------------------------------------------------------------------
# bounded logits, and a loss that never holds all logits


class Softcap(nn.Module):
    """z -> c z / sqrt(z^2 + c^2): smooth, within (-c, c), slope 1 at 0; float32."""

    def __init__(self, bound: float):
        super().__init__()
        self.bound = bound

    def forward(self, z: Tensor) -> Tensor:
        return self.bound * z.float() * torch.rsqrt(z.float().square() + self.bound**2)


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of each target (B, T), float32, from x (B, T, C) and the head (V, C), with the logits of `chunk`
    tokens at a time.

    Backward computes these logits again, so memory grows with chunk x V instead of B x T x V. bound: of Softcap, 0 for
    none.
    """

    @staticmethod
    def softcapped_logits(x: Tensor, head: Tensor, bound: float) -> tuple[Tensor, Tensor | float]:
        """(logits, their derivative with respect to the products x @ head.T), float32: (chunk, V)."""
        z = (x @ head.T).float()
        if not bound:
            return z, 1.0
        shrink = torch.rsqrt(z.square() + bound**2)
        return bound * z * shrink, bound**3 * shrink**3

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, bound: float, chunk: int) -> Tensor:
        ctx.save_for_backward(x, head, targets)
        ctx.bound = bound
        ctx.chunk = chunk
        weight = head.to(x.dtype)
        losses = []
        chunks = zip(x.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
        for x_chunk, target_chunk in chunks:
            logits, _ = ChunkedLoss.softcapped_logits(x_chunk, weight, bound)
            losses.append(F.cross_entropy(logits, target_chunk, reduction="none"))
        return torch.cat(losses).view_as(targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, head, targets = ctx.saved_tensors
        weight = head.to(x.dtype)
        x_grads = []
        head_grad = torch.zeros_like(head)
        flat = (x.flatten(0, 1), targets.flatten(), grad.flatten())
        chunks = zip(*(tensor.split(ctx.chunk) for tensor in flat), strict=True)
        for x_chunk, target_chunk, grad_chunk in chunks:
            # 1. d loss / d logits = softmax - one-hot.
            logits, slope = ChunkedLoss.softcapped_logits(x_chunk, weight, ctx.bound)
            error = logits.softmax(-1)
            error[torch.arange(len(target_chunk), device=targets.device), target_chunk] -= 1.0
            # 2. Through the softcap and the incoming gradient to the products, (chunk, V).
            error = (error * slope * grad_chunk[:, None]).to(x.dtype)
            # 3. To x and the head.
            x_grads.append(error @ weight)
            head_grad += error.T @ x_chunk
        return torch.cat(x_grads).view_as(x), head_grad, None, None, None


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
        self.norm = NORMS[config.norm](config)
        self.head = Linear(config.n_embd, V, bias=False)
        if config.tie_weights:
            self.head.weight = self.wte.weight
        self.softcap = Softcap(config.logit_softcap) if config.logit_softcap else nn.Identity()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial weights.

        | what                                     | drawn from                                        |
        |------------------------------------------|---------------------------------------------------|
        | linear layers, token embedding           | N(0, 0.02)                                        |
        | learned positions                        | N(0, 0.02)                                        |
        | output projections of attention and MLP  | N(0, 0.02 / sqrt(2 n_layer)), or 0 with zero_init |
        | untied head                              | N(0, 0.02), or 0 with zero_init                   |
        | biases; gains of norms                   | 0; 1                                              |
        | scales of the stream; of the embedding   | 1; 0                                              |
        | share of the first layer's values        | 1/2                                               |
        """
        zero_or_one = 0.0 if self.config.zero_init else 1.0
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
                parameter.normal_(0, 0.02 / math.sqrt(2 * self.config.n_layer)).mul_(zero_or_one)
            elif name == "head.weight":
                parameter.normal_(0, 0.02).mul_(zero_or_one)
            else:
                parameter.normal_(0, 0.02)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        position_ids: Positions | None = None,
        temperature: float = 1.0,
        logits_at: Any = ...,
    ) -> Tensor:
        """Logits, (B, T, V), or with targets the loss of each, float32, in their shape, from logits / temperature.

        idx, targets: ids, (B, T), or (B, K, T) of K contexts.
        cache: keys and values of the tokens before; those of idx are added to it.
        position_ids: below block_size; None: from 0 on. Without a cache, (B, T) positions that restart at 0 are packed
        documents.
        logits_at: index of the positions, (B, T), whose logits are needed, which then are (N, V); without targets.
        """
        positions = slice(0, idx.size(-1)) if position_ids is None else position_ids
        x = self.vocabulary.embed(self.wte(idx).to(self.compute_dtype))  # (B, T, C)
        x = self.embedding_norm(self.position.embed(x, positions))
        x = x0 = F.dropout(x, self.config.dropout, self.training)
        v1 = None
        for block in self.blocks:
            x, v1 = block(x, x0, v1, self.position, positions, cache)
        x = self.norm(x)[logits_at]

        if targets is not None and self.config.loss_chunk:
            return ChunkedLoss.apply(x, self.head.weight, targets, self.config.logit_softcap, self.config.loss_chunk)
        logits = self.softcap(self.head(x))
        if targets is None:
            return logits
        if temperature != 1:
            logits = logits.float() / temperature  # in float32, as a rollout divides them
        return self.vocabulary.losses(logits, targets)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor], source_name: str, *, grow: bool = False) -> None:
        """Copy weights to the trainable parameters of the same names.

        Longer learned positions are cropped. With `grow`, rows of the vocabulary that the weights lack keep their
        initial values. Raises UserError, which names the source, unless all weights fit.
        """
        parameters = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        missing_keys = sorted(parameters.keys() - weights.keys())
        unexpected_keys = sorted(weights.keys() - parameters.keys())
        for message, keys in (("the weights have no", missing_keys), ("the model has no", unexpected_keys)):
            if keys:
                others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise UserError(f"{source_name}: {message} {keys[0]}{others}")

        for name, parameter in parameters.items():
            tensor = weights[name]
            if name == "position.weight":
                tensor = tensor[: self.config.block_size]
            if grow and name in ("wte.weight", "head.weight") and len(tensor) < len(parameter):
                tensor = torch.cat((tensor, parameter[len(tensor) :]))
            if tensor.shape != parameter.shape:
                shapes = f"{tuple(tensor.shape)} in the weights and {tuple(parameter.shape)} in the model"
                raise UserError(f"{source_name}: {name} is {shapes}")
            parameter.copy_(shard_like(tensor, parameter))

    def attention_layers(self) -> list[Attention]:
        """In order."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def muon_splits(self) -> dict[str, list[int]]:
        """Weights that are several matrices stacked: name -> rows of each. Muon orthogonalizes each one by itself."""
        return {f"blocks.{attn.layer}.attn.qkv.weight": attn.qkv_sizes for attn in self.attention_layers()}

    def count_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> float:
        """FLOPs of forward and backward for a training token (PaLM, Chowdhery et al. 2022, appendix B).

        6 for each weight of a matrix product, and 12 span C for the attention of each layer.
        """
        matmul_weights = 0
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and name not in ("wte.weight", "position.weight"):
                matmul_weights += parameter.numel()
        if self.config.tie_weights:
            matmul_weights += self.wte.weight.numel()  # as the head
        total_span = sum(attn.span for attn in self.attention_layers())
        return 6.0 * matmul_weights + 12.0 * total_span * self.config.n_embd
