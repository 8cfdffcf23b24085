"""Generators that are trained for a few steps for each batch of images, which then joins the student's pool.

    min over the generator:  a CE(T(x), y) + b sum_l (|mean_l - mean_l(x)|_2 + |var_l - var_l(x)|_2) + c L_adv
    L_adv = -1/N sum_i KL(T(x_i) || S(x_i)) [argmax T(x_i) = argmax S(x_i)]        x: a random view of the images

CMI, Fast-DFKD and NAYER share this, and differ in where a batch starts and what it leaves to the next. The student is
in evaluation mode meanwhile. Of all inner steps, the images with the lowest loss are kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_cli.data.augment import pipeline
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.generators import Generators
from dfkd_cli.models.statistics import AveragedMoments
from dfkd_cli.options import Augmentation
from dfkd_cli.rounds.learner import weighted_sum
from dfkd_cli.seeds import derive
from dfkd_cli.synthesis_options import PooledGeneration
from dfkd_cli.synthesizers.base import Impressions, Look, SynthesisTask
from dfkd_cli.synthesizers.cotraining import PoolTrainer
from dfkd_cli.synthesizers.terms import statistics_distance


@dataclass
class BatchGeneration:
    """How one batch of images is made.

    Attributes:
        network: Makes the images (B, C, H, W) from the inputs, in pixel space.
        inputs: (B, ...).
        optimizers: Of all that is trained meanwhile.
    """

    network: nn.Module
    inputs: Tensor
    optimizers: Sequence[torch.optim.Optimizer]


@dataclass(frozen=True)
class Candidate:
    """The images that the generator made in one inner step; the step with the lowest loss gives the batch's images.

    Attributes:
        pixels: (B, C, H, W) in pixel space, without gradients.
        terms: Their named, unweighted loss terms, 0-d.
        look: What the teacher saw of a view of them.
        features: (B, D) what a method remembers of images that are kept, without gradients, or None.
    """

    pixels: Tensor
    terms: Mapping[str, Tensor]
    look: Look
    features: Tensor | None = None


class PooledGenerator(PoolTrainer):
    """Trains a generator anew, or on, for each batch of the pool. Its ``Config`` extends :class:`PooledGeneration`.

    A subclass says in :meth:`start` where a batch starts. Every batch is a full one, also the last, of which only the
    images that are still wanted are kept: BatchNorm and its statistics always see as many.
    """

    kind = "generator"
    needs = ("batchnorm", "student")
    scaled = False
    config: PooledGeneration

    def __init__(self, task: SynthesisTask, config: PooledGeneration) -> None:
        super().__init__(task, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("generator", self.seed))
            generator = Generators(self.teacher.info, config.latent, "sigmoid", config.width)
        self.generator = generator.to(memory_format=torch.channels_last)
        self.average = AveragedMoments(self.teacher, config.statistics_momentum)
        self.view = pipeline(Augmentation(crop=config.view_crop, flip=config.view_flip), 0.0)

    def models(self) -> Mapping[str, Classifier | Generators]:
        """The student and the generator."""
        return {**super().models(), "generator": self.generator}

    @abstractmethod
    def start(self, labels: Tensor) -> BatchGeneration:
        """Where a batch of these classes (B,) starts."""

    def labels(self, count: int) -> Tensor:
        """The classes of a batch (count,), uniform, on the CPU."""
        return torch.randint(self.teacher.info.num_classes, (count,))

    def latents(self, count: int) -> Tensor:
        """Normal latents (count, D) that can be trained. Drawn on the CPU: they do not depend on the device."""
        return torch.randn(count, self.config.latent).to(self.device).requires_grad_()

    def candidate(self, pixels: Tensor, labels: Tensor) -> Candidate:
        """Show pixels (B, C, H, W), made for classes (B,), to the teacher, and work out their loss terms."""
        with self.looking() as show:
            look = show(self.view(pixels))
        terms = {"cross_entropy": F.cross_entropy(look.logits, labels)}
        if look.moments:
            terms["statistics"] = statistics_distance(self.average.blend(look.moments), self.recorded)
        if self.config.adversarial and not self.warming_up:
            terms["adversarial"] = agreed_divergence(self.student(look.images).float(), look.logits)
        return Candidate(pixels.detach(), terms, look)

    def before_step(self, batch: BatchGeneration) -> None:
        """Called in each inner step when the gradients are there. Nothing by default."""

    def finish(self, batch: BatchGeneration, best: Candidate) -> None:
        """Called after the last inner step, with the images that are kept. Nothing by default."""

    def make(self, first: int, count: int) -> Impressions:
        """Run the inner steps on one batch."""
        labels = self.labels(self.config.batch_size).to(self.device)
        batch = self.start(labels)
        trained = [p for o in batch.optimizers for group in o.param_groups for p in group["params"]]
        candidate = best = None
        lowest = float("inf")
        for _ in range(self.config.iterations):
            candidate = self.candidate(batch.network(batch.inputs), labels)
            loss = weighted_sum(candidate.terms, self.config)
            if best is None or loss < lowest:
                lowest, best = loss.item(), candidate
            for optimizer in batch.optimizers:
                optimizer.zero_grad()
            torch.autograd.backward(loss, inputs=trained)  # not to the student's parameters
            self.before_step(batch)
            for optimizer in batch.optimizers:
                optimizer.step()
        assert candidate is not None and best is not None  # there is at least one step
        if candidate.look.moments:
            self.average.update(candidate.look.moments)  # those of the last step count
        self.finish(batch, best)
        targets = F.one_hot(labels[:count], self.teacher.info.num_classes)
        return Impressions(best.pixels[:count], targets, {name: term.detach() for name, term in best.terms.items()})


def agreed_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """``-KL(T || S)`` of logits (B, K) where both give the same class and 0 elsewhere, mean over the images; 0-d."""
    agree = teacher.argmax(1) == student.argmax(1)
    p, q = F.log_softmax(teacher, dim=1), F.log_softmax(student, dim=1)
    # In logs: of a probability that is zero in float32, xlogy would have no gradient.
    return -(F.kl_div(q, p, reduction="none", log_target=True).sum(1) * agree).mean()
