"""What a person reads on the terminal: lines beside a progress bar, and values in few characters. Imports no torch."""

import os
import sys
import time
from typing import Any

from tqdm import tqdm


def print_line(message: str) -> None:
    """Print a line above the progress bar, if there is one. A reader that went away does not end the run."""
    try:
        if sys.stderr.isatty():
            tqdm.write(message)
        else:
            print(message, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def print_to_stderr(message: str) -> None:
    """Print a line where it is no part of a command's output."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Characters done in a long pass over text: a bar on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.done = 0
        self.last_printed = time.monotonic()
        self.bar = tqdm(desc=title, unit="char", unit_scale=True) if sys.stderr.isatty() else None

    def add(self, n_chars: int) -> None:
        """Count so many more characters as done."""
        self.done += n_chars
        if self.bar is not None:
            self.bar.update(n_chars)
        elif time.monotonic() - self.last_printed > 10:
            self.last_printed = time.monotonic()
            print(f"{self.title}: {self.done:,} characters", flush=True)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()


def format_duration(seconds: float) -> str:
    """Seconds as 41s, 2m05s or 3h20m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def plural(count: int, noun: str) -> str:
    """1 line, 2 lines."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shortest_float(value: float) -> str:
    """A float in as few characters as give the same float back: 3e-4, 0.1, 1000."""
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
