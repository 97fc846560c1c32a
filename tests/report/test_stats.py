"""The report's statistics, against closed forms, R's output, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest

from nanoforge.report import stats

pytest.importorskip("scipy")

SLEEP_A = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]  # the data of Student 1908
SLEEP_B = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_welch_on_students_own_data():
    """Against the output of R's t.test."""
    test = stats.welch_t_test(SLEEP_A, SLEEP_B)
    assert test.p == pytest.approx(0.07939, abs=1e-5)
    assert (test.low, test.high) == pytest.approx((-0.2054832, 3.3654832), abs=1e-6)
    assert test.difference == pytest.approx(1.58)


@pytest.mark.parametrize("distance", [0.1, 1.0, 7.0])
def test_welch_has_the_closed_forms_of_students_t(distance):
    """Pairs of equal variance have 2 degrees of freedom; where one pair has no variance it is 1."""
    t_equal = distance / math.sqrt(0.25 + 0.25)
    t_one = distance / math.sqrt(0.25)
    equal = stats.welch_t_test([0.0, 1.0], [distance, distance + 1])
    assert equal.p == pytest.approx(1 - t_equal / math.sqrt(2 + t_equal**2), abs=1e-12)
    one = stats.welch_t_test([0.5, 0.5], [distance, distance + 1])
    assert one.p == pytest.approx(1 - 2 / math.pi * math.atan(t_one), abs=1e-12)


def test_welch_without_variance():
    assert stats.welch_t_test([1.0, 1.0], [1.0, 1.0]).p == 1
    assert stats.welch_t_test([1.0, 1.0], [2.0, 2.0]).p == 0


@pytest.mark.slow
def test_equals_are_seldom_called_different():
    draws = np.random.default_rng(0).normal(size=(800, 8))
    different = [stats.welch_t_test(row[:4], row[4:]).p < 0.05 for row in draws]
    assert 0.02 < np.mean(different) < 0.07
    different = [stats.permutation_test(row[:4], row[4:]) <= 0.1 for row in draws[:300]]
    assert np.mean(different) < 0.13


def test_permutations_are_counted():
    assert stats.permutation_test([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20)
    assert stats.permutation_test([2.511, 2.52, 2.53], [2.01, 2.02, 2.03]) == pytest.approx(2 / 20)
    assert stats.permutation_test([1, 2], [1, 2]) == 1
    assert stats.permutation_test(range(20), range(20)) is None


def test_permutations_are_those_of_an_enumeration():
    """Small integers, of which many differences tie; groups of different sizes."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.integers(0, 5, 3).tolist(), generator.integers(0, 5, 4).tolist()
        total, distances = sum(a + b), []
        for group in itertools.combinations(a + b, 3):
            distances.append(abs(4 * sum(group) - 3 * (total - sum(group))))  # 12 times that of the means, exact
        observed = abs(4 * sum(a) - 3 * sum(b))
        expected = np.mean([distance >= observed for distance in distances])
        assert stats.permutation_test(a, b) == pytest.approx(expected)


def test_p_values_are_corrected_for_their_number():
    assert stats.holm_correction([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
