"""The README.md of a model that is published: who taught it, which data it never saw, its figures, how to load it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dfkd_cli.artifacts.integrity import read_run
from dfkd_cli.config import dump_yaml
from dfkd_cli.models.directory import RECORD, read_record
from dfkd_cli.urls import each_text

TAGS = ["dfkd", "knowledge-distillation", "image-classification"]


def model_card(directory: Path, url: str, portable: Callable[[str], str]) -> str | None:
    """The text for a model directory that lies at a URL, in Markdown; None for what is no model.

    Args:
        directory: The model's.
        url: Where it is published.
        portable: What is said elsewhere instead of a name that may be a path of this machine.
    """
    if not (directory / RECORD).is_file():
        return None
    record = read_record(directory)
    made, says = read_run(directory), each_text(record.get("provenance", {}), portable)
    free = bool(says.get("data_free"))
    head = {
        "library_name": "dfkd",
        "pipeline_tag": "image-classification",
        "tags": [*TAGS, *(["data-free"] if free else [])],
    }
    spec, size = portable(record["spec"]), "x".join(map(str, record["input_size"]))
    paragraphs = [
        f"---\n{dump_yaml(head)}---",
        f"# {url.rstrip('/').rpartition('/')[2]}",
        f"`{spec}`: a classifier of {record['num_classes']} classes; it takes {size} pixels in [0,1].",
        *_origin(says, made, free),
        *_figures(record.get("metrics", {})),
        "To evaluate it, or to teach others with it:",
        f"```\ndfkd evaluate {url}\ndfkd distill --teacher {url} --transfer-set shards/\n```",
        "In PyTorch:",
        f"```\ndfkd cp {url} model/\n```",
        "```python\nfrom pathlib import Path\nfrom dfkd_cli.models.directory import load_model\n\n"
        'model, record = load_model(Path("model"))\n'
        f"logits = model.eval()(pixels)  # float32 (B, {', '.join(map(str, record['input_size']))}) in [0,1]\n```",
        f"Weights: `model.safetensors`, sha256 `{record['weights']['sha256']}`; `files.json` has that of every file.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _origin(says: Mapping[str, Any], made: Mapping[str, Any], free: bool) -> list[str]:
    """Who taught it from what, and which data it never saw."""
    dataset = says.get("dataset") or "its teacher's training images"
    if "teacher" not in says:
        return [f"It was trained on {says['dataset']}."] if says.get("dataset") else []
    taught = f"It learned from a teacher, sha256 `{says['teacher']}`, with {says.get('num_images', 'its')} images"
    sets = [str(parent.get("sha256", parent.get("spec"))) for parent in made.get("parents", ())
            if parent.get("role") == "transfer-set"]  # fmt: skip
    taught += f" (`{'`, `'.join(sets)}`)." if sets else "."
    if not free:
        return [taught, f"Real images were read for it; the teacher's dataset is {dataset}."]
    uses = [f"What was made from real images and used for them: {', '.join(says['uses'])}."] if says.get("uses") else []
    sealed = f" (sealed: {made['sealed']})" if made.get("sealed") else ""
    return [taught, f"**It has never seen the data**: {dataset}. No dataset could be opened meanwhile{sealed}.", *uses]


def _figures(metrics: Mapping[str, Any]) -> list[str]:
    """What was measured, as a table."""
    rows = [f"| {name} | {value:.6g} |" for name, value in metrics.items() if isinstance(value, (int, float))]
    return ["\n".join(["| MEASURED | VALUE |", "| :-- | --: |", *rows])] if rows else []
