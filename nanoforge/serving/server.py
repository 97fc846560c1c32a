"""Runs the server: its socket, its token, its thread, and its end. Uvicorn is an optional package."""

import importlib.util
import ipaddress
import secrets
import socket
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from nanoforge.errors import UserError
from nanoforge.serving.app import Service, build_app
from nanoforge.serving.engine import Engine
from nanoforge.serving.guard import Guard
from nanoforge.serving.requests import Defaults
from nanoforge.serving.served_model import ServedModel

BACKLOG = 128


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the server listens. token: "": one is made where the address needs it."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    token: str = ""
    max_body: int = 10**6  # bytes
    max_batch: int = 16
    max_queue: int = 64


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, opened before models are loaded. Raises UserError, also without the packages."""
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--serve: needs a package: pip install {package}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host={host}: {error.strerror}; use an address of this machine, such as 127.0.0.1") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(
            f"--host={host} --port={port}: {error.strerror}; use another port, or 0 for any free one"
        ) from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def page_url(listener: socket.socket, host: str, token: str) -> str:
    """Where the page is. The token is in the fragment, which browsers send nowhere."""
    name = f"[{host}]" if ":" in host else host
    if name in ("0.0.0.0", "[::]"):
        name = socket.gethostname()
    fragment = f"#token={token}" if token else ""
    return f"http://{name}:{listener.getsockname()[1]}/{fragment}"


class ModelServer:
    """A server that listens; `run` answers, until `stop` or Ctrl-C."""

    def __init__(
        self, models: Sequence[ServedModel], defaults: Defaults, options: ServerOptions, listener: socket.socket
    ):
        """listener: of `listen`."""
        self.listener = listener
        is_local = is_loopback(self.listener)
        self.token = options.token or ("" if is_local else secrets.token_urlsafe(24))
        self.url = page_url(self.listener, options.host, self.token)
        self.engine = Engine(models, max_batch=options.max_batch, max_queue=options.max_queue)
        app = build_app(Service(self.engine, defaults, created=int(time.time())))
        self.server = make_uvicorn(Guard(app, self.token, is_local, options.max_body), self.engine)

    @property
    def port(self) -> int:
        return self.listener.getsockname()[1]

    def run(self) -> None:
        self.engine.start()
        try:
            self.server.run(sockets=[self.listener])
        finally:
            self.engine.stop()
            self.listener.close()

    def stop(self) -> None:
        """Let `run` end, from another thread."""
        self.engine.stop()
        self.server.should_exit = True


def make_uvicorn(app: Any, engine: Engine) -> Any:
    """A uvicorn server that ends at once on Ctrl-C: the engine's jobs end with it."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, number: int, frame: FrameType | None) -> None:
            engine.stop()
            super().handle_exit(number, frame)

    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    return Server(config)


def serve(server: ModelServer, *, open_page: bool) -> None:
    """Serve until Ctrl-C."""
    api = f"{server.url.partition('#')[0]}v1"
    print(f"{', '.join(server.engine.models)}: {server.url} (the OpenAI API is at {api}); Ctrl-C stops it", flush=True)
    if open_page:
        webbrowser.open(server.url)
    server.run()
