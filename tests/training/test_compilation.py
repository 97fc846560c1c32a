"""Compiled runs: when they are, how many graphs they make, and what a run says when these become too many."""

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from helpers import DIGITS, TINY, RunFiles, read_run, start_ranks, wait_for_exit, write_examples
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train
import train_args
from nanoforge import distributed
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
    double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    few_graphs = torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=False)
    with compilation.reported_limits(messages.append), few_graphs:
        assert [double(torch.ones(n)).tolist() for n in (1, 2, 3)] == [[2.0] * n for n in (1, 2, 3)]
    assert len(messages) == 1 and "--compile" in messages[0]


# ---------------------------------------------------------------------------------------------------------------------
# several ranks


def log_backward(log: Path) -> None:
    """What a rank prepares: it logs each backward graph that runs, and each bucket of gradients that is sent."""
    path = log.with_suffix(f".{os.environ['RANK']}")

    def record(event: str) -> None:
        with path.open("a") as file:
            file.write(event + "\n")

    def backward_compiler(module: torch.fx.GraphModule, inputs: Any) -> Any:
        def run_graph(*args: Any) -> Any:
            record("backward")
            return module(*args)

        return make_boxed_func(run_graph)

    class LoggedDDP(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module: torch.nn.Module, **options: Any):
            super().__init__(module, bucket_cap_mb=0.001, **options)
            self.register_comm_hook(None, send)

    def send(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        record("bucket")
        return allreduce_hook(None, bucket)

    backend = aot_autograd(fw_compiler=lambda module, inputs: make_boxed_func(module), bw_compiler=backward_compiler)
    torch.compile = functools.partial(torch.compile, backend=backend)
    distributed.DistributedDataParallel = LoggedDDP


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_ranks_are_the_eager_run(run: Callable[..., RunFiles], data_dir: Path, tmp_path: Path, parallel: str):
    """Under DDP the first bucket leaves before the backward of the first block, and of the embedding."""
    flags = ["--n_layer=3", "--position=rope", "--logit_softcap=5"]
    expected = run(*flags, name="plain")
    own = [*TINY, *flags, f"--data_dir={data_dir}", "--dataset=a", f"--parallel={parallel}", "--compile=true"]
    log = tmp_path / "log"
    prepare = functools.partial(log_backward, tmp_path / "events")
    processes = start_ranks([*own, f"--out_dir={tmp_path / parallel}"], 2, log, prepare)
    assert [wait_for_exit(process, 200) for process in processes] == [0, 0], log.read_text()
    assert read_run(tmp_path / parallel).losses == pytest.approx(expected.losses, rel=1e-4)
    events = (tmp_path / "events.0").read_text().split()
    graphs = [i for i, event in enumerate(events) if event == "backward"]
    assert len(graphs) == 4 * 5, "of each step: the head, three blocks, the embedding"
    if parallel == "ddp":
        head, _, _, first_block, _ = graphs[-5:]
        assert "bucket" in events[head:first_block], events[head:]
