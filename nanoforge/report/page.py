"""The report's page: what it shows of the runs, as plain values, and one HTML file with everything in it.

The page is report.html beside this file: its script draws with plotly.js, which plotly's Python package carries and which is put into
the page; a page that can zoom and answer the pointer, from a file, on a phone, is what plotly gives and matplotlib's SVG does not.

What runs say is never trusted. Here control characters, bidirectional marks and whatever else can't be seen become words like ⟨U+202E⟩,
and JSON in the page has no `<`; the script puts texts in as text; a content security policy runs none but the page's two scripts, by their hashes.
"""

import base64
import hashlib
import html
import json
import re
import statistics
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

from nanoforge.errors import UserError
from nanoforge.report import read_runs as folders
from nanoforge.report import scaling, stats
from nanoforge.report.read_runs import Group, Run

MEASURES = (
    ("val_loss", "eval"),
    ("loss", "train"),
    ("train_loss", "eval"),
    ("bits_per_byte", "eval"),
)  # with a band for seeds
UNSEEN = (
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Cn",
    "Zl",
    "Zp",
)  # Unicode's categories of control, format, unpaired, private, unassigned; line and paragraph separators


def visible(text: str) -> str:
    """Text in which everything can be seen: ⟨U+001B⟩ for what has no glyph or turns the writing round; line ends and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"⟨U+{ord(c):04X}⟩" if c not in "\n\t" and unicodedata.category(c) in UNSEEN else c for c in text)


def plain(value: Any) -> Any:
    """A value for the page: numbers of six digits, None for what is not finite, texts made visible."""
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        value = folders.number(value)
        return (
            None
            if value != value
            else int(value)
            if value == int(value) and abs(value) < 1e15
            else float(f"{value:.6g}")
        )
    if isinstance(value, dict):
        return {visible(str(key)): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else visible(str(value))


# ---------------------------------------------------------------------------------------------------------------------
# what is shown


def judged(run: Run, by: str) -> float | None:
    return run.best if by == "best" else run.final


def about(run: Run, group: int, by: str) -> dict[str, Any]:
    """One run."""
    keys = (
        "name",
        "state",
        "why",
        "train",
        "evals",
        "notes",
        "remarks",
        "log",
        "parameters",
        "flops",
        "step",
        "tokens",
        "seconds",
        "speed",
        "final",
        "best",
        "best_step",
    )
    samples = [{"step": step, "texts": texts} for step, texts in run.samples]
    config = {key: folders.brief(value) for key, value in run.config.items() if not key.startswith("_")}
    return {key: getattr(run, key) for key in keys} | {
        "folder": str(run.folder),
        "group": group,
        "judged": judged(run, by),
        "samples": samples,
        "config": config,
    }


def percent(p: float) -> str:
    return "less than 0.1 %" if p < 0.001 else f"{100 * p:.1f} %" if p < 0.1 else f"{100 * p:.0f} %"


def verdict(p: float) -> str:
    """What a p value means."""
    return f"{'real' if p < 0.01 else 'probably real' if p < 0.05 else 'may be chance'}: seeds alone do as much in {percent(p)} of such experiments"


def compared(runs: list[Run], grouped: list[Group], by: str) -> list[dict[str, Any]]:
    """The groups, lowest mean first: its runs that are done, mean and spread, and the difference from the best group of several seeds, with
    Welch's test, corrected by Holm for the number of groups, and the exact permutation test."""
    rows = []
    for group in grouped:
        ended = [i for i in group.members if runs[i].state == "done" and judged(runs[i], by) is not None]
        losses = [judged(runs[i], by) for i in ended]
        spread = statistics.stdev(losses) if len(losses) > 1 else None
        rows.append(
            {
                "label": group.label,
                "members": group.members,
                "losses": losses,
                "mean": statistics.fmean(losses) if losses else None,
                "deviation": spread,
            }
        )
    several = sorted((row for row in rows if len(row["losses"]) > 1), key=lambda row: row["mean"])
    if len(several) > 1:
        best, others = several[0], several[1:]
        best["is_best"] = True
        tests = [stats.welch(best["losses"], row["losses"]) for row in others]
        for row, test, p in zip(others, tests, stats.holm([test.p for test in tests]), strict=True):
            row |= {
                **test._asdict(),
                "corrected": p,
                "permutation": stats.permutation_p(best["losses"], row["losses"]),
                "verdict": verdict(p),
            }
    for row, group in zip(rows, grouped, strict=True):
        row["bands"] = {
            key: band
            for key, kind in MEASURES
            if len(group.members) > 1 and (band := folders.band([runs[i] for i in group.members], key, kind))
        }
    return rows


def scaled(runs: list[Run], rows: list[dict[str, Any]], by: str) -> dict[str, Any] | None:
    """The power laws of loss in compute and in parameters through the best group of each size; None for fewer than three sizes.

    Only runs that are done count, and of several sets of data those on the one of most sizes."""
    datas: dict[str, dict[int, list[dict]]] = {}
    for row in rows:
        member = runs[row["members"][0]]
        if row["losses"] and member.parameters and member.flops:
            data = json.dumps(
                [
                    member.config.get(key)
                    for key in ("training_mode", "dataset", "dataset_list", "multicontext_datasets")
                ]
                + [member.config.get("_data")],
                sort_keys=True,
            )
            datas.setdefault(data, {}).setdefault(member.parameters, []).append(row)
    sizes = max(datas.values(), key=len, default={})
    if len(sizes) < 3:
        return None
    points = []
    for size, of_size in sorted(sizes.items()):
        best = min(of_size, key=lambda row: row["mean"])
        for i in best["members"]:
            run = runs[i]
            if run.state == "done" and (loss := judged(run, by)) is not None:
                tokens = run.tokens * (run.best_step / run.step if by == "best" and run.step else 1.0)
                points.append(
                    {
                        "run": i,
                        "label": best["label"],
                        "parameters": size,
                        "compute": run.flops * tokens,
                        "tokens": tokens,
                        "loss": loss,
                    }
                )
    points = [point for point in points if point["compute"] > 0 and point["loss"] > 0]
    laws = {key: told for key in ("compute", "parameters") if (told := told_law(key, points))}
    return {"points": points, "laws": laws, "sizes": len(sizes), "left_out": len(datas) - 1}


def told_law(key: str, points: list[dict]) -> dict[str, Any] | None:
    """The law in `key`: its numbers, its curve to the next size with the 95 % interval of a run, and all of it in words."""
    x, losses = [point[key] for point in points], [point["loss"] for point in points]
    law = scaling.fit(x, losses)
    if law is None:
        return None
    following, error, name = scaling.next_size(law, x), law.exponent_margin(), {"compute": "C", "parameters": "N"}[key]
    curve = np.geomspace(min(x), following.x, 80)
    margins = [law.margin(at) for at in curve]
    known = margins[0] is not None
    amount = law.height + law.exponent * law.center  # log of the factor before x^-exponent
    unit = "FLOPs" if key == "compute" else "parameters"
    formula = (
        f"L = {f'{law.floor:.4g} + ' if law.floor else ''}({10 ** (amount / law.exponent / np.log(10)):.3g} / {name})^{law.exponent:.4f}"
        if law.exponent > 0
        else f"L does not fall with {name}"
    )
    words = [
        f"{formula}, {name} in {unit}: the exponent is {law.exponent:.4f}"
        + (
            f" ± {error:.4f} (95 % confidence)."
            if known
            else "; as many unknowns as points, so how sure that is can't be told."
        )
    ]
    if len(set(x)) < 5:
        words.append(
            "With fewer than five sizes a floor E can't be told apart from the exponent: E = 0, as in Kaplan et al. (2020). Five or more fit it too."
        )
    elif law.floor == 0:
        words.append(
            "A floor E was fitted too (Hoffmann et al. 2022) and came out as 0: the sizes are too close to show one."
        )
    else:
        words.append(
            f"The floor that no size gets below would be {law.floor:.3f} (Hoffmann et al. 2022); far beyond the sizes fitted it is a guess."
        )
    words.append(
        f"The next size, {following.x:.3g} {unit}, should reach {following.loss:.4f}"
        + (f" (95 % of runs: {following.low:.4f} to {following.high:.4f})." if following.low else ".")
    )
    if check := scaling.check_largest(x, losses):
        words.append(
            f"Put to the test: without the largest size the law foretells {check[0]:.4f} for it; it reached {check[1]:.4f}, {abs(check[0] / check[1] - 1):.1%} off."
        )
    return {
        "floor": law.floor, "exponent": law.exponent, "exponent_margin": error, "next": following._asdict(), "words": words,
        "x": curve, "y": law.loss(curve), "low": law.loss(curve) * np.exp(-np.array(margins)) if known else None, "high": law.loss(curve) * np.exp(np.array(margins)) if known else None,
    }  # fmt: skip


def remarks(runs: list[Run], left_out: list[str], by: str) -> list[str]:
    """What whoever compares these runs should know."""
    told = [f"{path}: no run there" for path in left_out]
    data = {
        json.dumps(
            [run.config.get(key) for key in ("training_mode", "dataset", "dataset_list", "multicontext_datasets")]
        )
        for run in runs
        if run.config
    }
    if len(data) > 1:
        told.append(
            f"These runs learn from {len(data)} different choices of data: their losses don't compare across them."
        )
    commits = {
        str(commit)
        for run in runs
        if isinstance(made := run.config.get("_about"), dict) and (commit := made.get("git_commit"))
    }
    if len(commits) > 1:
        told.append(
            f"They were made by {len(commits)} versions of the code ({', '.join(sorted(commit[:7] for commit in commits)[:6])})."
        )
    unended = sum(run.state not in ("done", "pruned") for run in runs)
    if unended:
        told.append(
            f"{unended} of {len(runs)} runs are not done: they are drawn, but not part of means, tests and fits."
        )
    return told


def payload(runs: list[Run], left_out: list[str], by: str, live: int = 0) -> dict[str, Any]:
    """All that the page shows. by: best or final, which val_loss runs are judged by; live: seconds between two looks, 0 for a page that stays as it is."""
    grouped = folders.groups(runs)
    group_of = {i: g for g, group in enumerate(grouped) for i in group.members}
    rows = compared(runs, grouped, by)
    ranked = sorted((i for i, run in enumerate(runs) if judged(run, by) is not None), key=lambda i: judged(runs[i], by))
    return plain({
        "made": time.strftime("%Y-%m-%d %H:%M:%S"), "live": live, "by": by, "varied": folders.varied(runs), "best": ranked[0] if ranked else None, "groups": rows,
        "runs": [about(run, group_of[i], by) for i, run in enumerate(runs)], "scaling": scaled(runs, rows, by), "remarks": remarks(runs, left_out, by),
        "lines": sum(run.lines for run in runs),
    })  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# the file


def as_json(shown: dict[str, Any]) -> str:
    """JSON in ASCII that can stand in a page: no character of it ends a script or begins a tag."""
    text = json.dumps(shown, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page(shown: dict[str, Any], title: str) -> str:
    """The whole HTML. Raises UserError without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise UserError("the report's page needs a package: pip install plotly") from None
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    plotly, script = get_plotlyjs(), re.search(r"<script>\n(.*?)</script>", template, re.S).group(1)
    assert "</script" not in plotly.lower()
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
        for code in (plotly, "\n" + script)
    )
    reaches = "'self'" if shown["live"] else "'none'"
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; connect-src {reaches}"
    parts = {"policy": policy, "title": html.escape(visible(title)), "plotly": plotly, "data": as_json(shown)}
    return re.sub(r"\{\{(policy|title|plotly|data)\}\}", lambda found: parts[found[1]], template)
