"""Zero-Shot Knowledge Distillation in Deep Networks: data impressions for Dirichlet targets from class similarity.

Nayak, Mopuri, Shaj, Radhakrishnan, Chakraborty. ICML 2019. arXiv:1905.08114.

    C_ij = w_i . w_j / (|w_i| |w_j|)                       w_k: the classifier's weights of class k, without bias
    c_k  = (C_k - min_j C_kj) / (max_j C_kj - min_j C_kj)  each row to [0,1]
    y    ~ Dirichlet(beta * c_k + 1e-4)                    an equal share of the images for every k and every beta
    x    = argmin_x  - sum_i y_i log softmax(T(x) / tau)_i

Differences from the released code, which is for CIFAR-10 only:

- Its beta = 0.1 has no effect (the sampler rescales what beta scaled). Here beta scales the concentration, as written
  in the paper.
- It initialises images and Adam once per class and beta and lets each batch continue from the last one. Here every
  batch starts from noise, so that batches are independent.
- It rescales the whole batch to [0,1] at every iteration, one minimum and maximum for all images. ``range: rescale``
  does that, ``clamp`` keeps each pixel in [0,1]; the default leaves them free.
- It runs 1500 iterations at learning rate 1e-3; the paper gives neither for its other datasets. Ours are shorter and
  faster. ``total_variation`` is no part of the paper and is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.models.classifier import unit_weights
from dfkd_cli.synthesis_options import CoarseToFine
from dfkd_cli.synthesizers.base import ImageOptimizer, Look, SynthesisTask
from dfkd_cli.synthesizers.terms import tempered_cross_entropy, total_variation


@dataclass(frozen=True, kw_only=True)
class Config(CoarseToFine):
    """Data impressions."""

    beta: tuple[float, ...] = option((1.0, 0.1), "scales of the Dirichlet concentration, shared equally", above=0)
    temperature: float = option(20.0, "softmax temperature of the teacher", above=0)
    cross_entropy: float = option(1.0, "weight of the tempered cross-entropy", low=0)
    total_variation: float = option(0.0, "weight of a smoothness prior, squared neighbour differences", low=0)
    range: Literal["free", "rescale"] = option("free", "pixels after each iteration: free, or the batch in [0,1]")

    @property
    def unbounded(self) -> str | None:
        return None if self.range == "rescale" else super().unbounded


class ZSKD(ImageOptimizer):
    """Data impressions for Dirichlet targets."""

    config: Config

    def __init__(self, task: SynthesisTask, config: Config) -> None:
        super().__init__(task, config)
        self.similarity = class_similarity(unit_weights(self.teacher.head()))

    def targets(self, first: int, count: int) -> Tensor:
        """Soft labels; image ``n`` is of class ``n mod K``, and the betas take turns."""
        similarity = self.similarity
        index = torch.arange(first, first + count)
        beta = torch.tensor(self.config.beta)[index // len(similarity) % len(self.config.beta)]
        return dirichlet_targets(similarity[index % len(similarity)], beta)

    def terms(self, look: Look, targets: Tensor) -> dict[str, Tensor]:
        """The tempered cross-entropy, and the smoothness prior where it is on."""
        terms = {"cross_entropy": tempered_cross_entropy(look.logits, targets, self.config.temperature)}
        if self.config.total_variation:
            terms["total_variation"] = total_variation(look.images)
        return terms

    def project(self, images: Tensor) -> None:
        """Rescale the batch to [0,1] as the released code does, or clamp as everywhere."""
        super().project(images)
        if self.config.range == "rescale":
            low, high = images.aminmax()
            images.sub_(low).div_((high - low).clamp_min(1e-12))


def class_similarity(weight: Tensor) -> Tensor:
    """Cosine similarity of classes, each row min-max scaled to [0,1].

    Args:
        weight: (K, D), one row of classifier weights per class.

    Returns:
        (K, K) with ones on the diagonal and a zero in every row.
    """
    rows = F.normalize(weight, dim=1)
    cosine = rows @ rows.T
    low, high = cosine.amin(1, keepdim=True), cosine.amax(1, keepdim=True)
    return (cosine - low) / (high - low).clamp_min(1e-12)


def dirichlet_targets(similarity: Tensor, beta: Tensor, epsilon: float = 1e-4) -> Tensor:
    """One draw of ``Dirichlet(beta * similarity + epsilon)`` per row.

    Args:
        similarity: (B, K) rows of :func:`class_similarity`.
        beta: (B,).
        epsilon: Keeps the concentration of the least similar class above zero.

    Returns:
        (B, K) float32, rows sum to one.
    """
    # A Dirichlet draw is normalised gamma draws. Near epsilon these underflow, all classes at once, so they are drawn
    # as logarithms: if g ~ Gamma(a + 1) and u ~ Uniform(0, 1), then g u^(1/a) ~ Gamma(a) (Marsaglia and Tsang, 2000).
    concentration = (beta[:, None] * similarity + epsilon).double()
    gamma = torch.distributions.Gamma(concentration + 1, torch.ones_like(concentration)).sample()
    log_uniform = (1 - torch.rand_like(concentration)).log()
    return (gamma.log() + log_uniform / concentration).softmax(1).float()
