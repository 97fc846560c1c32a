"""EMA of weights: an exponential moving average of the trained weights, to be evaluated and saved in their place.

A running mean of the last weights has less of the steps' noise than the last ones (Polyak and Juditsky 1992).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nanoforge.distributed import local_shard

N_UPDATES = "average/updates"


class WeightAverage:
    """The average of parameters, float32 as they are, and sharded as they are.

    decay: what each update keeps of the average. It is smaller at first, (1 + t) / (10 + t) after t updates, so that
    the first weights are soon forgotten (as in tf.train.ExponentialMovingAverage and diffusers' EMAModel).
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.averages = [parameter.detach().clone() for parameter in parameters]
        self.n_updates = torch.zeros((), device=parameters[0].device)

    def locals(self) -> tuple[list[Tensor], list[Tensor]]:
        """(averages, parameters): this rank's shards of them."""
        return [*map(local_shard, self.averages)], [*map(local_shard, self.parameters)]

    @torch.no_grad()
    def update(self, skip: Tensor | None) -> None:
        """Take up the parameters after a step. skip: as in Optimizer.update. Nothing waits for the device."""
        taken = 1.0 if skip is None else 1.0 - skip.to(self.n_updates.device)
        decay = ((1 + self.n_updates) / (10 + self.n_updates)).clamp(max=self.decay)
        averages, parameters = self.locals()
        changes = torch._foreach_sub(parameters, averages)
        torch._foreach_mul_(changes, (1 - decay) * taken)
        torch._foreach_add_(averages, changes)
        self.n_updates += taken

    @torch.no_grad()
    def swap(self) -> None:
        """The average to the parameters' place and the parameters to its own, without a further copy of all."""
        for average, parameter in zip(*self.locals(), strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it the parameters are the average; afterwards they are as they were, bit for bit."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def restart(self, n_updates: Tensor | None) -> None:
        """Take the parameters as the average, which a checkpoint has in their place. n_updates: None without one."""
        for average, parameter in zip(*self.locals(), strict=True):
            average.copy_(parameter)
        self.n_updates.fill_(0.0 if n_updates is None else n_updates)
