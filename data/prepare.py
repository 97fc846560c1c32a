"""Make a dataset of your own texts.

    python data/prepare.py --input book.txt --name=mine --tokenizer=char
    python data/prepare.py --input corpus/ more.jsonl --name=mine --tokenizer=gpt2

Reads .txt (each file is a document; one file alone is split by position), .jsonl, .csv and .parquet (each row is a
document), folders and https addresses of them, and hf:NAME[:CONFIG]. Documents end with the end-of-text token, if the
tokenizer has one.

The text datasets in data/ are this script with other defaults: see `prepare_dataset`.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
from configurator import Rules, arg, arg_table
from nanoforge.data import corpus
from nanoforge.files import download, download_name


@arg_table
class PrepareArgs:
    """prepare"""

    input: tuple[str, ...] = arg((), "files, folders and https addresses, or hf:NAME[:CONFIG]", split=False)
    name: str = arg("", "name of the dataset, for train.py --dataset=NAME")
    data_dir: str = arg("data", "folder of the dataset folders")
    tokenizer: str = arg("gpt2", "char, byte, bpe (trained on the text), gpt2 or another encoding of tiktoken")
    vocab_size: int = arg(8192, "vocabulary size of a trained bpe tokenizer", low=300)
    field: str = arg("text", "field or column that holds the text")
    val_fraction: float = arg(0.1, "fraction of the documents, or of a single text, for validation", above=0, high=0.5)


def check(args: PrepareArgs, source: dict[str, str]) -> Iterator[str]:
    """Errors of arguments that are missing or have no effect."""
    for name in ("input", "name"):
        if not getattr(args, name):
            yield f"--{name}: is needed"
    if source["vocab_size"] != "default" and args.tokenizer != "bpe":
        yield "--vocab_size: has an effect only with --tokenizer=bpe"


def main(args: PrepareArgs) -> None:
    folder = Path(args.data_dir) / args.name
    inputs = [fetch(name, folder) for name in args.input]
    corpus.write_dataset(
        folder=folder,
        read=lambda: corpus.read_corpus(inputs, args.field, args.val_fraction),
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
    )


def fetch(name: str, folder: Path) -> str:
    """The path of an input; what has an address on the web is downloaded into the folder. Raises UserError."""
    if not name.startswith(("https://", "http://")):
        return name
    return str(download(name, folder / download_name(name)))


def prepare_dataset(script: str, description: str, **defaults: Any) -> None:
    """Run this command for the dataset in whose folder `script` lies, with other defaults."""
    folder = Path(script).resolve().parent
    defaults |= {"name": folder.name, "data_dir": str(folder.parent)}
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(PrepareArgs):
        if field.name in defaults:
            default = dataclasses.field(default=defaults[field.name], metadata=field.metadata)
            fields.append((field.name, field.type, default))
    table = dataclasses.make_dataclass("DatasetArgs", fields, bases=(PrepareArgs,), frozen=True, kw_only=True)
    configurator.run(main, configurator.parse(table, sys.argv[1:], description, Rules(check=check)))


if __name__ == "__main__":
    configurator.run(main, configurator.parse(PrepareArgs, sys.argv[1:], __doc__, Rules(check=check)))
