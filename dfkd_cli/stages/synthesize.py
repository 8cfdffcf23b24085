"""``dfkd synthesize``: a teacher to a shard directory of data impressions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchvision.io import encode_png
from torchvision.utils import make_grid

from dfkd_cli import catalog
from dfkd_cli.artifacts.files import write_atomic
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.artifacts.shards import MANIFEST, ShardReader, ShardWriter
from dfkd_cli.config import plain
from dfkd_cli.data.seal import sealed
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.resolve import Settings
from dfkd_cli.rounds import fit, write_csv
from dfkd_cli.stages.inputs import load_teacher
from dfkd_cli.stages.training import rehearse
from dfkd_cli.ui import Terminal

PREVIEW = 64  # images in preview.png


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Make impressions. No dataset can be opened meanwhile."""
    if dry_run:
        return rehearse(settings, run, terminal)
    with sealed("synthesize is data-free"):
        teacher = load_teacher(settings.inputs, settings.run.allow_code)
        check_needs(settings.method.entry, teacher.classifier, settings.inputs.student)
    with sealed("synthesize is data-free", teacher.real_data()):
        directory = RunDirectory(
            Path(settings.run.out or "shards"), settings, [teacher.parent("teacher")], {"data_free": True}
        )
        if directory.claim():
            terminal.say(f"{directory.path} is already complete")
        else:
            with directory.guard():
                _make(settings, teacher.classifier, teacher.sha256, directory, terminal)
    metrics = directory.record["metrics"]
    terminal.answer(f"{directory.path}: {metrics['count']} images, mean teacher confidence {metrics['confidence']:.3f}")
    return {"artifacts": {"shards": str(directory.path)}, "metrics": metrics}


def check_needs(entry: catalog.Entry, teacher: Classifier, student: str | None) -> None:
    """Check what the method asks for.

    Raises:
        ConfigError: A student for a method that has none in its loop, or none for one that has.
        ArtifactError: The teacher lacks what the method needs; the message names methods that would work.
    """
    if (student is not None) != ("student" in entry.needs):
        wants = "needs a student" if student is None else "has no student in the loop"
        raise ConfigError(f"--method {entry.name} {wants}", "give or leave out --student")
    if "batchnorm" in entry.needs and not teacher.batch_norms():
        others = [name for name, e in catalog.entries("synthesizers").items() if "batchnorm" not in e.needs]
        raise ArtifactError(
            f"--method {entry.name} needs a teacher with BatchNorm, {teacher.info.spec} has none",
            f"these work without: {', '.join(others)}",
        )


def _make(settings: Settings, teacher: Classifier, sha256: str, directory: RunDirectory, terminal: Terminal) -> None:
    config, info = settings.method.config, teacher.info
    head = {
        "method": settings.method.entry.name,
        "config": plain(config),
        "seed": settings.run.seed,
        "precision": settings.run.precision,
        "space": "pixel",
        "shape": list(info.input_size),
        "dtype": config.dtype,
        "num_classes": info.num_classes,
        "classes": info.classes and list(info.classes),
        "teacher": {"sha256": sha256, "spec": info.spec},
        "data_free": True,
    }
    count = settings.inputs.num_images
    writer = ShardWriter(directory.path, head, -(-count // config.batch_size))
    processes = settings.run.devices * settings.run.num_nodes
    method = settings.method.entry.load()
    fit(method(teacher, config, count, settings.run.seed, writer, processes), directory, terminal)
    writer.collect()
    manifest = writer.write_manifest()
    write_csv(directory.path / "metrics.csv", [{"round": i, **r["terms"]} for i, r in enumerate(manifest["shards"])])
    reader = ShardReader(directory.path)
    write_preview(directory.path / "preview.png", reader.read(0)["images"][:PREVIEW])
    confidence = sum(float(reader.read(i)["logits"].softmax(1).amax(1).sum()) for i in range(len(reader.sizes)))
    files = [MANIFEST, "metrics.csv", "preview.png", *(row["file"] for row in manifest["shards"])]
    metrics = {
        "count": manifest["count"],
        "confidence": confidence / manifest["count"],
        "class_histogram": manifest["class_histogram"],
    }
    directory.finish([directory.path / name for name in files], metrics)


def write_preview(path: Path, images: torch.Tensor) -> None:
    """A PNG grid of images (B, C, H, W), each stretched to the full range of grey: impressions may leave [0,1]."""
    grid = make_grid(images.float(), nrow=16, padding=2, normalize=True, scale_each=True, pad_value=1.0)
    write_atomic(path, encode_png(grid.mul(255).round().byte()).numpy().tobytes())
