"""Response distillation: the student learns the teacher's softened answers.

Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. 2015. arXiv:1503.02531.
Logit form: Ba, Caruana. Do Deep Nets Really Need to be Deep? NeurIPS 2014. arXiv:1312.6184.

    p = softmax(z_t / tau),  q = softmax(z_s / tau)
    kl:   soft = tau^2 sum_k p_k log(p_k / q_k)        sum over classes, mean over the batch
    ce:   soft = -tau^2 sum_k p_k log q_k              the same gradient; ZSKD's form
    mse:  soft = mean_bk (z_s - z_t)^2                 no temperature
    hard = -log softmax(z_s)_y                         with label smoothing e: 1 - e for y plus e / K for every class

    L = soft_weight * soft + hard_weight * hard

tau^2 keeps the size of the soft gradient independent of tau. The default temperature is the one of the paper's MNIST
experiment; with ``soft: 0.9, hard: 0.1`` the weights are the convex combination that many codebases call alpha.
``teacher_mode: train`` asks a teacher that normalises with the statistics of each batch, as the released code of SRe2L
does on CIFAR (arXiv:2306.13092). ``standardise`` compares z-scores of the logits (arXiv:2403.01427; its values:
temperature 2, ``soft: 9, hard: 0.1``). Many public versions divide by the number of classes too (``KLDivLoss`` with its
default mean): not this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.objectives.answers import AnswerObjective, divergence
from dfkd_cli.objectives.base import Outputs
from dfkd_cli.options import Answers


@dataclass(frozen=True, kw_only=True)
class Config(Answers):
    """Response distillation."""

    form: Literal["kl", "ce", "mse"] = option("kl", "divergence between the answers")
    temperature: float = 20.0
    soft: float = option(1.0, "weight of the teacher's answers", low=0)
    teacher_mode: Literal["eval", "train"] = option(
        "eval", "statistics that the teacher's BatchNorm answers with: recorded ones, or the batch's (train)"
    )


class Response(AnswerObjective):
    """KL divergence at temperature, cross-entropy or logit error, and an optional hard-label term."""

    terms = ("soft", "hard")
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.teacher_mode = config.teacher_mode

    def connect(self, student: Classifier, teacher: Classifier) -> None:
        super().connect(student, teacher)
        if self.teacher_mode == "train" and not teacher.batch_norms():
            raise ConfigError(f"--teacher-mode train: {teacher.info.spec} has no BatchNorm to be seen", "leave it out")

    def forward(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """Terms ``soft`` and, where it has a weight, ``hard``."""
        soft = soft_loss(*self.answers(student, teacher), self.config.form, self.config.temperature)
        return {"soft": soft} | self.hard(student, teacher, images)


def soft_loss(student: Tensor, teacher: Tensor, form: str, temperature: float) -> Tensor:
    """Distance of the student's logits (B, K) from the teacher's, 0-d, in one of the three forms."""
    if form == "mse":
        return F.mse_loss(student, teacher)
    if form == "ce":
        return F.cross_entropy(student / temperature, F.softmax(teacher / temperature, dim=1)) * temperature**2
    return divergence(student / temperature, teacher / temperature) * temperature**2
