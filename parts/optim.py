"""Optimizers: parameter groups, a registry, and one object that drives whichever were built.

Matrices are decayed, vectors are not. With muon, matrices of the blocks go to Muon and everything else to AdamW; a weight that holds
several matrices one above the other (a fused qkv) is given to Muon as that many.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parts.mistakes import Mistake


class Lion(torch.optim.Optimizer):
    """The sign of an interpolated momentum, with decoupled weight decay (Chen et al. 2023, algorithm 2)."""

    def __init__(self, params, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                momentum = self.state[p]["exp_avg"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.lerp(p.grad, momentum, beta1).sign_(), alpha=-group["lr"])
                momentum.lerp_(p.grad, 1 - beta2)
        return loss


def newton_schulz(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Nearly orthogonal matrices of the same singular vectors: (N, rows, cols), rows <= cols (Jordan et al. 2024)."""
    a, b, c = coefficients
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Muon):
    """torch.optim.Muon with one batched Newton-Schulz iteration for all matrices of a shape, or of its transpose."""

    orthogonalise = staticmethod(newton_schulz)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads, momenta = [], [], []
            self._init_group(group, params, grads, momenta)
            if not params:
                continue
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
            by_shape: dict[tuple[int, ...], list[int]] = {}
            for i, update in enumerate(updates):
                by_shape.setdefault(tuple(sorted(update.shape)), []).append(i)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for shape, members in by_shape.items():
                stacked = torch.stack([updates[i] if updates[i].shape == shape else updates[i].T for i in members]).bfloat16()
                for i, update in zip(members, self.orthogonalise(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"]), strict=True):
                    rows, cols = params[i].shape
                    scale = 0.2 * math.sqrt(max(rows, cols)) if group["adjust_lr_fn"] == "match_rms_adamw" else math.sqrt(max(1, rows / cols))
                    params[i].add_(update if rows <= cols else update.T, alpha=-group["lr"] * scale)
        return loss


@dataclass(frozen=True)
class Settings:
    """What the registry's entries take from the arguments."""

    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    momentum: float = 0.9
    muon_lr: float = 0.02
    muon_weight_decay: float = 0.0
    muon_momentum: float = 0.95
    kwargs: dict[str, Any] = field(default_factory=dict)
    embedding_lr: float = 0.0  # of the token embedding; 0: lr
    head_lr: float = 0.0  # of an untied head; 0: lr


# Of each optimizer: its class, and which settings its class knows besides lr and weight_decay.
OPTIMIZERS: dict[str, tuple[type, Callable[[Settings], dict[str, Any]]]] = {
    "adamw": (torch.optim.AdamW, lambda s: {"betas": s.betas, "fused": True}),
    "adam": (torch.optim.Adam, lambda s: {"betas": s.betas, "fused": True}),
    "sgd": (torch.optim.SGD, lambda s: {"momentum": s.momentum}),
    "nadam": (torch.optim.NAdam, lambda s: {"betas": s.betas}),
    "radam": (torch.optim.RAdam, lambda s: {"betas": s.betas}),
    "rmsprop": (torch.optim.RMSprop, lambda s: {"momentum": s.momentum}),
    "adagrad": (torch.optim.Adagrad, lambda s: {}),
    "adafactor": (torch.optim.Adafactor, lambda s: {}),
    "lion": (Lion, lambda s: {"betas": s.betas}),
}


def named_class(name: str) -> type:
    """The class that package:Class names. Raises Mistake."""
    package, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(package), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise Mistake(f"--optimizer={name}: {error}") from None
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise Mistake(f"--optimizer={name}: not a torch.optim.Optimizer")
    return found


class Optimizer:
    """One or more torch optimizers over a model's parameters, driven together.

    Every group's rate is its own largest one times a factor that the schedule gives. State is saved under the parameters' names. To
    a GradScaler it is one optimizer, with `param_groups` and `step`: an overflow anywhere skips the step everywhere.
    """

    def __init__(self, name: str, model: nn.Module, settings: Settings, fused_rows: dict[str, list[int]]):
        """Raises Mistake for a class that doesn't take the arguments."""
        parameters = dict(model.named_parameters())
        self.slices: list[tuple[nn.Parameter, list[nn.Parameter]]] = []  # (weight, its matrices, sharing its memory)
        self.names: dict[int, str] = {}  # id of a parameter or of such a matrix -> name
        hidden = {n: p for n, p in parameters.items() if name == "muon" and p.dim() == 2 and n.startswith("blocks.")}
        rest = {n: p for n, p in parameters.items() if n not in hidden}
        covered = [id(p) for p in [*hidden.values(), *rest.values()]]
        assert sorted(covered) == sorted(map(id, parameters.values())), "every parameter is in exactly one group"
        self.names |= {id(p): n for n, p in rest.items()}

        cls, choose = OPTIMIZERS.get("adamw" if name == "muon" else name) or (named_class(name), lambda s: {})
        own = {"lr", "params", "weight_decay", *choose(settings)} - {"fused"} if name != "muon" else {"lr", "params", "weight_decay", "momentum"}
        if taken := own & settings.kwargs.keys():
            raise Mistake(f"--optimizer_kwargs: {', '.join(sorted(taken))} follow from arguments of their own")
        self.kind = {"kwargs": settings.kwargs, "momentum": settings.momentum > 0}  # decide which state there is
        kwargs = choose(settings) | ({} if name == "muon" else settings.kwargs)
        rates = {"wte.weight": settings.embedding_lr or settings.lr, "head.weight": settings.head_lr or settings.lr}
        groups = [
            *({"params": [rest.pop(n)], "weight_decay": settings.weight_decay, "lr": lr} for n, lr in rates.items() if n in rest),
            {"params": [p for p in rest.values() if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in rest.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizers = [self.build(cls, [g for g in groups if g["params"]], settings.lr, kwargs, name)]
        if hidden:
            matrices = [matrix for n, p in hidden.items() for matrix in self.matrices(n, p, fused_rows.get(n, [p.size(0)]))]
            kwargs = {"momentum": settings.muon_momentum, **settings.kwargs}
            group = {"params": matrices, "weight_decay": settings.muon_weight_decay}
            self.optimizers.append(self.build(Muon, [group], settings.muon_lr, kwargs, name))
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @staticmethod
    def build(cls: type, groups: list[dict], lr: float, kwargs: dict[str, Any], name: str) -> torch.optim.Optimizer:
        try:
            return cls(groups, lr=lr, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise Mistake(f"--optimizer={name} --optimizer_kwargs: {error}") from None

    def matrices(self, name: str, weight: nn.Parameter, rows: list[int]) -> list[nn.Parameter]:
        """The matrices in a weight, as parameters that share its memory; the weight itself if it is one."""
        if len(rows) == 1:
            self.names[id(weight)] = name
            return [weight]
        parts = [nn.Parameter(part) for part in weight.detach().split(rows)]
        self.slices.append((weight, parts))
        self.names |= {id(part): f"{name}[{i}]" for i, part in enumerate(parts)}
        return parts

    def compile(self) -> None:
        """Compile what Muon iterates."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.orthogonalise = torch.compile(newton_schulz, dynamic=False)

    def set_rate(self, factor: float) -> None:
        """Set every group's rate to its largest one times the factor."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def clip(self, parameters: Iterable[nn.Parameter], scaler: torch.amp.GradScaler, bound: float) -> Tensor:
        """Unscale the gradients and scale their norm to at most `bound` (0: any); the norm before, on the device."""
        for weight, parts in self.slices:
            for part, grad in zip(parts, weight.grad.split([p.size(0) for p in parts]), strict=True):
                part.grad = grad  # a view, so that unscaling and clipping reach it
        scaler.unscale_(self)
        return nn.utils.clip_grad_norm_(parameters, bound or math.inf)

    def step(self) -> None:
        """Update the parameters by their gradients."""
        for optimizer in self.optimizers:
            optimizer.step()

    def update(self, scaler: torch.amp.GradScaler) -> None:
        """Step and forget the gradients; a float16 step that overflowed is skipped by the scaler."""
        scaler.step(self)
        scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for weight, _ in self.slices:
            weight.grad = None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, the rest) of the state, keyed "optimizer/parameter/what"; the rest also names the classes."""
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {"classes": self.classes(), "kind": self.kind}
        for i, optimizer in enumerate(self.optimizers):
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    (tensors if isinstance(value, Tensor) else rest)[f"{i}/{self.names[id(parameter)]}/{key}"] = value
        return tensors, rest

    def classes(self) -> list[str]:
        return [type(optimizer).__name__ for optimizer in self.optimizers]

    def load_state(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Take up a saved state; rates, betas and decay stay those of the arguments. Raises Mistake when it doesn't fit."""
        rest = dict(rest)
        if (saved := rest.pop("classes")) != self.classes():
            raise Mistake(f"--optimizer: the checkpoint's state is that of {' and '.join(saved)}, not of {' and '.join(self.classes())}; resume with the run's own optimizer")
        if (kind := rest.pop("kind")) != self.kind:
            raise Mistake(f"--optimizer_kwargs, --momentum: the checkpoint's state was made with {kind}, not {self.kind}; resume with the run's own")
        states: list[dict[int, dict[str, Any]]] = [{} for _ in self.optimizers]
        numbers = [{self.names[id(p)]: n for n, p in enumerate(p for g in optimizer.param_groups for p in g["params"])} for optimizer in self.optimizers]
        for key, value in {**tensors, **rest}.items():
            i, name, what = key.split("/")
            states[int(i)].setdefault(numbers[int(i)][name], {})[what] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
