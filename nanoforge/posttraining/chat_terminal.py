"""A conversation in the terminal: what is typed becomes a message or a command, and replies stream.

Where standard input is no terminal, each line is a message, and nothing but the replies is written to standard output.
"""

import dataclasses
import os
import re
import select
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nanoforge.console import paint, plural, print_to_stderr
from nanoforge.errors import UserError, did_you_mean
from nanoforge.models.token_table import format_tokens
from nanoforge.posttraining.conversation import Conversation, Reply

DIM = 2
COMMAND = re.compile(r"/([a-z_]+|\?)(?:\s+(.*))?", re.DOTALL)
CONTINUED = "\\"
PASTE_SECONDS = 0.02  # the lines of a paste follow each other sooner


class Setting(NamedTuple):
    """A sampling parameter that a command sets."""

    field: str  # of SamplingParams
    kind: type
    low: float
    high: float
    description: str


SETTINGS = {
    "temp": Setting("temperature", float, 0, 1e6, "sampling temperature (0: greedy)"),
    "top_k": Setting("top_k", int, 0, 1e9, "keep the k likeliest tokens (0: all)"),
    "top_p": Setting("top_p", float, 1e-9, 1, "keep the likeliest tokens that together reach probability p (1: all)"),
    "min_p": Setting("min_p", float, 0, 1, "keep tokens at least p times as likely as the likeliest (0: all)"),
    "repetition_penalty": Setting("repetition_penalty", float, 1e-9, 1e6, "above 1: tokens are repeated less (1: off)"),
    "max_new_tokens": Setting("max_new_tokens", int, 1, 1e9, "maximum length of a reply"),
}
ALIASES = {"temperature": "temp", "exit": "quit", "bye": "quit", "?": "help", "clear": "reset", "regenerate": "retry"}


@dataclass
class ChatTerminal:
    """Reads messages and commands until the input ends, and writes replies."""

    conversation: Conversation
    stream: bool = True  # print a reply while it is drawn
    own_files: set[Path] = field(default_factory=set)  # saved or loaded here, so they may be replaced
    is_terminal: bool = field(default_factory=lambda: sys.stdin.isatty())
    typed_ahead: list[str] = field(default_factory=list)  # a command that was read as the end of a paste

    def run(self) -> None:
        """Until Ctrl-D, /quit or the end of standard input. Raises UserError where it is no terminal."""
        if self.is_terminal:
            enable_line_editing()
            self.note("/help lists the commands. Ctrl-C stops a reply, Ctrl-D ends.")
        while (text := self.read_message()) is not None:
            command = COMMAND.fullmatch(text.strip())
            try:
                if command is None or not self.is_terminal:
                    self.reply(text)
                elif not self.obey(command[1], (command[2] or "").strip()):
                    return
            except UserError as error:
                if not self.is_terminal:
                    raise
                self.note(str(error))
            except OSError as error:
                if not self.is_terminal or not error.filename:
                    raise
                self.note(f"{error.filename}: {error.strerror}")

    def reply(self, text: str) -> None:
        """Say something, and print the reply."""
        on_text = print_now if self.stream else drop
        reply = self.conversation.reply(text, on_text)
        print("" if self.stream else reply.text, flush=True)
        if self.conversation.sampling.logprobs is not None:
            self.print_tokens(reply)
        if self.is_terminal and sys.stderr.isatty():
            self.note(self.describe(reply))
            if reply.request.finish_reason == "cancelled" and not reply.text:
                self.note("Nothing was said yet: the message is taken back.")

    def print_tokens(self, reply: Reply) -> None:
        request, tokenizer = reply.request, self.conversation.encoder.tokenizer
        contexts = {"": lambda token_id: tokenizer.decode_continuation([token_id])}
        print(format_tokens(request.ids, request.logprobs, request.top_logprobs, contexts), flush=True)

    def describe(self, reply: Reply) -> str:
        """How a reply was drawn, on a line."""
        n_tokens = len(reply.request.ids)
        parts = [plural(n_tokens, "token")]
        if reply.tokens_per_second:
            parts.append(f"{reply.tokens_per_second:.1f} tokens per second")
        conversation = self.conversation
        n_read = min(reply.n_prompt_tokens + n_tokens, conversation.block_size)
        parts.append(f"context {n_read:,} of {conversation.block_size:,}")
        reason = reply.request.finish_reason
        if reason == "cancelled":
            parts.append("stopped")
        elif reason == "length":
            parts.append("cut at max_new_tokens")
        return f"[{', '.join(parts)}]"

    def note(self, text: str) -> None:
        """Say something that is not the model's."""
        print_to_stderr(paint(text, DIM, sys.stderr))

    # input

    def read_message(self) -> str | None:
        """What is typed next, if it says something; None at the end. A line that ends in a backslash goes on, and so
        does one behind which more was pasted."""
        text = ""
        while not text.strip():
            try:
                text = self.read_line("> ")
                while self.goes_on(text):
                    text = f"{text.removesuffix(CONTINUED)}\n{self.read_line('... ')}"
            except EOFError:
                if self.is_terminal:
                    print(flush=True)
                return text if text.strip() else None
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                text = ""
                print(flush=True)
                self.note("Ctrl-D or /quit ends the conversation.")
        return text

    def goes_on(self, text: str) -> bool:
        """Whether the next line belongs to the message."""
        if not self.is_terminal or text.endswith(CONTINUED):
            return self.is_terminal
        if COMMAND.fullmatch(text) or not more_is_typed():
            return False
        following = self.read_line("")
        self.typed_ahead.append(following)
        return COMMAND.fullmatch(following) is None

    def read_line(self, prompt: str) -> str:
        if self.typed_ahead:
            return self.typed_ahead.pop()
        return input(prompt if self.is_terminal else "")

    # commands

    def obey(self, name: str, argument: str) -> bool:
        """Do what a command says; whether the conversation goes on. Raises UserError."""
        name = ALIASES.get(name, name)
        if name == "quit":
            return False
        if name in SETTINGS:
            self.set(SETTINGS[name], argument)
        elif name in COMMANDS:
            COMMANDS[name].run(self, argument)
        else:
            hint = did_you_mean(name, [*COMMANDS, *SETTINGS, *ALIASES])
            raise UserError(f"/{name}: no such command{hint or '; /help lists them'}")
        return True

    def set(self, setting: Setting, argument: str) -> None:
        """Set or show a sampling parameter. Raises UserError."""
        conversation = self.conversation
        if argument:
            value = parse_number(argument, setting.kind, setting.low, setting.high)
            conversation.sampling = dataclasses.replace(conversation.sampling, **{setting.field: value})
        self.note(f"{setting.field} = {getattr(conversation.sampling, setting.field)}")

    def set_seed(self, argument: str) -> None:
        if argument:
            self.conversation.seed = parse_number(argument, int, 0, 2**32 - 1)
            self.conversation.n_replies = 0
        self.note(f"seed = {self.conversation.seed}")

    def help(self, argument: str) -> None:
        lines = [(f"/{name} {command.argument}", command.description) for name, command in COMMANDS.items()]
        lines += [(f"/{name} [VALUE]", setting.description) for name, setting in SETTINGS.items()]
        lines.append(("/quit", "end, as Ctrl-D does"))
        lines.append(("a line that ends in \\", "goes on in the next line; a pasted block is one message"))
        width = max(len(name) for name, _ in lines)
        self.note("\n".join(f"{name:{width}}  {description}" for name, description in lines))

    def reset(self, argument: str) -> None:
        self.conversation.reset()
        self.note("the conversation begins anew" + (", with its system message" if self.conversation.system else ""))

    def undo(self, argument: str) -> None:
        text = self.conversation.undo()
        self.note(f"taken back: {text.splitlines()[0]:.60}")

    def retry(self, argument: str) -> None:
        if self.conversation.sampling.temperature == 0:
            self.note("temperature is 0: the reply is the likeliest one, as before")
        self.reply(self.conversation.undo())

    def set_system(self, argument: str) -> None:
        if argument:
            self.conversation.set_system(argument)
        self.note(f"system: {self.conversation.system or 'none, or the chat template has its own'}")

    def save(self, argument: str) -> None:
        path = file_of(argument)
        if path.exists() and path not in self.own_files:
            raise UserError(f"{path}: exists; name another file")
        self.conversation.save(path)
        self.own_files.add(path)
        self.note(f"{plural(len(self.conversation.messages), 'message')} in {path}")

    def load(self, argument: str) -> None:
        path = file_of(argument)
        self.conversation.load(path)
        self.own_files.add(path)
        self.note(f"{plural(len(self.conversation.messages), 'message')} of {path}")


class Command(NamedTuple):
    argument: str
    description: str
    run: Callable[[ChatTerminal, str], None]


COMMANDS = {
    "help": Command("", "this list", ChatTerminal.help),
    "reset": Command("", "forget the conversation; the system message stays", ChatTerminal.reset),
    "undo": Command("", "take the last message and its reply back", ChatTerminal.undo),
    "retry": Command("", "draw the last reply anew", ChatTerminal.retry),
    "system": Command("[TEXT]", "show or set the system message", ChatTerminal.set_system),
    "save": Command("FILE", "write the messages as a row of JSONL, which training reads, too", ChatTerminal.save),
    "load": Command("FILE", "go on with the messages of a file", ChatTerminal.load),
    "seed": Command("[N]", "show or set the random seed", ChatTerminal.set_seed),
}


def parse_number(text: str, kind: type, low: float, high: float) -> Any:
    """A number within [low, high]. Raises UserError."""
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"{text}: not {'a whole number' if kind is int else 'a number'}") from None
    if not low <= value <= high:
        raise UserError(f"{text}: not between {low:g} and {high:g}")
    return value


def file_of(argument: str) -> Path:
    """The file that a command names. Raises UserError."""
    if not argument:
        raise UserError("name a file")
    return Path(argument).expanduser()


def print_now(text: str) -> None:
    print(text, end="", flush=True)


def drop(text: str) -> None:
    """A reply that is printed once it is whole."""


def enable_line_editing() -> None:
    """Arrow keys and a history, where Python has readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


def more_is_typed() -> bool:
    """Whether more lines wait: they were pasted. Windows can't say."""
    return os.name == "posix" and bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])
