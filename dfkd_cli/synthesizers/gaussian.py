"""Gaussian noise, normalised like the training images: the first scheme of The Knowledge Within.

Haroush, Hubara, Hoffer, Soudry. CVPR 2020. arXiv:1912.01274.

    x = mean + std * n,    n ~ N(0, 1) in every pixel         mean, std: by channel, what the teacher normalises with

Nothing is optimised. The paper fine-tunes a quantised copy of the teacher on such images, whose BatchNorm statistics
have to stay as they are, since those of noise are others. A student that is trained from the start has none to keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dfkd_cli.synthesis_options import Shards
from dfkd_cli.synthesizers.base import Impressions, Synthesizer


@dataclass(frozen=True, kw_only=True)
class Config(Shards):
    """Gaussian noise."""

    @property
    def unbounded(self) -> str | None:
        return "give another --dtype"


class Gaussian(Synthesizer):
    """Normal noise."""

    kind = "noise"

    def make(self, first: int, count: int) -> Impressions:
        """Draw the images, on the CPU, so that every device gets the same ones."""
        noise = torch.randn(count, *self.teacher.info.input_size).to(self.device)
        return Impressions(self.teacher.denormalise(noise), None, {})
