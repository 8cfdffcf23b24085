"""What every distillation objective is."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass
class Outputs:
    """What a network says about a batch.

    Attributes:
        logits: (B, K) float32.
    """

    logits: Tensor


class Objective(nn.Module):
    """A distillation loss: student and teacher outputs to named, unweighted, 0-d terms.

    A subclass says in ``needs`` what it asks for (``"labels"``), and has a ``Config`` in its file with a weight for
    every term, under the term's name. Trainable parts of its own belong to the module and are trained with the student.
    """

    kind: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> dict[str, Tensor]:
        """The loss terms. The teacher's outputs carry no gradient; ``labels`` (B,) are true ones, or None."""
