"""Loss terms that several synthesizers share: pure functions, batch means unless they say otherwise."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def tempered_cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """``-sum_k y_k log softmax(z / temperature)_k``, mean over the batch.

    Args:
        logits: (B, K).
        targets: (B, K) soft labels, or (B,) class indices.
        temperature: Softmax temperature.
    """
    return F.cross_entropy(logits / temperature, targets)


def total_variation(images: Tensor) -> Tensor:
    """Sum of squared differences between neighbouring pixels, mean over the batch; images (B, C, H, W)."""
    vertical = (images[:, :, 1:] - images[:, :, :-1]).square().sum()
    horizontal = (images[:, :, :, 1:] - images[:, :, :, :-1]).square().sum()
    return (vertical + horizontal) / len(images)
