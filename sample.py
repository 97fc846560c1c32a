"""Continue prompts with a trained model:

    python sample.py --out_dir=out/run --start="To be" --num_samples=3
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --temperature=0
    echo "Once" | python sample.py --out_dir=out/run --start=-

A run folder is all it needs. The first sample appears as it is drawn; all of them are one batch.
"""

import gc
import sys

import configurator
from configurator import Needs, Row

DRAWN = Needs("--temperature above 0", lambda a: a.temperature > 0)

TABLE = {
    "model": [
        Row("out_dir", "out", "the run", needs=Needs("--init_from=resume", lambda a: a.init_from == "resume")),
        Row("checkpoint", "best", "best, last, or a step", needs=Needs("--init_from=resume", lambda a: a.init_from == "resume")),
        Row("init_from", "resume", "resume (the run in out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a PATH to weights"),
    ],
    "text": [
        Row("start", ("\n",), "prompt: text, FILE:path, or - for standard input; of a multicontext model one for each context, of equal length", split=False),
        Row("dataset", "", "whose tokens to write, of a model with several vocabularies (none: the first)"),
        Row("num_samples", 3, "continuations, drawn together", low=1),
        Row("max_new_tokens", 500, "tokens of a continuation", low=1),
        Row("stream", True, "print the first sample while it is drawn"),
    ],
    "choice of the next token": [
        Row("temperature", 0.8, "below 1 safer, above 1 wilder, 0 always the likeliest", low=0),
        Row("top_k", 200, "only the k likeliest (0: all)", low=0, needs=DRAWN),
        Row("top_p", 1.0, "only the likeliest that together reach p (1: all)", above=0, high=1, needs=DRAWN),
        Row("min_p", 0.0, "only those at least p times as likely as the likeliest (0: all)", low=0, high=1, needs=DRAWN),
        Row("seed", 1337, "of the draws", low=0, high=2**32 - 1, needs=DRAWN),
    ],
    "system": [
        Row("device", "auto", "auto, cpu, cuda, cuda:N or mps"),
        Row("dtype", "auto", "precision of activations", choices=("auto", "float32", "bfloat16", "float16")),
        Row("compile", False, "compile the step that reads one token (on a GPU with CUDA graphs): slower to begin, faster for long texts"),
    ],
}


def check(a, source: dict[str, str]) -> list[str]:
    wrong = [] if a.checkpoint in ("best", "last") or a.checkpoint.isdecimal() else [f"--checkpoint={a.checkpoint}: must be best, last or a step"]
    return wrong + ["--start: empty; a model needs at least one token to go on from"] * (not a.start or "" in a.start)


if __name__ == "__main__":
    ARGUMENTS = configurator.parse(TABLE, sys.argv[1:], __doc__, check=check)
    gc.disable()  # a sixth of the seconds that torch takes to import; nothing here leaves cycles behind

from pathlib import Path

import numpy as np
import torch

from model import GPT, GPTConfig
from parts import checkpoint, generate, parallel, pretrained, text
from parts.mistakes import Mistake


def prompt(given: str) -> str:
    """The text that --start names. Raises Mistake."""
    if given == "-":
        return sys.stdin.read()
    if not given.startswith("FILE:"):
        return given
    try:
        return Path(given[5:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Mistake(f"--start={given}: can't be read ({error})") from None


def encode(tokenizer: text.Tokenizer, words: str) -> np.ndarray:
    """Ids of a prompt, in which <|endoftext|> is the token. Raises Mistake for unknown characters and empty prompts."""
    parts = words.split(text.END_OF_TEXT) if tokenizer.eot is not None else [words]
    try:
        ids = [tokenizer.encode(parts[0])]
        for part in parts[1:]:
            ids += [[tokenizer.eot], tokenizer.encode(part)]
    except (Mistake, UnicodeError) as error:
        raise Mistake(f"--start: {error}") from None
    ids = np.concatenate(ids).astype(np.int64)
    if not len(ids):
        raise Mistake("--start: empty; a model needs at least one token to go on from")
    return ids


class Stream:
    """Prints ids as text as soon as they make whole characters."""

    def __init__(self, tokenizer: text.Tokenizer):
        self.tokenizer, self.waiting = tokenizer, []

    def put(self, token: int) -> None:
        self.waiting.append(token)
        if not self.tokenizer.decode(self.waiting).endswith("\ufffd") or len(self.waiting) > 8:
            self.flush()

    def flush(self) -> None:
        """Print what is waiting, whole or not."""
        print(self.tokenizer.decode(self.waiting), end="", flush=True)
        self.waiting = []


def load(a, say) -> tuple[GPT, dict[str, text.Tokenizer]]:
    """The model and its tokenizers. Raises Mistake."""
    source = str(checkpoint.chosen(Path(a.out_dir), a.checkpoint, say)) if a.init_from == "resume" else a.init_from
    loaded = pretrained.load(source, say)
    model = GPT(GPTConfig(**loaded.shape))
    model.load_weights(loaded.weights, source)
    return model.eval(), loaded.tokenizers or {"tokens": text.NumberTokenizer(sum(model.config.vocab_sizes))}


def main(a) -> None:
    device = parallel.find_device(a.device)
    model, tokenizers = load(a, lambda words: print(words, file=sys.stderr))
    model.to(device)
    model.compute_dtype, _ = parallel.choose_dtype(a.dtype, device)
    model.to(model.compute_dtype)  # once, rather than at every token
    vocabulary = model.vocabulary
    contexts = vocabulary.sizes if model.config.vocabulary == "contexts" else None
    names = list(tokenizers)

    if a.dataset and (a.dataset not in names or contexts):
        raise Mistake(f"--dataset={a.dataset}: " + ("the contexts are continued together" if contexts else f"the model has vocabularies of {', '.join(names)}"))
    chosen = names if contexts else [a.dataset or names[0]]
    if len(a.start) == 1 and a.start[0] == "\n":
        starts = a.start * len(chosen)
    elif len(a.start) == len(chosen):
        starts = a.start
    else:
        raise Mistake(f"--start: {len(a.start)} given, {len(chosen)} needed" + (f", one for each context ({', '.join(names)})" if contexts else ""))
    firsts = [vocabulary.firsts[names.index(name)] for name in chosen]
    prompts = [encode(tokenizers[name], prompt(start)) for name, start in zip(chosen, starts, strict=True)]
    if len({len(ids) for ids in prompts}) > 1:
        raise Mistake(f"--start: the contexts' prompts must be equally long, not {', '.join(str(len(ids)) for ids in prompts)} tokens")

    rows = np.stack([ids + first for ids, first in zip(prompts, firsts, strict=True)])  # (contexts, T)
    idx = torch.from_numpy(rows if contexts else rows[0]).to(device)
    idx = idx.expand(a.num_samples, *idx.shape)
    known = [tokenizers[names[0]].vocab_size] if model.config.vocabulary == "one" else None
    stream = Stream(tokenizers[chosen[0]]) if a.stream and not contexts else None
    if stream:
        for token in prompts[0].tolist():
            stream.put(token)
    out = generate.generate(
        model, idx, a.max_new_tokens, torch.Generator(device).manual_seed(a.seed), a.temperature, a.top_k, a.top_p, a.min_p, known,
        on_token=lambda ids: stream.put(int(ids[0]) - firsts[0]) if stream else None, compiled=a.compile,
    ).cpu()  # fmt: skip
    if stream:
        stream.flush()
    for number, row in enumerate(out):
        if number or not stream:
            streams = [(tokenizers[name], (ids - first).tolist()) for name, ids, first in zip(chosen, row.view(len(chosen), -1), firsts, strict=True)]
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
    return "\n".join(f"{name:{width}} | {line}" for block in [*blocks, lines] for name, line in zip(names, block, strict=True))


if __name__ == "__main__":
    configurator.run(main, ARGUMENTS)
