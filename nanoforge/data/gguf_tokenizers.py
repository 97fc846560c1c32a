"""Tokenizers as llama.cpp has them: the keys and values of a .gguf file. The way back is model_tokenizers.from_gguf.

llama.cpp knows two kinds: byte-level BPE, whose merges have ranks, and SentencePiece's BPE, whose tokens have scores.
It has no splits of a text but its own, so a tokenizer is written under the name of the split that cuts as it does.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from nanoforge.data import model_tokenizers, tokenizer_export
from nanoforge.data.tokenization import ExtendedTokenizer, SentencePieceTokenizer, Tokenizer
from nanoforge.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
NO_MERGE = "▁ ▁"  # of no bytes; a list in a file may not be empty
NO_SCORE = -1000.0  # of tokens that no merge makes
# Each of llama.cpp's splits cuts this in another way.
PROBE = (
    "Hello world, it's 'S I'LL don't 12345678 a1b22\n\n\n  x\t\t y\r\n  naïve café e\u0301 日本語テスト русский العربية"
    " HTMLParser camelCase XMLHttp   !!! ... a.b/c\n//x ``$+<=>^~|`` (a)[b]{c} ² ½ 👩\u200d🚀 \u00a0z ǅ  \n \n "
    "end  "
)


class Vocabulary(NamedTuple):
    """The tokens of a model by their ids, and what llama.cpp makes them of."""

    keys: dict[str, Any]  # without tokenizer.ggml. before them
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None

    def fill(self, size: int) -> "Vocabulary":
        """With unused tokens up to a size, for the rows that a model has beyond its tokenizer."""
        more = range(len(self.tokens), size)
        scores = None if self.scores is None else self.scores + [NO_SCORE] * len(more)
        tokens = self.tokens + [f"[PAD{i}]" for i in more]
        return Vocabulary(self.keys, tokens, self.types + [UNUSED] * len(more), scores)


def to_gguf(tokenizer: Tokenizer, size: int, chat_template: str) -> dict[str, Any]:
    """The keys and values of a tokenizer, with tokens for `size` rows of a model.

    Raises UserError for a tokenizer that llama.cpp has no form for.
    """
    vocabulary = vocabulary_of(tokenizer).fill(size)
    keys = {
        **vocabulary.keys,
        "tokens": vocabulary.tokens,
        "token_type": vocabulary.types,
        **({} if vocabulary.scores is None else {"scores": vocabulary.scores}),
        **control_keys(tokenizer),
    }
    metadata = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    return {**metadata, **({"tokenizer.chat_template": chat_template} if chat_template else {})}


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Raises UserError."""
    if isinstance(tokenizer, ExtendedTokenizer):
        base = vocabulary_of(tokenizer.base).fill(tokenizer.base.vocab_size)
        n_added = len(tokenizer.added)
        scores = None if base.scores is None else base.scores + [NO_SCORE] * n_added
        return Vocabulary(base.keys, base.tokens + tokenizer.added, base.types + [CONTROL] * n_added, scores)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return sentencepiece_vocabulary(tokenizer)
    spec = tokenizer_export.to_spec(tokenizer) if tokenizer.kind in ("bpe", "tiktoken", "byte") else {"model": {}}
    if spec["model"].get("type") != "BPE":
        kind = spec["model"].get("type", tokenizer.kind)
        raise UserError(f"llama.cpp has no tokenizer of the kind {kind}, only BPE; export.py hf takes it")
    return fallback_vocabulary(spec) if spec["model"].get("byte_fallback") else byte_level_vocabulary(spec)


# ---------------------------------------------------------------------------------------------------------------------
# byte-level BPE


def byte_level_vocabulary(spec: Mapping[str, Any]) -> Vocabulary:
    """Raises UserError for a split of texts that llama.cpp lacks."""
    merges = [" ".join(pair) for pair in merges_of(spec)]
    pre = split_name(spec) if merges else "gpt-2"  # without merges, any split gives bytes
    return Vocabulary({"model": "gpt2", "pre": pre, "merges": merges or [NO_MERGE]}, *typed_tokens(spec))


def merges_of(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs; older files have them as one text."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"]["merges"])
    return [(first, second) for first, second in pairs]


def typed_tokens(spec: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """The tokens of a spec by their ids, and their types; ids that the spec leaves out are unused."""
    added = {token["id"]: token for token in spec["added_tokens"]}
    known = {i: token for token, i in spec["model"]["vocab"].items()}
    known |= {i: token["content"] for i, token in added.items()}
    kinds = {i: CONTROL if token["special"] else USER_DEFINED for i, token in added.items()}
    ids = range(max(known) + 1)
    tokens = [known.get(i, f"[PAD{i}]") for i in ids]
    return tokens, [kinds.get(i, NORMAL if i in known else UNUSED) for i in ids]


def split_name(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level BPE splits a text. Raises UserError if it has none."""
    if spec["normalizer"] is not None and spec["normalizer"] != {"type": "NFC"}:  # which llama.cpp leaves out
        raise UserError(f"llama.cpp has no normalizer {spec['normalizer']['type']} of a tokenizer")
    pieces = split_probe(spec)
    known: dict[str, bool] = {}
    for name, splits in model_tokenizers.GGUF_SPLITS.items():
        key = str(splits)
        if key not in known:
            known[key] = split_probe(model_tokenizers.byte_level_spec({}, [], splits)) == pieces
        if known[key] and merges_alike(spec, name):
            return name
    raise UserError(
        "llama.cpp splits a text in none of the ways of this tokenizer; known are those of "
        f"{', '.join(model_tokenizers.GGUF_SPLITS)}"
    )


def split_probe(spec: Mapping[str, Any]) -> list[tuple[str, tuple[int, int]]]:
    empty = {**spec, "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}, "post_processor": None}
    library = tokenizer_export.load_spec({**empty, "normalizer": None})
    return library.pre_tokenizer.pre_tokenize_str(PROBE) if library.pre_tokenizer is not None else []


def merges_alike(spec: Mapping[str, Any], name: str) -> bool:
    """Whether words that are tokens come out the same: looked up whole, or by their merges."""
    looks_up = bool(spec["model"].get("ignore_merges"))
    if looks_up == (name in model_tokenizers.GGUF_WHOLE_WORDS):
        return True
    added = {token["content"] for token in spec["added_tokens"]}
    merged = {"".join(pair) for pair in merges_of(spec)}
    return all(len(token) == 1 or token in merged or token in added for token in spec["model"]["vocab"])


# ---------------------------------------------------------------------------------------------------------------------
# SentencePiece


def sentencepiece_vocabulary(tokenizer: SentencePieceTokenizer) -> Vocabulary:
    """Raises UserError for another model than a BPE, and for a normalizer."""
    model = model_tokenizers.sentencepiece_proto().ModelProto()
    model.ParseFromString(tokenizer.model)
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise UserError("llama.cpp has no Unigram tokenizer of SentencePiece, only its BPE; export.py hf takes it")
    if model.normalizer_spec.precompiled_charsmap:
        raise UserError(
            f"llama.cpp has no normalizer {model.normalizer_spec.name} of SentencePiece; export.py hf takes it"
        )
    keys = {
        "model": "llama",
        "pre": "default",
        "add_space_prefix": model.normalizer_spec.add_dummy_prefix,
        "remove_extra_whitespaces": model.normalizer_spec.remove_extra_whitespaces,
    }
    pieces = model.pieces
    tokens, types = [piece.piece for piece in pieces], [piece.type for piece in pieces]
    return Vocabulary(keys, tokens, types, [piece.score for piece in pieces])


def fallback_vocabulary(spec: dict[str, Any]) -> Vocabulary:
    """A BPE of the `tokenizers` library that came from SentencePiece: merges become scores of what they make.

    Raises UserError if they say more than scores can.
    """
    scores: dict[str, float] = {}
    last = ""
    for i, pair in enumerate(merges_of(spec)):
        merged = "".join(pair)
        if merged in scores and merged != last:
            raise UserError(f"llama.cpp can't merge {' and '.join(pair)} later than others into the same token")
        scores.setdefault(merged, -float(i))
        last = merged
    tokens, types = typed_tokens(spec)
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = BYTE
        elif token == spec["model"].get("unk_token"):
            types[i] = UNKNOWN
    first = tokenizer_export.load_spec(spec).encode("a", add_special_tokens=False).tokens[0]
    keys = {"model": "llama", "pre": "default", "add_space_prefix": first.startswith("▁")}
    return Vocabulary(keys, tokens, types, [scores.get(token, NO_SCORE) for token in tokens])


# ---------------------------------------------------------------------------------------------------------------------
# control tokens


def control_keys(tokenizer: Tokenizer) -> dict[str, Any]:
    """Which ids begin, end and pad a text."""
    known = tokenizer.control_tokens
    named = {name: known.get(text) for name, text in tokenizer.special_tokens.items()}
    bos_id = named.get("bos_token") if tokenizer.bos_id is None else tokenizer.bos_id
    known_ends = {known.get(name) for name in model_tokenizers.END_NAMES}
    others = [i for i in tokenizer.end_ids if i != tokenizer.eos_id and i not in known_ends]
    if len(others) > 2:
        raise UserError(f"llama.cpp has no place for the end tokens {others[2:]}")
    ids = {
        "eos": tokenizer.eos_id,
        "bos": tokenizer.eos_id if bos_id is None else bos_id,  # as GPT-2; else llama.cpp takes one of its own
        "eot": others[0] if others else None,
        "eom": others[1] if len(others) > 1 else None,
        "unknown": named.get("unk_token"),
        "padding": named.get("pad_token"),
    }
    keys = {f"{name}_token_id": cast(Any, i) for name, i in ids.items() if i is not None}
    return {**keys, "add_bos_token": tokenizer.bos_id is not None}
