"""torch.compile in a run: whether it repays its time, how many graphs it may make, and what is said of more than that.

Imports torch's compiler, which takes a second, only in runs that compile.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from nanoforge.device import missing_compiler

MIN_STEPS = 200  # of a run on a GPU that repays the minute in which its graphs are made
# Graphs of a part of the model for a width: of the first and of later layers, of windowed ones, with an adapter and
# without, each for training, for statistics and for evaluation, whose last batch may be shorter.
GRAPHS_A_WIDTH = 16


class Decision(NamedTuple):
    """Whether a run is compiled, and why, for its summary."""

    is_on: bool
    reason: str

    def describe(self) -> str:
        """In a few words; nothing for an eager run that says nothing unusual."""
        if not self.reason:
            return "compiled" if self.is_on else ""
        return f"{'compiled' if self.is_on else 'not compiled'} ({self.reason})"


EAGER = Decision(is_on=False, reason="")


def decide(setting: str, device: torch.device, steps: int) -> Decision:
    """What `--compile=setting` means for a run of this many steps on this device.

    auto follows from the arguments and the device, never from a measurement. The steps are those of the whole run,
    so that a resumed run decides as it did before.
    """
    if setting != "auto" or device.type != "cuda":
        return Decision(is_on=setting == "true", reason="")
    missing = missing_compiler(device)
    if missing:
        return Decision(is_on=False, reason=f"auto: needs {missing}")
    if steps <= MIN_STEPS:
        return Decision(is_on=False, reason=f"auto: pays from {MIN_STEPS} steps on")
    return Decision(is_on=True, reason="auto: a GPU")


def allow_graphs(n_widths: int) -> None:
    """Let torch.compile make a graph for each shape that a run has, in batches of so many widths.

    Beyond its limit it runs eagerly; its own, 8 for each function, is less than a run with examples needs.
    """
    config: Any = importlib.import_module("torch._dynamo.config")
    limit = GRAPHS_A_WIDTH * n_widths
    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * limit)
    # DDP's buckets leave as the blocks' graphs end; splitting these graphs further would only lose fusions.
    config.optimize_ddp = False


class LimitHandler(logging.Handler):
    """Says when torch.compile gives up on a function."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__()
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "recompile_limit" not in message:
            return
        function = next((line.strip() for line in message.splitlines() if "function:" in line), "")
        self.say(
            f"--compile: a part of the model has met too many shapes and goes on uncompiled ({function}); "
            "run without --compile, or with examples of fewer lengths"
        )


@contextmanager
def reported_limits(say: Callable[[str], None]) -> Iterator[None]:
    """Within it `say` gets a message where torch.compile reaches its limit of graphs, which slows the run down."""
    handler = LimitHandler(say)
    logger = logging.getLogger("torch._dynamo.convert_frame")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
