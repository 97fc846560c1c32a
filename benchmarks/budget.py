"""What --time_budget is worth: its run against 12 configurations chosen by hand, each given the same time.

    python -m benchmarks.budget --data_dir=data --datasets=stdlib_char,shakespeare_char --minutes=1,5,20
    python -m benchmarks.budget --processes=2 --likely_only         two runs at a time, each on half of the cores

The machine has to be quiet: 13 runs for each dataset and time, one after the other 11 hours for three datasets of 1, 5
and 20 minutes. It resumes: what is in benchmarks/budget_<device>.json already is not run again. All losses are
those of evaluate.py on the same validation text; a predicted loss is compared with that of the whole validation split.
A configuration by hand fixes size, batch, context and dropout; steps, rates and the end of the schedule are those that
the budget gives it, so it is given every chance.
"""

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import configurator
from benchmarks.common import Figures, run_process, share_cores, to_flags
from configurator import arg, arg_group, arg_table
from nanoforge.errors import UserError
from nanoforge.files import write_json, write_text

SIZES = {"2x64": (2, 2, 64), "4x128": (4, 4, 128), "6x192": (6, 6, 192), "6x384": (6, 6, 384)}  # layers, heads, width
BATCHES = {  # batch size, context, dropout
    "16x64": (16, 64, 0.0),
    "32x128": (32, 128, 0.0),
    "32x128, dropout": (32, 128, 0.2),
}
COLUMNS = (
    "dataset",
    "minutes",
    "chosen",
    "val_loss",
    "best by hand",
    "its val_loss",
    "difference",
    "predicted",
    "off by",
    "seconds",
)
CHOICE = "--time_budget"  # the run to which the others are compared
NEARLY = 1.015  # times the best loss: a batch that may be the best in a longer time


@arg_group
class BudgetBenchArgs:
    """comparison"""

    datasets: tuple[str, ...] = arg(("stdlib_char", "shakespeare_char"), "datasets, prepared in data_dir")
    data_dir: str = arg("data", "folder of the dataset folders", path=True)
    minutes: tuple[float, ...] = arg((1.0, 5.0, 20.0), "times that each run is given", above=0)
    device: str = arg("cpu", "device of all runs; names the file of results")
    dtype: str = arg("auto", "precision of all runs")
    processes: int = arg(1, "runs at a time, which share the cores", low=1)
    likely_only: bool = arg(False, "of longer times, only what may be best by the next shorter one")
    eval_tokens: int = arg(200_000, "validation tokens on which runs are compared, the first ones", low=1)
    out: str = arg("benchmarks", "folder of the results", path=True)


@arg_table
class Args(BudgetBenchArgs):
    """The arguments."""


def configurations() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, arguments) of each run: the budget's own first."""
    yield CHOICE, {}
    for size, (n_layer, n_head, n_embd) in SIZES.items():
        for batch, (batch_size, block_size, dropout) in BATCHES.items():
            yield (
                f"{size}, {batch}",
                {
                    "n_layer": n_layer,
                    "n_head": n_head,
                    "n_embd": n_embd,
                    "batch_size": batch_size,
                    "gradient_accumulation_steps": 1,
                    "block_size": block_size,
                    "dropout": dropout,
                },
            )


def measure(args: Args, dataset: str, minutes: float, values: dict[str, Any]) -> dict[str, Any]:
    """Train one run to the end of its time, and evaluate its best checkpoint."""
    out_dir = Path(tempfile.mkdtemp()) / "run"
    device = {"device": args.device, "dtype": args.dtype}
    flags = {"data_dir": args.data_dir, "dataset": dataset, "time_budget": 60 * minutes, "out_dir": out_dir}
    try:
        run_process([sys.executable, "train.py", *to_flags(**flags, **device, **values)])
        config = json.loads((out_dir / "train_config.json").read_text())
        losses = []
        for max_windows in (max(1, args.eval_tokens // config["block_size"]), 0):  # 0: all
            flags = {"out_dir": out_dir, "max_windows": max_windows}
            run_process([sys.executable, "evaluate.py", *to_flags(**flags, **device)])
            losses.append(json.loads((out_dir / "evaluation.json").read_text())["losses"][dataset]["val_loss"])
        last = json.loads((out_dir / "metrics.jsonl").read_text().splitlines()[-1])
    finally:
        shutil.rmtree(out_dir.parent)
    budget = config["_budget"]
    return {
        "val_loss": losses[0],
        "eval_tokens": args.eval_tokens,
        "unique": budget["text"]["tokens"],
        "whole_val_loss": losses[1],
        "predicted": budget["predicted_val_loss"],
        "law_loss": budget["law_loss"],
        "pilots": budget["pilots"],
        "measuring_seconds": budget["measuring_seconds"],
        "seconds": last["seconds"],
        "steps": last["step"],
        "shape": [config[name] for name in ("n_layer", "n_embd", "batch_size", "block_size", "dropout")],
    }


def describe(results: Figures) -> str:
    """A table: for each dataset and time, what the budget reached beside the best of the others, and predicted."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for case, runs in results.items():
        dataset, _, minutes = case.rpartition(", ")
        if CHOICE not in runs or len(runs) < 2:
            continue
        mine = runs[CHOICE]
        name, best = min(
            ((name, run) for name, run in runs.items() if name != CHOICE), key=lambda pair: pair[1]["val_loss"]
        )
        n_layer, n_embd, batch_size, block_size, dropout = mine["shape"]
        predicted = mine["predicted"]
        cells = [
            dataset,
            minutes,
            f"{n_layer} x {n_embd}, {batch_size} x {block_size}, dropout {dropout:g}",
            f"{mine['val_loss']:.4f}",
            f"{name} (of {len(runs) - 1})",
            f"{best['val_loss']:.4f}",
            f"{mine['val_loss'] / best['val_loss'] - 1:+.1%}",
            f"{predicted:.4f}" if predicted else "",
            f"{predicted / mine['whole_val_loss'] - 1:+.1%}" if predicted else "",
            f"{mine['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def likely_names(results: Figures, dataset: str, minutes: float) -> set[str]:
    """The configurations by hand that may be the best: by the next shorter time the best size and the one after it in
    SIZES, with the batches that were nearly as good as the best one at the best size; all without a shorter time."""
    times = [float(case.rpartition(", ")[2]) for case in results if case.startswith(f"{dataset}, ")]
    for time in sorted((time for time in times if time < minutes), reverse=True):
        runs = results[f"{dataset}, {time:g}"]
        losses = {name: run["val_loss"] for name, run in runs.items() if name != CHOICE}
        if losses:
            break
    else:
        return {name for name, _ in configurations()}
    best_size = min(losses, key=lambda name: losses[name]).partition(", ")[0]
    number = list(SIZES).index(best_size)
    likely = {
        batch for batch in BATCHES if losses.get(f"{best_size}, {batch}", math.inf) <= NEARLY * min(losses.values())
    }
    return {f"{size}, {batch}" for size in list(SIZES)[number : number + 2] for batch in likely}


def run_missing(args: Args, minutes: float, results: Figures, path: Path, pool: ThreadPoolExecutor) -> None:
    """Run what the results lack of a time; write them after each run."""
    started = {}
    for dataset in args.datasets:
        likely = likely_names(results, dataset, minutes)
        runs = results.setdefault(f"{dataset}, {minutes:g}", {})
        for name, values in configurations():
            if name not in runs and (name == CHOICE or name in likely or not args.likely_only):
                started[pool.submit(measure, args, dataset, minutes, values)] = (dataset, name)
    for done in as_completed(started):
        dataset, name = started[done]
        try:
            run = done.result()
        except UserError as error:  # a size of which the time allows no step
            print(f"{dataset}, {minutes:g} minutes, {name}: {error}", flush=True)
            continue
        print(f"{dataset}, {minutes:g} minutes, {name}: {run['val_loss']:.4f}", flush=True)
        results[f"{dataset}, {minutes:g}"][name] = run
        write_json(path, results)
        write_text(path.with_suffix(".md"), describe(results))


def main(args: Args) -> None:
    """Run what is missing."""
    share_cores(args.processes)
    path = Path(args.out) / f"budget_{args.device}.json"
    results: Figures = json.loads(path.read_text()) if path.exists() else {}
    pool = ThreadPoolExecutor(args.processes)
    try:
        for minutes in args.minutes:
            run_missing(args, minutes, results, path, pool)
    finally:
        pool.shutdown(cancel_futures=True)
    print(describe(results))


if __name__ == "__main__":
    configurator.run(main, configurator.parse(Args, sys.argv[1:], __doc__ or ""))
