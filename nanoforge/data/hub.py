"""Files of a model on the Hugging Face hub, from the local cache or the network. Knows nothing of what is in them.

    folder = fetch("HuggingFaceTB/SmolLM2-135M-Instruct@main", ["config.json", "*.safetensors"])

Everything lies in huggingface_hub's own cache (HF_HOME), so what any of its users has downloaded is found offline.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from nanoforge.errors import UserError, did_you_mean

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # of openai-community, without that name
# What a model has beside its weights. All who fetch one ask for all of them: offline, a snapshot must be whole.
MODEL_FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja", "*token*.json", "vocab.json", "merges.txt"),
    *("*.model", "*.spm", "*.tiktoken", "tekken.json"),
)
HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")


def is_hub_name(source: str) -> bool:
    """Whether it is spelled as org/name or org/name@revision, and no such path exists."""
    return HUB_NAME.fullmatch(source) is not None and not Path(source).exists()


def source_error(source: str, names: Sequence[str] = ()) -> str:
    """Why a source is no path, none of these names, and no model of the hub; empty if it may be one of them.

    A name whose org is a folder here is taken for a mistyped path, unless it has a revision.
    """
    path = Path(source)
    if source in names or path.exists():
        return ""
    is_name = is_hub_name(source)
    if is_name and ("@" in source or not path.parent.is_dir()):
        return ""
    neighbours = [str(path.parent / name) for name in os.listdir(path.parent)] if path.parent.is_dir() else []
    suggestion = did_you_mean(source, [*names, *neighbours])
    if is_name:
        return f"no such file or folder in {path.parent} (of the hub: {source}@main){suggestion}"
    choices = f", not one of {', '.join(names)}," if names else ""
    return f"no such file or folder{choices} and not spelled as org/name of the hub{suggestion}"


def fetch(name: str, patterns: Sequence[str], revision: str = "") -> Path:
    """The folder of a snapshot that holds the model's files of these names or patterns.

    name: org/name, also with @revision: a branch, a tag or a commit. Raises UserError.
    """
    try:
        import huggingface_hub
        from huggingface_hub.utils import logging
    except ModuleNotFoundError:
        raise UserError(f"{name}: needs a package: pip install huggingface_hub") from None
    repo, _, named_revision = name.partition("@")
    logging.set_verbosity_error()  # otherwise every retry is printed
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision or named_revision or None, allow_patterns=list(patterns)
        )
    except Exception as error:  # the library's own, and those of the network under it
        raise UserError(f"{name}: {explain(error)}") from None
    if not any(any(Path(folder).glob(pattern)) for pattern in patterns):
        raise UserError(f"{name}: has none of {', '.join(patterns)}; give another model, or a local folder")
    return Path(folder)


def explain(error: Exception) -> str:
    """Why a download failed, and what helps."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return "not a name on the hub; it is spelled org/name, or org/name@revision"
    if isinstance(error, errors.GatedRepoError):
        return "the hub asks to accept the model's terms on its page first, and for a login: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model, or it is private; check the name, or log in: hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has no such revision of it; name a branch, a tag or a commit"
    # Older versions of the library don't say.
    part = "only a part of it is" if isinstance(error, getattr(errors, "IncompleteSnapshotError", ())) else "not"
    kind = type(error.__cause__ or error).__name__
    return (
        f"{part} in the local cache, and the hub can't be reached ({kind}); give a local folder, "
        "or download it where there is a network, and set HF_HOME to that cache"
    )
