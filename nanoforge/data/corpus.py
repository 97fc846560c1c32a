"""Text to a dataset folder: chunks of text tokenized on all cores and written as token bins.

Everything streams: memory holds a few chunks of text, whatever the size of the corpus. Results depend on the input
alone.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from nanoforge.console import ProgressBar, plural
from nanoforge.data import hub, model_tokenizers
from nanoforge.data.documents import CHUNK_BYTES, TextChunk
from nanoforge.data.token_bins import SPLITS, dtype_for, open_bin, write_meta
from nanoforge.data.tokenization import BPETokenizer, ByteTokenizer, CharTokenizer, TiktokenTokenizer, Tokenizer
from nanoforge.errors import UserError

X = TypeVar("X")
Y = TypeVar("Y")


# ---------------------------------------------------------------------------------------------------------------------
# tokenizing


def build_tokenizer(name: str, vocab_size: int, read: Callable[[], Iterable[TextChunk]]) -> Tokenizer:
    """char and bpe are made from the text; byte, tiktoken's encodings and those of models are ready.

    Raises UserError.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return build_char_tokenizer(read())
    if name == "bpe":
        return BPETokenizer.train((chunk.text for chunk in read() if chunk.split == "train"), vocab_size)
    if Path(name).exists() or Path(name).suffix or hub.is_hub_name(name):
        try:
            return model_tokenizers.load(name)
        except UserError as error:
            raise UserError(
                f"--tokenizer={error}" if str(error).startswith(name) else f"--tokenizer: {error}"
            ) from None
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


def encode_chunks(chunks: Sequence[TextChunk], tokenizer: Tokenizer) -> list[EncodedChunk]:
    """The ids of chunks, with the tokens that begin and end a document."""
    if tokenizer.marks_start:
        ids_of_chunks = [encode_place(chunk, tokenizer) for chunk in chunks]
    else:
        ids_of_chunks = tokenizer.encode_texts([chunk.text for chunk in chunks])
    encoded = []
    for chunk, ids in zip(chunks, ids_of_chunks, strict=True):
        before = tokenizer.bos_id if chunk.begins_document else None
        after = tokenizer.eos_id if chunk.ends_document else None
        if (before, after) != (None, None):
            first, last = (np.array([] if i is None else [i], dtype=np.int32) for i in (before, after))
            ids = np.concatenate((first, ids, last))
        n_bytes = len(chunk.text) if chunk.text.isascii() else len(chunk.text.encode())
        encoded.append(EncodedChunk(chunk.split, ids, n_bytes, len(chunk.text)))
    return encoded


def encode_place(chunk: TextChunk, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a chunk by a tokenizer that begins a text otherwise than its further parts."""
    return tokenizer.encode(chunk.text) if chunk.begins_document else tokenizer.encode_continuation(chunk.text)


def write_dataset(
    folder: Path, read: Callable[[], Iterable[TextChunk]], tokenizer: str | Tokenizer, vocab_size: int = 8192
) -> int:
    """Tokenize text into folder/train.bin, val.bin and meta.json; how many documents ended in it.

    `read` gives the same chunks whenever it is called.

    tokenizer: char, byte, bpe (trained to vocab_size ids), a name of tiktoken's, a model's (`model_tokenizers.load`),
    or one that is ready. Raises UserError, and then leaves what was there before.
    """
    read()  # finds missing files before a tokenizer is made
    if isinstance(tokenizer, str):
        tokenizer = build_tokenizer(tokenizer, vocab_size, read)
    n_documents = dict.fromkeys(SPLITS, 0)
    try:
        chunks = mark_beginnings(count_documents(read(), n_documents))
        bins = write_bins(folder, chunks, tokenizer)
    except BaseException:
        with suppress(OSError):
            folder.rmdir()  # if it is empty
        raise
    write_meta(folder, tokenizer, bins)
    counts = []
    for split, summary in zip(SPLITS, bins.values(), strict=True):
        documents = f" of {plural(n_documents[split], 'document')}" if n_documents[split] else ""
        counts.append(f"{split}.bin {summary['tokens']:,} tokens{documents}")
    print(f"{folder}: {', '.join(counts)}; vocabulary {tokenizer.vocab_size:,}")
    return sum(n_documents.values())


def count_documents(chunks: Iterable[TextChunk], counts: dict[str, int]) -> Iterator[TextChunk]:
    """The chunks, while the documents that end are counted by split."""
    for chunk in chunks:
        counts[chunk.split] += chunk.ends_document
        yield chunk


def mark_beginnings(chunks: Iterable[TextChunk]) -> Iterator[TextChunk]:
    """The chunks; those that begin a document, or what a split has of one, say so."""
    inside: set[str] = set()  # the splits with a document that has not ended
    for chunk in chunks:
        yield chunk._replace(begins_document=chunk.split not in inside)
        if chunk.ends_document:
            inside.discard(chunk.split)
        else:
            inside.add(chunk.split)


def write_bins(folder: Path, chunks: Iterable[TextChunk], tokenizer: Tokenizer) -> dict[str, dict]:
    """Write both bins, whole or not at all; file name -> what meta.json says of it. Takes an old meta.json away."""

    def encode(group: list[TextChunk]) -> list[EncodedChunk]:
        return encode_chunks(group, tokenizer)

    dtype = dtype_for(tokenizer.vocab_size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack, closing(ProgressBar(f"preparing {folder.name}")) as progress:
            writers = {split: stack.enter_context(open_bin(folder / f"{split}.bin", dtype)) for split in SPLITS}
            for group in map_in_order(encode, group_chunks(chunks), os.cpu_count() or 1):
                for chunk in group:
                    writers[chunk.split].write(chunk.ids, chunk.n_bytes)
                    progress.add(chunk.n_chars)
            for split, writer in writers.items():
                if not writer.tokens:
                    raise UserError(f"no text for {split}.bin; give more text, or --val_input")
            (folder / "meta.json").unlink(missing_ok=True)  # it does not fit the new bins
    except OSError as error:  # a full disk among them
        raise UserError(f"{folder}: can't be written ({error.strerror})") from None
    return {f"{split}.bin": writer.summary() for split, writer in writers.items()}
