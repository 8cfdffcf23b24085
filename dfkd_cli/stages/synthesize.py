"""Make data impressions from a teacher, without data.

Reads a teacher, writes a shard directory (shards/). The flags of a method: dfkd synthesize --method NAME --help
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torchvision.io import encode_png
from torchvision.transforms import v2
from torchvision.utils import make_grid

from dfkd_cli import catalog
from dfkd_cli.artifacts.files import digest, write_atomic
from dfkd_cli.artifacts.metadata import read_metadata
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.artifacts.shards import MANIFEST, ShardReader, ShardWriter, as_pixels
from dfkd_cli.catalog import Choice, Command
from dfkd_cli.config import option
from dfkd_cli.data.seal import check_kept, kept, kept_by, sealed
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.adapter import require_gradients
from dfkd_cli.models.attention import attention_layers
from dfkd_cli.models.classifier import Classifier, is_batch_norm
from dfkd_cli.models.directory import FILES as MODEL_FILES
from dfkd_cli.models.directory import save_model
from dfkd_cli.models.generators import FILES as GENERATOR_FILES
from dfkd_cli.models.generators import Generators, save_generators
from dfkd_cli.models.names import LoadedModel, architecture, locate
from dfkd_cli.models.statistics import batch_moments
from dfkd_cli.options import MOST_IMAGES, ForeignModel, Limited, PerClass
from dfkd_cli.rounds.curves import write_csv
from dfkd_cli.rounds.deadline import Deadline
from dfkd_cli.rounds.trainer import fit
from dfkd_cli.settings import Settings
from dfkd_cli.stages.inputs import real_data, wanted_images
from dfkd_cli.stages.snapshots import Snapshots
from dfkd_cli.stages.training import fresh, manifest_head, rehearse, taught_by
from dfkd_cli.synthesizers.base import AS_STORED, ImageOptimizer, SynthesisTask, Synthesizer
from dfkd_cli.ui import Terminal


@dataclass(frozen=True, kw_only=True)
class Inputs(Limited, PerClass, ForeignModel):
    """What is read, and how."""

    teacher: str = option("teacher", "teacher: model directory or SPEC", parent=True)
    num_images: int = option(8000, "images to make", low=1, high=MOST_IMAGES, rehearsal=2)
    student: str | None = option(None, "student SPEC, for methods with a student in the loop")
    snapshots: int = option(0, "keep that student's weights of so many evenly spaced rounds, for a look back", low=0)
    # Volatile: what decides the result is what the directory holds, by hash.
    metadata: str | None = option(None, "metadata directory, for methods that use metadata", volatile=True)


def data_free(_: Inputs) -> bool:
    """No dataset may be opened, whatever is read."""
    return True


COMMAND = Command(
    position=30,
    out="shards",
    choices=(Choice("method", "synthesizers"),),
    shared=True,
    examples=("dfkd synthesize --method zskd --beta 1.0 0.1", "dfkd synthesize --method noise --num-images 1000"),
    next="dfkd distill --transfer-set shards/",
)


WEIGHED = 16  # images
RARE = 0.05  # a class is rare that has less than this share of what it had if all had the same
PREVIEW = 4, 16  # rows of preview.png, each of as many images of one round
TILE = 112  # the longest side of one of them
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
    if settings.inputs.snapshots and "student" not in settings.method.entry.needs:
        raise ConfigError("--snapshots keeps weights of a student in the loop", "leave it out: this method has none")
    if settings.inputs.snapshots and settings.inputs.deadline:
        raise ConfigError("--snapshots are of the whole training", "leave out --deadline")
    location = locate(settings.inputs.teacher, settings.inputs)
    if dry_run:
        answer = rehearse(settings, run, terminal)
        with sealed("synthesize is data-free", real_data(location)), kept():
            measured = weigh(settings, location.open(settings.code).network())
        for term in measured:
            terminal.answer("{term}: {value:.4g} x {weight:.4g}, gradient {gradient:.4g}".format(**term))
        return answer | {"terms": measured}
    with sealed("synthesize is data-free", real_data(location)), kept():
        teacher = location.open(settings.code).network()
        check_needs(settings.method.entry, teacher.classifier, settings.inputs)
        extras, parents = open_inputs(settings, teacher)
        check_kept()
        facts = {"data_free": True, "uses": uses(settings.method.entry)}
        directory = RunDirectory(settings.out, settings, [teacher.parent("teacher"), *parents], facts, kept_by())
        if directory.claim():
            directory.say_complete(terminal)
        else:
            with directory.guard(), kept():
                _make(settings, teacher, extras, directory, terminal)
    metrics = directory.record["metrics"]
    count, confidence = directory.metric("count"), directory.metric("confidence")
    terminal.answer(f"{directory.path}: {count} images, mean teacher confidence {confidence:.3f}")
    if AS_STORED in metrics:
        kept_class = f"to {metrics[AS_STORED]:.2%} of the images the teacher gives the class that it gave them before"
        terminal.say(f"{directory.path}: rounded to 256 levels; {kept_class}")
    return {"artifacts": {"shards": str(directory.path)}, "metrics": metrics, "concerns": directory.record["concerns"]}


def uses(entry: catalog.Entry) -> list[str]:
    """What the method takes that was made from real images: with it, images are not made from the teacher alone."""
    return [need for need in entry.needs if need in MADE_FROM_DATA]


def open_inputs(settings: Settings, teacher: LoadedModel) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Open what is wanted beside the teacher: more of :class:`SynthesisTask`, and parents. A student is a new one.

    Raises:
        ArtifactError: Missing, damaged, or of another teacher.
    """
    inputs, how = settings.inputs, settings.run
    extras: dict[str, Any] = {}
    parents = []
    if inputs.student is not None:
        info = dataclasses.replace(teacher.classifier.info, spec=inputs.student)
        location = taught_by(settings)
        extras["student"] = fresh(info, "student", how.seed, settings.code, location)
        parents += architecture(inputs.student, settings.code, location).parents
    if inputs.metadata is not None:
        extras["metadata"], sha256 = read_metadata(Path(inputs.metadata), teacher.sha256)
        parents.append({"role": "metadata", "path": inputs.metadata, "sha256": sha256})
    return extras, parents


def check_needs(entry: catalog.Entry, teacher: Classifier, inputs: Any) -> None:
    """Check what the method asks for.

    Raises:
        ConfigError: An input that the method has no use for, or none where it needs one.
        ArtifactError: The teacher lacks what the method needs; the message names methods that would work.
    """
    for name, (what, hint, refuses) in OPTIONAL.items():
        chosen = getattr(inputs, name) is not None
        if chosen and name not in entry.needs:
            raise ConfigError(f"--method {entry.name} {refuses}", f"leave out --{name}")
        if name in entry.needs and not chosen:
            raise ConfigError(f"--method {entry.name} needs {what}", hint)
    if "attention" in entry.needs and not attention_layers(teacher):
        raise ArtifactError(
            f"--method {entry.name} needs a teacher with self-attention, {teacher.info.spec} has none that can be read",
            f"these work without: {_fitting(teacher)}",
        )
    if "batchnorm" in entry.needs and not teacher.batch_norms():
        keeps_none = any(map(is_batch_norm, teacher.net.modules()))
        lack = "keeps no statistics in it (track_running_stats=False)" if keeps_none else "has none"
        raise ArtifactError(
            f"--method {entry.name} needs a teacher with BatchNorm, {teacher.info.spec} {lack}",
            f"these work without: {_fitting(teacher)}",
        )
    if entry.kind != "noise":
        _check_views(teacher, "batchnorm" in entry.needs)


def _check_views(teacher: Classifier, batch_norm: bool) -> None:
    """Check that gradients come back through a teacher and, if asked, that its BatchNorm layers can be looked into.

    Raises:
        ArtifactError: They do not, or cannot: images would be made of nothing but a method's other terms.
    """
    net, spec = teacher.net, teacher.info.spec
    if any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
        raise ArtifactError(f"{spec} is TorchScript inside: no layer can be looked into", "build all of it in Python")
    seen = require_gradients(net, spec, teacher.info.input_size, batch_moments(teacher) if batch_norm else None)
    if batch_norm and not seen:
        hint = f"call them in forward; these work without: {_fitting(teacher, ('batchnorm',))}"
        raise ArtifactError(f"{spec}: its BatchNorm layers are not called, so what goes into them is not seen", hint)


def _fitting(teacher: Classifier, hidden: Collection[str] = ()) -> str:
    """The methods that do not look into what the teacher lacks, or hides."""
    has = {"attention": attention_layers(teacher), "batchnorm": teacher.batch_norms()}
    lacks = {need for need, layers in has.items() if not layers} | {*hidden}
    entries = catalog.entries("synthesizers").items()
    return ", ".join(name for name, entry in entries if lacks.isdisjoint(entry.needs))


def _make(
    settings: Settings, teacher: LoadedModel, extras: dict[str, Any], directory: RunDirectory, terminal: Terminal
) -> None:
    """Do the rounds and write what is made of them."""
    config, info, used = settings.method.config, teacher.classifier.info, uses(settings.method.entry)
    count = wanted_images(settings.inputs, info)
    head = manifest_head(settings, info, teacher.sha256, config.dtype, True, used)
    began = {key: value for key, value in head["config"].items() if key in directory.record["identity"]}
    key = digest({**head, "config": began})  # the same for a run that an older version began, which knew fewer options
    writer = ShardWriter(directory.path, head, -(-count // config.of_a_shard), key, directory.before)
    processes = settings.run.devices * settings.run.num_nodes
    task = SynthesisTask(teacher.classifier, count, settings.run.seed, writer, processes, **extras)
    synthesizer = settings.method.entry.load()(task, config)
    student, rounds = synthesizer.models().get("student"), synthesizer.rounds
    snapshots = student and Snapshots(directory, student, directory.path / "student", settings.inputs.snapshots, rounds)
    deadline = Deadline(settings.inputs.seconds) if settings.inputs.seconds is not None else None
    if deadline and not synthesizer.anytime:
        raise ConfigError("--deadline: this method makes its images at the very end", "give fewer --steps")
    if deadline and config.of_a_shard > config.batch_size:
        terminal.say(
            f"--deadline: shards of {config.of_a_shard} images are finished; a smaller --shard-size ends sooner"
        )
    fit(synthesizer, directory, terminal, [part for part in (snapshots, deadline) if part])
    check_kept()
    writer.collect()
    if deadline and writer.missing():
        count = _cut(writer, synthesizer, deadline, directory, terminal)
    if student and writer.count <= synthesizer.warmup_rounds:
        directory.warn("student/ has learned nothing yet: all rounds were of the warm-up (--warmup-share)", terminal)
    manifest = writer.write_manifest()
    if synthesizer.stateless:
        rows = [{"round": index, **shard["terms"]} for index, shard in enumerate(manifest["shards"])]
        write_csv(directory.path / "metrics.csv", rows)
    write_preview(directory.path / "preview.png", ShardReader(directory.path))
    histogram = manifest["class_histogram"]
    rare = rare_classes(histogram, teacher.classifier.info.classes)
    if rare is not None:
        directory.warn(rare, terminal)
    facts = {"command": "synthesize", "dataset": teacher.dataset, "teacher": teacher.sha256, "num_images": count}
    files = [MANIFEST, "metrics.csv", "preview.png", *(row["file"] for row in manifest["shards"])]
    files += _save_models(synthesizer.models(), directory.path, {**head, **facts})
    confidence = sum(writer.confidences[index] for index in range(writer.count)) / count
    metrics = {"count": count, "confidence": confidence, "class_histogram": histogram}
    if all(AS_STORED in shard["terms"] for shard in manifest["shards"]):
        metrics[AS_STORED] = sum(row["count"] * row["terms"][AS_STORED] for row in manifest["shards"]) / count
    kept = snapshots.paths.values() if snapshots else ()
    directory.finish([*(directory.path / name for name in files), *kept], metrics)


def weigh(settings: Settings, teacher: LoadedModel) -> list[dict[str, Any]]:
    """How strongly each term pulls at a few images in the first inner step; empty where images are not optimised.

    What a weight is worth depends on the teacher: the distance to BatchNorm statistics is a sum over its layers.
    """
    config, entry = settings.method.config, settings.method.entry
    if not issubclass(entry.load(), ImageOptimizer):
        return []
    extras, _ = open_inputs(settings, teacher)
    if "student" in extras:
        extras["student"].eval()  # as it is while images are made
    count = min(config.batch_size, WEIGHED)
    with tempfile.TemporaryDirectory() as directory:
        writer = ShardWriter(Path(directory), {}, 1)
        task = SynthesisTask(teacher.classifier, count, settings.run.seed, writer, **extras)
        pulls = entry.load()(task, config).pulls(count)
    return [
        {"term": name, "value": value, "weight": getattr(config, name), "gradient": gradient}
        for name, (value, gradient) in pulls.items()
    ]


def _cut(
    writer: ShardWriter, synthesizer: Synthesizer, deadline: Deadline, directory: RunDirectory, terminal: Terminal
) -> int:
    """Make do with what was made before the deadline, and say how long all of it takes. Returns the images."""
    left = timedelta(seconds=round(deadline.elapsed / deadline.rounds * (synthesizer.rounds - deadline.done)))
    shards = writer.count
    writer.cut()
    count = sum(row["count"] for row in writer.rows.values())
    directory.record["cut_at"] = {"shards": writer.count, "of": shards}
    said = f"{count:,} of {synthesizer.num_images:,} images when the deadline came"
    terminal.say(f"{directory.path}: {said}; the rest, for which the same command goes on, takes about {left}")
    return count


def _save_models(models: Mapping[str, Classifier | Generators], path: Path, provenance: dict[str, Any]) -> list[str]:
    """Write each network into a directory of its own. Returns the files, relative to ``path``."""
    files = []
    for role, model in models.items():
        if isinstance(model, Generators):
            save_generators(path / role, model, provenance)
        else:
            save_model(path / role, model.eval(), metrics={}, provenance=provenance)
        files += [f"{role}/{name}" for name in (GENERATOR_FILES if isinstance(model, Generators) else MODEL_FILES)]
    return files


def rare_classes(histogram: Sequence[int], names: Sequence[str] | None = None) -> str | None:
    """What to say of classes that hardly any image has, by the teacher's answers. None if no more than chance explains.

    Args:
        histogram: Images by class, for K classes.
        names: Of the classes.
    """
    count, classes = sum(histogram), len(histogram)
    limit = max(RARE * count / classes, 1)
    rare = [(images, names[index] if names else f"class {index}") for index, images in enumerate(histogram)]
    rare = sorted((images, name) for images, name in rare if images < limit)
    chance = classes * math.exp(-count / classes)  # so many have none, if images fall on classes evenly
    if len(rare) <= chance + 3 * math.sqrt(chance):
        return None
    shown = ", ".join(f"{name}: {images}" for images, name in rare[:5]) + (", ..." if len(rare) > 5 else "")
    return f"{len(rare)} of {classes} classes have hardly any of the {count} images ({shown}): a student may miss them"


def write_preview(path: Path, reader: ShardReader) -> None:
    """A PNG grid of images from the first round, on top, to the last; the first of each, from evenly spaced rounds.

    Each image is stretched to the full range: impressions may leave [0,1]. What is neither grey nor RGB is shown as the
    mean of its channels, and what is large at a smaller size.
    """
    rows, columns = PREVIEW
    shards = torch.linspace(0, len(reader.sizes) - 1, min(rows, len(reader.sizes))).round().int().tolist()
    images = torch.cat([reader.read(shard)["images"][: rows // len(shards) * columns].clone() for shard in shards])
    images = as_pixels(images)
    if (longest := max(images.shape[2:])) > TILE:
        images = v2.functional.resize(images, [max(1, side * TILE // longest) for side in images.shape[2:]])
    images = images if images.shape[1] in (1, 3) else images.mean(1, keepdim=True)
    grid = make_grid(images, nrow=columns, padding=2, normalize=True, scale_each=True, pad_value=1.0)
    write_atomic(path, encode_png(grid.mul(255).round().byte()).numpy().tobytes())
