"""Everything that learns or optimises is a LightningModule whose training step is one whole round.

One Lightning epoch is one round is one ``training_step``; inside it runs a loop of ours over many inner steps, so that
Lightning's cost per step does not show, and its checkpoints fall between rounds. Random state is derived from the seed
and the step, never saved: a run that was killed and continued is the run that was not.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import io
import logging
import math
import os
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dfkd_cli.artifacts.files import write_atomic
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.errors import ArtifactError, ConfigError, RunFailed, memory_can_end
from dfkd_cli.processes import records
from dfkd_cli.ui import Progress, Terminal

_PRECISION: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
CHECKPOINT = Path("checkpoints", "last.ckpt")
# Lightning sets this to keep processes fit to fork, which none of ours is; every step of Adam would load NVML anew.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
LASTING = 3  # rounds in a row that a concern must have lasted to be said, unless it is there at the end


class Learner(pl.LightningModule, ABC):
    """Work cut into rounds.

    Attributes:
        rounds: How many rounds there are.
        unit: What progress counts.
        scaled: Every gradient goes through Lightning, which scales losses where small ones would vanish in 16 bits.
        stateless: Rounds do not depend on each other; nothing has to be saved between them.
        teacher: The classifier that is frozen meanwhile, or None.
        note: What the user should know of this run from the start.
    """

    rounds: int
    note: str | None = None
    teacher: Any
    stateless = False
    scaled = True
    unit = "rounds"

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # the teacher is not in the checkpoint

    @abstractmethod
    def round(self, index: int) -> Mapping[str, Tensor]:
        """Do one round. Returns the named loss terms and measures to log, 0-d."""

    def done(self, rounds: int) -> int:
        """How many units are done after so many rounds."""
        return rounds

    def concern(self, measures: Mapping[str, float]) -> str | None:
        """What a round's measures say is going wrong, in words, or None: the work goes on."""
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
            with memory_can_end():
                terms = self.round(self.current_epoch)
            self.check_finite(terms, self.current_epoch)
        except RunFailed as error:
            failure = error
        # All processes stop together: one that only vanished would take the others down without a word.
        if not self.trainer.strategy.reduce_boolean_decision(failure is None, all=True):
            raise failure or RunFailed("another process of this run failed", "see its message")
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


def weighted_sum(terms: Mapping[str, Tensor], weights: Any) -> Tensor:
    """The terms times the attributes of the same names, summed."""
    return torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()


class _Keeper(Checkpoint):
    """Saves state, curves, manifest and the time worked between rounds: for at most two per cent of all the time."""

    def __init__(self, path: Path, run: RunDirectory) -> None:
        self.path, self.run = path, run
        self.next = 0.0

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Learner)
        start = time.monotonic()
        due = trainer.strategy.broadcast(start >= self.next or trainer.current_epoch + 1 == trainer.max_epochs)
        if not due:
            return
        for logger in trainer.loggers:  # before the state: a kill in between must not lose rows
            logger.save()
        if not module.stateless:
            trainer.save_checkpoint(self.path)
        if trainer.is_global_zero:
            module.keep()
            self.run.save()
        now = time.monotonic()
        self.next = now + max(1.0, 50 * (now - start))


class _Report(Callback):
    """Progress, one line of it, and concerns that last: each is said once and recorded."""

    def __init__(self, terminal: Terminal, run: RunDirectory) -> None:
        self.terminal, self.run, self.what = terminal, run, run.settings.command
        self.since: tuple[str | None, int] = None, 0  # what the last rounds had in common, and how many they were

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Learner)
        if module.note is not None:
            self.terminal.say(module.note)
        total, before = module.done(module.rounds), module.done(trainer.current_epoch)
        self.progress = Progress(self.terminal, self.what, module.unit, total, before)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        measures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown = " ".join(f"{name} {value:.4g}" for name, value in list(measures.items())[:3])
        assert isinstance(module, Learner)
        self.progress.update(module.done(trainer.current_epoch + 1), shown)
        concern = module.concern(measures)
        self.since = concern, self.since[1] + 1 if concern == self.since[0] else 1
        lasting = self.since[1] >= LASTING or trainer.current_epoch + 1 == trainer.max_epochs
        if concern is not None and lasting and self.run.concern(concern):
            self.terminal.say(f"warning: round {trainer.current_epoch}: {concern}")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.progress.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "progress"):
            self.progress.close()


class _AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or absent, whatever kills the process."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(Path(path), buffer.getvalue())


class MetricsFile(Logger):
    """``metrics.csv``: one row per round. Rows that a continued run repeats are replaced by themselves.

    Attributes:
        rows: Of each round; of a file that is damaged none.
    """

    name = "metrics"
    version = 0

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(FileNotFoundError, KeyError, TypeError, ValueError), path.open(newline="") as file:
            self.rows = {int(row["round"]): row for row in csv.DictReader(file)}

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Take a row; ``epoch`` is Lightning's name of the round."""
        index = int(metrics.pop("epoch"))
        self.rows[index] = {"round": index, **metrics}

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Hyper-parameters are in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """Write the file."""
        write_csv(self.path, [self.rows[index] for index in sorted(self.rows)])

    def finalize(self, status: str) -> None:
        """Curves of an interrupted run are saved with its checkpoints."""
        if status == "success":
            self.save()


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows under the union of their keys."""
    rows = list(rows)
    buffer = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, buffer.getvalue().encode())


class _Independent(DDPStrategy):
    """Processes that share rounds but no gradients: modules without trainable parameters cannot be wrapped."""

    def configure_ddp(self) -> None:
        if self.model is not None and any(parameter.requires_grad for parameter in self.model.parameters()):
            super().configure_ddp()


def trainer_for(run: RunDirectory, loggers: list[Logger], **more: Any) -> pl.Trainer:
    """Lightning's Trainer as this project uses it.

    Raises:
        ConfigError: The device or precision is not to be had on this machine.
    """
    _hush()
    _keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # --precision says what arithmetic is meant
    settings = run.settings.run
    if settings.logger == "tensorboard":
        try:
            from lightning.pytorch.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(run.path, name="tensorboard", version=""))
        except ModuleNotFoundError:
            raise ConfigError("tensorboard is not installed", "pip install 'dfkd[tensorboard]'") from None
    try:
        trainer = pl.Trainer(
            accelerator=settings.device,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=_Independent() if settings.devices * settings.num_nodes > 1 else "auto",
            precision=_PRECISION[settings.precision],
            plugins=[_AtomicCheckpoints(), LightningEnvironment()],
            logger=loggers,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            **more,
        )
        # Of this run: Lightning takes it from whatever launcher's environment this process is in.
        rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]  # a function's attribute
        return trainer
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise ConfigError(f"--device {settings.device} --precision {settings.precision}: {error}") from None


def fit(learner: Learner, run: RunDirectory, terminal: Terminal, callbacks: Sequence[Callback] = ()) -> None:
    """Do the rounds that are still to be done, with more ``callbacks`` of Lightning's; then thaw the teacher.

    Raises:
        RunFailed: Non-finite loss; the state of the last saved round is kept.
        ArtifactError: The checkpoint of an earlier process is damaged.
    """
    path = run.path / CHECKPOINT
    if run.settings.run.precision == "16" and not learner.scaled:
        raise ConfigError("--precision 16: gradients of images would vanish in it", "give --precision bf16")
    if not learner.rounds:
        return
    curves = MetricsFile(run.path / "metrics.csv")
    loggers: list[Logger] = [] if learner.stateless else [curves]
    own = [_Report(terminal, run), _Keeper(path, run)]
    trainer = trainer_for(run, loggers, max_epochs=learner.rounds, callbacks=[*callbacks, *own])
    run.record["device"] = str(trainer.strategy.root_device)
    resume = path if path.exists() and not learner.stateless else None
    if resume is not None:
        try:
            last = torch.load(resume, map_location="meta", weights_only=True)["epoch"]
        except Exception as error:
            raise ArtifactError(f"{path}: not a readable checkpoint", "give --overwrite to start afresh") from error
        if not (learner.can_continue(last + 1) and curves.rows.keys() >= set(range(last + 1))):
            terminal.say(f"{run.path}: what earlier rounds wrote is damaged or gone; all rounds are done again")
            resume = None
    try:
        trainer.fit(learner, DataLoader(TensorDataset(torch.zeros(1))), ckpt_path=resume, weights_only=True)
    finally:
        if learner.teacher is not None:
            learner.teacher.thaw()
    if not records():
        sys.exit()  # its share is done; the first process of all writes the result


def _keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of returning them to the system and faulting in new pages.

    On CPUs that costs the activations of every step 10 to 40 per cent of the time. Elsewhere this does nothing.
    """
    mmap_threshold, trim_threshold = -3, -1  # from malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def _hush() -> None:
    """Lightning's messages are not part of this command's conversation."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    warnings.filterwarnings("ignore", category=FutureWarning)
