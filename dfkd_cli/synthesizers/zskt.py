"""Zero-shot Knowledge Transfer via Adversarial Belief Matching: a generator of images on which beliefs differ.

Micaelli, Storkey. NeurIPS 2019. arXiv:1905.09768.

    D   = 1/K mean_b KL(softmax T(x) || softmax S(x))
    L_G = -D(G(n)),    L_S = D(G(n)) + beta sum_l mean_{b,hw} (a(f_l^S) - a(f_l^T))^2

``a`` is the attention map of arXiv:1612.03928: the mean square over channels, each image's of norm one. D has the mean
over the classes too, as in the released code: beta belongs to that. Ten steps of the student follow each step of the
generator, on images of the same latents after that step; ``student_images: new`` draws new latents in each, which a
reproduction of the paper found better. Gradients of both networks are cut at norm 5; those of several generators, or
students, have one norm together.

``taps`` are where attention is compared; the paper's are before the last BatchNorm of a wide ResNet and before
the activations of LeNet, here they are what comes out of the stages. Networks with other numbers of stages need taps of
their own, ``teacher_taps`` too, or ``attention: 0``. With a temperature, D is multiplied by its square.
Images are made once for the ten steps of the student; the released code makes the same ones anew in each.
With ``end: sigmoid``, as toolboxes have it, images are of [0,1]: the paper's end centres the pixels of every batch,
and strokes on black are then out of reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.data.sources import Images
from dfkd_cli.models.taps import find_taps
from dfkd_cli.objectives.at import AttentionTransfer
from dfkd_cli.objectives.at import Config as Attention
from dfkd_cli.objectives.base import Outputs
from dfkd_cli.objectives.response import soft_loss
from dfkd_cli.options import Compared
from dfkd_cli.synthesis_options import AdversarialTraining, GeneratorEnd, StudentImages, StudentOptimizer
from dfkd_cli.synthesizers.base import SynthesisTask
from dfkd_cli.synthesizers.streaming import Adversary


@dataclass(frozen=True, kw_only=True)
class Config(Compared, AdversarialTraining):
    """Adversarial belief matching."""

    steps: int = 80_000
    batch_size: int = 128
    end: GeneratorEnd = "normal"
    clip: float = 5.0
    student_steps: int = 10
    student_images: StudentImages = "updated"
    student_optimizer: StudentOptimizer = "adam"
    student_lr: float = 2e-3
    student_weight_decay: float = 0.0
    student_temperature: float = option(1.0, "softmax temperature of both losses", above=0)
    attention: float = option(250.0, "weight of the attention maps", low=0)


class ZSKT(Adversary):
    """A generator against a student, by the divergence of their answers."""

    config: Config

    def __init__(self, task: SynthesisTask, config: Config) -> None:
        super().__init__(task, config)
        if config.attention:
            self.maps = AttentionTransfer(Attention(taps=config.taps, teacher_taps=config.teacher_taps))
            self.maps.connect(self.student, self.teacher)
            names = list(zip(*self.maps.pairs, strict=True))
            self.student_taps = [find_taps(student, names[0]) for student in self.students]
            self.taps = self.teacher_taps = find_taps(self.teacher, names[1])

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """D of logits (B, K)."""
        return soft_loss(student, teacher, "kl", self.config.student_temperature) / student.shape[1]

    def student_terms(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """The distance of the answers, and the attention maps'."""
        terms = super().student_terms(student, teacher, images)
        return terms | (self.maps(student, teacher, images) if self.config.attention else {})
