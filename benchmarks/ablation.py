"""What each choice of configs/shakespeare_cpu.py is worth: the recipe with one thing changed, several seeds each.

    python -m benchmarks.ablation [SEEDS]                3 by default; about 20 seconds a run on two cores

Judged on the last 100,000 characters of the *training* text, which no variant trains on; the validation text stays out of it.
Writes benchmarks/ablation.md.
"""

import json
import math
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import ROOT, run_process, to_flags

VARIANTS: dict[str, dict[str, object]] = {
    "the recipe": {},
    "GELU": {"activation": "gelu"},
    "LayerNorm": {"norm": "layernorm"},
    "learned positions": {"position": "learned"},
    "no QK-norm": {"qk_norm": False},
    "no embedding norm": {"embedding_norm": False},
    "no residual scalars": {"residual_scalars": False},
    "with value residual": {"value_residual": True},
    "with softcap 15": {"logit_softcap": 15},
    "tied head": {"tie_weights": True, "embedding_learning_rate": 0.004},
    "projections not zero at first": {"zero_init": False},
    "AdamW at 0.004 for the matrices": {"optimizer": "adamw", "learning_rate": 0.004},
    "AdamW at 0.008 for the matrices": {"optimizer": "adamw", "learning_rate": 0.008},
    "cosine schedule": {"lr_scheduler": "cosine"},
    "windows at random": {"sampling_method": "random"},
}
HELD_OUT = 100_000


def slice_training_text(folder: Path) -> None:
    """folder/slice: a dataset whose validation text is the end of shakespeare_char's training text."""
    source, target = ROOT / "data" / "shakespeare_char", folder / "slice"
    if not (source / "train.bin").exists():
        run_process([sys.executable, str(source / "prepare.py")])
    target.mkdir()
    tokens = np.fromfile(source / "train.bin", dtype="<u2")
    tokens[:-HELD_OUT].tofile(target / "train.bin")
    tokens[-HELD_OUT:].tofile(target / "val.bin")
    (target / "meta.json").write_text(json.dumps(json.loads((source / "meta.json").read_text()) | {"files": {}}))


def train(folder: Path, seed: int, changes: dict[str, object]) -> float:
    """The validation loss at the end."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    common = {
        "data_dir": folder,
        "dataset": "slice",
        "out_dir": out,
        "seed": seed,
        "eval_interval": 10**6,
        "eval_iters": HELD_OUT // (32 * 64),
        "device": "cpu",
    }
    run_process([sys.executable, "train.py", "configs/shakespeare_cpu.py", *to_flags(**common, **changes)])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["val_loss"] for line in lines if line["event"] == "eval"][-1]


def main(seeds: int) -> None:
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="ablation") as folder:
        slice_training_text(Path(folder))
        for seed in range(seeds):
            for name, changes in VARIANTS.items():
                losses[name].append(train(Path(folder), seed, changes))
                print(f"seed {seed}, {name}: {losses[name][-1]:.4f}", flush=True)
    base = losses["the recipe"]
    rows = [
        "# What each choice of configs/shakespeare_cpu.py is worth",
        "",
        f"Loss after the recipe's 200 steps on the last {HELD_OUT:,} characters of the training text, which no run trained on; {seeds} seeds, the same",
        "ones for each row. Difference: from the recipe, seed by seed, with its standard error; above 0 means that the recipe is better.",
        "Made by `python -m benchmarks.ablation`.",
        "",
        f"| the recipe, but | mean loss | difference | {' | '.join(f'seed {seed}' for seed in range(seeds))} |",
        "|---" * (3 + seeds) + "|",
    ]
    for name, values in losses.items():
        apart = [value - other for value, other in zip(values, base, strict=True)]
        error = statistics.stdev(apart) / math.sqrt(seeds) if seeds > 1 else math.nan
        difference = "" if values is base else f"{statistics.mean(apart):+.4f} ± {error:.4f}"
        rows.append(
            f"| {name} | {statistics.mean(values):.4f} | {difference} | {' | '.join(f'{value:.4f}' for value in values)} |"
        )
    (ROOT / "benchmarks" / "ablation.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
