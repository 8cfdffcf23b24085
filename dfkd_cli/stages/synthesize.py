"""``dfkd synthesize``: a teacher to a shard directory of data impressions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.io import encode_png
from torchvision.utils import make_grid

from dfkd_cli import catalog
from dfkd_cli.artifacts.files import write_atomic
from dfkd_cli.artifacts.metadata import read_metadata
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.artifacts.shards import MANIFEST, ShardReader, ShardWriter
from dfkd_cli.config import plain
from dfkd_cli.data.seal import sealed
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.directory import save_model
from dfkd_cli.models.generators import Generators, save_generators
from dfkd_cli.models.names import LoadedModel, architecture, locate
from dfkd_cli.resolve import Settings
from dfkd_cli.rounds import fit, write_csv
from dfkd_cli.stages.inputs import real_data
from dfkd_cli.stages.training import fresh, rehearse
from dfkd_cli.ui import Terminal

RARE = 0.05  # a class is rare that has less than this share of what it had if all had the same
PREVIEW = 4, 16  # rows of preview.png, each of as many images of one round
MADE_FROM_DATA = ("metadata",)  # of what methods need
# Inputs that some methods need and the others refuse: what is said where it lacks, and to do, and where it is refused.
OPTIONAL = {
    "student": ("a student", "give --student SPEC, such as lenet5-half", "has no student in the loop"),
    "metadata": ("metadata", "make it: dfkd collect-metadata, then --metadata metadata/", "uses no metadata"),
}


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Make impressions. No dataset can be opened meanwhile."""
    if "student" in settings.method.entry.needs and settings.run.devices * settings.run.num_nodes > 1:
        raise ConfigError("a student in the loop is trained by one process", "give --devices 1 --num-nodes 1")
    if dry_run:
        return rehearse(settings, run, terminal)
    with sealed("synthesize is data-free"):
        teacher = locate(settings.inputs.teacher, settings.inputs).open(settings.run.allow_code)
        check_needs(settings.method.entry, teacher.classifier, settings.inputs)
        given, parents = open_inputs(settings, teacher)
    with sealed("synthesize is data-free", real_data(teacher)):
        directory = RunDirectory(
            settings.out,
            settings,
            [teacher.parent("teacher"), *parents],
            {"data_free": True, "uses": uses(settings.method.entry)},
        )
        if directory.claim():
            directory.say_complete(terminal)
        else:
            with directory.guard():
                _make(settings, teacher, given, directory, terminal)
    metrics = directory.record["metrics"]
    terminal.answer(f"{directory.path}: {metrics['count']} images, mean teacher confidence {metrics['confidence']:.3f}")
    artifacts, concerns = {"shards": str(directory.path)}, directory.record["concerns"]
    return {"artifacts": artifacts, "metrics": metrics, "concerns": concerns}


def uses(entry: catalog.Entry) -> list[str]:
    """What the method takes that was made from real images: with it, images are not made from the teacher alone."""
    return [need for need in entry.needs if need in MADE_FROM_DATA]


def open_inputs(settings: Settings, teacher: LoadedModel) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Open what is given beside the teacher: arguments of the method, and parents of the run. A student is a new one.

    Raises:
        ArtifactError: Missing, damaged, or of another teacher.
    """
    inputs, how = settings.inputs, settings.run
    given: dict[str, Any] = {}
    parents = []
    if inputs.student is not None:
        info = dataclasses.replace(teacher.classifier.info, spec=inputs.student)
        given["student"] = fresh(info, "student", how.seed, how.allow_code)
        parents += architecture(inputs.student).parents
    if inputs.metadata is not None:
        given["metadata"], sha256 = read_metadata(Path(inputs.metadata), teacher.sha256)
        parents.append({"role": "metadata", "path": inputs.metadata, "sha256": sha256})
    return given, parents


def check_needs(entry: catalog.Entry, teacher: Classifier, inputs: Any) -> None:
    """Check what the method asks for.

    Raises:
        ConfigError: An input that the method has no use for, or none where it needs one.
        ArtifactError: The teacher lacks what the method needs; the message names methods that would work.
    """
    for name, (what, hint, refuses) in OPTIONAL.items():
        given = getattr(inputs, name) is not None
        if given and name not in entry.needs:
            raise ConfigError(f"--method {entry.name} {refuses}", f"leave out --{name}")
        if name in entry.needs and not given:
            raise ConfigError(f"--method {entry.name} needs {what}", hint)
    if "batchnorm" in entry.needs and not teacher.batch_norms():
        others = [name for name, e in catalog.entries("synthesizers").items() if "batchnorm" not in e.needs]
        raise ArtifactError(
            f"--method {entry.name} needs a teacher with BatchNorm, {teacher.info.spec} has none",
            f"these work without: {', '.join(others)}",
        )


def _make(
    settings: Settings, teacher: LoadedModel, given: dict[str, Any], directory: RunDirectory, terminal: Terminal
) -> None:
    config, info = settings.method.config, teacher.classifier.info
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
        "teacher": {"sha256": teacher.sha256, "spec": info.spec},
        "data_free": True,
        "uses": uses(settings.method.entry),
    }
    count = settings.inputs.num_images
    writer = ShardWriter(directory.path, head, -(-count // config.batch_size))
    processes = settings.run.devices * settings.run.num_nodes
    method = settings.method.entry.load()
    synthesizer = method(teacher.classifier, config, count, settings.run.seed, writer, processes, **given)
    fit(synthesizer, directory, terminal)
    writer.collect()
    manifest = writer.write_manifest()
    if synthesizer.stateless:
        rows = [{"round": index, **shard["terms"]} for index, shard in enumerate(manifest["shards"])]
        write_csv(directory.path / "metrics.csv", rows)
    reader = ShardReader(directory.path)
    write_preview(directory.path / "preview.png", reader)
    confidence = sum(float(reader.read(i)["logits"].softmax(1).amax(1).sum()) for i in range(len(reader.sizes)))
    files = [MANIFEST, "metrics.csv", "preview.png", *(row["file"] for row in manifest["shards"])]
    metrics = {
        "count": manifest["count"],
        "confidence": confidence / manifest["count"],
        "class_histogram": manifest["class_histogram"],
    }
    rare = rare_classes(metrics["class_histogram"], info.classes)
    if rare is not None and directory.concern(rare):
        terminal.say(f"warning: {rare}")
    for role, model in synthesizer.models().items():
        facts = {"command": "synthesize", "dataset": teacher.dataset, "teacher": teacher.sha256, "num_images": count}
        provenance = {**head, **facts}
        if isinstance(model, Generators):
            save_generators(directory.path / role, model, provenance)
        else:
            save_model(directory.path / role, model.eval(), metrics={}, provenance=provenance)
        files += [f"{role}/{file.name}" for file in sorted((directory.path / role).iterdir())]
    directory.finish([directory.path / name for name in files], metrics)


def rare_classes(histogram: Sequence[int], names: Sequence[str] | None = None) -> str | None:
    """What to say of classes that hardly any image has, by the teacher's answers. None without any, or of few images.

    Args:
        histogram: Images by class, for K classes.
        names: Of the classes.
    """
    count, classes = sum(histogram), len(histogram)
    limit = RARE * count / classes
    if limit < 1:
        return None  # of so few images a class may have none by chance
    rare = [(images, names[index] if names else f"class {index}") for index, images in enumerate(histogram)]
    rare = sorted((images, name) for images, name in rare if images < limit)
    if not rare:
        return None
    shown = ", ".join(f"{name}: {images}" for images, name in rare[:5]) + (", ..." if len(rare) > 5 else "")
    return f"{len(rare)} of {classes} classes have hardly any of the {count} images ({shown}): a student may miss them"


def write_preview(path: Path, reader: ShardReader) -> None:
    """A PNG grid of images from the first round, on top, to the last; the first of each, from evenly spaced rounds.

    Each image is stretched to the full range: impressions may leave [0,1]. What is neither grey nor RGB is shown as the
    mean of its channels.
    """
    rows, columns = PREVIEW
    shards = torch.linspace(0, len(reader.sizes) - 1, min(rows, len(reader.sizes))).round().int().tolist()
    images = torch.cat([reader.read(shard)["images"][: rows // len(shards) * columns] for shard in shards])
    images = images.float()
    images = images if images.shape[1] in (1, 3) else images.mean(1, keepdim=True)
    grid = make_grid(images, nrow=columns, padding=2, normalize=True, scale_each=True, pad_value=1.0)
    write_atomic(path, encode_png(grid.mul(255).round().byte()).numpy().tobytes())
