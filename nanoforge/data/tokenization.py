"""Tokenizers: text to token ids and back, each stored whole as JSON. Knows nothing of datasets or models.

A run's tokenizer.json is {"tokenizers": [{"name": dataset, "kind": ..., ...}, ...]}: one for each vocabulary of its
model. Nothing else is needed to read it: a tiktoken encoding is stored with all of its ranks.

    tokenizer = CharTokenizer("abc", has_eos=True)
    tokenizer.encode("cab")              # array([2, 0, 1])
    tokenizer.decode([2, 0, 1, 3])       # "cab<|endoftext|>"
"""

import base64
import functools
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from nanoforge import files
from nanoforge.data import byte_level
from nanoforge.data.word_cache import WordCache
from nanoforge.errors import UserError, did_you_mean

END_OF_TEXT = "<|endoftext|>"
CONTROL_MARK = re.compile(
    r"<[|\uff5c].*[|\uff5c]>"
)  # how control tokens are spelled, also where a file does not mark them so

# Tokenizers of one vocabulary that split these words and all of their own tokens alike are one tokenizer.
PROBE = (
    "It's we'LL naïve  Café\r\n\n\tx1 = 12345.678e-9; // _fooBar HTTPServer $%&/()=?\n\n1.  2    3\t\t4"
    "    日本語 русский العربية e\u0301 \U0001f469\u200d\U0001f680 "
)


MIN_CACHED_CHARS = 2**12  # of texts that arrays encode sooner than a library


class Encoding(NamedTuple):
    """Ids, and the characters of the text that each comes from."""

    ids: np.ndarray  # (n,)
    offsets: np.ndarray  # (n, 2), [start, stop)


@dataclass(frozen=True)
class ControlTokens:
    """What a model's own files say of its control tokens."""

    eos_id: int | None = None
    bos_id: int | None = None
    end_ids: tuple[int, ...] = ()  # eos_id among them
    added_ids: Mapping[str, int] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)


class Tokenizer(ABC):
    """Text to token ids and back. A new kind is a subclass and its entry in KINDS."""

    kind: ClassVar[str]
    vocab_size: int
    eos_id: int | None = None  # the end-of-sequence token, which ends a document or a turn
    bos_id: int | None = None  # begins a sequence, where the tokenizer's own model was trained so
    added_ids: Mapping[str, int] = {}  # control tokens by name; no text becomes one
    chat_template: str = ""  # in jinja, as Hugging Face has it
    special_tokens: Mapping[str, str] = {}  # what the template calls them: {"bos_token": "<s>", ...}
    control: ControlTokens | None = None  # of the model that the tokenizer comes from
    marks_start: bool = False  # whether a text's first word gets the space that others have before them

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a completion."""
        if self.control is not None:
            return self.control.end_ids
        return () if self.eos_id is None else (self.eos_id,)

    @property
    def control_tokens(self) -> dict[str, int]:
        """All control tokens by name; the end-of-sequence token of kinds that have no name for it is <|endoftext|>."""
        if self.eos_id is None or self.eos_id in self.added_ids.values():
            return dict(self.added_ids)
        return {END_OF_TEXT: self.eos_id, **self.added_ids}

    def adopt(self, control: ControlTokens) -> None:
        """Take over what a model's files say."""
        self.control = control
        self.eos_id = control.eos_id
        self.bos_id = control.bos_id
        self.added_ids = control.added_ids
        self.special_tokens = control.special_tokens

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, integers of any width; never a control token. Raises UserError for what it can't hold."""

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, of many texts."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; the end-of-sequence token is its name, <|endoftext|> where it has none."""

    def encode_continuation(self, text: str) -> np.ndarray:
        """The ids of a text that goes on behind other text of the same document."""
        if not self.marks_start or not text:
            return self.encode(text)
        before = "a" if text[0].isspace() else "\n"  # no token spans the two
        first = self.encode(before)
        ids = self.encode(before + text)
        return ids[len(first) :] if np.array_equal(ids[: len(first)], first) else self.encode(text)

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """The text of ids behind others: with the space before its first word, if it has one."""
        if not self.marks_start:
            return self.decode(ids)
        return self.decode([*self.encode("a").tolist(), *ids])[1:]

    def encode_inside(self, text: str) -> Encoding:
        """As `encode`, of a text that stands behind other tokens; some kinds begin a text with a space of their own."""
        ids = self.encode(text)
        return Encoding(ids, text_offsets(self, ids.tolist(), text))

    def encode_with_control(self, text: str) -> Encoding:
        """As `encode`, but names of control tokens become these tokens: for what a template writes, not for data."""
        control = self.control_tokens
        parts = split_control(text, control)
        encodings = []
        for number, part in enumerate(parts):
            is_control = number % 2 == 1
            encodings.append(control_encoding(control, part) if is_control else self.encode_inside(part))
        return join_encodings(encodings, [len(part) for part in parts])

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All that from_json needs."""

    @classmethod
    @abstractmethod
    def from_json(cls, spec: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer that to_json wrote."""


def split_control(text: str, names: Iterable[str]) -> list[str]:
    """The text cut at the names of control tokens: text, name, text, ..., text."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if longest_first else [text]


def control_encoding(control_tokens: Mapping[str, int], name: str) -> Encoding:
    """A control token that stands for its whole name."""
    return Encoding(np.array([control_tokens[name]]), np.array([[0, len(name)]]))


def join_encodings(encodings: Sequence[Encoding], lengths: Sequence[int]) -> Encoding:
    """The encoding of texts of these lengths that follow each other."""
    starts = np.cumsum([0, *lengths])
    offsets = [encoding.offsets + start for encoding, start in zip(encodings, starts, strict=False)]
    return Encoding(np.concatenate([encoding.ids for encoding in encodings]), np.concatenate(offsets))


def text_offsets(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> np.ndarray:
    """(n, 2): the characters of each id, of ids that decode to the text. Tokens that only together make a character all
    have it."""
    offsets = np.zeros((len(ids), 2), dtype=np.int64)
    start = first = 0
    for i in range(len(ids)):
        piece = tokenizer.decode(ids[first : i + 1])
        is_whole = text.startswith(piece, start)
        offsets[first : i + 1] = start, start + max(1, len(piece))
        if is_whole:
            start, first = start + len(piece), i + 1
    return offsets


# ---------------------------------------------------------------------------------------------------------------------
# characters and bytes


def code_points(text: str) -> np.ndarray:
    """The number of each character: uint8 of an ASCII text, which costs a copy, uint32 of any other."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class CharTokenizer(Tokenizer):
    """One id a character, in the order given; has_eos: one more id ends a document."""

    kind = "char"

    def __init__(self, chars: Iterable[str], *, has_eos: bool = False) -> None:
        self.chars = list(chars)
        self.eos_id = len(self.chars) if has_eos else None
        self.vocab_size = len(self.chars) + has_eos
        # Code point -> id, or vocab_size where there is none: so in the last entry, which stands for all points beyond.
        points = np.array([ord(char) for char in self.chars], dtype=np.uint32)
        length = max(128, int(points.max(initial=0)) + 1) + 1
        dtype = np.uint16 if self.vocab_size < 2**16 else np.int32
        self.table = np.full(length, self.vocab_size, dtype=dtype)
        self.table[points] = np.arange(len(points))

    def encode(self, text: str) -> np.ndarray:
        points = code_points(text)
        ids = self.table.take(points, mode="clip")
        if ids.max(initial=0) == self.vocab_size:
            unknown = [repr(chr(point)) for point in np.unique(points[ids == self.vocab_size])]
            known = "".join(self.chars)
            raise UserError(f"the tokenizer knows no {', '.join(unknown[:10])}: its characters are {known!r}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        chars = [*self.chars, END_OF_TEXT]
        return "".join(chars[i] for i in ids)

    def to_json(self) -> dict[str, Any]:
        return {"chars": "".join(self.chars), "ends": self.eos_id is not None}

    @classmethod
    def from_json(cls, spec: Mapping[str, Any]) -> "CharTokenizer":
        return cls(spec["chars"], has_eos=spec.get("ends", False))


class ByteTokenizer(Tokenizer):
    """UTF-8: 256 bytes and the end-of-sequence token."""

    kind = "byte"
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        parts = [bytes([i]) if i < 256 else END_OF_TEXT.encode() for i in ids]
        return b"".join(parts).decode("utf-8", "replace")

    def to_json(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_json(cls, spec: Mapping[str, Any]) -> "ByteTokenizer":
        return cls()


# ---------------------------------------------------------------------------------------------------------------------
# byte pair encodings


class LibraryTokenizer(Tokenizer):
    """A tokenizer of a library, whose words are encoded once where it splits a text as GPT-2 does.

    That takes some preparation, so a library encodes the first texts, and short ones.
    """

    min_encoded: ClassVar[int]  # characters, before the cache is made: about what the library encodes in that time
    n_encoded = 0

    @abstractmethod
    def encode_by_library(self, text: str) -> np.ndarray:
        """As `encode`."""

    @abstractmethod
    def make_word_cache(self) -> WordCache | None:
        """The same ids, faster; None if the tokenizer splits a text in another way."""

    @functools.cached_property
    def word_cache(self) -> WordCache | None:
        return self.make_word_cache()

    def encode(self, text: str) -> np.ndarray:
        if len(text) < MIN_CACHED_CHARS:
            return self.encode_by_library(text)
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        n_chars = sum(map(len, texts))
        self.n_encoded += n_chars
        if n_chars >= MIN_CACHED_CHARS and self.n_encoded >= self.min_encoded and self.word_cache is not None:
            ids = self.word_cache.encode(texts)
            if ids is not None:
                return ids
            if len(texts) > 1:
                return [self.encode(text) for text in texts]
        return [self.encode_by_library(text) for text in texts]


class TiktokenTokenizer(LibraryTokenizer):
    """Any encoding of tiktoken, GPT-2's among them."""

    kind = "tiktoken"
    min_encoded = 2**21

    def __init__(self, encoding: Any) -> None:
        """encoding: a tiktoken.Encoding."""
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.eos_id = encoding._special_tokens.get(END_OF_TEXT)
        self.added_ids = dict(encoding._special_tokens)

    @classmethod
    def from_name(cls, name: str) -> "TiktokenTokenizer":
        """From tiktoken's own files: downloaded once, or found in TIKTOKEN_CACHE_DIR. Raises UserError."""
        import tiktoken

        names = tiktoken.list_encoding_names()
        if name not in names:
            raise UserError(f"--tokenizer={name}: tiktoken has no such encoding{did_you_mean(name, names)}")
        try:
            return cls(tiktoken.get_encoding(name))
        except Exception as error:  # requests' many kinds of network trouble
            raise UserError(
                f"tiktoken's {name} can't be downloaded ({type(error).__name__}); "
                "offline, point TIKTOKEN_CACHE_DIR to a folder that holds it"
            ) from None

    def encode_by_library(self, text: str) -> np.ndarray:
        return np.array(self.encoding.encode_ordinary(text), dtype=np.int32)

    def make_word_cache(self) -> WordCache | None:
        split = byte_level.split_of_pattern(self.encoding._pat_str)
        return None if split is None else byte_level.make_word_cache(split, self.encoding._mergeable_ranks)

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode(list(ids))

    def to_json(self) -> dict[str, Any]:
        ranks = self.encoding._mergeable_ranks
        tokens = [""] * (max(ranks.values()) + 1)  # by rank; p50k_base leaves gaps
        for token, rank in ranks.items():
            tokens[rank] = base64.b64encode(token).decode()
        return {
            "encoding": self.encoding.name,
            "pattern": self.encoding._pat_str,
            "special_tokens": self.encoding._special_tokens,
            "ranks": " ".join(tokens),
        }

    @classmethod
    def from_json(cls, spec: Mapping[str, Any]) -> "TiktokenTokenizer":
        if "ranks" not in spec:
            return cls.from_name(spec["encoding"])
        import tiktoken

        tokens = spec["ranks"].split(" ")
        encoding = tiktoken.Encoding(
            spec["encoding"],
            pat_str=spec["pattern"],
            mergeable_ranks={base64.b64decode(token): rank for rank, token in enumerate(tokens) if token},
            special_tokens=spec["special_tokens"],
        )
        return cls(encoding)


def mark_control(token: Mapping[str, Any]) -> dict[str, Any]:
    """An added token of the `tokenizers` library, special if it is spelled as a control token."""
    is_control = token["special"] or CONTROL_MARK.fullmatch(token["content"]) is not None
    return {**token, "special": is_control}


class BPETokenizer(LibraryTokenizer):
    """Any tokenizer of the `tokenizers` library: a byte-level BPE trained on the data, or a model's tokenizer.json.

    Its control tokens are those that the file marks as special, and those spelled <|...|>. Text that spells one is
    encoded as any other text.
    """

    kind = "bpe"
    min_encoded = 2**16

    def __init__(self, spec: Mapping[str, Any]) -> None:
        """spec: the JSON of the library's tokenizer."""
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise UserError("this tokenizer needs a package: pip install tokenizers") from None
        added = [mark_control(token) for token in spec.get("added_tokens") or ()]
        self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": added}))
        self.tokenizer.encode_special_tokens = True  # as text: the library's name for it; no file keeps this setting
        self.tokenizer.no_truncation()  # which files of fine-tuned models may ask for, and which would cut documents
        self.tokenizer.no_padding()
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1  # files may leave ids out
        self.eos_id = self.tokenizer.token_to_id(END_OF_TEXT)
        control = {token["content"]: token["id"] for token in added if token["special"]}
        self.added_ids = control
        unknown = {spec["model"].get("unk_token"), spec["model"].get("unk_id")}  # which text may become
        never = [(name, i) for name, i in control.items() if unknown.isdisjoint((name, i))]
        self.control_ids = np.array([i for _, i in never], dtype=np.int32)
        spellings = [(re.escape(name[0]), re.escape(name[1:])) for name, _ in never]
        self.within_spellings = re.compile("|".join(f"(?<={first})(?={rest})" for first, rest in spellings))
        first, second = np.array_split(self.encode_words("a a"), 2)
        self.marks_start = np.array_equal(first, second)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """A byte-level BPE (Sennrich et al. 2016) of vocab_size ids, the end-of-sequence token among them."""
        try:
            import tokenizers
            from tokenizers import decoders, models, pre_tokenizers, trainers
        except ModuleNotFoundError:
            raise UserError("--tokenizer=bpe: needs a package: pip install tokenizers") from None
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(json.loads(tokenizer.to_str()))

    def make_word_cache(self) -> WordCache | None:
        spec = json.loads(self.tokenizer.to_str())
        split = byte_level.split_of_spec(spec)
        ranks = None if split is None else byte_level.ranks_of_bpe(spec, self.tokenizer.model)
        if split is None or ranks is None or not set(self.control_ids.tolist()).isdisjoint(ranks.values()):
            return None
        return byte_level.make_word_cache(split, ranks)

    def encode_by_library(self, text: str) -> np.ndarray:
        ids = self.encode_words(text)
        if self.spells_control(ids):  # by a model that looks up whole words, such as Unigram: they are cut
            ids = np.concatenate([self.encode_words(part) for part in self.within_spellings.split(text)])
            if self.spells_control(ids):
                raise UserError("the text spells a control token, and this tokenizer has no other ids for it")
        return ids

    def encode_words(self, text: str) -> np.ndarray:
        # A batch of one: unlike `encode`, it keeps no offsets, and lets other threads encode meanwhile.
        encoding = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array(encoding.ids, dtype=np.int32)

    def spells_control(self, ids: np.ndarray) -> bool:
        return bool(np.isin(ids, self.control_ids).any())

    def encode_inside(self, text: str) -> Encoding:
        """Behind another text, whose ids are taken off again, and with them what this tokenizer puts before a text."""
        before = "a" if text[:1].isspace() else "\n"  # no token spans the two
        first = self.encode_words(before)
        n = len(first)
        encoding = self.with_offsets(before + text)
        if self.spells_control(encoding.ids) or encoding.ids[:n].tolist() != first.tolist():
            return super().encode_inside(text)
        return Encoding(encoding.ids[n:], encoding.offsets[n:] - 1)

    def encode_with_control(self, text: str) -> Encoding:
        self.tokenizer.encode_special_tokens = False
        try:
            return self.with_offsets(text)
        finally:
            self.tokenizer.encode_special_tokens = True

    def with_offsets(self, text: str) -> Encoding:
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        return Encoding(np.array(encoded.ids, dtype=np.int32), np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2))

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def to_json(self) -> dict[str, Any]:
        return {"tokenizer": json.loads(self.tokenizer.to_str())}

    @classmethod
    def from_json(cls, spec: Mapping[str, Any]) -> "BPETokenizer":
        return cls(spec["tokenizer"])


class SentencePieceTokenizer(Tokenizer):
    """A model of the sentencepiece library, BPE or Unigram.

    Its control tokens are the pieces of the control type. Text never becomes one, but for the unknown piece.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        """model: the content of a .model file. Raises UserError."""
        try:
            import sentencepiece
        except ModuleNotFoundError:
            raise UserError("this tokenizer needs a package: pip install sentencepiece") from None
        self.model = model
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self.pieces.vocab_size()
        names = {self.pieces.id_to_piece(i): i for i in range(self.vocab_size) if self.pieces.is_control(i)}
        self.added_ids = names
        self.control_names = {i: name for name, i in names.items()}
        self.eos_id = self.pieces.eos_id() if self.pieces.eos_id() >= 0 else None
        first, second = np.array_split(self.encode("a a"), 2)
        self.marks_start = np.array_equal(first, second)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.pieces.encode(text), dtype=np.int32)

    def encode_inside(self, text: str) -> Encoding:
        """A text behind a control token begins as any other: so do Llama 2's own chats. Raises UserError."""
        try:
            from sentencepiece import sentencepiece_pb2
        except ModuleNotFoundError:
            raise UserError("chats with this tokenizer need a package: pip install protobuf") from None
        messages: Any = sentencepiece_pb2
        encoded = messages.SentencePieceText()
        encoded.ParseFromString(self.pieces.encode(text, out_type="serialized_proto"))
        ids = np.array([piece.id for piece in encoded.pieces], dtype=np.int32)
        in_bytes = np.array([(piece.begin, piece.end) for piece in encoded.pieces], dtype=np.int64).reshape(-1, 2)
        begins_character = np.array([byte & 0xC0 != 0x80 for byte in text.encode()], dtype=np.int64)
        offsets = np.concatenate(([0], np.cumsum(begins_character)))[in_bytes]
        offsets[:, 1] = np.maximum(offsets[:, 1], offsets[:, 0] + 1)  # a character's bytes but the last have no length
        return Encoding(ids, offsets)

    def decode(self, ids: Sequence[int]) -> str:
        texts = []
        for is_control, run in itertools.groupby(map(int, ids), self.control_names.__contains__):
            if is_control:
                texts += [self.control_names[i] for i in run]
            else:
                texts.append(self.pieces.decode(list(run)))
        return "".join(texts)

    def to_json(self) -> dict[str, Any]:
        return {"model": base64.b64encode(self.model).decode()}

    @classmethod
    def from_json(cls, spec: Mapping[str, Any]) -> "SentencePieceTokenizer":
        return cls(base64.b64decode(spec["model"]))


# ---------------------------------------------------------------------------------------------------------------------
# others


class NumberTokenizer(Tokenizer):
    """Ids whose tokenizer is not known: a text is their numbers, separated by spaces."""

    kind = "numbers"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> np.ndarray:
        try:
            ids = np.array([int(number) for number in text.split()], dtype=np.int32)
        except ValueError:
            raise UserError("the dataset's tokenizer is not known; give token ids, separated by spaces") from None
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise UserError(f"a token id is outside [0, {self.vocab_size})")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{i} " for i in ids)

    def to_json(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size}

    @classmethod
    def from_json(cls, spec: Mapping[str, Any]) -> "NumberTokenizer":
        return cls(spec["vocab_size"])


class ExtendedTokenizer(Tokenizer):
    """Another tokenizer with control tokens behind its own ids: the end-of-sequence token, the roles of a chat."""

    kind = "extended"

    def __init__(self, base: Tokenizer, added: Sequence[str]) -> None:
        self.base = base
        self.added = list(added)
        own_ids = {token: base.vocab_size + i for i, token in enumerate(self.added)}
        self.vocab_size = base.vocab_size + len(self.added)
        self.added_ids = {**base.added_ids, **own_ids}
        self.eos_id = own_ids.get(END_OF_TEXT, base.eos_id)
        self.bos_id, self.chat_template, self.special_tokens = base.bos_id, base.chat_template, base.special_tokens

    @property
    def end_ids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((*super().end_ids, *self.base.end_ids)))

    def encode(self, text: str) -> np.ndarray:
        return self.base.encode(text)

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.base.encode_texts(texts)

    def encode_inside(self, text: str) -> Encoding:
        return self.base.encode_inside(text)

    def encode_continuation(self, text: str) -> np.ndarray:
        return self.base.encode_continuation(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_runs(ids, self.base.decode)

    def decode_continuation(self, ids: Sequence[int]) -> str:
        return self.decode_runs(ids, self.base.decode_continuation)

    def decode_runs(self, ids: Sequence[int], decode_first: Callable[[Sequence[int]], str]) -> str:
        """The text of ids; decode_first: of the base's ids that they begin with."""
        first_added = self.base.vocab_size
        decode = decode_first
        texts = []
        for is_added, run in itertools.groupby(ids, lambda i: i >= first_added):
            if is_added:
                texts += [self.added[i - first_added] for i in run]
            else:
                texts.append(decode(list(run)))
            decode = self.base.decode
        return "".join(texts)

    def to_json(self) -> dict[str, Any]:
        return {"base": to_json(self.base), "added": self.added}

    @classmethod
    def from_json(cls, spec: Mapping[str, Any]) -> "ExtendedTokenizer":
        return cls(from_json(spec["base"], "tokenizer"), spec["added"])


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """The tokenizer with these control tokens; those that it lacks become its last ids."""
    missing = [token for token in tokens if token not in tokenizer.added_ids]
    if not missing:
        return tokenizer
    if isinstance(tokenizer, ExtendedTokenizer):
        return ExtendedTokenizer(tokenizer.base, [*tokenizer.added, *missing])
    return ExtendedTokenizer(tokenizer, missing)


# ---------------------------------------------------------------------------------------------------------------------
# JSON

KINDS: dict[str, type[Tokenizer]] = {
    "char": CharTokenizer,
    "byte": ByteTokenizer,
    "tiktoken": TiktokenTokenizer,
    "bpe": BPETokenizer,
    "sentencepiece": SentencePieceTokenizer,
    "numbers": NumberTokenizer,
    "extended": ExtendedTokenizer,
}


def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer in full."""
    spec = {"kind": tokenizer.kind, **tokenizer.to_json()}
    if tokenizer.control is not None:
        spec["control"] = asdict(tokenizer.control)
    if tokenizer.chat_template:
        spec["chat_template"] = tokenizer.chat_template
    return spec


def from_json(spec: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer that `to_json` wrote; {"kind": "tiktoken", "encoding": name} is enough for one of tiktoken's.

    source: what the error names. Raises UserError.
    """
    try:
        tokenizer = KINDS[spec["kind"]].from_json(spec)
        if "control" in spec:
            tokenizer.adopt(control_from_json(spec["control"]))
        tokenizer.chat_template = spec.get("chat_template", tokenizer.chat_template)
        return tokenizer
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: not a tokenizer of this program ({type(error).__name__}: {error})") from None


def control_from_json(spec: Mapping[str, Any]) -> ControlTokens:
    return ControlTokens(**{**spec, "end_ids": tuple(spec["end_ids"])})


def same_tokenizer(*tokenizers: Tokenizer) -> bool:
    """Whether they give the same ids for the same document, whatever files they come from."""
    return all(gives_same_ids(tokenizers[0], other) for other in tokenizers[1:])


def gives_same_ids(first: Tokenizer, second: Tokenizer) -> bool:
    if to_json(first) == to_json(second):
        return True
    shapes = [(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) for tokenizer in (first, second)]
    if shapes[0] != shapes[1] or NumberTokenizer.kind in (first.kind, second.kind):
        return False
    tokens = first.decode(range(first.vocab_size))  # without spaces between them
    if second.decode(range(first.vocab_size)) != tokens:
        return False
    try:
        return np.array_equal(first.encode(PROBE + tokens), second.encode(PROBE + tokens))
    except UserError:  # of characters that one of them lacks
        return False


def save(path: Path, tokenizers: Mapping[str, Tokenizer]) -> None:
    """Write a run's tokenizer.json: one tokenizer for each vocabulary, by the dataset's name."""
    specs = [{"name": name, **to_json(tokenizer)} for name, tokenizer in tokenizers.items()]
    files.write_json(path, {"tokenizers": specs})


def load(path: Path) -> dict[str, Tokenizer]:
    """The tokenizers of a run's tokenizer.json, by the dataset's name. Raises UserError."""
    try:
        specs = json.loads(path.read_text(encoding="utf-8"))["tokenizers"]
        return {spec["name"]: from_json(spec, str(path)) for spec in specs}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: can't be read ({type(error).__name__}: {error})") from None
