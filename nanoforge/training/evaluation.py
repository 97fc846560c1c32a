"""Evaluation: a model's metrics on datasets, the ranks sharing each batch, and their summary in metrics.jsonl's keys.

Knows nothing of objectives: a dataset yields the metrics of its batches, as sums and counts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nanoforge.console import ProgressBar
from nanoforge.data.batches import Metrics, SampleCounter, Source
from nanoforge.distributed import Ranks
from nanoforge.training.signals import Signals


class Stream(Protocol):
    """A stream of tokens, or a dataset of examples."""

    name: str
    tokens: int
    bytes: int | None  # of its text, where that is known


class EvalDataset(Protocol):
    """A dataset to evaluate on."""

    @property
    def streams(self) -> Sequence[Stream]: ...

    @property
    def batches(self) -> "EvalBatches": ...

    @property
    def n_batches(self) -> int: ...


class EvalBatches(Protocol):
    """Yields the metrics of each batch, and whether they count: a rank without rows in a batch reads another rank's."""

    def __call__(self, model: nn.Module) -> Iterator[tuple[Metrics, bool]]: ...


class StreamLoss(NamedTuple):
    """The loss on one stream."""

    name: str
    loss: float  # nats per token
    bits_per_byte: float | None  # where the bytes of the text are known


@dataclass(frozen=True)
class DatasetResult:
    """The metrics of one dataset, means over its streams, and the loss of each stream."""

    metrics: dict[str, float]
    streams: list[StreamLoss]

    @property
    def bits_per_byte(self) -> float:
        """The mean over streams; nan where one's bytes are not known."""
        values = [math.nan if stream.bits_per_byte is None else stream.bits_per_byte for stream in self.streams]
        return float(np.mean(values))


# ---------------------------------------------------------------------------------------------------------------------
# evaluate


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model has no dropout; then it is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def evaluate(
    model: nn.Module, datasets: Mapping[str, Sequence[EvalDataset]], ranks: Ranks, signals: Signals
) -> dict[str, list[DatasetResult]] | None:
    """Evaluate on each split's datasets: a collective. None once a rank has received a signal. Shows its progress."""
    results: dict[str, list[DatasetResult]] = {}
    n_batches = sum(dataset.n_batches for split_datasets in datasets.values() for dataset in split_datasets)
    progress = ProgressBar("evaluating", "batches", n_batches, silent=not ranks.is_main)
    with evaluation_mode(model), closing(progress):
        for split, split_datasets in datasets.items():
            results[split] = []
            for dataset in split_datasets:
                sums = sum_metrics(progress.over(dataset.batches(model)), ranks, signals)
                if sums is None:
                    return None
                results[split].append(dataset_result(dataset.streams, sums, ranks))
    return results


def sum_metrics(batches: Iterator[tuple[Metrics, bool]], ranks: Ranks, signals: Signals) -> Metrics | None:
    """This rank's sums and counts over all batches, on its device; None once a rank has received a signal."""
    sums: Metrics = {}
    for metrics, counts in batches:
        if ranks.all_reduce_max(signals.number):
            return None
        for name, pair in metrics.items():
            if name not in sums:
                sums[name] = torch.zeros_like(pair, device=ranks.device)
            if counts:
                sums[name] = sums[name] + pair.to(ranks.device)
    return sums


def dataset_result(streams: Sequence[Stream], sums: Metrics, ranks: Ranks) -> DatasetResult:
    """Means over all ranks and streams."""
    means = {name: stream_means(ranks.all_reduce_(pair)) for name, pair in sums.items()}
    losses = [
        StreamLoss(stream.name, loss, bits_per_byte(loss, stream))
        for stream, loss in zip(streams, means["loss"], strict=True)
    ]
    return DatasetResult({name: float(np.mean(values)) for name, values in means.items()}, losses)


def stream_means(pair: Tensor) -> list[float]:
    """The mean of each stream from (2, ...) sums and counts; nan where the count is 0."""
    return (pair[0] / pair[1]).reshape(-1).tolist()


def bits_per_byte(loss: float, stream: Stream) -> float | None:
    """A loss in nats per token as bits per byte of text: it compares tokenizers. None where the bytes are not known."""
    if not stream.bytes:
        return None
    return loss / math.log(2) * stream.tokens / stream.bytes


# ---------------------------------------------------------------------------------------------------------------------
# summarize


def summarize(results: Mapping[str, Sequence[DatasetResult]], weights: np.ndarray) -> dict[str, float]:
    """An evaluation's metrics: means over datasets, weighted (datasets,) as in the mixture at its end."""

    def weighted(split: str, name: str) -> float:
        return float(weights @ np.array([result.metrics[name] for result in results[split]]))

    metrics = {"train_loss": weighted("train", "loss"), "val_loss": weighted("val", "loss")}
    for name in results["val"][0].metrics:
        if name != "loss":
            metrics[f"val_{name}"] = weighted("val", name)
    streams = [stream for result in results["val"] for stream in result.streams]
    if all(stream.bits_per_byte is not None for stream in streams):
        metrics["bits_per_byte"] = float(weights @ np.array([result.bits_per_byte for result in results["val"]]))
    if len(streams) > 1:  # a mixture, or several contexts
        metrics |= {f"val_loss/{stream.name}": stream.loss for stream in streams}
    return metrics


def count_epochs(source: Source, counter: SampleCounter, step: int) -> dict[str, float]:
    """How much training data was read before a step: epochs, and in a mixture the tokens and epochs of each dataset."""
    n_sequences = counter.counts_before(step // source.steps_per_rollout)
    metrics = {"epochs": float(n_sequences.sum() / source.n_windows)}
    if len(n_sequences) > 1:
        for dataset, count in zip(source.datasets, n_sequences.tolist(), strict=True):
            metrics[f"tokens/{dataset.name}"] = round(count * dataset.tokens_per_window)
            metrics[f"epochs/{dataset.name}"] = count / dataset.n_windows
    return metrics
