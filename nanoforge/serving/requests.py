"""What a client asks for: bodies of the OpenAI API, checked field by field, as values.

    read_completion({"model": "run", "prompt": "To be", "max_tokens": 5}, defaults)

A field that this server has no use for is refused by name, unless its value asks for nothing. Knows neither HTTP nor
models, and imports no torch.
"""

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from nanoforge.data.tables import check_text, preview
from nanoforge.errors import UserError, did_you_mean

MAX_TOKENS = 100_000  # of a completion
MAX_CHOICES = 128  # completions of one request
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
ROLES = ("system", "developer", "user", "assistant")  # developer: what newer clients call the system's

# Fields without a use here, and the values with which they ask for nothing. None is always one; () stands for any.
UNUSED: Mapping[str, tuple[Any, ...]] = {
    "audio": ([],),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": (),
    "modalities": (["text"],),
    "parallel_tool_calls": (),
    "prediction": ([],),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "user": (),
    "verbosity": ("medium",),
    "web_search_options": ({},),
}
UNUSED_IN_MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": ([],),
    "function_call": ("none",),
    "refusal": ("",),
    "tool_calls": ([],),
}


class ApiError(Exception):
    """An answer that is an error: its HTTP status, and what the OpenAI API says of it."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def refuse(param: str, problem: str, code: str | None = None) -> ApiError:
    """The error of a field."""
    return ApiError(400, f"{param}: {problem}", param=param, code=code)


# ---------------------------------------------------------------------------------------------------------------------
# what is asked for


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """How completions are drawn that say nothing of it."""

    temperature: float = 0.8
    top_k: int = 200  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 500


@dataclass(frozen=True, kw_only=True)
class Sampling(Defaults):
    """How each completion of a request is drawn."""

    seed: int


Prompt = str | list[int] | dict[str, str]  # a text, its ids, or the text of each context
Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for completions of prompts, or of a chat."""

    model: str
    prompts: list[Prompt]
    messages: Messages | None  # of a chat, which has no prompts
    sampling: Sampling
    n: int
    stop: tuple[str, ...]
    top_logprobs: int | None  # alternatives of each token; None: no log-probabilities
    echo: bool  # whether completions begin with their prompts
    ignore_eos: bool  # whether they go on past a token that ends them
    stream: bool
    include_usage: bool  # whether a stream ends with the usage
    truncate: int | None  # tokens of a prompt that are read, its last ones; -1: as many as fit; None: all, or an error

    @property
    def n_choices(self) -> int:
        return self.n * (1 if self.messages is not None else len(self.prompts))


# ---------------------------------------------------------------------------------------------------------------------
# one field


class Bounds(NamedTuple):
    low: float = -math.inf
    above: float = -math.inf
    high: float = math.inf


class Fields:
    """The fields of a body, each read once. A field that is null has its default."""

    def __init__(self, body: Mapping[str, Any]):
        self.left = {name: value for name, value in body.items() if value is not None}
        self.known: set[str] = set()

    def take(self, name: str) -> Any:
        """The value of a field; None without one."""
        self.known.add(name)
        return self.left.pop(name, None)

    def number(self, name: str, default: float, bounds: Bounds) -> float:
        value = self.take(name)
        return default if value is None else check_number(name, value, bounds)

    def whole(self, name: str, default: int, bounds: Bounds) -> int:
        value = self.take(name)
        return default if value is None else check_whole(name, value, bounds)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise refuse(name, f"must be true or false, not {preview(value)}")
        return bool(value)

    def refuse_others(self) -> None:
        """Raise ApiError for fields that are not known, or that ask for what this server doesn't do."""
        for name, value in self.left.items():
            if name not in UNUSED:
                raise refuse(name, f"not a field of this endpoint{did_you_mean(name, self.known)}", "unknown_parameter")
            check_unused(name, value, UNUSED[name])


def check_unused(param: str, value: Any, neutral: tuple[Any, ...]) -> None:
    """Raise ApiError for a value that asks for something."""
    if value is not None and neutral and value not in neutral:
        raise refuse(param, f"is not supported by this server; leave it out, got {preview(value)}", "unsupported_value")


def check_number(param: str, value: Any, bounds: Bounds) -> float:
    """A finite number within bounds. Raises ApiError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refuse(param, f"must be a finite number, not {preview(value)}")
    if value < bounds.low:
        raise refuse(param, f"must be at least {bounds.low:g}, not {value:g}")
    if value <= bounds.above:
        raise refuse(param, f"must be above {bounds.above:g}, not {value:g}")
    if value > bounds.high:
        raise refuse(param, f"must be at most {bounds.high:g}, not {value:g}")
    return value


def check_whole(param: str, value: Any, bounds: Bounds) -> int:
    """A whole number within bounds. Raises ApiError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise refuse(param, f"must be a whole number, not {preview(value)}")
    return int(check_number(param, value, bounds))


def check_string(param: str, value: Any) -> str:
    """A text that can be encoded. Raises ApiError."""
    try:
        return check_text(value)
    except UserError as error:
        raise refuse(param, str(error)) from None


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises ApiError."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {preview(value)}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# a request


def read_completion(body: Mapping[str, Any], defaults: Defaults) -> Request:
    """The request of a body of /v1/completions. Raises ApiError."""
    fields = Fields(body)
    prompts = check_prompts(fields.take("prompt"))
    top_logprobs = fields.take("logprobs")
    if top_logprobs is not None:
        top_logprobs = check_whole("logprobs", top_logprobs, Bounds(low=0, high=MAX_TOP_LOGPROBS))
    echo = fields.flag("echo")
    limit = ("max_tokens", 0 if echo else 1)
    return read_common(fields, defaults, limit, prompts=prompts, messages=None, top_logprobs=top_logprobs, echo=echo)


def read_chat(body: Mapping[str, Any], defaults: Defaults) -> Request:
    """The request of a body of /v1/chat/completions. Raises ApiError."""
    fields = Fields(body)
    messages = check_messages(fields.take("messages"))
    has_logprobs = fields.flag("logprobs")
    top_logprobs = fields.whole("top_logprobs", 0, Bounds(low=0, high=MAX_TOP_LOGPROBS))
    if top_logprobs and not has_logprobs:
        raise refuse("top_logprobs", "has an effect only with logprobs: true")
    limit = "max_completion_tokens"
    if limit not in fields.left:
        fields.known.add(limit)
        limit = "max_tokens"
    elif "max_tokens" in fields.left:
        raise refuse("max_tokens", "is another name of max_completion_tokens; send one of them")
    return read_common(
        fields,
        defaults,
        (limit, 1),
        prompts=[],
        messages=messages,
        top_logprobs=top_logprobs if has_logprobs else None,
        echo=False,
    )


def read_common(fields: Fields, defaults: Defaults, limit: tuple[str, int], **others: Any) -> Request:
    """The request with the fields that both endpoints have. limit: name and least value of the most tokens.

    Raises ApiError, also for fields that neither has.
    """
    model = check_string("model", fields.take("model") or "")
    stream = fields.flag("stream")
    name, least = limit
    sampling = Sampling(
        temperature=fields.number("temperature", defaults.temperature, Bounds(low=0, high=100)),
        top_k=fields.whole("top_k", defaults.top_k, Bounds(low=0)),
        top_p=fields.number("top_p", defaults.top_p, Bounds(above=0, high=1)),
        min_p=fields.number("min_p", defaults.min_p, Bounds(low=0, high=1)),
        repetition_penalty=fields.number("repetition_penalty", defaults.repetition_penalty, Bounds(above=0, high=100)),
        max_tokens=fields.whole(name, defaults.max_tokens, Bounds(low=least, high=MAX_TOKENS)),
        seed=fields.whole("seed", secrets.randbits(32), Bounds(low=0, high=2**63 - 1)),
    )
    truncate = fields.take("truncate_prompt_tokens")
    if truncate is not None and check_whole("truncate_prompt_tokens", truncate, Bounds(low=-1)) == 0:
        raise refuse("truncate_prompt_tokens", "must be -1 or above 0")
    request = Request(
        model=model,
        sampling=sampling,
        n=fields.whole("n", 1, Bounds(low=1, high=MAX_CHOICES)),
        stop=check_stops(fields.take("stop")),
        stream=stream,
        include_usage=check_stream_options(fields.take("stream_options"), stream=stream),
        ignore_eos=fields.flag("ignore_eos"),
        truncate=truncate,
        **others,
    )
    fields.refuse_others()
    if request.n_choices > MAX_CHOICES:
        raise refuse("n", f"times the prompts makes {request.n_choices} completions; send at most {MAX_CHOICES}")
    return request


def check_stream_options(value: Any, *, stream: bool) -> bool:
    """Whether the usage is to be included. Raises ApiError."""
    if value is None:
        return False
    if not stream:
        raise refuse("stream_options", "has an effect only with stream: true")
    if not isinstance(value, dict) or not value.keys() <= {"include_usage", "include_obfuscation"}:
        raise refuse("stream_options", f'must be {{"include_usage": true}}, not {preview(value)}')
    include_usage = value.get("include_usage", False)
    if not isinstance(include_usage, bool):
        raise refuse("stream_options.include_usage", f"must be true or false, not {preview(include_usage)}")
    return include_usage


def check_stops(value: Any) -> tuple[str, ...]:
    """The texts that end a completion. Raises ApiError."""
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise refuse("stop", f"must be a text or at most {MAX_STOPS} of them, not {preview(value)}")
    if "" in stops:
        raise refuse("stop", "is empty, which every text ends with; leave it out")
    return tuple(check_string("stop", stop) for stop in stops)


def check_prompts(value: Any) -> list[Prompt]:
    """The prompts of a value: a text, its ids, a list of either, or the text of each context. Raises ApiError."""
    if value is None:
        raise refuse("prompt", "is missing; send a text")
    if isinstance(value, dict):
        return [{name: check_string(f"prompt.{name}", text) for name, text in value.items()}]
    if isinstance(value, str):
        return [check_string("prompt", value)]
    if not isinstance(value, list) or not value:
        raise refuse("prompt", f"must be a text or a list, not {preview(value)}")
    if is_id(value[0]):
        return [check_ids(value)]
    return [check_ids(item) if isinstance(item, list) else check_string("prompt", item) for item in value]


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_ids(value: list[Any]) -> list[int]:
    """Token ids. Raises ApiError."""
    if not value or not all(map(is_id, value)):
        raise refuse("prompt", f"must have token ids, not {preview(value)}")
    return value


def check_messages(value: Any) -> Messages:
    """The messages of a chat, with their contents as text. Raises ApiError."""
    if not isinstance(value, list) or not value:
        raise refuse("messages", f"must be a list of messages, not {preview(value)}")
    messages = [check_message(f"messages[{number}]", message) for number, message in enumerate(value)]
    if messages[-1]["role"] == "assistant":
        raise refuse("messages", "end with the assistant's; end with the user's")
    return messages


def check_message(param: str, message: Any) -> dict[str, Any]:
    """A message {"role", "content"}. Raises ApiError."""
    if not isinstance(message, dict):
        raise refuse(param, f'must be {{"role": ..., "content": ...}}, not {preview(message)}')
    role = message.get("role")
    if role not in ROLES:
        raise refuse(f"{param}.role", f"must be one of {', '.join(ROLES)}, not {preview(role)}")
    for name, field in message.items():
        if name in UNUSED_IN_MESSAGES:
            check_unused(f"{param}.{name}", field, UNUSED_IN_MESSAGES[name])
        elif name not in ("role", "content", "name"):
            raise refuse(f"{param}.{name}", "not a field of a message", "unknown_parameter")
    content = join_parts(f"{param}.content", message.get("content"))
    return {"role": "system" if role == "developer" else role, "content": content}


def join_parts(param: str, content: Any) -> str:
    """The text of a content: a text, or parts that are. Raises ApiError."""
    if not isinstance(content, list):
        return check_string(param, content)
    texts = []
    for number, part in enumerate(content):
        place = f"{param}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise refuse(place, f"must have the type text, not {preview(kind)}; this server reads text alone")
        texts.append(check_string(f"{place}.text", part.get("text")))
    return "".join(texts)
