"""Models of the hub: found in huggingface_hub's cache without a network, else one clear error."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import COMMIT, cache_model, offline_cache

from nanoforge.data import hub
from nanoforge.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """The snapshot of org/small in a cache without a network."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with offline_cache(tmp_path / "cache") as cache:
        yield cache_model(cache, "org/small", folder)


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


def test_names_of_the_hub_and_mistyped_paths_are_known_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/chat").mkdir(parents=True)
    for source in ("gpt2", "out/chat", f"{tmp_path}/out", "org/small", "org/small@v2", "out/chatt@main"):
        assert hub.source_error(source, ["gpt2"]) == ""
    for source, expected in {
        "out/chatt": "did you mean out/chat?",
        "out/other": "out/other@main",
        f"{tmp_path}/out/chatt": f"did you mean {tmp_path}/out/chat?",
        "gpt3": "did you mean gpt2?",
        "./org/small": "org/name",
        "a/b/c": "org/name",
    }.items():
        assert expected in hub.source_error(source, ["gpt2"])
