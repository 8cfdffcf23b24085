"""Work cut into rounds: what training regimes and synthesizers are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from dfkd_cli.errors import DfkdError, RunFailed, machine_can_fail


class Learner(pl.LightningModule, ABC):
    """A training or a synthesis, whose work is cut into rounds.

    Attributes:
        rounds: How many rounds there are.
        unit: What the progress bar counts: steps, images, iterations.
        scaled: Whether every gradient is computed by Lightning, which scales losses so that small gradients survive
            16-bit arithmetic. Where a learner computes gradients itself, ``--precision 16`` is refused.
        stateless: Whether rounds are independent of each other, so that no checkpoint is needed to continue.
        teacher: The classifier that is frozen while the rounds are done, or None.
        note: What the user is told when the run starts, or None.
        measures: The terms and measures of the latest round.
        takes_memory: The options that decide how much memory is taken, for who runs out of it.
    """

    rounds: int
    measures: Mapping[str, Tensor] = MappingProxyType({})
    note: str | None = None
    teacher: Any
    stateless = False
    scaled = True
    unit = "rounds"
    takes_memory = "--batch-size"

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # the teacher is not in the checkpoint

    @property
    def current_round(self) -> int:
        """The index of the round that is being done; Lightning calls a round an epoch."""
        return self.current_epoch

    @abstractmethod
    def round(self, index: int) -> Mapping[str, Tensor]:
        """Do one round. Returns the named loss terms and measures to log, 0-d."""

    def done(self, rounds: int) -> int:
        """How much is done after so many rounds, counted in ``unit``."""
        return rounds

    def concern(self, measures: Mapping[str, float]) -> str | None:
        """What is going wrong, judging by a round's measures, as a warning for the user; None where all is well."""
        return None

    def can_continue(self, index: int) -> bool:
        """Whether what the rounds before ``index`` left on disk is still there; they are done anew if it is not."""
        return True

    def keep(self) -> None:
        """Write what is kept beside checkpoints, as often as these. Called in the first process; nothing by default."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One round; stops the run when a term is not finite."""
        failure = None
        try:
            with machine_can_fail(self.takes_memory):
                terms = self.round(self.current_round)
            self.check_finite(terms, self.current_round)
        except DfkdError as error:
            failure = error
        # All processes stop together: one that only vanished would take the others down without a word.
        if not self.trainer.strategy.reduce_boolean_decision(failure is None, all=True):
            raise failure or RunFailed("another process of this run failed", "see its message")
        self.measures = terms
        self.log_dict(dict(terms), on_step=True, on_epoch=False)

    @staticmethod
    def check_finite(terms: Mapping[str, Tensor], index: int) -> None:
        """Raise :class:`RunFailed` when a term of round ``index`` is not finite."""
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        if bad:
            raise RunFailed(
                f"round {index}: {', '.join(bad)} is not finite",
                "lower --lr, or --student-lr of a student in the loop, or use --precision 32; with --overwrite",
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The teacher is frozen and on disk already: it is no part of the state."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith("teacher.")}

    def on_train_end(self) -> None:
        """Processes leave together."""
        self.trainer.strategy.barrier()

    def configure_optimizers(self) -> Any:
        """No optimiser that outlives a round, unless a subclass has one."""


def fusible(parameters: Iterable[Tensor]) -> bool:
    """Whether one kernel of Adam's can take them all: it knows no complex numbers."""
    return not any(map(torch.is_complex, parameters))


def weighted_sum(terms: Mapping[str, Tensor], weights: Any) -> Tensor:
    """The terms, 0-d, times the attributes of the same names, summed."""
    if several := [name for name, term in terms.items() if term.ndim]:
        raise TypeError(f"{', '.join(several)}: a term is 0-d, and not of shape {tuple(terms[several[0]].shape)}")
    return torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
