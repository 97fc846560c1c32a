"""Which optimizer steps are skipped: those whose gradient is not finite and, if asked, outliers of its norm.

Decided on the device and passed to the optimizer as a tensor, so no step waits for the host. The counts are read when
the loop logs.
"""

import math
from typing import Any

import torch
from torch import Tensor

WINDOW = 128  # gradient norms that are remembered
MIN_NORMS = 32  # that are needed before one is called an outlier
STD_PER_MAD = 1.4826  # of a normal distribution: standard deviation over median absolute deviation


class GradGuard:
    """Decides by its gradient norm whether a step is skipped. All ranks see the same norm, so they decide alike.

    sigma: a norm is an outlier above median + sigma x 1.4826 x median absolute deviation of the last 128 finite norms:
    sigma standard deviations, robustly estimated, and taken to be at least a hundredth of the median. 0: no outliers.
    """

    def __init__(self, sigma: float, device: torch.device) -> None:
        self.sigma = sigma
        self.norms = torch.full((WINDOW,), torch.nan, device=device)  # a ring; nan where there is none yet
        self.n_norms = torch.zeros((), dtype=torch.long, device=device)
        self.skipped, self.consecutive, self.max_consecutive = torch.zeros(3, device=device)

    def should_skip(self, norm: Tensor) -> Tensor:
        """1.0 where the step of this gradient norm, a scalar, is to be skipped, else 0.0; counts it."""
        norm = norm.to(self.norms.device)
        finite = norm < math.inf
        skip = ~finite
        if self.sigma:
            skip = skip | self.is_outlier(norm)
            self.remember(norm, finite)
        skip = skip.float()
        self.skipped += skip
        torch.addcmul(skip, self.consecutive, skip, out=self.consecutive)  # (consecutive + 1) x skip
        torch.maximum(self.max_consecutive, self.consecutive, out=self.max_consecutive)
        return skip

    def is_outlier(self, norm: Tensor) -> Tensor:
        median = self.median(self.norms)
        deviation = self.median((self.norms - median).abs())
        std = (STD_PER_MAD * deviation).maximum(0.01 * median)
        return (self.n_norms >= MIN_NORMS) & (norm > median + self.sigma * std)

    def median(self, values: Tensor) -> Tensor:
        """Of the ring's values but nan, which are sorted last: the lower of two. torch.nanmedian waits for a GPU."""
        middle = (self.n_norms.clamp(1, WINDOW) - 1).div(2, rounding_mode="floor")
        return values.sort().values.gather(0, middle.view(1)).squeeze(0)

    def remember(self, norm: Tensor, finite: Tensor) -> None:
        """Put a finite norm in the place of the oldest."""
        oldest = self.n_norms.remainder(WINDOW).view(1)
        self.norms.index_copy_(0, oldest, torch.where(finite, norm, self.norms[oldest]))
        self.n_norms += finite

    def state_dict(self) -> dict[str, Any]:
        """For progress.json; the newest norm last."""
        n_norms = int(self.n_norms)
        norms = self.norms.roll(-(n_norms % WINDOW)).tolist()[-n_norms:] if n_norms else []
        return {"skipped": int(self.skipped), "norms": norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        norms = state["norms"]
        self.norms.fill_(torch.nan)
        self.norms[: len(norms)] = torch.tensor(norms, device=self.norms.device)
        self.n_norms.fill_(len(norms))
        self.skipped.fill_(state["skipped"])
        self.consecutive.zero_()
        self.max_consecutive.zero_()
