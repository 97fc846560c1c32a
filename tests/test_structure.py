"""The law of the map, read from the imports: commands import parts, parts import no command; nothing circular; one place for everything."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PARTS = sorted((ROOT / "parts").glob("*.py"))
COMMANDS = sorted(ROOT.glob("*.py"))


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_parts_import_no_command_and_no_model():
    roots = {path.stem for path in COMMANDS}
    for path in PARTS:
        assert not {name.split(".")[0] for name in imported(path)} & roots, path


def test_parts_are_flat_and_import_nothing_in_circles():
    assert not [path for path in (ROOT / "parts").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert (ROOT / "parts/__init__.py").read_text() == ""
    needs = {
        path.stem: {name.split(".")[1] for name in imported(path) if name.startswith("parts.")}
        & {p.stem for p in PARTS}
        for path in PARTS
    }
    done: set[str] = set()
    while left := [name for name in needs if name not in done]:
        ready = [name for name in left if needs[name] <= done]
        assert ready, f"a circle among {left}"
        done |= set(ready)


@pytest.mark.parametrize("path", [*PARTS, *COMMANDS], ids=lambda path: path.name)
def test_files_say_what_they_are_and_do_nothing_when_imported(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or path.name == "__init__.py"
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
    for node in tree.body[1:]:
        assert isinstance(node, allowed), f"{path.name}:{node.lineno}"
        assert not isinstance(node, ast.If) or "__name__" in ast.unparse(node.test)


def test_arguments_and_configs_import_no_torch():
    code = "import sys, train_args, configurator; train_args.parse([]); print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_the_configurator_knows_no_argument_by_name():
    import train_args

    words = {
        node.value
        for node in ast.walk(ast.parse((ROOT / "configurator.py").read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not words & {row.name for group in train_args.TABLE.values() for row in group}


def test_every_row_of_the_table_is_used():
    """Its name stands in the code that trains, as an attribute of the arguments or a field of the model's configuration; being checked is no use."""
    import dataclasses

    import train_args
    from model import GPTConfig

    used = {field.name for field in dataclasses.fields(GPTConfig)}
    derived = [
        node
        for node in ast.parse((ROOT / "train_args.py").read_text()).body
        if getattr(node, "name", "") in ("Derived", "follows")
    ]
    for tree in (*(ast.parse((ROOT / file).read_text()) for file in ("train.py", "recipe.py")), *derived):
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {row.name for group in train_args.TABLE.values() for row in group} <= used


def test_choices_of_the_table_are_the_entries_of_the_registries():
    import model
    import train_args
    from parts import adapters, objectives, optim, schedules, templates

    rows = {row.name: row for group in train_args.TABLE.values() for row in group}
    for name, registry in {"norm": model.NORMS, "position": model.POSITIONS, "mlp": model.MLPS, "lr_scheduler": schedules.SCHEDULES, "dpo_loss": objectives.DPO_LOSSES,
                           "loss_type": objectives.AGGREGATIONS, "prompt_provider": adapters.PROVIDERS, "overflow": templates.OVERFLOWS}.items():  # fmt: skip
        assert set(rows[name].choices) == set(registry)
    assert set(train_args.SMOOTHED) == {name for name, (_, _, smoothed) in objectives.DPO_LOSSES.items() if smoothed}
    assert set(train_args.OPTIMIZERS) == {*optim.OPTIMIZERS, "muon"}
    assert all(name in rows["activation"].help for name in model.ACTIVATIONS)
