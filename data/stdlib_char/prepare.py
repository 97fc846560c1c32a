"""The source of the running Python's standard library, by characters: real text wherever Python is.

Of the modules at the top of the library, in alphabetical order, those in ASCII that `tokenize` reads, up to 3 MB. Every tenth one is
for validation. data/stdlib_class has the same characters' lexical classes. With its packages the library is ten times as large:

    python data/stdlib_char/prepare.py --packages --max_bytes=30_000_000 --out_dir=data/stdlib_large
"""

import io
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from configurator import arg
from nanoforge.data import corpus
from nanoforge.errors import UserError

BYTES = 3_000_000


@dataclass(frozen=True, kw_only=True)
class PrepareArgs:
    """prepare"""

    out_dir: str = arg(str(Path(__file__).parent), "folder to write to")
    packages: bool = arg(False, "the library's packages too, without those that were installed")
    max_bytes: str = arg(BYTES, "most characters in all", low=1)


def documents(packages: bool = False, most: int = BYTES) -> Iterator[str]:
    """The modules' sources. Raises UserError where Python came without them."""
    size = 0
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py") if packages else library.glob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            source = path.read_bytes().decode("ascii").replace("\r\n", "\n")
            list(tokenize.generate_tokens(io.StringIO(source).readline))
        except (UnicodeDecodeError, tokenize.TokenError, SyntaxError):
            continue
        if source and size + len(source) <= most:
            size += len(source)
            yield source
    if not size:
        raise UserError(f"{sysconfig.get_path('stdlib')}: this Python came without the source of its library")


def main(a) -> None:
    found = list(documents(a.packages, a.max_bytes))
    print(
        f"{len(found)} modules of Python {sys.version.split()[0]}'s standard library, {sum(map(len, found)):,} characters"
    )
    corpus.write_dataset(Path(a.out_dir), lambda: corpus.split_documents(([source] for source in found), 0.1), "char")


if __name__ == "__main__":
    configurator.run(main, configurator.parse(PrepareArgs, sys.argv[1:], __doc__))
