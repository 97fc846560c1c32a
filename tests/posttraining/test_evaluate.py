"""evaluate.py against losses and answers that are made another way, and sample.py's answers: soft prompts, chats, end tokens."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS, TINY, run_script

import configurator
import evaluate
from model import GPT, GPTConfig
from nanoforge.data import token_bins
from nanoforge.models import generation, pretrained
from nanoforge.posttraining.accuracy import wilson_interval
from nanoforge.training import checkpoint

GENTLE = ["--learning_rate=1e-2", "--weight_decay=0", "--warmup_iters=0"]


def evaluated(*argv) -> dict:
    return evaluate.main(
        configurator.parse(
            evaluate.EvaluateArgs, [str(word) for word in argv], "", configurator.Rules(check=evaluate.check)
        )
    )


def built(folder) -> GPT:
    loaded = pretrained.load(str(folder))
    model = GPT(GPTConfig(**loaded.shape))
    model.load_weights(loaded.weights, "")
    return model.eval()


def test_the_loss_of_a_text_is_that_of_each_token_once(run, data_dir):
    """By hand: windows of block_size one after the other, each token after the first of the text predicted once; the last incomplete one is left."""
    done = run("--max_iters=20", "--learning_rate=1e-2")
    told = evaluated(f"--out_dir={done.out_dir}", "--checkpoint=last", "--dtype=float32", "--batch_size=5")["losses"][
        "a"
    ]
    model = built(done.out_dir / "checkpoints/000020")
    val = token_bins.TokenBin(data_dir / "a", "val", token_bins.read_meta(data_dir / "a"))
    tokens = torch.tensor(val.shards[0].astype("int64"))
    count = (len(tokens) - 1) // 8
    losses = [
        F.cross_entropy(model(tokens[None, i * 8 : i * 8 + 8])[0], tokens[i * 8 + 1 : i * 8 + 9], reduction="sum")
        for i in range(count)
    ]
    mean = sum(loss.item() for loss in losses) / (8 * count)
    assert (
        told["val_loss"] == pytest.approx(mean, rel=1e-5)
        and told["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
        and told["tokens"] == 8 * count
    )
    assert told["bits_per_byte"] == pytest.approx(mean / math.log(2), rel=1e-5), "a character is a byte here"
    assert json.loads((done.out_dir / "evaluation.json").read_text())["losses"]["a"] == told


def test_the_loss_of_examples_is_that_of_the_completions(base, data_dir):
    told = evaluated(f"--out_dir={base.parent.parent}", "--dtype=float32", "--batch_size=7")["losses"]["sums"]
    model, total, count = built(base), 0.0, 0
    for row in map(json.loads, (data_dir / "sums/val.jsonl").read_text().splitlines()):
        prompt, completion = (
            DIGITS.encode(row["prompt"]).tolist(),
            [*DIGITS.encode(row["completion"]).tolist(), DIGITS.eos_id],
        )
        logits = model(torch.tensor([prompt + completion[:-1]]))[0, len(prompt) - 1 :]
        total, count = (
            total + float(F.cross_entropy(logits, torch.tensor(completion), reduction="sum")),
            count + len(completion),
        )
    assert told["val_loss"] == pytest.approx(total / count, rel=1e-5) and told["tokens"] == count


def test_accuracy_is_that_of_the_likeliest_answers(base, data_dir):
    told = evaluated(f"--out_dir={base.parent.parent}", "--tasks=sums", "--dtype=float32", "--batch_size=6")["tasks"][
        "sums"
    ]
    model, rows = built(base), [json.loads(line) for line in (data_dir / "sums/val.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        ids = DIGITS.encode(row["prompt"]).astype("int64")
        greedy = generation.SamplingParams(max_new_tokens=8, temperature=0)
        out = generation.generate(model, torch.from_numpy(ids)[None], greedy, torch.Generator(), decode="uncached")[
            0, len(ids) :
        ].tolist()
        right += DIGITS.decode(out[: out.index(DIGITS.eos_id)] if DIGITS.eos_id in out else out) == row["answer"]
    assert told["accuracy"]["value"] == pytest.approx(right / len(rows)) and told["n"] == len(rows)
    assert (told["accuracy"]["low"], told["accuracy"]["high"]) == pytest.approx(wilson_interval(right, len(rows)))
    assert told["partial"]["value"] >= told["accuracy"]["value"] and told["format"]["value"] == 0


def test_passes_are_as_many_draws_and_depend_on_the_seed_alone(base, tmp_path):
    def told(*flags) -> dict:
        return evaluated(
            f"--out_dir={base.parent.parent}",
            "--tasks=sums",
            "--decode=liberal",
            "--num_passes=4",
            f"--json={tmp_path / 'e.json'}",
            *flags,
        )["tasks"]["sums"]

    one = told()
    assert one == told() and one != told("--seed=2")
    assert one["pass@4"]["value"] >= one["pass@2"]["value"] >= one["accuracy"]["value"], "pass@1 is the accuracy"
    assert {"majority@2", "majority@4"} <= one.keys() and one["passes"] == 4


def test_mistakes_of_an_evaluation(base, capsys):
    for flags, words in (
        (["--num_passes=2", "--tasks=sums"], "--num_passes"),
        (["--init_from=gpt2"], "--json"),
        (["--decode=standard"], "only with --tasks"),
    ):
        with pytest.raises(SystemExit) as end:
            evaluated(
                f"--out_dir={base.parent.parent}" if "--init_from=gpt2" not in flags else "--batch_size=1", *flags
            )
        assert end.value.code == 2 and words in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


@pytest.fixture(scope="module")
def prompts(base, data_dir, tmp_path_factory):
    """Two soft prompts on one base: one ordinary, one whose rows an LSTM makes."""
    folder = tmp_path_factory.mktemp("prompts")
    import train
    import train_args

    tiny = [flag for flag in TINY if not flag.startswith(("--n_layer", "--n_head", "--n_embd", "--block_size"))]
    for name, flags in {
        "a": ["--prompt_format=<P*3>{prompt}"],
        "b": ["--prompt_format={prompt}<P*2>", "--prompt_provider=lstm"],
    }.items():
        given = [
            *tiny,
            *GENTLE,
            "--block_size=32",
            f"--data_dir={data_dir}",
            "--dataset=sums",
            "--objective=sft",
            "--adapter=soft_prompt",
            f"--init_from={base}",
            f"--out_dir={folder / name}",
        ]
        train.main(train_args.parse([*given, *flags]))
    return folder


def answers(*argv) -> list[str]:
    flags = ["--temperature=0", "--num_samples=1", "--max_new_tokens=6", "--dtype=float32", "--device=cpu"]
    return run_script(*argv, *flags, script="sample.py").stdout.split("\n---------------\n")[:-1]


def test_prompts_of_several_runs_share_a_batch(prompts):
    apart = [
        answers("--prompt_dir", prompts / name, "--fields", f'{{"prompt": "{words}"}}')[0]
        for name, words in (("a", "12+9="), ("b", "3+4="))
    ]
    together = answers(
        "--prompt_dir", prompts / "a", prompts / "b", "--fields", '{"prompt": "12+9="}', '{"prompt": "3+4="}'
    )
    assert together == apart


def test_an_evaluation_of_a_soft_prompt_gives_its_answers(prompts):
    told = evaluated(
        f"--out_dir={prompts / 'a'}",
        "--tasks=sums",
        "--dtype=float32",
        "--max_problems=3",
        f"--json={prompts / 'e.json'}",
    )
    for sample in told["tasks"]["sums"]["samples"]:
        assert answers("--prompt_dir", prompts / "a", "--fields", json.dumps({"prompt": sample["prompt"]})) == [
            sample["completion"]
        ]


def test_mistakes_of_prompts(prompts, base):
    def refuse(*argv) -> str:
        done = run_script(*argv, script="sample.py", check=False)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        return done.stderr

    assert "--fields" in refuse("--prompt_dir", prompts / "a")
    assert "not JSON" in refuse("--prompt_dir", prompts / "a", "--fields", "{prompt}")
    assert "x not in the prompt" in refuse("--prompt_dir", prompts / "a", "--fields", '{"x": "1"}')
    assert "prompt" in refuse("--prompt_dir", prompts / "a", "--fields", "{}")
    assert "not a run with --adapter=soft_prompt" in refuse(
        "--prompt_dir", base.parent.parent, "--fields", '{"prompt": "1"}'
    )
    assert "sample.py takes it as --prompt_dir" in refuse(f"--out_dir={prompts / 'a'}", "--start=1")
    assert "not trained on messages" in refuse(f"--out_dir={base.parent.parent}", "--start=1", "--chat")


def test_a_chat_and_an_end_token(run, base, tmp_path):
    """A model that has learned one chat by heart says it, without the end token; until that token is learned to come."""
    rows = [{"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}]
    for split in token_bins.SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(rows[0]) + "\n")
    run("--objective=sft", f"--init_from={base}", f"--train_file={tmp_path}/train.jsonl", f"--validation_file={tmp_path}/val.jsonl", "--block_size=32",
        "--max_iters=60", "--eval_interval=60", *GENTLE)  # fmt: skip
    assert answers(f"--out_dir={tmp_path / 'run'}", "--start=1+1=", "--chat") == ["2"]
    stopped = answers(f"--out_dir={base.parent.parent}", "--start=12+9=", "--stop_at_end")[0]
    going_on = answers(f"--out_dir={base.parent.parent}", "--start=12+9=")[0]
    assert going_on.split("<|endoftext|>")[0].startswith(stopped) and "<|endoftext|>" not in stopped


# ---------------------------------------------------------------------------------------------------------------------
# export.py


def test_a_merged_lora_is_weights_to_begin_with(run, base, tmp_path):
    done = run("--objective=sft", "--dataset=sums", "--adapter=lora", f"--init_from={base}", "--block_size=32", *GENTLE)
    run_script("merge", done.out_dir, f"--to={tmp_path / 'merged'}", script="export.py")
    ours, theirs = built(tmp_path / "merged"), built(done.out_dir / "checkpoints/000004")
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    ) and not torch.equal(ours.blocks[0].attn.qkv.weight, built(base).blocks[0].attn.qkv.weight)
    assert run(
        "--objective=sft",
        "--dataset=sums",
        f"--init_from={tmp_path / 'merged'}",
        "--block_size=32",
        "--max_iters=1",
        "--eval_interval=1",
        name="next",
    ).steps == [1]
    (tmp_path / "merged/model.safetensors").write_bytes(b"x" + (tmp_path / "merged/model.safetensors").read_bytes()[1:])
    assert checkpoint.verify(tmp_path / "merged", checkpoint.WEIGHT_FILES)


def test_peft_loads_what_was_exported(run, tmp_path):
    """On the GPT-2 that it was trained on, with the logits of our own merged model."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    done = run(
        "--adapter=lora",
        "--lora_rank=3",
        "--lora_alpha=5",
        f"--init_from={tmp_path / 'hf'}",
        "--learning_rate=1e-1",
        "--max_iters=8",
    )
    run_script("peft", done.out_dir / "checkpoints/000008", f"--to={tmp_path / 'adapter'}", script="export.py")
    theirs = peft.PeftModel.from_pretrained(
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf"), tmp_path / "adapter"
    ).eval()
    ours, idx = built(done.out_dir / "checkpoints/000008"), torch.randint(30, (2, 8))
    with torch.no_grad():
        plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()(idx).logits
        torch.testing.assert_close(theirs(idx).logits, ours(idx), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain, ours(idx), atol=1e-2)


def test_mistakes_of_exports(base, tmp_path):
    for argv, words in (
        (["merge", base], "--to"),
        (["peft", base, f"--to={tmp_path}"], "not a run with --adapter=lora"),
        (["melt", base], "there is: consolidate, merge, peft"),
    ):
        done = run_script(*argv, script="export.py", check=False)
        assert done.returncode == 2 and words in done.stderr
    shutil.rmtree(tmp_path, ignore_errors=True)
