"""Squeeze, Recover and Relabel: few images of each class, recovered from a teacher through random crops.

Yin, Xing, Shen. Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective.
NeurIPS 2023. arXiv:2306.13092. With ``curriculum``: Yin, Shen. Dataset Distillation via Curriculum Data Synthesis in
Large Data Era (CDA). TMLR 2024. arXiv:2311.18838.

    x = argmin_x  CE(T(a(x)), y) + a_f sum_l w_l (|mean_l(a(x)) - mean_l|_2 + |var_l(a(x)) - var_l|_2)

``a`` cuts one window out of all images of a batch, enlarges it to their size, then rolls and mirrors them. mean_l(a(x))
and var_l(a(x)), biased, are the batch's at the input of BatchNorm layer l; w_l is 1 but for the first layer. The window
has a share of the area that is uniform between a least one and 1. With a curriculum over the share m of the iterations,
the least area falls from 1, whole images, to ``crop``, c, in iteration t of T:

    cosine:  c + (1 - c) (1 + cos(pi t / (m T))) / 2        linear:  1 - (1 - c) t / (m T)        step:  1
    and c from iteration m T on

That is the recovery, for which the teacher is squeezed already: defaults are the paper's for ImageNet. To relabel and
train on what it leaves is to distil with ``--resized-crop 0.08 --cutmix 1``: the teacher is asked about every crop.

Differences from the released code:

- Images are mirrored one by one with probability 1/2 instead of the whole batch.
- Images are rolled by up to ``jitter`` pixels either way, as in its Tiny-ImageNet script; for ImageNet it rolls by 0 to
  32 pixels one way, for CIFAR by 0 to 4.
- The smoothness priors, which its scripts switch off and CDA's left out, are there with weight 0.
- Its images are JPEG files; ours are stored as numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torchvision.transforms import v2

from dfkd_cli.config import option
from dfkd_cli.synthesis_options import StatisticsInversion
from dfkd_cli.synthesizers.deepinversion import DeepInversion


@dataclass(frozen=True, kw_only=True)
class Config(StatisticsInversion):
    """SRe2L, and CDA."""

    batch_size: int = 100
    iterations: int = 4000
    lr: float = 0.25
    betas: tuple[float, float] = (0.5, 0.9)
    schedule: Literal["constant", "cosine"] = "cosine"
    clamp: bool = True
    jitter: int = 16
    view_flip: bool = True
    total_variation: float = 0.0
    statistics: float = 0.01
    first_layer: float = 10.0
    crop: float = option(0.08, "least share of the area in the window that the teacher sees; 1: all", above=0, high=1)
    curriculum: float = option(
        0.0, "share of the inner steps over which that least area falls from 1; CDA's is 1", low=0, high=1
    )
    curriculum_form: Literal["cosine", "linear", "step"] = option("cosine", "how it falls")


class SRe2L(DeepInversion):
    """Images of one class each that look to BatchNorm like the training data, whatever part of them it sees."""

    correction = 0
    config: Config

    def view(self, images: Tensor, progress: float) -> Tensor:
        """One random window of all images, enlarged to their size; then they are rolled and mirrored at random."""
        c, size = self.config, list(images.shape[-2:])
        shape = size[1] / size[0]  # windows are as wide for their height as the images, give or take a third
        least = least_area(progress, c.crop, c.curriculum, c.curriculum_form)
        if least < 1:
            images = v2.RandomResizedCrop(size, (least, 1), (shape * (3 / 4), shape * (4 / 3)))(images)
        return super().view(images, progress)


def least_area(progress: float, crop: float, curriculum: float, form: str) -> float:
    """The least area of a window, as a share of the image's.

    Args:
        progress: The share of the iterations that is done.
        crop: The least area where there is no curriculum, and after it.
        curriculum: The share of the iterations that it takes.
        form: How the area falls: ``cosine``, ``linear`` or ``step``.
    """
    if progress >= curriculum:
        return crop
    passed = progress / curriculum
    left = {"cosine": (1 + math.cos(math.pi * passed)) / 2, "linear": 1 - passed, "step": 1.0}[form]
    return crop + (1 - crop) * left
