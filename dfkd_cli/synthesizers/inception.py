"""Smooth images of one class each: the second scheme of The Knowledge Within.

Haroush, Hubara, Hoffer, Soudry. CVPR 2020. arXiv:1912.01274.

    x = argmin_x  CE(T(x) / tau, y) + a |x - G(x)|^2          G: Gaussian blur; x starts as N(0, 1)

Images are optimised as the teacher's ``net`` takes them. No code was released. Ours are: the prior's form (squared,
summed over the pixels of an image), the blur's width, the weights, learning rate and iterations. Classes take turns.
``temperature`` is ours too and 1 by default: the higher it is, the longer the class goes on to shape its images.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dfkd_cli.synthesis_options import SmoothInversion
from dfkd_cli.synthesizers.base import ImageOptimizer, Look
from dfkd_cli.synthesizers.terms import roughness, tempered_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Config(SmoothInversion):
    """Smooth images of one class each."""


class Inception(ImageOptimizer):
    """Images of one class each that are near to their blurred selves."""

    normalised = True
    config: SmoothInversion

    def terms(self, look: Look, targets: Tensor) -> dict[str, Tensor]:
        """The cross-entropy with the class, and the smoothness prior where it is on."""
        terms = {"cross_entropy": tempered_cross_entropy(look.logits, targets, self.config.temperature)}
        if self.config.smoothness:
            terms["smoothness"] = roughness(look.images, self.config.blur)
        return terms
