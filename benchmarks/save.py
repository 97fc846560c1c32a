"""What a save costs the training loop, for a model of GPT-2's 124 M parameters with AdamW (1.5 GB of state):

    python -m benchmarks.save

The loop stands still for the snapshot; the files are written, synced and hashed in a thread meanwhile. Prints one line for the note.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import run_process, to_flags
from nanoforge.data import tokenization


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="save") as name:
        data, out = Path(name) / "numbers", Path(name) / "run"
        data.mkdir()
        for file in ("train.bin", "val.bin"):
            np.random.default_rng(0).integers(0, 50257, 10**5, dtype=np.uint16).tofile(data / file)
        (data / "meta.json").write_text(
            json.dumps(
                {
                    "dtype": "uint16",
                    "vocab_size": 50257,
                    "files": {},
                    "tokenizer": tokenization.to_json(tokenization.NumberTokenizer(50257)),
                }
            )
        )
        shape = {
            "n_layer": 12,
            "n_head": 12,
            "n_embd": 768,
            "block_size": 1024,
            "batch_size": 1,
            "data_dir": name,
            "dataset": "numbers",
            "device": "auto",
        }
        run_process(
            [
                sys.executable,
                "train.py",
                *to_flags(
                    **shape,
                    max_iters=24,
                    eval_interval=10**6,
                    eval_iters=1,
                    log_interval=1,
                    checkpoint_interval=8,
                    loss_chunk=256,
                    out_dir=out,
                ),
            ]
        )
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        saves, steps = (
            [line for line in lines if line["event"] == "save"],
            {line["step"]: line["step_ms"] for line in lines if line["event"] == "train"},
        )
        during = [ms for step, ms in steps.items() if step % 8 in (1, 2, 3) and step > 8]
        plain = [ms for step, ms in steps.items() if step % 8 not in (1, 2, 3)]
        size = sum(path.stat().st_size for path in (out / "checkpoints/000024").iterdir())
        print(
            f"a checkpoint of {size / 1e9:.2f} GB: the loop stands still for {statistics.median(s['blocked_ms'] for s in saves):,.0f} ms, the thread writes for {statistics.median(s['written_ms'] for s in saves):,.0f} ms"
        )
        print(
            f"a step takes {statistics.median(plain):,.0f} ms, one of the first three after a save {statistics.median(during):,.0f} ms"
        )


if __name__ == "__main__":
    main()
