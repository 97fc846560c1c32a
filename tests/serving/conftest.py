"""A live server on a free port, for all tests: two chat models with random weights, and one of two contexts."""

import string
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from helpers import tiny_model

pytest.importorskip("fastapi", reason="needs FastAPI, which is missing")
pytest.importorskip("uvicorn", reason="needs uvicorn, which is missing")

from nanoforge.data.tokenization import END_OF_TEXT, CharTokenizer, add_tokens
from nanoforge.posttraining.example_rows import ROLES
from nanoforge.serving.requests import Defaults
from nanoforge.serving.served_model import Lane, ServedModel
from nanoforge.serving.server import ModelServer, ServerOptions, listen

TOKENIZER = add_tokens(
    CharTokenizer(string.ascii_letters + string.digits + " .,:;?!'\n()<>&/=|_"), [END_OF_TEXT, *ROLES.values()]
)
LETTERS, CASES = CharTokenizer("abcdefgh\n"), CharTokenizer("UL.")


def make_served(name: str, seed: int, **changes: Any) -> ServedModel:
    """A chat model with random weights."""
    model = tiny_model(seed, vocab_sizes=(TOKENIZER.vocab_size,), block_size=256, position="rope", **changes).eval()
    return ServedModel(name, model, [Lane("tokens", TOKENIZER, 0)], source="tiny")


def make_pair() -> ServedModel:
    """A model of two contexts."""
    sizes = (LETTERS.vocab_size, CASES.vocab_size)
    model = tiny_model(vocab_sizes=sizes, vocabulary="contexts", block_size=64).eval()
    lanes = [Lane("letters", LETTERS, 0), Lane("cases", CASES, sizes[0])]
    return ServedModel("pair", model, lanes, source="tiny")


@contextmanager
def running(models: Sequence[ServedModel], **options: Any) -> Iterator[ModelServer]:
    """A server in a thread of this process."""
    server = ModelServer(models, Defaults(max_tokens=20), ServerOptions(**options), listen("127.0.0.1", 0))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


@pytest.fixture(scope="session")
def server() -> Iterator[ModelServer]:
    with running([make_served("tiny", 0), make_served("other", 1), make_pair()]) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: ModelServer) -> Any:
    """The OpenAI client."""
    openai = pytest.importorskip("openai", reason="needs the openai client, which is missing")
    return openai.OpenAI(base_url=f"{server.url}v1", api_key="none", max_retries=0)
