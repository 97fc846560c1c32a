"""Complete random prompts with an open model, by one program; print what was measured as a line of JSON.

    python complete.py PROGRAM MODEL DTYPE one|rollouts

PROGRAM: ours, engine (ours with --engine=llama.cpp), transformers, or llama.cpp. MODEL: a folder in Hugging Face's
layout. `one` reads a prompt and decodes one greedy completion of it. `rollouts` draws 4 completions of each of 4
prompts. Each prompt is another one, so no program knows it already.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import configurator
import sample
from nanoforge.device import in_own_thread
from nanoforge.models import llama_cpp
from nanoforge.models.generation import SamplingParams, generate_batch, make_requests, uniform_draws

REPETITIONS = 5  # after one that warms up
N_DECODED = 64
N_READ = 256  # tokens of the one prompt, or half of the model's context
PROMPT_LENGTHS = (40, 48, 56, 64)  # of the prompts of rollouts
N_COMPLETIONS = 4  # of each

# Continues each prompt by so many tokens, greedily if there is one prompt, else drawing N_COMPLETIONS of each.
Complete = Callable[[list[list[int]], int], Any]


def sample_args(model: str, dtype: str, *flags: str) -> sample.SampleArgs:
    return configurator.parse(sample.SampleArgs, [f"--init_from={model}", f"--dtype={dtype}", *flags], "")


def ours_one(model: str, dtype: str, *flags: str) -> tuple[Complete, int, int]:
    """As sample.py completes one prompt."""
    args = sample_args(model, dtype, *flags)
    loaded = in_own_thread(sample.load, args, "")
    engine = sample.open_engine(args, loaded)
    config = loaded.model.config

    def complete(prompts: list[list[int]], n_new: int) -> None:
        sampling = SamplingParams(max_new_tokens=n_new, temperature=0)
        engine.complete(make_requests(prompts, sampling, uniform_draws(0)))

    return complete, config.block_size, sum(config.vocab_sizes)


def ours_rollouts(model: str, dtype: str) -> tuple[Complete, int, int]:
    """As GRPO draws: with the weights of training."""
    args = sample_args(model, dtype)
    loaded = in_own_thread(sample.load, args, "")
    loaded.to("cpu", dtype)
    config = loaded.model.config

    def complete(prompts: list[list[int]], n_new: int) -> None:
        generate_batch(loaded.model, prompts, SamplingParams(max_new_tokens=n_new, n=N_COMPLETIONS, logps=True))

    return complete, config.block_size, sum(config.vocab_sizes)


def by_transformers(model: str, dtype: str) -> tuple[Complete, int, int]:
    """By `generate` of a model whose weights have the dtype. Prompts are padded at their beginning."""
    import transformers

    network: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def complete(prompts: list[list[int]], n_new: int) -> None:
        longest = max(map(len, prompts))
        idx = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        is_one = len(prompts) == 1
        with torch.inference_mode():
            network.generate(
                idx,
                attention_mask=mask,
                max_new_tokens=n_new,
                min_new_tokens=n_new,
                do_sample=not is_one,
                num_return_sequences=1 if is_one else N_COMPLETIONS,
                pad_token_id=0,
            )

    return complete, network.config.max_position_embeddings, network.config.vocab_size


def by_llama_cpp(model: str, dtype: str) -> tuple[Complete, int, int]:
    """By llama.cpp's server, which gives all tokens at the end."""
    args = sample_args(model, dtype, "--engine=llama.cpp")
    loaded = in_own_thread(sample.load, args, "")
    engine = sample.open_engine(args, loaded)
    assert isinstance(engine, llama_cpp.LlamaCpp)
    engine.make_room(1, N_READ + N_DECODED)
    config = loaded.model.config

    def complete(prompts: list[list[int]], n_new: int) -> None:
        body = {"prompt": prompts[0], "n_predict": n_new, "temperature": 0.0}
        replies: list[dict[str, Any]] = []

        def take(reply: dict[str, Any]) -> bool:
            replies.append(reply)
            return True

        engine.server.handle_completions(body, take)
        assert replies[0]["usage"]["completion_tokens"] == n_new, replies

    return complete, config.block_size, sum(config.vocab_sizes)


def seconds(complete: Complete, prompts: list[list[int]], n_new: int) -> float:
    start = time.perf_counter()
    complete(prompts, n_new)
    return time.perf_counter() - start


def main() -> None:
    program, model, dtype, task = sys.argv[1:]
    if program == "ours":
        complete, block_size, vocab_size = ours_one(model, dtype) if task == "one" else ours_rollouts(model, dtype)
    elif program == "engine":
        complete, block_size, vocab_size = ours_one(model, dtype, "--engine=llama.cpp")
    else:
        complete, block_size, vocab_size = {"transformers": by_transformers, "llama.cpp": by_llama_cpp}[program](
            model, dtype
        )

    torch.manual_seed(0)
    n_read = min(N_READ, block_size // 2)
    lengths = [n_read] if task == "one" else PROMPT_LENGTHS

    def new_prompts() -> list[list[int]]:
        return [torch.randint(vocab_size, (length,)).tolist() for length in lengths]

    complete(new_prompts(), N_DECODED)
    both = statistics.median(seconds(complete, new_prompts(), 1 + N_DECODED) for _ in range(REPETITIONS))
    if task == "one":
        read = statistics.median(seconds(complete, new_prompts(), 1) for _ in range(REPETITIONS))
        figures = {"prefill": n_read / read, "decode": N_DECODED / (both - read)}
    else:
        figures = {"tokens_per_second": len(lengths) * N_COMPLETIONS * (1 + N_DECODED) / both}
    print("json", json.dumps(figures))


if __name__ == "__main__":
    main()
