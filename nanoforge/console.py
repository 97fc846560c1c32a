"""Console output: streams that end no run, lines above a progress bar, values in few characters. Imports no torch."""

import contextlib
import errno
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BEFORE_BAR = 1.0  # what is over sooner has no bar

T = TypeVar("T")


def draw_to_files() -> None:
    """For before matplotlib is imported: a command started from a notebook inherits the notebook's way to draw, which
    this Python may lack, and draws to files only."""
    os.environ.pop("MPLBACKEND", None)


class ConsoleOutput(io.FileIO):
    """A standard stream's file. What can't be written there (a full disk, a closed pipe or terminal) is dropped.

    The first failure is reported on stderr. `required` output, which a command is run for, ends the command instead.
    """

    required = False
    failed = False

    def write(self, data: Any, /) -> int:
        """Write, or drop, all of the data. Raises BrokenPipeError and SystemExit where the output is required."""
        try:
            return super().write(data)
        except OSError as error:
            if self.required:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # for what is still in a buffer
                if error.errno == errno.EPIPE:
                    raise
                raise SystemExit(f"standard output can't be written ({error.strerror})") from None
            if not self.failed and error.errno != errno.EPIPE:
                self.failed = True
                with contextlib.suppress(OSError):
                    os.write(2, f"the console can't be written ({error.strerror}); its lines are lost\n".encode())
            return len(data)


def protect_console(*, output_is_required: bool = False) -> None:
    """Let no failure of stdout or stderr end this process, and print characters that they don't have as escapes.

    A stream that was closed before the start becomes the null device; one that is not the process's own stays.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
            continue
        if not isinstance(stream, io.TextIOWrapper):
            continue
        is_buffered = isinstance(stream.buffer, io.BufferedWriter)
        raw = stream.buffer.raw if is_buffered else stream.buffer
        if stream is getattr(sys, f"__{name}__") and type(raw) is io.FileIO:
            raw = ConsoleOutput(stream.fileno(), "w", closefd=False)
            stream = io.TextIOWrapper(
                io.BufferedWriter(raw) if is_buffered else raw,
                encoding=stream.encoding,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, stream)
        if isinstance(raw, ConsoleOutput):
            raw.required = output_is_required and name == "stdout"
            stream.reconfigure(errors="backslashreplace")


def print_line(message: str) -> None:
    """Print a line, above the progress bar if there is one."""
    if sys.stderr.isatty():
        from tqdm import tqdm  # here, since --help and most commands need no bar

        tqdm.write(message)
    else:
        print(message, flush=True)


def print_to_stderr(message: str) -> None:
    """Print a line on stderr, apart from the output of a command."""
    print(message, file=sys.stderr, flush=True)


def paint(text: str, code: int, stream: TextIO | None = None) -> str:
    """The text in a terminal's colour or style, by its ANSI code; as it is where the stream, stdout, is none."""
    is_plain = not (stream or sys.stdout).isatty() or "NO_COLOR" in os.environ
    return text if is_plain else f"\x1b[{code}m{text}\x1b[0m"


class ProgressBar:
    """What a long pass over data has done: a bar on a terminal, elsewhere a plain line every ten seconds."""

    def __init__(self, title: str, unit: str = "characters", total: int = 0, *, silent: bool = False) -> None:
        """total: where the pass ends, 0 where that is not known. silent: on ranks that print nothing."""
        self.title = title
        self.unit = unit
        self.total = total
        self.silent = silent
        self.n_done = 0
        self.last_printed = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty() and not silent:
            from tqdm import tqdm

            self.bar = tqdm(
                desc=title,
                total=total or None,
                unit=f" {unit}",
                unit_scale=not 0 < total < 10_000,
                leave=False,
                delay=SECONDS_BEFORE_BAR,
            )

    def add(self, n_done: int) -> None:
        """Advance by a number of units."""
        self.n_done += n_done
        if self.bar is not None:
            self.bar.update(n_done)
        elif not self.silent and time.monotonic() - self.last_printed > SECONDS_BETWEEN_LINES:
            self.last_printed = time.monotonic()
            total = f" of {self.total:,}" if self.total else ""
            print(f"{self.title}: {self.n_done:,}{total} {self.unit}", flush=True)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items; each is done when the next one is asked for."""
        for item in items:
            yield item
            self.add(1)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


class Curve:
    """A curve of a number in a line of text: means of equally many values, from the first one to the newest."""

    BLOCKS = "▁▂▃▄▅▆▇█"
    WIDTH = 20

    def __init__(self) -> None:
        self.means: list[float] = []
        self.per_mean = 1  # values
        self.waiting: list[float] = []  # that make no whole mean yet

    def add(self, value: float) -> None:
        """Take up a value. Where the line is full, pairs of means become one."""
        self.waiting.append(value)
        if len(self.waiting) < self.per_mean:
            return
        self.means.append(sum(self.waiting) / len(self.waiting))
        self.waiting = []
        if len(self.means) == self.WIDTH:
            self.means = [(a + b) / 2 for a, b in zip(self.means[::2], self.means[1::2], strict=True)]
            self.per_mean *= 2

    def draw(self, encoding: str = "utf-8") -> str:
        """The means between their least and their largest; nothing where an encoding has no blocks."""
        try:
            self.BLOCKS.encode(encoding)
        except (UnicodeEncodeError, LookupError):
            return ""
        low, high = min(self.means, default=0.0), max(self.means, default=0.0)
        scale = (len(self.BLOCKS) - 1) / (high - low) if high > low else 0.0
        return "".join(self.BLOCKS[round((mean - low) * scale)] for mean in self.means)


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
