"""Rows of examples: what each field may hold, checked, and brought into one form for each type of example.

The types and formats are those of TRL. A standard row has texts; a conversational one has lists of messages, each
{"role", "content"}. The prompt of a preference may be implicit: the common beginning of chosen and rejected.

    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    {"prompt": [USER], "completion": [ASSISTANT], "label": True}
    {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER_ASSISTANT]}

A value that its field can't hold is refused by file, line and field, or its row is skipped and counted. Imports neither
torch nor numpy, so that files can be checked before a run starts.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge.data import tables
from nanoforge.data.row_splits import RowSplit
from nanoforge.data.tables import Row, check_text, preview
from nanoforge.errors import UserError
from nanoforge.posttraining import row_shapes
from nanoforge.posttraining.row_shapes import ShapedRow, ShapeReport

ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
UNREAD_PARTS = ("tool_calls", "function_call", "reasoning_content", "thinking")  # of a message that says more than text
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # of a row, which a chat template reads besides its messages
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}

Message = dict[str, Any]  # with a chat template, which may read more of it than role and content

# ---------------------------------------------------------------------------------------------------------------------
# one value: each function returns it in its one form, or raises UserError


def check_text_or_number(value: object) -> str:
    """Text, or a finite number as Python writes it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number and not isinstance(value, str):
        raise UserError(f"must be text or a number, not {preview(value)}")
    return check_text(str(value))


def check_messages(value: object, *, for_template: bool = False) -> list[Message]:
    """A list of messages; what a message has besides role and content is left out, unless a template may read it."""
    if not isinstance(value, list):
        raise UserError(f"must be a list of messages, not {preview(value)}")
    if not value:
        raise UserError("is an empty list; a chat has at least one message")
    check = check_template_message if for_template else check_message
    return [check(message, number) for number, message in enumerate(value, start=1)]


def check_template_message(message: object, number: int) -> Message:
    """A message of any role, for a chat template, with all that it has besides role and content."""
    problem = f"message {number} is {preview(message)}"
    if isinstance(message, dict):
        known = {name: value for name, value in message.items() if value is not None}
        role, content = known.get("role"), known.get("content")
        if not isinstance(role, str) or not re.fullmatch(r"[\w-]+", role):
            problem = f"message {number} has role {preview(role)}"
        elif not isinstance(content, str) and (content is not None or len(known) < 2):
            problem = f"message {number} has content {preview(content)}"
        elif not tables.is_unicode(json.dumps(known, ensure_ascii=False, default=str)):
            problem = f"message {number} has half of a surrogate pair, which is no text"
        else:
            return known
    raise UserError(f'a message is {{"role": ..., "content": text}}; {problem}')


def check_message(message: object, number: int) -> Message:
    """A message, which is the `number`th of its list."""
    problem = f"message {number} is {preview(message)}"
    if isinstance(message, dict):
        role, content = message.get("role"), message.get("content")
        unread = [name for name in UNREAD_PARTS if message.get(name)]
        if unread:
            raise UserError(f"message {number} has {' and '.join(unread)}, which would be lost; put it in the content")
        if isinstance(role, str) and role in ROLES and isinstance(content, str) and tables.is_unicode(content):
            return {"role": role, "content": content}
        problem = f"message {number} has role {preview(role)} and content {preview(content)}"
    raise UserError(f'a message is {{"role": one of {", ".join(ROLES)}, "content": text}}; {problem}')


def check_text_or_messages(value: object, *, for_template: bool = False) -> str | list[Message]:
    if isinstance(value, list):
        return check_messages(value, for_template=for_template)
    if not isinstance(value, str):
        raise UserError(f"must be text or a list of messages, not {preview(value)}")
    return check_text(value)


def check_label(value: object) -> bool:
    """true or false from JSON or from a cell of a table, where it is text or a number."""
    label = LABELS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
    if label is None:
        raise UserError(f"must be true or false (or 1 or 0), not {preview(value)}")
    return label


CHECKS: dict[str, Callable[..., Any]] = {
    "text": check_text,
    "messages": check_messages,
    "prompt": check_text_or_messages,
    "completion": check_text_or_messages,
    "chosen": check_text_or_messages,
    "rejected": check_text_or_messages,
    "label": check_label,
    "answer": check_text_or_number,
}
MESSAGE_CHECKS = (check_messages, check_text_or_messages)

# ---------------------------------------------------------------------------------------------------------------------
# one row


@dataclass(frozen=True)
class RowFormat:
    """What the rows of a file have to hold, and what they become."""

    fields: Sequence[Sequence[str]]  # alternatives: a row is read as the first one whose fields it has
    example_type: str  # as in objective_specs.py
    needed_by: str  # the flag that asks for the fields, for errors
    is_template: bool = False  # a prompt format is put around the fields, which are texts or numbers
    has_chat_template: bool = False  # which decides what roles there are, and what it reads of a message
    columns: Mapping[str, str] = field(default_factory=dict)  # field -> the column that has it, where they are mapped

    def shape(self, row: Row) -> ShapedRow:
        """The row with the fields of an alternative, if its columns give one (row_shapes.py). Raises UserError."""
        if self.is_template:
            renamed = row_shapes.rename_columns(row, self.columns)
            return ShapedRow(renamed, "", tuple(self.columns.values()), tuple(self.columns))
        return row_shapes.shape_row(row, self.fields, self.columns) or ShapedRow(row, "", (), ())

    def parse(self, row: Row) -> list[Row]:
        """The row as examples, one or the two of a pair that are labelled apart. Raises UserError."""
        fields = self.choose_fields(row)
        others = {name for alternative in self.fields for name in alternative} - {*fields}
        checked = {name: value for name, value in row.items() if name not in others}
        for name in fields:
            checked[name] = self.check_field(name, row[name])
        if self.is_template:
            return [checked]
        if "chosen" in fields:
            checked = make_preference(checked)
        checked = one_format(checked, [name for name in ("completion", "chosen", "rejected") if name in fields])
        if self.example_type in ("unpaired_preference", "prompt_only"):
            for name in ("prompt", "answer"):
                if checked.get(name) == "":
                    raise UserError(f"{name}: is empty; {self.needed_by} needs one")
        if self.example_type == "unpaired_preference" and "chosen" in fields:
            return unpair(checked)
        return [checked]

    def choose_fields(self, row: Row) -> Sequence[str]:
        """The alternative that a row is read as. Fields that are all null, as tables fill them in, count as missing.

        Raises UserError if the row has none of them.
        """
        present = [alternative for alternative in self.fields if all(name in row for name in alternative)]
        for alternative in present:
            if any(row[name] is not None for name in alternative):
                return alternative
        if present:
            return present[0]
        wanted = " or ".join("{" + ", ".join(alternative) + "}" for alternative in self.fields)
        raise UserError(
            f"has the fields {', '.join(row)}; {self.needed_by} needs {wanted}; "
            "name the columns with --columns, as in --columns=prompt=question"
        )

    def check_field(self, name: str, value: object) -> Any:
        """The value in its one form. Raises UserError with the field's name."""
        check = CHECKS.get(name, check_text)
        if self.is_template and name != "label":
            check = check_text_or_number
        options = {"for_template": True} if self.has_chat_template and check in MESSAGE_CHECKS else {}
        try:
            return check(value, **options)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    def other_formats(self, row: Row) -> list[str]:
        """The fields of alternatives that a row has besides the one that it is read as, and that are not read."""
        fields = self.choose_fields(row)
        names = [name for alternative in self.fields for name in alternative if name not in fields]
        return [name for name in dict.fromkeys(names) if row.get(name) is not None]


def as_messages(value: str | list[Message], role: str) -> list[Message]:
    """A text as the one message of a role; messages as they are."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def one_format(row: Row, completions: Sequence[str]) -> Row:
    """The row with its prompt and completions all as texts, or all as messages. Raises UserError.

    Beside messages, a text is the user's message as a prompt, and the assistant's as a completion.
    """
    names = ["prompt", *completions]
    if "prompt" not in row or not any(isinstance(row[name], list) for name in names):
        return row
    for name in completions:
        is_reply = isinstance(row[name], str) or row[name][0]["role"] == "assistant"
        if isinstance(row["prompt"], str) and not is_reply:
            raise UserError(f"{name}: is a chat that begins with another prompt; give prompt as a list of messages")
    messages = {name: as_messages(row[name], "assistant") for name in completions}
    return {**row, "prompt": as_messages(row["prompt"], "user"), **messages}


def make_preference(row: Row) -> Row:
    """A pair with its prompt, which is implicit if the row has none, or a text beside chats that begin with it.

    Raises UserError.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    for name in ("chosen", "rejected"):
        other = rejected if name == "chosen" else chosen
        if isinstance(row[name], str) and isinstance(other, list) and "prompt" not in row:
            raise UserError(f"{name}: must be a list of messages, as the other of the pair is")
    if isinstance(row.get("prompt"), list):
        return row
    chats = [value for value in (chosen, rejected) if isinstance(value, list)]
    has_whole_chats = len(chats) == 2 and all(chat[0]["role"] != "assistant" for chat in chats)
    if "prompt" in row and not has_whole_chats:
        return row
    return {**row, **extract_prompt(chosen, rejected)}


def extract_prompt(chosen: Any, rejected: Any) -> Row:
    """TRL's implicit prompt: the common beginning of two texts or chats; what is left of each is its completion.

    A space between a prompt and the completions belongs to these. Raises UserError.
    """
    shortest = min(len(chosen), len(rejected))
    if not shortest:
        raise UserError(f"{'rejected' if chosen else 'chosen'}: is empty, and the row has no prompt")
    start = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    has_end = start == shortest  # the shorter one has to keep its last character or message
    if has_end or (start and chosen[start - 1] == " "):
        start -= 1
    if isinstance(chosen, list) and not start:
        raise UserError("chosen, rejected: have no first message in common, which would be the prompt")
    return {"prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:]}


def unpair(row: Row) -> list[Row]:
    """A pair as a desirable and an undesirable example, as TRL's unpair_preference_dataset makes them."""
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    return [
        {**rest, "completion": row["chosen"], "label": True},
        {**rest, "completion": row["rejected"], "label": False},
    ]


# ---------------------------------------------------------------------------------------------------------------------
# a file of rows


class PlacedRow(Row):
    """A row that knows where it was read: its file and line, for errors."""

    def __init__(self, row: Row, place: str):
        super().__init__(row)
        self.place = place


def place_of(row: Mapping[str, Any], otherwise: str) -> str:
    """Where a row was read, or what to say if that is not known."""
    return row.place if isinstance(row, PlacedRow) else otherwise


class ExampleRows(NamedTuple):
    """The rows of a file, and what its reader has to say about them."""

    rows: list[Row]
    notes: list[str]


RowSource = Path | RowSplit


def numbered_rows(source: RowSource) -> Iterator[tuple[int, Row]]:
    """(line, row) of a file or of a split of rows. Raises UserError."""
    return source.numbered_rows() if isinstance(source, RowSplit) else tables.numbered_rows(source)


def read_example_rows(source: RowSource, row_format: RowFormat, bad_rows: str = "error") -> ExampleRows:
    """The examples of a file or a dataset of the hub, brought to the format's fields and checked; of pairs all chosen
    first.

    bad_rows: "error" raises UserError with file, line and field; "skip" counts them. Raises UserError also for a file
    that can't be read or has no rows that can be used.
    """
    examples: list[list[Row]] = []
    skipped: list[str] = []
    unread: dict[str, int] = {}
    report = ShapeReport()
    for line, raw in numbered_rows(source):
        place = f"{source}:{line}"
        try:
            shaped = row_format.shape(raw)
            parsed: list[Row] = [PlacedRow(example, place) for example in row_format.parse(shaped.row)]
        except UserError as error:
            if bad_rows == "error":
                raise UserError(f"{place}: {error}") from None
            skipped.append(f"{place}: {error}")
            continue
        examples.append(parsed)
        report.add(shaped, raw)
        for name in row_format.other_formats(shaped.row):
            unread[name] = unread.get(name, 0) + 1
    if not examples:
        reason = f"all {len(skipped)} rows are bad, the first: {skipped[0]}" if skipped else "has no rows"
        raise UserError(f"{source}: {reason}")
    notes = [f"{source}: {count} rows also have {name}, which is not read" for name, count in unread.items()]
    if report.is_mapped or isinstance(source, RowSplit):
        where = source.describe() if isinstance(source, RowSplit) else str(source)
        others = "also there, for rewards" if row_format.example_type == "prompt_only" else "not read"
        notes = report.describe(where, others, TEMPLATE_COLUMNS if row_format.has_chat_template else ())
    if skipped:
        notes.append(describe_skipped(source, skipped))
    rows = [example for number in range(2) for parsed in examples for example in parsed[number : number + 1]]
    return ExampleRows(rows, notes)


def describe_skipped(source: object, errors: Sequence[str]) -> str:
    """How many rows --bad_rows=skip has skipped, and why the first of them."""
    return f"{source}: --bad_rows=skip skipped {len(errors)} rows, the first: {errors[0]}"


def has_messages(rows: Iterable[Row]) -> bool:
    """Whether a row has a chat."""
    names = [name for name, check in CHECKS.items() if check in MESSAGE_CHECKS]
    return any(isinstance(row.get(name), list) for row in rows for name in names)
