"""data/show.py prints what training reads: the same windows and rows, in the same order, with the same loss mask."""

import dataclasses
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import DIGITS, ROOT, TEXT, write_char_dataset, write_examples, write_sum_datasets

import builders
import configurator
import train_args
from nanoforge.data import batches, token_bins, tokenization
from nanoforge.data.tokenization import ByteTokenizer

SPEC = importlib.util.spec_from_file_location("show", ROOT / "data/show.py")
show = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(show)


@pytest.fixture
def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command prints for names and flags; data_dir is tmp_path."""

    def run(*names: str, **options: object) -> str:
        flags = [f"--{name}={value}" for name, value in {"data_dir": tmp_path, **options}.items()]
        rules = configurator.Rules(locate=show.add_run, check=show.check)
        args = configurator.parse(show.ShowArgs, [*(["--name", *names] if names else []), *flags], "", rules)
        show.main(args)
        return capsys.readouterr().out

    return run


def shown_texts(output: str) -> list[str]:
    """What stands under each title of a window or an example."""
    return re.findall(r"^(?:window .* reads:|.*tokens, \d+ in the loss).*\n((?:.*\n)*?)(?=\n|\Z)", output, re.MULTILINE)


def test_windows_are_those_of_the_first_step(tmp_path: Path, shown):
    write_char_dataset(tmp_path / "chars", TEXT.replace("\n", " ") * 20)
    for seed in (1337, 7):
        text = shown("chars", n=3, block_size=16, seed=seed)
        args = train_args.parse(
            ["--dataset=chars", f"--data_dir={tmp_path}", "--block_size=16", "--batch_size=3", f"--seed={seed}"]
        )
        metas = {"chars": token_bins.read_meta(tmp_path / "chars")}
        mixture = builders.build_mixture(args)
        sampling = batches.WindowSampling(16, args.global_batch_size, args.sampling_method, args.seed)
        data = batches.open_data(tmp_path, args.mixture, metas, {}, mixture, sampling)
        windows = next(data.source.iter_windows(0, 0, 3))[:, 0].tolist()
        expected = [metas["chars"].tokenizer.decode(window) for window in windows]
        assert [text.removesuffix("\n") for text in shown_texts(text)] == expected


@pytest.mark.parametrize(
    "name, objective", [("sums", "sft"), ("pairs", "dpo"), ("labelled", "kto"), ("chat", "sft"), ("sums", "grpo")]
)
def test_examples_are_read_as_training_reads_them(tmp_path: Path, shown, name: str, objective: str):
    """In the order of the first epoch, and the marks around the tokens that count in the loss."""
    write_sum_datasets(tmp_path)
    guessed = {} if objective != "grpo" else {"objective": objective}
    output = shown(name, n=4, block_size=12, max_new_tokens=4, seed=3, boundaries="false", **guessed)
    assert f"--objective={objective} " in output

    args = dataclasses.replace(
        train_args.TrainArgs(), data_dir=str(tmp_path), dataset=name, objective=objective, block_size=12, seed=3
    )
    args = dataclasses.replace(args, max_new_tokens=4)
    inputs = builders.read_inputs(args, None, print)
    (tokenizer,) = inputs.tokenizers.values()
    model = builders.build_from_scratch(dataclasses.replace(args, n_layer=1, n_head=1, n_embd=8), inputs.tokenizers)
    (dataset,) = builders.encode_examples(args, inputs, model, print)["train"]
    expected = []
    for number in dataset.locate(np.arange(4))[1].tolist():
        for sequence in dataset.rows[number].sequences:
            marked = ""
            before = False
            for i, in_loss in zip(sequence.ids.tolist(), sequence.loss_mask.tolist(), strict=True):
                marks = {(False, True): "{+", (True, False): "+}"}.get((before, in_loss), "")
                text = tokenizer.decode([i])
                marked += marks + (f"[{text}]" if i in tokenizer.control_tokens.values() else text)
                before = in_loss
            expected.append(marked + ("+}" if before else ""))
    texts = re.findall(r"tokens, \d+ in the loss\n(.*)\n", output)
    assert texts == expected


def test_lengths_are_compared_with_block_size(tmp_path: Path, shown):
    """A byte a token: lengths are known from the texts."""
    rows = [{"prompt": "p" * i, "completion": "c" * 5} for i in range(1, 41)]
    write_examples(tmp_path / "long", rows, n_train=30, tokenizer=ByteTokenizer())
    output = shown("long", n=0, block_size=20)
    assert "longest 36, mean 21.5" in output  # prompt, 5 bytes, the end
    assert "in the loss: 10% 6, 50% 6, 90% 6, 99% 6, longest 6, mean 6.0" in output
    assert "--block_size=20: 16 (53.3%), refused" in output
    assert "--block_size=20: 10 (100.0%), cut" in shown(
        "long", n=0, block_size=20, split="val", overflow="truncate_target"
    )
    cut = shown("long", n=30, block_size=20, overflow="truncate_target")
    texts = re.findall(r"tokens, \d+ in the loss\n(.*)\n", cut.replace("[<|endoftext|>]", "E"))
    assert max(map(len, texts)) == 20 + len("{++}")
    assert "of 30 of long" not in cut  # of some nothing would be left to learn


def test_a_run_shows_its_own_data(tmp_path: Path, shown):
    """With the settings of its record and the tokenizer of its folder."""
    write_sum_datasets(tmp_path)
    (tmp_path / "run").mkdir()
    tokenizer = tokenization.add_tokens(DIGITS, ["<|mark|>"])
    tokenization.save(tmp_path / "run/tokenizer.json", {"pairs": tokenizer})
    record = {"dataset": "pairs", "objective": "dpo", "data_dir": str(tmp_path), "block_size": 9, "init_from": "x/y"}
    (tmp_path / "run/train_config.json").write_text(json.dumps(record))
    output = shown(out_dir=tmp_path / "run", n=1)
    assert "--objective=dpo" in output and "--block_size=9: none" in output
    assert f"{tokenizer.vocab_size} ids" in output and "rejected" in output


def test_aligned_streams_stand_one_below_the_other(tmp_path: Path, shown, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "18")
    write_char_dataset(tmp_path / "text", "ab\ncd" * 80)
    write_char_dataset(tmp_path / "tags", "01234" * 80)
    lines = (
        shown(str(tmp_path / "text"), str(tmp_path / "tags"), data_dir="data", n=1, block_size=24)
        .partition("last target\n")[2]
        .splitlines()
    )
    assert max(map(len, lines)) <= 18
    text = "".join(line[6:] for line in lines if line.startswith("text"))
    tags = "".join(line[6:].ljust(0) for line in lines if line.startswith("tags"))
    assert text.replace("\\n", "\n").translate(str.maketrans("ab\ncd", "01234")) == tags.replace(" ", "")


def test_numbers_of_token_bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Against Python's own split and Counter, over shards, at once and in parts."""
    documents = ["1+1=2", "", "12+3=15" * 9, "7"]
    ids = [i for text in documents for i in [*DIGITS.encode(text).tolist(), DIGITS.eos_id]]
    ids += DIGITS.encode("4+4").tolist()
    for number, part in enumerate((ids[:20], ids[20:23], ids[23:])):
        np.array(part, dtype=np.uint16).tofile(tmp_path / f"train_{number:06d}.bin")
    split = token_bins.TokenBin(tmp_path, "train", token_bins.Meta(DIGITS.vocab_size, "uint16", DIGITS, {}))
    for stretch in (2**22, 7):
        monkeypatch.setattr(show, "COUNTED_TOKENS", stretch * show.STRETCHES)
        counts, lengths, part = show.count_tokens(split)
        assert part == "" and lengths.tolist() == [len(text) + 1 for text in documents]
        assert {i: n for i, n in enumerate(counts.tolist()) if n} == Counter(ids)
    monkeypatch.setattr(show, "COUNTED_TOKENS", 40)
    monkeypatch.setattr(show, "STRETCHES", 2)
    monkeypatch.setattr(token_bins, "STRETCHES", 2)
    counts, lengths, part = show.count_tokens(split)
    assert "2 stretches of 20" in part and counts.sum() == 40 and lengths.tolist() == [1, 2]


def test_pieces_are_whole_characters_and_controls_stand_out():
    tokenizer = ByteTokenizer()
    text = "naïve 🙂🙂 <|endoftext|> ﷽\x1b[31m"
    ids = [*tokenizer.encode(text).tolist(), tokenizer.eos_id, tokenizer.vocab_size + 3]
    pieces = list(show.pieces_of(tokenizer, ids))
    assert "".join(piece.text for piece in pieces[:-2]) == text
    assert [piece.text for piece in pieces if piece.is_control] == ["<|endoftext|>", "P3"]
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    plain = show.Style(colored=False, boundaries=False)
    assert plain.render(pieces) == text.replace("\x1b", "\\x1b") + "[<|endoftext|>][P3]"
    colored = show.Style(colored=True, boundaries=False).render(pieces, [True] * 5 + [False] * (len(ids) - 5))
    assert re.sub(r"\x1b\[\d*m", "", colored) == text.replace("\x1b", "\\x1b") + "<|endoftext|>P3"
    assert "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", colored)) == tokenizer.decode(ids[:5])


@pytest.mark.parametrize(
    "names, options, expected",
    [
        ((), {}, "NAME"),
        (("a", "a"), {}, "twice"),
        (("a",), {"tokenizer": "bpe"}, "--tokenizer=bpe"),
        (("a",), {"columns": "prompt"}, "--columns"),
    ],
)
def test_what_can_not_be_shown_is_refused(shown, capsys, names: tuple, options: dict, expected: str):
    with pytest.raises(SystemExit):
        shown(*names, **options)
    assert expected in capsys.readouterr().err
