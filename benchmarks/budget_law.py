"""The constants of the law of --time_budget, and how well it predicts: python -m benchmarks.budget_law

Fits them to measured runs, those of benchmarks/budget_cpu.json and of budget_law.jsonl: nine texts in one size, two in
several sizes, and pilots. Prints them, the scale of each text, and how near two pilots come to the loss of a run on a
text that the fit has not seen. Needs scipy.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from benchmarks.common import ROOT
from nanoforge.training.budget import LAW, Law, Pilot, Shape, block_tokens, calibrate
from pilot import MIN_PILOT_CONTEXT, MIN_PILOT_STEPS

PILOTS, RUN = (19_968, 109_568), 2_498_560  # tokens: two pilots of a text, and the run that they predict
EVAL_TOKENS = 65_536  # of theirs
MOST_OFF = 1.6  # a context over the rule's, or under it
NOISE = 0.01  # of a loss: larger errors count less


class Run(NamedTuple):
    """A run that was measured."""

    text: str
    unique: int  # tokens of the text
    eval_tokens: int  # of its validation split: runs of a text with as many were evaluated on the same ones
    weights: int
    tokens: int
    step_tokens: int
    block_size: int
    val_loss: float

    @property
    def is_of_the_law(self) -> bool:
        """Whether it has enough steps, and about the context that the budget's rule gives it."""
        context = max(MIN_PILOT_CONTEXT, block_tokens(self.tokens))
        has_context = max(context / self.block_size, self.block_size / context) <= MOST_OFF
        return has_context and self.tokens >= MIN_PILOT_STEPS * self.step_tokens

    def predicted(self, law: Law) -> float:
        """L."""
        return law.loss(self.weights, self.tokens, self.unique, self.step_tokens)


def read_runs() -> list[Run]:
    """The measured runs of the law, without dropout."""
    runs = []
    for line in (ROOT / "benchmarks" / "budget_law.jsonl").read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        runs.append(Run(**{name: row[name] for name in Run._fields}))
    for case, rows in json.loads((ROOT / "benchmarks" / "budget_cpu.json").read_text()).items():
        text = case.rpartition(", ")[0]
        for row in rows.values():
            n_layer, n_embd, batch_size, block_size, dropout = row["shape"]
            if dropout == 0:
                weights, step_tokens = Shape(n_layer, n_embd, 1).weights, batch_size * block_size
                size = {"weights": weights, "tokens": row["steps"] * step_tokens, "step_tokens": step_tokens}
                own = {name: row[name] for name in ("unique", "eval_tokens", "val_loss")}
                runs.append(Run(text=text, block_size=block_size, **size, **own))
    return [run for run in runs if run.is_of_the_law]


def fit_texts(law: Law, runs: Sequence[Run]) -> tuple[np.ndarray, dict[str, float]]:
    """The relative errors of the law, and each text's k. A text has one k, and an e for each evaluation."""
    errors = np.zeros(len(runs))
    scales = {}
    for text in dict.fromkeys(run.text for run in runs):
        places = [i for i, run in enumerate(runs) if run.text == text]
        own = [runs[i] for i in places]
        columns = [[run.eval_tokens == n for run in own] for n in sorted({run.eval_tokens for run in own})]
        matrix = np.array([*columns, [run.predicted(law) for run in own]], float).T
        matrix /= np.array([[run.val_loss] for run in own])
        found = np.linalg.lstsq(matrix, np.ones(len(own)), rcond=None)[0]
        errors[places] = matrix @ found - 1
        scales[text] = float(found[-1])
    return errors, scales


def fit_law(runs: Sequence[Run]) -> Law:
    """The law with the least errors of these runs."""
    start = np.log([LAW.size_scale, LAW.exponent, LAW.start, LAW.batch_scale, LAW.epochs_worth])
    found = least_squares(
        lambda logs: fit_texts(Law(*np.exp(logs).tolist()), runs)[0], start, loss="soft_l1", f_scale=NOISE
    )
    return Law(*np.exp(found.x).tolist())


def root_mean_square(values: Sequence[float] | np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def predict(text: str, runs: Sequence[Run]) -> tuple[float, float] | None:
    """(predicted by two pilots, measured) loss of a run on a text, by a law from the other texts; None where the text
    lacks such runs."""
    law = fit_law([run for run in runs if run.text != text])
    own = {run.tokens: run for run in runs if run.text == text and run.eval_tokens == EVAL_TOKENS}
    if not own.keys() >= {*PILOTS, RUN}:
        return None
    pilots = [
        Pilot(tokens, own[tokens].step_tokens, own[tokens].predicted(law), own[tokens].val_loss) for tokens in PILOTS
    ]
    return calibrate(*pilots).loss(own[RUN].predicted(law)), own[RUN].val_loss


def main() -> None:
    """Fit, and print tables."""
    runs = read_runs()
    law = fit_law(runs)
    errors, scales = fit_texts(law, runs)
    print(
        f"{law}\n{len(runs)} runs: root mean square {root_mean_square(errors):.1%}, at most {abs(errors).max():.1%}\n"
    )
    print("| text | runs | k | rms |\n|---|---|---|---|")
    for text, scale in scales.items():
        of_text = [error for run, error in zip(runs, errors, strict=True) if run.text == text]
        print(f"| {text} | {len(of_text)} | {scale:.2f} | {root_mean_square(of_text):.1%} |")
    print("\n| text | predicted by two pilots | val_loss | off by |\n|---|---|---|---|")
    misses = []
    for text in scales:
        if (losses := predict(text, runs)) is not None:
            predicted, val_loss = losses
            misses.append(predicted / val_loss - 1)
            print(f"| {text} | {predicted:.3f} | {val_loss:.3f} | {misses[-1]:+.1%} |")
    print(f"\nroot mean square {root_mean_square(misses):.1%}")


if __name__ == "__main__":
    main()
