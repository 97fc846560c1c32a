"""Models of the hub: found in huggingface_hub's cache without a network, else one clear error."""

from pathlib import Path

import pytest

from nanoforge.data import hub
from nanoforge.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline cache that holds the main branch of org/small, as huggingface_hub lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--org--small"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    return snapshot


@pytest.mark.parametrize("name", ["org/small", "org/small@main", f"org/small@{COMMIT}"])
def test_a_cached_model_needs_no_network(cache: Path, name: str):
    assert hub.is_hub_name(name)
    assert hub.fetch(name, ["*.json"]) == cache
    assert hub.fetch("org/small", ["config.json", "no.txt"], revision=name.partition("@")[2]) == cache


def test_what_the_cache_lacks_is_refused_by_name(cache: Path):
    for name in ("org/other", "org/small@v2"):
        with pytest.raises(UserError, match=rf"^{name}: .*HF_HOME"):
            hub.fetch(name, ["*.json"])
    with pytest.raises(UserError, match=r"has none of \*.gguf"):
        hub.fetch("org/small", ["*.gguf"])
    with pytest.raises(UserError, match="spelled org/name"):
        hub.fetch("a/b/c", ["*.json"])


def test_paths_are_no_names_of_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(cache.parent)
    assert not hub.is_hub_name(f"{COMMIT}/config.json"), "it exists"
    for source in ("gpt2", "/a/b", "a/b/c", "a/b.gguf@", "./a/b", "./a"):
        assert not hub.is_hub_name(source)
