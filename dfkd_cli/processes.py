"""The processes of a run: which of them this is, and how a signal ends it."""

from __future__ import annotations

import os
import signal
from typing import Any

from dfkd_cli.errors import ConfigError, Interrupted

MEETING = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")  # what Lightning asks of each machine's environment
_machine = 0  # this one's number among those that share the run
_dedicated = False


def dedicate() -> None:
    """Say that this process carries out one command and ends with it: what it does to itself outlives nothing."""
    global _dedicated
    _dedicated = True


def dedicated() -> bool:
    """Whether :func:`dedicate` was called."""
    return _dedicated


def join_machines(count: int) -> None:
    """Say that ``count`` machines share this run; the environment says which of them this is.

    Raises:
        ConfigError: It does not.
    """
    global _machine
    if count == 1:
        return
    missing = [name for name in MEETING if not os.environ.get(name)]
    if missing:
        hint = "give the command on each machine with its number from 0 as NODE_RANK, and the first one's address"
        raise ConfigError(f"--num-nodes {count}: {', '.join(missing)} not set", f"{hint} as MASTER_ADDR, MASTER_PORT")
    number = os.environ["NODE_RANK"]
    if not number.isdigit() or int(number) >= count:
        raise ConfigError(f"--num-nodes {count}: NODE_RANK is {number}", f"the machines' numbers are 0 to {count - 1}")
    _machine = int(number)


def writes_records() -> bool:
    """Whether this is the process of a run that writes its records: the first one of the first machine."""
    return _machine == 0 and first_process()


def first_process() -> bool:
    """Whether this is the first process of a run on this machine.

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
