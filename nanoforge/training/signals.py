"""Signals that end a run: noticed at once, acted on where the loop can save."""

import os
import signal
import time


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 ask the run to save and end; another one, a second later or more, ends it at once.

    Sooner it is the same wish once more: a scheduler signals every process, and torchrun passes its own signal on.
    """

    def __init__(self):
        self.number, self.since = 0, 0.0

    def __enter__(self) -> "Signals":
        self.before = {
            number: signal.signal(number, self.take) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }
        return self

    def take(self, number: int, frame) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 1:
            os._exit(128 + number)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if self.number else handler)  # the same wish may still come twice
