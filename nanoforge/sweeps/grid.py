"""A grid of runs: a YAML file, or lists -> points, their names and their hashes. Knows no argument by name and starts nothing.

    base: [configs/a.py]                          # config files beneath, left to right
    n_layer: 2                                    # the same in all runs
    learning_rate: [1e-4, 3e-4]                   # a list varies; the grid is the product of all that vary
    dataset_list: [[a, b], [a, c]]                # an argument that is a list varies with a list of lists
    zip: {n_embd: [64, 128], n_head: [2, 4]}      # these go together; several: a list of such
    groups: {small: {n_layer: 2}, large: {n_layer: 4, dropout: [0, 0.1]}}      # named alternatives; several: a list of such
    exclude: {n_embd: 128, learning_rate: 3e-4}   # not these together (a list of values: any of them); several: a list of such
    seeds: 3                                      # each of it so often; or a list of seeds
    weight_decay: {low: 0.01, high: 1, log: true} # a range, for --search

An axis is one thing that varies: alternatives, or a range. A point takes one value of each.
"""

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nanoforge import config_files
from nanoforge.console import format_value

WORDS = ("base", "zip", "groups", "exclude", "seeds")  # what is no argument
MOST = 100_000  # points of a grid


# ---------------------------------------------------------------------------------------------------------------------
# the file


def read_file(path: str) -> tuple[dict, dict]:
    """A grid's or experiment's YAML file, as `read_yaml` gives it, without names that begin with an underscore. Raises UserError."""
    typed, verbatim = read_yaml(config_files.read_text(path), path)
    return config_files.check_names(typed, path), config_files.check_names(verbatim, path)


def read_yaml(text: str, path: str) -> tuple[Any, Any]:
    """YAML with typed scalars, and with all scalars as the text that they are (None where there is nothing). Raises UserError."""
    return config_files.read_yaml(text, path), config_files.read_yaml(text, path, verbatim=True)


# ---------------------------------------------------------------------------------------------------------------------
# axes


@dataclass(frozen=True)
class Choice:
    """One alternative of an axis: the values that it sets, and how it is told apart, by column."""

    values: dict[str, Any]
    told: dict[str, Any]


@dataclass(frozen=True)
class Range:
    """The numbers from low to high, of which a search takes some; `whole` ones, or `log`: evenly in their logarithm."""

    name: str
    low: float
    high: float
    log: bool = False
    whole: bool = False

    def at(self, place: float) -> Choice:
        """The number at a place from 0 to 1."""
        return self.choice(
            self.low * (self.high / self.low) ** place if self.log else self.low + place * (self.high - self.low)
        )

    def choice(self, value: float) -> Choice:
        """A number in the range, to three digits."""
        value = round(value) if self.whole else float(f"{value:.3g}")
        near = {self.name: type(value)(min(max(value, self.low), self.high))}
        return Choice(near, near)


Axis = list[Choice] | Range


@dataclass(frozen=True)
class Point:
    """The values of one run, as given, and how it is told from the others, by column."""

    values: dict[str, Any]
    told: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    fixed: dict[str, Any]
    axes: list[Axis]
    exclude: list[dict[str, list]]


def alternatives(name: str, value: Any, is_list: bool, wrong: list[str]) -> list | None:
    """What a value varies over, or None if it doesn't: the items of a list, or of a list of lists where the argument is one."""
    if not isinstance(value, list | tuple) or (
        is_list and value and not any(isinstance(item, list | tuple) for item in value)
    ):
        return None
    if not value:
        wrong.append(f"{name}: an empty list leaves no run")
    if is_list and not all(isinstance(item, list | tuple) for item in value):
        wrong.append(f"{name}: some of its items are lists and some are not; a list of lists varies")
    elif not is_list and any(isinstance(item, list | tuple) for item in value):
        wrong.append(f"{name}: takes single values, not lists of them")
    return list(value)


def read_range(name: str, value: dict, whole: bool, wrong: list[str]) -> Range:
    """A range from {low, high, log}."""
    try:
        low, high = (int(value[end]) if whole else float(value[end]) for end in ("low", "high"))
        log = value.get("log", False)
        if (
            set(value) - {"low", "high", "log"}
            or not (low < high and math.isfinite(high - low))
            or not isinstance(log, bool)
            or (log and low <= 0)
        ):
            raise ValueError
    except (KeyError, ValueError, TypeError):
        wrong.append(
            f"{name}: a range has low and high, the first being the lesser one, and perhaps log: true with low above 0: {{low: 1e-5, high: 1e-2, log: true}}"
        )
        low, high, log = 0, 1, False
    return Range(name, low, high, log, whole)


def mappings(word: str, value: Any, wrong: list[str]) -> list[dict]:
    """One mapping or a list of them, as a list."""
    found = value if isinstance(value, list) else [value] if value is not None else []
    if not all(isinstance(item, dict) and item for item in found):
        wrong.append(f"{word}: must hold names with values, or be a list of such")
    return [item for item in found if isinstance(item, dict)]


def read(
    spec: dict[str, Any], lists: set[str], dicts: set[str], whole: set[str], seed: tuple[str, int], wrong: list[str]
) -> Grid:
    """The grid that a file's names and values describe. `lists`, `dicts` and `whole` are the arguments that hold lists, mappings and
    whole numbers; `seed` the name of the seed and its default. What is wrong is added to `wrong`."""
    fixed: dict[str, Any] = {}
    axes: list[Axis] = []
    spoken: dict[str, str] = {}  # name -> what varies it

    def claim(name: str, by: str) -> None:
        if spoken.get(name, by) != by:
            wrong.append(f"{name}: is varied by {spoken[name]} and by {by}; by one of them")
        spoken[name] = by

    def vary(name: str, value: Any, by: str) -> Axis | None:
        if isinstance(value, dict) and name not in dicts:
            claim(name, by)
            return read_range(name, value, name in whole, wrong)
        if (items := alternatives(name, value, name in lists, wrong)) is None:
            return None
        claim(name, by)
        return [Choice({name: item}, {name: item}) for item in items]

    for name, value in spec.items():
        if name in WORDS:
            continue
        axis = vary(name, value, "its own list")
        if axis is None:
            fixed[name] = value
        else:
            axes.append(axis)
    for number, zipped in enumerate(mappings("zip", spec.get("zip"), wrong), 1):
        columns = {name: alternatives(name, value, name in lists, wrong) for name, value in zipped.items()}
        if None in columns.values() or len({len(items) for items in columns.values()}) != 1:
            wrong.append(
                "zip: "
                + ", ".join(
                    f"{name} has {'no list' if items is None else len(items)}" for name, items in columns.items()
                )
                + "; lists that go together are of one length"
            )
            continue
        for name in zipped:
            claim(name, f"zip {number}")
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        axes.append([Choice(row, row) for row in rows])
    for number, groups in enumerate(mappings("groups", spec.get("groups"), wrong), 1):
        column, choices = "group" if number == 1 else f"group{number}", []
        for group, values in groups.items():
            if not isinstance(values, dict):
                wrong.append(f"groups: {group}: must hold names with values")
                continue
            parts: list[list[Choice]] = [[Choice({}, {column: str(group)})]]
            for name, value in values.items():
                axis = vary(name, value, f"groups {number}")
                if isinstance(axis, Range):
                    wrong.append(f"groups: {group}: {name}: a range stands outside of groups")
                    continue
                claim(name, f"groups {number}")
                parts.append(axis or [Choice({name: value}, {})])
            choices += [merged(row) for row in itertools.product(*parts)]
        axes.append(choices)
    if (seeds := spec.get("seeds")) is not None:
        name, first = seed
        if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
            start = fixed.get(name, first)
            seeds = [start + i for i in range(seeds)] if isinstance(start, int) else [start]
        if not isinstance(seeds, list) or not seeds:
            wrong.append("seeds: must be how many, or a list of them")
        else:
            claim(name, "seeds")
            axes.append([Choice({name: value}, {name: value}) for value in seeds])
    exclude = [
        {name: list(value) if isinstance(value, list) else [value] for name, value in item.items()}
        for item in mappings("exclude", spec.get("exclude"), wrong)
    ]
    named = {
        name
        for axis in axes
        for name in (
            [axis.name]
            if isinstance(axis, Range)
            else [key for choice in axis for key in (*choice.values, *choice.told)]
        )
    }
    for item in exclude:
        if unknown := [name for name in item if name not in named and name not in fixed]:
            wrong.append(f"exclude: {', '.join(unknown)}: not in this grid")
    return Grid(fixed, axes, exclude)


def merged(choices: tuple[Choice, ...]) -> Choice:
    """Several choices as one."""
    return Choice(
        {k: v for choice in choices for k, v in choice.values.items()},
        {k: v for choice in choices for k, v in choice.told.items()},
    )


# ---------------------------------------------------------------------------------------------------------------------
# points


def excluded(point: Point, item: dict[str, list], normal: Callable[[str, Any], Any]) -> bool:
    """Whether a point has, for every name of the item, one of its values; `normal(name, value)` makes equal values equal."""
    has = {**point.told, **point.values}
    return all(
        name in has and normal(name, has[name]) in [normal(name, value) for value in values]
        for name, values in item.items()
    )


def product(grid: Grid, normal: Callable[[str, Any], Any], wrong: list[str]) -> list[Point]:
    """All points of a grid without ranges, in order, the last axis the fastest."""
    if ranges := [axis.name for axis in grid.axes if isinstance(axis, Range)]:
        wrong.append(f"{', '.join(ranges)}: a range needs --search=random:N or --search=tpe:N")
        return []
    if math.prod(len(axis) for axis in grid.axes) > MOST:
        wrong.append(f"the grid has {math.prod(len(axis) for axis in grid.axes):,} points; at most {MOST:,}")
        return []
    points = [
        Point({**grid.fixed, **choice.values}, choice.told) for choice in map(merged, itertools.product(*grid.axes))
    ]
    for item in grid.exclude:
        if points and not any(excluded(point, item, normal) for point in points):
            wrong.append(f"exclude: {json.dumps(item)[1:-1]}: no run is like this")
    return [point for point in points if not any(excluded(point, item, normal) for item in grid.exclude)]


def place(grid: Grid, places: list[float]) -> Point:
    """The point at places from 0 to 1, one for each axis."""
    choice = merged(
        tuple(
            axis.at(at) if isinstance(axis, Range) else axis[min(int(at * len(axis)), len(axis) - 1)]
            for axis, at in zip(grid.axes, places, strict=True)
        )
    )
    return Point({**grid.fixed, **choice.values}, choice.told)


def sample(grid: Grid, count: int, seed: int, normal: Callable[[str, Any], Any]) -> list[Point]:
    """`count` different points at random, or as many as there are; the first of more are those of fewer."""
    points: dict[str, Point] = {}
    for attempt in itertools.count():
        draw = random.Random(f"{seed} {attempt}")
        point = place(grid, [draw.random() for _ in grid.axes])
        if not any(excluded(point, item, normal) for item in grid.exclude):
            points.setdefault(json.dumps(point.values, default=str), point)
        if len(points) == count or attempt > 100 * count + 1000:
            return list(points.values())


def corners(grid: Grid) -> Iterator[Point]:
    """Points at both ends of each range and at every alternative, one axis moved at a time."""
    yield place(grid, [0.0] * len(grid.axes))
    for i, axis in enumerate(grid.axes):
        for at in (0.0, 1.0) if isinstance(axis, Range) else [(k + 0.5) / len(axis) for k in range(len(axis))]:
            yield place(grid, [at if j == i else 0.0 for j in range(len(grid.axes))])


# ---------------------------------------------------------------------------------------------------------------------
# names

LONGEST = 120  # characters of a name without its hash


def label(told: dict[str, Any], aliases: dict[str, str]) -> str:
    """What varies, fit to be a folder's name on any file system: of a path the last part alone, other characters as _."""

    def safe(value: Any) -> str:
        words = format_value(value)
        return re.sub(r"[^A-Za-z0-9.+=_-]", "_", words.rstrip("/").rpartition("/")[2] or words)

    parts = [
        safe(value) if name.startswith("group") else f"{aliases.get(name, safe(name))}={safe(value)}"
        for name, value in told.items()
    ]
    return ",".join(parts)[:LONGEST].lstrip(".-")


def fingerprint(arguments: dict[str, Any]) -> str:
    """Six hexadecimal digits of the hash of all arguments."""
    return hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode()).hexdigest()[:6]
