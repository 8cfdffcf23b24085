"""Noise images: the weakest transfer set, and where image optimisation starts."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(count: int, shape: tuple[int, int, int], generator: torch.Generator | None = None) -> Tensor:
    """Uniform noise in [0,1]: (count, C, H, W) float32. Drawn on the CPU, so that every device gets the same images."""
    return torch.rand(count, *shape, generator=generator)
