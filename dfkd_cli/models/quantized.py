"""Networks that compute with few bits, simulated in float32: what is trained is what integer kernels compute later.

    w = s_c clamp(round(w / s_c), -m, m)                m = 2^(b-1) - 1, s_c = max |w_c| / m, of each output channel c
    x = s (clamp(round(x / s) + z, 0, n) - z)           n = 2^b - 1, s = (h - l) / n, z = round(-l / s)

Rounding is to the nearest, halves to even, and has the gradient 1 within the range and 0 outside (straight through).
The range [l, h] of activations has 0 in it, and the extremes of what was seen of some images. The range with the least
squared error is no better: a ResNet-20 (Fashion-MNIST, 91.7 %, 500 real images, the first 1,000 test images, 94.0 %)
keeps 93.9 and 93.8 % with 8 and 8 bits, 92.5 and 92.2 % with 4 and 4, of Gaussian noise 84.6 and 82.9 %.

Convolutions and linear layers round their weights and their inputs: as the SPEC says, but of the first and the last
layer with 8 bits. Kernels of integers also give integers. So what is added up, and the output of a convolution (after
BatchNorm and ReLU) that goes to something else than such layers, is rounded too, to 8 bits. Where both see one value
with 8 bits, both have the same range, and rounding twice is rounding once. Without that, onnxruntime takes 1.7 ms for
an image through a ResNet-20 (32x32 pixels, one thread of a CPU without VNNI), with it 0.7, for the float network 1.1.

Layers stay the modules that they are, under the same names, with the same parameters: only their class is a subclass
of its own. Ranges are buffers. Before these are known, nothing is rounded.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_cli.errors import ConfigError
from dfkd_cli.models.activations import first
from dfkd_cli.models.classifier import Classifier, undisturbed
from dfkd_cli.models.dataflow import Dataflow

TINY = 1e-12  # the least scale: of a channel of zeros
MOMENTUM = 0.01  # of a batch in ranges that follow
JOINT = 8  # bits of what is added up, and of the first and the last layer

Affine = tuple[Tensor, Tensor]  # scale and zero point

# -- arithmetic --------------------------------------------------------------------------------------------------------


def weight_scale(weight: Tensor, bits: int) -> Tensor:
    """The value (O,) of a weight's last bit, for each of its output channels; the weight is (O, ...)."""
    return weight.detach().flatten(1).abs().amax(1).clamp_min(TINY) / (2 ** (bits - 1) - 1)


def round_weight(weight: Tensor, bits: int, known: Affine | None = None) -> Tensor:
    """A weight (O, ...) with so many bits; scales (O,) and zeros may be known."""
    top = 2 ** (bits - 1) - 1
    scale, zero = known or affine_weight(weight, bits)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -top, top)


def affine_weight(weight: Tensor, bits: int) -> Affine:
    """The scales (O,) of a weight, and its zero points, which are zeros."""
    scale = weight_scale(weight, bits)
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def integers(layer: RoundingLayer) -> tuple[np.ndarray, np.ndarray]:
    """The integers (O, ...) int8 of a layer's weight, and the scales (O,) float32 that make the weight of them."""
    with torch.no_grad():
        parameter = layer._parameters["weight"]
        assert parameter is not None
        scale = weight_scale(parameter, layer.weight_bits)
        numbers = round_weight(parameter, layer.weight_bits) / scale.view(-1, *[1] * (parameter.ndim - 1))
    return numbers.round().to(torch.int8).cpu().numpy(), scale.cpu().numpy()


def affine(limits: Tensor, bits: int) -> Affine:
    """Scale and zero point, 0-d each, of a range (2,) that holds 0."""
    low, high = limits.unbind()
    scale = ((high - low) / (2**bits - 1)).clamp_min(TINY)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1).to(torch.int32)


def round_values(values: Tensor, limits: Tensor, bits: int, known: Affine | None = None) -> Tensor:
    """Activations of any shape with so many bits; of a range (2,) that is known and exported PyTorch's own operator."""
    if known is not None:
        return torch.fake_quantize_per_tensor_affine(values.float(), *known, 0, 2**bits - 1)
    scale, zero = affine(limits, bits)
    return _StraightThrough.apply(values.float(), scale, -zero, 2**bits - 1 - zero)


class _StraightThrough(torch.autograd.Function):
    """What PyTorch's operator computes, to the bit, in a quarter of its time on a CPU: it rounds one by one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Values to the nearest whole multiple of the scale between two."""
        rounded = (values * (1 / scale)).round_()
        inside = rounded.clamp(low, high)
        ctx.save_for_backward(rounded == inside)
        return inside.mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """1 within the range, 0 outside."""
        return torch.where(ctx.saved_tensors[0], gradient, 0), None, None, None


# -- layers ------------------------------------------------------------------------------------------------------------


class Rounding(nn.Module):
    """What a module that rounds is beside its own class: its output has few bits.

    Attributes:
        output_bits: How many; None for a float.
        output_range: (2,), infinite till it is known.
        calibrated: Whether the ranges are known.
        known: Scale and zero point of each range, and of the weight, while they do not change.
        following: The share of each batch of a training in the ranges; 0 where these stay as they are.
    """

    input_bits: int | None = None
    output_bits: int | None = None
    input_range: Tensor
    output_range: Tensor
    calibrated = False
    known: Mapping[str, Affine] = {}
    following = 0.0

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the module gives."""
        if self.input_bits is not None:
            values = self._rounded(first(*inputs, *named.values()), "input_range", self.input_bits)
            inputs, named = ((values, *inputs[1:]), named) if inputs else ((), {**named, next(iter(named)): values})
        output = super().forward(*inputs, **named)
        if self.output_bits is not None:
            output = self._rounded(output, "output_range", self.output_bits)
        self.calibrated |= self.training and self.following > 0
        return output

    def _rounded(self, values: Tensor, name: str, bits: int) -> Tensor:
        limits: Tensor = getattr(self, name)
        if self.training and self.following:
            low, high = values.detach().float().aminmax()
            ends = torch.stack([low.clamp_max(0), high.clamp_min(0)])
            limits.lerp_(ends, self.following) if self.calibrated else limits.copy_(ends)
        return round_values(values, limits, bits, self.known.get(name)) if self.calibrated else values

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.calibrated = all(bool(getattr(self, name).isfinite().all()) for name in self.ranges)

    @property
    def ranges(self) -> dict[str, int]:
        """The bits of each range, by its name."""
        bits = {"input_range": self.input_bits, "output_range": self.output_bits}
        return {name: count for name, count in bits.items() if count is not None}


class RoundingLayer(Rounding):
    """A layer whose weight and input have few bits.

    Attributes:
        weight_bits, input_bits: How many.
        input_range: (2,), infinite till it is known.
    """

    weight_bits: int

    @property
    def weight(self) -> Tensor:
        """The weight as it is computed with; the parameter itself is in the state dict."""
        parameter = self._parameters["weight"]
        assert parameter is not None
        return round_weight(parameter, self.weight_bits, self.known.get("weight")) if self.calibrated else parameter


def _become(module: nn.Module, kind: Any, **bits: int) -> None:
    """Give a module one of the classes above, or more bits to know of."""
    if not isinstance(module, kind):
        own: Any = type(module)
        module.__class__ = _subclass(kind, own)
    for name, count in bits.items():
        setattr(module, name, count)
        if name != "weight_bits":
            like = next(module.parameters(), torch.empty(0))
            unknown = torch.tensor([torch.inf, -torch.inf], device=like.device)
            module.register_buffer(name.replace("bits", "range"), unknown)


@functools.cache
def _subclass(kind: Any, own: Any) -> Any:
    return type(f"{kind.__name__}{own.__name__}", (kind, own), {"__module__": own.__module__, "__doc__": own.__doc__})


# -- networks ----------------------------------------------------------------------------------------------------------


def quantize(net: nn.Module, weights: int, activations: int, input_size: tuple[int, int, int], spec: str) -> None:
    """Make a network round, in place; the ranges of its activations are still to be found.

    Args:
        net: It takes normalised images (B, C, H, W).
        weights: Bits of weights.
        activations: Bits of activations.
        input_size: C, H, W.
        spec: What the network is called.

    Raises:
        ConfigError: Nothing in it can be quantised.
    """
    seen = Dataflow(net, input_size)
    if not seen.layers:
        hint = "it has no convolution or linear layer that runs and has a weight of its own"
        raise ConfigError(f"{spec}: nothing in it can be quantised", hint)
    ends = (seen.layers[0], seen.layers[-1])
    for layer in seen.layers:
        w, a = (JOINT, JOINT) if layer in ends else (weights, activations)
        _become(layer, RoundingLayer, weight_bits=w, input_bits=a)
    for module in seen.joints():
        _become(module, Rounding, output_bits=JOINT)


def computed_in_float(net: nn.Module, input_size: tuple[int, int, int]) -> list[str]:
    """The modules in which something is computed that stays float.

    That is in other layers, in those whose weight is computed (weight and spectral norm), in attention, and in
    functional convolutions.
    """
    return Dataflow(net, input_size).elsewhere


def quantisers(net: nn.Module) -> list[Rounding]:
    """The modules that round, in module order."""
    return [module for module in net.modules() if isinstance(module, Rounding)]


@contextlib.contextmanager
def unchanging(net: nn.Module) -> Iterator[None]:
    """Compute no scale anew inside the ``with`` block, where weights and ranges stay: what is exported is shorter."""
    for module in quantisers(net):
        known = {name: affine(getattr(module, name), bits) for name, bits in module.ranges.items()}
        if isinstance(module, RoundingLayer):
            weight = module._parameters["weight"]
            assert weight is not None
            known["weight"] = affine_weight(weight, module.weight_bits)
        module.known = known
    try:
        yield
    finally:
        for module in quantisers(net):
            module.known = {}


def follow_ranges(net: nn.Module) -> None:
    """Let the ranges follow, as moving averages, what a network sees in training: where there are no images before."""
    for module in quantisers(net):
        module.following = MOMENTUM


@torch.no_grad()
def find_ranges(classifier: Classifier, batches: Iterable[Tensor]) -> None:
    """Find the ranges of all activations that are rounded: the extremes of what comes by, nothing being rounded.

    Args:
        classifier: It is only changed where it has quantisers.
        batches: Pixels (B, C, H, W), where the classifier is.
    """
    modules = quantisers(classifier.net)
    for module in modules:
        module.calibrated = False
    sites = [(module, name) for module in modules for name in module.ranges]
    ends = [[0.0, 0.0] for _ in sites]  # zero is in every range

    def stretch(at: int, values: Tensor) -> None:
        low, high = (float(end) for end in values.aminmax())
        ends[at] = [min(ends[at][0], low), max(ends[at][1], high)]

    with contextlib.ExitStack() as stack:
        stack.enter_context(undisturbed(classifier))
        for at, (module, name) in enumerate(sites):
            if name == "input_range":
                hook: Any = module.register_forward_pre_hook(
                    lambda _, inputs, named, at=at: stretch(at, first(*inputs, *named.values())), with_kwargs=True
                )
            else:
                hook = module.register_forward_hook(lambda _, __, output, at=at: stretch(at, output))
            stack.enter_context(hook)
        for pixels in batches:
            classifier(pixels)
    for (module, name), limits in zip(sites, ends, strict=True):
        getattr(module, name).copy_(torch.tensor(limits))
    for module in modules:
        module.calibrated = True
