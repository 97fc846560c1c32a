"""Compare runs: one HTML page with everything in it, and figures.

    python report.py out/*                    writes report/report.html and report/*.png
    python report.py out --watch              serves the page on http://127.0.0.1:8765 and follows running runs
    python report.py out/run --send=trackio   sends the metrics of finished runs to a tracker (wandb or trackio)

The arguments are run folders, or folders that hold some. With --watch, runs that start there later appear too. The
page needs no network. Runs are read by nanoforge/report/read_runs.py, the page is made by page.py there, the figures
by plots.py. Imports no torch.
"""

import os
import sys
import time
from collections.abc import Sequence

import configurator
from configurator import OnlyWith, Rules, arg, arg_group, arg_table, with_set
from nanoforge import config_files
from nanoforge.errors import UserError
from nanoforge.run_dir import RECORD_FILE

WATCH = OnlyWith("--watch", lambda args: args.watch)
WRITTEN = OnlyWith("a report that is written (not --watch, not --send)", lambda args: not (args.watch or args.send))


@arg_group
class OutputArgs:
    """report"""

    out: str = arg("report", "folder of the page and the figures", needs=WRITTEN, path=True)
    by: str = arg("best", "val_loss that runs are ranked by: best or final", choices=("best", "final"))
    points: int = arg(400, "maximum points of a curve; longer curves are thinned out", low=10)
    title: str = arg("", "title of the page (none: the folders)")


@arg_group
class WatchArgs:
    """watch"""

    watch: bool = arg(False, "serve the page to this machine and follow the runs; write nothing")
    port: int = arg(8765, "port on 127.0.0.1 (0: any free one)", low=0, high=65535, needs=WATCH)
    refresh: int = arg(5, "seconds between two updates", low=1, needs=WATCH)


@arg_group
class SendArgs:
    """send"""

    send: str = arg(
        "", "send the metrics of each run to wandb or trackio, as they were logged", choices=("wandb", "trackio")
    )
    project: str = arg(
        "", "project there (none: the run's own wandb_project or trackio_project)", needs=with_set("send")
    )


@arg_table
class ReportArgs(OutputArgs, WatchArgs, SendArgs):
    """The arguments of report.py."""


def check(args: ReportArgs, source: dict[str, str]) -> list[str]:
    return ["--send: needs no --watch; send first, or without it"] if args.send and args.watch else []


def split_folders(argv: list[str]) -> tuple[list[str], list[str]]:
    """The run folders on the command line, and the rest of it."""
    parser = configurator.build_parser(configurator.arg_groups(ReportArgs), __doc__ or "")
    try:
        paths = configurator.read_command_line(parser, configurator.arg_specs(ReportArgs), argv).files
    except UserError:
        return [], argv  # configurator.parse reports it, with the other errors
    folders = []
    for path in paths:
        is_config = path.endswith(config_files.SUFFIXES) and os.path.isfile(path)
        is_of_run = os.path.isfile(os.path.join(os.path.dirname(path), RECORD_FILE))  # out/*, where out is a run too
        if is_of_run or not is_config:
            folders.append(path)
    return folders, [text for text in argv if text not in folders]


if __name__ == "__main__":
    configurator.exit_on_interrupt()
    FOLDERS, FLAGS = split_folders(sys.argv[1:])
    ARGS = configurator.parse(ReportArgs, FLAGS, __doc__ or "", Rules(check=check))
    if not FOLDERS:
        configurator.exit_with_errors(["no runs; pass run folders: python report.py out/*"])

from importlib.util import find_spec
from pathlib import Path

from nanoforge import files, run_state
from nanoforge.console import draw_to_files, plural
from nanoforge.report import page
from nanoforge.report.read_runs import RunReader, find_runs
from nanoforge.report.server import HOST, PageServer
from nanoforge.run_dir import RunRecord


def default_title(paths: list[str]) -> str:
    """The folders' names, or with many folders the name of the one that holds them."""
    resolved = [Path(path).resolve() for path in paths]
    if len(resolved) <= 3:
        return ", ".join(path.name for path in resolved)
    return os.path.basename(os.path.commonpath(resolved)) or "runs"


def write_report(args: ReportArgs, reader: RunReader, title: str) -> None:
    """Write the page and the figures to --out."""
    draw_to_files()
    from nanoforge.report import plots  # matplotlib: half a second that --watch and errors don't need

    out_dir = Path(args.out)
    files.check_writable(out_dir, "--out")
    runs, empty_paths = reader.read()
    for path in empty_paths:
        print(f"{path}: no run found, ignored", file=sys.stderr)
    shown = page.payload(runs, empty_paths, args.by)
    html = page.render(shown, title)
    page_path = out_dir / "report.html"
    files.write_text(page_path, html)
    figures = plots.draw_figures(shown, out_dir)
    names = ", ".join(path.name for path in figures) or "no figures (nothing to draw yet)"
    print(f"{plural(len(runs), 'run')}: {page_path} ({len(html) / 1e6:.1f} MB), {names}")


def wait_for_runs(paths: Sequence[str], seconds: float) -> None:
    """Return once there is a run: whoever watches may come before the run does."""
    waits = False
    while True:
        try:
            find_runs(paths)
            return
        except UserError as error:
            if not waits:
                print(f"{error}; waiting for a run there, Ctrl-C stops it", flush=True)
            waits = True
            time.sleep(seconds)


def serve_report(args: ReportArgs, reader: RunReader, title: str) -> None:
    """Serve the page until Ctrl-C."""
    wait_for_runs(reader.paths, args.refresh)
    with PageServer(args.port, reader, by=args.by, title=title, refresh_seconds=args.refresh) as server:
        page.render(server.payload(), title)  # raises its UserErrors before anything is served
        print(
            f"http://{HOST}:{server.server_port} follows {plural(len(reader.cache), 'run')}; Ctrl-C stops it",
            flush=True,
        )
        server.serve_forever()


def send_runs(args: ReportArgs, paths: list[str]) -> None:
    """Send the metrics of each run to --send. Raises UserError before anything is sent."""
    from nanoforge.training import trackers  # it knows wandb and trackio; most reports need neither

    if find_spec(args.send) is None:
        raise UserError(f"--send={args.send}: requires a package: pip install {args.send}")
    if args.send == "wandb":
        trackers.check_wandb("--send=wandb")
    trackers.check_import(args.send, f"--send={args.send}")
    folders, _ = find_runs(paths)
    for folder in folders:
        if run_state.is_running(folder):
            raise UserError(f"--send={args.send}: {folder} is still running; it sends by itself with --{args.send}_log")
        id_path = folder / trackers.ID_FILES[args.send]
        if id_path.exists():
            raise UserError(f"--send={args.send}: {folder} is there already; delete {id_path} to send it once more")
    for folder in folders:
        record = RunRecord.load(folder).args
        project = args.project or record.get(f"{args.send}_project", "nanoforge")
        name = record.get(f"{args.send}_run_name", "")
        n_sent = trackers.send(args.send, folder, project=project, name=name, config=record)
        print(f"{folder}: {plural(n_sent, 'line')} sent to {args.send}, project {project}")


def main(request: tuple[list[str], ReportArgs]) -> None:
    paths, args = request
    if args.send:
        send_runs(args, paths)
        return
    reader = RunReader(paths, args.points)
    title = args.title or default_title(paths)
    if args.watch:
        serve_report(args, reader, title)
    else:
        write_report(args, reader, title)


if __name__ == "__main__":
    configurator.run(main, (FOLDERS, ARGS))
