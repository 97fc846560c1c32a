"""What stands before every request: who may ask, and how much. An ASGI middleware, which imports no web framework.

1. Host: of a server on the loopback it must be a name of this machine, so that no other site's name can resolve to it.
2. Origin: a browser sends it from pages; those of other sites may not ask.
3. Token: all but the page itself needs it, if the server has one.
4. Body: at most so many bytes, of which no more is ever held.
"""

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from nanoforge.serving.requests import ApiError

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
OPEN_PATHS = ("/", "/page.css", "/page.js", "/health", "/favicon.ico")  # need no token
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
LINGER = 2.0  # seconds in which the rest of a body that is too long is thrown away, so that its sender reads the answer


@dataclass(frozen=True)
class Guard:
    """Lets requests through to the app, or answers them with an error."""

    app: Any
    token: str  # "": none is needed
    is_loopback: bool
    max_body: int  # bytes

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        answer = Answer(send)
        try:
            self.check(scope["path"], headers)
            body = await read_body(receive, self.max_body)
        except ApiError as error:
            await answer.fail(error)
            if error.status == 413 and "expect" not in headers:
                await linger(receive)
            await answer.end()
            return
        if body is not None:
            await self.app(scope, replay(body, receive), answer.send)

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raises ApiError."""
        host = headers.get("host", "")
        if self.is_loopback and host_name(host) not in LOOPBACK_NAMES:
            raise ApiError(403, f"Host: {host or 'is missing'} is no name of this machine; use http://127.0.0.1")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, f"Origin: {origin}: pages of other sites may not ask this server")
        if self.token and path not in OPEN_PATHS and not self.has_token(headers.get("authorization", "")):
            raise ApiError(
                401,
                "the token is missing or wrong; send the header Authorization: Bearer TOKEN",
                code="invalid_api_key",
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.max_body:
            raise too_long(self.max_body)

    def has_token(self, authorization: str) -> bool:
        kind, _, token = authorization.partition(" ")
        return kind.lower() == "bearer" and secrets.compare_digest(token.strip().encode(), self.token.encode())


def host_name(host: str) -> str:
    """The name in a Host header, without the port: localhost of localhost:8000, ::1 of [::1]:8000."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def too_long(limit: int) -> ApiError:
    return ApiError(413, f"the body has more than {limit:,} bytes, which is the limit (--max_body)")


async def read_body(receive: Receive, limit: int) -> bytes | None:
    """A request's body; None when its client has gone. Raises ApiError for one that is too long, as soon as it is."""
    body = bytearray()
    more_body = True
    while more_body:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more_body = message.get("more_body", False)
        if len(body) > limit:
            raise too_long(limit)
    return bytes(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """Receives a body that was read, then what follows it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


@dataclass
class Answer:
    """What is sent, with the headers that every answer has."""

    target: Send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message["headers"]}
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in own]
            message = {**message, "headers": [*message["headers"], *more]}
        await self.target(message)

    async def fail(self, error: ApiError) -> None:
        """Answer with an error; the answer ends with `end`."""
        body = json.dumps(error.to_json()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        await self.target({"type": "http.response.body", "body": b"", "more_body": False})


async def linger(receive: Receive) -> None:
    """Throw away the rest of a body, for a while: a connection that closes on a sender takes the answer with it."""
    try:
        async with asyncio.timeout(LINGER):
            while (await receive()).get("more_body"):
                pass
    except TimeoutError:
        pass
