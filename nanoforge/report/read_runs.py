"""Run folders, read for a report: arguments, curves, samples and state, whatever state they are in.

Starts and writes nothing.

Runs that are running, empty, resumed, failed or damaged are read as far as they go; `remarks` say what is wrong or
missing. Besides train.py's files this reads those that whoever started a run may leave (run_state.py): log.txt,
exit_status, pruned, locks.
"""

import itertools
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanoforge import run_dir, run_state
from nanoforge.console import plural
from nanoforge.errors import UserError
from nanoforge.run_dir import RunRecord

NOT_LEARNED = (
    "out_dir",
    "overwrite",
    "allow_data_change",
    "wandb_run_name",
    "eval_only",
)  # don't change what is learned
MAXIMUM_KEYS = ("grad_norm", "skipped", "step_ms")  # a point of a thinned curve is their maximum, else the mean
MAX_SAMPLED_STEPS, MAX_SAMPLES, MAX_SAMPLE_CHARS = (
    25,
    8,
    4000,
)  # of a run: evaluations, texts of each, characters of each
LOG_LINES, LOG_LINE_CHARS = 12, 400
STAMPED_FILES = (run_dir.METRICS_FILE, run_dir.RECORD_FILE, run_state.STATUS_FILE, run_state.PRUNED_FILE)

Columns = dict[str, np.ndarray]  # of equal length: step, seconds, tokens, other numeric keys; NaN where a line has none
Sample = dict[str, Any]  # prompt, completion, reward; each may be missing


@dataclass
class LoadedRun:
    """A run's folder, read. Losses are in nats per token."""

    folder: Path
    name: str
    record: RunRecord = field(default_factory=lambda: RunRecord({}))
    state: str = "new"  # of run_state.RunStatus
    reason: str = ""  # of the state
    train: Columns = field(default_factory=dict)
    evals: Columns = field(default_factory=dict)
    n_lines: int = 0  # train and eval lines, before they were thinned out
    samples: list[tuple[int, list[Sample]]] = field(default_factory=list)  # by step
    notes: list[tuple[int, str]] = field(default_factory=list)  # by step
    remarks: list[str] = field(default_factory=list)
    log_tail: list[str] = field(default_factory=list)  # of a run that stopped, failed or diverged
    parameters: int | None = None
    flops_per_token: float | None = None  # in training
    step: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    tokens_per_second: float | None = None  # median
    final_loss: float | None = None  # the last val_loss
    best_loss: float | None = None  # the lowest val_loss
    best_step: int | None = None

    def learned_args(self) -> dict[str, Any]:
        """The arguments that change what is learned."""
        return {name: value for name, value in self.record.args.items() if name not in NOT_LEARNED}

    def ranking_loss(self, by: str) -> float | None:
        """The val_loss that runs are ranked by. by: best or final."""
        return self.best_loss if by == "best" else self.final_loss


# ---------------------------------------------------------------------------------------------------------------------
# finding runs


def find_runs(paths: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The run folders among and below the paths, and the paths without any.

    Raises UserError for a missing path or no run at all.
    """
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}: no such folder{more}")
    folders: dict[Path, Path] = {}  # by their real path: a folder may be given twice
    empty_paths = []
    for path in paths:
        found = list(walk_runs(Path(path)))
        if not found:
            empty_paths.append(path)
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    if not folders:
        files = f"{run_dir.METRICS_FILE} or {run_dir.RECORD_FILE}"
        raise UserError(f"{' '.join(paths)}: no run found (a folder with {files}); pass out_dirs or folders of them")
    return list(folders.values()), empty_paths


def walk_runs(path: Path) -> Iterator[Path]:
    """The run folders at and below a path. A run holds no other run: its checkpoints have a train_config.json too."""
    for folder, subfolders, files in os.walk(path):
        if run_dir.RECORD_FILE in files or run_dir.METRICS_FILE in files:
            yield Path(folder)
            subfolders.clear()
        subfolders.sort()


def names_of(folders: Sequence[Path]) -> list[str]:
    """What tells folders apart: their paths below the folder that all share."""
    resolved = [folder.resolve() for folder in folders]
    if len(resolved) == 1:
        return [resolved[0].name]
    shared = os.path.commonpath([str(folder.parent) for folder in resolved])
    return [str(folder.relative_to(shared)) for folder in resolved]


def file_stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes when the file does; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class RunReader:
    """Reads the runs at and below some paths; a folder is read again only when one of its files has changed."""

    def __init__(self, paths: Sequence[str], max_points: int):
        self.paths, self.max_points = paths, max_points
        self.cache: dict[Path, tuple[list, LoadedRun]] = {}  # folder -> (its stamp, the run)

    def read(self) -> tuple[list[LoadedRun], list[str]]:
        """The runs, and the paths without any. Raises UserError when there is no run at all."""
        folders, empty_paths = find_runs(self.paths)
        runs = []
        for folder, name in zip(folders, names_of(folders), strict=True):
            file_stamps = [file_stamp(folder / file) for file in STAMPED_FILES]
            stamp = [name, run_state.is_running(folder), *file_stamps]
            if folder not in self.cache or self.cache[folder][0] != stamp:
                self.cache[folder] = (stamp, read_run(folder, name, self.max_points))
            runs.append(self.cache[folder][1])
        return runs, empty_paths


# ---------------------------------------------------------------------------------------------------------------------
# reading one


def read_run(folder: Path, name: str, max_points: int) -> LoadedRun:
    """A run's folder, its curves thinned out to max_points.

    Whatever is wrong is in the run's state, reason and remarks.
    """
    run = LoadedRun(folder, name)
    if not (folder / run_dir.RECORD_FILE).exists():
        run.remarks.append(f"no {run_dir.RECORD_FILE}")
    else:
        try:
            run.record = RunRecord.load(folder)
        except UserError as error:
            run.remarks.append(str(error))
        except RecursionError:
            run.remarks.append(f"{run_dir.RECORD_FILE} can't be read (nested too deeply)")
    lines = run_state.read_metrics(folder / run_dir.METRICS_FILE, run.remarks)
    run.state, run.reason = run_state.state_and_reason(folder, lines)
    if run.state in ("failed", "diverged", "stopped"):
        run.log_tail = [line[:LOG_LINE_CHARS] for line in run_state.log_tail(folder, LOG_LINES)]
    train_lines = [line for line in lines if line["event"] == "train"]
    eval_lines = [line for line in lines if line["event"] == "eval"]
    run.n_lines = len(train_lines) + len(eval_lines)
    run.notes = [(line["step"], shorten(line.get("text", ""))) for line in lines if line["event"] == "note"]
    run.samples = read_samples(eval_lines)
    train, evals = to_columns(train_lines), to_columns(eval_lines)
    read_progress(run, lines)
    read_counts(run)
    add_tokens(run, train, evals)
    read_losses(run, evals, run_state.first_compared_step(lines))
    speeds = [speed for speed in train.get("tokens_per_second", ()) if not math.isnan(speed)]
    if speeds:
        run.tokens_per_second = statistics.median(speeds)
    run.remarks += training_remarks(run, train, evals)
    run.train, run.evals = thin_out(train, max_points), thin_out(evals, max_points)
    return run


def read_progress(run: LoadedRun, lines: list[dict]) -> None:
    """The last step and the seconds."""
    run.step = max((line["step"] for line in lines if line["event"] in ("train", "eval", "save")), default=0)
    for line in reversed(lines):
        seconds = to_float(line.get("seconds"))
        if not math.isnan(seconds):
            run.seconds = seconds
            break


def read_counts(run: LoadedRun) -> None:
    """The model's parameters and FLOPs per token, as train.py recorded them. Runs of older versions have none."""
    counts = run.record.counts if isinstance(run.record.counts, dict) else {}
    parameters = to_float(counts.get("parameters"))
    flops = to_float(counts.get("flops_per_token"))
    if parameters > 0 and flops > 0:
        run.parameters, run.flops_per_token = int(parameters), flops
    elif run.record.args:
        run.remarks.append("no parameter and FLOP counts (recorded by a newer train.py)")


def add_tokens(run: LoadedRun, train: Columns, evals: Columns) -> None:
    """The tokens seen at each line: interpolated between lines that have them, after the last one at the mean pace."""
    batch = [run.record.args.get(name) for name in ("batch_size", "gradient_accumulation_steps", "block_size")]
    tokens_per_step = math.prod(to_float(value) for value in batch)
    known_steps = known_tokens = np.zeros(1)
    if "tokens" in train:
        valid = ~np.isnan(train["tokens"])
        known_steps = np.append(0.0, train["step"][valid])
        known_tokens = np.append(0.0, train["tokens"][valid])
        if known_steps[-1] > 0:
            tokens_per_step = known_tokens[-1] / known_steps[-1]
    for columns in (train, evals):
        if "step" not in columns:
            continue
        step = columns["step"]
        interpolated = np.interp(step, known_steps, known_tokens)
        extrapolated = known_tokens[-1] + (step - known_steps[-1]) * tokens_per_step
        columns["tokens"] = np.where(step > known_steps[-1], extrapolated, interpolated)
        if len(step) and not math.isnan(columns["tokens"][-1]):
            run.tokens = max(run.tokens, float(columns["tokens"][-1]))


def read_losses(run: LoadedRun, evals: Columns, first_step: int) -> None:
    """The final and the best val_loss; an evaluation up to first_step is the best only if there is no other."""
    losses = []
    for loss, step in zip(evals.get("val_loss", ()), evals.get("step", ()), strict=True):
        if not math.isnan(loss):
            losses.append((float(loss), int(step)))
    if not losses:
        return
    learned = [(loss, step) for loss, step in losses if step > first_step]
    run.final_loss = losses[-1][0]
    run.best_loss, run.best_step = min(learned or losses[-1:])


def training_remarks(run: LoadedRun, train: Columns, evals: Columns) -> list[str]:
    """What was unusual."""
    remarks = []
    resumed = sum(text.startswith("resuming") for _, text in run.notes)
    if resumed:
        remarks.append("resumed once" if resumed == 1 else f"resumed {resumed} times")
    for key, columns in (("loss", train), ("val_loss", evals)):
        n_missing = int(np.isnan(columns[key]).sum()) if key in columns else 0
        if n_missing:
            remarks.append(f"{key} is not finite in {plural(n_missing, 'line')}")
    n_skipped = np.nanmax(train["skipped"], initial=0) if "skipped" in train else 0
    if n_skipped:
        remarks.append(f"{plural(int(n_skipped), 'step')} skipped")
    return remarks


# ---------------------------------------------------------------------------------------------------------------------
# lines and columns


def to_float(value: Any) -> float:
    """A finite number as a float; anything else as NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.nan


def to_columns(lines: list[dict]) -> Columns:
    """The keys that are numbers in at least one line, as columns; the losses also where all of them are null."""
    columns: Columns = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(lines)):
        values = [line.get(key) for line in lines]
        kinds = set(map(type, values))
        if not kinds & {int, float} and key not in ("loss", "val_loss"):
            continue
        if kinds <= {int, float, type(None)}:  # the fast way, for most columns
            columns[key] = to_finite_array(values)
        else:
            columns[key] = np.array([to_float(value) for value in values])
    return columns


def to_finite_array(values: list) -> np.ndarray:
    """Numbers as an array; NaN for None and for what is not finite."""
    try:
        array = np.array(values, dtype=float)
    except OverflowError:
        return np.array([to_float(value) for value in values])
    return np.where(np.isfinite(array), array, math.nan)


def thin_out(columns: Columns, max_points: int) -> Columns:
    """At most max_points points (one more where the best evaluation has to stay).

    A point of training stands for consecutive lines by their mean, for MAXIMUM_KEYS by their maximum. Evaluations are
    picked.
    """
    n_lines = len(columns.get("step", ()))
    if n_lines <= max_points:
        return columns
    if "val_loss" in columns:
        picked = np.linspace(0, n_lines - 1, max_points).round().astype(int)
        losses = np.where(np.isnan(columns["val_loss"]), np.inf, columns["val_loss"])
        picked = np.unique(np.append(picked, losses.argmin()))
        return {key: column[picked] for key, column in columns.items()}
    starts = np.linspace(0, n_lines, max_points + 1).astype(int)[:-1]  # each point's first line
    thinned = {}
    for key, column in columns.items():
        valid = ~np.isnan(column)
        counts = np.add.reduceat(valid, starts)
        if key in MAXIMUM_KEYS:
            points = np.maximum.reduceat(np.where(valid, column, -np.inf), starts)
        else:
            points = np.add.reduceat(np.where(valid, column, 0.0), starts) / np.maximum(1, counts)
        thinned[key] = np.where(counts > 0, points, math.nan)
    return thinned


def read_samples(eval_lines: list[dict]) -> list[tuple[int, list[Sample]]]:
    """(step, texts) of the evaluations with `samples`; of many, the first, the last and some in between."""
    sampled = [line for line in eval_lines if isinstance(line.get("samples"), list) and line["samples"]]
    if len(sampled) > MAX_SAMPLED_STEPS:
        picked = np.linspace(0, len(sampled) - 1, MAX_SAMPLED_STEPS).round().astype(int)
        sampled = [sampled[i] for i in picked]
    return [(line["step"], [read_sample(sample) for sample in line["samples"][:MAX_SAMPLES]]) for line in sampled]


def read_sample(value: Any) -> Sample:
    """A sample of metrics.jsonl: an object, or the completion alone."""
    fields = value if isinstance(value, dict) else {"completion": value}
    sample: Sample = {}
    for key in ("prompt", "completion"):
        if fields.get(key) is not None:
            sample[key] = shorten(fields[key])
    reward = to_float(fields.get("reward"))
    if not math.isnan(reward):
        sample["reward"] = reward
    return sample


def shorten(value: Any) -> str:
    """A text, or a value's JSON, of at most MAX_SAMPLE_CHARS characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) <= MAX_SAMPLE_CHARS:
        return text
    return f"{text[:MAX_SAMPLE_CHARS]}… and {plural(len(text) - MAX_SAMPLE_CHARS, 'more character')}"


# ---------------------------------------------------------------------------------------------------------------------
# several runs


class Group(NamedTuple):
    """Runs that differ in nothing but their seed."""

    label: str
    members: list[int]  # indices of runs


def format_arg(value: Any) -> str:
    """An argument's value in few characters."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return " ".join(map(format_arg, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value)


def identity(value: Any) -> str:
    """Equal for equal values."""
    return json.dumps(value, sort_keys=True)


def varying_args(runs: Sequence[LoadedRun]) -> list[str]:
    """The arguments in which runs differ, in the table's order. Runs without a record are ignored."""
    args_of_runs = [run.learned_args() for run in runs if run.record.args]
    keys = dict.fromkeys(itertools.chain.from_iterable(args_of_runs))
    varying = []
    for key in keys:
        if len({identity(args.get(key)) for args in args_of_runs}) > 1:
            varying.append(key)
    return varying


def distinguishing_args(runs: Sequence[LoadedRun], keys: Sequence[str]) -> list[str]:
    """As few of the keys as tell apart what all of them do, in their order.

    Keys with the most values are tried first.
    """

    def count_distinct(chosen: list[str]) -> int:
        return len({identity([run.record.args.get(key) for key in chosen]) for run in runs})

    chosen: list[str] = []
    for key in sorted(keys, key=lambda key: -count_distinct([key])):
        if count_distinct([*chosen, key]) > count_distinct(chosen):
            chosen.append(key)
    return [key for key in keys if key in chosen]


def group_runs(runs: Sequence[LoadedRun]) -> list[Group]:
    """The runs by all their arguments except the seed; one without a record is a group of its own."""
    recorded = [run for run in runs if run.record.args]
    keys = distinguishing_args(recorded, [key for key in varying_args(runs) if key != "seed"])
    groups: dict[str, Group] = {}
    for i, run in enumerate(runs):
        args = run.record.args
        label = ", ".join(f"{key}={format_arg(args[key])}" for key in keys if key in args)
        if not label:
            label = run.name if len(runs) == 1 or not args else "same arguments"
        learned_args = {key: value for key, value in run.learned_args().items() if key != "seed"}
        group_key = identity(learned_args) if args else f"no record: {run.name}"
        groups.setdefault(group_key, Group(label, [])).members.append(i)
    return list(groups.values())


def seed_band(runs: Sequence[LoadedRun], key: str, kind: str) -> Columns | None:
    """Mean, lowest and highest of a key's curves, at the steps of the shortest curve. kind: train or evals.

    None for fewer than two.

    Has also the mean tokens and seconds at these steps.
    """
    curves = []
    for run in runs:
        columns = run.evals if kind == "evals" else run.train
        valid = ~np.isnan(columns.get(key, np.zeros(0)))
        if valid.any():
            curves.append(
                {name: columns[name][valid] for name in ("step", "tokens", "seconds", key) if name in columns}
            )
    if len(curves) < 2:
        return None
    shortest = min(curves, key=lambda curve: curve["step"][-1])
    first_step = max(curve["step"][0] for curve in curves)
    steps = shortest["step"][shortest["step"] >= first_step]
    if not len(steps):
        return None
    band = {"step": steps}
    for name in ("tokens", "seconds"):
        if all(name in curve for curve in curves):
            band[name] = interpolate(curves, name, steps).mean(axis=0)
    values = interpolate(curves, key, steps)
    return band | {"mean": values.mean(axis=0), "low": values.min(axis=0), "high": values.max(axis=0)}


def interpolate(curves: list[Columns], name: str, steps: np.ndarray) -> np.ndarray:
    """A column of each curve at some steps: (curves, steps)."""
    return np.array([np.interp(steps, curve["step"], curve[name]) for curve in curves])
