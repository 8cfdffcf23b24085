"""Offline distillation: one finished teacher, one student, a transfer set.

Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. 2015. arXiv:1503.02531.

    L = sum_objectives weight * sum_terms strength(e) * term_weight * term(student(a(x)), teacher(a(x)))

``a`` is the random augmentation. The teacher answers the augmented image, as in the ZSKD paper: an impression that is
turned or shifted is asked about anew, not given the answer of the upright one. A black box is asked about each image
once, as it is in the set, and its answer goes for all that the augmentation makes of it. ``strength`` is 1 but for
terms that grow or fade over the epochs. While one of them is to be learned alone, the others do not count. Parameters
that nothing counted depends on are left as they are, by weight decay too.

With ``teacher_epochs`` E the teacher only gives the start:

    L' = s L + (1 - s) (-log softmax(z_student)_y)        s = 1 before the end of epoch E, then 0
                                                          with ``fade``: s = max(0, 1 - epochs / E)

Jha, Saini, Mittal. On the Demystification of Knowledge Distillation: A Residual Network Perspective. 2020.
arXiv:2006.16589. They find that a student that was taught for some epochs can learn from labels alone thereafter;
schedule and momentum go on. No code was released; the linear fade, and that y is the teacher's class where images have
no labels, are ours.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.data.sources import Images, batches
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.activations import batch_statistics
from dfkd_cli.models.black_box import BlackBox
from dfkd_cli.models.taps import find_taps
from dfkd_cli.objectives.answers import truth
from dfkd_cli.objectives.base import ask
from dfkd_cli.options import TaughtAtFirst
from dfkd_cli.regimes.base import Task
from dfkd_cli.regimes.distillation import Answers, Distillation, in_every_mode
from dfkd_cli.seeds import seed_torch


@dataclass(frozen=True, kw_only=True)
class Config(TaughtAtFirst):
    """Offline distillation: nearly everything is in the objectives."""


class Offline(Distillation):
    """One frozen teacher, one student."""

    needs: ClassVar[tuple[str, ...]] = ("teacher", "objective")
    measure = "agreement"

    def __init__(self, task: Task, config: Any) -> None:
        super().__init__(task, config)
        box = self.teacher
        if isinstance(box, BlackBox) and task.training.mixes:
            raise ConfigError(
                "a black box is asked about each image once, not about mixtures of them",
                "leave out --cutmix and --mixup; or --method active-mixup",
            )
        self.teacher_taps = find_taps(self.teacher, (tap for o in self.losses.values() for _, tap in o.pairs))

    def on_train_start(self) -> None:
        """Let objectives observe the teacher, unless an earlier process has."""
        super().on_train_start()
        if self.current_round:
            return
        for name, objective in self.losses.items():
            seed_torch(self.device, f"observe {name}", self.seed)
            images = batches(self.train_source, self.training_config.batch_size, self.device)
            with torch.no_grad():
                objective.observe(self.ask_teacher(part)[objective.teacher_mode] for part in images)

    @property
    def share(self) -> float:
        """The teacher's share of the loss at this time of the training; the labels have the rest."""
        epochs = self.config.teacher_epochs if isinstance(self.config, TaughtAtFirst) else None
        if epochs is None or any(objective.alone for objective in self.losses.values()):
            return 1.0
        if self.config.fade:
            return max(0.0, 1 - self.epochs / epochs) if epochs else 0.0
        return float(self.epochs < epochs)

    def loss(self, images: Images) -> tuple[Tensor, dict[str, Tensor]]:
        """The objectives between student and teacher on the same pixels, as long as the teacher teaches."""
        share, teacher = self.share, None
        if share or images.labels is None:
            with torch.no_grad():
                teacher = self.ask_teacher(images)
        student = self.ask_student(images.pixels)
        parts, named = [], {}
        if teacher is not None and share:
            terms = self.terms(student, teacher, images, shared=True)
            parts, named = [share * self.total(terms)], self.named(terms)
        if share < 1:
            classes = images.truth if teacher is None else truth(next(iter(teacher.values())), images)
            named["labels"] = F.cross_entropy(student.logits, classes)
            parts.append((1 - share) * named["labels"])
        return torch.stack(parts).sum(), named

    def view(self, images: Images) -> Images:
        """The changed images; of a black box they keep the answers to what they were."""
        if not isinstance(self.teacher, BlackBox) or not (self.share or images.labels is None):
            return super().view(images)
        logits = self.teacher(images.pixels)
        return replace(super().view(images), logits=logits)

    def ask_teacher(self, images: Images) -> Answers:
        """The teacher's outputs in each of the modes that objectives want, ``eval`` first."""
        if isinstance(self.teacher, BlackBox):
            return in_every_mode(self.teacher(images.pixels) if images.logits is None else images.logits)
        modes: dict[str, AbstractContextManager[None]] = {
            "eval": nullcontext(),
            "train": batch_statistics(self.teacher),
        }
        outputs: Answers = {}
        for mode in sorted({objective.teacher_mode for objective in self.losses.values()}):
            with modes[mode]:
                outputs[mode] = ask(self.teacher, images.pixels, self.teacher_taps)
        return outputs

    def expected(self, images: Images) -> Tensor:
        """The teacher's class."""
        classes: Tensor = self.teacher(images.pixels).argmax(1)
        return classes
