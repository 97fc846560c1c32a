"""Muon: momentum, orthogonalized (Jordan et al. 2024). It trains matrices; vectors and embeddings go elsewhere.

The numbers are those of torch.optim.Muon. What differs is the speed: all weights of a group are updated together, with
one batched Newton-Schulz iteration for all matrices of a shape or of its transpose, and it knows weights that stack
several matrices, such as a fused qkv. A step launches as many kernels for twelve layers as for one.
"""

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanoforge.distributed import first_row, full_tensor, is_dtensor, local_shard, with_local_shard
from nanoforge.training.skippable import SkippableOptimizer

# ---------------------------------------------------------------------------------------------------------------------
# how the weights of a group lie together


class Kind(NamedTuple):
    """Weights of one shape that stack the same matrices."""

    n_weights: int
    rows: int
    cols: int
    splits: tuple[int, ...]  # rows of each matrix of a weight


class Stack(NamedTuple):
    """Matrices of one shape, rows <= cols, and of its transpose, which are iterated on together."""

    parts: tuple[tuple[int, int], ...]  # (kind, which of its matrices)
    lr_factors: Tensor  # (N, 1, 1), of every matrix


class Layout(NamedTuple):
    """Weights that are updated together, kind by kind, and their momentum; of sharded ones this rank's rows."""

    params: list[Tensor]
    momentum: Tensor  # flat
    momenta: list[Tensor]  # views of it, as the state holds them
    kinds: tuple[Kind, ...]
    stacks: tuple[Stack, ...]

    @property
    def is_sharded(self) -> bool:
        return is_dtensor(self.params[0])

    def by_kind(self, updates: Tensor) -> list[Tensor]:
        """Whole matrices, (n_weights, rows, cols) of each kind, from a flat tensor like the momentum."""
        if not self.is_sharded:
            parts = updates.split([kind.n_weights * kind.rows * kind.cols for kind in self.kinds])
            return [part.view(kind[:3]) for part, kind in zip(parts, self.kinds, strict=True)]
        parts = updates.split([local_shard(momentum).numel() for momentum in self.momenta])
        shards = [part.view_as(local_shard(p)) for p, part in zip(self.params, parts, strict=True)]
        whole = [full_tensor(with_local_shard(p, shard)) for p, shard in zip(self.params, shards, strict=True)]
        ends = itertools.accumulate(kind.n_weights for kind in self.kinds)
        return [torch.stack(whole[end - kind.n_weights : end]) for kind, end in zip(self.kinds, ends, strict=True)]

    def local_steps(self, steps: Sequence[Tensor]) -> list[Tensor]:
        """What is to be subtracted from each weight, or from this rank's rows of it, from what `by_kind` returns."""
        by_weight = [step for kind in steps for step in kind.unbind()]
        if not self.is_sharded:
            return by_weight
        return [step[first_row(p) :][: local_shard(p).size(0)] for p, step in zip(self.params, by_weight, strict=True)]


class Settings(NamedTuple):
    """What stays the same from step to step."""

    nesterov: bool
    coefficients: tuple[float, float, float]
    ns_steps: int
    eps: float
    dtype: torch.dtype  # of the iteration


class Rates(NamedTuple):
    """What may change from step to step: scalars on the device, so that no change compiles anything again."""

    lr: Tensor
    weight_decay: Tensor
    momentum: Tensor
    found_inf: Tensor  # 1: nothing is to change


def lr_factor(shape: Sequence[int], adjust_lr_fn: str | None) -> float:
    """What the learning rate of a matrix is multiplied with, by its shape; the rules are torch.optim.Muon's."""
    rows, cols = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    return math.sqrt(max(1, rows / cols))


def sort_by_kind(params: Iterable[Tensor], splits: Mapping[Tensor, list[int]]) -> tuple[list[Tensor], tuple[Kind, ...]]:
    """The weights, those of a kind together, and the kinds."""
    by_kind: dict[tuple[int, int, tuple[int, ...]], list[Tensor]] = defaultdict(list)
    for p in params:
        rows, cols = p.shape
        by_kind[rows, cols, tuple(splits.get(p, [rows]))].append(p)
    kinds = tuple(Kind(len(members), *kind) for kind, members in by_kind.items())
    return [p for members in by_kind.values() for p in members], kinds


def make_stacks(kinds: Sequence[Kind], adjust_lr_fn: str | None, device: torch.device) -> tuple[Stack, ...]:
    """The matrices of all kinds, by shape."""
    parts: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
    factors: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for i, kind in enumerate(kinds):
        for j, rows in enumerate(kind.splits):
            shape = tuple(sorted((rows, kind.cols)))
            parts[shape].append((i, j))
            factors[shape] += [lr_factor((rows, kind.cols), adjust_lr_fn)] * kind.n_weights
    return tuple(Stack(tuple(parts[s]), torch.tensor(factors[s], device=device).view(-1, 1, 1)) for s in parts)


# ---------------------------------------------------------------------------------------------------------------------
# a step


def newton_schulz(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Nearly orthogonal matrices with the same singular vectors: (N, rows, cols) to (N, rows, cols), rows <= cols.

    A quintic iteration in the matrices' own precision (Jordan et al. 2024).
    """
    a, b, c = coefficients
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT  # (N, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def momentum_at(step: int, momentum: float, warmup: int) -> float:
    """The momentum of a step: from 0.85, or less where it is to be less, on a straight line for `warmup` steps.

    As in modded-nanogpt: while gradients still change fast, older ones are worth less.
    """
    start = min(0.85, momentum)
    return momentum if step >= warmup else start + (momentum - start) * step / warmup


Orthogonalize = Callable[[Sequence[Tensor], Sequence[Kind], Sequence[Stack], Settings, Tensor], list[Tensor]]


def average_gradients(momentum: Tensor, grads: Tensor, rates: Rates, *, nesterov: bool) -> Tensor:
    """Average the gradients into the momentum, and return what is to be orthogonalized; all of them flat.

    In a step to skip the momentum is averaged with itself, which changes nothing.
    """
    grads = torch.where(rates.found_inf > 0, momentum, grads)
    momentum.lerp_(grads, 1 - rates.momentum)
    return grads.lerp_(momentum, rates.momentum) if nesterov else momentum


def orthogonalize(
    updates: Sequence[Tensor], kinds: Sequence[Kind], stacks: Sequence[Stack], settings: Settings, lr: Tensor
) -> list[Tensor]:
    """What to subtract from the weights of each kind, (n_weights, rows, cols): lr times the orthogonal matrices."""
    matrices = [list(update.split(kind.splits, dim=1)) for update, kind in zip(updates, kinds, strict=True)]
    for parts, lr_factors in stacks:
        # 1. Iterate on a stack of wide matrices: (N, rows, cols), rows <= cols.
        tall = [matrices[i][j].size(1) > matrices[i][j].size(2) for i, j in parts]
        wide = [matrices[i][j].mT if is_tall else matrices[i][j] for (i, j), is_tall in zip(parts, tall, strict=True)]
        stack = torch.cat(wide).to(settings.dtype)
        stack = newton_schulz(stack, settings.coefficients, settings.ns_steps, settings.eps)
        # 2. Scatter back, in float32.
        steps = (stack * (lr * lr_factors)).split([kinds[i].n_weights for i, _ in parts])
        for (i, j), is_tall, step in zip(parts, tall, steps, strict=True):
            matrices[i][j] = step.mT.contiguous() if is_tall else step
    return [parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in matrices]


def compute_steps(
    layout: Layout, grads: Tensor, settings: Settings, rates: Rates, orthogonalize: Orthogonalize = orthogonalize
) -> tuple[list[Tensor], Tensor]:
    """(what to subtract from the weights of each kind, which part of all weights decays before).

    Of sharded weights every rank gathers the whole matrices, and iterates on all of them.
    """
    updates = average_gradients(layout.momentum, grads, rates, nesterov=settings.nesterov)
    lr = rates.lr * (1 - rates.found_inf)
    steps = orthogonalize(layout.by_kind(updates), layout.kinds, layout.stacks, settings, lr)
    return steps, lr * rates.weight_decay


def decay_cautiously(weights: list[Tensor], steps: list[Tensor], part: Tensor) -> None:
    """Decay weights only where the step, which is subtracted, makes them smaller too (Chen et al. 2025)."""
    decays = torch._foreach_mul(weights, steps)
    torch._foreach_sign_(decays)
    torch._foreach_clamp_min_(decays, 0.0)  # 1 where both have the same sign
    torch._foreach_mul_(decays, weights)
    torch._foreach_mul_(decays, part)
    torch._foreach_sub_(weights, decays)


class Muon(SkippableOptimizer, torch.optim.Muon):
    """torch.optim.Muon, batched over matrices.

    splits: of a weight that stacks several matrices, the rows of each. dtype: the precision of the iteration; bfloat16
    is torch's, float32 is far faster on a CPU that only emulates it. cautious: see `decay_cautiously`. momentum_warmup:
    steps until the momentum is reached, for which `set_step` is to be called before each step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        splits: Mapping[Tensor, list[int]] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        *,
        cautious: bool = False,
        momentum_warmup: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, **options)
        self.splits = splits or {}
        self.dtype = dtype
        self.cautious = cautious
        self.momentum_warmup = momentum_warmup
        self.step_number = momentum_warmup  # of a step after the warm-up, unless it is set
        self.layouts: dict[Tensor, Layout] = {}  # of a group, by its first weight
        self.scalars: dict[str, tuple[float, Tensor]] = {}
        self.compute_steps = compute_steps
        self.orthogonalize = orthogonalize

    def compile(self) -> None:
        """Compile the step as one function, apart from what is one kernel for all weights already; of sharded weights
        what follows the collectives."""
        if is_dtensor(self.param_groups[0]["params"][0]):
            self.orthogonalize = torch.compile(orthogonalize, dynamic=False)
        else:
            self.compute_steps = torch.compile(compute_steps, dynamic=False)

    def update_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        layout = self.layout(params, group["adjust_lr_fn"])
        settings = Settings(
            nesterov=group["nesterov"],
            coefficients=group["ns_coefficients"],
            ns_steps=group["ns_steps"],
            eps=group["eps"],
            dtype=self.dtype,
        )
        rates = Rates(
            lr=self.scalar("lr", group["lr"], layout.momentum),
            weight_decay=self.scalar("weight_decay", group["weight_decay"], layout.momentum),
            momentum=self.scalar("momentum", self.momentum_of(group), layout.momentum),
            found_inf=self.scalar("found_inf", 0.0 if self.found_inf is None else self.found_inf, layout.momentum),
        )
        grads = torch.cat([local_shard(p.grad).flatten() for p in layout.params if p.grad is not None])
        steps_by_kind, decay = self.compute_steps(layout, grads, settings, rates, self.orthogonalize)
        weights, steps = [local_shard(p) for p in layout.params], layout.local_steps(steps_by_kind)
        if self.cautious:
            decay_cautiously(weights, steps, decay)
        else:
            torch._foreach_mul_(weights, 1 - decay)
        torch._foreach_sub_(weights, steps)

    def layout(self, params: list[Tensor], adjust_lr_fn: str | None) -> Layout:
        """The layout of the weights: a new one at the first step, after a state was loaded, or for other weights."""
        layout = self.layouts.get(params[0])
        if layout is not None and len(layout.params) == len(params):
            held = [self.state[p].get("momentum_buffer") for p in layout.params]
            if all(map(operator.is_, held, layout.momenta)):
                return layout
        first = params[0]
        params, kinds = sort_by_kind(params, self.splits)
        shards = [local_shard(self.state[p].get("momentum_buffer", torch.zeros_like(p))) for p in params]
        momentum = torch.cat([shard.flatten() for shard in shards])
        parts = momentum.split([shard.numel() for shard in shards])
        momenta = []
        for p, part, shard in zip(params, parts, shards, strict=True):
            momenta.append(with_local_shard(p, part.view_as(shard)))
            self.state[p]["momentum_buffer"] = momenta[-1]
        stacks = make_stacks(kinds, adjust_lr_fn, momentum.device)
        self.layouts[first] = Layout(params, momentum, momenta, kinds, stacks)
        return self.layouts[first]

    def momentum_of(self, group: dict[str, Any]) -> float:
        """A group's momentum at this step."""
        return momentum_at(self.step_number, group["momentum"], self.momentum_warmup)

    def set_step(self, step: int) -> None:
        """Set the momentum of a step, also in the tensors that a captured step reads."""
        self.step_number = step
        for group in self.param_groups:
            if "momentum" in self.scalars:
                self.scalar("momentum", self.momentum_of(group), self.scalars["momentum"][1])

    def scalar(self, name: str, value: Tensor | float, like: Tensor) -> Tensor:
        """A number as a tensor on the device, always the same one; a tensor is there already."""
        if isinstance(value, Tensor):
            return value
        if name not in self.scalars or self.scalars[name][0] != value:
            tensor = like.new_empty(()) if name not in self.scalars else self.scalars[name][1]
            self.scalars[name] = (value, tensor.fill_(value))
        return self.scalars[name][1]
