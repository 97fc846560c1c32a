"""Adapters: a few new parameters are trained, and the base model stays as it is, bit for bit.

Knows nothing of runs, data or objectives.

LoRA adds a low-rank update to linear layers (Hu et al. 2021); the rows of tokens that the base lacks are trained beside
it, in the embedding and in the head. A soft prompt adds virtual tokens to the token embedding,
which a text holds like any other token: virtual token j has the id V + j (Lester et al. 2021). Both start as the base
model: LoRA's update is 0, and a virtual token may start as the embedding of a real one. Within `disable_adapter` a
model is what it was before training.

The base's parameters keep their names, so names alone tell an adapter's parameters from the base's.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoforge.errors import UserError, did_you_mean
from nanoforge.models.quantized import QuantizedWeight, Unpack

# ---------------------------------------------------------------------------------------------------------------------
# the frozen base, in any dtype


def cast(weight: Tensor, scales: None, dtype: torch.dtype) -> Tensor:
    """A weight that is stored whole, in another dtype."""
    return weight.to(dtype)


class FrozenProduct(torch.autograd.Function):
    """W x + b with a frozen W and b. `unpack` makes W, (out, in), of what is stored, in the dtype of x.

    Backward unpacks W again: autograd would keep every W, unpacked, until then.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, unpack: Unpack, stored: Tensor, scales: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(stored, scales)
        ctx.unpack = unpack
        return F.linear(x, unpack(stored, scales, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ ctx.unpack(*ctx.saved_tensors, grad.dtype), None, None, None, None


class FrozenLinear(nn.Module):
    """A linear layer of the base, whose weight may be quantized."""

    streamed: nn.Module | None  # the same layer for decoding, without gradients

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.streamed = None  # of the instance: a module's attribute of the class would hide what is assigned later
        weight: Any = linear.weight
        self.weight = weight  # (out, in), or what stands in its place
        self.bias = linear.bias
        self.unpack = weight.format.unpack if isinstance(weight, QuantizedWeight) else cast

    @property
    def is_quantized(self) -> bool:
        return self.unpack is not cast

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.streamed is not None:
            return self.streamed(x)
        stored = (self.weight, None) if self.unpack is cast else (self.weight.packed, self.weight.scales)
        return FrozenProduct.apply(x, self.bias, self.unpack, *stored)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


class LoraLinear(FrozenLinear):
    """y = W x + b + (alpha / rank) B A dropout(x), with W and b of a linear layer.

    B starts at 0, A as in the paper's code.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float, dropout: float):
        super().__init__(linear)
        self.enabled = True
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = alpha / rank
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y = super().forward(x)
        if not self.enabled:
            return y
        if self.dropout:  # without any, a graph serves training and evaluation
            x = F.dropout(x, self.dropout, self.training)
        update = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return torch.add(y, update, alpha=self.scale)


def add_lora(model: nn.Module, targets: Sequence[str], *, rank: int, alpha: float, dropout: float) -> None:
    """Replace linear layers of the blocks by LoraLinear: those whose names end in one of the targets, or all if there
    are no targets.

    Raises UserError for a target that is the end of no layer's name.
    """
    linears = {}
    for name, module in model.named_modules():
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            linears[name] = module

    for target in targets:
        if not any(matches(name, target) for name in linears):
            available = sorted({name.split(".", 2)[2] for name in linears})  # blocks.0.attn.qkv -> attn.qkv
            raise UserError(
                f"--lora_targets: this model has no linear layer {target}; available: {', '.join(available)}"
                f"{did_you_mean(target, available)}"
            )

    for name, linear in linears.items():
        if not targets or any(matches(name, target) for target in targets):
            parent, _, attribute = name.rpartition(".")
            layer = LoraLinear(linear, rank=rank, alpha=alpha, dropout=dropout)
            setattr(model.get_submodule(parent), attribute, layer)


def matches(name: str, target: str) -> bool:
    """Whether the last parts of a layer's name are the target: blocks.0.attn.qkv matches qkv and attn.qkv."""
    return f".{name}".endswith(f".{target}")


def merge_lora(
    base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float, vocab_size: int = 0
) -> dict[str, Tensor]:
    """The base's weights, with W + scale B A for each W that the adapter has A and B for, and with the rows of new
    tokens, which are the last of vocab_size tokens."""
    merged = dict(base)
    for name in adapter:
        layer, _, parameter = name.rpartition(".")
        if parameter == "new_rows":
            table = f"{layer.removesuffix('.rows')}.weight"  # head.rows.new_rows -> head.weight
            merged[table] = with_rows(base[table], adapter[name], first=vocab_size - len(adapter[name]))
        if parameter == "lora_B":
            delta = scale * adapter[name] @ adapter[f"{layer}.lora_A"]
            merged[f"{layer}.weight"] = base[f"{layer}.weight"] + delta
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# rows of new tokens


class TokenRows(nn.Module):
    """A frozen table (V, C) in which the rows of new tokens, (R, C) from row `first` on, are trained (peft's trainable
    tokens)."""

    initial_rows: Tensor  # (R, C), before training

    def __init__(self, weight: Tensor, first: int, count: int):
        super().__init__()
        self.enabled = True
        assert isinstance(weight, nn.Parameter)
        self.weight = weight
        self.first = first
        rows = weight.detach()[first : first + count].to(torch.float32, copy=True)
        self.new_rows = nn.Parameter(rows)
        self.register_buffer("initial_rows", rows.clone(), persistent=False)

    def table(self) -> Tensor:
        """All rows, (V, C)."""
        rows = self.new_rows if self.enabled else self.initial_rows
        return with_rows(self.weight, rows, self.first)


class TokenRowsEmbedding(TokenRows):
    """A token embedding with rows of new tokens."""

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., C)
        rows = self.new_rows if self.enabled else self.initial_rows
        is_new = (ids >= self.first) & (ids < self.first + len(rows))
        return torch.where(
            is_new[..., None],
            F.embedding((ids - self.first).clamp(0, len(rows) - 1), rows),
            F.embedding(ids, self.weight),
        )


class TokenRowsHead(nn.Module):
    """A head with rows of new tokens: those of the embedding, if they are tied, or its own."""

    def __init__(self, rows: TokenRows):
        super().__init__()
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        """(V, C)."""
        return self.rows.table()

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., V)
        return F.linear(x, self.weight.to(x.dtype))


def with_rows(weight: Tensor, rows: Tensor, first: int) -> Tensor:
    """A table (V, C) with other rows (R, C) from row `first` on, where it may end; in the dtype that holds both."""
    return torch.cat((weight[:first], rows, weight[first + len(rows) :]))


def add_token_rows(model: nn.Module, first: int, count: int) -> None:
    """Make the rows of new tokens trainable, in the embedding and in the head."""
    head = model.head
    assert isinstance(model.wte, nn.Embedding) and isinstance(head, nn.Linear)
    is_tied = head.weight is model.wte.weight
    model.wte = TokenRowsEmbedding(model.wte.weight, first, count)
    model.head = TokenRowsHead(model.wte if is_tied else TokenRows(head.weight, first, count))


# ---------------------------------------------------------------------------------------------------------------------
# soft prompts


class TensorProvider(nn.Module):
    """Virtual tokens (P, C) as plain parameters."""

    needs_exact_weights = True  # they are not cast before they are used

    def __init__(self, initial: Tensor):
        super().__init__()
        self.rows = nn.Parameter(initial.clone())

    def forward(self) -> Tensor:
        return self.rows


class LSTMProvider(nn.Module):
    """Virtual tokens (P, C) as parameters, plus an MLP of a bidirectional LSTM over them (after Liu et al. 2021).

    The MLP's output starts at 0.
    """

    needs_exact_weights = True

    def __init__(self, initial: Tensor):
        super().__init__()
        n_embd = initial.size(1)
        hidden = n_embd // 2
        self.rows = nn.Parameter(initial.clone())
        self.lstm = nn.LSTM(n_embd, hidden, num_layers=2, bidirectional=True, batch_first=True)
        output = nn.Linear(n_embd, n_embd)
        self.mlp = nn.Sequential(nn.Linear(hidden * 2, n_embd), nn.ReLU(), output)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)

    def forward(self) -> Tensor:
        states, _ = self.lstm(self.rows[None])  # (1, P, 2 hidden)
        return self.rows + self.mlp(states)[0]


PROVIDERS = {"tensor": TensorProvider, "lstm": LSTMProvider}


class PromptedEmbedding(nn.Module):
    """A token embedding (V, C) followed by the virtual tokens of a prompt (P, C)."""

    initial_prompt: Tensor  # (P, C), before training

    def __init__(self, embedding: nn.Embedding, prompt: nn.Module):
        super().__init__()
        self.enabled = True
        self.weight = embedding.weight
        self.prompt = prompt
        self.vocab_size = embedding.num_embeddings
        with torch.no_grad():
            self.register_buffer("initial_prompt", prompt().clone(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., C)
        virtual_tokens = self.prompt() if self.enabled else self.initial_prompt
        is_virtual = ids >= self.vocab_size
        return torch.where(
            is_virtual[..., None],
            F.embedding((ids - self.vocab_size).clamp(min=0), virtual_tokens),
            F.embedding(ids.masked_fill(is_virtual, 0), self.weight),
        )


@torch.no_grad()
def initial_prompt(embedding: Tensor, seeds: Sequence[int | None], init: str, vocab_size: int) -> Tensor:
    """Initial virtual tokens, (P, C), from a token embedding (V, C).

    A seed is the id of the token whose embedding a virtual token copies. Those without one (None) start, with init
    `vocab`, as distinct random tokens below vocab_size, or with init `normal`, as N(0, std of the embedding).
    """
    count, n_embd = len(seeds), embedding.size(1)
    random_ids = torch.randperm(vocab_size)[:count] if count <= vocab_size else torch.randint(vocab_size, (count,))
    prompt = embedding[random_ids].float()
    if init == "normal":
        prompt = torch.randn(count, n_embd) * embedding.float().std()
    for row, seed in enumerate(seeds):
        if seed is not None:
            prompt[row] = embedding[seed]
    return prompt


def add_soft_prompt(model: nn.Module, initial: Tensor, provider: str) -> None:
    """Add virtual tokens, with initial values (P, C), to the model's token embedding. provider: a key of PROVIDERS."""
    embedding = model.wte
    assert isinstance(embedding, nn.Embedding)
    model.wte = PromptedEmbedding(embedding, PROVIDERS[provider](initial))


def load_prompt(weights: Mapping[str, Tensor], provider: str) -> Tensor:
    """The trained virtual tokens, (P, C), from the parameters in a checkpoint."""
    prefix = "wte.prompt."
    state = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    prompt = PROVIDERS[provider](state["rows"])
    prompt.load_state_dict(state)
    with torch.no_grad():
        return prompt().clone()


# ---------------------------------------------------------------------------------------------------------------------
# all adapters


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter is an adapter's, by its name."""
    return name.rpartition(".")[2].startswith(("lora_", "new_rows")) or name.startswith("wte.prompt.")


def freeze_base(model: nn.Module) -> None:
    """Train the adapter's parameters only."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter_parameter(name))
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and not any(p.requires_grad for p in module.parameters()):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, FrozenLinear(module))


def hash_reference(model: nn.Module) -> str:
    """The SHA-256 of all that a model computes with within `disable_adapter`: the identity of a reference model."""
    weights = {name: tensor for name, tensor in model.named_parameters() if not is_adapter_parameter(name)}
    return hash_weights(weights | dict(model.named_buffers()))  # a soft prompt's start is a buffer


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within it the model is what it was before its adapter was trained."""
    adapted = [module for module in model.modules() if isinstance(module, LoraLinear | TokenRows | PromptedEmbedding)]
    for module in adapted:
        module.enabled = False
    try:
        yield
    finally:
        for module in adapted:
            module.enabled = True


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 of all weights with their names, in hexadecimal: the identity of a base."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().float().contiguous().numpy().data)
    return digest.hexdigest()
