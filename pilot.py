"""What a budget has to know of this machine and this text: short trials, and the choice that follows from them.

A small model trains for a moment: its loss over the law's says how hard the text is. A few steps of it, and of the
sizes that look best, give the speed. All of it is a part of a time budget. The choice is made once, by
nanoforge/training/budget.py, and is in the run's record.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

import builders
from nanoforge import distributed
from nanoforge.data.token_bins import SPLITS, read_meta, read_shard, shard_paths
from nanoforge.device import measure_matmul_flops
from nanoforge.errors import UserError
from nanoforge.run_dir import RunRecord
from nanoforge.training import budget, evaluation
from nanoforge.training.budget import Budget, Pilot, Plan, Shape, Speed, StepTime, Text
from nanoforge.training.signals import Signals
from nanoforge.training.train_step import TrainStep
from train_args import BUDGETS, TrainArgs

PILOT_LAYERS = 2
FIRST_STEP_TOKENS = (2048, 256)
LAST_PILOT_SHARE = 0.045  # of the budget
MIN_PILOT_TOKENS = 2e4  # with fewer it says nothing of the text
MIN_PILOT_STEPS = 75  # with fewer it is worse than the law says
MIN_PILOT_CONTEXT, MIN_PILOT_ROWS = 64, 4  # the smallest steps of the runs from which the law is
PILOT_RATIO, MIN_PILOT_RATIO = 8, 3  # of their tokens: nearer ones do not tell the text's scale
MAX_PILOT_TOKENS = 4e6  # more say nothing new
MIN_PILOT_EVAL_TOKENS = 32768
PILOT_EVAL_SHARE = 1 / 8  # of the last pilot's tokens, for the evaluation of each
SPEED_SHARE = 0.003  # of the budget, for each size whose speed is measured
MAX_SPEED_SECONDS = 3.0
WARM_UP_STEPS = 2
LEAST_SHARE = 0.1  # of a time budget, for which a run is planned, however long measuring took
MEASURING_SHARE = 0.08  # of a time budget: after it no other size is measured, and no pilots are begun
N_SIZES = 2  # whose speed is measured, besides the pilot's


class Decision(NamedTuple):
    """What a budget chose."""

    args: TrainArgs
    record: dict[str, Any]  # of it, for train_config.json
    notes: list[str]  # why, in sentences


def agreed_seconds(seconds: float, ranks: distributed.Ranks) -> float:
    """Seconds on which all ranks agree: the most that one of them has counted, to the microsecond."""
    return ranks.all_reduce_max(round(seconds * 1e6)) / 1e6


def wait_for_device(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------------
# a trial


class Trial:
    """A model of some size that trains for a few steps, on all ranks together."""

    def __init__(self, args: TrainArgs, ranks: distributed.Ranks, record: RunRecord | None = None) -> None:
        """record: of the run that is resumed."""
        parts = builders.build_run(args, record=record, ranks=ranks, log=lambda text: None)
        args, model = parts.args, parts.model
        self.args, self.ranks, self.data = args, ranks, parts.data
        self.raw_model, self.dtype_reason = model, parts.dtype_reason
        self.model = model if distributed.is_sharded(model) else distributed.wrap_ddp(model, ranks)
        self.state = builders.build_state(args, model, ranks)
        self.read(distributed.rank_slice(args.global_batch_size, args.batch_size, ranks, group_size=args.group_size))

    def read(self, rows: distributed.RankSlice) -> None:
        """Read these rows of each step, from the first one on."""
        self.steps = self.data.source.stream(0, rows, self.ranks.device, hashed=False)

    def train(self, steps: range) -> float:
        """The seconds that these steps take, the slowest rank's: a collective."""
        wait_for_device(self.ranks.device)
        start = time.perf_counter()
        self.run(steps)
        return agreed_seconds(time.perf_counter() - start, self.ranks)

    def run(self, steps: range) -> None:
        """Make these steps, and wait for the device."""
        lr_scale = builders.lr_scale(self.args)
        train_step = TrainStep(self.model, self.data.objective, self.state, self.args.grad_clip)
        self.model.train()
        for step in steps:
            self.state.optimizer.set_lr_scale(lr_scale(step))
            self.state.optimizer.set_step(step)
            train_step(self.data.objective.prepare(self.raw_model, next(self.steps).batches), with_metrics=False)
        wait_for_device(self.ranks.device)

    def val_loss(self) -> float:
        """The validation loss on eval_iters batches."""
        datasets = {"train": [], "val": self.data.eval_datasets["val"]}
        results = evaluation.evaluate(self.model, datasets, self.ranks, Signals())
        assert results is not None, "no signal is handled here"
        return results["val"][0].metrics["loss"]

    def close(self) -> None:
        """End the thread that reads batches."""
        self.steps.close()


# ---------------------------------------------------------------------------------------------------------------------
# what trials measure


class Bench:
    """Trials for one budget, and what they have measured so far."""

    def __init__(self, args: TrainArgs, ranks: distributed.Ranks) -> None:
        self.args, self.ranks = args, ranks
        self.began = time.perf_counter()
        self.text = read_text(args)
        fixed = [name for name in (*budget.CHOSEN, "n_kv_head") if name not in args.budget_chooses]
        self.fixed = {name: getattr(args, name) for name in fixed if name != "n_kv_head" or args.n_kv_head}
        self.pilot_fixed = {name: value for name, value in self.fixed.items() if name not in budget.SIZE_AND_BATCH}
        self.pilot_context = budget.nearest(budget.contexts(self.text, {}), MIN_PILOT_CONTEXT)
        self.step_times: list[StepTime] = []
        self.measured: set[Shape] = set()
        self.peak_flops = 0.0  # of this rank's device

    @property
    def seconds(self) -> float:
        """Since the first trial began."""
        return agreed_seconds(time.perf_counter() - self.began, self.ranks)

    @property
    def is_out_of_time(self) -> bool:
        """Whether measuring has taken its share of a time budget."""
        limit = MEASURING_SHARE * self.args.time_budget
        return self.seconds > limit > 0

    @property
    def speed(self) -> Speed:
        """What the step times so far say."""
        return Speed.fit(self.step_times, self.peak_flops * self.ranks.world_size)

    def plan(self, shape: Shape, amount: Budget) -> Plan | None:
        """The run of this size that spends so much."""
        speed = self.speed if amount.seconds else None
        return budget.plan_run(shape, amount, speed, self.text, self.fixed, self.ranks.world_size)

    def plan_pilots(self, shape: Shape, amount: Budget) -> list[Plan]:
        """A short run of this size and one of many more tokens. None where budget or text are too small for both."""
        last = self.plan_pilot(shape, amount.part(LAST_PILOT_SHARE))
        if last is not None and last.tokens > MAX_PILOT_TOKENS:
            last = self.plan_pilot(shape, Budget(tokens=MAX_PILOT_TOKENS))
        if last is None:
            return []
        first_tokens = max(MIN_PILOT_TOKENS, last.tokens / PILOT_RATIO)
        first = self.plan_pilot(shape, Budget(tokens=first_tokens))
        if first is None or last.tokens < MIN_PILOT_RATIO * first.tokens or last.loss >= first.loss:
            return []
        return [first, last]

    def plan_pilot(self, shape: Shape, amount: Budget) -> Plan | None:
        """A run of this size that spends so much, as those from which the law is: a whole schedule of small steps. Its
        context is that of the rule, but none below the least."""
        plan = self.plan_schedule(shape, amount, self.pilot_context)
        if plan is None:
            return None
        context = budget.nearest(budget.contexts(self.text, {}), budget.block_tokens(plan.tokens))
        return self.plan_schedule(shape, amount, context) if context > self.pilot_context else plan

    def plan_schedule(self, shape: Shape, amount: Budget, context: int) -> Plan | None:
        """The best pilot of this size and context that spends so much."""
        speed = self.speed if amount.seconds else None
        most_rows = max(MIN_PILOT_ROWS, budget.MAX_STEP_TOKENS // context)
        plans = [
            budget.spend(shape, amount, speed, self.text, block_size=context, rows=rows)
            for rows in budget.batches({}, self.ranks.world_size, most_rows)
            if rows >= MIN_PILOT_ROWS
        ]
        return budget.best_batch([plan for plan in plans if plan is not None and plan.steps >= MIN_PILOT_STEPS])

    def plan_step(self, shape: Shape, step_tokens: int) -> Plan:
        """A step of about so many tokens."""
        context = self.pilot_context
        rows = budget.nearest(budget.batches({}, self.ranks.world_size, step_tokens), step_tokens / context)
        step = Budget(tokens=rows * context)
        return require_plan(budget.spend(shape, step, None, self.text, block_size=context, rows=rows), self.args)

    def measure_peak(self) -> None:
        """Measure matrix products, the slowest rank's."""
        dtype, _ = builders.agree_on_dtype(self.args.dtype, self.ranks)
        flops = measure_matmul_flops(self.ranks.device, dtype)
        self.peak_flops = 1e12 / max(1, self.ranks.all_reduce_max(round(1e12 / flops * 1e6))) * 1e6

    @contextlib.contextmanager
    def trial(self, plan: Plan, fixed: Mapping[str, Any], eval_tokens: int = 1) -> Iterator[Trial]:
        """A trial of a plan. It ends before the next one begins: their weights need not be in memory together."""
        values = budget.derive_args(plan, self.text, fixed)
        values |= {"eval_iters": -(-eval_tokens // (plan.rows * plan.block_size))}
        trial = Trial(dataclasses.replace(self.args, **values), self.ranks)
        try:
            yield trial
        finally:
            trial.close()

    def measure_step(self, plan: Plan, fixed: Mapping[str, Any]) -> None:
        """Measure the time of a step: for a moment, after two steps that warm up. fixed: arguments that stay."""
        limit = min(SPEED_SHARE * self.args.time_budget, MAX_SPEED_SECONDS)
        with self.trial(plan, fixed) as trial:
            trial.train(range(WARM_UP_STEPS))
            step, n_steps, seconds = WARM_UP_STEPS, 1, 0.0
            while seconds < limit:
                n_timed = n_steps
                seconds = trial.train(range(step, step + n_steps))
                step += n_steps
                n_steps *= 2
        self.note_step_time(plan, seconds / n_timed)

    def note_step_time(self, plan: Plan, seconds: float) -> None:
        """Take up the time of a step of a plan."""
        self.measured.add(plan.shape)
        self.step_times.append(
            StepTime(plan.shape.step_work(plan.rows, plan.block_size, self.text.vocab_size), seconds)
        )

    def train_pilot(self, plan: Plan, eval_tokens: int) -> Pilot:
        """Train a whole small run, with its schedule: what it reaches, and what the law predicts of it."""
        with self.trial(plan, self.pilot_fixed, eval_tokens) as trial:
            warm_up = min(WARM_UP_STEPS, plan.steps - 1)
            trial.train(range(warm_up))
            seconds = trial.train(range(warm_up, plan.steps))
            val_loss = trial.val_loss()
        self.note_step_time(plan, seconds / (plan.steps - warm_up))
        return Pilot(plan.tokens, plan.step_tokens, plan.loss, val_loss)


def read_text(args: TrainArgs) -> Text:
    """The counts of the run's one dataset. Raises UserError."""
    (folder,) = args.folders.values()
    meta = read_meta(folder)
    train, val = (sum(read_shard(path, meta).tokens for path in shard_paths(folder, split)) for split in SPLITS)
    return Text(train, val, args.vocab_size or meta.vocab_size)


# ---------------------------------------------------------------------------------------------------------------------
# the choice


def decide(args: TrainArgs, ranks: distributed.Ranks) -> Decision:
    """What --time_budget, --flops_budget or --token_budget chooses: a collective. Raises UserError."""
    bench = Bench(args, ranks)
    amount = args.budget
    assert amount is not None

    # 1. The first speeds, of a small model: steps of two sizes tell what starting operations takes.
    small = min(budget.ladder(bench.text, bench.pilot_fixed), key=lambda shape: abs(shape.n_layer - PILOT_LAYERS))
    if amount.seconds:
        bench.measure_peak()
        for first in dict.fromkeys(bench.plan_step(small, step_tokens) for step_tokens in FIRST_STEP_TOKENS):
            bench.measure_step(first, bench.pilot_fixed)

    # 2. The speed of the sizes that look best.
    for _ in range(N_SIZES if amount.seconds else 0):
        best = choose(bench, amount)
        if best.shape in bench.measured or bench.is_out_of_time:
            break
        bench.measure_step(best, bench.fixed)

    # 3. The pilots: small runs say how hard the text is, and how much more tokens help.
    plans = [] if bench.is_out_of_time else bench.plan_pilots(small, amount)
    eval_tokens = max(MIN_PILOT_EVAL_TOKENS, round(PILOT_EVAL_SHARE * plans[-1].tokens)) if plans else 0
    pilots = [bench.train_pilot(plan, min(eval_tokens, bench.text.val_tokens)) for plan in plans]

    # 4. The choice.
    return describe_decision(bench, choose(bench, amount), pilots)


def choose(bench: Bench, amount: Budget) -> Plan:
    """The best plan by what is known so far. Raises UserError when the budget is too small for one step."""
    if amount.seconds:
        amount = Budget(seconds=max(LEAST_SHARE * amount.seconds, amount.seconds - bench.seconds))
    plans = [bench.plan(shape, amount) for shape in budget.ladder(bench.text, bench.fixed)]
    possible = [plan for plan in plans if plan is not None]
    return require_plan(budget.best_plan(possible, amount, bench.text) if possible else None, bench.args)


def require_plan(plan: Plan | None, args: TrainArgs) -> Plan:
    """Raises UserError where there is no plan."""
    if plan is None:
        flag = next(f"--{name}" for name in BUDGETS if getattr(args, name))
        raise UserError(f"{flag}: too small for one step; raise it")
    return plan


def planned_seconds(bench: Bench, plan: Plan) -> float:
    """The seconds after which the run's schedule ends: those of the budget, if the plan spends them all."""
    if plan.spends_all:
        return bench.args.time_budget
    return min(bench.args.time_budget, bench.seconds + plan.steps * plan.step_seconds / (1 - budget.EVAL_SHARE))


def describe_decision(bench: Bench, plan: Plan, pilots: list[Pilot]) -> Decision:
    """The decision, for the run and for its record."""
    values = budget.derive_args(plan, bench.text, bench.fixed)
    calibration = budget.calibrate(*pilots) if pilots else None
    speed = bench.speed if bench.args.time_budget else None
    seconds = bench.seconds
    record = {
        "chosen": values,
        "text": dataclasses.asdict(bench.text),
        "step_times": [{**step.work._asdict(), "seconds": step.seconds} for step in bench.step_times],
        "speed": dataclasses.asdict(speed) if speed else {},
        "pilots": [pilot._asdict() for pilot in pilots],
        "law_loss": plan.loss,
        "predicted_val_loss": calibration.loss(plan.loss) if calibration else None,
        "step_seconds": plan.step_seconds,
        "seconds": planned_seconds(bench, plan),
        "measuring_seconds": seconds,
    }
    notes = budget.explain(plan, bench.text, speed, calibration, seconds)
    return Decision(dataclasses.replace(bench.args, **values), record, notes)
