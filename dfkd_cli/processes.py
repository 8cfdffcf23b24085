"""The processes of a run: which of them this is, and how a signal ends it."""

from __future__ import annotations

import os
import signal
from typing import Any

from dfkd_cli.errors import Interrupted


def first_process() -> bool:
    """Whether this is the process of a run that writes its records.

    Lightning starts the others of this machine itself and numbers them. Other launchers' numbers mean nothing here:
    several commands, each with one device, may well run under one of them.
    """
    return int(os.environ.get("LOCAL_RANK") or 0) == 0 or "WORLD_SIZE" not in os.environ


def stop_on_signals() -> None:
    """Let SIGINT and SIGTERM raise :class:`Interrupted` in the main thread, once."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)


def _stop(signum: int, _frame: Any) -> None:
    ignore_signals()  # once is enough: a second one must not break the clean-up
    raise Interrupted(signum)


def ignore_signals() -> None:
    """Let neither of them do anything any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
