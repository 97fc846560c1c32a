"""Files from the web, whole or not at all."""

import os
import urllib.error
import urllib.request
from pathlib import Path

from parts.mistakes import Mistake


def fetch(url: str, path: Path) -> Path:
    """Download a file unless it is there. Raises Mistake that says what to do offline."""
    if path.exists():
        return path
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            beside.write_bytes(answer.read())
    except (urllib.error.URLError, OSError) as error:
        beside.unlink(missing_ok=True)
        raise Mistake(
            f"{url} can't be downloaded ({getattr(error, 'reason', error)}); offline, get that text elsewhere and give it with --input FILE"
        ) from None
    os.replace(beside, path)
    return path
