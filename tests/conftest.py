"""Fixtures: the tiny datasets, a pretrained tiny model, and a run in this process."""

import os
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a test runs on each core: their threads would be in each other's way

import pytest
from helpers import TEXT, TINY, read_run, write_char_dataset, write_sum_datasets

import train
import train_args


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Datasets a and b with one tokenizer, c with another, and upper, aligned with a; those of `write_sum_datasets` hold examples."""
    folder = tmp_path_factory.mktemp("data")
    write_char_dataset(folder / "a", TEXT * 20)
    write_char_dataset(folder / "b", TEXT[::-1] * 10, sorted(set(TEXT)))
    write_char_dataset(folder / "c", "0123456789 " * 50)
    write_char_dataset(folder / "upper", "".join("U" if char.isalpha() else "." for char in TEXT * 20))
    write_sum_datasets(folder)
    return folder


@pytest.fixture(scope="session")
def base(data_dir, tmp_path_factory) -> Path:
    """A checkpoint that can a little of the sums: what fine-tuning, adapters and preferences begin with."""
    out_dir = tmp_path_factory.mktemp("base") / "run"
    train.main(train_args.parse([*TINY, "--objective=sft", f"--data_dir={data_dir}", "--dataset=sums", f"--out_dir={out_dir}", "--block_size=32", "--max_iters=60",
                                 "--eval_interval=60", "--batch_size=32", "--learning_rate=1e-2", "--eval_samples=0"]))  # fmt: skip
    return out_dir / "checkpoints/000060"


@pytest.fixture
def run(data_dir, tmp_path, capsys):
    """Train in this process: run("--flag=...", name="run") gives the run's folder, progress, metrics, weights and console."""

    def run(*flags: str, name: str = "run") -> SimpleNamespace:
        out_dir = tmp_path / name
        loads = any(flag.startswith("--init_from=") for flag in flags)
        given = [
            f"--data_dir={data_dir}",
            *([] if any(flag.startswith(("--dataset=", "--training_mode")) for flag in flags) else ["--dataset=a"]),
        ]
        tiny = [flag for flag in TINY if not (loads and flag.startswith(("--n_layer", "--n_head", "--n_embd")))]
        args = train_args.parse(
            [*([] if "--init_from=resume" in flags else [*tiny, *given]), f"--out_dir={out_dir}", *flags]
        )
        progress = train.main(args)
        return read_run(out_dir, progress, capsys.readouterr().out)

    return run


def pytest_collection_modifyitems(items) -> None:
    """The test of a real Slurm waits most of its time: it begins first."""
    items.sort(key=lambda item: "cluster" not in item.fixturenames)
