"""Decoupled Knowledge Distillation: the target class and the other classes are weighted apart.

Zhao, Cui, Song, Qiu, Liang. CVPR 2022. arXiv:2203.08679.

    p, q = softmax(z_t / tau), softmax(z_s / tau);  b = (p_y, 1 - p_y);  p' = softmax over the classes other than y
    target     = tau^2 KL(b(p) || b(q))
    non_target = tau^2 KL(p' || q')                            sum over classes, mean over the batch
    strength   = min(e / ramp, 1) of both, 1 of hard labels    e: the epoch, counted from 1

    Hinton's loss is target + (1 - p_y) * non_target, image by image.

``non_target`` has the released default; the paper uses 2 (ResNet-56 to 20), 6 (WRN, VGG) and 8 (ResNet-32x4 to 8x4) on
CIFAR-100. y is the teacher's class where images have no label. The released code masks y by subtracting 1000 from its
logit and takes the logarithm of summed probabilities; here y is left out, and the probabilities stay logarithms. With
``standardise`` the weights are larger: ``target: 9, non_target: 72`` at temperature 2 (arXiv:2403.01427).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.data.sources import Images
from dfkd_cli.objectives.answers import AnswerObjective, divergence, hard_labels
from dfkd_cli.objectives.base import Outputs
from dfkd_cli.options import Answers, Rising


@dataclass(frozen=True, kw_only=True)
class Config(Answers, Rising):
    """Decoupled response distillation."""

    target: float = option(1.0, "weight of the target class against all others", low=0)
    non_target: float = option(8.0, "weight of the distribution among the other classes", low=0)


class DKD(AnswerObjective):
    """Binary divergence of the target class, divergence among the others."""

    terms = ("target", "non_target", "hard")
    not_of_two = "dkd needs three classes or more: of two, one is left"
    config: Config

    def forward(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """Terms ``target``, ``non_target`` and, where it has a weight, ``hard``."""
        terms = decoupled(*self.answers(student, teacher), hard_labels(teacher, images), self.config.temperature)
        return terms | self.hard(student, teacher, images)


def decoupled(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> dict[str, Tensor]:
    """The two terms of logits (B, K) for target classes (B,)."""
    own = target[:, None]
    other = torch.arange(student.shape[1] - 1, device=target.device)
    other = other + (other >= own)  # a mask would wait for the device, to know how many it takes
    pairs, others = [], []
    for logits in (student / temperature, teacher / temperature):
        rest = logits.gather(1, other)
        pairs.append(torch.cat([logits.gather(1, own), rest.logsumexp(1, keepdim=True)], dim=1))  # y; all others as one
        others.append(rest)
    return {
        "target": divergence(*pairs) * temperature**2,
        "non_target": divergence(*others) * temperature**2,
    }
