"""Text to GPT-2's tokens: data/prepare.py beside nanoGPT's script and a loop over tiktoken.

    python -m benchmarks.tokenization --peer=../nanoGPT

The text is that of the Python packages installed here, a file a document, again and again up to --text_mb. All sides
read the same JSONL file, take turns, and must count the same tokens. A ratio above 1 says that ours needs less. Writes
benchmarks/tokenization_cpu.json.
"""

import json
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import configurator
from benchmarks.common import (
    ROOT,
    SCRIPTS,
    Figures,
    Measurement,
    Side,
    compare,
    describe_setup,
    print_table,
    run_process,
    take_turns,
    to_flags,
)
from configurator import arg, arg_group, arg_table
from nanoforge.errors import UserError
from nanoforge.files import write_json

SUFFIXES = {".py", ".pyi", ".h", ".md", ".rst", ".txt", ".js"}
MAX_FILE_MB = 1  # larger ones are data


@arg_group
class TokenizationArgs:
    """comparison"""

    peer: str = arg("", "nanoGPT's folder (none: without it)", path=True)
    input: str = arg("", "folder of the text (none: that of Python's packages)", path=True)
    text_mb: int = arg(1024, "megabytes of text", low=1)
    pairs: int = arg(2, "times that each side runs, in turn", low=1)
    out: str = arg("benchmarks", "folder of the results", path=True)


@arg_table
class Args(TokenizationArgs):
    """The arguments."""


def check(args: Args, source: dict[str, str]) -> Iterator[str]:
    """The errors in the arguments."""
    if args.peer and not nanogpt_script(args.peer).exists():
        yield f"--peer={args.peer}: no such file: {nanogpt_script(args.peer)}"


def nanogpt_script(peer: str) -> Path:
    return Path(peer) / "data" / "openwebtext" / "prepare.py"


def read_texts(folder: Path) -> Iterator[str]:
    """The text files in a folder, in order."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in SUFFIXES and path.is_file() and path.stat().st_size < MAX_FILE_MB * 2**20:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text:
                yield text


def write_rows(path: Path, folder: Path, text_mb: int) -> Figures:
    """Write a row for each text, and all of them again until there are so many megabytes. Raises UserError without
    any."""
    n_bytes, limit, rounds = 0, text_mb * 2**20, 0
    with path.open("w", encoding="utf-8") as file:
        while n_bytes < limit:
            rounds += 1
            for text in read_texts(folder):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                n_bytes += len(text.encode())
                if n_bytes >= limit:
                    break
            if n_bytes == 0:
                raise UserError(f"--input={folder}: no text files ({', '.join(sorted(SUFFIXES))})")
    return {"text_mb": round(n_bytes / 2**20), "rounds_of_the_files": rounds}


def measure(command: list[str], folder: Path, n_tokens: set[int]) -> Measurement:
    """Seconds and the largest process's peak MB. Raises UserError where it counts other tokens than a side before."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        result = run_process([sys.executable, *(part.replace("FOLDER", name) for part in command)])
        n_tokens.add(sum(path.stat().st_size // 2 for path in Path(name).rglob("*.bin")))
    if len(n_tokens) > 1:
        raise UserError(f"{' '.join(command)}: another number of tokens than before: {sorted(n_tokens)}")
    return {"seconds": result.seconds, "peak_mb": result.peak_bytes / 2**20}


def main(args: Args) -> None:
    text_folder = Path(args.input or sysconfig.get_paths()["purelib"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        figures: Figures = {"about": describe_setup("python -m benchmarks.tokenization")}
        figures |= write_rows(rows, text_folder, args.text_mb)
        ours = [str(ROOT / "data" / "prepare.py"), *to_flags(input=rows, name="text", data_dir="FOLDER")]
        loop = [str(SCRIPTS / "tokenize_text.py"), str(rows), "FOLDER"]
        commands = {"ours": [*ours, "--tokenizer=gpt2"], "a loop over tiktoken": loop}
        if args.peer:
            commands["nanoGPT's script"] = [*loop, str(nanogpt_script(args.peer))]
        n_tokens: set[int] = set()
        sides: dict[str, Side] = {
            side: partial(measure, command, folder, n_tokens) for side, command in commands.items()
        }
        print(f"{figures['text_mb']:,} MB of text", flush=True)
        results = take_turns(args.pairs, sides)
    figures["tokens"] = n_tokens.pop()
    for side in list(commands)[1:]:
        figures[side] = {}
        for key in ("seconds", "peak_mb"):
            table = compare({"ours": results["ours"], "peer": results[side]}, key, lower_is_better=True)
            print_table(f"beside {side}, {key}", table)
            figures[side][key] = table
    path = Path(args.out) / "tokenization_cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, figures)


if __name__ == "__main__":
    configurator.run(main, configurator.parse(Args, sys.argv[1:], __doc__ or "", configurator.Rules(check=check)))
