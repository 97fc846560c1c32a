"""Tokenizers of other programs' models, as their files lie beside the weights. Knows nothing of the models.

    load_folder(Path("SmolLM2-135M-Instruct"))     # tokenizer.json, or one of the other FILES

What the files say of control tokens comes along: which ids begin and end a sequence, and the chat template. Files win
over each other as in transformers: chat_template.jinja over tokenizer_config.json, that one's added_tokens_decoder over
special_tokens_map.json, generation_config.json over config.json.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge import files
from nanoforge.data.tokenization import END_OF_TEXT, BPETokenizer, ControlTokens, Tokenizer
from nanoforge.errors import UserError

SETTINGS_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
    "chat_template.jinja",
)


def load_folder(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model's folder; None where it has no file of one. Raises UserError."""
    settings = Settings.read(folder)
    for name, read in FILES.items():
        path = folder / name
        if path.is_file():
            return load_file(path, settings, read)
    return None


def load_file(path: Path, settings: "Settings", read: "Reader") -> Tokenizer:
    """A tokenizer from its file, with the settings beside it. Raises UserError, also for a broken file."""
    try:
        return read(path, settings)
    except UserError:
        raise
    except Exception as error:  # the libraries raise nearly anything for a broken file
        raise UserError(f"{path}: not a tokenizer that can be read ({type(error).__name__}: {error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# settings


class Settings(NamedTuple):
    """What a folder says of its tokenizer beside the tokenizer's own file."""

    tokenizer: Mapping[str, Any]  # tokenizer_config.json
    special_tokens: Mapping[str, str]  # {"eos_token": "</s>"}
    further_tokens: tuple[str, ...]  # control tokens without a name
    end_ids: tuple[int, ...]
    chat_template: str

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """Raises UserError."""
        tokenizer = read_json(folder / "tokenizer_config.json")
        named = dict(tokenizer)
        if "added_tokens_decoder" not in tokenizer:
            named |= read_json(folder / "special_tokens_map.json")
        ends = read_json(folder / "generation_config.json").get("eos_token_id")
        if ends is None:
            ends = read_json(folder / "config.json").get("eos_token_id")
        return cls(
            tokenizer=tokenizer,
            special_tokens=named_tokens(named),
            further_tokens=further_tokens(named),
            end_ids=as_ids(ends),
            chat_template=read_chat_template(folder, tokenizer),
        )


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file, empty where there is none. Raises UserError."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(files.read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def as_ids(value: Any) -> tuple[int, ...]:
    """The ids of an `eos_token_id`: none, one or a list."""
    values = value if isinstance(value, list) else [value]
    return tuple(i for i in values if isinstance(i, int))


def token_text(token: Any) -> str | None:
    """The text of a token, which is a string or an object that holds it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The control tokens that have names, such as eos_token."""
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    texts = {name: token_text(token) for name, token in named.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text is not None}


def further_tokens(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The control tokens that have no names."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    texts = map(token_text, extra if isinstance(extra, list) else ())
    return tuple(text for text in texts if text is not None)


def read_chat_template(folder: Path, tokenizer: Mapping[str, Any]) -> str:
    """The chat template, of several the default one; empty where there is none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = tokenizer.get("chat_template") or ""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default", "")
    return template


def with_settings(tokenizer: Tokenizer, settings: Settings, bos_id: int | None) -> Tokenizer:
    """The tokenizer with what the settings say of its control tokens."""
    known = tokenizer.added_ids
    ends = tuple(i for i in settings.end_ids if i < tokenizer.vocab_size)
    eos_id = known.get(settings.special_tokens.get("eos_token", ""))
    if eos_id is None:
        eos_id = ends[0] if ends else known.get(END_OF_TEXT)
    own = () if eos_id is None else (eos_id,)
    control = ControlTokens(
        eos_id=eos_id,
        bos_id=bos_id,
        end_ids=tuple(dict.fromkeys((*own, *ends))),
        added_ids=known,
        special_tokens=settings.special_tokens,
    )
    tokenizer.adopt(control)
    tokenizer.chat_template = settings.chat_template
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face

ADDED_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def read_library(path: Path, settings: Settings) -> Tokenizer:
    """A file of the `tokenizers` library."""
    spec = read_json(path)
    return build_library(spec, settings)


def build_library(spec: Mapping[str, Any], settings: Settings) -> Tokenizer:
    tokenizer = BPETokenizer(with_added_tokens(spec, settings))
    return with_settings(tokenizer, settings, begins_with(tokenizer))


def with_added_tokens(spec: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The spec with the control tokens that only the settings name. They get the next ids, as in transformers."""
    added = {token["content"]: token for token in spec.get("added_tokens") or ()}
    decoder = settings.tokenizer.get("added_tokens_decoder") or {}
    for i, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        added[token["content"]] = {**ADDED_TOKEN, **token, "id": int(i)}
    vocabulary = spec["model"]["vocab"]
    words = vocabulary if isinstance(vocabulary, dict) else {piece[0]: i for i, piece in enumerate(vocabulary)}
    next_id = 1 + max([*words.values(), *(token["id"] for token in added.values())])
    for text in [*settings.special_tokens.values(), *settings.further_tokens]:
        if text in added:
            continue
        i = words.get(text, next_id)
        next_id += i == next_id
        added[text] = {**ADDED_TOKEN, "special": True, "id": i, "content": text}
    return {**spec, "added_tokens": sorted(added.values(), key=lambda token: token["id"])}


def begins_with(tokenizer: BPETokenizer) -> int | None:
    """The token that the library's post-processor puts before a text."""
    plain = tokenizer.tokenizer.encode("a", add_special_tokens=False).ids
    processed = tokenizer.tokenizer.encode("a", add_special_tokens=True).ids
    return processed[0] if processed[1 : 1 + len(plain)] == plain else None


Reader = Callable[[Path, Settings], Tokenizer]
FILES: dict[str, Reader] = {
    "tokenizer.json": read_library,
}
