"""A small network with dropout, and its formula."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dfkd_cli.models.classifier import Classifier, ModelInfo

TEMPERATURE = 8.0


def small_teacher(dropout: float = 0.5, classes: int = 3) -> Classifier:
    """5x5 images; layers of 18, 5 and K units, activations in place."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(dropout),
            nn.Linear(18, 5), nn.ReLU(inplace=True), nn.Linear(5, classes),
        )  # fmt: skip
    return Classifier(net, ModelInfo("small", classes, (1, 5, 5), mean=(0.2,), std=(0.5,))).eval()


def forward(teacher: Classifier, pixels: np.ndarray, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What goes into each activation of the small teacher, float64; the mask is that of its dropout layer."""
    kernel, bias, weight1, bias1, weight2, bias2 = (p.detach().double().numpy() for p in teacher.net.parameters())
    x = (pixels - 0.2) / 0.5
    conv = np.empty((len(x), 2, 3, 3))
    for filter_, row, column in np.ndindex(2, 3, 3):
        window = x[:, 0, row : row + 3, column : column + 3]
        conv[:, filter_, row, column] = (window * kernel[filter_, 0]).sum((1, 2)) + bias[filter_]
    first = conv.reshape(len(x), -1)
    second = (np.maximum(first, 0) * (1 if mask is None else mask)) @ weight1.T + bias1
    return {"0": first, "4": second, "6": (np.maximum(second, 0) @ weight2.T + bias2) / TEMPERATURE}
