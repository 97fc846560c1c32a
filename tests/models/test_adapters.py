"""Adapters against peft's own LoRA, and by identities with the base: merged, disabled, untrained, seeded by text."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY_WITHOUT_SHAPE, assert_same_lines, equal_tensors, ids, metric, run_on_ranks, tiny_model

import train
from model import GPT, GPTConfig
from nanoforge import files
from nanoforge.data.tokenization import CharTokenizer
from nanoforge.errors import UserError
from nanoforge.models import adapters, pretrained
from nanoforge.posttraining import objectives, prompt_format
from nanoforge.posttraining.examples import ExampleEncoder, encode_rows, pad
from nanoforge.training import checkpoint

SFT = ["--objective=sft", "--dataset=sums", "--eval_samples=0", "--weight_decay=0"]
LORA = [*SFT, "--adapter=lora", "--learning_rate=0.01"]
SOFT = [
    *SFT,
    "--adapter=soft_prompt",
    "--prompt_format=<P*3>{prompt}<P>1+1=</P>",
    "--block_size=16",
    "--learning_rate=0.05",
]


@pytest.fixture
def built_runs(monkeypatch: pytest.MonkeyPatch) -> list:
    """What train.build returns, run after run."""
    runs, build = [], train.build

    def build_and_keep(*args):
        runs.append(build(*args))
        return runs[-1]

    monkeypatch.setattr(train, "build", build_and_keep)
    return runs


def base_model(base, **changes) -> GPT:
    loaded = pretrained.load(str(base))
    model = GPT(GPTConfig(**loaded.shape | changes)).eval()
    model.load_weights(loaded.weights, "base")
    return model


def perturbed(model: GPT) -> GPT:
    """The model with its trainable parameters moved away from their initial values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# LoRA

VARIANTS = [
    {},
    {"bias": True, "mlp": "gated", "n_kv_head": 2, "position": "rope"},
    {"tie_weights": False, "norm": "rmsnorm", "value_residual": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("targets", [[], ["attn.qkv", "up"]])
def test_lora_begins_as_the_base_and_switched_off_is_it_again(variant, targets):
    plain, model, idx = tiny_model(**variant).eval(), tiny_model(**variant).eval(), ids(2, 12)
    expected = plain(idx)
    adapters.add_lora(model, targets, rank=4, alpha=8.0, dropout=0.0)
    adapters.freeze_base(model)
    assert torch.equal(model(idx), expected), "B is 0"
    perturbed(model)
    moved = model(idx)
    assert (moved - expected).abs().max() > 0.01
    with adapters.disable_adapter(model):
        assert torch.equal(model(idx), expected)
    assert torch.equal(model(idx), moved), "on again"
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = [
        name
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.startswith("blocks.")
        and (not targets or name.endswith((".attn.qkv", ".up")))
    ]
    assert learning == {f"{name}.lora_{ab}" for name in layers for ab in "AB"}
    assert {name for name, _ in model.named_parameters()} - learning == {
        name for name, _ in plain.named_parameters()
    }, "the base's names stay"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_merged_weights_give_the_unmerged_logits(variant):
    plain, model, idx = tiny_model(**variant).eval(), tiny_model(**variant).eval(), ids(2, 12)
    weights = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    adapters.add_lora(model, [], rank=4, alpha=10.0, dropout=0.0)
    adapters.freeze_base(model)
    perturbed(model)
    own = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain.load_weights(adapters.merge_lora(weights, own, 10.0 / 4), "merged")
    torch.testing.assert_close(plain(idx), model(idx), atol=1e-5, rtol=1e-4)
    assert (plain(idx) - tiny_model(**variant).eval()(idx)).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# rows of new tokens


@pytest.mark.parametrize("variant", [{}, {"tie_weights": False}, {"loss_chunk": 5}], ids=str)
@pytest.mark.parametrize("first, count", [(28, 3), (10, 4)])
def test_rows_of_new_tokens_learn_as_rows_of_the_table(variant: dict, first: int, count: int):
    """At the end of the table or within it: the loss and gradients of these rows are those of a model without adapter;
    disabled, it is the model before training; merged, it is a model without adapter."""
    plain, model, idx = tiny_model(**variant), tiny_model(**variant), ids(2, 12)
    idx[:, 3:6] = torch.arange(first, first + 3)
    weights = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    adapters.add_token_rows(model, first, count)
    adapters.freeze_base(model)
    torch.testing.assert_close(model(idx), plain(idx))
    perturbed(model)
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {*own} == {"wte.new_rows"} | ({"head.rows.new_rows"} if "tie_weights" in variant else set())
    with adapters.disable_adapter(model):
        torch.testing.assert_close(model(idx), plain(idx))
    plain.load_weights(adapters.merge_lora(weights, own, 1.0, vocab_size=first + count), "merged")
    losses = [each(idx[:, :-1], idx[:, 1:]).mean() for each in (plain, model)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for name in own:
        expected = plain.get_parameter(f"{name.split('.')[0]}.weight").grad
        assert expected is not None and expected[first : first + 3].abs().min() > 1e-8
        torch.testing.assert_close(model.get_parameter(name).grad, expected[first : first + count])


@pytest.mark.slow
def test_a_lora_learns_chats_from_a_base_without_roles(run: Callable, base: Path):
    """Resumed it is the run that never stopped; its DPO begins at ln 2; the base's rows stay."""
    lora = ["--objective=sft", "--dataset=chat", "--adapter=lora", "--block_size=16", "--learning_rate=0.02"]
    whole = run(*lora, f"--init_from={base}", "--max_iters=20", "--eval_interval=10")
    assert whole.evals[-1]["val_loss"] < whole.evals[0]["val_loss"]
    assert {name for name in whole.last.weights if "lora" not in name} == {"wte.new_rows"}
    before, after = (
        pretrained.load(str(base)).weights,
        pretrained.load(str(whole.out_dir / "checkpoints/000020")).weights,
    )
    assert torch.equal(after["wte.weight"][:13], before["wte.weight"]) and len(after["wte.weight"]) == 16
    assert torch.equal(after["wte.weight"][13:], whole.last.weights["wte.new_rows"])
    assert torch.equal(after["position.weight"], before["position.weight"][:16])  # of --block_size=16

    run(*lora, f"--init_from={base}", "--max_iters=10", "--eval_interval=10", name="parts")
    parts = run("--init_from=resume", "--max_iters=20", name="parts")
    assert equal_tensors(parts.last.weights, whole.last.weights)

    pair = {"prompt": [{"role": "user", "content": "1+1="}]}
    pair |= {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "2"), ("rejected", "3"))}
    path = whole.out_dir.parent / "pairs.jsonl"
    path.write_text(json.dumps(pair) + "\n")
    flags = [
        "--objective=dpo",
        f"--train_file={path}",
        f"--validation_file={path}",
        *lora[2:-1],
        "--max_iters=1",
        "--learning_rate=0.001",
    ]
    for reference in ("adapter", "copy", "cache"):
        dpo = run(*flags, f"--init_from={base}", f"--reference={reference}", "--eval_interval=1", name=reference)
        assert dpo.losses == pytest.approx([math.log(2)]) and dpo.evals[-1]["val_loss"] < dpo.losses[0]


THEIR_NAMES = {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.proj", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.proj"}


@pytest.mark.slow
@pytest.mark.parametrize("theirs_of", [["attn.c_attn"], list(THEIR_NAMES)], ids=["qkv", "all"])
def test_lora_is_pefts(tmp_path: Path, theirs_of):
    """The same A and B on the same GPT-2: logits, loss and gradients, also of what PEFT itself merges."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=97, n_positions=24, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        )
    ).eval()
    gpt2.save_pretrained(tmp_path)
    wrapped = peft.get_peft_model(
        gpt2,
        peft.LoraConfig(
            r=4, lora_alpha=12, target_modules=theirs_of, fan_in_fan_out=True, lora_dropout=0.0, init_lora_weights=False
        ),
    ).eval()
    loaded = pretrained.load(str(tmp_path))
    model = GPT(GPTConfig(**loaded.shape)).eval()
    model.load_weights(loaded.weights, "gpt2")
    adapters.add_lora(model, [THEIR_NAMES[name] for name in theirs_of], rank=4, alpha=12.0, dropout=0.0)
    adapters.freeze_base(model)
    pairs = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _, layer, own, ab = (
                name.replace(".attn.", ".attn@")
                .replace(".mlp.", ".mlp@")
                .replace("@qkv.", "@c_attn.")
                .replace("@proj.", "@c_proj.")
                .replace("@up.", "@c_fc.")
                .split(".")
            )
            their = wrapped.get_parameter(
                f"base_model.model.transformer.h.{layer}.{own.replace('@', '.')}.{ab}.default.weight"
            )
            with torch.no_grad():
                parameter.copy_(their)
            pairs.append((parameter, their))
    assert len(pairs) == 2 * 2 * len(theirs_of) == 2 * sum("lora_A" in name for name, _ in wrapped.named_parameters())
    idx = ids(3, 17, high=97)
    logits = wrapped(idx[:, :-1]).logits
    torch.testing.assert_close(model(idx[:, :-1]), logits, atol=1e-5, rtol=1e-5)
    with wrapped.disable_adapter():
        assert (wrapped(idx[:, :-1]).logits - logits).abs().max() > 0.01, "it adds something"
    model(idx[:, :-1], idx[:, 1:]).mean().backward()
    F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
    for ours, their in pairs:
        torch.testing.assert_close(ours.grad, their.grad, atol=1e-6, rtol=1e-4)
        assert ours.grad.abs().max() > 1e-5
    own = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = GPT(GPTConfig(**loaded.shape)).eval()
    plain.load_weights(adapters.merge_lora(loaded.weights, own, 3.0), "merged")
    torch.testing.assert_close(plain(idx), wrapped.merge_and_unload()(idx).logits, atol=1e-5, rtol=1e-5)


def test_dropout_is_on_the_additions_input_in_training_alone():
    model = tiny_model(dropout=0.0)
    adapters.add_lora(model, [], rank=4, alpha=8.0, dropout=0.5)
    adapters.freeze_base(model)
    perturbed(model)
    idx = ids(2, 12)
    assert torch.equal(model.eval()(idx), model(idx)) and not torch.equal(model.train()(idx), model(idx))
    with adapters.disable_adapter(model):
        assert torch.equal(model(idx), model(idx)), "none in the base"
    layer = adapters.LoraLinear(torch.nn.Linear(64, 8, bias=False), rank=2, alpha=2.0, dropout=0.25).train()
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 64).expand(4000, 64)
    torch.testing.assert_close(layer(x).mean(0), layer.eval()(x)[0], atol=0.1, rtol=0.05, msg="the same on average")


@pytest.mark.parametrize(
    "targets, message",
    [
        (["qvk"], "attn.qkv"),
        (["attn"], "available: attn.proj, attn.qkv, mlp.proj, mlp.up"),
        (["head"], "no linear layer head"),
        (["up", "v"], "no linear layer v;"),
    ],
)
def test_unknown_lora_targets_are_refused(targets, message):
    with pytest.raises(UserError, match=message):
        adapters.add_lora(tiny_model(), targets, rank=4, alpha=8.0, dropout=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# runs with LoRA and with a soft prompt


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [LORA, SOFT, [*SOFT, "--prompt_provider=lstm"], [*LORA, "--optimizer=muon"]],
    ids=["lora", "soft", "lstm", "muon"],
)
def test_the_base_stays_and_the_checkpoint_holds_the_adapter_alone(run, base: Path, built_runs, flags):
    """Bit for bit the base's weights, within the model that learned and in its files."""
    files = {path: path.read_bytes() for path in base.iterdir()}
    done = run(*flags, f"--init_from={base}", "--max_iters=6")
    model, weights = built_runs[0].raw_model, pretrained.load(str(base)).weights
    kept = {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, weight in kept.items():
        assert torch.equal(weight, weights[name][: len(weight)]), name  # positions are cropped
    assert kept.keys() == weights.keys() and {path: path.read_bytes() for path in base.iterdir()} == files
    own = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert equal_tensors(dict(done.last.weights), own) and all(
        ".lora_" in name or name.startswith("wte.prompt.") for name in own
    )
    assert {name.split("/")[1] for name in done.last.optimizer} <= own.keys()
    began = {"source": str(base), "sha256": adapters.hash_weights(weights), "seed": "1337", "prompt_init": "vocab"}
    assert done.config["_base"] == began
    size = sum(4 * tensor.numel() for tensor in own.values())
    assert size < (done.last.folder / "model.safetensors").stat().st_size < size + 200 * len(own) + 1000
    assert done.losses[-1] != done.losses[0]


def test_a_trained_lora_loads_merged(run, base: Path, built_runs):
    """--init_from takes the run as weights: the logits of the model that was trained."""
    done = run(*LORA, f"--init_from={base}", "--max_iters=6", "--block_size=32")
    model, merged, idx = built_runs[0].raw_model.eval(), base_model(done.last.folder), ids(2, 20, high=13)
    torch.testing.assert_close(merged(idx), model(idx), atol=1e-5, rtol=1e-4)
    assert (merged(idx) - base_model(base)(idx)).abs().max() > 0.01
    with adapters.disable_adapter(model):
        torch.testing.assert_close(model(idx), base_model(base)(idx))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [LORA, SOFT], ids=["lora", "soft"])
def test_a_base_that_changed_is_refused_on_resume(run, base: Path, tmp_path: Path, flags):
    """By the hash of its weights; the file itself may move in whole."""
    shutil.copytree(base, tmp_path / "base")
    run(*flags, f"--init_from={tmp_path / 'base'}", "--max_iters=2")
    assert len(run("--init_from=resume", "--max_iters=3").train) == 3
    weights = checkpoint.read_tensors(tmp_path / "base/model.safetensors")
    weights["blocks.0.mlp.up.weight"][0, 0] += 1e-6
    damaged = tmp_path / "base/model.safetensors"
    checkpoint.write_tensors(damaged, weights)
    manifest = tmp_path / "base/manifest.json"
    manifest.write_text(manifest.read_text().replace(files.sha256(base / "model.safetensors"), files.sha256(damaged)))
    with pytest.raises(UserError, match="does not hold the weights that the run began with"):
        run("--init_from=resume", "--max_iters=4")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match="no such file"):
        run("--init_from=resume", "--max_iters=4")


RESUMED = {
    "lora": [*LORA, "--lora_dropout=0.2", "--gradient_accumulation_steps=2"],
    "lora_muon": [*LORA, "--optimizer=muon"],
    "soft": SOFT,
    "lstm": [*SOFT, "--prompt_provider=lstm"],
    "soft_dpo": [*SOFT, "--objective=dpo", "--dataset=pairs"],
    "lstm_dpo": [*SOFT, "--objective=dpo", "--dataset=pairs", "--prompt_provider=lstm", "--prompt_init=normal"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESUMED)
def test_resumed_is_bit_identical(run, base: Path, kind):
    """N steps = N/2, resume, N/2; of a soft prompt's preferences too, whose reference is the prompt as it began."""
    flags = [
        *RESUMED[kind],
        f"--init_from={base}",
        "--dropout=0.1",
        "--max_iters=8",
        "--eval_interval=4",
        "--lr_scheduler=linear",
        "--lr_decay_iters=8",
        "--log_data_hash",
    ]
    whole = run(*flags, name="whole")
    run(*flags, "--max_iters=4", name="parts")
    parts = run("--init_from=resume", "--max_iters=8", name="parts")
    assert (
        [line["step"] for line in parts.train] == list(range(1, 9))
        and parts.losses == whole.losses
        and len(set(whole.losses)) == 8
    )
    assert equal_tensors(parts.last.weights, whole.last.weights) and equal_tensors(
        parts.last.optimizer, whole.last.optimizer
    )
    assert [line["val_loss"] for line in parts.evals] == [line["val_loss"] for line in whole.evals]
    if "dpo" in kind:
        assert metric(parts, "rewards/margins") == metric(whole, "rewards/margins") and whole.losses[
            0
        ] == pytest.approx(math.log(2), abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, parallel",
    [
        ("lora", "ddp"),
        ("lora", "fsdp"),
        ("soft", "ddp"),
        ("soft", "fsdp"),
        ("lstm", "ddp"),
        ("dpo", "ddp"),
        ("dpo", "fsdp"),
    ],
)
def test_two_ranks_are_one(tmp_path: Path, data_dir: Path, base: Path, kind, parallel):
    """Losses, gradients' norms and the adapter itself; the shards of an adapter are loaded as one."""
    flags = {
        "lora": LORA,
        "soft": SOFT,
        "lstm": [*SOFT, "--prompt_provider=lstm"],
        "dpo": [*LORA, "--objective=dpo", "--dataset=pairs"],
    }[kind]
    flags = [
        *TINY_WITHOUT_SHAPE,
        f"--data_dir={data_dir}",
        f"--init_from={base}",
        *flags,
        "--optimizer=sgd",
        "--log_data_hash",
    ]
    one, two = (
        run_on_ranks(tmp_path / "1", 1, *flags),
        run_on_ranks(tmp_path / "2", 2, *flags, f"--parallel={parallel}"),
    )
    assert metric(one, "data_hash") == metric(two, "data_hash")
    assert_same_lines(
        one.train, two.train, ["loss", "grad_norm", "entropy", *(["rewards/margins"] if kind == "dpo" else [])]
    )
    assert_same_lines(one.evals, two.evals, ["val_loss", "train_loss"])
    assert one.last.weights.keys() == two.last.weights.keys()
    for name, weight in one.last.weights.items():
        torch.testing.assert_close(two.last.weights[name], weight, atol=1e-5, rtol=1e-4, msg=name)
    assert one.losses[0] != one.losses[-1]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [LORA, SOFT], ids=["lora", "soft"])
def test_every_objective_takes_an_adapter(run, base: Path, flags):
    """Preferences begin at log 2, since the adapter switched off is what it was; rollouts agree with training."""
    dpo = run(*flags, f"--init_from={base}", "--objective=dpo", "--dataset=pairs", "--max_iters=3", name="dpo")
    assert dpo.losses[0] == pytest.approx(math.log(2)) and dpo.losses[-1] != dpo.losses[0]
    kto = run(*flags, f"--init_from={base}", "--objective=kto", "--dataset=labelled", "--max_iters=3", name="kto")
    assert kto.losses[0] == pytest.approx(0.5) and kto.losses[-1] != kto.losses[0]
    grpo = run(
        *flags,
        f"--init_from={base}",
        "--objective=grpo",
        "--num_generations=4",
        "--max_new_tokens=3",
        "--reward=length",
        "--seed=2",
        "--max_iters=3",
        name="grpo",
    )
    assert (
        max(metric(grpo, "rollout_logp_error")) < 1e-4
        and abs(grpo.train[0]["kl"]) < 1e-9
        and grpo.train[-1]["kl"] > 1e-6
    )


# ---------------------------------------------------------------------------------------------------------------------
# soft prompts

DIGITS = CharTokenizer("0123456789+=", has_eos=True)
V = 13


def prompted(base, text: str, provider: str = "tensor", seed: int = 0) -> tuple[GPT, prompt_format.PromptTemplate]:
    model, template = base_model(base), prompt_format.parse(text)
    torch.manual_seed(seed)
    adapters.add_soft_prompt(
        model, adapters.initial_prompt(model.wte.weight.detach(), template.init_ids(DIGITS), "vocab", V), provider
    )
    adapters.freeze_base(model)
    return model.eval(), template


@pytest.mark.parametrize("provider", adapters.PROVIDERS)
@pytest.mark.parametrize(
    "prompt_format, literal",
    [
        ("<P>12+</P>{a}", "12+{a}"),
        ("{a}<P>+3=</P>", "{a}+3="),
        ("{a}<P>+</P>{b}<P>=</P>", "{a}+{b}="),
        ("1<P>2</P>+<P>34</P>={a}", "12+34={a}"),
    ],
)
def test_a_seeded_prompt_begins_as_the_text_that_seeds_it(base: Path, prompt_format, literal, provider):
    """Before, behind and in the middle of fields: rows are the text's embeddings, logits those of the literal text."""
    model, template = prompted(base, prompt_format, provider)
    seeds = template.init_ids(DIGITS)
    assert torch.equal(model.wte.prompt().detach(), model.wte.weight[seeds].detach())
    values = {"a": "5+7", "b": "8"}
    idx = template.encode(values, DIGITS, V)
    plain = DIGITS.encode(literal.format(**values)).tolist()
    assert [seeds[i - V] if i >= V else i for i in idx] == plain and sorted(i for i in idx if i >= V) == list(
        range(V, V + len(seeds))
    )
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([idx])), base_model(base)(torch.tensor([plain])))
        perturbed(model)
        moved = model(torch.tensor([idx]))
        assert not torch.allclose(moved, base_model(base)(torch.tensor([plain])))
        with adapters.disable_adapter(model):
            assert torch.equal(model(torch.tensor([idx])), base_model(base)(torch.tensor([plain])))
        assert torch.equal(model(torch.tensor([idx])), moved)


def test_a_batch_of_prompts_of_other_lengths_learns_as_each_alone(base: Path):
    """The virtual tokens' gradient is the sum over examples, whose prompts differ in length."""
    model, template = prompted(base, "{prompt}<P*2>{more}<P>=</P>")
    rows = [
        {"prompt": "1+1", "more": "+2", "completion": "4"},
        {"prompt": "12", "more": "", "completion": "12"},
        {"prompt": "", "more": "3+3+3", "completion": "9"},
    ]
    encoder = ExampleEncoder(DIGITS, 32, template=template, prompt_offset=V, target_field="completion")
    encoded = encode_rows(rows, encoder, "prompt_completion", "x").examples
    for item, row in zip(encoded, rows, strict=True):
        ids_, mask = item.sequences[0].ids.tolist(), item.sequences[0].loss_mask
        assert [i for i, on in zip(ids_, mask, strict=True) if on] == [*DIGITS.encode(row["completion"]), 12]
    batch = pad([item.sequences[0] for item in encoded])
    batch = type(batch)(batch.tokens, batch.extras, 1, 7.0)
    loss, metrics = objectives.SFT()(model, batch, with_metrics=True)
    loss.backward()
    together, model.wte.prompt.rows.grad = model.wte.prompt.rows.grad, None
    total = 0.0
    for item in encoded:
        one = pad([item.sequences[0]])
        alone, _ = objectives.SFT()(model, type(one)(one.tokens, one.extras, 1, 7.0), with_metrics=False)
        alone.backward()
        total += alone.item()
    assert loss.item() == pytest.approx(total, rel=1e-6) and metrics["loss"][1] == 7
    torch.testing.assert_close(model.wte.prompt.rows.grad, together, atol=1e-6, rtol=1e-5)
    assert (together.abs().sum(1) > 0).all() and model.wte.weight.grad is None


def test_rows_that_are_not_in_a_text_get_no_gradient(base: Path):
    model, _ = prompted(base, "<P*4>")
    model(torch.tensor([[V + 2, 1, V, 5]]), torch.tensor([[1, 2, 3, 4]])).sum().backward()
    assert (model.wte.prompt.rows.grad.abs().sum(1) > 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("provider", adapters.PROVIDERS)
def test_rows_come_back_from_a_checkpoints_weights(base: Path, provider):
    model, _ = prompted(base, "<P*5>", provider)
    perturbed(model)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.testing.assert_close(adapters.load_prompt(weights, provider), model.wte.prompt().detach(), atol=1e-6, rtol=0)
    assert (model.wte.prompt() - model.wte.initial_prompt).abs().max() > 0.01


def test_an_lstm_adds_to_the_rows_what_torchs_own_gives(base: Path):
    """Nothing at first; then the MLP of a bidirectional LSTM over the rows."""
    model, _ = prompted(base, "<P*5>", "lstm")
    prompt = model.wte.prompt
    assert torch.equal(prompt(), prompt.rows)
    perturbed(model)
    lstm = torch.nn.LSTM(16, 8, num_layers=2, bidirectional=True)
    lstm.load_state_dict(prompt.lstm.state_dict())
    hidden = lstm(prompt.rows[:, None])[0][:, 0]  # time first
    torch.testing.assert_close(
        prompt(),
        prompt.rows
        + F.linear(
            F.linear(hidden, prompt.mlp[0].weight, prompt.mlp[0].bias).relu(), prompt.mlp[2].weight, prompt.mlp[2].bias
        ),
    )
    assert (prompt() - prompt.rows).abs().max() > 0.01


def test_free_rows_are_distinct_and_known():
    embedding = torch.randn(20, 8)
    rows = adapters.initial_prompt(embedding, [None] * 10 + [7], "vocab", 15)
    found = [(embedding == row).all(1).nonzero().item() for row in rows]
    assert len(set(found[:10])) == 10 and max(found[:10]) < 15 and found[10] == 7
    many = adapters.initial_prompt(embedding, [None] * 40, "vocab", 15)
    assert {(embedding == row).all(1).nonzero().item() for row in many} <= set(range(15))
    normal = adapters.initial_prompt(embedding * 3, [None] * 999 + [7], "normal", 15)
    assert torch.equal(normal[-1], embedding[7] * 3) and normal[:-1].std().item() == pytest.approx(
        3 * embedding.std().item(), rel=0.05
    )


@pytest.mark.slow
def test_a_prompt_alone_learns_what_the_base_does_not(run, base: Path, tmp_path: Path):
    """To say 9 whatever it is asked; the base is frozen."""
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"word": "{i}", "completion": "9"}}\n' for i in range(10)))
    flags = [
        "--objective=sft",
        f"--train_file={tmp_path / 'rows.jsonl'}",
        f"--validation_file={tmp_path / 'rows.jsonl'}",
        "--adapter=soft_prompt",
        "--prompt_format=<P*4>{word}<P*2>",
        f"--init_from={base}",
        "--block_size=16",
        "--learning_rate=0.1",
        "--weight_decay=0",
        "--max_iters=120",
        "--eval_interval=120",
        "--batch_size=10",
        "--eval_samples=10",
    ]
    done = run(*flags)
    assert done.evals[-1]["val_loss"] < 0.2 * done.evals[0]["val_loss"]
    assert (
        {sample["completion"] for sample in done.evals[-1]["samples"]}
        == {"9"}
        != {sample["completion"] for sample in done.evals[0]["samples"]}
    )
