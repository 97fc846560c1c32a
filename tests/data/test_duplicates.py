"""--dedup keeps the first of documents with the same text; Python's dict and set are the witnesses."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
from helpers import ROOT

from nanoforge.data import documents, token_bins
from nanoforge.data.duplicates import Deduplicator, HashSet

SPEC = importlib.util.spec_from_file_location("prepare", ROOT / "data/prepare.py")
prepare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(prepare)


def write_rows(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def bin_texts(folder: Path, split: str) -> list[str]:
    """The documents of a bin of bytes."""
    meta = token_bins.read_meta(folder)
    ids = token_bins.TokenBin(folder, split, meta).shards[0].open().tolist()
    text = meta.tokenizer.decode(ids)
    return text.removesuffix("<|endoftext|>").split("<|endoftext|>")


@pytest.fixture
def made(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs data/prepare.py on files; (folder, what it printed)."""

    def run(name: str, **options: object) -> tuple[Path, str]:
        prepare.main(prepare.PrepareArgs(name=name, data_dir=str(tmp_path), tokenizer="byte", **options))
        return tmp_path / name, capsys.readouterr().out

    return run


def test_hashes_are_those_of_a_set():
    rng = random.Random(0)
    ours, witness = HashSet(min_recent=5), set()
    for _ in range(2000):
        value = rng.choice((rng.randrange(300), 2**64 - 1 - rng.randrange(300)))
        assert ours.add(value) == (value not in witness)
        witness.add(value)
    assert len(ours.recent) + len(ours.older) == len(witness) and len(ours.older) > len(witness) / 2


def test_the_first_of_the_same_documents_stays(tmp_path: Path, made):
    """Also of one that is a file of its own, and of texts that differ only behind the bytes that decide their split."""
    long = "x" * documents.KEY_BYTES
    texts = [f"document {i} ü" * 20 for i in range(30)] + [long + "a", long + "b"]
    repeated = [*texts, *texts[5:20], long + "b"]
    random.Random(1).shuffle(repeated)
    path = write_rows(tmp_path / "a.jsonl", repeated)
    (tmp_path / "again.txt").write_text(texts[3])
    folder, output = made("kept", input=(path, str(tmp_path / "again.txt")), dedup=True)
    assert "--dedup dropped 17 of 49 documents of --input" in output
    expected = list(dict.fromkeys(repeated))
    kept = {split: bin_texts(folder, split) for split in token_bins.SPLITS}
    assert sorted(kept["train"] + kept["val"]) == sorted(texts)
    assert kept["train"] == [text for text in expected if text in kept["train"]]
    # The same as of texts that were given once.
    once, _ = made("once", input=(write_rows(tmp_path / "b.jsonl", expected),))
    for split in token_bins.SPLITS:
        assert (once / f"{split}.bin").read_bytes() == (folder / f"{split}.bin").read_bytes()


def test_what_is_validated_on_is_not_trained_on(tmp_path: Path, made):
    train = write_rows(tmp_path / "train.jsonl", ["a", "b", "c", "b", "d"])
    val = write_rows(tmp_path / "val.jsonl", ["d", "e", "b", "e"])
    folder, output = made("both", input=(train,), val_input=(val,), dedup=True)
    assert (bin_texts(folder, "train"), bin_texts(folder, "val")) == (["a", "c"], ["d", "e", "b"])
    assert "1 of 4 documents of --val_input, 3 of 5 documents of --input" in output
    folder, output = made("plain", input=(train,), val_input=(val,))
    assert len(bin_texts(folder, "train")) == 5 and "--dedup" not in output


def test_every_pass_starts_anew():
    """A tokenizer that is made from the text reads it before the bins are written."""
    deduplicator = Deduplicator()
    items = [documents.text_document(text) for text in ("a", "b", "a")]
    for _ in range(2):
        deduplicator.restart()
        assert [item.source for item in deduplicator.keep_first(items, "--input")] == ["a", "b"]
    assert deduplicator.n_dropped == {"--input": 1}
