"""Tokenizers of other programs' models give the ids of transformers, sentencepiece, mistral-common and llama.cpp."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import SHARED

from nanoforge.data import gguf_metadata, model_tokenizers, tokenization
from nanoforge.errors import UserError
from sample import TokenPrinter

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXTS = [
    "Hello world",
    " Hello  world ",
    "naïve café, 1,000 € in 2024: 3.14159",
    "日本語 and русский, العربية",
    "👩‍🚀 🤖🤖\u200d",
    "\n\n\tdef f(x):\r\n    return x + 1  # it's\n\n\n",
    "<s>user</s> <|im_start|>system<|im_end|> [INST] <unk> <0x0A> <|endoftext|>",
    "'S they'll don't I'M x=1;y+=23456789",
    "e\u0301 ﬁ Å \u00a0 \ufeff\x00",
    "",
]
CORPUS = [
    "low lower lowest newer newest wide wider widest the they don't 2024 naïve café 日本語 def f(x):\n    return x\n"
] * 40


def train_byte_level(pre_tokenizer: Any, normalizer: Any = None, n_ids: int = 400) -> Any:
    """A byte-level BPE with the control tokens of a chat model, of the `tokenizers` library."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre_tokenizer is None)
    parts = [byte_level] if pre_tokenizer is None else [pre_tokenizer, byte_level]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n_ids,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def save_fast(folder: Path, tokenizer: Any, **settings: Any) -> None:
    """A model's folder as transformers writes it."""
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)


def check_against_transformers(folder: Path, texts: Sequence[str] = TEXTS) -> tokenization.Tokenizer:
    """Ids and round trips of our tokenizer against transformers' from the same folder, also after JSON."""
    loaded = model_tokenizers.load_folder(folder)
    assert loaded is not None
    witness = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    again = tokenization.from_json(json.loads(json.dumps(tokenization.to_json(loaded))), "here")
    assert tokenization.to_json(again) == tokenization.to_json(loaded)
    for text in texts:
        expected = witness(text, split_special_tokens=True, add_special_tokens=False).input_ids
        for tokenizer in (loaded, again):
            assert tokenizer.encode(text).tolist() == expected, text
            assert tokenizer.decode(expected) == witness.decode(expected, clean_up_tokenization_spaces=False)
    assert again.eos_id == witness.eos_token_id
    assert {name: witness.convert_tokens_to_ids(name) for name in loaded.added_ids} == loaded.added_ids
    named = {name: text for name, text in witness.special_tokens_map.items() if isinstance(text, str)}
    assert loaded.special_tokens == named and set(named.values()) <= set(loaded.added_ids)
    begins = witness("a").input_ids[0] == witness.bos_token_id
    assert again.bos_id == (witness.bos_token_id if begins else None)
    assert again.chat_template == (witness.chat_template or "")
    return loaded


QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pre_tokenizers() -> dict[str, Any]:
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated")
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    return {"gpt2": (None, None), "smollm": (digits, None), "qwen": (split, tokenizers.normalizers.NFC())}


@pytest.mark.parametrize("family", ["gpt2", "smollm", "qwen"])
def test_byte_level_tokenizers_of_hugging_face(tmp_path: Path, family: str):
    tokenizer = train_byte_level(*pre_tokenizers()[family])
    tokenizer.add_tokens(["<think>", "    "])
    save_fast(
        tmp_path,
        tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<tool>"],
        chat_template="{{ messages[0].content }}",
    )
    loaded = check_against_transformers(tmp_path)
    assert loaded.end_ids == (loaded.eos_id,) and loaded.bos_id is None
    assert loaded.added_ids["<tool>"] == loaded.vocab_size - 1


def test_settings_win_over_each_other_as_in_transformers(tmp_path: Path):
    tokenizer = train_byte_level(None)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "chat_template": [{"name": "rag", "template": "r"}]}
    write = {
        "tokenizer_config.json": config | {"bos_token": {"content": "<|im_start|>"}},
        "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False}},
        "config.json": {"eos_token_id": 0},
        "generation_config.json": {"eos_token_id": [2, 7, 99999]},
    }
    for name, value in write.items():
        (tmp_path / name).write_text(json.dumps(value))
    loaded = model_tokenizers.load_folder(tmp_path)
    assert (loaded.eos_id, loaded.bos_id, loaded.end_ids, loaded.chat_template) == (2, 1, (2, 7), "")

    write["tokenizer_config.json"]["chat_template"].append({"name": "default", "template": "d"})
    write["tokenizer_config.json"]["added_tokens_decoder"] = {
        "7": {"content": tokenizer.id_to_token(7), "special": True}
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(write["tokenizer_config.json"]))
    (tmp_path / "generation_config.json").unlink()
    loaded = model_tokenizers.load_folder(tmp_path)
    assert (loaded.eos_id, loaded.bos_id, loaded.end_ids, loaded.chat_template) == (0, 1, (0,), "d")
    assert loaded.added_ids[tokenizer.id_to_token(7)] == 7, "special by the settings"

    (tmp_path / "chat_template.jinja").write_text("j")
    assert model_tokenizers.load_folder(tmp_path).chat_template == "j"
    assert model_tokenizers.load_folder(tmp_path / "none") is None


# ---------------------------------------------------------------------------------------------------------------------
# GGUF

SMOLLM2 = SHARED / "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smollm2 = pytest.mark.skipif(not SMOLLM2.exists(), reason="needs SmolLM2 in ../shared, which is missing")


def test_metadata_is_that_of_the_gguf_package(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("a", [1, 2, 3])
    writer.add_array("texts", ["ä", ""])
    writer.add_float64("f", 0.1)
    writer.add_bool("b", val=True)
    writer.add_int64("i", -3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = gguf_metadata.read_metadata(tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert metadata == {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    data = (tmp_path / "m.gguf").read_bytes()
    for cut in (b"", b"GGML" + data[4:], data[:-3], data[:4] + b"\0" + data[5:]):
        (tmp_path / "m.gguf").write_bytes(cut)
        with pytest.raises(UserError, match="not a whole GGUF file"):
            gguf_metadata.read_metadata(tmp_path / "m.gguf")


@needs_smollm2
@pytest.mark.slow
def test_smollm2_from_gguf_is_transformers_and_llama_cpps():
    """Two witnesses, which read the same file: ids of texts, of control tokens, and the template."""
    tokenizer = model_tokenizers.from_gguf(gguf_metadata.read_metadata(SMOLLM2))
    witness = transformers.AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    server = llama_cpp_server(SMOLLM2)
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert ids == witness(text, split_special_tokens=True, add_special_tokens=False).input_ids
        assert ids == llama_cpp_ids(server, text)
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids) == (None, witness.eos_token_id, (2, 0))
    assert set(witness.all_special_tokens) <= set(tokenizer.added_ids)
    assert tokenizer.chat_template == witness.chat_template
    assert tokenizer.special_tokens["bos_token"] == witness.bos_token
    assert tokenizer.vocab_size == len(witness)


def llama_cpp_server(path: Path) -> Any:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 256
    params.cpuparams.n_threads = 1
    params.warmup = False
    return xllamacpp.Server(params)


def llama_cpp_ids(server: Any, text: str) -> list[int]:
    """How llama.cpp tokenizes a text in which control tokens are text."""
    body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
        return json.loads(response.read())["tokens"]


# ---------------------------------------------------------------------------------------------------------------------
# SentencePiece


def train_sentencepiece(folder: Path, **options: Any) -> Path:
    """A small model with byte fallback, a control piece and user-defined pieces."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "corpus.txt").write_text("".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        byte_fallback=True,
        control_symbols=["[INST]"],
        user_defined_symbols=["<|im_end|>", "<turn>", "<think>"],
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return folder / "tokenizer.model"


KINDS = {
    "bpe": {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "bpe without prefix": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "unigram": {"model_type": "unigram"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_models_are_the_librarys(tmp_path: Path, kind: str):
    path = train_sentencepiece(tmp_path, **KINDS[kind])
    settings = {"added_tokens_decoder": {"9": {"content": "<turn>", "special": True}}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    loaded = model_tokenizers.load_folder(tmp_path)
    sentencepiece = pytest.importorskip("sentencepiece")
    witness = sentencepiece.SentencePieceProcessor(model_file=str(path))
    again = tokenization.from_json(json.loads(json.dumps(tokenization.to_json(loaded))), "here")
    for text in TEXTS:
        if "<|im_end|>" not in text:
            expected = witness.encode(text)
            assert loaded.encode(text).tolist() == again.encode(text).tolist() == expected
            assert loaded.decode(expected) == witness.decode(expected)
            assert kind == "unigram" or loaded.decode(expected) == text
    control = {name: witness.piece_to_id(name) for name in ("<s>", "</s>", "[INST]", "<|im_end|>", "<turn>")}
    assert loaded.added_ids == control
    spelled = " ".join([*control, "<think>"])
    assert set(loaded.encode(spelled).tolist()).isdisjoint(control.values())
    assert loaded.decode(loaded.encode(spelled)) == spelled
    assert witness.piece_to_id("<think>") in loaded.encode(spelled)
    assert (again.bos_id, again.eos_id, again.end_ids) == (1, 2, (2, 5))
    assert loaded.decode([1, *loaded.encode("low café"), 2]) == "<s>low café</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_parts_has_the_ids_and_the_spelling_of_the_whole(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
):
    tokenizer = model_tokenizers.load(str(train_sentencepiece(tmp_path, **KINDS[kind])))
    parts = ["low lower", " newest\n", "\n def f(x):", "\n    return x", " the", " café 日🤖本"]
    ids = [tokenizer.encode(parts[0]), *map(tokenizer.encode_continuation, parts[1:])]
    whole = tokenizer.encode("".join(parts)).tolist()
    assert np.concatenate(ids).tolist() == whole
    printer = TokenPrinter(tokenizer)
    for i in whole:
        printer.put(i)
    printer.flush()
    assert capsys.readouterr().out == tokenizer.decode(whole)
    extended = tokenization.add_tokens(tokenizer, ["<|user|>"])
    user = extended.added_ids["<|user|>"]
    assert extended.decode([user, *whole]) == "<|user|>" + tokenizer.decode(whole)
    assert extended.decode_continuation(whole[1:]) == tokenizer.decode_continuation(whole[1:])
    assert (extended.bos_id, extended.end_ids) == (tokenizer.bos_id, tokenizer.end_ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_hugging_faces_conversions_of_sentencepiece(tmp_path: Path, kind: str):
    """As Llama 2 and T5 have them in tokenizer.json: the normalizer of the one, Metaspace of the other."""
    ids = {} if kind == "bpe" else {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}  # T5's
    path = train_sentencepiece(tmp_path, **KINDS[kind], **ids)
    folder = tmp_path / "converted"
    convert = transformers.LlamaTokenizer if kind == "bpe" else transformers.T5Tokenizer
    convert.from_pretrained(path.parent).save_pretrained(folder)
    path.unlink()
    loaded = check_against_transformers(folder, [text for text in TEXTS if "<s>" not in text])
    spelled = " ".join(loaded.added_ids)
    assert set(loaded.encode(spelled).tolist()) & {*loaded.added_ids.values()} <= {loaded.added_ids["<unk>"]}
    whole = loaded.encode("low newest def the").tolist()
    assert np.concatenate([loaded.encode("low newest"), loaded.encode_continuation(" def the")]).tolist() == whole
    assert loaded.decode(whole[:1]) + loaded.decode_continuation(whole[1:]) == loaded.decode(whole)
