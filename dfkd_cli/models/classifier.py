"""A network together with everything needed to use it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_cli.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class ModelInfo:
    """What a network is and what it expects.

    Args:
        spec: Model SPEC that builds the architecture.
        num_classes: Number of logits K.
        input_size: Images (C, H, W).
        mean, std: Per channel, for pixels in [0, 1].
        classes: Class names in the order of the logits, where known.

    Raises:
        ConfigError: The values do not fit each other.
    """

    spec: str
    num_classes: int
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        sizes = (self.num_classes, *self.input_size)
        if len(sizes) != 4 or not all(type(size) is int and size > 0 for size in sizes):
            raise ConfigError(
                f"{self.num_classes!r} classes of {self.input_size!r} images: not positive whole numbers",
                "the image size is channels, height, width",
            )
        channels = self.input_size[0]
        if not len(self.mean) == len(self.std) == channels:
            raise ConfigError(
                f"{channels}-channel images need {channels} means and standard deviations, "
                f"got {len(self.mean)} and {len(self.std)}",
                "give one value per channel to --mean and --std",
            )
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise ConfigError(f"mean {self.mean}, std {self.std}: every std must be above 0 and every value finite")
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ConfigError(f"{len(self.classes)} class names for {self.num_classes} classes")


class Classifier(nn.Module):
    """Pixels in [0, 1], float (B, C, H, W), to logits (B, K): normalises with its own mean and std, then runs ``net``.

    ``net`` alone takes images that are already normalised. Only ``net`` is in the state dict.
    """

    mean: Tensor  # (1, C, 1, 1)
    std: Tensor  # (1, C, 1, 1)

    def __init__(self, net: nn.Module, info: ModelInfo) -> None:
        super().__init__()
        self.net = net
        self.info = info
        self.frozen = False
        self._before: list[tuple[Any, str, bool]] = []  # what freezing changed: of what, its attribute, its value
        self.register_buffer("mean", torch.tensor(info.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(info.std).view(1, -1, 1, 1), persistent=False)
        self._normalised = not any(info.mean) and set(info.std) == {1.0}

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] to what ``net`` takes, both (B, C, H, W)."""
        return pixels if self._normalised else (pixels - self.mean) / self.std

    def denormalise(self, inputs: Tensor) -> Tensor:
        """What ``net`` takes to pixels in [0, 1], both (B, C, H, W)."""
        return inputs if self._normalised else inputs * self.std + self.mean

    def background(self, fill: Literal["black", "mean"]) -> Tensor | float:
        """What an augmentation fills pixels (B, C, H, W) up with: 0, or the mean of each channel (C,)."""
        return self.mean.flatten() if fill == "mean" else 0.0

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(self.normalise(pixels))

    def freeze(self) -> Classifier:
        """Evaluation mode, even when a parent module is set to train, and no gradients for parameters, till thawed."""
        if not self.frozen:
            self._before = [(module, "training", module.training) for module in self.modules()]
            self._before += [(parameter, "requires_grad", parameter.requires_grad) for parameter in self.parameters()]
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def thaw(self) -> Classifier:
        """The modes and the parameters' need of gradients as they were before the classifier was frozen."""
        self.frozen = False
        while self._before:
            owner, attribute, value = self._before.pop()
            setattr(owner, attribute, value)
        return self

    def train(self, mode: bool = True) -> Classifier:
        """Set the mode; a frozen classifier stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def lay_out(self) -> Classifier:
        """Its weights in the layout in which passes are quicker: channels last where there is BatchNorm.

        On CPUs that makes steps of ResNets 1.2 to 1.4 times faster, and LeNet's slower; convolutions in half precision
        on GPUs gain too.
        """
        return self.to(memory_format=torch.channels_last if self.batch_norms() else torch.contiguous_format)

    @property
    def num_parameters(self) -> int:
        """Number of trainable and frozen parameters, each counted once."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    def batch_norms(self) -> list[_BatchNorm]:
        """The BatchNorm layers of any dimension that have running statistics, in module order."""
        return [m for m in self.net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]

    def head(self) -> nn.Linear | nn.Conv2d:
        """The layer whose output is the logits: a linear layer or a 1x1 convolution.

        Raises:
            ArtifactError: The logits are not the unchanged output of such a layer.
        """
        # Holding the outputs keeps their memory from being reused.
        seen: list[tuple[nn.Linear | nn.Conv2d, Tensor, int]] = []

        def remember(layer: nn.Linear | nn.Conv2d, _: Any, output: Tensor) -> None:
            seen.append((layer, output, output._version))

        layers = [m for m in self.net.modules() if isinstance(m, nn.Linear) or _is_1x1(m)]
        hooks = [layer.register_forward_hook(remember) for layer in layers]
        try:
            logits = probe(self.net, self.info.input_size)
        finally:
            for hook in hooks:
                hook.remove()
        for layer, output, version in seen:
            # The same memory, perhaps viewed in another shape. The version tells whether an in-place activation
            # overwrote the layer's output afterwards.
            if (output.data_ptr(), output.numel(), version) == (logits.data_ptr(), logits.numel(), logits._version):
                return layer
        raise ArtifactError(
            f"{self.info.spec}: no linear layer gives the logits",
            "this method needs a classifier that ends in a linear layer or a 1x1 convolution",
        )


def _is_1x1(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


def probe(net: nn.Module, input_size: tuple[int, int, int]) -> Any:
    """The output of ``net`` for one zero image (1, C, H, W), in evaluation mode and without gradients.

    Modes, buffers and the random state are afterwards as they were before, also when ``net`` fails.
    """
    like = next(net.parameters(), torch.empty(0))
    modes = [(module, module.training) for module in net.modules()]
    with torch.no_grad(), torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
        net.eval()
        try:
            return net(like.new_zeros(1, *input_size))
        finally:
            for module, mode in modes:
                module.training = mode
