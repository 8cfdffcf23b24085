"""Copies of networks with few bits: their weights, the ranges of their activations, and their BatchNorm layers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_cli.data.sources import Source, Subset, batches
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.moments import Moments
from dfkd_cli.models.names import Architecture, LoadedModel
from dfkd_cli.models.quantized import computed_in_float, find_ranges, quantisers
from dfkd_cli.models.statistics import layer_divergence, recorded_moments, running_moments
from dfkd_cli.regimes.base import Task
from dfkd_cli.ui import Terminal

LOG = logging.getLogger(__name__)
IMAGES, AT_ONCE = 500, 50  # that ranges are taken from, and of one forward pass
# Mean divergence, in nats, of BatchNorm's inputs from what it remembers, above which images are not its own. For the
# ResNet-20 of Fashion-MNIST: its training images 0.0007, MNIST 0.14, Gaussian noise 0.23, uniform noise 0.58.
FAR = 0.1


def copy_weights(net: nn.Module, copied: LoadedModel, info: ModelInfo) -> Classifier:
    """A classifier of a network that has the weights of a model, and takes pixels as that does.

    Args:
        net: A network like that one, with quantisers of which the ranges are to be found.
        copied: The model to copy.
        info: What the copy is to be.

    Raises:
        ArtifactError: The model takes other images, or knows other classes.
    """
    own = copied.classifier.info
    for what in ("input_size", "num_classes", "classes"):
        if (wanted := getattr(info, what)) != (found := getattr(own, what)):
            raise ArtifactError(f"{copied.path}: its {what.replace('_', ' ')} is {found}, the teacher's {wanted}")
    net.load_state_dict(copied.classifier.net.state_dict(), strict=False)
    if names := computed_in_float(net, own.input_size):
        LOG.warning("%s: computed in float: %s", info.spec, ", ".join(name or "the network itself" for name in names))
    return Classifier(net, dataclasses.replace(own, spec=info.spec))


def check_steps(task: Task, networks: Sequence[Architecture]) -> None:
    """Refuse to train for no steps what would stay as it was made: all but copies of ``networks`` with few bits."""
    if task.training.steps == 0 and not (quantisers(task.student.net) and all(named.copied for named in networks)):
        hint = "it calibrates a copy: --student w8a8:teacher/, or w8a8: of the teacher itself"
        raise ConfigError("--steps 0: nothing is learned", hint)


def calibration(source: Source, count: int = IMAGES) -> Source:
    """Some images of a source, evenly spaced: always the same, whatever the order of the classes."""
    chosen = np.zeros(len(source), dtype=bool)
    chosen[np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)] = True
    return Subset(source, chosen)


def shown(source: Source) -> Iterator[Tensor]:
    """Pixels (B, C, H, W) of a source in batches, on the CPU."""
    return (images.pixels for images in batches(source, AT_ONCE, torch.device("cpu")))


def calibrate_copies(task: Task, terminal: Terminal) -> None:
    """Find the ranges of the activations of a task's students on its images, and freeze or free their BatchNorm."""
    images = calibration(task.source)
    for student in (task.student, *task.peers):
        student.keeps_statistics = task.training.batch_norm == "frozen"
        if not quantisers(student.net):
            continue
        said = ""
        if task.training.batch_norm == "auto" and (far := _divergence(student, images)) is not None:
            student.keeps_statistics = far > FAR
            said = f"; BatchNorm is {'frozen' if far > FAR else 'free'}, {far:.2g} nats from what it remembers"
        find_ranges(student, shown(images))
        terminal.say(f"{student.info.spec}: ranges from {len(images)} images{said}")


@torch.no_grad()
def _divergence(student: Classifier, images: Source) -> float | None:
    """The mean divergence over BatchNorm layers; None without any, or where they have not learned anything yet."""
    recorded = recorded_moments(student)
    if not any(moments.mean.any() for moments in recorded.values()):
        return None
    with running_moments(student.eval()) as seen:
        for pixels in shown(images):
            student(pixels)
    nearness = [
        layer_divergence(Moments(moments.mean.float(), moments.variance.float()), recorded[name])
        for name, moments in seen.items()
    ]
    return float(torch.stack(nearness).mean())
