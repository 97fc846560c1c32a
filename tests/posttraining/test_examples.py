"""Examples: what a row becomes, token by token, which rows a step reads, and that neither padding nor packing nor ranks change what is learned."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import DIGITS, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoforge.data import tokenization
from nanoforge.data.batches import make_mixture
from nanoforge.data.tokenization import BPETokenizer, ByteTokenizer, CharTokenizer, ExtendedTokenizer
from nanoforge.distributed import RankSlice
from nanoforge.errors import UserError
from nanoforge.models import pretrained
from nanoforge.posttraining import prompt_format
from nanoforge.posttraining.answers import to_problem
from nanoforge.posttraining.examples import (
    Collator,
    Example,
    ExampleEncoder,
    Examples,
    ExampleSource,
    Ids,
    KTOCollator,
    needed_tokens,
    pack,
    padded,
    read_rows,
)
from nanoforge.posttraining.losses import per_token_logps

BYTES = ByteTokenizer()


def sft(rows, limit=32, tokenizer=DIGITS, objective="sft", packed=False, seed=0, number=0, **more) -> Examples:
    return Examples("x", rows, objective, ExampleEncoder(tokenizer, limit, **more), seed, number, "x.jsonl", packed)


def only(data: Examples) -> Ids:
    (item,) = data.items
    (sequence,) = item.sequences
    return sequence


def learned(sequence: Ids, tokenizer) -> str:
    return tokenizer.decode(sequence.ids[sequence.mask].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# rows to ids


def test_a_chat_is_learned_where_the_assistant_speaks():
    """Every role's token, text and end token in turn; what the assistant says and its end tokens are learned, its own token is not."""
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "é?"},
                {"role": "assistant", "content": "Ok"},
            ]
        }
    ]
    tokenizer = needed_tokens(BYTES, rows)
    sequence = only(sft(rows, 99, tokenizer))
    end = "<|endoftext|>"
    assert (
        tokenizer.decode(sequence.ids.tolist())
        == f"<|system|>Be brief.{end}<|user|>Hi{end}<|assistant|>Hello{end}<|user|>é?{end}<|assistant|>Ok{end}"
    )
    assert learned(sequence, tokenizer) == f"Hello{end}Ok{end}"
    assert [i for i in sequence.ids.tolist() if i > 256] == [
        tokenizer.added_ids[f"<|{role}|>"] for role in ("system", "user", "assistant", "user", "assistant")
    ]


def test_loss_on_all_learns_every_token_that_has_one_before_it():
    rows = [{"prompt": "12+3=", "completion": "15"}]
    assert learned(only(sft(rows)), DIGITS) == "15<|endoftext|>"
    assert learned(only(sft(rows, learn_all=True)), DIGITS) == "2+3=15<|endoftext|>"
    chat = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ok"}]}]
    tokenizer = needed_tokens(BYTES, chat)
    assert (
        learned(only(sft(chat, 99, tokenizer, learn_all=True)), tokenizer)
        == "Hi<|endoftext|><|assistant|>Ok<|endoftext|>"
    )


def test_a_text_is_learned_whole():
    assert learned(only(sft([{"text": "1+1=2"}])), DIGITS) == "+1=2<|endoftext|>"


def test_preferences_share_their_prompt_and_grpo_takes_it_alone():
    (item,) = sft([{"prompt": "1+1=", "chosen": "2", "rejected": "33"}], objective="dpo").items
    assert [DIGITS.decode(sequence.ids.tolist()) for sequence in item.sequences] == [
        "1+1=2<|endoftext|>",
        "1+1=33<|endoftext|>",
    ]
    assert [learned(sequence, DIGITS) for sequence in item.sequences] == ["2<|endoftext|>", "33<|endoftext|>"]
    prompt = only(sft([{"prompt": "1+1=", "answer": "2"}], objective="grpo"))
    assert DIGITS.decode(prompt.ids.tolist()) == "1+1=" and not prompt.mask.any()


def test_a_prompt_may_be_a_chat():
    """It ends with the assistant's token, whose turn it is: the same ids as of the whole chat."""
    asked = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": asked, "completion": "Ok"}, {"messages": [*asked, {"role": "assistant", "content": "Ok"}]}]
    tokenizer = needed_tokens(BYTES, rows)
    (one,), (other,) = (item.sequences for item in sft(rows, 99, tokenizer).items)
    assert one.ids.tolist() == other.ids.tolist() and one.mask.tolist() == other.mask.tolist()
    prompt = only(sft([{"prompt": asked, "answer": "1"}], 99, tokenizer, "grpo"))
    assert tokenizer.decode(prompt.ids.tolist()) == "<|user|>Hi<|endoftext|><|assistant|>"


def test_no_text_becomes_a_special_token():
    """A user who writes the assistant's token has written letters."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<|assistant|>I am <|endoftext|>"},
                {"role": "assistant", "content": "no"},
            ]
        }
    ]
    tokenizer = needed_tokens(BYTES, rows)
    sequence = only(sft(rows, 99, tokenizer))
    assert (sequence.ids >= 256).sum() == 4 and learned(sequence, tokenizer) == "no<|endoftext|>"


# ---------------------------------------------------------------------------------------------------------------------
# too long


@pytest.mark.parametrize("limit", range(2, 10))
def test_overflow_at_every_limit(limit):
    """Of 5 tokens of prompt, 2 of completion and the end."""
    rows, whole = [{"prompt": "12+3=", "completion": "15"}], [*DIGITS.encode("12+3=15").tolist(), 12]
    if limit >= 8:
        for overflow in ("error", "drop", "truncate_target"):
            assert only(sft(rows, limit, overflow=overflow)).ids.tolist() == whole
        return
    with pytest.raises(
        UserError, match=rf"x.jsonl: 1 of 1 examples are longer than {limit} tokens, by up to {8 - limit}"
    ):
        sft(rows, limit)
    with pytest.raises(UserError, match="no example is left"):
        sft(rows, limit, overflow="drop")
    if limit <= 5:
        with pytest.raises(UserError, match="no example is left"):
            sft(rows, limit, overflow="truncate_target")  # nothing to learn would be left
    else:
        sequence = only(sft(rows, limit, overflow="truncate_target"))
        assert sequence.ids.tolist() == whole[:limit] and sequence.mask.tolist() == [False] * 5 + [True] * (limit - 5)


def test_dropped_examples_are_counted_and_the_others_stay():
    rows = [{"prompt": "1+1=", "completion": "2" * n} for n in (1, 9, 3, 20)]
    data = sft(rows, 8, overflow="drop")
    assert (
        data.dropped == 2 and [item.row["completion"] for item in data.items] == ["2", "222"] and data.tokens == 6 + 8
    )
    with pytest.raises(UserError, match=r"2 of 4 examples are longer than 8 tokens, by up to 17"):
        sft(rows, 8)


def test_grpos_prompts_leave_room_for_answers():
    rows = [{"prompt": "1" * n, "answer": "1"} for n in (3, 4, 5)]
    assert [len(item.sequences[0].ids) for item in sft(rows, 8, objective="grpo", room=4, overflow="drop").items] == [
        3,
        4,
    ]
    with pytest.raises(UserError, match="longer than 8 tokens less the 4 of a completion, by up to 1"):
        sft(rows, 8, objective="grpo", room=4)


def test_a_template_stands_around_the_fields():
    """Rows of the prompt are ids behind the vocabulary; test_templates.py has the language."""
    template = prompt_format.parse("<P*2>{a}+<P>=</P>")
    sequence = only(sft([{"a": "12", "sum": "3", "more": "x"}], template=template, first_row=13, target_field="sum"))
    assert sequence.ids.tolist() == [13, 14, 1, 2, 10, 15, 3, 12] and sequence.mask.tolist() == [False] * 6 + [True] * 2


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_rows_of_three_formats_are_the_same(tmp_path):
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": 'a "quoted",\ttab', "completion": "line\nbreak"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with (tmp_path / f"a{suffix}").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    assert [read_rows(tmp_path / f"a{suffix}", "sft", dict) for suffix in (".jsonl", ".csv", ".tsv")] == [rows] * 3


@pytest.mark.parametrize("objective, row, told", [
    ("sft", {"prompt": "x"}, r"row 2 has prompt; --objective=sft needs \{prompt, completion\} or \{messages\} or \{text\}"),
    ("dpo", {"prompt": "x", "chosen": "y"}, r"row 2 has prompt, chosen; --objective=dpo needs \{prompt, chosen, rejected\}"),
    ("kto", {"prompt": "x", "completion": "y"}, r"row 2 has prompt, completion; --objective=kto needs"),
    ("sft", {"messages": [{"role": "robot", "content": "x"}]}, "row 2: a message of messages is not"),
    ("sft", {"messages": [{"role": "user", "content": 3}]}, "row 2: a message of messages is not"),
    ("sft", {"prompt": ["x"], "completion": "y"}, "row 2: a message of prompt is not"),
])  # fmt: skip
def test_wrong_rows_are_told_by_file_and_row(tmp_path, objective, row, told):
    good = {"prompt": "x", "completion": "y", "chosen": "y", "rejected": "z", "label": True}
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n" + json.dumps(good) + "\n")
    with pytest.raises(UserError, match=f"a.jsonl: {told}"):
        read_rows(tmp_path / "a.jsonl", objective, dict)


def test_gsm8ks_rows_are_problems(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "2 and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}) + "\n")
    (row,) = read_rows(tmp_path / "a.jsonl", "grpo", to_problem)
    assert row["answer"] == "5" and row["prompt"].startswith("2 and 3?")


@pytest.mark.parametrize("objective, row, told", [
    ("kto", {"prompt": "1", "completion": "2", "label": "yes"}, "row 2: label must be true or false, not 'yes'"),
    ("kto", {"prompt": "1", "completion": "2", "label": 2}, "row 2: label must be true or false, not 2"),
    ("sft", {"prompt": "1", "completion": "two"}, "row 2: the tokenizer knows no 'o', 't', 'w'"),
])  # fmt: skip
def test_what_cant_be_encoded_is_told_by_its_row(objective, row, told):
    good = {"prompt": "1", "completion": "2", "label": False}
    with pytest.raises(UserError, match=f"x.jsonl: {told}"):
        sft([good, row], objective=objective)


# ---------------------------------------------------------------------------------------------------------------------
# which rows a step reads

SUMS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(23)]


def source(rows=SUMS, per_step=5, seed=0, objective="sft", collate=None, datasets=1) -> ExampleSource:
    data = [sft(rows[d::datasets], seed=seed, number=d, objective=objective) for d in range(datasets)]
    return ExampleSource(data, make_mixture([1] * datasets, per="sequence"), per_step, seed, collate or Collator())


def steps(source: ExampleSource, n: int, start: int = 0, first: int = 0, last: int = 5, micro: int = 5) -> list:
    stream = source.iter_steps(start, RankSlice(first, last, micro), pin=False, hashed=True)
    return [next(stream) for _ in range(n)]


def prompts_of(step) -> list[str]:
    return [
        "".join("0123456789+=#"[i] for i in row).split("=")[0]
        for batch in step.batches
        for row in batch.tokens.tolist()
    ]


def test_every_example_comes_once_an_epoch_in_another_order():
    """23 steps of 5 are 5 epochs of 23."""
    drawn = [prompt for step in steps(source(), 23) for prompt in prompts_of(step)]
    epochs = [drawn[i : i + 23] for i in range(0, 115, 23)]
    assert all(sorted(epoch) == sorted(f"{i}+{i}" for i in range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5 and epochs[0] != sorted(epochs[0])
    assert [prompts_of(step) for step in steps(source(seed=1), 5)] != [prompts_of(step) for step in steps(source(), 5)]


def test_a_step_is_a_pure_function_of_its_number():
    """From anywhere, of one dataset or a mixture of two."""
    for datasets in (1, 2):
        whole = steps(source(datasets=datasets), 12)
        assert [prompts_of(step) for step in steps(source(datasets=datasets), 5, start=7)] == [
            prompts_of(step) for step in whole[7:]
        ]
        assert len({step.data_hash for step in whole}) == 12


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize("micro", [1, 2, 6])
def test_any_split_reads_the_same_rows(objective, ranks, micro):
    """Digests add up, rows follow each other, and `learned` of the ranks is that of the step."""
    rows = [{**row, "chosen": row["completion"], "rejected": "1", "label": i % 2 == 0} for i, row in enumerate(SUMS)]

    def made(world):
        return source(
            rows,
            6,
            objective=objective,
            collate=(KTOCollator if objective == "kto" else Collator)(0, world, *([32] if objective == "kto" else [])),
        )

    share = 6 // ranks
    for number, whole in enumerate(steps(made(1), 4, last=6, micro=6)):
        parts = [steps(made(ranks), 1, number, r * share, (r + 1) * share, micro)[0] for r in range(ranks)]
        assert sum(part.data_hash for part in parts) % 2**64 == whole.data_hash and {part.tokens for part in parts} == {
            whole.tokens
        }
        if objective != "dpo":
            assert [prompt for part in parts for prompt in prompts_of(part)] == prompts_of(whole)
        for part in parts:
            assert all(
                batch.num_loss_tokens * ranks == pytest.approx(whole.batches[0].num_loss_tokens)
                and batch.n_micro_batches == len(part.batches)
                for batch in part.batches
            )
        assert (
            sum(int(batch.extras["loss_mask"].sum()) for part in parts for batch in part.batches)
            == whole.batches[0].num_loss_tokens
            == int(whole.batches[0].extras["loss_mask"].sum())
        )


@pytest.mark.parametrize("micro", [1, 2, 3, 6])
def test_strangers_have_the_completion_of_the_row_before(micro):
    """The first row that of the last one, in the whole step, however it is cut."""
    rows = [{"prompt": f"{i}+{i}=", "completion": "9" * (i + 1), "label": i % 2} for i in range(6)]
    data = sft(rows, objective="kto")
    collate = KTOCollator(0, 1, 32)
    batches = [collate(data.items, first, min(first + micro, 6), 1) for first in range(0, 6, micro)]
    found = [
        (row.tolist(), mask.tolist())
        for batch in batches
        for row, mask in zip(batch.extras["kl_completion"], batch.extras["kl_completion_mask"], strict=True)
    ]
    for i, (ids, mask) in enumerate(found):
        other = i or 6  # how long the completion of the row before is
        expected = [*DIGITS.encode(f"{i}+{i}=" + "9" * other), 12]
        assert ids[: len(expected)] == expected and not any(ids[len(expected) :])
        assert [j + 1 for j, on in enumerate(mask) if on] == list(range(4, 4 + other + 1))
    assert [label for batch in batches for label in batch.extras["desirable"].tolist()] == [False, True] * 3


def test_a_stranger_stays_within_the_limit():
    rows = [
        {"prompt": "1+1+1+1=", "completion": "4", "label": 1},
        {"prompt": "1=", "completion": "1111111", "label": 0},
    ]
    batch = KTOCollator(0, 1, 10)(sft(rows, 10, objective="kto").items, 0, 2, 1)
    assert (
        batch.extras["kl_completion"].shape == (2, 10)
        and batch.extras["kl_completion"][0].tolist() == DIGITS.encode("1+1+1+1=11").tolist()
    )


@pytest.mark.parametrize("size, iters", [(4, 2), (4, 99), (23, 1), (1, 5)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_evaluation_reads_the_first_examples_once(size, iters, world):
    """All ranks have as many batches; those that count are each example once."""
    data, seen = sft(SUMS), []
    batches = [list(data.eval_batches(iters, size, rank, world, Collator(0, world))) for rank in range(world)]
    assert len({len(some) for some in batches}) == 1
    for at_once in zip(*batches, strict=True):
        seen += [
            prompt
            for batch, counts in at_once
            if counts
            for prompt in prompts_of(type("Step", (), {"batches": [batch]}))
        ]
    assert seen == [f"{i}+{i}" for i in range(23)][: size * iters]


# ---------------------------------------------------------------------------------------------------------------------
# padding and packing


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_padding_changes_no_loss(position):
    """To the longest of the batch, or to a width for compiled steps: the same losses of the learned tokens, and those of each row alone."""
    model = tiny_model(vocab_sizes=(13,), block_size=32, position=position).eval()
    data = sft(SUMS[:7])
    sequences = [item.sequences[0] for item in data.items]
    with torch.no_grad():
        alone = [
            -per_token_logps(model, (one := padded([sequence])).tokens, one.extras["loss_mask"]).sum()
            for sequence in sequences
        ]
        for width in (0, 20, 32):
            batch = padded(sequences, width)
            assert batch.tokens.size(1) == (width or max(len(s.ids) for s in sequences))
            torch.testing.assert_close(
                -per_token_logps(model, batch.tokens, batch.extras["loss_mask"]).sum(1),
                torch.stack(alone),
                atol=1e-5,
                rtol=1e-5,
            )
    batch = Collator(32, 1)(data.items, 2, 5, 3)
    assert (
        batch.tokens.shape == (3, 32)
        and batch.n_micro_batches == 3
        and batch.num_loss_tokens == sum(int(s.mask.sum()) for s in sequences)
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 24), min_size=1, max_size=40))
def test_packs_hold_every_token_and_none_too_many(lengths):
    """Each example whole, in one pack, with its own mask and positions; no two packs that would go into one."""
    items, start = [], 0
    for n in lengths:
        items.append(Example((Ids(np.arange(start, start + n), np.arange(n) % 2 == 1),), {}))
        start += n
    packs = [item.sequences[0] for item in pack(items, 24)]
    assert max(len(some.ids) for some in packs) <= 24 and sorted(
        i for some in packs for i in some.ids.tolist()
    ) == list(range(start))
    firsts = np.cumsum([0, *lengths])[:-1]
    for some in packs:
        begins = np.flatnonzero(some.positions == 0)
        for begin, end in zip(begins, [*begins[1:], len(some.ids)], strict=True):
            ids = some.ids[begin:end]
            assert ids[0] in firsts and len(ids) == lengths[list(firsts).index(ids[0])] and (np.diff(ids) == 1).all()
            assert (some.positions[begin:end] == np.arange(end - begin)).all() and (
                some.mask[begin:end] == (np.arange(end - begin) % 2 == 1)
            ).all()
    sizes = sorted(len(some.ids) for some in packs)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 24


def test_packed_examples_come_once_an_epoch():
    data = sft(SUMS, packed=True)
    assert data.n_windows < 10 and data.tokens == sum(len(f"{i}+{i}={2 * i}") + 1 for i in range(23))
    found = ExampleSource([data], make_mixture([1]), 1, 0, Collator())
    rows = [row for step in steps(found, data.n_windows, last=1) for row in step.batches[0].tokens.flatten().tolist()]
    assert rows.count(12) == 23, "as many end tokens"


def test_the_padding_of_a_pack_is_a_document_of_its_own():
    """Its positions begin again, so that it sees nothing and nothing sees it; those of the pack's width stay within it."""
    batch = padded([item.sequences[0] for item in sft(SUMS, packed=True).items], 32)
    for tokens, positions, mask in zip(
        batch.tokens.tolist(), batch.extras["position_ids"].tolist(), batch.extras["loss_mask"].tolist(), strict=True
    ):
        last = max(i for i, token in enumerate(tokens) if token == 12)
        if last + 1 < 31:
            assert positions[last + 1 :] == list(range(31 - last - 1)) and not any(mask[last:])


# ---------------------------------------------------------------------------------------------------------------------
# tokens that examples need


def test_only_what_is_missing_is_added():
    chats, plain = [{"messages": []}], [{"prompt": "x", "completion": "y"}]
    ended, bare = CharTokenizer("abc", has_eos=True), CharTokenizer("abc")
    assert needed_tokens(ended, plain) is ended
    assert needed_tokens(bare, plain).added_ids == {"<|endoftext|>": 3}
    assert (
        needed_tokens(ended, chats).added_ids == {"<|system|>": 4, "<|user|>": 5, "<|assistant|>": 6}
        and needed_tokens(ended, chats).eos_id == 3
    )
    once = needed_tokens(bare, plain)
    both = needed_tokens(once, chats)
    assert (
        both.added_ids == {"<|endoftext|>": 3, "<|system|>": 4, "<|user|>": 5, "<|assistant|>": 6} and both.eos_id == 3
    ), "ids that are known stay"
    assert needed_tokens(both, chats) is both and needed_tokens(both, plain) is both


@pytest.mark.parametrize("base", [CharTokenizer("héllo 😀"), ByteTokenizer(), "bpe"], ids=["char", "byte", "bpe"])
def test_an_extended_tokenizer_comes_back_whole(base, tmp_path):
    """Through tokenizer.json: the same ids, the same text, also of bytes that only together make a character."""
    if base == "bpe":
        pytest.importorskip("tokenizers")
        base = BPETokenizer.train(["héllo 😀 " * 20], 280)
    added = tokenization.add_tokens(base, ["<|user|>", "<|odd|>"])
    tokenization.save(tmp_path / "tokenizer.json", {"x": added})
    loaded = tokenization.load(tmp_path / "tokenizer.json")["x"]
    assert (
        tokenization.same_tokenizer(added, loaded)
        and isinstance(loaded, ExtendedTokenizer)
        and loaded.vocab_size == base.vocab_size + 2
        and loaded.added_ids == added.added_ids
        and loaded.eos_id == base.eos_id
    )
    words = "héllo 😀"
    ids = [
        base.vocab_size,
        *map(int, loaded.encode(words)),
        base.vocab_size + 1,
        base.vocab_size,
        *map(int, loaded.encode("o")),
    ]
    assert loaded.decode(ids) == f"<|user|>{words}<|odd|><|user|>o"
    assert loaded.encode(words).tolist() == base.encode(words).tolist()


def test_new_tokens_leave_the_base_rows_as_they_were(run, base):
    """A chat adds three rows; the first steps' embedding of the others is the base's."""
    chat = run("--objective=sft", "--dataset=chat", f"--init_from={base}", "--block_size=16", "--max_iters=0")
    before, after = pretrained.load(str(base)).weights["wte.weight"], chat.last.weights["wte.weight"]
    assert after.shape == (16, 16) and torch.equal(after[:13], before) and (after[13:] != 0).any()
    learns = run(
        "--objective=sft",
        "--dataset=chat",
        f"--init_from={base}",
        "--block_size=16",
        "--max_iters=20",
        "--learning_rate=0.01",
        "--eval_interval=20",
        name="more",
    )
    assert learns.evals[-1]["val_loss"] < learns.evals[0]["val_loss"] and learns.evals[-1]["samples"][0][
        "prompt"
    ].startswith("<|user|>")
    with pytest.raises(UserError, match="its embedding can't learn them"):
        run("--objective=sft", "--dataset=chat", f"--init_from={base}", "--adapter=lora", name="lora")
