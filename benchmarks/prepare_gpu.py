"""Gather what benchmarks/gpu.py needs on a machine without a network, in one folder that git ignores:

    python -m benchmarks.prepare_gpu --peer=../nanoGPT --out=.bench       3.5 MB; bring it along

    .bench/nanoGPT/      its scripts, and shakespeare_char, prepared by its own script
    .bench/tiktoken/     GPT-2's tokens, as TIKTOKEN_CACHE_DIR has them

On the GPU's machine gpu.py makes the dataset `source` from these: GPT-2's tokens of the Python packages installed
there, every tenth package for validation (`--source=FOLDER`).
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import configurator
from configurator import Rules, arg, arg_table
from nanoforge.data import corpus
from nanoforge.data.documents import SOURCE_SUFFIXES, TextChunk
from nanoforge.errors import UserError

PEER_URL = "https://github.com/karpathy/nanoGPT"
PEER_FILES = ("train.py", "model.py", "sample.py", "configurator.py", "LICENSE", "data/shakespeare_char/prepare.py")
TOKENIZER_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
TOKENIZER_FILES = ("vocab.bpe", "encoder.json")
VAL_EVERY = 10  # packages


@arg_table
class PrepareGpuArgs:
    """what"""

    peer: str = arg("", f"a checkout of nanoGPT (none: cloned from {PEER_URL})", path=True)
    text: str = arg("", "tinyshakespeare's input.txt (none: nanoGPT's script downloads it)", path=True)
    out: str = arg(".bench", "the folder to fill", path=True)
    source: str = arg("", "make only the dataset `source` of installed packages, in this folder", path=True)
    packages: tuple[str, ...] = arg((), "folders of packages for it (none: all that are installed)", path=True)
    tokenizer: str = arg("gpt2", "its tokenizer, as data/prepare.py takes it")


def main(args: PrepareGpuArgs) -> None:
    if args.source:
        write_source_dataset(Path(args.source), [Path(name) for name in args.packages], args.tokenizer)
        return
    out = Path(args.out)
    copy_peer(args.peer, out / "nanoGPT")
    prepare_characters(out / "nanoGPT", args.text)
    copy_tokenizer(out / "tiktoken")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


def copy_peer(peer: str, folder: Path) -> None:
    """The scripts of nanoGPT, as they are. Raises UserError."""
    with tempfile.TemporaryDirectory() as name:
        checkout = Path(peer) if peer else Path(name) / "nanoGPT"
        if not peer and subprocess.run(["git", "clone", "-q", "--depth=1", PEER_URL, str(checkout)]).returncode:
            raise UserError(f"--peer: {PEER_URL} can't be cloned; pass a checkout of it")
        for file in PEER_FILES:
            if not (checkout / file).exists():
                raise UserError(f"--peer={peer}: has no {file}; pass a checkout of nanoGPT")
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(checkout / file, folder / file)


def prepare_characters(peer: Path, text: str) -> None:
    """nanoGPT's own dataset of characters, by its own script. Raises UserError."""
    folder = peer / "data" / "shakespeare_char"
    if text:
        shutil.copy(text, folder / "input.txt")
    if subprocess.run([sys.executable, str(folder / "prepare.py")]).returncode:
        raise UserError("--text: nanoGPT's script can't download the text; pass tinyshakespeare's input.txt")


def copy_tokenizer(folder: Path) -> None:
    """GPT-2's tokens, in the files that tiktoken keeps: named by the hash of their address. Raises UserError."""
    import tiktoken

    folder.mkdir(parents=True, exist_ok=True)
    names = [hashlib.sha1(f"{TOKENIZER_URL}/{file}".encode()).hexdigest() for file in TOKENIZER_FILES]
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR", ""))
    if os.environ.get("TIKTOKEN_CACHE_DIR") and all((cache / name).exists() for name in names):
        for name in names:
            shutil.copyfile(cache / name, folder / name)
        return
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    try:
        tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' many kinds of network trouble
        raise UserError(
            f"tiktoken's gpt2 can't be downloaded ({type(error).__name__}); "
            "point TIKTOKEN_CACHE_DIR to a folder that holds it"
        ) from None


def write_source_dataset(folder: Path, packages: list[Path], tokenizer: str) -> None:
    """Token bins of the source files of packages; of every tenth package for validation."""
    if not packages:
        site = Path(sysconfig.get_paths()["purelib"])
        packages = [path for path in site.iterdir() if path.is_dir() and not path.name.endswith("-info")]

    def read() -> Iterator[TextChunk]:
        for number, package in enumerate(sorted(packages)):
            split = "val" if number % VAL_EVERY == VAL_EVERY - 1 or number == len(packages) - 1 else "train"
            for path in sorted(package.rglob("*")):
                if path.suffix in SOURCE_SUFFIXES and path.is_file():
                    text = path.read_text(encoding="utf-8", errors="ignore")
                    if text:
                        yield TextChunk(split, text, ends_document=True, begins_document=True)

    corpus.write_dataset(folder, read, tokenizer)


if __name__ == "__main__":
    configurator.run(
        main,
        configurator.parse(PrepareGpuArgs, sys.argv[1:], __doc__, Rules()),
    )
