"""Objectives: from a model and a batch to a loss and its metrics. The formulas are in losses.py.

An objective is called with a micro-batch. Summed over a rank's micro-batches and averaged over the ranks, its losses
are the step's loss, however the step is cut. A metric is a tensor (2, ...): a sum and its count, added up likewise.

Legend: B sequences, T target positions, K contexts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from nanoforge.data.batches import Batch, Metrics
from nanoforge.distributed import Ranks
from nanoforge.posttraining import losses
from nanoforge.posttraining.losses import AGGREGATIONS, DPO_LOSSES, Normalizer, pair_sums, per_token_logps
from nanoforge.posttraining.reference import ReferenceModel


class Objective(Protocol):
    """What the training loop asks of an objective."""

    def prepare(self, model: nn.Module, batches: list[Batch]) -> list[Batch]:
        """A rank's micro-batches of a step, with what needs no gradient: log-probabilities of the reference model, and
        values that depend on the whole step."""

    def __call__(self, model: nn.Module, batch: Batch, *, with_metrics: bool) -> tuple[Tensor, Metrics]:
        """(loss, metrics) of a micro-batch; the metrics are empty unless asked for, as they cost a forward pass."""


# ---------------------------------------------------------------------------------------------------------------------
# metrics


def sum_and_count(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The sum of the values, or of those in the mask, and how many they are: (2,) float32."""
    values = values.detach().float()
    if mask is None:
        return torch.stack((values.sum(), values.new_tensor(values.numel())))
    return torch.stack(((values * mask).sum(), mask.sum().float()))


@torch.no_grad()
def token_metrics(model: nn.Module, batch: Batch, temperature: float = 1.0) -> Metrics:
    """The model's entropy at the loss tokens, and how often its likeliest token is the target.

    A forward pass of its own, so that logging changes nothing that is learned.
    """
    logits = model(batch.idx, **position_kwargs(batch))  # (B, T, V)
    loss_mask = batch.extras["loss_mask"]
    return {
        "entropy": sum_and_count(losses.entropy(logits, temperature), loss_mask),
        "mean_token_accuracy": sum_and_count(logits.argmax(-1) == batch.targets, loss_mask),
    }


def position_kwargs(batch: Batch) -> dict[str, Tensor]:
    """The model's argument for packed examples, each of which counts its positions from 0."""
    if "position_ids" not in batch.extras:
        return {}
    return {"position_ids": batch.extras["position_ids"]}


# ---------------------------------------------------------------------------------------------------------------------
# without a reference model


class ReferenceFree:
    """An objective that needs nothing but the batch."""

    def prepare(self, model: nn.Module, batches: list[Batch]) -> list[Batch]:
        return batches


class LanguageModel(ReferenceFree):
    """The mean cross-entropy of all targets; its metric has an entry for each context."""

    def __call__(self, model: nn.Module, batch: Batch, *, with_metrics: bool) -> tuple[Tensor, Metrics]:
        token_losses = model(batch.idx, batch.targets)  # (B, T) or (B, K, T)
        loss = token_losses.mean() / batch.n_micro_batches
        if not with_metrics:
            return loss, {}
        B, T = len(token_losses), token_losses.size(-1)
        context_losses = token_losses.detach().view(B, -1, T).sum((0, 2))  # (K,)
        return loss, {"loss": torch.stack((context_losses, torch.full_like(context_losses, B * T)))}


class SFT(ReferenceFree):
    """The mean cross-entropy of the loss tokens of the whole step."""

    def __call__(self, model: nn.Module, batch: Batch, *, with_metrics: bool) -> tuple[Tensor, Metrics]:
        loss_mask = batch.extras["loss_mask"]
        targets = batch.targets * loss_mask
        token_losses = model(batch.idx, targets, logits_at=loss_mask, **position_kwargs(batch))  # (B, T)
        loss = token_losses.sum() / batch.num_loss_tokens
        if not with_metrics:
            return loss, {}
        return loss, {"loss": sum_and_count(token_losses, loss_mask)} | token_metrics(model, batch)


# ---------------------------------------------------------------------------------------------------------------------
# preferences, measured against a reference model


@dataclass(frozen=True, kw_only=True)
class DPO:
    """DPO and its relatives. A row of a batch is a pair: a prompt, its chosen completion and its rejected one."""

    loss: str  # one of DPO_LOSSES
    beta: float
    label_smoothing: float = 0.0
    reference: ReferenceModel | None  # None: the batches bring ref_logps

    def prepare(self, model: nn.Module, batches: list[Batch]) -> list[Batch]:
        if self.reference is None:
            return batches
        return [batch.with_tensors(ref_logps=self.reference.pair_logps(batch)) for batch in batches]

    def __call__(self, model: nn.Module, batch: Batch, *, with_metrics: bool) -> tuple[Tensor, Metrics]:
        loss_mask = batch.extras["loss_mask"]
        is_rejected = batch.extras["is_rejected"]
        logps = per_token_logps(model, batch.tokens, loss_mask, position_ids=batch.extras["position_ids"])  # (B, T)
        policy_logps = pair_sums(logps, is_rejected)  # (B, 2)
        logratios = policy_logps - batch.extras["ref_logps"]

        dpo_loss = DPO_LOSSES[self.loss]
        scaled = logratios / pair_sums(loss_mask, is_rejected) if dpo_loss.per_token else logratios
        chosen_logratios, rejected_logratios = scaled.unbind(1)  # (B,) each
        pair_losses = dpo_loss.function(chosen_logratios, rejected_logratios, self.beta, self.label_smoothing)
        loss = pair_losses.mean() / batch.n_micro_batches
        if not with_metrics:
            return loss, {}

        chosen_rewards, rejected_rewards = (self.beta * logratios).unbind(1)
        chosen_logps, rejected_logps = policy_logps.unbind(1)
        metrics = {
            "loss": sum_and_count(pair_losses),
            "rewards/chosen": sum_and_count(chosen_rewards),
            "rewards/rejected": sum_and_count(rejected_rewards),
            "rewards/margins": sum_and_count(chosen_rewards - rejected_rewards),
            "rewards/accuracies": sum_and_count(chosen_rewards > rejected_rewards),
            "logps/chosen": sum_and_count(chosen_logps),
            "logps/rejected": sum_and_count(rejected_logps),
        }
        return loss, metrics | token_metrics(model, batch)


@dataclass(frozen=True, kw_only=True)
class KTO:
    """KTO: desirable and undesirable completions, unpaired.

    The reference point is an estimate of the KL: the mean log-ratio of prompts with completions of other prompts, over
    the rows of the whole step, at least 0.
    """

    beta: float
    desirable_weight: float
    undesirable_weight: float
    reference: ReferenceModel
    ranks: Ranks

    @torch.no_grad()
    def prepare(self, model: nn.Module, batches: list[Batch]) -> list[Batch]:
        total = torch.zeros(2, device=self.ranks.device)
        for batch in batches:
            tokens = batch.extras["kl_completion"]
            loss_mask = batch.extras["kl_completion_mask"]
            policy_logps = per_token_logps(model, tokens, loss_mask)
            ref_logps = self.reference.per_token_logps(tokens, loss_mask)
            total += sum_and_count((policy_logps - ref_logps).sum(1), loss_mask.any(1))
        total = self.ranks.all_reduce_(total)
        kl = (total[0] / total[1]).clamp(min=0)
        return [
            batch.with_tensors(
                kl=kl,
                ref_logps=self.reference.per_token_logps(batch.tokens, batch.extras["loss_mask"]).sum(1),
            )
            for batch in batches
        ]

    def __call__(self, model: nn.Module, batch: Batch, *, with_metrics: bool) -> tuple[Tensor, Metrics]:
        desirable = batch.extras["desirable"]  # (B,) bool
        kl = batch.extras["kl"]
        policy_logps = per_token_logps(model, batch.tokens, batch.extras["loss_mask"]).sum(1)  # (B,)
        logratios = policy_logps - batch.extras["ref_logps"]
        row_losses = losses.kto_loss(
            logratios=logratios,
            kl=kl,
            desirable=desirable,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        loss = row_losses.mean() / batch.n_micro_batches
        if not with_metrics:
            return loss, {}

        rewards = self.beta * logratios
        metrics = {
            "loss": sum_and_count(row_losses),
            "kl": sum_and_count(kl.view(1)),
            "rewards/chosen": sum_and_count(rewards, desirable),
            "rewards/rejected": sum_and_count(rewards, ~desirable),
            "logps/chosen": sum_and_count(policy_logps, desirable),
            "logps/rejected": sum_and_count(policy_logps, ~desirable),
        }
        return loss, metrics | token_metrics(model, batch)


# ---------------------------------------------------------------------------------------------------------------------
# reinforcement learning


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """GRPO and its relatives.

    A batch brings `advantages` (B,) and `old_logps` (B, T), the log-probabilities with which its tokens were sampled.
    """

    loss_type: str  # one of AGGREGATIONS
    epsilon_low: float  # the clip range is [1 - epsilon_low, 1 + epsilon_high]
    epsilon_high: float
    beta: float  # KL coefficient
    importance_sampling_level: str  # token or sequence
    temperature: float  # with which the completions were sampled
    max_completion_tokens: int
    reference: ReferenceModel | None  # None: there is no KL term

    def prepare(self, model: nn.Module, batches: list[Batch]) -> list[Batch]:
        if self.reference is None:
            return batches
        return [
            batch.with_tensors(
                ref_logps=self.reference.per_token_logps(batch.tokens, batch.extras["loss_mask"], self.temperature)
            )
            for batch in batches
        ]

    def __call__(self, model: nn.Module, batch: Batch, *, with_metrics: bool) -> tuple[Tensor, Metrics]:
        loss_mask = batch.extras["loss_mask"]  # (B, T)
        advantages = batch.extras["advantages"]  # (B,)
        old_logps = batch.extras["old_logps"]  # (B, T)

        # 1. The clipped surrogate of each token.
        logps = per_token_logps(model, batch.tokens, loss_mask, self.temperature)  # (B, T)
        ratio = losses.importance_ratio(logps, old_logps, loss_mask, self.importance_sampling_level)
        token_losses = losses.ppo_clip_loss(ratio, advantages, self.epsilon_low, self.epsilon_high).expand_as(logps)

        # 2. The KL penalty.
        kl = torch.zeros_like(logps)
        if self.reference is not None:
            kl = losses.kl_k3(logps, batch.extras["ref_logps"])
        token_losses = token_losses + self.beta * kl

        # 3. Tokens to one loss.
        normalizer = Normalizer(batch.n_micro_batches, batch.num_loss_tokens, self.max_completion_tokens)
        loss = AGGREGATIONS[self.loss_type](token_losses, loss_mask.float(), normalizer)
        if not with_metrics:
            return loss, {}

        ratio = ratio.expand_as(logps)
        token_advantages = advantages[:, None].expand_as(logps)
        clipped_low = (ratio < 1 - self.epsilon_low) & (token_advantages < 0)
        clipped_high = (ratio > 1 + self.epsilon_high) & (token_advantages > 0)
        metrics = {
            "loss": sum_and_count(loss.view(1) * batch.n_micro_batches),
            "kl": sum_and_count(kl, loss_mask),
            "clip_ratio/low": sum_and_count(clipped_low, loss_mask),
            "clip_ratio/high": sum_and_count(clipped_high, loss_mask),
            "rollout_logp_error": sum_and_count((logps - old_logps).abs(), loss_mask),
        }
        return loss, metrics | token_metrics(model, batch, self.temperature)
