"""report.py: its numbers against the model, closed forms and simulation; its reading of runs in every state; its page, served and in a browser."""

import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, run_script

import report
from model import GPT, GPTConfig
from nanoforge import run_dir
from nanoforge.errors import UserError
from nanoforge.report import page, plots, read_runs, scaling, stats

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"><b>\x1b[31m\u202egnp.exe\u2066\u200b\ud800 $x_$ {{data}} &lt;"


@pytest.fixture
def trained(tmp_path):
    """trained(name, seed=1, loss=..., **config) writes a run's folder as train.py does: 20 steps of 64 tokens, evaluated every 5."""

    def trained(
        name: str, end: str = "finished: 20 steps", loss=lambda step: 2 + 2 / (1 + step), more=None, **config
    ) -> Path:
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        arguments = {
            "out_dir": str(folder),
            "dataset": "a",
            "learning_rate": 1e-3,
            "seed": 1,
            "batch_size": 8,
            "gradient_accumulation_steps": 1,
            "block_size": 8,
        } | config
        shape = GPTConfig(
            vocab_sizes=(40,), block_size=8, n_layer=2, n_head=2, bias=True, n_embd=arguments.get("n_embd", 16)
        )
        (folder / "train_config.json").write_text(
            json.dumps(arguments | {"_model": shape.__dict__, "_about": {"git_commit": "0" * 40}})
        )
        lines = []
        for step in range(21):
            if step % 5 == 0:
                lines.append(
                    {
                        "event": "eval",
                        "step": step,
                        "seconds": step / 10,
                        "train_loss": loss(step),
                        "val_loss": loss(step),
                    }
                    | (more or {})
                )
            if step:
                lines.append(
                    {
                        "event": "train",
                        "step": step,
                        "seconds": step / 10,
                        "loss": loss(step),
                        "lr": 1e-3,
                        "grad_norm": 1.0,
                        "tokens": 64 * step,
                        "tokens_per_second": 640.0,
                    }
                )
        lines += [{"event": "save", "step": 15, "seconds": 2.0}] + [
            {"event": "note", "step": 20, "seconds": 2.0, "text": end}
        ] * bool(end)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return trained


def read(folder: Path, points: int = 400) -> read_runs.Run:
    return read_runs.read(folder, folder.name, points)


def shown(*paths, by: str = "best") -> dict:
    folders, without = read_runs.find([str(path) for path in paths])
    return page.payload(
        [read_runs.read(folder, name, 400) for folder, name in zip(folders, read_runs.names(folders), strict=True)],
        without,
        by,
    )


# ---------------------------------------------------------------------------------------------------------------------
# numbers


@pytest.mark.parametrize("more", [
    {}, {"bias": False, "tie_weights": False, "position": "rope"}, {"mlp": "gated", "mlp_ratio": 2.667, "norm": "rmsnorm", "n_kv_head": 2}, {"window": "SSL", "window_size": 5},
    {"window": "SL", "norm": "rmsnorm_nogain", "residual_scalars": True, "value_residual": True, "vocab_sizes": (30, 11), "vocabulary": "separate"}, {"mlp": "gated", "bias": True},
])  # fmt: skip
def test_size_and_flops_are_those_of_the_model(more):
    config = GPTConfig(
        **{"vocab_sizes": (41,), "block_size": 16, "n_layer": 5, "n_head": 4, "n_embd": 32, "bias": True} | more
    )
    model, shape = GPT(config), json.loads(json.dumps(config.__dict__))
    assert (
        scaling.parameters(shape) == model.count_parameters()
        and scaling.flops_per_token(shape) == model.flops_per_token()
    )


def test_students_t_has_its_closed_forms():
    for t in (0.0, 0.3, 1.7, 12.0):
        assert stats.student_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-12)
        assert stats.student_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)
        assert stats.student_p(t, 1e8) == pytest.approx(math.erfc(t / math.sqrt(2)), abs=1e-7)
    assert stats.student_quantile(0.95, 4) == pytest.approx(2.776445, abs=1e-6)


def test_welch_on_students_own_data():
    """The sleep data of Student 1908, against the output of R's t.test."""
    a, b = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    test = stats.welch(a, b)
    assert test.p == pytest.approx(0.07939, abs=1e-5) and (test.low, test.high) == pytest.approx(
        (-0.2054832, 3.3654832), abs=1e-6
    )
    assert stats.welch([1.0, 1.0], [1.0, 1.0]).p == 1 and stats.welch([1.0, 1.0], [2.0, 2.0]).p == 0


def test_equals_are_seldom_called_different():
    draw = np.random.default_rng(0).normal(size=(800, 8))
    called = [stats.welch(row[:4], row[4:]).p < 0.05 for row in draw]
    assert 0.02 < np.mean(called) < 0.07
    permuted = [stats.permutation_p(row[:4], row[4:]) <= 0.1 for row in draw[:300]]
    assert np.mean(permuted) < 0.13


def test_permutations_are_counted_and_claims_corrected():
    assert (
        stats.permutation_p([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20) and stats.permutation_p([1, 2], [1, 2]) == 1
    )
    assert stats.permutation_p(range(20), range(20)) is None
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_a_known_power_law_is_found_again():
    x = 10.0 ** np.arange(15, 21)
    law = scaling.fit(x, 1.69 + 400 * x**-0.154)
    assert (law.floor, law.exponent) == pytest.approx((1.69, 0.154), rel=1e-5)
    assert scaling.next_size(law, x).x == pytest.approx(1e21) and scaling.next_size(law, x).loss == pytest.approx(
        1.69 + 400 * 1e21**-0.154, rel=1e-6
    )
    bare = scaling.fit(x[:3], 400 * x[:3] ** -0.154)
    assert (
        bare.floor == 0
        and bare.exponent == pytest.approx(0.154)
        and scaling.check_largest(x[:4], 400 * x[:4] ** -0.154) == pytest.approx((400 * x[3] ** -0.154,) * 2)
    )
    assert (
        scaling.fit(x[:2], [3, 2]) is None
        and scaling.fit([1, 1.2, 1.4], [3, 2, 1]) is None
        and scaling.fit([1, 10, 100], [3, math.nan, 1]) is None
    )


def test_the_exponents_interval_holds_it_as_often_as_it_says():
    x, random = np.repeat(10.0 ** np.arange(15, 21), 2), np.random.default_rng(0)
    held = foretold = 0
    for _ in range(100):
        law = scaling.fit(x, (1.69 + 400 * x**-0.154) * np.exp(random.normal(0, 0.003, len(x))))
        held += abs(law.exponent - 0.154) < law.exponent_margin()
        new = (1.69 + 400 * 1e21**-0.154) * math.exp(random.normal(0, 0.003))
        foretold += abs(math.log(new / law.loss(1e21))) < law.margin(1e21)
    assert 88 <= held <= 99 and 88 <= foretold <= 99


def test_with_as_many_unknowns_as_points_no_interval_is_claimed():
    law = scaling.fit([1.0, 10.0, 100.0], [3.0, 2.5, 2.2], with_floor=True)
    assert (
        law.floor > 0 and law.covariance is None and law.margin(1000.0) is None and law.loss(10.0) == pytest.approx(2.5)
    )


# ---------------------------------------------------------------------------------------------------------------------
# reading runs


def test_a_real_run_is_read_as_it_was(run):
    done = run("--max_iters=8", "--log_interval=2", name="real")
    told = read(done.out_dir)
    assert (told.state, told.step, told.tokens, told.remarks) == ("done", 8, 8 * 32, [])
    assert told.final == done.evals[-1]["val_loss"] and told.best == min(line["val_loss"] for line in done.evals[1:])
    assert (
        list(told.evals["tokens"]) == [32 * line["step"] for line in done.evals]
        and told.train["loss"].tolist() == done.losses
    )
    model = GPT(
        GPTConfig(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in done.config["_model"].items()}
        )
    )
    assert told.flops == model.flops_per_token() and told.parameters == model.count_parameters()


def test_runs_in_every_state_are_told(trained, tmp_path):
    out = tmp_path / "out"
    assert read(trained("done")).state == "done"
    broken = trained("broken", end="")
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 21, "lo')
    assert (
        read(broken).state == "stopped"
        and read(broken).remarks == ["its last line is incomplete"]
        and read(broken).step == 20
    )
    failed = trained("failed", end="")
    (failed / "exit_status").write_text("1\n")
    (failed / "log.txt").write_text("step 20\nRuntimeError: out of memory\n")
    assert (read(failed).state, read(failed).why, read(failed).log[-1]) == (
        "failed",
        "status 1",
        "RuntimeError: out of memory",
    )
    stopped = trained("stopped", end="stopped by SIGTERM; --init_from=resume goes on")
    assert (read(stopped).state, read(stopped).why) == ("stopped", "stopped by SIGTERM")
    going = trained("going", end="")
    with run_dir.RunLock(going) as lock:
        lock.acquire()
        assert read(going).state == "running"
    (out / "new").mkdir()
    (out / "new" / "train_config.json").write_text("{}")
    assert read(out / "new").state == "new"
    (out / "odd").mkdir()
    (out / "odd" / "metrics.jsonl").write_text("")
    (out / "odd" / "train_config.json").write_text("[" * 100_000)
    assert read(out / "odd").state == "new" and "can't be read" in read(out / "odd").remarks[0]
    whole = shown(out)
    assert [one["state"] for one in whole["runs"]] == ["stopped", "done", "failed", "stopped", "new", "new", "stopped"]
    assert any("6 of 7 runs are not done" in remark for remark in whole["remarks"]), whole["remarks"]


def test_lines_that_mean_nothing_are_told_and_left_out(trained):
    folder = trained("run")
    with (folder / "metrics.jsonl").open("a") as file:
        for line in (
            "[1]",
            '{"event": "train"}',
            '{"event": "train", "step": "x"}',
            "[" * 5000,
            '{"event": 7, "step": 1}',
            "\ud800".encode("utf-8", "surrogatepass").decode("latin1"),
        ):
            file.write(line + "\n")
        file.write(
            '{"event": "train", "step": 21, "loss": NaN, "lr": true, "grad_norm": %s, "reward": "1.5", "deep": {"a": 1}}\n'
            % ("9" * 400)
        )
        file.write('{"event": "train", "step": 22, "loss": null, "reward": 2}\n')
    told = read(folder)
    assert "6 broken lines in metrics.jsonl ignored" in told.remarks and "loss is not finite in 2 lines" in told.remarks
    assert (
        told.train["reward"][-1] == 2
        and math.isnan(told.train["reward"][-2])
        and math.isnan(told.train["grad_norm"][-2])
        and told.step == 22
    )
    assert told.train["tokens"].tolist() == [64 * step for step in range(1, 23)], "further at the same pace"


def test_a_step_told_twice_counts_as_it_was_told_last(trained):
    folder = trained("run", end="")
    again = [
        {"event": "note", "step": 10, "seconds": 1, "text": "resuming out/checkpoints/000010"},
        *({"event": "train", "step": step, "seconds": step / 10, "loss": 9.0} for step in (11, 12)),
    ]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in again)
    told = read(folder)
    assert (
        told.train["step"].tolist() == list(range(1, 13))
        and told.train["loss"][-2:].tolist() == [9, 9]
        and told.step == 15
    ), "of step 15 a checkpoint was told"
    assert "resumed once" in told.remarks and any("steps go back" in remark for remark in told.remarks)


def test_thinning_keeps_the_mean_the_peaks_and_the_best():
    random = np.random.default_rng(0)
    whole = {"step": np.arange(1.0, 10_001), "loss": random.normal(size=10_000), "grad_norm": random.random(10_000)}
    whole["loss"][123] = math.nan
    few = read_runs.thinned(whole, 100)
    assert len(few["step"]) == 100 and few["grad_norm"].max() == whole["grad_norm"].max() and few["step"][0] == 50.5
    assert few["loss"][2:].mean() == pytest.approx(whole["loss"][200:].mean()) and few["loss"][1] == pytest.approx(
        np.nanmean(whole["loss"][100:200])
    )
    evals = {"step": np.arange(1000.0), "val_loss": np.where(np.arange(1000) == 777, 1.0, 2.0)}
    picked = read_runs.thinned(evals, 20)
    assert len(picked["step"]) <= 21 and {0.0, 777.0, 999.0} <= set(picked["step"])


def test_runs_are_found_beneath_folders_and_named_apart(trained, tmp_path):
    folder = trained("a/one")
    trained("b/one")
    (folder / "checkpoints" / "000020").mkdir(parents=True)
    (folder / "checkpoints" / "000020" / "train_config.json").write_text("{}")
    (tmp_path / "table.csv").touch()
    folders, without = read_runs.find([str(tmp_path / "out"), str(folder), str(tmp_path / "table.csv")])
    assert (
        read_runs.names(folders) == ["a/one", "b/one"]
        and without == [str(tmp_path / "table.csv")]
        and read_runs.names(folders[:1]) == ["one"]
    )
    with pytest.raises(UserError, match="no such folder"):
        read_runs.find([str(tmp_path / "nowhere")])


# ---------------------------------------------------------------------------------------------------------------------
# what is shown


def test_seeds_are_one_group_with_mean_band_and_test(trained, tmp_path):
    for lr, level in ((1e-3, 2.0), (1e-2, 1.5), (3e-2, 1.501)):
        for seed in (1, 2, 3):
            trained(
                f"lr={lr},seed={seed}",
                learning_rate=lr,
                seed=seed,
                loss=lambda step, level=level, seed=seed: level + 0.01 * seed + 2 / (1 + step),
            )
    told = shown(tmp_path / "out")
    assert told["varied"] == ["learning_rate", "seed"] and [row["label"] for row in told["groups"]] == [
        "learning_rate=0.001",
        "learning_rate=0.01",
        "learning_rate=0.03",
    ]
    worse, best, near = told["groups"]
    assert best["is_best"] and told["runs"][told["best"]]["name"] == "lr=0.01,seed=1"
    assert (
        worse["difference"] == pytest.approx(0.5)
        and worse["corrected"] < 1e-4
        and worse["verdict"].startswith("real")
        and worse["permutation"] == 0.1
    )
    assert near["corrected"] > 0.5 and near["verdict"].startswith("may be chance")
    band = best["bands"]["val_loss"]
    assert (
        band["step"] == [0, 5, 10, 15, 20]
        and band["mean"][-1] == pytest.approx(1.52 + 2 / 21, abs=1e-5)
        and band["high"][-1] - band["low"][-1] == pytest.approx(0.02, abs=1e-5)
    )


def test_runs_that_are_not_done_are_no_part_of_a_test(trained, tmp_path):
    for seed, end in ((1, "finished"), (2, "finished"), (3, "")):
        trained(f"a{seed}", seed=seed, end=end, loss=lambda step, seed=seed: 2.0 - seed)
    assert len(shown(tmp_path / "out")["groups"][0]["losses"]) == 2


def test_the_scaling_fit_foretells_a_size(trained, tmp_path):
    """Runs whose final loss follows a law of their parameters; the size left out is foretold."""
    sizes = {
        width: scaling.parameters(
            GPTConfig(vocab_sizes=(40,), block_size=8, n_layer=2, n_head=2, bias=True, n_embd=width).__dict__
        )
        for width in (8, 16, 32, 64)
    }
    for width in (8, 16, 32):
        trained(f"w{width}", n_embd=width, loss=lambda step, size=sizes[width]: 20 * size**-0.2 + (20 - step) * 0.01)
    law = shown(tmp_path / "out")["scaling"]["laws"]["parameters"]
    assert law["exponent"] == pytest.approx(0.2, abs=1e-4) and "E = 0" in " ".join(law["words"])
    trained("w64", n_embd=64, loss=lambda step: 20 * sizes[64] ** -0.2 + (20 - step) * 0.01)
    told = shown(tmp_path / "out")["scaling"]
    assert told["sizes"] == 4 and told["laws"].keys() == {"compute", "parameters"}
    assert "0.0% off" in " ".join(told["laws"]["parameters"]["words"]), told["laws"]["parameters"]["words"]
    trained("seed", n_embd=64, seed=2, end="", loss=lambda step: 0.1)
    assert len(shown(tmp_path / "out")["scaling"]["points"]) == 4, "a run that is not done is no point"


def test_texts_become_visible():
    assert page.visible("a\n\tb é 漢 😀") == "a\n\tb é 漢 😀"
    assert page.visible("\x1b\u202e\u2028\x00\ud800") == "⟨U+001B⟩⟨U+202E⟩⟨U+2028⟩⟨U+0000⟩⟨U+D800⟩"


def hostile_run(trained):
    samples = [{"prompt": HOSTILE, "completion": HOSTILE, "reward": 0.5}, {"completion": 7}, "bare", {}]
    return trained(
        "run <b>$\\frac$",
        end=HOSTILE,
        dataset=HOSTILE,
        more={"samples": samples, HOSTILE: 1.0, "val_loss/<i>": 2.0, "constructor": 3.0, "__proto__": 4.0},
    )


def test_what_a_model_prints_stays_text(trained):
    """Nothing of it ends the data or begins a tag, and only our scripts may run."""
    import base64
    import hashlib

    folder = hostile_run(trained)
    trained("other", dataset="b")
    told = shown(folder.parent)
    whole = page.page(told, HOSTILE)
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", whole, re.S)
    assert [attributes for attributes, _ in scripts] == [' type="application/json" id="data"', "", ""]
    assert (
        json.loads(scripts[0][1]) == json.loads(json.dumps(told))
        and "<" not in scripts[0][1]
        and scripts[0][1].isascii()
    )
    for _, code in scripts[1:]:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" in whole
    assert (
        "connect-src 'none'" in whole
        and "unsafe-eval" not in whole
        and not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", whole.replace(scripts[1][1], ""))
    )
    outside = whole.replace(scripts[0][1], "").replace(scripts[1][1], "")
    assert "<title>&lt;/script&gt;" in outside and "\u202e" not in whole


def browser() -> str | None:
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@pytest.mark.skipif(browser() is None, reason="no Chromium is installed")
def test_the_page_in_a_browser(trained, tmp_path):
    """It draws, tells no error, and nothing that a model printed has run."""
    folder = hostile_run(trained)
    for seed in (2, 3):
        trained(f"seed{seed}", seed=seed)
    file = tmp_path / "report.html"
    file.write_text(page.page(shown(folder.parent), "title"), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    done = subprocess.run(
        [
            browser(),
            *flags,
            f"--user-data-dir={tmp_path}/profile",
            "--enable-logging=stderr",
            "--window-size=1200,9000",
            "--virtual-time-budget=8000",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.S)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<title>title</title>" in dom and dom.count("main-svg") > 4 and "<th" in dom and "<b>$" not in dom
    assert (
        "&lt;/script&gt;&lt;script&gt;" in dom
        and 'class="unseen">U+202E<' in dom
        and "onerror=" not in re.sub(r"&lt;.*?&gt;", "", dom)
    )


def test_pictures_are_drawn_also_of_odd_names(trained, tmp_path):
    folder = hostile_run(trained)
    for seed in (1, 2):
        trained(f"seed{seed}", seed=seed)
    for width in (8, 32, 64):
        trained(f"w{width}", n_embd=width, loss=lambda step, width=width: 3 - width / 100 + (20 - step) / 50)
    out = tmp_path / "pictures"
    out.mkdir()
    folders, _ = read_runs.find([str(folder.parent)])
    runs = [read_runs.read(one, name, 400) for one, name in zip(folders, read_runs.names(folders), strict=True)]
    drawn = plots.draw(runs, page.payload(runs, [], "best"), out)
    assert [path.name for path in drawn] == ["loss.png", "training.png", "datasets.png", "seeds.png", "scaling.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    (tmp_path / "out2").mkdir()
    (tmp_path / "out2" / "train_config.json").write_text("{}")
    empty = [read(tmp_path / "out2")]
    assert plots.draw(empty, page.payload(empty, [], "best"), out) == [] and list(out.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_the_command_writes_page_and_pictures(trained, tmp_path):
    pytest.importorskip("plotly")
    trained("a")
    trained("b", learning_rate=1e-2)
    done = run_script(
        str(tmp_path / "out" / "a"),
        str(tmp_path / "out" / "b"),
        str(tmp_path / "out"),
        f"--out={tmp_path}/report",
        script="report.py",
    )
    assert "2 runs" in done.stdout and {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.html",
        "loss.png",
        "training.png",
    }


def test_mistakes_are_told_in_a_line_and_help_is_quick(tmp_path):
    for argv, words in (
        ([], "say of which runs"),
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path], "no run there"),
        ([tmp_path, "--port=80"], "only with --watch"),
        ([tmp_path, "--wach"], "did you mean --watch"),
    ):
        done = run_script(*argv, script="report.py", check=False)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    begin = time.perf_counter()
    assert "--watch" in run_script("--help", script="report.py").stdout and time.perf_counter() - begin < 5


def test_folders_stand_anywhere_among_the_words():
    assert report.given(["--watch", "out/a", "--port", "8000", "out/b"]) == (
        ["out/a", "out/b"],
        ["--watch", "--port", "8000"],
    )


def test_reports_need_no_torch():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, report; print('torch' in sys.modules, 'plotly' in sys.modules, 'matplotlib' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.split() == ["False"] * 3, done.stderr


@pytest.fixture
def serving(trained, tmp_path):
    """A server that follows out/, and get(path, **headers): (status, headers, body)."""
    trained("a")
    reader = report.Reader([str(tmp_path / "out")], 400)
    server = report.server(SimpleNamespace(port=0, by="best", refresh=1), reader, "live")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def get(path: str, **headers: str):
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.server_port}{path}",
            headers={key.replace("_", "-"): value for key, value in headers.items()},
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    yield SimpleNamespace(get=get, reader=reader, address=server.server_address)
    server.shutdown()
    server.server_close()


def test_watching_follows_runs(serving, trained):
    assert serving.address[0] == "127.0.0.1"
    status, headers, body = serving.get("/data.json")
    assert status == 200 and len(json.loads(body)["runs"]) == 1
    assert serving.get("/data.json", If_None_Match=headers["ETag"])[0] == 304
    first = serving.reader.known.copy()
    folder = trained("b", end="")
    with run_dir.RunLock(folder) as lock:
        lock.acquire()
        status, _, body = serving.get("/data.json", If_None_Match=headers["ETag"])
        assert status == 200 and [one["state"] for one in json.loads(body)["runs"]] == ["done", "running"]
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"event": "train", "step": 30, "seconds": 3, "loss": 1.0, "tokens": 1920}\n')
        assert json.loads(serving.get("/data.json")[2])["runs"][1]["step"] == 30
    assert json.loads(serving.get("/data.json")[2])["runs"][1]["state"] == "stopped"
    assert all(serving.reader.known[path][1] is kept[1] for path, kept in first.items()) and not first.keys() & {
        folder
    }, "what has not changed is not read again"


def test_watching_answers_this_machine_alone(serving):
    page_ = serving.get("/")
    assert page_[0] == 200 and b"connect-src 'self'" in page_[2] and b'"live":1' in page_[2]
    assert (
        serving.get("/", Host="evil.example:80")[0] == 403
        and serving.get("/../report.py")[0] == 404
        and serving.get("/data.json?x")[0] == 404
    )
