"""The report's page and figures: groups, tests, laws, and hostile texts that stay texts; the page in a browser."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import HOSTILE, TOKENS_PER_STEP, tiny_model

from nanoforge.report import page, plots, stats


def write_seeds(write_run) -> None:
    """Three seeds of each of three learning rates: one worse than the best, one near it."""
    for lr, level in ((1e-3, 2.0), (1e-2, 1.5), (3e-2, 1.501)):
        for seed in (1, 2, 3):

            def loss(step, level=level, seed=seed):
                return level + 0.01 * seed + 2 / (1 + step)

            write_run(f"lr={lr},seed={seed}", learning_rate=lr, seed=seed, loss=loss)


@pytest.mark.slow
def test_seeds_are_one_group_with_mean_band_and_test(write_run, payload_of, tmp_path):
    write_seeds(write_run)
    shown = payload_of(tmp_path / "out")
    assert shown["varied"] == ["learning_rate", "seed"]
    labels = [row["label"] for row in shown["groups"]]
    assert labels == ["learning_rate=0.001", "learning_rate=0.01", "learning_rate=0.03"]
    worse, best, near = shown["groups"]
    assert best["is_best"]
    assert shown["runs"][shown["best"]]["name"] == "lr=0.01,seed=1"
    assert worse["difference"] == pytest.approx(0.5)
    assert worse["corrected_p"] < 1e-4
    assert worse["permutation_p"] == 0.1
    assert worse["verdict"].startswith("significant")
    assert near["corrected_p"] > 0.5
    assert near["verdict"].startswith("not significant")
    band = best["bands"]["val_loss"]
    assert band["step"] == [0, 5, 10, 15, 20]
    assert band["mean"][-1] == pytest.approx(1.52 + 2 / 21, abs=1e-5)
    assert band["high"][-1] - band["low"][-1] == pytest.approx(0.02, abs=1e-5)


def test_without_scipy_there_are_no_tests_and_a_remark(write_run, payload_of, tmp_path, monkeypatch):
    monkeypatch.setattr(stats, "has_scipy", lambda: False)
    monkeypatch.setitem(sys.modules, "scipy", None)
    write_seeds(write_run)
    shown = payload_of(tmp_path / "out")
    assert [row["mean"] is not None for row in shown["groups"]] == [True] * 3
    assert not any("verdict" in row for row in shown["groups"])
    assert any("pip install scipy" in remark for remark in shown["remarks"])


def test_runs_that_are_not_done_are_no_part_of_a_test(write_run, payload_of, tmp_path):
    for seed, note in ((1, "finished"), (2, "finished"), (3, "")):
        write_run(f"a{seed}", seed=seed, note=note, loss=lambda step, seed=seed: 2.0 - seed)
    assert len(payload_of(tmp_path / "out")["groups"][0]["losses"]) == 2


def test_the_scaling_law_predicts_a_size(write_run, payload_of, tmp_path):
    """Runs whose final loss follows a law of their parameters; the largest size is predicted from the others."""
    sizes = {width: tiny_model(width).count_parameters() for width in (8, 16, 32, 64)}

    def write_size(width: int) -> None:
        write_run(f"w{width}", n_embd=width, loss=lambda step: 20 * sizes[width] ** -0.2 + (20 - step) * 0.01)

    for width in (8, 16, 32):
        write_size(width)
    law = payload_of(tmp_path / "out")["scaling"]["laws"]["parameters"]
    assert law["exponent"] == pytest.approx(0.2, abs=1e-4)
    assert "E = 0" in " ".join(law["sentences"])
    write_size(64)
    shown = payload_of(tmp_path / "out")["scaling"]
    assert shown["sizes"] == 4
    assert shown["laws"].keys() == {"compute", "parameters"}
    assert "less than 0.1 %" in " ".join(shown["laws"]["parameters"]["sentences"])
    write_run("seed", n_embd=64, seed=2, note="", loss=lambda step: 0.1)
    assert len(payload_of(tmp_path / "out")["scaling"]["points"]) == 4, "a run that is not done is no point"


def test_seeds_of_a_size_count_at_one_step(write_run: Callable, payload_of: Callable, tmp_path: Path) -> None:
    """One seed is best at step 10, the other at 20, their mean at 15: both count there, with the same compute."""
    widths = (8, 16, 32, 64)
    seeds = ({0: 9.0, 5: 6.0, 10: 5.0, 15: 5.05, 20: 5.3}, {0: 9.0, 5: 6.0, 10: 5.5, 15: 4.95, 20: 4.9})
    for i, width in enumerate(widths):
        for seed, losses in enumerate(seeds):

            def loss(step: int, losses: dict = losses, i: int = i) -> float:
                return losses[step // 5 * 5] - i

            write_run(f"w{width},{seed}", n_embd=width, seed=seed, loss=loss)
    for by, step in (("best", 15), ("final", 20)):
        scaling = payload_of(tmp_path / "out", by=by)["scaling"]
        assert scaling["sizes"] == 4
        assert [point["step"] for point in scaling["points"]] == [step] * 8
        expected = [losses[step] - i for i in range(4) for losses in seeds]
        assert [point["loss"] for point in scaling["points"]] == pytest.approx(expected)
        for point, width in zip(scaling["points"], [width for width in widths for _ in range(2)], strict=True):
            flops = tiny_model(width).flops_per_token()
            assert point["compute"] == pytest.approx(flops * step * TOKENS_PER_STEP, rel=1e-5)
        assert all(law["floor"] == 0 for law in scaling["laws"].values())
        assert "8 runs of 4 sizes" in scaling["fitted"]


def test_models_of_nearly_the_same_parameters_are_one_size(
    write_run: Callable, payload_of: Callable, tmp_path: Path
) -> None:
    """Three sizes, each with and without a few parameters more: the better one of each counts."""
    for width in (8, 16, 32):
        for extra in (0, 50):
            folder = write_run(f"w{width}+{extra}", n_embd=width, extra=extra, loss=lambda step, e=extra: 3 + e)
            record = json.loads((folder / "train_config.json").read_text())
            record["_counts"]["parameters"] += extra
            (folder / "train_config.json").write_text(json.dumps(record))
    scaling = payload_of(tmp_path / "out")["scaling"]
    assert (scaling["sizes"], len(scaling["points"])) == (3, 3)
    assert {point["loss"] for point in scaling["points"]} == {3}


def test_invisible_characters_become_visible():
    assert page.make_visible("a\n\tb é 漢 😀") == "a\n\tb é 漢 😀"
    assert page.make_visible("\x1b\u202e\u2028\x00\ud800") == "⟨U+001B⟩⟨U+202E⟩⟨U+2028⟩⟨U+0000⟩⟨U+D800⟩"


def test_what_a_model_prints_stays_text(write_run, write_hostile_run, payload_of):
    """Nothing of it ends the data or begins a tag, and only our scripts may run."""
    pytest.importorskip("plotly")
    folder = write_hostile_run()
    write_run("other", dataset="b")
    shown = payload_of(folder.parent)
    html = page.render(shown, HOSTILE)
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", html, re.S)
    assert [attributes for attributes, _ in scripts] == [' type="application/json" id="data"', "", ""]
    (_, data), (_, plotly), (_, page_script) = scripts
    assert json.loads(data) == json.loads(json.dumps(shown))
    assert "<" not in data
    assert data.isascii()
    for code in (plotly, page_script):
        digest = hashlib.sha256(code.encode()).digest()
        assert f"'sha256-{base64.b64encode(digest).decode()}'" in html
    assert "connect-src 'none'" in html
    assert "unsafe-eval" not in html
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", html.replace(plotly, ""))
    outside = html.replace(data, "").replace(plotly, "")
    assert "<title>&lt;/script&gt;" in outside
    assert "\u202e" not in html


def find_browser() -> str | None:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path:
            return path
    return None


BROWSER_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--window-size=1200,9000",
    "--virtual-time-budget=8000",
    "--dump-dom",
]


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_the_page_in_a_browser(write_run, write_hostile_run, payload_of, tmp_path):
    """It draws, logs no error, and nothing that a model printed has run."""
    pytest.importorskip("plotly")
    folder = write_hostile_run()
    for seed in (2, 3):
        write_run(f"seed{seed}", seed=seed)
    path = tmp_path / "report.html"
    path.write_text(page.render(payload_of(folder.parent), "title"), encoding="utf-8")
    browser = [find_browser(), *BROWSER_FLAGS, f"--user-data-dir={tmp_path}/profile"]
    done = subprocess.run([*browser, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    dom = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.S)
    assert "<title>title</title>" in dom
    assert dom.count("main-svg") > 4
    assert "<th" in dom
    assert "<b>$" not in dom
    assert "&lt;/script&gt;&lt;script&gt;" in dom
    assert 'class="unseen">U+202E<' in dom
    assert "onerror=" not in re.sub(r"&lt;.*?&gt;", "", dom)


@pytest.mark.slow
def test_figures_are_drawn_also_of_odd_names(write_run, write_hostile_run, payload_of, tmp_path):
    folder = write_hostile_run()
    for seed in (1, 2):
        write_run(f"seed{seed}", seed=seed)
    for width in (8, 32, 64):
        write_run(f"w{width}", n_embd=width, loss=lambda step, width=width: 3 - width / 100 + (20 - step) / 50)
    figures = tmp_path / "figures"
    figures.mkdir()
    drawn = plots.draw_figures(payload_of(folder.parent), figures)
    assert [path.name for path in drawn] == ["loss.png", "training.png", "datasets.png", "seeds.png", "scaling.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    empty = tmp_path / "out2"
    empty.mkdir()
    (empty / "train_config.json").write_text("{}")
    assert plots.draw_figures(payload_of(Path(empty)), figures) == []
    assert list(figures.iterdir()) == []
