"""Tables of rows: Python's csv and json are the witnesses; errors name the line; datasets are whole or not there."""

import csv
import itertools
import json

import pytest

from nanoforge.data.tables import read_rows, read_texts, write_splits
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
def test_all_formats_of_text_hold_the_same(tmp_path, bom, end):
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


def test_parquet_holds_the_same(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([*ROWS, {"toxic": None, "polite": None}]), tmp_path / "t.parquet")
    assert [*read_rows(tmp_path / "t.parquet")] == [*ROWS, {"toxic": None, "polite": None}]
    assert [*read_texts(tmp_path / "t.parquet", "polite")] == [*(row["polite"] for row in ROWS), ""]
    assert "has no column text but toxic, polite" in read_error(tmp_path / "t.parquet", read_texts, "text")
    (tmp_path / "t.parquet").write_bytes(b"PAR")
    assert "t.parquet: not a parquet file" in read_error(tmp_path / "t.parquet")


def test_json_keeps_its_types(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"n": 7, "x": [null, 0.5]}\n')
    assert [*read_rows(tmp_path / "t.jsonl")] == [{"n": 7, "x": [None, 0.5]}]


def test_rows_are_converted_and_what_is_refused_has_its_line(tmp_path):
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
    ("t.txt", b"a,b\n1,2\n", "t.txt: must be a .jsonl, .csv, .tsv or .parquet file"),
    ("t", b"", "t: must be a .jsonl, .csv, .tsv or .parquet file"),
])  # fmt: skip
def test_broken_tables_are_refused_by_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert read_error(tmp_path / name).startswith(f"{tmp_path}/{message}")


@pytest.mark.parametrize("content, message", [
    ('{"text": "a"}\n\n{"text": 3}\n', "t.jsonl:3: text is 3, not text"),
    ('{"text": "a"}\n{"body": "b"}\n', "t.jsonl:2: has no field text but body"),
    ('{"text": "\\ud800"}\n', "t.jsonl:1: text is not UTF-8"),
])  # fmt: skip
def test_texts_that_are_none_are_refused_by_line(tmp_path, content, message):
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    assert read_error(path, read_texts, "text").startswith(f"{tmp_path}/{message}")


def test_a_table_without_rows_has_no_texts(tmp_path):
    (tmp_path / "t.jsonl").write_text("")
    assert [*read_texts(tmp_path / "t.jsonl", "text")] == []


def test_unreadable_tables_are_refused(tmp_path):
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


def test_splits_are_written_whole_or_not_at_all(tmp_path):
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


def test_a_folder_that_cant_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        write_splits(tmp_path / "file", broken_rows(), SPLITS)
