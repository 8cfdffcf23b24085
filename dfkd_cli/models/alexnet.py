"""AlexNet for 32x32 images, as ZSKD uses it.

Krizhevsky, Sutskever, Hinton. ImageNet Classification with Deep Convolutional Neural Networks. NeurIPS 2012; in the
CIFAR-10 version of Nayak et al., ICML 2019, arXiv:1905.08114.

``alexnet-half`` has half the filters and hidden units. Each stage normalises AFTER its activation and pooling, and the
hidden layers after dropout. Ported from TensorFlow 1, whose conventions differ:

- LRN: torch divides alpha by the window size, so alpha = 5 * 1e-4; the window of radius 2 has size 5.
- BatchNorm: decay 0.999 is momentum 0.001, eps is 1e-3. The running statistics therefore need some thousand steps.
- SAME convolutions with stride 1 are padded by half the kernel; VALID pooling is torch's default.
- Initialisation: weights N(0, 0.01^2), biases 0, but 1 in convolutions 2, 4 and 5.

Three poolings of 3x3 with stride 2: at least 15x15 pixels.
"""

from __future__ import annotations

import math

from torch import nn

from dfkd_cli.models.layers import ResponseNorm, chain, require_size

NAMES = ("alexnet", "alexnet-half")

_WIDTHS = {  # filters of the five convolutions, units of the two hidden layers
    "alexnet": (48, 128, 192, 192, 128, 512, 256),
    "alexnet-half": (24, 64, 96, 96, 64, 256, 128),
}
_EPS, _MOMENTUM = 1e-3, 1e-3  # of every BatchNorm


def build(name: str, num_classes: int, input_size: tuple[int, int, int]) -> nn.Module:
    """Normalised images (B, C, H, W) to logits (B, K). ``stage*`` give feature maps, ``fc*`` vectors."""
    require_size(name, input_size, 15)
    widths = _WIDTHS[name]
    channels, *sides = input_size
    for _ in range(3):
        sides = [(side - 3) // 2 + 1 for side in sides]
    return chain(
        stage1=_stage(channels, widths[0], 5, lrn=True, pool=True),
        stage2=_stage(widths[0], widths[1], 5, lrn=True, pool=True, bias=1.0),
        stage3=_stage(widths[1], widths[2], 3),
        stage4=_stage(widths[2], widths[3], 3, bias=1.0),
        stage5=_stage(widths[3], widths[4], 3, pool=True, bias=1.0),
        flatten=nn.Flatten(),
        fc1=_hidden(widths[4] * math.prod(sides), widths[5]),
        fc2=_hidden(widths[5], widths[6]),
        head=_init(nn.Linear(widths[6], num_classes)),
    )


def _stage(
    channels: int, filters: int, kernel: int, *, lrn: bool = False, pool: bool = False, bias: float = 0.0
) -> nn.Sequential:
    layers: list[nn.Module] = [_init(nn.Conv2d(channels, filters, kernel, padding=kernel // 2), bias), nn.ReLU()]
    if lrn:
        layers.append(ResponseNorm(5, alpha=5e-4))
    if pool:
        layers.append(nn.MaxPool2d(3, stride=2))
    return nn.Sequential(*layers, nn.BatchNorm2d(filters, eps=_EPS, momentum=_MOMENTUM))


def _hidden(inputs: int, units: int) -> nn.Sequential:
    return nn.Sequential(
        _init(nn.Linear(inputs, units)), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(units, eps=_EPS, momentum=_MOMENTUM)
    )


def _init(layer: nn.Conv2d | nn.Linear, bias: float = 0.0) -> nn.Conv2d | nn.Linear:
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, bias)
    return layer
