"""The house rules that can be counted (CONTRIBUTING.md). What ruff and mypy check stands in pyproject.toml."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import ROOT

PRODUCT = sorted(
    path
    for pattern in (
        "*.py",
        "nanoforge/**/*.py",
        "benchmarks/**/*.py",
        "configs/*.py",
        "data/**/*.py",
        "docs/*.py",
    )
    for path in ROOT.glob(pattern)
)
# Findings of ruff's ANN001, FBT, PLR0913, PLR0915 and C901 in tests: a ratchet, which may only fall.
MOST_FINDINGS_IN_TESTS = {"ANN001": 717, "FBT001": 1, "FBT002": 0, "FBT003": 5, "PLR0913": 0, "PLR0915": 0, "C901": 0}


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_is_plain(path: Path) -> None:
    """Short functions of few parameters, and no crammed expressions."""
    tree = ast.parse(path.read_text())
    check_functions(path, tree)
    check_expressions(path, tree)


def check_functions(path: Path, tree: ast.AST) -> None:
    for function in functions(tree):
        place = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        assert function.end_lineno - function.lineno < 60, f"{place} has more than 60 lines"
        assert len(parameters(function)) <= 6, f"{place} has more than 6 parameters"


def check_expressions(path: Path, tree: ast.AST) -> None:
    for node in ast.walk(tree):
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.IfExp):
            inner = [part for part in ast.walk(node) if isinstance(part, ast.IfExp) and part is not node]
            assert not inner, f"{place}: a conditional expression inside another"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for text, factor in ((node.left, node.right), (node.right, node.left)):
                is_text = isinstance(text, ast.JoinedStr) or (
                    isinstance(text, ast.Constant) and isinstance(text.value, str)
                )
                is_condition = isinstance(factor, ast.Compare | ast.BoolOp) or (
                    isinstance(factor, ast.UnaryOp) and isinstance(factor.op, ast.Not)
                )
                assert not (is_text and is_condition), f"{place}: text times a condition"
        if isinstance(node, ast.Call):
            positional = [argument for argument in node.args if not isinstance(argument, ast.Constant)]
            assert len(positional) <= 6, f"{place}: a call with {len(positional)} positional arguments"


def test_private_words_are_gone():
    """Words that this project once used for everything; the field's terms say which thing is meant."""
    pattern = re.compile(r"\b(told|strange|mistakes?|must_)\b")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}" for path in PRODUCT for match in pattern.finditer(path.read_text())
    ]
    assert not found


def test_findings_in_tests_only_fall():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--target-version=py311", "--output-format=json"]
    command += ["--config=lint.pylint.max-args=6", f"--select={','.join(MOST_FINDINGS_IN_TESTS)}", str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True)
    counts = Counter(finding["code"] for finding in json.loads(done.stdout))
    assert {code: counts[code] for code, most in MOST_FINDINGS_IN_TESTS.items() if counts[code] > most} == {}
