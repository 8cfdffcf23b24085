"""Knowledge Distillation from A Stronger Teacher: the answers need not match, only correlate.

Huang, You, Wang, Qian, Xu. NeurIPS 2022. arXiv:2205.10536.

    P, Q = softmax(z_t / tau), softmax(z_s / tau), each (B, K);  rho: Pearson's correlation
    inter = tau^2 (1 - mean_b rho(P[b, :], Q[b, :]))       classes, within each image
    intra = tau^2 (1 - mean_k rho(P[:, k], Q[:, k]))       images, within each class

The weights are the released 2 * tau^2 (inter + intra); the temperature is that of CIFAR-100 (1 on ImageNet). A column
or a row without variance has the correlation 0, as in the released code, which adds 1e-8 to the product of the norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.data.sources import Images
from dfkd_cli.objectives.answers import AnswerObjective
from dfkd_cli.objectives.base import Outputs
from dfkd_cli.options import Answers

EPS = 1e-8


@dataclass(frozen=True, kw_only=True)
class Config(Answers):
    """Correlation of answers."""

    inter: float = option(2.0, "weight of the correlation over classes, within images", low=0)
    intra: float = option(2.0, "weight of the correlation over images, within classes", low=0)


class DIST(AnswerObjective):
    """One minus the correlation of the answers' rows, and of their columns."""

    relational = True
    terms = ("inter", "intra", "hard")
    not_of_two = "dist needs three classes or more: two correlate always"
    config: Config

    def forward(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """Terms ``inter``, ``intra`` and, where it has a weight, ``hard``."""
        tau = self.config.temperature
        q, p = ((logits / tau).softmax(1) for logits in self.answers(student, teacher))
        terms = {"inter": tau**2 * (1 - correlation(q, p)), "intra": tau**2 * (1 - correlation(q.T, p.T))}
        return terms | self.hard(student, teacher, images)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of the rows of two matrices, mean over the rows."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return ((a * b).sum(1) / (norms + EPS)).mean()
