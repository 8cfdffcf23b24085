"""Similarity-Preserving Knowledge Distillation: images that are alike for the teacher are alike for the student.

Tung, Mori. ICCV 2019. arXiv:1907.09682.

    Q = features (B, CHW);  G = Q Q^T;  G_i <- G_i / ||G_i||            the norm of each row, not its square
    similarity = 1 / B^2  sum_ij (G^s_ij - G^t_ij)^2

The features are the last maps before the pooling. Each row adds at most 2, so the loss shrinks as 1 / B: the paper's
weight 3000 belongs to batches of 64, and in batches of another size it takes 3000 B / 64 to pull as hard. Parts of a
batch (``--accumulate``) pull as the batch would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.objectives.base import PairwiseObjective
from dfkd_cli.options import Compared


@dataclass(frozen=True, kw_only=True)
class Config(Compared):
    """Similarity of images."""

    taps: tuple[str, ...] = ("last",)
    similarity: float = option(1.0, "weight of the similarities, beside that of the objective", low=0)


class SimilarityPreserving(PairwiseObjective):
    """Squared distance of the matrices of inner products between images."""

    kind = "relation"
    relational = True
    shrinking = True
    terms = ("similarity",)
    default_weight = 3000.0

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        return {"similarity": F.mse_loss(similarity(student), similarity(teacher))}


def similarity(features: Tensor) -> Tensor:
    """Features (B, ...) to inner products (B, B), each row of norm one."""
    rows = features.flatten(1)
    return F.normalize(rows @ rows.T)
