r"""The template language: str.format, tiktoken and brute force are the witnesses; every mistake has its caret."""

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
from nanoforge.posttraining.prompt_format import MOST_ROWS, OVERFLOWS, Field, Literal, Rows, Seeded, parse

BYTES = tokenization.ByteTokenizer()
CHARS = tokenization.CharTokenizer(sorted(set(string.printable)))
ENDING = tokenization.CharTokenizer(sorted(set(string.printable)), has_eos=True)
VALUES = {"toxic": "you fool!", "polite": "dear sir", "n": 7, "share": 0.5}


def mistake(call, *given) -> str:
    with pytest.raises(UserError) as told:
        call(*given)
    return str(told.value)


# ---------------------------------------------------------------------------------------------------------------------
# parse


@pytest.mark.parametrize("template, pieces", [
    ("<P*60>{toxic}<P*20>", [Rows(60), Field("toxic"), Rows(20)]),
    ("<P*20>text", [Rows(20), Literal("text")]),
    ("<P>", [Rows(1)]),
    ("<P>Be kind:</P>{toxic}", [Seeded("Be kind:"), Field("toxic")]),
    ("<P>a<P>b</P>", [Rows(1), Literal("a"), Seeded("b")]),
    ("<P>a<P*2>b", [Rows(1), Literal("a"), Rows(2), Literal("b")]),
    ("<P><P><P*10000>", [Rows(1), Rows(1), Rows(MOST_ROWS)]),
    ("<P>{a}<P>", [Rows(1), Field("a"), Rows(1)]),
    (r"<P>a\</P>", [Rows(1), Literal("a</P>")]),
    (r"<P>{{a}} \<P> <p></P>", [Seeded("{a} <P> <p>")]),
    ("<Perhaps> <p> </p> <P60> < P> a<b <P", [Literal("<Perhaps> <p> </p> <P60> < P> a<b <P")]),
    (r"\\n\n\t\<P*60>", [Literal("\\n\n\t<P*60>")]),
    ("{{{ a field: <P> }}}{b}{ a field: <P> }", [Literal("{"), Field(" a field: <P> "), Literal("}"), Field("b"), Field(" a field: <P> ")]),
    ("{русский}\n\t日本", [Field("русский"), Literal("\n\t日本")]),
    ("{a\\n}", [Field("a\\n")]),
])  # fmt: skip
def test_every_form_is_read(template, pieces):
    assert parse("<P*3>" + template).pieces == (Rows(3), *pieces), "with rows before it, since a template needs some"
    assert Field("a") != Literal("a") != Seeded("a"), "or the line above could not fail"


def test_fields_are_named_once_in_order():
    assert parse("{b}<P>{a}{b}").fields == ("b", "a") and parse("<P>").fields == ()


def render(pieces) -> str:
    """parse's inverse: everything that could be special is escaped."""

    def escaped(words):
        return re.sub(r"[<\\]", r"\\\g<0>", words).replace("{", "{{").replace("}", "}}")

    return "".join(
        f"{{{piece.name}}}" if isinstance(piece, Field)
        else escaped(piece.text) if isinstance(piece, Literal)
        else f"<P>{escaped(piece.text)}</P>" if isinstance(piece, Seeded)
        else "<P>" if piece.count == 1 else f"<P*{piece.count}>"
        for piece in pieces
    )  # fmt: skip


TEXT = st.text(
    st.one_of(st.sampled_from("<P>*/{}\\nt7"), st.characters(exclude_categories=["Cs"])), min_size=1, max_size=9
)
PIECES = st.lists(st.one_of(
    st.integers(1, MOST_ROWS).map(Rows), st.just(Rows(1)), TEXT.map(Seeded), TEXT.map(Literal),
    TEXT.map(lambda words: re.sub("[{}]", "", words)).filter(str.strip).map(Field),
), max_size=9).filter(lambda pieces: any(isinstance(piece, Rows | Seeded) for piece in pieces))  # fmt: skip


@given(PIECES)
def test_parse_is_renders_inverse(pieces):
    apart = [
        piece
        for i, piece in enumerate(pieces)
        if not (i and isinstance(piece, Literal) and isinstance(pieces[i - 1], Literal))
    ]
    assert parse(render(apart)).pieces == tuple(apart)


@given(st.text("ab {}", max_size=12))
def test_braces_are_those_of_str_format(words):
    try:
        parts = [*string.Formatter().parse(words)]
        expected = (
            None
            if any(name is not None and not name.strip() for _, name, _, _ in parts)
            else "".join(f"[{name}]" if name else "" for _, name, _, _ in parts)
        )
        values = {name: f"[{name}]" for _, name, _, _ in parts if name}
    except ValueError:
        expected = None
    if expected is None:
        assert "\n  <P*2>" + words + "\n" in mistake(parse, "<P*2>" + words)
    else:
        ids = parse("<P*2>" + words).encode(values, BYTES, 300)
        assert ids[:2] == [300, 301] and BYTES.decode(ids[2:]) == "".join(
            literal + (f"[{name}]" if name else "") for literal, name, _, _ in parts
        )


@given(
    st.lists(
        st.sampled_from(["<P>", "</P>", "<P*", "<P*3>", "<", ">", "{", "}", "{a}", "\\", "\n", "a", "7"]), max_size=9
    ).map("".join)
)
def test_anything_else_is_a_mistake_with_its_caret(template):
    try:
        pieces = parse(template).pieces
    except UserError as told:
        if "no trainable rows" not in str(told):
            _, shown, caret = str(told).split("\n")
            assert (
                shown == "  " + template.replace("\n", r"\n")
                and re.fullmatch(" +\\^", caret)
                and 2 < len(caret) <= len(shown) + 1
            )
    else:
        assert parse(render(pieces)).pieces == pieces


@pytest.mark.parametrize("template, place, expected", [
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
    ("{a}<P*x>", 6, "the number of rows"),
    ("{a}<P*-1>", 6, "the number of rows"),
    ("{a}<P*>", 7, "the number of rows"),
    ("{a}<P*٣>", 6, "the number of rows"),
    ("{a}<P*6.5>", 7, "> after the number of rows"),
    ("{a}<P*60{b}", 8, "> after the number of rows"),
    ("{a}<P*60", 8, "> after the number of rows"),
    ("a</P>", 1, "a <P> before this </P>"),
    ("<P*3>a</P>", 6, "a <P> before this </P>"),
    ("<P>a</P></P>", 8, "a <P> before this </P>"),
    ("<P>a<P>b</P>c</P>", 13, "a <P> before this </P>"),
    ("<P>a<P*3>b</P>", 10, "a <P> before this </P>"),
    ("<P>a{b}c</P>", 4, "and no field"),
    ("<P*2><P></P>", 5, "text between <P> and </P>"),
    ("<P>\\", 3, r"\<, \\, \n or \t"),
    (r"<P>\x", 3, r"\<, \\, \n or \t"),
])  # fmt: skip
def test_the_caret_is_under_the_place(template, place, expected):
    told, shown, caret = mistake(parse, template).split("\n")
    assert (
        told.startswith("--prompt_format: expected ")
        and expected in told
        and shown == "  " + template
        and caret == " " * (2 + place) + "^"
    )


@pytest.mark.parametrize("before, shown", [
    ("\n", r"\n"), ("\t", r"\t"), ("\r\n", r"\r\n"), ("\u2028", r"\u2028"), ("\x1b", r"\x1b"), ("\udc80", r"\udc80"), (r"\n", r"\n"),
])  # fmt: skip
def test_what_would_move_the_caret_is_shown_as_an_escape(before, shown):
    lines = mistake(parse, f"a{before}<P*0>").split("\n")
    assert lines[1:] == [f"  a{shown}<P*0>", " " * (2 + 1 + len(shown) + 3) + "^"]


def test_the_caret_counts_columns_of_a_terminal():
    assert mistake(parse, "日本<P*0>").endswith("\n  日本<P*0>\n" + " " * (2 + 4 + 3) + "^")
    assert mistake(parse, "e\u0301<P*0>").endswith("\n" + " " * (2 + 1 + 3) + "^")
    assert mistake(parse, "жё<P*0>").endswith("\n" + " " * (2 + 2 + 3) + "^")


@pytest.mark.parametrize("template", ["", "{a}", "just text", r"\<P>", "<p>{a}<P60>\n"])
def test_a_template_needs_rows(template):
    told = mistake(parse, template)
    assert "no trainable rows" in told and "\n" not in told


def test_templates_are_read_without_torch_and_numpy():
    code = "import sys; from nanoforge.posttraining import prompt_format; prompt_format.parse('<P>'); print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.split() == [
        "False",
        "False",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# encode


def test_seeds_are_the_texts_tokens():
    assert parse("<P>ab</P>{x}<P*2>lit<P>c</P><P>").seeds(BYTES) == [97, 98, None, None, 99, None]
    assert len(parse("<P*60>{toxic}<P*20>").seeds(BYTES)) == 80


def test_rows_are_numbered_through_and_text_is_itself():
    ids = parse(r"<P>ab</P>{toxic}<P*2> \<{n}, {share}><P>").encode(VALUES, BYTES, 257)
    assert ids[:2] == [257, 258] and ids[11:13] == [259, 260] and ids[-1] == 261
    assert BYTES.decode(ids[2:11]) == "you fool!" and BYTES.decode(ids[13:-1]) == " <7, 0.5>"


@given(PIECES)
def test_pieces_are_encoded_each_by_itself(pieces):
    values = {piece.name: piece.name[::-1] for piece in pieces if isinstance(piece, Field)}
    expected, row = [], 1000
    for piece in pieces:
        if isinstance(piece, Rows | Seeded):
            count = piece.count if isinstance(piece, Rows) else len(piece.text.encode())
            expected += range(row, row + count)
            row += count
        else:
            expected += (piece.text if isinstance(piece, Literal) else piece.name[::-1]).encode()
    template = parse(render(pieces))
    assert template.encode(values, BYTES, 1000) == expected and len(template.seeds(BYTES)) == row - 1000
    assert template.fields == tuple(dict.fromkeys(values))


@needs_shared
def test_tokens_are_tiktokens(monkeypatch):
    for name, value in gpt2_tokenizer_env().items():
        monkeypatch.setenv(name, value)
    import tiktoken

    gpt2, encode = tokenization.TiktokenTokenizer.from_name("gpt2"), tiktoken.get_encoding("gpt2").encode_ordinary
    template = parse("<P>Rephrase politely:</P> text{toxic} kindly")
    seeds, words = encode("Rephrase politely:"), encode("unbelievable nonsense")
    assert template.seeds(gpt2) == seeds
    values = {"toxic": "unbelievable nonsense", "polite": "dear"}
    assert template.encode(values, gpt2, 50257) == [
        *range(50257, 50257 + len(seeds)),
        *encode(" text"),
        *words,
        *encode(" kindly"),
    ]
    room = len(seeds) + 2 + 1 + len(encode("dear")) + 1
    ids, place = template.example(values, gpt2, 50257, "polite", "toxic", room, "error")
    assert ids[len(seeds) :] == [*encode(" text"), words[0], *encode(" kindly"), *encode("dear"), 50256] and ids[
        place:
    ] == [*encode("dear"), 50256]
    assert len(words) > 2 and words[0] != encode("unbelievable nonsense"[:1])[0], "tokens are cut, not letters"


def test_examples_that_dont_fit_the_template_are_told():
    template = parse("<P>ab</P>{toxic}!")
    told = mistake(template.encode, {"toxi": "a", "polite": "b"}, BYTES, 257)
    assert "no field 'toxic'; it has 'toxi', 'polite'; did you mean toxi?" in told
    for value in (None, ["a"], {"a": 1}):
        assert f"the field 'toxic' must be text or a number, not {value!r}" in mistake(
            template.encode, {"toxic": value}, BYTES, 257
        )
    for tokenizer in (BYTES, CHARS):
        assert "the field 'toxic': half of a surrogate pair" in mistake(
            template.encode, {"toxic": "\ud800"}, tokenizer, 257
        )
    abc = tokenization.CharTokenizer("ab!")
    assert "the field 'toxic': the tokenizer knows no 'c'" in mistake(template.encode, {"toxic": "c"}, abc, 3)
    assert "'?': the tokenizer knows no '?'" in mistake(parse("<P>?").encode, {}, abc, 3)
    assert "<P>a?</P>: the tokenizer knows no '?'" in mistake(parse("<P>a?</P>").seeds, abc)
    assert "no token" in mistake(parse("<P> </P>").seeds, tokenization.NumberTokenizer(9))


# ---------------------------------------------------------------------------------------------------------------------
# example


@pytest.mark.parametrize("tokenizer", [CHARS, ENDING, BYTES], ids=["no end", "end", "bytes"])
@pytest.mark.parametrize("template, cut", [
    (template, cut) for template in ("<P>seed</P>{a}<P*2>lit {b}", "<P*3>{a}-{a} {b}<P>", "{b}<P>") for cut in (*parse(template).fields, None)
])  # fmt: skip
def test_overflow_at_every_length(tokenizer, template, cut):
    """The witness tries all shorter texts of the field: a token is a character here."""
    template, values = parse(template), {"a": "0123456", "b": "xyz", "t": "target"}
    first = tokenizer.vocab_size
    completion = [*tokenizer.encode("target"), *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]

    def prompt(n: int) -> list[int]:
        return template.encode({**values, cut: values[cut][:n]} if cut else values, tokenizer, first)

    lengths = range(len(values[cut]) + 1) if cut else [0]
    full = len(prompt(99)) + len(completion)
    for max_tokens in range(1, full + 3):
        kept = max((n for n in lengths if len(prompt(n)) + len(completion) <= max_tokens), default=None)
        for overflow in OVERFLOWS:
            given = (values, tokenizer, first, "t", cut, max_tokens, overflow)
            if kept is not None:
                assert template.example(*given) == (prompt(kept) + completion, len(prompt(kept)))
            elif overflow == "drop":
                assert template.example(*given) is None
            elif overflow == "error" or max_tokens <= len(prompt(0)):
                excess = len(prompt(0)) + len(completion) - max_tokens
                told = mistake(template.example, *given)
                assert f"exceeds --max_tokens={max_tokens} by {excess} " in told and (
                    f"all of --truncation_field={cut} cut" in told
                ) == (cut is not None)
                counts = [int(count) for count in re.findall(r" (\d+)[,)]", told)]
                assert sum(counts) == excess + max_tokens and counts[-1] == len(completion)
            else:
                ids, place = template.example(*given)
                assert (
                    len(ids) == max_tokens
                    and ids[:place] == prompt(0)
                    and ids[place:] == completion[: max_tokens - place] != []
                )
                assert tokenizer.eos_id not in ids, "the target is not whole"


def test_from_its_place_on_an_example_is_the_target():
    randomly = random.Random(0)
    for _ in range(200):
        values = {
            "a": "x" * randomly.randrange(9),
            "t": "".join(randomly.choices("{}<P>\\ab", k=randomly.randrange(1, 9))),
        }
        ids, place = parse("<P*4>{a}<P>").example(values, ENDING, ENDING.vocab_size, "t", "a", 15, "error")
        assert ENDING.decode(ids[place:]) == values["t"] + "<|endoftext|>" and ids[:4] == [
            *range(ENDING.vocab_size, ENDING.vocab_size + 4)
        ]
        assert ids[place - 1] == ENDING.vocab_size + 4 and len(ids) <= 15


def test_an_empty_target_is_its_end_token():
    values = {"a": "xyz", "t": ""}
    assert parse("<P>{a}").example(values, ENDING, 200, "t", None, 9, "error") == (
        [200, *ENDING.encode("xyz"), ENDING.eos_id],
        4,
    )
    assert "nothing to learn" in mistake(parse("<P>{a}").example, values, CHARS, 200, "t", None, 9, "error")
    assert "exceeds --max_tokens=4 by 1 (" in mistake(
        parse("<P>{a}").example, values, ENDING, 200, "t", None, 4, "truncate_target"
    )


def test_fields_that_dont_go_together_are_told():
    template = parse("<P>{toxic}{n}")
    template.check("polite", "toxic")
    template.check("polite", None)
    for target, truncation, told in [("toxic", None, "--target_field=toxic: is in --prompt_format"), ("polite", "polite", "--truncation_field=polite: is the target"),
                                     ("polite", "txic", "no field of --prompt_format, which has toxic, n; did you mean toxic?")]:  # fmt: skip
        assert told in mistake(template.check, target, truncation)
        assert told in mistake(template.example, VALUES, BYTES, 257, target, truncation, 99, "drop")
    assert "no field 'answer'" in mistake(template.example, VALUES, BYTES, 257, "answer", None, 99, "drop")
