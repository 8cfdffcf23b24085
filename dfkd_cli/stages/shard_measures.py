"""What is measured of images: what the teacher says about them, how varied and how plausible they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.artifacts.shards import ShardReader
from dfkd_cli.data.sources import Images, Source
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.moments import Moments
from dfkd_cli.models.statistics import DEAD, LayerMoments, layer_divergence, recorded_moments, running_moments
from dfkd_cli.stages.measures import BATCH, CPU

SAMPLE, VALUES = 1000, 2**25  # images, evenly spaced, and their values at most, for what is too slow for all of them
TOLERANCE = 1e-3  # of logits recomputed on another machine


def measure_shards(
    reader: ShardReader, teacher: Classifier | None, device: torch.device, batch_size: int = BATCH
) -> dict[str, Any]:
    """Read every shard once and measure it; the logits are the stored ones.

    Args:
        reader: The shards.
        teacher: The one they were made from, where it is at hand.
        device: Where the teacher runs.
        batch_size: Images of a forward pass.

    Returns:
        See :func:`_measure`.
    """
    shards = (reader.read(index) for index in range(len(reader.sizes)))
    temperature = reader.manifest.get("config", {}).get("temperature", 1.0)
    tally = _Tally(sum(reader.sizes), reader.shape, reader.num_classes, temperature)
    return _measure(shards, tally, teacher, device, batch_size)


def measure_images(
    source: Source, teacher: Classifier, device: torch.device, batch_size: int = BATCH
) -> dict[str, Any]:
    """Read every image of a source once and measure them as :func:`measure_shards` does; stored answers are others'."""

    def read(index: int) -> dict[str, Tensor]:
        images = source.chunk(index)
        stored = {"maker": images.logits, "targets": images.targets}
        return {"images": images.pixels} | {name: value for name, value in stored.items() if value is not None}

    chunks = map(read, range(len(source.sizes)))
    return _measure(chunks, _Tally(len(source), source.shape, teacher.info.num_classes), teacher, device, batch_size)


@torch.no_grad()
def _measure(
    chunks: Iterable[Mapping[str, Tensor]],
    tally: _Tally,
    teacher: Classifier | None,
    device: torch.device,
    batch_size: int,
) -> dict[str, Any]:
    """Measures of ``images`` and of the ``logits`` and ``targets`` stored with them; shares are of all images.

    Logits of another teacher, who made the images, are ``maker``.

    Returns:
        What :class:`_Tally` adds up, and ``count``.
        ``logits_ok``: whether the stored logits are the teacher's answers; None without either.
        With a teacher that has BatchNorm, else None: ``bn_distance``, the sum of :func:`bn_distances`;
        ``bn_divergence``, the mean of :func:`bn_divergences`; both by layer in ``bn_distance_layers`` and
        ``bn_divergence_layers``.
    """
    same = []
    watching: AbstractContextManager[dict[str, LayerMoments]]
    watching = nullcontext({}) if teacher is None else running_moments(teacher)
    with watching as seen:
        for chunk in chunks:
            images = Images(chunk["images"]).to(CPU)
            answers = {} if teacher is None else {"logits": _logits(teacher, images, device, batch_size)}
            if answers and "logits" in chunk:
                same.append(torch.allclose(answers["logits"], chunk["logits"], atol=TOLERANCE))
            logits = {**answers, **chunk}["logits"].double()
            tally.add(images.pixels, logits, chunk.get("targets"), chunk.get("maker"))
    recorded = {} if teacher is None else recorded_moments(teacher)
    distances, divergences = bn_distances(seen, recorded), bn_divergences(seen, recorded)
    return {
        "count": tally.count,
        **tally.measures(),
        "bn_distance": sum(distances.values()) if distances else None,
        "bn_distance_layers": distances or None,
        "bn_divergence": sum(divergences.values()) / len(divergences) if divergences else None,
        "bn_divergence_layers": divergences or None,
        "logits_ok": all(same) if same else None,
    }


class _Tally:
    """What is added up over chunks.

    Of the logits: ``confidence`` (mean greatest probability), ``class_histogram`` (images by the class given),
    ``class_balance`` (its entropy as a share of the greatest possible: 1 is balanced).
    Of the stored targets, None without them: ``target_match`` (share whose most probable class is the one given),
    ``target_divergence`` (mean KL(target || softmax(logits / temperature)), nats, at the method's temperature; None of
    a teacher that did not make them).
    Of the logits of another teacher, None without them: ``agreement`` (share to which both give the same class).
    Of the images: ``value_range``, ``diversity`` (mean distance of two images, root mean square over pixels).
    """

    def __init__(self, count: int, shape: Sequence[int], num_classes: int, temperature: float | None = None) -> None:
        self.count, self.temperature = count, temperature
        self.histogram = torch.zeros(num_classes, dtype=torch.int64)
        self.confidence = self.divergence = 0.0
        self.matches = self.aimed = self.seen = self.agreed = self.compared = 0
        self.low, self.high = math.inf, -math.inf
        sample = min(count, SAMPLE, max(VALUES // math.prod(shape), 2))
        self.chosen = torch.arange(sample) * count // sample
        self.sample: list[Tensor] = []

    def add(self, pixels: Tensor, logits: Tensor, targets: Tensor | None, maker: Tensor | None = None) -> None:
        """Take in a chunk; its logits are float64."""
        answers = logits.argmax(1)
        self.histogram += answers.bincount(minlength=len(self.histogram))
        self.confidence += float(logits.softmax(1).amax(1).sum())
        if targets is not None:
            self.aimed += len(targets)
            self.matches += int((targets.argmax(1) == answers).sum())
            if self.temperature is not None:
                reached = (logits / self.temperature).log_softmax(1)
                self.divergence += float(F.kl_div(reached, targets.double(), reduction="sum"))
        if maker is not None:
            self.compared += len(maker)
            self.agreed += int((maker.argmax(1) == answers).sum())
        self.low, self.high = min(self.low, float(pixels.min())), max(self.high, float(pixels.max()))
        here = self.chosen - self.seen
        self.sample.append(pixels[here[(here >= 0) & (here < len(pixels))]])
        self.seen += len(pixels)

    def measures(self) -> dict[str, Any]:
        sample, balance = torch.cat(self.sample), torch.special.entr(self.histogram / self.count).sum()
        return {
            "confidence": self.confidence / self.count,
            "class_balance": float(balance) / math.log(len(self.histogram)),
            "class_histogram": self.histogram.tolist(),
            "target_match": self.matches / self.aimed if self.aimed else None,
            "target_divergence": self.divergence / self.aimed if self.aimed and self.temperature is not None else None,
            "agreement": self.agreed / self.compared if self.compared else None,
            "diversity": float(torch.pdist(sample.flatten(1)).double().mean()) / math.sqrt(sample[0].numel()),
            "value_range": [self.low, self.high],
        }


def _logits(teacher: Classifier, images: Images, device: torch.device, batch_size: int) -> Tensor:
    teacher = teacher.eval().to(device)
    return torch.cat([teacher(batch.to(device).pixels).float().cpu() for batch in images.split(batch_size)])


def bn_distances(seen: Mapping[str, LayerMoments], recorded: Mapping[str, Moments]) -> dict[str, float]:
    """``|mean - running_mean|_2 + |var - running_var|_2`` over the channels of each BatchNorm layer that ran.

    The statistic of DeepInversion (arXiv:1912.08795), with the mean and the variance of all images and positions.
    """
    return {
        name: float((ours.mean - theirs.mean).norm() + (ours.variance - theirs.variance).norm())
        for name, ours, theirs in _pairs(seen, recorded)
    }


def bn_divergences(seen: Mapping[str, LayerMoments], recorded: Mapping[str, Moments]) -> dict[str, float]:
    """``KL(N(running_mean, running_var) || N(mean, var))`` in nats, mean over the channels of each layer that ran.

    The similarity measure of The Knowledge Within (arXiv:1912.01274): low for images like those of the training.
    Channels that were dead in training, whose variance was below 1e-5, do not count, nor do layers of such channels.
    """
    return {
        name: float(layer_divergence(Moments(ours.mean, ours.variance), theirs))
        for name, ours, theirs in _pairs(seen, recorded)
        if (theirs.variance >= DEAD).any()
    }


def _pairs(
    seen: Mapping[str, LayerMoments], recorded: Mapping[str, Moments]
) -> Iterable[tuple[str, LayerMoments, Moments]]:
    """The layers that ran, both their moments in float64 on the CPU."""
    for name, ours in seen.items():
        theirs = recorded[name]
        yield name, ours, Moments(theirs.mean.double().cpu(), theirs.variance.double().cpu())
