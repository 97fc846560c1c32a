"""A grid of runs: names with values, from a YAML file or a command line, become points.

    base: [configs/a.py]                          # config files underneath, left to right
    n_layer: 2                                    # the same in all runs
    learning_rate: [1e-4, 3e-4]                   # a list varies; the grid is the product of everything that varies
    dataset_list: [[a, b], [a, c]]                # an argument that holds a list varies over a list of lists
    zip: {n_embd: [64, 128], n_head: [2, 4]}      # these vary together; several zips: a list of them
    groups:                                       # named alternatives; several groups: a list of them
      small: {n_layer: 2}
      large: {n_layer: 4, dropout: [0, 0.1]}
    exclude: {n_embd: 128, learning_rate: 3e-4}   # leave out this combination (a list of values: any of them);
                                                  # several combinations: a list of them
    seeds: 3                                      # repeat every point with this many seeds; or a list of seeds
    weight_decay: {low: 0.01, high: 1, log: true} # a range, for --search

An axis is one thing that varies: a list of choices, or a range. A point takes one choice from each axis. `varying`
means, in all modules of sweeps, the values that tell a run from the others, by column of the table of runs.

Knows no argument by name and starts nothing.
"""

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nanoforge.console import format_value

SECTIONS = ("base", "zip", "groups", "exclude", "seeds")  # names in a grid file that are not arguments
MAX_POINTS = 100_000
MAX_LABEL_LENGTH = 120  # characters of a folder's name without its hash
RANGE_FORM = "a range is {low: 1e-5, high: 1e-2} with low below high, and optionally log: true with low above 0"


# ---------------------------------------------------------------------------------------------------------------------
# axes


class ArgumentTypes(NamedTuple):
    """What a grid has to know about the arguments: which names hold which type, and the argument that `seeds` sets."""

    lists: frozenset[str] = frozenset()  # one value of these is a list
    mappings: frozenset[str] = frozenset()  # one value of these is a mapping
    integers: frozenset[str] = frozenset()
    seed_name: str = "seed"
    default_seed: int = 0


class Choice(NamedTuple):
    """One alternative of an axis."""

    values: dict[str, Any]  # argument -> value
    varying: dict[str, Any]  # column -> what the table of runs shows


@dataclass(frozen=True)
class Range:
    """The numbers from low to high, from which a search draws; with `log` uniformly in their logarithm."""

    name: str
    low: float
    high: float
    log: bool = False
    is_integer: bool = False

    def at(self, fraction: float) -> Choice:
        """The number at a fraction of the way, 0 to 1."""
        if self.log:
            return self.choice(self.low * (self.high / self.low) ** fraction)
        return self.choice(self.low + fraction * (self.high - self.low))

    def choice(self, number: float) -> Choice:
        """A number of the range, rounded to three digits and kept between low and high."""
        rounded = round(number) if self.is_integer else float(f"{number:.3g}")
        clipped = type(rounded)(min(max(rounded, self.low), self.high))
        return Choice({self.name: clipped}, {self.name: clipped})


Axis = list[Choice] | Range


@dataclass(frozen=True)
class Point:
    """The values of one run, as they were written, and what tells it from the other runs."""

    values: dict[str, Any]
    varying: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """What a file or a command line describes: fixed values, axes, and combinations that are left out."""

    fixed: dict[str, Any]
    axes: list[Axis]
    exclude: list[dict[str, list]]  # each: argument or column -> excluded values

    @property
    def has_empty_axis(self) -> bool:
        return any(not isinstance(axis, Range) and not axis for axis in self.axes)

    def point(self, choices: Iterable[Choice]) -> Point:
        """The point that takes these choices, one from each axis."""
        choice = merge_choices(choices)
        return Point({**self.fixed, **choice.values}, choice.varying)


def merge_choices(choices: Iterable[Choice]) -> Choice:
    """Several choices as one."""
    merged = Choice({}, {})
    for choice in choices:
        merged.values.update(choice.values)
        merged.varying.update(choice.varying)
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# parsing: each function returns what it understood, and the errors


def parse_grid(spec: dict[str, Any], types: ArgumentTypes) -> tuple[Grid, list[str]]:
    """The grid that a file's names and values describe, and the errors in them."""
    fixed, list_axes, errors = parse_lists(spec, types)
    zip_axes, zip_errors = parse_zip(spec.get("zip"), types)
    group_axes, group_errors = parse_groups(spec.get("groups"), types)
    seed_axes, seed_errors = parse_seeds(spec.get("seeds"), fixed, types)
    axes: list[Axis] = [*list_axes, *zip_axes, *group_axes, *seed_axes]
    names = set(fixed)
    for axis in axes:
        names.update(argument_names(axis), column_names(axis))
    exclude, exclude_errors = parse_exclude(spec.get("exclude"), names)
    sources = [
        *(("its own list", axis) for axis in list_axes),
        *((f"zip {number}", axis) for number, axis in enumerate(zip_axes, 1)),
        *((f"groups {number}", axis) for number, axis in enumerate(group_axes, 1)),
        *(("seeds", axis) for axis in seed_axes),
    ]
    errors += [*zip_errors, *group_errors, *seed_errors, *exclude_errors, *varied_twice(sources)]
    return Grid(fixed, axes, exclude), errors


def parse_lists(spec: dict[str, Any], types: ArgumentTypes) -> tuple[dict[str, Any], list[Axis], list[str]]:
    """The arguments outside of sections: those with one value, and an axis for each list or range."""
    fixed: dict[str, Any] = {}
    axes: list[Axis] = []
    errors: list[str] = []
    for name, value in spec.items():
        if name in SECTIONS:
            continue
        axis, axis_errors = parse_axis(name, value, types)
        errors += axis_errors
        if axis is None:
            fixed[name] = value
        else:
            axes.append(axis)
    return fixed, axes, errors


def parse_axis(name: str, value: Any, types: ArgumentTypes) -> tuple[Axis | None, list[str]]:
    """The axis of one argument, or None if its value does not vary."""
    if isinstance(value, dict) and name not in types.mappings:
        return parse_range(name, value, is_integer=name in types.integers)
    items, errors = parse_items(name, value, holds_list=name in types.lists)
    if items is None:
        return None, errors
    return [Choice({name: item}, {name: item}) for item in items], errors


def parse_items(name: str, value: Any, *, holds_list: bool) -> tuple[list | None, list[str]]:
    """What a value varies over, or None if it does not vary.

    That is the items of a list; for an argument that holds a list, the items of a list of lists.
    """
    if not isinstance(value, list | tuple):
        return None, []
    n_lists = sum(isinstance(item, list | tuple) for item in value)
    if holds_list and value and n_lists == 0:
        return None, []
    errors = []
    if not value:
        errors.append(f"{name}: the list is empty, which leaves no run")
    if holds_list and n_lists != len(value):
        errors.append(f"{name}: mixes lists with single values; to vary it, write a list of lists")
    if not holds_list and n_lists:
        errors.append(f"{name}: takes single values, not lists of them")
    return list(value), errors


def parse_range(name: str, value: dict, *, is_integer: bool) -> tuple[Range, list[str]]:
    """A range {low, high, log}; after an error the range from 0 to 1, so that other errors are found too."""
    convert = int if is_integer else float
    try:
        low = convert(value["low"])
        high = convert(value["high"])
    except (KeyError, ValueError, TypeError, OverflowError):
        return Range(name, 0, 1, is_integer=is_integer), [f"{name}: {RANGE_FORM}"]
    log = value.get("log", False)
    is_valid = (
        value.keys() <= {"low", "high", "log"}
        and low < high
        and math.isfinite(high - low)
        and isinstance(log, bool)
        and not (log and low <= 0)
    )
    if not is_valid:
        return Range(name, 0, 1, is_integer=is_integer), [f"{name}: {RANGE_FORM}"]
    return Range(name, low, high, log=log, is_integer=is_integer), []


def as_mappings(section: str, value: Any) -> tuple[list[dict], list[str]]:
    """A section that holds one mapping or a list of them, as a list."""
    if value is None:
        return [], []
    items = value if isinstance(value, list) else [value]
    errors = []
    if not all(isinstance(item, dict) and item for item in items):
        errors.append(f"{section}: must map names to values, or be a list of such mappings")
    return [with_text_names(item) for item in items if isinstance(item, dict)], errors


def with_text_names(mapping: dict[Any, Any]) -> dict[str, Any]:
    """The mapping with every name as text; YAML also reads numbers and nothing as names."""
    return {str(name): value for name, value in mapping.items()}


def parse_zip(section: Any, types: ArgumentTypes) -> tuple[list[Axis], list[str]]:
    """Arguments that vary together: one axis for each mapping."""
    axes: list[Axis] = []
    mappings, errors = as_mappings("zip", section)
    for mapping in mappings:
        columns: dict[str, list] = {}
        lengths: dict[str, str] = {}
        for name, value in mapping.items():
            items, item_errors = parse_items(name, value, holds_list=name in types.lists)
            errors += item_errors
            columns[name] = items or []
            lengths[name] = "no list" if items is None else str(len(items))
        if "no list" in lengths.values() or len(set(lengths.values())) != 1:
            found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            errors.append(f"zip: {found}; all of them need lists of the same length")
            continue
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        axes.append([Choice(row, row) for row in rows])
    return axes, errors


def parse_groups(section: Any, types: ArgumentTypes) -> tuple[list[Axis], list[str]]:
    """Named alternatives: one axis for each mapping, with the group's name in a column of its own."""
    axes: list[Axis] = []
    mappings, errors = as_mappings("groups", section)
    for number, groups in enumerate(mappings, 1):
        column = "group" if number == 1 else f"group{number}"
        choices: list[Choice] = []
        for group, values in groups.items():
            if not isinstance(values, dict):
                errors.append(f"groups: {group}: must map names to values")
                continue
            group_axes, group_errors = parse_group(group, with_text_names(values), types)
            errors += group_errors
            named = [Choice({}, {column: group})]
            choices += [merge_choices(row) for row in itertools.product(named, *group_axes)]
        axes.append(choices)
    return axes, errors


def parse_group(group: str, values: dict[str, Any], types: ArgumentTypes) -> tuple[list[list[Choice]], list[str]]:
    """The choices of each argument in a group; a value that does not vary sets the argument and fills no column."""
    axes: list[list[Choice]] = []
    errors: list[str] = []
    for name, value in values.items():
        axis, axis_errors = parse_axis(name, value, types)
        errors += axis_errors
        if isinstance(axis, Range):
            errors.append(f"groups: {group}: {name}: a range is not possible in a group; move it out of groups")
        elif axis is None:
            axes.append([Choice({name: value}, {})])
        else:
            axes.append(axis or [Choice({name: value}, {})])
    return axes, errors


def parse_seeds(seeds: Any, fixed: dict[str, Any], types: ArgumentTypes) -> tuple[list[Axis], list[str]]:
    """An axis of seeds: a list of them, or how many to count up from the seed of the grid."""
    if seeds is None:
        return [], []
    name = types.seed_name
    first_seed = fixed.get(name, types.default_seed)
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        seeds = [first_seed + i for i in range(seeds)] if isinstance(first_seed, int) else [first_seed]
    elif isinstance(seeds, list) and name in fixed:
        return [], [f"seeds: lists the seeds, which leaves {name}={first_seed} without effect; remove one of them"]
    if not isinstance(seeds, list) or not seeds:
        return [], ["seeds: must be a number of seeds, or a list of them"]
    return [[Choice({name: seed}, {name: seed}) for seed in seeds]], []


def parse_exclude(section: Any, names: set[str]) -> tuple[list[dict[str, list]], list[str]]:
    """The combinations that are left out; every name must be one of the grid's arguments or columns."""
    exclude: list[dict[str, list]] = []
    mappings, errors = as_mappings("exclude", section)
    for mapping in mappings:
        exclude.append({name: value if isinstance(value, list) else [value] for name, value in mapping.items()})
        unknown = [name for name in mapping if name not in names]
        if unknown:
            errors.append(f"exclude: {', '.join(unknown)}: not in this grid")
    return exclude, errors


def argument_names(axis: Axis) -> list[str]:
    """The arguments that an axis sets."""
    if isinstance(axis, Range):
        return [axis.name]
    return list(dict.fromkeys(name for choice in axis for name in choice.values))


def column_names(axis: Axis) -> list[str]:
    """The columns that an axis fills."""
    if isinstance(axis, Range):
        return [axis.name]
    return list(dict.fromkeys(name for choice in axis for name in choice.varying))


def varied_twice(sources: list[tuple[str, Axis]]) -> list[str]:
    """An error for each argument that more than one section varies."""
    errors = []
    varied_by: dict[str, str] = {}
    for source, axis in sources:
        for name in argument_names(axis):
            if name in varied_by:
                errors.append(f"{name}: is varied by {varied_by[name]} and by {source}; keep one of them")
            varied_by[name] = source
    return errors


# ---------------------------------------------------------------------------------------------------------------------
# points

Canonical = Callable[[str, Any], Any]  # (name, value as written) -> a value that is equal for equal settings


def matches(point: Point, combination: dict[str, list], canonical: Canonical) -> bool:
    """Whether a point has, for every name of an excluded combination, one of its values."""
    present = {**point.varying, **point.values}
    for name, values in combination.items():
        if name not in present:
            return False
        if canonical(name, present[name]) not in [canonical(name, value) for value in values]:
            return False
    return True


def is_excluded(grid: Grid, point: Point, canonical: Canonical) -> bool:
    return any(matches(point, combination, canonical) for combination in grid.exclude)


def product(grid: Grid, canonical: Canonical) -> tuple[list[Point], list[str]]:
    """All points of a grid without ranges, the last axis varying fastest, and the errors."""
    # 1. Refuse what can't be enumerated.
    ranges = [axis.name for axis in grid.axes if isinstance(axis, Range)]
    if ranges:
        return [], [f"{', '.join(ranges)}: a range needs --search=random:N or --search=tpe:N"]
    axes = [axis for axis in grid.axes if not isinstance(axis, Range)]
    n_points = math.prod(len(axis) for axis in axes)
    if n_points > MAX_POINTS:
        return [], [f"the grid has {n_points:,} points; at most {MAX_POINTS:,} are possible"]
    # 2. The product, then the exclusions; one that matches nothing is probably a typing error.
    points = [grid.point(choices) for choices in itertools.product(*axes)]
    errors = [
        f"exclude: {json.dumps(combination)[1:-1]}: matches no run"
        for combination in grid.exclude
        if points and not any(matches(point, combination, canonical) for point in points)
    ]
    return [point for point in points if not is_excluded(grid, point, canonical)], errors


def point_at(grid: Grid, fractions: list[float]) -> Point:
    """The point at a fraction, 0 to 1, of the way along each axis."""
    choices = []
    for axis, fraction in zip(grid.axes, fractions, strict=True):
        if isinstance(axis, Range):
            choices.append(axis.at(fraction))
        else:
            choices.append(axis[min(int(fraction * len(axis)), len(axis) - 1)])
    return grid.point(choices)


def sample(grid: Grid, count: int, seed: int, canonical: Canonical) -> list[Point]:
    """`count` different random points, or all of a smaller grid. A larger count extends the points of a smaller one."""
    points: dict[str, Point] = {}
    for attempt in range(100 * count + 1002):
        rng = random.Random(f"{seed} {attempt}")
        point = point_at(grid, [rng.random() for _ in grid.axes])
        if not is_excluded(grid, point, canonical):
            points.setdefault(json.dumps(point.values, default=str), point)
        if len(points) == count:
            break
    return list(points.values())


def corners(grid: Grid) -> Iterator[Point]:
    """Points at both ends of each range and at every choice, with one axis moved at a time."""
    start = [0.0] * len(grid.axes)
    yield point_at(grid, start)
    for i, axis in enumerate(grid.axes):
        for fraction in fractions_of(axis):
            yield point_at(grid, [*start[:i], fraction, *start[i + 1 :]])


def fractions_of(axis: Axis) -> list[float]:
    """Both ends of a range, or a fraction that falls on each choice."""
    if isinstance(axis, Range):
        return [0.0, 1.0]
    return [(i + 0.5) / len(axis) for i in range(len(axis))]


# ---------------------------------------------------------------------------------------------------------------------
# names


def label(varying: dict[str, Any], short_names: dict[str, str]) -> str:
    """What varies, as a part of a folder's name that any file system accepts: `lr=3e-4,optimizer=muon`."""
    parts = []
    for name, value in varying.items():
        if name.startswith("group"):
            parts.append(safe_text(value))
        else:
            parts.append(f"{short_names.get(name, safe_text(name))}={safe_text(value)}")
    return ",".join(parts)[:MAX_LABEL_LENGTH].lstrip(".-")


def safe_text(value: Any) -> str:
    """A value in letters, digits and .+=_- alone, other characters as _; only the last part of a path."""
    text = format_value(value)
    last_part = text.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9.+=_-]", "_", last_part or text)


def fingerprint(arguments: dict[str, Any]) -> str:
    """Six hexadecimal digits of a hash of the arguments."""
    text = json.dumps(arguments, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:6]
