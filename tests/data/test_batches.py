"""Batches: what is drawn, from where, by whom. Witnesses: counting, closed forms, and the pure function of the step."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from nanoforge import rng
from nanoforge.data import batches, token_bins, tokenization
from nanoforge.data.batches import Dataset, Mixture, SampleCounter, Source, make_mixture
from nanoforge.distributed import RankSlice
from nanoforge.errors import UserError
from nanoforge.rng import permute


def opened(tmp_path: Path, *sizes: int, name: str = "d", first: int = 0) -> token_bins.TokenBin:
    """A bin of consecutive numbers, in shards of these sizes."""
    folder = tmp_path / name
    folder.mkdir()
    for i, size in enumerate(sizes):
        np.arange(first, first + size, dtype=np.uint16).tofile(
            folder / (f"train_{i:06d}.bin" if len(sizes) > 1 else "train.bin")
        )
        first += size
    return token_bins.TokenBin(
        folder, "train", token_bins.Meta(2**16, "uint16", tokenization.NumberTokenizer(2**16), {})
    )


def dataset(tmp_path, *sizes, T=8, method="random", seed=1, **more) -> Dataset:
    return Dataset([opened(tmp_path, *sizes, **more)], T, method, seed, 0, [0])


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 4097, 65536])
def test_permutation_is_a_bijection_and_depends_on_its_key(n):
    for key in (0, 1):
        assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))
    if n >= 1000:
        moved = permute(np.arange(n), n, 0)
        assert not np.array_equal(moved, permute(np.arange(n), n, 1))
        assert abs(np.corrcoef(np.arange(n), moved)[0, 1]) < 0.1


def test_hash_is_uniform_and_counters_matter():
    values = rng.uniform(7, np.arange(100_000))
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert ((counts - 5000) ** 2 / 5000).sum() < 50  # chi-squared, 19 degrees of freedom
    assert (
        len(
            {
                int(rng.hash_u64(1, 2, 3)),
                int(rng.hash_u64(1, 3, 2)),
                int(rng.hash_u64(2, 1, 3)),
                int(rng.hash_u64(1, 2)),
            }
        )
        == 4
    )


def test_split_mix_64_is_the_published_generator():
    """The first outputs of SplitMix64 from seed 1234567, as published with the algorithm."""
    golden, expected = 0x9E3779B97F4A7C15, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    state = 1234567
    for value in expected:
        assert int(rng.hash_u64(state)) == value
        state = (state + golden) % 2**64


@pytest.mark.parametrize("sizes", [(1000,), (1001,), (300, 77, 500), (9,), (17, 9), (12,)])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_without_replacement_visits_every_window_once(tmp_path, sizes, epoch):
    """The windows of an epoch don't overlap, lie within their shards, and leave out less than two windows a shard."""
    d = dataset(tmp_path, *sizes, method="without_replacement")
    rows = d.gather(epoch * d.n_windows + np.arange(d.n_windows))[:, 0]
    assert (np.diff(rows, axis=1) == 1).all(), "consecutive numbers: no window crosses shards"
    inputs = rows[:, :-1].ravel()
    assert len(set(inputs.tolist())) == len(inputs), "no token is an input twice"
    assert len(inputs) >= sum(sizes) - 2 * 8 * len(sizes)


def test_grid_moves_and_order_changes_from_epoch_to_epoch(tmp_path):
    d = dataset(tmp_path, 1000, method="without_replacement")
    starts = [d.locate(epoch * d.n_windows + np.arange(d.n_windows))[1] for epoch in range(8)]
    assert len({int(s[0]) % 8 for s in starts}) > 2, "offsets of the grid differ"
    assert all((s % 8 == s[0] % 8).all() for s in starts), "one grid an epoch"
    assert not np.array_equal(np.argsort(starts[0]), np.argsort(starts[1]))


def test_sequential_reads_in_order_and_starts_again(tmp_path):
    d = dataset(tmp_path, 100, method="sequential")
    assert d.n_windows == 12
    assert d.gather(np.arange(13))[:, 0, 0].tolist() == [*range(0, 96, 8), 0]


def test_random_reaches_every_place_equally(tmp_path):
    d = dataset(tmp_path, 30, 20)
    counts = np.bincount(d.gather(np.arange(100_000))[:, 0, 0], minlength=50)
    possible = [i for i in range(50) if i < 22 or 30 <= i < 42]
    assert set(np.flatnonzero(counts)) == set(possible)
    assert counts[possible].std() / counts[possible].mean() < 0.03


def test_targets_are_the_next_tokens(tmp_path):
    batch = batches.to_batch(dataset(tmp_path, 500).gather(np.arange(6)), pin=False)
    assert (
        batch.idx.shape == batch.targets.shape == (6, 8)
        and torch.equal(batch.targets, batch.idx + 1)
        and batch.idx.dtype == torch.int64
    )


def test_contexts_are_read_at_the_same_places(tmp_path):
    streams = [opened(tmp_path, 300, name="x"), opened(tmp_path, 300, name="y", first=1000)]
    for method in ("random", "without_replacement", "sequential"):
        rows = Dataset(streams, 8, method, 3, 0, [0, 5000]).gather(np.arange(10))
        assert rows.shape == (10, 2, 9) and (rows[:, 1] - rows[:, 0] == 6000).all()
    assert batches.to_batch(rows, pin=False).idx.shape == (10, 2, 8)


@pytest.mark.parametrize(
    "dtype, vocab_size, first", [("uint16", 2**16, 0), ("uint16", 2**16, 7), ("uint32", 100_000, 0)]
)
def test_windows_are_what_numpy_reads_from_the_files(tmp_path, dtype, vocab_size, first):
    """Forty shards, some with llm.c's header, and a stream whose ids begin at another row of the model."""
    folder, drawn = tmp_path / "many", np.random.default_rng(0)
    folder.mkdir()
    for i in range(40):
        ids = drawn.integers(0, vocab_size, 50 + i, dtype=dtype)
        header = np.zeros(256, dtype=np.int32)
        header[:3] = {"uint16": 20240520, "uint32": 20240801}[dtype], 1, len(ids)
        (folder / f"train_{i:06d}.bin").write_bytes((header.tobytes() if i % 3 == 0 else b"") + ids.tobytes())
    d = Dataset(
        [
            token_bins.TokenBin(
                folder, "train", token_bins.Meta(vocab_size, dtype, tokenization.NumberTokenizer(vocab_size), {})
            )
        ],
        8,
        "random",
        1,
        0,
        [first],
    )
    shard, start = d.locate(np.arange(500))
    assert len(set(shard.tolist())) == 40
    rows, shards = (
        d.gather(np.arange(500)),
        [np.fromfile(path, dtype, offset=1024 * (i % 3 == 0)) for i, path in enumerate(sorted(folder.iterdir()))],
    )
    assert rows.dtype == (np.uint16 if vocab_size + first <= 2**16 else np.int32)
    assert np.array_equal(
        rows[:, 0], [shards[s][at : at + 9].astype(np.int64) + first for s, at in zip(shard, start, strict=True)]
    )
    batch = batches.Batch(torch.from_numpy(rows[:, 0])).to(torch.device("cpu"))  # as it is widened on a GPU
    assert (
        batch.idx.dtype == torch.int64
        and np.array_equal(batch.idx, rows[:, 0, :-1])
        and np.array_equal(batch.targets, rows[:, 0, 1:])
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the kernel is not Linux")
def test_reading_all_over_a_large_bin_keeps_no_memory(tmp_path):
    """256 MB of zeros, which take no place on the disk, are read at 6,400 places; the kernel tells what the process holds."""
    folder = tmp_path / "large"
    folder.mkdir()
    with (folder / "train.bin").open("wb") as file:
        file.truncate(2**28)
    d = Dataset(
        [token_bins.TokenBin(folder, "train", token_bins.Meta(256, "uint16", tokenization.NumberTokenizer(256), {}))],
        1024,
        "random",
        1,
        0,
        [0],
    )
    resident = []
    for i in range(100):
        d.gather(np.arange(64) + 64 * i)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert max(resident) - resident[0] < 2**23, "grows with what was read"


def test_unequal_contexts_and_short_bins_are_told(tmp_path):
    with pytest.raises(UserError, match="aligned token by token"):
        Dataset([opened(tmp_path, 300, name="x"), opened(tmp_path, 299, name="y")], 8, "random", 3, 0, [0, 0])
    with pytest.raises(UserError, match=r"8 tokens are less than one window of --block_size=8"):
        dataset(tmp_path, 8, name="z")


# ---------------------------------------------------------------------------------------------------------------------


def test_weights_of_any_scale_are_probabilities():
    m = make_mixture((30, 10, 60))
    assert m.weights(0) == pytest.approx([0.3, 0.1, 0.6]) and make_mixture((1, 1)).weights(5) == pytest.approx(
        [0.5, 0.5]
    )


def test_transitions_by_their_closed_forms():
    linear, cosine, exponential = (
        make_mixture((0.8, 0.2), (0.2, 0.8), how, 100) for how in ("linear", "cosine", "exponential")
    )
    for m in (linear, cosine, exponential):
        assert m.weights(0) == pytest.approx([0.8, 0.2]) and m.weights(100) == pytest.approx([0.2, 0.8]) == m.weights(
            500
        )
        assert m.weights(50) == pytest.approx([0.5, 0.5])
    assert linear.weights(25) == pytest.approx([0.65, 0.35])
    assert cosine.weights(25)[0] == pytest.approx(0.8 - 0.6 * (1 - np.cos(np.pi / 4)) / 2)
    ratio = 0.8**0.75 * 0.2**0.25 / (0.2**0.75 * 0.8**0.25)
    assert exponential.weights(25)[0] == pytest.approx(ratio / (1 + ratio))


@pytest.mark.parametrize("per", ["batch", "sequence"])
def test_datasets_are_drawn_as_often_as_their_weights_say(per):
    which = np.broadcast_to(make_mixture((5, 3, 2), per=per).draw(1, np.arange(20_000), 8), (20_000, 8))
    assert np.bincount(which.ravel()) / which.size == pytest.approx([0.5, 0.3, 0.2], abs=0.012)
    mixed = (which != which[:, :1]).any(1).mean()
    assert mixed == 0 if per == "batch" else mixed > 0.9


def test_interleaving_takes_turns():
    m = make_mixture((2, 1), interleave=True)
    assert m.draw(1, np.arange(6), 4)[:, 0].tolist() == [0, 0, 1, 0, 0, 1]
    m = make_mixture((2, 1), per="sequence", interleave=True)
    assert m.draw(1, np.arange(2), 4).tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]


def test_transition_shifts_what_is_drawn():
    which = make_mixture((1, 0), (0, 1), "linear", 1000).draw(1, np.arange(1000), 4)[:, 0]
    assert which[:200].mean() == pytest.approx(0.1, abs=0.06) and which[-200:].mean() == pytest.approx(0.9, abs=0.06)


# ---------------------------------------------------------------------------------------------------------------------


def source(tmp_path, per="sequence", method="without_replacement", rows=12) -> Source:
    datasets = [
        Dataset([opened(tmp_path, 400, name=f"{per}{method}{i}", first=i * 1000)], 8, method, 5, i, [0])
        for i in range(2)
    ]
    return Source(datasets, make_mixture((2, 1), per=per), rows, 5)


@pytest.mark.parametrize("per", ["batch", "sequence"])
@pytest.mark.parametrize("method", ["random", "without_replacement", "sequential"])
def test_a_batch_is_a_function_of_the_step(tmp_path, per, method):
    s = source(tmp_path, per, method)
    forward = [next(s.iter_windows(step, 0, 12)) for step in range(20)]
    for step in (19, 3, 11, 0):
        assert np.array_equal(next(s.iter_windows(step, 0, 12)), forward[step])
    for ranks in (2, 3, 4):
        share = 12 // ranks
        assert np.array_equal(
            np.concatenate([next(s.iter_windows(7, r * share, (r + 1) * share)) for r in range(ranks)]), forward[7]
        )


def test_a_mixture_without_replacement_visits_each_datasets_windows_once(tmp_path):
    s = source(tmp_path)
    windows = s.datasets[0].n_windows
    firsts, step = [], 0
    while len(firsts) < windows:
        firsts += [row[0, 0] for row in next(s.iter_windows(step, 0, 12)) if row[0, 0] < 1000]
        step += 1
    assert len(set(firsts[:windows])) == windows


def test_tally_counts_what_was_drawn(tmp_path):
    s = source(tmp_path)
    drawn, going_on = np.zeros(2, dtype=int), s.sample_counter()
    for step in range(30):
        assert np.array_equal(SampleCounter(s.mixture, 12, 5).counts_before(step), drawn) and np.array_equal(
            going_on.counts_before(step), drawn
        )
        drawn += np.bincount((next(s.iter_windows(step, 0, 12))[:, 0, 0] >= 1000).astype(int), minlength=2)
    per_batch = SampleCounter(Mixture(np.array([0.5, 0.5]), np.array([0.5, 0.5])), 12, 5)
    assert per_batch.counts_before(100).sum() == 1200 and (per_batch.counts_before(100) % 12 == 0).all()


def test_stream_gathers_ahead_and_hashes_add_up(tmp_path):
    s = source(tmp_path)
    whole = s.stream(3, RankSlice(0, 12, 4), torch.device("cpu"), hashed=True)
    halves = [
        s.__class__(s.datasets, s.mixture, 12, 5).stream(
            3, RankSlice(first, first + 6, 3), torch.device("cpu"), hashed=True
        )
        for first in (0, 6)
    ]
    seen = set()
    for step in range(3, 8):
        micro, digest, tokens, _ = next(whole)
        assert tokens == 12 * 8
        assert [len(batch.idx) for batch in micro] == [4, 4, 4]
        assert np.array_equal(
            torch.cat([batch.idx for batch in micro]).numpy(), next(s.iter_windows(step, 0, 12))[:, 0, :-1]
        )
        parts = [next(half) for half in halves]
        assert digest == sum(part[1] for part in parts) % 2**64
        seen.add(digest)
    assert len(seen) == 5
    rows = next(s.iter_windows(0, 0, 12))
    assert batches.row_hash(rows, 0) != batches.row_hash(rows[::-1], 0), "the order counts"
    for stream in (whole, *halves):
        stream.close()


def test_a_stream_is_the_same_from_wherever_it_starts(tmp_path):
    """Places are told for several steps at once, here four, which is not seen."""
    s = source(tmp_path, rows=1024)
    stream = s.stream(0, RankSlice(3, 7, 4), torch.device("cpu"), hashed=True)
    for step in range(10):
        (batch,), digest, *_ = next(stream)
        rows = next(s.iter_windows(step, 3, 7)).astype(np.int64)
        assert np.array_equal(batch.tokens, rows[:, 0])
        words = [
            hashlib.blake2b(row.tobytes(), digest_size=8, salt=(3 + i).to_bytes(8, "little")).digest()
            for i, row in enumerate(rows)
        ]
        assert digest == sum(int.from_bytes(word, "little") for word in words) % 2**64, (
            "of int64 ids, however narrow the bins"
        )
    stream.close()


def test_an_error_of_the_gathering_thread_is_raised_where_batches_are_taken(tmp_path):
    s = source(tmp_path)
    s.datasets[1].streams[0].files = []
    stream = s.stream(0, RankSlice(0, 12, 4), torch.device("cpu"), hashed=False)
    with pytest.raises(IndexError):
        for _ in range(10):
            next(stream)
