"""Decoding by llama.cpp in this process, through the package xllamacpp: ids go in, and ids come out.

    engine = LlamaCpp(path_of(pretrained, shape, "f16"), block_size, vocab_rows, n_threads=4)
    engine.generate([prompt_ids], SamplingParams(max_new_tokens=64), seed=1)

llama.cpp's server gives text. So the model is written as a .gguf file whose tokens are the numbers of its ids, "<17>"
for 17: nothing is lost of a token that is a part of a character, none ends a text of itself, and the only tokenizer is
this program's. Any tokenizer will do. The files are kept in the user's cache folder.

It draws as generation.generate_batch does: the same filters in the same order, and past block_size a context is cut to
its last half and read again. Only the random numbers are its own.
"""

import hashlib
import os
import re
import secrets
import signal
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from nanoforge import rng
from nanoforge.errors import UserError
from nanoforge.files import atomic_write
from nanoforge.models import gguf_export, gguf_files, hf_export
from nanoforge.models.generation import Completion, SamplingParams, cut_context
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
        weights = ChainMap({"position.weight": F.pad(weights["position.weight"], (0, 0, 0, 1))}, weights)  # type: ignore[arg-type]
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


@dataclass
class Drawn:
    """A completion in the making."""

    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    ended: bool = False
    finished: bool = False

    def add(self, token: int, sampling: SamplingParams) -> None:
        """The next id, which may be the last one."""
        self.ids.append(token)
        self.ended = token in sampling.end_ids
        is_enough = sampling.is_complete is not None and sampling.is_complete(self.ids)
        self.finished = self.ended or is_enough or len(self.ids) == sampling.max_new_tokens


class LlamaCpp:
    """llama.cpp with a model of `path_of`. Its server starts with the first completion, and anew for longer ones."""

    def __init__(self, path: Path, block_size: int, vocab_rows: int, n_threads: int, *, exact_cache: bool = False):
        """vocab_rows: of the model's head. exact_cache: keys and values in float32, not in llama.cpp's float16.

        Raises UserError.
        """
        self.library = import_xllamacpp()
        self.path, self.block_size, self.vocab_rows = path, block_size, vocab_rows
        self.n_threads, self.exact_cache = n_threads, exact_cache
        self.server: Any = None
        self.n_slots = self.length = 0  # sequences at a time, and tokens of each

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        seed: tuple[int, ...],
        on_token: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """As generation.generate_batch, with random numbers of llama.cpp's own from the seed, a key of rng.

        The completions of a prompt are drawn together. Raises UserError.
        """
        contexts = [self._cut(prompt, halve=False) for prompt in prompts]
        self._make_room(sampling.n, max(map(len, contexts)) + sampling.max_new_tokens)
        drawn: list[Drawn] = []
        for number, context in enumerate(contexts):
            group = [Drawn(context) for _ in range(sampling.n)]
            drawn += group
            shown = on_token if number == 0 else None
            self._draw(group, context, sampling, int(rng.hash_u64(*seed, number, 0)), shown)
            for i, completion in enumerate(group):
                while not completion.finished:
                    context = self._cut([*completion.prompt, *completion.ids], halve=True)
                    part_seed = int(rng.hash_u64(*seed, number * sampling.n + i, len(completion.ids)))
                    self._draw([completion], context, sampling, part_seed, shown if i == 0 else None)
        return [Completion(completion.ids, [], completion.ended) for completion in drawn]

    def _cut(self, ids: Sequence[int], *, halve: bool) -> list[int]:
        return cut_context(np.array(ids).ravel(), self.block_size, self.vocab_rows, halve=halve).tolist()

    def _draw(
        self,
        group: list[Drawn],
        context: list[int],
        sampling: SamplingParams,
        seed: int,
        on_token: Callable[[int], None] | None,
    ) -> None:
        """Continue a context, as each completion of the group, until all are finished or the context is full."""
        n_left = min(sampling.max_new_tokens - len(group[0].ids), self.block_size + 1 - len(context))
        banned = range(sampling.vocab_size or self.vocab_rows, self.vocab_rows)
        request = {
            "prompt": context,
            "n": len(group),
            "n_predict": n_left,
            "seed": seed % 2**32,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "samplers": SAMPLERS,
            "logit_bias": [[i, False] for i in banned],
            "stream": True,
        }
        errors: list[Any] = []

        def take(reply: dict[str, Any]) -> bool:
            """Take what was drawn; whether that is enough. What this raises, the library would swallow."""
            try:
                if "choices" not in reply:
                    errors.append(UserError(f"llama.cpp: {reply['error']['message']}"))
                    return True
                (choice,) = reply["choices"]
                completion = group[choice["index"]]
                for token in map(int, re.findall(r"<(\d+)>", choice["text"])):
                    if completion.finished:
                        break
                    completion.add(token, sampling)
                    if on_token is not None and completion is group[0] and not completion.ended:
                        on_token(token)
                return all(completion.finished for completion in group)
            except BaseException as error:  # also the user's interrupt
                errors.append(error)
                return True

        self.server.handle_completions(request, take)
        if errors:
            raise errors[0]

    def _make_room(self, n_slots: int, length: int) -> None:
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
        if self.exact_cache:
            params.cache_type_k = params.cache_type_v = self.library.ggml_type.GGML_TYPE_F32
        params.fit_params = params.warmup = False
        params.verbosity = -1
        params.api_keys = [secrets.token_hex()]  # nobody else is to use its address on this machine
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self.library.Server(params)
        except RuntimeError as error:
            raise UserError(f"llama.cpp can't load {self.path} ({error})") from None
        finally:
            for number, handler in handlers.items():  # it has put its own in their places
                signal.signal(number, handler)


def import_xllamacpp() -> Any:
    """The xllamacpp package. Raises UserError."""
    try:
        import xllamacpp
    except ModuleNotFoundError:
        raise UserError("--engine=llama.cpp: needs a package: pip install xllamacpp") from None
    return xllamacpp
