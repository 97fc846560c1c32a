"""A typed table of arguments becomes a command line, config files and checks.

A table is a frozen dataclass. Each of its base classes is a group of `--help`, titled by its docstring; each field is
one argument:

    @arg_group
    class OptimizerArgs:
        '''optimizer'''
        learning_rate: float = arg(1e-3, "peak learning rate", low=0)

    @arg_table
    class TrainArgs(OptimizerArgs, ...): ...

Knows no argument by name and imports no torch: all errors are reported, at once and by flag, before the slow imports.
Values come in layers, the later the stronger: the table's defaults, values derived from other arguments, the resumed
run, config files from left to right, the command line.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import math
import operator
import os
import re
import signal
import sys
import time
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn, TypeVar

from nanoforge import config_files, console, launcher
from nanoforge.errors import UserError, did_you_mean

T = TypeVar("T")

COMMAND_LINE = "command line"  # sources of values, besides the paths of config files
DEFAULT = "default"
TRUE = ("true", "1", "yes", "on")
FALSE = ("false", "0", "no", "off")
MAX_NAME_BYTES = 255  # of a file or folder


# ---------------------------------------------------------------------------------------------------------------------
# the table


class OnlyWith(NamedTuple):
    """The condition under which an argument has an effect."""

    description: str
    holds: Callable[[Any], bool]  # of the arguments


def with_value(name: str, *values: str) -> OnlyWith:
    """Only with --name=value, for any of the values."""
    return OnlyWith(f"--{name}={'|'.join(values)}", lambda args: getattr(args, name) in values)


def with_set(name: str) -> OnlyWith:
    """Only with --name: true, not empty, not zero."""
    return OnlyWith(f"--{name}", lambda args: bool(getattr(args, name)))


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One argument. `kind` is the type of its value: str, int, float, bool, tuple (of `item`s) or dict (JSON)."""

    name: str
    kind: type
    item: type
    default: Any
    help: str
    choices: Collection[str] = ()
    value_hints: Mapping[str, str] | None = None  # choices of other programs -> what to use instead
    low: float = -math.inf  # smallest value allowed
    above: float = -math.inf  # every value must be larger than this
    high: float = math.inf  # largest value allowed
    units: Mapping[str, float] | None = None  # of a number that may be written with units: 90s, 1h30m, 20M
    split: bool = True  # a list is split at spaces and commas
    path: bool = False  # a leading ~ is a home folder
    needs: OnlyWith | None = None
    model_shape: bool = False  # fixes the model's shape: comes with loaded weights, can't change on resume
    val_loss: OnlyWith | None = None  # when val_loss depends on it, besides `needs`
    inherit: bool = True  # a resumed run takes the value of the run before
    alias: tuple[str, ...] = ()  # further names, on the command line and in config files

    @property
    def is_switch(self) -> bool:
        """Whether a bare --flag, --no-flag and all spellings of true and false are values."""
        return self.kind is bool or {"true", "false"} <= {*self.choices}


class ArgOptions(typing.TypedDict, total=False):
    """The fields of ArgSpec that a table may set."""

    choices: Collection[str]
    value_hints: Mapping[str, str]
    low: float
    above: float
    high: float
    units: Mapping[str, float]
    split: bool
    path: bool
    needs: OnlyWith
    model_shape: bool
    val_loss: OnlyWith
    inherit: bool
    alias: tuple[str, ...]


def arg(default: T, help: str, **options: typing.Unpack[ArgOptions]) -> T:
    """A field of a table; typed as its default, as dataclasses.field is."""
    metadata = {"help": help, **options}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=typing.cast(Callable[[], T], default.copy), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def arg_group(cls: type[T]) -> type[T]:
    """Marks a group of arguments. It has no methods of its own: only tables are instantiated."""
    return cls


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def arg_table(cls: type[T]) -> type[T]:
    """A frozen dataclass of the arguments of its groups, in their order, then its own. A repr would slow the start."""
    annotations: dict[str, Any] = {}
    for group in (*cls.__bases__, cls):
        annotations |= annotations_of(group)
    for name in annotations:
        if name not in cls.__dict__:
            setattr(cls, name, getattr(cls, name))  # the group's field
    cls.__annotations__ = annotations
    return dataclasses.dataclass(frozen=True, kw_only=True, repr=False)(cls)


def annotations_of(cls: type) -> dict[str, Any]:
    """Names and types of the fields of a class and its bases, the bases' first."""
    annotations: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        annotations |= inspect.get_annotations(base)
    return annotations


def spec_of(field: dataclasses.Field) -> ArgSpec:
    """The specification of a table's field."""
    kind: Any = typing.get_origin(field.type) or field.type
    item = typing.get_args(field.type)[0] if kind is tuple else str
    default = {} if kind is dict else field.default
    return ArgSpec(name=field.name, kind=kind, item=item, default=default, **field.metadata)


@functools.cache
def arg_specs(table: type) -> dict[str, ArgSpec]:
    """The arguments of a table by name, in the order of its groups."""
    return {spec.name: spec for specs in arg_groups(table).values() for spec in specs}


@functools.cache
def arg_groups(table: type) -> dict[str, list[ArgSpec]]:
    """The arguments of a table by group: those of its base classes, then its own. It may override a group's field."""
    specs = {field.name: spec_of(field) for field in dataclasses.fields(table)}
    groups: dict[str, list[ArgSpec]] = {}
    for group in (*table.__bases__, table):
        names = [name for name in annotations_of(group) if name in specs]
        if names:
            groups[(group.__doc__ or group.__name__).strip()] = [specs.pop(name) for name in names]
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# one value


def to_number(value: Any, kind: type) -> int | float:
    """A number from a number or from text such as 3500, 1e6 or 3e-4. Raises ValueError, TypeError, OverflowError."""
    if isinstance(value, bool):
        raise ValueError
    if kind is int:
        try:
            return int(value) if isinstance(value, str) else operator.index(value)
        except (ValueError, TypeError):
            pass  # 1e6 and 3.0 are whole numbers too: converted below
    number = float(value)
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise ValueError
    return kind(number)


def without_units(value: Any, units: Mapping[str, float]) -> Any:
    """The number that a text with units stands for: 1h30m, 20M; anything else as it is."""
    if not isinstance(value, str):
        return value
    parts = re.findall(r"([\d.]+)([a-z]+)", value.lower())
    if not parts or "".join(number + unit for number, unit in parts) != value.lower():
        return value
    if any(unit not in units for _, unit in parts):
        return value
    return sum(float(number) * units[unit] for number, unit in parts)


def convert_number(spec: ArgSpec, value: Any) -> int | float:
    """A number within the argument's bounds. Raises UserError."""
    units = spec.units or {}
    try:
        number = to_number(without_units(value, units), spec.kind)
    except (ValueError, TypeError, OverflowError):
        with_units = f", or one with units ({', '.join(units)})" if units else ""
        raise UserError(f"must be a {'whole ' if spec.kind is int else ''}number{with_units}") from None
    if number < spec.low:
        raise UserError(f"must be at least {spec.low:g}")
    if number <= spec.above:
        raise UserError(f"must be above {spec.above:g}")
    if number > spec.high:
        raise UserError(f"must be at most {spec.high:g}")
    return number


def convert_bool(value: Any) -> bool:
    """True or False from a bool or from text. Raises UserError."""
    text = str(value).lower()
    if text not in TRUE + FALSE:
        raise UserError("must be true or false")
    return text in TRUE


def convert_dict(value: Any) -> dict[str, Any]:
    """A dict from a dict or from JSON; braces of YAML are read too, as in a config file. Raises UserError."""
    if isinstance(value, str):
        value = config_files.read_value(value)
    if not isinstance(value, dict):
        raise UserError('must be a JSON object such as {"eps": 1e-10}')
    return value


def convert_tuple(spec: ArgSpec, value: Any) -> tuple:
    """The items of a list, or of text with spaces or commas between them. Raises UserError."""
    items: list[Any] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, str) and spec.split:
            items += item.replace(",", " ").split()
        else:
            items.append(item)
    item_spec = dataclasses.replace(spec, kind=spec.item)
    return tuple(convert(item_spec, item) for item in items)


def convert_text(spec: ArgSpec, value: Any) -> str:
    """Text, one of the argument's choices if it has any. Raises UserError."""
    text = str(value)
    if spec.is_switch and text.lower() in TRUE + FALSE:
        return str(convert_bool(text)).lower()
    if isinstance(value, list | tuple | dict | bool) or value is None:
        raise UserError("must be text")
    if spec.choices and text not in spec.choices:
        hint = (spec.value_hints or {}).get(text)
        suggestion = f"; {hint}" if hint else did_you_mean(text, spec.choices)
        raise UserError(f"must be one of {', '.join(spec.choices)}{suggestion}")
    return convert_path(text) if spec.path else text


def convert_path(text: str) -> str:
    """A path with ~ expanded, which shells don't do after an =. Raises UserError for what no file system allows."""
    path = os.path.expanduser(text)
    longest = max(len(name.encode(errors="surrogatepass")) for name in path.split(os.sep))
    if longest > MAX_NAME_BYTES:
        raise UserError(f"has a name of {longest} bytes; file systems allow {MAX_NAME_BYTES}, so choose a shorter one")
    if "\0" in path:
        raise UserError("must not have a null character")
    return path


def convert(spec: ArgSpec, value: Any) -> Any:
    """The argument's value from what a command line (text) or a config file (anything) has. Raises UserError."""
    if spec.kind is tuple:
        return convert_tuple(spec, value)
    if spec.kind is dict:
        return convert_dict(value)
    if spec.kind is bool:
        return convert_bool(value)
    if spec.kind in (int, float):
        return convert_number(spec, value)
    return convert_text(spec, value)


def format_arg(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# the command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors."""

    specs: Sequence[ArgSpec] = ()  # of its arguments

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class PrintHelp(argparse.Action):
    """--help, all of it, or --help TOPIC; a config file is no topic."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, topic: Any, option_string: Any = None) -> None:
        from nanoforge import help_pages  # here, since most command lines ask for no help

        whole = not topic or topic.endswith(config_files.SUFFIXES)
        print(parser.format_help() if whole else help_pages.topic_help(parser, topic), end="")
        raise SystemExit(0)


class PrintCompletion(argparse.Action):
    """--completion=SHELL."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, option_string: Any = None) -> None:
        from nanoforge.completion import SHELLS, Flag, script

        assert isinstance(parser, Parser)
        if shell not in SHELLS:
            raise UserError(f"{option_string}: must be one of {', '.join(SHELLS)}")
        flags = [
            Flag(spec.name, spec.help, tuple(spec.choices), is_switch=spec.is_switch, is_path=spec.path)
            for spec in parser.specs
        ]
        print(script(shell, sys.argv[0], flags), end="")
        raise SystemExit(0)


class CommandLine(NamedTuple):
    """A command line, read but not yet converted."""

    values: dict[str, Any]  # as typed: text, or a list of texts
    files: list[str]  # config files
    print_config: bool
    errors: list[str]


def metavar_of(spec: ArgSpec) -> str:
    """What stands for the value in --help."""
    if spec.kind is bool:
        return "BOOL"
    if spec.choices:
        return "{" + ",".join(spec.choices) + "}"
    return (spec.item if spec.kind is tuple else spec.kind).__name__.upper()


def help_of(spec: ArgSpec) -> str:
    """The text of --help: help, default, aliases."""
    text = f"{spec.help} (default: {format_arg(spec.default) or 'none'})"
    if spec.alias:
        text += f" (alias: {', '.join(spec.alias)})"
    return text.replace("%", "%%")


def add_argument(group: argparse._ArgumentGroup, spec: ArgSpec) -> None:
    """Add an argument and, hidden, its aliases and --no- forms to argparse; values stay text."""
    options: dict[str, Any] = {"dest": spec.name, "default": argparse.SUPPRESS, "metavar": metavar_of(spec)}
    options["nargs"] = "*" if spec.kind is tuple else "?"
    if spec.is_switch:
        options["const"] = "true"
    group.add_argument(f"--{spec.name}", help=help_of(spec), **options)
    if spec.alias:
        group.add_argument(*(f"--{name}" for name in spec.alias), help=argparse.SUPPRESS, **options)
    if spec.is_switch:
        group.add_argument(
            *(f"--no-{name}" for name in (spec.name, *spec.alias)),
            dest=spec.name,
            default=argparse.SUPPRESS,
            action="store_const",
            const="false",
            help=argparse.SUPPRESS,
        )


def build_parser(groups: dict[str, list[ArgSpec]], description: str) -> Parser:
    """argparse for groups of arguments: it knows the grammar and the help; values stay text, for `convert`."""
    parser = Parser(
        usage="%(prog)s [CONFIG ...] [--key=value | --key value | --flag | --no-flag ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.specs = [spec for specs in groups.values() for spec in specs]
    parser._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.I)  # also -1e-4
    parser.add_argument(
        "--help",
        "-h",
        action=PrintHelp,
        nargs="?",
        metavar="TOPIC",
        default=argparse.SUPPRESS,
        help="print all arguments, or those of a group or a word: --help optimizer, --help lr",
    )
    parser.add_argument(
        "--completion",
        action=PrintCompletion,
        metavar="SHELL",
        default=argparse.SUPPRESS,
        help="print a script for bash, zsh or fish, then exit",
    )
    parser.add_argument(
        "--config_path",
        action="append",
        metavar="CONFIG",
        default=argparse.SUPPRESS,
        help="config file (same as a positional CONFIG)",
    )
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="print every argument with its value and the source of the value, then exit",
    )
    for title, specs in groups.items():
        group = parser.add_argument_group(title)
        for spec in specs:
            add_argument(group, spec)
    parser.epilog = f"groups: {', '.join(title.partition(' (')[0] for title in groups)}"
    return parser


def join_bare_flags(argv: list[str], switches: Mapping[str, Collection[str]]) -> list[str]:
    """argv with a bare `--flag` as `--flag=true`, so that the file in `--compile c.py` is not taken for its value.

    switches: flag -> values that it has besides true and false.
    """
    joined = []
    for text, following in itertools.pairwise([*argv, ""]):
        is_bare = text in switches and following.lower() not in (*TRUE, *FALSE, *switches[text])
        joined.append(f"{text}=true" if is_bare else text)
    return joined


def unknown_argument(name: str, known: Iterable[str], hints: dict[str, str]) -> str:
    """The error for a name that is no argument; `hints` say what to use instead of names that other programs have."""
    bare = name.lstrip("-").removeprefix("no-")
    if name in HYDRA_FLAGS:
        return f"{name}: not an argument here; {HYDRA_FLAGS[name]}"
    if bare in hints:
        return f"{name}: not an argument here; {hints[bare]}"
    return f"{name}: no such argument{similar_argument(name, known)}"


def similar_argument(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the argument that a name stands for in other programs, or that is most similar."""
    from nanoforge import other_names  # here, since few command lines need them
    from nanoforge.sweeps import hf_keys

    return other_names.similar_argument(name, known, hf_keys.argument_of_key(name.removeprefix("--")))


HYDRA_FLAGS = {
    **dict.fromkeys(("--multirun", "-m"), "a grid of runs is sweep.py's (docs/sweeps.md)"),
    **dict.fromkeys(("--cfg", "-c", "--info"), "use --print_config"),
    **dict.fromkeys(("--config-name", "-cn", "--config-path", "-cp"), "write the path of a config file"),
}
HYDRA_OVERRIDE = re.compile(r"[+~]{0,2}(?P<key>[A-Za-z_][\w.@/-]*)=(?P<value>.*)", re.DOTALL)


def split_rest(rest: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(files, unknown flags, key=value texts) of what argparse left. Other text after an unknown flag is its value."""
    files = []
    flags = []
    overrides = []
    for previous, text in itertools.pairwise(["", *rest]):
        is_file = text.endswith(config_files.SUFFIXES)
        if text.startswith("-"):
            flags.append(text.split("=")[0])
        elif not is_file and HYDRA_OVERRIDE.fullmatch(text):
            overrides.append(text)
        elif is_file or "=" in previous or not (previous.startswith("--") or previous in HYDRA_FLAGS):
            files.append(text)
    return files, flags, overrides


def hydra_override(text: str, names: Mapping[str, ArgSpec], hints: Mapping[str, str]) -> str:
    """The error for an override in Hydra's syntax: the flag, the config file or the command that says it here."""
    match = HYDRA_OVERRIDE.fullmatch(text)
    assert match is not None
    name, value = match["key"].rpartition(".")[2], match["value"]
    spec = names.get(name)
    if spec is not None and "," in value and spec.kind is not tuple:
        return f"{text}: write several values as a grid, {spec.name}: [{value}], for sweep.py"
    if spec is not None and (not spec.choices or value in spec.choices):
        return f"{text}: write --{spec.name}={value}"
    config = find_config(value)
    if config:
        return f"{text}: write {config}, which is a config file"
    if spec is not None:
        return f"{text}: write --{spec.name}=VALUE, one of {', '.join(spec.choices)}"
    if name in hints:
        return f"{text}: not an argument here; {hints[name]}"
    suggestion = similar_argument(name, names)
    return f"{text}: not an argument and not a config file; write --key=value, or the file's path{suggestion}"


def find_config(name: str) -> str | None:
    """The config file of that name in the folder configs, as Hydra finds one in a group."""
    if re.fullmatch(r"[\w-]+", name) is None:
        return None
    paths = [path for suffix in config_files.SUFFIXES for path in sorted(Path("configs").rglob(name + suffix))]
    return str(paths[0]) if paths else None


def read_command_line(
    parser: Parser, specs: dict[str, ArgSpec], argv: list[str], hints: dict[str, str] | None = None
) -> CommandLine:
    """Read a command line with argparse. Raises UserError where argparse can't."""
    names = {name: spec for spec in specs.values() for name in (spec.name, *spec.alias)}
    switches = {f"--{name}": spec.choices for name, spec in names.items() if spec.is_switch}
    namespace, rest = parser.parse_known_args(join_bare_flags(argv, switches))
    values = vars(namespace)
    print_config = values.pop("print_config")
    files = values.pop("config_path", [])
    more_files, unknown_flags, overrides = split_rest(rest)
    files += more_files
    for name, items in values.items():
        if isinstance(items, list) and specs[name].split:  # a config file after a list is not one of its items
            files += [item for item in items[1:] if item.endswith(config_files.SUFFIXES)]
            values[name] = items[:1] + [item for item in items[1:] if not item.endswith(config_files.SUFFIXES)]
    empty = [name for name, value in values.items() if value is None or value == []]
    errors = [f"--{name}: needs a value" for name in empty]
    values = {name: value for name, value in values.items() if name not in empty}
    known = [f"--{name}" for name in names] + [f"--no-{name}" for name in names]
    errors += [unknown_argument(flag, known, hints or {}) for flag in unknown_flags]
    errors += [hydra_override(text, names, hints or {}) for text in overrides]
    return CommandLine(values, files, print_config, errors)


# ---------------------------------------------------------------------------------------------------------------------
# layers of values


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a command knows of its arguments beyond their table.

    locate(layers): the layers with what follows from where their files lie.
    resumed_config(args): path of the config of the run that is resumed, if any. May raise UserError.
    derive(args, source): what values are derived from, and the values, for arguments that are not set.
    check(args, source): the errors of arguments that conflict.
    hints: names of other programs that mean something else here -> what to use instead.
    `source` maps each argument to where its value came from.
    """

    locate: Callable[[list[tuple[str, dict[str, Any]]]], list[tuple[str, dict[str, Any]]]] = list
    resumed_config: Callable[[Any], str | None] = lambda args: None
    derive: Callable[[Any, dict[str, str]], tuple[str, dict[str, Any]]] = lambda args, source: ("", {})
    check: Callable[[Any, dict[str, str]], Iterable[str]] = lambda args, source: ()
    hints: dict[str, str] = dataclasses.field(default_factory=dict)


class Layers:
    """Values applied over each other, the source of each, and the errors found on the way."""

    def __init__(self, specs: dict[str, ArgSpec], hints: dict[str, str]) -> None:
        self.specs = specs
        self.hints = hints
        self.errors: list[str] = []
        self.refused: dict[str, str] = {}  # argument -> the error of its value, unless a stronger layer has another
        self.remarks: list[str] = []
        self.names = {name: spec.name for spec in specs.values() for name in (spec.name, *spec.alias)}
        self.values = {name: spec.default for name, spec in specs.items()}
        self.source = dict.fromkeys(specs, DEFAULT)

    def apply(self, source: str, values: dict[str, Any]) -> None:
        """Set values, as typed or read, over those set before. The record of a run may be of another version."""
        prefix = "" if source == COMMAND_LINE else f"{source}: "
        self.errors += [prefix + error for error in config_files.named_twice(values, self.names)]
        for alias, value in values.items():
            name = self.names.get(alias)
            if name is None and os.path.basename(source) == config_files.RECORD_FILE:
                self.remarks.append(f"{source}: {alias} is no argument of this version; it is not used")
                continue
            if name is None:
                self.errors.append(prefix + unknown_argument(alias, self.names, self.hints))
                continue
            self.refused.pop(name, None)
            try:
                self.values[name] = convert(self.specs[name], value)
                self.source[name] = source
            except UserError as error:
                self.refused[name] = f"{prefix}--{name}={value}: {error}"

    def apply_resumed(self, source: str, values: dict[str, Any]) -> None:
        """Set a resumed run's values where nothing is set yet; what is set must not change the model's shape."""
        stronger = {
            name: (value, self.source[name]) for name, value in self.values.items() if self.source[name] != DEFAULT
        }
        not_inherited = {name for name, spec in self.specs.items() if not spec.inherit}
        self.apply(source, {name: value for name, value in values.items() if name not in not_inherited})
        for name, (value, value_source) in stronger.items():
            resumed = self.values[name]
            self.refused.pop(name, None)
            if self.specs[name].model_shape and value != resumed:
                self.errors.append(
                    f"--{name}={format_arg(value)}: the run in {source} has {format_arg(resumed)}, "
                    "and the model's shape can't change on resume"
                )
            self.values[name] = value
            self.source[name] = value_source


class Resolved(NamedTuple):
    """Arguments made from layers of values."""

    args: Any  # an instance of the table; None where a file could not be read
    source: dict[str, str]  # argument -> where its value came from
    errors: list[str]
    unused: list[str]  # arguments that were set but have no effect with the others
    derived: list[str]  # arguments that were not set and follow from others
    remarks: list[str]  # what is in the record of a run and not used


def resolve(table: type, layers: list[tuple[str, dict[str, Any]]], rules: Rules | None = None) -> Resolved:
    """An instance of the table from layers of (source, values), the later the stronger. Prints nothing, never exits."""
    rules = rules or Rules()
    specs = arg_specs(table)
    state = Layers(specs, rules.hints)
    # 1. The values that were set.
    for source, values in rules.locate(layers):
        state.apply(source, values)
    # 2. Beneath them, the values of the resumed run.
    try:
        resumed = rules.resumed_config(table(**state.values))
        if resumed:
            state.apply_resumed(resumed, config_files.read_file(resumed))
    except UserError as error:
        errors = [*state.errors, *state.refused.values(), str(error)]
        return Resolved(args=None, source=state.source, errors=errors, unused=[], derived=[], remarks=[])
    # 3. Beneath these, the values that follow from others.
    derived_from, values = rules.derive(table(**state.values), state.source)
    derived = [name for name in values if state.source[name] == DEFAULT]
    state.apply(derived_from, {name: values[name] for name in derived})
    # 4. What is wrong with them. A config file may have values without effect, a command line may not.
    args = table(**state.values)
    not_set = (DEFAULT, resumed, derived_from)
    is_set = [spec for spec in specs.values() if state.source[spec.name] not in not_set]
    unused = [spec for spec in is_set if spec.needs and not spec.needs.holds(args)]
    errors = [*state.errors, *state.refused.values()]
    errors += [unused_argument(spec) for spec in unused if state.source[spec.name] == COMMAND_LINE]
    errors += rules.check(args, state.source)
    unused_names = [spec.name for spec in unused]
    return Resolved(
        args=args, source=state.source, errors=errors, unused=unused_names, derived=derived, remarks=state.remarks
    )


def unused_argument(spec: ArgSpec) -> str:
    """The error for an argument that is set but has no effect."""
    return f"--{spec.name}: has an effect only with {spec.needs.description if spec.needs else ''}"


# ---------------------------------------------------------------------------------------------------------------------
# a command


def parse(table: type[T], argv: list[str], description: str, rules: Rules | None = None) -> T:
    """An instance of the table from a command line; prints all errors at once and exits with status 2."""
    console.protect_console()
    table_type: type = table  # mypy does not take type[T] for a hashable
    specs = arg_specs(table_type)
    rules = rules or Rules()
    try:
        command_line = read_command_line(
            parser=build_parser(arg_groups(table_type), description), specs=specs, argv=argv, hints=rules.hints
        )
    except UserError as error:
        exit_with_errors([str(error)])
    errors = command_line.errors
    layers: list[tuple[str, dict[str, Any]]] = []
    for path in command_line.files:
        try:
            layers += config_files.read_layers(path)
        except UserError as error:
            errors.append(str(error))
    try:
        resolved = resolve(table, [*layers, (COMMAND_LINE, command_line.values)], rules)
    except OSError as error:  # of a path that can't be looked at
        exit_with_errors([*errors, describe_os_error(error)])
    errors += resolved.errors
    if errors:
        exit_with_errors(errors)
    if launcher.is_main_process():
        print_notes(specs, resolved, print_derived=not command_line.print_config)
    if command_line.print_config:
        run(print_config, resolved)
        raise SystemExit(0)
    return resolved.args


def print_notes(specs: dict[str, ArgSpec], resolved: Resolved, *, print_derived: bool) -> None:
    """Print to stderr which values of config files have no effect, and which values are derived."""
    for remark in resolved.remarks:
        print(remark, file=sys.stderr)
    for name in resolved.unused:
        spec = specs[name]
        if spec.needs and getattr(resolved.args, name) != spec.default:
            source = resolved.source[name]
            print(f"{source}: {name} is not used here: only with {spec.needs.description}", file=sys.stderr)
    if resolved.derived and print_derived:
        flags = [f"--{name}={format_arg(getattr(resolved.args, name))}" for name in resolved.derived]
        print(f"{resolved.source[resolved.derived[0]]} gives {' '.join(flags)}", file=sys.stderr)


def print_config(resolved: Resolved) -> None:
    """Print every argument, its value and where the value came from."""
    lines = [
        f"{name:40} {format_arg(getattr(resolved.args, name)):30} {source}" for name, source in resolved.source.items()
    ]
    print("\n".join(lines), flush=True)


def exit_with_errors(errors: list[str]) -> NoReturn:
    """Print the errors and exit with status 2.

    Under torchrun the main rank prints. The others wait: where it has the same errors it ends, and torchrun ends them;
    where only one of them has an error (its machine lacks a file) it prints.
    """
    if not launcher.is_main_process():
        time.sleep(launcher.SECONDS_FOR_MAIN_RANK)
    print_errors(errors)
    raise SystemExit(2)


def print_errors(errors: list[str]) -> None:
    """Print the errors after the program's name."""
    program = os.path.basename(sys.argv[0])
    head = f"{program}: " if len(errors) == 1 else f"{program}: {len(errors)} errors\n  "
    print(head + "\n  ".join(errors), file=sys.stderr, flush=True)


def run(main: Callable[[Any], Any], args: Any, *, output_is_required: bool = False) -> None:
    """Run a command. A UserError that only the data or the weights could show is reported like the others; Ctrl-C and a
    closed pipe end it without a traceback.

    output_is_required: stdout is what the command is run for; otherwise its failures end nothing.
    """
    console.protect_console(output_is_required=output_is_required)
    if signal.getsignal(signal.SIGINT) == exit_interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(args)
        sys.stdout.flush()
    except UserError as error:
        if error.is_reported is None:
            exit_with_errors([str(error)])
        if not error.is_reported:
            print_errors([str(error)])
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    except OSError as error:
        if not error.filename:
            raise
        exit_with_errors([describe_os_error(error)])


def describe_os_error(error: OSError) -> str:
    """The file that can't be read or written, and why."""
    return f"{error.filename}: {error.strerror}"


def exit_on_interrupt() -> None:
    """Let Ctrl-C end this process at once, without a traceback: during the seconds of the imports, until `run`."""
    signal.signal(signal.SIGINT, exit_interrupted)


def exit_interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """What Ctrl-C does before `run`: an exception could be caught by a module that is being imported."""
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)
