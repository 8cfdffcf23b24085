"""What DeepDream, DeepInversion and those after them share: image priors on what the teacher sees."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dfkd_cli.synthesis_options import Inversion
from dfkd_cli.synthesizers.base import ImageOptimizer, Look
from dfkd_cli.synthesizers.terms import neighbour_differences, tempered_cross_entropy


class Inverter(ImageOptimizer):
    """Images of one class each, optimised as the teacher's ``net`` takes them."""

    normalised = True
    config: Inversion

    def terms(self, look: Look, targets: Any) -> dict[str, Tensor]:
        """The cross-entropy with the class, and the priors whose weights are not zero."""
        terms = {"cross_entropy": tempered_cross_entropy(look.logits, targets, self.config.temperature)}
        if self.config.total_variation or self.config.total_variation_l1:
            differences = neighbour_differences(look.images)
            if self.config.total_variation:
                terms["total_variation"] = torch.stack([part.norm() for part in differences]).sum()
            if self.config.total_variation_l1:
                terms["total_variation_l1"] = torch.stack(
                    [part.abs().mean() if part.numel() else part.sum() for part in differences]
                ).sum()
        if self.config.l2:
            terms["l2"] = look.images.flatten(1).norm(dim=1).mean()
        return terms

    def optimizer(self, images: Tensor) -> torch.optim.Optimizer:
        """Adam with the configured betas."""
        return torch.optim.Adam([images], lr=self.config.lr, betas=self.config.betas, fused=True)

    def rate(self, step: int, steps: int) -> float:
        """A linear rise, then constant or along a cosine to zero."""
        warmup = min(self.config.warmup, steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
