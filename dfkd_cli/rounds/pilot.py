"""How long the rounds of a run take, told from the first ones: the run is left after them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

LONG_ENOUGH = 5.0  # seconds that the rounds after the first must have taken
_piloted: list[Pilot] = []


class Left(BaseException):
    """The run is left. Not an ``Exception``, so that no handler of failures swallows it."""


class Pilot(Callback):
    """Leaves a run when its rounds are known well enough: after the second, or a first that was long.

    Attributes:
        starts: When rounds began, and when it was left: of the system's monotonic clock.
        rounds: How many there are in all.
        left: Whether it was left.
    """

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.rounds, self.left = 0, False

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """A round begins; what was saved after the one before belongs to that."""
        self.starts.append(time.monotonic())
        self.rounds = int(trainer.max_epochs or 0)
        first, *others = self.starts
        if others and (others[-1] - others[0] >= LONG_ENOUGH or others[0] - first >= 2 * LONG_ENOUGH):
            self.left = True
            raise Left

    def seconds(self) -> float:
        """How long all rounds take: the first, which also warms up, and each other as the mean of those that were done.

        Of a run that was left.
        """
        first, *others = self.starts
        spent = [others[0] - first, others[-1] - others[0]]
        each = spent[1] / (len(others) - 1) if len(others) > 1 else spent[0]
        return spent[0] + each * (self.rounds - 1)


@contextlib.contextmanager
def piloted() -> Iterator[Pilot]:
    """Leave the first run whose rounds begin inside the ``with`` block, and the block, when they are known."""
    pilot = Pilot()
    _piloted.append(pilot)
    try:
        with contextlib.suppress(Left):
            yield pilot
    finally:
        _piloted.clear()


def pilots() -> list[Pilot]:
    """What watches the rounds of this process."""
    return _piloted[:]
