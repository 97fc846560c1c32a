"""Run nanoGPT's train.py, unmodified, with another seed, and keep every checkpoint that it saves.

python race_nanogpt.py SEED train.py [ARGUMENT ...]          in nanoGPT's folder
"""

import os
import runpy
import sys
from typing import Any

import torch

seed, script, *arguments = sys.argv[1:]
manual_seed = torch.manual_seed
save = torch.save


def manual_seed_plus(number: int) -> torch.Generator:
    return manual_seed(number + int(seed))


def save_apart(checkpoint: dict[str, Any], path: str) -> None:
    save(checkpoint, path.replace("ckpt.pt", f"ckpt_{checkpoint['iter_num']:06d}.pt"))


torch.manual_seed = manual_seed_plus  # type: ignore[assignment]
torch.save = save_apart  # type: ignore[assignment]
sys.path[0] = os.getcwd()
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
