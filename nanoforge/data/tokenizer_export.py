"""Tokenizers in the files of Hugging Face: tokenizer.json and tokenizer_config.json, which AutoTokenizer loads.

Each kind of tokenizer.py becomes a JSON of the `tokenizers` library with the same ids for the same text. There, unlike
here, text that spells a control token becomes that token, unless a caller passes split_special_tokens=True.

    write_tokenizer(Path("hf"), tokenizer, block_size=256, roles={"user": "<|user|>", ...})
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from nanoforge import files
from nanoforge.data.tokenization import (
    BPETokenizer,
    CharTokenizer,
    ExtendedTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from nanoforge.errors import UserError

Spec = dict[str, Any]  # the JSON of a tokenizer of the library


# ---------------------------------------------------------------------------------------------------------------------
# kinds


def library_spec(model: Spec, pre_tokenizer: Spec, decoder: Spec) -> Spec:
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


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


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
    splits = {"type": "Sequence", "pretokenizers": [split_at(greedy(encoding._pat_str)), BYTE_LEVEL]}
    return with_control(library_spec(model, splits, BYTE_LEVEL), tokenizer.control_tokens)


def bpe_spec(tokenizer: Tokenizer) -> Spec:
    return json.loads(cast(BPETokenizer, tokenizer).tokenizer.to_str())


def extended_spec(tokenizer: Tokenizer) -> Spec:
    extended = cast(ExtendedTokenizer, tokenizer)
    first = extended.base.vocab_size
    added = {name: first + i for i, name in enumerate(extended.added)}
    return with_control(to_spec(extended.base), added)


SPECS: dict[str, Callable[[Tokenizer], Spec]] = {
    "char": char_spec,
    "byte": byte_spec,
    "tiktoken": tiktoken_spec,
    "bpe": bpe_spec,
    "extended": extended_spec,
}


def to_spec(tokenizer: Tokenizer) -> Spec:
    """The library's JSON of a tokenizer. Raises UserError for a kind that the library lacks."""
    if tokenizer.kind not in SPECS:
        raise UserError(f"a tokenizer of the kind {tokenizer.kind} can't be written as a tokenizer.json")
    return SPECS[tokenizer.kind](tokenizer)


def byte_chars() -> list[str]:
    """How GPT-2's files spell each byte: as its Latin-1 character if that is visible, or else as one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    points = {byte: byte for byte in visible} | {byte: 256 + n for n, byte in enumerate(others)}
    return [chr(points[byte]) for byte in range(256)]


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


def greedy(pattern: str) -> str:
    """A tiktoken pattern without possessive quantifiers, which the library reads as repeated ones. In these patterns no
    match depends on them: what follows a quantifier never matches what it has taken."""
    for quantifier in ("?", "+", "*", "}"):
        pattern = pattern.replace(f"{quantifier}+", quantifier)
    return pattern


def with_control(spec: Spec, control_tokens: Mapping[str, int]) -> Spec:
    """The spec with further control tokens. They stand in the vocabulary too, which fixes their ids."""
    names = {token["content"] for token in spec["added_tokens"]}
    new = [
        {
            "id": i,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
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


def load_spec(spec: Spec) -> Any:
    """The library's tokenizer. Raises UserError."""
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise UserError("export.py hf: needs a package: pip install tokenizers") from None
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


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
    misplaced = [name for name, i in tokenizer.control_tokens.items() if library.token_to_id(name) != i]
    if misplaced:
        raise UserError(f"tokenizer.json: {misplaced[0]} would have the id {library.token_to_id(misplaced[0])}")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
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
