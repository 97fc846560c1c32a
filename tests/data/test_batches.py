"""Batches: what is drawn, from where, by whom. Witnesses: counting, closed forms, and the pure function of the step."""

import gc
import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from nanoforge import rng
from nanoforge.data import batches
from nanoforge.data.batches import Batch, Dataset, Mixture, SampleCounter, Source, make_mixture
from nanoforge.data.token_bins import Meta, TokenBin
from nanoforge.data.tokenization import NumberTokenizer
from nanoforge.distributed import RankSlice
from nanoforge.errors import UserError
from nanoforge.rng import permute

CPU = torch.device("cpu")


def number_meta(vocab_size: int, dtype: str = "uint16") -> Meta:
    return Meta(vocab_size, dtype, NumberTokenizer(vocab_size), {})


def make_bin(tmp_path: Path, *sizes: int, name: str = "d", first: int = 0) -> TokenBin:
    """A bin of consecutive numbers, in shards of these sizes."""
    folder = tmp_path / name
    folder.mkdir()
    for i, size in enumerate(sizes):
        file = f"train_{i:06d}.bin" if len(sizes) > 1 else "train.bin"
        np.arange(first, first + size, dtype=np.uint16).tofile(folder / file)
        first += size
    return TokenBin(folder, "train", number_meta(2**16))


def make_dataset(
    streams: Sequence[TokenBin], block_size: int = 8, method: str = "random", seed: int = 1, **options: object
) -> Dataset:
    values = {"index": 0, "vocab_offsets": [0] * len(streams)} | options
    return Dataset(streams, block_size, method, seed, **values)


# ---------------------------------------------------------------------------------------------------------------------
# random numbers


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 4097, 65536])
def test_permutation_is_a_bijection_and_depends_on_its_key(n):
    for key in (0, 1):
        assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))
    if n >= 1000:
        permuted = permute(np.arange(n), n, 0)
        assert not np.array_equal(permuted, permute(np.arange(n), n, 1))
        assert abs(np.corrcoef(np.arange(n), permuted)[0, 1]) < 0.1


def test_hash_is_uniform_and_counters_matter():
    values = rng.uniform(7, np.arange(100_000))
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert ((counts - 5000) ** 2 / 5000).sum() < 50  # chi-squared, 19 degrees of freedom
    keys = [(1, 2, 3), (1, 3, 2), (2, 1, 3), (1, 2)]
    assert len({int(rng.hash_u64(*key)) for key in keys}) == 4


def test_splitmix64_is_the_published_generator():
    """The first outputs of SplitMix64 from seed 1234567, as published with the algorithm."""
    golden, expected = 0x9E3779B97F4A7C15, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    state = 1234567
    for value in expected:
        assert int(rng.hash_u64(state)) == value
        state = (state + golden) % 2**64


# ---------------------------------------------------------------------------------------------------------------------
# windows of a dataset


@pytest.mark.parametrize("sizes", [(1000,), (1001,), (300, 77, 500), (9,), (17, 9), (12,)])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_without_replacement_visits_every_window_once(tmp_path: Path, sizes, epoch):
    """The windows of an epoch don't overlap, lie within their shards, and leave out less than two windows a shard."""
    dataset = make_dataset([make_bin(tmp_path, *sizes)], method="without_replacement")
    windows = dataset.gather(epoch * dataset.n_windows + np.arange(dataset.n_windows))[:, 0]
    assert (np.diff(windows, axis=1) == 1).all(), "consecutive numbers: no window crosses shards"
    inputs = windows[:, :-1].ravel()
    assert len(set(inputs.tolist())) == len(inputs), "no token is an input twice"
    assert len(inputs) >= sum(sizes) - 2 * 8 * len(sizes)


def test_grid_moves_and_order_changes_from_epoch_to_epoch(tmp_path: Path):
    dataset = make_dataset([make_bin(tmp_path, 1000)], method="without_replacement")
    sequences = np.arange(dataset.n_windows)
    starts = [dataset.locate(epoch * dataset.n_windows + sequences)[1] for epoch in range(8)]
    assert len({int(start[0]) % 8 for start in starts}) > 2, "offsets of the grid differ"
    assert all((start % 8 == start[0] % 8).all() for start in starts), "one grid an epoch"
    assert not np.array_equal(np.argsort(starts[0]), np.argsort(starts[1]))


def test_sequential_reads_in_order_and_starts_again(tmp_path: Path):
    dataset = make_dataset([make_bin(tmp_path, 100)], method="sequential")
    assert dataset.n_windows == 12
    assert dataset.gather(np.arange(12))[:, 0, 0].tolist() == [*range(0, 96, 8)]
    assert dataset.gather(np.arange(12, 25))[:, 0, 0].tolist() == [*range(3, 99, 8), 0], "to the end, in the 2nd epoch"


@pytest.mark.parametrize("method, epochs", [("random", 40), ("without_replacement", 4), ("sequential", 2)])
def test_every_token_is_a_target_in_time(tmp_path: Path, method: str, epochs: int):
    """All but the first of each shard, which nothing precedes; by counting."""
    dataset = make_dataset([make_bin(tmp_path, 1910, 9, 100, 57)], block_size=8, method=method)
    targets = dataset.gather(np.arange(epochs * dataset.n_windows))[:, 0, 1:]
    never = set(range(sum(dataset.sizes))) - set(targets.ravel().tolist())
    assert never == {0, 1910, 1919, 2019}


def make_single(tmp_path: Path, n_windows: int, rows: int) -> Source:
    dataset = make_dataset([make_bin(tmp_path, 8 * n_windows + 1)], method="sequential")
    assert dataset.n_windows == n_windows
    return Source([dataset], make_mixture((1,)), rows, 5)


@pytest.mark.parametrize("epochs", ["0.1", "0.3", "0.7", "1", "1.1", "2", "3", "10", "0.02"])
def test_steps_of_epochs_are_exact(tmp_path: Path, epochs: str):
    """Fractions are the witness. Floating point makes 50 steps of 49 windows."""
    source = make_single(tmp_path, 49, 1)
    for source.n_windows in (49, 98, 1000, 4097):
        for source.rows in (1, 3, 10, 64):
            expected = math.ceil(Fraction(epochs) * source.n_windows / source.rows)
            assert source.steps_of_epochs(float(epochs)) == expected


def test_counts_go_on_where_another_mixture_and_batch_left_them(tmp_path: Path):
    """Each dataset's windows are those that follow in its own order; epochs count what was drawn before."""
    source = make_source(tmp_path, rows=12)
    read: dict[bool, list[int]] = {False: [], True: []}
    for step in range(5):
        for first in next(source.iter_windows(step, 0, 12))[:, 0, 0].tolist():
            read[first >= 1000].append(first)
    counts = source.count_sequences(source.sample_counter(), 5)
    assert list(counts.values()) == [len(read[False]), len(read[True])]

    resumed = Source(source.datasets, make_mixture((1, 5), per="sequence"), 7, 5)
    resumed.resume_at(5, counts)
    for step in range(5, 12):
        for first in next(resumed.iter_windows(step, 0, 7))[:, 0, 0].tolist():
            read[first >= 1000].append(first)
    order = Source(source.datasets[::-1], make_mixture((1, 1)), 12, 5)
    order.resume_at(5, counts)
    assert [dataset.index for dataset in order.datasets] == [1, 0], "a dataset's own order of windows stays"
    assert order.count_sequences(order.sample_counter(), 5) == counts
    for dataset, firsts in zip(source.datasets, read.values(), strict=True):
        assert firsts == dataset.gather(np.arange(len(firsts)))[:, 0, 0].tolist()
    assert sum(resumed.count_sequences(resumed.sample_counter(), 12).values()) == 5 * 12 + 7 * 7
    assert resumed.steps_of_epochs(1) == 5 + math.ceil((resumed.n_windows - 60) / 7)
    assert resumed.steps_of_epochs(0.1) == 5


def test_random_reaches_every_start_equally(tmp_path: Path):
    dataset = make_dataset([make_bin(tmp_path, 30, 20)])
    counts = np.bincount(dataset.gather(np.arange(100_000))[:, 0, 0], minlength=50)
    possible = [*range(22), *range(30, 42)]
    assert np.flatnonzero(counts).tolist() == possible
    assert counts[possible].std() / counts[possible].mean() < 0.03


def test_targets_are_the_next_tokens(tmp_path: Path):
    batch = batches.to_batch(make_dataset([make_bin(tmp_path, 500)]).gather(np.arange(6)), pin=False)
    assert batch.idx.shape == batch.targets.shape == (6, 8)
    assert torch.equal(batch.targets, batch.idx + 1)
    assert batch.idx.dtype == torch.int64


@pytest.mark.parametrize("method", ["random", "without_replacement", "sequential"])
def test_contexts_are_read_at_the_same_places(tmp_path: Path, method):
    streams = [make_bin(tmp_path, 300, name="x"), make_bin(tmp_path, 300, name="y", first=1000)]
    windows = make_dataset(streams, method=method, seed=3, vocab_offsets=[0, 5000]).gather(np.arange(10))
    assert windows.shape == (10, 2, 9)
    assert (windows[:, 1] - windows[:, 0] == 6000).all()
    assert batches.to_batch(windows, pin=False).idx.shape == (10, 2, 8)


LLMC_MAGIC = {"uint16": 20240520, "uint32": 20240801}


@pytest.mark.parametrize(
    "dtype, vocab_size, offset", [("uint16", 2**16, 0), ("uint16", 2**16, 7), ("uint32", 100_000, 0)]
)
def test_windows_are_what_numpy_reads_from_the_files(tmp_path: Path, dtype, vocab_size, offset):
    """Forty shards, some with llm.c's header, and a stream whose ids begin at another row of the model."""
    folder, random = tmp_path / "many", np.random.default_rng(0)
    folder.mkdir()
    shards = []
    for i in range(40):
        ids = random.integers(0, vocab_size, 50 + i, dtype=dtype)
        header = np.zeros(256, dtype=np.int32)
        header[:3] = LLMC_MAGIC[dtype], 1, len(ids)
        (folder / f"train_{i:06d}.bin").write_bytes((header.tobytes() if i % 3 == 0 else b"") + ids.tobytes())
        shards.append(ids.astype(np.int64))
    dataset = make_dataset([TokenBin(folder, "train", number_meta(vocab_size, dtype))], vocab_offsets=[offset])

    shard, start = dataset.locate(np.arange(500))
    assert len(set(shard.tolist())) == 40
    windows = dataset.gather(np.arange(500))
    assert windows.dtype == (np.uint16 if vocab_size + offset <= 2**16 else np.int32)
    expected = np.array([shards[i][begin : begin + 9] for i, begin in zip(shard, start, strict=True)]) + offset
    assert np.array_equal(windows[:, 0], expected)

    batch = Batch(torch.from_numpy(windows[:, 0])).to(CPU)  # as it is widened on a GPU
    assert batch.idx.dtype == torch.int64
    assert np.array_equal(batch.idx, expected[:, :-1]) and np.array_equal(batch.targets, expected[:, 1:])


@pytest.mark.parametrize("method", ["random", "without_replacement", "sequential"])
def test_a_short_shard_changes_no_window(tmp_path: Path, method: str):
    """The same shards without it are the witness, wherever it stands."""
    whole = make_dataset([make_bin(tmp_path, 50, 40, name="whole")], method=method)
    sequences = np.arange(4 * whole.n_windows)
    for sizes in ((50, 40, 3), (50, 8, 40)):
        name = "-".join(map(str, sizes))
        stream = make_bin(tmp_path, *sizes, name=name)
        for i, size in enumerate(sizes):
            if size == 40:
                np.arange(50, 90, dtype=np.uint16).tofile(stream.paths[i])
        dataset = make_dataset([stream], method=method)
        assert [path.name for path in dataset.short_shards] == [stream.paths[sizes.index(min(sizes))].name]
        assert dataset.n_windows == whole.n_windows
        if method != "without_replacement" or sizes[1] == 40:  # there the offset of a shard's grid follows its number
            assert np.array_equal(dataset.gather(sequences), whole.gather(sequences))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the kernel is not Linux")
def test_more_shards_than_open_files(tmp_path: Path):
    """Two threads read 40 shards with 3 files open; numpy's own reading of the files is the witness."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(40):
        np.full(30, i, dtype=np.uint16).tofile(folder / f"train_{i:06d}.bin")
    n_before = len(os.listdir("/proc/self/fd"))

    def read_all() -> set[int]:
        dataset = make_dataset([TokenBin(folder, "train", number_meta(2**16), max_open_files=3)])

        def read(first: int) -> list[int]:
            numbers = np.arange(first, first + 1000)
            windows = dataset.gather(numbers)
            assert np.array_equal(windows[:, 0, 0], dataset.locate(numbers)[0])
            return windows[:, 0, 0].tolist()

        with ThreadPoolExecutor(2) as pool:
            seen = set().union(*pool.map(read, (0, 5000)))
        assert len(os.listdir("/proc/self/fd")) == n_before + 3
        return seen

    assert read_all() == set(range(40))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == n_before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the kernel is not Linux")
def test_reading_all_over_a_large_bin_keeps_no_memory(tmp_path: Path):
    """256 MB of zeros, which take no disk space, are read at 6,400 places; the kernel counts what is resident."""
    folder = tmp_path / "large"
    folder.mkdir()
    with (folder / "train.bin").open("wb") as file:
        file.truncate(2**28)
    dataset = make_dataset([TokenBin(folder, "train", number_meta(256))], block_size=1024)
    resident = []
    for i in range(100):
        dataset.gather(np.arange(64) + 64 * i)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert max(resident) - resident[0] < 2**23, "grows with what was read"


def test_unequal_contexts_and_short_bins_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="aligned token by token"):
        make_dataset([make_bin(tmp_path, 300, name="x"), make_bin(tmp_path, 299, name="y")])
    with pytest.raises(UserError, match=r"8 tokens .* --block_size=8"):
        make_dataset([make_bin(tmp_path, 8, name="z")])


# ---------------------------------------------------------------------------------------------------------------------
# mixtures


def test_weights_of_any_scale_are_probabilities():
    assert make_mixture((30, 10, 60)).weights(0) == pytest.approx([0.3, 0.1, 0.6])
    assert make_mixture((1, 1)).weights(5) == pytest.approx([0.5, 0.5])


def test_transitions_by_their_closed_forms():
    kinds = ("linear", "cosine", "exponential")
    mixtures = {kind: make_mixture((0.8, 0.2), (0.2, 0.8), kind, 100) for kind in kinds}
    for mixture in mixtures.values():
        assert mixture.weights(0) == pytest.approx([0.8, 0.2])
        assert mixture.weights(50) == pytest.approx([0.5, 0.5])
        assert mixture.weights(100) == pytest.approx([0.2, 0.8]) == mixture.weights(500)
    assert mixtures["linear"].weights(25) == pytest.approx([0.65, 0.35])
    assert mixtures["cosine"].weights(25)[0] == pytest.approx(0.8 - 0.6 * (1 - np.cos(np.pi / 4)) / 2)
    ratio = 0.8**0.75 * 0.2**0.25 / (0.2**0.75 * 0.8**0.25)
    assert mixtures["exponential"].weights(25)[0] == pytest.approx(ratio / (1 + ratio))


@pytest.mark.parametrize("per", ["batch", "sequence"])
def test_datasets_are_drawn_as_often_as_their_weights_say(per):
    drawn = np.broadcast_to(make_mixture((5, 3, 2), per=per).draw(1, np.arange(20_000), 8), (20_000, 8))
    assert np.bincount(drawn.ravel()) / drawn.size == pytest.approx([0.5, 0.3, 0.2], abs=0.012)
    mixed_batches = (drawn != drawn[:, :1]).any(1).mean()
    assert mixed_batches == 0 if per == "batch" else mixed_batches > 0.9


def test_interleaving_takes_turns():
    by_batch = make_mixture((2, 1), interleave=True)
    assert by_batch.draw(1, np.arange(6), 4)[:, 0].tolist() == [0, 0, 1, 0, 0, 1]
    by_sequence = make_mixture((2, 1), per="sequence", interleave=True)
    assert by_sequence.draw(1, np.arange(2), 4).tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]


def test_a_transition_shifts_what_is_drawn():
    drawn = make_mixture((1, 0), (0, 1), "linear", 1000).draw(1, np.arange(1000), 4)[:, 0]
    assert drawn[:200].mean() == pytest.approx(0.1, abs=0.06)
    assert drawn[-200:].mean() == pytest.approx(0.9, abs=0.06)


# ---------------------------------------------------------------------------------------------------------------------
# the batches of a run


def make_source(tmp_path: Path, per: str = "sequence", method: str = "without_replacement", rows: int = 12) -> Source:
    """Two datasets, of numbers below 1000 and from 1000 on, drawn 2 : 1."""
    datasets = []
    for index in range(2):
        stream = make_bin(tmp_path, 400, name=f"{per}{method}{index}", first=index * 1000)
        datasets.append(make_dataset([stream], method=method, seed=5, index=index))
    return Source(datasets, make_mixture((2, 1), per=per), rows, 5)


@pytest.mark.parametrize("per", ["batch", "sequence"])
@pytest.mark.parametrize("method", ["random", "without_replacement", "sequential"])
def test_a_batch_is_a_function_of_the_step(tmp_path: Path, per, method):
    source = make_source(tmp_path, per, method)
    in_order = [next(source.iter_windows(step, 0, 12)) for step in range(20)]
    for step in (19, 3, 11, 0):
        assert np.array_equal(next(source.iter_windows(step, 0, 12)), in_order[step])
    for world_size in (2, 3, 4):
        n = 12 // world_size
        shares = [next(source.iter_windows(7, rank * n, (rank + 1) * n)) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(shares), in_order[7])


def test_a_mixture_without_replacement_visits_each_datasets_windows_once(tmp_path: Path):
    source = make_source(tmp_path)
    n_windows = source.datasets[0].n_windows
    first_tokens, step = [], 0
    while len(first_tokens) < n_windows:
        windows = next(source.iter_windows(step, 0, 12))
        first_tokens += [window[0, 0] for window in windows if window[0, 0] < 1000]
        step += 1
    assert len(set(first_tokens[:n_windows])) == n_windows


def test_the_counter_counts_what_was_drawn(tmp_path: Path):
    source = make_source(tmp_path)
    running = source.sample_counter()
    drawn = np.zeros(2, dtype=int)
    for step in range(30):
        assert np.array_equal(SampleCounter(source.mixture, 12, 5).counts_before(step), drawn)
        assert np.array_equal(running.counts_before(step), drawn)
        is_second = next(source.iter_windows(step, 0, 12))[:, 0, 0] >= 1000
        drawn += np.bincount(is_second.astype(int), minlength=2)


def test_the_counter_counts_whole_batches():
    half = np.array([0.5, 0.5])
    counts = SampleCounter(Mixture(half, half), 12, 5).counts_before(100)
    assert counts.sum() == 1200 and (counts % 12 == 0).all()


def test_a_stream_gathers_ahead_and_hashes_add_up(tmp_path: Path):
    source = make_source(tmp_path)
    single = source.stream(3, RankSlice(0, 12, 4), CPU, hashed=True)
    ranks = [source.stream(3, RankSlice(start, start + 6, 3), CPU, hashed=True) for start in (0, 6)]
    hashes = set()
    for number in range(3, 8):
        step = next(single)
        windows = next(source.iter_windows(number, 0, 12))[:, 0]
        assert step.tokens == 12 * 8
        assert [len(batch.idx) for batch in step.batches] == [4, 4, 4]
        assert np.array_equal(torch.cat([batch.tokens for batch in step.batches]), windows)
        assert step.data_hash == sum(next(rank).data_hash for rank in ranks) % 2**64
        hashes.add(step.data_hash)
    assert len(hashes) == 5
    rows = next(source.iter_windows(0, 0, 12))
    assert batches.row_hash(rows, 0) != batches.row_hash(rows[::-1], 0), "the order counts"
    for stream in (single, *ranks):
        stream.close()


def test_a_stream_is_the_same_from_wherever_it_starts(tmp_path: Path):
    """Several steps are planned at once, here four, which is not seen. Hashes are of int64, however narrow the bins."""
    source = make_source(tmp_path, rows=1024)
    stream = source.stream(0, RankSlice(3, 7, 4), CPU, hashed=True)
    for number in range(10):
        step = next(stream)
        rows = next(source.iter_windows(number, 3, 7)).astype(np.int64)
        assert np.array_equal(step.batches[0].tokens, rows[:, 0])
        total = 0
        for i, row in enumerate(rows, start=3):
            digest = hashlib.blake2b(row.tobytes(), digest_size=8, salt=i.to_bytes(8, "little")).digest()
            total += int.from_bytes(digest, "little")
        assert step.data_hash == total % 2**64
    stream.close()


def test_an_error_of_the_gathering_thread_is_raised_where_batches_are_taken(tmp_path: Path):
    source = make_source(tmp_path)
    source.datasets[1].streams[0].files.paths = []
    stream = source.stream(0, RankSlice(0, 12, 4), CPU, hashed=False)
    with pytest.raises(IndexError):
        for _ in range(10):
            next(stream)
