"""Small stand-ins for what a test needs and does not test: labelled images, activation statistics, a run's inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from dfkd_cli import catalog
from dfkd_cli.artifacts.metadata import Metadata
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.artifacts.shards import ShardWriter
from dfkd_cli.config import build
from dfkd_cli.data.datasets import Dataset
from dfkd_cli.data.sources import RealSource
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.resolve import resolve
from dfkd_cli.rounds.learner import Learner
from dfkd_cli.rounds.trainer import CHECKPOINT, fit
from dfkd_cli.stages.collect_metadata import collect
from dfkd_cli.synthesizers.base import SynthesisTask, Synthesizer
from dfkd_cli.ui import Terminal


def work(learner: Learner, directory: Path, *callbacks: Callback) -> None:
    """All rounds of a learner, as a command does them in its directory."""
    run = RunDirectory(directory, resolve("synthesize", [("", {"method": "noise", "device": "cpu"})]), [], {})
    run.claim()
    with run.guard():
        fit(learner, run, Terminal(silent=True), callbacks)


def check_interruption(run: Callable[..., Learner], directory: Path) -> tuple[Learner, Learner]:
    """All rounds of a learner at once, and stopped before round 2 and continued: the same state, shards and curves.

    Args:
        run: ``run(directory, *callbacks)`` makes the learner and does its rounds.
        directory: Where both are run.
    """

    class Stop(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(directory / "stopped" / CHECKPOINT)
                raise ZeroDivisionError

    whole = run(directory / "whole")
    with pytest.raises(ZeroDivisionError):
        run(directory / "stopped", Stop())
    torch.manual_seed(99)
    resumed = run(directory / "stopped")
    state = resumed.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())
    for path in [*(directory / "whole").glob("shard-*"), directory / "whole" / "metrics.csv"]:
        assert path.read_bytes() == (directory / "stopped" / path.name).read_bytes(), path.name
    return whole, resumed


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
        "shape": list(info.input_size),
        "dtype": config.dtype,
        "num_classes": info.num_classes,
        "teacher": {"sha256": "0"},
        "seed": seed,
    }
    writer = ShardWriter(directory, head, -(-num_images // config.batch_size))
    return (cls or entry.load())(SynthesisTask(teacher, num_images, seed, writer, **extras), config)
