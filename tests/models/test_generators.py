"""The generator of the papers against its layers, written down."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from objective_oracles import Array, batch_normalised, convolved, nearest
from torch import nn

from dfkd_cli.models.classifier import ModelInfo
from dfkd_cli.models.generators import Generator

MEAN, STD = 0.4, 0.2


@pytest.mark.parametrize("end", ["tanh", "normal", "sigmoid"])
@pytest.mark.parametrize(("size", "sizes"), [((8, 8), [(2, 2), (4, 4), (8, 8)]), ((7, 5), [(2, 2), (4, 3), (7, 5)])])
def test_latents_become_images(end, size, sizes):
    info = ModelInfo("test", 3, (2, *size), (MEAN, MEAN), (STD, STD))
    generator = Generator(info, 5, end, width=0.03, epsilon=0.8).double()
    for layer in generator.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.affine:
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.uniform_(layer.bias, -1, 1)
    latents = torch.randn(4, 5, dtype=torch.float64)
    found = generator(latents).detach().numpy()
    layers = {name: value.detach().numpy() for name, value in generator.named_parameters()}

    def batch_norm(maps: Array, name: str, epsilon: float) -> Array:
        scale, shift = (layers[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return batch_normalised(maps, epsilon) * scale + shift

    maps = (latents.numpy() @ layers["linear.weight"].T + layers["linear.bias"]).reshape(4, 4, *sizes[0])
    maps = batch_norm(maps, "body.1", 1e-5)
    for convolution, norm, target in (("body.3", "body.4", sizes[1]), ("body.7", "body.8", sizes[2])):
        assert (f"{convolution}.bias" in layers) == (end != "sigmoid")
        bias = layers.get(f"{convolution}.bias", np.zeros(1))
        maps = convolved(nearest(maps, *target), layers[f"{convolution}.weight"], bias, 1, 1)
        maps = batch_norm(maps, norm, 0.8)
        maps = np.where(maps > 0, maps, 0.2 * maps)
    maps = convolved(maps, layers["body.10.weight"], layers["body.10.bias"], 1, 1)
    expected = {
        "tanh": lambda: batch_normalised(np.tanh(maps)) * STD + MEAN,
        "normal": lambda: batch_norm(maps, "finish.0", 1e-5) * STD + MEAN,
        "sigmoid": lambda: 1 / (1 + np.exp(-maps - np.log(MEAN / (1 - MEAN)))),
    }
    np.testing.assert_allclose(found, expected[end](), rtol=1e-6)
