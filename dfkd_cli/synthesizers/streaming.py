"""Synthesizers that train a generator and a student in turns on a stream of images, and store samples at the end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from dfkd_cli.data.sources import Images
from dfkd_cli.models.activations import Tap
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.generators import Generators
from dfkd_cli.models.registry import build
from dfkd_cli.objectives.base import Outputs, ask
from dfkd_cli.rounds import weighted_sum
from dfkd_cli.seeds import derive, seed_torch
from dfkd_cli.settings import AdversarialTraining, GeneratorTraining
from dfkd_cli.synthesizers.base import Impressions
from dfkd_cli.synthesizers.cotraining import CoTrainer, means

ROUND = 20  # iterations of one round


class StreamTrainer(CoTrainer):
    """Trains generators on the frozen teacher, and students on their images; the last rounds write the shards.

    Its ``Config`` extends :class:`GeneratorTraining`. All networks stay in training mode throughout, so that BatchNorm
    of a generator always takes the statistics of its batch, and a student's learns from the generator's steps too.

    Attributes:
        epsilon: Of the generator's BatchNorm layers.
        generator_taps: Where :meth:`generator_terms` wants the teacher's features.
    """

    kind = "generator"
    config: GeneratorTraining
    epsilon: ClassVar[float] = 1e-5
    unit = "iterations"
    generator_taps: Mapping[str, Tap] = {}

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        c, info = self.config, self.teacher.info
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("generator", self.seed))
            generators = Generators(info, c.latent, c.end, c.width, self.epsilon, c.generators)
            rivals = [
                build(self.student.info.spec, info.num_classes, info.input_size, True) for _ in range(1, c.students)
            ]
        self.generators = generators.to(memory_format=torch.channels_last)
        self.rivals.extend(Classifier(net, self.student.info).lay_out() for net in rivals)
        self.student_taps *= c.students
        self.training_rounds = -(-self.config.steps // ROUND)
        self.rounds = self.training_rounds + self.writer.count

    @property
    def student_steps(self) -> int:
        return self.config.steps * self.config.student_steps

    def done(self, rounds: int) -> int:
        return min(rounds * ROUND, self.config.steps)  # writing shards is next to nothing

    def models(self) -> Mapping[str, Classifier | Generators]:
        """The first student and the generators."""
        return {**super().models(), "generator": self.generators}

    def trained(self) -> Sequence[tuple[Optimizer, LRScheduler | None]]:
        """The students and the generators."""
        (student, falling), c = super().trained()[0], self.config
        generator = torch.optim.Adam(self.generators.parameters(), c.lr, betas=c.betas, fused=self.can_fuse)
        of_student = None if c.schedule == "constant" else falling
        of_generator = CosineAnnealingLR(generator, T_max=c.steps) if c.schedule == "cosine" else None
        return [(student, of_student), (generator, of_generator)]

    @abstractmethod
    def generator_terms(self, pixels: Tensor, teacher: Outputs) -> dict[str, Tensor]:
        """Named, unweighted terms of the generator's loss, 0-d, on its pixels (B, C, H, W), with gradients.

        The teacher's outputs carry the gradient to the pixels.
        """

    def watching(self) -> AbstractContextManager[Any]:
        """What is hooked while the teacher looks at the generators' images, kept in ``seen``. Nothing by default."""
        return nullcontext()

    def latents(self) -> Tensor:
        """Normal noise (B, D), drawn on the CPU so that it does not depend on the device."""
        return torch.randn(self.config.batch_size, self.config.latent).to(self.device)

    def can_continue(self, index: int) -> bool:
        return self.writer.rows.keys() >= set(range(index - self.training_rounds))

    def iteration(self) -> dict[str, Tensor]:
        """One step of the generator, then the student's. Returns all unweighted terms."""
        latents = self.latents()
        pixels = self.generators(latents)
        with self.watching() as self.seen:
            teacher = ask(self.teacher, pixels, {**self.teacher_taps, **self.generator_taps})
        terms = self.generator_terms(pixels, teacher)
        if terms:
            self.descend(1, weighted_sum(terms, self.config))
        known: Outputs | None
        pixels, known = pixels.detach(), detached(teacher)
        for step in range(self.config.student_steps):
            if self.config.student_images == "new" or (self.config.student_images == "updated" and step == 0):
                with torch.no_grad():
                    pixels = self.generators(self.latents() if self.config.student_images == "new" else latents)
                known = self.unchanged(pixels)
            taught = self.teach(pixels, known)
        self.last = pixels
        return {name: term.detach() for name, term in terms.items()} | taught

    def round(self, index: int) -> Mapping[str, Tensor]:
        """A stretch of iterations; when all are done, a shard."""
        self.generators.train()
        if index >= self.training_rounds:
            shard = index - self.training_rounds
            return {**super().round(shard), **self.shard_health(shard)}
        for student in self.students:
            student.train()
        rows = []
        for step in range(index * ROUND, min((index + 1) * ROUND, self.config.steps)):
            seed_torch(self.device, "generator step", self.seed, step)
            rows.append(self.iteration())
        return means(rows) | self.health(self.last, self.ask_teacher(self.last).logits)

    @torch.no_grad()
    def make(self, first: int, count: int) -> Impressions:
        """Samples of the finished generator; always a whole batch, whose statistics its BatchNorm takes."""
        return Impressions(self.generators.sample(self.latents(), count), None, {})


class Adversary(StreamTrainer):
    """Generators that look for images on which the students differ from the teacher.

    The method says in :meth:`distance` by what; its ``Config`` has the weight ``adversarial``.
    """

    config: AdversarialTraining

    @abstractmethod
    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """How far the students' logits (B, K) are from the teacher's, 0-d."""

    def generator_terms(self, pixels: Tensor, teacher: Outputs) -> dict[str, Tensor]:
        """The students' mean distance, negative: the generator makes it large. Nothing where that has no weight."""
        if not self.config.adversarial:
            return {}
        distances = [self.distance(student(pixels).float(), teacher.logits) for student in self.students]
        return {"adversarial": -torch.stack(distances).mean()}

    def student_terms(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """The distance: the student makes it small."""
        return {"soft": self.distance(student.logits, teacher.logits)}


def detached(outputs: Outputs) -> Outputs:
    """The outputs without gradients."""
    features = {name: value.detach() for name, value in outputs.features.items()}
    return replace(outputs, logits=outputs.logits.detach(), features=features)
