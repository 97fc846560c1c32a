"""What tests share: tiny datasets, the flags of a tiny run, what runs leave, and processes that run scripts."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one test runs on each core

import torch
from torch.utils._python_dispatch import TorchDispatchMode

os.fsync = lambda fd: None  # of a tiny run, half of its seconds; tests kill processes and fill disks, but cut no power

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

import configurator
import train
import train_args
from model import GPT, GPTConfig
from nanoforge import files
from nanoforge.data import corpus, tokenization
from nanoforge.data.documents import TextChunk
from nanoforge.data.tokenization import CharTokenizer
from nanoforge.models import generation
from nanoforge.training import checkpoint, metrics

TINY = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=8",
    "--batch_size=4",
    "--max_iters=4",
    "--eval_iters=1",
    "--eval_interval=2",
    "--log_interval=1",
    "--warmup_iters=0",
    "--device=cpu",
    "--dtype=float32",
]
SHAPE_FLAGS = ("--n_layer", "--n_head", "--n_embd")
TINY_WITHOUT_SHAPE = [flag for flag in TINY if not flag.startswith(SHAPE_FLAGS)]  # loaded weights have their own shape
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.\n"

needs_shared = pytest.mark.skipif(
    not (SHARED / "tinyshakespeare").exists(), reason="needs the real texts in ../shared, which are missing"
)


# ---------------------------------------------------------------------------------------------------------------------
# tiny datasets


def write_char_dataset(folder: Path, text: str, chars: Sequence[str] | None = None) -> None:
    """Token bins of characters; the last tenth of the text is for validation."""
    cut = int(len(text) * 0.9)
    chunks = [TextChunk("train", text[:cut]), TextChunk("val", text[cut:])]
    corpus.write_dataset(folder, lambda: chunks, CharTokenizer(chars or sorted(set(text))))


DIGITS = CharTokenizer("0123456789+=", has_eos=True)


def write_examples(
    folder: Path, rows: Sequence[dict], n_train: int, tokenizer: tokenization.Tokenizer = DIGITS
) -> None:
    """Examples with a tokenizer; the first n_train rows are for training, the others for validation."""
    folder.mkdir(parents=True)
    meta = {
        "dtype": "uint16",
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenization.to_json(tokenizer),
        "files": {},
    }
    files.write_json(folder / "meta.json", meta)
    for split, split_rows in (("train", rows[:n_train]), ("val", rows[n_train:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in split_rows))


def write_sum_datasets(folder: Path) -> None:
    """Sums such as 12+9=21, at most 8 tokens with their end, as examples of every kind: 110 to train, 20 to validate.

    sums: for SFT and GRPO. pairs: the right sum is chosen, a wrong one rejected. labelled: a third is right
    and desirable. chat: as messages.
    """
    operands = sorted(((a, b) for a in range(13) for b in range(10)), key=lambda ab: (ab[0] * 37 + ab[1] * 53) % 131)
    problems = [
        (f"{a}+{b}=", str(a + b), str(a + b + 1)) for a, b in operands if len(f"{a}+{b}={a + b + 1}") < 8
    ]  # (prompt, right, wrong)
    sums = [{"prompt": prompt, "completion": right, "answer": right} for prompt, right, _ in problems]
    pairs = [{"prompt": prompt, "chosen": right, "rejected": wrong} for prompt, right, wrong in problems]
    labelled = []
    for i, (prompt, right, wrong) in enumerate(problems):
        is_right = i % 3 == 0
        labelled.append({"prompt": prompt, "completion": right if is_right else wrong, "label": is_right})
    chats = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": right}]}
        for prompt, right, _ in problems
        if len(prompt + right) < 6
    ]
    write_examples(folder / "sums", sums, n_train=110)
    write_examples(folder / "pairs", pairs, n_train=110)
    write_examples(folder / "labelled", labelled, n_train=12)
    write_examples(folder / "chat", chats, n_train=50)


def gpt2_tokenizer_env() -> dict[str, str]:
    """The environment in which tiktoken finds its gpt2 offline. Skips the test when it is missing."""
    if not (SHARED / "tiktoken_cache").exists():
        pytest.skip("needs tiktoken's gpt2 in ../shared, which is missing")
    return {"TIKTOKEN_CACHE_DIR": str(SHARED / "tiktoken_cache")}


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_model(cache: Path, name: str, folder: Path, commit: str = COMMIT) -> Path:
    """Put a model's folder into a cache as huggingface_hub lays it out, as the main branch of org/name.

    Returns its snapshot.
    """
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)
    return place / "snapshots" / commit


def write_hub_folder(folder: Path, **splits: list[dict]) -> Path:
    """A folder with a Parquet file for each split, named as those of the hub."""
    import datasets

    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    return folder


def cache_dataset(cache: Path, name: str, commit: str = COMMIT, config: str = "default", **splits: list[dict]) -> None:
    """What a cache of `datasets` holds of org/name after it was loaded once."""
    import datasets

    with tempfile.TemporaryDirectory() as made:
        loaded = datasets.load_dataset(
            str(write_hub_folder(Path(made) / "source", **splits)), cache_dir=f"{made}/cache"
        )
        source = Path(next(iter(loaded.values())).cache_files[0]["filename"]).parent
        folder = cache / name.replace("/", "___") / config / "0.0.0" / commit
        shutil.copytree(source, folder)
    short_name = name.rpartition("/")[2]
    for path in folder.glob("*.arrow"):
        split = path.stem.rpartition("-")[2]
        path.rename(folder / f"{short_name}-{split}.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"config_name": config, "dataset_name": short_name}))


@contextlib.contextmanager
def offline_cache(cache: Path) -> Iterator[Path]:
    """huggingface_hub reads this cache, and no network."""
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield cache


# ---------------------------------------------------------------------------------------------------------------------
# runs, and what they leave


@dataclass
class RunFiles:
    """What a run's folder holds, and, of a run in this process, its progress and console output."""

    out_dir: Path
    progress: checkpoint.Progress | None
    console: str
    config: dict[str, Any] | None  # train_config.json
    train: list[dict]  # lines of metrics.jsonl
    evals: list[dict]
    steps: list[int]  # of the checkpoints
    last: checkpoint.Checkpoint | None

    @property
    def losses(self) -> list[float]:
        return metric(self, "loss")


def read_run(out_dir: Path, progress: checkpoint.Progress | None = None, console: str = "") -> RunFiles:
    """Read a run's folder."""
    metrics_path, config_path = out_dir / "metrics.jsonl", out_dir / "train_config.json"
    lines = []
    if metrics_path.exists():
        lines = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    unknown = {key for line in lines for key in metrics.undocumented(line["event"], line)}
    assert not unknown, f"{unknown}: add them to nanoforge/training/metrics.py, then run python docs/generate.py"
    steps = checkpoint.list_steps(out_dir / "checkpoints")
    return RunFiles(
        out_dir=out_dir,
        progress=progress,
        console=console,
        config=json.loads(config_path.read_text()) if config_path.exists() else None,
        train=[line for line in lines if line["event"] == "train"],
        evals=[line for line in lines if line["event"] == "eval"],
        steps=steps,
        last=checkpoint.load(checkpoint.step_folder(out_dir / "checkpoints", steps[-1])) if steps else None,
    )


def metric(run: RunFiles, name: str) -> list[float]:
    """A metric of a run's training lines."""
    return [line[name] for line in run.train]


def assert_same_lines(lines: Sequence[dict], expected: Sequence[dict], names: Iterable[str]) -> None:
    """The named metrics agree within 1e-4; None, where a mean had nothing to count, agrees with None."""
    assert len(lines) == len(expected)
    for line, expected_line in zip(lines, expected, strict=True):
        for name in names:
            value = expected_line[name]
            assert line[name] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), (name, line)


def equal_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether names and values are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def bytes_for_backward(loss: torch.Tensor) -> int:
    """What autograd keeps of the tensors that a loss was computed from, parameters and inputs included."""
    seen: set[Any] = set()
    nodes, storages = [loss.grad_fn], {}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
        for saved in (getattr(node, name) for name in names):
            for tensor in saved if isinstance(saved, list | tuple) else (saved,):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        nodes += [following for following, _ in node.next_functions]
    return sum(storages.values())


# ---------------------------------------------------------------------------------------------------------------------
# commands in processes of their own


def script_command(script: str | Path = "train.py", ranks: int = 1, torchrun_options: Sequence[str] = ()) -> list[str]:
    """Python's arguments that start a script, with several ranks by torchrun."""
    if ranks == 1:
        return [str(ROOT / script)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*torchrun, *torchrun_options, str(ROOT / script)]


def run_script(
    *argv: object,
    check: bool = True,
    script: str = "train.py",
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    input: str = "",
) -> subprocess.CompletedProcess:
    """Run a script to its end: one of the root or of data/ in a forked process; any other, and one that finds other
    packages on its path, in a new one."""
    command = [*script_command(script), *map(str, argv)]
    environment = os.environ | (env or {})
    if Path(script).parts[0] in (Path(script).name, "data") and "PYTHONPATH" not in (env or {}):
        done = fork_to_end(run_python, command, cwd=cwd, env=environment, text=input)
    else:
        command = [sys.executable, *command]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, input=input)
    assert not check or done.returncode == 0, done.stderr
    return done


def wait_for_line(process: "ScriptProcess", text: str) -> None:
    """Read the output of a process up to a line that contains a text."""
    for line in process.stdout:
        if text in line:
            return


@contextlib.contextmanager
def file_size_limit(n_bytes: int):
    """Files can't grow beyond so many bytes, as on a full disk."""
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard_limit))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft_limit, hard_limit))


# ---------------------------------------------------------------------------------------------------------------------
# a tiny model in this process

TINY_MODEL = GPTConfig(vocab_sizes=(31,), block_size=12, n_layer=2, n_head=4, n_embd=32, bias=False)


def tiny_model(seed: int = 0, **changes) -> GPT:
    """A GPT of TINY_MODEL's shape with changes. Its weights are random, away from special initial values."""
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(TINY_MODEL, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def draw_uncached(model: GPT, idx: torch.Tensor, n: int, draws: Any = None, **sampling: Any) -> torch.Tensor:
    """idx, (B, T) or (B, K, T), and n tokens more, which `draws` decides: the whole context is read for each of them.

    Past block_size, the context is cut to its last half.
    """
    params = generation.SamplingParams(max_new_tokens=n, **sampling)
    draws = draws or generation.uniform_draws(0)
    rows, n_contexts = np.arange(len(idx)), idx[0, ..., 0].numel()
    start = max(0, idx.size(-1) - model.config.block_size)
    for token in range(n):
        if idx.size(-1) - start > model.config.block_size:
            start = idx.size(-1) - max(1, model.config.block_size // 2)
        choices = model.vocabulary.next_token_logits(model(idx[..., start:])[:, -1].float(), idx[..., -1])
        new = []
        for k, (offset, logits) in enumerate(choices):
            u = torch.from_numpy(draws(rows * n_contexts + k, np.array(token))).float()
            new.append(offset + generation.sample(logits, u, params))
        idx = torch.cat((idx, torch.stack(new, -1).view(*idx.shape[:-1], 1)), dim=-1)
    return idx


def ids(*shape: int, high: int = 31, seed: int = 1) -> torch.Tensor:
    """Random token ids below `high`."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


VIEWS = ("view", "transpose", "slice", "split", "select", "expand", "detach", "unbind", "alias", "record_function")


class OperatorCounts(TorchDispatchMode):
    """How often each operator is called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        """How many kernels that launches on a GPU: views launch none."""
        return sum(n for name, n in self.counts.items() if not any(view in name for view in VIEWS))

    @property
    def numbers_read(self) -> int:
        """How many numbers the host asks for."""
        return sum(n for name, n in self.counts.items() if "_local_scalar_dense" in name)


# ---------------------------------------------------------------------------------------------------------------------
# runs in forked processes, which start fast because torch is loaded already

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["preload"])


def start_fork(target: Callable[..., None], *args: object) -> Any:
    """Start a process that calls a function: a fork of a server that has imported preload.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11 starts the server without sys.path
        process = FORKSERVER.Process(target=target, args=args)
        process.start()
    return process


STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def call_in_fork(function: Callable[..., None], argument: Any, cwd: Path, env: dict[str, str], streams: Path) -> None:
    """What a forked process does: call a function, its standard streams being files of a folder."""
    os.environ.clear()
    os.environ |= env
    os.chdir(cwd)
    for handle, (name, mode) in enumerate(STREAMS):
        with (streams / name).open(mode) as file:
            os.dup2(file.fileno(), handle)
        stream = os.fdopen(handle, mode, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    torch.set_num_threads(1)
    function(argument)


def run_python(argv: Sequence[str]) -> None:
    """Do what `python SCRIPT ...` and `python -m MODULE ...` do."""
    is_module = argv[0] == "-m"
    sys.argv = list(argv[is_module:])
    if is_module:
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def fork_to_end(
    function: Callable[..., None], argument: Any, *, cwd: Path = ROOT, env: dict[str, str] | None = None, text: str = ""
) -> subprocess.CompletedProcess:
    """Call a function in a forked process that reads `text`: the exit status and the output."""
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder)
        for name, _ in STREAMS:
            (streams / name).write_text(text if name == "stdin" else "")
        process = start_fork(call_in_fork, function, argument, cwd, env or dict(os.environ), streams)
        status = wait_for_exit(process, 300)
        output, errors = ((streams / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(argument, status, output, errors)


class ScriptProcess:
    """A script started in a forked process, several ranks by a torchrun there. Its output can be read line by line."""

    def __init__(
        self,
        *argv: object,
        script: str | Path = "train.py",
        ranks: int = 1,
        torchrun_options: Sequence[str] = (),
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        streams = Path(self.folder.name)
        (streams / "stdin").touch()
        for name in ("stdout", "stderr"):
            os.mkfifo(streams / name)
        command = [*script_command(script, ranks, torchrun_options), *map(str, argv)]
        self.process = start_fork(call_in_fork, run_python, command, ROOT, dict(os.environ), streams)
        self.pid = self.process.pid
        self.stdout, self.stderr = ((streams / name).open() for name in ("stdout", "stderr"))

    def send_signal(self, number: int) -> None:
        """As subprocess has it, one that has ended gets none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def wait(self, seconds: float = 60) -> int:
        return wait_for_exit(self.process, seconds)


def train_in_fork(flags: list[str], log: Path, env: dict[str, str], prepare: Callable[[], None] | None) -> None:
    """What a forked process does: train, with its output in `log`, after `prepare` has set up a fault."""
    os.environ |= env
    sys.stdout = sys.stderr = log.open("a")
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    configurator.run(train.main, train_args.parse(flags))


PORTS = itertools.count(10_000 + 97 * os.getpid() % 20_000)


def free_port() -> int:
    """A port that nobody listens on. It is below those that the kernel gives to connections: none of the tests that run
    at the same time takes it between now and its use, as happened to ports that the kernel chose."""
    for port in PORTS:
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise AssertionError("no port is free")


def start_ranks(flags: list[str], ranks: int, log: Path, prepare: Callable[[], None] | None = None) -> list:
    """Start the processes of a run on a number of ranks."""
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        env: dict[str, str] = {}
        if ranks > 1:
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        processes.append(start_fork(train_in_fork, flags, log, env, prepare))
    return processes


def wait_for_exit(process: Any, seconds: float = 60) -> int:
    """The exit status of a process, which fails the test if it still runs after so many seconds."""
    process.join(seconds)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def run_on_ranks(out_dir: Path, ranks: int, *flags: str, prepare: Callable[[], None] | None = None) -> RunFiles:
    """Train on a number of ranks, in forked processes, and read the run's folder."""
    log = out_dir.with_suffix(".log")
    processes = start_ranks([*flags, f"--out_dir={out_dir}"], ranks, log, prepare)
    assert [wait_for_exit(process, 120) for process in processes] == [0] * ranks, log.read_text()[-3000:]
    return read_run(out_dir, console=log.read_text())
