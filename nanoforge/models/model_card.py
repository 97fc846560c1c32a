"""README.md of an exported model: what it was trained on, with which arguments, to which losses, and how to load it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nanoforge.data import hub
from nanoforge.errors import UserError
from nanoforge.files import read_text, write_text
from nanoforge.models.hf_export import Written
from nanoforge.run_dir import METRICS_FILE, RECORD_FILE, RunRecord, run_of_checkpoint

LEFT_OUT = ("out_dir", "dataset", "init_from")  # arguments that a section of its own has, or that name places
LICENCE_KEYS = ("license", "license_name", "license_link")


def write_card(to: Path, source: Path, written: Written) -> None:
    """Write README.md. source: the checkpoint or the folder that the weights came from."""
    record = RunRecord.load(source) if (source / RECORD_FILE).exists() else RunRecord({})
    base = base_of(record) if record.args else source
    parts = [front_matter(base), title(to, record, base), how_to_load(written)]
    if record.args:
        parts += [data_section(record), losses_section(source), arguments_section(record)]
    write_text(to / "README.md", "\n".join(part for part in parts if part))


def base_of(record: RunRecord) -> Path | None:
    """The model that a run began with: a name on the hub or a path; None for a run from scratch."""
    source = record.base.get("source") or record.args.get("init_from", "scratch")
    return None if source in ("scratch", "resume") else Path(source)


def front_matter(base: Path | None) -> str:
    """What the hub reads: the licence of the base goes on."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- nanoforge"]
    if base is not None:
        if not base.exists():  # a name on the hub
            lines.append(f"base_model: {str(base).partition('@')[0]}")
        lines += [f"{key}: {value}" for key, value in licence_of(base).items()]
    return "\n".join(("---", *lines, "---", ""))


def licence_of(base: Path) -> dict[str, str]:
    """The licence in the front matter of a model's README.md, if that is at hand."""
    try:
        folder = hub.fetch(str(base), ["README.md"]) if hub.is_hub_name(str(base)) else base
        lines = read_text(folder / "README.md").split("\n")
    except UserError:
        return {}
    if lines[0] != "---" or "---" not in lines[1:]:
        return {}
    settings = dict(line.partition(": ")[::2] for line in lines[1 : lines.index("---", 1)])
    return {key: settings[key] for key in LICENCE_KEYS if key in settings}


def title(to: Path, record: RunRecord, base: Path | None) -> str:
    """What the model is, in a line."""
    if not record.args:
        begin = f"Converted from {base.name if base else 'weights'}"
    elif base is None:
        begin = "Trained from scratch"
    else:
        name = (run_of_checkpoint(base) or base).name  # of a checkpoint it is its run's
        begin = f"Trained by {record.args.get('objective', '')} from {name}"
    return f"# {to.absolute().name}\n\n{begin} with nanoforge.\n"


def how_to_load(written: Written) -> str:
    """Python that loads the model."""
    trust = ", trust_remote_code=True" if written.family is None else ""
    tokenizer = f'\ntokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER"{trust})' if written.has_tokenizer else ""
    context = written.config.get("max_position_embeddings") or written.config.get("n_positions")
    context = context or written.config["gpt"]["block_size"]
    notes = f"{written.n_parameters:,} parameters, context {context:,}."
    if written.family is None:
        notes += " No class of transformers has this architecture: its source, three files, goes along."
    if not written.has_tokenizer:
        notes += " Its tokenizer is not known."
    return (
        f"{notes}\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER"{trust}){tokenizer}\n```\n'
    )


def data_section(record: RunRecord) -> str:
    """Names of the datasets and the hashes of their files."""
    lines = [f"- {dataset}" for dataset in record.data]
    return "\n".join(("## Data", "", *lines, "")) if lines else ""


def losses_section(source: Path) -> str:
    """The losses at the last evaluation before the checkpoint."""
    losses = last_evaluation(source)
    if not losses:
        return ""
    lines = [f"| {name} | {value:.4f} |" for name, value in losses.items()]
    return "\n".join(("## Losses", "", "| metric | value |", "|---|---|", *lines, ""))


def last_evaluation(source: Path) -> dict[str, float]:
    """The metrics of the last evaluation up to a checkpoint's step."""
    run_folder = run_of_checkpoint(source)
    if run_folder is None or not (run_folder / METRICS_FILE).exists():
        return {}
    found: Mapping[str, Any] = {}
    for line in read_lines(run_folder / METRICS_FILE):
        if line.get("event") == "eval" and line["step"] <= int(source.name):
            found = line
    return {
        name: value
        for name, value in found.items()
        if name.startswith(("step", "train_loss", "val_loss", "bits_per_byte")) and isinstance(value, int | float)
    }


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; the last one may be cut."""
    for line in read_text(path).splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def arguments_section(record: RunRecord) -> str:
    """All arguments of the run, as a config, but for paths of the machine that it ran on."""
    args = {
        name: value
        for name, value in record.args.items()
        if name not in LEFT_OUT and not (isinstance(value, str) and Path(value).is_absolute())
    }
    return f"## Arguments\n\n```json\n{json.dumps(args, indent=1)}\n```\n"
