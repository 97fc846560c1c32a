"""Config files: `.py`, `.json` or `.yaml` -> names and values. Knows no argument by name and executes nothing.

A `.py` config holds plain assignments of literals and arithmetic, as nanoGPT's configs do; it is read with `ast`.
"""

import ast
import json
import operator
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanoforge.errors import UserError

SUFFIXES = (".py", ".json", ".yaml", ".yml")
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
        result[str(evaluate(key, names))] = evaluate(value, names)
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


def read_json(text: str, path: str) -> Any:
    """The value of a JSON text. Raises UserError."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def read_yaml(text: str, path: str) -> Any:
    """The value of a YAML text. Raises UserError."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading YAML needs a package: pip install pyyaml") from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML ({error})".replace("\n", " ")) from None


# ---------------------------------------------------------------------------------------------------------------------
# any of them


def read_file(path: str) -> dict[str, Any]:
    """The values of one config file; names that begin with an underscore are remarks. Raises UserError."""
    readers = {".py": read_python, ".json": read_json, ".yaml": read_yaml, ".yml": read_yaml}
    suffix = Path(path).suffix
    if suffix not in readers:
        raise UserError(f"{path}: not an argument and not a config file (.py, .json, .yaml)")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    values = readers[suffix](text, path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold names with values")
    return {str(name): value for name, value in values.items() if not str(name).startswith("_")}
