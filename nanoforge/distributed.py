"""Ranks: who we are, one process or several under torchrun, and what they agree on.

Collectives on CPU tensors go through gloo, on GPU tensors through NCCL; with one process all of them are the identity.
"""

import functools
import inspect
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from nanoforge.device import get_device
from nanoforge.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `world_size`, its device, and what the ranks agree on. With one process all is the identity."""

    rank: int
    world_size: int
    device: torch.device
    slow_group: dist.ProcessGroup | None = None  # all ranks, with a timeout of days: for work that one does alone
    save_group: dist.ProcessGroup | None = None  # all ranks, for the threads that write checkpoints

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, number: int, group: dist.ProcessGroup | None = None) -> int:
        """The largest of the ranks' numbers. It goes through the host and waits for no device."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
        return int(tensor)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.all_reduce_max(0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block runs on rank 0 first, for as long as it takes, then on the others. If it fails on rank 0 the others fail too."""
        failed = False
        try:
            if self.is_main:
                yield
        except Exception:
            failed = True
            raise
        finally:
            if self.all_reduce_max(failed, self.slow_group) and not self.is_main:
                raise UserError("rank 0 could not go on")
        if not self.is_main:
            yield


@contextmanager
def ranks(device_name: str, timeout: float = 600.0) -> Iterator[Ranks]:
    """Join the process group that torchrun made, if it did, and leave it at the end. A rank waits `timeout` seconds for the others."""
    device = get_device(device_name)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Ranks(0, 1, device)
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=max(300.0, timeout))))
    if (
        os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    ):  # torchrun on one machine restarts with the same store, where the addresses of the dead still are
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    try:
        patient, saving = (dist.new_group(backend="gloo", timeout=timedelta(days=7)) for _ in range(2))
        yield Ranks(dist.get_rank(), world, device, patient, saving)
    finally:
        host_mesh.cache_clear()
        dist.destroy_process_group()


class Share(NamedTuple):
    """Rows [first, last) of a global batch, in micro-batches of `micro` rows."""

    first: int
    last: int
    micro: int


def share_of_rows(batch_size: int, accumulation: int, ranks: Ranks, group: int = 1) -> Share:
    """This rank's share of a global batch of batch_size x accumulation rows, of which each `group` stay together.

    Micro-batches are equal, as large as possible, at most batch_size. Raises UserError when the ranks don't divide the rows.
    """
    rows = batch_size * accumulation
    if rows // group % ranks.world_size:
        fit = ", ".join(str(n) for n in range(1, min(rows, 1024) + 1) if rows // group % n == 0)
        what = f"{rows} sequences" if group == 1 else f"{rows // group} groups of {group}"
        raise UserError(
            f"{ranks.world_size} ranks don't divide the {what} of a step (--batch_size x --gradient_accumulation_steps); these numbers of ranks do: {fit}"
        )
    share = rows // ranks.world_size
    micro = max(n for n in range(1, min(share, batch_size) + 1) if share % n == 0)
    return Share(ranks.rank * share, (ranks.rank + 1) * share, micro)


# ---------------------------------------------------------------------------------------------------------------------
# DDP: every rank holds all parameters; FSDP2: every rank holds its rows of each, gathered block by block when they are used


def shard(
    model: torch.nn.Module,
    blocks: Iterable[torch.nn.Module],
    ranks: Ranks,
    dtype: torch.dtype,
    reshard: bool,
    offload: bool,
) -> None:
    """Shard the parameters over the ranks, in place (FSDP2: Zhao et al. 2023, one group a block and one for the rest, tied weights in it).

    dtype: in which they are gathered; gradients are summed in float32. reshard: forget a block's gathered parameters after its forward.
    offload: keep the shards, gradients and optimizer state in host memory.
    """
    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module .* returned a view tensor"
    )  # nothing here writes to one
    mesh, on_gpu = init_device_mesh(ranks.device.type, (ranks.world_size,)), ranks.device.type == "cuda"
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*blocks, model):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard,
            offload_policy=CPUOffloadPolicy(pin_memory=on_gpu) if offload else OffloadPolicy(),
        )


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered if it is sharded: all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, model: Tensor) -> Tensor:
    """This rank's part of a whole tensor that is the same on all ranks, sharded as `model` is; the tensor if that is whole."""
    return (
        distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
        if isinstance(model, DTensor)
        else tensor
    )


@functools.cache
def host_mesh(world: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world,))


def on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory that training does not touch, sharded if the tensor is."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True).contiguous()
    local = tensor.to_local().detach().to("cpu", copy=True).contiguous()
    return DTensor.from_local(
        local,
        host_mesh(tensor.device_mesh.size()),
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def sync_gradients(model: torch.nn.Module, on: bool) -> None:
    """Whether the next backward averages the gradients over the ranks, or they only add up on each."""
    if is_sharded(model):
        model.set_requires_gradient_sync(on)
    else:
        model.require_backward_grad_sync = on


def replicate(model: torch.nn.Module, ranks: Ranks) -> torch.nn.Module:
    """The model under DDP, which averages the gradients over the ranks; itself with one process. Its buffers are constants."""
    if ranks.world_size == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    unsynced = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # its name before torch 2.13
    return DistributedDataParallel(
        model, device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None, **{unsynced: False}
    )
