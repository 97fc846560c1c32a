"""The shipped datasets of examples: GSM8K from its real files, sums that are right by Python's own arithmetic."""

import json
from pathlib import Path

import pytest
from helpers import SHARED, run_script

from nanoforge.data import token_bins
from nanoforge.data.tables import read_rows
from nanoforge.posttraining.answers import is_correct, to_problem

needs_gsm8k = pytest.mark.skipif(not (SHARED / "gsm8k").exists(), reason="the real GSM8K of ../shared is not here")


def read_split(folder, split) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# GSM8K


def prepare_gsm8k(out_dir, *flags, **options):
    return run_script(*flags, f"--out_dir={out_dir}", script="data/gsm8k/prepare.py", **options)


@pytest.mark.slow
@needs_gsm8k
def test_gsm8k_is_prepared_from_its_folder_or_files(tmp_path: Path):
    raw = SHARED / "gsm8k"
    printed = prepare_gsm8k(tmp_path / "a", "--input", raw).stdout
    prepare_gsm8k(tmp_path / "b", "--input", raw / "test.jsonl", raw / "train.jsonl")
    assert "7,473 rows" in printed and "1,319 rows" in printed
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["train.jsonl", "val.jsonl"]
    for split, name in {"train": "train", "val": "test"}.items():
        assert (tmp_path / f"a/{split}.jsonl").read_bytes() == (tmp_path / f"b/{split}.jsonl").read_bytes()
        assert read_split(tmp_path / "a", split) == list(read_rows(raw / f"{name}.jsonl", to_problem))
    prepare_gsm8k(tmp_path / "chat", "--input", raw, "--chat")
    text, chat = (read_split(tmp_path / name, "val")[0] for name in ("a", "chat"))
    assert [message["role"] for message in chat["prompt"] + chat["completion"]] == ["user", "assistant"]
    assert chat["prompt"][0]["content"] == text["prompt"].rstrip() and chat["answer"] == text["answer"]


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", [
    (["--input=nowhere"], "--input: nowhere"), (["--input=test.jsonl"], "train.jsonl"),
    (["--input=folder"], "folder/train.jsonl"),
    (["--input=x.jsonl"], "--input: x.jsonl"), (["--input", "bad/train.jsonl", "test.jsonl"], "bad/train.jsonl:1: "),
    ([], "--input FILE"),
])  # fmt: skip
def test_gsm8k_without_its_files_says_what_to_do(tmp_path: Path, flags, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/train.jsonl").write_text('{"question": "x"}\n')
    for name in ("test.jsonl", "x.jsonl"):
        (tmp_path / name).write_text('{"question": "x", "answer": "#### 1"}\n')
    offline = {"https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    done = prepare_gsm8k(tmp_path / "out", *flags, check=False, cwd=tmp_path, env=offline)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# arithmetic

N_ROWS = {"train": 2250, "val": 250}


def prepare_arithmetic(out_dir, *flags, **options):
    return run_script(*flags, f"--out_dir={out_dir}", script="data/arithmetic/prepare.py", **options)


def prepare_preferences(out_dir, *flags):
    return prepare_arithmetic(out_dir, "--kind=preferences", *flags)


@pytest.mark.slow
def test_arithmetics_problems_are_the_sums_of_its_bins(tmp_path: Path):
    prepare_arithmetic(tmp_path, "--sums=2500")
    meta = token_bins.read_meta(tmp_path)
    assert meta.vocab_size == 14 and meta.tokenizer.eos_id == 13
    for split in ("train", "val"):
        lines = meta.tokenizer.decode(token_bins.TokenBin(tmp_path, split, meta).shards[0].open().tolist()).splitlines()
        rows = read_split(tmp_path, split)
        assert [row["prompt"] + row["completion"] for row in rows] == lines
        assert len(lines) == N_ROWS[split]
        for row in rows:
            assert row == to_problem(row) and is_correct(row["completion"], row["answer"])


@pytest.mark.slow
def test_preferences_are_off_by_one(tmp_path: Path):
    for name, flags in {"a": [], "b": [], "c": ["--seed=1"]}.items():
        prepare_preferences(tmp_path / name, *flags)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["train.jsonl", "val.jsonl"]
    a, b, c = ([*read_split(tmp_path / name, "train"), *read_split(tmp_path / name, "val")] for name in "abc")
    assert a == b and len(a) == 10_000
    offsets = {row["prompt"]: int(row["rejected"]) - int(row["chosen"]) for row in a}
    assert set(offsets.values()) == {-1, 1} and abs(sum(offsets.values())) < 500 and len(offsets) == 10_000
    assert all(eval(row["prompt"][:-1]) == int(row["chosen"]) and int(row["rejected"]) >= 0 for row in a)
    assert offsets["0+0="] == 1
    pairs = zip(offsets.values(), c, strict=True)
    same = sum(offset == int(row["rejected"]) - int(row["chosen"]) for offset, row in pairs)
    assert 4000 < same < 6000, "another seed, other mistakes in the same rows"


@pytest.mark.slow
@pytest.mark.parametrize("unpaired", [1, 8])
def test_unpaired_preferences_have_so_many_wrong_to_a_right_one(tmp_path: Path, unpaired):
    prepare_preferences(tmp_path, f"--unpaired={unpaired}", "--sums=1800")
    for split, n_rows in {"train": 1620, "val": 180}.items():
        rows = read_split(tmp_path, split)
        labels = [row["label"] for row in rows]
        assert len(rows) == n_rows and sum(labels) == n_rows // (unpaired + 1)
        assert labels[: unpaired + 1] == [True, *[False] * unpaired]
        assert all(abs(eval(row["prompt"][:-1]) - int(row["completion"])) == (not row["label"]) for row in rows)


WRONG_FLAGS = [(["--kind=preferences"], "--out_dir"), (["--unpaired=8"], "only with --kind=preferences")]


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", WRONG_FLAGS)
def test_preferences_dont_take_the_place_of_the_sums(flags, message):
    done = run_script(*flags, script="data/arithmetic/prepare.py", check=False)
    assert done.returncode == 2 and message in done.stderr
