"""A network together with everything needed to use it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

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

    def of_pixels(self, spec: str | None = None) -> ModelInfo:
        """The same of a network, perhaps another one, that takes pixels as they are."""
        channels = self.input_size[0]
        return dataclasses.replace(self, spec=spec or self.spec, mean=(0.0,) * channels, std=(1.0,) * channels)


class Classifier(nn.Module):
    """Pixels in [0, 1], float (B, C, H, W), to logits (B, K): normalises with its own mean and std, then runs ``net``.

    ``net`` alone takes images that are already normalised. Only ``net`` is in the state dict.

    Attributes:
        opaque: Whether nothing is seen of it but answers: it has neither gradients nor layers.
        keeps_statistics: Whether its BatchNorm layers normalise with the statistics that they have in training too.
    """

    opaque: bool = False
    mean: Tensor  # (1, C, 1, 1)
    std: Tensor  # (1, C, 1, 1)

    def __init__(self, net: nn.Module, info: ModelInfo) -> None:
        super().__init__()
        self.net = net
        self.info = info
        self.frozen = self.keeps_statistics = False
        self.recorded: dict[str, int] = {}  # what of its cost is on record
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
        """Evaluation mode, even when a parent module is set to train, and no gradients for parameters, from now on."""
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Classifier:
        """Set the mode; a frozen classifier stays in evaluation mode, as BatchNorm does that keeps its statistics."""
        super().train(mode and not self.frozen)
        for layer in self.batch_norms() if self.keeps_statistics else ():
            layer.eval()
        return self

    def lay_out(self) -> Classifier:
        """Its weights in the layout in which passes are quicker."""
        return self.to(memory_format=self.layout())

    def layout(self) -> torch.memory_format:
        """Channels last where there is BatchNorm and the network can run so.

        On CPUs that makes steps of ResNets 1.2 to 1.4 times faster, and LeNet's slower; convolutions in half precision
        on GPUs gain too.
        """
        quick = self.batch_norms() and self.takes_channels_last()
        return torch.channels_last if quick else torch.contiguous_format

    def takes_channels_last(self) -> bool:
        """Whether ``net`` runs with its weights in that layout too: ``view`` of what comes out of them may fail.

        It is not tried on the weights themselves, as those of one channel or of 1x1 pixels do not turn back.
        """
        weights = dict(self.net.named_parameters())
        if any(weight.ndim == 5 for weight in weights.values()):
            return False  # that of networks with volumes is another one
        last = {name: weight.to(memory_format=torch.channels_last) for name, weight in weights.items()
                if weight.ndim == 4}  # fmt: skip
        images = noise(self.net, self.info.input_size, 2)

        def runs(weights: dict[str, Tensor], training: bool) -> bool:
            with undisturbed(self.net, training), contextlib.suppress(RuntimeError):
                torch.func.functional_call(self.net, weights, images.clone())
                return True
            return False

        return runs(last, False) and (runs(last, True) or not runs({}, True))

    @property
    def num_parameters(self) -> int:
        """Number of trainable and frozen parameters, each counted once."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    def batch_norms(self) -> list[_BatchNorm]:
        """The BatchNorm layers of any dimension that have statistics, running or frozen, in module order."""
        return [m for m in self.net.modules() if is_batch_norm(m) and m.running_mean is not None]

    def head(self) -> nn.Module:
        """The layer whose ``weight`` has a row for each class: its output is the logits.

        A factor and a shift may follow, of all classes of an image (a temperature, ``log_softmax``) or of each class
        (BatchNorm).

        Raises:
            ArtifactError: There is no such layer.
        """
        outputs: dict[nn.Module, Tensor] = {}

        def remember(layer: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.shape[:2] == (EXAMPLES, self.info.num_classes):
                output = (
                    output.flatten(2).mean(2) if output.ndim > 2 else output
                )  # averaged over what is left of an image
            if isinstance(output, Tensor) and output.numel() == EXAMPLES * self.info.num_classes:
                outputs[layer] = output.reshape(EXAMPLES, -1).clone()  # what follows may change it in place

        layers = [m for m in self.net.modules() if _rows(m) == self.info.num_classes]
        with contextlib.ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(layer.register_forward_hook(remember))
            logits = probe(self.net, self.info.input_size, EXAMPLES).reshape(EXAMPLES, -1)
        for layer, output in reversed(outputs.items()):
            if _follows(logits.float(), output.float()):
                return layer
        names = ", ".join(name for name, layer in self.net.named_modules() if layer in outputs)
        raise ArtifactError(
            f"{self.info.spec}: no linear layer gives the logits"
            + (f": they are not those of {names} times a factor" if names else ""),
            "this method needs each class's weights: a last linear layer or 1x1 convolution, an output a class",
        )


EXAMPLES = 8  # images that tell whether logits always follow a layer's output


def _rows(layer: nn.Module) -> int | None:
    """The rows of a layer's weight matrix, None where it has none."""
    weight = getattr(layer, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and not is_lazy(weight) and weight.ndim > 1 else None


def unit_weights(layer: nn.Module) -> Tensor:
    """The weights of each of a layer's units, (K, D) float32 on the CPU."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1).float().cpu()


def _follows(logits: Tensor, output: Tensor) -> bool:
    """Whether logits (B, K) are the output (B, K) times a factor, shifted alike for all classes or for all images."""
    if torch.allclose(logits, output, equal_nan=True):
        return True
    for centre, alike in ((1, (0, 1)), (0, (0,))):
        x, y = (values - values.mean(centre, keepdim=True) for values in (output, logits))
        slope = (x * y).sum(alike, keepdim=True) / x.square().sum(alike, keepdim=True).clamp_min(1e-30)
        if (slope >= 0).all() and torch.allclose(slope * x, y, rtol=1e-3, atol=1e-4 * float(y.abs().max())):
            return True
    return False


def is_batch_norm(layer: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether a layer is BatchNorm, or the like of somebody's own: with statistics of each channel, in any shape."""
    if isinstance(layer, _NormBase):
        return isinstance(layer, _BatchNorm)
    sizes = [value.shape for name in ("running_mean", "running_var")
             if isinstance(value := getattr(layer, name, None), Tensor) and not is_lazy(value)]  # fmt: skip
    return len(sizes) == 2 and sizes[0] == sizes[1] and sizes[0].numel() == max(sizes[0], default=0)


def probe(net: nn.Module, input_size: tuple[int, int, int], count: int = 1) -> Any:
    """The output of ``net`` for some images of noise (B, C, H, W), without gradients.

    Modes, buffers and the random state are afterwards as they were before, also when ``net`` fails.
    """
    with undisturbed(net):
        return net(noise(net, input_size, count))


def noise(net: nn.Module, input_size: tuple[int, int, int], count: int) -> Tensor:
    """Always the same normal noise (B, C, H, W), where the network is."""
    like = _like(net)
    images = torch.randn(count, *input_size, generator=torch.Generator().manual_seed(0))
    return images.to(like.device, like.dtype)


def _like(net: nn.Module) -> Tensor:
    """A tensor where the network is, of the type that its images have: whole and complex numbers may be beside it."""
    parameters = list(net.parameters())
    floats = (parameter for parameter in parameters if parameter.dtype.is_floating_point)
    return next(floats, torch.empty(0, device=parameters[0].device if parameters else None))


@contextlib.contextmanager
def in_mode(net: nn.Module, training: bool) -> Iterator[None]:
    """Set the mode of ``net`` and all its modules, and then set each back.

    What a network does when its mode is set, such as to merge weights, it has to undo itself when it is set back.
    """
    was, modes = net.training, [(module, module.training) for module in net.modules()]
    net.train(training)
    try:
        yield
    finally:
        net.train(was)
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def undisturbed(net: nn.Module, training: bool = False) -> Iterator[None]:
    """Run ``net`` in one mode and without gradients; then modes, values and the random state are as they were.

    So are parameters that a pass changes, as statistics may be.
    """
    like = _like(net)
    cuda = [like.device] if like.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda), in_mode(net, training):
        held = [
            (module, name, tensor, tensor.clone())
            for module in net.modules()
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            if not is_lazy(tensor)
        ]
        try:
            yield
        finally:
            for module, name, tensor, value in held:
                setattr(module, name, tensor)  # another one may have been put in its place
                if tensor.shape != value.shape:
                    tensor.resize_(value.shape)
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
