"""Fixtures: the tiny datasets, a pretrained tiny model, and a run in this process."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one test runs on each core

import pytest
import torch
from helpers import TEXT, TINY, TINY_WITHOUT_SHAPE, RunFiles, read_run, write_char_dataset, write_sum_datasets

import train
import train_args

plain_compile = torch.compile


def compile_all(*args: Any, **options: Any) -> Any:
    """torch.compile, which raises an error where it would go on uncompiled after too many graphs."""
    import torch._dynamo.config  # in seconds, which tests that compile nothing need not wait

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return plain_compile(*args, **options)


torch.compile = compile_all


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token bins a and b with one tokenizer, c with another, and upper, aligned with a; examples of sums."""
    folder = tmp_path_factory.mktemp("data")
    write_char_dataset(folder / "a", TEXT * 20)
    write_char_dataset(folder / "b", TEXT[::-1] * 10, sorted(set(TEXT)))
    write_char_dataset(folder / "c", "0123456789 " * 50)
    write_char_dataset(folder / "upper", "".join("U" if char.isalpha() else "." for char in TEXT * 20))
    write_sum_datasets(folder)
    return folder


@pytest.fixture(scope="session")
def base(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has learned a little of the sums: where fine-tuning, adapters and preferences start."""
    out_dir = tmp_path_factory.mktemp("base") / "run"
    flags = [
        *TINY,
        "--objective=sft",
        f"--data_dir={data_dir}",
        "--dataset=sums",
        f"--out_dir={out_dir}",
        "--block_size=32",
        "--max_iters=60",
        "--eval_interval=60",
        "--batch_size=32",
        "--learning_rate=1e-2",
        "--eval_samples=0",
    ]
    train.main(train_args.parse(flags))
    return out_dir / "checkpoints/000060"


@pytest.fixture(scope="session")
def hf_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies the source that comes with a model: one folder for the whole process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def run(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., RunFiles]:
    """run("--flag=...", name="run") trains in this process and returns what the run left."""

    def run(*flags: str, name: str = "run") -> RunFiles:
        defaults: list[str] = []
        if "--init_from=resume" not in flags:
            loads_weights = any(flag.startswith("--init_from=") for flag in flags)
            defaults = [*(TINY_WITHOUT_SHAPE if loads_weights else TINY), f"--data_dir={data_dir}"]
            if not any(flag.startswith(("--dataset=", "--training_mode")) for flag in flags):
                defaults.append("--dataset=a")
        out_dir = tmp_path / name
        progress = train.main(train_args.parse([*defaults, f"--out_dir={out_dir}", *flags]))
        return read_run(out_dir, progress, capsys.readouterr().out)

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test of a real Slurm spends most of its time waiting, so it starts first."""
    items.sort(key=lambda item: "cluster" not in getattr(item, "fixturenames", ()))


def pytest_collection_finish() -> None:
    """Leave what is loaded by now out of every collection of garbage."""
    gc.freeze()
