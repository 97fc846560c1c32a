"""The rows that benchmarks/gpu.py measures, in order, each with the minutes that it takes.

A row yields its figures: a name, and a record with value, unit, what was run, the windows whose median the value is,
and the peak memory. Imports no torch: what needs it runs in processes of its own.

Both programs warm up outside the time: it is the time on the wall between two lines that they print, each of which
waits for the GPU, and the first of these windows is left out. Compilation is in `first_step_s`, of both.
"""

import json
import re
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.common import GPT2, ROOT, Case, to_flags
from train_args import TrainArgs

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

Record = dict[str, Any]
Figures = Iterator[tuple[str, Record]]
TRAINING, CEILINGS, DECODE = (
    f"benchmarks/scripts/{name}.py" for name in ("time_training", "gpu_ceilings", "gpu_decode")
)


SECONDS_TO_END = 30.0  # of a run of stage C: to start, and for its last evaluation and checkpoint


class RowFailedError(Exception):
    """A process of a row failed, with the last lines that it printed."""


class Sizes(NamedTuple):
    """How large everything is: on a GPU, or in a rehearsal."""

    gpt2: Case
    characters: Case
    micro_batches: tuple[int, int, int]  # the usual one, a small one, a large one
    steps: int
    window: int  # steps that are timed together
    character_steps: int
    loss_chunk: int
    attention_kernel: str
    ceilings: dict[str, Any]
    decode: dict[str, Any]
    batches: dict[str, Any]
    nanogpt_tokens: int
    race: dict[str, object]  # flags of bench.py race
    grpo: dict[str, object]
    equal_tokens: dict[str, object]  # of stage C
    source: dict[str, object]  # of the dataset


REAL = Sizes(
    gpt2=GPT2,
    characters={"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "dropout": 0.2},
    micro_batches=(64, 12, 96),
    steps=40,
    window=10,
    character_steps=300,
    loss_chunk=4096,
    attention_kernel="flash",
    ceilings={
        "copy": 2**31,
        "products": [(8192, 8192, 8192), (65536, 768, 2304), (65536, 768, 3072), (65536, 768, 50304)],
        "attention": [(64, 12, 1024, 64), (64, 6, 1024, 128)],
        "growing": (500, 520),
    },
    decode={"prompt": 8, "new": 512, "batch_sizes": (1, 16, 256)},
    batches={"prompt": 64, "new": 128, "batch_sizes": (64, 256)},
    nanogpt_tokens=200,
    race={"seeds": 2, "peer_iters": 2000},
    grpo={"batch_size": 256},
    equal_tokens={
        "batch_size": 64,
        "gradient_accumulation_steps": 2,
        "max_iters": 750,
        "eval_interval": 75,
        "eval_iters": 10,
    },
    source={"tokenizer": "gpt2"},
)
SMALL: Case = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16}
TINY = Sizes(
    gpt2={**SMALL, "vocab_size": 257},
    characters={**SMALL, "batch_size": 2},
    micro_batches=(2, 1, 3),
    steps=6,
    window=2,
    character_steps=6,
    loss_chunk=16,
    attention_kernel="auto",
    ceilings={"copy": 2**10, "products": [(8, 8, 8)], "attention": [], "growing": (3, 5)},
    decode={"prompt": 4, "new": 4, "batch_sizes": (1, 2)},
    batches={"prompt": 4, "new": 4, "batch_sizes": (2,)},
    nanogpt_tokens=2,
    race={"seeds": 1, "peer_iters": 4, "race_config": str(ROOT / "benchmarks" / "scripts" / "rehearsal_race.json")},
    grpo={"batch_size": 16, "n_layer": 1, "n_head": 1, "n_embd": 16},
    equal_tokens={
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_iters": 4,
        "eval_interval": 2,
        "eval_iters": 1,
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 16,
        "block_size": 16,
        "vocab_size": 257,
    },
    source={
        "tokenizer": "byte",
        "packages": ",".join(str(ROOT / "nanoforge" / name) for name in ("sweeps", "report")),
    },
)


class Row(NamedTuple):
    """A row of the plan. measure(bench, row) yields the figures that are missing."""

    name: str
    minutes: float
    what: str
    measure: Callable[["Bench", "Row"], Figures]


# ---------------------------------------------------------------------------------------------------------------------
# training: time of a step


def windows_of(lines: Sequence[tuple[float, str]], pattern: str, window: int) -> tuple[float, list[float]]:
    """Seconds to the first step, and ms a step of each window of steps but the first, from lines with their times.

    pattern: of a line, its group the step.
    """
    times = {int(match[1]): seconds for seconds, text in lines if (match := re.match(pattern, text))}
    first = min(times.values())
    ends = [step for step in times if step % window == 0 and step - window in times and step > window]
    return first, [(times[step] - times[step - window]) / window * 1e3 for step in ends]


def time_ours(bench: "Bench", case: Case, *options: str, steps: int = 0, **flags: Any) -> Record:
    """Time steps of this program's train.py. options: of scripts/time_training.py."""
    values = training_flags(bench, case, steps) | flags
    values |= {"data_dir": dataset_of(bench, case).parent, "dataset": dataset_of(bench, case).name}
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        command = ["ours", *options, *to_flags(**values, out_dir=Path(folder) / "run")]
        return time_training(bench, command, r"step (\d+): loss", case)


def time_nanogpt(bench: "Bench", case: Case, *, steps: int = 0) -> Record:
    """Time steps of nanoGPT's train.py. eval_iters=0 leaves its evaluation at the start out."""
    values = {name: value for name, value in training_flags(bench, case, steps).items() if name != "vocab_size"}
    values |= {
        "dataset": dataset_of(bench, case),
        "gradient_accumulation_steps": 1,
        "eval_interval": 10**6,
        "eval_iters": 0,
        "dropout": case.get("dropout", 0.0),
        "dtype": "float32" if bench.args.rehearse else "bfloat16",
    }
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        command = ["nanogpt", str(bench.peer), *to_flags(**values, out_dir=folder)]
        return time_training(bench, command, r"iter (\d+): loss", case)


def training_flags(bench: "Bench", case: Case, steps: int) -> dict[str, object]:
    """What both programs have by the same names."""
    return {
        **case,
        "bias": False,
        "compile": True,
        "device": bench.device,
        "max_iters": steps or bench.sizes.steps,
        "log_interval": max(bench.sizes.window, steps // 6),
    }


def dataset_of(bench: "Bench", case: Case) -> Path:
    """Both programs read the same bins."""
    return bench.data_dir / "source" if "vocab_size" in case else bench.peer / "data" / "shakespeare_char"


def time_training(bench: "Bench", command: list[str], pattern: str, case: Case) -> Record:
    """A training run of either program. Raises RowFailedError."""
    lines = list(bench.run(TRAINING, *command))
    interval = int(next(flag for flag in command if flag.startswith("--log_interval=")).partition("=")[2])
    first, windows = windows_of(lines, pattern, interval)
    if not windows:
        raise RowFailedError(f"no two windows of {interval} steps in what it printed")
    ms = statistics.median(windows)
    record: Record = {
        "value": ms,
        "unit": "ms a step",
        "ran": describe_command(TRAINING, *command),
        "windows": windows,
        "tokens_per_second": case["batch_size"] * case["block_size"] / ms * 1e3,
        "first_step_s": round(first, 2),
    }
    shares = [float(match[1]) for _, text in lines if (match := re.search(r"^step .* mfu ([\d.]+)%", text))]
    if shares:  # of this program alone, where the GPU's peak is known
        record["mfu"] = shares[-1] / 100
    return record | read_json(lines)


def describe_command(*argv: str) -> str:
    """What was run, without the folders of this machine."""
    return re.sub(r"(^|[ =])/\S*/", r"\1", " ".join(argv).replace(f"{ROOT}/", ""))


def read_json(lines: Sequence[tuple[float, str]]) -> Record:
    """What a process printed as JSON, all together."""
    record: Record = {}
    for _, text in lines:
        if text.startswith("json "):
            record |= json.loads(text.removeprefix("json "))
    return record


def gpt2(bench: "Bench", which: int) -> Case:
    """GPT-2's shape with one of the micro-batches."""
    return {**bench.sizes.gpt2, "batch_size": bench.sizes.micro_batches[which]}


def single(side: Callable[..., Record], which: int = 0) -> Callable[..., Figures]:
    """A row of one training run of GPT-2's shape."""

    def measure(bench: "Bench", row: Row) -> Figures:
        if not bench.has(row.name):
            yield row.name, side(bench, gpt2(bench, which))

    return measure


def flash_attention(bench: "Bench", row: Row) -> Figures:
    """A1 with flash attention instead of torch's choice, which is cuDNN's on this GPU."""
    if not bench.has(row.name):
        yield row.name, time_ours(bench, gpt2(bench, 0), attention_kernel=bench.sizes.attention_kernel)


def modern(bench: "Bench", row: Row) -> Figures:
    """The modern recipe's steps, in GPT-2's shape with heads of 128."""
    if not bench.has(row.name):
        case = gpt2(bench, 0)
        heads = max(1, case["n_head"] // 2)
        config = str(ROOT / "configs" / "gpt2_124m_modern.py")
        yield row.name, time_ours(bench, {**case, "n_head": heads}, config, gradient_accumulation_steps=1)


def characters(bench: "Bench", row: Row) -> Figures:
    """shakespeare_char: ours, ours with a captured step, nanoGPT, in turn, twice."""
    case, steps = bench.sizes.characters, bench.sizes.character_steps
    sides: dict[str, Callable[[], Record]] = {"ours": lambda: time_ours(bench, case, steps=steps)}
    if "cuda_graph" in TrainArgs.__dataclass_fields__ and not bench.args.rehearse:
        sides["ours captured"] = lambda: time_ours(bench, case, steps=steps, cuda_graph=True)
    sides["nanoGPT"] = lambda: time_nanogpt(bench, case, steps=steps)
    for turn in (1, 2):
        for name, side in sides.items():
            key = f"{row.name} {name}, turn {turn}"
            if not bench.has(key):
                yield key, side()


def second_turn(bench: "Bench", row: Row) -> Figures:
    """A1 and A2 again, compiled before: the spread."""
    for name, side in (("ours", time_ours), ("nanoGPT", time_nanogpt)):
        if not bench.has(f"{row.name} {name}"):
            yield f"{row.name} {name}", side(bench, gpt2(bench, 0))


def large_batches(bench: "Bench", row: Row) -> Figures:
    """More memory: a large micro-batch, and the loss in chunks."""
    plans: dict[str, tuple[int, dict[str, Any]]] = {
        "micro-batch": (2, {}),
        "loss_chunk": (0, {"loss_chunk": bench.sizes.loss_chunk}),
    }
    for name, (which, flags) in plans.items():
        if not bench.has(f"{row.name} {name}"):
            yield f"{row.name} {name}", time_ours(bench, gpt2(bench, which), **flags)


def kernels(bench: "Bench", row: Row) -> Figures:
    """Five steps of A1 by kernel, and a trace."""
    if bench.has(row.name):
        return
    trace = bench.out / f"{bench.name}_trace.json.gz"
    steps = max(30, bench.sizes.steps)
    record = time_ours(bench, gpt2(bench, 0), f"--profile={trace}", steps=steps)
    yield row.name, {**record, "value": record["ms_of_all"], "unit": "ms of kernels a step", "trace": trace.name}


def post_training(bench: "Bench", row: Row) -> Figures:
    """GRPO's recompiles, and what FSDP2 costs on one rank."""
    if not bench.has(f"{row.name} GRPO"):
        yield f"{row.name} GRPO", time_grpo(bench)
    if not bench.has(f"{row.name} FSDP2"):
        record = time_ours(bench, gpt2(bench, 0), "--one_rank", parallel="fsdp")
        yield f"{row.name} FSDP2", record


def time_grpo(bench: "Bench") -> Record:
    """Ten compiled steps of GRPO on sums, from random weights: answers of many lengths."""
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        flags = to_flags(
            **bench.sizes.grpo,
            device=bench.device,
            compile=True,
            beta=0.0,  # no reference model, which would need weights to start from
            data_dir=Path(folder) / "data",
            out_dir=Path(folder) / "run",
            max_iters=10,
            warmup_iters=1,
            lr_decay_iters=10,
            log_interval=1,
        )
        prepare = ["data/arithmetic/prepare.py", f"--out_dir={folder}/data/arithmetic"]
        if bench.args.rehearse:
            prepare.append("--digits=1")
        for _ in bench.run(*prepare):
            pass
        command = ["ours", "--recompiles", str(ROOT / "configs" / "arithmetic_grpo.py"), *flags]
        lines = list(bench.run(TRAINING, *command))
    step_ms = [float(match[1]) for _, text in lines if (match := re.match(r"step \d+: .*?([\d.]+) ms", text))]
    return {
        "value": statistics.median(step_ms[len(step_ms) // 2 :]),
        "unit": "ms a step",
        "ran": describe_command(TRAINING, *command),
        "windows": step_ms,
        "recompiles": sum("Recompiling function" in text for _, text in lines),
        "limit_reached": any("recompile_limit" in text for _, text in lines),
        **read_json(lines),
    }


# ---------------------------------------------------------------------------------------------------------------------
# other rows


def make_data(bench: "Bench", row: Row) -> Figures:
    """The dataset `source`, from the Python packages that are installed here."""
    folder = bench.data_dir / "source"
    if not (folder / "meta.json").exists():
        for _ in bench.run("-m", "benchmarks.prepare_gpu", *to_flags(source=folder, **bench.sizes.source)):
            pass
        meta = json.loads((folder / "meta.json").read_text())
        tokens = {name: file["tokens"] for name, file in meta["files"].items()}
        ran = (
            f"{meta['tokenizer']['kind']} tokens of the source files of installed packages, every tenth for validation"
        )
        yield row.name, {"value": sum(tokens.values()), "unit": "tokens", "ran": ran, "files": tokens}


def ceilings(bench: "Bench", row: Row) -> Figures:
    options = {"device": bench.device, "sizes": bench.sizes.ceilings, "done": bench.done(row.name)}
    for record in bench.run_json(CEILINGS, json.dumps(options)):
        yield f"{row.name} {record.pop('name')}", record


def decode(which: str, **more: object) -> Callable[..., Figures]:
    """A row of scripts/gpu_decode.py."""

    def measure(bench: "Bench", row: Row) -> Figures:
        sizes = bench.sizes.decode if which == "ours" else bench.sizes.batches
        shared = {"device": bench.device, "shape": bench.sizes.gpt2, "done": bench.done(row.name)}
        for record in bench.run_json(DECODE, which, json.dumps(shared | sizes | more)):
            yield f"{row.name} {record.pop('name')}", record

    return measure


def decode_and_peer(bench: "Bench", row: Row) -> Figures:
    """Decoding of all batch sizes; nanoGPT's of one sequence, which is how it draws several too."""
    yield from decode("ours")(bench, row)
    if not bench.has(f"{row.name} B1 nanoGPT"):
        options = {
            "device": bench.device,
            "shape": bench.sizes.gpt2,
            "folder": str(bench.peer),
            "prompt": bench.sizes.decode["prompt"],
            "new": bench.sizes.nanogpt_tokens,
        }
        for record in bench.run_json(DECODE, "nanogpt", json.dumps(options)):
            yield f"{row.name} {record.pop('name')}", record


def race(bench: "Bench", row: Row) -> Figures:
    """bench.py race: seconds of steps to nanoGPT's final loss, the first step of either as the median one."""
    if bench.has(row.name):
        return
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        flags = to_flags(peer=bench.peer, device=bench.device, out=folder, **bench.sizes.race)
        for _ in bench.run("bench.py", "race", *flags):
            pass
        results = json.loads(next(Path(folder).glob("*.json")).read_text())["race"]
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, bench.out / f"race_{bench.name}.png")
    goal = next(iter(results["goals"].values()))
    ratio = goal.get("ratio", {})
    yield (
        row.name,
        {
            "value": ratio.get("seconds"),
            "unit": "x seconds to nanoGPT's final loss",
            "ran": describe_command("bench.py", "race", *to_flags(**bench.sizes.race)),
            "goals": results["goals"],
            "wall": {name: [run["wall"] for run in runs] for name, runs in results["runs"].items()},
        },
    )


def equal_tokens(config: str, warmup: float = 0.0, **more: Any) -> Callable[..., Figures]:
    """A row that trains on the same tokens: the losses on the way. It ends with the time, with what it has by then."""

    def measure(bench: "Bench", row: Row) -> Figures:
        if bench.has(row.name):
            return
        known = {name: value for name, value in more.items() if name in TrainArgs.__dataclass_fields__}
        steps = int(str(bench.sizes.equal_tokens["max_iters"]))
        with tempfile.TemporaryDirectory(prefix="bench") as folder:
            out_dir = Path(folder) / "run"
            flags = to_flags(
                dataset="source",
                data_dir=bench.data_dir,
                out_dir=out_dir,
                device=bench.device,
                compile=True,
                lr_decay_iters=steps,
                warmup_iters=int(warmup * steps),
                checkpoint_at_eval=False,
                max_seconds=max(1.0, bench.seconds_left - SECONDS_TO_END),
                **known | bench.sizes.equal_tokens,
            )
            command = ["train.py", str(ROOT / "configs" / config), *flags]
            for _ in bench.run(*command):
                pass
            lines = [json.loads(text) for text in (out_dir / "metrics.jsonl").read_text().splitlines()]
        evaluations = [line for line in lines if line["event"] == "eval"]
        yield (
            row.name,
            {
                "value": evaluations[-1]["val_loss"],
                "unit": "nats a token, validation",
                "ran": describe_command(*command),
                "curve": [{key: line[key] for key in ("step", "seconds", "val_loss")} for line in evaluations],
                "finished": evaluations[-1]["step"] == steps,
                "peak_memory_mb": lines[-1].get("peak_memory_mb"),
            },
        )

    return measure


ADAMW: dict[str, Any] = {"learning_rate": 6e-4, "min_lr": 6e-5}
TRACK_3: dict[str, Any] = {  # modded-nanogpt, records/track_3_optimization, its tuned baseline (#36)
    "muon_learning_rate": 0.025,
    "muon_weight_decay": 0.05,
    "wsd_decay_fraction": 0.7,
    "embedding_learning_rate": 0.7,
    "head_learning_rate": 0.004,
    "learning_rate": 0.015,
}

ROWS = (
    Row("data", 0.5, "GPT-2's tokens of the Python packages that are installed here", make_data),
    Row("A0", 0.6, "ceilings: copy, matrix products, attention, launches, plans of attention", ceilings),
    Row("A1", 0.9, "ours, GPT-2 124.4 M, micro-batch 64", single(time_ours)),
    Row("A2", 0.9, "nanoGPT, the same", single(time_nanogpt)),
    Row("A3", 0.8, "ours, micro-batch 12", single(time_ours, 1)),
    Row("A4", 0.7, "nanoGPT, micro-batch 12", single(time_nanogpt, 1)),
    Row("A5", 0.9, "ours, the modern recipe, micro-batch 64", modern),
    Row("A6", 0.7, "ours, flash attention", flash_attention),
    Row("A7", 1.7, "decoding of 1, 16, 256 sequences, eager and compiled; nanoGPT of 1", decode_and_peer),
    Row(
        "A8",
        0.4,
        "completions of 64 and 256 prompts, float32 and bfloat16 weights, cuDNN on and off",
        decode("batches"),
    ),
    Row("B1", 2.0, "shakespeare_char: ours, ours captured, nanoGPT", characters),
    Row("B2", 2.0, "race to nanoGPT's final loss, two seeds", race),
    Row("B3", 0.7, "kernels of five steps of A1", kernels),
    Row("B4", 1.2, "A1 and A2 again", second_turn),
    Row("B5", 1.4, "micro-batch 96; loss_chunk 4096", large_batches),
    Row("B6", 1.3, "GRPO, ten steps, recompiles; FSDP2 with one rank", post_training),
    Row("C1", 3.7, "98 M tokens: GPT-2 with AdamW", equal_tokens("gpt2_124m.py", warmup=0.1, **ADAMW)),
    Row("C2", 3.8, "98 M tokens: the modern recipe", equal_tokens("gpt2_124m_modern.py")),
    Row(
        "C3",
        1.0,
        "98 M tokens: with track 3's numbers, as far as time goes",
        equal_tokens("gpt2_124m_modern.py", **TRACK_3),
    ),
)
