"""Shapes of rows: which columns of public datasets hold what, and how they become TRL's fields.

    {"conversations": [{"from": "human", "value": ..}, {"from": "gpt", ..}]}  ->  {"messages": [USER, ASSISTANT]}
    {"instruction": .., "input": .., "output": ..}                            ->  {"messages": [USER, ASSISTANT]}
    {"question": .., "response": ..}                                          ->  {"prompt": .., "completion": ..}

`SHAPES` is the table. A row that has TRL's fields is read by them; else the first shape fits that has its columns and
makes the fields that the objective needs. A shape of chats becomes messages, which the model's chat template or role
tokens are put around, as LLaMA-Factory and torchtune do; other texts stay texts. A map of the user's comes before all.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nanoforge.console import plural
from nanoforge.data.tables import Row, check_text, preview
from nanoforge.errors import UserError, did_you_mean
from nanoforge.posttraining.answers import to_problem

SPEAKERS = {  # ShareGPT's names -> roles
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
FIELDS = ("prompt", "completion", "messages", "text", "chosen", "rejected", "label", "answer")  # TRL's, and the answer
PARTS = (*FIELDS, "system", "history", "input")  # what a column may hold: a field, or a part of the prompt
PROMPT_PARTS = ("messages", "system", "history", "prompt", "input")
MADE_OF = {  # field -> the parts that it is made of; others are what they are
    "messages": (*PROMPT_PARTS, "completion"),
    "prompt": PROMPT_PARTS,
    "completion": ("completion", "messages"),
    "answer": ("answer", "completion", "messages"),
}

# ---------------------------------------------------------------------------------------------------------------------
# values


def to_messages(value: Any, column: str) -> Any:
    """ShareGPT's turns {"from", "value"} as messages {"role", "content"}; anything else as it is. Raises UserError."""
    if isinstance(value, dict):  # one message, as LLaMA-Factory has them in chosen and rejected
        value = [value]
    if not isinstance(value, list) or not any(is_turn(message) for message in value):
        return value
    return [to_message(message, f"{column}: message {i}") for i, message in enumerate(value, start=1)]


def is_turn(message: object) -> bool:
    """Whether it is a turn of ShareGPT's; tables may fill in the other names with null."""
    return isinstance(message, dict) and message.get("from") is not None and message.get("role") is None


def to_message(message: Any, place: str) -> Row:
    """A turn as a message. Raises UserError, which begins with its place."""
    if not is_turn(message):
        raise UserError(f'{place} must be {{"from": name, "value": text}}, as the others are, not {preview(message)}')
    speaker = message["from"]
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        names = ", ".join(SPEAKERS)
        suggestion = did_you_mean(speaker, SPEAKERS) if isinstance(speaker, str) else ""
        raise UserError(f"{place} is from {preview(speaker)}, which is none of {names}{suggestion}")
    if role == "assistant" and message.get("weight") == 0:
        raise UserError(f"{place} has weight 0, which would be lost; leave such rows out with --bad_rows=skip")
    others = {name: value for name, value in message.items() if name not in ("from", "value", "weight")}
    return {**others, "role": role, "content": check_text(message.get("value"), f"{place}, value")}


def to_history(value: Any, column: str) -> list[Row]:
    """Alpaca's pairs of an instruction and a response as messages. Raises UserError."""
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise UserError(f"{column}: must be a list of [instruction, response], not {preview(value)}")
    messages = []
    for i, pair in enumerate(value, start=1):
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": check_text(text, f"{column}, pair {i}")})
    return messages


# ---------------------------------------------------------------------------------------------------------------------
# a shape


class Part(NamedTuple):
    """The value of a part, and the column that it was in."""

    value: Any
    column: str


def always(row: Row) -> bool:
    return True


@dataclass(frozen=True)
class Shape:
    """Which columns hold which parts of an example."""

    name: str  # for the report
    needs: Mapping[str, str]  # column -> part
    reads: Mapping[str, str] = field(default_factory=dict)  # the same for columns that a row may lack
    is_chat: bool = False  # the prompt is a user's message, not a text
    fits: Callable[[Row], bool] = always  # a further condition
    make: Callable[[Row], Row] | None = None  # the fields, where they are not those of the parts

    @functools.cached_property
    def columns(self) -> dict[str, str]:
        """column -> part."""
        return {**self.needs, **self.reads}

    def parts(self, row: Row) -> dict[str, Part]:
        """The parts that a row has; what is null is missing."""
        return {part: Part(row[name], name) for name, part in self.columns.items() if row.get(name) is not None}

    def fields(self, row: Row, parts: Mapping[str, Part]) -> Row:
        """All the fields that the row, which has these parts, can give. Raises UserError."""
        if self.make is not None:
            return self.make(row)
        made = {name: to_messages(parts[name].value, parts[name].column) for name in FIELDS if name in parts}
        if "messages" in parts:
            return made | chat_fields(parts, made)
        if "prompt" in parts:
            return made | prompt_fields(parts, made, is_chat=self.is_chat)
        return made


def chat_fields(parts: Mapping[str, Part], made: Row) -> Row:
    """A chat with its system message; apart from it the last reply, or the prompt of chosen and rejected replies."""
    chat = made["messages"]
    if not isinstance(chat, list):  # which is refused as the field is checked
        return {}
    chat = with_system(chat, parts)
    if "chosen" in parts or "completion" in parts:
        return {"prompt": chat}
    if not has_role(chat[-1:], "assistant"):
        return {"messages": chat, "prompt": chat}
    answer = {} if "answer" in parts else {"answer": chat[-1].get("content")}
    return {"messages": chat, "prompt": chat[:-1], "completion": chat[-1:], **answer}


def prompt_fields(parts: Mapping[str, Part], made: Row, *, is_chat: bool) -> Row:
    """A prompt from its parts: a text, or messages if the shape is one of chats or the row has a system message."""
    fields: Row = {}
    completion = made.get("completion")
    if completion is not None and "answer" not in parts:
        fields["answer"] = completion
    if isinstance(made["prompt"], list) and not {"input", "history"} & parts.keys():
        return fields | {"prompt": with_system(made["prompt"], parts)}
    texts = [check_text(*parts[name]) for name in ("prompt", "input") if name in parts]
    fields["prompt"] = "\n".join(text for text in texts if text)
    context = with_system([], parts)
    if "history" in parts:
        context += to_history(*parts["history"])
    if is_chat or context:
        fields["prompt"] = [*context, {"role": "user", "content": fields["prompt"]}]
        if isinstance(completion, str):
            fields["messages"] = [*fields["prompt"], {"role": "assistant", "content": completion}]
    return fields


def with_system(chat: list[Row], parts: Mapping[str, Part]) -> list[Row]:
    """The chat after the column's system message, unless that is empty or the chat has its own. Raises UserError."""
    if "system" not in parts or has_role(chat[:1], "system"):
        return chat
    content = check_text(*parts["system"])
    return [{"role": "system", "content": content}, *chat] if content else chat


def has_role(messages: Sequence[Any], role: str) -> bool:
    """Whether there is a message, and it is of this role."""
    return any(isinstance(message, dict) and message.get("role") == role for message in messages)


# ---------------------------------------------------------------------------------------------------------------------
# the table

SYSTEM = {"system": "system", "system_prompt": "system"}
REPLIES = {"chosen": "chosen", "rejected": "rejected", "label": "label", "kto_tag": "label"}
MORE = {**SYSTEM, **REPLIES, "history": "history"}


def is_gsm8k(row: Row) -> bool:
    return isinstance(row["answer"], str) and "####" in row["answer"]


# fmt: off
SHAPES = (
    Shape("ShareGPT", {"conversations": "messages"}, {**SYSTEM, **REPLIES}),
    Shape("ShareGPT", {"conversation": "messages"}, {**SYSTEM, **REPLIES}),
    Shape("Alpaca", {"instruction": "prompt", "output": "completion"}, {"input": "input", **MORE}, is_chat=True),
    Shape("Dolly", {"instruction": "prompt", "response": "completion"}, {"context": "input", **MORE}, is_chat=True),
    Shape("Alpaca", {"instruction": "prompt"}, {"input": "input", **MORE}, is_chat=True),  # pairs, and prompts alone
    Shape("GSM8K", {"question": "prompt", "answer": "answer"}, fits=is_gsm8k, make=to_problem),
    Shape("", {"question": "prompt", "answer": "completion"}, MORE),
    Shape("", {"question": "prompt", "response": "completion"}, MORE),
    Shape("", {"question": "prompt"}, MORE),
    Shape("", {"query": "prompt", "answer": "completion"}, MORE),
    Shape("", {"query": "prompt", "response": "completion"}, MORE),
    Shape("", {"query": "prompt"}, MORE),
    Shape("", {"problem": "prompt", "solution": "completion"}, {"answer": "answer"}),
    Shape("", {"problem": "prompt", "answer": "answer"}),
    Shape("", {"prompt": "prompt", "response": "completion"}, MORE),
)
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# the shapes of a file's rows


def parse_columns(items: Iterable[str], parts: Iterable[str] | None = PARTS) -> dict[str, str]:
    """part -> column, from items such as prompt=question. parts: what may be mapped, if not all. Raises UserError."""
    columns: dict[str, str] = {}
    for item in items:
        part, separator, column = (text.strip() for text in item.partition("="))
        if not part or not separator or not column:
            raise UserError(f"--columns={item}: must be FIELD=COLUMN, as in prompt=question,completion=answer")
        if parts is not None and part not in parts:
            suggestion = did_you_mean(part, parts)
            raise UserError(f"--columns={item}: {part} is no field; it is one of {', '.join(parts)}{suggestion}")
        if part in columns:
            raise UserError(f"--columns={item}: {part} is mapped twice")
        columns[part] = column
    return columns


def mapped_shape(columns: Mapping[str, str]) -> Shape:
    """The shape of a map part -> column; fields of the same format that it does not name are where TRL has them."""
    needs = {column: part for part, column in columns.items()}
    formats = [("text",), ("messages",), ("prompt", "completion")]
    mapped_formats = [fields for fields in formats if columns.keys() & {*fields}]
    others = {name for fields in formats if mapped_formats and fields not in mapped_formats for name in fields}
    rest = {name: name for name in FIELDS if name not in {*columns, *needs, *others}}
    return Shape("--columns", needs, rest, is_chat="history" in columns)


def check_columns(row: Row, columns: Mapping[str, str]) -> None:
    """Raises UserError for a row that lacks a mapped column."""
    for column in columns.values():
        if column not in row:
            available = ", ".join(row) or "none"
            raise UserError(f"has no column {column} but {available}{did_you_mean(column, row)}; --columns names it")


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with its mapped columns under the names of the fields as well. Raises UserError."""
    check_columns(row, columns)
    return {**row, **{name: row[column] for name, column in columns.items()}}


class ShapedRow(NamedTuple):
    """A row with the fields of an alternative, and what they were made from."""

    row: Row
    name: str  # of the shape; empty for TRL's own
    columns: tuple[str, ...]  # that were read
    fields: tuple[str, ...]


Alternatives = Sequence[Sequence[str]]  # of fields: a row is read as the first one that it can give


def shape_row(row: Row, alternatives: Alternatives, columns: Mapping[str, str] | None = None) -> ShapedRow | None:
    """The row by the first shape that gives an alternative; None if none does. columns: the user's map.

    TRL's own fields come first, but for texts and implicit prompts, which are what is left. Raises UserError.
    """
    if columns:
        check_columns(row, columns)
        return apply_shape(mapped_shape(columns), row, alternatives)
    explicit = [fields for fields in alternatives if "prompt" in fields or "messages" in fields]
    shaped = own_fields(row, explicit)
    if shaped is not None:
        return shaped
    for shape in find_shapes(frozenset(name for name, value in row.items() if value is not None)):
        shaped = apply_shape(shape, row, alternatives) if shape.fits(row) else None
        if shaped is not None:
            return shaped
    return own_fields(row, alternatives)


@functools.lru_cache(maxsize=1024)
def find_shapes(columns: frozenset[str]) -> list[Shape]:
    """The shapes whose columns are among these, which are not null."""
    return [shape for shape in SHAPES if shape.needs.keys() <= columns]


def own_fields(row: Row, alternatives: Alternatives) -> ShapedRow | None:
    """The row by the first of TRL's own formats whose fields it has, not all of them null."""
    for fields in alternatives:
        if all(name in row for name in fields) and any(row[name] is not None for name in fields):
            return ShapedRow({**row, **{name: to_messages(row[name], name) for name in fields}}, "", (), tuple(fields))
    return None


def apply_shape(shape: Shape, row: Row, alternatives: Alternatives) -> ShapedRow | None:
    """The row by a shape, if that gives an alternative: of chats the whole chat before its parts. Raises UserError."""
    parts = shape.parts(row)
    made = shape.fields(row, parts)
    for fields in sorted(alternatives, key=lambda fields: "messages" not in fields):
        if all(made.get(name) is not None for name in fields):
            columns = read_columns(parts, fields)
            read = tuple(name for name in row if name in columns)
            names = {name for alternative in alternatives for name in alternative}
            others = {name: value for name, value in row.items() if name not in read and name not in names}
            chosen = made if shape.make else {name: made[name] for name in fields}
            return ShapedRow({**others, **chosen}, shape.name, read, tuple(fields))
    return None


def read_columns(parts: Mapping[str, Part], fields: Sequence[str]) -> set[str]:
    """The columns that fields are made of."""
    made_of = {part for name in fields for part in MADE_OF.get(name, (name,))}
    if "answer" in fields and "answer" in parts and "completion" not in fields:
        made_of.discard("completion")
    return {part.column for name, part in parts.items() if name in made_of}


class ShapeReport:
    """Counts what the rows of a file were made from."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, tuple[str, ...]], int] = {}  # (shape, fields) -> rows
        self.read: dict[tuple[str, tuple[str, ...]], dict[str, None]] = {}  # -> columns
        self.columns: dict[str, None] = {}  # of all rows

    def add(self, shaped: ShapedRow, row: Row) -> None:
        """A row, and what was made of it."""
        key = (shaped.name, shaped.fields) if shaped.columns else ("", shaped.fields)
        self.counts[key] = self.counts.get(key, 0) + 1
        self.read.setdefault(key, {}).update(dict.fromkeys(shaped.columns))
        self.columns.update(dict.fromkeys(name for name, value in row.items() if value is not None))

    @property
    def is_mapped(self) -> bool:
        """Whether a row was read by other columns than TRL's."""
        return any(self.read.values())

    def describe(self, source: str, others: str, read_too: Iterable[str] = ()) -> list[str]:
        """A line for each shape. others: how the columns are called that nothing was made from, but for read_too."""
        used = {name for (_, fields), read in self.read.items() for name in (read or fields)} | {*read_too}
        rest = [name for name in self.columns if name not in used]
        lines = []
        for (name, fields), count in self.counts.items():
            read = ", ".join(self.read[(name, fields)])
            shape = f"{name}'s " if name and name != "--columns" else ""
            mapped = f"{shape}{read} -> {', '.join(fields)}" if read else ", ".join(fields)
            lines.append(f"{source}: {mapped}; {plural(count, 'row')}")
        return [f"{line}; {others}: {', '.join(rest)}" for line in lines] if rest else lines
