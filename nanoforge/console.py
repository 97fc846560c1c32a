"""Console output: lines above a progress bar, and values in few characters. Imports no torch."""

import os
import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


def print_line(message: str) -> None:
    """Print a line, above the progress bar if there is one. A closed pipe does not end the run."""
    try:
        if sys.stderr.isatty():
            tqdm.write(message)
        else:
            print(message, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def print_to_stderr(message: str) -> None:
    """Print a line on stderr, apart from the output of a command."""
    print(message, file=sys.stderr, flush=True)


class ProgressBar:
    """Characters read in a long pass over text: a bar on a terminal, elsewhere a plain line every ten seconds."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.n_chars = 0
        self.last_printed = time.monotonic()
        self.bar = tqdm(desc=title, unit="char", unit_scale=True) if sys.stderr.isatty() else None

    def add(self, n_chars: int) -> None:
        """Advance by a number of characters."""
        self.n_chars += n_chars
        if self.bar is not None:
            self.bar.update(n_chars)
        elif time.monotonic() - self.last_printed > SECONDS_BETWEEN_LINES:
            self.last_printed = time.monotonic()
            print(f"{self.title}: {self.n_chars:,} characters", flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


def format_duration(seconds: float) -> str:
    """Seconds as 41s, 2m05s or 3h20m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def plural(count: int, noun: str) -> str:
    """A count with its noun: 1 line, 2 lines."""
    suffix = "" if count == 1 else "s"
    return f"{count:,} {noun}{suffix}"


def shortest_float(value: float) -> str:
    """The shortest text that parses to the same float: 3e-4, 0.1, 1000."""
    plain = repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    for precision in range(17):
        digits, _, exponent = f"{value:.{precision}e}".partition("e")
        if float(f"{digits}e{exponent}") == value:
            break
    return min(plain, f"{digits}e{int(exponent)}", key=len)


def format_value(value: Any) -> str:
    """An argument's value in few characters: 3e-4, true, a+b."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return shortest_float(value)
    if isinstance(value, list | tuple):
        return "+".join(map(format_value, value))
    if isinstance(value, dict):
        return "+".join(f"{name}={format_value(item)}" for name, item in value.items())
    return str(value)
