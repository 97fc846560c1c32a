"""The report's figures, for where a page can't go: loss.png, training.png, datasets.png, seeds.png, scaling.png.

They are drawn from what the page shows (page.payload), so both say the same. A figure with nothing to draw is not
written, and an older one is deleted.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from nanoforge.console import print_to_stderr
from nanoforge.report.page import PALETTE

GREY = PALETTE[-1]
AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds", "flops": "FLOPs"}
TRAINING = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}
NAN = float("nan")
FIRST_SHARE = 0.08  # of a curve; its steep beginning would flatten the rest
MAX_RANKED_GROUPS = 25
MAX_LEGEND_ENTRIES = 24

Row = dict[str, Any]  # JSON of page.payload: everything, a run, a group
ColorOf = Callable[[Row], Any]  # run -> color


class Panel(NamedTuple):
    """A key's curves of all runs, against a key of AXES."""

    key: str
    x: str
    title: str


def draw_figures(shown: Row, folder: Path) -> list[Path]:
    """Write the figures that have something to show; their paths. One that can't be drawn or written is reported."""
    color_of = make_colors(shown)
    draw = {
        "loss.png": draw_loss,
        "training.png": draw_training,
        "datasets.png": draw_datasets,
        "seeds.png": draw_seeds,
        "scaling.png": draw_scaling,
    }
    written = []
    for name, draw_figure in draw.items():
        path = folder / name
        try:
            path.unlink(missing_ok=True)
            figure = draw_figure(shown, color_of)
            if figure is not None:
                write_figure(figure, path)
                written.append(path)
        except Exception as error:
            print_to_stderr(f"{path}: can't be drawn ({error}); the page has everything")
    return written


def write_figure(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.22)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# helpers


def escape(text: str) -> str:
    """For matplotlib, which reads text between dollars as mathematics."""
    return text.replace("$", r"\$")


def make_colors(shown: Row) -> ColorOf:
    """A run's color: that of its group, or with many groups that of its rank."""
    if len(shown["groups"]) <= len(PALETTE):
        return lambda run: PALETTE[run["group"] % len(PALETTE)]
    losses = sorted(run["ranking_loss"] for run in shown["runs"] if run["ranking_loss"] is not None)

    def color_by_rank(run: Row) -> Any:
        if run["ranking_loss"] is None:
            return GREY
        rank = losses.index(run["ranking_loss"])
        return colormaps["plasma"](0.9 * rank / max(1, len(losses) - 1))

    return color_by_rank


def to_floats(column: Iterable[float | None]) -> list[float]:
    """None as NaN."""
    return [NAN if value is None else value for value in column]


def x_values(run: Row, columns: Row, x: str) -> list[float]:
    """Where a run's lines are on an axis; NaN where that is not known."""
    if x != "flops":
        return to_floats(columns.get(x, []))
    flops = run["flops_per_token"] or NAN
    return [tokens * flops for tokens in to_floats(columns.get("tokens", []))]


def zoom_in(axes: Axes, curves: Iterable[tuple[Sequence[float], Sequence[float]]]) -> None:
    """Set the limits of y without the curves' steep beginnings."""
    heights = []
    for xs, ys in curves:
        last = max((x for x in xs if x == x), default=0)
        for x, y in zip(xs, ys, strict=True):
            if y == y and x >= FIRST_SHARE * last:  # x is not NaN either
                heights.append(y)
    if heights:
        heights.sort()
        low, high = heights[0], heights[int(0.98 * (len(heights) - 1))]
        pad = 0.06 * (high - low or 0.1)
        axes.set_ylim(low - pad, high + pad)


# ---------------------------------------------------------------------------------------------------------------------
# curves of every run


def draw_loss(shown: Row, color_of: ColorOf) -> Figure | None:
    """The validation loss against steps, tokens, seconds and FLOPs; without any, the training loss."""
    key = "val_loss"
    if not any("val_loss" in run["evals"] for run in shown["runs"]):
        key = "loss"
    panels = [Panel(key, x, f"{key} against {label}") for x, label in AXES.items()]
    return draw_panels(shown, panels, color_of, columns=2)


def draw_training(shown: Row, color_of: ColorOf) -> Figure | None:
    panels = []
    for key, title in TRAINING.items():
        if any(key in run["train"] for run in shown["runs"]):
            panels.append(Panel(key, "step", title))
    return draw_panels(shown, panels, color_of, columns=3)


def draw_datasets(shown: Row, color_of: ColorOf) -> Figure | None:
    keys = {key for run in shown["runs"] for key in run["evals"] if key.startswith("val_loss/")}
    panels = [Panel(key, "step", key) for key in sorted(keys)]
    return draw_panels(shown, panels, color_of, columns=min(3, len(panels)))


def draw_panels(shown: Row, panels: Sequence[Panel], color_of: ColorOf, columns: int) -> Figure | None:
    """A figure of panels; None where no run has any of their keys."""
    runs = shown["runs"]
    if not any(panel.key in run["train"] or panel.key in run["evals"] for panel in panels for run in runs):
        return None
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.9), layout="constrained")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(all_axes, panels, strict=False):
        draw_panel(axes, panel, shown, color_of)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    if len(shown["groups"]) > len(PALETTE):
        figure.suptitle(f"{len(runs)} runs: the darker, the lower the {shown['by']} val_loss", fontsize=11)
    add_legend(figure)
    return figure


def draw_panel(axes: Axes, panel: Panel, shown: Row, color_of: ColorOf) -> None:
    def worst_first(run: Row) -> float:  # so the best run is on top
        return -(run["ranking_loss"] if run["ranking_loss"] is not None else 1e9)

    curves = []
    for run in sorted(shown["runs"], key=worst_first):
        columns = run["evals"] if panel.key in run["evals"] else run["train"]
        if panel.key not in columns:
            continue
        xs, ys = x_values(run, columns, panel.x), to_floats(columns[panel.key])
        curves.append((xs, ys))
        group = shown["groups"][run["group"]]
        label = group["label"] if len(group["members"]) > 1 else run["name"]
        label = label.lstrip("_") or label  # matplotlib leaves names with an underscore out of a legend
        width = 0.9 if len(shown["runs"]) > 30 else 1.5
        axes.plot(xs, ys, color=color_of(run), linewidth=width, label=escape(label))
    axes.set(xlabel=AXES[panel.x], title=escape(panel.title))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if "loss" in panel.key:
        zoom_in(axes, curves)


def add_legend(figure: Figure) -> None:
    """One entry for each label, below the panels, the best run first; none for a single label.

    Of many labels the first MAX_LEGEND_ENTRIES, and how many there are more.
    """
    lines = {str(line.get_label()): line for line in reversed(figure.axes[0].get_lines())}
    lines = {label: line for label, line in lines.items() if not label.startswith("_")}
    if len(lines) < 2:
        return
    labels = list(lines)[:MAX_LEGEND_ENTRIES]
    handles = [lines[label] for label in labels]
    if len(lines) > len(labels):
        labels.append(f"and {len(lines) - len(labels)} more, worse ones")
        handles.append(Line2D([], [], linestyle="none"))
    columns = 3 if max(map(len, labels)) < 45 else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


# ---------------------------------------------------------------------------------------------------------------------
# seeds and scaling


def draw_seeds(shown: Row, color_of: ColorOf) -> Figure | None:
    """Each group's mean curve with a band from the lowest to the highest seed, and the loss of each seed."""
    groups = [group for group in shown["groups"] if "val_loss" in group["bands"]]
    if not groups:
        return None
    if len(groups) <= len(PALETTE):
        colors = list(PALETTE[: len(groups)])
    else:
        colors = [color_of(shown["runs"][group["members"][0]]) for group in groups]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    curves = []
    for group, color in zip(groups, colors, strict=True):
        band = group["bands"]["val_loss"]
        left.fill_between(band["step"], band["low"], band["high"], color=color, alpha=0.17, linewidth=0)
        left.plot(band["step"], band["mean"], color=color, linewidth=1.8)
        curves += [(band["step"], band["low"]), (band["step"], band["high"])]
    zoom_in(left, curves)
    left.set(xlabel="steps", title="val_loss: mean of the seeds, lowest to highest")

    finished = [(group, color) for group, color in zip(groups, colors, strict=True) if group["mean"] is not None]
    finished.sort(key=lambda pair: -pair[0]["mean"])
    ranked = finished[-MAX_RANKED_GROUPS:]
    for height, (group, color) in enumerate(ranked):
        losses = group["losses"]
        right.plot(losses, [height] * len(losses), "o", color=color, alpha=0.7, markersize=6)
        right.plot(group["mean"], height, "|", color=color, markersize=18, markeredgewidth=2)
    labels = [escape(describe_seeds(group)) for group, _ in ranked]
    right.set_yticks(range(len(ranked)), labels, fontsize=8)
    right.set(title=f"{shown['by']} val_loss of each seed", ylim=(-0.6, len(ranked) - 0.4))
    return figure


def describe_seeds(group: Row) -> str:
    """A group's label, and below it the verdict of its test."""
    label = group["label"][:48]
    if group.get("is_best"):
        return f"{label}\nlowest mean"
    if "verdict" in group:
        verdict = group["verdict"].partition(":")[0]
        return f"{label}\n{verdict}, p {group['corrected_p']:.2g}"
    return label


def draw_scaling(shown: Row, color_of: ColorOf) -> Figure | None:
    """The laws: their points, their curve with its interval, and the next size."""
    laws = shown["scaling"]["laws"] if shown["scaling"] else {}
    if not laws:
        return None
    figure = Figure(figsize=(5.6 * len(laws), 4.8), layout="constrained")
    for axes, (key, law) in zip(figure.subplots(1, len(laws), squeeze=False).flat, laws.items(), strict=True):
        draw_law(axes, key, law)
        for point in shown["scaling"]["points"]:
            color = color_of(shown["runs"][point["run"]])
            axes.plot(point[key], point["loss"], "o", color=color, markersize=7)
    return figure


def draw_law(axes: Axes, key: str, law: Row) -> None:
    if law["low"]:
        axes.fill_between(law["x"], law["low"], law["high"], color=PALETTE[0], alpha=0.13, linewidth=0)
    axes.plot(law["x"], law["y"], "--", color="#444", linewidth=1.5)
    next_size = (law["next"]["x"], law["next"]["loss"])
    axes.plot(*next_size, "D", color="#222", markerfacecolor="none", markersize=9)
    axes.annotate(f"{next_size[1]:.3f}", next_size, xytext=(0, 10), textcoords="offset points", ha="center")
    title = f"exponent {law['exponent']:.3f}"
    if law["exponent_margin"] is not None:
        title += f" ± {law['exponent_margin']:.3f}"
    if law["floor"]:
        title += f", floor {law['floor']:.2f}"
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOPs" if key == "compute" else "parameters",
        ylabel="val_loss",
        title=title,
    )
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.yaxis.set_minor_formatter("{x:.2f}")
