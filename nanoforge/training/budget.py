"""The best model for a budget: its size, batch, steps and rates, by a measured speed and a law. Imports no torch.

The law predicts the validation loss, in nats per token, of a model with N weights in its blocks after D tokens of a
text of U tokens in steps of B tokens. With N, D, D0 and D' in millions:

    loss = e + k L,    L = sqrt((A N^-g)^2 + ((D0 + D')^-g)^2)

As in Kaplan et al. (2020, equation 1.5) a model that is small for its tokens learns nothing more, and size and tokens
have one exponent, nearly as in Hoffmann et al. (2022): the best size is proportional to the tokens. D0 is what a model
learns at once. D' are the fresh tokens in small steps that D are worth. Repeated ones are worth less (Muennighoff et
al. 2023, equation 5): U + U R (1 - exp(-(D / U - 1) / R)) for D > U. Large steps make less of them (McCandlish et al.
2018): D / (1 + B / Bc), and Bc grows with the square root of the tokens (Zhang et al. 2024).

Each text has its own e and k, which `calibrate` finds by pilots. The best size and batch are the same for all e and k.
The constants were measured with configs/depth.py on a CPU (docs/budget.md). A budget buys fewer tokens for a larger
model, and more in larger steps: `plan_run` finds the batch for a size, `best_plan` the size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any, NamedTuple

from nanoforge.console import format_duration, plural
from nanoforge.training import depth

# ---------------------------------------------------------------------------------------------------------------------
# the law

LEAST_SCALE, MOST_SCALE = 0.25, 1.2  # k over a pilot's loss; of ten texts 0.3 to 1.05


@dataclass(frozen=True)
class Law:
    """The constants of the law, and what it says."""

    size_scale: float  # A
    exponent: float  # g
    start: float  # D0, in tokens
    batch_scale: float  # Bc after a million tokens
    epochs_worth: float  # R: so many fresh epochs are endless repetitions of a text worth

    def worth(self, tokens: float, unique: float) -> float:
        """The fresh tokens that so many tokens of a text of `unique` tokens are worth."""
        if tokens <= unique:
            return tokens
        return unique * (1 - self.epochs_worth * math.expm1(-(tokens / unique - 1) / self.epochs_worth))

    def critical_batch(self, worth: float) -> float:
        """Tokens of a step, Bc, that need twice as many tokens in all as small steps do. worth: of the run's tokens."""
        return self.batch_scale * math.sqrt(worth / 1e6)

    def loss(self, weights: float, tokens: float, unique: float, step_tokens: float = 0.0) -> float:
        """L. weights: of the blocks; tokens: of the run; unique: of the text; step_tokens: of a step."""
        worth = self.worth(tokens, unique)
        worth /= 1 + step_tokens / self.critical_batch(worth)
        return math.hypot(self.size_scale * (weights / 1e6) ** -self.exponent, self.data_part(worth))

    def data_part(self, worth: float) -> float:
        """The part of L that falls with the tokens."""
        return ((self.start + worth) / 1e6) ** -self.exponent

    def optimal_weights(self, tokens: float, unique: float) -> float:
        """The weights for which so many tokens are the best use of compute: there both parts of L fall alike."""
        worth = self.worth(tokens, unique)
        size_part = self.data_part(worth) * math.sqrt(worth / (self.start + worth))
        return 1e6 * (size_part / self.size_scale) ** (-1 / self.exponent)


LAW = Law(size_scale=0.512, exponent=0.203, start=12_200, batch_scale=31_300, epochs_worth=2.0)


class Pilot(NamedTuple):
    """A small run of the text at hand."""

    tokens: int
    step_tokens: int
    law: float  # the law's L of it
    val_loss: float


class Calibration(NamedTuple):
    """The losses of a text: offset + scale x the law's L."""

    offset: float
    scale: float

    def loss(self, law: float) -> float:
        return self.offset + self.scale * law


def calibrate(first: Pilot, last: Pilot) -> Calibration:
    """Through the last pilot, with the scale that it has with the first one, within what texts have. By the law the
    last one is better."""
    scale = (first.val_loss - last.val_loss) / (first.law - last.law)
    scale = last.val_loss * min(max(LEAST_SCALE, scale / last.val_loss), MOST_SCALE)
    return Calibration(last.val_loss - scale * last.law, scale)


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

    def step_work(self, rows: int, block_size: int, vocab_size: int) -> "Work":
        """What a step does: its tokens, and Muon's 5 Newton-Schulz iterations on all matrices."""
        tokens = rows * block_size
        flops = self.token_flops(block_size, vocab_size) * tokens + 300 * self.n_layer * self.n_embd**3
        numbers = (16 * self.n_layer * self.n_embd + 4 * vocab_size) * tokens
        return Work(self.n_layer + 1, numbers, flops)


class Work(NamedTuple):
    """What a step does. Each takes its time: starting operations, moving numbers through memory, multiplying."""

    layers: float  # the head and the rest count as one
    numbers: float  # activations, which other operations than matrix products read and write
    flops: float


class StepTime(NamedTuple):
    """A measured step."""

    work: Work
    seconds: float


@dataclass(frozen=True)
class Speed:
    """Seconds for each unit of a step's work."""

    layer_seconds: float
    number_seconds: float
    flop_seconds: float

    @classmethod
    def fit(cls, measured: Sequence[StepTime], peak_flops: float) -> "Speed":
        """By least squares of the relative error, none below 0. peak_flops: of large matrix products, a second; what
        few steps leave open is decided for products at half this speed."""
        rows = [[amount / step.seconds for amount in step.work] for step in measured]
        targets = [1.0] * len(rows)
        rows.append([0.0, 0.0, PRIOR_WEIGHT * peak_flops / 2])
        targets.append(PRIOR_WEIGHT)
        rates = [0.0, 0.0, 2 / peak_flops]
        for _ in range(FIT_ROUNDS):  # one unknown after the other
            for i in range(3):
                squares = sum(row[i] ** 2 for row in rows)
                rest = [target - sum(map(mul, row, rates)) for row, target in zip(rows, targets, strict=True)]
                if squares:
                    rates[i] = max(0.0, rates[i] + sum(row[i] * r for row, r in zip(rows, rest, strict=True)) / squares)
        return cls(*rates)

    def step_seconds(self, work: Work) -> float:
        return sum(map(mul, work, (self.layer_seconds, self.number_seconds, self.flop_seconds)))


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
SIZE_AND_BATCH = ("n_layer", "n_embd", "n_head", "block_size", "batch_size", "gradient_accumulation_steps")
MAX_DEPTH = 64
MAX_STEP_TOKENS = 2**22
SMALL_STEP = 32  # a step of this part of the critical batch is small
PRIOR_WEIGHT = 0.1  # of the assumed speed of matrix products, beside a measured step
FIT_ROUNDS = 300
MAX_EPOCHS = 30.0  # beyond, a text has nothing more to give
OVERFITS = 10  # Plan.overfitting above which dropout helps: at 7.5 it did not
WEIGHTS_PER_TOKEN = 10  # of the text, at most: nanoGPT's model of Tiny Shakespeare, which overfits without dropout
NEARLY = 0.002  # by so much of the lowest predicted loss a smaller model may be worse
EVAL_SHARE = 0.06  # of the budget, at most, for evaluations
N_EVALUATIONS = 10  # at most; twice as many where early stopping counts them
MIN_EVAL_TOKENS = 16384  # of an evaluation, unless that leaves no second one


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

    def part(self, share: float) -> "Budget":
        return Budget(share * self.seconds, share * self.flops, share * self.tokens)


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
    def step_tokens(self) -> int:
        return self.rows * self.block_size

    @property
    def tokens(self) -> int:
        return self.steps * self.step_tokens

    @property
    def epochs(self) -> float:
        return self.tokens / self.unique

    @property
    def overfitting(self) -> float:
        """How much of the text the model may learn by heart: its epochs, less where it has fewer weights than the text
        has tokens."""
        return self.epochs * min(1.0, self.shape.weights / self.unique)

    @property
    def worth(self) -> float:
        """The fresh tokens that its tokens are worth."""
        return LAW.worth(self.tokens, self.unique)

    def describe(self) -> str:
        return f"{self.shape.n_layer} layers x {self.shape.n_embd}"


def aspect(n_layer: int) -> int:
    """Width over depth: 32 at 4 layers, where the law was measured, 64 at the 12 of GPT-2's size."""
    return round(32 * (n_layer / 4) ** 0.63)


def block_tokens(tokens: float) -> float:
    """Context length from the training tokens: 64 at 0.4 M, 128 at 3.3 M (configs/depth.py), 1,024 at 1.2 G
    (configs/gpt2_124m_modern.py)."""
    return 128 * (tokens / depth.MEASURED_TOKENS) ** 0.353


def ladder(text: Text, fixed: Mapping[str, Any]) -> list[Shape]:
    """The sizes to try, the smallest first; what is fixed is the same in all. Of a small text none that it overfits."""
    depths = [fixed["n_layer"]] if "n_layer" in fixed else range(1, MAX_DEPTH + 1)
    shapes = []
    for n_layer in depths:
        width, heads = depth.shape(n_layer, aspect(n_layer), fixed)
        shapes.append(Shape(n_layer, width, fixed.get("n_head", heads)))
    shapes.sort(key=lambda shape: shape.weights)
    most_weights = max(shapes[0].weights, WEIGHTS_PER_TOKEN * text.tokens)
    return [shape for shape in shapes if shape.weights <= most_weights]


def plan_run(
    shape: Shape, budget: Budget, speed: Speed | None, text: Text, fixed: Mapping[str, Any], ranks: int = 1
) -> Plan | None:
    """The run of this size that spends the budget, with the batch of the lowest loss; None without a step.

    The context follows from the run's tokens, which follow from the context: found by going round.
    ranks: their number divides the sequences of a step.
    """
    tokens = depth.MEASURED_TOKENS
    best: dict[int, Plan | None] = {}  # by context
    while True:
        block_size = nearest(contexts(text, fixed), block_tokens(tokens))
        if block_size in best:
            break
        plans = [
            spend(shape, budget, speed, text, block_size=block_size, rows=rows)
            for rows in batches(fixed, ranks, max(1, MAX_STEP_TOKENS // block_size))
        ]
        best[block_size] = best_batch(list(filter(None, plans)))
        plan = best[block_size]
        tokens = plan.tokens if plan else tokens / 8
    return min(filter(None, best.values()), key=lambda plan: abs(log_ratio(plan)), default=None)


def best_batch(plans: list[Plan]) -> Plan | None:
    """The plan with the lowest loss, but no steps so small that larger ones would hardly need more tokens."""
    large = [plan for plan in plans if plan.step_tokens >= LAW.critical_batch(plan.worth) / SMALL_STEP] or plans[-1:]
    return min(large, key=lambda plan: plan.loss, default=None)


def log_ratio(plan: Plan) -> float:
    """How far a plan's context is from the rule's."""
    return math.log(plan.block_size / block_tokens(plan.tokens))


def nearest(values: Sequence[int], ideal: float) -> int:
    """The value whose ratio to the ideal one is nearest to 1."""
    return min(values, key=lambda value: abs(math.log(value / ideal)))


def contexts(text: Text, fixed: Mapping[str, Any]) -> list[int]:
    """Context lengths to try: what is fixed, else powers of two that leave room for a few windows in both splits."""
    longest = max(1, min(text.tokens, text.val_tokens) // 4)
    if "block_size" in fixed:
        return [fixed["block_size"]]
    return [2**i for i in range(4, 14) if 2**i <= longest] or [longest]


def batches(fixed: Mapping[str, Any], ranks: int, most: int) -> list[int]:
    """Sequences of a step to try: what is fixed, else powers of two that the ranks share evenly, to about `most`."""
    unit = fixed.get("batch_size", 1) * fixed.get("gradient_accumulation_steps", 1)
    if "batch_size" in fixed and "gradient_accumulation_steps" in fixed:
        return [unit]
    unit *= ranks // math.gcd(unit, ranks)
    if "batch_size" in fixed:
        return [unit]  # one micro-batch a step, unless the ranks need more
    return [unit * 2**i for i in range(1 + max(0, int(math.log2(most / unit))))] if unit < most else [unit]


def spend(shape: Shape, budget: Budget, speed: Speed | None, text: Text, *, block_size: int, rows: int) -> Plan | None:
    """The run with this batch that spends the budget, or as much of it as the text is good for."""
    step_seconds = speed.step_seconds(shape.step_work(rows, block_size, text.vocab_size)) if speed else 0.0
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
    loss = LAW.loss(shape.weights, steps * rows * block_size, text.tokens, rows * block_size)
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
    """The smallest plan whose predicted loss is nearly the lowest; for a budget of tokens the size that they suit best.
    plans: the smallest size first."""
    if not budget.tokens:
        lowest = min(plan.loss for plan in plans)
        return next(plan for plan in plans if plan.loss <= lowest * (1 + NEARLY))
    ideal = LAW.optimal_weights(budget.tokens, text.tokens)
    return min(plans, key=lambda plan: abs(math.log(plan.shape.weights / ideal)))


# ---------------------------------------------------------------------------------------------------------------------
# what follows from the plan


def dropout(plan: Plan) -> float:
    """Dropout for a plan that overfits its text."""
    if plan.overfitting <= OVERFITS:
        return 0.0
    return 0.1 if plan.overfitting <= 2 * OVERFITS else 0.2


def derive_args(plan: Plan, text: Text, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of train.py that carry out a plan; those that are fixed are left out."""
    # 1. Batch and rates, by the rules of the dial; Muon's update has the same size for any batch.
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

    values["muon_learning_rate"] = depth.round_to_digits(depth.muon_lr(plan.tokens))

    # 2. Against overfitting; evaluations.
    overfits = plan.overfitting > OVERFITS
    all_eval_tokens = EVAL_SHARE * plan.tokens * 3 / 2  # of a split: forward alone, of both splits
    n_evaluations = int(all_eval_tokens / MIN_EVAL_TOKENS) - 1  # besides the first one, of the initial weights
    n_evaluations = max(1, min(n_evaluations, 2 * N_EVALUATIONS if overfits else N_EVALUATIONS))
    eval_tokens = min(all_eval_tokens / (n_evaluations + 1), text.val_tokens)
    values |= {
        "n_head": plan.shape.n_head,
        "block_size": plan.block_size,
        "dropout": dropout(plan),
        "early_stop_patience": 5 if overfits else 0,
        "eval_interval": max(1, math.ceil(plan.steps / n_evaluations)),
        "eval_iters": max(1, round(eval_tokens / (values["batch_size"] * plan.block_size))),
        "log_interval": max(1, plan.steps // 100),
    }
    return {name: values[name] for name in CHOSEN if name not in fixed}


def explain(plan: Plan, text: Text, speed: Speed | None, calibration: Calibration | None, seconds: float) -> list[str]:
    """What was chosen, and why, in sentences. seconds: of measuring."""
    sentences = []
    if speed:
        work = plan.shape.step_work(plan.rows, plan.block_size, text.vocab_size)
        sentences.append(
            f"measured in {format_duration(seconds)}: a step takes {plan.step_seconds * 1e3:.3g} ms, of which "
            f"{work.layers * speed.layer_seconds * 1e3:.2g} ms for any batch; "
            f"{work.flops / plan.step_seconds / 1e9:,.3g} GFLOPs a second"
        )
    sentences.append(
        f"{plan.describe()}, {plan.shape.weights / 1e6:.2g} M weights in the blocks: the best size by the law; "
        f"{plan.tokens / 1e6:.3g} M tokens are {plural(plan.steps, 'step')} of {plan.rows} x {plan.block_size}"
    )
    if plan.epochs > 1:
        sentences.append(
            f"the text is read {plan.epochs:.1f} times, which is worth {plan.worth / 1e6:.3g} M fresh tokens; "
            f"dropout {dropout(plan):g}"
        )
    if calibration:
        sentences.append(
            f"predicted val_loss {calibration.loss(plan.loss):.3f}, by two pilots on this text: "
            f"{calibration.offset:.2f} + {calibration.scale:.2f} x the law's {plan.loss:.3f}"
        )
    else:
        sentences.append("predicted val_loss: none, since the budget is too small for two pilots")
    return [f"budget: {sentence}" for sentence in sentences]
