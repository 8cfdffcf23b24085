"""Weights kept from rounds along a training, to see afterwards what another stopping point would have given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.directory import save_weights
from dfkd_cli.models.weights import load_weights

SNAPSHOTS = "snapshots"


class Snapshots(Callback):
    """Keeps a model's weights after evenly spaced rounds, the last among them.

    Args:
        directory: Where they go: ``round-00042.safetensors`` is what the model was after round 42, counted from 0.
        model: The model that is trained.
        count: How many; 0 for none.
        rounds: Rounds of the training.
    """

    def __init__(self, directory: Path, model: Classifier, count: int, rounds: int) -> None:
        self.model = model
        chosen = {-(-rounds * (i + 1) // count) - 1 for i in range(count)}
        self.paths = {index: directory / f"round-{index:05d}.safetensors" for index in sorted(chosen)}

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write a snapshot when its round is done."""
        if trainer.current_epoch in self.paths:
            save_weights(self.paths[trainer.current_epoch], self.model.net)


def look_back(directory: Path, model: Classifier) -> Iterator[int]:
    """Set ``model`` to each snapshot of a model directory in turn; yields the round that it is from."""
    for path in sorted((directory / SNAPSHOTS).glob("round-*.safetensors")):
        load_weights(model.net, path)
        yield int(path.stem.removeprefix("round-"))
