"""The argument table of train.py: one row an argument. Imports no torch.

`parse()` gives the frozen arguments; what follows from them (the mixture, the schedule's name) are properties of theirs.
What the rows mean to each other is told by their `needs` and in `check`.
"""

import dataclasses
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import configurator
from configurator import Needs, Row
from parts.mistakes import Mistake, did_you_mean
from parts.schedules import SCHEDULES

OPTIMIZERS = ("adamw", "adam", "sgd", "nadam", "radam", "rmsprop", "adagrad", "adafactor", "lion", "muon")
GPT2_TYPES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

# ---------------------------------------------------------------------------------------------------------------------
# when an argument has an effect

MULTIDATASET = Needs("--training_mode=multidataset", lambda a: a.training_mode == "multidataset")
DRAWN = Needs("--training_mode=multidataset without --dataset_interleaving", lambda a: a.training_mode == "multidataset" and not a.dataset_interleaving)
FINAL_PROBS = Needs("--dataset_sampling_probs_final", lambda a: bool(a.dataset_sampling_probs_final))
DECAYING = Needs("a schedule that decays (--decay_lr or --lr_scheduler)", lambda a: a.schedule != "none")
DECAY_HORIZON = Needs("--lr_scheduler=linear|cosine|exponential|wsd or --decay_lr", lambda a: a.schedule in ("linear", "cosine", "exponential", "wsd"))
FSDP = Needs("--parallel=fsdp", lambda a: a.parallel == "fsdp")
FROM_SCRATCH = Needs("--init_from=scratch (loaded weights bring theirs)", lambda a: a.init_from in ("scratch", "resume"))


def optimizer_in(*names: str) -> Needs:
    return Needs("--optimizer=" + "|".join(names), lambda a: a.optimizer in names)


# ---------------------------------------------------------------------------------------------------------------------
# the table

TABLE: dict[str, list[Row]] = {
    "run": [
        Row("out_dir", "out", "folder of the run: checkpoints, metrics.jsonl, train_config.json", once=True, alias="output_dir"),
        Row("overwrite", False, "start anew in an out_dir that already holds a run, deleting that run", once=True),
        Row("init_from", "scratch", "scratch, resume (continue the run in out_dir), gpt2 or gpt2-medium|large|xl (from the hub), or a PATH to weights: "
            "a run, a checkpoint, a folder or file of GPT-2's safetensors, nanoGPT's ckpt.pt", once=True),
        Row("gpt2_type", "gpt2", "which GPT-2 --init_from=gpt2 loads", choices=GPT2_TYPES, needs=Needs("--init_from=gpt2", lambda a: a.init_from == "gpt2"), once=True),
        Row("allow_data_change", False, "resume on bins that differ from those that the run began with", once=True, needs=Needs("--init_from=resume", lambda a: a.init_from == "resume")),
        Row("eval_only", False, "evaluate once, write no checkpoint, and stop", once=True),
        Row("seed", 1337, "all randomness follows from it: weights, data order, dropout", low=0, high=2**32 - 1),
    ],
    "data": [
        Row("data_dir", "data", "folder that holds the dataset folders"),
        Row("training_mode", "single", "one dataset, a mixture of several, or aligned streams whose embeddings are summed", choices=("single", "multidataset", "multicontext")),
        Row("dataset", "shakespeare_char", "folder in data_dir; made by its prepare.py if its bins are missing", needs=Needs("--training_mode=single", lambda a: a.training_mode == "single")),
        Row("sampling_method", "random", "windows at random, each once an epoch in random order, or in order", choices=("random", "without_replacement", "sequential")),
        Row("dataset_list", (), "the datasets of a mixture", needs=MULTIDATASET),
        Row("dataset_sampling_probs", (), "weight of each dataset, of any positive scale (none: equal); with --dataset_interleaving whole numbers: how many in a row",
            item=float, needs=MULTIDATASET),
        Row("dataset_sampling_probs_final", (), "weights reached at max_iters", item=float, needs=DRAWN),
        Row("dataset_sampling_probs_transition_method", "linear", "how weights go from first to final", choices=("linear", "cosine", "exponential"), needs=FINAL_PROBS),
        Row("dataset_mixing", "batch", "draw a dataset for each whole batch or for each sequence", choices=("batch", "sequence"), needs=MULTIDATASET),
        Row("dataset_interleaving", False, "take the datasets in turn instead of at random", needs=MULTIDATASET),
        Row("multidataset_wte", False, "each dataset has its own embedding and head (they may differ in tokenizer)", needs=MULTIDATASET, shape=True),
        Row("multicontext_datasets", (), "aligned datasets of equal length, one context each", needs=Needs("--training_mode=multicontext", lambda a: a.training_mode == "multicontext")),
    ],
    "batch": [
        Row("batch_size", 64, "sequences in a micro-batch; with accumulation this makes the optimizer's batch, whatever the number of ranks", low=1),
        Row("gradient_accumulation_steps", 1, "micro-batches in one optimizer step", low=1),
        Row("block_size", 256, "tokens of context; loaded weights with a longer context are cropped to it, with a shorter one keep theirs", low=1, shape=True),
    ],
    "model": [
        Row("n_layer", 6, "blocks", low=1, shape=True, needs=FROM_SCRATCH),
        Row("n_head", 6, "attention heads", low=1, shape=True, needs=FROM_SCRATCH),
        Row("n_kv_head", 0, "heads of keys and values, shared by groups of query heads (0: n_head)", low=0, shape=True, needs=FROM_SCRATCH),
        Row("n_embd", 384, "width", low=1, shape=True, needs=FROM_SCRATCH),
        Row("vocab_size", 0, "rows of embedding and head (0: the tokenizer's); 50304 pads GPT-2's for speed", low=0, shape=True, needs=FROM_SCRATCH),
        Row("bias", False, "biases in linear layers and LayerNorm", shape=True, needs=FROM_SCRATCH),
        Row("norm", "layernorm", "layernorm, rmsnorm, or rmsnorm_nogain", choices=("layernorm", "rmsnorm", "rmsnorm_nogain"), shape=True, needs=FROM_SCRATCH),
        Row("position", "learned", "learned positions, rotary (rope), or none", choices=("learned", "rope", "none"), shape=True, needs=FROM_SCRATCH),
        Row("rope_base", 10000.0, "base of the rotary frequencies", above=0, shape=True, needs=Needs("--position=rope", lambda a: a.position == "rope")),
        Row("activation", "gelu", "any of torch.nn.functional by its name, gelu_tanh, or relu2 (ReLU squared)", shape=True, needs=FROM_SCRATCH),
        Row("mlp", "plain", "plain, or gated (SwiGLU with --activation=silu)", choices=("plain", "gated"), shape=True, needs=FROM_SCRATCH),
        Row("mlp_ratio", 4.0, "hidden width of the MLP over n_embd", above=0, shape=True, needs=FROM_SCRATCH),
        Row("qk_norm", False, "RMS-normalise queries and keys, before they are rotated", shape=True, needs=FROM_SCRATCH),
        Row("window", "L", "attention of the layers, repeated: L long (all of the block), S short (window_size)", shape=True, needs=FROM_SCRATCH),
        Row("window_size", 0, "tokens that a short layer sees, itself included (0: half of block_size)", low=0, shape=True, needs=Needs("an S in --window", lambda a: "S" in a.window)),
        Row("logit_softcap", 0.0, "bound c on the logits: c z / sqrt(z^2 + c^2) (0: none)", low=0, shape=True, needs=FROM_SCRATCH),
        Row("embedding_norm", False, "RMS-normalise the embedding, before the first block", shape=True, needs=FROM_SCRATCH),
        Row("value_residual", False, "mix each layer's values with the first layer's, in learned parts", shape=True, needs=FROM_SCRATCH),
        Row("residual_scalars", False, "each block sees r x + a x0, of the stream x and the embedding x0, with learned r and a", shape=True, needs=FROM_SCRATCH),
        Row("tie_weights", True, "the head is the token embedding", shape=True, needs=FROM_SCRATCH),
        Row("zero_init", False, "output projections of attention and MLP (and an untied head) start at zero", needs=Needs("--init_from=scratch", lambda a: a.init_from == "scratch")),
        Row("dropout", 0.0, "chance that an activation is dropped in training", low=0, high=0.999),
    ],
    "how long": [
        Row("max_iters", 3500, "optimizer steps, counted from the start of the run", low=0, alias="steps"),
        Row("max_tokens", 0, "stop after so many training tokens (0: no bound)", low=0),
        Row("max_epochs", 0.0, "stop after so many passes over the training data (0: no bound)", low=0),
        Row("max_seconds", 0.0, "stop after so many seconds of training, resumed parts together (0: no bound)", low=0),
        Row("early_stop_patience", 0, "stop after so many evaluations without a better val_loss (0: never)", low=0),
    ],
    "optimizer": [
        Row("optimizer", "adamw", "adamw, adam, sgd, nadam, radam, rmsprop, adagrad, adafactor, lion, muon (Muon for hidden matrices, AdamW for the rest), or package:Class"),
        Row("learning_rate", 1e-3, "largest learning rate", low=0),
        Row("embedding_learning_rate", 0.0, "largest learning rate of the token embedding (0: learning_rate)", low=0),
        Row("head_learning_rate", 0.0, "largest learning rate of an untied head (0: learning_rate)", low=0, needs=Needs("--no-tie_weights", lambda a: not a.tie_weights)),
        Row("weight_decay", 0.1, "of matrices (embeddings included); vectors are never decayed", low=0),
        Row("beta1", 0.9, "first beta of Adam's kind", low=0, high=0.9999, needs=optimizer_in("adamw", "adam", "nadam", "radam", "lion", "muon")),
        Row("beta2", 0.99, "second beta of Adam's kind", low=0, high=0.99999, needs=optimizer_in("adamw", "adam", "nadam", "radam", "lion", "muon")),
        Row("momentum", 0.9, "of sgd and rmsprop", low=0, high=0.9999, needs=optimizer_in("sgd", "rmsprop")),
        Row("muon_learning_rate", 0.02, "largest learning rate of the matrices that Muon trains", low=0, needs=optimizer_in("muon")),
        Row("muon_weight_decay", 0.0, "of the matrices that Muon trains", low=0, needs=optimizer_in("muon")),
        Row("muon_momentum", 0.95, "Nesterov momentum of Muon", low=0, high=0.9999, needs=optimizer_in("muon")),
        Row("optimizer_kwargs", {}, 'further arguments of the optimizer (of Muon, with muon), as JSON: {"eps": 1e-10}'),
        Row("spike_skip", 0.0, "skip steps whose gradient norm is so many standard deviations, robustly estimated, above the median of the last 128 (0: none)", low=0),
        Row("skip_patience", 10, "so many steps skipped in a row, for outlying or non-finite gradients: back to the newest checkpoint once, then the end", low=1),
        Row("grad_clip", 1.0, "largest norm of the gradient (0: not clipped)", low=0),
    ],
    "schedule": [
        Row("lr_scheduler", "none", "how the learning rate goes on after the warm-up", choices=tuple(SCHEDULES)),
        Row("decay_lr", False, "with --lr_scheduler=none: cosine, as in nanoGPT"),
        Row("warmup_iters", 100, "steps of linear warm-up, with every schedule", low=0),
        Row("lr_decay_iters", 3500, "step at which the decay is over", low=1, needs=DECAY_HORIZON),
        Row("min_lr", 1e-4, "learning rate after the decay", low=0, needs=DECAYING),
        Row("lr_step_size", 1000, "steps between drops", low=1, needs=Needs("--lr_scheduler=step", lambda a: a.schedule == "step")),
        Row("lr_step_gamma", 0.1, "factor of a drop", above=0, high=1, needs=Needs("--lr_scheduler=step", lambda a: a.schedule == "step")),
        Row("wsd_decay_fraction", 0.4, "part of lr_decay_iters that decays, linearly", above=0, high=1, needs=Needs("--lr_scheduler=wsd", lambda a: a.schedule == "wsd")),
    ],
    "evaluation and checkpoints": [
        Row("eval_interval", 250, "steps between evaluations; each is followed by a checkpoint", low=1),
        Row("eval_iters", 200, "batches of batch_size an evaluation reads from each split; the same ones every time", low=1),
        Row("checkpoint_interval", 0, "steps between checkpoints besides those of evaluations (0: only those)", low=0, alias="save_freq"),
        Row("keep_last", 2, "how many of the newest checkpoints are kept, besides the best", low=1),
        Row("keep_every", 0, "keep also each checkpoint of a step that this divides (0: none)", low=0),
        Row("always_save_checkpoint", True, "save at every evaluation; otherwise only when val_loss improves, and at the end"),
    ],
    "logging": [
        Row("log_interval", 10, "steps between lines of training metrics", low=1, alias="log_freq"),
        Row("log_data_hash", False, "add data_hash, a hash of the step's global batch, to the training metrics"),
        Row("plot_loss", False, "draw the loss curve to out_dir/loss.png after every evaluation (needs matplotlib)"),
        Row("wandb_log", False, "log to Weights & Biases; a resumed run continues the same one there"),
        Row("wandb_project", "nanoforge", "project on wandb", needs=Needs("--wandb_log", lambda a: a.wandb_log)),
        Row("wandb_run_name", "", "name on wandb (none: the name of out_dir)", needs=Needs("--wandb_log", lambda a: a.wandb_log)),
        Row("tensorboard_log", False, "log to out_dir/tensorboard (needs tensorboard)"),
    ],
    "system": [
        Row("device", "auto", "auto, cpu, cuda, cuda:N or mps"),
        Row("parallel", "ddp", "several ranks: each holds all (ddp), or its shards of weights, gradients and optimizer state (fsdp: FSDP2)", choices=("ddp", "fsdp")),
        Row("fsdp_reshard", True, "forget a block's gathered weights after its forward: less memory, one more gathering", needs=FSDP),
        Row("fsdp_offload", False, "keep shards, gradients and optimizer state in host memory", needs=FSDP),
        Row("rank_timeout", 600, "seconds that a rank waits for another before it ends the run", low=1),
        Row("dtype", "auto", "precision of activations and matrix products; weights stay float32", choices=("auto", "float32", "bfloat16", "float16")),
        Row("compile", False, "torch.compile the model, with static shapes"),
        Row("attention_kernel", "auto", "on a CUDA GPU: which of scaled_dot_product_attention's kernels (auto: torch's choice)", choices=("auto", "flash", "cudnn", "efficient", "math")),
        Row("activation_checkpointing", False, "keep only the blocks' inputs and compute the rest again in backward: less memory, more time"),
        Row("loss_chunk", 0, "make the logits of so many tokens at a time, and again in backward: less memory where the vocabulary is large (0: all at once)", low=0),
        Row("deterministic", False, "deterministic algorithms: bit-identical runs, compiled ones too"),
    ],
}  # fmt: skip


class Derived:
    """What follows from the arguments."""

    @property
    def schedule(self) -> str:
        """The schedule's name; --decay_lr alone means cosine, as in nanoGPT."""
        return "cosine" if self.decay_lr and self.lr_scheduler == "none" else self.lr_scheduler

    @property
    def mixture(self) -> list[tuple[str, ...]]:
        """The datasets of the mixture, each a tuple of its aligned streams' names."""
        if self.training_mode == "multidataset":
            return [(name,) for name in self.dataset_list]
        return [self.multicontext_datasets if self.training_mode == "multicontext" else (self.dataset,)]

    @property
    def vocabulary(self) -> str:
        """How the streams' vocabularies meet in the model: an entry of model.VOCABULARIES."""
        if self.training_mode == "multicontext":
            return "contexts" if len(self.multicontext_datasets) > 1 else "one"
        return "separate" if self.multidataset_wte else "one"

    @property
    def weights_source(self) -> str:
        """What --init_from names, with --gpt2_type worked in."""
        return self.gpt2_type if self.init_from == "gpt2" else self.init_from


def run_config(arguments) -> str | None:
    """The resumed run's own arguments, which stand where the command line is silent."""
    if arguments.init_from != "resume":
        return None
    path = os.path.join(arguments.out_dir, "train_config.json")
    if not os.path.exists(path):
        raise Mistake(f"--init_from=resume: no run in {arguments.out_dir} (no {path}); name its folder with --out_dir")
    return path


def check(a, source: dict[str, str]) -> list[str]:
    """Arguments that don't fit each other."""
    wrong = []

    def must(holds: bool, words: str) -> None:
        if not holds:
            wrong.append(words)

    loads = a.init_from not in ("scratch", "resume", *GPT2_TYPES)
    must(not loads or Path(a.init_from).exists(),
         f"--init_from={a.init_from}: no such file or folder; otherwise scratch, resume, {', '.join(GPT2_TYPES)}"
         + did_you_mean(a.init_from, ("scratch", "resume", *GPT2_TYPES)))  # fmt: skip
    must(not (a.overwrite and a.init_from == "resume"), "--overwrite: deletes the run that --init_from=resume would continue; give one of them")

    n_kv_head = a.n_kv_head or a.n_head
    must(a.n_embd % a.n_head == 0, f"--n_embd={a.n_embd}: must be a multiple of --n_head={a.n_head}")
    must(a.n_head % n_kv_head == 0, f"--n_kv_head={a.n_kv_head}: must divide --n_head={a.n_head}")
    must(a.position != "rope" or a.n_embd % a.n_head or a.n_embd // a.n_head % 2 == 0, f"--position=rope: needs an even head width, not n_embd / n_head = {a.n_embd // a.n_head}")
    must(set(a.window) <= set("LS") and a.window != "", f"--window={a.window}: must be made of the letters L and S")

    if a.training_mode == "multidataset":
        must(len(a.dataset_list) >= 1, "--dataset_list: --training_mode=multidataset needs it")
        must(len(set(a.dataset_list)) == len(a.dataset_list), "--dataset_list: a dataset is named twice")
        for name in ("dataset_sampling_probs", "dataset_sampling_probs_final"):
            weights = getattr(a, name)
            if weights:
                must(len(weights) == len(a.dataset_list), f"--{name}: {len(weights)} weights for {len(a.dataset_list)} datasets")
                must(all(weight >= 0 for weight in weights) and sum(weights) > 0, f"--{name}: weights must not be negative, and not all zero")
        if a.dataset_interleaving:
            must(all(count == int(count) and count >= 1 for count in a.dataset_sampling_probs), "--dataset_sampling_probs: with --dataset_interleaving they are whole numbers, at least 1")
        both = a.dataset_sampling_probs + a.dataset_sampling_probs_final
        must(not (a.dataset_sampling_probs_transition_method == "exponential" and a.dataset_sampling_probs_final) or all(both),
             "--dataset_sampling_probs_transition_method=exponential: needs weights above 0")  # fmt: skip
        must(not (a.multidataset_wte and a.vocab_size), "--vocab_size: with --multidataset_wte each dataset brings its own")
    if a.training_mode == "multicontext":
        must(len(a.multicontext_datasets) >= 1, "--multicontext_datasets: --training_mode=multicontext needs it")
        must(len(set(a.multicontext_datasets)) == len(a.multicontext_datasets), "--multicontext_datasets: a dataset is named twice")
        must(not a.vocab_size, "--vocab_size: with --training_mode=multicontext each context brings its own")
    must(not a.loss_chunk or a.vocabulary == "one", "--loss_chunk: needs one vocabulary, not one for each context or dataset")
    if loads or a.init_from in GPT2_TYPES:
        must(a.vocabulary == "one", "--init_from: loaded weights have one vocabulary; they go with --training_mode=single, or multidataset without --multidataset_wte")

    must(a.optimizer in OPTIMIZERS or ":" in a.optimizer, f"--optimizer={a.optimizer}: must be one of {', '.join(OPTIMIZERS)} or package:Class" + did_you_mean(a.optimizer, OPTIMIZERS))
    if a.schedule != "none":
        must(a.min_lr <= a.learning_rate or a.learning_rate == 0, f"--min_lr={a.min_lr:g}: the schedule would end above --learning_rate={a.learning_rate:g}")
        must(a.schedule != "exponential" or a.min_lr > 0, "--min_lr=0: an exponential schedule never reaches 0; give a small one")
    if a.schedule in ("linear", "cosine", "exponential", "wsd"):
        must(a.warmup_iters <= a.lr_decay_iters, f"--warmup_iters={a.warmup_iters}: longer than --lr_decay_iters={a.lr_decay_iters}")
    must(not (source["decay_lr"] == "command line" and not a.decay_lr and a.schedule != "none"), f"--no-decay_lr: contradicts --lr_scheduler={a.lr_scheduler}")
    for flag in ("overwrite", "plot_loss", "wandb_log", "tensorboard_log"):
        must(not (a.eval_only and source[flag] == "command line" and getattr(a, flag)), f"--{flag}: has no effect with --eval_only, which writes nothing")
    for flag, package in (("wandb_log", "wandb"), ("tensorboard_log", "tensorboard"), ("plot_loss", "matplotlib")):
        must(not getattr(a, flag) or find_spec(package) is not None, f"--{flag}: needs a package: pip install {package}")
    must(not (a.parallel == "fsdp" and a.dtype == "float16"), "--dtype=float16: its loss scaling does not go with --parallel=fsdp; take bfloat16")
    kind, _, index = a.device.partition(":")
    must(kind in ("auto", "cpu", "cuda", "mps") and (index == "" or (kind == "cuda" and index.isdigit())), f"--device={a.device}: must be auto, cpu, cuda, cuda:N or mps")
    return wrong


def resolve(given: list[tuple[str, dict]]) -> configurator.Resolved:
    """What train.py would make of these layers of values; ends nothing."""
    return configurator.resolve(TABLE, given, Derived, run_config, check)


RESUME = dict.fromkeys(("--resume", "--resume=true", "--resume=True"), "--init_from=resume") | dict.fromkeys(("--resume=false", "--resume=False"), "--init_from=scratch")


def parse(argv: list[str] | None = None):
    """The frozen arguments of a run; tells all mistakes at once and exits with status 2.

    Started again by torchrun or Slurm, with the command that began the run, they are those with which the run goes on.
    """

    def read(words: list[str]):
        return configurator.parse(TABLE, [RESUME.get(word, word) for word in words], "Train a GPT: see README.md.", Derived, run_config, check)

    arguments = read(sys.argv[1:] if argv is None else argv)
    again = any(os.environ.get(count, "0") != "0" for count in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    if not again or arguments.init_from == "resume" or arguments.eval_only:
        return arguments
    checkpoints = Path(arguments.out_dir) / "checkpoints"
    if any(path.name.isdigit() for path in (checkpoints.iterdir() if checkpoints.is_dir() else ())):
        return read(["--init_from=resume", f"--out_dir={arguments.out_dir}"])
    return dataclasses.replace(arguments, overwrite=True)
