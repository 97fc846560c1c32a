"""An open model beside TRL, transformers and llama.cpp on a CPU: steps of DPO, rollouts, one sequence.

    python -m benchmarks.open_model --model=SmolLM2-135M-Instruct        a folder in Hugging Face's layout
    python -m benchmarks.open_model --model=gpt2_10.9M --sections=one    a random GPT-2 of this size, made here

- dpo: a LoRA of rank 8 on all linear layers; 4 pairs of a prompt of 40 words and completions of 60. Ours is the mean of
  the steps between the last two lines, TRL's the median after its first five.
- rollouts: 4 completions of 65 tokens of each of 4 prompts, drawn at once.
- one: one greedy sequence: tokens a second of reading a prompt of 256 and of decoding 64.

The programs take turns, each in processes of its own, on the same rows and weights; a section's `peer` is the one that
the others have a ratio to, above 1 where they are faster. Writes benchmarks/open_model_cpu.json.
"""

import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import configurator
from benchmarks.common import (
    ROOT,
    SCRIPTS,
    Figures,
    Measurement,
    Side,
    compare,
    describe_setup,
    print_table,
    run_process,
    take_turns,
    to_flags,
)
from benchmarks.session import median_step_ms
from configurator import arg, arg_group, arg_table
from nanoforge.device import find_bfloat16_units
from nanoforge.files import write_json

SECTIONS = ("dpo", "rollouts", "one")
RANDOM_GPT2 = "gpt2_10.9M"
BATCH_SIZE, RANK = 4, 8  # of DPO
LOG_INTERVAL = 10  # steps; the default of both programs. TRL computes its metrics at each step all the same
PROMPT_WORDS, COMPLETION_WORDS = 40, 60
WORDS = (
    "the of and to in that it is was for on are with as be at one have this from by had not but what all were when we "
    "there can an your which their said if do will each about how up out them then she many some so these would other"
)


@arg_group
class OpenModelArgs:
    """comparison"""

    model: str = arg("", f"folder of an open model, or {RANDOM_GPT2}", path=True)
    sections: tuple[str, ...] = arg(SECTIONS, "what to measure", choices=SECTIONS)
    pairs: int = arg(3, "times that each side runs, in turn", low=1)
    steps: int = arg(LOG_INTERVAL, "steps of DPO, a multiple of 10", low=LOG_INTERVAL)
    out: str = arg("benchmarks", "folder of the results", path=True)


@arg_table
class Args(OpenModelArgs):
    """The arguments."""


def check(args: Args, source: dict[str, str]) -> Iterator[str]:
    """The errors in the arguments."""
    if args.steps % LOG_INTERVAL:
        yield f"--steps={args.steps}: must be a multiple of {LOG_INTERVAL}, after which a line is logged"
    if args.model == RANDOM_GPT2:
        if "dpo" in args.sections or "rollouts" in args.sections:
            yield f"--model={RANDOM_GPT2}: is for --sections=one"
    elif not (Path(args.model) / "config.json").exists():
        yield f"--model={args.model}: no such file: {args.model}/config.json; export.py hf writes such a folder"


# ---------------------------------------------------------------------------------------------------------------------
# what is compared


def write_pairs(path: Path, count: int) -> None:
    """Rows of random words for DPO."""
    draw = random.Random(0)

    def text(n_words: int) -> str:
        return " " + " ".join(draw.choices(WORDS.split(), k=n_words))

    with path.open("w") as file:
        for _ in range(count):
            prompt, chosen, rejected = text(PROMPT_WORDS), text(COMPLETION_WORDS), text(COMPLETION_WORDS)
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def write_random_gpt2(folder: Path, n_layer: int = 6, n_embd: int = 384, n_head: int = 6) -> None:
    """A random GPT-2 with a context of 256 and 512 tokens, and a tokenizer."""
    import tokenizers
    import transformers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    end = "<|endoftext|>"
    tokenizer.train_from_iterator([(ROOT / "model.py").read_text()], vocab_size=512, special_tokens=[end])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=end, pad_token=end)
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "n_positions": 256, "n_layer": n_layer, "n_embd": n_embd, "n_head": n_head}
    config = transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None)  # type: ignore[arg-type]
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def last_json(output: str) -> Measurement:
    return json.loads(output.rpartition("json ")[2])


# ---------------------------------------------------------------------------------------------------------------------
# the sections


def measure_dpo(args: Args, model: str, dtypes: list[str], folder: Path) -> Iterator[tuple[str, Figures]]:
    """ms of a step in each dtype."""
    pairs = folder / "pairs.jsonl"
    write_pairs(pairs, BATCH_SIZE * args.steps)

    def ours(dtype: str, base_dtype: str) -> Measurement:
        out_dir = Path(tempfile.mkdtemp(dir=folder))
        flags = {
            "objective": "dpo",
            "init_from": model,
            "adapter": "lora",
            "lora_rank": RANK,
            "train_file": pairs,
            "validation_file": pairs,
            "batch_size": BATCH_SIZE,
            "max_iters": args.steps,
            "learning_rate": 1e-5,
            "eval_interval": 10**6,
            "eval_iters": 1,
            "log_interval": LOG_INTERVAL,
            "device": "cpu",
            "dtype": dtype,
            "base_dtype": base_dtype,
            "out_dir": out_dir,
        }
        run_process([sys.executable, str(ROOT / "train.py"), *to_flags(**flags)])
        lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
        step_ms = [line["step_ms"] for line in lines if line["event"] == "train"]
        return {"ms": step_ms[-1]}

    def trl(dtype: str, base_dtype: str) -> Measurement:
        options = {"batch_size": BATCH_SIZE, "steps": args.steps, "rank": RANK}
        command = [str(SCRIPTS / "trl_dpo.py"), model, str(pairs), dtype, base_dtype, json.dumps(options)]
        step_ms: Any = last_json(run_process([sys.executable, *command]).output)["step_ms"]
        return {"ms": median_step_ms(step_ms, args.steps, log_interval=1)}

    for dtype in dtypes:
        sides: dict[str, Side] = {"ours": partial(ours, dtype, "float32"), "peer": partial(trl, dtype, "float32")}
        if dtype == "bfloat16":
            sides |= {
                "ours, bfloat16 base": partial(ours, dtype, dtype),
                "TRL, bfloat16 base": partial(trl, dtype, dtype),
            }
        yield dtype, compare(take_turns(args.pairs, sides), "ms", lower_is_better=True)


def complete(program: str, model: str, dtype: str, task: str) -> Measurement:
    """Run scripts/complete.py."""
    return last_json(run_process([sys.executable, str(SCRIPTS / "complete.py"), program, model, dtype, task]).output)


def measure_rollouts(args: Args, model: str, dtypes: list[str], folder: Path) -> Iterator[tuple[str, Figures]]:
    """Tokens a second in each dtype."""
    for dtype in dtypes:
        sides: dict[str, Side] = {
            "ours": partial(complete, "ours", model, dtype, "rollouts"),
            "peer": partial(complete, "transformers", model, dtype, "rollouts"),
        }
        yield dtype, compare(take_turns(args.pairs, sides), "tokens_per_second", lower_is_better=False)


def measure_one(args: Args, model: str, dtypes: list[str], folder: Path) -> Iterator[tuple[str, Figures]]:
    """Tokens a second of reading and of decoding, beside llama.cpp in float16."""
    sides: dict[str, Side] = {}
    for dtype in dtypes:
        sides[f"ours, {dtype}"] = partial(complete, "ours", model, dtype, "one")
        sides[f"transformers, {dtype}"] = partial(complete, "transformers", model, dtype, "one")
    sides["--engine=llama.cpp, float16"] = partial(complete, "engine", model, "float16", "one")
    if "bfloat16" in dtypes:
        sides["--engine=llama.cpp, bfloat16"] = partial(complete, "engine", model, "bfloat16", "one")
        sides["llama.cpp, bfloat16"] = partial(complete, "llama.cpp", model, "bfloat16", "one")
    sides["peer"] = partial(complete, "llama.cpp", model, "float16", "one")
    results = take_turns(args.pairs, sides)
    for part in ("prefill", "decode"):
        yield part, compare(results, part, lower_is_better=False)


MEASURES: dict[str, Callable[[Args, str, list[str], Path], Iterator[tuple[str, Figures]]]] = {
    "dpo": measure_dpo,
    "rollouts": measure_rollouts,
    "one": measure_one,
}


def main(args: Args) -> None:
    """Measure the sections, and write each figure as soon as it is there."""
    path = Path(args.out) / "open_model_cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results: Figures = json.loads(path.read_text()) if path.exists() else {}
    dtypes = ["float32", "bfloat16"] if find_bfloat16_units(torch.device("cpu")) else ["float32"]
    with tempfile.TemporaryDirectory(prefix="bench") as name:
        folder = Path(name)
        model = args.model
        if model == RANDOM_GPT2:
            model = str(folder / model)
            write_random_gpt2(Path(model))
        for section in args.sections:
            print(f"== {section}", flush=True)
            written: Figures = {"about": describe_setup("python -m benchmarks.open_model")}
            for figure_name, figure in MEASURES[section](args, model, dtypes, folder):
                print_table(f"{section}, {figure_name}", figure)
                written[figure_name] = figure
                results[f"{section}, {Path(args.model).name}"] = written
                write_json(path, results)


if __name__ == "__main__":
    configurator.run(main, configurator.parse(Args, sys.argv[1:], __doc__ or "", configurator.Rules(check=check)))
