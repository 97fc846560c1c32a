"""Train, kill, resume, on one to three ranks at random, for as long as asked; then compare with a run that was never disturbed.

    python tests/soak.py [MINUTES]        30 by default

Every part ends by SIGKILL of all its ranks, of one of them, or by SIGTERM; every next one finds its checkpoint by itself, sharded or
not, on another number of ranks. In the end the steps, the tokens and the data of every step must be exactly those of the undisturbed
run (one process), and the losses within 1e-4 of its: sums over another number of ranks round otherwise, and that grows with the steps.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

from helpers import TEXT, TINY, read_run, start_ranks, write_char_dataset

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


def start(folder: Path, name: str, ranks: int, *flags: str) -> list:
    """Processes of a run, new or resumed."""
    out_dir = folder / name
    given = (
        ["--init_from=resume"] if checkpoint.list_steps(out_dir / "checkpoints") else [*FLAGS, f"--data_dir={folder}"]
    )
    return start_ranks([*given, f"--out_dir={out_dir}", *flags], ranks, folder / f"{name}.log")


def main(minutes: float) -> None:
    dice, until, parts, ends = random.Random(0), time.monotonic() + 60 * minutes, 0, {}
    with tempfile.TemporaryDirectory(prefix="soak") as name:
        folder = Path(name)
        write_char_dataset(folder / "a", TEXT * 200)
        while time.monotonic() < until:
            ranks, way = dice.randint(1, 3), dice.choice(("ddp", "fsdp"))
            processes = start(folder, "run", ranks, "--max_iters=10000000", f"--parallel={way}")
            time.sleep(dice.uniform(0.5, 12))
            how = dice.choice(("all ranks killed", "one rank killed", "SIGTERM"))
            victims = [dice.choice(processes)] if how == "one rank killed" else processes
            for process in victims:
                process.terminate() if how == "SIGTERM" else process.kill()
            for process in processes:
                process.join(360)  # one that still looks for the others gives up after five minutes
                assert process.exitcode is not None, f"a rank still runs six minutes after: {how}"
                assert how == "all ranks killed" or process.exitcode != 0
            parts, ends[how] = parts + 1, ends.get(how, 0) + 1
            print(
                f"part {parts}: {ranks} ranks ({way}), {how}, exit statuses {[process.exitcode for process in processes]}, newest checkpoint {checkpoint.list_steps(folder / 'run/checkpoints')[-1:]}",
                flush=True,
            )
        last = checkpoint.list_steps(folder / "run/checkpoints")[-1] + 10
        for run in ("run", "undisturbed"):
            (process,) = start(folder, run, 1, f"--max_iters={last}", *(["--parallel=ddp"] if run == "run" else []))
            process.join()
            assert process.exitcode == 0, (folder / f"{run}.log").read_text()[-3000:]
        run, whole = read_run(folder / "run"), read_run(folder / "undisturbed")
        assert (
            [line["step"] for line in run.train] == [line["step"] for line in whole.train] == list(range(1, last + 1))
        )
        assert [line["data_hash"] for line in run.train] == [line["data_hash"] for line in whole.train]
        assert run.last.progress["tokens"] == whole.last.progress["tokens"]
        apart = max(abs(a - b) / b for a, b in zip(run.losses, whole.losses, strict=True))
        print(
            f"{parts} parts {ends}, {last} steps: steps, tokens and data are those of the undisturbed run; losses at most {apart:.1e} apart"
        )
        assert apart < 1e-4


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 30)
