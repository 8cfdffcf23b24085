"""Lightning's Trainer as this project uses it: it continues what an earlier process began, and saves on the way."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
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
from torch.utils.data import DataLoader, TensorDataset

from dfkd_cli.artifacts.files import write_atomic
from dfkd_cli.artifacts.pickles import read_pickle
from dfkd_cli.artifacts.run import AFRESH, RunDirectory
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.processes import first_process, machine, stop_on_signals, writes_records
from dfkd_cli.rounds.curves import MetricsFile
from dfkd_cli.rounds.launcher import Launcher
from dfkd_cli.rounds.learner import Learner
from dfkd_cli.rounds.pilot import pilots
from dfkd_cli.trust import CONFIG
from dfkd_cli.ui import Progress, Terminal

_PRECISION: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
CHECKPOINT = Path("checkpoints", "last.ckpt")
SAVED = "dfkd"  # our part of it
# Lightning sets this to keep processes fit to fork, which none of ours is; every step of Adam would load NVML anew.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
LASTING = 3  # rounds in a row that a concern must have lasted to be said, unless it is there at the end


def fit(learner: Learner, run: RunDirectory, terminal: Terminal, callbacks: Sequence[Callback] = ()) -> None:
    """Do the rounds that are still to be done, with more ``callbacks`` of Lightning's.

    Raises:
        RunFailed: Non-finite loss; the state of the last saved round is kept.
        ArtifactError: The checkpoint of an earlier process is damaged.
    """
    if run.settings.run.precision == "16" and not learner.scaled:
        raise ConfigError("--precision 16: gradients of images would vanish in it", "give --precision bf16")
    if not learner.rounds:
        return
    curves = MetricsFile(run.path / "metrics.csv")
    callbacks = [*callbacks, _Report(terminal, run), _Keeper(run, curves), *pilots()]
    trainer = trainer_for(run, [] if learner.stateless else [curves], learner.rounds, callbacks)
    run.record["device"] = str(trainer.strategy.root_device)
    start = _saved_state(learner, run, curves, terminal)
    if not learner.stateless:
        begun_by = run.record.get("processes", trainer.world_size)
        if start is not None and begun_by != trainer.world_size:
            run.warn(
                f"it was begun in {begun_by} and goes on in {trainer.world_size} processes, which share each batch: "
                "the result is that of neither number",
                terminal,
            )
        run.record["processes"] = trainer.world_size
    launcher = trainer.strategy.launcher
    with launcher.together(run, terminal) if isinstance(launcher, Launcher) else contextlib.nullcontext():
        trainer.fit(learner, DataLoader(TensorDataset(torch.zeros(1))), ckpt_path=start, weights_only=True)
    if not writes_records():
        sys.exit()  # its share is done; the first process of all writes the result


def _saved_state(learner: Learner, run: RunDirectory, curves: MetricsFile, terminal: Terminal) -> Path | None:
    """The checkpoint of an earlier process; None where there is none, or what belongs to it is damaged or gone."""
    path = run.path / CHECKPOINT
    if learner.stateless or not path.exists():
        return None
    try:
        state = read_pickle(path, "meta")
        done, saved = state["epoch"] + 1, state[SAVED]
        ours = done in range(1, learner.rounds + 1) and saved["id"] == run.record["id"]
        # Not the settings: this process has written its own, which may differ in what decides no result.
        kept = {name: sha256 for name, sha256 in saved["kept"].items() if name != CONFIG}
        run.record["kept"] |= kept
        files_whole, recorded = all(run.kept(run.path / name) for name in kept), saved["curves"]
    except Exception as error:
        raise ArtifactError(f"{path}: not a readable checkpoint", AFRESH) from error
    if not ours and writes_records():  # the first of all processes has the record
        raise ArtifactError(f"{path}: the checkpoint of another run", AFRESH)
    rows = curves.digest(done)
    curves_whole = rows is not None and rows == recorded
    if files_whole and curves_whole and learner.can_continue(done):  # which may take over what it finds: it comes last
        return path
    terminal.say(f"{run.path}: what earlier rounds wrote is damaged or gone; all rounds are done again")
    return None


class _Keeper(Checkpoint):
    """Saves state, curves, manifest and the time worked between rounds: for at most two per cent of all the time."""

    def __init__(self, run: RunDirectory, curves: MetricsFile) -> None:
        self.run, self.curves = run, curves
        self.next = 0.0

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Of which run the state is, and what it comes with: the continued run must find the same."""
        rows = self.curves.digest(checkpoint["epoch"] + 1)
        checkpoint[SAVED] = {"id": self.run.record["id"], "kept": dict(self.run.record["kept"]), "curves": rows}

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Learner)
        start = time.monotonic()
        last = trainer.should_stop or module.current_round + 1 == trainer.max_epochs
        due = trainer.strategy.broadcast(start >= self.next or last)
        if not due:
            return
        for logger in trainer.loggers:  # before the state: a kill in between must not lose rows
            logger.save()
        if not module.stateless:
            trainer.save_checkpoint(self.run.path / CHECKPOINT)
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
        stop_on_signals()  # Lightning's handler of SIGTERM would talk to processes that do not listen
        if module.note is not None:
            self.terminal.say(module.note)
        total, before = module.done(module.rounds), module.done(module.current_round)
        self.progress = Progress(self.terminal, self.what, module.unit, total, before)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Learner)
        measures = {name: float(value) for name, value in module.measures.items()}  # Lightning's are of all rounds
        shown = " ".join(f"{name} {value:.4g}" for name, value in list(measures.items())[:3])
        self.progress.update(module.done(module.current_round + 1), shown)
        concern = module.concern(measures)
        self.since = concern, self.since[1] + 1 if concern == self.since[0] else 1
        ended = trainer.should_stop or module.current_round + 1 == trainer.max_epochs
        lasting = self.since[1] >= LASTING or ended
        if concern is not None and lasting and self.run.record_concern(concern):
            self.terminal.say(f"warning: round {module.current_round}: {concern}")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.progress.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "progress"):
            self.progress.close()


def trainer_for(run: RunDirectory, loggers: list[Logger], rounds: int, callbacks: list[Callback]) -> pl.Trainer:
    """A Trainer on the devices that the run's settings name.

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
            strategy=_Independent(find_unused_parameters=True) if settings.devices * settings.num_nodes > 1 else "auto",
            precision=_PRECISION[settings.precision],
            plugins=[_AtomicCheckpoints(), _Numbers()],
            logger=loggers,
            max_epochs=rounds,
            callbacks=callbacks,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        # Of this run: Lightning takes it from whatever launcher's environment this process is in.
        rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]  # a function's attribute
        return trainer
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise ConfigError(f"--device {settings.device} --precision {settings.precision}: {error}") from None


class _Numbers(LightningEnvironment):
    """Lightning's, which took the numbers that another launcher gave a command for those of the command's processes."""

    @property
    def creates_processes_externally(self) -> bool:
        return not first_process()

    def local_rank(self) -> int:
        return 0 if first_process() else super().local_rank()

    def node_rank(self) -> int:
        return machine()


class _AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or absent, whatever kills the process."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(Path(path), buffer.getvalue())


class _Independent(DDPStrategy):
    """Processes that share rounds but no gradients: modules without trainable parameters cannot be wrapped."""

    def _configure_launcher(self) -> None:
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def configure_ddp(self) -> None:
        if self.model is not None and any(parameter.requires_grad for parameter in self.model.parameters()):
            super().configure_ddp()


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
