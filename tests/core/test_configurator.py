"""The command line and config files: precedence, every kind of value, and all mistakes told at once with status 2."""

import ast
import json

import pytest
from helpers import ROOT

import configurator
import train_args
from nanoforge.errors import UserError


def parse(*argv):
    return train_args.parse(list(argv))


def mistakes(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_the_guides():
    a = parse()
    expected = {
        "dataset": "shakespeare_char", "out_dir": "out", "batch_size": 64, "max_iters": 3500, "learning_rate": 1e-3, "eval_interval": 250, "eval_iters": 200,
        "log_interval": 10, "seed": 1337, "optimizer": "adamw", "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "grad_clip": 1.0, "lr_scheduler": "none",
        "decay_lr": False, "warmup_iters": 100, "lr_decay_iters": 3500, "min_lr": 1e-4, "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256,
        "dropout": 0.0, "bias": False,
    }  # fmt: skip
    assert {name: getattr(a, name) for name in expected} == expected


def test_commands_of_the_guide_are_understood():
    a = parse("--training_mode=multidataset", "--dataset_list", "a", "b", "--dataset_sampling_probs", "0.5", "0.5")
    assert a.dataset_list == ("a", "b") and a.dataset_sampling_probs == (0.5, 0.5)
    assert parse("--training_mode", "multicontext", "--multicontext_datasets", "a", "b").mixture == [("a", "b")]
    assert parse("--init_from=gpt2", "--gpt2_type=gpt2-medium").weights_source == "gpt2-medium"
    assert parse(
        "--training_mode=multidataset", "--dataset_list=a,b", "--dataset_sampling_probs=1 2"
    ).dataset_sampling_probs == (1.0, 2.0)


def test_booleans_in_every_spelling():
    for yes in (
        ["--compile"],
        ["--compile=True"],
        ["--compile", "true"],
        ["--compile=1"],
        ["--no-compile", "--compile"],
    ):
        assert parse(*yes).compile is True
    for no in ([], ["--no-compile"], ["--compile=false"], ["--compile", "False"], ["--compile", "--no-compile"]):
        assert parse(*no).compile is False


def test_numbers_in_every_spelling(tmp_path):
    assert parse("--learning_rate=3e-4").learning_rate == 3e-4 and parse("--max_iters=1e3").max_iters == 1000
    (tmp_path / "c.yaml").write_text("learning_rate: 3e-4\nmax_tokens: 1e9\n")
    a = parse(str(tmp_path / "c.yaml"))
    assert a.learning_rate == 3e-4 and a.max_tokens == 10**9 and type(a.max_tokens) is int


def test_precedence_is_default_files_left_to_right_command_line(tmp_path):
    (tmp_path / "a.py").write_text("n_layer = 3\nn_embd = 48\nbatch_size = 2\n")
    (tmp_path / "b.json").write_text('{"n_embd": 96, "batch_size": 3, "_remark": 1}')
    for argv in (["a", "b", "--batch_size=5"], ["--batch_size=5", "a", "b"], ["a", "--batch_size=5", "b"]):
        a = parse(*(str(tmp_path / {"a": "a.py", "b": "b.json"}[w]) if w in "ab" else w for w in argv))
        assert (a.n_layer, a.n_embd, a.batch_size, a.n_head) == (3, 96, 5, 6)
    a = parse("--compile", str(tmp_path / "a.py"))
    assert a.compile is True and a.n_layer == 3, "a bare flag does not swallow a file"
    a = parse("--training_mode=multidataset", "--dataset_list", "x", "y", str(tmp_path / "a.py"))
    assert a.dataset_list == ("x", "y") and a.n_layer == 3, "nor does a list"


def test_print_config_tells_where_values_come_from(tmp_path, capsys):
    (tmp_path / "a.py").write_text("n_layer = 3\n")
    with pytest.raises(SystemExit) as end:
        parse(str(tmp_path / "a.py"), "--seed=5", "--print_config")
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert (
        end.value.code == 0
        and rows["n_layer"] == ["3", str(tmp_path / "a.py")]
        and rows["seed"] == ["5", "command", "line"]
        and rows["n_head"] == ["6", "default"]
    )
    assert len(rows) == len(configurator.arg_specs(train_args.TrainArgs))


def test_nanogpts_own_config_files_load(tmp_path, capsys):
    """The kinds of lines that its config folder has: comments, arithmetic, a time in a name, another init_from."""
    (tmp_path / "train_shakespeare_char.py").write_text(
        "# a miniature model\nout_dir = 'out-shakespeare-char'\neval_interval = 250 # often\nalways_save_checkpoint = False\nwandb_log = False\nwandb_project = 'shakespeare-char'\n"
        "wandb_run_name = 'mini-gpt'\ndataset = 'shakespeare_char'\ngradient_accumulation_steps = 1\nbatch_size = 64\nblock_size = 256\nn_layer = 6\nn_head = 6\nn_embd = 384\ndropout = 0.2\n"
        "learning_rate = 1e-3\nmax_iters = 5000\nlr_decay_iters = 5000\nmin_lr = 1e-4\nbeta2 = 0.99\nwarmup_iters = 100\n# device = 'cpu'\n"
    )
    (tmp_path / "train_gpt2.py").write_text(
        "wandb_log = True\nbatch_size = 12\nblock_size = 1024\ngradient_accumulation_steps = 5 * 8\nmax_iters = 600000\nlr_decay_iters = 600000\neval_interval = 1000\neval_iters = 200\nweight_decay = 1e-1\n"
    )
    (tmp_path / "finetune_shakespeare.py").write_text(
        "import time\n\nout_dir = 'out-shakespeare'\neval_interval = 5\nwandb_run_name = 'ft-' + str(time.time())\ndataset = 'shakespeare'\ninit_from = 'gpt2-xl'\nbatch_size = 1\n"
        "gradient_accumulation_steps = 32\nmax_iters = 20\nlearning_rate = 3e-5\ndecay_lr = False\n"
    )
    a = parse(str(tmp_path / "train_shakespeare_char.py"))
    assert a.dropout == 0.2 and a.always_save_checkpoint is False
    assert "lr_decay_iters is not used here" in capsys.readouterr().err
    assert parse(str(tmp_path / "train_gpt2.py")).gradient_accumulation_steps == 40
    assert parse(str(tmp_path / "finetune_shakespeare.py"), "--wandb_log").wandb_run_name.startswith("ft-1")


@pytest.mark.parametrize("line", [
    "__import__('os').system('touch {}')", "x = open('{}', 'w')", "import os", "n_layer = [].append(open('{}', 'w'))", "n_layer = (lambda: open('{}', 'w'))()",
    "exec('1')", "if True:\n    n_layer = 3", "n_layer = 9**9**9", "n_layer = 10**10**10", "n_layer = 'a' * 10**9", "n_layer = 1 / 0", "n_layer = undefined", "n_layer = f'{{1}}'",
    "del n_layer", "n_layer += 1", "time.sleep(9)", "n_layer = (1, 2, 3", "n_layer, n_head = 3",
    "n_layer = [0] * 10**11", "n_layer = 3j", "n_layer = b'3'",
])  # fmt: skip
def test_configs_are_never_executed(tmp_path, capsys, line):
    path, target = tmp_path / "c.py", tmp_path / "executed"
    path.write_text(line.replace("{}", str(target)))
    assert str(path) in mistakes(capsys, str(path)) and not target.exists()


def test_all_mistakes_are_told_at_once(capsys, tmp_path):
    (tmp_path / "c.py").write_text("n_lyer = 3\nbatch_size = 'many'\n")
    told = mistakes(
        capsys,
        str(tmp_path / "c.py"),
        "--learning_rat=1",
        "--n_head=0",
        "--dropout=2",
        "--lr_scheduler=cosin",
        "--compile=maybe",
        "--seed",
        "--max_iters=2.5",
        "nowhere.json",
    )
    for part in ("10 errors", "--learning_rat: no such argument; did you mean --learning_rate?", "n_lyer: no such argument; did you mean n_layer?", "batch_size=many: must be a whole number",
                 "--n_head=0: must be at least 1", "--dropout=2: must be at most 0.999", "did you mean cosine?", "--compile=maybe: must be true or false", "--seed: needs a value",
                 "--max_iters=2.5: must be a whole number", "nowhere.json: can't be read"):  # fmt: skip
        assert part in told, f"{part!r} is not in {told!r}"


@pytest.mark.parametrize("flags, told", [
    (["--dataset_list", "a", "b"], "--dataset_list: has an effect only with --training_mode=multidataset"),
    (["--training_mode=multidataset"], "--dataset_list: required by --training_mode=multidataset"),
    (["--training_mode=multidataset", "--dataset_list", "a", "b", "--dataset_sampling_probs", "1"], "1 weights for 2 datasets"),
    (["--training_mode=multidataset", "--dataset_list", "a", "b", "--dataset_sampling_probs", "1", "-1"], "must not be negative"),
    (["--training_mode=multidataset", "--dataset_list", "a", "b", "--dataset_sampling_probs", "0", "0"], "not all zero"),
    (["--training_mode=multidataset", "--dataset_list", "a", "b", "--dataset_sampling_probs", "0.5", "1", "--dataset_interleaving"], "whole numbers"),
    (["--training_mode=multidataset", "--dataset_list", "a", "a"], "--dataset_list: contains a dataset twice"),
    (["--training_mode=multicontext", "--dataset=a"], "--dataset: has an effect only with --training_mode=single"),
    (["--training_mode=multicontext"], "--multicontext_datasets: required by --training_mode=multicontext"),
    (["--min_lr=1e-5"], "--min_lr: has an effect only with a schedule that decays"),
    (["--decay_lr", "--min_lr=1"], "--min_lr=1: must not be above --learning_rate"),
    (["--optimizer=sgd", "--beta1=0.8"], "--beta1: has an effect only with --optimizer=adamw"),
    (["--momentum=0.5"], "--momentum: has an effect only with"),
    (["--optimizer=adam_w"], "did you mean adamw"),
    (["--optimizer_kwargs={eps}"], "not JSON"),
    (["--n_head=5"], "--n_embd=384: must be divisible by --n_head=5"),
    (["--n_kv_head=4"], "--n_kv_head=4: must divide --n_head=6"),
    (["--position=rope", "--n_embd=18"], "--position=rope: head_dim"),
    (["--window=LX"], "letters L and S"),
    (["--window_size=8"], "only with an S in --window"),
    (["--init_from=/nowhere"], "no such file or folder"),
    (["--init_from=gpt2", "--n_layer=3"], "--n_layer: has an effect only with --init_from=scratch"),
    (["--init_from=resume", "--out_dir=/nowhere"], "no run in /nowhere"),
    (["--lr_scheduler=linear", "--no-decay_lr"], "--no-decay_lr: conflicts with --lr_scheduler=linear"),
    (["--lr_scheduler=cosine", "--warmup_iters=4000"], "--warmup_iters=4000: must not be above --lr_decay_iters=3500"),
    (["--device=gpu"], "must be auto, cpu"),
    (["--wandb_project=x"], "only with --wandb_log"),
    (["--learning_rate=nan"], "must be a number"),
    (["--batch_size=-3"], "must be at least 1"),
    (["--rope_base=10"], "only with --position=rope"),
    (["--no-compile=true"], "ignored explicit argument"),
])  # fmt: skip
def test_arguments_that_dont_fit_are_told_by_flag(capsys, flags, told):
    assert told in mistakes(capsys, *flags)


def test_resume_takes_the_runs_own_arguments(tmp_path, capsys):
    (tmp_path / "train_config.json").write_text(
        json.dumps(
            {
                "n_layer": 3,
                "learning_rate": 0.5,
                "out_dir": "elsewhere",
                "overwrite": True,
                "init_from": "gpt2",
                "_about": {},
            }
        )
    )
    a = parse("--init_from=resume", f"--out_dir={tmp_path}", "--learning_rate=0.25")
    assert (a.n_layer, a.learning_rate, a.out_dir, a.overwrite, a.init_from) == (
        3,
        0.25,
        str(tmp_path),
        False,
        "resume",
    )
    assert parse("--init_from=resume", f"--out_dir={tmp_path}", "--n_layer=3").n_layer == 3
    assert "--overwrite: " in mistakes(capsys, "--init_from=resume", f"--out_dir={tmp_path}", "--overwrite")


def test_every_shipped_config_is_valid(capsys):
    for path in sorted((ROOT / "configs").glob("*.py")):
        words = ast.get_docstring(ast.parse(path.read_text()))
        assert words, f"{path} has no docstring"
        parse(str(path), *(["--init_from=gpt2"] if "--init_from=" in words else []))  # where its command names weights
        assert "is not used here" not in capsys.readouterr().err, f"{path} sets something that has no effect"


def test_arguments_are_frozen():
    with pytest.raises(AttributeError):
        parse().n_layer = 3


def test_mistakes_of_the_data_are_told_like_the_others(capsys):
    def main(arguments):
        raise UserError("the file is odd")

    with pytest.raises(SystemExit) as end:
        configurator.run(main, None)
    assert end.value.code == 2 and capsys.readouterr().err.endswith(": the file is odd\n")
