"""The few parts that several families share."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from dfkd_cli.errors import ConfigError


def chain(**parts: nn.Module) -> nn.Sequential:
    """A network that applies its parts one after the other. Each is an attribute: ``net.stage1``, ``net.head``."""
    return nn.Sequential(OrderedDict(parts))


def global_pool() -> nn.Sequential:
    """Mean over all positions: (B, C, H, W) to (B, C), for any H and W."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


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
