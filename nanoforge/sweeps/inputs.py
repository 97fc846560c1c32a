"""What a run will read besides its data, checked before it waits in a queue: a model's folder, a tracker's login.

Reads no weights and imports no torch.
"""

import netrc
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.pt")
WANDB_WITHOUT_LOGIN = ("offline", "disabled", "dryrun")  # values of WANDB_MODE
WANDB_SERVER = "https://api.wandb.ai"


def model_error(source: str) -> str | None:
    """What is wrong with the folder of a base model, or None; other sources are not looked at."""
    folder = Path(source)
    if not folder.is_dir():
        return None
    if (folder / "checkpoints").is_dir():
        if any(folder.glob("checkpoints/[0-9]*/manifest.json")):
            return None
        return f"--init_from={source}: the run has no checkpoint yet; wait for one, or name another"
    if any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)) or (folder / "manifest.json").exists():
        return None
    return f"--init_from={source}: no weights in this folder ({', '.join(WEIGHT_FILES)}); name the folder that has them"


def wandb_error(environment: Mapping[str, str], home: Path) -> str | None:
    """Why wandb would ask for a login, with the environment of a run and the user's home, or None."""
    if environment.get("WANDB_MODE", "").lower() in WANDB_WITHOUT_LOGIN or environment.get("WANDB_DISABLED"):
        return None
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None
    server = urlsplit(environment.get("WANDB_BASE_URL") or WANDB_SERVER).hostname or ""
    paths = [Path(environment["NETRC"])] if environment.get("NETRC") else [home / ".netrc", home / "_netrc"]
    if any(has_login(path, server) for path in paths):
        return None
    return (
        f"--wandb_log: not logged in to {server}; run `wandb login`, "
        "or set WANDB_MODE=offline (in a file: environment: {WANDB_MODE: offline})"
    )


def has_login(path: Path, server: str) -> bool:
    """Whether a netrc file has an entry for a server."""
    try:
        return server in netrc.netrc(str(path)).hosts
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
