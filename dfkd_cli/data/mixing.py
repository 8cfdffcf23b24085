"""Images of a batch mixed with each other: CutMix and MixUp as torchvision has them, on batches with what is known."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torchvision.transforms import v2

from dfkd_cli.data.sources import Images


class Mixing:
    """Mixes each image of a batch with the one before it; batches are shuffled.

    Yun, Han, Oh, Chun, Choe, Yoo. CutMix. ICCV 2019. arXiv:1905.04899: a window of each image is the other's; its share
    of the area is 1 - lambda, less what lies outside. Zhang, Cisse, Dauphin, Lopez-Paz. mixup. ICLR 2018.
    arXiv:1710.09412: ``lambda x_i + (1 - lambda) x_j``. Lambda, and the window, are of the whole batch.

    Args:
        cutmix: a of lambda's Beta(a, a), 0 for no CutMix.
        mixup: The same for MixUp. With both, each batch is mixed in one of the two ways, with equal odds.
        num_classes: Classes of the labels.
    """

    def __init__(self, cutmix: float, mixup: float, num_classes: int) -> None:
        ways: dict[type[nn.Module], float] = {v2.CutMix: cutmix, v2.MixUp: mixup}
        self.ways = [way(alpha=alpha, num_classes=num_classes) for way, alpha in ways.items() if alpha]

    def __call__(self, images: Images) -> Images:
        """Mixed images, with the share of each class where they have labels; answers stored for what they were go.

        The random state of the CPU decides.
        """
        if not self.ways:
            return images
        way = self.ways[int(torch.randint(len(self.ways), ()))]
        if images.labels is None:  # it wants some
            pixels, _ = way(images.pixels, images.pixels.new_zeros(len(images.pixels), dtype=torch.int64))
            return images.changed(pixels)
        pixels, shares = way(images.pixels, images.labels)
        return replace(images.changed(pixels), labels=shares.argmax(1), shares=shares)
