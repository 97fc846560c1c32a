"""Token bins to batches: the batch of a step is a pure function of the arguments and the step.

A source is a mixture of datasets. A dataset has K aligned streams of tokens: one, or several for a multicontext model.
Row r of a step gets its dataset from a hash of (seed, step, r), and its window from a hash of (seed, c), where c counts
the sequences of that dataset. So a prefetching thread can corrupt nothing, and any number of ranks sees the same global
batch. A checkpoint has these counts, so that a run that is resumed with other weights or another batch goes on in each
dataset where it was (`Source.resume_at`).

Knows nothing of the model, and of ranks only which rows of the global batch they read.
"""

import hashlib
import itertools
import math
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanoforge.data.token_bins import MAX_OPEN_FILES, SPLITS, Meta, TokenBin
from nanoforge.distributed import RankSlice, eval_share
from nanoforge.errors import UserError
from nanoforge.rng import DATASET, EVALUATION, OFFSET, ORDER, WINDOW, hash_u64, permute, uniform

# name -> (2, ...): a sum and its count on this rank. Summed over the ranks, their ratio is the metric.
Metrics = dict[str, Tensor]

# ---------------------------------------------------------------------------------------------------------------------
# batches


@dataclass(frozen=True)
class Batch:
    """The rows of one micro-batch, (B, T + 1) ids, or (B, K, T + 1) of K contexts.

    tokens: int64, but in pinned memory as narrow as the bins' ids. extras: what an objective needs besides:

        loss_mask             (B, T) bool, the targets that count in the loss: in all batches of examples
        position_ids          (B, T), of packed examples and of pairs
        is_rejected           (B, T) bool, the targets from a pair's rejected completion on
        ref_logps             (B,) of completions, (B, 2) of pairs or (B, T) of tokens, by the reference model
        old_logps             (B, T), by the policy that sampled
        advantages            (B,)
        desirable             (B,) bool
        kl_completion         (B, T' + 1) ids of KTO's mismatched pairs, kl_completion_mask (B, T') their loss mask
        kl                    scalar, KTO's reference point
    """

    tokens: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    n_micro_batches: int = 1  # that this rank makes of its rows of the step
    num_loss_tokens: float = 0.0  # targets in the loss masks of the global batch, divided by the number of ranks

    @property
    def idx(self) -> Tensor:
        return self.tokens[..., :-1]

    @property
    def targets(self) -> Tensor:
        return self.tokens[..., 1:]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, its tokens as int64. The copy is asynchronous from pinned memory alone."""
        tokens = self.tokens.to(device, non_blocking=self.tokens.is_pinned()).long()
        extras = {name: tensor.to(device, non_blocking=tensor.is_pinned()) for name, tensor in self.extras.items()}
        return replace(self, tokens=tokens, extras=extras)

    def clone(self) -> "Batch":
        """The batch in memory of its own."""
        extras = {name: tensor.clone() for name, tensor in self.extras.items()}
        return replace(self, tokens=self.tokens.clone(), extras=extras)

    def with_tensors(self, **tensors: Tensor) -> "Batch":
        """The batch with further (or replaced) extras."""
        return replace(self, extras=self.extras | tensors)


class Step(NamedTuple):
    """What a rank reads for one optimizer step."""

    batches: list[Batch]
    data_hash: int = 0  # of this rank's rows; the ranks' sum mod 2^64 does not depend on how rows are split over them
    tokens: int = 0  # of the global batch, without padding
    metrics: Mapping[str, Tensor] = {}  # Metrics that are known before the model sees the batches
    note: str = ""  # for the log


def to_batch(windows: np.ndarray, *, pin: bool, n_micro_batches: int = 1) -> Batch:
    """(B, K, T + 1) windows to a batch; a single context loses its dimension.

    NumPy makes the copy: PyTorch would take OpenMP threads for it, which slow down those of training.
    """
    rows = windows if windows.shape[1] > 1 else windows[:, 0]
    tokens = torch.from_numpy(rows).pin_memory() if pin else torch.from_numpy(rows.astype(np.int64, copy=False))
    return Batch(tokens, n_micro_batches=n_micro_batches)


def row_hash(rows: Iterable[np.ndarray], start: int) -> int:
    """Sum mod 2^64 of a hash of each row, salted with the row's index in the global batch: start, start + 1, ..."""
    total = 0
    for row, ids in enumerate(rows, start=start):
        digest = hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=8, salt=row.to_bytes(8, "little")).digest()
        total += int.from_bytes(digest, "little")
    return total % 2**64


# ---------------------------------------------------------------------------------------------------------------------
# which window of a dataset


class Dataset:
    """Aligned streams of one split, cut into windows of block_size + 1 tokens: inputs and, one token on, targets.

    n_windows is the number of windows in an epoch. The methods:
    - random: each window starts anywhere;
    - sequential: a grid of windows, in order;
    - without_replacement: a grid, each window once an epoch in random order; the grid's offset changes every epoch.

    A grid leaves tokens of a shard out of an epoch. So it moves: to the shard's end in every second epoch (sequential),
    or to its start and to its end once in four epochs. Every token but a shard's first is thus a target in time.
    """

    def __init__(
        self,
        streams: Sequence[TokenBin],
        block_size: int,
        method: str,
        seed: int,
        index: int,
        vocab_offsets: Sequence[int],
    ):
        """index: this dataset's number in the mixture. vocab_offsets: the model's row of each stream's token 0.

        A shard that is shorter than a window is left out. Raises UserError when all are, or streams differ in length.
        """
        self.streams = streams
        self.T = block_size
        self.method = method
        self.seed = seed
        self.index = index
        self.vocab_offsets = vocab_offsets
        self.name = "+".join(stream.name for stream in streams)
        self.sizes = aligned_sizes(streams)  # (shards,) tokens
        if self.sizes.max() < block_size + 1:
            longest = int(self.sizes.argmax())
            raise UserError(
                f"{streams[0].paths[longest]}: {self.sizes[longest]} tokens are less than one window of "
                f"--block_size={block_size} and its targets; lower it or prepare more text"
            )
        self.short_shards = [streams[0].paths[i] for i in np.flatnonzero(self.sizes <= block_size)]  # not read

        # Windows of each shard in an epoch; a grid that moves needs the room of one of them for its offset.
        if method == "without_replacement":
            self.windows_per_shard = np.maximum(self.sizes > block_size, (self.sizes - block_size) // block_size)
        else:
            self.windows_per_shard = (self.sizes - 1) // block_size
        self.n_windows = int(self.windows_per_shard.sum())
        self.tokens_per_window = block_size

        vocab_sizes = [stream.meta.vocab_size for stream in streams]
        n_rows = max(offset + size for offset, size in zip(vocab_offsets, vocab_sizes, strict=True))
        self.dtype = np.dtype(np.uint16 if n_rows <= 2**16 else np.int32)  # torch takes no uint32

    def locate(self, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where sequences of this dataset lie, by their numbers in the run: (shard, start), int64 of the same shape."""
        if self.method == "random":
            return self.locate_random(sequence)

        # 1. The window of the grid: in order, or in the epoch's own random order.
        epoch, window = np.divmod(sequence, self.n_windows)
        if self.method == "without_replacement":
            window = permute(window, self.n_windows, self.seed, ORDER, self.index, epoch)

        # 2. The shard that holds it, and its place there.
        ends = np.cumsum(self.windows_per_shard)
        shard = np.searchsorted(ends, window, side="right")
        start = (window - (ends - self.windows_per_shard)[shard]) * self.T

        # 3. The grid's offset in this shard and epoch, at most the tokens that the grid leaves out.
        left_out = (self.sizes - 1 - self.windows_per_shard * self.T)[shard]
        if self.method == "sequential":
            return shard, start + left_out * (epoch % 2)
        n_offsets = np.minimum(self.T, left_out + 1).astype(np.uint64)
        offset = (hash_u64(self.seed, OFFSET, self.index, epoch, shard) % n_offsets).astype(np.int64)
        offset = np.select([epoch % 4 == 1, epoch % 4 == 3], [np.zeros_like(left_out), left_out], offset)
        return shard, start + offset

    def locate_random(self, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, start) of each sequence, uniform over all positions where a window fits."""
        n_starts = np.maximum(0, self.sizes - self.T)
        ends = np.cumsum(n_starts)
        position = (hash_u64(self.seed, WINDOW, self.index, sequence) % np.uint64(ends[-1])).astype(np.int64)
        shard = np.searchsorted(ends, position, side="right")
        return shard, position - (ends - n_starts)[shard]

    def read_windows(self, shard: np.ndarray, start: np.ndarray) -> np.ndarray:
        """The windows at these places, as rows of the model's embedding: (len(shard), K, block_size + 1) of `dtype`."""
        contexts = []
        for stream, offset in zip(self.streams, self.vocab_offsets, strict=True):
            ids = stream.read_windows(shard, start, self.T + 1).astype(self.dtype, copy=False)  # (B, T + 1)
            if offset:
                ids += offset
            contexts.append(ids)
        if len(contexts) == 1:
            return contexts[0][:, None]  # a view
        return np.stack(contexts, axis=1)

    def gather(self, sequence: np.ndarray) -> np.ndarray:
        """The windows of sequences by their numbers in the run: (len(sequence), K, block_size + 1) of `dtype`."""
        return self.read_windows(*self.locate(sequence))

    def eval_batches(
        self, n_batches: int, batch_size: int, rank: int, world_size: int, *, pin: bool
    ) -> Iterator[tuple[Batch, bool]]:
        """This rank's part of each of `n_batches` batches of batch_size windows, and whether it counts (eval_share)."""
        rows, has_rows = eval_share(batch_size, rank, world_size)
        for i in range(n_batches):
            sequence = i * batch_size + np.arange(rows.start, rows.stop)
            yield to_batch(self.gather(sequence), pin=pin), has_rows


def aligned_sizes(streams: Sequence[TokenBin]) -> np.ndarray:
    """Tokens of each shard, (shards,), the same in all streams. Raises UserError when they are not."""
    first = streams[0]
    for stream in streams[1:]:
        if not np.array_equal(stream.sizes, first.sizes):
            raise UserError(
                f"{stream.paths[0]}: {stream.tokens:,} tokens, but {first.paths[0]} has {first.tokens:,}; "
                "contexts are aligned token by token"
            )
    return first.sizes


# ---------------------------------------------------------------------------------------------------------------------
# which dataset


@dataclass(frozen=True)
class Mixture:
    """Which dataset each sequence, or each whole batch, is drawn from.

    At random, with weights that move from initial_weights to final_weights over transition_steps; or, where `turns` is
    given, in a fixed rotation: turns[0] times the first dataset, turns[1] times the second, and so on.
    """

    initial_weights: np.ndarray  # (datasets,), sum 1
    final_weights: np.ndarray
    transition: str = "linear"  # or cosine, exponential
    transition_steps: int = 1
    per: str = "batch"  # or sequence: what one draw decides
    turns: tuple[int, ...] = ()

    def weights(self, step: np.ndarray | int) -> np.ndarray:
        """Probabilities at steps: (*step.shape, datasets)."""
        initial, final = self.initial_weights, self.final_weights
        progress = np.clip(np.asarray(step, dtype=float) / max(1, self.transition_steps), 0, 1)[..., None]
        if self.transition == "cosine":
            progress = (1 - np.cos(np.pi * progress)) / 2
        if self.transition == "exponential" and (initial != final).any():
            mixed = initial ** (1 - progress) * final**progress
        else:
            mixed = (1 - progress) * initial + progress * final
        return mixed / mixed.sum(-1, keepdims=True)

    def draw(self, seed: int, step: np.ndarray, rows: int) -> np.ndarray:
        """Indices of datasets: (len(step), rows), of each sequence; or (len(step), 1), of each whole batch."""
        number = step[:, None]  # of the draw
        if self.per == "sequence":
            number = number * rows + np.arange(rows)
        if self.turns:
            return np.searchsorted(np.cumsum(self.turns), number % sum(self.turns), side="right")
        bounds = np.cumsum(self.weights(step), axis=-1)[:, None, :-1]  # (steps, 1, datasets - 1)
        return (uniform(seed, DATASET, number)[..., None] >= bounds).sum(-1)


def make_mixture(
    initial_weights: Sequence[float],
    final_weights: Sequence[float] = (),
    transition: str = "linear",
    transition_steps: int = 1,
    per: str = "batch",
    *,
    interleave: bool = False,
) -> Mixture:
    """A mixture from weights of any positive scale; interleave: the initial weights are numbers of turns."""
    initial = np.array(initial_weights, dtype=float)
    final = np.array(final_weights, dtype=float) if final_weights else initial
    return Mixture(
        initial_weights=initial / initial.sum(),
        final_weights=final / final.sum(),
        transition=transition,
        transition_steps=transition_steps,
        per=per,
        turns=tuple(int(weight) for weight in initial) if interleave else (),
    )


class SampleCounter:
    """Counts the sequences drawn from each dataset before a step.

    The count runs: a step after the last one asked for is quick, an earlier one is counted from the start.
    """

    def __init__(
        self, mixture: Mixture, rows: int, seed: int, start_step: int = 0, start_counts: np.ndarray | None = None
    ):
        """start_counts: (datasets,) of the sequences drawn before start_step, perhaps by another mixture; None: 0."""
        self.mixture = mixture
        self.rows = rows
        self.seed = seed
        self.start_step = start_step
        self.start_counts = np.zeros(len(mixture.initial_weights), dtype=np.int64)
        if start_counts is not None:
            self.start_counts = start_counts
        self.step = start_step
        self.counts = self.start_counts

    def counts_before(self, step: int) -> np.ndarray:
        """(datasets,) int64, at a step from start_step on."""
        assert step >= self.start_step
        if step < self.step:
            self.step = self.start_step
            self.counts = self.start_counts
        chunk = max(1, 2**20 // self.rows)
        for start in range(self.step, step, chunk):
            drawn = self.mixture.draw(self.seed, np.arange(start, min(step, start + chunk)), self.rows)
            sequences_per_draw = self.rows // drawn.shape[1]
            self.counts = self.counts + np.bincount(drawn.ravel(), minlength=len(self.counts)) * sequences_per_draw
        self.step = step
        return self.counts


# ---------------------------------------------------------------------------------------------------------------------
# what a step reads


class Plan(NamedTuple):
    """Where the rows of a step are read: (rows,) int64 each."""

    dataset_id: np.ndarray
    shard: np.ndarray
    start: np.ndarray


class Source:
    """Training batches of `rows` sequences a step, drawn from datasets by a mixture."""

    steps_per_rollout = 1  # steps on the same rows; a run is saved and resumed only between two rollouts

    def __init__(self, datasets: Sequence[Dataset], mixture: Mixture, rows: int, seed: int):
        self.datasets = datasets
        self.mixture = mixture
        self.rows = rows
        self.seed = seed
        self.n_windows = sum(dataset.n_windows for dataset in datasets)
        self.start_draw = 0
        self.start_sequences: dict[str, int] = {}
        self.start_counts: np.ndarray | None = None

    def resume_at(self, step: int, sequences: Mapping[str, int]) -> None:
        """Go on at a step of a run that drew so many sequences of each dataset before.

        A dataset keeps its number, by which its windows are hashed, also in a mixture of others.
        """
        self.start_draw = step // self.steps_per_rollout
        new = {dataset.name: 0 for dataset in self.datasets if dataset.name not in sequences}
        self.start_sequences = {**sequences, **new}
        numbers = list(self.start_sequences)
        for dataset in self.datasets:
            dataset.index = numbers.index(dataset.name)
        self.start_counts = np.array([self.start_sequences[dataset.name] for dataset in self.datasets], dtype=np.int64)

    def count_sequences(self, counter: SampleCounter, step: int) -> dict[str, int]:
        """dataset -> sequences drawn before a step, by the datasets' numbers; those that are gone stay."""
        counts = counter.counts_before(step // self.steps_per_rollout).tolist()
        names = [dataset.name for dataset in self.datasets]
        return self.start_sequences | dict(zip(names, counts, strict=True))

    def steps_of_epochs(self, epochs: float) -> int:
        """The first step before which so many epochs were read, exactly: epochs is the decimal number that it shows."""
        n_before = 0 if self.start_counts is None else int(self.start_counts.sum())
        n_left = Fraction(repr(epochs)) * self.n_windows - n_before
        return (self.start_draw + max(0, math.ceil(n_left / self.rows))) * self.steps_per_rollout

    @property
    def tokens_per_step(self) -> float:
        return self.rows * self.datasets[0].T

    @property
    def epochs_per_step(self) -> float:
        return self.rows / self.steps_per_rollout / self.n_windows

    def sample_counter(self) -> SampleCounter:
        """A new counter: threads can't share one."""
        return SampleCounter(self.mixture, self.rows, self.seed, self.start_draw, self.start_counts)

    def plan(self, steps: range, start_row: int, stop_row: int, counter: SampleCounter) -> list[Plan]:
        """Rows [start_row, stop_row) of the global batches of consecutive steps. The counter only saves counting."""
        # 1. The dataset of each row of the global batches.
        drawn = self.mixture.draw(self.seed, np.arange(steps.start, steps.stop), self.rows)
        drawn = np.broadcast_to(drawn, (len(steps), self.rows))
        dataset_id = drawn[:, start_row:stop_row]

        # 2. The number of each row among its dataset's sequences since the run began, and where that sequence lies.
        counts = counter.counts_before(steps.start)
        shard = np.empty(dataset_id.shape, dtype=np.int64)
        start = np.empty(dataset_id.shape, dtype=np.int64)
        for i, dataset in enumerate(self.datasets):
            sequence = counts[i] + np.cumsum(drawn == i).reshape(drawn.shape) - 1
            chosen = dataset_id == i
            shard[chosen], start[chosen] = dataset.locate(sequence[:, start_row:stop_row][chosen])

        return [Plan(*step) for step in zip(dataset_id, shard, start, strict=True)]

    def iter_plans(self, start_step: int, start_row: int, stop_row: int) -> Iterator[Plan]:
        """The plans of step `start_step` and of all after it."""
        counter = self.sample_counter()
        chunk = max(1, 4096 // self.rows)  # a numpy call takes longer than hashing the few rows of a step
        for step in itertools.count(start_step, chunk):
            yield from self.plan(range(step, step + chunk), start_row, stop_row, counter)

    def read_windows(self, plan: Plan) -> np.ndarray:
        """The windows of a plan: (rows, K, T + 1) ids."""
        drawn = set(plan.dataset_id.tolist())
        if len(drawn) == 1:
            return self.datasets[drawn.pop()].read_windows(plan.shard, plan.start)
        first = self.datasets[0]
        dtype = np.result_type(*(self.datasets[i].dtype for i in drawn))
        windows = np.empty((len(plan.dataset_id), len(first.streams), first.T + 1), dtype=dtype)
        for i in drawn:
            chosen = plan.dataset_id == i
            windows[chosen] = self.datasets[i].read_windows(plan.shard[chosen], plan.start[chosen])
        return windows

    def iter_windows(self, start_step: int, start_row: int, stop_row: int) -> Iterator[np.ndarray]:
        """Rows of the global batches of `start_step` and of all after it: (stop_row - start_row, K, T + 1) ids."""
        return map(self.read_windows, self.iter_plans(start_step, start_row, stop_row))

    def iter_steps(self, start_step: int, rows: RankSlice, *, pin: bool, hashed: bool) -> Iterator[Step]:
        """What a rank reads from a step on, in host memory. pin: in pinned memory; hashed: with data_hash."""
        for windows in self.iter_windows(start_step, rows.start, rows.stop):
            cuts = range(0, len(windows), rows.micro_batch_size)
            batches = [
                to_batch(windows[cut : cut + rows.micro_batch_size], pin=pin, n_micro_batches=len(cuts)) for cut in cuts
            ]
            data_hash = row_hash(windows, rows.start) if hashed else 0
            yield Step(batches, data_hash, tokens=self.rows * self.datasets[0].T)

    def stream(
        self, start_step: int, rows: RankSlice, device: torch.device, *, hashed: bool
    ) -> Generator[Step, None, None]:
        """What a rank reads from a step on, on the device: prefetched, to a GPU through pinned memory."""
        return prefetch(self.iter_steps(start_step, rows, pin=device.type == "cuda", hashed=hashed), device)


def prefetch(steps: Iterator[Step], device: torch.device, ahead: int = 2) -> Generator[Step, None, None]:
    """The steps on the device; a thread makes `ahead` of them in advance."""
    ready: queue.Queue[Step | BaseException] = queue.Queue(ahead)
    closed = threading.Event()

    def put(item: Step | BaseException) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for step in steps:
                if closed.is_set():
                    return
                put(step)
        except BaseException as error:  # raised again in the thread that trains
            put(error)

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item._replace(batches=[batch.to(device) for batch in item.batches])
    finally:
        closed.set()
        thread.join()


# ---------------------------------------------------------------------------------------------------------------------
# all the token bins of a run


@dataclass(frozen=True)
class WindowSampling:
    """How windows are drawn from token bins."""

    block_size: int
    rows: int  # sequences of a step
    method: str  # random, without_replacement or sequential
    seed: int


@dataclass(frozen=True)
class TokenData:
    source: Source
    eval_datasets: dict[str, list[Dataset]]  # split -> datasets; random windows, the same ones at every evaluation
    eval_weights: np.ndarray  # of the datasets in the validation loss


def open_data(
    data_dir: Path,
    names: Sequence[Sequence[str]],
    metas: Mapping[str, Meta],
    vocab_offsets: Mapping[str, int],
    mixture: Mixture,
    sampling: WindowSampling,
) -> TokenData:
    """The datasets in data_dir, each given by the names of its aligned streams.

    metas: of each stream; vocab_offsets: the model's first row of each stream, 0 where it is missing. Raises UserError.
    """
    max_open_files = max(1, MAX_OPEN_FILES // (len(SPLITS) * len(metas)))
    bins = {
        (split, name): TokenBin(data_dir / name, split, meta, name, max_open_files)
        for split in SPLITS
        for name, meta in metas.items()
    }

    def datasets(split: str, method: str, seed: int) -> list[Dataset]:
        return [
            Dataset(
                streams=[bins[split, stream] for stream in streams],
                block_size=sampling.block_size,
                method=method,
                seed=seed,
                index=index,
                vocab_offsets=[vocab_offsets.get(stream, 0) for stream in streams],
            )
            for index, streams in enumerate(names)
        ]

    source = Source(datasets("train", sampling.method, sampling.seed), mixture, sampling.rows, sampling.seed)
    eval_seed = int(hash_u64(sampling.seed, EVALUATION))
    eval_datasets = {split: datasets(split, "random", eval_seed) for split in SPLITS}
    return TokenData(source, eval_datasets, mixture.final_weights)
