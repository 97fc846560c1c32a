"""Optimizers: parameter groups, a registry, and one object that drives whichever were built.

Matrices are decayed, vectors are not. With muon, matrices of the blocks go to Muon and everything else to AdamW.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanoforge.distributed import full_tensor, shard_like
from nanoforge.errors import UserError
from nanoforge.training.muon import Muon, newton_schulz
from nanoforge.training.skippable import SkippableOptimizer

Parameters = dict[str, nn.Parameter]
Group = dict[str, Any]  # a parameter group of torch.optim


class Lion(SkippableOptimizer):
    """The sign of an interpolated momentum, with decoupled weight decay (Chen et al. 2023, algorithm 2)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update_group(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        update_scale = self.update_scale
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p)
            momentum = state["exp_avg"]
            grad = self.masked_grad(p.grad, momentum)
            p.mul_(1 - group["lr"] * group["weight_decay"] * update_scale)
            direction = torch.lerp(grad, momentum, beta1).sign_()
            p.add_(direction * update_scale, alpha=-group["lr"])
            momentum.lerp_(grad, 1 - beta2)


# ---------------------------------------------------------------------------------------------------------------------
# registry


@dataclass(frozen=True)
class OptimConfig:
    """What optimizers take from the arguments. Learning rates are peak values, which a schedule scales."""

    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    momentum: float = 0.9
    muon_lr: float = 0.02
    muon_weight_decay: float = 0.0
    muon_momentum: float = 0.95
    muon_dtype: torch.dtype = torch.bfloat16  # of its Newton-Schulz iteration
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the optimizer's class
    embedding_lr: float = 0.0  # of the token embedding; 0: lr
    head_lr: float = 0.0  # of an untied head; 0: lr


def no_options(config: OptimConfig) -> dict[str, Any]:
    return {}


def betas(config: OptimConfig) -> dict[str, Any]:
    return {"betas": config.betas}


def betas_and_fused(config: OptimConfig) -> dict[str, Any]:
    return {"betas": config.betas, "fused": True}


def momentum(config: OptimConfig) -> dict[str, Any]:
    return {"momentum": config.momentum}


class OptimizerSpec(NamedTuple):
    cls: type[torch.optim.Optimizer]
    options: Callable[[OptimConfig], dict[str, Any]] = no_options  # of the class, besides lr and weight_decay
    elementwise: bool = False  # a step on a shard is the shard of the step; otherwise it steps on full parameters


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec(torch.optim.AdamW, betas_and_fused, elementwise=True),
    "adam": OptimizerSpec(torch.optim.Adam, betas_and_fused, elementwise=True),
    "sgd": OptimizerSpec(torch.optim.SGD, momentum, elementwise=True),
    "nadam": OptimizerSpec(torch.optim.NAdam, betas, elementwise=True),
    "radam": OptimizerSpec(torch.optim.RAdam, betas, elementwise=True),
    "rmsprop": OptimizerSpec(torch.optim.RMSprop, momentum, elementwise=True),
    "adagrad": OptimizerSpec(torch.optim.Adagrad, elementwise=True),
    "adafactor": OptimizerSpec(torch.optim.Adafactor),
    "lion": OptimizerSpec(Lion, betas, elementwise=True),
}


def find_optimizer(name: str) -> OptimizerSpec:
    """The registry's entry, or the class that package:Class names. Raises UserError."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    package, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(package), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"--optimizer={name}: {error}") from None
    if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)):
        raise UserError(f"--optimizer={name}: not a torch.optim.Optimizer")
    return OptimizerSpec(cls)


def build_optimizer(
    name: str, cls: Callable[..., torch.optim.Optimizer], groups: list[Group], lr: float, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Construct a torch optimizer. Raises UserError when the class refuses its arguments."""
    try:
        return cls(groups, lr=lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--optimizer={name} --optimizer_kwargs: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# parameter groups


def split_parameters(parameters: Parameters, *, muon: bool) -> tuple[Parameters, Parameters]:
    """(Muon's parameters, all others). Muon trains the matrices of the blocks."""
    if not muon:
        return {}, parameters
    matrices = {name: p for name, p in parameters.items() if p.dim() == 2 and name.startswith("blocks.")}
    others = {name: p for name, p in parameters.items() if name not in matrices}
    return matrices, others


def build_groups(parameters: Parameters, config: OptimConfig) -> list[Group]:
    """The embedding and the head, each alone; the other matrices; and the vectors, which are not decayed."""
    embedding_lr, head_lr = config.embedding_lr or config.lr, config.head_lr or config.lr
    own_lr = {"wte.weight": embedding_lr, "head.weight": head_lr}
    own_lr |= {"wte.new_rows": embedding_lr, "head.rows.new_rows": head_lr}  # of tokens, beside a LoRA
    groups: list[Group] = []
    for name, lr in own_lr.items():
        if name in parameters:
            groups.append({"params": [parameters[name]], "weight_decay": config.weight_decay, "lr": lr})
    others = [p for name, p in parameters.items() if name not in own_lr]
    groups.append({"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay})
    groups.append({"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def assert_each_once(parameters: Parameters, groups: Iterable[Group]) -> None:
    """Every parameter is in exactly one group."""
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in parameters.values()), "a parameter is not in exactly one group"


def refuse_set_options(name: str, options: Mapping[str, Any], config: OptimConfig) -> None:
    """Raise UserError where --optimizer_kwargs names what an argument of its own sets."""
    set_elsewhere = {"lr", "params", "weight_decay", *options} - {"fused"}
    if name == "muon":
        set_elsewhere = {"lr", "params", "weight_decay", "momentum"}
    repeated = sorted(set_elsewhere & config.kwargs.keys())
    if repeated:
        raise UserError(f"--optimizer_kwargs: {', '.join(repeated)} follow from arguments of their own")


# ---------------------------------------------------------------------------------------------------------------------
# the driver


class Optimizer:
    """One or more torch optimizers over a model's parameters, driven together.

    Every group's learning rate is its own peak times a scale that the schedule gives. State is saved under the
    parameters' names. To a GradScaler this is one optimizer, with `param_groups` and `step`: an overflow anywhere
    skips the step everywhere.
    """

    def __init__(
        self, name: str, model: nn.Module, config: OptimConfig, muon_splits: Mapping[str, list[int]] | None = None
    ) -> None:
        """muon_splits: names of weights that stack several matrices -> the rows of each. Raises UserError."""
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(parameters.values())
        self.names = {id(p): n for n, p in parameters.items()}
        self.skip: Tensor | None = None
        self.full_parameters: dict[nn.Parameter, nn.Parameter] = {}  # a sharded one -> all of it, during a step
        self.kind = {"kwargs": config.kwargs, "momentum": config.momentum > 0}  # what decides which state there is
        self.optimizers: list[torch.optim.Optimizer] = []

        # 1. Which parameters go where.
        use_muon = name == "muon"
        muon_parameters, others = split_parameters(parameters, muon=use_muon)
        groups = build_groups(others, config)
        muon_group = {"params": list(muon_parameters.values()), "weight_decay": config.muon_weight_decay}
        assert_each_once(parameters, [*groups, muon_group])

        # 2. The optimizer of all that Muon does not train: none where it trains all, as with LoRA.
        spec = find_optimizer("adamw" if use_muon else name)
        options = spec.options(config)
        refuse_set_options(name, options, config)
        if not use_muon:
            options |= config.kwargs
            if not spec.elementwise:
                groups = self.with_full_parameters(groups)
        if groups:
            self.optimizers.append(build_optimizer(name, spec.cls, groups, config.lr, options))
        self.free_full_parameters()

        # 3. Muon.
        if muon_parameters:
            splits = {muon_parameters[n]: rows for n, rows in (muon_splits or {}).items() if n in muon_parameters}
            options = {"momentum": config.muon_momentum, **config.kwargs, "splits": splits, "dtype": config.muon_dtype}
            self.optimizers.append(build_optimizer(name, Muon, [muon_group], config.muon_lr, options))

        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[Group]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def compile(self) -> None:
        """Compile Muon's Newton-Schulz iteration."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.newton_schulz = torch.compile(newton_schulz, dynamic=False)

    # A step, in the order of the calls.

    def set_lr_scale(self, scale: float) -> None:
        """Set every group's learning rate to its peak times the scale."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * scale

    def clip_grad_norm(self, scaler: torch.amp.GradScaler, max_norm: float) -> Tensor:
        """Unscale the gradients and clip their norm to max_norm (0: don't clip); the norm before, on the device."""
        scaler.unscale_(self)  # type: ignore[arg-type]  # it needs param_groups alone
        return full_tensor(nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf))

    def update(self, scaler: torch.amp.GradScaler, skip: Tensor | None = None) -> None:
        """Step, and drop the gradients.

        skip: a scalar on the device, 1.0 if this step is to change nothing. The scaler skips a float16 step that
        overflowed.
        """
        self.skip = skip
        scaler.step(self)  # type: ignore[arg-type]  # it needs step alone
        scaler.update()
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        """Update the parameters by their gradients, unless `skip` is 1: then neither parameters nor state change.

        Optimizers that can't skip on the device (all but adamw, adam, lion and muon) wait for it to know.
        """
        for optimizer in self.optimizers:
            if isinstance(optimizer, SkippableOptimizer) or optimizer.defaults.get("fused"):
                found_inf = None if self.skip is None else self.skip.to(self.parameters[0].device)
                optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # torch's fused ones read it too
                optimizer.step()
            elif self.skip is None or not self.skip:
                self.gather_full_parameters()
                optimizer.step()
                self.scatter_full_parameters()

    # Full copies of sharded parameters, for optimizers that are not elementwise. They have memory only during a step.

    def with_full_parameters(self, groups: list[Group]) -> list[Group]:
        """The groups with full copies in the place of sharded parameters, if there are any."""
        if not any(isinstance(p, DTensor) for p in self.parameters):
            return groups
        self.full_parameters = {p: nn.Parameter(torch.zeros(p.shape, device=p.device)) for p in self.parameters}
        for p, full in self.full_parameters.items():
            self.names[id(full)] = self.names[id(p)]
        return [group | {"params": [self.full_parameters[p] for p in group["params"]]} for group in groups]

    def gather_full_parameters(self) -> None:
        for p, full in self.full_parameters.items():
            full.data = full_tensor(p.detach())
            full.grad = None if p.grad is None else full_tensor(p.grad)

    @torch.no_grad()
    def scatter_full_parameters(self) -> None:
        for p, full in self.full_parameters.items():
            p.copy_(shard_like(full.detach(), p))
        self.free_full_parameters()

    def free_full_parameters(self) -> None:
        for full in self.full_parameters.values():
            full.data = full.data.new_empty(0)
            full.grad = None

    # State, for checkpoints.

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, other values) of the state, keyed "optimizer/parameter/name"; the values also name the classes."""
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {"classes": self.class_names(), "kind": self.kind}
        for i, optimizer in enumerate(self.optimizers):
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    key = f"{i}/{self.names[id(parameter)]}/{name}"
                    if isinstance(value, Tensor):
                        tensors[key] = value
                    else:
                        values[key] = value
        return tensors, values

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up a saved state; rates, betas and decay stay the arguments'. Raises UserError if it doesn't fit."""
        # 1. The same optimizers, and the same kind of state.
        saved_classes, classes = values["classes"], self.class_names()
        if saved_classes != classes:
            raise UserError(
                f"--optimizer: the checkpoint's state is that of {' and '.join(saved_classes)}, "
                f"not of {' and '.join(classes)}; resume with the run's own optimizer"
            )
        if values["kind"] != self.kind:
            raise UserError(
                f"--optimizer_kwargs, --momentum: the checkpoint's state was made with {values['kind']}, "
                f"not {self.kind}; resume with the run's own"
            )

        # 2. "optimizer/parameter/name" to the optimizer's own numbers of its parameters.
        parameters = [self.numbered_parameters(optimizer) for optimizer in self.optimizers]
        states: list[dict[int, dict[str, Any]]] = [{} for _ in self.optimizers]
        for key, value in {**values, **tensors}.items():
            if key in ("classes", "kind"):
                continue
            i, parameter_name, name = key.split("/")
            number, parameter = parameters[int(i)][parameter_name]
            if isinstance(value, Tensor) and value.dim():
                value = shard_like(value, parameter)
            states[int(i)].setdefault(number, {})[name] = value

        # 3. Load.
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    def class_names(self) -> list[str]:
        return [type(optimizer).__name__ for optimizer in self.optimizers]

    def numbered_parameters(self, optimizer: torch.optim.Optimizer) -> dict[str, tuple[int, nn.Parameter]]:
        """name -> (number in the optimizer's state_dict, parameter)."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return {self.names[id(p)]: (number, p) for number, p in enumerate(parameters)}
