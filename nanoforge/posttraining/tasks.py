"""Tasks whose answers can be checked: problems from JSONL, numbers and answers read from text, rewards, and statistics of right answers.

A problem is a dict with `prompt` and `answer`, and whatever else its row had. A reward is a function

    f(completion: str, problem: dict, tokens: int, limit: int, ended: bool) -> a number in [0, 1]

of a completion's text, its tokens, the most it was allowed, and whether it ended by itself. Knows nothing of models or tokenizers.
"""

import importlib
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from nanoforge.data.corpus import Counter
from nanoforge.data.token_bins import SPLITS
from nanoforge.errors import UserError, did_you_mean

# ---------------------------------------------------------------------------------------------------------------------
# numbers in text

LONGEST = 1000  # characters of a text that is one number, and the largest power of ten: no text takes long to read
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MINUS = str.maketrans(dict.fromkeys("\u2212\u2012\u2013\ufe63\uff0d", "-"))
CURRENCY = r"\\?[$¢€£¥₹₩₽]"
OF_TEN = re.compile(r"(?<=[0-9]) ?(?:\u00d7|x|\*|·|\\times|\\cdot) ?10 ?\^ ?\{? ?([-+]?[0-9]+)\}?")  # 1.5 \times 10^{3}


def magnitude(spaces: str) -> str:
    """A pattern for a number without its sign; `spaces` may stand between thousands, as commas may."""
    whole = rf"(?:[1-9][0-9]{{0,2}}(?:(?:,[0-9]{{3}})+|(?:[{spaces}][0-9]{{3}})+)(?![0-9])|[0-9]+)"
    one = rf"(?:{whole}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    return rf"(?:(?P<mixed>[0-9]+) (?=[0-9]+/))?(?P<top>{one})(?: ?/ ?(?P<bottom>{one}))?(?: ?(?P<scale>(?i:{'|'.join(SCALES)}))\b)?"


THIN = "\u2009\u202f\u00a0"
IN_TEXT = re.compile(rf"(?:(?<![\w.)\]}}%])[-+])?{magnitude(THIN)}")  # a sign behind a word is a dash or an operator
ALONE = re.compile(
    r"(?:\w+ ?=)?(?:[\s({\[*\"'`=≈~]|\\boxed|\\[(\[])*"  # x = \boxed{(**
    rf"(?P<sign>[-+]?) ?(?:[A-Z]{{2,3}})? ?(?P<late>[-+]?) ?{magnitude(THIN + ' ')}"  # -USD 1 234.50
    r"(?! ?(?:\\?pi\b|π|[²³¹⁰⁴-⁹]))(?:[^\d^]|(?<=[A-Za-z])\^\{?[23]|\^\{?\\)*"  # units: cm^2, ^\circ, anything without digits
)


def clean(text: str) -> str:
    """Text with one kind of minus, of fraction and of power of ten; without currency signs and LaTeX's spacing."""
    text = re.sub(r"(?<=[0-9]) ?(?=\\[dt]?frac|[¼-¾⅐-⅞])", " ", text.translate(MINUS))
    text = re.sub("[¼-¾⅐-⅞]", lambda match: unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/"), text)
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\[,;: ]", "\u2009", text.replace("{,}", ",").replace(r"\!", "").replace(r"\%", "%"))
    return OF_TEN.sub(
        r"e\1", re.sub(rf"(?<![0-9]){CURRENCY}|{CURRENCY}(?![0-9])", "", text)
    )  # between digits it parts two numbers


def exact(digits: str) -> Fraction | None:
    """The value of what `magnitude` calls one number; None with an absurd power of ten."""
    digits = re.sub(rf"[, {THIN}]", "", digits)
    power = digits.lower().partition("e")[2]
    return None if len(power) > 5 or abs(int(power or 0)) > LONGEST else Fraction(digits)


def number(text: str) -> Fraction | None:
    """The exact value of a text that is one number, or None where it is none, several (12 or 75), or a calculation.

    Taken: signs, also apart (- 5) or behind the currency ($-5); thousands parted by commas or spaces (1,234,567); decimals; 1.5e3 and
    1.5 x 10^3; fractions and mixed ones (3/4, 1 1/2); million and its like; currency before, units behind (72 miles, 5kg); $..$,
    \\boxed{..}, \\frac{3}{4}, brackets and stars around. Units don't count, as in GSM8K's answers: 50% is 50, 50 cents are 50.
    A comma parts thousands, never decimals (3,5 is None); brackets are no minus: (5) is 5; k and M are units.
    """
    text = text.strip()
    match = ALONE.fullmatch(clean(text)) if len(text) <= LONGEST else None
    if match is None or (match["sign"] and match["late"]):
        return None
    values = [exact(match[part] or "1") for part in ("top", "bottom")]
    if None in values or not values[1]:
        return None
    value = (Fraction(match["mixed"] or 0) + values[0] / values[1]) * SCALES.get((match["scale"] or "").lower(), 1)
    return -value if "-" in (match["sign"], match["late"]) else value


# ---------------------------------------------------------------------------------------------------------------------
# answers in completions


def between(text: str, opening: str, closing: str) -> str | None:
    """What stands between the last closing tag and the last opening one before it."""
    last = text.rfind(closing)
    first = text.rfind(opening, 0, max(0, last))
    return None if last < 0 or first < 0 else text[first + len(opening) : last]


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{..}, which may hold braces of its own."""
    _, found, rest = text.rpartition(r"\boxed{")
    depth = 1
    for i, char in enumerate(rest if found else ""):
        depth += (char == "{") - (char == "}")
        if not depth:
            return rest[:i]
    return None


def marked(completion: str) -> str | None:
    """What a completion marks as its answer: in the last <answer>..</answer>, else in the line of the last ####, else in \\boxed{..}."""
    tagged = between(completion, "<answer>", "</answer>")
    if tagged is not None:
        return tagged.strip()
    if "####" in completion:
        return completion.rpartition("####")[2].lstrip(" ").partition("\n")[0].strip()
    return boxed(completion)


def answer_of(completion: str) -> str | None:
    """A completion's answer: what it marks as such, all of it, else its last number; None where it has neither."""
    answer = marked(completion)
    if answer is None:
        for match in IN_TEXT.finditer(clean(completion)):
            answer = match[0]
    return answer


def plain(text: str) -> str:
    """Text without what makes no difference: case, spaces, final punctuation."""
    return " ".join(text.casefold().split()).rstrip(" .,;:!?")


def same(given: str | None, answer: str) -> bool:
    """Whether an answer is the right one: as numbers where the right one is a number, else as plain text."""
    if given is None:
        return False
    wanted = number(answer)
    return plain(given) == plain(answer) if wanted is None else number(given) == wanted


def right(completion: str, answer: str) -> bool:
    """Whether a completion gives this answer. An answer that it marks must be one number; where the right one is text, a completion
    that marks none is taken whole."""
    if number(answer) is None and marked(completion) is None:
        return same(completion, answer)
    return same(answer_of(completion), answer)


def partial(completion: str, answer: str) -> float:
    """1.0 for an answer right or within a tenth of it (their ratio in [0.9, 1.1], as in agent_tunix), else 0.0."""
    given, wanted = number(answer_of(completion) or ""), number(answer)
    near = bool(given is not None and wanted) and Fraction(9, 10) <= given / wanted <= Fraction(11, 10)
    return float(near or right(completion, answer))


# ---------------------------------------------------------------------------------------------------------------------
# rewards

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


def correct(completion: str, problem: dict, tokens: int, limit: int, ended: bool) -> float:
    """1 for the right answer."""
    return float(right(completion, problem["answer"]))


def formatted(completion: str, problem: dict, tokens: int, limit: int, ended: bool) -> float:
    """1 for exactly <reasoning>..</reasoning><answer>..</answer>, neither of them blank, with only white space around and between;
    else an eighth for each of the four tags that stands exactly once: something to climb by, never above a half."""
    words = re.split(f"({'|'.join(TAGS)})", completion)
    texts, tags = words[::2], words[1::2]
    if tags == [*TAGS] and [bool(text.strip()) for text in texts] == [False, True, False, True, False]:
        return 1.0
    return sum(tags.count(tag) == 1 for tag in TAGS) / 8


def short(completion: str, problem: dict, tokens: int, limit: int, ended: bool) -> float:
    """From 1 for no token to 0 at the limit, linearly; 0 where it didn't end by itself."""
    return max(0.0, 1 - tokens / limit) if ended else 0.0


REWARDS = {"correct": correct, "format": formatted, "length": short}


class Reward(NamedTuple):
    """One term of the total reward."""

    name: str
    weight: float
    function: Callable[[str, dict, int, int, bool], float]


def find(name: str, where: str) -> Callable:
    """A reward by its name, or a module's by module:function; the current folder's modules count, behind all others. Raises UserError."""
    module, _, function = name.partition(":")
    if not function:
        if name not in REWARDS:
            raise UserError(
                f"{where}: no such reward{did_you_mean(name, REWARDS)}; known are {', '.join(REWARDS)}, and my_module:my_function"
            )
        return REWARDS[name]
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:  # the user's module runs, and may raise anything
        raise UserError(f"{where}: the module {module} can't be imported ({type(error).__name__}: {error})") from None
    if not callable(getattr(found, function, None)):
        raise UserError(f"{where}: {module} has no function {function}{did_you_mean(function, vars(found))}")
    return getattr(found, function)


def parse_rewards(text: str) -> list[Reward]:
    """The rewards of --reward=correct:1,format:0.5,my_module:my_function:0.2; a weight left out is 1, one of 0 is for watching.

    A wrong answer never gets as much as a right one: where `correct` is among them, its weight must exceed the others' sum, each
    taken positive. Raises UserError.
    """
    rewards: list[Reward] = []
    for item in text.split(","):
        where, words, weight = f"--reward={item}", item.strip().split(":"), 1.0
        if len(words) == 3 or (len(words) == 2 and (words[0] in REWARDS or re.match(r"[-+.\d]", words[1]))):
            try:
                weight = float(words[-1])
            except ValueError:
                weight = math.nan
            if not math.isfinite(weight):
                raise UserError(f"{where}: the weight {words[-1]!r} is not a number")
            words.pop()
        if len(words) > 2 or not all(words):
            raise UserError(f"{where}: must be NAME, NAME:WEIGHT, MODULE:FUNCTION or MODULE:FUNCTION:WEIGHT")
        name = ":".join(words)
        if name in [reward.name for reward in rewards]:
            raise UserError(f"--reward: {name} is given twice")
        rewards.append(Reward(name, weight, find(name, where)))
    others = math.fsum(abs(reward.weight) for reward in rewards if reward.name != "correct")
    for reward in rewards:
        if reward.name == "correct" and reward.weight <= others:
            raise UserError(
                f"--reward: a wrong answer could beat a right one: correct has the weight {reward.weight:g}, which must exceed the others' sum, {others:g}"
            )
    return rewards


def total(
    rewards: list[Reward], completion: str, problem: dict, tokens: int, limit: int, ended: bool
) -> tuple[float, dict[str, float]]:
    """The weighted sum, and each reward's own value by its name. Raises UserError for a value that isn't in [0, 1]."""
    values = {}
    for reward in rewards:
        given = reward.function(completion, problem, tokens, limit, ended)
        value = math.nan
        with suppress(TypeError, ValueError):
            value = float(given)
        if not 0 <= value <= 1:
            raise UserError(f"--reward: {reward.name} returned {given!r}; a reward must be a number from 0 to 1")
        values[reward.name] = value
    return math.fsum(reward.weight * values[reward.name] for reward in rewards), values


# ---------------------------------------------------------------------------------------------------------------------
# statistics of several completions a problem


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k completions is right, unbiased, from c right ones of n >= k: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, eq. 1)."""
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: Iterable[str | None]) -> str | None:
    """The most frequent answer, as it was first written (self-consistency, Wang et al. 2023); None has no vote.

    Numbers are the same by value, others as plain text. Of equally frequent ones that which got there first.
    """
    votes: dict[Fraction | str, int] = {}
    first: dict[Fraction | str, str] = {}
    best = None
    for answer in answers:
        if answer is None:
            continue
        value = number(answer)
        key = plain(answer) if value is None else value
        votes[key] = votes.get(key, 0) + 1
        first.setdefault(key, answer)
        if best is None or votes[key] > votes[best]:
            best = key
    return None if best is None else first[best]


def majority_at_k(answers: list[str | None], answer: str, k: int) -> float:
    """How often the majority of k answers is right: the mean over the list cut into stretches of k, what is left over aside.

    Unbiased, as each stretch is a sample of its own; with k answers it is 0 or 1.
    """
    assert 1 <= k <= len(answers), (k, len(answers))
    starts = range(0, len(answers) - k + 1, k)
    return sum(same(majority(answers[i : i + k]), answer) for i in starts) / len(starts)


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a proportion (Wilson 1927), of 95 % with z = 1.96; all of [0, 1] with n = 0."""
    if not n:
        return 0.0, 1.0
    p, square = successes / n, z * z / n
    middle, half = p + square / 2, z * math.sqrt(p * (1 - p) / n + square / (4 * n))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


# ---------------------------------------------------------------------------------------------------------------------
# problems in JSONL

GSM8K = "{question}\nReason step by step between <reasoning> and </reasoning>. Then write the final number alone between <answer> and </answer>.\n"


def problem(row: dict, where: str = "problem") -> dict:
    """A row as a problem: one with `prompt` and `answer` as it is, a number as its text; one of GSM8K's (`question`, and an `answer` that
    ends in #### 72) with a prompt that asks for the format, the bare answer, and the worked solution as `completion`.

    where: told in a UserError, which is raised for any other row.
    """
    prompt, question, answer = (
        (row.get(name) for name in ("prompt", "question", "answer")) if isinstance(row, dict) else (None, None, None)
    )
    if isinstance(prompt, str | list) and isinstance(answer, str | int | float) and not isinstance(answer, bool):
        return {**row, "answer": str(answer)}
    if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
        raise UserError(
            f"{where}: needs a prompt and an answer, or GSM8K's question and an answer that ends in #### and the number"
        )
    worked, _, final = answer.rpartition("####")
    worked = re.sub(r"<<[^<>]*>>", "", worked).strip()  # the calculator's marks
    completion = f"<reasoning>\n{worked}\n</reasoning>\n<answer>{final.strip()}</answer>"
    return {"prompt": GSM8K.format(question=question.strip()), "completion": completion, "answer": final.strip()}


def read_problems(path: Path) -> Iterator[dict]:
    """The problems of a JSONL file, one after the other. Raises UserError with the line."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line_number, line in enumerate(file, start=1):
                if line.strip():
                    yield problem(json.loads(line), f"{path}:{line_number}")
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise UserError(f"{path}: not JSONL in UTF-8 ({error})") from None


def write_rows(folder: Path, rows: Iterable[tuple[str, dict]], splits: Sequence[str] = SPLITS) -> None:
    """(split, row) to folder/train.jsonl and val.jsonl, both of them whole or none. Streams. Raises UserError."""
    beside = {split: folder / f".{split}.jsonl.{os.getpid()}.tmp" for split in splits}
    files, counts, counter = {}, dict.fromkeys(splits, 0), Counter(f"preparing {folder.name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = {split: path.open("w", encoding="ascii") for split, path in beside.items()}
        for split, row in rows:
            counts[split] += 1
            counter.add(files[split].write(json.dumps(row) + "\n"))
        for split, file in files.items():
            if not counts[split]:
                raise UserError(f"{folder}: no rows for {split}.jsonl")
            file.flush()
            os.fsync(file.fileno())
        for split, path in beside.items():
            os.replace(path, folder / f"{split}.jsonl")
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror})") from None
    finally:
        counter.close()
        for file in files.values():
            with suppress(OSError):  # of a full disk, told already
                file.close()
        for path in beside.values():
            with suppress(OSError):
                path.unlink()
    print(f"{folder}: {', '.join(f'{split}.jsonl {count:,} rows' for split, count in counts.items())}")
