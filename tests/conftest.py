"""What the tests share: a tiny dataset, a tiny model, and a run in this process or another."""

import json
import os
import subprocess
import sys
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
from nanoforge import files
from nanoforge.data import corpus, tokenization
from nanoforge.data.tokenization import CharTokenizer
from nanoforge.training import checkpoint

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8", "--batch_size=4", "--max_iters=4", "--eval_iters=1", "--eval_interval=2",
        "--log_interval=1", "--warmup_iters=0", "--device=cpu", "--dtype=float32"]  # fmt: skip
WORDS = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.\n"


def write_text(folder: Path, words: str, chars: str | None = None) -> None:
    """A character dataset; the last tenth is for validation."""
    cut = int(len(words) * 0.9)
    corpus.write_dataset(
        folder,
        lambda: [corpus.Piece("train", words[:cut]), corpus.Piece("val", words[cut:])],
        CharTokenizer(chars or sorted(set(words))),
    )


DIGITS = CharTokenizer("0123456789+=", ends=True)


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


def write_sums(folder: Path) -> None:
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


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Datasets a and b with one tokenizer, c with another, and upper, aligned with a; those of `write_sums` hold examples."""
    folder = tmp_path_factory.mktemp("data")
    write_text(folder / "a", WORDS * 20)
    write_text(folder / "b", WORDS[::-1] * 10, sorted(set(WORDS)))
    write_text(folder / "c", "0123456789 " * 50)
    write_text(folder / "upper", "".join("U" if char.isalpha() else "." for char in WORDS * 20))
    write_sums(folder)
    return folder


@pytest.fixture(scope="session")
def base(data_dir, tmp_path_factory) -> Path:
    """A checkpoint that can a little of the sums: what fine-tuning, adapters and preferences begin with."""
    out_dir = tmp_path_factory.mktemp("base") / "run"
    train.main(train_args.parse([*TINY, "--objective=sft", f"--data_dir={data_dir}", "--dataset=sums", f"--out_dir={out_dir}", "--block_size=32", "--max_iters=60",
                                 "--eval_interval=60", "--batch_size=32", "--learning_rate=1e-2", "--eval_samples=0"]))  # fmt: skip
    return out_dir / "checkpoints/000060"


@pytest.fixture
def run(data_dir, tmp_path, capsys):
    """Train in this process: run("--flag=...", name="run") gives the run's folder, progress, metrics, weights and console."""

    def run(*flags: str, name: str = "run") -> SimpleNamespace:
        out_dir = tmp_path / name
        loads = any(flag.startswith("--init_from=") for flag in flags)
        given = [
            f"--data_dir={data_dir}",
            *([] if any(flag.startswith(("--dataset=", "--training_mode")) for flag in flags) else ["--dataset=a"]),
        ]
        tiny = [flag for flag in TINY if not (loads and flag.startswith(("--n_layer", "--n_head", "--n_embd")))]
        args = train_args.parse(
            [*([] if "--init_from=resume" in flags else [*tiny, *given]), f"--out_dir={out_dir}", *flags]
        )
        progress = train.main(args)
        return read_run(out_dir, progress, capsys.readouterr().out)

    return run


def pytest_collection_modifyitems(items) -> None:
    """The test of a real Slurm waits most of its time: it begins first."""
    items.sort(key=lambda item: "cluster" not in item.fixturenames)


def read_run(out_dir: Path, progress=None, console: str = "") -> SimpleNamespace:
    """A run's folder as its files tell it."""

    metrics = out_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    config = out_dir / "train_config.json"
    steps = checkpoint.steps(out_dir / "checkpoints")
    last = checkpoint.load(out_dir / "checkpoints" / f"{steps[-1]:06d}") if steps else None
    return SimpleNamespace(
        out_dir=out_dir, progress=progress, console=console, steps=steps, last=last,
        train=[line for line in lines if line["event"] == "train"], evals=[line for line in lines if line["event"] == "eval"],
        losses=[line["loss"] for line in lines if line["event"] == "train"],
        config=json.loads(config.read_text()) if config.exists() else None,
    )  # fmt: skip


def command(
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


def skip_without_gpt2() -> dict[str, str]:
    """The environment in which tiktoken finds its gpt2 offline; skips the test where that is not there."""
    if not (SHARED / "tiktoken_cache").exists():
        pytest.skip("tiktoken's gpt2 is in ../shared, which is not here")
    return {"TIKTOKEN_CACHE_DIR": str(SHARED / "tiktoken_cache")}


needs_shared = pytest.mark.skipif(
    not (SHARED / "tinyshakespeare").exists(), reason="the real texts of ../shared are not here"
)
