"""Chats become the ids and masks that transformers and TRL make of them, by the templates of real models."""

import functools
import importlib.util
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import SHARED

import configurator
import evaluate
import sample
from nanoforge.data import gguf_metadata, model_tokenizers
from nanoforge.data.tokenization import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load,
    save,
)
from nanoforge.errors import UserError
from nanoforge.posttraining.chat_template import (
    ChatTemplate,
    completion_end_ids,
    with_chat_template,
    with_fixed_date,
)
from nanoforge.posttraining.example_rows import RowFormat, read_example_rows
from nanoforge.posttraining.examples import Example, ExampleEncoder, encode_rows, extend_tokenizer
from nanoforge.posttraining.objective_specs import OBJECTIVES

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TRL = importlib.util.find_spec("trl")
TEMPLATES = Path(str(TRL.origin)).parent / "chat_templates" if TRL else Path("missing")
SMOLLM2 = SHARED / "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
needs_trl = pytest.mark.skipif(not TEMPLATES.exists(), reason="needs TRL's chat templates")
needs_smollm2 = pytest.mark.skipif(not SMOLLM2.exists(), reason="needs SmolLM2 in ../shared, which is missing")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


CHATS = [
    [user("what is 2 * 3?"), assistant("it is 6.")],
    [user(" what? "), assistant(" it is 6.\n"), user("there?\n"), assistant("<think>\nhm\n</think>\n\nhello")],
    [{"role": "system", "content": "think."}, user("what"), assistant("is"), user("there"), assistant("is")],
]


@functools.cache
def plain_tokenizer() -> str:
    texts = ["user assistant system hello there think what is 2 * 3? it is 6.\n\n "] * 50
    return BPETokenizer.train(texts, 400).tokenizer.to_str()


def make_tokenizers(template: str) -> tuple[Any, Tokenizer]:
    """transformers' tokenizer and ours, with the control tokens that a template spells."""
    library = tokenizers.Tokenizer.from_str(plain_tokenizer())
    names = re.findall(r"<[|\uff5c][^|\uff5c<>'\"{}\s]*[|\uff5c]>|<(?:start|end)_of_turn>", template)
    library.add_special_tokens(["<s>", "</s>", *sorted({*names})])
    library.add_tokens(["<think>", "</think>"])  # which text may become
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    own = BPETokenizer(json.loads(library.to_str()))
    own.chat_template = template
    own.special_tokens = fast.special_tokens_map
    own.eos_id = fast.eos_token_id
    return fast, own


def trl_template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def trl_mask(name: str, chat: list[dict]) -> tuple[list[int], list[bool]]:
    """The ids and the mask of TRL's assistant_only_loss: by its training template of a model."""
    fast, _ = make_tokenizers(trl_template(name))
    encoded = fast.apply_chat_template(
        chat, chat_template=trl_template(f"{name}_training"), return_assistant_tokens_mask=True, return_dict=True
    )
    return encoded["input_ids"], [bool(in_mask) for in_mask in encoded["assistant_masks"]]


def learned(template: str, chat: list[dict]) -> str:
    """The text that the mask keeps."""
    _, tokenizer = make_tokenizers(template)
    ids, mask = ChatTemplate(tokenizer).encode_with_mask(chat)
    return tokenizer.decode([i for i, in_mask in zip(ids, mask, strict=True) if in_mask])


# ---------------------------------------------------------------------------------------------------------------------
# ids and masks


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_ids_and_generation_marks_are_transformers(path: Path):
    """Of 70 templates of models, half of them with TRL's generation marks."""
    fast, own = make_tokenizers(path.read_text())
    template = ChatTemplate(own)
    for chat in CHATS:
        try:
            expected = fast.apply_chat_template(
                chat, return_assistant_tokens_mask=template.has_generation_marks, return_dict=True
            )
            prompt = fast.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"]
        except Exception as error:
            with pytest.raises(UserError, match=re.escape(str(error))):
                template.encode(chat)
            continue
        ids, mask = template.encode_with_mask(chat)
        assert ids == expected["input_ids"]
        assert template.encode(chat[:-1], add_generation_prompt=True) == prompt
        if template.has_generation_marks:
            assert mask == [bool(in_mask) for in_mask in expected["assistant_masks"]]


@needs_trl
@pytest.mark.parametrize("name", [
    "cohere", "cohere2", "gemma", "gemma3", "lfm2", "lfm2_v2", "llama3", "qwen2_5_vl", "qwen3_instruct_2507",
    "qwen3_vl",
])  # fmt: skip
def test_masks_by_differences_are_trls(name: str):
    """The model's own template, which marks nothing, gives the ids and the mask of TRL's, which does."""
    _, own = make_tokenizers(trl_template(name))
    for chat in CHATS:
        if name == "gemma" and chat[0]["role"] == "system":
            continue  # which this template refuses
        ids, mask = ChatTemplate(own).encode_with_mask(chat)
        assert (ids, mask) == trl_mask(name, chat)


@needs_trl
def test_masks_by_differences_where_trls_template_is_another():
    """TRL's Qwen2.5 also counts the line break of the generation prompt; its Qwen3 writes the reasoning of every turn,
    which Qwen3's own template leaves out of all but the last."""
    for chat in CHATS:
        _, own = make_tokenizers(trl_template("qwen2_5"))
        ids, mask = ChatTemplate(own).encode_with_mask(chat)
        expected_ids, expected = trl_mask("qwen2_5", chat)
        more = np.flatnonzero(np.array(expected) & ~np.array(mask))
        assert ids == expected_ids and sum(expected) == sum(mask) + len(more)
        header = own.encode_with_control("<|im_start|>assistant\n").ids.tolist()
        assert all(ids[: i + 1][-len(header) :] == header for i in more)
        assert len(more) == sum(message["role"] == "assistant" for message in chat)
    _, own = make_tokenizers(trl_template("qwen3"))
    for chat in (CHATS[0], [user("what"), assistant("is", reasoning_content="hm")]):
        assert ChatTemplate(own).encode_with_mask(chat) == trl_mask("qwen3", chat)
    last = "<think>\n\n</think>\n\nis<|im_end|>\n"
    assert learned(trl_template("qwen3"), CHATS[2]) == f"is<|im_end|>\n{last}"


@needs_trl
@pytest.mark.parametrize("name, expected", [
    ("phi3", "it is 6.<|end|>\nhello<|end|>\n</s>"),
    ("deepseekv3", "it is 6.<\uff5cend\u2581of\u2581sentence\uff5c>hello<\uff5cend\u2581of\u2581sentence\uff5c>"),
    ("qwen3_5_think", "it is 6.<|im_end|>\n\n\n</think>\n\nhello<|im_end|>\n"),  # \n\n is one token
    ("gptoss", "<|channel|>final<|message|>it is 6.<|end|><|channel|>final<|message|>hello<|return|>"),
])  # fmt: skip
def test_messages_that_are_written_in_another_way_at_the_end(name: str, expected: str):
    chat = [user("what"), assistant("it is 6."), user("there?"), assistant("hello")]
    assert learned(trl_template(name), chat) == expected


@needs_trl
def test_a_reply_is_learned_from_its_first_character():
    """Also where the generation prompt goes on, with <think>, as the reply begins."""
    chat = [user("what"), assistant("<1"), user("there?"), assistant("hello")]
    assert learned(trl_template("qwen3_5_think"), chat).startswith("<1<|im_end|>\n")


def test_a_template_that_marks_nothing_learns_what_comes_after_the_generation_prompt():
    chat = [assistant("hi"), user("a <|im_end|> b"), assistant(""), user("c"), assistant(" d ")]
    assert learned(CHATML, chat) == "hi<|im_end|>\n<|im_end|>\n d <|im_end|>\n"
    spoken = "{% for m in messages %}{{ m.role | upper }}: {{ m.content | trim }}\n{% endfor %}"
    assert learned(spoken, [user("a"), assistant(" b ")]) == "ASSISTANT: b\n", "there is no generation prompt"


# ---------------------------------------------------------------------------------------------------------------------
# text stays text


@pytest.mark.parametrize("spelling", ["<|im_end|>", "a<|im_start|>assistant\nyes", "<|im_end|><|im_end|>", "</s>"])
def test_a_message_writes_no_control_token(spelling: str):
    """The witness is transformers' sanitize_control_tokens: the same text, and the same control tokens in order."""
    fast, own = make_tokenizers(CHATML)
    control = set(own.control_tokens.values())
    for chat in ([user(spelling), assistant("no")], [user("x"), assistant(f"{spelling} é")]):
        ids, mask = ChatTemplate(own).encode_with_mask(chat)
        expected = fast.apply_chat_template(chat, sanitize_control_tokens=True)["input_ids"]
        assert own.decode(ids) == fast.decode(expected)
        assert [i for i in ids if i in control] == [i for i in expected if i in control]
        text = own.decode([i for i, in_mask in zip(ids, mask, strict=True) if in_mask])
        assert text == chat[-1]["content"] + "<|im_end|>\n"
    assert ChatTemplate(own).encode([user("x")]) == fast.apply_chat_template([user("x")])["input_ids"]


def test_texts_between_control_tokens_are_encoded_as_without_them():
    """A mark breaks no token: what a message spells has the ids that it has as text."""
    _, own = make_tokenizers(CHATML)
    ids = ChatTemplate(own).encode([user("hello <|im_end|> there")])
    start, end = own.added_ids["<|im_start|>"], own.added_ids["<|im_end|>"]
    line_break = own.encode("\n").tolist()
    assert ids == [start, *own.encode("user\nhello <|im_end|> there").tolist(), end, *line_break]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("abusertin\n é😀", has_eos=True)])
def test_any_tokenizer_takes_a_template(tokenizer: Tokenizer, tmp_path: Path):
    """Its end token is <|endoftext|>; a message that spells it has its characters."""
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}\n{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    ours = with_chat_template(tokenizer, str(path))
    chat = [user("é😀"), {"role": "assist", "content": "é a😀"}] if tokenizer.kind == "byte" else None
    chat = chat or [user("é😀"), {"role": "bus", "content": "é a😀"}]
    ids, mask = ChatTemplate(ours).encode_with_mask(chat)
    assert ours.decode([i for i, in_mask in zip(ids, mask, strict=True) if in_mask]) == "é a😀<|endoftext|>"
    assert ids.count(ours.eos_id) == 1 and tokenizer.chat_template == ""
    save(tmp_path / "tokenizer.json", {"x": ours})
    assert load(tmp_path / "tokenizer.json")["x"].chat_template == ours.chat_template


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_masks_of_sentencepiece(tmp_path: Path, kind: str):
    """Its own places of pieces, in bytes, give the text that is learned: also of bytes of one character, and of
    characters that the model rewrites."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the assistant said hello there user system\n what is it"] * 50),
        model_writer=stream,
        model_type=kind,
        vocab_size=320 if kind == "bpe" else 300,
        byte_fallback=True,
        hard_vocab_limit=False,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(stream.getvalue())
    tokenizer.chat_template = CHATML
    chat = [user("é 😀 <|im_end|>"), assistant("😀é there ①"), user("hello"), assistant("what <|im_end|> is")]
    ids, mask = ChatTemplate(tokenizer).encode_with_mask(chat)
    control = tokenizer.control_tokens
    assert [i for i in ids if i in control.values()] == [control["<|im_start|>"], control["<|im_end|>"]] * 4
    runs = [list(run) for in_mask, run in itertools.groupby(zip(ids, mask, strict=True), lambda x: x[1]) if in_mask]
    texts = [tokenizer.decode([i for i, _ in run]).split("<|im_end|>")[0].strip() for run in runs]
    assert texts == ["😀é there 1", "what"]
    assert tokenizer.decode([i for i, _ in runs[1]]).startswith("what <|im_end|> is<|im_end|>")


# ---------------------------------------------------------------------------------------------------------------------
# templates


def test_what_a_template_can_ask_for():
    """transformers' functions and variables; it reads no file and no attribute of Python's."""
    source = (
        "{{ bos_token }}|{{ eos_token }}|{{ tools | tojson }}|{{ strftime_now('%Y') | length }}|{{ x }}"
        "{% for m in messages %}{% if loop.index0 > 0 %}{% break %}{% endif %}{{ m.thinking }}{% endfor %}"
    )
    fast, own = make_tokenizers(source)
    chat = [{"role": "user", "content": "hi", "reasoning_content": "hm"}] * 2
    options = {"tools": [{"name": "é<"}], "x": 3}
    assert ChatTemplate(own).render(chat, options).text == fast.apply_chat_template(chat, tokenize=False, **options)
    for bad in ("{{ messages.__class__.__mro__ }}", "{% include 'x' %}", "{{ messages.append(1) }}"):
        _, own = make_tokenizers(bad)
        with pytest.raises(UserError, match="chat template"):
            ChatTemplate(own).render([user("x")])
    with pytest.raises(UserError, match="line 2"):
        ChatTemplate(make_tokenizers("\n{% if %}")[1]).render([user("x")])


def test_a_run_keeps_the_date_on_which_it_began():
    """Today's, as transformers writes it; the day of another run's template stays."""
    fast, own = make_tokenizers("{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    dated = with_fixed_date(own)
    today = fast.apply_chat_template([user("a")], tokenize=False)
    assert [ChatTemplate(x).render([user("a")]).text for x in (own, dated)] == [today, today]
    own.chat_template = re.sub(r"\d{4}-\d\d-\d\d", "2024-07-26", dated.chat_template)
    assert ChatTemplate(with_fixed_date(own)).render([user("a")]).text == "26 Jul 2024a"
    _, plain = make_tokenizers(CHATML)
    assert with_fixed_date(plain) is plain


@needs_trl
def test_variables_of_a_template_may_be_set_and_a_row_sets_them_otherwise():
    """As an argument of transformers' apply_chat_template."""
    fast, own = make_tokenizers(trl_template("qwen3"))
    chat = [user("what")]
    quiet, loud = (
        fast.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=thinks)
        for thinks in (False, True)
    )
    assert quiet != loud
    template = ChatTemplate(with_chat_template(own, "", {"enable_thinking": False, "x": ["a'b", None]}))
    assert template.render(chat, add_generation_prompt=True).text == quiet
    assert template.render(chat, {"enable_thinking": True}, add_generation_prompt=True).text == loud
    for bad in ({"a b": 1}, {"1x": 1}):
        with pytest.raises(UserError, match="--chat_template_kwargs"):
            with_chat_template(own, "", bad)
    with pytest.raises(UserError, match="--chat_template_kwargs"):
        with_chat_template(ByteTokenizer(), "", {"x": 1})


@needs_trl
def test_the_ends_of_completions():
    """The token that a template writes behind the assistant's message ends it, as the tokenizer's own."""
    for name, ends in {
        "llama3": "<|eot_id|>",
        "phi3": "<|end|>",
        "gemma3": "<end_of_turn>",
        "gptoss": "<|return|>",
    }.items():
        _, own = make_tokenizers(trl_template(name))
        assert completion_end_ids(own) == (own.eos_id, own.added_ids[ends])
    assert completion_end_ids(ByteTokenizer()) == (256,)


@needs_smollm2
@pytest.mark.slow
def test_smollm2s_chats():
    """The witness is transformers with the same template, into which the marks are written that TRL asks for."""
    own = model_tokenizers.from_gguf(gguf_metadata.read_metadata(SMOLLM2))
    whole = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert own.chat_template.count(whole) == 1
    marked = (
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' + '\n' }}{% endgeneration %}{% else %}"
        "{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}"
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(own.tokenizer.to_str()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=own.chat_template.replace(whole, marked),
    )
    for chat in CHATS:
        expected = fast.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
        ids, mask = ChatTemplate(own).encode_with_mask(chat)
        assert ids == expected["input_ids"] and mask == [bool(in_mask) for in_mask in expected["assistant_masks"]]
    prompt = ChatTemplate(own).encode([user("hi")], add_generation_prompt=True)
    assert own.decode(prompt).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert own.decode(prompt).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert own.eos_id in completion_end_ids(own) and own.bos_id is None


# ---------------------------------------------------------------------------------------------------------------------
# examples


def encode(objective: str, rows: list[dict], tokenizer: Tokenizer, **options: Any) -> list[Example]:
    spec = OBJECTIVES[objective]
    row_format = RowFormat(spec.fields, spec.example_type, objective, has_chat_template=tokenizer.chat_template != "")
    parsed = [example for row in rows for example in row_format.parse(row)]
    assert extend_tokenizer(tokenizer, parsed) is tokenizer, "a template needs no tokens of roles"
    return encode_rows(parsed, ExampleEncoder(tokenizer, 200, **options), spec.example_type, "x").examples


PAIRS = [
    (" it is 6.", "hello"),
    ("<think>\nhm\n</think>\n\nhello", "it"),
    ("", "hello"),
]


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_5_think", "llama3", "gemma3", "deepseekv3", "phi3"])
def test_completions_are_trls(name: str):
    """TRL's own functions for prompts and completions of messages, in SFT, DPO, KTO and GRPO."""
    data_utils = pytest.importorskip("trl.data_utils")
    fast, own = make_tokenizers(trl_template(name))

    def trl_ids(chat: list[dict], **options: Any) -> list[int]:
        return data_utils._tokenize(fast, chat, **options)["input_ids"]

    for prompt in ([user("what is")], [user("what"), assistant("is"), user("there?")]):
        prompt_ids = trl_ids(prompt, add_generation_prompt=True)
        (example,) = encode("grpo", [{"prompt": prompt, "answer": "6"}], own)
        assert example.sequences[0].ids.tolist() == prompt_ids
        for chosen, rejected in PAIRS:
            pair = [trl_ids([*prompt, assistant(text)]) for text in (chosen, rejected)]
            starts = [data_utils.common_prefix_length(prompt_ids, ids) for ids in pair]
            row = {"prompt": prompt, "completion": [assistant(chosen)], "label": True}
            for objective in ("sft", "kto"):
                (example,) = encode(objective, [row], own)
                (sequence,) = example.sequences
                assert sequence.ids.tolist() == pair[0]
                assert sequence.loss_mask.tolist() == [i >= starts[0] for i in range(len(pair[0]))]
            (example,) = encode("dpo", [{"prompt": prompt, "chosen": chosen, "rejected": [assistant(rejected)]}], own)
            for sequence, ids in zip(example.sequences, pair, strict=True):
                assert sequence.ids.tolist() == ids
                assert sequence.loss_mask.tolist() == [i >= min(starts) for i in range(len(ids))]


def test_what_a_row_says_to_the_template():
    """TRL's columns tools and chat_template_kwargs, and all fields of a message; without a template it is refused."""
    message = "{{ m.role + m.content + (m.tool_calls | tojson) }}"
    source = "{{ tools | tojson }}{{ mood }}{% for m in messages %}" + message + "{% endfor %}"
    _, own = make_tokenizers(source)
    call = [{"name": "f", "arguments": {"a": 1}}]
    chat = [{"role": "assistant", "content": "", "tool_calls": call}]
    row = {"messages": chat, "tools": json.dumps(call), "chat_template_kwargs": {"mood": "ok"}}
    (example,) = encode("sft", [row], own, train_on_prompt=True)
    assert own.decode(example.sequences[0].ids.tolist()) == f"{json.dumps(call)}okassistant{json.dumps(call)}"
    for bad in ({"tools": "[1"}, {"tools": {"a": 1}}, {"chat_template_kwargs": [1]}):
        with pytest.raises(UserError, match=next(iter(bad))):
            encode("sft", [row | bad], own)


@pytest.mark.parametrize("objective, row, message", [
    ("sft", {"messages": [user("a"), user("b")]}, "roles must alternate"),
    ("sft", {"messages": [user("a"), {"role": "tool", "content": "b"}, assistant("c")]}, "no tool here"),
    ("dpo", {"prompt": [user("a")], "chosen": [user("b")], "rejected": [assistant("b")]}, "roles must alternate"),
    ("sft", {"messages": [{"role": "us er", "content": "b"}]}, "messages: a message is"),
    ("sft", {"messages": [{"role": "user"}]}, "messages: a message is"),
    ("sft", {"messages": [user("\ud800")]}, "messages: a message is"),
])  # fmt: skip
def test_a_template_that_refuses_a_row_is_quoted_with_its_line(tmp_path: Path, objective: str, row: dict, message: str):
    checks = (
        "{% if m.role == 'tool' %}{{ raise_exception('no tool here') }}"
        "{% elif (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
    )
    _, own = make_tokenizers("{% for m in messages %}" + checks + "{{ m.content }}{% endfor %}")
    good = {"messages": [user("a"), assistant("b")], "prompt": [user("a")], "chosen": "b", "rejected": "c"}
    good = {name: good[name] for name in row}
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    spec = OBJECTIVES[objective]
    row_format = RowFormat(spec.fields, spec.example_type, objective, has_chat_template=True)
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{message}"):
        rows = read_example_rows(path, row_format).rows
        encode_rows(rows, ExampleEncoder(own, 200), spec.example_type, "x")


def test_sequences_without_a_template_begin_with_bos():
    """As transformers' tokenizers put it before a text: in texts, prompts and completions, not before a chat."""
    fast, own = make_tokenizers(CHATML)
    own.bos_id = bos = fast.bos_token_id
    for objective, row, texts in (
        ("sft", {"text": "what is"}, ["what is"]),
        ("sft", {"prompt": "what ", "completion": "is"}, ["what ", "is"]),
        ("dpo", {"prompt": "what ", "chosen": "is", "rejected": "is"}, ["what ", "is"]),
        ("kto", {"prompt": "what ", "completion": "is", "label": True}, ["what ", "is"]),
    ):
        (example,) = encode(objective, [row], own)
        for sequence in example.sequences:
            parts = [own.encode(text) for text in texts]
            assert sequence.ids.tolist() == [bos, *np.concatenate(parts).tolist(), own.eos_id]
            assert sequence.loss_mask.sum() == len(parts[-1]) + 1 and not sequence.loss_mask[0]
    (example,) = encode("grpo", [{"prompt": "what", "answer": "1"}], own)
    assert example.sequences[0].ids.tolist() == [bos, *own.encode("what").tolist()]
    (example,) = encode("sft", [{"messages": CHATS[0]}], own)
    assert bos not in example.sequences[0].ids


# ---------------------------------------------------------------------------------------------------------------------
# commands


@pytest.mark.slow
def test_a_conversation(run: Any, base: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    """A model that has learned one chat by heart says it: line by line, as completions in its metrics, and as answers
    of a task. Its second reply follows from the whole chat."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] | replace('s', '=') | replace('u', '+') | replace('a', '') + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    chat = [{"role": "system", "content": "9"}, user("1"), assistant("2"), user("1"), assistant("34")]
    problem = {"prompt": chat[:-1], "answer": "34"}
    for name, row in (("chat", {"messages": chat}), ("task", problem)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    files = [f"--{split}_file={tmp_path}/chat.jsonl" for split in ("train", "validation")]
    steps = ["--max_iters=80", "--eval_interval=80", "--block_size=32", "--learning_rate=1e-2", "--eval_samples=1"]
    done = run("--objective=sft", f"--init_from={base}", *files, *steps, f"--chat_template={tmp_path}/t.jinja")
    (completion,) = done.evals[-1]["samples"]
    assert completion == {"prompt": "=9+1", "completion": "2"}

    flags = [f"--out_dir={tmp_path}/run", "--dtype=float32", "--device=cpu"]
    greedy = [*flags, "--chat", "--temperature=0", "--max_new_tokens=6"]
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n\n1\n"))
    sample.main(configurator.parse(sample.SampleArgs, [*greedy, "--system=9"], ""))
    assert capsys.readouterr().out == "2\n34\n"
    sample.main(configurator.parse(sample.SampleArgs, [*greedy, "--system=9", "--start=1", "--num_samples=1"], ""))
    assert capsys.readouterr().out.startswith("2\n-")
    task = f"{tmp_path}/task.jsonl"
    results = evaluate.main(configurator.parse(evaluate.EvaluateArgs, [*flags, f"--tasks={task}"], ""))
    assert results["tasks"][task]["accuracy"]["value"] == 1 and results["tasks"][task]["ended"] == 1


def test_a_file_that_is_no_template_is_refused_by_its_flag(tmp_path: Path):
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match=r"--chat_template=.*line 1"):
        with_chat_template(ByteTokenizer(), str(tmp_path))
    with pytest.raises(UserError, match="missing"):
        with_chat_template(ByteTokenizer(), str(tmp_path / "missing.jinja"))
