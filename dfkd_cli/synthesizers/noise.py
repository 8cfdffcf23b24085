"""Noise images: the baseline that every method must beat.

Uniform in [0,1], independent in every pixel. Nothing is optimised; the teacher's answers are recorded all the same.
The transfer set ``noise:N`` is the same images, made on the fly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dfkd_cli.synthesis_options import Shards
from dfkd_cli.synthesizers.base import Impressions, Synthesizer


@dataclass(frozen=True, kw_only=True)
class Config(Shards):
    """Noise."""


class Noise(Synthesizer):
    """Uniform noise."""

    kind = "noise"

    def make(self, first: int, count: int) -> Impressions:
        """Draw the images on the CPU, so that every device gets the same."""
        return Impressions(torch.rand(count, *self.teacher.info.input_size).to(self.device), None, {})
