"""llama.cpp as an engine: it draws what this program's own forward draws, whatever the tokenizer."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHARED, draw_uncached, tiny_model

import configurator
import sample
from builders import load_model
from model import GPT
from nanoforge.errors import UserError
from nanoforge.models import gguf_files, llama_cpp
from nanoforge.models.generation import Completion, SamplingParams, generate_batch, make_requests, uniform_draws
from nanoforge.models.llama_cpp import LlamaCpp
from nanoforge.models.pretrained import Pretrained

xllamacpp = pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

SMOLLM2 = SHARED / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "gated", "activation": "silu", "n_kv_head": 2}
GREEDY = SamplingParams(max_new_tokens=30, temperature=0)


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nanoforge" / "llama_cpp"


def pretrained_of(model: GPT, source: str) -> Pretrained:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Pretrained(dataclasses.asdict(model.config), weights, None, source)


def open_engine(model: GPT, source: str = "org/tiny@1") -> LlamaCpp:
    loaded = pretrained_of(model, source)
    path = llama_cpp.path_of(loaded, loaded.shape, "f32")
    rows = sum(model.config.vocab_sizes)
    return LlamaCpp(path, model.config.block_size, rows, n_threads=1, exact=True)


def draw(
    engine: LlamaCpp,
    prompts: list[list[int]],
    sampling: SamplingParams,
    key: tuple[int, ...] = (1,),
    on_token: Any = None,
) -> list[Completion]:
    requests = make_requests(prompts, sampling, uniform_draws(*key))
    engine.complete(requests, on_token)
    return [request.completion() for request in requests]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return open_engine(tiny_model(**LLAMA).eval())


@pytest.mark.parametrize("changes", [LLAMA, {"bias": True, "position": "learned"}])
def test_greedy_ids_are_ours_also_past_the_context(changes: dict[str, Any]):
    """Prompts shorter and longer than the context of 12 tokens; with learned positions it has no room beyond."""
    model = tiny_model(**changes).eval()
    engine = open_engine(model)
    for prompt in ([1, 2, 3], list(range(12)), list(range(20))):
        shown: list[int] = []
        completion, other = draw(engine, [prompt, [7]], GREEDY, (1,), shown.append)
        expected = draw_uncached(model, torch.tensor([prompt]), 30, temperature=0)
        assert completion.ids == shown == expected[0, len(prompt) :].tolist()
        assert other.ids == draw_uncached(model, torch.tensor([[7]]), 30, temperature=0)[0, 1:].tolist()


def test_completions_end_as_ours(engine: LlamaCpp):
    (whole,) = draw(engine, [[1, 2]], GREEDY)
    end = whole.ids[4]
    at = whole.ids.index(end)
    shown: list[int] = []
    (ended,) = draw(engine, [[1, 2]], dataclasses.replace(GREEDY, end_ids=(30, end)), (1,), shown.append)
    assert ended.ended and ended.ids == whole.ids[: at + 1] and shown == whole.ids[:at]
    stops = dataclasses.replace(GREEDY, is_complete=lambda ids: len(ids) == 3)
    (stopped,) = draw(engine, [[1, 2]], stops, (1,))
    assert not stopped.ended and stopped.ids == whole.ids[:3]


def test_filters_and_seeds(engine: LlamaCpp):
    """What each filter leaves is known where it leaves one id, and the ids above vocab_size are never drawn."""
    free = SamplingParams(max_new_tokens=40, n=3, temperature=3.0, vocab_size=9)
    drawn = draw(engine, [[1, 2]], free, (1, 2))
    assert len({tuple(completion.ids) for completion in drawn}) == 3
    assert {token for completion in drawn for token in completion.ids} == set(range(9))
    assert draw(engine, [[1, 2]], free, (1, 2)) == drawn != draw(engine, [[1, 2]], free, (1, 3))
    greedy = draw(engine, [[1, 2]], dataclasses.replace(free, n=1, temperature=0), (1,))
    for only in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        filtered = draw(engine, [[1, 2]], dataclasses.replace(free, n=1, **only), (5,))
        assert filtered == greedy


def test_penalties_and_log_probabilities_are_ours():
    """Greedy, with a penalty that changes the text; the model's log-probabilities, and the likeliest ids instead."""
    model = tiny_model(**LLAMA, block_size=64).eval()
    engine = open_engine(model)
    prompts = [[1, 2, 3], list(range(12))]
    plain = dataclasses.replace(GREEDY, logprobs=3)
    for sampling in (plain, dataclasses.replace(plain, logprobs=0), dataclasses.replace(plain, repetition_penalty=1.5)):
        expected = generate_batch(model, prompts, sampling)
        for ours, theirs in zip(draw(engine, prompts, sampling), expected, strict=True):
            assert ours.ids == theirs.ids
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
            for tops, their_tops in zip(ours.top_logprobs, theirs.top_logprobs, strict=True):
                assert [i for i, _ in tops] == [i for i, _ in their_tops] and len(tops) == sampling.logprobs
                assert [p for _, p in tops] == pytest.approx([p for _, p in their_tops], abs=1e-4)
    assert draw(engine, prompts, sampling)[0].ids != draw(engine, prompts, plain)[0].ids


def test_an_interrupt_and_an_error_reach_the_caller(engine: LlamaCpp):
    """The library swallows what a callback raises, and takes the signals for itself."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for error in (KeyboardInterrupt(), UserError("--start: no")):

        def fail(token: int, error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)):
            draw(engine, [[1, 2]], GREEDY, (1,), fail)
    with pytest.raises(KeyboardInterrupt):
        draw(engine, [[1]], GREEDY, (1,), lambda token: os.kill(os.getpid(), signal.SIGINT))
    assert draw(engine, [[1, 2]], GREEDY)[0].ids  # and it goes on


def test_a_file_is_written_once_for_a_model_and_a_type(cache_folder: Path, tmp_path: Path):
    model = tiny_model(**LLAMA)
    weights = tmp_path / "weights.pt"
    weights.write_text("1")
    paths = [llama_cpp.path_of(pretrained_of(model, str(weights)), dataclasses.asdict(model.config), "f32")]
    content = paths[0].stat().st_ino
    for kind, text, is_new in (("f32", "1", False), ("f16", "1", True), ("f32", "other", True)):
        if weights.read_text() != text:
            weights.write_text(text)
        paths.append(llama_cpp.path_of(pretrained_of(model, str(weights)), dataclasses.asdict(model.config), kind))
        assert (paths[-1] not in paths[:-1]) == is_new
    assert paths[0].stat().st_ino == content and paths[1] == paths[0]
    for i in range(llama_cpp.MAX_FILES):
        last = llama_cpp.path_of(pretrained_of(model, f"org/name@{i}"), dataclasses.asdict(model.config), "f32")
    assert last.exists() and len(list(cache_folder.iterdir())) == llama_cpp.MAX_FILES


CONTEXTS = {"vocab_sizes": (20, 11), "vocabulary": "contexts"}


@pytest.mark.parametrize(
    ("changes", "named"), [({"qk_norm": True, "norm": "rmsnorm"}, "qk_norm"), (CONTEXTS, "--multicontext")]
)
def test_a_model_that_llama_cpp_has_not_is_refused(cache_folder: Path, changes: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        open_engine(tiny_model(**changes))
    assert not list(cache_folder.glob("*.gguf"))


@pytest.mark.parametrize("flags", [["--device=cuda"], ["--compile"], ["--prompt_dir=x", "--fields={}"]])
def test_flags_that_llama_cpp_has_not_are_refused(flags: list[str], capsys: pytest.CaptureFixture):
    rules = configurator.Rules(check=sample.check)
    with pytest.raises(SystemExit):
        configurator.parse(sample.SampleArgs, ["--engine=llama.cpp", *flags], "", rules)
    error = capsys.readouterr().err
    assert flags[0].partition("=")[0] in error and "--engine" in error


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs ../shared/smollm2")
def test_a_gguf_keeps_its_tensors_and_gives_what_llama_cpp_gives():
    """Quantized weights compute as they are: the text is that of llama.cpp with the file and its own tokenizer."""
    loaded = load_model(str(SMOLLM2), reads_weights=False)
    config, tokenizer = loaded.model.config, loaded.tokenizer
    assert loaded.unread is not None
    path = llama_cpp.path_of(loaded.unread, dataclasses.asdict(config), "f16")
    before, after = gguf_files.GGUFReader([SMOLLM2]), gguf_files.GGUFReader([path])
    assert before.places.keys() == after.places.keys()
    for name in ("blk.3.ffn_down.weight", "output_norm.weight", "token_embd.weight"):
        assert before.places[name][1].kind == after.places[name][1].kind
        assert (before.read_bytes(name) == after.read_bytes(name)).all()

    engine = LlamaCpp(path, config.block_size, sum(config.vocab_sizes), n_threads=1)
    prompt = "The capital of France is"
    greedy = SamplingParams(max_new_tokens=12, temperature=0)
    (ours,) = draw(engine, [tokenizer.encode(prompt).tolist()], greedy)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(SMOLLM2), 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.fit_params, params.verbosity = False, -1
    reply = xllamacpp.Server(params).handle_completions({"prompt": prompt, "n_predict": 12, "temperature": 0})
    assert tokenizer.decode(ours.ids) == reply["choices"][0]["text"]
