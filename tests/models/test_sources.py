"""Where weights come from: folders of any layout, and the hub by its real client, from a local server and the cache."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import COMMIT, ROOT, cache_model, offline_cache, run_script
from safetensors.torch import load_file, save_file

from nanoforge.data import hub
from nanoforge.errors import UserError
from nanoforge.models import pretrained

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 in one file of safetensors, with what else a model on the hub has."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_positions=24, n_embd=48, n_layer=3, n_head=4)
    folder = tmp_path_factory.mktemp("small")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "small-q8_0.gguf"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not to be read")
    return folder


def copy_config(source: Path, to: Path) -> None:
    to.mkdir(exist_ok=True)
    (to / "config.json").write_text((source / "config.json").read_text())


def write_layout(folder: Path, to: Path, layout: str) -> Path:
    """The same weights in another layout; what is to be loaded."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[i::3]} for i in range(3)]
    copy_config(folder, to)
    suffix, write = (".bin", torch.save) if "bin" in layout else (".safetensors", save_file)
    if "old" in layout:  # before PyTorch 1.6
        write = partial(torch.save, _use_new_zipfile_serialization=False)
    stem = "pytorch_model" if "bin" in layout else "model"
    if "sharded" not in layout:
        write(tensors, to / f"{stem}{suffix}")
        return to / f"{stem}{suffix}" if "file" in layout else to
    weight_map = {}
    for i, part in enumerate(parts):
        name = f"{stem}-{i + 1:05}-of-00003{suffix}"
        write(part, to / name)
        weight_map |= dict.fromkeys(part, name)
    (to / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return to


@pytest.mark.parametrize("layout", ["file", "sharded", "bin", "bin file", "sharded bin", "old bin"])
def test_all_layouts_of_a_folder_hold_the_same_weights(folder: Path, tmp_path: Path, layout: str):
    expected = pretrained.load(str(folder))
    loaded = pretrained.load(str(write_layout(folder, tmp_path / "copy", layout)))
    assert loaded.shape == expected.shape and loaded.weights.keys() == expected.weights.keys()
    assert all(torch.equal(loaded.weights[name], expected.weights[name]) for name in expected.weights)


def test_a_missing_shard_and_a_broken_file_are_named(folder: Path, tmp_path: Path):
    sharded = write_layout(folder, tmp_path / "sharded", "sharded")
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors"):
        pretrained.load(str(sharded))
    copy_config(folder, tmp_path / "broken")
    with pytest.raises(UserError, match=r"broken: has no model\.safetensors or pytorch_model\.bin"):
        pretrained.load(str(tmp_path / "broken"))
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / "broken" / name).write_bytes(b"<html>")
        with pytest.raises(UserError, match=name):
            pretrained.load(str(tmp_path / "broken" / name))
    with pytest.raises(UserError, match=r"config\.json: no file of weights"):
        pretrained.load(str(folder / "config.json"))


# ---------------------------------------------------------------------------------------------------------------------
# the hub


class Hub(http.server.ThreadingHTTPServer):
    """A local server with the parts of the hub's API that its client uses: org/small, of a folder, and org/gated."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        self.downloaded: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, place: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body)."""
        if "org/gated" in place:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if place == f"/api/models/org/small/tree/{COMMIT}":
            sizes = {name: path.stat().st_size for name, path in self.paths.items()}
            tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
            return 200, {}, json.dumps(tree).encode()
        if place.startswith("/api/models/org/small"):
            return 200, {}, json.dumps({"id": "org/small", "sha": COMMIT, "siblings": []}).encode()
        name = place.removeprefix(f"/org/small/resolve/{COMMIT}/")
        if name in self.paths:
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            return 200, headers, self.paths[name].read_bytes()
        return 404, {"X-Error-Code": "RepoNotFound"}, b""


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        place = self.path.partition("?")[0]
        status, headers, body = self.server.answer(place)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            if "/resolve/" in place:
                self.server.downloaded.append(place.rpartition(f"{COMMIT}/")[2])

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def environment(folder: Path, tmp_path: Path) -> Iterator[tuple[dict[str, str], Hub]]:
    """The environment of a process whose hub is the local server, and the server."""
    with Hub(folder) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        yield {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}, server
        server.shutdown()


LOAD = """
import sys
from nanoforge.models import pretrained
loaded = pretrained.load(sys.argv[1])
total = sum(float(loaded.weights[name].double().sum()) for name in loaded.weights)
print(loaded.source, loaded.shape["n_layer"], total, "transformers" in sys.modules)
"""
FETCH = """
import sys
from nanoforge.data import hub
from nanoforge.errors import UserError
try:
    print(hub.fetch(sys.argv[1], ["*.json", "model.safetensors"]).name, "torch" in sys.modules)
except UserError as error:
    print(error)
"""


def run_code(code: str, name: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", code, name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_a_model_comes_from_the_hub_and_then_from_the_cache(
    environment: tuple[dict[str, str], Hub], folder: Path
) -> None:
    """By the real client: no file that is not read is downloaded. The source names the commit, which needs no network
    any more."""
    variables, server = environment
    expected = pretrained.load(str(folder))
    total = sum(float(expected.weights[name].double().sum()) for name in expected.weights)
    assert run_code(LOAD, "org/small", variables) == f"org/small@{COMMIT} 3 {total} False"
    assert sorted(server.downloaded) == ["config.json", "generation_config.json", "model.safetensors"]
    assert run_code(FETCH, f"org/small@{COMMIT}", variables | {"HF_HUB_OFFLINE": "1"}) == f"{COMMIT} False"
    assert run_code(FETCH, "org/small", variables | {"HF_ENDPOINT": "http://127.0.0.1:9"}) == f"{COMMIT} False"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/gated", "hf auth login"),
        ("org/absent", "no such model, or it is private"),
        ("org/elsewhere@main", "HF_HOME"),
    ],
)
def test_what_the_hub_refuses_is_one_line(environment: tuple[dict[str, str], Hub], name: str, expected: str):
    variables, _ = environment
    if "elsewhere" in name:
        variables = variables | {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there
    error = run_code(FETCH, name, variables)
    assert error.startswith(f"{name}: ") and expected in error and len(error.splitlines()) == 1


def test_offline_the_cache_alone_is_read(folder: Path, tmp_path: Path):
    """Also a model whose only weights are PyTorch's; what is not there is one line."""
    with offline_cache(tmp_path / "cache") as cache:
        cache_model(cache, "org/small", folder)
        cache_model(cache, "org/torch", write_layout(folder, tmp_path / "torch", "sharded bin"), commit="f" * 40)
        expected, torch_files = (pretrained.load(name) for name in ("org/small", "org/torch@main"))
        assert (expected.source, torch_files.source) == (f"org/small@{COMMIT}", f"org/torch@{'f' * 40}")
        for name in expected.weights:
            assert torch.equal(expected.weights[name], torch_files.weights[name])
        for name in ("org/absent", "org/small@v2", "gpt2"):
            with pytest.raises(UserError, match=f"--init_from=.*{name}: .*HF_HOME"):
                pretrained.load(name)
        (cache / "models--org--torch/snapshots" / ("f" * 40) / "pytorch_model.bin.index.json").unlink()
        with pytest.raises(UserError, match=r"--init_from=org/torch: has no model\.safetensors or pytorch_model\.bin"):
            pretrained.load("org/torch")


def test_a_mistyped_source_is_refused_before_torch_is_imported(tmp_path: Path):
    (tmp_path / "out/chat").mkdir(parents=True)
    done = run_script(f"--init_from={tmp_path}/out/chatt", script="sample.py", check=False)
    assert done.returncode == 2 and f"did you mean {tmp_path}/out/chat?" in done.stderr
    assert not hub.source_error("Qwen/Qwen3-0.6B") and hub.source_error("Qwen")
