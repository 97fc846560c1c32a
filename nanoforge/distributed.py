"""Ranks: this process among torchrun's, what the ranks agree on, and how a model is spread over them (DDP, FSDP2).

Collectives on CPU tensors go through gloo, on GPU tensors through NCCL. With one process all of them are the identity.
torch's modules of sharding take a second to load, so they are imported where something is sharded.
"""

import contextlib
import functools
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from nanoforge import launcher
from nanoforge.device import get_device
from nanoforge.errors import UserError

MIN_RENDEZVOUS_SECONDS = 300.0
SLOW_TIMEOUT = timedelta(days=7)
FAILURE_KEY = "failure"  # of the rank that failed first, in the ranks' store

# ---------------------------------------------------------------------------------------------------------------------
# ranks


@dataclass(frozen=True)
class Ranks:
    """This process's rank, its device, and the collectives that training needs."""

    rank: int
    world_size: int
    device: torch.device
    slow_group: dist.ProcessGroup | None = None  # all ranks, with a timeout of days: for work that one rank does alone
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

    def first_message(self, message: str) -> str:
        """The first of the ranks' messages that is not empty, on all ranks; "" where all are."""
        if not self.all_reduce_max(bool(message)):
            return ""
        messages = [message] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(messages, message, group=self.slow_group)
        return next(filter(None, messages))

    def broadcast_text(self, text: str) -> str:
        """The main rank's text, on all ranks."""
        if self.world_size == 1:
            return text
        values = [text]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.all_reduce_max(0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0, for as long as it takes, then on the others. If it fails on rank 0, all fail."""
        failed = False
        try:
            if self.is_main:
                yield
        except Exception:
            failed = True
            raise
        finally:
            main_failed = self.all_reduce_max(failed, self.slow_group)
            if main_failed and not self.is_main:
                error = UserError("rank 0 failed; see its error above")
                error.is_reported = True
                raise error
        if not self.is_main:
            yield


@contextmanager
def join_ranks(device_name: str, timeout: float = 600.0) -> Iterator[Ranks]:
    """Join torchrun's process group, if there is one, and leave it at the end.

    timeout: seconds that a rank waits for the others in a collective.
    """
    environment_error = launcher.environment_error()
    if environment_error:
        raise UserError(environment_error)
    device = get_device(device_name)
    if launcher.world_size() == 1:
        yield Ranks(0, 1, device)
        return
    try:
        store, rank, world_size = meet(device, timeout)
    except (dist.DistError, ValueError) as error:
        place = ", ".join(f"{name}={os.environ[name]}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(f"{place}: the ranks can't meet there ({first_line(error)}); choose another port") from None
    try:
        slow_group = dist.new_group(backend="gloo", timeout=SLOW_TIMEOUT)
        save_group = dist.new_group(backend="gloo", timeout=SLOW_TIMEOUT)
        yield Ranks(rank, world_size, device, slow_group, save_group)
    except Exception as error:
        failure = share_failure(error, rank, store)
        if failure is error:
            raise
        raise failure from None
    finally:
        host_mesh.cache_clear()
        dist.destroy_process_group()


def meet(device: torch.device, timeout: float) -> tuple[dist.Store, int, int]:
    """Wait for the other ranks and make the process group; the ranks' store, this rank, and their number.

    Raises dist.DistError or ValueError.
    """
    rendezvous_timeout = timedelta(seconds=max(MIN_RENDEZVOUS_SECONDS, timeout))
    store, rank, world_size = next(dist.rendezvous("env://", timeout=rendezvous_timeout))
    # torchrun on one machine restarts with the same store, which still holds the addresses of the dead processes.
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start {restart}", store)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    return store, rank, world_size


def share_failure(error: Exception, rank: int, store: dist.Store) -> BaseException:
    """What ends this rank: its own error, with whether another rank has reported it, or that of the rank that failed
    and left this one alone."""
    if is_lost_connection(error):
        failure = read_failure(store)
        if not failure:
            return SystemExit(
                f"rank {rank} lost the connection to another rank, which has reported no error ({first_line(error)}); "
                "continue the run with --init_from=resume"
            )
        return SystemExit(failure if rank == 0 else 1)
    with contextlib.suppress(RuntimeError):  # the store is gone with its rank
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        store.set(FAILURE_KEY, f"rank {rank} failed: {text}")
        if isinstance(error, UserError) and not error.is_reported:
            error.is_reported = rank > 0 and is_reported_by_main(store, text)
            if rank == 0:
                store.set(f"reported: {text}", "")
    return error


def read_failure(store: dist.Store) -> str:
    """The error of the rank that failed first; empty if it has left none, or if its store is gone or unreachable."""
    found = []

    def read() -> None:
        with contextlib.suppress(RuntimeError):
            if store.check([FAILURE_KEY]):
                found.append(store.get(FAILURE_KEY).decode())

    reader = threading.Thread(target=read, daemon=True)  # a host that is unplugged never answers
    reader.start()
    reader.join(launcher.SECONDS_FOR_MAIN_RANK)
    return found[0] if found else ""


def is_reported_by_main(store: dist.Store, text: str) -> bool:
    """Whether the main rank has an error too, waiting a little for it."""
    try:
        store.wait([f"reported: {text}"], timedelta(seconds=launcher.SECONDS_FOR_MAIN_RANK))
    except dist.DistStoreError:
        return False
    return True


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another rank has ended, or does not come."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def first_line(error: Exception) -> str:
    """Of its message."""
    return str(error).strip().partition("\n")[0]


# ---------------------------------------------------------------------------------------------------------------------
# which rows a rank reads


class RankSlice(NamedTuple):
    """Rows [start, stop) of a global batch, in micro-batches of micro_batch_size rows."""

    start: int
    stop: int
    micro_batch_size: int


def rank_range(n: int, rank: int, world_size: int) -> range:
    """This rank's part of n things: consecutive, the parts as equal as can be, perhaps empty."""
    return range(rank * n // world_size, (rank + 1) * n // world_size)


def eval_share(n: int, rank: int, world_size: int) -> tuple[range, bool]:
    """This rank's part of an evaluation batch of n > 0 rows, and whether it counts.

    A rank without rows reads one that does not count, because all ranks have to call the model equally often.
    """
    rows = rank_range(n, rank, world_size)
    return range(rows.start, max(rows.stop, rows.start + 1)), len(rows) > 0


def rank_slice(global_batch_size: int, batch_size: int, ranks: Ranks, group_size: int = 1) -> RankSlice:
    """This rank's rows of a global batch; the rows of a group stay together.

    Micro-batches are equal, as large as possible, at most batch_size. Raises UserError when the ranks don't divide
    the rows.
    """
    n_groups = global_batch_size // group_size
    if n_groups % ranks.world_size:
        divisors = ", ".join(str(n) for n in range(1, min(global_batch_size, 1024) + 1) if n_groups % n == 0)
        batch = f"{global_batch_size} sequences" if group_size == 1 else f"{n_groups} groups of {group_size}"
        raise UserError(
            f"{ranks.world_size} ranks don't divide the {batch} of a step "
            f"(--batch_size x --gradient_accumulation_steps); these numbers of ranks do: {divisors}"
        )
    rows_per_rank = global_batch_size // ranks.world_size
    micro_batch_size = max(n for n in range(1, min(rows_per_rank, batch_size) + 1) if rows_per_rank % n == 0)
    return RankSlice(ranks.rank * rows_per_rank, (ranks.rank + 1) * rows_per_rank, micro_batch_size)


# ---------------------------------------------------------------------------------------------------------------------
# DDP: every rank holds all parameters. FSDP2: every rank holds its rows of each; a block's are gathered for its use


def wrap_ddp(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model under DDP, which averages gradients over the ranks; with one process the model itself.

    Its buffers are constants, so DDP need not send them. Gradients are views of what DDP sends, not copies.
    """
    if ranks.world_size == 1:
        return model
    # The argument's name before and since torch 2.13.
    parameters = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options: dict[str, Any] = {sync_buffers: False, "gradient_as_bucket_view": True}
    if ranks.device.type == "cuda":
        options["device_ids"] = [ranks.device.index]
    return DistributedDataParallel(model, **options)


def apply_fsdp(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> None:
    """Shard the parameters over the ranks, in place (FSDP2: Zhao et al. 2023): one group a block, one for the rest.

    dtype: in which parameters are gathered; gradients are summed in float32.
    reshard_after_forward: free a block's gathered parameters after its forward (ZeRO-3; else ZeRO-2).
    cpu_offload: keep the shards, gradients and optimizer state in host memory.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    # The warning is about writing to a view; nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if cpu_offload else OffloadPolicy()
    for module in (*blocks, model):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=precision,
            reshard_after_forward=reshard_after_forward,
            offload_policy=offload,
        )


def has_process_group() -> bool:
    """Whether ranks have met: several, or one that made a group for itself, as a benchmark of FSDP2 on one GPU does."""
    return dist.is_initialized()


def is_sharded(model: nn.Module) -> bool:
    """Whether `apply_fsdp` was called on it."""
    return is_fsdp_module(model)


def is_fsdp_module(module: nn.Module) -> TypeGuard[Any]:
    """Whether it is an FSDPModule. As long as nobody has imported that class there is none."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def set_gradient_sync(model: nn.Module, *, sync: bool) -> None:
    """Whether the next backward averages the gradients over the ranks, or each rank only adds up its own."""
    if is_fsdp_module(model):
        model.set_requires_gradient_sync(sync)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = sync


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that a forward has gathered and kept, so that the next one sees changes of shards."""
    for module in model.modules():
        if is_fsdp_module(module):
            module.reshard()


# ---------------------------------------------------------------------------------------------------------------------
# sharded tensors


def is_dtensor(tensor: Tensor) -> TypeGuard[Any]:
    """Whether it is sharded, a DTensor. As long as nobody has imported that class there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is sharded: a collective."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's rows of the tensor; all of it if it is not sharded."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A full tensor, the same on all ranks, sharded as `other` is; no communication."""
    if not is_dtensor(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def with_local_shard(tensor: Tensor, shard: Tensor) -> Tensor:
    """A tensor sharded as another, of which this rank has these rows; the rows themselves if that is not sharded."""
    if not is_dtensor(tensor):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def first_row(tensor: Tensor) -> int:
    """The number of the first of this rank's rows; 0 if the tensor is not sharded."""
    if not is_dtensor(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1][0]


def cpu_snapshot(tensor: Tensor) -> Tensor:
    """A copy in host memory that training does not touch, sharded if the tensor is."""
    copy = local_shard(tensor).detach().to("cpu", copy=True).contiguous()
    if not is_dtensor(tensor):
        return copy
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        copy,
        host_mesh(tensor.device_mesh.size()),
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


@functools.cache
def host_mesh(world_size: int) -> DeviceMesh:
    """A mesh of all ranks' CPUs, for the shards of snapshots."""
    return init_device_mesh("cpu", (world_size,))
