"""The plan of a step's memory against tensors: what autograd keeps, what is alive at once, what a run holds."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, ids, tiny_model
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_file
import train
from benchmarks import memory as tables
from model import GPT
from nanoforge.models import adapters
from nanoforge.models.generation import KVCache
from nanoforge.training import checkpoint, memory

SHAPES = {
    "gpt2": {"bias": True},
    "llama": {"norm": "rmsnorm", "position": "rope", "mlp": "gated", "activation": "silu", "n_kv_head": 1},
    "gemma": {"norm": "rmsnorm_offset", "position": "rope", "mlp": "gated", "norm_placement": "both", "qk_norm": True},
    "modern": {"norm": "rmsnorm_nogain", "position": "rope", "qk_norm": True, "activation": "relu2", "head_dim": 32},
}


def adapted(kind: str, **shape: Any) -> tuple[GPT, int]:
    """(a model with an adapter, or without one, the rank of its LoRA)."""
    model = tiny_model(**{"n_embd": 128, "block_size": 64, "activation": "gelu_tanh"} | shape)
    rank = 4 if kind == "lora" else 0
    if kind == "lora":
        adapters.add_lora(model, [], rank=rank, alpha=4.0, dropout=0.0)
    if kind == "soft":
        adapters.add_soft_prompt(model, torch.zeros(2, 128), "tensor")
    if kind != "all":
        adapters.freeze_base(model)
    return model, rank


class SavedBytes(saved_tensors_hooks):
    """Counts what autograd keeps, each storage once, without a model's own tensors."""

    def __init__(self, model: GPT) -> None:
        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                self.sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    def __enter__(self) -> "SavedBytes":
        super().__enter__()
        return self


@pytest.mark.parametrize("kind", ["all", "lora", "soft"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_keeps_what_the_formula_says(name: str, kind: str):
    model, rank = adapted(kind, **SHAPES[name])
    x = torch.randn(2, 64, 128, requires_grad=True)
    reading = model.read(x, slice(0, 64), None)[False]
    with SavedBytes(model) as saved:
        model.blocks[1](x, x, None, reading)
    values = memory.layer_values(model.config, rank, frozen_linears=kind == "soft")
    assert sum(saved.sizes.values()) / (2 * 64 * 4) == pytest.approx(values, rel=0.03)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes", [{}, {"activation_checkpointing": True}, {"loss_chunk": 16}], ids=["plain", "checkpointed", "chunks"]
)
def test_a_step_takes_what_the_plan_says(changes: dict, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """All that is alive at once, at the peak of forward and backward, of a LoRA with a base in that dtype."""
    monkeypatch.setattr(model_file, "MAX_CHUNKED_SCORES", 0)  # attention as on a GPU
    model, rank = adapted("lora", **SHAPES["llama"], n_layer=3, vocab_sizes=(1000,), **changes)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(compute)
    model.compute_dtype = compute
    plan = memory.plan_memory(model, 2 * 64, "adamw", rank)
    idx = ids(2, 64, high=1000)
    with LiveBytes() as live:
        model(idx, idx).mean().backward()
    assert live.peak == pytest.approx(plan.peak - plan.frozen - plan.trainable - plan.optimizer, rel=0.1)
    assert plan.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    state = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    state.step()
    moments = [tensor for values in state.state.values() for tensor in values.values() if tensor.dim()]
    assert plan.optimizer == sum(tensor.nbytes for tensor in moments)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made within it that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            ref = StorageWeakRef(tensor.untyped_storage())
            if ref not in given:
                self.alive.setdefault(ref, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def test_the_cache_of_a_rollout_takes_what_the_plan_says():
    model = tiny_model(n_kv_head=2)
    cache = KVCache(model, 5, 7)
    assert sum(layer.nbytes for layer in cache.layers) == memory.cache_bytes(model.config, 5, 7, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["adapter", "copy"])
def test_a_reference_with_an_adapter_costs_nothing(
    run: Callable, base: Path, monkeypatch: pytest.MonkeyPatch, reference: str
):
    """No second copy of weights, and no activations that are kept; a copy costs one. The summary has these bytes."""
    runs: list[Any] = []
    build = train.build
    monkeypatch.setattr(train, "build", lambda *args: runs.append(build(*args)) or runs[-1])
    flags = [
        "--objective=dpo",
        "--dataset=pairs",
        "--adapter=lora",
        f"--reference={reference}",
        "--base_dtype=bfloat16",
    ]
    done = run(*flags, f"--init_from={base}", "--max_iters=1")
    objective, model = runs[0].data.objective, runs[0].raw_model
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    own = sum(tensors.values())
    other = objective.reference.model
    tensors |= {tensor.data_ptr(): tensor.nbytes for tensor in (*other.parameters(), *other.buffers())}
    assert sum(tensors.values()) == (own if reference == "adapter" else 2 * own)
    with SavedBytes(model) as saved:
        objective.reference.per_token_logps(ids(2, 8, high=13), torch.ones(2, 7, dtype=torch.bool))
    assert not saved.sizes
    numbers = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) MB", done.console)}
    weights = checkpoint.read_tensors(done.out_dir / "checkpoints/000001/model.safetensors")
    adapter = sum(tensor.nbytes for tensor in weights.values())
    assert numbers["adapter"] == numbers["gradients"] == round(adapter / 2**20, 1)
    assert numbers["base"] == round((own - adapter) / 2**20, 1)
    assert numbers.get("reference", 0.0) == (0.0 if reference == "adapter" else round(own / 2**20, 1))


@pytest.mark.slow
def test_the_tables_are_of_the_models_they_name():
    """The makers' own counts of parameters, and docs/memory.md as it is printed."""
    tables.build.cache_clear()
    counts = {name: tables.build(name, None).count_parameters() for name in tables.MODELS}
    assert counts == {"Llama 3.2 1B": 1_235_814_400, "Llama 2 7B": 6_738_415_616}
    page = (ROOT / "docs/memory.md").read_text()
    assert "\n".join(tables.table(["", *tables.MODELS], tables.rows_of_bytes())) in page
    tables.build.cache_clear()
