"""Files: text as Python reads it, and downloads from a server on this machine, which sends what a test wants."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanoforge import files
from nanoforge.errors import UserError

CONTENT = b"To be, or not to be\n" * 200_000  # 4 MB: read in several parts


class Handler(BaseHTTPRequestHandler):
    """/half sends half of what it promises, /page a web page, /none a 404, everything else its own path and CONTENT."""

    def do_GET(self) -> None:
        content = self.path.encode() + CONTENT
        self.send_response(404 if self.path == "/none" else 200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if self.path == "/page" else "text/plain")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.path == "/half" else content)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *request: object) -> None:
        """A client that hangs up is part of the tests."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with Server(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture
def fetch(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.setenv("no_proxy", "*")
    return lambda path: files.download(server + path, tmp_path / files.download_name(server + path))


def test_two_addresses_are_two_files(fetch: Callable[[str], Path], tmp_path: Path):
    """Also with the same last part, or differing by their query; a file that is there is not fetched again."""
    for path in ("/a/input.txt", "/b/input.txt", "/b/input.txt?download=true", "/b/na%20ïve text.txt"):
        fetched = fetch(path)
        assert fetched.suffix == ".txt" and fetched.read_bytes().endswith(CONTENT)
        assert fetched.read_bytes().startswith(path.partition("ï")[0].encode())
    assert len(list(tmp_path.iterdir())) == 4
    fetched.write_text("mine")
    assert fetch("/b/na%20ïve text.txt").read_text() == "mine"


@pytest.mark.parametrize("path, message", [
    ("/half", f"{(5 + len(CONTENT)) // 2:,} of {5 + len(CONTENT):,} bytes came"),
    ("/page", "is a web page"),
    ("/none", "Not Found"),
])  # fmt: skip
def test_what_is_not_whole_is_no_file(fetch: Callable[[str], Path], tmp_path: Path, path: str, message: str):
    with pytest.raises(UserError, match=message):
        fetch(path)
    assert not list(tmp_path.iterdir())


def test_addresses_that_are_none(tmp_path: Path):
    for url in ("http://", "http://[bad", "https://nowhere.invalid/x.txt"):
        with pytest.raises(UserError, match="download failed"):
            files.download(url, tmp_path / "x")


def test_a_written_file_is_as_others_are(tmp_path: Path):
    """For whom the umask says; safetensors alone would make it its owner's."""
    with files.atomic_write(tmp_path / "weights.safetensors") as path:
        save_file({"a": torch.ones(3)}, path)
    (tmp_path / "other").touch()
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"weights.safetensors", "other"}
