"""Train, or sample from, transformers' GPT2LMHeadModel; print what was measured as a line of JSON.

    python transformers_gpt2.py train|generate DEVICE OPTIONS

OPTIONS is JSON: the shape, and `steps` and `batch_size`, or `prompt`, `new` and `num_samples`.
"""

import json
import statistics
import sys
import time

import torch
import transformers

N_CHARACTERS = 65  # of shakespeare_char


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def train(model: torch.nn.Module, device: str, options: dict) -> dict[str, float]:
    """A plain training loop on random tokens, with AdamW: median ms of a step, and tokens a second."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    shape = (options["batch_size"], options["block_size"])
    times = []
    for _ in range(options["steps"]):
        synchronize(device)
        start = time.perf_counter()
        idx = torch.randint(options.get("vocab_size", N_CHARACTERS), shape, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(idx, labels=idx).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(time.perf_counter() - start)
    ms = 1e3 * statistics.median(times[min(5, options["steps"] // 2) :])
    return {"ms": ms, "tokens_per_second": shape[0] * shape[1] / ms * 1e3}


def generate(model: transformers.GPT2LMHeadModel, device: str, options: dict) -> dict[str, float]:
    """Sample `new` tokens after each of `num_samples` equal prompts: tokens a second."""
    model.eval()
    idx = torch.zeros(options["num_samples"], options["prompt"], dtype=torch.long, device=device)
    synchronize(device)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            idx,
            max_new_tokens=options["new"],
            min_new_tokens=options["new"],
            do_sample=True,
            temperature=0.8,
            top_k=200,
            pad_token_id=0,
        )
    synchronize(device)
    seconds = time.perf_counter() - start
    new_tokens = (output.shape[1] - options["prompt"]) * options["num_samples"]
    return {"tokens_per_second": new_tokens / seconds}


def main() -> None:
    task, device = sys.argv[1:3]
    options = json.loads(sys.argv[3])
    config = transformers.GPT2Config(
        vocab_size=options.get("vocab_size", N_CHARACTERS),
        n_positions=options["block_size"],
        n_embd=options["n_embd"],
        n_layer=options["n_layer"],
        n_head=options["n_head"],
        bos_token_id=0,
        eos_token_id=None,
        resid_pdrop=options["dropout"],
        embd_pdrop=options["dropout"],
        attn_pdrop=options["dropout"],
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).to(device)  # type: ignore[arg-type]
    measure = {"train": train, "generate": generate}[task]
    print(json.dumps(measure(model, device, options)))


if __name__ == "__main__":
    main()
