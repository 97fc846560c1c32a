"""Runs the commands of pages: each in a forked process, in a folder like the clone's, made short by further flags.

`Workplace` is that folder: the configs, the prepare.py of the datasets, the files that pages call yours, a tiny chat
model under the names of the runs that pages go on from, and in a cache under the names of models of the hub. A few
rows are in a cache under the names of datasets of the hub; `sbatch` answers as Slurm's.
"""

import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet
import torch
from helpers import ROOT, SHARED, TEXT, cache_dataset, cache_model, start_fork, wait_for_exit, write_char_dataset
from page_commands import Command

TINY_SHAPE = ["--n_layer=2", "--n_head=6", "--n_embd=48", "--block_size=64"]
SHORT = ["--max_iters=2", "--eval_interval=2", "--eval_iters=1", "--log_interval=1", "--device=cpu", "--dtype=float32"]
LAST_STEP = "000002"  # of a short run: its only checkpoint, whatever a page says
SERVER = "http://127.0.0.1:8000"  # as pages name it
CHECKPOINT = re.compile(r"([^=]*?(?:checkpoints/|--checkpoint=)(\d+))")
CHATS = [
    {"messages": [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": f"Good day {i}."}]}
    for i in range(12)
]
PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i + 2}"} for i in range(12)]
INSTRUCTIONS = [{"instruction": "Add.", "input": f"{i} + 1", "output": str(i + 1), "text": f"{i}"} for i in range(12)]
PREFERENCES = [
    {
        "prompt": f"{i} + 1?",
        "chosen": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": str(i + 1)}],
        "rejected": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": str(i + 2)}],
        "score_chosen": 9.0,
        "score_rejected": 3.0,
    }
    for i in range(12)
]
LM_EVAL_TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {validation: tasks/my_task.jsonl}}
output_type: multiple_choice
validation_split: validation
fewshot_split: validation
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
"""
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
    if {"--serve", "--watch"} & {*argv}:
        with serving(script, argv, cwd, env) as address, urllib.request.urlopen(address, timeout=60) as answer:
            page = answer.read().decode()
            assert "<html" in page
        return page
    log = cwd / "log.txt"
    log.unlink(missing_ok=True)
    status = wait_for_exit(start_fork(run_in_fork, script, argv, cwd, log, env or {}), 120)
    output = log.read_text()
    assert status == 0, f"{script} {' '.join(argv)}: status {status}\n{output[-3000:]}"
    return output


@contextmanager
def serving(script: str, argv: list[str], cwd: Path, env: dict[str, str] | None = None) -> Iterator[str]:
    """The address that a command prints, while it serves; then it is interrupted."""
    log = cwd / "server.txt"
    log.unlink(missing_ok=True)
    process = start_fork(run_in_fork, script, argv, cwd, log, env or {})
    started = time.monotonic()
    address = None
    while address is None and process.is_alive() and time.monotonic() - started < 60:
        time.sleep(0.05)
        address = re.search(r"http://127\.0\.0\.1:\d+", log.read_text() if log.exists() else "")
    try:
        assert address is not None, f"{script} {' '.join(argv)}: {log.read_text()[-3000:]}"
        yield address[0]
    finally:
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)
        status = wait_for_exit(process, 120)
    assert status == 128 + signal.SIGINT, log.read_text()[-3000:]


def shorten(script: str, argv: list[str]) -> list[str]:
    """The arguments with others that make the command short."""
    text = " ".join(argv)
    if script == "train.py" and not {"--print_config", "--help"} & {*argv}:
        return shorten_training(argv, text)
    if script == "benchmarks/rollouts.py":
        return [*argv, "--prompts=4", "--tokens=4", "--rounds=1"]
    if script == "benchmarks/serving.py":
        return [*argv, "--seconds=0.5", "--turns=1", "--max_tokens=4"]
    if script == "sweep.py":  # the runs are printed, or given to sbatch; tests/sweeps starts some
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


def only_block(page: str, language: str) -> str:
    """The only block of code in a language that a page has."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)
    return block


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
        caches |= {"HF_DATASETS_CACHE": str(folder / "datasets"), "TRACKIO_DIR": str(folder / "trackio")}
        path = f"{folder}/bin:{os.environ['PATH']}"
        self.env = {"PYTHONPATH": str(ROOT), "PATH": path, "HF_HUB_OFFLINE": "1", **caches}
        if SHARED.exists():
            self.env["TIKTOKEN_CACHE_DIR"] = str(SHARED / "tiktoken_cache")

    def run(self, command: Command) -> str:
        """Run a command of a page, shortened. One that asks a server gets one."""
        if SERVER in command.text or command.script == "benchmarks/serving.py":
            flags = ["--serve", "--out_dir=out/chat", "--port=0", "--device=cpu"]
            with serving("sample.py", flags, self.folder, self.env) as address:
                return self.ask(command, address)
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

    def ask(self, command: Command, address: str) -> str:
        """Run a command that asks a server at an address."""
        if command.script:
            argv = [*shorten(command.script, command.argv), f"--url={address}"]
            return run(command.script, argv, self.folder, self.env)
        argv = [word.replace(SERVER, address) for word in shlex.split(command.text)]
        reply = subprocess.run([*argv, "-s"], capture_output=True, text=True, timeout=60, check=True).stdout
        assert json.loads(reply)["choices"], reply
        return reply

    def copy(self, folder: Path) -> "Workplace":
        """The same in another folder."""
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True)
        return Workplace(folder)

    def furnish(self) -> None:
        """The files, datasets, runs and models that pages take for granted."""
        self.write_files()
        self.make_datasets()
        self.make_runs()
        self.fill_caches()

    def write_files(self) -> None:
        """What pages call the reader's: rows, texts, tables, a reward, a grid, tasks; and `sbatch`."""
        folder = self.folder
        texts = [{"text": TEXT}] * 12
        choices = [{"question": "What is red?", "choices": ["blood", "the sea"], "answer": 0}]
        rows = {
            "chats": CHATS,
            "held_out": CHATS,
            "rows": CHATS,
            "data/sums/train": CHATS,
            "data/sums/val": CHATS,
            "pairs": PAIRS,
            "pairs_val": PAIRS,
            "data/preferences/train": PAIRS,
            "data/preferences/val": PAIRS,
            "train": PROBLEMS,
            "val": PROBLEMS,
            "gsm8k/train": PROBLEMS,
            "gsm8k/test": PROBLEMS,
            "passages": texts,
            "passages_val": texts,
            "more": texts,
            "clean/00000": texts,
            "strings": [{"word": "ab", "answer": "ba"}] * 12,
            "data/questions": choices,
            "tasks/my_task": choices * 8,
        }
        for name, file_rows in rows.items():
            path = folder / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in file_rows))
        abstracts = pyarrow.table({"title": ["Red", "Blue"] * 6, "abstract": ["a colour"] * 12})
        for name in ("a.parquet", "b.parquet"):
            pyarrow.parquet.write_table(abstracts, folder / name)
        (folder / "tasks/my_task.yaml").write_text(LM_EVAL_TASK)
        (folder / "corpus").mkdir()
        (folder / "corpus/a.txt").write_text(TEXT * 50)
        (folder / "prompt.txt").write_text("the quick")
        (folder / "my_rewards.py").write_text(only_block("rewards.md", "python"))
        (folder / "align.yaml").write_text(only_block("smollm2.md", "yaml"))
        (folder / "bin").mkdir()
        for name, text in (("sbatch", "echo 5"), ("squeue", "true")):
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / "bin" / name).chmod(0o755)

    def make_datasets(self) -> None:
        """Token bins."""
        for name in ("shakespeare_char", "openwebtext", "stdlib_large"):
            write_char_dataset(self.folder / "data" / name, TEXT * 50, sorted(string.printable))
        self.python("data/gsm8k/prepare.py", "--input=gsm8k", "--chat")
        for name, tokenizer in (("NAME", "bpe"), ("code", "byte"), ("tags", "byte")):
            size = ["--vocab_size=300"] if tokenizer == "bpe" else []
            self.python("data/prepare.py", "--input", "book.txt", f"--name={name}", f"--tokenizer={tokenizer}", *size)

    def make_runs(self) -> None:
        """Runs: pre-trained, a chat, a LoRA, a soft prompt; and the chat as a folder of transformers' and as GGUF."""
        folder = self.folder
        shape = ["configs/llama.py", "--n_layer=2", "--n_embd=36", "--block_size=512", "--batch_size=4", *SHORT]
        self.python("train.py", *shape, "--dataset=NAME", "--checkpoint_interval=1", "--out_dir=out/base")
        flags = [*SHORT, *TINY_SHAPE, "--batch_size=4"]
        self.python("train.py", "--dataset=shakespeare_char", *flags, "--out_dir=out/shakespeare")
        chat = ["--objective=sft", "--init_from=out/base", "--train_file=chats.jsonl", "--batch_size=4", *SHORT]
        self.python("train.py", *chat, "--out_dir=out/chat")
        self.python("train.py", *chat, "--adapter=lora", "--out_dir=out/lora")
        prompt = ["--adapter=soft_prompt", "--prompt_format=<P*2>{word}>", "--target_field=answer", *SHORT]
        rows = ["--train_file=strings.jsonl", "--validation_file=strings.jsonl", "--batch_size=4", "--block_size=64"]
        start = ["--objective=sft", "--init_from=out/base", "--out_dir=outputs/prompt"]
        self.python("train.py", *start, *rows, *prompt)
        self.python("export.py", "hf", "out/chat", "--to=models/chat")
        self.python("export.py", "gguf", "out/chat", "--to=SmolLM2-135M-Instruct.gguf")

        copies = {
            "out/base": ("out/run", "out/mine", "out/large", "out/a"),
            "out/chat": ("out/grpo", "out/scaling_laws/small", "out/scaling_laws/large"),
            "outputs/prompt": (
                "outputs/reverse/20260101_120000",
                "outputs/a/20260101_120000",
                "outputs/b/20260101_120500",
            ),
            "models/chat": ("models/salamandra-2b", "models/SmolLM2-135M-Instruct"),
        }
        for source, targets in copies.items():
            for target in targets:
                shutil.copytree(folder / source, folder / target)
        shutil.copy(folder / "SmolLM2-135M-Instruct.gguf", folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
        words = ["--input", "book.txt", "--name=shakespeare", "--tokenizer=models/chat", "--overwrite"]
        self.python("data/prepare.py", *words)  # in the tokens of the models that are called gpt2

    def python(self, script: str, *argv: str) -> None:
        """Run a script with these arguments."""
        run(script, list(argv), self.folder)

    def fill_caches(self) -> None:
        """What is cached of the hub: a tiny chat model under the names of models, and rows of datasets."""
        for name in (
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "HuggingFaceTB/SmolLM2-135M",
            "Qwen/Qwen3-0.6B",
            "openai-community/gpt2",
            "openai-community/gpt2-medium",
            "openai-community/gpt2-large",
            "openai-community/gpt2-xl",
            "google/gemma-3-1b-it",
        ):
            cache_model(self.folder / "hub", name, self.folder / "models/chat")
        cache = self.folder / "datasets"
        cache_dataset(cache, "tatsu-lab/alpaca", train=INSTRUCTIONS)
        cache_dataset(cache, "HuggingFaceH4/ultrafeedback_binarized", train_prefs=PREFERENCES, test_prefs=PREFERENCES)
        cache_dataset(cache, "org/name", train=CHATS)
        endings = {"activity_label": "Running", "ctx_a": "He runs", "ctx_b": "and", "ctx": "He runs and", "ind": 1}
        endings |= {"endings": ["stops.", "flies.", "melts.", "rusts."], "label": "0", "split": "val"}
        cache_dataset(cache, "Rowan/hellaswag", **dict.fromkeys(("train", "validation", "test"), [endings] * 4))
        choice = {"id": "1", "question": "What is red?", "choices": {"text": ["blood", "milk"], "label": ["A", "B"]}}
        splits = dict.fromkeys(("train", "validation", "test"), [choice | {"answerKey": "A"}] * 4)
        cache_dataset(cache, "allenai/ai2_arc", config="ARC-Easy", **splits)
