"""Active Mixup: of few images and a black box; it is asked about the mixtures that the student is least sure of.

Wang, Li, Wang, Gong. Neural Networks Are More Productive Teachers Than Human Raters: Active Mixup for Data-Efficient
Knowledge Distillation from a Blackbox Model. CVPR 2020. arXiv:2003.13960.

    x(l)  = l x_1 + (1 - l) x_2                 l = least ... most, `shares` of them
    c(l)  = max_k softmax(student(x(l)))_k
    C     = min_l c(l),  l* = argmin_l c(l)     of each pair x_1, x_2 of the images

At first the student learns the teacher's answers to the images. Then, in each round, the ``mixups`` pairs of lowest C
are asked about, mixed with their l*; they join the set for good, their pairs are no candidates any more, and the
student is trained from scratch on the whole set, with the command's options of training. The objectives are any
between answers; the paper's is ``response`` at temperature 1. Pairs are those of the released code: images i and
i + s of N, s = 1 ... (N - 1) / 2. The images are held; mixtures are made when they are wanted, ``memory`` of them at a
time. What is left at the end is written into ``asked/``, shards with the answers, from which others can learn without
asking.

As in the released code, mixtures of 8-bit images are rounded down to 8 bits, ``min(floor(256 x), 255)``, before they
are asked about and learned, and scored as they are. There white wraps to black, which is a fault and is not followed;
its student is the best of its epochs on the test images, ours the last. ``candidates`` looks at some pairs only.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfkd_cli.config import option
from dfkd_cli.data.sources import Images, Source, concatenated
from dfkd_cli.errors import ConfigError
from dfkd_cli.regimes.base import Task, length
from dfkd_cli.regimes.offline import Offline
from dfkd_cli.seeds import derive

AT_ONCE = 64  # pairs that are scored, or mixed in float64, together
CHUNK = 1000  # images
MOST_PAIRS = 10**8


@dataclass(frozen=True, kw_only=True)
class Config:
    """Active Mixup."""

    rounds: int = option(2, "times that the set grows and the student is trained anew", low=0, rehearsal=1)
    mixups: int = option(10_000, "mixtures that are asked about in each round", low=1, rehearsal=2)
    candidates: int | None = option(
        None, "pairs that are looked at in each round, drawn at random (default: all)", low=1, rehearsal=4
    )
    least: float = option(0.3, "least share of a pair's first image in their mixture", low=0, high=1)
    most: float = option(0.7, "its largest share", low=0, high=1)
    shares: int = option(11, "shares that are tried, evenly spaced", low=1, rehearsal=2)


class ActiveMixup(Offline):
    """One black box, one student, and a set that grows."""

    needs = ("teacher", "answers", "objective")
    config: Config

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        count, self.pairs = len(self.train_source), pairs_of(len(self.train_source))
        if config.candidates is None and self.pairs > MOST_PAIRS:
            raise ConfigError(f"{count:,} images make {self.pairs:,} pairs", "give --candidates, or fewer images")
        if self.sizes[-1] < count + config.rounds * config.mixups:
            of = f"{count} images make {self.pairs} pairs, no more can be asked about"
            few = config.candidates is not None and config.candidates < min(config.mixups, self.pairs)
            self.note = f"--candidates {config.candidates}: no more are asked about in a round" if few else of
        if self.train_source.labelled and any(getattr(o.config, "hard", 0) for o in self.losses.values()):
            said = "active-mixup: mixtures have no labels, the black box's classes are taken, of real images too"
            self.note = f"{self.note}; {said}" if self.note else said
        lengths = [length(task.training, size)[1] for size in self.sizes]
        self.starts = [0, *itertools.accumulate(lengths)]
        self.steps = self.starts[-1]
        self.start = {name: value.clone() for name, value in self.student.state_dict().items()}
        self.recorded: list[tuple[Tensor, Tensor]] = []

    @property
    def sizes(self) -> list[int]:
        """How many images are learned from in each training."""
        count, c = len(self.train_source), self.config
        most = min(pairs_of(count), c.candidates or MOST_PAIRS)  # of one round
        grown = itertools.accumulate([0] + [min(c.mixups, most)] * c.rounds)
        return [count + min(added, pairs_of(count)) for added in grown]

    @property
    def queries(self) -> int:
        added = self.sizes[-1] - self.sizes[0] if self.training_config.steps != 0 else 0
        return len(self.source) + added

    def span(self, step: int) -> tuple[int, int]:
        which = self.which(step)
        return self.starts[which], self.starts[which + 1]

    def which(self, step: int) -> int:
        """The number of the training that a step is of."""
        return bisect_right(self.starts, step) - 1

    def passed(self, step: int) -> float:
        return (step - self.span(step)[0]) / self.batches.steps_per_epoch

    def on_fit_start(self) -> None:
        """Load the images, and mix again what earlier processes have mixed."""
        super().on_fit_start()
        self.mixed = Mixed(self.train_source.all().pixels.cpu())
        for pairs, shares in self.recorded:
            self.mixed.add(pairs, shares)
        self.current = -1  # the training that batches are of

    def draw(self, start: int, stop: int) -> Iterator[Images]:
        """The batches of steps, each from the set as it is when its time comes."""
        for step in range(start, stop):
            which = self.which(step)
            first = self.starts[which]
            if which != self.current:
                while len(self.mixed.added) < which:
                    self.grow()
                if step == first and which:
                    self.begin_again(step)
                self.batches = self.batched(self.mixed)
                self.current = which
            yield from self.batches.steps(step - first, step - first + 1)

    def grow(self) -> None:
        """Add the mixtures that the student is least sure of, and ask about them."""
        number = len(self.mixed.added)
        wanted = self.sizes[number + 1] - self.sizes[number]
        candidates = self._candidates(number)
        confidence, shares = self.least_confidence(candidates)
        order = confidence.argsort(stable=True)[:wanted]
        pairs, shares = candidates[order], shares[order]
        self.mixed.add(pairs, shares)
        assert self.teacher is not None
        for start in range(0, len(pairs), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            self.teacher(self.mixed.mixtures(pairs[part], shares[part]).to(self.device).pixels)

    def _candidates(self, number: int) -> Tensor:
        """Pairs that are not in the set yet, in ascending order."""
        taken, limit = self.mixed.pairs, self.config.candidates
        if limit is None or limit + len(taken) >= self.pairs:
            drawn = torch.arange(self.pairs)
        else:
            random = np.random.default_rng(derive("candidates", self.seed, number))
            drawn = torch.from_numpy(random.choice(self.pairs, limit + len(taken), replace=False))
        return drawn[~torch.isin(drawn, taken)][:limit].sort().values

    @torch.no_grad()
    def least_confidence(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Of each pair (M,) the lowest of the student's confidences in a mixture of it, and its share, (M,) each."""
        self.student.eval()
        grid = torch.linspace(self.config.least, self.config.most, self.config.shares, dtype=torch.float64)
        weights = grid.float().to(self.device).view(-1, 1, 1, 1, 1)
        lowest, shares = [], []
        for part in torch.split(pairs, AT_ONCE):
            first, second = (Images(pixels).to(self.device).pixels for pixels in self.mixed.partners(part))
            mixtures = weights * first + (1 - weights) * second
            passes = torch.split(mixtures.flatten(0, 1), self.training_config.at_once)
            answers = [self.student(images).float() for images in passes]
            confidence = torch.cat(answers).softmax(1).amax(1).view(len(grid), -1)
            low, which = confidence.min(0).values, confidence.argmin(0)
            lowest.append(low.cpu())
            shares.append(grid[which.cpu()])
        self.student.train()
        return (torch.cat(lowest), torch.cat(shares)) if lowest else (torch.empty(0), torch.empty(0).double())

    def begin_again(self, step: int) -> None:
        """Student, optimiser and learning rate as they were at the start, for the training that begins."""
        self.student.load_state_dict(self.start)
        optimizer: Any = self.optimizers()
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = self.training_config.lr
        # Not its state into the old one: with fewer steps it may be of another kind.
        self.trainer.strategy.lr_scheduler_configs[0].scheduler = self.schedule(optimizer.optimizer, *self.span(step))

    def made(self) -> Mapping[str, Source]:
        """All that was asked about but what was held out; nothing without steps, which ask about no mixtures."""
        return {"asked": self.mixed} if self.rounds else {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What was mixed: the pixels follow from the images."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["mixed"] = self.mixed.added

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep it until the images are there."""
        super().on_load_checkpoint(checkpoint)
        self.recorded = checkpoint["mixed"]


class Mixed(Source):
    """Images (N, C, H, W), and mixtures of pairs of them.

    Attributes:
        added: What was added at a time: the numbers (M,) of the pairs, and the share (M,) of the first image in each.
        pairs, shares: All of them.
    """

    def __init__(self, pixels: Tensor) -> None:
        _, channels, height, width = pixels.shape
        self.pixels, self.shape, self.dtype = pixels, (channels, height, width), pixels.dtype
        self.added: list[tuple[Tensor, Tensor]] = []
        self.pairs, self.shares = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)

    @property
    def sizes(self) -> list[int]:  # type: ignore[override]
        count = len(self.pixels) + len(self.pairs)
        return [min(CHUNK, count - start) for start in range(0, count, CHUNK)]

    def chunk(self, index: int) -> Images:
        start, stop = CHUNK * index, CHUNK * (index + 1)
        mixtures = slice(max(start - len(self.pixels), 0), max(stop - len(self.pixels), 0))
        return concatenated(
            [Images(self.pixels[start:stop]), self.mixtures(self.pairs[mixtures], self.shares[mixtures])]
        )

    def add(self, pairs: Tensor, shares: Tensor) -> None:
        """Add the mixtures of pairs."""
        self.added.append((pairs, shares))
        self.pairs, self.shares = torch.cat([self.pairs, pairs]), torch.cat([self.shares, shares])

    def partners(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """The two images of each pair, as they are held."""
        count = len(self.pixels)
        first, shift = pairs % count, pairs // count + 1
        return self.pixels[first], self.pixels[(first + shift) % count]

    def mixtures(self, pairs: Tensor, shares: Tensor) -> Images:
        """The mixtures of pairs, as images are held: in 8 bits where these are."""
        made = torch.empty(len(pairs), *self.shape, dtype=self.dtype)
        for start in range(0, len(pairs), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            first, second = (part.double() for part in self.partners(pairs[rows]))
            weights = shares[rows].view(-1, 1, 1, 1)
            mixed = weights * first + (1 - weights) * second
            if not self.dtype.is_floating_point:
                mixed = (mixed * (256 / 255)).floor().clamp_max(255)
            made[rows] = mixed.to(self.dtype)
        return Images(made)


def pairs_of(count: int) -> int:
    """How many pairs so many images make: each with the (count - 1) / 2 that follow it, the first after the last."""
    return count * ((count - 1) // 2)
