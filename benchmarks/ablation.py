"""What each choice of configs/shakespeare_cpu.py is worth: the recipe with one thing changed, several seeds each.

    python -m benchmarks.ablation [SEEDS]                3 by default; about 20 seconds a run on two cores

Evaluated on the last 100,000 characters of the *training* text, on which no variant trains; the validation text is not
used. Writes benchmarks/ablation.md.
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
from nanoforge.files import write_text

BASE = "the recipe"
VARIANTS: dict[str, dict[str, object]] = {
    BASE: {},
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
HELD_OUT_CHARS = 100_000


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


def final_val_loss(folder: Path, seed: int, changes: dict[str, object]) -> float:
    """Train a variant; the validation loss at the end."""
    out_dir = folder / "run"
    shutil.rmtree(out_dir, ignore_errors=True)
    flags = {
        "data_dir": folder,
        "dataset": "slice",
        "out_dir": out_dir,
        "seed": seed,
        "eval_interval": 10**6,
        "eval_iters": HELD_OUT_CHARS // (32 * 64),
        "device": "cpu",
    }
    run_process([sys.executable, "train.py", "configs/shakespeare_cpu.py", *to_flags(**flags, **changes)])
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["val_loss"] for line in lines if line["event"] == "eval"][-1]


def table_row(name: str, losses: list[float], base_losses: list[float]) -> str:
    difference = ""
    if name != BASE:
        differences = [loss - base for loss, base in zip(losses, base_losses, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
        difference = f"{statistics.mean(differences):+.4f} ± {error:.4f}"
    cells = [name, f"{statistics.mean(losses):.4f}", difference, *(f"{loss:.4f}" for loss in losses)]
    return f"| {' | '.join(cells)} |"


def format_table(losses: dict[str, list[float]], seeds: int) -> str:
    columns = ["the recipe, but", "mean loss", "difference", *(f"seed {seed}" for seed in range(seeds))]
    lines = [
        "# What each choice of configs/shakespeare_cpu.py is worth",
        "",
        f"Loss after the recipe's 200 steps on the last {HELD_OUT_CHARS:,} characters of the training text, on which "
        f"no run trained; {seeds} seeds, the same ones for each row.",
        "Difference: from the recipe, seed by seed, with its standard error; above 0 the recipe is better.",
        "Made by `python -m benchmarks.ablation`.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    lines += [table_row(name, values, losses[BASE]) for name, values in losses.items()]
    return "\n".join(lines) + "\n"


def main(seeds: int) -> None:
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="ablation") as name:
        folder = Path(name)
        write_dataset(folder)
        for seed in range(seeds):
            for variant, changes in VARIANTS.items():
                losses[variant].append(final_val_loss(folder, seed, changes))
                print(f"seed {seed}, {variant}: {losses[variant][-1]:.4f}", flush=True)
    write_text(ROOT / "benchmarks" / "ablation.md", format_table(losses, seeds))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
