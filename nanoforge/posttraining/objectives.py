"""Objectives: a batch and a model to a loss, and what is told of it. The losses are pure functions of log-probabilities.

logp is the log-probability of a completion: the sum over its learned tokens, the end token included. A log-ratio is logp of the policy less
that of the reference. An objective is called with a micro-batch; its losses, summed over a rank's micro-batches and averaged over the
ranks, are the step's loss, however the step is cut. What it tells is by name a tensor (2, ...): a sum, and what to divide it by.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoforge.data.batches import Batch, Metrics
from nanoforge.distributed import Ranks

# ---------------------------------------------------------------------------------------------------------------------
# preferences: a, d are the log-ratios of chosen and rejected completions, (B,); beta is the strength of the tie to the reference


def sigmoid(a: Tensor, d: Tensor, beta: float, smoothing: float) -> Tensor:
    """DPO (Rafailov et al. 2023, equation 7); smoothed: cDPO (Mitchell 2023)."""
    return -(1 - smoothing) * F.logsigmoid(beta * (a - d)) - smoothing * F.logsigmoid(-beta * (a - d))


def robust(a: Tensor, d: Tensor, beta: float, smoothing: float) -> Tensor:
    """rDPO (Chowdhury et al. 2024): unbiased where a part `smoothing` of the labels is flipped."""
    return (-(1 - smoothing) * F.logsigmoid(beta * (a - d)) + smoothing * F.logsigmoid(-beta * (a - d))) / (
        1 - 2 * smoothing
    )


def hinge(a: Tensor, d: Tensor, beta: float, smoothing: float) -> Tensor:
    """SLiC (Zhao et al. 2023) on log-ratios."""
    return F.relu(1 - beta * (a - d))


def ipo(a: Tensor, d: Tensor, beta: float, smoothing: float) -> Tensor:
    """IPO (Azar et al. 2023, equation 17); a, d are per token."""
    return (a - d - 1 / (2 * beta)).square()


def apo_zero(a: Tensor, d: Tensor, beta: float, smoothing: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024): up with the chosen, down with the rejected."""
    return 1 - torch.sigmoid(beta * a) + torch.sigmoid(beta * d)


# Of each loss: its function, whether the log-ratios are per token, whether it knows smoothing.
DPO_LOSSES: dict[str, tuple[Callable[[Tensor, Tensor, float, float], Tensor], bool, bool]] = {
    "sigmoid": (sigmoid, False, True),
    "hinge": (hinge, False, False),
    "ipo": (ipo, True, False),
    "robust": (robust, False, True),
    "sigmoid_norm": (sigmoid, True, True),
    "apo_zero": (apo_zero, False, False),
}


def kto_loss(
    r: Tensor, z: Tensor, desirable: Tensor, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """KTO (Ethayarajh et al. 2024, equation 8): of each row, from its log-ratio r (B,), whether it is desirable (B,), and the reference point z."""
    return torch.where(
        desirable,
        desirable_weight * (1 - torch.sigmoid(beta * (r - z))),
        undesirable_weight * (1 - torch.sigmoid(beta * (z - r))),
    )


# ---------------------------------------------------------------------------------------------------------------------
# reinforcement


def advantages(rewards: Tensor, group: int, scale: str, spread_of_all: Tensor | None = None) -> Tensor:
    """GRPO (Shao et al. 2024): rewards (N,), `group` completions of a prompt after each other, less their group's mean; divided by the group's
    standard deviation, by that of all, or (`none`; Liu et al. 2025) not."""
    groups = rewards.view(-1, group)
    centred = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        centred = centred / ((rewards.std() if spread_of_all is None else spread_of_all) + 1e-4)
    return centred.flatten()


def ppo_clip_loss(
    logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float, level: str
) -> tuple[Tensor, Tensor]:
    """(-min(w A, clip(w) A), w) of each token: logp, old and mask are (B, T), advantage (B,). w is the ratio of a token's probabilities, or with
    level "sequence" (GSPO, Zheng et al. 2025) that of the whole completion's, its geometric mean over tokens."""
    ratio = (logp - old) * mask
    if level == "sequence":
        ratio = (ratio.sum(1) / mask.sum(1).clamp(min=1))[:, None]
    w, A = ratio.exp(), advantage[:, None]
    return (-torch.minimum(w * A, w.clamp(1 - low, 1 + high) * A)).expand_as(logp), w.expand_as(logp)


def divergence(logp: Tensor, reference: Tensor) -> Tensor:
    """KL of the policy to the reference, of each token: unbiased and never negative (Schulman 2020, k3)."""
    return (reference - logp).exp() - (reference - logp) - 1


# Sums of the token losses (B, T) over a mask (B, T) to (sum, divided by): `longest` is the largest completion there may be.
AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    "grpo": lambda losses, mask, longest: (
        ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).sum(),
        mask.new_tensor(len(mask)),
    ),
    "bnpo": lambda losses, mask, longest: ((losses * mask).sum(), mask.sum()),
    "dr_grpo": lambda losses, mask, longest: ((losses * mask).sum(), mask.new_tensor(len(mask) * longest)),
    "dapo": lambda losses, mask, longest: ((losses * mask).sum(), mask.sum()),
}

# ---------------------------------------------------------------------------------------------------------------------
# what objectives share


def logps(net: nn.Module, tokens: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the learned targets, (B, T), 0 elsewhere; float32."""
    targets = tokens[:, 1:] * mask  # elsewhere there may be ids that no head has
    return -net(tokens[:, :-1], targets, temperature=temperature) * mask


def mean_of(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The sum of values, those of the mask if one is given, and their number: (2,)."""
    values = values.detach().float()
    return (
        torch.stack((values.sum(), values.new_tensor(values.numel())))
        if mask is None
        else torch.stack(((values * mask).sum(), mask.sum().float()))
    )


@torch.no_grad()
def statistics(net: nn.Module, batch: Batch, temperature: float = 1.0) -> Metrics:
    """Entropy of the model at the learned targets, and how often its likeliest token is the target. A pass of its own: telling changes nothing that is learned."""
    logits = net(batch.idx, **where(batch)).float() / temperature
    log_p, mask = logits.log_softmax(-1), batch.extras["loss_mask"]
    return {
        "entropy": mean_of(-(log_p.exp() * log_p).sum(-1), mask),
        "mean_token_accuracy": mean_of(logits.argmax(-1) == batch.targets, mask),
    }


def where(batch: Batch) -> dict[str, Tensor]:
    """The positions of packed examples, if they are."""
    return {"position_ids": batch.extras["position_ids"]} if "position_ids" in batch.extras else {}


class Objective(Protocol):
    def prepare(self, net: nn.Module, batches: list[Batch]) -> list[Batch]:
        """A rank's micro-batches of a step with what needs no gradient: log-probabilities of the reference, and what is to be known of all of them."""

    def __call__(self, net: nn.Module, batch: Batch, detailed: bool) -> tuple[Tensor, Metrics]:
        """(loss, what is told if detailed)."""


class Plain:
    """Without a reference."""

    def prepare(self, net: nn.Module, batches: list[Batch]) -> list[Batch]:
        return batches


class LanguageModel(Plain):
    """The mean cross-entropy of all targets. Of several contexts it tells each one's."""

    def __call__(self, net: nn.Module, batch: Batch, detailed: bool) -> tuple[Tensor, Metrics]:
        losses = net(batch.idx, batch.targets)  # (B, T) or (B, K, T)
        loss = losses.mean() / batch.n_micro_batches
        if not detailed:
            return loss, {}
        by_context = losses.detach().view(len(losses), -1, losses.size(-1)).sum((0, 2))
        return loss, {"loss": torch.stack((by_context, torch.full_like(by_context, losses.numel() / len(by_context))))}


class SFT(Plain):
    """The mean cross-entropy of the learned targets of the whole step."""

    def __call__(self, net: nn.Module, batch: Batch, detailed: bool) -> tuple[Tensor, Metrics]:
        mask = batch.extras["loss_mask"]
        losses = net(batch.idx, batch.targets * mask, **where(batch)) * mask
        told = {"loss": mean_of(losses, mask), **statistics(net, batch)} if detailed else {}
        return losses.sum() / batch.num_loss_tokens, told


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of the model that training began with: `net` as it is within `begun()`."""

    net: nn.Module
    begun: Callable

    @torch.no_grad()
    def logps(self, tokens: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
        with self.begun():
            return logps(self.net, tokens, mask, temperature)


@dataclass(frozen=True)
class DPO:
    """DPO and its kin; a batch holds chosen completions, then the rejected ones."""

    loss: str
    beta: float
    smoothing: float
    reference: Reference | None  # None: the batches bring its log-probabilities

    def prepare(self, net: nn.Module, batches: list[Batch]) -> list[Batch]:
        if self.reference is None:
            return batches
        return [
            batch.with_tensors(ref_logps=self.reference.logps(batch.tokens, batch.extras["loss_mask"]).sum(1))
            for batch in batches
        ]

    def __call__(self, net: nn.Module, batch: Batch, detailed: bool) -> tuple[Tensor, Metrics]:
        mask = batch.extras["loss_mask"]
        logp = logps(net, batch.tokens, mask).sum(1)
        ratios = logp - batch.extras["ref_logps"]
        function, per_token, _ = DPO_LOSSES[self.loss]
        a, d = (ratios / mask.sum(1) if per_token else ratios).chunk(2)
        losses = function(a, d, self.beta, self.smoothing)
        if not detailed:
            return losses.mean() / batch.n_micro_batches, {}
        (chosen, rejected), (good, bad) = (self.beta * ratios).chunk(2), logp.chunk(2)
        told = {
            "loss": mean_of(losses), "rewards/chosen": mean_of(chosen), "rewards/rejected": mean_of(rejected), "rewards/margins": mean_of(chosen - rejected),
            "rewards/accuracies": mean_of(chosen > rejected), "logps/chosen": mean_of(good), "logps/rejected": mean_of(bad),
        }  # fmt: skip
        return losses.mean() / batch.n_micro_batches, told | statistics(net, batch)


@dataclass(frozen=True)
class KTO:
    """KTO: desirable and undesirable completions, unpaired. The reference point is the mean log-ratio of prompts with completions that are not
    theirs, over the rows of the whole step, at least 0."""

    beta: float
    desirable_weight: float
    undesirable_weight: float
    reference: Reference
    ranks: Ranks

    @torch.no_grad()
    def prepare(self, net: nn.Module, batches: list[Batch]) -> list[Batch]:
        total = torch.zeros(2, device=self.ranks.device)
        for batch in batches:
            tokens, mask = batch.extras["kl_completion"], batch.extras["kl_completion_mask"]
            total += mean_of((logps(net, tokens, mask) - self.reference.logps(tokens, mask)).sum(1), mask.any(1))
        total = self.ranks.all_reduce_(total)
        z = (total[0] / total[1]).clamp(min=0)
        return [
            batch.with_tensors(kl=z, ref_logps=self.reference.logps(batch.tokens, batch.extras["loss_mask"]).sum(1))
            for batch in batches
        ]

    def __call__(self, net: nn.Module, batch: Batch, detailed: bool) -> tuple[Tensor, Metrics]:
        logp, desirable, z = (
            logps(net, batch.tokens, batch.extras["loss_mask"]).sum(1),
            batch.extras["desirable"],
            batch.extras["kl"],
        )
        ratio = logp - batch.extras["ref_logps"]
        losses = kto_loss(ratio, z, desirable, self.beta, self.desirable_weight, self.undesirable_weight)
        if not detailed:
            return losses.mean() / batch.n_micro_batches, {}
        reward = self.beta * ratio
        told = {
            "loss": mean_of(losses), "kl": mean_of(z.view(1)), "rewards/chosen": mean_of(reward, desirable), "rewards/rejected": mean_of(reward, ~desirable),
            "logps/chosen": mean_of(logp, desirable), "logps/rejected": mean_of(logp, ~desirable),
        }  # fmt: skip
        return losses.mean() / batch.n_micro_batches, told | statistics(net, batch)


@dataclass(frozen=True)
class GRPO:
    """GRPO and its kin; a batch brings `advantage` (B,) and `old` (B, T), the log-probabilities with which the completions were sampled."""

    aggregation: str
    epsilon: float
    epsilon_high: float
    beta: float
    level: str
    temperature: float
    longest: int
    reference: Reference | None  # None: beta is 0

    def prepare(self, net: nn.Module, batches: list[Batch]) -> list[Batch]:
        if self.reference is None:
            return batches
        return [
            batch.with_tensors(
                ref_logps=self.reference.logps(batch.tokens, batch.extras["loss_mask"], self.temperature)
            )
            for batch in batches
        ]

    def __call__(self, net: nn.Module, batch: Batch, detailed: bool) -> tuple[Tensor, Metrics]:
        mask, old, advantage = batch.extras["loss_mask"], batch.extras["old_logps"], batch.extras["advantages"]
        logp = logps(net, batch.tokens, mask, self.temperature)
        losses, w = ppo_clip_loss(logp, old, advantage, mask, self.epsilon, self.epsilon_high, self.level)
        kl = divergence(logp, batch.extras["ref_logps"]) if self.reference is not None else torch.zeros_like(logp)
        total, by = AGGREGATIONS[self.aggregation](losses + self.beta * kl, mask.float(), self.longest)
        loss = total / (
            batch.num_loss_tokens if self.aggregation == "dapo" else by.clamp(min=1) * batch.n_micro_batches
        )
        if not detailed:
            return loss, {}
        A = advantage[:, None].expand_as(logp)
        told = {
            "loss": mean_of(loss.view(1) * batch.n_micro_batches), "kl": mean_of(kl, mask), "clip_ratio/low": mean_of((w < 1 - self.epsilon) & (A < 0), mask),
            "clip_ratio/high": mean_of((w > 1 + self.epsilon_high) & (A > 0), mask), "rollout_logp_error": mean_of((logp - old).abs(), mask),
        }  # fmt: skip
        return loss, told | statistics(net, batch, self.temperature)
