"""The command line: precedence, every kind of value, aliases, and all errors reported at once with status 2."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
from helpers import ROOT

import configurator
import evaluate
import export
import report
import sample
import sweep
import train_args
from nanoforge import other_names
from nanoforge.errors import UserError
from nanoforge.posttraining.objective_specs import OBJECTIVES
from nanoforge.sweeps import hf_keys
from nanoforge.training import schedules

SPECS = configurator.arg_specs(train_args.TrainArgs)


def parse(*argv: str) -> train_args.TrainArgs:
    return train_args.parse(list(argv))


def errors_of(capsys, *argv: str) -> str:
    """What a command line with errors prints."""
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_the_guides():
    args = parse()
    expected = {
        "dataset": "shakespeare_char", "out_dir": "out", "seed": 1337,
        "batch_size": 64, "block_size": 256, "max_iters": 3500,
        "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.0, "bias": False,
        "optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "grad_clip": 1.0,
        "lr_scheduler": "none", "decay_lr": False, "warmup_iters": 100, "lr_decay_iters": 3500, "min_lr": 1e-4,
        "eval_interval": 250, "eval_iters": 200, "log_interval": 10,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_commands_of_the_guide_are_understood():
    args = parse("--training_mode=multidataset", "--dataset_list", "a", "b", "--dataset_sampling_probs", "0.5", "0.5")
    assert args.dataset_list == ("a", "b") and args.dataset_sampling_probs == (0.5, 0.5)
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
        assert parse(*yes).compile == "true" and parse(*(text.replace("compile", "bias") for text in yes)).bias is True
    for no in (["--no-compile"], ["--compile=false"], ["--compile", "False"], ["--compile", "--no-compile"]):
        assert parse(*no).compile == "false" and parse(*(text.replace("compile", "bias") for text in no)).bias is False
    for auto in ([], ["--compile=auto"], ["--compile", "auto"]):
        assert parse(*auto).compile == "auto"


def test_numbers_in_every_spelling(tmp_path: Path):
    assert parse("--learning_rate=3e-4").learning_rate == 3e-4 and parse("--max_iters=1e3").max_iters == 1000
    (tmp_path / "c.yaml").write_text("learning_rate: 3e-4\nmax_tokens: 1e9\n")
    args = parse(str(tmp_path / "c.yaml"))
    assert args.learning_rate == 3e-4 and args.max_tokens == 10**9 and type(args.max_tokens) is int


def test_precedence_is_default_files_left_to_right_command_line(tmp_path: Path):
    (tmp_path / "a.py").write_text("n_layer = 3\nn_embd = 48\nbatch_size = 2\n")
    (tmp_path / "b.json").write_text('{"n_embd": 96, "batch_size": 3, "_remark": 1}')
    for argv in (["a", "b", "--batch_size=5"], ["--batch_size=5", "a", "b"], ["a", "--batch_size=5", "b"]):
        args = parse(*(str(tmp_path / {"a": "a.py", "b": "b.json"}[w]) if w in "ab" else w for w in argv))
        assert (args.n_layer, args.n_embd, args.batch_size, args.n_head) == (3, 96, 5, 6)
    args = parse("--compile", str(tmp_path / "a.py"))
    assert args.compile == "true" and args.n_layer == 3, "a bare flag does not swallow a file"
    args = parse("--training_mode=multidataset", "--dataset_list", "x", "y", str(tmp_path / "a.py"))
    assert args.dataset_list == ("x", "y") and args.n_layer == 3, "nor does a list"


def test_print_config_names_the_source_of_each_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
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
    assert len(rows) == len(SPECS)


NANOGPT_CONFIGS = {  # the kinds of lines that its configs have: comments, arithmetic, a time in a name
    "train_shakespeare_char.py": """
# a miniature model
out_dir = 'out-shakespeare-char'
eval_interval = 250 # often
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
# device = 'cpu'
""",
    "train_gpt2.py": """
wandb_log = True
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
weight_decay = 1e-1
""",
    "finetune_shakespeare.py": """
import time

out_dir = 'out-shakespeare'
eval_interval = 5
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl'
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
""",
}


def test_nanogpts_own_config_files_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, text in NANOGPT_CONFIGS.items():
        (tmp_path / name).write_text(text)
    args = parse(str(tmp_path / "train_shakespeare_char.py"))
    assert args.dropout == 0.2 and args.always_save_checkpoint is False
    assert "lr_decay_iters is not used here" in capsys.readouterr().err
    assert parse(str(tmp_path / "train_gpt2.py")).gradient_accumulation_steps == 40
    assert parse(str(tmp_path / "finetune_shakespeare.py"), "--wandb_log").wandb_run_name.startswith("ft-1")


@pytest.mark.parametrize("line", [
    "__import__('os').system('touch {}')", "x = open('{}', 'w')", "import os",
    "n_layer = [].append(open('{}', 'w'))", "n_layer = (lambda: open('{}', 'w'))()", "exec('1')",
    "if True:\n    n_layer = 3", "del n_layer", "n_layer += 1", "time.sleep(9)", "n_layer = undefined",
    "n_layer = 9**9**9", "n_layer = 10**10**10", "n_layer = 'a' * 10**9", "n_layer = [0] * 10**11", "n_layer = 1 / 0",
    "n_layer = f'{{1}}'", "n_layer = (1, 2, 3", "n_layer, n_head = 3", "n_layer = 3j", "n_layer = b'3'",
])  # fmt: skip
def test_configs_are_never_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str], line):
    path, target = tmp_path / "c.py", tmp_path / "executed"
    path.write_text(line.replace("{}", str(target)))
    assert str(path) in errors_of(capsys, str(path)) and not target.exists()


def test_all_errors_are_reported_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "c.py").write_text("n_lyer = 3\nbatch_size = 'many'\n")
    errors = errors_of(
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
    for part in (
        "10 errors",
        "--learning_rat: no such argument; did you mean --learning_rate?",
        "n_lyer: no such argument; did you mean n_layer?",
        "batch_size=many: must be a whole number",
        "--n_head=0: must be at least 1",
        "--dropout=2: must be at most 0.999",
        "did you mean cosine?",
        "--compile=maybe: must be one of auto, true, false",
        "--seed: needs a value",
        "--max_iters=2.5: must be a whole number",
        "nowhere.json: can't be read",
    ):
        assert part in errors, f"{part!r} is not in {errors!r}"


MIXTURE = ["--training_mode=multidataset", "--dataset_list", "a", "b"]


@pytest.mark.parametrize(("flags", "error"), [
    (["--dataset_list", "a", "b"], "--dataset_list: has an effect only with --training_mode=multidataset"),
    (["--training_mode=multidataset"], "--dataset_list: required by --training_mode=multidataset"),
    ([*MIXTURE, "--dataset_sampling_probs", "1"], "1 weights for 2 datasets"),
    ([*MIXTURE, "--dataset_sampling_probs", "1", "-1"], "must not be negative"),
    ([*MIXTURE, "--dataset_sampling_probs", "0", "0"], "not all zero"),
    ([*MIXTURE, "--dataset_sampling_probs", "0.5", "1", "--dataset_interleaving"], "whole numbers"),
    (["--training_mode=multidataset", "--dataset_list", "a", "a"], "--dataset_list: contains a dataset twice"),
    (["--training_mode=multicontext", "--dataset=a"], "--dataset: has an effect only with --training_mode=single"),
    (["--training_mode=multicontext"], "--multicontext_datasets: required by --training_mode=multicontext"),
    (["--min_lr=1e-5"], "--min_lr: has an effect only with a schedule that decays"),
    (["--decay_lr", "--min_lr=1"], "--min_lr=1: must not be above the peak of 0.001 (--learning_rate)"),
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
def test_arguments_that_conflict_are_reported_by_flag(capsys: pytest.CaptureFixture[str], flags, error):
    assert error in errors_of(capsys, *flags)


def test_resume_takes_the_runs_own_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = {"n_layer": 3, "learning_rate": 0.5, "_about": {}}
    not_inherited = {"out_dir": "elsewhere", "overwrite": True, "init_from": "gpt2"}
    (tmp_path / "train_config.json").write_text(json.dumps(config | not_inherited))
    args = parse("--init_from=resume", f"--out_dir={tmp_path}", "--learning_rate=0.25")
    assert (args.n_layer, args.learning_rate, args.out_dir) == (3, 0.25, str(tmp_path))
    assert (args.overwrite, args.init_from) == (False, "resume")
    assert parse("--init_from=resume", f"--out_dir={tmp_path}", "--n_layer=3").n_layer == 3
    assert "--overwrite: " in errors_of(capsys, "--init_from=resume", f"--out_dir={tmp_path}", "--overwrite")


def test_every_shipped_config_is_valid(capsys: pytest.CaptureFixture[str]):
    for path in sorted((ROOT / "configs").rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, f"{path} has no docstring"
        weights = ["--init_from=gpt2"] if "--init_from=" in docstring else []  # where its command names weights
        if path.name == "text2text.py":  # its task is given by its fields
            weights += ["--prompt_format=<P*60>{text}<P*20>", "--target_field=summary", "--truncation_field=text"]
        parse(str(path), *weights)
        assert "is not used here" not in capsys.readouterr().err, f"{path} sets something that has no effect"


# ---------------------------------------------------------------------------------------------------------------------
# other programs' names

# An alias of --checkpoint needs a run that is there: training/test_whose_run.py resumes by it.
ALIASES = [(alias, name) for name, spec in SPECS.items() for alias in spec.alias if name != "checkpoint"]
RELATED = {  # what else an argument needs to be valid
    "fsdp_reshard": ["--parallel=fsdp"],
    "fsdp_offload": ["--parallel=fsdp"],
    "lora_rank": ["--adapter=lora", "--init_from=gpt2"],
    "lora_targets": ["--adapter=lora", "--init_from=gpt2"],
    "max_new_tokens": ["--objective=sft"],
    "columns": ["--objective=sft"],
    "chat_template": ["--objective=sft", "--init_from=gpt2"],
    "reward": ["--objective=grpo", "--init_from=gpt2"],
    "num_generations": ["--objective=grpo", "--init_from=gpt2"],
    "mask_truncated": ["--objective=grpo", "--init_from=gpt2"],
    "rope_base": ["--position=rope"],
    "rotary_fraction": ["--position=rope"],
}
VALUES = {
    "init_from": "gpt2",
    "base_model": "gpt2",
    "rotary_fraction": "0.5",
    "lora_targets": "attn.qkv",
    "columns": "prompt=question",
    "reward": "length:2",
    "n_head": "12",
    "n_embd": "12",
    "beta1": "0.5",
    "beta2": "0.5",
}


def other_value(name: str) -> str:
    """A valid value that is not the default."""
    spec = SPECS[name]
    if name in VALUES:
        return VALUES[name]
    if spec.is_switch:
        return str(spec.default in (False, "auto")).lower()
    if spec.kind is str:
        return "other"
    return f"{spec.default * 2 or 2:g}"


@pytest.mark.parametrize(("alias", "name"), ALIASES)
def test_an_alias_is_its_argument(tmp_path: Path, alias, name):
    value = other_value(name)
    related = RELATED.get(name, [])
    expected = parse(f"--{name}={value}", *related)
    assert getattr(expected, name) != SPECS[name].default
    assert parse(f"--{alias}={value}", *related) == parse(f"--{alias}", value, *related) == expected
    (tmp_path / "c.json").write_text(json.dumps({alias: value}))
    assert parse(str(tmp_path / "c.json"), *related) == expected
    if SPECS[name].is_switch:
        assert getattr(parse(f"--no-{alias}", *related), name) in (False, "false")


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("output_dir", "out_dir"),
        ("model_name_or_path", "init_from"),
        ("num_hidden_layers", "n_layer"),
        ("num_attention_heads", "n_head"),
        ("num_key_value_heads", "n_kv_head"),
        ("hidden_size", "n_embd"),
        ("rope_theta", "rope_base"),
        ("tie_word_embeddings", "tie_weights"),
        ("max_completion_length", "max_new_tokens"),
        ("reward_funcs", "reward"),
        ("mask_truncated_completions", "mask_truncated"),
        ("lora_r", "lora_rank"),
        ("lora_target_modules", "lora_targets"),
        ("target_modules", "lora_targets"),
        ("max_steps", "max_iters"),
        ("steps", "max_iters"),
        ("num_train_epochs", "max_epochs"),
        ("early_stopping_patience", "early_stop_patience"),
        ("lr", "learning_rate"),
        ("adam_beta1", "beta1"),
        ("adam_beta2", "beta2"),
        ("max_grad_norm", "grad_clip"),
        ("warmup_steps", "warmup_iters"),
        ("micro_batch_size", "batch_size"),
        ("save_interval_steps", "checkpoint_interval"),
        ("eval_interval_steps", "eval_interval"),
        ("max_generation_steps", "max_new_tokens"),
        ("eval_steps", "eval_interval"),
        ("save_steps", "checkpoint_interval"),
        ("logging_steps", "log_interval"),
        ("torch_compile", "compile"),
        ("gradient_checkpointing", "activation_checkpointing"),
    ],
)
def test_names_of_trl_transformers_and_peft_are_aliases(alias, name):
    assert (alias, name) in ALIASES


@pytest.mark.parametrize("text, answer", [
    ("training.learning_rate=1e-1", "write --learning_rate=1e-1"),
    ("preprocessing.max_tokens=1792", "write --max_tokens=1792"),
    ("task.task_name=detoxification", "write --task_name=detoxification"),
    ("prompt_provider=tensor", "write --prompt_provider=tensor"),
    ("training.lr=3", "write --learning_rate=3"),
    ("task=detoxification", "write configs/tasks/detoxification.py"),
    ("+experiment=quick_test", "write configs/quick_test.py"),
    ("+dataset.data_files.train=/x/a.jsonl", "use --train_file"),
    ("model=gemma3_1b", "use --init_from"),
    ("optimizer.learning_rate=1e-7,1e-6", "learning_rate: [1e-7,1e-6], for sweep.py"),
    ("max_iter=7", "did you mean max_iters?"),
    ("--multirun", "sweep.py"),
    ("-m", "sweep.py"),
    ("--cfg", "use --print_config"),
])  # fmt: skip
def test_overrides_of_hydra_are_answered_with_ours(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, text: str, answer: str
):
    monkeypatch.chdir(ROOT)
    assert f"{text}: " in errors_of(capsys, text) and answer in errors_of(capsys, text)


@pytest.mark.parametrize("name, ours", [
    ("constant", "none"), ("constant_with_warmup", "none"), ("constant_schedule", "none"),
    ("linear_schedule_with_warmup", "linear"), ("get_linear_schedule_with_warmup", "linear"),
    ("cosine_schedule_with_warmup", "cosine"), ("cosine_with_restarts", "cosine"),
    ("cosine_with_hard_restarts_schedule_with_warmup", "cosine"), ("cosine_with_min_lr", "cosine"),
    ("cosine_warmup_with_min_lr", "cosine"), ("polynomial", "linear"),
    ("polynomial_decay_schedule_with_warmup", "linear"), ("get_inverse_sqrt_schedule", "inverse_sqrt"),
    ("warmup_stable_decay", "wsd"), ("get_wsd_schedule", "wsd"), ("reduce_lr_on_plateau", "cosine"),
    ("greedy", "cosine"),
])  # fmt: skip
def test_schedules_of_transformers_are_answered_with_ours(capsys: pytest.CaptureFixture, name: str, ours: str):
    """The names of its SchedulerType that are none of ours, and of the functions that make them."""
    error = errors_of(capsys, f"--lr_scheduler={name}")
    assert ours in schedules.SCHEDULES and f"--lr_scheduler={ours}" in error.partition("must be one of")[2]


def test_the_schedule_follows_the_runs_length(tmp_path: Path, capsys: pytest.CaptureFixture):
    """lr_decay_iters and the warmup of a ratio, unless they are set; a resumed run keeps its own."""
    cosine = ["--lr_scheduler=cosine", "--max_iters=500"]
    assert parse(*cosine).lr_decay_iters == 500 and parse(*cosine, "--lr_decay_iters=7000").lr_decay_iters == 7000
    assert parse("--lr_scheduler=cosine").lr_decay_iters == 3500
    assert parse(*cosine, "--warmup_ratio=0.101").warmup_iters == 51
    assert "--warmup_ratio=0.1: --warmup_iters=3 is set" in errors_of(capsys, "--warmup_ratio=0.1", "--warmup_iters=3")
    record = {
        "max_iters": 500,
        "lr_decay_iters": 500,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "warmup_iters": 50,
    }
    (tmp_path / "train_config.json").write_text(json.dumps(record))
    resumed = parse("--init_from=resume", f"--out_dir={tmp_path}", "--max_iters=1000")
    assert (resumed.lr_decay_iters, resumed.warmup_iters) == (500, 50)


def test_max_tokens_gives_the_context_of_a_prompt_format(capsys: pytest.CaptureFixture):
    prompt = ["--adapter=soft_prompt", "--objective=sft", "--init_from=gpt2", "--max_tokens=700"]
    assert parse(*prompt, "--prompt_format=<P*60>{toxic}<P*20>").block_size == 700
    error = errors_of(capsys, *prompt, "--prompt_format=<P>{toxic}", "--block_size=300")
    assert "--max_tokens=700: more than --block_size=300" in error
    assert "inner quotes" in errors_of(capsys, *prompt, '--prompt_format="<P*60>{toxic}<P*20>"')
    assert parse(*prompt, '--prompt_format=\\"<P*60>{toxic}\\"').prompt_format == '\\"<P*60>{toxic}\\"'


def test_names_are_unique():
    names = [*SPECS, *(alias for alias, _ in ALIASES), *train_args.HINTS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", train_args.HINTS)
def test_a_name_that_means_something_else_is_answered_with_ours(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name
):
    hint = train_args.HINTS[name]
    assert f"--{name}: not an argument here; {hint}" in errors_of(capsys, f"--{name}=1")
    assert "config file" not in errors_of(capsys, f"--{name}", "4"), (
        "the value of an unknown flag is no error of its own"
    )
    (tmp_path / "c.json").write_text(json.dumps({name: 1}))
    assert f"c.json: {name}: not an argument here; {hint}" in errors_of(capsys, str(tmp_path / "c.json"))
    flags = re.findall(r"--(?:no-)?(\w+)", hint)
    assert flags and set(flags) <= {*SPECS, "field"}  # --field is data/prepare.py's


TYPED = {
    "train": {
        "wd": "weight_decay", "bs": "batch_size", "ctx": "block_size", "seq_len": "block_size", "n_layers": "n_layer",
        "layers": "n_layer", "d_model": "n_embd", "epochs": "max_epochs", "num_steps": "max_iters",
        "gradient_accumulation": "gradient_accumulation_steps", "grad_accum_steps": "gradient_accumulation_steps",
        "device_map": "device", "precision": "dtype", "warmup": "warmup_iters", "num_warmup_steps": "warmup_iters",
        "clip_grad": "grad_clip", "save_every": "checkpoint_interval", "eval_every": "eval_interval",
        "wandb": "wandb_log", "lora": "adapter", "rank": "lora_rank", "num_tokens": "max_tokens",
        "batch-size": "batch_size", "LR_scheduler": "lr_scheduler", "ddp_timeout_": "ddp_timeout",
    },
    "sample": {"temp": "temperature", "n": "num_samples", "max_length": "max_new_tokens", "prompt": "start",
        "max_tokens": "max_new_tokens", "model": "init_from", "model_name_or_path": "init_from", "bf16": "dtype"},
    "evaluate": {"bs": "batch_size", "shots": "num_fewshot", "checkpoint_path": "init_from"},
    "export": {"output": "to", "outtype": "type"},
}  # fmt: skip


@pytest.mark.parametrize("command", TYPED)
def test_what_people_type_is_answered_with_our_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {"sample": sample.SampleArgs, "evaluate": evaluate.EvaluateArgs, "export": export.ExportArgs}
    table: type = tables.get(command, train_args.TrainArgs)
    with pytest.raises(SystemExit):
        configurator.parse(table, [f"--{name}=1" for name in TYPED[command]], "")
    errors = capsys.readouterr().err
    for name, ours in TYPED[command].items():
        assert f"--{name}: no such argument; did you mean --{ours}?" in errors, name
    assert set(TYPED[command].values()) <= {*configurator.arg_specs(table), "ddp_timeout"}


def test_the_names_that_people_type_stand_in_one_place() -> None:
    """Each for an argument that some command has; none is a key of Hugging Face's table that says the same."""
    tables = (train_args.TrainArgs, sample.SampleArgs, evaluate.EvaluateArgs, export.ExportArgs, sweep.SweepArgs)
    ours = {name for table in (*tables, report.ReportArgs) for name in configurator.arg_specs(table)} | {"name"}
    for arguments, names in other_names.NAMES.items():
        assert set(arguments.split()) <= ours, arguments
        assert not [name for name in names.split() if hf_keys.argument_of_key(name) in arguments.split()], arguments


def test_a_key_of_trl_that_becomes_no_argument_is_answered_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    errors = errors_of(capsys, "--dataloader_num_workers=4", "--neftune_noise_alpha=5")
    assert "--dataloader_num_workers: not an argument here; leave it out" in errors
    assert "--neftune_noise_alpha: not an argument here; not supported" in errors


# ---------------------------------------------------------------------------------------------------------------------
# --help

BANNED = r"\b(told|tells?|strange|wrong|mistakes?|given|beside|so many|answers)\b"


@pytest.mark.parametrize("name", SPECS)
def test_help_is_short_plain_english(name):
    text = SPECS[name].help
    assert not re.search(BANNED, text), text
    for sentence in re.split(r"[.;:] ", text):
        assert len(sentence.split()) <= 25, sentence
    assert text and not text.endswith(".") and len(text) <= 250


@pytest.mark.parametrize(
    ("phrase", "name"),
    [
        ("KL", "beta"),
        ("reference model", "reference"),
        ("clip range", "epsilon"),
        ("group size", "num_generations"),
        ("reward functions", "reward"),
        ("importance ratio", "importance_sampling_level"),
        ("learning rate warmup", "warmup_iters"),
        ("peak learning rate", "learning_rate"),
        ("LoRA rank", "lora_rank"),
        ("target modules", "lora_targets"),
        ("gradient accumulation", "gradient_accumulation_steps"),
        ("global (effective) batch size", "batch_size"),
        ("weight decay", "weight_decay"),
        ("mixed precision", "dtype"),
        ("(gradient) checkpointing", "activation_checkpointing"),
        ("max gradient norm", "grad_clip"),
        ("virtual tokens", "prompt_format"),
        ("context length", "block_size"),
        ("early stopping", "early_stop_patience"),
    ],
)
def test_help_has_the_terms_of_the_field(phrase, name):
    assert phrase in SPECS[name].help


def test_help_shows_aliases_and_is_grouped(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(
        f"\n{title}:\n" in text for title in configurator.arg_groups(train_args.TrainArgs)
    )
    flat = " ".join(text.split())
    assert all(f"(alias: {', '.join(spec.alias)})" in flat for spec in SPECS.values() if spec.alias)


def test_arguments_are_frozen():
    with pytest.raises(AttributeError):
        parse().n_layer = 3


def test_errors_of_the_data_are_reported_like_the_others(capsys: pytest.CaptureFixture[str]):
    def main(args):
        raise UserError("the file is odd")

    with pytest.raises(SystemExit) as end:
        configurator.run(main, None)
    assert end.value.code == 2 and capsys.readouterr().err.endswith(": the file is odd\n")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resume_alone_changes_no_setting_of_val_loss(objective: str):
    """What only a new run may set is not compared with a resumed run's."""
    started = parse(f"--objective={objective}", "--init_from=gpt2")
    resumed = dataclasses.replace(started, init_from="resume")
    assert resumed.val_loss_settings == started.val_loss_settings
