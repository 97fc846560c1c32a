"""Tokenizers: encode and decode are inverse, JSON holds them whole, and tiktoken and tokenizers are the witnesses."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import SHARED, needs_shared

from nanoforge.data import tokenization
from nanoforge.errors import UserError

SAMPLE = "Don't panic: naïve café, 1,000 €!\n\tdef f(x):  return x\n日本 👩‍🚀"


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    return tokenization.TiktokenTokenizer.from_name("gpt2")


def through_json(tokenizer: tokenization.Tokenizer) -> tokenization.Tokenizer:
    return tokenization.from_json(json.loads(json.dumps(tokenization.to_json(tokenizer))), "here")


@pytest.mark.parametrize(
    "tokenizer",
    [
        tokenization.CharTokenizer(sorted(set(SAMPLE))),
        tokenization.CharTokenizer(sorted(set(SAMPLE)), has_eos=True),
        tokenization.ByteTokenizer(),
    ],
)
def test_round_trips(tokenizer: tokenization.Tokenizer):
    again = through_json(tokenizer)
    ids = tokenizer.encode(SAMPLE)
    assert tokenizer.decode(ids) == SAMPLE == again.decode(again.encode(SAMPLE))
    assert max(ids) < tokenizer.vocab_size
    assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    if tokenizer.eos_id is not None:
        assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"


def test_bytes_are_utf_8():
    assert tokenization.ByteTokenizer().encode(SAMPLE).tolist() == list(SAMPLE.encode())


def test_unknown_characters_are_named():
    with pytest.raises(UserError, match="knows no 'ö', '€'"):
        tokenization.CharTokenizer("abc").encode("a€öc")
    with pytest.raises(UserError, match="knows no"):
        tokenization.CharTokenizer("ac").encode("b")


@needs_shared
def test_gpt2_is_tiktokens_and_stored_whole(gpt2: tokenization.TiktokenTokenizer, monkeypatch: pytest.MonkeyPatch):
    import tiktoken

    ids = gpt2.encode(SAMPLE)
    assert ids.tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(SAMPLE)
    assert gpt2.decode(ids) == SAMPLE
    spec = json.dumps(tokenization.to_json(gpt2))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/nowhere")
    again = tokenization.from_json(json.loads(spec), "here")
    assert np.array_equal(again.encode(SAMPLE), ids)
    assert (again.eos_id, again.vocab_size) == (50256, 50257)
    assert tokenization.to_json(again) == tokenization.to_json(gpt2)


def test_unknown_encodings_are_refused():
    with pytest.raises(UserError, match="did you mean gpt2"):
        tokenization.TiktokenTokenizer.from_name("gpt22")


def test_trained_bpe_is_the_tokenizers_librarys():
    tokenizers = pytest.importorskip("tokenizers")
    text = "low lower lowest new newer newest wide wider widest\n" * 50
    trained = tokenization.BPETokenizer.train([text], 300)
    again = through_json(trained)
    reference = tokenizers.Tokenizer.from_str(json.dumps(trained.to_json()["tokenizer"]))
    for sample in (text, SAMPLE):
        expected = reference.encode(sample).ids
        assert trained.encode(sample).tolist() == again.encode(sample).tolist() == expected
        assert trained.decode(trained.encode(sample)) == sample
    assert trained.vocab_size <= 300
    assert trained.decode([trained.eos_id]) == "<|endoftext|>"
    assert len(trained.encode("lowest")) < 6


@pytest.mark.parametrize("is_special", [True, False])
def test_text_that_spells_a_control_token_is_text(*, is_special: bool):
    """The witness is the same tokenizer without added tokens: the library then knows of no control token."""
    tokenizers = pytest.importorskip("tokenizers")
    spec = tokenization.BPETokenizer.train(["low lower <|endoftext|> newest\n" * 50], 300).to_json()["tokenizer"]
    imported = tokenizers.Tokenizer.from_str(json.dumps(spec))
    words = [tokenizers.AddedToken("<|im_start|>", special=is_special), tokenizers.AddedToken("  ", special=False)]
    imported.add_tokens(words)
    imported.enable_truncation(5)
    imported.enable_padding(length=40)
    tokenizer = tokenization.ExtendedTokenizer(
        tokenization.BPETokenizer(json.loads(imported.to_str())), ["<|user|>", "<|assistant|>"]
    )
    plain = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))
    text = "low<|endoftext|>\n<|im_start|>user lower<|assistant|>"
    for again in (tokenizer, through_json(tokenizer)):
        assert again.encode(text).tolist() == plain.encode(text).ids
        assert again.decode(again.encode(text)) == text
        assert again.eos_id == plain.token_to_id("<|endoftext|>")
    imported.no_padding()
    assert tokenizer.encode("a  b").tolist() == imported.encode("a  b").ids, "white space is no control token"
    assert imported.token_to_id("  ") in tokenizer.encode("a  b")


def test_models_that_look_whole_words_up_make_no_control_token_either():
    """Unigram, and words without a pre-tokenizer: in their vocabularies stands the token itself."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((char, -2.0) for char in "</s>ab ")]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0, byte_fallback=False))
    words = tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>")
    by_words = tokenizers.Tokenizer(words)
    by_words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    for library in (unigram, by_words):
        library.add_special_tokens(["<unk>", "</s>"])
        library.encode_special_tokens = True
        assert 1 in library.encode("a </s> b").ids, "so does the library itself"
        tokenizer = tokenization.BPETokenizer(json.loads(library.to_str()))
        assert 1 not in tokenizer.encode("a </s> b")
        assert tokenizer.encode("a zz b").tolist() == library.encode("a zz b").ids, "what is unknown stays so"
        if library is unigram:
            assert [pieces[i][0] for i in tokenizer.encode("a </s>")] == list("a </s>")


def test_runs_tokenizers_are_saved_by_name(tmp_path: Path):
    tokenizers = {"a": tokenization.CharTokenizer("xyz"), "b": tokenization.ByteTokenizer()}
    tokenization.save(tmp_path / "tokenizer.json", tokenizers)
    loaded = tokenization.load(tmp_path / "tokenizer.json")
    assert list(loaded) == ["a", "b"] and loaded["a"].decode([2, 0]) == "zx"
    (tmp_path / "tokenizer.json").write_text('{"tokenizers": [{"name": "a", "kind": "os.system"}]}')
    with pytest.raises(UserError, match="not a tokenizer"):
        tokenization.load(tmp_path / "tokenizer.json")
