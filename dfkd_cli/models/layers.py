"""The few parts that several families share."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from dfkd_cli.errors import ConfigError


def chain(**parts: nn.Module) -> nn.Sequential:
    """A network that applies its parts one after the other. Each is an attribute: ``net.stage1``, ``net.head``."""
    return nn.Sequential(OrderedDict(parts))


def global_pool() -> nn.Sequential:
    """Mean over all positions: (B, C, H, W) to (B, C), for any H and W."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


class HalvingMaxPool(nn.MaxPool2d):
    """The maximum of every 2x2 pixels, as :class:`torch.nn.MaxPool2d` gives it, bit for bit.

    Without gradients on a CPU it compares whole views, in a tenth of the time of PyTorch's kernel there (of which a
    LeNet-5's answers are 40 %).
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H // 2, W // 2)."""
        if images.device.type != "cpu" or (torch.is_grad_enabled() and images.requires_grad):
            return super().forward(images)
        height, width = (side // 2 * 2 for side in images.shape[2:])
        rows = torch.maximum(images[..., 0:height:2, :width], images[..., 1:height:2, :width])
        return torch.maximum(rows[..., 0::2], rows[..., 1::2])


def init_convolutions(net: nn.Module) -> None:
    """He initialisation (normal, fan-out) of every convolution; other layers keep PyTorch's defaults."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def require_size(name: str, input_size: tuple[int, int, int], minimum: int) -> None:
    """Refuse images (C, H, W) that would shrink to nothing inside the network ``name``.

    Raises:
        ConfigError: Height or width is below ``minimum`` pixels.
    """
    _, height, width = input_size
    if min(height, width) < minimum:
        raise ConfigError(
            f"{name} needs images of at least {minimum}x{minimum} pixels, got {height}x{width}",
            "enlarge the images with --input-size, or choose a network without a minimum such as resnet20",
        )
