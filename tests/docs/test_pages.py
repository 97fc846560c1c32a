"""The pages of docs/: what is generated is up to date, and every link leads somewhere."""

import json
import re
from pathlib import Path

import pytest
from generated_pages import generate
from helpers import ROOT

import builders
import configurator
import train_args
from nanoforge.posttraining import rewards
from nanoforge.training import metrics

OTHER_FLAGS = {"print_config", "config_path", "help", "standalone", "nproc_per_node"}  # of all commands; torchrun
COMPLETIONS = ("completion", "messages", "text", "chosen", "answer")
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "tests/README.md"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("name", [*generate.PARTS, generate.NOTEBOOK])
def test_generated_pages_are_up_to_date(name: str):
    page = (ROOT / "docs" / name).read_text()
    assert page == generate.generate(name), f"docs/{name} is out of date: run python docs/generate.py"


def test_every_metric_is_in_the_source():
    """That no other one is logged is checked of every run of the tests, in helpers.read_run."""
    paths = [*ROOT.glob("*.py"), *(path for path in ROOT.glob("nanoforge/**/*.py") if path.name != "metrics.py")]
    source = "\n".join(path.read_text() for path in paths)
    keys = {key for event in metrics.EVENTS for key in metrics.documented_keys(event)}
    keys = {key.removeprefix("val_") for key in keys} - {"loss/<dataset>"}
    missing = [key for key in keys if not re.search(rf"""["' (]{re.sub("<.*", "{", key)}["'=(\w]""", source)]
    assert not missing


def text_of(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```|^    .*?$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    return {generate.slug(heading) for heading in re.findall(r"^#+ (.*)", page.read_text(), flags=re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for link in LINK.findall(text_of(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link} has no such heading"


def test_the_index_has_every_page():
    index = (ROOT / "docs/README.md").read_text()
    names = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert not {name for name in names if f"]({name})" not in index}


def test_the_map_has_every_script():
    readme = (ROOT / "README.md").read_text()
    assert not {path.name for path in ROOT.glob("*.py") if path.name not in readme}


def test_what_stands_beside_other_programs_names_is_there():
    """In coming_from.md: the flags of the right column are arguments, its files exist."""
    modules = [generate.load_script(name) for name in generate.commands()]
    specs = [spec for module in modules for spec in configurator.arg_specs(generate.tables_of(module)[0]).values()]
    names = {name for spec in specs for name in (spec.name, *spec.alias)}
    rows = re.findall(r"^\| .*? \| (.*) \|$", (ROOT / "docs/coming_from.md").read_text(), flags=re.MULTILINE)
    ours = [code for row in rows for code in re.findall(r"`([^`]+)`", row.partition(" | ")[0])]
    assert len(ours) > 150
    for code in ours:
        for flag in re.findall(r"--(?:no-)?(\w[\w-]*)", code):
            assert flag in names | OTHER_FLAGS, code
        for path in re.findall(r"(?:[\w-]+/)*[\w-]+\.py\b", code):
            assert (ROOT / path).is_file(), code


def test_every_error_that_is_explained_exists():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("nanoforge/**/*.py"), *ROOT.glob("data/**/*.py")]
    source = "\n".join(path.read_text() for path in paths)
    source = re.sub(r"\"\s*\n\s*f?\"", "", source)  # texts that follow each other are one
    messages = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/errors.md").read_text(), flags=re.MULTILINE)
    assert len(messages) > 30
    for message in messages:
        parts = [re.escape(part) for part in message.strip(".").split("...")]
        assert re.search(".*".join(parts), source), message


def fenced(page: str, language: str) -> list[tuple[str, str]]:
    """(what stands behind the language, text) of the fenced blocks of a page."""
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"^```{language} ?(.*?)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_every_row_that_is_shown_is_read():
    for objective, lines in (*fenced("examples.md", "jsonl"), *fenced("first_hour.md", "jsonl")):
        args = train_args.resolve([("test", {"objective": objective, "init_from": "gpt2"})]).args
        row_format = builders.row_format(args, has_chat_template=True)
        for line in lines.splitlines():
            parsed = row_format.parse(row_format.shape(json.loads(line)).row)
            assert parsed and all(any(name in row for name in COMPLETIONS) for row in parsed), line


def test_the_reward_that_is_shown_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ((_, code),) = fenced("rewards.md", "python")
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    total = rewards.parse_rewards("correct:1,my_rewards:is_short:0.3")
    sample = rewards.Sample(completion="4", problem={"answer": "4"}, n_tokens=2, max_tokens=10, ended=True)
    assert rewards.total_reward(total, sample)[0] == pytest.approx(1 + 0.3 * 0.8)
