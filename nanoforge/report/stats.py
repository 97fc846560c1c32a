"""Is a difference between two groups of runs more than the luck of their seeds? Welch's t test, the exact permutation test, Holm's correction.

OnlyWith no scipy: Student's t is an incomplete beta function (Abramowitz and Stegun 26.5.27, 26.7.1), computed by its continued fraction.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), 0 <= x <= 1; Lentz's continued fraction (Numerical Recipes, 6.4)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges fast
        return 1 - incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d, product = 1.0, 0.0, 1.0
    for i in range(1000):
        m = i // 2
        term = (
            1.0
            if i == 0
            else m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
            if i % 2 == 0
            else -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        )
        d = 1 / (1 + term * d or 1e-300)
        c = 1 + term / c or 1e-300
        product *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * (product - 1)


def student_p(t: float, freedom: float) -> float:
    """The chance that Student's t of so many degrees of freedom is at least as far from 0 as `t`, on either side."""
    return incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def student_quantile(confidence: float, freedom: float) -> float:
    """The t that Student's stays within, on both sides, with this chance."""
    low, high = 0.0, 1.0
    while student_p(high, freedom) > 1 - confidence:
        low, high = high, high * 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, freedom) > 1 - confidence else (low, middle)
    return (low + high) / 2


class Comparison(NamedTuple):
    """Of the means of two groups: b's minus a's, its 95 % interval, and how likely chance alone makes one at least so large."""

    difference: float
    low: float
    high: float
    p: float


def welch(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Welch's t test of two groups of at least two values each, whose spreads may differ (Welch 1947), two-sided."""
    variances = [statistics.variance(group) / len(group) for group in (a, b)]
    difference, error = statistics.fmean(b) - statistics.fmean(a), math.sqrt(sum(variances))
    if error == 0:
        return Comparison(difference, difference, difference, float(difference == 0))
    freedom = error**4 / sum(v * v / (len(group) - 1) for v, group in zip(variances, (a, b), strict=True))
    margin = student_quantile(0.95, freedom) * error
    return Comparison(difference, difference - margin, difference + margin, student_p(difference / error, freedom))


def permutation_p(a: Sequence[float], b: Sequence[float], most: int = 100_000) -> float | None:
    """Of all ways to deal the values into two groups of these sizes, the part whose means differ at least as much (Fisher 1935): exact, it
    assumes no distribution, and is never below 2 in the number of ways. None where there are more ways than `most`."""
    pool, ways = [*a, *b], math.comb(len(a) + len(b), len(a))
    if ways > most:
        return None
    whole, observed, count = math.fsum(pool), abs(statistics.fmean(b) - statistics.fmean(a)), 0
    for dealt in itertools.combinations(pool, len(a)):
        part = math.fsum(dealt)
        count += abs((whole - part) / len(b) - part / len(a)) >= observed - 1e-12 * (1 + observed)
    return count / ways


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number, so that all claims together are wrong as rarely as one alone would be (Holm 1979)."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected
