"""What regimes share in which a student learns from somebody's answers: the objectives, and how they are added up."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.taps import find_taps
from dfkd_cli.objectives.base import Outputs, ask, everywhere
from dfkd_cli.regimes.base import Regime, Task
from dfkd_cli.rounds.learner import weighted_sum

Answers = dict[str, Outputs]  # by the mode in which a teacher's BatchNorm gave them


def in_every_mode(logits: Tensor) -> Answers:
    """Logits (B, K) as the answers of somebody who has no modes."""
    return dict.fromkeys(("eval", "train"), Outputs(logits.float()))


class Distillation(Regime):
    """A student learns answers by the chosen objectives. A subclass says in :meth:`ask_teacher` whose they are.

    Raises:
        ConfigError: An objective is not between answers alone, and there is no teacher network to look into.
    """

    needs: ClassVar[tuple[str, ...]] = ("objective",)

    def __init__(self, task: Task, config: Any) -> None:
        super().__init__(task, config)
        looking = [name for name, objective in self.losses.items() if objective.kind != "response"]
        if looking and "teacher" not in self.needs:
            raise ConfigError(
                f"--objective {', '.join(looking)} looks into a teacher network, and there is none",
                "choose one between answers, such as response",
            )
        self.student_taps = find_taps(self.student, (tap for o in self.losses.values() for tap, _ in o.pairs))

    @abstractmethod
    def ask_teacher(self, images: Images) -> Answers:
        """What the student is to answer for images, in each of the modes that objectives want."""

    def loss(self, images: Images) -> tuple[Tensor, dict[str, Tensor]]:
        """The objectives between the student and whoever teaches it."""
        with torch.no_grad():
            teacher = self.ask_teacher(images)
        terms = self.terms(self.ask_student(images.pixels), teacher, images, shared=True)
        return self.total(terms), self.named(terms)

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
                if objective.shrinking:
                    terms[name] = {term: x / self.training_config.accumulate for term, x in terms[name].items()}
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
