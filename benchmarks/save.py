"""What a checkpoint costs the training loop, for a model of GPT-2's 124 M parameters with AdamW (1.5 GB of state):

    python -m benchmarks.save

The loop waits for the snapshot; a thread then writes, syncs and hashes the files. Prints two lines.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.common import run_process, to_flags
from benchmarks.datasets import write_random_dataset

STEPS, SAVE_INTERVAL = 24, 8
WRITING_STEPS = (1, 2, 3)  # after a save; the thread is writing meanwhile


def train(folder: Path) -> Path:
    """Train and save in turn; the run's folder."""
    write_random_dataset(folder / "numbers", 10**5)
    out_dir = folder / "run"
    flags = to_flags(
        n_layer=12,
        n_head=12,
        n_embd=768,
        block_size=1024,
        batch_size=1,
        data_dir=folder,
        dataset="numbers",
        device="auto",
        max_iters=STEPS,
        eval_interval=10**6,
        eval_iters=1,
        log_interval=1,
        checkpoint_interval=SAVE_INTERVAL,
        loss_chunk=256,
        out_dir=out_dir,
    )
    run_process([sys.executable, "train.py", *flags])
    return out_dir


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="save") as name:
        out_dir = train(Path(name))
        lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
        size = sum(path.stat().st_size for path in (out_dir / f"checkpoints/{STEPS:06d}").iterdir())
    saves = [line for line in lines if line["event"] == "save"]
    writing_ms, other_ms = [], []
    for line in lines:
        if line["event"] != "train":
            continue
        if line["step"] % SAVE_INTERVAL not in WRITING_STEPS:
            other_ms.append(line["step_ms"])
        elif line["step"] > SAVE_INTERVAL:
            writing_ms.append(line["step_ms"])
    blocked, written = median(line["blocked_ms"] for line in saves), median(line["written_ms"] for line in saves)
    print(
        f"a checkpoint of {size / 1e9:.2f} GB: the loop waits for {blocked:,.0f} ms, "
        f"the thread writes for {written:,.0f} ms"
    )
    print(f"a step takes {median(other_ms):,.0f} ms, one of the first three after a save {median(writing_ms):,.0f} ms")


if __name__ == "__main__":
    main()
