"""The commands of the pages and of the notebook run, made short (page_runs.py), in a folder like the clone's."""

import json
import re
from pathlib import Path

import pytest
from helpers import ROOT
from page_commands import PAGES, Command, of_page
from page_runs import Workplace

# What the notebook's test leaves out: what needs a network, and what has tests of its own.
NOT_IN_TEST = re.compile(r"pip install|curl |HuggingFaceTB/|out/smol|--doctor|report\.py|show\.py")
# What is parsed only (test_commands.py), and why.
ONLY_PARSED = {
    r"\bbench\.py|prepare_gpu|gpu\.py --(stage|rehearse)": "needs a GPU or another checkout: tests/core/test_bench.py",
    r"benchmarks/serving": "needs a server at its address",
    r"\)$": "a script of nanoGPT's checkout",
    r"--submit": "needs Slurm: tests/sweeps/test_slurm.py",
    r"--lm_eval|reasoning_gym|--send=trackio": "needs a package that is not a requirement of the tests",
    r"hf:": "needs datasets of the hub: tests/data/test_hub_datasets.py",
    r"--doctor|--completion|docs/generate": "tests/core/test_doctor.py, test_completion.py, tests/docs/test_pages.py",
    r"--gpt2_type": "weights and tokens of GPT-2",
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


def runs_here(command: Command) -> bool:
    return bool(command.script) and not any(re.search(pattern, command.text) for pattern in ONLY_PARSED)


PAGES_THAT_RUN = [page for page in PAGES if any(map(runs_here, of_page(page)))]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, furnished: Workplace):
    workplace = furnished.copy(tmp_path)
    failures = []
    for command in filter(runs_here, of_page(page)):
        try:
            workplace.run(Command(command.page, command.text.replace("$M", "HuggingFaceTB/SmolLM2-135M-Instruct")))
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n\n".join(failures)
