r"""The template language: str.format, tiktoken and brute force are the witnesses; every syntax error has its caret."""

import random
import re
import string
import subprocess
import sys

import pytest
from helpers import ROOT, gpt2_tokenizer_env, needs_shared
from hypothesis import given
from hypothesis import strategies as st

from nanoforge.data import tokenization
from nanoforge.errors import UserError
from nanoforge.posttraining.prompt_format import (
    MAX_VIRTUAL_TOKENS,
    OVERFLOWS,
    Field,
    InitText,
    Literal,
    TargetOptions,
    VirtualTokens,
    parse,
)

BYTES = tokenization.ByteTokenizer()
CHARS = tokenization.CharTokenizer(sorted(set(string.printable)))
ENDING = tokenization.CharTokenizer(sorted(set(string.printable)), has_eos=True)
VALUES = {"toxic": "you fool!", "polite": "dear sir", "n": 7, "share": 0.5}


def error_of(call, *args) -> str:
    """The message of the UserError that a call raises."""
    with pytest.raises(UserError) as error:
        call(*args)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# parse


@pytest.mark.parametrize("template, pieces", [
    ("<P*60>{toxic}<P*20>", [VirtualTokens(60), Field("toxic"), VirtualTokens(20)]),
    ("<P*20>text", [VirtualTokens(20), Literal("text")]),
    ("<P>", [VirtualTokens(1)]),
    ("<P>Be kind:</P>{toxic}", [InitText("Be kind:"), Field("toxic")]),
    ("<P>a<P>b</P>", [VirtualTokens(1), Literal("a"), InitText("b")]),
    ("<P>a<P*2>b", [VirtualTokens(1), Literal("a"), VirtualTokens(2), Literal("b")]),
    ("<P><P><P*10000>", [VirtualTokens(1), VirtualTokens(1), VirtualTokens(MAX_VIRTUAL_TOKENS)]),
    ("<P>{a}<P>", [VirtualTokens(1), Field("a"), VirtualTokens(1)]),
    (r"<P>a\</P>", [VirtualTokens(1), Literal("a</P>")]),
    (r"<P>{{a}} \<P> <p></P>", [InitText("{a} <P> <p>")]),
    ("<Perhaps> <p> </p> <P60> < P> a<b <P", [Literal("<Perhaps> <p> </p> <P60> < P> a<b <P")]),
    (r"\\n\n\t\<P*60>", [Literal("\\n\n\t<P*60>")]),
    ("{{{ a field: <P> }}}{b}{ a field: <P> }",
    [Literal("{"), Field(" a field: <P> "), Literal("}"), Field("b"), Field(" a field: <P> ")]),
    ("{русский}\n\t日本", [Field("русский"), Literal("\n\t日本")]),
    ("{a\\n}", [Field("a\\n")]),
])  # fmt: skip
def test_every_form_is_parsed(template, pieces):
    with_virtual_tokens = "<P*3>" + template  # since a template needs some
    assert parse(with_virtual_tokens).pieces == (VirtualTokens(3), *pieces)
    assert Field("a") != Literal("a") != InitText("a"), "or the line above could not fail"


def test_fields_are_named_once_in_order():
    assert parse("{b}<P>{a}{b}").fields == ("b", "a")
    assert parse("<P>").fields == ()


def escape(text: str) -> str:
    """Text with everything escaped that could be special."""
    return re.sub(r"[<\\]", r"\\\g<0>", text).replace("{", "{{").replace("}", "}}")


def render(pieces) -> str:
    """The inverse of `parse`."""
    parts = []
    for piece in pieces:
        if isinstance(piece, Field):
            parts.append(f"{{{piece.name}}}")
        elif isinstance(piece, Literal):
            parts.append(escape(piece.text))
        elif isinstance(piece, InitText):
            parts.append(f"<P>{escape(piece.text)}</P>")
        else:
            parts.append("<P>" if piece.count == 1 else f"<P*{piece.count}>")
    return "".join(parts)


def has_virtual_tokens(pieces) -> bool:
    return any(isinstance(piece, VirtualTokens | InitText) for piece in pieces)


CHARACTER = st.one_of(st.sampled_from("<P>*/{}\\nt7"), st.characters(exclude_categories=["Cs"]))
TEXT = st.text(CHARACTER, min_size=1, max_size=9)
NAME = TEXT.map(lambda text: re.sub("[{}]", "", text)).filter(str.strip)
COUNT = st.one_of(st.just(1), st.integers(1, MAX_VIRTUAL_TOKENS))
PIECE = st.one_of(COUNT.map(VirtualTokens), TEXT.map(InitText), TEXT.map(Literal), NAME.map(Field))
PIECES = st.lists(PIECE, max_size=9).filter(has_virtual_tokens)


@pytest.mark.slow
@given(PIECES)
def test_parse_is_the_inverse_of_render(pieces):
    separate = []  # two literals that follow each other would become one
    for piece in pieces:
        if not (separate and isinstance(piece, Literal) and isinstance(separate[-1], Literal)):
            separate.append(piece)
    assert parse(render(separate)).pieces == tuple(separate)


def formatter_parts(text: str) -> list[tuple[str, str | None]] | None:
    """str.format's reading of a text: (literal, field's name) pairs; None if it is malformed, or has a blank name."""
    try:
        parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(text)]
    except ValueError:
        return None
    if any(name is not None and not name.strip() for _, name in parts):
        return None
    return parts


@given(st.text("ab {}", max_size=12))
def test_braces_are_those_of_str_format(text):
    template = "<P*2>" + text
    parts = formatter_parts(text)
    if parts is None:
        assert f"\n  {template}\n" in error_of(parse, template)
        return
    values = {name: f"[{name}]" for _, name in parts if name}
    ids = parse(template).encode(values, BYTES, 300)
    assert ids[:2] == [300, 301]
    assert BYTES.decode(ids[2:]) == "".join(literal + values.get(name, "") for literal, name in parts)


SYNTAX = ["<P>", "</P>", "<P*", "<P*3>", "<", ">", "{", "}", "{a}", "\\", "\n", "a", "7"]


@given(st.lists(st.sampled_from(SYNTAX), max_size=9).map("".join))
def test_anything_else_is_an_error_with_its_caret(template):
    try:
        pieces = parse(template).pieces
    except UserError as error:
        if "no virtual tokens" not in str(error):
            _, shown, caret = str(error).split("\n")
            assert shown == "  " + template.replace("\n", r"\n")
            assert re.fullmatch(" +\\^", caret) and 2 < len(caret) <= len(shown) + 1
    else:
        assert parse(render(pieces)).pieces == pieces


@pytest.mark.parametrize("template, position, expected", [
    ("<P>{toxic", 3, "a } that closes this {"),
    ("<P>{a{b}", 3, "a } that closes this {"),
    ("<P>{", 3, "a } that closes this {"),
    ("<P>a}b", 4, "a { before this }"),
    ("<P>{a}}", 6, "a { before this }"),
    ("<P>{}", 3, "a field's name"),
    ("<P>{ }", 3, "a field's name"),
    ("{a}<P*0>", 6, "from 1 to 10,000"),
    ("{a}<P*10001>", 6, "from 1 to 10,000"),
    ("{a}<P*" + "9" * 5000 + ">", 6, "from 1 to 10,000"),
    ("{a}<P*x>", 6, "the number of virtual tokens"),
    ("{a}<P*-1>", 6, "the number of virtual tokens"),
    ("{a}<P*>", 7, "the number of virtual tokens"),
    ("{a}<P*٣>", 6, "the number of virtual tokens"),
    ("{a}<P*6.5>", 7, "> after the number of virtual tokens"),
    ("{a}<P*60{b}", 8, "> after the number of virtual tokens"),
    ("{a}<P*60", 8, "> after the number of virtual tokens"),
    ("a</P>", 1, "a <P> before this </P>"),
    ("<P*3>a</P>", 6, "a <P> before this </P>"),
    ("<P>a</P></P>", 8, "a <P> before this </P>"),
    ("<P>a<P>b</P>c</P>", 13, "a <P> before this </P>"),
    ("<P>a<P*3>b</P>", 10, "a <P> before this </P>"),
    ("<P>a{b}c</P>", 4, "and no field"),
    ("<P*2><P></P>", 5, "text between <P> and </P>"),
    ("<P>\\", 3, r"\<, \\, \", \n or \t"),
    (r"<P>\x", 3, r"\<, \\, \", \n or \t"),
])  # fmt: skip
def test_the_caret_is_under_the_error(template, position, expected):
    message, shown, caret = error_of(parse, template).split("\n")
    assert message.startswith("--prompt_format: expected ") and expected in message
    assert shown == "  " + template
    assert caret == " " * (2 + position) + "^"


@pytest.mark.parametrize("before, shown", [
    ("\n", r"\n"), ("\t", r"\t"), ("\r\n", r"\r\n"), ("\u2028", r"\u2028"), ("\x1b", r"\x1b"), ("\udc80", r"\udc80"),
    (r"\n", r"\n"),
])  # fmt: skip
def test_what_would_move_the_caret_is_shown_as_an_escape(before, shown):
    lines = error_of(parse, f"a{before}<P*0>").split("\n")
    assert lines[1:] == [f"  a{shown}<P*0>", " " * (2 + 1 + len(shown) + 3) + "^"]


def test_the_caret_counts_columns_of_a_terminal():
    assert error_of(parse, "日本<P*0>").endswith("\n  日本<P*0>\n" + " " * (2 + 4 + 3) + "^")
    assert error_of(parse, "e\u0301<P*0>").endswith("\n" + " " * (2 + 1 + 3) + "^")
    assert error_of(parse, "жё<P*0>").endswith("\n" + " " * (2 + 2 + 3) + "^")


@pytest.mark.parametrize("template", ["", "{a}", "just text", r"\<P>", "<p>{a}<P60>\n"])
def test_a_template_needs_virtual_tokens(template):
    message = error_of(parse, template)
    assert "no virtual tokens" in message and "\n" not in message


def test_templates_are_parsed_without_torch_and_numpy():
    code = (
        "import sys; from nanoforge.posttraining import prompt_format; "
        "prompt_format.parse('<P>'); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_template_is_parsed_once():
    assert parse("<P>{once}") is parse("<P>{once}")


# ---------------------------------------------------------------------------------------------------------------------
# encode


def test_virtual_tokens_of_a_text_start_as_its_tokens():
    assert parse("<P>ab</P>{x}<P*2>lit<P>c</P><P>").init_ids(BYTES) == [97, 98, None, None, 99, None]
    assert len(parse("<P*60>{toxic}<P*20>").init_ids(BYTES)) == 80


def test_virtual_tokens_are_numbered_through_and_text_is_itself():
    ids = parse(r"<P>ab</P>{toxic}<P*2> \<{n}, {share}><P>").encode(VALUES, BYTES, 257)
    assert ids[:2] == [257, 258] and ids[11:13] == [259, 260] and ids[-1] == 261
    assert BYTES.decode(ids[2:11]) == "you fool!" and BYTES.decode(ids[13:-1]) == " <7, 0.5>"


@given(PIECES)
def test_pieces_are_encoded_each_by_itself(pieces):
    values = {piece.name: piece.name[::-1] for piece in pieces if isinstance(piece, Field)}
    expected = []
    next_id = 1000
    for piece in pieces:
        if isinstance(piece, VirtualTokens | InitText):
            count = piece.count if isinstance(piece, VirtualTokens) else len(piece.text.encode())
            expected += range(next_id, next_id + count)
            next_id += count
        else:
            text = piece.text if isinstance(piece, Literal) else values[piece.name]
            expected += text.encode()
    template = parse(render(pieces))
    assert template.encode(values, BYTES, 1000) == expected
    assert len(template.init_ids(BYTES)) == next_id - 1000
    assert template.fields == tuple(dict.fromkeys(values))


@needs_shared
def test_tokens_are_tiktokens(monkeypatch: pytest.MonkeyPatch):
    for name, value in gpt2_tokenizer_env().items():
        monkeypatch.setenv(name, value)
    import tiktoken

    gpt2 = tokenization.TiktokenTokenizer.from_name("gpt2")
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    template = parse("<P>Rephrase politely:</P> text{toxic} kindly")
    init_ids = encode("Rephrase politely:")
    assert template.init_ids(gpt2) == init_ids
    values = {"toxic": "unbelievable nonsense", "polite": "dear"}
    toxic = encode(values["toxic"])
    target = [*encode("dear"), 50256]
    virtual = [*range(50257, 50257 + len(init_ids))]
    assert template.encode(values, gpt2, 50257) == [*virtual, *encode(" text"), *toxic, *encode(" kindly")]
    room = TargetOptions("polite", "toxic", len(init_ids) + 3 + len(target), "error")
    ids, target_start = template.encode_example(values, gpt2, 50257, room)
    assert ids == [*virtual, *encode(" text"), toxic[0], *encode(" kindly"), *target]
    assert ids[target_start:] == target
    assert len(toxic) > 2 and toxic[0] != encode("u")[0], "tokens are cut, not letters"


@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}, True, float("inf")])
def test_values_that_are_no_text_are_refused(value):
    encode = parse("<P>ab</P>{toxic}!").encode
    shown = "null" if value is None else repr(value)
    assert f"'toxic': must be text or a number, not {shown}" in error_of(encode, {"toxic": value}, BYTES, 257)


def test_examples_that_dont_fit_the_template_are_refused():
    encode = parse("<P>ab</P>{toxic}!").encode
    message = error_of(encode, {"toxi": "a", "polite": "b"}, BYTES, 257)
    assert "no field 'toxic'; it has 'toxi', 'polite'; did you mean toxi?" in message
    for tokenizer in (BYTES, CHARS):
        assert "the field 'toxic': half of a surrogate" in error_of(encode, {"toxic": "\ud800"}, tokenizer, 257)


def test_text_that_the_tokenizer_doesnt_know_is_refused():
    abc = tokenization.CharTokenizer("ab!")
    message = error_of(parse("<P>ab</P>{toxic}!").encode, {"toxic": "c"}, abc, 3)
    assert message.startswith("the field 'toxic': ") and "'c'" in message
    assert error_of(parse("<P>?").encode, {}, abc, 3).startswith("--prompt_format: '?': ")
    assert error_of(parse("<P>a?</P>").init_ids, abc).startswith("--prompt_format: <P>a?</P>: ")
    assert "no token" in error_of(parse("<P> </P>").init_ids, tokenization.NumberTokenizer(9))


# ---------------------------------------------------------------------------------------------------------------------
# encode_example

TEMPLATES = ["<P>seed</P>{a}<P*2>lit {b}", "<P*3>{a}-{a} {b}<P>", "{b}<P>"]
TEMPLATES_AND_FIELDS = [(template, field) for template in TEMPLATES for field in (*parse(template).fields, None)]


@pytest.mark.parametrize("tokenizer", [CHARS, ENDING, BYTES], ids=["no end", "end", "bytes"])
@pytest.mark.parametrize("template, truncated", TEMPLATES_AND_FIELDS)
def test_overflow_at_every_length(tokenizer, template, truncated):
    """The witness tries all shorter texts of the field: a token is a character here."""
    template = parse(template)
    values = {"a": "0123456", "b": "xyz", "t": "target"}
    target = [*tokenizer.encode("target")]
    if tokenizer.eos_id is not None:
        target.append(tokenizer.eos_id)

    def prompt(n_chars: int) -> list[int]:
        cut_values = {**values, truncated: values[truncated][:n_chars]} if truncated else values
        return template.encode(cut_values, tokenizer, tokenizer.vocab_size)

    shortest = prompt(0)
    lengths = range(len(values[truncated]) + 1) if truncated else [0]
    for max_tokens in range(1, len(prompt(99)) + len(target) + 3):
        n_chars = max((n for n in lengths if len(prompt(n)) + len(target) <= max_tokens), default=None)
        for overflow in OVERFLOWS:
            options = TargetOptions("t", truncated, max_tokens, overflow)
            args = (values, tokenizer, tokenizer.vocab_size, options)
            if n_chars is not None:
                assert template.encode_example(*args) == (prompt(n_chars) + target, len(prompt(n_chars)))
            elif overflow == "drop":
                assert template.encode_example(*args) is None
            elif overflow == "error" or max_tokens <= len(shortest):
                excess = len(shortest) + len(target) - max_tokens
                message = error_of(template.encode_example, *args)
                assert f"exceeds --max_tokens={max_tokens} by {excess} " in message
                assert (f"all of --truncation_field={truncated} cut" in message) == (truncated is not None)
                counts = [int(count) for count in re.findall(r" (\d+)[,)]", message)]
                assert sum(counts) == excess + max_tokens and counts[-1] == len(target)
            else:
                ids, target_start = template.encode_example(*args)
                assert len(ids) == max_tokens
                assert ids[:target_start] == shortest
                assert ids[target_start:] == target[: max_tokens - target_start] != []
                assert tokenizer.eos_id not in ids, "the target is not whole"


def test_an_example_ends_with_its_target():
    rng = random.Random(0)
    first_virtual_id = ENDING.vocab_size
    template = parse("<P*4>{a}<P>")
    options = TargetOptions("t", "a", 15, "error")
    for _ in range(200):
        target = "".join(rng.choices("{}<P>\\ab", k=rng.randrange(1, 9)))
        values = {"a": "x" * rng.randrange(9), "t": target}
        ids, target_start = template.encode_example(values, ENDING, first_virtual_id, options)
        assert ENDING.decode(ids[target_start:]) == target + "<|endoftext|>"
        assert ids[:4] == [*range(first_virtual_id, first_virtual_id + 4)]
        assert ids[target_start - 1] == first_virtual_id + 4 and len(ids) <= 15


def test_an_empty_target_is_its_end_token():
    encode_example = parse("<P>{a}").encode_example
    values = {"a": "xyz", "t": ""}
    options = TargetOptions("t", None, 9, "error")
    assert encode_example(values, ENDING, 200, options) == ([200, *ENDING.encode("xyz"), ENDING.eos_id], 4)
    assert "nothing to learn" in error_of(encode_example, values, CHARS, 200, options)
    short = TargetOptions("t", None, 4, "truncate_target")
    assert "exceeds --max_tokens=4 by 1 (" in error_of(encode_example, values, ENDING, 200, short)


@pytest.mark.parametrize("target_field, truncation_field, message", [
    ("toxic", None, "--target_field=toxic: "),
    ("polite", "polite", "--truncation_field=polite: "),
    ("polite", "txic", "--truncation_field=txic: no field of --prompt_format, which has toxic, n; did you mean toxic?"),
])  # fmt: skip
def test_fields_that_dont_go_together_are_refused(target_field, truncation_field, message):
    template = parse("<P>{toxic}{n}")
    assert message in error_of(template.check_fields, target_field, truncation_field)
    options = TargetOptions(target_field, truncation_field, 99, "drop")
    assert message in error_of(template.encode_example, VALUES, BYTES, 257, options)


def test_fields_that_go_together():
    template = parse("<P>{toxic}{n}")
    template.check_fields("polite", "toxic")
    template.check_fields("polite", None)
    options = TargetOptions("answer", None, 99, "drop")
    assert "no field 'answer'" in error_of(template.encode_example, VALUES, BYTES, 257, options)
