"""Write what a run saved in a form for elsewhere:

    python export.py hf out/run --to=DIR [--dtype=bfloat16] [--max_shard_size=5GB]
    python export.py gguf out/run [--type=q8_0] [--to=out/run.gguf]
    python export.py consolidate out/run/checkpoints/000040 [--dtype=bfloat16] [--to=out/weights]
    python export.py merge out/lora --to=out/merged
    python export.py peft out/lora --to=out/adapter

hf: a model that transformers loads without this program: AutoModelForCausalLM and AutoTokenizer (docs/export.md).
gguf: a file that llama.cpp runs, with the model and its tokenizer (docs/export.md).
consolidate: the shards of an FSDP run as one model.safetensors, beside them or in another folder. This runs on the CPU;
the file is read back and compared with the shards.
merge: a LoRA merged into its base, as weights for --init_from.
peft: a LoRA or a soft prompt in the layout of the `peft` library, for the model of transformers with the same base.
The folder is a checkpoint's, or a run's: its best checkpoint (consolidate: its last).
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import configurator
from common_args import BASE_MODEL_HELP
from configurator import Rules, arg, arg_table

ACTIONS = ("hf", "gguf", "consolidate", "merge", "peft")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


@arg_table
class ExportArgs:
    """export"""

    to: str = arg(
        "",
        "folder to write to (consolidate without it: the checkpoint's own); gguf: the file, without it "
        "FOLDER-TYPE.gguf",
        path=True,
    )
    base_model: str = arg("", BASE_MODEL_HELP, path=True)
    dtype: str = arg("float32", "dtype of the weights written", choices=("float32", "bfloat16", "float16"))
    type: str = arg("f16", "gguf: type of its matrices", choices=GGUF_TYPES)
    max_shard_size: str = arg("5GB", "hf: size above which the weights become several files, such as 500MB")


class Request(NamedTuple):
    action: str
    folder: str
    args: ExportArgs


def parse(argv: list[str]) -> Request:
    """ACTION FOLDER and flags; exits with status 2 on errors."""
    if argv and argv[0].startswith(("--help", "-h", "--completion")):
        configurator.parse(ExportArgs, argv, __doc__)
    if len(argv) < 2 or argv[0] not in ACTIONS or argv[1].startswith("-"):
        configurator.exit_with_errors([f"usage: export.py ACTION FOLDER; actions: {', '.join(ACTIONS)}; see --help"])
    action, folder, *flags = argv
    rules = Rules(check=lambda args, source: list(action_errors(args, source, action)))
    return Request(action, folder, configurator.parse(ExportArgs, flags, __doc__, rules))


def action_errors(args: ExportArgs, source: dict[str, str], action: str) -> Iterator[str]:
    """Errors of flags that don't go with the action."""
    given = {name for name, place in source.items() if place != configurator.DEFAULT}
    if action not in ("consolidate", "gguf") and not args.to:
        yield f"--to: {action} needs a folder to write to"
    if action == "gguf" and args.to and not args.to.endswith(".gguf"):
        yield f"--to={args.to}: gguf writes one file; end its name with .gguf"
    if action == "gguf" and "dtype" in given:
        yield "--dtype: has no effect with gguf; use --type"
    if action == "consolidate" and args.base_model:
        yield "--base_model: has no effect with consolidate"
    for name, only in (("type", "gguf"), ("max_shard_size", "hf")):
        if name in given and action != only:
            yield f"--{name}: has an effect only with {only}"


if __name__ == "__main__":
    configurator.exit_on_interrupt()
    REQUEST = parse(sys.argv[1:])

import dataclasses
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import model as model_module
from builders import known_fields
from model import GPTConfig
from nanoforge import files
from nanoforge.data import tokenization, tokenizer_export
from nanoforge.errors import UserError
from nanoforge.files import atomic_write
from nanoforge.models import gguf_export, hf_export, model_card, peft_export, pretrained
from nanoforge.posttraining import prompt_format
from nanoforge.posttraining.example_rows import ROLES
from nanoforge.run_dir import RunRecord, run_of_checkpoint
from nanoforge.training import checkpoint
from train_args import TrainArgs


def main(request: Request) -> None:
    folder, to = Path(request.folder), Path(request.args.to)
    dtype = getattr(torch, request.args.dtype)
    note = ""
    if request.action == "hf":
        export_hf(folder, to, request.args)
        return
    if request.action == "gguf":
        path, note = export_gguf(folder, request.args)
    elif request.action == "consolidate":
        path, note = consolidate(folder, to if request.args.to else None, dtype)
    elif request.action == "merge":
        path = merge(folder, to, dtype, request.args.base_model)
    else:
        path, note = export_peft(folder, to, dtype, request.args.base_model)
    print(f"{path}: {path.stat().st_size / 2**20:,.1f} MB{note}")


def prepare(to: Path) -> None:
    """Create the folder to write to. Raises UserError when it is that of a run or a checkpoint."""
    if (to / "checkpoints").exists() or (to / "progress.json").exists():
        raise UserError(f"--to={to}: holds a run or a checkpoint, whose files this would replace; use another folder")
    to.mkdir(parents=True, exist_ok=True)


def find_checkpoint(folder: Path, name: str) -> Path:
    """The checkpoint in a folder, or of that name in a run's folder; verified. Raises UserError."""
    if (folder / "checkpoints").is_dir():
        return checkpoint.resolve(folder, name)
    error = checkpoint.verify(folder)
    if error:
        raise UserError(error)
    return folder


def consolidate(folder: Path, to: Path | None, dtype: torch.dtype) -> tuple[Path, str]:
    """Write model.safetensors from the shards in model/, and list it in a manifest; its path, and what was done.

    to: a folder for it, which --init_from takes; None: the checkpoint. Raises UserError.
    """
    folder = find_checkpoint(folder, "last")
    shards = checkpoint.load_tensors(folder, "model")
    to = to or folder
    path = to / "model.safetensors"
    if to == folder and not (folder / "model").is_dir():
        return path, "; it is whole already, nothing to consolidate"
    if to != folder:
        prepare(to)
    with atomic_write(path) as tmp_path:
        save_file({name: tensor.to(dtype) for name, tensor in shards.items()}, tmp_path)
        with safe_open(tmp_path, framework="pt") as file:
            if set(file.keys()) != set(shards):
                raise SystemExit(f"{path}: the names written differ from those in the shards")
            for name in shards:
                if not torch.equal(file.get_tensor(name), shards[name].to(dtype)):
                    raise SystemExit(f"{path}: {name} as written differs from the shards")
    if to != folder:
        for name in checkpoint.COPIED_FILES:
            (to / name).write_bytes((folder / name).read_bytes())
    checkpoint.write_manifest(to)
    return path, ", compared with the shards"


def load_whole(folder: Path, base_model: str) -> tuple[hf_export.HFModel, Path]:
    """A model, with an adapter merged into it, and where its weights came from. Raises UserError."""
    try:
        loaded = pretrained.load(str(folder), base_model=base_model)
    except UserError as error:
        raise UserError(str(error).removeprefix("--init_from=")) from None  # the folder is no flag here
    shape = dataclasses.asdict(GPTConfig(**known_fields(loaded.shape, str(folder))))
    tokenizer = hf_export.only_tokenizer(loaded.tokenizers)
    return hf_export.HFModel(shape, loaded.weights, tokenizer), Path(loaded.source)


def default_gguf(folder: Path, kind: str) -> Path:
    """A file beside a run, named after it, or beside a folder or file of weights; of a name on the hub, here."""
    if not folder.exists():
        return Path(f"{folder.name}-{kind}.gguf")
    place = folder.absolute().resolve()
    run_folder = run_of_checkpoint(place)
    if run_folder is not None:
        return run_folder.with_name(f"{run_folder.name}-{place.name}-{kind}.gguf")
    return place.with_name(f"{place.name.removesuffix('.gguf')}-{kind}.gguf")


def export_gguf(folder: Path, args: ExportArgs) -> tuple[Path, str]:
    """Write a .gguf file; its path, and what it is. Raises UserError."""
    path = Path(args.to) if args.to else default_gguf(folder, args.type)
    if path.exists():
        raise UserError(f"--to={path}: exists already; delete it, or give another name")
    model, _ = load_whole(folder, args.base_model)
    template = tokenizer_export.chat_template_of(model.tokenizer, ROLES) if model.tokenizer is not None else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    architecture = gguf_export.export(model, path, args.type, template)
    return path, f", a {architecture} for llama.cpp"


def export_hf(folder: Path, to: Path, args: ExportArgs) -> None:
    """Write a model, its tokenizer and its card in Hugging Face's layout. Raises UserError."""
    max_bytes = hf_export.parse_size(args.max_shard_size)
    model, source = load_whole(folder, args.base_model)
    program = hf_export.Program(files.read_text(Path(model_module.__file__)), vars(TrainArgs))
    prepare(to)
    hf_export.refuse_existing_model(to)
    if model.tokenizer is not None:
        tokenizer_export.write_tokenizer(to, model.tokenizer, model.shape["block_size"], ROLES)
    written = hf_export.write_model(to, model, program, getattr(torch, args.dtype), max_bytes)
    model_card.write_card(to, source, written)
    print(f"{to}: {written.description}")


def find_lora(folder: Path) -> tuple[Path, RunRecord]:
    """The checkpoint of a LoRA, and the record of its run. Raises UserError."""
    folder = find_checkpoint(folder, "best")
    record = RunRecord.load(folder)
    if record.args.get("adapter") != "lora":
        raise UserError(f"{folder}: not a run with --adapter=lora")
    return folder, record


def merge(folder: Path, to: Path, dtype: torch.dtype, base_model: str) -> Path:
    """Write the base with the LoRA merged into it, its tokenizer, and a record with its shape. Raises UserError."""
    folder, record = find_lora(folder)
    weights = pretrained.load_checkpoint(folder, base_model=base_model).weights
    prepare(to)
    path = to / "model.safetensors"
    checkpoint.write_tensors(path, {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()})
    dataclasses.replace(record, args=record.args | {"adapter": "none"}, base={}).save(to)
    (to / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    checkpoint.write_manifest(to)
    return path


def export_peft(folder: Path, to: Path, dtype: torch.dtype, base_model: str) -> tuple[Path, str]:
    """Write an adapter for the `peft` library; its path, and what the base needs before. Raises UserError."""
    folder = find_checkpoint(folder, "best")
    record = RunRecord.load(folder)
    if record.args.get("adapter", "none") == "none":
        raise UserError(f"{folder}: not a run with --adapter=lora or --adapter=soft_prompt")
    source = record.base["source"]
    if base_model:
        source = pretrained.load_base(folder, record, base_model=base_model).source
    (tokenizer,) = tokenization.load(folder / "tokenizer.json").values()
    shape = GPTConfig(**known_fields(pretrained.shape_of_record(record), str(folder)))
    adapter = peft_export.Adapter(
        record=record,
        weights=checkpoint.load_tensors(folder, "model"),
        shape=dataclasses.asdict(shape),
        tokenizer=tokenizer,
        source=source,
        prompt_is_first=prompt_is_first(record.args["prompt_format"]),
    )
    prepare(to)
    return peft_export.write_adapter(to, adapter, dtype)


def prompt_is_first(template: str) -> bool:
    """Whether a prompt format has its virtual tokens before everything else."""
    pieces = prompt_format.parse(template).pieces if template else ()
    is_virtual = [isinstance(piece, prompt_format.VirtualTokens | prompt_format.InitText) for piece in pieces]
    return is_virtual == sorted(is_virtual, reverse=True)


if __name__ == "__main__":
    configurator.run(main, REQUEST)
