"""The few parts that several families share."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d

from dfkd_cli.errors import ConfigError


def chain(**parts: nn.Module) -> nn.Sequential:
    """A network that applies its parts one after the other. Each is an attribute: ``net.stage1``, ``net.head``."""
    return nn.Sequential(OrderedDict(parts))


def global_pool() -> nn.Sequential:
    """Mean over all positions: (B, C, H, W) to (B, C), for any H and W."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


class HalvingMaxPool(nn.MaxPool2d):
    """The maximum of every 2x2 pixels; of finite values as :class:`torch.nn.MaxPool2d` gives it, and its gradient.

    On a CPU it compares whole views: without gradients in a tenth of the time of PyTorch's kernel there, with them in
    40 %; only of images that are channels last are PyTorch's gradients quicker.
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H // 2, W // 2)."""
        learns = torch.is_grad_enabled() and images.requires_grad
        another = images.device.type != "cpu" or torch.compiler.is_compiling()  # and what is exported has the operator
        if another or (learns and not images.is_contiguous()):
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
            ctx.save_for_backward(right > left, lower > upper)
            ctx.size = images.shape
        return torch.maximum(upper, lower)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Spread.apply(gradient, *ctx.saved_tensors, ctx.size)


class _Spread(torch.autograd.Function):
    """Values of 2x2 pixels to where each maximum was, all else zero; the gradient takes them from there."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, is_right: Tensor, is_lower: Tensor, size: torch.Size) -> Tensor:
        ctx.save_for_backward(is_right, is_lower)
        columns = values.new_empty(is_right.shape)
        torch.mul(values, is_lower, out=columns[..., 1::2, :])
        torch.sub(values, columns[..., 1::2, :], out=columns[..., 0::2, :])
        height, width = (2 * side for side in values.shape[2:])
        whole = values.new_zeros(size)  # an odd last row or column stays zero
        torch.mul(columns, is_right, out=whole[..., :height, 1:width:2])
        torch.sub(columns, whole[..., :height, 1:width:2], out=whole[..., :height, 0:width:2])
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        is_right, is_lower = ctx.saved_tensors
        height, width = is_right.shape[2], 2 * is_right.shape[3]
        columns = torch.where(is_right, gradient[..., :height, 1:width:2], gradient[..., :height, 0:width:2])
        return torch.where(is_lower, columns[..., 1::2, :], columns[..., 0::2, :]), None, None, None


class ResponseNorm(nn.LocalResponseNorm):
    """:class:`torch.nn.LocalResponseNorm` with beta 0.75, to rounding. Under autocast, in the images' own precision.

    PyTorch's pools in three dimensions and raises to a power, which on a CPU takes three quarters of an AlexNet's time;
    as a product with a banded matrix and two roots it takes a quarter of that.

    Args:
        size: Neighbouring channels that are summed over.
        alpha, k: As of :class:`torch.nn.LocalResponseNorm`.
    """

    def __init__(self, size: int, alpha: float, k: float = 1.0) -> None:
        super().__init__(size, alpha, 0.75, k)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W), the same shape."""
        if images.device.type != "cpu":
            return super().forward(images)
        channels = images.shape[1]
        band = images.new_ones(channels, channels).tril((self.size - 1) // 2).triu(-(self.size // 2))
        with torch.autocast("cpu", enabled=False):
            return _ResponseNorm.apply(images, band.mul_(self.alpha / self.size)[..., None, None], self.k)


class _ResponseNorm(torch.autograd.Function):
    """``x d^(-3/4)``, where ``d = k + sum_j band_ij x_j^2``; all in the precision of ``x``."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, band: Tensor, k: float) -> Tensor:
        divisor = conv2d(images.square(), band).add_(k)
        root = divisor.rsqrt()
        factor = root.sqrt().mul_(root)
        ctx.save_for_backward(images, band, divisor, factor)
        ctx.k = k
        return images * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, band, divisor, factor = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            if torch.is_grad_enabled():  # this gradient is to have one: what it depends on comes from the images again
                divisor = conv2d(images.square(), band) + ctx.k
                factor = divisor**-0.75
            direct = gradient * factor
            shares = conv2d(direct * images / divisor, band.transpose(0, 1))
            return torch.addcmul(direct, images, shares, value=-1.5), None, None


class FirstConv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` of stride 1, whose gradient to images of one channel is quick on CPUs.

    PyTorch's takes half the time of an iteration that optimises images through a LeNet-5, this a quarter of that.

    Args:
        channels, filters, kernel, padding, bias: As of :class:`torch.nn.Conv2d`.
    """

    def __init__(self, channels: int, filters: int, kernel: int, padding: int = 0, bias: bool = True) -> None:
        super().__init__(channels, filters, kernel, padding=padding, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        quick = images.device.type == "cpu" and images.shape[1] == 1 and images.requires_grad
        if not quick or torch.is_autocast_enabled("cpu"):
            return super().forward(images)
        output = super().forward(images.detach())  # the parameters have their gradients from here
        return _ToOneChannel.apply(images, self.weight.detach(), output, self.padding[0])


class _ToOneChannel(torch.autograd.Function):
    """The gradient of a convolution's output to its images: one matrix product, the results shifted and added."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, output: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.padding, ctx.sides = padding, images.shape[2:]
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        (batch, _, height, width), (rows, columns) = gradient.shape, weight.shape[2:]
        shares = (weight.flatten(1).t() @ gradient.flatten(2)).view(batch, rows, columns, height, width)
        padded = gradient.new_zeros(batch, 1, height + rows - 1, width + columns - 1)
        for row, column in itertools.product(range(rows), range(columns)):
            padded[:, 0, row : row + height, column : column + width] += shares[:, row, column]
        bottom, right = (ctx.padding + side for side in ctx.sides)
        return padded[..., ctx.padding : bottom, ctx.padding : right], None, gradient, None


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
