"""What the tests share: tiny datasets and examples, flags of a tiny run, and commands in processes of their own."""

import dataclasses
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a test runs on each core: their threads would be in each other's way

import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

import train
import train_args
from model import GPT, GPTConfig
from nanoforge import files
from nanoforge.data import corpus, tokenization
from nanoforge.data.tokenization import CharTokenizer
from nanoforge.training import checkpoint

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8", "--batch_size=4", "--max_iters=4", "--eval_iters=1", "--eval_interval=2",
        "--log_interval=1", "--warmup_iters=0", "--device=cpu", "--dtype=float32"]  # fmt: skip
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.\n"


def write_char_dataset(folder: Path, words: str, chars: str | None = None) -> None:
    """A character dataset; the last tenth is for validation."""
    cut = int(len(words) * 0.9)
    corpus.write_dataset(
        folder,
        lambda: [corpus.TextChunk("train", words[:cut]), corpus.TextChunk("val", words[cut:])],
        CharTokenizer(chars or sorted(set(words))),
    )


DIGITS = CharTokenizer("0123456789+=", has_eos=True)


def write_examples(folder: Path, rows: list[dict], train: int, tokenizer: tokenization.Tokenizer = DIGITS) -> None:
    """Examples with a tokenizer; the first `train` rows are for training, the others for validation."""
    folder.mkdir(parents=True)
    files.write_json(
        folder / "meta.json",
        {
            "dtype": "uint16",
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenization.to_json(tokenizer),
            "files": {},
        },
    )
    for split, some in (("train", rows[:train]), ("val", rows[train:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def write_sum_datasets(folder: Path) -> None:
    """The sums 12+9= 21 of prompts and completions of different lengths, of at most 8 tokens with their end: 110 to train, 20 to validate; as
    sft and grpo take them in `sums`, as preferences of the right answer to a wrong one in `pairs` and `labelled`, as chats in `chat`."""
    sums = sorted(((a, b) for a in range(13) for b in range(10)), key=lambda ab: (ab[0] * 37 + ab[1] * 53) % 131)
    asked = [(f"{a}+{b}=", str(a + b), str(a + b + 1)) for a, b in sums if len(f"{a}+{b}={a + b + 1}") < 8]
    write_examples(
        folder / "sums", [{"prompt": prompt, "completion": right, "answer": right} for prompt, right, _ in asked], 110
    )
    write_examples(
        folder / "pairs",
        [{"prompt": prompt, "chosen": right, "rejected": wrong} for prompt, right, wrong in asked],
        110,
    )
    labelled = [
        {"prompt": prompt, "completion": right if i % 3 == 0 else wrong, "label": i % 3 == 0}
        for i, (prompt, right, wrong) in enumerate(asked)
    ]
    write_examples(folder / "labelled", labelled, 12)
    chats = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": right}]}
        for prompt, right, _ in asked
        if len(prompt + right) < 6
    ]
    write_examples(folder / "chat", chats, 50)


def read_run(out_dir: Path, progress=None, console: str = "") -> SimpleNamespace:
    """A run's folder as its files tell it."""

    metrics = out_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    config = out_dir / "train_config.json"
    steps = checkpoint.list_steps(out_dir / "checkpoints")
    last = checkpoint.load(out_dir / "checkpoints" / f"{steps[-1]:06d}") if steps else None
    return SimpleNamespace(
        out_dir=out_dir, progress=progress, console=console, steps=steps, last=last,
        train=[line for line in lines if line["event"] == "train"], evals=[line for line in lines if line["event"] == "eval"],
        losses=[line["loss"] for line in lines if line["event"] == "train"],
        config=json.loads(config.read_text()) if config.exists() else None,
    )  # fmt: skip


def run_script(
    *argv: str,
    check: bool = True,
    ranks: int = 1,
    script: str = "train.py",
    cwd: Path = ROOT,
    env: dict | None = None,
    **more,
) -> subprocess.CompletedProcess:
    """Run a command of the program in a process of its own, or under torchrun."""
    start = (
        [sys.executable]
        if ranks == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(
        [*start, str(ROOT / script), *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
        **more,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def equal_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gpt2_tokenizer_env() -> dict[str, str]:
    """The environment in which tiktoken finds its gpt2 offline; skips the test where that is not there."""
    if not (SHARED / "tiktoken_cache").exists():
        pytest.skip("tiktoken's gpt2 is in ../shared, which is not here")
    return {"TIKTOKEN_CACHE_DIR": str(SHARED / "tiktoken_cache")}


needs_shared = pytest.mark.skipif(
    not (SHARED / "tinyshakespeare").exists(), reason="the real texts of ../shared are not here"
)


# ---------------------------------------------------------------------------------------------------------------------
# a tiny model in this process

TINY_MODEL = GPTConfig(vocab_sizes=(31,), block_size=12, n_layer=2, n_head=4, n_embd=32, bias=False)


def tiny_model(seed: int = 0, **changes) -> GPT:
    """A GPT of TINY_MODEL's shape, changed; its weights are random, away from the special values of initialisation."""
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(TINY_MODEL, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ids(*shape: int, high: int = 31, seed: int = 1) -> torch.Tensor:
    """Random token ids below `high`."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# runs in forked processes, which start fast because torch is loaded already

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["train", "torch._dynamo"])
TINY_WITHOUT_SHAPE = [flag for flag in TINY if not flag.startswith(("--n_layer", "--n_head", "--n_embd"))]


def train_in_fork(flags: list[str], log: Path, env: dict[str, str], before: Callable[[], None] | None) -> None:
    """What a forked process does: a run whose output goes to `log`, after `before` has prepared a fault."""
    os.environ |= env
    sys.stdout = sys.stderr = log.open("a")
    torch.set_num_threads(1)
    if before is not None:
        before()
    train.main(train_args.parse(flags))
    sys.stdout.flush()


def start_ranks(flags: list[str], ranks: int, log: Path, before: Callable[[], None] | None = None) -> list:
    """The processes of a run on so many ranks, started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(ranks):
        env = {}
        if ranks > 1:
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        processes.append(FORKSERVER.Process(target=train_in_fork, args=(flags, log, env, before)))
        processes[-1].start()
    return processes


def wait_for_exit(process, seconds: float = 60) -> int:
    """The exit status of a process that must end in time."""
    process.join(seconds)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def run_on_ranks(out_dir: Path, ranks: int, *flags: str) -> SimpleNamespace:
    """A run on so many ranks, in forked processes; its files."""
    log = out_dir.with_suffix(".log")
    processes = start_ranks([*flags, f"--out_dir={out_dir}"], ranks, log)
    assert [wait_for_exit(process, 120) for process in processes] == [0] * ranks, log.read_text()[-3000:]
    return read_run(out_dir)


def metric(done: SimpleNamespace, name: str) -> list[float]:
    """A metric of a run's training lines."""
    return [line[name] for line in done.train]


def assert_same_lines(a: list[dict], b: list[dict], names) -> None:
    """Of metrics, within 1e-4; None is told where there was nothing to take a mean of."""
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        for name in names:
            assert other[name] == (None if one[name] is None else pytest.approx(one[name], rel=1e-4, abs=1e-5)), (
                name,
                one["step"],
            )
