"""Rows of examples: TRL's formats give the same ids and masks as TRL, and no field takes a value that it can't hold."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoforge.data.tokenization import ByteTokenizer
from nanoforge.errors import UserError
from nanoforge.posttraining.example_rows import RowFormat, extract_prompt, read_example_rows
from nanoforge.posttraining.examples import Example, ExampleEncoder, encode_rows, extend_tokenizer
from nanoforge.posttraining.objective_specs import OBJECTIVES

EOS = "<|endoftext|>"


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def row_format(objective: str, **options) -> RowFormat:
    spec = OBJECTIVES[objective]
    return RowFormat(spec.fields, spec.example_type, f"--objective={objective}", **options)


def encode(objective: str, *rows: dict, **options) -> tuple[list[Example], ByteTokenizer]:
    """The examples that rows become, and their tokenizer."""
    parsed = [example for row in rows for example in row_format(objective).parse(row)]
    tokenizer = extend_tokenizer(ByteTokenizer(), parsed)
    encoder = ExampleEncoder(tokenizer, max_tokens=200, **options)
    return encode_rows(parsed, encoder, OBJECTIVES[objective].example_type, "x").examples, tokenizer


def texts(objective: str, *rows: dict, **options) -> list[tuple[str, str]]:
    """For each sequence what comes before the tokens that count in the loss, and those tokens, as texts."""
    examples, tokenizer = encode(objective, *rows, **options)
    pairs = []
    for example in examples:
        for sequence in example.sequences:
            mask = sequence.loss_mask
            assert not mask.any() or mask[mask.argmax() :].all()
            before, learned = sequence.ids[~mask].tolist(), sequence.ids[mask].tolist()
            pairs.append((tokenizer.decode(before), tokenizer.decode(learned)))
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# TRL's formats


PROMPT = f"<|user|>hi{EOS}<|assistant|>"


@pytest.mark.parametrize("row", [
    {"prompt": [user("hi")], "chosen": [assistant("yo")], "rejected": [assistant("no")]},
    {"chosen": [user("hi"), assistant("yo")], "rejected": [user("hi"), assistant("no")]},
    {"prompt": "hi", "chosen": [user("hi"), assistant("yo")], "rejected": [user("hi"), assistant("no")]},
    {"prompt": "hi", "chosen": [assistant("yo")], "rejected": [assistant("no")]},
    {"prompt": [user("hi")], "chosen": "yo", "rejected": [assistant("no")]},
    {"prompt": [{**user("hi"), "name": None}], "chosen": [{**assistant("yo"), "tool_calls": None}], "rejected": "no"},
])  # fmt: skip
def test_a_pair_of_chats_is_the_same_in_every_format(row: dict):
    """Explicit or implicit prompts; a text beside messages is a message; what a table adds to messages is left out."""
    assert texts("dpo", row) == [(PROMPT, f"yo{EOS}"), (PROMPT, f"no{EOS}")]
    assert texts("kto", row) == [(PROMPT, f"yo{EOS}"), (PROMPT, f"no{EOS}")]


def test_formats_of_completions():
    chat = {"prompt": [user("hi")], "completion": [assistant("yo")]}
    assert texts("sft", chat) == [(PROMPT, f"yo{EOS}")]
    assert texts("kto", chat | {"label": False}) == [(PROMPT, f"yo{EOS}")]
    assert texts("sft", {"prompt": "hi", "completion": [assistant("yo")]}) == [(PROMPT, f"yo{EOS}")]
    assert texts("sft", {"prompt": "a", "completion": "b"}) == [("a", f"b{EOS}")]
    several = {"prompt": [user("hi")], "completion": [assistant("yo"), user("and?"), assistant("no")]}
    assert texts("sft", several) == [(PROMPT, f"yo{EOS}<|user|>and?{EOS}<|assistant|>no{EOS}")]
    as_user = {"prompt": [user("hi")], "completion": [user("yo")]}
    assert texts("sft", as_user) == [(f"<|user|>hi{EOS}", f"<|user|>yo{EOS}")], "from where the ids differ"
    assert texts("grpo", {"prompt": [user("hi")], "answer": 3, "completion": None}) == [(PROMPT, "")]
    text_pair = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert texts("dpo", text_pair) == [("The sky is", f" blue.{EOS}"), ("The sky is", f" green.{EOS}")]


def test_a_pair_is_two_labelled_examples(tmp_path: Path):
    """As TRL's unpair_preference_dataset has them, the chosen ones first: a KL pair then joins different prompts."""
    rows = [{"prompt": str(i), "chosen": "y", "rejected": "n", "id": i} for i in range(2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [
        {"id": i, "prompt": str(i), "completion": completion, "label": label}
        for completion, label in (("y", True), ("n", False))
        for i in range(2)
    ]
    assert read_example_rows(tmp_path / "a.jsonl", row_format("kto")).rows == expected


def test_the_first_format_of_several_is_read(tmp_path: Path):
    """As in TRL a prompt and completion come before messages and text; nulls that a table fills in count as missing."""
    assert texts("sft", {"prompt": "a", "completion": "b", "text": "other"}) == [("a", f"b{EOS}")]
    assert texts("sft", {"messages": [user("hi"), assistant("yo")], "text": "other"}) == [(PROMPT, f"yo{EOS}")]
    filled = {"prompt": None, "completion": None, "messages": None, "text": "ab"}
    assert texts("sft", filled) == [("a", f"b{EOS}")]
    rows = [{"prompt": "a", "completion": "b", "text": "other"}] * 3 + [{"text": "ab"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = read_example_rows(tmp_path / "a.jsonl", row_format("sft")).notes
    assert len(notes) == 1 and "3 rows also have text" in notes[0]


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.slow
def test_chats_are_what_trl_makes_of_them():
    """Its apply_chat_template, with a template of this program's roles, gives the same prompts and completions."""
    data_utils = pytest.importorskip("trl.data_utils")
    jinja2 = pytest.importorskip("jinja2")

    def apply_chat_template(messages: list[dict], *, add_generation_prompt: bool = False, **_: object) -> str:
        template = jinja2.Template(CHAT_TEMPLATE)
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt)

    tokenizer = SimpleNamespace(apply_chat_template=apply_chat_template)
    prompts = [
        [user("hi")],
        [{"role": "system", "content": "be brief"}, user("hi")],
        [user("hi"), assistant("yo"), user("é?")],
    ]
    completions = [[assistant("a")], [assistant("b"), user("c"), assistant("d")], [assistant("")]]
    for prompt in prompts:
        for completion in completions:
            row = {"prompt": prompt, "completion": completion}
            trl = data_utils.apply_chat_template(row, tokenizer)
            assert texts("sft", row) == [(trl["prompt"], trl["completion"])]
            assert texts("kto", row | {"label": True}) == [(trl["prompt"], trl["completion"])]
        row = {"chosen": [*prompt, assistant("a")], "rejected": [*prompt, assistant("b"), user("c"), assistant("d")]}
        trl = data_utils.apply_chat_template(data_utils.extract_prompt(row), tokenizer)
        assert texts("dpo", row) == [(trl["prompt"], trl["chosen"]), (trl["prompt"], trl["rejected"])]
        trl = data_utils.apply_chat_template({"prompt": prompt}, tokenizer)
        assert texts("grpo", {"prompt": prompt, "answer": "1"}) == [(trl["prompt"], "")]


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(st.text("ab ", min_size=1, max_size=6), st.text("ab ", min_size=1, max_size=6))
def test_implicit_prompts_are_trls(chosen: str, rejected: str):
    data_utils = pytest.importorskip("trl.data_utils")
    if chosen[0] != rejected[0]:  # TRL looks at the character before the first
        assert extract_prompt(chosen, rejected) == {"prompt": "", "chosen": chosen, "rejected": rejected}
    elif min(len(chosen), len(rejected)) > 1 or chosen != " ":
        expected = data_utils.extract_prompt({"chosen": chosen, "rejected": rejected})
        assert extract_prompt(chosen, rejected) == expected


# ---------------------------------------------------------------------------------------------------------------------
# values that a field can't hold


VALID = {
    "sft": [{"prompt": "a", "completion": "b"}, {"messages": [user("a"), assistant("b")]}, {"text": "ab"}],
    "dpo": [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": "ab", "rejected": "ac"}],
    "kto": [{"prompt": "a", "completion": "b", "label": True}, {"chosen": "ab", "rejected": "ac"}],
    "grpo": [{"prompt": "a", "answer": "b"}],
}
BAD_VALUES = [None, True, 1.5, 3, {}, {"a": 1}, ["x"], [1], [], [{}], "\ud800", float("nan")]
BAD_VALUES += [[{**assistant("yo"), name: [{"name": "f"}]}] for name in ("tool_calls", "function_call", "thinking")]
BAD_VALUES += [[{"role": "user"}], [{"role": ["user"], "content": "x"}], [{"role": "tool", "content": "x"}]]
BAD_VALUES += [[user(None)], [user(3)], [user("\ud800")]]
GOOD_VALUES = [("kto", "label", True), ("grpo", "answer", 1.5), ("grpo", "answer", 3)]


@pytest.mark.parametrize("objective", VALID)
def test_every_field_refuses_what_it_cant_hold(objective: str):
    """Each field of each format with each value: refused by its name."""
    for row in VALID[objective]:
        assert row_format(objective).parse(row)
        for name in row:
            for value in BAD_VALUES:
                if (objective, name, value) in GOOD_VALUES or (name == "label" and value == {}):
                    continue
                with pytest.raises(UserError, match=f"^{name}: "):
                    row_format(objective).parse(row | {name: value})


def test_prompt_formats_take_texts_and_numbers():
    template_format = RowFormat([["q", "n", "label"]], "unpaired_preference", "--objective=kto", is_template=True)
    assert template_format.parse({"q": "a", "n": 1.5, "label": 0}) == [{"q": "a", "n": "1.5", "label": False}]
    for value in (None, True, [], [user("a")], {}, float("nan"), "\ud800"):
        with pytest.raises(UserError, match=r"^q: "):
            template_format.parse({"q": value, "n": 1, "label": 1})


@pytest.mark.parametrize("objective, row, field", [
    ("grpo", {"prompt": "", "answer": "1"}, "prompt"),
    ("grpo", {"prompt": "1", "answer": ""}, "answer"),
    ("kto", {"prompt": "", "completion": "1", "label": 1}, "prompt"),
    ("kto", {"chosen": "a", "rejected": "b"}, "prompt"),
    ("dpo", {"chosen": "", "rejected": "b"}, "chosen"),
    ("dpo", {"chosen": [user("a"), assistant("b")], "rejected": "b"}, "rejected"),
    ("dpo", {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]}, "chosen, rejected"),
    ("sft", {"prompt": "a", "completion": [user("a"), assistant("b")]}, "completion"),
])  # fmt: skip
def test_rows_without_a_prompt_of_their_own_are_refused(objective: str, row: dict, field: str):
    with pytest.raises(UserError, match=f"^{field}: "):
        row_format(objective).parse(row)


TRUE_LABELS = [(True, "true"), (True, "True"), (1, "1"), (1.0, "1.0")]  # of JSON, and as a cell of CSV
LABELS = [*TRUE_LABELS, (False, "false"), (False, "FALSE"), (0, "0"), (0.0, "0.0")]


def test_labels_of_json_and_csv_are_the_same(tmp_path: Path):
    """The witness is Python's bool of JSON's value."""
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion", "label"], *(["a", "b", cell] for _, cell in LABELS)])
    rows = [{"prompt": "a", "completion": "b", "label": value} for value, _ in LABELS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [bool(value) for value, _ in LABELS]
    for name in ("a.csv", "a.jsonl"):
        read = read_example_rows(tmp_path / name, row_format("kto")).rows
        assert [row["label"] for row in read] == expected and {type(row["label"]) for row in read} == {bool}
    for value in ("yes", "", "2", 2, -1, "nan"):
        with pytest.raises(UserError, match=r"^label: "):
            row_format("kto").parse({"prompt": "a", "completion": "b", "label": value})


def test_bad_rows_are_skipped_and_counted_where_asked(tmp_path: Path):
    rows = [{"text": "ab"}, {"text": None}, {"text": 3}, {"text": "cd"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_example_rows(tmp_path / "a.jsonl", row_format("sft"), bad_rows="skip")
    assert [row["text"] for row in read.rows] == ["ab", "cd"]
    assert len(read.notes) == 1 and "skipped 2 rows" in read.notes[0] and "a.jsonl:2: text: " in read.notes[0]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl: all 1 rows are bad"):
        read_example_rows(tmp_path / "a.jsonl", row_format("sft"), bad_rows="skip")


def test_rewards_without_an_answer_need_none(run: Callable, base: Path, tmp_path: Path):
    """TRL's prompt-only rows; bad_rows skips the others, and says so."""
    rows = [{"prompt": "1+1="}, {"prompt": "2+3="}, {"prompt": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--objective=grpo", f"--train_file={tmp_path}/a.jsonl", f"--validation_file={tmp_path}/a.jsonl"]
    flags += [f"--init_from={base}", "--num_generations=2", "--max_new_tokens=2", "--max_iters=1", "--eval_interval=1"]
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*answer"):
        run(*flags)
    done = run(*flags, "--reward=length", "--bad_rows=skip", name="length")
    assert "skipped 1 rows" in done.console and len(done.train) == 1
