"""What is measured of models and impressions."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from dfkd_cli.data.sources import Source
from dfkd_cli.models.classifier import Classifier


@torch.no_grad()
def answers(model: Classifier, source: Source, device: torch.device | str = "cpu") -> Tensor:
    """The logits (N, K) of a model on every image of a source, in order."""
    model = model.eval().to(device)
    return torch.cat([model(source.chunk(i).to(device).pixels).float().cpu() for i in range(len(source.sizes))])


def labels_of(source: Source) -> Tensor:
    """The true labels (N,) of a labelled source, in order."""
    return torch.cat([source.chunk(i).labels for i in range(len(source.sizes))])


def top1(model: Classifier, source: Source) -> float:
    """Share of images whose label the model gives."""
    logits = answers(model, source)
    return float(multiclass_accuracy(logits, labels_of(source), logits.shape[1], average="micro"))


def agreement(student: Classifier, teacher: Classifier, source: Source) -> float:
    """Share of images on which two models give the same class."""
    return float((answers(student, source).argmax(1) == answers(teacher, source).argmax(1)).float().mean())
