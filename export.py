"""Turn what a run saved into files for elsewhere:

    python export.py consolidate out/run/checkpoints/000040 [--dtype=bfloat16]

consolidate: the shards of an FSDP run to one model.safetensors beside them, in one process on the CPU; what was written is read again
and compared with the shards. The optimizer's state is not read.
"""

import sys

import configurator
from configurator import Row

ACTIONS = ("consolidate",)
TABLE = {"what": [Row("dtype", "float32", "of the weights that are written", choices=("float32", "bfloat16", "float16"))]}

if __name__ == "__main__":
    asked = sys.argv[1:3] if len(sys.argv) > 2 and not sys.argv[2].startswith("-") else []
    if sys.argv[1:] != ["--help"] and (not asked or asked[0] not in ACTIONS):
        configurator.tell([f"say what to do and with which folder: python export.py consolidate out/run/checkpoints/000040 (there is: {', '.join(ACTIONS)})"])
    ARGUMENTS = configurator.parse(TABLE, sys.argv[3:] if asked else sys.argv[1:], __doc__)

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from parts import checkpoint
from parts.mistakes import Mistake


def consolidate(folder: Path, dtype: torch.dtype) -> Path:
    """Write folder/model.safetensors from folder/model/, verified; the manifest then lists it too. Raises Mistake."""
    if (folder / "checkpoints").is_dir():
        folder = checkpoint.chosen(folder, "last")
    if wrong := checkpoint.damage(folder):
        raise Mistake(wrong)
    if not (folder / "model").is_dir():
        raise Mistake(f"{folder}: nothing to consolidate; its model.safetensors is whole")
    shards = checkpoint.tensors(folder, "model")
    target, beside = folder / "model.safetensors", folder / f"model.safetensors{checkpoint.LEFTOVER}"
    save_file({name: tensor.to(dtype) for name, tensor in shards.items()}, beside)
    with safe_open(beside, framework="pt") as file:
        if set(file.keys()) != set(shards) or not all(torch.equal(file.get_tensor(name), shards[name].to(dtype)) for name in shards):
            raise SystemExit(f"{beside}: what was written differs from the shards")
    os.replace(beside, target)
    checkpoint.write_manifest(folder)
    return target


def main(given) -> None:
    folder, a = given
    path = consolidate(folder, getattr(torch, a.dtype))
    print(f"{path}: {path.stat().st_size / 2**20:,.1f} MB, compared with the shards")


if __name__ == "__main__":
    configurator.run(main, (Path(asked[1]), ARGUMENTS))
