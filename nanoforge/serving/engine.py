"""The engine: one thread that owns the models and draws for all requests together.

Jobs wait in a queue, first come, first served. Each model has a batch of at most max_batch completions (continuous
batching): between two steps, those that are done or that nobody waits for any more leave it, and waiting ones join it.
With several models the thread steps one after the other, so that they share the machine evenly.

    engine = Engine([served], max_batch=16, max_queue=64)
    engine.start()
    job = engine.submit(job)          # its on_part is called in the engine's thread
    job.cancel()
    engine.stop()
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nanoforge.device import is_out_of_memory
from nanoforge.models import generation
from nanoforge.models.generation import Decoder, SamplingParams, decoding, uniform_draws
from nanoforge.models.text_stream import TextStream
from nanoforge.rng import SAMPLE
from nanoforge.serving.replies import Part, Usage
from nanoforge.serving.requests import ApiError, Request
from nanoforge.serving.served_model import ServedModel
from nanoforge.serving.text import Drawn, Piece, PieceStream

SPEED_WINDOW = 5.0  # seconds over which tokens per second are counted
CHUNK = 256  # tokens of a prompt whose logits are held at a time

# ---------------------------------------------------------------------------------------------------------------------
# jobs


@dataclass(eq=False)
class Choice:
    """One completion of a job."""

    index: int
    request: generation.Request
    texts: Sequence[PieceStream]  # of each lane
    echo: Piece | None = None  # the prompt, which is given out first
    n_read: int = 0  # tokens of the request that are in the texts

    def read(self) -> Part | None:
        """What was drawn since the last time, as text; None while that is nothing."""
        request = self.request
        drawn = request.text_ids()
        while self.n_read < len(drawn) and not self.texts[0].is_stopped:
            for lane, text in enumerate(self.texts):
                text.put(self._token(self.n_read, lane))
            self.n_read += 1
        if self.texts[0].is_stopped:
            request.cancel()
        pieces = [text.take() if request.is_active else text.finish() for text in self.texts]
        if self.echo is not None:
            pieces[0] = Piece(self.echo.text + pieces[0].text, self.echo.tokens + pieces[0].tokens)
            self.echo = None
        if request.is_active and not any(piece.text for piece in pieces):
            return None
        return Part(self.index, pieces, FINISH_REASONS[request.finish_reason])

    def _token(self, at: int, lane: int) -> Drawn:
        """Token `at` of a lane."""
        request = self.request
        is_one = len(self.texts) == 1

        def of_lane(values: Sequence[Any]) -> Any:
            return values[at] if is_one else values[at][lane]

        if request.sampling.logprobs is None:
            return Drawn(of_lane(request.ids))
        return Drawn(of_lane(request.ids), of_lane(request.logprobs), of_lane(request.top_logprobs))


FINISH_REASONS = {"": None, "end": "stop", "stop": "stop", "cancelled": "stop", "length": "length"}


@dataclass(eq=False)
class Job:
    """A request in the engine.

    on_part: is called with each part of it, with the last one's finish_reason, and with an ApiError if the engine
    fails; in the engine's thread.
    """

    served: ServedModel
    request: Request
    prompts: Sequence[np.ndarray]  # (K, T) each
    on_part: Callable[[Part | ApiError], None]
    choices: list[Choice] = field(default_factory=list)
    n_joined: int = 0  # choices that are in the batch or done
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        asked, n = self.request.sampling, self.request.n
        sampling = SamplingParams(
            max_new_tokens=max(1, asked.max_tokens),
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
            end_ids=() if self.request.ignore_eos else self.served.end_ids,
            vocab_size=self.served.vocab_size,
            logprobs=self.request.top_logprobs,
        )
        uniform = uniform_draws(asked.seed, SAMPLE)
        for index in range(self.request.n_choices):
            drawing = generation.Request(self.prompts[index // n], sampling, uniform, number=index % n)
            if not asked.max_tokens:
                drawing.finish_reason = "length"
            self.choices.append(Choice(index, drawing, self._texts()))

    def read_prompts(self) -> None:
        """Let the choices begin with their prompts, if the request asks for it; with their log-probabilities."""
        if not self.request.echo:
            return
        n, top = self.request.n, self.request.top_logprobs
        for number, ids in enumerate(self.prompts):
            tokens = [] if top is None else score_prompt(self.served, ids[0], top)
            prompt = self.request.prompts[number]
            text = prompt if isinstance(prompt, str) else self.served.decode(ids[0])
            for choice in self.choices[number * n : (number + 1) * n]:
                choice.echo = Piece(text, tokens)

    def _texts(self) -> list[PieceStream]:
        """Of each lane."""
        continues_text = self.request.messages is None
        return [
            PieceStream(
                TextStream(lane.tokenizer, self.request.stop, continues_text=continues_text, offset=lane.offset)
            )
            for lane in self.served.lanes
        ]

    @property
    def usage(self) -> Usage:
        drawn = sum(choice.n_read + (choice.request.finish_reason == "end") for choice in self.choices)
        return Usage(sum(prompt.shape[1] for prompt in self.prompts), drawn)

    def cancel(self) -> None:
        """End it before the next step."""
        self.is_cancelled = True
        for choice in self.choices:
            choice.request.cancel()


def score_prompt(served: ServedModel, prompt: np.ndarray, top: int) -> list[Drawn]:
    """The tokens of a prompt, (T,), with their log-probabilities, but for the first, and the `top` likeliest ones."""
    model: Any = served.model
    ids = torch.from_numpy(prompt).to(generation.device_of(model))
    cache = generation.KVCache(model, 1, len(ids))
    tokens = [Drawn(int(ids[0]))]
    for start in range(0, len(ids) - 1, CHUNK):
        read = ids[start : min(start + CHUNK, len(ids) - 1)]
        logits = model(read[None], cache=cache, position_ids=cache.advance(len(read)))[0].float()  # (C, V)
        ((_, choices),) = model.vocabulary.next_token_logits(logits, read)
        logprobs = choices[:, : served.vocab_size].log_softmax(-1)
        drawn = ids[start + 1 : start + 1 + len(read), None]
        likeliest = logprobs.topk(min(top, logprobs.size(-1)), dim=-1)
        columns = (drawn[:, 0], logprobs.gather(1, drawn)[:, 0], likeliest.indices, likeliest.values)
        for token, logprob, top_ids, top_logprobs in zip(*(column.tolist() for column in columns), strict=True):
            tokens.append(Drawn(token, logprob, list(zip(top_ids, top_logprobs, strict=True))))
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# one model


class Batch:
    """The completions that a model draws together, and the jobs that wait to join them."""

    def __init__(self, served: ServedModel, max_batch: int):
        self.served, self.max_batch = served, max_batch
        self.waiting: deque[Job] = deque()
        self.running: list[tuple[Job, Choice]] = []
        self.decoder = Decoder(served.model)
        self.drawn: deque[tuple[float, int]] = deque()  # when a step ended, and its tokens

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.running)

    def tokens_per_second(self) -> float:
        """Over the last seconds."""
        now = time.monotonic()
        drawn = [(ended, count) for ended, count in self.drawn.copy() if now - ended < SPEED_WINDOW]
        return sum(count for _, count in drawn) / (now - drawn[0][0]) if len(drawn) > 1 else 0.0

    def take(self) -> list[tuple[Job, Choice]]:
        """The waiting choices for which there is room."""
        room = self.max_batch - len(self.running)
        taken: list[tuple[Job, Choice]] = []
        while self.waiting and len(taken) < room:
            job = self.waiting[0]
            if not job.is_cancelled:
                new = job.choices[job.n_joined : job.n_joined + room - len(taken)]
                taken += [(job, choice) for choice in new]
                job.n_joined += len(new)
            if job.is_cancelled or job.n_joined == len(job.choices):
                self.waiting.popleft()
        return taken

    def step(self, joining: list[tuple[Job, Choice]]) -> None:
        """Let choices join, draw a token of each, and hand out what was drawn."""
        self.running += joining
        for job in dict.fromkeys(job for job, choice in joining if choice.index == 0):
            job.read_prompts()
        drawing = [choice.request for _, choice in joining if choice.request.is_active]
        if drawing:
            self.decoder.join(drawing)
        if self.decoder.any_active:
            self.decoder.advance(look_often=True)
        n_drawn = 0
        for job, choice in self.running:
            n_drawn += len(choice.request.text_ids()) - choice.n_read
            part = None if job.is_cancelled else choice.read()
            if part is not None:
                job.on_part(part)
        self.running = [(job, choice) for job, choice in self.running if choice.request.is_active]
        self.drawn.append((time.monotonic(), n_drawn))
        while self.drawn[0][0] < time.monotonic() - 2 * SPEED_WINDOW:
            self.drawn.popleft()

    def fail(self, error: ApiError) -> None:
        """End what is running with an error, and begin anew."""
        for job in {id(job): job for job, _ in self.running}.values():
            job.cancel()
            job.on_part(error)
        self.running = []
        self.decoder = Decoder(self.served.model)


# ---------------------------------------------------------------------------------------------------------------------
# all of them


class Engine:
    """Draws for all jobs in a thread of its own."""

    def __init__(self, models: Sequence[ServedModel], *, max_batch: int, max_queue: int):
        """max_batch: completions that a model draws together; max_queue: jobs that may wait, of all models."""
        self.models = {served.name: served for served in models}
        self.max_batch, self.max_queue = max_batch, max_queue
        self.changed = threading.Condition()  # guards what follows, but for what only the thread touches
        self.batches = {served.name: Batch(served, max_batch) for served in models}
        self.is_stopping = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End all jobs, and the thread after the step that it is at."""
        with self.changed:
            self.is_stopping = True
            self.changed.notify()

    def submit(self, job: Job) -> Job:
        """Put a job into the queue. Raises ApiError when that is full."""
        with self.changed:
            if self.is_stopping:
                raise ApiError(503, "the server is stopping")
            if self.n_waiting >= self.max_queue:
                raise ApiError(429, f"{self.n_waiting} requests wait already; try again later", code="queue_full")
            self.batches[job.served.name].waiting.append(job)
            self.changed.notify()
        return job

    @property
    def n_waiting(self) -> int:
        """Jobs of which nothing is drawn yet."""
        return sum(len(batch.waiting) for batch in self.batches.values())

    def position(self, job: Job) -> int:
        """How many jobs are before this one in its queue, itself included; 0: it runs."""
        with self.changed:
            waiting = list(self.batches[job.served.name].waiting)
        return waiting.index(job) + 1 if job in waiting and not job.n_joined else 0

    def state(self) -> dict[str, dict[str, Any]]:
        """Of each model: completions that run, jobs that wait, tokens per second."""
        with self.changed:
            return {
                name: {
                    "running": sum(choice.request.is_active for _, choice in batch.running),
                    "waiting": len(batch.waiting),
                    "tokens_per_second": round(batch.tokens_per_second(), 1),
                }
                for name, batch in self.batches.items()
            }

    def _run(self) -> None:
        with ExitStack() as stack:
            for served in self.models.values():
                stack.enter_context(decoding(served.model))
            while not self.is_stopping:
                self._turn()
        for batch in self.batches.values():
            for job in batch.waiting:
                batch.running += [(job, choice) for choice in job.choices]
            batch.fail(ApiError(503, "the server is stopping"))

    def _turn(self) -> None:
        """A step of each model that has something to do; waits while none has."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_stopping or not all(batch.is_idle for batch in self.batches.values()))
            joining = {name: batch.take() for name, batch in self.batches.items()}
        for name, batch in self.batches.items():
            if not (joining[name] or batch.running):
                continue
            try:
                batch.step(joining[name])
            except Exception as error:
                traceback.print_exc()
                batch.fail(explain(error))


def explain(error: Exception) -> ApiError:
    """What a client gets of an error in a step."""
    if is_out_of_memory(error):
        return ApiError(503, "the device has not enough memory for this batch; try again, or a shorter prompt")
    return ApiError(500, f"the model failed: {type(error).__name__}; the server's log has more")
