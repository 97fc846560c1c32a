"""The lexical class of each character of data/stdlib_char, aligned with it: a second context.

One character a class, so that the stream prints below the code:

    k keyword   n name   0 number   s string   # comment   o operator   white space stands for itself
"""

import io
import keyword
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from configurator import arg
from data.stdlib_char.prepare import documents
from nanoforge.data import corpus


@dataclass(frozen=True, kw_only=True)
class PrepareArgs:
    """prepare"""

    out_dir: str = arg(str(Path(__file__).parent), "folder to write to")


CLASSES = {tokenize.NUMBER: "0", tokenize.STRING: "s", tokenize.COMMENT: "#", tokenize.OP: "o"}


def classes(source: str) -> str:
    """One class for each character of a Python source."""
    starts = [0]  # of each line
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    out = [
        char if char in "\n\t " else "s" for char in source
    ]  # what no token covers is inside an f-string, or white space
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        first, last = (
            starts[token.start[0] - 1] + token.start[1],
            starts[min(token.end[0], len(starts)) - 1] + token.end[1],
        )
        name = "k" if keyword.iskeyword(token.string) else "n"
        symbol = name if token.type == tokenize.NAME else CLASSES.get(token.type)
        for place in range(first, last if symbol else first):
            out[place] = "\n" if source[place] == "\n" else symbol
    return "".join(out)


def main(a) -> None:
    corpus.write_dataset(
        Path(a.out_dir), lambda: corpus.split_documents(([classes(source)] for source in documents()), 0.1), "char"
    )


if __name__ == "__main__":
    configurator.run(main, configurator.parse(PrepareArgs, sys.argv[1:], __doc__))
