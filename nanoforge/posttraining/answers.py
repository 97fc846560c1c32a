r"""Numbers and answers in text: how an answer is found in a completion, and when it equals the right one.

    parse_number("$1,234.50") == Fraction(2469, 2)      extract_answer("so <answer>72</answer>") == "72"
    is_correct("... #### 72 miles", "72.0")             to_problem({"question": ..., "answer": "... #### 72"})

Knows nothing of models, tokenizers or rewards.
"""

import re
import unicodedata
from fractions import Fraction

from nanoforge.data.tables import Row
from nanoforge.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# numbers

MAX_NUMBER_CHARS = 1000  # of a text that is one number: no text takes long to parse
MAX_EXPONENT = 1000  # of ten
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MINUS_SIGNS = str.maketrans(dict.fromkeys("\u2212\u2012\u2013\ufe63\uff0d", "-"))
THIN_SPACES = "\u2009\u202f\u00a0"
VULGAR_FRACTION = "[¼-¾⅐-⅞]"
CURRENCY = r"\\?[$¢€£¥₹₩₽]"

# What `normalize` replaces.
BEFORE_FRACTION = re.compile(rf"(?<=[0-9]) ?(?=\\[cdt]?frac|{VULGAR_FRACTION})")  # of a mixed number: 1\frac{1}{2}, 1½
FRACTION_SIGN = re.compile(VULGAR_FRACTION)
LATEX_ARGUMENT = r" ?(?:\{([^{}]*)\}|([0-9]))"
LATEX_FRACTION = re.compile(rf"\\[cdt]?frac{LATEX_ARGUMENT}{LATEX_ARGUMENT}")  # \frac{1}{2}, \frac12, \frac1{2}
LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathbf|mathit|mathrm|mathsf|mbox|boldsymbol) ?\{([^{}]*)\}")
LATEX_SIZE = re.compile(r"\\(?:left|right)(?![A-Za-z])")
LATEX_SPACE = re.compile(r"\\[,;: ]")
CURRENCY_SIGN = re.compile(rf"(?<![0-9]){CURRENCY}|{CURRENCY}(?![0-9])")  # between digits it separates two numbers
TIMES = r"(?:\u00d7|x|\*|·|\\times|\\cdot)"
POWER_OF_TEN = re.compile(rf"(?<=[0-9]) ?{TIMES} ?10 ?\^ ?\{{? ?([-+]?[0-9]+)\}}?")  # 1.5 \times 10^{3}


def number_pattern(spaces: str) -> str:
    """A regular expression of a number without its sign; one of `spaces` may separate thousands, as a comma may."""
    thousands = rf"[1-9][0-9]{{0,2}}(?:(?:,[0-9]{{3}})+|(?:[{spaces}][0-9]{{3}})+)(?![0-9])"
    decimal = rf"(?:(?:{thousands}|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    integer_part = r"(?:(?P<integer>[0-9]+) (?=[0-9]+/))?"  # of a mixed number: 1 1/2
    fraction = rf"(?P<numerator>{decimal})(?: ?/ ?(?P<denominator>{decimal}))?"
    scale = rf"(?: ?(?P<scale>(?i:{'|'.join(SCALES)}))\b)?"
    return integer_part + fraction + scale


# A number anywhere. A sign behind a word or a bracket is a dash or an operator.
NUMBER_IN_TEXT = re.compile(rf"(?:(?<![\w.)\]}}%])[-+])?{number_pattern(THIN_SPACES)}")
# A text that is one number.
NUMBER_ALONE = re.compile(
    r"(?:\w+ ?=)?(?:[\s({\[*\"'`=≈~]|\\boxed|\\[(\[])*"  # x = \boxed{(**
    rf"(?P<sign>[-+]?) ?(?:[A-Z]{{2,3}})? ?(?P<late_sign>[-+]?) ?{number_pattern(THIN_SPACES + ' ')}"  # -USD 1 234.50
    r"(?! ?(?:\\?pi\b|π|[²³¹⁰⁴-⁹]))"  # no factor of pi, no power
    r"(?:[^\d^]|(?<=[A-Za-z])\^\{?[23]|\^\{?\\)*"  # units: cm^2, ^\circ, anything without digits
)
SEPARATORS = re.compile(rf"[, {THIN_SPACES}]")


def normalize(text: str) -> str:
    """Text with one kind of minus, of fraction and of power of ten; no currency signs, LaTeX's fonts or spacing."""
    text = LATEX_SIZE.sub("", LATEX_TEXT.sub(r"\1", text.translate(MINUS_SIGNS)))
    text = BEFORE_FRACTION.sub(" ", text)
    text = FRACTION_SIGN.sub(lambda match: unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/"), text)
    text = LATEX_FRACTION.sub(lambda match: f"{match[1] or match[2]}/{match[3] or match[4]}", text)
    text = text.replace("{,}", ",").replace(r"\!", "").replace(r"\%", "%")
    text = LATEX_SPACE.sub("\u2009", text)
    text = CURRENCY_SIGN.sub("", text)
    return POWER_OF_TEN.sub(r"e\1", text)


def parse_decimal(digits: str) -> Fraction | None:
    """The value of one number of `number_pattern`, such as 1,234.5e3; None if its power of ten is absurd."""
    digits = SEPARATORS.sub("", digits)
    exponent = digits.lower().partition("e")[2]
    if len(exponent) > 5 or abs(int(exponent or 0)) > MAX_EXPONENT:
        return None
    return Fraction(digits)


def parse_number(text: str) -> Fraction | None:
    r"""The exact value of a text that is one number; None if it is none, several (12 or 75), or a calculation.

    Accepted: signs, also apart (- 5) or behind the currency ($-5); thousands separated by commas or spaces
    (1,234,567); decimals; 1.5e3 and 1.5 x 10^3; fractions and mixed numbers (3/4, 1 1/2); million and the like; a
    currency before, units behind (72 miles, 5kg); $..$, \boxed{..}, \frac{3}{4}, brackets and stars around. Units
    don't count, as in GSM8K's answers: 50% is 50, 50 cents are 50. A comma separates thousands, never decimals (3,5 is
    None); brackets are no minus: (5) is 5; k and M are units.
    """
    text = text.strip()
    if len(text) > MAX_NUMBER_CHARS:
        return None
    match = NUMBER_ALONE.fullmatch(normalize(text))
    if match is None or (match["sign"] and match["late_sign"]):
        return None
    numerator = parse_decimal(match["numerator"])
    denominator = parse_decimal(match["denominator"] or "1")
    if numerator is None or not denominator:
        return None
    scale = SCALES[match["scale"].lower()] if match["scale"] else 1
    value = (int(match["integer"] or 0) + numerator / denominator) * scale
    is_negative = "-" in (match["sign"], match["late_sign"])
    return -value if is_negative else value


EQUALS = re.compile(r"=|≈|\\approx")
LIST = re.compile(r"[,;](?![0-9])|\b(?:and|or)\b")
# What may stand before the only number of a sentence; a sign or an operator would belong to the number.
WORDS_BEFORE_NUMBER = re.compile(r"(?=.*[^\W\d_])(?:[^\d\\+/^<>=]|\\boxed|\\[(\[])*(?<![\w-])(?<!- )", re.DOTALL)
NEGATION = re.compile(r"\b(?:not|minus|negative|than)\W*$", re.IGNORECASE)


def answer_value(text: str) -> Fraction | None:
    """The value of an answer as people write it: a number, the last side of an equation that is one, or the only
    number of a sentence (The answer is 72). None for several numbers."""
    value = parse_number(text)
    if value is not None or len(text) > MAX_NUMBER_CHARS:
        return value
    sides = EQUALS.split(text)
    if any(LIST.search(side) for side in sides[1:-1]):  # x = 5, y = 72
        return None
    if len(sides) > 1:
        return parse_number(sides[-1])
    text = normalize(text)
    numbers = list(NUMBER_IN_TEXT.finditer(text))
    if len(numbers) != 1:
        return None
    before, rest = text[: numbers[0].start()], text[numbers[0].start() :]
    if not WORDS_BEFORE_NUMBER.fullmatch(before) or NEGATION.search(before):
        return None
    return parse_number(rest)


# ---------------------------------------------------------------------------------------------------------------------
# answers in completions

NUMBERED_HEADING = re.compile(r"[0-9]+[.)]\s+\w")
AFTER_HASHES = re.compile(r"####((?:(?!####)[^\n])*)")  # GSM8K's final answer; or a heading, such as #### Step 1
ANSWER_IS = re.compile(r"^\W*(?:so |thus |therefore,? )?(?:the )?(?:final |correct )?answer(?: is|:)\s*", re.IGNORECASE)


def last_tagged(text: str, opening: str, closing: str) -> str | None:
    """The text between the last closing tag and the last opening tag before it."""
    end = text.rfind(closing)
    if end < 0:
        return None
    start = text.rfind(opening, 0, end)
    if start < 0:
        return None
    return text[start + len(opening) : end]


def last_boxed(text: str) -> tuple[int, str] | None:
    r"""Where the last \boxed{..} begins, and its content, which may hold braces of its own."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    content = start + len(r"\boxed{")
    depth = 1
    for end in range(content, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return start, text[content:end]
    return None


def last_after_hashes(completion: str, *, is_number: bool) -> tuple[int, str] | None:
    """Where the last #### with an answer is, and the rest of its line.

    Where the answer is a number, a line counts that gives one; one with other words is a heading unless it is the last.
    """
    for match in reversed(list(AFTER_HASHES.finditer(completion))):
        text = match[1].strip()
        is_answer = parse_number(EQUALS.split(text)[-1]) is not None and not NUMBERED_HEADING.match(text)
        if ANSWER_IS.match(text):
            is_answer = answer_value(text) is not None
        if is_answer or not is_number or not completion[match.end() :].strip():
            return match.start(), text
    return None


def marked_answer(completion: str, *, is_number: bool = True) -> str | None:
    r"""What a completion marks as its answer: in <answer>..</answer>, else the last of #### and \boxed{..}.

    is_number: whether the right answer is one.
    """
    tagged = last_tagged(completion, "<answer>", "</answer>")
    if tagged is not None:
        return tagged.strip()
    marked = [last_boxed(completion), last_after_hashes(completion, is_number=is_number)]
    return max(filter(None, marked), default=(0, None))[1]


def extract_answer(completion: str) -> str | None:
    """The answer of a completion, a number: all of what it marks as such, else its last number; None without either."""
    answer = marked_answer(completion)
    if answer is None:
        for match in NUMBER_IN_TEXT.finditer(normalize(completion)):
            answer = match[0]
    return answer


def extract_vote(completion: str, reference: str) -> str | None:
    """The answer that a completion gives in a majority vote; a text that it does not mark is all of it."""
    if parse_number(reference) is not None:
        return extract_answer(completion)
    return marked_answer(completion, is_number=False) or completion


BARE_ARGUMENT = re.compile(r"(\\sqrt|\\frac(?:\{[^{}]*\})?) ?([0-9a-z])")  # \sqrt2, \frac12
SPACE_IN_FORMULA = re.compile(r"(?<![^\W\d_])\s+|\s+(?![^\W\d_])")  # not between two words
CHOICE = re.compile(r"\(([a-z])\)")


def normalize_answer(text: str) -> str:
    """Text without what makes no difference between answers: case, spaces, final punctuation, the words "the answer
    is", a choice's brackets, and LaTeX's fonts, sizes and dollars."""
    text = LATEX_SIZE.sub("", LATEX_TEXT.sub(r"\1", ANSWER_IS.sub("", text))).casefold()
    text = re.sub(r"\\[cdt]frac", r"\\frac", text.replace(r"\!", "").replace("$", ""))
    for _ in range(2):  # a fraction has two arguments
        text = BARE_ARGUMENT.sub(r"\1{\2}", text)
    text = SPACE_IN_FORMULA.sub("", " ".join(text.split())).rstrip(" .,;:!?")
    return CHOICE.sub(r"\1", text) if CHOICE.fullmatch(text) else text


def same_answer(answer: str | None, reference: str) -> bool:
    """Whether an answer equals the right one: as a number if the right one is a number, else as normalized text."""
    if answer is None:
        return False
    value = parse_number(reference)
    if value is None:
        return normalize_answer(answer) == normalize_answer(reference)
    return answer_value(answer) == value


def is_correct(completion: str, reference: str) -> bool:
    """Whether a completion gives the right answer.

    An answer that it marks must give one number. If the right answer is text, a completion that marks none is the
    answer.
    """
    if parse_number(reference) is not None:
        return same_answer(extract_answer(completion), reference)
    answer = marked_answer(completion, is_number=False)
    return same_answer(completion if answer is None else answer, reference)


def partial_credit(completion: str, reference: str) -> float:
    """1.0 if the answer is right or within a tenth of it (their ratio in [0.9, 1.1], as in agent_tunix), else 0.0."""
    value = answer_value(extract_answer(completion) or "")
    expected = parse_number(reference)
    if value is not None and expected and Fraction(9, 10) <= value / expected <= Fraction(11, 10):
        return 1.0
    return float(is_correct(completion, reference))


# ---------------------------------------------------------------------------------------------------------------------
# problems: rows with a prompt and its right answer

GSM8K_PROMPT = (
    "{question}\n"
    "Reason step by step between <reasoning> and </reasoning>. "
    "Then write the final number alone between <answer> and </answer>.\n"
)
CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations: 48/2 = <<48/2=24>>24


def to_problem(row: Row) -> Row:
    """A row as a problem, which has `prompt` and `answer`. Raises UserError for a row that is none.

    A row with a prompt and an answer keeps them, the answer as text, without a solution before ####. A row of GSM8K's
    (`question`, and an `answer` that ends in #### 72) becomes a prompt that asks for the format, the bare answer, and
    the worked solution as `completion`.
    """
    answer = row.get("answer")
    is_answer = isinstance(answer, str | int | float) and not isinstance(answer, bool)
    if isinstance(row.get("prompt"), str | list) and is_answer:
        return {**row, "answer": str(answer).rpartition("####")[2].strip()}
    question = row.get("question")
    if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
        raise UserError(
            f"has the fields {', '.join(row) or 'none'}; needs a prompt and an answer, "
            "or GSM8K's question and an answer that ends in #### and the number"
        )
    solution, _, final = answer.rpartition("####")
    solution = CALCULATOR.sub("", solution).strip()
    final = final.strip()
    return {
        "prompt": GSM8K_PROMPT.format(question=question.strip()),
        "completion": f"<reasoning>\n{solution}\n</reasoning>\n<answer>{final}</answer>",
        "answer": final,
    }
