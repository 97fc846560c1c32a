"""Tokenize the "text" of the rows of a JSONL file with GPT-2's BPE, as another program does it.

    python tokenize_text.py ROWS FOLDER                 a loop over tiktoken
    python tokenize_text.py ROWS FOLDER PREPARE_SCRIPT  nanoGPT's data/openwebtext/prepare.py, on these rows

The folder gets train.bin, and from nanoGPT val.bin: uint16.
"""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

N_PARTS = 1024  # total_batches of nanoGPT's script


def run_loop(rows: Path, folder: Path) -> None:
    encoding = tiktoken.get_encoding("gpt2")
    with rows.open(encoding="utf-8") as file, (folder / "train.bin").open("wb") as out:
        for line in file:
            ids = encoding.encode_ordinary(json.loads(line)["text"])
            ids.append(encoding.eot_token)
            np.array(ids, dtype=np.uint16).tofile(out)


def run_nanogpt(rows: Path, folder: Path, script: Path) -> None:
    """The script writes beside itself. What it loads by the name "openwebtext" is another dataset, and its validation
    split has at least a row for each of the parts in which it is written."""
    os.environ["HF_HOME"] = str(folder / "huggingface")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets

    load_dataset, split = datasets.load_dataset, datasets.Dataset.train_test_split

    def split_off(dataset: datasets.Dataset, test_size: float, **options: Any) -> datasets.DatasetDict:
        return split(dataset, max(test_size, min(0.5, N_PARTS / len(dataset))), **options)

    datasets.load_dataset = lambda name, **options: load_dataset("json", data_files=str(rows), **options)
    datasets.Dataset.train_test_split = split_off
    runpy.run_path(shutil.copy(str(script), str(folder)), run_name="__main__")


def main() -> None:
    rows, folder, *script = map(Path, sys.argv[1:])
    if script:
        run_nanogpt(rows, folder, script[0])
    else:
        run_loop(rows, folder)


if __name__ == "__main__":
    main()
