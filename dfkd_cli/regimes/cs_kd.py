"""Regularizing Class-wise Predictions via Self-knowledge Distillation: images of a class are to be answered alike.

Yun, Park, Lee, Shin. CVPR 2020. arXiv:2003.13964.

    L = CE(z(a(x)), y) + lambda tau^2 KL(softmax(z'(a(x')) / tau) || softmax(z(a(x)) / tau))

x' is drawn uniformly from the images of the label of x, which may be x itself, and changed at random on its own; z' is
the same network without a gradient: x' is the teacher, x learns. The distance is the objective's, with the paper's
values ``--objective response --temperature 4 --hard 1`` (``--soft 3`` on fine-grained images).

As in the released code the network is in training mode both times, so that BatchNorm normalises both halves apart and
its averages learn from both, x before x'. Where not all images fit into memory x' is drawn from those of its class that
are held; without any, it is x, changed at random once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd_cli.data.sources import Images
from dfkd_cli.regimes.base import Task
from dfkd_cli.regimes.distillation import Answers, Distillation, in_every_mode


@dataclass(frozen=True, kw_only=True)
class Config:
    """Class-wise self-distillation: everything is in the objective."""


class ClassWise(Distillation):
    """A student that is its own teacher, on another image of the class."""

    needs = ("labels", "objective")
    mixable = False
    config: Config

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        if not any(weight and getattr(loss.config, "hard", 0) for weight, loss in task.objectives.values()):
            self.note = "cs-kd: without hard labels the network learns from itself alone: give --hard 1"

    def loss(self, images: Images) -> tuple[Tensor, dict[str, Tensor]]:
        """The objectives between the answers to each image and to its partner."""
        student = self.ask_student(images.pixels)
        with torch.no_grad():
            teacher = self.ask_teacher(self.view(self.batches.partners(images)))
        terms = self.terms(student, teacher, images, shared=True)
        return self.total(terms), self.named(terms)

    def ask_teacher(self, images: Images) -> Answers:
        """The student's own answers for partners."""
        return in_every_mode(self.student(images.pixels))
