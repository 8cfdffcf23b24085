"""The loss on the straight line between the weights of two networks.

    L(t)    = mean cross-entropy with the labels of some training images, of the weights (1 - t) w_a + t w_b
    barrier = max_{0 <= t <= 1}  L(t) - (1 - t) L(0) - t L(1)

Goodfellow, Vinyals, Saxe. Qualitatively Characterizing Neural Network Optimization Problems. ICLR 2015.
arXiv:1412.6544.
Entezari, Sedghi, Saukh, Neyshabur. The Role of Permutation Invariance in Linear Mode Connectivity of Neural Networks.
ICLR 2022. arXiv:2110.06296.

Where there is no barrier, both are in one valley: what one of them learned last, the other could have reached downhill.
Units are not permuted to fit each other, so that networks from different first weights have barriers as a rule.

BatchNorm's averages are estimated anew at every point, as for averaged weights (Izmailov et al., arXiv:1803.05407):
what lies between two networks' is what no network saw, and its variances are too large (Jordan et al.,
arXiv:2211.08403). They are the moments of what layers see of the same images, in batches of about 100 that are
normalised by themselves. That holds for both ends too: of a network with BatchNorm these have the loss that such
averages give, not those of its training.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.activations import batch_statistics
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.names import LoadedModel
from dfkd_cli.models.statistics import running_moments

AT = [step / 16 for step in range(-4, 21)]  # from before the first network to beyond the second
NORMALISED_AT_ONCE = 100  # images


@dataclass(frozen=True, eq=False)
class End:
    """A network that lines may go out from.

    Attributes:
        model: It.
        dataset: Of the images.
        images: Labelled as the network counts its classes.
    """

    model: LoadedModel
    dataset: str
    images: Images

    def meets(self, other: End) -> bool:
        """Whether there is a line to another one: it has weights of the same kind, for the same answers and images."""
        return self._facts == other._facts and bool(self.model.classifier.state_dict())

    @property
    def _facts(self) -> tuple[Any, ...]:
        shapes = [(name, value.shape) for name, value in self.model.classifier.state_dict().items()]
        return self.dataset, self.model.classifier.info, shapes


def pairs(ends: Sequence[End]) -> list[tuple[End, End]]:
    """Every two networks with a line between them.

    Raises:
        ConfigError: There are none.
    """
    found = [(a, b) for a, b in itertools.combinations(ends, 2) if a.meets(b)]
    if not found:
        named = ", ".join(f"{end.model.path} ({end.model.classifier.info.spec})" for end in ends)
        raise ConfigError(
            f"--line: no two of the models have the same architecture, input, classes and dataset: {named}",
            "give two students of the same SPEC",
        )
    return found


def line(first: End, second: End, device: torch.device, batch_size: int) -> dict[str, Any]:
    """Loss and top-1 from one network to another.

    Returns:
        ``points``, each ``{"at": t, "loss": nats per image, "top1": share}``, and ``barrier``, in nats.
    """
    start, end = first.model.classifier.state_dict(), second.model.classifier.state_dict()
    between, images = copy.deepcopy(first.model.classifier).eval().to(device), first.images.to(device)
    points = []
    for at in AT:
        between.load_state_dict(mixed(start, end, at))
        estimate_statistics(between, images)
        points.append({"at": at, **_answers(between, images, batch_size)})
    return {"points": points, "barrier": barrier(points)}


def barrier(points: Sequence[Mapping[str, float]]) -> float:
    """How far the loss rises, at most, above the chord between its values at 0 and 1."""
    loss = {point["at"]: point["loss"] for point in points}
    return max(loss[at] - (1 - at) * loss[0.0] - at * loss[1.0] for at in loss if 0 <= at <= 1)


def mixed(first: Mapping[str, Tensor], second: Mapping[str, Tensor], at: float) -> dict[str, Tensor]:
    """The state at a place between two; counters are those of the first."""
    return {
        name: torch.lerp(value, second[name], at) if value.is_floating_point() else value
        for name, value in first.items()
    }


@torch.no_grad()
def estimate_statistics(model: Classifier, images: Images) -> None:
    """Set the averages of BatchNorm layers to the moments of what they see of images, variances unbiased as ever."""
    layers = {name: layer for name, layer in model.net.named_modules() if isinstance(layer, _BatchNorm)}
    if not layers:
        return
    count = len(images.pixels)
    with batch_statistics(model), running_moments(model) as seen:
        # Parts of nearly the same size: a single image that is left over may be too few.
        for rows in torch.arange(count, device=images.pixels.device).tensor_split(-(-count // NORMALISED_AT_ONCE)):
            model(images[rows].pixels)
    for name in seen.keys() & layers.keys():
        mean, variance = layers[name].running_mean, layers[name].running_var
        assert mean is not None and variance is not None  # what running moments are of
        mean.copy_(seen[name].mean)
        variance.copy_(seen[name].variance * seen[name].count / max(seen[name].count - 1, 1))


@torch.no_grad()
def _answers(model: Classifier, images: Images, batch_size: int) -> dict[str, float]:
    loss, right = 0.0, 0
    for part in images.split(batch_size):
        logits, labels = model(part.pixels), part.true_labels
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(1) == labels).sum())
    return {"loss": loss / len(images.pixels), "top1": right / len(images.pixels)}
