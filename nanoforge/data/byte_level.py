"""What byte-level BPEs have in common, whatever file they come from: bytes as characters, the split, and ranks."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nanoforge.data.word_cache import NO_TOKEN, WORD_SEPARATOR, Split, WordCache

# GPT-2's split of a text, as it was published, and as versions of tiktoken write it.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_PATTERNS = (
    GPT2_SPLIT,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
)
# The library's pre-tokenizer that spells bytes as characters, and does nothing else.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def byte_chars() -> list[str]:
    """How GPT-2's files spell each byte: as its Latin-1 character if that is visible, or else as one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    points = {byte: byte for byte in visible} | {byte: 256 + n for n, byte in enumerate(others)}
    return [chr(points[byte]) for byte in range(256)]


# ---------------------------------------------------------------------------------------------------------------------
# split


def split_of_pattern(pattern: str) -> Split | None:
    """The split of a tiktoken pattern; None if it is not GPT-2's."""
    return Split() if pattern in GPT2_PATTERNS else None


def split_of_spec(spec: Mapping[str, Any]) -> Split | None:
    """The split of a tokenizer of the `tokenizers` library, by its JSON; None if it is not GPT-2's, or text changes."""
    finds_tokens = any(not token["special"] for token in spec.get("added_tokens") or ())  # in a text, before its split
    pre_tokenizer = spec.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if finds_tokens or spec.get("normalizer") is not None or steps[-1].get("type") != "ByteLevel":
        return None
    patterns = [step["pattern"].get("Regex") if is_plain_split(step) else step.get("type") for step in steps[:-1]]
    if steps[-1].get("use_regex", True):
        patterns.append(GPT2_SPLIT)
    if steps[-1].get("add_prefix_space", True) or not patterns or patterns[-1] not in GPT2_PATTERNS:
        return None
    before = patterns[:-1]
    single_digits = before == [r"\p{N}"] or (before == ["Digits"] and steps[0]["individual_digits"])
    return Split(single_digits=single_digits) if single_digits or not before else None


def is_plain_split(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]


# ---------------------------------------------------------------------------------------------------------------------
# ranks


def ranks_of_bpe(spec: Mapping[str, Any], model: Any) -> dict[bytes, int] | None:
    """The ranks with which tiktoken merges as a BPE of the `tokenizers` library; None if no ranks do.

    spec, model: the JSON of the library's tokenizer, and its model.

    The library merges the pairs in its list, in that order; tiktoken any two tokens that are a token together, the one
    of the lowest rank first. These are the same if (1) the list makes tokens in the order of their ids, and (2) the
    bytes of each token merge into that token. For the first merge of tiktoken's that is not in the list would join x
    and y into a token whose own bytes come to x and y as well, and could then not become the token.
    """
    settings = spec["model"]
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if settings.get("type") != "BPE" or any(settings.get(name) for name in (*options, "ignore_merges")):
        return None
    vocab: dict[str, int] = settings["vocab"]
    chars = byte_chars()
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in settings["merges"])
    merged = list(dict.fromkeys("".join(pair) for pair in pairs))
    ids = [vocab[token] for token in merged]
    if ids != sorted(ids) or any([piece.id for piece in model.tokenize(token)] != [vocab[token]] for token in merged):
        return None
    byte_of = {char: byte for byte, char in enumerate(chars)}
    tokens = [*(char for char in chars if char in vocab), *merged]
    return {bytes(map(byte_of.__getitem__, token)): vocab[token] for token in tokens}


def make_word_cache(split: Split, ranks: Mapping[bytes, int]) -> WordCache:
    """The cache of a tokenizer with this split and these ranks, in which tiktoken merges new words."""
    import tiktoken

    pattern = f"[^{WORD_SEPARATOR}]+|{WORD_SEPARATOR}"
    all_bytes = {bytes([byte]): NO_TOKEN + byte for byte in range(256)}
    encoding = tiktoken.Encoding("words", pat_str=pattern, mergeable_ranks={**all_bytes, **ranks}, special_tokens={})
    return WordCache(split, ranks, lambda text: np.array(encoding.encode_ordinary(text), dtype=np.int32))
