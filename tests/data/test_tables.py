"""Tables of rows: Python's csv and json are the witnesses; errors name the line; datasets are whole or not there."""

import csv
import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from nanoforge.data import tables
from nanoforge.data.tables import numbered_rows, read_rows, read_texts, write_splits
from nanoforge.data.token_bins import SPLITS
from nanoforge.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# reading

ROWS = [
    {"toxic": 'you, "fool"!\r\n', "polite": "dear\tsir"},
    {"toxic": "", "polite": "дорогой 日\u2028本"},
    {"toxic": '"', "polite": "x" * 200_000},
    {"toxic": "  ", "polite": "\\n"},
]


def read_error(path, read=read_rows, *args) -> str:
    """The message of the UserError that reading all of a file raises."""
    with pytest.raises(UserError) as error:
        list(read(path, *args))
    return str(error.value)


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_all_formats_of_text_hold_the_same(tmp_path: Path, bom, end):
    csv.field_size_limit(131072)  # Python's own; reading raises it
    for suffix, delimiter in [("csv", ","), ("TSV", "\t")]:
        with open(tmp_path / f"t.{suffix}", "w", newline="", encoding="utf-8") as file:
            file.write(bom)
            writer = csv.DictWriter(file, ["toxic", "polite"], delimiter=delimiter, lineterminator=end)
            writer.writeheader()
            for row in ROWS:
                writer.writerow(row)
                file.write(end)
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(ROWS)]
    (tmp_path / "t.jsonl").write_text(bom + f"{end} {end}".join(lines), encoding="utf-8", newline="")
    for name in ("t.csv", "t.TSV", "t.jsonl"):
        assert [*read_rows(tmp_path / name)] == ROWS
        assert [*read_texts(tmp_path / name, "polite")] == [row["polite"] for row in ROWS]


def test_parquet_holds_the_same(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([*ROWS, {"toxic": None, "polite": None}]), tmp_path / "t.parquet")
    assert [*read_rows(tmp_path / "t.parquet")] == [*ROWS, {"toxic": None, "polite": None}]
    assert [*read_texts(tmp_path / "t.parquet", "polite", [].append)] == [row["polite"] for row in ROWS]
    assert "has no column text but toxic, polite" in read_error(tmp_path / "t.parquet", read_texts, "text")
    (tmp_path / "t.parquet").write_bytes(b"PAR")
    assert "t.parquet: not a parquet file" in read_error(tmp_path / "t.parquet")


@pytest.mark.parametrize("chunk", [1, 7, 2**16])
def test_a_json_file_is_read_as_json_reads_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int):
    """A list, and objects one after the other, over any lines; the line of a row is where it begins."""
    monkeypatch.setattr(tables, "JSON_CHARS", chunk)
    rows = [*ROWS, {"n": [1, {"m": None}], "deep": {"x": True, "y": -1.5e-7}, "\u20ac": '\\"[],{}'}, {}]
    path = tmp_path / "t.json"
    for indent in (None, 2):
        whole = json.dumps(rows, indent=indent)
        path.write_text(f"\ufeff\n {whole}\n", encoding="utf-8")
        assert [*read_rows(path)] == json.loads(whole)
        separated = "\n".join(json.dumps(row, indent=indent) for row in rows)
        path.write_text(separated, encoding="utf-8")
        assert [*read_rows(path)] == rows
        begins = [number for number, line in enumerate(separated.splitlines(), start=1) if line.startswith("{")]
        assert [line for line, _ in numbered_rows(path)] == begins


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_tables_hold_the_same(tmp_path: Path, suffix: str):
    """Of two parts joined, as `cat` joins compressed files; one that breaks off is refused."""
    compress = gzip.compress if suffix == ".gz" else pytest.importorskip("zstandard").ZstdCompressor().compress
    lines = [f"{json.dumps(row)}\n".encode() for row in ROWS * 50]
    path = tmp_path / f"t.JSONL{suffix}"
    packed = compress(b"".join(lines[:70])) + compress(b"".join(lines[70:]))
    path.write_bytes(packed)
    assert [*read_rows(path)] == ROWS * 50
    path.write_bytes(packed[:-20])
    assert "can't be read" in read_error(path)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    path = tmp_path / f"t.parquet{suffix}"
    path.write_bytes(compress((tmp_path / "t.parquet").read_bytes()))
    assert [*read_rows(path)] == ROWS


NO_TEXTS = [None, "", 3, 1.5, True, ["a"], {"a": "b"}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("value", NO_TEXTS, ids=repr)
def test_one_rule_for_what_is_no_text(tmp_path: Path, value: object, suffix: str):
    """Refused by file, row and field, in every format alike; left out and counted where that is asked for."""
    path = tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        column = pyarrow.array([value, value] if value != "" else ["a", ""])  # a column has one type
        parquet.write_table(pyarrow.table({"text": column}), path)
        row = 2 if value == "" else 1
    else:
        rows = [json.dumps({"text": text}) for text in ("a", value, "b")]
        path.write_text("\n".join(rows) if suffix == "jsonl" else "[" + ",\n".join(rows) + "]")
        row = 2
    assert read_error(path, read_texts, "text").startswith(f"{path}:{row}: text: ")
    left_out: list[str] = []
    texts = [*read_texts(path, "text", left_out.append)]
    assert all(text in ("a", "b") for text in texts)
    assert len(texts) + len(left_out) == (2 if suffix == "parquet" else 3)


def test_parquet_columns_that_hold_no_text(tmp_path: Path):
    """Bytes, and text that is not UTF-8, which pyarrow writes without a check."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"text": [b"abc"]}), path)
    assert read_error(path, read_texts, "text").startswith(f"{path}:1: text: must be text, not b'abc'")
    latin = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(np.array([0, 1, 2], np.int32)), pyarrow.py_buffer(b"a\xe9")
    )
    parquet.write_table(pyarrow.table({"text": latin}), path)
    assert read_error(path, read_texts, "text").startswith(f"{path}:2: text can't be read ('utf-8'")
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(60) + whole[64:])
    assert f"{path}: " in read_error(path, read_texts, "text")
    columns = {
        "text": pyarrow.array(["x", "y"]).dictionary_encode(),
        "large": pyarrow.array(["u", "v"]).cast("large_string"),
    }
    parquet.write_table(pyarrow.table(columns), path)
    assert [*read_texts(path, "text")] == ["x", "y"] and [*read_texts(path, "large")] == ["u", "v"]


def test_json_keeps_its_types(tmp_path: Path):
    (tmp_path / "t.jsonl").write_text('{"n": 7, "x": [null, 0.5]}\n')
    assert [*read_rows(tmp_path / "t.jsonl")] == [{"n": 7, "x": [None, 0.5]}]


def test_rows_are_converted_and_what_is_refused_has_its_line(tmp_path: Path):
    def halve(row: dict) -> dict:
        if row["n"] % 2:
            raise UserError(f"{row['n']} is odd")
        return {"n": row["n"] // 2}

    path = tmp_path / "t.jsonl"
    path.write_text('{"n": 4}\n\n{"n": 6}\n')
    assert [*read_rows(path, halve)] == [{"n": 2}, {"n": 3}]
    path.write_text('{"n": 4}\n\n{"n": 5}\n')
    assert read_error(path, read_rows, halve) == f"{path}:3: 5 is odd"


@pytest.mark.parametrize("name, content, message", [
    ("t.jsonl", b'{"a": 1}\n\n{"a": }\n', "t.jsonl:3: not JSON (Expecting value"),
    ("t.jsonl", b'{"a": ' + b"[" * 100_000, "t.jsonl:1: not JSON"),
    ("t.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "t.jsonl:1: not JSON"),
    ("t.jsonl", b'{"a": 1}\n["a"]', "t.jsonl:2: must be an object"),
    ("t.jsonl", b"3", "t.jsonl:1: must be an object"),
    ("t.jsonl", b'{"a": "\xff"}', "t.jsonl:1: not UTF-8"),
    ("t.jsonl", b'{"a": 1}\n' * 9999 + b'{"a": "caf\xe9"}\n{}', "t.jsonl:10000: not UTF-8"),
    ("t.jsonl", b"", "t.jsonl: has no rows"),
    ("t.jsonl", b"\n \n", "t.jsonl: has no rows"),
    ("t.csv", b"", "t.csv: has no rows"),
    ("t.csv", b"a,b\n", "t.csv: has no rows"),
    ("t.csv", b'a,b\n"1\n1",2\n\n3\n', "t.csv:5: has 1 cells, but the first line names 2 fields: a, b"),
    ("t.tsv", b"a\tb\n1\t2\t3\n", "t.tsv:2: has 3 cells, but"),
    ("t.csv", b"a,b,a\n1,2,3\n", "t.csv:1: the first line, which names the fields, has 'a' twice"),
    ("t.csv", b'a,b\n1,2\n"1\n,2\n', "t.csv:3: unexpected end of data"),
    ("t.tsv", b'a\tb\n"so" he said\t2\n', "t.tsv:2: '\t' expected after '\"'"),
    ("t.csv", "a,b\n1,2\n".encode("utf-16"), "t.csv:1: not UTF-8"),
    ("t.json", b'[{"a": 1},\n {"a": }]', "t.json:2: not JSON (Expecting value"),
    ("t.json", b'[{"a": 1},\n 3]', "t.json:2: must be an object"),
    ("t.json", b'[{"a": 1},\n\n{"a": 2},\n', "t.json:4: the list is not closed"),
    ("t.json", b'{"a": "' + b"x" * 200_000, "t.json:1: not JSON (Unterminated string"),
    ("t.json", b'{"a": ' + b"[" * 100_000, "t.json:1: not JSON"),
    ("t.json", b"[]", "t.json: has no rows"),
    ("t.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0)[:-9], "t.csv.gz: can't be read (Compressed file ended"),
    ("t.csv.gz", b"a,b\n1,2\n", "t.csv.gz: can't be read (Not a gzipped file"),
    ("t.csv.gz", gzip.compress(b"a,b\n1,\xff\n", mtime=0), "t.csv.gz:2: not UTF-8"),
    ("t.parquet.gz", gzip.compress(b"PAR", mtime=0), "t.parquet.gz: not a parquet file"),
    ("t.txt", b"a,b\n1,2\n", "t.txt: must be a .jsonl, .json, .csv, .tsv or .parquet file"),
    ("t", b"", "t: must be a .jsonl, .json, .csv, .tsv or .parquet file"),
])  # fmt: skip
def test_broken_tables_are_refused_by_line(tmp_path: Path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert read_error(tmp_path / name).startswith(f"{tmp_path}/{message}")


@pytest.mark.parametrize("content, message", [
    ('{"text": "a"}\n\n{"text": 3}\n', "t.jsonl:3: text: must be text, not 3"),
    ('{"text": "a"}\n{"body": "b"}\n', "t.jsonl:2: has no field text but body"),
    ('{"text": "\\ud800"}\n', "t.jsonl:1: text: half of a surrogate pair"),
])  # fmt: skip
def test_texts_that_are_none_are_refused_by_line(tmp_path: Path, content, message):
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    assert read_error(path, read_texts, "text").startswith(f"{tmp_path}/{message}")


def test_a_table_without_rows_has_no_texts(tmp_path: Path):
    (tmp_path / "t.jsonl").write_text("")
    assert [*read_texts(tmp_path / "t.jsonl", "text")] == []


def test_unreadable_tables_are_refused(tmp_path: Path):
    assert "nowhere.csv: can't be read (No such file" in read_error(tmp_path / "nowhere.csv")
    (tmp_path / "folder.jsonl").mkdir()
    assert "can't be read (Is a directory)" in read_error(tmp_path / "folder.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# writing


def broken_rows():
    """Two rows, then the end of the disk."""
    yield "train", {"a": "ä\u2028"}  # which str.splitlines takes for the end of a line: questions of GSM8K have it
    yield "val", {"a": 2}
    raise UserError("the disk is gone")


def test_splits_are_written_whole_or_not_at_all(tmp_path: Path):
    folder = tmp_path / "d"
    write_splits(folder, itertools.islice(broken_rows(), 2), SPLITS)
    assert [*read_rows(folder / "train.jsonl")] == [{"a": "ä\u2028"}]
    assert [*read_rows(folder / "val.jsonl")] == [{"a": 2}]
    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in folder.iterdir()}
    with pytest.raises(UserError, match="disk"):
        write_splits(folder, broken_rows(), SPLITS)
    with pytest.raises(UserError, match=r"no rows for val\.jsonl"):
        write_splits(folder, itertools.islice(broken_rows(), 1), SPLITS)
    assert before == {path.name: (path.read_bytes(), path.stat().st_ino) for path in folder.iterdir()}


def test_a_folder_that_cant_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        write_splits(tmp_path / "file", broken_rows(), SPLITS)
