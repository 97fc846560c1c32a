"""Muon: momentum, orthogonalized (Jordan et al. 2024). It trains matrices; vectors and embeddings go elsewhere.

The numbers are those of torch.optim.Muon. What differs is the speed: one batched Newton-Schulz iteration runs for all
matrices of a shape, or of its transpose, and it knows weights that stack several matrices, such as a fused qkv.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nanoforge.distributed import full_tensor, shard_like
from nanoforge.training.skippable import SkippableOptimizer


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


def lr_factor(shape: Sequence[int], adjust_lr_fn: str | None) -> float:
    """What the learning rate of a matrix is multiplied with, by its shape; the rules are torch.optim.Muon's."""
    rows, cols = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    return math.sqrt(max(1, rows / cols))


class Muon(SkippableOptimizer, torch.optim.Muon):
    """torch.optim.Muon, batched over matrices.

    splits: of a weight that stacks several matrices, the rows of each; none is higher than wide. dtype: the precision
    of the iteration; bfloat16 is torch's, float32 is far faster on a CPU that only emulates it. A weight that is
    sharded over ranks is gathered whole; every rank iterates on it and keeps its own rows. Its momentum stays sharded.
    """

    newton_schulz = staticmethod(newton_schulz)  # `Optimizer.compile` replaces it

    def __init__(
        self,
        params: Iterable[Any],
        splits: Mapping[Tensor, list[int]] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        **options: Any,
    ) -> None:
        super().__init__(params, **options)
        self.splits = splits or {}
        self.dtype = dtype

    def update_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        momenta: list[Tensor] = []
        self._init_group(group, params, grads, momenta)
        if not params:
            return
        update_scale = self.update_scale

        # 1. Momentum.
        grads = [self.masked_grad(grad, momentum) for grad, momentum in zip(grads, momenta, strict=True)]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta

        # 2. Split stacked weights into their matrices.
        split_updates = [
            full_tensor(update).split(self.splits.get(p, p.size(0))) for p, update in zip(params, updates, strict=True)
        ]

        # 3. Orthogonalize all of them, batched by shape.
        orthogonal = iter(self.orthogonalize([matrix for matrices in split_updates for matrix in matrices], group))

        # 4. Decay the weights, put the matrices back together and update.
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * update_scale)
        for p, matrices in zip(params, split_updates, strict=True):
            parts = [next(orthogonal) for _ in matrices]
            update = parts[0] if len(parts) == 1 else torch.cat(parts)
            lr = group["lr"] * lr_factor(parts[0].shape, group["adjust_lr_fn"])
            p.add_(shard_like(update * update_scale, p), alpha=-lr)

    def orthogonalize(self, matrices: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Each matrix orthogonalized."""
        # 1. Group by shape, a matrix and its transpose together.
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, matrix in enumerate(matrices):
            by_shape[tuple(sorted(matrix.shape))].append(i)

        result = list(matrices)
        for shape, indices in by_shape.items():
            # 2. Iterate on a stack of wide matrices: (N, rows, cols), rows <= cols.
            is_wide = [matrices[i].shape == shape for i in indices]
            wide = [matrices[i] if ok else matrices[i].T for i, ok in zip(indices, is_wide, strict=True)]
            stack = torch.stack(wide).to(self.dtype)
            stack = self.newton_schulz(stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
            # 3. Scatter back.
            for i, ok, update in zip(indices, is_wide, stack, strict=True):
                result[i] = update if ok else update.T
        return result
