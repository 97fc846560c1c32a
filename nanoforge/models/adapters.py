"""Adapters: a few new parameters learn, those of the base stay as they are, bit for bit.

`lora` puts a product of two small matrices beside linear layers (Hu et al. 2021); `soft_prompt` adds rows to the token embedding, which a text
may hold like any other token: row j of the prompt has the id V + j (Lester et al. 2021). Both begin as the base: LoRA adds nothing at first,
and within `disable_adapter` a model is what it was before training.

The parameters of the base keep their names, so a checkpoint of those that learn is told from the base's by names alone.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoforge.errors import UserError, did_you_mean

# ---------------------------------------------------------------------------------------------------------------------
# LoRA


class LoraLinear(nn.Module):
    """W x + b + (alpha / rank) B A dropout(x), of a linear layer's own W and b; B begins at 0, A as in the paper's code."""

    on = True

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if not self.on:
            return y
        x = F.dropout(x, self.dropout, self.training)
        return y + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.scale


def lora(model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float) -> None:
    """Put LoRA beside the linear layers of the blocks whose names end in one of the targets (none given: beside all). Raises UserError."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    }
    ends = sorted({name.split(".", 2)[2] for name in layers})
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise UserError(
                f"--lora_targets: no linear layer of this model is called {target}; there are {', '.join(ends)}{did_you_mean(target, ends)}"
            )
    for name, layer in layers.items():
        if not targets or any(f".{name}".endswith(f".{target}") for target in targets):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, LoraLinear(layer, rank, alpha, dropout))


def merged(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The base's weights with W + scale B A for W, where the adapter has A and B."""
    return {
        name: weight + scale * adapter[b] @ adapter[name.removesuffix("weight") + "lora_A"]
        if (b := name.removesuffix("weight") + "lora_B") in adapter
        else weight
        for name, weight in base.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# soft prompts


class TensorProvider(nn.Module):
    """The rows are parameters."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = nn.Parameter(rows.clone())

    def forward(self) -> Tensor:
        return self.rows


class LSTMProvider(nn.Module):
    """The rows are parameters, to which a bidirectional LSTM over them and an MLP add (after Liu et al. 2021); they add nothing at first."""

    def __init__(self, rows: Tensor):
        super().__init__()
        width = rows.size(1)
        self.rows = nn.Parameter(rows.clone())
        self.lstm = nn.LSTM(width, width // 2, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width // 2 * 2, width), nn.ReLU(), nn.Linear(width, width))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    def forward(self) -> Tensor:
        return self.rows + self.mlp(self.lstm(self.rows[None])[0])[0]


PROVIDERS = {"tensor": TensorProvider, "lstm": LSTMProvider}


class PromptedEmbedding(nn.Module):
    """A token embedding (V, C) with the rows of a prompt (P, C) behind it."""

    on = True

    def __init__(self, embedding: nn.Embedding, prompt: nn.Module):
        super().__init__()
        self.weight, self.prompt = embedding.weight, prompt
        self.V = embedding.num_embeddings
        with torch.no_grad():
            self.register_buffer("begun", prompt().clone(), persistent=False)  # what the rows are before training

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.prompt() if self.on else self.begun
        own = ids >= self.V
        return torch.where(
            own[..., None],
            F.embedding((ids - self.V).clamp(min=0), rows),
            F.embedding(ids.masked_fill(own, 0), self.weight),
        )


@torch.no_grad()
def initial_rows(embedding: Tensor, seeds: Sequence[int | None], init: str, known: int) -> Tensor:
    """The first values of a prompt's rows, (P, C): those of the tokens that seed them; without a seed (None) `vocab`: distinct random rows of
    the `known` first ones of the embedding (V, C), `normal`: normal with its standard deviation."""
    free = torch.randperm(known)[: len(seeds)] if len(seeds) <= known else torch.randint(known, (len(seeds),))
    rows = embedding[free].clone() if init == "vocab" else torch.randn(len(seeds), embedding.size(1)) * embedding.std()
    for row, seed in enumerate(seeds):
        if seed is not None:
            rows[row] = embedding[seed]
    return rows


def soft_prompt(model: nn.Module, rows: Tensor, provider: str) -> None:
    """Add a prompt's rows to the model's token embedding."""
    model.wte = PromptedEmbedding(model.wte, PROVIDERS[provider](rows))


def prompt_rows(weights: Mapping[str, Tensor], provider: str) -> Tensor:
    """The rows (P, C) of a prompt from the parameters that a checkpoint holds."""
    own = {
        name.removeprefix("wte.prompt."): tensor for name, tensor in weights.items() if name.startswith("wte.prompt.")
    }
    prompt = PROVIDERS[provider](own["rows"])
    prompt.load_state_dict(own)
    with torch.no_grad():
        return prompt().clone()


# ---------------------------------------------------------------------------------------------------------------------
# both


def freeze(model: nn.Module) -> None:
    """Let only what adapters brought learn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2].startswith("lora_") or name.startswith("wte.prompt."))


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within it the model is what it was before its adapter learned."""
    parts = [module for module in model.modules() if isinstance(module, LoraLinear | PromptedEmbedding)]
    for part in parts:
        part.on = False
    try:
        yield
    finally:
        for part in parts:
            part.on = True


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A sha256 over all weights, by their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
