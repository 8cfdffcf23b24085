"""Lightning's Trainer as this project uses it."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from dfkd_cli.artifacts.files import write_atomic
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.errors import ConfigError

_PRECISION: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
# Lightning sets this to keep processes fit to fork, which none of ours is; every step of Adam would load NVML anew.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"


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
            strategy=_Independent() if settings.devices * settings.num_nodes > 1 else "auto",
            precision=_PRECISION[settings.precision],
            plugins=[_AtomicCheckpoints(), LightningEnvironment()],
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


class _AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or absent, whatever kills the process."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(Path(path), buffer.getvalue())


class _Independent(DDPStrategy):
    """Processes that share rounds but no gradients: modules without trainable parameters cannot be wrapped."""

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
