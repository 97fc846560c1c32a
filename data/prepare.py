"""Make a dataset of your own texts:

    python data/prepare.py --input book.txt --name=mine --tokenizer=char
    python data/prepare.py --input corpus/ more.jsonl --name=mine --tokenizer=gpt2

Reads .txt (a document each, or with one file alone split by position), .jsonl, .csv and .parquet (a document a row), folders and
https addresses of them, and hf:NAME[:CONFIG]. Documents end with the end-of-text token, where the tokenizer has one.

The datasets that come with the program are this script with other defaults: see `dataset`.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
from configurator import Rules, arg
from nanoforge.data import corpus
from nanoforge.files import download


@dataclass(frozen=True, kw_only=True)
class PrepareArgs:
    """prepare"""

    input: tuple[str, ...] = arg((), "files, folders and https addresses, or hf:NAME[:CONFIG]", split=False)
    name: str = arg("", "name of the dataset: train.py --dataset=NAME trains on it")
    data_dir: str = arg("data", "folder that holds the dataset folders")
    tokenizer: str = arg("gpt2", "char, byte, bpe (trained on the text), gpt2 or another encoding of tiktoken")
    vocab_size: int = arg(8192, "ids of a trained bpe", low=300)
    field: str = arg("text", "field or column that holds the text")
    val_fraction: float = arg(0.1, "part of the documents, or of one text, for validation", above=0, high=0.5)


def check(a, source: dict[str, str]) -> list[str]:
    wrong = [f"--{name}: is needed" for name in ("input", "name") if not getattr(a, name)]
    if source["vocab_size"] != "default" and a.tokenizer != "bpe":
        wrong.append("--vocab_size: has an effect only with --tokenizer=bpe")
    return wrong


def main(a) -> None:
    folder = Path(a.data_dir) / a.name
    inputs = [
        str(download(given, folder / given.rsplit("/", 1)[1])) if given.startswith("https://") else given
        for given in a.input
    ]
    corpus.write_dataset(folder, lambda: corpus.read_corpus(inputs, a.field, a.val_fraction), a.tokenizer, a.vocab_size)


def dataset(script: str, description: str, **defaults) -> None:
    """Run this command for the dataset in whose folder `script` lies, with other defaults."""
    folder = Path(script).resolve().parent
    defaults |= {"name": folder.name, "data_dir": str(folder.parent)}
    fields = [
        (field.name, field.type, dataclasses.field(default=defaults[field.name], metadata=field.metadata))
        for field in dataclasses.fields(PrepareArgs)
        if field.name in defaults
    ]
    table = dataclasses.make_dataclass("DatasetArgs", fields, bases=(PrepareArgs,), frozen=True, kw_only=True)
    configurator.run(main, configurator.parse(table, sys.argv[1:], description, Rules(check=check)))


if __name__ == "__main__":
    configurator.run(main, configurator.parse(PrepareArgs, sys.argv[1:], __doc__, Rules(check=check)))
