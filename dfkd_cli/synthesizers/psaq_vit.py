"""Patch Similarity Aware Data-Free Quantization for Vision Transformers: images whose patches attend differently.

Li, Ma, Chen, Xiao, Gu. ECCV 2022. arXiv:2203.02250. For networks with attention, whose LayerNorm keeps no statistics of
the training data.

    x = argmin_x  a_c CE(T(x) / tau, y) + a_v |TV(x) - v| - a_e sum_l H_l(x)
    H_l = mean_b integral -p log p,   p = 1e-4 + KDE of s_ij,   s_ij = cos(o_i, o_j)

o_i is what attention layer l gives to patch i before its projection, mean over the heads. The density of similarities
of all pairs of patches of an image is estimated with Gaussians of width ``bandwidth`` at ``points`` places, equally
spaced between the least and the largest of the batch, without gradient; the integral is trapezoidal. TV is the sum of
the norms of the differences of neighbours over the batch. v, drawn once for each batch, is between 2,500 and 3,000 for
the paper's 32 images of 224x224 pixels; here it grows with the root of the number of their values. The learning rate
rises and falls along a cosine twice; images are rolled by half of ``jitter`` in the first half.

Differences from the released code:

- Image ``n`` is of class ``n mod K``; the code draws classes at random.
- Each image is mirrored with probability 1/2, and the axes are rolled one by one; there, the whole batch is mirrored,
  and one offset is for both axes.
- Tokens before the patches are left out, however many there are; there it is one, also of the windows of a Swin, which
  have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.models.attention import attention_layers
from dfkd_cli.synthesis_options import Inversion
from dfkd_cli.synthesizers.base import Look, SynthesisTask
from dfkd_cli.synthesizers.inversion import Inverter

FLOOR = 1e-4  # of the density, whose logarithm is taken


@dataclass(frozen=True, kw_only=True)
class Config(Inversion):
    """PSAQ-ViT."""

    batch_size: int = 32
    iterations: int = 1000
    lr: float = 0.2
    betas: tuple[float, float] = (0.5, 0.9)
    warmup: int = option(100, "inner steps with rising learning rate, in each half", low=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    jitter: int = 30
    view_flip: bool = True
    clamp: bool = True
    total_variation: float = option(0.05, "weight of the distance of the total variation from the one aimed at", low=0)
    variation: tuple[float, float] = option(
        (1.139, 1.367), "range of the one aimed at, over the root of the number of values of a batch", low=0
    )
    patch_entropy: float = option(1.0, "weight of the entropy of patch similarities, which is made large", low=0)
    bandwidth: float = option(0.01, "width of the kernel of their density", above=0)
    points: int = option(10, "where the density is estimated", low=2)


class Targets(NamedTuple):
    """What a batch aims at: one-hot classes (B, K), and the total variation by the root of how many values, 0-d."""

    labels: Tensor
    variation: Tensor


class PSAQViT(Inverter):
    """Images of one class each whose patches attend to each other in as many ways as can be."""

    needs: ClassVar[tuple[str, ...]] = ("attention",)
    config: Config

    def __init__(self, task: SynthesisTask, config: Config) -> None:
        super().__init__(task, config)
        self.layers = attention_layers(self.teacher)
        self.taps = {path: layer.tap for path, layer in self.layers.items()} if config.patch_entropy else {}

    def targets(self, first: int, count: int) -> Targets:
        """The classes take turns; the total variation is drawn for the batch."""
        low, high = self.config.variation
        return Targets(self.classes(first, count), low + (high - low) * torch.rand(()))

    def soft_labels(self, targets: Targets) -> Tensor:
        """The classes."""
        return targets.labels

    def terms(self, look: Look, targets: Targets) -> dict[str, Tensor]:
        """Those of DeepDream, the total variation as a distance from what is aimed at, and minus the entropy."""
        terms = super().terms(look, targets.labels)
        if "total_variation" in terms:
            aim = targets.variation * look.images.numel() ** 0.5
            terms["total_variation"] = (terms["total_variation"] - aim).abs()
        if look.features:
            with torch.autocast(self.device.type, enabled=False):
                values = [self.layers[path].patches(seen.float()) for path, seen in look.features.items()]
            terms["patch_entropy"] = -patch_entropy(values, self.config.bandwidth, self.config.points)
        return terms

    def reach(self, progress: float) -> int:
        """Half the jitter in the first half."""
        return self.config.jitter // 2 if progress < 0.5 else self.config.jitter

    def rate(self, step: int, steps: int) -> float:
        """Twice up and down."""
        half = -(-steps // 2)
        return super().rate(step, half) if step < half else super().rate(step - half, steps - half)


def patch_entropy(values: Sequence[Tensor], bandwidth: float, points: int) -> Tensor:
    """The differential entropy of the similarities of patches, mean over the images, summed over layers; 0-d, nats.

    Args:
        values: (B, N, D) of each layer, of N patches.
        bandwidth: Standard deviation of the kernel.
        points: Places where the density is estimated.
    """
    entropies = []
    for each in values:
        with torch.autocast(each.device.type, enabled=False):  # it would round them by half a bandwidth
            directions = F.normalize(each, dim=2)
            similarities = (directions @ directions.transpose(1, 2)).flatten(1)  # (B, N * N)
        low, high = similarities.detach().aminmax()
        places = torch.linspace(0, 1, points, device=each.device) * (high - low) + low
        distances = (places[:, None] - similarities[:, None]) / bandwidth  # (B, points, N * N)
        density = (-distances.square() / 2).exp().mean(2) / (bandwidth * math.sqrt(2 * math.pi)) + FLOOR
        entropies.append(torch.trapezoid(-density * density.log(), places, dim=1).mean())
    return torch.stack(entropies).sum()
