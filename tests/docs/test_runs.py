"""Commands of pages that are run. The notebook's always; those of all pages with `pytest tests/docs --run-docs`."""

import json
import re
from pathlib import Path

import pytest
from helpers import ROOT
from page_commands import PAGES, Command, of_page
from page_runs import Workplace

# What the notebook's test leaves out: what needs a network, and what has tests of its own.
NOT_IN_TEST = re.compile(r"pip install|curl |HuggingFaceTB/|out/smol|--doctor|report\.py|show\.py")
# What --run-docs only parses (test_commands.py), and why.
ONLY_PARSED = {
    r"--launcher=|--submit|--search=|--status|--collect": "many runs; tests/sweeps runs grids",
    r"bench\.py|benchmarks": "minutes, or another program's checkout",
    r"torchrun --nnodes": "several hosts",
    r"--watch|--serve": "serves until it is stopped",
    r"--lm_eval": "tasks of the hub",
    r"hf:": "datasets of the hub",
    r"openwebtext|fineweb|shakespeare|gsm8k|quick_test|out/quick_": "a download",
    r"out/a/|out/a |out/a$|outputs/|out/large|scaling_laws": "checkpoints of the reader's runs",
    r"salamandra|\.gguf|gemma": "a model that is not small",
    r"alignment\.yaml|align\.yaml": "its models and data are the reader's",
    r"reasoning_gym|math_verify|--send": "a package",
    r"--input clean": "made by the page's own script",
    r" \.\.\.$|\[": "stands for several commands",
    r"--doctor|--completion|docs/generate": "has tests of its own",
    r"depth\.py --depth=12": "a size for GPUs",
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
            if not NOT_IN_TEST.search(line):
                workplace.run(Command("first_hour.ipynb", re.sub(r"\s#\s.*", "", line.removeprefix("!"))))
                n_run += 1
    assert n_run >= 7
    assert (tmp_path / "out/chat-f16.gguf").stat().st_size > 10_000
    assert (tmp_path / "out/mine/loss.png").exists()


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    workplace = Workplace(tmp_path_factory.mktemp("clone"))
    workplace.furnish()
    return workplace


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The pages, if they are asked for."""
    if "page" in metafunc.fixturenames:
        pages = PAGES if metafunc.config.getoption("--run-docs") else []
        metafunc.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.slow
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, furnished: Workplace):
    workplace = furnished.copy(tmp_path)
    failures = []
    for command in of_page(page):
        text = command.text.replace("$M", "HuggingFaceTB/SmolLM2-135M-Instruct")
        if command.script and not any(re.search(pattern, text) for pattern in ONLY_PARSED):
            try:
                workplace.run(Command(command.page, text))
                print(f"ran {command}")
            except AssertionError as error:
                failures.append(str(error))
    assert not failures, "\n\n".join(failures)
