"""Soft-targeted transfer set: data impressions for targets from a normal distribution of the logits.

Wang. Data-Free Knowledge Distillation with Soft Targeted Transfer Set Synthesis. AAAI 2021. arXiv:2104.04868.

    R_ij = w_i . w_j / (|w_i| |w_j|)                       w_k: the weights of unit k of layer l, without bias
    s    ~ N(0, D R D),    y = softmax(s / tau)            once for every image
    x    = argmin_x  KL( y || softmax(T_l(x) / tau) ) - a mean |f(x)|      f: the last feature maps; x starts as N(0, 1)

T_l are the outputs of a linear layer, before its activation; at the ``logits`` a unit is a class. Targets are not
conditioned on a class: an image's class is the argmax of s. R may be singular (more units than inputs), which is no
matter: s is sampled as normal inputs seen by the unit weights.

No code was released, and of the paper's details few are known. Ours are:

- D = ``sigma`` I. It is described as learned, but not from what.
- ``layers``: images take turns in the layer that they have a target in, which is the logits alone by default. Sets of
  several layers record no targets, since those of a hidden layer are not classes'.
- The norm of f is divided by its number of units, so that the weight means the same in every network.
- ``sigma``, ``temperature``, the weights, learning rate and iterations.
- ``total_variation`` is no part of the paper and is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_cli.config import option
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.activations import Tap
from dfkd_cli.models.classifier import unit_weights
from dfkd_cli.models.taps import LOGITS, Taps
from dfkd_cli.options import TAPS
from dfkd_cli.synthesis_options import CoarseToFine
from dfkd_cli.synthesizers.base import ImageOptimizer, Look, SynthesisTask
from dfkd_cli.synthesizers.terms import tempered_divergence, total_variation


@dataclass(frozen=True, kw_only=True)
class Config(CoarseToFine):
    """Data impressions for normal targets."""

    lr: float = option(0.3, "Adam learning rate on the normalised pixels")
    sigma: float = option(100.0, "standard deviation of the logits that are sampled as targets", above=0)
    temperature: float = option(20.0, "softmax temperature", above=0)
    divergence: float = option(1.0, "weight of the divergence from the targets", low=0)
    activation: float = option(0.01, "weight of the reward for large features", low=0)
    taps: tuple[str, ...] = option(("last",), TAPS)
    layers: tuple[str, ...] = option(("logits",), "where targets are: logits, or the paths of linear layers")
    total_variation: float = option(0.0, "weight of a smoothness prior, squared neighbour differences", low=0)


LayerTargets = dict[str, tuple[slice, Tensor]]  # by layer of U units: of which images, soft labels (n, U)


class SoftTarget(ImageOptimizer):
    """Data impressions for normal targets."""

    normalised = True
    config: Config

    def __init__(self, task: SynthesisTask, config: Config) -> None:
        super().__init__(task, config)
        taps = Taps(self.teacher)
        self.layers = {name: _linear(taps, name) for name in dict.fromkeys(config.layers)}
        features = {
            ("feature", name): taps.find(name) for name in (taps.names(config.taps) if config.activation else ())
        }
        self.taps = features | {("layer", name): Tap(layer) for name, layer in self.layers.items() if name != LOGITS}

    def targets(self, first: int, count: int) -> LayerTargets:
        """Each image has its target in one layer."""
        targets: LayerTargets = {}
        for index, (name, layer) in enumerate(self.layers.items()):
            rows = slice((index - first) % len(self.layers), None, len(self.layers))
            wanted = len(range(count)[rows])
            drawn = normal_logits(unit_weights(layer), self.config.sigma, wanted)
            targets[name] = rows, (drawn / self.config.temperature).softmax(1)
        return targets

    def soft_labels(self, targets: LayerTargets) -> Tensor | None:
        """The targets at the logits, where there are no others."""
        return targets[LOGITS][1] if list(targets) == [LOGITS] else None

    def terms(self, look: Look, targets: LayerTargets) -> dict[str, Tensor]:
        """The divergence from the targets, and where they are on, the reward (negative) and the smoothness prior."""
        parts = []
        for name, (rows, labels) in targets.items():
            outputs = look.logits if name == LOGITS else look.features["layer", name]
            if len(labels):  # a batch may be smaller than there are layers
                share = len(labels) / len(look.images)
                parts.append(share * tempered_divergence(outputs[rows], labels, self.config.temperature))
        terms = {"divergence": torch.stack(parts).sum()}
        if self.config.activation:
            features = [values for (kind, _), values in look.features.items() if kind == "feature"]
            terms["activation"] = activation_reward(features)
        if self.config.total_variation:
            terms["total_variation"] = total_variation(look.images)
        return terms


def _linear(taps: Taps, name: str) -> nn.Module:
    """The layer whose outputs have targets.

    Raises:
        ConfigError: It is not a linear layer of one output for each image.
    """
    if name == LOGITS:
        return taps.classifier.head()
    tap = taps.find(name)
    layer = tap.layer
    if tap.before or not isinstance(layer, nn.Linear) or len(taps.shape(name)) != 1:
        raise ConfigError(f"--layers {name}: not a linear layer", "give logits, or the paths of linear layers")
    return layer


def activation_reward(features: Sequence[Tensor]) -> Tensor:
    """Minus the mean absolute value of features (B, ...), mean over the places they are from; 0-d."""
    return -torch.stack([values.abs().mean() for values in features]).mean()


def normal_logits(weight: Tensor, sigma: float, count: int) -> Tensor:
    """Draws from ``N(0, sigma^2 R)``, R the cosine similarity of classes.

    Args:
        weight: (K, D), one row of classifier weights per class.
        sigma: Standard deviation of each logit.
        count: Draws.

    Returns:
        (count, K).
    """
    return sigma * torch.randn(count, weight.shape[1]) @ F.normalize(weight, dim=1).T
