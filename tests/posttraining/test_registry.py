"""The registry of objectives: every entry can be built, and a new one is an entry in one place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import metric

import builders
import train_args
from nanoforge.models import pretrained
from nanoforge.posttraining.examples import pad
from nanoforge.posttraining.losses import Normalizer, mean_of_sequence_means, per_token_logps
from nanoforge.posttraining.objective_specs import OBJECTIVES, ObjectiveSpec
from nanoforge.posttraining.objectives import ReferenceFree, sum_and_count

# ---------------------------------------------------------------------------------------------------------------------
# a new objective: the loss, its builder, its entry


class LengthPenalizedSFT(ReferenceFree):
    """SFT in which a token of a completion weighs 1 / length: long completions count no more than short ones."""

    def __call__(self, model, batch, *, with_metrics):
        loss_mask = batch.extras["loss_mask"]
        token_losses = -per_token_logps(model, batch.tokens, loss_mask)
        normalizer = Normalizer(batch.n_micro_batches, batch.num_loss_tokens, max_completion_tokens=0)
        loss = mean_of_sequence_means(token_losses, loss_mask, normalizer)
        if not with_metrics:
            return loss, {}
        return loss, {"loss": sum_and_count(token_losses.sum(1) / loss_mask.sum(1))}


def build_length_penalized_sft(args, context):
    return builders.example_data(args, context, LengthPenalizedSFT(), builders.build_collator(args, context))


SPEC = ObjectiveSpec(
    build=f"{__name__}:build_length_penalized_sft",
    fields=(("prompt", "completion"),),
    example_type="prompt_completion",
)
FLAGS = ["--objective=short_sft", "--dataset=sums", "--learning_rate=0.01", "--optimizer=sgd", "--eval_samples=0"]


@pytest.fixture
def short_sft(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(OBJECTIVES, "short_sft", SPEC)


@pytest.mark.slow
def test_a_registered_objective_trains(run, base: Path, short_sft):
    done = run(*FLAGS, f"--init_from={base}", "--max_iters=30", "--eval_interval=30", "--batch_size=10")
    assert done.config["objective"] == "short_sft"
    assert done.evals[-1]["val_loss"] < done.evals[0]["val_loss"]
    resumed = run("--init_from=resume", "--max_iters=40")
    assert len(resumed.train) == 40


@pytest.mark.slow
def test_its_loss_is_the_mean_of_the_completions_means(run, base: Path, short_sft):
    """Against a loop over the rows, alone; and the same in micro-batches."""
    flags = [*FLAGS, f"--init_from={base}", "--max_iters=2"]
    one = run(*flags, "--batch_size=110", name="one")
    parts = run(*flags, "--batch_size=22", "--gradient_accumulation_steps=5", name="parts")
    for name in ("loss", "grad_norm"):
        assert metric(parts, name) == pytest.approx(metric(one, name), rel=1e-4)

    loaded = builders.load_model(str(base))
    args = train_args.load_args(one.out_dir)
    inputs = builders.read_inputs(args, pretrained.load(str(base)), print)
    (dataset,) = builders.encode_examples(args, inputs, loaded.model, print)["train"]
    means = []
    for example in dataset.rows:
        batch = pad(example.sequences)
        loss_mask = batch.extras["loss_mask"]
        with torch.no_grad():
            logps = per_token_logps(loaded.model, batch.tokens, loss_mask)
        means.append(-float(logps.sum() / loss_mask.sum()))
    assert one.losses[0] == pytest.approx(np.mean(means), rel=1e-4)


def test_an_objective_that_is_not_registered_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        train_args.parse(FLAGS)
    assert "--objective=short_sft" in capsys.readouterr().err


def test_help_and_errors_name_registered_objectives(capsys: pytest.CaptureFixture[str], short_sft):
    with pytest.raises(SystemExit):
        train_args.parse(["--help"])
    assert "short_sft" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train_args.parse(["--objective=short_sfd"])
    assert "short_sft" in capsys.readouterr().err


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_entry_has_a_builder_and_fits_its_fields(name):
    spec = OBJECTIVES[name]
    assert callable(spec.load_builder())
    assert spec.reads_examples == bool(spec.example_type) == (name != "lm")
    assert all({"prompt", "chosen"} & {*fields} or len(fields) == 1 for fields in spec.fields)
