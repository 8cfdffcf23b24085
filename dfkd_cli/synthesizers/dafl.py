"""Data-Free Learning of Student Networks: a generator of images that the teacher is sure of, all classes alike.

Chen, Wang, Xu, Yang, Liu, Shi, Xu, Xu, Tian. ICCV 2019. arXiv:1904.01186.

    L_G = a_oh CE(z, argmax z) + a_ie sum_k m_k log10 m_k - a_a mean |f|
    z = T(G(n)),  m = batch mean of softmax(z),  f = the teacher's features
    L_S = KL(softmax z || softmax S(G(n)))

The second term is the negative entropy of the mean answer, to the base 10 as in the released code: it is smallest when
all classes are alike. The mean of |f| is over images and units. Student and generator take a step each on the same
images. ``features`` is what goes into the last layer; for LeNet-5 the released code reads the layer before that.

Defaults are the released script's for CIFAR-10. There the student's learning rate falls by ten at 40 and 80 per cent of
the steps, here by a cosine; the generator's is constant. Batches are large for a reason: with 256, arXiv:1912.11006
reports 88.5 where the paper has 92.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.taps import find_taps
from dfkd_cli.objectives.base import Outputs
from dfkd_cli.objectives.response import soft_loss
from dfkd_cli.synthesis_options import GeneratorTraining, RateSchedule, StudentImages
from dfkd_cli.synthesizers.base import Look, SynthesisTask
from dfkd_cli.synthesizers.streaming import StreamTrainer
from dfkd_cli.synthesizers.terms import mean_answer_entropy


@dataclass(frozen=True, kw_only=True)
class Config(GeneratorTraining):
    """DAFL."""

    steps: int = 240_000
    batch_size: int = 1024
    latent: int = 1000
    lr: float = 0.02
    schedule: RateSchedule = "student"
    student_images: StudentImages = "same"
    student_weight_decay: float = 5e-4
    student_temperature: float = option(1.0, "softmax temperature of the student's loss", above=0)
    features: str = option("penultimate", "the teacher's features: stage1 ..., last, penultimate, a module's path")
    one_hot: float = option(0.05, "weight of the cross-entropy with the teacher's own class", low=0)
    information: float = option(5.0, "weight of the negative entropy of the mean answer", low=0)
    activation: float = option(0.01, "weight of the features' size", low=0)


class DAFL(StreamTrainer):
    """A generator whose images the teacher is sure of."""

    epsilon = 0.8
    config: Config

    def __init__(self, task: SynthesisTask, config: Config) -> None:
        super().__init__(task, config)
        if config.activation:
            self.taps = find_taps(self.teacher, [config.features])
            if len(self.taps) != 1:
                raise ConfigError(
                    f"--features {config.features}: more than one place", f"give one of {', '.join(self.taps)}"
                )

    def generator_terms(self, look: Look) -> dict[str, Tensor]:
        """One-hot, information and, where it has a weight, activation."""
        terms = {"one_hot": one_hot(look.logits), "information": information(look.logits)}
        if self.config.activation:
            (features,) = look.features.values()
            terms["activation"] = -features.abs().mean()
        return terms

    def student_terms(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """L_S, of softened answers."""
        return {"soft": soft_loss(student.logits, teacher.logits, "kl", self.config.student_temperature)}


def one_hot(logits: Tensor) -> Tensor:
    """Cross-entropy of logits (B, K) with their own classes, mean over the batch."""
    return F.cross_entropy(logits, logits.argmax(1))


def information(logits: Tensor) -> Tensor:
    """``sum_k m_k log10 m_k`` of the mean probabilities ``m`` of logits (B, K)."""
    return -mean_answer_entropy(logits) / math.log(10)
