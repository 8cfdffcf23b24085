"""Offline distillation: one finished teacher, one student, a transfer set.

Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. 2015. arXiv:1503.02531.

    L = sum_objectives weight * sum_terms term_weight * term(student(a(x)), teacher(a(x)))

``a`` is the random augmentation. The teacher answers the augmented image, as in the ZSKD paper: an impression that is
turned or shifted is asked about anew, not given the answer of the upright one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd_cli.data.sources import Images
from dfkd_cli.objectives.base import Outputs
from dfkd_cli.regimes.base import Regime
from dfkd_cli.rounds import weighted_sum


@dataclass(frozen=True, kw_only=True)
class Config:
    """Offline distillation: everything is in the objectives."""


class Offline(Regime):
    """One frozen teacher, one student."""

    kind = "regime"
    needs = ("teacher",)
    measure = "agreement"

    def loss(self, images: Images) -> tuple[Tensor, dict[str, Tensor]]:
        """The objectives between student and teacher on the same pixels."""
        with torch.no_grad():
            teacher = Outputs(self.teacher(images.pixels).float())
        return self.discrepancy(images, teacher)

    def discrepancy(self, images: Images, teacher: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The objectives between the student and the teacher's outputs: weighted and summed, and their terms."""
        student = Outputs(self.student(images.pixels).float())
        loss, logged = torch.zeros((), device=self.device), dict[str, Tensor]()
        for name, objective in self.objectives.items():
            terms = objective(student, teacher, images.labels)
            loss = loss + self.weights[name] * weighted_sum(terms, objective.config)
            prefix = f"{name}." if len(self.objectives) > 1 else ""
            logged |= {prefix + term: value for term, value in terms.items()}
        return loss, logged

    def right(self, images: Images) -> Tensor:
        """Whether the student gives the teacher's class."""
        return self.student(images.pixels).argmax(1) == self.teacher(images.pixels).argmax(1)
