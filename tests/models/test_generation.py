"""Generation: cached equals uncached, a batch equals its prompts alone, and filters keep what their definitions say."""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import draw_uncached, ids, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig
from nanoforge.models import adapters, generation
from nanoforge.models.generation import (
    LOOK_EVERY,
    Decoder,
    KVCache,
    Request,
    SamplingParams,
    complete,
    decoding,
    generate_batch,
    inverse_cdf,
    logits_to_probs,
    make_requests,
    penalize,
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
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    for penalty in (1.0, 1.3, 0.8):
        sampling = SamplingParams(max_new_tokens=40, temperature=0.0, repetition_penalty=penalty, logprobs=3)
        completions = generate_batch(ours.eval(), ids(2, 4).numpy(), sampling)
        reference = theirs.generate(ids(2, 4), repetition_penalty=penalty, output_logits=True, **options)
        assert [completion.ids for completion in completions] == reference.sequences[:, 4:].tolist()
        logprobs = torch.stack(reference.logits, dim=1).log_softmax(-1)  # (2, 40, V), before the penalty
        drawn = logprobs.gather(2, reference.sequences[:, 4:, None])[..., 0]
        top = logprobs.topk(3)
        for row, completion in enumerate(completions):
            assert completion.logprobs == pytest.approx(drawn[row].tolist(), abs=1e-5)
            pairs = torch.tensor(completion.top_logprobs)  # (40, 3, 2)
            assert torch.equal(pairs[..., 0].long(), top.indices[row])
            torch.testing.assert_close(pairs[..., 1], top.values[row], atol=1e-5, rtol=0)


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


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(3, 31, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(3, 31, dtype=torch.bool).scatter_(1, ids(3, 9), value=True)
    for penalty in (1.0, 1.7, 0.6):
        expected = processors.RepetitionPenaltyLogitsProcessor(penalty)(ids(3, 9), logits)
        assert torch.equal(penalize(logits, seen, penalty), expected)


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
    decoder = Decoder(model)
    requests = make_requests(prompts, sampling, uniform_draws(0))
    decoder.join(requests)
    num_rows = [len(decoder.requests)]
    while decoder.any_active:
        decoder.advance()
        num_rows.append(len(decoder.requests))
    assert num_rows[0] == 2 * len(prompts)
    assert num_rows == sorted(num_rows, reverse=True)
    for i, completion in enumerate(request.completion() for request in requests):
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
    calls = itertools.count()
    other_rank_goes_on = lambda holds: holds or next(calls) < 80  # noqa: E731
    for eos_id, any_rank in ((None, bool), (eos_ids[0], bool), (eos_ids[0], other_rank_goes_on)):
        options = SamplingParams(max_new_tokens=40, temperature=0.0, n=2, end_ids=() if eos_id is None else (eos_id,))
        completions = generate_batch(model, [prompt.tolist() for prompt in prompts], options, any_rank=any_rank)
        for completion, text in zip(completions, [text for text in alone for _ in range(2)], strict=True):
            assert completion.ended == (eos_id in text)
            assert completion.ids == (text[: text.index(eos_id) + 1] if completion.ended else text)


REQUESTS = [  # (length of the prompt, parameters)
    (3, {"temperature": 0.0, "max_new_tokens": 9}),
    (11, {"temperature": 0.7, "top_k": 5, "max_new_tokens": 30, "logprobs": 2}),
    (1, {"temperature": 1.0, "top_p": 0.8, "max_new_tokens": 9, "end_ids": tuple(range(25))}),
    (7, {"temperature": 1.5, "min_p": 0.1, "repetition_penalty": 1.4, "max_new_tokens": 30}),
    (5, {"temperature": 0.0, "repetition_penalty": 1.2, "max_new_tokens": 20, "logprobs": 0}),
    (20, {"temperature": 1.0, "max_new_tokens": 12, "is_complete": lambda new: sum(new[-2:]) > 40}),
]


def make_request(number: int) -> Request:
    length, options = REQUESTS[number]
    return Request(ids(length, seed=length).tolist(), SamplingParams(**options), uniform_draws(number, 7))


def results(request: Request) -> tuple:
    rounded = [round(logprob, 4) for logprob in request.logprobs]
    tops = [[(token, round(logprob, 4)) for token, logprob in top] for top in request.top_logprobs]
    return request.ids, request.finish_reason, rounded, tops


@pytest.mark.parametrize("variant", [{}, {"position": "rope", "window": "SL", "window_size": 3}], ids=str)
@pytest.mark.parametrize("decoder_class", ["Decoder", "CUDADecoder"])
def test_a_request_draws_the_same_alone_and_among_others(
    variant: dict, decoder_class: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests with parameters and seeds of their own join a batch that is running, past a context of 12, and leave."""
    model = tiny_model(block_size=12, **variant).eval()
    alone = [make_request(number) for number in range(len(REQUESTS))]
    for request in alone:
        complete(model, [request])
    assert {request.finish_reason for request in alone} == {"end", "stop", "length"}

    monkeypatch.setattr(generation, "capture", FakeGraph)
    together = [make_request(number) for number in range(len(REQUESTS))]
    gone = make_request(1)
    with decoding(model):
        decoder = globals()[decoder_class](model)
        decoder.join([together[0], gone])
        decoder.advance()
        decoder.join(together[1:4])
        n_drawn = len(gone.ids)
        gone.cancel()
        for request in together[4:]:
            decoder.advance()
            decoder.join([request])
        while decoder.any_active:
            decoder.advance()
    assert [results(request) for request in together] == [results(request) for request in alone]
    assert gone.finish_reason == "cancelled" and gone.ids == alone[1].ids[:n_drawn]
    assert len(decoder.requests) < len(REQUESTS), "rows that have finished leave"


@pytest.mark.parametrize("variant", RAGGED[1:3], ids=str)
def test_a_prompt_that_begins_as_one_before_is_read_from_there(variant: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of a conversation: tokens are those of reading all, and each token is read once while turns go on."""
    model = tiny_model(block_size=64, **variant).eval()
    widths: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **more: (widths.append(idx.size(-1)), forward(idx, **more))[1])
    text, known, n_read = [1, 2, 3, 4, 5], None, []
    for turn in range(4):
        sampling = SamplingParams(max_new_tokens=6, temperature=0.8)
        fresh = Request(text, sampling, uniform_draws(turn))
        complete(model, [fresh])
        request = Request(text, sampling, uniform_draws(turn), read_before=known)
        with decoding(model):
            decoder = Decoder(model)
            widths.clear()
            decoder.join([request])
            n_read.append(sum(widths))
            while decoder.any_active:
                decoder.advance()
            known = decoder.context_of(request)
        assert request.ids == fresh.ids
        text = text[:-1] if turn == 2 else text  # the user takes back what was said
        text = [*text, *request.ids, 7 + turn, 8]
    assert n_read == [4, 2, 2, 7]


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


def test_draws_are_those_of_earlier_versions() -> None:
    """A seed keeps its meaning: ids that an earlier engine drew, past a context of 12, and their log-probabilities."""
    model = tiny_model(block_size=12, position="rope", n_kv_head=2).eval()
    sampling = SamplingParams(max_new_tokens=20, temperature=0.7, top_k=5, end_ids=(5,), n=2, logps=True)
    prompts = [ids(length, seed=length).tolist() for length in (3, 1, 11)]
    completions = generate_batch(model, prompts, sampling, uniform_draws(3, 6))
    assert completions[0].ids == [27, 27, 13, 27, 27, 25, 14, 14, 14, 15, 23, 23, 24, 24, 20, 4, 25, 26, 26, 6]
    assert completions[5].ids == [27, 27, 26, 26, 26, 27, 27, 27, 10, 6, 14, 14, 14, 15, 15, 13, 29, 27, 27, 27]
    assert completions[0].logps[:4] == pytest.approx([-1.8254, -1.0399, -2.6283, -1.8246], abs=1e-3)


def add_adapter(model: GPT, adapter: str) -> None:
    if adapter == "lora":
        adapters.add_lora(model, [], rank=2, alpha=4.0, dropout=0.0)
        adapters.add_token_rows(model, 28, 3)
        adapters.freeze_base(model)
    elif adapter:
        adapters.add_soft_prompt(model, torch.randn(3, 32, generator=torch.Generator().manual_seed(3)), adapter)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("adapter", ["", "lora", "tensor", "lstm"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm_offset"])
@torch.no_grad()
def test_weights_that_are_cast_once_compute_the_same(adapter: str, norm: str) -> None:
    """Bit for bit, in bfloat16; of an offset of gains and a prompt's LSTM the model computes with float32."""
    model = tiny_model(norm=norm, position="rope", qk_norm=True, residual_scalars=True, value_residual=True).eval()
    add_adapter(model, adapter)
    model.compute_dtype = torch.bfloat16
    idx = ids(2, 8, high=34 if adapter in ("tensor", "lstm") else 31)
    expected = model(idx)
    copied = generation.decoding_copy(model)
    assert copied is not model and torch.equal(copied(idx), expected)
    assert copied.blocks[0].attn.qkv.weight.dtype == torch.bfloat16 != model.blocks[0].attn.qkv.weight.dtype
    generation.cast_weights(model)
    assert torch.equal(model(idx), expected) and generation.decoding_copy(model) is model


# ---------------------------------------------------------------------------------------------------------------------
# what a GPU runs, shown on a CPU: static shapes, no look of the host, few kernels, a replay


VIEWS = {
    *("view", "_unsafe_view", "transpose", "t", "permute", "unsqueeze", "squeeze", "slice", "split", "select"),
    *("detach", "split_with_sizes", "expand", "alias", "as_strided", "unbind", "_reshape_alias", "lift_fresh"),
    *("empty", "chunk"),
}


class KernelCounter(TorchDispatchMode):
    """Counts operations that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket.__name__ not in VIEWS:
            self.counts[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class FakeGraph:
    """Stands for a CUDA graph: replays recorded operations on the same tensors, and runs no Python of the step."""

    def __init__(self, step: Callable[[], None]):
        self.step, self.operations = step, []
        before = [tensor.clone() for tensor in tensors_of(step)]
        with Recorder(self.operations):
            step()
        for tensor, value in zip(tensors_of(step), before, strict=True):  # a capture runs nothing
            tensor.copy_(value)
        self.addresses = [tensor.data_ptr() for tensor in tensors_of(step)]

    def replay(self) -> None:
        assert [tensor.data_ptr() for tensor in tensors_of(self.step)] == self.addresses
        for func, args, kwargs, results in self.operations:
            new = func(*args, **kwargs)
            for result, value in zip(tree_leaves(results), tree_leaves(new), strict=True):
                if torch.is_tensor(result) and result.data_ptr() != value.data_ptr():
                    result.copy_(value)


def tensors_of(step: Any) -> list[torch.Tensor]:
    """All that a step reads and writes beside the weights."""
    _, cache, state, _ = step.args
    reported = [state.logprobs, state.top_ids, state.top_logprobs, state.seen]
    tensors = [*cache.layers, state.ids, state.uniform, state.drawn, state.logps, state.positions, state.at, *reported]
    return [tensor for tensor in tensors if tensor is not None]


class Recorder(TorchDispatchMode):
    """Keeps each operation with its arguments and results."""

    def __init__(self, operations: list[tuple]):
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result


class CUDADecoder(Decoder):
    """Takes CUDA's branches."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.model = generation.decoding_copy(args[0])  # whose products are PyTorch's
        self.is_static = self.is_replayed = True


@pytest.mark.parametrize(
    "variant", [{}, {"position": "rope", "n_kv_head": 2, "window": "SL", "window_size": 5}], ids=str
)
@pytest.mark.parametrize(
    "options", [{"end_ids": (5,), "n": 2, "logps": True}, {"is_complete": lambda new: sum(new[-2:]) > 55, "top_k": 9}]
)
def test_replayed_steps_draw_what_eager_ones_draw(variant: dict, options: dict, monkeypatch) -> None:
    """Prompts of any lengths, past the block, rows that end, and a callback that says when it is enough."""
    model = tiny_model(block_size=70, **variant).eval()
    prompts = [ids(length, seed=length).tolist() for length in (3, 11, 70, 71, 60)]
    sampling = SamplingParams(max_new_tokens=80, **options)
    expected = generate_batch(model, prompts, sampling)
    graphs: list[FakeGraph] = []
    monkeypatch.setattr(generation, "capture", lambda step: graphs.append(FakeGraph(step)) or graphs[-1])
    monkeypatch.setattr(generation, "Decoder", CUDADecoder)
    replayed = generate_batch(model, prompts, sampling)
    for one, other in zip(replayed, expected, strict=True):
        assert (one.ids, one.ended) == (other.ids, other.ended)
        assert one.logps == pytest.approx(other.logps, abs=1e-4)
    assert 1 <= len(graphs) <= 6, "one for each size of the cache and of the batch"


def gpt2_shape(n_layer: int) -> GPT:
    """12 heads, bfloat16 products of float32 weights."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_sizes=(256,), n_layer=n_layer, n_head=12, n_embd=96, block_size=64, bias=False)).eval()
    model.compute_dtype = torch.bfloat16
    return model


def test_a_step_launches_few_kernels_and_never_asks_the_host() -> None:
    """Of GPT-2's 12 layers 181, with sampling: 12 a layer. It was 351 with weights that are cast at each token."""
    sampling = SamplingParams(max_new_tokens=32, temperature=0.8, top_k=50, logps=True)
    counts = {}
    for n_layer in (1, 3):
        decoder = CUDADecoder(gpt2_shape(n_layer))
        with torch.no_grad():
            decoder.join(make_requests([[1] * n for n in (5, 7, 9, 9)], sampling, uniform_draws(0)))
            with KernelCounter() as counter:
                decoder.step.step()
        assert not {"multinomial", "_local_scalar_dense", "nonzero"} & counter.counts.keys()
        counts[n_layer] = counter.counts.total()
    a_layer = (counts[3] - counts[1]) / 2
    assert a_layer <= 12 and counts[1] - a_layer <= 37, counts


def test_sixteen_steps_run_without_a_device() -> None:
    """With tensors that have no values: a read by the host would raise."""
    sampling = SamplingParams(max_new_tokens=32, top_p=0.9, min_p=0.1, top_k=50, logps=True)
    other = SamplingParams(max_new_tokens=9, repetition_penalty=1.2, logprobs=4)
    with FakeTensorMode(), torch.no_grad():
        decoder = Decoder(gpt2_shape(1), compiled=True)
        requests = make_requests([[1] * n for n in (5, 7, 9, 9)], sampling, uniform_draws(0))
        decoder.join([*requests, Request([1, 2], other)])
        step = functools.partial(generation.decode_one_token, *decoder.step.args)  # type: ignore[attr-defined]
        for _ in range(LOOK_EVERY):
            step()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that compiled steps make; nothing makes kernels of them."""
    made: list[Any] = []
    compiled = torch.compile(
        generation.decode_one_token,
        fullgraph=True,
        dynamic=False,
        backend=lambda graph, inputs: made.append(graph) or graph.forward,
    )
    monkeypatch.setattr(generation, "compiled_step", lambda device_type: compiled)
    return made


@pytest.mark.slow
def test_a_compiled_step_has_one_graph_for_each_size_of_the_cache(graphs: list[Any]) -> None:
    """Batches of 2 and more share it, also after the weights have changed and while rows end."""
    model = tiny_model(block_size=130, position="rope").eval()
    for n in (2, 4, 2):
        prompts = ids(n, 55, seed=n).tolist()
        options = {"max_new_tokens": 20, "end_ids": (5,), "logps": True}
        completions = generate_batch(model, prompts, SamplingParams(compiled=True, **options))
        expected = generate_batch(model, prompts, SamplingParams(**options))
        assert [one.ids for one in completions] == [one.ids for one in expected]
        with torch.no_grad():
            model.wte.weight.add_(0.01)
    assert len(graphs) == 2, "64 and 128 tokens"
    generate_batch(model, [[1]], SamplingParams(max_new_tokens=20, compiled=True))
    assert len(graphs) == 3, "a batch of 1 has its own"


@pytest.mark.slow
def test_a_compiled_step_writes_the_cache_in_place() -> None:
    """Of GPT-2's 12 layers 115 kernels, with sampling: 9 a layer, none of which copies a cache."""
    from torch._inductor.utils import run_and_get_code

    drawn = {}
    for compiled in (False, True):
        sampling = SamplingParams(max_new_tokens=32, logps=True, compiled=compiled)
        decoder = CUDADecoder(gpt2_shape(1), compiled=compiled)
        decoder.is_replayed = False
        with torch.no_grad():
            decoder.join(make_requests([[1] * n for n in (5, 7)], sampling, uniform_draws(0)))
            _, codes = run_and_get_code(lambda: decoder.decode(8))  # noqa: B023
            decoder.look()
        drawn[compiled] = [request.ids for request in decoder.requests]
    assert len(drawn[True][0]) == 8 and drawn[True] == drawn[False]
    (code,) = codes
    calls = code[code.index("def call(") :]
    kernels = re.findall(r"^ +(?:cpp_fused\w*\(|extern_kernels\.|\w+ = torch\.ops\.aten)", calls, flags=re.MULTILINE)
    assert len(kernels) <= 9 + 7, kernels
