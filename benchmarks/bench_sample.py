"""Section sample: tokens a second from the same weights, after a warm-up of the same length.

One sequence inside the block, 500 tokens past it, and a batch of 16 (on a GPU also of 256). nanoGPT's sample.py draws
the sequences of a batch one after the other, so its tokens a second are those of one: it draws one.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import (
    CASES,
    ROOT,
    SCRIPTS,
    Case,
    Figures,
    Measurement,
    Side,
    compare,
    print_table,
    run_process,
    take_turns,
    to_flags,
)
from benchmarks.session import Session


class Workload(NamedTuple):
    """What is sampled."""

    prompt_tokens: int
    new_tokens: int  # of each sequence
    num_samples: int


def workloads_of(block_size: int, *, on_cpu: bool) -> dict[str, Workload]:
    workloads = {
        "inside the block": Workload(8, max(1, block_size - 56), 1),
        "past the block": Workload(block_size, 500, 1),
        "batch of 16": Workload(8, block_size // 2, 16),
    }
    if not on_cpu:
        workloads["batch of 256"] = Workload(8, block_size // 2, 256)
    return workloads


def measure(session: Session) -> Iterator[tuple[str, Figures]]:
    """Every workload, in turn with the peer."""
    default_case = "10.6M" if session.on_cpu else "124M"
    case = CASES[session.args.cases[0] if session.args.cases else default_case]
    weights = make_weights(session, case)
    for name, workload in workloads_of(case["block_size"], on_cpu=session.on_cpu).items():
        print(
            f"sample {name}: prompt {workload.prompt_tokens}, {workload.new_tokens} new tokens, "
            f"{workload.num_samples} sequences",
            flush=True,
        )
        results = take_turns(session.args.pairs, sides_of(session, case, weights, workload))
        figures = compare(results, "tokens_per_second", lower_is_better=False)
        print_table(f"sample {name}, tokens/s", figures)
        yield name, figures


def make_weights(session: Session, case: Case) -> Path:
    """A checkpoint of nanoGPT, which both programs read; without it a run folder of ours."""
    if session.nanogpt is not None:
        steps = 2 * session.log_interval
        run = session.train_nanogpt(case, steps, eval_interval=steps, always_save_checkpoint=True)
        return Path(run["out"]) / "ckpt.pt"
    return Path(session.train_ours(case, "float32", 2 * session.log_interval)["out"])


def sides_of(session: Session, case: Case, weights: Path, workload: Workload) -> dict[str, Side]:
    # nanoGPT's checkpoint doesn't say what its token ids mean: for it, our prompt is a list of ids
    text_prompt = session.folder / "letters.txt"
    token = " a" if "vocab_size" in case else "\n"  # of GPT-2's tokens, or of characters
    text_prompt.write_text(token * workload.prompt_tokens)
    id_prompt = session.folder / "numbers.txt"
    id_prompt.write_text(" ".join(["0"] * workload.prompt_tokens))
    common = to_flags(
        max_new_tokens=workload.new_tokens,
        temperature=0.8,
        top_k=200,
        device=session.device.type,
    )
    if session.nanogpt is not None:
        ours = to_flags(init_from=weights, start=f"FILE:{id_prompt}")
    else:
        ours = to_flags(out_dir=weights, start=f"FILE:{id_prompt if 'vocab_size' in case else text_prompt}")
    ours += ["--no-stream", f"--num_samples={workload.num_samples}"]
    if not session.on_cpu:
        ours.append("--compile")
    sides: dict[str, Side] = {
        "ours": partial(
            time_function,
            folder=ROOT,
            module="nanoforge.models.generation",
            function="run",
            flags=[*common, *ours],
            tokens=workload.new_tokens * workload.num_samples,
        )
    }

    if session.args.peer_kind == "hf":
        if workload.prompt_tokens + workload.new_tokens <= case["block_size"]:  # its learned positions end there
            sides["peer"] = partial(
                session.run_transformers,
                "generate",
                case,
                prompt=workload.prompt_tokens,
                new=workload.new_tokens,
                num_samples=workload.num_samples,
            )
    elif session.nanogpt is not None:
        dtype = "float32" if session.on_cpu else "bfloat16"
        sides["peer"] = partial(
            time_function,
            folder=session.nanogpt,
            module="model",
            function="GPT.generate",
            flags=[*common, *to_flags(start=f"FILE:{text_prompt}", out_dir=weights.parent, dtype=dtype, num_samples=1)],
            tokens=workload.new_tokens,
        )
    return sides


def time_function(*, folder: Path, module: str, function: str, flags: list[str], tokens: int) -> Measurement:
    """Run a folder's sample.py: tokens a second in its function that samples."""
    stopwatch = [sys.executable, str(SCRIPTS / "stopwatch.py"), str(folder), module, function]
    result = run_process([*stopwatch, "sample.py", *flags], cwd=folder)
    seconds = float(result.output.split("stopwatch ")[-1])
    return {"tokens_per_second": tokens / seconds}
