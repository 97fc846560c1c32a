"""Optimizers: parameter groups, a registry, and one object that drives whichever were built.

Matrices are decayed, vectors are not. With muon, matrices of the blocks go to Muon and everything else to AdamW.
"""

import copy
import importlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from nanoforge.distributed import full_tensor, is_dtensor, reshard, shard_like
from nanoforge.errors import UserError
from nanoforge.training.muon import Muon
from nanoforge.training.skippable import SkippableOptimizer
from nanoforge.training.weight_average import N_UPDATES, WeightAverage

Parameters = dict[str, nn.Parameter]
Group = dict[Any, Any]  # a parameter group of torch.optim, or the state of a parameter


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
            lr = group["lr"] * update_scale
            p.mul_(1 - lr * group["weight_decay"])
            p.sub_(torch.lerp(grad, momentum, beta1).sign_() * lr)
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
    muon_momentum_warmup: int = 0  # steps
    cautious_weight_decay: bool = False  # of Muon
    aux_eps: float = 1e-8  # of AdamW, which trains what Muon does not
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the optimizer's class
    embedding_lr: float = 0.0  # of the token embedding; 0: lr
    head_lr: float = 0.0  # of an untied head; 0: lr
    ema_decay: float = 0.0  # of the average of the weights that is evaluated; 0: none


def no_options(config: OptimConfig) -> dict[str, Any]:
    return {}


def betas(config: OptimConfig) -> dict[str, Any]:
    return {"betas": config.betas}


def betas_and_fused(config: OptimConfig) -> dict[str, Any]:
    return {"betas": config.betas, "fused": True}


def momentum(config: OptimConfig) -> dict[str, Any]:
    return {"momentum": config.momentum}


def muon_options(config: OptimConfig) -> dict[str, Any]:
    return config.kwargs | {
        "momentum": config.muon_momentum,
        "momentum_warmup": config.muon_momentum_warmup,
        "cautious": config.cautious_weight_decay,
        "dtype": config.muon_dtype,
    }


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
    except Exception as error:  # a package may raise anything where it is imported
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
    except Exception as error:  # packages have classes of errors of their own
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
        set_elsewhere = {"lr", "params", "weight_decay", "momentum", "momentum_warmup", "cautious", "splits", "dtype"}
    repeated = sorted(set_elsewhere & config.kwargs.keys())
    if repeated:
        raise UserError(f"--optimizer_kwargs: {', '.join(repeated)} follow from arguments of their own")


# ---------------------------------------------------------------------------------------------------------------------
# state of any optimizer as tensors and JSON

GROUP_ARGUMENTS = ("params", "lr", "peak_lr")  # entries of a group that are never state
OTHER_PREFIXES = ("groups/", "entries/")  # of values that belong to no parameter


def pack(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """A value of a state for JSON; its tensors go to `tensors`, under names that begin with the key.

    Lists, tuples, sets and dicts become {"list": [...]}, ..., a tensor {"tensor": name}. Raises TypeError for others.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    is_plain = type(value) in (Tensor, nn.Parameter) or is_dtensor(value)
    if is_plain and value.layout == torch.strided:
        tensors[key] = value.detach()
        return {"tensor": key}
    if type(value) in (list, tuple, set):
        items = sorted(value) if isinstance(value, set) else value
        return {type(value).__name__: [pack(item, f"{key}/{i}", tensors) for i, item in enumerate(items)]}
    if type(value) is dict:
        return {"dict": [[name, pack(item, f"{key}/{name}", tensors)] for name, item in value.items()]}
    raise TypeError(f"{key} is a {type(value).__name__}, which no checkpoint holds")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `pack` made this of."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {name: unpack(item, tensors) for name, item in content}
    return {"list": list, "tuple": tuple, "set": set}[kind](unpack(item, tensors) for item in content)


def with_saved_dtypes(loaded: Any, saved: Any) -> Any:
    """A state that torch's load_state_dict has cast to its parameter's dtype, with the tensors that were saved."""
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        return saved.to(loaded.device) if saved.dtype != loaded.dtype else loaded
    if isinstance(saved, dict):
        return {name: with_saved_dtypes(loaded[name], value) for name, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(with_saved_dtypes(*pair) for pair in zip(loaded, saved, strict=True))
    return saved


def equal_values(a: Any, b: Any) -> bool:
    """Whether two values of a state are equal, bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal_values(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(equal_values(*pair) for pair in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def to_name(text: str) -> str | int:
    """A name in a state: some packages number the parts of a parameter."""
    return int(text) if text.isdigit() else text


def below(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values whose keys have a prefix, by the rest of their keys."""
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def with_entries(state_dict: dict[str, Any], values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A state_dict with its further entries from ENTRY/NAME -> value; an entry without names is the value itself."""
    for key, value in below(values, prefix).items():
        entry, _, name = key.partition("/")
        state_dict[entry] = {**state_dict[entry], name: value} if name else value
    return state_dict


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it trains other weights than it evaluates: schedule-free optimizers have train() and eval()."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def start_averaging(
    name: str, optimizers: Iterable[torch.optim.Optimizer], config: OptimConfig
) -> list[torch.optim.Optimizer]:
    """The optimizers that average the weights themselves, in the mode of training. Raises UserError."""
    averaging = [optimizer for optimizer in optimizers if has_modes(optimizer)]
    if averaging and config.ema_decay:
        raise UserError(f"--ema_decay: --optimizer={name} averages the weights itself; leave one of them out")
    for optimizer in averaging:
        optimizer.train()  # type: ignore[attr-defined]
    return averaging


def runs_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step needs nothing of the host: it takes learning rates as tensors, and changes nothing where the
    tensor found_inf is 1. Torch's fused optimizers are like that, and ours."""
    is_fused = type(optimizer).__module__.startswith("torch.optim") and bool(optimizer.defaults.get("fused"))
    return is_fused or isinstance(optimizer, SkippableOptimizer)


# ---------------------------------------------------------------------------------------------------------------------
# the driver


class Optimizer:
    """One or more torch optimizers over a model's parameters, driven together.

    Every group's learning rate is its own peak times a scale that the schedule gives. State is saved under the
    parameters' names. To a GradScaler this is one optimizer, with `param_groups` and `step`: an overflow anywhere
    skips the step everywhere.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        config: OptimConfig,
        muon_splits: Mapping[str, list[int]] | None = None,
        *,
        is_trial: bool = False,
    ) -> None:
        """muon_splits: names of weights that stack several matrices -> the rows of each. Raises UserError, also for a
        package's class that could not be resumed, which is tried out unless this is such a trial."""
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.model = model
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
        options |= {"eps": config.aux_eps} if use_muon else config.kwargs
        if not spec.elementwise:
            groups = self.with_full_parameters(groups)
        if groups:
            self.optimizers.append(build_optimizer(name, spec.cls, groups, config.lr, options))
        self.free_full_parameters()

        # 3. Muon.
        if muon_parameters:
            splits = {muon_parameters[n]: rows for n, rows in (muon_splits or {}).items() if n in muon_parameters}
            options = muon_options(config) | {"splits": splits}
            self.optimizers.append(build_optimizer(name, Muon, [muon_group], config.muon_lr, options))

        for group in self.param_groups:
            group["peak_lr"] = group["lr"]
        self.peak_lrs = self.make_peak_lrs()
        self.lrs = self.peak_lrs.clone()
        self.share_lrs()
        self.averaging = start_averaging(name, self.optimizers, config)
        self.average = WeightAverage(self.parameters, config.ema_decay) if config.ema_decay else None
        self.initial_values = copy.deepcopy(self.other_values())
        if is_trial or not groups or use_muon or name in OPTIMIZERS:
            return
        prove_resumable(name, config, self.parameters[0].device, is_sharded=bool(self.full_parameters))

    @property
    def param_groups(self) -> list[Group]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def compile(self) -> None:
        """Compile Muon's step."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.compile()

    def make_peak_lrs(self) -> Tensor:
        """The groups' peak learning rates. A CPU reads a tensor back as a number, which is to be the one that was set;
        a GPU's kernels take float32."""
        device = self.parameters[0].device
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        return torch.tensor([group["peak_lr"] for group in self.param_groups], dtype=dtype, device=device)

    def share_lrs(self) -> None:
        """Make the learning rates of groups that take tensors views of `lrs`: one kernel changes them all."""
        numbers = iter(self.lrs.unbind())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                lr = next(numbers)
                group["lr"] = lr if runs_on_device(optimizer) else group["peak_lr"]

    @contextmanager
    def capturable(self) -> Iterator[None]:
        """While a CUDA graph is captured: torch's classes ask for this entry of their groups, which changes nothing of
        what fused ones do."""
        groups = [group for group in self.param_groups if "capturable" in group]
        for group in groups:
            group["capturable"] = True
        try:
            yield
        finally:
            for group in groups:
                group["capturable"] = False

    # A step, in the order of the calls.

    def set_lr_scale(self, scale: float) -> None:
        """Set every group's learning rate to its peak times the scale."""
        torch.mul(self.peak_lrs, scale, out=self.lrs)
        for optimizer in self.optimizers:
            if not runs_on_device(optimizer):
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * scale

    def set_step(self, step: int) -> None:
        """Set what else follows from the number of the step: Muon's momentum."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.set_step(step)

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
            if runs_on_device(optimizer):
                found_inf = None if self.skip is None else self.skip.to(self.parameters[0].device)
                optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # torch's fused ones read it too
                optimizer.step()
            elif self.skip is None or not self.skip:
                self.gather_full_parameters()
                optimizer.step()
                self.scatter_full_parameters()
        if self.average is not None:
            self.average.update(self.skip)

    # Full copies of sharded parameters, for optimizers that are not elementwise. They have memory only during a step.

    def with_full_parameters(self, groups: list[Group]) -> list[Group]:
        """The groups with full copies in the place of sharded parameters, if there are any."""
        if not any(is_dtensor(p) for p in self.parameters):
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

    # Weights to evaluate: an average of those that are trained.

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The parameters as they are evaluated and saved; afterwards those that are trained again, bit for bit."""
        if self.average is None and not self.averaging:
            yield
            return
        with ExitStack() as stack:
            stack.callback(reshard, self.model)  # at last, as the next step would use what the evaluation has gathered
            stack.enter_context(self.evaluation_mode() if self.average is None else self.average.swapped())
            reshard(self.model)
            yield

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Within it the parameters are those of the optimizers' own eval(), as of schedule-free ones."""
        trained = [p.detach().clone() for p in self.parameters]
        self.set_mode("eval")
        try:
            yield
        finally:
            self.set_mode("train")
            with torch.no_grad():
                for p, weight in zip(self.parameters, trained, strict=True):
                    p.copy_(weight)

    def set_mode(self, mode: str) -> None:
        """Call the optimizers' own train() or eval(), which change the parameters in place."""
        self.gather_full_parameters()
        for optimizer in self.averaging:
            getattr(optimizer, mode)()
        self.scatter_full_parameters()

    # State, for checkpoints.

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, other values) of the state, keyed "optimizer/parameter/name"; the values also name the classes.

        Of `other_values` those that changed since the optimizers were made. Raises TypeError for what can't be saved.
        """
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {"classes": self.class_names(), "kind": self.kind}
        for i, optimizer in enumerate(self.optimizers):
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    key = f"{i}/{self.names[id(parameter)]}/{name}"
                    packed = pack(value, key, tensors)
                    if packed != {"tensor": key}:
                        values[key] = packed
        for key, value in self.other_values().items():
            if key not in self.initial_values or not equal_values(value, self.initial_values[key]):
                values[key] = pack(value, key, tensors)
        if self.average is not None:
            tensors[N_UPDATES] = self.average.n_updates
        if self.average is not None or self.averaging:
            tensors |= {f"trained/{self.names[id(p)]}": p.detach() for p in self.parameters}
        return tensors, values

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up a saved state; rates, betas and decay stay the arguments'. Raises UserError if it doesn't fit.

        The parameters are those that were evaluated; they become those that are trained.
        """
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

        # 2. What is no parameter's, as it was saved, or else as it is in new optimizers.
        other = copy.deepcopy(self.initial_values)
        other |= {key: unpack(values[key], tensors) for key in values if key.startswith(OTHER_PREFIXES)}

        # 3. The state of parameters, in the dtypes that were saved.
        for i, states in enumerate(self.unpack_states(tensors, values)):
            optimizer = self.optimizers[i]
            optimizer.load_state_dict(with_entries(optimizer.state_dict() | {"state": states}, other, f"entries/{i}/"))
            for number, parameter in self.numbered_parameters(optimizer).values():
                if number in states:
                    loaded = optimizer.state[parameter]
                    optimizer.state[parameter] = with_saved_dtypes(loaded, states[number])
        for number, group in enumerate(self.param_groups):
            arguments = {name: group[name] for name in GROUP_ARGUMENTS}
            group.clear()
            group.update(below(other, f"groups/{number}/") | arguments)
        self.share_lrs()

        # 4. The average, in whose place the weights that are trained come.
        if self.average is not None:
            self.average.restart(tensors.get(N_UPDATES))
        with torch.no_grad():
            for p in self.parameters:
                trained = tensors.get(f"trained/{self.names[id(p)]}")
                if trained is not None:
                    p.copy_(shard_like(trained, p))

    def other_values(self) -> dict[str, Any]:
        """What the optimizers hold in their groups, and what they add to torch's state_dict, as heavyball does."""
        values: dict[str, Any] = {}
        for number, group in enumerate(self.param_groups):
            values |= {f"groups/{number}/{name}": group[name] for name in group if name not in GROUP_ARGUMENTS}
        for i, optimizer in enumerate(self.optimizers):
            for entry, value in optimizer.state_dict().items():
                if entry not in ("state", "param_groups"):
                    parts = value if isinstance(value, dict) else {"": value}
                    values |= {f"entries/{i}/{entry}/{name}": part for name, part in parts.items()}
        return values

    def unpack_states(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> list[dict[int, Group]]:
        """For each optimizer, its own number of a parameter -> its state, from "optimizer/parameter/name"."""
        parameters = [self.numbered_parameters(optimizer) for optimizer in self.optimizers]
        states: list[dict[int, Group]] = [{} for _ in self.optimizers]
        for key, value in {**values, **tensors}.items():
            i, _, rest = key.partition("/")
            parameter_name, _, name = rest.partition("/")
            if not i.isdigit() or "/" in name:  # of a group, or a part of another value
                continue
            number, parameter = parameters[int(i)][parameter_name]
            if isinstance(value, Tensor) and value.dim():
                value = shard_like(value, parameter)
            states[int(i)].setdefault(number, {})[to_name(name)] = unpack(value, tensors)
        return states

    def class_names(self) -> list[str]:
        return [type(optimizer).__name__ for optimizer in self.optimizers]

    def numbered_parameters(self, optimizer: torch.optim.Optimizer) -> dict[str, tuple[int, nn.Parameter]]:
        """name -> (number in the optimizer's state_dict, parameter)."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return {self.names[id(p)]: (number, p) for number, p in enumerate(parameters)}


# ---------------------------------------------------------------------------------------------------------------------
# classes of other packages are tried out


def prove_resumable(name: str, config: OptimConfig, device: torch.device, *, is_sharded: bool = False) -> None:
    """Train two tiny layers with a package's class, evaluate and save them, and go on from what was saved.

    is_sharded: go on with parameters that move in memory, as full copies of sharded ones do. Raises UserError unless
    that makes the same weights, bit for bit.
    """
    config = replace(config, lr=config.lr or 1e-3)

    def start() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).to(device)
        return model, Optimizer(name, model, config, is_trial=True)

    def take_steps(model: nn.Module, optimizer: Optimizer, steps: range, *, move: bool = False) -> None:
        for step in steps:
            torch.manual_seed(step)
            for p in model.parameters():
                p.data = p.data.clone() if move else p.data
                p.grad = torch.randn_like(p)
            optimizer.step()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model, optimizer = start()
            take_steps(model, optimizer, range(3))
            with optimizer.evaluation_weights():
                weights = copy.deepcopy(model.state_dict())
            tensors, values = optimizer.state_dict()
            saved = safetensors.torch.save({key: t.to("cpu", copy=True).contiguous() for key, t in tensors.items()})
            values = json.loads(json.dumps(values))
            take_steps(model, optimizer, range(3, 5))

            resumed_model, resumed = start()
            resumed_model.load_state_dict(weights)
            resumed.load_state_dict(safetensors.torch.load(saved), values)
            take_steps(resumed_model, resumed, range(3, 5), move=is_sharded)
        except UserError:
            raise
        except Exception as error:  # whatever a package raises
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"--optimizer={name}: can't train, save and resume ({type(error).__name__}: {reason}); choose another"
            ) from None
    if not equal_values(dict(model.state_dict()), dict(resumed_model.state_dict())):
        where = " or does not work with --parallel=fsdp" if is_sharded else ""
        raise UserError(f"--optimizer={name}: keeps state that no checkpoint holds{where}; choose another")
