"""Tokenizers as Hugging Face's files: AutoTokenizer gives our ids, and decodes them as we do."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import gpt2_tokenizer_env

from nanoforge.data import model_tokenizers, tokenization
from nanoforge.data.tokenization import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from nanoforge.data.tokenizer_export import SAMPLES, write_tokenizer
from nanoforge.errors import UserError
from nanoforge.posttraining.example_rows import ROLES
from nanoforge.posttraining.examples import ExampleEncoder, extend_tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXTS = [
    *SAMPLES,
    "Hello world",
    " Hello  world ",
    "日本語 and русский, العربية",
    "👩‍🚀 🤖🤖\u200d",
    "\n\n\tdef f(x):\r\n    return x + 1  # it's\n\n\n",
    "'S they'll don't I'M x=1;y+=23456789",
    "e\u0301 ﬁ Å \u00a0 \ufeff\x00",
    "",
]
CHARS = "".join(sorted(set("".join(TEXTS))))
CORPUS = ["low lower the they don't 2024 naïve café 日本語 def f(x):\n    return x\n"] * 40


def train_sentencepiece(**options) -> SentencePieceTokenizer:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    lines = [line for text in CORPUS for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, hard_vocab_limit=False, minloglevel=2, **options
    )
    return SentencePieceTokenizer(model.getvalue())


def gpt2() -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", gpt2_tokenizer_env()["TIKTOKEN_CACHE_DIR"])
        return TiktokenTokenizer.from_name("gpt2")


def with_roles(tokenizer: Tokenizer) -> Tokenizer:
    chat = {"messages": [{"role": "user", "content": "a"}]}
    return extend_tokenizer(tokenizer, [chat])


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "char": lambda: CharTokenizer(CHARS, has_eos=True),
    "char, no end": lambda: CharTokenizer(CHARS),
    "byte": ByteTokenizer,
    "bpe": lambda: BPETokenizer.train(CORPUS, 400),
    "char with roles": lambda: with_roles(CharTokenizer(CHARS)),
    "byte with roles": lambda: with_roles(ByteTokenizer()),
    "bpe with roles": lambda: with_roles(BPETokenizer.train(CORPUS, 400)),
    "tiktoken with roles": lambda: with_roles(gpt2()),
    "sentencepiece bpe": lambda: train_sentencepiece(
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
    ),
    "sentencepiece unigram": lambda: train_sentencepiece(model_type="unigram", vocab_size=340, byte_fallback=True),
    "sentencepiece unigram, unknown": lambda: train_sentencepiece(model_type="unigram", vocab_size=90),
}


def write(folder: Path, tokenizer: Tokenizer):
    """transformers' tokenizer of the files that we wrote."""
    folder.mkdir()
    write_tokenizer(folder, tokenizer, 128, ROLES)
    return transformers.AutoTokenizer.from_pretrained(folder)


SLOW = [pytest.param(kind, marks=[pytest.mark.slow] if "tiktoken" in kind else []) for kind in KINDS]


@pytest.mark.parametrize("kind", SLOW)
def test_ids_and_texts_are_ours(kind: str, tmp_path: Path):
    tokenizer = KINDS[kind]()
    theirs = write(tmp_path / "hf", tokenizer)
    for text in TEXTS:
        expected = tokenizer.encode(text).tolist()
        assert theirs(text, split_special_tokens=True, add_special_tokens=False).input_ids == expected, text
        if "unknown" not in kind:
            assert theirs.decode(expected) == tokenizer.decode(expected), text
    assert theirs.eos_token_id == tokenizer.eos_id
    names = dict(tokenizer.control_tokens)
    assert {name: theirs.convert_tokens_to_ids(name) for name in names} == names
    for name, i in names.items():
        between = [*tokenizer.encode("low").tolist(), i]
        assert theirs(f"low{name}", add_special_tokens=False).input_ids == between
        assert theirs.decode([i]) == tokenizer.decode([i])
        assert theirs.decode(between, skip_special_tokens=True) == "low"


@pytest.mark.parametrize("kind", ["char with roles", "byte with roles", "bpe with roles"])
def test_chats_are_ours(kind: str, tmp_path: Path):
    """The template of our roles gives the ids and the assistant's mask that examples have."""
    tokenizer = KINDS[kind]()
    theirs = write(tmp_path / "hf", tokenizer)
    encoder = ExampleEncoder(tokenizer, max_tokens=100)
    messages = [
        {"role": "system", "content": " the lazy dog "},
        {"role": "user", "content": "Hello\nworld"},
        {"role": "assistant", "content": "don't\n"},
        {"role": "user", "content": "x"},
    ]
    for add_generation_prompt in (False, True):
        ids, mask = encoder.encode_messages(messages, add_generation_prompt=add_generation_prompt)
        chat = theirs.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert chat["input_ids"] == ids
        assert chat["assistant_masks"] == list(map(int, mask))


def test_unknown_characters_are_refused_there_too(tmp_path: Path):
    theirs = write(tmp_path / "hf", CharTokenizer("abc"))
    with pytest.raises(Exception, match="WordLevel"):
        theirs("abcd")
    assert theirs.pad_token_id is None and theirs.eos_token_id is None


def test_a_bos_token_begins_a_text(tmp_path: Path):
    """Also where the file of the model's tokenizer left that to its program."""
    tokenizer = BPETokenizer.train(CORPUS, 400)
    end = tokenizer.eos_id
    control = tokenization.ControlTokens(eos_id=end, bos_id=end, end_ids=(end,), added_ids={"<|endoftext|>": end})
    tokenizer.adopt(control)
    theirs = write(tmp_path / "hf", tokenizer)
    assert theirs("low").input_ids == [end, *tokenizer.encode("low").tolist()]
    again = model_tokenizers.load_folder(tmp_path / "hf")
    assert again.bos_id == again.eos_id == end


def test_a_kind_that_the_library_lacks_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="numbers"):
        write_tokenizer(tmp_path, tokenization.NumberTokenizer(9), 128, ROLES)


@pytest.mark.slow
def test_real_sentencepiece_files(tmp_path: Path):
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    tokenizer = model_tokenizers.load(str(data / "tokenizer.model.v1"))
    theirs = write(tmp_path / "hf", tokenizer)
    for text in TEXTS:
        expected = tokenizer.encode(text).tolist()
        assert theirs(text, split_special_tokens=True).input_ids == [tokenizer.bos_id, *expected]
        assert theirs.decode(expected) == tokenizer.decode(expected)


def test_a_loaded_models_tokenizer_goes_back_as_it_came(tmp_path: Path):
    """Its beginning of a text, its chats and the names of its control tokens."""
    template = (
        "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    library = BPETokenizer.train(CORPUS, 400).tokenizer
    library.add_special_tokens(["<s>", "<|turn|>", "<|end|>", "<pad>"])
    begin = [("<s>", library.token_to_id("<s>"))]
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    named = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<pad>"}
    before = transformers.PreTrainedTokenizerFast(tokenizer_object=library, chat_template=template, **named)
    before.save_pretrained(tmp_path / "before")
    after = write(tmp_path / "after", model_tokenizers.load_folder(tmp_path / "before"))
    chat = [{"role": "user", "content": " low\n"}, {"role": "assistant", "content": "lower"}]
    for tokenizer in (before, after):
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False).startswith("<s><|turn|>")
    assert after.apply_chat_template(chat)["input_ids"] == before.apply_chat_template(chat)["input_ids"]
    assert after.special_tokens_map == before.special_tokens_map
    for text in TEXTS:
        assert after(text).input_ids == before(text).input_ids
        assert after.decode(after(text).input_ids, skip_special_tokens=True) == text
