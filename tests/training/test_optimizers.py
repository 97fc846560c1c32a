"""Optimizers against torch's own, driven by hand, and schedules against closed forms and torch's schedulers."""

import copy
import math

import pytest
import torch
from helpers import ids, tiny_model

from nanoforge.errors import UserError
from nanoforge.training import optimizers
from nanoforge.training.optimizers import Lion, OptimConfig, Optimizer
from nanoforge.training.schedules import SCHEDULES, Plan, learning_rate

OFF = torch.amp.GradScaler("cpu", enabled=False)


def train(model, optimizer, steps: int = 3) -> None:
    for step in range(steps):
        model(ids(4, 12, seed=step), ids(4, 12, seed=step + 9)).mean().backward()
        optimizer.clip_grad_norm(OFF, 0.0)
        optimizer.update(OFF)


def by_hand(model, optimizers, steps: int = 3) -> None:
    for step in range(steps):
        model(ids(4, 12, seed=step), ids(4, 12, seed=step + 9)).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def assert_same(a, b, **tolerance) -> None:
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("name", [*optimizers.OPTIMIZERS, "torch.optim:Adamax"])
def test_each_optimizer_is_the_class_it_names(name):
    """Same updates as that class, built by hand with decay on matrices alone."""
    settings = OptimConfig(lr=2e-3, weight_decay=0.1, betas=(0.8, 0.95), momentum=0.7)
    ours, theirs = tiny_model(bias=True), tiny_model(bias=True)
    optimizer = Optimizer(name, ours, settings, ours.muon_splits())
    cls = optimizers.OPTIMIZERS[name].cls if name in optimizers.OPTIMIZERS else torch.optim.Adamax
    known = {"adamw": {"betas": (0.8, 0.95), "fused": True}, "adam": {"betas": (0.8, 0.95), "fused": True}, "nadam": {"betas": (0.8, 0.95)}, "radam": {"betas": (0.8, 0.95)}, "lion": {"betas": (0.8, 0.95)},
             "sgd": {"momentum": 0.7}, "rmsprop": {"momentum": 0.7}}.get(name, {})  # fmt: skip
    matrices, vectors = [p for p in theirs.parameters() if p.dim() > 1], [p for p in theirs.parameters() if p.dim() < 2]
    train(ours, optimizer)
    by_hand(
        theirs,
        [cls([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=2e-3, **known)],
    )
    assert_same(ours, theirs, atol=1e-6, rtol=1e-5)


def test_weight_decay_reaches_the_default_optimizer_and_matrices_only():
    """With no gradient AdamW only decays: matrices shrink by 1 - lr x decay, vectors stay."""
    model = tiny_model(bias=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer("adamw", model, OptimConfig(lr=0.1, weight_decay=0.5), model.muon_splits())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.update(OFF)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (0.95 if p.dim() > 1 else 1.0))


def test_every_parameter_is_in_exactly_one_group():
    model = tiny_model(bias=True, tie_weights=False)
    for name in (*optimizers.OPTIMIZERS, "muon"):
        optimizer = Optimizer(name, model, OptimConfig(), model.muon_splits())
        held = [p for o in optimizer.optimizers for g in o.param_groups for p in g["params"]]
        assert sum(p.numel() for p in held) == model.count_parameters() and len({p.data_ptr() for p in held}) == len(
            held
        )


def test_lion_by_its_formula():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    lion = Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    x, m = p.detach().clone(), torch.zeros(3)
    for gradient in (torch.tensor([0.5, -0.1, 0.0]), torch.tensor([-3.0, 0.2, 1.0])):
        p.grad = gradient.clone()
        lion.step()
        x = x - 0.1 * ((0.9 * m + 0.1 * gradient).sign() + 0.2 * x)
        m = 0.99 * m + 0.01 * gradient
        torch.testing.assert_close(p.detach(), x)


def test_muon_is_torchs_with_q_k_v_apart():
    """A model whose q, k and v are separate parameters, under torch.optim.Muon itself."""
    ours, theirs = tiny_model(n_kv_head=2), tiny_model(n_kv_head=2)
    settings = OptimConfig(
        lr=3e-3, weight_decay=0.1, betas=(0.8, 0.95), muon_lr=0.05, muon_weight_decay=0.02, muon_momentum=0.9
    )
    train(ours, Optimizer("muon", ours, settings, ours.muon_splits()))
    hidden, rest = [], []
    for name, p in theirs.named_parameters():
        (hidden if name.startswith("blocks.") and p.dim() == 2 else rest).append((name, p))
    for step in range(3):
        theirs(ids(4, 12, seed=step), ids(4, 12, seed=step + 9)).mean().backward()
        if step == 0:
            pieces = [
                torch.nn.Parameter(part)
                for name, p in hidden
                for part in p.detach().split([32, 16, 16] if "qkv" in name else [p.size(0)])
            ]
            muon = torch.optim.Muon(pieces, lr=0.05, weight_decay=0.02, momentum=0.9)
            adam = torch.optim.AdamW(
                [
                    {"params": [p for _, p in rest if p.dim() > 1], "weight_decay": 0.1},
                    {"params": [p for _, p in rest if p.dim() < 2], "weight_decay": 0.0},
                ],
                lr=3e-3,
                betas=(0.8, 0.95),
                fused=True,
            )
        gradients = [
            part for name, p in hidden for part in p.grad.split([32, 16, 16] if "qkv" in name else [p.size(0)])
        ]
        for piece, gradient in zip(pieces, gradients, strict=True):
            piece.grad = gradient
        muon.step()
        adam.step()
        theirs.zero_grad()
    assert_same(ours, theirs, atol=1e-6, rtol=1e-5)


def test_compiled_muon_is_the_eager_one():
    ours, theirs = tiny_model(n_layer=1), tiny_model(n_layer=1)
    compiled = Optimizer("muon", ours, OptimConfig(), ours.muon_splits())
    compiled.compile()
    train(ours, compiled)
    train(theirs, Optimizer("muon", theirs, OptimConfig(), theirs.muon_splits()))
    assert_same(ours, theirs, atol=2e-3, rtol=0)  # of steps of 0.02; bfloat16 is rounded in other places


def test_clipping_is_torchs_and_reaches_the_slices():
    for name in ("adamw", "muon"):
        ours, theirs = tiny_model(), tiny_model()
        optimizer = Optimizer(name, ours, OptimConfig(), ours.muon_splits())
        for model in (ours, theirs):
            model(ids(4, 12), ids(4, 12, seed=2)).mean().backward()
        norm = optimizer.clip_grad_norm(OFF, 0.01)
        assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01).item(), rel=1e-6)
        held = [p.grad for o in optimizer.optimizers for g in o.param_groups for p in g["params"]]
        assert math.sqrt(sum(g.square().sum().item() for g in held)) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("name", [*optimizers.OPTIMIZERS, "muon"])
def test_saved_state_goes_on_as_if_never_stopped(name):
    whole, parts = tiny_model(), tiny_model()
    settings = OptimConfig(lr=1e-2)
    first, second = (
        Optimizer(name, whole, settings, whole.muon_splits()),
        Optimizer(name, parts, settings, parts.muon_splits()),
    )
    train(whole, first, 4)
    train(parts, second, 2)
    tensors, rest = copy.deepcopy(second.state_dict())
    again = Optimizer(name, parts, settings, parts.muon_splits())
    again.load_state_dict(tensors, rest)
    for step in (2, 3):
        parts(ids(4, 12, seed=step), ids(4, 12, seed=step + 9)).mean().backward()
        again.clip_grad_norm(OFF, 0.0)
        again.update(OFF)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(p, q)


def test_classes_by_name_are_checked():
    model = tiny_model()
    for name, told in (
        ("no_such_package:X", "no_such_package"),
        ("torch.optim:Adm", "Adm"),
        ("torch.nn:Linear", "not a torch.optim.Optimizer"),
    ):
        with pytest.raises(UserError, match=told):
            Optimizer(name, model, OptimConfig(), {})
    with pytest.raises(UserError, match="optimizer_kwargs"):
        Optimizer("adamw", model, OptimConfig(kwargs={"no_such": 1}), {})
    for name, kwargs in (("adamw", {"weight_decay": 1}), ("sgd", {"momentum": 0.5}), ("muon", {"momentum": 0.5})):
        with pytest.raises(UserError, match="arguments of their own"):
            Optimizer(name, model, OptimConfig(kwargs=kwargs), model.muon_splits())
    with pytest.raises(UserError, match="fused"):
        Optimizer("adamw", model, OptimConfig(kwargs={"foreach": True}), {})
    tensors, rest = Optimizer("adamw", model, OptimConfig(), {}).state_dict()
    with pytest.raises(UserError, match="resume with the run's own"):
        Optimizer("adamw", model, OptimConfig(kwargs={"amsgrad": True}), {}).load_state_dict(tensors, rest)
    assert Optimizer("adamw", model, OptimConfig(kwargs={"eps": 1e-3}), {}).optimizers[0].param_groups[0]["eps"] == 1e-3


# ---------------------------------------------------------------------------------------------------------------------

PLAN = Plan(peak=1e-3, floor=1e-4, warmup=10, steps=110, step_size=30, gamma=0.5, decay_fraction=0.4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_works_with_every_schedule(name):
    """nanoGPT's: (step + 1) / (warmup + 1) of the peak."""
    rates = [learning_rate(name, PLAN, step) for step in range(11)]
    assert rates[:10] == pytest.approx([1e-3 * (i + 1) / 11 for i in range(10)]) and rates[10] == pytest.approx(1e-3)
    assert all(1e-4 <= learning_rate(name, PLAN, step) <= 1e-3 for step in range(10, 500))
    assert learning_rate(name, Plan(peak=1e-3, steps=100, floor=1e-4), 0) == pytest.approx(1e-3)


def test_schedules_by_their_closed_forms():
    at = lambda name, step: learning_rate(name, PLAN, step)  # noqa: E731
    assert at("none", 400) == 1e-3
    assert at("linear", 60) == pytest.approx(5.5e-4) and at("linear", 110) == pytest.approx(1e-4) == at("linear", 300)
    assert at("exponential", 60) == pytest.approx(math.sqrt(1e-3 * 1e-4)) and at("exponential", 110) == pytest.approx(
        1e-4
    )
    assert at("step", 39) == 1e-3 and at("step", 40) == 5e-4 and at("step", 70) == 2.5e-4 and at("step", 300) == 1e-4
    assert at("inverse_sqrt", 40) == pytest.approx(5e-4) and at("inverse_sqrt", 10**6) == 1e-4
    assert (
        at("wsd", 66) == 1e-3
        and at("wsd", 88) == pytest.approx(5.5e-4)
        and at("wsd", 110) == pytest.approx(1e-4) == at("wsd", 200)
    )


def test_cosine_is_torchs_and_nanogpts():
    p = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([p], lr=1e-3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=100, eta_min=1e-4)
    for step in range(10, 111):
        assert learning_rate("cosine", PLAN, step) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-6)
        sgd.step()
        reference.step()


def test_rates_follow_the_schedule_in_every_group():
    model = tiny_model()
    optimizer = Optimizer("muon", model, OptimConfig(lr=1e-3, muon_lr=0.02), model.muon_splits())
    optimizer.set_lr_scale(0.25)
    assert [g["lr"] for o in optimizer.optimizers for g in o.param_groups] == pytest.approx(
        [2.5e-4, 2.5e-4, 2.5e-4, 5e-3]
    )
