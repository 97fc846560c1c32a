"""--batch_size=auto: the micro-batch that suits this device; the global batch, and so the run, stays what it is.

On a GPU it is the largest that fits: by the plan of a step's memory, then by a trial. On a CPU, which larger batches
don't always make faster, it is the one that a trial finds fastest among those that fit. Micro-batches divide the global
batch, and the rows that are evaluated. The decision is made once: the run's record has its numbers.
"""

import dataclasses
import gc
import math
import time

import torch

import builders
from nanoforge import device, distributed, launcher
from nanoforge.errors import UserError
from nanoforge.posttraining.objective_specs import OBJECTIVES
from nanoforge.run_dir import RunRecord
from pilot import Trial, agreed_seconds
from train_args import TrainArgs

PLANNED_SHARE = 0.9  # of the available memory that a plan may take, or a trial at its peak
TRIED_SHARE = 1.25  # of the available memory: a plan is no more exact, so a trial decides
MAX_TRIAL_SECONDS = 2.0  # of a step that is timed on a CPU
MIN_TRIAL_SECONDS = 0.2  # for which a micro-batch is timed
MIN_RATIO = 1.5  # between two micro-batches that are timed
TOLERANCE = 0.03  # of two times that count as equal: the larger micro-batch has fewer of them


def decide(args: TrainArgs, ranks: distributed.Ranks, record: RunRecord | None = None) -> tuple[TrainArgs, str]:
    """The arguments with the micro-batch, and why: a collective. record: of a resumed run. Raises UserError."""
    available = available_memory(ranks)
    size, reason = choose(Trial(args, ranks, record), candidates(args, ranks), available)
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(ranks.device)
    if not size:
        raise UserError(
            f"--batch_size=auto: not even a sequence of {args.block_size} tokens fits into "
            f"{available / 2**20:,.0f} MB; use a smaller --block_size, or --activation_checkpointing"
        )
    return with_micro_batch(args, size, reason)


def available_memory(ranks: distributed.Ranks) -> float:
    """Bytes that tensors can take on each rank's device: the least of all ranks, infinite where it is not known."""
    available = device.available_memory(ranks.device)
    if available is None:
        return math.inf
    if ranks.device.type == "cpu":
        available //= launcher.local_world_size()  # the ranks here share it
    return -ranks.all_reduce_max(-available)


def choose(trial: Trial, sizes: list[int], available: float) -> tuple[int, str]:
    """One of these micro-batches, and why; 0 where none fits: a collective."""
    args, model, ranks = trial.args, trial.raw_model, trial.ranks
    peaks = {size: ranks.all_reduce_max(builders.plan_memory(args, model, size).peak) for size in sizes}
    fitting = [size for size in sizes if peaks[size] <= PLANNED_SHARE * available]
    is_online = OBJECTIVES[args.objective].is_online  # a trial would sample
    if is_online or distributed.is_sharded(model):  # or hang where one rank of many has no memory
        return max(fitting, default=0), "the largest that fits, by the plan of its memory"
    trial.model = model  # without DDP, so that a rank may fail alone
    if ranks.device.type == "cuda":
        is_exact = args.data_format == "bins"  # other batches may be longer than the one that is tried
        tried = [size for size in sizes if is_exact and peaks[size] <= TRIED_SHARE * available]
        return largest_that_fits(trial, tried or fitting, available), "the largest that fits, by a trial"
    size, speeds = fastest(trial, fitting)
    return size, f"the fastest of {', '.join(speeds)}"


def with_micro_batch(args: TrainArgs, size: int, reason: str) -> tuple[TrainArgs, str]:
    """The arguments of the same run in micro-batches of this size."""
    chosen = dataclasses.replace(
        args,
        batch_size=size,
        gradient_accumulation_steps=args.global_batch_size // size,
        eval_iters=args.eval_iters * args.batch_size // size,
        auto_find_batch_size=False,
    )
    names = ("batch_size", "gradient_accumulation_steps", "eval_iters")
    flags = " ".join(f"--{name}={getattr(chosen, name)}" for name in names)
    return chosen, f"--batch_size=auto gives {flags}: {reason}"


def candidates(args: TrainArgs, ranks: distributed.Ranks) -> list[int]:
    """The micro-batches that divide a rank's rows and the rows that are evaluated, ascending."""
    rows = distributed.rank_slice(args.global_batch_size, args.batch_size, ranks, group_size=args.group_size)
    common = math.gcd(rows.stop - rows.start, args.eval_iters * args.batch_size)
    return [size for size in range(1, common + 1) if common % size == 0]


# ---------------------------------------------------------------------------------------------------------------------
# trials


def make_steps(trial: Trial, size: int, rows: int, seconds: float) -> float:
    """Seconds a row of steps of so many rows in micro-batches of a size, on this rank alone; a first step warms up."""
    start = distributed.rank_slice(
        trial.args.global_batch_size, trial.args.batch_size, trial.ranks, group_size=trial.args.group_size
    ).start
    trial.read(distributed.RankSlice(start, start + rows, size))
    try:
        trial.run(range(1))
        n_steps, began = 0, time.perf_counter()
        while n_steps == 0 or time.perf_counter() - began < seconds:
            n_steps += 1
            trial.run(range(n_steps, n_steps + 1))
        return (time.perf_counter() - began) / (n_steps * rows)
    finally:
        trial.steps.close()


def largest_that_fits(trial: Trial, sizes: list[int], available: float) -> int:
    """The largest micro-batch of which two steps leave a tenth of the GPU's memory; 0 where none does: a collective."""
    for size in reversed(sizes):
        torch.cuda.reset_peak_memory_stats(trial.ranks.device)
        fails = False
        try:
            make_steps(trial, size, size, seconds=0)
        except Exception as error:
            if not device.is_out_of_memory(error):
                raise
            fails = True
        peak = torch.cuda.max_memory_allocated(trial.ranks.device)
        trial.raw_model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if not trial.ranks.all_reduce_max(fails or peak > PLANNED_SHARE * available):
            return size
    return 0


def fastest(trial: Trial, sizes: list[int]) -> tuple[int, list[str]]:
    """The micro-batch that takes the least time a row, and what was measured: a collective. 0 where there is none."""
    args, source, model = trial.args, trial.data.source, trial.raw_model
    if not sizes:
        return 0, []
    flops = device.measure_matmul_flops(trial.ranks.device, model.compute_dtype)
    row_seconds = source.tokens_per_step / source.rows * model.flops_per_token() / flops
    most = max(sizes[0], int(MAX_TRIAL_SECONDS / row_seconds))
    most = -trial.ranks.all_reduce_max(-most)
    tried: list[int] = []
    for size in reversed([size for size in sizes if size <= most]):
        if not tried or tried[-1] >= MIN_RATIO * size:
            tried.append(size)
    rows_a_rank = args.global_batch_size // trial.ranks.world_size
    seconds = {}
    for size in tried:  # all of them on as many rows, as far as these are whole micro-batches
        rows = max(size, min(rows_a_rank, most) // size * size)
        seconds[size] = agreed_seconds(make_steps(trial, size, rows, MIN_TRIAL_SECONDS), trial.ranks)
    least = min(seconds.values())
    chosen = max(size for size in tried if seconds[size] <= (1 + TOLERANCE) * least)
    return chosen, [f"{size} ({seconds[size] * 1e3:.3g} ms a row)" for size in sorted(tried)]
