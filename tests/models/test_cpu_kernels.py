"""Layers in C for decoding: PyTorch's own are the witness."""

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_model

from model import NORMS
from nanoforge.models import adapters, cpu_kernels
from nanoforge.models.cpu_kernels import (
    MAX_ROWS,
    MAX_STREAMED,
    TILE_ROWS,
    StreamedLinear,
    fused_attention,
    fused_norm,
    has_amx,
    has_kernels,
    stream_layers,
)
from nanoforge.models.generation import KVCache, SamplingParams, decoding_copy, generate_batch, uniform_draws

needs_compiler = pytest.mark.skipif(cpu_kernels.load_library() is None, reason="no C compiler with OpenMP here")


DTYPES = [torch.float32, torch.bfloat16]
FUSED = ("fused_norm", "fused_attention")


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(64, 32), (7, 33), (1, 1), (13, 600), (37, 602), (16, 70)])
def test_products_are_pytorchs(weight_dtype: torch.dtype, dtype: torch.dtype, rows: int, cols: int):
    """For every kernel: few rows of x, tiles, and with AMX columns in pairs; a tile of columns or of rows in part."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator).to(weight_dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    layer = StreamedLinear(weight, bias)
    assert layer.is_paired == (has_amx() and weight_dtype == torch.bfloat16 and rows >= 16 and cols % 2 == 0)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    for batch in (1, MAX_STREAMED, MAX_STREAMED + 1, TILE_ROWS, TILE_ROWS + 1, MAX_ROWS, MAX_ROWS + 1):
        x = torch.randn(cols, batch, generator=generator).to(dtype).T[:, None]  # not contiguous
        exact = F.linear(x.double(), weight.double()).to(dtype) + bias
        torch.testing.assert_close(layer(x), exact, atol=tolerance, rtol=1.6e-2)
    if dtype == weight_dtype:
        torch.testing.assert_close(layer(x[:2]), F.linear(x[:2], weight, bias), atol=1e-5, rtol=1.6e-2)


def test_bfloat16_is_left_to_pytorch_where_it_alone_has_amx(monkeypatch: pytest.MonkeyPatch):
    """As with an old compiler, or where the system forbids it."""
    monkeypatch.setattr(cpu_kernels, "load_library", object)
    for amx_of_processor, amx_of_library, expected in ((True, True, True), (True, False, False), (False, False, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx_of_processor: {"amx_bf16": amx})
        monkeypatch.setattr(cpu_kernels, "has_amx", lambda amx=amx_of_library: amx)
        assert has_kernels(torch.bfloat16) == expected
        assert has_kernels(torch.float32)
        assert not has_kernels(torch.float16)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["rmsnorm", "rmsnorm_nogain", "rmsnorm_offset"])
def test_norms_are_the_models(norm: str, dtype: torch.dtype):
    """Few numbers and many, of rows that are not a number of registers."""
    layer = NORMS[norm](tiny_model(norm_eps=1e-3).config, 37)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    fused = copy.deepcopy(layer)
    fused.fused_norm = fused_norm
    with torch.inference_mode():
        for shape in ((1, 1, 37), (3, 5, 2, 37), (40, 50, 37)):
            x = 3 * torch.randn(shape).to(dtype)
            expected = layer(x)
            torch.testing.assert_close(fused(x), expected, atol=1e-6, rtol=2e-6 if dtype == torch.float32 else 2e-2)
            assert dtype == torch.float32 or (fused(x) == expected).float().mean() > 0.9  # rounded as often


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "variant",
    [
        {"position": "learned"},
        {"position": "rope", "n_head": 4, "n_kv_head": 2, "attention_scale": 200.0},
        {"position": "rope", "rotary_fraction": 0.5, "n_head": 2, "n_kv_head": 1, "head_dim": 64},
        {"position": "rope", "window": "SL", "window_size": 5, "window_rope_base": 100.0, "head_dim": 128},
        {"position": "none", "qk_norm": True, "value_residual": True},
    ],
)
def test_attention_of_one_token_is_the_models(variant: dict[str, Any], dtype: torch.dtype):
    """Of sequences of their own lengths, or of one length: the output, and what the cache holds then."""
    model = tiny_model(block_size=32, **variant).eval()
    model.compute_dtype = dtype
    streamed = copy.deepcopy(model)
    for attention in streamed.attention_layers():
        attention.fused_attention = fused_attention
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    with torch.inference_mode():
        for positions in (slice(9, 10), torch.tensor([[3], [9], [11]])):
            caches = [KVCache(model, 3, 16) for _ in range(2)]
            for cache, network in zip(caches, (model, streamed), strict=True):
                network(torch.arange(27).view(3, 9), cache=cache, position_ids=cache.advance(9))
                cache.advance(3)
            logits = [
                network(torch.tensor([[1], [2], [3]]), cache=cache, position_ids=positions)
                for cache, network in zip(caches, (model, streamed), strict=True)
            ]
            torch.testing.assert_close(logits[1], logits[0], **tolerance)
            for layer, expected in zip(caches[1].layers, caches[0].layers, strict=True):
                torch.testing.assert_close(layer, expected, **tolerance)


@needs_compiler
def test_a_model_samples_as_before(monkeypatch: pytest.MonkeyPatch):
    """Weights that bfloat16 has are kept in it, tied or not; others stay float32. Many rows are PyTorch's."""
    sampling = SamplingParams(max_new_tokens=12, top_k=5, logps=True)
    for tied in (False, True):
        model = tiny_model(tie_weights=tied).eval()
        with torch.no_grad():
            model.blocks[0].mlp.up.weight.copy_(model.blocks[0].mlp.up.weight.to(torch.bfloat16))
        streamed = copy.deepcopy(model)
        stream_layers(streamed)
        for kept in (streamed, decoding_copy(streamed, streamed=True)):
            assert kept.blocks[0].mlp.up.weight.dtype == torch.bfloat16
        assert streamed.head.weight.dtype == streamed.wte.weight.dtype == torch.float32
        for prompts in ([[1, 2, 3]], [[1, 2], [3, 4, 5]] * 4):
            ours = generate_batch(streamed, prompts, sampling, uniform_draws(1))
            expected = generate_batch(model, prompts, sampling, uniform_draws(1))
            assert [completion.ids for completion in ours] == [completion.ids for completion in expected]
            for completion, other in zip(ours, expected, strict=True):
                assert completion.logps == pytest.approx(other.logps, abs=1e-5)


def count_replaced(model: Any) -> list[int]:
    """Linear layers, norms and attention layers that are the library's."""
    modules = list(model.modules())
    fused = [sum(getattr(module, name, None) is not None for module in modules) for name in FUSED]
    return [sum(isinstance(module, StreamedLinear) for module in modules), *fused]


def small_model(adapter: str) -> Any:
    model = tiny_model(bias=True, tie_weights=True, norm="rmsnorm").eval()
    if adapter:
        adapters.add_lora(model, ["qkv"], rank=2, alpha=4.0, dropout=0.0)
        adapters.freeze_base(model)
        model.blocks[0].attn.qkv.lora_B.data.normal_()
    return model


@needs_compiler
@pytest.mark.parametrize("adapter", ["", "lora"])
def test_a_copy_in_bfloat16_computes_the_same(adapter: str):
    model = small_model(adapter)
    model.compute_dtype = torch.bfloat16
    copied = decoding_copy(model, streamed=True)
    assert any(isinstance(module, StreamedLinear) for module in copied.modules()) == has_kernels(torch.bfloat16)
    with torch.inference_mode():
        for shape in ((1, 1), (1, 3), (7, 1), (16, 12)):
            idx = torch.randint(31, shape)
            torch.testing.assert_close(copied(idx), model(idx), atol=3e-2, rtol=3e-2)


@needs_compiler
@pytest.mark.parametrize("adapter", ["", "lora"])
def test_a_copy_shares_all_tensors_and_computes_the_same(adapter: str):
    """Also of frozen layers and of those with a LoRA; the model itself stays as it is, and learns on."""
    model = small_model(adapter)
    copied = decoding_copy(model, streamed=True)
    assert count_replaced(model) == [0, 0, 0]
    assert count_replaced(copied) == [4 * 2 + 1, 2 * 2 + 1, 2]
    used = []
    for module in copied.modules():
        if isinstance(module, StreamedLinear):
            module.register_forward_hook(lambda module, *_: used.append(module))
    places = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in copied.parameters()} == places
    for update in (0.0, 0.1):  # the copy sees what the model has learned
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += update
            for shape in ((1, 3), (7, 1), (5, 4), (16, 12)):
                idx = torch.randint(31, shape)
                torch.testing.assert_close(copied(idx), model(idx), atol=1e-4, rtol=1e-4)
    assert len(set(used)) == 4 * 2 + 1
    model(idx, idx).mean().backward()
    stream_layers(model)
    assert decoding_copy(model, streamed=True) is model  # nothing is replaced twice


@pytest.mark.parametrize("failure", [OSError("no compiler"), subprocess.CalledProcessError(1, "cc")])
def test_without_a_library_a_model_stays_as_it_is(failure: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(path: Path) -> None:
        raise failure

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_kernels, "build_library", fail)
    monkeypatch.setattr(cpu_kernels, "load_library", cpu_kernels.load_library.__wrapped__)
    model = tiny_model(norm="rmsnorm").eval()
    stream_layers(model)
    assert count_replaced(model) == [0, 0, 0]
    assert decoding_copy(model, streamed=True) is model
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_small_numbers_stay_what_they_are():
    """-ffast-math would flush them to zero in the whole process."""
    assert float(torch.tensor(1e-40) * 1) == pytest.approx(1e-40, rel=1e-4)


@needs_compiler
def test_the_library_is_built_once_for_a_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load = cpu_kernels.load_library.__wrapped__
    assert load() is not None
    (path,) = tmp_path.rglob("*.so")
    modified = path.stat().st_mtime_ns
    assert load() is not None and path.stat().st_mtime_ns == modified
    monkeypatch.setattr(cpu_kernels, "describe_processor", lambda: "another")
    assert cpu_kernels.library_path() != path
