"""Synthesizers with a student in the loop: it is trained while images are made, and may shape them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from dfkd_cli.artifacts.shards import ShardWriter
from dfkd_cli.data.augment import pipeline
from dfkd_cli.data.sources import Batches, Images, Source
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.generators import Generator
from dfkd_cli.objectives.response import soft_loss
from dfkd_cli.rounds import weighted_sum
from dfkd_cli.seeds import derive, seed_torch
from dfkd_cli.settings import CoTraining, PoolTraining
from dfkd_cli.synthesizers.base import Synthesizer


class CoTrainer(Synthesizer):
    """Trains a student, which is written beside the shards. Its ``Config`` extends :class:`CoTraining`.

    Rounds depend on each other: the state is in the checkpoint, and one process does the work.

    Args:
        student: The network to train.
    """

    kind: ClassVar[str]
    stateless = False
    config: CoTraining

    def __init__(self, *arguments: Any, student: Classifier, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if self.processes > 1:
            raise ConfigError("a student in the loop is trained by one process", "give --devices 1 --num-nodes 1")
        self.student = student.to(memory_format=torch.channels_last)

    @property
    @abstractmethod
    def student_steps(self) -> int:
        """Steps of the student in all."""

    def models(self) -> Mapping[str, Classifier | Generator]:
        """The student."""
        return {"student": self.student}

    def configure_optimizers(self) -> Any:
        """The student's optimiser, whose learning rate falls along a cosine."""
        c, parameters = self.config, self.student.parameters()
        optimizer: torch.optim.Optimizer
        if c.student_optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, c.student_lr, momentum=0.9, weight_decay=c.student_weight_decay)
        else:
            optimizer = torch.optim.Adam(parameters, c.student_lr, weight_decay=c.student_weight_decay, fused=True)
        return [optimizer], [CosineAnnealingLR(optimizer, T_max=max(self.student_steps, 1))]

    def on_fit_start(self) -> None:
        """The augmentation of the student's images."""
        self.augment = pipeline(self.config, 0.0)

    def student_terms(self, pixels: Tensor) -> dict[str, Tensor]:
        """The unweighted terms of the student's loss on pixels (B, C, H, W): how far it is from the teacher."""
        with torch.no_grad():
            wanted = self.teacher(pixels).float()
        return {"soft": soft_loss(self.student(pixels).float(), wanted, "kl", self.config.student_temperature)}

    def teach(self, pixels: Tensor) -> dict[str, Tensor]:
        """One step of the student. Returns the unweighted terms of its loss."""
        terms = self.student_terms(self.augment(pixels))
        optimizer: Any = self.student_optimizer
        optimizer.zero_grad()
        self.manual_backward(weighted_sum(terms, self.config))
        optimizer.step()
        self.student_schedule.step()
        return {name: term.detach() for name, term in terms.items()}

    @property
    def student_optimizer(self) -> Any:
        """The first of the optimisers, as Lightning keeps it."""
        optimizers = self.optimizers()
        return optimizers[0] if isinstance(optimizers, list) else optimizers

    @property
    def student_schedule(self) -> Any:
        """The first of the schedules."""
        schedules = self.lr_schedulers()
        return schedules[0] if isinstance(schedules, list) else schedules


class PoolTrainer(CoTrainer):
    """Trains the student after each new shard, on the pool of all shards so far.

    Its ``Config`` extends :class:`PoolTraining`. Batches of the pool are drawn anew in each round, so that they depend
    on (seed, round) and what the pool holds.
    """

    kind: ClassVar[str]
    config: PoolTraining

    @property
    def student_steps(self) -> int:
        return self.rounds * self.config.student_steps

    def round(self, index: int) -> Mapping[str, Tensor]:
        """Make a shard against the student as it is, then train the student."""
        self.student.eval()
        made = super().round(index)
        self.student.train()
        steps = self.config.student_steps
        seed = derive("pool", self.seed, index)
        batches = Batches(_Pool(self.writer, index + 1), self.config.student_batch_size, seed, self.device)
        taught: list[dict[str, Tensor]] = []
        for step, images in enumerate(batches.steps(0, steps)):
            seed_torch(self.device, "student step", self.seed, index * steps + step)
            taught.append(self.teach(images.pixels))
        means = {name: torch.stack([terms[name] for terms in taught]).mean() for name in (taught[0] if taught else ())}
        return {**made, **means}


class _Pool(Source):
    """The shards that a run has made so far, without labels."""

    def __init__(self, writer: ShardWriter, count: int) -> None:
        self.writer, self.sizes = writer, [writer.rows[index]["count"] for index in range(count)]
        images = self.chunk(0).pixels
        self.shape, self.dtype = (images.shape[1], images.shape[2], images.shape[3]), images.dtype

    def chunk(self, index: int) -> Images:
        return Images(self.writer.read(index)["images"])
