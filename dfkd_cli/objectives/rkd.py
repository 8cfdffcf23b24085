"""Relational Knowledge Distillation: distances and angles between images, not the images themselves.

Park, Kim, Lu, Cho. CVPR 2019. arXiv:1904.05068.

    d_ij = ||e_i - e_j|| / mu,  mu: the mean over i != j, of each network its own
    u_ij = (e_j - e_i) / ||e_j - e_i||
    distance = mean_ij  huber(d^s_ij, d^t_ij)
    angle    = mean_ijk huber(<u^s_ij, u^s_ik>, <u^t_ij, u^t_ik>)          huber(x) = x^2 / 2 up to 1, then |x| - 1/2

Means are over all entries, the degenerate ones included, and gradients go through the student's mu, as in the released
code. The weights are those of classification (RepDistiller); metric learning has 1 and 2. Features are the pooled ones.
A batch of B images costs B^3 numbers for the angles, and B^2 D: ``angle: 0`` leaves them out. With two images every
distance is the mean distance, and nothing is learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.objectives.base import PairwiseObjective
from dfkd_cli.options import Compared

# No pair is closer: the released code's 1e-12 for squares. It divides directions by their lengths down to 1e-12, where
# two images with equal features, such as dead ones, would get gradients of that inverse.
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config(Compared):
    """Relations of images."""

    taps: tuple[str, ...] = ("penultimate",)
    distance: float = option(25.0, "weight of the distances between two images", low=0)
    angle: float = option(50.0, "weight of the angles between three images", low=0)


class RKD(PairwiseObjective):
    """Huber loss between the networks' relative distances, and between their angles."""

    kind = "relation"
    relational = True
    terms = ("distance", "angle")
    config: Config

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        student, teacher = differences(student), differences(teacher)
        terms = {"distance": F.smooth_l1_loss(distances(student), distances(teacher))}
        if self.config.angle:
            terms["angle"] = F.smooth_l1_loss(angles(student), angles(teacher))
        return terms


def differences(features: Tensor) -> Tensor:
    """Features (B, ...) to ``e_j - e_i`` (B, B, D)."""
    rows = features.flatten(1)
    return rows[None] - rows[:, None]


def distances(difference: Tensor) -> Tensor:
    """Lengths of differences (B, B, D) in units of their mean over different images: (B, B), 0 on the diagonal."""
    count = len(difference)
    other = ~torch.eye(count, dtype=torch.bool, device=difference.device)
    lengths = difference.square().sum(2).clamp_min(EPS**2).sqrt() * other
    mean = lengths.sum() / max(count * (count - 1), 1)
    return lengths / mean.clamp_min(EPS)


def angles(difference: Tensor) -> Tensor:
    """Cosines of the angle at image i between images j and k (B, B, B), 0 where two are the same."""
    directions = F.normalize(difference, dim=2, eps=EPS)
    return directions @ directions.transpose(1, 2)
