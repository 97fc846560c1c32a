"""Config files: what a .py, .json or .yaml config means, and configs that stand on others."""

import json
from pathlib import Path
from typing import Any

import pytest

import train_args
from nanoforge import config_files
from nanoforge.errors import UserError
from nanoforge.run_dir import RunRecord
from nanoforge.sweeps import grid_file


def test_names_and_arithmetic_in_configs():
    text = (
        "'''doc'''\nmax_iters = 5 * 100\nlr_decay_iters = max_iters\nn_layer: int = 2**3\n"
        "a, b = -1, 'x' + 'y'\nc = [1, 2.5]\nd = {'eps': 1e-8}\ne = not_assigned = 3"
    )
    with pytest.raises(UserError, match=r"c\.py:8"):
        config_files.read_python(text, "c.py")
    assert config_files.read_python(text.rpartition("\n")[0], "c.py") == {
        "max_iters": 500,
        "lr_decay_iters": 500,
        "n_layer": 8,
        "a": -1,
        "b": "xy",
        "c": [1, 2.5],
        "d": {"eps": 1e-8},
    }


# ---------------------------------------------------------------------------------------------------------------------
# YAML and JSON

SCALARS = {  # text -> its value by YAML 1.2
    "1e-5": 1e-5,
    "2:00:00": "2:00:00",
    "010": 10,
    "yes": "yes",
    "no": "no",
    "2024-01-01": "2024-01-01",
    "None": None,
    "~": None,
    "1_000": 1000,
    "true": True,
    "-1.5E+3": -1500.0,
    ".5": 0.5,
    "'None'": "None",
    "'010'": "010",
    "0x10": "0x10",
}


@pytest.mark.parametrize("text", SCALARS)
def test_yaml_scalars_are_those_of_yaml_1_2(text: str):
    value = config_files.read_yaml(f"a: {text}", "x")["a"]
    assert value == SCALARS[text] and type(value) is type(SCALARS[text])
    verbatim = config_files.read_yaml(f"a: {text}", "x", verbatim=True)["a"]
    assert verbatim == (None if SCALARS[text] is None else text.strip("'"))


def test_pyyaml_reads_the_same_scalars_by_yaml_1_1():
    """The witness that the loader is needed."""
    import yaml

    values = yaml.safe_load("a: 1e-5\nb: 2:00:00\nc: 010\nd: yes\n")
    assert values == {"a": "1e-5", "b": 7200, "c": 8, "d": True}


def test_configs_and_grids_read_yaml_alike(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 010\nlearning_rate: 1e-3\nwandb_run_name: 2:00:00\ncompile: no\ntask_name: no\n_remark: 1\n")
    expected = {"seed": 10, "learning_rate": 1e-3, "wandb_run_name": "2:00:00", "compile": "no", "task_name": "no"}
    assert config_files.read_file(str(path)) == grid_file.read_file(str(path))[0] == expected
    args = train_args.parse([str(path)])
    assert args.seed == 10 and args.compile == "false" and args.task_name == "no"


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        ("c.yaml", "n_layer: 1\nn_head: 2\nn_layer: 3\n", "n_layer"),
        ("c.yaml", "optimizer_kwargs:\n  eps: 1\n  eps: 2\n", "eps"),
        ("c.json", '{"n_layer": 1, "n_head": 2, "n_layer": 3}', "n_layer"),
        ("c.json", '{"optimizer_kwargs": {"eps": 1, "eps": 2}}', "eps"),
        ("c.py", 'optimizer_kwargs = {"eps": 1, "eps": 2}', "eps"),
    ],
)
def test_duplicate_keys_are_refused(tmp_path: Path, name: str, text: str, key: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}:.*duplicate key: {key}"):
        config_files.read_file(str(tmp_path / name))


@pytest.mark.parametrize("text", ['{"eps": 1e-10}', "{eps: 1e-10}", '{"eps":1E-10}', "{eps: 1.0e-10}"])
def test_a_mapping_on_the_command_line_is_read_as_in_a_config(tmp_path: Path, text: str):
    (tmp_path / "c.yaml").write_text(f"optimizer_kwargs: {text}\n")
    typed = train_args.parse([f"--optimizer_kwargs={text}"]).optimizer_kwargs
    assert typed == train_args.parse([str(tmp_path / "c.yaml")]).optimizer_kwargs == {"eps": 1e-10}


@pytest.mark.parametrize("text", ['{"eps": 1, "eps": 2}', "{eps: 1, eps: 2}", "[1]", "eps", "{eps", "{eps}"])
def test_a_mapping_on_the_command_line_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        train_args.parse([f"--optimizer_kwargs={text}"])
    assert end.value.code == 2 and "--optimizer_kwargs=" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_two_names_of_one_argument_are_refused_as_a_duplicate_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    text = '{"steps": 5, "max_iters": 6}' if name == "c.json" else "steps: 5\nmax_iters: 6\n"
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as end:
        train_args.parse([str(tmp_path / name)])
    assert end.value.code == 2 and "steps and max_iters" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, text", [("c.py", "n = 3"), ("c.json", '{"n": 3}'), ("c.yaml", "n: 3"), ("c.yml", "n: 3")]
)
def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path: Path, name: str, text: str):
    path = tmp_path / name
    path.write_bytes(f"\ufeff{text}\r\n".encode())
    assert config_files.read_file(str(path)) == {"n": 3}
    if name.endswith(config_files.SUFFIXES[2:]):
        assert grid_file.read_file(str(path)) == ({"n": 3}, {"n": "3"})
    (tmp_path / "train_config.json").write_bytes(b'\xef\xbb\xbf{"n": 3}')
    assert RunRecord.load(tmp_path).args == {"n": 3}
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match=r"not UTF-8 \(.* at byte 0\)"):
        config_files.read_file(str(path))


def test_merge_keys_are_no_duplicates():
    text = "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\n"
    assert config_files.read_yaml(text, "x")["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("name", "text"),
    [("c.yaml", "a: ["), ("c.yaml", "!!python/name:os.system ''"), ("c.json", "{"), ("c.json", "[1]"), ("c.yaml", "1")],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        config_files.read_file(str(tmp_path / name))


# ---------------------------------------------------------------------------------------------------------------------
# base


def write(folder: Path, **files: str) -> None:
    """Write each file; `a_py` is a.py."""
    for name, text in files.items():
        path = folder / name.replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_config_lies_over_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(
        tmp_path,
        a_py="n_layer = 1\nn_head = 1\nn_embd = 8\n",
        b_py="base = 'a.py'\nn_layer = 2\nn_head = 2\n",
        c_yaml="base: b.py\nn_layer: 3\n",
    )
    args = train_args.parse([str(tmp_path / "c.yaml")])
    assert (args.n_layer, args.n_head, args.n_embd) == (3, 2, 8)
    with pytest.raises(SystemExit) as end:
        train_args.parse([str(tmp_path / "c.yaml"), "--print_config"])
    sources = {line.split()[0]: line.split()[2] for line in capsys.readouterr().out.splitlines() if "tmp" in line}
    assert end.value.code == 0
    files = {"n_layer": "c.yaml", "n_head": "b.py", "n_embd": "a.py"}
    assert sources == {name: str(tmp_path / file) for name, file in files.items()}


def test_a_base_is_relative_to_the_config_or_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    write(tmp_path / "configs", a_py="n_layer = 1", b_py="base = 'a.py'", c_py="base = 'configs/a.py'")
    for name in ("b.py", "c.py"):
        assert train_args.parse([f"configs/{name}"]).n_layer == 1
    write(tmp_path / "configs", d_json=json.dumps({"base": ["a.py", "e.py"]}), e_py="n_layer = 2")
    assert train_args.parse(["configs/d.json"]).n_layer == 2


@pytest.mark.parametrize("base", ["'a.py'", "'b.py'", "'nowhere.py'", "3", "['b.py']", "[3]", "'x' + 'y'"])
def test_a_base_that_cant_be_read_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], base: Any):
    write(tmp_path, a_py=f"base = {base}", b_py="base = 'a.py'")
    with pytest.raises(SystemExit) as end:
        train_args.parse([str(tmp_path / "a.py")])
    assert end.value.code == 2 and "base" in capsys.readouterr().err
