"""WRN: Wide Residual Networks (Zagoruyko, Komodakis; BMVC 2016; arXiv 1605.07146), pre-activation, without dropout.

``wrn-40-2`` has depth 40 = 6n + 4 and twice the channels. Each block is BN-ReLU-conv twice; where the width changes,
the shortcut is a 1x1 convolution of the activated input. The outputs of the stages are therefore BEFORE BatchNorm and
ReLU: ``norm`` activates the last one, the first block of the next stage the others. The pooling is global: any image
size works.
"""

from __future__ import annotations

from torch import Tensor, nn

from dfkd_cli.errors import ConfigError
from dfkd_cli.models.layers import FirstConv2d, chain, global_pool, init_convolutions

NAMES = ("wrn-<depth>-<width>",)


class PreactivationBlock(nn.Module):
    """BN-ReLU-conv twice and a shortcut, with no activation after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        residual = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return residual + (x if self.shortcut is None else self.shortcut(active))


def build(name: str, num_classes: int, input_size: tuple[int, int, int]) -> nn.Module:
    """Normalised images (B, C, H, W) to logits (B, K). ``stem`` and ``stage*`` give feature maps."""
    depth, width = (int(number) for number in name.split("-")[1:])
    if depth < 10 or depth % 6 != 4 or width < 1:
        raise ConfigError(f"{name}: no such network", "wrn-<depth>-<width> has depth 10, 16, 22, ..., width 1, 2, ...")
    blocks = (depth - 4) // 6
    net = chain(
        stem=FirstConv2d(input_size[0], 16, 3, padding=1, bias=False),
        stage1=_stage(blocks, 16, 16 * width, stride=1),
        stage2=_stage(blocks, 16 * width, 32 * width, stride=2),
        stage3=_stage(blocks, 32 * width, 64 * width, stride=2),
        norm=nn.Sequential(nn.BatchNorm2d(64 * width), nn.ReLU()),
        pool=global_pool(),
        head=nn.Linear(64 * width, num_classes),
    )
    init_convolutions(net)
    return net


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    rest = [PreactivationBlock(outputs, outputs, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(PreactivationBlock(inputs, outputs, stride), *rest)
