"""--quantize_base against bitsandbytes' own layers and peft's QLoRA, and by the identity with the unpacked weights."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import equal_tensors
from torch.autograd.graph import saved_tensors_hooks

from nanoforge.models import adapters, pretrained, quantized
from nanoforge.training import checkpoint
from train_args import parse

bnb: Any = pytest.importorskip("bitsandbytes")
LORA = ["--objective=sft", "--dataset=sums", "--eval_samples=0", "--adapter=lora", "--learning_rate=0.01"]


def unpacked(weight: torch.Tensor, name: str) -> torch.Tensor:
    stored = quantized.QuantizedWeight(weight, name)
    return quantized.FORMATS[name].unpack(stored.packed, stored.scales, torch.float32)


def quantized_linear(weight: torch.Tensor, name: str) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.size(1), weight.size(0), bias=False)
    del linear.weight
    linear.weight = quantized.QuantizedWeight(weight, name)
    return linear


def bnb_linear(weight: torch.Tensor, name: str) -> torch.nn.Module:
    if name == "int8":
        layer = bnb.nn.Linear8bitLt(weight.size(1), weight.size(0), bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        options = {"quant_type": "nf4", "compress_statistics": False}
        layer = bnb.nn.Linear4bit(weight.size(1), weight.size(0), bias=False, compute_dtype=torch.float32, **options)
        layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, **options)
    return layer.to("cpu")


@pytest.mark.parametrize("name", quantized.FORMATS)
def test_a_layer_is_bitsandbytes_own(name: str):
    """Output and gradient of the input; the bytes are counted, and no unpacked weight is kept for backward."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 128) * 0.02, torch.randn(4, 128)
    ours, theirs = adapters.FrozenLinear(quantized_linear(weight, name)), bnb_linear(weight, name)
    results, kept = [], []
    for layer in (ours, theirs):
        x_in = x.clone().requires_grad_()
        with saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor):
            y = layer(x_in)
        y.square().sum().backward()
        results.append((y, x_in.grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-5)
    stored = sum(parameter.nbytes for parameter in ours.parameters())
    assert sum(kept[:2]) == stored
    expected = {"nf4": 0.5 + 4 / 64, "int8": 1 + 4 / 128}[name]
    assert stored / weight.numel() == expected


@pytest.mark.slow
def test_qlora_is_pefts():
    """The same A and B on the same NF4 weight: output and gradients."""
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    torch.manual_seed(0)
    weight, x = torch.randn(96, 128) * 0.02, torch.randn(4, 128)
    ours = adapters.LoraLinear(quantized_linear(weight, "nf4"), rank=4, alpha=8.0, dropout=0.0)
    torch.nn.init.normal_(ours.lora_B)
    theirs = Linear4bit(bnb_linear(weight, "nf4"), "default", config=LoraConfig(r=4, lora_alpha=8), r=4, lora_alpha=8)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.copy_(ours.lora_B)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A["default"].weight.grad)
    torch.testing.assert_close(ours.lora_B.grad, theirs.lora_B["default"].weight.grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", quantized.FORMATS)
def test_a_run_is_that_of_the_unpacked_base(run: Callable, base: Path, tmp_path: Path, name: str):
    """Bit for bit, also resumed; a preference's reference is the quantized base; merged into the source's values."""
    folder = tmp_path / "unpacked"
    shutil.copytree(base, folder)
    weights = checkpoint.read_tensors(folder / "model.safetensors")
    for key, tensor in weights.items():
        if key.startswith("blocks.") and tensor.dim() == 2:
            weights[key] = unpacked(tensor, name)
    checkpoint.write_tensors(folder / "model.safetensors", weights)
    checkpoint.write_manifest(folder)
    flags = [*LORA, "--objective=dpo", "--dataset=pairs", "--max_iters=4", "--eval_interval=2"]
    expected = run(*flags, f"--init_from={folder}", name="expected")
    run(*flags, f"--init_from={base}", f"--quantize_base={name}", "--max_iters=2", name="parts")
    parts = run("--init_from=resume", "--max_iters=4", name="parts")
    assert parts.losses == expected.losses and equal_tensors(parts.last.weights, expected.last.weights)
    last = parts.out_dir / "checkpoints/000004"  # the best one may be another
    before, after = pretrained.load(str(base)).weights, pretrained.load(str(last)).weights
    lora = {end: parts.last.weights[f"blocks.0.mlp.up.lora_{end}"] for end in "AB"}
    change = after["blocks.0.mlp.up.weight"] - before["blocks.0.mlp.up.weight"]
    torch.testing.assert_close(change, 16 / 8 * lora["B"] @ lora["A"], atol=1e-6, rtol=1e-5)


def test_what_is_not_built_is_refused(base: Path, capsys: pytest.CaptureFixture):
    for flags in ([], ["--adapter=lora", "--parallel=fsdp"]):
        with pytest.raises(SystemExit):
            parse([f"--init_from={base}", "--quantize_base=nf4", *flags])
        assert "--quantize_base" in capsys.readouterr().err
