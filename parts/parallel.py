"""Ranks: who we are, one process or several under torchrun, and what they agree on.

Collectives on CPU tensors go through gloo, on GPU tensors through NCCL; with one process all of them are the identity.
"""

import ctypes
import functools
import inspect
import os
import time
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

from parts.mistakes import Mistake


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device
    patient: dist.ProcessGroup | None = None  # the same ranks, who wait for days
    saving: dist.ProcessGroup | None = None  # the same ranks, for the threads that save

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int, group: dist.ProcessGroup | None = None) -> int:
        """The largest of the ranks' numbers; goes through the host and waits for no device."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
        return int(tensor)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.largest(0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block runs on rank 0 first, for as long as it takes, then on the others. If it fails on rank 0 the others fail too."""
        failed = False
        try:
            if self.main:
                yield
        except Exception:
            failed = True
            raise
        finally:
            if self.largest(failed, self.patient) and not self.main:
                raise Mistake("rank 0 could not go on")
        if not self.main:
            yield


def find_device(name: str) -> torch.device:
    """auto: the local rank's GPU, else Apple's, else the CPU. Raises Mistake for a device that is not there."""
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise Mistake(f"--device={name}: must be auto, cpu, cuda, cuda:N or mps")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise Mistake(f"--device={name}: this machine has no CUDA GPU, or this torch was built without CUDA")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise Mistake(f"--device={name}: this machine has no Apple GPU")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (index or kind == "mps"):
        raise Mistake(
            f"--device={name}: several ranks can't share one device; take --device=cuda, which gives each its own, or cpu"
        )
    if kind != "cuda":
        return torch.device(kind)
    number = int(index or os.environ.get("LOCAL_RANK", 0))
    needed = max(
        number + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    )  # the same on all ranks, so that the main one tells it
    if needed > torch.cuda.device_count():
        raise Mistake(
            f"--device={name}: {needed} GPUs are needed on this machine, {torch.cuda.device_count()} are there"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The precision of activations, and why."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cpu":
        faster = product_flops(device, torch.bfloat16, 256) / product_flops(device, torch.float32, 256)
        found = (
            f"its matrix products take {1 / faster:.2g} of float32's time here"
            if faster > 1.2
            else f"bfloat16's matrix products take {1 / faster:.2g} of its time here"
        )
        return (torch.bfloat16 if faster > 1.2 else torch.float32), found
    if device.type != "cuda":
        return torch.float32, f"the default on {device.type}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU computes in it"
    return torch.float16, "this GPU has no bfloat16"


def product_flops(device: torch.device, dtype: torch.dtype, n: int = 0) -> float:
    """FLOPs a second of a product of n x n matrices here (0: large ones), the best of ten: no training step is faster."""
    n = n or (4096 if device.type == "cuda" else 512)
    square, seconds = torch.ones(n, n, device=device, dtype=dtype), []
    for _ in range(10):
        begin = time.perf_counter()
        float((square @ square)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return 2 * n**3 / min(seconds)


ATTENTION_KERNELS = {
    "flash": torch.backends.cuda.enable_flash_sdp,
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
}


def choose_attention_kernel(name: str, device: torch.device) -> None:
    """Allow scaled_dot_product_attention only this one of its CUDA kernels (auto: all). Raises Mistake where there is no choice."""
    if name != "auto" and device.type != "cuda":
        raise Mistake(f"--attention_kernel={name}: only a CUDA GPU has a choice, not {device.type}")
    for kernel, enable in ATTENTION_KERNELS.items():
        enable(name in ("auto", kernel))


def keep_freed_memory() -> None:
    """Tell glibc's malloc, where that is the one, to keep what is freed: otherwise every step's large tensors are mapped, and their
    pages zeroed and faulted in, anew (mallopt(3))."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def ranks(device_name: str, timeout: float = 600.0) -> Iterator[Ranks]:
    """Join the process group that torchrun made, if it did, and leave it at the end. A rank waits `timeout` seconds for the others."""
    device = find_device(device_name)
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

    Micro-batches are equal, as large as possible, at most batch_size. Raises Mistake when the ranks don't divide the rows.
    """
    rows = batch_size * accumulation
    if rows // group % ranks.world:
        fit = ", ".join(str(n) for n in range(1, min(rows, 1024) + 1) if rows // group % n == 0)
        what = f"{rows} sequences" if group == 1 else f"{rows // group} groups of {group}"
        raise Mistake(
            f"{ranks.world} ranks don't divide the {what} of a step (--batch_size x --gradient_accumulation_steps); these numbers of ranks do: {fit}"
        )
    share = rows // ranks.world
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
    mesh, on_gpu = init_device_mesh(ranks.device.type, (ranks.world,)), ranks.device.type == "cuda"
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
    if ranks.world == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    unsynced = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # its name before torch 2.13
    return DistributedDataParallel(
        model, device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None, **{unsynced: False}
    )
