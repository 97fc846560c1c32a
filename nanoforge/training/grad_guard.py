"""Which optimizer steps are skipped: those whose gradient is not finite, and, if asked, outliers of its norm.

Decided on the device and told to the optimizer as a tensor, so no step waits for the host; the counts are read when the loop logs.
"""

import torch
from torch import Tensor

WINDOW, ENOUGH = 128, 32  # norms that are remembered; that are needed before an outlier is told


class GradGuard:
    """Judges gradient norms. All ranks see the same norm, and so decide the same.

    sigma: a norm is an outlier above median + sigma x 1.4826 x median absolute deviation (as many standard deviations, were the
    norms normal; at least a hundredth of the median) of the last WINDOW finite ones; 0: none is.
    """

    def __init__(self, sigma: float, device: torch.device):
        self.sigma = sigma
        self.norms = torch.full((WINDOW,), torch.nan, device=device)
        self.seen, self.skipped, self.consecutive, self.max_consecutive = torch.zeros(
            4, dtype=torch.long, device=device
        )

    def should_skip(self, norm: Tensor) -> Tensor:
        """1.0 where the step of this norm, a scalar, must be skipped, else 0.0; counted."""
        norm = norm.to(self.norms.device)
        finite = norm.isfinite()
        skip = ~finite
        if self.sigma:
            median = self.norms.nanmedian()
            spread = (1.4826 * (self.norms - median).abs().nanmedian()).maximum(0.01 * median)
            skip = skip | ((self.seen >= ENOUGH) & (norm > median + self.sigma * spread))
            spot = self.seen.remainder(WINDOW).view(1)
            self.norms.index_copy_(0, spot, torch.where(finite, norm, self.norms[spot]))
            self.seen += finite
        self.skipped += skip
        self.consecutive.add_(1).mul_(skip)
        self.max_consecutive.copy_(self.max_consecutive.maximum(self.consecutive))
        return skip.float()

    def state_dict(self) -> dict:
        """For progress.json; the newest norm last."""
        seen = int(self.seen)
        return {
            "skipped": int(self.skipped),
            "norms": self.norms.roll(-(seen % WINDOW)).tolist()[-seen:] if seen else [],
        }

    def load_state_dict(self, state: dict) -> None:
        norms = state["norms"]
        self.norms.fill_(torch.nan)
        self.norms[: len(norms)] = torch.tensor(norms, device=self.norms.device)
        self.seen.fill_(len(norms))
        self.skipped.fill_(state["skipped"])
        self.consecutive.zero_()
        self.max_consecutive.zero_()
