"""Text to a dataset folder: documents from files, split, tokenized on all cores, written as bins.

Everything streams: memory holds a few pieces of text, whatever the size of the corpus. Results depend on the input alone.
"""

import codecs
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanoforge.console import Progress
from nanoforge.data import tokenization
from nanoforge.data.tables import read_texts
from nanoforge.data.token_bins import SPLITS, BinWriter, dtype_for, write_meta
from nanoforge.errors import UserError

PIECE = 2**17  # bytes of a text file read at once: few enough that the pieces under way stay in the processor's cache
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")


class TextChunk(NamedTuple):
    """A stretch of text for one split; `ends` where its document does."""

    split: str
    text: str
    ends: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# documents


def input_files(inputs: Iterable[str]) -> list[Path]:
    """The files that paths name; of folders all below them that can be read, sorted. Raises UserError."""
    found = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"--input={given}: the folder holds no {', '.join(SUFFIXES)}")
            found += inside
        elif not path.is_file():
            raise UserError(f"--input={given}: no such file or folder")
        elif path.suffix not in SUFFIXES:
            raise UserError(f"--input={given}: must be one of {', '.join(SUFFIXES)}, a folder of them, or hf:NAME")
        else:
            found.append(path)
    return found


def word_end(words: str) -> int:
    """The last place where a word ends and a space follows, else the end: no tokenizer has a token that goes over it."""
    cut = words.rfind(" ")
    while cut > 0 and words[cut - 1].isspace():
        cut = words.rfind(" ", 0, cut)
    return cut if cut > 0 else len(words)


def read_text(path: Path) -> Iterator[str]:
    """A text file in pieces, which end with words. Raises UserError when it isn't UTF-8."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    rest = ""
    with path.open("rb", buffering=0) as file:
        try:
            while data := file.read(PIECE - len(rest)):
                words = rest + decoder.decode(data)
                cut = word_end(words)
                rest = words[cut:]
                yield words[:cut]
            yield rest + decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            at = file.tell() - len(error.object) + error.start
            raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {at}); convert it first") from None


def read_hub(name: str, field: str) -> Iterator[str]:
    """The training documents of a dataset of the Hugging Face hub, NAME or NAME:CONFIG, streamed. Raises UserError."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(f"hf:{name}: needs a package: pip install datasets") from None
    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split="train", streaming=True)
        first = next(iter(rows))
    except Exception as error:  # the library raises nearly anything when the hub can't be reached
        raise UserError(
            f"hf:{name}: can't be read ({type(error).__name__}); check the name and the network, or give files with --input"
        ) from None
    if field not in first:
        raise UserError(f"hf:{name}: no field {field} but {', '.join(first)}; name it with --field")
    for row in rows:
        yield row[field]


def split_documents(documents: Iterable[Iterable[str]], val_fraction: float) -> Iterator[TextChunk]:
    """Documents, each in pieces, to splits: spread evenly, val_fraction of them are for validation (every tenth, with 0.1)."""
    part = Fraction(val_fraction).limit_denominator(10**6)
    for number, pieces in enumerate(documents):
        split = "val" if int((number + 1) * part) > int(number * part) else "train"
        for piece in pieces:
            yield TextChunk(split, piece)
        yield TextChunk(split, "", ends=True)


def split_text(pieces: Callable[[], Iterable[str]], val_fraction: float) -> Iterator[TextChunk]:
    """One document to splits: its last val_fraction is for validation."""
    cut = int(sum(map(len, pieces())) * (1 - val_fraction))
    for piece in pieces():
        if head := piece[: max(0, cut)]:
            yield TextChunk("train", head)
        if tail := piece[max(0, cut) :]:
            yield TextChunk("val", tail)
        cut -= len(piece)


def read_corpus(inputs: list[str], field: str, val_fraction: float) -> Iterator[TextChunk]:
    """All text that --input names, split: by documents, or one text file by position. Raises UserError."""
    if any(given.startswith("hf:") for given in inputs):
        if len(inputs) > 1:
            raise UserError("--input: give one hf:NAME alone, or files and folders")
        return split_documents(([document] for document in read_hub(inputs[0][3:], field)), val_fraction)
    files = input_files(inputs)
    if len(files) == 1 and files[0].suffix == ".txt":
        return split_text(lambda: read_text(files[0]), val_fraction)
    documents = (
        doc
        for path in files
        for doc in ([read_text(path)] if path.suffix == ".txt" else ([text] for text in read_texts(path, field)))
    )
    return split_documents(documents, val_fraction)


# ---------------------------------------------------------------------------------------------------------------------
# tokenizing and writing


def make_tokenizer(name: str, vocab_size: int, pieces: Callable[[], Iterable[TextChunk]]) -> tokenization.Tokenizer:
    """char and bpe learn from the text; byte and tiktoken's encodings are ready. Raises UserError."""
    if name == "byte":
        return tokenization.ByteTokenizer()
    if name == "char":
        chars: set[str] = set()
        ends = False
        for group in grouped(pieces()):
            known = "".join(
                filter(str.isascii, chars)
            ).encode()  # nearly all of most texts, and deleted from UTF-8 in no time
            chars.update("".join(piece.text for piece in group).encode().translate(None, known).decode())
            ends |= any(piece.ends for piece in group)
        return tokenization.CharTokenizer(sorted(chars), has_eos=ends)
    if name == "bpe":
        return tokenization.BPETokenizer.train((piece.text for piece in pieces() if piece.split == "train"), vocab_size)
    return tokenization.TiktokenTokenizer.from_name(name)


def grouped(pieces: Iterable[TextChunk]) -> Iterator[list[TextChunk]]:
    """Pieces in lists of at least half of PIECE characters, so that a thread has enough to do."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text) + 1
        if size >= PIECE // 2:
            yield group
            group, size = [], 0
    if group:
        yield group


def map_in_order(function: Callable, items: Iterable, threads: int) -> Iterator:
    """map with threads, results in the order of the items, and no more than twice `threads` items under way."""
    with ThreadPoolExecutor(threads) as pool:
        items, waiting = iter(items), deque()
        waiting.extend(pool.submit(function, item) for item in islice(items, 2 * threads))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(items, 1))


def write_dataset(
    folder: Path,
    pieces: Callable[[], Iterable[TextChunk]],
    tokenizer: str | tokenization.Tokenizer,
    vocab_size: int = 8192,
) -> None:
    """Tokenize pieces into folder/train.bin, val.bin and meta.json; `pieces` gives the same ones each time it is called.

    tokenizer: char, byte, bpe (trained to vocab_size ids), a name of tiktoken's, or one that is ready. Raises UserError, and then
    leaves what was there before.
    """
    stream = pieces()  # tells missing files before a tokenizer is made
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, vocab_size, pieces)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writers = {split: BinWriter(folder, f"{split}.bin", dtype_for(tokenizer.vocab_size)) for split in SPLITS}
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror})") from None
    end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype=np.int32)

    def encode(group: list[TextChunk]) -> list[tuple[str, np.ndarray, int, int]]:
        return [
            (
                p.split,
                np.concatenate((tokenizer.encode(p.text), end)) if p.ends else tokenizer.encode(p.text),
                len(p.text.encode()),
                len(p.text),
            )
            for p in group
        ]

    progress = Progress(f"preparing {folder.name}")
    try:
        for group in map_in_order(encode, grouped(stream), os.cpu_count() or 1):
            for split, ids, size, characters in group:
                writers[split].write(ids, size)
                progress.add(characters)
        for split, writer in writers.items():
            if not writer.tokens:
                raise UserError(f"no text for {split}.bin; give more documents, or another --val_fraction")
    except BaseException:
        for writer in writers.values():
            writer.discard()
        with suppress(OSError):
            folder.rmdir()  # if nothing else is in it
        raise
    finally:
        progress.close()
    (folder / "meta.json").unlink(missing_ok=True)  # until its bins are there
    write_meta(folder, tokenizer, {f"{split}.bin": writer.close() for split, writer in writers.items()})
    told = ", ".join(f"{split}.bin {writer.tokens:,} tokens" for split, writer in writers.items())
    print(f"{folder}: {told}; vocabulary {tokenizer.vocab_size:,}")
