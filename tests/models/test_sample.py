"""sample.py as a user calls it: prompts of every kind, what is printed, and errors."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TEXT, gpt2_tokenizer_env, run_script

import configurator
import sample as sample_script
from nanoforge.errors import UserError
from sample import read_start


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs of the three modes, long enough to have learned something."""
    from helpers import TINY

    folder = tmp_path_factory.mktemp("runs")
    import train
    import train_args

    longer = [
        *TINY,
        "--n_embd=32",
        "--block_size=16",
        "--batch_size=16",
        "--max_iters=150",
        "--eval_interval=50",
        "--log_interval=150",
        "--learning_rate=1e-2",
        f"--data_dir={data_dir}",
    ]
    modes = {
        "single": ["--dataset=a"],
        "contexts": ["--training_mode=multicontext", "--multicontext_datasets", "a", "upper"],
        "separate": ["--training_mode=multidataset", "--dataset_list", "a", "c", "--multidataset_wte"],
    }
    for name, flags in modes.items():
        train.main(train_args.parse([*longer, *flags, f"--out_dir={folder / name}"]))
    return folder


def sample(*argv: str, stdin: str = "") -> str:
    """What sample.py prints to standard output, in this process."""
    args = configurator.parse(sample_script.SampleArgs, list(argv), "")
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        sample_script.main(args)
    return output.getvalue()


def refuse(*argv, **more) -> str:
    done = run_script(*argv, script="sample.py", check=False, **more)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and not done.stdout, done.stderr
    return done.stderr


@pytest.mark.parametrize("start", ["-", "FILE:prompt.txt"])
def test_a_prompt_is_read_as_python_reads_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str):
    """With a byte order mark, line ends of any system, and bytes that are no text, which are refused by their place."""
    monkeypatch.chdir(tmp_path)
    path = Path("prompt.txt")
    for text in ("\ufeffnaïve\r\ncafé\r", "plain\n", "", "\ufeff"):
        path.write_bytes(text.encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(path.open("rb"), encoding="ascii"))
        assert read_start(start) == path.read_text(encoding="utf-8-sig")
    path.write_bytes(b"caf\xe9")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(path.open("rb"), encoding="ascii"))
    with pytest.raises(UserError, match="at byte 3"):
        read_start(start)
    with pytest.raises(UserError, match="--start"):
        read_start("caf\udce9")  # as Python passes on a byte of the command line


@pytest.mark.slow
def test_samples_resemble_the_text(trained):
    output = sample(
        f"--out_dir={trained}/single", "--start=the quick", "--num_samples=2", "--max_new_tokens=200", "--temperature=1"
    )
    samples = output.split("\n---------------\n")
    assert (
        len(samples) == 3
        and samples[2] == ""
        and all(s.startswith("the quick") and len(s) == 209 for s in samples[:2])
        and samples[0] != samples[1]
    )
    known_words = set(re.findall(r"\w+", TEXT))
    assert sum(word in known_words for word in re.findall(r"\w+", output)) > 20


def sample_here(capsys: pytest.CaptureFixture, *argv: str) -> tuple[str, str]:
    """What sample.py prints, in this process: standard output and standard error."""
    sample_script.main(configurator.parse(sample_script.SampleArgs, list(argv), ""))
    return capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("start", ["the ", "the quick brown fox jumps"])
def test_a_text_until_its_end_goes_on_past_the_context(
    trained: Path, capsys: pytest.CaptureFixture, start: str
) -> None:
    """A context of 16 tokens; this model has no end token, so the text is the endless one."""
    capsys.readouterr()
    flags = [f"--out_dir={trained}/single", f"--start={start}", "--num_samples=1", "--max_new_tokens=200"]
    flags += ["--temperature=0", "--dtype=float32", "--device=cpu"]
    endless, remark = sample_here(capsys, *flags)
    assert len(endless) == len(start) + 200 + len("\n---------------\n")
    assert sample_here(capsys, *flags, "--stop_at_end") == (endless, remark)
    assert ("25" in remark and "16" in remark) == (len(start) > 16)


@pytest.mark.slow
def test_each_start_gets_its_completions(base: Path, capsys: pytest.CaptureFixture):
    """As many as with one start a call; a loop over seeds may be greedy, where all of them give the same."""
    flags = [f"--init_from={base}", "--stop_at_end", "--temperature=0", "--max_new_tokens=4", "--dtype=float32"]
    alone = [sample_here(capsys, *flags, f"--start={start}", "--num_samples=2")[0] for start in ("1+2=", "12+9=")]
    for seed in (1, 2):
        both, _ = sample_here(capsys, *flags, "--num_samples=2", f"--seed={seed}", "--start", "1+2=", "12+9=")
        assert both == "".join(alone) and both.count("12+9=") == 2


@pytest.mark.slow
def test_the_same_seed_draws_the_same_and_streaming_changes_nothing(trained):
    flags = [f"--out_dir={trained}/single", "--start=pack", "--max_new_tokens=60", "--num_samples=2"]
    assert (
        sample(*flags)
        == sample(*flags)
        == sample(*flags, "--no-stream")
        != sample(*flags, "--seed=2", "--temperature=2")
    )


@pytest.mark.slow
def test_prompts_from_a_file_and_from_standard_input(trained, tmp_path: Path):
    flags = [f"--out_dir={trained}/single", "--max_new_tokens=20", "--num_samples=1", "--temperature=0"]
    (tmp_path / "p.txt").write_text("five dozen")
    assert (
        sample(*flags, f"--start=FILE:{tmp_path / 'p.txt'}")
        == sample(*flags, "--start=-", stdin="five dozen")
        == sample(*flags, "--start=five dozen")
    )


GREEDY = ["--temperature=0", "--dtype=float32", "--device=cpu"]
END = "\n---------------\n"


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--no-stream"], ["--stop_at_end"]], ids=str)
def test_a_stop_string_ends_the_text_before_it(trained: Path, more: list[str]) -> None:
    """At its first place in the completion, one in the prompt counts not."""
    flags = [f"--out_dir={trained}/single", "--start=the ", "--num_samples=2", "--max_new_tokens=60", *GREEDY, *more]
    text = sample(*flags).split(END)[0]
    new = text.removeprefix("the ")
    stop = new[20:23]
    assert sample(*flags, "--stop", stop, "@") == f"the {new[: new.index(stop)]}{END}" * 2
    assert sample(*flags, "--stop=the ") == f"the {new.split('the ')[0]}{END}" * 2
    assert sample(*flags, "--stop=@") == sample(*flags)


@pytest.mark.slow
def test_tokens_are_printed_with_their_probabilities(trained: Path) -> None:
    flags = [f"--out_dir={trained}/single", "--start=the ", "--num_samples=1", "--max_new_tokens=30", *GREEDY]
    text, *lines = sample(*flags, "--logprobs=2").removesuffix(END).split("\n")
    assert f"{text}{END}" == sample(*flags)
    row = re.compile(r'("(?:[^"\\]|\\.)*") +([01]\.\d{4})')
    tokens = [[(json.loads(token), float(p)) for token, p in row.findall(line)] for line in lines]
    assert "the " + "".join(drawn for (drawn, _), *_ in tokens) == text
    for drawn, first, second in tokens:
        assert drawn == first and 1 >= first[1] >= second[1] and first[1] + second[1] <= 1.0001
    contexts = [f"--out_dir={trained}/contexts", "--num_samples=1", "--max_new_tokens=5", "--start", "the ", "UUU."]
    lines = sample(*contexts, "--logprobs=1", *GREEDY).removesuffix(END).split("\n")[-10:]
    assert [line[:8] for line in lines] == ["a     | ", "upper | "] * 5
    with pytest.raises(UserError, match="--stop"):
        sample(*contexts, "--stop=x")


@pytest.mark.slow
def test_a_repetition_penalty_repeats_less(trained: Path) -> None:
    flags = [f"--out_dir={trained}/single", "--start=the ", "--num_samples=1", "--max_new_tokens=20", *GREEDY]
    assert len(set(sample(*flags, "--repetition_penalty=1000"))) > len(set(sample(*flags)))


@pytest.mark.slow
def test_checkpoints_are_chosen(trained):
    flags = [f"--out_dir={trained}/single", "--max_new_tokens=50", "--num_samples=1"]
    assert sample(*flags, "--checkpoint=last") == sample(*flags, "--checkpoint=150")
    assert "of steps 100, 150" in refuse(*flags, "--checkpoint=77") and "best, last or a step" in refuse(
        *flags, "--checkpoint=first"
    )


@pytest.mark.slow
def test_contexts_are_printed_aligned(trained):
    output = sample(
        f"--out_dir={trained}/contexts",
        "--num_samples=1",
        "--max_new_tokens=80",
        "--start",
        "the ",
        "UUU.",
        "--temperature=0.3",
    )
    lines = output.splitlines()[:-1]
    a, upper = (
        "".join(line[8:] for line in lines if line.startswith("a     |")),
        "".join(line[8:] for line in lines if line.startswith("upper |")),
    )
    assert a.startswith("the ") and upper.startswith("UUU.") and set(upper) <= set("U. ") and len(a) == len(upper)
    agree = [char.isalpha() == (kind == "U") for char, kind in zip(a, upper, strict=True)]
    assert sum(agree) > 0.8 * len(agree), "the contexts are continued together"
    assert "one for each context (a, upper)" in refuse(f"--out_dir={trained}/contexts", "--start=the ")
    assert "need equal lengths" in refuse(f"--out_dir={trained}/contexts", "--start", "the ", "U")


@pytest.mark.slow
def test_a_dataset_of_several_is_chosen(trained):
    output = sample(
        f"--out_dir={trained}/separate", "--dataset=c", "--start=0123", "--num_samples=1", "--max_new_tokens=40"
    )
    assert set(output.splitlines()[0]) <= set("0123456789 ")
    assert "vocabularies of a, c" in refuse(f"--out_dir={trained}/separate", "--dataset=x")


@pytest.mark.slow
def test_errors_are_one_line(trained, tmp_path: Path):
    assert "knows no '€'" in refuse(f"--out_dir={trained}/single", "--start=a €")
    assert "no checkpoints" in refuse(f"--out_dir={tmp_path}")
    assert "--start: is empty" in refuse(f"--out_dir={trained}/single", "--start=-", input="")
    assert "can't be read" in refuse(f"--out_dir={trained}/single", "--start=FILE:/nowhere")
    assert "no such argument; did you mean --top_k?" in refuse("--topk=3")
    assert "must be at least 0" in refuse("--temperature=-1")
    assert "must be auto, cpu" in refuse(
        f"--out_dir={trained}/single", "--device=gpu"
    ) and "did you mean gpt2-xl" in refuse("--init_from=gpt2-xxl")
    assert "--top_k: has an effect only with --temperature above 0" in refuse("--temperature=0", "--top_k=3")
    assert "--stop: is empty" in refuse("--stop=", "--start=a")


@pytest.mark.slow
def test_gpt2_of_a_local_folder(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    env = gpt2_tokenizer_env()
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path)
    flags = [f"--init_from={tmp_path}", "--start=Hello<|endoftext|>", "--max_new_tokens=50", "--num_samples=2"]
    output = run_script(*flags, script="sample.py", env=env).stdout
    assert output.count("Hello<|endoftext|>") == 2


def test_help_is_quick():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "sample.py", "--help"], capture_output=True, text=True
    )
    assert "--top_p" in done.stdout and "torch" not in done.stderr
