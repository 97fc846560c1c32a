"""Make a dataset of your own texts.

    python data/prepare.py --input book.txt --name=mine --tokenizer=char
    python data/prepare.py --input corpus/ more.jsonl.gz --name=mine --tokenizer=gpt2
    python data/prepare.py --input train.txt --val_input val.txt --name=mine
    python data/prepare.py --input corpus/ --name=mine --tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct

Reads text (.txt, .md, source code: each file is a document), tables (.jsonl, .json, .csv, .tsv, .parquet: each row is a
document), each of them also as .gz or .zst, folders and web addresses of them, and hf:NAME[:CONFIG][@REVISION][#SPLIT]
of the Hugging Face hub. Documents end with the end-of-text token, if the tokenizer has one; one document alone is split
by position. Text never becomes a control token, whatever it spells.

The text datasets in data/ are this script with other defaults: see `prepare_dataset`.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
from configurator import Rules, arg, arg_table
from nanoforge.console import plural
from nanoforge.data import corpus, documents, token_bins
from nanoforge.data.duplicates import Deduplicator
from nanoforge.data.tables import BAD_ROWS
from nanoforge.errors import UserError
from nanoforge.files import download, download_name


@arg_table
class PrepareArgs:
    """prepare"""

    input: tuple[str, ...] = arg(
        (), "files, folders, web addresses, or hf:NAME[:CONFIG][@REVISION][#SPLIT]", split=False, path=True
    )
    val_input: tuple[str, ...] = arg(
        (), "the same for validation; of hf:NAME the validation split (none: a part of --input)", split=False, path=True
    )
    name: str = arg("", "name of the dataset, for train.py --dataset=NAME", path=True)
    data_dir: str = arg("data", "folder of the dataset folders", path=True)
    overwrite: bool = arg(False, "replace a dataset that is there already")
    tokenizer: str = arg(
        "gpt2",
        "char, byte, bpe (trained on the text), gpt2 or another encoding of tiktoken, or that of a model: a folder "
        "(also of a run), a .gguf or tokenizer file, or org/name[@revision] of the hub",
        path=True,
    )
    vocab_size: int = arg(8192, "vocabulary size of a trained bpe tokenizer", low=300)
    field: str = arg("text", "field or column that holds the text")
    bad_rows: str = arg(
        "error", "rows and files that hold no text, such as null: an error, or skipped and counted", choices=BAD_ROWS
    )
    dedup: bool = arg(
        False,
        "keep one of documents with the same text; what is in --input and in --val_input is validated on, not "
        "trained on",
    )
    val_fraction: float = arg(
        0.1,
        "fraction for validation: of the documents, by a hash of each, or the end of a single one",
        above=0,
        high=0.5,
    )


def check(args: PrepareArgs, source: dict[str, str]) -> Iterator[str]:
    """Errors of arguments that are missing, lead out of data_dir or have no effect."""
    for name in ("input", "name"):
        if not getattr(args, name):
            yield f"--{name}: is needed"
    if args.name and (os.path.isabs(args.name) or os.path.normpath(args.name).split(os.sep)[0] in (".", "..")):
        yield f"--name={args.name}: must be a folder inside --data_dir; give another folder as --data_dir"
    if source["vocab_size"] != "default" and args.tokenizer != "bpe":
        yield "--vocab_size: has an effect only with --tokenizer=bpe"
    if source["val_fraction"] != "default" and args.val_input:
        yield "--val_fraction: has an effect only without --val_input"


@dataclasses.dataclass
class Skipped:
    """What --bad_rows=skip has skipped since the text was last read."""

    count: int = 0
    first: str = ""

    def add(self, message: str) -> None:
        self.count += 1
        self.first = self.first or message.partition(";")[0]


def main(args: PrepareArgs) -> None:
    folder = Path(args.data_dir) / args.name
    token_bins.refuse_existing(folder, "*.bin", overwrite=args.overwrite)
    skipped = Skipped()
    deduplicator = Deduplicator()
    inputs = documents.CorpusInputs(
        train=tuple(fetch(name, folder) for name in args.input),
        val=tuple(fetch(name, folder) for name in args.val_input),
        field=args.field,
        val_fraction=args.val_fraction,
        on_bad_row=skipped.add if args.bad_rows == "skip" else None,
        keep_first=deduplicator.keep_first if args.dedup else None,
    )
    for flag in ("--input", "--val_input"):
        found = inputs.find(flag)
        if found and found.paths:
            print(f"{flag}: {found.describe()}", flush=True)

    def read() -> Iterator[documents.TextChunk]:
        skipped.count = 0
        deduplicator.restart()
        return inputs.open()

    try:
        n_documents = corpus.write_dataset(folder, read, args.tokenizer, args.vocab_size)
    finally:
        if skipped.count:
            print(f"--bad_rows=skip skipped {plural(skipped.count, 'document')}, the first: {skipped.first}")
    if args.dedup:
        print(deduplicator.describe())
    if not n_documents and not args.val_input:
        print("1 document, so split by position, and without an end token")


def fetch(name: str, folder: Path) -> str:
    """The path of an input; what has an address on the web is downloaded into the folder. Raises UserError."""
    if not name.startswith(("https://", "http://")):
        return name
    if not documents.is_readable(Path(download_name(name))):
        raise UserError(f"{name}: must be the address of {documents.KINDS}; download it first")
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
