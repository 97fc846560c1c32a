"""Measure this program, alone or in turn with a peer (ours, peer, ours, peer, ...), and write benchmarks/<device>.json:

    python bench.py all --peer=../nanoGPT            a checkout of nanoGPT, with its data/shakespeare_char prepared by its own script
    python bench.py train --peer_kind=hf             transformers' GPT2LMHeadModel in a plain loop, and its generate
    python bench.py sample --pairs=9

Sections: train (time and parts of a step), sample (tokens a second), data (prepare, batches), startup, race (to the peer's final
loss), all. The peer's own files run unmodified, in processes of their own, on the same data and shapes; a ratio above 1 says that ours is
faster. Knows nothing of how either works inside, apart from what they print.
"""

import sys
from dataclasses import dataclass

import configurator
from configurator import OnlyWith, Rules, arg

SECTIONS = ("train", "sample", "data", "startup", "race", "all")
NANOGPT = OnlyWith("--peer of --peer_kind=nanogpt", lambda a: a.peer != "" and a.peer_kind == "nanogpt")


@dataclass(frozen=True, kw_only=True)
class WhatArgs:
    """what"""

    device: str = arg("auto", "auto, cpu or cuda")
    peer: str = arg("", "folder of the peer's checkout (none: ours alone, unless --peer_kind=hf)")
    peer_kind: str = arg("nanogpt", "nanogpt (needs --peer), or hf (transformers)", choices=("nanogpt", "hf"))
    data_dir: str = arg("", "folder that holds shakespeare_char (none: the peer's data, or ours)")
    cases: tuple[str, ...] = arg((), "shapes to time (none: those of the device)")
    out: str = arg("benchmarks", "folder of the results")


@dataclass(frozen=True, kw_only=True)
class AmountArgs:
    """how much"""

    pairs: int = arg(5, "times that each side runs, in turn", low=1)
    steps: int = arg(20, "timed steps of a training run", low=2)
    text_mb: int = arg(100, "megabytes of text to prepare", low=1)
    bin_tokens: int = arg(10**9, "tokens of the bin that batches come from", low=10**5)
    batches: int = arg(10_000, "batches over which memory is watched", low=100)
    seeds: int = arg(3, "seeds of each side of the race", low=1)
    race_config: str = arg(
        "", "our recipe in the race (none: configs/shakespeare_cpu.py, or on a GPU shakespeare_gpu.py)"
    )
    peer_lr: tuple[float, ...] = arg(
        (1e-3,), "learning rates that the peer races with; the best is its tuned one", needs=NANOGPT
    )
    peer_iters: int = arg(2000, "iterations of the peer in the race", low=2, needs=NANOGPT)


@dataclass(frozen=True, kw_only=True)
class BenchArgs(WhatArgs, AmountArgs):
    """The arguments of bench.py."""


def check(a, source: dict[str, str]) -> list[str]:
    wrong = [f"--cases: no {case}; there are {', '.join(CASES)}" for case in a.cases if case not in CASES]
    if a.peer and a.peer_kind == "nanogpt":
        wrong += [
            f"--peer={a.peer}: no {name} there; give a checkout of nanoGPT"
            for name in ("train.py", "sample.py")
            if not (Path(a.peer) / name).exists()
        ]
    return wrong


import ast
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12}
CASES = {  # shapes, in arguments that both sides have by the same names
    "10.6M": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16},
    "small": SMALL,
    "tiny": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 2},
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 12},
    "124Mx32": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 32},
    "124Mx64": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 64},
    "shakespeare_char": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "dropout": 0.2},
}
DEFAULT_CASES = {"cpu": ("10.6M", "small"), "cuda": ("124M", "124Mx32", "124Mx64", "shakespeare_char")}

# ---------------------------------------------------------------------------------------------------------------------
# running things in turn


def figure(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "n": len(values)}


# A child's peak memory counts from the fork, as large as the process that started it: this one, small, starts and measures it.
METER = """
import resource, subprocess, sys, time
begin = time.perf_counter()
status = subprocess.call(sys.argv[1:])
print("meter", time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, flush=True)
sys.exit(status)
"""


def shell(argv: list[str], cwd: Path = ROOT, until: str = "", **env: str) -> dict:
    """Run a process: {"output", "seconds", "peak_bytes", "reached"}; `reached`: seconds until a line of its output held `until`;
    `peak_bytes`: of the largest process among it and its children. Raises UserError with its last words if it fails."""
    from nanoforge.errors import UserError

    begin, reached, lines = time.perf_counter(), None, []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", **env}
    with subprocess.Popen(
        [sys.executable, "-ISc", METER, *argv],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout:
            lines.append(line)
            if until and reached is None and until in line:
                reached = time.perf_counter() - begin
    output, _, metered = "".join(lines).rpartition("meter ")
    if process.returncode:
        raise UserError(f"{' '.join(argv[-6:])}: failed\n" + "\n".join(output.splitlines()[-8:]))
    seconds, peak = metered.split()
    return {
        "output": output,
        "seconds": float(seconds),
        "peak_bytes": int(peak) * (1 if sys.platform == "darwin" else 1024),
        "reached": reached,
    }


def in_turn(pairs: int, sides: dict) -> dict[str, list[dict]]:
    """Call each side once, `pairs` times over."""
    results: dict[str, list[dict]] = {name: [] for name in sides}
    for pair in range(pairs):
        for name, call in sides.items():
            results[name].append(call())
            told = ", ".join(
                f"{key} {value:,.4g}" for key, value in results[name][-1].items() if isinstance(value, float)
            )
            print(f"  {pair + 1}/{pairs} {name}: {told}", flush=True)
    return results


def compare(results: dict[str, list[dict]], key: str, faster_is_less: bool) -> dict:
    """Figures of `key` of every side; of all but the last, if that is the peer, also its ratio pair by pair, above 1 where faster."""
    table = {name: figure([run[key] for run in runs]) for name, runs in results.items()}
    if "peer" in results:
        for name in results.keys() - {"peer"}:
            pairs = [
                (theirs[key] / ours[key]) if faster_is_less else (ours[key] / theirs[key])
                for ours, theirs in zip(results[name], results["peer"], strict=True)
            ]
            table[name] |= {"ratios": [round(ratio, 3) for ratio in pairs], "ratio": statistics.median(pairs)}
    return table


def show(title: str, table: dict) -> None:
    for name, row in table.items():
        words = f"{title:34} {name:14} {row['median']:12,.4g}  ({row['min']:,.4g} to {row['max']:,.4g})"
        print(words + (f"  ratio {row['ratio']:.2f} of {row['ratios']}" if "ratio" in row else ""), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# the two sides


def flags(**values) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


class Bench:
    """The sides, the machine, and the results so far."""

    def __init__(self, a, folder: Path):
        import torch

        from nanoforge.device import get_device
        from nanoforge.errors import UserError

        self.a, self.folder, self.device = a, folder, get_device(a.device)
        self.peer = Path(a.peer).resolve() if a.peer else None
        self.data_dir = Path(a.data_dir or (self.peer / "data" if self.peer else ROOT / "data")).resolve()
        if a.peer and not (self.data_dir / "shakespeare_char" / "meta.pkl").exists():
            raise UserError(
                f"--peer={a.peer}: its data isn't prepared; run python {self.peer / 'data/shakespeare_char/prepare.py'}"
            )
        self.name = (
            "cpu" if self.device.type == "cpu" else re.sub(r"\W+", "_", torch.cuda.get_device_name(self.device).lower())
        )
        self.file = Path(a.out) / f"{self.name}.json"
        self.results = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.theirs = a.peer_kind == "hf" or self.peer is not None

    def write(self, section: str, figures: dict) -> None:
        """Put a section into the results file beside the others."""
        commit = (
            subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
            if shutil.which("git")
            else ""
        )
        versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        about = {
            "cores": cores,
            "python": platform.python_version(),
            **versions,
            "commit": commit,
            "command": " ".join(
                ["bench.py", *(re.sub(r"^(--(peer|data_dir|out)=).*/(.)", r"\1\3", word) for word in sys.argv[1:])]
            ),
        }
        key = section if self.a.peer_kind == "nanogpt" else f"{section} ({self.a.peer_kind})"
        self.results = {"device": self.name, **self.results, key: {"about": about, **figures}}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.results, indent=1) + "\n")

    # training

    def ours(self, case: dict, dtype: str, steps: int, **more) -> dict:
        """Train with our train.py: median ms of the steps after the first five, the metrics and the run's folder."""
        out = Path(tempfile.mkdtemp(dir=self.folder))
        shape = {
            "bias": False,
            "dataset": "shakespeare_char",
            "data_dir": self.data_dir,
            "device": self.device.type,
            "compile": self.device.type == "cuda",
        } | case
        asked = {
            "max_iters": steps,
            "eval_interval": 10**6,
            "eval_iters": 1,
            "log_interval": 1,
            "out_dir": out,
            "dtype": dtype,
        } | more
        done = shell([sys.executable, str(ROOT / "train.py"), *flags(**shape, **asked)])
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        ms = statistics.median([line["step_ms"] for line in metrics if line["event"] == "train"][min(5, steps // 2) :])
        return {
            "ms": ms,
            "peak_mb": done["peak_bytes"] / 2**20,
            "tokens_per_second": case["batch_size"] * case["block_size"] / ms * 1e3,
            "out": str(out),
        }

    def nanogpt(self, case: dict, steps: int, **more) -> dict:
        """Train with the peer's train.py."""
        out = Path(tempfile.mkdtemp(dir=self.folder))
        gpu = self.device.type == "cuda"
        shape = {
            "bias": False,
            "dropout": 0.0,
            "dataset": "shakespeare_char",
            "device": self.device.type,
            "compile": gpu,
            "gradient_accumulation_steps": 1,
        } | case
        asked = {
            "max_iters": steps,
            "eval_interval": 10**6,
            "eval_iters": 1,
            "log_interval": 1,
            "out_dir": out,
            "dtype": "bfloat16" if gpu else "float32",
        } | more
        done = shell([sys.executable, "train.py", *flags(**shape, **asked)], cwd=self.peer)
        times = [float(ms) for ms in re.findall(r"^iter \d+: loss \S+, time ([\d.]+)ms", done["output"], re.M)]
        ms = statistics.median(times[min(5, steps // 2) :])
        return {
            "ms": ms,
            "peak_mb": done["peak_bytes"] / 2**20,
            "tokens_per_second": case["batch_size"] * case["block_size"] / ms * 1e3,
            "out": str(out),
        }

    def hf(self, task: str, case: dict, **more) -> dict:
        """The transformers side of a task, in a process of its own."""
        return json.loads(
            shell([sys.executable, "-c", HF, task, self.device.type, json.dumps({"dropout": 0.0} | case | more)])[
                "output"
            ].splitlines()[-1]
        )


HF = """
import json, statistics, sys, time, torch, transformers
task, device, c = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sync = torch.cuda.synchronize if device == "cuda" else lambda: None
shape = transformers.GPT2Config(vocab_size=65, n_positions=c["block_size"], n_embd=c["n_embd"], n_layer=c["n_layer"], n_head=c["n_head"], bos_token_id=0, eos_token_id=None,
                                resid_pdrop=c["dropout"], embd_pdrop=c["dropout"], attn_pdrop=c["dropout"])
torch.manual_seed(0)
model = transformers.GPT2LMHeadModel(shape).to(device)
if task == "train":
    optimizer, times = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), []
    for step in range(c["steps"]):
        sync(); begin = time.perf_counter()
        idx = torch.randint(65, (c["batch_size"], c["block_size"]), device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(idx, labels=idx).loss
        loss.backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0); optimizer.step(); optimizer.zero_grad(); loss.item()
        times.append(time.perf_counter() - begin)
    ms = 1e3 * statistics.median(times[min(5, c["steps"] // 2):])
    print(json.dumps({"ms": ms, "tokens_per_second": c["batch_size"] * c["block_size"] / ms * 1e3}))
else:
    model.eval()
    idx = torch.zeros(c["num_samples"], c["prompt"], dtype=torch.long, device=device)
    sync(); begin = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(idx, max_new_tokens=c["new"], min_new_tokens=c["new"], do_sample=True, temperature=0.8, top_k=200, pad_token_id=0)
    sync(); seconds = time.perf_counter() - begin
    print(json.dumps({"tokens_per_second": (out.shape[1] - c["prompt"]) * c["num_samples"] / seconds}))
"""


# ---------------------------------------------------------------------------------------------------------------------
# sections


def train_section(bench: Bench) -> dict:
    """Each case in our automatic precision and in float32, and the peer; the machine's peak; the parts of a step."""
    import torch

    from model import GPT, GPTConfig
    from nanoforge.device import measure_matmul_flops

    a, figures = bench.a, {}
    cpu = bench.device.type == "cpu"
    for title in a.cases or DEFAULT_CASES[bench.device.type]:
        case = CASES[title]
        sides = {"ours": lambda case=case: bench.ours(case, "auto", a.steps)}
        if cpu:
            sides["ours float32"] = lambda case=case: bench.ours(case, "float32", a.steps)
        if bench.theirs:
            sides["peer"] = (
                (lambda case=case: bench.hf("train", case, steps=a.steps))
                if a.peer_kind == "hf"
                else (lambda case=case: bench.nanogpt(case, a.steps))
            )
        print(f"train {title}: {case}", flush=True)
        results = in_turn(a.pairs, sides)
        told = {key: compare(results, key, key == "ms") for key in ("ms", "tokens_per_second")}
        if a.peer_kind == "nanogpt":
            told["peak_mb"] = {name: figure([run["peak_mb"] for run in runs]) for name, runs in results.items()}
        for name in [name for name in results if name != "peer"]:
            config = json.loads((Path(results[name][0]["out"]) / "train_config.json").read_text())
            shape = {key: tuple(value) if isinstance(value, list) else value for key, value in config["_model"].items()}
            dtype = getattr(torch, config["dtype"])
            peak = max(
                measure_matmul_flops(bench.device, dtype, n) for n in ((512, 768, 1024, 2048) if cpu else (4096, 8192))
            )
            flops = GPT(GPTConfig(**shape)).flops_per_token() * told["tokens_per_second"][name]["median"]
            told[f"of peak, {name}"] = {
                "dtype": config["dtype"],
                "measured_peak_flops": peak,
                "flops": flops,
                "utilisation": flops / peak,
            }
            print(
                f"  {name}: {config['dtype']}, {flops / 1e9:,.0f} of {peak / 1e9:,.0f} GFLOP/s that matrix products reach here: {flops / peak:.0%}"
            )
        told["parts"] = parts_of_a_step(bench, case)
        print("  parts of a step: " + ", ".join(f"{name} {share:.1%}" for name, share in told["parts"].items()))
        show(f"train {title}, ms a step", told["ms"])
        figures[title] = told
    return figures


def parts_of_a_step(bench: Bench, case: dict) -> dict[str, float]:
    """Share of each part in the time of ten steps made of train.py's parts, from torch's profiler; each waits for the device."""
    import torch
    from torch.profiler import profile, record_function

    import train
    import train_args
    from nanoforge import distributed
    from nanoforge.device import tune_malloc
    from nanoforge.training import logger

    out = Path(tempfile.mkdtemp(dir=bench.folder))
    args = train_args.parse(
        flags(**case, data_dir=bench.data_dir, dataset="shakespeare_char", out_dir=out, device=bench.device.type)
    )
    wait = torch.cuda.synchronize if bench.device.type == "cuda" else lambda: None
    tune_malloc()
    with distributed.join_ranks(args.device) as ranks:
        run = train.build(args, ranks, lambda words: None)
        log = logger.RunLogger(out, silent=False, start_step=0, evaluated=False, seconds=0.0, total_steps=20)
        stream, weights = run.data.source.stream(0, run.share, ranks.device, hashed=False), list(run.model.parameters())

        def step(number: int) -> None:
            with record_function("part: data"):
                batch = next(stream).batches[0]
                wait()
            with record_function("part: forward"):
                loss = run.net(batch.idx, batch.targets).mean()
                wait()
            with record_function("part: backward"):
                loss.backward()
                wait()
            with record_function("part: optimizer"):
                norm = run.optimizer.clip_grad_norm(weights, run.scaler, args.grad_clip)
                run.optimizer.update(run.scaler)
                wait()
            with record_function("part: logging"), contextlib.redirect_stdout(None):
                log.event("train", number, "", loss=float(loss.detach()), grad_norm=float(norm))

        for number in range(5):
            step(number)
        with profile() as profiler:
            for number in range(5, 15):
                step(number)
        log.close()
        stream.close()
    spent = {
        event.key.removeprefix("part: "): event.cpu_time_total
        for event in profiler.key_averages()
        if event.key.startswith("part: ")
    }
    return {name: time / sum(spent.values()) for name, time in spent.items()}


# Runs a script with a stopwatch around one function of one module: the script itself is unmodified.
STOPWATCH = """
import importlib, runpy, sys, time
folder, module, path, script, *argv = sys.argv[1:]
sys.path.insert(0, folder)
owner = importlib.import_module(module)
*owners, name = path.split(".")
for part in owners:
    owner = getattr(owner, part)
plain, spent = getattr(owner, name), []
def timed(*args, **kwargs):
    begin = time.perf_counter()
    out = plain(*args, **kwargs)
    out[..., -1].sum().item()
    spent.append(time.perf_counter() - begin)
    return out
setattr(owner, name, timed)
sys.argv = [script, *argv]
runpy.run_path(script, run_name="__main__")
print("stopwatch", sum(spent))
"""


def sample_section(bench: Bench) -> dict:
    """Tokens a second from the same weights: one sequence inside the block, 500 tokens past it, a batch of 16. The peer's sample.py draws
    the sequences of a batch one after the other: that is its own way to draw 16."""
    a, figures = bench.a, {}
    cpu = bench.device.type == "cpu"
    case = CASES[(a.cases or (("10.6M",) if cpu else ("124M",)))[0]]
    block = case["block_size"]
    if bench.peer:
        weights = Path(bench.nanogpt(case, 2, eval_interval=1, always_save_checkpoint=True)["out"]) / "ckpt.pt"
        source = flags(init_from=weights)
    else:
        weights = Path(bench.ours(case, "float32", 1)["out"])
        source = flags(out_dir=weights)
    source += ["--no-stream", *([] if cpu else ["--compile"])]
    situations = {
        "inside the block": (8, max(1, block - 56), 1),
        "past the block": (block, 500, 1),
        "batch of 16": (8, block // 2, 16),
    }
    situations |= {} if cpu else {"batch of 256": (8, block // 2, 256)}
    for title, (prompt, new, samples) in situations.items():
        letters, numbers = (
            bench.folder / "letters.txt",
            bench.folder / "numbers.txt",
        )  # the peer's checkpoint doesn't say what its ids mean
        letters.write_text("\n" * prompt)
        numbers.write_text(" ".join(["0"] * prompt))
        common = flags(num_samples=samples, max_new_tokens=new, temperature=0.8, top_k=200, device=bench.device.type)

        def timed(
            folder: Path, module: str, function: str, more: list[str], common=common, tokens=new * samples
        ) -> dict:
            done = shell(
                [sys.executable, "-c", STOPWATCH, str(folder), module, function, "sample.py", *common, *more],
                cwd=folder,
            )
            return {"tokens_per_second": tokens / float(done["output"].split("stopwatch ")[-1])}

        sides = {
            "ours": lambda timed=timed, letters=letters, numbers=numbers: timed(
                ROOT,
                "nanoforge.models.generation",
                "generate",
                [*source, f"--start=FILE:{numbers if bench.peer else letters}"],
            )
        }
        if a.peer_kind == "hf" and prompt + new <= block:  # its learned positions end with the block
            sides["peer"] = lambda asked={"prompt": prompt, "new": new, "num_samples": samples}: bench.hf(
                "generate", case, **asked
            )
        elif bench.peer:
            sides["peer"] = lambda timed=timed, letters=letters: timed(
                bench.peer,
                "model",
                "GPT.generate",
                flags(start=f"FILE:{letters}", out_dir=weights.parent, dtype="float32" if cpu else "bfloat16"),
            )
        print(f"sample {title}: prompt {prompt}, {new} new tokens, {samples} sequences", flush=True)
        figures[title] = compare(in_turn(a.pairs, sides), "tokens_per_second", False)
        show(f"sample {title}, tokens/s", figures[title])
    return figures


def data_section(bench: Bench) -> dict:
    """Character prepare of a large text; batches of 64 x 1024 from a large bin, and the memory held over many of them."""
    a, figures = bench.a, {}
    text, folder = bench.folder / "text" / "input.txt", bench.folder / "text"
    folder.mkdir()
    words = (
        (bench.data_dir / "shakespeare_char" / "input.txt").read_bytes()
        if bench.peer
        else b"".join(bytes([32 + i % 95]) for i in range(10**6))
    )
    with text.open("wb") as file:
        for _ in range(a.text_mb * 2**20 // len(words) + 1):
            file.write(words)

    def prepare(argv: list[str]) -> dict:
        done = shell(argv)
        return {"seconds": done["seconds"], "peak_mb": done["peak_bytes"] / 2**20}

    own = [str(ROOT / "data" / "prepare.py"), *flags(input=text, name="large", data_dir=bench.folder, tokenizer="char")]
    sides = {"ours": lambda: prepare([sys.executable, *own])}
    if bench.peer:
        script = shutil.copy(bench.peer / "data" / "shakespeare_char" / "prepare.py", folder)
        sides["peer"] = lambda: prepare([sys.executable, str(script)])
    print(f"data: prepare {text.stat().st_size / 2**20:.0f} MB of characters", flush=True)
    results = in_turn(a.pairs, sides)
    figures["prepare"] = {key: compare(results, key, True) for key in ("seconds", "peak_mb")}
    show("prepare, seconds", figures["prepare"]["seconds"])
    show("prepare, peak MB", figures["prepare"]["peak_mb"])
    figures["batches"] = batches_figures(bench)
    return figures


def resident_mb() -> float:
    """Memory of this process that is in RAM now (on Linux; elsewhere the most there ever was)."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def batches_figures(bench: Bench) -> dict:
    """ms to make a batch of 64 x 1024, int64 on the CPU, ours without the thread that makes it in advance, and the peer's get_batch."""
    import numpy as np
    import torch

    from nanoforge.data import batches, tokenization
    from nanoforge.data.token_bins import Meta

    a, B, T = bench.a, 64, 1024
    folder = bench.folder / "bin" / "large"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, tokens in (("train.bin", a.bin_tokens), ("val.bin", 10**5)):
        with (folder / name).open("wb") as file:
            for first in range(0, tokens, 10**7):
                draw.integers(0, 50257, min(10**7, tokens - first), dtype=np.uint16).tofile(file)
    metas = {"large": Meta(50257, "uint16", tokenization.NumberTokenizer(50257), {})}
    data = batches.open_data(
        folder.parent, [("large",)], metas, {}, batches.make_mixture([1]), batches.WindowSampling(T, B, "random", 0)
    )
    cpu, rows = torch.device("cpu"), data.source.iter_windows(0, 0, B)
    sides = {"ours": lambda: batches.to_batch(next(rows), pin=False).to(cpu)}
    if bench.peer:
        tree = ast.parse((bench.peer / "train.py").read_text())
        (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_batch"]
        names = {
            "np": np,
            "torch": torch,
            "os": os,
            "data_dir": str(folder),
            "block_size": T,
            "batch_size": B,
            "device_type": "cpu",
            "device": "cpu",
        }
        exec(compile(ast.Module([function], []), "the peer's get_batch", "exec"), names)
        sides["peer"] = lambda: names["get_batch"]("train")

    def turn(call) -> dict:
        begin = time.perf_counter()
        for _ in range(50):
            call()
        return {"ms": (time.perf_counter() - begin) / 50 * 1e3}

    for call in sides.values():
        turn(call)
    figures = {
        "ms": compare(
            in_turn(4 * a.pairs, {name: lambda call=call: turn(call) for name, call in sides.items()}), "ms", True
        )
    }
    show("batches, ms", figures["ms"])
    stream, held = data.source.stream(0, 0, B, B, cpu, False), []
    for batch in range(a.batches):
        next(stream)
        if batch % (a.batches // 10) == 0:
            held.append(round(resident_mb(), 1))
    stream.close()
    print(f"  resident MB over {a.batches:,} batches: {held}")
    return figures | {"resident_mb": held}


def startup_section(bench: Bench) -> dict:
    """Seconds from the start of the process to the end of the first step; and to the end of --help."""
    a, figures = bench.a, {}
    common = SMALL | {
        "dataset": "shakespeare_char",
        "device": bench.device.type,
        "compile": False,
        "eval_iters": 1,
        "log_interval": 1,
        "bias": False,
    }

    def until_first_step(argv: list[str], line: str, cwd: Path) -> dict:
        out = tempfile.mkdtemp(dir=bench.folder)
        return {
            "seconds": shell([sys.executable, *argv, *flags(**common, max_iters=1, out_dir=out)], cwd, line)["reached"]
        }

    sides = {
        "ours": lambda: until_first_step(
            [str(ROOT / "train.py"), *flags(data_dir=bench.data_dir)], "step 1: loss", ROOT
        )
    }
    if bench.peer:
        theirs = [
            "train.py",
            *flags(
                dropout=0.0,
                gradient_accumulation_steps=1,
                dtype="float32" if bench.device.type == "cpu" else "bfloat16",
            ),
        ]
        sides["peer"] = lambda: until_first_step(theirs, "iter 0: loss", bench.peer)
    for call in sides.values():
        call()  # files into the page cache
    figures["first step"] = compare(in_turn(a.pairs, sides), "seconds", True)
    helped = {"ours": lambda: {"seconds": shell([sys.executable, str(ROOT / "train.py"), "--help"])["seconds"]}}
    figures["help"] = compare(in_turn(a.pairs, helped), "seconds", True)
    show("to the first step, s", figures["first step"])
    show("--help, s", figures["help"])
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# the race

# Runs the peer's train.py, unmodified, with another seed, and keeps every checkpoint that it saves.
RACER = """
import runpy, sys, torch
seed, script, *argv = sys.argv[1:]
plain_seed, plain_save = torch.manual_seed, torch.save
torch.manual_seed = lambda number: plain_seed(number + int(seed))
torch.save = lambda what, path: plain_save(what, path.replace("ckpt.pt", f"ckpt_{what['iter_num']:06d}.pt"))
sys.path.insert(0, "")
sys.argv = [script, *argv]
runpy.run_path(script, run_name="__main__")
"""

# Runs our train.py and judges the model at every evaluation by the race's own measure, outside the steps' time.
OURS = """
import json, sys
from pathlib import Path
from nanoforge.device import tune_malloc
from nanoforge.device import measure_matmul_flops
from nanoforge.device import get_device
import bench, train, train_args
val, block, out, *argv = sys.argv[1:]
plain, curve = train.evaluate, []
def evaluate(run, signals):
    curve.append((run.progress.step, bench.held_out_loss(run.model, Path(val), int(block))))
    return plain(run, signals)
train.evaluate = evaluate
train.main(train_args.parse(argv))
Path(out).write_text(json.dumps(curve))
"""


def held_out_loss(model, val: Path, block: int) -> float:
    """Mean loss of all of a bin's tokens in consecutive windows of `block`, in float32."""
    import numpy as np
    import torch

    tokens = torch.from_numpy(np.fromfile(val, dtype=np.uint16).astype(np.int64))
    windows = (len(tokens) - 1) // block
    idx, targets = tokens[: windows * block].view(windows, block), tokens[1 : windows * block + 1].view(windows, block)
    dtype, training, device = model.compute_dtype, model.training, model.wte.weight.device
    model.eval().compute_dtype = torch.float32
    with torch.no_grad():
        total = sum(
            float(model(x.to(device), y.to(device)).sum(dtype=torch.float64))
            for x, y in zip(idx.split(256), targets.split(256), strict=True)
        )
    model.train(training).compute_dtype = dtype
    return total / (windows * block)


def race_section(bench: Bench) -> dict:
    """Our recipe and the peer's, to the peer's final loss on the held-out tokens. Seconds are those of training steps, without start-up
    and evaluation; `wall` is the whole process."""
    from model import GPT, GPTConfig
    from nanoforge.errors import UserError
    from nanoforge.models import pretrained

    a, cpu = bench.a, bench.device.type == "cpu"
    if not bench.peer:
        raise UserError("race: needs --peer, whose final loss is the goal")
    case = SMALL if cpu else CASES["shakespeare_char"]
    config = a.race_config or str(ROOT / "configs" / ("shakespeare_cpu.py" if cpu else "shakespeare_gpu.py"))
    val, block = bench.data_dir / "shakespeare_char" / "val.bin", case["block_size"]

    def ours(seed: int) -> dict:
        out = Path(tempfile.mkdtemp(dir=bench.folder))
        argv = [
            config,
            *flags(
                data_dir=bench.data_dir,
                dataset="shakespeare_char",
                out_dir=out,
                seed=seed,
                device=bench.device.type,
                log_interval=1,
                eval_interval=10,
                eval_iters=1,
            ),
        ]
        begin = time.perf_counter()
        shell([sys.executable, "-c", OURS, str(val), str(block), str(out / "curve.json"), *argv])
        wall = time.perf_counter() - begin
        lines = [
            line
            for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            if line["event"] == "train"
        ]
        seconds, tokens, shape = {0: 0.0}, {0: 0}, json.loads((out / "train_config.json").read_text())["_model"]
        for line in lines:
            seconds[line["step"]] = seconds[line["step"] - 1] + line["step_ms"] / 1e3
            tokens[line["step"]] = line["tokens"]
        curve = [
            {"step": step, "seconds": seconds[step], "tokens": tokens[step], "loss": loss}
            for step, loss in json.loads((out / "curve.json").read_text())
        ]
        model = GPT(
            GPTConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in shape.items()})
        )
        return {
            "seed": seed,
            "wall": wall,
            "curve": curve,
            "loss": curve[-1]["loss"],
            "parameters": model.count_parameters(),
        }

    def theirs(seed: int, lr: float) -> dict:
        out = Path(tempfile.mkdtemp(dir=bench.folder))
        recipe = {
            "max_iters": a.peer_iters,
            "lr_decay_iters": a.peer_iters,
            "learning_rate": lr,
            "min_lr": lr / 10,
            "beta2": 0.99,
            "warmup_iters": 100,
        }
        asked = {
            "eval_interval": max(1, a.peer_iters // 20),
            "eval_iters": 1,
            "log_interval": 1,
            "always_save_checkpoint": True,
            "bias": False,
        }
        system = {
            "device": bench.device.type,
            "compile": not cpu,
            "dtype": "float32" if cpu else "bfloat16",
            "gradient_accumulation_steps": 1,
        }
        where = {"dataset": "shakespeare_char", "out_dir": out}
        done = shell(
            [
                sys.executable,
                "-c",
                RACER,
                str(seed),
                "train.py",
                *flags(**{"dropout": 0.0} | case | recipe | asked | system | where),
            ],
            cwd=bench.peer,
        )
        # The evaluation before an iteration falls into the time that is printed for it: such a one counts as the median one.
        printed = [float(ms) / 1e3 for ms in re.findall(r"^iter \d+: loss \S+, time ([\d.]+)ms", done["output"], re.M)]
        usual = statistics.median(printed)
        spent = [usual if i % asked["eval_interval"] == 0 else each for i, each in enumerate(printed)]
        curve = []
        for path in sorted(out.glob("ckpt_*.pt")):
            loaded = pretrained.load(str(path))
            model = GPT(GPTConfig(**loaded.shape))
            model.load_weights(loaded.weights, str(path))
            step = int(path.stem[5:])
            curve.append(
                {
                    "step": step,
                    "seconds": sum(spent[:step]),
                    "tokens": step * case["batch_size"] * block,
                    "loss": held_out_loss(model, val, block),
                }
            )
        return {
            "seed": seed,
            "lr": lr,
            "wall": done["seconds"],
            "curve": curve,
            "loss": curve[-1]["loss"],
            "parameters": model.count_parameters(),
        }

    runs: dict[str, list[dict]] = {"ours": []} | {f"peer, lr {lr:g}": [] for lr in a.peer_lr}
    for seed in range(a.seeds):
        for name, call in {
            "ours": ours,
            **{f"peer, lr {lr:g}": lambda seed, lr=lr: theirs(seed, lr) for lr in a.peer_lr},
        }.items():
            runs[name].append(call(seed))
            last = runs[name][-1]["curve"][-1]
            print(
                f"  seed {seed} {name}: loss {last['loss']:.4f} after {last['step']} steps, {last['seconds']:.1f} s",
                flush=True,
            )
    figures: dict = {"runs": runs, "goals": {}}
    for name in [name for name in runs if name != "ours"]:
        goal = statistics.mean(run["loss"] for run in runs[name])
        their = {
            key: statistics.median(run["curve"][-1][key] for run in runs[name]) for key in ("step", "tokens", "seconds")
        }
        reached = [next((point for point in run["curve"] if point["loss"] <= goal), None) for run in runs["ours"]]
        told = {"goal": goal, "peer": their, "ours": reached}
        print(f"race to {name}'s loss {goal:.4f}: it took {their['step']} steps, {their['seconds']:.1f} s")
        if all(reached):
            our = {key: statistics.median(point[key] for point in reached) for key in ("step", "tokens", "seconds")}
            told["ratio"] = {key: their[key] / our[key] for key in our}
            print(
                f"  ours {our['step']} steps, {our['seconds']:.1f} s: {told['ratio']['step']:.1f} x fewer steps, {told['ratio']['tokens']:.1f} x tokens, {told['ratio']['seconds']:.1f} x seconds"
            )
        else:
            print("  ours did not reach it with every seed")
        figures["goals"][name] = told
    draw_race(runs, figures["goals"], Path(a.out) / f"race_{bench.name}.png")
    return figures


def draw_race(runs: dict[str, list[dict]], goals: dict, picture: Path) -> None:
    """Held-out loss against steps and against seconds, every seed of every side."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(11, 4.5), layout="constrained")
    colors = dict(zip(runs, ("#e6550d", "#3182bd", "#31a354", "#756bb1", "#636363"), strict=False))
    for axes, key in zip(sheet.subplots(1, 2, sharey=True), ("step", "seconds"), strict=True):
        for name, seeds in runs.items():
            for run in seeds:
                axes.plot(
                    [p[key] for p in run["curve"]],
                    [p["loss"] for p in run["curve"]],
                    color=colors[name],
                    linewidth=1.2,
                    label=name if run is seeds[0] else None,
                )
        for name, told in goals.items():
            axes.axhline(told["goal"], color=colors[name], linewidth=0.8, linestyle=":")
        axes.set(
            xscale="log",
            xlabel={"step": "optimizer steps", "seconds": "seconds of training"}[key],
            ylim=(min(t["goal"] for t in goals.values()) - 0.15, 3.0),
        )
        axes.grid(alpha=0.25, which="both")
    sheet.axes[0].set_ylabel("loss on the held-out text (nats per character)")
    sheet.axes[0].legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(picture, dpi=110)


# ---------------------------------------------------------------------------------------------------------------------


def main(given) -> None:
    section, a = given
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        bench = Bench(a, Path(folder))
        for name in SECTIONS[:-1] if section == "all" else (section,):
            print(f"== {name}", flush=True)
            bench.write(name, globals()[f"{name}_section"](bench))
        print(f"written: {bench.file}")


if __name__ == "__main__":
    asked = sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "all"
    if asked not in SECTIONS:
        configurator.exit_with_errors([f"{asked}: no such section; there are {', '.join(SECTIONS)}"])
    configurator.run(
        main,
        (
            asked,
            configurator.parse(
                BenchArgs, [word for word in sys.argv[1:] if word != asked], __doc__, Rules(check=check)
            ),
        ),
    )
