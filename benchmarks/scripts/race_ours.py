"""Run this program's train.py and measure the model at every evaluation as the race does, outside the time of the steps.

python -m benchmarks.scripts.race_ours VAL_BIN BLOCK_SIZE CURVE_JSON [ARGUMENT ...]
"""

import json
import sys
from pathlib import Path
from typing import Any

import train
import train_args
from benchmarks.bench_race import held_out_loss
from nanoforge.training.signals import Signals


def main() -> None:
    val_path, block_size, curve_path, *arguments = sys.argv[1:]
    evaluate = train.evaluate
    curve = []

    def evaluate_and_measure(run: train.Run, signals: Signals) -> Any:
        loss = held_out_loss(run.model, Path(val_path), int(block_size))
        curve.append((run.progress.step, loss))
        return evaluate(run, signals)

    train.evaluate = evaluate_and_measure
    train.main(train_args.parse(arguments))
    Path(curve_path).write_text(json.dumps(curve))


if __name__ == "__main__":
    main()
