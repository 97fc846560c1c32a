"""The report's page: what it shows of the runs as plain values (`payload`), and one HTML file (`render`).

The page is report.html beside this file. Its script draws with plotly.js, which comes with plotly's Python package
and is put into the page: it zooms and answers the pointer, from a file, on a phone, which matplotlib's SVG does not.

Texts of runs are never trusted. Here control characters, bidirectional marks and other invisible characters become
texts like ⟨U+202E⟩, and JSON in the page has no `<`. The script puts texts in as text. A content security policy runs
the page's two scripts alone, by hash.
"""

import base64
import hashlib
import html
import json
import math
import re
import statistics
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanoforge.console import plural
from nanoforge.errors import UserError
from nanoforge.report import read_runs, scaling, stats
from nanoforge.report.read_runs import Group, LoadedRun

PALETTE = (  # one colour a group of runs, on the page and in the figures
    "#4269d0",
    "#e8871e",
    "#3ca951",
    "#e0457b",
    "#17a2b8",
    "#a463f2",
    "#9c6b4e",
    "#d4b106",
    "#6c8ebf",
    "#8a8f98",
)
BAND_KEYS = {"val_loss": "evals", "loss": "train", "train_loss": "evals", "bits_per_byte": "evals"}
DATA_ARGS = ("training_mode", "dataset", "dataset_list", "multicontext_datasets")
# Unicode categories: control, format, unpaired, private and unassigned characters; line and paragraph separators
INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
RUN_FIELDS = (
    "name",
    "state",
    "reason",
    "train",
    "evals",
    "notes",
    "remarks",
    "log_tail",
    "parameters",
    "flops_per_token",
    "step",
    "tokens",
    "seconds",
    "tokens_per_second",
    "final_loss",
    "best_loss",
    "best_step",
)
MAX_EXACT_INT = 1e15
LAW_POINTS = 80  # of a law's curve
MAX_POWER = 300  # of ten, as a float
SAME_SIZE = 1.1  # parameters within this factor are one size

Row = dict[str, Any]  # JSON


# ---------------------------------------------------------------------------------------------------------------------
# plain values


def make_visible(text: str) -> str:
    """Text in which everything can be seen: ⟨U+001B⟩ for what has no glyph or reverses the direction.

    Line ends and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    chars = []
    for char in text:
        invisible = unicodedata.category(char) in INVISIBLE and char not in "\n\t"
        chars.append(f"⟨U+{ord(char):04X}⟩" if invisible else char)
    return "".join(chars)


def to_plain(value: Any) -> Any:
    """A value as JSON for the page: numbers of six digits, None for what is not finite, visible texts."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return to_plain_number(value)
    if isinstance(value, np.ndarray):
        return [to_plain(item) for item in value.tolist()]
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {make_visible(str(key)): to_plain(item) for key, item in value.items()}
    return make_visible(str(value))


def to_plain_number(value: int | float) -> int | float | None:
    number = read_runs.to_float(value)
    if math.isnan(number):
        return None
    if number == int(number) and abs(number) < MAX_EXACT_INT:
        return int(number)
    return float(f"{number:.6g}")


# ---------------------------------------------------------------------------------------------------------------------
# groups of seeds, and whether their differences are real


def finished_losses(runs: Sequence[LoadedRun], members: Sequence[int], by: str) -> dict[int, float]:
    """The ranking losses of the members that are done, by their index."""
    losses = {}
    for i in members:
        loss = runs[i].ranking_loss(by)
        if runs[i].state == "done" and loss is not None:
            losses[i] = loss
    return losses


def describe_groups(runs: Sequence[LoadedRun], groups: Sequence[Group], by: str) -> list[Row]:
    """Each group: its losses, their mean and standard deviation, its bands, and its difference from the best group."""
    rows = []
    for group in groups:
        losses = list(finished_losses(runs, group.members, by).values())
        rows.append(
            {
                "label": group.label,
                "members": group.members,
                "losses": losses,
                "mean": statistics.fmean(losses) if losses else None,
                "deviation": statistics.stdev(losses) if len(losses) > 1 else None,
                "bands": seed_bands([runs[i] for i in group.members]),
            }
        )
    compare_with_best(rows)
    return rows


def seed_bands(members: Sequence[LoadedRun]) -> Row:
    bands = {}
    if len(members) > 1:
        for key, kind in BAND_KEYS.items():
            band = read_runs.seed_band(members, key, kind)
            if band is not None:
                bands[key] = band
    return bands


def compare_with_best(rows: list[Row]) -> None:
    """Test each row of several seeds against the row with the lowest mean; p is corrected for their number."""
    rows_with_seeds = sorted((row for row in rows if len(row["losses"]) > 1), key=lambda row: row["mean"])
    if len(rows_with_seeds) < 2 or not stats.has_scipy():
        return
    best, *others = rows_with_seeds
    best["is_best"] = True
    tests = [stats.welch_t_test(best["losses"], row["losses"]) for row in others]
    corrected = stats.holm_correction([test.p for test in tests])
    for row, test, p in zip(others, tests, corrected, strict=True):
        row |= test._asdict()
        row["corrected_p"] = p
        row["permutation_p"] = stats.permutation_test(best["losses"], row["losses"])
        row["verdict"] = describe_p(p)


def describe_p(p: float) -> str:
    """What a p value means."""
    if p < 0.01:
        verdict = "significant"
    elif p < 0.05:
        verdict = "probably significant"
    else:
        verdict = "not significant"
    return f"{verdict}: seeds alone give such a difference in {format_percent(p)} of experiments"


def format_percent(p: float) -> str:
    if p < 0.001:
        return "less than 0.1 %"
    return f"{100 * p:.1f} %" if p < 0.1 else f"{100 * p:.0f} %"


# ---------------------------------------------------------------------------------------------------------------------
# scaling laws


def describe_scaling(runs: Sequence[LoadedRun], rows: Sequence[Row], by: str) -> Row | None:
    """Power laws of the loss in compute and in parameters, through the best group of each size.

    None for fewer than three sizes. Only runs that are done count; of several datasets, those on the one with the most
    sizes.
    """
    datasets = group_sizes(runs, rows)
    points: list[Row] = []
    n_sizes = 0
    for rows_of_size in max(datasets.values(), key=len, default=[]):
        points_of_size = scaling_points(runs, min(rows_of_size, key=lambda row: row["mean"]), by)
        points += points_of_size
        n_sizes += bool(points_of_size)
    if n_sizes < scaling.MIN_SIZES or not stats.has_scipy():
        return None
    laws = {}
    for key in ("compute", "parameters"):
        law = describe_fit(key, points)
        if law is not None:
            laws[key] = law
    return {
        "points": points,
        "laws": laws,
        "sizes": n_sizes,
        "fitted": describe_points(len(points), n_sizes, by, n_datasets=len(datasets)),
    }


def group_sizes(runs: Sequence[LoadedRun], rows: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """Data -> sizes, ascending -> the rows with runs that are done.

    Models whose parameters differ by less than SAME_SIZE, as those with and without biases, are of one size.
    """
    datasets: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        run = runs[row["members"][0]]
        if row["losses"] and run.parameters and run.flops_per_token:
            data = read_runs.identity([data_args(run), run.record.data])
            datasets.setdefault(data, {}).setdefault(run.parameters, []).append(row)
    return {data: merge_close_sizes(by_parameters) for data, by_parameters in datasets.items()}


def merge_close_sizes(by_parameters: dict[int, list[Row]]) -> list[list[Row]]:
    """The rows of each size, ascending."""
    sizes: list[list[Row]] = []
    smallest = 0  # parameters of the size
    for parameters, rows in sorted(by_parameters.items()):
        if sizes and parameters < SAME_SIZE * smallest:
            sizes[-1] += rows
        else:
            sizes.append(list(rows))
            smallest = parameters
    return sizes


def scaling_points(runs: Sequence[LoadedRun], row: Row, by: str) -> list[Row]:
    """The runs of a row that are done, all at the same step, and so with the same tokens and compute.

    by best: the step at which the mean of their losses is lowest; by final: the last one that all of them have. None
    where they share no evaluation.
    """
    members = list(finished_losses(runs, row["members"], by))
    evals = [eval_points(runs[i]) for i in members]
    steps = [step for step in evals[0] if all(step in points for points in evals)]
    if not steps:
        return []

    def mean_loss(step: int) -> float:
        return statistics.fmean(points[step].loss for points in evals)

    step = min(steps, key=mean_loss) if by == "best" else max(steps)
    tokens = statistics.fmean(points[step].tokens for points in evals)
    compute = (runs[members[0]].flops_per_token or 0.0) * tokens
    if not compute > 0 or min(points[step].loss for points in evals) <= 0:
        return []
    return [
        {
            "run": i,
            "label": row["label"],
            "parameters": runs[i].parameters,
            "compute": compute,
            "tokens": tokens,
            "step": step,
            "loss": points[step].loss,
        }
        for i, points in zip(members, evals, strict=True)
    ]


class EvalPoint(NamedTuple):
    """An evaluation of a run."""

    loss: float
    tokens: float  # seen before it


def eval_points(run: LoadedRun) -> dict[int, EvalPoint]:
    """A run's evaluations after its first step, by step."""
    columns = zip(*(run.evals[key].tolist() for key in ("step", "val_loss", "tokens")), strict=True)
    return {int(step): EvalPoint(loss, tokens) for step, loss, tokens in columns if step > 0 and math.isfinite(loss)}


def describe_points(n_runs: int, n_sizes: int, by: str, n_datasets: int) -> str:
    """What the laws were fitted to."""
    step = "at the step where their mean val_loss is lowest" if by == "best" else "at their last common step"
    text = (
        f"Fitted to {plural(n_runs, 'run')} of {plural(n_sizes, 'size')}: of each size, all finished seeds of the "
        f"arguments with the lowest mean, {step}. Dashed: the scaling law. Thin: the runs' curves."
    )
    return text if n_datasets == 1 else f"{text} Runs on other datasets are excluded."


def describe_fit(key: str, points: Sequence[Row]) -> Row | None:
    """The law in `key`: numbers, a curve up to the next size with the 95 % interval of a run, and sentences."""
    x = [point[key] for point in points]
    losses = [point["loss"] for point in points]
    law = scaling.fit(x, losses)
    if law is None:
        return None
    prediction = scaling.predict_next_size(law, x)
    curve_x = np.geomspace(min(x), prediction.x, LAW_POINTS)
    curve = law.loss(curve_x)
    margin = law.margin(curve_x)
    return {
        "floor": law.floor,
        "exponent": law.exponent,
        "exponent_margin": law.exponent_margin(),
        "next": prediction._asdict(),
        "x": curve_x,
        "y": curve,
        "low": None if margin is None else curve * np.exp(-margin),
        "high": None if margin is None else curve * np.exp(margin),
        "sentences": [
            describe_law(law, key),
            describe_floor(law),
            describe_prediction(prediction, key),
            *describe_check(scaling.predict_largest(x, losses)),
        ],
    }


SYMBOLS = {"compute": "C", "parameters": "N"}
UNITS = {"compute": "FLOPs", "parameters": "parameters"}


def describe_law(law: scaling.PowerLaw, key: str) -> str:
    """The formula, and how certain its exponent is."""
    symbol, unit = SYMBOLS[key], UNITS[key]
    if law.exponent <= 0:
        formula = f"L does not fall with {symbol}"
    else:
        power = law.scale / law.exponent / math.log(10)  # A x^-alpha = (10^power / x)^alpha
        constant = f"{10**power:.3g}" if abs(power) < MAX_POWER else f"10^{power:.0f}"
        floor = f"{law.floor:.4g} + " if law.floor else ""
        formula = f"L = {floor}({constant} / {symbol})^{law.exponent:.4f}"
    margin = law.exponent_margin()
    if margin is None:
        certainty = "there are as many unknowns as points, so it has no confidence interval."
    else:
        certainty = f"its 95 % confidence interval is ± {margin:.4f}."
    return f"{formula}, {symbol} in {unit}. The exponent is {law.exponent:.4f}; {certainty}"


def describe_floor(law: scaling.PowerLaw) -> str:
    """Whether a floor was fitted, and why."""
    if law.floor_p is None:
        return (
            f"With fewer than {scaling.MIN_SIZES_FOR_FLOOR} sizes, a floor E can't be distinguished from the exponent: "
            "E = 0, as in Kaplan et al. (2020). With more it is tested."
        )
    p = f"p {format_p(law.floor_p)}, F test"
    if not law.floor:
        return f"These sizes show no floor ({p}): E = 0, as in Kaplan et al. (2020)."
    return (
        f"The floor, which no size gets below, is {law.floor:.3f} (Hoffmann et al. 2022; no floor: {p}). "
        "It is far from the sizes fitted, so it is a rough estimate."
    )


def format_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def describe_prediction(prediction: scaling.Prediction, key: str) -> str:
    return (
        f"The predicted loss of the next size, {prediction.x:.3g} {UNITS[key]}, is {prediction.loss:.4f}"
        f"{describe_interval(prediction)}."
    )


def describe_interval(prediction: scaling.Prediction) -> str:
    if prediction.low is None:
        return ""
    return f" (95 % of runs: {prediction.low:.4f} to {prediction.high:.4f})"


def describe_check(check: scaling.Check | None) -> list[str]:
    """A sentence about the largest size as the smaller ones predict it; none where there are too few."""
    if check is None:
        return []
    predicted = check.predicted
    error = format_percent(abs(predicted.loss / check.reached - 1))
    floor = f"with a floor of {check.law.floor:.3f}" if check.law.floor else "without a floor"
    return [
        f"Check: a law fitted to the {check.n_sizes} smaller sizes alone, {floor}, predicts {predicted.loss:.4f}"
        f"{describe_interval(predicted)} for the largest; its mean is {check.reached:.4f}, {error} off."
    ]


# ---------------------------------------------------------------------------------------------------------------------
# everything


def data_args(run: LoadedRun) -> list[Any]:
    return [run.record.args.get(key) for key in DATA_ARGS]


def git_commit(run: LoadedRun) -> str:
    about = run.record.about
    return str(about.get("git_commit") or "") if isinstance(about, dict) else ""


def describe_run(run: LoadedRun, group: int, by: str) -> Row:
    return {key: getattr(run, key) for key in RUN_FIELDS} | {
        "folder": str(run.folder),
        "group": group,
        "ranking_loss": run.ranking_loss(by),
        "samples": [{"step": step, "texts": texts} for step, texts in run.samples],
        "config": {key: read_runs.format_arg(value) for key, value in run.record.args.items()},
    }


def collect_remarks(runs: Sequence[LoadedRun], rows: Sequence[Row], empty_paths: Sequence[str]) -> list[str]:
    """What one should know before comparing these runs."""
    remarks = [f"{path}: no run found" for path in empty_paths]
    n_datasets = len({read_runs.identity(data_args(run)) for run in runs if run.record.args})
    if n_datasets > 1:
        remarks.append(f"These runs train on {n_datasets} different datasets: their losses can't be compared.")
    commits = {git_commit(run) for run in runs} - {""}
    if len(commits) > 1:
        names = ", ".join(sorted(commit[:7] for commit in commits)[:6])
        remarks.append(f"These runs were made by {len(commits)} versions of the code ({names}).")
    n_unfinished = sum(run.state not in ("done", "pruned") for run in runs)
    if n_unfinished:
        verb = "is" if n_unfinished == 1 else "are"
        of_runs = plural(len(runs), "run")
        remarks.append(f"{n_unfinished} of {of_runs} {verb} not done: statistics use finished runs only.")
    if not stats.has_scipy():
        n_with_seeds = sum(len(row["losses"]) > 1 for row in rows)
        n_sizes = max(map(len, group_sizes(runs, rows).values()), default=0)
        if n_with_seeds > 1 or n_sizes >= scaling.MIN_SIZES:
            remarks.append("Significance tests and scaling laws need scipy: pip install scipy.")
    return remarks


def payload(runs: Sequence[LoadedRun], empty_paths: Sequence[str], by: str, refresh_seconds: int = 0) -> Row:
    """All that the page shows.

    by: best or final, the val_loss that runs are ranked by. refresh_seconds: how often a served page asks for
    changes; 0: never.
    """
    groups = read_runs.group_runs(runs)
    group_of = {i: number for number, group in enumerate(groups) for i in group.members}
    rows = describe_groups(runs, groups, by)
    ranked = []
    for i, run in enumerate(runs):
        loss = run.ranking_loss(by)
        if loss is not None:
            ranked.append((loss, i))
    return to_plain(
        {
            "made": time.strftime("%Y-%m-%d %H:%M:%S"),
            "live": refresh_seconds,
            "by": by,
            "varied": read_runs.varying_args(runs),
            "best": min(ranked)[1] if ranked else None,
            "groups": rows,
            "runs": [describe_run(run, group_of[i], by) for i, run in enumerate(runs)],
            "scaling": describe_scaling(runs, rows, by),
            "palette": PALETTE,
            "remarks": collect_remarks(runs, rows, empty_paths),
            "n_lines": sum(run.n_lines for run in runs),
        }
    )


# ---------------------------------------------------------------------------------------------------------------------
# the file


def to_json(shown: Row) -> str:
    """JSON in ASCII that can stand in a page: no character of it ends a script or begins a tag."""
    text = json.dumps(shown, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def csp_hash(script: str) -> str:
    """A script's hash, as a content security policy names it."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def render(shown: Row, title: str) -> str:
    """The page's HTML. Raises UserError without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise UserError("the report's page needs plotly: pip install plotly") from None
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    plotly = get_plotlyjs()
    assert "</script" not in plotly.lower()
    page_script = re.search(r"<script>(\n.*?)</script>", template, re.S)
    assert page_script is not None
    hashes = f"{csp_hash(plotly)} {csp_hash(page_script[1])}"
    connect = "'self'" if shown["live"] else "'none'"
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        f"img-src data: blob:; connect-src {connect}"
    )
    parts = {
        "policy": policy,
        "title": html.escape(make_visible(title)),
        "plotly": plotly,
        "data": to_json(shown),
    }
    return re.sub(r"\{\{(policy|title|plotly|data)\}\}", lambda match: parts[match[1]], template)
