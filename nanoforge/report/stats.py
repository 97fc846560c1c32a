"""Is the difference between two groups of runs larger than chance?

Welch's t test, the exact permutation test, Holm's correction.

Needs scipy, which is imported where it is used: a report without it has no tests.
"""

import importlib.util
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_PERMUTATIONS = 100_000


def has_scipy() -> bool:
    return importlib.util.find_spec("scipy") is not None


class Comparison(NamedTuple):
    """Of the means of two groups: b's minus a's, its 95 % confidence interval, and the two-sided p value."""

    difference: float
    low: float
    high: float
    p: float


def welch_t_test(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Welch's t test (1947) of two groups of at least two values each, whose variances may differ; two-sided."""
    from scipy.stats import ttest_ind

    difference = float(np.mean(b) - np.mean(a))
    if np.ptp(a) == np.ptp(b) == 0:  # no variance, no t
        return Comparison(difference, difference, difference, p=float(difference == 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where one of the groups has no variance
        test = ttest_ind(b, a, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Comparison(difference, float(low), float(high), float(test.pvalue))


def mean_distance(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """How far apart the means are; rounded, so that equal distances tie in spite of floating point."""
    return np.round(np.abs(np.mean(a, axis=axis) - np.mean(b, axis=axis)), 12)


def permutation_test(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The exact p value of a permutation test (Fisher 1935) of the difference of means, two-sided.

    It assumes no distribution and is never below 2 in the number of permutations. None above MAX_PERMUTATIONS of them.
    """
    if math.comb(len(a) + len(b), len(a)) > MAX_PERMUTATIONS:
        return None
    from scipy import stats

    test = stats.permutation_test(
        (a, b), mean_distance, vectorized=True, n_resamples=MAX_PERMUTATIONS, alternative="greater"
    )
    return float(test.pvalue)


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number, so that the chance of any false claim is that of one (Holm 1979)."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    ascending = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(ascending):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
