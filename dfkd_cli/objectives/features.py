"""What losses between features share: maps of one size, similarities of images as probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_cli.errors import ConfigError


def require_maps(objective: str, *shapes: tuple[int, ...], or_vectors: bool = False) -> None:
    """Refuse features of one image that are no maps (C, H, W), nor vectors (D,) if these will do.

    Raises:
        ConfigError: They are not, such as tokens (N, C).
    """
    wanted, hint = ("maps or vectors", ", such as penultimate") if or_vectors else ("maps", "")
    for shape in shapes:
        if len(shape) != 3 and not (or_vectors and len(shape) == 1):
            raise ConfigError(
                f"{objective} compares feature {wanted}, not features of shape {shape}", f"give other --taps{hint}"
            )


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches of maps (B, C, H, W), of which each side is pooled to that of the smaller one by averaging."""
    height, width = (min(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True))
    pooled = [
        maps if maps.shape[2:] == (height, width) else F.adaptive_avg_pool2d(maps, (height, width))
        for maps in (student, teacher)
    ]
    return pooled[0], pooled[1]


def as_maps(features: Tensor) -> Tensor:
    """Features (B, C, H, W) or (B, D) as maps; vectors become maps of one pixel."""
    return features[:, :, None, None] if features.ndim == 2 else features


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm of an objective's own layers.

    Raises:
        ConfigError: In training, there is one value in each channel: one image of one pixel.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            raise ConfigError("BatchNorm cannot learn from one image with maps of one pixel", "raise --batch-size")
        return super().forward(input)


def cosine_kernel(rows: Tensor, eps: float) -> Tensor:
    """Features (B, D) to ``(cos(f_i, f_j) + 1) / 2`` (B, B); ``eps`` is added to the norms."""
    rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + eps)
    return (rows @ rows.T + 1) / 2


def shares(kernel: Tensor) -> Tensor:
    """Similarities (B, N) as probabilities, each row of sum one."""
    return kernel / kernel.sum(1, keepdim=True)
