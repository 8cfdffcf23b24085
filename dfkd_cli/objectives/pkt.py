"""Probabilistic Knowledge Transfer: the student has the teacher's neighbours.

Passalis, Tefas. Learning Deep Representations with Probabilistic Knowledge Transfer. ECCV 2018. arXiv:1803.10837.

    K_ij = (cos(f_i, f_j) + 1) / 2;  p_ij = K_ij / sum_j K_ij
    neighbours = mean_ij p^t_ij log(p^t_ij / p^s_ij)

The released code's forward divergence, mean over all B^2 entries, and 1e-7 in the logarithm and beside the norms; the
weight is RepDistiller's. Kernels of features after a ReLU lie in [1/2, 1], which makes p nearly uniform: hence the
weight. It belongs to batches of 64, for the loss shrinks as 1 / B.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.objectives.base import PairwiseObjective
from dfkd_cli.objectives.features import cosine_kernel, shares
from dfkd_cli.options import Compared

EPS = 1e-7


@dataclass(frozen=True, kw_only=True)
class Config(Compared):
    """Neighbours."""

    taps: tuple[str, ...] = ("penultimate",)
    neighbours: float = option(1.0, "weight of the neighbours, beside that of the objective", low=0)


class PKT(PairwiseObjective):
    """Divergence of the probabilities that images are neighbours."""

    kind = "information"
    relational = True
    shrinking = True
    terms = ("neighbours",)
    default_weight = 30000.0

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        q, p = (shares(cosine_kernel(features.flatten(1), EPS)) for features in (student, teacher))
        return {"neighbours": (p * ((p + EPS) / (q + EPS)).log()).mean()}
