"""export.py peft: the peft library loads adapters of every family, with the logits of ours, and merges them equal."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import FIRST_CASE, pair, token_ids
from test_hf_export import CHARS, load, preset_shape, random_model, write

from export import prompt_is_first
from model import GPT, GPTConfig
from nanoforge.data.tokenization import ControlTokens, NumberTokenizer, Tokenizer
from nanoforge.errors import UserError
from nanoforge.models import adapters, peft_export
from nanoforge.run_dir import RunRecord

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

__all__ = ["pair"]  # a fixture
pytestmark = pytest.mark.usefixtures("hf_modules")
ARGS = {"adapter": "lora", "lora_rank": 3, "lora_alpha": 5.0, "lora_dropout": 0.0, "prompt_format": ""}
N_NEW = 3  # tokens that the base lacks


def export_adapter(to: Path, model: GPT, source: str, tokenizer: Tokenizer, **args: Any) -> str:
    """Write the adapter of a model whose base lies at the source."""
    adapter = peft_export.Adapter(
        record=RunRecord({**ARGS, **args}),
        weights={name: p.detach() for name, p in model.named_parameters() if adapters.is_adapter_parameter(name)},
        shape=dataclasses.asdict(model.config),
        tokenizer=tokenizer,
        source=source,
        prompt_is_first=prompt_is_first(args.get("prompt_format", "")),
    )
    to.mkdir()
    return peft_export.write_adapter(to, adapter, torch.float32)[1]


def add_random_lora(model: GPT) -> None:
    adapters.add_lora(model, (), rank=3, alpha=5.0, dropout=0.0)
    for name, parameter in model.named_parameters():
        if adapters.is_adapter_parameter(name):
            parameter.data = torch.randn_like(parameter) * 0.2
    model.eval()


@pytest.mark.parametrize("case", sorted({*FIRST_CASE.values(), "gpt2_clone", "gpt_neox_sequential"}))
@torch.no_grad()
def test_a_lora_of_every_family(pair: Any, case: str, tmp_path: Path):
    """On all layers, and with rows of new tokens in the embedding and in an untied head."""
    theirs, _, folder, loaded = pair(case)
    n_rows = 97 + N_NEW
    torch.manual_seed(0)
    config = GPTConfig(**{**loaded.shape, "vocab_sizes": (n_rows,)})
    ours = GPT.from_weights(config, loaded.weights, case, grow=True)
    before = ours.eval()(token_ids(2, 9))
    adapters.add_token_rows(ours, 97, N_NEW)
    add_random_lora(ours)
    note = export_adapter(tmp_path / "adapter", ours, str(folder), NumberTokenizer(n_rows))
    assert f"resize_token_embeddings({n_rows})" in note

    base = type(theirs).from_pretrained(folder)
    base.resize_token_embeddings(n_rows, mean_resizing=False)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    idx = torch.randint(n_rows, (2, 30))
    expected = ours(idx)
    torch.testing.assert_close(adapted(idx).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapted.merge_and_unload()(idx).logits, expected, rtol=1e-4, atol=3e-5)
    assert (ours(token_ids(2, 9)) - before).abs().max() > 0.1
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder)


@torch.no_grad()
def test_a_lora_on_an_exported_run(tmp_path: Path):
    """Whose base no family holds: the adapter fits what export.py hf writes."""
    for name in ("depth", "gpt2_124m"):
        model = random_model(preset_shape(name))
        write(tmp_path / name, model)
        add_random_lora(model)
        for source in (tmp_path / name, tmp_path / "run"):  # the export, or the run, which holds no config.json
            to = tmp_path / f"{name}_{source.name}_adapter"
            note = export_adapter(to, model, str(source), CHARS)
            assert ("export.py hf" in note) == (source.name == "run")
            adapted = peft.PeftModel.from_pretrained(load(tmp_path / name), to).eval()
            idx = torch.randint(CHARS.vocab_size, (2, 30))
            torch.testing.assert_close(adapted(idx).logits, model(idx), rtol=1e-4, atol=1e-5)


def test_a_base_of_the_hub_goes_by_name_and_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: Any):
    _, _, folder, loaded = pair("llama")
    monkeypatch.setattr("nanoforge.data.hub.fetch", lambda source, patterns: folder)
    ours = GPT.from_weights(GPTConfig(**loaded.shape), loaded.weights, "llama")
    add_random_lora(ours)
    export_adapter(tmp_path / "adapter", ours, "org/name@0123abc", NumberTokenizer(97))
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/name", "0123abc")
    assert "self_attn.q_proj" in settings["target_modules"]


@pytest.mark.parametrize("case", ["gpt2", "llama", "gemma3", "custom"])
@torch.no_grad()
def test_a_soft_prompt_is_prompt_tuning(pair: Any, case: str, tmp_path: Path):
    if case == "custom":
        ours, folder = random_model(preset_shape("depth")), tmp_path / "base"
        write(folder, ours)
        base = load(folder)
    else:
        _, _, folder, loaded = pair(case)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        ours = GPT.from_weights(GPTConfig(**loaded.shape), loaded.weights, case).eval()
    V = ours.wte.weight.size(0)
    adapters.add_soft_prompt(ours, torch.randn(5, 32) * 0.3, "lstm")
    for parameter in ours.wte.prompt.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    tokenizer = NumberTokenizer(V)
    args = {"adapter": "soft_prompt", "prompt_provider": "lstm", "prompt_format": "<P*5>{text}"}
    export_adapter(tmp_path / "adapter", ours, str(folder), tokenizer, **args)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    idx = torch.randint(V, (2, 9))
    prompt = torch.arange(V, V + 5).expand(2, 5)
    expected = ours(torch.cat((prompt, idx), dim=1))
    torch.testing.assert_close(adapted(idx, attention_mask=torch.ones_like(idx)).logits, expected, rtol=1e-4, atol=1e-5)
    generated = adapted.generate(input_ids=idx, attention_mask=torch.ones_like(idx), max_new_tokens=3, do_sample=False)
    assert generated[:, -3].tolist() == expected[:, -1].argmax(-1).tolist()


def test_soft_prompts_that_peft_can_not_place_are_refused(pair: Any, tmp_path: Path):
    _, _, folder, loaded = pair("llama")
    ours = GPT.from_weights(GPTConfig(**loaded.shape), loaded.weights, "llama")
    adapters.add_soft_prompt(ours, torch.randn(5, 32), "tensor")
    args = {"adapter": "soft_prompt", "prompt_provider": "tensor"}
    with pytest.raises(UserError, match="--prompt_format="):
        export_adapter(tmp_path / "a", ours, str(folder), NumberTokenizer(97), **args, prompt_format="{text}<P*5>")
    tokenizer = NumberTokenizer(97)
    tokenizer.adopt(ControlTokens(bos_id=1))
    with pytest.raises(UserError, match="--prompt_dir"):
        export_adapter(tmp_path / "b", ours, str(folder), tokenizer, **args, prompt_format="<P*5>{text}")
