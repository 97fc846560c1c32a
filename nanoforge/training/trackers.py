"""Trackers: where the numbers of a run go besides metrics.jsonl.

Each is imported when it is asked for. Its run is known by a file in the run's folder, so that a resumed run goes on
there. Imports no torch.
"""

import contextlib
import importlib
import itertools
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge.errors import UserError
from nanoforge.files import write_text
from nanoforge.run_dir import METRICS_FILE, TRACKER_FILES
from nanoforge.run_state import read_metrics

ID_FILES = dict(zip(("wandb", "trackio"), TRACKER_FILES, strict=True))  # in a run's folder: its run there


class Tracker(NamedTuple):
    """Where an event's numbers go besides metrics.jsonl."""

    log: Callable[[dict[str, int | float], int], None]  # (numbers, step)
    close: Callable[[], None]


def numbers_of(event: str, values: Mapping[str, Any]) -> dict[str, int | float]:
    """What a tracker has of a line of metrics.jsonl: its numbers, by event/key."""
    return {
        f"{event}/{key}": value
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def check_import(module: str, flag: str) -> None:
    """Raises UserError when the module of a flag can't be imported, though its package is there."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package raises anything
        raise UserError(f"{flag}: {module} can't be imported ({error}); reinstall it, or leave the flag out") from None


def check_wandb(flag: str = "--wandb_log") -> None:
    """Raises UserError when nobody is logged in to Weights & Biases. Asks no server, and nothing when it is offline."""
    check_import("wandb", flag)
    import wandb

    try:
        is_ready = wandb.setup().settings.mode != "online" or wandb.login(prompt=False, verify=False)
    except (AttributeError, TypeError):  # a version without these says it when the run starts
        return
    except Exception as error:
        raise UserError(f"{flag}: {error}") from None
    if not is_ready:
        raise UserError(f"{flag}: nobody is logged in; run wandb login, or set WANDB_API_KEY or WANDB_MODE=offline")


def start_wandb(out_dir: Path, project: str, name: str, config: dict[str, Any]) -> Tracker:
    """Weights & Biases. A resumed run continues its wandb run."""
    import wandb

    id_path = out_dir / ID_FILES["wandb"]
    if not id_path.exists():
        write_text(id_path, secrets.token_hex(4))
    run = wandb.init(
        project=project,
        name=name or out_dir.resolve().name,
        id=id_path.read_text().strip(),
        resume="allow",
        config=config,
        dir=str(out_dir),
    )

    # wandb drops metrics that come with an older step than its own, as a finished save does, and what a run logs
    # again after a resume or a rollback. So its own step counts rows, and each row names the training step.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    n_lines = len((out_dir / METRICS_FILE).read_bytes().splitlines())
    rows = itertools.count(max(run.step, n_lines))

    def log(numbers: dict[str, int | float], step: int) -> None:
        if numbers:
            run.log({**numbers, "step": step}, step=next(rows))

    def close() -> None:
        try:
            run.finish()
        except Exception:  # its process is gone: it would be looked for again when this one ends
            with contextlib.suppress(Exception):
                wandb.teardown(exit_code=1)
            raise

    return Tracker(log=log, close=close)


def start_trackio(out_dir: Path, project: str, name: str, config: dict[str, Any]) -> Tracker:
    """trackio, on this machine or where TRACKIO_SPACE_ID says. A resumed run continues its trackio run, which is known
    by its name: without one it is the folder's with four digits. Keys of config that begin with _ are trackio's own.
    """
    import trackio

    name_path = out_dir / ID_FILES["trackio"]
    if not name_path.exists():
        write_text(name_path, name or f"{out_dir.resolve().name}-{secrets.token_hex(2)}")
    run = trackio.init(
        project=project,
        name=name_path.read_text(),
        resume="allow",
        config={key: value for key, value in config.items() if not key.startswith("_")},
        embed=False,
    )

    def log(numbers: dict[str, int | float], step: int) -> None:
        if numbers:
            run.log(numbers, step=step)

    return Tracker(log=log, close=run.finish)


def start_tensorboard(folder: Path, start_step: int) -> Tracker:
    """tensorboard, in a folder. It writes in a thread, whose errors it raises again at the next call."""
    from torch.utils.tensorboard import SummaryWriter

    print_error = threading.excepthook
    threading.excepthook = lambda error: None if "tensorboard" in type(error.thread).__module__ else print_error(error)
    writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def log(numbers: dict[str, int | float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return Tracker(log=log, close=writer.close)


# ---------------------------------------------------------------------------------------------------------------------
# a run that is over

STARTS = {"wandb": start_wandb, "trackio": start_trackio}


def send(tracker_name: str, out_dir: Path, *, project: str, name: str, config: dict[str, Any]) -> int:
    """Send what metrics.jsonl has to a tracker, as it would have been logged; how many lines. Raises UserError, after
    which the run can be sent again."""
    lines = read_metrics(out_dir / METRICS_FILE, warnings=[])
    try:
        tracker = STARTS[tracker_name](out_dir, project, name, config)
        try:
            for line in lines:
                values = {key: value for key, value in line.items() if key not in ("event", "step", "seconds")}
                tracker.log(numbers_of(line["event"], values), line["step"])
        finally:
            tracker.close()
    except Exception as error:
        (out_dir / ID_FILES[tracker_name]).unlink(missing_ok=True)
        raise UserError(f"--send={tracker_name}: {out_dir} can't be sent ({error})") from None
    return len(lines)
