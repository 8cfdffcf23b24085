"""Knowledge Condensation Distillation: a set that shrinks to what the student is unsure of, and takes in the rest.

Li, Lin, Ding, Lin, Zhuang, Huang, Ding, Cao. ECCV 2022. arXiv:2207.05409.

    V_F(x) = (F - 1) / F V_(F-1)(x) + 1 / F H(softmax(z_student(a(x))))      the F-th time that x is learned from
    R(x)   = rank of V_F(x) F^0.03, the highest first
    x_j   <- (1 - blend j / n) x_j + blend j / n x'_j                        j = 0 ... n - 1

Every ``period`` epochs images are ranked. The first ones are kept, an equal number fewer each time, so that ``keep`` of
all are left at the end. The n images that fall out are blended, in the order of their ranks, into the last n of those
that stay, for good; the label is the latter's, and the teacher answers the blend. The objectives are any. H is taken
before the step, in training mode. What is left at the end is written into ``condensed/``, shards like any other.

As in the released code, images that fell out once are ranked again by what was recorded of them and can return
(``reclaim``; the paper's text lets them go), the last ranking comes after the last epoch, and pixels that are whole
numbers stay so, cut off. Entropies are computed from log-probabilities, which are never NaN, and count also where they
are 0; images that were never seen rank first; the number of rankings follows from the epochs, with ``--steps`` from
those that so many make of all images, where the code divides by 6. The paper's blend is a sum, the code's and ours a
mean; of the n that fall out some may have fallen out before. All images are held in memory, whatever their number:
``memory`` is refused.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.data.batches import Batches
from dfkd_cli.data.sources import Images, Source
from dfkd_cli.errors import ConfigError
from dfkd_cli.objectives.base import Outputs, everywhere
from dfkd_cli.regimes.base import Task, length
from dfkd_cli.regimes.offline import Offline

EXPONENT = 0.03
AT_ONCE = 64  # images that are blended together, in float64


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knowledge condensation."""

    period: int = option(40, "epochs between two rankings", low=1, rehearsal=1)
    keep: float = option(0.7, "share of the images that is left at the end", above=0, high=1)
    blend: float = option(0.3, "most of an image that falls out in the one that takes it in", low=0, high=1)
    reclaim: bool = option(True, "images that have fallen out are ranked again, and can return")


class Condensation(Offline):
    """One frozen teacher, one student, and a set that is condensed."""

    mixable = False
    config: Config

    def __init__(self, task: Task, config: Config) -> None:
        training = task.training
        if training.memory is not None:
            raise ConfigError(
                f"--memory {training.memory:g}: --method kcd ranks and blends all images, and holds them all",
                "leave out --memory, or give fewer images (--num-images)",
            )
        super().__init__(task, config)
        if training.steps != 0 and self.sizes[-1] < training.batch_size:
            raise ConfigError(
                f"--keep {config.keep:g} leaves {self.sizes[-1]} images, no batch of {training.batch_size}",
                "keep more, or lower --batch-size",
            )
        # The steps of each epoch: after the last ranking nothing shrinks any more.
        self.per_epoch, self.starts = list[int](), [0]
        while len(self.per_epoch) < training.epochs if training.steps is None else self.starts[-1] < training.steps:
            ranked = min(len(self.per_epoch) // config.period, len(self.sizes) - 1)
            self.per_epoch.append(self.sizes[ranked] // training.batch_size)
            self.starts.append(self.starts[-1] + self.per_epoch[-1])
        if len(self.per_epoch) <= config.period:
            self.note = f"kcd: images are ranked every {config.period} epochs, and it learns for {len(self.per_epoch)}"
        self.steps = self.starts[-1] if training.steps is None else training.steps
        self.recorded: dict[str, Any] | None = None

    @functools.cached_property
    def sizes(self) -> list[int]:
        """How many images are left before the first ranking and after each; without steps there is none."""
        count = len(self.train_source)
        per_epoch, steps = length(self.training_config, count)
        return sizes(count, self.config.keep, max(steps // per_epoch // self.config.period, 1)) if steps else [count]

    @property
    def queries(self) -> int:
        """All images, and all blends: of each ranking the first falling image changes nothing."""
        falling = (before - after for before, after in itertools.pairwise(self.sizes))
        return len(self.source) + (sum(max(count - 1, 0) for count in falling) if self.config.blend else 0)

    def on_fit_start(self) -> None:
        """Load all images, and blend again what earlier processes have blended."""
        super().on_fit_start()
        self.store = Store(self.train_source)
        count = len(self.train_source)
        self.seen, self.entropy = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.float64)
        if self.recorded is not None:
            self.seen, self.entropy = self.recorded["seen"], self.recorded["entropy"]
            for kept, falling, taking in self.recorded["rankings"]:
                self.store.condense(kept, falling, taking, self.config.blend)
        self.sets: dict[int, Batches] = {}

    def passed(self, step: int) -> float:
        epoch = bisect_right(self.starts, step) - 1
        return epoch + (step - self.starts[epoch]) / self.per_epoch[epoch]

    def draw(self, start: int, stop: int) -> Iterator[Images]:
        """The batches of steps, each from what is left when its time comes."""
        for step in range(start, stop):
            epoch = int(self.passed(step))
            while len(self.store.rankings) < min(epoch // self.config.period, len(self.sizes) - 1):
                self.rank()
            ranked = len(self.store.rankings)
            if ranked not in self.sets:
                self.sets = {ranked: self.batched(self.store)}
            batches, place = self.sets[ranked], step - self.starts[epoch]
            for images in batches.steps(first := epoch * batches.steps_per_epoch + place, first + 1):
                assert images.positions is not None
                positions = self.store.kept.to(images.positions.device)[images.positions]
                yield replace(images, positions=positions)  # in the whole set, as objectives remember images

    def terms(
        self, student: Outputs, teacher: Mapping[str, Outputs], images: Images, shared: bool = False
    ) -> dict[str, dict[str, Tensor]]:
        """Those of the objectives; the student's entropies are recorded on the way."""
        if shared:
            self.record(images, student.logits.detach())
        return super().terms(student, teacher, images, shared)

    def record(self, images: Images, logits: Tensor) -> None:
        """Add the entropies of answers (B, K) to the means of these images."""
        assert images.positions is not None
        logs = logits.double().log_softmax(1)
        entropies = everywhere(-(logs.exp() * logs).sum(1)).cpu()
        places = everywhere(images.positions).cpu()
        self.seen[places] += 1
        self.entropy[places] += (entropies - self.entropy[places]) / self.seen[places]

    def rank(self) -> None:
        """Condense the set to its next size."""
        store, ranked = self.store, len(self.store.rankings)
        left = self.sizes[ranked + 1]
        score = torch.where(self.seen > 0, self.entropy * self.seen.double() ** EXPONENT, torch.inf)
        candidates = torch.arange(len(score)) if self.config.reclaim else store.kept
        order = candidates[score[candidates].argsort(descending=True, stable=True)]
        falling = order[left : self.sizes[ranked]][:left]  # the rest finds no image to be blended into
        store.condense(order[:left], falling, order[left - len(falling) : left], self.config.blend)

    def made(self) -> Mapping[str, Source]:
        """The images that are left after the rankings that are still to come; without steps none are written."""
        if not self.rounds:
            return {}
        while len(self.store.rankings) < len(self.sizes) - 1:
            self.rank()
        return {"condensed": self.store}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is recorded, and who was blended with whom: the pixels follow from the source."""
        super().on_save_checkpoint(checkpoint)
        state = {"seen": self.seen, "entropy": self.entropy, "rankings": self.store.rankings}
        checkpoint["condensation"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep it until the images are there."""
        super().on_load_checkpoint(checkpoint)
        self.recorded = checkpoint["condensation"]


class Store(Source):
    """All images of a source in memory, of which some are left.

    Attributes:
        kept: (n,) int64, where those that are left stand in the source.
        rankings: What each ranking has done: who is left, who fell out, and who took that in.
    """

    def __init__(self, source: Source) -> None:
        everything = source.all()  # a copy, also of a single chunk: what is blended is changed in place
        self.images = Images(everything.pixels.cpu(), everything.labels)
        self.shape, self.dtype, self.labelled = source.shape, source.dtype, source.labelled
        self.kept, self.rankings = torch.arange(len(everything.pixels)), list[tuple[Tensor, Tensor, Tensor]]()

    @property
    def sizes(self) -> list[int]:  # type: ignore[override]
        return [len(self.kept)]

    def chunk(self, index: int) -> Images:
        return self.images[self.kept]

    def condense(self, kept: Tensor, falling: Tensor, taking: Tensor, blend: float) -> None:
        """Leave the kept ones, and blend each falling image into the one that takes it in."""
        self.rankings.append((kept, falling, taking))
        self.kept, pixels = kept.sort().values, self.images.pixels
        shares = blend * torch.arange(len(falling), dtype=torch.float64).view(-1, 1, 1, 1) / max(len(falling), 1)
        parts = (torch.split(values, AT_ONCE) for values in (shares, taking, falling))
        for share, into, out in zip(*parts, strict=True):  # nobody takes in and falls
            mixed = (1 - share) * pixels[into] + share * pixels[out]
            # What is a whole number but for rounding is not to be cut down to the one below.
            pixels[into] = (mixed if pixels.is_floating_point() else mixed + 1e-6).to(pixels.dtype)


def sizes(count: int, keep: float, rankings: int) -> list[int]:
    """How many of so many images are left before the first ranking and after each."""
    # Rounded first: ten images less a tenth are nine, whatever 1 - 0.9 comes to in binary.
    fewer, least = (int(round(value, 6)) for value in (count * (1 - keep) / rankings, keep * count))
    return [max(count - fewer * index, least) for index in range(rankings + 1)]
