"""The block that ends a run: its numbers are those of metrics.jsonl, and its commands run as they stand."""

import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import RunFiles

import configurator
import report
import sample
import train
import train_args

FINE_TUNED = ("--block_size=32", "--eval_samples=0")


def read_block(console: str) -> tuple[dict[str, str], list[list[str]]]:
    """Values by name and the commands, as a script would read them."""
    block = console.rpartition("\n---\n")[2]
    values, _, commands = block.partition("\nnext:\n")
    pairs = [line.partition(":") for line in values.splitlines()]
    return {name: value.strip() for name, _, value in pairs}, [shlex.split(line) for line in commands.splitlines()]


def run_sample(command: list[str]) -> None:
    """Run a command of sample.py, with little to print."""
    assert Path(command[1]).name == "sample.py"
    flags = [*command[2:], "--max_new_tokens=2", "--device=cpu", "--dtype=float32"]
    sample.main(configurator.parse(sample.SampleArgs, flags, "", configurator.Rules(check=sample.check)))


def test_the_block_has_the_runs_numbers_and_commands_that_run(
    run: Callable[..., RunFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a dataset whose tokenizer has no newline, which is sample.py's own start."""
    monkeypatch.chdir(tmp_path)
    flags = ["--learning_rate=1", "--early_stop_patience=1", "--eval_interval=1"]
    done = run("--dataset=c", *flags, "--max_iters=50", name="the run")
    values, (sampled, reported, resumed) = read_block(done.console)
    best = min(done.evals[1:], key=lambda line: line["val_loss"])
    assert values["status"] == "finished" and "without a better val_loss" in values["reason"]
    assert (int(values["best_step"]), int(values["step"])) == (best["step"], done.steps[-1])
    for name, number in {
        "best_val_loss": best["val_loss"],
        "bits_per_byte": best["bits_per_byte"],
        "val_loss": done.evals[-1]["val_loss"],
        "tokens": done.train[-1]["tokens"],
    }.items():
        assert float(values[name]) == pytest.approx(number, rel=2e-3), name
    assert values["out_dir"] == str(done.out_dir)
    logged = max(line["peak_memory_mb"] for line in done.train)  # before the last evaluation and checkpoint
    assert logged - 1 <= float(values["peak_memory_mb"]) < 1.5 * logged

    run_sample(sampled)
    assert report.split_folders(reported[2:])[0] == [str(done.out_dir)]
    again = train_args.parse(resumed[2:])
    assert (again.out_dir, again.early_stop_patience, again.init_from) == (str(done.out_dir), 2, "resume")
    assert train.main(again).step > done.steps[-1]


@pytest.mark.parametrize(
    ("flags", "asks"),
    [
        (("--objective=sft", "--dataset=chat"), ["--chat"]),
        (("--objective=sft", "--dataset=sums"), ["--stop_at_end", "--start"]),
        (("--objective=grpo", "--dataset=sums", "--max_new_tokens=2", "--num_generations=2"), ["--stop_at_end"]),
        (
            ("--objective=sft", "--dataset=sums", "--adapter=soft_prompt", "--prompt_format=<P*2>{prompt}"),
            ["--prompt_dir", "--fields"],
        ),
    ],
)
def test_the_sample_is_of_what_the_run_was_trained_for(
    run: Callable[..., RunFiles], base: Path, flags: tuple[str, ...], asks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(f"--init_from={base}", *FINE_TUNED, *flags, "--max_iters=2")
    values, (sampled, _, _) = read_block(done.console)
    given = [flag.partition("=")[0] for flag in sampled]
    assert all(flag in given for flag in asks)
    if "--objective=grpo" in flags:
        assert float(values["val_reward"]) == done.evals[-1]["val_reward"]
    monkeypatch.setattr("builtins.input", lambda prompt="": (_ for _ in ()).throw(EOFError))  # of a conversation
    run_sample(sampled)


def test_a_stopped_run_says_how_it_goes_on(
    run: Callable[..., RunFiles], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("run.Run.seed_step", lambda run, step: step == 2 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        run("--max_iters=9")
    values, (_, _, resumed) = read_block(capsys.readouterr().out)
    assert (values["status"], values["reason"], values["step"]) == ("stopped", "SIGTERM", "3")
    record = json.loads((Path(values["out_dir"]) / "train_config.json").read_text())
    assert train_args.parse(resumed[2:]).max_iters == record["max_iters"] == 9


def test_a_time_budget_goes_on_as_another_run(run: Callable[..., RunFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own seconds can't be raised."""
    monkeypatch.setattr("run.Run.reached_limits", lambda run: ["--time_budget=9"])
    done = run("--max_iters=1")
    _, (_, _, command) = read_block(done.console)
    again = train_args.parse(command[2:])
    assert (again.init_from, again.out_dir) == (str(done.out_dir), f"{done.out_dir}-more")
    assert train.main(again).step == 1
