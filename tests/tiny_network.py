"""A network of 184 weights, as a user's own code: ``tiny_network:build``. All second derivatives are soon computed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import save_model

SPEC = "tiny_network:build"


def build(num_classes: int) -> nn.Module:
    """Means of gray images of 32x32 pixels in 16 squares, and a hidden layer with BatchNorm."""
    hidden = nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Tanh()
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), *hidden, nn.Linear(6, num_classes))


def save(place: Path, seed: int, mean: float = 0.3) -> Classifier:
    """Write one with random weights, as a classifier of digits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build(10)
        nn.init.uniform_(net[3].running_mean, -0.3, 0.3)
        nn.init.uniform_(net[3].running_var, 0.5, 1.5)
    model = Classifier(net, ModelInfo(SPEC, 10, (1, 32, 32), (mean,), (0.4,), tuple("0123456789"))).eval()
    save_model(place, model, metrics={}, provenance={"dataset": "digits"})
    return model
