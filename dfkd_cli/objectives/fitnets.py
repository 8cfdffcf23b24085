"""FitNets: Hints for Thin Deep Nets: a learned regressor turns the student's maps into the teacher's.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio. ICLR 2015. arXiv:1412.6550.

    r(f) = relu(BatchNorm(conv(f)))                            (B, C_t, H_t, W_t), trained with the student
    code:   hint = mean_{b,c,h,w} (r(f_s) - f_t)^2
    paper:  hint = mean_b 1/2 sum_{c,h,w} (r(f_s) - f_t)^2

The whole network is trained at once, as in every published comparison (RepDistiller, whose regressor, mean and weight
100 these are); the paper trains the lower half alone first. With ``variant: paper`` a term is C H W / 2 times larger,
so that the same pull takes a weight of 200 / (C H W): the default does not change with the variant.
The convolution brings maps to the teacher's size: 3x3 of stride 2 to the half, transposed 4x4 to the double, else one
without padding; a teacher's map that is larger in another way is pooled to the student's. Vectors are maps of one
pixel. ``relu: no`` is for hints that may be negative: before an activation, or the stages of a pre-activation network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_cli.config import option
from dfkd_cli.objectives.base import PairwiseObjective
from dfkd_cli.objectives.features import BatchNorm, as_maps, require_maps_or_vectors, same_size
from dfkd_cli.options import Compared


@dataclass(frozen=True, kw_only=True)
class Config(Compared):
    """Hints."""

    taps: tuple[str, ...] = ("stage2",)
    variant: Literal["code", "paper"] = option(
        "code", "mean of squares, or half their sum for each image (weight: about 200/(CHW))"
    )
    relu: bool = option(True, "the regressor ends in a ReLU")
    hint: float = option(1.0, "weight of the hints, beside that of the objective", low=0)


class FitNets(PairwiseObjective):
    """Squared error of a regressor for each hint."""

    kind = "feature"
    terms = ("hint",)
    default_weight = 100.0
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.regressors = nn.ModuleList()

    def prepare(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        require_maps_or_vectors("fitnets", student, teacher)
        self.regressors.append(regressor(student, teacher, self.config.relu))

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        guess, hint = same_size(self.regressors[index](as_maps(student)), as_maps(teacher))
        loss = F.mse_loss(guess, hint)
        return {"hint": loss * hint[0].numel() / 2 if self.config.variant == "paper" else loss}


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
