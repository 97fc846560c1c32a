"""The source of the running Python's standard library, by characters: real text wherever Python is.

Of the modules at the top of the library, in alphabetical order, those in ASCII that `tokenize` reads, up to 3 MB. Every
tenth one is for validation. data/stdlib_class has the lexical classes of the same characters. With its packages the
library is ten times as large:

    python data/stdlib_char/prepare.py --packages --max_bytes=30_000_000 --out_dir=data/stdlib_large
"""

import io
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from configurator import arg, arg_table
from nanoforge.data import corpus, token_bins
from nanoforge.data.documents import TextChunk
from nanoforge.errors import UserError

MAX_BYTES = 3_000_000


@arg_table
class PrepareArgs:
    """prepare"""

    out_dir: str = arg(str(Path(__file__).parent), "folder to write to", path=True)
    overwrite: bool = arg(False, "replace a dataset that is there already")
    packages: bool = arg(False, "also the library's packages, without those that were installed")
    max_bytes: int = arg(MAX_BYTES, "maximum number of characters in all", low=1)


def read_module(path: Path) -> str | None:
    """The source of a module; None if it is not ASCII."""
    try:
        return path.read_bytes().decode("ascii").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def is_python(source: str) -> bool:
    """Whether `tokenize` reads it."""
    try:
        for _ in tokenize.generate_tokens(io.StringIO(source).readline):
            pass
    except (tokenize.TokenError, SyntaxError):
        return False
    return True


def iter_modules(*, packages: bool = False, max_bytes: int = MAX_BYTES) -> Iterator[str]:
    """The sources of the library's modules; one that would exceed max_bytes is left out. Raises UserError."""
    library = Path(sysconfig.get_path("stdlib"))
    size = 0
    for path in sorted(library.rglob("*.py") if packages else library.glob("*.py")):
        if "site-packages" in path.parts:
            continue
        source = read_module(path)
        if source and size + len(source) <= max_bytes and is_python(source):
            size += len(source)
            yield source
    if size == 0:
        raise UserError(f"{library}: this Python came without the source of its library")


def split_modules(texts: Iterable[str]) -> Iterator[TextChunk]:
    """The texts of modules, every tenth for validation, so that all texts of a module are in the same split."""
    for number, text in enumerate(texts):
        yield TextChunk("val" if number % 10 == 9 else "train", text, ends_document=True)


def main(args: PrepareArgs) -> None:
    token_bins.refuse_existing(Path(args.out_dir), "*.bin", overwrite=args.overwrite)
    sources = list(iter_modules(packages=args.packages, max_bytes=args.max_bytes))
    version = sys.version.split()[0]
    n_chars = sum(map(len, sources))
    print(f"{len(sources)} modules of Python {version}'s standard library, {n_chars:,} characters")
    corpus.write_dataset(
        folder=Path(args.out_dir),
        read=lambda: split_modules(sources),
        tokenizer="char",
    )


if __name__ == "__main__":
    configurator.run(main, configurator.parse(PrepareArgs, sys.argv[1:], __doc__))
