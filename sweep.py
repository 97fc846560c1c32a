"""Many runs of train.py from one description: a grid, checked, run on this machine or by Slurm, shown as a table.

    python sweep.py configs/grids/x.yaml                                     print the runs and exit
    python sweep.py configs/grids/x.yaml --launcher=local -j 4               run them, four at a time
    python sweep.py configs/grids/x.yaml --launcher=slurm --submit           hand them to sbatch
    python sweep.py configs/grids/x.yaml --status                            (or --collect: results.csv and results.md)
    python sweep.py --learning_rate=1e-4,3e-4 --optimizer=adamw,muon         a grid without a file

nanoforge/sweeps/grid.py describes grid files, nanoforge/sweeps/hf_keys.py the experiment files of
rl_salamandra_alignment. Every argument of train.py is possible in a file and on the command line, which wins. The same
command again skips the runs that are done, resumes those that were stopped, and retries those that failed.
docs/sweeps.md has more.
"""

import dataclasses
import functools
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configurator
import train_args
from configurator import ArgSpec, Resolved, Rules, arg, arg_groups, arg_specs, arg_table, with_set, with_value
from nanoforge import config_files, run_state
from nanoforge.console import format_value, plural
from nanoforge.data import hub_datasets
from nanoforge.errors import UserError
from nanoforge.posttraining.objective_specs import OBJECTIVES
from nanoforge.run_dir import RECORD_FILE
from nanoforge.sweeps import grid, grid_file, hf_keys, inputs, launch, local, plan, slurm, summary
from nanoforge.sweeps.plan import PlannedRun, Scripts
from nanoforge.sweeps.search import SearchSpace, TPESearch, parse_search
from train_args import TrainArgs

ROOT = Path(__file__).resolve().parent
TRAIN = ROOT / "train.py"
EVALUATE = ROOT / "evaluate.py"

SHORT_NAMES = {"learning_rate": "lr", "weight_decay": "wd", "batch_size": "bs"}  # in the names of folders
GRID = "grid"  # a source of values, as the path of a config file is one
DECIDED_BY_SWEEP = {
    "overwrite": "the sweep decides which runs start over",
    "eval_only": "writes nothing that a sweep could show",
}
JOB_PREFIXES = (
    "slurm.",
    "environment.",
    "execution.venv",
    "execution.setup",
    "evaluation.",
)  # of values that are no arguments
N_CHECKED_POINTS = 100  # random ones, before a search begins


# ---------------------------------------------------------------------------------------------------------------------
# arguments


@arg_table
class SweepArgs:
    """sweep (then all arguments of train.py; values separated by commas, and those of a [list], vary)"""

    launcher: str = arg(
        "none",
        "none: print the runs; local: run them on this machine; slurm: write scripts for sbatch",
        choices=("none", "local", "slurm"),
    )
    jobs: int = arg(
        0, "-j: number of runs at a time (0: as many as the GPUs suffice for, or one; in a job array: all)", low=0
    )
    gpus_per_run: int = arg(
        1, "GPUs of each run; several run it under torchrun", low=1, needs=with_value("launcher", "local")
    )
    array: bool = arg(False, "one job array instead of a job for each run", needs=with_value("launcher", "slurm"))
    submit: bool = arg(False, "hand the scripts to sbatch", needs=with_value("launcher", "slurm"))
    status: bool = arg(False, "print the state of the runs")
    collect: bool = arg(False, "write results.csv and results.md, and print the latter")
    search: str = arg(
        "",
        "random:N (N random points of the grid, whose lists may be ranges {low: 1e-5, high: 1e-2, log: true}) "
        "or tpe:N (optuna; prunes runs that are worse than the median)",
    )
    search_seed: int = arg(0, "seed of the random points", low=0, needs=with_set("search"))


SWEEP_SPECS = arg_specs(SweepArgs)
TRAIN_SPECS = arg_specs(TrainArgs)
ALIASES = {alias: spec.name for spec in TRAIN_SPECS.values() for alias in spec.alias}


def check_sweep_args(args: SweepArgs, source: dict[str, str]) -> Iterator[str]:
    """The errors of the sweep's arguments: values that are not valid, and conflicts."""
    search = parse_search(args.search)
    if args.search and search is None:
        yield f"--search={args.search}: must be random:N or tpe:N"
    if search and search.method == "tpe" and args.launcher == "slurm":
        yield "--search=tpe: each point depends on earlier runs; use --launcher=local, on Slurm inside of one job"
    if sum([args.launcher != "none", args.status, args.collect]) > 1:
        yield "--launcher, --status, --collect: only one of them is possible"


# ---------------------------------------------------------------------------------------------------------------------
# the request: command line and files


@dataclass(frozen=True)
class Request:
    """What the command line and the grid file ask for."""

    sweep_args: SweepArgs
    base_configs: list[tuple[str, dict[str, Any]]]  # (path, values) of config files, the later the stronger
    spec: dict[str, Any]  # name or "section.key" -> value, of the file with the command line over it
    is_experiment: bool  # the file is one of rl_salamandra_alignment
    out_dir: Path

    @property
    def slurm_dir(self) -> Path:
        return self.out_dir / "slurm"

    @property
    def study_path(self) -> Path:
        return self.out_dir / "study.journal"


def parse_cell(spec: ArgSpec, value: Any) -> Any:
    """A flag's value in a grid: a list if it has commas or brackets, a range if it has braces. Raises UserError."""
    text = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(text, str):
        is_range = text.startswith("{") and spec.kind in (int, float)
        if is_range or text.startswith("["):
            return config_files.read_value(text)
    if spec.kind in (tuple, dict):
        return value
    if "," not in value:
        return canonical(spec.name, value)
    return value.split(",")


def spell_out_jobs(argv: list[str]) -> list[str]:
    """-j 4, -j4 and -j=4 as --jobs, which the parser knows."""
    spelled_out = []
    for text in argv:
        if text == "-j":
            spelled_out.append("--jobs")
        elif text.startswith("-j"):
            spelled_out.append(f"--jobs={text[2:].lstrip('=')}")
        else:
            spelled_out.append(text)
    return spelled_out


def read_base_configs(paths: list[str]) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """(path, values) of each config file and of its bases, and the errors."""
    layers = []
    errors = []
    for path in paths:
        try:
            layers += config_files.read_layers(path)
        except UserError as error:
            errors.append(str(error))
    return layers, errors


def check_out_dir(out_dir: Any) -> list[str]:
    """The errors of the folder of a sweep."""
    if not isinstance(out_dir, str):
        return ["out_dir: the folder of the sweep must be one path, not a list"]
    if (Path(out_dir) / RECORD_FILE).exists():
        return [f"--out_dir={out_dir}: is the folder of a single run; choose another one for the sweep"]
    return []


def lay_flags_over(spec: dict[str, Any], flags: dict[str, Any]) -> list[str]:
    """Set train.py's flags, as typed, in the values of a file; the errors."""
    errors = []
    inside = grid_file.names_in_zip_and_groups(spec)
    for name, value in flags.items():
        if name in inside:
            errors.append(f"--{name}: the file has it in zip or groups; change it there")
        for key in hf_keys.keys_of_argument(name):
            if isinstance(spec.get(key), list):
                del spec[key]  # of an experiment file; it would vary without effect
        try:
            spec[name] = parse_cell(TRAIN_SPECS[name], value)
        except UserError as error:
            errors.append(str(error))
    if "seed" in flags and (isinstance(spec.get("seed"), list) or isinstance(spec.get("seeds"), list)):
        spec.pop("seeds", None)  # the flag says which seeds; of a number of seeds it is the first
    return errors


def read_request(argv: list[str]) -> tuple[Request, list[str]]:
    """Read the command line and the files that it names: the request, and the errors. Raises UserError."""
    # 1. The command line: arguments of the sweep, arguments of train.py, files.
    parser = configurator.build_parser(arg_groups(SweepArgs) | arg_groups(TrainArgs), (__doc__ or "").split("\n\n")[0])
    command_line = configurator.read_command_line(
        parser, SWEEP_SPECS | TRAIN_SPECS, spell_out_jobs(argv), train_args.RULES.hints
    )
    errors = list(command_line.errors)
    if command_line.print_config:
        errors.append("--print_config: describes one run; use it with train.py and the run.json of a run")
    sweep_values = {name: value for name, value in command_line.values.items() if name in SWEEP_SPECS}
    resolved = configurator.resolve(
        SweepArgs, [(configurator.COMMAND_LINE, sweep_values)], Rules(check=check_sweep_args)
    )
    errors += resolved.errors

    # 2. The grid file.
    grid_paths = [path for path in command_line.files if path.endswith((".yaml", ".yml"))]
    file = grid_file.EMPTY
    if len(grid_paths) > 1:
        errors.append(f"{', '.join(grid_paths)}: only one grid file at a time is possible")
    elif grid_paths:
        try:
            file = grid_file.read_grid_file(grid_paths[0], TRAIN_SPECS, ALIASES)
        except UserError as error:
            errors.append(str(error))
    errors += file.errors
    spec = dict(file.spec)

    # 3. The flags, over the file's values.
    flags = {name: value for name, value in command_line.values.items() if name in TRAIN_SPECS}
    errors += lay_flags_over(spec, flags)

    # 4. The config files underneath, and the folder.
    config_paths = [path for path in command_line.files if path not in grid_paths]
    base_configs, config_errors = read_base_configs([*file.base_configs, *config_paths])
    default_name = Path(grid_paths[0]).stem if len(grid_paths) == 1 else "sweep"
    out_dir = canonical("out_dir", spec.pop("out_dir", None) or f"out/{default_name}")
    errors += config_errors + check_out_dir(out_dir)
    request = Request(
        sweep_args=resolved.args,
        base_configs=base_configs,
        spec=spec,
        is_experiment=file.is_experiment,
        out_dir=Path(str(out_dir)).absolute(),
    )
    return request, errors


# ---------------------------------------------------------------------------------------------------------------------
# from points to runs


def canonical(name: str, value: Any) -> Any:
    """A value as the argument table has it, so that 1e-4 equals 0.0001; one that it refuses stays as it is."""
    try:
        return configurator.convert(TRAIN_SPECS[name], value)
    except (KeyError, UserError):
        return value


def argument_types(spec: dict[str, Any], base_configs: Sequence[tuple[str, dict[str, Any]]] = ()) -> grid.ArgumentTypes:
    """What the grid has to know about the arguments in a request."""
    seeds = [canonical("seed", values["seed"]) for _, values in base_configs if "seed" in values]

    def names_of(kind: type) -> list[str]:
        return [name for name, train_spec in TRAIN_SPECS.items() if train_spec.kind is kind]

    list_keys = [f"{section}.{key}" for section in hf_keys.KEY_SECTIONS for key in hf_keys.LIST_KEYS]
    evaluation_keys = [name for name in spec if name.startswith("evaluation.")]  # a list makes several evaluations
    mapping_keys = [  # a mapping is the value of such a key, unless it says low or high
        name
        for name, value in spec.items()
        if "." in name and isinstance(value, dict) and not value.keys() & {"low", "high"}
    ]
    return grid.ArgumentTypes(
        lists=frozenset([*names_of(tuple), *list_keys, *evaluation_keys]),
        mappings=frozenset([*names_of(dict), *mapping_keys]),
        integers=frozenset(names_of(int)),
        seed_name="seed",
        default_seed=seeds[-1] if seeds else TRAIN_SPECS["seed"].default,
    )


def read_defaults(out_dir: Path) -> dict[str, Any]:
    """The defaults with which a sweep began, as far as the runs in its folder agree; else those of the table."""
    defaults = {name: spec.default for name, spec in TRAIN_SPECS.items()}
    found: dict[str, list[Any]] = {}
    for recorded in plan.recorded_defaults(out_dir):
        for name, value in recorded.items():
            if name in defaults:
                found.setdefault(name, []).append(canonical(name, value))
    agreed = {name: values[0] for name, values in found.items() if all(value == values[0] for value in values)}
    return defaults | agreed


@functools.cache
def evaluation_errors(flags: tuple[str, ...]) -> list[str]:
    """What evaluate.py reports for these flags; it looks at no run for that."""
    command = [sys.executable, str(EVALUATE), *flags, "--print_config"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return []
    lines = result.stderr.strip().removeprefix(f"{EVALUATE.name}: ").splitlines()
    if len(lines) > 1:
        del lines[0]  # the number of errors
    return [line.strip() for line in lines]


def rank_errors(args: TrainArgs, rank_counts: list[int]) -> list[str]:
    """An error for each number of ranks that does not divide the batch, which the run would report on its nodes."""
    groups = args.global_batch_size // args.group_size
    unit = "sequences" if args.group_size == 1 else f"groups of {args.group_size} completions"
    return [
        f"slurm: {n_ranks} ranks (nodes x their processes) don't divide the {groups} {unit} of a step; "
        "change nodes, gres, --batch_size or --gradient_accumulation_steps"
        for n_ranks in rank_counts
        if groups % n_ranks
    ]


def count_examples(name: str, algorithm: str) -> int:
    """The training examples in a dataset's folder, or of a dataset of the hub. Raises UserError."""
    if not hub_datasets.is_hub(name):
        return hf_keys.count_examples(name, algorithm)
    numbered_rows = hub_datasets.sides(name, TrainArgs.val_fraction)["train"].numbered_rows()
    _, first = next(numbered_rows, (0, {}))
    n_rows = 1 + sum(1 for _ in numbered_rows)
    return 2 * n_rows if algorithm == "kto" and hf_keys.is_pair(first) else n_rows


class Planner:
    """Makes runs of points, checked with the argument table, and collects the errors of all points."""

    def __init__(self, request: Request):
        self.request = request
        self.defaults = read_defaults(request.out_dir)
        self.count_examples = functools.cache(count_examples)
        self.args: dict[Path, TrainArgs] = {}  # of each planned run, by its folder
        self.checked_rows: dict[tuple, str] = {}  # what was read -> the error, or ""
        self.errors = plan.PointErrors()
        self.n_unused: Counter[str] = Counter()  # argument -> points that set it without effect

    def plan_runs(self, points: list[grid.Point]) -> list[PlannedRun]:
        """The runs of all points. Equal runs are an error, and so is a folder that holds another run."""
        planned = [self.plan_run(point) for point in points]
        runs = [run for run in planned if run is not None]
        folders: set[Path] = set()
        for run in runs:
            if run.folder in folders:
                values = [f"{name}={format_value(value)}" for name, value in run.varying.items()]
                self.errors.add(
                    f"two equal runs: {', '.join(values) or 'no argument varies'}; "
                    "what differs between them has no effect, or is repeated"
                )
            folders.add(run.folder)
            conflict = plan.conflicting_run(run)
            if conflict:
                self.errors.add(conflict)
        return runs

    def plan_run(self, point: grid.Point) -> PlannedRun | None:
        """The run of a point, or None if it has errors."""
        arguments, sections = plan.split_sections(point.values)
        # 1. How the run is started.
        job, shape, errors = self.plan_job(sections)
        # 2. Its arguments, as train.py would resolve them.
        layers, layer_errors = self.layers_of(point, arguments, shape.ranks)
        resolved = train_args.resolve(layers)
        errors += layer_errors
        errors += [error.removeprefix(f"{GRID}: ") for error in resolved.errors]
        self.n_unused.update(name for name in arguments if name in resolved.unused)
        if self.request.sweep_args.launcher != "local" and not errors:
            errors += rank_errors(resolved.args, slurm.rank_counts(sections.get("slurm", {})))
        # 3. The evaluations that follow it.
        evaluations = plan.evaluation_flags(sections.get("evaluation", {}))
        for flags in evaluations.values():
            errors += [f"evaluation: {error}" for error in evaluation_errors(tuple(flags))]
        for error in errors:
            self.errors.add(error, grid.label(point.varying, SHORT_NAMES))
        if errors:
            return None
        return self.build_run(point, resolved, job, evaluations)

    def plan_job(self, sections: dict[str, dict[str, Any]]) -> tuple[slurm.Job, slurm.Shape, list[str]]:
        """How a point's run is started, on how many nodes and processes, and the errors."""
        directives = sections.get("slurm", {})
        environment = sections.get("environment", {})
        errors = slurm.section_errors(directives, environment)
        try:
            shape = slurm.shape_of(directives)
        except UserError as error:
            errors.append(str(error))
            shape = slurm.Shape(1, 1)
        venv = sections.get("execution", {}).get("venv")
        python = str(Path(str(venv)).expanduser() / "bin" / "python") if venv else sys.executable
        if self.request.sweep_args.launcher == "local" and not os.access(python, os.X_OK):
            errors.append(f"venv: {python}: no such program")
        text_environment = {name: str(value) for name, value in environment.items()}
        setup = str(sections.get("execution", {}).get("setup", ""))
        return slurm.Job(directives, text_environment, python, os.getcwd(), setup), shape, errors

    def layers_of(
        self, point: grid.Point, arguments: dict[str, Any], ranks: int
    ) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
        """The layers of values that make a run's arguments, the later the stronger, and the errors."""
        changed = {name: value for name, value in self.defaults.items() if value != TRAIN_SPECS[name].default}
        layers = [(configurator.DEFAULT, changed), *self.request.base_configs]
        errors = []
        if self.request.is_experiment:
            try:
                layers.append((GRID, hf_keys.to_arguments(point.values, ranks, self.count_examples)))
            except UserError as error:
                errors += str(error).splitlines()
        else:
            layers.append((GRID, hf_keys.wandb_arguments(point.values)))
        layers.append((GRID, arguments))
        for name, reason in DECIDED_BY_SWEEP.items():
            if any(name in values for _, values in layers):
                errors.append(f"--{name}: {reason}")
        if any(values.get("init_from") == "resume" for _, values in layers):
            return [], [*errors, "--init_from=resume: the sweep decides which runs are resumed"]
        return layers, errors

    def build_run(
        self, point: grid.Point, resolved: Resolved, job: slurm.Job, evaluations: dict[str, list[str]]
    ) -> PlannedRun:
        """The run of a point without errors."""
        # 1. The arguments with an effect; those that differ from the defaults identify the run.
        values = dataclasses.asdict(resolved.args)
        effective = {
            name: value
            for name, value in values.items()
            if name not in ("out_dir", "overwrite") and name not in resolved.unused
        }
        arguments = {
            name: value
            for name, value in effective.items()
            if resolved.source[name] != configurator.DEFAULT or value != TRAIN_SPECS[name].default
        }
        identity = {name: value for name, value in effective.items() if value != self.defaults[name]}
        # 2. What varies: as columns, and where it is no argument, as a part of the identity.
        varying = {}
        job_values = {}
        for name, value in point.varying.items():
            if name not in resolved.unused:
                column = hf_keys.column(name)
                varying[column] = values.get(column, value)
            if name.startswith(("slurm.", "environment.", "execution.venv")):
                job_values[name] = value
        if job_values:
            identity["_job"] = job_values
        # 3. The run. A tracker shows several runs under names of their own.
        folder = plan.run_folder(self.request.out_dir, varying, identity, SHORT_NAMES)
        if arguments.get("wandb_run_name") and varying:
            arguments["wandb_run_name"] += f"-{folder.name}"
        self.args[folder] = resolved.args
        return PlannedRun(
            folder=folder,
            varying=varying,
            arguments=arguments,
            effective=effective,
            datasets=dict.fromkeys(resolved.args.folders.values(), resolved.args.data_format),
            job=job,
            evaluations=evaluations,
        )

    def check_rows(self, args: TrainArgs) -> None:
        """Read the rows of examples as the run will, and import its rewards, once for equal runs. Raises UserError."""
        import builders  # here, since they import torch
        from nanoforge.posttraining import rewards

        may_have_template = args.init_from != "scratch" or args.chat_template != ""
        read = (args.objective, args.prompt_format, args.target_field, args.bad_rows, args.reward, may_have_template)
        sources = (args.train_file, args.validation_file, args.hub_names, args.val_fraction, args.columns)
        key = (*read, *sources, *args.folders.values())
        if key not in self.checked_rows:
            self.checked_rows[key] = ""
            try:
                log = functools.partial(print, file=sys.stderr)
                builders.read_rows(args, log, has_chat_template=may_have_template)
                if args.objective == "grpo":
                    rewards.parse_rewards(args.reward)
            except UserError as error:
                self.checked_rows[key] = str(error)
        if self.checked_rows[key]:
            raise UserError(self.checked_rows[key])

    def exit_if_errors(self, errors: list[str], n_points: int = 0) -> None:
        """Exit with all errors, if there are any.

        An argument that has no effect in any of the `n_points` is an error. In single points it may have none.
        """
        unused = []
        for name, count in self.n_unused.items():
            needs = TRAIN_SPECS[name].needs
            if needs and count == n_points:
                unused.append(f"--{name}: has an effect only with {needs.description}")
        messages = [*errors, *unused, *self.errors.messages(n_points)]
        if messages:
            configurator.exit_with_errors(list(dict.fromkeys(messages)))


# ---------------------------------------------------------------------------------------------------------------------
# what is done with the runs


def report(request: Request, runs: list[PlannedRun]) -> int:
    """Print the table of runs, with --status their failures too, or with --collect write it; the exit status."""
    statuses = plan.run_statuses(runs, request.slurm_dir)
    if request.sweep_args.collect:
        summary.write_results(plan.table_of_runs(runs, statuses), request.out_dir)
        return 0
    plan.print_table(runs, statuses)
    line = f"{plural(len(runs), 'run')} in {request.out_dir}"
    if request.sweep_args.status:
        print(line)
        plan.print_failed(runs, statuses, request.slurm_dir)
        return int(any(status.state in ("failed", "diverged") for status in statuses))
    command = shlex.join(["python", "sweep.py", *sys.argv[1:], "--launcher=local"])
    print(f"{line}; to run them: {command}")
    return 0


def begin_sweep(request: Request, planner: Planner) -> None:
    """Make the sweep's folder, and print the defaults that have changed since it began. Raises UserError."""
    try:
        request.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir={request.out_dir}: can't be written ({error.strerror})") from None
    for name, value in planner.defaults.items():
        if value != TRAIN_SPECS[name].default:
            now = format_value(TRAIN_SPECS[name].default)
            print(f"--{name}={format_value(value)}: the default with which this sweep began; it is {now} now")


def prepare_data(runs: list[PlannedRun]) -> None:
    """Prepare missing datasets, once, before several runs would do it at the same time. Raises UserError."""
    from nanoforge.data import token_bins

    datasets = dict.fromkeys(item for run in runs for item in run.datasets.items())
    for folder, data_format in datasets:
        token_bins.prepare_if_missing(folder, data_format)


def check_inputs(planner: Planner, runs: list[PlannedRun]) -> None:
    """Exit with all errors in what the unfinished runs will read: examples, rewards, the base model, a login."""
    errors: list[str] = []
    for run in runs:
        if run_state.run_status(run.folder, running=False).state in run_state.FINISHED:
            continue
        args = planner.args[run.folder]
        errors.append(inputs.model_error(args.init_from) or "")
        if args.wandb_log:
            errors.append(inputs.wandb_error({**os.environ, **run.job.environment}, Path.home()) or "")
        if OBJECTIVES[args.objective].reads_examples:
            try:
                planner.check_rows(args)
            except UserError as error:
                errors.append(str(error))
    found = [error for error in dict.fromkeys(errors) if error]
    if found:
        configurator.exit_with_errors(found)


def finish(request: Request, runs: list[PlannedRun], signal_number: int) -> int:
    """Print how the runs ended; the exit status: 0 if all are done, 128 + the signal that ended the sweep, or 1."""
    statuses = plan.run_statuses(runs, request.slurm_dir)
    print()
    plan.print_table(runs, statuses)
    plan.print_failed(runs, statuses, request.slurm_dir)
    if signal_number:
        return 128 + signal_number
    return int(any(status.state not in ("done", "pruned") for status in statuses))


def run_local(request: Request, planner: Planner, runs: list[PlannedRun]) -> int:
    """Run what is left to do of the runs on this machine; the exit status."""
    slots = local.gpu_slots(request.sweep_args.jobs, request.sweep_args.gpus_per_run)
    prepare_data(runs)
    check_inputs(planner, runs)
    begin_sweep(request, planner)
    statuses = plan.run_statuses(runs, request.slurm_dir)
    unfinished = [
        run
        for run, status in zip(runs, statuses, strict=True)
        if status.state in run_state.NEEDS_WORK or status.state == "running"
    ]
    n_done = len(runs) - len(unfinished)
    if n_done:
        print(f"{n_done} of {plural(len(runs), 'run')} are done")
    launcher = launch.GridLauncher(unfinished, n_total=len(runs), scripts=Scripts(TRAIN, EVALUATE))
    return finish(request, runs, launcher.run(slots))


def run_tpe(request: Request, space: grid.Grid, planner: Planner, n_trials: int) -> int:
    """Search on this machine: each slot asks for a point when its run before has ended. The exit status."""

    def plan_point(point: grid.Point) -> PlannedRun:
        runs = planner.plan_runs([point])
        planner.exit_if_errors([])
        prepare_data(runs)
        check_inputs(planner, runs)
        return runs[0]

    begin_sweep(request, planner)
    search = open_search(request, space, planner, n_trials)
    slots = local.gpu_slots(request.sweep_args.jobs, request.sweep_args.gpus_per_run)
    signal_number = launch.TPELauncher(search, plan_point, Scripts(TRAIN, EVALUATE)).run(slots)
    return finish(request, plan.distinct(planner.plan_runs(search.points())), signal_number)


def run_slurm(request: Request, planner: Planner, runs: list[PlannedRun]) -> int:
    """Write scripts for the runs that are neither done nor in the queue, and submit them if asked; the exit status."""
    # 1. What the runs will read.
    prepare_data(runs)
    check_inputs(planner, runs)
    # 2. One sweep at a time writes here.
    begin_sweep(request, planner)
    launcher = launch.SlurmLauncher(
        folder=request.slurm_dir,
        sweep_name=request.out_dir.name,
        scripts=Scripts(TRAIN, EVALUATE),
        is_array=request.sweep_args.array,
        max_at_once=request.sweep_args.jobs,
    )
    launcher.log_dir.mkdir(parents=True, exist_ok=True)
    lock = local.acquire_lock(request.slurm_dir)
    if lock is None:
        raise UserError(f"{request.slurm_dir}: another sweep is writing there; wait until it has ended")
    # 3. What is left to do.
    statuses = plan.run_statuses(runs, request.slurm_dir)
    pending = [run for run, status in zip(runs, statuses, strict=True) if status.state in run_state.NEEDS_WORK]
    for run in pending:
        plan.write_config(run)
    # 4. The scripts.
    launcher.launch(pending, submit=request.sweep_args.submit)
    os.close(lock)
    action = "submitted" if request.sweep_args.submit else "written, for sbatch or --submit"
    line = f"{plural(len(pending), 'run')} {action}"
    if len(pending) < len(runs):
        line += f" of {len(runs)}; the others are done or in the queue"
    print(line)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# the points, and main


def points_of(request: Request, space: grid.Grid) -> tuple[list[grid.Point], list[str]]:
    """The points of a grid, or of a random search over it, and the errors."""
    if space.has_empty_axis:
        return [], []  # the grid has an error already
    errors: list[str] = []
    search = parse_search(request.sweep_args.search)
    if search is None:
        points, errors = grid.product(space, canonical)
    else:
        points = grid.sample(space, search.n_points, request.sweep_args.search_seed, canonical)
        if len(points) < search.n_points:
            print(f"the grid has only {plural(len(points), 'different point')}", file=sys.stderr)
    if not points and not errors:
        errors.append("exclude: leaves no run")
    return points, errors


def plan_grid(request: Request, space: grid.Grid, planner: Planner, errors: list[str]) -> list[PlannedRun]:
    """All runs of a grid or of a random search; exits with all errors, if there are any."""
    points, point_errors = points_of(request, space)
    runs = planner.plan_runs(points)
    planner.exit_if_errors([*errors, *point_errors], len(points))
    return runs


def check_search_space(request: Request, space: grid.Grid, planner: Planner, errors: list[str]) -> None:
    """Exit with the errors of a TPE search, if there are any: its corners and some random points are checked for it."""
    points: list[grid.Point] = []
    if not errors:
        points += grid.corners(space)
        points += grid.sample(space, N_CHECKED_POINTS, request.sweep_args.search_seed, canonical)
    for point in points:
        planner.plan_run(point)
    planner.exit_if_errors(errors, len(points))


def open_search(request: Request, space: grid.Grid, planner: Planner, n_trials: int) -> TPESearch:
    """The study of a TPE search, which the same command again continues."""
    # All arguments with an effect in the first point, and those that may have one in others.
    first_run = planner.plan_run(next(grid.corners(space)))
    assert first_run is not None, "the corners are checked"
    fixed: dict[str, Any] = {}
    for values in [*(values for _, values in request.base_configs), space.fixed]:
        names = {ALIASES.get(name, name): value for name, value in values.items()}
        fixed |= {name: canonical(name, value) for name, value in names.items() if name != "out_dir"}
    fixed |= first_run.effective
    varying = {name for axis in space.axes for name in grid.argument_names(axis)}
    identity = {
        name: value
        for name, value in fixed.items()
        if name not in varying
        and not name.startswith(JOB_PREFIXES)
        and (name not in TRAIN_SPECS or value != planner.defaults[name])
    }
    return TPESearch(
        request.study_path,
        SearchSpace(space, identity, canonical),
        n_trials=n_trials,
        seed=request.sweep_args.search_seed,
    )


def runs_of_search(request: Request, space: grid.Grid, planner: Planner, n_trials: int) -> list[PlannedRun]:
    """The runs that a TPE search has proposed so far."""
    if not request.study_path.exists():
        return []
    points = open_search(request, space, planner, n_trials).points()
    return plan.distinct(planner.plan_runs(points))


def main(request: Request, errors: list[str]) -> int:
    """Do what was asked for, or exit with the errors; the exit status. Raises UserError."""
    space, grid_errors = grid.parse_grid(request.spec, argument_types(request.spec, request.base_configs))
    errors = errors + grid_errors
    planner = Planner(request)
    search = parse_search(request.sweep_args.search)
    launcher = request.sweep_args.launcher
    if search and search.method == "tpe":
        check_search_space(request, space, planner, errors)
        if launcher == "local":
            return run_tpe(request, space, planner, search.n_points)
        runs = runs_of_search(request, space, planner, search.n_points)
    else:
        runs = plan_grid(request, space, planner, errors)
    if launcher == "local":
        return run_local(request, planner, runs)
    if launcher == "slurm":
        return run_slurm(request, planner, runs)
    return report(request, runs)


def command(argv: list[str]) -> None:
    """Read the request, do it, and exit with the status."""
    try:
        request, errors = read_request(argv)
    except UserError as error:
        configurator.exit_with_errors([str(error)])
    raise SystemExit(main(request, errors))


if __name__ == "__main__":
    configurator.run(command, sys.argv[1:])
