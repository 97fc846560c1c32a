"""The commands of the pages and of the notebook run, made short (page_runs.py), in a folder like the clone's."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from helpers import ROOT
from page_commands import PAGES, Command, inline, of_page
from page_runs import SERVER, Workplace

NEEDS_NETWORK = re.compile(r"pip install|curl |HuggingFaceTB/|out/smol")  # commands of the notebook
# Commands that tests of their own run: what is in the command -> the file of the tests.
RUN_ELSEWHERE = {
    r"\bbench\.py|prepare_gpu|gpu\.py --(stage|rehearse)": "tests/core/test_bench.py",  # beside a stand-in for nanoGPT
    r"benchmarks\.(open_model|tokenization)": "tests/core/test_bench.py",
    r"--completion": "tests/core/test_completion.py",
    r"docs/generate": "tests/docs/test_pages.py",
}
WORDS = {"$M": "HuggingFaceTB/SmolLM2-135M-Instruct", "OUT": "out"}
RUNS = {"docs/prompt_tuning.md": "outputs/reverse/20260101_120000"}  # what RUN is on a page
# Commands that need a package which is no requirement of the tests.
PACKAGES = {r"--lm_eval": "lm_eval", r"reasoning_gym": "reasoning_gym", r"--send=trackio": "trackio"}
# Commands that no test runs, and why.
NOT_RUN = {
    r"python data/shakespeare_char/prepare\.py\)": "in (cd ../nanoGPT && ...): nanoGPT's own script",
    r"\.\./nanoGPT/config/": "a file of nanoGPT: tests/core/test_configurator.py reads those",
    r"benchmarks\.(ablation|budget|growth)\b": "hours of measurements",
}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path):
    """Its cells in their order. A cell has commands behind !, or is a file to write."""
    workplace = Workplace(tmp_path)
    workplace.env["MPLBACKEND"] = "module://of_the_notebook.only"
    cells = json.loads((ROOT / "docs/first_hour.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sources[0] == "%cd .."
    n_run = 0
    for source in sources[1:]:
        if source.startswith("%%writefile "):
            name, _, text = source.removeprefix("%%writefile ").partition("\n")
            (tmp_path / name).write_text(text)
            continue
        for line in source.splitlines():
            if not NEEDS_NETWORK.search(line):
                workplace.run(Command("first_hour.ipynb", re.sub(r"\s#\s.*", "", line.removeprefix("!"))))
                n_run += 1
    assert n_run >= 7
    assert (tmp_path / "out/chat-f16.gguf").stat().st_size > 10_000
    assert (tmp_path / "out/mine/loss.png").exists()


def test_commands_that_run_elsewhere_have_their_tests():
    assert all((ROOT / path).exists() for path in RUN_ELSEWHERE.values())


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    workplace = Workplace(tmp_path_factory.mktemp("clone"))
    workplace.furnish()
    return workplace


def commands_of(page: Path) -> list[Command]:
    """A page's commands: those in its blocks, and those within a line that are whole ones."""
    within_lines = [command for command in inline(page) if command.text.startswith("python ")]
    words = WORDS | {"RUN": RUNS.get(str(page.relative_to(ROOT)), "out/run")}
    return [
        Command(command.page, re.sub(r"\$M\b|\b(RUN|OUT)\b", lambda match: words[match[0]], command.text))
        for command in (*of_page(page), *within_lines)
    ]


def is_of_tests(command: Command) -> bool:
    """Whether a command is for the tests of pages: one of this program, or one that asks its server."""
    if not command.script:
        return SERVER in command.text
    return not any(re.search(pattern, command.text) for pattern in (*RUN_ELSEWHERE, *NOT_RUN))


def has_packages(command: Command) -> bool:
    """Whether the packages that a command needs are installed."""
    names = [name for pattern, name in PACKAGES.items() if re.search(pattern, command.text)]
    return all(importlib.util.find_spec(name) for name in names)


def runs_here(command: Command) -> bool:
    return is_of_tests(command) and has_packages(command)


PAGES_THAT_RUN = [page for page in PAGES if any(map(runs_here, commands_of(page)))]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, furnished: Workplace):
    workplace = furnished.copy(tmp_path)
    failures = []
    for command in filter(runs_here, commands_of(page)):
        try:
            workplace.run(command)
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n\n".join(failures)
