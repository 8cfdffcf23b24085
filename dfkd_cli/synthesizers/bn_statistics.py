"""Images that look to BatchNorm like the training data: the third scheme of The Knowledge Within.

Haroush, Hubara, Hoffer, Soudry. CVPR 2020. arXiv:1912.01274.

    x = argmin_x  a_s mean_l mean_c KL( N(mu, var) || N(mu(x), var(x)) ) + a_c CE(T(x) / tau, y) + a |x - G(x)|^2

    KL(p || q) = log(std_q / std_p) - 1/2 (1 - (var_p + (mu_p - mu_q)^2) / var_q)

mu and var are the running statistics of channel c in BatchNorm layer l; mu(x) and var(x), biased, are the batch's at
its input. The other terms are those of ``inception``, which the paper combines with this one; the third scheme alone is
``cross_entropy: 0, smoothness: 0``. No code was released. Ours are:

- The mean over channels and layers instead of the sum. Channels whose running variance is below 1e-5 do not count:
  the logarithm would let them decide everything. No variance is taken as less than 1e-6.
- ``bn_loss: kl-reverse`` has the arguments the other way round (DFQ, arXiv:2005.04136); ``l2`` is DeepInversion's
  distance with biased variances (arXiv:1912.08795), a sum over the layers, for a weight of 10.
- The weights, learning rate and iterations: what was best on MNIST, where a weight of 10 for the statistics taught far
  less than 1000 (see the recipe). Means over channels and layers make it mean the same in every network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.synthesis_options import SmoothInversion
from dfkd_cli.synthesizers.base import Look
from dfkd_cli.synthesizers.inception import Inception
from dfkd_cli.synthesizers.terms import statistics_distance, statistics_divergence


@dataclass(frozen=True, kw_only=True)
class Config(SmoothInversion):
    """Images with the BatchNorm statistics of the training data."""

    batch_size: int = option(256, "images optimised together, whose statistics count")
    iterations: int = 500
    lr: float = 0.1
    statistics: float = option(
        1000.0, "weight of the distance to the BatchNorm statistics; of l2, a sum, 10 pulls as hard", low=0
    )
    bn_loss: Literal["kl", "kl-reverse", "l2"] = option(
        "kl", "that distance: divergence of the batch from the statistics, the reverse, norms of the differences"
    )


class BNStatistics(Inception):
    """Images of one class each whose batch has the recorded statistics."""

    needs = ("batchnorm",)
    config: Config

    def terms(self, look: Look, targets: Tensor) -> dict[str, Tensor]:
        """Those of Inception, and where it has a weight, the distance to the BatchNorm statistics."""
        terms = super().terms(look, targets)
        if not look.moments:
            return terms
        if self.config.bn_loss == "l2":
            distance = statistics_distance(look.moments, self.recorded)
        else:
            distance = statistics_divergence(look.moments, self.recorded, self.config.bn_loss == "kl-reverse")
        return terms | {"statistics": distance}
