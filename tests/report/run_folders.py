"""Run folders as train.py writes them, with a hostile text for the page to show as text."""

from collections.abc import Callable

from model import GPT, GPTConfig

N_STEPS, TOKENS_PER_STEP = 20, 64
HOSTILE = (
    "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    "<b>\x1b[31m\u202egnp.exe\u2066\u200b\ud800 $x_$ {{data}} &lt;"
)


def tiny_model(n_embd: int) -> GPT:
    return GPT(GPTConfig(vocab_sizes=(40,), block_size=8, n_layer=2, n_head=2, n_embd=n_embd))


def falling_loss(step: int) -> float:
    return 2 + 2 / (1 + step)


def metrics_lines(loss: Callable[[int], float], eval_metrics: dict, note: str) -> list[dict]:
    lines = []
    for step in range(N_STEPS + 1):
        common = {"step": step, "seconds": step / 10}
        if step % 5 == 0:
            lines.append({"event": "eval", **common, "train_loss": loss(step), "val_loss": loss(step)} | eval_metrics)
        if step:
            train = {"loss": loss(step), "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 640.0}
            lines.append({"event": "train", **common, **train, "tokens": TOKENS_PER_STEP * step})
    lines.append({"event": "save", "step": 15, "seconds": 2.0})
    if note:
        lines.append({"event": "note", "step": N_STEPS, "seconds": 2.0, "text": note})
    return lines
