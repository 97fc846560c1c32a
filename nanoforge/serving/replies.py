"""What a client gets: completions and chats as the objects of the OpenAI API. Knows neither HTTP nor models."""

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nanoforge.serving.text import Drawn, Piece

LEAST_LOGPROB = -9999.0  # OpenAI's, of what is impossible: JSON has no infinity
NOT_WHOLE = "\ufffd"  # what the text of a part of a character has

Spell = Callable[[int], str]  # the text of a token's id


class Part(NamedTuple):
    """What a request has got since the last part: of one of its choices."""

    choice: int  # its number
    lanes: Sequence[Piece]  # of each context; most models have one
    finish_reason: str | None = None  # stop, length, or None: it goes on


@dataclass(frozen=True)
class Usage:
    """Tokens that were read and drawn."""

    prompt_tokens: int
    completion_tokens: int

    def to_json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass
class LaneText:
    """The text of a lane so far: where in it the next token begins."""

    length: int = 0


@dataclass(frozen=True)
class Replies:
    """Makes the objects of one request.

    model: its name. spell: of each lane, the texts of its ids. lanes: the names of contexts; () for other models.
    """

    model: str
    spell: Sequence[Spell]
    lanes: Sequence[str] = ()
    top_logprobs: int | None = None
    is_chat: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: uuid.uuid4().hex[:24])

    def whole(self, parts: Iterable[Part], n_choices: int, usage: Usage) -> dict[str, Any]:
        """The answer of a request, from all of its parts."""
        choices = [self._join([part for part in parts if part.choice == index]) for index in range(n_choices)]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._envelope(kind, [self._choice(choice, Offsets()) for choice in choices], usage.to_json())

    def chunks(self, *, include_usage: bool) -> "Chunks":
        """The objects of a stream, one for each part."""
        return Chunks(self, include_usage=include_usage)

    def _join(self, parts: Sequence[Part]) -> Part:
        """The parts of a choice as one."""
        lanes = []
        for pieces in zip(*(part.lanes for part in parts), strict=True):
            tokens = [token for piece in pieces for token in piece.tokens]
            lanes.append(Piece("".join(piece.text for piece in pieces), tokens))
        return Part(parts[0].choice, lanes, parts[-1].finish_reason)

    def _envelope(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        reply: dict[str, Any] = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.key}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        return reply if usage is None else {**reply, "usage": usage}

    def _choice(self, part: Part, offsets: "Offsets") -> dict[str, Any]:
        text = part.lanes[0].text
        choice: dict[str, Any] = {"index": part.choice}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs(part.lanes[0], self.spell[0], offsets.of(part.choice, 0))
        choice["finish_reason"] = part.finish_reason
        if self.lanes:
            choice["contexts"] = {
                name: {"text": piece.text, "logprobs": self._logprobs(piece, spell, offsets.of(part.choice, number))}
                for number, (name, piece, spell) in enumerate(zip(self.lanes, part.lanes, self.spell, strict=True), 1)
            }
        return choice

    def _logprobs(self, piece: Piece, spell: Spell, lane: LaneText) -> dict[str, Any] | None:
        """The log-probabilities of a piece, as its endpoint has them."""
        if self.top_logprobs is None:
            return None
        if self.is_chat:
            return {"content": [chat_logprob(token, spell) for token in piece.tokens], "refusal": None}
        offsets = []
        for token in piece.tokens:
            offsets.append(lane.length)
            lane.length += len(spell(token.id))
        return {
            "tokens": [spell(token.id) for token in piece.tokens],
            "token_logprobs": [finite(token.logprob) for token in piece.tokens],
            "top_logprobs": [top_by_text(token, spell) for token in piece.tokens],
            "text_offset": offsets,
        }


@dataclass
class Offsets:
    """Where the next token begins, of each choice and lane."""

    lanes: dict[tuple[int, int], LaneText] = field(default_factory=dict)

    def of(self, choice: int, lane: int) -> LaneText:
        return self.lanes.setdefault((choice, lane), LaneText())


class Chunks:
    """Makes the objects of a stream, one after the other."""

    def __init__(self, replies: Replies, *, include_usage: bool):
        self.replies, self.include_usage = replies, include_usage
        self.kind = "chat.completion.chunk" if replies.is_chat else "text_completion"
        self.offsets = Offsets()

    def first(self, n_choices: int) -> list[dict[str, Any]]:
        """What a stream begins with: the role of each choice of a chat."""
        if not self.replies.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            for index in range(n_choices)
        ]

    def next(self, part: Part) -> dict[str, Any]:
        choice = self.replies._choice(part, self.offsets)
        if self.replies.is_chat:
            text = choice.pop("message")["content"]
            choice["delta"] = {"content": text} if text else {}
        return self._chunk([choice])

    def last(self, usage: Usage) -> list[dict[str, Any]]:
        """What a stream ends with: the usage, if it was asked for."""
        return [self.replies._envelope(self.kind, [], usage.to_json())] if self.include_usage else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self.replies._envelope(self.kind, choices, None)
        return {**chunk, "usage": None} if self.include_usage else chunk


def chat_logprob(token: Drawn, spell: Spell) -> dict[str, Any]:
    top = [describe(spell(token_id), logprob) for token_id, logprob in token.top]
    return {**describe(spell(token.id), token.logprob), "top_logprobs": top}


def describe(text: str, logprob: float | None) -> dict[str, Any]:
    """A token's text; its bytes are unknown where it is a part of a character."""
    return {"token": text, "logprob": finite(logprob), "bytes": None if NOT_WHOLE in text else list(text.encode())}


def finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def top_by_text(token: Drawn, spell: Spell) -> Mapping[str, float] | None:
    """The log-probability of each alternative and of the token itself; the likelier of two that have one text."""
    if token.logprob is None:
        return None
    top: dict[str, Any] = {}
    for token_id, logprob in (*token.top, (token.id, token.logprob)):
        top.setdefault(spell(token_id), finite(logprob))
    return top
