"""A training step: forward and backward of the micro-batches, clipping, the decision to skip, and the update.

`TrainStep` is that step. `CapturedStep` records its kernels on a GPU once, as a CUDA graph, and replays them: a small
model, whose kernels take less time than the host needs to launch them, trains as fast as the GPU can.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanoforge.data.batches import Batch, Metrics
from nanoforge.distributed import set_gradient_sync
from nanoforge.errors import UserError
from nanoforge.training.checkpoint import TrainState

WARMUP_STEPS = 3  # before the capture: libraries set themselves up, and the optimizer makes its state


class StepResult(NamedTuple):
    """What the logger reads of a step."""

    metrics: Metrics  # summed over this rank's micro-batches; empty unless asked for
    grad_norm: Tensor  # a scalar on the device


@dataclass(frozen=True)
class TrainStep:
    """Forward, backward and update. Nothing in it waits for the device, with the optimizers that need no host.

    objective: (model, micro-batch, with_metrics) -> (loss, metrics). grad_clip: the largest gradient norm (0: any).
    """

    model: nn.Module  # under DDP with several ranks
    objective: Callable[..., tuple[Tensor, Metrics]]
    state: TrainState
    grad_clip: float

    def __call__(self, batches: Sequence[Batch], *, with_metrics: bool) -> StepResult:
        """Make a step on a rank's micro-batches. The last of them averages the gradients over the ranks."""
        optimizer, scaler = self.state.optimizer, self.state.scaler
        metrics: Metrics = {}
        for i, batch in enumerate(batches):
            set_gradient_sync(self.model, sync=i == len(batches) - 1)
            loss, batch_metrics = self.objective(self.model, batch, with_metrics=with_metrics)
            scaler.scale(loss).backward()
            metrics = {name: metrics[name] + metric for name, metric in batch_metrics.items()} if i else batch_metrics
        grad_norm = optimizer.clip_grad_norm(scaler, self.grad_clip)
        optimizer.update(scaler, skip=self.state.guard.should_skip(grad_norm))
        return StepResult(metrics, grad_norm)


class CapturedStep:
    """A step replayed as one CUDA graph, in which every tensor stays where it is in memory.

    What changes from step to step is written into tensors that the graph reads: the micro-batches, here, and learning
    rates, by `Optimizer.set_lr_scale`. torch.manual_seed reaches the graph too. Its gradients live in the graph's own
    memory, from a backward to the update. Steps before the capture are ordinary ones.
    """

    def __init__(self, step: TrainStep, device: torch.device) -> None:
        """Raises UserError where it can't be captured, whatever the arguments said."""
        if device.type != "cuda":
            raise UserError(f"--cuda_graph: needs a CUDA GPU, and this run is on {device.type}; leave it out")
        if step.state.scaler.is_enabled():
            raise UserError("--cuda_graph: the loss scaling of --dtype=float16 needs the host; use bfloat16 or float32")
        self.step = step
        self.stream = torch.cuda.Stream(device)
        self.n_warmup_steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batches: list[Batch] = []  # that the graph reads
        self.result: StepResult  # that it writes

    def __call__(self, batches: Sequence[Batch], *, with_metrics: bool) -> StepResult:
        """Make a step; its metrics are always there."""
        if self.n_warmup_steps < WARMUP_STEPS:
            self.n_warmup_steps += 1
            return self.warm_up(batches)
        if self.graph is None:
            self.capture(batches)
        assert self.graph is not None
        for mine, batch in zip(self.batches, batches, strict=True):
            mine.tokens.copy_(batch.tokens)
        self.graph.replay()
        return self.result

    def warm_up(self, batches: Sequence[Batch]) -> StepResult:
        """An ordinary step, on the stream of the capture."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.step(batches, with_metrics=True)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, batches: Sequence[Batch]) -> None:
        """Record a step without making it."""
        self.batches = [batch.clone() for batch in batches]
        graph = torch.cuda.CUDAGraph()
        with self.step.state.optimizer.capturable(), torch.cuda.graph(graph, stream=self.stream):
            self.result = self.step(self.batches, with_metrics=True)
        self.graph = graph
