"""What is measured of data impressions: what the teacher says about them, how varied and how plausible they are."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_cli.artifacts.shards import ShardReader
from dfkd_cli.data.sources import Images
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.stages.measures import BATCH, CPU, split

SAMPLE = 1000  # images, evenly spaced, for what is too slow or too large for all of them
TOLERANCE = 1e-3  # of logits recomputed on another machine


@torch.no_grad()
def measure_shards(
    reader: ShardReader, teacher: Classifier | None, device: torch.device, batch_size: int = BATCH
) -> dict[str, Any]:
    """Read every shard once and measure it; shares are of all images.

    Args:
        reader: The shards.
        teacher: The one they were made from, where it is at hand.
        device: Where the teacher runs.
        batch_size: Images of a forward pass.

    Returns:
        Of the stored logits: ``count``, ``confidence`` (mean greatest probability), ``class_histogram`` (images by the
        class given), ``class_balance`` (its entropy as a share of the greatest possible: 1 is balanced).
        Of the stored targets, None without them: ``target_match`` (share whose most probable class is the one given),
        ``target_divergence`` (mean KL(target || softmax(logits / temperature)), nats, at the method's temperature).
        Of the images: ``value_range``, ``diversity`` (mean distance of two images, root mean square over pixels).
        With the teacher, else None: ``logits_ok`` (whether the stored logits are its answers), ``bn_distance`` and
        ``bn_distance_layers`` (see :func:`bn_distances`; None without BatchNorm).
    """
    count = sum(reader.sizes)
    chosen = torch.arange(min(count, SAMPLE)) * count // min(count, SAMPLE)
    temperature = reader.manifest.get("config", {}).get("temperature", 1.0)
    histogram = torch.zeros(reader.num_classes, dtype=torch.int64)
    confidence = divergence = 0.0
    matches = aimed = first = 0
    low, high = math.inf, -math.inf
    sample: list[Tensor] = []
    logits_ok = True
    for index, size in enumerate(reader.sizes):
        shard = reader.read(index)
        logits, targets = shard["logits"].double(), shard.get("targets")
        given = logits.argmax(1)
        histogram += given.bincount(minlength=reader.num_classes)
        confidence += float(logits.softmax(1).amax(1).sum())
        if targets is not None:
            aimed += size
            matches += int((targets.argmax(1) == given).sum())
            divergence += float(F.kl_div((logits / temperature).log_softmax(1), targets.double(), reduction="sum"))
        images = Images(shard["images"]).to(CPU)
        low, high = min(low, float(images.pixels.min())), max(high, float(images.pixels.max()))
        sample.append(images.pixels[chosen[(chosen >= first) & (chosen < first + size)] - first])
        if teacher is not None:
            logits_ok &= torch.allclose(_logits(teacher, images, device, batch_size), shard["logits"], atol=TOLERANCE)
        first += size
    drawn = torch.cat(sample)
    layers = bn_distances(teacher, drawn, device, batch_size) if teacher is not None else []
    return {
        "count": count,
        "confidence": confidence / count,
        "class_balance": float(torch.special.entr(histogram / count).sum()) / math.log(reader.num_classes),
        "class_histogram": histogram.tolist(),
        "target_match": matches / aimed if aimed else None,
        "target_divergence": divergence / aimed if aimed else None,
        "diversity": float(torch.pdist(drawn.flatten(1)).double().mean()) / math.sqrt(drawn[0].numel()),
        "value_range": [low, high],
        "bn_distance": sum(layers) if layers else None,
        "bn_distance_layers": layers or None,
        "logits_ok": logits_ok if teacher is not None else None,
    }


def _logits(teacher: Classifier, images: Images, device: torch.device, batch_size: int) -> Tensor:
    teacher = teacher.eval().to(device)
    return torch.cat([teacher(batch.pixels).float().cpu() for batch in split(images, batch_size, device)])


@torch.no_grad()
def bn_distances(teacher: Classifier, images: Tensor, device: torch.device, batch_size: int = BATCH) -> list[float]:
    """How far the input of each BatchNorm layer is from what the layer saw in training, on images (N, C, H, W).

    ``|mean - running_mean|_2 + |var - running_var|_2`` over channels, the statistic of DeepInversion
    (arXiv:1912.08795), with the mean and the biased variance of all images and positions. In module order, without
    layers that the teacher does not run.
    """
    layers = teacher.batch_norms()
    seen = [Moments() for _ in layers]
    with contextlib.ExitStack() as hooks:
        for layer, moments in zip(layers, seen, strict=True):
            hook = layer.register_forward_pre_hook(lambda _, inputs, moments=moments: moments.add(inputs[0]))
            hooks.callback(hook.remove)
        if layers:
            _logits(teacher, Images(images), device, batch_size)
    return [
        float(
            (moments.mean - layer.get_buffer("running_mean").cpu()).norm()
            + (moments.variance - layer.get_buffer("running_var").cpu()).norm()
        )
        for layer, moments in zip(layers, seen, strict=True)
        if moments.count
    ]


class Moments:
    """Mean and biased variance per channel of activations (B, C, ...) that come in batches, as if they came at once.

    Attributes:
        count: Values per channel so far.
        mean: (C,) float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._squares = torch.zeros((), dtype=torch.float64)

    @property
    def variance(self) -> Tensor:
        """(C,) float64."""
        return self._squares / self.count

    def add(self, batch: Tensor) -> None:
        """Take in a batch: the pairwise update of Chan, Golub and LeVeque, which loses no digits to cancellation."""
        values = batch.transpose(0, 1).flatten(1)
        variance, mean = (moment.cpu().double() for moment in torch.var_mean(values, dim=1, correction=0))
        new = values.shape[1]
        shift, total = mean - self.mean, self.count + new
        self._squares = self._squares + variance * new + shift**2 * (self.count * new / total)
        self.mean = self.mean + shift * (new / total)
        self.count = total
