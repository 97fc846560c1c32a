"""Rollouts: answers of the batched cache are those of one prompt at a time without it, sampled log-probabilities are the model's, and a step of GRPO is a
pure function of the arguments, the weights and the step."""

import json

import numpy as np
import pytest
import torch
from helpers import equal_tensors, ids, metric, tiny_model

import train_args
from model import GPT
from nanoforge.data.tokenization import CharTokenizer
from nanoforge.distributed import Ranks
from nanoforge.errors import UserError
from nanoforge.models.generation import Completion, SamplingParams, generate, generate_batch, logits_to_probs
from nanoforge.posttraining import objectives, rollouts
from nanoforge.posttraining.examples import ExampleEncoder, Examples
from nanoforge.posttraining.rewards import Sample, correct_reward, length_reward, parse_rewards
from nanoforge.posttraining.rollouts import Answers, samples
from nanoforge.rng import uniform

VARIANTS = [
    {}, {"position": "rope", "n_kv_head": 2}, {"position": "rope", "window": "SL", "window_size": 3}, {"position": "none", "qk_norm": True},
    {"window": "S", "window_size": 5, "value_residual": True, "logit_softcap": 5.0, "embedding_norm": True, "residual_scalars": True},
]  # fmt: skip
LENGTHS = [3, 1, 7, 4, 12, 2]
PROMPTS = [ids(n, seed=n).tolist() for n in LENGTHS]


def alone(model: GPT, prompt: list[int], n: int, end: int | None, known: int) -> tuple[list[int], bool]:
    """The likeliest answer, without a cache, one token after the other."""
    greedy = SamplingParams(max_new_tokens=n, temperature=0.0, vocab_size=known)
    out = generate(model, torch.tensor([prompt]), greedy, torch.Generator(), decode="uncached")[
        0, len(prompt) :
    ].tolist()
    return (out[: out.index(end) + 1], True) if end in out else (out, False)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("repeats", [1, 3])
def test_likeliest_answers_are_those_of_one_prompt_at_a_time(variant, repeats):
    """Prompts of 1 to 12 tokens; each end token in turn, so that rows leave the cache at other times."""
    model = tiny_model(block_size=40, **variant).eval()
    frequent = {new for prompt in PROMPTS for new in alone(model, prompt, 25, None, 31)[0]}
    lengths = set()
    for end in [None, *sorted(frequent)[:6]]:
        answers = complete(model, PROMPTS, 25, end, temperature=0.0, n=repeats)
        expected = [alone(model, prompt, 25, end, 31) for prompt in PROMPTS for _ in range(repeats)]
        assert [(answer.ids, answer.ended) for answer in answers] == expected
        lengths |= {len(answer.ids) for answer in answers}
    assert len(lengths) > 3, "rows that end at different times"


def complete(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, eos_id: int | None = None, uniform=None, **sampling
) -> list[Completion]:
    """Completions of `generate_batch` from a vocabulary of 31 tokens."""
    sampling = {"vocab_size": 31} | sampling
    return generate_batch(
        model, prompts, SamplingParams(max_new_tokens=max_new_tokens, eos_id=eos_id, **sampling), uniform
    )


def plain_logps(model: GPT, prompt: list[int], answer: list[int], temperature: float, known: int) -> torch.Tensor:
    """log_softmax of a forward over the whole sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1, :known] / temperature
    return logits.log_softmax(-1)[torch.arange(len(answer)), answer]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampled_log_probabilities_are_those_of_a_plain_forward(variant, temperature):
    """Also of those that were drawn from fewer ids: what the model would give is told, not what was left by top_k."""
    model = tiny_model(block_size=40, **variant).eval()
    lengths = set()
    for filters in ({}, {"top_k": 4}, {"top_p": 0.7}):
        answers = complete(
            model,
            PROMPTS,
            20,
            5,
            temperature=temperature,
            n=4,
            uniform=lambda number, token: uniform(3, number, token),
            **filters,
        )
        lengths |= {len(answer.ids) for answer in answers}
        for answer, prompt in zip(answers, [prompt for prompt in PROMPTS for _ in range(4)], strict=True):
            torch.testing.assert_close(
                torch.tensor(answer.logps),
                plain_logps(model, prompt, answer.ids, temperature, 31),
                atol=1e-4,
                rtol=1e-4,
            )
    assert len(lengths) > 1, "rows that end at different times"


def test_draws_are_those_of_one_prompt_at_a_time():
    """The same numbers decide, so the batch in which a prompt is answered does not matter, nor what filters keep."""
    model = tiny_model(block_size=40, position="rope").eval()
    for filters in ({}, {"top_k": 5}, {"top_p": 0.8}):
        whole = complete(
            model,
            PROMPTS,
            20,
            5,
            n=2,
            uniform=lambda number, token: uniform(3, number, token),
            **filters,
        )
        for i, prompt in enumerate(PROMPTS):
            (one, other) = complete(
                model,
                [prompt],
                20,
                5,
                n=2,
                uniform=lambda number, token, i=i: uniform(3, number + 2 * i, token),
                **filters,
            )
            assert (one.ids, other.ids) == (whole[2 * i].ids, whole[2 * i + 1].ids) and one.ids != other.ids
        some = complete(
            model,
            PROMPTS[2:4],
            20,
            5,
            n=2,
            uniform=lambda number, token: uniform(3, number + 4, token),
            **filters,
        )
        assert [answer.ids for answer in some] == [answer.ids for answer in whole[4:8]]


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 2.0}])
def test_first_tokens_follow_the_distribution(filters):
    """Of 4,000 answers to a prompt, against `logits_to_probs`, which test_generation.py holds to its definition."""
    model, settings = tiny_model().eval(), {"temperature": 1.0} | filters
    answers = complete(model, [PROMPTS[0]], 1, n=4000, **settings)
    seen = torch.bincount(torch.tensor([answer.ids[0] for answer in answers]), minlength=31) / 4000
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]]))[:, -1]
        expected = logits_to_probs(logits, SamplingParams(max_new_tokens=1, **settings))[0]
    torch.testing.assert_close(seen, expected, atol=0.04, rtol=0)
    assert (seen[expected == 0] == 0).all()


def test_the_end_token_ends_an_answer_and_is_its_last():
    """A model that says the end token as its third."""
    model = tiny_model(block_size=40).eval()
    first = alone(model, PROMPTS[0], 10, None, 31)[0]
    end = first[2]
    (answer,) = complete(model, [PROMPTS[0]], 10, end, temperature=0.0)
    stop = first.index(end) + 1
    assert answer.ids == first[:stop] and answer.ended and len(answer.logps) == stop
    (cut_off,) = complete(model, [PROMPTS[0]], stop - 1, end, temperature=0.0)
    assert cut_off.ids == first[: stop - 1] and not cut_off.ended
    (last,) = complete(model, [PROMPTS[0]], stop, end, temperature=0.0)
    assert last.ended, "with its very last token"


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_answers_stop_where_the_block_is_full(position):
    """A sequence has block_size tokens at most; those of shorter prompts go on."""
    model = tiny_model(block_size=16, position=position).eval()
    answers = complete(model, PROMPTS, 50, temperature=0.0)
    assert [len(answer.ids) for answer in answers] == [16 - n for n in LENGTHS]
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        assert answer.ids == alone(model, prompt, 16 - len(prompt), None, 31)[0] and not answer.ended
    full = ids(16, seed=3).tolist()
    nothing, some = complete(model, [full, PROMPTS[0]], 50, temperature=0.0)
    assert nothing.ids == [] and some.ids == answers[0].ids


def test_ids_that_are_padding_are_never_drawn():
    """The ids that are known share all of the probability, as if there were no others."""
    model = tiny_model(block_size=40).eval()
    answers = complete(model, [PROMPTS[0]], 2, vocab_size=5, temperature=1.5, n=4000)
    seen = torch.bincount(torch.tensor([answer.ids[0] for answer in answers]), minlength=5) / 4000
    with torch.no_grad():
        expected = (model(torch.tensor([PROMPTS[0]]))[0, -1, :5] / 1.5).softmax(-1)
    torch.testing.assert_close(seen, expected, atol=0.04, rtol=0)
    for answer in answers[:20]:
        torch.testing.assert_close(
            torch.tensor(answer.logps), plain_logps(model, PROMPTS[0], answer.ids, 1.5, 5), atol=1e-4, rtol=1e-4
        )
    (greedy,) = complete(model, [PROMPTS[0]], 20, vocab_size=5, temperature=0.0)
    assert greedy.ids == alone(model, PROMPTS[0], 20, None, 5)[0] != alone(model, PROMPTS[0], 20, None, 31)[0]


# ---------------------------------------------------------------------------------------------------------------------
# answers as texts and rewards

DIGITS = CharTokenizer("0123456789+=", has_eos=True)


def made_of(words: list[str], objective: str = "grpo") -> Examples:
    return Examples(
        "x",
        [{"prompt": word, "answer": "1"} for word in words],
        objective,
        ExampleEncoder(DIGITS, 16, room=4),
        0,
        0,
        "x",
    )


def test_the_end_token_is_no_part_of_an_answers_text():
    assert [rollouts.text_of(Completion([1, 10, *end], [0.0] * 3, bool(end)), DIGITS) for end in ([12], [])] == [
        "1+",
        "1+",
    ]


def test_rewards_are_the_tasks_own_of_the_decoded_answers():
    """The end token is not a part of the text, and counts as one of the tokens."""
    model = tiny_model(vocab_sizes=(13,), block_size=16).eval()
    data, rewards = made_of(["1+1=", "23+4=", "5+="]), parse_rewards("correct:2,length:1")
    answers = Answers(model, Ranks(0, 1, torch.device("cpu")), rewards, 5, 4, temperature=2.0)
    drawn = answers.draw(data.items, DIGITS, 5, 2.0, (1, 2), 0)
    totals, told = answers.rewarded(data.items, drawn, DIGITS)
    assert len({answer.ended for answer in drawn}) == 2
    for total, answer, item in zip(totals, drawn, [item for item in data.items for _ in range(5)], strict=True):
        words = DIGITS.decode(answer.ids).replace("<|endoftext|>", "")
        sample = Sample(words, item.row, len(answer.ids), 4, answer.ended)
        expected = 2 * correct_reward(sample) + length_reward(sample)
        assert total == pytest.approx(expected)
    assert float(told["rewards/correct"][1]) == 15 and float(told["rewards/length"][0]) == pytest.approx(
        sum(length_reward(Sample("", {}, len(a.ids), 4, a.ended)) for a in drawn)
    )
    assert model.training is False
    model.train()
    answers.draw(data.items, DIGITS, 1, 0.0)
    assert model.training, "as it was"


def test_samples_are_the_likeliest_answers_to_the_first_prompts():
    model = tiny_model(vocab_sizes=(13,), block_size=16).eval()
    data = made_of(["1+1=", "23+4=", "5+="])
    answers = Answers(model, Ranks(0, 1, torch.device("cpu")), [], 1, 4)
    told = samples(answers, data, 2, 13)
    expected = [alone(model, DIGITS.encode(words).tolist(), 4, 12, 13)[0] for words in ("1+1=", "23+4=")]
    assert [sample["prompt"] for sample in told] == ["1+1=", "23+4="]
    assert [sample["completion"] for sample in told] == [
        DIGITS.decode([i for i in some if i != 12]) for some in expected
    ]


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


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize(
    "more",
    [
        [],
        [
            "--adapter=lora",
            "--lora_dropout=0.1",
            "--gradient_accumulation_steps=2",
            "--loss_type=dapo",
            "--batch_size=4",
        ],
    ],
    ids=["full", "lora"],
)
def test_resumed_in_the_middle_is_bit_identical(run, base, iterations, more):
    flags = [
        *GRPO,
        *more,
        f"--init_from={base}",
        f"--num_iterations={iterations}",
        "--learning_rate=0.01",
        "--max_iters=8",
        "--eval_interval=4",
        "--dropout=0.1",
    ]
    whole = run(*flags, name="whole")
    run(*flags, "--max_iters=4", name="parts")
    parts = run("--init_from=resume", "--max_iters=8", name="parts")
    assert [line["step"] for line in parts.train] == list(range(1, 9)) and metric(parts, "data_hash") == metric(
        whole, "data_hash"
    )
    assert parts.losses == whole.losses and metric(parts, "reward") == metric(whole, "reward")
    assert equal_tensors(parts.last.weights, whole.last.weights) and equal_tensors(
        parts.last.optimizer, whole.last.optimizer
    )
    assert [line["val_loss"] for line in parts.evals] == [line["val_loss"] for line in whole.evals]
    assert len(set(metric(whole, "data_hash"))) == 8 // iterations


def test_a_step_that_would_split_a_draw_is_refused(base, capsys, data_dir):
    for flag in ("--max_iters=3", "--eval_interval=3", "--checkpoint_interval=1"):
        with pytest.raises(SystemExit):
            train_args.parse(
                [
                    *GRPO,
                    f"--data_dir={data_dir}",
                    f"--init_from={base}",
                    "--block_size=16",
                    "--num_iterations=2",
                    "--max_iters=4",
                    "--eval_interval=2",
                    flag,
                ]
            )
        assert f"{flag}: must be a multiple of --num_iterations=2" in capsys.readouterr().err


def test_without_a_learning_rate_nothing_moves(run, base):
    """The control: weights bit for bit, ratios of 1, no divergence, and the reward of each draw as a model that stands still gives it."""
    done = run(
        *GRPO, f"--init_from={base}", "--learning_rate=0", "--weight_decay=0", "--num_iterations=2", "--max_iters=4"
    )
    start = run(*GRPO, f"--init_from={base}", "--max_iters=0", name="start")
    assert equal_tensors(done.last.weights, start.last.weights)
    assert max(metric(done, "rollout_logp_error")) < 1e-5 and max(map(abs, metric(done, "kl"))) < 1e-9
    assert metric(done, "clip_ratio/low") == metric(done, "clip_ratio/high") == [0.0] * 4
    assert done.train[0]["reward"] == done.train[1]["reward"] and len({line["val_loss"] for line in done.evals}) == 1


def test_ratios_are_1_in_the_first_iteration_and_not_in_the_next(run, base):
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
        "advantages of a group add up to 0, and each answer counts as much"
    )


def test_answers_that_did_not_end_teach_nothing_with_mask_truncated(run, base, tmp_path):
    """The loss is that of the ended answers alone, which the tokens' mask tells."""
    masks = []
    plain = objectives.GRPO.__call__

    def seen(self, model, batch, *, with_metrics):
        masks.append((batch.tokens.clone(), batch.extras["loss_mask"].clone(), batch.num_loss_tokens))
        return plain(self, model, batch, with_metrics=with_metrics)

    objectives.GRPO.__call__ = seen
    try:
        run(
            *GRPO,
            f"--init_from={base}",
            "--mask_truncated",
            "--max_new_tokens=2",
            "--max_iters=1",
            "--batch_size=32",
            name="masked",
        )
        run(*GRPO, f"--init_from={base}", "--max_new_tokens=2", "--max_iters=1", "--batch_size=32", name="plain")
    finally:
        objectives.GRPO.__call__ = plain
    (tokens, masked, learned), (same, every, learned_of_all) = masks
    assert torch.equal(tokens, same)
    ended = torch.tensor([12 in row for row in tokens.tolist()])
    assert 0 < ended.sum() < 32
    assert not masked[~ended].any() and torch.equal(masked[ended], every[ended]) and every.any(1).all()
    assert learned == masked.sum() and learned_of_all == every.sum()
    for row, mask in zip(tokens.tolist(), every.tolist(), strict=True):
        learned_ids = [token for token, on in zip(row[1:], mask, strict=True) if on]
        assert learned_ids.count(12) == (12 in row) and len(learned_ids) <= 2, (
            "the first end token learns, nothing behind it, and no prompt"
        )


def test_what_is_told_of_a_draw(run, base):
    """From the answers themselves, seen where they are rewarded."""
    seen = []
    plain = rollouts.Answers.rewarded

    def spy(self, items, answers, tokenizer):
        totals, told = plain(self, items, answers, tokenizer)
        seen.append((len(items), totals, answers))
        return totals, told

    rollouts.Answers.rewarded = spy
    try:
        line = run(*GRPO, f"--init_from={base}", "--max_iters=1", "--batch_size=32", "--eval_interval=9").train[0]
    finally:
        rollouts.Answers.rewarded = plain
    totals, answers = next(
        (totals, answers) for prompts, totals, answers in seen if prompts == 8 and len(answers) == 32
    )
    groups, lengths = np.array(totals).reshape(8, 4), np.array([len(answer.ids) for answer in answers])
    expected = {
        "reward": groups.mean(), "reward_std": groups.std(1, ddof=1).mean(), "frac_reward_zero_std": (groups.std(1) == 0).mean(), "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(), "completions/max_length": lengths.max(), "completions/clipped_ratio": np.mean([not answer.ended for answer in answers]),
        "completions/mean_terminated_length": np.mean([len(answer.ids) for answer in answers if answer.ended]),
    }  # fmt: skip
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_evaluation_tells_the_reward_of_the_likeliest_answers(run, base, data_dir):
    """All 20 validation prompts, in batches of 8: not the last one's mean but all."""
    done = run(*GRPO, f"--init_from={base}", "--reward=correct", "--eval_iters=9", "--max_iters=0", "--eval_samples=20")
    (line,) = done.evals
    rows = [json.loads(words) for words in (data_dir / "sums/val.jsonl").read_text().splitlines()]
    right = np.mean([sample["completion"] == row["answer"] for sample, row in zip(line["samples"], rows, strict=True)])
    assert line["val_reward"] == pytest.approx(right) == pytest.approx(-line["val_loss"])


def test_prompts_that_leave_no_room_are_told(run, base):
    with pytest.raises(UserError, match="less the 4 of a completion"):
        run(*GRPO, f"--init_from={base}", "--max_new_tokens=4", "--block_size=8")
    done = run(*GRPO, f"--init_from={base}", "--max_new_tokens=4", "--overflow=drop", "--max_iters=1", name="dropped")
    assert "are left out, as --overflow says" in done.console


def test_reinforcement_learns(run):
    """From nothing: answers of one token become the rule."""
    done = run(
        *GRPO,
        "--beta=0",
        "--learning_rate=0.02",
        "--batch_size=32",
        "--max_iters=30",
        "--eval_interval=30",
        "--temperature=1",
    )
    assert done.train[0]["reward"] < 0.4 and done.train[-1]["reward"] > 0.6, "length pays 2/3 for the end token alone"
