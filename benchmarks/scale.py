"""The tables of docs/scale.md: what a run would need on H100s or H200s, from the model's own counts and a few constants.

    python -m benchmarks.scale

On paper: nothing here is measured. The constants are those below; the formulas are explained in docs/scale.md.
"""

import torch

from model import GPT, GPTConfig

PEAK, UTILISATION = 989e12, 0.42  # dense bfloat16 FLOP/s of an H100 or H200; the share that one GPU reaches
NVLINK, NETWORK, NODE = (
    350e9,
    40e9,
    8,
)  # bytes/s that a ring gets out of NVLink; out of each GPU's 400 Gb/s network card; GPUs in a node
MODELS = {  # shape, tokens of a step
    "124M": (GPTConfig(vocab_sizes=(50304,), n_layer=12, n_head=12, n_embd=768, block_size=1024, bias=False), 2**19),
    "1.5B": (GPTConfig(vocab_sizes=(50304,), n_layer=48, n_head=25, n_embd=1600, block_size=1024, bias=False), 2**20),
    "7B": (
        GPTConfig(
            vocab_sizes=(50304,),
            n_layer=32,
            n_head=32,
            n_embd=4096,
            block_size=4096,
            bias=False,
            position="rope",
            tie_weights=False,
        ),
        2**22,
    ),
}
GPUS = (1, 8, 16, 64, 128, 512)


def transfer(bytes_: float, gpus: int) -> float:
    """Seconds of one pass of a ring over all ranks (a reduce-scatter or an all-gather): NVLink within a node, each GPU's card between nodes."""
    return bytes_ * (gpus - 1) / gpus / (NVLINK if gpus <= NODE else NETWORK * NODE)


def main() -> None:
    print(
        "| model | parameters | GFLOP a token | weights, gradients, AdamW | bfloat16 weights of a step | activations of 1,024 tokens | the same, checkpointed | logits of 1,024 tokens |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (config, _) in MODELS.items():
        with torch.device("meta"):
            model = GPT(config)
        N, C, L, V = model.count_parameters(), config.n_embd, config.n_layer, sum(config.vocab_sizes)
        sizes = (16 * N, 2 * N, 32 * C * L * 1024, (2 * C * L + 32 * C) * 1024, 14 * V * 1024)
        print(
            f"| {name} | {N / 1e6:,.0f} M | {model.flops_per_token() / 1e9:.2f} | "
            + " | ".join(f"{size / 1e9:.2f} GB" for size in sizes)
            + " |"
        )
    print()
    print("| model | tokens a step | " + " | ".join(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS) + " |")
    print("|---" * (2 + len(GPUS)) + "|")
    for name, (config, step) in MODELS.items():
        with torch.device("meta"):
            model = GPT(config)
        N, cells = model.count_parameters(), []
        for gpus in GPUS:
            compute = step * model.flops_per_token() / (gpus * PEAK * UTILISATION)
            ddp = 2 * transfer(4 * N, gpus)  # gradients in float32, summed once a step
            fits = 18 * N < 120e9
            fsdp = 2 * transfer(2 * N, gpus) + transfer(
                4 * N, gpus
            )  # weights gathered in bfloat16 twice, gradients scattered in float32
            waits = max(0.0, (ddp if fits else fsdp) - 2 / 3 * compute)  # hidden behind backward, two thirds of a step
            day = 86400 * step / (compute + waits) / 1e9
            small = step / config.block_size < gpus
            cells.append(
                "too few sequences"
                if small
                else "does not fit"
                if gpus == 1 and not fits
                else f"{day:,.1f} G ({compute / (compute + waits):.0%}, {'DDP' if fits else 'FSDP'})"
            )
        print(f"| {name} | {step:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
