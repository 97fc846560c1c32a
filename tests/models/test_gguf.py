"""Models in .gguf files: they give transformers' logits, and llama.cpp gives ours."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SHARED, TEXT

from builders import load_model
from nanoforge.data import tokenization
from nanoforge.errors import UserError
from nanoforge.models import gguf_export, gguf_files, hf_export, pretrained

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SMOLLM2 = SHARED / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
V = 300
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2_SIZES = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, tuple[str, Any]] = {  # name -> architecture of .gguf files, a config of transformers
    "llama": ("llama", lambda: transformers.LlamaConfig(**GROUPED, rope_parameters=LLAMA3)),
    "llama, tied": ("llama", lambda: transformers.LlamaConfig(**GROUPED, head_dim=16, tie_word_embeddings=True)),
    "qwen2": ("qwen2", lambda: transformers.Qwen2Config(**GROUPED)),
    "qwen3": ("qwen3", lambda: transformers.Qwen3Config(**GROUPED, head_dim=16)),
    "olmo2": ("olmo2", lambda: transformers.Olmo2Config(**GROUPED)),
    "arcee": ("arcee", lambda: transformers.ArceeConfig(**GROUPED)),
    "gemma3": (
        "gemma3",
        lambda: transformers.Gemma3TextConfig(
            **GROUPED,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=4,
            layer_types=LAYER_TYPES,
            rope_parameters=GEMMA_ROPES,
        ),
    ),
    "gpt_neox": ("gptneox", lambda: transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.5)),
    "starcoder2": ("starcoder2", lambda: transformers.Starcoder2Config(**GROUPED, sliding_window=None)),
    "gpt2": ("gpt2", lambda: transformers.GPT2Config(**GPT2_SIZES)),
}


def build_witness(config: Any) -> Any:
    """A model of transformers with random weights in every place, norms and biases too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def convert(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """What llama.cpp's converter does to the values of a tensor of transformers."""
    if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.t()
    if config.model_type in ("llama", "arcee") and name.endswith(("q_proj.weight", "k_proj.weight")):
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        return tensor.view(-1, 2, head_dim // 2, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
    if config.model_type == "gpt_neox" and "query_key_value" in name:
        heads = tensor.view(config.num_attention_heads, 3, -1, *tensor.shape[1:])
        return heads.transpose(0, 1).reshape(tensor.shape)
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return tensor + 1
    return tensor


def metadata_of(config: Any) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes, beside the sizes."""
    keys: dict[str, Any] = {}
    if config.model_type in ("gpt2", "gpt_neox", "starcoder2"):
        eps = [getattr(config, name, None) for name in ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")]
        keys["attention.layer_norm_epsilon"] = next(value for value in eps if value is not None)
    else:
        keys["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if config.model_type == "gpt_neox":
        keys |= {"use_parallel_residual": True, "rope.dimension_count": 4}
    if config.model_type == "gemma3_text":
        keys |= {"attention.sliding_window": config.sliding_window, "attention.sliding_window_pattern": 2}
        keys |= {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    elif config.model_type != "gpt2":
        keys["rope.freq_base"] = 10000.0
    if getattr(config, "head_dim", None):
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    keys["attention.head_count_kv"] = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return keys


def write_witness(
    path: Path, architecture: str, model: Any, tensors: Mapping[str, np.ndarray] | None = None, **keys: int
) -> None:
    """The model as llama.cpp's converter would have it, by gguf's own names of tensors and keys; with more of both."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    hidden = getattr(config, "intermediate_size", 4 * config.hidden_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(config.num_attention_heads)
    for key, value in {**metadata_of(config), **keys}.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = getattr(config, "tie_word_embeddings", False)
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(theirs, convert(name, tensor, config).float().contiguous().numpy())
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        tensors = {**(tensors or {}), "rope_freqs.weight": llama3_factors(config)}
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(config: Any) -> np.ndarray:
    """How much slower transformers' scaled RoPE turns."""
    scale = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    scaled, _ = scale(config, "cpu")
    head_dim = config.hidden_size // config.num_attention_heads
    plain = 10000.0 ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / scaled).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_every_family_gives_the_logits_of_transformers(tmp_path: Path, name: str):
    architecture, config = MODELS[name]
    witness = build_witness(config())
    write_witness(tmp_path / "model.gguf", architecture, witness)
    ours = load_model(str(tmp_path)).model
    idx = torch.randint(V, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = witness(idx).logits
        torch.testing.assert_close(ours(idx), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


KINDS = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_tensor_has_the_values_of_gguf(tmp_path: Path, kind: str):
    """Random blocks of each type, against gguf's own reader."""
    qtype = gguf.GGMLQuantizationType[kind]
    n_per_block, n_bytes = gguf.GGML_QUANT_SIZES[qtype]
    blocks = np.random.default_rng(0).integers(0, 64, (3, 256 // n_per_block * n_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("other", np.zeros(5, dtype=np.float32))
    writer.add_tensor("x", blocks, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (_, theirs) = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
    ours = gguf_files.GGUFReader([tmp_path / "x.gguf"]).read("x").numpy()
    assert ours.shape == (3, 256) and ours.std() > 0
    np.testing.assert_array_equal(ours, expected.astype(np.float32))


def test_files_that_the_model_has_no_place_for_are_refused_by_name(tmp_path: Path):
    witness = build_witness(transformers.LlamaConfig(**GROUPED))
    path = tmp_path / "model.gguf"

    def refused(*parts: str) -> None:
        with pytest.raises(UserError) as error:
            pretrained.load(str(path))
        assert all(part in str(error.value) for part in (str(path), *parts))

    write_witness(path, "llama", witness, expert_count=8)
    refused("llama.expert_count=8")
    write_witness(path, "llama", witness, {"blk.1.ssm_a": np.zeros(32, dtype=np.float32)})
    refused("blk.1.ssm_a")
    write_witness(path, "deci", witness)
    refused("deci", "llama")
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    refused("GGUF")
    path.write_bytes(b"PK" + whole[2:])
    refused("GGUF")
    write_witness(path, "llama", witness)
    path.write_bytes(path.read_bytes()[:-1000])
    weights = pretrained.load(str(path)).weights
    with pytest.raises(UserError, match=str(path)):
        [weights[name] for name in weights]


def test_a_folder_of_several_models_asks_for_one_of_them(tmp_path: Path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"a\.gguf, b\.gguf"):
        pretrained.load(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# out

PROMPTS = ("the quick brown fox", "pack my box with 12 jugs, don't\n")


@pytest.fixture(scope="module")
def tokenizer() -> tokenization.Tokenizer:
    return tokenization.BPETokenizer.train([TEXT * 3 + "0123456789 don't"], V)


def serve(path: Path) -> Any:
    """llama.cpp with a file, its cache in float32."""
    llama = pytest.importorskip("xllamacpp")
    params = llama.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 64
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = params.fit_params = False
    params.verbosity = -1
    return llama.Server(params)


def complete(server: Any, prompt: str, banned: Sequence[int]) -> tuple[int, list[tuple[int, torch.Tensor]]]:
    """The number of prompt tokens, and each id of llama.cpp's greedy completion with the log-probabilities of all.

    banned: ids that are not taken. Parts of characters would be: the server drops their log-probabilities.
    """
    request = {"prompt": prompt, "n_predict": 8, "temperature": 0, "n_probs": V, "ignore_eos": True}
    reply = server.handle_completions({**request, "logit_bias": [[i, False] for i in banned], "cache_prompt": False})
    steps = []
    for step in reply["choices"][0]["logprobs"]["content"]:
        by_id = {choice["id"]: choice["logprob"] for choice in step["top_logprobs"]}
        steps.append((step["id"], torch.tensor([by_id[i] for i in range(len(by_id))])))
    return reply["usage"]["prompt_tokens"], steps


def check_llama_cpp(path: Path, model: Any, tokenizer: tokenization.Tokenizer, atol: float) -> None:
    """Greedy completions of llama.cpp begin with our ids, and have our log-probabilities at every step."""
    server = serve(path)
    banned = [i for i in range(tokenizer.vocab_size) if not tokenizer.decode([i]).isascii()]
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).tolist()
        n_prompt, steps = complete(server, prompt, banned)
        assert n_prompt == len(ids) and len(steps) == 8
        for token, theirs in steps:
            with torch.no_grad():
                ours = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
            torch.testing.assert_close(theirs, ours, rtol=0, atol=atol)
            ids.append(token)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    reader = gguf_files.GGUFReader([path])
    return {name: reader.read(name) for name in reader.places}


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_our_logits(tmp_path: Path, name: str, tokenizer: tokenization.Tokenizer):
    """From a file that is made as llama.cpp's converter makes it, and back to the same tensors bit by bit."""
    architecture, config = MODELS[name]
    before, after = tmp_path / "before.gguf", tmp_path / "after.gguf"
    write_witness(before, architecture, build_witness(config()))
    loaded = load_model(str(before)).model
    shape = dataclasses.asdict(loaded.config)
    weights = pretrained.load(str(before)).weights
    written = gguf_export.export(hf_export.HFModel(shape, weights, tokenizer), after, "f32", "")
    assert written == architecture
    expected, tensors = tensors_of(before), tensors_of(after)
    assert expected.keys() == tensors.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    keys = {key for key in gguf_files.GGUFReader([before]).metadata if key.startswith(architecture)}
    assert keys <= gguf_files.GGUFReader([after]).metadata.keys()
    check_llama_cpp(after, loaded, tokenizer, atol=1e-2 if "gelu" in loaded.config.activation else 1e-4)
