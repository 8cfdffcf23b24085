"""Mean and variance of what goes into a BatchNorm layer, by channel, and their gradients, in few passes over memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

_CACHED = 2**16  # numbers of each of several tensors that a core's cache holds
_ADDED = 2**14  # of each channel that are added up one by one


@dataclass(frozen=True)
class Moments:
    """Mean and variance per channel, (C,) each."""

    mean: Tensor
    variance: Tensor


def moments(values: Tensor, correction: int = 0) -> Moments:
    """The moments of values (B, C, ...) by channel, over images and positions, in float32 or float64.

    Args:
        values: What goes into a BatchNorm layer.
        correction: 1 for the unbiased variance.
    """
    return Moments(*_Moments.apply(values, correction))


def normalise(layer: _BatchNorm, values: Tensor, correction: int = 0) -> tuple[Tensor, Moments]:
    """What a BatchNorm layer makes of values (B, C, ...) by its recorded statistics, and :func:`moments` of them.

    Nothing flows back to the layer's own weights.
    """
    output, mean, variance = _Normalise.apply(values, layer, correction)
    return output, Moments(mean, variance)


def _measure(values: Tensor, correction: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, (C,) each."""
    exact = values.dtype if values.dtype == torch.float64 else torch.float32
    count, channels = values.numel() // values.shape[1], values.shape[1]
    freedom = max(count - correction, 1)
    if values.device.type == "cpu" and values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):
        # A third of the time, of half precision a quarter; in other layouts it takes longer. It adds up one by one, so
        # that of many values the last digits would be lost: a few images at a time.
        ignored = torch.zeros(2, channels, dtype=exact)
        parts = torch.split(values, max(1, _ADDED * channels // values[0].numel()))
        found = [torch.batch_norm_update_stats(part, ignored[0], ignored[1], 0.0) for part in parts]
        means, variances = (torch.stack(each) for each in zip(*found, strict=True))
        shares = torch.tensor([len(part) / len(values) for part in parts], dtype=exact)
        mean = shares @ means
        return mean, shares @ (variances + (means - mean).square()) * (count / freedom)
    axes = [axis for axis in range(values.ndim) if axis != 1]
    values = values.to(exact)
    mean = values.mean(axes, keepdim=True)
    # Two plain sums: torch.var_mean over several axes takes twice the time.
    return mean.flatten(), (values - mean).square_().sum(axes) / freedom


def _line(ctx: Any, values: Tensor, mean: Tensor, by_mean: Tensor, by_variance: Tensor) -> tuple[Tensor, Tensor]:
    """``a`` and ``b``, (1, C, 1, ...), of the gradient ``a + b * values`` of :func:`_measure`."""
    count = values.numel() // values.shape[1]
    slope = 2 / max(count - ctx.correction, 1) * by_variance
    shape = 1, -1, *[1] * (values.ndim - 2)
    return (by_mean / count - slope * mean).view(shape), slope.view(shape)


class _Moments(torch.autograd.Function):
    """Mean and variance with their gradient in one pass, a fifth of the time that autograd's own takes on a CPU."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, correction: int) -> tuple[Tensor, Tensor]:
        mean, variance = _measure(values, correction)
        ctx.save_for_backward(values, mean)
        ctx.correction = correction
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_mean: Tensor, by_variance: Tensor) -> tuple[Tensor, None]:
        values, mean = ctx.saved_tensors
        offset, slope = _line(ctx, values, mean, by_mean, by_variance)
        return torch.addcmul(offset, values, slope).to(values.dtype), None


class _Normalise(torch.autograd.Function):
    """:func:`normalise`: its gradient ``a + b * values + c * by_output`` takes half of what a sum of two takes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, layer: _BatchNorm, correction: int) -> tuple[Tensor, Tensor, Tensor]:
        output = F.batch_norm(values, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
        mean, variance = _measure(values, correction)
        factor = (cast("Tensor", layer.running_var) + layer.eps).rsqrt()
        ctx.save_for_backward(values, mean, factor if layer.weight is None else factor * layer.weight)
        ctx.correction = correction
        return output, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor, by_mean: Tensor, by_variance: Tensor) -> tuple[Tensor, None, None]:
        values, mean, factor = ctx.saved_tensors
        offset, slope = _line(ctx, values, mean, by_mean, by_variance)
        factor = factor.view_as(slope)
        if values.device.type != "cpu" or values.dtype == slope.dtype:
            gradient = torch.addcmul(offset, values, slope).addcmul_(by_output, factor)
            return gradient.to(values.dtype), None, None
        # CPUs convert half precision first, of a whole tensor through main memory: here a part that stays in the cache.
        gradient = torch.empty_like(values)
        images = max(1, _CACHED // values[0].numel())
        for part, x, by in zip(*(t.split(images) for t in (gradient, values, by_output)), strict=True):
            part.copy_(torch.addcmul(offset, x, slope).addcmul_(by, factor))
        return gradient, None, None
