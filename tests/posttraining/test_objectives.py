"""Objectives and their losses against REFERENCES.md's numbers, TRL's own functions and finite differences.

However a step is cut into micro-batches and ranks, its losses and metrics add up to the same.
"""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY_WITHOUT_SHAPE, RunFiles, assert_same_lines, equal_tensors, metric, run_on_ranks, tiny_model
from torch import nn

import train_args
from nanoforge.data.batches import Batch
from nanoforge.data.tokenization import CharTokenizer
from nanoforge.distributed import Ranks
from nanoforge.errors import UserError
from nanoforge.posttraining import losses, reference
from nanoforge.posttraining.examples import (
    Collator,
    Example,
    ExampleEncoder,
    PreferenceCollator,
    encode_rows,
    pack,
)
from nanoforge.posttraining.losses import (
    AGGREGATIONS,
    DPO_LOSSES,
    group_advantages,
    kto_loss,
    pair_sums,
    per_token_logps,
)
from nanoforge.posttraining.objectives import DPO, GRPO, KTO, SFT, position_kwargs, token_metrics
from nanoforge.posttraining.reference import ReferenceModel
from nanoforge.training import checkpoint

Train = Callable[..., RunFiles]  # conftest's `run`
ONE_RANK = Ranks(0, 1, torch.device("cpu"))


def assert_same_run(a, b, *names: str) -> None:
    """Losses, gradients' norms, weights and further metrics, all within 1e-5."""
    for name in ("loss", "grad_norm", *names):
        assert metric(a, name) == pytest.approx(metric(b, name), rel=1e-5, abs=1e-6), name
    for name, weight in a.last.weights.items():
        torch.testing.assert_close(weight, b.last.weights[name], atol=1e-5, rtol=1e-5, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# a model that gives each id a log-probability of its own: a row of the tests' batches is the ids of its tokens


class TableModel(nn.Module):
    """Id j has the log-probability values[j - 1] at every position; ids outside the loss mask would have 7."""

    def __init__(self, values):
        super().__init__()
        values = torch.as_tensor(values)
        self.logps = nn.Parameter(torch.cat((values.new_full((1,), 7.0), values)))

    def forward(self, idx, targets=None, position_ids=None, temperature=1.0, logits_at=...):
        if targets is None:
            return torch.zeros(*idx.shape, len(self.logps))
        return -self.logps[targets] * logits_at


def reference_of(values) -> ReferenceModel:
    return ReferenceModel(TableModel(values), nullcontext)


def spread(sums, lengths) -> torch.Tensor:
    """Log-probabilities of the tokens of rows with these sums and lengths, no two of them equal."""
    rows = [
        total / length + 0.01 * (torch.arange(length) - (length - 1) / 2)
        for total, length in zip(sums, lengths, strict=True)
    ]
    return torch.cat(rows).double()


def batch_of(lengths, first_id: int = 1) -> Batch:
    """Rows of so many loss tokens behind two others; their ids count from `first_id` on."""
    width = 2 + max(lengths)
    tokens = torch.zeros(len(lengths), width, dtype=torch.long)
    loss_mask = torch.zeros(len(lengths), width - 1, dtype=torch.bool)
    next_id = first_id
    for row, length in enumerate(lengths):
        tokens[row, 2 : 2 + length] = torch.arange(next_id, next_id + length)
        loss_mask[row, 1 : 1 + length] = True
        next_id += length
    return Batch(tokens, {"loss_mask": loss_mask}, 1, float(sum(lengths)))


def pairs_of(batch: Batch) -> Batch:
    """Each row of the first half and one of the second, which is its rejected one, as a pair."""
    n_pairs, width = len(batch.tokens) // 2, batch.tokens.size(1)
    chosen, rejected = batch.tokens.split(n_pairs)
    chosen_mask, rejected_mask = batch.extras["loss_mask"].split(n_pairs)
    between = torch.zeros(n_pairs, 1, dtype=torch.bool)
    extras = {
        "loss_mask": torch.cat((chosen_mask, between, rejected_mask), 1),
        "position_ids": torch.arange(2 * width - 1).remainder(width).expand(n_pairs, -1),
        "is_rejected": (torch.arange(2 * width - 1) >= width).expand(n_pairs, -1),
    }
    return Batch(torch.cat((chosen, rejected), 1), extras, 1, batch.num_loss_tokens)


def every_nth_row(batch: Batch, n: int) -> list[Batch]:
    """The batch as n micro-batches."""
    return [
        Batch(
            batch.tokens[i::n], {name: tensor[i::n] for name, tensor in batch.extras.items()}, n, batch.num_loss_tokens
        )
        for i in range(n)
    ]


def mean(metric_pair) -> float:
    return float(metric_pair[0] / metric_pair[1])


def run_objective(objective, model, batches) -> tuple[float, dict[str, float]]:
    """The loss and the metrics of a step, added up over its micro-batches."""
    results = [objective(model, batch, with_metrics=True) for batch in objective.prepare(model, batches)]
    loss = sum(loss.item() for loss, _ in results)
    return loss, {name: mean(sum(metrics[name] for _, metrics in results)) for name in results[0][1]}


# ---------------------------------------------------------------------------------------------------------------------
# preferences

CHOSEN, REJECTED = [-10.0, -12.0], [-11.0, -9.0]
REF_CHOSEN, REF_REJECTED = [-10.5, -11.5], [-10.8, -9.6]
LENGTHS = [5, 6, 4, 3]  # chosen, then rejected
DPO_NUMBERS = [
    ("sigmoid", 0.0, 0.704209),
    ("hinge", 0.0, 1.020000),
    ("ipo", 0.0, 25.718056),
    ("sigmoid_norm", 0.0, 0.696545),
    ("robust", 0.1, 0.706709),
    ("apo_zero", 0.0, 1.004998),
    ("sigmoid", 0.1, 0.702209),
]


@pytest.mark.parametrize("name, label_smoothing, expected", DPO_NUMBERS)
def test_dpo_losses_are_the_reference_numbers(name, label_smoothing, expected):
    chosen_logratios = torch.tensor(CHOSEN) - torch.tensor(REF_CHOSEN)
    rejected_logratios = torch.tensor(REJECTED) - torch.tensor(REF_REJECTED)
    if DPO_LOSSES[name].per_token:
        chosen_logratios = chosen_logratios / torch.tensor(LENGTHS[:2])
        rejected_logratios = rejected_logratios / torch.tensor(LENGTHS[2:])
    losses = DPO_LOSSES[name].function(chosen_logratios, rejected_logratios, 0.1, label_smoothing)
    assert float(losses.mean()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("name, label_smoothing, expected_loss", DPO_NUMBERS)
def test_dpo_from_a_models_log_probabilities(name, label_smoothing, expected_loss, cut):
    """Also in two micro-batches of one pair, whose losses add up."""
    model = TableModel(spread(CHOSEN + REJECTED, LENGTHS))
    reference = reference_of(spread(REF_CHOSEN + REF_REJECTED, LENGTHS))
    objective = DPO(loss=name, beta=0.1, label_smoothing=label_smoothing, reference=reference)
    loss, metrics = run_objective(objective, model, every_nth_row(pairs_of(batch_of(LENGTHS)), cut))
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    expected = {
        "loss": expected_loss,
        "rewards/chosen": 0.0,
        "rewards/rejected": 0.02,
        "rewards/margins": -0.02,
        "rewards/accuracies": 0.5,
        "logps/chosen": -11.0,
        "logps/rejected": -10.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    entropy = np.log(len(model.logps))
    assert metrics["entropy"] == pytest.approx(entropy, abs=1e-5), "of the table model's uniform distribution"


KTO_LENGTHS = [2, 1, 3, 2]
DESIRABLE = torch.tensor([True, False, True, False])


def kto_batch() -> Batch:
    kl_batch = batch_of([1, 1, 1, 1], first_id=1 + sum(KTO_LENGTHS))
    return batch_of(KTO_LENGTHS).with_tensors(
        desirable=DESIRABLE,
        kl_completion=kl_batch.tokens,
        kl_completion_mask=kl_batch.extras["loss_mask"],
    )


@pytest.mark.parametrize("sign, kl, expected_loss", [(1, 0.2, 0.584998), (-1, 0.0, 0.585824)])
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_kto_is_the_reference_numbers(sign, kl, expected_loss, cut):
    logratios = torch.tensor([0.5, -0.2, -0.5, 0.6])
    kl_logratios = sign * torch.tensor([0.4, -0.1, 0.3, 0.2])
    losses = kto_loss(
        logratios=logratios,
        kl=kl_logratios.mean().clamp(min=0),
        desirable=DESIRABLE,
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.33,
    )
    assert float(losses.mean()) == pytest.approx(expected_loss, abs=1e-5)

    ref_logps = torch.tensor([-3.0, -2.0, -4.0, -5.0])
    model = TableModel(torch.cat((spread(ref_logps + logratios, KTO_LENGTHS), (kl_logratios - 1).double())))
    reference = reference_of(torch.cat((spread(ref_logps, KTO_LENGTHS), torch.full((4,), -1.0).double())))
    objective = KTO(beta=0.1, desirable_weight=1.0, undesirable_weight=1.33, reference=reference, ranks=ONE_RANK)
    loss, metrics = run_objective(objective, model, every_nth_row(kto_batch(), cut))
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    expected = {
        "loss": expected_loss,
        "kl": kl,
        "rewards/chosen": 0.0,
        "rewards/rejected": 0.02,
        "logps/chosen": -3.5,
        "logps/rejected": -3.3,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_ktos_reference_point_has_no_gradient():
    ones = torch.full((4,), -1.0, dtype=torch.double)
    model = TableModel(torch.cat((spread(ones, KTO_LENGTHS), ones / 2)))
    reference = reference_of(torch.cat((spread(ones, KTO_LENGTHS), ones)))
    objective = KTO(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, reference=reference, ranks=ONE_RANK)
    (batch,) = objective.prepare(model, [kto_batch()])
    objective(model, batch, with_metrics=False)[0].backward()
    gradient = model.logps.grad
    assert (gradient[1:9] != 0).all() and (gradient[9:] == 0).all() and gradient[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# reinforcement learning

LOGPS = [[-1, -0.5, -0.2], [-0.7, -0.9], [-0.3], [-0.4, -0.6]]
OLD_LOGPS = [[-1.4, -0.5, -0.1], [-1.1, -0.6], [-0.3], [-0.5, -0.6]]
REF_LOGPS = [[-1.1, -0.6, -0.2], [-0.9, -0.7], [-0.2], [-0.4, -0.8]]
ADVANTAGES = torch.tensor([0.707007, -0.707007, 0.0, 0.0])
GRPO_NUMBERS = [
    ("grpo", "token", 0.2, 0.020370),
    ("bnpo", "token", 0.2, -0.071114),
    ("dapo", "token", 0.2, -0.071114),
    ("dr_grpo", "token", 0.2, -0.035557),
    ("grpo", "sequence", 0.2, -0.008770),
    ("grpo", "token", 0.6, 0.003177),
]


def test_advantages_are_the_reference_numbers():
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5])
    centred = torch.tensor([0.5, -0.5, 0, 0], dtype=torch.double)
    std = np.std([1, 0, 0.5, 0.5], ddof=1)
    torch.testing.assert_close(group_advantages(rewards, 2, "group"), ADVANTAGES, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        group_advantages(rewards, 2, "batch").double(), centred / (std + 1e-4), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(group_advantages(rewards, 2, "none").double(), centred)
    torch.testing.assert_close(
        group_advantages(rewards, 2, "batch", torch.tensor(2.0)).double(), centred / 2.0001, atol=1e-6, rtol=0
    )


def flat(rows) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.double)


def at_loss_tokens(rows, loss_mask) -> torch.Tensor:
    """The values of loss tokens at their positions, 0 elsewhere."""
    values = torch.zeros(loss_mask.shape, dtype=torch.double)
    values[loss_mask] = flat(rows)
    return values


def grpo_batch() -> Batch:
    batch = batch_of([len(row) for row in LOGPS])
    old_logps = at_loss_tokens(OLD_LOGPS, batch.extras["loss_mask"])
    return batch.with_tensors(old_logps=old_logps, advantages=ADVANTAGES.double())


def grpo(**changes) -> GRPO:
    """GRPO with the settings of REFERENCES.md, changed."""
    settings = {
        "loss_type": "grpo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.08,
        "importance_sampling_level": "token",
        "temperature": 1.0,
        "max_completion_tokens": 4,
        "reference": reference_of(flat(REF_LOGPS)),
    }
    return GRPO(**settings | changes)


@pytest.mark.parametrize("loss_type, level, epsilon_high, expected_loss", GRPO_NUMBERS)
@pytest.mark.parametrize("cut", [1, 2])
def test_grpo_is_the_reference_numbers(loss_type, level, epsilon_high, expected_loss, cut):
    """Whole, and in two micro-batches, whose losses add up; bnpo divides by each one's own tokens."""
    if cut == 2 and loss_type == "bnpo":
        expected_loss = (mean_token_loss(range(2)) + mean_token_loss(range(2, 4))) / 2
    batch = grpo_batch()
    rows = [slice(0, 4)] if cut == 1 else [slice(0, 2), slice(2, 4)]
    batches = [
        Batch(
            tokens=batch.tokens[part],
            extras={name: tensor[part] for name, tensor in batch.extras.items()},
            n_micro_batches=cut,
            num_loss_tokens=batch.num_loss_tokens,
        )
        for part in rows
    ]
    objective = grpo(loss_type=loss_type, epsilon_high=epsilon_high, importance_sampling_level=level)
    loss, metrics = run_objective(objective, TableModel(flat(LOGPS)), batches)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert metrics["loss"] == pytest.approx(expected_loss, abs=1e-5)
    assert metrics["kl"] == pytest.approx(0.009214, abs=1e-5)
    errors = (flat(LOGPS) - flat(OLD_LOGPS)).abs()
    assert metrics["rollout_logp_error"] == pytest.approx(errors.mean().item(), abs=1e-6)
    if level == "token":
        ratio = np.exp(flat(LOGPS) - flat(OLD_LOGPS)).numpy()
        token_advantages = np.repeat(ADVANTAGES.numpy(), [len(row) for row in LOGPS])
        clipped_low = (ratio < 0.8) & (token_advantages < 0)
        clipped_high = (ratio > 1 + epsilon_high) & (token_advantages > 0)
        assert metrics["clip_ratio/low"] == pytest.approx(clipped_low.mean())
        assert metrics["clip_ratio/high"] == pytest.approx(clipped_high.mean())


def mean_token_loss(rows) -> float:
    """REFERENCES.md's token loss, its mean over the tokens of these rows, in numpy."""
    losses = []
    for row in rows:
        advantage = float(ADVANTAGES[row])
        for logp, old, ref in zip(LOGPS[row], OLD_LOGPS[row], REF_LOGPS[row], strict=True):
            ratio = np.exp(logp - old)
            surrogate = min(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
            losses.append(-surrogate + 0.08 * (np.exp(ref - logp) - (ref - logp) - 1))
    return float(np.mean(losses))


def test_on_its_own_samples_the_gradient_is_reinforces():
    """While the policy is the one that sampled, ratios are 1 and the gradient is that of -A log p (Williams 1992)."""
    model = TableModel(flat(OLD_LOGPS))
    loss, metrics = grpo(loss_type="dapo", beta=0.0, reference=None)(model, grpo_batch(), with_metrics=True)
    loss.backward()
    expected = -torch.repeat_interleave(ADVANTAGES.double(), torch.tensor([3, 2, 1, 2])) / 8
    torch.testing.assert_close(model.logps.grad[1:], expected)
    for name in ("rollout_logp_error", "clip_ratio/low", "clip_ratio/high"):
        assert mean(metrics[name]) == 0


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_a_row_without_loss_tokens_adds_nothing(loss_type):
    """As --mask_truncated leaves them."""
    batch = grpo_batch()
    batch.extras["loss_mask"][:] = False
    batch = batch.with_tensors(ref_logps=torch.zeros(batch.extras["loss_mask"].shape))
    model = TableModel(flat(LOGPS))
    objective = grpo(loss_type=loss_type, importance_sampling_level="sequence")
    loss, _ = objective(model, batch, with_metrics=False)
    loss.backward()
    assert loss.item() == 0 and (model.logps.grad == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# gradients by finite differences


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_gradients_of_preferences_by_finite_differences(name):
    torch.manual_seed(0)
    logratios = tuple(torch.randn(5, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda chosen, rejected: DPO_LOSSES[name].function(chosen, rejected, 0.7, 0.1), logratios
    )


def dpo_case():
    ref_logps = torch.tensor([REF_CHOSEN, REF_REJECTED]).T
    objective = DPO(loss="ipo", beta=0.1, label_smoothing=0.0, reference=None)
    return objective, pairs_of(batch_of(LENGTHS)).with_tensors(ref_logps=ref_logps), spread(CHOSEN + REJECTED, LENGTHS)


def kto_case():
    objective = KTO(beta=0.3, desirable_weight=1.0, undesirable_weight=1.3, reference=None, ranks=ONE_RANK)
    batch = kto_batch().with_tensors(kl=torch.tensor(0.2), ref_logps=torch.full((4,), -3.0))
    return objective, batch, spread([-2.5, -2.2, -4.5, -4.4, -1, -1, -1, -1], [*KTO_LENGTHS, 1, 1, 1, 1])


def grpo_token_case():
    batch = grpo_batch()
    return grpo(), batch.with_tensors(ref_logps=at_loss_tokens(REF_LOGPS, batch.extras["loss_mask"])), flat(LOGPS)


def grpo_sequence_case():
    _, batch, values = grpo_token_case()
    return grpo(loss_type="dapo", epsilon_high=0.3, importance_sampling_level="sequence"), batch, values


@pytest.mark.parametrize("case", [dpo_case, kto_case, grpo_token_case, grpo_sequence_case])
def test_gradients_through_the_objectives_by_finite_differences(case):
    objective, batch, values = case()
    model = TableModel(values)

    def loss_of(logps):
        return objective(lambda idx, targets, logits_at, **_: -logps[targets] * logits_at, batch, with_metrics=False)[0]

    assert torch.autograd.gradcheck(loss_of, (model.logps,))


# ---------------------------------------------------------------------------------------------------------------------
# TRL's own losses, on log-probabilities from a stand-in for its model


class OneProcess:
    """Stands in for accelerate's Accelerator."""

    device, num_processes, sync_gradients = torch.device("cpu"), 1, True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


class TrlMetrics(dict):
    """mode -> name -> list, both made when first read."""

    class Lists(dict):
        def __missing__(self, name):
            self[name] = []
            return self[name]

    def __missing__(self, mode):
        self[mode] = self.Lists()
        return self[mode]


def trl_trainer(**settings) -> SimpleNamespace:
    """What a loss of TRL's asks of its trainer."""
    common = {
        "model": SimpleNamespace(training=True),
        "accelerator": OneProcess(),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "_metrics": TrlMetrics(),
    }
    return SimpleNamespace(**common, **settings)


def trl_model(model: TableModel, loss_mask: torch.Tensor):
    """What TRL's patched models are to its losses."""

    def forward(input_ids, **kwargs):
        log_probs = model.logps[input_ids[:, 1:]] * loss_mask
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(
            log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None
        )

    return forward


def trl_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    no_prompt = torch.zeros(len(batch.tokens), 1, dtype=torch.bool)
    return {
        "input_ids": batch.tokens,
        "attention_mask": torch.ones_like(batch.tokens),
        "completion_mask": torch.cat((no_prompt, batch.extras["loss_mask"]), 1).long(),
    }


def loss_and_gradient(loss: torch.Tensor, model: TableModel) -> tuple[float, torch.Tensor]:
    model.logps.grad = None
    loss.backward()
    return loss.item(), model.logps.grad


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, label_smoothing",
    [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.15), ("sigmoid_norm", 0.0), ("apo_zero", 0.0)],
)
@pytest.mark.parametrize("seed", range(3))
def test_dpo_equals_trls(name, label_smoothing, seed):
    """Loss, gradient and metrics; prompts of one length, completions of many."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    torch.manual_seed(seed)
    lengths = torch.randint(1, 7, (8,)).tolist()
    model = TableModel(-4 * torch.rand(sum(lengths), dtype=torch.double))
    ref_logps = -10 * torch.rand(8, dtype=torch.double)
    batch = batch_of(lengths)
    objective = DPO(loss=name, beta=0.3, label_smoothing=label_smoothing, reference=None)
    pairs = pairs_of(batch).with_tensors(ref_logps=ref_logps.view(2, 4).T)
    loss, metrics = objective(model, pairs, with_metrics=True)

    trainer = trl_trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=0.3,
        label_smoothing=label_smoothing,
        use_weighting=False,
    )
    inputs = trl_inputs(batch) | {"ref_chosen_logps": ref_logps[:4], "ref_rejected_logps": ref_logps[4:]}
    trl_forward = trl_model(model, batch.extras["loss_mask"])
    trl_loss = dpo_trainer.DPOTrainer._compute_loss(trainer, trl_forward, inputs, False)

    (ours, our_gradient), (trls, trl_gradient) = loss_and_gradient(loss, model), loss_and_gradient(trl_loss, model)
    assert ours == pytest.approx(trls, abs=1e-9)
    torch.testing.assert_close(our_gradient, trl_gradient)
    logged = trainer._metrics["train"]
    rewards = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    for key in (*rewards, "logps/chosen", "logps/rejected"):
        assert mean(metrics[key]) == pytest.approx(logged[key][-1], abs=1e-5), key


@pytest.mark.parametrize("seed", range(4))
def test_kto_equals_trls(seed):
    """Loss, gradient, reference point and metrics; an odd number of rows, a reference point above 0 and below."""
    kto_trainer = pytest.importorskip("trl.trainer.kto_trainer")
    torch.manual_seed(seed)
    lengths = torch.randint(1, 7, (7,)).tolist()
    model = TableModel(-4 * torch.rand(sum(lengths) + 7, dtype=torch.double))
    reference = reference_of(model.logps.detach()[1:] + torch.randn(sum(lengths) + 7, dtype=torch.double))
    kl_batch = batch_of([1] * 7, first_id=sum(lengths) + 1)
    desirable = torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    batch = batch_of(lengths).with_tensors(
        desirable=desirable,
        kl_completion=kl_batch.tokens,
        kl_completion_mask=kl_batch.extras["loss_mask"],
    )
    objective = KTO(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7, reference=reference, ranks=ONE_RANK)
    (prepared,) = objective.prepare(model, [batch])
    loss, metrics = objective(model, prepared, with_metrics=True)

    def sequence_logps(table: TableModel, batch: Batch) -> torch.Tensor:
        return (table.logps[batch.tokens[:, 1:]] * batch.extras["loss_mask"]).sum(1).detach()

    trainer = trl_trainer(
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda _, inputs: sequence_logps(model, kl_batch),
    )
    inputs = trl_inputs(batch) | {
        "label": desirable,
        "ref_logps": sequence_logps(reference.model, batch),
        "ref_KL_logps": sequence_logps(reference.model, kl_batch),
    }
    trl_forward = trl_model(model, batch.extras["loss_mask"])
    trl_loss = kto_trainer.KTOTrainer._compute_loss(trainer, trl_forward, inputs, False)

    (ours, our_gradient), (trls, trl_gradient) = loss_and_gradient(loss, model), loss_and_gradient(trl_loss, model)
    assert ours == pytest.approx(trls, abs=1e-7)
    torch.testing.assert_close(our_gradient, trl_gradient, atol=1e-7, rtol=1e-5)
    logged = trainer._metrics["train"]
    for key in ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        assert mean(metrics[key]) == pytest.approx(logged[key][-1], abs=1e-5), key


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.08])
def test_grpo_equals_trls(loss_type, level, beta):
    """Loss, gradient, KL and clip ratios."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    torch.manual_seed(5)
    lengths = torch.randint(1, 7, (8,)).tolist()
    batch = batch_of(lengths)
    loss_mask = batch.extras["loss_mask"]
    model = TableModel(-2 * torch.rand(sum(lengths), dtype=torch.double))
    old_logps = torch.zeros(loss_mask.shape, dtype=torch.double)
    old_logps[loss_mask] = model.logps.detach()[1:] + torch.randn(sum(lengths)).double() / 4
    ref_logps = torch.zeros(loss_mask.shape, dtype=torch.double)
    ref_logps[loss_mask] = model.logps.detach()[1:] + torch.randn(sum(lengths)).double() / 4
    advantages = torch.randn(8, dtype=torch.double)
    objective = grpo(
        loss_type=loss_type,
        epsilon_high=0.3,
        beta=beta,
        importance_sampling_level=level,
        max_completion_tokens=9,
        reference=object() if beta else None,
    )
    prepared = batch.with_tensors(old_logps=old_logps, advantages=advantages, ref_logps=ref_logps)
    loss, metrics = objective(model, prepared, with_metrics=True)

    completion_mask = loss_mask[:, 1:]  # behind the two tokens of the prompt

    def trl_logps_and_entropies(_, ids, *args, **kwargs):
        return model.logps[ids[:, 2:]] * completion_mask, torch.zeros(completion_mask.shape), None

    trainer = trl_trainer(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.3,
        use_vllm=False,
        max_completion_length=9,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _get_per_token_logps_and_entropies=trl_logps_and_entropies,
    )
    inputs = {
        "prompt_ids": batch.tokens[:, :2],
        "prompt_mask": torch.ones(8, 2),
        "completion_ids": batch.tokens[:, 2:],
        "completion_mask": completion_mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old_logps[:, 1:],
        "ref_per_token_logps": ref_logps[:, 1:],
        "num_items_in_batch": torch.tensor(sum(lengths)),
    }
    trl_loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)

    (ours, our_gradient), (trls, trl_gradient) = loss_and_gradient(loss, model), loss_and_gradient(trl_loss, model)
    assert ours == pytest.approx(trls, abs=1e-7)
    torch.testing.assert_close(our_gradient, trl_gradient, atol=1e-7, rtol=1e-5)
    logged = trainer._metrics["train"]
    if beta:
        assert mean(metrics["kl"]) == pytest.approx(logged["kl"][-1], abs=1e-5)
    if level == "token":
        for end in ("low", "high"):
            trl_ratio = logged[f"clip_ratio/{end}_mean"][-1]
            assert mean(metrics[f"clip_ratio/{end}"]) == pytest.approx(trl_ratio) and trl_ratio > 0


# ---------------------------------------------------------------------------------------------------------------------
# the metrics of a real model


@pytest.mark.parametrize("cached_logits", [1, 70, 2**20])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_entropy_and_accuracy_are_those_of_the_distribution(
    temperature: float, cached_logits: int, monkeypatch: pytest.MonkeyPatch
):
    """torch.distributions is the witness, whether one, some or all tokens are looked at together."""
    monkeypatch.setattr(losses, "CACHED_LOGITS", cached_logits)
    model, batch = tiny_model().eval(), batch_of([3, 5, 2])
    batch.tokens[:, :2] = 30
    metrics = token_metrics(model, batch, temperature)
    logits, loss_mask = model(batch.idx) / temperature, batch.extras["loss_mask"]
    entropy = torch.distributions.Categorical(logits=logits).entropy()[loss_mask].mean().item()
    accuracy = float((logits.argmax(-1) == batch.targets)[loss_mask].float().mean())
    assert mean(metrics["entropy"]) == pytest.approx(entropy, rel=1e-5)
    assert mean(metrics["mean_token_accuracy"]) == pytest.approx(accuracy)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_log_probabilities_are_those_of_the_tempered_softmax(temperature):
    model, batch = tiny_model(logit_softcap=3.0).eval(), batch_of([3, 5, 2])
    loss_mask = batch.extras["loss_mask"]
    logps = (model(batch.idx) / temperature).log_softmax(-1)  # (B, T, V)
    expected = logps.gather(-1, batch.targets[..., None])[..., 0] * loss_mask
    torch.testing.assert_close(per_token_logps(model, batch.tokens, loss_mask, temperature), expected)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_bfloat16_logits_are_tempered_in_float32(temperature: float):
    """As a rollout does. Divided in bfloat16, with 8 bits, log-probabilities were off by up to 0.4."""
    model, batch = tiny_model().eval(), batch_of([3, 5, 2])
    model.compute_dtype = torch.bfloat16
    loss_mask = batch.extras["loss_mask"]
    logps = (model(batch.idx).double() / temperature).log_softmax(-1)
    expected = logps.gather(-1, batch.targets[..., None])[..., 0] * loss_mask
    tempered = per_token_logps(model, batch.tokens, loss_mask, temperature)
    torch.testing.assert_close(tempered.double(), expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# however a step is cut into micro-batches and ranks, it is the same

SGD = [
    "--optimizer=sgd",
    "--learning_rate=0.05",
    "--weight_decay=0",
    "--max_iters=4",
    "--eval_interval=4",
    "--eval_samples=0",
    "--log_data_hash",
]
GRPO_FLAGS = [
    "--objective=grpo",
    "--dataset=sums",
    "--num_generations=4",
    "--max_new_tokens=3",
    "--temperature=1.5",
    "--reward=length",
]


def batch_flags(batch_size: int, accumulation: int) -> list[str]:
    return [f"--batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation}"]


def run_cuts(run, flags: list[str], cuts=((4, 1), (2, 2), (1, 4))) -> tuple:
    """The run of one micro-batch a step, and those of several, which read the same rows."""
    one, *others = [run(*flags, *batch_flags(*cut), name=f"micro_batch_{cut[0]}") for cut in cuts]
    for other in others:
        assert metric(one, "data_hash") == metric(other, "data_hash")
    return one, others


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [[], ["--packing", "--block_size=24"], ["--loss_on=all"]], ids=["padded", "packed", "all"]
)
def test_fine_tuning_averages_over_the_tokens_of_the_step(run, base: Path, flags):
    """Completions of 1 and 2 digits: means of micro-batches' means would differ."""
    one, others = run_cuts(run, ["--objective=sft", "--dataset=sums", f"--init_from={base}", *SGD, *flags])
    for other in others:
        assert_same_run(one, other, "mean_token_accuracy", "entropy", "tokens")


def kto_flags(folder: Path) -> list[str]:
    """Completions of which 7 is always desirable, so that it becomes likelier after other prompts too: the KL grows."""
    rows = [{"prompt": f"{i}+{i % 7}=", "completion": "7" if i % 3 else "9", "label": bool(i % 3)} for i in range(12)]
    path = folder / "sevens.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"--train_file={path}", f"--validation_file={path}"]
    return ["--objective=kto", *files, "--undesirable_weight=0.1", "--beta=0.5"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("adapter", [[], ["--adapter=lora"]], ids=["full", "lora"])
def test_preferences_are_the_same_however_a_step_is_cut(run, base: Path, objective, tmp_path: Path, adapter):
    """KTO's reference point is that of all rows of the step."""
    flags = kto_flags(tmp_path) if objective == "kto" else ["--objective=dpo", "--dataset=pairs"]
    one, others = run_cuts(run, [*flags, f"--init_from={base}", *SGD, "--learning_rate=0.3", *adapter])
    names = ["logps/chosen", "rewards/chosen", "rewards/rejected"]
    names += ["kl"] if objective == "kto" else ["rewards/margins", "rewards/accuracies"]
    for other in others:
        for name in ("loss", "grad_norm"):
            assert metric(other, name) == pytest.approx(metric(one, name), rel=1e-4)
        assert_same_lines(one.train, other.train, names)
    if objective == "kto":
        assert min(metric(one, "kl")[1:]) > 1e-3
    assert one.losses[0] != one.losses[-1]


@pytest.mark.slow
def test_kto_takes_odd_steps_and_refuses_one_row(run, base: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    flags = [*kto_flags(tmp_path), f"--init_from={base}", *SGD, "--learning_rate=0.3"]
    one = run(*flags, *batch_flags(3, 1), name="one")
    three = run(*flags, *batch_flags(1, 3), name="three")
    assert three.losses == pytest.approx(one.losses, rel=1e-5) and max(metric(one, "kl")) > 1e-3
    assert three.evals[0]["val_loss"] > 0, "batches of two rows, since one row has no other completion"
    (tmp_path / "lone.jsonl").write_text('{"prompt": "1+1=", "completion": "2", "label": true}\n')
    with pytest.raises(UserError, match="--objective=kto: sevens, val"):
        run(*flags, f"--validation_file={tmp_path / 'lone.jsonl'}", name="lone")
    with pytest.raises(SystemExit):
        train_args.parse([*TINY_WITHOUT_SHAPE, *flags, *batch_flags(1, 1)])
    assert "--batch_size=1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("loss_type, scale", [("grpo", "group"), ("dr_grpo", "batch"), ("dapo", "none")])
def test_grpo_is_the_same_however_a_step_is_cut(run, base: Path, loss_type, scale):
    flags = [f"--loss_type={loss_type}", f"--scale_rewards={scale}", "--num_iterations=2"]
    one, others = run_cuts(run, [*GRPO_FLAGS, f"--init_from={base}", *SGD, *flags], cuts=((8, 1), (4, 2), (1, 8)))
    names = ["reward", "kl", "clip_ratio/low", "clip_ratio/high", "completions/mean_length"]
    for other in others:
        assert_same_run(one, other, *names)
    assert max(map(abs, metric(one, "grad_norm"))) > 1e-3


FLAGS_ON_RANKS = {
    "sft": ["--objective=sft", "--dataset=sums", *batch_flags(2, 2)],
    "dpo": ["--objective=dpo", "--dataset=pairs", *batch_flags(2, 2), "--learning_rate=0.3"],
    "dpo_cache": ["--objective=dpo", "--dataset=pairs", "--reference=cache", *batch_flags(2, 2), "--learning_rate=0.3"],
    "kto": [*batch_flags(2, 3), "--learning_rate=0.3"],
    "grpo": [*GRPO_FLAGS, "--loss_type=dapo", "--scale_rewards=batch", *batch_flags(8, 1)],
}
NOT_COMPARED = ("seconds", "step_ms", "tokens_per_second", "mfu", "peak_memory_mb")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, parallel",
    [*((name, "ddp") for name in FLAGS_ON_RANKS), *((name, "fsdp") for name in ("sft", "dpo", "kto", "grpo"))],
)
def test_two_ranks_are_one(tmp_path: Path, data_dir: Path, base: Path, name, parallel):
    """The same examples, of GRPO the same completions; the same losses and metrics."""
    flags = [*TINY_WITHOUT_SHAPE, f"--init_from={base}", *SGD, "--eval_interval=2", *FLAGS_ON_RANKS[name]]
    if name == "kto":
        flags += kto_flags(tmp_path)
    done = {}
    for world_size in (1, 2):
        folder = data_dir
        if name == "dpo_cache":  # which a run writes beside the data
            folder = tmp_path / f"data_{world_size}"
            shutil.copytree(data_dir / "pairs", folder / "pairs")
        parallel_flags = [f"--parallel={parallel}"] if world_size == 2 else []
        out_dir = tmp_path / f"run_{world_size}"
        done[world_size] = run_on_ranks(out_dir, world_size, *flags, f"--data_dir={folder}", *parallel_flags)
    one, two = done[1], done[2]
    assert metric(one, "data_hash") == metric(two, "data_hash")
    names = [key for key, value in one.train[0].items() if isinstance(value, float) and key not in NOT_COMPARED]
    assert {"loss", "grad_norm", "entropy"} <= set(names)
    assert_same_lines(one.train, two.train, names)
    eval_names = ["val_loss", "train_loss"]
    if name == "grpo":
        eval_names.append("val_reward")
    assert_same_lines(one.evals, two.evals, eval_names)
    if name == "kto":
        assert min(metric(one, "kl")[1:]) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# packing


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"position": "rope", "window": "SL", "window_size": 4, "n_kv_head": 2},
        {"position": "none", "value_residual": True},
        {"activation_checkpointing": True, "position": "rope"},
    ],
)
def test_packed_examples_have_the_loss_and_gradient_of_padded_ones(variant):
    rng = np.random.default_rng(0)
    encoder = ExampleEncoder(CharTokenizer("0123456789+=", has_eos=True), 24)
    rows = [
        {
            "prompt": "".join(rng.choice(list("0123456789+="), rng.integers(1, 8))),
            "completion": "".join(rng.choice(list("0123456789"), rng.integers(0, 6))),
        }
        for _ in range(17)
    ]
    padded = encode_rows(rows, encoder, "prompt_completion", "x").examples
    packed = pack(padded, 24)
    assert len(packed) < len(padded) / 1.8
    losses, metrics, gradients = [], [], []
    for examples in (padded, packed):
        batch = Collator()(examples, range(len(examples)))
        assert batch.num_loss_tokens == sum(len(row["completion"]) + 1 for row in rows)
        model = tiny_model(block_size=24, **variant)
        loss, batch_metrics = SFT()(model, batch, with_metrics=True)
        loss.backward()
        losses.append(loss.item())
        metrics.append({name: mean(pair) for name, pair in batch_metrics.items()})
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    "variant",
    [{}, {"position": "rope", "window": "SL", "window_size": 5, "n_kv_head": 2}, {"activation_checkpointing": True}],
)
def test_a_shared_prompt_changes_no_log_probability(variant):
    """Nor a gradient: pairs in one row, of every kind of prompt, and each completion in a row of its own."""
    encoder = ExampleEncoder(CharTokenizer("0123456789+=", has_eos=True), 24)
    prompts = [("12+34=", "12+34="), ("1", "1"), ("", ""), ("12+", "12="), ("5", "6")]
    rows = [
        {"chosen": encoder.prompt_completion({"prompt": first, "completion": "46"[:i]}, "completion")}
        | {"rejected": encoder.prompt_completion({"prompt": second, "completion": "4567"}, "completion")}
        for i, (first, second) in enumerate(prompts)
    ]
    pairs = PreferenceCollator()([Example((row["chosen"], row["rejected"]), {}) for row in rows], range(len(rows)))
    singles = Collator()([Example((row[kind],), {}) for kind in rows[0] for row in rows], range(2 * len(rows)))
    model = tiny_model(block_size=24, vocab_sizes=(13,), **variant)
    sums, gradients = [], []
    for batch in (pairs, singles):
        logps = per_token_logps(model, batch.tokens, batch.extras["loss_mask"], **position_kwargs(batch))
        logps = pair_sums(logps, pairs.extras["is_rejected"]) if batch is pairs else logps.sum(1).view(2, -1).T
        sums.append(logps)
        gradients.append(torch.autograd.grad((logps * torch.tensor([1.0, -2.0])).sum(), list(model.parameters())))
    torch.testing.assert_close(sums[0], sums[1])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-5)
    n_shared = sum(max(0, len(first) - 1) for first, second in prompts if first == second)
    assert (pairs.tokens != 0).sum() <= sum(len(sequence.ids) for row in rows for sequence in row.values()) - n_shared


# ---------------------------------------------------------------------------------------------------------------------
# the reference model


@pytest.mark.slow
def test_the_reference_cache_is_reused_and_depends_on_the_weights(run, base: Path, tmp_path: Path, data_dir: Path):
    """A run takes its numbers, as a changed one shows; other weights have files of their own."""
    shutil.copytree(data_dir / "pairs", tmp_path / "data/pairs")
    flags = ["--objective=dpo", "--dataset=pairs", f"--data_dir={tmp_path / 'data'}", "--reference=cache"]
    flags += [*SGD, "--max_iters=2", "--batch_size=110"]
    first = run(*flags, f"--init_from={base}", name="first")
    files = sorted((tmp_path / "data/pairs").glob("reference_*.safetensors"))
    assert [path.name.split("_")[1] for path in files] == ["train", "val"]
    mtimes = [path.stat().st_mtime_ns for path in files]

    again = run(*flags, f"--init_from={base}", name="again")
    assert again.losses == first.losses and equal_tensors(again.last.weights, first.last.weights)
    assert [path.stat().st_mtime_ns for path in files] == mtimes

    logps = checkpoint.read_tensors(files[0])["logps"]
    checkpoint.write_tensors(files[0], {"logps": logps - torch.tensor([10.0, 0.0])})  # each margin grows by 10 beta
    changed = run(*flags, f"--init_from={base}", name="changed")
    assert changed.losses[0] == pytest.approx(np.log(1 + np.exp(-0.1 * 10)), rel=1e-4)
    assert changed.evals[0]["val_loss"] == first.evals[0]["val_loss"]

    run(*flags, f"--init_from={first.out_dir}", name="other")
    assert len(list((tmp_path / "data/pairs").glob("reference_*.safetensors"))) == 4


SOFT_PROMPT = ["--adapter=soft_prompt", "--prompt_format=<P*3>{prompt}", "--block_size=16"]
ADAPTERS = {"none": [], "lora": ["--adapter=lora", "--lora_dropout=0.3"], "soft_prompt": SOFT_PROMPT}
LN_2 = math.log(2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter, reference",
    [
        ("none", "copy"),
        ("lora", "adapter"),
        ("lora", "cache"),
        *(("soft_prompt", kind) for kind in ("adapter", "copy")),
    ],
)
def test_the_first_loss_of_dpo_is_ln_2(
    run: Train, base: Path, tmp_path: Path, data_dir: Path, adapter: str, reference: str
):
    """Policy and reference are one model, also where dropout is set: --disable_dropout is TRL's default too."""
    shutil.copytree(data_dir / "pairs", tmp_path / "data/pairs")
    flags = ["--objective=dpo", "--dataset=pairs", f"--data_dir={tmp_path / 'data'}", f"--init_from={base}"]
    flags += [f"--reference={reference}", *ADAPTERS[adapter], "--dropout=0.2", "--max_iters=1", "--eval_samples=0"]
    done = run(*flags)
    assert done.losses == pytest.approx([LN_2], abs=1e-6)
    assert "--dropout=0.2" in done.console, "the summary says that it is not applied"


@pytest.mark.slow
def test_a_cache_is_that_of_one_start(run: Train, base: Path, tmp_path: Path, data_dir: Path):
    """Another seed draws another soft prompt, whose log-probabilities are not those in the folder."""
    shutil.copytree(data_dir / "pairs", tmp_path / "data/pairs")
    flags = ["--objective=dpo", "--dataset=pairs", f"--data_dir={tmp_path / 'data'}", f"--init_from={base}"]
    flags += ["--reference=cache", *SOFT_PROMPT, "--max_iters=1", "--eval_samples=0"]
    for seed in (1, 7):
        assert run(*flags, f"--seed={seed}", name=f"seed_{seed}").losses == pytest.approx([LN_2], abs=1e-6)


@pytest.mark.slow
def test_the_reference_never_drops_out(run: Train, base: Path):
    """With dropout in the policy alone: its log-probabilities less the rewards are those of a run without dropout."""
    flags = ["--objective=dpo", "--dataset=pairs", f"--init_from={base}", "--adapter=lora", "--max_iters=1"]
    flags += ["--eval_iters=1", "--eval_samples=0"]
    (plain,) = run(*flags, name="plain").train
    (dropped,) = run(*flags, "--no-disable_dropout", "--dropout=0.3", "--lora_dropout=0.3", name="dropped").train
    assert plain["rewards/chosen"] == 0 and abs(dropped["rewards/chosen"]) > 1e-3
    for kind in ("chosen", "rejected"):
        ref_logps = dropped[f"logps/{kind}"] - dropped[f"rewards/{kind}"] / 0.1
        assert ref_logps == pytest.approx(plain[f"logps/{kind}"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["soft_prompt", "new_tokens"])
def test_the_reference_stays_what_it_was_with_another_seed(run: Train, base: Path, tmp_path: Path, start: str):
    """What training started from beyond the base: a soft prompt's rows, or those of tokens that the base lacks."""
    flags = ["--objective=dpo", f"--init_from={base}", "--max_iters=2", "--eval_samples=0", "--learning_rate=0.05"]
    changed = ["--seed=7"]
    if start == "soft_prompt":
        flags += ["--dataset=pairs", *SOFT_PROMPT, "--reference=copy"]
        changed.append("--prompt_init=normal")
    else:
        for split in ("train", "val"):
            rows = [
                {"prompt": [{"role": "user", "content": f"{i}+1="}], "chosen": "1", "rejected": "2"} for i in range(8)
            ]
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags += [f"--train_file={tmp_path}/train.jsonl", f"--validation_file={tmp_path}/val.jsonl", "--block_size=16"]
    began = run(*flags).evals[-1]
    for max_iters in (4, 6):  # resumed twice, and trained no further
        steps = [f"--max_iters={max_iters}", f"--eval_interval={max_iters}"]
        resumed = run("--init_from=resume", *steps, "--learning_rate=0", "--weight_decay=0", *changed).evals[-1]
        for name in ("val_rewards/chosen", "val_rewards/rejected", "val_logps/chosen"):
            assert resumed[name] == pytest.approx(began[name], abs=1e-5) and resumed[name] != 0


@pytest.mark.slow
def test_a_cache_that_cannot_be_used_costs_no_run(
    run: Train, base: Path, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """Damaged, it is computed again; in a folder that can't be written, it is not kept."""
    shutil.copytree(data_dir / "pairs", tmp_path / "data/pairs")
    flags = ["--objective=dpo", "--dataset=pairs", f"--data_dir={tmp_path / 'data'}", f"--init_from={base}"]
    flags += ["--reference=cache", "--max_iters=1", "--eval_samples=0"]
    run(*flags, name="first")
    train_file, val_file = sorted((tmp_path / "data/pairs").glob("reference_*"))
    train_file.write_bytes(train_file.read_bytes()[:100])
    val_file.unlink()

    def full(path: Path, tensors: dict) -> None:
        raise UserError(f"{path}: can't be written (No space left on device)")

    monkeypatch.setattr(reference.checkpoint, "write_tensors", full)
    done = run(*flags, name="again")
    assert done.losses == pytest.approx([LN_2], abs=1e-6) and done.console.count("No space left") == 2


REFERENCES = [[], ["--adapter=lora"], ["--adapter=lora", "--reference=copy"]]


@pytest.mark.slow
@pytest.mark.parametrize("objective, dataset", [("dpo", "pairs"), ("kto", "labelled")])
@pytest.mark.parametrize("reference", REFERENCES, ids=["copy", "adapter", "lora_copy"])
def test_a_resumed_run_has_the_same_reference(run, base: Path, objective, dataset, reference):
    """Bit for bit the run that never stopped, whose rewards are measured from the base."""
    flags = [f"--objective={objective}", f"--dataset={dataset}", f"--init_from={base}", *reference]
    flags += ["--max_iters=4", "--eval_interval=2", "--eval_samples=0", "--learning_rate=0.01"]
    straight = run(*flags, name="straight")
    run(*flags, "--max_iters=2", name="resumed")
    resumed = run("--init_from=resume", "--max_iters=4", name="resumed")
    assert resumed.losses == straight.losses
    assert equal_tensors(resumed.last.weights, straight.last.weights)
    assert equal_tensors(resumed.last.optimizer, straight.last.optimizer)
    assert metric(resumed, "rewards/chosen") == metric(straight, "rewards/chosen")
    assert straight.train[-1]["rewards/chosen"] != 0


def test_a_base_that_changed_is_no_reference(run, base: Path, tmp_path: Path):
    """On resume its weights are compared by their hash."""
    shutil.copytree(base, tmp_path / "base")
    run("--objective=dpo", "--dataset=pairs", f"--init_from={tmp_path / 'base'}", "--max_iters=2")
    weights = checkpoint.read_tensors(tmp_path / "base/model.safetensors")
    weights["norm.weight"][0] += 1e-3
    checkpoint.write_tensors(tmp_path / "base/model.safetensors", weights)
    (tmp_path / "base/manifest.json").unlink()
    with pytest.raises(UserError, match=f"{tmp_path / 'base'}"):
        run("--init_from=resume", "--max_iters=4")
