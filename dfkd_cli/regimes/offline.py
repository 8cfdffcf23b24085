"""Offline distillation: one finished teacher, one student, a transfer set.

Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. 2015. arXiv:1503.02531.

    L = sum_objectives weight * sum_terms strength(e) * term_weight * term(student(a(x)), teacher(a(x)))

``a`` is the random augmentation. The teacher answers the augmented image, as in the ZSKD paper: an impression that is
turned or shifted is asked about anew, not given the answer of the upright one. ``strength`` is 1 but for terms that
grow or fade over the epochs. While one of them is to be learned alone, the others do not count. Parameters that nothing
counted depends on are left as they are, by weight decay too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfkd_cli.data.sources import Images
from dfkd_cli.models.activations import batch_statistics
from dfkd_cli.models.taps import find_taps
from dfkd_cli.objectives.base import Outputs, ask, everywhere
from dfkd_cli.regimes.base import Regime, Task
from dfkd_cli.rounds.learner import weighted_sum


@dataclass(frozen=True, kw_only=True)
class Config:
    """Offline distillation: everything is in the objectives."""


class Offline(Regime):
    """One frozen teacher, one student."""

    needs = ("teacher",)
    measure = "agreement"

    def __init__(self, task: Task, config: Any) -> None:
        super().__init__(task, config)
        pairs = [pair for objective in self.losses.values() for pair in objective.pairs]
        self.student_taps = find_taps(self.student, (name for name, _ in pairs))
        self.teacher_taps = find_taps(self.teacher, (name for _, name in pairs))

    def loss(self, images: Images) -> tuple[Tensor, dict[str, Tensor]]:
        """The objectives between student and teacher on the same pixels."""
        with torch.no_grad():
            teacher = self.ask_teacher(images.pixels)
        terms = self.terms(self.ask_student(images.pixels), teacher, images, shared=True)
        return self.total(terms), self.named(terms)

    def ask_teacher(self, pixels: Tensor) -> dict[str, Outputs]:
        """The teacher's outputs in each of the modes that objectives want, ``eval`` first."""
        modes: dict[str, AbstractContextManager[None]] = {
            "eval": nullcontext(),
            "train": batch_statistics(self.teacher),
        }
        outputs: dict[str, Outputs] = {}
        for mode in sorted({objective.teacher_mode for objective in self.losses.values()}):
            with modes[mode]:
                outputs[mode] = ask(self.teacher, pixels, self.teacher_taps)
        return outputs

    def ask_student(self, pixels: Tensor) -> Outputs:
        """The student's outputs."""
        return ask(self.student, pixels, self.student_taps)

    def terms(
        self, student: Outputs, teacher: Mapping[str, Outputs], images: Images, shared: bool = False
    ) -> dict[str, dict[str, Tensor]]:
        """The unweighted terms of each objective, 0-d, between a student's and the teacher's outputs in each mode.

        Where the images are this process's share of a batch, ``shared``, relations are those of the whole batch.
        """
        terms = {}
        with torch.autocast(self.device.type, enabled=False):  # losses are computed in float32
            for name, objective in self.losses.items():
                own, guide, seen = student, teacher[objective.teacher_mode], images
                if shared and objective.relational:
                    own, guide, seen = own.everywhere(), guide.everywhere(), seen.each(everywhere)
                terms[name] = objective(own, guide, seen)
        return terms

    def total(self, terms: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """The loss, 0-d: the weighted sum of the terms of the objectives learned alone now, or else of all."""
        alone = any(objective.alone for objective in self.losses.values())
        weighted = []
        for name, objective in self.losses.items():
            if objective.alone == alone and self.weights[name]:  # without a weight, weight decay alone would count
                scaled = {term: objective.strength(term) * value for term, value in terms[name].items()}
                weighted.append(self.weights[name] * weighted_sum(scaled, objective.config))
        return functools.reduce(torch.add, weighted)

    def named(self, terms: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The terms of all objectives for the log, with the objective in the name where there are several."""
        several = len(terms) > 1
        return {f"{name}.{term}" if several else term: v for name, each in terms.items() for term, v in each.items()}

    def correct(self, images: Images) -> Tensor:
        """Whether the student gives the teacher's class."""
        return self.student(images.pixels).argmax(1) == self.teacher(images.pixels).argmax(1)
