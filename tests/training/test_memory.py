"""Out of memory, without a compiler, on a folder that can't be written: what to change, before or after the start."""

import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import RunFiles

from nanoforge.errors import UserError
from nanoforge.posttraining.objectives import LanguageModel


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_names_flags_that_are_the_same_run(
    run: Callable[..., RunFiles], monkeypatch: pytest.MonkeyPatch, error: Exception
):
    """The flags of the message: half the micro-batch, the same global batch, the same losses."""
    whole = run("--batch_size=6", "--gradient_accumulation_steps=2", "--eval_iters=3", name="whole")
    original = LanguageModel.__call__

    def fail(self: Any, model: Any, batch: Any, **options: Any):
        if batch.tokens.size(0) > 3:
            raise error
        return original(self, model, batch, **options)

    monkeypatch.setattr(LanguageModel, "__call__", fail)
    with pytest.raises(UserError, match="out of memory") as raised:
        run("--batch_size=6", "--gradient_accumulation_steps=2", "--eval_iters=3", name="large")
    message = str(raised.value)
    assert "--loss_chunk" in message and "--activation_checkpointing" in message
    flags = re.findall(r"--(?:batch_size|gradient_accumulation_steps|eval_iters)=\d+", message)
    assert flags == ["--batch_size=3", "--gradient_accumulation_steps=4", "--eval_iters=6"]
    small = run(*flags, name="small")
    assert small.losses == pytest.approx(whole.losses, rel=1e-5)
    assert small.evals[-1]["val_loss"] == pytest.approx(whole.evals[-1]["val_loss"], rel=1e-4)


def test_peak_memory_is_in_the_metrics_and_in_the_closing_line(run: Callable[..., RunFiles]):
    done = run("--max_iters=2")
    peaks = [line["peak_memory_mb"] for line in done.train]
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert peaks == sorted(peaks) and 0.5 * now < peaks[-1] <= now + 0.1  # rounded to a tenth
    assert re.search(r"finished: .*peak memory [\d,]+ MB", done.console)


def test_compile_without_a_compiler_is_refused_before_anything_is_claimed(run: Callable[..., RunFiles], tmp_path: Path):
    import torch._inductor.config as config

    with config.patch({"cpp.cxx": (None, "/no/such/compiler")}), pytest.raises(UserError, match="--compile"):
        run("--compile")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_that_cant_save_is_refused_before_it_trains(run: Callable[..., RunFiles]):
    done = run("--max_iters=2")
    (done.out_dir / "checkpoints").rename(done.out_dir / "elsewhere")
    (done.out_dir / "checkpoints").write_text("a file")
    with pytest.raises(UserError):
        run("--init_from=resume", "--max_iters=4")
