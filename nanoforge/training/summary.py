"""The summary printed when a run starts: what is trained, on what data, for how long. Each function describes one line of it."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from nanoforge.console import format_duration, plural
from nanoforge.data.batches import Source
from nanoforge.device import measure_matmul_flops
from nanoforge.distributed import Ranks, RankSlice
from nanoforge.training.evaluation import EvalDataset

LABEL_WIDTH = 9


class ModelShape(Protocol):
    """The fields of model.py's GPTConfig that are printed."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_sizes: tuple[int, ...]


def format_summary(lines: Iterable[tuple[str, str]]) -> str:
    """(label, text) pairs, one a line."""
    return "\n".join(f"{label:<{LABEL_WIDTH}}{text}" for label, text in lines)


def describe_model(shape: ModelShape, parameters: Iterable[torch.nn.Parameter], adapter: str) -> str:
    """Size and shape, and with an adapter the trainable part."""
    n_parameters = n_trainable = 0
    for parameter in parameters:
        n_parameters += parameter.numel()
        if parameter.requires_grad:
            n_trainable += parameter.numel()
    vocabulary = " + ".join(str(size) for size in shape.vocab_sizes)
    text = (
        f"{n_parameters / 1e6:.2f} M parameters: {shape.n_layer} layers x {shape.n_embd}, {shape.n_head} heads, "
        f"context {shape.block_size}, vocabulary {vocabulary}"
    )
    if adapter != "none":
        text += f"; {adapter}: {n_trainable:,} trainable ({n_trainable / n_parameters:.2%})"
    return text


def describe_data(source: Source, eval_datasets: Sequence[EvalDataset]) -> str:
    """Tokens of each dataset, for training and for validation."""
    train = ", ".join(f"{dataset.name} {dataset.streams[0].tokens:,}" for dataset in source.datasets)
    val = ", ".join(f"{dataset.streams[0].tokens:,}" for dataset in eval_datasets)
    return f"{train} training tokens; {val} for validation"


def describe_batch(source: Source, block_size: int, objective: str, rank_slice: RankSlice, world_size: int) -> str:
    """The global batch and its micro-batches."""
    rows = "sequences of" if objective == "lm" else "examples of at most"
    n_micro_batches = (rank_slice.stop - rank_slice.start) // rank_slice.micro_batch_size
    text = (
        f"{source.tokens_per_step:,.0f} tokens: {source.rows} {rows} {block_size} "
        f"({n_micro_batches} x {rank_slice.micro_batch_size} on each of {plural(world_size, 'rank')})"
    )
    return text if objective == "lm" else f"objective {objective}; {text}"


def describe_device(device: torch.device, dtype: str, dtype_reason: str, *, is_compiled: bool) -> str:
    """The device and the precision."""
    is_cuda = device.type == "cuda"
    chip = torch.cuda.get_device_name(device) if is_cuda else plural(torch.get_num_threads(), "thread")
    text = f"{device} ({chip}), {dtype} ({dtype_reason})"
    return f"{text}, compiled" if is_compiled else text


def describe_time(flops: float, ranks: Ranks, dtype: torch.dtype) -> str:
    """How long so many FLOPs take at least, shared by the ranks, at the speed of matrix products on this device."""
    seconds = flops / ranks.world_size / measure_matmul_flops(ranks.device, dtype)
    return f"at least {format_duration(seconds)}, by matrix products here; an estimate follows after the first steps"
