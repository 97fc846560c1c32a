"""FSDP2: the same run on any number of ranks, sharded or not, also when resumed on another; shards become one file."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import TINY, RunFiles, equal_tensors, metric, run_on_ranks, run_script
from safetensors.torch import load_file

import train_args
from nanoforge.models import pretrained
from nanoforge.training import checkpoint

BASE = [
    "--dataset=a",
    "--batch_size=12",
    "--max_iters=4",
    "--eval_interval=4",
    "--log_data_hash",
    "--dropout=0",
]
FSDP = "--parallel=fsdp"
LAYOUTS = {"1": (1, []), "2 DDP": (2, []), "2 FSDP": (2, [FSDP]), "3 FSDP": (3, [FSDP])}  # name -> (ranks, flags)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def train(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFiles]:
    """train(ranks, "--flag", name="run") starts or resumes a run on a number of ranks, in forked processes."""
    folder = tmp_path_factory.mktemp("sharding")

    def train(ranks: int, *flags: str, name: str) -> RunFiles:
        out_dir = folder / name
        if checkpoint.list_steps(out_dir / "checkpoints"):
            return run_on_ranks(out_dir, ranks, "--init_from=resume", *flags)
        return run_on_ranks(out_dir, ranks, *TINY, *BASE, f"--data_dir={data_dir}", *flags)

    return train


def shapes(run: RunFiles) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in run.last.weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [*train_args.OPTIMIZERS, "package_optimizers:ScheduleFreeSGD"])
def test_sharded_training_is_the_plain_run_with_every_optimizer(train, optimizer):
    """Losses of six steps within 1e-5 of one process's. Neither 12 nor 31 rows always divide by three ranks."""
    flags = [f"--optimizer={optimizer}", "--max_iters=6", "--n_embd=12", "--weight_decay=0.1", "--grad_clip=0.5"]
    one = train(1, *flags, name=f"{optimizer}-1")
    sharded = train(3, *flags, FSDP, name=f"{optimizer}-3")
    assert sharded.losses == pytest.approx(one.losses, rel=1e-5)
    assert metric(sharded, "grad_norm") == pytest.approx(metric(one, "grad_norm"), rel=1e-4)
    assert shapes(sharded) == shapes(one)


VARIANTS = [
    ["--gradient_accumulation_steps=3", "--batch_size=4"],
    [
        "--no-tie_weights",
        "--value_residual",
        "--residual_scalars",
        "--embedding_norm",
        "--qk_norm",
        "--norm=rmsnorm",
        "--position=rope",
        "--bias",
    ],
    ["--no-fsdp_reshard", "--loss_chunk=16", "--ema_decay=0.9", "--eval_interval=2", "--learning_rate=0.1"],
    ["--fsdp_offload"],
    ["--activation_checkpointing"],
    ["--dtype=bfloat16"],
    ["--batch_size=2", "--auto_find_batch_size"],
]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda flags: flags[0])
def test_sharded_variants_are_the_plain_run(train, variant):
    tolerance = 1e-2 if "--dtype=bfloat16" in variant else 1e-5
    plain_flags = [flag for flag in variant if "fsdp" not in flag]
    one = train(1, *plain_flags, name=f"one{variant[0]}")
    sharded = train(2, FSDP, *variant, name=f"two{variant[0]}")
    assert sharded.losses == pytest.approx(one.losses, rel=tolerance)
    val_losses = [line["val_loss"] for line in one.evals]
    assert [line["val_loss"] for line in sharded.evals] == pytest.approx(val_losses, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_a_checkpoint_of_any_number_of_ranks_resumes_on_any_other(train, first, second):
    """Same data, losses within 1e-5, exact counters: as if it had neither stopped nor moved."""
    whole = train(1, "--max_iters=8", name="whole")
    ranks, flags = LAYOUTS[first]
    auto = ["--auto_find_batch_size"] if first == second else []  # all ranks choose the same micro-batch
    train(ranks, *flags, *auto, name=f"{first} to {second}")
    ranks, flags = LAYOUTS[second]
    if ranks > 1 and not flags:
        flags = ["--parallel=ddp"]  # the first part may have been sharded
    moved = train(ranks, "--max_iters=8", *flags, name=f"{first} to {second}")
    assert metric(moved, "step") == list(range(1, 9))
    assert metric(moved, "data_hash") == metric(whole, "data_hash")
    assert moved.losses == pytest.approx(whole.losses, rel=1e-5)
    for counter in ("step", "tokens"):
        assert moved.last.progress[counter] == whole.last.progress[counter]


@pytest.mark.slow
def test_shards_become_one_file_that_samples_and_is_verified(train):
    run = train(2, FSDP, name="shards")
    folder = run.out_dir / "checkpoints/000004"
    shard_files = list((folder / "model").iterdir())
    assert len(shard_files) == 2
    assert not (folder / "model.safetensors").exists()
    weights = dict(run.last.weights)
    assert "head.weight" not in weights, "tied weights are stored once"
    run_script(f"--out_dir={run.out_dir}", "--max_new_tokens=5", script="sample.py")

    output = run_script("consolidate", folder, script="export.py").stdout
    assert "compared with the shards" in output
    assert checkpoint.verify(folder) is None
    assert equal_tensors(load_file(folder / "model.safetensors"), weights)

    resumed = train(2, FSDP, "--init_from=resume", name="shards")
    assert resumed.steps[-1] == 4 and (folder / "model.safetensors").exists(), "resuming writes no checkpoint again"

    to = run.out_dir.with_name("consolidated")
    manifest = (folder / "manifest.json").read_bytes()
    run_script("consolidate", folder, f"--to={to}", script="export.py")
    assert (folder / "manifest.json").read_bytes() == manifest
    assert equal_tensors(pretrained.load(str(to)).weights, weights)

    run_script("consolidate", folder, "--dtype=bfloat16", script="export.py")
    bfloat16_weights = {name: weight.bfloat16() for name, weight in weights.items()}
    assert equal_tensors(load_file(folder / "model.safetensors"), bfloat16_weights)

    shard_files[0].write_bytes(b"nothing")
    refused = run_script("consolidate", folder, script="export.py", check=False)
    assert refused.returncode == 2 and "instead of" in refused.stderr


@pytest.mark.slow
def test_a_plain_checkpoint_needs_no_consolidating(train):
    run = train(1, name="plain")
    folder = run.out_dir / "checkpoints/000004"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "nothing to consolidate" in run_script("consolidate", folder, script="export.py").stdout
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert run_script(script="export.py", check=False).returncode == 2
