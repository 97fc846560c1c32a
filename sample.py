"""Sample from a trained model:

    python sample.py --out_dir=out/run --start="To be" --num_samples=3
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --temperature=0
    echo "Once" | python sample.py --out_dir=out/run --start=-
    python sample.py --out_dir=out/chat --start="Who are you?" --chat --system="Be brief."
    python sample.py --out_dir=out/chat --chat                        a conversation; /help lists its commands
    python sample.py --out_dir=out/run --start="To be" --logprobs=3   each token's probability, and the likeliest ones
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
from collections.abc import Iterator, Sequence
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
EMPTY = {"start": "a model needs at least one token to continue", "stop": "leave it out"}
SERVE = with_set("serve")
NOT_SERVED = {  # argument -> what to do instead
    **dict.fromkeys(
        ("start", "chat", "system", "stop", "stop_at_end", "fields", "num_samples", "stream", "logprobs", "seed"),
        "each request says it",
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
    stop: tuple[str, ...] = arg((), "texts that end a completion, which is printed without them", split=False)
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
    repetition_penalty: float = arg(
        1.0, "above 1: tokens of the prompt and the completion are repeated less (CTRL; 1: off)", above=0
    )
    logprobs: int = arg(
        0, "print each token with its probability, before filters, and those of the k likeliest (0: no)", low=0
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
    texts = {"start": args.start or ("",), "stop": args.stop}
    yield from (f"--{name}: is empty; {EMPTY[name]}" for name in EMPTY if "" in texts[name])
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
from nanoforge.device import check_compiler, explain_out_of_memory, in_own_thread
from nanoforge.errors import UserError
from nanoforge.models import llama_cpp
from nanoforge.models.context_text import ContextText, format_sample
from nanoforge.models.cpu_kernels import stream_layers
from nanoforge.models.generation import (
    Engine,
    Request,
    SamplingParams,
    TorchEngine,
    cast_weights,
    make_requests,
    uniform_draws,
)
from nanoforge.models.text_stream import TextStream
from nanoforge.models.token_table import format_tokens
from nanoforge.posttraining import prompt_format
from nanoforge.posttraining.chat_template import completion_end_ids
from nanoforge.posttraining.chat_terminal import ChatTerminal
from nanoforge.posttraining.conversation import Conversation
from nanoforge.posttraining.example_rows import ROLES
from nanoforge.posttraining.examples import ExampleEncoder
from nanoforge.posttraining.rollouts import decode_completion
from nanoforge.rng import SAMPLE
from nanoforge.run_dir import RunRecord
from nanoforge.serving.requests import Defaults
from nanoforge.serving.served_model import Lane, ServedModel
from nanoforge.serving.server import ModelServer, ServerOptions, listen, serve
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
    loaded = in_own_thread(load, args, args.out_dir[0])
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


def open_engine(args: SampleArgs, loaded: LoadedModel) -> Engine:
    """What draws completions. Raises UserError."""
    if args.engine == LLAMA_CPP:
        return open_llama_cpp(args, loaded)
    prepare_model(args, loaded)
    return TorchEngine(loaded.model, compiled=args.compile)


def open_llama_cpp(args: SampleArgs, loaded: LoadedModel) -> llama_cpp.LlamaCpp:
    """llama.cpp with the model, written as a file for it once. Raises UserError."""
    assert loaded.unread is not None
    config = loaded.model.config
    shape, kind = dataclasses.asdict(config), LLAMA_CPP_TYPES[args.dtype]
    path = in_own_thread(llama_cpp.path_of, loaded.unread, shape, kind)
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
        stream_layers(loaded.model)


def sampling_params(args: SampleArgs, **options: Any) -> SamplingParams:
    """The sampling arguments, and further fields of SamplingParams."""
    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        logprobs=args.logprobs or None,
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
        raise UserError(
            "--chat: this model was not trained on messages; if it was, name its template: --chat_template; "
            "to continue a text, pass it as --start without --chat"
        )
    encoder = ExampleEncoder(tokenizer, loaded.model.config.block_size)
    system = [{"role": "system", "content": tables.check_text(args.system, "--system")}] if args.system else []
    if args.start == DEFAULT_START:
        converse(args, loaded, encoder, system)
        return
    chats = [[*system, {"role": "user", "content": read_start(start)}] for start in args.start]
    print_completions(args, loaded, [encoder.encode_prompt({"prompt": chat}) for chat in chats])


def converse(args: SampleArgs, loaded: LoadedModel, encoder: ExampleEncoder, messages: list[dict[str, str]]) -> None:
    """Hold a conversation in the terminal, or reply to each line of standard input. Raises UserError."""
    engine = open_engine(args, loaded)
    tokenizer = loaded.tokenizer
    conversation = Conversation(
        engine=engine,
        encoder=encoder,
        sampling=sampling_params(args, end_ids=completion_end_ids(tokenizer), vocab_size=tokenizer.vocab_size),
        seed=args.seed,
        stop=args.stop,
        messages=messages,
        report=print_to_stderr,
    )
    ChatTerminal(conversation, stream=args.stream).run()


def sample_until_end(args: SampleArgs, loaded: LoadedModel) -> None:
    """Continue each text until the end-of-sequence token. Raises UserError."""
    texts = [read_start(start) for start in args.start]
    prompts = [encode_text(loaded.tokenizer, text).tolist() for text in texts]
    print_completions(args, loaded, prompts, texts)


def print_completions(
    args: SampleArgs, loaded: LoadedModel, prompts: list[list[int]], prefixes: Sequence[str] = ()
) -> None:
    """Draw and print num_samples completions of each prompt, each after its prefix, if there are prefixes."""
    engine = open_engine(args, loaded)
    remark_long_prompt(max(map(len, prompts)), loaded)
    tokenizer = loaded.tokenizer
    end_ids = completion_end_ids(tokenizer)
    sampling = sampling_params(args, n=args.num_samples, end_ids=end_ids, vocab_size=tokenizer.vocab_size)
    requests = make_requests(prompts, sampling, uniform_draws(args.seed, SAMPLE))
    stream = ContextText("", tokenizer, offset=0, prompt=np.zeros(0, dtype=np.int64))
    continues_text = bool(prefixes)
    texts = read_texts(args, requests, stream, continues_text=continues_text) if args.stop else []
    engine.complete(requests)
    for number, request in enumerate(requests):
        prefix = prefixes[number // args.num_samples] if prefixes else ""
        text = decode_completion(request.completion(), tokenizer, continues_text=continues_text)
        print(prefix + (texts[number].text if texts else text))
        print_tokens(request, [stream])


def read_texts(
    args: SampleArgs, requests: Sequence[Request], stream: ContextText, *, continues_text: bool
) -> list[TextStream]:
    """The text of each request while it is drawn, which --stop may end."""
    texts = []
    for request in requests:
        text = TextStream(stream.tokenizer, args.stop, continues_text=continues_text, offset=stream.offset)
        request.sampling = dataclasses.replace(request.sampling, is_complete=text.read)
        texts.append(text)
    return texts


def print_tokens(request: Request, streams: Sequence[ContextText]) -> None:
    """What follows a sample: its tokens, if --logprobs asks for them, and a line."""
    if request.sampling.logprobs is not None:
        contexts = {stream.name: stream.spell for stream in streams}
        print(format_tokens(request.ids, request.logprobs, request.top_logprobs, contexts))
    print(SEPARATOR)


# ---------------------------------------------------------------------------------------------------------------------
# texts without end


def sample_endlessly(args: SampleArgs, loaded: LoadedModel) -> None:
    """Continue a text, or all contexts together, by max_new_tokens tokens. Raises UserError."""
    # 1. The prompt.
    has_contexts = loaded.model.config.vocabulary == "contexts"
    if has_contexts and args.stop:
        raise UserError("--stop: has no effect on a model of several contexts, whose tokens are drawn together")
    engine = open_engine(args, loaded)
    streams = open_contexts(args, loaded) if has_contexts else [open_stream(args, loaded)]
    prompt = np.stack([stream.prompt + stream.offset for stream in streams])  # (K, T)
    vocab_size = streams[0].tokenizer.vocab_size if loaded.model.config.vocabulary == "one" else None
    remark_long_prompt(prompt.shape[1], loaded)

    # 2. Draw; the first sample is printed meanwhile, unless contexts are to be aligned.
    sampling = sampling_params(args, n=args.num_samples, vocab_size=vocab_size)
    requests = make_requests([prompt], sampling, uniform_draws(args.seed, SAMPLE))
    texts = read_texts(args, requests, streams[0], continues_text=True) if args.stop else []
    is_streamed = args.stream and not has_contexts
    if is_streamed:
        print(format_sample(streams, prompt), end="", flush=True)
        texts = texts or read_texts(args, requests[:1], streams[0], continues_text=True)
    engine.complete(requests, (lambda _: print(texts[0].take(), end="", flush=True)) if is_streamed else None)

    # 3. The rest.
    for number, request in enumerate(requests):
        if number == 0 and is_streamed:
            texts[0].finish()
            print(texts[0].take())
        elif args.stop:
            print(format_sample(streams, prompt) + texts[number].text)
        else:
            drawn = np.array(request.ids).reshape(-1, len(streams)).T  # (K, new)
            print(format_sample(streams, np.concatenate((prompt, drawn), axis=1)))
        print_tokens(request, streams)


def open_stream(args: SampleArgs, loaded: LoadedModel) -> ContextText:
    """The text of the vocabulary that --dataset names, or of the first one. Raises UserError."""
    names = list(loaded.tokenizers)
    number = vocabulary_number(args, names)
    if len(args.start) != 1:
        raise UserError(f"--start: got {len(args.start)}, the model takes one")
    name = names[number]
    tokenizer = loaded.tokenizers[name]
    offset = loaded.model.vocabulary.vocab_offsets[number]
    return ContextText(name, tokenizer, offset, encode_text(tokenizer, read_start(args.start[0])))


def vocabulary_number(args: SampleArgs, names: list[str]) -> int:
    """Which of a model's vocabularies --dataset names; without it the first. Raises UserError."""
    if args.dataset and args.dataset not in names:
        raise UserError(f"--dataset={args.dataset}: the model has the vocabularies of {', '.join(names)}")
    return names.index(args.dataset) if args.dataset else 0


def open_contexts(args: SampleArgs, loaded: LoadedModel) -> list[ContextText]:
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
        streams.append(ContextText(name, tokenizer, offset, encode_text(tokenizer, read_start(start))))
    lengths = [len(stream.prompt) for stream in streams]
    if len(set(lengths)) > 1:
        raise UserError(
            f"--start: prompts of {', '.join(map(str, lengths))} tokens; the contexts' prompts need equal lengths"
        )
    return streams


# ---------------------------------------------------------------------------------------------------------------------
# a server


def name_models(sources: Sequence[str]) -> list[str]:
    """What clients call the models: the last part of a path, or where several share it, the whole; a hub's name."""
    last_parts = [Path(source).name.removesuffix(".gguf") if Path(source).exists() else source for source in sources]
    is_clear = len(set(last_parts)) == len(sources) and all(last_parts)
    return last_parts if is_clear else list(sources)


def serve_models(args: SampleArgs) -> None:
    """Serve the runs, or the model of --init_from, until Ctrl-C. Raises UserError."""
    listener = listen(args.host, args.port)
    models = in_own_thread(open_models, args)
    defaults = Defaults(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        max_tokens=args.max_new_tokens,
    )
    options = {field.name: getattr(args, field.name) for field in dataclasses.fields(ServerOptions)}
    serve(ModelServer(models, defaults, ServerOptions(**options), listener), open_page=args.open)


def open_models(args: SampleArgs) -> list[ServedModel]:
    """The models to serve. Raises UserError."""
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
    return models


if __name__ == "__main__":
    configurator.run(main, ARGS, output_is_required=True)
