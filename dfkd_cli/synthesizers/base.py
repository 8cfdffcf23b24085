"""What every synthesizer is, and the loop that all methods share which optimise images through a frozen teacher."""

from __future__ import annotations

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision.transforms import v2

from dfkd_cli.artifacts.metadata import Metadata
from dfkd_cli.artifacts.shards import ShardWriter, as_pixels, as_stored
from dfkd_cli.data.augment import RandomFlip, RandomRoll
from dfkd_cli.models.activations import Tap, values_at
from dfkd_cli.models.classifier import Classifier, probe
from dfkd_cli.models.generators import Generators
from dfkd_cli.models.moments import Moments
from dfkd_cli.models.statistics import batch_moments, recorded_moments
from dfkd_cli.rounds.learner import Learner, weighted_sum
from dfkd_cli.seeds import seed_torch
from dfkd_cli.synthesizers.terms import blurred

AS_STORED = "agreement_as_stored"  # share of the images that keep the teacher's class when they are rounded


@dataclass
class SynthesisTask:
    """Everything that a synthesizer is given.

    Attributes:
        teacher: The classifier; it is frozen until the rounds are done.
        num_images: Images to make in all.
        seed: The run's seed.
        writer: Where finished shards go; the rounds are the shards that it misses, or all where state passes between.
        processes: Processes that share the rounds.
        student: The network to train in the loop, for methods that need one.
        metadata: Activation statistics of the training data, for methods that need them.
    """

    teacher: Classifier
    num_images: int
    seed: int
    writer: ShardWriter
    processes: int = 1
    student: Classifier | None = None
    metadata: Metadata | None = None


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


@dataclass(frozen=True)
class Look:
    """One forward pass of images through the teacher: what it was shown, its answers and its inner activations.

    Attributes:
        images: (B, C, H, W), as they were shown: in pixel space, or normalised where the synthesizer works so.
        logits: (B, K) float32.
        moments: Mean and variance of the input of each BatchNorm layer, by its name; empty where ``statistics`` has
            no weight.
        features: (B, ...) float32 each, the activations at each of the synthesizer's taps.
    """

    images: Tensor
    logits: Tensor
    moments: Mapping[str, Moments] = field(default_factory=dict)
    features: Mapping[Any, Tensor] = field(default_factory=dict)


class Synthesizer(Learner):
    """Turns a frozen teacher into data impressions; round ``i`` makes shard ``i`` and depends only on (seed, i).

    A subclass says in ``kind`` how it works and in ``needs`` what it asks for, has a ``Config`` in its file, which
    extends :class:`~dfkd_cli.synthesis_options.Shards`, and makes a batch in :meth:`make`: a shard is one of them, or
    several.

    Attributes:
        anytime: Every round leaves a shard, so that a deadline may end the work after any of them.
        normalised: Images are made as the teacher's ``net`` takes them, not in pixel space. Learning rate and image
            terms are in these units.
        correction: Bessel's correction of the variances in :attr:`Look.moments`: 1 for unbiased ones, 0 for biased.
        taps: The places in the teacher where :attr:`Look.features` are read.
        summary: Applied to each of these activations; its result is what :attr:`Look.features` keep.
    """

    kind: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    stateless = True
    unit = "images"
    anytime: ClassVar[bool] = True
    normalised: ClassVar[bool] = False
    correction: ClassVar[int] = 0
    taps: Mapping[Any, Tap] = {}
    summary: Callable[[Tensor], Tensor] = staticmethod(torch.clone)

    def __init__(self, task: SynthesisTask, config: Any) -> None:
        super().__init__()
        self.teacher = task.teacher.freeze().lay_out()
        self.config, self.num_images, self.seed = config, task.num_images, task.seed
        self.writer, self.processes = task.writer, task.processes
        self.todo = self.writer.missing() if self.stateless else list(range(self.writer.count))
        self.rounds = -(-len(self.todo) // self.processes)

    @property
    def warmup_rounds(self) -> int:
        """Rounds at the start that only make images: a student rests."""
        return 0

    def done(self, rounds: int) -> int:
        return sum(self._count(shard) for shard in self.todo[: rounds * self.processes])

    @abstractmethod
    def make(self, first: int, count: int) -> Impressions:
        """Make a batch, images ``first`` to ``first + count`` of the set. Torch's random state is seeded for them."""

    @functools.cached_property
    def recorded(self) -> dict[str, Moments]:
        """What the teacher's BatchNorm layers remember; first asked for in a round, when it is on its device."""
        return recorded_moments(self.teacher)

    @contextlib.contextmanager
    def looking(self) -> Iterator[Callable[[Tensor], Look]]:
        """Inside the ``with`` block, a function that runs images through the teacher and returns a :class:`Look`.

        The teacher is hooked until the block ends. Moments are taken where the configuration's weight ``statistics``
        is not 0.
        """
        network = self.teacher.net if self.normalised else self.teacher
        statistics: contextlib.AbstractContextManager[Mapping[str, Moments]] = contextlib.nullcontext({})
        if getattr(self.config, "statistics", 0):
            statistics = batch_moments(self.teacher, self.correction)
        with statistics as moments, values_at(self.taps, self.summary) as values:

            def show(images: Tensor) -> Look:
                logits = network(images).float()
                return Look(images, logits, dict(moments), {name: value.float() for name, value in values.items()})

            yield show

    def models(self) -> Mapping[str, Classifier | Generators]:
        """Networks that were trained meanwhile, each to be written under its name. None by default."""
        return {}

    def round(self, index: int) -> Mapping[str, Tensor]:
        """Make one missing shard and write it."""
        position = index * self.processes + self.global_rank
        if position >= len(self.todo):
            return {}
        shard = self.todo[position]
        batch, start = self.config.batch_size, shard * self.config.of_a_shard
        stop = start + self._count(shard)
        parts, terms, counts = [], [], []
        for first in range(start, stop, batch):
            seed_torch(self.device, "shard", self.seed, first // batch)
            impressions = self.make(first, count := min(batch, stop - first))
            self._check_shapes(impressions, count)
            self.check_finite(impressions.terms, shard)
            tensors, costs = self._stored(impressions, shard)
            parts.append(tensors)
            terms.append({**impressions.terms, **costs})
            counts.append(count)
        ended = {
            name: sum(n * float(row[name]) for n, row in zip(counts, terms, strict=True)) / (stop - start)
            for name in terms[0]
        }
        with torch.autocast("cpu", enabled=False):  # it would have all parts of one type
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.writer.write(shard, tensors, ended)
        return {name: torch.as_tensor(value) for name, value in ended.items()}

    def keep(self) -> None:
        """Write the manifest of what is finished."""
        if self.writer.rows:
            self.writer.write_manifest()

    def _count(self, shard: int) -> int:
        """The images of a shard."""
        size = self.config.of_a_shard
        return min(size, self.num_images - shard * size)

    def _check_shapes(self, impressions: Impressions, count: int) -> None:
        """Whether a method made what it was asked for."""
        info, targets = self.teacher.info, impressions.targets
        made = [tuple(impressions.pixels.shape), *([] if targets is None else [tuple(targets.shape)])]
        wanted = [(count, *info.input_size), (count, info.num_classes)][: len(made)]
        if made != wanted:
            raise TypeError(f"{type(self).__name__}.make gives images and targets of {made} where {wanted} are due")

    @torch.no_grad()
    def _stored(self, impressions: Impressions, shard: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A batch as it is stored, on the CPU, and what that costs where it is not next to nothing."""
        stored, costs = as_stored(impressions.pixels, self.config.dtype, shard), {}
        with torch.autocast(self.device.type, enabled=False):  # whatever --precision is, answers are exact
            tensors = {"images": stored, "logits": self.teacher(as_pixels(stored))}
            if stored.dtype == torch.uint8:
                before = self.teacher(impressions.pixels)
                costs[AS_STORED] = (before.argmax(1) == tensors["logits"].argmax(1)).float().mean()
        if impressions.targets is not None:
            tensors["targets"] = impressions.targets.float()
        return {name: tensor.cpu() for name, tensor in tensors.items()}, costs


class ImageOptimizer(Synthesizer):
    """Optimises each batch of images by Adam through the teacher, from noise, towards targets.

    A subclass gives the targets and the loss terms. Terms are weighted by the configuration keys of their names; a
    term whose weight is zero need not be computed. Everything else has a place of its own to be changed: where images
    start, how the teacher sees them, at which resolutions, the optimiser, where the teacher is looked into.
    """

    kind = "images"
    scaled = False

    def __init__(self, task: SynthesisTask, config: Any) -> None:
        super().__init__(task, config)
        self.coarse_iterations, self.fixed_size = getattr(config, "coarse_iterations", 0), False
        if self.coarse_iterations:
            channels, height, width = self.teacher.info.input_size
            try:
                for network in filter(None, (self.teacher, task.student)):
                    probe(network.net, (channels, -(-height // 2), -(-width // 2)))
            except Exception:  # it is the network that complains, and users' code can raise anything
                self.fixed_size = True

    def targets(self, first: int, count: int) -> Any:
        """What images ``first`` to ``first + count`` aim at, on the CPU: soft labels (count, K) float32, or more.

        By default one-hot labels: the classes take turns.
        """
        return self.classes(first, count)

    @abstractmethod
    def terms(self, look: Look, targets: Any) -> dict[str, Tensor]:
        """Named, unweighted loss terms, 0-d, of what the teacher sees of a batch with those targets."""

    def soft_labels(self, targets: Any) -> Tensor | None:
        """The soft labels (B, K) among a batch's targets, which are stored with it: by default they are all."""
        return targets

    def start(self, count: int) -> Tensor:
        """Where the optimisation starts, (count, C, H, W), on the CPU: normal noise for ``net``, or uniform pixels."""
        size = (count, *self.teacher.info.input_size)
        return torch.randn(size) if self.normalised else torch.rand(size)

    def classes(self, first: int, count: int) -> Tensor:
        """One-hot labels (count, K): image ``n`` is of class ``n mod K``."""
        num_classes = self.teacher.info.num_classes
        return F.one_hot(torch.arange(first, first + count) % num_classes, num_classes).float()

    def view(self, images: Tensor, progress: float) -> Tensor:
        """What the teacher sees of images, drawn anew in each iteration: they are rolled and mirrored at random.

        Args:
            images: (B, C, H, W) of this stage's resolution; smaller ones are rolled by as much less.
            progress: The share of the stage's iterations that is done, from 0.
        """
        jitter = self.reach(progress) * images.shape[-1] // self.teacher.info.input_size[-1]
        steps: list[nn.Module] = [RandomRoll(jitter)] if jitter else []
        steps += [RandomFlip()] if self.config.view_flip else []
        return v2.Compose(steps)(images) if steps else images

    def reach(self, progress: float) -> int:
        """By how many pixels full images are rolled at most, when so much of a stage's iterations is done."""
        return self.config.jitter

    def resolutions(self) -> Sequence[tuple[int, int]]:
        """Stages from coarse to fine: by what the sides are divided, and for how many iterations."""
        coarse = [(2, self.coarse_iterations)] if self.coarse_iterations else []
        return [*coarse, (1, self.config.iterations)]

    def optimizer(self, images: Tensor) -> torch.optim.Optimizer:
        """A stage's optimiser of the images."""
        return torch.optim.Adam([images], lr=self.config.lr, fused=True)

    def rate(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by in a step of a stage, counted from 0."""
        return 1.0

    def project(self, images: Tensor) -> None:
        """Bring images back into their range, in place, after each iteration: [0,1] where that is wanted."""
        if self.config.clamp:
            black = torch.zeros_like(self.teacher.mean)
            low, high = (self.teacher.normalise(black + end) if self.normalised else black + end for end in (0, 1))
            images.clamp_(low, high)

    def make(self, first: int, count: int) -> Impressions:
        """Run the inner iterations on one batch. Images and optimiser are new in every round.

        Where the statistics of a batch count, the last one of several is as large as the others, and what is too much
        is thrown away: a few images alone can have neither the statistics nor their classes.
        """
        whole = count
        if getattr(self.config, "statistics", 0):
            whole = max(count, min(self.config.batch_size, self.num_images))
        targets = self._aims(first, whole)
        images = self.start(whole).to(self.device).requires_grad_()
        terms: Mapping[str, Tensor] = {}
        with self.looking() as show:
            for divisor, iterations in self.resolutions():
                terms = self._optimize(images, targets, show, divisor, iterations)
        images = images.detach()[:count]
        pixels = self.teacher.denormalise(images) if self.normalised else images
        labels = self.soft_labels(targets)
        labels = None if labels is None else labels[:count]
        return Impressions(pixels, labels, {name: term.detach() for name, term in terms.items()})

    def pulls(self, count: int) -> dict[str, tuple[float, float]]:
        """Each term in the first inner step on a new batch, unweighted, and the norm of its weighted gradient.

        Args:
            count: Images of the batch; the gradient is in all of them.
        """
        seed_torch(self.device, "shard", self.seed, 0)
        targets = self._aims(0, count)
        images = self.start(count).to(self.device).requires_grad_()
        divisor, _ = self.resolutions()[0]
        with self.looking() as show:
            terms = self.terms(show(self.view(self._coarse(images, divisor), 0)), targets)
        found = {}
        for name, term in terms.items():
            weight = getattr(self.config, name)
            (gradient,) = torch.autograd.grad(weight * term, images, retain_graph=True)
            found[name] = float(term.detach()), float(gradient.norm())
        return found

    def _aims(self, first: int, count: int) -> Any:
        """The targets where the images are, exact whatever ``--precision`` is."""
        with torch.autocast(self.device.type, enabled=False):
            return move_data_to_device(self.targets(first, count), self.device)

    def _coarse(self, images: Tensor, divisor: int) -> Tensor:
        """Images with sides divided, or where the network takes no others, of their sides with pixels as large."""
        if divisor == 1:
            return images
        coarse = F.avg_pool2d(images, divisor, ceil_mode=True)  # the last row and column of odd sides too
        return F.interpolate(coarse, images.shape[2:]) if self.fixed_size else coarse

    def _optimize(
        self, images: Tensor, targets: Any, show: Callable[[Tensor], Look], divisor: int, iterations: int
    ) -> Mapping[str, Tensor]:
        """One stage, in place. Returns its last terms."""
        optimizer = self.optimizer(images)
        schedule = LambdaLR(optimizer, lambda step: self.rate(step, iterations))
        terms: dict[str, Tensor] = {}
        for step in range(iterations):
            view = self.view(self._coarse(images, divisor), step / iterations)
            terms = self.terms(show(view), targets)
            # The teacher's parameters need no gradient: backward goes to the images only.
            (gradient,) = torch.autograd.grad(weighted_sum(terms, self.config), images)
            images.grad = gradient.contiguous()  # it may be channels last, where fused Adam would take wrong pixels
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                if self.config.soften and (step + 1) % self.config.soften_every == 0:
                    images.copy_(blurred(images, self.config.soften))
                self.project(images)
        return terms
