"""A training step: captured as ordinary, without the host. A recorder stands for a GPU's graphs where there is none."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import ids, tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_args
from nanoforge.data.batches import Batch
from nanoforge.errors import UserError
from nanoforge.posttraining.objectives import LanguageModel
from nanoforge.training.checkpoint import TrainState
from nanoforge.training.grad_guard import WINDOW, GradGuard
from nanoforge.training.optimizers import OptimConfig, Optimizer
from nanoforge.training.train_step import WARMUP_STEPS, CapturedStep, TrainStep

DISABLED = torch.amp.GradScaler("cpu", enabled=False)
OPTIMIZERS = ("adamw", "lion", "muon")


def make_step(optimizer: str, device: str = "cpu", sigma: float = 0.0, **changes: object) -> TrainStep:
    model = tiny_model(n_layer=1, **changes).train()
    if device != "cpu":
        model.to(device)
    config = OptimConfig(
        lr=1e-2,
        weight_decay=0.1,
        muon_weight_decay=0.1,
        muon_momentum_warmup=WARMUP_STEPS + 4,
        cautious_weight_decay=True,
        muon_dtype=torch.float32,
        ema_decay=0.7 if optimizer == "adamw" else 0.0,
    )
    state = TrainState(
        model=model,
        optimizer=Optimizer(optimizer, model, config, model.muon_splits()),
        scaler=DISABLED,
        guard=GradGuard(sigma, torch.device(device)),
    )
    return TrainStep(model, LanguageModel(), state, grad_clip=1.0)


def tensors_of(step: TrainStep) -> dict[str, Tensor]:
    """All that a step changes, gradients apart, which live within it."""
    model, optimizer, _, guard = step.state
    counts = {name: value for name, value in vars(guard).items() if isinstance(value, Tensor)}
    averages = (
        {} if optimizer.average is None else {f"average/{i}": t for i, t in enumerate(optimizer.average.averages)}
    )
    return dict(model.named_parameters()) | optimizer.state_dict()[0] | counts | averages | {"lrs": optimizer.lrs}


# ---------------------------------------------------------------------------------------------------------------------
# graphs without a GPU


class Recorder(TorchDispatchMode):
    """Records operators with the very tensors that they read and wrote, as a CUDA graph does, and repeats them there:
    Python's numbers stay what they were, and a tensor in another place is not seen. Reading a number raises."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if "_local_scalar_dense" in func.name():
            raise AssertionError("the host reads a number")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class FakeStream:
    def __init__(self, *_: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainStep], CapturedStep]:
    """recorded(step) is a captured step on a CPU."""

    def recorded(step: TrainStep) -> CapturedStep:
        @contextlib.contextmanager
        def capture(recorder: Recorder, stream: object) -> Iterator[None]:
            """Records what is done, and undoes it."""
            tensors = tensors_of(step)
            before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            with torch.random.fork_rng(devices=[]), recorder:
                yield
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(before[name])

        monkeypatch.setattr(torch.cuda, "graph", capture)
        return CapturedStep(step, torch.device("cuda"))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return recorded


def train(make: TrainStep | CapturedStep, step: TrainStep, numbers: Sequence[int], device: str = "cpu") -> list[float]:
    """Losses of steps with a learning rate that changes, and one gradient that is not finite."""
    losses = []
    for number in numbers:
        step.state.optimizer.set_lr_scale(1 - number / 20)
        step.state.optimizer.set_step(number)
        torch.manual_seed(number)
        tokens = ids(4, 13, seed=number).to(device)
        batches = [Batch(rows, n_micro_batches=2) for rows in tokens.split(2)]
        weight = step.model.wte.weight.data
        kept = weight[0, 0].clone()
        if number == WARMUP_STEPS + 2:
            weight[0, 0] = math.inf
        result = make(batches, with_metrics=True)
        weight[0, 0] = kept
        losses.append((result.metrics["loss"][0] / result.metrics["loss"][1]).item())
    return losses


def assert_equal_runs(a: TrainStep, b: TrainStep) -> None:
    ours, theirs = tensors_of(a), tensors_of(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_captured_step_is_the_ordinary_one(optimizer: str, recorded: Callable[[TrainStep], CapturedStep]):
    """Bit for bit, with two micro-batches and dropout, as learning rates change and one step is skipped; and all
    tensors stay where they were."""
    plain, step = make_step(optimizer, dropout=0.1), make_step(optimizer, dropout=0.1)
    captured = recorded(step)
    train(captured, step, range(WARMUP_STEPS))
    places = {name: tensor.data_ptr() for name, tensor in tensors_of(step).items()}
    later = range(WARMUP_STEPS, WARMUP_STEPS + 6)
    losses = train(captured, step, later)
    assert places == {name: tensor.data_ptr() for name, tensor in tensors_of(step).items()}
    train(plain, plain, range(WARMUP_STEPS))
    assert losses == pytest.approx(train(plain, plain, later), abs=0, rel=0, nan_ok=True)
    assert_equal_runs(step, plain)
    assert step.state.guard.skipped == 1 and len(captured.graph.calls) > 100


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_never_asks_the_host(optimizer: str):
    """A tensor without values can't be read."""
    with FakeTensorMode():
        step = make_step(optimizer, sigma=8.0, norm="rmsnorm", position="rope", dropout=0.1)
        for _ in range(2):
            step.state.optimizer.set_lr_scale(0.5)
            step([Batch(torch.zeros(2, 13, dtype=torch.long))], with_metrics=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_captured_step_on_a_gpu_is_the_ordinary_one(optimizer: str):
    """The same losses and weights; after the capture no step waits for the GPU."""
    plain, step = make_step(optimizer, "cuda", sigma=8.0, dropout=0.1), make_step(optimizer, "cuda", 8.0, dropout=0.1)
    captured = CapturedStep(step, torch.device("cuda"))
    n_steps = WARMUP_STEPS + 6
    losses = train(captured, step, range(n_steps), "cuda")
    assert losses == pytest.approx(train(plain, plain, range(n_steps), "cuda"), rel=1e-6, nan_ok=True)
    for name, tensor in tensors_of(step).items():
        torch.testing.assert_close(tensor, tensors_of(plain)[name], msg=name)
    batches = captured.batches
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(5):
            step.state.optimizer.set_lr_scale(1 - number / 10)
            captured(batches, with_metrics=False)
            plain(batches, with_metrics=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_guards_median_is_torchs():
    guard = GradGuard(8.0, torch.device("cpu"))
    for number in range(WINDOW + 10):
        assert torch.equal(guard.median(guard.norms), guard.norms.nanmedian()) or not number
        guard.should_skip(torch.tensor(float(number * 37 % 101)))


# ---------------------------------------------------------------------------------------------------------------------
# what can't be captured


@pytest.mark.parametrize(
    "flags",
    [
        ["--device=cpu"],
        ["--parallel=fsdp"],
        ["--objective=sft"],
        ["--optimizer=sgd"],
        ["--optimizer=schedulefree:AdamWScheduleFree"],
        ["--dtype=float16"],
        ["--activation_checkpointing"],
    ],
    ids=lambda flags: flags[0],
)
def test_what_cant_be_captured_is_refused_by_name(flags: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        train_args.parse(["--cuda_graph", *flags])
    errors = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in errors if "--cuda_graph" in line and flags[0].partition("=")[0] in line]) == 1


def test_ranks_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(SystemExit):
        train_args.parse(["--cuda_graph"])
    assert "--cuda_graph" in capsys.readouterr().err


def test_a_device_or_a_precision_that_turns_out_otherwise_is_refused():
    step = make_step("adamw")
    with pytest.raises(UserError, match=r"--cuda_graph.*cpu"):
        CapturedStep(step, torch.device("cpu"))
    state = step.state._replace(scaler=torch.amp.GradScaler("cpu", enabled=True))
    with pytest.raises(UserError, match=r"--cuda_graph.*float16"):
        CapturedStep(dataclasses.replace(step, state=state), torch.device("cuda"))
