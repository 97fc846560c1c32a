"""Post-training losses: pure functions of log-probabilities, rewards and masks. No model, no batch, no ranks.

A completion's log-probability is the sum over its loss tokens, the end-of-sequence token included.
A log-ratio is the policy's log-probability less the reference model's.

Legend: B sequences, T target positions, N completions of a rollout batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# log-probabilities


def per_token_logps(
    model: nn.Module,
    tokens: Tensor,
    loss_mask: Tensor,
    temperature: float = 1.0,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Log-probabilities of the loss tokens, 0 elsewhere: (B, T) float32.

    Args:
        model: `model(idx, targets, position_ids=..., temperature=..., logits_at=loss_mask)` returns cross-entropies,
            (B, T), which are 0 outside the loss mask.
        tokens: (B, T + 1) ids.
        loss_mask: (B, T) bool, the targets that count in the loss.
        position_ids: (B, T) of the inputs, if they don't just count from 0.
    """
    targets = tokens[:, 1:] * loss_mask  # masked targets may be ids that the head lacks: rows of a soft prompt
    return -model(tokens[:, :-1], targets, position_ids=position_ids, temperature=temperature, logits_at=loss_mask)


def pair_sums(values: Tensor, is_rejected: Tensor) -> Tensor:
    """Sums over the chosen and over the rejected completion of each row: (B, 2) from values (B, T)."""
    return torch.stack(((values * ~is_rejected).sum(1), (values * is_rejected).sum(1)), dim=1)


CACHED_LOGITS = 2**20  # float32 numbers that stay in a CPU's cache from one operation to the next


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the next-token distribution, in nats, float32: (B, T) from logits (B, T, V).

    On a CPU a few tokens at a time: whole logits would go through memory at each operation.
    """
    tokens = logits.flatten(0, -2)
    n_tokens = max(1, CACHED_LOGITS // logits.size(-1)) if logits.device.type == "cpu" else len(tokens)
    entropies = []
    for some in tokens.split(n_tokens):
        logps = (some.float() / temperature).log_softmax(-1)
        entropies.append(-(logps.exp() * logps).sum(-1))
    return torch.cat(entropies).view(logits.shape[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# preference losses: of pairs (B,), from the log-ratios of the chosen and the rejected completions, (B,) each


def sigmoid_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """DPO (Rafailov et al. 2023, equation 7); with label smoothing cDPO (Mitchell 2023)."""
    margins = chosen_logratios - rejected_logratios
    return -(1 - label_smoothing) * F.logsigmoid(beta * margins) - label_smoothing * F.logsigmoid(-beta * margins)


def robust_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """rDPO (Chowdhury et al. 2024): unbiased if a fraction `label_smoothing` of the labels is flipped."""
    margins = chosen_logratios - rejected_logratios
    losses = -(1 - label_smoothing) * F.logsigmoid(beta * margins) + label_smoothing * F.logsigmoid(-beta * margins)
    return losses / (1 - 2 * label_smoothing)


def hinge_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """SLiC's hinge loss (Zhao et al. 2023) on log-ratios."""
    return F.relu(1 - beta * (chosen_logratios - rejected_logratios))


def ipo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """IPO (Azar et al. 2023, equation 17); the log-ratios are means per token."""
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)).square()


def apo_zero_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024): raises the chosen completion, lowers the rejected one."""
    return 1 - torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(beta * rejected_logratios)


class PreferenceLoss(NamedTuple):
    """A loss of the DPO family."""

    function: Callable[[Tensor, Tensor, float, float], Tensor]
    per_token: bool = False  # the log-ratios are means over a completion's tokens, not sums
    label_smoothing: bool = False  # it uses label_smoothing


DPO_LOSSES = {
    "sigmoid": PreferenceLoss(sigmoid_loss, label_smoothing=True),
    "hinge": PreferenceLoss(hinge_loss),
    "ipo": PreferenceLoss(ipo_loss, per_token=True),
    "robust": PreferenceLoss(robust_loss, label_smoothing=True),
    "sigmoid_norm": PreferenceLoss(sigmoid_loss, per_token=True, label_smoothing=True),
    "apo_zero": PreferenceLoss(apo_zero_loss),
}


def kto_loss(
    logratios: Tensor, kl: Tensor, desirable: Tensor, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """KTO (Ethayarajh et al. 2024, equation 8): (B,) from log-ratios (B,), the reference point `kl` and labels (B,)."""
    return torch.where(
        desirable,
        desirable_weight * (1 - torch.sigmoid(beta * (logratios - kl))),
        undesirable_weight * (1 - torch.sigmoid(beta * (kl - logratios))),
    )


# ---------------------------------------------------------------------------------------------------------------------
# policy gradients


def group_advantages(rewards: Tensor, group_size: int, scale: str, batch_std: Tensor | None = None) -> Tensor:
    """GRPO's advantages (Shao et al. 2024, section 4.1.2): rewards less their group's mean, normalized.

    Args:
        rewards: (N,); the `group_size` completions of a prompt follow each other.
        scale: what to divide by: the standard deviation of the "group", that of the "batch",
            or "none" (Dr. GRPO, Liu et al. 2025).
        batch_std: the standard deviation over the whole batch, if these rewards are only a rank's share of it.

    Returns:
        (N,)
    """
    groups = rewards.view(-1, group_size)  # (N / group_size, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        std = rewards.std() if batch_std is None else batch_std
        advantages = advantages / (std + 1e-4)
    return advantages.flatten()


def importance_ratio(logps: Tensor, old_logps: Tensor, loss_mask: Tensor, level: str) -> Tensor:
    """Probability under the policy over probability when sampled, from log-probabilities (B, T).

    Returns:
        (B, T) with level "token". With level "sequence" (GSPO, Zheng et al. 2025, equation 7) (B, 1): the ratio of the
        whole completions, as a geometric mean over their tokens.
    """
    log_ratio = (logps - old_logps) * loss_mask
    if level == "sequence":
        log_ratio = (log_ratio.sum(1) / loss_mask.sum(1).clamp(min=1))[:, None]
    return log_ratio.exp()


def ppo_clip_loss(ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7): -min(r A, clip(r, 1 - low, 1 + high) A).

    Args:
        ratio: importance ratios, (B, T) or (B, 1).
        advantages: (B,)
        epsilon_low, epsilon_high: the clip range.

    Returns:
        In the shape of `ratio`.
    """
    A = advantages[:, None]
    return -torch.minimum(ratio * A, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * A)


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL of the policy to the reference model, per token: unbiased and never negative (Schulman 2020, k3)."""
    return (ref_logps - logps).exp() - (ref_logps - logps) - 1


# ---------------------------------------------------------------------------------------------------------------------
# aggregations: per-token losses (B, T) and their mask (B, T) to a micro-batch's share of the step's loss. Summed over a
# rank's micro-batches and averaged over the ranks, the shares are the loss.


class Normalizer(NamedTuple):
    """What an aggregation may divide by."""

    n_micro_batches: int  # of this rank in the step
    num_loss_tokens: float  # loss tokens of the whole step, divided by the number of ranks
    max_completion_tokens: int


def mean_of_sequence_means(losses: Tensor, loss_mask: Tensor, normalizer: Normalizer) -> Tensor:
    """GRPO (Shao et al. 2024, equation 3): the mean over sequences of each one's mean over its tokens."""
    sequence_means = (losses * loss_mask).sum(1) / loss_mask.sum(1).clamp(min=1)  # (B,)
    return sequence_means.sum() / (len(losses) * normalizer.n_micro_batches)


def mean_over_local_tokens(losses: Tensor, loss_mask: Tensor, normalizer: Normalizer) -> Tensor:
    """BNPO, as in TRL: the mean over the tokens of the micro-batch alone."""
    return (losses * loss_mask).sum() / (loss_mask.sum().clamp(min=1) * normalizer.n_micro_batches)


def mean_over_max_tokens(losses: Tensor, loss_mask: Tensor, normalizer: Normalizer) -> Tensor:
    """Dr. GRPO (Liu et al. 2025): the sum divided by a constant, the tokens that completions may have at most."""
    max_tokens = len(losses) * normalizer.max_completion_tokens
    return (losses * loss_mask).sum() / (max_tokens * normalizer.n_micro_batches)


def mean_over_global_tokens(losses: Tensor, loss_mask: Tensor, normalizer: Normalizer) -> Tensor:
    """DAPO (Yu et al. 2025, equation 8): the mean over the tokens of the whole step."""
    return (losses * loss_mask).sum() / normalizer.num_loss_tokens


AGGREGATIONS = {
    "grpo": mean_of_sequence_means,
    "bnpo": mean_over_local_tokens,
    "dr_grpo": mean_over_max_tokens,
    "dapo": mean_over_global_tokens,
}
