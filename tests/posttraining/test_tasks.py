"""Tasks: numbers as Python's own fractions, statistics against enumeration, rewards against their promises, GSM8K's real answers."""

import itertools
import json
import math
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
from helpers import SHARED, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoforge.data import token_bins
from nanoforge.errors import UserError
from nanoforge.posttraining import tasks

needs_gsm8k = pytest.mark.skipif(not (SHARED / "gsm8k").exists(), reason="the real GSM8K of ../shared is not here")
SOLVED = "<reasoning>\n40+35\n</reasoning>\n<answer>{}</answer>"


# ---------------------------------------------------------------------------------------------------------------------
# numbers


@pytest.mark.parametrize("text, value", [
    ("72", 72), (" 72.\n", 72), ("72.0", 72), ("007", 7), ("+5", 5), ("-5", -5), ("- 5", -5), ("\u22125", -5), ("\u20135", -5), ("(5)", 5), ("(-5)", -5),
    ("$5", 5), ("$ 5", 5), ("-$5", -5), ("$-5", -5), (r"\$5", 5), ("5 $", 5), ("€1.25", "5/4"), ("£3", 3), ("USD 5", 5), ("USD -5", -5), ("50 cents", 50), ("50¢", 50),
    ("1,234,567", 1234567), ("1 234 567", 1234567), ("1\u2009234.5", "2469/2"), ("1\u202f234", 1234), ("$1,000.50", "2001/2"), ("12345", 12345),
    (".5", "1/2"), ("5.", 5), ("3/4", "3/4"), ("-3 / 4", "-3/4"), ("1 1/2 cups", "3/2"), ("-1 1/2", "-3/2"), ("1½", "3/2"), ("¾", "3/4"), ("2.5/5", "1/2"),
    ("50%", 50), (r"50\%", 50), ("5kg", 5), ("72 miles per hour", 72), ("$72/hour", 72), ("72 cm^2", 72), ("72 m²", 72), (r"72^\circ", 72), ("5 pints", 5),
    ("1e3", 1000), ("1.5E-3", "3/2000"), (r"1.5 \times 10^{3}", 1500), ("2 x 10^-2", "1/50"), ("1.5 million dollars", 1500000), ("3 Thousand", 3000),
    (r"\boxed{72}", 72), (r"$\boxed{-72}$", -72), ("$72$", 72), (r"\(72\)", 72), (r"\frac{3}{4}", "3/4"), (r"-\dfrac{3}{4}", "-3/4"), (r"1\frac{1}{2}", "3/2"),
    ("1{,}234", 1234), (r"1\,234", 1234), (r"1,\!234", 1234), (r"72\text{ miles}", 72), ("**72**", 72), ("x = -5", -5), ("= 72", 72), ("`72`", 72),
])  # fmt: skip
def test_numbers_as_people_and_models_write_them(text, value):
    assert tasks.number(text) == Fraction(value)


@pytest.mark.parametrize("text", [
    "", "-", "$", "seventy", "nan", "inf", "Infinity", "12 or 75", "12 75", "12, 75", "12/75/2", "5 apples and 3", "5-3", "20-30", "5'3", "7:30", "7$5", "--5", "-$-5",
    "3,5", "12,34", "1,2345", "0,075", "0 075", "1.2.3", "1,234.567,8", "1/0", "5^2", "5²", "5π", "5 pi", r"5\pi", "1_000", "0x1F", "x10", "٧٢",
])  # fmt: skip
def test_what_is_no_number_or_more_than_one_is_none(text):
    assert tasks.number(text) is None


@settings(deadline=None)
@given(
    st.integers(-(10**30), 10**30),
    st.integers(0, 6),
    st.sampled_from(["{}", "${}", "{} miles", "{}.", r"\boxed{{{}}}", "**{}**", "x = {}", "{}%"]),
)
def test_numbers_come_back_from_every_way_of_writing_them(n, places, around):
    """Python's own formatting is the witness."""
    value = Fraction(n, 10**places)
    digits = f"{abs(n):0{places + 1}d}"
    sign, whole, rest = "-" * (n < 0), digits[: len(digits) - places], digits[len(digits) - places :]
    tail = f".{rest}" if places else ""
    for written in (
        f"{sign}{whole}{tail}",
        f"{sign}{int(whole):,}{tail}",
        f"{sign}{int(whole):,}{tail}".replace(",", " "),
        f"{n}/{10**places}",
        f"{n}e-{places}",
    ):
        assert tasks.number(around.format(written)) == value, written
    assert tasks.number(tasks.answer_of(f"12 and then {int(whole):,}{tail}")) == abs(value)


def test_nothing_takes_long_to_read():
    many = 50_000
    texts = [
        "1e400000",
        "1e-400000000000",
        f"1e{'9' * many}",
        "9" * many,
        "1 " * many,
        "1," * many,
        "1,111" * many,
        " " * many,
        "<answer>" * many,
        "</answer>" * many,
        "(" * many,
    ]
    texts += [
        "\\frac{" * many,
        "\\boxed{" * many,
        "{" * many,
        "9" * many + ".",
        "- " * many,
        "1/" * many,
        "<reasoning>x</reasoning><answer>" + "y\n" * many + "</answer>z",
    ]
    start = time.perf_counter()
    for text in texts:
        tasks.number(text)
        tasks.right(text, "72")
        tasks.partial(text, "1e900")
        tasks.formatted(text, {}, 1, 1, True)
    assert time.perf_counter() - start < 5
    assert (
        tasks.number("1e400000") is None
        and tasks.number("1e4000000000") is None
        and not tasks.right("1e400000", "400000")
    )
    assert tasks.number("1e1000") == 10**1000


# ---------------------------------------------------------------------------------------------------------------------
# answers


@pytest.mark.parametrize("completion, answer", [
    ("75", "75"), ("it is 12, no, -75.", "-75"), ("10 - 3", "3"), ("10-3=7", "7"), ("- 5 apples", "5"), ("costs -$5", "-5"), ("covid-19", "19"), ("it makes $1,234.50.", "1,234.50"), ("3,1234", "1234"),
    ("<answer>12</answer> so <answer> 75 </answer> of 99", "75"), ("<answer>12 <answer>75</answer>", "75"), ("<answer>12 or 75</answer>", "12 or 75"), ("<answer></answer> 75", ""),
    ("1 #### 2 #### 75 apples\n99", "75 apples"), ("#### 5 <answer>75</answer>", "75"), ("####", ""), (r"\boxed{1}, \boxed{\frac{3}{4}} of 5", r"\frac{3}{4}"),
    (r"\boxed{1} #### 75", "75"), (r"\boxed{75 and", "75"), ("<answer>75", "75"), ("</answer> 75 <answer>", "75"), ("none", None), ("", None),
])  # fmt: skip
def test_where_the_answer_of_a_completion_stands(completion, answer):
    assert tasks.answer_of(completion) == answer


@pytest.mark.parametrize("given, answer, right", [
    ("72", "72.0", True), ("72.00", "72", True), ("$1,450,000", "1450000", True), ("72 miles", "72", True), ("72", "72 miles", True), ("0.5", "1/2", True), ("0.3333", "1/3", False),
    ("73", "72", False), ("-72", "72", False), ("720", "72", False), ("12 72", "72", False), ("12 or 72", "72", False), ("72, 73", "72", False), ("", "72", False), ("seventy-two", "72", False),
    ("Paris.", "paris", True), (" New\n york", "New York", True), ("London", "Paris", False), ("7:30", "7:30", True), ("8:30", "7:30", False),
])  # fmt: skip
def test_right_answers(given, answer, right):
    assert tasks.right(f"<answer>{given}</answer>", answer) is right
    assert tasks.right(SOLVED.format(given), answer) is right


def test_bare_completions():
    assert (
        tasks.right("75", "75")
        and tasks.right("12+63 is 75.", "75")
        and tasks.right("75\n", "75")
        and not tasks.right("", "75")
        and not tasks.right("none", "75")
    )
    assert tasks.right("The capital is Paris", "the capital is Paris.") and not tasks.right("Paris or London", "Paris")
    assert tasks.right("at 7:30", "at 7:30") and not tasks.right("30", "7:30")


@pytest.mark.parametrize("given, answer, credit", [
    ("100", "100", 1), ("110", "100", 1), ("90", "100", 1), ("110.0001", "100", 0), ("89.9999", "100", 0), ("-110", "-100", 1), ("-100", "100", 0),
    ("0", "0", 1), ("0.01", "0", 0), ("none", "5", 0), ("Paris", "paris", 1), ("1.1", "1", 1),
])  # fmt: skip
def test_partial_credit_within_a_tenth(given, answer, credit):
    assert tasks.partial(f"<answer>{given}</answer>", answer) == credit


# ---------------------------------------------------------------------------------------------------------------------
# rewards


@pytest.mark.parametrize("completion, value", [
    (SOLVED.format(1), 1), (f" \n{SOLVED.format(1)}\n", 1), (SOLVED.format(1) + " so", 0.5), ("so " + SOLVED.format(1), 0.5), (SOLVED.format(1) * 2, 0), (SOLVED.format(" "), 0.5),
    ("<reasoning></reasoning><answer>1</answer>", 0.5), ("<reasoning>a</reasoning> and <answer>1</answer>", 0.5), ("<answer>1</answer><reasoning>a</reasoning>", 0.5),
    ("<reasoning>a<answer>1</answer></reasoning>", 0.5), ("<answer>1</answer>", 0.25), ("<answer>1", 0.125), ("<answer>" * 3 + "</answer>", 0.125), ("75", 0), ("", 0),
])  # fmt: skip
def test_format(completion, value):
    assert tasks.REWARDS["format"](completion, {}, 5, 10, True) == value


def test_length_and_correct():
    assert [tasks.REWARDS["length"]("", {}, tokens, 10, True) for tokens in (0, 1, 5, 10)] == [1, 0.9, 0.5, 0]
    assert tasks.REWARDS["length"]("", {}, 1, 10, False) == 0
    assert [tasks.REWARDS["correct"](text, {"answer": "72"}, 1, 10, True) for text in ("72.0", "71")] == [1, 0]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's in the current folder, from which the command was not started."""
    (tmp_path / "my_rewards.py").write_text(
        "import math\ndef half(completion, problem, tokens, limit, ended): return 0.5 + 0 * len(completion + problem['answer']) * tokens * limit * ended\n"
        "def nan(*a): return math.nan\ndef two(*a): return 2\ndef less(*a): return -0.1\ndef none(*a): return None\ndef yes(*a): return True\nnumber = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    sys.modules.pop("my_rewards", None)


def test_rewards_are_parsed_and_added_up(module):
    rewards = tasks.parse_rewards("correct:2,format:0.5, length:0,my_rewards:half:-1,my_rewards:yes:2e-1")
    assert [(reward.name, reward.weight) for reward in rewards] == [
        ("correct", 2),
        ("format", 0.5),
        ("length", 0),
        ("my_rewards:half", -1),
        ("my_rewards:yes", 0.2),
    ]
    value, each = tasks.total(rewards, SOLVED.format(75), {"answer": "75"}, 5, 10, True)
    assert each == {
        "correct": 1,
        "format": 1,
        "length": 0.5,
        "my_rewards:half": 0.5,
        "my_rewards:yes": 1,
    } and value == pytest.approx(2 + 0.5 - 0.5 + 0.2)
    assert [(reward.name, reward.weight) for reward in tasks.parse_rewards("correct")] == [("correct", 1)]
    assert tasks.parse_rewards("my_rewards:half")[0].weight == 1


@pytest.mark.parametrize("text, told", [
    ("corect:1", "--reward=corect:1: no such reward; did you mean correct"), ("formt", "did you mean format"), ("", "--reward"), ("correct,,format:0.1", "--reward"),
    ("correct:much", "'much' is not a number"), ("correct:nan", "'nan' is not a number"), ("correct:inf", "'inf' is not a number"), ("correct:", "'' is not a number"),
    ("a:b:c:d", "must be NAME"), ("correct,correct", "correct is given twice"), ("my_rewards:half,my_rewards:half:0.1", "my_rewards:half is given twice"),
    ("no_module:f", "no_module can't be imported (ModuleNotFoundError"), ("broken_rewards:f", "can't be imported (ZeroDivisionError"),
    ("my_rewards:haf", "no function haf; did you mean half"), ("my_rewards:number:1", "no function number"),
    ("correct:1,format:1", "a wrong answer could beat a right one"), ("correct:1,format:0.6,length:0.4", "must exceed the others' sum, 1"), ("correct:1,format:0.5,length:-0.5", "could beat"),
    ("correct:0", "could beat"), ("correct:-1", "could beat"), ("format:1,correct:0.9", "could beat"),
])  # fmt: skip
def test_mistakes_in_rewards_name_the_flag(module, text, told):
    with pytest.raises(UserError) as mistake:
        tasks.parse_rewards(text)
    assert told in str(mistake.value) and "--reward" in str(mistake.value)


@pytest.mark.parametrize("name, value", [("nan", "nan"), ("two", "2"), ("less", "-0.1"), ("none", "None")])
def test_a_reward_beyond_0_to_1_is_told(module, name, value):
    rewards = tasks.parse_rewards(f"my_rewards:{name}")
    with pytest.raises(UserError, match=f"my_rewards:{name} returned {value};"):
        tasks.total(rewards, "75", {"answer": "75"}, 1, 10, True)


@settings(deadline=None)
@given(
    *[st.floats(-1, 2, width=32)] * 2,
    st.floats(0, 4, width=32),
    st.integers(0, 10),
    st.integers(0, 10),
    *[st.booleans()] * 4,
)
def test_a_wrong_answer_never_gets_as_much_as_a_right_one(
    form, length, weight, short, long, ended, also_ended, neat, also_neat
):
    """Whatever else the two completions do: the program that this one replaces paid 4 of 9.5 points for a wrong answer in the right format."""
    try:
        rewards = tasks.parse_rewards(f"format:{form},correct:{weight},length:{length}")
    except UserError:
        return
    problem = {"answer": "75"}
    of = lambda answer, neat: SOLVED.format(answer) if neat else str(answer)  # noqa: E731
    wrong, _ = tasks.total(rewards, of(76, neat), problem, short, 10, ended)
    right, _ = tasks.total(rewards, of(75, also_neat), problem, long, 10, also_ended)
    assert wrong < right


# ---------------------------------------------------------------------------------------------------------------------
# statistics


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert tasks.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_chens_product_and_takes_large_numbers():
    """numpy's form of it in the paper's figure 3."""
    for n, c, k in ((200, 3, 100), (1000, 999, 1), (5000, 40, 7)):
        assert tasks.pass_at_k(n, c, k) == pytest.approx(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)), abs=1e-12)
    for wrong in ((5, 6, 1), (5, 1, 6), (5, 1, 0)):
        with pytest.raises(AssertionError):
            tasks.pass_at_k(*wrong)


@pytest.mark.parametrize("answers, best", [
    (["72", "5", "72.0"], "72"), (["5", "$72", "72 miles", "5.5"], "$72"), (["1", "2", "2", "1"], "2"), (["1", "2"], "1"), ([None, None, "3"], "3"), ([None], None), ([], None),
    (["Paris", "London", "paris."], "Paris"), (["12 or 75", "75"], "12 or 75"), (["", "5", "5"], "5"),
])  # fmt: skip
def test_majority(answers, best):
    assert tasks.majority(iter(answers)) == best


def test_majority_at_k_is_the_mean_over_stretches():
    answers = ["1", "1", "2", "2", "2", "1", "1", None, "1", "2"]
    assert tasks.majority_at_k(answers, "1.0", 3) == pytest.approx(2 / 3)  # 112, 221, 1-1; the last 2 is left over
    assert tasks.majority_at_k(answers, "1", 1) == 0.5 and tasks.majority_at_k(answers, "1", 10) == 1
    with pytest.raises(AssertionError):
        tasks.majority_at_k(answers, "1", 11)


def test_majority_at_k_is_unbiased():
    """Over all the orders of three draws from {1 twice as likely, 2, 3} the mean is the exact chance, enumerated by hand."""
    draws = list(itertools.product(["1", "1", "2", "3"], repeat=6))
    exact = (
        sum(
            sorted(three, key=lambda a: -three.count(a))[0] == "1"
            for three in itertools.product(["1", "1", "2", "3"], repeat=3)
        )
        / 4**3
    )
    assert sum(tasks.majority_at_k(list(six), "1", 3) for six in draws) / len(draws) == pytest.approx(exact)


@settings(deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from([1.0, 1.96, 2.576]))
def test_wilsons_ends_are_z_standard_errors_away(n, part, z):
    """What defines them: the p for which |successes / n - p| = z sqrt(p (1 - p) / n)."""
    successes = round(part * n)
    low, high = tasks.wilson(successes, n, z)
    assert (
        0 <= low <= successes / n <= high <= 1
        or math.isclose(low, successes / n, abs_tol=1e-12)
        or math.isclose(high, successes / n, abs_tol=1e-12)
    )
    for p in (low, high):
        assert (successes / n - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, abs=1e-12)


def test_wilsons_known_intervals():
    """Newcombe 1998, table I, method 3, to its four digits."""
    for (r, n), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert tasks.wilson(r, n) == pytest.approx((low, high), abs=5.1e-5)
    assert tasks.wilson(0, 0) == (0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# problems


def test_gsm8ks_rows_become_problems():
    row = {
        "question": "How {many} clips?",
        "answer": "Half is 48/2 = <<48/2=24>>24.\nTogether <<48+24=72>>72.\n#### 1,072",
    }
    problem = tasks.problem(row)
    assert (
        problem["completion"] == "<reasoning>\nHalf is 48/2 = 24.\nTogether 72.\n</reasoning>\n<answer>1,072</answer>"
        and problem["answer"] == "1,072"
    )
    assert (
        problem["prompt"].startswith("How {many} clips?\n")
        and all(tag in problem["prompt"] for tag in tasks.TAGS)
        and problem["prompt"].endswith("\n")
    )
    assert (
        tasks.right(problem["completion"], problem["answer"])
        and tasks.formatted(problem["completion"], problem, 1, 2, True) == 1
    )
    assert tasks.problem({"prompt": "1+1=", "answer": 2, "level": "easy"}) == {
        "prompt": "1+1=",
        "answer": "2",
        "level": "easy",
    }


@pytest.mark.parametrize("line", ['{"prompt": "1+1="}', '{"answer": "2"}', '{"prompt": 3, "answer": "2"}', '{"prompt": "x", "answer": true}', '{"prompt": "x", "answer": null}',
                                  '{"question": "x", "answer": "72"}', '{"question": 1, "answer": "#### 72"}', "[1]", "3", "{", "[" * 100_000])  # fmt: skip
def test_what_is_no_problem_is_told_with_its_line(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"prompt": "1+1=", "answer": "2"}\n' + line + "\n")
    read = tasks.read_problems(path)
    assert next(read)["answer"] == "2"
    with pytest.raises(UserError, match=r"p\.jsonl"):
        next(read)
    with pytest.raises(UserError, match="nowhere"):
        list(tasks.read_problems(tmp_path / "nowhere.jsonl"))
    path.write_bytes('{"prompt": "café", "answer": "2"}'.encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        list(tasks.read_problems(path))


def test_rows_are_written_whole_or_not_at_all(tmp_path):
    def broken():
        yield (
            "train",
            {"a": "ä\u2028"},
        )  # str.splitlines takes the second for the end of a line: some of GSM8K's questions have it
        yield "val", {"a": 2}
        raise UserError("the disk is gone")

    folder = tmp_path / "d"
    tasks.write_rows(folder, itertools.islice(broken(), 2))
    assert rows(folder, "train") == [{"a": "ä\u2028"}] and rows(folder, "val") == [{"a": 2}]
    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in folder.iterdir()}
    with pytest.raises(UserError, match="disk"):
        tasks.write_rows(folder, broken())
    with pytest.raises(UserError, match=r"no rows for val\.jsonl"):
        tasks.write_rows(folder, itertools.islice(broken(), 1))
    assert before == {path.name: (path.read_bytes(), path.stat().st_ino) for path in folder.iterdir()}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        tasks.write_rows(tmp_path / "file", broken())


# ---------------------------------------------------------------------------------------------------------------------
# the shipped datasets


def rows(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@needs_gsm8k
def test_every_real_answer_of_gsm8k_is_a_number():
    """int() of it without its commas is the witness; a solution of GSM8K's own is right, and neatly written."""
    count = 0
    for name in ("train", "test"):
        raw = [json.loads(line) for line in (SHARED / f"gsm8k/{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for row, problem in zip(raw, tasks.read_problems(SHARED / f"gsm8k/{name}.jsonl"), strict=True):
            value = int(row["answer"].split("#### ")[1].replace(",", ""))
            assert (
                tasks.number(problem["answer"]) == value
                and tasks.right(problem["completion"], str(value))
                and tasks.right(row["answer"], str(value))
            )
            assert not tasks.right(problem["completion"], str(value + 1))
            assert (
                tasks.formatted(problem["completion"], problem, 1, 2, True) == 1
                and "<<" not in problem["completion"]
                and ">>" not in problem["completion"]
            )
            count += 1
    assert count == 8792


@needs_gsm8k
def test_gsm8k_is_prepared_from_its_folder_or_files(tmp_path):
    raw = SHARED / "gsm8k"
    told = run_script("--input", raw, f"--out_dir={tmp_path / 'a'}", script="data/gsm8k/prepare.py").stdout
    run_script(
        "--input",
        raw / "test.jsonl",
        raw / "train.jsonl",
        f"--out_dir={tmp_path / 'b'}",
        script="data/gsm8k/prepare.py",
    )
    assert (
        "7,473 rows" in told
        and "1,319 rows" in told
        and sorted(path.name for path in (tmp_path / "a").iterdir()) == ["train.jsonl", "val.jsonl"]
    )
    for split, name in {"train": "train", "val": "test"}.items():
        assert (tmp_path / f"a/{split}.jsonl").read_bytes() == (tmp_path / f"b/{split}.jsonl").read_bytes()
        assert rows(tmp_path / "a", split) == list(tasks.read_problems(raw / f"{name}.jsonl"))


@pytest.mark.parametrize("flags, told", [
    (["--input=nowhere"], "--input: nowhere"), (["--input=test.jsonl"], "train.jsonl of GSM8K is missing too"), (["--input=folder"], "folder/train.jsonl is not there"),
    (["--input=x.jsonl"], "neither of GSM8K's"), (["--input", "bad/train.jsonl", "test.jsonl"], "bad/train.jsonl:1: needs a prompt"), ([], "--input FILE"),
])  # fmt: skip
def test_gsm8k_without_its_files_says_what_to_do(tmp_path, flags, told):
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/train.jsonl").write_text('{"question": "x"}\n')
    for name in ("test.jsonl", "x.jsonl"):
        (tmp_path / name).write_text('{"question": "x", "answer": "#### 1"}\n')
    done = run_script(
        *flags,
        f"--out_dir={tmp_path / 'out'}",
        script="data/gsm8k/prepare.py",
        check=False,
        cwd=tmp_path,
        env={"https_proxy": "http://127.0.0.1:9", "no_proxy": ""},
    )
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_arithmetics_problems_are_the_sums_of_its_bins(tmp_path):
    run_script(f"--out_dir={tmp_path}", "--sums=2500", script="data/arithmetic/prepare.py")
    meta = token_bins.read_meta(tmp_path)
    assert meta.vocab_size == 14 and meta.tokenizer.eos_id == 13
    for split in ("train", "val"):
        lines = meta.tokenizer.decode(token_bins.TokenBin(tmp_path, split, meta).shards[0].tolist()).splitlines()
        assert [row["prompt"] + row["completion"] for row in rows(tmp_path, split)] == lines and len(lines) == {
            "train": 2250,
            "val": 250,
        }[split]
        assert all(
            row == tasks.problem(row) and tasks.right(row["completion"], row["answer"]) for row in rows(tmp_path, split)
        )


def test_preferences_are_off_by_one(tmp_path):
    for name in ("a", "b"):
        run_script("--kind=preferences", f"--out_dir={tmp_path / name}", script="data/arithmetic/prepare.py")
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["train.jsonl", "val.jsonl"]
    run_script("--kind=preferences", "--seed=1", f"--out_dir={tmp_path / 'c'}", script="data/arithmetic/prepare.py")
    a, c = ([*rows(tmp_path / name, "train"), *rows(tmp_path / name, "val")] for name in "ac")
    assert a == [*rows(tmp_path / "b", "train"), *rows(tmp_path / "b", "val")] and len(a) == 10_000
    steps = {row["prompt"]: int(row["rejected"]) - int(row["chosen"]) for row in a}
    assert set(steps.values()) == {-1, 1} and abs(sum(steps.values())) < 500 and len(steps) == 10_000
    assert (
        all(eval(row["prompt"][:-1]) == int(row["chosen"]) and int(row["rejected"]) >= 0 for row in a)
        and steps["0+0="] == 1
    )
    pairs = zip(steps.values(), c, strict=True)
    assert 4000 < sum(step == int(row["rejected"]) - int(row["chosen"]) for step, row in pairs) < 6000, (
        "another seed, other mistakes in the same places"
    )


@pytest.mark.parametrize("unpaired", [1, 8])
def test_unpaired_preferences_have_so_many_wrong_to_a_right_one(tmp_path, unpaired):
    run_script(
        "--kind=preferences",
        f"--unpaired={unpaired}",
        f"--out_dir={tmp_path}",
        "--sums=1800",
        script="data/arithmetic/prepare.py",
    )
    for split, count in {"train": 1620, "val": 180}.items():
        found = rows(tmp_path, split)
        labels = [row["label"] for row in found]
        assert (
            len(found) == count
            and sum(labels) == count // (unpaired + 1)
            and labels[: unpaired + 1] == [True, *[False] * unpaired]
        )
        assert all(abs(eval(row["prompt"][:-1]) - int(row["completion"])) == (not row["label"]) for row in found)


@pytest.mark.parametrize(
    "flags, told", [(["--kind=preferences"], "--out_dir"), (["--unpaired=8"], "only with --kind=preferences")]
)
def test_preferences_dont_take_the_place_of_the_sums(flags, told):
    done = run_script(*flags, script="data/arithmetic/prepare.py", check=False)
    assert done.returncode == 2 and told in done.stderr
