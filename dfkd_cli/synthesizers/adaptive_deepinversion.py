"""Adaptive DeepInversion: images that the teacher knows and the student does not yet.

Yin, Molchanov, Alvarez, Li, Mallya, Hoiem, Jha, Kautz. Dreaming to Distill. CVPR 2020. arXiv:1912.08795.

    x = argmin_x  L_DeepInversion(x) + a_c (1 - clamp(J, 0, 1))
    J = 1/2 KL(M || P) + 1/2 KL(M || Q),    P = softmax(S(x) / 3),  Q = softmax(T(x) / 3),  M = (P + Q) / 2

All of P, Q and M are clamped to [0.01, 0.99]. This is the code's J; the textbook's has KL(P || M) and KL(Q || M). The
gradient goes through the student too, which is in evaluation mode meanwhile.

Images are made in rounds, a batch in each, against the student as it is; then the student is trained on all images so
far. The paper's training of the student for this was never released: defaults are those of later papers that compare
with it (arXiv:2105.08584), but for the temperature, 3, which its authors gave. See ``deepinversion`` for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.settings import PoolTraining, StatisticsInversion
from dfkd_cli.synthesizers.cotraining import PoolTrainer
from dfkd_cli.synthesizers.deepinversion import DeepInversion

TEMPERATURE = 3.0
RANGE = 0.01, 0.99


@dataclass(frozen=True, kw_only=True)
class Config(PoolTraining, StatisticsInversion):
    """Adaptive DeepInversion."""

    competition: float = option(0.2, "weight of the student's agreement with the teacher", low=0)
    student_temperature: float = option(3.0, "softmax temperature of the student's loss", above=0)


class AdaptiveDeepInversion(PoolTrainer, DeepInversion):
    """DeepInversion against a student that is trained in the loop."""

    kind = "images"
    needs = ("batchnorm", "student")
    config: Config

    def terms(self, images: Tensor, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Those of DeepInversion, and the agreement of student and teacher once the student learns."""
        terms = super().terms(images, logits, targets)
        if self.config.competition and not self.warming_up:
            terms["competition"] = agreement(self.student.net(images).float(), logits)
        return terms


def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 - clamp(J, 0, 1)`` of logits (B, K), KL divergences as means over the images; 0-d."""
    p, q = F.softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1)
    p, q, m = (x.clamp(*RANGE) for x in (p, q, (p + q) / 2))
    divergences = [F.kl_div(x.log(), m, reduction="batchmean") for x in (p, q)]
    return 1 - torch.stack(divergences).mean().clamp(0, 1)
