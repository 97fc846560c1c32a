"""Tables of a sweep's runs: as CSV, as Markdown, and as text for a terminal. Imports no torch."""

import csv
import io
import sys
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge.console import format_value
from nanoforge.files import write_text
from nanoforge.run_state import RunStatus

REWARDS = ("reward", "val_reward", "best_val_reward")
NUMBERS = ("step", "loss", "val_loss", "best_val_loss", *REWARDS, "best_step", "seconds")  # attributes of RunStatus


class Table(NamedTuple):
    """A header and rows of values, None where there is none."""

    header: list[str]
    rows: list[list[Any]]


def table_of_runs(names: list[str], varying: list[dict[str, Any]], statuses: list[RunStatus]) -> Table:
    """One row for each run: what varies, its state and numbers, its accuracies, its name."""
    columns = list(dict.fromkeys(name for values in varying for name in values))
    tasks = list(dict.fromkeys(task for status in statuses for task, _ in status.scores))
    rows = []
    for name, values, status in zip(names, varying, statuses, strict=True):
        scores = dict(status.scores)
        rows.append(
            [
                *(values.get(column) for column in columns),
                status.state,
                *(getattr(status, number) for number in NUMBERS),
                *(scores.get(task) for task in tasks),
                name,
            ]
        )
    return Table([*columns, "state", *NUMBERS, *tasks, "run"], rows)


def as_csv(table: Table) -> str:
    """All digits of numbers; an empty cell for None."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows([[csv_cell(value) for value in row] for row in table.rows])
    return out.getvalue()


def csv_cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        return value
    return format_value(value)


def short_cell(value: Any, column: str) -> str:
    """A value in few characters: losses and accuracies with four decimals, seconds with one."""
    if value is None:
        return ""
    if isinstance(value, float) and ("loss" in column or column in REWARDS or column.startswith("accuracy/")):
        return f"{value:.4f}"
    if column == "seconds":
        return f"{value:.1f}"
    return format_value(value)


def short_cells(table: Table) -> list[list[str]]:
    """All cells of a table."""
    return [[short_cell(value, column) for column, value in zip(table.header, row, strict=True)] for row in table.rows]


def without_redundant_columns(table: Table) -> Table:
    """The table without the columns that add nothing.

    Those are rewards that no run has, and losses where all runs have rewards: they are the same with a minus.
    """
    at = {name: i for i, name in enumerate(table.header)}
    hidden = {name for name in REWARDS if all(row[at[name]] is None for row in table.rows)}
    for loss, reward in (("val_loss", "val_reward"), ("best_val_loss", "best_val_reward")):
        if reward not in hidden and all(row[at[loss]] is None or row[at[reward]] is not None for row in table.rows):
            hidden.add(loss)
    columns = [i for i, name in enumerate(table.header) if name not in hidden]
    return Table([table.header[i] for i in columns], [[row[i] for i in columns] for row in table.rows])


def as_markdown(table: Table) -> str:
    """A Markdown table of short cells."""
    table = without_redundant_columns(table)
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in short_cells(table)]
    lines = [table.header, ["---"] * len(table.header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_text(table: Table) -> str:
    """Aligned columns of short cells; columns without any value are left out."""
    table = without_redundant_columns(table)
    rows = short_cells(table)
    columns = [i for i in range(len(table.header)) if any(row[i] for row in rows)]
    lines = [table.header, *rows]
    widths = {i: max(len(line[i]) for line in lines) for i in columns}
    return "\n".join("  ".join(line[i].ljust(widths[i]) for i in columns).rstrip() for line in lines)


def write_results(table: Table, folder: Path) -> None:
    """Write results.csv and results.md, the best run first, and print the latter."""
    best = table.header.index("best_val_loss")
    rows = sorted(table.rows, key=lambda row: (row[best] is None, row[best] or 0.0))
    table = Table(table.header, rows)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("results.csv", as_csv(table)), ("results.md", as_markdown(table))):
        write_text(folder / name, text)
        print(folder / name, file=sys.stderr)
    print(as_markdown(table), end="")
