"""Chat templates: messages to the text and ids that a model was trained on, by its own jinja template.

    template = ChatTemplate(tokenizer)
    template.encode([{"role": "user", "content": "Hi"}], add_generation_prompt=True)      # ids of a prompt
    template.encode_with_mask(messages)                       # ids of a chat, and which of them are the assistant's

A template is rendered in jinja's sandbox as transformers does, with the same functions and variables. Control tokens
that it writes become control tokens. Those that a message spells stay text: a mark within each keeps them apart.

The marks are lone surrogates, which no text of a row contains. They are put around or into texts before rendering, and
taken out of what is rendered.
"""

import copy
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanoforge import files
from nanoforge.data.tokenization import Encoding, Tokenizer, control_encoding, join_encodings, split_control
from nanoforge.errors import UserError

IN_CONTROL = "\ud800"  # after the first character of a control token's name that a message spells
GENERATION_START, GENERATION_END = "\ud801", "\ud802"  # of what the template says that the assistant writes
CONTENT_START, CONTENT_END = "\ud803", "\ud804"  # of an assistant's message, without spaces at its ends
MARKS = re.compile("[\ud800-\ud804]")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field of a message; templates read the first
DATE = re.compile(r"\{# begun on (\d{4}-\d\d-\d\d) #\}\n")  # in a run's template: its today
SAFE_JINJA = (3, 1, 6)  # templates escape the sandbox of older ones

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # [start, stop) of a text

# ---------------------------------------------------------------------------------------------------------------------
# jinja


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> Any:
    """A jinja Template, in the environment that transformers gives templates. Raises UserError."""
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        raise UserError("a chat template needs a package: pip install jinja2") from None
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < SAFE_JINJA:
        raise UserError(f"a chat template needs a newer jinja2 than {jinja2.__version__}: pip install -U jinja2")

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: marks what the assistant writes."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marked = [template_data(GENERATION_START), *body, template_data(GENERATION_END)]
            return nodes.Scope(marked).set_lineno(line)

    def template_data(text: str) -> nodes.Output:
        return nodes.Output([nodes.TemplateData(text)])

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    dated = DATE.search(source)
    environment.globals["strftime_now"] = lambda form: (
        datetime.fromisoformat(dated[1]) if dated else datetime.now().astimezone()
    ).strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template, line {error.lineno}: {error.message}") from None


def to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  as templates call it
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Jinja's own filter escapes what HTML would read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# ---------------------------------------------------------------------------------------------------------------------
# marks


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with its texts changed, but for the keys of objects."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_texts(item, change) for item in value]
    return value


def mark_core(text: str) -> str:
    """The text with marks around all but the spaces at its ends, which templates cut off."""
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    return f"{text[:start]}{CONTENT_START}{core}{CONTENT_END}{text[start + len(core) :]}"


class Rendered(NamedTuple):
    """What a template has written."""

    marked: str  # with IN_CONTROL, and no other marks
    places: Mapping[str, list[int]]  # mark -> where in the text

    @property
    def text(self) -> str:
        return self.marked.replace(IN_CONTROL, "")

    def generation_spans(self) -> list[Span]:
        """The characters between generation marks. Raises UserError."""
        starts, stops = self.places[GENERATION_START], self.places[GENERATION_END]
        if len(starts) != len(stops):
            raise UserError("the chat template cuts a text within its generation marks")
        return list(zip(starts, stops, strict=True))


def read_marks(text: str) -> Rendered:
    """A rendered text, with its marks apart."""
    places: dict[str, list[int]] = {
        mark: [] for mark in (IN_CONTROL, GENERATION_START, GENERATION_END, CONTENT_START, CONTENT_END)
    }
    for number, match in enumerate(MARKS.finditer(text)):
        places[match[0]].append(match.start() - number)
    return Rendered(re.sub("[\ud801-\ud804]", "", text), places)


# ---------------------------------------------------------------------------------------------------------------------
# the template of a tokenizer


class Chat(NamedTuple):
    """Messages and variables as a template gets them."""

    messages: list[dict[str, Any]]
    variables: dict[str, Any]

    def until(self, n: int) -> "Chat":
        """Its first n messages."""
        return Chat(self.messages[:n], self.variables)


class EncodedChat(NamedTuple):
    ids: list[int]
    assistant_mask: list[bool]  # which of them the assistant writes


@dataclass(frozen=True)
class ChatTemplate:
    """Messages to ids by the template of a tokenizer.

    options: further variables of the template, such as `tools` or `enable_thinking`.
    """

    tokenizer: Tokenizer

    @functools.cached_property
    def control_names(self) -> re.Pattern[str]:
        """Finds the control tokens that a text spells."""
        names = sorted(self.tokenizer.control_tokens, key=len, reverse=True)
        return re.compile("|".join(re.escape(name) for name in names if len(name) > 1) or "(?!)")

    def mark_control(self, text: str) -> str:
        """The text with a mark within each control token that it spells, also within those of which another is left."""
        while self.control_names.search(text):
            text = self.control_names.sub(lambda match: match[0][0] + IN_CONTROL + match[0][1:], text)
        return text

    @functools.cached_property
    def variables(self) -> dict[str, str]:
        """bos_token, eos_token and others, as the template calls them."""
        names = {token: name for name, token in self.tokenizer.control_tokens.items()}
        known = {"bos_token": self.tokenizer.bos_id, "eos_token": self.tokenizer.eos_id}
        by_id = {variable: names[token] for variable, token in known.items() if token in names}
        return {**by_id, **self.tokenizer.special_tokens}

    @property
    def has_generation_marks(self) -> bool:
        """Whether the template says itself what the assistant writes."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.tokenizer.chat_template) is not None

    def encode(
        self, messages: Messages, options: Mapping[str, Any] | None = None, *, add_generation_prompt: bool = False
    ) -> list[int]:
        """The ids of a chat. add_generation_prompt: it ends where the assistant begins to write. Raises UserError."""
        rendered = self.render(messages, options, add_generation_prompt=add_generation_prompt)
        return self.encode_rendered(rendered).ids.tolist()

    def encode_with_mask(self, messages: Messages, options: Mapping[str, Any] | None = None) -> EncodedChat:
        """The ids of a chat, and which of them the assistant writes. Raises UserError.

        As in transformers, these are the tokens that the template's generation marks touch. Without marks, they are
        those that an assistant's message adds to the chat before it with a generation prompt.
        """
        chat = self.prepare(messages, options)
        rendered = self.write(chat)
        encoding = self.encode_rendered(rendered)
        starts, stops = encoding.offsets.T
        mask = np.zeros(len(encoding.ids), dtype=bool)
        if self.has_generation_marks:
            for start, stop in rendered.generation_spans():
                mask |= (starts < stop) & (stops > start)
        else:
            for start, stop in self.assistant_spans(chat, rendered.text):
                mask |= (stops > start) & (stops <= stop) & (starts < stop)
        return EncodedChat(encoding.ids.tolist(), mask.tolist())

    def render(
        self,
        messages: Messages,
        options: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = False,
        mark_assistant: bool = False,
    ) -> Rendered:
        """The text of a chat. mark_assistant: with marks around what the assistant says. Raises UserError."""
        chat = self.prepare(messages, options)
        return self.write(chat, add_generation_prompt=add_generation_prompt, mark_assistant=mark_assistant)

    def prepare(self, messages: Messages, options: Mapping[str, Any] | None) -> Chat:
        """What the template gets, with marks in the control tokens that texts spell."""
        prepared = map(prepare_message, messages)
        marked, variables = map_texts((list(prepared), dict(options or {})), self.mark_control)
        return Chat(marked, {"tools": None, "documents": None, **self.variables, **variables})

    def write(self, chat: Chat, *, add_generation_prompt: bool = False, mark_assistant: bool = False) -> Rendered:
        """`render`, of a chat that is prepared."""
        template = compile_template(self.tokenizer.chat_template)
        messages = [mark_reply(message) for message in chat.messages] if mark_assistant else chat.messages
        try:
            text = template.render(messages=messages, add_generation_prompt=add_generation_prompt, **chat.variables)
        except Exception as error:  # whatever a template does, with messages that it does not expect
            raise UserError(f"the chat template refuses the messages: {error}") from None
        return read_marks(text)

    def render_prefix(self, messages: Messages) -> str:
        """The marked text of a chat up to the end of its last message, the assistant's, which may go on. Raises
        UserError."""
        rendered = self.render(messages, mark_assistant=True)
        if not rendered.places[CONTENT_END]:
            raise UserError("the chat template does not write the beginning of the assistant's message as it is")
        content = messages[-1]["content"]
        stop = rendered.places[CONTENT_END][-1]
        spaces = content[len(content.rstrip()) :]
        if rendered.text.startswith(spaces, stop):
            stop += len(spaces)
        return rendered.marked[: stop + sum(place <= stop for place in rendered.places[IN_CONTROL])]

    def encode_rendered(self, rendered: Rendered) -> Encoding:
        """The ids of what the template has written."""
        if not rendered.places[IN_CONTROL]:
            return self.tokenizer.encode_with_control(rendered.marked)
        control = self.tokenizer.control_tokens
        parts = split_control(rendered.marked, control)  # a name with a mark in it is none
        texts = [part.replace(IN_CONTROL, "") for part in parts]
        encodings = []
        for number, text in enumerate(texts):
            is_control = number % 2 == 1
            encodings.append(control_encoding(control, text) if is_control else self.tokenizer.encode_inside(text))
        return join_encodings(encodings, [len(text) for text in texts])

    # what the assistant writes, of a template that does not say so

    def assistant_spans(self, chat: Chat, text: str) -> list[Span]:
        """The characters of the text of a chat that each assistant's message adds to the chat before it.

        A template may write a message in another way when others follow, as Qwen3 leaves out earlier reasoning. What
        follows the message's content then ends the span, as `ending_length` has it.
        """
        contents = self.content_spans(chat, text)
        spans = []
        for i, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            content = contents.get(i)
            start = content[0] if content else 0
            if i:
                before = self.write(chat.until(i), add_generation_prompt=True).text
                common = common_prefix_length(before, text)
                start = common if common == len(before) or not content else min(common, start)
            until = self.write(chat.until(i + 1), mark_assistant=True)
            stop = common_prefix_length(until.text, text)
            if content and until.places[CONTENT_END] and stop < len(until.text):
                ending = until.text[until.places[CONTENT_END][-1] :]
                stop = content[1] + self.ending_length(ending, text[content[1] :])
            spans.append((start, stop))
        return spans

    def ending_length(self, ending: str, following: str) -> int:
        """How much of the text that follows a message's content belongs to it: what it has in common with its ending,
        and its first control token, which may be another one.

        ending: what follows the content in a chat that ends there.
        """
        before_end, *names = split_control(ending, self.tokenizer.control_tokens)[:2]
        before, *others = split_control(following, self.tokenizer.control_tokens)[:2]
        end = len(before + others[0]) if names and others and before == before_end else 0
        return max(end, common_prefix_length(ending, following))

    def content_spans(self, chat: Chat, text: str) -> dict[int, Span]:
        """Where in the text of a chat the content of each assistant's message is, by the message's number; none where
        the template does not write each of them as it is."""
        speaking = [i for i, message in enumerate(chat.messages) if mark_reply(message) is not message]
        rendered = self.write(chat, mark_assistant=True)
        ends = rendered.places[CONTENT_END]
        if rendered.text != text or len(ends) != len(speaking):
            return {}
        starts = rendered.places[CONTENT_START]
        if len(starts) != len(ends):  # of a message that is cut at its start
            starts = ends
        return dict(zip(speaking, zip(starts, ends, strict=True), strict=True))


def common_prefix_length(ids: Sequence[Any], other: Sequence[Any]) -> int:
    """How many ids, or characters, are the same from the start."""
    if other[: len(ids)] == ids:
        return len(ids)
    for i, (own_id, other_id) in enumerate(zip(ids, other, strict=False)):
        if own_id != other_id:
            return i
    return min(len(ids), len(other))


def mark_reply(message: dict[str, Any]) -> dict[str, Any]:
    """The message with marks around what the assistant says in it; itself, if it says nothing."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str) or not content.strip():
        return message
    return {**message, "content": mark_core(content)}


def prepare_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it to a template: no empty fields, and its reasoning by all names."""
    known = {name: value for name, value in message.items() if value is not None}
    reasoning = next((known[name] for name in REASONING if name in known), None)
    if reasoning is None:
        return known
    return {"thinking": reasoning, **known, "reasoning_content": reasoning}


def with_chat_template(tokenizer: Tokenizer, path: str, variables: Mapping[str, Any] | None = None) -> Tokenizer:
    """The tokenizer with another template, or with variables that its template has unless a row says otherwise.

    path: a file, or a folder with chat_template.jinja; "": the tokenizer's own template. Raises UserError.
    """
    if not path and not variables:
        return tokenizer
    source = tokenizer.chat_template
    if path:
        file = Path(path).expanduser()
        source = files.read_text(file / "chat_template.jinja" if file.is_dir() else file)
    if not source:
        raise UserError("--chat_template_kwargs: the model has no chat template; name one with --chat_template")
    changed = copy.copy(tokenizer)
    changed.chat_template = "".join(map(set_variable, (variables or {}).items())) + source
    try:
        compile_template(changed.chat_template)
    except UserError as error:
        raise UserError(f"{f'--chat_template={path}' if path else '--chat_template_kwargs'}: {error}") from None
    return changed


def with_fixed_date(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a template in which it is today for good, so that a resumed run has the same prompts."""
    source = tokenizer.chat_template
    if "strftime_now" not in source or DATE.search(source):
        return tokenizer
    changed = copy.copy(tokenizer)
    changed.chat_template = f"{{# begun on {datetime.now().astimezone():%Y-%m-%d} #}}\n{source}"
    return changed


def set_variable(item: tuple[str, Any]) -> str:
    """A line of jinja that gives a variable its value, if it has none."""
    name, value = item
    return f"{{% set {name} = {name} if {name} is defined else {value!r} %}}\n"


def completion_end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a completion: the tokenizer's, and the one with which its chat template ends the assistant's
    message, which a model that was fine-tuned on a base model's tokenizer writes."""
    if not tokenizer.chat_template:
        return tokenizer.end_ids
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    try:
        rendered = ChatTemplate(tokenizer).render(chat, mark_assistant=True)
    except UserError:  # of a template for other messages
        return tokenizer.end_ids
    ends = rendered.places[CONTENT_END]
    control = tokenizer.control_tokens
    written = split_control(rendered.text[ends[-1] :], control)[1:2] if ends else []
    return tuple(dict.fromkeys((*tokenizer.end_ids, *(control[name] for name in written))))
