"""Run train.py and measure the model at every evaluation as the race does, outside the time of the steps.

python -m benchmarks.scripts.race_ours VAL_BIN BLOCK_SIZE CURVE_JSON [ARGUMENT ...]
"""

import json
import sys
from pathlib import Path

import train
import train_args
from benchmarks.bench_race import held_out_loss
from nanoforge.training.logger import RunLogger
from nanoforge.training.signals import Signals
from run import Run


def main() -> None:
    val_path, block_size, curve_path, *arguments = sys.argv[1:]
    evaluate_and_save = train.evaluate_and_save
    curve = []

    def measure_and_evaluate(run: Run, logger: RunLogger, signals: Signals, *, is_last: bool) -> None:
        with run.state.optimizer.evaluation_weights():
            loss = held_out_loss(run.raw_model, Path(val_path), int(block_size))
        curve.append((run.progress.step, loss))
        evaluate_and_save(run, logger, signals, is_last=is_last)

    train.evaluate_and_save = measure_and_evaluate
    train.main(train_args.parse(arguments))
    Path(curve_path).write_text(json.dumps(curve))


if __name__ == "__main__":
    main()
