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
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanoforge import files
from nanoforge.data import tokenization
from nanoforge.errors import UserError, did_you_mean

SPLITS = ("train", "val")

# llm.c's shards begin with 256 int32: a magic number, a version, the number of tokens, zeros.
LLMC_HEADER_BYTES = 256 * 4
LLMC_DTYPES = {20240520: "uint16", 20240801: "uint32"}

MAX_OPEN_FILES = 256  # of a run's bins: a quarter of what many systems let a process open

# Of a large file only 64 evenly spaced stretches are read, to check or hash it.
STRETCHES = 64


def dtype_for(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


def stretch_starts(size: int, stretch: int) -> list[int]:
    """Where the stretches of a file of `size` units begin: the first at 0, the last one ends with the file."""
    return np.linspace(0, size - stretch, STRETCHES).astype(np.int64).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# the meta file


class Meta(NamedTuple):
    """What a dataset's meta file says."""

    vocab_size: int
    dtype: str
    tokenizer: tokenization.Tokenizer
    files: Mapping[str, Mapping[str, Any]]  # file name -> {"tokens", "bytes", "sha256"}; empty where not known


def read_meta(folder: Path) -> Meta:
    """A dataset's meta; without one the bins are taken as GPT-2's tokens, as nanoGPT does. Raises UserError."""
    if (folder / "meta.json").exists():
        return read_json_meta(folder / "meta.json")
    if (folder / "meta.pkl").exists():
        return read_pickled_meta(folder / "meta.pkl")
    tokenizer: tokenization.Tokenizer
    try:
        tokenizer = tokenization.TiktokenTokenizer.from_name("gpt2")
    except UserError as error:
        print(f"{folder}: no meta file, so taken as GPT-2's tokens; they are shown as numbers, because {error}")
        tokenizer = tokenization.NumberTokenizer(50257)
    return Meta(tokenizer.vocab_size, "uint16", tokenizer, {})


def read_json_meta(path: Path) -> Meta:
    """Our own meta.json. Raises UserError."""
    try:
        meta = json.loads(files.read_text(path))
        dtype = meta["dtype"]
        vocab_size = int(meta["vocab_size"])
        bins = dict(meta["files"])
        tokenizer = meta["tokenizer"]
        if dtype not in ("uint16", "uint32"):
            raise ValueError(f"dtype {dtype!r}")
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: broken ({type(error).__name__}: {error}); prepare the dataset again") from None
    return Meta(vocab_size, dtype, tokenization.from_json(tokenizer, str(path)), bins)


class PlainUnpickler(pickle.Unpickler):
    """Builds containers, numbers and strings, and nothing else: no pickle can run code through it."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, and only plain containers, numbers and strings are taken"
        )


def read_pickled_meta(path: Path) -> Meta:
    """nanoGPT's meta.pkl (stoi, itos, vocab_size), or ReaLLM-Forge's, which may name a tiktoken encoding.

    Raises UserError.
    """
    try:
        with path.open("rb") as file:
            meta = PlainUnpickler(file).load()
        vocab_size = int(meta["vocab_size"])
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path}: not a meta.pkl of nanoGPT's kind ({type(error).__name__}: {error})") from None

    tokenizer: tokenization.Tokenizer
    stoi = meta.get("stoi", {})  # character -> id
    if "encoding" in meta or meta.get("tokenizer") == "tiktoken":
        name = meta.get("tiktoken_encoding") or meta.get("encoding") or "gpt2"
        tokenizer = tokenization.TiktokenTokenizer.from_name(name)
    elif is_char_vocabulary(stoi, vocab_size):
        tokenizer = tokenization.CharTokenizer(sorted(stoi, key=stoi.get))
    else:
        tokenizer = tokenization.NumberTokenizer(vocab_size)
    return Meta(vocab_size, dtype_for(vocab_size), tokenizer, {})


def is_char_vocabulary(stoi: Mapping[Any, Any], vocab_size: int) -> bool:
    """Whether the ids are those of single characters, each id once."""
    are_chars = all(isinstance(char, str) and len(char) == 1 for char in stoi)
    return are_chars and len(stoi) == vocab_size and sorted(stoi.values()) == list(range(vocab_size))


def write_meta(folder: Path, tokenizer: tokenization.Tokenizer, bins: Mapping[str, Mapping[str, Any]]) -> None:
    """Write meta.json, last of a dataset's files. bins: file name -> what BinWriter says of it."""
    meta = {
        "dtype": dtype_for(tokenizer.vocab_size),
        "vocab_size": tokenizer.vocab_size,
        "files": bins,
        "tokenizer": tokenization.to_json(tokenizer),
    }
    files.write_text(folder / "meta.json", json.dumps(meta, ensure_ascii=False, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# reading


class Shard(NamedTuple):
    """A file of token ids. It is not kept open: a dataset may have more shards than a process may open files."""

    path: Path
    dtype: np.dtype
    offset: int  # bytes before the first token
    tokens: int

    def open(self) -> np.memmap:
        """All ids, memory-mapped as long as the array lives."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset)


class TokenBin:
    """One split of one dataset: shards of token ids, and windows read from them.

    A window never crosses shards. `bytes` is the size of the text, None where it is not known.
    """

    def __init__(
        self, folder: Path, split: str, meta: Meta, name: str | None = None, max_open_files: int = MAX_OPEN_FILES
    ) -> None:
        """Raises UserError when a file is missing, empty or odd-sized, or holds ids beyond the vocabulary."""
        self.name = name or folder.name
        self.meta = meta
        self.paths = shard_paths(folder, split)
        self.shards = [read_shard(path, meta) for path in self.paths]
        self.dtype = self.shards[0].dtype
        if any(shard.dtype != self.dtype for shard in self.shards):
            raise UserError(f"{folder}: shards of {split} are of uint16 and of uint32; prepare the dataset again")
        self.sizes = np.array([shard.tokens for shard in self.shards])
        self.tokens = int(self.sizes.sum())
        self.bytes = self.count_bytes()
        self.offsets = np.array([shard.offset for shard in self.shards])
        self.files = OpenFiles(self.paths, max_open_files)

    def count_bytes(self) -> int | None:
        total = 0
        for path in self.paths:
            size = self.meta.files.get(path.name, {}).get("bytes")
            if size is None:
                return None
            total += size
        return total

    def read_windows(self, shard: np.ndarray, start: np.ndarray, length: int) -> np.ndarray:
        """(len(start), length) ids from these places of these shards.

        Read by pread: through a map, every window would fault in up to a megabyte around it, and the process would
        grow to the size of the data.
        """
        width = self.dtype.itemsize
        offset = self.offsets[shard] + start * width
        places = zip(shard.tolist(), offset.tolist(), strict=True)
        rows = [self.files.pread(i, length * width, position) for i, position in places]
        return np.frombuffer(bytearray().join(rows), dtype=self.dtype).reshape(len(rows), length)


class OpenFiles:
    """Files that are read at any place: opened when they are needed, and only the last used ones are kept open."""

    def __init__(self, paths: Sequence[Path], max_open: int) -> None:
        self.paths = paths
        self.max_open = max_open
        self.closes_none = len(paths) <= max_open and hasattr(os, "pread")
        self.descriptors: OrderedDict[int, int] = OrderedDict()  # index of the path -> descriptor, the last used last
        self.lock = threading.Lock()  # training and evaluation read in two threads: none closes what the other reads
        weakref.finalize(self, close_files, self.descriptors)

    def pread(self, i: int, size: int, offset: int) -> bytes:
        """`size` bytes of file i from an offset on."""
        descriptor = self.descriptors.get(i)
        if descriptor is not None and self.closes_none:
            return os.pread(descriptor, size, offset)
        with self.lock:
            descriptor = self.descriptors.pop(i, None)
            if descriptor is None:
                if len(self.descriptors) >= self.max_open:
                    os.close(self.descriptors.popitem(last=False)[1])
                descriptor = os.open(self.paths[i], os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self.descriptors[i] = descriptor
            if not hasattr(os, "pread"):  # Windows
                os.lseek(descriptor, offset, os.SEEK_SET)
                return os.read(descriptor, size)
            return os.pread(descriptor, size, offset)


def close_files(descriptors: Mapping[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def shard_paths(folder: Path, split: str) -> list[Path]:
    """split.bin, or the shards of the split in order. Raises UserError when there are none."""
    single = folder / f"{split}.bin"
    if single.exists():
        return [single]
    shards = sorted(folder.glob(f"*{split}_*.bin"))
    if not shards:
        raise UserError(f"{single}: not there; {folder / 'prepare.py'} or data/prepare.py makes it")
    return shards


def read_shard(path: Path, meta: Meta) -> Shard:
    """A shard, checked against the meta file. Raises UserError."""
    size = path.stat().st_size
    dtype, start = read_llmc_header(path, size) or (meta.dtype, 0)
    width = np.dtype(dtype).itemsize
    if size == start:
        raise UserError(f"{path}: empty; prepare the dataset again")
    n_tokens, remainder = divmod(size - start, width)
    if remainder:
        raise UserError(f"{path}: {size} bytes are no whole number of {dtype} tokens; prepare the dataset again")
    expected = meta.files.get(path.name, {}).get("tokens", n_tokens)
    if expected != n_tokens:
        raise UserError(f"{path}: {n_tokens} tokens, but meta.json counts {expected}; prepare the dataset again")
    shard = Shard(path, np.dtype(dtype).newbyteorder("<"), start, n_tokens)
    check_vocabulary(shard, meta.vocab_size)
    return shard


def read_llmc_header(path: Path, size: int) -> tuple[str, int] | None:
    """(dtype, bytes of the header) of a shard that llm.c wrote, else None."""
    if size < LLMC_HEADER_BYTES:
        return None
    magic, _, n_tokens = np.fromfile(path, dtype="<i4", count=3).tolist()
    dtype = LLMC_DTYPES.get(magic)
    if dtype is None or size - LLMC_HEADER_BYTES != n_tokens * np.dtype(dtype).itemsize:
        return None  # tokens that look like a header
    return dtype, LLMC_HEADER_BYTES


def check_vocabulary(shard: Shard, vocab_size: int) -> None:
    """Raise UserError for ids beyond the vocabulary: in all of a small file, in 64 stretches of a large one."""
    starts, stretch = [0], shard.tokens
    if shard.tokens > 2**24:
        stretch = 2**16
        starts = stretch_starts(shard.tokens, stretch)
    for start in starts:
        # Read, not mapped: the map would keep megabytes around each stretch.
        offset = shard.offset + start * shard.dtype.itemsize
        ids = np.fromfile(shard.path, shard.dtype, stretch, offset=offset)
        largest = int(ids.max())
        if largest >= vocab_size:
            raise UserError(
                f"{shard.path}: token {largest} at {start + int(ids.argmax())} is beyond the vocabulary of "
                f"{vocab_size}; is the meta file that of these bins?"
            )


def fingerprint_files(paths: Iterable[Path]) -> dict[str, str]:
    """name -> size and sha256 of each file; of one above 16 MB only 64 stretches of 64 KB are hashed."""
    fingerprints = {}
    stretch = 2**16
    for path in paths:
        size = path.stat().st_size
        starts: Iterable[int] = range(0, size, stretch) if size <= 2**24 else stretch_starts(size, stretch)
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(stretch))
        name = str(path) if path.name in fingerprints else path.name
        fingerprints[name] = f"{size} bytes, {digest.hexdigest()[:16]}"
    return fingerprints


# ---------------------------------------------------------------------------------------------------------------------
# datasets that make themselves

FILE_SUFFIXES = {"bins": "bin", "examples": "jsonl"}


def prepare_if_missing(folder: Path, what: str = "bins") -> None:
    """Run the dataset's own prepare.py when its "bins" or "examples" are missing.

    Raises UserError with the last line of the script's errors.
    """
    if not folder.is_dir():
        datasets = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        raise UserError(
            f"{folder}: no such dataset{did_you_mean(folder.name, datasets)}; "
            f"--data_dir names another folder than {folder.parent}, data/prepare.py makes a dataset"
            + ("; --dataset=hf:NAME reads one of the hub" if what == "examples" else "")
        )
    missing = missing_files(folder, what)
    if not missing:
        return
    script = folder / "prepare.py"
    if not script.exists():
        raise UserError(f"{folder}: {' and '.join(missing)} not there, and no prepare.py to make it")
    print(f"{folder}: no {what} yet; running {script}", flush=True)
    done = subprocess.run([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    if done.returncode and missing_files(folder, what):  # else another process has made them
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"{script}: {lines[-1].removeprefix('prepare.py: ')}")


def missing_files(folder: Path, what: str) -> list[str]:
    """Names of the splits' files that are not there; bins may be shards."""
    missing = []
    for split in SPLITS:
        path = folder / f"{split}.{FILE_SUFFIXES[what]}"
        has_shards = what == "bins" and any(folder.glob(f"*{split}_*.bin"))
        if not path.exists() and not has_shards:
            missing.append(path.name)
    return missing


# ---------------------------------------------------------------------------------------------------------------------
# writing


def refuse_existing(folder: Path, pattern: str, *, overwrite: bool) -> None:
    """Raise UserError for a dataset that is there already, by the names of its files, unless it may be replaced."""
    existing = sorted(path.name for path in folder.glob(pattern))
    if existing and not overwrite:
        raise UserError(f"{folder}: holds {', '.join(existing[:4])} already; --overwrite replaces them")


class BinWriter:
    """Streams token ids into an open file, and counts and hashes them as it does."""

    def __init__(self, file: Any, dtype: str) -> None:
        self.file = file
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.sha256 = hashlib.sha256()
        self.tokens = 0
        self.bytes = 0

    def write(self, ids: np.ndarray, text_bytes: int) -> None:
        data = np.ascontiguousarray(ids, dtype=self.dtype).data
        self.file.write(data)
        self.sha256.update(data)
        self.tokens += len(ids)
        self.bytes += text_bytes

    def summary(self) -> dict[str, Any]:
        """What meta.json says of the file."""
        return {"tokens": self.tokens, "bytes": self.bytes, "sha256": self.sha256.hexdigest()}


@contextmanager
def open_bin(path: Path, dtype: str) -> Iterator[BinWriter]:
    """A writer of a bin, which is synced and gets its name at the end of the block; an error leaves nothing."""
    with files.atomic_write(path) as tmp_path, tmp_path.open("wb") as file:
        yield BinWriter(file, dtype)
        file.flush()
        os.fsync(file.fileno())
