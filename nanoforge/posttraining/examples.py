"""Examples to batches: rows as token sequences and the masks of what counts in the loss.

An example becomes one token sequence, or two; a batch holds them padded at their ends. As with token bins, which
examples a step reads is a pure function of the arguments and the step: each once an epoch, in random order.

The rows come checked from example_rows.py: prompts and completions are texts, or lists of messages {"role", "content"}.

Knows of the model only the number of its embedding's rows, of ranks only which rows are asked for.
"""

import bisect
import dataclasses
import functools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanoforge.data import tokenization
from nanoforge.data.batches import Batch, Mixture, Source, Step, row_hash
from nanoforge.data.tables import Row
from nanoforge.distributed import Ranks, RankSlice, eval_share
from nanoforge.errors import UserError
from nanoforge.posttraining.chat_template import ChatTemplate, common_prefix_length
from nanoforge.posttraining.example_rows import (
    ROLES,
    TEMPLATE_COLUMNS,
    as_messages,
    describe_skipped,
    has_messages,
    place_of,
)
from nanoforge.posttraining.prompt_format import EncodedExample, PromptTemplate, TargetOptions
from nanoforge.rng import ORDER, permute


class TokenSequence(NamedTuple):
    """The ids of a sequence, and which of them count in the loss; all arrays are (length,)."""

    ids: np.ndarray  # int32
    loss_mask: np.ndarray  # bool
    position_ids: np.ndarray | None = None  # of packed examples, each counted from 0


class Example(NamedTuple):
    """A row as the model reads it."""

    sequences: tuple[TokenSequence, ...]  # of a preference: chosen, rejected
    row: Row
    ref_logps: tuple[float, ...] = ()  # of each sequence, if the reference model's are cached


class ExampleTooLongError(Exception):
    """An example exceeds the encoder's max_tokens. excess: by how many tokens, or 0 if that is unknown."""

    def __init__(self, excess: int = 0):
        super().__init__(excess)
        self.excess = excess


# ---------------------------------------------------------------------------------------------------------------------
# one row to ids


@dataclass(frozen=True)
class ExampleEncoder:
    """Rows to token sequences."""

    tokenizer: tokenization.Tokenizer
    max_tokens: int  # of a sequence
    overflow: str = "error"  # what becomes of a longer one: error, drop or truncate_target
    train_on_prompt: bool = False  # all tokens count in the loss, not just the completion's
    max_completion_tokens: int = 0  # that a prompt leaves free for a completion still to be generated
    template: PromptTemplate | None = None  # a prompt format around the row's fields
    prompt_offset: int = 0  # id of the first virtual token of the template's soft prompt
    target_field: str = ""  # with a template: the field that the model learns to write
    truncation_field: str = ""  # with a template: the field that is cut if an example is too long

    @property
    def eos_id(self) -> int:
        """The end-of-sequence token, which extend_tokenizer adds if it is missing."""
        if self.tokenizer.eos_id is None:
            raise UserError(
                "the model's tokenizer has no end-of-sequence token, which examples need; fine-tune it on some first"
            )
        return self.tokenizer.eos_id

    @functools.cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The template of the tokenizer's model; without one a message is its role's token, its text and the end."""
        return ChatTemplate(self.tokenizer) if self.tokenizer.chat_template else None

    @property
    def role_ids(self) -> dict[str, int]:
        """role -> id of its token, which extend_tokenizer adds if it is missing."""
        added_ids = getattr(self.tokenizer, "added_ids", {})
        missing = [token for token in ROLES.values() if token not in added_ids]
        if missing:
            raise UserError(
                f"a list of messages, and the model's tokenizer has no {', '.join(missing)}; fine-tune the model on "
                "chats first, or write the prompt as a text"
            )
        return {role: added_ids[token] for role, token in ROLES.items()}

    def encode(self, row: Row, example_type: str) -> Example:
        """A row as an example; the types are those of objective_specs.py. Raises ExampleTooLongError and UserError."""
        if example_type == "preference":
            chosen = self.prompt_completion(row, "chosen")
            rejected = self.prompt_completion(row, "rejected")
            return Example(with_one_prompt(chosen, rejected), row)
        if example_type == "prompt_only":
            return Example((self.prompt_only(row),), row)
        if example_type == "unpaired_preference":
            return Example((self.prompt_completion(row, "completion"),), row)
        assert example_type == "prompt_completion", example_type
        if self.template is None and "completion" not in row:
            sequence = self.chat(row) if "messages" in row else self.text(row["text"])
            return Example((sequence,), row)
        return Example((self.prompt_completion(row, "completion"),), row)

    def chat(self, row: Row) -> TokenSequence:
        """A whole chat. Raises ExampleTooLongError and UserError."""
        if self.chat_template is None:
            ids, loss_mask = self.encode_messages(row["messages"], add_generation_prompt=False)
        else:
            ids, loss_mask = self.chat_template.encode_with_mask(row["messages"], template_options(row))
        return self.fit(ids, loss_mask, "messages")

    def text(self, text: str) -> TokenSequence:
        """A text and the end-of-sequence token, all of it in the loss. Raises ExampleTooLongError and UserError."""
        ids = [*self.start_ids, *self.encode_text(text), self.eos_id]
        return self.fit(ids, [True] * len(ids), "text")

    def prompt_only(self, row: Row) -> TokenSequence:
        """A prompt that leaves room for a completion. Raises ExampleTooLongError."""
        ids = self.encode_prompt(row)
        excess = len(ids) + self.max_completion_tokens - self.max_tokens
        if excess > 0:
            raise ExampleTooLongError(excess)
        return TokenSequence(np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=bool))

    def prompt_completion(self, row: Row, field: str) -> TokenSequence:
        """The prompt, the completion in a field and the end-of-sequence token. Raises ExampleTooLongError, UserError.

        As in TRL, all messages of a completion count in the loss.
        """
        if self.template is not None and self.target_field:
            ids, completion_start = self.encode_template(row)
        else:
            prompt = self.encode_prompt(row)
            if self.template is None and isinstance(row["prompt"], list):
                messages = [*row["prompt"], *as_messages(row[field], "assistant")]
                ids = self.encode_chat(messages, row, add_generation_prompt=False)
            else:
                completion = self.tokenizer.encode_continuation if row.get("prompt") else self.tokenizer.encode
                ids = [*prompt, *completion(row[field]).tolist(), self.eos_id]
            completion_start = common_prefix_length(prompt, ids)
        return self.fit(ids, [i >= completion_start for i in range(len(ids))], field)

    @property
    def start_ids(self) -> list[int]:
        """What begins a sequence that no chat template begins: the tokenizer's beginning-of-sequence token, if any."""
        return [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]

    def encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).tolist()

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], row: Row, *, add_generation_prompt: bool) -> list[int]:
        """The ids of messages of a row, by the model's chat template or with this program's roles. Raises UserError."""
        if self.chat_template is None:
            return self.encode_messages(messages, add_generation_prompt=add_generation_prompt)[0]
        options = template_options(row)
        return self.chat_template.encode(messages, options, add_generation_prompt=add_generation_prompt)

    def encode_messages(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
    ) -> tuple[list[int], list[bool]]:
        """Ids and loss mask of a chat without a template: each message is its role's token, its text and the
        end-of-sequence token.

        What the assistant says and its end-of-sequence tokens count in the loss. add_generation_prompt: end with the
        assistant's token, so that the model writes its message.
        """
        role_ids = self.role_ids
        ids: list[int] = []
        loss_mask: list[bool] = []
        for message in messages:
            content = [*self.encode_text(message["content"]), self.eos_id]
            ids += [role_ids[message["role"]], *content]
            loss_mask += [False, *[message["role"] == "assistant"] * len(content)]
        if add_generation_prompt:
            ids.append(role_ids["assistant"])
            loss_mask.append(False)
        return ids, loss_mask

    def encode_prompt(self, row: Row) -> list[int]:
        """The ids before a completion. Raises UserError."""
        if self.template is not None:
            return [*self.start_ids, *self.template.encode(row, self.tokenizer, self.prompt_offset)]
        if isinstance(row["prompt"], list):
            return self.encode_chat(row["prompt"], row, add_generation_prompt=True)
        return [*self.start_ids, *self.encode_text(row["prompt"])]

    def encode_template(self, row: Row) -> EncodedExample:
        """The template with its target, cut as truncation_field and overflow say: ids, and where the target begins."""
        assert self.template is not None
        options = TargetOptions(
            target_field=self.target_field,
            truncation_field=self.truncation_field or None,
            max_tokens=self.max_tokens - len(self.start_ids),
            overflow=self.overflow,
        )
        encoded = self.template.encode_example(row, self.tokenizer, self.prompt_offset, options)
        if encoded is None:
            raise ExampleTooLongError
        return EncodedExample([*self.start_ids, *encoded.ids], encoded.target_start + len(self.start_ids))

    def fit(self, ids: list[int], loss_mask: list[bool], field: str) -> TokenSequence:
        """A sequence of at most max_tokens, cut at its end as overflow says. Raises ExampleTooLongError.

        A cut that leaves no token to learn is not made. Raises UserError with the field if there is none to begin with.
        """
        if len(ids) > self.max_tokens:
            is_cut = self.overflow == "truncate_target" and any(loss_mask[1 : self.max_tokens])
            if not is_cut:
                raise ExampleTooLongError(len(ids) - self.max_tokens)
        mask = np.array(loss_mask[: self.max_tokens], dtype=bool) | self.train_on_prompt
        mask[:1] = False  # no token predicts the first one
        if not mask.any():
            reason = "no message is the assistant's" if field == "messages" else "no token of it follows another"
            raise UserError(f"{field}: has nothing to learn, as {reason}")
        return TokenSequence(np.array(ids[: self.max_tokens], dtype=np.int32), mask)


def template_options(row: Row) -> dict[str, Any]:
    """What a row says to the chat template besides its messages, as in TRL: its `tools`, and `chat_template_kwargs`.

    Raises UserError.
    """
    options: dict[str, Any] = {}
    for name in TEMPLATE_COLUMNS:
        value = row.get(name)
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise UserError(f"{name}: not JSON ({error})") from None
        kind = list if name == "tools" else dict
        if value and not isinstance(value, kind):
            raise UserError(f"{name}: must be a JSON {'list' if kind is list else 'object'}")
        if value:
            options |= {"tools": value} if name == "tools" else value
    return options


def with_one_prompt(chosen: TokenSequence, rejected: TokenSequence) -> tuple[TokenSequence, TokenSequence]:
    """A pair whose completions begin at the same place, as in TRL: where either differs from the prompt."""
    start = min(int(sequence.loss_mask.argmax()) for sequence in (chosen, rejected))
    return from_place(chosen, start), from_place(rejected, start)


def from_place(sequence: TokenSequence, start: int) -> TokenSequence:
    """The sequence with its loss from a place on."""
    return sequence._replace(loss_mask=np.arange(len(sequence.ids)) >= start)


def extend_tokenizer(tokenizer: tokenization.Tokenizer, rows: Iterable[Row]) -> tokenization.Tokenizer:
    """The tokenizer with the tokens that examples need: end-of-sequence, and the roles' if the rows hold messages and
    no chat template writes them."""
    special_tokens = []
    if tokenizer.eos_id is None:
        special_tokens.append(tokenization.END_OF_TEXT)
    if not tokenizer.chat_template and has_messages(rows):
        special_tokens += ROLES.values()
    return tokenization.add_tokens(tokenizer, special_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# rows of a file to ids


class EncodedRows(NamedTuple):
    """The examples of a file."""

    examples: list[Example]
    n_dropped: int  # too long, and left out
    notes: Sequence[str] = ()  # on rows that were skipped


def encode_rows(
    rows: Sequence[Row], encoder: ExampleEncoder, example_type: str, source: str, bad_rows: str = "error"
) -> EncodedRows:
    """The rows as examples. source: where they come from, for errors. bad_rows: as read_example_rows has it.

    Raises UserError if a row can't be encoded, if one is too long and overflow is "error", and if none is left.
    """
    encoded: list[Example] = []
    excesses: list[int] = []
    skipped: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            encoded.append(encoder.encode(row, example_type))
        except ExampleTooLongError as error:
            excesses.append(error.excess)
        except (UserError, UnicodeError) as error:
            message = f"{place_of(row, f'{source}: row {number}')}: {error}"
            if bad_rows == "error":
                raise UserError(message) from None
            skipped.append(message)
    if excesses and encoder.overflow == "error":
        limit = f"{encoder.max_tokens} tokens"
        if encoder.max_completion_tokens:
            limit += f" less the {encoder.max_completion_tokens} of a completion"
        raise UserError(
            f"{source}: {len(excesses)} of {len(rows)} examples are longer than {limit}, by up to {max(excesses)}; "
            "raise --block_size, or set --overflow=drop or truncate_target"
        )
    if not encoded:
        if skipped:
            raise UserError(describe_skipped(source, skipped))
        raise UserError(f"{source}: all examples are too long" if rows else f"{source}: has no examples")
    notes = [describe_skipped(source, skipped)] if skipped else []
    return EncodedRows(encoded, len(excesses), notes)


def pack(examples: Sequence[Example], max_tokens: int) -> list[Example]:
    """Join examples of one sequence each to sequences of at most max_tokens: the longest examples first, each into the
    pack that it fills best (best fit decreasing)."""
    free: list[tuple[int, int]] = []  # (free tokens, index of the pack), ascending
    packs: list[list[TokenSequence]] = []
    for example in sorted(examples, key=lambda example: -len(example.sequences[0].ids)):
        (sequence,) = example.sequences
        length = len(sequence.ids)
        best_fit = bisect.bisect_left(free, (length, -1))
        if best_fit < len(free):
            free_tokens, index = free.pop(best_fit)
        else:
            free_tokens, index = max_tokens, len(packs)
            packs.append([])
        packs[index].append(sequence)
        bisect.insort(free, (free_tokens - length, index))
    return [Example((join(sequences),), {}) for sequences in packs]


def join(sequences: Sequence[TokenSequence]) -> TokenSequence:
    """A packed sequence; the positions of each part count from 0."""
    return TokenSequence(
        ids=np.concatenate([sequence.ids for sequence in sequences]),
        loss_mask=np.concatenate([sequence.loss_mask for sequence in sequences]),
        position_ids=np.concatenate([np.arange(len(sequence.ids)) for sequence in sequences]),
    )


def share_prompt(chosen: TokenSequence, rejected: TokenSequence) -> TokenSequence:
    """A pair as one sequence, in which the tokens before both completions stand once: (prompt, chosen, rejected).

    The rejected completion is a branch: its positions restart where the two sequences part, at the last token that they
    share, which stands twice so that each completion has the input of its first target.

        chosen 5 6 | 1 2, rejected 5 6 | 3:     ids 5 6 1 2 6 3, positions 0 1 2 3 1 2
    """
    n_before_loss = min(int(sequence.loss_mask.argmax()) for sequence in (chosen, rejected))
    n_shared = common_prefix_length(chosen.ids[:n_before_loss].tolist(), rejected.ids[:n_before_loss].tolist())
    branch = max(0, n_shared - 1)
    return TokenSequence(
        ids=np.concatenate((chosen.ids, rejected.ids[branch:])),
        loss_mask=np.concatenate((chosen.loss_mask, rejected.loss_mask[branch:])),
        position_ids=np.concatenate((np.arange(len(chosen.ids)), np.arange(branch, len(rejected.ids)))),
    )


# ---------------------------------------------------------------------------------------------------------------------
# examples to batches


MAX_WIDTHS = 16  # that a run's batches may have, where they are counted


@dataclass(frozen=True)
class Widths:
    """The widths that a batch may have, in tokens that the model reads: multiples of `step`, at most `largest`."""

    step: int = 1
    largest: int = sys.maxsize

    @classmethod
    def up_to(cls, block_size: int) -> "Widths":
        """Multiples of 64, or of more where these would be more than MAX_WIDTHS."""
        return cls(step=64 * -(-block_size // (64 * MAX_WIDTHS)), largest=block_size)

    @property
    def number(self) -> int:
        """How many there are."""
        return -(-self.largest // self.step)

    def fit(self, n_tokens: int) -> int:
        """The smallest of them for n_tokens."""
        return max(n_tokens, min(-(-n_tokens // self.step) * self.step, self.largest))


ANY_WIDTH = Widths()


def pad(sequences: Sequence[TokenSequence], widths: Widths = ANY_WIDTH) -> Batch:
    """One sequence a row, padded at the end with id 0. The model reads all tokens of a row but the last."""
    width = 1 + widths.fit(max(1, *(len(sequence.ids) - 1 for sequence in sequences)))
    tokens = np.zeros((len(sequences), width), dtype=np.int64)
    loss_mask = np.zeros((len(sequences), width), dtype=bool)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        tokens[row, :length] = sequence.ids
        loss_mask[row, :length] = sequence.loss_mask
    extras = {"loss_mask": torch.from_numpy(loss_mask[:, 1:].copy())}  # of the targets
    if sequences[0].position_ids is not None:
        extras["position_ids"] = torch.from_numpy(pad_positions(sequences, width - 1))
    return Batch(torch.from_numpy(tokens), extras)


def pad_positions(sequences: Sequence[TokenSequence], width: int) -> np.ndarray:
    """(B, width) positions of the inputs of packed sequences; each token of the padding is a document of its own."""
    position_ids = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        assert sequence.position_ids is not None
        positions = sequence.position_ids[:width]
        position_ids[row, : len(positions)] = positions
    return position_ids


@dataclass(frozen=True)
class Collator:
    """Examples to a batch, of the smallest width that holds them."""

    widths: Widths = ANY_WIDTH
    world_size: int = 1
    min_rows: ClassVar[int] = 1  # smallest number of examples in a step or an evaluation

    def __call__(self, examples: Sequence[Example], rows: range, n_micro_batches: int = 1) -> Batch:
        """A micro-batch of a step: some rows of the step's examples."""
        loss_tokens = sum(int(sequence.loss_mask.sum()) for example in examples for sequence in example.sequences)
        return dataclasses.replace(
            self.collate(examples, rows),
            n_micro_batches=n_micro_batches,
            num_loss_tokens=loss_tokens / self.world_size,
        )

    def collate(self, examples: Sequence[Example], rows: range) -> Batch:
        """Some rows of examples, as a batch of their own."""
        batch = pad([self.one_sequence(example) for example in examples[rows.start : rows.stop]], self.widths)
        batch = batch.with_tensors(**self.extra_tensors(examples, rows, batch.tokens.size(1) - 1))
        return dataclasses.replace(batch, num_loss_tokens=float(batch.extras["loss_mask"].sum()))

    def one_sequence(self, example: Example) -> TokenSequence:
        """An example as one row of a batch."""
        (sequence,) = example.sequences
        return sequence

    def extra_tensors(self, examples: Sequence[Example], rows: range, width: int) -> dict[str, Tensor]:
        """Further tensors of these rows, which have so many targets."""
        return {}


@dataclass(frozen=True)
class PreferenceCollator(Collator):
    """A pair is one row, as `share_prompt` makes it, with the targets of its rejected completion, (B, T), and the
    reference model's log-probabilities of both, (B, 2), where they are cached."""

    def one_sequence(self, example: Example) -> TokenSequence:
        return share_prompt(*example.sequences)

    def extra_tensors(self, examples: Sequence[Example], rows: range, width: int) -> dict[str, Tensor]:
        micro_batch = examples[rows.start : rows.stop]
        n_chosen = torch.tensor([len(example.sequences[0].ids) for example in micro_batch])
        tensors = {"is_rejected": torch.arange(width) >= n_chosen[:, None]}
        if micro_batch[0].ref_logps:
            tensors["ref_logps"] = torch.tensor([example.ref_logps for example in micro_batch])
        return tensors


@dataclass(frozen=True)
class KTOCollator(Collator):
    """With KTO's labels, and for its reference point each prompt with the completion of the example before it in the
    step (the first prompt with the last completion), cut to max_tokens."""

    max_tokens: int = 0
    min_rows: ClassVar[int] = 2

    def extra_tensors(self, examples: Sequence[Example], rows: range, width: int) -> dict[str, Tensor]:
        kl_batch = pad([self.mismatched(examples[row], examples[row - 1]) for row in rows], self.widths)
        return {
            "desirable": torch.tensor([bool(examples[row].row["label"]) for row in rows]),
            "kl_completion": kl_batch.tokens,
            "kl_completion_mask": kl_batch.extras["loss_mask"],
        }

    def mismatched(self, example: Example, other: Example) -> TokenSequence:
        """The prompt of an example with the completion of another one."""
        (own_sequence,) = example.sequences
        (other_sequence,) = other.sequences
        prompt = own_sequence.ids[: int(own_sequence.loss_mask.argmax())]
        completion = other_sequence.ids[int(other_sequence.loss_mask.argmax()) :]
        ids = np.concatenate((prompt, completion))[: self.max_tokens]
        return TokenSequence(ids, np.arange(len(ids)) >= len(prompt))


# ---------------------------------------------------------------------------------------------------------------------
# a dataset, and a source of training batches


class Examples:
    """One split of one dataset of examples. `rows` stay in the order of the file; an epoch has them in a random one.

    It has the interface of a Dataset of token bins: an example is a window, and the dataset is its only stream.
    """

    bytes = None  # of text: bits per byte are not measured on examples

    def __init__(self, name: str, rows: Sequence[Example], seed: int = 0, index: int = 0):
        """index: this dataset's number in the mixture."""
        self.name = name
        self.rows = rows
        self.seed = seed
        self.index = index
        self.streams = [self]
        self.tokens = sum(len(sequence.ids) for example in rows for sequence in example.sequences)
        self.n_windows = len(rows)
        self.tokens_per_window = self.tokens / self.n_windows  # the mean

    def locate(self, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(zeros, index of the row) of examples by their numbers in the run, as Dataset.locate gives (shard, start)."""
        epoch, index = np.divmod(sequence, self.n_windows)
        return np.zeros_like(index), permute(index, self.n_windows, self.seed, ORDER, self.index, epoch)

    def eval_batches(
        self, n_batches: int, batch_size: int, ranks: Ranks, collate: Collator
    ) -> Iterator[tuple[Batch, bool]]:
        """This rank's part of each of the first n_batches batches, in the order of the file, and whether it has one.

        What a row is collated with, as KTO's other completions, is the whole evaluation: the size of batches and the
        number of ranks change no row.
        """
        examples = self.rows[: max(n_batches * batch_size, collate.min_rows)]
        for rows, has_rows in self.eval_rows(len(examples), batch_size, ranks):
            batch = collate.collate(examples, rows)
            yield (batch if has_rows else mask_all(batch)), has_rows

    def eval_rows(self, n_rows: int, batch_size: int, ranks: Ranks) -> Iterator[tuple[range, bool]]:
        """Of each batch of the first n_rows examples, which ones are this rank's, and whether they count.

        A rank without an example in a batch gets one all the same, since all ranks have to call the model as often.
        """
        n_rows = min(len(self.rows), n_rows)
        for start in range(0, n_rows, batch_size):
            rows, has_rows = eval_share(min(batch_size, n_rows - start), ranks.rank, ranks.world_size)
            yield range(start + rows.start, start + rows.stop), has_rows


def mask_all(batch: Batch) -> Batch:
    """The batch without loss tokens, so that sums over the ranks don't count it."""
    masks = {name: torch.zeros_like(mask) for name, mask in batch.extras.items() if name.endswith("mask")}
    return batch.with_tensors(**masks)


class ExampleSource(Source):
    """Training batches of `rows` examples a step, drawn from datasets by a mixture."""

    datasets: Sequence[Examples]  # type: ignore[assignment]  # they locate rows as a Dataset locates windows

    def __init__(self, datasets: Sequence[Examples], mixture: Mixture, rows: int, seed: int, collate: Collator):
        super().__init__(datasets, mixture, rows, seed)  # type: ignore[arg-type]
        self.collate = collate

    @property
    def tokens_per_step(self) -> float:
        """An estimate from the mean example, without padding."""
        return self.rows / self.steps_per_rollout * sum(dataset.tokens for dataset in self.datasets) / self.n_windows

    def iter_examples(self, start_step: int) -> Iterator[list[Example]]:
        """The examples of step `start_step` and of all after it."""
        for plan in self.iter_plans(start_step, 0, self.rows):
            pairs = zip(plan.dataset_id.tolist(), plan.start.tolist(), strict=True)
            yield [self.datasets[dataset_id].rows[index] for dataset_id, index in pairs]

    def iter_steps(self, start_step: int, rows: RankSlice, *, pin: bool, hashed: bool) -> Iterator[Step]:
        """What a rank reads from a step on: micro-batches in host memory, pinned or not. hashed: with data_hash."""
        micro_batches = [
            range(start, min(start + rows.micro_batch_size, rows.stop))
            for start in range(rows.start, rows.stop, rows.micro_batch_size)
        ]
        for examples in self.iter_examples(start_step):
            batches = [self.collate(examples, micro_batch, len(micro_batches)) for micro_batch in micro_batches]
            if pin:
                batches = [pin_memory(batch) for batch in batches]
            data_hash = hash_examples(examples[rows.start : rows.stop], rows.start) if hashed else 0
            tokens = sum(len(sequence.ids) for example in examples for sequence in example.sequences)
            yield Step(batches, data_hash, tokens)


def pin_memory(batch: Batch) -> Batch:
    """The batch in pinned memory, from which copies to a GPU are asynchronous."""
    extras = {name: tensor.pin_memory() for name, tensor in batch.extras.items()}
    return dataclasses.replace(batch, tokens=batch.tokens.pin_memory(), extras=extras)


def hash_examples(examples: Sequence[Example], start: int) -> int:
    """As row_hash: of examples from row `start` of the global batch on."""
    return row_hash([np.concatenate([s.ids for s in example.sequences]) for example in examples], start)
