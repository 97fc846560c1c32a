"""Text streams: pieces join to the whole text, and no piece of a stop string is ever shown."""

import pytest

from nanoforge.data.tokenization import ByteTokenizer
from nanoforge.models.text_stream import TextStream

TEXT = "Grüße, 世界! ENDE or END: it is 🎉 over.<END>behind"


@pytest.mark.parametrize("stop", [[], ["<END>"], ["over", "END"], ["behind "], ["ü"], ["🎉 o", ""]])
def test_pieces_join_to_the_text_before_the_first_stop_string(stop: list[str]) -> None:
    tokenizer = ByteTokenizer()
    places = [TEXT.find(text) for text in stop if text and text in TEXT]
    expected = TEXT[: min(places)] if places else TEXT
    ids = tokenizer.encode(TEXT).tolist()
    stream, shown = TextStream(tokenizer, stop), ""
    for n in range(1, len(ids) + 1):
        stopped = stream.read(ids[:n])
        shown += stream.take()
        assert expected.startswith(shown)
        assert stopped == any(text in tokenizer.decode(ids[:n]) for text in stop if text)
    stream.finish()
    assert shown + stream.take() == stream.text == expected


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer, ["aab", "abc"])
    taken = []
    for token_id in tokenizer.encode("xaaabz").tolist()[:4]:
        stream.put(token_id)
        taken.append(stream.take())
    assert taken == ["x", "", "", "a"]


def test_an_incomplete_character_is_shown_at_the_end() -> None:
    stream = TextStream(ByteTokenizer(), continues_text=True, offset=10)
    stream.read([10 + byte for byte in "aü".encode()[:2]])
    assert stream.take() == "a"
    stream.finish()
    assert stream.take() == "\ufffd"
