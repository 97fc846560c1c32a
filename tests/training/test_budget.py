"""--time_budget and its relatives: the choice, the pace that ends in time, and whole runs."""

import dataclasses
import importlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import TEXT, RunFiles, read_run, write_char_dataset
from hypothesis import given
from hypothesis import strategies as st

import pilot
import train
import train_args
from benchmarks import budget_law
from nanoforge.distributed import Ranks
from nanoforge.training import budget
from nanoforge.training.budget import Budget, Pilot, Plan, Shape, Speed, StepTime, Text, Work
from nanoforge.training.pace import Pace, TimedPace

BOOK = Text(tokens=1_000_000, val_tokens=100_000, vocab_size=65)
LIBRARY = Text(tokens=10**12, val_tokens=10**8, vocab_size=50257)
LAPTOP = Speed(layer_seconds=1e-3, number_seconds=2e-11, flop_seconds=1 / 100e9)


def best(amount: Budget, text: Text = BOOK, speed: Speed = LAPTOP, **fixed) -> Plan:
    plans = [budget.plan_run(shape, amount, speed, text, fixed) for shape in budget.ladder(text, fixed)]
    return budget.best_plan([plan for plan in plans if plan], amount, text)


# ---------------------------------------------------------------------------------------------------------------------
# the law


@given(tokens=st.floats(1e3, 1e12), unique=st.floats(1e3, 1e12))
def test_a_repeated_text_is_worth_less_than_a_fresh_one_and_never_more_than_the_limit(tokens: float, unique: float):
    worth = budget.LAW.worth(tokens, unique)
    assert worth <= tokens * (1 + 1e-9) and worth <= unique * (1 + budget.LAW.epochs_worth) * (1 + 1e-9)
    if tokens <= unique:
        assert worth == tokens
    elif tokens < 1.5 * unique:  # the first repetitions are worth nearly what fresh tokens are
        assert worth > 0.95 * tokens


@given(tokens=st.floats(1e5, 1e11))
def test_the_optimal_size_is_where_compute_is_best_spent(tokens: float):
    """At equal compute, N x D, a size on either side predicts a higher loss."""
    weights = budget.LAW.optimal_weights(tokens, 1e15)

    def loss(factor: float) -> float:
        return budget.LAW.loss(weights * factor, tokens / factor, 1e15)

    assert loss(1) <= min(loss(0.8), loss(1.25))


def test_the_law_is_that_of_the_measured_runs():
    """Of ten texts; other constants are not much nearer to them."""
    runs = budget_law.read_runs()
    errors, scales = budget_law.fit_texts(budget.LAW, runs)
    assert len(runs) > 100 and len(scales) == 10
    assert budget_law.root_mean_square(errors) < 0.015 and abs(errors).max() < 0.06
    fitted, _ = budget_law.fit_texts(budget_law.fit_law(runs), runs)
    assert budget_law.root_mean_square(errors) < 1.15 * budget_law.root_mean_square(fitted)


# ---------------------------------------------------------------------------------------------------------------------
# the speed


def test_the_speed_is_found_in_step_times_that_follow_from_it():
    speed = Speed(layer_seconds=2e-3, number_seconds=5e-11, flop_seconds=1e-11)
    works = [Work(3, 1e6, 1e9), Work(3, 2e7, 9e9), Work(5, 1e7, 2e10), Work(9, 3e8, 1e12)]
    step_times = [StepTime(work, speed.step_seconds(work)) for work in works]
    found = Speed.fit(step_times, peak_flops=2e11)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(speed), rel=0.01)


def test_one_step_time_alone_leaves_the_assumed_speed_of_products():
    work = Work(3, 1e7, 1e9)
    found = Speed.fit([StepTime(work, 0.1)], peak_flops=1e11)
    assert found.step_seconds(work) == pytest.approx(0.1, rel=1e-3)
    assert found.flop_seconds == pytest.approx(2e-11, rel=0.05)


def test_flops_are_those_of_the_model():
    from model import GPT, GPTConfig

    shape = Shape(3, 96, 3)
    config = GPTConfig(vocab_sizes=(65,), n_layer=3, n_head=3, n_embd=96, block_size=64, position="rope")
    model = GPT(dataclasses.replace(config, tie_weights=False, norm="rmsnorm_nogain"))
    assert shape.token_flops(64, 65) == model.flops_per_token()


# ---------------------------------------------------------------------------------------------------------------------
# the choice


@pytest.mark.parametrize("text", [BOOK, LIBRARY])
def test_more_time_buys_no_smaller_model(text: Text):
    plans = [best(Budget(seconds=10 * 2**i), text) for i in range(0, 12, 3)]
    weights = [plan.shape.weights for plan in plans]
    assert weights == sorted(weights) and weights[0] < weights[-1]
    losses = [plan.loss for plan in plans]
    assert losses == sorted(losses, reverse=True)


def test_the_budget_is_spent_and_no_more():
    for amount in (Budget(seconds=300), Budget(flops=1e14), Budget(tokens=5e6)):
        plan = best(amount)
        seconds = plan.steps * plan.step_seconds / (1 - budget.EVAL_SHARE)
        flops = plan.tokens * plan.shape.token_flops(plan.block_size, BOOK.vocab_size)
        spent, limit = {
            "seconds": (seconds, amount.seconds),
            "flops": (flops, amount.flops),
            "tokens": (plan.tokens, amount.tokens),
        }[next(name for name, value in dataclasses.asdict(amount).items() if value)]
        assert 0.95 * limit < spent <= limit


def test_tokens_get_the_size_that_they_suit():
    plan = best(Budget(tokens=1e9), LIBRARY)
    ideal = budget.LAW.optimal_weights(1e9, LIBRARY.tokens)
    others = [shape.weights for shape in budget.ladder(LIBRARY, {})]
    assert abs(math.log(plan.shape.weights / ideal)) == min(abs(math.log(other / ideal)) for other in others)


def test_the_batch_is_the_best_and_the_context_follows_the_rule():
    slow_start = dataclasses.replace(LAPTOP, layer_seconds=0.03)
    plan = best(Budget(seconds=600), LIBRARY, slow_start)
    assert math.log2(plan.block_size / budget.block_tokens(plan.tokens)) == pytest.approx(0, abs=0.75)
    for factor in (0.5, 2):
        rows = {"batch_size": int(plan.rows * factor), "gradient_accumulation_steps": 1, "block_size": plan.block_size}
        other = budget.plan_run(plan.shape, Budget(seconds=600), slow_start, LIBRARY, rows)
        assert other is not None and other.loss >= plan.loss


def test_a_machine_that_starts_operations_slowly_takes_larger_steps():
    slow_start = dataclasses.replace(LAPTOP, layer_seconds=0.1)
    fixed = {"n_layer": 4}
    assert best(Budget(seconds=600), LIBRARY, slow_start, **fixed).step_tokens > (
        best(Budget(seconds=600), LIBRARY, **fixed).step_tokens
    )


def test_pilots_calibrate_the_law_to_a_text():
    text = budget.Calibration(offset=0.9, scale=0.7)
    first, last = (Pilot(tokens, 256, law, text.loss(law)) for tokens, law in ((20_000, 2.4), (100_000, 2.0)))
    assert budget.calibrate(first, last) == pytest.approx(text)
    noise = budget.calibrate(first._replace(val_loss=9.0), last)
    assert noise.scale == budget.MOST_SCALE * last.val_loss and noise.loss(2.0) == pytest.approx(text.loss(2.0))


def test_a_tiny_text_gets_dropout_early_stopping_and_a_shorter_run():
    tiny = Text(tokens=20_000, val_tokens=2_000, vocab_size=65)
    plan, large = best(Budget(seconds=600), tiny), best(Budget(seconds=600), LIBRARY)
    values, large_values = (budget.derive_args(p, t, {}) for p, t in ((plan, tiny), (large, LIBRARY)))
    assert values["dropout"] > 0 == large_values["dropout"]
    assert values["early_stop_patience"] > 0 == large_values["early_stop_patience"]
    assert plan.epochs <= budget.MAX_EPOCHS * 1.01 and not plan.spends_all and large.spends_all
    assert plan.shape.weights <= large.shape.weights


def test_what_is_fixed_is_kept_and_left_out_of_the_choice():
    fixed = {"n_layer": 3, "n_embd": 160, "batch_size": 12, "block_size": 48, "dropout": 0.3, "learning_rate": 0.5}
    plan = best(Budget(seconds=60), **fixed)
    assert (plan.shape.n_layer, plan.shape.n_embd, plan.rows, plan.block_size) == (3, 160, 12, 48)
    values = budget.derive_args(plan, BOOK, fixed)
    assert not values.keys() & fixed.keys() and values.keys() | fixed.keys() == set(budget.CHOSEN)
    assert 160 % values["n_head"] == 0


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_a_step(ranks: int):
    plan = budget.plan_run(Shape(2, 64, 2), Budget(seconds=60), LAPTOP, BOOK, {}, ranks)
    assert plan is not None and plan.rows % ranks == 0


def test_a_budget_too_small_for_a_step_has_no_plan():
    assert budget.plan_run(Shape(2, 64, 2), Budget(seconds=1e-4), LAPTOP, BOOK, {"batch_size": 64}) is None


# ---------------------------------------------------------------------------------------------------------------------
# the pace


class Machine:
    """A machine with a clock of its own: seconds a step takes, by the time."""

    def __init__(self, step_seconds: Callable[[float], float], eval_seconds: float = 0.0) -> None:
        self.step_seconds, self.eval_seconds = step_seconds, eval_seconds
        self.seconds = 0.0

    def clock(self) -> float:
        return self.seconds

    def run(self, pace: Pace, *, stop_at: int = -1, start: int = 0) -> Iterator[tuple[int, float]]:
        """(step, position) of every step, as the loop makes them; stopped after the evaluation of a step."""
        step, evaluated_at = start, start if start else -1
        while True:
            pace.plan(step, self.clock)
            if evaluated_at < step and (step >= pace.end or step % 100 == 0):
                with pace.pausing(self.clock):
                    self.seconds += self.eval_seconds
                evaluated_at = step
            if step in (pace.end, stop_at):
                return
            yield step, pace.position(step)
            self.seconds += self.step_seconds(self.seconds)
            step += 1


def timed_pace(state: dict | None = None) -> TimedPace:
    return TimedPace(1000, 60.0, step_seconds=0.06, eval_interval=100, state=state or {})


MACHINES = {
    "as measured": lambda seconds: 0.06,
    "three times as slow in the middle": lambda seconds: 0.18 if 25 < seconds < 40 else 0.06,
    "three times as slow from the middle": lambda seconds: 0.18 if seconds > 30 else 0.06,
    "ten times as slow": lambda seconds: 0.6,
    "ten times as fast": lambda seconds: 0.006,
    "compiles at first": lambda seconds: 15.0 if seconds < 1 else 0.03,
}


@pytest.mark.parametrize("eval_seconds", [0.0, 0.5])
@pytest.mark.parametrize("machine", MACHINES)
def test_the_schedule_ends_when_the_time_ends(machine: str, eval_seconds: float):
    pace, clock = timed_pace(), Machine(MACHINES[machine], eval_seconds)
    positions = [position for _, position in clock.run(pace)]
    assert clock.seconds == pytest.approx(60, rel=0.05)
    assert positions == sorted(positions) and positions[-1] > 0.9 * pace.length
    assert pace.position(pace.end) == pace.length
    assert len(pace.knots) < 150


@pytest.mark.parametrize("machine", list(MACHINES)[:3])
def test_the_position_goes_with_the_time(machine: str):
    """It lags behind by what a knot comes too late to know of a slower machine."""
    pace, clock = timed_pace(), Machine(MACHINES[machine], 0.2)
    for _, position in clock.run(pace):
        assert position / pace.length == pytest.approx(clock.seconds / 60, abs=0.06)


@pytest.mark.parametrize("stop_at", [100, 400])
def test_a_resumed_run_has_the_pace_of_one_that_never_stopped(stop_at: int):
    machine = Machine(MACHINES["three times as slow in the middle"], 0.5)
    whole = timed_pace()
    expected = list(machine.run(whole))

    machine = Machine(MACHINES["three times as slow in the middle"], 0.5)
    first = timed_pace()
    steps = list(machine.run(first, stop_at=stop_at))
    state = json.loads(json.dumps(first.state(machine.seconds)))
    resumed = timed_pace(state)
    steps += machine.run(resumed, start=stop_at)
    assert steps == expected and resumed.knots == whole.knots


def test_a_checkpoint_within_an_evaluation_counts_its_pause():
    clock = iter((10.0, 14.0)).__next__
    pace = timed_pace()
    with pace.pausing(clock):
        assert pace.state(13.0) == {"knots": [], "paused": 3.0, "longest_pause": 3.0}
    assert pace.state(15.0)["paused"] == 4.0


def test_without_a_time_budget_the_position_is_the_step():
    pace = Pace(70)
    assert [pace.position(step) for step in (0, 7, 70)] == [0, 7, 70] and pace.end == 70 and pace.state(1.0) == {}


# ---------------------------------------------------------------------------------------------------------------------
# whole runs


def train_budget(folder: Path, *flags: str) -> RunFiles:
    fixed = ("--device=cpu", "--dtype=float32", f"--data_dir={folder}", "--dataset=text", f"--out_dir={folder / 'run'}")
    return read_run(folder / "run", train.main(train_args.parse([*fixed, *flags])))


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFiles, float]:
    """A run with a time budget, and the seconds that the whole of it took: those of this process, so that other
    processes make no difference."""
    folder = tmp_path_factory.mktemp("timed")
    write_char_dataset(folder / "text", TEXT * 100)
    flags = ("--time_budget=1.5s", "--dropout=0.125", "--eval_interval=10", "--eval_iters=1", "--block_size=16")
    flags += ("--early_stop_patience=0",)  # a fast machine would overfit before the time ends
    importlib.import_module("torch._dynamo")  # which is before the clock of the run as well
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(time, "perf_counter", time.process_time)
        start = time.perf_counter()
        return train_budget(folder, *flags), time.perf_counter() - start


@pytest.mark.slow
def test_a_time_budget_chooses_a_size_and_ends_in_time(timed: tuple[RunFiles, float]):
    done, seconds = timed
    assert done.progress is not None and done.config is not None and done.last is not None
    assert 1.4 < seconds < 2.5  # with what precedes and follows the clock of the run
    decision, knots = done.config["_budget"], done.progress.pace["knots"]
    assert {**done.config, **decision["chosen"]} == done.config
    assert "dropout" not in decision["chosen"] and done.config["dropout"] == 0.125
    assert done.config["budget_chooses"] == [] and len(decision["step_times"]) >= 1
    assert knots[-1][1] == done.progress.step and len(done.evals) >= 2
    assert done.train[-1]["lr"] < 0.3 * max(line["lr"] for line in done.train)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_choice_and_its_end(timed: tuple[RunFiles, float], monkeypatch: pytest.MonkeyPatch):
    """It measures nothing; it ends where it ended, after the time that was left."""
    done, _ = timed
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    assert done.config is not None
    flags = ["--init_from=resume", f"--out_dir={done.out_dir}", f"--checkpoint={done.steps[-2]}", "--overwrite"]
    again = read_run(done.out_dir, train.main(train_args.parse(flags)))
    assert again.config is not None and again.last is not None and done.progress is not None
    assert again.config["_budget"] == done.config["_budget"]
    assert again.last.progress["seconds"] == pytest.approx(1.5, abs=0.3)
    kept = [knot for knot in done.progress.pace["knots"] if knot[0] <= done.steps[-2]]
    assert again.last.progress["pace"]["knots"][: len(kept)] == kept


@pytest.mark.slow
def test_the_record_of_a_run_is_a_config_that_measures_nothing(timed: tuple[RunFiles, float]):
    done, _ = timed
    args = train_args.parse([str(done.out_dir / "train_config.json"), f"--out_dir={done.out_dir}_2"])
    assert args.budget_chooses == () and args.time_budget == 1.5
    assert done.config is not None and args.max_iters == done.config["max_iters"]


def test_a_budget_of_tokens_predicts_a_loss_by_its_pilots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pilot, "MIN_PILOT_TOKENS", 100)
    monkeypatch.setattr(pilot, "MIN_PILOT_STEPS", 1)
    monkeypatch.setattr(pilot, "MIN_PILOT_EVAL_TOKENS", 256)
    write_char_dataset(tmp_path / "text", TEXT * 100)
    flags = ["--n_layer=1", "--n_embd=16", "--block_size=16", "--batch_size=8", "--eval_iters=1"]
    done = train_budget(tmp_path, "--token_budget=60k", *flags)
    assert done.config is not None and done.last is not None
    decision = done.config["_budget"]
    assert len(decision["pilots"]) == 2 and decision["predicted_val_loss"] > 0 and decision["speed"] == {}


@pytest.mark.parametrize("amount", [{"tokens": 110_000}, {"flops": 1e11}, {"seconds": 4.0}])
def test_a_pilot_is_a_small_run_whatever_is_fixed(tmp_path: Path, amount: dict[str, float]):
    """With a schedule of many small steps, as the runs from which the law is; what else is fixed stays."""
    write_char_dataset(tmp_path / "text", TEXT * 1000)
    fixed = ["--n_layer=6", "--n_head=6", "--n_embd=384", "--batch_size=64", "--block_size=16", "--dropout=0.1"]
    args = train_args.parse(["--time_budget=60", f"--data_dir={tmp_path}", "--dataset=text", *fixed])
    bench = pilot.Bench(args, Ranks(0, 1, torch.device("cpu")))
    bench.peak_flops = 50e9
    plan = bench.plan_pilot(Shape(2, 64, 2), Budget(**amount))
    assert plan is not None and plan.steps >= pilot.MIN_PILOT_STEPS
    assert plan.block_size == 64 and plan.rows >= 4
    assert bench.pilot_fixed == {"dropout": 0.1}
    assert bench.plan_pilot(Shape(2, 64, 2), Budget(tokens=256 * (pilot.MIN_PILOT_STEPS - 1))) is None


@pytest.mark.parametrize(
    ("amount", "n_pilots"),
    [
        ({"tokens": 1_250_000}, 0),  # the last one would have less than three times the tokens of the shortest
        ({"tokens": 1_400_000}, 2),
        ({"tokens": 1e9}, 2),
        ({"seconds": 3.0}, 0),
        ({"seconds": 60.0}, 2),
    ],
)
def test_pilots_are_far_apart_or_there_are_none(tmp_path: Path, amount: dict[str, float], n_pilots: int):
    write_char_dataset(tmp_path / "text", TEXT * 1000)
    args = train_args.parse(["--time_budget=60", f"--data_dir={tmp_path}", "--dataset=text"])
    bench = pilot.Bench(args, Ranks(0, 1, torch.device("cpu")))
    bench.peak_flops = 50e9
    plans = bench.plan_pilots(Shape(2, 64, 2), Budget(**amount))
    assert len(plans) == n_pilots
    if plans:
        first, last = plans
        assert pilot.MIN_PILOT_TOKENS * 0.95 < first.tokens <= last.tokens / pilot.MIN_PILOT_RATIO
        assert last.tokens <= pilot.MAX_PILOT_TOKENS and last.loss < first.loss
        assert first.block_size == 64 <= last.block_size


def errors_of(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as end:
        train_args.parse(list(flags))
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--token_budget=1M"], "--token_budget"),
        (["--max_iters=100"], "--max_iters"),
        (["--depth=4"], "--depth"),
        (["--max_seconds=100"], "--max_seconds"),
        (["--objective=sft"], "--objective=lm"),
        (["--optimizer=adamw"], "--learning_rate"),
        (["--eval_only"], "--eval_only"),
        (["--budget_chooses=norm"], "--budget_chooses=norm"),
        (["--init_from=gpt2"], "--init_from=scratch"),
    ],
)
def test_what_a_budget_decides_is_refused_by_name(flags: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    assert named in errors_of(capsys, "--time_budget=10m", *flags)


@pytest.mark.parametrize(
    ("text", "seconds"), [("600", 600), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172800)]
)
def test_times_with_units(text: str, seconds: float):
    assert train_args.parse([f"--time_budget={text}"]).time_budget == seconds


@pytest.mark.parametrize(("text", "tokens"), [("20M", 20_000_000), ("1.5G", 1_500_000_000), ("2e6", 2_000_000)])
def test_counts_with_units(text: str, tokens: int):
    assert train_args.parse([f"--token_budget={text}"]).token_budget == tokens


def test_units_that_are_none(capsys: pytest.CaptureFixture[str]):
    assert "--time_budget=10y" in errors_of(capsys, "--time_budget=10y")
    assert "--batch_size=1M" in errors_of(capsys, "--batch_size=1M")
