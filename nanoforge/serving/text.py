"""Which tokens make which text of a completion while it is drawn. Knows nothing of models: tokens come as ids."""

from collections.abc import Sequence
from typing import NamedTuple

from nanoforge.models.text_stream import TextStream


class Drawn(NamedTuple):
    """A token as the model drew it."""

    id: int
    logprob: float | None = None  # None: was not asked for
    top: Sequence[tuple[int, float]] = ()  # the likeliest ids with their log-probabilities


class Piece(NamedTuple):
    """A part of a completion: its text, and the tokens that it is made of."""

    text: str
    tokens: list[Drawn]


class PieceStream:
    """Tokens in, pieces of text out. A token comes with the text that it begins."""

    def __init__(self, text: TextStream):
        self.text = text
        self.tokens: list[tuple[int, Drawn]] = []  # not given out yet, with where their text begins

    @property
    def is_stopped(self) -> bool:
        return self.text.stopped

    def put(self, token: Drawn) -> None:
        self.tokens.append((len(self.text.text), token))
        self.text.put(token.id)

    def take(self) -> Piece:
        """What is certain and was not taken before."""
        text = self.text.take()
        given = [token for start, token in self.tokens if start < self.text.n_taken]
        self.tokens = [(start, token) for start, token in self.tokens if start >= self.text.n_taken]
        return Piece(text, given)

    def finish(self) -> Piece:
        """The rest. At a stop string, the tokens behind it are left out."""
        was_stopped = self.text.stopped
        self.text.finish()
        piece = self.take()
        return piece if was_stopped else Piece(piece.text, piece.tokens + [token for _, token in self.tokens])
