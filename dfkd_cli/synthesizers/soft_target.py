"""Soft-targeted transfer set: data impressions for targets from a normal distribution of the logits.

Wang. Data-Free Knowledge Distillation with Soft Targeted Transfer Set Synthesis. AAAI 2021. arXiv:2104.04868.

    R_ij = w_i . w_j / (|w_i| |w_j|)                       w_k: the classifier's weights of class k, without bias
    s    ~ N(0, D R D),    y = softmax(s / tau)            once for every image
    x    = argmin_x  KL( y || softmax(T(x) / tau) ) - a mean |f(x)|        f: the last feature maps; x starts as N(0, 1)

Targets are not conditioned on a class: an image's class is the argmax of s. R may be singular (more classes than
features), which is no matter: s is sampled as normal features seen by the unit class weights.

No code was released, and of the paper's details few are known. Ours are:

- D = ``sigma`` I. It is described as learned, but not from what.
- Targets for the logits alone; the paper takes several layers.
- The norm of f is divided by its number of units, so that the weight means the same in every network.
- ``sigma``, ``temperature``, the weights, learning rate and iterations.
- ``total_variation`` is no part of the paper and is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.models.activations import values_at
from dfkd_cli.models.taps import Taps
from dfkd_cli.settings import TAPS, TEMPERATURE, ImageOptimization
from dfkd_cli.synthesizers.base import ImageOptimizer
from dfkd_cli.synthesizers.terms import tempered_divergence, total_variation


@dataclass(frozen=True, kw_only=True)
class Config(ImageOptimization):
    """Data impressions for normal targets."""

    lr: float = option(0.3, "Adam learning rate on the normalised pixels", above=0)
    sigma: float = option(100.0, "standard deviation of the logits that are sampled as targets", above=0)
    temperature: float = option(20.0, TEMPERATURE, above=0)
    divergence: float = option(1.0, "weight of the divergence from the targets", low=0)
    activation: float = option(0.01, "weight of the reward for large features", low=0)
    taps: tuple[str, ...] = option(("last",), TAPS)
    total_variation: float = option(0.0, "weight of a smoothness prior, squared neighbour differences", low=0)


class SoftTarget(ImageOptimizer):
    """Data impressions for normal targets."""

    kind = "images"
    normalised = True
    config: Config

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.taps = {}
        if self.config.activation:
            taps = Taps(self.teacher)
            self.taps = {name: taps.find(name) for name in taps.names(self.config.taps)}

    def targets(self, first: int, count: int) -> Tensor:
        """Soft labels."""
        logits = normal_logits(self.teacher.head().weight.flatten(1).float().cpu(), self.config.sigma, count)
        return (logits / self.config.temperature).softmax(1)

    def watching(self) -> AbstractContextManager[Mapping[str, Tensor]]:
        """The features that shall be large."""
        return values_at(self.taps)

    def terms(self, images: Tensor, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The divergence from the targets, and where they are on, the reward (negative) and the smoothness prior."""
        terms = {"divergence": tempered_divergence(logits, targets, self.config.temperature)}
        if self.config.activation:
            terms["activation"] = activation_reward([values.float() for values in self.seen.values()])
        if self.config.total_variation:
            terms["total_variation"] = total_variation(images)
        return terms


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
