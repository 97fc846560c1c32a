"""Tokenizers of other programs' models, as their files lie beside the weights. Knows nothing of the models.

    load("HuggingFaceTB/SmolLM2-135M-Instruct")    # of the hub, of a folder, of a file
    load_folder(Path("SmolLM2-135M-Instruct"))     # tokenizer.json, or one of the other FILES
    from_gguf(metadata)                            # of a .gguf file

What the files say of control tokens comes along: which ids begin and end a sequence, and the chat template. Files win
over each other as in transformers: chat_template.jinja over tokenizer_config.json, that one's added_tokens_decoder over
special_tokens_map.json, generation_config.json over config.json.
"""

import base64
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge import files
from nanoforge.data import hub, tokenization
from nanoforge.data.byte_level import GPT2_SPLIT
from nanoforge.data.gguf_metadata import read_metadata
from nanoforge.data.tokenization import (
    CONTROL_MARK,
    END_OF_TEXT,
    BPETokenizer,
    ControlTokens,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    add_tokens,
)
from nanoforge.errors import UserError


def load(source: str) -> Tokenizer:
    """The tokenizer of a model's or run's folder, of a .gguf or tokenizer file, or of org/name[@revision] on the hub.

    Raises UserError.
    """
    error = hub.source_error(source)
    if error:
        raise UserError(f"{source}: {error}")
    path = hub.fetch(source, hub.MODEL_FILES) if hub.is_hub_name(source) else Path(source)
    if path.is_file():
        return load_file(path)
    tokenizer = load_folder(path)
    if tokenizer is None:
        raise UserError(f"{source}: holds no tokenizer; one of {', '.join(FILES)} is needed")
    return tokenizer


def load_folder(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model's folder; None where it has no file of one. Raises UserError."""
    for pattern in FILES:
        for path in sorted(folder.glob(pattern)):
            return load_file(path)
    return None


def load_file(path: Path) -> Tokenizer:
    """The tokenizer of a file, with the settings beside it. Raises UserError, also for a broken file."""
    patterns = {**FILES, "*.gguf": read_gguf, "*.json": read_library}
    readers = [read for pattern, read in patterns.items() if path.match(pattern)]
    if not readers:
        raise UserError(f"{path}: not known as a tokenizer; known are {', '.join(patterns)}")
    try:
        return readers[0](path, Settings.read(path.parent))
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
    """A file of the `tokenizers` library, or of a run of this program with one vocabulary."""
    spec = read_json(path)
    if "tokenizers" not in spec:
        return build_library(spec, settings)
    of_run = list(tokenization.load(path).values())
    if len(of_run) > 1:
        raise UserError(f"{path}: holds the tokenizers of {len(of_run)} vocabularies; a dataset needs one")
    return of_run[0]


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
            is_named = text in settings.special_tokens.values()
            added[text] = {**added[text], "special": added[text]["special"] or is_named}
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


GPT2_CLASSES = ("GPT2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer", "PreTrainedTokenizer", "TokenizersBackend")


def read_gpt2(path: Path, settings: Settings) -> Tokenizer:
    """GPT-2's merges.txt and vocab.json, with GPT-2's split of a text."""
    vocabulary = read_json(path.with_name("vocab.json"))
    lines = files.read_text(path).split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    of_class = settings.tokenizer.get("tokenizer_class", "GPT2Tokenizer").removesuffix("Fast")
    if of_class not in GPT2_CLASSES:
        raise UserError(f"{path}: how a {of_class} splits a text is not known; give the model's tokenizer.json")
    added = read_json(path.with_name("added_tokens.json"))
    spec = byte_level_spec(vocabulary, merges, add_prefix_space=settings.tokenizer.get("add_prefix_space", False))
    spec["added_tokens"] = [{**ADDED_TOKEN, "id": i, "content": text} for text, i in added.items()]
    if END_OF_TEXT in vocabulary:
        settings = settings._replace(special_tokens={"eos_token": END_OF_TEXT, **settings.special_tokens})
    tokenizer = build_library(spec, settings)
    begins = settings.special_tokens.get("bos_token", END_OF_TEXT)
    adds_bos = settings.tokenizer.get("add_bos_token", False)
    return with_settings(tokenizer, settings, tokenizer.added_ids[begins]) if adds_bos else tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# SentencePiece

CONTROL_PIECE, USER_PIECE, UNUSED_PIECE = 3, 4, 5  # types of pieces, also in .gguf files


def sentencepiece_proto() -> Any:
    """The module with SentencePiece's file format. Raises UserError."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ModuleNotFoundError:
        raise UserError("this tokenizer needs packages: pip install sentencepiece protobuf") from None
    return sentencepiece_model_pb2


def read_sentencepiece(path: Path, settings: Settings) -> Tokenizer:
    """A .model file of SentencePiece, or of tiktoken, which has the same name for Llama 3."""
    data = path.read_bytes()
    if RANK_LINE.match(data):
        return read_tiktoken(path, settings)
    added = {int(i): token for i, token in (settings.tokenizer.get("added_tokens_decoder") or {}).items()}
    special = {token["content"] for token in added.values() if token.get("special")}
    special |= {*settings.special_tokens.values(), *settings.further_tokens}
    base = SentencePieceTokenizer(with_control_pieces(data, special))
    behind = [token["content"] for i, token in sorted(added.items()) if i >= base.vocab_size]
    tokenizer = add_tokens(base, behind)
    bos_id = base.pieces.bos_id()
    adds_bos = bos_id >= 0 and settings.tokenizer.get("add_bos_token", True)
    names = {"bos_token": bos_id, "eos_token": base.pieces.eos_id(), "unk_token": base.pieces.unk_id()}
    own = {name: base.pieces.id_to_piece(i) for name, i in names.items() if i >= 0}
    settings = settings._replace(special_tokens={**own, **settings.special_tokens})
    return with_settings(tokenizer, settings, bos_id if adds_bos else None)


def with_control_pieces(data: bytes, special: Collection[str]) -> bytes:
    """A SentencePiece model in which user-defined pieces that are control tokens have that type, so that no text
    becomes one: those in `special`, and those spelled <|...|>."""
    model = sentencepiece_proto().ModelProto()
    model.ParseFromString(data)
    is_changed = False
    for piece in model.pieces:
        if piece.type == USER_PIECE and (piece.piece in special or CONTROL_MARK.fullmatch(piece.piece)):
            piece.type = CONTROL_PIECE
            is_changed = True
    return model.SerializeToString() if is_changed else data


# ---------------------------------------------------------------------------------------------------------------------
# byte-level BPE

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
CAMEL_WORDS = (rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+", rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*")


def cl100k_split(digits: str) -> str:
    """How GPT-4 and its followers split text into words. digits: how many stand together."""
    word = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    return rf"(?i:{CONTRACTIONS})|{word}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"


def camel_split(contractions: str, digits: str) -> str:
    """The same, but a word also ends where capitals begin."""
    words = "|".join(word + contractions for word in CAMEL_WORDS)
    return rf"{words}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"


# A text is split by each of them in turn.
GPT2_SPLITS = [GPT2_SPLIT]
DIGIT_SPLITS = [r"\p{N}", GPT2_SPLIT]
LLAMA3_SPLITS = [cl100k_split("{1,3}")]
QWEN2_SPLITS = [cl100k_split("")]
TEKKEN_SPLITS = [camel_split("", "")]
GPT4O_SPLITS = [camel_split(f"(?i:{CONTRACTIONS})?", "{1,3}")]
FALCON_SPLITS = [r"[\p{P}\$\+<=>\^~\|`]+", GPT2_SPLIT, "[0-9][0-9][0-9]"]
DEFAULT_SPLITS = [r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"]


def byte_level_spec(
    vocabulary: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    splits: Sequence[str] = (),
    *,
    add_prefix_space: bool = False,
) -> dict[str, Any]:
    """The `tokenizers` library's JSON of a byte-level BPE; without splits a text is split as GPT-2's."""
    parts = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False} for split in splits
    ]
    options = {"add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": not splits}
    byte_level = {"type": "ByteLevel", **options}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*parts, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": dict(vocabulary), "merges": list(merges)},
    }


# ---------------------------------------------------------------------------------------------------------------------
# GGUF

# How llama.cpp names the splits of a byte-level BPE: tokenizer.ggml.pre.
GGUF_SPLITS = {
    "default": DEFAULT_SPLITS,
    "falcon": FALCON_SPLITS,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "exaone4", "mellum"), GPT2_SPLITS),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), DIGIT_SPLITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"), LLAMA3_SPLITS),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), LLAMA3_SPLITS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "stablelm2", "hunyuan", "grok-2"), QWEN2_SPLITS),
    "tekken": TEKKEN_SPLITS,
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), GPT4O_SPLITS),
}
# Families that look whole words up before they merge, and begin a text with BOS unless the file says otherwise.
GGUF_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken")
# Control tokens that end a completion in llama.cpp, whatever the file says.
END_NAMES = (END_OF_TEXT, "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>", "<end_of_turn>")


def read_gguf(path: Path, settings: Settings) -> Tokenizer:
    """The tokenizer inside a .gguf file, which has its own settings."""
    return from_gguf(read_metadata(path))


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a .gguf file, from its keys and values. Raises UserError."""
    gguf = {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in metadata.items()}
    model = gguf.get("model")
    if model not in GGUF_MODELS:
        raise UserError(f"the .gguf file has a tokenizer of the kind {model}; known are {', '.join(GGUF_MODELS)}")
    lists = ["tokens", "merges"] if model == "gpt2" else ["tokens", "scores"]
    missing = [f"tokenizer.ggml.{name}" for name in lists if name not in gguf]
    if missing:
        raise UserError(f"the .gguf file lacks {', '.join(missing)}; give the folder with the model's tokenizer")
    gguf = without_padding(gguf)
    if model == "llama":
        gguf = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **gguf}
    tokenizer = GGUF_MODELS[model](gguf)
    known = tokenizer.added_ids
    eos_id = gguf.get("eos_token_id")
    ends = [gguf.get("eot_token_id"), gguf.get("eom_token_id"), *(known.get(name) for name in END_NAMES)]
    adds_bos = gguf.get("add_bos_token", model == "llama" or gguf.get("pre") in GGUF_WHOLE_WORDS)
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {f"{name}_token": gguf.get(f"{key}_token_id") for key, name in names.items()}
    control = ControlTokens(
        eos_id=eos_id,
        bos_id=gguf.get("bos_token_id") if adds_bos else None,
        end_ids=tuple(dict.fromkeys(i for i in (eos_id, *ends) if i is not None)),
        added_ids=known,
        special_tokens={name: gguf["tokens"][i] for name, i in ids.items() if i is not None},
    )
    tokenizer.adopt(control)
    tokenizer.chat_template = gguf.get("chat_template", "")
    return tokenizer


def without_padding(gguf: Mapping[str, Any]) -> dict[str, Any]:
    """The keys without the last tokens that only fill the rows of the model."""
    types = gguf.get("token_type") or [1] * len(gguf["tokens"])
    n_tokens = len(types)
    while n_tokens and types[n_tokens - 1] == UNUSED_PIECE and gguf["tokens"][n_tokens - 1].startswith("[PAD"):
        n_tokens -= 1
    cut = {name: gguf[name][:n_tokens] for name in ("tokens", "scores") if name in gguf}
    return {**gguf, **cut, "token_type": types[:n_tokens]}


def gguf_byte_level(gguf: Mapping[str, Any]) -> Tokenizer:
    name = gguf.get("pre", "default")
    if name not in GGUF_SPLITS:
        raise UserError(
            f"the .gguf file splits text as {name}; known are {', '.join(GGUF_SPLITS)}; "
            "give the folder with the model's tokenizer.json"
        )
    known = {*gguf["tokens"]}
    merges = [pair for pair in (merge.split(" ") for merge in gguf["merges"]) if known.issuperset(pair)]
    spec = byte_level_spec({token: i for i, token in enumerate(gguf["tokens"])}, merges, GGUF_SPLITS[name])
    spec["model"]["ignore_merges"] = name in GGUF_WHOLE_WORDS
    if name == "qwen2":
        spec["normalizer"] = {"type": "NFC"}  # which the format can't say
    spec["added_tokens"] = [
        {**ADDED_TOKEN, "id": i, "content": token, "special": kind == CONTROL_PIECE or token in END_NAMES}
        for i, (token, kind) in enumerate(zip(gguf["tokens"], gguf["token_type"], strict=True))
        if kind in (CONTROL_PIECE, USER_PIECE) or token in END_NAMES
    ]
    return BPETokenizer(spec)


def gguf_sentencepiece(gguf: Mapping[str, Any]) -> Tokenizer:
    """A SentencePiece BPE; of the Unigram kind are only encoders."""
    model = sentencepiece_proto().ModelProto()
    for token, score, kind in zip(gguf["tokens"], gguf["scores"], gguf["token_type"], strict=True):
        piece = (
            token.replace(" ", "\u2581") if kind == USER_PIECE else token
        )  # which llama.cpp's converter has replaced
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = "<0x0A>" in gguf["tokens"]
    for name, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        i = gguf.get(f"{key}_token_id", -1)
        setattr(model.trainer_spec, f"{name}_id", i)
        if i >= 0:
            setattr(model.trainer_spec, f"{name}_piece", gguf["tokens"][i])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = gguf.get("add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = gguf.get("remove_extra_whitespaces", False)
    return SentencePieceTokenizer(with_control_pieces(model.SerializeToString(), END_NAMES))


GGUF_MODELS: dict[str, Callable[[Mapping[str, Any]], Tokenizer]] = {
    "gpt2": gguf_byte_level,
    "llama": gguf_sentencepiece,
}


# ---------------------------------------------------------------------------------------------------------------------
# tiktoken

RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # a token in base64 and its rank
LLAMA3_CONTROL = (
    *("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)
TEKKEN_CONTROL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


class Ranks(NamedTuple):
    """What a file of ranks does not say: how a text is split, and the control tokens behind the ranks."""

    split: str
    control: tuple[str, ...] = (END_OF_TEXT,)
    begins: str = ""  # the token before a text


# By the number of ranks: the files have no names inside.
RANKS = {
    50256: Ranks(GPT2_SPLIT),
    50257: Ranks(GPT2_SPLIT),  # whisper's, in many languages
    100256: Ranks(cl100k_split("{1,3}")),
    128000: Ranks(cl100k_split("{1,3}"), LLAMA3_CONTROL, "<|begin_of_text|>"),
    151643: Ranks(cl100k_split(""), (END_OF_TEXT, "<|im_start|>", "<|im_end|>")),
    199998: Ranks(GPT4O_SPLITS[0], ("<|startoftext|>", END_OF_TEXT)),
}


def build_tiktoken(name: str, split: str, ranks: dict[bytes, int], control: dict[str, int]) -> TiktokenTokenizer:
    try:
        import tiktoken
    except ModuleNotFoundError:
        raise UserError("this tokenizer needs a package: pip install tiktoken") from None
    return TiktokenTokenizer(tiktoken.Encoding(name, pat_str=split, mergeable_ranks=ranks, special_tokens=control))


def read_tiktoken(path: Path, settings: Settings) -> Tokenizer:
    """A file of tiktoken: each line a token in base64 and its rank."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    known = RANKS.get(len(ranks))
    if known is None:
        counts = ", ".join(map(str, RANKS))
        raise UserError(f"{path}: how its {len(ranks)} tokens split a text is not known; known are {counts} tokens")
    added = settings.tokenizer.get("added_tokens_decoder") or {}
    control = {token["content"]: int(i) for i, token in added.items()}
    control = control or {name: len(ranks) + i for i, name in enumerate(known.control)}
    tokenizer = build_tiktoken(path.stem, known.split, ranks, control)
    if "eos_token" not in settings.special_tokens and not settings.end_ids and known.control == LLAMA3_CONTROL:
        ends = ("<|end_of_text|>", "<|eot_id|>")
        settings = settings._replace(end_ids=tuple(control[name] for name in ends if name in control))
    return with_settings(tokenizer, settings, control.get(known.begins))


def read_tekken(path: Path, settings: Settings) -> Tokenizer:
    """Mistral's tekken.json. Its control tokens come first, and a text begins with <s>."""
    spec = read_json(path)
    config = spec["config"]
    n_control = config["default_num_special_tokens"]
    named = spec.get("special_tokens") or [{"rank": i, "token_str": name} for i, name in enumerate(TEKKEN_CONTROL)]
    names = {token["rank"]: token["token_str"] for token in named}
    control = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(n_control)}
    n_tokens = config["default_vocab_size"] - n_control  # the file has more than the model
    ranks = {base64.b64decode(token["token_bytes"]): n_control + token["rank"] for token in spec["vocab"][:n_tokens]}
    tokenizer = build_tiktoken("tekken", config["pattern"], ranks, control)
    own = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = settings._replace(special_tokens={**own, **settings.special_tokens})
    return with_settings(tokenizer, settings, control["<s>"])


# ---------------------------------------------------------------------------------------------------------------------
# files by name, the first one of a folder counts

Reader = Callable[[Path, Settings], Tokenizer]
FILES: dict[str, Reader] = {
    "tokenizer.json": read_library,
    "merges.txt": read_gpt2,
    "tekken*.json": read_tekken,
    "*.model*": read_sentencepiece,
    "*.spm": read_sentencepiece,
    "*.tiktoken": read_tiktoken,
}
