"""evaluate.py against losses and answers made another way; sample.py on soft prompts, chats and end tokens."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS, TINY, RunFiles, draw_uncached, run_script

import configurator
import evaluate
import train
import train_args
from builders import load_model
from model import GPT
from nanoforge.data import corpus, token_bins
from nanoforge.data.tokenization import CharTokenizer, ControlTokens
from nanoforge.errors import UserError
from nanoforge.posttraining.accuracy import wilson_interval

SMALL_STEPS = ["--learning_rate=1e-2", "--weight_decay=0", "--warmup_iters=0"]


def run_evaluate(*argv) -> dict:
    """What evaluate.py writes, run in this process."""
    rules = configurator.Rules(check=evaluate.check)
    return evaluate.main(configurator.parse(evaluate.EvaluateArgs, list(map(str, argv)), "", rules))


def read_val(data_dir, name: str) -> list[dict]:
    return [json.loads(line) for line in (data_dir / name / "val.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# losses


@torch.no_grad()
def loss_by_hand(model: GPT, tokens: torch.Tensor, size: int) -> torch.Tensor:
    """The loss of each token after the first, (K, T - 1), in windows of `size` and one of the rest. tokens: (K, T)."""
    losses = []
    for start in range(0, tokens.size(-1) - 1, size):
        window = tokens[:, start : start + size + 1]
        idx = window[None, :, :-1] if len(tokens) > 1 else window[:, :-1]
        logits = model(idx)[0].split(model.config.vocab_sizes, dim=-1)
        offsets = model.vocabulary.vocab_offsets
        pairs = zip(logits, window[:, 1:], offsets, strict=True)
        losses.append(
            torch.stack([F.cross_entropy(part, ids - offset, reduction="none") for part, ids, offset in pairs])
        )
    return torch.cat(losses, dim=1)


def val_tokens(data_dir: Path, name: str) -> torch.Tensor:
    val = token_bins.TokenBin(data_dir / name, "val", token_bins.read_meta(data_dir / name))
    return torch.tensor(val.read_windows(np.zeros(1, int), np.zeros(1, int), val.tokens)[0].astype("int64"))


@pytest.mark.slow
def test_the_loss_of_a_text_is_that_of_each_token_once(run: Callable[..., RunFiles], data_dir: Path):
    """By hand: windows of block_size in order, the last one shorter; each token after the first is predicted once."""
    done = run("--max_iters=20", "--learning_rate=1e-2")
    results = run_evaluate(f"--out_dir={done.out_dir}", "--checkpoint=last", "--dtype=float32", "--batch_size=5")
    metrics = results["losses"]["a"]
    model = load_model(str(done.out_dir / "checkpoints/000020")).model
    losses = loss_by_hand(model, val_tokens(data_dir, "a")[None], 8)
    mean = losses.mean().item()
    assert losses.size(1) % 8, "the last window is shorter"
    assert metrics["val_loss"] == pytest.approx(mean, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert metrics["tokens"] == losses.size(1)
    assert metrics["bits_per_byte"] == pytest.approx(mean / math.log(2), rel=1e-5), "a character is a byte here"
    assert json.loads((done.out_dir / "evaluation.json").read_text()) == results
    run_evaluate(f"--out_dir={done.out_dir}", "--max_windows=1")
    lines = [json.loads(line) for line in (done.out_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [line["losses"]["a"]["tokens"] for line in lines] == [losses.size(1), 8], "each call's results are kept"


def test_the_losses_of_contexts_are_those_of_aligned_windows(run: Callable[..., RunFiles], data_dir: Path):
    done = run("--training_mode=multicontext", "--multicontext_datasets", "a", "upper")
    flags = [f"--out_dir={done.out_dir}", "--dtype=float32"]
    losses = run_evaluate(*flags)["losses"]
    model = load_model(str(done.last.folder)).model
    offsets = model.vocabulary.vocab_offsets
    tokens = torch.stack(
        [val_tokens(data_dir, name) + offset for name, offset in zip(("a", "upper"), offsets, strict=True)]
    )
    expected = loss_by_hand(model, tokens, 8).mean(1).tolist()
    assert [losses[name]["val_loss"] for name in ("a", "upper")] == pytest.approx(expected, rel=1e-5)
    assert losses["a+upper"]["val_loss"] == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert run_evaluate(*flags, "--datasets", "upper", "a")["losses"] == losses
    with pytest.raises(UserError, match="--datasets: the model reads 2 contexts"):
        run_evaluate(*flags, "--datasets=a")


def test_bits_per_byte_with_and_without_end_tokens(run: Callable[..., RunFiles], tmp_path: Path):
    """The losses of end tokens, which have no bytes, are in the one and not in the other."""
    chunks = [corpus.TextChunk(split, "abcab", ends_document=True) for split in ("train", "val") for _ in range(5)]
    corpus.write_dataset(tmp_path / "data/docs", lambda: chunks, CharTokenizer("abc", has_eos=True))
    done = run(f"--data_dir={tmp_path / 'data'}", "--dataset=docs")
    metrics = run_evaluate(f"--out_dir={done.out_dir}", "--dtype=float32")["losses"]["docs"]
    tokens = val_tokens(tmp_path / "data", "docs")
    losses = loss_by_hand(load_model(str(done.last.folder)).model, tokens[None], 8)[0]
    n_bytes = 25 * len(losses) / len(tokens)  # of the tokens that are predicted
    is_end = tokens[1:] == 3
    assert is_end.sum() == 5
    assert metrics["bits_per_byte"] == pytest.approx(losses.sum().item() / math.log(2) / n_bytes, rel=1e-5)
    expected = losses[~is_end].sum().item() / math.log(2) / n_bytes
    assert metrics["bits_per_byte_without_end_tokens"] == pytest.approx(expected, rel=1e-5)


def test_windows_begin_with_the_token_that_begins_a_sequence(run: Callable[..., RunFiles], tmp_path: Path):
    """By hand: it stands in the place of the token before a window's targets; its own losses have no bytes."""
    chunks = [corpus.TextChunk(split, "abcab", ends_document=True) for split in ("train", "val") for _ in range(5)]
    tokenizer = CharTokenizer("abcS", has_eos=True)
    tokenizer.adopt(ControlTokens(eos_id=4, bos_id=3, end_ids=(4,), added_ids={"S": 3}))
    corpus.write_dataset(tmp_path / "data/docs", lambda: chunks, tokenizer)
    done = run(f"--data_dir={tmp_path / 'data'}", "--dataset=docs")
    metrics = run_evaluate(f"--out_dir={done.out_dir}", "--dtype=float32")["losses"]["docs"]
    tokens = val_tokens(tmp_path / "data", "docs")
    model = load_model(str(done.last.folder)).model
    losses = []
    for start in range(0, len(tokens) - 1, 8):
        window = tokens[start : start + 9].clone()
        window[0] = 3
        losses.append(loss_by_hand(model, window[None], 8)[0])
    by_hand = torch.cat(losses)
    assert tokens[7].item() == 3 and metrics["val_loss"] == pytest.approx(by_hand.mean().item(), rel=1e-5)
    has_bytes = tokens[1:] < 3
    assert has_bytes.sum() == 25
    expected = by_hand[has_bytes].sum().item() / math.log(2) / (25 * len(by_hand) / len(tokens))
    assert metrics["bits_per_byte_without_end_tokens"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--objective=dpo", "--dataset=pairs", "--adapter=lora"],
    ["--objective=kto", "--dataset=labelled"],
    ["--objective=grpo", "--dataset=sums", "--max_new_tokens=3", "--num_generations=4", "--reward=correct:2,length:1"],
], ids=["dpo", "kto", "grpo"])  # fmt: skip
def test_preferences_and_rewards_are_evaluated_as_in_training(
    run: Callable[..., RunFiles], base: Path, flags: list[str]
):
    """Without --tasks: the metrics that the run itself logged, over all validation rows."""
    flags = [*flags, "--block_size=16", "--eval_iters=99", "--learning_rate=0.01", "--eval_samples=0"]
    done = run(f"--init_from={base}", *flags, "--batch_size=8")
    evaluate_flags = [f"--out_dir={done.out_dir}", "--checkpoint=last", "--dtype=float32", "--batch_size=8"]
    (metrics,) = run_evaluate(*evaluate_flags)["losses"].values()
    logged = {name: value for name, value in done.evals[-1].items() if name.startswith("val_")}
    assert metrics == pytest.approx(logged, rel=1e-4, abs=1e-5) and len(metrics) > 2
    with pytest.raises(UserError, match="--chat_template"):
        run_evaluate(*evaluate_flags, "--chat_template_kwargs", '{"x": 1}', f"--chat_template={__file__}")


def test_the_loss_of_examples_is_that_of_the_completions(base: Path, data_dir: Path):
    metrics = run_evaluate(f"--out_dir={base.parent.parent}", "--dtype=float32", "--batch_size=7")["losses"]["sums"]
    model = load_model(str(base)).model
    total, n_tokens = 0.0, 0
    for row in read_val(data_dir, "sums"):
        prompt = DIGITS.encode(row["prompt"]).tolist()
        completion = [*DIGITS.encode(row["completion"]).tolist(), DIGITS.eos_id]
        logits = model(torch.tensor([prompt + completion[:-1]]))[0, len(prompt) - 1 :]
        total += F.cross_entropy(logits, torch.tensor(completion), reduction="sum").item()
        n_tokens += len(completion)
    assert metrics["val_loss"] == pytest.approx(total / n_tokens, rel=1e-5)
    assert metrics["tokens"] == n_tokens


# ---------------------------------------------------------------------------------------------------------------------
# tasks


def greedy_answer(model, prompt: str) -> str:
    """The greedy completion of a prompt, made without a cache, up to the end token."""
    ids = torch.tensor(DIGITS.encode(prompt).tolist())
    sequence = draw_uncached(model, ids[None], 8, temperature=0)[0].tolist()
    completion = sequence[len(ids) :]
    if DIGITS.eos_id in completion:
        completion = completion[: completion.index(DIGITS.eos_id)]
    return DIGITS.decode(completion)


def test_accuracy_is_that_of_greedy_completions(base: Path, data_dir: Path):
    flags = ["--tasks=sums", "--dtype=float32", "--batch_size=6"]
    metrics = run_evaluate(f"--out_dir={base.parent.parent}", *flags)["tasks"]["sums"]
    model = load_model(str(base)).model
    rows = read_val(data_dir, "sums")
    right = sum(greedy_answer(model, row["prompt"]) == row["answer"] for row in rows)
    accuracy = metrics["accuracy"]
    assert accuracy["value"] == pytest.approx(right / len(rows)) and metrics["n"] == len(rows)
    assert (accuracy["low"], accuracy["high"]) == pytest.approx(wilson_interval(right, len(rows)))
    assert metrics["partial"]["value"] >= accuracy["value"] and metrics["format"]["value"] == 0


def test_prompts_longer_than_the_context_are_read_by_their_end(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prompts = ["+".join(map(str, range(length))) + "=" for length in (3, 12, 16, 40)]  # of 6 to 120 tokens
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts))
    metrics = run_evaluate(
        f"--out_dir={base.parent.parent}", f"--tasks={problems}", "--dtype=float32", "--max_new_tokens=8"
    )["tasks"]
    (task,) = metrics.values()
    model = load_model(str(base)).model
    completions = [sample["completion"] for sample in task["samples"]]
    assert completions == [greedy_answer(model, prompt) for prompt in prompts[: len(completions)]]
    assert task["mean_tokens"] > 0 and task["cut_prompts"] == sum(len(prompt) > 32 for prompt in prompts) == 2
    assert "2 prompts longer" in capsys.readouterr().out


@pytest.mark.slow
def test_completions_depend_on_the_seed_alone(base: Path, tmp_path: Path):
    def evaluate_sums(*flags) -> dict:
        flags = ["--tasks=sums", "--decode=liberal", "--num_passes=4", f"--json={tmp_path / 'e.json'}", *flags]
        return run_evaluate(f"--out_dir={base.parent.parent}", *flags)["tasks"]["sums"]

    metrics = evaluate_sums()
    assert metrics == evaluate_sums("--batch_size=7")
    assert metrics != evaluate_sums("--seed=2")
    values = [metrics[name]["value"] for name in ("pass@4", "pass@2", "accuracy")]
    assert values == sorted(values, reverse=True), "pass@1 is the accuracy"
    assert {"majority@2", "majority@4"} <= metrics.keys() and metrics["passes"] == 4


def test_a_chat_prompt_for_a_model_without_roles_is_refused_by_its_row(base: Path, tmp_path: Path):
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": [{"role": "user", "content": "1+2="}], "answer": "3"}]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"row 2: .*<\|user\|>"):
        run_evaluate(f"--out_dir={base.parent.parent}", f"--tasks={path}")


def test_a_problem_is_scored_by_its_completions():
    score = evaluate.score_problem("72", ["72", "it is 70", "so <answer>72.0</answer>", "none"], num_passes=4)
    assert score == {
        "accuracy": 0.5,
        "partial": 0.75,
        "format": 0,
        "pass@2": pytest.approx(5 / 6),  # of the 6 pairs one has no right answer
        "majority@2": 1.0,  # 72 came first in the one pair, and alone in the other
        "pass@4": 1.0,
        "majority@4": 1.0,
    }


def test_a_problem_is_scored_at_all_of_its_passes():
    """Of 3 completions with one right: 2/3 of the pairs have it, and so have all three; 72 is no majority."""
    score = evaluate.score_problem("72", ["70", "70", "72"], num_passes=3)
    assert score["pass@2"] == pytest.approx(2 / 3) and score["pass@3"] == 1 and score["majority@3"] == 0
    assert "pass@1" not in evaluate.score_problem("72", ["72"], num_passes=1)


def test_a_problem_without_completions_is_worth_nothing():
    assert set(evaluate.score_problem("72", [], num_passes=2).values()) == {0.0}


def test_metrics_are_means_over_the_problems():
    metrics = evaluate.aggregate([{"accuracy": 1.0}, {"accuracy": 0.5}, {"accuracy": 0.0}])
    low, high = wilson_interval(1.5, 3)
    assert metrics == {"accuracy": {"value": 0.5, "low": low, "high": high}}


@pytest.mark.parametrize("flags, message", [
    (["--num_passes=2", "--tasks=sums"], "--num_passes"),
    (["--init_from=gpt2"], "--json"),
    (["--decode=standard"], "only with --tasks"),
    (["--checkpoint=newest"], "--checkpoint=newest"),
])  # fmt: skip
def test_errors_name_the_flag(capsys: pytest.CaptureFixture[str], flags, message):
    with pytest.raises(SystemExit) as end:
        run_evaluate(*flags)
    assert end.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# sample.py

PROMPT_FLAGS = {
    "a": ["--prompt_format=<P*3>{prompt}"],
    "b": ["--prompt_format={prompt}<P*2>", "--prompt_provider=lstm"],
}


@pytest.fixture(scope="module")
def soft_prompts(base: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """A folder of two soft prompts on one base: a plain one, and one whose virtual tokens an LSTM makes."""
    folder = tmp_path_factory.mktemp("prompts")
    shape = ("--n_layer", "--n_head", "--n_embd", "--block_size")
    tiny = [flag for flag in TINY if not flag.startswith(shape)]
    data = [f"--data_dir={data_dir}", "--dataset=sums", "--objective=sft", "--block_size=32"]
    for name, prompt_flags in PROMPT_FLAGS.items():
        adapter = ["--adapter=soft_prompt", f"--init_from={base}", *prompt_flags]
        train.main(train_args.parse([*tiny, *SMALL_STEPS, *data, *adapter, f"--out_dir={folder / name}"]))
    return folder


def sample_greedily(*argv) -> list[str]:
    """What sample.py prints for each prompt."""
    flags = ["--temperature=0", "--num_samples=1", "--max_new_tokens=6", "--dtype=float32", "--device=cpu"]
    return run_script(*argv, *flags, script="sample.py").stdout.split("\n---------------\n")[:-1]


@pytest.mark.slow
def test_prompts_of_several_runs_share_a_batch(soft_prompts):
    a, b = soft_prompts / "a", soft_prompts / "b"
    a_fields, b_fields = '{"prompt": "12+9="}', '{"prompt": "3+4="}'
    alone = [
        *sample_greedily("--prompt_dir", a, "--fields", a_fields),
        *sample_greedily("--prompt_dir", b, "--fields", b_fields),
    ]
    best = (
        b / "checkpoints" / f"{json.loads((b / 'best.json').read_text())['step']:06d}"
    )  # names itself, as its run does
    assert sample_greedily("--prompt_dir", a, best, "--fields", a_fields, b_fields) == alone


@pytest.mark.slow
def test_an_evaluation_of_a_soft_prompt_gives_its_completions(soft_prompts):
    run_dir = soft_prompts / "a"
    flags = ["--tasks=sums", "--dtype=float32", "--max_problems=3", f"--json={soft_prompts / 'e.json'}"]
    samples = run_evaluate(f"--out_dir={run_dir}", *flags)["tasks"]["sums"]["samples"]
    assert len(samples) == 3
    for sample in samples:
        fields = json.dumps({"prompt": sample["prompt"]})
        assert sample_greedily("--prompt_dir", run_dir, "--fields", fields) == [sample["completion"]]
    with pytest.raises(UserError, match=r"--lm_eval: .*--tasks"):
        run_evaluate(f"--out_dir={run_dir}", "--lm_eval=hellaswag", "--tasks=sums")


@pytest.mark.slow
def test_errors_of_prompts_are_one_line_that_names_the_flag(soft_prompts, base: Path):
    def error_of(*argv) -> str:
        done = run_script(*argv, script="sample.py", check=False)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        return done.stderr

    prompt_dir = ["--prompt_dir", soft_prompts / "a"]
    assert "--fields" in error_of(*prompt_dir)
    assert "not JSON" in error_of(*prompt_dir, "--fields", "{prompt}")
    assert "x" in error_of(*prompt_dir, "--fields", '{"x": "1"}')
    assert "prompt" in error_of(*prompt_dir, "--fields", "{}")
    not_a_prompt = error_of("--prompt_dir", base.parent.parent, "--fields", '{"prompt": "1"}')
    assert "--adapter=soft_prompt" in not_a_prompt
    assert "--prompt_dir" in error_of(f"--out_dir={soft_prompts / 'a'}", "--start=1")
    assert "--chat" in error_of(f"--out_dir={base.parent.parent}", "--start=1", "--chat")


@pytest.mark.slow
def test_a_chat_and_an_end_token(run, base: Path, tmp_path: Path):
    """A model that has learned one chat by heart says it without the end token, at which --stop_at_end stops."""
    row = {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}
    for split in token_bins.SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    files = [f"--train_file={tmp_path}/train.jsonl", f"--validation_file={tmp_path}/val.jsonl"]
    steps = ["--max_iters=60", "--eval_interval=60", "--block_size=32", *SMALL_STEPS]
    run("--objective=sft", f"--init_from={base}", *files, *steps)
    assert sample_greedily(f"--out_dir={tmp_path / 'run'}", "--start=1+1=", "--chat") == ["2"]
    (stopped,) = sample_greedily(f"--out_dir={base.parent.parent}", "--start=12+9=", "--stop_at_end")
    (unstopped,) = sample_greedily(f"--out_dir={base.parent.parent}", "--start=12+9=")
    assert "<|endoftext|>" not in stopped
    assert unstopped.split("<|endoftext|>")[0].startswith(stopped)
