"""pass@k, majority vote and Wilson's interval against enumeration, their papers' forms and published tables."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoforge.posttraining.accuracy import majority_at_k, majority_vote, pass_at_k, wilson_interval


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_chens_product_and_takes_large_numbers():
    """numpy's form of it in the paper's figure 3."""
    for n, c, k in ((200, 3, 100), (1000, 999, 1), (5000, 40, 7)):
        assert pass_at_k(n, c, k) == pytest.approx(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)), abs=1e-12)
    for n, c, k in ((5, 6, 1), (5, 1, 6), (5, 1, 0)):
        with pytest.raises(AssertionError):
            pass_at_k(n, c, k)


@pytest.mark.parametrize("answers, winner", [
    (["72", "5", "72.0"], "72"), (["5", "$72", "72 miles", "5.5"], "$72"), (["1", "2", "2", "1"], "2"),
    (["1", "2"], "1"), ([None, None, "3"], "3"), ([None], None), ([], None),
    (["Paris", "London", "paris."], "Paris"), (["12 or 75", "75"], "12 or 75"), (["", "5", "5"], "5"),
])  # fmt: skip
def test_majority_vote(answers, winner):
    assert majority_vote(iter(answers)) == winner


def test_a_vote_counts_numbers_by_value_only_where_the_answer_is_one():
    answers = ["the answer is 66", "66.0", "Route 66"]
    assert majority_vote(answers[:2]) == answers[0] and majority_at_k(answers, "66", 3) == 1
    assert majority_vote(["Road 66", "Route 66", "Route 66."], is_number=False) == "Route 66"


def test_majority_at_k_is_the_mean_over_groups():
    answers = ["1", "1", "2", "2", "2", "1", "1", None, "1", "2"]
    assert majority_at_k(answers, "1.0", 3) == pytest.approx(2 / 3)  # 112, 221, 1-1; the last 2 is left out
    assert majority_at_k(answers, "1", 1) == 0.5
    assert majority_at_k(answers, "1", 10) == 1
    with pytest.raises(AssertionError):
        majority_at_k(answers, "1", 11)


@pytest.mark.slow
def test_majority_at_k_is_unbiased():
    """Over all the orders of draws from {1 twice as likely, 2, 3} the mean is the exact chance, enumerated by hand."""
    pool = ["1", "1", "2", "3"]
    threes = list(itertools.product(pool, repeat=3))
    exact = sum(max(three, key=three.count) == "1" for three in threes) / len(threes)
    sixes = list(itertools.product(pool, repeat=6))
    assert sum(majority_at_k(six, "1", 3) for six in sixes) / len(sixes) == pytest.approx(exact)


@settings(deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from([1.0, 1.96, 2.576]))
def test_wilsons_ends_are_z_standard_errors_away(n, proportion, z):
    """What defines them: the p for which |successes / n - p| = z sqrt(p (1 - p) / n)."""
    successes = round(proportion * n)
    observed = successes / n
    low, high = wilson_interval(successes, n, z)
    is_inside = 0 <= low <= observed <= high <= 1
    assert is_inside or any(math.isclose(end, observed, abs_tol=1e-12) for end in (low, high))
    for p in (low, high):
        assert (observed - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, abs=1e-12)


NEWCOMBE = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}


def test_wilsons_known_intervals():
    """Newcombe 1998, table I, method 3, to its four digits."""
    for (successes, n), interval in NEWCOMBE.items():
        assert wilson_interval(successes, n) == pytest.approx(interval, abs=5.1e-5)
    assert wilson_interval(0, 0) == (0, 1)
