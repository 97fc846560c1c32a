"""Runs the commands of pages: each in a forked process, in a folder like the clone's, made short by further flags.

`Workplace` is that folder: the configs, the prepare.py of the datasets, the files that pages call yours, a tiny chat
model under the names of the runs that pages go on from, and in a cache under the names of models of the hub.
"""

import json
import os
import random
import re
import runpy
import shutil
import signal
import string
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from helpers import ROOT, SHARED, TEXT, cache_model, start_fork, wait_for_exit, write_char_dataset
from page_commands import Command

TINY_SHAPE = ["--n_layer=2", "--n_head=6", "--n_embd=48", "--block_size=64"]
SHORT = ["--max_iters=2", "--eval_interval=2", "--eval_iters=1", "--log_interval=1", "--device=cpu", "--dtype=float32"]
LAST_STEP = "000002"  # of a short run: its only checkpoint, whatever a page says
CHECKPOINT = re.compile(r"([^=]*?(?:checkpoints/|--checkpoint=)(\d+))")
CHATS = [
    {"messages": [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": f"Good day {i}."}]}
    for i in range(12)
]
PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i + 2}"} for i in range(12)]
PROBLEMS = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(12)]


def run_in_fork(script: str, argv: list[str], cwd: Path, log: Path, env: dict[str, str]) -> None:
    """What a forked process does: the script, as `python SCRIPT ARGV` in a folder."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ |= env
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = [script, *argv]
    path = cwd / script if (cwd / script).exists() else ROOT / script
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.stdout.flush()


def run(script: str, argv: list[str], cwd: Path, env: dict[str, str] | None = None) -> str:
    """The output of a command; fails where it ends with another status than 0. One that serves is asked for its page,
    then interrupted."""
    log = cwd / "log.txt"
    log.unlink(missing_ok=True)
    process = start_fork(run_in_fork, script, argv, cwd, log, env or {})
    expected = 0
    if {"--serve", "--watch"} & {*argv}:
        ask_for_page(process, log)
        os.kill(process.pid, signal.SIGINT)
        expected = 128 + signal.SIGINT
    status = wait_for_exit(process, 120)
    output = log.read_text()
    assert status == expected, f"{script} {' '.join(argv)}: status {status}\n{output[-3000:]}"
    return output


def ask_for_page(process: Any, log: Path) -> None:
    """Wait until a process prints its address, and read the page there."""
    started = time.monotonic()
    while process.is_alive() and time.monotonic() - started < 60:
        address = re.search(r"http://127\.0\.0\.1:\d+", log.read_text() if log.exists() else "")
        if address is not None:
            with urllib.request.urlopen(address[0], timeout=60) as answer:
                assert b"<html" in answer.read()
            return
        time.sleep(0.05)


def shorten(script: str, argv: list[str]) -> list[str]:
    """The arguments with others that make the command short."""
    text = " ".join(argv)
    if script == "train.py" and not {"--print_config", "--help"} & {*argv}:
        return shorten_training(argv, text)
    if script == "sweep.py":  # the runs are printed; tests/sweeps starts some
        return [word for word in argv if word not in ("--launcher=local", "-j", "2")]
    if script == "data/gsm8k/prepare.py":
        return [*argv, "--input=gsm8k", "--overwrite"]
    if {"--serve", "--watch"} & {*argv}:
        return [*(word for word in argv if word != "--open"), "--port=0"]
    if script == "sample.py":
        one = ["--num_samples=1"] if "--start" in text or "--chat" not in argv else []
        return [*argv, "--max_new_tokens=4", *one]
    if script in ("data/prepare.py", "data/arithmetic/prepare.py"):  # a page may make a dataset twice
        return [*argv, "--overwrite"]
    if script == "evaluate.py" and "--tasks" in text and "questions" not in text:
        return [*argv, "--max_new_tokens=4", "--max_problems=4"]
    return argv


def shorten_training(argv: list[str], text: str) -> list[str]:
    """As `shorten`, of train.py."""
    argv = [word for word in argv if "_budget=" not in word]  # seconds at least; tests/training/test_budget.py has them
    if "--init_from=resume" in text or "--resume" in text:
        return [*(word for word in argv if not word.startswith("--max_iters=")), *SHORT[1:]]
    loads_weights = "--init_from=" in text or any(name in text for name in ("quick_test", "gsm8k_grpo", "tasks/"))
    short = SHORT[1:] if "--steps" in argv else SHORT
    shape = ["--depth=2", "--block_size=64", "--warmup_iters=1"] if "--depth=" in text else TINY_SHAPE
    extra = [*short, "--batch_size=4", *([] if loads_weights else shape)]
    if "grpo" in text or "quick_test" in text:
        extra += ["--num_generations=2", "--max_new_tokens=4", "--block_size=512"]
    elif loads_weights and "--max_tokens" not in text:
        extra.append("--block_size=128")
    return [*argv, *extra, "--overwrite"]


class Workplace:
    """A folder in which the commands of the pages run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("configs", "benchmarks"):
            if not (folder / name).exists():
                (folder / name).symlink_to(ROOT / name)
        for path in (*ROOT.glob("data/**/*.py"), ROOT / "requirements-optional.txt"):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        words = random.Random(1)
        (folder / "book.txt").write_text(" ".join("".join(words.sample(TEXT, 4)) for _ in range(12_000)))
        caches = {"HF_HUB_CACHE": str(folder / "hub"), "XDG_CACHE_HOME": str(folder / "cache")}
        self.env = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **caches}
        if SHARED.exists():
            self.env["TIKTOKEN_CACHE_DIR"] = str(SHARED / "tiktoken_cache")

    def run(self, command: Command) -> str:
        """Run a command of a page, shortened."""
        argv: list[str] = []
        for word in shorten(command.script, command.argv):
            checkpoint = CHECKPOINT.search(word)
            if checkpoint and not (self.folder / checkpoint[1]).exists():
                argv.append(word.replace(checkpoint[2], LAST_STEP))
            elif word.endswith("/*"):  # which a shell replaces
                argv += sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(word))
            else:
                argv.append(word)
        return run(command.script, argv, self.folder, self.env)

    def write_rows(self, **files: list[dict]) -> None:
        """Write files of rows: name without .jsonl -> rows."""
        for name, rows in files.items():
            path = self.folder / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def copy(self, folder: Path) -> "Workplace":
        """The same in another folder."""
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True)
        return Workplace(folder)

    def furnish(self) -> None:
        """The files and runs that pages take for granted."""
        folder = self.folder
        self.write_rows(chats=CHATS, held_out=CHATS, pairs=PAIRS, pairs_val=PAIRS, rows=CHATS, train=PROBLEMS)
        texts = [{"text": TEXT}] * 12
        self.write_rows(
            **{"val": PROBLEMS, "passages": texts, "passages_val": texts, "more": texts, "clean/00000": texts}
        )
        self.write_rows(strings=[{"word": "ab", "answer": "ba"}] * 12)
        abstracts = pyarrow.table({"title": ["Red", "Blue"] * 6, "abstract": ["a colour"] * 12})
        for name in ("a.parquet", "b.parquet"):
            pyarrow.parquet.write_table(abstracts, folder / name)
        choices = [{"question": "What is red?", "choices": ["blood", "the sea"], "answer": 0}]
        self.write_rows(**{"data/questions": choices, "data/sums/train": CHATS, "data/sums/val": CHATS})
        self.write_rows(**{"data/preferences/train": PAIRS, "data/preferences/val": PAIRS})
        (folder / "corpus").mkdir()
        (folder / "corpus/a.txt").write_text(TEXT * 50)
        (folder / "prompt.txt").write_text("the quick")
        (reward,) = re.findall(
            r"^```python\n(.*?)^```", (ROOT / "docs/rewards.md").read_text(), re.DOTALL | re.MULTILINE
        )
        (folder / "my_rewards.py").write_text(reward)
        (grid,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/smollm2.md").read_text(), re.DOTALL | re.MULTILINE)
        (folder / "align.yaml").write_text(grid)
        for name in ("shakespeare_char", "openwebtext", "stdlib_large"):
            write_char_dataset(folder / "data" / name, TEXT * 50, sorted(string.printable))
        self.write_rows(**{"gsm8k/train": PROBLEMS, "gsm8k/test": PROBLEMS})
        run("data/gsm8k/prepare.py", ["--input=gsm8k", "--chat"], folder)
        for name, tokenizer in (("NAME", "bpe"), ("code", "byte"), ("tags", "byte")):
            size = ["--vocab_size=300"] if tokenizer == "bpe" else []
            run("data/prepare.py", ["--input", "book.txt", f"--name={name}", f"--tokenizer={tokenizer}", *size], folder)
        shape = ["configs/llama.py", "--n_layer=2", "--n_embd=36", "--block_size=512", "--batch_size=4", *SHORT]
        run("train.py", [*shape, "--dataset=NAME", "--checkpoint_interval=1", "--out_dir=out/base"], folder)
        flags = [*SHORT, *TINY_SHAPE, "--batch_size=4"]
        run("train.py", ["--dataset=shakespeare_char", *flags, "--out_dir=out/shakespeare"], folder)
        chat = ["--objective=sft", "--init_from=out/base", "--train_file=chats.jsonl", "--batch_size=4", *SHORT]
        run("train.py", [*chat, "--out_dir=out/chat"], folder)
        run("train.py", [*chat, "--adapter=lora", "--out_dir=out/lora"], folder)
        for name in ("run", "mine", "large", "a"):
            shutil.copytree(folder / "out/base", folder / "out" / name)
        for name in ("out/grpo", "out/scaling_laws/small", "out/scaling_laws/large"):
            shutil.copytree(folder / "out/chat", folder / name)
        prompt = ["--adapter=soft_prompt", "--prompt_format=<P*2>{word}>", "--target_field=answer", *SHORT]
        rows = ["--train_file=strings.jsonl", "--validation_file=strings.jsonl", "--batch_size=4", "--block_size=64"]
        run("train.py", ["--objective=sft", "--init_from=out/base", *rows, *prompt, "--out_dir=outputs/prompt"], folder)
        for name in ("reverse/20260101_120000", "a/20260101_120000", "b/20260101_120500"):
            shutil.copytree(folder / "outputs/prompt", folder / "outputs" / name)
        run("export.py", ["hf", "out/chat", "--to=models/chat"], folder)
        run("export.py", ["gguf", "out/chat", "--to=SmolLM2-135M-Instruct.gguf"], folder)
        shutil.copy(folder / "SmolLM2-135M-Instruct.gguf", folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
        for name in ("salamandra-2b", "SmolLM2-135M-Instruct"):
            shutil.copytree(folder / "models/chat", folder / "models" / name)
        for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen3-0.6B"):
            cache_model(folder / "hub", name, folder / "models/chat")
        for name in (
            "openai-community/gpt2",
            "openai-community/gpt2-large",
            "openai-community/gpt2-xl",
            "google/gemma-3-1b-it",
        ):
            cache_model(folder / "hub", name, folder / "models/chat")
