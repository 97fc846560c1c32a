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
from torch.distributed.tensor import DTensor

from nanoforge.distributed import full_tensor, shard_like
from nanoforge.errors import UserError


class SkippableOptimizer(torch.optim.Optimizer):
    """An optimizer that, like torch's fused ones, does nothing where the tensor `found_inf` is 1; no host need know."""

    found_inf: Tensor | None = None

    @property
    def kept(self) -> Tensor | float:
        """What to multiply updates with: 0 in a step to skip, else 1."""
        return 1.0 if self.found_inf is None else 1.0 - self.found_inf

    def sound(self, grad: Tensor, momentum: Tensor) -> Tensor:
        """The gradient; in a step to skip the momentum, which mixed with itself stays as it is."""
        return grad if self.found_inf is None else torch.where(self.found_inf > 0, momentum, grad)


class Lion(SkippableOptimizer):
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
                grad = self.sound(p.grad, momentum)
                p.mul_(1 - group["lr"] * group["weight_decay"] * self.kept)
                p.add_(torch.lerp(grad, momentum, beta1).sign_() * self.kept, alpha=-group["lr"])
                momentum.lerp_(grad, 1 - beta2)
        return loss


def newton_schulz(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Nearly orthogonal matrices of the same singular vectors: (N, rows, cols), rows <= cols (Jordan et al. 2024)."""
    a, b, c = coefficients
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(SkippableOptimizer, torch.optim.Muon):
    """torch.optim.Muon with one batched Newton-Schulz iteration for all matrices of a shape, or of its transpose.

    rows: of a weight that holds several matrices one above the other, none higher than wide, the rows of each. A weight sharded over ranks is gathered
    whole, and every rank iterates on it and keeps its own rows: the momentum stays sharded.
    """

    orthogonalise = staticmethod(newton_schulz)

    def __init__(self, params, rows: dict[nn.Parameter, list[int]], **kwargs):
        super().__init__(params, **kwargs)
        self.rows = rows

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
            kept, grads = self.kept, list(map(self.sound, grads, momenta))
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
            matrices = [
                piece
                for p, update in zip(params, updates, strict=True)
                for piece in full_tensor(update).split(self.rows.get(p, p.size(0)))
            ]
            by_shape: dict[tuple[int, ...], list[int]] = {}
            for i, matrix in enumerate(matrices):
                by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(i)
            for shape, members in by_shape.items():
                stacked = torch.stack(
                    [matrices[i] if matrices[i].shape == shape else matrices[i].T for i in members]
                ).bfloat16()
                for i, update in zip(
                    members,
                    self.orthogonalise(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"]),
                    strict=True,
                ):
                    matrices[i] = update if matrices[i].shape == shape else update.T
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * kept)
            done = iter(matrices)
            for p in params:
                parts = [next(done) for _ in self.rows.get(p, [p.size(0)])]
                (rows, cols), update = parts[0].shape, parts[0] if len(parts) == 1 else torch.cat(parts)
                scale = (
                    0.2 * math.sqrt(max(rows, cols))
                    if group["adjust_lr_fn"] == "match_rms_adamw"
                    else math.sqrt(max(1, rows / cols))
                )
                p.add_(shard_like(update * kept, p), alpha=-group["lr"] * scale)
        return loss


@dataclass(frozen=True)
class OptimConfig:
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
OPTIMIZERS: dict[str, tuple[type, Callable[[OptimConfig], dict[str, Any]]]] = {
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


ELEMENTWISE = {*OPTIMIZERS, "muon"} - {
    "adafactor"
}  # or, Muon, able to gather: the others step on whole parameters, of which each rank keeps its rows


def named_class(name: str) -> type:
    """The class that package:Class names. Raises UserError."""
    package, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(package), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"--optimizer={name}: {error}") from None
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"--optimizer={name}: not a torch.optim.Optimizer")
    return found


class Optimizer:
    """One or more torch optimizers over a model's parameters, driven together.

    Every group's rate is its own largest one times a factor that the schedule gives. State is saved under the parameters' names. To
    a GradScaler it is one optimizer, with `param_groups` and `step`: an overflow anywhere skips the step everywhere.
    """

    def __init__(self, name: str, model: nn.Module, settings: OptimConfig, muon_splits: dict[str, list[int]]):
        """Raises UserError for a class that doesn't take the arguments."""
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.skip: Tensor | None = None
        self.parameters = list(parameters.values())
        self.gathered: dict[
            nn.Parameter, nn.Parameter
        ] = {}  # a sharded parameter -> all of it, while an optimizer steps that needs that
        self.names = {id(p): n for n, p in parameters.items()}
        hidden = {n: p for n, p in parameters.items() if name == "muon" and p.dim() == 2 and n.startswith("blocks.")}
        rest = {n: p for n, p in parameters.items() if n not in hidden}
        covered = [id(p) for p in [*hidden.values(), *rest.values()]]
        assert sorted(covered) == sorted(map(id, parameters.values())), "every parameter is in exactly one group"

        cls, choose = OPTIMIZERS.get("adamw" if name == "muon" else name) or (named_class(name), lambda s: {})
        own = (
            {"lr", "params", "weight_decay", *choose(settings)} - {"fused"}
            if name != "muon"
            else {"lr", "params", "weight_decay", "momentum"}
        )
        if taken := own & settings.kwargs.keys():
            raise UserError(f"--optimizer_kwargs: {', '.join(sorted(taken))} follow from arguments of their own")
        self.kind = {"kwargs": settings.kwargs, "momentum": settings.momentum > 0}  # decide which state there is
        kwargs = choose(settings) | ({} if name == "muon" else settings.kwargs)
        rates = {"wte.weight": settings.embedding_lr or settings.lr, "head.weight": settings.head_lr or settings.lr}
        groups = [
            *(
                {"params": [rest.pop(n)], "weight_decay": settings.weight_decay, "lr": lr}
                for n, lr in rates.items()
                if n in rest
            ),
            {"params": [p for p in rest.values() if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in rest.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        if name not in ELEMENTWISE and any(isinstance(p, DTensor) for p in parameters.values()):
            self.gathered = {p: nn.Parameter(torch.zeros(p.shape, device=p.device)) for p in parameters.values()}
            self.names |= {id(all_of_it): self.names[id(p)] for p, all_of_it in self.gathered.items()}
            groups = [group | {"params": [self.gathered[p] for p in group["params"]]} for group in groups]
        groups = [group for group in groups if group["params"]]  # none where Muon trains all that learns: LoRA
        self.optimizers = [self.build(cls, groups, settings.lr, kwargs, name)] if groups else []
        self.forget_gathered()
        if hidden:
            kwargs = {
                "momentum": settings.muon_momentum,
                **settings.kwargs,
                "rows": {p: muon_splits[n] for n, p in hidden.items() if n in muon_splits},
            }
            group = {"params": list(hidden.values()), "weight_decay": settings.muon_weight_decay}
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
            raise UserError(f"--optimizer={name} --optimizer_kwargs: {error}") from None

    def compile(self) -> None:
        """Compile what Muon iterates."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.orthogonalise = torch.compile(newton_schulz, dynamic=False)

    def set_lr_scale(self, scale: float) -> None:
        """Set every group's rate to its largest one times the scale."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * scale

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], scaler: torch.amp.GradScaler, bound: float) -> Tensor:
        """Unscale the gradients and scale their norm to at most `bound` (0: any); the norm before, on the device."""
        scaler.unscale_(self)
        return full_tensor(nn.utils.clip_grad_norm_(parameters, bound or math.inf))

    def step(self) -> None:
        """Update the parameters by their gradients, unless `skip` is 1: then neither parameters nor state change. Those that can't be told
        by a tensor (all but adamw, adam, lion, muon) wait for the device to know."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, SkippableOptimizer) or optimizer.defaults.get("fused"):
                optimizer.found_inf = None if self.skip is None else self.skip.to(self.parameters[0].device)
                optimizer.step()
            elif self.skip is None or not self.skip:
                for p, all_of_it in self.gathered.items():
                    all_of_it.data, all_of_it.grad = full_tensor(p.detach()), full_tensor(p.grad)
                optimizer.step()
                with torch.no_grad():
                    for p, all_of_it in self.gathered.items():
                        p.copy_(shard_like(all_of_it.detach(), p))
                self.forget_gathered()

    def forget_gathered(self) -> None:
        for all_of_it in self.gathered.values():
            all_of_it.data, all_of_it.grad = all_of_it.data.new_empty(0), None

    def update(self, scaler: torch.amp.GradScaler, skip: Tensor | None = None) -> None:
        """Step and forget the gradients. skip: 1.0 if this step must change nothing, a scalar on the device; a float16 step that overflowed
        is skipped by the scaler."""
        self.skip = skip
        scaler.step(self)
        scaler.update()
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
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

    def load_state_dict(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Take up a saved state; rates, betas and decay stay those of the arguments. Raises UserError when it doesn't fit."""
        rest = dict(rest)
        if (saved := rest.pop("classes")) != self.classes():
            raise UserError(
                f"--optimizer: the checkpoint's state is that of {' and '.join(saved)}, not of {' and '.join(self.classes())}; resume with the run's own optimizer"
            )
        if (kind := rest.pop("kind")) != self.kind:
            raise UserError(
                f"--optimizer_kwargs, --momentum: the checkpoint's state was made with {kind}, not {self.kind}; resume with the run's own"
            )
        states: list[dict[int, dict[str, Any]]] = [{} for _ in self.optimizers]
        known = [
            {self.names[id(p)]: (n, p) for n, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
            for optimizer in self.optimizers
        ]
        for key in [*tensors, *rest]:
            i, name, what = key.split("/")
            n, parameter = known[int(i)][name]
            value = tensors[key] if key in tensors else rest[key]
            value = (
                shard_like(value, parameter) if isinstance(value, Tensor) and value.dim() else value
            )  # whole for a gathered one
            states[int(i)].setdefault(n, {})[what] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
