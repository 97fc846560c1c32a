"""Numbers and answers in text: Python's own fractions and formatting are the witnesses, and GSM8K's real answers."""

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from helpers import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoforge.data.tables import read_rows
from nanoforge.errors import UserError
from nanoforge.posttraining.answers import (
    extract_answer,
    extract_vote,
    is_correct,
    parse_number,
    partial_credit,
    to_problem,
)
from nanoforge.posttraining.rewards import TAGS, format_score

needs_gsm8k = pytest.mark.skipif(not (SHARED / "gsm8k").exists(), reason="the real GSM8K of ../shared is not here")
SOLUTION = "<reasoning>\n40+35\n</reasoning>\n<answer>{}</answer>"


# ---------------------------------------------------------------------------------------------------------------------
# numbers


@pytest.mark.parametrize("text, value", [
    ("72", 72), (" 72.\n", 72), ("72.0", 72), ("007", 7), ("+5", 5), ("-5", -5), ("- 5", -5), ("\u22125", -5),
    ("\u20135", -5), ("(5)", 5), ("(-5)", -5),
    ("$5", 5), ("$ 5", 5), ("-$5", -5), ("$-5", -5), (r"\$5", 5), ("5 $", 5), ("€1.25", "5/4"), ("£3", 3), ("USD 5", 5),
    ("USD -5", -5), ("50 cents", 50), ("50¢", 50),
    ("1,234,567", 1234567), ("1 234 567", 1234567), ("1\u2009234.5", "2469/2"), ("1\u202f234", 1234),
    ("$1,000.50", "2001/2"), ("12345", 12345),
    (".5", "1/2"), ("5.", 5), ("3/4", "3/4"), ("-3 / 4", "-3/4"), ("1 1/2 cups", "3/2"), ("-1 1/2", "-3/2"),
    ("1½", "3/2"), ("¾", "3/4"), ("2.5/5", "1/2"),
    ("50%", 50), (r"50\%", 50), ("5kg", 5), ("72 miles per hour", 72), ("$72/hour", 72), ("72 cm^2", 72), ("72 m²", 72),
    (r"72^\circ", 72), ("5 pints", 5),
    ("1e3", 1000), ("1.5E-3", "3/2000"), (r"1.5 \times 10^{3}", 1500), ("2 x 10^-2", "1/50"),
    ("1.5 million dollars", 1500000), ("3 Thousand", 3000),
    (r"\boxed{72}", 72), (r"$\boxed{-72}$", -72), ("$72$", 72), (r"\(72\)", 72), (r"\frac{3}{4}", "3/4"),
    (r"-\dfrac{3}{4}", "-3/4"), (r"1\frac{1}{2}", "3/2"),
    ("1{,}234", 1234), (r"1\,234", 1234), (r"1,\!234", 1234), (r"72\text{ miles}", 72), ("**72**", 72), ("x = -5", -5),
    ("= 72", 72), ("`72`", 72),
])  # fmt: skip
def test_numbers_as_people_and_models_write_them(text, value):
    assert parse_number(text) == Fraction(value)


@pytest.mark.parametrize("text", [
    "", "-", "$", "seventy", "nan", "inf", "Infinity", "12 or 75", "12 75", "12, 75", "12/75/2", "5 apples and 3",
    "5-3", "20-30", "5'3", "7:30", "7$5", "--5", "-$-5",
    "3,5", "12,34", "1,2345", "0,075", "0 075", "1.2.3", "1,234.567,8", "1/0", "5^2", "5²", "5π", "5 pi", r"5\pi",
    "1_000", "0x1F", "x10", "٧٢",
])  # fmt: skip
def test_what_is_no_number_or_more_than_one_is_none(text):
    assert parse_number(text) is None


AROUND = ["{}", "${}", "{} miles", "{}.", r"\boxed{{{}}}", "**{}**", "x = {}", "{}%"]


@settings(deadline=None)
@given(st.integers(-(10**30), 10**30), st.integers(0, 6), st.sampled_from(AROUND))
def test_numbers_come_back_from_every_way_of_writing_them(n, decimals, around):
    """Python's own formatting is the witness."""
    value = Fraction(n, 10**decimals)
    digits = f"{abs(n):0{decimals + 1}d}"
    sign = "-" if n < 0 else ""
    integer = digits[: len(digits) - decimals]
    tail = f".{digits[len(digits) - decimals :]}" if decimals else ""
    with_commas = f"{int(integer):,}{tail}"
    for written in (
        f"{sign}{integer}{tail}",
        f"{sign}{with_commas}",
        f"{sign}{with_commas}".replace(",", " "),
        f"{n}/{10**decimals}",
        f"{n}e-{decimals}",
    ):
        assert parse_number(around.format(written)) == value, written
    assert parse_number(extract_answer(f"12 and then {with_commas}")) == abs(value)


MANY = 50_000
HARD_TEXTS = [
    *("1e400000", "1e-400000000000", f"1e{'9' * MANY}", "9" * MANY, "9" * MANY + "."),
    *(part * MANY for part in ("1 ", "1,", "1,111", " ", "(", "{", "- ", "1/")),
    *(part * MANY for part in ("<answer>", "</answer>", "\\frac{", "\\boxed{")),
    "<reasoning>x</reasoning><answer>" + "y\n" * MANY + "</answer>z",
]


@pytest.mark.slow
def test_no_text_takes_long_to_parse():
    start = time.process_time()
    for text in HARD_TEXTS:
        parse_number(text)
        is_correct(text, "72")
        partial_credit(text, "1e900")
        format_score(text)
    assert time.process_time() - start < 5


def test_powers_of_ten_end_at_a_thousand():
    assert parse_number("1e1000") == 10**1000
    assert parse_number("1e400000") is None
    assert parse_number("1e4000000000") is None
    assert not is_correct("1e400000", "400000")


# ---------------------------------------------------------------------------------------------------------------------
# answers


@pytest.mark.parametrize("completion, answer", [
    ("75", "75"), ("it is 12, no, -75.", "-75"), ("10 - 3", "3"), ("10-3=7", "7"), ("- 5 apples", "5"),
    ("costs -$5", "-5"), ("covid-19", "19"), ("it makes $1,234.50.", "1,234.50"), ("3,1234", "1234"),
    ("<answer>12</answer> so <answer> 75 </answer> of 99", "75"), ("<answer>12 <answer>75</answer>", "75"),
    ("<answer>12 or 75</answer>", "12 or 75"), ("<answer></answer> 75", ""),
    ("1 #### 2 #### 75 apples\n99", "75 apples"), ("#### 5 <answer>75</answer>", "75"), ("####", ""),
    (r"\boxed{1}, \boxed{\frac{3}{4}} of 5", r"\frac{3}{4}"),
    (r"\boxed{1} #### 75", "75"), (r"\boxed{75 and", "75"), ("<answer>75", "75"), ("</answer> 75 <answer>", "75"),
    ("none", None), ("", None),
])  # fmt: skip
def test_extract_answer(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize("answer, reference, is_right", [
    ("72", "72.0", True), ("72.00", "72", True), ("$1,450,000", "1450000", True), ("72 miles", "72", True),
    ("72", "72 miles", True), ("0.5", "1/2", True), ("0.3333", "1/3", False), ("73", "72", False), ("-72", "72", False),
    ("720", "72", False), ("12 72", "72", False), ("12 or 72", "72", False), ("72, 73", "72", False), ("", "72", False),
    ("seventy-two", "72", False), ("Paris.", "paris", True), (" New\n york", "New York", True),
    ("London", "Paris", False), ("7:30", "7:30", True), ("8:30", "7:30", False),
])  # fmt: skip
def test_is_correct(answer, reference, is_right):
    assert is_correct(f"<answer>{answer}</answer>", reference) is is_right
    assert is_correct(SOLUTION.format(answer), reference) is is_right


GRADED = [  # completion, right answer, verdict of math-verify 0.9.0
    (r"\boxed{\frac12}", "1/2", True), (r"\boxed{\frac{1}2}", "1/2", True), (r"\boxed{\frac1{2}}", "0.5", True),
    (r"\boxed{\cfrac{1}{2}}", "1/2", True), (r"\boxed{1\frac12}", "3/2", True), (r"\boxed{\frac12}", "2", False),
    (r"\boxed{\text{72}}", "72", True), (r"\boxed{\mathbf{72}}", "72", True), (r"\boxed{\mathrm{72}}", "72", True),
    (r"\boxed{72\mathrm{ cm}^2}", "72", True), (r"\boxed{\left(72\right)}", "72", True),
    (r"\boxed{\approx 72}", "72", True),
    ("<answer>The answer is 72</answer>", "72", True), ("<answer>Answer: 72.</answer>", "72", True),
    ("<answer>He has 72 apples left</answer>", "72", True), (r"<answer>It is \boxed{72}</answer>", "72", True),
    ("<answer>40 + 32 = 72</answer>", "72", True), ("<answer>72 = 40 + 32</answer>", "72", False),
    ("<answer>so 73 = 72</answer>", "73", False), (r"\boxed{\sqrt{72}}", "72", False), (r"\boxed{2^{72}}", "72", False),
    (r"\boxed{72\pi}", "72", False), (r"\boxed{72+1}", "72", False), ("<answer>72, 73</answer>", "72", False),
    ("#### 72 = 72", "72", True), ("#### 6*12 = 72 dollars", "72", True), ("#### The answer is 72", "72", True),
    ("#### Step 1\nAdd.\n#### Step 2\nso \\boxed{72}", "72", True), ("#### Step 3\nIt is 72.", "72", True),
    ("#### Step 1\nAdd.\n#### Step 2\nso \\boxed{72}", "2", False), ("#### Step 3\nIt is 72.", "3", False),
    ("#### 2. Add\nIt is 72.", "72", True), ("#### 2) Add\nIt is 72.", "2", False), ("#### Answer\n72", "72", True),
    ("#### Final answer:\n\\boxed{72}", "72", True),
    ("#### 5\nso \\boxed{72}", "72", True),
    (r"\boxed{x^2 + 1}", r"x^2+1", True), (r"\boxed{\left(1,2\right)}", "(1, 2)", True), (r"\boxed{A}", "(A)", True),
    (r"\boxed{\dfrac{\sqrt2}{2}}", r"\frac{\sqrt{2}}{2}", True), (r"\boxed{\text{ Evelyn }}", r"\text{Evelyn}", True),
    (r"\boxed{\text{Anna}}", r"\text{Evelyn}", False), (r"\boxed{B}", "(A)", False),
]  # fmt: skip


@pytest.mark.parametrize("completion, reference, verdict", GRADED)
def test_answers_are_graded_as_a_public_grader_does(completion: str, reference: str, verdict: object):
    assert is_correct(completion, reference) is verdict


@pytest.mark.parametrize("completion", ["12 or 72", "not 72", "minus 72", "x = 5, y = 72", "5 = x and 72"])
def test_a_grader_is_not_fooled(completion: str):
    """Where math-verify takes any number."""
    assert not is_correct(f"<answer>{completion}</answer>", "72")


@pytest.mark.parametrize("completion, reference, is_right", [
    ("75", "75", True), ("12+63 is 75.", "75", True), ("75\n", "75", True), ("", "75", False), ("none", "75", False),
    ("The capital is Paris", "the capital is Paris.", True), ("Paris or London", "Paris", False),
    ("at 7:30", "at 7:30", True), ("30", "7:30", False),
])  # fmt: skip
def test_completions_that_mark_no_answer(completion, reference, is_right):
    assert is_correct(completion, reference) is is_right


@pytest.mark.parametrize("completion, reference, vote", [
    ("12+63 is 75.", "75", "75"), ("<answer>75</answer> of 99", "75", "75"), ("none", "75", None),
    ("at 7:30", "7:30", "at 7:30"), ("at <answer>7:30</answer>", "7:30", "7:30"),
])  # fmt: skip
def test_what_a_completion_votes_for(completion, reference, vote):
    """Of a number the last one; of a text, where none is marked, the whole completion."""
    assert extract_vote(completion, reference) == vote


@pytest.mark.parametrize("answer, reference, credit", [
    ("100", "100", 1), ("110", "100", 1), ("90", "100", 1), ("110.0001", "100", 0), ("89.9999", "100", 0),
    ("-110", "-100", 1), ("-100", "100", 0),
    ("0", "0", 1), ("0.01", "0", 0), ("none", "5", 0), ("Paris", "paris", 1), ("1.1", "1", 1),
])  # fmt: skip
def test_partial_credit_within_a_tenth(answer, reference, credit):
    assert partial_credit(f"<answer>{answer}</answer>", reference) == credit


# ---------------------------------------------------------------------------------------------------------------------
# problems


GSM8K_ROW = {
    "question": "How {many} clips?",
    "answer": "Half is 48/2 = <<48/2=24>>24.\nTogether <<48+24=72>>72.\n#### 1,072",
}


def test_gsm8ks_rows_become_problems():
    problem = to_problem(GSM8K_ROW)
    solution = "Half is 48/2 = 24.\nTogether 72."
    assert problem["completion"] == f"<reasoning>\n{solution}\n</reasoning>\n<answer>1,072</answer>"
    assert problem["answer"] == "1,072"
    assert problem["prompt"].startswith("How {many} clips?\n") and problem["prompt"].endswith("\n")
    assert all(tag in problem["prompt"] for tag in TAGS)
    assert is_correct(problem["completion"], problem["answer"])
    assert format_score(problem["completion"]) == 1


def test_rows_with_a_prompt_and_an_answer_stay_as_they_are():
    row = {"prompt": "1+1=", "answer": 2, "level": "easy"}
    assert to_problem(row) == {"prompt": "1+1=", "answer": "2", "level": "easy"}
    assert to_problem({"prompt": "1+1=", "answer": "One and one.\n#### 2"})["answer"] == "2"


@pytest.mark.parametrize("row", [
    {"prompt": "1+1="}, {"answer": "2"}, {"prompt": 3, "answer": "2"}, {"prompt": "x", "answer": True},
    {"prompt": "x", "answer": None}, {"question": "x", "answer": "72"}, {"question": 1, "answer": "#### 72"},
])  # fmt: skip
def test_rows_that_are_no_problem_are_refused(tmp_path: Path, row):
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"prompt": "1+1=", "answer": "2"}\n' + json.dumps(row) + "\n")
    problems = read_rows(path, to_problem)
    assert next(problems)["answer"] == "2"
    with pytest.raises(UserError, match=r"p\.jsonl:3: .*GSM8K"):
        next(problems)


@pytest.mark.slow
@needs_gsm8k
def test_every_real_answer_of_gsm8k_is_a_number():
    """int() of it without its commas is the witness; a solution of GSM8K's own is right, and in the format."""
    count = 0
    for name in ("train", "test"):
        path = SHARED / f"gsm8k/{name}.jsonl"
        raw = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
        for row, problem in zip(raw, read_rows(path, to_problem), strict=True):
            value = int(row["answer"].split("#### ")[1].replace(",", ""))
            assert parse_number(problem["answer"]) == value
            assert is_correct(problem["completion"], str(value)) and is_correct(row["answer"], str(value))
            assert not is_correct(problem["completion"], str(value + 1))
            assert format_score(problem["completion"]) == 1
            assert "<<" not in problem["completion"] and ">>" not in problem["completion"]
            count += 1
    assert count == 8792
