"""What a teacher's BatchNorm layers remember of its training data, and what they see of other images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dfkd_cli.models.classifier import Classifier


@dataclass(frozen=True)
class Moments:
    """Mean and variance per channel, (C,) each."""

    mean: Tensor
    variance: Tensor


def moments(values: Tensor, correction: int = 0) -> Moments:
    """The moments of values (B, C, ...) by channel, over images and positions.

    Args:
        values: What goes into a BatchNorm layer.
        correction: 1 for the unbiased variance.
    """
    axes = [axis for axis in range(values.ndim) if axis != 1]
    count = values.numel() // values.shape[1]
    # Two plain means: on CPUs, torch.var_mean over several axes takes twice the time, forward and backward.
    mean = values.mean(axes, keepdim=True)
    variance = (values - mean).square().sum(axes) / max(count - correction, 1)
    return Moments(mean.flatten(), variance)


def recorded_moments(classifier: Classifier) -> dict[str, Moments]:
    """The running statistics of every BatchNorm layer, by its name in ``net``: those of the training data."""
    found = {}
    for name, layer in _layers(classifier).items():
        mean, variance = layer.running_mean, layer.running_var
        assert isinstance(mean, Tensor) and isinstance(variance, Tensor)  # what batch_norms() is about
        found[name] = Moments(mean, variance)
    return found


@contextlib.contextmanager
def batch_moments(classifier: Classifier, correction: int = 0) -> Iterator[dict[str, Moments]]:
    """The moments of what last went into every BatchNorm layer, whenever ``net`` runs inside the ``with`` block."""
    seen: dict[str, Moments] = {}

    def watch(name: str) -> Any:
        return lambda _, inputs: seen.update({name: moments(inputs[0].float(), correction)})

    with contextlib.ExitStack() as hooks:
        for name, layer in _layers(classifier).items():
            hooks.enter_context(layer.register_forward_pre_hook(watch(name)))
        yield seen


def gaussian_divergence(p: Moments, q: Moments, epsilon: float = 1e-6) -> Tensor:
    """``KL(N(p) || N(q))`` per channel (C,), in nats; variances are at least ``epsilon``."""
    ours, theirs = p.variance.clamp_min(epsilon), q.variance.clamp_min(epsilon)
    ratio = ours / theirs
    return 0.5 * (ratio + (p.mean - q.mean).square() / theirs - 1 - ratio.log())


def _layers(classifier: Classifier) -> dict[str, nn.Module]:
    normalising = set(classifier.batch_norms())
    return {name: layer for name, layer in classifier.net.named_modules() if layer in normalising}
