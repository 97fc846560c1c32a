"""Tables of rows: the readers of JSONL, JSON, CSV, TSV and parquet, a dict a row, and the writer of JSONL datasets.

Each file may be compressed, .gz or .zst. Errors name the file and the line. Knows nothing of what fields mean: which of
them an objective needs, examples.py checks. Imports neither torch nor numpy; everything streams.
"""

import csv
import gzip
import io
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from nanoforge.console import ProgressBar
from nanoforge.errors import UserError, did_you_mean
from nanoforge.files import atomic_write

Row = dict[str, Any]

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".json", *DELIMITERS, ".parquet")
COMPRESSIONS = (".gz", ".zst")
BAD_ROWS = ("error", "skip")  # what becomes of a row whose field holds what it can't hold
MAX_CELL_CHARS = 2**31 - 1  # the most that a C long holds everywhere; csv's own limit refuses cells of 128 KiB
PARQUET_BATCH_ROWS = 1024
JSON_CHARS = 2**16  # of a .json file, read at once
MAX_CUT_CHARS = 16  # at the end of a chunk, in which it can break off a literal or an escape

# ---------------------------------------------------------------------------------------------------------------------
# rows of a file


def unchanged(row: Row) -> Row:
    """The row as it is."""
    return row


def read_rows(path: Path, convert: Callable[[Row], Row] = unchanged) -> Iterator[Row]:
    """Every row of a table, in order, as `convert` returns it. Its suffix, in either case, decides the format.

    Raises UserError with path and line as it reads: for what is malformed, for what `convert` refuses by a UserError,
    and at the end for a file without rows. A parquet file has no lines: there the number is that of the row.
    """
    is_empty = True
    for line, row in numbered_rows(path):
        is_empty = False
        try:
            converted = convert(row)
        except UserError as error:
            raise UserError(f"{path}:{line}: {error}") from None
        yield converted
    if is_empty:
        raise UserError(f"{path}: has no rows")


def read_texts(path: Path, field: str, on_bad_row: Callable[[str], None] | None = None) -> Iterator[str]:
    """The text in one field of every row: the documents of a corpus.

    A row whose field holds no text, or an empty one, raises UserError; with on_bad_row it is left out, and on_bad_row
    gets the message.
    """
    for line, row in numbered_rows(path, [field]):
        text = read_document(row, field, f"{path}:{line}", on_bad_row)
        if text is not None:
            yield text


def read_document(row: Row, field: str, place: str, on_bad_row: Callable[[str], None] | None) -> str | None:
    """The document in a field of a row; None if it is none and on_bad_row took the message. Raises UserError.

    place: of the row, for the message.
    """
    try:
        if field not in row:
            available = ", ".join(row) or "none"
            raise UserError(f"has no field {field} but {available}{did_you_mean(field, row)}")
        text = check_text(row[field], field)
        if not text:
            raise UserError(f"{field}: is empty")
    except UserError as error:
        message = f"{place}: {error}; name another field with --field, or leave such rows out with --bad_rows=skip"
        if on_bad_row is None:
            raise UserError(message) from None
        on_bad_row(message)
        return None
    return text


def check_text(value: object, name: str = "") -> str:
    """The value, if it is text that can be encoded. Raises UserError, which begins with its name, if it has one."""
    prefix = f"{name}: " if name else ""
    if not isinstance(value, str):
        raise UserError(f"{prefix}must be text, not {preview(value)}")
    if not is_unicode(value):
        raise UserError(f"{prefix}half of a surrogate pair is no text; convert it first")
    return value


def preview(value: object) -> str:
    """A value for an error message, cut to 60 characters."""
    return "null" if value is None else f"{value!r:.60}"


def file_suffix(path: Path) -> str:
    """The suffix that decides a file's format, in lower case: .jsonl of docs.JSONL.gz."""
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    return path.suffix.lower()


def numbered_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
    """(line, row) for every row; the line is the one on which the row begins. Raises UserError.

    columns: all that is needed of the rows of a parquet file.
    """
    suffix = file_suffix(path)
    if suffix == ".jsonl":
        return read_jsonl(path)
    if suffix == ".json":
        return read_json(path)
    if suffix in DELIMITERS:
        return read_csv(path, DELIMITERS[suffix])
    if suffix == ".parquet":
        return read_parquet(path, columns)
    raise UserError(f"{path}: must be a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")


# ---------------------------------------------------------------------------------------------------------------------
# formats


def read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """(line, row) of a file with a JSON object a line; blank lines are skipped. Raises UserError."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not JSON ({error})") from None
            yield number, check_object(row, f"{path}:{number}")


def check_object(row: Any, place: str) -> Row:
    """The row, if it is a JSON object. Raises UserError."""
    if not isinstance(row, dict):
        shown = f"{json.dumps(row):.60}"
        raise UserError(f'{place}: must be an object such as {{"field": "text"}}, not {shown}')
    return row


class JsonScanner:
    """Reads JSON values, one after the other, from a file of which it holds little more than one value."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.decoder = json.JSONDecoder()
        self.text = ""
        self.position = 0
        self.line = 1

    def advance(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def read_more(self) -> bool:
        """Read a chunk, or as much as is waiting, so that a long value is not tried too often. False at the end."""
        chunk = self.file.read(max(JSON_CHARS, len(self.text) - self.position))
        self.text = self.text[self.position :] + chunk
        self.position = 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is not white space, or an empty text at the end."""
        while True:
            match = re.compile(r"\S").search(self.text, self.position)
            self.advance(match.start() if match else len(self.text))
            if match:
                return match[0]
            if not self.read_more():
                return ""

    def read_value(self) -> Any:
        """The value that begins here. Raises ValueError and RecursionError."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - MAX_CUT_CHARS
                if is_cut and self.read_more():
                    continue
                raise ValueError(error.msg) from None
            self.advance(end)
            return value


def read_json(path: Path) -> Iterator[tuple[int, Row]]:
    """(line, row) of a file with a list of JSON objects, or with objects one after the other. Raises UserError."""
    with open_text(path) as file:
        scanner = JsonScanner(file)
        in_list = scanner.peek() == "["
        if in_list:
            scanner.advance(scanner.position + 1)
        while character := scanner.peek():
            if in_list and character in ",]":
                in_list = character != "]"
                scanner.advance(scanner.position + 1)
                continue
            line = scanner.line
            try:
                row = scanner.read_value()
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{line}: not JSON ({error})") from None
            yield line, check_object(row, f"{path}:{line}")
        if in_list:
            raise UserError(f"{path}:{scanner.line}: the list is not closed; the file breaks off")


def read_csv(path: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    """(line, row) of a table whose first line names the fields; blank lines are skipped. Raises UserError.

    Cells are text, quoted as in RFC 4180. A row of another length than the first line, or a name twice, is refused.
    """
    records = csv_records(path, delimiter)
    header_line, names = next(records, (1, []))
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}:{header_line}: the first line, which names the fields, has {name!r} twice")
    for line, cells in records:
        if len(cells) != len(names):
            expected = f"the first line names {len(names)} fields: {', '.join(names)}"
            raise UserError(f"{path}:{line}: has {len(cells)} cells, but {expected}")
        yield line, dict(zip(names, cells, strict=True))


def csv_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every record that is not blank; a record may span lines. Raises UserError."""
    csv.field_size_limit(MAX_CELL_CHARS)  # for the whole process: the module has no other way
    with open_text(path, newline="") as file:  # cells keep the line ends in them
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(f"{path}:{line}: {error}") from None
            if cells:
                yield line, cells


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
    """(number, row) from 1 on; only these columns are read, if given. Raises UserError."""
    number = 1
    for batch in parquet_batches(path, columns):
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError):  # text that is not UTF-8, times that Python can't hold
            raise UserError(f"{path}:{describe_unreadable(batch, number)}") from None
        yield from enumerate(rows, start=number)
        number += len(rows)


def describe_unreadable(batch: Any, number: int) -> str:
    """Row, column and error of the first value in a batch that Python can't hold. number: of the batch's first row."""
    for row in range(batch.num_rows):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column[row].as_py()
            except (ValueError, OverflowError) as error:
                return f"{number + row}: {name} can't be read ({error}); convert it first"
    raise AssertionError("every value can be read")


def parquet_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """The record batches of a parquet file; only these columns are read, if given. Raises UserError."""
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading parquet needs a package: pip install pyarrow") from None
    with open_seekable(path) as stream:
        try:
            file = parquet.ParquetFile(stream)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: not a parquet file ({error})") from None
        names = file.schema_arrow.names
        for column in columns or ():
            if column not in names:
                raise UserError(f"{path}: has no column {column} but {', '.join(names)}; name the column with --field")
        try:
            yield from file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: a broken parquet file ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# bytes and lines of text


class ZstdFile(io.RawIOBase):
    """A .zst file, decompressed. One that breaks off is an error, as it is of a gzip file."""

    def __init__(self, file: BinaryIO, decompressor: Any) -> None:
        """decompressor: a zstandard.ZstdDecompressor."""
        self.file = file
        self.decompressor = decompressor
        self.frame: Any = None  # a file has one or more
        self.compressed = b""  # read, and not part of a frame yet
        self.waiting = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.waiting:
            data = self.compressed or self.file.read(io.DEFAULT_BUFFER_SIZE)
            if not data and self.frame is not None:
                raise EOFError("the file breaks off")
            if not data:
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            self.waiting = memoryview(self.frame.decompress(data))
            self.compressed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        size = min(len(buffer), len(self.waiting))
        buffer[:size] = self.waiting[:size]
        self.waiting = self.waiting[size:]
        return size


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """A file, decompressed if its name ends with .gz or .zst. Raises UserError, also as it is read."""
    errors: list[type[Exception]] = [OSError, EOFError, zlib.error]
    try:
        with path.open("rb") as file, ExitStack() as stack:
            if path.suffix.lower() == ".gz":
                yield cast(BinaryIO, stack.enter_context(gzip.open(file)))
            elif path.suffix.lower() == ".zst":
                zstandard = import_zstandard(path)
                errors.append(zstandard.ZstdError)
                decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
                yield stack.enter_context(io.BufferedReader(ZstdFile(file, decompressor)))
            else:
                yield file
    except tuple(errors) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: can't be read ({reason})") from None


def import_zstandard(path: Path) -> Any:
    """The package that reads .zst files. Raises UserError."""
    try:
        import zstandard
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading .zst needs a package: pip install zstandard") from None
    return zstandard


@contextmanager
def open_seekable(path: Path) -> Iterator[BinaryIO]:
    """A file that can be read at any place: a compressed one by a temporary file. Raises UserError."""
    with open_bytes(path) as file:
        if path.suffix.lower() not in COMPRESSIONS:
            yield file
            return
        with tempfile.TemporaryFile() as decompressed:
            shutil.copyfileobj(file, decompressed)
            decompressed.seek(0)
            yield decompressed


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file of lines without a byte order mark; newline as in `open`. Raises UserError, also as it is read."""
    try:
        with open_bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{undecodable_line(path)}: not UTF-8 ({error.reason}); convert it first") from None


def undecodable_line(path: Path) -> int:
    """The number of the first line that is not UTF-8; text is decoded in chunks, whose errors don't tell the line."""
    with open_bytes(path) as file:
        return next(number for number, line in enumerate(file, start=1) if not is_utf8(line))


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_unicode(text: str) -> bool:
    """Whether it can be encoded: JSON's escapes can name half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_splits(folder: Path, rows: Iterable[tuple[str, Row]], splits: Sequence[str]) -> None:
    """Write (split, row) pairs to folder/<split>.jsonl, all files whole or none. Streams.

    Raises UserError for a split without rows and for a folder that can't be written; what was there before stays then.
    """
    counts = dict.fromkeys(splits, 0)
    progress = ProgressBar(f"preparing {folder.name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = {}
            for split in splits:
                tmp_path = stack.enter_context(atomic_write(folder / f"{split}.jsonl"))
                files[split] = stack.enter_context(tmp_path.open("w", encoding="ascii"))
            for split, row in rows:
                counts[split] += 1
                progress.add(files[split].write(json.dumps(row) + "\n"))
            for split, file in files.items():
                if not counts[split]:
                    raise UserError(f"{folder}: no rows for {split}.jsonl")
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror})") from None
    finally:
        progress.close()
    written = ", ".join(f"{split}.jsonl {count:,} rows" for split, count in counts.items())
    print(f"{folder}: {written}")
