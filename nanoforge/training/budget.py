"""The best model for a budget: its size, batch, steps and rates, by a measured speed and a law. Imports no torch.

The law foretells the validation loss, in nats per token, of a model with N weights in its blocks after D tokens of a
text of U tokens (Hoffmann et al. 2022, equation 2):

    L(N, D) = E + A (N' / 1e6)^-alpha + B (D' / 1e6)^-beta

Repeated tokens are worth less than fresh ones, and so are weights beyond those that U fresh tokens suit best
(Muennighoff et al. 2023, equations 5 and 6): D' = U + U R (1 - exp(-(D / U - 1) / R)) for D > U, and N' likewise.

Its constants were measured with configs/depth.py on a CPU (docs/budget.md). A budget buys fewer tokens for a larger
model. `choose` tries the sizes of a ladder, and takes the one whose foretold loss is lowest.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from nanoforge.console import format_duration, plural
from nanoforge.training import depth

# ---------------------------------------------------------------------------------------------------------------------
# the law

FLOOR = 0.2  # E
SIZE_SCALE, SIZE_EXPONENT = 0.209, 0.30  # A, alpha
DATA_SCALE, DATA_EXPONENT = 0.845, 0.194  # B, beta
EPOCHS_WORTH = 15.0  # R of tokens: so many fresh epochs are endless repetitions of a text worth
WEIGHTS_WORTH = 5.3  # R of weights


def effective_tokens(tokens: float, unique: float) -> float:
    """The fresh tokens that so many tokens of a text of `unique` tokens are worth."""
    return saturate(tokens, unique, EPOCHS_WORTH)


def saturate(amount: float, unit: float, limit: float) -> float:
    """The amount up to `unit`; beyond, it rises ever more slowly, to unit x (1 + limit)."""
    if amount <= unit:
        return amount
    return unit * (1 - limit * math.expm1(-(amount / unit - 1) / limit))


def foretold_loss(weights: float, tokens: float, unique: float) -> float:
    """The law's validation loss. weights: of the blocks; tokens: of the run; unique: of the text."""
    weights = saturate(weights, optimal_weights(unique, unique), WEIGHTS_WORTH)
    size_part = SIZE_SCALE * (weights / 1e6) ** -SIZE_EXPONENT
    data_part = DATA_SCALE * (effective_tokens(tokens, unique) / 1e6) ** -DATA_EXPONENT
    return FLOOR + size_part + data_part


def optimal_weights(tokens: float, unique: float) -> float:
    """The weights for which so many tokens are the best use of compute: there both parts of the law fall alike."""
    data_part = DATA_SCALE * (effective_tokens(tokens, unique) / 1e6) ** -DATA_EXPONENT
    return 1e6 * (DATA_EXPONENT * data_part / (SIZE_EXPONENT * SIZE_SCALE)) ** (-1 / SIZE_EXPONENT)


# ---------------------------------------------------------------------------------------------------------------------
# what a step costs


class Shape(NamedTuple):
    """A size of the ladder."""

    n_layer: int
    n_embd: int
    n_head: int

    @property
    def weights(self) -> int:
        """Weights of the blocks."""
        return 12 * self.n_layer * self.n_embd**2

    def token_flops(self, block_size: int, vocab_size: int) -> float:
        """FLOPs of a training token, as GPT.flops_per_token has them."""
        return 6 * (self.weights + vocab_size * self.n_embd) + 12 * self.n_layer * self.n_embd * block_size

    def step_flops(self, rows: int, block_size: int, vocab_size: int) -> float:
        """FLOPs of a step's tokens, and of Muon's 5 Newton-Schulz iterations on all matrices."""
        return self.token_flops(block_size, vocab_size) * rows * block_size + 300 * self.n_layer * self.n_embd**3


class StepTime(NamedTuple):
    """A measured step."""

    n_layer: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class Speed:
    """Seconds of a step: a time for each layer (and one for the head and the rest), and a time for each FLOP."""

    layer_seconds: float
    flop_seconds: float

    @classmethod
    def fit(cls, measured: list[StepTime]) -> "Speed":
        """By least squares of the relative error, none of the two below 0. One step alone is all FLOPs."""
        rows = [((step.n_layer + 1) / step.seconds, step.flops / step.seconds) for step in measured]
        aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
        a, b = (sum(row[i] for row in rows) for i in (0, 1))
        determinant = aa * bb - ab * ab
        if len(rows) > 1 and determinant > 1e-9 * aa * bb:
            layer_seconds, flop_seconds = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
            if layer_seconds >= 0 and flop_seconds > 0:
                return cls(layer_seconds, flop_seconds)
        return cls(0.0, b / bb)

    def step_seconds(self, n_layer: int, flops: float) -> float:
        return (n_layer + 1) * self.layer_seconds + flops * self.flop_seconds


# ---------------------------------------------------------------------------------------------------------------------
# the choice

CHOSEN = (
    "n_layer",
    "n_embd",
    "n_head",
    "block_size",
    "batch_size",
    "gradient_accumulation_steps",
    "max_iters",
    "lr_decay_iters",
    "learning_rate",
    "muon_learning_rate",
    "muon_weight_decay",
    "dropout",
    "early_stop_patience",
    "eval_interval",
    "eval_iters",
    "log_interval",
)
MAX_DEPTH = 64
MAX_EPOCHS = 40.0  # beyond, a text has nothing more to give
NEARLY = 0.002  # by so much of the lowest foretold loss a smaller model may be worse
EVAL_SHARE = 0.06  # of the budget, at most, for evaluations
N_EVALUATIONS = 10


@dataclass(frozen=True)
class Text:
    """What is known of a text."""

    tokens: int  # to train on
    val_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class Budget:
    """What may be spent: one of the three. `seconds` are those of the steps, without what measuring took."""

    seconds: float = 0.0
    flops: float = 0.0
    tokens: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A size, and the run that the budget allows it."""

    shape: Shape
    block_size: int
    rows: int  # sequences of a step
    steps: int
    step_seconds: float  # 0 where the speed was not measured
    loss: float  # by the law
    unique: int  # tokens of the text
    spends_all: bool  # of the budget; else the text has nothing more to give

    @property
    def tokens(self) -> int:
        return self.steps * self.rows * self.block_size

    @property
    def epochs(self) -> float:
        return self.tokens / self.unique

    def describe(self) -> str:
        return f"{self.shape.n_layer} layers x {self.shape.n_embd}"


def aspect(n_layer: int) -> int:
    """Width over depth: 32 at 4 layers, where the law was measured, 64 at the 12 of GPT-2's size."""
    return round(32 * (n_layer / 4) ** 0.63)


def block_tokens(tokens: float) -> float:
    """Context length from the training tokens: 64 at 0.4 M (configs/shakespeare_cpu.py), 128 at 3.3 M
    (configs/depth.py), 1,024 at 1.2 G (configs/gpt2_124m_modern.py)."""
    return 128 * (tokens / depth.MEASURED_TOKENS) ** 0.353


def ladder(fixed: Mapping[str, Any]) -> list[Shape]:
    """The sizes to try, the smallest first; what is fixed is the same in all."""
    depths = [fixed["n_layer"]] if "n_layer" in fixed else range(1, MAX_DEPTH + 1)
    shapes = []
    for n_layer in depths:
        width, heads = depth.shape(n_layer, aspect(n_layer), fixed)
        shapes.append(Shape(n_layer, width, fixed.get("n_head", heads)))
    return sorted(shapes, key=lambda shape: shape.weights)


def plan_run(
    shape: Shape, budget: Budget, speed: Speed | None, text: Text, fixed: Mapping[str, Any], ranks: int = 1
) -> Plan | None:
    """The run of this size that spends the budget, with the batch and the context of the rules; None without a step.

    ranks: their number divides the sequences of a step.
    """
    best: tuple[float, Plan] | None = None
    max_block = max(1, min(text.tokens, text.val_tokens) - 1)
    blocks = [fixed["block_size"]] if "block_size" in fixed else [2**i for i in range(4, 14) if 2**i <= max_block]
    for block_size in blocks or [max_block]:
        for rows in batches(fixed, ranks):
            plan = spend(shape, budget, speed, text, block_size=block_size, rows=rows)
            if plan is None:
                continue
            distance = abs(math.log2(block_size / block_tokens(plan.tokens)))
            distance += abs(math.log2(rows * block_size / depth.batch_tokens(plan.tokens)))
            if best is None or distance < best[0]:
                best = (distance, plan)
    return best[1] if best else None


def batches(fixed: Mapping[str, Any], ranks: int) -> list[int]:
    """Sequences of a step to try: what is fixed, else powers of two that the ranks share evenly."""
    if "batch_size" in fixed and "gradient_accumulation_steps" in fixed:
        return [fixed["batch_size"] * fixed["gradient_accumulation_steps"]]
    unit = fixed.get("batch_size", 1) * fixed.get("gradient_accumulation_steps", 1)
    unit *= ranks // math.gcd(unit, ranks)
    if "batch_size" in fixed:
        return [unit]  # one micro-batch a step, unless the ranks need more
    return [unit * 2**i for i in range(16)]


def spend(shape: Shape, budget: Budget, speed: Speed | None, text: Text, *, block_size: int, rows: int) -> Plan | None:
    """The run with this batch that spends the budget, or as much of it as the text is good for."""
    flops = shape.step_flops(rows, block_size, text.vocab_size)
    step_seconds = speed.step_seconds(shape.n_layer, flops) if speed else 0.0
    if budget.seconds:
        n_steps = budget.seconds * (1 - EVAL_SHARE) / step_seconds
    elif budget.flops:
        n_steps = budget.flops / (shape.token_flops(block_size, text.vocab_size) * rows * block_size)
    else:
        n_steps = budget.tokens / (rows * block_size)
    most_steps = math.ceil(MAX_EPOCHS * text.tokens / (rows * block_size))
    steps = min(int(n_steps), most_steps)
    if steps < 1:
        return None
    loss = foretold_loss(shape.weights, steps * rows * block_size, text.tokens)
    return Plan(
        shape=shape,
        block_size=block_size,
        rows=rows,
        steps=steps,
        step_seconds=step_seconds,
        loss=loss,
        unique=text.tokens,
        spends_all=n_steps <= most_steps,
    )


def best_plan(plans: list[Plan], budget: Budget, text: Text) -> Plan:
    """The smallest plan whose foretold loss is nearly the lowest; for a budget of tokens the size that they suit
    best."""
    if not budget.tokens:
        lowest = min(plan.loss for plan in plans)
        return next(plan for plan in plans if plan.loss <= lowest * (1 + NEARLY))
    ideal = optimal_weights(budget.tokens, text.tokens)
    return min(plans, key=lambda plan: abs(math.log(plan.shape.weights / ideal)))


# ---------------------------------------------------------------------------------------------------------------------
# what follows from the plan


def dropout(epochs: float) -> float:
    """Dropout for a text that is read so many times."""
    if epochs <= 2:
        return 0.0
    return 0.1 if epochs <= 6 else 0.2


def derive_args(plan: Plan, text: Text, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of train.py that carry out a plan; those that are fixed are left out."""
    # 1. Batch and rates, by the rules of the dial.
    batch = {"max_tokens": plan.tokens, "max_iters": plan.steps, "n_embd": plan.shape.n_embd}
    fixed_batch = {name: fixed[name] for name in ("batch_size", "gradient_accumulation_steps") if name in fixed}
    micro_batches = fixed_batch.get("gradient_accumulation_steps")
    if "batch_size" in fixed_batch:
        micro_batches = plan.rows // fixed["batch_size"]
    elif micro_batches is None:
        micro_batches = -(-plan.rows * plan.block_size // depth.MAX_MICRO_BATCH_TOKENS)
    batch |= {"batch_size": plan.rows // micro_batches, "gradient_accumulation_steps": micro_batches}
    values = depth.derive_args(
        depth=plan.shape.n_layer, aspect=1, tokens_per_weight=1, block_size=plan.block_size, fixed=batch
    )

    # 2. Against overfitting; evaluations.
    overfits = plan.epochs > 4
    n_evaluations = 2 * N_EVALUATIONS if overfits else N_EVALUATIONS
    eval_tokens = EVAL_SHARE * plan.tokens / (n_evaluations + 1) * 3 / 2  # forward alone, of both splits
    eval_tokens = min(eval_tokens, text.val_tokens)
    values |= {
        "n_head": plan.shape.n_head,
        "block_size": plan.block_size,
        "dropout": dropout(plan.epochs),
        "early_stop_patience": 5 if overfits else 0,
        "eval_interval": max(1, math.ceil(plan.steps / n_evaluations)),
        "eval_iters": max(1, round(eval_tokens / (values["batch_size"] * plan.block_size))),
        "log_interval": max(1, plan.steps // 100),
    }
    return {name: values[name] for name in CHOSEN if name not in fixed}


def explain(plan: Plan, text: Text, speed: Speed | None, difficulty: float | None, seconds: float) -> list[str]:
    """What was chosen, and why, in sentences. difficulty: the pilot's loss over the law's; seconds: of measuring."""
    sentences = []
    if speed:
        overhead, rate = speed.layer_seconds * (plan.shape.n_layer + 1), 1 / speed.flop_seconds
        sentences.append(
            f"measured in {format_duration(seconds)}: a step takes {plan.step_seconds * 1e3:.3g} ms, of which "
            f"{overhead * 1e3:.2g} ms are for any batch, the rest at {rate / 1e9:,.3g} GFLOPs a second"
        )
    sentences.append(
        f"{plan.describe()}, {plan.shape.weights / 1e6:.2g} M weights in the blocks: it has the lowest foretold "
        f"loss; {plan.tokens / 1e6:.3g} M tokens are {plural(plan.steps, 'step')} of {plan.rows} x {plan.block_size}"
    )
    if plan.epochs > 1:
        worth = effective_tokens(plan.tokens, plan.unique) / 1e6
        sentences.append(
            f"the text is read {plan.epochs:.1f} times, which is worth {worth:.3g} M fresh tokens; "
            f"dropout {dropout(plan.epochs):g}"
        )
    if difficulty:
        sentences.append(
            f"foretold val_loss: {plan.loss * difficulty:.3f}; the law's, x {difficulty:.2f} as in the pilot"
        )
    else:
        sentences.append("foretold val_loss: none, since the budget is too small for a pilot")
    return [f"budget: {sentence}" for sentence in sentences]
