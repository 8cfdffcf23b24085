"""What every distillation objective is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.activations import Tap, values_at
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.graphs import logits_of
from dfkd_cli.models.taps import Taps
from dfkd_cli.options import Preceding, Rising


@dataclass
class Outputs:
    """What a network answers for a batch of images.

    Attributes:
        logits: (B, K) float32.
        features: Inner activations, (B, ...) float32 each, by the names of the taps that objectives ask for.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def everywhere(self) -> Outputs:
        """What the networks of all processes answer for their shares of a batch."""
        return Outputs(everywhere(self.logits), {name: everywhere(value) for name, value in self.features.items()})


def everywhere(rows: Tensor) -> Tensor:
    """The rows of all processes, which need not have equally many.

    Only a process's own rows have a gradient. It is multiplied by the number of processes, whose mean is learned from:
    so all learn from the sum of what their rows contribute.
    """
    if not torch.distributed.is_initialized():
        return rows
    own = rows.detach()
    if rows.requires_grad:
        own = own + torch.distributed.get_world_size() * (rows - own)
    return torch.cat(gather_all_tensors(own))


def ask(classifier: Classifier, pixels: Tensor, taps: Mapping[str, Tap]) -> Outputs:
    """Run a network on pixels (B, C, H, W); returns its logits, and its features at the taps."""
    if not taps:
        return Outputs(logits_of(classifier, pixels).float())
    with values_at(taps) as features:
        logits = classifier(pixels).float()
    return Outputs(logits, {name: value.float() for name, value in features.items()})


class Objective(nn.Module):
    """A distillation loss: student and teacher outputs to named, unweighted, 0-d terms.

    A subclass says in ``needs`` what images must have (``"labels"``, ``"logits"``, ``"targets"``), or the teacher
    (``"batchnorm"``). Its file has a ``Config`` with a weight for each term, under the term's name. Parameters of the
    objective itself, such as a projection of features, are trained together with the student.

    Attributes:
        terms: The names of all terms. :meth:`forward` may leave out a term whose weight is 0.
        optional: The terms that some batches do not have.
        relational: Whether images of a batch are compared with each other. Where processes share a batch, such an
            objective gets all of it: its terms are those that one process would have.
        shrinking: Whether terms fall as ``1 / B`` with the images that are compared. Where a batch goes in parts, those
            of a part are divided by the number of parts: they pull as those of the batch would.
        remembers: Whether something is kept of each image, by its position, which mixed images have not.
        default_weight: The weight of the whole objective where the user gives none: its paper's.
        teacher_mode: ``train`` where the teacher's BatchNorm has to use the statistics of the batch.
        pairs: The taps that are compared, each as the student's name and the teacher's.
        epoch: Finished passes over the images. The regime sets it before each step.
        progress: Finished share of the training, from 0 to 1. The regime sets it before each step.
    """

    kind: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    terms: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    relational: ClassVar[bool] = False
    shrinking: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    default_weight: ClassVar[float] = 1.0
    teacher_mode: Literal["eval", "train"] = "eval"
    pairs: tuple[tuple[str, str], ...] = ()
    epoch: int = 0
    progress: float = 0.0

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def connect(self, student: Classifier, teacher: Classifier) -> None:
        """Choose taps and make what depends on the two networks. Called once, before training; nothing by default.

        Raises:
            DfkdError: The objective does not work between these networks.
        """

    def expect(self, count: int) -> None:
        """Make what depends on how many images there are. Called once, before training; nothing by default.

        Args:
            count: Number of images that training draws from; ``Images.positions`` of a batch are below it.
        """

    def observe(self, teacher: Iterable[Outputs]) -> None:
        """Make what depends on what the teacher says about the images. Called once, before the first step.

        What is made is to be a buffer: a continued run takes it from its checkpoint. Nothing by default.

        Args:
            teacher: Its outputs in :attr:`teacher_mode`, batch after batch, for all images that training draws from, as
                they are. They are computed as they are asked for, without gradients.
        """

    def after_step(self) -> None:
        """What else happens after each step of the student. Nothing by default."""

    def strength(self, term: str) -> float:
        """The factor, at this time of the training, by which the weight of a term is multiplied.

        For an objective with a :attr:`phase` it is 1 in the phase and 0 afterwards. One that rises starts low and
        reaches 1 after ``ramp`` epochs. For all others it is 1 throughout.
        """
        if self.phase:
            return float(self.alone)
        return min((self.epoch + 1) / self.config.ramp, 1.0) if isinstance(self.config, Rising) else 1.0

    @property
    def phase(self) -> int:
        """The number of epochs, at the start of the training, in which this objective alone is learned.

        Objectives without such a phase wait until it is over; then this one is switched off. 0 stands for no phase:
        the objective is learned beside the others throughout.
        """
        return self.config.pretraining if isinstance(self.config, Preceding) else 0

    @property
    def of_answers(self) -> bool:
        """Whether it is about the student's answers: without any that is, the student's head learns nothing."""
        return True

    @property
    def alone(self) -> bool:
        """Whether training is in this objective's phase now, in which objectives without one do not count."""
        return self.epoch < self.phase

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """The loss terms.

        Args:
            student: What the student says about the images.
            teacher: What the teacher says, without gradients.
            images: The augmented images that both were shown, with labels or stored answers where they have any.
        """


class FeatureObjective(Objective):
    """An objective on pairs of features. Its ``Config`` extends :class:`dfkd_cli.options.Compared`."""

    def connect(self, student: Classifier, teacher: Classifier) -> None:
        """Pair the taps of both networks, and prepare for the shapes of each pair."""
        students, teachers = Taps(student), Taps(teacher)
        wanted = self.config.taps, self.config.teacher_taps or self.config.taps
        names = students.names(wanted[0]), teachers.names(wanted[1])
        if len(names[0]) != len(names[1]):
            raise ConfigError(
                f"cannot pair {', '.join(names[0])} of the student with {', '.join(names[1])} of the teacher",
                "give as many --taps of the student as --teacher-taps",
            )
        self.pairs = tuple(zip(*names, strict=True))
        for tap, teacher_tap in self.pairs:
            self.prepare(students.shape(tap), teachers.shape(teacher_tap))

    @property
    def of_answers(self) -> bool:
        return any(tap == "logits" for tap, _ in self.pairs)

    def prepare(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        """Make what depends on the shapes of the next pair, each (C, H, W) or (D,). Nothing by default."""

    def features(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """The features of each pair, the student's and the teacher's."""
        return [(student.features[tap], teacher.features[teacher_tap]) for tap, teacher_tap in self.pairs]


class PairwiseObjective(FeatureObjective):
    """An objective on pairs of features that do not depend on each other: its terms are those of each pair, summed."""

    def forward(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        terms = [self.compare(index, *pair) for index, pair in enumerate(self.features(student, teacher))]
        return {name: torch.stack([pair[name] for pair in terms]).sum(0) for name in terms[0]}

    @abstractmethod
    def compare(self, index: int, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """The terms, 0-d, of pair ``index``, whose features are (B, ...)."""
