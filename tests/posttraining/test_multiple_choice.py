"""Multiple choice: how rows name the right choice, and scores against log-likelihoods made one sequence at a time."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS

import configurator
import evaluate
from builders import load_model
from nanoforge.data.tables import Row
from nanoforge.errors import UserError
from nanoforge.posttraining.accuracy import wilson_interval
from nanoforge.posttraining.multiple_choice import choice_metrics, to_question
from nanoforge.run_state import read_scores

ARC = {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}


@pytest.mark.parametrize("row, answer", [
    ({"choices": ["a", "b"], "answer": 1}, 1),
    ({"choices": ["a", "b"], "answer": "1"}, 1),
    ({"choices": ["a", "b"], "answer": "B"}, 1),
    ({"choices": '["a", "b"]', "answer": "0"}, 0),  # a cell of a table
    ({"choices": ARC, "answerKey": "3"}, 2),
    ({"choices": ARC, "answer": 1}, 0),  # its label
    ({"choices": [7, 8], "answer": "A"}, 0),
])  # fmt: skip
def test_an_answer_is_a_label_or_an_index(row: Row, answer: int):
    question = to_question({"question": "x?", **row})
    assert question.answer == answer and question.delimiter == " "
    assert question.row["prompt"] == "Question: x?\nAnswer:"
    assert to_question({"prompt": "x:", **row}).row["prompt"] == "x:"


@pytest.mark.parametrize("row, message", [
    ({"question": "x", "choices": ["a", "b"], "answer": 2}, "answer: .*A, B or 0 to 1, not 2"),
    ({"question": "x", "choices": ["a", "b"], "answer": True}, "answer: .*not True"),
    ({"question": "x", "choices": ["a", "b"]}, "answer.*null"),
    ({"question": "x", "choices": ["a"], "answer": 0}, "choices: .*two"),
    ({"question": "x", "choices": "a or b", "answer": 0}, "choices: .*list"),
    ({"question": "x", "choices": ["a", ""], "answer": 0}, "choices: .*empty"),
    ({"question": "x", "choices": ["a", None], "answer": 0}, "choices: .*null"),
    ({"question": 1, "choices": ["a", "b"], "answer": 0}, "question: must be text"),
    ({"text": "x", "choices": ["a", "b"], "answer": 0}, "needs a prompt or a question"),
])  # fmt: skip
def test_a_row_that_is_no_question_is_refused(row: Row, message: str):
    with pytest.raises(UserError, match=message):
        to_question(row)


def test_the_likeliest_choice_is_taken_whole_per_character_and_per_byte():
    choices = ["ab", "a" * 8, "é" * 5]
    assert choice_metrics([-4.0, -9.0, -8.0], choices, 0) == {"accuracy": 1, "acc_norm": 0, "acc_bytes": 0}
    assert choice_metrics([-4.0, -9.0, -8.0], choices, 1) == {"accuracy": 0, "acc_norm": 1, "acc_bytes": 0}
    assert choice_metrics([-4.0, -9.0, -8.0], choices, 2) == {"accuracy": 0, "acc_norm": 0, "acc_bytes": 1}
    assert choice_metrics([-1.0, -1.0], ["a", "b"], 0)["accuracy"] == 1, "the first of equals"


def evaluate_file(base: Path, path: Path, *flags: str) -> dict:
    """What evaluate.py finds of a file of the run that `base` is a checkpoint of."""
    argv = [f"--out_dir={base.parents[1]}", f"--tasks={path}", "--dtype=float32", f"--json={path}.results", *flags]
    args = configurator.parse(evaluate.EvaluateArgs, argv, "", configurator.Rules(check=evaluate.check))
    return evaluate.main(args)["tasks"][str(path)]


def sum_questions() -> list[dict]:
    """Sums with three answers of different lengths; the last two prompts are longer than the context of 32 tokens."""
    prompts = [f"{a}+{b}=" for a in range(4, 9) for b in range(3)] + ["+".join(["12"] * 13) + "="] * 2
    return [
        {"prompt": prompt, "choices": [str(i), str(sum(map(int, prompt[:-1].split("+")))), "123"], "answer": "B"}
        for i, prompt in enumerate(prompts)
    ]


@torch.no_grad()
def logps_by_hand(base: Path, row: dict) -> list[float]:
    model = load_model(str(base)).model
    logps = []
    for choice in row["choices"]:
        ids = torch.tensor([*DIGITS.encode(row["prompt"]), *DIGITS.encode(choice)])[-33:].long()
        logits = model(ids[None, :-1])[0, -len(choice) :]
        logps.append(-F.cross_entropy(logits, ids[-len(choice) :], reduction="sum").item())
    return logps


@pytest.mark.slow
def test_accuracy_is_that_of_each_choice_read_by_itself(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = sum_questions()
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = evaluate_file(base, path, "--batch_size=7")
    expected = [logps_by_hand(base, row) for row in rows]
    for sample, logps in zip(task["samples"], expected, strict=False):
        assert sample["log_likelihoods"] == pytest.approx(logps, abs=1e-4)
    right = [max(range(3), key=lambda i, logps=logps: logps[i]) == 1 for logps in expected]
    per_digit = [[logp / len(text) for logp, text in zip(logps, row["choices"], strict=True)]
                 for logps, row in zip(expected, rows, strict=True)]  # fmt: skip
    right_norm = [max(range(3), key=lambda i, logps=logps: logps[i]) == 1 for logps in per_digit]
    assert 0 < sum(right) < len(rows) and task["n"] == len(rows) == 17
    low, high = wilson_interval(sum(right), len(rows))
    assert task["accuracy"] == {"value": pytest.approx(sum(right) / len(rows)), "low": low, "high": high}
    assert task["acc_norm"]["value"] == task["acc_bytes"]["value"] == pytest.approx(sum(right_norm) / len(rows))
    assert task["cut_prompts"] == 2 and "2 prompts longer" in capsys.readouterr().out
    (tmp_path / "sums.jsonl.results").rename(tmp_path / "evaluation.json")
    assert dict(read_scores(tmp_path)) == {"accuracy/sums.jsonl": pytest.approx(sum(right) / len(rows))}


def test_a_table_gives_the_same_as_lines_of_json(base: Path, tmp_path: Path):
    rows = sum_questions()[:4]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = [[row["prompt"], json.dumps(row["choices"]).replace('"', '""'), row["answer"]] for row in rows]
    lines = ["prompt,choices,answer", *(f'{prompt},"{choices}",{answer}' for prompt, choices, answer in cells)]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    assert evaluate_file(base, tmp_path / "a.csv") == evaluate_file(base, tmp_path / "a.jsonl")
    assert evaluate_file(base, tmp_path / "a.csv", "--max_problems=3")["n"] == 3


def test_what_is_not_used_or_no_question_is_refused_by_name(base: Path, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*sum_questions()[:2], {"prompt": "1", "answer": "1"}]))
    with pytest.raises(UserError, match=r"a\.jsonl:3: choices: "):
        evaluate_file(base, path)
    with pytest.raises(UserError, match="--max_new_tokens: "):
        evaluate_file(base, path, "--max_new_tokens=3")
    path.write_text(json.dumps({"question": "1+1?", "choices": ["1", "2"], "answer": 1}) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:1: the tokenizer knows no"):
        evaluate_file(base, path)
