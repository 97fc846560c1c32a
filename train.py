"""Train a GPT: build, resume, loop, save.

    python train.py configs/quickstart.py                       one process
    python train.py --dataset=shakespeare_char --out_dir=out/a
    python train.py --init_from=resume --out_dir=out/a          continue
    torchrun --standalone --nproc_per_node=8 train.py ...       the same run on eight GPUs

A run is a source (which batches) x an objective (which loss) x an adapter (which parameters learn). These and the model
are chosen in builders.py, before the loop, so the loop asks for no mode. The arguments are in train_args.py, the model
is in model.py, what the loop needs in run.py, the start of a run in start.py, the rest in the package nanoforge.
"""

import gc

import configurator
import train_args

if __name__ == "__main__":  # errors and --help come before the seconds that importing torch takes
    configurator.exit_on_interrupt()
    ARGS = train_args.parse()
    if ARGS.doctor:  # it works where torch does not
        import doctor

        configurator.run(doctor.main, ARGS, output_is_required=True)
        raise SystemExit(0)
    gc.disable()  # the collector takes a sixth of these seconds; the first logged step enables it

import contextlib
import dataclasses
import math
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from finish import print_closing
from nanoforge import console, device, distributed, run_dir
from nanoforge.errors import DivergedError
from nanoforge.posttraining import rollouts
from nanoforge.posttraining.rewards import RewardError
from nanoforge.training import checkpoint, compilation, evaluation
from nanoforge.training.checkpoint import Progress
from nanoforge.training.logger import RunLogger, StepLogger, draw_loss
from nanoforge.training.signals import Signals
from run import Run, build, resume
from start import begin, check_start, choose_out_dir, explain_failures, find_begun_run, open_logger
from train_args import TrainArgs

ADVICE = "a lower --learning_rate, a longer --warmup_iters or --grad_clip may help"


# ---------------------------------------------------------------------------------------------------------------------
# the loop


def train(run: Run, logger: RunLogger, signals: Signals) -> bool:
    """Train until the run is finished; False where too many steps in a row were skipped. Raises SystemExit after a
    signal."""
    args, progress, ranks = run.args, run.progress, run.ranks
    source, objective, optimizer = run.data.source, run.data.objective, run.state.optimizer
    run.ddp_model.train()
    train_step = run.train_step()
    steps = source.stream(progress.step, run.rank_slice, ranks.device, hashed=args.log_data_hash)
    step_logger = run.step_logger(logger)
    while True:
        # 1. Evaluate, save, stop; never between two steps on the same rollout.
        run.checkpoints.log_finished_save(logger, progress.step, wait=False)
        if progress.step % source.steps_per_rollout == 0 and evaluate_save_stop(run, logger, step_logger, signals):
            return True

        # 2. Forward, backward, update.
        scale = run.lr_scale(progress.step)
        optimizer.set_lr_scale(scale)
        optimizer.set_step(progress.step)
        run.seed_step(progress.step)
        step = next(steps)
        if step.note:
            logger.note(progress.step, step.note)
        should_log = step_logger.is_due(progress.step + 1)
        result = train_step(objective.prepare(run.raw_model, step.batches), with_metrics=should_log)
        progress.step += 1
        progress.tokens += step.tokens
        logger.advance()

        # 3. Log.
        if should_log:
            max_consecutive_skips = step_logger.log_step(
                step=progress.step,
                tokens=progress.tokens,
                metrics={**step.metrics, **result.metrics},
                lr=args.learning_rate * scale,
                grad_norm=result.grad_norm,
                data_hash=step.data_hash,
            )
            if max_consecutive_skips >= args.skip_patience:
                steps.close()
                return False


def evaluate_save_stop(run: Run, logger: RunLogger, step_logger: StepLogger, signals: Signals) -> bool:
    """Evaluate and save when they are due, and return whether the run is finished. All ranks decide alike.

    Raises SystemExit when a rank has received a signal, once the run is saved.
    """
    args, progress, ranks, clock = run.args, run.progress, run.ranks, partial(run.clock, logger)
    run.pace.plan(progress.step, clock)
    out_of_time = args.max_seconds > 0 and bool(ranks.all_reduce_max(logger.seconds >= args.max_seconds))
    finished = run.finished(out_of_time=out_of_time)
    eval_is_due = progress.evaluated_at < progress.step and (finished or progress.step % args.eval_interval == 0)
    if eval_is_due and not ranks.all_reduce_max(signals.number):
        with run.pace.pausing(clock):
            evaluate_and_save(run, logger, signals, is_last=bool(finished))
        finished = run.finished(out_of_time=out_of_time)  # early stopping may end the run
        eval_is_due = progress.evaluated_at < progress.step  # a signal may have ended the evaluation
        step_logger.restart(progress.step, progress.tokens)
    if run.save_is_due and progress.step not in (0, run.checkpoints.last_step):
        with run.pace.pausing(clock):
            run.save(logger)
        step_logger.restart(progress.step, progress.tokens)
    if finished and not eval_is_due:
        run.checkpoints.finish(logger, progress.step)
        duration = console.format_duration(logger.seconds)
        results = describe_peak_memory(ranks) + run.describe_predicted()
        logger.note(progress.step, f"finished: {finished} in {duration}{results}")
        print_closing(run, logger, "finished", finished)
        return True
    signal_number = ranks.all_reduce_max(signals.number)
    if signal_number:
        run.save(logger)
        run.checkpoints.finish(logger, progress.step)
        name = signal.Signals(signal_number).name
        logger.note(progress.step, f"stopped by {name}; continue with --init_from=resume --out_dir={args.out_dir}")
        print_closing(run, logger, "stopped", name)
        raise SystemExit(128 + signal_number)
    return False


def evaluate_and_save(run: Run, logger: RunLogger, signals: Signals, *, is_last: bool) -> None:
    """Evaluate, log the metrics, and save as the arguments say; a run's initial weights are not saved.

    A signal ends the evaluation at once. Raises DivergedError when the loss is not finite.
    """
    args, progress = run.args, run.progress

    # 1. Evaluate.
    with run.state.optimizer.evaluation_weights():
        results = evaluation.evaluate(run.raw_model, run.data.eval_datasets, run.ranks, signals)
        if results is None:
            return
        samples = sample_completions(run)
    metrics = evaluation.summarize(results, run.data.eval_weights)
    val_loss = metrics["val_loss"]
    if not math.isfinite(val_loss):
        raise DivergedError(f"val_loss is {val_loss} at step {progress.step}: stopped, nothing was saved. {ADVICE}")
    progress.evaluated_at = progress.step
    is_best = val_loss < progress.best_val_loss

    # 2. Log.
    message = f"step {progress.step}: {format_metrics(metrics)}"
    if is_best and progress.step:
        message += " (best so far)"
    logged_samples = {"samples": samples} if samples else {}
    epochs = evaluation.count_epochs(run.data.source, run.sample_counter, progress.step)
    logger.event("eval", progress.step, message, **metrics, **logged_samples, **epochs)
    for sample in samples:
        logger.print(f"    {sample['prompt']!r} -> {sample['completion']!r}")

    # 3. Save.
    if progress.step or is_last:
        save_at_eval = args.checkpoint_at_eval and (is_best or args.always_save_checkpoint)
        is_saved = is_last or save_at_eval or run.save_is_due
        at_interval = progress.step % args.eval_interval == 0
        progress.count_evaluation(val_loss, at_interval=at_interval, is_saved=is_saved)
        if is_saved:
            run.save(logger)
    if args.plot_loss and run.ranks.is_main:
        with logger.without_failing("--plot_loss"):
            draw_loss(logger.path, run.out_dir / "loss.png")


def sample_completions(run: Run) -> list[dict[str, str]]:
    """Greedy completions of the first validation examples, as texts; none for a run that reads no examples."""
    sampler, examples = run.data.sampler, run.data.eval_datasets["val"][0].examples
    if sampler is None or examples is None or not run.args.eval_samples:
        return []
    prompt_offset = run.raw_model.wte.weight.size(0)
    return rollouts.sample_completions(sampler, examples, count=run.args.eval_samples, prompt_offset=prompt_offset)


def describe_peak_memory(ranks: distributed.Ranks) -> str:
    """The most that a rank has needed; nothing where it isn't known."""
    peak = ranks.all_reduce_max(round(device.peak_memory_mb(ranks.device) or 0))
    return f", peak memory {peak:,} MB" if peak else ""


def format_metrics(metrics: dict[str, float]) -> str:
    """An evaluation's metrics on the console."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def rollback(run: Run, logger: RunLogger) -> Run:
    """The run at its newest undamaged checkpoint. Raises DivergedError the second time, and without one."""
    progress = run.progress
    reason = (
        f"{run.args.skip_patience} steps in a row were skipped until step {progress.step}, "
        "their gradients not finite or outliers"
    )
    run.checkpoints.log_finished_save(logger, progress.step, wait=True)
    run.ranks.barrier()
    if progress.rollbacks:
        raise DivergedError(f"{reason}, again: stopped; {ADVICE}")
    if not checkpoint.list_steps(run.checkpoints.folder):
        raise DivergedError(f"{reason}, and there is no checkpoint to go back to: stopped; {ADVICE}")
    logger.note(progress.step, f"{reason}: going back to the newest checkpoint")
    run = resume(run, checkpoint.newest(run.checkpoints.folder, logger.print), logger.print)
    if run.ranks.is_main:
        checkpoint.set_aside_damaged(run.checkpoints.folder, run.progress.step)
    run.progress.rollbacks += 1
    return run


# ---------------------------------------------------------------------------------------------------------------------
# from the arguments to the end


def main(args: TrainArgs) -> Progress:
    """One run, from its arguments to its end. Raises UserError."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)
    device.tune_malloc()
    with distributed.join_ranks(args.device, args.rank_timeout) as ranks:
        args = find_begun_run(args, ranks)
        is_new_folder = args.names_task_alone
        args = dataclasses.replace(args, out_dir=choose_out_dir(args, ranks))
        out_dir = Path(args.out_dir)
        with (
            run_dir.RunLock(out_dir) as lock,
            run_dir.removed_if_empty(out_dir) if is_new_folder else contextlib.nullcontext(),
            explain_failures(args, ranks),
        ):
            return build_and_train(args, ranks, lock)


def build_and_train(args: TrainArgs, ranks: distributed.Ranks, lock: run_dir.RunLock) -> Progress:
    """Build the run, and train it or only evaluate it."""
    # 1. Build it. Nothing of an older run is touched until the new one is complete.
    notes: list[str] = []
    with ranks.main_first():
        if ranks.is_main and not args.eval_only:
            check_start(args, lock)
    run = build(args, ranks, notes.append)
    if ranks.is_main:
        console.print_line("\n".join([*notes, run.summary()]))
    if args.eval_only:
        with run.state.optimizer.evaluation_weights():
            results = evaluation.evaluate(run.raw_model, run.data.eval_datasets, ranks, Signals())
        assert results is not None, "no signal is handled here"
        if ranks.is_main:
            console.print_line(format_metrics(evaluation.summarize(results, run.data.eval_weights)))
        return run.progress

    # 2. Write what it is, once no rank reads what that may overwrite. From here on a signal saves before it ends.
    ranks.barrier()
    with Signals() as signals:
        with ranks.main_first():
            if ranks.is_main:
                begin(run, lock)
        return train_to_end(run, notes, signals)


def train_to_end(run: Run, notes: list[str], signals: Signals) -> Progress:
    """Train the run, after a rollback again. notes: of how it was built, for its metrics."""
    while True:
        logger = open_logger(run)
        # what was evaluated before is compared with nothing that follows, where val_loss is measured on something else
        mark = {"compare_val_loss_after": run.progress.step} if run.progress.best_step < 0 < run.progress.step else {}
        for note in notes:
            logger.event("note", run.progress.step, "", text=note, **mark)
        notes.clear()
        try:
            with (
                note_failure(run.progress, logger),
                save_after_failed_reward(run, logger),
                compilation.reported_limits(partial(note_limit, run.progress, logger)),
            ):
                if train(run, logger, signals):
                    return run.progress
                run = rollback(run, logger)
        finally:
            run.checkpoints.close()
            logger.close()


def note_limit(progress: Progress, logger: RunLogger, text: str) -> None:
    """Log a limit that was reached in a step."""
    logger.note(progress.step, text)


@contextlib.contextmanager
def note_failure(progress: Progress, logger: RunLogger) -> Iterator[None]:
    """Log what ends a run before its end, apart from signals: the last line of metrics.jsonl, which others read."""
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, str):
            kind = "diverged" if isinstance(end, DivergedError) else "failed"
            logger.event("note", progress.step, "", text=f"{kind}: {end.code}")
        raise
    except Exception as error:
        logger.event("note", progress.step, "", text=f"failed: {type(error).__name__}: {error}")
        raise


@contextlib.contextmanager
def save_after_failed_reward(run: Run, logger: RunLogger) -> Iterator[None]:
    """Save the run when a reward function fails: that is between two steps, and on all ranks."""
    try:
        yield
    except RewardError as error:
        if not run.progress.step:
            raise
        run.save(logger)
        run.checkpoints.finish(logger, run.progress.step)
        way_on = f"saved step {run.progress.step}; mend it, then continue with --init_from=resume"
        raise RewardError(f"{error}; {way_on} --out_dir={run.args.out_dir}") from error


if __name__ == "__main__":
    configurator.run(main, ARGS)
