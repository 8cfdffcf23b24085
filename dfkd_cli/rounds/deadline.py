"""Work that ends at a given time, after whole rounds."""

from __future__ import annotations

import time

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class Deadline(Callback):
    """Ends the rounds when the next one, as long as the mean of them, would end after the deadline.

    One round is done in any case. Time counts from here on: an earlier process of the same run has had its own.

    Args:
        seconds: How long the rounds may take.

    Attributes:
        rounds: How many this process has done.
        done: How many all processes of the run have done.
    """

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds, self.rounds, self.done = time.monotonic(), seconds, 0, 0

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.start

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop all processes together."""
        self.rounds, self.done = self.rounds + 1, trainer.current_epoch + 1
        late = self.elapsed * (self.rounds + 1) / self.rounds > self.seconds
        trainer.should_stop = bool(trainer.strategy.broadcast(late)) or trainer.should_stop
