"""LeNet-5: Gradient-Based Learning Applied to Document Recognition (LeCun, Bottou, Bengio, Haffner; Proc. IEEE 1998).

The data-free literature's version, not the one of 1998: ReLU for tanh, max pooling for trainable subsampling, every
feature map connected to every other, a linear layer for the Gaussian units. Two different networks are published as
"LeNet-5-Half", so both are here:

- ``lenet5-half``: ZSKD (Nayak et al., ICML 2019, arXiv 1905.08114) halves the convolutions only: 35,820 parameters.
- ``lenet5-half-dafl``: DAFL (Chen et al., ICCV 2019, arXiv 1904.01186) halves every layer: 15,738 parameters.

DAFL writes the first hidden layer as a 5x5 convolution of a 5x5 map; on 32x32 images that is the same function as
``fc1`` (after ReLU: DAFL's feature vector), which also takes other sizes. At least 16x16 pixels.
"""

from __future__ import annotations

import math

from torch import nn

from dfkd_cli.models.layers import FirstConv2d, HalvingMaxPool, chain, require_size

NAMES = ("lenet5", "lenet5-half", "lenet5-half-dafl")

_WIDTHS = {  # filters of the two convolutions, units of the two hidden layers
    "lenet5": (6, 16, 120, 84),
    "lenet5-half": (3, 8, 120, 84),
    "lenet5-half-dafl": (3, 8, 60, 42),
}


def build(name: str, num_classes: int, input_size: tuple[int, int, int]) -> nn.Module:
    """Normalised images (B, C, H, W) to logits (B, K). ``stage*`` give feature maps, ``fc*`` vectors."""
    require_size(name, input_size, 16)
    filters1, filters2, units1, units2 = _WIDTHS[name]
    channels, *sides = input_size
    positions = math.prod(((side - 4) // 2 - 4) // 2 for side in sides)
    return chain(
        stage1=nn.Sequential(FirstConv2d(channels, filters1, 5), nn.ReLU(), HalvingMaxPool()),
        stage2=nn.Sequential(nn.Conv2d(filters1, filters2, 5), nn.ReLU(), HalvingMaxPool()),
        flatten=nn.Flatten(),
        fc1=nn.Sequential(nn.Linear(filters2 * positions, units1), nn.ReLU()),
        fc2=nn.Sequential(nn.Linear(units1, units2), nn.ReLU()),
        head=nn.Linear(units2, num_classes),
    )
