"""The report's pictures, by matplotlib, for where a page can't go: loss.png, seeds.png, training.png, datasets.png, scaling.png.

They are drawn from what the page shows (page.payload), so both tell the same. A picture of which there is nothing to draw is not written, and an older one is taken away.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

PALETTE = (
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
)  # the page's
AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds", "flops": "FLOPs"}


def literal(text: str) -> str:
    """For matplotlib, which reads what stands between dollars as mathematics."""
    return text.replace("$", r"\$")


def colors(shown: dict[str, Any]) -> Callable[[dict], Any]:
    """The colour of a run: of its group, or where there are many groups of its rank."""
    if len(shown["groups"]) <= len(PALETTE):
        return lambda run: PALETTE[run["group"] % len(PALETTE)]
    from matplotlib import colormaps

    order = sorted(run["judged"] for run in shown["runs"] if run["judged"] is not None)
    return lambda run: (
        "#8a8f98"
        if run["judged"] is None
        else colormaps["plasma"](0.9 * order.index(run["judged"]) / max(1, len(order) - 1))
    )


def along(run: dict, lines: dict, x: str) -> list[float]:
    """Where a run's lines stand on an axis; NaN where that isn't known."""
    if x == "flops":
        return [
            tokens * run["flops"] if run["flops"] and tokens is not None else float("nan")
            for tokens in lines.get("tokens", [])
        ]
    return [float("nan") if value is None else value for value in lines.get(x, [])]


def numbers(column: list) -> list[float]:
    return [float("nan") if value is None else value for value in column]


def window(axes, curves: list[tuple[list[float], list[float]]]) -> None:
    """Leave out of sight what comes before the first bend of the curves, which would flatten the rest."""
    heights = [
        y
        for xs, ys in curves
        for x, y in zip(xs, ys, strict=True)
        if y == y and x == x and x >= 0.08 * max((one for one in xs if one == one), default=0)
    ]
    if heights:
        low, high = min(heights), sorted(heights)[int(0.98 * (len(heights) - 1))]
        pad = 0.06 * (high - low or 0.1)
        axes.set_ylim(low - pad, high + pad)


def draw(told: list, shown: dict[str, Any], out: Path) -> list[Path]:
    """Write the pictures of which there is something to draw; their paths."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    runs, color, drawn = shown["runs"], colors(shown), []
    width = 0.9 if len(runs) > 30 else 1.5

    def save(name: str, sheet: Figure | None) -> None:
        (out / name).unlink(missing_ok=True)
        if sheet is not None:
            for axes in sheet.axes:
                axes.grid(alpha=0.22)
                axes.spines[["top", "right"]].set_visible(False)
            sheet.savefig(out / name, dpi=120)
            drawn.append(out / name)

    def name_curves(sheet: Figure) -> None:
        entries = {label: line for line in sheet.axes[0].get_lines() if not (label := line.get_label()).startswith("_")}
        if len(entries) > 1 and len(shown["groups"]) <= len(PALETTE):
            sheet.legend(
                entries.values(),
                entries.keys(),
                loc="outside lower center",
                ncols=3 if max(map(len, entries)) < 45 else 1,
                frameon=False,
                fontsize=9,
            )

    def panels(keys: list[tuple[str, str, str]], columns: int) -> Figure | None:
        """One panel a (key, x, title): every run that tells the key."""
        if not any(key in lines for run in runs for lines in (run["train"], run["evals"]) for key, _, _ in keys):
            return None
        rows = -(-len(keys) // columns)
        sheet = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.9), layout="constrained")
        for axes, (key, x, words) in zip(sheet.subplots(rows, columns, squeeze=False).flat, keys, strict=False):
            curves = []
            for run in sorted(
                runs, key=lambda run: -(run["judged"] if run["judged"] is not None else 1e9)
            ):  # the best on top
                lines = run["evals"] if key in run["evals"] else run["train"]
                if key in lines:
                    curves.append((along(run, lines, x), numbers(lines[key])))
                    group = shown["groups"][run["group"]]
                    label = group["label"] if len(group["members"]) > 1 else run["name"]
                    axes.plot(*curves[-1], color=color(run), linewidth=width, label=literal(label.lstrip("_") or label))
            axes.set(xlabel=AXES[x], title=literal(words))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if "loss" in key:
                window(axes, curves)
        for axes in sheet.axes[len(keys) :]:
            axes.remove()
        name_curves(sheet)
        if len(shown["groups"]) > len(PALETTE):
            sheet.suptitle(f"{len(runs)} runs: the darker, the lower the {shown['by']} val_loss", fontsize=11)
        return sheet

    measure = next(
        (key for key, kind in (("val_loss", "evals"), ("loss", "train")) if any(key in run[kind] for run in runs)),
        "val_loss",
    )
    save("loss.png", panels([(measure, x, f"{measure} against {words}") for x, words in AXES.items()], 2))
    training = [
        (key, "step", words)
        for key, words in (
            ("lr", "learning rate"),
            ("grad_norm", "gradient norm"),
            ("tokens_per_second", "tokens a second"),
        )
        if any(key in run["train"] for run in runs)
    ]
    save("training.png", panels(training, 3) if training else None)
    datasets = sorted({key for run in runs for key in run["evals"] if key.startswith("val_loss/")})
    save("datasets.png", panels([(key, "step", key) for key in datasets], min(3, len(datasets))) if datasets else None)
    save("seeds.png", seeds(shown, color))
    save("scaling.png", law(shown, color))
    return drawn


def seeds(shown: dict[str, Any], color: Callable[[dict], Any]):
    """Mean of each group's seeds, from the lowest to the highest as a band, and what the groups reached."""
    from matplotlib.figure import Figure

    banded = [(group, shown["runs"][group["members"][0]]) for group in shown["groups"] if "val_loss" in group["bands"]]
    if not banded:
        return None
    if len(banded) <= len(PALETTE):
        own = {id(run): PALETTE[i] for i, (_, run) in enumerate(banded)}
        color = lambda run: own[id(run)]  # noqa: E731
    sheet = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = sheet.subplots(1, 2, width_ratios=(3, 2))
    for group, run in banded:
        band = group["bands"]["val_loss"]
        left.fill_between(band["step"], band["low"], band["high"], color=color(run), alpha=0.17, linewidth=0)
        left.plot(band["step"], band["mean"], color=color(run), linewidth=1.8)
    window(
        left,
        [
            (group["bands"]["val_loss"]["step"], group["bands"]["val_loss"][key])
            for group, _ in banded
            for key in ("low", "high")
        ],
    )
    left.set(xlabel="steps", title="val_loss: mean of the seeds, lowest to highest")
    ranked = sorted(
        ((group, run) for group, run in banded if group["mean"] is not None), key=lambda pair: -pair[0]["mean"]
    )[-25:]
    for place, (group, run) in enumerate(ranked):
        right.plot(group["losses"], [place] * len(group["losses"]), "o", color=color(run), alpha=0.7, markersize=6)
        right.plot(group["mean"], place, "|", color=color(run), markersize=18, markeredgewidth=2)
    words = [
        f"{group['label'][:48]}"
        + (
            f"\n{group['verdict'].partition(':')[0]}, p {group['corrected']:.2g}"
            if "verdict" in group
            else "\nthe best mean"
            if group.get("is_best")
            else ""
        )
        for group, _ in ranked
    ]
    right.set_yticks(range(len(ranked)), [literal(word) for word in words], fontsize=8)
    right.set(title=f"{shown['by']} val_loss of each seed", ylim=(-0.6, len(ranked) - 0.4))
    return sheet


def law(shown: dict[str, Any], color: Callable[[dict], Any]):
    """The scaling fits: the points, the law, its interval and the next size."""
    from matplotlib.figure import Figure

    laws = shown["scaling"]["laws"] if shown["scaling"] else {}
    if not laws:
        return None
    sheet = Figure(figsize=(5.6 * len(laws), 4.8), layout="constrained")
    for axes, (key, told) in zip(sheet.subplots(1, len(laws), squeeze=False).flat, laws.items(), strict=True):
        if told["low"]:
            axes.fill_between(told["x"], told["low"], told["high"], color=PALETTE[0], alpha=0.13, linewidth=0)
        axes.plot(told["x"], told["y"], "--", color="#444", linewidth=1.5)
        for point in shown["scaling"]["points"]:
            axes.plot(point[key], point["loss"], "o", color=color(shown["runs"][point["run"]]), markersize=7)
        axes.plot(told["next"]["x"], told["next"]["loss"], "D", color="#222", markerfacecolor="none", markersize=9)
        axes.annotate(
            f"{told['next']['loss']:.3f}",
            (told["next"]["x"], told["next"]["loss"]),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
        )
        margin = f" ± {told['exponent_margin']:.3f}" if told["exponent_margin"] is not None else ""
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="FLOPs" if key == "compute" else "parameters",
            ylabel="val_loss",
            title=f"exponent {told['exponent']:.3f}{margin}"
            + (f", floor {told['floor']:.2f}" if told["floor"] else ""),
        )
        axes.yaxis.set_major_formatter("{x:.2f}")
        axes.yaxis.set_minor_formatter("{x:.2f}")
    return sheet
