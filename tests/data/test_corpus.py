"""Preparing data: the same bins as nanoGPT's, every kind of input, the split, and whole files or none."""

import csv
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, SHARED, TEXT, gpt2_tokenizer_env, needs_shared, run_script

from nanoforge.data import corpus, documents, token_bins, tokenization
from nanoforge.data.hub_datasets import HubDataset
from nanoforge.errors import UserError

DOCS = [f"document {i}: " + TEXT for i in range(25)]


def key(text: str) -> bytes:
    """The documented hash of a document, whose smallest values are for validation."""
    return hashlib.blake2b(text.encode()[: 2**16], digest_size=8).digest()


HELD_OUT = sorted(DOCS, key=key)[:2]  # 2 and 3 are equally near to a tenth of 25


def prepare(*flags: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess:
    return run_script(*flags, script="data/prepare.py", check=check, **options)


def tokens(folder: Path, split: str = "train") -> list[int]:
    return token_bins.TokenBin(folder, split, token_bins.read_meta(folder)).shards[0].open().tolist()


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize("name, counts", [("shakespeare_char", (1003854, 111540)), ("shakespeare", (301966, 36059))])
def test_shakespeare_is_nanogpts(tmp_path: Path, name: str, counts: tuple[int, int]):
    """Its prepare.py by hand: sorted characters or tiktoken's gpt2 over the first nine tenths."""
    env = {"TIKTOKEN_CACHE_DIR": str(SHARED / "tiktoken_cache")}
    path = SHARED / "tinyshakespeare/input.txt"
    run_script(f"--input={path}", f"--data_dir={tmp_path}", script=f"data/{name}/prepare.py", env=env)
    text = path.read_text()
    train_text = text[: int(len(text) * 0.9)]
    if name == "shakespeare_char":
        stoi = {char: i for i, char in enumerate(sorted(set(text)))}
        expected = [stoi[char] for char in train_text]
    else:
        import tiktoken

        os.environ |= env
        expected = tiktoken.get_encoding("gpt2").encode_ordinary(train_text)
    assert tokens(tmp_path / name) == expected
    assert (len(expected), len(tokens(tmp_path / name, "val"))) == counts


@pytest.mark.slow
def test_offline_download_says_what_to_do(tmp_path: Path):
    done = run_script(
        f"--data_dir={tmp_path}",
        script="data/shakespeare_char/prepare.py",
        check=False,
        env={"https_proxy": "http://127.0.0.1:9", "no_proxy": ""},
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "--input FILE" in done.stderr


def write_parquet(path: Path, texts: Sequence[str | None], field: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({field: texts}), path)


def write_csv(path: Path, texts: Sequence[str], field: str) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["n", field], *([1, text] for text in texts)])


def write_folder(path: Path, texts: Sequence[str], field: str) -> None:
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i:03d}.txt").write_text(text)


WRITERS: dict[str, Callable[[Path, Sequence[str], str], object]] = {
    "jsonl": lambda path, texts, field: path.write_text("\n".join(json.dumps({field: text, "n": 1}) for text in texts)),
    "json": lambda path, texts, field: path.write_text(
        json.dumps([{field: text, "n": None} for text in texts], indent=1)
    ),
    "csv": write_csv,
    "parquet": write_parquet,
    "folder": write_folder,
}


@pytest.mark.parametrize("compression", ["", ".gz", ".ZST"])
@pytest.mark.parametrize("kind", WRITERS)
def test_documents_are_the_same_from_every_kind_of_file(tmp_path: Path, kind: str, compression: str):
    path = tmp_path / f"my docs, new.{kind}"
    WRITERS[kind](path, DOCS, "body")
    if compression:
        compress = gzip.compress if compression == ".gz" else pytest.importorskip("zstandard").ZstdCompressor().compress
        for file in path.iterdir() if kind == "folder" else [path]:
            file.with_name(file.name + compression).write_bytes(compress(file.read_bytes()))
            file.unlink()
    name = str(path if kind == "folder" else path.with_name(path.name + compression))
    inputs = documents.CorpusInputs((name,), field="body")
    assert corpus.write_dataset(tmp_path / "mine", inputs.open, "byte") == len(DOCS)
    expected: dict[str, list[int]] = {"train": [], "val": []}
    for doc in DOCS:
        expected["val" if doc in HELD_OUT else "train"] += [*doc.encode(), 256]
    for split_name in ("train", "val"):
        assert tokens(tmp_path / "mine", split_name) == expected[split_name]
    meta = json.loads((tmp_path / "mine/meta.json").read_text())
    assert meta["files"]["val.bin"]["bytes"] == sum(len(doc.encode()) for doc in HELD_OUT)


def test_one_text_is_split_by_position_and_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 100)
    path = tmp_path / "one.txt"
    text = TEXT * 30
    train_text = text[: int(len(text) * 0.75)]
    path.write_text(text)
    inputs = documents.CorpusInputs((str(path),), val_fraction=0.25)
    chunks = list(inputs.open())
    assert max(len(chunk.text) for chunk in chunks) <= 100
    assert not any(chunk.ends_document for chunk in chunks)
    assert "".join(chunk.text for chunk in chunks if chunk.split == "train") == train_text
    assert "".join(chunk.text for chunk in chunks) == text
    corpus.write_dataset(tmp_path / "d", inputs.open, "char")
    assert token_bins.read_meta(tmp_path / "d").tokenizer.decode(tokens(tmp_path / "d")) == train_text


@pytest.mark.parametrize("chunk_bytes", [7, 100, 2**17])
def test_a_text_is_read_as_python_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int):
    """Any Unicode, a byte order mark and every kind of line end, cut anywhere."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "one.txt"
    for text in (
        "\ufeffnaïve café\r\n日本 👩‍🚀\r\r\n\n x" * 50,
        "no\r",
        "",
        "\ufeff",
        "   \u3000 " * 30,
        "日本語" * 100,
    ):
        path.write_bytes(text.encode())
        assert "".join(documents.read_text(path)) == path.read_text(encoding="utf-8-sig")


def test_the_place_of_bytes_that_are_not_utf_8_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 10)
    path = tmp_path / "one.txt"
    for broken in (b"\xef\xbb\xbf" + b"text " * 20 + "é".encode("latin-1") + b" more", "日本".encode()[:-1]):
        path.write_bytes(broken)
        with pytest.raises(UnicodeDecodeError) as caught:
            broken.decode()
        with pytest.raises(UserError, match=rf"at byte {caught.value.start}\)"):
            list(documents.read_text(path))


@needs_shared
def test_the_chunks_of_a_text_change_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """tiktoken, which encodes the text at once, is the witness: no token spans two chunks."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", gpt2_tokenizer_env()["TIKTOKEN_CACHE_DIR"])
    monkeypatch.setattr(documents, "CHUNK_BYTES", 200)
    import tiktoken

    text = (SHARED / "tinyshakespeare/input.txt").read_text()[:20_000]
    text += "  some \n  odd \n\n white\u3000 space , 's !\n a1 23 456 é è " * 40
    (tmp_path / "one.txt").write_text(text)
    tokenizer = tokenization.TiktokenTokenizer.from_name("gpt2")
    chunks = list(documents.read_text(tmp_path / "one.txt"))
    assert len(chunks) > 100
    ids = np.concatenate([tokenizer.encode(chunk) for chunk in chunks])
    assert ids.tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)


@pytest.mark.slow
@pytest.mark.parametrize("chars", ["abc \n", "aé€日👩 \n", "".join(map(chr, range(0x4E00, 0x4E00 + 70_000)))])
def test_characters_of_any_text_are_numbered_in_their_order(tmp_path: Path, chars: str):
    """Python's sorted set and dict, as in nanoGPT's prepare.py, are the witness; 70,000 characters take uint32."""
    chars = "".join(char for char in chars if not "\ud800" <= char <= "\udfff")
    text = (chars * 3)[::-1]
    (tmp_path / "one.txt").write_text(text)
    document = documents.file_document(tmp_path / "one.txt")
    corpus.write_dataset(tmp_path / "d", lambda: documents.split_by_position(document, 0.1), "char")
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    cut = int(len(text) * 0.9)
    assert tokens(tmp_path / "d") == [stoi[char] for char in text[:cut]]
    assert tokens(tmp_path / "d", "val") == [stoi[char] for char in text[cut:]]
    meta = json.loads((tmp_path / "d/meta.json").read_text())
    assert meta["files"]["val.bin"]["bytes"] == len(text[cut:].encode())
    assert meta["dtype"] == ("uint16" if len(stoi) <= 2**16 else "uint32")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel is not Linux")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path):
    """The peak of a whole process, as the kernel counts it, with 1 MB of text and with 30."""
    peaks = []
    for megabytes in (1, 30):
        path = tmp_path / "one.txt"
        path.write_text(TEXT * (megabytes * 10**6 // len(TEXT)))
        flags = [f"--input={path}", "--name=d", f"--data_dir={tmp_path}"]
        flags += ["--tokenizer=char", "--overwrite"]
        code = (
            f"import runpy, sys; sys.argv = ['prepare.py', *{flags!r}]; "
            f"runpy.run_path('{ROOT / 'data/prepare.py'}', run_name='__main__'); "
            "print('torch' in sys.modules, open('/proc/self/status').read())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "False Name" in done.stdout, "torch takes a second to import"
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]))
    assert peaks[1] - peaks[0] < 10_000, peaks  # kB


@pytest.mark.slow
def test_preparing_twice_gives_the_same_bytes(tmp_path: Path):
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps({"text": doc}) for doc in DOCS))
    for name in ("x", "y"):
        prepare(f"--input={path}", f"--name={name}", f"--data_dir={tmp_path}", "--tokenizer=bpe", "--vocab_size=320")
    for file in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()
    assert token_bins.read_meta(tmp_path / "x").vocab_size <= 320


def split(texts: Iterable[str], val_fraction: float = 0.1) -> dict[str, list[str]]:
    """The documents of each split."""
    sides: dict[str, list[str]] = {"train": [], "val": []}
    for chunk in documents.split_documents(map(documents.text_document, texts), val_fraction):
        if chunk.text:
            sides[chunk.split].append(chunk.text)
    return sides


@pytest.mark.parametrize(
    "n, fraction, count", [(100, 0.1, 10), (100, 0.4, 40), (100, 0.25, 25), (100, 0.0005, 1), (2, 0.5, 1)]
)
def test_the_validation_part_is_what_was_asked_for(n: int, fraction: float, count: int):
    sides = split([f"{i:04d}" for i in range(n)], fraction)
    assert (len(sides["train"]), len(sides["val"])) == (n - count, count)


def test_sources_in_rotation_are_all_in_both_splits():
    """The place of a document decides nothing, so each of ten sources has its share; a text twice is on one side."""
    texts = [f"source {i % 10}, document {i}" for i in range(2000)]
    sides = split(texts)
    shares = [sum(text.startswith(f"source {source}") for text in sides["val"]) / 200 for source in range(10)]
    assert min(shares) > 0.03 and max(shares) < 0.2 and sum(shares) / 10 == pytest.approx(0.1, abs=0.001)
    assert set(split(texts[::-1])["val"]) == set(sides["val"]) == set(sorted(texts, key=key)[:200])
    doubled = split([*texts, *texts])
    assert not set(doubled["train"]) & set(doubled["val"])


@pytest.mark.parametrize("seed", range(30))
def test_the_split_is_by_size_as_well(seed: int):
    """Sizes over three powers of ten: validation has its share of the text, or one document, and nothing is lost."""
    random = np.random.default_rng(seed)
    sizes = 10 ** random.uniform(1, 4, int(random.integers(2, 40)))
    texts = [f"{i} ".ljust(int(size), "x") for i, size in enumerate(sizes)]
    sides = split(texts)
    cut = [text for text in texts if text not in sides["train"] + sides["val"]]
    assert len(cut) <= 1 and (not cut or cut[0] == max(cut + sides["train"], key=len))
    train, val = ("".join(sides[name]) for name in ("train", "val"))
    assert sorted(train + val) == sorted("".join(texts))
    share = len(val) / len(train + val)
    assert share > 0.045 and (share < 0.2 or len(sides["val"]) == 1)


def test_one_document_that_is_most_of_the_text_is_cut(tmp_path: Path):
    """As a lone one is. Its two parts are all of it, and each ends with an end token."""
    large = "".join(f"word {i} " for i in range(20_000))
    texts = [*(f"small {i}" for i in range(19)), large]
    sides = split(texts)
    start = next(part for part in sides["train"] if len(part) > 100)
    end = next(part for part in sides["val"] if len(part) > 100)
    assert start + end == large and len("".join(sides["val"])) / len("".join(texts)) == pytest.approx(0.1, abs=0.001)
    assert sorted([*sides["train"], *sides["val"]]) == sorted([*texts[:-1], start, end])
    docs = [documents.text_document(text) for text in texts]
    assert corpus.write_dataset(tmp_path / "d", lambda: documents.split_documents(docs, 0.1), "byte") == 21


def test_beyond_the_head_hashes_alone_decide_and_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "HEAD_DOCUMENTS", 20)
    texts = [f"document {i}" for i in range(3000)]
    tail = texts[20:]
    sides = split(texts)
    assert [text for text in sides["val"] if text in tail] == [
        text for text in tail if int.from_bytes(key(text), "big") < 0.1 * 2**64
    ]
    assert 230 < len(sides["val"]) < 370
    large = next(text for text in (f"{i} ".ljust(50_000, "x") for i in range(1000)) if key(text)[0] < 0x10)
    assert large in split([*texts, large])["train"], "it is more than the validation's share"
    assert set(split([*texts, *sides["val"]])["train"]) == set(sides["train"]), "what is there again stays on its side"


def test_one_document_is_split_by_position_from_every_kind_of_file(tmp_path: Path):
    text = TEXT * 3
    for name, content in (("one.jsonl", json.dumps({"text": text})), ("one.md", text), ("folder/one.txt", text)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        inputs = documents.CorpusInputs((str(path.parent if name.startswith("folder") else path),))
        chunks = list(inputs.open())
        cut = int(len(text) * 0.9)
        for split_name, part in (("train", text[:cut]), ("val", text[cut:])):
            assert "".join(chunk.text for chunk in chunks if chunk.split == split_name) == part
    assert split(["ab"], 0.01) == {"train": ["a"], "val": ["b"]}
    assert all(split(["same"] * 10).values())


def test_what_is_read_of_a_folder_and_what_is_not(tmp_path: Path):
    read = ["a.TXT", "b.md", "deep/c.py", "deep/d.jsonl.gz", "deep/e.json", "f.csv.GZ", "g.R.gz"]
    skipped = {
        "hidden": [".git", ".h.txt", "__pycache__"],
        "runs and checkpoints": ["checkpoints", "checkpoint-40", "model", "run"],
        "no text": ["i.png", "Makefile", "weights.bin"],
        "empty": ["__init__.py"],
        "no JSON rows": ["deep/tsconfig.json"],
        "no field text": ["package.json"],
        "links to folders": ["link"],
    }
    places = [*read, ".git/x.txt", ".h.txt", "__pycache__/x.py", "checkpoints/000040/x.json", "checkpoint-40/x.json"]
    places += ["model/model.safetensors", "model/README.md", "run/train_config.json", "run/x.txt", "i.png", "Makefile"]
    places += ["weights.bin", "__init__.py", "deep/tsconfig.json", "package.json"]
    contents = {".jsonl": '{"text": "row"}', ".json": '[{"text": "row"}]', ".csv": "text\nrow\n"}
    special = {"__init__.py": "", "tsconfig.json": "{ // comment\n}", "package.json": '{"name": 1}'}
    for place in places:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        content = special.get(path.name, contents.get(documents.tables.file_suffix(path), path.name)).encode()
        path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    found = documents.find_files([str(tmp_path)], "text")
    assert found.paths == sorted(tmp_path / name for name in read)
    assert {reason: sorted(names) for reason, names in found.skipped.items()} == {
        reason: sorted(names) for reason, names in skipped.items()
    }
    texts = sorted("".join(documents.read_chunks(item)) for item in documents.read_documents(found.paths, "text"))
    assert texts == sorted(["a.TXT", "b.md", "c.py", "g.R.gz", "row", "row", "row"])
    assert all(name in found.describe() for names in skipped.values() for name in names)


def test_threads_keep_the_order():
    def every_third_is_slow(i: int) -> int:
        if i % 3 == 0:
            time.sleep(0.02)
        return i

    assert list(corpus.map_in_order(every_third_is_slow, range(50), 4)) == list(range(50))


@pytest.mark.slow
def test_validation_text_of_ones_own_and_a_dataset_that_is_there(tmp_path: Path):
    """The files are whole on their sides; a second dataset of the name needs --overwrite, and the first one stays."""
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": doc}) for doc in [*DOCS, None, ""]))
    (tmp_path / "val.txt").write_text("my own")
    flags = ("--input=docs.jsonl", "--val_input=val.txt", "--data_dir=.", "--tokenizer=byte")
    done = prepare(*flags, "--name=mine", "--bad_rows=skip", cwd=tmp_path)
    assert "25 documents" in done.stdout and "skipped 2 documents" in done.stdout and "docs.jsonl:26" in done.stdout
    assert tokens(tmp_path / "mine") == [id for doc in DOCS for id in (*doc.encode(), 256)]
    assert tokens(tmp_path / "mine", "val") == [*b"my own", 256]
    flags = ("--input=val.txt", "--data_dir=.", "--tokenizer=byte", "--name=mine")
    again = prepare(*flags, check=False, cwd=tmp_path)
    assert again.returncode == 2 and "--overwrite" in again.stderr and len(tokens(tmp_path / "mine", "val")) == 7
    assert "1 document" in prepare(*flags, "--overwrite", cwd=tmp_path).stdout
    assert bytes(tokens(tmp_path / "mine")) == b"my ow"


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", [
    ([], "--input: is needed"),
    (["--input=/nowhere"], "no such file or folder"),
    (["--input=x.pdf"], "must be a text (.txt"),
    (["--input=bad.jsonl"], "bad.jsonl:2"),
    (["--input=docs.jsonl", "--field=title"], "--field"),
    (["--input=latin.txt"], "not UTF-8"),
    (["--input=latin.jsonl"], "not UTF-8"),
    (["--input=surrogate.jsonl"], "surrogate.jsonl:1: text: half of a surrogate pair"),
    (["--input=one.jsonl"], "no text for val.bin"),
    (["--input=null.parquet"], "null.parquet:2: text: must be text, not null"),
    (["--input=docs.jsonl", "--name=../up"], "--name=../up"),
    (["--input=docs.jsonl", "--name=/tmp/up"], "--name=/tmp/up"),
    (["--input=docs.jsonl", "--name=a/../.."], "--name=a/../.."),
    (["--input=docs.jsonl", "--val_input=docs.jsonl"], "--val_input: docs.jsonl"),
    (["--input=docs.jsonl", "--val_input=/nowhere"], "--val_input=/nowhere"),
    (["--input=docs.jsonl", "--val_input=docs.jsonl", "--val_fraction=0.2"], "--val_fraction"),
    (["--input=docs.jsonl", "--tokenizer=gtp2"], "did you mean gpt2"),
    (["--input=docs.jsonl", "--vocab_size=500"], "only with --tokenizer=bpe"),
    (["--input=hf:x"], "hf:x"),
])  # fmt: skip
def test_bad_input_is_one_message_and_leaves_nothing(tmp_path: Path, flags: list[str], message: str):
    (tmp_path / "x.pdf").write_text("")
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": doc}) for doc in DOCS))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "latin.jsonl").write_bytes('{"text": "café"}'.encode("latin-1"))
    (tmp_path / "surrogate.jsonl").write_text('{"text": "\\ud800"}')
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    if "--input=null.parquet" in flags:
        write_parquet(tmp_path / "null.parquet", ["a", None], "text")
    done = prepare("--tokenizer=byte", "--name=mine", *flags, check=False, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list((tmp_path / "data").rglob("*.*"))


def test_an_old_dataset_survives_a_failed_preparation(tmp_path: Path):
    corpus.write_dataset(
        tmp_path / "d", lambda: documents.split_documents(map(documents.text_document, DOCS), 0.1), "char"
    )
    before = {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()}

    def broken():
        yield documents.TextChunk("train", "fine")
        raise UserError("the disk is gone")

    with pytest.raises(UserError, match="disk"):
        corpus.write_dataset(tmp_path / "d", broken, tokenization.ByteTokenizer())
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# the shipped datasets


@pytest.mark.slow
def test_standard_library_and_its_classes_are_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT)
    from data.stdlib_class import prepare as stdlib_class

    max_bytes = 300_000
    flags = [f"--out_dir={tmp_path / 'stdlib_char'}", f"--max_bytes={max_bytes}"]
    assert "tokens" in run_script(*flags, script="data/stdlib_char/prepare.py").stdout
    modules = list(stdlib_class.iter_modules(max_bytes=max_bytes))
    monkeypatch.setattr(stdlib_class, "iter_modules", lambda: modules)
    stdlib_class.main(stdlib_class.PrepareArgs(out_dir=str(tmp_path / "stdlib_class")))
    texts = []
    for name in ("stdlib_char", "stdlib_class"):
        folder = tmp_path / name
        texts.append(token_bins.read_meta(folder).tokenizer.decode(tokens(folder, "val")[:20000]))
    assert len(tokens(tmp_path / "stdlib_char")) == len(tokens(tmp_path / "stdlib_class")) > max_bytes / 2
    chars, classes = texts
    assert [char == "\n" for char in chars] == [char == "\n" for char in classes]
    keywords = [match.span() for match in re.finditer(r"^def (?=\w+\()", chars, re.M)]
    assert keywords and all(classes[start : end - 1] == "kkk" for start, end in keywords)


@pytest.mark.slow
def test_the_librarys_packages_are_taken_too_but_nothing_that_was_installed(tmp_path: Path):
    for name, text in (("b.py", "b = 1\n" * 9), ("site-packages/c/d.py", "d\n"), ("a/e.py", "e = 2\n")):
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code = (
        "import sysconfig, runpy, sys; sys.argv[1:] = []; "
        f"sysconfig.get_path = lambda name: {str(tmp_path / 'lib')!r}; "
        f"iter_modules = runpy.run_path({str(ROOT / 'data/stdlib_char/prepare.py')!r})['iter_modules']; "
        "options = [{}, {'packages': True}, {'packages': True, 'max_bytes': 20}]; "
        "print([list(map(len, iter_modules(**option))) for option in options])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[[54], [6, 54], [6]]", done.stderr


def test_classes_of_a_line():
    sys.path.insert(0, str(ROOT))
    from data.stdlib_class.prepare import classify

    assert classify("if x1 == 30: # no\n  s = 'a b'\n") == "kk nn oo 00o ####\n  n o sssss\n"
    assert classify('"""two\nlines"""\n') == "ssssss\nssssssss\n"


@pytest.mark.slow
def test_arithmetic_is_right_and_held_out(tmp_path: Path):
    run_script(f"--out_dir={tmp_path}", "--digits=2", script="data/arithmetic/prepare.py")
    tokenizer = token_bins.read_meta(tmp_path).tokenizer
    train, val = (tokenizer.decode(tokens(tmp_path, split)).splitlines() for split in ("train", "val"))
    assert len(set(train) | set(val)) == 10_000 == len(train) + len(val) and len(val) == 1000
    assert all(eval(line.replace("=", "==")) for line in [*train, *val])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openwebtext", "fineweb_edu"])
def test_hub_datasets_stream_through_the_datasets_library(tmp_path: Path, name: str):
    """A stand-in for `datasets`, which can't reach the hub here, shows which dataset is asked for, and how."""
    (tmp_path / "datasets.py").write_text(
        "class config:\n"
        "    HF_HUB_OFFLINE = False\n"
        "def load_dataset(*args, **kwargs):\n"
        "    print('asked', args, kwargs)\n"
        "    return [{'text': f'document {i}'} for i in range(4001)]\n"
    )
    env = {"PYTHONPATH": str(tmp_path), **gpt2_tokenizer_env()}
    done = run_script(f"--data_dir={tmp_path}", script=f"data/{name}/prepare.py", env=env)
    assert (
        "'streaming': True" in done.stdout
        and {"openwebtext": "Skylion007/openwebtext", "fineweb_edu": "HuggingFaceFW/fineweb-edu', 'sample-10BT'"}[name]
        in done.stdout
    )
    train = np.array(tokens(tmp_path / name))
    n_val = {"openwebtext": 2, "fineweb_edu": 4}[name]  # 0.0005 and 0.001 of 4,001
    assert (train == 50256).sum() == 4001 - n_val and train[-1] == 50256


def test_rows_of_the_hub_follow_the_same_rule_and_a_lost_connection_is_named(monkeypatch: pytest.MonkeyPatch):
    """A stand-in for `datasets` that breaks off after four rows."""

    def load_dataset(*args: object, split: str, **options: object) -> Iterator[dict]:
        yield from ({"text": text} for text in ("a", None, "", f"of {split}"))
        raise ConnectionError("the hub is gone\nand more")

    online = SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, config=online))
    with pytest.raises(UserError, match=r"^hf:x:2: text: must be text, not null"):
        list(documents.read_hub(HubDataset("x"), "text", "train"))
    bad: list[str] = []
    rows = documents.read_hub(HubDataset("x"), "text", "validation", bad.append)
    assert [next(rows).source, next(rows).source] == ["a", "of validation"] and len(bad) == 2
    with pytest.raises(UserError, match=r"after 4 rows \(ConnectionError: the hub is gone\)"):
        next(rows)
    with pytest.raises(UserError, match="has no field body but text"):
        list(documents.read_hub(HubDataset("x"), "body", "train"))


def test_a_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_bins.BinWriter, "write", full)
    with pytest.raises(UserError, match=r"can't be written \(No space left"):
        corpus.write_dataset(tmp_path / "d", lambda: [documents.TextChunk("train", "x")], "byte")
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
def test_prepare_shows_its_help():
    done = subprocess.run([sys.executable, ROOT / "data/prepare.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--tokenizer" in done.stdout
