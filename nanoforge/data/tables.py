"""Tables of rows: the readers of .jsonl, .csv, .tsv and .parquet files, a dict a row, and the writer of JSONL datasets.

Errors name the file and the line. Knows nothing of what fields mean: which of them an objective needs, examples.py
checks. Imports neither torch nor numpy; everything streams.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from nanoforge.console import ProgressBar
from nanoforge.errors import UserError
from nanoforge.files import atomic_write

Row = dict[str, Any]

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", *DELIMITERS, ".parquet")
MAX_CELL_CHARS = 2**31 - 1  # the most that a C long holds everywhere; csv's own limit refuses cells of 128 KiB
PARQUET_BATCH_ROWS = 1024

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


def read_texts(path: Path, field: str) -> Iterator[str]:
    """The text in one field of every row: the documents of a corpus. Raises UserError.

    A null of a parquet file is an empty text.
    """
    if path.suffix.lower() == ".parquet":
        for batch in parquet_batches(path, [field]):
            yield from (text or "" for text in batch.column(0).to_pylist())
        return
    for line, row in numbered_rows(path):
        if field not in row:
            available = ", ".join(row) or "none"
            raise UserError(f"{path}:{line}: has no field {field} but {available}; name the field with --field")
        text = row[field]
        if not isinstance(text, str):
            raise UserError(f"{path}:{line}: {field} is {text!r:.60}, not text; name the field with --field")
        if not text.isascii() and not is_unicode(text):
            raise UserError(f"{path}:{line}: {field} is not UTF-8: it has half of a surrogate pair; convert it first")
        yield text


def numbered_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line, row) for every row; the line is the one on which the row begins. Raises UserError."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return read_jsonl(path)
    if suffix in DELIMITERS:
        return read_csv(path, DELIMITERS[suffix])
    if suffix == ".parquet":
        return read_parquet(path)
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
            if not isinstance(row, dict):
                shown = f"{line.strip()!r:.60}"
                raise UserError(f'{path}:{number}: must be an object such as {{"field": "text"}}, not {shown}')
            yield number, row


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


def read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    """(number, row) from 1 on. Raises UserError."""
    number = 0
    for batch in parquet_batches(path):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def parquet_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """The record batches of a parquet file; only these columns are read, if given. Raises UserError."""
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading parquet needs a package: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a parquet file ({error})") from None
    names = file.schema_arrow.names
    for column in columns or ():
        if column not in names:
            raise UserError(f"{path}: has no column {column} but {', '.join(names)}; name the column with --field")
    yield from file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns)


# ---------------------------------------------------------------------------------------------------------------------
# lines of text


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file of lines without a byte order mark; newline as in `open`. Raises UserError, also as it is read."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{undecodable_line(path)}: not UTF-8 ({error.reason}); convert it first") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None


def undecodable_line(path: Path) -> int:
    """The number of the first line that is not UTF-8; text is decoded in chunks, whose errors don't tell the line."""
    with path.open("rb") as file:
        return next(number for number, line in enumerate(file, start=1) if not is_utf8(line))


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_unicode(text: str) -> bool:
    """Whether it can be encoded: JSON's escapes can name half of a surrogate pair."""
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
