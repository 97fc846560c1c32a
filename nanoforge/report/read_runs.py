"""What the folders of runs tell: their arguments, curves, samples and state, whatever state they are in. Starts and writes nothing.

A folder is read with what is there: runs still going, empty, broken off in a line, resumed or failed are runs too, and `remarks` say so.
Besides train.py's files it looks at those that whoever started the run may leave: log.txt, exit_status, pruned, and the locks.
"""

import itertools
import json
import math
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanoforge import run_dir, run_state
from nanoforge.errors import UserError
from nanoforge.report import scaling

CONFIG, METRICS = run_dir.RECORD_FILE, run_dir.METRICS_FILE
NAMES = (
    "out_dir",
    "overwrite",
    "allow_data_change",
    "wandb_run_name",
    "eval_only",
)  # arguments that don't change what is learned
LARGEST = ("grad_norm", "skipped", "step_ms")  # a drawn point is the largest of its lines, elsewhere their mean
SAMPLED, SAMPLES, LETTERS = 25, 8, 4000  # of a run's sample texts: evaluations, texts of each, letters of each

NONE = type(None)
NUMERIC = {int, float, NONE}
Series = dict[
    str, np.ndarray
]  # columns of equal length: step, seconds, tokens and every numeric key; NaN where a line had none


@dataclass
class Run:
    """A run's folder, read. Losses are in nats a token, `speed` is in tokens a second, `flops` those of a token in training."""

    folder: Path
    name: str
    config: dict[str, Any]
    state: str = "new"  # new, running, done, pruned, stopped, failed
    why: str = ""
    train: Series = field(default_factory=dict)
    evals: Series = field(default_factory=dict)
    lines: int = 0  # train and eval lines before they were thinned out
    samples: list[tuple[int, list[dict]]] = field(default_factory=list)  # (step, [{"prompt", "completion", "reward"}])
    notes: list[tuple[int, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)  # the last lines of what it printed, where it did not end well
    parameters: int | None = None
    flops: float | None = None
    step: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    speed: float | None = None
    final: float | None = None  # the last val_loss
    best: float | None = None  # the lowest one, and its step
    best_step: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Those that change what is learned."""
        return {name: value for name, value in self.config.items() if not name.startswith("_") and name not in NAMES}


# ---------------------------------------------------------------------------------------------------------------------
# finding runs


def find(paths: list[str]) -> tuple[list[Path], list[str]]:
    """The folders of runs among and beneath the paths, and the paths that hold none. Raises UserError for a path that isn't there, or none at all."""
    folders: list[Path] = []
    without: list[str] = []
    if missing := [path for path in paths if not os.path.exists(path)]:
        raise UserError(f"{missing[0]}: no such folder{f', and {len(missing) - 1} more' if missing[1:] else ''}")
    for path in map(Path, paths):
        beneath = []
        for place, inner, files in os.walk(path):
            if CONFIG in files or METRICS in files:
                beneath.append(Path(place))
                inner.clear()  # a run holds no other; its checkpoints have configs too
            inner.sort()
        folders += beneath
        without += [] if beneath else [str(path)]
    if not folders:
        raise UserError(
            f"{' '.join(paths)}: no run there (a folder with {METRICS} or {CONFIG}); give the out_dir of runs, or a folder that holds such"
        )
    return list({folder.resolve(): folder for folder in folders}.values()), without


def names(folders: list[Path]) -> list[str]:
    """What tells the folders apart: their paths below the folder that all share."""
    whole = [folder.resolve() for folder in folders]
    if len(whole) == 1:
        return [whole[0].name]
    shared = os.path.commonpath([str(folder.parent) for folder in whole])
    return [str(folder.relative_to(shared)) for folder in whole]


# ---------------------------------------------------------------------------------------------------------------------
# reading one


def number(value: Any) -> float:
    """A number as a float, anything else, and what is not finite, as NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def read_json(path: Path, remarks: list[str]) -> Any:
    """The content of a JSON file; None, with a remark, where it can't be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        remarks.append(f"{path.name} can't be read ({type(error).__name__})")
        return None


def series(lines: list[dict]) -> Series:
    """Columns of the numeric keys of lines, and of the losses also where all of them are null."""
    told: Series = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(lines)):
        column = [line.get(key) for line in lines]
        kinds = set(map(type, column))
        if kinds <= NUMERIC and kinds != {NONE}:
            try:
                values = np.array(column, dtype=float)  # None as NaN
            except OverflowError:  # an integer of hundreds of digits
                values = np.array([number(value) for value in column])
            told[key] = np.where(np.isfinite(values), values, math.nan)
        elif kinds & {int, float} or key in ("loss", "val_loss"):
            told[key] = np.array([number(value) for value in column])
    return told


def thinned(whole: Series, points: int) -> Series:
    """At most so many points: each stands for lines that follow each other, by their mean, in LARGEST by the largest. A best val_loss keeps its place."""
    count = len(whole.get("step", ()))
    if count <= points:
        return whole
    if "val_loss" in whole:  # evaluations are picked, not averaged
        picked = np.unique(np.linspace(0, count - 1, points).round().astype(int))
        losses = np.where(np.isnan(whole["val_loss"]), np.inf, whole["val_loss"])
        picked = np.unique(np.append(picked, losses.argmin()))
        return {key: column[picked] for key, column in whole.items()}
    first = np.linspace(0, count, points + 1).astype(int)[:-1]  # of each point's lines
    told = {}
    for key, column in whole.items():
        known = ~np.isnan(column)
        counts = np.add.reduceat(known, first)
        means = np.add.reduceat(np.where(known, column, 0.0), first) / np.maximum(1, counts)
        told[key] = np.where(
            counts > 0,
            np.maximum.reduceat(np.where(known, column, -np.inf), first) if key in LARGEST else means,
            math.nan,
        )
    return told


def told_samples(lines: list[dict]) -> list[tuple[int, list[dict]]]:
    """(step, texts) of evaluations that carry `samples`; of many the first, the last and evenly between."""
    sampled = [line for line in lines if isinstance(line.get("samples"), list) and line["samples"]]
    if len(sampled) > SAMPLED:
        sampled = [sampled[round(i * (len(sampled) - 1) / (SAMPLED - 1))] for i in range(SAMPLED)]
    told = []
    for line in sampled:
        texts = []
        for sample in line["samples"][:SAMPLES]:
            sample = sample if isinstance(sample, dict) else {"completion": sample}
            one: dict[str, Any] = {
                key: shortened(sample[key]) for key in ("prompt", "completion") if sample.get(key) is not None
            }
            if not math.isnan(reward := number(sample.get("reward"))):
                one["reward"] = reward
            texts.append(one)
        told.append((line["step"], texts))
    return told


def shortened(text: Any) -> str:
    text = text if isinstance(text, str) else json.dumps(text)
    return text if len(text) <= LETTERS else f"{text[:LETTERS]}… and {len(text) - LETTERS:,} more letters"


def read(folder: Path, name: str, points: int) -> Run:
    """A run's folder; its curves thinned out to `points`. Whatever is wrong with it is told in the run's `state`, `why` and `remarks`."""
    remarks: list[str] = []
    config = read_json(folder / CONFIG, remarks) if (folder / CONFIG).exists() else remarks.append(f"no {CONFIG}")
    run = Run(folder, name, config if isinstance(config, dict) else {}, remarks=remarks)
    lines = run_state.read_metrics(folder / METRICS, remarks)
    run.state, run.why = run_state.state_and_reason(folder, lines)
    run.log = [line[:400] for line in run_state.log_tail(folder, 12)] if run.state in ("failed", "stopped") else []
    train, evals = (series([line for line in lines if line["event"] == event]) for event in ("train", "eval"))
    run.notes = [(line["step"], shortened(line.get("text", ""))) for line in lines if line["event"] == "note"]
    run.samples = told_samples([line for line in lines if line["event"] == "eval"])
    run.lines = sum(line["event"] in ("train", "eval") for line in lines)
    run.step = max((line["step"] for line in lines if line["event"] in ("train", "eval", "save")), default=0)
    run.seconds = next(
        (seconds for line in reversed(lines) if not math.isnan(seconds := number(line.get("seconds")))), 0.0
    )
    if resumed := sum(text.startswith("resuming") for _, text in run.notes):
        remarks.append("resumed once" if resumed == 1 else f"resumed {resumed} times")
    for key, column in (("loss", train.get("loss")), ("val_loss", evals.get("val_loss"))):
        if column is not None and (lost := int(np.isnan(column).sum())):
            remarks.append(f"{key} is not finite in {lost} line{'s' * (lost > 1)}")
    if "skipped" in train and (skipped := np.nanmax(train["skipped"], initial=0)):
        remarks.append(f"{int(skipped):,} steps skipped")
    measure(run, train, evals)
    run.train, run.evals = thinned(train, points), thinned(evals, points)
    return run


def measure(run: Run, train: Series, evals: Series) -> None:
    """Fill in the run's numbers from all of its lines, and the tokens of lines that don't tell them."""
    shape = run.config.get("_model")
    try:
        run.parameters, run.flops = scaling.parameters(shape), scaling.flops_per_token(shape)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        run.remarks += ["its size is not known: no FLOPs"] if run.config else []
    per_step = math.prod(
        number(run.config.get(name)) for name in ("batch_size", "gradient_accumulation_steps", "block_size")
    )
    if "tokens" in train:
        known = ~np.isnan(train["tokens"])
        steps, tokens = (np.append(0.0, train[key][known]) for key in ("step", "tokens"))
        per_step = tokens[-1] / steps[-1] if steps[-1] > 0 else per_step
    else:
        steps = tokens = np.zeros(1)
    for lines in (
        train,
        evals,
    ):  # between lines that tell their tokens straight on, after the last one at the same pace
        if "step" in lines:
            lines["tokens"] = np.where(
                lines["step"] > steps[-1],
                tokens[-1] + (lines["step"] - steps[-1]) * per_step,
                np.interp(lines["step"], steps, tokens),
            )
    run.tokens = float(
        max((lines["tokens"][-1] for lines in (train, evals) if len(lines.get("tokens", ()))), default=0.0)
    )
    run.tokens = 0.0 if math.isnan(run.tokens) else run.tokens
    if len(speeds := [speed for speed in train.get("tokens_per_second", ()) if not math.isnan(speed)]):
        run.speed = statistics.median(speeds)
    losses = [
        (loss, int(step))
        for loss, step in zip(evals.get("val_loss", ()), evals.get("step", ()), strict=True)
        if not math.isnan(loss)
    ]
    if losses:
        run.final = float(losses[-1][0])
        best, run.best_step = min([pair for pair in losses if pair[1] > 0] or losses)  # of what was learned
        run.best = float(best)


# ---------------------------------------------------------------------------------------------------------------------
# several


def brief(value: Any) -> str:
    """A value in few letters."""
    if value is None:
        return "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return (
            " ".join(map(brief, value))
            if isinstance(value, list)
            else value
            if isinstance(value, str)
            else json.dumps(value)
        )
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def varied(runs: list[Run]) -> list[str]:
    """The arguments in which the runs differ, in the table's order; those without a config have no part in it."""
    told = [run.arguments() for run in runs if run.config]
    keys = dict.fromkeys(key for one in told for key in one)
    return [key for key in keys if len({json.dumps(one.get(key), sort_keys=True) for one in told}) > 1]


@dataclass
class Group:
    """Runs that differ in nothing but their seed."""

    label: str
    members: list[int]  # places in the list of runs


def telling(runs: list[Run], keys: list[str]) -> list[str]:
    """As few of the keys as tell apart what all of them do, in their order: those of the most values first."""

    def kinds(chosen: list[str]) -> int:
        return len({json.dumps([run.config.get(key) for key in chosen]) for run in runs})

    chosen: list[str] = []
    for key in sorted(keys, key=lambda key: -kinds([key])):
        if kinds([*chosen, key]) > kinds(chosen):
            chosen.append(key)
    return [key for key in keys if key in chosen]


def groups(runs: list[Run]) -> list[Group]:
    """The runs by all their arguments but the seed; one without a config is a group of its own."""
    keys = telling([run for run in runs if run.config], [key for key in varied(runs) if key != "seed"])
    found: dict[str, Group] = {}
    for i, run in enumerate(runs):
        told = {key: value for key, value in run.arguments().items() if key != "seed"}
        label = ", ".join(f"{key}={brief(run.config[key])}" for key in keys if key in run.config) or (
            run.name if len(runs) == 1 or not run.config else "all alike"
        )
        found.setdefault(
            json.dumps(told, sort_keys=True) if run.config else f"?{run.name}", Group(label, [])
        ).members.append(i)
    return list(found.values())


def band(runs: list[Run], key: str, kind: str) -> dict[str, np.ndarray] | None:
    """Mean, lowest and highest of a key's curves at the steps of the run that got least far, and the mean x there; None for less than two curves."""
    curves = []
    for run in runs:
        lines = run.evals if kind == "eval" else run.train
        if key in lines and (known := ~np.isnan(lines[key])).any():
            curves.append({name: lines[name][known] for name in ("step", "tokens", "seconds", key) if name in lines})
    if len(curves) < 2:
        return None
    shortest = min(curves, key=lambda curve: curve["step"][-1])
    steps = shortest["step"][shortest["step"] >= max(curve["step"][0] for curve in curves)]
    if not len(steps):
        return None
    at = {
        name: np.array([np.interp(steps, curve["step"], curve[name]) for curve in curves])
        for name in ("tokens", "seconds", key)
        if all(name in curve for curve in curves)
    }  # (runs, steps)
    means = {name: values.mean(0) for name, values in at.items() if name != key}
    return {"step": steps, **means, "mean": at[key].mean(0), "low": at[key].min(0), "high": at[key].max(0)}
