"""Log-likelihoods of continuations against a model that reads every sequence by itself."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from nanoforge.data.tokenization import ByteTokenizer, CharTokenizer
from nanoforge.errors import UserError
from nanoforge.models import likelihood
from nanoforge.models.likelihood import Pair, encode_pair, score_continuations
from train_args import TrainArgs

BLOCK_SIZE = 24


def make_model(**fields: object) -> GPT:
    torch.manual_seed(0)
    args = TrainArgs(n_layer=2, n_head=2, n_embd=16, block_size=BLOCK_SIZE)
    model = GPT(GPTConfig.from_args(args, vocab_sizes=(40,), **fields)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_pairs() -> list[Pair]:
    """Questions of 1 to 30 tokens behind one beginning, each with four answers, and three of one token."""
    rng = random.Random(0)

    def draw(length: int) -> list[int]:
        return [rng.randrange(40) for _ in range(length)]

    beginning = draw(8)
    pairs = []
    for length in (1, 3, 9, 14, 15, 30):
        question = beginning + draw(length)
        pairs += [Pair(question, draw(n)) for n in (1, 2, 5, 7)] + [Pair(question, draw(1)) for _ in range(3)]
    rng.shuffle(pairs)
    return pairs


@torch.no_grad()
def score_alone(model: GPT, pair: Pair) -> tuple[float, bool]:
    """Of one sequence, whose end fits the context."""
    ids = torch.tensor([*pair.context, *pair.continuation])[-BLOCK_SIZE - 1 :]
    targets = ids[-len(pair.continuation) :]
    logits = model(ids[None, :-1])[0, -len(targets) :]
    return -F.cross_entropy(logits, targets, reduction="sum").item(), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("fields", [{}, {"position": "rope", "window": "SL", "window_size": 5, "value_residual": True}])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_scores_are_those_of_each_sequence_alone(fields: dict, batch_size: int):
    model, pairs = make_model(**fields), make_pairs()
    with torch.no_grad():
        pairs += [
            Pair(pair.context, [int(model(torch.tensor([pair.context[-24:]]))[0, -1].argmax())]) for pair in pairs
        ]
    done: list[int] = []
    scores = score_continuations(model, pairs, batch_size, on_scored=done.append)
    expected = [score_alone(model, pair) for pair in pairs]
    assert [score.logp for score in scores] == pytest.approx([logp for logp, _ in expected], abs=1e-4)
    assert [score.is_greedy for score in scores] == [is_greedy for _, is_greedy in expected]
    assert 42 <= sum(score.is_greedy for score in scores) < len(pairs) == sum(done)


def test_small_probabilities_of_a_large_vocabulary_add_up(monkeypatch: pytest.MonkeyPatch):
    """On a CPU torch's float32 log_softmax loses those beside a large one: on SmolLM2 2e-5 of each token, which
    lm-eval's `hf` loses unless its softmax_dtype is float64."""
    size = 49_152
    logits = torch.zeros(3, size)
    logits[:, 8] = 17.0
    monkeypatch.setattr(likelihood, "read_rows", lambda model, rows: logits)
    row = likelihood.Row(ids=(0, 8, 8), numbers=[0], n_targets=3)
    expected = -3 * math.log1p((size - 1) * math.exp(-17))  # -6.1e-3
    assert likelihood.score_rows(make_model(), [row], {0: [8, 8, 8]})[0].logp == pytest.approx(expected, abs=1e-5)


def test_what_sequences_have_in_common_is_read_once():
    """A question of 20 tokens, three answers of 3 and four of one: 19 tokens once, then 4 rows of the rest."""
    model = make_model()
    shapes = []
    model.wte.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    pairs = [Pair(range(20), [i, i + 1, i + 2]) for i in range(3)] + [Pair(range(20), [30 + i]) for i in range(4)]
    score_continuations(model, pairs, batch_size=64)
    assert shapes == [(1, 19), (4, 3)]
    shapes.clear()
    pairs = [Pair([*range(15), *tail], [i]) for tail in ([20], [21, 22, 23]) for i in (3, 4)]
    score_continuations(model, [*pairs, Pair([*range(15), 20], [3, 4, 5])], batch_size=64)
    assert shapes == [(1, 15), (2, 2), (3, 3)], "what both begin with, the rest of each question, the answers"


def test_a_batch_has_no_more_logits_than_fit(monkeypatch: pytest.MonkeyPatch):
    model, pairs = make_model(), make_pairs()
    expected = score_continuations(model, pairs, batch_size=64)
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 9 * 40)
    n_logits = []
    model.head.register_forward_hook(lambda module, inputs, output: n_logits.append(len(output)))
    assert [score.logp for score in score_continuations(model, pairs, 64)] == pytest.approx([s.logp for s in expected])
    assert 5 < max(n_logits) <= 9


def test_a_pair_is_encoded_as_one_text():
    """Spaces at the end of a context join the continuation; an empty context is the end-of-sequence token."""
    tokenizer = ByteTokenizer()
    assert encode_pair(tokenizer, "ab \n", "c") == Pair([*b"ab"], [*b" \nc"])
    assert encode_pair(tokenizer, "", "c") == Pair([256], [*b"c"])
    assert encode_pair(tokenizer, " ", "c") == Pair([256], [*b" c"])
    tokenizer.bos_id = 7
    assert encode_pair(tokenizer, "ab ", "c") == Pair([7, *b"ab"], [*b" c"])
    assert encode_pair(tokenizer, "", "c") == Pair([7], [*b"c"])
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode_pair(CharTokenizer("abc"), "", "c")


def test_a_continuation_that_is_empty_or_too_long_is_refused():
    for length in (0, BLOCK_SIZE + 1):
        with pytest.raises(UserError, match=f"{length} tokens"):
            score_continuations(make_model(), [Pair([1], [2] * length)], batch_size=4)
