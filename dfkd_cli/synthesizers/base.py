"""What every synthesizer is, and the loop that all methods share which optimise images through a frozen teacher."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from dfkd_cli.artifacts.shards import ShardWriter
from dfkd_cli.errors import RunFailed
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.generators import Generators
from dfkd_cli.models.statistics import Moments, batch_moments, recorded_moments
from dfkd_cli.rounds.learner import Learner, weighted_sum
from dfkd_cli.seeds import seed_torch


@dataclass
class Impressions:
    """One shard's worth of data impressions.

    Attributes:
        pixels: (B, C, H, W) float32 in pixel space; impressions may leave [0,1].
        targets: (B, K) soft labels they were made for, or None.
        terms: The loss terms they ended with, named and unweighted.
    """

    pixels: Tensor
    targets: Tensor | None
    terms: Mapping[str, Tensor]


class Synthesizer(Learner):
    """Turns a frozen teacher into data impressions; round ``i`` makes shard ``i`` and depends only on (seed, i).

    A subclass says in ``kind`` how it works and in ``needs`` what it asks for, has a ``Config`` in its file (with
    ``batch_size``, the images of a shard, and ``dtype``, how they are stored), and makes a shard in :meth:`make`.

    Args:
        teacher: The classifier; it is frozen until the rounds are done.
        config: The method's own configuration.
        num_images: Images to make in all.
        seed: The run's seed.
        writer: Where finished shards go; the rounds are the shards that it misses, or all where state passes between.
        processes: Processes that share the rounds.
    """

    kind: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    stateless = True
    unit = "images"

    def __init__(
        self, teacher: Classifier, config: Any, num_images: int, seed: int, writer: ShardWriter, processes: int = 1
    ) -> None:
        super().__init__()
        self.teacher = teacher.freeze().lay_out()
        self.config, self.num_images, self.seed = config, num_images, seed
        self.writer, self.processes = writer, processes
        self.todo = writer.missing() if self.stateless else list(range(writer.count))
        self.rounds = -(-len(self.todo) // processes)

    def done(self, rounds: int) -> int:
        return sum(self._count(shard) for shard in self.todo[: rounds * self.processes])

    @abstractmethod
    def make(self, first: int, count: int) -> Impressions:
        """Make images ``first`` to ``first + count`` of the set. Torch's random state is already seeded for them."""

    @functools.cached_property
    def recorded(self) -> dict[str, Moments]:
        """What the teacher's BatchNorm layers remember; first asked for in a round, when it is on its device."""
        return recorded_moments(self.teacher)

    def statistics(self, correction: int = 0) -> AbstractContextManager[Mapping[str, Moments]]:
        """What goes into the teacher's BatchNorm layers inside the ``with`` block; nothing where it has no weight.

        Args:
            correction: 1 for unbiased variances.
        """
        return batch_moments(self.teacher, correction) if self.config.statistics else nullcontext({})

    def models(self) -> Mapping[str, Classifier | Generators]:
        """Networks that were trained meanwhile, each to be written under its name. None by default."""
        return {}

    def round(self, index: int) -> Mapping[str, Tensor]:
        """Make one missing shard and write it."""
        position = index * self.processes + self.global_rank
        if position >= len(self.todo):
            return {}
        shard = self.todo[position]
        seed_torch(self.device, "shard", self.seed, shard)
        made = self.make(shard * self.config.batch_size, self._count(shard))
        self.check_finite(made.terms, shard)
        self._store(shard, made)
        return made.terms

    def _count(self, shard: int) -> int:
        """The images of a shard."""
        return min(self.config.batch_size, self.num_images - shard * self.config.batch_size)

    @torch.no_grad()
    def _store(self, shard: int, made: Impressions) -> None:
        stored = made.pixels.to(getattr(torch, self.config.dtype))
        if not stored.isfinite().all():
            raise RunFailed(f"shard {shard}: pixels are not finite as {self.config.dtype}", "lower --lr")
        with torch.autocast(self.device.type, enabled=False):  # whatever --precision is, answers are exact
            tensors = {"images": stored, "logits": self.teacher(stored.float())}
        if made.targets is not None:
            tensors["targets"] = made.targets.float()
        terms = {name: float(value) for name, value in made.terms.items()}
        self.writer.write(shard, tensors, terms, manifest=self.global_rank == 0)


class ImageOptimizer(Synthesizer):
    """Optimises each batch of images by Adam through the teacher, from noise, towards targets.

    A subclass gives the targets and the loss terms. Terms are weighted by the configuration keys of their names; a
    term whose weight is zero need not be computed. Everything else has a place of its own to be changed: where images
    start, how the teacher sees them, at which resolutions, the optimiser, what is watched meanwhile.

    Attributes:
        normalised: Images are optimised as the teacher's ``net`` takes them, not in pixel space. Learning rate and
            image terms are in these units.
    """

    kind = "images"
    scaled = False
    normalised: ClassVar[bool] = False

    @abstractmethod
    def targets(self, first: int, count: int) -> Tensor:
        """What images ``first`` to ``first + count`` aim at, (count, K) float32, on the CPU."""

    @abstractmethod
    def terms(self, images: Tensor, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Named, unweighted loss terms, 0-d, for images (B, C, H, W) as the teacher saw them, and logits (B, K)."""

    def start(self, count: int) -> Tensor:
        """Where the optimisation starts, (count, C, H, W), on the CPU: normal noise for ``net``, or uniform pixels."""
        size = (count, *self.teacher.info.input_size)
        return torch.randn(size) if self.normalised else torch.rand(size)

    def classes(self, first: int, count: int) -> Tensor:
        """One-hot labels (count, K): image ``n`` is of class ``n mod K``."""
        num_classes = self.teacher.info.num_classes
        return F.one_hot(torch.arange(first, first + count) % num_classes, num_classes).float()

    def view(self, images: Tensor) -> Tensor:
        """What the teacher sees of images, drawn anew in each iteration. The images themselves by default."""
        return images

    def resolutions(self) -> Sequence[tuple[int, int]]:
        """Stages from coarse to fine: by what the sides are divided, and for how many iterations."""
        return [(1, self.config.iterations)]

    def optimizer(self, images: Tensor) -> torch.optim.Optimizer:
        """A stage's optimiser of the images."""
        return torch.optim.Adam([images], lr=self.config.lr, fused=True)

    def rate(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by in a step of a stage, counted from 0."""
        return 1.0

    def watching(self) -> AbstractContextManager[Any]:
        """What is hooked while a batch is optimised, for the terms to find in ``seen``. Nothing by default."""
        return nullcontext()

    def project(self, images: Tensor) -> None:
        """Bring images back into their range, in place, after each iteration: [0,1] where that is wanted."""
        if self.config.clamp:
            black = torch.zeros_like(self.teacher.mean)
            low, high = (self.teacher.normalise(black + end) if self.normalised else black + end for end in (0, 1))
            images.clamp_(low, high)

    def make(self, first: int, count: int) -> Impressions:
        """Run the inner iterations on one batch. Images and optimiser are new in every round."""
        # Drawn on the CPU, so that targets and starting images do not depend on the device.
        targets = self.targets(first, count).to(self.device)
        images = self.start(count).to(self.device).requires_grad_()
        terms: Mapping[str, Tensor] = {}
        with self.watching() as self.seen:
            for divisor, iterations in self.resolutions():
                terms = self._optimize(images, targets, divisor, iterations)
        images = images.detach()
        pixels = self.teacher.denormalise(images) if self.normalised else images
        return Impressions(pixels, targets, {name: term.detach() for name, term in terms.items()})

    def _optimize(self, images: Tensor, targets: Tensor, divisor: int, iterations: int) -> Mapping[str, Tensor]:
        """One stage, in place. Returns its last terms."""
        answer = self.teacher.net if self.normalised else self.teacher
        optimizer = self.optimizer(images)
        schedule = LambdaLR(optimizer, lambda step: self.rate(step, iterations))
        terms: dict[str, Tensor] = {}
        for _ in range(iterations):
            view = self.view(F.avg_pool2d(images, divisor) if divisor > 1 else images)
            terms = self.terms(view, answer(view).float(), targets)
            # The teacher's parameters need no gradient: backward goes to the images only.
            (gradient,) = torch.autograd.grad(weighted_sum(terms, self.config), images)
            images.grad = gradient.contiguous()  # it may be channels last, where fused Adam would take wrong pixels
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                self.project(images)
        return terms
