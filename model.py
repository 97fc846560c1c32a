"""The GPT: token ids in, logits or per-token losses out. Knows nothing of data, training or files.

The default architecture is GPT-2's (Radford et al. 2019). Variants are entries of the dicts NORMS, ROPE_SCALINGS,
POSITIONS, ACTIVATIONS, MLPS, BLOCKS, VOCABULARIES and SOFTCAPS, or plain numbers. They are chosen in `__init__`;
`forward` asks for none of them.

Weights are float32, or, of a frozen base, in any dtype. Every layer casts its weights to the dtype of its input, which
`GPT.compute_dtype` sets at the embedding. There is no autocast, and the residual stream has the dtype of the matrix
products.

Shapes: B sequences, T tokens, C = n_embd, H = n_head, H_kv = n_kv_head, D = head_dim, S keys, K contexts,
V = sum(vocab_sizes).
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from nanoforge.distributed import shard_like
from nanoforge.errors import UserError, did_you_mean
from train_args import TrainArgs

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The model's shape. train_args.py has the meanings and the defaults."""

    vocab_sizes: tuple[int, ...]  # one, or one of each context or dataset
    vocabulary: str = "one"  # an entry of VOCABULARIES
    block_size: int = TrainArgs.block_size
    context: int = 0  # tokens that loaded weights can read, where the run reads only block_size of them; 0: as many
    n_layer: int = TrainArgs.n_layer
    n_head: int = TrainArgs.n_head
    n_kv_head: int = TrainArgs.n_kv_head
    n_embd: int = TrainArgs.n_embd
    head_dim: int = TrainArgs.head_dim
    bias: bool = TrainArgs.bias
    qkv_bias: bool = TrainArgs.qkv_bias
    norm: str = TrainArgs.norm
    norm_eps: float = TrainArgs.norm_eps
    norm_placement: str = TrainArgs.norm_placement
    parallel_residual: bool = TrainArgs.parallel_residual
    position: str = TrainArgs.position
    rope_base: float = TrainArgs.rope_base
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    rotary_fraction: float = TrainArgs.rotary_fraction
    window_rope_base: float = TrainArgs.window_rope_base
    activation: str = TrainArgs.activation
    mlp: str = TrainArgs.mlp
    mlp_ratio: float = TrainArgs.mlp_ratio
    qk_norm: bool = TrainArgs.qk_norm
    qk_norm_gain: bool = TrainArgs.qk_norm_gain
    qk_norm_joint: bool = TrainArgs.qk_norm_joint
    attention_scale: float = TrainArgs.attention_scale
    window: str = TrainArgs.window
    window_size: int = TrainArgs.window_size
    logit_softcap: float = TrainArgs.logit_softcap
    softcap: str = TrainArgs.softcap
    embedding_scale: float = TrainArgs.embedding_scale
    embedding_norm: bool = TrainArgs.embedding_norm
    value_residual: bool = TrainArgs.value_residual
    residual_scalars: bool = TrainArgs.residual_scalars
    tie_weights: bool = TrainArgs.tie_weights
    init_std: float = TrainArgs.init_std
    embedding_init_std: float = TrainArgs.embedding_init_std
    zero_init: bool = TrainArgs.zero_init
    dropout: float = TrainArgs.dropout
    activation_checkpointing: bool = TrainArgs.activation_checkpointing
    loss_chunk: int = TrainArgs.loss_chunk

    def __post_init__(self) -> None:
        """Fix the sizes that follow from others, so that a model loaded with another block_size keeps its own."""
        object.__setattr__(self, "n_kv_head", self.n_kv_head or self.n_head)
        object.__setattr__(self, "head_dim", self.head_dim or self.n_embd // self.n_head)
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

    def num_keys(self, positions: Positions) -> int:
        """S, the keys that `update` returns for these positions."""
        ...

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Write a layer's k and v, (B, H_kv, T, D), at `positions`; its keys and values to read, (B, H_kv, S, D)."""
        ...


# ---------------------------------------------------------------------------------------------------------------------
# linear layers and norms: they cast their float32 weights to the dtype of their input


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def apply_dropout(x: Tensor, p: float, *, training: bool) -> Tensor:
    """x with values set to 0 with probability p; without any, a graph serves training and evaluation."""
    return F.dropout(x, p, training) if p else x


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias (Ba et al. 2016)."""

    def __init__(self, config: GPTConfig, width: int):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)


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


FEW_NUMBERS = 2**14  # for fewer, a CPU needs longer to start operations than to compute


class PlainRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), without a learned gain (Zhang and Sennrich 2019)."""

    fused_norm: Callable[[Tensor, Tensor | None, float], Tensor] | None = None  # of x, gain, eps; without gradients

    def __init__(self, config: GPTConfig, width: int):
        super().__init__()
        self.width = width
        self.eps = config.norm_eps

    def gain(self, dtype: torch.dtype) -> Tensor | None:
        """What the normalized values are multiplied by, (width,); None: by nothing."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain(x.dtype)
        if self.fused_norm is not None:
            return self.fused_norm(x, gain, self.eps)
        if x.device.type == "cpu" and (torch.is_grad_enabled() or x.numel() > FEW_NUMBERS):
            y = RMSNormCPU.apply(x, self.eps)
        else:
            y = F.rms_norm(x, (self.width,), eps=self.eps)
        return y if gain is None else y * gain


class RMSNorm(PlainRMSNorm):
    """RMSNorm with a learned gain."""

    def __init__(self, config: GPTConfig, width: int):
        super().__init__(config, width)
        self.weight = nn.Parameter(torch.ones(width))

    def gain(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class OffsetRMSNorm(PlainRMSNorm):
    """RMSNorm whose gain is 1 + a learned offset, which weight decay would pull to 0 (Gemma)."""

    needs_exact_weights = True  # they are not cast before they are used

    def __init__(self, config: GPTConfig, width: int):
        super().__init__(config, width)
        self.offset = nn.Parameter(torch.zeros(width))

    def gain(self, dtype: torch.dtype) -> Tensor:
        return (1.0 + self.offset.float()).to(dtype)


NORMS: dict[str, Callable[[GPTConfig, int], nn.Module]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
    "rmsnorm_nogain": PlainRMSNorm,
    "rmsnorm_offset": OffsetRMSNorm,
}

# ---------------------------------------------------------------------------------------------------------------------
# positions: `embed` adds to the token embeddings, `rotate` turns queries and keys


class Position(nn.Module):
    """No positions. The others override `embed`, or `angles` and `rotate`."""

    def __init__(self, config: GPTConfig):
        super().__init__()

    def embed(self, x: Tensor, positions: Positions) -> Tensor:  # x: (B, T, C)
        return x

    def angles(self, positions: Positions, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What `rotate` needs at these positions: once a forward, for queries and keys of all layers."""
        return ()

    def rotate(self, q: Tensor, *angles: Tensor) -> Tensor:  # q: (B, heads, T, D)
        return q


class LearnedPosition(Position):
    """A learned embedding of each position, added to the token embeddings."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.block_size, config.n_embd))

    def embed(self, x: Tensor, positions: Positions) -> Tensor:
        return x + self.weight[positions].to(x.dtype)


def linear_scaling(frequency: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """All positions divided by a factor (Chen et al. 2023)."""
    return frequency / scaling["factor"]


def llama3_scaling(frequency: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Frequencies that turn fewer than low_freq_factor times within the original context are divided by the factor,
    those above high_freq_factor stay, and those between are blended (Llama 3.1)."""
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequency / scaling["factor"] + kept * frequency


def yarn_scaling(frequency: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Frequencies that turn beta_fast times within the original context stay, those that turn beta_slow times are
    divided by the factor, and those between are blended by their index (YaRN, Peng et al. 2023, section 3.2)."""
    pairs_per_e = -1 / math.log(frequency[1])  # number of pairs over which the frequency falls to 1 / e
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi)  # of the first pair
    low = max(math.floor(pairs_per_e * math.log(turns / scaling["beta_fast"])), 0)
    high = min(math.ceil(pairs_per_e * math.log(turns / scaling["beta_slow"])), 2 * len(frequency) - 1)
    divided = ((torch.arange(len(frequency), device=frequency.device) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return divided * frequency / scaling["factor"] + (1 - divided) * frequency


# By rope_type, as Hugging Face names it. A scaling's attention_factor, which YaRN has, multiplies queries and keys.
ROPE_SCALINGS = {"linear": linear_scaling, "llama3": llama3_scaling, "yarn": yarn_scaling}


class RotaryPosition(Position):
    """Rotary embedding (Su et al. 2021).

    (a, b) -> (a cos - b sin, a sin + b cos), where a and b are the halves of a head, as in GPT-NeoX and Llama. With a
    rotary_fraction below 1, the last entries of both halves have the angle 0 and stay as they are.
    """

    cos: Tensor  # (block_size, D)
    sin: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        D = config.head_dim
        rotated = 2 * int(config.rotary_fraction * D / 2)  # entries of a head
        frequency = config.rope_base ** (-torch.arange(0, rotated, 2, device="cpu").float() / rotated)
        if config.rope_scaling:
            frequency = ROPE_SCALINGS[config.rope_scaling["rope_type"]](frequency, config.rope_scaling)
        unrotated = (0, (D - rotated) // 2)
        factor = F.pad(torch.full_like(frequency, config.rope_scaling.get("attention_factor", 1.0)), unrotated, value=1)
        frequency = F.pad(frequency, unrotated)  # (D / 2,)
        angle = torch.outer(torch.arange(config.block_size, device="cpu").float(), frequency)  # (block_size, D / 2)
        cos, sin = angle.cos() * factor, angle.sin() * factor
        self.register_buffer("cos", torch.cat((cos, cos), dim=1), persistent=False)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=1), persistent=False)

    def angles(self, positions: Positions, dtype: torch.dtype) -> tuple[Tensor, ...]:
        cos = self.cos[positions].to(dtype).unsqueeze(-3)  # (1, T, D) or (B, 1, T, D)
        sin = self.sin[positions].to(dtype).unsqueeze(-3)
        return cos, sin

    def rotate(self, q: Tensor, *angles: Tensor) -> Tensor:
        cos, sin = angles
        rotated = q * cos  # before the roll: its gradient then comes first, and keeps the layout of q
        return torch.addcmul(rotated, q.roll(q.size(-1) // 2, dims=-1), sin)


POSITIONS = {"learned": LearnedPosition, "rope": RotaryPosition, "none": Position}

# ---------------------------------------------------------------------------------------------------------------------
# attention


# (q, k, v, scale of the scores, dropout) -> (B, H, T, D). q: (B, H, T, D); k, v: (B, H_kv, S, D).
Attend = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]


class VisibleKeys(NamedTuple):
    """The keys that each query sees: those from `first`, which may be below 0, to `last`, and of packed documents those
    from `prefix_start` to before `prefix_end`. All are (T,), or (B, T) if sequences differ."""

    first: Tensor
    last: Tensor
    reach: int  # no query sees more than these tokens up to its own
    prefix_start: Tensor | None = None
    prefix_end: Tensor | None = None

    def mask(self, queries: slice, keys: Tensor) -> Tensor:
        """True where a query sees one of these keys, (S,): (T, S), or (B, 1, T, S) if sequences differ."""
        mask = (keys >= self.first[..., queries, None]) & (keys <= self.last[..., queries, None])
        if self.prefix_start is not None and self.prefix_end is not None:
            mask |= (keys >= self.prefix_start[..., queries, None]) & (keys < self.prefix_end[..., queries, None])
        return mask[:, None] if mask.dim() == 3 else mask


def visible_keys(positions: Positions, span: int, device: torch.device, *, cached: bool) -> VisibleKeys:
    """The keys, among the last `span` positions up to their own, that queries at these positions see.

    cached: there are keys of tokens before. Without them, positions (B, T) are those of packed documents: a token sees
    its own document only.
    """
    if isinstance(positions, Tensor) and not cached:
        return visible_in_document(positions, span)
    if isinstance(positions, Tensor):
        return VisibleKeys(positions - (span - 1), positions, span)
    last = torch.arange(positions.start, positions.stop, device=device)
    return VisibleKeys(last - (span - 1), last, span)


def visible_in_document(positions: Tensor, span: int) -> VisibleKeys:
    """Of packed documents, whose positions (B, T) restart: at 0 for the next document, higher for a branch of the same.

    A branch goes on from the document's first tokens, up to where it restarts, as if nothing stood between.
    """
    index = torch.arange(positions.size(-1), device=positions.device)
    starts = positions != F.pad(positions[:, :-1] + 1, (1, 0), value=-1)
    run_start = (index * starts).cummax(-1).values  # of the document, or of its branch
    document_start = (index * (positions == 0)).cummax(-1).values
    branch = positions.gather(-1, run_start)  # position at which the run starts; 0 but for branches
    return VisibleKeys(
        first=index - (positions - branch).clamp(max=span - 1),
        last=index.expand_as(positions),
        reach=positions.size(-1),
        prefix_start=document_start + (positions - (span - 1)).clamp(min=0),
        prefix_end=document_start + branch,
    )


FLEX_BLOCK = 128  # queries, and keys, of a block of flex_attention


def flex_block_mask(visible: VisibleKeys) -> BlockMask:
    """The mask of flex_attention for as many keys as queries, which see none behind their own. `visible.first` never
    falls along a sequence.

    It is made of the blocks' ends, and of prefixes: torch's create_block_mask would make a mask of all T x T pairs.
    """
    first, prefix_start, prefix_end = visible.first, visible.prefix_start, visible.prefix_end
    T = first.size(-1)
    starts = torch.arange(0, T, FLEX_BLOCK, device=first.device)  # of blocks of keys
    query_starts = starts[:, None]
    query_ends = (query_starts + FLEX_BLOCK).clamp(max=T) - 1
    # 1. A block's first query reaches back furthest. Its last one shows what all of them see.
    reaches = first[..., query_starts] < starts + FLEX_BLOCK  # ([B,] blocks, blocks)
    covers = first[..., query_ends] <= starts
    if prefix_start is not None and prefix_end is not None:
        meets = (prefix_start[..., None] < starts + FLEX_BLOCK) & (prefix_end[..., None] > starts)
        meets &= (prefix_start < prefix_end)[..., None]  # (B, T, blocks)
        meets = F.pad(meets, (0, 0, 0, len(starts) * FLEX_BLOCK - T))
        reaches |= meets.unflatten(1, (len(starts), FLEX_BLOCK)).any(2)
    # 2. Blocks in which some pairs are visible, and blocks in which all are: below the diagonal, of FLEX_BLOCK queries.
    is_below = starts < query_starts
    full = is_below & covers & (query_starts + FLEX_BLOCK <= T)
    partial = (starts <= query_starts) & reaches & ~full
    # 3. By blocks of queries, and for backward by blocks of keys: how many there are, and which, these first.
    blocks = torch.stack((partial, full, partial.mT, full.mT)).view(4, -1, 1, *full.shape[-2:])
    counts = blocks.sum(-1, dtype=torch.int32).unbind()  # 4 of (B or 1, 1, blocks)
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True).int().unbind()

    # 4. The pairs themselves. The numbers are tensors, so that others need no new kernel.
    def sees_in_window(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key <= query)

    def sees_in_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert prefix_start is not None and prefix_end is not None
        in_run = (key >= first[b, query]) & (key <= query)
        return in_run | ((key >= prefix_start[b, query]) & (key < prefix_end[b, query]))

    return BlockMask(
        seq_lengths=(T, T),
        kv_num_blocks=counts[0],
        kv_indices=indices[0],
        full_kv_num_blocks=counts[1],
        full_kv_indices=indices[1],
        q_num_blocks=counts[2],
        q_indices=indices[2],
        full_q_num_blocks=counts[3],
        full_q_indices=indices[3],
        BLOCK_SIZE=(FLEX_BLOCK, FLEX_BLOCK),
        mask_mod=sees_in_window if prefix_start is None else sees_in_document,
    )


@functools.cache
def window_block_mask(T: int, span: int, device: torch.device) -> BlockMask:
    """The mask of flex_attention for a sliding window, the same for all sequences."""
    with torch.inference_mode(False):  # noqa: FBT003  Training saves it for backward, whoever asked first.
        return flex_block_mask(visible_keys(slice(0, T), span, device, cached=False))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    """As many queries as keys, each of which sees those up to its own; or one query, which sees all."""
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(
        q, k, v, None, dropout, is_causal=q.size(2) > 1, scale=scale, enable_gqa=grouped
    )


def masked_attention(mask: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    """mask: 0 where a query sees a key, -inf elsewhere: (T, S), or (B, 1, T, S) if sequences differ."""
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=grouped)


def sparse_attention(
    flex_attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float
) -> Tensor:
    """torch's flex_attention with its block mask visits only blocks in which queries see keys (Dong et al. 2024)."""
    assert not dropout, "flex_attention has none"
    return flex_attention(q, k, v, scale=scale, enable_gqa=q.size(1) != k.size(1))


MAX_CHUNKED_SCORES = 2**20  # T x span up to which chunked_attention is the faster one
CHUNK = 128  # queries


def chunked_attention(visible: VisibleKeys, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    """As many queries as keys, a chunk of queries at a time. Memory grows with T x reach: the probabilities are kept
    for backward.
    """
    # 1. Scale the queries; give each head of them its own keys and values.
    q = q * scale
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))  # (B, H, T, D)
    T = q.size(2)
    keys = torch.arange(T, device=q.device)

    outputs = []
    for start in range(0, T, CHUNK):
        # 2. The queries [start, end) reach the keys [first_key, end).
        end = min(T, start + CHUNK)
        first_key = max(0, start - visible.reach + 1)
        # 3. Of these keys, hide those that a query doesn't see.
        bias = q.new_zeros(()).where(visible.mask(slice(start, end), keys[first_key:end]), -math.inf)
        # 4. Attend.
        scores = q[:, :, start:end] @ k[:, :, first_key:end].mT + bias  # (B, H, queries, keys)
        probs = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
        outputs.append(probs @ v[:, :, first_key:end])
    return torch.cat(outputs, dim=2)


class QKNorm(nn.Module):
    """RMSNorm of queries or keys, (B, T, size): of each head, or jointly of all (OLMo 2); without gain, or with that of
    the model's norms."""

    def __init__(self, config: GPTConfig, size: int):
        super().__init__()
        self.width = size if config.qk_norm_joint else config.head_dim
        self.norm = NORMS[config.norm if config.qk_norm_gain else "rmsnorm_nogain"](config, self.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.view(*x.shape[:-1], -1, self.width)).view_as(x)


@dataclass(frozen=True)
class Reading:
    """What a layer's attention needs to know of the tokens that a forward reads."""

    positions: Positions
    position: Position
    angles: tuple[Tensor, ...]  # of the position, at these positions
    attend: Attend
    cache: Cache | None

    def rotate(self, q: Tensor) -> Tensor:
        """Queries or keys, (B, heads, T, D), turned by their positions."""
        return self.position.rotate(q, *self.angles)


class Attention(nn.Module):
    """Causal self-attention with grouped heads."""

    # As `attend`, for one token of each sequence after those in a cache; without gradients.
    fused_attention: Callable[["Attention", Tensor, Tensor, Tensor, Reading], Tensor] | None = None

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        self.scale = config.attention_scale or config.head_dim**-0.5  # of the scores
        self.dropout = config.dropout

        q_size, kv_size = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.qkv_sizes = [q_size, kv_size, kv_size]
        self.qkv = Linear(config.n_embd, sum(self.qkv_sizes), bias=config.bias or config.qkv_bias)
        self.proj = Linear(q_size, config.n_embd, bias=config.bias)
        self.q_norm = QKNorm(config, q_size) if config.qk_norm else nn.Identity()
        self.k_norm = QKNorm(config, kv_size) if config.qk_norm else nn.Identity()
        mixes_values = config.value_residual and layer > 0
        self.first_values = nn.Parameter(torch.empty(1)) if mixes_values else None  # share of v1 in the values
        self.gives_values = config.value_residual and layer == 0

        self.is_windowed = config.window[layer % len(config.window)] == "S"
        self.span = config.block_size  # tokens that a query sees, its own included
        if self.is_windowed:
            self.span = min(config.block_size, config.window_size)

    def forward(self, x: Tensor, v1: Tensor | None, reading: Reading) -> tuple[Tensor, Tensor | None]:
        """The output, (B, T, C), and v1, the values of the first layer, (B, H_kv, T, D): None without value residual,
        and for that layer."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).split(self.qkv_sizes, dim=-1)
        parts = (self.q_norm(q), self.k_norm(k), v)
        q, k, v = (part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in parts)  # (B, heads, T, D)
        if self.first_values is not None:  # value residual (Zhou et al. 2024)
            assert v1 is not None
            v = torch.lerp(v, v1, self.first_values.to(v.dtype))
        if self.gives_values:
            v1 = v
        y = self.proj(self.attend(q, k, v, reading).transpose(1, 2).flatten(2))
        return apply_dropout(y, self.dropout, training=self.training), v1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, reading: Reading) -> Tensor:
        """The weighted mean of the values that each query sees, (B, H, T, D)."""
        if self.fused_attention is not None and reading.cache is not None and q.size(2) == 1:
            return self.fused_attention(self, q, k, v, reading)
        q = reading.rotate(q)
        k = reading.rotate(k)
        if reading.cache is not None:
            k, v = reading.cache.update(self.layer, k, v, reading.positions)
        return reading.attend(q, k, v, self.scale, self.dropout if self.dropout and self.training else 0.0)


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
        return apply_dropout(y, self.dropout, training=self.training)


class GatedMLP(MLP):
    """One half of the hidden layer gates the other (Shazeer 2020).

    With mlp_ratio=2.667 it has as many parameters as a plain MLP with 4.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.gate = Linear(self.up.in_features, self.up.out_features, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(self.activation(self.gate(x)) * self.up(x))
        return apply_dropout(y, self.dropout, training=self.training)


MLPS = {"plain": MLP, "gated": GatedMLP}


class HasParts(nn.Module):
    """A module whose forward calls parts of its own, which can be compiled in place."""

    compiled_parts: Mapping[str, Callable[..., Any]] = MappingProxyType({})  # name of the method -> compiled

    def compile_parts(self, *names: str) -> None:
        """Compile these methods, a graph for each shape. Hooks of the module, as FSDP2's, stay outside the graphs."""
        self.compiled_parts = {name: torch.compile(getattr(self, name), dynamic=False) for name in names}

    def part(self, name: str, cache: Cache | None) -> Callable[..., Any]:
        """A method, compiled if it is; with a cache, whose shapes change from token to token, eager."""
        eager = getattr(self, name)
        return self.compiled_parts.get(name, eager) if cache is None else eager


class Block(HasParts):
    """Residual block: attention, then the MLP. Each one's input is normalized, or its output, or both."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        pre_norm = NORMS[config.norm] if config.norm_placement in ("pre", "both") else nn.Identity
        post_norm = NORMS[config.norm] if config.norm_placement in ("post", "both") else nn.Identity
        self.norm_1 = pre_norm(config, config.n_embd)
        self.attn = Attention(config, layer)
        self.post_norm_1 = post_norm(config, config.n_embd)
        self.norm_2 = pre_norm(config, config.n_embd)
        self.mlp = MLPS[config.mlp](config)
        self.post_norm_2 = post_norm(config, config.n_embd)
        self.scales = (
            nn.Parameter(torch.empty(2)) if config.residual_scalars else None
        )  # of the stream, of the embedding

    def forward(self, x: Tensor, x0: Tensor, v1: Tensor | None, reading: Reading) -> tuple[Tensor, Tensor | None]:
        """The residual stream x, (B, T, C), and the first layer's values v1; x0 is the embedding."""
        return self.part("add_layers", reading.cache)(x, x0, v1, reading)

    def add_layers(self, x: Tensor, x0: Tensor, v1: Tensor | None, reading: Reading) -> tuple[Tensor, Tensor | None]:
        """As `forward`."""
        if self.scales is not None:
            x = self.scales[0].to(x.dtype) * x + self.scales[1].to(x.dtype) * x0
        y, v1 = self.attn(self.norm_1(x), v1, reading)
        return self.add_mlp(x, self.post_norm_1(y)), v1

    def add_mlp(self, x: Tensor, y: Tensor) -> Tensor:
        """The stream x, (B, T, C), plus attention's output y, plus the MLP of both."""
        x = x + y
        return x + self.post_norm_2(self.mlp(self.norm_2(x)))


class ParallelBlock(Block):
    """Attention and MLP side by side on one stream (GPT-J, GPT-NeoX)."""

    def add_mlp(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y + self.post_norm_2(self.mlp(self.norm_2(x)))


class Checkpointed:
    """Keeps only a block's input and recomputes the rest in backward (Chen et al. 2016)."""

    def add_layers(self, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        return checkpoint(super().add_layers, *inputs, use_reentrant=False)  # type: ignore[misc]


class CheckpointedBlock(Checkpointed, Block):
    pass


class CheckpointedParallelBlock(Checkpointed, ParallelBlock):
    pass


BLOCKS = {  # (parallel_residual, activation_checkpointing)
    (False, False): Block,
    (False, True): CheckpointedBlock,
    (True, False): ParallelBlock,
    (True, True): CheckpointedParallelBlock,
}


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

    kind = "rsqrt"

    def __init__(self, bound: float):
        super().__init__()
        self.bound = bound

    def forward(self, z: Tensor) -> Tensor:
        return self.bound * z.float() * torch.rsqrt(z.float().square() + self.bound**2)

    def with_slope(self, z: Tensor) -> tuple[Tensor, Tensor | float]:
        """(capped, its derivative with respect to z), in the shape of z, float32."""
        shrink = torch.rsqrt(z.square() + self.bound**2)
        return self.bound * z * shrink, self.bound**3 * shrink**3


class TanhSoftcap(Softcap):
    """z -> c tanh(z / c) (Gemma 2, nanochat)."""

    kind = "tanh"

    def forward(self, z: Tensor) -> Tensor:
        return self.bound * torch.tanh(z.float() / self.bound)

    def with_slope(self, z: Tensor) -> tuple[Tensor, Tensor | float]:
        capped = torch.tanh(z / self.bound)
        return self.bound * capped, 1 - capped.square()


class NoSoftcap(Softcap):
    """z -> z."""

    kind = "none"

    def __init__(self, bound: float = 0.0):
        super().__init__(bound)

    def forward(self, z: Tensor) -> Tensor:
        return z

    def with_slope(self, z: Tensor) -> tuple[Tensor, Tensor | float]:
        return z, 1.0


SOFTCAPS: dict[str, type[Softcap]] = {"rsqrt": Softcap, "tanh": TanhSoftcap}


def chunk_losses(x: Tensor, weight: Tensor, targets: Tensor, softcap: Softcap) -> Tensor:
    """Cross-entropy of each target (N,), float32, from x (N, C) and the head (V, C)."""
    logits, _ = softcap.with_slope((x @ weight.T).float())
    return F.cross_entropy(logits, targets, reduction="none")


def chunk_errors(x: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, softcap: Softcap) -> Tensor:
    """The gradient of `chunk_losses` with respect to the products x @ weight.T: (N, V), in x's dtype. grad: (N,)."""
    products = (x @ weight.T).float()
    logits, slope = softcap.with_slope(products)
    probs = logits.softmax(-1)
    # 1. d loss / d logits = softmax - one-hot. The one-hot changes one value of a row, which is computed by itself.
    at_target = targets[:, None]
    _, target_slope = softcap.with_slope(products.gather(1, at_target))
    target_errors = (probs.gather(1, at_target) - 1.0) * target_slope * grad[:, None]
    # 2. Through the softcap and the incoming gradient to the products.
    errors = probs.mul_(slope * grad[:, None]).to(x.dtype)
    return errors.scatter_(1, at_target, target_errors.to(x.dtype))


@functools.cache
def compile_chunk(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`chunk_losses` or `chunk_errors`, compiled: eager, each reads and writes the float32 logits several times."""
    return torch.compile(function, fullgraph=True)


@dataclass(frozen=True)
class ChunkedLoss:
    """Cross-entropy with the logits of `chunk` tokens at a time.

    Backward computes these logits again, so memory grows with chunk x V instead of B x T x V. Both are operators, which
    torch.compile does not look into: traced, they would share the logits, and forward would keep them all.
    """

    softcap: Softcap
    chunk: int
    is_compiled: bool  # what is done with a chunk

    def forward(self, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """The loss of each target (B, T), float32, from x (B, T, C) and the head (V, C)."""
        losses_of = compile_chunk(chunk_losses) if self.is_compiled else chunk_losses
        weight = head.to(x.dtype)
        losses = [
            losses_of(x_chunk, weight, target_chunk, self.softcap)
            for x_chunk, target_chunk in self.split(x.flatten(0, 1), targets.flatten())
        ]
        return torch.cat(losses).view_as(targets)

    def backward(
        self, grad: Tensor, x: Tensor, head: Tensor, targets: Tensor, *, trains_head: bool
    ) -> tuple[Tensor, Tensor]:
        """The gradients of x and of the head, which has no values for a frozen head."""
        errors_of = compile_chunk(chunk_errors) if self.is_compiled else chunk_errors
        weight = head.to(x.dtype)
        x_grads = []
        head_grad = torch.zeros_like(head) if trains_head else head.new_empty(0)
        for x_chunk, target_chunk, grad_chunk in self.split(x.flatten(0, 1), targets.flatten(), grad.flatten()):
            errors = errors_of(x_chunk, weight, target_chunk, grad_chunk, self.softcap)
            x_grads.append(errors @ weight)
            if trains_head:
                head_grad += errors.T @ x_chunk
        return torch.cat(x_grads).view_as(x), head_grad

    def split(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """A chunk of each tensor at a time."""
        return zip(*(tensor.split(self.chunk) for tensor in tensors), strict=True)


@functools.cache
def make_chunked_loss(kind: str, bound: float, chunk: int, is_compiled: bool) -> ChunkedLoss:  # noqa: FBT001
    """The loss from what an operator takes: the kind and the bound of its softcap."""
    softcap = SOFTCAPS[kind](bound) if bound else NoSoftcap()
    return ChunkedLoss(softcap, chunk, is_compiled)


# The two operators. torch.library.custom_op would import torch's compiler at their first call, in a second.
LIBRARY = torch.library.Library("nanoforge", "DEF")
TENSORS = "Tensor x, Tensor head, Tensor targets"
SETTINGS = "str kind, float bound, int chunk, bool is_compiled"


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Make a function an operator of torch. fake: results of the same shapes, for tensors without values."""

    def register(function: Callable[..., T]) -> Callable[..., T]:
        name = LIBRARY.define(schema)
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"nanoforge::{name}", fake, lib=LIBRARY)
        return function

    return register


def fake_loss(x: Tensor, head: Tensor, targets: Tensor, *settings: Any) -> Tensor:
    return torch.empty_like(targets, dtype=torch.float32, memory_format=torch.contiguous_format)


def fake_gradients(
    grad: Tensor, x: Tensor, head: Tensor, targets: Tensor, trains_head: Any, *settings: Any
) -> tuple[Tensor, Tensor]:
    head_grad = torch.empty_like(head) if trains_head else head.new_empty(0)
    return torch.empty_like(x, memory_format=torch.contiguous_format), head_grad


@operator(f"chunked_loss({TENSORS}, {SETTINGS}) -> Tensor", fake_loss)
def run_forward(x: Tensor, head: Tensor, targets: Tensor, *settings: Any) -> Tensor:
    return make_chunked_loss(*settings).forward(x, head, targets)


@operator(
    f"chunked_loss_backward(Tensor grad, {TENSORS}, bool trains_head, {SETTINGS}) -> (Tensor, Tensor)", fake_gradients
)
def run_backward(
    grad: Tensor, x: Tensor, head: Tensor, targets: Tensor, trains_head: Any, *settings: Any
) -> tuple[Tensor, Tensor]:
    return make_chunked_loss(*settings).backward(grad, x, head, targets, trains_head=trains_head)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


@functools.partial(torch.library.register_autograd, "nanoforge::chunked_loss", setup_context=save_inputs, lib=LIBRARY)
def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    trains_head = ctx.needs_input_grad[1]
    gradients = torch.ops.nanoforge.chunked_loss_backward
    x_grad, head_grad = gradients(grad, *ctx.saved_tensors, trains_head, *ctx.settings)
    return x_grad, head_grad if trains_head else None, None, *(None for _ in ctx.settings)


def chunked_loss(x: Tensor, head: Tensor, targets: Tensor, softcap: Softcap, chunk: int) -> Tensor:
    """`ChunkedLoss`, differentiable in x and the head. In a compiled model a GPU's chunks are compiled too."""
    is_compiled = torch.compiler.is_compiling() and x.device.type == "cuda"
    settings = (softcap.kind, softcap.bound, chunk, is_compiled)
    return torch.ops.nanoforge.chunked_loss(x, head, targets, *settings)


# ---------------------------------------------------------------------------------------------------------------------
# the model


class Scale(nn.Module):
    """Times a number."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class NoInitialWeights(TorchFunctionMode):
    """Within it no weights are drawn: on the meta device torch would import its compiler for that, in seconds."""

    draws = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.draws:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


class GPT(HasParts):
    compute_dtype = torch.float32  # of activations and matrix products
    flex_attention: Callable[..., Tensor] | None = None  # torch's, for windows and packed documents; None: masks

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        V = sum(config.vocab_sizes)
        block = BLOCKS[config.parallel_residual, config.activation_checkpointing]
        self.vocabulary = VOCABULARIES[config.vocabulary](config.vocab_sizes)
        self.wte = nn.Embedding(V, config.n_embd)
        self.embedding_scale = Scale(config.embedding_scale) if config.embedding_scale != 1 else nn.Identity()
        self.position = POSITIONS[config.position](config)
        self.embedding_norm = PlainRMSNorm(config, config.n_embd) if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.n_layer))
        self.window_position: Position | None = None  # of windowed layers, if they have another RoPE
        if config.window_rope_base:
            unscaled = replace(config, rope_base=config.window_rope_base, rope_scaling={})
            self.window_position = POSITIONS[config.position](unscaled)
        self.is_windowed = [attn.is_windowed for attn in self.attention_layers()]  # by layer
        self.positions = {False: self.position, True: self.window_position or self.position}  # by is_windowed
        self.spans = {attn.is_windowed: attn.span for attn in self.attention_layers()}
        self.norm = NORMS[config.norm](config, config.n_embd)
        self.head = Linear(config.n_embd, V, bias=False)
        if config.tie_weights:
            self.head.weight = self.wte.weight
        self.softcap = SOFTCAPS[config.softcap](config.logit_softcap) if config.logit_softcap else NoSoftcap()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial weights.

        | what                                     | drawn from                                            |
        |------------------------------------------|-------------------------------------------------------|
        | linear layers, learned positions         | N(0, init_std)                                        |
        | token embedding                          | N(0, embedding_init_std)                              |
        | output projections of attention and MLP  | N(0, init_std / sqrt(2 n_layer)), or 0 with zero_init |
        | untied head                              | N(0, init_std), or 0 with zero_init                   |
        | biases, offsets of gains; gains of norms | 0; 1                                                  |
        | scales of the stream; of the embedding   | 1; 0                                                  |
        | share of the first layer's values        | 1/2                                                   |
        """
        std, zero_or_one = self.config.init_std, 0.0 if self.config.zero_init else 1.0
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", "offset")):
                parameter.zero_()
            elif name.endswith("scales"):
                parameter.copy_(torch.tensor([1.0, 0.0]))
            elif name.endswith("first_values"):
                parameter.fill_(0.5)
            elif parameter.dim() < 2:
                parameter.fill_(1.0)
            elif name.endswith("proj.weight"):
                parameter.normal_(0, std / math.sqrt(2 * self.config.n_layer)).mul_(zero_or_one)
            elif name == "head.weight":
                parameter.normal_(0, std).mul_(zero_or_one)
            elif name == "wte.weight":
                parameter.normal_(0, self.config.embedding_init_std)
            else:
                parameter.normal_(0, std)

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
        logits_at: index of the positions, (B, T), whose logits are needed, which then are (N, V). With targets it is a
        mask, (B, T), of those whose losses are needed; the others are 0.
        """
        positions = slice(0, idx.size(-1)) if position_ids is None else position_ids
        x = x0 = self.part("embed", cache)(idx, positions)
        v1 = None
        readings = self.read(x, positions, cache)
        for block, is_windowed in zip(self.blocks, self.is_windowed, strict=True):
            x, v1 = block(x, x0, v1, readings[is_windowed])
        if targets is not None and logits_at is not ...:
            return self.masked_losses(x, targets, temperature, logits_at)
        return self.part("finish", cache)(x, targets, temperature, logits_at)

    def embed(self, idx: Tensor, positions: Positions) -> Tensor:
        """The residual stream before the first block: (B, T, C)."""
        x = self.embedding_scale(self.vocabulary.embed(self.wte(idx).to(self.compute_dtype)))
        x = self.embedding_norm(self.position.embed(x, positions))
        return apply_dropout(x, self.config.dropout, training=self.training)

    def finish(self, x: Tensor, targets: Tensor | None, temperature: float, logits_at: Any) -> Tensor:
        """Logits or losses, as `forward` has them, from the stream x, (B, T, C), after the last block."""
        x = self.norm(x)[logits_at]
        if targets is not None and self.config.loss_chunk:
            return chunked_loss(x, self.head.weight, targets, self.softcap, self.config.loss_chunk)
        logits = self.softcap(self.head(x))
        if targets is None:
            return logits
        if temperature != 1:
            logits = logits.float() / temperature  # in float32, as a rollout divides them
        return self.vocabulary.losses(logits, targets)

    def masked_losses(self, x: Tensor, targets: Tensor, temperature: float, mask: Tensor) -> Tensor:
        """As `finish`: the losses of targets in the mask, (B, T), and 0 elsewhere.

        On a CPU the head reads these tokens alone. Elsewhere the host would have to wait for their number, and a graph
        needs a fixed one.
        """
        if x.device.type != "cpu" or self.compiled_parts:
            return self.part("finish", None)(x, targets, temperature, ...) * mask
        losses = self.finish(x[mask][None], targets[mask][None], temperature, ...)
        return losses.new_zeros(mask.shape).masked_scatter(mask, losses)

    def compile_forward(self) -> None:
        """Compile what forward calls: the embedding; each block, all by the same graphs; the head with the loss."""
        self.compile_parts("embed", "finish")
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compile_parts("add_layers")

    def read(self, x: Tensor, positions: Positions, cache: Cache | None) -> dict[bool, Reading]:
        """Whether a layer is windowed -> what its attention needs to know of the tokens in x, (B, T, C)."""
        readings = {}
        for is_windowed, span in self.spans.items():
            attend = self.choose_attention(x, positions, cache, span)
            position = self.positions[is_windowed]
            readings[is_windowed] = Reading(positions, position, position.angles(positions, x.dtype), attend, cache)
        return readings

    def choose_attention(self, x: Tensor, positions: Positions, cache: Cache | None, span: int) -> Attend:
        """How the queries of x, (B, T, C), attend to the last `span` tokens up to their own."""
        T = x.size(1)
        S = T if cache is None else cache.num_keys(positions)
        in_order = isinstance(positions, slice)

        # 1. bfloat16 on a CPU: the backward of scaled_dot_product_attention takes 2 to 4 times as long there.
        is_cpu_bfloat16 = x.device.type == "cpu" and x.dtype == torch.bfloat16
        if is_cpu_bfloat16 and (in_order or cache is None) and 1 < T == S:
            visible = visible_keys(positions, span, x.device, cached=False)
            if T * visible.reach <= MAX_CHUNKED_SCORES:
                return partial(chunked_attention, visible)

        # 2. No mask: a whole square is causal, and a single new token sees every key.
        if in_order and T in (1, S) and span >= S:
            return causal_attention

        # 3. Windows and packed documents.
        if self.flex_attention is not None and cache is None:
            if in_order:
                block_mask = window_block_mask(T, span, x.device)
            else:
                block_mask = flex_block_mask(visible_keys(positions, span, x.device, cached=False))
            return partial(sparse_attention, partial(self.flex_attention, block_mask=block_mask))

        # 4. The same without flex_attention, and caches that are read in part or whose sequences differ.
        visible = visible_keys(positions, span, x.device, cached=T != S)
        mask = visible.mask(slice(None), torch.arange(S, device=x.device))
        return partial(masked_attention, x.new_zeros(()).where(mask, -math.inf))  # once, and not in each layer

    @classmethod
    def without_weights(cls, config: GPTConfig) -> "GPT":
        """A model on the meta device: its parameters have shapes, but no values."""
        with torch.device("meta"), NoInitialWeights():
            return cls(config)

    @classmethod
    def from_weights(
        cls,
        config: GPTConfig,
        weights: Mapping[str, Tensor],
        source_name: str,
        *,
        grow: bool = False,
        keep: Callable[[str, Tensor], nn.Parameter | nn.Module] | None = None,
    ) -> "GPT":
        """A model on the CPU with these weights, as `load_weights` takes them.

        keep: from a weight's name and its values to what the model holds; None: float32. Weights are read one at a
        time, and no others are drawn: memory peaks at the model and one weight.
        """
        model = cls.without_weights(config)
        fitted = model.fit_weights(weights, source_name, grow=grow)
        for name, tensor in fitted:
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            kept = nn.Parameter(tensor.float()) if keep is None else keep(name, tensor)
            if isinstance(kept, nn.Module):
                delattr(module, attribute)
            setattr(module, attribute, kept)
        if config.tie_weights:
            model.head.weight = model.wte.weight
        return model

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor], source_name: str) -> None:
        """Copy weights to the trainable parameters of the same names.

        Longer learned positions are cropped. Raises UserError, which names the source, unless all weights fit.
        """
        parameters = dict(self.named_parameters())
        for name, tensor in self.fit_weights(weights, source_name):
            parameters[name].copy_(shard_like(tensor, parameters[name]))

    def fit_weights(
        self, weights: Mapping[str, Tensor], source_name: str, *, grow: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, weight) of each trainable parameter. Raises UserError.

        With `grow`, rows of the vocabulary that the weights lack are drawn.
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
            n_missing = len(parameter) - len(tensor)
            if grow and name in ("wte.weight", "head.weight") and n_missing > 0:
                tensor = torch.cat((tensor, torch.randn(n_missing, parameter.size(1)) * 0.02))
            if tensor.shape != parameter.shape:
                shapes = f"{tuple(tensor.shape)} in the weights and {tuple(parameter.shape)} in the model"
                raise UserError(f"{source_name}: {name} is {shapes}")
            yield name, tensor

    def attention_layers(self) -> list[Attention]:
        """In order."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def muon_splits(self) -> dict[str, list[int]]:
        """Weights that are several matrices stacked: name -> rows of each. Muon orthogonalizes each one by itself."""
        return {f"blocks.{attn.layer}.attn.qkv.weight": attn.qkv_sizes for attn in self.attention_layers()}

    def parameter_sizes(self) -> Iterator[tuple[str, int]]:
        """(name, values) of each parameter, tied ones once; of a quantized weight as many as before."""
        for name, parameter in self.named_parameters():
            yield name, parameter.numel() * getattr(parameter, "values_an_element", 1)

    def count_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(size for _, size in self.parameter_sizes())

    def flops_per_token(self) -> float:
        """FLOPs of forward and backward for a training token (PaLM, Chowdhery et al. 2022, appendix B).

        6 for each weight of a matrix product, and 12 span H D for the attention of each layer.
        """
        matmul_weights = 0
        for name, size in self.parameter_sizes():
            if self.get_parameter(name).dim() == 2 and name not in ("wte.weight", "position.weight"):
                matmul_weights += size
        if self.config.tie_weights:
            matmul_weights += self.wte.weight.numel()  # as the head
        total_span = sum(attn.span for attn in self.attention_layers())
        return 6.0 * matmul_weights + 12.0 * total_span * self.config.n_head * self.config.head_dim
