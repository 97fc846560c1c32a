"""Shapes of public datasets: ShareGPT's, Alpaca's and renamed columns give the fields that TRL has."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import metric

from nanoforge.data import hub_datasets
from nanoforge.errors import UserError
from nanoforge.posttraining import row_shapes
from nanoforge.posttraining.example_rows import RowFormat, read_example_rows
from nanoforge.posttraining.objective_specs import OBJECTIVES
from nanoforge.posttraining.row_shapes import SPEAKERS


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def turn(name: str, text: str) -> dict:
    return {"from": name, "value": text}


SYSTEM, USER, ASSISTANT = message("system", "s"), message("user", "hi"), message("assistant", "yo")
OTHER = message("assistant", "no")


def row_format(objective: str, *columns: str) -> RowFormat:
    spec = OBJECTIVES[objective]
    mapped = row_shapes.parse_columns(columns)
    return RowFormat(spec.fields, spec.example_type, f"--objective={objective}", columns=mapped)


def read(objective: str, row: dict, *columns: str) -> dict | list[dict]:
    """What a row is read as; the two halves of a pair that are labelled apart."""
    reader = row_format(objective, *columns)
    rows = reader.parse(reader.shape(row).row)
    return rows[0] if len(rows) == 1 else rows


# ---------------------------------------------------------------------------------------------------------------------
# shapes


CHAT = [turn("human", "hi"), turn("gpt", "yo")]
INSTRUCTION = {"instruction": "translate", "input": "hi"}
TRANSLATE = message("user", "translate\nhi")

SHAPED = [
    # ShareGPT
    ("sft", {"conversations": CHAT}, {"messages": [USER, ASSISTANT]}),
    ("sft", {"conversations": CHAT, "system": "s"}, {"messages": [SYSTEM, USER, ASSISTANT]}),
    ("sft", {"conversations": [turn("system", "s"), *CHAT], "system": "t"}, {"messages": [SYSTEM, USER, ASSISTANT]}),
    ("sft", {"conversations": CHAT, "system": "", "text": "other"}, {"messages": [USER, ASSISTANT]}),
    ("sft", {"conversation": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}),
    ("sft", {"messages": CHAT}, {"messages": [USER, ASSISTANT]}),
    ("sft", {"messages": None, "conversations": CHAT}, {"messages": [USER, ASSISTANT]}),
    ("dpo", {"conversations": CHAT[:1], "chosen": turn("gpt", "yo"), "rejected": turn("gpt", "no")},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}),
    ("dpo", {"conversations": CHAT[:1], "system": "s", "chosen": "yo", "rejected": "no"},
        {"prompt": [SYSTEM, USER], "chosen": [ASSISTANT], "rejected": [OTHER]}),
    ("dpo", {"chosen": CHAT, "rejected": [CHAT[0], turn("gpt", "no")]},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}),
    ("kto", {"conversations": CHAT, "kto_tag": False}, {"prompt": [USER], "completion": [ASSISTANT], "label": False}),
    ("grpo", {"conversations": CHAT}, {"prompt": [USER], "answer": "yo"}),
    # Alpaca
    ("sft", {**INSTRUCTION, "output": "yo"}, {"messages": [TRANSLATE, ASSISTANT]}),
    ("sft", {"instruction": "hi", "input": "", "output": "yo", "text": "Below is"}, {"messages": [USER, ASSISTANT]}),
    ("sft", {"instruction": "hi", "input": None, "output": "yo"}, {"messages": [USER, ASSISTANT]}),
    ("sft", {**INSTRUCTION, "output": "yo", "system": "s", "history": [["a", "b"], ["c", "d"]]},
        {"messages": [SYSTEM, message("user", "a"), message("assistant", "b"), message("user", "c"),
            message("assistant", "d"), TRANSLATE, ASSISTANT]}),
    ("dpo", {**INSTRUCTION, "chosen": "yo", "rejected": "no"},
        {"prompt": [TRANSLATE], "chosen": [ASSISTANT], "rejected": [OTHER]}),
    ("kto", {**INSTRUCTION, "output": "yo", "kto_tag": True},
        {"prompt": [TRANSLATE], "completion": [ASSISTANT], "label": True}),
    ("kto", {**INSTRUCTION, "output": "yo", "label": "false"},
        {"prompt": [TRANSLATE], "completion": [ASSISTANT], "label": False}),
    ("grpo", {**INSTRUCTION, "output": "7"}, {"prompt": [TRANSLATE], "answer": "7"}),
    ("sft", {"instruction": "translate", "context": "hi", "response": "yo"}, {"messages": [TRANSLATE, ASSISTANT]}),
    # other names of columns; texts stay texts unless there is a system message
    ("sft", {"question": "hi", "answer": "yo"}, {"prompt": "hi", "completion": "yo"}),
    ("sft", {"query": "hi", "response": "yo"}, {"prompt": "hi", "completion": "yo"}),
    ("sft", {"prompt": "hi", "response": "yo"}, {"prompt": "hi", "completion": "yo"}),
    ("sft", {"system_prompt": "s", "question": "hi", "response": "yo"}, {"messages": [SYSTEM, USER, ASSISTANT]}),
    ("dpo", {"system": "s", "question": "hi", "chosen": "yo", "rejected": "no"},
        {"prompt": [SYSTEM, USER], "chosen": [ASSISTANT], "rejected": [OTHER]}),
    ("dpo", {"system": "", "question": "hi", "chosen": "yo", "rejected": "no"},
        {"prompt": "hi", "chosen": "yo", "rejected": "no"}),
    ("dpo", {"system": "s", "question": [USER], "chosen": "yo", "rejected": "no"},
        {"prompt": [SYSTEM, USER], "chosen": [ASSISTANT], "rejected": [OTHER]}),
    ("dpo", {"prompt": "hi", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER], "score_chosen": 7.5},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER], "score_chosen": 7.5}),
    ("grpo", {"question": "hi", "answer": "7", "label": 2}, {"prompt": "hi", "answer": "7", "label": 2}),
    ("grpo", {"problem": "hi", "solution": "so", "answer": 7}, {"prompt": "hi", "answer": "7", "solution": "so"}),
    ("sft", {"problem": "hi", "solution": "so", "answer": 7}, {"prompt": "hi", "completion": "so", "answer": 7}),
]  # fmt: skip


@pytest.mark.parametrize("objective, row, expected", SHAPED)
def test_a_shape_gives_the_fields_of_the_objective(objective: str, row: dict, expected: dict):
    """What LLaMA-Factory documents of both shapes; columns that nothing is made from stay as they are."""
    made = read(objective, {**row, "id": 3})
    assert {name: value for name, value in made.items() if value is not None} == {**expected, "id": 3}


def test_gsm8ks_rows_are_problems_in_every_objective():
    row = {"question": "2 and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}
    assert read("grpo", row)["answer"] == "5" and "<answer>5</answer>" in read("sft", row)["completion"]
    assert read("sft", row, "prompt=question", "completion=answer") == {
        "prompt": row["question"], "completion": row["answer"]
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("field", ["messages", "conversations", "prompt", "chosen"])
def test_turns_are_what_trl_makes_of_them(field: str):
    """Its maybe_convert_to_chatml, which keeps the names; here they become the roles of chat templates."""
    data_utils = pytest.importorskip("trl.data_utils")
    turns = [turn("user", "hi"), turn("assistant", "yo"), turn("tool", "3"), turn("system", "s")]
    converted = data_utils.maybe_convert_to_chatml({field: [dict(item) for item in turns]})
    assert row_shapes.to_messages(turns, field) == next(iter(converted.values()))
    for name, role in SPEAKERS.items():
        assert row_shapes.to_messages([turn(name, "x")], field) == [message(role, "x")]


@pytest.mark.slow
def test_implicit_prompts_are_trls():
    """Anthropic's texts, and UltraFeedback's chats, by its extract_prompt."""
    data_utils = pytest.importorskip("trl.data_utils")
    start = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant:"
    for row in (
        {"chosen": f"{start} yes", "rejected": f"{start} no"},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
    ):
        assert read("dpo", row) == data_utils.extract_prompt(row)


def test_the_role_of_tools_is_one_of_chat_templates():
    turns = [turn("human", "hi"), turn("function_call", "f()"), turn("observation", "3"), turn("gpt", "yo")]
    row = {"conversations": turns, "tools": "[]"}
    reader = dataclasses.replace(row_format("sft"), has_chat_template=True)
    (parsed,) = reader.parse(reader.shape(row).row)
    assert [item["role"] for item in parsed["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert parsed["tools"] == "[]", "which the template reads"
    with pytest.raises(UserError, match="message 3 has role 'tool'"):
        read("sft", row)


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("objective, row, error", [
    ("sft", {"conversations": [turn("robot", "x")]}, "conversations: message 1 is from 'robot'"),
    ("sft", {"conversations": [turn("humn", "x")]}, "did you mean human"),
    ("sft", {"conversations": [turn("human", "x"), turn("gpt", None)]}, "conversations: message 2, value: "),
    ("sft", {"conversations": [turn("human", "x"), {"value": "y"}]}, "conversations: message 2 "),
    ("sft", {"conversations": [turn("human", "x"), {**turn("gpt", "y"), "weight": 0}]}, "message 2 has weight 0"),
    ("sft", {"messages": [turn(3, "x")]}, "messages: message 1 is from 3"),
    ("dpo", {"prompt": "x", "chosen": turn("robot", "x"), "rejected": "y"}, "chosen: message 1 is from 'robot'"),
    ("sft", {"conversations": "hi"}, "messages: must be a list"),
    ("sft", {"conversations": []}, "messages: is an empty list"),
    ("sft", {"instruction": 3, "output": "x"}, "instruction: must be text, not 3"),
    ("sft", {"instruction": "x", "input": ["a"], "output": "x"}, "input: must be text"),
    ("sft", {"instruction": "x", "output": "x", "system": 3}, "system: must be text"),
    ("sft", {"instruction": "x", "output": "x", "history": ["a"]}, r"history: must be a list of \[instruction, resp"),
    ("sft", {"instruction": "x", "output": "x", "history": [["a", None]]}, "history, pair 1: must be text"),
    ("sft", {"question": "x", "answer": ["y"]}, "completion: "),
    ("dpo", {"instruction": "x", "chosen": "y"}, "has the fields instruction, chosen; .*--columns"),
    ("kto", {"instruction": "x", "output": "y", "kto_tag": "maybe"}, "label: must be true or false"),
])  # fmt: skip
def test_what_a_shape_can_t_hold_is_refused_by_its_field(objective: str, row: dict, error: str):
    with pytest.raises(UserError, match=error):
        read(objective, row)


# ---------------------------------------------------------------------------------------------------------------------
# --columns


@pytest.mark.parametrize("objective, columns, row, expected", [
    ("sft", ["prompt=q", "completion=a"], {"q": "hi", "a": "yo", "messages": []}, {"prompt": "hi", "completion": "yo"}),
    ("sft", ["completion=prompt", "prompt=completion"], {"prompt": "yo", "completion": "hi"},
        {"prompt": "hi", "completion": "yo"}),
    ("sft", ["completion=a"], {"prompt": "hi", "a": "yo"}, {"prompt": "hi", "completion": "yo"}),
    ("sft", ["messages=dialog", "system=sys"], {"dialog": CHAT, "sys": "s"}, {"messages": [SYSTEM, USER, ASSISTANT]}),
    ("sft", ["prompt=q", "completion=a", "system=sys"], {"q": "hi", "a": "yo", "sys": "s"},
        {"messages": [SYSTEM, USER, ASSISTANT]}),
    ("sft", ["prompt=q", "input=more", "completion=a"], {"q": "hi", "more": "you", "a": "yo"},
        {"prompt": "hi\nyou", "completion": "yo"}),
    ("sft", ["system=sys"], {"messages": CHAT, "sys": "s"}, {"messages": [SYSTEM, USER, ASSISTANT]}),
    ("sft", ["text=body"], {"body": "hi", "messages": CHAT, "output": "y"}, {"text": "hi", "output": "y"}),
    ("dpo", ["prompt=q", "chosen=good", "rejected=bad"], {"q": "hi", "good": "yo", "bad": "no"},
        {"prompt": "hi", "chosen": "yo", "rejected": "no"}),
    ("kto", ["label=ok"], {"prompt": "hi", "completion": "yo", "ok": 1, "label": "x"},
        {"prompt": "hi", "completion": "yo", "label": True}),
    ("grpo", ["prompt=q", "answer=n"], {"q": "hi", "n": 3, "question": "x"},
        {"prompt": "hi", "answer": "3", "question": "x"}),
])  # fmt: skip
def test_a_map_of_columns_comes_before_all(objective: str, columns: list[str], row: dict, expected: dict):
    assert read(objective, row, *columns) == expected


def test_a_map_of_columns_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="has no column questin but question, answer; did you mean question"):
        read("sft", {"question": "x", "answer": "y"}, "prompt=questin")
    for item, error in (("prompt", "must be FIELD=COLUMN"), ("promt=x", "promt is no field.*did you mean prompt")):
        with pytest.raises(UserError, match=f"^--columns={item}: {error}"):
            row_shapes.parse_columns([item])
    with pytest.raises(UserError, match="prompt is mapped twice"):
        row_shapes.parse_columns(["prompt=a", "prompt=b"])
    assert row_shapes.parse_columns(["anything=x"], None) == {"anything": "x"}
    template = RowFormat([["q", "n"]], "prompt_completion", "--objective=sft", is_template=True, columns={"q": "a"})
    assert template.shape({"a": "x", "n": 1}).row == {"a": "x", "n": 1, "q": "x"}


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_what_was_mapped_is_one_line_for_each_shape(tmp_path: Path):
    rows = [{"conversations": CHAT, "id": 1}, {"instruction": "hi", "output": "yo", "source": "x"}, {"text": "hi"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = read_example_rows(path, row_format("sft")).notes
    assert [note.partition(": ")[2] for note in notes] == [
        f"{shape}; 1 row; not read: id, source"
        for shape in ("ShareGPT's conversations -> messages", "Alpaca's instruction, output -> messages", "text")
    ]
    path.write_text(json.dumps({"prompt": "a", "completion": "b", "id": 3}) + "\n")
    assert read_example_rows(path, row_format("sft")).notes == [], "TRL's own fields are nothing to report"
    path.write_text(json.dumps({"conversations": [turn("robot", "x")]}) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:1: conversations: message 1 is from 'robot'"):
        read_example_rows(path, row_format("sft"))


def test_the_same_rows_of_jsonl_parquet_and_the_hub_are_read_alike(tmp_path: Path):
    """Parquet fills in null for what a message or a row lacks."""
    datasets = pytest.importorskip("datasets")
    rows = [
        {"conversations": CHAT, "instruction": None, "output": None},
        {"conversations": [{**CHAT[0], "weight": 1.0}, CHAT[1]], "instruction": None, "output": None},
        {"conversations": None, "instruction": "hi", "output": "yo"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "train.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    hub = hub_datasets.sides(f"hf:{tmp_path}/saved#train/train", 0.1)["train"]
    sources = (tmp_path / "train.jsonl", tmp_path / "train.parquet", hub)
    for source in sources:
        chats = [row["messages"] for row in read_example_rows(source, row_format("sft")).rows]
        assert chats == [[USER, ASSISTANT]] * 3


# ---------------------------------------------------------------------------------------------------------------------
# runs


SUMS = [{"question": f"{i}+1=", "answer": str(i + 1), "id": i} for i in range(24)]
SFT = ["--objective=sft", "--block_size=8", "--batch_size=4", "--log_data_hash", "--log_interval=1"]


def save(folder: Path, **splits: list[dict]) -> str:
    """The name of a folder of save_to_disk."""
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(folder)
    hub_datasets.load.cache_clear()  # otherwise read once in a process
    return f"hf:{folder}"


@pytest.mark.slow
def test_a_run_on_the_hub_has_the_batches_of_one_on_files(run: Callable, data_dir: Path, tmp_path: Path):
    """Also resumed, and in a mixture with a folder of the data_dir."""
    name = save(tmp_path / "saved", train=SUMS[:20], validation=SUMS[20:])
    for split, rows in (("train", SUMS[:20]), ("val", SUMS[20:])):
        lines = [json.dumps({"prompt": row["question"], "completion": row["answer"]}) + "\n" for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    files = [f"--train_file={tmp_path}/train.jsonl", f"--validation_file={tmp_path}/val.jsonl"]
    expected = run(*SFT, *files, "--max_iters=8", name="files")
    whole = run(*SFT, f"--dataset={name}", "--max_iters=8", name="whole")
    assert whole.losses == expected.losses and metric(whole, "data_hash") == metric(expected, "data_hash")
    assert [line["val_loss"] for line in whole.evals] == [line["val_loss"] for line in expected.evals]
    assert "question, answer -> prompt, completion; 20 rows; not read: id" in whole.console

    run(*SFT, f"--dataset={name}", "--max_iters=3", name="resumed")
    resumed = run("--init_from=resume", "--max_iters=8", name="resumed")
    assert resumed.losses == whole.losses

    save(tmp_path / "saved", train=SUMS[1:20], validation=SUMS[20:])
    with pytest.raises(UserError, match=f"{name}/train: .*--allow_data_change"):
        run("--init_from=resume", "--max_iters=9", name="resumed")

    mixture = run(*SFT, "--training_mode=multidataset", "--dataset_list", "sums", name, "--max_iters=2", name="mixture")
    assert {f"val_loss/{name}", "val_loss/sums"} <= mixture.evals[0].keys()


@pytest.mark.slow
def test_preferences_of_the_hub_keep_their_reference_beside_the_data(run: Callable, base: Path, tmp_path: Path):
    rows = [{"question": row["question"], "chosen": row["answer"], "rejected": "0"} for row in SUMS]
    name = save(tmp_path / "saved", train=rows)
    flags = [f"--dataset={name}", f"--init_from={base}", "--block_size=16", "--batch_size=4", "--max_iters=2"]
    cached = run(*flags, "--objective=dpo", "--reference=cache", name="cached")
    assert len(list(tmp_path.glob("saved/**/reference_*.safetensors"))) == 2
    assert cached.losses == pytest.approx(run(*flags, "--objective=dpo", name="copy").losses, abs=1e-6)
    assert len(run(*flags, "--objective=kto", name="kto").train) == 2
