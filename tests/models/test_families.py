"""Families of open models against transformers' own small models of random weights, in and out."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import ROOT, SHARED
from safetensors.torch import save_file
from torch import Tensor

import train_args
from model import GPT, ROPE_SCALINGS, GPTConfig
from nanoforge.errors import UserError
from nanoforge.models import families, hf_settings, pretrained, weight_files
from nanoforge.models.generation import KVCache, SamplingParams, generate_batch

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
UNGROUPED = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def with_base(scaling: Mapping[str, Any], base: float = 5e3) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": base, **scaling}}


GEMMA_SIZES = {**SIZES, "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 6}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 64}),
    "gpt2_clone": (
        "GPT2Config",
        {
            **{"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97, "n_positions": 64, "n_inner": 80},
            **{"activation_function": "gelu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
        },
    ),
    "llama": ("LlamaConfig", SIZES),
    "llama_linear": ("LlamaConfig", {**SIZES, **with_base({"rope_type": "linear", "factor": 4.0})}),
    "llama3": ("LlamaConfig", {**SIZES, "head_dim": 16, "tie_word_embeddings": True, **with_base(LLAMA3_ROPE)}),
    "llama_yarn": ("LlamaConfig", {**SIZES, "head_dim": 16, **with_base(YARN_ROPE)}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 7}),
    "qwen2": ("Qwen2Config", {**SIZES, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen2_whole": ("Qwen2Config", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 16}),
    "arcee": ("ArceeConfig", {**SIZES, "head_dim": 16}),
    "olmo2": ("Olmo2Config", SIZES),
    "nanochat": ("NanoChatConfig", SIZES),
    "gemma3": ("Gemma3TextConfig", {**GEMMA_SIZES, "query_pre_attn_scalar": 24, "final_logit_softcapping": 20.0}),
    "starcoder2": ("Starcoder2Config", {**SIZES, "sliding_window": 9}),
    "starcoder2_whole": ("Starcoder2Config", {**SIZES, "sliding_window": None, "tie_word_embeddings": False}),
    "gpt_neox": ("GPTNeoXConfig", UNGROUPED),
    "gpt_neox_sequential": (
        "GPTNeoXConfig",
        {
            **UNGROUPED,
            "hidden_size": 64,
            "use_parallel_residual": False,
            **with_base(
                {**YARN_ROPE, "beta_fast": 8, "mscale": 0.7, "mscale_all_dim": 0.5, "partial_rotary_factor": 0.5}
            ),
        },
    ),
}
FIRST_CASE = {CASES[name][0]: name for name in reversed(CASES)}  # one of each family, for the slower tests
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


class Pair(NamedTuple):
    theirs: Any
    ours: GPT
    folder: Path
    loaded: pretrained.Pretrained


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Their model and ours of a case, each made once."""

    @cache
    def make(case: str) -> Pair:
        name, settings = CASES[case]
        torch.manual_seed(0)
        theirs = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings, **NO_TOKENS))
        theirs = theirs.float().eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp(case)
        theirs.save_pretrained(folder, max_shard_size="40kB" if case == "llama3" else "5GB")
        loaded = pretrained.load(str(folder))
        ours = GPT.from_weights(GPTConfig(**loaded.shape), loaded.weights, case).eval()
        return Pair(theirs, ours, folder, loaded)

    return make


def token_ids(*shape: int) -> Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_transformers_also_through_the_cache(pair: Any, case: str):
    theirs, ours, *_ = pair(case)
    idx = token_ids(2, 40)
    expected = theirs(idx).logits
    torch.testing.assert_close(ours(idx), expected, atol=1e-5, rtol=1e-4)
    cache = KVCache(ours, 2, 64)
    parts = [ours(idx[:, :30], cache=cache, position_ids=cache.advance(30))]
    parts += [ours(idx[:, i : i + 1], cache=cache, position_ids=cache.advance(1)) for i in range(30, 40)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_losses_of_right_padded_batches_equal_transformers(pair: Any, case: str):
    theirs, ours, *_ = pair(case)
    idx, lengths = token_ids(3, 25), torch.tensor([25, 11, 2])
    mask = torch.arange(25) < lengths[:, None]
    expected = theirs(idx, attention_mask=mask.long(), labels=idx.masked_fill(~mask, -100)).loss
    losses = ours(idx[:, :-1], idx[:, 1:])[mask[:, 1:]]
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("case", sorted(FIRST_CASE.values()))
def test_greedy_completions_of_left_padded_batches_equal_transformers(pair: Any, case: str):
    theirs, ours, *_ = pair(case)
    prompts = [token_ids(3, 12)[row, : [12, 3, 7][row]].tolist() for row in range(3)]
    padded = torch.tensor([[0] * (12 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (12 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = theirs.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    completions = generate_batch(ours, prompts, SamplingParams(max_new_tokens=12, temperature=0))
    assert [completion.ids for completion in completions] == expected[:, 12:].tolist()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_model_goes_out_as_it_came_in(pair: Any, case: str, tmp_path: Path):
    """Tensors bit for bit, config to the same shape; and transformers takes what is written for the same model."""
    theirs, _, folder, loaded = pair(case)
    family = families.FAMILIES[theirs.config.model_type]
    config = json.loads(json.dumps(family.write_config(loaded.shape)))
    assert family.read_config(config) == loaded.shape

    reader = weight_files.open_weights(folder)
    written = dict(family.write_tensors(loaded.weights, loaded.shape))
    assert reader.names() - {"lm_head.weight"} == written.keys() - {"lm_head.weight"}
    for name, tensor in written.items():
        assert torch.equal(tensor, reader.read(name)), name
    again = family.read_tensors(weight_files.TensorsReader(written), loaded.shape)
    assert all(torch.equal(again[name], loaded.weights[name]) for name in loaded.weights)

    save_file(written, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    copy, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    idx = token_ids(2, 40)
    assert torch.equal(copy.eval()(idx).logits, theirs(idx).logits)


OLD_FILES: list[dict[str, Any]] = [
    {"model_type": "llama", **SIZES, "rope_theta": 700.0, "rope_scaling": None, "torch_dtype": "bfloat16"},
    {"model_type": "llama", **SIZES, "rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"model_type": "llama", **SIZES, "rope_theta": 700.0, "rope_scaling": LLAMA3_ROPE},
    {"model_type": "llama", **UNGROUPED, "rope_theta": 700.0, "pretraining_tp": 1},
    {"model_type": "mistral", **SIZES, "rope_theta": 700.0, "sliding_window": None},
    {
        **{"model_type": "qwen2", **SIZES, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
        **{"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, "rope_theta": 70.0},
    },
    {"model_type": "qwen2", **SIZES, "use_sliding_window": False, "sliding_window": 5, "max_window_layers": 2},
    {
        "model_type": "qwen3",
        **SIZES,
        "head_dim": 16,
        "sliding_window": 5,
        "max_window_layers": 1,
        "rope_scaling": {"rope_type": "yarn", "factor": 2},
    },
    {
        **{"model_type": "gemma3_text", **GEMMA_SIZES, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24},
        **{"rope_theta": 7e5, "rope_local_base_freq": 70.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    },
    {"model_type": "gpt_neox", **UNGROUPED, "rotary_pct": 0.5, "rotary_emb_base": 700},
]


@pytest.mark.parametrize("old", OLD_FILES, ids=lambda old: old["model_type"])
def test_older_files_are_read_as_transformers_reads_them(old: dict[str, Any]):
    """transformers' own translation of an old config.json to today's settings gives the same shape."""
    family = families.family_of(old)
    settings = {name: value for name, value in old.items() if name != "model_type"}
    new = transformers.AutoConfig.for_model(old["model_type"], **json.loads(json.dumps(settings))).to_dict()
    assert "rope_theta" not in new and "rotary_pct" not in new, "it is translated"
    assert family.read_config(old) == family.read_config(new)


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_scaled_frequencies_of_a_real_size_equal_transformers(rope_type: str):
    """Of heads of 128 at Qwen's base, where the small models' ramps are too short to see all of a formula."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    numbers = {**LLAMA3_ROPE, "rope_type": rope_type, "factor": 4.0, "original_max_position_embeddings": 43000}
    names = ("rope_type", *hf_settings.ROPE_TYPES[rope_type])
    parameters = {"rope_theta": 1e6, **{name: numbers[name] for name in names if name in numbers}}
    config = transformers.LlamaConfig(**{**SIZES, "head_dim": 128, "rope_parameters": parameters})
    expected, factor = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu")
    scaling = hf_settings.read_rope(config.to_dict())["rope_scaling"]
    frequency = 1e6 ** (-torch.arange(0, 128, 2).float() / 128)
    torch.testing.assert_close(ROPE_SCALINGS[rope_type](frequency, scaling), expected, atol=0, rtol=1e-5)
    assert scaling.get("attention_factor", 1.0) == pytest.approx(factor)


def test_the_table_of_arguments_has_the_numbers_of_each_scaling():
    assert (
        hf_settings.ROPE_TYPES == train_args.ROPE_SCALING_NUMBERS
        and hf_settings.ROPE_TYPES.keys() == ROPE_SCALINGS.keys()
    )


LLAMA = {"model_type": "llama", **SIZES}
REFUSED = [
    ({**LLAMA, "attention_bias": True}, "attention_bias=True"),
    ({**LLAMA, "mlp_bias": True}, "mlp_bias=True"),
    ({**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
    ({**LLAMA, "rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type=longrope"),
    ({**LLAMA, "rope_scaling": {"type": "linear"}}, "rope_type=linear has no factor"),
    ({**LLAMA, "rope_scaling": {**YARN_ROPE, "truncate": False}}, "truncate=false"),
    ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, "quantization_config .gptq."),
    ({**LLAMA, "num_local_experts": 8}, "num_local_experts=8: mixtures of experts"),
    ({**LLAMA, "model_type": "qwen2_5"}, "model_type=qwen2_5 .*did you mean qwen2"),
    ({**LLAMA, "model_type": "mamba"}, "model_type=mamba .*gpt2, llama"),
    ({"model_type": "llama"}, "has no max_position_embeddings|vocab_size"),
    ({"model_type": "gemma3_text", **GEMMA_SIZES, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ({"model_type": "starcoder2", **SIZES, "use_bias": False}, "use_bias=False"),
    ({"model_type": "qwen3", **SIZES, "layer_types": ["linear_attention"] * 3}, "linear_attention"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_settings_that_the_model_lacks_are_refused_by_name(
    pair: Any, tmp_path: Path, config: dict[str, Any], message: str
):
    (tmp_path / "model.safetensors").write_bytes((pair("llama").folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}.*({message})"):
        pretrained.load(str(tmp_path))


def test_tensors_without_a_place_and_missing_ones_are_named(pair: Any, tmp_path: Path):
    theirs, _, folder, _ = pair("llama")
    tensors = {name: tensor.detach().clone() for name, tensor in theirs.state_dict().items()}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())

    def load(tensors: dict[str, Tensor]) -> GPT:
        save_file(tensors, tmp_path / "model.safetensors")
        loaded = pretrained.load(str(tmp_path))
        return GPT.from_weights(GPTConfig(**loaded.shape), loaded.weights, "here")

    load(tensors | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)})  # older files have this buffer
    with pytest.raises(UserError, match=r"no place for the tensor model\.layers\.0\.mlp\.router\.weight$"):
        load(tensors | {"model.layers.0.mlp.router.weight": torch.zeros(8, 32)})
    with pytest.raises(UserError, match=r"the model has no blocks\.0\.attn\.proj\.bias"):
        load(tensors | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(32)})
    k_proj = "model.layers.2.self_attn.k_proj.weight"
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}: the weights have no {k_proj}"):
        load({name: tensor for name, tensor in tensors.items() if name != k_proj})
    with pytest.raises(UserError, match=r"the weights have no norm\.weight"):
        load({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"})


def test_the_first_family_that_holds_a_model_is_its_own(pair: Any):
    """Or an equal one: what is written is chosen by shape alone."""
    for case in CASES:
        theirs, _, _, loaded = pair(case)
        family, reasons = families.fitting_family(loaded.shape)
        assert family is not None, reasons
        assert family.model_type == theirs.config.model_type or case in ("mistral",), (case, family.model_type)


# ---------------------------------------------------------------------------------------------------------------------
# real weights

SMOLLM2 = SHARED / "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PEAK = """
import sys
import builders
def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
open("/proc/self/clear_refs", "w").write("5")  # the peak is that from here on
before = kilobytes("VmRSS")
model = builders.load_model(sys.argv[1]).model
total = sum(float(parameter.sum()) for parameter in model.parameters())
print((kilobytes("VmHWM") - before) * 1024 / (4 * model.count_parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs SmolLM2 in ../shared, which is missing")
def test_smollm2_writes_what_transformers_writes_within_its_memory(tmp_path: Path):
    """From a folder as transformers has it: greedy text equals, and bfloat16 weights peak below 1.3 x the model."""
    pytest.importorskip("gguf")
    loaded = pretrained.load(str(SMOLLM2))
    assert loaded.tokenizers is not None
    tokenizer = next(iter(loaded.tokenizers.values()))
    config = families.FAMILIES["llama"].write_config(loaded.shape)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        tensors = families.FAMILIES["llama"].write_tensors(loaded.weights, loaded.shape)
        save_file({key: tensor.to(dtype) for key, tensor in tensors}, tmp_path / name / "model.safetensors")

    texts = ["The capital of France is", "Once upon a time", "def add(a, b):\n    return a + b\n\ndef subtract("]
    prompts = [tokenizer.encode(text).tolist() for text in texts]
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float32")
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(padded, attention_mask=mask, **options)[:, width:]
    again = pretrained.load(str(tmp_path / "float32"))
    ours = GPT.from_weights(GPTConfig(**again.shape), again.weights, "SmolLM2").eval()
    completions = generate_batch(ours, prompts, SamplingParams(max_new_tokens=24, temperature=0))
    assert [tokenizer.decode(ids) for ids in expected.tolist()] == [tokenizer.decode(each.ids) for each in completions]
    assert "Paris" in tokenizer.decode(completions[0].ids)

    command = [sys.executable, "-c", PEAK, str(tmp_path / "bfloat16")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert 1 <= float(done.stdout) < 1.3
