"""Steps of DPO with a LoRA by TRL on a CPU; print the milliseconds of each as a line of JSON.

    python trl_dpo.py MODEL PAIRS.jsonl DTYPE WEIGHTS OPTIONS

DTYPE: float32, or bfloat16 by autocast. WEIGHTS: dtype of the frozen base. OPTIONS is JSON: batch_size, steps, rank.
"""

import json
import sys
import tempfile
import time
from typing import Any

import datasets
import peft
import transformers
import trl


class Stopwatch(transformers.TrainerCallback):
    """The times at which the steps ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    model, pairs, dtype, weights, options_json = sys.argv[1:]
    options = json.loads(options_json)
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=dtype == "bfloat16",
                model_init_kwargs={"dtype": weights},
                per_device_train_batch_size=options["batch_size"],
                max_steps=options["steps"],
                gradient_checkpointing=False,
                max_length=None,
                learning_rate=1e-5,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=datasets.load_dataset("json", data_files=pairs, split="train"),
            peft_config=peft.LoraConfig(r=options["rank"], lora_alpha=2 * options["rank"], target_modules="all-linear"),
            callbacks=[stopwatch],
        )
        trainer.train()
    step_ms = [1e3 * (end - start) for start, end in zip(stopwatch.times, stopwatch.times[1:], strict=False)]
    print("json", json.dumps({"step_ms": step_ms}))


if __name__ == "__main__":
    main()
