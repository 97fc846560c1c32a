"""The report's page and figures: groups, tests, laws, and hostile texts that stay texts; the page in a browser."""

import base64
import hashlib
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
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
def test_seeds_are_one_group_with_mean_band_and_test(write_run, payload_of, tmp_path: Path):
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


def test_without_scipy_there_are_no_tests_and_a_remark(
    write_run, payload_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stats, "has_scipy", lambda: False)
    monkeypatch.setitem(sys.modules, "scipy", None)
    write_seeds(write_run)
    shown = payload_of(tmp_path / "out")
    assert [row["mean"] is not None for row in shown["groups"]] == [True] * 3
    assert not any("verdict" in row for row in shown["groups"])
    assert any("pip install scipy" in remark for remark in shown["remarks"])


def test_runs_that_are_not_done_are_no_part_of_a_test(write_run, payload_of, tmp_path: Path):
    for seed, note in ((1, "finished"), (2, "finished"), (3, "")):
        write_run(f"a{seed}", seed=seed, note=note, loss=lambda step, seed=seed: 2.0 - seed)
    assert len(payload_of(tmp_path / "out")["groups"][0]["losses"]) == 2


def test_the_scaling_law_predicts_a_size(write_run, payload_of, tmp_path: Path):
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
def test_the_page_in_a_browser(write_run, write_hostile_run, payload_of, tmp_path: Path):
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


MEASURE = """
async function until(condition) {  // a page that is out of sight draws late
  for (let i = 0; i < 40 && !condition(); i++) await new Promise(wait => setTimeout(wait, 100));
}
async function measure(name, width) {
  const frame = document.createElement("iframe");
  Object.assign(frame, {width, height: 500, src: name + ".html"});
  document.body.append(frame);
  await new Promise(loaded => (frame.onload = loaded));
  await new Promise(wait => setTimeout(wait, 300));
  const page = frame.contentDocument,
    all = selector => [...page.querySelectorAll(selector)].filter(node => node.getClientRects().length),
    right = node => node.getBoundingClientRect().right,
    out = {name, width, page_width: page.documentElement.scrollWidth};
  out.verdicts = all("#groups .verdict").map(node => [node.textContent.split(":")[0], right(node) <= width]);
  out.legends = all("[data-legend]").map(node => node.querySelectorAll(".chip").length);
  out.names = all("#table .name").map(node => node.textContent);
  out.tables = [];
  for (const scroll of all(".scroll")) {
    const hint = scroll.previousElementSibling,
      hinted = () => (hint.hidden ? "" : hint.textContent),
      beyond = () => all("#" + scroll.firstElementChild.id + " th").filter(node => right(node) > right(scroll) + 4);
    await until(() => hinted().startsWith(beyond().length || ""));
    const before = [beyond().length, hinted()];
    scroll.scrollLeft = 1e6;
    await until(() => hinted() !== before[1] || !before[0]);
    out.tables.push([...before, beyond().length, hinted()]);
  }
  return out;
}
"""


def measure_in_browser(folder: Path, names: list[str], widths: tuple[int, ...]) -> list[dict]:
    """What a phone and a desk show of the pages in a folder: each page in a frame of each width."""
    wanted = json.dumps([[name, width] for name in names for width in widths])
    script = f"{MEASURE} (async () => {{ const all = []; for (const [name, width] of {wanted}) "
    script += "all.push(await measure(name, width)); document.body.textContent = JSON.stringify(all); })();"
    (folder / "all.html").write_text(f"<!doctype html><body><script>{script}</script></body>")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = [flag for flag in BROWSER_FLAGS if not flag.startswith("--virtual-time-budget")]
        flags += ["--virtual-time-budget=60000", "--hide-scrollbars", f"--user-data-dir={folder}/profile"]
        browser = [find_browser(), *flags]
        address = f"http://127.0.0.1:{server.server_port}/all.html"
        done = subprocess.run([*browser, address], capture_output=True, text=True, timeout=120)
        server.shutdown()
    return json.loads(html.unescape(re.search(r"<body>(.*)</body>", done.stdout, re.S)[1]))


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_pages_fit_a_phone_and_a_desk(
    write_run: Callable, payload_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long names, many columns, 16 curves: nothing widens the page, verdicts are in sight, hints count columns."""
    offline = pytest.importorskip("plotly.offline")
    monkeypatch.setattr(
        offline, "get_plotlyjs", lambda: "const Plotly = {react() {}, restyle() {}};"
    )  # a fast stand-in
    start = "an_experiment_whose_name_somebody_typed_with_all_of_its_arguments_in_it_"
    varied = [f"argument_{i}" for i in range(9)]
    for lr, level in ((1e-3, 2.0), (1e-2, 1.5), (3e-2, 1.501)):
        for seed in (1, 2, 3):
            loss = lambda step, level=level, seed=seed: level + 0.01 * seed + 2 / (1 + step)  # noqa: E731
            args = dict.fromkeys(varied, lr)
            write_run(f"long/{start}lr={lr},seed={seed}", learning_rate=lr, seed=seed, loss=loss, **args)
    for i in range(16):
        write_run(f"many/run{i}", learning_rate=i, loss=lambda step, i=i: 1 + i / 100 + 1 / (1 + step))
    pages = tmp_path / "pages"
    pages.mkdir()
    for name in ("long", "many"):
        shown = payload_of(tmp_path / "out" / name)
        (pages / f"{name}.html").write_text(page.render(shown, name), encoding="utf-8")

    measured = measure_in_browser(pages, ["long", "many"], widths=(390, 1440))
    assert [(m["name"], m["width"], m["page_width"]) for m in measured] == [
        (name, width, width) for name in ("long", "many") for width in (390, 1440)
    ]
    for m in measured:
        assert all(count == {"long": 3, "many": 16}[m["name"]] for count in m["legends"]) and m["legends"]
        for n_beyond, hint, n_beyond_at_end, hint_at_end in m["tables"]:
            assert re.findall(r"\d+", hint) == ([str(n_beyond)] if n_beyond else [])
            assert n_beyond or m["width"] == 1440
            assert n_beyond_at_end == 0 and bool(hint_at_end) == bool(n_beyond), "a way back"
    for m in measured[:2]:
        significant = ["lowest mean", "not significant", "significant"]
        assert sorted(m["verdicts"]) == [[text, True] for text in significant]
        assert all(start not in name and "lr=" in name and "seed=" in name for name in m["names"])


@pytest.mark.slow
@pytest.mark.parametrize("n_runs, labels", [(16, 16), (27, 24 + 1)])
def test_figures_of_many_runs_have_a_legend(
    write_run: Callable, payload_of: Callable, tmp_path: Path, n_runs: int, labels: int
) -> None:
    """The best runs first; of more than 24 the last entry counts the others."""
    for i in range(n_runs):
        write_run(f"run{i:02d}", learning_rate=1 + i, loss=lambda step, i=i: 1 + i / 100 + 1 / (1 + step))
    shown = payload_of(tmp_path / "out")
    for draw in (plots.draw_loss, plots.draw_training):
        (legend,) = draw(shown, plots.make_colors(shown)).legends
        texts = [text.get_text() for text in legend.get_texts()]
        assert texts[:16] == [f"run{i:02d}" for i in range(16)] and len(texts) == labels
        assert n_runs == 16 or "3 more" in texts[-1]


@pytest.mark.slow
def test_figures_are_drawn_also_of_odd_names(write_run, write_hostile_run, payload_of, tmp_path: Path):
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
