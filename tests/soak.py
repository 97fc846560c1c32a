"""Train, kill, resume, on one to three ranks at random, for a number of minutes; then compare with an undisturbed run.

    python tests/soak.py [MINUTES]        30 by default

Each part ends by SIGKILL of all its ranks or of one, or by SIGTERM. The next one finds its checkpoint by itself,
sharded or not, on another number of ranks. At the end the steps, tokens and data of every step are exactly those
of the undisturbed run (one process), and the losses within 1e-4: sums over another number of ranks round differently.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from helpers import TEXT, TINY, metric, read_run, start_ranks, write_char_dataset

from nanoforge.training import checkpoint

FLAGS = [
    *TINY,
    "--dataset=a",
    "--batch_size=12",
    "--eval_interval=200",
    "--checkpoint_interval=10",
    "--log_data_hash",
    "--learning_rate=1e-4",
    "--rank_timeout=20",
    "--overwrite",
]
ENDINGS = ("all ranks killed", "one rank killed", "SIGTERM")
EXIT_SECONDS = 360  # a rank that still looks for the others gives up after five minutes


def start(folder: Path, name: str, ranks: int, *flags: str) -> list:
    """Start the processes of a run, new or resumed."""
    out_dir = folder / name
    if checkpoint.list_steps(out_dir / "checkpoints"):
        defaults = ["--init_from=resume"]
    else:
        defaults = [*FLAGS, f"--data_dir={folder}"]
    return start_ranks([*defaults, f"--out_dir={out_dir}", *flags], ranks, folder / f"{name}.log")


def end(processes: list, ending: str, rng: random.Random) -> None:
    """End a part, and wait for all of its ranks."""
    victims = [rng.choice(processes)] if ending == "one rank killed" else processes
    for process in victims:
        if ending == "SIGTERM":
            process.terminate()
        else:
            process.kill()
    for process in processes:
        process.join(EXIT_SECONDS)
        assert process.exitcode is not None, f"a rank still runs six minutes after: {ending}"
        assert ending == "all ranks killed" or process.exitcode != 0


def finish(folder: Path, name: str, last_step: int, *flags: str) -> None:
    """Train a run to its last step on one rank."""
    (process,) = start(folder, name, 1, f"--max_iters={last_step}", *flags)
    process.join()
    assert process.exitcode == 0, (folder / f"{name}.log").read_text()[-3000:]


def compare(folder: Path, last_step: int) -> float:
    """Compare both runs; the largest relative difference of their losses."""
    run, expected = read_run(folder / "run"), read_run(folder / "undisturbed")
    assert metric(run, "step") == metric(expected, "step") == list(range(1, last_step + 1))
    assert metric(run, "data_hash") == metric(expected, "data_hash")
    assert run.last.progress["tokens"] == expected.last.progress["tokens"]
    return max(abs(a - b) / b for a, b in zip(run.losses, expected.losses, strict=True))


def main(minutes: float) -> None:
    rng = random.Random(0)
    stop_at = time.monotonic() + 60 * minutes
    endings: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="soak") as name:
        folder = Path(name)
        checkpoints = folder / "run/checkpoints"
        write_char_dataset(folder / "a", TEXT * 200)
        while time.monotonic() < stop_at:
            ranks, layout = rng.randint(1, 3), rng.choice(("ddp", "fsdp"))
            processes = start(folder, "run", ranks, "--max_iters=10000000", f"--parallel={layout}")
            time.sleep(rng.uniform(0.5, 12))
            ending = rng.choice(ENDINGS)
            end(processes, ending, rng)
            endings[ending] += 1
            statuses = [process.exitcode for process in processes]
            steps = checkpoint.list_steps(checkpoints)
            print(f"{ranks} ranks ({layout}), {ending}, exit statuses {statuses}, checkpoints {steps}", flush=True)
        last_step = checkpoint.list_steps(checkpoints)[-1] + 10
        finish(folder, "run", last_step, "--parallel=ddp")
        finish(folder, "undisturbed", last_step)
        difference = compare(folder, last_step)
    print(f"{dict(endings)}, {last_step} steps: same steps, tokens and data; losses differ by at most {difference:.1e}")
    assert difference < 1e-4


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 30)
