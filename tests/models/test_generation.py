"""Generation: cached equals uncached, a batch equals its prompts alone, and filters keep what their definitions say."""

from pathlib import Path

import pytest
import torch
from helpers import draw_uncached, ids, tiny_model

from model import GPT, GPTConfig
from nanoforge.models import adapters
from nanoforge.models.generation import (
    Decoder,
    KVCache,
    SamplingParams,
    generate_batch,
    inverse_cdf,
    logits_to_probs,
    sample,
    uniform_draws,
)


def draw(model, idx, n, seed=0, on_token=None, **sampling):
    """idx, (B, T) or (B, K, T), and n tokens more."""
    params = SamplingParams(max_new_tokens=n, **sampling)
    completions = generate_batch(model.eval(), idx.numpy(), params, uniform_draws(seed), on_token=on_token)
    new = torch.tensor([completion.ids for completion in completions])
    return torch.cat((idx, new if idx.dim() == 2 else new.transpose(1, 2)), dim=-1)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"position": "rope", "n_kv_head": 2},
        {"position": "rope", "window": "SL", "window_size": 3},
        {"position": "none", "qk_norm": True},
    ],
)
@pytest.mark.parametrize("prompt", [1, 5, 12, 20])
def test_cached_equals_uncached(variant, prompt):
    """Inside the block and far beyond it, greedy and drawn."""
    model = tiny_model(**variant)
    for temperature in (0.0, 1.0):
        cached = draw(model, ids(3, prompt), 40, temperature=temperature)
        assert torch.equal(cached, draw_uncached(model, ids(3, prompt), 40, temperature=temperature))
        assert cached.shape == (3, prompt + 40)


def test_caches_hold_what_is_read_not_the_whole_context(monkeypatch: pytest.MonkeyPatch):
    """A context of 8,192 or 131,072 tokens costs nothing until it is read."""
    sizes = []
    allocate = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *args: (sizes.append(args[-1]), allocate(self, *args))[1])
    model = tiny_model(block_size=4096, position="rope")
    draw(model, ids(2, 5), 7)
    generate_batch(model, [[1, 2, 3], [4]], SamplingParams(max_new_tokens=6))
    assert sizes == [12, 9]  # of the longest text
    draw(tiny_model(block_size=8, position="rope"), ids(2, 5), 7)
    assert sizes[2] == 8


def test_cached_logits_equal_uncached_logits():
    model = tiny_model(position="rope", n_kv_head=2, window="SL", window_size=5).eval()
    idx = ids(2, 12)
    cache = KVCache(model, batch_size=2, size=12)
    rows = []
    for part in idx.split([4, 1, 4, 3], dim=1):  # prefill, a token, chunks
        rows.append(model(part, cache=cache, position_ids=cache.advance(part.size(1))))
    torch.testing.assert_close(torch.cat(rows, 1), model(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_greedy_equals_transformers(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    from nanoforge.models import pretrained

    torch.manual_seed(3)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=31, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=None
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    loaded = pretrained.load(str(tmp_path))
    ours = GPT(GPTConfig(**loaded.shape))
    ours.load_weights(loaded.weights, "")
    reference = theirs.generate(ids(2, 4), max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert torch.equal(draw(ours, ids(2, 4), 40, temperature=0.0), reference)


def frequencies(logits, n=20000, **filters):
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits.expand(n, -1), u, SamplingParams(max_new_tokens=1, **filters))
    return torch.bincount(drawn, minlength=logits.numel()) / n


def test_draws_follow_the_tempered_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        torch.testing.assert_close(
            frequencies(logits, temperature=temperature), (logits / temperature).softmax(-1), atol=0.012, rtol=0
        )


def test_filters_keep_what_their_definition_says():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]]  # in another order
    kept = lambda **filters: (frequencies(logits, **filters) > 0).tolist()  # noqa: E731
    assert kept(top_k=2) == [False, True, False, True]
    assert kept(top_p=0.5) == [False, True, False, False]
    assert kept(top_p=0.51) == [False, True, False, True]
    assert kept(top_p=0.81) == [True, True, False, True]
    assert kept(min_p=0.25) == [True, True, False, True]
    assert kept(min_p=0.7) == [False, True, False, False]
    torch.testing.assert_close(frequencies(logits, top_k=2)[[1, 3]], torch.tensor([0.625, 0.375]), atol=0.012, rtol=0)


def test_an_id_of_probability_zero_is_never_drawn():
    """At both ends of [0, 1), where the largest float64 is 1 in float32: the ids with a probability are 1 and 2."""
    probs = logits_to_probs(torch.tensor([[0.0, 3.0, 3.0, 0.0, 1.0]]), SamplingParams(max_new_tokens=1, top_k=2))
    u = torch.tensor([0.0, 0.4999, 0.5001, 1 - 2**-53], dtype=torch.float64).float()
    assert u[-1] == 1
    for scale in (1.0, 1 + 2**-23, 0.37):  # the probs need not sum to 1
        assert inverse_cdf(scale * probs.expand(4, -1), u).tolist() == [1, 1, 2, 2]
    greedy = logits_to_probs(ids(64, 50).float(), SamplingParams(max_new_tokens=1, top_k=1))
    assert (greedy.gather(1, inverse_cdf(greedy, torch.ones(64))[:, None]) > 0).all()


def test_temperature_zero_is_greedy_and_seeds_matter():
    model = tiny_model()
    assert torch.equal(
        draw(model, ids(2, 3), 20, seed=1, temperature=0.0), draw(model, ids(2, 3), 20, seed=2, temperature=0.0)
    )
    assert torch.equal(draw(model, ids(2, 3), 20, seed=1), draw(model, ids(2, 3), 20, seed=1))
    assert not torch.equal(draw(model, ids(2, 3), 20, seed=1), draw(model, ids(2, 3), 20, seed=2))


def test_padding_rows_are_never_drawn():
    model = tiny_model()
    assert draw(model, ids(4, 3, high=5), 200, vocab_size=5, temperature=5.0).max() < 5


def test_contexts_go_on_together_in_their_own_rows():
    model = tiny_model(vocab_sizes=(31, 7), vocabulary="contexts")
    idx = torch.stack((ids(2, 4), 31 + ids(2, 4, high=7)), 1)
    out = draw(model, idx, 30, temperature=3.0)
    assert (
        out.shape == (2, 2, 34)
        and out[:, 0].max() < 31 <= out[:, 1].min()
        and torch.equal(out, draw_uncached(model, idx, 30, temperature=3.0))
    )


def test_a_dataset_with_its_own_vocabulary_stays_in_it():
    model = tiny_model(vocab_sizes=(31, 7), vocabulary="separate")
    assert (
        draw(model, ids(2, 4), 50, temperature=5.0).max()
        < 31
        <= draw(model, 31 + ids(2, 4, high=7), 50, temperature=5.0).min()
    )


def test_every_token_is_streamed_as_it_is_drawn():
    streamed = []
    out = draw(tiny_model(), ids(2, 4), 20, on_token=streamed.append)
    assert streamed == out[0, 4:].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# prompts of different lengths in one batch

RAGGED = [
    {},
    {"position": "rope", "n_kv_head": 2},
    {"position": "rope", "window": "SL", "window_size": 3, "value_residual": True},
    {"position": "none", "qk_norm": True},
]
LENGTHS = [3, 1, 7, 12, 4]


@pytest.mark.parametrize("variant", RAGGED, ids=str)
@torch.no_grad()
def test_rows_at_their_own_positions_equal_unpadded_decoding(variant):
    """Prompts padded on the right, then three tokens of each row at its own position: the logits of a plain forward."""
    model = tiny_model(block_size=20, **variant).eval()
    rows = [ids(length + 3, seed=length) for length in LENGTHS]  # three tokens more than the prompt
    padded = torch.nn.utils.rnn.pad_sequence([row[:-3] for row in rows], batch_first=True)
    cache = KVCache(model, batch_size=len(rows), size=20)
    model(padded, cache=cache, position_ids=cache.advance(padded.size(1)))
    for step in range(3):
        tokens = torch.stack([row[length + step] for row, length in zip(rows, LENGTHS, strict=True)])
        cache.advance(1)
        position_ids = torch.tensor(LENGTHS)[:, None] + step
        logits = model(tokens[:, None], cache=cache, position_ids=position_ids)[:, -1]
        for row, length, row_logits in zip(rows, LENGTHS, logits, strict=True):
            expected = model(row[None, : length + step + 1])[0, -1]
            torch.testing.assert_close(row_logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", RAGGED, ids=str)
@torch.no_grad()
def test_a_batch_draws_what_each_prompt_draws_alone(variant):
    """Greedy, while rows retire: each completion is that of its prompt alone, up to its end-of-sequence token."""
    model = tiny_model(block_size=40, **variant).eval()
    prompts = [ids(length, seed=length) for length in LENGTHS]
    alone = [draw(model, prompt[None], 20, temperature=0.0)[0, len(prompt) :].tolist() for prompt in prompts]
    eos_id = alone[0][2]  # ends the first completion at its third token at the latest
    sampling = SamplingParams(max_new_tokens=20, temperature=0.0, n=2, end_ids=(eos_id,))
    decoder = Decoder(model, prompts, sampling, uniform_draws(0))
    decoder.prefill()
    decoder.look()
    num_rows = [len(decoder.completion_of_row)]
    while decoder.num_drawn < 20 and decoder.any_active:
        decoder.retire()
        decoder.decode(1)
        decoder.look()
        num_rows.append(len(decoder.completion_of_row))
    assert num_rows[0] == 2 * len(prompts)
    assert num_rows == sorted(num_rows, reverse=True)
    for i, completion in enumerate(decoder.completions()):
        expected = alone[i // 2]
        if eos_id in expected:
            expected = expected[: expected.index(eos_id) + 1]
        assert completion.ids == expected
        assert completion.ended == (eos_id in expected)


@pytest.mark.parametrize("variant", RAGGED, ids=str)
@torch.no_grad()
def test_a_batch_past_the_context_equals_reading_each_text_again(variant: dict) -> None:
    """Prompts inside, at and beyond the context; sequences slide at their own times, some after others have retired."""
    model = tiny_model(block_size=12, **variant).eval()
    prompts = [ids(length, seed=length) for length in (3, 11, 12, 13, 30)]
    alone = [draw_uncached(model, prompt[None], 40, temperature=0.0)[0, len(prompt) :].tolist() for prompt in prompts]
    eos_ids = [i for i in range(31) if 0 < sum(i in text for text in alone) < len(alone)]
    for eos_id, any_rank in ((None, bool), (eos_ids[0], bool), (eos_ids[0], lambda _: True)):
        options = SamplingParams(max_new_tokens=40, temperature=0.0, n=2, end_ids=() if eos_id is None else (eos_id,))
        completions = generate_batch(model, [prompt.tolist() for prompt in prompts], options, any_rank=any_rank)
        for completion, text in zip(completions, [text for text in alone for _ in range(2)], strict=True):
            assert completion.ended == (eos_id in text)
            assert completion.ids == (text[: text.index(eos_id) + 1] if completion.ended else text)


def test_past_the_context_the_virtual_tokens_stay() -> None:
    """Token by token, as the model reads the soft prompt and the second half of the rest without a cache."""
    model = tiny_model(block_size=12).eval()
    adapters.add_soft_prompt(model, torch.randn(3, 32, generator=torch.Generator().manual_seed(3)), "tensor")
    prompt = [31, 32, *ids(20).tolist(), 33, 5]  # as "<P*2>{text}<P*1>:"
    text = [*prompt[2:22], 5]
    start = len(text) - 9  # what the context holds beside three virtual tokens

    def context() -> list[int]:
        return [31, 32, *text[start:20], 33, *text[max(20, start) :]]

    expected = []
    with torch.no_grad():
        for _ in range(30):
            if len(context()) > 12:
                start = len(text) - 4
            expected.append(int(model(torch.tensor([context()]))[0, -1].argmax()))
            text.append(expected[-1])
    (completion,) = generate_batch(model, [prompt], SamplingParams(max_new_tokens=30, temperature=0.0))
    assert completion.ids == expected
