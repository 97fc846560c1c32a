"""--batch_size=auto: which micro-batch it chooses, and that the run is the one of the numbers that are chosen.

On several ranks test_sharding.py has it.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import TINY, RunFiles, equal_tensors

import micro_batch
import train_args
from nanoforge import device
from nanoforge.distributed import Ranks
from nanoforge.errors import UserError

GLOBAL = ("--gradient_accumulation_steps=6", "--eval_iters=3", "--max_iters=2")  # 24 sequences; of 12 evaluated rows


def on_ranks(world_size: int, rank: int = 0) -> Ranks:
    return Ranks(rank, world_size, torch.device("cpu"))


def parse(*flags: str) -> train_args.TrainArgs:
    return train_args.parse([*TINY, *GLOBAL, *flags])


@pytest.mark.slow
def test_a_run_that_chooses_is_the_run_of_what_it_chose(
    run: Callable[..., RunFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; that of other micro-batches up to the order of sums. A resumed run does not choose again."""
    monkeypatch.setattr(micro_batch, "fastest", lambda trial, sizes: (sizes[-2], ["a trial"]))
    auto = run(*GLOBAL, "--auto_find_batch_size", name="auto")
    names = ("batch_size", "gradient_accumulation_steps", "eval_iters", "auto_find_batch_size")
    assert [auto.config[name] for name in names] == [6, 4, 2, False]
    chosen = run("--batch_size=6", "--gradient_accumulation_steps=4", "--eval_iters=2", "--max_iters=2", name="chosen")
    assert equal_tensors(auto.last.weights, chosen.last.weights) and auto.losses == chosen.losses
    plain = run(*GLOBAL, name="plain")
    assert auto.losses == pytest.approx(plain.losses, rel=1e-5)
    assert [line["val_loss"] for line in auto.evals] == pytest.approx([line["val_loss"] for line in plain.evals])
    monkeypatch.setattr(micro_batch, "decide", None)
    assert run("--init_from=resume", "--max_iters=3", name="auto").config["batch_size"] == 6


def test_auto_is_said_in_every_layer(tmp_path: Path) -> None:
    """The number beneath it is a part of the global batch; a number above it ends it."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"batch_size": 12}))
    for flags in (["--batch_size=auto"], ["--micro_batch_size", "auto"], ["--auto_find_batch_size"]):
        args = train_args.parse([str(path), *flags, "--gradient_accumulation_steps=40"])
        assert (args.auto_find_batch_size, args.batch_size, args.global_batch_size) == (True, 12, 480)
    path.write_text(json.dumps({"batch_size": "auto"}))
    assert train_args.parse([str(path)]).batch_size == 64 and train_args.parse([str(path)]).auto_find_batch_size
    args = train_args.parse([str(path), "--batch_size=8"])
    assert (args.auto_find_batch_size, args.batch_size) == (False, 8)


def test_candidates_divide_the_ranks_rows_and_the_evaluated_ones() -> None:
    assert micro_batch.candidates(parse(), on_ranks(1)) == [1, 2, 3, 4, 6, 12]
    assert micro_batch.candidates(parse("--eval_iters=6"), on_ranks(3, rank=2)) == [1, 2, 4, 8]


def test_the_memory_bounds_it(run: Callable[..., RunFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan may take nine tenths of it; without room for one sequence the run says so, and leaves nothing."""
    chosen = []
    monkeypatch.setattr(
        micro_batch, "fastest", lambda trial, sizes: chosen.append(sizes) or (max(sizes, default=0), [])
    )
    peaks = {size: 1000 * size for size in (1, 2, 3, 4, 6, 12)}
    monkeypatch.setattr(
        micro_batch.builders, "plan_memory", lambda args, model, rows: type("Plan", (), {"peak": peaks[rows]})
    )
    trial = type("Trial", (), {"args": parse(), "raw_model": torch.nn.Linear(1, 1), "ranks": on_ranks(1)})
    assert micro_batch.choose(trial, [*peaks], 4500)[0] == 4 and chosen == [[1, 2, 3, 4]]
    assert micro_batch.choose(trial, [*peaks], float("inf"))[0] == 12
    monkeypatch.undo()
    monkeypatch.setattr(device, "available_memory", lambda device: 1000)
    with pytest.raises(UserError, match="--batch_size=auto"):
        run("--batch_size=auto")


def test_on_a_gpu_a_trial_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """From above: one that runs out of memory, one that leaves too little, then the first that fits."""
    used = {12: None, 6: 950, 4: 880, 3: 500}
    tried: list[int] = []

    def make_steps(trial: object, size: int, rows: int, seconds: float) -> float:
        tried.append(size)
        if used[size] is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    monkeypatch.setattr(micro_batch, "make_steps", make_steps)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: used[tried[-1]] or 0)
    trial = type("Trial", (), {"raw_model": torch.nn.Linear(1, 1), "ranks": on_ranks(1)})
    assert micro_batch.largest_that_fits(trial, [3, 4, 6, 12], 1000) == 4 and tried == [12, 6, 4]


def test_on_a_cpu_the_fastest_of_those_that_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times within 3 % are equal, of which the larger micro-batch is taken; sizes that are close are not all tried."""
    seconds = {24: 1.2, 12: 1.02, 6: 1.0, 4: 1.01, 2: 2.0, 1: 9.0}
    rows_of = {}

    def make_steps(trial: object, size: int, rows: int, least: float) -> float:
        rows_of[size] = rows
        return seconds[size]

    monkeypatch.setattr(micro_batch, "make_steps", make_steps)
    monkeypatch.setattr(device, "measure_matmul_flops", lambda *args: 1e12)
    model = type("Model", (), {"compute_dtype": torch.float32, "flops_per_token": lambda self: 1e9})()
    source = type("Source", (), {"tokens_per_step": 24 * 100, "rows": 24})
    trial = type("Trial", (), {"raw_model": model, "ranks": on_ranks(1), "args": parse()})
    trial.data = type("Data", (), {"source": source})
    assert micro_batch.fastest(trial, [1, 2, 3, 4, 6, 12, 24])[0] == 12
    assert rows_of == {12: 12, 6: 18, 4: 20, 2: 20, 1: 20}  # of 24, which would take 2.4 s, 20 rows are tried
