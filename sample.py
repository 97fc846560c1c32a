"""Sample from a trained model:

    python sample.py --out_dir=out/run --start="To be" --num_samples=3
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --temperature=0
    echo "Once" | python sample.py --out_dir=out/run --start=-
    python sample.py --out_dir=out/chat --start="Who are you?" --chat --system="Be brief."
    python sample.py --out_dir=out/chat --chat                        a conversation, line by line
    python sample.py --prompt_dir=outputs/detox/20260101_120000 --fields '{"toxic": "..."}'
    python sample.py --serve --out_dir out/run out/other              a page to try them, and an OpenAI-compatible API

A run folder is all it needs. All samples are drawn in one batch, and the first one is printed while it is drawn. Soft
prompts, also of several runs, are added to the base model that they were trained on.
"""

import dataclasses
import gc
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import configurator
from common_args import DeviceArgs, LoadArgs, device_errors, load_errors
from configurator import OnlyWith, Rules, arg, arg_group, arg_table, with_set

DEFAULT_START = ("\n",)
LLAMA_CPP = "llama.cpp"
WITHOUT_PROMPT_DIR = OnlyWith(
    "--init_from=resume and without --prompt_dir", lambda args: args.init_from == "resume" and not args.prompt_dir
)
CHAT = with_set("chat")
SERVE = with_set("serve")
NOT_SERVED = {  # argument -> what to do instead
    **dict.fromkeys(
        ("start", "chat", "system", "stop_at_end", "fields", "num_samples", "stream", "seed"), "each request says it"
    ),
    "prompt_dir": "serve the run of its base model",
    "compile": "leave it out",
    "engine": "leave it out",
}
NOT_GREEDY = OnlyWith("--temperature above 0", lambda args: args.temperature > 0)


@arg_group
class ModelArgs(LoadArgs):
    """model"""

    out_dir: tuple[str, ...] = arg(  # type: ignore[assignment]  # other commands take one
        ("out",), "run folder; several with --serve", needs=WITHOUT_PROMPT_DIR, split=False, path=True
    )
    prompt_dir: tuple[str, ...] = arg(
        (), "run folders of soft prompts: one for all --fields, or one for each of them", split=False, path=True
    )


@arg_group
class PromptArgs:
    """prompt"""

    start: tuple[str, ...] = arg(
        DEFAULT_START,
        "prompt: text, FILE:path, or - for standard input; several with --chat or --stop_at_end; "
        "one for each context of a multicontext model, equally long",
        split=False,
    )
    chat: bool = arg(
        False, "the prompt is a user's message, by the model's chat template; without --start: a conversation"
    )
    system: str = arg("", "the system message of a chat (none: the template's own, if it has one)", needs=CHAT)
    stop_at_end: bool = arg(False, "stop at the end-of-sequence token; --chat and --prompt_dir always do")
    fields: tuple[str, ...] = arg(
        (),
        "field values of a soft prompt: a JSON object for each prompt, or FILE:path (.jsonl, .csv, .tsv, .parquet)",
        split=False,
        needs=with_set("prompt_dir"),
    )
    dataset: str = arg("", "which vocabulary to write in, for a model with several (default: the first)")
    num_samples: int = arg(3, "completions of each prompt, drawn in one batch", low=1)
    max_new_tokens: int = arg(500, "maximum length of a completion", low=1)
    stream: bool = arg(True, "print the first sample while it is drawn")


@arg_group
class SamplingArgs:
    """sampling"""

    temperature: float = arg(0.8, "sampling temperature (0: greedy)", low=0)
    top_k: int = arg(200, "keep the k likeliest tokens (0: all)", low=0, needs=NOT_GREEDY)
    top_p: float = arg(
        1.0, "keep the likeliest tokens that together reach probability p (1: all)", above=0, high=1, needs=NOT_GREEDY
    )
    min_p: float = arg(
        0.0, "keep tokens at least p times as likely as the likeliest (0: all)", low=0, high=1, needs=NOT_GREEDY
    )
    seed: int = arg(1337, "random seed; greedy samples are the same with any", low=0, high=2**32 - 1)


@arg_group
class SystemArgs(DeviceArgs):
    """system"""

    engine: str = arg(
        "torch",
        "what computes: torch, or llama.cpp (pip install xllamacpp), faster on a CPU for the models that it has; "
        "its random numbers are its own, so a --seed gives other samples",
        choices=("torch", LLAMA_CPP),
    )
    compile: bool = arg(
        False, "compile the decoding step (on a GPU with CUDA graphs): slower to start, faster for long samples"
    )


@arg_group
class ServeArgs:
    """serve"""

    serve: bool = arg(False, "serve a page and an OpenAI-compatible API; the sampling arguments are its defaults")
    host: str = arg("127.0.0.1", "address to listen on; all but this machine's own need a token", needs=SERVE)
    port: int = arg(8000, "port (0: any free one)", low=0, high=65535, needs=SERVE)
    token: str = arg("", "token that clients send (none: made, where one is needed)", needs=SERVE, alias=("api_key",))
    open: bool = arg(False, "open the page in the browser", needs=SERVE)
    max_batch: int = arg(16, "completions that a model draws together", low=1, needs=SERVE)
    max_queue: int = arg(64, "requests that may wait; further ones are refused (status 429)", low=1, needs=SERVE)
    max_body: int = arg(1_000_000, "largest request in bytes", low=1000, needs=SERVE)


@arg_table
class SampleArgs(ModelArgs, PromptArgs, SamplingArgs, SystemArgs, ServeArgs):
    """The arguments of sample.py."""


def check(args: SampleArgs, source: dict[str, str]) -> list[str]:
    own_errors = (serve_errors(args, source), prompt_errors(args, source), llama_cpp_errors(args))
    return [*itertools.chain(load_errors(args), device_errors(args), *own_errors)]


def serve_errors(args: SampleArgs, source: dict[str, str]) -> Iterator[str]:
    """Errors of --serve: what each request says itself has no effect."""
    if args.serve:
        for name in NOT_SERVED:
            if source[name] != "default":
                yield f"--{name}: has no effect with --serve; {NOT_SERVED[name]}"
    elif len(args.out_dir) > 1:
        yield f"--out_dir: got {len(args.out_dir)} runs; pass one, or --serve them"


def prompt_errors(args: SampleArgs, source: dict[str, str]) -> Iterator[str]:
    start_is_set = source["start"] != "default"
    if args.prompt_dir and start_is_set:
        yield "--start: has no effect with --prompt_dir; use --fields"
    if args.prompt_dir and not args.fields:
        yield "--prompt_dir: needs --fields, a JSON object for each prompt"
    if args.chat and not start_is_set and source["num_samples"] != "default":
        yield "--num_samples: has no effect on a conversation; give the user's message as --start"
    for name in ("chat_template", "chat_template_kwargs"):
        if getattr(args, name) and not (args.chat or args.serve):
            yield f"--{name}: has an effect only with --chat or --serve"
    if args.prompt_dir and args.chat:
        yield "--chat: has no effect with --prompt_dir; use --fields"
    if not args.start or "" in args.start:
        yield "--start: is empty; a model needs at least one token to continue"
    for name in ("prompt_dir", "chat", "stop_at_end"):
        if args.compile and getattr(args, name):
            yield f"--compile: has no effect with --{name}"


def llama_cpp_errors(args: SampleArgs) -> Iterator[str]:
    """Errors of what --engine=llama.cpp has not."""
    if args.engine != LLAMA_CPP:
        return
    if args.prompt_dir:
        yield "--prompt_dir: llama.cpp has no soft prompts; use --engine=torch"
    if args.compile:
        yield "--compile: has no effect with --engine=llama.cpp"
    if args.device not in ("auto", "cpu"):
        yield f"--device={args.device}: --engine=llama.cpp computes on the CPU; use --engine=torch"


def spread_out_dir(argv: list[str]) -> list[str]:
    """argv with `--out_dir=RUN RUN2` as `--out_dir RUN RUN2`, which argparse reads as one list."""
    spread: list[str] = []
    for text, following in itertools.pairwise([*argv, ""]):
        is_list = text.startswith("--out_dir=") and os.path.isdir(following)
        spread += text.split("=", 1) if is_list else [text]
    return spread


if __name__ == "__main__":
    configurator.exit_on_interrupt()
    ARGS = configurator.parse(SampleArgs, spread_out_dir(sys.argv[1:]), __doc__, Rules(check=check))
    gc.disable()  # a sixth of torch's import time; nothing here leaves cycles behind

from pathlib import Path

import numpy as np
import torch

from builders import LoadedModel, load_model, load_soft_prompts, with_template
from nanoforge import files
from nanoforge.console import print_to_stderr
from nanoforge.data import tables
from nanoforge.data.tokenization import END_OF_TEXT, Tokenizer
from nanoforge.device import check_compiler, explain_out_of_memory
from nanoforge.errors import UserError
from nanoforge.models import llama_cpp
from nanoforge.models.generation import (
    Completion,
    SamplingParams,
    cast_weights,
    generate_batch,
    make_requests,
    uniform_draws,
)
from nanoforge.models.streamed_linear import stream_linears
from nanoforge.posttraining import prompt_format
from nanoforge.posttraining.chat_template import completion_end_ids
from nanoforge.posttraining.example_rows import ROLES
from nanoforge.posttraining.examples import ExampleEncoder
from nanoforge.posttraining.rollouts import decode_completion
from nanoforge.rng import SAMPLE
from nanoforge.run_dir import RunRecord
from nanoforge.serving.requests import Defaults
from nanoforge.serving.served_model import Lane, ServedModel
from nanoforge.serving.server import ServerOptions, serve
from nanoforge.training import checkpoint

SEPARATOR = "---------------"
LLAMA_CPP_TYPES = {"auto": "f16", "float16": "f16", "bfloat16": "bf16", "float32": "f32"}  # of matrices, by --dtype


def main(args: SampleArgs) -> None:
    with explain_out_of_memory(f"a smaller --num_samples than {args.num_samples} needs less"):
        sample(args)


def sample(args: SampleArgs) -> None:
    if args.serve:
        serve_models(args)
        return
    if args.prompt_dir:
        sample_soft_prompts(args)
        return
    loaded = load(args, args.out_dir[0])
    if args.chat:
        sample_replies(args, loaded)
    elif args.stop_at_end:
        sample_until_end(args, loaded)
    else:
        sample_endlessly(args, loaded)


def load(args: SampleArgs, out_dir: str) -> LoadedModel:
    """The model of --init_from, or of a run. Raises UserError."""
    loaded = load_model(
        args.init_from,
        out_dir,
        args.checkpoint,
        args.base_model,
        print_to_stderr,
        reads_weights=args.engine == "torch",
    )
    if loaded.prompt_offsets:
        raise UserError(f"--out_dir={out_dir}: holds a soft prompt; sample.py takes it as --prompt_dir")
    return with_template(loaded, args.chat_template, args.chat_template_kwargs)


# (prompts, sampling, the key of the random numbers, what is called with each id of the first completion)
Generate = Callable[
    [Sequence[Any], SamplingParams, tuple[int, ...], Callable[[Any], None] | None], Sequence[Completion]
]


def open_engine(args: SampleArgs, loaded: LoadedModel) -> Generate:
    """What draws completions, as generate_batch does. Raises UserError."""
    if args.engine == LLAMA_CPP:
        engine = open_llama_cpp(args, loaded)

        def generate(prompts: Any, sampling: SamplingParams, key: tuple[int, ...], on_token: Any) -> list[Completion]:
            requests = make_requests(prompts, sampling, uniform_draws(*key))
            engine.complete(requests, on_token)
            return [request.completion() for request in requests]

        return generate
    prepare_model(args, loaded)
    return lambda prompts, sampling, key, on_token: generate_batch(
        loaded.model, prompts, sampling, uniform_draws(*key), on_token=on_token
    )


def open_llama_cpp(args: SampleArgs, loaded: LoadedModel) -> llama_cpp.LlamaCpp:
    """llama.cpp with the model, written as a file for it once. Raises UserError."""
    assert loaded.unread is not None
    config = loaded.model.config
    path = llama_cpp.path_of(loaded.unread, dataclasses.asdict(config), LLAMA_CPP_TYPES[args.dtype])
    return llama_cpp.LlamaCpp(
        path=path,
        block_size=config.block_size,
        vocab_rows=sum(config.vocab_sizes),
        n_threads=torch.get_num_threads(),
        exact=args.dtype == "float32",
    )


def prepare_model(args: SampleArgs, loaded: LoadedModel) -> None:
    """Put the model on its device, with its weights cast once, not at every token. Raises UserError."""
    device = loaded.to(args.device, args.dtype)
    if args.compile:
        check_compiler(device)
    cast_weights(loaded.model)
    if device.type == "cpu" and not args.compile:
        stream_linears(loaded.model)


def sampling_params(args: SampleArgs, **options: Any) -> SamplingParams:
    """The sampling arguments, and further fields of SamplingParams."""
    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        compiled=args.compile,
        **options,
    )


# ---------------------------------------------------------------------------------------------------------------------
# prompts


def read_start(start: str) -> str:
    """The text that --start names. Raises UserError."""
    if start == "-":
        return files.decode_text(sys.stdin.buffer.read(), "--start=-: standard input")
    if not start.startswith("FILE:"):
        return tables.check_text(start, "--start")
    return files.read_text(Path(start.removeprefix("FILE:")).expanduser())


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids, (T,), of a text in which <|endoftext|> is the token, behind the token that begins a text, if there is
    one. Raises UserError, also for no ids."""
    end_of_text = tokenizer.control_tokens.get(END_OF_TEXT)
    parts = [text] if end_of_text is None else text.split(END_OF_TEXT)
    try:
        ids = list(tokenizer.encode(parts[0]))
        for part in parts[1:]:
            ids += [end_of_text, *tokenizer.encode(part)]
    except (UserError, UnicodeError) as error:
        raise UserError(f"--start: {error}") from None
    if tokenizer.bos_id is not None:
        ids.insert(0, tokenizer.bos_id)
    if not ids:
        raise UserError("--start: is empty; a model needs at least one token to continue")
    return np.array(ids, dtype=np.int64)


def without_start(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids without the token that begins a text."""
    begins = tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id]
    return ids[1:] if begins else ids


def read_fields(fields: str) -> list[dict[str, Any]]:
    """The rows that an element of --fields names. Raises UserError."""
    if fields.startswith("FILE:"):
        return list(tables.read_rows(Path(fields.removeprefix("FILE:")).expanduser()))
    try:
        row = json.loads(fields)
    except ValueError as error:
        raise UserError(f"--fields={fields}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f'--fields={fields}: not a JSON object such as {{"toxic": "..."}}')
    return [row]


def remark_long_prompt(length: int, loaded: LoadedModel) -> None:
    """Say that of a prompt longer than the context only the end is read."""
    block_size = loaded.model.config.block_size
    if length > block_size:
        print_to_stderr(f"the prompt has {length:,} tokens: the model reads its last {block_size:,}, the context")


# ---------------------------------------------------------------------------------------------------------------------
# completions, until the end-of-sequence token


def sample_soft_prompts(args: SampleArgs) -> None:
    """Complete each row of --fields with its soft prompt. Raises UserError."""
    rows = [row for fields in args.fields for row in read_fields(fields)]
    folders = [checkpoint.resolve(Path(run), args.checkpoint, print_to_stderr) for run in args.prompt_dir]
    if len(folders) == 1:
        prompt_of_row = [0] * len(rows)
    elif len(folders) == len(rows):
        prompt_of_row = list(range(len(rows)))
    else:
        raise UserError(f"--prompt_dir: got {len(folders)} for {len(rows)} rows of --fields; pass one, or one for each")

    loaded = load_soft_prompts(folders, args.base_model, print_to_stderr)
    formats = [RunRecord.load(folder).args["prompt_format"] for folder in folders]
    templates = [prompt_format.parse(template) for template in formats]
    start = [] if loaded.tokenizer.bos_id is None else [loaded.tokenizer.bos_id]
    prompts = []
    for row, i in zip(rows, prompt_of_row, strict=True):
        unknown_fields = sorted(row.keys() - set(templates[i].fields))
        if unknown_fields:
            raise UserError(f"--fields: {', '.join(unknown_fields)} not in the prompt {formats[i]!r}")
        prompts.append([*start, *templates[i].encode(row, loaded.tokenizer, loaded.prompt_offsets[i])])
    print_completions(args, loaded, prompts)


def sample_replies(args: SampleArgs, loaded: LoadedModel) -> None:
    """Reply to each user's message, or without any hold a conversation. Raises UserError."""
    tokenizer = loaded.tokenizer
    if not tokenizer.chat_template and ROLES["assistant"] not in tokenizer.added_ids:
        raise UserError("--chat: this model was not trained on messages; if it was, name its template: --chat_template")
    encoder = ExampleEncoder(tokenizer, loaded.model.config.block_size)
    system = [{"role": "system", "content": tables.check_text(args.system, "--system")}] if args.system else []
    if args.start == DEFAULT_START:
        converse(args, loaded, encoder, system)
        return
    chats = [[*system, {"role": "user", "content": read_start(start)}] for start in args.start]
    print_completions(args, loaded, [encoder.encode_prompt({"prompt": chat}) for chat in chats])


def converse(args: SampleArgs, loaded: LoadedModel, encoder: ExampleEncoder, chat: list[dict[str, str]]) -> None:
    """Reply to each line of standard input, as the user's next message, until it ends. Raises UserError."""
    generate = open_engine(args, loaded)
    tokenizer = loaded.tokenizer
    sampling = sampling_params(args, end_ids=completion_end_ids(tokenizer), vocab_size=tokenizer.vocab_size)
    for turn in itertools.count():
        message = read_message()
        if message is None:
            return
        chat.append({"role": "user", "content": tables.check_text(message, "standard input")})
        prompt = encoder.encode_prompt({"prompt": chat})
        remark_long_prompt(len(prompt), loaded)
        printer = TokenPrinter(tokenizer)
        (completion,) = generate([prompt], sampling, (args.seed, SAMPLE, turn), printer.put)
        printer.flush()
        print()
        chat.append({"role": "assistant", "content": decode_completion(completion, tokenizer)})


def read_message() -> str | None:
    """The next line that says something; None at the end of standard input. A terminal shows a prompt."""
    message = ""
    while not message.strip():
        try:
            message = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
    return message


def sample_until_end(args: SampleArgs, loaded: LoadedModel) -> None:
    """Continue each text until the end-of-sequence token. Raises UserError."""
    texts = [read_start(start) for start in args.start]
    prompts = [encode_text(loaded.tokenizer, text).tolist() for text in texts]
    print_completions(args, loaded, prompts, texts)


def print_completions(
    args: SampleArgs, loaded: LoadedModel, prompts: list[list[int]], prefixes: Sequence[str] = ()
) -> None:
    """Draw and print num_samples completions of each prompt, each after its prefix, if there are prefixes."""
    generate = open_engine(args, loaded)
    remark_long_prompt(max(map(len, prompts)), loaded)
    tokenizer = loaded.tokenizer
    end_ids = completion_end_ids(tokenizer)
    sampling = sampling_params(args, n=args.num_samples, end_ids=end_ids, vocab_size=tokenizer.vocab_size)
    completions = generate(prompts, sampling, (args.seed, SAMPLE), None)
    for number, completion in enumerate(completions):
        prefix = prefixes[number // args.num_samples] if prefixes else ""
        print(f"{prefix}{decode_completion(completion, tokenizer, continues_text=bool(prefixes))}\n{SEPARATOR}")


# ---------------------------------------------------------------------------------------------------------------------
# texts without end


@dataclass(frozen=True)
class TextStream:
    """A text to continue: the only one, or that of a context."""

    name: str  # of its vocabulary
    tokenizer: Tokenizer
    offset: int  # of its vocabulary in the model
    prompt: np.ndarray  # (T,)

    def local_ids(self, ids: np.ndarray) -> list[int]:
        """The tokenizer's ids from the model's, (T,), without the one that begins a text."""
        return without_start(self.tokenizer, (ids - self.offset).tolist())


class TokenPrinter:
    """Prints tokens as soon as they make whole characters."""

    MAX_WAITING = 8  # tokens; a character has fewer, so these make none

    def __init__(self, tokenizer: Tokenizer, offset: int = 0):
        """offset: of the tokenizer's vocabulary in the model."""
        self.tokenizer = tokenizer
        self.offset = offset
        self.waiting: list[int] = []
        self.decode = tokenizer.decode

    def put(self, token: int) -> None:
        self.waiting.append(token)
        is_whole = not self.decode(self.waiting).endswith("\ufffd")
        if is_whole or len(self.waiting) > self.MAX_WAITING:
            self.flush()

    def put_model_id(self, token: int) -> None:
        """A token by its id in the model."""
        self.put(token - self.offset)

    def flush(self) -> None:
        """Print what is waiting, whole or not."""
        print(self.decode(self.waiting), end="", flush=True)
        if self.waiting:
            self.decode = self.tokenizer.decode_continuation
        self.waiting = []


def sample_endlessly(args: SampleArgs, loaded: LoadedModel) -> None:
    """Continue a text, or all contexts together, by max_new_tokens tokens. Raises UserError."""
    # 1. The prompt.
    generate = open_engine(args, loaded)
    config = loaded.model.config
    has_contexts = config.vocabulary == "contexts"
    streams = open_contexts(args, loaded) if has_contexts else [open_stream(args, loaded)]
    prompt = np.stack([stream.prompt + stream.offset for stream in streams])  # (K, T)
    vocab_size = streams[0].tokenizer.vocab_size if config.vocabulary == "one" else None
    remark_long_prompt(prompt.shape[1], loaded)

    # 2. Draw; the first sample is printed meanwhile, unless contexts are to be aligned.
    printer = None
    if args.stream and not has_contexts:
        printer = TokenPrinter(streams[0].tokenizer, streams[0].offset)
        for token in without_start(streams[0].tokenizer, streams[0].prompt.tolist()):
            printer.put(token)
    sampling = sampling_params(args, n=args.num_samples, vocab_size=vocab_size)
    completions = generate([prompt], sampling, (args.seed, SAMPLE), printer.put_model_id if printer else None)

    # 3. The rest.
    if printer:
        printer.flush()
        print(f"\n{SEPARATOR}")
        completions = completions[1:]
    for completion in completions:
        drawn = np.array(completion.ids).reshape(-1, len(streams)).T  # (K, new)
        print(format_sample(streams, np.concatenate((prompt, drawn), axis=1)), end=f"\n{SEPARATOR}\n")


def open_stream(args: SampleArgs, loaded: LoadedModel) -> TextStream:
    """The text of the vocabulary that --dataset names, or of the first one. Raises UserError."""
    names = list(loaded.tokenizers)
    number = vocabulary_number(args, names)
    if len(args.start) != 1:
        raise UserError(f"--start: got {len(args.start)}, the model takes one")
    name = names[number]
    tokenizer = loaded.tokenizers[name]
    offset = loaded.model.vocabulary.vocab_offsets[number]
    return TextStream(name, tokenizer, offset, encode_text(tokenizer, read_start(args.start[0])))


def vocabulary_number(args: SampleArgs, names: list[str]) -> int:
    """Which of a model's vocabularies --dataset names; without it the first. Raises UserError."""
    if args.dataset and args.dataset not in names:
        raise UserError(f"--dataset={args.dataset}: the model has the vocabularies of {', '.join(names)}")
    return names.index(args.dataset) if args.dataset else 0


def open_contexts(args: SampleArgs, loaded: LoadedModel) -> list[TextStream]:
    """The texts of all contexts; the default --start serves each of them. Raises UserError."""
    names = list(loaded.tokenizers)
    if args.dataset:
        raise UserError(f"--dataset={args.dataset}: the contexts are continued together")
    starts = args.start
    if starts == DEFAULT_START:
        starts *= len(names)
    if len(starts) != len(names):
        raise UserError(
            f"--start: got {len(starts)}, the model takes {len(names)}, one for each context ({', '.join(names)})"
        )
    streams = []
    for (name, tokenizer), offset, start in zip(
        loaded.tokenizers.items(), loaded.model.vocabulary.vocab_offsets, starts, strict=True
    ):
        streams.append(TextStream(name, tokenizer, offset, encode_text(tokenizer, read_start(start))))
    lengths = [len(stream.prompt) for stream in streams]
    if len(set(lengths)) > 1:
        raise UserError(
            f"--start: prompts of {', '.join(map(str, lengths))} tokens; the contexts' prompts need equal lengths"
        )
    return streams


def format_sample(streams: list[TextStream], sample: np.ndarray) -> str:
    """A sample as text; sample: (K, T)."""
    if len(streams) == 1:
        return streams[0].tokenizer.decode(streams[0].local_ids(sample[0]))
    tokens = []
    for stream, ids in zip(streams, sample, strict=True):
        first, *rest = stream.local_ids(ids)
        decode = stream.tokenizer.decode_continuation
        tokens.append([stream.tokenizer.decode([first]), *(decode([token]) for token in rest)])
    return align_contexts([stream.name for stream in streams], tokens)


def align_contexts(names: list[str], tokens: list[list[str]]) -> str:
    """The contexts' tokens, (K, T), below each other. A line ends where a token of the first context ends one."""
    lines: list[list[str]] = []
    line = [""] * len(names)  # of each context
    for column in zip(*tokens, strict=True):
        width = max(len(token.strip("\n")) for token in column)
        line = [text + token.replace("\n", "").ljust(width) for text, token in zip(line, column, strict=True)]
        if "\n" in column[0]:
            lines.append(line)
            line = [""] * len(names)
    lines.append(line)
    name_width = max(map(len, names))
    return "\n".join(f"{name:{name_width}} | {text}" for line in lines for name, text in zip(names, line, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# a server


def name_models(sources: Sequence[str]) -> list[str]:
    """What clients call the models: the last part of a path, or where several share it, the whole; a hub's name."""
    last_parts = [Path(source).name if Path(source).exists() else source for source in sources]
    is_clear = len(set(last_parts)) == len(sources) and all(last_parts)
    return last_parts if is_clear else list(sources)


def serve_models(args: SampleArgs) -> None:
    """Serve the runs, or the model of --init_from, until Ctrl-C. Raises UserError."""
    sources = args.out_dir if args.init_from == "resume" else (args.init_from,)
    models = []
    for name, source in zip(name_models(sources), sources, strict=True):
        loaded = load(args, source)
        prepare_model(args, loaded)
        names = list(loaded.tokenizers)
        lanes = list(map(Lane, names, loaded.tokenizers.values(), loaded.model.vocabulary.vocab_offsets))
        if loaded.model.config.vocabulary != "contexts":
            lanes = [lanes[vocabulary_number(args, names)]]
        elif args.dataset:
            raise UserError(f"--dataset={args.dataset}: the contexts are continued together")
        models.append(ServedModel(name, loaded.model, lanes, loaded.source))
    defaults = Defaults(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        max_tokens=args.max_new_tokens,
    )
    options = {field.name: getattr(args, field.name) for field in dataclasses.fields(ServerOptions)}
    serve(models, defaults, ServerOptions(**options))


if __name__ == "__main__":
    configurator.run(main, ARGS, output_is_required=True)
