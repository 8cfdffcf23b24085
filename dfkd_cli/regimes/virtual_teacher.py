"""Revisiting Knowledge Distillation via Label Smoothing Regularization: a teacher that is written by hand.

Yuan, Tay, Li, Wang, Feng. CVPR 2020. arXiv:1909.11723.

    p(k) = a for the label y, (1 - a) / (K - 1) for every other class
    paper:     the answers are logits z_k = log p(k), which the objective softens: softmax(z / tau) ~ p^(1 / tau)
    released:  softmax(z) = softmax(p / flatten): probabilities in the place of logits

There is no network, so that the student is always right to learn from it; how far it is from the student is the
objective's: with the paper's L = (1 - alpha) CE + alpha KL(p_tau || q_tau), ``--objective response --temperature 20
--hard 0.9 --soft 0.00025`` for alpha 0.1, as ``soft`` has tau^2 before it.

The released code softens probabilities, has the student at temperature 1 on CIFAR-100 (its author: "This is weird but
works better in practice") and takes a mean over classes too, times a multiplier: ``--variant released --temperature 1
--hard 0.9 --soft 0.1`` is its setting for a ResNet-18 there (alpha 0.1, flatten 20, multiplier 100 = K). Of 100 classes
its target is 1.05 % for the label and 0.9995 % for each other: nearly uniform label smoothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.data.sources import Images
from dfkd_cli.regimes.distillation import Answers, Distillation, in_every_mode


@dataclass(frozen=True, kw_only=True)
class Config:
    """A virtual teacher."""

    variant: Literal["paper", "released"] = option(
        "paper", "what is softened: logits, or probabilities as if they were"
    )
    correct: float = option(0.99, "the virtual teacher's probability of the label", above=0, high=0.9999)
    flatten: float = option(20.0, "what the released code divides probabilities by", above=0)


class VirtualTeacher(Distillation):
    """A student, and labels that answer like a teacher."""

    needs = ("labels", "objective")
    mixable = False
    config: Config

    def ask_teacher(self, images: Images) -> Answers:
        """The hand-made answers for the images' labels."""
        p = probabilities(images.true_labels, self.student.info.num_classes, self.config.correct)
        return in_every_mode(p.log() if self.config.variant == "paper" else p / self.config.flatten)


def probabilities(labels: Tensor, num_classes: int, correct: float) -> Tensor:
    """Probabilities (B, K): ``correct`` for the label (B,), all others the same."""
    p = torch.full((len(labels), num_classes), (1 - correct) / (num_classes - 1), device=labels.device)
    return p.scatter(1, labels[:, None], correct)
