"""Rewards against their promises: a wrong answer never gets as much as a right one, and errors name the flag."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoforge.errors import UserError
from nanoforge.posttraining.rewards import REWARDS, RewardError, Sample, parse_rewards, total_reward

SOLUTION = "<reasoning>\n40+35\n</reasoning>\n<answer>{}</answer>"


def sample(completion, n_tokens=1, *, ended=True) -> Sample:
    """A completion of a problem whose answer is 75, of at most 10 tokens."""
    return Sample(completion, {"answer": "75"}, n_tokens, max_tokens=10, ended=ended)


@pytest.mark.parametrize("completion, value", [
    (SOLUTION.format(1), 1), (f" \n{SOLUTION.format(1)}\n", 1), (SOLUTION.format(1) + " so", 0.5),
    ("so " + SOLUTION.format(1), 0.5), (SOLUTION.format(1) * 2, 0),
    (SOLUTION.format(" "), 0.5), ("<reasoning></reasoning><answer>1</answer>", 0.5),
    ("<reasoning>a</reasoning> and <answer>1</answer>", 0.5),
    ("<answer>1</answer><reasoning>a</reasoning>", 0.5), ("<reasoning>a<answer>1</answer></reasoning>", 0.5),
    ("<answer>1</answer>", 0.25), ("<answer>1", 0.125),
    ("<answer>" * 3 + "</answer>", 0.125), ("75", 0), ("", 0),
])  # fmt: skip
def test_format(completion, value):
    assert REWARDS["format"](sample(completion)) == value


def test_length_and_correct():
    assert [REWARDS["length"](sample("", n_tokens)) for n_tokens in (0, 1, 5, 10)] == [1, 0.9, 0.5, 0]
    assert REWARDS["length"](sample("", 1, ended=False)) == 0
    assert [REWARDS["correct"](sample(text)) for text in ("75.0", "71")] == [1, 0]


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module of the user's in the current folder, from which the command was not started."""
    (tmp_path / "my_rewards.py").write_text(
        "import math\n"
        "def half(completion, problem, tokens, limit, ended):\n"
        "    return 0.5 + 0 * len(completion + problem['answer']) * tokens * limit * ended\n"
        "def nan(*a): return math.nan\n"
        "def two(*a): return 2\n"
        "def less(*a): return -0.1\n"
        "def none(*a): return None\n"
        "def yes(*a): return True\n"
        "number = 3\n"
        "def broken(*a): return {}['x']\n"
        "def trls(completions, **kwargs): return [1.0 for _ in completions]\n"
        "def pair(*a):\n"
        "    import torch\n"
        "    return torch.tensor([1.0, 2.0])\n"
    )
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    sys.modules.pop("my_rewards", None)


def test_rewards_are_parsed_and_added_up(user_module):
    rewards = parse_rewards("correct:2,format:0.5, length:0,my_rewards:half:-1,my_rewards:yes:2e-1")
    weights = {"correct": 2, "format": 0.5, "length": 0, "my_rewards:half": -1, "my_rewards:yes": 0.2}
    assert [(reward.name, reward.weight) for reward in rewards] == [*weights.items()]
    total, values = total_reward(rewards, sample(SOLUTION.format(75), n_tokens=5))
    assert values == {"correct": 1, "format": 1, "length": 0.5, "my_rewards:half": 0.5, "my_rewards:yes": 1}
    assert total == pytest.approx(2 + 0.5 - 0.5 + 0.2)


def test_a_weight_left_out_is_one(user_module):
    assert [(reward.name, reward.weight) for reward in parse_rewards("correct")] == [("correct", 1)]
    assert parse_rewards("my_rewards:half")[0].weight == 1


@pytest.mark.parametrize("text, message", [
    ("corect:1", "--reward=corect:1: no such reward; did you mean correct"), ("formt", "did you mean format"),
    ("", "--reward"), ("correct,,format:0.1", "--reward"),
    ("correct:much", "'much' is not a number"), ("correct:nan", "'nan' is not a number"),
    ("correct:inf", "'inf' is not a number"), ("correct:", "'' is not a number"),
    ("a:b:c:d", "NAME:WEIGHT"), ("correct,correct", "correct is given twice"),
    ("my_rewards:half,my_rewards:half:0.1", "my_rewards:half is given twice"),
    ("no_module:f", "no_module can't be imported (ModuleNotFoundError"),
    ("broken_rewards:f", "can't be imported (ZeroDivisionError"),
    ("my_rewards:haf", "no function haf; did you mean half"), ("my_rewards:number:1", "no function number"),
    ("correct:1,format:1", "correct, 1,"), ("correct:1,format:0.6,length:0.4", "the others, 1"),
    ("correct:1,format:0.5,length:-0.5", "the others, 1"),
    ("correct:0", "correct, 0,"), ("correct:-1", "correct, -1,"), ("format:1,correct:0.9", "correct, 0.9,"),
])  # fmt: skip
def test_errors_in_rewards_name_the_flag(user_module, text, message):
    with pytest.raises(UserError) as error:
        parse_rewards(text)
    assert message in str(error.value) and "--reward" in str(error.value)


@pytest.mark.parametrize("name, reason", [
    ("nan", "returned nan;"), ("two", "returned 2;"), ("less", "returned -0.1;"), ("none", "returned None;"),
    ("pair", "returned tensor([1., 2.]);"), ("broken", "raised KeyError: 'x' ("),
])  # fmt: skip
def test_a_reward_that_fails_names_function_row_and_completion(user_module: None, name: str, reason: str):
    rewards = parse_rewards(f"my_rewards:{name}")
    with pytest.raises(RewardError) as error:
        total_reward(rewards, sample("so 75"))
    for part in (f"my_rewards:{name} {reason}", '{"answer": "75"}', "'so 75'"):
        assert part in str(error.value)
    if name == "broken":
        assert "my_rewards.py, line 10)" in str(error.value)


def test_a_function_of_other_arguments_is_refused_at_the_start(user_module: None):
    """Such as one for TRL, which takes a list."""
    with pytest.raises(UserError, match=r"--reward=my_rewards:trls: the function takes \(completions, \*\*kwargs\)"):
        parse_rewards("my_rewards:trls")


WEIGHT = st.floats(-1, 2, width=32)
SAMPLE = st.tuples(st.booleans(), st.integers(0, 10), st.booleans())  # in the format, number of tokens, ended


@settings(deadline=None)
@given(WEIGHT, WEIGHT, st.floats(0, 4, width=32), SAMPLE, SAMPLE)
def test_a_wrong_answer_never_gets_as_much_as_a_right_one(format_weight, length_weight, weight, wrong, right):
    """Whatever else they do. The program that this one replaces paid 4 of 9.5 points for a wrong one in the format."""
    try:
        rewards = parse_rewards(f"format:{format_weight},correct:{weight},length:{length_weight}")
    except UserError:
        return

    def total(answer: int, drawn: tuple[bool, int, bool]) -> float:
        in_format, n_tokens, ended = drawn
        completion = SOLUTION.format(answer) if in_format else str(answer)
        return total_reward(rewards, sample(completion, n_tokens, ended=ended))[0]

    assert total(76, wrong) < total(75, right)
