"""bench.py: its arithmetic against closed forms; its sections with tiny shapes and a stand-in for nanoGPT."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from helpers import TEXT, ScriptProcess, fork_to_end, gpt2_tokenizer_env, run_script, wait_for_line

import bench
import configurator
from bench import parse
from benchmarks import gpu, open_model, prepare_gpu, tokenization
from benchmarks.bench_race import held_out_loss, typical_first
from benchmarks.common import CASES, SCRIPTS, ProcessResult, compare, run_process, take_turns
from benchmarks.gpu_rows import ROWS, Row, RowFailedError, windows_of
from benchmarks.session import Session, median_step_ms, read_nanogpt_step_ms
from configurator import Rules
from model import GPT, GPTConfig
from nanoforge.errors import UserError

PEER = """
import json, os, sys, torch



def get_batch(split):
    return torch.zeros(64, 1024), torch.zeros(64, 1024)


options = dict(flag.lstrip("-").split("=", 1) for flag in sys.argv[1:])
width = int(options["n_embd"])
vocab_size = json.load(open("data/shakespeare_char/meta.json"))["vocab_size"]


def save(step):
    weights = {"wte": (vocab_size, width), "wpe": (int(options["block_size"]), width), "ln_f": (width,)}
    for layer in range(int(options["n_layer"])):
        block = {"ln_1": (width,), "ln_2": (width,), "attn.c_attn": (3 * width, width), "attn.c_proj": (width, width)}
        block |= {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
        weights |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    state = {f"transformer.{name}.weight": torch.zeros(shape) for name, shape in weights.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    checkpoint = {"model": state, "model_args": {"n_head": int(options["n_head"])}, "iter_num": step}
    torch.save(checkpoint, os.path.join(options["out_dir"], "ckpt.pt"))


for i in range(int(options["max_iters"]) + 1):
    if "always_save_checkpoint" in options and i % int(options["eval_interval"]) == 0:
        save(i)
    print(f"iter {i}: loss 4.{i}, time {1000 if i < 3 else 80 + i}.50ms, mfu 1%")
"""
PEER_MODEL = """
import torch


class GPTConfig:
    def __init__(self, **shape):
        self.shape = shape


class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.vocab_size = config.shape["vocab_size"]

    def generate(self, idx, new, temperature, top_k):
        return torch.cat((idx, torch.randint(self.vocab_size, (1, new))), dim=1)
"""
PEER_SAMPLE = """
import torch
from model import GPT, GPTConfig

GPT(GPTConfig(vocab_size=3)).generate(torch.zeros(1, 1, dtype=torch.int64), 8, 0.8, 200)
"""


def rehearse_bench(*argv: str) -> subprocess.CompletedProcess:
    """bench.py, whose processes are forks: each saves the import of torch."""
    code = (
        "import configurator, bench; from benchmarks import rehearsal; rehearsal.start();"
        f"configurator.run(bench.main, bench.parse({list(argv)}))"
    )
    done = fork_to_end(exec, code)
    assert not done.returncode, done.stderr
    return done


@pytest.fixture
def peer(tmp_path: Path, data_dir: Path):
    """A folder that looks like nanoGPT's checkout, with the dataset in it."""
    folder = tmp_path / "peer"
    dataset = folder / "data" / "shakespeare_char"
    dataset.mkdir(parents=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        (dataset / name).write_bytes((data_dir / "a" / name).read_bytes())
    for path in (dataset / "meta.pkl", dataset / "prepare.py", folder / "configurator.py", folder / "LICENSE"):
        path.touch()
    (dataset / "input.txt").write_text(TEXT)
    for name, text in (("train.py", PEER), ("model.py", PEER_MODEL), ("sample.py", PEER_SAMPLE)):
        (folder / name).write_text(text)
    return folder


def test_figures_and_ratios():
    results = {"ours": [{"ms": 2.0}, {"ms": 4.0}, {"ms": 3.0}], "peer": [{"ms": 4.0}, {"ms": 4.0}, {"ms": 9.0}]}
    table = compare(results, "ms", lower_is_better=True)
    assert table["ours"] == {"min": 2.0, "median": 3.0, "max": 4.0, "n": 3, "ratios": [2.0, 1.0, 3.0], "ratio": 2.0}
    assert "ratio" not in table["peer"]
    assert compare(results, "ms", lower_is_better=False)["ours"]["ratios"] == [0.5, 1.0, 0.333]


def test_sides_take_turns():
    order = []

    def side(name: str):
        order.append(name)
        return {}

    take_turns(3, {"a": lambda: side("a"), "b": lambda: side("b")})
    assert order == list("ababab")


@pytest.mark.parametrize("name", ["124M", "124Mx32", "124Mx64"])
def test_124m_is_gpt2s_size(name: str):
    """12 layers of 12 C^2 + 2 C, 50,304 + 1,024 embeddings and the last norm: 124.4 M. With 65 characters, 85.8 M."""
    case = {key: value for key, value in CASES[name].items() if key not in ("batch_size", "vocab_size")}
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_sizes=(CASES[name]["vocab_size"],), bias=False, **case))
    width = 768
    assert model.count_parameters() == 12 * (12 * width**2 + 2 * width) + (50304 + 1024 + 1) * width
    assert round(model.count_parameters() / 1e6, 1) == 124.4


def test_figures_are_written_one_by_one(tmp_path: Path):
    """A section that is killed keeps the figures that it had."""
    session = Session(parse(["train", "--device=cpu", f"--out={tmp_path}"])[1], tmp_path)

    def figures():
        yield "first", {"ms": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.write("train", figures())
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert results["train"].keys() == {"about", "first"}


def test_time_between_lines_is_that_of_their_steps():
    """nanoGPT prints the host's time of one iteration, here 1 ms; the lines come 200 ms apart, 10 steps each."""
    lines = [f"iter {step}: loss 4.1, time 1.00ms, mfu 1%" for step in (0, 10, 20, 30)]
    result = ProcessResult(
        output="\n".join(["found vocab_size", *lines]),
        seconds=9.0,
        peak_bytes=0,
        seconds_to_text=None,
        line_seconds=[0.1, 5.0, 7.0, 7.2, 7.4],
    )
    step_ms = read_nanogpt_step_ms(result, 10)
    assert step_ms == pytest.approx([200, 20, 20])
    assert median_step_ms(step_ms, 30, 10) == pytest.approx(20), "the first ten warm up"
    assert read_nanogpt_step_ms(result) == [1.0] * 4
    with pytest.raises(UserError, match="--steps=10"):
        median_step_ms(step_ms[:1], 10, 10)


def test_a_first_step_that_compiles_counts_as_any_other():
    assert typical_first([30.0, 2.0, 1.0, 3.0, 2.0]) == [2.0, 2.0, 1.0, 3.0, 2.0]


def test_the_stopwatch_counts_no_first_call(tmp_path: Path):
    """The first call takes half a second, as if it compiled, and is made outside the time."""
    (tmp_path / "drawing.py").write_text(
        "import time\n"
        "class Drawn:\n"
        "    def __getitem__(self, where): return self\n"
        "    def sum(self): return self\n"
        "    def item(self): return 0.0\n"
        "calls = []\n"
        "def draw():\n"
        "    calls.append(1)\n"
        "    time.sleep(0.5 if len(calls) == 1 else 0.01)\n"
        "    return Drawn()\n"
    )
    (tmp_path / "script.py").write_text("import drawing\ndrawing.draw()\ndrawing.draw()\nprint(len(drawing.calls))\n")
    command = [sys.executable, str(SCRIPTS / "stopwatch.py"), str(tmp_path), "drawing", "draw", "script.py"]
    output = run_process(command, cwd=tmp_path).output
    calls, _, seconds = output.partition("stopwatch")
    assert int(calls) == 3
    assert 0.02 <= float(seconds) < 0.3


def test_the_memory_of_a_process_is_its_own():
    """Not that of the process which measures, and not less than what it holds."""
    ballast = bytearray(300 * 2**20)
    peaks = []
    for mb in (0, 100):
        result = run_process([sys.executable, "-c", f"held = bytearray({mb} * 2**20)"])
        peaks.append(result.peak_bytes / 2**20)
    assert 0 < peaks[0] < 60
    assert 100 < peaks[1] < 160
    assert len(ballast)


def test_held_out_loss_reads_every_token_once(tmp_path: Path):
    """A model that knows nothing loses log V on each; one that is sure of the next token of a cycle loses nothing."""
    val_path = tmp_path / "val.bin"
    (np.arange(100) % 7).astype(np.uint16).tofile(val_path)
    config = GPTConfig(
        vocab_sizes=(7,),
        block_size=8,
        n_layer=1,
        n_head=1,
        n_embd=8,
        bias=False,
        tie_weights=False,
        zero_init=True,
        position="none",
    )
    model = GPT(config)
    assert held_out_loss(model, val_path, 8) == pytest.approx(torch.tensor(7.0).log().item(), rel=1e-6)
    with torch.no_grad():
        model.wte.weight.copy_(torch.eye(7, 8) * 100)
        model.head.weight.copy_(torch.eye(7, 8).roll(1, 0) * 100)
    assert held_out_loss(model, val_path, 8) < 1e-6
    assert model.training


@pytest.mark.slow
def test_all_sections_in_turn_with_a_peer(peer: Path, tmp_path: Path):
    """The peer learns nothing: its weights are zeros, so its loss is log V; ours gets below that."""
    config = tmp_path / "tiny.py"
    config.write_text("n_layer = 1\nn_head = 2\nn_embd = 16\nblock_size = 64\nmax_iters = 20\nlearning_rate = 1e-2\n")
    flags = ["--cases=tiny", "--pairs=2", "--steps=8", "--text_mb=1", "--bin_tokens=100000", "--batches=100"]
    flags += ["--seeds=1", "--peer_iters=4", f"--race_config={config}", "--device=cpu", f"--out={tmp_path}/results"]
    done = rehearse_bench("all", f"--peer={peer}", *flags)
    results = json.loads((tmp_path / "results/cpu.json").read_text())
    assert results.keys() == {"device", *bench.SECTIONS}, done.stdout

    section = results["train"]
    tiny = section["tiny"]
    assert tiny["ms"]["peer"]["median"] == 86.5, "the first four of nine are left out"
    ours = tiny["ms"]["ours float32"]
    assert ours["n"] == len(ours["ratios"]) == 2
    ratios = [86.5 / ours["max"], 86.5 / ours["min"]]
    assert sorted(ours["ratios"]) == pytest.approx(ratios, abs=1e-3)
    assert ours["ratio"] == pytest.approx(sum(ratios) / 2)
    assert "ratio" in done.stdout
    assert sum(tiny["parts"].values()) == pytest.approx(1.0)
    assert set(tiny["parts"]) == {"data", "forward", "backward", "optimizer", "logging"}
    share = tiny["of peak, ours float32"]
    assert share["utilisation"] == pytest.approx(share["flops"] / share["measured_peak_flops"])
    assert section["about"]["torch"] == torch.__version__

    for workload in ("inside the block", "past the block", "batch of 16"):
        assert results["sample"][workload]["ours"]["ratio"] > 0
    assert results["data"]["prepare"]["seconds"]["ours"]["ratio"] > 0
    assert len(results["data"]["batches"]["resident_mb"]) == 10
    assert results["startup"]["first step"]["ours"]["ratio"] > 0

    race = results["race"]
    vocab_size = json.loads((peer / "data/shakespeare_char/meta.json").read_text())["vocab_size"]
    goal = race["goals"]["peer, lr 0.001"]
    assert goal["goal"] == pytest.approx(math.log(vocab_size), rel=1e-6)
    assert goal["peer"] == {"step": 4, "tokens": 4 * 12 * 64, "seconds": pytest.approx(4 * 1.0005)}
    assert race["runs"]["ours"][0]["loss"] < goal["goal"]
    assert goal["ours"][0]["loss"] <= goal["goal"]
    assert [point["step"] for point in race["runs"]["ours"][0]["curve"]] == [0, 10, 20]
    assert (tmp_path / "results/race_cpu.png").exists()


@pytest.mark.slow
def test_sampling_in_turn_with_transformers(peer: Path, tmp_path: Path):
    pytest.importorskip("transformers")
    flags = ["--cases=tiny", "--pairs=1", "--device=cpu", f"--data_dir={peer}/data", f"--out={tmp_path}"]
    rehearse_bench("sample", "--peer_kind=hf", *flags)
    section = json.loads((tmp_path / "cpu.json").read_text())["sample (hf)"]
    assert section["batch of 16"]["ours"]["ratio"] > 0
    assert "peer" not in section["past the block"]


@pytest.mark.slow
def test_an_open_model_beside_other_programs(tmp_path: Path):
    """A tiny model, in processes that are forks of one. transformers and TRL start threads, which PyTorch does not let
    a fork do: this program stands in for transformers."""
    for package in ("transformers", "xllamacpp", "gguf"):
        pytest.importorskip(package)
    model = tmp_path / "tiny"
    open_model.write_random_gpt2(model, n_layer=1, n_embd=16, n_head=2)
    flags = [f"--model={model}", "--sections=rollouts,one", "--pairs=1", f"--out={tmp_path}/results"]
    code = (
        "import configurator; from benchmarks import open_model, rehearsal; rehearsal.start();"
        "real = open_model.complete;"
        "open_model.complete = lambda name, *rest, real=real: real(name.replace('transformers', 'ours'), *rest);"
        f"configurator.run(open_model.main, configurator.parse(open_model.Args, {flags}, ''))"
    )
    done = fork_to_end(exec, code)
    assert not done.returncode, done.stderr
    results = json.loads((tmp_path / "results/open_model_cpu.json").read_text())
    assert results.keys() == {"rollouts, tiny", "one, tiny"}
    assert results["rollouts, tiny"]["float32"]["ours"]["ratio"] > 0
    for part in ("prefill", "decode"):
        assert {"ours, float32", "--engine=llama.cpp, float16", "peer"} <= results["one, tiny"][part].keys()


TOKENIZES = """
import datasets, os, sys, numpy, tiktoken

encoding = tiktoken.get_encoding("gpt2")
rows = datasets.load_dataset("openwebtext", num_proc=1)["train"].train_test_split(test_size=0.0005, seed=1)
assert len(rows["test"]) >= 1024  # as many parts as it is written in
texts = [text for part in rows.values() for text in part["text"]]
ids = [token for text in texts for token in [*encoding.encode_ordinary(text), encoding.eot_token]]
for name, part in (("train.bin", ids[5:]), ("val.bin", ids[:5])):
    numpy.array(part, dtype=numpy.uint16).tofile(os.path.join(os.path.dirname(__file__), name))
"""


@pytest.mark.slow
def test_tokenization_beside_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All sides count the same tokens; one that leaves a token out is not compared."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", gpt2_tokenizer_env()["TIKTOKEN_CACHE_DIR"])
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.py").write_text(TEXT[100 * number :])
    script = tokenization.nanogpt_script(str(tmp_path))
    script.parent.mkdir(parents=True)
    script.write_text(TOKENIZES)
    flags = [f"--peer={tmp_path}", f"--input={tmp_path}/text", "--text_mb=1", "--pairs=1", f"--out={tmp_path}/results"]
    tokenization.main(configurator.parse(tokenization.Args, flags, ""))
    results = json.loads((tmp_path / "results" / "tokenization_cpu.json").read_text())
    assert results["text_mb"] == 1 and results["rounds_of_the_files"] > 1 and results["tokens"] > 2e5
    for side in ("a loop over tiktoken", "nanoGPT's script"):
        assert results[side]["seconds"]["ours"]["ratio"] > 0 < results[side]["peak_mb"]["ours"]["ratio"]

    loop = [str(SCRIPTS / "tokenize_text.py"), str(tmp_path / "rows.jsonl"), "FOLDER"]
    tokenization.write_rows(tmp_path / "rows.jsonl", tmp_path / "text", 1)
    with pytest.raises(UserError, match="another number of tokens"):
        tokenization.measure(loop, tmp_path, {results["tokens"] - 1})


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, message in (
        (["run"], "no such section"),
        (["train", f"--peer={tmp_path}"], "no train.py"),
        (["train", "--cases=huge"], "no huge"),
    ):
        with pytest.raises(SystemExit):
            parse(arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="needs --peer"):
        bench.main(parse(["race", "--device=cpu", f"--out={tmp_path}"]))


# ---------------------------------------------------------------------------------------------------------------------
# gpu.py

SLOW_PEER = """
import sys, time

steps = int(next(flag for flag in sys.argv if flag.startswith("--max_iters=")).partition("=")[2])
if any(flag.startswith("--always_save_checkpoint") for flag in sys.argv):
    exec(open("race.py").read())
else:
    for i in range(steps + 1):
        print(f"iter {i}: loss 4.{i}, time 9000.00ms, mfu 1%", flush=True)
        time.sleep(0.02)
"""


def gpu_figures(out: Path) -> dict:
    return json.loads((out / "cpu.json").read_text())["gpu"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a rehearsal forks")
def test_all_of_the_gpus_measurements_are_rehearsed(peer: Path, tmp_path: Path):
    """Every row with tiny shapes, stage by stage. The first run is killed after A1; the next one keeps its figures."""
    (peer / "train.py").rename(peer / "race.py")
    (peer / "train.py").write_text(SLOW_PEER)
    out = tmp_path / "out"
    flags = ["--rehearse", f"--peer={peer}", f"--data_dir={tmp_path}/data", f"--out={out}"]
    script = "benchmarks/gpu.py"
    process = ScriptProcess("--stage=A", *flags, script=script)
    wait_for_line(process, "   A1:")
    process.kill()
    killed = gpu_figures(out)["figures"]
    assert {"data", "A0 copy", "A0 launch", "A1"} <= killed.keys()
    assert "A7 B1 eager" not in killed

    for stage in "AB":
        run_script(f"--stage={stage}", "--seconds=540", *flags, script=script)
    done = run_script(*flags, script=script)
    results = gpu_figures(out)
    figures = results["figures"]
    assert not results["failed"]
    assert results["rows"].keys() == {row.name for row in ROWS}
    assert {name: figures[name] for name in killed} == killed
    for name, record in figures.items():
        assert record["unit"] and (record["value"] is not None or name == "B2"), name
        assert str(tmp_path) not in json.dumps(record), "no folders of the machine"
    for name in ("A1", "A2", "A3", "A4", "A5", "A6", "B1 ours, turn 2", "B4 nanoGPT", "B5 loss_chunk", "B6 FSDP2"):
        record = figures[name]
        assert record["value"] == median(record["windows"]), name
        assert record["peak_memory_mb"] > 0
        assert record["first_step_s"] > 0
    for name in ("A2", "A4", "B1 nanoGPT, turn 1"):
        assert 0 < figures[name]["value"] < 4000, "the time on the wall, not the printed one"
    assert "37 figures" in done.stdout
    assert figures["B6 GRPO"]["recompiles"] == 0
    assert figures["B3"]["kernels"][0]["ms"] > 0
    assert (out / "cpu_trace.json.gz").exists()
    assert [point["step"] for point in figures["C1"]["curve"]] == [0, 2, 4]
    assert figures["C2"]["value"] < figures["C2"]["curve"][0]["val_loss"]

    assert [row.name for row in open_gpu_bench(peer, out, 60).unfinished(list(ROWS))] == ["data"]


def open_gpu_bench(peer: Path, out: Path, seconds: float) -> gpu.Bench:
    flags = ["--rehearse", f"--seconds={seconds}", f"--peer={peer}", f"--out={out}"]
    return gpu.Bench(configurator.parse(gpu.GpuArgs, flags, "", Rules()), gpu.TINY)


def test_a_process_ends_with_the_seconds(peer: Path, tmp_path: Path):
    """What it printed was read; with it ends the process that it started. A failure is another thing."""
    bench = open_gpu_bench(peer, tmp_path, gpu.MARGIN + 0.5)
    code = "import subprocess; child = subprocess.Popen(['sleep', '60']); print('started', flush=True); child.wait()"
    lines = []
    with pytest.raises(gpu.OutOfTimeError):
        for line in bench.run("-c", code):
            lines.append(line.text)
    assert lines == ["started"]
    assert bench.seconds_left > -20, "the pipe closes when both have ended"
    with pytest.raises(RowFailedError, match="ZeroDivisionError"):
        list(open_gpu_bench(peer, tmp_path, 60).run("-c", "1 / 0"))


def test_a_figure_that_failed_is_tried_again(peer: Path, tmp_path: Path):
    bench = open_gpu_bench(peer, tmp_path, 60)
    bench.gpu["about"] = {"commit": ""}
    records = [{"value": None, "unit": "ms", "error": "no memory"}, {"value": 1.0, "unit": "ms"}]

    def measure_once(bench: gpu.Bench, row: Row):
        if not bench.has("X a"):
            yield "X a", records.pop(0)
        if not bench.has("X b"):
            yield "X b", {"value": 2.0, "unit": "ms"}

    row = Row("X", 0.0, "two figures", measure_once)
    gpu.measure(bench, row)
    assert bench.done("X") == ["b"]
    assert "no memory" in gpu_figures(tmp_path)["failed"]["X"]
    gpu.measure(bench, row)
    results = gpu_figures(tmp_path)
    assert not results["failed"] and "X" in results["rows"]
    assert not records


def test_the_plan_is_in_order_and_fits(capsys: pytest.CaptureFixture[str]):
    """Each stage is one command of ten minutes; A comes first."""
    gpu.main(configurator.parse(gpu.GpuArgs, ["--dry_run"], "", Rules()))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [row.name for row in ROWS]
    for stage in "ABC":
        seconds = 60 * sum(row.minutes for row in ROWS if row.name.startswith((stage, "data")))
        assert seconds <= 540 - gpu.MARGIN + 30, stage


@pytest.mark.parametrize("first_step", [0, 1])
def test_windows_leave_the_first_out(first_step: int):
    """Steps of 10 ms after one of 30 s that compiles; the window with what it compiles later is left out too.

    nanoGPT's first line is of step 0, ours of step 1.
    """
    times = {first_step: 30.0, 2: 31.0, 4: 31.02, 6: 31.04, 7: 31.05}
    lines = [(seconds, f"step {step}: loss 4.1, 10 ms") for step, seconds in times.items()]
    first, windows = windows_of([(0.5, "run out/run"), *lines], r"step (\d+): loss", 2)
    assert first == 30
    assert windows == pytest.approx([10, 10])


def test_every_tenth_package_is_for_validation(tmp_path: Path):
    """In the dataset that prepare_gpu makes of the installed packages."""
    packages = []
    for number in range(10):
        folder = tmp_path / "site" / f"package{number}"
        folder.mkdir(parents=True)
        (folder / "code.py").write_text(f"x = {number}\n")
        (folder / "picture.png").write_bytes(b"\x89PNG")
        packages.append(folder)
    prepare_gpu.write_source_dataset(tmp_path / "data" / "source", packages, "byte")
    train_ids = np.fromfile(tmp_path / "data" / "source" / "train.bin", dtype=np.uint16)
    val_ids = np.fromfile(tmp_path / "data" / "source" / "val.bin", dtype=np.uint16)
    end = 256
    assert bytes(train_ids[train_ids != end].astype(np.uint8)) == b"".join(b"x = %d\n" % i for i in range(9))
    assert bytes(val_ids[val_ids != end].astype(np.uint8)) == b"x = 9\n"


def test_what_the_gpus_machine_needs_is_gathered(peer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """nanoGPT's scripts, its dataset and GPT-2's tokens, which tiktoken finds in the folder that was filled."""
    import tiktoken.load

    for name, value in gpt2_tokenizer_env().items():
        monkeypatch.setenv(name, value)
    out = tmp_path / ".bench"
    flags = [f"--peer={peer}", f"--text={peer}/data/shakespeare_char/input.txt", f"--out={out}"]
    prepare_gpu.main(configurator.parse(prepare_gpu.PrepareGpuArgs, flags, "", Rules()))
    assert all((out / "nanoGPT" / name).exists() for name in prepare_gpu.PEER_FILES)
    assert (out / "nanoGPT/data/shakespeare_char/input.txt").read_text() == TEXT
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(out / "tiktoken"))
    assert len(list((out / "tiktoken").iterdir())) == 2
    assert sum(path.stat().st_size for path in out.rglob("*")) < 2e6
    tiktoken.load.read_file_cached("https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe")
