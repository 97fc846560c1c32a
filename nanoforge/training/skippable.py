"""The base of optimizers that can skip a step without the host knowing, as torch's fused ones can."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SkippableOptimizer(torch.optim.Optimizer):
    """An optimizer whose step changes neither parameters nor state where the tensor `found_inf` is 1.

    The driver sets found_inf before `step`; None means that no step is skipped. Subclasses define `update_group`.
    """

    found_inf: Tensor | None = None

    @property
    def update_scale(self) -> Tensor | float:
        """What multiplies updates and weight decay: 0 in a step to skip, else 1."""
        return 1.0 if self.found_inf is None else 1.0 - self.found_inf

    def masked_grad(self, grad: Tensor, momentum: Tensor) -> Tensor:
        """The gradient; in a step to skip the momentum, whose average with itself changes nothing."""
        return grad if self.found_inf is None else torch.where(self.found_inf > 0, momentum, grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.update_group(group)
        return loss

    def update_group(self, group: dict[str, Any]) -> None:
        """Update the parameters of a group, and their state."""
        raise NotImplementedError
