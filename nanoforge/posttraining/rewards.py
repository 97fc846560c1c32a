"""Rewards: what a completion of a problem is worth, and how --reward names them and their weights.

    --reward=correct:1,format:0.5,my_module:my_function:0.2

A reward function takes a `Sample` and returns a number in [0, 1]. A function of a user's module takes its fields:

    def my_function(completion, problem, n_tokens, max_tokens, ended): ...

The docstring of a reward function says what it expects of a completion; a run without any reward quotes it.

Knows nothing of models or tokenizers.
"""

import functools
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from nanoforge.data.tables import Row
from nanoforge.errors import UserError, did_you_mean
from nanoforge.posttraining import package_rewards
from nanoforge.posttraining.answers import is_correct

# ---------------------------------------------------------------------------------------------------------------------
# reward functions


class Sample(NamedTuple):
    """A completion of a problem, as it was sampled."""

    completion: str  # its text, without the end token
    problem: Row  # the row: its prompt, its answer and its other fields
    n_tokens: int
    max_tokens: int  # how many it was allowed
    ended: bool  # by itself


RewardFunction = Callable[[Sample], float]

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
TAG = re.compile(f"({'|'.join(TAGS)})")


def format_score(completion: str) -> float:
    """1 for <reasoning>..</reasoning><answer>..</answer> alone, neither of them blank; else part of a half.

    White space may stand around and between. A completion in another form gets an eighth for each of the four tags that
    it has exactly once: something to climb by, never above a half.
    """
    parts = TAG.split(completion)  # text, tag, text, tag, ..., text
    tags = parts[1::2]
    has_text = [bool(text.strip()) for text in parts[::2]]
    if tags == [*TAGS] and has_text == [False, True, False, True, False]:
        return 1.0
    return sum(tags.count(tag) == 1 for tag in TAGS) / 8


def correct_reward(sample: Sample) -> float:
    r"""1 for the right answer in <answer>..</answer>, after ####, in \boxed{..}, or as the last number; else 0."""
    return float(is_correct(sample.completion, sample.problem["answer"]))


def format_reward(sample: Sample) -> float:
    """1 for <reasoning>..</reasoning><answer>..</answer> alone; else an eighth for each of the four tags."""
    return format_score(sample.completion)


def length_reward(sample: Sample) -> float:
    """Linear from 1 without a token to 0 at the limit; 0 for a completion that did not end by itself."""
    return max(0.0, 1 - sample.n_tokens / sample.max_tokens) if sample.ended else 0.0


def reasoning_gym_reward(sample: Sample) -> float:
    """The score that reasoning-gym gives to <answer>..</answer>, or without these tags to the whole completion."""
    return package_rewards.score_reasoning_gym(sample.completion, sample.problem)


def math_verify_reward(sample: Sample) -> float:
    r"""1 where math-verify finds the answer in <answer>..</answer>, or in \boxed{..}, $..$ or the text; else 0."""
    return package_rewards.score_math(sample.completion, sample.problem["answer"])


REWARDS: dict[str, RewardFunction] = {
    "correct": correct_reward,
    "format": format_reward,
    "length": length_reward,
    "reasoning_gym": reasoning_gym_reward,
    "math_verify": math_verify_reward,
}
NEED_ANSWER = ("correct", "math_verify")  # in the row's field `answer`
GRADERS = (*NEED_ANSWER, "reasoning_gym")  # say whether an answer is right, not how it is written

# ---------------------------------------------------------------------------------------------------------------------
# --reward


class Reward(NamedTuple):
    """One term of the total reward."""

    name: str
    weight: float
    function: RewardFunction

    @property
    def description(self) -> str:
        """What it expects, in a line: the function's docstring."""
        return " ".join((inspect.getdoc(self.function) or "").partition("\n\n")[0].split())


class RewardError(UserError):
    """A reward function failed on a completion."""


def parse_rewards(text: str) -> list[Reward]:
    """The rewards of a list such as correct:1,format:0.5,my_module:my_function:0.2. Raises UserError.

    A weight left out is 1; a reward of weight 0 is only logged.
    """
    rewards = [parse_reward(item) for item in text.split(",")]
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--reward: {name} is given twice")
    check_weights(rewards)
    return rewards


def parse_reward(item: str) -> Reward:
    """NAME, NAME:WEIGHT, MODULE:FUNCTION or MODULE:FUNCTION:WEIGHT. Raises UserError."""
    flag = f"--reward={item}"
    parts = item.strip().split(":")
    weight = 1.0
    if has_weight(parts):
        weight = parse_weight(parts.pop(), flag)
    if len(parts) > 2 or not all(parts):
        raise UserError(f"{flag}: must be NAME, NAME:WEIGHT, MODULE:FUNCTION or MODULE:FUNCTION:WEIGHT")
    name = ":".join(parts)
    return Reward(name, weight, load_reward(name, flag))


def has_weight(parts: Sequence[str]) -> bool:
    """Whether the last of the parts between colons is a weight: of two, it may be a function's name."""
    if len(parts) == 2:
        return parts[0] in REWARDS or re.match(r"[-+.\d]", parts[1]) is not None
    return len(parts) == 3


def parse_weight(text: str, flag: str) -> float:
    """A finite number. Raises UserError."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"{flag}: the weight {text!r} is not a number")
    return weight


def load_reward(name: str, flag: str) -> RewardFunction:
    """The reward function of a name of REWARDS or of module:function. Raises UserError."""
    if ":" in name:
        function = import_function(name, flag)

        @functools.wraps(function)
        def call(sample: Sample) -> float:
            return function(*sample)

        return call
    if name not in REWARDS:
        suggestion = did_you_mean(name, REWARDS)
        raise UserError(f"{flag}: no such reward{suggestion}; there is {', '.join(REWARDS)}, and my_module:my_function")
    package = package_rewards.PACKAGES.get(name)
    if package and importlib.util.find_spec(name) is None:
        raise UserError(f"{flag}: needs a package: pip install {package}")
    return REWARDS[name]


def import_function(name: str, flag: str) -> Callable:
    """What module:function names; modules of the current folder are found too, after all others. Raises UserError."""
    module_name, _, function_name = name.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module runs, and may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{flag}: the module {module_name} can't be imported ({reason})") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        suggestion = did_you_mean(function_name, vars(module))
        raise UserError(f"{flag}: the module {module_name} has no function {function_name}{suggestion}")
    check_signature(function, flag)
    return function


def check_signature(function: Callable[..., Any], flag: str) -> None:
    """Raise UserError if a function can't be called with a sample's fields."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions of C have none
        return
    try:
        signature.bind(*Sample._fields)
    except TypeError:
        fields = ", ".join(Sample._fields)
        raise UserError(
            f"{flag}: the function takes {signature}; a reward is called for one completion, with ({fields})"
        ) from None


def check_weights(rewards: Iterable[Reward]) -> None:
    """Raise UserError unless a wrong answer always gets less than a right one.

    Values lie in [0, 1], so the weight of the first of GRADERS must exceed the sum of the other weights, each taken
    positive.
    """
    weights = {reward.name: reward.weight for reward in rewards}
    grader = next((name for name in GRADERS if name in weights), None)
    if grader is None:
        return
    correct = weights.pop(grader)
    others = math.fsum(map(abs, weights.values()))
    if correct <= others:
        raise UserError(
            "--reward: a wrong answer could get more than a right one; "
            f"the weight of {grader}, {correct:g}, must exceed the sum of the others, {others:g}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# the total reward


def total_reward(rewards: Iterable[Reward], sample: Sample) -> tuple[float, dict[str, float]]:
    """(weighted sum, value of each reward by its name).

    Raises RewardError for a function that fails, or returns what is no number in [0, 1].
    """
    weighted = []
    values = {}
    for reward in rewards:
        try:
            value = unit_value(reward.function(sample))
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            row = shorten(json.dumps(sample.problem, ensure_ascii=False, default=str))
            raise RewardError(
                f"--reward: {reward.name} {describe_failure(error)}; the row is {row}, "
                f"the completion {shorten(repr(sample.completion))}"
            ) from error
        values[reward.name] = value
        weighted.append(reward.weight * value)
    return math.fsum(weighted), values


def unit_value(returned: Any) -> float:
    """What a reward function returned, as a number in [0, 1]. Raises UserError."""
    try:
        value = float(returned)
    except Exception:  # what float() raises is the type's to choose
        value = math.nan
    if not 0 <= value <= 1:
        raise UserError(f"returned {returned!r}; a reward must be a number from 0 to 1")
    return value


def describe_failure(error: BaseException) -> str:
    """What a reward function did wrong, and at which of its lines."""
    if isinstance(error, UserError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in frames if frame.filename != __file__), frames[-1])
    return f"raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"


def shorten(text: str, most: int = 400) -> str:
    """A text, or its beginning and its end."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
