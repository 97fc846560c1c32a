"""Tokenizers of other programs' models give the ids of transformers, sentencepiece, mistral-common and llama.cpp."""

import base64
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import SHARED, needs_shared

from nanoforge.data import corpus, documents, gguf_metadata, model_tokenizers, token_bins, tokenization
from nanoforge.errors import UserError
from nanoforge.models.text_stream import TextStream

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
    splits_words = isinstance(pre_tokenizer, tokenizers.pre_tokenizers.Split)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits_words)
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
def test_smollm2_from_gguf_is_llama_cpps():
    """transformers' conversion forgets that digits stand alone; llama.cpp's does not."""
    tokenizer = model_tokenizers.load(str(SMOLLM2))
    server = llama_cpp_server(SMOLLM2)
    for text in [*TEXTS, "\n\n1. 2024-11-26"]:
        ids = tokenizer.encode(text).tolist()
        assert ids == llama_cpp_ids(server, text)
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids) == (None, 2, (2, 0))
    assert (tokenizer.vocab_size, len(tokenizer.added_ids)) == (49152, 17)
    assert tokenizer.special_tokens["bos_token"] == "<|im_start|>" in tokenizer.chat_template


def byte_level_metadata(tokenizer: Any, pre: str) -> dict[str, Any]:
    """The keys of a .gguf file for a byte-level BPE of the `tokenizers` library."""
    spec = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in spec["merges"]],
        "eos_token_id": 0,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}


def test_a_tokenizer_is_the_same_from_whatever_file(tmp_path: Path):
    """By its ids: of the splits of a text by name only the right one gives the same."""
    digits, _ = pre_tokenizers()["smollm"]
    tokenizers_of = {"gpt-2": train_byte_level(None), "smollm": train_byte_level(digits)}
    for pre, trained in tokenizers_of.items():
        save_fast(tmp_path / pre, trained, eos_token="<|endoftext|>")
        loaded = model_tokenizers.load(str(tmp_path / pre))
        for other in ("gpt-2", "llama-bpe", "smollm", "falcon"):
            from_gguf = model_tokenizers.from_gguf(byte_level_metadata(trained, other))
            assert tokenization.same_tokenizer(loaded, from_gguf) == (other == pre)
    by_name = [tokenization.BPETokenizer(json.loads(trained.to_str())) for trained in tokenizers_of.values()]
    assert not tokenization.same_tokenizer(*by_name)


def test_tokens_that_end_a_completion_in_llama_cpp_are_control_tokens():
    metadata = byte_level_metadata(train_byte_level(None), "gpt-2")
    metadata["tokenizer.ggml.tokens"] += ["<end_of_turn>", "[PAD1]", "[PAD2]"]
    metadata["tokenizer.ggml.token_type"] += [1, 5, 5]
    metadata["tokenizer.ggml.eot_token_id"] = 2
    tokenizer = model_tokenizers.from_gguf(metadata)
    last = tokenizer.vocab_size - 1
    assert tokenizer.added_ids["<end_of_turn>"] == last not in tokenizer.encode("<end_of_turn>")
    assert tokenizer.end_ids == (0, 2, last)


def llama_cpp_server(path: Path) -> Any:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 256
    params.cpuparams.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    server.handle_completions({"prompt": [1], "n_predict": 1})  # one that ends before its loop has begun hangs
    return server


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
        user_defined_symbols=["<|im_end|>", "<turn>", "<think>", "\u2581\u2581\u2581"],
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
    added = {"9": {"content": "<turn>", "special": True}, "5000": {"content": "<|pad|>", "special": True}}
    settings = {"added_tokens_decoder": added, "eos_token": "</s>"}
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
    control["<|pad|>"] = len(witness)
    assert loaded.added_ids == control and loaded.vocab_size == len(witness) + 1
    spelled = " ".join([*control, "<think>"])
    assert set(loaded.encode(spelled).tolist()).isdisjoint(control.values())
    assert loaded.decode(loaded.encode(spelled)) == spelled
    assert witness.piece_to_id("<think>") in loaded.encode(spelled)
    assert (again.bos_id, again.eos_id, again.end_ids) == (1, 2, (2, 5))
    assert loaded.decode([1, *loaded.encode("low café"), 2]) == "<s>low café</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_parts_has_the_ids_and_the_spelling_of_the_whole(tmp_path: Path, kind: str):
    tokenizer = model_tokenizers.load(str(train_sentencepiece(tmp_path, **KINDS[kind])))
    parts = ["low lower", " newest\n", "\n def f(x):", "\n    return x", " the", " café 日🤖本"]
    ids = [tokenizer.encode(parts[0]), *map(tokenizer.encode_continuation, parts[1:])]
    whole = tokenizer.encode("".join(parts)).tolist()
    assert np.concatenate(ids).tolist() == whole
    stream, taken = TextStream(tokenizer), ""
    for i in whole:
        stream.put(i)
        taken += stream.take()
    stream.finish()
    assert taken + stream.take() == tokenizer.decode(whole)
    extended = tokenization.add_tokens(tokenizer, ["<|user|>"])
    user = extended.added_ids["<|user|>"]
    assert extended.decode([user, *whole]) == "<|user|>" + tokenizer.decode(whole)
    assert extended.decode_continuation(whole[1:]) == tokenizer.decode_continuation(whole[1:])
    assert (extended.bos_id, extended.end_ids) == (tokenizer.bos_id, tokenizer.end_ids)


def as_llama_2(path: Path) -> None:
    """Rewrite a tokenizer.json to what Llama 2 has: a normalizer marks the start, a template puts BOS before a text."""
    spec = json.loads(path.read_text())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]}
    spec["pre_tokenizer"] = None
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(spec))


@pytest.mark.parametrize("kind", ["llama", "llama 2", "t5"])
def test_hugging_faces_conversions_of_sentencepiece(tmp_path: Path, kind: str):
    options = KINDS["unigram"] | {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if kind == "t5" else KINDS["bpe"]
    path = train_sentencepiece(tmp_path, **options)
    folder = tmp_path / "converted"
    convert = transformers.T5Tokenizer if kind == "t5" else transformers.LlamaTokenizer
    convert.from_pretrained(path.parent).save_pretrained(folder)
    from_model = model_tokenizers.load(str(path))
    path.unlink()
    if kind == "llama 2":
        as_llama_2(folder / "tokenizer.json")
        for text in TEXTS[:4]:
            assert model_tokenizers.load(str(folder)).encode(text).tolist() == from_model.encode(text).tolist()
    loaded = check_against_transformers(folder, [text for text in TEXTS if "<s>" not in text])
    spelled = " ".join(loaded.added_ids)
    assert set(loaded.encode(spelled).tolist()) & {*loaded.added_ids.values()} <= {loaded.added_ids["<unk>"]}
    whole = loaded.encode("low newest def the").tolist()
    assert np.concatenate([loaded.encode("low newest"), loaded.encode_continuation(" def the")]).tolist() == whole
    assert loaded.decode(whole[:1]) + loaded.decode_continuation(whole[1:]) == loaded.decode(whole)
    assert loaded.bos_id == (1 if kind == "llama 2" else None)


def write_tiny_llama(path: Path, model: Path, **options: Any) -> None:
    """A .gguf file of a random Llama of one layer, with the pieces of a SentencePiece model."""
    gguf = pytest.importorskip("gguf")
    pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    proto = pb2.ModelProto.FromString(model.read_bytes())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    pieces = [piece.piece.replace("\u2581", " ") if piece.type == 4 else piece.piece for piece in proto.pieces]
    writer.add_token_list(pieces)  # as llama.cpp's converter writes them
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types([piece.type for piece in proto.pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in options.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    square = np.zeros((32, 32), dtype=np.float32)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    tensors = {f"blk.0.{name}.weight": square for name in names}
    tensors |= {f"{name}.weight": square[0] for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}
    tensors["token_embd.weight"] = np.zeros((len(proto.pieces), 32), dtype=np.float32)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "bpe without prefix"])
def test_sentencepiece_from_gguf_is_llama_cpps(tmp_path: Path, kind: str):
    model = train_sentencepiece(tmp_path, **KINDS[kind])
    has_prefix = kind == "bpe"
    options = {} if has_prefix else {"add_space_prefix": False, "add_bos_token": False}
    write_tiny_llama(tmp_path / "m.gguf", model, **options)
    loaded = model_tokenizers.load(str(tmp_path / "m.gguf"))
    server = llama_cpp_server(tmp_path / "m.gguf")
    from_model = model_tokenizers.load(str(model))
    for text in filter(None, TEXTS):
        ids = loaded.encode(text).tolist()
        assert ids == from_model.encode(text).tolist()
        assert loaded.decode(ids) == text
        if not (has_prefix and "   " in text):  # behind a user-defined piece llama.cpp adds another space
            assert ids == llama_cpp_ids(server, text)
    assert (loaded.bos_id, loaded.eos_id) == (1 if has_prefix else None, 2)
    assert tokenization.same_tokenizer(loaded, from_model) == has_prefix


# ---------------------------------------------------------------------------------------------------------------------
# tiktoken, and GPT-2's older files


@needs_shared
@pytest.mark.slow
def test_gpt2_is_one_tokenizer_from_whatever_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """tiktoken's encoding, a file of ranks, vocab.json with merges.txt, and a .gguf: tiktoken is the witness."""
    cache = SHARED / "tiktoken_cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    gpt2 = tokenization.TiktokenTokenizer.from_name("gpt2")
    for path in cache.iterdir():
        name = "vocab.json" if path.read_bytes()[:1] == b"{" else "merges.txt"
        (tmp_path / name).write_bytes(path.read_bytes())
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in gpt2.encoding._mergeable_ranks.items()]
    (tmp_path / "gpt2.tiktoken").write_text("\n".join(lines))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": list(vocabulary),
        "tokenizer.ggml.token_type": [1] * 50256 + [3],
        "tokenizer.ggml.merges": (tmp_path / "merges.txt").read_text().split("\n")[1:-1],
        "tokenizer.ggml.eos_token_id": 50256,
        "tokenizer.ggml.bos_token_id": 50256,
    }
    loaded = [
        model_tokenizers.load(str(tmp_path / "gpt2.tiktoken")),
        model_tokenizers.load(str(tmp_path)),
        model_tokenizers.from_gguf(metadata),
    ]
    assert tokenization.same_tokenizer(gpt2, *loaded)
    for text in TEXTS:
        expected = gpt2.encoding.encode_ordinary(text)
        assert [tokenizer.encode(text).tolist() for tokenizer in loaded] == [expected] * 3
    assert [(tokenizer.eos_id, tokenizer.bos_id) for tokenizer in loaded] == [(50256, None)] * 3
    metadata["tokenizer.ggml.add_bos_token"] = True
    with_bos = model_tokenizers.from_gguf(metadata)
    assert with_bos.bos_id == 50256 and not tokenization.same_tokenizer(gpt2, with_bos)


def test_llama_3s_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the format that its tokenizer.model has; tiktoken with the published pattern is the witness."""
    tiktoken = pytest.importorskip("tiktoken")
    tokens = [*(bytes([i]) for i in range(256)), b"lo", b"low", b" low", b"12", b"123", b"\n\n", b"'S"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [264, 272]}))
    monkeypatch.setitem(model_tokenizers.RANKS, len(tokens), model_tokenizers.RANKS[128000])
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    ranks = {token: rank for rank, token in enumerate(tokens)}
    witness = tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    loaded = model_tokenizers.load_folder(tmp_path)
    for text in [*TEXTS, " low 1234\n\nlow'S <|eot_id|>"]:
        assert loaded.encode(text).tolist() == witness.encode_ordinary(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.vocab_size == len(tokens) + 256
    assert [loaded.added_ids[name] - len(tokens) for name in ("<|begin_of_text|>", "<|eot_id|>")] == [0, 9]
    assert (loaded.bos_id, loaded.eos_id, loaded.end_ids) == (263, 264, (264, 272))
    monkeypatch.delitem(model_tokenizers.RANKS, len(tokens))
    with pytest.raises(UserError, match="263 tokens"):
        model_tokenizers.load_folder(tmp_path)


MISTRAL_FILES = ("tekken_240911.json", "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3")


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTRAL_FILES)
def test_mistrals_tokenizers_are_mistral_commons(name: str):
    """Real files: the byte-level BPE of Nemo, and the SentencePiece BPE of the kind that Llama 2 has."""
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    sentencepiece = pytest.importorskip("mistral_common.tokens.tokenizers.sentencepiece")
    path = Path(tekken.__file__).parents[2] / "data" / name
    is_tekken = name.startswith("tekken")
    witness = tekken.Tekkenizer.from_file(path) if is_tekken else sentencepiece.SentencePieceTokenizer(path)
    loaded = model_tokenizers.load(str(path))
    for text in TEXTS:
        assert loaded.encode(text).tolist() == witness.encode(text, bos=False, eos=False)
        assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (witness.bos_id, witness.eos_id, witness.n_words)


# ---------------------------------------------------------------------------------------------------------------------
# data/prepare.py


@pytest.mark.parametrize("kind", ["sentencepiece", "hub", "run"])
def test_a_dataset_is_prepared_with_a_models_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    """Documents begin and end as the model's own tokenizer has it, whatever the chunks that they are read in."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", 64)
    model = tmp_path / "models--org--small" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    model.mkdir(parents=True)
    train_sentencepiece(model, **KINDS["bpe"])
    source = str(model)
    if kind == "hub":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        source = f"org/small@{model.name}"
    tokenizer = model_tokenizers.load(str(model))
    if kind == "run":
        (tmp_path / "run").mkdir()
        tokenization.save(tmp_path / "run/tokenizer.json", {"mine": tokenizer})
        source = str(tmp_path / "run")
    texts = [f"low lower café {i} <s> newest\n def f(x): return x </s>\n" * 6 for i in range(4)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    paths = [str(tmp_path / f"{number}.txt") for number in range(4)]
    inputs = documents.CorpusInputs(tuple(paths[:3]), tuple(paths[3:]))
    corpus.write_dataset(tmp_path / "d", inputs.open, source)
    meta = token_bins.read_meta(tmp_path / "d")
    assert tokenization.same_tokenizer(meta.tokenizer, tokenizer)
    for split, ids_of in (("train", texts[:3]), ("val", texts[3:])):
        ids = token_bins.TokenBin(tmp_path / "d", split, meta).shards[0].open().tolist()
        expected = [[1, *tokenizer.encode(text).tolist(), 2] for text in ids_of]
        assert ids == [i for document in expected for i in document]


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: not JSON"):
        model_tokenizers.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}}')
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        model_tokenizers.load(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        model_tokenizers.load(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0b")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a tokenizer"):
        model_tokenizers.load(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"")
    for name in ("weights.bin", "nothing.json"):
        with pytest.raises(UserError, match=name):
            model_tokenizers.load(str(tmp_path / name))
    with pytest.raises(UserError, match="of the kind bert"):
        model_tokenizers.from_gguf({"tokenizer.ggml.model": "bert"})
    gguf = {"model": "gpt2", "pre": "unheard-of", "tokens": [], "merges": []}
    with pytest.raises(UserError, match="unheard-of"):
        model_tokenizers.from_gguf({f"tokenizer.ggml.{key}": value for key, value in gguf.items()})
