"""Files, folders and datasets of the hub to documents, and documents to splits. Knows nothing of tokens.

Everything streams, and may be read again: the same inputs give the same documents and the same splits, whatever their
order in time.
"""

import codecs
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from nanoforge.console import plural
from nanoforge.data import hub_datasets, tables
from nanoforge.errors import UserError

CHUNK_BYTES = 2**17  # of a text file, read at once: few enough that chunks under way stay in the processor's cache
KEY_BYTES = 2**16  # of a document that decide its split

# Of a corpus up to this size the split is weighed as a whole; beyond it the hashes alone give both shares.
HEAD_DOCUMENTS = 10_000
HEAD_CHARS = 2**23

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm")
SOURCE_NAMES = """
    asm bash c cc cfg clj cpp cs css cu cuh cxx dart el ex exs f90 fs go h hpp hs ini java jl js jsx kt lisp lua m mjs
    ml php pl proto ps1 py pyi r rb rs s scala scss sh sql sv swift tcl toml ts tsx v vb vhd xml yaml yml zig
"""
SOURCE_SUFFIXES = tuple(f".{name}" for name in SOURCE_NAMES.split())
KINDS = "a text (.txt, .md, ..., source code) or a table (.jsonl, .json, .csv, .tsv, .parquet), perhaps .gz or .zst"

OnBadRow = Callable[[str], None]
KeepFirst = Callable[[Iterable["Document"], str], Iterator["Document"]]  # of documents, and the flag that names them


class TextChunk(NamedTuple):
    """Consecutive text of one split."""

    split: str
    text: str
    ends_document: bool = False
    begins_document: bool = False


class Document(NamedTuple):
    """A text whose split is decided as a whole."""

    source: str | Path  # the text, or the file that is read in chunks when it is written
    key: int  # a hash of its text, below 2^64: the same texts are in the same split
    size: int  # in bytes


# ---------------------------------------------------------------------------------------------------------------------
# files


@dataclass
class FoundFiles:
    """The files that inputs name, and what was passed over in their folders."""

    paths: list[Path] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)  # why -> names

    def skip(self, reason: str, name: str) -> None:
        self.skipped.setdefault(reason, []).append(name)

    def describe(self) -> str:
        """What is read and what is not, by kind, on one line or two."""
        kinds: dict[str, int] = {}
        for path in self.paths:
            kind = "".join(path.suffixes[-2:] if path.suffix.lower() in tables.COMPRESSIONS else path.suffixes[-1:])
            kinds[kind] = kinds.get(kind, 0) + 1
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        lines = [f"reading {plural(len(self.paths), 'file')}: {counts}"]
        return "\n".join([*lines, self.describe_skipped()]).strip()

    def describe_skipped(self) -> str:
        """What is not read, by the reason; an empty text if that is nothing."""
        reasons = [f"{shorten(names)} ({reason})" for reason, names in self.skipped.items()]
        return f"skipping {'; '.join(reasons)}" if reasons else ""


def shorten(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5:,} more" if len(names) > 5 else shown


def is_text_file(path: Path) -> bool:
    return tables.file_suffix(path) in TEXT_SUFFIXES + SOURCE_SUFFIXES


def is_readable(path: Path) -> bool:
    return is_text_file(path) or tables.file_suffix(path) in tables.SUFFIXES


def find_files(inputs: Iterable[str], text_field: str, flag: str = "--input") -> FoundFiles:
    """The files that inputs name, and those below the folders that they name, sorted. Raises UserError."""
    found = FoundFiles()
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            n_before = len(found.paths)
            find_in_folder(path, text_field, found)
            if len(found.paths) == n_before:
                raise UserError(f"{flag}={name}: the folder needs {KINDS}; {found.describe_skipped() or 'it is empty'}")
        elif not path.is_file():
            raise UserError(f"{flag}={name}: no such file or folder")
        elif not is_readable(path):
            raise UserError(f"{flag}={name}: must be {KINDS}, a folder of them, or hf:NAME")
        else:
            found.paths.append(path)
    return found


def find_in_folder(folder: Path, text_field: str, found: FoundFiles) -> None:
    """Add the readable files below a folder, sorted, but for what is hidden or belongs to a run or a model."""
    paths: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=refuse_folder):
        inside = {name: why_not_entered(Path(place, name)) for name in sorted(folders)}
        folders[:] = [name for name, reason in inside.items() if not reason]
        for name, reason in inside.items():
            if reason:
                found.skip(reason, str(Path(place, name).relative_to(folder)))
        paths += [Path(place, name) for name in names]
    for path in sorted(paths):
        reason = why_not_read(path, text_field)
        if reason:
            found.skip(reason, str(path.relative_to(folder)))
        else:
            found.paths.append(path)


def refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename}: can't be read ({error.strerror})")


def why_not_entered(folder: Path) -> str:
    """Why the texts in a folder below an input are none of the corpus; empty if they are."""
    if folder.name.startswith(".") or folder.name in ("__pycache__", "node_modules"):
        return "hidden"
    if folder.is_symlink():
        return "links to folders"
    is_checkpoint = re.fullmatch(r"checkpoints|checkpoint-\d+", folder.name) is not None
    has_model = (folder / "train_config.json").exists() or any(folder.glob("*.safetensors"))
    return "runs and checkpoints" if is_checkpoint or has_model else ""


def why_not_read(path: Path, text_field: str) -> str:
    """Why a file below an input is none of the corpus; empty if it is."""
    if path.name.startswith("."):
        return "hidden"
    if not is_readable(path):
        return "no text"
    if not path.is_file():
        return "no files"
    if path.stat().st_size == 0:
        return "empty"
    if tables.file_suffix(path) == ".json":  # settings of programs are JSON, too
        try:
            _, row = next(tables.numbered_rows(path), (0, {}))
        except UserError:
            return "no JSON rows"
        if text_field not in row:
            return f"no field {text_field}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# documents


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
    n_bytes = 0
    with tables.open_bytes(path) as file:
        try:
            while data := file.read(CHUNK_BYTES - len(rest)):
                n_bytes += len(data)
                text = rest + decoder.decode(data)
                cut = word_boundary(text)
                rest = text[cut:]
                yield text[:cut]
            yield rest + decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            position = n_bytes - len(error.object) + error.start
            raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {position}); convert it first") from None


def read_chunks(document: Document) -> Iterable[str]:
    """The text of a document in chunks. Raises UserError."""
    return [document.source] if isinstance(document.source, str) else read_text(document.source)


def hash_text(text: bytes) -> int:
    """A hash of the beginning of a text, below 2^64."""
    return int.from_bytes(hashlib.blake2b(text[:KEY_BYTES], digest_size=8).digest(), "big")


def text_document(text: str) -> Document:
    encoded = text.encode()
    return Document(source=text, key=hash_text(encoded), size=len(encoded))


def file_document(path: Path) -> Document:
    """A text file as one document. Raises UserError when it is empty."""
    with tables.open_text(path) as file:
        beginning = file.read(KEY_BYTES)
    if not beginning:
        raise UserError(f"{path}: is empty; leave such files out with --bad_rows=skip")
    size = path.stat().st_size
    if path.suffix.lower() in tables.COMPRESSIONS:
        size = sum(len(text.encode()) for text in read_text(path))
    return Document(source=path, key=hash_text(beginning.encode()), size=size)


def read_documents(paths: Iterable[Path], text_field: str, on_bad_row: OnBadRow | None = None) -> Iterator[Document]:
    """A document for each text file and for each row of a table.

    What holds no text raises UserError; with on_bad_row it is left out, and on_bad_row gets the message.
    """
    for path in paths:
        if not is_text_file(path):
            yield from map(text_document, tables.read_texts(path, text_field, on_bad_row))
            continue
        try:
            document = file_document(path)
            if on_bad_row is not None:
                for _ in read_text(path):  # all of it is text
                    pass
        except UserError as error:
            if on_bad_row is None:
                raise
            on_bad_row(str(error))
            continue
        yield document


def read_hub(
    dataset: hub_datasets.HubDataset, text_field: str, split: str, on_bad_row: OnBadRow | None = None
) -> Iterator[Document]:
    """The documents of a dataset of the hub, streamed, of this split unless its name has one. Raises UserError."""
    for number, row in enumerate(hub_datasets.stream(dataset, split), start=1):
        text = tables.read_document(row, text_field, f"{dataset}:{number}", on_bad_row)
        if text is not None:
            yield text_document(text)


# ---------------------------------------------------------------------------------------------------------------------
# splits


def split_documents(documents: Iterable[Document], val_fraction: float) -> Iterator[TextChunk]:
    """Documents to splits by a hash of their text; a lone document, or one that is most of the text, by position.

    Validation gets val_fraction of the documents and of the text, as nearly as whole documents can give both, and at
    least one; so does training.
    """
    # 1. Weigh the first documents as a whole.
    documents = iter(documents)
    head = read_head(documents)
    if len(head) <= 1:
        yield from chain.from_iterable(split_by_position(document, val_fraction) for document in head)
        return
    if len({document.key for document in head}) == 1:  # all the same: then their places tell them apart
        head = [document._replace(key=hash_text(str(i).encode())) for i, document in enumerate(head)]
    val_keys = choose_validation(head, val_fraction)
    cut_key, cut_fraction = choose_cut(head, val_keys, val_fraction)

    # 2. The others follow their own hashes.
    train_keys = {document.key for document in head} - val_keys
    n_bytes = n_val_bytes = 0
    for document in chain(head, documents):
        n_bytes += document.size
        is_val = document.key in val_keys
        if not is_val and document.key not in train_keys:
            fits = n_val_bytes + document.size <= 2 * val_fraction * n_bytes
            is_val = fits and document.key < val_fraction * 2**64
        n_val_bytes += document.size * is_val
        if document.key == cut_key:
            yield from split_by_position(document, cut_fraction)
            yield from (TextChunk(split, "", ends_document=True) for split in ("train", "val"))
        else:
            yield from whole_document(document, "val" if is_val else "train")


def whole_document(document: Document, split: str, *, ends: bool = True) -> Iterator[TextChunk]:
    """The chunks of a document in one split, and its end."""
    for text in read_chunks(document):
        yield TextChunk(split, text)
    if ends:
        yield TextChunk(split, "", ends_document=True)


def read_head(documents: Iterator[Document]) -> list[Document]:
    """The first documents, as many as are weighed as a whole; at least two, if there are two."""
    head: list[Document] = []
    n_chars = 0  # held in memory
    for document in documents:
        head.append(document)
        n_chars += len(document.source) if isinstance(document.source, str) else 0
        if len(head) >= 2 and (n_chars > HEAD_CHARS or len(head) >= HEAD_DOCUMENTS):
            break
    return head


def choose_validation(documents: Sequence[Document], val_fraction: float) -> set[int]:
    """Keys of the documents for validation, at least one and not all.

    In the order of their keys, each document is taken that brings the shares of text and of documents nearer to
    val_fraction; the share of text, which is what losses are measured on, counts twice.
    """
    counts: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for document in documents:
        counts[document.key] = counts.get(document.key, 0) + 1
        sizes[document.key] = sizes.get(document.key, 0) + document.size
    total_size = sum(sizes.values())

    def distance(count: int, size: int) -> float:
        return abs(count / len(documents) - val_fraction) + 2 * abs(size / total_size - val_fraction)

    chosen: set[int] = set()
    count = size = 0
    for key in sorted(counts)[:-1]:
        if distance(count + counts[key], size + sizes[key]) < distance(count, size):
            chosen.add(key)
            count += counts[key]
            size += sizes[key]
    return chosen or {min(sorted(counts), key=lambda key: distance(counts[key], sizes[key]))}


def choose_cut(documents: Sequence[Document], val_keys: set[int], val_fraction: float) -> tuple[int | None, float]:
    """The training document whose end makes up validation's share of the text, and the part that this end is.

    None if the documents for validation have at least half of that share: where no document is most of the text.
    """
    share = val_fraction * sum(document.size for document in documents)
    missing = share - sum(document.size for document in documents if document.key in val_keys)
    keys = [document.key for document in documents]
    largest = max((item for item in documents if item.key not in val_keys), key=lambda document: document.size)
    if missing < share / 2 or keys.count(largest.key) > 1:
        return None, 0.0
    return largest.key, min(missing / largest.size, 0.5)


def split_by_position(document: Document, val_fraction: float) -> Iterator[TextChunk]:
    """One document to splits: its last val_fraction, at least a character, is for validation. It is read twice."""
    n_chars = sum(len(text) for text in read_chunks(document))
    remaining = max(1, min(int(n_chars * (1 - val_fraction)), n_chars - 1))  # characters of train
    for text in read_chunks(document):
        train, val = text[:remaining], text[remaining:]
        if train:
            yield TextChunk("train", train)
        if val:
            yield TextChunk("val", val)
        remaining = max(0, remaining - len(text))


# ---------------------------------------------------------------------------------------------------------------------
# what a command names


@dataclass(frozen=True)
class CorpusInputs:
    """What --input and --val_input name, and how it is read."""

    train: tuple[str, ...]
    val: tuple[str, ...] = ()  # none: a part of the others
    field: str = "text"  # of a row, that holds the text
    val_fraction: float = 0.1
    on_bad_row: OnBadRow | None = None
    keep_first: KeepFirst | None = None  # drops documents that were there before

    def find(self, flag: str) -> FoundFiles | None:
        """The files behind --input or --val_input; None for a dataset of the hub. Raises UserError."""
        inputs = self.train if flag == "--input" else self.val
        if not any(hub_datasets.is_hub(name) for name in inputs):
            return find_files(inputs, self.field, flag)
        if len(inputs) > 1:
            raise UserError(f"{flag}: give one hf:NAME alone, or files and folders")
        return None

    def open(self) -> Iterator[TextChunk]:
        """All text, split. Raises UserError, for missing files at once."""
        found = self.find("--input")
        documents = self.documents(found, self.train, "train")
        if self.keep_first:
            documents = self.keep_first(documents, "--input")
        if not self.val:
            return split_documents(documents, self.val_fraction)
        found_val = self.find("--val_input")
        ends = True
        if found and found_val:
            check_apart(found.paths, found_val.paths)
            ends = not (is_lone_text(found.paths) and is_lone_text(found_val.paths))
        val_documents = self.documents(found_val, self.val, "validation")
        if self.keep_first:
            val_documents = self.keep_first(val_documents, "--val_input")
        sides = [("val", val_documents), ("train", documents)]  # what is in both is kept in validation alone
        return chain.from_iterable(whole_document(item, split, ends=ends) for split, items in sides for item in items)

    def documents(self, found: FoundFiles | None, inputs: Sequence[str], hub_split: str) -> Iterator[Document]:
        if found is None:
            return read_hub(hub_datasets.HubDataset.parse(inputs[0]), self.field, hub_split, self.on_bad_row)
        return read_documents(found.paths, self.field, self.on_bad_row)


def is_lone_text(paths: Sequence[Path]) -> bool:
    """Whether the files are one text, which goes on for ever, as one that is split by position."""
    return len(paths) == 1 and is_text_file(paths[0])


def check_apart(train: Iterable[Path], val: Iterable[Path]) -> None:
    """Raise UserError for a file that is for training and for validation."""
    train_paths = {path.resolve() for path in train}
    for path in val:
        if path.resolve() in train_paths:
            raise UserError(f"--val_input: {path} is in --input as well; validate on text that is not trained on")
