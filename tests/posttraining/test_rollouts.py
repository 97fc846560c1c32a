"""Rollouts: completions of a batch are those of each prompt alone, and their log-probabilities are the model's.

A step of GRPO is a pure function of the arguments, the weights and the step.
"""

import functools
import json
import site
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    TINY_WITHOUT_SHAPE,
    RunFiles,
    draw_uncached,
    equal_tensors,
    ids,
    metric,
    read_run,
    start_ranks,
    tiny_model,
    wait_for_exit,
)

import train_args
from model import GPT
from nanoforge.data.tokenization import CharTokenizer
from nanoforge.distributed import Ranks
from nanoforge.errors import UserError
from nanoforge.models.generation import Completion, SamplingParams, generate_batch, logits_to_probs
from nanoforge.posttraining import objectives, rollouts
from nanoforge.posttraining.examples import Example, ExampleEncoder, Examples, encode_rows
from nanoforge.posttraining.rewards import RewardError, Sample, correct_reward, length_reward, parse_rewards
from nanoforge.posttraining.rollouts import Sampler, Scorer, decode_completion, repeat_each, sample_completions
from nanoforge.rng import uniform

VOCAB_SIZE = 31
VARIANTS = [
    {},
    {"position": "rope", "n_kv_head": 2},
    {"position": "rope", "window": "SL", "window_size": 3},
    {"position": "none", "qk_norm": True},
    {
        "window": "S",
        "window_size": 5,
        "value_residual": True,
        "logit_softcap": 5.0,
        "embedding_norm": True,
        "residual_scalars": True,
    },
]
LENGTHS = [3, 1, 7, 4, 12, 2]
PROMPTS = [ids(n, seed=n).tolist() for n in LENGTHS]


def greedy_ids(model: GPT, prompt: list[int], n: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """The n likeliest next tokens one after the other, without a cache."""
    text = draw_uncached(model, torch.tensor([prompt]), n, temperature=0.0, vocab_size=vocab_size)
    return text[0, len(prompt) :].tolist()


def cut_at(tokens: list[int], end_ids: tuple[int, ...]) -> tuple[list[int], bool]:
    """(ids to the first token that ends a completion, whether there is one)."""
    for i, token in enumerate(tokens):
        if token in end_ids:
            return tokens[: i + 1], True
    return tokens, False


def complete(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    end_ids: tuple[int, ...] = (),
    uniform=None,
    **sampling,
) -> list[Completion]:
    """Completions of `generate_batch` from a vocabulary of 31 tokens."""
    settings = {
        "max_new_tokens": max_new_tokens,
        "end_ids": end_ids,
        "vocab_size": VOCAB_SIZE,
        "logps": True,
    }
    return generate_batch(model, prompts, SamplingParams(**settings | sampling), uniform)


def draws_from(first_index: int):
    """Random numbers of completions, of which the first one has this index."""
    return lambda completions, token: uniform(3, completions + first_index, token)


def forward_logps(model: GPT, prompt: list[int], completion: list[int], temperature: float, vocab_size: int):
    """log_softmax of a forward over the whole sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1, :vocab_size] / temperature
    return logits.log_softmax(-1)[torch.arange(len(completion)), completion]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_greedy_completions_are_those_of_one_prompt_at_a_time(variant, n):
    """Prompts of 1 to 12 tokens; several tokens that end them, alone and together: rows retire at different times."""
    model = tiny_model(block_size=40, **variant).eval()
    greedy = [greedy_ids(model, prompt, 25) for prompt in PROMPTS]
    frequent = sorted({token for tokens in greedy for token in tokens})
    lengths = set()
    for end_ids in [(), *((token,) for token in frequent[:6]), tuple(frequent[:2]), tuple(frequent[3:6])]:
        completions = complete(model, PROMPTS, 25, end_ids, temperature=0.0, n=n)
        expected = [cut_at(tokens, end_ids) for tokens in greedy for _ in range(n)]
        assert [(completion.ids, completion.ended) for completion in completions] == expected
        lengths |= {len(completion.ids) for completion in completions}
    assert len(lengths) > 3, "rows that end at different times"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampled_log_probabilities_are_those_of_a_plain_forward(variant, temperature):
    """Also with filters: the log-probabilities are the model's, before top_k and top_p."""
    model = tiny_model(block_size=40, **variant).eval()
    lengths = set()
    for filters in ({}, {"top_k": 4}, {"top_p": 0.7}):
        completions = complete(model, PROMPTS, 20, (5,), draws_from(0), temperature=temperature, n=4, **filters)
        lengths |= {len(completion.ids) for completion in completions}
        prompts = [prompt for prompt in PROMPTS for _ in range(4)]
        for completion, prompt in zip(completions, prompts, strict=True):
            expected = forward_logps(model, prompt, completion.ids, temperature, VOCAB_SIZE)
            torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=1e-4, rtol=1e-4)
    assert len(lengths) > 1, "rows that end at different times"


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8}], ids=str)
def test_completions_are_those_of_one_prompt_at_a_time(filters):
    """The same random numbers decide, so the batch in which a prompt is completed does not matter."""
    model = tiny_model(block_size=40, position="rope").eval()
    together = complete(model, PROMPTS, 20, (5,), draws_from(0), n=2, **filters)
    for i, prompt in enumerate(PROMPTS):
        (one, other) = complete(model, [prompt], 20, (5,), draws_from(2 * i), n=2, **filters)
        assert (one.ids, other.ids) == (together[2 * i].ids, together[2 * i + 1].ids) and one.ids != other.ids
    part = complete(model, PROMPTS[2:4], 20, (5,), draws_from(4), n=2, **filters)
    assert [completion.ids for completion in part] == [completion.ids for completion in together[4:8]]


def token_frequencies(completions: list[Completion], vocab_size: int) -> torch.Tensor:
    """How often each token is the first one."""
    tokens = torch.tensor([completion.ids[0] for completion in completions])
    return torch.bincount(tokens, minlength=vocab_size) / len(completions)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 2.0}])
def test_first_tokens_follow_the_distribution(filters):
    """Of 4,000 completions, against `logits_to_probs`, which test_generation.py holds to its definition."""
    model, settings = tiny_model().eval(), {"temperature": 1.0} | filters
    frequencies = token_frequencies(complete(model, [PROMPTS[0]], 1, n=4000, **settings), VOCAB_SIZE)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]]))[:, -1]
        expected = logits_to_probs(logits, SamplingParams(max_new_tokens=1, **settings))[0]
    torch.testing.assert_close(frequencies, expected, atol=0.04, rtol=0)
    assert (frequencies[expected == 0] == 0).all()


def test_the_end_of_sequence_token_is_the_last_of_a_completion():
    """The token that the model gives third ends its completions."""
    model = tiny_model(block_size=40).eval()
    tokens = greedy_ids(model, PROMPTS[0], 10)
    eos_id = tokens[2]
    stop = tokens.index(eos_id) + 1
    (ended,) = complete(model, [PROMPTS[0]], 10, (eos_id,), temperature=0.0)
    assert ended.ids == tokens[:stop] and ended.ended and len(ended.logps) == stop
    (truncated,) = complete(model, [PROMPTS[0]], stop - 1, (eos_id,), temperature=0.0)
    assert truncated.ids == tokens[: stop - 1] and not truncated.ended
    (just_ended,) = complete(model, [PROMPTS[0]], stop, (eos_id,), temperature=0.0)
    assert just_ended.ended, "with its last possible token"


@pytest.mark.slow
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_completions_go_on_past_block_size(position: str) -> None:
    """A sequence is that of its prompt alone: inside the context, past it, and of a prompt as long as the context."""
    model = tiny_model(block_size=16, position=position).eval()
    completions = complete(model, PROMPTS, 50, temperature=0.0)
    assert [len(completion.ids) for completion in completions] == [50] * len(PROMPTS)
    for completion, prompt in zip(completions, PROMPTS, strict=True):
        assert completion.ids[: 16 - len(prompt)] == greedy_ids(model, prompt, 16 - len(prompt))
    prompts = [ids(16, seed=3).tolist(), *PROMPTS]
    together = complete(model, prompts, 50, (5,), draws_from(0), n=2)
    assert len({len(completion.ids) for completion in together}) > 1, "rows that end at different times"
    for i, prompt in enumerate(prompts):
        assert complete(model, [prompt], 50, (5,), draws_from(2 * i), n=2) == [
            Completion(together[j].ids, pytest.approx(together[j].logps, abs=1e-4), together[j].ended)
            for j in (2 * i, 2 * i + 1)
        ]


def test_ids_of_padding_are_never_drawn():
    """The draws are from the ids below vocab_size; log-probabilities are among all ids, as training computes them."""
    model = tiny_model(block_size=40).eval()
    completions = complete(model, [PROMPTS[0]], 2, vocab_size=5, temperature=1.5, n=4000)
    with torch.no_grad():
        expected = (model(torch.tensor([PROMPTS[0]]))[0, -1, :5] / 1.5).softmax(-1)
    torch.testing.assert_close(token_frequencies(completions, 5), expected, atol=0.04, rtol=0)
    for completion in completions[:20]:
        expected = forward_logps(model, PROMPTS[0], completion.ids, 1.5, VOCAB_SIZE)
        torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=1e-4, rtol=1e-4)
    (greedy,) = complete(model, [PROMPTS[0]], 20, vocab_size=5, temperature=0.0)
    assert greedy.ids == greedy_ids(model, PROMPTS[0], 20, vocab_size=5) != greedy_ids(model, PROMPTS[0], 20)


# ---------------------------------------------------------------------------------------------------------------------
# texts and rewards

DIGITS = CharTokenizer("0123456789+=", has_eos=True)
EOS_ID = 12


def prompts_of(*texts: str) -> list[Example]:
    rows = [{"prompt": text, "answer": "1"} for text in texts]
    return encode_rows(rows, ExampleEncoder(DIGITS, 16, max_completion_tokens=4), "prompt_only", "x").examples


def sampler_of(model: GPT, **sampling) -> Sampler:
    params = SamplingParams(max_new_tokens=4, end_ids=(EOS_ID,), vocab_size=13, **sampling)
    return Sampler(model, DIGITS, params, Ranks(0, 1, torch.device("cpu")))


def test_the_end_of_sequence_token_is_no_part_of_the_text():
    assert decode_completion(Completion([1, 10, EOS_ID], [0.0] * 3, True), DIGITS) == "1+"
    assert decode_completion(Completion([1, 10], [0.0] * 2, False), DIGITS) == "1+"


def test_scores_are_the_rewards_of_the_decoded_completions():
    """The end-of-sequence token counts as one of the tokens."""
    model = tiny_model(vocab_sizes=(13,), block_size=16).eval()
    prompts = prompts_of("1+1=", "23+4=", "5+=")
    sampler = sampler_of(model, n=5, temperature=2.0)
    completions = sampler.generate(prompts, seed=(1, 2), first_index=0)
    scorer = Scorer(parse_rewards("correct:2,length:1"), DIGITS, max_new_tokens=4)
    rewards, metrics = scorer.score(prompts, completions)
    assert {completion.ended for completion in completions} == {True, False}
    length_rewards = []
    for reward, completion, prompt in zip(rewards, completions, repeat_each(prompts, 5), strict=True):
        text = DIGITS.decode(completion.ids).replace("<|endoftext|>", "")
        sample = Sample(text, prompt.row, len(completion.ids), 4, completion.ended)
        length_rewards.append(length_reward(sample))
        assert reward.item() == pytest.approx(2 * correct_reward(sample) + length_rewards[-1])
    assert metrics["rewards/correct"][1] == 15
    assert metrics["rewards/length"].tolist() == pytest.approx([sum(length_rewards), 15])


@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_the_model_in_its_mode(training):
    model = tiny_model(vocab_sizes=(13,), block_size=16).train(training)
    sampler_of(model).generate_greedy(prompts_of("1+1="))
    assert model.training == training


def test_sample_completions_are_greedy():
    model = tiny_model(vocab_sizes=(13,), block_size=16).eval()
    examples = Examples("x", prompts_of("1+1=", "23+4=", "5+="))
    samples = sample_completions(sampler_of(model), examples, count=2, prompt_offset=13)
    assert [sample["prompt"] for sample in samples] == ["1+1=", "23+4="]
    for sample in samples:
        tokens = greedy_ids(model, DIGITS.encode(sample["prompt"]).tolist(), 4, vocab_size=13)
        completion, _ = cut_at(tokens, (EOS_ID,))
        assert sample["completion"] == DIGITS.decode([token for token in completion if token != EOS_ID])


# ---------------------------------------------------------------------------------------------------------------------
# whole runs

GRPO = [
    "--objective=grpo",
    "--dataset=sums",
    "--num_generations=4",
    "--batch_size=8",
    "--max_new_tokens=3",
    "--temperature=1.5",
    "--reward=length",
    "--eval_samples=1",
    "--log_data_hash",
    "--eval_iters=2",
]
LORA = [
    "--adapter=lora",
    "--lora_dropout=0.1",
    "--gradient_accumulation_steps=2",
    "--loss_type=dapo",
    "--batch_size=4",
]


@pytest.mark.slow
@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("flags", [[], LORA], ids=["full", "lora"])
def test_resumed_in_the_middle_is_bit_identical(run, base: Path, num_iterations, flags):
    flags = [
        *GRPO,
        *flags,
        f"--init_from={base}",
        f"--num_iterations={num_iterations}",
        "--learning_rate=0.01",
        "--max_iters=8",
        "--eval_interval=4",
        "--dropout=0.1",
    ]
    straight = run(*flags, name="straight")
    run(*flags, "--max_iters=4", name="resumed")
    resumed = run("--init_from=resume", "--max_iters=8", name="resumed")
    assert [line["step"] for line in resumed.train] == list(range(1, 9))
    for name in ("data_hash", "loss", "reward"):
        assert metric(resumed, name) == metric(straight, name)
    assert equal_tensors(resumed.last.weights, straight.last.weights)
    assert equal_tensors(resumed.last.optimizer, straight.last.optimizer)
    assert [line["val_loss"] for line in resumed.evals] == [line["val_loss"] for line in straight.evals]
    assert len(set(metric(straight, "data_hash"))) == 8 // num_iterations


@pytest.mark.parametrize("flag", ["--max_iters=3", "--eval_interval=3", "--checkpoint_interval=1"])
def test_a_step_within_a_rollout_is_refused(base: Path, capsys: pytest.CaptureFixture[str], data_dir: Path, flag):
    flags = [f"--data_dir={data_dir}", f"--init_from={base}", "--block_size=16"]
    with pytest.raises(SystemExit):
        train_args.parse([*GRPO, *flags, "--num_iterations=2", "--max_iters=4", "--eval_interval=2", flag])
    error = capsys.readouterr().err
    assert flag in error and "multiple of --num_iterations=2" in error


def test_without_a_learning_rate_nothing_moves(run, base: Path):
    """The control: equal weights, ratios of 1, no KL, and for both steps of a rollout the same reward."""
    flags = [*GRPO, f"--init_from={base}"]
    done = run(*flags, "--learning_rate=0", "--weight_decay=0", "--num_iterations=2", "--max_iters=4")
    start = run(*flags, "--max_iters=0", name="start")
    assert equal_tensors(done.last.weights, start.last.weights)
    assert max(metric(done, "rollout_logp_error")) < 1e-5 and max(map(abs, metric(done, "kl"))) < 1e-9
    assert metric(done, "clip_ratio/low") == metric(done, "clip_ratio/high") == [0.0] * 4
    assert done.train[0]["reward"] == done.train[1]["reward"]
    assert len({line["val_loss"] for line in done.evals}) == 1


def test_ratios_are_1_in_the_first_iteration_and_not_in_the_next(run, base: Path):
    """Of a model with every kind of attention, at a temperature: rollout and training agree to float32's precision."""
    flags = [
        "--position=rope",
        "--n_kv_head=1",
        "--window=SL",
        "--window_size=3",
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=16",
    ]
    done = run(*GRPO, "--beta=0", *flags, "--learning_rate=0.02", "--num_iterations=2", "--max_iters=6")
    errors = metric(done, "rollout_logp_error")
    assert max(errors[::2]) < 1e-5 and min(errors[1::2]) > 1e-3
    assert done.losses[0] == pytest.approx(0, abs=1e-6), (
        "a group's advantages add up to 0, and sequences weigh the same"
    )


def test_a_padded_vocabulary_is_the_same_to_rollout_and_training(run: Callable[..., RunFiles]):
    """64 rows for 13 tokens: the untrained model gives the padding four fifths of the probability."""
    flags = ["--beta=0", "--vocab_size=64", "--learning_rate=0", "--max_iters=2", "--adapter=none"]
    done = run(*GRPO, *flags)
    assert max(metric(done, "rollout_logp_error")) < 1e-5


def test_mask_truncated_leaves_unfinished_completions_out_of_the_loss(run, base: Path, monkeypatch: pytest.MonkeyPatch):
    """The loss mask holds the finished completions alone."""
    batches = []
    grpo = objectives.GRPO.__call__

    def spy(self, model, batch, *, with_metrics):
        batches.append(batch)
        return grpo(self, model, batch, with_metrics=with_metrics)

    monkeypatch.setattr(objectives.GRPO, "__call__", spy)
    flags = [*GRPO, f"--init_from={base}", "--max_new_tokens=2", "--max_iters=1", "--batch_size=32"]
    run(*flags, "--mask_truncated", name="masked")
    run(*flags, name="plain")
    masked, plain = batches
    assert torch.equal(masked.tokens, plain.tokens)
    ended = torch.tensor([EOS_ID in row for row in plain.tokens.tolist()])
    assert 0 < ended.sum() < 32
    masked_loss, plain_loss = masked.extras["loss_mask"], plain.extras["loss_mask"]
    assert not masked_loss[~ended].any() and torch.equal(masked_loss[ended], plain_loss[ended])
    assert plain_loss.any(1).all()
    assert masked.num_loss_tokens == masked_loss.sum() and plain.num_loss_tokens == plain_loss.sum()
    for row, loss_mask in zip(plain.tokens.tolist(), plain_loss.tolist(), strict=True):
        loss_ids = [token for token, in_loss in zip(row[1:], loss_mask, strict=True) if in_loss]
        assert loss_ids.count(EOS_ID) == (EOS_ID in row) and len(loss_ids) <= 2, (
            "the first end-of-sequence token counts in the loss, nothing after it, and no prompt"
        )


def test_metrics_of_a_rollout(run, base: Path, monkeypatch: pytest.MonkeyPatch):
    """From the completions themselves, as they are scored."""
    scored = []
    score = rollouts.Scorer.score

    def spy(self, prompts, completions):
        rewards, metrics = score(self, prompts, completions)
        if len(completions) == 4 * len(prompts):  # an evaluation has one of each prompt
            scored.append((rewards, completions))
        return rewards, metrics

    monkeypatch.setattr(rollouts.Scorer, "score", spy)
    line = run(*GRPO, f"--init_from={base}", "--max_iters=1", "--batch_size=32", "--eval_interval=9").train[0]
    ((rewards, completions),) = scored
    groups = rewards.numpy().reshape(8, 4)
    lengths = np.array([len(completion.ids) for completion in completions])
    ended = np.array([completion.ended for completion in completions])
    expected = {
        "reward": groups.mean(),
        "reward_std": groups.std(1, ddof=1).mean(),
        "frac_reward_zero_std": (groups.std(1) == 0).mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": (~ended).mean(),
        "completions/mean_terminated_length": lengths[ended].mean(),
    }
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_logs_the_reward_of_greedy_completions(run, base: Path, data_dir: Path):
    """Of all 20 validation prompts, in batches of 8: the mean over all, not that of the last batch."""
    flags = ["--reward=correct", "--eval_iters=9", "--max_iters=0", "--eval_samples=20"]
    (line,) = run(*GRPO, f"--init_from={base}", *flags).evals
    answers = [json.loads(row)["answer"] for row in (data_dir / "sums/val.jsonl").read_text().splitlines()]
    accuracy = np.mean(
        [sample["completion"] == answer for sample, answer in zip(line["samples"], answers, strict=True)]
    )
    assert line["val_reward"] == pytest.approx(accuracy) == pytest.approx(-line["val_loss"])


def test_prompts_that_leave_no_room_are_refused_or_dropped(run, base: Path):
    with pytest.raises(UserError, match="less the 4 of a completion"):
        run(*GRPO, f"--init_from={base}", "--max_new_tokens=4", "--block_size=8")
    done = run(*GRPO, f"--init_from={base}", "--max_new_tokens=4", "--overflow=drop", "--max_iters=1", name="dropped")
    assert "--overflow=drop dropped" in done.console


def test_reinforcement_learns(run):
    """From scratch: completions learn to end at once, since the length reward of the end alone is 2/3."""
    flags = ["--beta=0", "--learning_rate=0.02", "--batch_size=32", "--max_iters=30", "--eval_interval=30"]
    done = run(*GRPO, *flags, "--temperature=1")
    assert done.train[0]["reward"] < 0.4 and done.train[-1]["reward"] > 0.6


@pytest.mark.slow
def test_the_kl_coefficient_may_change_where_the_reference_is_known(run: Callable[..., RunFiles], base: Path):
    """A run that began with a KL term keeps its base through a part without it; one that did not says so."""
    flags = [*GRPO, f"--init_from={base}", "--learning_rate=0.01"]
    run(*flags, "--beta=0.1", "--max_iters=2")
    for beta, max_iters in (("0", 4), ("0.1", 6)):
        done = run("--init_from=resume", f"--beta={beta}", f"--max_iters={max_iters}")
    assert metric(done, "kl")[3] == 0 < metric(done, "kl")[5]
    run(*flags, "--beta=0", "--max_iters=2", name="free")
    with pytest.raises(UserError, match=r"--beta=0\.1 \(before: 0\): needs a reference model"):
        run("--init_from=resume", "--beta=0.1", "--max_iters=4", name="free")


FALTERING = """
calls, limit = 0, {limit}
def reward(completion, problem, n_tokens, max_tokens, ended):
    global calls
    calls += 1
    if calls == limit:
        raise RuntimeError("no more credit")
    return ended / n_tokens
"""


@pytest.mark.slow
def test_a_reward_that_fails_in_the_middle_costs_nothing(
    run: Callable[..., RunFiles], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run is saved; continued with the mended function, it is the one that never stopped."""
    for name, limit in (("steady", 0), ("faltering", 8 * 6 + 3)):  # in the fourth step, after two evaluations of 8
        (tmp_path / f"{name}.py").write_text(FALTERING.format(limit=limit))
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = [*GRPO, f"--init_from={base}", "--learning_rate=0.01", "--max_iters=6", "--eval_interval=6"]
    straight = run(*flags, "--reward=steady:reward", name="straight")
    with pytest.raises(RewardError, match=r"faltering:reward raised RuntimeError: no more credit .* the row is"):
        run(*flags, "--reward=faltering:reward", name="stopped")
    stopped = read_run(tmp_path / "stopped")
    (saved,) = stopped.steps
    assert 0 < saved < 6
    resumed = run("--init_from=resume", "--reward=steady:reward", name="stopped")
    assert equal_tensors(resumed.last.weights, straight.last.weights)
    assert equal_tensors(resumed.last.optimizer, straight.last.optimizer)


FAILS_ON_RANK_1 = """
import os
def reward(completion, problem, n_tokens, max_tokens, ended):
    if os.environ["RANK"] == "1":
        raise RuntimeError("only here")
    return 0.5
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_reward_that_fails_on_one_rank_ends_all(base: Path, data_dir: Path, tmp_path: Path):
    """None waits for the one that failed, and all know why."""
    (tmp_path / "one_rank.py").write_text(FAILS_ON_RANK_1)
    flags = [*TINY_WITHOUT_SHAPE, *GRPO, f"--init_from={base}", f"--data_dir={data_dir}", "--block_size=16"]
    flags += ["--reward=one_rank:reward", f"--out_dir={tmp_path / 'run'}"]
    log = tmp_path / "log"
    processes = start_ranks(flags, 2, log, functools.partial(site.addsitedir, str(tmp_path)))
    assert [wait_for_exit(process) for process in processes] == [2, 2]
    assert log.read_text().count("--reward: one_rank:reward raised RuntimeError: only here") == 1  # as one error


@pytest.mark.parametrize("reward, has_note", [("format", True), ("length", False)])
def test_rewards_that_teach_nothing_are_noted_once(
    run: Callable[..., RunFiles], base: Path, reward: str, has_note: object
):
    """No sum has tags: all rewards are 0, so that loss and KL would be 0 for ever."""
    done = run(*GRPO, f"--init_from={base}", f"--reward={reward}", "--max_iters=6", "--eval_interval=6")
    lines = map(json.loads, (done.out_dir / "metrics.jsonl").read_text().splitlines())
    notes = [line for line in lines if line["event"] == "note" and "rollouts in a row" in line["text"]]
    assert [note["step"] for note in notes] == ([2] if has_note else [])
    if has_note:
        assert "<reasoning>..</reasoning><answer>..</answer>" in notes[0]["text"] and "reward 0" in notes[0]["text"]
