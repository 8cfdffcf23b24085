"""Small stand-ins for what a test needs and does not test: networks, labelled images, shards, a run's inputs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from dfkd_cli import catalog
from dfkd_cli.artifacts.metadata import Metadata
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.artifacts.shards import ShardWriter
from dfkd_cli.config import build
from dfkd_cli.data.datasets import Dataset
from dfkd_cli.data.sources import Images, RealSource, Source
from dfkd_cli.models import registry
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.options import Augmentation
from dfkd_cli.rounds.learner import Learner
from dfkd_cli.rounds.trainer import CHECKPOINT, fit
from dfkd_cli.settings import resolve
from dfkd_cli.stages.collect_metadata import collect
from dfkd_cli.synthesizers.base import SynthesisTask, Synthesizer
from dfkd_cli.ui import Terminal

STILL = {f.name: 0 for f in dataclasses.fields(Augmentation) if f.type in ("int", "float")}  # no augmentation


class Given(Source):
    """Images (N, C, H, W), with labels or without, in one chunk."""

    def __init__(self, pixels: Tensor, labels: Tensor | None = None) -> None:
        self.images, self.labelled = Images(pixels, labels), labels is not None
        self.sizes, self.shape, self.dtype = [len(pixels)], tuple(pixels.shape[1:]), pixels.dtype

    def chunk(self, index: int) -> Images:
        return self.images


def work(learner: Learner, directory: Path, *callbacks: Callback) -> Learner:
    """All rounds of a learner, as a command does them in its directory."""
    run = RunDirectory(directory, resolve("synthesize", [("", {"method": "noise", "device": "cpu"})]), [], {})
    run.claim()
    with run.guard():
        fit(learner, run, Terminal(silent=True), callbacks)
    return learner


def check_interruption(run: Callable[..., Learner], directory: Path) -> tuple[Learner, Learner]:
    """All rounds of a learner at once, and stopped before round 2 and continued: the same state, shards and curves.

    Args:
        run: ``run(directory, *callbacks)`` makes the learner and does its rounds.
        directory: Where both are run.
    """

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                for logger in trainer.loggers:
                    logger.save()
                trainer.save_checkpoint(directory / "stopped" / CHECKPOINT)
                raise ZeroDivisionError

    class Watch(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            rounds.append(trainer.current_epoch)

    rounds: list[int] = []
    whole = run(directory / "whole")
    with pytest.raises(ZeroDivisionError):
        run(directory / "stopped", Stop())
    torch.manual_seed(99)
    resumed = run(directory / "stopped", Watch())
    assert rounds == [*range(2, whole.rounds)], "continued where it was stopped"
    state = resumed.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())
    for path in [*(directory / "whole").glob("shard-*"), directory / "whole" / "metrics.csv"]:
        assert path.read_bytes() == (directory / "stopped" / path.name).read_bytes(), path.name
    return whole, resumed


def classifier(net: nn.Module | None = None, spec: str = "lenet5", size=(1, 32, 32), classes: int = 10) -> Classifier:
    """A network as the classifier of images of some size; a new one of the built-in SPEC where none is passed."""
    channels = size[0]
    info = ModelInfo(spec, classes, size, mean=(0.25,) * channels, std=(0.5,) * channels)
    return Classifier(net or registry.build(spec, classes, size), info)


def random_images(info: ModelInfo, count: int, chunk: int = 1000) -> RealSource:
    """Noise, labelled with the classes in turn."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, *info.input_size), dtype=torch.uint8, generator=generator)
    classes = tuple(str(label) for label in range(info.num_classes))
    labels = torch.arange(count) % info.num_classes
    return RealSource(Dataset("noise", "train", classes, info.input_size, labels, pixels), chunk=chunk)


def statistics_of(classifier: Classifier, count: int = 30, covariance_units: int = 300) -> Metadata:
    """Activation statistics of a classifier on random images."""
    source = random_images(classifier.info, count)
    return collect(copy.deepcopy(classifier), source, torch.device("cpu"), 10, 8.0, covariance_units)


def write_shards(
    path: Path, teacher: Classifier, sha256: str, *, targets: bool = True, shift: float = 0.0, sizes=(5, 5, 3)
) -> dict[str, np.ndarray]:
    """Write random impressions, and return all that is in them in float64. ``shift`` falsifies the stored logits."""
    generator, info = torch.Generator().manual_seed(1), teacher.info
    head = {
        "method": "zskd",
        "config": {"temperature": 3.0},
        "shape": list(info.input_size),
        "dtype": "float16",
        "num_classes": info.num_classes,
        "teacher": {"sha256": sha256, "spec": info.spec},
    }
    writer, written = ShardWriter(path, head, len(sizes)), []
    for index, size in enumerate(sizes):
        images = (torch.randn(size, *info.input_size, generator=generator) * 2).half()
        with torch.no_grad():
            shard = {"images": images, "logits": teacher.eval()(images.float()) + shift}
        if targets:
            shard["targets"] = torch.rand(size, info.num_classes, generator=generator).pow(4).softmax(1)
            shard["targets"][0] = torch.eye(info.num_classes)[0]  # zeros have no logarithm
        writer.write(index, shard, {})
        written.append(shard)
    writer.write_manifest()
    return {name: np.concatenate([shard[name].double().numpy() for shard in written]) for name in written[0]}


def synthesizer(
    name: str,
    directory: Path,
    teacher: Classifier,
    values: dict[str, Any],
    num_images: int = 6,
    seed: int = 0,
    cls: type[Synthesizer] | None = None,
    **extras: Any,
) -> Synthesizer:
    """A method as ``synthesize`` makes it: its settings changed by ``values``, ``extras`` beside the teacher."""
    entry, info = catalog.entries("synthesizers")[name], teacher.info
    config = build(entry.config, values)
    head = {
        "method": name,
        "shape": list(info.input_size),
        "dtype": config.dtype,
        "num_classes": info.num_classes,
        "teacher": {"sha256": "0"},
        "seed": seed,
    }
    writer = ShardWriter(directory, head, -(-num_images // config.of_a_shard))
    return (cls or entry.load())(SynthesisTask(teacher, num_images, seed, writer, **extras), config)
