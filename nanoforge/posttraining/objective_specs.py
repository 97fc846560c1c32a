"""The registry of objectives: which rows each one reads, whether it needs a reference model, and what builds it.

To add an objective, write its builder and add one entry to OBJECTIVES. train_args.py takes the choices of --objective
from here, builders.py all the rest. Imports no torch: a builder is named as "module:function" and imported when used.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class ObjectiveArgs(Protocol):
    """What a spec may ask of a run's arguments."""

    @property
    def beta(self) -> float: ...


def never(args: ObjectiveArgs) -> bool:
    """No reference model, whatever the arguments."""
    return False


def always(args: ObjectiveArgs) -> bool:
    """A reference model, whatever the arguments."""
    return True


def with_kl_coefficient(args: ObjectiveArgs) -> bool:
    """A reference model if the loss has a KL term."""
    return args.beta > 0


@dataclass(frozen=True)
class ObjectiveSpec:
    """One objective.

    build: the builder as "module:function"; it takes (args: TrainArgs, context: BuildContext) and returns RunData.
    fields: of a row, in alternatives: it is read as the first one that it has. Without fields it reads token bins.
    example_type: what a row becomes, by TRL's names of dataset types: "prompt_completion", "preference" (a pair),
        "unpaired_preference" (a completion with a label) or "prompt_only" (the model completes it itself).
    needs_reference: whether it compares the policy with a reference model.
    """

    build: str
    fields: tuple[tuple[str, ...], ...] = ()
    example_type: str = ""
    needs_reference: Callable[[ObjectiveArgs], bool] = never

    @property
    def reads_examples(self) -> bool:
        """Whether it reads rows of examples; otherwise it reads token bins."""
        return bool(self.fields)

    @property
    def is_online(self) -> bool:
        """Whether the model generates the completions that it learns from."""
        return self.example_type == "prompt_only"

    @property
    def is_paired(self) -> bool:
        """Whether a sequence holds a prompt and two completions, which don't see each other."""
        return self.example_type == "preference"

    def load_builder(self) -> Callable[..., Any]:
        """The function that `build` names; its module imports torch."""
        module, _, function = self.build.partition(":")
        return getattr(importlib.import_module(module), function)


OBJECTIVES: dict[str, ObjectiveSpec] = {
    "lm": ObjectiveSpec(build="builders:build_lm"),
    "sft": ObjectiveSpec(
        build="builders:build_sft",
        fields=(("prompt", "completion"), ("messages",), ("text",)),
        example_type="prompt_completion",
    ),
    "dpo": ObjectiveSpec(
        build="builders:build_dpo",
        fields=(("prompt", "chosen", "rejected"), ("chosen", "rejected")),
        example_type="preference",
        needs_reference=always,
    ),
    "kto": ObjectiveSpec(
        build="builders:build_kto",
        fields=(("prompt", "completion", "label"), ("prompt", "chosen", "rejected"), ("chosen", "rejected")),
        example_type="unpaired_preference",
        needs_reference=always,
    ),
    "grpo": ObjectiveSpec(
        build="builders:build_grpo",
        fields=(("prompt", "answer"),),
        example_type="prompt_only",
        needs_reference=with_kl_coefficient,
    ),
}
