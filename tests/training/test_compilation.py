"""Compiled runs: when they are, how many graphs they make, and what a run says when these become too many."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DIGITS, TINY, RunFiles, write_examples

import train
import train_args
from nanoforge.training import compilation

Graph = tuple[str, int, bool]  # part of the model, width of the batch, for training


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Graph]]:
    """The graphs that torch.compile traces from now on; what they compute is run eagerly."""
    made: list[Graph] = []
    plain_compile = torch.compile

    @functools.cache  # graphs are shared by what has the same backend
    def backend_of(part: str) -> Callable[..., Any]:
        def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            activations = [x for x in inputs if isinstance(x, torch.Tensor) and x.dim() > 1]
            widths = [x.size(1) for x in activations if not isinstance(x, torch.nn.Parameter)]
            made.append((part, widths[0], torch.is_grad_enabled()))
            return module.forward

        return backend

    def compile(function: Any, **options: Any) -> Any:
        return plain_compile(function, backend=backend_of(function.__name__), **options)

    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def long_base(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads examples of 10 to 120 tokens, which lie in data_dir: two widths."""
    texts = [("1" * (i * 7 % 70 + 5) + "+1=", "2" * (i * 5 % 40 + 1), "3" * (i * 3 % 40 + 2)) for i in range(40)]
    sums = [{"prompt": prompt, "completion": right, "answer": right} for prompt, right, _ in texts]
    pairs = [{"prompt": prompt, "chosen": right, "rejected": wrong} for prompt, right, wrong in texts]
    labelled = [{"prompt": prompt, "completion": right, "label": len(right) % 2 == 0} for prompt, right, _ in texts]
    for name, rows in (("long_sums", sums), ("long_pairs", pairs), ("long_labelled", labelled)):
        write_examples(data_dir / name, rows, n_train=32, tokenizer=DIGITS)
    out_dir = tmp_path_factory.mktemp("long") / "run"
    flags = ["--objective=sft", "--dataset=long_sums", "--block_size=128", "--max_iters=1", "--eval_interval=1"]
    train.main(train_args.parse([*TINY, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *flags, "--eval_samples=0"]))
    return out_dir


OBJECTIVES = {
    "sft": ["--dataset=long_sums"],
    "dpo": ["--dataset=long_pairs"],
    "kto": ["--dataset=long_labelled", "--adapter=lora"],
    "grpo": ["--dataset=long_sums", "--adapter=lora", "--beta=0.1", "--num_generations=2", "--max_new_tokens=30"],
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_compiled_run_makes_two_graphs_a_width(
    run: Callable[..., RunFiles], long_base: Path, graphs: list[Graph], objective: str
):
    """Each part of the model has at most two for training, of which one may be the first layer's, and two
    without gradients: of losses and logits, or with the adapter and without it."""
    flags = [f"--objective={objective}", *OBJECTIVES[objective], f"--init_from={long_base}", "--block_size=128"]
    flags += ["--eval_interval=4", "--eval_samples=0", "--batch_size=4", "--dropout=0"]
    done = run(*flags, "--max_iters=8", "--compile=true")
    counts = Counter(graphs)
    assert {width for _, width, _ in counts} <= {64, 128} and len(counts) >= 9
    assert max(counts.values()) <= 2, counts
    torch._dynamo.reset()
    eager = run(*flags, "--max_iters=8", "--compile=false", name="eager")
    assert done.losses == pytest.approx(eager.losses, rel=1e-3, abs=1e-4), "padding and graphs change no loss"


def test_auto_compiles_long_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(compilation, "missing_compiler", lambda device: "")
    assert compilation.decide("auto", gpu, 5000).is_on and "GPU" in compilation.decide("auto", gpu, 5000).describe()
    assert not compilation.decide("auto", gpu, 100).is_on and "200" in compilation.decide("auto", gpu, 100).describe()
    assert compilation.decide("auto", cpu, 5000) == compilation.EAGER
    assert compilation.decide("true", cpu, 1).is_on and not compilation.decide("false", gpu, 5000).is_on
    monkeypatch.setattr(compilation, "missing_compiler", lambda device: "triton")
    assert "triton" in compilation.decide("auto", gpu, 5000).describe()


def test_a_run_says_that_it_goes_on_uncompiled(monkeypatch: pytest.MonkeyPatch):
    """A run that meets more shapes than it may compile is slow and right: it names --compile, and does not end."""
    messages: list[str] = []
    with (
        compilation.reported_limits(messages.append),
        torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=False),
    ):
        double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
        assert [double(torch.ones(n)).tolist() for n in (1, 2, 3)] == [[2.0] * n for n in (1, 2, 3)]
    assert len(messages) == 1 and "--compile" in messages[0]
