"""The commands that the pages show: in indented and fenced blocks, and as code within a line."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md", *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
STARTS = ("python", ".venv/bin/", "torchrun", "bash ", "pip ", "git ", "M=", "echo ", "cat ", "curl ", "docker ", "uv ")
COMMENT = re.compile(r"(^|\s+)#\s.*$")
PLACEHOLDER = re.compile(r"\[[A-Z]+\]")  # [CONFIG] may be left out
SCRIPT = re.compile(
    r"\(?(?:\S+=\S+ )*(?:\S*python3? |torchrun .*?)?"
    r"(?P<script>(?:[\w-]+/)*[\w-]+\.py|-m benchmarks\.\w+)(?P<rest>$|[\s)].*)"
)


@dataclass(frozen=True)
class Command:
    """A command line of a page."""

    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"

    @property
    def script(self) -> str:
        """The script of this program that it runs, or an empty text."""
        match = SCRIPT.fullmatch(self.text)
        if match is None or match["script"].startswith("configs/"):
            return ""
        script = match["script"]
        return f"{script.removeprefix('-m ').replace('.', '/')}.py" if script.startswith("-m ") else script

    @property
    def argv(self) -> list[str]:
        """The script's arguments; those in [brackets], which may be left out, are in."""
        match = SCRIPT.fullmatch(self.text)
        assert match is not None
        words = [word for word in shlex.split(match["rest"].rstrip(")")) if not PLACEHOLDER.fullmatch(word)]
        return [word[1:-1] if word.startswith("[--") and word.endswith("]") else word for word in words]


def blocks(text: str) -> Iterator[str]:
    """The blocks of code that may hold commands: fenced as a shell's, or indented."""
    for match in FENCE.finditer(text):
        if match[1] in ("", "bash", "sh", "console"):
            yield match[2]
    for match in INDENTED.finditer(FENCE.sub("", text)):
        yield match[0]


def of_page(page: Path) -> list[Command]:
    """The commands in a page's blocks, in their order."""
    lines = [
        COMMENT.sub("", line.strip())
        for block in blocks(page.read_text())
        for line in re.sub(r"\\\n\s*", "", block).splitlines()
    ]
    texts = [part.strip() for line in lines if line.startswith(STARTS) for part in re.split(r"\s&&\s", line)]
    return [Command(str(page.relative_to(ROOT)), text) for text in texts]


def inline(page: Path) -> list[Command]:
    """The commands within a page's lines: `train.py --dataset=...`, with or without python before them.

    Those of other programs, in the first column of coming_from.md, are left out.
    """
    plain = INDENTED.sub("", FENCE.sub("", page.read_text()))
    if page.name == "coming_from.md":
        plain = re.sub(r"^\| .*? \|", "", plain, flags=re.MULTILINE)
    commands = [Command(str(page.relative_to(ROOT)), text) for text in re.findall(r"`([^`\n]+)`", plain)]
    return [command for command in commands if " --" in command.text and command.script]
