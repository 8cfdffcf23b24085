"""Weights kept from rounds along a training, to see afterwards what another stopping point would have given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from dfkd_cli.artifacts.integrity import intact, on_record
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.directory import save_weights
from dfkd_cli.models.weights import load_weights

SNAPSHOTS = "snapshots"


class Snapshots(Callback):
    """Keeps a model's weights after evenly spaced rounds, the last among them.

    Args:
        run: Of the training.
        model: The model that is trained.
        directory: Where the model will be, in the run's directory or that itself. Its
            ``snapshots/round-00042.safetensors`` is the model after round 42, counted from 0.
        count: How many; no more than there are rounds.
        rounds: Rounds of the training.
    """

    def __init__(self, run: RunDirectory, model: Classifier, directory: Path, count: int, rounds: int) -> None:
        self.run, self.model = run, model
        count = min(count, rounds)
        chosen = {-(-rounds * (i + 1) // count) - 1 for i in range(count)}
        self.paths = {index: directory / SNAPSHOTS / f"round-{index:05d}.safetensors" for index in sorted(chosen)}

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write a snapshot when its round is done."""
        if trainer.current_epoch in self.paths:
            path = self.paths[trainer.current_epoch]
            self.run.keep(path, save_weights(path, self.model.net))


def look_back(directory: Path, model: Classifier) -> Iterator[int]:
    """Set ``model`` to each snapshot of a model directory in turn; yields the round that it is from.

    Raises:
        ArtifactError: One of them is damaged, or one that the run recorded is gone.
    """
    snapshots = directory / SNAPSHOTS
    for path in sorted({*snapshots.glob("round-*.safetensors"), *on_record(snapshots)}):
        load_weights(model.net, intact(path))
        yield int(path.stem.removeprefix("round-"))
