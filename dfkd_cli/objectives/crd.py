"""Contrastive Representation Distillation: of many images, the student knows the one that the teacher sees.

Tian, Krishnan, Isola. ICLR 2020. arXiv:1910.10699.

    v = W f / ||W f||                                      (B, dimensions), W of each network its own, trained
    s_ij = exp(<v_i, m_j> / tau) / Z                       m_j: what the other network's memory holds of image j
    l = -mean_i [log(s_i+ / (s_i+ + K / N)) + sum_K log((K / N) / (s_i- + K / N))]         K negatives, N images
    contrast = l(student's v, teacher's m) + l(teacher's v, student's m)
    m_i <- normalised(momentum m_i + (1 - momentum) v_i)   after the step

As in the released code: Z makes the mean of the first batch's scores 1 / N and then stays; 1e-7 keeps the quotients
finite; memories start uniform in +- 1 / sqrt(dimensions / 3); negatives are images of other classes, each at most once
where there are as many, else with replacement. The positive is the image itself, or with ``variant: relax`` any image
of its class. Classes are the true labels, or the teacher's answers where a set has none; they are learned as images
come along, until when an image counts as of another class. Where there is no other class, any image is a negative.

Scores are products with the whole memory, of which the drawn ones are taken: that holds B N numbers, where copies of
the drawn rows would be B K dimensions. Memories are state and in the checkpoint, not in the student. Processes write
each other's images into theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_cli.config import option
from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.objectives.answers import hard_labels
from dfkd_cli.objectives.base import FeatureObjective, Outputs, everywhere
from dfkd_cli.options import Compared

EPS = 1e-7
UNSEEN = -1  # the class of an image that has not come along yet


@dataclass(frozen=True, kw_only=True)
class Config(Compared):
    """Contrast with a memory of all images."""

    taps: tuple[str, ...] = ("penultimate",)
    variant: Literal["exact", "relax"] = option("exact", "the positive: the image itself, or any of its class")
    dimensions: int = option(128, "of the space in which features are compared", low=1)
    negatives: int = option(16384, "negatives of each image, drawn anew in every step", low=1, rehearsal=2)
    temperature: float = option(0.07, "softmax temperature", above=0)
    memory_momentum: float = option(0.5, "what a memory keeps when its image comes along", low=0, high=1)
    contrast: float = option(1.0, "weight of the contrast, beside that of the objective", low=0)


class CRD(FeatureObjective):
    """Noise-contrastive estimation between each network's embedding and the other's memory."""

    kind = "relation"
    remembers = True
    terms = ("contrast",)
    default_weight = 0.8
    config: Config
    memory: Tensor  # (2, N, dimensions): the student's and the teacher's
    classes: Tensor  # (N,)
    scale: Tensor  # (2,): Z of the student's and of the teacher's scores, 0 before the first batch
    seen: list[tuple[Tensor, ...]]  # of each pass of the step: embeddings, positions, classes, scales

    def connect(self, student: Classifier, teacher: Classifier) -> None:
        super().connect(student, teacher)
        if len(self.pairs) != 1:
            raise ConfigError("crd compares one pair of features", "give one of --taps")

    def prepare(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        sizes = math.prod(student), math.prod(teacher)
        self.embeddings = nn.ModuleList(nn.Linear(size, self.config.dimensions) for size in sizes)

    def expect(self, count: int) -> None:
        bound = (self.config.dimensions / 3) ** -0.5
        self.register_buffer("memory", torch.empty(2, count, self.config.dimensions).uniform_(-bound, bound))
        self.register_buffer("classes", torch.full((count,), UNSEEN))
        self.register_buffer("scale", torch.zeros(2))
        self.seen = []

    def forward(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """Term ``contrast``."""
        if images.positions is None:
            raise ConfigError("crd remembers images of the transfer set, and these are others", "use --method offline")
        features = [values.flatten(1) for values in self.features(student, teacher)[0]]
        embedded = [F.normalize(layer(rows)) for layer, rows in zip(self.embeddings, features, strict=True)]
        classes = hard_labels(teacher, images)
        drawn = draw(images.positions, classes, self.classes, self.config.negatives, self.config.variant == "relax")
        scores = torch.stack([(v @ m.T).gather(1, drawn) for v, m in zip(embedded, self.memory.flip(0), strict=True)])
        scores = (scores / self.config.temperature).exp()
        scale = torch.where(self.scale > 0, self.scale, scores.detach().mean((1, 2)) * len(self.classes))
        self.seen.append((torch.stack(embedded, dim=1).detach(), images.positions, classes, scale))
        noise = self.config.negatives / len(self.classes)
        return {"contrast": estimation(scores[0] / scale[0], noise) + estimation(scores[1] / scale[1], noise)}

    @torch.no_grad()
    def after_step(self) -> None:
        """Write the images of the step into the memories; a teacher that has stopped is asked about none."""
        if not self.seen:
            return
        *seen, scales = zip(*self.seen, strict=True)
        embedded, positions, classes = (torch.cat(parts) for parts in seen)
        self.seen.clear()
        self.scale.copy_(everywhere(torch.stack(scales)).mean(0))
        embedded, positions = everywhere(embedded).transpose(0, 1), everywhere(positions)
        share = self.config.memory_momentum
        self.memory[:, positions] = F.normalize(share * self.memory[:, positions] + (1 - share) * embedded, dim=2)
        self.classes[positions] = everywhere(classes)


def draw(positions: Tensor, own: Tensor, classes: Tensor, count: int, relax: bool) -> Tensor:
    """The images (B, 1 + count) to which images are compared: each one's positive, then negatives.

    Args:
        positions: (B,) where the images stand.
        own: (B,) their classes.
        classes: (N,) the classes of all images, as far as they are known.
        count: Negatives of each image.
        relax: The positive is any image of the class, not the image itself.
    """
    itself = torch.arange(len(classes), device=classes.device) == positions[:, None]
    alike = itself | (classes == own[:, None])
    positive = torch.multinomial(alike.float(), 1) if relax else positions[:, None]
    others = (~alike | alike.all(1, keepdim=True)).float()
    enough = others.sum(1) >= count
    negatives = positive.new_empty(len(others), count)
    for rows, again in ((enough, False), (~enough, True)):
        if rows.any():
            negatives[rows] = torch.multinomial(others[rows], count, replacement=again)
    return torch.cat([positive, negatives], dim=1)


def estimation(scores: Tensor, noise: float) -> Tensor:
    """How well scores (B, 1 + K) tell the positive, which comes first, from ``noise = K / N``."""
    truth = torch.cat([scores[:, :1], torch.full_like(scores[:, 1:], noise)], dim=1)
    return -(truth / (scores + noise + EPS)).log().sum() / len(scores)
