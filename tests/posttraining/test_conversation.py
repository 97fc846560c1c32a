"""Conversations: what the model reads of them, what a reply changes, and a session in a terminal, through a pty."""

import itertools
import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_model

from nanoforge.data import tables
from nanoforge.data.tokenization import ByteTokenizer
from nanoforge.errors import UserError
from nanoforge.models.generation import LookedAt, Request, SamplingParams, TorchEngine, complete
from nanoforge.posttraining.chat_terminal import ChatTerminal
from nanoforge.posttraining.conversation import Conversation
from nanoforge.posttraining.examples import ExampleEncoder, extend_tokenizer

TURN = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
TOKENIZER = extend_tokenizer(ByteTokenizer(), [TURN])


class Script:
    """An engine that says what is written for it, and remembers what it read."""

    def __init__(self, *replies: str, seconds_a_token: float = 0.0):
        self.replies = list(replies)
        self.prompts: list[str] = []
        self.keys: list[float] = []
        self.seconds_a_token = seconds_a_token

    def complete(self, requests: Any, on_token: Any = None) -> None:
        (request,) = requests
        self.prompts.append(TOKENIZER.decode(request.prompt[0].tolist()))
        self.keys.append(float(request.uniform(np.array(0), np.array(0))))
        text = self.replies.pop(0) if self.replies else f"reply {len(self.prompts)}"
        for token in (*TOKENIZER.encode(text).tolist(), TOKENIZER.eos_id):
            if token == ord("\x03"):
                raise KeyboardInterrupt
            time.sleep(self.seconds_a_token)
            request.add(LookedAt([[[token]]], [], [], [], []), 0)
            if request.finish_reason != "end":
                on_token(token)
            if not request.is_active:
                return


def converse(engine: Any, block_size: int = 1000, max_new_tokens: int = 50, **more: Any) -> Conversation:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, end_ids=TOKENIZER.end_ids)
    return Conversation(engine, ExampleEncoder(TOKENIZER, block_size), sampling, seed=3, **more)


def say(conversation: Conversation, text: str) -> str:
    pieces: list[str] = []
    reply = conversation.reply(text, pieces.append)
    assert "".join(pieces) == reply.text
    return reply.text


def spell(*messages: str) -> str:
    """What the model reads: system, user, assistant, ... and where it is to reply."""
    roles = ["<|system|>"] if len(messages) % 2 == 0 else []
    roles += ["<|user|>", "<|assistant|>"] * len(messages)
    end = TOKENIZER.decode([TOKENIZER.eos_id])
    return "".join(f"{role}{text}{end}" for role, text in zip(roles, messages, strict=False)) + "<|assistant|>"


def test_the_model_reads_the_messages_so_far() -> None:
    engine = Script("one", "two<stop>never", "", "four")
    conversation = converse(engine, stop=["<stop>", "<st"])
    conversation.set_system("S")
    assert [say(conversation, text) for text in "abc"] == ["one", "two", ""]
    assert engine.prompts == [spell("S", "a"), spell("S", "a", "one", "b"), spell("S", "a", "one", "b", "two", "c")]
    assert conversation.undo() == "c"
    conversation.set_system("")
    say(conversation, "d")
    assert engine.prompts[-1] == spell("a", "one", "b", "two", "d")
    assert len(set(engine.keys)) == 4, "each reply has its own random numbers"
    conversation.set_system("T")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "T"}]
    with pytest.raises(UserError):
        conversation.undo()


def test_the_oldest_turns_are_left_out_once_the_context_is_full() -> None:
    engine, reports = Script(), []
    conversation = converse(engine, block_size=200, max_new_tokens=40, report=reports.append)
    conversation.set_system("SYSTEM")
    firsts = []
    for number in range(30):
        say(conversation, f"message {number}")
        ids = ExampleEncoder(TOKENIZER, 200).encode_prompt({"prompt": []})
        assert len(TOKENIZER.encode_with_control(engine.prompts[-1]).ids) + len(ids) - 1 <= 160
        assert engine.prompts[-1].startswith("<|system|>SYSTEM") and f"message {number}" in engine.prompts[-1]
        firsts.append(int(re.search(r"message (\d+)", engine.prompts[-1])[1]))  # type: ignore[index]
    changes = sum(before != after for before, after in itertools.pairwise(firsts))
    assert firsts == sorted(firsts) and firsts[-1] > 20
    assert len(reports) == changes < 15, "it says so once each time, and several turns are left out at a time"
    assert len(conversation.messages) == 61 and "200" in reports[0]
    conversation.set_system("")
    say(conversation, "again")
    assert engine.prompts[-1].startswith(f"<|user|>message {firsts[-1]}")
    say(conversation, "long " * 60)
    assert engine.prompts[-1].startswith("<|user|>long") and len(reports) == changes + 2


def test_an_interrupt_keeps_what_was_said() -> None:
    conversation = converse(Script("half a\x03", "\x03", "fine"))
    assert say(conversation, "a") == "half a"
    assert say(conversation, "b") == ""
    assert conversation.messages[1:] == [{"role": "assistant", "content": "half a"}], "b is taken back"
    assert say(conversation, "c") == "fine"


def test_a_saved_conversation_is_a_row_to_train_on(tmp_path: Path) -> None:
    conversation = converse(Script("jä"))
    conversation.set_system("S")
    say(conversation, "a\nb")
    path = tmp_path / "chat.jsonl"
    conversation.save(path)
    assert path.read_text().count("\n") == 1
    (row,) = tables.read_rows(path)
    encoder = ExampleEncoder(TOKENIZER, 100)
    example = encoder.encode(row, "prompt_completion")
    learned = example.sequences[0].ids[example.sequences[0].loss_mask]
    assert TOKENIZER.decode(learned[:-1].tolist()) == "jä"
    again = converse(Script())
    again.load(path)
    assert again.messages == conversation.messages and again.system == "S"
    for text in ('{"messages": []}', '{"text": "a"}', '{"messages": [{"role": "user", "content": "a"}]}', "{}\n{}"):
        path.write_text(text)
        with pytest.raises(UserError):
            again.load(path)
    assert again.messages == conversation.messages


def test_turns_read_only_what_is_new_and_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an engine that reads every prompt anew, also after a turn was taken back."""
    shape = {"vocab_sizes": (TOKENIZER.vocab_size,), "block_size": 300, "position": "rope"}
    model = tiny_model(**shape).eval()

    class Fresh:
        def complete(self, requests: list[Request], on_token: Callable[[Any], None] | None = None) -> None:
            complete(model, requests, on_token=on_token)

    n_read: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **more: (n_read.append(idx.size(1)), forward(idx, **more))[1])
    kept, fresh = (converse(engine, block_size=300, max_new_tokens=9) for engine in (TorchEngine(model), Fresh()))
    for turn in range(4):
        prefills = []
        for conversation in (kept, fresh):
            n_read.clear()
            say(conversation, f"turn {turn}")
            prefills.append(n_read[0])
            if turn == 2:
                conversation.undo()
    assert kept.messages == fresh.messages
    assert prefills[0] < prefills[1] / 2, "only the last message and what the reply is spelled with"


# ---------------------------------------------------------------------------------------------------------------------
# the terminal


class Session:
    """A ChatTerminal in a process with a terminal of its own."""

    def __init__(self, terminal: Callable[[], ChatTerminal]):
        self.output = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            code = 1
            try:
                sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
                signal.signal(signal.SIGINT, signal.default_int_handler)
                terminal().run()
                code = 0
            finally:
                os._exit(code)

    def expect(self, text: str) -> str:
        """What is written up to this text."""
        end = time.monotonic() + 20
        while text not in self.output:
            assert select.select([self.fd], [], [], max(0, end - time.monotonic()))[0], f"{text!r} in {self.output!r}"
            try:
                data = os.read(self.fd, 4096)
            except OSError:  # the terminal is closed
                data = b""
            assert data, f"{text!r} in {self.output!r}"
            self.output += re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]|\r", "", data.decode())
        before, _, self.output = self.output.partition(text)
        return before

    def wait(self) -> int:
        """The exit status of a session that ends."""
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def ask(self, line: str, answer: str) -> str:
        """Type a line; what is written up to the answer. Waits for the next prompt."""
        self.send(line + "\n")
        before = self.expect(answer)
        self.expect("> ")
        return before


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Session]]:
    monkeypatch.chdir(tmp_path)
    sessions: list[Session] = []

    def begin(*replies: str) -> Session:
        engine = Script(*replies, seconds_a_token=0.002)
        sessions.append(Session(lambda: ChatTerminal(converse(engine))))
        sessions[-1].expect("> ")
        return sessions[-1]

    yield begin
    for session in sessions:
        os.close(session.fd)
        if session.pid:
            os.kill(session.pid, signal.SIGKILL)
            session.wait()


def test_a_session_in_a_terminal(start: Callable[..., Session], tmp_path: Path) -> None:
    session = start("one", "two", "three", "x" * 1000, "after")
    session.ask("hello", "one\n[4 tokens")
    assert "/undo" in session.ask("/help", "/quit")
    session.send("first\\\n")
    session.expect("... ")
    session.send("second\n")
    session.expect("two\n[4 tokens")
    session.expect("> ")
    session.ask("/temp 0.5", "temperature = 0.5")
    session.ask("/temp 1e99", "not between")
    session.ask("/top_k x", "not a whole number")
    session.ask("/tmep 1", "did you mean temp")
    session.ask("/save chat.jsonl", "4 messages in chat.jsonl")
    session.ask("/retry", "three\n[6 tokens")
    session.ask("/save other.jsonl", "4 messages")
    session.send("long\n")
    session.expect("xxxxx")
    session.send("\x03")
    session.expect("stopped]")
    session.expect("> ")
    time.sleep(0.2)  # an interrupt between prompt and reading waits for the next key
    session.send("half a line\x03")
    session.expect("Ctrl-D")
    session.expect("> ")
    session.ask("/undo", "taken back: long")
    session.ask("/system Be brief.", "system: Be brief.")
    session.ask("/load chat.jsonl", "4 messages of chat.jsonl")
    session.ask("/save missing/chat.jsonl", "No such file")
    session.ask("pasted\nin lines", "after\n[6 tokens")
    session.ask("/save chat.jsonl", "6 messages")
    session.send("\x04")
    session.expect("\n")
    assert session.wait() == 0
    users = [m["content"] for m in json.loads((tmp_path / "chat.jsonl").read_text())["messages"] if m["role"] == "user"]
    assert users == ["hello", "first\nsecond", "pasted\nin lines"]
    assert json.loads((tmp_path / "other.jsonl").read_text())["messages"][-1]["content"] == "three"


def test_a_file_that_was_there_is_not_replaced(start: Callable[..., Session], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    session = start()
    session.ask("/save notes.txt", "exists")
    session.send("/quit\n")
    assert session.wait() == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
