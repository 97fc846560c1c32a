"""Continue prompts with a trained model:

    python sample.py --out_dir=out/run --start="To be" --num_samples=3
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --temperature=0
    echo "Once" | python sample.py --out_dir=out/run --start=-
    python sample.py --out_dir=out/chat --start="Who are you?" --chat
    python sample.py --prompt_dir=outputs/detox/20260101_120000 --fields '{"toxic": "..."}'

A run folder is all it needs. The first sample appears as it is drawn; all of them are one batch. Soft prompts, of several runs too, are put on the
base that they were trained on.
"""

import dataclasses
import gc
import json
import sys
from dataclasses import dataclass

import configurator
from common_args import DeviceArgs, LoadArgs, checkpoint_errors
from configurator import OnlyWith, Rules, arg, arg_group

RUN = OnlyWith("--init_from=resume and without --prompt_dir", lambda a: a.init_from == "resume" and not a.prompt_dir)
PROMPTED = OnlyWith("--prompt_dir", lambda a: bool(a.prompt_dir))
DRAWN = OnlyWith("--temperature above 0", lambda a: a.temperature > 0)


@arg_group
class ModelArgs(LoadArgs):
    """model"""

    out_dir: str = arg("out", "the run", needs=RUN)
    prompt_dir: tuple[str, ...] = arg((), "runs of soft prompts: one for all of --fields, or one for each", split=False)


@arg_group
class PromptArgs:
    """text"""

    start: tuple[str, ...] = arg(
        ("\n",),
        "prompt: text, FILE:path, or - for standard input; of a multicontext model one for each context, of equal length",
        split=False,
    )
    chat: bool = arg(False, "the prompt is what a user says, to a model that was trained on messages")
    stop_at_end: bool = arg(
        False, "a sample is over with the model's end token; always so with --chat and --prompt_dir"
    )
    fields: tuple[str, ...] = arg(
        (),
        "of a soft prompt's text: a JSON object for each text, or FILE:path of a .jsonl, .csv or .tsv file",
        split=False,
        needs=PROMPTED,
    )
    dataset: str = arg("", "whose tokens to write, of a model with several vocabularies (none: the first)")
    num_samples: int = arg(3, "continuations, drawn together", low=1)
    max_new_tokens: int = arg(500, "tokens of a continuation", low=1)
    stream: bool = arg(True, "print the first sample while it is drawn")


@arg_group
class SamplingArgs:
    """choice of the next token"""

    temperature: float = arg(0.8, "below 1 safer, above 1 wilder, 0 always the likeliest", low=0)
    top_k: int = arg(200, "only the k likeliest (0: all)", low=0, needs=DRAWN)
    top_p: float = arg(1.0, "only the likeliest that together reach p (1: all)", above=0, high=1, needs=DRAWN)
    min_p: float = arg(
        0.0, "only those at least p times as likely as the likeliest (0: all)", low=0, high=1, needs=DRAWN
    )
    seed: int = arg(1337, "of the draws", low=0, high=2**32 - 1, needs=DRAWN)


@arg_group
class SystemArgs(DeviceArgs):
    """system"""

    compile: bool = arg(
        False,
        "compile the step that reads one token (on a GPU with CUDA graphs): slower to begin, faster for long texts",
    )


@dataclass(frozen=True, kw_only=True)
class SampleArgs(ModelArgs, PromptArgs, SamplingArgs, SystemArgs):
    """The arguments of sample.py."""


def check(a, source: dict[str, str]) -> list[str]:
    wrong = list(checkpoint_errors(a))
    wrong += ["--start: has no effect with --prompt_dir; its text is made of --fields"] * (
        bool(a.prompt_dir) and source["start"] != "default"
    )
    wrong += ["--fields: --prompt_dir needs it, a JSON object for each text"] * (bool(a.prompt_dir) and not a.fields)
    wrong += ["--chat: --start needs what the user says"] * (a.chat and source["start"] == "default")
    wrong += [
        f"--compile: has no effect with --{name}"
        for name in ("prompt_dir", "chat", "stop_at_end")
        if a.compile and getattr(a, name)
    ]
    return wrong + ["--start: empty; a model needs at least one token to go on from"] * (not a.start or "" in a.start)


if __name__ == "__main__":
    ARGUMENTS = configurator.parse(SampleArgs, sys.argv[1:], __doc__, Rules(check=check))
    gc.disable()  # a sixth of the seconds that torch takes to import; nothing here leaves cycles behind

from pathlib import Path

import numpy as np
import torch

from model import GPT, GPTConfig
from nanoforge.data import tables, tokenization
from nanoforge.device import choose_dtype, get_device
from nanoforge.errors import UserError
from nanoforge.models import adapters, generation, pretrained
from nanoforge.posttraining import examples, prompt_format
from nanoforge.training import checkpoint


def prompt(given: str) -> str:
    """The text that --start names. Raises UserError."""
    if given == "-":
        return sys.stdin.read()
    if not given.startswith("FILE:"):
        return given
    try:
        return Path(given[5:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--start={given}: can't be read ({error})") from None


def encode(tokenizer: tokenization.Tokenizer, words: str) -> np.ndarray:
    """Ids of a prompt, in which <|endoftext|> is the token. Raises UserError for unknown characters and empty prompts."""
    parts = words.split(tokenization.END_OF_TEXT) if tokenizer.eos_id is not None else [words]
    try:
        ids = [tokenizer.encode(parts[0])]
        for part in parts[1:]:
            ids += [[tokenizer.eos_id], tokenizer.encode(part)]
    except (UserError, UnicodeError) as error:
        raise UserError(f"--start: {error}") from None
    ids = np.concatenate(ids).astype(np.int64)
    if not len(ids):
        raise UserError("--start: empty; a model needs at least one token to go on from")
    return ids


class Stream:
    """Prints ids as text as soon as they make whole characters."""

    def __init__(self, tokenizer: tokenization.Tokenizer):
        self.tokenizer, self.waiting = tokenizer, []

    def put(self, token: int) -> None:
        self.waiting.append(token)
        if not self.tokenizer.decode(self.waiting).endswith("\ufffd") or len(self.waiting) > 8:
            self.flush()

    def flush(self) -> None:
        """Print what is waiting, whole or not."""
        print(self.tokenizer.decode(self.waiting), end="", flush=True)
        self.waiting = []


def say(words: str) -> None:
    print(words, file=sys.stderr)


def load(a) -> tuple[GPT, dict[str, tokenization.Tokenizer]]:
    """The model and its tokenizers. Raises UserError."""
    source = str(checkpoint.resolve(Path(a.out_dir), a.checkpoint, say)) if a.init_from == "resume" else a.init_from
    loaded = pretrained.load(source, say)
    model = GPT(GPTConfig(**loaded.shape))
    model.load_weights(loaded.weights, source)
    return model.eval(), loaded.tokenizers or {"tokens": tokenization.NumberTokenizer(sum(model.config.vocab_sizes))}


def told_of(run: Path) -> dict:
    """What a checkpoint's train_config.json tells."""
    return json.loads((run / "train_config.json").read_text(encoding="utf-8"))


def base_with_prompts(runs: list[Path]) -> tuple[GPT, tokenization.Tokenizer, list[int]]:
    """The base that the soft prompts of these checkpoints share, with their rows, its tokenizer, and the id of each one's first row. Raises UserError."""
    configs = [told_of(run) for run in runs]
    base, shape = pretrained.load_base(configs[0]["_base"], say), configs[0]["_model"]
    model = GPT(
        GPTConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in shape.items()})
    )
    model.load_weights(base.weights, configs[0]["_base"]["source"], grow=True)
    rows = [
        adapters.load_prompt(checkpoint.load_tensors(folder, "model"), config["prompt_provider"])
        for folder, config in zip(runs, configs, strict=True)
    ]
    adapters.add_soft_prompt(model, torch.cat(rows), "tensor")
    firsts = [sum(shape["vocab_sizes"]) + sum(map(len, rows[:i])) for i in range(len(rows))]
    return model.eval(), next(iter(tokenization.load(runs[0] / "tokenizer.json").values())), firsts


def load_prompted(a) -> tuple[GPT, tokenization.Tokenizer, list[list[int]]]:
    """The base with all soft prompts, its tokenizer, and the ids of each text. Raises UserError."""
    runs = [checkpoint.resolve(Path(folder), a.checkpoint, say) for folder in a.prompt_dir]
    configs = [told_of(run) for run in runs]
    for folder, config in zip(a.prompt_dir, configs, strict=True):
        if config.get("adapter") != "soft_prompt":
            raise UserError(f"--prompt_dir={folder}: not a run with --adapter=soft_prompt; --out_dir samples from it")
        if config["_base"]["sha256"] != configs[0]["_base"]["sha256"]:
            raise UserError(
                f"--prompt_dir={folder}: was trained on another base than {a.prompt_dir[0]}; a batch has one"
            )
    texts = [row for given in a.fields for row in read_fields(given)]
    if len(runs) not in (1, len(texts)):
        raise UserError(f"--prompt_dir: {len(runs)} given for {len(texts)} texts; give one, or one for each")
    model, tokenizer, firsts = base_with_prompts(runs)
    prompts = []
    for number, row in enumerate(texts):
        which = number if len(runs) > 1 else 0
        template = prompt_format.parse(configs[which]["prompt_format"])
        if strange := sorted(row.keys() - set(template.fields)):
            raise UserError(f"--fields: {', '.join(strange)} not in the prompt {configs[which]['prompt_format']!r}")
        prompts.append(template.encode(row, tokenizer, firsts[which]))
    return model, tokenizer, prompts


def read_fields(given: str) -> list[dict]:
    """The rows that --fields names. Raises UserError."""
    if given.startswith("FILE:"):
        return list(tables.read_rows(Path(given[5:])))
    try:
        row = json.loads(given)
    except ValueError as error:
        raise UserError(f"--fields={given}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f'--fields={given}: must be a JSON object such as {{"toxic": "..."}}')
    return [row]


def sampling_params(a) -> generation.SamplingParams:
    """The arguments that choose the next token."""
    return generation.SamplingParams(
        max_new_tokens=a.max_new_tokens, temperature=a.temperature, top_k=a.top_k, top_p=a.top_p, min_p=a.min_p
    )


def answer(a, model: GPT, tokenizer: tokenization.Tokenizer, prompts: list[list[int]], titles: list[str]) -> None:
    """Print what the model answers to each prompt, until its end token."""
    device = get_device(a.device)
    model.to(device)
    model.compute_dtype, _ = choose_dtype(a.dtype, device)
    if (longest := max(map(len, prompts))) >= model.config.block_size:
        raise UserError(
            f"--start, --fields: the longest prompt has {longest} tokens, and the model's context {model.config.block_size}"
        )
    torch.manual_seed(a.seed)
    sampling = dataclasses.replace(
        sampling_params(a), n=a.num_samples, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size
    )
    answers = generation.generate_batch(model, prompts, sampling)
    for number, one in enumerate(answers):
        print(
            f"{titles[number // a.num_samples]}{tokenizer.decode(one.ids[:-1] if one.ended else one.ids)}\n---------------"
        )


def main(a) -> None:
    if a.prompt_dir:
        model, tokenizer, prompts = load_prompted(a)
        return answer(a, model, tokenizer, prompts, [""] * len(prompts))
    device = get_device(a.device)
    model, tokenizers = load(a)
    if a.chat or a.stop_at_end:
        if len(tokenizers) > 1:
            raise UserError(f"--{'chat' if a.chat else 'stop_at_end'}: the model has several vocabularies")
        tokenizer, words = next(iter(tokenizers.values())), prompt(a.start[0])
        if a.chat and examples.ROLES["assistant"] not in getattr(tokenizer, "ids", {}):
            raise UserError("--chat: this model was not trained on messages")
        coder = examples.ExampleEncoder(tokenizer, model.config.block_size)
        ids = (
            coder.encode_prompt({"prompt": [{"role": "user", "content": words}]})
            if a.chat
            else encode(tokenizer, words).tolist()
        )
        return answer(a, model, tokenizer, [ids], ["" if a.chat else words])
    model.to(device)
    model.compute_dtype, _ = choose_dtype(a.dtype, device)
    model.to(model.compute_dtype)  # once, rather than at every token
    vocabulary = model.vocabulary
    contexts = vocabulary.vocab_sizes if model.config.vocabulary == "contexts" else None
    names = list(tokenizers)

    if a.dataset and (a.dataset not in names or contexts):
        raise UserError(
            f"--dataset={a.dataset}: "
            + (
                "the contexts are continued together"
                if contexts
                else f"the model has vocabularies of {', '.join(names)}"
            )
        )
    chosen = names if contexts else [a.dataset or names[0]]
    if len(a.start) == 1 and a.start[0] == "\n":
        starts = a.start * len(chosen)
    elif len(a.start) == len(chosen):
        starts = a.start
    else:
        raise UserError(
            f"--start: {len(a.start)} given, {len(chosen)} needed"
            + (f", one for each context ({', '.join(names)})" if contexts else "")
        )
    firsts = [vocabulary.vocab_offsets[names.index(name)] for name in chosen]
    prompts = [encode(tokenizers[name], prompt(start)) for name, start in zip(chosen, starts, strict=True)]
    if len({len(ids) for ids in prompts}) > 1:
        raise UserError(
            f"--start: the contexts' prompts must be equally long, not {', '.join(str(len(ids)) for ids in prompts)} tokens"
        )

    rows = np.stack([ids + first for ids, first in zip(prompts, firsts, strict=True)])  # (contexts, T)
    idx = torch.from_numpy(rows if contexts else rows[0]).to(device)
    idx = idx.expand(a.num_samples, *idx.shape)
    sampling = sampling_params(a)
    if model.config.vocabulary == "one":
        sampling = dataclasses.replace(sampling, vocab_size=tokenizers[names[0]].vocab_size)
    stream = Stream(tokenizers[chosen[0]]) if a.stream and not contexts else None
    if stream:
        for token in prompts[0].tolist():
            stream.put(token)
    out = generation.generate(
        model,
        idx,
        sampling,
        torch.Generator(device).manual_seed(a.seed),
        on_token=lambda ids: stream.put(int(ids[0]) - firsts[0]) if stream else None,
        decode="compiled" if a.compile else "cached",
    ).cpu()
    if stream:
        stream.flush()
    for number, row in enumerate(out):
        if number or not stream:
            streams = [
                (tokenizers[name], (ids - first).tolist())
                for name, ids, first in zip(chosen, row.view(len(chosen), -1), firsts, strict=True)
            ]
            if contexts:
                print(aligned(chosen, [[tokenizer.decode([i]) for i in ids] for tokenizer, ids in streams]), end="")
            else:
                print(streams[0][0].decode(streams[0][1]), end="")
        print("\n---------------")


def aligned(names: list[str], tokens: list[list[str]]) -> str:
    """The contexts below each other, token under token; a line ends where a token of the first context ends one."""
    width = max(map(len, names))
    blocks, lines = [], [""] * len(names)
    for column in zip(*tokens, strict=True):
        room = max(len(piece.strip("\n")) for piece in column)
        lines = [line + piece.replace("\n", "").ljust(room) for line, piece in zip(lines, column, strict=True)]
        if "\n" in column[0]:
            blocks.append(lines)
            lines = [""] * len(names)
    return "\n".join(
        f"{name:{width}} | {line}" for block in [*blocks, lines] for name, line in zip(names, block, strict=True)
    )


if __name__ == "__main__":
    configurator.run(main, ARGUMENTS)
