"""What losses between logits (B, K) share: z-scores, the divergence of softened answers, hard labels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.objectives.base import Objective, Outputs
from dfkd_cli.options import Answers

STANDARDISE_EPS = 1e-7


def standardise(logits: Tensor) -> Tensor:
    """Logits less their mean over the classes, in units of their unbiased standard deviation.

    Sun, Ren, Li, Wang, Cao. Logit Standardization in Knowledge Distillation. CVPR 2024. arXiv:2403.01427. The student
    then learns the shape of an answer and not its scale, which gradients towards the student go through too.
    """
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + STANDARDISE_EPS)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """``sum_k p_k log(p_k / q_k)``, mean over images; p, q: the softmax of the teacher's and the student's logits."""
    return F.kl_div(F.log_softmax(student, 1), F.log_softmax(teacher, 1), reduction="batchmean", log_target=True)


def hard_labels(teacher: Outputs, images: Images) -> Tensor:
    """The true labels (B,), or the teacher's classes where there are none."""
    return teacher.logits.argmax(1) if images.labels is None else images.labels


def truth(teacher: Outputs, images: Images) -> Tensor:
    """What a cross-entropy takes: labels (B,), or shares (B, K) of mixed images; the teacher's classes without any."""
    return hard_labels(teacher, images) if images.shares is None else images.shares


class AnswerObjective(Objective):
    """An objective between logits. Its ``Config`` extends :class:`dfkd_cli.options.Answers`.

    Attributes:
        not_of_two: Why logits of two classes cannot be compared so; empty where they can.

    Raises:
        ConfigError: Hard labels are to be smoothed, and have no weight.
    """

    kind = "response"
    not_of_two: ClassVar[str] = ""
    config: Answers

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.label_smoothing and not config.hard:
            raise ConfigError(
                f"--label-smoothing {config.label_smoothing:g} smooths hard labels, which have no weight",
                "give --hard too, or leave it out",
            )

    def connect(self, student: Classifier, teacher: Classifier) -> None:
        if teacher.info.num_classes > 2:
            return
        if self.config.standardise:
            raise ConfigError("--standardise: z-scores of two logits are always the same two", "leave it out")
        if self.not_of_two:
            raise ConfigError(self.not_of_two, "use --objective response")

    def strength(self, term: str) -> float:
        """That of the objective; ``hard`` is the task itself and always counts in full."""
        return 1.0 if term == "hard" else super().strength(term)

    def answers(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """The logits (B, K) to compare, the student's and the teacher's."""
        if self.config.standardise:
            return standardise(student.logits), standardise(teacher.logits)
        return student.logits, teacher.logits

    def hard(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """The term ``hard``, cross-entropy of the plain logits with the labels, where it has a weight.

        The labels of mixed images are each class's share.
        """
        if not self.config.hard:
            return {}
        targets, smoothing = truth(teacher, images), self.config.label_smoothing
        return {"hard": F.cross_entropy(student.logits, targets, label_smoothing=smoothing)}
