"""Token bins to batches: the batch of a step is a pure function of the arguments and the step.

A source is a mixture of datasets, each of K aligned streams (one, unless it is a multicontext one). Sequence c of a run, c = step *
rows + row, is told its dataset and its window by hashes of (seed, c), so resuming needs no state, a prefetching thread can corrupt
nothing, and every number of ranks sees the same global batch, of which each gathers its own rows.

Knows nothing of the model; knows of ranks only which rows are asked for.
"""

import hashlib
import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanoforge.data.token_bins import SPLITS, Bin, Meta
from nanoforge.errors import UserError
from nanoforge.rng import DATASET, EVALUATION, OFFSET, ORDER, WINDOW, hash_u64, permute, uniform

# ---------------------------------------------------------------------------------------------------------------------
# which window of a dataset


class Dataset:
    """Aligned streams of one split, cut into windows of block_size + 1 tokens; the targets are the inputs' successors.

    windows: how many make one epoch. `window(c)` places sequence number c of this dataset: (stream-independent) shard and start.
    """

    def __init__(
        self, streams: Sequence[Bin], block_size: int, method: str, seed: int, number: int, firsts: Sequence[int]
    ):
        self.streams, self.T, self.method, self.seed, self.number, self.firsts = (
            streams,
            block_size,
            method,
            seed,
            number,
            firsts,
        )
        sizes = [[len(shard) for shard in stream.shards] for stream in streams]
        for stream, size in zip(streams, sizes, strict=True):
            if size != sizes[0]:
                raise UserError(
                    f"{stream.paths[0]}: {stream.tokens:,} tokens, but {streams[0].paths[0]} has {streams[0].tokens:,}; contexts must be aligned token by token"
                )
        self.sizes = np.array(sizes[0])
        if (short := int(self.sizes.min())) < block_size + 1:
            path = streams[0].paths[int(self.sizes.argmin())]
            raise UserError(
                f"{path}: {short} tokens are less than one window of --block_size={block_size} and its targets; lower it or prepare more text"
            )
        if (
            method == "without_replacement"
        ):  # another offset of the grid each epoch, any of block_size where there is room
            self.per_shard = np.maximum(1, (self.sizes - block_size) // block_size)
        else:
            self.per_shard = (self.sizes - 1) // block_size
        self.windows = int(self.per_shard.sum())
        self.tokens_of_one = block_size
        largest = max(first + stream.meta.vocab_size for stream, first in zip(streams, firsts, strict=True))
        self.dtype = np.dtype(np.uint16 if largest <= 2**16 else np.int32)  # torch takes no uint32
        self.name = streams[0].name if len(streams) == 1 else "+".join(stream.name for stream in streams)

    def place(self, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, start) of sequences, by their numbers in this dataset: int64 arrays of the same shape."""
        if self.method == "random":
            ends = np.cumsum(self.sizes - self.T)  # places where a window may start
            at = (hash_u64(self.seed, WINDOW, self.number, sequence) % np.uint64(ends[-1])).astype(np.int64)
            shard = np.searchsorted(ends, at, side="right")
            return shard, at - (ends - (self.sizes - self.T))[shard]
        epoch, index = np.divmod(sequence, self.windows)
        if self.method == "without_replacement":
            index = permute(index, self.windows, self.seed, ORDER, self.number, epoch)
        ends = np.cumsum(self.per_shard)
        shard = np.searchsorted(ends, index, side="right")
        start = (index - (ends - self.per_shard)[shard]) * self.T
        if self.method == "without_replacement":
            room = np.minimum(self.T, self.sizes - self.per_shard * self.T)[shard]  # offsets the grid may take
            start += (hash_u64(self.seed, OFFSET, self.number, epoch, shard) % room.astype(np.uint64)).astype(np.int64)
        return shard, start

    def gather(self, sequence: np.ndarray) -> np.ndarray:
        """(len(sequence), K, block_size + 1) ids in the model's rows, of `dtype`."""
        return self.windows_at(*self.place(sequence))

    def windows_at(self, shard: np.ndarray, start: np.ndarray) -> np.ndarray:
        """The windows, as `gather` gives them, at places that `place` told."""
        rows = [stream.windows(shard, start, self.T + 1).astype(self.dtype, copy=False) for stream in self.streams]
        for row, first in zip(rows, self.firsts, strict=True):
            if first:
                row += first
        return np.stack(rows, axis=1) if len(rows) > 1 else rows[0][:, None]

    def evaluation(self, iters: int, size: int, rank: int, world: int, pin: bool) -> Iterator[tuple["Batch", bool]]:
        """This rank's part of each of `iters` batches of `size` windows, and whether it has one: a rank without a window reads the first one
        with the others."""
        first, last = rank * size // world, (rank + 1) * size // world
        for i in range(iters):
            yield as_batch(self.gather(i * size + np.arange(first, max(last, first + 1))), pin), last > first


# ---------------------------------------------------------------------------------------------------------------------
# which dataset


@dataclass(frozen=True)
class Mixture:
    """Weights of the datasets, and how they are drawn.

    Either in turn, each `counts` times, or at random with weights that go from `first` to `final` over `steps`.
    Drawn once a batch or once a sequence (`per`).
    """

    first: np.ndarray
    final: np.ndarray
    transition: str = "linear"  # or cosine, exponential
    steps: int = 1
    per: str = "batch"  # or sequence
    counts: tuple[int, ...] = ()

    def weights(self, step: np.ndarray | int) -> np.ndarray:
        """Probabilities at steps: (*step.shape, datasets)."""
        part = np.clip(np.asarray(step, dtype=float) / max(1, self.steps), 0, 1)[..., None]
        if self.transition == "cosine":
            part = (1 - np.cos(np.pi * part)) / 2
        if self.transition == "exponential" and (self.first != self.final).any():
            mixed = self.first ** (1 - part) * self.final**part
        else:
            mixed = (1 - part) * self.first + part * self.final
        return mixed / mixed.sum(-1, keepdims=True)

    def draw(self, seed: int, step: np.ndarray, rows: int) -> np.ndarray:
        """The dataset of each sequence of these steps, (len(step), rows), or of each whole batch, (len(step), 1)."""
        turn = step[:, None] * rows + np.arange(rows) if self.per == "sequence" else step[:, None]
        if self.counts:
            return np.searchsorted(np.cumsum(self.counts), turn % sum(self.counts), side="right")
        bounds = np.cumsum(self.weights(step), axis=-1)[:, None, :-1]  # (steps, 1, datasets - 1)
        return (uniform(seed, DATASET, turn)[..., None] >= bounds).sum(-1)


def mixture(
    n: int,
    probs: Sequence[float] = (),
    final: Sequence[float] = (),
    transition: str = "linear",
    steps: int = 1,
    per: str = "batch",
    interleave: bool = False,
) -> Mixture:
    """A mixture of n datasets from the arguments: weights of any positive scale, none meaning equal ones."""
    first = np.array(probs or [1.0] * n, dtype=float)
    counts = tuple(int(count) for count in first) if interleave else ()
    last = np.array(final, dtype=float) if final else first
    return Mixture(first / first.sum(), last / last.sum(), transition, steps, per, counts)


# ---------------------------------------------------------------------------------------------------------------------
# batches


@dataclass(frozen=True)
class Batch:
    """The rows of one micro-batch, (B, T + 1) ids, or (B, K, T + 1) of K contexts: int64, but in pinned memory as narrow as the bins'.

    more: what an objective needs besides, by name; of examples at least `mask`, (B, T) bools, the targets that are learned.
    """

    tokens: torch.Tensor
    more: dict[str, torch.Tensor] = field(default_factory=dict)
    parts: int = 1  # micro-batches that this rank makes of its rows of the step
    learned: float = 0.0  # targets in the masks of the whole step, over the number of ranks

    @property
    def idx(self) -> torch.Tensor:
        return self.tokens[..., :-1]

    @property
    def targets(self) -> torch.Tensor:
        return self.tokens[..., 1:]

    def to(self, device: torch.device) -> "Batch":
        """On the device, tokens as int64; from pinned memory, and only from there, the copy is asynchronous."""
        more = {name: tensor.to(device, non_blocking=tensor.is_pinned()) for name, tensor in self.more.items()}
        return replace(self, tokens=self.tokens.to(device, non_blocking=self.tokens.is_pinned()).long(), more=more)

    def having(self, **more: torch.Tensor) -> "Batch":
        """The same with further tensors."""
        return replace(self, more=self.more | more)


class Step(NamedTuple):
    """What a rank reads for one optimizer step."""

    batches: list[Batch]
    digest: int = (
        0  # hash of this rank's rows; those of all ranks add up (mod 2^64) to the same number for any split of the rows
    )
    tokens: int = 0  # of the whole step, padding not counted
    told: dict[str, torch.Tensor] = {}  # noqa: RUF012  # metrics, (2,) each: a sum and what it is to be divided by, both of this rank


def as_batch(windows: np.ndarray, pin: bool, parts: int = 1) -> Batch:
    """(B, K, T + 1) windows to a batch; a single context has no dimension of its own."""
    tokens = torch.from_numpy(windows if windows.shape[1] > 1 else windows[:, 0])
    return Batch(tokens.pin_memory() if pin else tokens.long(), parts=parts)


def prefetch(steps: Iterator[Step], device: torch.device, ahead: int = 2) -> Iterator[Step]:
    """The steps on the device; a thread makes `ahead` of them in advance."""
    ready: queue.Queue = queue.Queue(ahead)
    closed = threading.Event()

    def put(item) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def gather() -> None:
        try:
            for step in steps:
                if closed.is_set():
                    return
                put(step)
        except BaseException as error:  # told by the thread that trains
            put(error)

    thread = threading.Thread(target=gather, name="batches", daemon=True)
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


class SampleCounter:
    """Sequences drawn from each dataset before a step. A running count: to go on from the last step asked for is quick,
    an earlier one is counted from the start of the run."""

    def __init__(self, mixture: Mixture, rows: int, seed: int):
        self.mixture, self.rows, self.seed = mixture, rows, seed
        self.step, self.counts = 0, np.zeros(len(mixture.first), dtype=np.int64)

    def before(self, step: int) -> np.ndarray:
        if step < self.step:
            self.step, self.counts = 0, np.zeros_like(self.counts)
        chunk = max(1, 2**20 // self.rows)
        for first in range(self.step, step, chunk):
            which = self.mixture.draw(self.seed, np.arange(first, min(step, first + chunk)), self.rows)
            self.counts = self.counts + np.bincount(which.ravel(), minlength=len(self.counts)) * (
                self.rows // which.shape[1]
            )
        self.step = step
        return self.counts


class Source:
    """Training batches of `rows` sequences a step, drawn from datasets by a mixture."""

    period = 1  # steps between two at which a run may be saved and resumed; all of them read the same rows

    def __init__(self, datasets: Sequence[Dataset], mixture: Mixture, rows: int, seed: int):
        self.datasets, self.mixture, self.rows, self.seed = datasets, mixture, rows, seed
        self.windows = sum(dataset.windows for dataset in datasets)

    @property
    def tokens_per_step(self) -> float:
        return self.rows * self.datasets[0].T

    @property
    def epochs_per_step(self) -> float:
        return self.rows / self.period / self.windows

    def tally(self) -> SampleCounter:
        """A count of one's own: a thread may not use another's."""
        return SampleCounter(self.mixture, self.rows, self.seed)

    def places(self, steps: np.ndarray, first: int, last: int, tally: SampleCounter) -> np.ndarray:
        """(len(steps), 3, last - first): dataset, shard and start of rows [first, last) of the global batches of steps that follow
        each other; the tally only saves counting."""
        which = np.broadcast_to(self.mixture.draw(self.seed, steps, self.rows), (len(steps), self.rows))
        before, here = tally.before(int(steps[0])), which[:, first:last]
        found = np.empty((len(steps), 3, last - first), dtype=np.int64)
        found[:, 0] = here
        for d, dataset in enumerate(self.datasets):
            number = (
                before[d] + np.cumsum(which == d).reshape(which.shape) - 1
            )  # of each row, among its dataset's sequences
            found[:, 1][here == d], found[:, 2][here == d] = dataset.place(number[:, first:last][here == d])
        return found

    def windows_at(self, place: np.ndarray) -> np.ndarray:
        """(rows, K, T + 1) ids of the rows of a step, from their (3, rows) place."""
        drawn = set(place[0].tolist())
        if len(drawn) == 1:
            return self.datasets[drawn.pop()].windows_at(*place[1:])
        shape = (place.shape[1], len(self.datasets[0].streams), self.datasets[0].T + 1)
        windows = np.empty(shape, dtype=np.result_type(*(self.datasets[d].dtype for d in drawn)))
        for d in drawn:
            here = place[0] == d
            windows[here] = self.datasets[d].windows_at(*place[1:, here])
        return windows

    def iter_windows(self, start: int, first: int, last: int) -> Iterator[np.ndarray]:
        """Rows [first, last) of the global batches of step `start` and of all after it: (last - first, K, T + 1) ids each."""
        tally, chunk = (
            self.tally(),
            max(1, 4096 // self.rows),
        )  # a call of numpy's takes longer than hashing the few rows of a step
        for step in itertools.count(start, chunk):
            yield from map(self.windows_at, self.places(np.arange(step, step + chunk), first, last, tally))

    def iter_steps(
        self, start: int, first: int, last: int, micro_batch: int, pin: bool, hashed: bool
    ) -> Iterator[Step]:
        """What a rank of rows [first, last) reads from step `start` on: micro-batches in the host's memory, pinned if asked."""
        for windows in self.iter_windows(start, first, last):
            cuts = range(0, len(windows), micro_batch)
            made = [as_batch(windows[row : row + micro_batch], pin, len(cuts)) for row in cuts]
            yield Step(made, row_hash(windows, first) if hashed else 0, self.tokens_per_step)

    def stream(
        self, start: int, first: int, last: int, micro_batch: int, device: torch.device, hashed: bool
    ) -> Iterator[Step]:
        """From step `start` on what a rank of rows [first, last) reads, on the device; through pinned memory where that is a GPU."""
        return prefetch(self.iter_steps(start, first, last, micro_batch, device.type == "cuda", hashed), device)


def row_hash(windows: Iterable[np.ndarray], first: int) -> int:
    """Sum mod 2^64 of a hash of each row with its place in the global batch."""
    total = 0
    for row, window in enumerate(windows, start=first):
        total += int.from_bytes(
            hashlib.blake2b(window.astype(np.int64).tobytes(), digest_size=8, salt=row.to_bytes(8, "little")).digest(),
            "little",
        )
    return total % 2**64


# ---------------------------------------------------------------------------------------------------------------------
# all of a run's windows


@dataclass(frozen=True)
class Windows:
    source: Source
    evaluated: dict[str, list[Dataset]]  # split -> datasets, with random windows that are the same at every evaluation
    weights: np.ndarray  # of the datasets in the validation loss


def open_data(
    root: Path,
    names: Sequence[Sequence[str]],
    metas: dict[str, Meta],
    firsts: dict[str, int],
    mixture: Mixture,
    block_size: int,
    rows: int,
    method: str,
    seed: int,
) -> Windows:
    """The datasets in root, each named by its aligned streams.

    metas: of each stream; firsts: of streams that don't begin at the model's row 0, the first of theirs; rows: sequences of a step.
    Raises UserError.
    """
    opened = {(split, name): Bin(root / name, split, meta, name) for split in SPLITS for name, meta in metas.items()}

    def datasets(split: str, method: str, seed: int) -> list[Dataset]:
        return [
            Dataset(
                [opened[split, s] for s in streams], block_size, method, seed, i, [firsts.get(s, 0) for s in streams]
            )
            for i, streams in enumerate(names)
        ]

    evaluation = {split: datasets(split, "random", int(hash_u64(seed, EVALUATION))) for split in SPLITS}
    return Windows(Source(datasets("train", method, seed), mixture, rows, seed), evaluation, mixture.final)
