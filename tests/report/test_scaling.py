"""The report's scaling laws, against known laws, tables and simulation."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from nanoforge.report import scaling

pytest.importorskip("scipy")

COMPUTE = 10.0 ** np.arange(15, 21)


def true_loss(x):
    """Of about Chinchilla's floor and compute exponent."""
    return 1.69 + 400 * x**-0.154


def test_a_known_power_law_is_found_again():
    law = scaling.fit(COMPUTE, true_loss(COMPUTE))
    assert (law.floor, law.exponent) == pytest.approx((1.69, 0.154), rel=1e-5)
    assert law.scale == pytest.approx(math.log(400), rel=1e-4)
    prediction = scaling.predict_next_size(law, COMPUTE)
    assert prediction.x == pytest.approx(1e21)
    assert prediction.loss == pytest.approx(true_loss(1e21), rel=1e-6)


def test_few_sizes_have_no_floor():
    x = COMPUTE[:4]
    losses = 400 * x**-0.154
    law = scaling.fit(x[:3], losses[:3])
    assert law.floor == 0
    assert law.exponent == pytest.approx(0.154)
    check = scaling.predict_largest(x, losses)
    assert check.n_sizes == 3
    assert (check.predicted.loss, check.reached) == pytest.approx((losses[3], losses[3]))
    assert scaling.predict_largest(x[:3], losses[:3]) is None


def test_a_floor_of_zero_is_found():
    assert scaling.fit(COMPUTE, 400 * COMPUTE**-0.154).floor == 0


def test_seeds_are_no_sizes() -> None:
    """Four sizes of two seeds: the law is the line through log L, against its closed form, and has no floor."""
    x = np.repeat(COMPUTE[:4], 2)
    losses = true_loss(x) * np.exp(np.random.default_rng(0).normal(0, 0.01, 8))
    law = scaling.fit(x, losses)
    slope, height = np.polyfit(np.log(x), np.log(losses), 1)
    assert (law.floor, law.floor_p) == (0, None)
    assert (law.exponent, law.scale) == (pytest.approx(-slope), pytest.approx(height))
    assert law.degrees_of_freedom == 6
    check = scaling.predict_largest(x, losses)
    slope, height = np.polyfit(np.log(x[:6]), np.log(losses[:6]), 1)
    assert check.predicted.loss == pytest.approx(math.exp(height + slope * math.log(x[-1])))
    assert check.predicted.low < check.predicted.loss < check.predicted.high
    assert check.reached == pytest.approx(losses[6:].mean())


@pytest.mark.slow
def test_a_floor_is_fitted_only_where_the_sizes_show_one() -> None:
    """Without a floor the test errs as often as its level says, also with seeds that agree better than the sizes do."""
    generator = np.random.default_rng(0)
    x = np.repeat(COMPUTE, 3)

    def floors(loss: Callable, n: int) -> list[float]:
        noise = lambda: np.repeat(generator.normal(0, 0.01, 6), 3) + generator.normal(0, 0.001, 18)  # noqa: E731
        return [scaling.fit(x, loss(x) * np.exp(noise())).floor for _ in range(n)]

    assert np.count_nonzero(floors(lambda x: 400 * x**-0.154, 25)) <= 3
    found = floors(true_loss, 8)
    assert np.count_nonzero(found) == 8
    assert np.median(found) == pytest.approx(1.69, abs=0.15)


def test_without_enough_sizes_there_is_no_law():
    assert scaling.fit(COMPUTE[:2], [3, 2]) is None
    assert scaling.fit([1, 1.2, 1.4], [3, 2, 1]) is None
    assert scaling.fit([1, 10, 100], [3, math.nan, 1]) is None
    assert scaling.fit([1, 10, 100], [3, 2, -1]) is None


def test_students_quantiles_are_those_of_the_tables():
    assert scaling.student_quantile(0.95, 4) == pytest.approx(2.776445, abs=1e-6)
    assert scaling.student_quantile(0.95, 1) == pytest.approx(math.tan(0.95 * math.pi / 2))


@pytest.mark.slow
def test_the_intervals_hold_as_often_as_they_say():
    x, generator = np.repeat(COMPUTE, 2), np.random.default_rng(0)
    n_exponents = n_losses = 0
    for _ in range(100):
        noise = np.exp(generator.normal(0, 0.003, len(x)))
        law = scaling.fit(x, true_loss(x) * noise)
        n_exponents += abs(law.exponent - 0.154) < law.exponent_margin()
        new_loss = true_loss(1e21) * math.exp(generator.normal(0, 0.003))
        n_losses += abs(math.log(new_loss / law.loss(1e21))) < law.margin(1e21)[0]
    assert 88 <= n_exponents <= 99
    assert 88 <= n_losses <= 99


def test_with_as_many_unknowns_as_points_there_is_no_interval():
    law = scaling.fit([1.0, 10.0, 100.0], [3.0, 2.5, 2.2], with_floor=True)
    assert law.floor > 0
    assert law.covariance is None
    assert law.margin(1000.0) is None
    assert law.exponent_margin() is None
    assert law.loss(10.0) == pytest.approx(2.5)
