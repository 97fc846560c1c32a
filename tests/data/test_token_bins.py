"""Bins and meta files: nanoGPT's, ReaLLM-Forge's and llm.c's formats, and everything that can be wrong with them."""

import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import SHARED, needs_shared, run_script

from nanoforge.data import token_bins, tokenization
from nanoforge.errors import UserError

CHARS = sorted(set("hello world\n"))


@pytest.fixture
def folder(tmp_path: Path):
    """What nanoGPT's prepare.py leaves: uint16 bins and a pickled meta."""
    ids = np.array([CHARS.index(char) for char in "hello world\n" * 40], dtype=np.uint16)
    ids.tofile(tmp_path / "train.bin")
    ids[:200].tofile(tmp_path / "val.bin")
    meta = {"vocab_size": len(CHARS), "itos": dict(enumerate(CHARS)), "stoi": {char: i for i, char in enumerate(CHARS)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    return tmp_path


def test_nanogpts_folder_is_read_as_it_is(folder):
    meta = token_bins.read_meta(folder)
    train = token_bins.TokenBin(folder, "train", meta)
    assert meta.vocab_size == len(CHARS) and train.tokens == 480
    assert meta.tokenizer.decode(train.shards[0].open()[:12].tolist()) == "hello world\n"
    assert meta.tokenizer.encode("low").tolist() == [CHARS.index(char) for char in "low"]


@pytest.mark.slow
@needs_shared
def test_nanogpts_shakespeare_trains_unchanged(tmp_path: Path, run):
    """Bins and meta.pkl as its data/shakespeare_char/prepare.py writes them."""
    text = (SHARED / "tinyshakespeare/input.txt").read_text()
    chars = sorted(set(text))
    stoi = {char: i for i, char in enumerate(chars)}
    folder = tmp_path / "data/shakespeare_char"
    folder.mkdir(parents=True)
    cut = int(len(text) * 0.9)
    np.array([stoi[c] for c in text[:cut]], dtype=np.uint16).tofile(folder / "train.bin")
    np.array([stoi[c] for c in text[cut:]], dtype=np.uint16).tofile(folder / "val.bin")
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    done = run(
        f"--data_dir={tmp_path / 'data'}",
        "--dataset=shakespeare_char",
        "--max_iters=20",
        "--eval_interval=20",
        "--learning_rate=1e-2",
    )
    assert done.evals[-1]["val_loss"] < done.evals[0]["val_loss"]
    assert done.last.weights["wte.weight"].shape[0] == 65


def test_a_pickle_with_code_is_refused_unexecuted(folder):
    class Evil:
        def __reduce__(self):
            return (open, (str(folder / "executed"), "w"))

    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "stoi": Evil()}))
    with pytest.raises(UserError, match="only plain containers"):
        token_bins.read_meta(folder)
    assert not (folder / "executed").exists()


@needs_shared
def test_without_a_meta_file_bins_are_gpt2s(folder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    (folder / "meta.pkl").unlink()
    assert token_bins.read_meta(folder).vocab_size == 50257
    (folder / "meta.pkl").write_bytes(
        pickle.dumps({"vocab_size": 50257, "tokenizer": "tiktoken", "tiktoken_encoding": "gpt2"})
    )
    assert token_bins.read_meta(folder).tokenizer.decode([31373]) == "hello"


def test_without_a_meta_file_and_offline_tokens_are_numbers(
    folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def offline(name):
        raise UserError("offline")

    monkeypatch.setattr(tokenization.TiktokenTokenizer, "from_name", offline)
    (folder / "meta.pkl").unlink()
    assert token_bins.read_meta(folder).tokenizer.kind == "numbers"
    assert "offline" in capsys.readouterr().out


def test_unknown_tokenizers_are_numbers(folder):
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 99, "tokenizer": "sentencepiece"}))
    meta = token_bins.read_meta(folder)
    assert meta.tokenizer.decode([1, 98]) == "1 98 " and meta.tokenizer.encode("5 6").tolist() == [5, 6]


def test_vocabularies_above_65536_take_uint32(folder):
    assert (token_bins.dtype_for(65536), token_bins.dtype_for(65537)) == ("uint16", "uint32")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 100277}))
    np.array([1, 100_000, 70_000], dtype=np.uint32).tofile(folder / "train.bin")
    assert token_bins.TokenBin(folder, "train", token_bins.read_meta(folder)).shards[0].open().tolist() == [
        1,
        100_000,
        70_000,
    ]


def test_shards_with_llm_c_headers(folder):
    (folder / "train.bin").unlink()
    meta = token_bins.read_meta(folder)
    for i, size in enumerate((100, 50)):
        header = np.zeros(256, dtype=np.int32)
        header[:3] = 20240520, 1, size
        with (folder / f"edu_train_{i:06d}.bin").open("wb") as file:
            file.write(header.tobytes() + np.full(size, i, dtype=np.uint16).tobytes())
    train = token_bins.TokenBin(folder, "train", meta)
    assert (
        [shard.tokens for shard in train.shards] == [100, 50]
        and train.shards[1].open().max() == 1
        and train.tokens == 150
    )


def test_shards_of_two_widths_are_refused(folder):
    meta = token_bins.read_meta(folder)
    (folder / "train.bin").rename(folder / "train_000000.bin")
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240801, 1, 50
    (folder / "train_000001.bin").write_bytes(header.tobytes() + np.zeros(50, dtype=np.uint32).tobytes())
    with pytest.raises(UserError, match="of uint16 and of uint32"):
        token_bins.TokenBin(folder, "train", meta)


@pytest.mark.slow
@pytest.mark.parametrize("name, break_it, message", [
    ("missing", lambda f: (f / "val.bin").unlink(), r"val\.bin not there"),
    ("empty", lambda f: (f / "train.bin").write_bytes(b""), r"train\.bin: empty"),
    ("odd", lambda f: (f / "train.bin").write_bytes(b"\0" * 801), r"801 bytes are no whole number"),
    ("short", lambda f: (f / "val.bin").write_bytes(b"\0" * 16), r"8 tokens are less than one window"),
    (
        "beyond",
        lambda f: np.full(400, 4000, dtype=np.uint16).tofile(f / "train.bin"),
        r"token 4000 at 0 is beyond the vocabulary of 9",
    ),
    ("meta", lambda f: (f / "meta.json").write_text("{"), r"meta\.json: broken"),
    ("pickle", lambda f: (f / "meta.pkl").write_bytes(b"no"), r"not a meta\.pkl"),
    ("folder", lambda f: shutil.rmtree(f), r"no such dataset"),
])  # fmt: skip
def test_bad_input_is_one_clear_line_with_status_2(
    folder, name, break_it, message, tmp_path_factory: pytest.TempPathFactory
):
    break_it(folder)
    out_dir = tmp_path_factory.mktemp("out") / "x"
    done = run_script(
        f"--data_dir={folder.parent}",
        f"--dataset={folder.name}",
        "--block_size=8",
        f"--out_dir={out_dir}",
        "--n_layer=1",
        check=False,
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert not out_dir.exists()


def test_counts_that_differ_from_the_meta_are_refused(folder):
    meta = token_bins.read_meta(folder)
    (folder / "meta.pkl").unlink()
    token_bins.write_meta(folder, meta.tokenizer, {"train.bin": {"tokens": 479, "bytes": 479, "sha256": ""}})
    with pytest.raises(UserError, match=r"meta\.json counts 479"):
        token_bins.TokenBin(folder, "train", token_bins.read_meta(folder))


def test_a_dataset_that_another_process_makes_meanwhile_is_taken(folder: Path):
    """The script fails, as it does when the files are there already: that is an error only where they are not."""
    (folder / "prepare.py").write_text(
        "import pathlib, sys\npathlib.Path(__file__).with_name('val.bin').write_bytes(b'1111')\nsys.exit(2)"
    )
    (folder / "val.bin").unlink()
    token_bins.prepare_if_missing(folder)
    assert (folder / "val.bin").exists()
    (folder / "prepare.py").write_text("import sys\nsys.exit('prepare.py: holds train.bin already')")
    (folder / "val.bin").unlink()
    with pytest.raises(UserError, match=r"holds train\.bin already"):
        token_bins.prepare_if_missing(folder)


def test_writer_leaves_a_whole_file_or_none(tmp_path: Path):
    path = tmp_path / "train.bin"
    with token_bins.open_bin(path, "uint16") as writer:
        writer.write(np.arange(5), 7)
        assert not path.exists()
    assert writer.summary() == {"tokens": 5, "bytes": 7, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert np.fromfile(path, np.uint16).tolist() == list(range(5))

    with pytest.raises(UserError), token_bins.open_bin(tmp_path / "val.bin", "uint16") as writer:
        writer.write(np.arange(5), 7)
        raise UserError("broken off")
    assert list(tmp_path.iterdir()) == [path]


def test_meta_is_read_back(folder):
    meta = token_bins.read_meta(folder)
    token_bins.write_meta(folder, meta.tokenizer, {})
    again = token_bins.read_meta(folder)
    assert json.loads((folder / "meta.json").read_text())["dtype"] == "uint16"
    assert tokenization.to_json(again.tokenizer) == tokenization.to_json(meta.tokenizer)
