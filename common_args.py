"""Arguments that several commands share, and their checks. Imports no torch."""

from collections.abc import Iterator
from typing import Any

from configurator import arg, arg_group, with_value
from nanoforge.data import hub

CHAT_TEMPLATE_HELP = (
    "jinja file, or a folder's chat_template.jinja, with which chats become tokens (none: the model's own)"
)
BASE_MODEL_HELP = "place of the base weights of a LoRA or a soft prompt, if they have moved; compared by their hash"
FROM_RUN = with_value("init_from", "resume")


@arg_group
class LoadArgs:
    """model"""

    out_dir: str = arg("out", "run folder", needs=FROM_RUN, path=True)
    checkpoint: str = arg("best", "checkpoint of the run: best, last or a step", needs=FROM_RUN)
    init_from: str = arg(
        "resume",
        "resume (the run in out_dir), ORG/NAME[@REVISION] of a model on the Hugging Face hub, "
        f"{'|'.join(hub.GPT2_NAMES)}, or a PATH to weights",
        path=True,
    )
    base_model: str = arg("", BASE_MODEL_HELP, path=True)
    chat_template: str = arg("", CHAT_TEMPLATE_HELP, alias=("chat_template_path",), path=True)
    chat_template_kwargs: dict[str, Any] = arg(
        {}, 'variables of the chat template as JSON, such as {"enable_thinking": false}'
    )


@arg_group
class DeviceArgs:
    """system"""

    device: str = arg("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = arg(
        "auto",
        "mixed precision: dtype of activations and matrix products; weights stay float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )


def load_errors(args: LoadArgs) -> Iterator[str]:
    """Errors of --checkpoint, --init_from and --base_model."""
    if args.checkpoint not in ("best", "last") and not args.checkpoint.isdecimal():
        yield f"--checkpoint={args.checkpoint}: must be best, last or a step"
    error = hub.source_error(args.init_from, ("resume", *hub.GPT2_NAMES))
    if error:
        yield f"--init_from={args.init_from}: {error}"
    yield from base_model_errors(args.base_model)


def base_model_errors(base_model: str) -> Iterator[str]:
    """Errors of --base_model."""
    error = hub.source_error(base_model, hub.GPT2_NAMES) if base_model else ""
    if error:
        yield f"--base_model={base_model}: {error}"


def device_errors(args: DeviceArgs) -> Iterator[str]:
    """Errors of --device."""
    kind, _, index = args.device.partition(":")
    is_cuda_index = kind == "cuda" and index.isdigit()
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not is_cuda_index):
        yield f"--device={args.device}: must be auto, cpu, cuda, cuda:N or mps"
