"""Size, compute and loss: a model's parameters and FLOPs from its shape alone, and the power law through the losses of several sizes.

Knows no torch; the counts are those of model.py's GPT, which a test compares.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nanoforge.report.stats import student_quantile

# ---------------------------------------------------------------------------------------------------------------------
# counts, from a run's `_model`


def matrices(shape: Mapping[str, Any]) -> int:
    """Weights in a token's matrix products, the head included: those of two dimensions but the embeddings."""
    C = shape["n_embd"]
    hidden, kv = round(shape["mlp_ratio"] * C), (shape["n_kv_head"] or shape["n_head"]) * (C // shape["n_head"])
    layer = C * (C + 2 * kv) + C * C + (3 if shape["mlp"] == "gated" else 2) * C * hidden
    return shape["n_layer"] * layer + sum(shape["vocab_sizes"]) * C


def parameters(shape: Mapping[str, Any]) -> int:
    """All parameters, tied ones once. Raises KeyError or TypeError where the shape lacks something."""
    C, L = shape["n_embd"], shape["n_layer"]
    hidden, kv = round(shape["mlp_ratio"] * C), (shape["n_kv_head"] or shape["n_head"]) * (C // shape["n_head"])
    gains = {"layernorm": 1 + shape["bias"], "rmsnorm": 1, "rmsnorm_nogain": 0}[shape["norm"]] * C * (2 * L + 1)
    biases = shape["bias"] * L * (C + 2 * kv + C + C + hidden * (2 if shape["mlp"] == "gated" else 1))
    scalars = 2 * L * shape.get("residual_scalars", False) + (L - 1) * shape.get("value_residual", False)
    embeddings = sum(shape["vocab_sizes"]) * C * (not shape["tie_weights"]) + shape["block_size"] * C * (
        shape["position"] == "learned"
    )
    return matrices(shape) + embeddings + gains + biases + scalars


def flops_per_token(shape: Mapping[str, Any]) -> float:
    """Forward and backward FLOPs of a training token: 6 a weight in a product, 12 T C a layer for attention (PaLM, Chowdhery et al. 2022,
    appendix B), short windows counted as such. Raises KeyError or TypeError where the shape lacks something."""
    T, window = shape["block_size"], shape.get("window", "L")
    short = min(T, shape.get("window_size", 0) or max(1, T // 2))
    spans = sum(short if window[layer % len(window)] == "S" else T for layer in range(shape["n_layer"]))
    return 6.0 * matrices(shape) + 12.0 * spans * shape["n_embd"]


# ---------------------------------------------------------------------------------------------------------------------
# the law


class PowerLaw(NamedTuple):
    """L(x) = floor + exp(height - exponent (log x - center)), and how sure of it the points are."""

    floor: float  # E: what no size gets below; 0 where it wasn't fitted
    height: float  # log of the part above the floor, at the center
    exponent: float
    center: float  # mean of log x
    covariance: np.ndarray | None  # of (height, exponent[, floor]); None where there are as many unknowns as points
    variance: float  # of log L around the law
    freedom: int  # points less unknowns

    def loss(self, x):
        """The law at x, a number or an array."""
        return self.floor + np.exp(self.height - self.exponent * (np.log(x) - self.center))

    def margin(self, x: float, confidence: float = 0.95) -> float | None:
        """A new run at x is within loss(x) times or over exp(margin) with this confidence (delta method in log L); None where that can't be told."""
        if self.covariance is None:
            return None
        slope = slopes(np.array([x]), self)[0, : len(self.covariance)]
        return float(
            student_quantile(confidence, self.freedom) * math.sqrt(slope @ self.covariance @ slope + self.variance)
        )

    def exponent_margin(self, confidence: float = 0.95) -> float | None:
        """Half the exponent's confidence interval."""
        return (
            None
            if self.covariance is None
            else float(student_quantile(confidence, self.freedom) * math.sqrt(self.covariance[1, 1]))
        )


def slopes(x: np.ndarray, law: PowerLaw) -> np.ndarray:
    """Derivatives of log L at each x by height, exponent and floor: (points, 3)."""
    loss = law.loss(x)
    above = (loss - law.floor) / loss
    return np.stack((above, -above * (np.log(x) - law.center), 1 / loss), axis=1)


def squares_of(x: np.ndarray, y: np.ndarray, law: PowerLaw) -> float:
    """Sum of squares of log L around the law."""
    return float(np.square(np.log(y) - np.log(law.loss(x))).sum())


def refined(x: np.ndarray, y: np.ndarray, law: PowerLaw, free: int) -> tuple[float, PowerLaw]:
    """(sum of squares, law) where Levenberg's and Marquardt's steps in the first `free` of its unknowns end; x and losses y: (points,)."""
    damping, least = 1e-3, squares_of(x, y, law)
    for _ in range(300):
        jacobian = slopes(x, law)[:, :free]
        normal = jacobian.T @ jacobian
        step = np.linalg.lstsq(
            normal + damping * np.diag(np.diag(normal)), jacobian.T @ (np.log(y) - np.log(law.loss(x))), rcond=None
        )[0]
        height, exponent, floor = np.array([law.height, law.exponent, law.floor]) + np.pad(step, (0, 3 - free))
        tried = law._replace(height=float(height), exponent=float(exponent), floor=float(floor))
        now = squares_of(x, y, tried) if 0 <= floor < y.min() and abs(exponent) < 50 and abs(height) < 500 else math.inf
        if now < least:
            law, gain, least, damping = tried, least - now, now, damping / 10
            if gain <= 1e-12 * least:
                break
        else:
            damping *= 10
            if damping > 1e12:
                break
    return least, law


def fit(x: Sequence[float], losses: Sequence[float], with_floor: bool | None = None) -> PowerLaw | None:
    """The power law with the least squares of log L.

    x: parameters or FLOPs; losses above 0. With five or more different x the floor E is fitted too (Hoffmann et al. 2022, approach 3,
    with squares for their Huber loss), the best starts of a grid of floors being refined; with fewer it can't be told apart from the
    exponent, and the law is Kaplan's (2020), E = 0. Repeated x are seeds. None with fewer than three x, or x that lie within a factor of 2.
    """
    x, y = np.array(x, dtype=float), np.array(losses, dtype=float)
    sizes = len(np.unique(x))
    if (
        sizes < 3
        or not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all())
        or x.max() < 2 * x.min()
    ):
        return None
    center = float(np.log(x).mean())
    floored = sizes >= 5 if with_floor is None else with_floor
    starts = []
    for floor in [0.0, *(y.min() * np.linspace(0.05, 0.99, 40) if floored else ())]:
        weight = (y - floor) / y  # log(y - floor) errs so much more than log y
        slope, height = np.polyfit(np.log(x) - center, np.log(y - floor), 1, w=weight)
        starts.append(PowerLaw(float(floor), float(height), float(-slope), center, None, 0.0, 0))
    least = sorted(starts[1:], key=lambda law: squares_of(x, y, law))[:3]
    squares, law = min(
        (refined(x, y, law, 3 if law.floor else 2) for law in (starts[0], *least)), key=lambda found: found[0]
    )
    free = 3 if floored and law.floor > 0 else 2  # a floor that ends at 0 is not an unknown
    freedom = len(x) - free
    if freedom < 1:
        return law
    jacobian, variance = slopes(x, law)[:, :free], squares / freedom
    return law._replace(covariance=variance * np.linalg.pinv(jacobian.T @ jacobian), variance=variance, freedom=freedom)


class NextSize(NamedTuple):
    """What the law says of the size after the largest."""

    x: float
    loss: float
    low: float | None  # of the 95 % interval of a new run
    high: float | None


def next_size(law: PowerLaw, x: Sequence[float]) -> NextSize:
    """The loss at the largest x times the (geometric) mean ratio of the sizes given."""
    sizes = sorted(set(x))
    following = sizes[-1] * (sizes[-1] / sizes[0]) ** (1 / (len(sizes) - 1))
    loss, margin = float(law.loss(following)), law.margin(following)
    return NextSize(
        following, loss, *((None, None) if margin is None else (loss * math.exp(-margin), loss * math.exp(margin)))
    )


def check_largest(x: Sequence[float], losses: Sequence[float]) -> tuple[float, float] | None:
    """(what the smaller sizes alone foretell of the largest, what it reached): the test of such a prediction. None with fewer than four sizes."""
    largest = max(x)
    smaller = [(size, loss) for size, loss in zip(x, losses, strict=True) if size < largest]
    law = fit(*zip(*smaller, strict=True)) if len({size for size, _ in smaller}) >= 3 else None
    reached = [loss for size, loss in zip(x, losses, strict=True) if size == largest]
    return (float(law.loss(largest)), float(np.mean(reached))) if law else None
