"""The summary that a run prints when it starts; each function describes one line of it."""

from collections.abc import Iterable, Sequence

import torch

from nanoforge.console import format_duration, plural
from nanoforge.data.batches import Source
from nanoforge.device import measure_matmul_flops
from nanoforge.distributed import Ranks, RankSlice
from nanoforge.training.evaluation import EvalDataset
from nanoforge.training.memory import MemoryPlan

LABEL_WIDTH = 9


def format_summary(lines: Iterable[tuple[str, str]]) -> str:
    """(label, text) pairs, one a line."""
    return "\n".join(f"{label:<{LABEL_WIDTH}}{text}" for label, text in lines)


def describe_data(source: Source, eval_datasets: Sequence[EvalDataset]) -> str:
    """Tokens of each dataset, for training and for validation."""
    train = ", ".join(f"{dataset.name} {dataset.streams[0].tokens:,}" for dataset in source.datasets)
    val = ", ".join(f"{dataset.streams[0].tokens:,}" for dataset in eval_datasets)
    return f"{train} training tokens; {val} for validation"


def describe_batch(source: Source, block_size: int, objective: str, rank_slice: RankSlice, world_size: int) -> str:
    """The global batch and its micro-batches."""
    rows = f"{plural(source.rows, 'sequence')} of {block_size}"
    if objective != "lm":
        rows = f"{plural(source.rows, 'example')} of at most {block_size}"
    n_micro_batches = (rank_slice.stop - rank_slice.start) // rank_slice.micro_batch_size
    text = (
        f"{source.tokens_per_step:,.0f} tokens: {rows} "
        f"({n_micro_batches} x {rank_slice.micro_batch_size} on each of {plural(world_size, 'rank')})"
    )
    return text if objective == "lm" else f"objective {objective}; {text}"


def describe_device(device: torch.device, dtype: str, dtype_reason: str, compilation: str) -> str:
    """The device, the precision, and whether the run is compiled, if that is to be said."""
    is_cuda = device.type == "cuda"
    chip = torch.cuda.get_device_name(device) if is_cuda else plural(torch.get_num_threads(), "thread")
    text = f"{device} ({chip}), {dtype} ({dtype_reason})"
    return f"{text}, {compilation}" if compilation else text


def describe_memory(plan: MemoryPlan, *, has_adapter: bool) -> str:
    """What a step needs on one rank."""
    parts = {"weights": plan.frozen + plan.trainable, "reference": plan.reference}
    if has_adapter:
        parts = {"base": plan.frozen, "adapter": plan.trainable, "reference": plan.reference}
    parts |= {"gradients": plan.gradients, "optimizer": plan.optimizer}
    exact = ", ".join(f"{name} {n_bytes / 2**20:,.1f} MB" for name, n_bytes in parts.items() if n_bytes)
    activations, logits, total = (round(n / 2**20) for n in (plan.activations, plan.logits, plan.peak))
    return f"{exact}; activations about {activations:,} MB, logits {logits:,} MB; a step about {total:,} MB"


def describe_time(flops: float, ranks: Ranks, dtype: torch.dtype) -> str:
    """The least time that FLOPs take, shared by the ranks, at the speed of matrix products on this device."""
    seconds = flops / ranks.world_size / measure_matmul_flops(ranks.device, dtype)
    return f"at least {format_duration(seconds)}, by matrix products here; an estimate follows after the first steps"
