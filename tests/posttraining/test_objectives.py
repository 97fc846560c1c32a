"""Objectives: the numbers of the reference implementations, TRL's own functions, finite differences, and sums that no way of cutting a step changes."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY_WITHOUT_SHAPE, assert_same_lines, equal_tensors, metric, run_on_ranks, tiny_model
from torch import nn

import train_args
from nanoforge.data.batches import Batch
from nanoforge.data.tokenization import CharTokenizer
from nanoforge.distributed import Ranks
from nanoforge.errors import UserError
from nanoforge.posttraining import objectives
from nanoforge.posttraining.examples import Collator, ExampleEncoder, Examples
from nanoforge.posttraining.objectives import (
    DPO,
    DPO_LOSSES,
    GRPO,
    KTO,
    SFT,
    Reference,
    advantages,
    kto_loss,
)
from nanoforge.training import checkpoint

ONE = Ranks(0, 1, torch.device("cpu"))


def assert_same_run(a, b, *names: str) -> None:
    """Losses, gradients' norms, weights and further metrics, all within 1e-5."""
    for name in ("loss", "grad_norm", *names):
        assert metric(a, name) == pytest.approx(metric(b, name), rel=1e-5, abs=1e-6), name
    for name, weight in a.last.weights.items():
        torch.testing.assert_close(weight, b.last.weights[name], atol=1e-5, rtol=1e-5, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# a net that gives each id a log-probability of its own: a row of the tests' batches is the ids of its tokens


class Table(nn.Module):
    """Id j has the log-probability values[j - 1] wherever it is; ids that are not learned would have 7."""

    def __init__(self, values):
        super().__init__()
        values = torch.as_tensor(values)
        self.logp = nn.Parameter(torch.cat((values.new_full((1,), 7.0), values)))

    def forward(self, idx, targets=None, position_ids=None, temperature=1.0):
        return torch.zeros(*idx.shape, len(self.logp)) if targets is None else -self.logp[targets]


def spread(sums, lengths):
    """Log-probabilities of tokens with these sums a row, none like another."""
    return torch.cat(
        [total / n + 0.01 * (torch.arange(n) - (n - 1) / 2) for total, n in zip(sums, lengths, strict=True)]
    ).double()


def rows_of(lengths, first: int = 1) -> Batch:
    """Rows of so many learned tokens behind two that are not; their ids count from `first` on."""
    width = 2 + max(lengths)
    tokens, mask = (
        torch.zeros(len(lengths), width, dtype=torch.long),
        torch.zeros(len(lengths), width - 1, dtype=torch.bool),
    )
    for row, n in enumerate(lengths):
        tokens[row, 2 : 2 + n], mask[row, 1 : 1 + n] = torch.arange(first, first + n), True
        first += n
    return Batch(tokens, {"loss_mask": mask}, 1, float(sum(lengths)))


def ratio(told) -> float:
    return float(told[0] / told[1])


# ---------------------------------------------------------------------------------------------------------------------
# preferences

CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED = [-10.0, -12.0], [-11.0, -9.0], [-10.5, -11.5], [-10.8, -9.6]
LENGTHS = [5, 6, 4, 3]  # chosen, then rejected
DPO_NUMBERS = [
    ("sigmoid", 0.0, 0.704209), ("hinge", 0.0, 1.020000), ("ipo", 0.0, 25.718056), ("sigmoid_norm", 0.0, 0.696545), ("robust", 0.1, 0.706709),
    ("apo_zero", 0.0, 1.004998), ("sigmoid", 0.1, 0.702209),
]  # fmt: skip


@pytest.mark.parametrize("name, smoothing, number", DPO_NUMBERS)
def test_dpo_losses_are_the_reference_numbers(name, smoothing, number):
    function, per_token, _ = DPO_LOSSES[name]
    a, d = (
        torch.tensor(policy) - torch.tensor(reference)
        for policy, reference in ((CHOSEN, REFERENCE_CHOSEN), (REJECTED, REFERENCE_REJECTED))
    )
    if per_token:
        a, d = a / torch.tensor(LENGTHS[:2]), d / torch.tensor(LENGTHS[2:])
    assert float(function(a, d, 0.1, smoothing).mean()) == pytest.approx(number, abs=1e-5)


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("name, smoothing, number", DPO_NUMBERS)
def test_dpo_from_a_nets_log_probabilities(name, smoothing, number, cut):
    """Also in two micro-batches of one pair, whose losses add up."""
    net, begun = (
        Table(spread(CHOSEN + REJECTED, LENGTHS)),
        Table(spread(REFERENCE_CHOSEN + REFERENCE_REJECTED, LENGTHS)),
    )
    objective = DPO(name, 0.1, smoothing, Reference(begun, nullcontext))
    whole = rows_of(LENGTHS)
    parts = [
        Batch(whole.tokens[i::cut], {"loss_mask": whole.extras["loss_mask"][i::cut]}, cut) for i in range(cut)
    ]  # a pair's rows are two apart
    results = [objective(net, batch, True) for batch in objective.prepare(net, parts)]
    assert sum(loss.item() for loss, _ in results) == pytest.approx(number, abs=1e-5)
    told = {key: ratio(sum(more[key] for _, more in results)) for key in results[0][1]}
    expected = {
        "loss": number,
        "rewards/chosen": 0.0,
        "rewards/rejected": 0.02,
        "rewards/margins": -0.02,
        "rewards/accuracies": 0.5,
        "logps/chosen": -11.0,
        "logps/rejected": -10.0,
    }
    assert {key: told[key] for key in expected} == pytest.approx(expected, abs=1e-5)
    assert told["entropy"] == pytest.approx(np.log(len(net.logp)), abs=1e-5), "of the stand-in's uniform distribution"


def kto_batch():
    batch, strangers = rows_of([2, 1, 3, 2]), rows_of([1, 1, 1, 1], first=9)
    more = {
        "desirable": torch.tensor([True, False, True, False]),
        "kl_completion": strangers.tokens,
        "kl_completion_mask": strangers.extras["loss_mask"],
    }
    return batch.with_tensors(**more)


@pytest.mark.parametrize("sign, z, number", [(1, 0.2, 0.584998), (-1, 0.0, 0.585824)])
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_kto_is_the_reference_numbers(sign, z, number, cut):
    r, strange = torch.tensor([0.5, -0.2, -0.5, 0.6]), sign * torch.tensor([0.4, -0.1, 0.3, 0.2])
    assert float(
        kto_loss(r, strange.mean().clamp(min=0), torch.tensor([True, False, True, False]), 0.1, 1.0, 1.33).mean()
    ) == pytest.approx(number, abs=1e-5)
    net = Table(
        torch.cat((spread([-3.0 + 0.5, -2.0 - 0.2, -4.0 - 0.5, -5.0 + 0.6], [2, 1, 3, 2]), (strange - 1).double()))
    )
    begun = Table(torch.cat((spread([-3.0, -2.0, -4.0, -5.0], [2, 1, 3, 2]), torch.full((4,), -1.0).double())))
    objective, whole = KTO(0.1, 1.0, 1.33, Reference(begun, nullcontext), ONE), kto_batch()
    parts = [
        Batch(whole.tokens[i::cut], {name: value[i::cut] for name, value in whole.extras.items()}, cut)
        for i in range(cut)
    ]
    results = [objective(net, batch, True) for batch in objective.prepare(net, parts)]
    assert sum(loss.item() for loss, _ in results) == pytest.approx(number, abs=1e-5)
    told = {key: ratio(sum(more[key] for _, more in results)) for key in results[0][1]}
    expected = {
        "loss": number,
        "kl": z,
        "rewards/chosen": 0.0,
        "rewards/rejected": 0.02,
        "logps/chosen": -3.5,
        "logps/rejected": -3.3,
    }
    assert {key: told[key] for key in expected} == pytest.approx(expected, abs=1e-5)


def test_ktos_reference_point_has_no_gradient():
    r = torch.zeros(4, dtype=torch.double)
    net = Table(torch.cat((spread(r - 1, [2, 1, 3, 2]), torch.full((4,), -0.5).double())))
    begun = Table(torch.cat((spread(r - 1, [2, 1, 3, 2]), torch.full((4,), -1.0).double())))
    objective = KTO(0.1, 1.0, 1.0, Reference(begun, nullcontext), ONE)
    objective(net, objective.prepare(net, [kto_batch()])[0], False)[0].backward()
    assert (net.logp.grad[1:9] != 0).all() and (net.logp.grad[9:] == 0).all() and net.logp.grad[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# reinforcement

LP = [[-1, -0.5, -0.2], [-0.7, -0.9], [-0.3], [-0.4, -0.6]]
OLD = [[-1.4, -0.5, -0.1], [-1.1, -0.6], [-0.3], [-0.5, -0.6]]
REF = [[-1.1, -0.6, -0.2], [-0.9, -0.7], [-0.2], [-0.4, -0.8]]
GROUP_A = torch.tensor([0.707007, -0.707007, 0.0, 0.0])
GRPO_NUMBERS = [
    ("grpo", "token", 0.2, 0.020370), ("bnpo", "token", 0.2, -0.071114), ("dapo", "token", 0.2, -0.071114), ("dr_grpo", "token", 0.2, -0.035557),
    ("grpo", "sequence", 0.2, -0.008770), ("grpo", "token", 0.6, 0.003177),
]  # fmt: skip


def test_advantages_are_the_reference_numbers():
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5])
    torch.testing.assert_close(advantages(rewards, 2, "group"), GROUP_A, atol=1e-5, rtol=0)
    centred, spread_of_all = np.array([0.5, -0.5, 0, 0]), np.std([1, 0, 0.5, 0.5], ddof=1)
    torch.testing.assert_close(
        advantages(rewards, 2, "batch").double(), torch.tensor(centred / (spread_of_all + 1e-4)), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(advantages(rewards, 2, "none").double(), torch.tensor(centred))
    torch.testing.assert_close(
        advantages(rewards, 2, "batch", torch.tensor(2.0)).double(), torch.tensor(centred / 2.0001), atol=1e-6, rtol=0
    )


def flat(rows) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.double)


def padded(rows, mask) -> torch.Tensor:
    """The values of learned tokens at their places."""
    out = torch.zeros(mask.shape, dtype=torch.double)
    out[mask] = flat(rows)
    return out


def grpo_batch() -> Batch:
    batch = rows_of([len(row) for row in LP])
    return batch.with_tensors(old_logps=padded(OLD, batch.extras["loss_mask"]), advantages=GROUP_A.double())


@pytest.mark.parametrize("aggregation, level, high, number", GRPO_NUMBERS)
@pytest.mark.parametrize("cut", [1, 2])
def test_grpo_is_the_reference_numbers(aggregation, level, high, number, cut):
    """Whole, and in two micro-batches, whose losses add up; bnpo's has tokens of its own to divide by."""
    if cut == 2 and aggregation == "bnpo":
        parts_numbers = [clipped(range(2)), clipped(range(2, 4))]
        number = sum(parts_numbers) / 2
    net, whole = Table(flat(LP)), grpo_batch()
    objective = GRPO(aggregation, 0.2, high, 0.08, level, 1.0, 4, Reference(Table(flat(REF)), nullcontext))
    rows = [slice(0, 4)] if cut == 1 else [slice(0, 2), slice(2, 4)]
    parts = [
        Batch(
            whole.tokens[some], {name: value[some] for name, value in whole.extras.items()}, cut, whole.num_loss_tokens
        )
        for some in rows
    ]
    results = [objective(net, batch, True) for batch in objective.prepare(net, parts)]
    assert sum(loss.item() for loss, _ in results) == pytest.approx(number, abs=1e-5)
    told = {key: ratio(sum(more[key] for _, more in results)) for key in results[0][1]}
    assert told["kl"] == pytest.approx(0.009214, abs=1e-5) and told["loss"] == pytest.approx(number, abs=1e-5)
    errors = [abs(lp - old) for lps, olds in zip(LP, OLD, strict=True) for lp, old in zip(lps, olds, strict=True)]
    assert told["rollout_logp_error"] == pytest.approx(np.mean(errors), abs=1e-6)
    if level == "token":
        w = np.exp(flat(LP) - flat(OLD)).numpy()
        A = np.repeat(GROUP_A.numpy(), [len(row) for row in LP])
        assert told["clip_ratio/low"] == pytest.approx(((w < 0.8) & (A < 0)).mean()) and told[
            "clip_ratio/high"
        ] == pytest.approx(((w > 1 + high) & (A > 0)).mean())


def clipped(rows) -> float:
    """REFERENCES.md's token loss, its mean over the tokens of these rows, in numpy."""
    losses = []
    for row in rows:
        A = float(GROUP_A[row])
        for lp, old, ref in zip(LP[row], OLD[row], REF[row], strict=True):
            w = np.exp(lp - old)
            losses.append(-min(w * A, np.clip(w, 0.8, 1.2) * A) + 0.08 * (np.exp(ref - lp) - (ref - lp) - 1))
    return float(np.mean(losses))


def test_on_its_own_samples_the_gradient_is_reinforces():
    """Where the policy is still the one that sampled, w is 1 and the gradient of the loss -A grad logp (Williams 1992)."""
    net, batch = Table(flat(OLD)), grpo_batch()
    loss, told = GRPO("dapo", 0.2, 0.2, 0.0, "token", 1.0, 4, None)(net, batch, True)
    loss.backward()
    expected = -torch.repeat_interleave(GROUP_A.double(), torch.tensor([3, 2, 1, 2])) / 8
    torch.testing.assert_close(net.logp.grad[1:], expected)
    assert ratio(told["rollout_logp_error"]) == ratio(told["clip_ratio/low"]) == ratio(told["clip_ratio/high"]) == 0


def test_a_row_without_learned_tokens_adds_nothing():
    """As --mask_truncated leaves them."""
    for aggregation in ("grpo", "bnpo", "dapo", "dr_grpo"):
        batch = grpo_batch()
        batch.extras["loss_mask"][:] = False
        net = Table(flat(LP))
        loss, _ = GRPO(aggregation, 0.2, 0.2, 0.08, "sequence", 1.0, 4, Reference(Table(flat(REF)), nullcontext))(
            net, batch.with_tensors(ref_logps=torch.zeros(batch.extras["loss_mask"].shape)), False
        )
        loss.backward()
        assert loss.item() == 0 and (net.logp.grad == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# gradients by finite differences


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_gradients_of_preferences_by_finite_differences(name):
    torch.manual_seed(0)
    a, d = (torch.randn(5, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, d: DPO_LOSSES[name][0](a, d, 0.7, 0.1), (a, d))


@pytest.mark.parametrize("kind", ["dpo", "kto", "token", "sequence"])
def test_gradients_through_the_objectives_by_finite_differences(kind):
    objective, batch, values = {
        "dpo": (DPO("ipo", 0.1, 0.0, None), rows_of(LENGTHS).with_tensors(ref_logps=torch.tensor(REFERENCE_CHOSEN + REFERENCE_REJECTED)), spread(CHOSEN + REJECTED, LENGTHS)),
        "kto": (KTO(0.3, 1.0, 1.3, None, ONE), kto_batch().with_tensors(kl=torch.tensor(0.2), ref_logps=torch.full((4,), -3.0)), spread([-2.5, -2.2, -4.5, -4.4, -1, -1, -1, -1], [2, 1, 3, 2, 1, 1, 1, 1])),
        "token": (GRPO("grpo", 0.2, 0.2, 0.08, "token", 1.0, 4, object()), grpo_batch().with_tensors(ref_logps=padded(REF, grpo_batch().extras["loss_mask"])), flat(LP)),
        "sequence": (GRPO("dapo", 0.2, 0.3, 0.08, "sequence", 1.0, 4, object()), grpo_batch().with_tensors(ref_logps=padded(REF, grpo_batch().extras["loss_mask"])), flat(LP)),
    }[kind]  # fmt: skip
    net = Table(values)
    assert torch.autograd.gradcheck(
        lambda logp: objective(lambda idx, targets, temperature: -logp[targets], batch, False)[0], (net.logp,)
    )


# ---------------------------------------------------------------------------------------------------------------------
# TRL's own losses, on log-probabilities from a stand-in for its model


class Gathered:
    """accelerate with one process."""

    device, num_processes, sync_gradients = torch.device("cpu"), 1, True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


class Metrics(dict):
    def __missing__(self, mode):
        self[mode] = {}
        self[mode] = type("Lists", (dict,), {"__missing__": lambda lists, name: lists.setdefault(name, [])})()
        return self[mode]


def trainer(**settings) -> SimpleNamespace:
    """What a loss of TRL's asks of its trainer."""
    common = {
        "model": SimpleNamespace(training=True),
        "accelerator": Gathered(),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "_metrics": Metrics(),
    }
    return SimpleNamespace(**common, **settings)


def outputs(log_probs):
    """What TRL's patched models return."""
    zeros = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None)


@pytest.mark.parametrize(
    "name, smoothing",
    [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.15), ("sigmoid_norm", 0.0), ("apo_zero", 0.0)],
)
@pytest.mark.parametrize("seed", range(3))
def test_dpo_equals_trls(name, smoothing, seed):
    """Loss, gradient and metrics; prompts of one length, completions of many."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    torch.manual_seed(seed)
    lengths = torch.randint(1, 7, (8,)).tolist()
    net, reference = Table(-4 * torch.rand(sum(lengths), dtype=torch.double)), -10 * torch.rand(8, dtype=torch.double)
    batch = rows_of(lengths)
    loss, told = DPO(name, 0.3, smoothing, None)(net, batch.with_tensors(ref_logps=reference), True)
    loss.backward()
    ours, net.logp.grad = net.logp.grad, None

    completion = torch.cat((torch.zeros(8, 1, dtype=torch.bool), batch.extras["loss_mask"]), 1)
    inputs = {
        "input_ids": batch.tokens,
        "attention_mask": torch.ones_like(batch.tokens),
        "completion_mask": completion.long(),
        "ref_chosen_logps": reference[:4],
        "ref_rejected_logps": reference[4:],
    }
    theirs = trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=0.3,
        label_smoothing=smoothing,
        use_weighting=False,
    )
    model = lambda input_ids, **given: outputs(net.logp[input_ids[:, 1:]] * batch.extras["loss_mask"])  # noqa: E731
    reference_loss = dpo_trainer.DPOTrainer._compute_loss(theirs, model, inputs, False)
    reference_loss.backward()
    assert loss.item() == pytest.approx(reference_loss.item(), abs=1e-9)
    torch.testing.assert_close(ours, net.logp.grad)
    logged = theirs._metrics["train"]
    for key in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    ):
        assert ratio(told[key]) == pytest.approx(logged[key][-1], abs=1e-5), key


@pytest.mark.parametrize("seed", range(4))
def test_kto_equals_trls(seed):
    """Loss, gradient, reference point and metrics; an odd number of rows, a reference point above 0 and below."""
    kto_trainer = pytest.importorskip("trl.trainer.kto_trainer")
    torch.manual_seed(seed)
    lengths = torch.randint(1, 7, (7,)).tolist()
    net = Table(-4 * torch.rand(sum(lengths) + 7, dtype=torch.double))
    begun = Table(net.logp.detach()[1:] + torch.randn(sum(lengths) + 7, dtype=torch.double))
    batch, strangers, label = (
        rows_of(lengths),
        rows_of([1] * 7, first=sum(lengths) + 1),
        torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.bool),
    )
    batch = batch.with_tensors(
        desirable=label, kl_completion=strangers.tokens, kl_completion_mask=strangers.extras["loss_mask"]
    )
    objective = KTO(0.3, 1.2, 0.7, Reference(begun, nullcontext), ONE)
    (prepared,) = objective.prepare(net, [batch])
    loss, told = objective(net, prepared, True)
    loss.backward()
    ours, net.logp.grad = net.logp.grad, None

    def logps(net, batch):
        return (net.logp[batch.tokens[:, 1:]] * batch.extras["loss_mask"]).sum(1).detach()

    completion = torch.cat((torch.zeros(7, 1, dtype=torch.bool), batch.extras["loss_mask"]), 1)
    inputs = {
        "input_ids": batch.tokens,
        "attention_mask": torch.ones_like(batch.tokens),
        "completion_mask": completion.long(),
        "label": label,
        "ref_logps": logps(begun, batch),
        "ref_KL_logps": logps(begun, strangers),
    }
    theirs = trainer(
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda model, given: logps(net, strangers),
    )
    model = lambda input_ids, **given: outputs(net.logp[input_ids[:, 1:]] * batch.extras["loss_mask"])  # noqa: E731
    reference_loss = kto_trainer.KTOTrainer._compute_loss(theirs, model, inputs, False)
    reference_loss.backward()
    assert loss.item() == pytest.approx(reference_loss.item(), abs=1e-7)
    torch.testing.assert_close(ours, net.logp.grad, atol=1e-7, rtol=1e-5)
    logged = theirs._metrics["train"]
    for key in ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        assert ratio(told[key]) == pytest.approx(logged[key][-1], abs=1e-5), key


@pytest.mark.parametrize("aggregation", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.08])
def test_grpo_equals_trls(aggregation, level, beta):
    """Loss, gradient, divergence and parts that are clipped."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    torch.manual_seed(5)
    lengths = torch.randint(1, 7, (8,)).tolist()
    batch = rows_of(lengths)
    mask, width = batch.extras["loss_mask"], max(lengths)
    net, old, ref = (
        Table(-2 * torch.rand(sum(lengths), dtype=torch.double)),
        torch.zeros(mask.shape, dtype=torch.double),
        torch.zeros(mask.shape, dtype=torch.double),
    )
    old[mask], ref[mask] = (
        net.logp.detach()[1:] + torch.randn(sum(lengths)).double() / 4,
        net.logp.detach()[1:] + torch.randn(sum(lengths)).double() / 4,
    )
    A = torch.randn(8, dtype=torch.double)
    objective = GRPO(aggregation, 0.2, 0.3, beta, level, 1.0, 9, object() if beta else None)
    loss, told = objective(net, batch.with_tensors(old_logps=old, advantages=A, ref_logps=ref), True)
    loss.backward()
    ours, net.logp.grad = net.logp.grad, None

    own = mask[:, 1:]  # behind the two tokens of the prompt
    theirs = trainer(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=level, beta=beta, loss_type=aggregation, epsilon_low=0.2, epsilon_high=0.3, use_vllm=False,
        max_completion_length=9, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda model, ids, *given, **more: (net.logp[ids[:, 2:]] * own, torch.zeros(8, width), None),
    )  # fmt: skip
    inputs = {"prompt_ids": batch.tokens[:, :2], "prompt_mask": torch.ones(8, 2), "completion_ids": batch.tokens[:, 2:], "completion_mask": own.long(), "advantages": A,
              "old_per_token_logps": old[:, 1:], "ref_per_token_logps": ref[:, 1:], "num_items_in_batch": torch.tensor(sum(lengths))}  # fmt: skip
    reference_loss = grpo_trainer.GRPOTrainer._compute_loss(theirs, None, inputs)
    reference_loss.backward()
    assert loss.item() == pytest.approx(reference_loss.item(), abs=1e-7)
    torch.testing.assert_close(ours, net.logp.grad, atol=1e-7, rtol=1e-5)
    logged = theirs._metrics["train"]
    if beta:
        assert ratio(told["kl"]) == pytest.approx(logged["kl"][-1], abs=1e-5)
    if level == "token":
        ours, theirs = (
            [told[f"clip_ratio/{end}"] for end in ("low", "high")],
            [logged[f"clip_ratio/{end}_mean"][-1] for end in ("low", "high")],
        )
        assert list(map(ratio, ours)) == pytest.approx(theirs) and min(theirs) > 0


# ---------------------------------------------------------------------------------------------------------------------
# the metrics of a real model


def test_entropy_and_accuracy_are_those_of_the_distribution():
    """torch.distributions is the witness, at a temperature too."""
    model, batch = tiny_model().eval(), rows_of([3, 5, 2])
    batch.tokens[:, :2] = 30
    for temperature in (1.0, 2.5):
        told = objectives.statistics(model, batch, temperature)
        logits, mask = model(batch.idx) / temperature, batch.extras["loss_mask"]
        assert ratio(told["entropy"]) == pytest.approx(
            torch.distributions.Categorical(logits=logits).entropy()[mask].mean().item(), rel=1e-5
        )
        assert ratio(told["mean_token_accuracy"]) == pytest.approx(
            float((logits.argmax(-1) == batch.targets)[mask].float().mean())
        )


def test_log_probabilities_are_those_of_the_tempered_softmax():
    model, batch = tiny_model(logit_softcap=3.0).eval(), rows_of([3, 5, 2])
    for temperature in (1.0, 0.4):
        plain = (model(batch.idx) / temperature).log_softmax(-1).gather(-1, batch.targets[..., None])[
            ..., 0
        ] * batch.extras["loss_mask"]
        torch.testing.assert_close(objectives.logps(model, batch.tokens, batch.extras["loss_mask"], temperature), plain)


# ---------------------------------------------------------------------------------------------------------------------
# no way of cutting a step changes it

CUTS = [(4, 1), (2, 2), (1, 4)]
SGD = [
    "--optimizer=sgd",
    "--learning_rate=0.05",
    "--weight_decay=0",
    "--max_iters=4",
    "--eval_interval=4",
    "--eval_samples=0",
    "--log_data_hash",
]


def cut(rows: int, accumulation: int) -> list[str]:
    return [f"--batch_size={rows}", f"--gradient_accumulation_steps={accumulation}"]


@pytest.mark.parametrize(
    "flags", [[], ["--packing", "--block_size=24"], ["--loss_on=all"]], ids=["padded", "packed", "all"]
)
def test_fine_tuning_weighs_the_tokens_of_the_whole_step(run, base, flags):
    """Completions of 1 and 2 digits: means of micro-batches' means would differ."""
    runs = [
        run("--objective=sft", "--dataset=sums", f"--init_from={base}", *SGD, *flags, *cut(*c), name=f"{c[0]}")
        for c in CUTS
    ]
    for other in runs[1:]:
        assert_same_run(runs[0], other, "mean_token_accuracy", "entropy", "tokens")
        assert metric(runs[0], "data_hash") == metric(other, "data_hash")


def agreeing(folder: Path) -> list[str]:
    """kto on completions of which 7 is always desirable, so that also another prompt's becomes likelier: a reference point above 0."""
    rows = [{"prompt": f"{i}+{i % 7}=", "completion": "7" if i % 3 else "9", "label": bool(i % 3)} for i in range(12)]
    path = folder / "agreeing.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--objective=kto",
        f"--train_file={path}",
        f"--validation_file={path}",
        "--undesirable_weight=0.1",
        "--beta=0.5",
    ]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("more", [[], ["--adapter=lora"]], ids=["full", "lora"])
def test_preferences_are_the_same_however_a_step_is_cut(run, base, objective, tmp_path, more):
    """kto's reference point is that of the whole step."""
    flags = agreeing(tmp_path) if objective == "kto" else ["--objective=dpo", "--dataset=pairs"]
    runs = [
        run(*flags, f"--init_from={base}", *SGD, "--learning_rate=0.3", *more, *cut(*c), name=f"{c[0]}") for c in CUTS
    ]
    names = [
        "logps/chosen",
        "rewards/chosen",
        "rewards/rejected",
        *(["kl"] if objective == "kto" else ["rewards/margins", "rewards/accuracies"]),
    ]
    for other in runs[1:]:
        assert metric(runs[0], "data_hash") == metric(other, "data_hash")
        for name in ("loss", "grad_norm"):
            assert metric(other, name) == pytest.approx(metric(runs[0], name), rel=1e-4)
        assert_same_lines(runs[0].train, other.train, names)
    assert objective == "dpo" or min(metric(runs[0], "kl")[1:]) > 1e-3
    assert runs[0].losses[0] != runs[0].losses[-1]


def test_kto_takes_odd_steps_and_refuses_one_row(run, base, capsys, tmp_path):
    flags = [*agreeing(tmp_path), f"--init_from={base}", *SGD, "--learning_rate=0.3"]
    whole, parts = run(*flags, *cut(3, 1), name="3"), run(*flags, *cut(1, 3), name="1")
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5) and max(metric(whole, "kl")) > 1e-3
    assert parts.evals[0]["val_loss"] > 0, "of two rows, as one is none"
    (tmp_path / "lone.jsonl").write_text('{"prompt": "1+1=", "completion": "2", "label": true}\n')
    with pytest.raises(UserError, match="kto: agreeing, val: has one example"):
        run(*flags, f"--validation_file={tmp_path / 'lone.jsonl'}", name="lone")
    with pytest.raises(SystemExit):
        train_args.parse([*TINY_WITHOUT_SHAPE, *flags, *cut(1, 1)])
    assert "at least 2 rows make a step" in capsys.readouterr().err


@pytest.mark.parametrize("loss_type, scale", [("grpo", "group"), ("dr_grpo", "batch"), ("dapo", "none")])
def test_reinforcement_is_the_same_however_a_step_is_cut(run, base, loss_type, scale):
    flags = [
        "--objective=grpo",
        "--dataset=sums",
        f"--init_from={base}",
        *SGD,
        "--num_generations=4",
        "--max_new_tokens=3",
        "--temperature=1.5",
        "--reward=length",
        f"--loss_type={loss_type}",
        f"--scale_rewards={scale}",
        "--num_iterations=2",
    ]
    runs = [run(*flags, *cut(*c), name=f"{c[0]}") for c in ((8, 1), (4, 2), (1, 8))]
    for other in runs[1:]:
        assert metric(runs[0], "data_hash") == metric(other, "data_hash"), "the same answers"
        assert_same_run(runs[0], other, "reward", "kl", "clip_ratio/low", "clip_ratio/high", "completions/mean_length")
    assert max(map(abs, metric(runs[0], "grad_norm"))) > 1e-3


OF_RANKS = {
    "sft": ["--objective=sft", "--dataset=sums", *cut(2, 2)],
    "dpo": ["--objective=dpo", "--dataset=pairs", *cut(2, 2), "--learning_rate=0.3"],
    "dpo_cache": ["--objective=dpo", "--dataset=pairs", "--reference=cache", *cut(2, 2), "--learning_rate=0.3"],
    "kto": [*cut(2, 3), "--learning_rate=0.3"],
    "grpo": [
        "--objective=grpo",
        "--dataset=sums",
        "--num_generations=4",
        "--max_new_tokens=3",
        "--temperature=1.5",
        "--reward=length",
        "--loss_type=dapo",
        "--scale_rewards=batch",
        *cut(8, 1),
    ],
}


@pytest.mark.parametrize(
    "kind, parallel",
    [*((kind, "ddp") for kind in OF_RANKS), *((kind, "fsdp") for kind in ("sft", "dpo", "kto", "grpo"))],
)
def test_two_ranks_are_one(tmp_path, data_dir, base, kind, parallel):
    """The same examples, and of grpo the same answers; the same losses and metrics."""
    flags = [
        *TINY_WITHOUT_SHAPE,
        f"--data_dir={data_dir}",
        f"--init_from={base}",
        *SGD,
        "--eval_interval=2",
        *OF_RANKS[kind],
        *(agreeing(tmp_path) if kind == "kto" else []),
    ]
    if kind == "dpo_cache":
        shutil.copytree(data_dir / "pairs", tmp_path / "one/pairs")
        shutil.copytree(data_dir / "pairs", tmp_path / "two/pairs")
    places = [[f"--data_dir={tmp_path / name}"] if kind == "dpo_cache" else [] for name in ("one", "two")]
    one, two = (
        run_on_ranks(tmp_path / "1", 1, *flags, *places[0]),
        run_on_ranks(tmp_path / "2", 2, *flags, *places[1], f"--parallel={parallel}"),
    )
    assert metric(one, "data_hash") == metric(two, "data_hash")
    numbers = [
        name
        for name, value in one.train[0].items()
        if isinstance(value, float) and name not in ("seconds", "step_ms", "tokens_per_second", "mfu")
    ]
    assert {"loss", "grad_norm", "entropy"} <= set(numbers)
    assert_same_lines(one.train, two.train, numbers)
    assert_same_lines(one.evals, two.evals, ["val_loss", "train_loss", *(["val_reward"] if kind == "grpo" else [])])
    assert kind != "kto" or min(metric(one, "kl")[1:]) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# packed is padded


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
    coder = ExampleEncoder(CharTokenizer("0123456789+=", has_eos=True), 24)
    rows = [
        {
            "prompt": "".join(rng.choice(list("0123456789+="), rng.integers(1, 8))),
            "completion": "".join(rng.choice(list("0123456789"), rng.integers(0, 6))),
        }
        for _ in range(17)
    ]
    results = []
    for packed in (False, True):
        data = Examples("x", rows, "sft", coder, 0, 0, "x", packed)
        batch = Collator()(data.items, 0, len(data.items), 1)
        assert batch.num_loss_tokens == sum(len(row["completion"]) + 1 for row in rows)
        model = tiny_model(block_size=24, **variant)
        loss, told = SFT()(model, batch, True)
        loss.backward()
        results.append(
            (
                len(data.items),
                loss.item(),
                {name: ratio(pair) for name, pair in told.items()},
                {name: p.grad for name, p in model.named_parameters()},
            )
        )
    (many, loss, told, gradients), (few, packed_loss, packed_told, packed_gradients) = results
    assert (
        few < many / 1.8
        and packed_loss == pytest.approx(loss, rel=1e-6)
        and packed_told == pytest.approx(told, rel=1e-5)
    )
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# the reference


def test_the_cache_is_read_the_second_time_and_follows_the_weights(run, base, tmp_path, data_dir):
    """A number changed in it is seen; other weights have a file of their own."""
    shutil.copytree(data_dir / "pairs", tmp_path / "data/pairs")
    flags = [
        "--objective=dpo",
        "--dataset=pairs",
        f"--data_dir={tmp_path / 'data'}",
        *SGD,
        "--reference=cache",
        "--max_iters=2",
        "--batch_size=110",
    ]
    first = run(*flags, f"--init_from={base}", name="first")
    files = sorted((tmp_path / "data/pairs").glob("reference_*.safetensors"))
    assert [path.name.split("_")[1] for path in files] == ["train", "val"]
    before = [path.stat().st_mtime_ns for path in files]
    again = run(*flags, f"--init_from={base}", name="again")
    assert (
        again.losses == first.losses
        and equal_tensors(again.last.weights, first.last.weights)
        and [path.stat().st_mtime_ns for path in files] == before
    )
    told = checkpoint.read_tensors(files[0])["logps"]
    checkpoint.write_tensors(files[0], {"logps": told - torch.tensor([10.0, 0.0])})  # each margin grows by 10 beta
    moved = run(*flags, f"--init_from={base}", name="moved")
    assert (
        moved.losses[0] == pytest.approx(np.log(1 + np.exp(-0.1 * 10)), rel=1e-4)
        and moved.evals[0]["val_loss"] == first.evals[0]["val_loss"]
    )
    run(*flags, f"--init_from={first.out_dir}", name="other")
    assert len(list((tmp_path / "data/pairs").glob("reference_*.safetensors"))) == 4


@pytest.mark.parametrize("objective, data", [("dpo", "pairs"), ("kto", "labelled")])
def test_the_reference_is_what_the_run_began_with_after_a_resume_too(run, base, objective, data):
    """Bit for bit the run that never stopped, whose rewards are measured from the base."""
    flags = [
        f"--objective={objective}",
        f"--dataset={data}",
        f"--init_from={base}",
        "--max_iters=4",
        "--eval_interval=2",
        "--eval_samples=0",
        "--learning_rate=0.01",
    ]
    for more in ([], ["--adapter=lora"], ["--adapter=lora", "--reference=copy"]):
        name = "_".join(more).replace("=", "").replace("--", "") or "full"
        whole = run(*flags, *more, name=f"{name}_whole")
        run(*flags, *more, "--max_iters=2", name=f"{name}_parts")
        parts = run("--init_from=resume", "--max_iters=4", name=f"{name}_parts")
        assert (
            parts.losses == whole.losses
            and equal_tensors(parts.last.weights, whole.last.weights)
            and equal_tensors(parts.last.optimizer, whole.last.optimizer)
        )
        assert (
            metric(parts, "rewards/chosen") == metric(whole, "rewards/chosen")
            and whole.train[-1]["rewards/chosen"] != 0
        )


def test_a_base_that_changed_is_no_reference(run, base, tmp_path):
    """On resume its weights are compared by their hash."""
    shutil.copytree(base, tmp_path / "base")
    run("--objective=dpo", "--dataset=pairs", f"--init_from={tmp_path / 'base'}", "--max_iters=2")
    weights = checkpoint.read_tensors(tmp_path / "base/model.safetensors")
    weights["norm.weight"][0] += 1e-3
    checkpoint.write_tensors(tmp_path / "base/model.safetensors", weights)
    (tmp_path / "base/manifest.json").unlink()
    with pytest.raises(UserError, match="does not hold the weights that the run began with"):
        run("--init_from=resume", "--max_iters=4")
