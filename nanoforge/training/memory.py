"""The memory of a training step: counted where it can be, by formulas for what backward keeps (docs/memory.md).

A formula takes the model's shape, `config`, by the names of GPTConfig's fields.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanoforge.distributed import local_shard

MOMENTS = {"adamw": 2, "adam": 2, "nadam": 2, "radam": 2, "lion": 1, "adagrad": 1}  # float32 values a parameter
MLP_VALUES = {"plain": 2, "gated": 4}  # of the hidden width: before and after what is not a matrix product
NORMS = {"pre": 2, "post": 2, "both": 4}


class MemoryPlan(NamedTuple):
    """Bytes on one rank. The first four are exact, apart from an optimizer that MOMENTS lacks."""

    frozen: int  # weights and buffers
    trainable: int
    gradients: int
    optimizer: int
    activations: int  # kept for backward
    recomputed: int  # with activation checkpointing: those of one layer, computed again, and its gradients
    logits: int  # at their peak, in backward
    reference: int = 0  # a copy of the model

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.frozen + self.trainable + self.gradients + self.optimizer + self.reference

    @property
    def peak(self) -> int:
        """In a step."""
        return self.state + self.activations + max(self.logits, self.recomputed)


def plan_memory(model: nn.Module, tokens: int, optimizer: str, lora_rank: int) -> MemoryPlan:
    """Of a step of a GPT with micro-batches of so many tokens. lora_rank: 0 without a LoRA."""
    config: Any = model.config
    dtype: Any = model.compute_dtype
    parameters = [*model.parameters()]
    trainable = count_bytes(parameter for parameter in parameters if parameter.requires_grad)
    frozen = count_bytes(parameter for parameter in parameters if not parameter.requires_grad)
    layer = tokens * layer_values(config, lora_rank, frozen_linears=frozen > 0 and not lora_rank) * dtype.itemsize
    kept = layer
    if config.activation_checkpointing:
        kept = tokens * config.n_embd * dtype.itemsize  # the layer's input
    return MemoryPlan(
        frozen=frozen + count_bytes(model.buffers()),
        trainable=trainable,
        gradients=trainable,
        optimizer=MOMENTS.get(optimizer, 0) * trainable,
        activations=config.n_layer * kept + cast_bytes(parameters, dtype),
        recomputed=layer + 2 * tokens * hidden_size(config) * dtype.itemsize if config.activation_checkpointing else 0,
        logits=logits_bytes(config, tokens),
    )


def largest_rows(peak: Callable[[int], int], available: int, most: int) -> int:
    """The most rows, up to `most`, of which a step needs no more bytes than are available; 0 where not even one fits.

    peak(rows): bytes of a step, which grow with the rows.
    """
    fits, too_many = 0, most + 1
    while too_many - fits > 1:
        rows = (fits + too_many) // 2
        fits, too_many = (rows, too_many) if peak(rows) <= available else (fits, rows)
    return fits


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Of this rank's shards, each tensor once."""
    return sum(local.numel() * local.element_size() for local in map(local_shard, tensors))


def cast_bytes(parameters: Iterable[Tensor], dtype: torch.dtype) -> int:
    """Of the cast copies that backward needs: of the matrices that are trained in another dtype."""
    matrices = (p for p in parameters if p.requires_grad and p.dim() == 2 and p.dtype != dtype)
    return sum(local_shard(matrix).numel() * dtype.itemsize for matrix in matrices)


def hidden_size(config: Any) -> int:
    """Of the MLP."""
    return round(config.mlp_ratio * config.n_embd)


def layer_values(config: Any, lora_rank: int = 0, *, frozen_linears: bool = False) -> int:
    """Values that a layer keeps for backward, a token, with attention that keeps no scores.

    lora_rank: of a LoRA on all linear layers. frozen_linears: no linear layer is trained, so none keeps its input.
    """
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    hidden = hidden_size(config)
    # 1. The norms, and q, k, v and the output of attention.
    values = NORMS[config.norm_placement] * config.n_embd + (q + 2 * kv) + q
    # 2. q and k once more where they are normalized, and where they are rotated.
    values += (bool(config.qk_norm) + (config.position == "rope")) * (q + kv)
    # 3. The MLP.
    values += MLP_VALUES[config.mlp] * hidden
    # 4. Inputs of linear layers that are not kept already, and what is between A and B of a LoRA.
    if frozen_linears:
        values -= hidden
    elif config.norm != "rmsnorm_nogain":
        values += 2 * config.n_embd
    n_linears = 5 if config.mlp == "gated" else 4
    return values + n_linears * lora_rank


def logits_bytes(config: Any, tokens: int) -> int:
    """The peak in backward: log-probabilities and two gradients, float32."""
    return min(tokens, config.loss_chunk or tokens) * sum(config.vocab_sizes) * 12


def cache_bytes(config: Any, sequences: int, tokens: int, dtype: torch.dtype) -> int:
    """The KV cache of so many sequences of so many tokens."""
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * sequences * tokens * dtype.itemsize
