"""Rewards that packages grade, against these packages: reasoning-gym's scorers, and TRL's reward by math-verify."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from nanoforge.errors import UserError
from nanoforge.posttraining import package_rewards
from nanoforge.posttraining.rewards import REWARDS, Sample, parse_rewards, total_reward

needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="needs the package reasoning-gym"
)
needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs the package math-verify"
)


def sample(completion: str, row: dict) -> Sample:
    return Sample(completion, row, n_tokens=3, max_tokens=10, ended=True)


@pytest.mark.parametrize("name", ["reasoning_gym", "math_verify"])
def test_a_missing_package_is_named_before_a_run(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"--reward={name}: .*pip install {package_rewards.PACKAGES[name]}"):
        parse_rewards(name)


def test_a_wrong_answer_never_gets_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match="weight of math_verify, 1, must exceed the sum of the others, 1"):
        parse_rewards("math_verify,format:0.6,length:0.4")
    assert len(parse_rewards("reasoning_gym:1,format:0.5")) == 2


@pytest.mark.slow  # a second of imports
@needs_reasoning_gym
def test_reasoning_gyms_scores_are_its_own(tmp_path: Path):
    """Of right, wrong and partly right answers, read back from the files; training and validation share no problem."""
    import reasoning_gym

    tasks = ("basic_arithmetic", "spell_backward", "time_intervals", "propositional_logic")
    config = {"time_intervals": {"max_time_difference_seconds": 4000}}
    spec = importlib.util.spec_from_file_location("prepare_reasoning_gym", ROOT / "data/reasoning_gym/prepare.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    prepare.main(prepare.PrepareArgs(task=tasks, config=config, rows=24, val_rows=8, out_dir=str(tmp_path)))
    rows = {split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").open()] for split in ("train", "val")}
    assert (len(rows["train"]), len(rows["val"])) == (24, 8)
    assert not {row["prompt"] for row in rows["train"]} & {row["prompt"] for row in rows["val"]}
    scores = set()
    for row in rows["train"] + rows["val"]:
        dataset = reasoning_gym.create_dataset(row["task"], seed=0, size=100, **row["config"])
        entry = dataset[row["metadata"]["source_index"]]
        assert row["prompt"].startswith(entry["question"].rstrip()) and row.get("answer") == entry["answer"]
        for answer in (row.get("answer") or "P", "wrong", f"{row.get('answer')}0"):
            expected = dataset.score_answer(answer, entry)
            for completion in (
                f"so <answer>{answer}</answer>",
                f" {answer}\n",
                f"<answer>x</answer><answer>{answer}</answer>",
            ):
                value = REWARDS["reasoning_gym"](sample(completion, row))
                assert value == expected, (row["task"], completion)
            scores.add((row["task"], expected))
    assert {score for task, score in scores if task == "basic_arithmetic"} >= {0.0, 1.0}
    assert len(scores) > 2 * len(tasks)  # some are partly right


@pytest.mark.slow
@needs_reasoning_gym
@pytest.mark.parametrize("task", ["countdown", "string_insertion", "bitwise_arithmetic"])
def test_a_scorer_that_runs_completions_is_refused(tmp_path: Path, task: str):
    """The completion that would leave a file leaves none."""
    row = {"prompt": "p", "answer": "1", "task": task, "config": {}, "metadata": {"numbers": [1], "target": 1}}
    attack = f"__import__('pathlib').Path('{tmp_path}/ran').touch() or '[]'"
    with pytest.raises(UserError, match=f"{task}: its scorer runs completions as Python code"):
        total_reward(parse_rewards("reasoning_gym"), sample(f"<answer>{attack}</answer>", row))
    assert not (tmp_path / "ran").exists()


@needs_reasoning_gym
def test_rows_of_other_datasets_and_unknown_tasks_are_refused():
    with pytest.raises(UserError, match=r"data/reasoning_gym/prepare\.py"):
        REWARDS["reasoning_gym"](sample("1", {"prompt": "p", "answer": "1"}))
    with pytest.raises(UserError, match="did you mean basic_arithmetic"):
        package_rewards.create_task("basic_arithmetik")
    with pytest.raises(UserError, match="max_terms"):
        package_rewards.create_task("chain_sum", max_terms=0)


@pytest.mark.slow  # a second of imports
@needs_math_verify
def test_math_verify_agrees_with_trl():
    """On boxed answers, which TRL's reward reads; the same answers in <answer>..</answer> get the same."""
    from trl.rewards import accuracy_reward

    golds = ["3000", r"\frac{1}{2}", "x+1"]
    answers = ["3{,}000", "72", "0.5", "1/2", "1+x", "(1,2)", "", "nonsense"]
    for gold in golds:
        latex = f"${gold}$"
        for answer in answers:
            text = rf"The answer is \boxed{{{answer}}}."
            (expected,) = accuracy_reward([[{"role": "assistant", "content": text}]], [latex])
            reward = REWARDS["math_verify"]
            assert reward(sample(text, {"answer": gold})) == expected, (gold, answer)
            assert reward(sample(f"x<answer>{answer}</answer>", {"answer": gold})) == expected, (gold, answer)


@needs_math_verify
def test_answers_outside_of_a_box_are_found():
    reward = REWARDS["math_verify"]
    for completion in (r"<answer>\frac12</answer>", "it is $0.5$", "so 1/2", "#### 0.5", r"<answer>50\%</answer>"):
        assert reward(sample(completion, {"answer": r"\frac{1}{2}"})) == 1, completion
    for completion in ("<answer></answer>", "<answer>2</answer> not 0.5", ""):
        assert reward(sample(completion, {"answer": "0.5"})) == 0, completion


@needs_math_verify
def test_an_answer_that_is_no_mathematics_is_refused_by_name():
    with pytest.raises(UserError, match="answer '' is no expression"):
        REWARDS["math_verify"](sample("1", {"answer": ""}))
    assert REWARDS["math_verify"](sample("#### 12", {"answer": "12"})) == 1
