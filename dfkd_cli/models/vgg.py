"""VGG for small images, with BatchNorm, global average pooling and one linear layer.

Simonyan, Zisserman. Very Deep Convolutional Networks for Large-Scale Image Recognition. ICLR 2015. arXiv:1409.1556.
As in RepDistiller (Tian et al., ICLR 2020, arXiv:1910.10699) and CMI (Fang et al., IJCAI 2021, arXiv:2105.08584).

``vgg8`` is RepDistiller's: one convolution per stage. Each stage ends in a ReLU; the pooling between two stages stands
at the start of the later one. 32x32 images are pooled three times before the last stage, those of 64 pixels and more a
fourth time. At least 8x8 pixels.
"""

from __future__ import annotations

from torch import nn

from dfkd_cli.models.layers import HalvingMaxPool, chain, global_pool, init_convolutions, require_size

NAMES = ("vgg8", "vgg11", "vgg13", "vgg16")

_CONVOLUTIONS = {  # per stage, of 64, 128, 256, 512, 512 channels
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
}


def build(name: str, num_classes: int, input_size: tuple[int, int, int]) -> nn.Module:
    """Normalised images (B, C, H, W) to logits (B, K). ``stage1`` ... ``stage5`` give feature maps."""
    require_size(name, input_size, 8)
    counts = _CONVOLUTIONS[name]
    channels, *sides = input_size
    net = chain(
        stage1=_stage(counts[0], channels, 64, pool=False),
        stage2=_stage(counts[1], 64, 128),
        stage3=_stage(counts[2], 128, 256),
        stage4=_stage(counts[3], 256, 512),
        stage5=_stage(counts[4], 512, 512, pool=min(sides) >= 64),
        pool=global_pool(),
        head=nn.Linear(512, num_classes),
    )
    init_convolutions(net)
    return net


def _stage(convolutions: int, inputs: int, outputs: int, *, pool: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [HalvingMaxPool()] if pool else []
    for i in range(convolutions):
        layers += [nn.Conv2d(outputs if i else inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
