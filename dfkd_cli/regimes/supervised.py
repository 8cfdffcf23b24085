"""Supervised training: a network and true labels, no teacher.

How teachers are made, and the with-data baseline of a student:

    L = - log softmax(z)_y        with label smoothing e: the target is (1 - e) for y plus e / K for every class
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.data.sources import Images
from dfkd_cli.models.graphs import logits_of
from dfkd_cli.regimes.base import Regime


@dataclass(frozen=True, kw_only=True)
class Config:
    """Supervised training."""

    label_smoothing: float = option(0.0, "share of the label spread over all classes", low=0, high=1)


class Supervised(Regime):
    """Cross-entropy with the labels."""

    needs = ("labels",)
    config: Config

    def loss(self, images: Images) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy."""
        logits = logits_of(self.student, images.pixels).float()
        loss = F.cross_entropy(logits, images.truth, label_smoothing=self.config.label_smoothing)
        return loss, {"cross_entropy": loss}
