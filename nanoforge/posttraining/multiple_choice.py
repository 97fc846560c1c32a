"""Multiple choice: rows with a question, its choices and which is right, scored by a model's log-likelihoods.

    {"question": "Which is a color?", "choices": ["blue", "two"], "answer": 0}
    {"prompt": "The sky is", "choices": [" blue", " two"], "answer": "A"}
    {"question": .., "choices": {"text": ["blue", "two"], "label": ["1", "2"]}, "answerKey": "1"}           as in ARC

A prompt and a choice follow each other as they are; a prompt may be a list of messages. A question stands between
"Question:" and "Answer:", and a space before the choice, as lm-eval has it for ARC.
"""

import json
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nanoforge.data.tables import Row, check_text, preview
from nanoforge.errors import UserError
from nanoforge.models.likelihood import Pair, encode_pair
from nanoforge.posttraining.example_rows import (
    PlacedRow,
    RowSource,
    check_text_or_messages,
    check_text_or_number,
    numbered_rows,
)
from nanoforge.posttraining.examples import ExampleEncoder
from nanoforge.posttraining.row_shapes import rename_columns

QUESTION_PROMPT = "Question: {}\nAnswer:"


class ChoiceQuestion(NamedTuple):
    """A row of multiple choice."""

    row: Row  # with the prompt, or with the fields of a prompt format
    choices: list[str]
    answer: int  # index of the right choice
    delimiter: str  # before each choice


# ---------------------------------------------------------------------------------------------------------------------
# rows


def has_choices(source: RowSource) -> bool:
    """Whether the rows, as the first one shows, are of multiple choice. Raises UserError."""
    _, row = next(iter(numbered_rows(source)), (0, Row()))
    return row.get("choices") is not None


def read_questions(
    source: RowSource, fields: Sequence[str], columns: Mapping[str, str], most: int
) -> list[ChoiceQuestion]:
    """The first `most` questions (0: all). fields: of a prompt format, if there is one, instead of a prompt.

    Raises UserError with the place of a row that is none.
    """
    questions: list[ChoiceQuestion] = []
    for line, row in numbered_rows(source):
        if most and len(questions) == most:
            break
        try:
            question = to_question(rename_columns(row, columns), fields)
        except UserError as error:
            raise UserError(f"{source}:{line}: {error}") from None
        questions.append(question._replace(row=PlacedRow(question.row, f"{source}:{line}")))
    return questions


def to_question(row: Row, fields: Sequence[str] = ()) -> ChoiceQuestion:
    """A row as a question. Raises UserError."""
    labels, choices = read_choices(row.get("choices"))
    name = "answer" if row.get("answer") is not None else "answerKey"
    answer = find_answer(row.get(name), labels, name)
    if fields:
        missing = [field for field in fields if field not in row]
        if missing:
            raise UserError(f"has no {', '.join(missing)}, which the run's --prompt_format names")
        values = {field: check_text_of(field, row[field]) for field in fields}
        return ChoiceQuestion({**row, **values}, choices, answer, delimiter="")
    if row.get("prompt") is not None:
        prompt = check_text_or_messages(row["prompt"], for_template=True)
        return ChoiceQuestion({**row, "prompt": prompt}, choices, answer, delimiter="")
    if row.get("question") is None:
        raise UserError(f"has the fields {', '.join(row)}; multiple choice needs a prompt or a question")
    prompt = QUESTION_PROMPT.format(check_text(row["question"], "question"))
    return ChoiceQuestion({**row, "prompt": prompt}, choices, answer, delimiter=" ")


def check_text_of(name: str, value: object) -> str:
    """A field's text or number, as text. Raises UserError that names the field."""
    try:
        return check_text_or_number(value)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def read_choices(value: Any) -> tuple[list[str], list[str]]:
    """(labels, texts) of a list of texts, or of ARC's {"text", "label"}; of JSON in a cell too. Raises UserError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"choices: must be a list of texts, not {preview(value)}") from None
    texts = value.get("text") if isinstance(value, dict) else value
    if not isinstance(texts, list) or len(texts) < 2:
        raise UserError(f"choices: must be a list of two texts or more, not {preview(value)}")
    choices = [check_text_of("choices", text) for text in texts]
    if "" in choices:
        raise UserError("choices: one is empty")
    labels = value.get("label") if isinstance(value, dict) else None
    if labels is None:
        labels = string.ascii_uppercase
    if len(labels) < len(choices):
        raise UserError(f"choices: {len(choices)} have {len(labels)} labels")
    return [str(label) for label in labels[: len(choices)]], choices


def find_answer(value: Any, labels: Sequence[str], name: str) -> int:
    """The index of the right choice, which is named by its label or, counted from 0, by its index. Raises UserError."""
    text = str(value).strip()
    if text in labels:
        return labels.index(text)
    if text.isdecimal() and int(text) < len(labels) and not isinstance(value, bool):
        return int(text)
    raise UserError(f"{name}: must be one of {', '.join(labels)} or 0 to {len(labels) - 1}, not {preview(value)}")


# ---------------------------------------------------------------------------------------------------------------------
# scores


def encode_choices(question: ChoiceQuestion, encoder: ExampleEncoder) -> list[Pair]:
    """The ids of the prompt and of each choice. Raises UserError.

    A text prompt and a choice are encoded as one text, as in lm-eval; behind a chat, or the prompt format of a soft
    prompt, a choice is encoded by itself, as in training.
    """
    prompt, tokenizer = question.row.get("prompt"), encoder.tokenizer
    texts = [question.delimiter + choice for choice in question.choices]
    if encoder.template is None and isinstance(prompt, str):
        return [encode_pair(tokenizer, prompt, text) for text in texts]
    ids = encoder.encode_prompt(question.row)
    encode = tokenizer.encode if encoder.chat_template is None else lambda text: tokenizer.encode_inside(text).ids
    return [Pair(ids, encode(text).tolist()) for text in texts]


def choice_metrics(logps: Sequence[float], choices: Sequence[str], answer: int) -> dict[str, float]:
    """Whether the right choice is the likeliest one: by its log-likelihood, by that per character, and per byte.

    lm-eval's acc, acc_norm and acc_bytes; of equally likely choices it is the first.
    """
    lengths = {
        "accuracy": np.ones(len(choices)),
        "acc_norm": np.array([len(choice) for choice in choices]),
        "acc_bytes": np.array([len(choice.encode()) for choice in choices]),
    }
    return {name: float(np.argmax(np.array(logps) / length) == answer) for name, length in lengths.items()}
