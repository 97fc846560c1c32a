"""Tokenizers in the files of Hugging Face: tokenizer.json and tokenizer_config.json, which AutoTokenizer loads.

Each kind of tokenizer.py becomes a JSON of the `tokenizers` library with the same ids for the same text. There, unlike
here, text that spells a control token becomes that token, unless a caller passes split_special_tokens=True.

    write_tokenizer(Path("hf"), tokenizer, block_size=256, roles={"user": "<|user|>", ...})
"""

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from nanoforge import files
from nanoforge.data.byte_level import BYTE_LEVEL, byte_chars
from nanoforge.data.model_tokenizers import ADDED_TOKEN, CONTROL_PIECE, USER_PIECE, sentencepiece_proto
from nanoforge.data.tokenization import (
    BPETokenizer,
    CharTokenizer,
    ExtendedTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from nanoforge.errors import UserError

TOKENIZER_CLASS = "PreTrainedTokenizerFast"  # of transformers: any tokenizer.json
Spec = dict[str, Any]  # the JSON of a tokenizer of the library


# ---------------------------------------------------------------------------------------------------------------------
# kinds


def library_spec(model: Spec, pre_tokenizer: Spec | None, decoder: Spec) -> Spec:
    """The library's JSON of a tokenizer without control tokens."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def split_at(pattern: str) -> Spec:
    """A pre-tokenizer that makes each match of a regular expression a piece."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def char_spec(tokenizer: Tokenizer) -> Spec:
    """An unknown character raises an error there too, as no unknown token stands for it."""
    chars = cast(CharTokenizer, tokenizer).chars
    model = {"type": "WordLevel", "vocab": {char: i for i, char in enumerate(chars)}, "unk_token": "<unk>"}
    return with_control(library_spec(model, split_at(r"[\s\S]"), {"type": "Fuse"}), tokenizer.control_tokens)


def byte_spec(tokenizer: Tokenizer) -> Spec:
    vocab = {char: i for i, char in enumerate(byte_chars())}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    return with_control(library_spec(model, BYTE_LEVEL, BYTE_LEVEL), tokenizer.control_tokens)


def tiktoken_spec(tokenizer: Tokenizer) -> Spec:
    encoding = cast(TiktokenTokenizer, tokenizer).encoding
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    chars = byte_chars()

    def spell(token: bytes) -> str:
        return "".join(chars[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = merge_bytes(token, ranks, below=rank)
        if len(parts) == 2:
            merges.append([spell(part) for part in parts])
    vocab = {spell(token): rank for token, rank in ranks.items()}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True}
    splits = {"type": "Sequence", "pretokenizers": [split_at(library_pattern(encoding._pat_str)), BYTE_LEVEL]}
    return with_control(library_spec(model, splits, BYTE_LEVEL), tokenizer.control_tokens)


def bpe_spec(tokenizer: Tokenizer) -> Spec:
    return json.loads(cast(BPETokenizer, tokenizer).tokenizer.to_str())


def extended_spec(tokenizer: Tokenizer) -> Spec:
    extended = cast(ExtendedTokenizer, tokenizer)
    first = extended.base.vocab_size
    added = {name: first + i for i, name in enumerate(extended.added)}
    return with_control(to_spec(extended.base), added)


# ---------------------------------------------------------------------------------------------------------------------
# SentencePiece

SPACE = "\u2581"  # how it writes a space
NORMAL_PIECE, UNKNOWN_PIECE = 1, 2
UNIGRAM = 1  # model_type; the other one is BPE


def sentencepiece_spec(tokenizer: Tokenizer) -> Spec:
    proto = sentencepiece_proto().ModelProto()
    proto.ParseFromString(cast(SentencePieceTokenizer, tokenizer).model)
    spec = library_spec(
        unigram_model(proto) if proto.trainer_spec.model_type == UNIGRAM else bpe_model(proto),
        pre_tokenizer=None,
        decoder=sentencepiece_decoder(adds_space=proto.normalizer_spec.add_dummy_prefix),
    )
    spec["normalizer"] = {"type": "Sequence", "normalizers": sentencepiece_normalizers(proto.normalizer_spec)}
    spec["added_tokens"] = [
        {**ADDED_TOKEN, "id": i, "content": piece.piece, "special": piece.type != USER_PIECE}
        for i, piece in enumerate(proto.pieces)
        if piece.type in (UNKNOWN_PIECE, CONTROL_PIECE, USER_PIECE)
    ]
    return spec


def unigram_model(proto: Any) -> Spec:
    unknown = [i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN_PIECE]
    return {
        "type": "Unigram",
        "unk_id": unknown[0] if unknown else None,
        "vocab": [[piece.piece, piece.score] for piece in proto.pieces],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def bpe_model(proto: Any) -> Spec:
    """SentencePiece joins the pair whose piece has the highest score. The library has an order of pairs instead."""
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = []
    for piece in sorted(proto.pieces, key=lambda piece: -piece.score):
        if piece.type == NORMAL_PIECE:
            text = piece.piece
            pairs = [[text[:i], text[i:]] for i in range(1, len(text)) if text[:i] in ids and text[i:] in ids]
            merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    unknown = [piece.piece for piece in proto.pieces if piece.type == UNKNOWN_PIECE]
    return {
        "type": "BPE",
        "unk_token": unknown[0] if unknown else None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "vocab": ids,
        "merges": merges,
    }


def sentencepiece_normalizers(settings: Any) -> list[Spec]:
    normalizers: list[Spec] = []
    if settings.precompiled_charsmap:
        charsmap = base64.b64encode(settings.precompiled_charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if settings.remove_extra_whitespaces:
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if settings.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    return [*normalizers, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def sentencepiece_decoder(*, adds_space: bool) -> Spec:
    decoders: list[Spec] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if adds_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": decoders}


# ---------------------------------------------------------------------------------------------------------------------
# all kinds

SPECS: dict[str, Callable[[Tokenizer], Spec]] = {
    "char": char_spec,
    "byte": byte_spec,
    "tiktoken": tiktoken_spec,
    "bpe": bpe_spec,
    "sentencepiece": sentencepiece_spec,
    "extended": extended_spec,
}


def to_spec(tokenizer: Tokenizer) -> Spec:
    """The library's JSON of a tokenizer. Raises UserError for a kind that the library lacks."""
    if tokenizer.kind not in SPECS:
        raise UserError(f"a tokenizer of the kind {tokenizer.kind} can't be written as a tokenizer.json")
    return SPECS[tokenizer.kind](tokenizer)


def merge_bytes(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """The parts of a token before its own merge: the lowest pair first, of those below a rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pairs = [ranks.get(parts[i] + parts[i + 1], below) for i in range(len(parts) - 1)]
        lowest = min(pairs, default=below)
        if lowest >= below:
            return parts
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


POSSESSIVE = re.compile(r"([?*+]|\{\d+(?:,\d*)?\})\+")


def library_pattern(pattern: str) -> str:
    """A tiktoken pattern in the library's kind of regular expressions.

    There `$` is the end of a line, and `++` a repetition repeated. Greedy quantifiers stand for tiktoken's possessive
    ones: in its patterns, what follows one never matches what it has taken.
    """
    return POSSESSIVE.sub(r"\1", pattern).replace("$", r"\z")


def with_control(spec: Spec, control_tokens: Mapping[str, int]) -> Spec:
    """The spec with further control tokens. They stand in the vocabulary too, which fixes their ids."""
    names = {token["content"] for token in spec["added_tokens"]}
    new = [
        {**ADDED_TOKEN, "id": i, "content": name, "special": True}
        for name, i in control_tokens.items()
        if name not in names
    ]
    added = sorted([*spec["added_tokens"], *new], key=lambda token: token["id"])
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model = {**model, "vocab": {**model["vocab"], **{token["content"]: token["id"] for token in new}}}
    return {**spec, "added_tokens": added, "model": model}


# ---------------------------------------------------------------------------------------------------------------------
# the files


def name_of(tokenizer: Tokenizer, token_id: int | None) -> str | None:
    """The name of a control token."""
    names = {i: name for name, i in tokenizer.control_tokens.items()}
    return None if token_id is None else names.get(token_id)


def named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """eos_token, bos_token, ...: padding is the end token where there is no other."""
    own = {"eos_token": name_of(tokenizer, tokenizer.eos_id), "bos_token": name_of(tokenizer, tokenizer.bos_id)}
    named = {**tokenizer.special_tokens, **{name: text for name, text in own.items() if text is not None}}
    if "eos_token" in named:
        named.setdefault("pad_token", named["eos_token"])
    return named


def with_bos(spec: Spec, tokenizer: Tokenizer) -> Spec:
    """The spec with a post-processor that begins a text as the tokenizer's model expects, if it has none yet."""
    name = name_of(tokenizer, tokenizer.bos_id)
    if name is None or begins_with(spec, cast(int, tokenizer.bos_id)):
        return spec
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": sequence, "type_id": 0}} for sequence in ("A", "B"))
    processor = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}},
    }
    return {**spec, "post_processor": processor}


def begins_with(spec: Spec, token_id: int) -> bool:
    """Whether the library puts a token before a text."""
    ids = load_spec(spec).encode("").ids
    return ids[:1] == [token_id]


def load_spec(spec: Mapping[str, Any]) -> Any:
    """The library's tokenizer. Raises UserError."""
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise UserError("export.py hf: needs a package: pip install tokenizers") from None
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


SAMPLES = (
    "The quick brown fox's 12,345 jumps over THE lazy dogs; isn't it?",
    "def f(x):\n    return x  # tabs\tand  spaces \n\n\n",
    "Z\u00fcrich na\u00efve \u041f\u0440\u0438\u0432\u0435\u0442 \u5317\u4eac \U0001f642 \ufb01 e\u0301",
)


def check_ids(tokenizer: Tokenizer, library: Any) -> None:
    """Raises UserError when the library gives other ids for a text."""
    for sample in SAMPLES:
        try:
            ids = tokenizer.encode(sample).tolist()
        except UserError:  # a tokenizer of few characters
            continue
        if library.encode(sample, add_special_tokens=False).ids != ids:
            raise UserError(f"tokenizer.json: the tokenizers library would split {sample!r} in another way")


def role_template(roles: Mapping[str, str]) -> str:
    """The jinja template of this program's own chats: each message is its role's token, its text and the end token."""
    known = json.dumps(roles)
    return (
        f"{{%- set roles = {known} -%}}\n"
        "{%- for message in messages -%}\n"
        "{%- if message.role not in roles -%}\n"
        "{{- raise_exception('the roles are ' ~ roles | join(', ')) -}}\n"
        "{%- endif -%}\n"
        "{{- roles[message.role] -}}\n"
        "{%- if message.role == 'assistant' -%}\n"
        "{%- generation -%}{{- message.content ~ eos_token -}}{%- endgeneration -%}\n"
        "{%- else -%}\n"
        "{{- message.content ~ eos_token -}}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}{{- roles.assistant -}}{%- endif -%}\n"
    )


def chat_template_of(tokenizer: Tokenizer, roles: Mapping[str, str]) -> str:
    """The tokenizer's own template, or that of this program's chats if the tokenizer has its roles; or empty."""
    has_roles = all(token in tokenizer.added_ids for token in roles.values())
    return tokenizer.chat_template or (role_template(roles) if has_roles else "")


def write_tokenizer(to: Path, tokenizer: Tokenizer, block_size: int, roles: Mapping[str, str]) -> Sequence[str]:
    """Write the files of a tokenizer into a folder; their names. roles: role -> its token in a chat.

    Raises UserError.
    """
    spec = with_bos(to_spec(tokenizer), tokenizer)
    library = load_spec(spec)
    check_ids(tokenizer, library)
    misplaced = [name for name, i in tokenizer.control_tokens.items() if library.token_to_id(name) != i]
    if misplaced:
        raise UserError(f"tokenizer.json: {misplaced[0]} would have the id {library.token_to_id(misplaced[0])}")
    config = {
        "tokenizer_class": TOKENIZER_CLASS,
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **named_tokens(tokenizer),
    }
    files.write_text(to / "tokenizer.json", library.to_str(pretty=True))
    files.write_json(to / "tokenizer_config.json", config)
    template = chat_template_of(tokenizer, roles)
    if template:
        files.write_text(to / "chat_template.jinja", template)
    return ["tokenizer.json", "tokenizer_config.json", *(["chat_template.jinja"] if template else [])]
