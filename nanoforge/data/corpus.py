"""Text to a dataset folder: documents from files, split, tokenized on all cores, written as token bins.

Everything streams: memory holds a few chunks of text, whatever the size of the corpus. Results depend on the input
alone.
"""

import codecs
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from nanoforge.console import ProgressBar
from nanoforge.data.tables import read_texts
from nanoforge.data.token_bins import SPLITS, dtype_for, open_bin, write_meta
from nanoforge.data.tokenization import BPETokenizer, ByteTokenizer, CharTokenizer, TiktokenTokenizer, Tokenizer
from nanoforge.errors import UserError

CHUNK_BYTES = 2**17  # of a text file, read at once: few enough that chunks under way stay in the processor's cache
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")

X = TypeVar("X")
Y = TypeVar("Y")


class TextChunk(NamedTuple):
    """Consecutive text of one split."""

    split: str
    text: str
    ends_document: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# reading text


def find_files(inputs: Iterable[str]) -> list[Path]:
    """The files that --input names, and all readable ones below the folders that it names, sorted. Raises UserError."""
    files = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"--input={name}: the folder holds no {', '.join(SUFFIXES)}")
            files += inside
        elif not path.is_file():
            raise UserError(f"--input={name}: no such file or folder")
        elif path.suffix not in SUFFIXES:
            raise UserError(f"--input={name}: not one of {', '.join(SUFFIXES)}, a folder of them, or hf:NAME")
        else:
            files.append(path)
    return files


def word_boundary(text: str) -> int:
    """The last place where a word ends and a space follows, else the end. No tokenizer has a token that spans it."""
    cut = text.rfind(" ")
    while cut > 0 and text[cut - 1].isspace():
        cut = text.rfind(" ", 0, cut)
    return cut if cut > 0 else len(text)


def read_text(path: Path) -> Iterator[str]:
    """A text file in chunks of whole words. Raises UserError when it isn't UTF-8."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    rest = ""
    with path.open("rb", buffering=0) as file:
        try:
            while data := file.read(CHUNK_BYTES - len(rest)):
                text = rest + decoder.decode(data)
                cut = word_boundary(text)
                rest = text[cut:]
                yield text[:cut]
            yield rest + decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            position = file.tell() - len(error.object) + error.start
            raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {position}); convert it first") from None


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
            f"hf:{name}: can't be read ({type(error).__name__}); "
            "check the name and the network, or give files with --input"
        ) from None
    if field not in first:
        raise UserError(f"hf:{name}: no field {field} but {', '.join(first)}; name it with --field")
    for row in rows:
        yield row[field]


# ---------------------------------------------------------------------------------------------------------------------
# splitting


def split_documents(documents: Iterable[Iterable[str]], val_fraction: float) -> Iterator[TextChunk]:
    """Documents, each in chunks, to splits. Validation gets val_fraction of them, evenly: with 0.1 every tenth."""
    fraction = Fraction(val_fraction).limit_denominator(10**6)
    for number, chunks in enumerate(documents):
        is_val = int((number + 1) * fraction) > int(number * fraction)
        split = "val" if is_val else "train"
        for text in chunks:
            yield TextChunk(split, text)
        yield TextChunk(split, "", ends_document=True)


def split_text(read: Callable[[], Iterable[str]], val_fraction: float) -> Iterator[TextChunk]:
    """One document to splits: its last val_fraction is for validation. `read` gives its chunks, and is called twice."""
    n_chars = sum(len(text) for text in read())
    remaining = int(n_chars * (1 - val_fraction))  # characters of train
    for text in read():
        train, val = text[:remaining], text[remaining:]
        if train:
            yield TextChunk("train", train)
        if val:
            yield TextChunk("val", val)
        remaining = max(0, remaining - len(text))


def read_corpus(inputs: list[str], field: str, val_fraction: float) -> Iterator[TextChunk]:
    """All text that --input names, split: by documents, or a single text file by position. Raises UserError."""
    if any(name.startswith("hf:") for name in inputs):
        if len(inputs) > 1:
            raise UserError("--input: give one hf:NAME alone, or files and folders")
        documents = read_hub(inputs[0].removeprefix("hf:"), field)
        return split_documents(([text] for text in documents), val_fraction)
    files = find_files(inputs)
    if len(files) == 1 and files[0].suffix == ".txt":
        return split_text(lambda: read_text(files[0]), val_fraction)
    return split_documents(read_documents(files, field), val_fraction)


def read_documents(files: Iterable[Path], field: str) -> Iterator[Iterable[str]]:
    """The chunks of each document: a text file is one, a table has one a row."""
    for path in files:
        if path.suffix == ".txt":
            yield read_text(path)
        else:
            for text in read_texts(path, field):
                yield [text]


# ---------------------------------------------------------------------------------------------------------------------
# tokenizing


def build_tokenizer(name: str, vocab_size: int, read: Callable[[], Iterable[TextChunk]]) -> Tokenizer:
    """char and bpe are made from the text; byte and tiktoken's encodings are ready. Raises UserError."""
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return build_char_tokenizer(read())
    if name == "bpe":
        return BPETokenizer.train((chunk.text for chunk in read() if chunk.split == "train"), vocab_size)
    return TiktokenTokenizer.from_name(name)


def build_char_tokenizer(chunks: Iterable[TextChunk]) -> CharTokenizer:
    """All characters of all splits, sorted; with an end-of-sequence token where documents end."""
    chars: set[str] = set()
    has_eos = False
    for group in group_chunks(chunks):
        # Known ASCII characters are nearly all of most texts, and are deleted from UTF-8 in no time.
        known_ascii = "".join(filter(str.isascii, chars)).encode()
        text = "".join(chunk.text for chunk in group)
        chars.update(text.encode().translate(None, known_ascii).decode())
        has_eos |= any(chunk.ends_document for chunk in group)
    return CharTokenizer(sorted(chars), has_eos=has_eos)


def group_chunks(chunks: Iterable[TextChunk]) -> Iterator[list[TextChunk]]:
    """Chunks in lists of at least half of CHUNK_BYTES characters, so that a thread has enough to do."""
    group = []
    size = 0
    for chunk in chunks:
        group.append(chunk)
        size += len(chunk.text) + 1
        if size >= CHUNK_BYTES // 2:
            yield group
            group = []
            size = 0
    if group:
        yield group


def map_in_order(function: Callable[[X], Y], items: Iterable[X], n_threads: int) -> Iterator[Y]:
    """map with threads: results in the order of the items, and at most twice n_threads items under way."""
    iterator = iter(items)
    with ThreadPoolExecutor(n_threads) as pool:
        pending: deque[Future[Y]] = deque()
        pending.extend(pool.submit(function, item) for item in islice(iterator, 2 * n_threads))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(iterator, 1))


# ---------------------------------------------------------------------------------------------------------------------
# writing


class EncodedChunk(NamedTuple):
    split: str
    ids: np.ndarray
    n_bytes: int  # of the text
    n_chars: int


def encode_chunk(chunk: TextChunk, tokenizer: Tokenizer) -> EncodedChunk:
    ids = tokenizer.encode(chunk.text)
    if chunk.ends_document and tokenizer.eos_id is not None:
        ids = np.concatenate((ids, np.array([tokenizer.eos_id], dtype=np.int32)))
    return EncodedChunk(chunk.split, ids, len(chunk.text.encode()), len(chunk.text))


def write_dataset(
    folder: Path, read: Callable[[], Iterable[TextChunk]], tokenizer: str | Tokenizer, vocab_size: int = 8192
) -> None:
    """Tokenize text into folder/train.bin, val.bin and meta.json. `read` gives the same chunks whenever it is called.

    tokenizer: char, byte, bpe (trained to vocab_size ids), a name of tiktoken's, or one that is ready. Raises
    UserError, and then leaves what was there before.
    """
    chunks = read()  # finds missing files before a tokenizer is made
    if isinstance(tokenizer, str):
        tokenizer = build_tokenizer(tokenizer, vocab_size, read)
    try:
        bins = write_bins(folder, chunks, tokenizer)
    except BaseException:
        with suppress(OSError):
            folder.rmdir()  # if it is empty
        raise
    write_meta(folder, tokenizer, bins)
    counts = ", ".join(f"{name} {summary['tokens']:,} tokens" for name, summary in bins.items())
    print(f"{folder}: {counts}; vocabulary {tokenizer.vocab_size:,}")


def write_bins(folder: Path, chunks: Iterable[TextChunk], tokenizer: Tokenizer) -> dict[str, dict]:
    """Write both bins, whole or not at all; file name -> what meta.json says of it. Takes an old meta.json away."""
    dtype = dtype_for(tokenizer.vocab_size)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writers = {split: stack.enter_context(open_bin(folder / f"{split}.bin", dtype)) for split in SPLITS}
        except OSError as error:
            raise UserError(f"{folder}: can't be written ({error.strerror})") from None

        def encode(group: list[TextChunk]) -> list[EncodedChunk]:
            return [encode_chunk(chunk, tokenizer) for chunk in group]

        progress = stack.enter_context(closing(ProgressBar(f"preparing {folder.name}")))
        for group in map_in_order(encode, group_chunks(chunks), os.cpu_count() or 1):
            for chunk in group:
                writers[chunk.split].write(chunk.ids, chunk.n_bytes)
                progress.add(chunk.n_chars)
        for split, writer in writers.items():
            if not writer.tokens:
                raise UserError(f"no text for {split}.bin; give more documents, or another --val_fraction")
        (folder / "meta.json").unlink(missing_ok=True)  # it does not fit the new bins
    return {f"{split}.bin": writer.summary() for split, writer in writers.items()}
