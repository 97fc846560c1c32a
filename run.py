"""A run: all that train.py's loop needs, built from the arguments; new, or resumed from a checkpoint."""

import dataclasses
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import builders
import configurator
import micro_batch
import pilot
from model import GPT
from nanoforge import distributed, restarts, rng, run_dir
from nanoforge.console import plural
from nanoforge.data import tokenization
from nanoforge.data.batches import SampleCounter
from nanoforge.device import check_compiler, peak_flops, set_attention_kernel
from nanoforge.errors import UserError
from nanoforge.posttraining.objective_specs import OBJECTIVES
from nanoforge.training import checkpoint, compilation, evaluation, memory, schedules, summary
from nanoforge.training.checkpoint import Progress
from nanoforge.training.compilation import EAGER, Decision
from nanoforge.training.logger import RunLogger, StepLogger
from nanoforge.training.pace import Pace, TimedPace
from nanoforge.training.train_step import CapturedStep, TrainStep
from train_args import TrainArgs, load_args

DRAWING_ARGS = (
    "seed",
    "sampling_method",
    "dataset_sampling_probs",
    "dataset_sampling_probs_final",
    "dataset_sampling_probs_transition_method",
    "dataset_mixing",
    "dataset_interleaving",
    "num_generations",
    "num_iterations",
    "max_iters",  # where weights move until then
)
KEPT_ON_RESUME = ("init_from", "gpt2_type", "task_name")  # a resumed run keeps its origin in its record


@dataclass(frozen=True)
class Run:
    """All that the loop needs."""

    args: TrainArgs
    ranks: distributed.Ranks
    rank_slice: distributed.RankSlice  # this rank's rows of a step
    record: run_dir.RunRecord
    tokenizers: dict[str, tokenization.Tokenizer]  # one for each vocabulary of the model
    data: builders.RunData
    sample_counter: SampleCounter
    raw_model: GPT  # holds the parameters; perhaps compiled, in place
    ddp_model: torch.nn.Module  # raw_model, under DDP with several ranks
    state: checkpoint.TrainState  # optimizer, scaler and guard, with raw_model
    checkpoints: checkpoint.Manager
    dtype_reason: str
    compiled: Decision = EAGER
    began: float = 0.0  # when the time of --time_budget began, by time.perf_counter; 0: with the first step
    progress: Progress = field(default_factory=Progress)

    @property
    def out_dir(self) -> Path:
        """The run's folder."""
        return Path(self.args.out_dir)

    @cached_property
    def pace(self) -> Pace:
        """How fast the run goes through its schedule."""
        args, decision = self.args, self.record.budget
        if not args.time_budget:
            return Pace(args.max_iters)
        return TimedPace(
            args.max_iters,
            decision.get("seconds", args.time_budget),
            step_seconds=decision.get("step_seconds", args.time_budget / max(1, args.max_iters)),
            eval_interval=args.eval_interval,
            state=self.progress.pace,
        )

    def clock(self, logger: RunLogger) -> float:
        """Seconds of training so far, the same on all ranks: a collective, which waits for the device."""
        pilot.wait_for_device(self.ranks.device)
        return pilot.agreed_seconds(logger.seconds, self.ranks)

    @cached_property
    def schedule(self) -> Callable[[float], float]:
        """Position in the schedule -> learning rate divided by the peak learning rate."""
        return builders.lr_scale(self.args)

    def lr_scale(self, step: int) -> float:
        """The learning rate of a step divided by the peak learning rate."""
        return self.schedule(self.pace.position(step))

    @property
    def total_steps(self) -> int:
        """Steps until the first bound that is known in advance."""
        return min(self.step_bounds().values())

    def step_bounds(self) -> dict[str, int]:
        """Argument -> the steps after which it ends the run."""
        args, progress, source = self.args, self.progress, self.data.source
        bounds = {"time_budget" if args.time_budget else "max_iters": self.pace.end}
        if args.max_train_tokens:
            n_left = -int(-(args.max_train_tokens - progress.tokens) // source.tokens_per_step)  # rounded up, exactly
            bounds["max_tokens"] = progress.step + max(0, n_left)
        if args.max_epochs:
            bounds["max_epochs"] = source.steps_of_epochs(args.max_epochs)
        return bounds

    def reached_limits(self) -> list[str]:
        """The arguments that have ended the run already."""
        args, progress = self.args, self.progress
        limits = [name for name, steps in self.step_bounds().items() if steps <= progress.step]
        if args.max_seconds and progress.seconds >= args.max_seconds:
            limits.append("max_seconds")
        if args.early_stop_patience and progress.worse_evaluations >= args.early_stop_patience:
            limits.append("early_stop_patience")
        return [f"--{name}={configurator.format_arg(getattr(args, name))}" for name in limits]

    @property
    def save_is_due(self) -> bool:
        """Whether --checkpoint_interval asks for a checkpoint of this step."""
        interval = self.args.checkpoint_interval
        return interval > 0 and self.progress.step % interval == 0

    def finished(self, *, out_of_time: bool) -> str | None:
        """Why the run is over, or None."""
        args, progress = self.args, self.progress
        if progress.step >= self.total_steps:
            return plural(progress.step, "step")
        if out_of_time:
            return f"{args.max_seconds:g} seconds"
        if args.early_stop_patience and progress.worse_evaluations >= args.early_stop_patience:
            best = progress.patience_val_loss
            return f"{progress.worse_evaluations} evaluations without a better val_loss than {best:.4f}"
        return None

    def describe_predicted(self) -> str:
        """The best loss beside the one that the budget's choice predicted, if it did."""
        predicted, reached = self.record.budget.get("predicted_val_loss"), self.progress.best_val_loss
        if not predicted or self.progress.best_step < 0:
            return ""
        return f", val_loss {reached:.4f}, predicted {predicted:.4f} ({reached / predicted - 1:+.1%})"

    def summary(self) -> str:
        """What this run is, in a few lines."""
        args, ranks, source, model = self.args, self.ranks, self.data.source, self.raw_model
        n_left = max(0, self.total_steps - self.progress.step)  # steps
        n_tokens = self.progress.tokens + n_left * source.tokens_per_step
        epochs_before = evaluation.count_epochs(source, self.sample_counter, self.progress.step)["epochs"]
        n_epochs = epochs_before + n_left * source.epochs_per_step
        flops_left = n_left * source.tokens_per_step * model.flops_per_token()
        batch = summary.describe_batch(source, args.block_size, args.objective, self.rank_slice, ranks.world_size)
        device = summary.describe_device(ranks.device, args.dtype, self.dtype_reason, self.compiled.describe())
        lines = [
            ("run", f"{args.out_dir} (from {args.init_from})"),
            ("model", describe_model(model, args)),
            ("data", summary.describe_data(source, self.data.eval_datasets["val"])),
            ("a step", f"{batch}; {args.optimizer}, lr {args.learning_rate:g}, {self.describe_schedule()}"),
            ("length", f"{self.total_steps:,} steps, {n_tokens:,.0f} tokens, {n_epochs:.2f} epochs"),
            ("device", device),
            ("memory", summary.describe_memory(self.plan_memory(), has_adapter=args.adapter != "none")),
            *self.dropout_line(),
            ("time", summary.describe_time(flops_left, ranks, model.compute_dtype)),
        ]
        return summary.format_summary(lines)

    def plan_memory(self) -> memory.MemoryPlan:
        """What a step needs on this rank, with sequences of full length."""
        return builders.plan_memory(self.args, self.raw_model, self.rank_slice.micro_batch_size)

    def describe_schedule(self) -> str:
        """The schedule, and the learning rate of the run's last step."""
        if self.args.schedule == "none":
            return "schedule none"
        last_lr = self.args.peak_lr * self.lr_scale(max(0, self.total_steps - 1))
        return f"schedule {self.args.schedule}, at the last step {last_lr:.3g}"

    def dropout_line(self) -> list[tuple[str, str]]:
        """Says that dropout is set and not applied."""
        args = self.args
        flags = [f"--{name}={getattr(args, name):g}" for name in ("dropout", "lora_dropout") if getattr(args, name)]
        if not args.without_dropout or not flags:
            return []
        return [
            (
                "dropout",
                f"none: --disable_dropout, the default of --objective={args.objective}, "
                f"stands above {' and '.join(flags)}",
            )
        ]

    def remarks(self) -> list[str]:
        """What the run's length leaves out of its schedule, or adds to it; of a finished run, how it goes on."""
        args, steps, limits = self.args, self.total_steps, self.reached_limits()
        if args.eval_only or (limits and not self.progress.step):
            return []
        if limits:
            return [f"the run has ended at step {self.progress.step:,}: raise {' and '.join(limits)} to go on"]
        remarks = schedules.schedule_remarks(
            self.schedule,
            peak=args.peak_lr,
            warmup=args.warmup_iters,
            decay_end=args.decay_end,
            steps=round(self.pace.position(steps)),
        )
        n_epoch_steps = self.data.source.steps_of_epochs(args.max_epochs) if args.max_epochs else 0
        if n_epoch_steps > args.max_iters:
            remarks.append(
                f"--max_iters={args.max_iters}: ends the run before the {n_epoch_steps} steps of "
                f"--max_epochs={args.max_epochs:g}; raise it for all of them"
            )
        if args.schedule == "step" and args.warmup_iters < steps <= args.warmup_iters + args.lr_step_size:
            remarks.append(f"--lr_step_size={args.lr_step_size}: no drop within the {steps} steps of the run")
        if args.dataset_sampling_probs_final and steps < args.max_iters:
            remarks.append(
                f"--max_iters={args.max_iters}: the datasets' weights move until then, the run ends at {steps}"
            )
        return remarks

    def save(self, logger: RunLogger) -> None:
        """Start to save a checkpoint, with the counts from which a resumed run goes on in each dataset."""
        progress = self.progress
        progress.sequences = self.data.source.count_sequences(self.sample_counter, progress.step)
        progress.pace = self.pace.state(logger.seconds)
        self.checkpoints.save(progress, logger)

    @cached_property
    def draws_in_steps(self) -> bool:
        """Whether a step draws random numbers: dropout does, and what other people's code does is not known."""
        args = self.args
        has_dropout = not args.without_dropout and (args.dropout > 0 or args.lora_dropout > 0)
        return has_dropout or ":" in args.optimizer or OBJECTIVES[args.objective].is_online

    def seed_step(self, step: int) -> None:
        """Seed what a step draws; that takes longer than a small model's update, so only where something is drawn."""
        if self.draws_in_steps:
            torch.manual_seed(int(rng.hash_u64(self.args.seed, rng.DROPOUT, step, self.ranks.rank)) >> 1)

    def train_step(self) -> TrainStep | CapturedStep:
        """What makes a training step: with --cuda_graph a graph of it, new after each rollback. Raises UserError."""
        step = TrainStep(self.ddp_model, self.data.objective, self.state, self.args.grad_clip)
        return CapturedStep(step, self.ranks.device) if self.args.cuda_graph else step

    def step_logger(self, logger: RunLogger) -> StepLogger:
        """The logger of this run's training steps; it measures their speed from now on."""
        step_logger = StepLogger(
            logger=logger,
            ranks=self.ranks,
            guard=self.state.guard,
            log_interval=self.args.log_interval,
            total_steps=self.total_steps,
            peak_tokens_per_second=self.peak_tokens_per_second(),
            log_data_hash=self.args.log_data_hash,
        )
        step_logger.restart(self.progress.step, self.progress.tokens)
        return step_logger

    def peak_tokens_per_second(self) -> float | None:
        """Of all ranks together, at their GPUs' peak half-precision FLOPs; None on other devices, or unknown ones."""
        if self.ranks.device.type != "cuda" or self.raw_model.compute_dtype == torch.float32:
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.ranks.device))
        if peak is None:
            return None
        return peak * self.ranks.world_size / self.raw_model.flops_per_token()


def describe_model(model: GPT, args: TrainArgs) -> str:
    """Size and shape, and with an adapter the trainable part."""
    shape, n_parameters = model.config, model.count_parameters()
    vocabulary = " + ".join(str(size) for size in shape.vocab_sizes)
    text = (
        f"{n_parameters / 1e6:.2f} M parameters: {shape.n_layer} layers x {shape.n_embd}, {shape.n_head} heads, "
        f"context {shape.block_size}, vocabulary {vocabulary}"
    )
    if args.adapter == "none":
        return text
    n_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    base = args.base_dtype
    if args.quantize_base != "none":
        base = f"{args.quantize_base} and {base}"
    return f"{text}; {args.adapter}: {n_trainable:,} trainable ({n_trainable / n_parameters:.2%}), the base in {base}"


# ---------------------------------------------------------------------------------------------------------------------
# build and resume


def build(args: TrainArgs, ranks: distributed.Ranks, log: Callable[[str], None]) -> Run:
    """Build a run from the arguments, or resume one. Raises UserError before anything of an older run is touched."""
    resumed_from = run_dir.RunRecord.load(args.resumed_folder) if args.init_from == "resume" else None
    if args.begins_run and not (args.overwrite or args.eval_only):
        restarts.refuse_existing_run(Path(args.out_dir), args.asked)
    identity = identify(args, resumed_from)
    prepare_device(args, ranks.device)

    # 1. Data.
    with ranks.main_first():
        builders.prepare_data(args)
    fingerprints = builders.fingerprints(args)
    if resumed_from and not args.eval_only:
        resumed_from.check_data(fingerprints, allow_change=args.allow_data_change, log=log)
    if args.time_budget:
        importlib.import_module("torch._dynamo")  # the first optimizer would do it, in a second of the budget
    began = time.perf_counter() if args.time_budget else 0.0
    decision = resumed_from.budget if resumed_from else {}
    if args.budget_chooses:
        args, decision, reasons = pilot.decide(args, ranks)
        for reason in reasons:
            log(reason)
    if args.auto_find_batch_size and not args.eval_only:
        args, reason = micro_batch.decide(args, ranks, resumed_from)
        log(reason)
    rank_slice = distributed.rank_slice(args.global_batch_size, args.batch_size, ranks, group_size=args.group_size)

    # 2. Model and optimizer.
    parts = builders.build_run(args, resumed_from, ranks, log)
    args, raw_model = parts.args, parts.model
    state = builders.build_state(args, raw_model, ranks)

    # 3. The run.
    run = Run(
        args=args,
        ranks=ranks,
        rank_slice=rank_slice,
        record=dataclasses.replace(
            make_record(args, raw_model, fingerprints, parts.base, resumed_from), run=identity, budget=decision
        ),
        tokenizers=parts.tokenizers,
        data=parts.data,
        sample_counter=parts.data.source.sample_counter(),
        raw_model=raw_model,
        ddp_model=raw_model if distributed.is_sharded(raw_model) else distributed.wrap_ddp(raw_model, ranks),
        state=state,
        checkpoints=checkpoint.Manager(
            Path(args.out_dir), state, ranks, keep_last=args.keep_last, keep_every=args.keep_every
        ),
        dtype_reason=parts.dtype_reason,
        began=began,
    )
    run.train_step()  # or what is in its way
    if resumed_from is not None:
        run = resume(run, find_resumed(run, log), log)
    run = compile_run(run, parts.models)
    for remark in run.remarks():
        log(remark)
    return run


def prepare_device(args: TrainArgs, device: torch.device) -> None:
    """Set what is the process's own. Raises UserError where the device can't do it."""
    if args.compile == "true":
        check_compiler(device)
    set_attention_kernel(args.attention_kernel, device)


def identify(args: TrainArgs, resumed_from: run_dir.RunRecord | None) -> dict[str, Any]:
    """The identity of the run, with this attempt at it."""
    before = resumed_from.run if resumed_from else {}
    identity = run_dir.identify(Path(args.out_dir), before, is_branch=args.begins_run)
    return identity | {"attempts": restarts.add_attempt(identity["attempts"], args.asked)}


def find_resumed(run: Run, log: Callable[[str], None]) -> Path:
    """The checkpoint that a resumed run goes on from. Raises UserError where later ones would have to go unasked."""
    args = run.args
    if args.named_checkpoint is None:
        return checkpoint.newest(run.checkpoints.folder, log)
    folder = checkpoint.named(args.named_checkpoint)
    if not (args.begins_run or args.overwrite or args.eval_only):
        checkpoint.refuse_later(run.out_dir, checkpoint.read_step(folder))
    return folder


def compile_run(run: Run, models: Sequence[GPT]) -> Run:
    """Compile the run's models and what its optimizer can compile, if --compile says so."""
    args, device = run.args, run.ranks.device
    decision = compilation.decide(args.compile, device, 0 if args.eval_only else run.total_steps)
    if decision.is_on:
        compilation.allow_graphs(builders.batch_widths(args, device).number)
        run.state.optimizer.compile()
        for model in models:
            model.compile_forward()
    return dataclasses.replace(run, compiled=decision)


def make_record(
    args: TrainArgs,
    model: GPT,
    fingerprints: dict[str, dict[str, str]],
    base: dict[str, str],
    resumed_from: run_dir.RunRecord | None,
) -> run_dir.RunRecord:
    """The record of a run, without the versions of this process."""
    # a run started from this config deletes nothing, and one that is resumed goes on from its last checkpoint
    values = dataclasses.asdict(args) | {
        "overwrite": False,
        "checkpoint": "last",
        "base_model": "",
        "budget_chooses": (),
    }
    if resumed_from:
        values |= {name: resumed_from.args[name] for name in KEPT_ON_RESUME if name in resumed_from.args}
    return run_dir.RunRecord(
        args=values,
        model=dataclasses.asdict(model.config),
        counts={"parameters": model.count_parameters(), "flops_per_token": model.flops_per_token()},
        data=fingerprints,
        base=base,
    )


def resume(run: Run, folder: Path, log: Callable[[str], None]) -> Run:
    """The run at a checkpoint that was verified. Raises UserError when it does not fit the run."""
    loaded = checkpoint.load(folder)
    check_tokenizers(tokenization.load(loaded.folder / "tokenizer.json"), run.tokenizers, loaded.folder)
    run.raw_model.load_weights(loaded.weights, str(loaded.folder))
    run.state.load(loaded)
    log(f"resuming {loaded.folder}")
    progress = Progress.from_json(loaded.progress)
    before, record = load_args(folder), run_dir.RunRecord.load(folder)
    sequences = progress.sequences or count_sequences(before, progress.step)
    renamed = run_dir.renamed_datasets(record.data, run.record.data)
    source = run.data.source
    source.resume_at(progress.step, {renamed.get(dataset, dataset): count for dataset, count in sequences.items()})
    run = dataclasses.replace(run, progress=progress, sample_counter=source.sample_counter())
    if not run.args.eval_only:
        report_changes(run, before, record, log)
    return run


def count_sequences(args: TrainArgs, step: int) -> dict[str, int]:
    """dataset -> sequences drawn before a step, for the checkpoint of an older version, which has no counts."""
    names = ["+".join(streams) for streams in args.mixture]
    if args.train_file:
        names = [Path(args.train_file).stem]
    counter = SampleCounter(builders.build_mixture(args), args.global_batch_size // args.group_size, args.seed)
    steps_per_rollout = args.num_iterations if OBJECTIVES[args.objective].is_online else 1
    counts = counter.counts_before(step // steps_per_rollout)
    return dict(zip(names, counts.tolist(), strict=True))


def report_changes(run: Run, before: TrainArgs, record: run_dir.RunRecord, log: Callable[[str], None]) -> None:
    """Report what the run does otherwise than before its checkpoint, which has these arguments and this record.

    What is compared between evaluations, the best loss and early stopping, starts anew where val_loss is measured on
    something else.
    """
    step = run.progress.step
    drawing = changed_drawing(before, run.args)
    if drawing:
        log(f"from step {step} on, data are drawn with {', '.join(drawing)}; each dataset goes on where it was")
    measured = changed_val_loss(before, record, run)
    if measured:
        run.progress.forget_best()
        log(
            f"from step {step} on, val_loss is measured with {', '.join(measured)}: "
            "best.json and --early_stop_patience start anew"
        )


def describe_change(name: str, before: object, now: object) -> str:
    """A value of the run, and the one that it had."""
    return f"--{name}={configurator.format_arg(now)} (was {configurator.format_arg(before)})"


def changed_drawing(before: TrainArgs, args: TrainArgs) -> list[str]:
    """What decides which data are drawn, and has changed."""
    names = [name for name in DRAWING_ARGS if name != "max_iters" or args.dataset_sampling_probs_final]
    changes = [
        describe_change(name, getattr(before, name), getattr(args, name))
        for name in names
        if getattr(before, name) != getattr(args, name)
    ]
    if before.global_batch_size != args.global_batch_size:
        changes.append(f"a global batch of {args.global_batch_size} (was {before.global_batch_size})")
    return changes


def val_hashes(args: TrainArgs, data: run_dir.Fingerprints) -> list[str]:
    """The fingerprints of the files that val_loss is measured on."""
    start = Path(args.validation_file).name if args.validation_file else "val"
    return sorted(
        fingerprint
        for files in data.values()
        for file, fingerprint in files.items()
        if Path(file).name.startswith(start)
    )


def changed_val_loss(before: TrainArgs, record: run_dir.RunRecord, run: Run) -> list[str]:
    """What decides what val_loss is measured on, and has changed since a checkpoint. record: the checkpoint's."""
    args = run.args
    old, new = before.val_loss_settings, args.val_loss_settings
    changes = [
        describe_change(name, getattr(before, name), getattr(args, name))
        for name in old | new
        if old.get(name) != new.get(name)
    ]
    if record.data and val_hashes(before, record.data) != val_hashes(args, run.record.data):
        changes.append("other data")
    moved = any(name in args.mixture[:i] + args.mixture[i + 1 :] for i, name in enumerate(before.mixture))
    if moved and args.data_format == "bins":
        changes.append("the datasets in another order")
    if builders.val_weights(before, args.mixture) != builders.val_weights(args, args.mixture):
        changes.append("other weights of the datasets")
    n_rows = builders.count_eval_rows(before, run.data.eval_datasets["val"])
    if n_rows != builders.count_eval_rows(args, run.data.eval_datasets["val"]):
        changes.append(f"--eval_iters={args.eval_iters} x --batch_size={args.batch_size} rows")
    return changes


def check_tokenizers(
    saved: dict[str, tokenization.Tokenizer], current: dict[str, tokenization.Tokenizer], folder: Path
) -> None:
    """Raises UserError when the tokenizers of a checkpoint, or their order, are not those of the data."""
    pairs = list(zip(saved.values(), current.values(), strict=False))
    if len(saved) != len(current) or not all(tokenization.same_tokenizer(*pair) for pair in pairs):
        raise UserError(f"--init_from=resume: {folder} was trained with another tokenizer than the data has now")
    if len(saved) > 1 and list(saved) != list(current):
        raise UserError(
            f"--init_from=resume: {folder} was trained on {', '.join(saved)}, in this order; "
            "the model's vocabularies follow it, so name the datasets in this order"
        )
