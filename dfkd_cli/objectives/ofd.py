"""A Comprehensive Overhaul of Feature Distillation: features before their activation, as far as they matter.

Heo, Kim, Yun, Park, Kwak, Choi. ICCV 2019. arXiv:1904.01866.

    t = max(f_t, m),  s = BatchNorm(conv1x1(f_s))                              trained with the student
    m_c = E[x | x < 0] = mu - sigma phi(mu / sigma) / Phi(-mu / sigma),        x ~ N(mu, sigma^2): the shift and the
          or -3 sigma where Phi(-mu / sigma) <= 0.001                          scale of channel c of a BatchNorm
    distance = sum_i 2^(i - n) mean_b sum_{c,h,w} (s - t)^2 [s > t or t > 0]   stages i = 1 ... n

A student's value below a target that the activation cuts off costs nothing. The teacher's BatchNorm uses the statistics
of the batch, as in the released code (table 8 of the paper); unlike there, it does not learn from them. The BatchNorm
whose shift and scale give m is the one before the activation; before the sum of a residual block it is an
approximation, which the released code makes too. The weight is CIFAR's 1/1000; ImageNet has a tenth of it. Where maps
differ in size, the larger are pooled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_cli.config import option
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.taps import Taps
from dfkd_cli.objectives.base import PairwiseObjective
from dfkd_cli.objectives.features import BatchNorm, require_maps, same_size
from dfkd_cli.options import Compared

RARE = 0.001  # a channel that is negative less often has no mean of its own there


@dataclass(frozen=True, kw_only=True)
class Config(Compared):
    """Features before their activation."""

    taps: tuple[str, ...] = ("stages.pre",)
    distance: float = option(1.0, "weight of the partial distance, beside that of the objective", low=0)


class OFD(PairwiseObjective):
    """Partial squared distance to margined features."""

    kind = "feature"
    needs = ("batchnorm",)
    terms = ("distance",)
    default_weight = 1e-3
    teacher_mode = "train"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.connectors = nn.ModuleList()

    def connect(self, student: Classifier, teacher: Classifier) -> None:
        super().connect(student, teacher)
        places = Taps(teacher)
        for index, (_, name) in enumerate(self.pairs):
            self.register_buffer(f"margin{index}", margin(places.batch_norm(name)), persistent=False)

    def prepare(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        require_maps("ofd", student, teacher)
        convolution = nn.Conv2d(student[0], teacher[0], 1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        self.connectors.append(nn.Sequential(convolution, BatchNorm(teacher[0])))

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        own, features = same_size(self.connectors[index](student), teacher)
        target = features.maximum(self.get_buffer(f"margin{index}"))
        depth = index + 1 - len(self.connectors)
        return {"distance": 2.0**depth * partial_distance(own, target)}


def margin(norm: _BatchNorm) -> Tensor:
    """The mean of the negative values that a BatchNorm layer's shift and scale promise, (C, 1, 1).

    In float64: where few values are negative, it is a quotient of small numbers.
    """
    mean, deviation = norm.bias.detach().double(), norm.weight.detach().double().abs().clamp_min(1e-12)
    ratio = mean / deviation
    negative = torch.special.ndtr(-ratio)
    density = (-ratio.square() / 2).exp() / (2 * torch.pi) ** 0.5
    expected = mean - deviation * density / negative.clamp_min(RARE)
    return torch.where(negative > RARE, expected, -3 * deviation)[:, None, None].to(norm.bias.dtype)


def partial_distance(student: Tensor, target: Tensor) -> Tensor:
    """Squared distance of maps (B, C, H, W), but where the student is below a target below 0. Mean over images."""
    counts = (student > target) | (target > 0)
    return ((student - target).square() * counts).sum() / len(student)
