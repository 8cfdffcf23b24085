"""Contrastive Model Inversion: each batch of images is unlike those before it.

Fang, Song, Wang, Shen, Wang, Song. IJCAI 2021. arXiv:2105.08584.

    L = a CE(T(x), y) + b sum_l (|mean_l - mean_l(x)|_2 + |var_l - var_l(x)|_2) + c L_adv(x) + d L_cr
    L_cr = -mean_i log (exp(s_ii / tau) / sum_j exp(s_ij / tau)),      s_ij = <h(f(x'_i)), h(f(x_j))>

x is a view of the images, cropped after padding and mirrored; x' one that is cut out and enlarged. f are the spatial
means of what goes into the teacher's BatchNorm layers, h a perceptron whose output has norm 1, trained along. i and j
run over this batch and over rows of a memory of the features of former batches; the mean over the batch and that over
the memory's rows are added, so that these train h but not the images. No gradient goes through the h of x.

The generator and the latents start anew for each batch, the perceptron and the memory go on. L_adv and the rest of the
frame are in ``pooled``. Defaults are those of the released script for CIFAR-10 that starts from nothing, WRN-40-2 to
WRN-16-1; the best published figures start from a pool of 50,000 images made before, which ``warmup_share`` is like.
``taps`` are the teacher's features; of a ResNet-34 the code takes what goes into the four stages, that is ``stem stage1
stage2 stage3``.

Differences from the released code: the classes of a batch are not sorted; the memory may have any size; a crop without
room for its aspect is as wide or high as the image instead of drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dfkd_cli.config import option
from dfkd_cli.data.augment import pipeline
from dfkd_cli.models.activations import Tap, values_at
from dfkd_cli.models.classifier import probe
from dfkd_cli.models.taps import find_taps
from dfkd_cli.options import Augmentation
from dfkd_cli.seeds import derive
from dfkd_cli.synthesis_options import PooledGeneration
from dfkd_cli.synthesizers.base import SynthesisTask
from dfkd_cli.synthesizers.memory import Memory
from dfkd_cli.synthesizers.pooled import BatchGeneration, Candidate, PooledGenerator

PROJECTED = 256  # outputs of the perceptron
KEPT = Path("checkpoints", "memory")


@dataclass(frozen=True, kw_only=True)
class Config(PooledGeneration):
    """Contrastive Model Inversion."""

    contrast: float = option(0.8, "weight of the contrastive loss", low=0)
    contrast_temperature: float = option(0.1, "what similarities are divided by", above=0)
    contrast_crop: float = option(0.25, "least share of an image's area in its second view", above=0, high=1)
    memory: int = option(40960, "images whose features are remembered; the oldest are forgotten", low=1, rehearsal=2)
    negatives: int = option(4096, "rows of the memory in each inner step", low=0, rehearsal=2)
    taps: tuple[str, ...] | None = option(
        None, "the teacher's features, as objectives take them (default: what goes into each BatchNorm layer)"
    )


class CMI(PooledGenerator):
    """A new generator for each batch."""

    config: Config

    def __init__(self, task: SynthesisTask, config: Config) -> None:
        super().__init__(task, config)
        inputs = {str(index): Tap(layer, before=True) for index, layer in enumerate(self.teacher.batch_norms())}
        taps = inputs if config.taps is None else find_taps(self.teacher, config.taps)
        self.taps, self.summary = taps if config.contrast else {}, channel_means
        with values_at(taps, channel_means) as features:
            probe(self.teacher.net, self.teacher.info.input_size)
        size = joined(features).shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("projection", self.seed))
            self.projection = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, PROJECTED))
        self.remembered = Memory(self.writer.directory / KEPT, min(config.memory, self.num_images), 2 * size)
        self.second_view = pipeline(Augmentation(resized_crop=config.contrast_crop, flip=config.view_flip), 0.0)

    def trained(self) -> Sequence[tuple[Optimizer, LRScheduler | None]]:
        """The student and the perceptron."""
        return [*super().trained(), (torch.optim.Adam(self.projection.parameters(), self.config.lr, fused=True), None)]

    def start(self, labels: Tensor) -> BatchGeneration:
        """A new generator and new latents."""
        initialise(self.generator)
        latents = self.latents(len(labels))
        trained = [*self.generator.parameters(), latents]
        optimizers: list[Optimizer] = [torch.optim.Adam(trained, self.config.lr, betas=self.config.betas, fused=True)]
        if self.config.contrast:
            optimizers.append(self.pairs[1][0])
        return BatchGeneration(self.generator, latents, optimizers)

    def candidate(self, pixels: Tensor, labels: Tensor) -> Candidate:
        """That of the frame, with the contrastive loss and the features of both views."""
        candidate = super().candidate(pixels, labels)
        if not self.config.contrast:
            return candidate
        whole = joined(candidate.look.features)
        with values_at(self.taps, channel_means) as features:
            self.teacher(self.second_view(pixels))
        local = joined(features)
        terms = {**candidate.terms, "contrast": self.contrast(local, whole)}
        return replace(candidate, terms=terms, features=torch.cat([local, whole], dim=1).detach())

    def contrast(self, local: Tensor, whole: Tensor) -> Tensor:
        """The contrastive loss of features (B, D) of both views, against rows of the memory."""
        past = self.remembered.sample(self.config.negatives).to(self.device)
        past_local, past_whole = past.chunk(2, dim=1)
        queries = F.normalize(self.projection(torch.cat([local, past_local])), dim=1)
        with torch.no_grad():
            keys = F.normalize(self.projection(torch.cat([whole, past_whole])), dim=1)
        return contrastive_loss(queries.float(), keys.float(), len(local), self.config.contrast_temperature)

    def finish(self, batch: BatchGeneration, best: Candidate) -> None:
        """Remember the features of the best images."""
        if best.features is not None:
            self.remembered.push(best.features)
            self.remembered.write(self.current_round, best.features)

    def can_continue(self, index: int) -> bool:
        if not super().can_continue(index):
            return False
        return index == self.rounds or not self.config.contrast or self.remembered.read(index, self.config.batch_size)

    def keep(self) -> None:
        """What was forgotten when a checkpoint was saved need not be kept; after the last round, nothing need."""
        super().keep()
        done = self.current_round + 1
        self.remembered.drop(done if done == self.rounds else self.remembered.first(done, self.config.batch_size))


def channel_means(values: Tensor) -> Tensor:
    """The means (B, C) over all positions of values (B, C, ...)."""
    if values.ndim == 2:
        return values.float().clone()
    # Not the mean, whose gradient is divided in each position.
    return values.float().flatten(2).sum(2) / values[0, 0].numel()


def joined(features: Mapping[str, Tensor]) -> Tensor:
    """The features (B, C) of all taps, side by side."""
    return torch.cat(list(features.values()), dim=1)


def contrastive_loss(queries: Tensor, keys: Tensor, current: int, temperature: float) -> Tensor:
    """Cross-entropy of each query with the key of the same row, among all keys; 0-d.

    Args:
        queries: (N, D) of norm 1.
        keys: (N, D) of norm 1.
        current: The first so many rows are of this batch. Their mean and that of the other rows are added.
        temperature: What similarities are divided by.
    """
    with torch.autocast(queries.device.type, enabled=False):  # it would round them
        similarity = queries @ keys.T / temperature
    losses = F.cross_entropy(similarity, torch.arange(len(keys), device=keys.device), reduction="none")
    return torch.stack([part.mean() for part in (losses[:current], losses[current:]) if len(part)]).sum()


def initialise(generator: nn.Module) -> None:
    """Weights from N(0, 0.02^2), those of BatchNorm from N(1, 0.02^2), no biases, no running averages."""
    for layer in generator.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            nn.init.normal_(layer.weight, 1.0, 0.02)
        elif isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
