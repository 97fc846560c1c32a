"""Optimizers as packages have them, for --optimizer=package_optimizers:CLASS: with their kinds of state and methods."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class ScheduleFreeSGD(torch.optim.Optimizer):
    """As the package schedulefree: y is trained, x evaluated, y = beta x + (1 - beta) z (Defazio et al. 2024)."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, beta: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(
            params,
            {"lr": lr, "beta": beta, "weight_decay": weight_decay, "k": 0, "weight_sum": 0.0, "train_mode": False},
        )

    @torch.no_grad()
    def set_mode(self, *, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                weight = 1 - group["beta"] if train_mode else 1 - 1 / group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)
                group["train_mode"] = train_mode

    def train(self) -> None:
        self.set_mode(train_mode=True)

    def eval(self) -> None:
        self.set_mode(train_mode=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            assert group["train_mode"], "as the package, refuses to step in evaluation mode"
            group["k"] += 1
            group["weight_sum"] += group["lr"] ** 2
            share = group["lr"] ** 2 / group["weight_sum"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                grad = p.grad + group["weight_decay"] * p
                p.lerp_(z, share).add_(grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(grad, alpha=group["lr"])


class NestedStates(torch.optim.Optimizer):
    """As pytorch-optimizer's SOAP and heavyball: lists, dicts by number, sets, 8 bits, tensors in the group, and an
    entry of its own in state_dict."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.schedule: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"package": {"schedule": self.schedule, "constant": b"bytes"}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule = state_dict["package"]["schedule"]
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.schedule["probability"] = self.schedule.get("probability", 1.0) * 0.9
        for group in self.param_groups:
            group["step"] = group.get("step", torch.tensor(0)) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["GG"] = [torch.zeros(size, size) for size in p.shape if p.dim() == 2] or [[]]
                    state[0] = {"seen": {1, 2}, "mean": torch.zeros_like(p), "none": None}
                    state["eight_bits"] = torch.zeros(p.shape, dtype=torch.int8)
                assert state["eight_bits"].dtype == torch.int8
                if p.dim() == 2:
                    state["GG"][0].lerp_(p.grad @ p.grad.T, 0.1)
                    state["GG"][1].lerp_(p.grad.T @ p.grad, 0.1)
                state[0]["mean"].lerp_(p.grad, 0.1)
                state[0]["seen"].add(int(group["step"]))
                state["eight_bits"] = (state[0]["mean"] * 300).clamp(-127, 127).to(torch.int8)
                norm = 1 + sum(part.norm() for part in state["GG"] if isinstance(part, torch.Tensor))
                update = state["eight_bits"].float() / 300 / norm * (1 + 1 / len(state[0]["seen"]))
                p.sub_(update, alpha=group["lr"] * self.schedule["probability"])


class ObjectStates(torch.optim.SGD):
    """As pytorch-optimizer's ScalableShampoo: an object in its state."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["graft"] = object()


class HiddenStates(torch.optim.SGD):
    """Counts its steps where no state_dict looks, and slows down."""

    n_steps = 0

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.n_steps += 1
        for group in self.param_groups:
            group["lr"] /= self.n_steps
        super().step()


class NeedsClosure(torch.optim.SGD):
    """As LBFGS and SAM: steps with a closure alone."""

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        closure()
