"""An argument table becomes a command line, config files and checks.

Knows no argument by name and imports no torch, so that every mistake is told, all at once and by flag, before the slow imports.
A table is {group title: [Row, ...]}. Values come in layers, the later the stronger: the table's defaults, what follows from other
arguments, a layer beneath (the run that is resumed), config files from left to right, the command line.

A config file is `.py` (plain assignments of literals and arithmetic, read with `ast` and never executed), `.json` or `.yaml`.
"""

import argparse
import ast
import dataclasses
import itertools
import json
import math
import operator
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge.errors import UserError, did_you_mean


class OnlyWith(NamedTuple):
    """When an argument has an effect: told as `words`, tested by `holds(arguments)`."""

    words: str
    holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Row:
    """One argument. Its type is that of its default; a tuple default means a list of `item` values, a dict JSON text."""

    name: str
    default: Any
    help: str
    choices: tuple = ()
    low: float = -math.inf  # smallest value allowed
    above: float = -math.inf  # every value must be larger than this
    high: float = math.inf
    item: type = str  # of a list's items
    split: bool = True  # whether a list's words are split at spaces and commas
    needs: OnlyWith | None = None
    shape: bool = False  # fixes the model's shape: comes with loaded weights, can't change on resume
    once: bool = False  # meant for this command alone: a resumed run does not inherit it
    alias: str = ""  # another name, on the command line and in config files


COMMAND_LINE = "command line"  # where a value came from
CONFIG_SUFFIXES = (".py", ".json", ".yaml", ".yml")
TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


# ---------------------------------------------------------------------------------------------------------------------
# one value


def number(text: Any, kind: type) -> int | float:
    """An int or a float from text such as 3500, 1e6 or 3e-4. Raises ValueError."""
    if isinstance(text, bool):
        raise ValueError
    if kind is int:
        try:
            return int(text) if isinstance(text, str) else operator.index(text)
        except (ValueError, TypeError):
            pass  # 1e6 is a whole number too
    value = float(text)
    if not math.isfinite(value) or (kind is int and value != int(value)):
        raise ValueError
    return kind(value)


def convert(row: Row, given: Any) -> Any:
    """The row's value from what a command line (text) or a file (anything) gave. Raises UserError with the reason."""
    kind = type(row.default)
    if kind is tuple:
        items = given if isinstance(given, list | tuple) else [given]
        words = [
            word
            for item in items
            for word in (item.replace(",", " ").split() if isinstance(item, str) and row.split else [item])
        ]
        one = dataclasses.replace(row, default=row.item())
        return tuple(convert(one, word) for word in words)
    if kind is dict:
        try:
            value = json.loads(given) if isinstance(given, str) else given
        except json.JSONDecodeError as error:
            raise UserError(f"not JSON ({error})") from None
        if not isinstance(value, dict):
            raise UserError('must be a JSON object such as {"eps": 1e-10}')
        return value
    if kind is bool:
        word = str(given).lower()
        if word not in TRUE + FALSE:
            raise UserError("must be true or false")
        return word in TRUE
    if kind in (int, float):
        try:
            value = number(given, kind)
        except (ValueError, TypeError, OverflowError):
            raise UserError("must be a whole number" if kind is int else "must be a number") from None
        if value < row.low:
            raise UserError(f"must be at least {row.low:g}")
        if value <= row.above:
            raise UserError(f"must be above {row.above:g}")
        if value > row.high:
            raise UserError(f"must be at most {row.high:g}")
        return value
    if isinstance(given, list | tuple | dict | bool) or given is None:
        raise UserError("must be text")
    value = str(given)
    if row.choices and value not in row.choices:
        raise UserError(f"must be one of {', '.join(row.choices)}{did_you_mean(value, row.choices)}")
    return value


def show(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# config files

ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


def evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of a literal, of arithmetic, of an earlier name, or of str(...) and time.time(). Raises ValueError."""
    match node:
        case ast.Constant(str() | int() | float() | None as value):  # True and False are ints
            return value
        case ast.Name(name) if name in names:
            return names[name]
        case ast.List(items) | ast.Tuple(items):
            return [evaluate(item, names) for item in items]
        case ast.Dict(keys, values) if all(keys):
            return {str(evaluate(key, names)): evaluate(value, names) for key, value in zip(keys, values, strict=True)}
        case ast.UnaryOp(op, operand) if type(op) in ARITHMETIC:
            return ARITHMETIC[type(op)](evaluate(operand, names))
        case ast.BinOp(left, ast.Pow(), right):
            base, power = evaluate(left, names), evaluate(right, names)
            if not all(isinstance(x, int | float) for x in (base, power)) or abs(power) > 64 or abs(base) > 2**32:
                raise ValueError("a power this large is not taken")
            return base**power
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            sides = evaluate(left, names), evaluate(right, names)
            if not all(isinstance(side, int | float) for side in sides) and not (
                type(op) is ast.Add and all(isinstance(side, str) for side in sides)
            ):
                raise ValueError("only numbers are computed with, and text added to text")
            return ARITHMETIC[type(op)](*sides)
        case ast.Call(ast.Name("str"), [argument], []):
            return str(evaluate(argument, names))
        case ast.Call(ast.Attribute(ast.Name("time"), "time"), [], []):
            return time.time()  # nanoGPT's finetune config names its run so
    raise ValueError("only literals and arithmetic are read, nothing is executed")


def read_python(text: str, path: str) -> dict[str, Any]:
    """The assignments of a Python config, in order. Raises UserError with the line."""
    values: dict[str, Any] = {}
    try:
        body = ast.parse(text, path).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: not a Python config ({error})") from None
    for statement in body:
        try:
            match statement:
                case ast.Expr(ast.Constant(str())) | ast.Import([ast.alias("time")]):
                    continue  # the docstring, and what time.time() needs
                case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), value=value) if (
                    value is not None
                ):
                    values[name] = evaluate(value, values)
                case ast.Assign([ast.Tuple(targets)], ast.Tuple(items)) if len(targets) == len(items):
                    values |= {target.id: evaluate(item, values) for target, item in zip(targets, items, strict=True)}
                case _:
                    raise ValueError("only `name = value` lines are read")
        except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{path}:{statement.lineno}: {error}") from None
    return values


def read_file(path: str) -> dict[str, Any]:
    """The values of one config file; names that begin with an underscore are remarks. Raises UserError."""
    kind = Path(path).suffix
    if kind not in CONFIG_SUFFIXES:
        raise UserError(f"{path}: not an argument and not a config file (.py, .json, .yaml)")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    if kind == ".py":
        values = read_python(text, path)
    elif kind == ".json":
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error})") from None
    else:
        try:
            import yaml
        except ModuleNotFoundError:
            raise UserError(f"{path}: reading YAML needs a package: pip install pyyaml") from None
        try:
            values = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not YAML ({error})".replace("\n", " ")) from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold names with values")
    return {str(name): value for name, value in values.items() if not str(name).startswith("_")}


# ---------------------------------------------------------------------------------------------------------------------
# the command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def build_parser(table: dict[str, list[Row]], description: str) -> Parser:
    """argparse for the table: it knows the grammar and the help; values stay text, for `convert`."""
    parser = Parser(
        usage="%(prog)s [CONFIG ...] [--key=value | --key value | --flag | --no-flag ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.I)  # also -1e-4
    parser.add_argument(
        "--config_path",
        action="append",
        metavar="CONFIG",
        default=argparse.SUPPRESS,
        help="a config file, as without this word",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print every argument, its value and where it came from, and stop"
    )
    for title, rows in table.items():
        group = parser.add_argument_group(title)
        for row in rows:
            kind = type(row.default)
            says = f"{row.help} (default: {show(row.default) or 'none'})".replace("%", "%%")
            common: dict[str, Any] = {"dest": row.name, "default": argparse.SUPPRESS}
            if kind is bool:
                group.add_argument(f"--{row.name}", nargs="?", const="true", metavar="BOOL", help=says, **common)
                group.add_argument(
                    f"--no-{row.name}", action="store_const", const="false", help=argparse.SUPPRESS, **common
                )
            else:
                metavar = (
                    "{" + ",".join(row.choices) + "}"
                    if row.choices
                    else (row.item if kind is tuple else kind).__name__.upper()
                )
                group.add_argument(
                    f"--{row.name}",
                    *([f"--{row.alias}"] if row.alias else []),
                    nargs="*" if kind is tuple else "?",
                    metavar=metavar,
                    help=says,
                    **common,
                )
    return parser


def read_command_line(parser: Parser, rows: dict[str, Row], argv: list[str]) -> tuple[dict, list[str], bool, list[str]]:
    """(values as given, config files, whether to print the config, mistakes)."""
    joined = []
    for word, following in itertools.pairwise([*argv, ""]):
        bare = word.startswith("--") and isinstance(getattr(rows.get(word[2:]), "default", None), bool)
        # a bare flag takes the next word only if that is a boolean: in `--compile configs/a.py` it is not
        joined.append(f"{word}=true" if bare and following.lower() not in TRUE + FALSE else word)
    mistakes = []
    given, rest = parser.parse_known_args(joined)
    given = vars(given)
    print_config = given.pop("print_config")
    files = [*given.pop("config_path", []), *(word for word in rest if not word.startswith("-"))]
    for name, words in given.items():  # a config file behind a list is not part of it
        if isinstance(words, list) and rows[name].split:
            files += [word for word in words if word.endswith(CONFIG_SUFFIXES)]
            given[name] = [word for word in words if not word.endswith(CONFIG_SUFFIXES)]
    for name in [name for name, value in given.items() if value is None or value == []]:
        mistakes.append(f"--{name}: needs a value")
        del given[name]
    for word in (word for word in rest if word.startswith("-")):
        flag = word.split("=")[0]
        known = [f"--{name}" for name in rows] + [f"--no-{name}" for name in rows]
        mistakes.append(f"{flag}: no such argument{did_you_mean(flag, known)}")
    return given, files, print_config, mistakes


class Layers:
    """Values laid over each other, where each came from, and what is wrong with them."""

    def __init__(self, rows: dict[str, Row]):
        self.rows, self.mistakes = rows, []
        self.aliases = {row.alias: row.name for row in rows.values() if row.alias}
        self.values = {name: row.default for name, row in rows.items()}
        self.source = dict.fromkeys(rows, "default")

    def lay(self, origin: str, layer: dict[str, Any]) -> None:
        """Lay values, as given, over those there are."""
        label = "" if origin == COMMAND_LINE else f"{origin}: "
        for name, given in layer.items():
            name = self.aliases.get(name, name)
            if name not in self.rows:
                self.mistakes.append(f"{label}{name}: no such argument{did_you_mean(name, self.rows)}")
                continue
            try:
                self.values[name], self.source[name] = convert(self.rows[name], given), origin
            except UserError as mistake:
                self.mistakes.append(f"{label}--{name}={given}: {mistake}")

    def lay_beneath(self, origin: str, layer: dict[str, Any]) -> None:
        """Lay a resumed run's values between the defaults and what was given, which must keep the model's shape."""
        stronger = {
            name: (self.values[name], self.source[name]) for name in self.rows if self.source[name] != "default"
        }
        self.lay(
            origin, {name: value for name, value in layer.items() if name not in self.rows or not self.rows[name].once}
        )
        for name, (value, source) in stronger.items():
            if self.rows[name].shape and value != self.values[name]:
                self.mistakes.append(
                    f"--{name}={show(value)}: the run in {origin} has {show(self.values[name])}, and its shape can't change on resume"
                )
            self.values[name], self.source[name] = value, source


class Resolved(NamedTuple):
    """Arguments from layers of values."""

    arguments: Any  # None where a layer could not be read
    source: dict[str, str]  # of each argument: where its value came from
    mistakes: list[str]
    unused: list[str]  # given, but without effect beside the others
    followed: list[str]  # given by nobody: they follow from others


def resolve(
    table: dict[str, list[Row]],
    given: list[tuple[str, dict[str, Any]]],
    base: type = object,
    beneath: Callable[[Any], str | None] = lambda arguments: None,
    follows: Callable[[Any, dict[str, str]], tuple[str, dict[str, Any]]] = lambda arguments, source: ("", {}),
    check: Callable[[Any, dict[str, str]], list[str]] = lambda arguments, source: [],
) -> Resolved:
    """Frozen arguments from layers of values as `given` by (origin, values), the later the stronger. Prints nothing and ends nothing.

    `base` gives the arguments their derived properties; `beneath(arguments)` names a config file that lies under the given
    ones; `follows(arguments, source)` has values, and a name for where they come from, of arguments that nothing else gave;
    `check(arguments, source)` returns further mistakes. `source` tells for each argument where its value came from.
    """
    rows = {row.name: row for group in table.values() for row in group}
    fields = [(name, type(row.default), dataclasses.field(default=None)) for name, row in rows.items()]
    arguments_class = dataclasses.make_dataclass("Arguments", fields, bases=(base,), frozen=True)
    layers = Layers(rows)
    values, source = layers.values, layers.source
    for origin, layer in given:
        layers.lay(origin, layer)
    try:
        lower = beneath(arguments_class(**values))
        if lower:
            layers.lay_beneath(lower, read_file(lower))
    except UserError as mistake:
        return Resolved(None, source, [*layers.mistakes, str(mistake)], [], [])
    origin, layer = follows(arguments_class(**values), source)
    followed = [name for name in layer if source[name] == "default"]
    layers.lay(origin, {name: layer[name] for name in followed})
    arguments = arguments_class(**values)
    unused = [
        name
        for name, row in rows.items()
        if row.needs and source[name] not in ("default", lower, origin) and not row.needs.holds(arguments)
    ]
    refused = [
        f"--{name}: has an effect only with {rows[name].needs.words}" for name in unused if source[name] == COMMAND_LINE
    ]
    return Resolved(arguments, source, [*layers.mistakes, *refused, *check(arguments, source)], unused, followed)


def parse(
    table: dict[str, list[Row]],
    argv: list[str],
    description: str,
    base: type = object,
    beneath: Callable[[Any], str | None] = lambda arguments: None,
    follows: Callable[[Any, dict[str, str]], tuple[str, dict[str, Any]]] = lambda arguments, source: ("", {}),
    check: Callable[[Any, dict[str, str]], list[str]] = lambda arguments, source: [],
) -> Any:
    """Frozen arguments from a table and a command line, as `resolve` makes them; tells all mistakes at once and exits with status 2."""
    rows = {row.name: row for group in table.values() for row in group}
    try:
        given, files, print_config, mistakes = read_command_line(build_parser(table, description), rows, argv)
    except UserError as mistake:
        tell([str(mistake)])
    layers = []
    for path in files:
        try:
            layers.append((path, read_file(path)))
        except UserError as mistake:
            mistakes.append(str(mistake))
    arguments, source, wrong, unused, followed = resolve(
        table, [*layers, (COMMAND_LINE, given)], base, beneath, follows, check
    )
    if mistakes + wrong:
        tell(mistakes + wrong)
    for name in unused:
        if getattr(arguments, name) != rows[name].default and os.environ.get("RANK", "0") == "0":
            print(
                f"{source[name]}: {name} is not used here; it has an effect only with {rows[name].needs.words}",
                file=sys.stderr,
            )
    if followed and not print_config and os.environ.get("RANK", "0") == "0":
        print(
            f"{source[followed[0]]} gives {' '.join(f'--{name}={show(getattr(arguments, name))}' for name in followed)}",
            file=sys.stderr,
        )
    if print_config:
        run(
            lambda _: print(
                "\n".join(f"{name:40} {show(getattr(arguments, name)):30} {source[name]}" for name in rows), flush=True
            ),
            None,
        )
        raise SystemExit(0)
    return arguments


def tell(mistakes: list[str]) -> None:
    """Print the mistakes (once, under torchrun) and exit with status 2."""
    prog = os.path.basename(sys.argv[0])
    if os.environ.get("RANK", "0") == "0":
        head = f"{prog}: " if len(mistakes) == 1 else f"{prog}: {len(mistakes)} mistakes\n  "
        print(head + "\n  ".join(mistakes), file=sys.stderr)
    raise SystemExit(2)


def run(main: Callable[[Any], Any], arguments: Any) -> None:
    """Run a command; a UserError that only the data or the weights could show is told like the others. Ctrl-C ends it without a
    traceback, and so does a reader of its output that went away."""
    try:
        main(arguments)
        sys.stdout.flush()
    except UserError as mistake:
        tell([str(mistake)])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
