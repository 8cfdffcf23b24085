"""Adaptive DeepInversion: images that the teacher knows and the student does not yet.

Yin, Molchanov, Alvarez, Li, Mallya, Hoiem, Jha, Kautz. Dreaming to Distill. CVPR 2020. arXiv:1912.08795.

    x = argmin_x  L_DeepInversion(x) + a_c (1 - clamp(J, 0, 1))
    J = 1/2 KL(P || M) + 1/2 KL(Q || M),    P = softmax(S(x) / 3),  Q = softmax(T(x) / 3),  M = (P + Q) / 2

J is the Jensen-Shannon divergence of the paper, with ``variant: paper``. The released code, and ``variant: code``, the
default, because the published numbers are its, has KL(M || P) and KL(M || Q) of P, Q and M clamped to [0.01, 0.99]: it
exceeds 1, and has no gradient, where the two networks are sure of different classes. The gradient goes through the
student too, which is in evaluation mode meanwhile.

Images are made in rounds, a batch in each, against the student as it is; then the student is trained on all images so
far. The paper's training of the student for this was never released: defaults are those of later papers that compare
with it (arXiv:2105.08584), but for the temperature, 3, which its authors gave, and for what fits photographs alone:
images are neither cropped nor mirrored unless ``crop`` and ``flip`` say so. See ``deepinversion`` for the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.errors import ConfigError
from dfkd_cli.synthesis_options import PoolTraining, StatisticsInversion
from dfkd_cli.synthesizers.base import Look
from dfkd_cli.synthesizers.cotraining import PoolTrainer
from dfkd_cli.synthesizers.deepinversion import DeepInversion

TEMPERATURE = 3.0
RANGE = 0.01, 0.99


@dataclass(frozen=True, kw_only=True)
class Config(PoolTraining, StatisticsInversion):
    """Adaptive DeepInversion."""

    competition: float = option(0.2, "weight of the student's agreement with the teacher", low=0)
    variant: Literal["paper", "code"] = option("code", "the divergence in it: the paper's, or the released code's")
    student_temperature: float = 3.0

    def __post_init__(self) -> None:
        """The student learns after each batch, which is a shard."""
        super().__post_init__()
        if self.shard_size:
            raise ConfigError(f"--shard-size {self.shard_size}: the student learns after each shard", "leave it out")


class AdaptiveDeepInversion(PoolTrainer, DeepInversion):
    """DeepInversion against a student that is trained in the loop."""

    needs = ("batchnorm", "student")
    config: Config

    def terms(self, look: Look, targets: Tensor) -> dict[str, Tensor]:
        """Those of DeepInversion, and the agreement of student and teacher once the student learns."""
        terms = super().terms(look, targets)
        if self.config.competition and not self.warming_up:
            inputs = look.images
            if (self.student.info.mean, self.student.info.std) != (self.teacher.info.mean, self.teacher.info.std):
                inputs = self.student.normalise(self.teacher.denormalise(inputs))
            terms["competition"] = agreement(self.student.net(inputs).float(), look.logits, self.config.variant)
        return terms


def agreement(student: Tensor, teacher: Tensor, variant: Literal["paper", "code"]) -> Tensor:
    """``1 - clamp(J, 0, 1)`` of logits (B, K), KL divergences as means over the images; 0-d."""
    p, q = F.log_softmax(student / TEMPERATURE, 1), F.log_softmax(teacher / TEMPERATURE, 1)
    m = torch.logaddexp(p, q) - math.log(2)
    if variant == "code":
        p, q, m = (x.clamp(*(math.log(end) for end in RANGE)) for x in (p, q, m))
    pairs = [(x, m) if variant == "paper" else (m, x) for x in (p, q)]
    divergences = [F.kl_div(answer, target, reduction="batchmean", log_target=True) for target, answer in pairs]
    return 1 - torch.stack(divergences).mean().clamp(0, 1)
