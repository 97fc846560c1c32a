"""The report's scaling laws, against known laws, tables and simulation."""

import math

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
    assert scaling.predict_largest(x, losses) == pytest.approx((losses[3], losses[3]))
    assert scaling.predict_largest(x[:3], losses[:3]) is None


def test_a_floor_of_zero_is_found():
    assert scaling.fit(COMPUTE, 400 * COMPUTE**-0.154).floor == 0


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
