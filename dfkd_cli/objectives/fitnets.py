"""FitNets: Hints for Thin Deep Nets: a learned regressor turns the student's maps into the teacher's.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio. ICLR 2015. arXiv:1412.6550.

    r(f) = relu(BatchNorm(conv(f)))                            (B, C_t, H_t, W_t), trained with the student
    code:   hint = mean_{b,c,h,w} (r(f_s) - f_t)^2
    paper:  hint = mean_b 1/2 sum_{c,h,w} (r(f_s) - f_t)^2

    project: student     r(f_s) and f_t          C_t channels, the above
    project: teacher     f_s    and P f_t        C_s channels
    project: both        r(f_s) and P f_t        ``width`` channels; r ends without a ReLU

The whole network is trained at once, as in every published comparison (RepDistiller, whose regressor, mean and weight
100 these are); the paper trains the lower half alone first. With ``variant: paper`` a term is C H W / 2 times larger,
so that the same pull takes a weight of 200 / (C H W): the default does not change with the variant.
The convolution brings maps to the teacher's size: 3x3 of stride 2 to the half, transposed 4x4 to the double, else one
without padding; a teacher's map that is larger in another way is pooled to the student's. Vectors are maps of one
pixel. ``relu: no`` is for hints that may be negative: before an activation, or the stages of a pre-activation network.

The projection P of the teacher's channels, (C, C_t), is ours. It is fixed: learned with the student, both sides could
agree on nothing. Its rows are orthonormal (its columns, where there are more rows than these).

- ``projection: orthogonal`` is random, of the run's seed.
- ``projection: principal`` are the eigenvectors of the covariance of the teacher's channels, over positions and all
  images that training draws from, unchanged, with the largest eigenvalues. Nothing is subtracted; each points to where
  the mean feature has a positive share. They are computed before the first step, and kept in the checkpoint.

What P gives may be negative, which a student's maps after a ReLU cannot be: ``taps: [stage2.pre]`` are those before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_cli.config import option
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.statistics import Covariance
from dfkd_cli.objectives.base import Outputs, PairwiseObjective
from dfkd_cli.objectives.features import BatchNorm, as_maps, require_maps, same_size
from dfkd_cli.options import Compared


@dataclass(frozen=True, kw_only=True)
class Config(Compared):
    """Hints."""

    taps: tuple[str, ...] = ("stage2",)
    variant: Literal["code", "paper"] = option(
        "code", "mean of squares, or half their sum for each image (weight: about 200/(CHW))"
    )
    relu: bool = option(True, "the regressor ends in a ReLU, unless the teacher is projected")
    project: Literal["student", "teacher", "both"] = option(
        "student", "whose channels are projected: the student's by a learned regressor, the teacher's by a fixed matrix"
    )
    projection: Literal["orthogonal", "principal"] = option(
        "orthogonal", "that matrix: random, or the principal directions of the teacher's channels on the transfer set"
    )
    width: int | None = option(
        None, "channels to which both are projected, where both are (default: the fewer of the two)", low=1
    )
    hint: float = option(1.0, "weight of the hints, beside that of the objective", low=0)


class FitNets(PairwiseObjective):
    """Squared error of a regressor for each hint."""

    kind = "feature"
    terms = ("hint",)
    default_weight = 100.0
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.width is not None and config.project != "both":
            raise ConfigError("fitnets: width is that of project: both", "give it, or leave width out")
        if config.projection != "orthogonal" and not self.projects_teacher:
            raise ConfigError("fitnets: projection is of the teacher's channels", "give project: teacher, or both")
        self.regressors = nn.ModuleList()

    def prepare(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        require_maps("fitnets", student, teacher, or_vectors=True)
        index, (channels, *size) = len(self.regressors), teacher
        if self.projects_teacher:
            both = self.config.project == "both"
            channels = (self.config.width or min(student[0], channels)) if both else student[0]
        goal, relu = (channels, *size), self.config.relu and not self.projects_teacher
        self.regressors.append(nn.Identity() if self.config.project == "teacher" else regressor(student, goal, relu))
        if self.projects_teacher:
            self.register_buffer(f"projection{index}", self.projection(channels, teacher[0]))

    @property
    def projects_teacher(self) -> bool:
        """Whether the teacher's channels are projected."""
        return self.config.project != "student"

    def projection(self, rows: int, columns: int) -> Tensor:
        """The matrix (rows, columns) of the teacher's channels, NaN until it is known."""
        if self.config.projection == "orthogonal":
            return nn.init.orthogonal_(torch.empty(rows, columns))
        if rows > columns:
            raise ConfigError(
                f"fitnets: {columns} channels of the teacher have no {rows} principal directions",
                "give projection: orthogonal, or project: both",
            )
        return torch.full((rows, columns), torch.nan)

    def observe(self, teacher: Iterable[Outputs]) -> None:
        """Find the principal directions of the teacher's channels, where they are wanted."""
        if not self.projects_teacher or self.config.projection != "principal":
            return
        matrices = [self.get_buffer(f"projection{index}") for index in range(len(self.pairs))]
        seen = [Covariance(matrix.shape[1]) for matrix in matrices]
        for outputs in teacher:
            for (_, tap), moments in zip(self.pairs, seen, strict=True):
                maps = as_maps(outputs.features[tap])
                moments.add(maps.transpose(0, 1).flatten(1).T.cpu().double())
        for matrix, moments in zip(matrices, seen, strict=True):
            matrix.copy_(principal(moments, len(matrix)))

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        guess, hint = self.regressors[index](as_maps(student)), as_maps(teacher)
        if self.projects_teacher:
            hint = F.conv2d(hint, self.get_buffer(f"projection{index}")[..., None, None])
        guess, hint = same_size(guess, hint)
        loss = F.mse_loss(guess, hint)
        return {"hint": loss * hint[0].numel() / 2 if self.config.variant == "paper" else loss}


def principal(moments: Covariance, count: int) -> Tensor:
    """The ``count`` leading eigenvectors (count, D) of a covariance, each with the mean on its positive side."""
    directions = torch.linalg.eigh(moments.covariance).eigenvectors.T.flip(0)[:count]
    return torch.where(directions @ moments.mean < 0, -1, 1)[:, None] * directions


def regressor(student: tuple[int, ...], teacher: tuple[int, ...], relu: bool) -> nn.Sequential:
    """A layer from features of one shape to those of another, each (C, H, W) or (D,)."""
    inputs, *small = (*student, 1, 1)[:3]
    outputs, *large = (*teacher, 1, 1)[:3]
    if small == [2 * side for side in large]:
        convolution: nn.Module = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
    elif large == [2 * side for side in small]:
        convolution = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
    else:
        height, width = (1 + max(own - wanted, 0) for own, wanted in zip(small, large, strict=True))
        convolution = nn.Conv2d(inputs, outputs, (height, width))
    return nn.Sequential(convolution, BatchNorm(outputs), *([nn.ReLU()] if relu else []))
