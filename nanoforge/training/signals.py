"""Signals that end a run: noticed at once, acted on where the loop can save."""

import os
import signal
import time
from types import FrameType

from nanoforge.run_state import stop_signals

REPEAT_SECONDS = 1.0
CPU_LIMIT = getattr(signal, "SIGXCPU", None)  # repeated every second until the hard limit


class Signals:
    """STOP_SIGNALS ask the run to save and end; another one, a second later or more, ends it at once.

    Within that second it counts as the same request: a scheduler signals every process, and torchrun passes its own on.
    `number` is the signal, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self.received_at = 0.0

    def __enter__(self) -> "Signals":
        self.previous_handlers = {number: signal.signal(number, self.handle) for number in stop_signals()}
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Called by Python when a signal arrives."""
        if not self.number:
            self.number = number
            self.received_at = time.monotonic()
        elif number != CPU_LIMIT and time.monotonic() - self.received_at > REPEAT_SECONDS:
            os._exit(128 + number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            # Once a signal came, the same request may still come from elsewhere.
            signal.signal(number, signal.SIG_IGN if self.number else handler)
