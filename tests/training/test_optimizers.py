"""Optimizers against torch's own, driven by hand, and schedules against closed forms and torch's schedulers."""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import OperatorCounts, ids, tiny_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nanoforge.errors import UserError
from nanoforge.training import muon, optimizers
from nanoforge.training.grad_guard import GradGuard
from nanoforge.training.muon import Muon, newton_schulz
from nanoforge.training.optimizers import Lion, OptimConfig, Optimizer
from nanoforge.training.schedules import SCHEDULES, make_schedule, schedule_remarks

DISABLED = torch.amp.GradScaler("cpu", enabled=False)
BETAS = {"betas": (0.8, 0.95)}
MOMENTUM = {"momentum": 0.7}
CLASS_OPTIONS = {
    "adamw": BETAS | {"fused": True},
    "adam": BETAS | {"fused": True},
    "nadam": BETAS,
    "radam": BETAS,
    "lion": BETAS,
    "sgd": MOMENTUM,
    "rmsprop": MOMENTUM,
}


def build(name: str, model: nn.Module, **config: object) -> Optimizer:
    return Optimizer(name, model, OptimConfig(**config), model.muon_splits())


def backward(model: nn.Module, step: int) -> None:
    model(ids(4, 12, seed=step), ids(4, 12, seed=step + 9)).mean().backward()


def train(model: nn.Module, optimizer: Optimizer, steps: Sequence[int] = range(3)) -> None:
    for step in steps:
        backward(model, step)
        optimizer.clip_grad_norm(DISABLED, 0.0)
        optimizer.update(DISABLED)


def assert_same_parameters(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def decayed_apart(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict]:
    """Parameter groups: matrices are decayed, vectors are not."""
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


# ---------------------------------------------------------------------------------------------------------------------
# optimizers


@pytest.mark.parametrize("name", [*optimizers.OPTIMIZERS, "torch.optim:Adamax"])
def test_each_optimizer_is_the_class_it_names(name: str):
    """Same updates as that class, built by hand with decay on matrices alone."""
    ours, theirs = tiny_model(bias=True), tiny_model(bias=True)
    train(ours, build(name, ours, lr=2e-3, weight_decay=0.1, betas=(0.8, 0.95), momentum=0.7))

    cls = optimizers.OPTIMIZERS[name].cls if name in optimizers.OPTIMIZERS else torch.optim.Adamax
    optimizer = cls(decayed_apart(list(theirs.parameters()), 0.1), lr=2e-3, **CLASS_OPTIONS.get(name, {}))
    for step in range(3):
        backward(theirs, step)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_parameters(ours, theirs, atol=1e-6, rtol=1e-5)


def test_weight_decay_reaches_the_default_optimizer_and_matrices_only():
    """With no gradient AdamW only decays: matrices shrink by 1 - lr x decay, vectors stay."""
    model = tiny_model(bias=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build("adamw", model, lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.update(DISABLED)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (0.95 if p.dim() > 1 else 1.0))


@pytest.mark.parametrize("name", [*optimizers.OPTIMIZERS, "muon"])
def test_every_parameter_is_in_exactly_one_group(name: str):
    model = tiny_model(bias=True, tie_weights=False)
    grouped = [p for group in build(name, model).param_groups for p in group["params"]]
    assert sum(p.numel() for p in grouped) == model.count_parameters()
    assert len({p.data_ptr() for p in grouped}) == len(grouped)


def test_a_parameter_in_two_groups_or_in_none_is_found():
    parameters = dict(tiny_model().named_parameters())
    group = {"params": list(parameters.values())}
    optimizers.assert_each_once(parameters, [group])
    for groups in ([group, {"params": group["params"][:1]}], [{"params": group["params"][1:]}]):
        with pytest.raises(AssertionError):
            optimizers.assert_each_once(parameters, groups)


def test_lion_by_its_formula():
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    lion = Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    x, m = p.detach().clone(), torch.zeros(3)
    for gradient in (torch.tensor([0.5, -0.1, 0.0]), torch.tensor([-3.0, 0.2, 1.0])):
        p.grad = gradient.clone()
        lion.step()
        x = x - 0.1 * ((0.9 * m + 0.1 * gradient).sign() + 0.2 * x)
        m = 0.99 * m + 0.01 * gradient
        torch.testing.assert_close(p.detach(), x)


def split_qkv(name: str, weight: Tensor) -> Sequence[Tensor]:
    """The matrices that a weight stacks: q of 4 heads, k and v of 2."""
    return weight.split([32, 16, 16]) if "qkv" in name else [weight]


@pytest.fixture
def torch_muon_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon casts to bfloat16, in which the last bit of a sum decides over much more."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


@pytest.mark.usefixtures("torch_muon_in_float32")
def test_muon_is_torchs_with_q_k_v_apart():
    """A model whose q, k and v are separate parameters, under torch.optim.Muon itself."""
    ours, theirs = tiny_model(n_kv_head=2), tiny_model(n_kv_head=2)
    config = {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.8, 0.95), "muon_dtype": torch.float32}
    train(ours, build("muon", ours, muon_lr=0.05, muon_weight_decay=0.02, muon_momentum=0.9, **config))

    is_matrix = {name: name.startswith("blocks.") and p.dim() == 2 for name, p in theirs.named_parameters()}
    matrices = [(name, p) for name, p in theirs.named_parameters() if is_matrix[name]]
    others = [p for name, p in theirs.named_parameters() if not is_matrix[name]]
    pieces = [nn.Parameter(part) for name, p in matrices for part in split_qkv(name, p.detach())]  # views
    muon = torch.optim.Muon(pieces, lr=0.05, weight_decay=0.02, momentum=0.9)
    adam = torch.optim.AdamW(decayed_apart(others, 0.1), lr=3e-3, betas=(0.8, 0.95), fused=True)
    for step in range(3):
        backward(theirs, step)
        gradients = [part for name, p in matrices for part in split_qkv(name, p.grad)]
        for piece, gradient in zip(pieces, gradients, strict=True):
            piece.grad = gradient
        muon.step()
        adam.step()
        theirs.zero_grad()
    assert_same_parameters(ours, theirs, atol=1e-5, rtol=1e-5)


def test_newton_schulz_is_a_polynomial_of_the_singular_values():
    """In float32 it is U p(p(...p(S))) V^T to rounding, p(s) = a s + b s^3 + c s^5; bfloat16 is only near it."""
    a, b, c = coefficients = (3.4445, -4.7750, 2.0315)
    matrices = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(0))
    left, sizes, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    sizes = sizes / sizes.norm(dim=1, keepdim=True)
    for _ in range(5):
        sizes = a * sizes + b * sizes**3 + c * sizes**5
    expected = left @ torch.diag_embed(sizes) @ right
    for dtype, low, high in [(torch.float32, 0, 1e-5), (torch.bfloat16, 1e-3, 0.1)]:
        result = newton_schulz(matrices.to(dtype), coefficients, steps=5, eps=1e-7)
        error = float((result - expected).abs().max())
        assert low <= error < high, f"{dtype}: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_iterates_in_the_precision_that_it_is_given(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def record(matrices: Tensor, *settings: object) -> Tensor:
        seen.append(matrices.dtype)
        return newton_schulz(matrices, *settings)

    monkeypatch.setattr(muon, "newton_schulz", record)
    model = tiny_model(n_layer=1)
    train(model, build("muon", model, muon_dtype=dtype), steps=[0])
    assert set(seen) == {dtype}


@pytest.mark.usefixtures("torch_muon_in_float32")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
def test_muon_is_torchs_as_settings_change_and_steps_are_skipped(adjust_lr_fn: str | None, *, nesterov: bool):
    """Wide, tall and square weights, some that stack matrices of two shapes, and one without a gradient at one step;
    torch's own makes no step where ours skips it."""
    shapes = [(16, 8), (8, 8), (20, 8), (8, 20), (16, 8), (20, 8)]
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    ours, theirs = [nn.Parameter(w.clone()) for w in weights], [w.clone() for w in weights]
    splits = {ours[0]: [8, 4, 4], ours[4]: [8, 4, 4]}
    pieces = [
        [nn.Parameter(part) for part in w.split(splits.get(p, len(p)))] for p, w in zip(ours, theirs, strict=True)
    ]
    options = {"weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    optimizer = Muon(ours, splits, dtype=torch.float32, **options)
    reference = torch.optim.Muon([piece for parts in pieces for piece in parts], **options)
    for step in range(6):
        for one in (optimizer, reference):
            one.param_groups[0] |= {"lr": 0.05 / (step + 1), "momentum": 0.8 + step / 40, "weight_decay": step / 20}
        skip = step in (2, 4)
        optimizer.found_inf = torch.tensor(float(skip))
        for i, (p, parts) in enumerate(zip(ours, pieces, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            p.grad[0, 0] = math.nan if step == 2 else 1
            p.grad = None if (step, i) == (1, 2) else p.grad
            gradients = [None] if p.grad is None else p.grad.split(splits.get(p, len(p)))
            for piece, gradient in zip(parts, gradients, strict=True):
                piece.grad = gradient
        optimizer.step()
        if not skip:
            reference.step()
        for p, w in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.detach(), w, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("torch_muon_in_float32")
def test_muons_momentum_rises_on_a_line_and_is_that_of_the_step():
    """From 0.85 in four steps; a run resumed at step 2 goes on as if never stopped."""
    values = [0.85, 0.875, 0.9, 0.925, 0.95, 0.95]
    assert [muon.momentum_at(step, 0.95, 4) for step in range(6)] == pytest.approx(values)
    assert [muon.momentum_at(step, 0.8, 4) for step in range(6)] == pytest.approx([0.8] * 6)
    assert muon.momentum_at(0, 0.95, 0) == 0.95

    weights = [torch.randn(8, 6, generator=torch.Generator().manual_seed(0)) for _ in range(3)]
    ours, resumed, theirs = map(nn.Parameter, weights)
    optimizer = Muon([ours], dtype=torch.float32, momentum_warmup=4)
    reference = torch.optim.Muon([theirs])
    for step, momentum in enumerate(values):
        if step == 2:
            state, resumed.data = copy.deepcopy(optimizer.state_dict()), ours.detach().clone()
            other = Muon([resumed], dtype=torch.float32, momentum_warmup=4)
            other.load_state_dict(state)
        for p, one in ((ours, optimizer), (resumed, other if step > 1 else None), (theirs, reference)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            if one is reference:
                one.param_groups[0]["momentum"] = momentum
            elif one is not None:
                one.set_step(step)
            if one is not None:
                one.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert torch.equal(ours, resumed)


def test_cautious_decay_shrinks_what_the_update_makes_smaller():
    """w - lr (u + decay x w where u and w have the same sign); u is known from a step without decay. A step that is
    skipped decays nothing."""
    start = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    lr, decay = 0.1, 0.5

    def step(skip: float = 0.0, **options: float) -> Tensor:
        p = nn.Parameter(start.clone())
        optimizer = Muon([p], lr=lr, dtype=torch.float32, **options)
        p.grad, optimizer.found_inf = start.flip(0).clone(), torch.tensor(skip)
        optimizer.step()
        return p.detach()

    update = (start - step(weight_decay=0.0)) / lr
    same_sign = update.sign() == start.sign()
    assert 5 < same_sign.sum() < 43
    expected = start - lr * (update + decay * torch.where(same_sign, start, 0.0))
    torch.testing.assert_close(step(weight_decay=decay, cautious=True), expected, atol=1e-6, rtol=0)
    assert torch.equal(step(skip=1.0, weight_decay=decay, cautious=True), start)


def test_muon_and_its_adamw_have_their_own_epsilon_and_betas():
    groups = build("muon", tiny_model(), aux_eps=1e-10, betas=(0.7, 0.9), kwargs={"eps": 1e-5}).param_groups
    assert [group["eps"] for group in groups] == [1e-10, 1e-10, 1e-10, 1e-5]
    assert [group.get("betas") for group in groups] == [(0.7, 0.9)] * 3 + [None]


def count_launches(name: str, n_layer: int) -> int:
    """Of a step's clipping, guard and update."""
    model = tiny_model(n_layer=n_layer)
    optimizer, guard = build(name, model, muon_dtype=torch.float32), GradGuard(0.0, torch.device("cpu"))
    for operators in (contextlib.nullcontext(), OperatorCounts()):
        backward(model, 0)
        with operators:
            optimizer.set_lr_scale(0.5)
            optimizer.update(DISABLED, skip=guard.should_skip(optimizer.clip_grad_norm(DISABLED, 1.0)))
    return operators.kernels


def test_the_kernels_of_a_step_do_not_grow_with_the_layers():
    assert count_launches("adamw", 12) == count_launches("adamw", 1) <= 26
    assert count_launches("muon", 12) == count_launches("muon", 1) <= 82


@pytest.mark.slow
def test_no_change_of_a_rate_compiles_muon_again(monkeypatch: pytest.MonkeyPatch):
    """One graph for twenty learning rates, momenta and weight decays, skipped steps and a state that was loaded."""
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    ours, theirs = tiny_model(), tiny_model()
    compiled, plain = build("muon", ours), build("muon", theirs)
    compiled.compile()
    for step in range(20):
        for model, optimizer in ((ours, compiled), (theirs, plain)):
            optimizer.set_lr_scale(1 - step / 40)
            optimizer.param_groups[-1] |= {"momentum": 0.8 + step / 100, "weight_decay": step / 100}
            backward(model, step)
            optimizer.update(DISABLED, skip=torch.tensor(float(step % 5 == 4)))
        if step == 9:
            compiled.load_state_dict(*copy.deepcopy(compiled.state_dict()))
    assert len(graphs) == 1
    assert_same_parameters(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_clipping_is_torchs_and_reaches_all_groups(name: str):
    ours, theirs = tiny_model(), tiny_model()
    optimizer = build(name, ours)
    for model in (ours, theirs):
        model(ids(4, 12), ids(4, 12, seed=2)).mean().backward()
    norm = optimizer.clip_grad_norm(DISABLED, 0.01)
    assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(theirs.parameters(), 0.01).item(), rel=1e-6)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    assert math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)) == pytest.approx(0.01, rel=1e-4)


def test_the_average_is_torchs_with_the_decay_of_a_short_run():
    """Averages of any decay, as torch.optim.swa_utils makes them; a step that is skipped is none."""
    model = tiny_model()
    optimizer = build("adamw", model, lr=1e-2, ema_decay=0.4)

    def average(averaged: Tensor, p: Tensor, n_averaged: Tensor) -> Tensor:  # n_averaged counts from 1
        return averaged + (1 - min(0.4, n_averaged / (9 + n_averaged))) * (p - averaged)

    reference = AveragedModel(model, avg_fn=average)
    reference.n_averaged.fill_(1)
    for step in range(12):
        backward(model, step)
        optimizer.update(DISABLED, skip=torch.tensor(float(step == 5)))
        if step != 5:
            reference.update_parameters(model)
    trained = copy.deepcopy(model)
    with optimizer.evaluation_weights():
        assert_same_parameters(model, reference.module, atol=1e-7, rtol=1e-6)
        assert not torch.allclose(model.wte.weight, trained.wte.weight)
    assert_same_parameters(model, trained, atol=0, rtol=0)


def test_two_averages_are_one_too_many():
    with pytest.raises(UserError, match="--ema_decay"):
        build("package_optimizers:ScheduleFreeSGD", tiny_model(), ema_decay=0.9)


@pytest.mark.parametrize("name", [*optimizers.OPTIMIZERS, "muon"])
def test_a_resumed_optimizer_goes_on_as_if_never_stopped(name: str):
    never_stopped, resumed = tiny_model(), tiny_model()
    train(never_stopped, build(name, never_stopped, lr=1e-2), range(4))

    first = build(name, resumed, lr=1e-2)
    train(resumed, first, range(2))
    tensors, values = copy.deepcopy(first.state_dict())
    second = build(name, resumed, lr=1e-2)
    second.load_state_dict(tensors, values)
    train(resumed, second, range(2, 4))
    for p, q in zip(never_stopped.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_package:X", "no_such_package"),
        ("torch.optim:Adm", "Adm"),
        ("torch.nn:Linear", "not a torch.optim.Optimizer"),
    ],
)
def test_a_class_by_name_must_be_an_optimizer(name: str, message: str):
    with pytest.raises(UserError, match=message):
        build(name, tiny_model())


@pytest.mark.parametrize("name, reason", [("ObjectStates", "graft"), ("HiddenStates", "state"), ("NeedsClosure", "")])
def test_a_class_that_cant_be_resumed_is_refused_before_the_first_step(name: str, reason: str):
    with pytest.raises(UserError, match=rf"--optimizer=package_optimizers:{name}: .*{reason}"):
        build(f"package_optimizers:{name}", tiny_model())


@pytest.mark.parametrize("name", ["ScheduleFreeSGD", "NestedStates"])
def test_state_of_any_shape_comes_back_from_json_and_tensors(name: str):
    """As never stopped, also after a rollback to a state of before the first step."""
    never_stopped, resumed = tiny_model(), tiny_model()
    train(never_stopped, build(f"package_optimizers:{name}", never_stopped, lr=1e-2), range(4))

    optimizer = build(f"package_optimizers:{name}", resumed, lr=1e-2)
    start, start_weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(resumed.state_dict())
    train(resumed, optimizer, range(7, 9))
    resumed.load_state_dict(start_weights)
    optimizer.load_state_dict(*start)
    train(resumed, optimizer, range(4))
    assert_same_parameters(resumed, never_stopped, atol=0, rtol=0)


def test_further_options_are_checked():
    model = tiny_model()
    with pytest.raises(UserError, match="--optimizer_kwargs"):
        build("adamw", model, kwargs={"no_such": 1})
    with pytest.raises(UserError, match="fused"):
        build("adamw", model, kwargs={"foreach": True})
    for name, kwargs in (
        ("adamw", {"weight_decay": 1}),
        ("sgd", {"momentum": 0.5}),
        ("muon", {"momentum": 0.5}),
        ("muon", {"cautious": True}),
    ):
        with pytest.raises(UserError, match=r"--optimizer_kwargs.*arguments of their own"):
            build(name, model, kwargs=kwargs)
    assert build("adamw", model, kwargs={"eps": 1e-3}).param_groups[0]["eps"] == 1e-3


def test_state_of_another_kind_is_refused():
    model = tiny_model()
    tensors, values = build("adamw", model).state_dict()
    with pytest.raises(UserError, match="--optimizer_kwargs"):
        build("adamw", model, kwargs={"amsgrad": True}).load_state_dict(tensors, values)
    with pytest.raises(UserError, match=r"--optimizer: .*AdamW.*Lion"):
        build("lion", model).load_state_dict(tensors, values)


def test_learning_rates_follow_the_schedule_in_every_group():
    optimizer = build("muon", tiny_model(), lr=1e-3, muon_lr=0.02)
    optimizer.set_lr_scale(0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2.5e-4, 2.5e-4, 2.5e-4, 5e-3])


# ---------------------------------------------------------------------------------------------------------------------
# schedules

VALUES = {"warmup": 10, "steps": 110, "floor": 0.1, "step_size": 30, "gamma": 0.5, "decay_fraction": 0.4}


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_works_with_every_schedule(name: str):
    """nanoGPT's: (step + 1) / (warmup + 1) of the peak."""
    schedule = make_schedule(name, **VALUES)
    scales = [schedule(step) for step in range(11)]
    assert scales == pytest.approx([*((step + 1) / 11 for step in range(10)), 1.0])
    assert all(0.1 - 1e-9 <= schedule(step) <= 1.0 for step in range(10, 500))
    assert make_schedule(name, **VALUES | {"warmup": 0})(0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "name, scales",
    [
        ("none", {400: 1.0}),
        ("linear", {60: 0.55, 110: 0.1, 300: 0.1}),
        ("exponential", {60: math.sqrt(0.1), 110: 0.1}),
        ("step", {39: 1.0, 40: 0.5, 70: 0.25, 300: 0.1}),
        ("inverse_sqrt", {40: 0.5, 10**6: 0.1}),
        ("wsd", {66: 1.0, 88: 0.55, 110: 0.1, 200: 0.1}),
    ],
)
def test_schedules_by_their_closed_forms(name: str, scales: dict[int, float]):
    schedule = make_schedule(name, **VALUES)
    assert {step: schedule(step) for step in scales} == pytest.approx(scales)


@pytest.mark.parametrize("warmup", [0, 59, 60, 90, 100])
def test_wsd_decays_after_the_warmup_from_the_peak(warmup: int):
    """Its last 40 of 100 steps, or what the warmup leaves of them, on a straight line to the floor."""
    schedule = make_schedule("wsd", **VALUES | {"warmup": warmup, "steps": 100})
    start = max(warmup, 60)
    expected = [1 - 0.9 * (step - start) / max(1, 100 - start) for step in range(start, 101)]
    assert [schedule(step) for step in range(start, 101)] == pytest.approx([*expected[:-1], 0.1])
    assert all(schedule(step) == 1.0 for step in range(warmup, start))


@pytest.mark.parametrize(
    "warmup, decay_end, steps, found",
    [
        (10, 110, 110, ""),
        (10, None, 11, ""),
        (10, 110, 10, "--warmup_iters=10"),
        (10, 110, 60, "--lr_decay_iters=110"),
        (10, 110, 220, "--lr_decay_iters=110"),
        (10, None, 5, "--warmup_iters=10"),
        (0, None, 0, ""),
    ],
)
def test_a_run_shorter_or_longer_than_its_schedule_is_told(warmup: int, decay_end: int | None, steps: int, found: str):
    """With the last learning rate, by the schedule itself."""
    scale = make_schedule("linear", **VALUES | {"warmup": warmup})
    remarks = schedule_remarks(scale, peak=0.5, warmup=warmup, decay_end=decay_end, steps=steps)
    assert len(remarks) == bool(found)
    assert all(found in remark and f"{0.5 * scale(steps - 1):.3g}" in remark for remark in remarks)


def test_cosine_is_torchs_and_nanogpts():
    schedule = make_schedule("cosine", **VALUES)
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=100, eta_min=0.1)
    for step in range(10, 111):
        assert schedule(step) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-6)
        sgd.step()
        reference.step()
