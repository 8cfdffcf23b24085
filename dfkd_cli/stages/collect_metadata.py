"""Record activation statistics of a teacher while its training images are at hand.

Reads a teacher and its dataset, writes a metadata directory (metadata/) for methods that use metadata.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfkd_cli.artifacts.metadata import LayerStatistics, Metadata, write_metadata
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.catalog import UNTRAINED, Command
from dfkd_cli.config import option
from dfkd_cli.data import datasets
from dfkd_cli.data.sources import Source, batches
from dfkd_cli.errors import ConfigError, RunFailed
from dfkd_cli.models.activations import Tap, pre_activations, values_at
from dfkd_cli.models.classifier import Classifier, probe
from dfkd_cli.models.names import locate
from dfkd_cli.models.statistics import Covariance, RunningMoments
from dfkd_cli.options import ForeignModel
from dfkd_cli.settings import Settings
from dfkd_cli.stages.inputs import pick_device, real_images
from dfkd_cli.stages.training import rehearse
from dfkd_cli.ui import Progress, Terminal


@dataclass(frozen=True, kw_only=True)
class Inputs(ForeignModel):
    """What is read, and how."""

    teacher: str = option("teacher", "teacher: model directory or SPEC", parent=True)
    dataset: str | None = option(None, "dataset whose training images are read (default: the teacher's)")
    data_dir: str | None = option(None, "where datasets lie", volatile=True)
    num_images: int | None = option(
        None, "images to read, balanced over the classes (default: all)", low=1, rehearsal=2
    )
    batch_size: int = option(200, "images per forward pass", low=1, rehearsal=2)
    temperature: float = option(8.0, "what the logits are divided by", above=0)
    covariance_units: int = option(2048, "units that the last layers with a covariance have at most, in all", low=1)


COMMAND = Command(
    position=20,
    out="metadata",
    ignores=UNTRAINED,
    examples=("dfkd collect-metadata", "dfkd collect-metadata --teacher teacher/ --data-dir data/"),
    next="dfkd synthesize --method lopes --metadata metadata/",
)


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Collect the statistics in one pass over the images."""
    if dry_run:
        return rehearse(settings, run, terminal)
    inputs = settings.inputs
    teacher = locate(inputs.teacher, inputs).open(settings.code).network()
    dataset = teacher.dataset if inputs.dataset is None else inputs.dataset
    if dataset is None:
        raise ConfigError(f"{inputs.teacher}: the teacher's record names no dataset", "give --dataset NAME or DIR")
    images = real_images(teacher, dataset, inputs.data_dir, inputs.num_images, settings.run.seed)
    content = datasets.contents(dataset, inputs.data_dir) or [{"role": "dataset", "spec": dataset}]
    parents = [teacher.parent("teacher"), *content]
    directory = RunDirectory(settings.out, settings, parents, {"data_free": False})
    if directory.claim():
        directory.say_complete(terminal)
    else:
        with directory.guard():
            device = pick_device(settings.run.device)
            with closing(Progress(terminal, settings.command, "images", len(images))) as progress:
                metadata = collect(
                    teacher.classifier, images, device, inputs.batch_size, inputs.temperature,
                    inputs.covariance_units, progress.update,
                )  # fmt: skip
            info = teacher.classifier.info
            origin = {"teacher": {"sha256": teacher.sha256, "spec": info.spec}, "dataset": dataset}
            files = write_metadata(directory.path, metadata, origin)
            directory.record["device"] = str(device)
            directory.finish(files, {"count": sum(metadata.counts), "layers": len(metadata.layers)})
    metrics = directory.record["metrics"]
    terminal.answer(
        f"{directory.path}: {directory.metric('layers')} layers on {directory.metric('count')} images of {dataset}"
    )
    return {"artifacts": {"metadata": str(directory.path)}, "metrics": metrics}


@torch.no_grad()
def collect(
    classifier: Classifier,
    source: Source,
    device: torch.device,
    batch_size: int,
    temperature: float,
    covariance_units: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Metadata:
    """Activation statistics by class, accumulated in float64: memory does not grow with the number of images.

    Args:
        classifier: The teacher.
        source: Labelled images.
        device: Where it runs.
        batch_size: Images of a forward pass.
        temperature: What the logits are divided by.
        covariance_units: See :func:`last_layers`, which have a covariance.
        advance: Called with the number of images seen, after each batch.

    Raises:
        RunFailed: The teacher gives values that are not finite.
    """
    classifier = classifier.eval().to(device)
    layers, classes = pre_activations(classifier), range(classifier.info.num_classes)
    with values_at({name: Tap(layer) for name, layer in layers.items()}) as outputs:
        probe(classifier.net, classifier.info.input_size)
        shapes = {name: tuple(outputs[name].shape[1:]) for name in layers}
        units = {name: math.prod(shape) for name, shape in shapes.items()}
        head, joint = list(layers)[-1], last_layers(units, covariance_units)
        _check_size(len(classes), sum(units.values()), sum(units[name] for name in joint))
        moments = {name: [RunningMoments() for _ in classes] for name in layers if name not in joint}
        together = [Covariance(sum(units[name] for name in joint)) for _ in classes]
        for images in batches(source, batch_size, device):
            logits = classifier(images.pixels)
            rows = {name: outputs[name].flatten(1).cpu().double() for name in layers}
            rows[head] = logits.cpu().double() / temperature
            stacked, labels = torch.cat([rows[name] for name in joint], 1), images.true_labels.cpu()
            for label in sorted(set(labels.tolist())):
                mine = labels == label
                together[label].add(stacked[mine])
                for name, of_class in moments.items():
                    of_class[label].add(rows[name][mine])
            advance(sum(seen.count for seen in together))
    statistics = {name: _by_class(of_class, units[name]) for name, of_class in moments.items()}
    sizes = [units[name] for name in joint]
    parts = (torch.split(both, sizes, dim=1) for both in _by_class(together, sum(sizes)))
    statistics |= dict(zip(joint, zip(*parts, strict=True), strict=True))
    metadata = Metadata(
        {
            name: LayerStatistics(shape, statistics[name][0].float(), statistics[name][1].sqrt().float(), name in joint)
            for name, shape in shapes.items()
        },
        torch.stack([seen.covariance.float() for seen in together]),
        [seen.count for seen in together],
        temperature,
    )
    if not all(tensor.isfinite().all() for pair in statistics.values() for tensor in pair):
        raise RunFailed("the teacher gives values that are not finite", "check its weights")
    return metadata


def _check_size(classes: int, units: int, joint: int) -> None:
    """Refuse statistics that do not fit into this machine, before the images are read; unknown where it does not say.

    Raises:
        RunFailed: They take more memory than there is.
    """
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return
    moments, covariances = 2 * 8 * classes * units, 8 * classes * joint**2
    if moments + covariances > there:
        raise RunFailed(
            f"statistics of {units:,} units by {classes:,} classes take {(moments + covariances) / 2**30:,.0f} GiB, "
            f"{covariances / 2**30:,.0f} of them covariances; this machine has {there / 2**30:,.0f}",
            "lower --covariance-units, or take a method that needs no metadata: dfkd ls methods",
        )


def last_layers(units: Mapping[str, int], limit: int) -> list[str]:
    """As many of the last layers as have at most ``limit`` units together; the last one whatever it has."""
    totals = itertools.accumulate(reversed(list(units.values())))
    count = sum(total <= limit for total in totals)
    return list(units)[-max(count, 1) :]


def _by_class(seen: Sequence[RunningMoments], units: int) -> tuple[Tensor, Tensor]:
    """Means and variances (K, D) float64, zeros for a class without images."""
    nothing = torch.zeros(units, dtype=torch.float64)
    means = torch.stack([moments.mean if moments.count else nothing for moments in seen])
    return means, torch.stack([moments.variance if moments.count else nothing for moments in seen])
