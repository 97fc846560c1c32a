"""Config files: `.py`, `.json` or `.yaml` -> names and values. Knows no argument by name and executes nothing.

A `.py` config holds plain assignments of literals and arithmetic, as nanoGPT's configs do; it is read with `ast`. A
config may stand on others, `base = "modern.py"`, whose values lie under its own.
"""

import ast
import functools
import json
import operator
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from nanoforge import files
from nanoforge.errors import UserError

SUFFIXES = (".py", ".json", ".yaml", ".yml")
RECORD_FILE = "train_config.json"  # in a run's folder and in its checkpoints: what the run is, and a config
MAX_EXPONENT = 64  # bounds on a ** b, whose result would otherwise take any time and memory
MAX_BASE = 2**32

BINARY_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY_OPERATORS: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}


# ---------------------------------------------------------------------------------------------------------------------
# .py


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def compute(op: ast.operator, left: Any, right: Any) -> Any:
    """`left op right` of two numbers, or of two strings that are joined. Raises ValueError."""
    if isinstance(op, ast.Add) and isinstance(left, str) and isinstance(right, str):
        return left + right
    if not (is_number(left) and is_number(right)):
        raise ValueError("arithmetic takes numbers only; strings can only be added")
    if isinstance(op, ast.Pow):
        if abs(right) > MAX_EXPONENT or abs(left) > MAX_BASE:
            raise ValueError("the power is too large")
        return left**right
    if type(op) not in BINARY_OPERATORS:
        raise ValueError(f"{type(op).__name__} is not supported")
    return BINARY_OPERATORS[type(op)](left, right)


def evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of a literal, of arithmetic, of an earlier name, or of str(...) and time.time(). Raises ValueError."""
    match node:
        case ast.Constant(str() | int() | float() | None as value):  # True and False are ints
            return value
        case ast.Name(name) if name in names:
            return names[name]
        case ast.List(items) | ast.Tuple(items):
            return [evaluate(item, names) for item in items]
        case ast.Dict(keys, values):
            return evaluate_dict(keys, values, names)
        case ast.UnaryOp(op, operand) if type(op) in UNARY_OPERATORS:
            return UNARY_OPERATORS[type(op)](evaluate(operand, names))
        case ast.BinOp(left, op, right):
            return compute(op, evaluate(left, names), evaluate(right, names))
        case ast.Call(ast.Name("str"), [argument], []):
            return str(evaluate(argument, names))
        case ast.Call(ast.Attribute(ast.Name("time"), "time"), [], []):
            return time.time()  # nanoGPT's finetune config names its run so
    raise ValueError("only literals and arithmetic are read; nothing is executed")


def evaluate_dict(keys: list[ast.expr | None], values: list[ast.expr], names: dict[str, Any]) -> dict[str, Any]:
    """The value of a dict literal; its keys become strings. Raises ValueError."""
    result: dict[str, Any] = {}
    for key, value in zip(keys, values, strict=True):
        if key is None:
            raise ValueError("a dict literal may not contain **")
        name = str(evaluate(key, names))
        if name in result:
            raise ValueError(f"duplicate key: {name}")
        result[name] = evaluate(value, names)
    return result


def read_assignment(statement: ast.stmt, names: dict[str, Any]) -> dict[str, Any]:
    """The names that one statement assigns, with their values. Raises ValueError."""
    match statement:
        case ast.Expr(ast.Constant(str())) | ast.Import([ast.alias("time")]):
            return {}  # the docstring, and what time.time() needs
        case ast.Assign([ast.Name(name)], value):
            return {name: evaluate(value, names)}
        case ast.AnnAssign(ast.Name(name), value=ast.expr() as value):
            return {name: evaluate(value, names)}
        case ast.Assign([ast.Tuple(targets)], ast.Tuple(items)) if len(targets) == len(items):
            pairs = zip(targets, items, strict=True)
            return {ast.unparse(target): evaluate(item, names) for target, item in pairs}
    raise ValueError("only `name = value` lines are read")


def read_python(text: str, path: str) -> dict[str, Any]:
    """The assignments of a Python config, in order. Raises UserError with the line."""
    try:
        body = ast.parse(text, path).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: not a Python config ({error})") from None
    values: dict[str, Any] = {}
    for statement in body:
        try:
            values |= read_assignment(statement, values)
        except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{path}:{statement.lineno}: {error}") from None
    return values


# ---------------------------------------------------------------------------------------------------------------------
# .json, .yaml


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object as a dict. Raises ValueError for a duplicate key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"duplicate key: {', '.join(duplicates)}")
    return values


def read_json(text: str, path: str) -> Any:
    """The value of a JSON text. Raises UserError."""
    try:
        return json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


# Scalars of YAML 1.2's core schema, without its hexadecimal and octal numbers, .inf and .nan: tag, pattern, first
# characters. PyYAML follows YAML 1.1, where 010 is 8, 1e-5 is text, 2:00:00 is 7200 and no is false.
NULL_AND_MERGE = (
    ("null", r"^(~|null|Null|NULL|None)?$", ["~", "n", "N", ""]),
    ("merge", r"^<<$", ["<"]),
)
BOOL_AND_NUMBERS = (
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9][0-9_]*$", list("-+0123456789")),
    ("float", r"^[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$", list("-+0123456789.")),
)
YAML_TAG = "tag:yaml.org,2002:"


@functools.cache
def yaml_loader(*, verbatim: bool) -> type:
    """A safe loader of YAML 1.2 that refuses duplicate keys; `verbatim`: scalars stay text, apart from null."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict] = {}

        def construct_mapping(self, node: Any, *args: Any, **kwargs: Any) -> dict:
            scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            names = [key.value for key in scalars if key.tag != f"{YAML_TAG}merge"]
            duplicates = sorted({name for name in names if names.count(name) > 1})
            if duplicates:
                raise ValueError(f"line {node.start_mark.line + 1}: duplicate key: {', '.join(duplicates)}")
            return super().construct_mapping(node, *args, **kwargs)

    for tag, pattern, first in NULL_AND_MERGE if verbatim else NULL_AND_MERGE + BOOL_AND_NUMBERS:
        Loader.add_implicit_resolver(YAML_TAG + tag, re.compile(pattern), first)
    if not verbatim:
        Loader.add_constructor(f"{YAML_TAG}int", lambda loader, node: int(node.value))
        Loader.add_constructor(f"{YAML_TAG}float", lambda loader, node: float(node.value))
    return Loader


def read_yaml(text: str, path: str, *, verbatim: bool = False) -> Any:
    """The value of a YAML 1.2 text; `verbatim`: scalars stay text, apart from null. Raises UserError."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading YAML requires a package: pip install pyyaml") from None
    try:
        return yaml.load(text, yaml_loader(verbatim=verbatim))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not YAML ({error})".replace("\n", " ")) from None


def read_value(text: str) -> Any:
    """The value of a flag that holds a list or a mapping: JSON, or YAML's form of it. Raises UserError."""
    try:
        return json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        message = f"not JSON ({error})"
    if text.lstrip()[:1] in ("{", "["):
        value = read_yaml(text, f"{message}, and as YAML")
        if not isinstance(value, dict) or None not in value.values():  # YAML reads {a} as a name without a value
            return value
    raise UserError(message)


# ---------------------------------------------------------------------------------------------------------------------
# any of them


def check_names(values: Any, path: str) -> dict[str, Any]:
    """The values of a file that maps names to values, without remarks: names that begin with `_`. Raises UserError."""
    if not isinstance(values, dict):
        raise UserError(f"{path}: must contain names with values")
    return {str(name): value for name, value in values.items() if not str(name).startswith("_")}


def named_twice(values: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """An error for each argument that stands under two of its names. `names` maps every name to the argument's."""
    used: dict[str, list[str]] = {}
    for name in values:
        used.setdefault(names.get(name, name), []).append(name)
    return [f"{' and '.join(aliases)}: one argument; keep one of them" for aliases in used.values() if len(aliases) > 1]


def read_file(path: str) -> dict[str, Any]:
    """The values of one config file, without those of its base. Raises UserError."""
    readers = {".py": read_python, ".json": read_json, ".yaml": read_yaml, ".yml": read_yaml}
    suffix = Path(path).suffix
    if suffix not in readers:
        raise UserError(f"{path}: not an argument and not a config file (.py, .json, .yaml)")
    return check_names(readers[suffix](files.read_text(Path(path)), path), path)


def find_base(base: Any, path: str) -> str:
    """The path of a config's base, which is relative to the config's folder or to the working one. Raises UserError."""
    if not isinstance(base, str):
        raise UserError(f"{path}: base must be the path of a config file, or a list of paths")
    for candidate in (os.path.join(os.path.dirname(path), base), base):
        if os.path.isfile(candidate):
            return candidate
    raise UserError(f"{path}: base {base}: no such file in the config's folder or in the working directory")


def read_layers(path: str, parents: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """A config file as layers of (path, values), the later the stronger: its bases (`base = "a.py"`), then itself.

    `parents` are the files whose base this is. Raises UserError, also where a file is its own base.
    """
    path = os.path.expanduser(path)
    real_path = os.path.realpath(path)
    if real_path in parents:
        cycle = " -> ".join(os.path.basename(parent) for parent in (*parents, real_path))
        raise UserError(f"{path}: is its own base: {cycle}")
    values = read_file(path)
    bases = values.pop("base", [])
    layers = []
    for base in bases if isinstance(bases, list) else [bases]:
        layers += read_layers(find_base(base, path), (*parents, real_path))
    return [*layers, (path, values)]
