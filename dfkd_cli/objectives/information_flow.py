"""Heterogeneous Knowledge Distillation using Information Flow Modeling: images have the teacher's neighbours all along.

Passalis, Tzelepi, Tefas. CVPR 2020. arXiv:2005.00727.

    p_ij = K_ij / sum_j K_ij,  for K = (cos(f_i, f_j) + 1) / 2 and for K = 1 / (1 + ||f_i - f_j||)
    D_l  = sum_K mean_ij (p^t_ij - p^s_ij) (log p^t_ij - log p^s_ij)             Jeffreys divergence, at place l
    code:   over all i, j;  paper:  over i != j, in both sums
    flow = sum_l a_l D_l,  a_l = 1 at the last place, critical * decay^k before      k: finished epochs

Layers before the last are formed in a critical period at the start and left alone afterwards. As in the released code,
1e-6 is added to squared distances below their root and to the norms in the cosine. Ours is the 1e-6 added to kernels,
which keeps logarithms finite where a cosine is -1. It trains without labels and is judged by retrieval; as a
classifier's loss it goes with ``response``.

The loss shrinks as 1 / B: weights belong to a batch size, as those of ``sp`` and ``pkt`` do. The authors' is 128.

The paper's auxiliary teacher, as deep as the student, is a student of ``--objective pkt``: give its directory as
``--teacher``, or in a grid its row as ``taught_by``. The released code makes a new optimiser in every epoch, which is
not done here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.objectives.base import PairwiseObjective
from dfkd_cli.objectives.features import cosine_kernel, shares
from dfkd_cli.options import Compared

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config(Compared):
    """Neighbours at every stage."""

    taps: tuple[str, ...] = ("stages", "penultimate")
    variant: Literal["code", "paper"] = option("code", "whether an image is its own neighbour: yes, or no")
    critical: float = option(100.0, "weight of all places but the last in the first epoch", low=0)
    decay: float = option(0.7, "what that weight is multiplied by in each epoch", above=0, high=1)
    flow: float = option(1.0, "weight of all places, beside that of the objective", low=0)


class InformationFlow(PairwiseObjective):
    """Jeffreys divergence of the neighbours' probabilities at several places, with critical periods."""

    kind = "information"
    relational = True
    shrinking = True
    terms = ("flow",)
    config: Config

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        last = index + 1 == len(self.pairs)
        weight = 1.0 if last else self.config.critical * self.config.decay**self.epoch
        own, target = student.flatten(1), teacher.flatten(1)
        divergences = []
        for kernel in (cosine_kernel, t_kernel):
            kernels = kernel(own, EPS), kernel(target, EPS)
            if self.config.variant == "paper":
                kernels = others(kernels[0]), others(kernels[1])
            divergences.append(jeffreys(*(shares(values + EPS) for values in kernels)))
        return {"flow": weight * torch.stack(divergences).sum()}


def others(kernel: Tensor) -> Tensor:
    """Similarities (B, B) without those of an image with itself, (B, B - 1)."""
    count = len(kernel)
    return kernel[~torch.eye(count, dtype=torch.bool, device=kernel.device)].view(count, count - 1)


def t_kernel(rows: Tensor, eps: float) -> Tensor:
    """Features (B, D) to ``1 / (1 + ||f_i - f_j||)`` (B, B); ``eps`` is added to the squares of the distances."""
    rows = rows - rows.mean(0)  # differences stay; of small ones between large features, products would keep little
    squares = rows.square().sum(1)
    distances = (squares[:, None] + squares - 2 * rows @ rows.T).clamp_min(0)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    # An image is at no distance from itself. What rounding leaves there would have gradients of its inverse root.
    return 1 / (1 + (distances.masked_fill(itself, 0) + eps).sqrt())


def jeffreys(q: Tensor, p: Tensor) -> Tensor:
    """Divergence of one from the other and back, of probabilities (B, N), mean over all entries; 0 of none."""
    return ((p - q) * (p.log() - q.log())).sum() / max(p.numel(), 1)
