"""Response distillation: the student learns the teacher's softened answers.

Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. 2015. arXiv:1503.02531.
Logit form: Ba, Caruana. Do Deep Nets Really Need to be Deep? NeurIPS 2014. arXiv:1312.6184.

    p = softmax(z_t / tau),  q = softmax(z_s / tau)
    kl:   soft = tau^2 sum_k p_k log(p_k / q_k)        sum over classes, mean over the batch
    ce:   soft = -tau^2 sum_k p_k log q_k              the same gradient; ZSKD's form
    mse:  soft = mean_bk (z_s - z_t)^2                 no temperature
    hard = -log softmax(z_s)_y

    L = soft_weight * soft + hard_weight * hard

tau^2 keeps the size of the soft gradient independent of tau. The default temperature is the one of the paper's MNIST
experiment; with ``soft: 0.9, hard: 0.1`` the weights are the convex combination that many codebases call alpha.
Many public versions divide by the number of classes too (``KLDivLoss`` with its default mean): not this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.objectives.base import Objective, Outputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Response distillation."""

    form: Literal["kl", "ce", "mse"] = option("kl", "divergence between the answers")
    temperature: float = option(20.0, "softmax temperature", above=0)
    soft: float = option(1.0, "weight of the teacher's answers", low=0)
    hard: float = option(0.0, "weight of the true labels; the teacher's own where the set has none", low=0)


class Response(Objective):
    """KL divergence at temperature, cross-entropy or logit error, and an optional hard-label term."""

    kind = "response"
    config: Config

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> dict[str, Tensor]:
        """Terms ``soft`` and, where it has a weight, ``hard``."""
        terms = {"soft": soft_loss(student.logits, teacher.logits, self.config.form, self.config.temperature)}
        if self.config.hard:
            terms["hard"] = F.cross_entropy(student.logits, teacher.logits.argmax(1) if labels is None else labels)
        return terms


def soft_loss(student: Tensor, teacher: Tensor, form: str, temperature: float) -> Tensor:
    """Distance of the student's logits (B, K) from the teacher's, 0-d, in one of the three forms."""
    if form == "mse":
        return F.mse_loss(student, teacher)
    if form == "ce":
        return F.cross_entropy(student / temperature, F.softmax(teacher / temperature, dim=1)) * temperature**2
    log_p, log_q = F.log_softmax(teacher / temperature, dim=1), F.log_softmax(student / temperature, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2
