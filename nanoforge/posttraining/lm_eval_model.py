"""lm-eval's tasks (EleutherAI's Language Model Evaluation Harness) on a model of this program.

`HarnessModel` is what lm-eval calls a model (lm_eval.api.model.LM): texts come in, log-likelihoods and texts go out. It
treats texts as lm-eval's own `hf` does, so that scores are the same. lm-eval itself is imported only where it is used.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from nanoforge import rng
from nanoforge.console import ProgressBar, plural, print_to_stderr
from nanoforge.data.tokenization import Tokenizer
from nanoforge.errors import UserError, did_you_mean
from nanoforge.models.generation import SamplingParams, UniformDraws, generate_batch
from nanoforge.models.likelihood import (
    Pair,
    Score,
    begin_sequence,
    encode_pair,
    encode_sequence,
    prefix_id,
    score_continuations,
)
from nanoforge.posttraining.chat_template import ChatTemplate, completion_end_ids, read_marks

MAX_GEN_TOKS = 256  # of a completion, where the task does not say; as lm-eval has it
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p")
GREEDY_KEYS = {"num_beams": 1}  # settings that mean nothing here, with the values that they may have


# ---------------------------------------------------------------------------------------------------------------------
# the model


@dataclass(frozen=True)
class HarnessModel:
    """A model with one vocabulary behind lm-eval's interface. Each request has `args`, as lm-eval documents them."""

    model: nn.Module
    tokenizer: Tokenizer
    batch_size: int
    seed: int  # of completions that are drawn
    apply_template: bool = False  # texts are what the chat template wrote, with control tokens

    rank = 0
    world_size = 1

    @property
    def block_size(self) -> int:
        config: Any = self.model.config
        return config.block_size

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,  # noqa: FBT001, FBT002
    ) -> str:
        """The text of a chat, in which control tokens that a message spells are marked, so that they stay text.

        add_generation_prompt: it ends where the assistant begins to write, otherwise where the last message ends, which
        the assistant then continues. Raises UserError.
        """
        template = ChatTemplate(self.tokenizer)
        if add_generation_prompt:
            return template.render(messages, add_generation_prompt=True).marked
        return template.render_prefix(messages)

    def encode(self, text: str) -> list[int]:
        """The ids of a text that begins a sequence. Raises UserError."""
        if not self.apply_template:
            return encode_sequence(self.tokenizer, text)
        ids = ChatTemplate(self.tokenizer).encode_rendered(read_marks(text)).ids.tolist()
        return begin_sequence(self.tokenizer, ids)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Score]:
        """The score of each (context, continuation). Raises UserError."""
        texts = [request.args for request in requests]
        pairs = [encode_pair(self.tokenizer, context, text, encode=self.encode) for context, text in texts]
        self.warn_of_cuts([len(pair.context) + len(pair.continuation) - 1 for pair in pairs], self.block_size)
        return self.score(pairs)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-likelihood of each (text,), all of it: in windows of block_size tokens, each token predicted once.

        Raises UserError.
        """
        first_id = prefix_id(self.tokenizer)
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            windows = rolling_windows(self.encode(text), first_id, self.block_size)
            pairs += windows
            owners += [number] * len(windows)
        logps = [score.logp for score in self.score(pairs)]
        return np.bincount(owners, weights=logps, minlength=len(requests)).tolist()

    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        with closing(ProgressBar("log-likelihoods", "requests", len(pairs))) as progress:
            return score_continuations(self.model, pairs, self.batch_size, on_scored=progress.add)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The completion of each (context, settings), up to the first of the settings' `until`. Raises UserError."""
        texts = [""] * len(requests)
        numbers_of: dict[str, list[int]] = {}  # of requests with the same settings
        for number, request in enumerate(requests):
            numbers_of.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        with closing(ProgressBar("completions", "requests", len(requests))) as progress:
            for settings, numbers in numbers_of.items():
                self.generate_with(json.loads(settings), {i: requests[i].args[0] for i in numbers}, texts, progress)
        return texts

    def generate_with(
        self, settings: Mapping[str, Any], contexts: Mapping[int, str], texts: list[str], progress: ProgressBar
    ) -> None:
        """The completions of contexts by number, put into texts; the longest contexts first. Raises UserError."""
        until = stop_strings(settings)
        sampling = dataclasses.replace(sampling_params(settings, self.tokenizer), is_complete=self.stop_check(until))
        room = self.block_size - sampling.max_new_tokens
        if room <= 0:
            raise UserError(
                f"a task asks for {sampling.max_new_tokens} tokens, and block_size is {self.block_size}; "
                """lower it with --gen_kwargs='{"max_gen_toks": N}'"""
            )
        prompts = {number: self.encode(context) for number, context in contexts.items()}
        self.warn_of_cuts([len(prompt) for prompt in prompts.values()], room)
        numbers = sorted(prompts, key=lambda number: -len(prompts[number]))
        for start in range(0, len(numbers), self.batch_size):
            batch = np.array(numbers[start : start + self.batch_size])
            completions = generate_batch(
                self.model,
                prompts=[prompts[number][-room:] for number in batch.tolist()],
                sampling=sampling,
                uniform=uniform_of(self.seed, batch),
            )
            for number, completion in zip(batch.tolist(), completions, strict=True):
                texts[number] = cut_at(self.decode(completion.ids), until)
            progress.add(len(batch))

    def stop_check(self, until: Sequence[str]) -> Callable[[list[int]], bool] | None:
        """Whether a completion holds a stop string: only its last tokens are decoded, and each has a byte at least."""
        if not until:
            return None
        longest = max(len(stop.encode()) for stop in until) + 8
        return lambda ids: any(stop in self.decode(ids[-longest:]) for stop in until)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without control tokens."""
        control = {*self.tokenizer.end_ids, *self.tokenizer.control_tokens.values(), self.tokenizer.bos_id}
        return self.tokenizer.decode([token_id for token_id in ids if token_id not in control])

    def warn_of_cuts(self, lengths: Sequence[int], most: int) -> None:
        """Say how many texts are longer than what the model reads of them."""
        n_cut = sum(length > most for length in lengths)
        if n_cut:
            requests = plural(n_cut, "request")
            print_to_stderr(f"--lm_eval: {requests} longer than {most} tokens: the model reads the end, as in lm-eval")


def uniform_of(seed: int, numbers: np.ndarray) -> UniformDraws:
    """Random numbers of (completion of a batch, token) that depend on the request's number, not on its batch."""
    return lambda completion, token: rng.uniform(seed, numbers[completion], token)


def rolling_windows(ids: Sequence[int], first_id: int, block_size: int) -> list[Pair]:
    """Windows that predict each id once, the first one after first_id. The last window is as long as the others: its
    context is what it does not predict. (lm-eval's get_rolling_token_windows with a context of one token.)"""
    tokens = [first_id, *ids]
    pairs = []
    for start in range(0, len(ids), block_size):
        end = min(start + block_size, len(ids))
        begin = max(0, end - block_size) if start else 0
        pairs.append(Pair(tokens[begin : start + 1], tokens[start + 1 : end + 1]))
    return pairs


def stop_strings(settings: Mapping[str, Any]) -> list[str]:
    """The texts that end a completion."""
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def cut_at(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string."""
    for stop in until:
        text = text.split(stop)[0]
    return text


def sampling_params(settings: Mapping[str, Any], tokenizer: Tokenizer) -> SamplingParams:
    """A task's generation settings, by lm-eval's names, as sampling parameters. Raises UserError."""
    lengths = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    known = ("until", "do_sample", *lengths, *SAMPLING_KEYS)
    for name, value in settings.items():
        if name not in known and GREEDY_KEYS.get(name) != value:
            raise UserError(f"a task generates with {name}={value}, which is not supported; known: {', '.join(known)}")
    max_new_tokens = next((int(settings[name]) for name in lengths if settings.get(name) is not None), MAX_GEN_TOKS)
    temperature = float(settings.get("temperature") or 0.0)
    if not settings.get("do_sample", temperature > 0):
        temperature = 0.0
    filters = {name: settings[name] for name in SAMPLING_KEYS[1:] if settings.get(name) is not None}
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        end_ids=completion_end_ids(tokenizer),
        vocab_size=tokenizer.vocab_size,
        **filters,
    )


# ---------------------------------------------------------------------------------------------------------------------
# the harness


KEPT_RESULTS = (
    "results",
    "groups",
    "group_subtasks",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "lm_eval_version",
)


@dataclass(frozen=True)
class HarnessOptions:
    """What lm-eval's command line has under the same names."""

    tasks: Sequence[str]
    num_fewshot: int | None = None
    limit: float | None = None
    include_path: str = ""
    gen_kwargs: Mapping[str, Any] | None = None
    fewshot_seed: int = 1234
    apply_chat_template: bool = False
    system_instruction: str = ""


def import_lm_eval() -> Any:
    """lm-eval, with HarnessModel as one of its models. Raises UserError."""
    try:
        import lm_eval
        from lm_eval.api.model import LM
    except ModuleNotFoundError as error:
        raise UserError(f"--lm_eval: needs a package ({error.name} is missing): pip install lm-eval") from None
    LM.register(HarnessModel)
    return lm_eval


def run_harness(model: Any, options: HarnessOptions) -> dict[str, Any]:
    """What lm-eval finds, by its own names (KEPT_RESULTS). model: a HarnessModel, or one of lm-eval's.

    Raises UserError.
    """
    lm_eval = import_lm_eval()
    manager = task_manager(options)
    tasks = load_tasks(manager, options.tasks)
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            gen_kwargs=dict(options.gen_kwargs or {}),
            fewshot_random_seed=options.fewshot_seed,
            apply_chat_template=options.apply_chat_template,
            system_instruction=options.system_instruction or None,
            log_samples=False,
        )
    except UserError as error:
        raise UserError(f"--lm_eval: {error}") from None
    return {name: found[name] for name in KEPT_RESULTS if name in found}


def format_results(found: Mapping[str, Any]) -> str:
    """lm-eval's tables of what run_harness found: of tasks, and of groups."""
    from lm_eval.utils import make_table

    columns = [column for column in ("results", "groups") if found.get(column)]
    return "\n".join(make_table(found, column) for column in columns)


def task_manager(options: HarnessOptions) -> Any:
    """lm-eval's index of tasks. Its own 14,000 take seconds to read: they are left out where none is asked for."""
    from lm_eval.tasks import TaskManager

    include_path = options.include_path or None
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if all(name in manager.all_subtasks or is_task_file(name) for name in options.tasks):
        return manager
    return TaskManager(include_path=include_path)


def is_task_file(name: str) -> bool:
    """Whether it is a YAML file of one task; a group may have tasks of lm-eval's own."""
    is_yaml = name.endswith((".yaml", ".yml")) and Path(name).is_file()
    return is_yaml and re.search(r"^group:", Path(name).read_text(encoding="utf-8"), re.MULTILINE) is None


def load_tasks(manager: Any, names: Sequence[str]) -> list[Any]:
    """The tasks and groups that names, patterns (mmlu_*) and YAML files stand for. Raises UserError."""
    items: list[Any] = []
    for name in names:
        is_file = name.endswith((".yaml", ".yml")) and Path(name).is_file()
        specs = [str(Path(name).absolute())] if is_file else manager.match_tasks([name])
        if not specs:
            raise UserError(f"--lm_eval={name}: no such task{did_you_mean(name, manager.all_tasks)}")
        try:
            for spec in specs:
                loaded = manager.load(spec)
                items += [*loaded["groups"].values()][:1] or loaded["tasks"].values()
        except Exception as error:  # a task's own code, and the datasets library's many kinds of trouble
            reason = str(error).strip().splitlines()[:1]
            raise UserError(f"--lm_eval={name}: can't be loaded ({type(error).__name__}: {''.join(reason)})") from None
    return items
