"""FSDP2: the same run on any number of ranks, sharded or not, also when it is resumed on another number; shards become one file."""

import pytest
from helpers import TINY, equal_tensors, run_on_ranks, run_script

import train_args
from nanoforge.training import checkpoint

BASE = ["--dataset=a", "--batch_size=12", "--max_iters=4", "--eval_interval=4", "--log_data_hash", "--dropout=0"]
WAYS = {"1": (1, []), "2 DDP": (2, []), "2 FSDP": (2, ["--parallel=fsdp"]), "3 FSDP": (3, ["--parallel=fsdp"])}


@pytest.fixture(scope="module")
def train(data_dir, tmp_path_factory):
    """train(ranks, "--flag", name="run"): a run on so many ranks, in forked processes, or more of it; its files."""
    folder = tmp_path_factory.mktemp("sharding")

    def train(ranks: int, *flags: str, name: str):
        out_dir = folder / name
        given = (
            ["--init_from=resume"]
            if checkpoint.list_steps(out_dir / "checkpoints")
            else [*TINY, *BASE, f"--data_dir={data_dir}"]
        )
        return run_on_ranks(out_dir, ranks, *given, *flags)

    return train


@pytest.mark.parametrize("optimizer", train_args.OPTIMIZERS)
def test_sharded_training_is_the_plain_run_with_every_optimizer(train, optimizer):
    """Losses within 1e-5 of one process's, at 6 steps."""
    flags = [
        f"--optimizer={optimizer}",
        "--max_iters=6",
        "--n_embd=12",
        "--weight_decay=0.1",
        "--grad_clip=0.5",
    ]  # 12 and 31 rows: not all divide by 3
    one = train(1, *flags, name=f"{optimizer}-1")
    sharded = train(3, *flags, "--parallel=fsdp", name=f"{optimizer}-3")
    assert sharded.losses == pytest.approx(one.losses, rel=1e-5)
    assert [line["grad_norm"] for line in sharded.train] == pytest.approx(
        [line["grad_norm"] for line in one.train], rel=1e-4
    )
    assert {name: tuple(tensor.shape) for name, tensor in sharded.last.weights.items()} == {
        name: tuple(tensor.shape) for name, tensor in one.last.weights.items()
    }


@pytest.mark.parametrize("variant", [
    ["--gradient_accumulation_steps=3", "--batch_size=4"],
    ["--no-tie_weights", "--value_residual", "--residual_scalars", "--embedding_norm", "--qk_norm", "--norm=rmsnorm", "--position=rope", "--bias"],
    ["--no-fsdp_reshard", "--loss_chunk=16"], ["--fsdp_offload"], ["--activation_checkpointing"], ["--dtype=bfloat16"], ["--batch_size=2"],
], ids=lambda flags: flags[0])  # fmt: skip
def test_sharded_variants_are_the_plain_run(train, variant):
    name, tolerance = variant[0], 1e-2 if "--dtype=bfloat16" in variant else 1e-5
    one = train(1, *[flag for flag in variant if "fsdp" not in flag], name=f"one{name}")
    sharded = train(2, "--parallel=fsdp", *variant, name=f"two{name}")
    assert sharded.losses == pytest.approx(one.losses, rel=tolerance)
    assert [line["val_loss"] for line in sharded.evals] == pytest.approx(
        [line["val_loss"] for line in one.evals], rel=tolerance
    )


@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("second", WAYS)
def test_a_checkpoint_of_any_number_of_ranks_resumes_on_any_other(train, first, second):
    """Same data, losses within 1e-5, exact counters: as if it had never stopped, nor moved."""
    whole = train(1, "--max_iters=8", name="whole")
    ranks, flags = WAYS[first]
    train(ranks, *flags, name=f"{first} to {second}")
    ranks, flags = WAYS[second]
    moved = train(
        ranks, "--max_iters=8", *(flags or (["--parallel=ddp"] if ranks > 1 else [])), name=f"{first} to {second}"
    )
    assert [line["step"] for line in moved.train] == list(range(1, 9))
    assert [line["data_hash"] for line in moved.train] == [line["data_hash"] for line in whole.train]
    assert moved.losses == pytest.approx(whole.losses, rel=1e-5)
    assert [moved.last.progress[key] for key in ("step", "tokens")] == [
        whole.last.progress[key] for key in ("step", "tokens")
    ]


def test_shards_become_one_file_that_samples_and_is_verified(train, tmp_path):
    run = train(2, "--parallel=fsdp", name="shards")
    folder = run.out_dir / "checkpoints/000004"
    assert (
        (folder / "model").is_dir()
        and not (folder / "model.safetensors").exists()
        and len(list((folder / "model").iterdir())) == 2
    )
    shards = dict(run.last.weights.items())
    assert "head.weight" not in shards, "tied weights once"
    run_script(f"--out_dir={run.out_dir}", "--max_new_tokens=5", script="sample.py")
    told = run_script("consolidate", folder, script="export.py").stdout
    assert "compared with the shards" in told and checkpoint.verify(folder) is None
    from safetensors.torch import load_file

    assert equal_tensors(load_file(folder / "model.safetensors"), shards)
    run_script("consolidate", folder, "--dtype=bfloat16", script="export.py")
    assert equal_tensors(
        load_file(folder / "model.safetensors"), {name: tensor.bfloat16() for name, tensor in shards.items()}
    )
    (next((folder / "model").iterdir())).write_bytes(b"nothing")
    refused = run_script("consolidate", folder, script="export.py", check=False)
    assert refused.returncode == 2 and "instead of" in refused.stderr


def test_a_plain_checkpoint_needs_no_consolidating(train):
    run = train(1, name="plain")
    refused = run_script("consolidate", run.out_dir / "checkpoints/000004", script="export.py", check=False)
    assert refused.returncode == 2 and "nothing to consolidate" in refused.stderr
    assert run_script(script="export.py", check=False).returncode == 2
