"""Counter-based random numbers: a draw is a hash of (seed, stream, counters), so no state is saved. Imports no torch.

    hash_u64(seed, WINDOW, dataset, sequence)      uint64
    uniform(seed, ROLLOUT, completion, token)      float64 in [0, 1)
    permute(index, n, seed, ORDER, epoch)          a bijection of [0, n)

Arguments are integers or integer arrays that broadcast; the first one is the seed, the second the stream.
"""

import numpy as np

# Streams: one for each kind of draw. The numbers are part of what a seed means: new streams go to the end.
DATASET = 0  # which dataset of a mixture
WINDOW = 1  # where a random window starts
ORDER = 2  # the order of an epoch
OFFSET = 3  # the offset of an epoch's grid of windows
EVALUATION = 4  # the windows of evaluations
DROPOUT = 5
ROLLOUT = 6  # the tokens of sampled completions
SAMPLE = 7  # the tokens that sample.py draws


def splitmix64(state: np.ndarray, value: int | np.ndarray) -> np.ndarray:
    """One step of SplitMix64 (Steele et al. 2014) from a uint64 state, with an integer value mixed in; uint64."""
    with np.errstate(over="ignore"):
        z = (state ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash_u64(*values: int | np.ndarray) -> np.ndarray:
    """A uint64 hash of the values, the seed first: one step of SplitMix64 for each in turn."""
    state = np.zeros((), dtype=np.uint64)
    for value in values:
        state = splitmix64(state, value)
    return state


def uniform(*values: int | np.ndarray) -> np.ndarray:
    """Floats in [0, 1): the upper 53 bits of `hash_u64`."""
    return (hash_u64(*values) >> np.uint64(11)) * 2.0**-53


def permute(index: np.ndarray, n: int, *key: int | np.ndarray) -> np.ndarray:
    """Where a random permutation of [0, n) takes `index`; int64. Each key has its own, and none is stored.

    A Feistel network of 6 rounds permutes the smallest [0, 4^b) that holds [0, n). An output of n or more is fed back
    until it is below n, which keeps the map a bijection (cycle walking: Black and Rogaway 2002).
    """
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    low_mask = np.uint64(2**half_bits - 1)
    out = np.asarray(index, dtype=np.uint64).copy()
    round_keys = [np.broadcast_to(hash_u64(round_, *key), out.shape) for round_ in range(6)]
    walking = np.ones(out.shape, dtype=bool)
    while walking.any():
        left = out[walking] >> np.uint64(half_bits)
        right = out[walking] & low_mask
        for round_key in round_keys:
            left, right = right, left ^ (splitmix64(round_key[walking], right) & low_mask)
        out[walking] = left << np.uint64(half_bits) | right
        walking = out >= n
    return out.astype(np.int64)
