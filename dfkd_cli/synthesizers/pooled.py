"""Generators that are trained for a few steps for each batch of images, which then joins the student's pool.

    min over the generator:  a CE(T(x), y) + b sum_l (|mean_l - mean_l(x)|_2 + |var_l - var_l(x)|_2) + c L_adv
    L_adv = -1/N sum_i KL(T(x_i) || S(x_i)) [argmax T(x_i) = argmax S(x_i)]        x: a random view of the images

CMI, Fast-DFKD and NAYER share this, and differ in where a batch starts and what it leaves to the next. The student is
in evaluation mode meanwhile. Of all inner steps, the images with the lowest loss are kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_cli.data.augment import pipeline
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.generators import Generators
from dfkd_cli.models.statistics import AveragedMoments, Moments
from dfkd_cli.rounds import weighted_sum
from dfkd_cli.seeds import derive
from dfkd_cli.settings import Augmentation, PooledGeneration
from dfkd_cli.synthesizers.base import Impressions
from dfkd_cli.synthesizers.cotraining import PoolTrainer
from dfkd_cli.synthesizers.terms import statistics_distance


@dataclass
class Attempt:
    """How one batch of images is made.

    Attributes:
        network: Makes the images (B, C, H, W) from the inputs, in pixel space.
        inputs: (B, ...).
        optimizers: Of all that is trained meanwhile.
    """

    network: nn.Module
    inputs: Tensor
    optimizers: Sequence[torch.optim.Optimizer]


class PooledGenerator(PoolTrainer):
    """Trains a generator anew, or on, for each batch of the pool. Its ``Config`` extends :class:`PooledGeneration`.

    A subclass says in :meth:`start` where a batch starts. Every batch is a full one, also the last, of which only the
    images that are still wanted are kept: BatchNorm and its statistics always see as many.
    """

    kind = "generator"
    needs = ("batchnorm", "student")
    scaled = False
    config: PooledGeneration

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        c = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("generator", self.seed))
            generator = Generators(self.teacher.info, c.latent, "sigmoid", c.width)
        self.generator = generator.to(memory_format=torch.channels_last)
        self.average = AveragedMoments(self.teacher, c.statistics_momentum)
        self.view = pipeline(Augmentation(crop=c.view_crop, flip=c.view_flip), 0.0)

    def models(self) -> Mapping[str, Classifier | Generators]:
        """The student and the generator."""
        return {**super().models(), "generator": self.generator}

    @abstractmethod
    def start(self, labels: Tensor) -> Attempt:
        """Where a batch of these classes (B,) starts."""

    def labels(self, count: int) -> Tensor:
        """The classes of a batch (count,), uniform, on the CPU."""
        return torch.randint(self.teacher.info.num_classes, (count,))

    def latents(self, count: int) -> Tensor:
        """Normal latents (count, D) that can be trained. Drawn on the CPU: they do not depend on the device."""
        return torch.randn(count, self.config.latent).to(self.device).requires_grad_()

    def watching(self) -> AbstractContextManager[Mapping[str, Moments]]:
        """What is hooked while the teacher looks at a view: its BatchNorm layers."""
        return self.statistics()

    def terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Named, unweighted loss terms, 0-d, of images (B, C, H, W) for classes (B,)."""
        view = self.view(images)
        with self.watching() as self.seen:
            logits = self.teacher(view).float()
        terms = {"cross_entropy": F.cross_entropy(logits, labels)}
        if self.seen:
            blended = self.average.blend(self.seen)
            terms["statistics"] = statistics_distance(blended, self.recorded)
        if self.config.adversarial and not self.warming_up:
            terms["adversarial"] = agreed_divergence(self.student(view).float(), logits)
        return terms

    def before_step(self, attempt: Attempt) -> None:
        """Called in each inner step when the gradients are there. Nothing by default."""

    def improved(self) -> None:
        """Called when the images of an inner step are the best so far. Nothing by default."""

    def finish(self, attempt: Attempt) -> None:
        """Called after the last inner step, whose statistics count."""
        if self.seen:
            self.average.update(self.seen)

    def make(self, first: int, count: int) -> Impressions:
        """Run the inner steps on one batch."""
        labels = self.labels(self.config.batch_size).to(self.device)
        attempt = self.start(labels)
        trained = [p for o in attempt.optimizers for group in o.param_groups for p in group["params"]]
        best: Tensor | None = None
        terms: dict[str, Tensor] = {}
        lowest = float("inf")
        for _ in range(self.config.iterations):
            images = attempt.network(attempt.inputs)
            now = self.terms(images, labels)
            loss = weighted_sum(now, self.config)
            if best is None or loss < lowest:
                lowest, best, terms = loss.item(), images.detach(), now
                self.improved()
            for optimizer in attempt.optimizers:
                optimizer.zero_grad()
            torch.autograd.backward(loss, inputs=trained)  # not to the student's parameters
            self.before_step(attempt)
            for optimizer in attempt.optimizers:
                optimizer.step()
        self.finish(attempt)
        assert best is not None  # there is at least one step
        targets = F.one_hot(labels[:count], self.teacher.info.num_classes)
        return Impressions(best[:count], targets, {name: term.detach() for name, term in terms.items()})


def agreed_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """``-KL(T || S)`` of logits (B, K) where both give the same class and 0 elsewhere, mean over the images; 0-d."""
    agree = teacher.argmax(1) == student.argmax(1)
    p, q = F.log_softmax(teacher, dim=1), F.log_softmax(student, dim=1)
    # In logs: of a probability that is zero in float32, xlogy would have no gradient.
    return -(F.kl_div(q, p, reduction="none", log_target=True).sum(1) * agree).mean()
