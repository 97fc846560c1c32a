"""export.py hf: transformers loads what was written, without this program, and computes what ours does."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_script
from safetensors.torch import load_file

import model as model_module
import train_args
from builders import load_model
from model import GPT, GPTConfig
from nanoforge.data import tokenizer_export
from nanoforge.data.tokenization import BPETokenizer, CharTokenizer, ControlTokens, Tokenizer
from nanoforge.errors import UserError
from nanoforge.models import hf_export, pretrained
from nanoforge.models.hf_export import HFModel, Program
from nanoforge.posttraining.example_rows import ROLES
from nanoforge.posttraining.examples import ExampleEncoder
from train_args import TrainArgs

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("hf_modules")

PROGRAM = Program(Path(model_module.__file__).read_text(), vars(TrainArgs))
CHARS = CharTokenizer("abcdefghijklmnopqrstuvw\n", has_eos=True)
GPT2_SHAPE = {"bias": True}
CUSTOM = "NanoforgeForCausalLM"
TINY_SHAPE = {"n_layer": 3, "n_head": 4, "n_kv_head": 0, "n_embd": 32, "head_dim": 0, "block_size": 32}
# How each preset is exported; docs/export.md has the same table. Those with a base have its shape.
PRESETS = {
    "depth": CUSTOM,
    "gpt2_124m": "GPT2LMHeadModel",
    "gpt2_124m_modern": CUSTOM,
    "llama": "LlamaForCausalLM",
    "modern": CUSTOM,
    "modern_base": CUSTOM,
    "quickstart": CUSTOM,
    "shakespeare_cpu": "NanoChatForCausalLM",
    "shakespeare_gpu": CUSTOM,
    "sliding": CUSTOM,
    "arithmetic_sft": CUSTOM,
    "strings_sft": CUSTOM,
    "gpt2_finetune": "GPT2LMHeadModel",
    "gsm8k_grpo": "LlamaForCausalLM",
    "quick_test": "LlamaForCausalLM",
    "arithmetic_dpo": CUSTOM,
    "arithmetic_grpo": CUSTOM,
    "arithmetic_kto": CUSTOM,
    "strings_prompt": CUSTOM,
}
BASES = {"arithmetic_dpo": "arithmetic_sft", "arithmetic_grpo": "arithmetic_sft", "arithmetic_kto": "arithmetic_sft"}
BASES |= {"strings_prompt": "strings_sft", "gsm8k_grpo": "llama", "quick_test": "llama"}


def preset_shape(name: str) -> dict:
    """The shape of a preset, tiny."""
    args = train_args.parse([str(ROOT / f"configs/{BASES.get(name, name)}.py")])
    shape = dataclasses.asdict(GPTConfig.from_args(args, vocab_sizes=(CHARS.vocab_size,)))
    if args.init_from == "gpt2":
        shape |= GPT2_SHAPE
    if shape["n_kv_head"] != shape["n_head"]:
        shape |= {"n_kv_head": 2}
        return shape | {name: value for name, value in TINY_SHAPE.items() if name != "n_kv_head"}
    return shape | TINY_SHAPE


def random_model(shape: Mapping) -> GPT:
    """A model of a shape with no parameter at a value that hides it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape)).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    return model


def write(to: Path, model: GPT, tokenizer: Tokenizer | None = CHARS, **options) -> hf_export.Written:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    hf_model = HFModel(dataclasses.asdict(model.config), weights, tokenizer)
    settings = {"dtype": torch.float32, "max_bytes": 10**9, **options}
    to.mkdir()
    return hf_export.write_model(to, hf_model, PROGRAM, **settings)


def load(folder: Path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def test_every_preset_is_listed():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == PRESETS.keys()
    assert all(PRESETS[name] == PRESETS[base] for name, base in BASES.items())


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in BASES])
@torch.no_grad()
def test_presets_give_our_logits(name: str, tmp_path: Path):
    """Whole, and token by token from a cache behind padding on the left."""
    model = random_model(preset_shape(name))
    write(tmp_path / "hf", model)
    theirs = load(tmp_path / "hf")
    assert type(theirs).__name__ == PRESETS[name]
    idx = torch.randint(CHARS.vocab_size, (2, 20))
    expected = model(idx)
    torch.testing.assert_close(theirs(idx).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs(idx, logits_to_keep=2).logits, expected[:, -2:], rtol=0, atol=1e-5)

    mask = torch.ones(2, 23, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), idx), dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    first = theirs(padded[:, :18], attention_mask=mask[:, :18], position_ids=positions[:, :18], use_cache=True)
    logits = [first.logits[:, 3:]]
    for i in range(18, 23):
        step = {"attention_mask": mask[:, : i + 1], "position_ids": positions[:, i : i + 1]}
        logits.append(theirs(padded[:, i : i + 1], past_key_values=first.past_key_values, **step).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "depth"])
@torch.no_grad()
def test_generation_is_ours(name: str, tmp_path: Path):
    """Greedy, alone and in a batch padded on the left; again after save_pretrained, in a pipeline, with a loss."""
    model = random_model(preset_shape(name))
    write(tmp_path / "hf", model)
    tokenizer_export.write_tokenizer(tmp_path / "hf", CHARS, 32, ROLES)
    theirs = load(tmp_path / "hf")
    theirs.generation_config.eos_token_id = None
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    texts = ["the\njug\n", "dog"]
    expected = [greedy(model, CHARS.encode(text).tolist(), 12) for text in texts]
    for batch in ([texts[0]], [texts[1]], texts):
        inputs = tokenizer(batch, return_tensors="pt", padding=True)
        ids = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)
        for text, row in zip(batch, ids, strict=True):
            assert row[inputs.input_ids.size(1) :].tolist() == expected[texts.index(text)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    static = theirs.generate(**inputs, max_new_tokens=12, cache_implementation="static", do_sample=False)
    assert [row[-12:].tolist() for row in static] == expected
    beams = theirs.generate(**tokenizer(texts, return_tensors="pt", padding=True), num_beams=3, max_new_tokens=4)
    assert len(beams) == 2

    theirs.save_pretrained(tmp_path / "again")
    idx = torch.randint(CHARS.vocab_size, (2, 9))
    loss = load(tmp_path / "again")(idx, labels=idx).loss
    torch.testing.assert_close(loss, model(idx[:, :-1], idx[:, 1:].contiguous()).mean(), rtol=1e-5, atol=1e-5)
    pipeline = transformers.pipeline("text-generation", str(tmp_path / "hf"), trust_remote_code=True, device="cpu")
    text = pipeline("dog", max_new_tokens=3, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert text == CHARS.decode(expected[1][:3])


def greedy(model: GPT, ids: list[int], count: int) -> list[int]:
    """The likeliest ids, one after the other."""
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    return ids[-count:]


@pytest.mark.parametrize("name", ["gpt2_124m", "llama", "depth", "sliding"])
def test_an_export_is_read_again(name: str, tmp_path: Path):
    """By --init_from: the same weights, bit for bit; in several files, and of another dtype what that rounds to."""
    shape = preset_shape(name)
    model = random_model(shape)
    written = write(tmp_path / "hf", model, max_bytes=20_000)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for folder, dtype in ((tmp_path / "hf", torch.float32), (tmp_path / "half", torch.bfloat16)):
        if dtype != torch.float32:
            write(folder, model, dtype=dtype)
        loaded = pretrained.load(str(folder))
        again = GPT.from_weights(GPTConfig(**loaded.shape), loaded.weights, "here")
        weights = dict(again.named_parameters())
        for parameter_name, parameter in model.named_parameters():
            assert torch.equal(weights[parameter_name], parameter.to(dtype).float())
        assert all(not tensor.any() for key, tensor in weights.items() if key.endswith("bias"))
    idx = torch.randint(CHARS.vocab_size, (2, 9))
    torch.testing.assert_close(load(tmp_path / "hf")(idx).logits, model(idx), rtol=0, atol=1e-5)
    assert load(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert (written.family is None) == (PRESETS[name] == CUSTOM)


def test_rows_of_padding_are_cut(tmp_path: Path):
    """Where the tokenizer is a loaded model's they stay, as its own program has them."""
    shape = {**preset_shape("llama"), "vocab_sizes": (CHARS.vocab_size + 7,)}
    model = random_model(shape)
    write(tmp_path / "hf", model)
    theirs = load(tmp_path / "hf")
    assert theirs.lm_head.weight.shape == theirs.model.embed_tokens.weight.shape == (CHARS.vocab_size, 32)
    idx = torch.randint(CHARS.vocab_size, (2, 9))
    logits = model(idx)[..., : CHARS.vocab_size]
    torch.testing.assert_close(theirs(idx).logits, logits, rtol=0, atol=1e-5)
    loaded_tokenizer = CharTokenizer("abc", has_eos=True)
    loaded_tokenizer.adopt(ControlTokens(eos_id=3, end_ids=(3, 1)))
    write(tmp_path / "loaded", model, loaded_tokenizer)
    assert load(tmp_path / "loaded").config.vocab_size == CHARS.vocab_size + 7
    assert load(tmp_path / "loaded").generation_config.eos_token_id == [3, 1]
    with pytest.raises(UserError, match="32 rows"):
        write(tmp_path / "short", model, CharTokenizer(map(chr, range(32, 70))))


def test_several_vocabularies_are_refused_by_flag(tmp_path: Path):
    for vocabulary, flag in (("contexts", "--multicontext"), ("separate", "--multidataset_wte")):
        model = random_model({**preset_shape("llama"), "vocabulary": vocabulary, "vocab_sizes": (5, 6)})
        with pytest.raises(UserError, match=flag):
            write(tmp_path / vocabulary, model, None)


@pytest.mark.slow
def test_the_source_needs_torch_and_transformers_only(tmp_path: Path):
    """In a process without this program; no preset lacks a part of it."""
    model = random_model({**preset_shape("depth"), "value_residual": True, "logit_softcap": 15.0, "window": "SL"})
    write(tmp_path / "hf", model)
    idx = torch.randint(CHARS.vocab_size, (1, 9))
    code = (
        "import sys, torch, transformers;"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True);"
        f"print(model(torch.tensor({idx.tolist()})).logits[0, -1].tolist());"
        "assert not {'nanoforge', 'train_args', 'model'} & sys.modules.keys()"
    )
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-c", code, str(tmp_path / "hf")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    logits = torch.tensor(json.loads(done.stdout))
    torch.testing.assert_close(logits, model(idx)[0, -1].detach(), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# runs, by the command


def export(folder: Path, to: Path, *flags: str, **options) -> subprocess.CompletedProcess:
    return run_script("hf", folder, f"--to={to}", *flags, script="export.py", **options)


@pytest.mark.slow
def test_a_run_with_a_lora_and_chats(run: Callable, base: Path, tmp_path: Path):
    """Merged, with the rows of the roles' tokens; the chat template gives our ids, and the card says what it is."""
    flags = ["--objective=sft", "--dataset=chat", "--adapter=lora", "--learning_rate=1e-2", "--block_size=32"]
    done = run(*flags, f"--init_from={base}")
    export(done.out_dir, tmp_path / "hf", "--max_shard_size=10KB")
    ours = load_model(str(done.out_dir))
    (tokenizer,) = ours.tokenizers.values()
    theirs = load(tmp_path / "hf")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    ids, _ = ExampleEncoder(tokenizer, max_tokens=32).encode_messages(messages, add_generation_prompt=True)
    assert their_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
    idx = torch.tensor([ids])
    torch.testing.assert_close(theirs(idx).logits, ours.model(idx), rtol=0, atol=1e-5)
    assert (
        theirs.config.vocab_size == tokenizer.vocab_size and theirs.generation_config.eos_token_id == tokenizer.eos_id
    )
    card = (tmp_path / "hf/README.md").read_text()
    assert '"lora_rank": 8' in card and "val_loss" in card and "- chat" in card and "by sft from run" in card
    assert str(tmp_path) not in card and str(base.parents[2]) not in card

    again = export(done.out_dir, tmp_path / "hf", check=False)
    assert again.returncode == 2 and "--to=" in again.stderr
    bad_size = export(done.out_dir, tmp_path / "other", "--max_shard_size=big", check=False)
    assert bad_size.returncode == 2 and "--max_shard_size=big" in bad_size.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", ["LlamaConfig", "Qwen3Config", "GPTNeoXConfig"])
def test_a_model_comes_out_of_a_run_as_it_went_in(case: str, run: Callable, tmp_path: Path):
    """With a learning rate of 0, bit for bit; rows beyond the tokenizer's stay."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if case != "GPTNeoXConfig":
        sizes["num_key_value_heads"] = 1
    config = getattr(transformers, case)(**sizes, vocab_size=300, max_position_embeddings=32)
    folder = tmp_path / "theirs"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer_export.write_tokenizer(folder, BPETokenizer.train(["a b c"], 270), 32, ROLES)
    (tmp_path / "texts.jsonl").write_text('{"text": "a b c"}\n')
    files = [f"--{split}_file={tmp_path}/texts.jsonl" for split in ("train", "validation")]
    flags = ["--objective=sft", "--block_size=32", "--learning_rate=0", "--max_iters=1", "--eval_interval=1"]
    done = run(*flags, *files, f"--init_from={folder}", "--eval_samples=0")
    export(done.out_dir, tmp_path / "ours")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    shapes = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "ours")]
    assert shapes[0]["architectures"] == shapes[1]["architectures"]
