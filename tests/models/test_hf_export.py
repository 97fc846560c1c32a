"""export.py hf: transformers loads what was written, without this program, and computes what ours does."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from helpers import ROOT

import model as model_module
import train_args
from model import GPT, GPTConfig
from nanoforge.data.tokenization import CharTokenizer, Tokenizer
from nanoforge.models import hf_export
from nanoforge.models.hf_export import HFModel, Program
from train_args import TrainArgs

transformers = pytest.importorskip("transformers")

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
    "shakespeare_cpu": CUSTOM,
    "shakespeare_gpu": CUSTOM,
    "sliding": CUSTOM,
    "arithmetic_sft": CUSTOM,
    "strings_sft": CUSTOM,
    "gpt2_finetune": "GPT2LMHeadModel",
    "quick_test": "GPT2LMHeadModel",
    "arithmetic_dpo": CUSTOM,
    "arithmetic_grpo": CUSTOM,
    "arithmetic_kto": CUSTOM,
    "strings_prompt": CUSTOM,
}
BASES = {"arithmetic_dpo": "arithmetic_sft", "arithmetic_grpo": "arithmetic_sft", "arithmetic_kto": "arithmetic_sft"}
BASES["strings_prompt"] = "strings_sft"


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


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies the source that comes with a model."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_every_preset_is_listed():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == PRESETS.keys()


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
