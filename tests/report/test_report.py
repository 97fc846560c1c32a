"""report.py, the command: what it writes, its errors, and the page that --watch serves."""

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, run_script

import report
from nanoforge import run_dir
from nanoforge.report.read_runs import RunReader
from nanoforge.report.server import PageServer


@pytest.mark.slow
def test_the_command_writes_page_and_figures(write_run, tmp_path: Path):
    pytest.importorskip("plotly")
    write_run("a")
    write_run("b", learning_rate=1e-2)
    out = tmp_path / "out"
    done = run_script(str(out / "a"), str(out / "b"), str(out), f"--out={tmp_path}/report", script="report.py")
    assert "2 runs" in done.stdout
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "loss.png", "training.png"}


@pytest.mark.slow
def test_errors_are_one_line_and_help_is_quick(tmp_path: Path):
    for arguments, message in (
        ([], "pass run folders"),
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path], "no run found"),
        ([tmp_path, "--port=80"], "only with --watch"),
        ([tmp_path, "--wach"], "did you mean --watch"),
    ):
        done = run_script(*arguments, script="report.py", check=False)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    start = time.perf_counter()
    assert "--watch" in run_script("--help", script="report.py").stdout
    assert time.perf_counter() - start < 5


def test_folders_stand_anywhere_on_the_command_line():
    folders, flags = report.split_folders(["--watch", "out/a", "--port", "8000", "out/b"])
    assert folders == ["out/a", "out/b"]
    assert flags == ["--watch", "--port", "8000"]


def test_reports_need_no_torch():
    heavy = ["torch", "plotly", "matplotlib", "scipy"]
    code = f"import sys, report; print([name in sys.modules for name in {heavy}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == str([False] * len(heavy)), done.stderr


@pytest.fixture
def served(write_run, tmp_path: Path):
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


def test_watching_follows_runs(served, write_run):
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


def test_watching_answers_this_machine_alone(served):
    status, _, body = served.get("/")
    assert status == 200
    assert b"connect-src 'self'" in body
    assert b'"live":1' in body
    assert served.get("/", Host="evil.example:80")[0] == 403
    assert served.get("/../report.py")[0] == 404
    assert served.get("/data.json?x")[0] == 404
