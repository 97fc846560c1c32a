"""Grid files and experiment files: YAML -> flat names and values. Knows no argument by name.

grid.py describes the form of a grid file, hf_keys.py that of an experiment file of rl_salamandra_alignment.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge import config_files, files
from nanoforge.other_names import similar_argument
from nanoforge.sweeps import hf_keys
from nanoforge.sweeps.grid import SECTIONS, as_mappings


class GridFile(NamedTuple):
    """A grid or experiment file."""

    spec: dict[str, Any]  # name or "section.key" -> value
    base_configs: list[str]
    is_experiment: bool
    errors: list[str]


EMPTY = GridFile({}, [], is_experiment=False, errors=[])


def read_grid_file(path: str, arguments: Iterable[str], aliases: dict[str, str]) -> GridFile:
    """Read a grid or experiment file, whose names must be `arguments`, `aliases` or sections. Raises UserError."""
    values, as_text = read_file(path)
    if hf_keys.is_experiment(values):
        spec, errors = hf_keys.flatten(values, as_text)
        out_dir = spec.pop("execution.output_dir", None)
        if out_dir:
            spec["out_dir"] = out_dir
        if "execution.setup" in spec:
            spec["execution.setup"] = as_lines(spec["execution.setup"])
        return GridFile(spec, [], is_experiment=True, errors=hf_keys.file_errors(values) + errors)
    base = values.pop("base", None) or []
    venv = values.pop("venv", None)
    setup = values.pop("setup", None)
    job_sections = {name: values.pop(name) for name in hf_keys.JOB_SECTIONS if name in values}
    spec, errors = hf_keys.flatten(job_sections, as_text)
    if venv:
        spec["execution.venv"] = venv
    if setup:
        spec["execution.setup"] = as_lines(setup)
    known = [*arguments, *aliases, *SECTIONS]
    errors += [f"{path}: {error}" for error in config_files.named_twice(values, aliases)]
    for name, value in values.items():
        if name in known:
            spec[aliases.get(name, name)] = value
        else:
            names = [*known, *hf_keys.JOB_SECTIONS, "venv", "setup"]
            suggestion = similar_argument(name, names, hf_keys.argument_of_key(name))
            errors.append(f"{path}: {name}: no such argument{suggestion}")
    base_configs = [str(item) for item in (base if isinstance(base, list) else [base])]
    return GridFile(spec, base_configs, is_experiment=False, errors=errors)


def as_lines(setup: Any) -> str:
    """The lines of a script: one text of them, or a list."""
    return "\n".join(str(line) for line in setup) if isinstance(setup, list) else str(setup)


def names_in_zip_and_groups(spec: dict[str, Any]) -> set[str]:
    """The arguments that the sections zip and groups of a file vary."""
    zips, _ = as_mappings("zip", spec.get("zip"))
    groups, _ = as_mappings("groups", spec.get("groups"))
    members = [values for mapping in groups for values in mapping.values() if isinstance(values, dict)]
    return {name for mapping in [*zips, *members] for name in mapping}


def read_file(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The names and values of a YAML file, and the same with all scalars as text. Raises UserError."""
    values, as_text = read_yaml(files.read_text(Path(path)), path)
    return config_files.check_names(values, path), config_files.check_names(as_text, path)


def read_yaml(text: str, path: str) -> tuple[Any, Any]:
    """The value of a YAML text, and the same with all scalars as text, apart from null. Raises UserError."""
    return config_files.read_yaml(text, path), config_files.read_yaml(text, path, verbatim=True)
