"""The lexical class of each character of data/stdlib_char, aligned with it: a second context.

A class is one character, so that the classes print below the code:

    k keyword   n name   0 number   s string   # comment   o operator   white space stands for itself
"""

import io
import keyword
import sys
import tokenize
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from configurator import arg, arg_table
from data.stdlib_char.prepare import iter_modules, split_modules
from nanoforge.data import corpus, token_bins

CLASSES = {tokenize.NUMBER: "0", tokenize.STRING: "s", tokenize.COMMENT: "#", tokenize.OP: "o"}


@arg_table
class PrepareArgs:
    """prepare"""

    out_dir: str = arg(str(Path(__file__).parent), "folder to write to", path=True)
    overwrite: bool = arg(False, "replace a dataset that is there already")


def classify(source: str) -> str:
    """One class for each character of a Python source."""
    line_starts = [0, *accumulate(len(line) for line in source.splitlines(keepends=True))]
    # What no token covers is white space, or inside an f-string.
    classes = [char if char in "\n\t " else "s" for char in source]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        symbol = token_class(token)
        if symbol is None:
            continue
        start = line_starts[token.start[0] - 1] + token.start[1]
        end = line_starts[min(token.end[0], len(line_starts)) - 1] + token.end[1]
        for i in range(start, end):
            classes[i] = "\n" if source[i] == "\n" else symbol
    return "".join(classes)


def token_class(token: tokenize.TokenInfo) -> str | None:
    """The class of a token's characters; None for white space and parts of f-strings."""
    if token.type == tokenize.NAME:
        return "k" if keyword.iskeyword(token.string) else "n"
    return CLASSES.get(token.type)


def main(args: PrepareArgs) -> None:
    token_bins.refuse_existing(Path(args.out_dir), "*.bin", overwrite=args.overwrite)
    corpus.write_dataset(
        folder=Path(args.out_dir),
        read=lambda: split_modules(map(classify, iter_modules())),
        tokenizer="char",
    )


if __name__ == "__main__":
    configurator.run(main, configurator.parse(PrepareArgs, sys.argv[1:], __doc__))
