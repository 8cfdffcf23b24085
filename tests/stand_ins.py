"""Small stand-ins for what a test needs and does not test: labelled images, activation statistics."""

from __future__ import annotations

import torch

from dfkd_cli.artifacts.metadata import Metadata
from dfkd_cli.data.datasets import Dataset
from dfkd_cli.data.sources import RealSource
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.stages.collect_metadata import collect


def random_images(info: ModelInfo, count: int, chunk: int = 1000) -> RealSource:
    """Noise, labelled with the classes in turn."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, *info.input_size), dtype=torch.uint8, generator=generator)
    classes = tuple(str(label) for label in range(info.num_classes))
    labels = torch.arange(count) % info.num_classes
    return RealSource(Dataset("noise", "train", classes, info.input_size, labels, pixels), chunk=chunk)


def statistics_of(classifier: Classifier, count: int = 30, covariance_units: int = 300) -> Metadata:
    """Activation statistics of a classifier on random images."""
    source = random_images(classifier.info, count)
    return collect(classifier, source, torch.device("cpu"), 10, 8.0, covariance_units)
