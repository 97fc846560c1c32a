"""A conversation with a model: messages, replies, and what of it the model still reads. Knows nothing of a terminal.

    conversation = Conversation(TorchEngine(model), ExampleEncoder(tokenizer, block_size), sampling, seed=0)
    reply = conversation.reply("Who are you?", on_text=print)

What was read for a reply is kept, so that the next one reads only what is new. Once the context is full, the oldest
turns are left out; the system message stays.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoforge import files
from nanoforge.data import tables
from nanoforge.errors import UserError
from nanoforge.models.generation import Engine, Request, SamplingParams, uniform_draws
from nanoforge.models.text_stream import TextStream
from nanoforge.posttraining.example_rows import Message, check_messages
from nanoforge.posttraining.examples import ExampleEncoder
from nanoforge.rng import SAMPLE

ROOM_FOR_REPLY = 0.5  # of the context at most
KEPT_WHEN_FULL = 0.75  # of the rest, so that turns are not left out, and all others read again, at every message


@dataclass(frozen=True)
class Reply:
    """What the model said, and how."""

    text: str
    request: Request
    tokens_per_second: float  # from the first token on; 0: unknown, of a token or none
    n_prompt_tokens: int


@dataclass
class Conversation:
    """Messages, which a reply adds to. `messages` has all of them; the model reads the system's and its turns from
    `start` on."""

    engine: Engine
    encoder: ExampleEncoder
    sampling: SamplingParams
    seed: int
    stop: Sequence[str] = ()
    messages: list[Message] = field(default_factory=list)
    report: Callable[[str], None] = print  # what the user has to know
    start: int = 0
    n_replies: int = 0

    @property
    def block_size(self) -> int:
        return self.encoder.max_tokens

    @property
    def system(self) -> str:
        """The text of the system message; "": there is none."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    def set_system(self, text: str) -> None:
        """Replace the system message, or without a text remove it."""
        n_before, n_now = int(bool(self.system)), int(bool(text))
        self.messages[:n_before] = [{"role": "system", "content": tables.check_text(text)}][:n_now]
        if self.start:
            self.start += n_now - n_before

    def reset(self) -> None:
        """Forget all but the system message."""
        del self.messages[1 if self.system else 0 :]
        self.start = 0

    def undo(self) -> str:
        """Take the last message of the user back, with the reply to it; its text. Raises UserError."""
        turns = self._turns()
        if not turns:
            raise UserError("there is no message to take back")
        text = self.messages[turns[-1]]["content"]
        del self.messages[turns[-1] :]
        self.start = min(self.start, len(self.messages))
        return text

    def reply(self, message: str, on_text: Callable[[str], None]) -> Reply:
        """Say something as the user; on_text gets the reply piece by piece. Ctrl-C ends it, and what was said is kept.

        Without a word of the reply the message is taken back. Raises UserError.
        """
        self.messages.append({"role": "user", "content": tables.check_text(message)})
        try:
            reply = self._draw(self._fit(), on_text)
        except BaseException:
            self.undo()
            raise
        if reply.text or reply.request.finish_reason != "cancelled":
            self.messages.append({"role": "assistant", "content": reply.text})
        else:
            self.undo()
        return reply

    def _draw(self, prompt: list[int], on_text: Callable[[str], None]) -> Reply:
        text = TextStream(self.encoder.tokenizer, self.stop)
        sampling = dataclasses.replace(self.sampling, is_complete=text.read)
        draws = uniform_draws(self.seed, SAMPLE, self.n_replies)
        request = Request(prompt, sampling, draws)
        self.n_replies += 1
        times: list[float] = []

        def take(token: int) -> None:
            times.append(time.perf_counter())
            on_text(text.take())

        try:
            self.engine.complete([request], take)
        except KeyboardInterrupt:
            request.cancel()
        text.finish()
        on_text(text.take())
        seconds = times[-1] - times[0] if times else 0.0
        return Reply(text.text, request, (len(times) - 1) / seconds if seconds else 0.0, len(prompt))

    def _turns(self) -> list[int]:
        """Where messages of the user are."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

    def _encode(self) -> list[int]:
        """The ids of what the model reads before it replies. Raises UserError."""
        n_system = 1 if self.system else 0
        kept = [*self.messages[:n_system], *self.messages[max(self.start, n_system) :]]
        return self.encoder.encode_prompt({"prompt": kept})

    def _fit(self) -> list[int]:
        """`_encode`, with the oldest turns left out where the context is full."""
        room = self.block_size - min(self.sampling.max_new_tokens, int(self.block_size * ROOM_FOR_REPLY))
        prompt = self._encode()
        if len(prompt) > room:
            later = [turn for turn in self._turns() if turn >= self.start][1:]
            before = self.start
            while later and len(prompt) > room * KEPT_WHEN_FULL:
                self.start = later.pop(0)
                prompt = self._encode()
            if self.start > before:
                n_out = sum(message["role"] != "system" for message in self.messages[: self.start])
                self.report(
                    f"the context of {self.block_size:,} tokens is full: the model no longer reads the first "
                    f"{n_out} messages"
                )
        if len(prompt) > self.block_size:
            self.report(
                f"the prompt has {len(prompt):,} tokens: the model reads its last {self.block_size:,}, the context"
            )
        return prompt

    # files

    def save(self, path: Path) -> None:
        """Write {"messages": [...]}, a row that training reads, too."""
        files.write_text(path, json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")

    def load(self, path: Path) -> None:
        """Go on with the messages of a file. Raises UserError."""
        rows = list(tables.read_rows(path))
        if len(rows) != 1 or "messages" not in rows[0]:
            raise UserError(f'{path}: a conversation is one row, {{"messages": [...]}}; the file has {len(rows)} rows')
        has_template = self.encoder.chat_template is not None
        messages: list[Any] = check_messages(rows[0]["messages"], for_template=has_template)
        if messages[-1]["role"] == "user":
            raise UserError(f"{path}: ends with the user's message; a conversation goes on after a reply")
        self.messages, self.start = messages, 0
