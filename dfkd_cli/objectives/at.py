"""Attention Transfer: the student looks where the teacher looks.

Zagoruyko, Komodakis. Paying More Attention to Attention. ICLR 2017. arXiv:1612.03928.

    a(f) = v / ||v||,  v_hw = mean_c f_chw^2                       (B, HW), each image apart
    code:   attention = sum_stages mean_{b,hw} (a(f_s) - a(f_t))^2
    paper:  attention = sum_stages mean_b 1/2 ||a(f_s) - a(f_t)||       equation 2, a norm that is not squared

The released code's squared mean is the default, with its weight 1000. The default does not change with the variant: the
paper's 0.1 is for a sum over the batch, so that ``variant: paper`` takes 0.1 times the batch size, as in
``--objective at=12.8`` for batches of 128. There the authors' 1000 / (B HW) is 0.1 of maps of 8x8.
Where the maps differ in size, each side of the larger one is pooled to that of the smaller before squaring. The weight
belongs to 32x32 images: a mean over more positions is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.objectives.base import PairwiseObjective
from dfkd_cli.objectives.features import require_maps, same_size
from dfkd_cli.options import Compared


@dataclass(frozen=True, kw_only=True)
class Config(Compared):
    """Attention maps."""

    variant: Literal["code", "paper"] = option(
        "code", "mean of squares, or half the norm (weight: about 0.1 times the batch size)"
    )
    attention: float = option(1.0, "weight of the attention maps, beside that of the objective", low=0)


class AttentionTransfer(PairwiseObjective):
    """Distance of normalised maps of the energy in each position."""

    kind = "feature"
    terms = ("attention",)
    default_weight = 1000.0
    config: Config

    def prepare(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        require_maps("at", student, teacher)

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        difference = torch.sub(*(attention(maps) for maps in same_size(student, teacher)))
        if self.config.variant == "paper":
            return {"attention": torch.linalg.vector_norm(difference, dim=1).mean() / 2}
        return {"attention": difference.square().mean()}


def attention(maps: Tensor) -> Tensor:
    """Maps (B, C, H, W) to attention (B, HW), of norm one for each image."""
    return F.normalize(maps.square().sum(1).flatten(1))  # as of the mean, whose gradient would be divided everywhere
