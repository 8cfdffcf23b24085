"""Data-Free Knowledge Distillation for Deep Neural Networks: images from recorded statistics of activations.

Lopes, Fenu, Starner. NIPS workshop 2017. arXiv:1710.07535.

    a_l ~ N(mu_lk, Sigma_lk)      for an image of class k, in every layer l; the statistics are in the metadata
    x   = argmin_x  1/D_l mean (ReLU(a_l) - ReLU(h_l(x)))^2          h_l: what goes into the activation, D_l units

``top`` takes the logits alone, divided by the metadata's temperature (and without the factor 1/D_l), ``all`` the sum
over all recorded layers. ``all-dropout`` is ``all`` with one fixed binary mask for each dropout layer of the teacher,
drawn anew for every batch. The metadata comes from ``dfkd collect-metadata``, which needs the training
images: what is made with it uses no image, but says that it uses metadata. The recorded ``targets`` are the classes.

The spectral variants are our reading of the paper's description; the released code leaves them out (its classes of
that name compute ``all``, its statistics of the graph cannot run). The units of the layers are the nodes of a graph,
their covariance in class k weighs its edges, and the activations are a signal on it: an image shall have the
coefficients of a sample on the ``spectrum`` share of the graph's eigenvectors V_k that have the largest eigenvalues,

    x = argmin_x  mean (V_k^T (ReLU(a) - ReLU(h(x))))^2

``spectral-all`` takes one graph of the layers that have a covariance, ``spectral-pairs`` one of every two adjacent ones
of them, and their mean. Layers are sampled together here.

Other differences from the released code:

- It multiplies the noise by Sigma itself, whose covariance is Sigma^2. ``sampling: gaussian`` (the default) takes the
  symmetric square root: the covariances are singular, so that they have no Cholesky factor. ``code`` does as the code.
- Layers without a covariance are sampled unit by unit. In the code this is conv1 of LeNet-5; here it is every layer in
  front of the last ``--covariance-units`` units, which for LeNet-5 is conv1 too.
- Starting images are N(0.15, 0.1) there for MNIST and N(0.44, 0.29) for CelebA. Here mean and deviation are the
  teacher's own, by channel.
- What a mask keeps is divided by the share that it keeps, as PyTorch's dropout does in training. The code does not, and
  scales activations by that share where nothing is dropped, for a teacher whose dropout is of the older kind.
- A batch has images of all classes in turn instead of one class. Images do not depend on each other.
- ``total_variation`` is no part of the paper and is off.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_cli.config import option
from dfkd_cli.errors import ArtifactError
from dfkd_cli.models.activations import Tap
from dfkd_cli.synthesis_options import ImageOptimization
from dfkd_cli.synthesizers.base import ImageOptimizer, Look, SynthesisTask
from dfkd_cli.synthesizers.terms import total_variation

DROPOUTS: dict[type[nn.Module], Callable[[Tensor, float], Tensor]] = {
    nn.Dropout: F.dropout, nn.Dropout1d: F.dropout1d, nn.Dropout2d: F.dropout2d, nn.Dropout3d: F.dropout3d
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(ImageOptimization):
    """Images from activation statistics."""

    batch_size: int = 64
    iterations: int = 1000
    lr: float = 0.07
    variant: Literal["top", "all", "all-dropout", "spectral-all", "spectral-pairs"] = option("all", "what is matched")
    sampling: Literal["gaussian", "code"] = option("gaussian", "noise times the root of the covariance, or times it")
    spectrum: float = option(0.1, "share of the eigenvectors that spectral variants keep", above=0, high=1)
    reconstruction: float = option(1.0, "weight of the distance to the sampled activations", low=0)
    total_variation: float = option(0.0, "weight of a smoothness prior, squared neighbour differences", low=0)


@dataclass
class Activations:
    """What a batch of images is to be like inside the teacher.

    Attributes:
        labels: (B, K) one-hot classes.
        values: (B, D) each, sampled activations, by layer.
        bases: For each part and class of a spectral variant: the layers, the rows of the batch (n,), and the
            eigenvectors (U, Q).
    """

    labels: Tensor
    values: Mapping[str, Tensor]
    bases: Sequence[tuple[tuple[str, ...], Tensor, Tensor]]


class Lopes(ImageOptimizer):
    """Images whose activations are samples of the metadata's statistics."""

    needs = ("metadata",)
    config: Config

    def __init__(self, task: SynthesisTask, config: Config) -> None:
        super().__init__(task, config)
        assert task.metadata is not None  # it is among the needs
        self.metadata = metadata = task.metadata
        self.head = list(metadata.layers)[-1]
        self.parts = self._parts()
        watched = {name for part in self.parts for name in part} - {self.head}  # its output is the logits
        self.taps = {name: Tap(self.teacher.net.get_submodule(name)) for name in metadata.layers if name in watched}
        # A class without statistics cannot be sampled.
        self.possible = torch.tensor([label for label, count in enumerate(metadata.counts) if count])
        self.dropouts: list[nn.Module] = []
        if config.variant == "all-dropout":
            self.dropouts = [m for m in self.teacher.net.modules() if any(isinstance(m, kind) for kind in DROPOUTS)]
            if not self.dropouts:
                raise ArtifactError(f"{self.teacher.info.spec} has no dropout layer", "choose another --variant")
        self.factor, self.basis = functools.cache(self._factor), functools.cache(self._basis)

    @property
    def spectral(self) -> bool:
        """Whether the layers of a part are compared by their common spectrum."""
        return self.config.variant.startswith("spectral")

    def _parts(self) -> list[tuple[str, ...]]:
        """The layers that are compared together."""
        if self.config.variant == "top":
            return [(self.head,)]
        if not self.spectral:
            return [(name,) for name in self.metadata.layers]
        joint = self.metadata.joint
        if len(joint) < 2:
            raise ArtifactError(
                f"--variant {self.config.variant} needs metadata with the covariance of at least two layers",
                "collect it with more --covariance-units",
            )
        return [joint] if self.config.variant == "spectral-all" else list(itertools.pairwise(joint))

    def labels(self, first: int, count: int) -> Tensor:
        """The classes (count,) of images ``first`` to ``first + count``: they take turns."""
        return self.possible[torch.arange(first, first + count) % len(self.possible)]

    def targets(self, first: int, count: int) -> Activations:
        """Samples of the activations for the classes."""
        labels = self.labels(first, count)
        values = {name: value.relu() for name, value in self.sample(labels).items()}
        one_hot = F.one_hot(labels, self.teacher.info.num_classes).float()
        parts = itertools.product(self.parts if self.spectral else (), sorted(set(labels.tolist())))
        bases = [(names, (labels == label).nonzero().squeeze(1), self.basis(names, label)) for names, label in parts]
        return Activations(one_hot, values, bases)

    def soft_labels(self, targets: Activations) -> Tensor:
        """The classes."""
        return targets.labels

    def start(self, count: int) -> Tensor:
        """Gaussian noise with the teacher's own mean and deviation."""
        noise = torch.randn(count, *self.teacher.info.input_size)
        return self.teacher.mean.cpu() + self.teacher.std.cpu() * noise

    @contextlib.contextmanager
    def looking(self) -> Iterator[Callable[[Tensor], Look]]:
        """The dropout masks are fixed meanwhile."""
        with super().looking() as show, fixed_dropout(self.dropouts):
            yield show

    def sample(self, labels: Tensor) -> dict[str, Tensor]:
        """One draw of activations (B, D) of every layer that is watched, for classes (B,)."""
        drawn: dict[str, Tensor] = {}
        for names in [self.metadata.joint] if self.spectral else self.parts:
            layers = [self.metadata.layers[name] for name in names]
            mean = torch.cat([layer.mean for layer in layers], 1)[labels]
            noise = torch.randn(mean.shape)
            if layers[0].joint:
                with torch.autocast("cpu", enabled=False):  # it would round them
                    for label in set(labels.tolist()):
                        noise[labels == label] @= self.factor(names, label)
            else:
                noise *= layers[0].std[labels]
            parts = torch.split(mean + noise, [layer.mean.shape[1] for layer in layers], dim=1)
            drawn |= dict(zip(names, parts, strict=True))
        return drawn

    def _factor(self, names: tuple[str, ...], label: int) -> Tensor:
        """What the noise of layers is multiplied by (U, U) for a class."""
        covariance = self.metadata.block(names)[label]
        return covariance if self.config.sampling == "code" else square_root(covariance)

    def _basis(self, names: tuple[str, ...], label: int) -> Tensor:
        """The eigenvectors (U, Q) that layers are seen in for a class."""
        return leading_eigenvectors(self.metadata.block(names)[label], self.config.spectrum)

    def terms(self, look: Look, targets: Activations) -> dict[str, Tensor]:
        """The distance to the sampled activations, and the smoothness prior where it is on."""
        outputs = {name: output.flatten(1) for name, output in look.features.items()}
        outputs[self.head] = look.logits / self.metadata.temperature
        active = {name: outputs[name].relu() for name in targets.values}
        if self.config.variant == "top":
            distance = F.mse_loss(active[self.head], targets.values[self.head])
        elif self.spectral:
            gaps = {name: value - active[name] for name, value in targets.values.items()}
            chosen = [(torch.cat([gaps[n][rows] for n in names], 1), basis) for names, rows, basis in targets.bases]
            distance = spectral_distance(chosen, len(look.images), len(self.parts))
        else:
            distance = layerwise_distance(active, targets.values)
        terms = {"reconstruction": distance}
        if self.config.total_variation:
            terms["total_variation"] = total_variation(look.images)
        return terms


def square_root(covariance: Tensor) -> Tensor:
    """The symmetric square root (U, U) of a covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return ((vectors * values.clamp_min(0).sqrt()) @ vectors.T).float()


def leading_eigenvectors(covariance: Tensor, share: float) -> Tensor:
    """The eigenvectors (U, Q) with the largest eigenvalues, ``Q = ceil(share * U)``."""
    vectors = torch.linalg.eigh(covariance.double())[1]
    return vectors[:, -math.ceil(share * len(vectors)) :].float()


def layerwise_distance(activations: Mapping[str, Tensor], aims: Mapping[str, Tensor]) -> Tensor:
    """Mean squared difference of each layer's activations (B, D) divided once more by D, summed over the layers."""
    return torch.stack([F.mse_loss(activations[name], aim) / aim.shape[1] for name, aim in aims.items()]).sum()


def spectral_distance(gaps: Sequence[tuple[Tensor, Tensor]], images: int, parts: int) -> Tensor:
    """Mean square of the coefficients of gaps.

    Args:
        gaps: Gaps (n, U) of some images, and the basis (U, Q) they are seen in.
        images: Of the batch; each is in the gaps once for every part.
        parts: Parts that are compared; the result is the mean over them.
    """
    with torch.autocast(gaps[0][0].device.type, enabled=False):
        squares = [(gap.float() @ basis).square().sum() / basis.shape[1] for gap, basis in gaps]
    return torch.stack(squares).sum() / (images * parts)


@contextlib.contextmanager
def fixed_dropout(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Multiply what each of the layers gives by one mask of zeros and 1 / (1 - p), drawn when it first runs.

    A layer that runs at several places has one for each shape that comes by.
    """
    masks: dict[tuple[nn.Module, torch.Size], Tensor] = {}

    def drop(layer: Any, _: Any, output: Tensor) -> Tensor:
        if (key := (layer, output.shape)) not in masks:  # on the CPU, so that masks do not depend on the device
            function = next(function for kind, function in DROPOUTS.items() if isinstance(layer, kind))
            masks[key] = function(torch.ones(output.shape), layer.p).to(output)
        return output * masks[key]

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(drop))
        yield
