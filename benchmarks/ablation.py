"""What each choice of configs/shakespeare_cpu.py is worth: the recipe with one thing changed, several seeds each.

    python -m benchmarks.ablation --seeds=5                     one run after the other
    python -m benchmarks.ablation --seeds=5 --processes=2       two at a time: 13 seconds a run on two cores

Evaluated on the last 100,000 characters of the *training* text, on which no variant trains; the validation text is not
used. Each loss goes to benchmarks/ablation.json at once: the same command goes on where it was ended, and runs only
what is new in VARIANTS; all of it where the recipe has changed. At last writes benchmarks/ablation.md.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import ROOT, run_process, share_cores, to_flags
from nanoforge.config_files import read_layers
from nanoforge.files import write_json, write_text

Changes = Mapping[str, object]  # argument -> value, where it is not the recipe's


class Result(NamedTuple):
    """What a run ended with."""

    loss: float
    step_ms: float  # the median; of one core, where two runs share two


Results = dict[str, dict[str, Result]]  # changes as JSON -> seed -> result

RECIPE = "configs/shakespeare_cpu.py"

BASE = "the recipe"
VARIANTS: dict[str, Changes] = {
    BASE: {},
    "nanoGPT's shape and a batch of 32": {
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "mlp_ratio": 4,
        "batch_size": 32,
    },
    "width 96": {"n_embd": 96},
    "MLP of 4 x the width": {"mlp_ratio": 4},
    "batch of 48": {"batch_size": 48},
    "GELU": {"activation": "gelu"},
    "LayerNorm": {"norm": "layernorm"},
    "learned positions": {"position": "learned"},
    "no QK-norm": {"qk_norm": False},
    "no embedding norm": {"embedding_norm": False},
    "with residual scalars": {"residual_scalars": True},
    "with value residual": {"value_residual": True},
    "with softcap 15": {"logit_softcap": 15},
    "tied head": {"tie_weights": True, "embedding_learning_rate": 0.004},
    "projections zero at first": {"zero_init": True},
    "embedding from N(0, 1), at 0.3": {"embedding_init_std": 1.0, "embedding_learning_rate": 0.3},
    "half of RoPE": {"rotary_fraction": 0.5},
    "Muon at 0.03": {"muon_learning_rate": 0.03},
    "Muon at 0.09": {"muon_learning_rate": 0.09},
    "Muon's momentum 0.9": {"muon_momentum": 0.9},
    "Muon's momentum from 0.85 to 0.95 in 100 steps": {"muon_momentum": 0.95, "muon_momentum_warmup": 100},
    "Muon's weight decay 0.2": {"muon_weight_decay": 0.2},
    "cautious weight decay 0.2": {"muon_weight_decay": 0.2, "cautious_weight_decay": True},
    "AdamW at 0.004 for the matrices": {"optimizer": "adamw", "learning_rate": 0.004},
    "AdamW at 0.008 for the matrices": {"optimizer": "adamw", "learning_rate": 0.008},
    "AdamW's rate 0.03": {"learning_rate": 0.03},
    "head at 0.005": {"head_learning_rate": 0.005},
    "AdamW's beta1 0.9": {"beta1": 0.9},
    "AdamW's epsilon 1e-10": {"aux_eps": 1e-10},
    "no average of weights": {"ema_decay": 0.0},
    "cooldown over 90 %": {"wsd_decay_fraction": 0.9},
    "cooldown over 50 %": {"wsd_decay_fraction": 0.5},
    "cosine schedule": {"lr_scheduler": "cosine"},
    "warm-up of 15 steps": {"warmup_iters": 15},
    "windows at random": {"sampling_method": "random"},
}
HELD_OUT_CHARS = 100_000


class Study(NamedTuple):
    """What the runs of all variants share."""

    folder: Path  # holds the data, and the runs' own folders
    results: Path
    seeds: range
    processes: int
    dtype: str


def write_dataset(folder: Path) -> None:
    """folder/slice: a dataset whose validation text is the end of shakespeare_char's training text."""
    source, target = ROOT / "data" / "shakespeare_char", folder / "slice"
    if not (source / "train.bin").exists():
        run_process([sys.executable, str(source / "prepare.py")])
    target.mkdir()
    tokens = np.fromfile(source / "train.bin", dtype="<u2")
    tokens[:-HELD_OUT_CHARS].tofile(target / "train.bin")
    tokens[-HELD_OUT_CHARS:].tofile(target / "val.bin")
    meta = json.loads((source / "meta.json").read_text())
    (target / "meta.json").write_text(json.dumps(meta | {"files": {}}))


def read_recipe() -> dict[str, Any]:
    """The arguments of the recipe."""
    return {name: value for _, values in read_layers(str(ROOT / RECIPE)) for name, value in values.items()}


def train_variant(study: Study, seed: int, changes: Changes) -> Result:
    """Train a variant to the end."""
    values = read_recipe() | dict(changes)
    with tempfile.TemporaryDirectory(dir=study.folder) as out_dir:
        flags: dict[str, object] = {
            "data_dir": study.folder,
            "dataset": "slice",
            "out_dir": Path(out_dir) / "run",
            "seed": seed,
            "eval_interval": 10**6,
            "eval_iters": HELD_OUT_CHARS // (values["batch_size"] * values["block_size"]),
            "log_interval": 1,
            "device": "cpu",
            "dtype": study.dtype,
            **changes,
        }
        run_process([sys.executable, "train.py", RECIPE, *to_flags(**flags)])
        lines = [json.loads(line) for line in (Path(out_dir) / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if line["event"] == "eval"]
    return Result(losses[-1], statistics.median(line["step_ms"] for line in lines if line["event"] == "train"))


def run_missing(study: Study) -> Results:
    """All results: those of the file, and of the runs that it lacks, each written as soon as it is known."""
    recipe = read_recipe()
    saved = json.loads(study.results.read_text()) if study.results.exists() else {}
    saved_results = saved["results"] if saved.get("recipe") == recipe else {}
    results = {key: {seed: Result(*pair) for seed, pair in seeds.items()} for key, seeds in saved_results.items()}

    def run(name: str, seed: int) -> tuple[str, int, Result]:
        return name, seed, train_variant(study, seed, VARIANTS[name])

    pool = ThreadPoolExecutor(study.processes)
    try:
        runs = [
            pool.submit(run, name, seed)
            for seed in study.seeds
            for name, changes in VARIANTS.items()
            if str(seed) not in results.get(json.dumps(changes), {})
        ]
        for done in as_completed(runs):
            name, seed, result = done.result()
            results.setdefault(json.dumps(VARIANTS[name]), {})[str(seed)] = result
            write_json(study.results, {"recipe": recipe, "results": results})
            print(f"seed {seed}, {name}: {result.loss:.4f}, {result.step_ms:.0f} ms a step", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def table_row(name: str, results: Sequence[Result], base_losses: Sequence[float]) -> str:
    difference = ""
    losses = [result.loss for result in results]
    if name != BASE:
        differences = [loss - base for loss, base in zip(losses, base_losses, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
        difference = f"{statistics.mean(differences):+.4f} ± {error:.4f}"
    step_ms = f"{statistics.median(result.step_ms for result in results):.0f}"
    cells = [name, f"{statistics.mean(losses):.4f}", difference, *(f"{loss:.4f}" for loss in losses), step_ms]
    return f"| {' | '.join(cells)} |"


def format_table(results: Results, seeds: range) -> str:
    columns = ["the recipe, but", "mean loss", "difference", *(f"seed {seed}" for seed in seeds), "ms a step"]
    lines = [
        "# What each choice of configs/shakespeare_cpu.py is worth",
        "",
        f"Loss after the recipe's 200 steps on the last {HELD_OUT_CHARS:,} characters of the training text, on which "
        f"no run trained; {len(seeds)} seeds, the same ones for each row.",
        "Difference: from the recipe, seed by seed, with its standard error; above 0 the recipe is better.",
        "The time of a step is that on one core, beside another run.",
        f"Made by `python -m benchmarks.ablation --seeds={len(seeds)}`.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    rows = {name: [results[json.dumps(changes)][str(seed)] for seed in seeds] for name, changes in VARIANTS.items()}
    base_losses = [result.loss for result in rows[BASE]]
    lines += [table_row(name, row, base_losses) for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--dtype", default="auto", help="as train.py has it")
    args = parser.parse_args()
    share_cores(args.processes)
    folder = ROOT / "benchmarks"
    with tempfile.TemporaryDirectory(prefix="ablation") as data_dir:
        study = Study(Path(data_dir), folder / "ablation.json", range(args.seeds), args.processes, args.dtype)
        write_dataset(study.folder)
        results = run_missing(study)
    write_text(folder / "ablation.md", format_table(results, study.seeds))


if __name__ == "__main__":
    main()
