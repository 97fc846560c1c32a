"""The HTTP interface: the page, and the OpenAI API. FastAPI is an optional package, imported where it is used."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nanoforge.errors import did_you_mean
from nanoforge.serving import requests
from nanoforge.serving.engine import Engine, Job
from nanoforge.serving.replies import Part, Replies
from nanoforge.serving.requests import ApiError, Defaults, Request
from nanoforge.serving.served_model import ServedModel

FILES = {  # path -> file beside this one, and its type
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
RETRY_AFTER = 5  # seconds
QUEUE_INTERVAL = 0.5  # seconds between two reports of the place in the queue
CLIENT_CLOSED = 499  # nginx's status for a client that went; nobody reads it


# ---------------------------------------------------------------------------------------------------------------------
# one request


class Inbox:
    """The parts of a job, which the engine's thread hands to the server's loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.parts: asyncio.Queue[Part | ApiError] = asyncio.Queue()

    def put(self, part: Part | ApiError) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.parts.put_nowait, part)

    async def get(self) -> Part:
        """Raises ApiError when the engine has failed."""
        part = await self.parts.get()
        if isinstance(part, ApiError):
            raise part
        return part


@dataclass(frozen=True)
class Exchange:
    """A request while it is answered."""

    engine: Engine
    job: Job
    inbox: Inbox
    replies: Replies

    async def parts(self) -> AsyncIterator[Part]:
        """All parts, to the end of every choice. Raises ApiError."""
        n_open = self.job.request.n_choices
        while n_open:
            part = await self.inbox.get()
            n_open -= part.finish_reason is not None
            yield part

    async def answer(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError."""
        parts = [part async for part in self.parts()]
        return self.replies.whole(parts, self.job.request.n_choices, self.job.usage)

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events. A comment tells the place in the queue, which clients skip."""
        chunks = self.replies.chunks(include_usage=self.job.request.include_usage)
        try:
            async for place in self.places():
                yield f": queue {place}\n\n"
            for chunk in chunks.first(self.job.request.n_choices):
                yield event(chunk)
            async for part in self.parts():
                yield event(chunks.next(part))
            for chunk in chunks.last(self.job.usage):
                yield event(chunk)
        except ApiError as error:
            yield event(error.to_json())
        yield "data: [DONE]\n\n"

    async def places(self) -> AsyncIterator[int]:
        """The place in the queue, each time that it has changed, until the job runs."""
        last = 0
        while place := self.engine.position(self.job):
            if place != last:
                yield place
                last = place
            await asyncio.sleep(QUEUE_INTERVAL if place > 1 else QUEUE_INTERVAL / 10)


def event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def event_stream(exchange: Exchange) -> Any:
    """The streamed answer; a client that goes ends its job."""
    from fastapi.responses import StreamingResponse

    class EventStream(StreamingResponse):
        async def __call__(self, *connection: Any) -> None:
            try:
                await super().__call__(*connection)
            finally:
                exchange.job.cancel()  # does nothing to one that is done

    return EventStream(exchange.events(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


async def wait_until_gone(receive: Callable[[], Any]) -> None:
    """Wait until the client has closed its connection. Its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


# ---------------------------------------------------------------------------------------------------------------------
# the server


@dataclass(frozen=True)
class Service:
    """What the endpoints do."""

    engine: Engine
    defaults: Defaults
    created: int  # seconds since 1970, when the server started

    def find_model(self, name: str) -> ServedModel:
        """The model of that name; with one model, also without a name. Raises ApiError."""
        models = self.engine.models
        if not name and len(models) == 1:
            return next(iter(models.values()))
        if name not in models:
            known = f"{', '.join(models)}{did_you_mean(name, models)}"
            raise ApiError(
                404, f"model: {name or 'is missing'}: this server has {known}", param="model", code="model_not_found"
            )
        return models[name]

    async def open(self, request: Request) -> Exchange:
        """Put a request into the queue. Raises ApiError."""
        served = self.find_model(request.model)
        for name in ("stop", "echo"):
            if served.has_contexts and getattr(request, name):
                raise requests.refuse(name, f"has no effect on the contexts of {served.name}; leave it out")
        prompts = await asyncio.to_thread(served.encode, request)
        inbox = Inbox()
        job = self.engine.submit(Job(served, request, prompts, inbox.put))
        replies = Replies(
            model=served.name,
            spell=[partial(served.spell, lane) for lane in range(len(served.lanes))],
            lanes=[lane.name for lane in served.lanes] if served.has_contexts else (),
            top_logprobs=request.top_logprobs,
            is_chat=request.messages is not None,
        )
        return Exchange(self.engine, job, inbox, replies)

    async def generate(self, http: Any, read: Callable[..., Request]) -> Any:
        """Answer a request of either endpoint. Raises ApiError."""
        from fastapi.responses import JSONResponse, Response

        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a page of another site can't send unasked
            raise ApiError(415, f"Content-Type: must be application/json, not {kind or 'missing'}")
        request = read(requests.parse_body(await http.body()), self.defaults)
        exchange = await self.open(request)
        if request.stream:
            return event_stream(exchange)
        answering = asyncio.create_task(exchange.answer())
        leaving = asyncio.create_task(wait_until_gone(http.receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                return Response(status_code=CLIENT_CLOSED)
            return JSONResponse(answering.result())
        finally:
            exchange.job.cancel()
            for task in (answering, leaving):
                task.cancel()

    def list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self.describe(served) for served in self.engine.models.values()]}

    def describe(self, served: ServedModel) -> dict[str, Any]:
        """A model as /v1/models has it; `meta` is this server's own."""
        meta = {
            "source": served.source,
            "parameters": served.n_params,
            "context_length": served.config.block_size,
            "chat": served.can_chat,
            "contexts": [lane.name for lane in served.lanes] if served.has_contexts else [],
        }
        return {
            "id": served.name,
            "object": "model",
            "created": self.created,
            "owned_by": "nanoforge",
            "meta": meta,
        }

    def state(self) -> dict[str, Any]:
        """What the page shows of the engine, and what its sliders begin with."""
        return {
            "models": self.engine.state(),
            "max_batch": self.engine.max_batch,
            "max_queue": self.engine.max_queue,
            "defaults": vars(self.defaults),
        }


def build_app(service: Service) -> Any:
    """The FastAPI app."""
    from fastapi import FastAPI

    app = FastAPI(title="nanoforge", docs_url=None, redoc_url=None, openapi_url=None)
    add_api(app, service)
    add_files(app)
    add_errors(app)
    return app


def add_api(app: Any, service: Service) -> None:
    """The endpoints of the OpenAI API, and two of the server's own."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.generate(request, requests.read_completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await service.generate(request, requests.read_chat)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(service.list_models())

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(service.describe(service.find_model(name)))

    @app.get("/state")
    async def state() -> Response:
        return JSONResponse(service.state())

    @app.get("/health")
    async def health() -> Response:
        is_alive = service.engine.thread.is_alive()
        return JSONResponse({"status": "ok" if is_alive else "the engine has ended"}, 200 if is_alive else 503)


def add_files(app: Any) -> None:
    """The page, read once."""
    from fastapi.responses import Response

    def add(path: str, name: str, media_type: str) -> None:
        text = (Path(__file__).parent / name).read_text(encoding="utf-8")

        @app.get(path)
        async def file() -> Response:
            return Response(text, media_type=media_type)

    for path, (name, media_type) in FILES.items():
        add(path, name, media_type)


def add_errors(app: Any) -> None:
    """Errors as the OpenAI API has them."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response
    from starlette.exceptions import HTTPException

    @app.exception_handler(ApiError)
    async def report(request: Request, error: ApiError) -> Response:
        headers = {"retry-after": str(RETRY_AFTER)} if error.status in (429, 503) else {}
        return JSONResponse(error.to_json(), error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def report_http(request: Request, error: HTTPException) -> Response:
        problem = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(problem.to_json(), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def report_bug(request: Request, error: Exception) -> Response:
        problem = ApiError(500, f"the server failed: {type(error).__name__}; its log has more")
        return JSONResponse(problem.to_json(), 500)
