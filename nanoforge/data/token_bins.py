"""Token bins: the files of a dataset folder, opened and written. Knows nothing of batches or training.

data/<name>/train.bin, val.bin     token ids, little-endian, without a header: uint16 up to 65,536 ids, else uint32;
                                   or shards train_000000.bin, ..., which may have llm.c's header of 256 int32
data/<name>/meta.json              vocabulary, tokenizer, and tokens, bytes of text and sha256 of each file
data/<name>/meta.pkl               nanoGPT's and ReaLLM-Forge's, where there is no meta.json
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanoforge.data import tokenization
from nanoforge.errors import UserError, did_you_mean

SPLITS = ("train", "val")
LLMC_HEADER = 256 * 4  # bytes
LLMC_MAGIC = {20240520: "uint16", 20240801: "uint32"}


def dtype_for(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


# ---------------------------------------------------------------------------------------------------------------------
# reading


class Meta(NamedTuple):
    """What a dataset's meta file tells."""

    vocab_size: int
    dtype: str
    tokenizer: tokenization.Tokenizer
    files: dict[str, dict]  # file name -> {"tokens", "bytes", "sha256"}; empty where not known


class PlainUnpickler(pickle.Unpickler):
    """Builds containers, numbers and strings, and nothing else: no pickle can run code through it."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, and only plain containers, numbers and strings are taken"
        )


def read_pickled_meta(path: Path) -> Meta:
    """nanoGPT's meta.pkl (stoi, itos, vocab_size), or ReaLLM-Forge's, which may name a tiktoken encoding."""
    try:
        with path.open("rb") as file:
            meta = PlainUnpickler(file).load()
        vocab_size = int(meta["vocab_size"])
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path}: not a meta.pkl of nanoGPT's kind ({type(error).__name__}: {error})") from None
    stoi = meta.get("stoi", {})
    if "encoding" in meta or meta.get("tokenizer") == "tiktoken":
        tokenizer = tokenization.TiktokenTokenizer.from_name(
            meta.get("tiktoken_encoding") or meta.get("encoding") or "gpt2"
        )
    elif (
        len(stoi) == vocab_size
        and all(isinstance(char, str) and len(char) == 1 for char in stoi)
        and sorted(stoi.values()) == list(range(vocab_size))
    ):
        tokenizer = tokenization.CharTokenizer(sorted(stoi, key=stoi.get))
    else:
        tokenizer = tokenization.NumberTokenizer(vocab_size)
    return Meta(vocab_size, dtype_for(vocab_size), tokenizer, {})


def read_meta(folder: Path) -> Meta:
    """A dataset's meta; without one the bins are taken as GPT-2's tokens, as nanoGPT does. Raises UserError."""
    path = folder / "meta.json"
    if path.exists():
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            dtype, vocab_size, files = meta["dtype"], int(meta["vocab_size"]), dict(meta["files"])
            if dtype not in ("uint16", "uint32"):
                raise ValueError(f"dtype {dtype!r}")
            tokenizer = meta["tokenizer"]
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: broken ({type(error).__name__}: {error}); prepare the dataset again") from None
        return Meta(vocab_size, dtype, tokenization.from_json(tokenizer, str(path)), files)
    if (folder / "meta.pkl").exists():
        return read_pickled_meta(folder / "meta.pkl")
    try:
        gpt2 = tokenization.TiktokenTokenizer.from_name("gpt2")
    except UserError as mistake:
        print(f"{folder}: no meta file, so taken as GPT-2's tokens; they are shown as numbers, because {mistake}")
        gpt2 = tokenization.NumberTokenizer(50257)
    return Meta(gpt2.vocab_size, "uint16", gpt2, {})


def fingerprint_files(paths: Iterable[Path]) -> dict[str, str]:
    """Of each file of a dataset: its size and a sha256, of all of a file up to 16 MB, of a larger one 64 stretches of 64 KB."""
    told = {}
    for path in paths:
        size, stretch = path.stat().st_size, 2**16
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for first in (
                range(0, size, stretch)
                if size <= 2**24
                else np.linspace(0, size - stretch, 64).astype(np.int64).tolist()
            ):
                file.seek(first)
                digest.update(file.read(stretch))
        told[path.name] = f"{size} bytes, {digest.hexdigest()[:16]}"
    return told


class TokenBin:
    """One split of one dataset: memory-mapped shards of token ids, and windows read from them.

    A window never crosses shards. Raises UserError when a file is missing, empty, odd-sized, or holds ids beyond the vocabulary.
    """

    def __init__(self, folder: Path, split: str, meta: Meta, name: str | None = None):
        self.name, self.split, self.meta = name or folder.name, split, meta
        whole = folder / f"{split}.bin"
        self.paths = [whole] if whole.exists() else sorted(folder.glob(f"*{split}_*.bin"))
        if not self.paths:
            raise UserError(f"{whole}: not there; {folder / 'prepare.py'} or data/prepare.py makes it")
        self.shards = [self.open(path) for path in self.paths]
        self.dtype = self.shards[0].dtype
        if any(shard.dtype != self.dtype for shard in self.shards):
            raise UserError(f"{folder}: shards of {split} are of uint16 and of uint32; prepare the dataset again")
        self.files, self.offsets = (
            [os.open(path, os.O_RDONLY) for path in self.paths],
            np.array([shard.offset for shard in self.shards]),
        )
        weakref.finalize(self, lambda files: [os.close(file) for file in files], self.files)
        self.tokens = sum(map(len, self.shards))
        files = [meta.files.get(path.name, {}) for path in self.paths]
        self.bytes = sum(file["bytes"] for file in files) if all("bytes" in file for file in files) else None  # of text

    def open(self, path: Path) -> np.ndarray:
        size = path.stat().st_size
        dtype, start = self.meta.dtype, 0
        if size >= LLMC_HEADER:
            header = np.fromfile(path, dtype="<i4", count=3)
            if (
                int(header[0]) in LLMC_MAGIC
                and (size - LLMC_HEADER) == int(header[2]) * np.dtype(LLMC_MAGIC[int(header[0])]).itemsize
            ):
                dtype, start = LLMC_MAGIC[int(header[0])], LLMC_HEADER
        width = np.dtype(dtype).itemsize
        if size - start == 0:
            raise UserError(f"{path}: empty; prepare the dataset again")
        if (size - start) % width:
            raise UserError(f"{path}: {size} bytes are no whole number of {dtype} tokens; prepare the dataset again")
        known = self.meta.files.get(path.name, {}).get("tokens")
        if known is not None and known != (size - start) // width:
            raise UserError(
                f"{path}: {(size - start) // width} tokens, but meta.json counts {known}; prepare the dataset again"
            )
        tokens = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", offset=start)
        # All of a small file, of a large one 64 stretches: a wrong vocabulary shows anywhere.
        stretch = len(tokens) if len(tokens) <= 2**24 else 2**16
        for first in np.linspace(0, len(tokens) - stretch, 1 if stretch == len(tokens) else 64).astype(np.int64):
            part = np.fromfile(
                path, tokens.dtype, stretch, offset=start + int(first) * width
            )  # the map would keep megabytes around each
            if (largest := int(part.max())) >= self.meta.vocab_size:
                where = int(first) + int(part.argmax())
                raise UserError(
                    f"{path}: token {largest} at {where} is beyond the vocabulary of {self.meta.vocab_size}; is the meta file that of these bins?"
                )
        return tokens

    def read_windows(self, shard: np.ndarray, start: np.ndarray, length: int) -> np.ndarray:
        """(len(start), length) ids from these places of these shards.

        Read by pread: through the map, every window would fault in up to a megabyte around it, and the process would grow to the
        size of the data.
        """
        width = self.dtype.itemsize
        offset = self.offsets[shard] + start * width
        rows = [
            os.pread(self.files[s], length * width, at) for s, at in zip(shard.tolist(), offset.tolist(), strict=True)
        ]
        return np.frombuffer(bytearray().join(rows), dtype=self.dtype).reshape(len(rows), length)


def prepare_if_missing(folder: Path, what: str = "bins") -> None:
    """Run the dataset's own prepare.py when its "bins", or its "examples", are not there. Raises UserError with the script's last words."""
    script = folder / "prepare.py"
    if not folder.is_dir():
        known = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        raise UserError(
            f"{folder}: no such dataset{did_you_mean(folder.name, known)}; --data_dir names another folder than {folder.parent}, data/prepare.py makes a dataset"
        )
    suffix = {"bins": "bin", "examples": "jsonl"}[what]
    if all(
        (folder / f"{split}.{suffix}").exists() or (what == "bins" and any(folder.glob(f"*{split}_*.bin")))
        for split in SPLITS
    ):
        return
    if not script.exists():
        missing = " and ".join(f"{split}.{suffix}" for split in SPLITS if not (folder / f"{split}.{suffix}").exists())
        raise UserError(f"{folder}: {missing} not there, and no prepare.py to make it")
    print(f"{folder}: no {what} yet; running {script}", flush=True)
    done = subprocess.run([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{script}: {last.removeprefix('prepare.py: ')}")


# ---------------------------------------------------------------------------------------------------------------------
# writing


class BinWriter:
    """Streams token ids into folder/name, which appears whole at `close` or not at all."""

    def __init__(self, folder: Path, name: str, dtype: str):
        self.path, self.beside = folder / name, folder / f".{name}.{os.getpid()}.tmp"
        self.dtype, self.file, self.sha = np.dtype(dtype).newbyteorder("<"), self.beside.open("wb"), hashlib.sha256()
        self.tokens = self.bytes = 0

    def write(self, ids: np.ndarray, text_bytes: int) -> None:
        data = np.ascontiguousarray(ids, dtype=self.dtype).data
        self.file.write(data)
        self.sha.update(data)
        self.tokens += len(ids)
        self.bytes += text_bytes

    def close(self) -> dict:
        """Sync and rename; what meta.json says of the file."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.beside, self.path)
        return {"tokens": self.tokens, "bytes": self.bytes, "sha256": self.sha.hexdigest()}

    def discard(self) -> None:
        self.file.close()
        self.beside.unlink(missing_ok=True)


def write_meta(folder: Path, tokenizer: tokenization.Tokenizer, files: dict[str, dict]) -> None:
    """Write meta.json, last of a dataset's files."""
    meta = {
        "dtype": dtype_for(tokenizer.vocab_size),
        "vocab_size": tokenizer.vocab_size,
        "files": files,
        "tokenizer": tokenization.to_json(tokenizer),
    }
    beside = folder / f".meta.json.{os.getpid()}.tmp"
    beside.write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(beside, folder / "meta.json")
