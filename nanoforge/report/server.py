"""Serves the report's page, and its data as JSON, on this machine alone: the page follows running runs."""

import hashlib
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nanoforge.errors import UserError
from nanoforge.report import page
from nanoforge.report.read_runs import LoadedRun, RunReader

HOST = "127.0.0.1"
ALLOWED_HOSTS = (HOST, "localhost")


class PageServer(ThreadingHTTPServer):
    """The page at /, its data at /data.json; read again at each request, computed again only when a run has changed."""

    def __init__(self, port: int, reader: RunReader, *, by: str, title: str, refresh_seconds: int):
        """port: 0 is any free one. Raises UserError when the port is taken."""
        try:
            super().__init__((HOST, port), PageHandler)
        except OSError as error:
            raise UserError(f"--port={port}: {error.strerror}; use another port, or 0 for any free one") from None
        self.reader, self.by, self.title, self.refresh_seconds = reader, by, title, refresh_seconds
        self.lock = threading.Lock()
        self.shown: dict[str, Any] = {}
        self.shown_runs: Sequence[LoadedRun] = ()
        self.shown_empty_paths: Sequence[str] = ()

    def payload(self) -> dict[str, Any]:
        """What the page shows now. Raises UserError when the runs are gone."""
        with self.lock:
            runs, empty_paths = self.reader.read()
            if not self.shown or self.has_changed(runs, empty_paths):
                self.shown = page.payload(runs, empty_paths, self.by, self.refresh_seconds)
                self.shown_runs, self.shown_empty_paths = runs, empty_paths
            return self.shown

    def has_changed(self, runs: Sequence[LoadedRun], empty_paths: Sequence[str]) -> bool:
        """The reader gives the same objects for folders that have not changed."""
        same_runs = list(map(id, runs)) == list(map(id, self.shown_runs))
        return not same_runs or empty_paths != self.shown_empty_paths


class PageHandler(BaseHTTPRequestHandler):
    """Answers requests that name this machine as their host."""

    server: PageServer

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in ALLOWED_HOSTS:  # another site's name that resolves to this machine
            self.send_error(403)
            return
        try:
            if self.path == "/":
                html = page.render(self.server.payload(), self.server.title)
                self.send_body(html, "text/html")
            elif self.path == "/data.json":
                self.send_body(page.to_json(self.server.payload()), "application/json")
            else:
                self.send_error(404)
        except UserError as error:
            self.send_error(503, str(error).encode("ascii", "replace").decode())

    def send_body(self, text: str, media_type: str) -> None:
        """A body with its hash; none where the client has it already."""
        body = text.encode()
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        not_modified = self.headers.get("If-None-Match") == etag
        if not_modified:
            body = b""
        self.send_response(304 if not_modified else 200)
        self.send_header("ETag", etag)
        self.send_header("Content-Type", f"{media_type}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing."""
