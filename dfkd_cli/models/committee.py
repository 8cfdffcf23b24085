"""Several classifiers that answer as one: a student of all of them is what one-shot federated learning's server makes.

probabilities: p = mean_m softmax(z_m)        the logits given are log p
logits:        z = mean_m z_m
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dfkd_cli.errors import ArtifactError
from dfkd_cli.models.classifier import Classifier, ModelInfo


class Committee(nn.Module):
    """Pixels in [0, 1], float (B, C, H, W), to logits (B, K) in the order of the first member's classes.

    Args:
        members: Each normalises pixels by itself.
        combine: What is averaged.

    Raises:
        ArtifactError: They take other images, or know other classes.
    """

    orders: Tensor  # (M, K): where each member has the classes of the first

    def __init__(self, members: Sequence[Classifier], combine: Literal["probabilities", "logits"]) -> None:
        super().__init__()
        self.members, self.combine = nn.ModuleList(members), combine
        self.register_buffer("orders", torch.stack([_order(members[0].info, each.info) for each in members]))

    def forward(self, pixels: Tensor) -> Tensor:
        """The members' mean."""
        answers = [member(pixels).float()[:, order] for member, order in zip(self.members, self.orders, strict=True)]
        if self.combine == "logits":
            return torch.stack(answers).mean(0)
        return torch.stack([each.log_softmax(1) for each in answers]).logsumexp(0) - math.log(len(answers))


def committee(members: Sequence[Classifier], combine: Literal["probabilities", "logits"]) -> Classifier:
    """The members as one classifier, which is described like the first one."""
    spec = " + ".join(member.info.spec for member in members)
    one = Classifier(Committee(members, combine), members[0].info.of_pixels(spec))
    one.opaque = any(member.opaque for member in members)
    return one


def _order(first: ModelInfo, other: ModelInfo) -> Tensor:
    """Where a model has the classes of the first one: by their names, or by position where one has none."""
    if (first.input_size, first.num_classes) != (other.input_size, other.num_classes):
        takes = [f"{info.num_classes} classes of images of {info.input_size}" for info in (first, other)]
        raise ArtifactError(f"teachers cannot answer together: {first.spec} knows {takes[0]}, {other.spec} {takes[1]}")
    names, theirs = first.classes or (), other.classes or ()
    if not names or not theirs or names == theirs:
        return torch.arange(first.num_classes)
    if {*names} != {*theirs}:
        strange = ", ".join(sorted({*theirs} - {*names}))
        raise ArtifactError(f"teachers cannot answer together: {first.spec} does not know {strange}")
    return torch.tensor([theirs.index(name) for name in names])
