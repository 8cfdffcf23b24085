"""Distilling Knowledge via Knowledge Review: each level of the teacher is learned from the student's deeper levels too.

Chen, Liu, Zhao, Jia. CVPR 2021. arXiv:2104.09044.

    x_i = BatchNorm(conv1x1(f_i));  (a, b) = sigmoid(conv1x1([x_i, up(y_{i+1})]))
    y_i = resize(a x_i + b up(y_{i+1})),  r_i = BatchNorm(conv3x3(y_i))        from the deepest level, where y = x
    levels   = sum_i HCL(r_i, f^t_i)
    HCL(r, t) = weighted mean of ||r - t||^2 and of the same for maps pooled to 4x4, 2x2, 1x1, each weighing half of the
               one before; only cells fewer than the map's; means over all entries
    strength = min(e / ramp, 1)                                                e: the epoch, counted from 1

As in the released code: y has at most 512 channels, is resized to the nearest, and the teacher's stages are taken
before their activation. Levels are the stages and the pooled features. The weight is the one that the most pairs of the
paper have on CIFAR-100, 5 (WRN, ResNet-32x4 to 8x4, ShuffleNetV1); the others are 0.6 (ResNet-56 to 20), 1 (ResNet-110
to 32) and 8 (ShuffleNetV2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_cli.config import option
from dfkd_cli.data.sources import Images
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.objectives.base import FeatureObjective, Outputs
from dfkd_cli.objectives.features import BatchNorm, as_maps, require_maps
from dfkd_cli.options import Compared, Rising

WIDEST = 512  # channels of what is handed from level to level


@dataclass(frozen=True, kw_only=True)
class Config(Compared, Rising):
    """Reviewed features."""

    taps: tuple[str, ...] = ("stages", "penultimate")
    teacher_taps: tuple[str, ...] | None = option(
        ("stages.pre", "penultimate"), "the teacher's, in the same order (none: the same names)"
    )
    levels: float = option(1.0, "weight of all levels, beside that of the objective", low=0)


class ReviewKD(FeatureObjective):
    """Hierarchical distance between the teacher's levels and the student's fused ones."""

    kind = "feature"
    terms = ("levels",)
    default_weight = 5.0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def prepare(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        require_maps("reviewkd", student, teacher, or_vectors=True)
        self.shapes.append((student, teacher))

    def connect(self, student: Classifier, teacher: Classifier) -> None:
        super().connect(student, teacher)
        middle = min(WIDEST, self.shapes[-1][0][0])
        self.fusions = nn.ModuleList(
            Fusion(own[0], middle, other[0], deepest=index + 1 == len(self.shapes))
            for index, (own, other) in enumerate(self.shapes)
        )

    def forward(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """Term ``levels``."""
        losses, deeper = [], None
        for fusion, (own, target) in zip(
            reversed(self.fusions), reversed(self.features(student, teacher)), strict=True
        ):
            own, target = as_maps(own), as_maps(target)
            guess, deeper = fusion(own, deeper, target.shape[2:])
            losses.append(hierarchical(guess, target))
        return {"levels": torch.stack(losses).sum()}


class Fusion(nn.Module):
    """One level of the student with what comes from the level below it, brought to the teacher's shape.

    Args:
        inputs, middle, outputs: Channels of the student, of what is handed up, and of the teacher.
        deepest: Nothing comes from below.
    """

    def __init__(self, inputs: int, middle: int, outputs: int, deepest: bool) -> None:
        super().__init__()
        narrow = nn.Conv2d(inputs, middle, 1, bias=False)
        widen = nn.Conv2d(middle, outputs, 3, padding=1, bias=False)
        for convolution in (narrow, widen):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.narrow = nn.Sequential(narrow, BatchNorm(middle))
        self.widen = nn.Sequential(widen, BatchNorm(outputs))
        self.blend = None if deepest else nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())

    def forward(self, own: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """A guess of the teacher's maps (B, C, *size), and what is handed up."""
        fused = self.narrow(own)
        if self.blend is not None and deeper is not None:
            deeper = F.interpolate(deeper, own.shape[2:])
            shares = self.blend(torch.cat([fused, deeper], dim=1))
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        fused = F.interpolate(fused, size)
        return self.widen(fused), fused


def hierarchical(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of maps (B, C, H, W) and of their coarser versions, a weighted mean."""
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for cells in (4, 2, 1):
        if cells < student.shape[2]:
            weight /= 2
            total += weight
            guess, target = (F.adaptive_avg_pool2d(maps, cells) for maps in (student, teacher))
            loss = loss + weight * F.mse_loss(guess, target)
    return loss / total
