"""--base_dtype: a frozen base in bfloat16 or float16 is the same base, with its values rounded once, in float32."""

import shutil
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    TINY_WITHOUT_SHAPE,
    assert_same_lines,
    equal_tensors,
    ids,
    metric,
    run_on_ranks,
    tiny_model,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT
from nanoforge.errors import UserError
from nanoforge.models import adapters, generation
from nanoforge.training import checkpoint
from train_args import parse

SFT = ["--objective=sft", "--dataset=sums", "--eval_samples=0", "--weight_decay=0", "--learning_rate=0.01"]
LORA = [*SFT, "--adapter=lora"]
DPO = ["--objective=dpo", "--dataset=pairs"]
SOFT = [*SFT, "--adapter=soft_prompt", "--prompt_format=<P*3>{prompt}<P>1+1=</P>", "--block_size=16"]
GRPO = ["--objective=grpo", "--num_generations=4", "--max_new_tokens=3", "--reward=length"]


@torch.no_grad()
def rounded(model: GPT, dtype: torch.dtype) -> GPT:
    """The model with its values rounded, still float32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model


@pytest.fixture(scope="session")
def rounded_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with its values rounded to bfloat16, stored as float32."""
    folder = tmp_path_factory.mktemp("rounded") / "base"
    shutil.copytree(base, folder)
    weights = checkpoint.read_tensors(folder / "model.safetensors")
    rounded_weights = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    assert not equal_tensors(weights, rounded_weights)
    checkpoint.write_tensors(folder / "model.safetensors", rounded_weights)
    checkpoint.write_manifest(folder)
    return folder


def adapt(model: GPT, kind: str) -> GPT:
    """A model with an adapter that has left its start, drawn from one seed, and a frozen base."""
    torch.manual_seed(5)
    if kind == "soft":
        adapters.add_soft_prompt(
            model, adapters.initial_prompt(model.wte.weight, [None, 3, None], "normal", 31), "lstm"
        )
    else:
        adapters.add_lora(model, ["attn.qkv", "mlp.proj"], rank=2, alpha=4.0, dropout=0.0)
    if kind == "rows":
        adapters.add_token_rows(model, 28, 3)
    adapters.freeze_base(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


VARIANTS = [
    {"bias": True, "activation_checkpointing": True},
    {"tie_weights": False, "norm": "rmsnorm_offset", "norm_placement": "both", "mlp": "gated", "loss_chunk": 5},
    {"norm": "rmsnorm", "qk_norm": True, "qk_norm_gain": True, "value_residual": True, "residual_scalars": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", ["lora", "rows", "soft"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_losses_and_gradients_are_those_of_the_rounded_base(variant: dict, kind: str, compute: torch.dtype):
    """Bit for bit, the adapter enabled and disabled; only the adapter has gradients, in float32."""
    plain = rounded(tiny_model(**variant), torch.bfloat16)
    idx, targets = ids(2, 12), ids(2, 12, seed=2)
    if kind == "soft":
        idx[:, :3] = torch.tensor([31, 32, 33])
    results = []
    for model in (deepcopy(plain), deepcopy(plain).to(torch.bfloat16)):
        model.compute_dtype = compute
        adapt(model, kind)
        with adapters.disable_adapter(model), torch.no_grad():
            disabled = model(idx, targets)
        losses = model(idx, targets)
        losses.mean().backward()
        results.append((disabled, losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (disabled, losses, grads), (disabled_16, losses_16, grads_16) = results
    assert torch.equal(disabled, disabled_16) and torch.equal(losses, losses_16) and not torch.equal(disabled, losses)
    assert grads_16 and all(adapters.is_adapter_parameter(name) for name in grads_16)
    assert equal_tensors(grads, grads_16) and all(grad.dtype == torch.float32 for grad in grads_16.values())


RUNS = {
    "chunks": [*LORA, "--loss_chunk=8", "--activation_checkpointing"],
    "copy": [*SOFT, *DPO, "--reference=copy", "--prompt_init=normal"],
    "cache": [*LORA, *DPO, "--reference=cache"],
    "grpo": [*LORA, *GRPO],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_that_of_the_rounded_base(run: Callable, base: Path, rounded_base: Path, kind: str):
    """Every loss and every weight, bit for bit, also resumed, where the base is known by what was loaded."""
    flags = [*RUNS[kind], "--max_iters=4", "--eval_interval=2"]
    expected = run(*flags, f"--init_from={rounded_base}", name="expected")
    run(*flags, f"--init_from={base}", "--base_dtype=bfloat16", "--max_iters=2", name="parts")
    parts = run("--init_from=resume", "--max_iters=4", name="parts")
    assert parts.losses == expected.losses
    assert [line["val_loss"] for line in parts.evals] == [line["val_loss"] for line in expected.evals]
    assert equal_tensors(parts.last.weights, expected.last.weights)
    if kind == "grpo":
        assert max(metric(parts, "rollout_logp_error")) < 1e-4


@pytest.mark.slow
def test_two_ranks_are_one(run: Callable, tmp_path: Path, data_dir: Path, base: Path):
    flags = [
        f"--init_from={base}",
        *LORA,
        "--optimizer=sgd",
        "--base_dtype=bfloat16",
        "--gradient_accumulation_steps=2",
    ]
    one = run(*flags)
    flags = [*TINY_WITHOUT_SHAPE, f"--data_dir={data_dir}", *flags]
    for parallel in ("ddp", "fsdp"):
        two = run_on_ranks(tmp_path / parallel, 2, *flags, f"--parallel={parallel}")
        assert_same_lines(one.train, two.train, ["loss", "grad_norm"])
        for name, weight in one.last.weights.items():
            torch.testing.assert_close(two.last.weights[name], weight, atol=1e-5, rtol=1e-4, msg=name)


class CastCounter(TorchDispatchMode):
    """Counts the elements that are cast to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[torch.Size] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_cast = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to)
        if is_cast and result.dtype != args[0].dtype:
            self.sizes[args[0].shape] += 1
        return result


def test_a_base_in_the_dtype_of_activations_is_never_cast():
    """Neither in training nor in a rollout; a float32 base is, in a rollout once for all tokens."""
    counts = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model().to(dtype)
        model.compute_dtype = torch.bfloat16
        adapt(model, "lora").eval()
        sampling = generation.SamplingParams(max_new_tokens=4, temperature=0.0)
        with CastCounter() as casts:
            generation.generate_batch(model, [[1, 2, 3]], sampling)
            model(ids(1, 8), ids(1, 8)).mean().backward()
        base_shapes = {p.shape for p in model.parameters() if not p.requires_grad}
        counts[dtype] = sum(count for shape, count in casts.sizes.items() if shape in base_shapes)
    assert counts[torch.bfloat16] == 0 and counts[torch.float32] > 4 * 9


def saved_bytes(model: GPT) -> int:
    """What a forward keeps for backward, each storage once, without the parameters."""
    storages: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model(ids(1, 4), ids(1, 4))
        total = sum(storages.values())
    losses.mean().backward()
    return total


def test_no_cast_copy_of_the_base_is_kept_for_backward():
    """A forward in another dtype keeps no more than one in the base's own."""
    kept = []
    for dtype in (torch.float32, torch.bfloat16):
        model = adapt(tiny_model(n_embd=64).to(dtype), "lora")
        kept.append(saved_bytes(model))
    weights = sum(p.numel() for p in tiny_model(n_embd=64).parameters())
    assert kept[1] - kept[0] < 0.1 * 4 * weights  # norms are cast, and small


def test_what_does_not_fit_is_refused(run: Callable, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """By flag: without an adapter there is no frozen base, and float16 has a range."""
    with pytest.raises(SystemExit):
        parse([f"--init_from={base}", "--base_dtype=bfloat16"])
    assert "--base_dtype" in capsys.readouterr().err
    shutil.copytree(base, tmp_path / "large")
    weights = checkpoint.read_tensors(tmp_path / "large/model.safetensors")
    weights["blocks.1.mlp.up.weight"][0, 0] = 1e5
    checkpoint.write_tensors(tmp_path / "large/model.safetensors", weights)
    checkpoint.write_manifest(tmp_path / "large")
    with pytest.raises(UserError, match=r"--base_dtype=float16: blocks.1.mlp.up.weight"):
        run(*LORA, f"--init_from={tmp_path / 'large'}", "--base_dtype=float16")
