"""Data-Free Network Quantization With Adversarial Knowledge Distillation: a regularised adversary.

Choi, Choi, El-Khamy, Lee. CVPR workshops 2020. arXiv:2005.04136.

    min_S max_G  mean_ij KL(T(G_j(n)) || S_i(G_j(n))) - alpha L_T(G_j)
    L_T = sum_l sum_c KL(N(mean_lc(x), var_lc(x)) || N(mean_lc, var_lc)) + E[H(T(x))] - H(E[T(x)])

The first part of L_T is over the BatchNorm layers l of the teacher and their channels c, generated statistics first;
channels that were dead in training do not count. It grows with the teacher: a ResNet-8 has 336 channels, a ResNet-34
8,512. H is the entropy in nats: answers shall be sure each, and spread over the classes together. The last sign is the
paper's; ports of it have it reversed. With several generators and students (``generators``, ``students``) L_T is of
their joint batch; the first student is kept. alpha stays as it is, where the paper lowers it: on Fashion-MNIST that was
no better. Generators are not trained alone at first. With a temperature, KL is multiplied by its square.

No code was released: widths, learning rates and the ratio of steps are those of an independent port and of toolboxes;
the student takes 80,000 steps as in the latter, by SGD without Nesterov's form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.models.statistics import channel_divergences
from dfkd_cli.objectives.response import soft_loss
from dfkd_cli.synthesis_options import AdversarialTraining
from dfkd_cli.synthesizers.base import Look
from dfkd_cli.synthesizers.streaming import Adversary
from dfkd_cli.synthesizers.terms import mean_answer_entropy


@dataclass(frozen=True, kw_only=True)
class Config(AdversarialTraining):
    """DFQ."""

    steps: int = 16_000
    latent: int = 512
    student_steps: int = 5
    student_temperature: float = option(1.0, "softmax temperature of both losses", above=0)
    statistics: float = option(1.0, "weight of the divergence from the BatchNorm statistics", low=0)
    instance_entropy: float = option(1.0, "weight of the entropy of each answer", low=0)
    batch_entropy: float = option(1.0, "weight of the negative entropy of the mean answer", low=0)


class DFQ(Adversary):
    """Generators against students that keep to what the teacher knows."""

    needs = ("batchnorm", "student")
    config: Config

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The KL divergence of the answers to logits (B, K)."""
        return soft_loss(student, teacher, "kl", self.config.student_temperature)

    def generator_terms(self, look: Look) -> dict[str, Tensor]:
        """The students' distance, and the parts of L_T."""
        terms = super().generator_terms(look) | {
            "instance_entropy": answer_entropy(look.logits),
            "batch_entropy": -mean_answer_entropy(look.logits),
        }
        if look.moments:
            layers = [channel_divergences(seen, self.recorded[name], True) for name, seen in look.moments.items()]
            terms["statistics"] = torch.cat(layers).sum()
        return terms


def answer_entropy(logits: Tensor) -> Tensor:
    """The mean entropy of the answers to logits (B, K), in nats."""
    logs = logits.log_softmax(1)
    return -(logs.exp() * logs).sum(1).mean()
