"""Models in .gguf files: they give transformers' logits, and llama.cpp gives ours."""

import dataclasses
import io
import json
import random
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SHARED, TEXT, RunFiles, run_script

from builders import load_model
from model import GPT, GPTConfig
from nanoforge.data import gguf_metadata, model_tokenizers, tokenization, tokenizer_export
from nanoforge.errors import UserError
from nanoforge.models import gguf_export, gguf_files, hf_export, pretrained
from nanoforge.models.family import TensorMap
from nanoforge.posttraining.example_rows import ROLES

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
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, tuple[str, Any]] = {  # name -> architecture of .gguf files, a config of transformers
    "llama": ("llama", lambda: transformers.LlamaConfig(**GROUPED, rope_parameters=LLAMA3)),
    "llama, tied": ("llama", lambda: transformers.LlamaConfig(**GROUPED, head_dim=16, tie_word_embeddings=True)),
    "qwen2, yarn": ("qwen2", lambda: transformers.Qwen2Config(**GROUPED, rope_parameters=YARN)),
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
    if config.model_type == "qwen2":
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
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
    server = llama.Server(params)
    server.handle_completions({"prompt": [1], "n_predict": 1})  # one that ends before its loop has begun hangs
    return server


def complete(server: Any, prompt: str, banned: Sequence[int]) -> tuple[int, list[tuple[int, torch.Tensor]]]:
    """The number of prompt tokens, and each id of llama.cpp's greedy completion with the log-probabilities of all.

    banned: ids that are not taken. Parts of characters would be: the server drops their log-probabilities.
    """
    request = {"prompt": prompt, "n_predict": 8, "temperature": 0, "n_probs": 999, "ignore_eos": True}
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


def test_gains_that_are_1_plus_an_offset_come_back_bit_by_bit():
    """All magnitudes and signs of a float32 offset: what a file can hold as the sum is what is written again."""
    magnitudes = 2.0 ** torch.arange(-40, 20, dtype=torch.float32)
    offsets = (torch.randn(2000, 1, generator=torch.Generator().manual_seed(0)) * magnitudes).flatten()
    stored = TensorMap("norm.offset", ["output_norm.weight"], shift=1.0)
    gains = 1 + offsets
    (again,) = stored.split(stored.join([gains]), {}).values()
    assert torch.equal(again, gains)


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

TEXTS = (
    "the quick brown fox",
    " the  lazy dog ",
    "naïve café, 1,000 € in 2024: don't I'M",
    "日本語 👩‍🚀\u200d \u00a0",
    "\n\n\tdef f(x):\r\n    return x + 1\n\n\n",
    "<|endoftext|> <|user|>",
    "".join(random.Random(0).choices("aeionrst ", k=300)),  # where the order of merges matters
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(pattern: str, *, use_regex: bool = False) -> tokenization.Tokenizer:
    """A trained byte-level BPE whose text is split by a pattern, and with use_regex by GPT-2's behind it."""
    spec = tokenizer_export.to_spec(tokenization.BPETokenizer.train([TEXT * 3], V))
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    parts = [split, {**spec["pre_tokenizer"], "use_regex": use_regex}]
    return tokenization.BPETokenizer({**spec, "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}})


def sentencepiece_bpe() -> tokenization.Tokenizer:
    return tokenization.SentencePieceTokenizer(train_sentencepiece("bpe"))


def train_sentencepiece(model_type: str) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text().splitlines()),
        model_writer=model,
        vocab_size=700,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return model.getvalue()


def llama_bpe() -> tokenization.Tokenizer:
    """SentencePiece's BPE as the `tokenizers` library has it, with merges in place of scores."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece("bpe"))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    scored = [(pieces.get_score(i), token) for token, i in vocab.items() if len(token) > 1 and i > 258]
    merges = [
        [token[:cut], token[cut:]]
        for _, token in sorted(scored, reverse=True)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>", "byte_fallback": True}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders = [{**replace, "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = tokenization.BPETokenizer(
        {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": pieces.id_to_piece(i), **special} for i in range(3)],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": model,
        }
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer.adopt(tokenization.ControlTokens(2, 1, (2,), added_ids=ids, special_tokens=names))
    return tokenizer


def with_chat() -> tokenization.Tokenizer:
    return tokenization.add_tokens(tokenization.BPETokenizer.train([TEXT * 3], V), list(ROLES.values()))


TOKENIZERS = {
    "gpt-2": lambda: tokenization.BPETokenizer.train([TEXT * 3], V),
    "smollm": lambda: split_by(r"\p{N}", use_regex=True),
    "qwen2": lambda: split_by(QWEN_SPLIT),
    "bytes": tokenization.ByteTokenizer,
    "chat": with_chat,
    "sentencepiece": sentencepiece_bpe,
    "llama": llama_bpe,
}


def export_with(tokenizer: tokenization.Tokenizer, path: Path, kind: str = "f32", n_unused_rows: int = 0) -> GPT:
    """A tiny random Llama with a tokenizer, as a file."""
    sizes = {
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 32,
        "block_size": 64,
        "vocab_sizes": (tokenizer.vocab_size + n_unused_rows,),
    }
    config = GPTConfig(norm="rmsnorm", position="rope", mlp="gated", activation="silu", tie_weights=False, **sizes)
    torch.manual_seed(0)
    model = GPT(config).eval()
    template = tokenizer_export.chat_template_of(tokenizer, ROLES)
    weights = dict(model.named_parameters())
    gguf_export.export(hf_export.HFModel(dataclasses.asdict(config), weights, tokenizer), path, kind, template)
    return model


def post(server: Any, place: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{server.listening_address}/{place}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return json.loads(reply.read())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_gives_our_ids(tmp_path: Path, name: str):
    tokenizer = TOKENIZERS[name]()
    path = tmp_path / "x.gguf"
    export_with(tokenizer, path, n_unused_rows=6)
    server = serve(path)
    back = model_tokenizers.from_gguf(gguf_metadata.read_metadata(path))
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert post(server, "tokenize", content=text, parse_special=False)["tokens"] == ids, text
        assert back.encode(text).tolist() == ids
    assert (back.eos_id, back.end_ids, back.bos_id) == (tokenizer.eos_id, tokenizer.end_ids, tokenizer.bos_id)
    assert back.vocab_size == tokenizer.vocab_size


def test_llama_cpp_writes_our_chats(tmp_path: Path):
    tokenizer = with_chat()
    export_with(tokenizer, tmp_path / "x.gguf")
    prompt = post(serve(tmp_path / "x.gguf"), "apply-template", messages=[{"role": "user", "content": "fox"}])["prompt"]
    assert prompt == "<|user|>fox<|endoftext|><|assistant|>"


def test_what_llama_cpp_lacks_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "x.gguf"
    unigram = tokenization.SentencePieceTokenizer(train_sentencepiece("unigram"))
    other_split = split_by(r"[a-m]+|[n-z]+|\s+|[^a-z\s]+")
    for tokenizer, part in ((tokenization.CharTokenizer("ab"), "char"), (unigram, "Unigram"), (other_split, "gpt-2")):
        with pytest.raises(UserError, match=part):
            export_with(tokenizer, path)
    tokenizer = tokenization.ByteTokenizer()
    for fields, parts in (
        ({"value_residual": True}, ["llama", "--value_residual=True"]),
        (
            {"position": "rope", "norm": "rmsnorm", "rotary_fraction": 0.5, "mlp": "gated", "activation": "silu"},
            ["llama", "--rotary_fraction=0.5"],
        ),
        ({"vocabulary": "contexts"}, ["--multicontext"]),
    ):
        config = GPTConfig(vocab_sizes=(257,), n_layer=1, n_head=2, n_embd=8, **fields)
        model = hf_export.HFModel(dataclasses.asdict(config), {}, tokenizer)
        with pytest.raises(UserError) as error:
            gguf_export.export(model, path, "f32", "")
        assert all(part in str(error.value) for part in parts)
    assert not path.exists()


@pytest.mark.parametrize("kind", gguf_export.TYPES)
def test_matrices_have_the_type_that_was_asked_for(tmp_path: Path, kind: str):
    """Near our logits in llama.cpp; vectors stay float32, and the vocabulary's rows have 8 bits in place of 4 or 5."""
    tokenizer = tokenization.ByteTokenizer()
    path = tmp_path / "x.gguf"
    model = export_with(tokenizer, path, kind)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    of_words = kind.replace("q4_0", "q8_0").replace("q4_1", "q8_0").replace("q5_0", "q8_0").replace("q5_1", "q8_0")
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.0.ffn_up.weight"] == kind.upper()
    assert kinds["token_embd.weight"] == kinds["output.weight"] == of_words.upper()
    assert kinds["blk.0.ffn_norm.weight"] == "F32"
    bound = {"f32": 1e-4, "f16": 2e-3, "bf16": 2e-2}.get(kind, 0.1)
    check_llama_cpp(path, model, tokenizer, atol=bound)


# ---------------------------------------------------------------------------------------------------------------------
# whole


@pytest.mark.slow
def test_a_lora_on_a_gguf_becomes_a_gguf(run: Callable[..., RunFiles], tmp_path: Path):
    """Chats bring rows of new tokens; llama.cpp has the merged model's logits, and the ids of our chats."""
    base, merged = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    export_with(tokenization.BPETokenizer.train([TEXT * 3], V), base)
    chat = {"messages": [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    files = [f"--{split}_file={tmp_path}/chats.jsonl" for split in ("train", "validation")]
    flags = ["--objective=sft", "--adapter=lora", f"--init_from={base}", "--learning_rate=1e-2", "--block_size=32"]
    done = run(*flags, *files, "--eval_samples=0")
    run_script("gguf", done.out_dir, "--type=f32", f"--to={merged}", script="export.py")
    ours, trained = load_model("resume", str(done.out_dir)), load_model(str(merged))
    (tokenizer,) = ours.tokenizers.values()
    assert tokenizer.vocab_size == V + 3 == len(trained.model.wte.weight)
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), trained.model.parameters(), strict=True))
    check_llama_cpp(merged, ours.model, tokenizer, atol=1e-4)
    (back,) = trained.tokenizers.values()
    text = "<|user|>the fox<|endoftext|><|assistant|>"
    assert np.array_equal(back.encode_with_control(text).ids, tokenizer.encode_with_control(text).ids)
    refused = run_script("gguf", done.out_dir, f"--to={merged}", script="export.py", check=False)
    assert refused.returncode == 2 and "--to" in refused.stderr


@pytest.mark.slow
def test_flags_of_another_action_are_refused(tmp_path: Path):
    for argv, parts in (
        (["gguf", tmp_path, "--dtype=bfloat16", "--to=x"], ["--dtype", "--type", "--to=x", ".gguf"]),
        (["merge", tmp_path, "--type=f32", f"--to={tmp_path}/x"], ["--type", "gguf"]),
    ):
        done = run_script(*argv, script="export.py", check=False)
        assert done.returncode == 2 and all(part in done.stderr for part in parts)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs SmolLM2 in ../shared, which is missing")
def test_smollm2_from_its_folder():
    """4-bit matrices, whose query and key heads are in llama.cpp's order, and 8-bit words that are the head too."""
    loaded = pretrained.load(str(SMOLLM2.parent))
    config = GPTConfig(**loaded.shape)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_kv_head, config.head_dim) == (30, 576, 9, 3, 64)
    assert (config.rope_base, config.norm_eps, config.tie_weights, config.block_size) == (1e5, 1e-5, True, 8192)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(SMOLLM2).tensors if "blk.29.attn" in tensor.name}
    q, k, v = (tensors[f"blk.29.attn_{part}.weight"] for part in "qkv")
    q, k, v = (torch.from_numpy(gguf.quants.dequantize(part.data, part.tensor_type)) for part in (q, k, v))
    rows = loaded.weights["blocks.29.attn.qkv.weight"].split([576, 192, 192])
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    llama = transformers.LlamaConfig(hidden_size=576, num_attention_heads=9)
    for ours, theirs, name in zip(rows, (q, k, v), names, strict=True):
        assert torch.equal(convert(name, ours, llama), theirs)
