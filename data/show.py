"""Look at a dataset as training reads it: token bins as windows of text, examples with their loss mask.

    python data/show.py shakespeare                                   a dataset of data/: its bins, its examples
    python data/show.py rows.jsonl --tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct --block_size=1024
    python data/show.py hf:trl-lib/Capybara --tokenizer=gpt2 --n=5
    python data/show.py --out_dir=out/run                             what this run was trained on, by its tokenizer
    python data/show.py code tags                                     aligned streams of --training_mode=multicontext

Of bins: tokens and bytes of each file, lengths of documents, use of the vocabulary, and the windows that training
reads first. Of examples: lengths against --block_size, and the first rows of training behind their prompt format or
chat template. Flags of train.py mean here what they mean there.

On a terminal the loss mask is in colour (green: in the loss; dim: not), control tokens are inverted, every second token
is underlined. Elsewhere {+what is in the loss+}, [control tokens], and a middle dot between tokens.
"""

import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
from configurator import Rules, arg, arg_group, arg_table
from nanoforge import config_files
from nanoforge.console import ProgressBar, plural
from nanoforge.data import hub_datasets, tables
from nanoforge.errors import UserError
from nanoforge.posttraining import example_rows
from nanoforge.posttraining.objective_specs import OBJECTIVES
from train_args import TrainArgs, columns_errors, load_args

if TYPE_CHECKING:  # these import torch, or numpy, which --help does without
    import numpy as np

    from nanoforge.data.batches import Dataset
    from nanoforge.data.token_bins import TokenBin
    from nanoforge.data.tokenization import Tokenizer
    from nanoforge.posttraining.examples import Example, ExampleEncoder, TokenSequence

# ---------------------------------------------------------------------------------------------------------------------
# arguments

OF_TRAINING = (  # arguments of train.py that decide what a row becomes, or which windows are read
    "data_dir",
    "block_size",
    "sampling_method",
    "validation_file",
    "val_fraction",
    "columns",
    "bad_rows",
    "overflow",
    "loss_on",
    "packing",
    "prompt_format",
    "target_field",
    "truncation_field",
    "max_tokens",
    "max_new_tokens",
    "chat_template",
    "chat_template_kwargs",
)


def fields_of_training() -> dict[str, Any]:
    """The fields of train.py's table, as those of a group of this one; what they need there is not asked for here."""
    members: dict[str, Any] = {"__doc__": "as in train.py", "__annotations__": {}}
    specs = configurator.arg_specs(TrainArgs)
    for field in dataclasses.fields(TrainArgs):
        if field.name in OF_TRAINING:
            options = {name: value for name, value in field.metadata.items() if name not in ("needs", "help")}
            members[field.name] = arg(specs[field.name].default, field.metadata["help"], **options)
            members["__annotations__"][field.name] = field.type
    return members


@arg_group
class OwnArgs:
    """show"""

    name: tuple[str, ...] = arg(
        (), "dataset of data_dir, a folder, a file of rows, or hf:NAME; --name may be left out", split=False, path=True
    )
    n: int = arg(3, "number of windows, or of examples, to print (0: the numbers alone)", low=0)
    split: str = arg("train", "train or val", choices=("train", "val"))
    seed: int = arg(TrainArgs.seed, "random seed of the order in which training reads", low=0, high=2**32 - 1)
    tokenizer: str = arg(
        "",
        "tokenizer of examples: byte, an encoding of tiktoken, or that of a model: a folder, a file, or org/name of "
        "the hub (none: the dataset's own, or else bytes)",
        path=True,
    )
    out_dir: str = arg("", "run folder: show its data, its settings and its tokenizer", path=True)
    objective: str = arg(
        "auto",
        "objective whose data is shown: lm reads bins, others examples (auto: what the dataset has, by its columns)",
        choices=("auto", *OBJECTIVES),
    )
    boundaries: str = arg(
        "auto", "mark where tokens end (auto: unless they are characters or bytes)", choices=("auto", "true", "false")
    )


OfTrainingArgs: Any = arg_group(type("OfTrainingArgs", (), fields_of_training()))


@arg_table
class ShowArgs(OwnArgs, OfTrainingArgs):  # type: ignore[misc, valid-type]
    """The arguments of data/show.py."""


def add_run(layers: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """The layers, above the values of the run that --out_dir names."""
    folders = [values["out_dir"] for _, values in layers if values.get("out_dir")]
    path = Path(folders[-1]).expanduser() / config_files.RECORD_FILE if folders else None
    if path is None or not path.exists():
        return layers
    recorded = config_files.read_file(str(path))
    return [(str(path), {name: recorded[name] for name in OF_TRAINING if name in recorded}), *layers]


def check(args: ShowArgs, source: dict[str, str]) -> Iterator[str]:
    """Errors of arguments that are missing or have no effect."""
    if not args.name and not args.out_dir:
        yield "NAME: is needed: a dataset of data/, a folder, a file of rows, hf:NAME; or --out_dir=RUN"
    if len({*args.name}) < len(args.name):
        yield f"NAME: {' '.join(args.name)} has a dataset twice; aligned streams are different ones"
    if len(args.name) > 1 and any(hub_datasets.is_hub(name) or Path(name).is_file() for name in args.name):
        yield f"NAME: {' '.join(args.name)}: several names are aligned streams, folders of token bins; show one alone"
    if args.tokenizer and args.out_dir:
        yield "--tokenizer: has no effect with --out_dir, whose run has one; leave one of them out"
    if args.tokenizer in ("char", "bpe"):
        yield f"--tokenizer={args.tokenizer}: is made from a text by data/prepare.py; name a dataset or a model"
    yield from columns_errors(dataclasses.replace(TrainArgs(), columns=args.columns, prompt_format=args.prompt_format))


def training_args(args: ShowArgs) -> TrainArgs:
    """The arguments of a training run that would read this data. Raises UserError."""
    shared = {name: getattr(args, name) for name in OF_TRAINING} | {"seed": args.seed}
    training = TrainArgs()
    if args.out_dir:
        if not Path(args.out_dir, config_files.RECORD_FILE).exists():
            raise UserError(f"--out_dir={args.out_dir}: no run there, as it has no {config_files.RECORD_FILE}")
        training = load_args(Path(args.out_dir))
        shared |= {"init_from": "resume", "out_dir": args.out_dir, "checkpoint": "last"}  # for its tokenizer
    training = dataclasses.replace(training, **shared)
    if not args.name:
        return training
    training = dataclasses.replace(training, training_mode="single", train_file="", multidataset_wte=False)
    if Path(args.name[0]).is_file():
        return dataclasses.replace(training, train_file=args.name[0])
    if hub_datasets.is_hub(args.name[0]):
        return dataclasses.replace(training, dataset=args.name[0])
    data_dir, names = find_folders(args.name, args.data_dir)
    if len(names) == 1:
        return dataclasses.replace(training, data_dir=data_dir, dataset=names[0])
    return dataclasses.replace(
        training, data_dir=data_dir, training_mode="multicontext", multicontext_datasets=tuple(names)
    )


def find_folders(names: Sequence[str], data_dir: str) -> tuple[str, list[str]]:
    """(--data_dir, names of datasets in it) of names of datasets, and of paths of folders that lie elsewhere."""
    folders = []
    is_elsewhere = False
    for name in names:
        inside = Path(data_dir, name)
        is_path = Path(name).is_dir() and (os.path.isabs(name) or not inside.is_dir())
        folders.append(Path(name) if is_path else inside)
        is_elsewhere |= is_path
    if not is_elsewhere:
        return data_dir, list(names)
    root = os.path.commonpath([folder.resolve().parent for folder in folders])
    return root, [os.path.relpath(folder.resolve(), root) for folder in folders]


def objectives_to_show(args: ShowArgs, training: TrainArgs) -> list[str]:
    """The objectives whose data is shown: of a folder with bins and examples, both. Raises UserError."""
    if args.objective != "auto":
        return [args.objective]
    if args.out_dir:
        return [training.objective]
    if training.train_file or training.hub_names:
        return [guess_objective(training)]
    found = []
    folder = next(iter(training.folders.values()))
    if not any(folder.glob("*.bin")) and not any(folder.glob("*.jsonl")):
        token_bins.prepare_if_missing(folder)
    if any(folder.glob("*.bin")):
        found.append("lm")
    if (folder / "train.jsonl").exists() and training.training_mode == "single":
        found.append(guess_objective(training))
    return found or ["lm"]


def guess_objective(training: TrainArgs) -> str:
    """The objective that reads the columns of the first row. Raises UserError."""
    (sources,) = builders.example_sources(training).values()
    _, row = next(example_rows.numbered_rows(sources["train"]), (0, {}))
    for name in ("dpo", "kto", "sft", "grpo"):
        form = builders.row_format(dataclasses.replace(training, objective=name), has_chat_template=True)
        try:
            form.choose_fields(form.shape(row).row)
        except UserError:
            continue
        return name
    raise UserError(
        f"{sources['train']}: no objective reads the columns {', '.join(row) or 'of an empty file'}; "
        "name them with --columns, as in --columns=prompt=question,completion=answer"
    )


# ---------------------------------------------------------------------------------------------------------------------
# tokens as text


class Piece(NamedTuple):
    """A token, or the few that only together make a character."""

    text: str
    start: int
    stop: int
    is_control: bool = False


def pieces_of(tokenizer: "Tokenizer", ids: Sequence[int]) -> Iterator[Piece]:
    """The texts of ids, with the names of control tokens; ids beyond the vocabulary are virtual tokens."""
    names = {number: name for name, number in tokenizer.control_tokens.items()}
    start = 0
    for stop in range(1, len(ids) + 1):
        last = ids[stop - 1]
        if last in names or last >= tokenizer.vocab_size:
            yield Piece(names.get(last, f"P{last - tokenizer.vocab_size}"), stop - 1, stop, is_control=True)
            start = stop
            continue
        text = tokenizer.decode_continuation(ids[start:stop])
        is_cut = "\ufffd" in text and stop - start < 4 and stop < len(ids) and ids[stop] not in names
        if not is_cut:
            yield Piece(text, start, stop)
            start = stop


def printable(text: str, *, newline: str = "\n") -> str:
    """The text with control characters as escapes, so that data can't speak to the terminal."""
    kept = {"\n": newline, "\t": "\t"}
    return "".join(c if c.isprintable() else kept.get(c) or c.encode("unicode_escape").decode() for c in text)


INVERTED, UNDERLINED = 7, 4  # codes of a terminal
COLORS = {True: 32, False: 2}  # in the loss: green; not: dim


def paint(text: str, codes: Sequence[int]) -> str:
    """The text with these codes of a terminal, line by line."""
    begin = "".join(f"\x1b[{code}m" for code in codes)
    return "\n".join(f"{begin}{line}\x1b[0m" if line and codes else line for line in text.split("\n"))


@dataclasses.dataclass(frozen=True)
class Style:
    """How tokens are marked."""

    colored: bool
    boundaries: bool

    def render(self, pieces: Sequence[Piece], loss_mask: Sequence[bool] = ()) -> str:
        """Pieces as running text, with the loss mask if there is one."""
        write = self.write_colored if self.colored else self.write_plain
        newline = "\\n\n" if self.boundaries else "\n"
        masks = [loss_mask[piece.start] for piece in pieces] if loss_mask else [None] * len(pieces)
        return write([printable(piece.text, newline=newline) for piece in pieces], pieces, masks)

    def write_colored(self, texts: Sequence[str], pieces: Sequence[Piece], masks: Sequence[bool | None]) -> str:
        parts = []
        for number, (text, piece, in_loss) in enumerate(zip(texts, pieces, masks, strict=True)):
            codes = [COLORS[in_loss]] if in_loss is not None else []
            if piece.is_control:
                codes.append(INVERTED)
            elif self.boundaries and number % 2:
                codes.append(UNDERLINED)
            parts.append(paint(text, codes))
        return "".join(parts)

    def write_plain(self, texts: Sequence[str], pieces: Sequence[Piece], masks: Sequence[bool | None]) -> str:
        written = ""
        was_in_loss = False
        for text, piece, in_loss in zip(texts, pieces, masks, strict=True):
            written += "+}" if was_in_loss and not in_loss else ""
            written += "\u00b7" if self.boundaries and written and not written.endswith("\n") else ""
            written += "{+" if in_loss and not was_in_loss else ""
            written += f"[{text}]" if piece.is_control else text
            was_in_loss = bool(in_loss)
        return written + ("+}" if was_in_loss else "")

    def render_aligned(self, streams: dict[str, list[Piece]], width: int) -> str:
        """Aligned streams as rows, a column for each token, broken at a width."""
        cells = {name: cells_of(pieces) for name, pieces in streams.items()}
        label = 2 + max(map(len, cells))
        widths = [max(map(len, column)) for column in zip(*cells.values(), strict=True)]
        blocks = []
        start = 0
        while start < len(widths):
            stop = start + 1
            while stop < len(widths) and label + sum(widths[start : stop + 1]) + stop - start <= width:
                stop += 1
            for name, row in cells.items():
                columns = [cell.ljust(size) for cell, size in zip(row[start:stop], widths[start:stop], strict=True)]
                blocks.append(name.ljust(label) + ("|" if self.boundaries else "").join(columns).rstrip())
            blocks.append("")
            start = stop
        return "\n".join(blocks)


def cells_of(pieces: Sequence[Piece]) -> list[str]:
    """A text for each token, on one line; a character of several tokens stands at the first of them."""
    cells = []
    for piece in pieces:
        text = printable(piece.text, newline="\\n").replace("\t", "\\t")
        cells += [f"[{text}]" if piece.is_control else text, *[""] * (piece.stop - piece.start - 1)]
    return cells


def style_for(args: ShowArgs, tokenizer: "Tokenizer") -> Style:
    """The marks that suit the output and the tokenizer."""
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    is_marked = args.boundaries == "true" or (args.boundaries == "auto" and tokenizer.kind not in ("char", "byte"))
    return Style(colored, is_marked)


def quantiles(lengths: "np.ndarray") -> str:
    """Quantiles of lengths, on a line."""
    parts = [f"{share:.0%} {value:,.0f}" for share in (0.1, 0.5, 0.9, 0.99) for value in [np.quantile(lengths, share)]]
    return f"{', '.join(parts)}, longest {lengths.max():,}, mean {lengths.mean():,.1f}"


# ---------------------------------------------------------------------------------------------------------------------
# token bins

COUNTED_TOKENS = 2**28  # of a larger split 64 stretches are counted
STRETCHES = 64


def show_bins(args: ShowArgs, training: TrainArgs) -> None:
    """Numbers of every split, then windows of one. Raises UserError."""
    metas = {name: token_bins.read_meta(folder) for name, folder in training.folders.items()}
    for name, meta in metas.items():
        tokenizer = meta.tokenizer
        print(f"{name}: token bins of {meta.dtype}; tokenizer {tokenizer.kind}, {meta.vocab_size:,} ids")
        for split in token_bins.SPLITS:
            describe_bin(token_bins.TokenBin(training.folders[name], split, meta, name))
    if not args.n:
        return
    data = batches.open_data(
        Path(training.data_dir),
        names=training.mixture,
        metas=metas,
        vocab_offsets={},
        mixture=builders.build_mixture(training),
        sampling=batches.WindowSampling(
            training.block_size, training.global_batch_size, training.sampling_method, training.seed
        ),
    )
    for dataset in data.source.datasets if args.split == "train" else data.eval_datasets[args.split]:
        show_windows(args, dataset)


def show_windows(args: ShowArgs, dataset: "Dataset") -> None:
    """The windows of a dataset that are read first."""
    shards, starts = dataset.locate(np.arange(args.n))
    windows = dataset.read_windows(shards, starts)  # (n, K, block_size + 1)
    reader = "training" if args.split == "train" else "an evaluation"
    for number, window in enumerate(windows):
        place = f"{dataset.streams[0].paths[shards[number]].name} at token {starts[number]:,}"
        tokens = f"{dataset.T:,} tokens and the last target"
        print(f"\nwindow {number + 1} that {reader} of {dataset.name} reads: {place}, {tokens}")
        streams = {
            stream.name: list(pieces_of(stream.meta.tokenizer, ids.tolist()))
            for stream, ids in zip(dataset.streams, window, strict=True)
        }
        style = style_for(args, dataset.streams[0].meta.tokenizer)
        if len(streams) > 1:
            print(style.render_aligned(streams, shutil.get_terminal_size((120, 24)).columns))
        else:
            print(style.render(next(iter(streams.values()))))


def describe_bin(split: "TokenBin") -> None:
    """Print the numbers of a split: of its files, documents and ids."""
    for path, tokens in list(zip(split.paths, split.sizes.tolist(), strict=True))[:8]:
        n_bytes = split.meta.files.get(path.name, {}).get("bytes")
        ratio = f", {n_bytes:,} bytes of text, {n_bytes / tokens:.3f} bytes per token" if n_bytes else ""
        print(f"  {path.name}: {tokens:,} tokens{ratio}")
    if len(split.paths) > 8:
        print(f"  ... {len(split.paths):,} shards, {split.tokens:,} tokens")
    counts, lengths, part = count_tokens(split)
    tokenizer = split.meta.tokenizer
    if tokenizer.eos_id is None:
        print(f"    documents{part}: unknown, as the tokenizer has no end-of-sequence token")
    elif len(lengths):
        print(f"    documents{part}: {len(lengths):,} that end; tokens of one: {quantiles(lengths)}")
    else:
        print(f"    documents{part}: none that ends")
    order = np.argsort(-counts, kind="stable")
    half = 1 + int(np.searchsorted(np.cumsum(counts[order]), counts.sum() / 2))
    used = plural(int((counts > 0).sum()), "id")
    print(
        f"    vocabulary{part}: {used} of {split.meta.vocab_size:,} used; the {half:,} commonest are half of the text"
    )
    common = []
    for i in order[: min(8, half)].tolist():
        (piece,) = pieces_of(tokenizer, [i])
        common.append(f"{piece.text!r} {counts[i] / counts.sum():.1%}")
    print(f"    commonest: {', '.join(common)}")


def count_tokens(split: "TokenBin") -> tuple["np.ndarray", "np.ndarray", str]:
    """(count of each id, tokens of each document that ends, its end included, what part of a large split this is)."""
    stretch = COUNTED_TOKENS // STRETCHES
    is_whole = split.tokens <= COUNTED_TOKENS
    eos_id = -1 if split.meta.tokenizer.eos_id is None else split.meta.tokenizer.eos_id  # -1: no id
    counts = np.zeros(split.meta.vocab_size, dtype=np.int64)
    lengths: list[np.ndarray] = []
    since_end = 0  # tokens after the last end; of a stretch the first document is cut, and left out
    starts = range(0, split.tokens, stretch) if is_whole else token_bins.stretch_starts(split.tokens, stretch)
    bar = ProgressBar(f"counting {split.name}", unit="tokens", total=min(split.tokens, COUNTED_TOKENS))
    for start in starts:
        ids = read_tokens(split, start, stretch)
        counts += np.bincount(ids, minlength=len(counts))
        ends = np.flatnonzero(ids == eos_id)
        if len(ends):
            first = [since_end + int(ends[0]) + 1] if is_whole else []
            lengths.append(np.concatenate((first, np.diff(ends))).astype(np.int64))
            since_end = len(ids) - int(ends[-1]) - 1
        else:
            since_end += len(ids)
        bar.add(len(ids))
    bar.close()
    part = "" if is_whole else f", in {STRETCHES} stretches of {stretch:,} tokens"
    return counts, np.concatenate(lengths) if lengths else np.array([], dtype=np.int64), part


def read_tokens(split: "TokenBin", start: int, length: int) -> "np.ndarray":
    """Up to `length` ids of a split from a place on, over the ends of its shards."""
    ends = np.cumsum(split.sizes)
    parts = []
    while length and start < split.tokens:
        i = int(np.searchsorted(ends, start, side="right"))
        place = start - int(ends[i] - split.sizes[i])
        shard = split.shards[i]
        offset = shard.offset + place * shard.dtype.itemsize
        count = min(length, shard.tokens - place)
        parts.append(np.fromfile(shard.path, shard.dtype, count, offset=offset))
        start += count
        length -= count
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------------------------------
# examples

ROWS_AT_ONCE = 1000  # between steps of the progress bar


def show_examples(args: ShowArgs, training: TrainArgs) -> None:
    """Lengths of the examples of one split, then some of them. Raises UserError."""
    builders.prepare_data(training)
    tokenizer = tokenizer_of_examples(args, training)
    rows = builders.read_rows(training, print, has_chat_template=tokenizer.chat_template != "")
    tokenizer = builders.tokenizer_for_rows(training, tokenizer, rows)
    print(f"{', '.join(rows)}: examples read as --objective={training.objective} does, {describe(tokenizer)}")
    encoder = builders.build_encoder(training, tokenizer, tokenizer.vocab_size)
    for index, (name, splits) in enumerate(rows.items()):
        place = f"{name}, {args.split}"
        examples = encode_all(encoder, training, splits[args.split], place)
        describe_lengths(training, encoder, examples, place)
        read = [fitted for example in examples for fitted in fit(encoder, training, example)]
        if training.packing:
            read = pack(read, encoder.max_tokens)
        if not read or not args.n:
            continue
        dataset = Examples(name, read, training.seed, index)
        numbers = np.arange(min(args.n, len(read)))
        order = dataset.locate(numbers)[1] if args.split == "train" else numbers
        what = "pack" if training.packing else "example"
        for number in order.tolist():
            print(f"\n{what} {number + 1:,} of {len(read):,} of {place}")
            show_example(read[number], style_for(args, tokenizer), tokenizer)


def encode_all(
    encoder: "ExampleEncoder", training: TrainArgs, rows: Sequence[tables.Row], place: str
) -> list["Example"]:
    """The rows as examples of any length. Raises UserError."""
    unbounded = dataclasses.replace(encoder, max_tokens=sys.maxsize, max_completion_tokens=0)
    example_type = OBJECTIVES[training.objective].example_type
    bar = ProgressBar(f"encoding {place}", unit="examples", total=len(rows))
    encoded = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        encoded += encode_rows(some, unbounded, example_type, place, training.bad_rows).examples
        bar.add(len(some))
    bar.close()
    return encoded


def fit(encoder: "ExampleEncoder", training: TrainArgs, example: "Example") -> list["Example"]:
    """The example as training reads it: as it is, cut, or not at all."""
    if length_of(example) <= encoder.max_tokens - encoder.max_completion_tokens:
        return [example]
    try:
        return [encoder.encode(example.row, OBJECTIVES[training.objective].example_type)]
    except ExampleTooLongError:
        return []


def length_of(example: "Example") -> int:
    """Tokens of an example; of a pair those of the longer sequence."""
    return max(len(sequence.ids) for sequence in example.sequences)


def tokenizer_of_examples(args: ShowArgs, training: TrainArgs) -> "Tokenizer":
    """The tokenizer that --tokenizer names, or that training would take. Raises UserError."""
    if not args.tokenizer:
        return builders.example_tokenizer(training, None)
    tokenizer = corpus.build_tokenizer(args.tokenizer, 0, lambda: [])
    return with_fixed_date(with_chat_template(tokenizer, training.chat_template, training.chat_template_kwargs))


def describe(tokenizer: "Tokenizer") -> str:
    """A tokenizer in a few words."""
    template = "with a chat template" if tokenizer.chat_template else "without a chat template"
    return f"by a tokenizer ({tokenizer.kind}, {tokenizer.vocab_size:,} ids) {template}"


def describe_lengths(training: TrainArgs, encoder: "ExampleEncoder", examples: Sequence["Example"], place: str) -> None:
    """Print how long examples are, and how many are longer than training takes."""
    lengths = [length_of(example) for example in examples]
    learned = [sum(int(sequence.loss_mask.sum()) for sequence in example.sequences) for example in examples]
    print(f"  {place}: {plural(len(lengths), 'example')}; tokens: {quantiles(np.array(lengths))}")
    if any(learned):
        print(f"    in the loss: {quantiles(np.array(learned))}")
    room = encoder.max_tokens - encoder.max_completion_tokens
    n_long = sum(length > room for length in lengths)
    limit = f"--block_size={training.block_size}"
    if room != training.block_size:
        limit = f"{room:,} tokens, which {limit} leaves"
    fate = {"error": "refused", "drop": "dropped", "truncate_target": "cut"}[training.overflow]
    if n_long:
        print(f"    longer than {limit}: {n_long:,} ({n_long / len(lengths):.1%}), {fate} (--overflow)")
    else:
        print(f"    longer than {limit}: none")


def show_example(example: "Example", style: Style, tokenizer: "Tokenizer") -> None:
    """Print an example: where it is from, its sequences, and what else training reads of it."""
    place = example_rows.place_of(example.row, "")
    labels = ["chosen", "rejected"] if len(example.sequences) > 1 else [""]
    for label, sequence in zip(labels, example.sequences, strict=True):
        n_learned = int(sequence.loss_mask.sum())
        counts = f"{len(sequence.ids):,} tokens, {n_learned:,} in the loss"
        print(", ".join(filter(None, [place, label, counts])))
        for text in parts_of(sequence, style, tokenizer):
            print(text)
    for name in ("label", "answer"):
        if name in example.row:
            print(f"{name}: {printable(str(example.row[name]))}")


def parts_of(sequence: "TokenSequence", style: Style, tokenizer: "Tokenizer") -> Iterator[str]:
    """The text of a sequence; of a pack, those of its examples."""
    starts = [0] if sequence.position_ids is None else np.flatnonzero(sequence.position_ids == 0).tolist()
    for start, stop in zip(starts, [*starts[1:], len(sequence.ids)], strict=True):
        pieces = list(pieces_of(tokenizer, sequence.ids[start:stop].tolist()))
        yield style.render(pieces, sequence.loss_mask[start:stop].tolist())


def main(args: ShowArgs) -> None:
    training = training_args(args)
    for number, objective in enumerate(objectives_to_show(args, training)):
        if number:
            print()
        training = dataclasses.replace(training, objective=objective)
        if OBJECTIVES[objective].reads_examples:
            show_examples(args, training)
        else:
            builders.prepare_data(training)
            show_bins(args, training)


def parse(argv: list[str]) -> ShowArgs:
    """NAMES and flags; exits with status 2 on errors."""
    names = list(takewhile(lambda text: not text.startswith("-"), argv))
    flags = [*(["--name", *names] if names else []), *argv[len(names) :]]
    return configurator.parse(ShowArgs, flags, __doc__ or "", Rules(locate=add_run, check=check))


if __name__ == "__main__":
    ARGS = parse(sys.argv[1:])
    configurator.exit_on_interrupt()

import numpy as np

import builders
from nanoforge.data import batches, corpus, token_bins
from nanoforge.posttraining.chat_template import with_chat_template, with_fixed_date
from nanoforge.posttraining.examples import Examples, ExampleTooLongError, encode_rows, pack

if __name__ == "__main__":
    configurator.run(main, ARGS, output_is_required=True)
