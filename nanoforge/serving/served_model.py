"""A model as clients see it: its name, and how their prompts become ids. Knows neither HTTP nor the queue."""

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from nanoforge.data.tokenization import Tokenizer
from nanoforge.errors import UserError
from nanoforge.models.likelihood import encode_sequence, prefix_id
from nanoforge.posttraining.chat_template import completion_end_ids
from nanoforge.posttraining.example_rows import ROLES
from nanoforge.posttraining.examples import ExampleEncoder
from nanoforge.serving.requests import ApiError, Messages, Prompt, Request, refuse

MAX_SPELLED = 2**16  # texts of tokens that are kept


class Lane(NamedTuple):
    """A text that the model writes: the only one, or that of a context."""

    name: str  # of its vocabulary
    tokenizer: Tokenizer
    offset: int  # of its vocabulary in the model


@dataclass(frozen=True)
class ServedModel:
    """A model on its device, ready to decode, with its lanes: one, or one for each context."""

    name: str
    model: nn.Module
    lanes: Sequence[Lane]
    source: str  # what it was loaded from
    encoding: threading.Lock = field(default_factory=threading.Lock)  # tokenizers keep words that they have seen

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the first lane."""
        return self.lanes[0].tokenizer

    @functools.cached_property
    def config(self) -> Any:
        return self.model.config

    @property
    def has_contexts(self) -> bool:
        return self.config.vocabulary == "contexts"

    @functools.cached_property
    def can_chat(self) -> bool:
        """Whether it was trained on messages."""
        tokenizer = self.tokenizer
        return not self.has_contexts and bool(tokenizer.chat_template or ROLES["assistant"] in tokenizer.added_ids)

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The ids in the model that end a completion; contexts are drawn to the most tokens."""
        if self.has_contexts:
            return ()
        return tuple(token + self.lanes[0].offset for token in completion_end_ids(self.tokenizer))

    @property
    def vocab_size(self) -> int | None:
        """Ids that may be drawn are below it; None: the model knows."""
        return self.tokenizer.vocab_size if self.config.vocabulary == "one" else None

    @functools.cached_property
    def n_params(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @functools.cached_property
    def encoder(self) -> ExampleEncoder:
        return ExampleEncoder(self.tokenizer, self.config.block_size)

    def spell(self, lane: int, token_id: int) -> str:
        """The text of an id in the model, behind others."""
        tokenizer, offset = self.lanes[lane].tokenizer, self.lanes[lane].offset
        return spell(tokenizer, token_id - offset)

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids in the model, (T,), of the first lane."""
        return self.tokenizer.decode((ids - self.lanes[0].offset).tolist())

    # prompts

    def encode(self, request: Request) -> list[np.ndarray]:
        """The ids of each prompt, (K, T), cut as the request says. Raises ApiError."""
        with self.encoding:
            try:
                if request.messages is not None:
                    prompts = [self.encode_chat(request.messages)]
                else:
                    prompts = [self.encode_prompt(prompt) for prompt in request.prompts]
            except UserError as error:
                param = "prompt" if request.messages is None else "messages"
                raise refuse(param, str(error)) from None
        return [self.cut(prompt, request) for prompt in prompts]

    def encode_chat(self, messages: Messages) -> np.ndarray:
        """The ids of a chat, (1, T), up to where the assistant begins to write. Raises UserError, ApiError."""
        if not self.can_chat:
            raise ApiError(
                400,
                f"model: {self.name} was not trained on messages; use /v1/completions, "
                "or start the server with --chat_template",
                param="model",
            )
        return np.array([self.encoder.encode_prompt({"prompt": messages})], dtype=np.int64)

    def encode_prompt(self, prompt: Prompt) -> np.ndarray:
        """The ids of a prompt, (K, T). Raises UserError, ApiError."""
        if self.has_contexts:
            return self.encode_contexts(prompt)
        tokenizer, offset = self.tokenizer, self.lanes[0].offset
        if isinstance(prompt, dict):
            raise refuse("prompt", f"has contexts, and {self.name} has none; send a text")
        if isinstance(prompt, str):
            ids = encode_sequence(tokenizer, prompt) or [prefix_id(tokenizer)]
        else:
            ids = prompt
            if min(ids) < 0 or max(ids) >= tokenizer.vocab_size:
                raise refuse("prompt", f"has an id outside of the vocabulary, 0 to {tokenizer.vocab_size - 1}")
        return np.array([ids], dtype=np.int64) + offset

    def encode_contexts(self, prompt: Prompt) -> np.ndarray:
        """The ids of the texts of all contexts, (K, T); one text serves each of them. Raises UserError, ApiError."""
        names = [lane.name for lane in self.lanes]
        if isinstance(prompt, list):
            raise refuse("prompt", f"of ids; {self.name} takes the text of each context: {', '.join(names)}")
        texts = dict.fromkeys(names, prompt) if isinstance(prompt, str) else prompt
        if texts.keys() != set(names):
            raise refuse("prompt", f"has {', '.join(texts) or 'nothing'}; send a text for each of {', '.join(names)}")
        ids = [np.array(encode_sequence(lane.tokenizer, texts[lane.name])) + lane.offset for lane in self.lanes]
        lengths = [len(lane_ids) for lane_ids in ids]
        if len(set(lengths)) > 1 or not lengths[0]:
            raise refuse("prompt", f"has {', '.join(map(str, lengths))} tokens; the contexts' texts need equal lengths")
        return np.stack(ids)

    def cut(self, prompt: np.ndarray, request: Request) -> np.ndarray:
        """The last tokens of a prompt, if the request asks for it. Raises ApiError for one that does not fit."""
        block_size = self.config.block_size
        length = prompt.shape[1]
        if request.truncate is not None:
            return prompt[:, -(block_size if request.truncate == -1 else min(request.truncate, block_size)) :]
        if length > block_size:
            raise ApiError(
                400,
                f"the prompt has {length:,} tokens, and the model's context {block_size:,}; send a shorter one, or "
                "truncate_prompt_tokens: -1 to have its end read",
                param="prompt" if request.messages is None else "messages",
                code="context_length_exceeded",
            )
        return prompt


@functools.lru_cache(maxsize=MAX_SPELLED)
def spell(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.decode_continuation([token_id])
