"""Class Impressions: images that the teacher is sure of, one class each.

Mopuri, Uppala, Babu. Ask, Acquire and Attack: Data-free UAP generation using class impressions. ECCV 2018.
arXiv:1808.01153. The baseline of the ZSKD paper (arXiv:1905.08114).

    x = argmin_x  - log softmax(T(x))_k          k: the class of the image

As the ZSKD paper compares them: its data impressions with one-hot targets and no temperature. The random augmentation
between iterations that the original mentions is off by default, since its parameters are not published: ``jitter``,
``view_flip`` and ``soften`` have it, and ``coarse_iterations`` begins with small images.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.synthesis_options import CoarseToFine
from dfkd_cli.synthesizers.base import ImageOptimizer, Look
from dfkd_cli.synthesizers.terms import tempered_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Config(CoarseToFine):
    """Class impressions."""

    temperature: float = option(1.0, "softmax temperature of the teacher", above=0)
    cross_entropy: float = option(1.0, "weight of the cross-entropy", low=0)


class ClassImpressions(ImageOptimizer):
    """Images of one class each."""

    config: Config

    def terms(self, look: Look, targets: Tensor) -> dict[str, Tensor]:
        """The cross-entropy with the class."""
        return {"cross_entropy": tempered_cross_entropy(look.logits, targets, self.config.temperature)}
