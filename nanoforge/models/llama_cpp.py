"""Decoding by llama.cpp in this process, through the package xllamacpp: ids go in, and ids come out.

    engine = LlamaCpp(path_of(pretrained, shape, "f16"), block_size, vocab_rows, n_threads=4)
    engine.complete([Request(prompt_ids, SamplingParams(max_new_tokens=64), uniform_draws(seed))])

llama.cpp's server gives text. So the model is written as a .gguf file whose tokens are the numbers of its ids, "<17>"
for 17: nothing is lost of a token that is a part of a character, none ends a text of itself, and the only tokenizer is
this program's. Any tokenizer will do. The files are kept in the user's cache folder.

It draws as generation.complete does: the same filters in the same order, and past block_size a context is cut to
its last half and read again. Only the random numbers are its own.
"""

import hashlib
import os
import re
import secrets
import signal
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from nanoforge.errors import UserError
from nanoforge.files import atomic_write
from nanoforge.models import gguf_export, gguf_files, hf_export
from nanoforge.models.generation import LookedAt, Request, SamplingParams, cut_context
from nanoforge.models.pretrained import Pretrained

# ---------------------------------------------------------------------------------------------------------------------
# the file

LAYOUT = 1  # of the files in the cache: another number, and they are made anew
MAX_FILES = 8  # in the cache
LEARNED_POSITIONS = "position_embd.weight"


def numbered_tokens(size: int) -> dict[str, Any]:
    """A vocabulary whose tokens are the numbers of their ids. llama.cpp's kind rwkv has no token that ends a text."""
    return {
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(size)],
        "tokenizer.ggml.token_type": [1] * size,
    }


def path_of(source: Pretrained, shape: dict[str, Any], kind: str) -> Path:
    """The model as a file for `LlamaCpp`, written where the cache lacks it.

    shape: all fields of GPTConfig. kind: an entry of gguf_export.TYPES, for the matrices of all models but .gguf files,
    which keep their types. Raises UserError for a model that llama.cpp has no architecture for.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoforge" / "llama_cpp"
    key = "\0".join((str(LAYOUT), kind, source.source, identity(source.source)))
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.gguf"
    if path.exists():
        os.utime(path)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if source.source.endswith(".gguf"):
        renumber(gguf_files.files_of(Path(source.source)), path)
    else:
        model = hf_export.HFModel(shape, source.weights, hf_export.only_tokenizer(source.tokenizers))
        gguf_export.write(with_room(hf_export.fit_rows(model)), path, kind, numbered_tokens)
    for old in sorted(folder.glob("*.gguf"), key=lambda file: file.stat().st_mtime)[:-MAX_FILES]:
        old.unlink()
    return path


def identity(source: str) -> str:
    """What changes when the files change from which a model was loaded. A commit of the hub is its own."""
    path = Path(source)
    manifest = path / "manifest.json"
    if manifest.exists():
        return manifest.read_text()
    if not path.exists():
        return ""
    stats = [(file.name, file.stat()) for file in sorted(path.iterdir() if path.is_dir() else gguf_parts(path))]
    return str([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def gguf_parts(path: Path) -> list[Path]:
    return gguf_files.files_of(path) if path.suffix == ".gguf" else [path]


def with_room(model: hf_export.HFModel) -> hf_export.HFModel:
    """The model with a context longer by one token: the server counts the last one that it draws, which is not read."""
    weights: Mapping[str, Tensor] = model.weights
    if model.shape["position"] == "learned":
        positions = {"position.weight": F.pad(weights["position.weight"], (0, 0, 0, 1))}
        weights = ChainMap(positions, weights)  # type: ignore[arg-type]
    return model._replace(shape={**model.shape, "block_size": model.shape["block_size"] + 1}, weights=weights)


def renumber(sources: list[Path], path: Path) -> None:
    """Write a .gguf, which may be in several files, with numbers as tokens. Its tensors stay as they are."""
    gguf = gguf_files.import_gguf()
    reader = gguf_files.GGUFReader(sources)
    architecture = reader.metadata["general.architecture"]
    metadata = {key: value for key, value in reader.metadata.items() if key.startswith(f"{architecture}.")}
    metadata[f"{architecture}.context_length"] += 1  # as with_room
    metadata |= numbered_tokens(reader.places["token_embd.weight"][1].shape[0])
    with atomic_write(path) as tmp_path:
        writer = gguf.GGUFWriter(tmp_path, architecture, use_temp_file=True)
        for key, value in metadata.items():
            gguf_export.add_key(writer, key, value)
        for name, (_, info) in reader.places.items():
            data = reader.read_bytes(name)
            if name == LEARNED_POSITIONS:
                data = np.pad(data, ((0, 1), (0, 0)))
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType(info.kind))
        gguf_export.finish(writer)


# ---------------------------------------------------------------------------------------------------------------------
# the engine

MIN_CONTEXT = 512  # tokens of a sequence for which the server makes room
SAMPLERS = ("penalties", "temperature", "top_k", "top_p", "min_p")  # in generation.logits_to_probs' order


class LlamaCpp:
    """llama.cpp with a model of `path_of`. Its server starts with the first completion, and anew for longer ones."""

    def __init__(self, path: Path, block_size: int, vocab_rows: int, n_threads: int, *, exact: bool = False):
        """vocab_rows: of the model's head. exact: attention in float32, not in llama.cpp's float16.

        Raises UserError.
        """
        self.library = import_xllamacpp()
        self.path, self.block_size, self.vocab_rows = path, block_size, vocab_rows
        self.n_threads, self.exact = n_threads, exact
        self.server: Any = None
        self.n_slots = self.length = 0  # sequences at a time, and tokens of each

    def complete(self, requests: Sequence[Request], on_token: Callable[[Any], None] | None = None) -> None:
        """As generation.complete, with llama.cpp's own random numbers: the first of a request's own is their seed.

        Requests that follow each other with one prompt are drawn together. Raises UserError.
        """
        groups: list[list[Request]] = []
        for request in requests:
            is_alike = bool(groups) and request.prompt is groups[-1][0].prompt
            if is_alike:
                groups[-1].append(request)
            else:
                groups.append([request])
        longest = max(len(self._context(request)) + request.sampling.max_new_tokens for request in requests)
        self.make_room(max(map(len, groups)), longest)
        for group in groups:
            shown = on_token if group[0] is requests[0] else None
            self._draw(group, shown)
            for request in group:
                while request.is_active:  # its context is full
                    self._draw([request], shown if request is requests[0] else None)

    def _context(self, request: Request) -> list[int]:
        """What is read before the next id."""
        text = np.concatenate((request.prompt[0], np.array(request.ids, dtype=np.int64)))
        return cut_context(text, self.block_size, self.vocab_rows, halve=bool(request.ids)).tolist()

    def _draw(self, group: list[Request], on_token: Callable[[Any], None] | None) -> None:
        """Continue requests with one context until all are done or it is full."""
        first = group[0]
        context = self._context(first)
        n_left = min(first.sampling.max_new_tokens - len(first.ids), self.block_size + 1 - len(context))
        start = float(first.uniform(np.array(first.number), np.array(len(first.ids))))
        body = {
            "prompt": context,
            "n": len(group),
            "n_predict": n_left,
            "seed": int(start * 2**32),
            "stream": True,
            **self._sampling(first.sampling),
        }
        errors: list[BaseException] = []

        def take(reply: dict[str, Any]) -> bool:
            """Take what was drawn; whether that is enough. The library would swallow what this raises."""
            try:
                if "choices" not in reply:
                    raise UserError(f"llama.cpp: {reply['error']['message']}")
                (choice,) = reply["choices"]
                request = group[choice["index"]]
                n_shown = len(request.text_ids())
                request.add(read_choice(choice, request.sampling.logprobs), 0)
                if on_token is not None and request is first:
                    for token in request.text_ids()[n_shown:]:
                        on_token(token)
            except BaseException as error:  # also the user's interrupt
                errors.append(error)
                return True
            return not any(request.is_active for request in group)

        self.server.handle_completions(body, take)
        if errors:
            raise errors[0]

    def _sampling(self, sampling: SamplingParams) -> dict[str, Any]:
        """By the names of the server's requests."""
        banned = range(sampling.vocab_size or self.vocab_rows, self.vocab_rows)
        n_probs = {} if sampling.logprobs is None else {"n_probs": max(1, sampling.logprobs)}
        return {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": self.block_size + 1,
            "samplers": SAMPLERS,
            "logit_bias": [[i, False] for i in banned],
            **n_probs,
        }

    def make_room(self, n_slots: int, length: int) -> None:
        """Start the server, unless it runs with room for so many sequences of this length."""
        length = min(length, self.block_size + 1)
        if self.server is not None and n_slots <= self.n_slots and length <= self.length:
            return
        self.n_slots = max(n_slots, self.n_slots)
        self.length = min(max(MIN_CONTEXT, 1 << (length - 1).bit_length()), self.block_size + 1)
        self.server = None  # the old one ends first
        self.server = self._start()

    def _start(self) -> Any:
        params = self.library.CommonParams()
        params.model.path = str(self.path)
        params.n_parallel, params.n_ctx = self.n_slots, self.n_slots * self.length
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.n_threads
        if self.exact:
            params.cache_type_k = params.cache_type_v = self.library.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = self.library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.fit_params = params.warmup = False
        params.verbosity = -1
        params.api_keys = [secrets.token_hex()]  # nobody else is to use its address on this machine
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server = self.library.Server(params)
        except RuntimeError as error:
            raise UserError(f"llama.cpp can't load {self.path} ({error})") from None
        finally:
            for number, handler in handlers.items():  # it has put its own in their places
                signal.signal(number, handler)
        server.handle_completions({"prompt": [0], "n_predict": 1})  # one that ends before its loop has begun hangs
        return server


def read_choice(choice: dict[str, Any], n_alternatives: int | None) -> LookedAt:
    """What a reply of the server says was drawn."""
    ids = [[[int(token)] for token in re.findall(r"<(\d+)>", choice["text"])]]
    if n_alternatives is None or not ids[0]:
        return LookedAt(ids, [], [], [], [])
    steps = choice["logprobs"]["content"]
    logprobs = [[[step["logprob"]] for step in steps]]
    tops = [step["top_logprobs"][:n_alternatives] for step in steps]
    top_ids = [[[[top["id"] for top in step]] for step in tops]]
    return LookedAt(ids, [], logprobs, top_ids, [[[[top["logprob"] for top in step]] for step in tops]])


def import_xllamacpp() -> Any:
    """The xllamacpp package. Raises UserError."""
    try:
        import xllamacpp
    except ModuleNotFoundError:
        raise UserError("--engine=llama.cpp: needs a package: pip install xllamacpp") from None
    return xllamacpp
