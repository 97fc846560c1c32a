"""Scaling laws: a power law through the losses of models of several sizes.

    L(x) = E + A x^-alpha         x: parameters or FLOPs; E: the floor, the loss that no size gets below

Fitted by least squares in log L; a floor only where the sizes show one. Knows nothing of runs. Needs scipy, which is
imported where it is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

MIN_SIZES = 3  # fewer points lie on too many laws
MIN_SIZES_FOR_FLOOR = 5  # with fewer, a floor can't be distinguished from the exponent
FLOOR_GRID = np.linspace(0.05, 0.99, 40)  # starts of the fit, in units of the lowest loss
FLOOR_LEVEL = 0.05  # a floor is fitted where a test at this level rejects that there is none
ROUNDING = 1e-9  # errors of log L below it are those of floating point


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = floor + exp(height - exponent (log x - center)), and its uncertainty."""

    floor: float  # E; 0 where it was not fitted
    height: float  # log of the part above the floor, at the center
    exponent: float  # alpha
    center: float  # mean of log x
    covariance: np.ndarray | None = None  # of (height, exponent[, floor]); None with as many unknowns as points
    variance: float = 0.0  # of log L around the law
    degrees_of_freedom: int = 0  # points less unknowns
    floor_p: float | None = None  # of the test that there is no floor; None for too few sizes

    @property
    def scale(self) -> float:
        """log A"""
        return self.height + self.exponent * self.center

    def loss(self, x: np.ndarray | float) -> np.ndarray:
        return self.floor + np.exp(self.height - self.exponent * (np.log(x) - self.center))

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """Derivatives of log L at each x by height, exponent and floor: (points, 3)."""
        loss = self.loss(x)
        above_floor = (loss - self.floor) / loss
        return np.stack((above_floor, -above_floor * (np.log(x) - self.center), 1 / loss), axis=1)

    def residuals(self, x: np.ndarray, losses: np.ndarray) -> np.ndarray:
        return np.log(self.loss(x)) - np.log(losses)

    def squared_error(self, x: np.ndarray, losses: np.ndarray) -> float:
        return float(np.square(self.residuals(x, losses)).sum())

    def margin(self, x: np.ndarray | float, confidence: float = 0.95) -> np.ndarray | None:
        """A new run at x lies between loss(x) / exp(margin) and loss(x) * exp(margin) with this confidence.

        Delta method in log L; None without a covariance.
        """
        if self.covariance is None:
            return None
        gradient = self.gradient(np.atleast_1d(x))[:, : len(self.covariance)]
        variance = np.einsum("pi,ij,pj->p", gradient, self.covariance, gradient) + self.variance
        return student_quantile(confidence, self.degrees_of_freedom) * np.sqrt(variance)

    def exponent_margin(self, confidence: float = 0.95) -> float | None:
        """Half the width of the exponent's confidence interval; None without a covariance."""
        if self.covariance is None:
            return None
        return float(student_quantile(confidence, self.degrees_of_freedom) * np.sqrt(self.covariance[1, 1]))


def student_quantile(confidence: float, degrees_of_freedom: int) -> float:
    """The t that Student's distribution stays within, on both sides, with this probability."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, (1 + confidence) / 2))


# ---------------------------------------------------------------------------------------------------------------------
# the fit


def fit(x: Sequence[float], losses: Sequence[float], *, with_floor: bool | None = None) -> PowerLaw | None:
    """The power law with the least squared error of log L; equal x are seeds of a size.

    Three unknowns with a floor (Hoffmann et al. 2022, approach 3, with squares for their Huber loss), two without (E =
    0, as Kaplan et al. 2020). with_floor None: a floor where the sizes can show one. None for values that are not
    positive, fewer than three sizes, or sizes within a factor of 2.
    """
    sizes, values = np.array(x, dtype=float), np.array(losses, dtype=float)
    n_sizes = len(np.unique(sizes))
    valid = np.isfinite(sizes) & np.isfinite(values) & (sizes > 0) & (values > 0)
    if not valid.all() or n_sizes < MIN_SIZES or sizes.max() < 2 * sizes.min():
        return None
    floor_p = floor_p_value(sizes, values) if n_sizes >= MIN_SIZES_FOR_FLOOR else None
    if with_floor is None:
        with_floor = floor_p is not None and floor_p < FLOOR_LEVEL
    law = fit_floor(sizes, values) if with_floor else fit_given_floor(sizes, values, 0.0)
    return with_uncertainty(replace(law, floor_p=floor_p), sizes, values)


def floor_p_value(x: np.ndarray, losses: np.ndarray) -> float:
    """The p value of an F test of the law without a floor against the law with one.

    On the mean log L of each size: seeds say how far runs of a size differ, not how well a law fits the sizes.
    """
    from scipy.special import fdtrc

    sizes = np.unique(x)
    means = np.array([np.exp(np.log(losses[x == size]).mean()) for size in sizes])
    error = fit_given_floor(sizes, means, 0.0).squared_error(sizes, means)
    floored_error = fit_floor(sizes, means).squared_error(sizes, means)
    if error <= len(sizes) * ROUNDING**2 or floored_error >= error:
        return 1.0
    degrees_of_freedom = len(sizes) - 3
    variance = max(floored_error / degrees_of_freedom, ROUNDING**2)
    return float(fdtrc(1, degrees_of_freedom, (error - floored_error) / variance))


def fit_given_floor(x: np.ndarray, losses: np.ndarray, floor: float) -> PowerLaw:
    """The law with this floor: a line through log(L - E) against log x. Exact for floor 0, else a start for the fit."""
    center = float(np.log(x).mean())
    weights = (losses - floor) / losses  # log(L - E) errs by 1 / weights as much as log L
    slope, height = np.polyfit(np.log(x) - center, np.log(losses - floor), 1, w=weights)
    return PowerLaw(floor=float(floor), height=float(height), exponent=float(-slope), center=center)


def fit_floor(x: np.ndarray, losses: np.ndarray) -> PowerLaw:
    """The law with any floor between 0 and the lowest loss: the best of a grid of floors, refined."""
    from scipy.optimize import least_squares

    start = min(
        (fit_given_floor(x, losses, floor) for floor in losses.min() * FLOOR_GRID),
        key=lambda law: law.squared_error(x, losses),
    )

    def law_at(unknowns: np.ndarray) -> PowerLaw:
        height, exponent, floor = map(float, unknowns)
        return replace(start, height=height, exponent=exponent, floor=floor)

    result = least_squares(
        lambda unknowns: law_at(unknowns).residuals(x, losses),
        (start.height, start.exponent, start.floor),
        jac=lambda unknowns: law_at(unknowns).gradient(x),
        bounds=([-np.inf, -np.inf, 0.0], [np.inf, np.inf, losses.min()]),
        x_scale="jac",
        ftol=1e-12,
        xtol=1e-12,
        gtol=1e-12,
    )
    return law_at(result.x)


def with_uncertainty(law: PowerLaw, x: np.ndarray, losses: np.ndarray) -> PowerLaw:
    """The law with its covariance, where there are more points than unknowns."""
    n_unknowns = 3 if law.floor > 0 else 2
    degrees_of_freedom = len(x) - n_unknowns
    if degrees_of_freedom < 1:
        return law
    jacobian = law.gradient(x)[:, :n_unknowns]
    variance = law.squared_error(x, losses) / degrees_of_freedom
    covariance = variance * np.linalg.pinv(jacobian.T @ jacobian)
    return replace(law, covariance=covariance, variance=variance, degrees_of_freedom=degrees_of_freedom)


# ---------------------------------------------------------------------------------------------------------------------
# predictions


class Prediction(NamedTuple):
    """The loss of a size that was not trained."""

    x: float
    loss: float
    low: float | None  # the 95 % interval of a new run
    high: float | None


def predict(law: PowerLaw, x: float) -> Prediction:
    """The loss at x."""
    loss = float(law.loss(x))
    margin = law.margin(x)
    if margin is None:
        return Prediction(x, loss, None, None)
    factor = float(np.exp(margin[0]))
    return Prediction(x, loss, loss / factor, loss * factor)


def predict_next_size(law: PowerLaw, x: Sequence[float]) -> Prediction:
    """The loss at the largest x times the (geometric) mean ratio of the sizes."""
    sizes = sorted(set(x))
    mean_ratio = (sizes[-1] / sizes[0]) ** (1 / (len(sizes) - 1))
    return predict(law, sizes[-1] * mean_ratio)


class Check(NamedTuple):
    """The largest size as a law fitted to the smaller ones predicts it."""

    law: PowerLaw
    n_sizes: int  # that it was fitted to
    predicted: Prediction
    reached: float  # the mean loss


def predict_largest(x: Sequence[float], losses: Sequence[float]) -> Check | None:
    """A test of the law. None with fewer than four sizes."""
    largest = max(x)
    if len(set(x)) < MIN_SIZES + 1:
        return None
    smaller = [i for i in range(len(x)) if x[i] < largest]
    law = fit([x[i] for i in smaller], [losses[i] for i in smaller])
    if law is None:
        return None
    reached = [losses[i] for i in range(len(x)) if x[i] == largest]
    return Check(law, len(set(x)) - 1, predicted=predict(law, largest), reached=float(np.mean(reached)))
