"""The text of a completion while it is drawn: in whole characters, up to a string that stops it.

text = TextStream(tokenizer, stop=["\\nUser:"])
sampling = SamplingParams(max_new_tokens=100, is_complete=text.read)
...                                     # while the Decoder draws:
print(text.take(), end="")              # what is certain by now; a possible beginning of a stop string is held back
text.finish()                           # when all is drawn, what was held back is certain, too
text.text                               # all of it, without the stop string and what follows it
"""

from collections.abc import Sequence

from nanoforge.data.tokenization import Tokenizer

MAX_WAITING = 8  # tokens; a character has fewer, so these make none


class TextStream:
    """Ids in, text out. The text ends before the first stop string."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, continues_text: bool = False, offset: int = 0
    ):
        """continues_text: it stands behind other text, so a space before its first word counts. offset: of the
        tokenizer's vocabulary in the model, whose ids are read."""
        self.tokenizer = tokenizer
        self.stop = [text for text in stop if text]
        self.offset = offset
        self.decode = tokenizer.decode_continuation if continues_text else tokenizer.decode
        self.text = ""  # that is decoded
        self.stopped = False  # by a stop string
        self.n_taken = 0  # characters
        self.n_read = 0  # ids
        self.waiting: list[int] = []  # ids that don't make whole characters yet

    def read(self, ids: Sequence[int]) -> bool:
        """Read the new ones of all ids so far; whether a stop string has come: a request's `is_complete`."""
        for token_id in ids[self.n_read :]:
            self.put(token_id)
        return self.stopped

    def put(self, token_id: int) -> None:
        """Read one more id."""
        self.n_read += 1
        if self.stopped:
            return
        self.waiting.append(token_id - self.offset)
        if len(self.waiting) > MAX_WAITING or not self.decode(self.waiting).endswith("\ufffd"):
            self._decode_waiting()

    def finish(self) -> None:
        """No id follows: what waits for others is text as it is."""
        self._decode_waiting()
        self.stopped = True

    def take(self) -> str:
        """The text that is certain and was not taken before."""
        end = len(self.text) - (0 if self.stopped else self._held_back())
        taken = self.text[self.n_taken : end]
        self.n_taken += len(taken)
        return taken

    def _decode_waiting(self) -> None:
        if not self.waiting:
            return
        searched = len(self.text)
        self.text += self.decode(self.waiting)
        self.waiting = []
        self.decode = self.tokenizer.decode_continuation
        places = [self.text.find(stop, max(0, searched - len(stop) + 1)) for stop in self.stop]
        found = [place for place in places if place >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _held_back(self) -> int:
        """How many characters at the end begin a stop string."""
        most = 0
        for stop in self.stop:
            lengths = range(min(len(stop) - 1, len(self.text)), most, -1)
            most = max(most, next((length for length in lengths if self.text.endswith(stop[:length])), 0))
        return most
