"""Write the tables of docs/ that are made from the code, between their marks:

    python docs/generate.py            writes the pages
    python docs/generate.py --check    writes nothing; exit status 1 where a page is out of date

arguments.md from the tables of arguments of every command, metrics.md from nanoforge/training/metrics.py,
trl_arguments.md from the tables with which sweep.py translates an experiment file, first_hour.ipynb from first_hour.md.
"""

import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import ArgSpec, arg_groups, format_arg
from nanoforge.files import write_text
from nanoforge.sweeps import hf_keys
from nanoforge.sweeps.hf_other_keys import NOT_SUPPORTED, WITHOUT_EFFECT
from nanoforge.training import metrics

FIRST = ("train.py", "sample.py", "evaluate.py", "export.py", "sweep.py", "report.py", "bench.py", "data/prepare.py")
MARK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a | in a cell is escaped, also within code."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def plain(text: str) -> str:
    """Text in which Markdown finds neither tags nor emphasis."""
    return re.sub(r"([<*])", r"\\\1", text)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-")


def code(text: str) -> str:
    """Text as code; nothing of an empty text."""
    return f"`{text}`" if text else ""


# ---------------------------------------------------------------------------------------------------------------------
# arguments


def commands() -> list[str]:
    """The scripts that have a table of arguments, those that people run first at the front."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")]
    with_table = [str(path.relative_to(ROOT)) for path in paths if "\n@arg_table" in path.read_text()]
    names = [name for name in with_table if name != "configurator.py"]
    names = ["train.py" if name == "train_args.py" else name for name in names]
    return sorted(names, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))


def load_script(name: str) -> ModuleType:
    """The module that has a command's table."""
    path = ROOT / ("train_args.py" if name == "train.py" else name)
    if path.parent == ROOT:
        return importlib.import_module(path.stem)
    spec = importlib.util.spec_from_file_location("_".join(path.relative_to(ROOT).with_suffix("").parts), path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the types of their fields
    spec.loader.exec_module(module)
    return module


def tables_of(module: ModuleType) -> list[type]:
    """The tables of arguments that a module defines: one for a command, none for most."""
    values = [value for value in vars(module).values() if isinstance(value, type) and is_table(value)]
    return [value for value in values if value.__module__ == module.__name__]


def is_table(cls: type) -> bool:
    """Whether a class is a table of arguments: all of its fields have a help."""
    return dataclasses.is_dataclass(cls) and all("help" in field.metadata for field in dataclasses.fields(cls))


def describe_type(spec: ArgSpec) -> str:
    """The type of an argument, its choices and its bounds."""
    if spec.choices:
        return ", ".join(code(choice) for choice in spec.choices)
    name = spec.item.__name__ + " ..." if spec.kind is tuple else spec.kind.__name__
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound, none in ((">=", spec.low, -float("inf")), (">", spec.above, -float("inf")))
        if bound != none
    ]
    if spec.high != float("inf"):
        bounds.append(f"<= {spec.high:.12g}")
    return " ".join([name, ", ".join(bounds)]).strip()


def describe_default(spec: ArgSpec) -> str:
    """The default of an argument, on one line; a folder of this checkout by its path in it."""
    return format_arg(spec.default).replace(f"{ROOT}/", "").replace("\n", "\\n")


def argument_row(spec: ArgSpec) -> list[str]:
    """A row of arguments.md."""
    names = [code(f"--{name}") for name in (spec.name, *spec.alias)]
    needs = spec.needs.description if spec.needs else ""
    return [", ".join(names), describe_type(spec), code(describe_default(spec)), plain(spec.help), plain(needs)]


def arguments() -> str:
    """The arguments of all commands, by group, after a list of the groups."""
    contents, text = "", ""
    for name in commands():
        module = load_script(name)
        about = (module.__doc__ or "").strip().partition("\n")[0].rstrip(":.")
        text += f"## {name}\n\n" + ("" if name == "train.py" else f"{about}.\n\n")
        links = []
        for title, specs in arg_groups(tables_of(module)[0]).items():
            heading = f"{name}: {title}"
            links.append(f"[{title.partition(' (')[0]}](#{slug(heading)})")
            rows = [argument_row(spec) for spec in specs]
            text += f"### {heading}\n\n"
            text += markdown_table(("argument", "type", "default", "meaning", "has an effect with"), rows) + "\n"
        contents += f"- [{name}](#{slug(name)}): {', '.join(links)}\n"
    return f"{contents}\n{text}"


# ---------------------------------------------------------------------------------------------------------------------
# metrics


def metric_rows(rows: Iterable[metrics.Metric]) -> list[list[str]]:
    return [[code(metric.key), metric.unit, metric.meaning] for metric in rows]


def events() -> str:
    """The keys of metrics.jsonl by event."""
    head = ("key", "unit", "meaning")
    text = "## Every line\n\n" + markdown_table(head, metric_rows(metrics.EVERY_LINE)) + "\n"
    for event, about in metrics.EVENTS.items():
        text += f"## {event}\n\n{about[0].upper()}{about[1:]}.\n\n"
        text += markdown_table(head, metric_rows(metrics.OF_EVENT[event])) + "\n"
    return text


def objectives() -> str:
    """What each objective adds."""
    text = ""
    for objective, rows in metrics.OF_OBJECTIVE.items():
        text += f"### {objective}\n\n" + markdown_table(("key", "unit", "meaning"), metric_rows(rows)) + "\n"
    return text


# ---------------------------------------------------------------------------------------------------------------------
# TRL


def translated() -> str:
    rows = [
        (code(key), row.becomes, "all" if row.algorithms == hf_keys.ALGORITHMS else ", ".join(row.algorithms))
        for key, row in hf_keys.KEYS.items()
        if key not in WITHOUT_EFFECT and key not in NOT_SUPPORTED
    ]
    return markdown_table(("key", "becomes", "in"), rows)


def without_effect() -> str:
    return markdown_table(("key", "why"), ((code(key), reason) for key, reason in WITHOUT_EFFECT.items()))


def not_supported() -> str:
    rows = []
    for key, (reason, *neutral) in NOT_SUPPORTED.items():
        taken = ", ".join(code(neutral_value(value)) for value in neutral) or "None"
        rows.append((code(key), taken, reason))
    return markdown_table(("key", "taken", "why not supported"), rows)


def neutral_value(value: Any) -> str:
    """A value as YAML has it."""
    return value if isinstance(value, str) and value else json.dumps(value)


# ---------------------------------------------------------------------------------------------------------------------
# the notebook

NOT_IN_NOTEBOOK = ("python3 -m venv ", "--serve ")  # its kernel has a Python; what serves would never end
NOTEBOOK_PARTS = re.compile(r"^```jsonl \w+\n((?:\{.*\n)+)```\n|((?:^    .*\n)+)", re.MULTILINE)


def notebook(page: str) -> str:
    """first_hour.md as a notebook: its commands behind !, its rows as the file chats.jsonl."""
    cells = [cell("code", "%cd ..\n")]
    end = 0
    for part in NOTEBOOK_PARTS.finditer(page):
        cells.append(cell("markdown", page[end : part.start()]))
        end = part.end()
        if part[1]:
            cells.append(cell("code", f"%%writefile chats.jsonl\n{part[1]}"))
            continue
        lines = [line for line in part[2].splitlines() if not any(text in line for text in NOT_IN_NOTEBOOK)]
        cells.append(cell("code", "".join(f"!{line.strip()}\n" for line in lines)))
    cells.append(cell("markdown", page[end:]))
    for number, item in enumerate(cells):
        item["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def cell(kind: str, text: str) -> dict[str, Any]:
    """A cell of a notebook; its id comes later."""
    item: dict[str, Any] = {"cell_type": kind, "metadata": {}, "source": text.strip("\n").splitlines(keepends=True)}
    return item | ({"execution_count": None, "outputs": []} if kind == "code" else {})


# ---------------------------------------------------------------------------------------------------------------------
# the pages

PARTS = {
    "arguments.md": (arguments,),
    "metrics.md": (events, objectives),
    "trl_arguments.md": (translated, without_effect, not_supported),
}
NOTEBOOK, NOTEBOOK_PAGE = "first_hour.ipynb", "first_hour.md"


def generate(name: str) -> str:
    """A page with its generated parts made again; the notebook."""
    if name == NOTEBOOK:
        return notebook((ROOT / "docs" / NOTEBOOK_PAGE).read_text(encoding="utf-8"))
    makers = {maker.__name__: maker for maker in PARTS[name]}
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert {match[1] for match in MARK.findall(text)} == makers.keys(), f"docs/{name} lacks a mark"
    return MARK.sub(lambda match: match[1] + "\n" + makers[match[2]]().strip() + "\n\n" + match[3], text)


def main(argv: list[str]) -> int:
    """Writes the pages, or says which are out of date."""
    stale = []
    for name in (*PARTS, NOTEBOOK):
        path, text = ROOT / "docs" / name, generate(name)
        if path.read_text(encoding="utf-8") != text:
            stale.append(f"docs/{name}")
            if "--check" not in argv:
                write_text(path, text)
    if stale and "--check" in argv:
        print(f"{', '.join(stale)}: out of date; run python docs/generate.py")
        return 1
    print(f"written: {', '.join(stale)}" if stale else "all pages are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
