"""Examples to batches: the rows of JSONL, CSV or TSV files, as prompts and what is to be learned after them.

An example becomes one sequence of ids or two, each with a mask of the tokens that are learned; a batch holds them padded at their ends. As
with token bins, which examples a step reads is a pure function of the arguments and the step: each once an epoch, in random order.

The fields of a row, by objective: sft {"prompt", "completion"}, {"messages"} or {"text"}; dpo {"prompt", "chosen", "rejected"}; kto {"prompt",
"completion", "label"}; grpo {"prompt", "answer", ...}. A prompt is a text or a list of messages {"role", "content"}.

Knows nothing of the model but its number of rows, of ranks only which rows are asked for.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanoforge.data import tables, tokenization
from nanoforge.data.batches import Batch, Mixture, Source, Step, row_hash
from nanoforge.distributed import RankSlice, rank_range
from nanoforge.errors import UserError
from nanoforge.posttraining.prompt_format import Template
from nanoforge.rng import ORDER, permute

ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
FIELDS = {
    "sft": (("prompt", "completion"), ("messages",), ("text",)),
    "dpo": (("prompt", "chosen", "rejected"),),
    "kto": (("prompt", "completion", "label"),),
    "grpo": (("prompt", "answer"),),
}


class Ids(NamedTuple):
    """A sequence: ids, and which of them are learned; positions of packed ones, from 0 on in each."""

    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray | None = None


class Example(NamedTuple):
    sequences: tuple[Ids, ...]  # dpo: chosen, rejected; grpo: the prompt
    row: Mapping[str, object]
    reference: tuple[
        float, ...
    ] = ()  # log-probability of each sequence by the model that training began with, where it was looked up


class TooLong(Exception):
    """By so many tokens."""


# ---------------------------------------------------------------------------------------------------------------------
# one row to ids


@dataclass(frozen=True)
class ExampleEncoder:
    """How rows become ids.

    limit: tokens of a sequence, at most; overflow: what becomes of a longer one ("error", "drop", "truncate_target");
    room: tokens that must be left for a completion (grpo); template: a soft prompt around the row's fields, its row j being id first_row + j.
    """

    tokenizer: tokenization.Tokenizer
    limit: int
    overflow: str = "error"
    learn_all: bool = False
    room: int = 0
    template: Template | None = None
    first_row: int = 0
    target_field: str = ""
    truncation_field: str = ""

    def encode(self, words: object) -> list[int]:
        return self.tokenizer.encode(str(words)).tolist()

    def messages(self, messages: Sequence[Mapping[str, str]], open_end: bool) -> tuple[list[int], list[bool]]:
        """Ids and mask of a chat: each message is its role's token, its text and the end token; learned are what the assistant says and its end
        tokens. open_end: go on with the token of the assistant, who is to speak."""
        ids, mask = [], []
        for message in messages:
            said = [*self.encode(message["content"]), self.tokenizer.eos_id]
            ids += [self.tokenizer.added_ids[ROLES[message["role"]]], *said]
            mask += [False, *[message["role"] == "assistant"] * len(said)]
        return ([*ids, self.tokenizer.added_ids[ROLES["assistant"]]], [*mask, False]) if open_end else (ids, mask)

    def prompt(self, row: Mapping[str, object]) -> list[int]:
        """Ids of what comes before a completion."""
        if self.template is not None:
            return self.template.encode(row, self.tokenizer, self.first_row)
        return (
            self.messages(row["prompt"], open_end=True)[0]
            if isinstance(row["prompt"], list)
            else self.encode(row["prompt"])
        )

    def pair(self, row: Mapping[str, object], field: str) -> Ids:
        """The prompt and the completion in a field, with the end token; the completion is learned. Raises TooLong."""
        if self.template is not None and self.target_field:
            made = self.template.example(
                row,
                self.tokenizer,
                self.first_row,
                self.target_field,
                self.truncation_field or None,
                self.limit,
                self.overflow,
            )
            if made is None:
                raise TooLong
            ids, start = made
        else:
            prompt = self.prompt(row)
            ids, start = prompt + self.encode(row[field]) + [self.tokenizer.eos_id], len(prompt)
        return self.fitted(ids, [i >= start for i in range(len(ids))])

    def fitted(self, ids: list[int], mask: list[bool]) -> Ids:
        """Within the limit, cut at the end if that leaves something to learn. Raises TooLong."""
        if len(ids) > self.limit and (self.overflow != "truncate_target" or not any(mask[1 : self.limit])):
            raise TooLong(len(ids) - self.limit)
        kept = np.array(mask[: self.limit], dtype=bool) | self.learn_all
        kept[0] = False  # nothing comes before it
        return Ids(np.array(ids[: self.limit], dtype=np.int32), kept)

    def sft(self, row: Mapping[str, object]) -> Example:
        if "messages" in row:
            return Example((self.fitted(*self.messages(row["messages"], open_end=False)),), row)
        if "text" in row and self.template is None:
            ids = [*self.encode(row["text"]), self.tokenizer.eos_id]
            return Example((self.fitted(ids, [True] * len(ids)),), row)
        return Example((self.pair(row, "completion"),), row)

    def dpo(self, row: Mapping[str, object]) -> Example:
        return Example((self.pair(row, "chosen"), self.pair(row, "rejected")), row)

    def kto(self, row: Mapping[str, object]) -> Example:
        if not isinstance(row["label"], bool | int) or row["label"] not in (0, 1):
            raise UserError(f"label must be true or false, not {row['label']!r}")
        return Example((self.pair(row, "completion"),), row)

    def grpo(self, row: Mapping[str, object]) -> Example:
        ids = self.prompt(row)
        if len(ids) > self.limit - self.room:
            raise TooLong(len(ids) - self.limit + self.room)
        return Example((Ids(np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=bool)),), row)


def needed_tokens(tokenizer: tokenization.Tokenizer, rows: Iterable[Mapping[str, object]]) -> tokenization.Tokenizer:
    """The tokenizer with an end token, and with tokens for roles where the rows have messages."""
    chat = any(isinstance(row.get(field), list) for row in rows for field in ("messages", "prompt"))
    return tokenization.add_tokens(
        tokenizer,
        [*([tokenization.END_OF_TEXT] if tokenizer.eos_id is None else []), *(ROLES.values() if chat else [])],
    )


def read_rows(path: Path, objective: str, adapted: Callable[[dict], dict], fields: Sequence[str] = ()) -> list[dict]:
    """The rows of a file, each with the fields of the objective, or with these. Raises UserError that names file and row."""
    rows = []
    choices = (tuple(fields),) if fields else FIELDS[objective]
    for number, row in enumerate(tables.read_rows(path), start=1):
        try:
            row = adapted(row)
        except UserError as mistake:
            raise UserError(f"{path}: row {number}: {mistake}") from None
        if not any(all(field in row for field in choice) for choice in choices):
            wanted = " or ".join("{" + ", ".join(choice) + "}" for choice in choices)
            raise UserError(f"{path}: row {number} has {', '.join(row)}; --objective={objective} needs {wanted}")
        check_messages(row, f"{path}: row {number}")
        rows.append(row)
    return rows


def check_messages(row: Mapping[str, object], where: str) -> None:
    for field in ("messages", "prompt"):
        if isinstance(row.get(field), list):
            for message in row[field]:
                if (
                    not isinstance(message, dict)
                    or message.get("role") not in ROLES
                    or not isinstance(message.get("content"), str)
                ):
                    raise UserError(
                        f'{where}: a message of {field} is not {{"role": {", ".join(ROLES)}; "content": text}}'
                    )


# ---------------------------------------------------------------------------------------------------------------------
# all examples of a file


class Examples:
    """One split of one dataset: encoded, each once an epoch in random order."""

    def __init__(
        self,
        name: str,
        rows: Sequence[Mapping[str, object]],
        objective: str,
        coder: ExampleEncoder,
        seed: int,
        number: int,
        where: str,
        packed: bool = False,
    ):
        """Raises UserError where a row can't be encoded, or is too long and overflow is "error"."""
        self.name, self.seed, self.number, self.streams, self.bytes, self.coder = (
            name,
            seed,
            number,
            [self],
            None,
            coder,
        )
        encode, self.items, longer = getattr(coder, objective), [], []
        for row_number, row in enumerate(rows, start=1):
            try:
                self.items.append(encode(row))
            except TooLong as too_long:
                longer.append(int(too_long.args[0]) if too_long.args else 0)
            except (UserError, KeyError, UnicodeError) as error:
                raise UserError(f"{where}: row {row_number}: {error}") from None
        self.dropped = len(longer)
        if longer and coder.overflow == "error":
            room = f" less the {coder.room} of a completion" if coder.room else ""
            raise UserError(
                f"{where}: {len(longer)} of {len(rows)} examples are longer than {coder.limit} tokens{room}, by up to {max(longer)}; raise --block_size, or say --overflow=drop or truncate_target"
            )
        if not self.items:
            raise UserError(f"{where}: no example is left" if rows else f"{where}: holds no examples")
        self.tokens = sum(len(sequence.ids) for item in self.items for sequence in item.sequences)
        if packed:
            self.items = pack(self.items, coder.limit)
        self.n_windows = len(self.items)
        self.tokens_per_window = self.tokens / self.n_windows  # the mean

    def locate(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(zeros, which example) for examples by their numbers in the run, as Dataset.locate gives them."""
        epoch, index = np.divmod(number, self.n_windows)
        return np.zeros_like(index), permute(index, self.n_windows, self.seed, ORDER, self.number, epoch)

    def eval_batches(
        self, iters: int, size: int, rank: int, world: int, collate: Callable
    ) -> Iterator[tuple[Batch, bool]]:
        """This rank's part of each of the first `iters` batches of `size` examples, in the order of the file, and whether it has one: a rank
        without an example reads another's with the others, all of it masked."""
        size = max(size, collate.least)
        for first in range(0, min(len(self.items), iters * size), size):
            whole = self.items[first : min(first + size, len(self.items), iters * size)]
            if len(whole) < collate.least:
                return
            mine = rank_range(len(whole), rank, world)
            batch, counts = collate(whole, mine.start, max(mine.stop, mine.start + 1), 1), len(mine) > 0
            yield (
                batch
                if counts
                else batch.with_tensors(
                    **{name: torch.zeros_like(mask) for name, mask in batch.extras.items() if name.endswith("mask")}
                ),
                counts,
            )


def pack(items: Sequence[Example], limit: int) -> list[Example]:
    """Examples one after the other in sequences of at most `limit` tokens: the longest first, each where the least room is left (best fit decreasing)."""
    room: list[tuple[int, int]] = []  # (room left, pack), ascending
    packs: list[list[Ids]] = []
    for item in sorted(items, key=lambda item: -len(item.sequences[0].ids)):
        sequence = item.sequences[0]
        at = bisect.bisect_left(room, (len(sequence.ids), -1))
        left, number = room.pop(at) if at < len(room) else (limit, len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(sequence)
        bisect.insort(room, (left - len(sequence.ids), number))
    joined = (
        Ids(
            *(
                np.concatenate(column)
                for column in zip(*((s.ids, s.mask, np.arange(len(s.ids))) for s in some), strict=True)
            )
        )
        for some in packs
    )
    return [Example((sequence,), {}) for sequence in joined]


# ---------------------------------------------------------------------------------------------------------------------
# examples to batches


def padded(sequences: Sequence[Ids], width: int = 0) -> Batch:
    """Sequences in rows, padded with id 0 to the longest, or to `width`; mask tells which targets are learned."""
    width = max(width, 2, *(len(sequence.ids) for sequence in sequences))
    tokens, mask = np.zeros((len(sequences), width), dtype=np.int64), np.zeros((len(sequences), width), dtype=bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence.ids)], mask[row, : len(sequence.ids)] = sequence.ids, sequence.mask
    more = {"loss_mask": torch.from_numpy(mask[:, 1:].copy())}
    if sequences[0].positions is not None:
        positions = np.zeros((len(sequences), width - 1), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            places = sequence.positions[: width - 1]
            positions[row] = np.concatenate(
                (places, np.arange(width - 1 - len(places)))
            )  # the padding is a document of its own
        more["position_ids"] = torch.from_numpy(positions)
    return Batch(torch.from_numpy(tokens), more)


@dataclass(frozen=True)
class Collator:
    """Rows [first, last) of the examples of a step to a batch; `width`: the number of tokens all are padded to (0: the longest here)."""

    width: int = 0
    world: int = 1
    least = 1  # examples that a batch must have

    def __call__(self, whole: Sequence[Example], first: int, last: int, parts: int) -> Batch:
        """The sequences of each kind follow those of the one before: all chosen, then all rejected."""
        here = whole[first:last]
        batch = padded(
            [sequence for kind in zip(*(item.sequences for item in here), strict=True) for sequence in kind], self.width
        )
        learned = sum(int(sequence.mask.sum()) for item in whole for sequence in item.sequences)
        more = self.further(whole, first, last)
        return Batch(batch.tokens, batch.extras | more, parts, learned / self.world)

    def further(self, whole: Sequence[Example], first: int, last: int) -> dict[str, torch.Tensor]:
        """What else the rows need."""
        here = whole[first:last]
        return (
            {
                "ref_logps": torch.tensor(
                    [value for kind in zip(*(item.reference for item in here), strict=True) for value in kind]
                )
            }
            if here[0].reference
            else {}
        )


@dataclass(frozen=True)
class KTOCollator(Collator):
    """kto's: also labels, and each prompt with the completion of the row before (the first with the last one's)."""

    limit: int = 0
    least = 2

    def further(self, whole: Sequence[Example], first: int, last: int) -> dict[str, torch.Tensor]:
        strangers = []
        for number in range(first, last):
            (own,), (other,) = whole[number].sequences, whole[number - 1].sequences
            start, begin = (int(sequence.mask.argmax()) for sequence in (own, other))
            ids = np.concatenate((own.ids[:start], other.ids[begin:]))[: self.limit]
            strangers.append(Ids(ids, np.arange(len(ids)) >= start))
        batch = padded(strangers, self.width)
        return {
            "desirable": torch.tensor([bool(item.row["label"]) for item in whole[first:last]]),
            "kl_completion": batch.tokens, "kl_completion_mask": batch.extras["loss_mask"],
        }  # fmt: skip


class ExampleSource(Source):
    """Training batches of `rows` examples a step, drawn from datasets by a mixture."""

    def __init__(self, datasets: Sequence[Examples], mixture: Mixture, rows: int, seed: int, collate: Collator):
        super().__init__(datasets, mixture, rows, seed)
        self.collate = collate

    @property
    def tokens_per_step(self) -> float:
        """About, by the mean example; without padding."""
        return self.rows / self.steps_per_rollout * sum(dataset.tokens for dataset in self.datasets) / self.n_windows

    def iter_examples(self, start_step: int) -> Iterator[list[Example]]:
        """The examples of step `start_step` and of all after it."""
        for plan in self.iter_plans(start_step, 0, self.rows):
            pairs = zip(plan.dataset_id.tolist(), plan.start.tolist(), strict=True)
            yield [self.datasets[dataset_id].items[index] for dataset_id, index in pairs]

    def iter_steps(self, start_step: int, rows: RankSlice, *, pin: bool, hashed: bool) -> Iterator[Step]:
        first, last, size = rows
        for whole in self.iter_examples(start_step):
            cuts = range(first, last, size)
            made = [self.collate(whole, row, min(row + size, last), len(cuts)) for row in cuts]
            if pin:
                made = [
                    Batch(
                        b.tokens.pin_memory(),
                        {name: tensor.pin_memory() for name, tensor in b.extras.items()},
                        b.n_micro_batches,
                        b.num_loss_tokens,
                    )
                    for b in made
                ]
            digest = (
                row_hash(
                    [np.concatenate([sequence.ids for sequence in item.sequences]) for item in whole[first:last]], first
                )
                if hashed
                else 0
            )
            yield Step(made, digest, sum(len(sequence.ids) for item in whole for sequence in item.sequences))
