"""export.py: merged weights begin a run, and peft loads an exported adapter with our logits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import gpt2_tokenizer_env, run_script

from builders import load_model
from model import GPT
from nanoforge.training import checkpoint


def export(*argv, **options):
    return run_script(*argv, script="export.py", **options)


def load(folder) -> GPT:
    return load_model(str(folder)).model


@pytest.mark.slow
def test_a_merged_lora_is_weights_to_begin_with(run, base: Path, tmp_path: Path):
    sft = ["--objective=sft", "--dataset=sums", "--block_size=32"]
    steps = ["--learning_rate=1e-2", "--weight_decay=0", "--warmup_iters=0"]
    done = run(*sft, *steps, "--adapter=lora", f"--init_from={base}")
    merged = tmp_path / "merged"
    export("merge", done.out_dir, f"--to={merged}")
    ours, theirs = load(merged), load(done.out_dir / "checkpoints/000004")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(ours.blocks[0].attn.qkv.weight, load(base).blocks[0].attn.qkv.weight)
    flags = [*sft, f"--init_from={merged}", "--max_iters=1", "--eval_interval=1"]
    assert run(*flags, name="next").steps == [1]
    weights = merged / "model.safetensors"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    assert checkpoint.verify(merged, checkpoint.WEIGHT_FILES)


@pytest.mark.slow
def test_peft_loads_what_was_exported(run, tmp_path: Path):
    """On the GPT-2 that it was trained on, with the logits of our own merged model."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    )
    torch.manual_seed(0)
    base_dir, adapter_dir = tmp_path / "hf", tmp_path / "adapter"
    transformers.GPT2LMHeadModel(config).save_pretrained(base_dir)
    lora = ["--adapter=lora", "--lora_rank=3", "--lora_alpha=5", f"--init_from={base_dir}"]
    checkpoint_dir = run(*lora, "--learning_rate=1e-1", "--max_iters=8").out_dir / "checkpoints/000008"
    export("peft", checkpoint_dir, f"--to={adapter_dir}")
    adapted = peft.PeftModel.from_pretrained(transformers.GPT2LMHeadModel.from_pretrained(base_dir), adapter_dir)
    idx = torch.randint(30, (2, 8))
    with torch.no_grad():
        ours = load(checkpoint_dir)(idx)
        base_logits = transformers.GPT2LMHeadModel.from_pretrained(base_dir).eval()(idx).logits
        torch.testing.assert_close(adapted.eval()(idx).logits, ours, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base_logits, ours, atol=1e-2)


@pytest.mark.slow
def test_peft_loads_the_rows_of_new_tokens(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Chats from GPT-2's vocabulary: peft's trainable tokens on the resized base give our merged model's logits."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", gpt2_tokenizer_env()["TIKTOKEN_CACHE_DIR"])
    shape = {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **shape)
    torch.manual_seed(0)
    base_dir, adapter_dir = tmp_path / "hf", tmp_path / "adapter"
    transformers.GPT2LMHeadModel(config).save_pretrained(base_dir)
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    files = [f"--{split}_file={tmp_path}/chats.jsonl" for split in ("train", "validation")]
    flags = ["--objective=sft", "--adapter=lora", f"--init_from={base_dir}", "--learning_rate=1e-1", "--block_size=16"]
    checkpoint_dir = run(*flags, *files, "--eval_samples=0").out_dir / "checkpoints/000004"
    export("peft", checkpoint_dir, f"--to={adapter_dir}")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(base_dir)
    theirs.resize_token_embeddings(50260)
    adapted = peft.PeftModel.from_pretrained(theirs, adapter_dir).eval()
    idx = torch.tensor([[50258, 17250, 50256, 50259, 15496, 50256]])
    with torch.no_grad():
        ours, logits = load(checkpoint_dir)(idx), adapted(idx).logits
    torch.testing.assert_close(logits[..., :50257], ours[..., :50257], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[..., 50257:], ours[..., 50257:], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_errors_of_exports_name_the_flag(base: Path, tmp_path: Path):
    for argv, message in (
        (["merge", base], "--to"),
        (["peft", base, f"--to={tmp_path / 'x'}"], "--adapter=lora"),
        (["hf", "out/no_run", f"--to={tmp_path / 'x'}"], "export.py: out/no_run"),
        (["melt", base], "consolidate, merge, peft"),
    ):
        done = export(*argv, check=False)
        assert done.returncode == 2 and message in done.stderr
