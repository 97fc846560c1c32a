"""Tokenizers: text to token ids and back, each stored whole as JSON.

A run's tokenizer.json is {"tokenizers": [{"name": dataset, "kind": ..., ...}, ...]}: one for each vocabulary of its model. Nothing
else is needed to read it: a tiktoken encoding is stored with all of its ranks.

A kind is a class with: `vocab_size`; `eos_id`, the id that ends a document, or None; `encode(text)` to an integer array;
`decode(ids)`; `to_json()` and `from_json(spec)`, each other's inverse.
"""

import base64
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nanoforge import files
from nanoforge.errors import UserError, did_you_mean

END_OF_TEXT = "<|endoftext|>"


def code_points(text: str) -> np.ndarray:
    """The number of each character: uint8 of an ASCII text, which costs a copy, uint32 of any other."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class CharTokenizer:
    """One id a character; ids follow the characters' order. With `has_eos` one more id ends a document."""

    kind = "char"

    def __init__(self, chars: Iterable[str], *, has_eos: bool = False):
        self.chars = list(chars)
        self.eos_id = len(self.chars) if has_eos else None
        self.vocab_size = len(self.chars) + has_eos
        points = np.array([ord(char) for char in self.chars], dtype=np.uint32)
        # Code point -> id; vocab_size for those without one, as the last entry is, in whose place all points beyond are looked up.
        self.table = np.full(
            max(128, int(points.max(initial=0)) + 1) + 1,
            self.vocab_size,
            dtype=np.uint16 if self.vocab_size < 2**16 else np.int32,
        )
        self.table[points] = np.arange(len(points))

    def encode(self, text: str) -> np.ndarray:
        points = code_points(text)
        ids = self.table.take(points, mode="clip")
        if ids.max(initial=0) == self.vocab_size:
            strange = [chr(point) for point in np.unique(points[ids == self.vocab_size])]
            raise UserError(
                f"the tokenizer knows no {', '.join(map(repr, strange[:10]))}: its characters are {''.join(self.chars)!r}"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        chars = [*self.chars, END_OF_TEXT]
        return "".join(chars[i] for i in ids)

    def to_json(self) -> dict:
        return {"chars": "".join(self.chars), "ends": self.eos_id is not None}

    @classmethod
    def from_json(cls, spec: dict) -> "CharTokenizer":
        return cls(spec["chars"], has_eos=spec.get("ends", False))


class ByteTokenizer:
    """UTF-8: 256 bytes and the end of text."""

    kind, vocab_size, eos_id = "byte", 257, 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(bytes([i]) if i < 256 else END_OF_TEXT.encode() for i in ids).decode("utf-8", "replace")

    def to_json(self) -> dict:
        return {}

    @classmethod
    def from_json(cls, spec: dict) -> "ByteTokenizer":
        return cls()


class TiktokenTokenizer:
    """Any encoding of tiktoken, GPT-2's among them."""

    kind = "tiktoken"

    def __init__(self, encoding):
        self.encoding = encoding
        self.vocab_size, self.eos_id = encoding.n_vocab, encoding.eot_token

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.encoding.encode_ordinary(text), dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode(list(ids))

    def to_json(self) -> dict:
        ranks = self.encoding._mergeable_ranks
        words = [""] * (max(ranks.values()) + 1)  # by rank; p50k_base leaves gaps
        for token, rank in ranks.items():
            words[rank] = base64.b64encode(token).decode()
        return {
            "encoding": self.encoding.name,
            "pattern": self.encoding._pat_str,
            "special_tokens": self.encoding._special_tokens,
            "ranks": " ".join(words),
        }

    @classmethod
    def from_json(cls, spec: dict) -> "TiktokenTokenizer":
        import tiktoken

        ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["ranks"].split(" ")) if token}
        return cls(
            tiktoken.Encoding(
                spec["encoding"], pat_str=spec["pattern"], mergeable_ranks=ranks, special_tokens=spec["special_tokens"]
            )
        )

    @classmethod
    def from_name(cls, name: str) -> "TiktokenTokenizer":
        """From tiktoken's own files: downloaded once, or found in TIKTOKEN_CACHE_DIR. Raises UserError."""
        import tiktoken

        if name not in tiktoken.list_encoding_names():
            raise UserError(
                f"--tokenizer={name}: tiktoken has no such encoding{did_you_mean(name, tiktoken.list_encoding_names())}"
            )
        try:
            return cls(tiktoken.get_encoding(name))
        except Exception as error:  # requests' many kinds of network trouble
            raise UserError(
                f"tiktoken's {name} can't be downloaded ({type(error).__name__}); offline, point TIKTOKEN_CACHE_DIR to a folder that holds it"
            ) from None


class BPETokenizer:
    """A byte-level BPE of the `tokenizers` library, trained on the data or read from a file of that library."""

    kind = "bpe"

    def __init__(self, spec: dict):
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            raise UserError("this tokenizer needs a package: pip install tokenizers") from None
        self.tokenizer = Tokenizer.from_str(json.dumps(spec))
        self.vocab_size, self.eos_id = self.tokenizer.get_vocab_size(), self.tokenizer.token_to_id(END_OF_TEXT)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def to_json(self) -> dict:
        return {"tokenizer": json.loads(self.tokenizer.to_str())}

    @classmethod
    def from_json(cls, spec: dict) -> "BPETokenizer":
        return cls(spec["tokenizer"])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """A byte-level BPE (Sennrich et al. 2016) of vocab_size ids, the end of text among them."""
        try:
            from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        except ModuleNotFoundError:
            raise UserError("--tokenizer=bpe: needs a package: pip install tokenizers") from None
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(json.loads(tokenizer.to_str()))


class NumberTokenizer:
    """Ids whose tokenizer is not known: text is their numbers, separated by spaces."""

    kind, eos_id = "numbers", None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> np.ndarray:
        try:
            ids = np.array([int(word) for word in text.split()], dtype=np.int32)
        except ValueError:
            raise UserError(
                "the dataset's tokenizer is not known: text must be token ids separated by spaces"
            ) from None
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise UserError(f"token ids must lie below {self.vocab_size}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{i} " for i in ids)

    def to_json(self) -> dict:
        return {"vocab_size": self.vocab_size}

    @classmethod
    def from_json(cls, spec: dict) -> "NumberTokenizer":
        return cls(spec["vocab_size"])


class ExtendedTokenizer:
    """Another tokenizer and further tokens, which no text becomes: an end of text, the roles of a chat. `ids` tells theirs."""

    kind = "extended"

    def __init__(self, base, added: Sequence[str]):
        self.base, self.added = base, list(added)
        self.added_ids = {token: base.vocab_size + i for i, token in enumerate(self.added)}
        self.vocab_size = base.vocab_size + len(self.added)
        self.eos_id = self.added_ids.get(END_OF_TEXT, base.eos_id)

    def encode(self, text: str) -> np.ndarray:
        return self.base.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        runs = itertools.groupby(ids, lambda i: i >= self.base.vocab_size)
        return "".join(
            "".join(self.added[i - self.base.vocab_size] for i in run) if own else self.base.decode(list(run))
            for own, run in runs
        )

    def to_json(self) -> dict:
        return {"base": to_json(self.base), "added": self.added}

    @classmethod
    def from_json(cls, spec: dict) -> "ExtendedTokenizer":
        return cls(from_json(spec["base"], "tokenizer"), spec["added"])


def add_tokens(tokenizer, tokens: Sequence[str]):
    """The tokenizer with these tokens, those that it has not yet last."""
    own = tokenizer.added_ids if isinstance(tokenizer, ExtendedTokenizer) else {}
    if not (missing := [token for token in tokens if token not in own]):
        return tokenizer
    return ExtendedTokenizer(tokenizer.base, [*own, *missing]) if own else ExtendedTokenizer(tokenizer, missing)


Tokenizer = CharTokenizer | ByteTokenizer | TiktokenTokenizer | BPETokenizer | NumberTokenizer | ExtendedTokenizer
KINDS = {
    kind.kind: kind
    for kind in (CharTokenizer, ByteTokenizer, TiktokenTokenizer, BPETokenizer, NumberTokenizer, ExtendedTokenizer)
}


def to_json(tokenizer: Tokenizer) -> dict:
    """The tokenizer in full."""
    return {"kind": tokenizer.kind, **tokenizer.to_json()}


def same_tokenizer(*tokenizers: Tokenizer) -> bool:
    """Whether they give the same ids for the same text."""
    specs = [to_json(tokenizer) for tokenizer in tokenizers]
    return all(spec == specs[0] for spec in specs)


def from_json(spec: dict, where: str) -> Tokenizer:
    """The tokenizer that `to_json` told; `{"kind": "tiktoken", "encoding": name}` names one. Raises UserError."""
    try:
        if spec["kind"] == "tiktoken" and "ranks" not in spec:
            return TiktokenTokenizer.from_name(spec["encoding"])
        return KINDS[spec["kind"]].from_json(spec)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a tokenizer of this program ({type(error).__name__}: {error})") from None


def save(path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    """Write a run's tokenizer.json: one tokenizer for each vocabulary, by the dataset's name."""
    specs = [{"name": name, **to_json(tokenizer)} for name, tokenizer in tokenizers.items()]
    files.write_json(path, {"tokenizers": specs})


def load(path: Path) -> dict[str, Tokenizer]:
    """The tokenizers of a run's tokenizer.json. Raises UserError."""
    try:
        specs = json.loads(path.read_text(encoding="utf-8"))["tokenizers"]
        return {spec["name"]: from_json(spec, str(path)) for spec in specs}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: can't be read ({type(error).__name__}: {error})") from None
