"""How fast answers are drawn: all at once with the cache, against one prompt at a time without it, the same tokens.

python -m benchmarks.rollouts [--prompts=32] [--tokens=64]
"""

import argparse
import json
import time
from pathlib import Path

import torch

from model import GPT, GPTConfig
from nanoforge.models import generation


def main(prompts: int, tokens: int, rounds: int) -> dict:
    """A 10.6 M parameter GPT with random weights, prompts of 16 to 64 tokens, likeliest answers; medians of the rounds, which take turns."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_sizes=(256,), n_layer=6, n_head=6, n_embd=384, block_size=256, bias=False)).eval()
    given = [torch.randint(256, (16 + 48 * i // max(1, prompts - 1),)).tolist() for i in range(prompts)]
    generator, speeds, same = torch.Generator(), [], True
    greedy = generation.SamplingParams(max_new_tokens=tokens, temperature=0)
    for _ in range(rounds):
        begin = time.perf_counter()
        answers = generation.generate_batch(model, given, greedy)
        together = prompts * tokens / (time.perf_counter() - begin)
        begin = time.perf_counter()
        some = given[:: max(1, prompts // 4)]
        for number, prompt in enumerate(some):
            alone = generation.generate(model, torch.tensor([prompt]), greedy, generator, decode="uncached")[
                0, len(prompt) :
            ].tolist()
            same &= alone == answers[number * max(1, prompts // 4)].ids
        apart = len(some) * tokens / (time.perf_counter() - begin)
        speeds.append((together, apart))
        print(
            f"together {together:,.0f} tokens/s, one at a time without a cache {apart:,.0f}: {together / apart:.1f} x; the same tokens: {same}"
        )
    ratios = sorted(a / b for a, b in speeds)
    return {
        "together": [a for a, _ in speeds],
        "apart": [b for _, b in speeds],
        "median_ratio": ratios[len(ratios) // 2],
        "same_tokens": same,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    told = main(**vars(parser.parse_args()))
    Path(__file__).with_name("rollouts_cpu.json").write_text(json.dumps(told, indent=1) + "\n")
