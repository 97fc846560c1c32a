"""Look at runs: one HTML page with everything in it, and pictures.

    python report.py out/*                    writes report/report.html and report/*.png
    python report.py out --watch              serves the page on http://127.0.0.1:8765 and follows runs that are still going

The words are folders of runs, or folders that hold such; with --watch, runs that begin there later appear too. The page needs no network.
How runs are read is in nanoforge/report/read_runs.py, what the page shows of them in nanoforge/report/page.py, the pictures in nanoforge/report/plots.py. Imports no torch.
"""

import os
import sys
from dataclasses import dataclass

import configurator
from configurator import OnlyWith, arg, arg_group
from nanoforge import config_files

WATCH = OnlyWith("--watch", lambda a: a.watch)


@arg_group
class OutputArgs:
    """what"""

    out: str = arg(
        "report",
        "folder of the page and the pictures",
        needs=OnlyWith("a report that is written, not --watch", lambda a: not a.watch),
    )
    by: str = arg(
        "best",
        "which val_loss runs are judged by: the best of their evaluations, or the final one",
        choices=("best", "final"),
    )
    points: int = arg(400, "points that a curve is drawn with; more lines than that are thinned out", low=10)
    title: str = arg("", "title of the page (none: the folders)")


@arg_group
class WatchArgs:
    """watch"""

    watch: bool = arg(False, "serve the page on this machine alone, and follow the runs; writes nothing")
    port: int = arg(8765, "port on 127.0.0.1 (0: any that is free)", low=0, high=65535, needs=WATCH)
    refresh: int = arg(5, "seconds between two looks at the runs", low=1, needs=WATCH)


@dataclass(frozen=True, kw_only=True)
class ReportArgs(OutputArgs, WatchArgs):
    """The arguments of report.py."""


def given(argv: list[str]) -> tuple[list[str], list[str]]:
    """The folders among the words of the command line, and the other words."""
    try:
        _, words, _, _ = configurator.read_command_line(
            configurator.build_parser(configurator.arg_groups(ReportArgs), ""), configurator.arg_specs(ReportArgs), argv
        )
    except configurator.UserError:
        return [], argv  # it is told with the others
    folders = [word for word in words if not (word.endswith(config_files.SUFFIXES) and os.path.isfile(word))]
    return folders, [word for word in argv if word not in folders]


if __name__ == "__main__":
    FOLDERS, REST = given(sys.argv[1:])
    ARGUMENTS = configurator.parse(ReportArgs, REST, __doc__)
    if not FOLDERS:
        configurator.exit_with_errors(["say of which runs: python report.py out/*"])

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nanoforge import run_state
from nanoforge.errors import UserError
from nanoforge.report import page, plots, read_runs


class Reader:
    """The runs beneath some paths; a folder is read again only when a file of it has changed."""

    def __init__(self, paths: list[str], points: int):
        self.paths, self.points = paths, points
        self.known: dict[Path, tuple[list, read_runs.Run]] = {}

    def read(self) -> tuple[list[read_runs.Run], list[str]]:
        """The runs, and the paths without any. Raises UserError when there is none at all."""
        folders, without = read_runs.find(self.paths)
        told = []
        for folder, name in zip(folders, read_runs.names(folders), strict=True):
            stamp = [
                name,
                *map(
                    stamp_of,
                    (
                        folder / read_runs.METRICS,
                        folder / read_runs.CONFIG,
                        folder / run_state.STATUS_FILE,
                        folder / run_state.PRUNED_FILE,
                    ),
                ),
                run_state.is_running(folder),
            ]
            if folder not in self.known or self.known[folder][0] != stamp:
                self.known[folder] = stamp, read_runs.read(folder, name, self.points)
            told.append(self.known[folder][1])
        return told, without


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


# ---------------------------------------------------------------------------------------------------------------------
# written, or served


def write(a, reader: Reader, title: str) -> None:
    """The page and the pictures, into a.out."""
    told, without = reader.read()
    for path in without:
        print(f"{path}: no run there, left out", file=sys.stderr)
    shown = page.payload(told, without, a.by)
    whole = page.page(shown, title)
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    beside = out / "report.html.tmp"
    beside.write_text(whole, encoding="utf-8")
    os.replace(beside, out / "report.html")
    drawn = plots.draw(told, shown, out)
    print(
        f"{len(told)} runs: {out / 'report.html'} ({len(whole) / 1e6:.1f} MB), {', '.join(path.name for path in drawn) or 'no pictures: there is nothing to draw yet'}"
    )


def server(a, reader: Reader, title: str) -> ThreadingHTTPServer:
    """Serves the page at / and its data at /data.json, on 127.0.0.1 alone. Raises UserError when the port is taken."""
    looking, last = threading.Lock(), {}

    def shown() -> dict:
        """What the page shows; the last answer's own where no run has changed."""
        with looking:
            told, without = reader.read()
            if not last or last["runs"] != [id(run) for run in told] or last["without"] != without:
                last.update(
                    runs=[id(run) for run in told],
                    kept=told,
                    without=without,
                    shown=page.payload(told, without, a.by, a.refresh),
                )
            return last["shown"]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rpartition(":")[0] not in (
                "127.0.0.1",
                "localhost",
            ):  # another site's name that leads here
                return self.send_error(403)
            try:
                if self.path == "/":
                    return self.answer(page.page(shown(), title).encode(), "text/html")
                if self.path == "/data.json":
                    return self.answer(page.as_json(shown()).encode(), "application/json")
            except UserError as mistake:
                return self.send_error(503, str(mistake).encode("ascii", "replace").decode())
            self.send_error(404)

        def answer(self, body: bytes, kind: str) -> None:
            tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            same = self.headers.get("If-None-Match") == tag
            self.send_response(304 if same else 200)
            headers = {
                "ETag": tag,
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": 0 if same else len(body),
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
            }
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            if not same:
                self.wfile.write(body)

        def log_message(self, *words) -> None:
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", a.port), Handler)
    except OSError as error:
        raise UserError(f"--port={a.port}: {error.strerror}; take another, or 0 for any that is free") from None


def main(asked) -> None:
    paths, a = asked
    reader = Reader(paths, a.points)
    places = [Path(path).resolve() for path in paths]
    title = a.title or (
        ", ".join(place.name for place in places)
        if len(places) <= 3
        else os.path.basename(os.path.commonpath(places)) or "runs"
    )
    if not a.watch:
        return write(a, reader, title)
    page.page(page.payload(*reader.read(), a.by, a.refresh), title)  # mistakes are told before anything is served
    with server(a, reader, title) as serving:
        print(f"http://127.0.0.1:{serving.server_port} follows {len(reader.known)} runs; Ctrl-C ends it", flush=True)
        serving.serve_forever()


if __name__ == "__main__":
    configurator.run(main, (FOLDERS, ARGUMENTS))
