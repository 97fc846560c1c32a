"""Linear layers that stream their weights: PyTorch's own products are the witness."""

import copy
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_model

from nanoforge.models import adapters, streamed_linear
from nanoforge.models.generation import SamplingParams, decoding_copy, generate_batch, uniform_draws
from nanoforge.models.streamed_linear import (
    MAX_ROWS,
    MAX_STREAMED,
    TILE_WIDTH,
    PackedLinear,
    StreamedLinear,
    can_pack,
    load_library,
    stream_linears,
)

needs_compiler = pytest.mark.skipif(streamed_linear.load_library() is None, reason="no C compiler with OpenMP here")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(64, 32), (7, 33), (1, 1), (13, 600)])
def test_products_are_pytorchs(weight_dtype: torch.dtype, dtype: torch.dtype, rows: int, cols: int):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator).to(weight_dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    layer = StreamedLinear(weight, bias)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    for batch in (1, MAX_STREAMED, MAX_STREAMED + 1, TILE_WIDTH, TILE_WIDTH + 1, MAX_ROWS, MAX_ROWS + 1):
        x = torch.randn(cols, batch, generator=generator).to(dtype).T[:, None]  # not contiguous
        exact = F.linear(x.double(), weight.double()).to(dtype) + bias
        torch.testing.assert_close(layer(x), exact, atol=tolerance, rtol=1.6e-2)
    if dtype == weight_dtype:
        torch.testing.assert_close(layer(x[:2]), F.linear(x[:2], weight, bias), atol=1e-5, rtol=1.6e-2)


needs_bfloat16 = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this CPU has no bfloat16 instructions")


@needs_bfloat16
@pytest.mark.parametrize(("rows", "cols"), [(64, 32), (7, 33), (1, 1), (13, 600)])
def test_packed_products_are_pytorchs(rows: int, cols: int):
    weight, bias = (torch.randn(shape).to(torch.bfloat16) for shape in ((rows, cols), (rows,)))
    with torch.inference_mode():
        for layer_bias in (bias, None):
            layer = PackedLinear(weight, layer_bias, one_row=None)
            for batch in (1, 2, 16, 17, 200):
                x = torch.randn(cols, batch).to(torch.bfloat16).T[:, None]  # not contiguous
                torch.testing.assert_close(layer(x), F.linear(x, weight, layer_bias), atol=1e-2, rtol=1.6e-2)


@needs_bfloat16
@pytest.mark.parametrize("max_cached", [0, 10**6])
@pytest.mark.parametrize("adapter", ["", "lora"])
def test_a_packed_copy_computes_the_same(max_cached: int, adapter: str, monkeypatch: pytest.MonkeyPatch):
    """With bfloat16 weights, tied or with a LoRA: one row is streamed where all weights stay in the cache."""
    monkeypatch.setattr(streamed_linear, "MAX_CACHED", max_cached)
    model = tiny_model(bias=True, tie_weights=True).eval()
    model.compute_dtype = torch.bfloat16
    if adapter:
        adapters.add_lora(model, ["qkv"], rank=2, alpha=4.0, dropout=0.0)
        adapters.freeze_base(model)
        model.blocks[0].attn.qkv.lora_B.data.normal_()
    copied = decoding_copy(model, streamed=True)
    packed = [module for module in copied.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 4 * 2 + 1
    assert all((layer.one_row is not None) == (max_cached > 0 and load_library() is not None) for layer in packed)
    with torch.inference_mode():
        for shape in ((1, 1), (1, 3), (7, 1), (16, 12)):
            idx = torch.randint(31, shape)
            torch.testing.assert_close(copied(idx), model(idx), atol=3e-2, rtol=3e-2)


@needs_compiler
def test_a_model_samples_as_before(monkeypatch: pytest.MonkeyPatch):
    """Weights that bfloat16 has are kept in it, tied or not; others stay float32. Many rows are PyTorch's."""
    sampling = SamplingParams(max_new_tokens=12, top_k=5, logps=True)
    for tied in (False, True):
        model = tiny_model(tie_weights=tied).eval()
        with torch.no_grad():
            model.blocks[0].mlp.up.weight.copy_(model.blocks[0].mlp.up.weight.to(torch.bfloat16))
        streamed = copy.deepcopy(model)
        stream_linears(streamed)
        for kept in (streamed, decoding_copy(streamed, streamed=True)):
            assert kept.blocks[0].mlp.up.weight.dtype == torch.bfloat16
        assert streamed.head.weight.dtype == streamed.wte.weight.dtype == torch.float32
        for prompts in ([[1, 2, 3]], [[1, 2], [3, 4, 5]] * 4):
            ours = generate_batch(streamed, prompts, sampling, uniform_draws(1))
            expected = generate_batch(model, prompts, sampling, uniform_draws(1))
            assert [completion.ids for completion in ours] == [completion.ids for completion in expected]
            for completion, other in zip(ours, expected, strict=True):
                assert completion.logps == pytest.approx(other.logps, abs=1e-5)


@needs_compiler
@pytest.mark.parametrize("adapter", ["", "lora"])
def test_a_copy_shares_all_tensors_and_computes_the_same(adapter: str):
    """Also of frozen layers and of those with a LoRA; the model itself stays as it is, and learns on."""
    model = tiny_model(bias=True, tie_weights=True).eval()
    if adapter:
        adapters.add_lora(model, ["qkv"], rank=2, alpha=4.0, dropout=0.0)
        adapters.freeze_base(model)
        model.blocks[0].attn.qkv.lora_B.data.normal_()
    copied = decoding_copy(model, streamed=True)
    assert not any(isinstance(module, StreamedLinear) for module in model.modules())
    assert sum(isinstance(module, StreamedLinear) for module in copied.modules()) == 4 * 2 + 1
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
    stream_linears(model)
    assert decoding_copy(model, streamed=True) is model  # nothing is replaced twice


@pytest.mark.parametrize("failure", [OSError("no compiler"), subprocess.CalledProcessError(1, "cc")])
def test_without_a_library_a_model_stays_as_it_is(failure: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(path: Path) -> None:
        raise failure

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(streamed_linear, "build_library", fail)
    monkeypatch.setattr(streamed_linear, "load_library", streamed_linear.load_library.__wrapped__)
    model = tiny_model()
    stream_linears(model)
    assert not any(isinstance(module, StreamedLinear) for module in model.modules())
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_small_numbers_stay_what_they_are():
    """-ffast-math would flush them to zero in the whole process."""
    assert float(torch.tensor(1e-40) * 1) == pytest.approx(1e-40, rel=1e-4)


@needs_compiler
def test_the_library_is_built_once_for_a_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load = streamed_linear.load_library.__wrapped__
    assert load() is not None
    (path,) = tmp_path.rglob("*.so")
    modified = path.stat().st_mtime_ns
    assert load() is not None and path.stat().st_mtime_ns == modified
    monkeypatch.setattr(streamed_linear, "describe_processor", lambda: "another")
    assert streamed_linear.library_path() != path
