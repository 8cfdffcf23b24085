"""ResNet for small images: Deep Residual Learning for Image Recognition (He et al.; CVPR 2016; arXiv 1512.03385).

- ``resnet8`` ... ``resnet110``: the 6n+2 networks of section 4.2, three stages of 16, 32, 64 channels. ``x4`` is the
  wider variant of the distillation literature (RepDistiller: Tian et al., ICLR 2020, arXiv 1910.10699).
- ``plain8`` ... ``plain110``: the same without any shortcut, the plain networks of that section; deep ones learn worse.
- ``resnet18``, ``resnet34``: the ImageNet networks with a 3x3 stem of stride 1 and no max pooling, so that 32x32 images
  keep their resolution; the usual DAFL pair.

Where the shape changes, the shortcut is a 1x1 convolution with BatchNorm (the paper's option B) and not zero padding
(option A, the paper's choice on CIFAR), as in RepDistiller, whose published accuracies are the common reference. The
pooling is global: any image size works.
"""

from __future__ import annotations

from torch import Tensor, nn

from dfkd_cli.models.layers import FirstConv2d, chain, global_pool, init_convolutions

NAMES = (
    "resnet8", "resnet14", "resnet20", "resnet26", "resnet32", "resnet44", "resnet56", "resnet110",
    "plain8", "plain14", "plain20", "plain32", "plain44", "plain56", "plain110",
    "resnet8x4", "resnet32x4",
    "resnet18", "resnet34",
)  # fmt: skip

_IMAGENET_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. The input of ``relu2`` is the block's value before its activation.

    Args:
        inputs: Channels that go in.
        outputs: Channels that come out.
        stride: Of the first convolution.
        plain: There is no shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, plain: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module | None = None if plain else nn.Identity()
        if not plain and (stride != 1 or inputs != outputs):
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out if self.shortcut is None else out + self.shortcut(x))


def build(name: str, num_classes: int, input_size: tuple[int, int, int]) -> nn.Module:
    """Normalised images (B, C, H, W) to logits (B, K). ``stem`` and ``stage*`` give feature maps."""
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    if name in _IMAGENET_BLOCKS:
        blocks, widths = _IMAGENET_BLOCKS[name], (64, 64, 128, 256, 512)
    else:
        depth, _, wide = name.removeprefix("plain").removeprefix("resnet").partition("x")
        blocks = ((int(depth) - 2) // 6,) * 3
        widths = (32, 64, 128, 256) if wide else (16, 16, 32, 64)  # the stem, then each stage
    net = chain(
        stem=nn.Sequential(
            FirstConv2d(input_size[0], widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        ),
        **{
            f"stage{i}": _stage(count, widths[i - 1], widths[i], 1 if i == 1 else 2, name.startswith("plain"))
            for i, count in enumerate(blocks, start=1)
        },
        pool=global_pool(),
        head=nn.Linear(widths[-1], num_classes),
    )
    init_convolutions(net)
    return net


def _stage(blocks: int, inputs: int, outputs: int, stride: int, plain: bool) -> nn.Sequential:
    rest = [BasicBlock(outputs, outputs, 1, plain) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(inputs, outputs, stride, plain), *rest)
