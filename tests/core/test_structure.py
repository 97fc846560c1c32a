"""The law of imports (docs/ARCHITECTURE.md), read from the source: who may import whom, and what imports no torch."""

import ast
import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import configurator

PACKAGE = ROOT / "nanoforge"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
COMMANDS = sorted(ROOT.glob("*.py"))
MAY_IMPORT = {  # wing -> the wings that it may import, itself included; "" is the core
    "": {""},
    "data": {"", "data"},
    "training": {"", "data", "training"},
    "models": {"", "data", "training", "models"},
    "posttraining": {"", "data", "training", "models", "posttraining"},
    "serving": {"", "data", "training", "models", "posttraining", "serving"},
    "sweeps": {"", "sweeps"},
    "report": {"", "report"},
}
TORCH_FREE = (
    "errors",
    "files",
    "rng",
    "console",
    "launcher",
    "other_names",
    "help_pages",
    "completion",
    "environment",
    "run_dir",
    "run_state",
    "restarts",
    "data.tables",
    "posttraining.example_rows",
    "posttraining.prompt_format",
    "posttraining.objective_specs",
    "serving.requests",
    "sweeps",
    "report",
)


def module_name(path: Path) -> str:
    """nanoforge/data/rng.py -> data.rng"""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def wing_of(name: str) -> str:
    return name.rpartition(".")[0]


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """The dotted names that a file imports anywhere, `from a import b` as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def imported_modules(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    return {name.removeprefix("nanoforge.") for name in imported(path)} & {module_name(module) for module in MODULES}


def test_every_wing_imports_only_those_below_it():
    assert {wing_of(module_name(path)) for path in MODULES} == set(MAY_IMPORT)
    for path in MODULES:
        allowed = MAY_IMPORT[wing_of(module_name(path))]
        upward = {name for name in imported_modules(path) if wing_of(name) not in allowed}
        assert not upward, f"{path} imports {upward}"


def test_the_package_imports_no_root_script():
    scripts = {path.stem for path in COMMANDS}
    for path in MODULES:
        assert not {name.split(".")[0] for name in imported(path)} & scripts, path


def test_no_module_is_in_an_import_cycle():
    imports = {module_name(path): imported_modules(path) for path in MODULES}
    sorted_modules: set[str] = set()
    while unsorted := imports.keys() - sorted_modules:
        ready = {name for name in unsorted if imports[name] <= sorted_modules}
        assert ready, f"a cycle among {unsorted}"
        sorted_modules |= ready


def test_no_room_holds_more_than_a_quarter_of_the_house():
    """A room is a wing, or the root; measured in lines of code."""
    lines: dict[str, int] = {}
    for path in [*MODULES, *COMMANDS]:
        room = path.relative_to(ROOT).parent.as_posix()
        lines[room] = lines.get(room, 0) + len(path.read_text().splitlines())
    wings = {room: count for room, count in lines.items() if room != "."}
    assert max(wings.values()) <= sum(lines.values()) / 4, lines


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.py"), *COMMANDS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_have_a_docstring_and_do_nothing_at_import(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or path.name == "__init__.py"
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    allowed = (ast.Import, ast.ImportFrom, *functions, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
    for node in tree.body[1:]:
        assert isinstance(node, allowed), f"{path.name}:{node.lineno}"
        assert not isinstance(node, ast.If) or "__name__" in ast.unparse(node.test)


def test_torch_free_modules_import_no_torch():
    names = [module_name(path) for path in MODULES]
    light = [name for name in names if any(name == free or name.startswith(f"{free}.") for free in TORCH_FREE)]
    code = f"import sys; {'; '.join(f'import nanoforge.{name}' for name in light)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False"], done.stderr


def test_arguments_and_configs_import_no_torch():
    code = "import sys, train_args; train_args.parse([]); print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_the_configurator_knows_no_argument_by_name():
    import train_args

    strings = {
        node.value
        for node in ast.walk(ast.parse((ROOT / "configurator.py").read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not strings & configurator.arg_specs(train_args.TrainArgs).keys()


def test_every_row_of_the_table_is_used():
    """Its name is an attribute in the code that trains, or a field of the model's config; being checked is no use."""
    import train_args
    from model import GPTConfig

    used = {field.name for field in dataclasses.fields(GPTConfig)}
    derived = [
        node
        for node in ast.parse((ROOT / "train_args.py").read_text()).body
        if getattr(node, "name", "") in ("TrainArgs", "derive")
    ]
    for tree in (
        *(ast.parse((ROOT / file).read_text()) for file in ("train.py", "start.py", "run.py", "builders.py")),
        *derived,
    ):
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert configurator.arg_specs(train_args.TrainArgs).keys() <= used


def test_choices_of_the_table_are_the_entries_of_the_registries():
    import model
    import train_args
    from nanoforge.models import adapters
    from nanoforge.posttraining import losses, prompt_format
    from nanoforge.training import optimizers, schedules

    specs = configurator.arg_specs(train_args.TrainArgs)
    registries = {
        "norm": model.NORMS,
        "position": model.POSITIONS,
        "mlp": model.MLPS,
        "lr_scheduler": schedules.SCHEDULES,
        "dpo_loss": losses.DPO_LOSSES,
        "loss_type": losses.AGGREGATIONS,
        "prompt_provider": adapters.PROVIDERS,
        "overflow": prompt_format.OVERFLOWS,
    }
    for name, registry in registries.items():
        assert set(specs[name].choices) == set(registry)
    smoothed = {name for name, loss in losses.DPO_LOSSES.items() if loss.label_smoothing}
    assert set(train_args.SMOOTHED) == smoothed
    assert set(train_args.OPTIMIZERS) == {*optimizers.OPTIMIZERS, "muon"}
    assert all(name in specs["activation"].help for name in model.ACTIVATIONS)


MAKES_OR_READS = re.compile(r"prepare\.py .*--(?:name|out_dir)=(?:data/)?([\w.-]+)|--dataset=(?!hf:)([\w.-]+)")


def test_the_docs_train_on_datasets_that_something_makes() -> None:
    """A folder of data/ with its prepare.py, or one that a command before it on the page prepares."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        made = {path.parent.name for path in ROOT.glob("data/*/prepare.py")} | {"NAME"}
        for new, read in MAKES_OR_READS.findall(page.read_text(encoding="utf-8")):
            made.add(new)
            assert not read or read in made, f"{page.name}: --dataset={read}"
