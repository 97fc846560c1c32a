"""Many runs of train.py, described once: a grid, checked, run here or by Slurm, shown in a table.

    python sweep.py configs/grids/x.yaml                                     print the runs and stop
    python sweep.py configs/grids/x.yaml --launcher=local -j 4               run them, four at a time
    python sweep.py configs/grids/x.yaml --launcher=slurm --submit           hand them to sbatch
    python sweep.py configs/grids/x.yaml --status                            (or --collect: results.csv and results.md)
    python sweep.py --learning_rate=1e-4,3e-4 --optimizer=adamw,muon         a grid without a file

A grid file's form is told in nanoforge/sweeps/grid.py, that of an experiment file of rl_salamandra_alignment in nanoforge/sweeps/hf_keys.py; every argument of
train.py may stand in it and on the command line, which wins. The same command again skips runs that are done, resumes those that are not and
retries those that failed. docs/sweeps.md has more.
"""

import functools
import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import configurator
import train_args
from configurator import ArgSpec, OnlyWith, Rules, arg, arg_groups, arg_specs
from nanoforge import config_files, console, run_state
from nanoforge.errors import UserError, did_you_mean
from nanoforge.sweeps import grid, hf_keys, local, slurm, summary
from train_args import TrainArgs

ROOT = Path(__file__).resolve().parent
TRAIN, EVALUATE = ROOT / "train.py", ROOT / "evaluate.py"

SLURM = OnlyWith("--launcher=slurm", lambda a: a.launcher == "slurm")


@dataclass(frozen=True, kw_only=True)
class SweepArgs:
    """sweep (then: all arguments of train.py; values with commas between them vary, and so do those of a [list])"""

    launcher: str = arg(
        "none",
        "none: print the runs; local: run them on this machine; slurm: write scripts for sbatch",
        choices=("none", "local", "slurm"),
    )
    jobs: int = arg(
        0, "-j: runs at once (0: as many as the GPUs are enough for, one without GPUs); of a job array, 0: all", low=0
    )
    gpus_per_run: int = arg(
        1,
        "GPUs dealt to each run, which runs under torchrun if they are several",
        low=1,
        needs=OnlyWith("--launcher=local", lambda a: a.launcher == "local"),
    )
    array: bool = arg(False, "one job array instead of a job for each run", needs=SLURM)
    submit: bool = arg(False, "hand the scripts to sbatch", needs=SLURM)
    status: bool = arg(False, "print what became of the runs")
    collect: bool = arg(False, "write results.csv and results.md, and print the latter")
    search: str = arg(
        "",
        "random:N (N points of the grid, from lists and from ranges {low: 1e-5, high: 1e-2, log: true}) or tpe:N (needs optuna; runs worse than the median are given up)",
    )
    search_seed: int = arg(0, "which random points", low=0, needs=OnlyWith("--search", lambda a: bool(a.search)))


OWN = arg_specs(SweepArgs)
ROWS = arg_specs(TrainArgs)
NAMES = {alias: spec.name for spec in ROWS.values() for alias in spec.alias}  # alias -> name
SHORT = {"learning_rate": "lr", "weight_decay": "wd", "batch_size": "bs"}  # in folder names
GRID = "grid"  # where values came from
JOB_SECTIONS = ("slurm", "environment", "evaluation")
OURS_TO_SAY = {
    "overwrite": "the sweep decides which runs begin anew",
    "eval_only": "writes nothing that a sweep could tell",
}


def check_own(a, source: dict[str, str]) -> list[str]:
    """What of the sweep's own arguments doesn't go together."""
    kind, _, count = a.search.partition(":")
    wrong = (
        []
        if not a.search or (kind in ("random", "tpe") and count.isdigit() and int(count) > 0)
        else [f"--search={a.search}: must be random:N or tpe:N"]
    )
    if kind == "tpe" and a.launcher == "slurm":
        wrong.append(
            "--search=tpe: each point follows from the runs before; it goes with --launcher=local, on Slurm inside one job"
        )
    if a.status + a.collect + (a.launcher != "none") > 1:
        wrong.append("--launcher, --status, --collect: one of them")
    return wrong


# ---------------------------------------------------------------------------------------------------------------------
# what was asked for


@dataclass(frozen=True)
class Asked:
    """The command line and the file."""

    own: Any
    bases: list[tuple[str, dict]]  # config files beneath
    spec: dict[
        str, Any
    ]  # the file's names and values, those of the command line over them; of sections as "section.key"
    experiment: bool  # a file of rl_salamandra_alignment
    out_dir: Path


def cell(row: ArgSpec, given: Any) -> Any:
    """What a flag's text gives for a grid: a list where there are commas or brackets, a mapping for a range. Raises UserError."""
    kind = row.kind
    text = given[0] if isinstance(given, list) and len(given) == 1 else given
    if isinstance(text, str) and (text.startswith("[") or (text.startswith("{") and kind in (int, float))):
        try:
            return json.loads(text)
        except ValueError:
            return grid.read_yaml(text, f"--{row.name}")[0]
    if kind in (tuple, dict) or "," not in given:
        return given
    return given.split(",")


def read_grid(path: str, wrong: list[str]) -> tuple[dict[str, Any], list[str], bool]:
    """A grid's or an experiment's file: its names and values, those of sections as "section.key"; the config files that it names; whether it is
    of rl_salamandra_alignment's kind. Raises UserError."""
    spec, verbatim = grid.read_file(path)
    if hf_keys.is_experiment(spec):
        hf_keys.check_file(spec, wrong)
        flat = hf_keys.flatten(spec, verbatim, wrong)
        out = flat.pop("execution.output_dir", None)
        return flat | ({"out_dir": out} if out else {}), [], True
    named = spec.pop("base", None) or []
    sections = hf_keys.flatten(
        {name: spec.pop(name) for name in JOB_SECTIONS if name in spec}, verbatim, wrong, JOB_SECTIONS
    )
    venv = {"execution.venv": spec.pop("venv")} if spec.get("venv") else {}
    known = {*ROWS, *NAMES, *grid.WORDS}
    wrong += [
        f"{path}: {name}: no such argument{did_you_mean(name, [*known, *JOB_SECTIONS, 'venv'])}"
        for name in spec
        if name not in known
    ]
    return (
        {NAMES.get(name, name): value for name, value in spec.items() if name in known} | sections | venv,
        [str(file) for file in (named if isinstance(named, list) else [named])],
        False,
    )


def ask(argv: list[str], wrong: list[str]) -> Asked:
    """Read the command line and the files. What is wrong is added to `wrong`; raises UserError when nothing can be made of it."""
    words = []
    for word in argv:  # -j 4, -j4
        words += ["--jobs"] if word == "-j" else [f"--jobs={word[2:].lstrip('=')}"] if word.startswith("-j") else [word]
    parser = configurator.build_parser(arg_groups(SweepArgs) | arg_groups(TrainArgs), __doc__.split("\n\n")[0])
    given, files, print_config, mistakes = configurator.read_command_line(parser, OWN | ROWS, words)
    wrong += mistakes
    if print_config:
        wrong.append("--print_config: tells of one run; give it to train.py with a run's run.json")
    resolved = configurator.resolve(
        SweepArgs,
        [(configurator.COMMAND_LINE, {name: value for name, value in given.items() if name in OWN})],
        Rules(check=check_own),
    )
    wrong += resolved.errors
    grids = [path for path in files if path.endswith((".yaml", ".yml"))]
    bases = [path for path in files if path not in grids]
    spec: dict[str, Any] = {}
    experiment = False
    if len(grids) > 1:
        wrong.append(f"{', '.join(grids)}: one grid file at a time")
    elif grids:
        spec, based, experiment = read_grid(grids[0], wrong)
        bases = based + bases
    inside = {
        name
        for word in ("zip", "groups")
        for item in grid.mappings(word, spec.get(word), [])
        for values in ([item] if word == "zip" else item.values())
        if isinstance(values, dict)
        for name in values
    }
    for name, value in given.items():
        if name in ROWS:
            if name in inside:
                wrong.append(f"--{name}: the file has it in zip or groups; change it there")
            try:
                spec[name] = cell(ROWS[name], value)
            except UserError as mistake:
                wrong.append(str(mistake))
    layers = []
    for path in bases:
        try:
            layers += config_files.read_layers(path)
        except UserError as mistake:
            wrong.append(str(mistake))
    out = spec.pop("out_dir", None) or f"out/{Path(grids[0]).stem if len(grids) == 1 else 'sweep'}"
    if not isinstance(out, str):
        wrong.append("out_dir: the folder of the sweep; must be one path, not a list")
        out = "out"
    if (Path(out) / "train_config.json").exists():
        wrong.append(f"--out_dir={out}: is the folder of a run; a sweep takes one for all of its runs")
    return Asked(resolved.args, layers, spec, experiment, Path(out).absolute())


# ---------------------------------------------------------------------------------------------------------------------
# the runs


@dataclass(frozen=True)
class Run:
    """One run: its arguments that were given, or follow from others, and have an effect, and how it is started."""

    folder: Path
    told: dict[str, Any]  # what varies, by column
    arguments: dict[str, Any]
    everything: dict[str, Any]  # all arguments with their values
    data: dict[Path, str]  # folder of a dataset -> what is read of it
    unused: list[str]  # those of them that were given without effect
    job: slurm.Job
    evaluations: dict[str, list[str]]  # file beside the run -> flags of evaluate.py

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def effective(self) -> dict[str, Any]:
        """All arguments but those without effect."""
        return {name: value for name, value in self.everything.items() if name not in self.unused}


def normal(name: str, value: Any) -> Any:
    """A value as the argument table has it, so that 1e-4 is 0.0001; anything else as it is."""
    try:
        return configurator.convert(ROWS[name], value)
    except (KeyError, UserError):
        return value


def count_examples(folder: str) -> int:
    """How many examples a dataset's folder has to train on. Raises UserError."""
    path = Path(folder) / "train.jsonl"
    try:
        with path.open("rb") as file:
            return max(1, sum(1 for line in file if line.strip()))
    except OSError:
        raise UserError(
            f"dataset_name={folder}: {path} is not there; num_train_epochs, warmup_ratio and parts of a run need to know how many examples it has"
        ) from None


class Checker:
    """Makes runs of points, and gathers what is wrong with them."""

    def __init__(self, asked: Asked):
        self.asked, self.counts = asked, {}
        self.wrong: dict[str, list[str]] = {}  # mistake -> the points that have it
        self.without: dict[str, int] = {}  # argument that was given -> in how many points it has no effect

    def examples(self, folder: str) -> int:
        if folder not in self.counts:
            self.counts[folder] = count_examples(folder)
        return self.counts[folder]

    def run(self, point: grid.Point) -> Run | None:
        """The run of a point, checked against the argument table."""
        asked, mistakes = self.asked, []
        where = grid.label(point.told, SHORT)
        own = {name: value for name, value in point.values.items() if "." not in name}
        section = {
            name: {key.partition(".")[2]: value for key, value in point.values.items() if key.partition(".")[0] == name}
            for name in (*JOB_SECTIONS, "execution")
        }
        mistakes += slurm.check(section["slurm"], section["environment"])
        try:
            shape = slurm.shape(section["slurm"])
        except UserError as mistake:
            mistakes, shape = [*mistakes, str(mistake)], slurm.Shape(1, 1)
        layers = list(asked.bases)
        if asked.experiment:
            try:
                layers.append((GRID, hf_keys.arguments(point.values, shape.ranks, self.examples)))
            except UserError as mistake:
                mistakes += str(mistake).splitlines()
        layers.append((GRID, own))
        mistakes += [
            f"--{name}: {words}" for name, words in OURS_TO_SAY.items() if any(name in values for _, values in layers)
        ]
        if any(values.get("init_from") == "resume" for _, values in layers):
            mistakes.append("--init_from=resume: the sweep decides which runs go on")
            layers = []
        resolved = train_args.resolve(layers)
        mistakes += [words.removeprefix(f"{GRID}: ") for words in resolved.errors]
        for name in own.keys() & {*resolved.unused}:
            self.without[name] = self.without.get(name, 0) + 1
        evaluations = evaluations_of(section["evaluation"]) if section["evaluation"] else {}
        mistakes += [
            f"evaluation: {words}" for flags in evaluations.values() for words in wrong_evaluation(tuple(flags))
        ]
        venv = section["execution"].get("venv")
        python = str(Path(str(venv)).expanduser() / "bin" / "python") if venv else sys.executable
        if asked.own.launcher == "local" and not os.access(python, os.X_OK):
            mistakes.append(f"venv: {python}: no such program")
        for words in mistakes:
            self.wrong.setdefault(words, []).append(where)
        if mistakes:
            return None
        values = {name: value for name, value in asdict(resolved.args).items() if name not in ("out_dir", "overwrite")}
        differing = {
            name: value for name, value in values.items() if value != ROWS[name].default and name not in resolved.unused
        }
        arguments = {
            name: value
            for name, value in values.items()
            if resolved.source[name] != "default" and name not in resolved.unused
        }
        told = {
            column(name): values.get(column(name), value)
            for name, value in point.told.items()
            if name not in resolved.unused
        }
        aside = {
            name: value
            for name, value in point.told.items()
            if name.startswith(("slurm.", "environment.", "execution.venv"))
        }
        label = grid.label(told, SHORT)
        folder = asked.out_dir / "-".join(
            part for part in (label, grid.fingerprint({**differing, **({"_job": aside} if aside else {})})) if part
        )
        job = slurm.Job(
            section["slurm"], {key: str(value) for key, value in section["environment"].items()}, python, os.getcwd()
        )
        data = dict.fromkeys(resolved.args.folders.values(), resolved.args.data_format)
        return Run(folder, told, arguments, values, data, resolved.unused, job, evaluations)

    def runs(self, points: list[grid.Point]) -> list[Run]:
        """The runs of all points. Two equal ones are a mistake, and so is a folder that holds another run than ours."""
        runs = [run for run in map(self.run, points) if run is not None]
        seen: dict[Path, Run] = {}
        for run in runs:
            if run.folder in seen:
                words = (
                    ", ".join(f"{name}={console.format_value(value)}" for name, value in run.told.items())
                    or "no argument varies"
                )
                self.wrong.setdefault(
                    f"two equal runs: {words}; what differs between them has no effect, or is told twice", []
                ).append("")
            seen[run.folder] = run
            if told := another(run):
                self.wrong.setdefault(told, []).append("")
        return runs

    def tell(self, wrong: list[str], count: int) -> None:
        """Tell all mistakes of `count` points and end, if there are any; each with the first run that has it, unless all have. An argument that has no
        effect in some runs is passed over there; in all it is a mistake."""
        wrong = [
            *wrong,
            *(
                f"--{name}: has an effect only with {ROWS[name].needs.description}"
                for name, times in self.without.items()
                if times == count
            ),
        ]
        lines = [
            f"{words}{f' ({where[0]})' if where[0] and len(where) < count else ''}"
            for words, where in self.wrong.items()
        ]
        if wrong or lines:
            configurator.exit_with_errors(list(dict.fromkeys([*wrong, *lines])))


def column(name: str) -> str:
    """How a varied name is called in tables: a key of an experiment file as the argument that it becomes."""
    key = name.rpartition(".")[2]
    return hf_keys.COLUMNS.get(key, key) if "." in name else name


def evaluations_of(section: dict[str, Any]) -> dict[str, list[str]]:
    """The file and the flags of each evaluation of a training: the product of the section's lists."""
    points = [[]]
    for name, value in section.items():
        points = [
            [*flags, f"--{name}={console.format_value(item) if isinstance(item, bool) else item}"]
            for flags in points
            for item in (value if isinstance(value, list) else [value])
        ]
    return {f"evaluation{f'_{i}' * (len(points) > 1)}.json": flags for i, flags in enumerate(points, 1)}


@functools.cache
def wrong_evaluation(flags: tuple[str, ...]) -> list[str]:
    """What evaluate.py says against these flags; it looks at no run for that."""
    done = subprocess.run([sys.executable, str(EVALUATE), *flags, "--print_config"], capture_output=True, text=True)
    words = done.stderr.strip().removeprefix(f"{EVALUATE.name}: ").splitlines()
    return [word.strip() for word in words[len(words) > 1 :]] if done.returncode else []


def another(run: Run) -> str | None:
    """What to say if the run's folder holds a run with other arguments."""
    try:
        before = json.loads((run.folder / run_state.CONFIG_FILE).read_text(encoding="utf-8"))["_all"]
    except (OSError, ValueError, KeyError):
        return None
    ours = json.loads(json.dumps(run.effective))
    differing = [name for name in ours if name in before and ours[name] != before[name]]
    return f"{run.folder}: holds a run with another {', '.join(differing)}; move it away" if differing else None


def write_config(run: Run) -> None:
    """run.json: a config of train.py."""
    run.folder.mkdir(parents=True, exist_ok=True)
    beside = run.folder / f"{run_state.CONFIG_FILE}.tmp"
    beside.write_text(
        json.dumps({**run.arguments, "_told": run.told, "_all": run.effective}, indent=1) + "\n", encoding="utf-8"
    )
    beside.replace(run.folder / run_state.CONFIG_FILE)


# ---------------------------------------------------------------------------------------------------------------------
# telling


def states(asked: Asked, runs: list[Run]) -> list[run_state.RunStatus]:
    """What became of each run, as its folder and, for those that were handed to it, Slurm's queue tell. Raises UserError when that is needed and can't be read."""
    jobs = slurm.Jobs(asked.out_dir / "slurm" / "jobs.json").ids
    queue = slurm.queue() if jobs.keys() & {run.name for run in runs} else {}
    told = []
    for run in runs:
        outcome, queued = run_state.run_status(run.folder), queue.get(jobs.get(run.name, ""))
        if queued:
            outcome = outcome._replace(state=queued, reason=f"job {jobs[run.name]}")
        told.append(outcome)
    return told


def say_failed(runs: list[Run], told: list[run_state.RunStatus]) -> None:
    for run, outcome in zip(runs, told, strict=True):
        if outcome.state in ("failed", "stopped"):
            print(f"\n{run.name}: {outcome.state}, {outcome.reason}; {run.folder / run_state.LOG_FILE} ends with")
            print("\n".join(f"    {line}" for line in run_state.log_tail(run.folder)))


def table(runs: list[Run], told: list[run_state.RunStatus]) -> tuple[list[str], list[list[Any]]]:
    return summary.rows([run.name for run in runs], [run.told for run in runs], told)


def collect(asked: Asked, runs: list[Run], told: list[run_state.RunStatus]) -> None:
    """Write results.csv and results.md, the best run first."""
    header, rows = table(runs, told)
    best = header.index("best_val_loss")
    rows.sort(key=lambda row: (row[best] is None, row[best] or 0.0))
    asked.out_dir.mkdir(parents=True, exist_ok=True)
    for name, words in (
        ("results.csv", summary.as_csv(header, rows)),
        ("results.md", summary.as_markdown(header, rows)),
    ):
        (asked.out_dir / name).write_text(words, encoding="utf-8")
        print(f"{asked.out_dir / name}", file=sys.stderr)
    print(summary.as_markdown(header, rows), end="")


# ---------------------------------------------------------------------------------------------------------------------
# launchers


def prepare_data(runs: list[Run]) -> None:
    """Make the datasets that are not there yet, once, before runs do so side by side. Raises UserError."""
    from nanoforge.data import token_bins

    for folder, what in dict.fromkeys(item for run in runs for item in run.data.items()):
        token_bins.prepare_if_missing(folder, what)


def commands(run: Run, gpus: int) -> list[list[str]]:
    """What is left to do of a run: train.py from where it is, then evaluate.py. Writes its run.json."""
    outcome = run_state.run_status(run.folder, running=False)
    if outcome.state in run_state.FINISHED:
        return []
    python = [
        run.job.python,
        *(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []),
    ]
    going_on = run_state.has_checkpoint(run.folder)
    if not going_on:
        write_config(run)
    which = (
        ["--init_from=resume", f"--out_dir={run.folder}"]
        if going_on
        else [str(run.folder / run_state.CONFIG_FILE), f"--out_dir={run.folder}", "--overwrite"]
    )
    evaluations = [
        [run.job.python, str(EVALUATE), f"--out_dir={run.folder}", f"--json={run.folder / told}", *flags]
        for told, flags in run.evaluations.items()
    ]
    return evaluations if outcome.is_trained and evaluations else [[*python, str(TRAIN), *which], *evaluations]


def task(run: Run, gpus: int, data: Any = None) -> local.Task:
    return local.Task(run.name, run.folder, lambda: commands(run, gpus), run.job.environment, data)


def places(a) -> tuple[list[list[str]], int]:
    """The GPUs of each place that runs one at a time, and the threads of a run."""
    names = local.gpus()
    jobs = a.jobs or max(1, len(names) // a.gpus_per_run)
    return local.deal(names, jobs, a.gpus_per_run), max(1, (os.cpu_count() or 1) // jobs)


def say_ended(attempt: local.Attempt, total: str) -> run_state.RunStatus:
    """A line about a run that is over."""
    outcome = run_state.run_status(attempt.task.folder)
    words = (
        "is run by another process"
        if attempt.elsewhere
        else outcome.state + (f" ({outcome.reason})" if outcome.reason and outcome.state != "done" else "")
    )
    loss = f", val_loss {outcome.best_val_loss:.4f}" if outcome.best_val_loss is not None else ""
    print(
        f"{total} {attempt.task.name}: {words}{loss}{'' if attempt.status is None else f' in {attempt.seconds:.0f}s'}",
        flush=True,
    )
    return outcome


def run_local(asked: Asked, runs: list[Run]) -> int:
    """Run what is left to do of the runs on this machine. The exit status."""
    seats, threads = places(asked.own)
    prepare_data(runs)
    left = [
        run
        for run, outcome in zip(runs, states(asked, runs), strict=True)
        if outcome.state in (*run_state.NEEDS_WORK, "running")
    ]
    waiting, over = iter(left), [len(runs) - len(left)]
    if over[0]:
        print(f"{over[0]} of {len(runs)} runs are done")

    def ended(attempt: local.Attempt) -> None:
        over[0] += 1
        say_ended(attempt, f"[{over[0]}/{len(runs)}]")

    def draw() -> local.Task | None:
        run = next(waiting, None)
        return run and task(run, min(asked.own.gpus_per_run, len(seats[0]) or 1))

    number = local.run(draw, seats, threads, lambda task: print(f"begins {task.name}", flush=True), ended)
    return finish(asked, runs, number)


def finish(asked: Asked, runs: list[Run], number: int) -> int:
    """Tell how the runs stand; the exit status: 0 if all are done, 128 + the signal that ended the sweep, or 1."""
    told = states(asked, runs)
    print("\n" + summary.as_text(*table(runs, told)))
    say_failed(runs, told)
    return 128 + number if number else int(any(outcome.state not in run_state.FINISHED for outcome in told))


def run_slurm(asked: Asked, runs: list[Run]) -> int:
    """Write a script for each run that is neither done nor in the queue, or one for an array of all that need the same; submit them if asked. The exit status."""
    folder = asked.out_dir / "slurm"
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    lock = local.take(folder)
    if lock is None:
        raise UserError(f"{folder}: another sweep is writing there")
    prepare_data(runs)
    jobs = slurm.Jobs(folder / "jobs.json")
    left = [
        run for run, outcome in zip(runs, states(asked, runs), strict=True) if outcome.state in run_state.NEEDS_WORK
    ]
    groups: dict[str, list[Run]] = {}
    for run in left:
        write_config(run)
        same = json.dumps([run.job, run.evaluations]) if asked.own.array else run.name
        groups.setdefault(same, []).append(run)
    for i, group in enumerate(groups.values(), 1):
        array, first = asked.own.array, group[0]
        name = first.name if not array else "array" + (f"-{i}" if len(groups) > 1 else "")
        folders = [run.folder for run in group]
        script = folder / f"{name}.sh"
        script.write_text(
            slurm.training(
                name if not array else asked.out_dir.name, first.job, folders, TRAIN, logs, array, asked.own.jobs
            ),
            encoding="utf-8",
        )
        followers = []
        for told, flags in first.evaluations.items():
            followers.append(folder / f"{name}.{Path(told).stem}.sh")
            followers[-1].write_text(
                slurm.evaluation(
                    f"evaluate-{name}", first.job, folders, EVALUATE, told, flags, logs, array, asked.own.jobs
                ),
                encoding="utf-8",
            )
        if asked.own.submit:
            job = slurm.submit(script)
            jobs.note({run.name: f"{job}_{i}" if array else job for i, run in enumerate(group)})
            for follower in followers:
                slurm.submit(follower, job, array)
        print(
            f"{f'job {job}: ' if asked.own.submit else ''}{script}"
            + "".join(f"\n    then {follower}" for follower in followers)
        )
    others = f" of {len(runs)}; the others are done or in the queue" if len(left) < len(runs) else ""
    print(f"{len(left)} runs{' submitted' if asked.own.submit else ', for sbatch or --submit'}{others}")
    os.close(lock)
    return 0


def run_tpe(asked: Asked, space: grid.Grid, checker: Checker) -> int:
    """Search by TPE: each place asks for a point when the run before is over. The exit status."""
    from nanoforge.sweeps.search import Tpe

    asked.out_dir.mkdir(parents=True, exist_ok=True)
    search = Tpe(
        asked.out_dir / "study.journal", space, int(asked.own.search.partition(":")[2]), asked.own.search_seed, normal
    )
    seats, threads = places(asked.own)
    active: set[str] = set()
    prepared: set[str] = set()

    def draw() -> local.Task | None:
        drawn = search.ask()
        if drawn is None:
            return None
        trial, point = drawn
        (run,) = checker.runs([point]) or [None]
        checker.tell([], -1)
        if run.name not in prepared:
            prepare_data([run])
            prepared.add(run.name)
        active.add(run.name)
        return task(run, min(asked.own.gpus_per_run, len(seats[0]) or 1), trial)

    def ended(attempt: local.Attempt) -> None:
        if attempt.given_up and attempt.status:
            (attempt.task.folder / run_state.PRUNED_FILE).touch()
        outcome = say_ended(attempt, f"[trial {attempt.task.data.number + 1}]")
        search.tell(
            attempt.task.data, outcome.best_val_loss if outcome.state == "done" else None, outcome.state == "pruned"
        )

    number = local.run(
        draw,
        seats,
        threads,
        lambda task: print(f"begins {task.name}", flush=True),
        ended,
        lambda attempt: search.prune(attempt.task.data, run_state.run_status(attempt.task.folder).evaluations),
    )
    return finish(asked, distinct(checker.runs(search.points())), number)


def distinct(runs: list[Run]) -> list[Run]:
    """Each run once, though a search may have come to it twice."""
    return list({run.folder: run for run in runs}.values())


# ---------------------------------------------------------------------------------------------------------------------


def main(asked: Asked, wrong: list[str]) -> int:
    """Do what was asked for, unless something is wrong; the exit status. Raises UserError."""
    checker = Checker(asked)
    lists, dicts, whole = (
        {name for name, row in ROWS.items() if type(row.default) is kind} for kind in (tuple, dict, int)
    )
    lists |= {f"{section}.{key}" for section in hf_keys.KEY_SECTIONS for key in hf_keys.LIST_KEYS} | {
        name for name in asked.spec if name.startswith("evaluation.")
    }
    space = grid.read(asked.spec, lists, dicts, whole, ("seed", ROWS["seed"].default), wrong)
    kind, _, count = asked.own.search.partition(":")
    points: list[grid.Point] = []
    if kind == "tpe":
        points = [*grid.corners(space), *grid.sample(space, 100, asked.own.search_seed, normal)] if not wrong else []
        for point in points:
            checker.run(point)
        checker.tell(wrong, len(points))
        if asked.own.launcher == "local":
            return run_tpe(asked, space, checker)
        from nanoforge.sweeps.search import Tpe

        journal = asked.out_dir / "study.journal"
        runs = (
            distinct(checker.runs(Tpe(journal, space, int(count), asked.own.search_seed, normal).points()))
            if journal.exists()
            else []
        )
    else:
        if all(isinstance(axis, grid.Range) or axis for axis in space.axes):
            points = (
                grid.sample(space, int(count), asked.own.search_seed, normal)
                if kind == "random" and count.isdigit()
                else grid.product(space, normal, wrong)
            )
        if not wrong and kind == "random" and len(points) < int(count):
            print(f"the grid has only {len(points)} different points", file=sys.stderr)
        if not wrong and not points:
            wrong.append("exclude: leaves no run")
        runs = checker.runs(points)
        checker.tell(wrong, len(points))
    if asked.own.launcher != "none":
        return (run_local if asked.own.launcher == "local" else run_slurm)(asked, runs)
    told = states(asked, runs)
    if asked.own.collect:
        collect(asked, runs, told)
        return 0
    print(summary.as_text(*table(runs, told)))
    print(
        f"{len(runs)} runs in {asked.out_dir}"
        + (
            ""
            if asked.own.status
            else f"; {shlex.join(['python', 'sweep.py', *sys.argv[1:], '--launcher=local'])} runs them"
        )
    )
    if asked.own.status:
        say_failed(runs, told)
        return int(any(outcome.state == "failed" for outcome in told))
    return 0


def command(argv: list[str]) -> None:
    """The whole command; ends with its exit status."""
    wrong: list[str] = []
    try:
        asked = ask(argv, wrong)
    except UserError as mistake:
        configurator.exit_with_errors([*wrong, str(mistake)])
    raise SystemExit(main(asked, wrong))


if __name__ == "__main__":
    configurator.run(command, sys.argv[1:])
