"""The start of a run: which folder, whether a restart goes on there, what is checked, what is written first."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import train_args
from nanoforge import console, device, distributed, files, restarts, run_dir, run_state
from nanoforge.console import plural
from nanoforge.data import tokenization
from nanoforge.errors import UserError
from nanoforge.training import checkpoint
from nanoforge.training.logger import RunLogger
from nanoforge.training.trackers import check_import, check_wandb, start_tensorboard, start_trackio, start_wandb
from run import Run
from train_args import TrainArgs

# ---------------------------------------------------------------------------------------------------------------------
# the folder


def find_begun_run(args: TrainArgs, ranks: distributed.Ranks) -> TrainArgs:
    """The arguments, or after a restart those with which the run goes on that this job began. The main rank decides."""
    if args.eval_only or (args.init_from == "resume" and args.checkpoint == "last"):
        return args
    begun, has_checkpoint = "", False
    with ranks.main_first():
        if ranks.is_main:
            folders = sorted(args.task_folder.glob("*")) if args.names_task_alone else [Path(args.out_dir)]
            own = [path for path in folders if restarts.was_begun_here(path, args.asked, overwrite=args.overwrite)]
            begun = str(own[-1]) if own else ""
            if not own and not args.names_task_alone:
                restarts.refuse_edited(Path(args.out_dir), args.asked)
            has_checkpoint = bool(own) and run_state.has_checkpoint(own[-1])
    begun = ranks.broadcast_text(begun)
    if not begun:
        return args
    if ranks.is_main:
        console.print_line(f"{begun}: this job began the run there and goes on with it")
    if ranks.all_reduce_max(has_checkpoint):
        return train_args.parse(["--init_from=resume", f"--out_dir={begun}"])
    return dataclasses.replace(args, out_dir=begun, overwrite=True)


def choose_out_dir(args: TrainArgs, ranks: distributed.Ranks) -> str:
    """--out_dir; with --task_name alone a new folder outputs/TASK/DATE_TIME, the same on all ranks."""
    if not args.names_task_alone:
        return args.out_dir
    folder = ""
    with ranks.main_first():
        if ranks.is_main:
            folder = str(run_dir.create_distinct(args.task_folder / time.strftime("%Y%m%d_%H%M%S")))
    return ranks.broadcast_text(folder)


# ---------------------------------------------------------------------------------------------------------------------
# what would fail


def check_start(args: TrainArgs, lock: run_dir.RunLock) -> None:
    """Raises UserError for what would fail once the folder is taken: a second process, a folder that can't be written,
    trackers that can't start.

    A resumed run goes on without its trackers.
    """
    if not args.begins_run:
        lock.acquire()
        for folder in (Path(args.out_dir), Path(args.out_dir) / "checkpoints"):
            files.check_writable(folder, "--out_dir")
        return
    if args.wandb_log:
        check_wandb()
    if args.trackio_log:
        check_import("trackio", "--trackio_log")
    if args.tensorboard_log:
        check_import("torch.utils.tensorboard", "--tensorboard_log")
    if args.plot_loss:
        console.draw_to_files()
        check_import("matplotlib.figure", "--plot_loss")


@contextlib.contextmanager
def explain_failures(args: TrainArgs, ranks: distributed.Ranks) -> Iterator[None]:
    """Raises UserError, with what to change, where memory, the compiler or an attention kernel fails."""
    try:
        yield
    except Exception as error:
        if device.is_out_of_memory(error):
            raise UserError(memory_advice(args, ranks)) from None
        if device.is_kernel_error(error):
            raise UserError(
                f"--attention_kernel={args.attention_kernel}: can't compute this model's attention; use auto"
            ) from None
        if device.is_compile_error(error):
            raise UserError(compile_advice(args, distributed.first_line(error))) from None
        raise


def compile_advice(args: TrainArgs, reason: str) -> str:
    """What to run without: an eager model compiles only its flex_attention."""
    if args.compile != "false":
        return f"--compile: failed ({reason}); run with --no-compile"
    return f"--attention_kernel=auto: flex_attention failed ({reason}); use --attention_kernel=efficient, which masks"


def memory_advice(args: TrainArgs, ranks: distributed.Ranks) -> str:
    """What makes a step need less memory, in this run's own numbers."""
    rank_slice = distributed.rank_slice(args.global_batch_size, args.batch_size, ranks, group_size=args.group_size)
    rows = rank_slice.micro_batch_size
    smaller = max((n for n in range(1, rows) if rows % n == 0), default=0)
    advice = []
    if smaller:
        flags = f"--batch_size={smaller} --gradient_accumulation_steps={args.global_batch_size // smaller}"
        eval_iters = args.eval_iters * args.batch_size // smaller
        advice.append(f"{flags} --eval_iters={eval_iters} is the same run in smaller micro-batches")
    if not args.loss_chunk and args.vocabulary == "one":
        advice.append("--loss_chunk=1024 never holds all logits")
    if not args.activation_checkpointing:
        advice.append("--activation_checkpointing recomputes layers instead of keeping their activations")
    if args.dtype == "float32" and ranks.device.type == "cuda":
        advice.append("--dtype=bfloat16 halves activations")
    if ranks.world_size > 1 and args.parallel == "ddp":
        advice.append("--parallel=fsdp shards weights and optimizer state")
    advice.append(f"or a smaller --block_size than {args.block_size}, or a smaller model")
    micro_batch = f"micro-batches of {plural(rows, 'sequence')} of {args.block_size} tokens"
    return f"out of memory on {ranks.device} with {micro_batch}: {'; '.join(advice)}"


# ---------------------------------------------------------------------------------------------------------------------
# what is written first


def begin(run: Run, lock: run_dir.RunLock) -> None:
    """Prepare the run's folder, and write what the run is: tokenizers, arguments, data, base, versions, git commit."""
    args, checkpoints, progress = run.args, run.checkpoints.folder, run.progress
    if args.begins_run:
        run_dir.prepare_out_dir(run.out_dir, lock, overwrite=args.overwrite)
        if args.named_checkpoint:
            checkpoint.branch(args.named_checkpoint, run.out_dir, progress.best_step)
    else:
        if args.overwrite:
            checkpoint.delete_later(checkpoints, progress.step)
        checkpoint.set_aside_damaged(checkpoints, progress.step)
        run_dir.forget_trackers(run.out_dir, run.record)
        if args.named_checkpoint:
            run.checkpoints.resumed_step = progress.step
    tokenization.save(run.out_dir / "tokenizer.json", run.tokenizers)
    about = run_dir.describe_software(Path(__file__).parent, {"torch": torch.__version__, "numpy": np.__version__})
    dataclasses.replace(run.record, about=about).save(run.out_dir)
    if run.record.base:
        mark_base(run)
    if progress.best_step >= 0:  # the best checkpoint may have been damaged and skipped
        run_dir.write_best(run.out_dir, step=progress.best_step, val_loss=progress.best_val_loss)
    else:
        (run.out_dir / run_dir.BEST_FILE).unlink(missing_ok=True)


def mark_base(run: Run) -> None:
    """Have the run of the base keep it, if it is a checkpoint."""
    source = Path(run.record.base["source"])
    try:
        run_dir.mark_needed(source, run.out_dir)
    except OSError as error:
        console.print_line(
            f"{source}: can't be marked as the base of {run.out_dir} ({error.strerror}); keep it, or copy it elsewhere"
        )


def open_logger(run: Run) -> RunLogger:
    """Start to log the run, at its current step."""
    args, progress = run.args, run.progress
    logger = RunLogger(
        run.out_dir,
        silent=not run.ranks.is_main,
        start_step=progress.step,
        evaluated=progress.evaluated_at == progress.step,
        seconds=progress.seconds or (time.perf_counter() - run.began if run.began else 0.0),
        total_steps=run.total_steps,
    )
    if args.wandb_log:
        name = args.wandb_run_name or run.out_dir.name
        logger.track("wandb", lambda: start_wandb(run.out_dir, args.wandb_project, name, dataclasses.asdict(args)))
    if args.trackio_log:
        config = dataclasses.asdict(args)
        logger.track("trackio", lambda: start_trackio(run.out_dir, args.trackio_project, args.trackio_run_name, config))
    if args.tensorboard_log:
        logger.track("tensorboard", lambda: start_tensorboard(run.out_dir / "tensorboard", progress.step))
    return logger
