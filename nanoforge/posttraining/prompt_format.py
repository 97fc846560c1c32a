r"""The template language of soft prompts (ruprompts'): how an example becomes trainable rows, its fields' text and literal text.

    <P*60>           60 trainable rows; 1 to 10,000
    <P>              one row
    <P>text</P>      a row for each token of the text, which starts as this token's embedding
    {field}          a field of the example, by any name without braces
    anything else    literal text, frozen
    {{ }} \< \\      a brace, <, backslash; \n and \t as usual, since shells pass them on as they are

A <P> opens a <P>text</P> if the next of <P>, <P*N> and </P> is a </P>; else it is a row by itself. So <P*20>text is 20 rows and then
literal text, <P>a<P>b</P> is a row, the literal a and rows for b, and a </P> whose <P> is out of reach is a mistake. Only what begins
with <P>, <P* or </P> is special: <Perhaps>, <p> and a < b are literal.

Each piece is encoded by itself: no token reaches over a piece's border, and a space belongs to the piece in which it is written.
Imports neither torch nor numpy, so that a template is checked before they are loaded.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from nanoforge.errors import UserError, did_you_mean

MOST_ROWS = 10_000  # of one <P*N>: more is a slip of the finger
OVERFLOWS = ("error", "drop", "truncate_target")

ESCAPES = {"{{": "{", "}}": "}", r"\<": "<", r"\\": "\\", r"\n": "\n", r"\t": "\t"}
# Any template is a sequence of these; what is not well formed is matched too, and refused by `tokens`.
TOKEN = re.compile(r"(?P<tag></?P>)|<P\*(?P<count>[0-9]*)>?|\{\{|\}\}|\{(?P<field>[^{}]*)\}?|\}|\\.?|<|[^<{}\\]+")

# ---------------------------------------------------------------------------------------------------------------------
# pieces


@dataclass(frozen=True)
class Rows:
    """Trainable rows that start free of any text."""

    count: int


@dataclass(frozen=True)
class Seeded:
    """A trainable row for each token of the text, which starts as the token's embedding."""

    text: str


@dataclass(frozen=True)
class Field:
    name: str


@dataclass(frozen=True)
class Literal:
    text: str


Piece = Rows | Seeded | Field | Literal


class Tokenizer(Protocol):
    """What is used of a tokenizer of parts.text."""

    eos_id: int | None

    def encode(self, text: str) -> Sequence[int]: ...


@dataclass(frozen=True)
class Template:
    """Made by `parse`; has at least one trainable row."""

    pieces: tuple[Piece, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The names, once each, in the order of their first use."""
        return tuple(dict.fromkeys(piece.name for piece in self.pieces if isinstance(piece, Field)))

    def check(self, target_field: str, truncation_field: str | None) -> None:
        """Raises UserError for a target that the model would be shown, and for a field to cut that is not there."""
        if target_field in self.fields:
            raise UserError(
                f"--target_field={target_field}: is in --prompt_format, which would show the model what it is to say"
            )
        if truncation_field == target_field:
            raise UserError(
                f"--truncation_field={truncation_field}: is the target, which --overflow=truncate_target cuts"
            )
        if truncation_field is not None and truncation_field not in self.fields:
            there = ", ".join(self.fields) or "none"
            raise UserError(
                f"--truncation_field={truncation_field}: no field of --prompt_format, which has {there}{did_you_mean(truncation_field, self.fields)}"
            )

    def seeds(self, tokenizer: Tokenizer) -> list[int | None]:
        """For each trainable row, in order: the id of the token whose embedding it starts as, or None. Raises UserError."""
        rows: list[int | None] = []
        for piece in self.pieces:
            if isinstance(piece, Rows):
                rows += [None] * piece.count
            elif isinstance(piece, Seeded):
                ids = to_ids(piece.text, tokenizer, f"--prompt_format: <P>{piece.text}</P>")
                if not ids:
                    raise UserError(f"--prompt_format: <P>{piece.text}</P>: this text has no token, and so no rows")
                rows += ids
        return rows

    def encode(self, values: Mapping[str, object], tokenizer: Tokenizer, first_row: int) -> list[int]:
        """The prompt's ids; trainable row j is first_row + j. Fields that are not in the template are not looked at. Raises UserError."""
        return [*chain.from_iterable(self.encode_pieces(values, tokenizer, first_row))]

    def encode_pieces(self, values: Mapping[str, object], tokenizer: Tokenizer, first_row: int) -> list[list[int]]:
        """The ids of each piece."""
        encoded = []
        for piece in self.pieces:
            if isinstance(piece, Rows | Seeded):
                count = len(Template((piece,)).seeds(tokenizer))
                encoded.append([*range(first_row, first_row + count)])
                first_row += count
            elif isinstance(piece, Field):
                encoded.append(field_ids(values, piece.name, tokenizer))
            else:
                encoded.append(to_ids(piece.text, tokenizer, f"--prompt_format: {piece.text!r}"))
        return encoded

    def example(self, values: Mapping[str, object], tokenizer: Tokenizer, first_row: int, target_field: str, truncation_field: str | None,
                max_tokens: int, overflow: str) -> tuple[list[int], int] | None:  # fmt: skip
        """The ids of the prompt, the target and the end token, if the tokenizer has one: at most max_tokens; and where the target begins.

        An example that is too long loses tokens from the end of truncation_field, down to none (as many at each place where it stands).
        Where that is not enough: overflow="error" raises UserError, "drop" gives None, "truncate_target" cuts the target, its end token
        first, since the text does not end there, and down to its first token; UserError if there is no room for that either.
        Trainable rows, literal text and other fields are never cut. Raises UserError also for what `check` and `encode` refuse.
        """
        assert overflow in OVERFLOWS
        self.check(target_field, truncation_field)
        encoded = self.encode_pieces(values, tokenizer, first_row)
        completion = field_ids(values, target_field, tokenizer) + (
            [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        )
        if not completion:
            raise UserError(
                f"the target {target_field!r} is empty and the tokenizer has no end token: there is nothing to learn"
            )

        places = [i for i, piece in enumerate(self.pieces) if piece == Field(truncation_field)]
        excess = sum(map(len, encoded)) + len(completion) - max_tokens
        for i in places:
            encoded[i] = encoded[i][
                : max(0, len(encoded[i]) + -excess // len(places))
            ]  # -excess // n rounds the cut up; none where excess is negative
        prompt = [*chain.from_iterable(encoded)]
        room = max_tokens - len(prompt)
        if room < len(completion):
            if overflow == "drop":
                return None
            if overflow == "error" or room < 1:
                raise UserError(self.too_long(encoded, target_field, len(completion), truncation_field, max_tokens))
        return prompt + completion[:room], len(prompt)

    def too_long(
        self,
        encoded: list[list[int]],
        target_field: str,
        target_tokens: int,
        truncation_field: str | None,
        max_tokens: int,
    ) -> str:
        """By how many tokens the example is too long, with truncation_field cut already, and what they are."""
        counts = {"rows and literal text": 0, **{f"{{{name}}}": 0 for name in self.fields}}
        for piece, ids in zip(self.pieces, encoded, strict=True):
            counts[f"{{{piece.name}}}" if isinstance(piece, Field) else "rows and literal text"] += len(ids)
        counts[f"target {target_field} and end"] = target_tokens
        excess = sum(counts.values()) - max_tokens
        cut = "" if truncation_field is None else f" with all of --truncation_field={truncation_field} cut"
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        return f"an example exceeds --max_tokens={max_tokens} by {excess}{cut} (tokens: {told}); --overflow=drop leaves such examples out, truncate_target cuts the target where it can"


def to_ids(text: str, tokenizer: Tokenizer, where: str) -> list[int]:
    """Raises UserError, with where, for text that can't be encoded."""
    try:
        text.encode()
        return [*map(int, tokenizer.encode(text))]
    except UnicodeEncodeError:
        raise UserError(f"{where}: half of a surrogate pair is no text") from None
    except UserError as mistake:
        raise UserError(f"{where}: {mistake}") from None


def field_ids(values: Mapping[str, object], name: str, tokenizer: Tokenizer) -> list[int]:
    """Of the field's text, or of a number as Python writes it. Raises UserError."""
    if name not in values:
        raise UserError(
            f"the example has no field {name!r}; it has {', '.join(map(repr, values)) or 'none'}{did_you_mean(name, values)}"
        )
    value = values[name]
    if not isinstance(value, str | int | float):
        raise UserError(f"the field {name!r} must be text or a number, not {value!r:.60}")
    return to_ids(str(value), tokenizer, f"the field {name!r}")


# ---------------------------------------------------------------------------------------------------------------------
# the parser


def malformed(template: str, place: int, expected: str) -> UserError:
    """Shows the template on one line, line breaks as escapes, with a caret under template[place]."""
    shown = [char if char.isprintable() else char.encode("unicode_escape").decode() for char in template]
    column = sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in "".join(shown[:place])
    )
    return UserError(f"--prompt_format: {expected}\n  {''.join(shown)}\n  {' ' * column}^")


def tokens(template: str) -> Iterator[tuple[int, Piece | str]]:
    """Each piece with its place; the tags <P> and </P> as strings. Raises UserError."""
    for match in TOKEN.finditer(template):
        token, start, end, count, field = match[0], match.start(), match.end(), match["count"], match["field"]
        if match["tag"]:
            yield start, token
        elif count is not None:
            if not count:
                raise malformed(template, end, "expected the number of rows, as in <P*60>")
            if token[-1] != ">":
                raise malformed(template, end, "expected > after the number of rows")
            if len(count) > 9 or not 1 <= int(count) <= MOST_ROWS:
                raise malformed(template, match.start("count"), f"expected a number of rows from 1 to {MOST_ROWS:,}")
            yield start, Rows(int(count))
        elif field is not None:
            if token[-1] != "}":
                raise malformed(template, start, "expected a } that closes this {; a literal brace is {{")
            if not field.strip():
                raise malformed(
                    template, start, "expected a field's name between { and }; literal braces are {{ and }}"
                )
            yield start, Field(field)
        elif token == "}":
            raise malformed(template, start, "expected a { before this }; a literal brace is }}")
        elif token[0] == "\\" and token not in ESCAPES:
            raise malformed(template, start, r"expected \<, \\, \n or \t; a literal backslash is \\")
        else:
            yield start, Literal(ESCAPES.get(token, token))


def parse(template: str) -> Template:
    """Raises UserError, with a caret under the place, for anything malformed."""
    found = [*tokens(template)]
    pieces: list[Piece] = []
    i = 0
    while i < len(found):
        place, piece = found[i]
        i += 1
        if piece == "</P>":
            raise malformed(
                template,
                place,
                r"expected a <P> before this </P>, and nothing but text between them; a literal one is \</P>",
            )
        if piece == "<P>":
            close = next((j for j in range(i, len(found)) if isinstance(found[j][1], str | Rows)), None)
            if close is None or found[close][1] != "</P>":
                piece = Rows(1)
            else:
                inside, i = found[i:close], close + 1
                if not inside:
                    raise malformed(template, place, "expected text between <P> and </P>; one row is <P> alone")
                for at, part in inside:
                    if isinstance(part, Field):
                        raise malformed(
                            template,
                            at,
                            "expected text between <P> and </P>, which is the same for all examples, and no field; a literal brace is {{",
                        )
                piece = Seeded("".join(part.text for _, part in inside))
        if isinstance(piece, Literal) and pieces and isinstance(pieces[-1], Literal):
            piece = Literal(pieces.pop().text + piece.text)
        pieces.append(piece)
    if not any(isinstance(piece, Rows | Seeded) for piece in pieces):
        raise UserError(
            f"--prompt_format={template!r}: has no trainable rows; <P*20> makes 20 of them, <P>text</P> one for each token of the text"
        )
    return Template(tuple(pieces))
