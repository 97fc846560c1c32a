"""Answers graded by packages: reasoning-gym's own scorer of each task, and math-verify. Both are optional.

Text that a model wrote is never run: a task of reasoning-gym whose scorer would run it as Python code is refused.
"""

import ast
import functools
import inspect
import json
import logging
import re
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nanoforge.errors import UserError, did_you_mean

PACKAGES = {"reasoning_gym": "reasoning-gym", "math_verify": "math-verify"}  # module -> what pip calls it
RUN_CODE = {"eval", "exec", "compile", "parse_expr", "sympify"}  # functions that run a text as Python code
ANSWER_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
SECONDS = 5  # that math-verify may take to parse an answer, and to compare it
BOXED = re.compile(r"\\boxed|\\\(|\\\[|\$")  # where math-verify finds LaTeX

Entry = Mapping[str, Any]


def final_answer(completion: str) -> str | None:
    """What stands in the last <answer>..</answer>, without white space around it."""
    answers = ANSWER_TAGS.findall(completion)
    return answers[-1].strip() if answers else None


# ---------------------------------------------------------------------------------------------------------------------
# reasoning-gym


def create_task(task: str, **config: Any) -> Any:
    """The dataset of a task of reasoning-gym. Raises UserError."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError:
        raise UserError(f"reasoning-gym's {task}: needs a package: pip install {PACKAGES['reasoning_gym']}") from None
    if task not in DATASETS:
        raise UserError(f"{task}: no such task of reasoning-gym{did_you_mean(task, DATASETS)}")
    unsafe = sorted(RUN_CODE & set(functions_called(DATASETS[task][0])))
    if unsafe:
        raise UserError(
            f"{task}: its scorer runs completions as Python code ({', '.join(unsafe)}), and there is no sandbox here; "
            "choose another task"
        )
    try:
        return reasoning_gym.create_dataset(task, **config)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{task}: reasoning-gym refuses the settings {json.dumps(config)} ({error})") from None


def functions_called(task_class: Any) -> Iterator[str]:
    """Names of the functions that a task's scorer calls, and that those of its class and module call."""
    module = sys.modules[task_class.__module__]
    pending, seen = [task_class.score_answer], set()
    while pending:
        function = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            yield name
            called = getattr(task_class, name, None) or getattr(module, name, None)
            if inspect.isfunction(called) and called.__module__.startswith("reasoning_gym"):
                pending.append(called)


@functools.lru_cache(maxsize=256)
def task_scorer(task: str, config: str) -> Callable[[str, dict[str, Any]], float]:
    """score_answer of a task. config: its settings as JSON. Raises UserError."""
    return create_task(task, **json.loads(config)).score_answer


def score_reasoning_gym(completion: str, row: Entry) -> float:
    """The score of a completion of a row that data/reasoning_gym/prepare.py wrote. Raises UserError."""
    if not {"task", "config", "metadata"} <= row.keys():
        raise UserError("reasoning_gym: needs rows of data/reasoning_gym/prepare.py, with task, config and metadata")
    entry = {"question": row["prompt"], "answer": row.get("answer"), "metadata": row["metadata"]}
    answer = final_answer(completion)
    score = task_scorer(row["task"], json.dumps(row["config"], sort_keys=True))
    return float(score(completion.strip() if answer is None else answer, entry))


# ---------------------------------------------------------------------------------------------------------------------
# math-verify


def score_math(completion: str, answer: str) -> float:
    """1 where math-verify finds the answer in a completion, or an expression that equals it; else 0. Raises UserError.

    What stands in <answer>..</answer> is taken as LaTeX; without these tags the completion is searched for it.
    """
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError:
        raise UserError(f"math_verify: needs a package: pip install {PACKAGES['math_verify']}") from None
    is_main = threading.current_thread() is threading.main_thread()
    seconds = SECONDS if is_main else None  # its limits are signals, which other threads can't get
    if not is_main:
        for name in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(name).setLevel(logging.ERROR)  # they warn of each call without a limit
    given = final_answer(completion)
    gold = parse(as_latex(answer), parsing_timeout=seconds)
    if not gold:
        raise UserError(f"math_verify: the row's answer {answer!r:.80} is no expression that math-verify can read")
    found = parse(completion if given is None else as_latex(given), parsing_timeout=seconds)
    return float(verify(gold, found, timeout_seconds=seconds))


def as_latex(text: str) -> str:
    """The text so that math-verify takes all of it for the answer."""
    return text if BOXED.search(text) else rf"\boxed{{{text}}}"
