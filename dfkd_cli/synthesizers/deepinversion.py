"""Dreaming to Distill: images with the BatchNorm statistics of the training data.

Yin, Molchanov, Alvarez, Li, Mallya, Hoiem, Jha, Kautz. CVPR 2020. arXiv:1912.08795.

    x = argmin_x  CE(T(x) / tau, y) + priors(x) + a_f sum_l w_l (|mean_l(x) - mean_l|_2 + |var_l(x) - var_l|_2)

The priors and tau are those of ``deepdream``; mean_l(x) and var_l(x), unbiased, are the batch's at the input of
BatchNorm layer l, mean_l and var_l its running statistics, and w_l is 1 but for the first layer. Norms are not squared.
Defaults are the paper's command for CIFAR-10; ``coarse_iterations``, ``schedule``, ``clamp`` and ``first_layer`` are
for ImageNet.

Differences from the released code:

- Variances are unbiased, as those that BatchNorm records; the code compares the batch's biased ones with them.
- Images are mirrored one by one with probability 1/2 instead of the whole batch.
- ``l2`` is the mean of the images' norms, as in its ImageNet script; its CIFAR-10 script takes the norm of the batch.
- Every batch has images of all classes in turn.
- The last images are kept. In the code the "best" ones are the same tensor (CIFAR-10), or are chosen by a loss from
  before the last step (ImageNet).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dfkd_cli.synthesis_options import StatisticsInversion
from dfkd_cli.synthesizers.base import Look
from dfkd_cli.synthesizers.inversion import Inverter
from dfkd_cli.synthesizers.terms import statistics_distance


@dataclass(frozen=True, kw_only=True)
class Config(StatisticsInversion):
    """DeepInversion."""


class DeepInversion(Inverter):
    """Images of one class each that look to BatchNorm like the training data."""

    needs: ClassVar[tuple[str, ...]] = ("batchnorm",)
    correction = 1
    config: StatisticsInversion

    def terms(self, look: Look, targets: Tensor) -> dict[str, Tensor]:
        """Those of DeepDream, and the distance to the BatchNorm statistics."""
        terms = super().terms(look, targets)
        if look.moments:
            terms["statistics"] = statistics_distance(look.moments, self.recorded, self.config.first_layer)
        return terms
