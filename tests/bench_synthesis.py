"""What a round costs against the loop it cannot avoid: forward, loss, gradient to the images, update.

    python tests/bench_synthesis.py [--method NAME ...] [--rounds 5] [--iterations 50] [--batch-size 200] [--model SPEC]

Both sides in one process, in turn, same teacher, batch, loss and optimiser. The bare loop has no names, no Lightning,
nothing to write; ours is the whole of ``fit`` with everything it does. Prints the ratio of each pair and the median. A
new method is timed once its loss stands in ``LOSSES``, as plainly as PyTorch lets one write it.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command line sets it, before torch loads

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.artifacts.shards import ShardWriter
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.registry import build
from dfkd_cli.resolve import Settings, resolve
from dfkd_cli.rounds import fit
from dfkd_cli.ui import Terminal

Loss = Callable[[Tensor, Tensor], Tensor]  # of images and targets


def impressions(teacher: Classifier, config: Any) -> Loss:
    """ZSKD and class impressions: the tempered cross-entropy of pixels."""
    return lambda images, targets: F.cross_entropy(teacher(images) / config.temperature, targets)


def dream(teacher: Classifier, config: Any) -> Loss:
    """DeepDream: rolled images, and a smoothness prior."""

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        shift = torch.randint(-config.jitter, config.jitter + 1, (2,)).tolist()
        x = torch.roll(images, shift, (2, 3))
        variation = (
            (x[:, :, :, 1:] - x[:, :, :, :-1]).norm()
            + (x[:, :, 1:] - x[:, :, :-1]).norm()
            + (x[:, :, 1:, 1:] - x[:, :, :-1, :-1]).norm()
            + (x[:, :, 1:, :-1] - x[:, :, :-1, 1:]).norm()
        )
        return F.cross_entropy(teacher.net(x), targets) + config.total_variation * variation

    return loss


def inversion(teacher: Classifier, config: Any) -> Loss:
    """DeepInversion: DeepDream and the BatchNorm statistics."""
    distances: list[Tensor] = []

    def compare(layer: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        mean = inputs[0].mean((0, 2, 3), keepdim=True)
        count = inputs[0].numel() // inputs[0].shape[1]
        variance = (inputs[0] - mean).square().sum((0, 2, 3)) / (count - 1)
        distances.append((mean.flatten() - layer.running_mean).norm() + (variance - layer.running_var).norm())

    for layer in teacher.batch_norms():
        layer.register_forward_pre_hook(compare)
    without = dream(teacher, config)

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        distances.clear()
        return without(images, targets) + config.statistics * torch.stack(distances).sum()

    return loss


LOSSES = {"zskd": impressions, "class-impressions": impressions, "deepdream": dream, "deepinversion": inversion}


def fresh(spec: str, channels: int) -> Classifier:
    """An untrained teacher, the same for both sides."""
    torch.manual_seed(0)
    info = ModelInfo(spec, 10, (channels, 32, 32), (0.0,) * channels, (1.0,) * channels)
    teacher = Classifier(build(spec, 10, info.input_size), info).freeze()
    return teacher.to(memory_format=torch.channels_last) if channels > 1 else teacher


def bare(teacher: Classifier, settings: Settings, rounds: int) -> float:
    """Seconds of the loop that cannot be avoided."""
    config, classes = settings.method.config, teacher.info.num_classes
    loss = LOSSES[settings.method.entry.name](teacher, config)
    targets = torch.full((config.batch_size, classes), 1 / classes)
    start = time.perf_counter()
    for _ in range(rounds):
        images = torch.rand(config.batch_size, *teacher.info.input_size, requires_grad=True)
        optimizer = torch.optim.Adam([images], lr=config.lr, fused=True)
        for _ in range(config.iterations):
            (gradient,) = torch.autograd.grad(loss(images, targets), images)
            images.grad = gradient.contiguous()
            optimizer.step()
    return time.perf_counter() - start


def ours(teacher: Classifier, settings: Settings, rounds: int) -> float:
    """Seconds of the same work as ``dfkd synthesize`` does it, Trainer and shards included."""
    config = settings.method.config
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        run = RunDirectory(Path(directory), settings, [], {})
        writer = ShardWriter(Path(directory), {"shape": list(teacher.info.input_size), "dtype": config.dtype}, rounds)
        method = settings.method.entry.load()(teacher, config, rounds * config.batch_size, 0, writer)
        fit(method, run, Terminal(silent=True))
        return time.perf_counter() - start


def main() -> None:
    """Print one JSON line a pair, then each method's median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--model", help="default: lenet5, or resnet8 where BatchNorm is needed")
    for name, default in {"rounds": 5, "iterations": 50, "batch-size": 200, "pairs": 7, "channels": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    for name in a.method:
        values = {"method": name, "iterations": a.iterations, "batch_size": a.batch_size, "device": "cpu"}
        settings = resolve("synthesize", [("", values)])
        model = a.model or ("resnet8" if "batchnorm" in settings.method.entry.needs else "lenet5")
        work = vars(a) | {"method": name, "model": model, "threads": torch.get_num_threads()}
        say({"bench": "synthesis", "work": work})
        teacher = fresh(model, a.channels)
        warm = resolve("synthesize", [("", values | {"iterations": 2})])
        bare(fresh(model, a.channels), warm, 1)  # imports and first calls
        ours(teacher, warm, 1)
        ratios = []
        for _ in range(a.pairs):
            floor = bare(fresh(model, a.channels), settings, a.rounds)  # a new one: the loop leaves its hooks
            full = ours(teacher, settings, a.rounds)
            ratios.append(full / floor)
            say({"bare_s": round(floor, 3), "ours_s": round(full, 3), "ratio": round(ratios[-1], 3)})
        say({"method": name, "median_ratio": round(statistics.median(ratios), 3), "limit": 1.1})


def say(line: dict[str, Any]) -> None:
    """One line of the answer."""
    print(json.dumps(line), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
