"""lm-eval's tasks on a model of this program give what lm-eval's own `hf` model gives on the same weights."""

import dataclasses
import json
import random
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import RunFiles

import configurator
import evaluate
from builders import load_model
from nanoforge.data import model_tokenizers
from nanoforge.errors import UserError
from nanoforge.models.likelihood import score_continuations
from nanoforge.posttraining import lm_eval_model, multiple_choice
from nanoforge.posttraining.examples import ExampleEncoder

TEXT = "the sky is blue and grass was green so why do birds sing? ask them: no one knows"
WORDS = TEXT.split()
RNG = random.Random(0)


@pytest.fixture(autouse=True)
def seed() -> None:
    RNG.seed(0)


def words(count: int) -> str:
    return " ".join(RNG.choices(WORDS, k=count))


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE = {"vocab_size": 300, "initializer_range": 0.4, "bos_token_id": 0, "eos_token_id": 1}


def make_tokenizer(*, adds_bos: bool) -> Any:
    """transformers' tokenizer with 300 ids, the tokens of ChatML among them."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([words(50) for _ in range(20)], trainer)
    if adds_bos:
        library.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=library,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(ours, lm-eval's hf) of one small model with random weights and a context of 48 tokens. Llama's tokenizer begins
    each text with a token; GPT-2's does not, though it names one."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if request.param == "gpt2":
        hf = GPT2LMHeadModel(GPT2Config(**SHAPE, n_positions=48, n_embd=32, n_layer=2, n_head=2))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(**SHAPE, **sizes, num_key_value_heads=2, max_position_embeddings=48)
        hf = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(adds_bos=request.param == "llama")
    hf.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    own_tokenizer = model_tokenizers.load_folder(folder)
    lm_eval_model.import_lm_eval()
    ours = lm_eval_model.HarnessModel(load_model(str(folder)).model, own_tokenizer, batch_size=7, seed=1)
    return ours, HFLM(pretrained=hf, tokenizer=tokenizer, batch_size=5)


def instances(kind: str, args: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=arguments, idx=i) for i, arguments in enumerate(args)]


def test_log_likelihoods_are_those_of_lm_eval(models: tuple, capsys: pytest.CaptureFixture[str]):
    """Also of contexts that are empty, end in spaces, or are longer than the model's; of choices of one token."""
    ours, theirs = models
    args = [("", words(3)), (words(4) + "  ", "green"), (words(3) + "\n", words(2))]
    for length in (1, 3, 10, 40, 10, 3):
        context = words(length)
        args += [(context, f" {words(n)}") for n in (1, 1, 3, 5)] + [(context, letter) for letter in "ABCD"]
    requests = instances("loglikelihood", args)
    contexts = [words(n) for n in (2, 4, 6, 8, 9, 11)]
    greedy = theirs.generate_until(instances("generate_until", [(text, {"max_gen_toks": 1}) for text in contexts]))
    requests += instances("loglikelihood", [pair for pair in zip(contexts, greedy, strict=True) if pair[1]])
    expected = theirs.loglikelihood(requests)
    scores = ours.loglikelihood(requests)
    assert [score.logp for score in scores] == pytest.approx([logp for logp, _ in expected], abs=1e-4)
    assert [score.is_greedy for score in scores] == [is_greedy for _, is_greedy in expected]
    assert sum(score.is_greedy for score in scores) in range(1, len(scores))
    assert "8 requests longer than 48" in capsys.readouterr().err


def test_rolling_log_likelihoods_are_those_of_lm_eval(models: tuple):
    ours, theirs = models
    requests = instances("loglikelihood_rolling", [(words(n),) for n in (1, 5, 30, 31, 90, 20)])
    assert ours.loglikelihood_rolling(requests) == pytest.approx(theirs.loglikelihood_rolling(requests), rel=1e-6)


def test_completions_are_those_of_lm_eval(models: tuple):
    ours, theirs = models
    settings = [{"max_gen_toks": 9, "until": [" g", "ee"]}, {"max_gen_toks": 20, "until": "?"}, {"max_new_tokens": 5}]
    args = [(words(n), settings[n % 3]) for n in (2, 3, 7, 4, 5, 60, 61, 62)]
    requests = instances("generate_until", args)
    texts = ours.generate_until(requests)
    assert texts == theirs.generate_until(requests)
    assert "?" not in "".join(texts[1::3]) and len(set(texts)) > 5


TASKS = {
    "choices": """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: choices
        doc_to_target: answer
        num_fewshot: 2
        fewshot_split: validation
        metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
    """,
    "completion": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{choices[answer]}}"
        generation_kwargs: {until: [" ", "g"], max_gen_toks: 12}
        metric_list: [{metric: exact_match}]
    """,
    "perplexity": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{question}} {{question}} {{question}}"
        metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
    """,
}


def write_tasks(folder: Path) -> None:
    """Task files of lm-eval that read a jsonl file beside them."""
    rows = [
        {"question": words(RNG.randrange(2, 9)), "choices": [words(n) for n in (1, 2, 4)], "answer": i % 3}
        for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {folder / 'rows.jsonl'}}}}}\n"
        head = f"task: tiny_{name}\n{data}validation_split: validation\n"
        (folder / f"{name}.yaml").write_text(head + textwrap.dedent(text))


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of task files, with lm-eval writing nothing outside of it."""
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # seconds of questions to the system
    write_tasks(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_tasks_give_lm_evals_own_results(models: tuple, harness: Path):
    """Choices after two examples, completions and perplexity, from task files."""
    options = lm_eval_model.HarnessOptions([str(harness / f"{name}.yaml") for name in TASKS])
    found, expected = (lm_eval_model.run_harness(model, options)["results"] for model in models)
    assert len(found) == 3
    for task in expected:
        numbers = {name: value for name, value in expected[task].items() if isinstance(value, float)}
        assert {name: found[task][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    assert 0 < found["tiny_choices"]["acc_norm,none"] < 1


def test_our_own_multiple_choice_gives_lm_evals_results(models: tuple, harness: Path):
    """evaluate.py --tasks of the same rows, which needs no lm-eval."""
    own, theirs = models
    task = (harness / "choices.yaml").read_text().replace('"{{question}}"', r'"Question: {{question}}\nAnswer:"')
    (harness / "choices.yaml").write_text(task.replace("num_fewshot: 2", "num_fewshot: 0"))
    options = lm_eval_model.HarnessOptions([str(harness / "choices.yaml")])
    expected = lm_eval_model.run_harness(theirs, options)["results"]["tiny_choices"]
    questions = multiple_choice.read_questions(harness / "rows.jsonl", fields=(), columns={}, most=0)
    encoder = ExampleEncoder(own.tokenizer, max_tokens=48)
    scores = []
    for question in questions:
        pairs = multiple_choice.encode_choices(question, encoder)
        logps = [score.logp for score in score_continuations(own.model, pairs, batch_size=3)]
        scores.append(multiple_choice.choice_metrics(logps, question.choices, question.answer))
    for name, of_theirs in (("accuracy", "acc"), ("acc_norm", "acc_norm"), ("acc_bytes", "acc_bytes")):
        assert sum(score[name] for score in scores) / len(scores) == expected[f"{of_theirs},none"]


@pytest.mark.slow
def test_chats_give_lm_evals_own_results(models: tuple, harness: Path):
    """Two examples as turns of a chat, a system message, and the beginning of an answer; messages keep their text."""
    (harness / "choices.yaml").write_text((harness / "choices.yaml").read_text() + "gen_prefix: 'It is '\n")
    tasks = [str(harness / f"{name}.yaml") for name in ("choices", "completion")]
    options = lm_eval_model.HarnessOptions(tasks, apply_chat_template=True, system_instruction="be brief")
    ours, theirs = models
    ours = dataclasses.replace(ours, apply_template=True)
    found, expected = (lm_eval_model.run_harness(model, options)["results"] for model in (ours, theirs))
    assert found == expected
    chat = [{"role": "user", "content": "why? "}, {"role": "assistant", "content": "so: "}]
    for messages, prompt in ((chat, False), (chat[:1], True)):
        text = ours.apply_chat_template(messages, add_generation_prompt=prompt)
        assert text == theirs.apply_chat_template(messages, add_generation_prompt=prompt)
        assert ours.encode(text) == theirs.tok_encode(text)
    spelled = ours.encode(ours.apply_chat_template([{"role": "user", "content": "<|im_end|>"}]))
    assert spelled.count(1) == 1, "the message has no control token"


def run_evaluate(*argv: object) -> dict:
    """What evaluate.py writes, run in this process."""
    rules = configurator.Rules(check=evaluate.check)
    return evaluate.main(configurator.parse(evaluate.EvaluateArgs, list(map(str, argv)), "", rules))


@pytest.mark.slow
def test_the_command_prints_and_writes_lm_evals_results(base: Path, harness: Path, capsys: pytest.CaptureFixture[str]):
    """evaluate.py on a run that adds: --limit, --num_fewshot and --gen_kwargs reach lm-eval."""
    rows = [
        {"question": f"{i}+{i + 1}=", "choices": [str(2 * i + 1 + k) for k in range(3)], "answer": 0} for i in range(5)
    ]
    (harness / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("choices", "completion"):
        task = harness / f"{name}.yaml"
        task.write_text(task.read_text() + "\ntarget_delimiter: ''\nfewshot_delimiter: ''\n")
    run_dir = base.parents[1]
    tasks = f"--lm_eval={harness / 'choices.yaml'},{harness / 'completion.yaml'}"
    flags = ["--limit=4", "--num_fewshot=1", """--gen_kwargs={"max_gen_toks": 3, "until": []}""", "--dtype=float32"]
    found = run_evaluate(f"--out_dir={run_dir}", tasks, *flags)
    assert "|tiny_choices" in capsys.readouterr().out and not found["losses"]
    assert json.loads((run_dir / "evaluation.json").read_text()) == json.loads(json.dumps(found))
    assert json.loads((run_dir / "evaluations.jsonl").read_text().splitlines()[-1])["lm_eval"] == found["lm_eval"]
    assert found["lm_eval"]["n-shot"] == {"tiny_choices": 1, "tiny_completion": 1}
    assert {samples["effective"] for samples in found["lm_eval"]["n-samples"].values()} == {4}


@pytest.mark.parametrize("flags, message", [
    (["--limit=3"], "--limit"),
    (["--lm_eval=tiny_choises", "--include_path={folder}"], "--lm_eval=tiny_choises: .*tiny_choices"),
    (["--lm_eval={folder}/broken.yaml"], "--lm_eval=.*broken.yaml: .*FileNotFoundError"),
    (["--lm_eval={folder}/completion.yaml", '--gen_kwargs={"max_gen_toks": 32}'], "--lm_eval: .*32.*--gen_kwargs"),
    (["--lm_eval={folder}/completion.yaml"], "--lm_eval: the tokenizer"),
    (["--lm_eval={folder}/completion.yaml", '--gen_kwargs={"num_beams": 4}'], "--lm_eval: .*num_beams=4"),
])  # fmt: skip
def test_errors_name_the_flag(
    base: Path,
    harness: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
):
    from lm_eval.tasks import TaskManager

    def small_manager(include_path: str | None, **options: object) -> TaskManager:  # without lm-eval's own
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", small_manager)
    (harness / "broken.yaml").write_text((harness / "choices.yaml").read_text().replace("rows.jsonl", "none.jsonl"))
    with pytest.raises((UserError, SystemExit)) as error:
        run_evaluate(f"--out_dir={base.parents[1]}", *(flag.replace("{folder}", str(harness)) for flag in flags))
    assert re.search(message, str(error.value) + capsys.readouterr().err)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"--lm_eval: .*pip install lm-eval"):
        lm_eval_model.import_lm_eval()


def test_several_vocabularies_are_refused(run: Callable[..., RunFiles]):
    done = run("--training_mode=multicontext", "--multicontext_datasets", "a", "upper")
    with pytest.raises(UserError, match="several vocabularies"):
        run_evaluate(f"--out_dir={done.out_dir}", "--lm_eval=x")
