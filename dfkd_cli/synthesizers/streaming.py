"""Synthesizers that train a generator and a student in turns on a stream of images, and store samples at the end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.generators import Generators
from dfkd_cli.models.quantized import quantisers
from dfkd_cli.models.registry import build
from dfkd_cli.objectives.base import Outputs
from dfkd_cli.rounds.learner import weighted_sum
from dfkd_cli.seeds import derive, seed_torch
from dfkd_cli.synthesis_options import AdversarialTraining, GeneratorTraining
from dfkd_cli.synthesizers.base import Impressions, Look, SynthesisTask
from dfkd_cli.synthesizers.cotraining import CoTrainer, means

ITERATIONS_PER_ROUND = 20  # iterations of one round


class StreamTrainer(CoTrainer):
    """Trains generators on the frozen teacher, and students on their images; the last rounds write the shards.

    Its ``Config`` extends :class:`GeneratorTraining`. All networks stay in training mode throughout, so that BatchNorm
    of a generator always takes the statistics of its batch, and a student's learns from the generator's steps too.

    Attributes:
        epsilon: Of the generator's BatchNorm layers.
    """

    kind = "generator"
    anytime = False
    config: GeneratorTraining
    epsilon: ClassVar[float] = 1e-5
    unit = "iterations"

    def __init__(self, task: SynthesisTask, config: GeneratorTraining) -> None:
        super().__init__(task, config)
        c, info = config, self.teacher.info
        if c.students > 1 and quantisers(self.student.net):
            what = f"--students {c.students}: all but {self.student.info.spec} would begin as other networks"
            raise ConfigError(what, "a copy of the teacher learns alone: give --students 1")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("generator", self.seed))
            generators = Generators(info, c.latent, c.end, c.width, self.epsilon, c.generators)
            rivals = [
                build(self.student.info.spec, info.num_classes, info.input_size, True) for _ in range(1, c.students)
            ]
        self.generators = generators.to(memory_format=torch.channels_last)
        self.rivals.extend(Classifier(net, self.student.info).lay_out() for net in rivals)
        self.student_taps *= c.students
        self.training_rounds = -(-c.steps // ITERATIONS_PER_ROUND)
        self.rounds = self.training_rounds + self.writer.count

    @property
    def student_steps(self) -> int:
        return self.config.steps * self.config.student_steps

    @property
    def of_a_step(self) -> int:
        return self.config.batch_size

    def done(self, rounds: int) -> int:
        return min(rounds * ITERATIONS_PER_ROUND, self.config.steps)  # writing shards is next to nothing

    def models(self) -> Mapping[str, Classifier | Generators]:
        """The first student and the generators."""
        return {**super().models(), "generator": self.generators}

    def trained(self) -> Sequence[tuple[Optimizer, LRScheduler | None]]:
        """The students and the generators."""
        (student, falling), c = super().trained()[0], self.config
        parameters = list(self.generators.parameters())
        generator = torch.optim.Adam(parameters, c.lr, betas=c.betas, fused=self.can_fuse(parameters))
        of_student = None if c.schedule == "constant" else falling
        of_generator = CosineAnnealingLR(generator, T_max=c.steps) if c.schedule == "cosine" else None
        return [(student, of_student), (generator, of_generator)]

    @abstractmethod
    def generator_terms(self, look: Look) -> dict[str, Tensor]:
        """Named, unweighted terms of the generators' loss, 0-d, on what the teacher sees of their images."""

    def latents(self) -> Tensor:
        """Normal noise (B, D), drawn on the CPU so that it does not depend on the device."""
        return torch.randn(self.config.batch_size, self.config.latent).to(self.device)

    def iteration(self) -> tuple[dict[str, Tensor], Tensor]:
        """One step of the generator, then the student's. Returns all unweighted terms, and the last images."""
        latents = self.latents()
        with self.looking() as show:
            look = show(self.generators(latents))
        terms = self.generator_terms(look)
        if terms:
            self.descend(1, weighted_sum(terms, self.config))
        pixels, inside = look.images.detach(), {name: look.features[name].detach() for name in self.teacher_taps}
        answers: Outputs | None = Outputs(look.logits.detach(), inside)
        for step in range(self.config.student_steps):
            if self.config.student_images == "new" or (self.config.student_images == "updated" and step == 0):
                with torch.no_grad():
                    pixels = self.generators(self.latents() if self.config.student_images == "new" else latents)
                answers = self.unchanged(pixels)
            taught = self.teach(pixels, answers)
        return {name: term.detach() for name, term in terms.items()} | taught, pixels

    def round(self, index: int) -> Mapping[str, Tensor]:
        """A stretch of iterations; when all are done, a shard."""
        self.generators.train()
        if index >= self.training_rounds:
            shard = index - self.training_rounds
            return {**super().round(shard), **self.shard_health(shard)}
        for student in self.students:
            student.train()
        rows = []
        for step in range(index * ITERATIONS_PER_ROUND, min((index + 1) * ITERATIONS_PER_ROUND, self.config.steps)):
            seed_torch(self.device, "generator step", self.seed, step)
            terms, pixels = self.iteration()
            rows.append(terms)
        return means(rows) | self.health(pixels, self.ask_teacher(pixels).logits)

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

    def generator_terms(self, look: Look) -> dict[str, Tensor]:
        """The students' mean distance, negative: the generator makes it large. Nothing where that has no weight."""
        if not self.config.adversarial:
            return {}
        distances = [self.distance(student(look.images).float(), look.logits) for student in self.students]
        return {"adversarial": -torch.stack(distances).mean()}

    def student_terms(self, student: Outputs, teacher: Outputs, images: Images) -> dict[str, Tensor]:
        """The distance: the student makes it small."""
        return {"soft": self.distance(student.logits, teacher.logits)}
