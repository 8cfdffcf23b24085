"""What regimes share in which nobody but the labels is right."""

from __future__ import annotations

from torch import Tensor

from dfkd_cli.data.sources import Images
from dfkd_cli.regimes.distillation import Distillation


class Labelled(Distillation):
    """A student that learns from labels, and from answers that no finished network gives."""

    needs = ("labels", "objective")
    measure = "accuracy"

    def expected(self, images: Images) -> Tensor:
        """The label."""
        return images.true_labels
