"""Data-Free Adversarial Distillation: a generator that looks for images on which the student differs.

Fang, Song, Shen, Wang, Chen, Song. 2019. arXiv:1912.11006.

    D = mean_bk |S(x)_bk - T(x)_bk|        of the logits, without temperature
    min_S max_G D(G(n))

Defaults are the released script's for CIFAR-10. It trains the student first: here the generator's step comes first in
each iteration, which only differs in the first and last one. Learning rates fall there by ten at 20 and 40 per cent of
the epochs; here they follow ``schedule``. The form for segmentation, -log(D + 1), is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.synthesis_options import AdversarialTraining
from dfkd_cli.synthesizers.streaming import Adversary


@dataclass(frozen=True, kw_only=True)
class Config(AdversarialTraining):
    """DFAD."""

    steps: int = 25_000
    latent: int = 256
    student_steps: int = 5
    student_weight_decay: float = 5e-4


class DFAD(Adversary):
    """A generator against a student, by the distance of the logits."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """D of logits (B, K)."""
        return F.l1_loss(student, teacher)
