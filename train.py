"""Train a GPT: build, resume, loop, save.

    python train.py configs/quickstart.py                       one process
    python train.py --dataset=shakespeare_char --out_dir=out/a
    python train.py --init_from=resume --out_dir=out/a          continue
    torchrun --standalone --nproc_per_node=8 train.py ...       the same run on eight GPUs

A run is a source (which batches) x an objective (which loss) x an adapter (which parameters learn). These, the model and the optimizer
are chosen in builders.py, before the loop; the loop asks for no mode. The arguments are in train_args.py, the model in model.py, everything
else in the package nanoforge/.
"""

import gc

import train_args

if __name__ == "__main__":  # tell mistakes, and --help, before the seconds that torch takes to import
    ARGUMENTS = train_args.parse()
    gc.disable()  # a sixth of these seconds; until the first step is told

import dataclasses
import math
import os
import platform
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import builders
import configurator
from model import GPT
from nanoforge import console, distributed, rng, run_dir
from nanoforge.data import batches, token_bins, tokenization
from nanoforge.device import measure_matmul_flops, peak_flops, set_attention_kernel, tune_malloc
from nanoforge.errors import UserError
from nanoforge.posttraining import rollouts
from nanoforge.training import checkpoint, logger, optimizers
from nanoforge.training.grad_guard import GradGuard
from nanoforge.training.signals import Signals


@dataclass
class Progress:
    """Where a run stands. All of it is saved with a checkpoint."""

    step: int = 0  # optimizer steps made
    tokens: int = 0
    seconds: float = 0.0
    best_val_loss: float = math.inf
    best_step: int = -1
    worse_evaluations: int = 0  # since the best one
    evaluated_at: int = -1
    rollbacks: int = 0  # to a checkpoint, because gradients were not finite


# ---------------------------------------------------------------------------------------------------------------------
# the run's folder


def begin_run(
    args,
    out_dir: Path,
    model: GPT,
    tokenizers: dict[str, tokenization.Tokenizer],
    progress: Progress,
    fingerprints: dict,
    base: dict,
    lock: run_dir.RunLock,
) -> None:
    """Write what the run is: its tokenizers, arguments, data, base, versions and commit. A resumed run keeps where it came from."""
    about = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        about["git_commit"] = git.stdout.strip()
    values = dataclasses.asdict(args) | {"overwrite": False}  # whoever takes this file as a config deletes nothing
    if args.init_from == "resume":
        values |= {
            name: value
            for name, value in run_dir.RunRecord.load(out_dir).args.items()
            if name in ("init_from", "gpt2_type", "task_name")
        }
    else:
        run_dir.prepare_out_dir(out_dir, lock)
    tokenization.save(out_dir / "tokenizer.json", tokenizers)
    record = run_dir.RunRecord(
        args=values,
        model=dataclasses.asdict(model.config),
        counts={"parameters": model.count_parameters(), "flops_per_token": model.flops_per_token()},
        data=fingerprints,
        base=base,
        about=about,
    )
    record.save(out_dir)
    if progress.best_step >= 0:  # a damaged checkpoint that was passed over may have been the best
        run_dir.write_best(out_dir, step=progress.best_step, val_loss=progress.best_val_loss)


def refuse_changed_data(before: dict[str, dict], fingerprints: dict[str, dict], allowed: bool, say) -> None:
    """Compare the data with what the run began with. Raises UserError when they differ, unless that is allowed."""
    changed = [
        f"{name}/{file}"
        for name in fingerprints.keys() & before.keys()
        for file in fingerprints[name].keys() | before[name].keys()
        if fingerprints[name].get(file) != before[name].get(file)
    ]
    if changed:
        words = f"{', '.join(sorted(changed))}: not what this run began with"
        if not allowed:
            raise UserError(
                f"--init_from=resume: {words}; restore the data, or go on with the new with --allow_data_change"
            )
        say(f"{words}; going on, as --allow_data_change says")


def resume(
    out_dir: Path,
    model: GPT,
    optimizer: optimizers.Optimizer,
    scaler: torch.amp.GradScaler,
    guard: GradGuard,
    tokenizers: dict,
    say,
) -> Progress:
    """Take up the newest whole checkpoint. Raises UserError when there is none or it does not fit."""
    loaded = checkpoint.load(checkpoint.newest(out_dir / "checkpoints", say))
    saved = tokenization.load(loaded.folder / "tokenizer.json")
    if len(saved) != len(tokenizers) or not all(map(tokenization.same_tokenizer, saved.values(), tokenizers.values())):
        raise UserError(f"--init_from=resume: {loaded.folder} was trained with another tokenizer than the data has now")
    if len(saved) > 1 and list(saved) != list(tokenizers):
        raise UserError(
            f"--init_from=resume: {loaded.folder} was trained on {', '.join(saved)}, in this order, which the model's vocabularies follow"
        )
    model.load_weights(loaded.weights, str(loaded.folder))
    state = dict(loaded.progress)
    optimizer.load_state_dict(loaded.optimizer, state.pop("optimizer"))
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    guard.load_state_dict(state.pop("guard", {"skipped": 0, "norms": []}))  # older checkpoints have none
    progress = Progress(
        **{field.name: state[field.name] for field in dataclasses.fields(Progress) if field.name in state}
    )
    progress.best_val_loss = math.inf if progress.best_val_loss is None else progress.best_val_loss
    say(f"resuming {loaded.folder}")
    return progress


# ---------------------------------------------------------------------------------------------------------------------
# the run


@dataclass(frozen=True)
class Run:
    """All that the loop needs."""

    args: object
    ranks: distributed.Ranks
    tokenizers: dict[str, tokenization.Tokenizer]  # one for each vocabulary of the model
    data: builders.RunData
    model: GPT  # the parameters
    net: torch.nn.Module  # the same, perhaps compiled
    replica: torch.nn.Module  # the same under DDP, where there are several ranks
    optimizer: optimizers.Optimizer
    scaler: torch.amp.GradScaler
    guard: GradGuard
    saver: checkpoint.CheckpointSaver
    fingerprints: dict[str, dict]  # of the data
    base: dict  # where the weights came from that the run began with: source, sha256
    progress: Progress
    tally: batches.SampleCounter  # of the sequences drawn from each dataset
    share: distributed.RankSlice  # of this rank in the rows of a step
    dtype_reason: str
    peak_flops: float | None  # of one device, where it is known

    @property
    def out_dir(self) -> Path:
        return Path(self.args.out_dir)

    @property
    def total_steps(self) -> int:
        """Steps until the first bound that can be told beforehand."""
        a, source = self.args, self.data.source
        bounds = [a.max_iters]
        bounds += (
            [
                self.progress.step
                + max(0, math.ceil((a.max_train_tokens - self.progress.tokens) / source.tokens_per_step))
            ]
            if a.max_train_tokens
            else []
        )
        bounds += [math.ceil(a.max_epochs / source.epochs_per_step)] if a.max_epochs else []
        return min(bounds)

    def finished(self, out_of_time: bool) -> str | None:
        """Why the run is over, or None."""
        a, p = self.args, self.progress
        if p.step >= self.total_steps:
            return f"{p.step:,} steps"
        if out_of_time:
            return f"{a.max_seconds:g} seconds"
        if a.early_stop_patience and p.worse_evaluations >= a.early_stop_patience:
            return f"{p.worse_evaluations} evaluations without a better val_loss than {p.best_val_loss:.4f}"
        return None

    def summary(self) -> str:
        """What this run is, in a few lines."""
        a, source, config, world, rows = (
            self.args,
            self.data.source,
            self.model.config,
            self.ranks.world_size,
            self.args.global_batch_size,
        )
        chip = (
            torch.cuda.get_device_name(self.ranks.device)
            if self.ranks.device.type == "cuda"
            else f"{torch.get_num_threads()} threads"
        )
        train = ", ".join(f"{d.name} {d.streams[0].tokens:,}" for d in source.datasets)
        val = ", ".join(f"{d.streams[0].tokens:,}" for d in self.data.eval_datasets["val"])
        tokens, epochs = source.tokens_per_step, self.total_steps * source.epochs_per_step
        share = f"{rows // world // self.share.micro_batch_size} x {self.share.micro_batch_size} on each of {world} rank{'s' * (world > 1)}"
        dtype = str(self.model.compute_dtype).removeprefix("torch.")
        left = max(0, self.total_steps - self.progress.step) * tokens * self.model.flops_per_token() / world
        fastest = left / measure_matmul_flops(self.ranks.device, self.model.compute_dtype)
        learning = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        adapter = (
            f"; {a.adapter}: {learning:,} learn ({learning / self.model.count_parameters():.2%})"
            if a.adapter != "none"
            else ""
        )
        objective = f" objective {a.objective};" if a.objective != "lm" else ""
        return "\n".join((
            f"run      {a.out_dir} (from {a.init_from})",
            f"model    {self.model.count_parameters() / 1e6:.2f} M parameters: {config.n_layer} layers x {config.n_embd}, {config.n_head} heads, "
            f"context {config.block_size}, vocabulary {' + '.join(map(str, config.vocab_sizes))}{adapter}",
            f"data     {train} tokens; to validate {val}",
            f"a step  {objective} {tokens:,.0f} tokens: {rows} {'sequences of' if a.objective == 'lm' else 'examples of at most'} {a.block_size} ({share}); {a.optimizer}, lr {a.learning_rate:g}, schedule {a.schedule}",
            f"length   {self.total_steps:,} steps, {self.total_steps * tokens:,.0f} tokens, {epochs:.2f} epochs",
            f"device   {self.ranks.device} ({chip}), {dtype} ({self.dtype_reason}){', compiled' if a.compile else ''}",
            f"time     at least {console.format_duration(fastest)}, by the speed of matrix products here; an estimate follows from the first steps",
        ))  # fmt: skip


def build(args, ranks: distributed.Ranks, say) -> Run:
    """Everything from the arguments, resumed if asked. Raises UserError before anything of an older run is touched."""
    if not (args.init_from == "resume" or args.overwrite or args.eval_only):
        run_dir.refuse_existing_run(Path(args.out_dir))
    began = run_dir.RunRecord.load(Path(args.out_dir)) if args.init_from == "resume" else None
    with ranks.main_first():
        for folder in args.folders.values():
            token_bins.prepare_if_missing(folder, args.data_format)
    fingerprints = builders.fingerprints(args)
    if args.init_from == "resume" and not args.eval_only:
        refuse_changed_data(began.data, fingerprints, args.allow_data_change, say)
    share = distributed.rank_slice(args.batch_size, args.gradient_accumulation_steps, ranks, args.group_size)
    args, tokenizers, model, data, base, reason = builders.build_run(args, began, ranks, say)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=model.compute_dtype == torch.float16)
    optimizer = optimizers.Optimizer(args.optimizer, model, builders.optim_config(args), model.muon_splits())
    guard = GradGuard(args.spike_skip, ranks.device)
    progress = (
        resume(Path(args.out_dir), model, optimizer, scaler, guard, tokenizers, say)
        if args.init_from == "resume"
        else Progress()
    )
    net = model
    if args.compile and distributed.is_sharded(model):
        model.compile(dynamic=False)  # in place: it stays the module that FSDP2 knows
    elif args.compile:
        net = torch.compile(model, dynamic=False)
    if args.compile:
        optimizer.compile()
    rows = args.global_batch_size
    if began and began.args["batch_size"] * began.args["gradient_accumulation_steps"] != rows:
        say(
            "a step had another number of sequences before: the data's order and epochs are those of a run that had this one from the start"
        )
    peak = (
        peak_flops(torch.cuda.get_device_name(ranks.device))
        if ranks.device.type == "cuda" and model.compute_dtype != torch.float32
        else None
    )
    saver = checkpoint.CheckpointSaver()
    replica = net if distributed.is_sharded(model) else distributed.wrap_ddp(net, ranks)
    return Run(
        args,
        ranks,
        tokenizers,
        data,
        model,
        net,
        replica,
        optimizer,
        scaler,
        guard,
        saver,
        fingerprints,
        base,
        progress,
        data.source.sample_counter(),
        share,
        reason,
        peak,
    )


# ---------------------------------------------------------------------------------------------------------------------
# evaluating and saving


@torch.no_grad()
def evaluate(run: Run, signals: Signals) -> dict | None:
    """What the objective tells of each split, over eval_iters batches of each dataset, the ranks sharing the rows of every batch; None if a
    signal came in between."""
    ranks, weights = run.ranks, run.data.eval_weights
    measured: dict[str, list[dict]] = {}
    run.net.eval()
    for split, some in run.data.eval_datasets.items():
        for dataset in some:
            sums: dict[str, torch.Tensor] = {}
            for told, counts in dataset.batches(run.net):
                if ranks.all_reduce_max(signals.number):
                    run.net.train()
                    return None
                for name, pair in told.items():  # a rank without a part in the batch has read one with the others
                    sums[name] = sums.get(name, torch.zeros_like(pair, device=ranks.device)) + (
                        pair.to(ranks.device) if counts else 0
                    )
            measured.setdefault(split, []).append(
                {name: divided(ranks.all_reduce_(pair)) for name, pair in sums.items()}
            )
    run.net.train()

    def weighted(split: str, name: str) -> float:
        return float(weights @ np.array([np.mean(told[name]) for told in measured[split]]))

    told = {"train_loss": weighted("train", "loss"), "val_loss": weighted("val", "loss")}
    told |= {f"val_{name}": weighted("val", name) for name in measured["val"][0] if name != "loss"}
    streams = [
        (stream, loss)
        for dataset, told in zip(run.data.eval_datasets["val"], measured["val"], strict=True)
        for stream, loss in zip(dataset.streams, told["loss"], strict=True)
    ]
    if all(stream.bytes for stream, _ in streams):
        by_dataset = iter([loss / math.log(2) * stream.tokens / stream.bytes for stream, loss in streams])
        told["bits_per_byte"] = float(
            weights
            @ np.array(
                [np.mean([next(by_dataset) for _ in dataset.streams]) for dataset in run.data.eval_datasets["val"]]
            )
        )
    if len(streams) > 1:
        told |= {f"val_loss/{stream.name}": loss for stream, loss in streams}
    return told


def divided(pairs: torch.Tensor) -> list[float]:
    """Means, from (2, ...) sums and what to divide them by; nan where that is 0."""
    return (pairs[0] / pairs[1]).reshape(-1).tolist()


def answers_to_tell(run: Run) -> list[dict]:
    """Answers to the first examples of the validation, as texts."""
    a, data = run.args, run.data
    if data.sampler is None or not a.eval_samples:
        return []
    dataset = data.eval_datasets["val"][0].examples
    return rollouts.sample_completions(data.sampler, dataset, a.eval_samples, run.model.wte.weight.size(0))


def save(run: Run, log: logger.RunLogger) -> None:
    """Begin to save a checkpoint: a snapshot now, the files in a thread. Waits for the save before."""
    sharded, main = distributed.is_sharded(run.model), run.ranks.is_main
    if not main and not sharded:
        return
    tell_saved(run, log, wait=True)
    begin, progress, checkpoints, a = (
        time.perf_counter(),
        dataclasses.replace(run.progress),
        run.out_dir / "checkpoints",
        run.args,
    )
    progress.seconds = log.seconds
    tensors, others = run.optimizer.state_dict()
    learned = {name: parameter for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    weights, tensors = (
        {name: distributed.cpu_snapshot(tensor) for name, tensor in some.items()} for some in (learned, tensors)
    )
    if strange := [
        name
        for name, tensor in {**weights, **tensors}.items()
        if tensor.is_floating_point() and not distributed.local_shard(tensor).isfinite().all()
    ]:
        raise SystemExit(f"{strange[0]} is not finite at step {progress.step}: stopped, nothing was saved")
    state = dataclasses.asdict(progress) | {
        "optimizer": others,
        "scaler": run.scaler.state_dict(),
        "guard": run.guard.state_dict(),
    }
    state["best_val_loss"] = progress.best_val_loss if progress.best_step >= 0 else None
    copied = {name: (run.out_dir / name).read_bytes() for name in ("train_config.json", "tokenizer.json")}

    def work() -> Path:
        folder = checkpoint.save(
            checkpoints, progress.step, weights, tensors, state, copied, run.ranks.save_group if sharded else None, main
        )
        if not main:
            return folder
        there = checkpoint.list_steps(checkpoints)
        if progress.best_step in there:
            run_dir.write_best(run.out_dir, step=progress.best_step, val_loss=progress.best_val_loss)
        checkpoint.prune(
            checkpoints, checkpoint.steps_to_keep(there, run_dir.read_best_step(run.out_dir), a.keep_last, a.keep_every)
        )
        return folder

    run.saver.begin(progress.step, work, since=begin)


def tell_saved(run: Run, log: logger.RunLogger, wait: bool) -> None:
    """Tell what became of the save that was begun, if it is over. Without room for it training goes on."""
    outcome = run.saver.outcome(wait)
    if outcome is None:
        return
    if outcome.error is not None:
        log.note(
            run.progress.step,
            f"could not save step {outcome.step}: {outcome.error}; older checkpoints are as they were, and the next save tries again",
        )
    else:
        log.event(
            "save",
            outcome.step,
            f"saved {outcome.folder}",
            blocked_ms=outcome.blocked_ms,
            written_ms=outcome.written_ms,
        )


def evaluate_and_save(run: Run, log: logger.RunLogger, signals: Signals, final: bool) -> None:
    """Evaluate, tell it, and save if the arguments ask for it; the weights that a run begins with are not saved."""
    a, p = run.args, run.progress
    losses = evaluate(run, signals)
    if losses is None:
        return
    told = losses | ({"samples": some} if (some := answers_to_tell(run)) else {})
    refuse_nonfinite(losses["val_loss"], "val_loss", run)
    p.evaluated_at = p.step
    sequences = run.tally.counts_before(p.step // run.data.source.steps_per_rollout)
    told["epochs"] = float(sequences.sum() / run.data.source.n_windows)
    if len(sequences) > 1:
        for dataset, count in zip(run.data.source.datasets, sequences.tolist(), strict=True):
            told |= {
                f"tokens/{dataset.name}": round(count * dataset.tokens_per_window),
                f"epochs/{dataset.name}": count / dataset.n_windows,
            }
    words = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
    better = losses["val_loss"] < p.best_val_loss
    log.event("eval", p.step, f"step {p.step}: {words}{' (best so far)' if better and p.step else ''}", **told)
    for sample in told.get("samples", []):
        log.print(f"    {sample['prompt']!r} -> {sample['completion']!r}")
    if p.step or final:
        p.worse_evaluations = 0 if better else p.worse_evaluations + 1
        if better:
            p.best_val_loss, p.best_step = losses["val_loss"], p.step
        if better or final or a.always_save_checkpoint:
            save(run, log)
    if a.plot_loss and run.ranks.is_main:
        logger.draw_loss(log.metrics, run.out_dir / "loss.png")


def end_saves(run: Run, log: logger.RunLogger) -> None:
    """Wait for the last save; the run fails if that one did."""
    tell_saved(run, log, wait=True)
    if run.saver.failed:
        raise SystemExit(f"the last save, of step {run.saver.step}, failed; the newest checkpoint is older")


def refuse_nonfinite(value: float, name: str, run: Run) -> None:
    """End the run rather than save or go on with numbers that mean nothing."""
    if not math.isfinite(value):
        raise SystemExit(
            f"{name} is {value} at step {run.progress.step}: stopped, nothing was saved. A lower --learning_rate, a longer --warmup_iters or --grad_clip may help"
        )


class Meter:
    """Reads the training metrics back from the device, and the time between two readings."""

    def __init__(self, run: Run, log: logger.RunLogger):
        self.run, self.log, self.readings = run, log, 0
        self.restart()

    def restart(self) -> None:
        self.time, self.step, self.tokens = time.perf_counter(), self.run.progress.step, self.run.progress.tokens

    def due(self, step: int) -> bool:
        """Whether a step is told."""
        return step == 1 or step % self.run.args.log_interval == 0

    def tell(self, told: dict[str, torch.Tensor], norm: torch.Tensor, digest: int, lr: float) -> None:
        """Tell the step just made: told of this rank's batches, norm that of the whole gradient."""
        run, p = self.run, self.run.progress
        pairs = torch.stack([pair.reshape(2, -1).sum(1).to(run.ranks.device, torch.float32) for pair in told.values()])
        means = dict(zip(told, divided(run.ranks.all_reduce_(pairs).T), strict=True))  # waits for the device
        loss_now, skipped = means.pop("loss"), int(run.guard.skipped)
        seconds = (time.perf_counter() - self.time) / (p.step - self.step)
        speed = (p.tokens - self.tokens) / (p.step - self.step) / seconds
        told = {
            "loss": loss_now,
            "lr": lr,
            "grad_norm": float(norm),
            "tokens": p.tokens,
            "step_ms": seconds * 1e3,
            "tokens_per_second": speed,
            "skipped": skipped,
            **means,
        }
        if run.peak_flops:
            told["mfu"] = speed * run.model.flops_per_token() / (run.peak_flops * run.ranks.world_size)
        if run.args.log_data_hash:
            signed = digest - 2**64 if digest >= 2**63 else digest
            told["data_hash"] = f"{int(run.ranks.all_reduce_(torch.tensor(signed))) % 2**64:016x}"
        mfu = f", mfu {told['mfu']:.1%}" if run.peak_flops else ""
        most = "".join(
            f", {name} {means[name]:.3f}"
            for name in ("reward", "rewards/accuracies", "rewards/margins", "kl")
            if name in means
        )
        self.log.event(
            "train",
            p.step,
            f"step {p.step}: loss {loss_now:.4f}{most}, {seconds * 1e3:.1f} ms, {speed:,.0f} tokens/s{mfu}, lr {lr:.2e}{f', {skipped} skipped' if skipped else ''}",
            **told,
        )
        self.readings += 1
        if self.readings == 1:  # the collector need not look again and again at the modules and the model, which stay
            gc.freeze()
            gc.enable()
        if self.readings == 2:  # the first one includes what is made at the first step
            left = run.total_steps - p.step
            self.log.print(
                f"estimated time: {console.format_duration(left * seconds)} for {left:,} more steps, evaluations apart"
            )
        self.restart()


# ---------------------------------------------------------------------------------------------------------------------
# the loop


class Diverged(Exception):
    """Too many steps in a row were skipped."""


def loop(run: Run, log: logger.RunLogger, signals: Signals) -> None:
    """Train until the run is finished or a signal ends it."""
    a, progress, optimizer, scaler, source, objective = (
        run.args,
        run.progress,
        run.optimizer,
        run.scaler,
        run.data.source,
        run.data.objective,
    )
    factor = builders.lr_scale(a)
    stream = source.stream(progress.step, run.share, run.ranks.device, hashed=a.log_data_hash)
    meter = Meter(run, log)
    model = run.replica.train()
    while True:
        tell_saved(run, log, wait=False)
        # evaluate, save, stop; the ranks agree on what came to one of them
        if progress.step % source.steps_per_rollout == 0:
            out_of_time = a.max_seconds > 0 and bool(run.ranks.all_reduce_max(log.seconds >= a.max_seconds))
            finished = run.finished(out_of_time)
            due = progress.evaluated_at < progress.step and (progress.step % a.eval_interval == 0 or finished)
            if due and not run.ranks.all_reduce_max(signals.number):
                evaluate_and_save(run, log, signals, final=bool(finished))
                finished = run.finished(out_of_time)  # perhaps by the patience
                due = progress.evaluated_at < progress.step
                meter.restart()
            if (
                a.checkpoint_interval
                and progress.step % a.checkpoint_interval == 0
                and progress.step not in (0, run.saver.step)
            ):
                save(run, log)
                meter.restart()
            if finished and not due:
                end_saves(run, log)
                return log.note(progress.step, f"finished: {finished} in {console.format_duration(log.seconds)}")
            if number := run.ranks.all_reduce_max(signals.number):
                save(run, log)
                end_saves(run, log)
                log.note(
                    progress.step,
                    f"stopped by {signal.Signals(number).name}; --init_from=resume --out_dir={a.out_dir} goes on",
                )
                raise SystemExit(128 + number)

        # one step
        optimizer.set_lr_scale(factor(progress.step))
        torch.manual_seed(int(rng.hash_u64(a.seed, rng.DROPOUT, progress.step, run.ranks.rank)) >> 1)
        step = next(stream)
        told, telling = dict(step.metrics), meter.due(progress.step + 1)
        micro_batches = objective.prepare(run.net, step.batches)
        for i, batch in enumerate(micro_batches):
            distributed.set_gradient_sync(
                model, sync=i == len(micro_batches) - 1
            )  # averaged over the ranks in the last one
            loss, more = objective(model, batch, with_metrics=telling)
            scaler.scale(loss).backward()
            told |= {name: told.get(name, 0) + pair for name, pair in more.items()}
        norm = optimizer.clip_grad_norm(scaler, a.grad_clip)
        optimizer.update(scaler, skip=run.guard.should_skip(norm))
        progress.step += 1
        progress.tokens += step.tokens
        log.advance()
        if telling:
            meter.tell(told, norm, step.data_hash, a.learning_rate * factor(progress.step - 1))
            if int(run.guard.max_consecutive) >= a.skip_patience:
                stream.close()
                raise Diverged


def go_back(run: Run, log: logger.RunLogger) -> Run:
    """The run at its newest whole checkpoint, once; ends it the second time, or where there is none."""
    words = f"{run.args.skip_patience} steps in a row were skipped until step {run.progress.step}, their gradients not finite or outliers"
    advice = "a lower --learning_rate, a longer --warmup_iters or --grad_clip may help"
    tell_saved(run, log, wait=True)
    run.ranks.barrier()
    if run.progress.rollbacks or not checkpoint.list_steps(run.out_dir / "checkpoints"):
        raise SystemExit(
            f"{words}{', again' if run.progress.rollbacks else ', and there is no checkpoint to go back to'}: stopped; {advice}"
        )
    log.note(run.progress.step, f"{words}: going back to the newest checkpoint")
    progress = resume(run.out_dir, run.model, run.optimizer, run.scaler, run.guard, run.tokenizers, log.print)
    progress.rollbacks += 1
    return dataclasses.replace(run, progress=progress, tally=run.data.source.sample_counter())


# ---------------------------------------------------------------------------------------------------------------------


def folder_of_task(args, ranks: distributed.Ranks) -> str:
    """--out_dir, or where a task has its own place, outputs/TASK/DATE_TIME, on which the ranks agree."""
    if not args.task_name or args.out_dir != "out":
        return args.out_dir
    now = time.localtime(ranks.all_reduce_max(int(time.time()) if ranks.is_main else 0))
    return str(args.task_folder / time.strftime("%Y%m%d_%H%M%S", now))


def main(args) -> Progress:
    """One run, from the arguments to its end; its progress. Raises UserError."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    tune_malloc()
    with distributed.join_ranks(args.device, args.rank_timeout) as ranks, ExitStack() as stack:
        args = dataclasses.replace(args, out_dir=folder_of_task(args, ranks))
        lock = stack.enter_context(run_dir.RunLock(Path(args.out_dir)))
        set_attention_kernel(args.attention_kernel, ranks.device)
        notes: list[str] = []
        with ranks.main_first():
            if ranks.is_main and args.init_from == "resume" and not args.eval_only:
                lock.acquire()
        run = build(args, ranks, notes.append)
        if ranks.is_main:
            console.print_line("\n".join((*notes, run.summary())))
        if args.eval_only:
            losses = evaluate(run, Signals())
            if ranks.is_main:
                console.print_line(", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
            return run.progress
        ranks.barrier()  # none still reads what may be overwritten
        with ranks.main_first():
            if ranks.is_main:
                begin_run(
                    run.args, run.out_dir, run.model, run.tokenizers, run.progress, run.fingerprints, run.base, lock
                )
        while True:
            p = run.progress
            log = logger.RunLogger(
                run.out_dir,
                silent=not ranks.is_main,
                start_step=p.step,
                evaluated=p.evaluated_at == p.step,
                seconds=p.seconds,
                total_steps=run.total_steps,
            )
            for words in notes:
                log.event("note", p.step, "", text=words)
            try:
                if args.wandb_log:
                    log.track_wandb(
                        args.wandb_project, args.wandb_run_name or run.out_dir.name, dataclasses.asdict(run.args)
                    )
                if args.tensorboard_log:
                    log.track_tensorboard()
                with Signals() as signals:
                    loop(run, log, signals)
                return run.progress
            except Diverged:
                run, notes = go_back(run, log), []
            finally:
                run.saver.outcome(wait=True)
                log.close()


if __name__ == "__main__":
    configurator.run(main, ARGUMENTS)
