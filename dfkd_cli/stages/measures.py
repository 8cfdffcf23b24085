"""What is measured of a model: its answers on images, and its cost."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.classification import MulticlassCalibrationError, MulticlassStatScores

from dfkd_cli.data.sources import Images, Source
from dfkd_cli.models.classifier import Classifier

BATCH = 500  # images of a forward pass
CPU = torch.device("cpu")


def batches(source: Source, size: int, device: torch.device) -> Iterator[Images]:
    """Every image of a source once, in order, at most ``size`` of one chunk at a time, on a device as float32."""
    for index in range(len(source.sizes)):
        for part in source.chunk(index).split(size):
            yield part.to(device)


def share(hits: Tensor) -> float:
    """The share of True: float64, so that 19 of 20 is 0.95 and no gate at 0.95 sees less."""
    return float(hits.double().mean())


def top1(model: Classifier, source: Source) -> float:
    """Share of the labelled images whose label the model gives."""
    return _share_given(model, source, lambda images: images.true_labels)


def agreement(student: Classifier, teacher: Classifier, source: Source) -> float:
    """Share of images on which two models give the same class."""
    teacher.eval().to(student.mean.device)
    return _share_given(student, source, lambda images: teacher(images.pixels).argmax(1))


@torch.no_grad()
def _share_given(model: Classifier, source: Source, expected: Callable[[Images], Tensor]) -> float:
    # Counted batch by batch: answers kept among the large buffers of a long set would hold on to their memory.
    model.eval()
    device = model.mean.device
    right = sum(int((model(i.pixels).argmax(1) == expected(i)).sum()) for i in batches(source, BATCH, device))
    return right / len(source)


@torch.no_grad()
def examine(
    model: Classifier, source: Source, classes: Sequence[str], device: torch.device, batch_size: int = BATCH
) -> tuple[dict[str, Any], Tensor]:
    """Accuracy and calibration on labelled images, in one pass.

    Returns:
        ``top1`` and ``top5`` (shares; top-K of fewer than five classes), ``nll`` (nats per image), ``ece`` (15 bins of
        equal width, weighted absolute gaps), ``per_class`` (share right by class name, NaN without images); and the
        class (N,) that the model gives each image, on the CPU.
    """
    model, count = model.eval().to(device), len(classes)
    # Counts, because torchmetrics' ready accuracies are rounded to float32.
    by_class = MulticlassStatScores(count, average="none").to(device)
    in_five = MulticlassStatScores(count, average="micro", top_k=min(5, count)).to(device)
    ece = MulticlassCalibrationError(count, n_bins=15, norm="l1").to(device)
    nll, given = 0.0, []
    for images in batches(source, batch_size, device):
        assert images.labels is not None
        logits = model(images.pixels).float()
        by_class.update(logits, images.labels)
        in_five.update(logits, images.labels)
        # Not logits: where all lie in [0,1] they would be taken for probabilities. Below 1: exactly 1 has a 16th bin.
        ece.update(logits.softmax(1).clamp(max=1 - 2**-24), images.labels)
        nll += float(F.cross_entropy(logits, images.labels, reduction="sum"))
        given.append(logits.argmax(1).cpu())
    right, *_, present = by_class.compute().cpu().double().unbind(1)
    measures = {
        "top1": float(right.sum() / present.sum()),
        "top5": int(in_five.compute()[0]) / len(source),
        "nll": nll / len(source),
        "ece": float(ece.compute()) if math.isfinite(nll) else math.nan,  # torchmetrics counts NaN as 0
        "per_class": dict(zip(classes, (right / present).tolist(), strict=True)),
    }
    return measures, torch.cat(given)


@torch.no_grad()
def cost(model: Classifier, device: torch.device) -> dict[str, Any]:
    """``parameters``; ``macs``, the multiply-accumulates of one image in matrix products and convolutions.

    Also ``latency_ms``: the median time of one image alone, on ``device``, with one thread.
    """
    model = model.eval().to(device)
    image = torch.zeros(1, *model.info.input_size, device=device)
    with FlopCounterMode(display=False) as flops:
        model(image)
    # Importing the timer loads PyTorch's compiler of extensions, which warns about compilers that are not needed here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    timer = Timer("model(image)", globals={"model": model, "image": image}, num_threads=1)
    return {
        "parameters": model.num_parameters,
        "macs": flops.get_total_flops() // 2,
        "latency_ms": 1000 * timer.blocked_autorange().median,
    }


def finite(value: Any) -> Any:
    """Measures as JSON can have them: NaN and infinities, such as the accuracy in a class without images, are None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
