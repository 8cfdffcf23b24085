"""The few parts that several families share."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight

from dfkd_cli.errors import ConfigError


def chain(**parts: nn.Module) -> nn.Sequential:
    """A network that applies its parts one after the other. Each is an attribute: ``net.stage1``, ``net.head``."""
    return nn.Sequential(OrderedDict(parts))


def global_pool() -> nn.Sequential:
    """Mean over all positions: (B, C, H, W) to (B, C), for any H and W."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


class HalvingMaxPool(nn.MaxPool2d):
    """The maximum of every 2x2 pixels, as :class:`torch.nn.MaxPool2d` gives it and its gradient, bit for bit.

    On a CPU it compares whole views, in a tenth of the time of PyTorch's kernel there, with the gradient in 40 %.
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H // 2, W // 2)."""
        if images.device.type != "cpu":
            return super().forward(images)
        return _Halving.apply(images)


class _Halving(torch.autograd.Function):
    """Remembers in which column and row each maximum was; of equal ones the first counts."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        height, width = (side // 2 * 2 for side in images.shape[2:])
        left, right = images[..., :height, 0:width:2], images[..., :height, 1:width:2]
        columns = torch.maximum(left, right)
        upper, lower = columns[..., 0::2, :], columns[..., 1::2, :]
        if ctx.needs_input_grad[0]:
            ctx.like, ctx.is_right, ctx.is_lower = torch.empty_like(images, device="meta"), right > left, lower > upper
        return torch.maximum(upper, lower)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        columns = torch.empty_like(ctx.is_right, dtype=gradient.dtype)
        torch.mul(gradient, ctx.is_lower, out=columns[..., 1::2, :])
        torch.sub(gradient, columns[..., 1::2, :], out=columns[..., 0::2, :])
        height, width = (2 * side for side in gradient.shape[2:])
        whole = torch.zeros_like(ctx.like, device=gradient.device)  # an odd last row or column stays zero
        torch.mul(columns, ctx.is_right, out=whole[..., :height, 1:width:2])
        torch.sub(columns, whole[..., :height, 1:width:2], out=whole[..., :height, 0:width:2])
        return whole


class FirstConv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` of stride 1, whose gradient to images of one channel is quick on CPUs.

    PyTorch's takes half the time of an iteration that optimises images through a LeNet-5, this a quarter of that.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        cpu, quick = images.device.type == "cpu", images.shape[1] == 1 and images.requires_grad
        if not (cpu and quick) or torch.is_autocast_enabled("cpu"):
            return super().forward(images)
        return _FromOneChannel.apply(images, self.weight, self.bias, self.padding)


class _FromOneChannel(torch.autograd.Function):
    """A convolution whose gradient to its images is one matrix product, the results shifted and added."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.padding = padding
        return F.conv2d(images, weight, bias, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        for_images = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            (batch, _, height, width), (rows, columns) = gradient.shape, weight.shape[2:]
            shares = (weight.flatten(1).t() @ gradient.flatten(2)).view(batch, rows, columns, height, width)
            padded = gradient.new_zeros(batch, 1, height + rows - 1, width + columns - 1)
            for row, column in itertools.product(range(rows), range(columns)):
                padded[:, 0, row : row + height, column : column + width] += shares[:, row, column]
            (top, left), sides = ctx.padding, images.shape[2:]
            for_images = padded[..., top : top + sides[0], left : left + sides[1]]
        if ctx.needs_input_grad[1]:
            size: Any = weight.shape
            for_weight = conv2d_weight(images, size, gradient, padding=ctx.padding)  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum((0, 2, 3))
        return for_images, for_weight, for_bias, None


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
