r"""The language of prompt templates (ruprompts'): virtual tokens of a soft prompt, an example's fields and literal
text.

    <P*60>           60 virtual tokens; 1 to 10,000
    <P>              one virtual token
    <P>text</P>      a virtual token for each token of the text, initialized with its embedding
    {field}          a field of the example, by any name without braces
    anything else    literal text, frozen
    {{ }} \< \\      a brace, <, backslash; \" \' \n and \t as usual, since shells pass them on as they are

A <P> opens a <P>text</P> if the next of <P>, <P*N> and </P> is a </P>; else it is a virtual token by itself. So
<P*20>text is 20 virtual tokens and then literal text; <P>a<P>b</P> is a virtual token, the literal a, and virtual
tokens for b; a </P> whose <P> is out of reach is an error. Only what begins with <P>, <P* or </P> is special:
<Perhaps>, <p> and a < b are literal.

Each piece is encoded by itself: no token crosses the border of a piece, and a space belongs to the piece in which it is
written. Imports neither torch nor numpy, so that a template is checked before they are loaded.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol

from nanoforge.errors import UserError, did_you_mean
from nanoforge.posttraining.example_rows import check_text_or_number

MAX_VIRTUAL_TOKENS = 10_000  # of one <P*N>: more is a typing error
OVERFLOWS = ("error", "drop", "truncate_target")

# ---------------------------------------------------------------------------------------------------------------------
# pieces


@dataclass(frozen=True)
class VirtualTokens:
    """Virtual tokens that are initialized from no text."""

    count: int


@dataclass(frozen=True)
class InitText:
    """A virtual token for each token of the text, initialized with the token's embedding."""

    text: str


@dataclass(frozen=True)
class Field:
    """The text of a field of the example."""

    name: str


@dataclass(frozen=True)
class Literal:
    """Text that is the same in every example."""

    text: str


Piece = VirtualTokens | InitText | Field | Literal

# ---------------------------------------------------------------------------------------------------------------------
# templates


class Tokenizer(Protocol):
    """What a template needs of a tokenizer of data/tokenization.py."""

    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str) -> Iterable[Any]: ...


@dataclass(frozen=True)
class TargetOptions:
    """The target of an example, and how the example is made to fit into max_tokens."""

    target_field: str
    truncation_field: str | None  # loses tokens from its end first
    max_tokens: int  # of the prompt, the target and the end token
    overflow: str  # what becomes of an example that is still too long: one of OVERFLOWS


class EncodedExample(NamedTuple):
    """The ids of an example, and where in them the target begins."""

    ids: list[int]
    target_start: int


@dataclass(frozen=True)
class PromptTemplate:
    """Made by `parse`; has at least one virtual token."""

    pieces: tuple[Piece, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields, once each, in the order of their first use."""
        return tuple(dict.fromkeys(piece.name for piece in self.pieces if isinstance(piece, Field)))

    def check_fields(self, target_field: str, truncation_field: str | None) -> None:
        """Raise UserError for a target that the prompt would show, or a truncation field that it does not have."""
        if target_field in self.fields:
            raise UserError(
                f"--target_field={target_field}: is in --prompt_format, which would show the model its target"
            )
        if truncation_field is None:
            return
        flag = f"--truncation_field={truncation_field}"
        if truncation_field == target_field:
            raise UserError(f"{flag}: is the target, which --overflow=truncate_target cuts")
        if truncation_field not in self.fields:
            available = ", ".join(self.fields) or "none"
            suggestion = did_you_mean(truncation_field, self.fields)
            raise UserError(f"{flag}: no field of --prompt_format, which has {available}{suggestion}")

    def init_ids(self, tokenizer: Tokenizer) -> list[int | None]:
        """The id of the token whose embedding each virtual token starts as, in order, or None. Raises UserError."""
        ids: list[int | None] = []
        for piece in self.pieces:
            if isinstance(piece, VirtualTokens):
                ids += [None] * piece.count
            elif isinstance(piece, InitText):
                ids += init_text_ids(piece, tokenizer)
        return ids

    def encode(self, values: Mapping[str, object], tokenizer: Tokenizer, first_virtual_id: int) -> list[int]:
        """The ids of the prompt; virtual token j has the id first_virtual_id + j. Raises UserError.

        Values of fields that are not in the template are not looked at.
        """
        return list(chain.from_iterable(self.encode_pieces(values, tokenizer, first_virtual_id)))

    def encode_pieces(
        self, values: Mapping[str, object], tokenizer: Tokenizer, first_virtual_id: int
    ) -> list[list[int]]:
        """The ids of each piece. Raises UserError."""
        next_id = first_virtual_id
        encoded = []
        for piece in self.pieces:
            if isinstance(piece, Field):
                ids = field_ids(values, piece.name, tokenizer)
            elif isinstance(piece, Literal):
                ids = text_ids(piece.text, tokenizer, f"--prompt_format: {piece.text!r}")
            else:
                count = piece.count if isinstance(piece, VirtualTokens) else len(init_text_ids(piece, tokenizer))
                ids = list(range(next_id, next_id + count))
                next_id += count
            encoded.append(ids)
        return encoded

    def encode_example(
        self, values: Mapping[str, object], tokenizer: Tokenizer, first_virtual_id: int, options: TargetOptions
    ) -> EncodedExample | None:
        """The ids of the prompt, the target and the end token, if the tokenizer has one: at most max_tokens.

        An example that is too long loses tokens from the end of the truncation field, equally at each of its places,
        down to none. If that is not enough, `options.overflow` decides:

            error            raises UserError
            drop             returns None
            truncate_target  cuts the target at its end, the end token first, down to its first token; raises
                             UserError if that has no room either

        Virtual tokens, literal text and other fields are never cut. Raises UserError also for what `check_fields` and
        `encode` refuse.
        """
        assert options.overflow in OVERFLOWS
        self.check_fields(options.target_field, options.truncation_field)
        target = target_ids(values, options.target_field, tokenizer)
        encoded = self.encode_pieces(values, tokenizer, first_virtual_id)
        excess = sum(map(len, encoded)) + len(target) - options.max_tokens
        if excess > 0 and options.truncation_field is not None:
            encoded = self.truncate_field(encoded, options.truncation_field, excess)
        prompt = list(chain.from_iterable(encoded))
        target_room = options.max_tokens - len(prompt)
        if target_room < len(target):
            if options.overflow == "drop":
                return None
            if options.overflow == "error" or target_room < 1:
                raise UserError(self.describe_excess(encoded, len(target), options))
        return EncodedExample(prompt + target[:target_room], target_start=len(prompt))

    def truncate_field(self, encoded: Sequence[list[int]], field: str, excess: int) -> list[list[int]]:
        """Ids with the field cut at its end by `excess` tokens, as many at each of its places, down to none."""
        n_places = self.pieces.count(Field(field))
        cut = -(-excess // n_places)  # rounded up
        truncated = []
        for piece, ids in zip(self.pieces, encoded, strict=True):
            truncated.append(ids[: max(0, len(ids) - cut)] if piece == Field(field) else ids)
        return truncated

    def describe_excess(self, encoded: Sequence[list[int]], target_tokens: int, options: TargetOptions) -> str:
        """By how many tokens the example is too long, with the truncation field cut already, and what they are."""
        counts = {"virtual tokens and literal text": 0, **{f"{{{name}}}": 0 for name in self.fields}}
        for piece, ids in zip(self.pieces, encoded, strict=True):
            name = f"{{{piece.name}}}" if isinstance(piece, Field) else "virtual tokens and literal text"
            counts[name] += len(ids)
        counts[f"target {options.target_field} and end"] = target_tokens
        excess = sum(counts.values()) - options.max_tokens
        cut = ""
        if options.truncation_field is not None:
            cut = f" with all of --truncation_field={options.truncation_field} cut"
        tokens = ", ".join(f"{name} {count}" for name, count in counts.items())
        return (
            f"an example exceeds --max_tokens={options.max_tokens} by {excess}{cut} (tokens: {tokens}); "
            "leave such examples out with --overflow=drop, or cut their target with truncate_target"
        )


# ---------------------------------------------------------------------------------------------------------------------
# text to ids


def text_ids(text: str, tokenizer: Tokenizer, source: str) -> list[int]:
    """The ids of a text. Raises UserError, beginning with its source, for text that can't be encoded."""
    try:
        text.encode()
        return list(map(int, tokenizer.encode(text)))
    except UnicodeEncodeError:
        raise UserError(f"{source}: half of a surrogate pair is no text") from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def init_text_ids(piece: InitText, tokenizer: Tokenizer) -> list[int]:
    """The ids of an initial text, at least one. Raises UserError."""
    source = f"--prompt_format: <P>{piece.text}</P>"
    ids = text_ids(piece.text, tokenizer, source)
    if not ids:
        raise UserError(f"{source}: this text has no token, and so makes no virtual tokens")
    return ids


def field_ids(values: Mapping[str, object], name: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a field's text, or of a number as Python writes it. Raises UserError."""
    if name not in values:
        available = ", ".join(map(repr, values)) or "none"
        raise UserError(f"the example has no field {name!r}; it has {available}{did_you_mean(name, values)}")
    try:
        text = check_text_or_number(values[name])
    except UserError as error:
        raise UserError(f"the field {name!r}: {error}") from None
    return text_ids(text, tokenizer, f"the field {name!r}")


def target_ids(values: Mapping[str, object], field: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of the target with the end token, if the tokenizer has one. Raises UserError."""
    ids = field_ids(values, field, tokenizer)
    if tokenizer.eos_id is not None:
        ids.append(tokenizer.eos_id)
    if not ids:
        raise UserError(f"the target {field!r} is empty and the tokenizer has no end token: there is nothing to learn")
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# the parser

ESCAPES = {"{{": "{", "}}": "}", r"\<": "<", r"\\": "\\", r"\n": "\n", r"\t": "\t", r"\"": '"', r"\'": "'"}
# Every string is a sequence of these. What is malformed is matched too, and refused by `tokenize`.
TOKEN = re.compile(
    r"(?P<tag></?P>)"
    r"|(?P<virtual_tokens><P\*(?P<count>[0-9]*)>?)"
    r"|(?P<escape>\{\{|\}\}|\\.?)"
    r"|(?P<field>\{(?P<name>[^{}]*)\}?)"
    r"|(?P<stray>\})"
    r"|(?P<literal><|[^<{}\\]+)"
)


class Token(NamedTuple):
    """A piece, or one of the tags <P> and </P>, which together with what follows them make a piece."""

    position: int
    value: Piece | str


@functools.lru_cache(maxsize=64)
def parse(template: str) -> PromptTemplate:
    """The pieces of a template. Raises UserError, with a caret under the place, for anything malformed."""
    tokens = list(tokenize(template))
    pieces: list[Piece] = []
    i = 0
    while i < len(tokens):
        piece, i = parse_piece(template, tokens, i)
        if isinstance(piece, Literal) and pieces and isinstance(pieces[-1], Literal):
            pieces[-1] = Literal(pieces[-1].text + piece.text)
        else:
            pieces.append(piece)
    if not any(isinstance(piece, VirtualTokens | InitText) for piece in pieces):
        raise UserError(
            f"--prompt_format={template!r}: has no virtual tokens; write <P*20> for 20 of them, "
            "or <P>text</P> for one for each token of the text"
        )
    return PromptTemplate(tuple(pieces))


def parse_piece(template: str, tokens: Sequence[Token], i: int) -> tuple[Piece, int]:
    """The piece that begins with token i, and the index of the token after it. Raises UserError."""
    position, value = tokens[i]
    if not isinstance(value, str):
        return value, i + 1
    if value == "</P>":
        expected = r"a <P> before this </P>, and nothing but text between them; write \</P> for a literal one"
        raise syntax_error(template, position, expected)
    closing = find_closing_tag(tokens, i + 1)
    if closing is None:
        return VirtualTokens(1), i + 1
    return parse_init_text(template, position, tokens[i + 1 : closing]), closing + 1


def find_closing_tag(tokens: Sequence[Token], start: int) -> int | None:
    """The index of the next </P>, if no <P> or <P*N> comes before it."""
    for i in range(start, len(tokens)):
        value = tokens[i].value
        if value == "</P>":
            return i
        if value == "<P>" or isinstance(value, VirtualTokens):
            return None
    return None


def parse_init_text(template: str, position: int, tokens: Sequence[Token]) -> InitText:
    """The text between a <P> at `position` and its </P>. Raises UserError."""
    if not tokens:
        raise syntax_error(template, position, "text between <P> and </P>; write <P> alone for one virtual token")
    text = ""
    for token in tokens:
        if not isinstance(token.value, Literal):
            expected = "text between <P> and </P>, and no field, since it is the same for all examples"
            raise syntax_error(template, token.position, f"{expected}; write {{{{ for a literal brace")
        text += token.value.text
    return InitText(text)


def tokenize(template: str) -> Iterator[Token]:
    """Split a template into pieces and tags. Raises UserError."""
    for match in TOKEN.finditer(template):
        kind = match.lastgroup
        value: Piece | str
        if kind == "tag":
            value = match[0]
        elif kind == "virtual_tokens":
            value = read_virtual_tokens(template, match)
        elif kind == "field":
            value = read_field(template, match)
        elif kind == "escape":
            value = read_escape(template, match)
        elif kind == "literal":
            value = Literal(match[0])
        else:
            raise syntax_error(template, match.start(), "a { before this }; write }} for a literal brace")
        yield Token(match.start(), value)


def read_virtual_tokens(template: str, match: re.Match[str]) -> VirtualTokens:
    """<P*60>. Raises UserError."""
    count = match["count"]
    if not count:
        raise syntax_error(template, match.end(), "the number of virtual tokens, as in <P*60>")
    if not match[0].endswith(">"):
        raise syntax_error(template, match.end(), "> after the number of virtual tokens")
    has_many_digits = len(count) > 9  # int() refuses thousands of them
    if has_many_digits or not 1 <= int(count) <= MAX_VIRTUAL_TOKENS:
        raise syntax_error(template, match.start("count"), f"a number from 1 to {MAX_VIRTUAL_TOKENS:,}")
    return VirtualTokens(int(count))


def read_field(template: str, match: re.Match[str]) -> Field:
    """{field}. Raises UserError."""
    name = match["name"]
    if not match[0].endswith("}"):
        raise syntax_error(template, match.start(), "a } that closes this {; write {{ for a literal brace")
    if not name.strip():
        expected = "a field's name between { and }; write {{ and }} for literal braces"
        raise syntax_error(template, match.start(), expected)
    return Field(name)


def read_escape(template: str, match: re.Match[str]) -> Literal:
    r"""{{, }} or a backslash with what it escapes. Raises UserError."""
    if match[0] not in ESCAPES:
        raise syntax_error(template, match.start(), r"\<, \\, \", \n or \t; write \\ for a literal backslash")
    return Literal(ESCAPES[match[0]])


def syntax_error(template: str, position: int, expected: str) -> UserError:
    """Shows the template on one line, line breaks as escapes, with a caret under template[position]."""
    shown = [char if char.isprintable() else char.encode("unicode_escape").decode() for char in template]
    column = sum(map(display_width, "".join(shown[:position])))
    return UserError(f"--prompt_format: expected {expected}\n  {''.join(shown)}\n  {' ' * column}^")


def display_width(char: str) -> int:
    """The columns of a terminal that a character takes: 0, 1 or 2."""
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
