"""report.py, the command: what it writes, its errors, and the page that --watch serves."""

import importlib.machinery
import json
import runpy
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import ROOT, run_script

import configurator
import report
from nanoforge import run_dir
from nanoforge.errors import UserError
from nanoforge.report.read_runs import RunReader
from nanoforge.report.server import PageServer


@pytest.mark.slow
def test_the_command_writes_page_and_figures(write_run: Callable[..., Path], tmp_path: Path):
    pytest.importorskip("plotly")
    write_run("a")
    write_run("b", learning_rate=1e-2)
    out = tmp_path / "out"
    done = run_script(str(out / "a"), str(out / "b"), str(out), f"--out={tmp_path}/report", script="report.py")
    assert "2 runs" in done.stdout
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "loss.png", "training.png"}


def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the command reports them, here in this process."""
    for arguments, message in (
        ([], "pass run folders"),
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path], "no run found"),
        ([tmp_path, "--port=80"], "only with --watch"),
        ([tmp_path, "--wach"], "did you mean --watch"),
        ([tmp_path, "--watch", "--send=wandb"], "--send: "),
    ):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "report.py"), run_name="__main__")
        errors = capsys.readouterr().err
        assert end.value.code == 2 and message in errors and len(errors.splitlines()) == 1, errors


@pytest.mark.slow
def test_help_is_quick() -> None:
    start = time.perf_counter()
    assert "--watch" in run_script("--help", script="report.py").stdout
    assert time.perf_counter() - start < 5


def test_files_of_a_run_are_no_configs(tmp_path: Path):
    """`report.py out/*`, where out holds runs and is one."""
    for name in ("train_config.json", "best.json", "metrics.jsonl"):
        (tmp_path / name).write_text("{}")
    config = tmp_path / "of_the_report"
    config.mkdir()
    (config / "report.json").write_text("{}")
    paths = [str(path) for path in sorted(tmp_path.glob("*.json*"))]
    assert report.split_folders([*paths, str(config / "report.json")]) == (paths, [str(config / "report.json")])


def test_folders_stand_anywhere_on_the_command_line():
    folders, flags = report.split_folders(["--watch", "out/a", "--port", "8000", "out/b"])
    assert folders == ["out/a", "out/b"]
    assert flags == ["--watch", "--port", "8000"]


class FakeTracker(types.ModuleType):
    """A stand-in for wandb and trackio that keeps what it is asked for."""

    def __init__(self, name: str, error: str = "") -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.rows: list[dict[str, Any]] = []
        self.options: dict[str, Any] = {}
        self.error = error
        self.step, self.define_metric, self.finish = 0, lambda *_, **__: None, lambda: None

    def init(self, **options: Any) -> "FakeTracker":
        self.options = options
        return self

    def log(self, numbers: dict[str, Any], step: int) -> None:
        if self.error:
            raise ConnectionError(self.error)
        self.rows.append({"step": step, **numbers})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_finished_run_is_sent_to_a_tracker_once(
    name: str, write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All numbers of metrics.jsonl by event/key, the arguments as config; after a failure it can be sent again."""
    folder = write_run("a", **{f"{name}_project": "mine"})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    args = configurator.parse(report.ReportArgs, [f"--send={name}"], "")
    monkeypatch.setitem(sys.modules, name, FakeTracker(name, error="no network"))
    with pytest.raises(UserError, match=rf"--send={name}: .*no network"):
        report.main(([str(folder)], args))
    tracker = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    report.main(([str(folder)], args))
    for event, key in (("train", "loss"), ("train", "tokens"), ("eval", "val_loss")):
        sent = [(row["step"], row[f"{event}/{key}"]) for row in tracker.rows if f"{event}/{key}" in row]
        assert sent == [(line["step"], line[key]) for line in lines if line["event"] == event] != []
    config = tracker.options["config"]
    assert tracker.options["project"] == "mine" and config["batch_size"] == 8
    assert tracker.options["name"].startswith("a") and not [key for key in config if key.startswith("_")]
    with pytest.raises(UserError, match=rf"--send={name}: .*delete"):
        report.main(([str(folder)], args))


@pytest.mark.slow
def test_trackio_itself_has_what_was_sent(
    write_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    folder = write_run("a")
    report.main(([str(folder)], configurator.parse(report.ReportArgs, ["--send=trackio", "--project=mine"], "")))
    rows = SQLiteStorage.get_logs("mine", (folder / "trackio_run").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if line["event"] == "train"]
    assert sorted((row["step"], row["train/loss"]) for row in rows if "train/loss" in row) == losses


def test_a_running_run_is_not_sent(write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run("a")
    monkeypatch.setitem(sys.modules, "trackio", FakeTracker("trackio"))
    args = configurator.parse(report.ReportArgs, ["--send=trackio"], "")
    with run_dir.RunLock(folder) as lock:
        lock.acquire()
        with pytest.raises(UserError, match="still running"):
            report.main(([str(folder)], args))


def test_who_watches_may_come_before_the_run(
    write_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(report.time, "sleep", lambda seconds: waited.append(seconds) or write_run("a"))
    report.wait_for_runs([str(tmp_path / "out")], 2.0)
    assert waited == [2.0] and "waiting" in capsys.readouterr().out
    report.wait_for_runs([str(tmp_path / "out")], 2.0)
    assert len(waited) == 1


def test_reports_need_no_torch():
    heavy = ["torch", "plotly", "matplotlib", "scipy"]
    code = f"import sys, report; print([name in sys.modules for name in {heavy}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == str([False] * len(heavy)), done.stderr


@pytest.fixture
def served(write_run: Callable[..., Path], tmp_path: Path):
    """A server that follows out/, its reader, and get(path, **headers): (status, headers, body)."""
    pytest.importorskip("plotly")
    write_run("a")
    reader = RunReader([str(tmp_path / "out")], 400)
    server = PageServer(0, reader, by="best", title="live", refresh_seconds=1)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def get(path: str, **headers: str):
        url = f"http://127.0.0.1:{server.server_port}{path}"
        request = urllib.request.Request(url, headers={key.replace("_", "-"): value for key, value in headers.items()})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    yield SimpleNamespace(get=get, reader=reader, address=server.server_address)
    server.shutdown()
    server.server_close()


def test_watching_follows_runs(served: Any, write_run: Callable[..., Path]):
    def shown_states() -> list[str]:
        return [run["state"] for run in json.loads(served.get("/data.json")[2])["runs"]]

    assert served.address[0] == "127.0.0.1"
    status, headers, body = served.get("/data.json")
    assert status == 200
    assert len(json.loads(body)["runs"]) == 1
    assert served.get("/data.json", If_None_Match=headers["ETag"])[0] == 304
    cache = served.reader.cache.copy()
    folder = write_run("b", note="")
    with run_dir.RunLock(folder) as lock:
        lock.acquire()
        assert served.get("/data.json", If_None_Match=headers["ETag"])[0] == 200
        assert shown_states() == ["done", "running"]
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"event": "train", "step": 30, "seconds": 3, "loss": 1.0, "tokens": 1920}\n')
        assert json.loads(served.get("/data.json")[2])["runs"][1]["step"] == 30
    assert shown_states() == ["done", "stopped"]
    assert folder not in cache
    for path, (_, run) in cache.items():
        assert served.reader.cache[path][1] is run, "what has not changed is not read again"


def test_watching_answers_this_machine_alone(served: Any):
    status, _, body = served.get("/")
    assert status == 200
    assert b"connect-src 'self'" in body
    assert b'"live":1' in body
    assert served.get("/", Host="evil.example:80")[0] == 403
    assert served.get("/../report.py")[0] == 404
    assert served.get("/data.json?x")[0] == 404
