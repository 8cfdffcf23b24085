"""What a method costs against the loop it cannot avoid.

    python tests/bench_synthesis.py [--method NAME ...] [--rounds 3] [--iterations 30] [--batch-size 200] [--model SPEC]

Both sides in one process, same networks and batches; which goes first alternates, because a machine's speed drifts.
The bare loop has no names, no Lightning, nothing to write; ours is the whole of ``fit`` with everything it does. Prints
the ratio of each pair and the median.

- Methods that optimise images: forward, loss, gradient to the images, Adam. Each loss is written out below, as plainly
  as PyTorch lets one write it.
- Methods that train a generator: only the passes through the networks, forward and backward. Losses, optimisers,
  augmentation and the pool of images come on top in ours.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command line sets it, before torch loads

import argparse
import functools
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
from torchvision.transforms.v2.functional import gaussian_blur

from dfkd_cli import catalog
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.artifacts.shards import ShardWriter
from dfkd_cli.data.sources import Images, Source
from dfkd_cli.models.activations import pre_activations
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.generators import Generator
from dfkd_cli.models.registry import build
from dfkd_cli.rounds.trainer import fit
from dfkd_cli.settings import Settings, resolve
from dfkd_cli.stages.collect_metadata import collect
from dfkd_cli.synthesizers.base import SynthesisTask
from dfkd_cli.ui import Terminal

Loss = Callable[[Tensor, Tensor], Tensor]  # of images and targets

# -- methods that optimise images: their losses ------------------------------------------------------------------------


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


def at_batch_norms(
    teacher: Classifier, distance: Callable[[nn.BatchNorm2d, Tensor, Tensor], Tensor], correction: int
) -> list[Tensor]:
    """A list that gets the distance of each BatchNorm layer's input moments whenever the teacher runs."""
    distances: list[Tensor] = []

    def compare(layer: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        mean = inputs[0].mean((0, 2, 3), keepdim=True)
        count = inputs[0].numel() // inputs[0].shape[1]
        variance = (inputs[0] - mean).square().sum((0, 2, 3)) / (count - correction)
        distances.append(distance(layer, mean.flatten(), variance))

    for layer in teacher.batch_norms():
        layer.register_forward_pre_hook(compare)
    return distances


def inversion(teacher: Classifier, config: Any) -> Loss:
    """DeepInversion: DeepDream and the BatchNorm statistics."""

    def distance(layer: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> Tensor:
        return (mean - layer.running_mean).norm() + (variance - layer.running_var).norm()

    distances = at_batch_norms(teacher, distance, correction=1)
    without = dream(teacher, config)

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        distances.clear()
        return without(images, targets) + config.statistics * torch.stack(distances).sum()

    return loss


def smooth(teacher: Classifier, config: Any) -> Loss:
    """Inception: the cross-entropy and the squared distance to the blurred image."""
    size = 2 * min(int(-(-3 * config.blur // 1)), 31) + 1
    lines = torch.eye(teacher.info.input_size[1])[None]  # of square images
    blur = gaussian_blur(lines, [1, size], [config.blur, config.blur])[0]  # as a matrix, the fastest on a CPU

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        rough = (images - blur @ images @ blur.T).square().sum() / len(images)
        return F.cross_entropy(teacher.net(images) / config.temperature, targets) + config.smoothness * rough

    return loss


def gaussian_statistics(teacher: Classifier, config: Any) -> Loss:
    """The Knowledge Within: Inception and the divergence of the BatchNorm statistics."""

    def divergence(layer: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> Tensor:
        ratio = layer.running_var / variance
        return 0.5 * (ratio + (mean - layer.running_mean).square() / variance - 1 - ratio.log()).mean()

    divergences = at_batch_norms(teacher, divergence, correction=0)
    without = smooth(teacher, config)

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        divergences.clear()
        return without(images, targets) + config.statistics * torch.stack(divergences).mean()

    return loss


def soft_targets(teacher: Classifier, config: Any) -> Loss:
    """Soft targets: the divergence, and the size of the last feature maps."""
    features: list[Tensor] = []
    last = [layer for layer in teacher.net.modules() if isinstance(layer, nn.Conv2d)][-1]
    last.register_forward_hook(lambda _, inputs, output: features.append(output.relu()))

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        features.clear()
        logs = (teacher.net(images) / config.temperature).log_softmax(1)
        return F.kl_div(logs, targets, reduction="batchmean") - config.activation * features[0].abs().mean()

    return loss


def activations(teacher: Classifier, config: Any) -> Loss:
    """Lopes: the distance of all activations to given ones."""
    layers, outputs = pre_activations(teacher), dict[str, Tensor]()
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, inputs, output, name=name: outputs.update({name: output.flatten(1)}))
    with torch.no_grad():
        teacher(torch.rand(config.batch_size, *teacher.info.input_size))
    aims = {name: torch.randn_like(output).relu() for name, output in outputs.items()}

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        teacher(images)
        gaps = [(aims[name] - output.relu()).square().mean() / output.shape[1] for name, output in outputs.items()]
        return torch.stack(gaps).sum()

    return loss


def optimise(loss_of: Callable[[Classifier, Any], Loss], teacher: Classifier, config: Any, rounds: int) -> None:
    """The bare loop of a method that optimises images."""
    loss, classes = loss_of(teacher, config), teacher.info.num_classes
    targets = torch.full((config.batch_size, classes), 1 / classes)
    for _ in range(rounds):
        images = torch.rand(config.batch_size, *teacher.info.input_size, requires_grad=True)
        optimizer = torch.optim.Adam([images], lr=config.lr, fused=True)
        for _ in range(config.iterations):
            (gradient,) = torch.autograd.grad(loss(images, targets), images)
            images.grad = gradient.contiguous()
            optimizer.step()


def optimise_and_teach(teacher: Classifier, config: Any, rounds: int) -> None:
    """Adaptive DeepInversion: DeepInversion, the student's answers to it, and the student's steps."""
    student = fresh(teacher.info.spec, teacher.info.input_size[0]).requires_grad_(True)
    frozen = fresh(teacher.info.spec, teacher.info.input_size[0])  # the student's gradient goes to the images only

    def loss_of(teacher: Classifier, config: Any) -> Loss:
        without = inversion(teacher, config)
        return lambda images, targets: without(images, targets) + frozen.net(images).square().mean()

    optimise(loss_of, teacher, config, rounds)
    for _ in range(rounds * config.student_steps):
        teach(teacher, student, torch.rand(config.student_batch_size, *teacher.info.input_size))


# -- methods that train a generator: the passes ------------------------------------------------------------------------


def teach(teacher: Classifier, student: Classifier, images: Tensor) -> None:
    """The passes of one step of a student."""
    with torch.no_grad():
        teacher(images)
    student(images).square().mean().backward()


def networks(teacher: Classifier, config: Any) -> tuple[Generator, Classifier]:
    """The method's generator, and a student as small as the teacher."""
    generator = Generator(teacher.info, config.latent, getattr(config, "end", "sigmoid"), config.width)
    student = fresh(teacher.info.spec, teacher.info.input_size[0]).requires_grad_(True).train()
    return generator.to(memory_format=torch.channels_last), student


def stream(teacher: Classifier, config: Any, rounds: int) -> None:
    """Generator and student in turns."""
    generator, student = networks(teacher, config)
    trained = list(generator.parameters())
    latents = functools.partial(torch.randn, config.batch_size, config.latent)
    for _ in range(config.steps):
        images = generator(latents())
        answers = [teacher(images)]
        if getattr(config, "adversarial", 0):
            answers.append(student(images))
        torch.autograd.grad(torch.stack(answers).square().mean(), trained)
        images = images.detach()
        for step in range(config.student_steps):
            if config.student_images == "new" or (config.student_images == "updated" and step == 0):
                with torch.no_grad():
                    images = generator(latents())
                    teacher(images)
            student(images).square().mean().backward()


def pool(teacher: Classifier, config: Any, rounds: int) -> None:
    """Some steps of a generator for each batch of images, then the student's."""
    generator, student = networks(teacher, config)
    trained = list(generator.parameters())
    for _ in range(rounds):
        student.eval()
        for _ in range(config.iterations):
            images = generator(torch.randn(config.batch_size, config.latent))
            answers = [teacher(images)]
            if getattr(config, "contrast", 0):
                answers.append(teacher(images.flip(3)))
            if config.adversarial:
                answers.append(student(images))
            torch.autograd.grad(torch.stack(answers).square().mean(), trained)
        student.train()
        for _ in range(config.student_steps):
            teach(teacher, student, torch.rand(config.student_batch_size, *teacher.info.input_size))


BARE: dict[str, Callable[[Classifier, Any, int], None]] = {
    "zskd": functools.partial(optimise, impressions),
    "class-impressions": functools.partial(optimise, impressions),
    "deepdream": functools.partial(optimise, dream),
    "inception": functools.partial(optimise, smooth),
    "soft-target": functools.partial(optimise, soft_targets),
    "lopes": functools.partial(optimise, activations),
    "deepinversion": functools.partial(optimise, inversion),
    "bn-statistics": functools.partial(optimise, gaussian_statistics),
    "adaptive-deepinversion": optimise_and_teach,
    **dict.fromkeys(("dafl", "dfad", "zskt", "dfq"), stream),
    **dict.fromkeys(("cmi", "fast-dfkd", "nayer"), pool),
}
LIMITS = {stream: 1.15, pool: 1.15}  # of the others: 1.1


# -- both sides --------------------------------------------------------------------------------------------------------


def fresh(spec: str, channels: int) -> Classifier:
    """An untrained teacher, the same for both sides."""
    torch.manual_seed(0)
    info = ModelInfo(spec, 10, (channels, 32, 32), (0.0,) * channels, (1.0,) * channels)
    return Classifier(build(spec, 10, info.input_size), info).freeze().lay_out()


class Noise(Source):
    """Labelled noise, of which activation statistics are taken."""

    def __init__(self, info: ModelInfo) -> None:
        self.shape, self.dtype, self.sizes = info.input_size, torch.float32, [1000]

    def chunk(self, index: int) -> Images:
        return Images(torch.rand(1000, *self.shape), torch.arange(1000) % 10)


def bare(teacher: Classifier, settings: Settings, rounds: int) -> float:
    """Seconds of the loop that cannot be avoided."""
    start = time.perf_counter()
    BARE[settings.method.entry.name](teacher, settings.method.config, rounds)
    return time.perf_counter() - start


def ours(teacher: Classifier, settings: Settings, rounds: int) -> float:
    """Seconds of the work as ``dfkd synthesize`` does it, Trainer and shards included."""
    config, entry = settings.method.config, settings.method.entry
    extras: dict[str, Any] = {}
    if "student" in entry.needs:
        extras["student"] = fresh(teacher.info.spec, teacher.info.input_size[0]).requires_grad_(True)
    if "metadata" in entry.needs:
        few_units = 256  # with a covariance: its factors are made once, not in every round
        extras["metadata"] = collect(teacher, Noise(teacher.info), torch.device("cpu"), 200, 8.0, few_units)
    shards = 1 if BARE[entry.name] is stream else rounds
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        run = RunDirectory(Path(directory), settings, [], {})
        writer = ShardWriter(Path(directory), {"shape": list(teacher.info.input_size), "dtype": config.dtype}, shards)
        task = SynthesisTask(teacher, shards * config.batch_size, 0, writer, **extras)
        fit(entry.load()(task, config), run, Terminal(silent=True))
        return time.perf_counter() - start


def settled(name: str, batch_size: int, iterations: int, width: float) -> Settings:
    """The method's own defaults, at this size."""
    values: dict[str, Any] = {"method": name, "device": "cpu", "batch_size": batch_size}
    if BARE[name] in (stream, pool):
        values["width"] = width
    if BARE[name] is stream:
        values["steps"] = iterations
    else:
        values["iterations"] = iterations
    if BARE[name] in (pool, optimise_and_teach):
        values |= {"student_steps": iterations, "student_batch_size": batch_size}
    if BARE[name] is pool:
        values["warmup_share"] = 0.0
    return resolve("synthesize", [("", values)])


def main() -> None:
    """Print one JSON line a pair, then each method's median; exit 1 when one is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", nargs="+", choices=list(BARE), default=list(BARE))
    parser.add_argument("--model", help="default: lenet5, or resnet8 where BatchNorm is needed")
    parser.add_argument("--width", type=float, default=0.25, help="of the generator")
    parser.add_argument("--batch-size", type=int, help="default: 200, or 64 where BatchNorm is needed")
    for name, default in {"rounds": 3, "iterations": 30, "pairs": 4, "channels": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    above = []
    for name in a.method:
        slow = "batchnorm" in catalog.entries("synthesizers")[name].needs
        model, size = a.model or ("resnet8" if slow else "lenet5"), a.batch_size or (64 if slow else 200)
        settings, warm = (settled(name, size, iterations, a.width) for iterations in (a.iterations, 2))
        work = vars(a) | {"method": name, "model": model, "batch_size": size}
        say({"bench": "synthesis", "work": work, "threads": torch.get_num_threads()})
        sides = [bare, ours]
        for side in sides:
            side(fresh(model, a.channels), warm, 1)  # imports and first calls
        ratios = []
        for _ in range(a.pairs):
            took = {side: side(fresh(model, a.channels), settings, a.rounds) for side in sides}  # the loop leaves hooks
            ratios.append(took[ours] / took[bare])
            say({"bare_s": round(took[bare], 3), "ours_s": round(took[ours], 3), "ratio": round(ratios[-1], 3)})
            sides.reverse()
        limit = LIMITS.get(BARE[name], 1.1)
        say({"method": name, "median_ratio": round(statistics.median(ratios), 3), "limit": limit})
        above += [name] if statistics.median(ratios) > limit else []
    if above:
        raise SystemExit(f"above the limit: {', '.join(above)}")


def say(line: dict[str, Any]) -> None:
    """One line of the answer."""
    print(json.dumps(line), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
