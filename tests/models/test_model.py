"""The model against Hugging Face's GPT-2, torch's own layers, and identities."""

import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY_MODEL, RunFiles, bytes_for_backward, ids, tiny_model
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import builders
import train_args
from model import (
    ACTIVATIONS,
    GPT,
    MLPS,
    NORMS,
    POSITIONS,
    ChunkedLoss,
    GPTConfig,
    NoSoftcap,
    PlainRMSNorm,
    RotaryPosition,
    Softcap,
    TanhSoftcap,
    chunked_attention,
    chunked_loss,
    get_activation,
    visible_keys,
)
from nanoforge.data import tokenization
from nanoforge.errors import UserError
from nanoforge.models import pretrained
from nanoforge.training import checkpoint


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory):
    """A small GPT-2 of random weights in transformers, and its folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=24, n_embd=48, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.mark.parametrize("bare_file", [False, True])
def test_logits_equal_transformers(hugging_face, bare_file):
    theirs, folder = hugging_face
    loaded = pretrained.load(str(folder / "model.safetensors" if bare_file else folder))
    model = GPT(GPTConfig(**loaded.shape)).eval()
    model.load_weights(loaded.weights, "gpt2")
    idx = ids(3, 24, high=97)
    with torch.no_grad():
        assert (model(idx) - theirs(idx).logits).abs().max() < 1e-5
    assert model.count_parameters() == sum(p.numel() for p in theirs.parameters())


VARIANTS = {
    "n_kv_head": 2,
    "head_dim": 8,
    "qkv_bias": True,
    "norm": "rmsnorm_offset",
    "norm_eps": 1e-3,
    "norm_placement": "both",
    "parallel_residual": True,
    "position": "rope",
    "rope_base": 500.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rotary_fraction": 0.5,
    "window_rope_base": 300.0,
    "activation": "relu2",
    "mlp": "gated",
    "qk_norm": True,
    "qk_norm_gain": True,
    "qk_norm_joint": True,
    "attention_scale": 0.5,
    "window": "SL",
    "window_size": 3,
    "logit_softcap": 5.0,
    "softcap": "tanh",
    "embedding_scale": 3.0,
    "embedding_norm": True,
    "value_residual": True,
    "residual_scalars": True,
    "tie_weights": False,
}


@pytest.mark.parametrize("names", [[name] for name in VARIANTS] + [list(VARIANTS)])
def test_every_field_of_the_shape_comes_from_the_weights(
    hugging_face: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture, names: list[str]
):
    """Under a config of variants that GPT-2's weights have not, the logits are transformers'; each is a remark."""
    theirs, folder = hugging_face
    (tmp_path / "variants.json").write_text(json.dumps({name: VARIANTS[name] for name in names}))
    flags = ["--block_size=12", f"--train_file={__file__}", f"--validation_file={__file__}", "--objective=sft"]
    args = train_args.parse([str(tmp_path / "variants.json"), f"--init_from={folder}", *flags])
    remarks = capsys.readouterr().err
    assert all(f"{name} is not used here" in remarks for name in names)

    tokenizers = {"tokens": tokenization.NumberTokenizer(97)}
    model, loaded_shape = builders.build_from_base(args, tokenizers, pretrained.load(str(folder)), [].append)
    idx = ids(3, 12, high=97)
    torch.testing.assert_close(model.eval()(idx), theirs(idx).logits, atol=1e-4, rtol=1e-4)
    assert {name: loaded_shape[name] for name in VARIANTS}.items() <= dataclasses.asdict(model.config).items()


@pytest.mark.parametrize("is_old", [False, True])
def test_derived_sizes_stay_when_weights_are_loaded_with_a_smaller_context(*, is_old: bool):
    """window_size=0 is half of the context that the model was made with, also in the record of an older version."""
    made = tiny_model(window="SL", position="rope", block_size=16)
    shape = dataclasses.asdict(made.config)
    assert (shape["window_size"], shape["n_kv_head"]) == (8, 4)
    if is_old:
        shape |= {"window_size": 0, "n_kv_head": 0}
    weights = {name: parameter.detach() for name, parameter in made.named_parameters()}
    base = pretrained.Pretrained(shape, weights, None)
    args = train_args.TrainArgs(block_size=10, window="SL", init_from="elsewhere")
    smaller, loaded_shape = builders.build_from_base(args, {"tokens": tokenization.NumberTokenizer(31)}, base, print)
    assert (loaded_shape["window_size"], loaded_shape["block_size"]) == (8, 10)
    assert [attn.span for attn in smaller.attention_layers()] == [8, 10]
    assert torch.equal(smaller(ids(2, 10)), made(ids(2, 10)))


@pytest.mark.slow
@pytest.mark.parametrize(("position", "context"), [("rope", 16), ("learned", 8)])
def test_a_run_on_less_than_the_context_of_its_weights_keeps_it(
    run: Callable[..., RunFiles], position: str, context: int
):
    """Rotary positions have no end, learned ones are cropped. A resumed run keeps it; so does what begins with it."""
    first = run("--block_size=16", f"--position={position}", "--max_iters=1", name="first")
    assert pretrained.load(str(first.out_dir)).shape["block_size"] == 16
    loads = [f"--init_from={first.out_dir}", "--block_size=8"]
    for name, flags in (("whole", []), ("lora", ["--adapter=lora"])):
        run(*loads, *flags, "--max_iters=1", name=name)
        done = run("--init_from=resume", "--max_iters=2", name=name)
        assert (done.config["block_size"], done.config["_model"]["block_size"]) == (8, 8)
        assert pretrained.load(str(done.out_dir)).shape["block_size"] == context
    longer = run(f"--init_from={done.out_dir}", "--block_size=16", "--max_iters=1", name="longer")
    assert longer.config["_model"]["block_size"] == context


def test_losses_and_gradients_equal_transformers(hugging_face):
    theirs, folder = hugging_face
    loaded = pretrained.load(str(folder))
    model = GPT(GPTConfig(**loaded.shape)).eval()
    model.load_weights(loaded.weights, "gpt2")
    idx = ids(2, 25, high=97)
    ours = model(idx[:, :-1], idx[:, 1:]).mean()
    reference = theirs(idx[:, :-1]).logits
    reference = F.cross_entropy(reference.flatten(0, 1), idx[:, 1:].flatten())
    assert ours.item() == pytest.approx(reference.item(), rel=1e-6)
    ours.backward()
    reference.backward()
    assert (model.wte.weight.grad - theirs.transformer.wte.weight.grad).abs().max() < 1e-6
    assert (
        model.blocks[1].attn.qkv.weight.grad.t() - theirs.transformer.h[1].attn.c_attn.weight.grad
    ).abs().max() < 1e-6


def test_grouped_heads_equal_repeated_keys_and_values():
    """Llama's attention with 2 of 4 heads equals full attention whose k and v rows are repeated."""
    grouped, full = tiny_model(n_kv_head=2), tiny_model()
    weights = {name: parameter.detach().clone() for name, parameter in grouped.named_parameters()}
    for name in [name for name in weights if "qkv" in name]:
        q, k, v = weights[name].split([32, 16, 16])
        repeat = lambda rows: rows.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)  # noqa: E731
        weights[name] = torch.cat((q, repeat(k), repeat(v)))
    full.load_weights(weights, "test")
    torch.testing.assert_close(grouped(ids(2, 12)), full(ids(2, 12)), atol=1e-5, rtol=1e-5)


def test_modern_block_equals_transformers_llama():
    """RMSNorm, rotary positions, gated SiLU and grouped heads, against LlamaForCausalLM."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=12,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = tiny_model(
        n_kv_head=2, norm="rmsnorm", position="rope", activation="silu", mlp="gated", mlp_ratio=2.0, tie_weights=False
    )
    w, state = {name: p.detach() for name, p in ours.named_parameters()}, {}
    for i in range(2):
        q, k, v = w[f"blocks.{i}.attn.qkv.weight"].split([32, 16, 16])
        names = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": w[f"blocks.{i}.attn.proj.weight"],
            "mlp.gate_proj": w[f"blocks.{i}.mlp.gate.weight"],
            "mlp.up_proj": w[f"blocks.{i}.mlp.up.weight"],
            "mlp.down_proj": w[f"blocks.{i}.mlp.proj.weight"],
            "input_layernorm": w[f"blocks.{i}.norm_1.weight"],
            "post_attention_layernorm": w[f"blocks.{i}.norm_2.weight"],
        }
        state |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in names.items()}
    state |= {
        "model.embed_tokens.weight": w["wte.weight"],
        "model.norm.weight": w["norm.weight"],
        "lm_head.weight": w["head.weight"],
    }
    theirs.load_state_dict(state)
    with torch.no_grad():
        assert (ours(ids(3, 12)) - theirs(ids(3, 12)).logits).abs().max() < 1e-5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("placement", ["pre", "post", "both"])
def test_every_variant_is_causal(norm, position, placement):
    is_post = placement == "post"
    model = tiny_model(
        norm=norm,
        position=position,
        norm_placement=placement,
        parallel_residual=not is_post,
        qk_norm=True,
        qk_norm_gain=is_post,
        qk_norm_joint=is_post,
        window="SL",
        window_size=3,
        window_rope_base=100.0,
        rotary_fraction=0.5,
        logit_softcap=15.0,
        tie_weights=False,
    ).eval()
    idx = ids(1, 12)
    changed = idx.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 31
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.equal(before[:, 7:], after[:, 7:])


def test_norms_equal_torchs_own():
    x = torch.randn(3, 5, 32)
    layer_norm = NORMS["layernorm"](dataclasses.replace(TINY_MODEL, bias=True), 32)
    torch.testing.assert_close(layer_norm(x), torch.nn.LayerNorm(32)(x))
    torch.testing.assert_close(NORMS["rmsnorm"](TINY_MODEL, 32)(x), torch.nn.RMSNorm(32, eps=1e-5)(x))
    no_gain = NORMS["rmsnorm_nogain"](TINY_MODEL, 32)
    torch.testing.assert_close(no_gain(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    assert not list(no_gain.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rms_norm_of_few_passes_equals_torchs(dtype):
    torch.manual_seed(0)
    x, upstream = torch.randn(3, 5, 16).to(dtype).requires_grad_(), torch.randn(3, 5, 16).to(dtype)
    theirs = F.rms_norm(x, (16,), eps=1e-5)
    expected = torch.autograd.grad(theirs, x, upstream)[0]
    ours = PlainRMSNorm(TINY_MODEL, 16)(x)
    tolerance = {"atol": 0.04, "rtol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(torch.autograd.grad(ours, x, upstream)[0], expected, **tolerance)


def test_rms_norm_in_bfloat16_is_as_exact_as_torchs():
    """Root mean square errors against float64: 0.0017 of the value, once rounded."""
    torch.manual_seed(0)
    x = torch.randn(64, 96).bfloat16()
    exact = F.rms_norm(x.double(), (96,), eps=1e-5)

    def error(y: torch.Tensor) -> float:
        return float((y.double() - exact).norm() / exact.norm())

    ours = PlainRMSNorm(TINY_MODEL, 96)(x)
    assert error(ours) <= 1.01 * error(F.rms_norm(x, (96,), eps=1e-5)) < 0.002


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"logit_softcap": 5.0, "loss_chunk": 3},
        {"vocabulary": "separate", "vocab_sizes": (20, 11), "tie_weights": False},
    ],
)
@pytest.mark.parametrize("part", [0.5, 0.0])
def test_masked_losses_are_those_of_all_tokens(variant: dict, part: float):
    """On a CPU the head reads the tokens in the mask alone; without any, there is no loss and no gradient."""
    model = tiny_model(**variant)
    idx, mask = ids(2, 12) % 11, torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) < part
    for temperature in (1.0, 0.7):
        if model.config.loss_chunk and temperature != 1:
            continue
        losses = model(idx, idx, logits_at=mask, temperature=temperature)
        expected = model(idx, idx, temperature=temperature) * mask
        torch.testing.assert_close(losses, expected)
        gradients, expected_gradients = (
            torch.autograd.grad(values.sum(), list(model.parameters())) for values in (losses, expected)
        )
        torch.testing.assert_close(gradients, expected_gradients, atol=1e-6, rtol=1e-4)


def test_rotary_scores_depend_on_distance_alone():
    rotary = RotaryPosition(dataclasses.replace(TINY_MODEL, block_size=64))
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def turned(x: torch.Tensor, positions: slice | torch.Tensor) -> torch.Tensor:
        return rotary.rotate(x, *rotary.angles(positions, x.dtype))

    def score(i: int, j: int) -> float:
        return (turned(q, slice(i, i + 1)) * turned(k, torch.tensor([j]))).sum().item()

    assert score(5, 2) == pytest.approx(score(43, 40), abs=1e-5) and score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)
    assert turned(q, slice(17, 18)).norm().item() == pytest.approx(q.norm().item(), rel=1e-6)
    first = turned(torch.eye(8)[:1].view(1, 1, 1, 8), slice(1, 2)).flatten().tolist()
    assert (first[0], first[4]) == pytest.approx((math.cos(1), math.sin(1)))


def test_window_sees_its_last_tokens_alone():
    """One layer, window 3: a change 3 tokens back has no effect, 2 back it has; without a window it has."""
    for window, back, same in (("S", 3, True), ("S", 2, False), ("L", 11, False)):
        model = tiny_model(n_layer=1, window=window, window_size=3, position="rope").eval()
        idx = ids(1, 12)
        changed = idx.clone()
        changed[0, 11 - back] = (changed[0, 11 - back] + 1) % 31
        assert torch.equal(model(idx)[:, -1], model(changed)[:, -1]) is same


def test_window_pattern_repeats_over_the_layers():
    model = tiny_model(n_layer=5, window="SSL", window_size=4)
    assert [block.attn.span for block in model.blocks] == [4, 4, 12, 4, 4]


@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "mish", "tanh", "hardswish", "softplus"])
def test_activations_of_torch_go_by_their_names(name):
    x = torch.randn(50)
    assert torch.equal(get_activation(name)(x), getattr(F, name)(x))


def test_own_activations():
    x = torch.randn(50)
    torch.testing.assert_close(ACTIVATIONS["relu2"](x), x.clamp(min=0) ** 2)
    cubic = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(ACTIVATIONS["gelu_tanh"](x), cubic)
    for name in ("no_such", "cross_entropy", "_in_projection", "siluu"):
        with pytest.raises(UserError, match="--activation"):
            get_activation(name)
    with pytest.raises(UserError, match="did you mean silu"):
        get_activation("siluu")


def test_gated_mlp_by_hand():
    mlp = MLPS["gated"](dataclasses.replace(TINY_MODEL, activation="silu", mlp_ratio=2.0, bias=True))
    x = torch.randn(4, 32)
    by_hand = (
        F.silu(x @ mlp.gate.weight.t() + mlp.gate.bias) * (x @ mlp.up.weight.t() + mlp.up.bias)
    ) @ mlp.proj.weight.t() + mlp.proj.bias
    torch.testing.assert_close(mlp(x), by_hand)
    assert mlp.up.weight.shape == (64, 32)


def test_softcap_is_bounded_with_slope_one():
    z = torch.tensor([-1e4, -1e-3, 0.0, 1e-3, 15.0, 1e4], dtype=torch.float64)
    capped = Softcap(15.0)(z.float())
    assert capped.abs().max() < 15 + 1e-4 and capped[3].item() == pytest.approx(1e-3, rel=1e-5)
    assert capped[4].item() == pytest.approx(15 / math.sqrt(2))


def test_qk_norm_bounds_the_scores():
    """Queries and keys scaled by a thousand change nothing once they are normalised."""
    model = tiny_model(qk_norm=True).eval()
    before = model(ids(2, 12))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:64] *= 1000
    torch.testing.assert_close(model(ids(2, 12)), before, atol=1e-3, rtol=1e-3)


def test_initial_weights():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY_MODEL, n_embd=256, head_dim=0, n_layer=8, vocab_sizes=(4000,), bias=True))
    std = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert std["wte.weight"] == pytest.approx(0.02, rel=0.02) and std["blocks.3.mlp.up.weight"] == pytest.approx(
        0.02, rel=0.02
    )
    assert std["blocks.3.mlp.proj.weight"] == pytest.approx(0.02 / 4, rel=0.02)
    assert model(ids(2, 12), ids(2, 12, seed=2)).mean().item() == pytest.approx(math.log(4000), rel=0.02)
    zero = GPT(dataclasses.replace(TINY_MODEL, zero_init=True, tie_weights=False))
    assert zero(ids(2, 12)).abs().max() == 0 and zero.wte.weight.abs().max() > 0


def test_tied_head_is_the_embedding_and_untied_is_not():
    tied, untied = tiny_model(), tiny_model(tie_weights=False)
    assert tied.head.weight is tied.wte.weight and "head.weight" not in dict(tied.named_parameters())
    assert untied.count_parameters() - tied.count_parameters() == 31 * 32


def test_one_context_equals_the_plain_model():
    plain, contexts = tiny_model(), tiny_model(vocabulary="contexts")
    idx, targets = ids(2, 12), ids(2, 12, seed=2)
    assert torch.equal(plain(idx), contexts(idx[:, None])) and torch.equal(
        plain(idx, targets), contexts(idx[:, None], targets[:, None])[:, 0]
    )


def test_contexts_have_their_own_softmax():
    model = tiny_model(vocab_sizes=(31, 7), vocabulary="contexts")
    idx = torch.stack((ids(2, 12), 31 + ids(2, 12, high=7)), 1)
    losses, logits = model(idx, idx), model(idx)
    first = F.cross_entropy(logits[..., :31].flatten(0, 1), idx[:, 0].flatten(), reduction="none").view(2, 12)
    second = F.cross_entropy(logits[..., 31:].flatten(0, 1), idx[:, 1].flatten() - 31, reduction="none").view(2, 12)
    torch.testing.assert_close(losses, torch.stack((first, second), 1))


def test_separate_vocabularies_ignore_each_others_rows():
    model = tiny_model(vocab_sizes=(31, 7), vocabulary="separate")
    idx = torch.stack((ids(12), 31 + ids(12, high=7)))
    losses, logits = model(idx, idx), model(idx)
    torch.testing.assert_close(losses[0], F.cross_entropy(logits[0, :, :31], idx[0], reduction="none"))
    torch.testing.assert_close(losses[1], F.cross_entropy(logits[1, :, 31:], idx[1] - 31, reduction="none"))


def test_bfloat16_activations_stay_near_float32():
    model = tiny_model(tie_weights=False, norm="rmsnorm", position="rope").eval()
    exact = model(ids(2, 12))
    model.compute_dtype = torch.bfloat16
    rough = model(ids(2, 12))
    assert rough.dtype == torch.bfloat16 and (rough.float() - exact).norm() / exact.norm() < 0.02
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("T", "span", "chunk", "kv"), [(12, 12, 128, 4), (12, 12, 5, 2), (37, 8, 10, 4), (64, 64, 16, 1), (9, 1, 4, 4)]
)
def test_chunked_attention_equals_torchs_own(T, span, chunk, kv, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("model.CHUNK", chunk)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 8, dtype=torch.float64, requires_grad=True) for heads in (4, kv, kv))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    theirs = F.scaled_dot_product_attention(q, k, v, (distance >= 0) & (distance < span), enable_gqa=True)
    upstream = torch.randn_like(theirs)
    expected = torch.autograd.grad(theirs, (q, k, v), upstream)
    visible = visible_keys(slice(0, T), span, q.device, cached=False)
    ours = chunked_attention(visible, q, k, v, 8**-0.5, 0.0)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, (q, k, v), upstream), expected)


def test_attention_in_bfloat16_on_cpu_goes_by_chunks(monkeypatch: pytest.MonkeyPatch):
    """The fast path is taken, and is as near to float32 as torch's own."""
    import model as module

    calls = []
    monkeypatch.setattr(module, "chunked_attention", lambda *args: calls.append(args) or chunked_attention(*args))
    model = tiny_model(position="rope", window="SL", window_size=4, n_kv_head=2)
    branches = torch.tensor([[*range(6), *range(3, 9)], [*range(4), *range(8)]])
    exact = [model(ids(2, 12), position_ids=positions) for positions in (None, branches)]
    assert not calls
    model.compute_dtype = torch.bfloat16
    for positions, expected in zip((None, branches), exact, strict=True):
        rough = model(ids(2, 12), position_ids=positions).float()
        assert (rough - expected).norm() / expected.norm() < 0.02 and len(calls) == 2
        calls.clear()


@pytest.mark.parametrize(
    ("softcap", "chunk"),
    [(NoSoftcap(), 7), (NoSoftcap(), 1000), (Softcap(3.0), 5), (Softcap(15.0), 24), (TanhSoftcap(3.0), 5)],
)
def test_chunked_loss_equals_the_plain_one(softcap, chunk):
    torch.manual_seed(0)
    x = torch.randn(2, 12, 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(31, 8, dtype=torch.float64, requires_grad=True)

    def plain():
        return F.cross_entropy(softcap(x @ head.T).flatten(0, 1), ids(2, 12).flatten(), reduction="none")

    upstream = torch.rand(2, 12, dtype=torch.float64)
    expected = torch.autograd.grad(plain(), (x, head), upstream.flatten())
    ours = chunked_loss(x, head, ids(2, 12), softcap, chunk)
    torch.testing.assert_close(ours.flatten(), plain(), check_dtype=False, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, head), upstream), expected, atol=1e-5, rtol=1e-4)


def test_model_with_chunked_loss_learns_the_same():
    for changes in ({}, {"tie_weights": False, "logit_softcap": 4.0}):
        gradients = []
        for chunk in (0, 5):
            model = tiny_model(loss_chunk=chunk, **changes)
            model(ids(2, 12), ids(2, 12, seed=3)).mean().backward()
            gradients.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


class HeadGradients(TorchDispatchMode):
    """The values in each gradient of a head that the chunked loss computes."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.nanoforge.chunked_loss_backward.default:
            self.sizes.append(result[1].numel())
        return result


@pytest.mark.parametrize("trains_head", [True, False], ids=["trained", "frozen"])
def test_chunked_loss_keeps_no_logits_for_backward_eager_and_compiled(trains_head):
    """Traced into, forward and backward would share the logits, 8 MB here. A frozen head gets no gradient."""
    compiled = torch.compile(chunked_loss, backend="aot_eager_decomp_partition", dynamic=False, fullgraph=True)
    targets = torch.randint(4096, (4, 128), generator=torch.Generator().manual_seed(0))
    gradients = []
    for function in (chunked_loss, compiled):
        torch.manual_seed(0)
        x = torch.randn(4, 128, 16, requires_grad=True)
        head = torch.randn(4096, 16, requires_grad=trains_head)
        loss = function(x, head, targets, Softcap(15.0), 64).mean()
        assert bytes_for_backward(loss) < 2**19
        with HeadGradients() as head_gradients:
            loss.backward()
        assert head_gradients.sizes == [head.numel() if trains_head else 0]
        gradients.append([tensor.grad for tensor in (x, head) if tensor.requires_grad])
    torch.testing.assert_close(*gradients)


def test_compiled_chunks_are_the_eager_ones(monkeypatch: pytest.MonkeyPatch):
    """What a GPU computes in a compiled model, here by another compiler: two graphs, whatever the number of tokens."""
    import model as module

    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(module, "compile_chunk", lambda function: torch.compile(function, backend=backend))
    for n_tokens in (12, 9, 17):
        torch.manual_seed(n_tokens)
        x, head, grad = torch.randn(1, n_tokens, 8), torch.randn(31, 8), torch.rand(1, n_tokens)
        eager, compiled = (ChunkedLoss(Softcap(3.0), 5, is_compiled) for is_compiled in (False, True))
        targets = ids(1, n_tokens)
        torch.testing.assert_close(compiled.forward(x, head, targets), eager.forward(x, head, targets))
        backward = [loss.backward(grad, x, head, targets, trains_head=True) for loss in (compiled, eager)]
        torch.testing.assert_close(*backward)
    assert backend.frame_count <= 4, "of each of the two functions"


def test_value_residual_mixes_in_the_first_layers_values():
    """With share 0 the model is the plain one; with share 1 only the first layer's values have an effect."""
    plain, mixed = tiny_model(), tiny_model(value_residual=True)
    mixed.load_state_dict(plain.state_dict(), strict=False)
    values = mixed.blocks[1].attn.qkv.weight[64:]
    for part, same in ((0.0, True), (1.0, False)):
        mixed.blocks[1].attn.first_values.data.fill_(part)
        assert torch.allclose(mixed(ids(2, 12)), plain(ids(2, 12)), atol=1e-6) is same
    before = mixed(ids(2, 12))
    values.data.mul_(3.0)
    assert torch.equal(mixed(ids(2, 12)), before)


def test_residual_scalars_scale_the_stream_and_the_embedding():
    """(1, 0) is the plain block; (0, 1) in the second one makes it the only one."""
    plain, scaled, second = tiny_model(), tiny_model(residual_scalars=True), tiny_model(n_layer=1)
    scaled.load_state_dict(plain.state_dict(), strict=False)
    second.load_state_dict(
        {
            name.replace("blocks.1.", "blocks.0."): value
            for name, value in plain.state_dict().items()
            if "blocks.0." not in name
        }
    )
    for scales, other in (((1.0, 0.0), plain), ((0.0, 1.0), second)):
        scaled.blocks[0].scales.data.copy_(torch.tensor([1.0, 0.0]))
        scaled.blocks[1].scales.data.copy_(torch.tensor(scales))
        torch.testing.assert_close(scaled(ids(2, 12)), other(ids(2, 12)))


def test_embedding_norm_forgets_the_embeddings_size():
    model = tiny_model(embedding_norm=True, position="rope", tie_weights=False)
    before = model(ids(2, 12))
    model.wte.weight.data.mul_(100)
    torch.testing.assert_close(model(ids(2, 12)), before, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_inductors_kernels_are_the_eager_model():
    eager, compiled = tiny_model(n_layer=1), tiny_model(n_layer=1)
    compiled.compile_forward()
    with torch.no_grad():
        inputs = (ids(2, 12), ids(2, 12, seed=3))
        torch.testing.assert_close(compiled(*inputs), eager(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_parts_are_the_eager_model_and_keep_logits_once(monkeypatch: pytest.MonkeyPatch):
    """Eager, backward gets the head's products, the softcap's results and log-probabilities; compiled, one of them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    shape = {"vocab_sizes": (2000,), "block_size": 64, "logit_softcap": 5.0, "value_residual": True}
    eager, compiled = tiny_model(**shape), tiny_model(**shape)
    compiled.compile_forward()
    idx, targets = ids(2, 64), ids(2, 64, seed=3, high=2000)
    results = []
    for model in (eager, compiled):
        losses = model(idx, targets)
        n_bytes = bytes_for_backward(losses.mean())
        losses.mean().backward()
        results.append((n_bytes, losses, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(results[1][1:], results[0][1:], atol=1e-5, rtol=1e-5)
    logits = 2 * 64 * 2000 * 4
    assert results[0][0] - results[1][0] > 2.5 * logits


def test_weights_that_dont_fit_are_named():
    model = tiny_model()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match=r"norm.weight is \(3,\) in the weights and \(32,\)"):
        model.load_weights(weights | {"norm.weight": torch.ones(3)}, "here")
    with pytest.raises(UserError, match=r"the weights have no norm\.weight"):
        model.load_weights({name: tensor for name, tensor in weights.items() if name != "norm.weight"}, "here")


def test_longer_positions_are_cropped():
    model, short = tiny_model(), tiny_model(seed=5, block_size=6)
    short.load_weights({name: parameter.detach() for name, parameter in model.named_parameters()}, "here")
    torch.testing.assert_close(short(ids(2, 12)[:, :6]), model(ids(2, 12))[:, :6])


def nanogpt_weights(model: GPT) -> dict[str, torch.Tensor]:
    """By the names of nanoGPT's ckpt.pt, compiled prefix included."""
    back = {"position.": "wpe.", "norm.": "ln_f."}
    theirs = {}
    for name, parameter in model.named_parameters():
        old = (
            name.replace("blocks.", "h.")
            .replace(".norm_", ".ln_")
            .replace(".attn.qkv.", ".attn.c_attn.")
            .replace(".mlp.up.", ".mlp.c_fc.")
            .replace(".proj.", ".c_proj.")
        )
        for ours, nano in back.items():
            old = nano + old.removeprefix(ours) if old.startswith(ours) else old
        theirs[f"_orig_mod.transformer.{old}"] = parameter.detach()
    return theirs | {"_orig_mod.lm_head.weight": model.wte.weight.detach().clone()}


def test_nanogpt_checkpoint_loads_without_executing_anything(tmp_path: Path):
    """Names and layout of nanoGPT's ckpt.pt; a pickle with code is refused."""
    model = tiny_model(bias=True)
    theirs = nanogpt_weights(model)
    torch.save({"model": theirs, "model_args": {"n_head": 4, "n_layer": 2}}, tmp_path / "ckpt.pt")
    loaded = pretrained.load(str(tmp_path / "ckpt.pt"))
    again = GPT(GPTConfig(**loaded.shape))
    again.load_weights(loaded.weights, "ckpt.pt")
    assert torch.equal(again(ids(2, 12)), model(ids(2, 12)))

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"model": Evil(), "model_args": {}}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a checkpoint of nanoGPT"):
        pretrained.load(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("place", ["out/meta.pkl", "data/letters/meta.pkl"])
def test_nanogpts_characters_come_along(tmp_path: Path, place: str) -> None:
    """From the meta.pkl beside ckpt.pt, or where nanoGPT keeps it; one of another size is left out with a remark."""
    chars = "".join(map(chr, range(ord("A"), ord("A") + 31)))
    stoi = {char: i for i, char in enumerate(chars)}
    for folder in ("out", "data/letters"):
        (tmp_path / folder).mkdir(parents=True)
    saved = {
        "model": nanogpt_weights(tiny_model(bias=True)),
        "model_args": {"n_head": 4},
        "config": {"dataset": "letters"},
    }
    torch.save(saved, tmp_path / "out/ckpt.pt")
    remarks: list[str] = []
    assert pretrained.load(str(tmp_path / "out/ckpt.pt"), remarks.append).tokenizers is None
    assert "meta.pkl" in remarks.pop()
    with pytest.raises(UserError, match="--init_from"):
        checkpoint.resolve(tmp_path / "out", "best")
    meta = {"vocab_size": 31, "stoi": stoi, "itos": {i: char for char, i in stoi.items()}}
    (tmp_path / place).write_bytes(pickle.dumps(meta))
    for path in ("out/ckpt.pt", "out"):  # nanoGPT's out_dir as well
        (tokenizer,) = pretrained.load(str(tmp_path / path), remarks.append).tokenizers.values()
        assert tokenizer.encode("CAB^").tolist() == [stoi[char] for char in "CAB^"] and not remarks
        assert tokenizer.decode([30, 0]) == "_A"
    (tmp_path / place).write_bytes(pickle.dumps(meta | {"vocab_size": 30}))
    assert pretrained.load(str(tmp_path / "out/ckpt.pt"), remarks.append).tokenizers is None
    assert "30" in remarks[0] and "31" in remarks[0]


def test_the_heads_of_gpt2_without_config_are_no_silent_guess(tmp_path: Path) -> None:
    """64 wide as every GPT-2 has them, with a remark; refused where that can't be; else as config.json says."""
    remarks: list[str] = []
    for n_embd, n_head in ((128, 4), (96, 3)):
        folder = tmp_path / str(n_embd)
        folder.mkdir()
        save_file(nanogpt_weights(tiny_model(n_embd=n_embd)), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"n_head": n_head}))
        assert pretrained.load(str(folder), remarks.append).shape["n_head"] == n_head and not remarks
        (folder / "config.json").unlink()
    assert pretrained.load(str(tmp_path / "128"), remarks.append).shape["n_head"] == 2
    assert "config.json" in remarks[0] and "2 heads" in remarks[0]
    with pytest.raises(UserError, match="n_embd=96"):
        pretrained.load(str(tmp_path / "96"), remarks.append)
