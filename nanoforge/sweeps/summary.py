"""Tables of a sweep's runs: as CSV, as Markdown, and for a terminal. Imports no torch."""

import csv
import io
from typing import Any

from nanoforge.console import format_value
from nanoforge.run_state import RunStatus

NUMBERS = ("step", "loss", "val_loss", "best_val_loss", "best_step", "seconds")


def rows(names: list[str], told: list[dict[str, Any]], outcomes: list[RunStatus]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: what varies, the state, what was reached, accuracies, the run's name."""
    columns = list(dict.fromkeys(name for one in told for name in one))
    tasks = list(dict.fromkeys(task for outcome in outcomes for task, _ in outcome.scores))
    return [*columns, "state", *NUMBERS, *tasks, "run"], [
        [
            *(one.get(column) for column in columns),
            outcome.state,
            *(getattr(outcome, number) for number in NUMBERS),
            *(dict(outcome.scores).get(task) for task in tasks),
            name,
        ]
        for name, one, outcome in zip(names, told, outcomes, strict=True)
    ]


def as_csv(header: list[str], table: list[list[Any]]) -> str:
    """Whole numbers as they are told; nothing where there is nothing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(
        [
            [
                ""
                if cell is None
                else cell
                if isinstance(cell, int | float | str) and not isinstance(cell, bool)
                else format_value(cell)
                for cell in row
            ]
            for row in table
        ]
    )
    return out.getvalue()


def shown(cell: Any, name: str = "") -> str:
    if cell is None:
        return ""
    return (
        f"{cell:.4f}"
        if ("loss" in name or name.startswith("accuracy/")) and isinstance(cell, float)
        else f"{cell:.1f}"
        if name == "seconds"
        else format_value(cell)
    )


def as_markdown(header: list[str], table: list[list[Any]]) -> str:
    """A table of Markdown, its numbers short."""
    cells = [
        header,
        ["---"] * len(header),
        *(
            [shown(cell, name).replace("|", "\\|").replace("\n", " ") for name, cell in zip(header, row, strict=True)]
            for row in table
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"


def as_text(header: list[str], table: list[list[Any]]) -> str:
    """The table in columns, for a terminal; columns with nothing in them are left out."""
    cells = [[shown(cell, name) for name, cell in zip(header, row, strict=True)] for row in table]
    kept = [i for i in range(len(header)) if any(row[i] for row in cells)]
    widths = {i: max(len(header[i]), *(len(row[i]) for row in cells)) for i in kept}
    return "\n".join("  ".join(row[i].ljust(widths[i]) for i in kept).rstrip() for row in [header, *cells])
