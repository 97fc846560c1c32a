"""Datasets of the hub: the rows are those of the `datasets` library, from its cache, a folder or save_to_disk."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import COMMIT, cache_dataset, write_hub_folder

from nanoforge.data import hub_datasets, row_splits
from nanoforge.data.hub_datasets import HubDataset
from nanoforge.errors import UserError

datasets = pytest.importorskip("datasets")

ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1), "id": i} for i in range(40)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the library, which is offline."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", value=True)
    hub_datasets.load.cache_clear()
    hub_datasets.choose_hub_rows.cache_clear()
    return folder


def rows_of(name: str, side: str = "train", val_fraction: float = 0.1) -> list[dict]:
    return [row for _, row in hub_datasets.sides(name, val_fraction)[side].numbered_rows()]


@pytest.mark.parametrize("text, expected", [
    ("hf:org/name", HubDataset("org/name")),
    ("hf:squad", HubDataset("squad")),
    ("hf:org/name:main@v1.0#train_a/test_a", HubDataset("org/name", "main", "v1.0", "train_a", "test_a")),
    ("hf:org/name@refs/convert/parquet", HubDataset("org/name", revision="refs/convert/parquet")),
    ("hf:org/name#train[:90%]/train[90%:]", HubDataset("org/name", split="train[:90%]", val_split="train[90%:]")),
])  # fmt: skip
def test_a_name_has_a_configuration_a_revision_and_splits(text: str, expected: HubDataset):
    assert HubDataset.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["hf:", "hf:a/b/c", "hf:org/name:", "hf:org/name@", "hf:org/name#", "hf:a#b/", "hf:/no"]
)
def test_what_is_no_name_is_refused(text: str):
    with pytest.raises(UserError, match=f"^{text}: must be hf:NAME"):
        HubDataset.parse(text)


def test_the_rows_are_those_of_the_library_in_its_order(tmp_path: Path, cache: Path):
    """From a folder of parquet files, from JSONL, from save_to_disk and from the cache; the witness is `datasets`."""
    folder = write_hub_folder(tmp_path / "folder", train=ROWS[:30], test=ROWS[30:])
    loaded = datasets.load_dataset(str(folder))
    loaded.save_to_disk(tmp_path / "saved")
    (tmp_path / "jsonl").mkdir()
    for split, rows in (("train", ROWS[:30]), ("test", ROWS[30:])):
        (tmp_path / f"jsonl/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache_dataset(cache, "org/name", train=ROWS[:30], test=ROWS[30:])
    names = [f"hf:{tmp_path / name}" for name in ("folder", "saved", "jsonl")] + ["hf:org/name"]
    for name in names:
        assert rows_of(name) == list(loaded["train"]) == ROWS[:30]
        assert rows_of(name, "val") == list(loaded["test"]) == ROWS[30:]
    fingerprints = {hub_datasets.sides(name, 0.1)["train"].fingerprint() for name in names}
    assert len(fingerprints) == 1 and fingerprints.pop().startswith("30 rows, "), "it is of the rows, not of a file"


def test_splits_are_named_as_in_the_library(tmp_path: Path, cache: Path):
    folder = write_hub_folder(tmp_path / "f", train_prefs=ROWS[:10], test_prefs=ROWS[10:20], train_sft=ROWS[20:])
    loaded = datasets.load_dataset(str(folder))
    assert rows_of(f"hf:{folder}#train_prefs") == list(loaded["train_prefs"])
    assert rows_of(f"hf:{folder}#train_prefs", "val") == list(loaded["test_prefs"]), "its counterpart"
    for split in ("train_sft[:50%]", "train_sft[3:-2]", "train_prefs+test_prefs", "train_sft[10%:20%]"):
        expected = list(datasets.load_dataset(str(folder), split=split))
        assert rows_of(f"hf:{folder}#{split}/{split}") == rows_of(f"hf:{folder}#{split}/{split}", "val") == expected
    with pytest.raises(UserError, match=r"#train: no such split.* test_prefs, train_prefs, train_sft; .*#train_prefs$"):
        rows_of(f"hf:{folder}")
    with pytest.raises(UserError, match="#tost: no such split"):
        rows_of(f"hf:{folder}#train_sft/tost", "val")


def test_without_a_split_for_validation_a_share_of_the_rows_is_put_aside(tmp_path: Path, cache: Path):
    """The two sides are all rows, in their order; equal rows are on one side; the order of rows decides nothing."""
    twice = ROWS + ROWS
    folder = write_hub_folder(tmp_path / "f", train=twice)
    train, val = (rows_of(f"hf:{folder}", side, 0.2) for side in ("train", "val"))
    assert 10 <= len(val) <= 18 and len(train) + len(val) == len(twice)
    assert [row for row in twice if row in val] == val and [row for row in twice if row not in val] == train
    write_hub_folder(tmp_path / "reversed", train=twice[::-1])
    assert rows_of(f"hf:{tmp_path}/reversed", "val", 0.2) == val[::-1]
    few = write_hub_folder(tmp_path / "few", train=ROWS[:2])
    assert len(rows_of(f"hf:{few}")) == len(rows_of(f"hf:{few}", "val")) == 1
    for name, rows in (("most", ROWS[:1] * 9 + ROWS[1:2]), ("others", ROWS[1:2] * 9 + ROWS[:1])):
        folder = write_hub_folder(tmp_path / name, train=rows)
        counts = sorted(len(rows_of(f"hf:{folder}", side, 0.5)) for side in ("train", "val"))
        assert counts == [1, 9], "equal rows stay together, whichever have the larger hash"
    same = write_hub_folder(tmp_path / "same", train=ROWS[:1] * 5)
    with pytest.raises(UserError, match="two different rows"):
        rows_of(f"hf:{same}")


def test_a_file_without_another_for_validation_is_divided_as_a_dataset_is(tmp_path: Path, cache: Path):
    """The format does not matter; the numbers are those of the rows in the file."""
    folder = write_hub_folder(tmp_path / "f", train=ROWS)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for side in row_splits.SIDES:
        hub_side = hub_datasets.sides(f"hf:{folder}", 0.2)[side]
        for path in (tmp_path / "a.jsonl", folder / "data/train-00000-of-00001.parquet"):
            file_side = row_splits.file_sides(path, 0.2)[side]
            assert list(file_side.numbered_rows()) == list(hub_side.numbered_rows())
            assert file_side.fingerprint() == hub_side.fingerprint()
            assert len(list(file_side.numbered_rows())) == (8 if side == "val" else 32)


def test_offline_another_revision_than_that_of_the_cache_is_refused(cache: Path):
    """The library would give what it has, whatever revision is asked for."""
    cache_dataset(cache, "org/name", train=ROWS)
    assert datasets.load_dataset("org/name", revision="ffffffffff")["train"].num_rows == 40, "the reason for the check"
    assert rows_of("hf:org/name@0123456789", "val") == rows_of("hf:org/name", "val")
    for revision in ("ffffffffff", "v1.0"):
        with pytest.raises(UserError, match=f"^hf:org/name@{revision}: .*{COMMIT}"):
            rows_of(f"hf:org/name@{revision}")
    cache_dataset(cache, "org/name", config="other", train=ROWS[:9])
    assert len(rows_of("hf:org/name:other#train/train")) == 9
    hub_datasets.load.cache_clear()
    with pytest.raises(UserError, match=r"^hf:org/name: .*configurations.*hf:NAME\[:CONFIG\]"):
        rows_of("hf:org/name")
    with pytest.raises(UserError, match=r"^hf:org/name:third: can't be read"):
        rows_of("hf:org/name:third")
    with pytest.raises(UserError, match=r"^hf:org/missing: can't be read"):
        rows_of("hf:org/missing")


def test_a_corpus_and_examples_read_the_same_rows(tmp_path: Path, cache: Path):
    """Also of save_to_disk, which the library can't stream, and of a commit."""
    cache_dataset(cache, "org/name", train=ROWS)
    datasets.load_dataset("org/name").save_to_disk(tmp_path / "saved")
    for name in ("org/name", "org/name@0123456", f"{tmp_path}/saved"):
        assert list(hub_datasets.stream(HubDataset.parse(f"hf:{name}"), "train")) == ROWS
        assert list(hub_datasets.stream(HubDataset.parse(f"hf:{name}#train[:3]"), "validation")) == ROWS[:3]
        with pytest.raises(UserError, match="#validation: no such split"):
            list(hub_datasets.stream(HubDataset.parse(f"hf:{name}"), "validation"))
    with pytest.raises(UserError, match=COMMIT):
        list(hub_datasets.stream(HubDataset.parse("hf:org/name@fffffff"), "train"))


def test_values_that_json_has_no_form_for_have_the_same_hash_every_time():
    """Of a picture only the kind counts: its repr has an address."""
    row = {"a": 1, "image": SimpleNamespace(), "bytes": b"x"}
    assert row_splits.hash_row(row) == row_splits.hash_row({"bytes": b"x", "image": SimpleNamespace(), "a": 1})
