"""The cache of words: the ids of tiktoken and of the tokenizers library, for every text."""

import itertools
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiktoken
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoforge.data import byte_level, tokenization, word_cache
from nanoforge.data.model_tokenizers import ADDED_TOKEN, DIGIT_SPLITS, byte_level_spec

tokenizers = pytest.importorskip("tokenizers")

# Quotes, what may follow them, and each class of characters.
SIGNS = "'slre0½ \n.日"
ODD_SIGNS = SIGNS + "tvmdZé9\u2019\u200b\u01c5\t\x85\xa0\u3000\r\u0301\U0001f642\ue000\x1c"
UNKNOWN_SIGNS = "\0\u180e\U0003134a\u0378"


@pytest.fixture(autouse=True)
def encodes_all_texts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenization, "MIN_CACHED_CHARS", 0)
    monkeypatch.setattr(tokenization.BPETokenizer, "min_encoded", 0)
    monkeypatch.setattr(tokenization.TiktokenTokenizer, "min_encoded", 0)


@pytest.fixture(scope="module")
def source() -> str:
    """Real text: Python, with names of many lengths."""
    return (ROOT / "model.py").read_text()


@pytest.fixture(scope="module")
def trained(source: str) -> tokenization.BPETokenizer:
    return tokenization.BPETokenizer.train([source], 1000)


ALPHABET = {char: i for i, char in enumerate(byte_level.byte_chars())}


def spec_of(merges: list[str], **vocabulary: int) -> dict:
    """A byte-level BPE whose merges make these tokens, in the order of their ids unless the vocabulary says more."""
    tokens = dict.fromkeys(merge.replace(" ", "") for merge in merges)
    vocab = ALPHABET | {token: 256 + i for i, token in enumerate(tokens)} | vocabulary
    return {**byte_level_spec(vocab, [merge.split(" ") for merge in merges]), "normalizer": None}


def dense_spec() -> dict:
    """A BPE in which every two ODD_SIGNS and three SIGNS are a token: a cut that is missing or too much changes ids."""
    chars = byte_level.byte_chars()
    spelled = ["".join(chars[byte] for byte in sign.encode()) for sign in ODD_SIGNS]
    merges = [f"{sign[:i]} {sign[i]}" for sign in spelled for i in range(1, len(sign))]
    merges += [" ".join(pair) for pair in itertools.product(spelled, repeat=2)]
    for first, second, third in itertools.product(spelled[: len(SIGNS)], repeat=3):
        merges += [f"{first}{second} {third}", f"{first} {second}{third}"]
    return spec_of(list(dict.fromkeys(merges)))


def ranks_of(spec: dict) -> dict[bytes, int]:
    ranks = byte_level.ranks_of_bpe(spec, tokenization.BPETokenizer(spec).tokenizer.model)
    assert ranks is not None
    return ranks


@pytest.fixture(scope="module", params=["byte_level", "digits", 0, -1])
def tokenizer(request: pytest.FixtureRequest) -> tokenization.LibraryTokenizer:
    """The same merges behind each of the splits that are known."""
    spec = dense_spec()
    if isinstance(request.param, int):
        ranks = ranks_of(spec)
        pattern = byte_level.GPT2_PATTERNS[request.param]
        encoding = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        return tokenization.TiktokenTokenizer(encoding)
    if request.param == "digits":
        digits = {"type": "Digits", "individual_digits": True}
        spec["pre_tokenizer"]["pretokenizers"].insert(0, digits)
    return tokenization.BPETokenizer(spec)


def assert_same_ids(tokenizer: tokenization.LibraryTokenizer, texts: list[str]) -> None:
    expected = [tokenizer.encode_by_library(text).tolist() for text in texts]
    assert tokenizer.word_cache is not None
    assert [ids.tolist() for ids in tokenizer.encode_texts(texts)] == expected


def test_all_texts_of_three_characters(tokenizer: tokenization.LibraryTokenizer):
    """The texts stand beside each other, so this is also a test that none changes its neighbours."""
    assert_same_ids(tokenizer, ["".join(chars) for chars in itertools.product(SIGNS, repeat=3)])


def test_the_end_of_a_text(tokenizer: tokenization.LibraryTokenizer):
    for text in ("", "'", "'l", "'r", "'v", "e'l", "'s", "'ll", " ", " \n", "1 ", "'s'l"):
        assert_same_ids(tokenizer, [text])
        assert_same_ids(tokenizer, [text, "", text])


def test_texts_of_odd_characters(tokenizer: tokenization.LibraryTokenizer):
    rng = random.Random(0)
    for alphabet in (SIGNS, ODD_SIGNS):
        assert_same_ids(tokenizer, ["".join(rng.choices(alphabet, k=10_000))])
    assert_same_ids(tokenizer, ["".join(rng.choices(ODD_SIGNS + UNKNOWN_SIGNS, k=n)) for n in range(60)])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=4))
def test_any_text(tokenizer: tokenization.LibraryTokenizer, texts: list[str]):
    assert_same_ids(tokenizer, texts)


def test_halves_of_surrogate_pairs_are_the_librarys(trained: tokenization.BPETokenizer):
    ranks = ranks_of(trained.to_json()["tokenizer"])
    encoding = tiktoken.Encoding("own", pat_str=byte_level.GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})
    assert_same_ids(tokenization.TiktokenTokenizer(encoding), ["a \ud83d b", "c"])


@pytest.mark.slow
@pytest.mark.parametrize("name, pattern", [("LETTER", r"\p{L}"), ("NUMBER", r"\p{N}"), ("SPACE", r"\s")])
def test_classes_of_all_characters_are_those_of_both_libraries(name: str, pattern: str):
    """Each library is given all characters, and keeps those of a class."""
    classes = word_cache.class_table()[:-1]
    known = np.flatnonzero(classes != word_cache.UNKNOWN)
    assert len(known) > 64_000
    text = "".join(map(chr, known))
    expected = "".join(map(chr, known[classes[known] == getattr(word_cache, name)]))
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert bytes(encoding.encode_ordinary(text)).decode() == expected
    keep = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed", invert=True)
    assert "".join(piece for piece, _ in keep.pre_tokenize_str(text)) == expected


def test_a_full_table_begins_anew(trained: tokenization.BPETokenizer, source: str, monkeypatch: pytest.MonkeyPatch):
    """Threads that share a table of few entries: one puts another in its place while others read."""
    monkeypatch.setattr(word_cache, "MAX_ENTRIES", 1100)
    monkeypatch.setattr(word_cache, "MAX_IDS", 1500)
    monkeypatch.setattr(word_cache, "SLOT_BITS", 4)
    tokenizer = tokenization.BPETokenizer(trained.to_json()["tokenizer"])
    texts = [source[i : i + 997] for i in range(0, len(source), 997)]
    expected = [tokenizer.encode_by_library(text).tolist() for text in texts]
    first = tokenizer.word_cache.table
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            for ids in (pool.map(tokenizer.encode, texts), pool.map(tokenizer.encode, texts)):
                assert [row.tolist() for row in ids] == expected
    finally:
        sys.setswitchinterval(interval)
    assert tokenizer.word_cache.table is not first


def test_words_with_the_same_beginning(trained: tokenization.BPETokenizer, monkeypatch: pytest.MonkeyPatch):
    """All words in one slot, with keys that begin alike; the library is the witness."""
    monkeypatch.setattr(word_cache, "SLOT_BITS", 1)
    tokenizer = tokenization.BPETokenizer(trained.to_json()["tokenizer"])
    words = ["abcdefghijklmnopqrst"[:n] for n in range(20, 0, -1)]
    for text in words + words + ["abcdefghX"]:
        assert_same_ids(tokenizer, [text])


def test_the_library_is_asked_for_new_words_alone(trained: tokenization.BPETokenizer, source: str):
    tokenizer = tokenization.BPETokenizer(trained.to_json()["tokenizer"])
    tokenizer.encode(source)
    cache = tokenizer.word_cache
    asked = []
    encode_words = cache.encode_words
    cache.encode_words = lambda words: asked.append(words) or encode_words(words)
    tokenizer.encode(source)
    words = "".join(asked).split("\0")
    assert len(words) < len(source) / 100 and all(len(word) > word_cache.KEY_BYTES for word in words if word)


# ---------------------------------------------------------------------------------------------------------------------
# ranks


@pytest.mark.parametrize(
    "spec, are_ranks",
    [
        (spec_of(["a b", "ab c"]), True),
        (spec_of(["a b", "b c", "ab c", "a bc"]), True),  # the last one never happens
        (spec_of(["b c", "a b", "ab c"]), False),  # abc merges to a and bc, which tiktoken would join
        (spec_of(["a b", "ab c"], ab=257, abc=256), False),
        (spec_of(["a b"]) | {"normalizer": {"type": "NFC"}}, False),
        (spec_of(["a b"]) | {"added_tokens": [{**ADDED_TOKEN, "id": 257, "content": "ab ab"}]}, False),
        (
            spec_of(["a b"])
            | {"pre_tokenizer": {**byte_level.BYTE_LEVEL, "use_regex": True, "add_prefix_space": True}},
            False,
        ),
        (spec_of(["a b"]) | {"pre_tokenizer": byte_level.BYTE_LEVEL}, False),
        (spec_of(["a b"]) | {"pre_tokenizer": byte_level_spec({}, [], DIGIT_SPLITS)["pre_tokenizer"]}, True),
        (spec_of(["a b"]) | {"pre_tokenizer": byte_level_spec({}, [], [r"\p{N}+"])["pre_tokenizer"]}, False),
    ],
)
def test_a_bpe_without_ranks_stays_with_its_library(spec: dict, *, are_ranks: bool):
    tokenizer = tokenization.BPETokenizer(json.loads(json.dumps(spec)))
    assert (tokenizer.word_cache is not None) == are_ranks
    words = ["".join(chars) for n in range(1, 6) for chars in itertools.product("abc", repeat=n)]
    text = " ".join([*words, "ab ab", "12  3"])
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    assert tokenizer.encode(text).tolist() == library.encode(text).ids


@pytest.mark.parametrize("lacking", ["\0", "\x04", "a", "é", "日"])
def test_bytes_that_are_no_tokens_are_the_librarys(lacking: str):
    """As in SmolLM2's vocabulary; the library leaves them out."""
    spec = spec_of(["b c"])
    del spec["model"]["vocab"][byte_level.byte_chars()[lacking.encode()[-1]]]
    tokenizer = tokenization.BPETokenizer(spec)
    assert_same_ids(tokenizer, ["bc bcb", f"b{lacking}c", "bc", lacking])
    assert tokenizer.word_cache.encode([f"b{lacking}c"]) is None and tokenizer.word_cache.encode(["bc"]) is not None


def test_whole_words_of_the_vocabulary_that_no_merge_makes(trained: tokenization.BPETokenizer):
    spec = spec_of(["a b"], abc=257)
    spec["model"]["ignore_merges"] = True
    tokenizer = tokenization.BPETokenizer(spec)
    assert tokenizer.word_cache is None and tokenizer.encode("abc ab").tolist() == [257, ALPHABET["Ġ"], 256]
