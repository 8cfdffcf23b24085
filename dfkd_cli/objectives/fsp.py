"""A Gift from Knowledge Distillation: the flow from one layer to the next, learned before the task.

Yim, Joo, Bae, Kim. CVPR 2017. doi:10.1109/CVPR.2017.754.

    G_ij = 1 / (h w) sum_{s,t} F1_ist F2_jst                 maps F1 (m, h, w) and F2 (n, h, w) of two places
    paper:  flow = sum_k mean_b ||G^s_k - G^t_k||^2          squared Frobenius norm; the larger maps max pooled
    code:   flow = sum_k mean_bij (G^s_k - G^t_k)^2          RepDistiller; the larger maps average pooled

k: every two of the taps that follow each other. The paper has one flow for each of three stages, from its input to its
output: ``taps: [stem, stages]`` in a network with a ``stem``; the default, which every network has, leaves the first
out. Both networks must have the same channels there: a shallower student of the same family.

The method has two phases: for ``pretraining`` epochs nothing but the flow is learned, then the other objectives alone.
In the first, the optimiser leaves what the flow does not depend on, the head among it, as it is: weight decay without a
gradient would shrink it to nothing. The optimiser and its learning rate run through both phases, where the paper starts
them anew. ``pretraining: 0`` learns everything at once, throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.objectives.base import FeatureObjective, Outputs
from dfkd_cli.objectives.features import require_maps
from dfkd_cli.options import Compared, Preceding


@dataclass(frozen=True, kw_only=True)
class Config(Compared, Preceding):
    """Flow between layers."""

    variant: Literal["code", "paper"] = option(
        "code", "mean of squares and average pooling, or their sum and max pooling"
    )
    flow: float = option(1.0, "weight of the flow, beside that of the objective", low=0)


class FSP(FeatureObjective):
    """Squared distance of the Gram matrices between consecutive places."""

    kind = "relation"
    terms = ("flow",)
    config: Config

    def connect(self, student: Classifier, teacher: Classifier) -> None:
        super().connect(student, teacher)
        if len(self.pairs) < 2:
            raise ConfigError("fsp compares the flow between places, and there is one only", "give two --taps or more")

    def prepare(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        require_maps("fsp", student, teacher)
        if student[0] != teacher[0]:
            raise ConfigError(
                f"fsp needs the same channels in both networks, not {student[0]} and {teacher[0]}",
                "choose a shallower student of the teacher's family, or other --taps",
            )

    def forward(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """Term ``flow``."""
        paper = self.config.variant == "paper"
        losses = []
        for shallow, deep in pairwise(self.features(student, teacher)):
            own, target = (flow(first, second, paper) for first, second in zip(shallow, deep, strict=True))
            squares = (own - target).square()
            losses.append(squares.sum((1, 2)).mean() if paper else squares.mean())
        return {"flow": torch.stack(losses).sum()}


def flow(first: Tensor, second: Tensor, maximum: bool) -> Tensor:
    """Maps (B, M, ...) and (B, N, ...) to (B, M, N): products averaged over positions, at the size of the smaller."""
    height, width = (min(sides) for sides in zip(first.shape[2:], second.shape[2:], strict=True))
    pool = F.adaptive_max_pool2d if maximum else F.adaptive_avg_pool2d
    first, second = (pool(maps, (height, width)).flatten(2) for maps in (first, second))
    return first @ second.transpose(1, 2) / first.shape[2]
