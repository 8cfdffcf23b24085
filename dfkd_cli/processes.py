"""The processes of a run: which of them this is, and how a signal ends it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from dfkd_cli.errors import ConfigError, Interrupted

STOPPED = "interrupted", "stopped; what was finished is kept", "the same command continues"  # code, message, hint
STARTED_BY = "DFKD_STARTED_BY"  # the number of the first process of a run, in the environment of its others
MEETING = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")  # what Lightning asks of each machine's environment
_machine = 0  # this one's number among those that share the run
_dedicated = False


@contextlib.contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """Compute with so many threads of the CPU inside the ``with`` block; None for as many as there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share_of_threads(processes: int) -> int | None:
    """The threads of each of so many processes of a run: a share of the cores, unless the environment says how many."""
    import torch

    return None if processes == 1 or "OMP_NUM_THREADS" in os.environ else max(1, torch.get_num_threads() // processes)


def dedicate() -> None:
    """Say that this process carries out one command and ends with it: what it does to itself outlives nothing."""
    global _dedicated
    _dedicated = True


def dedicated() -> bool:
    """Whether :func:`dedicate` was called."""
    return _dedicated


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """What the ``with`` block imports stays as long as this process, if it is dedicated: it is no garbage.

    Python would look through all of it again and again, a tenth of the time that a command needs to start.
    """
    if not _dedicated:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        keep_imports()
        gc.enable()


def keep_imports() -> None:
    """Do not look for garbage in what this process has until now, before it ends."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries complain of what is never freed


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


def machine() -> int:
    """The number of this machine among those that share a run."""
    return _machine


def writes_records() -> bool:
    """Whether this is the process of a run that writes its records: the first one of the first machine."""
    return _machine == 0 and first_process()


@functools.cache  # Lightning takes the numbers back at the end of its work, while the processes are the same
def first_process() -> bool:
    """Whether this is the first process of a run on this machine.

    That one starts the others. Other launchers' numbers mean nothing here: several commands may well run under one.
    """
    return os.environ.get(STARTED_BY) != str(os.getppid())


def end_with_parent() -> None:
    """Let a process that another one has started not outlive it, whatever ends that."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def leave_on_signals() -> None:
    """Let a signal end this process at once, while nothing has begun that would have to be saved.

    An exception could not: code that is being imported swallows any.
    """
    _handle(_leave)


def _leave(signum: int, _frame: Any) -> None:
    code, message, hint = STOPPED
    try:
        if "--json" in sys.argv:
            error = {"code": code, "message": message, "hint": hint}
            os.write(1, (json.dumps({"schema": 1, "ok": False, "error": error}) + "\n").encode())
        os.write(2, f"error: {message} -- {hint}\n".encode())
    finally:
        os._exit(128 + signum)


def stop_on_signals() -> None:
    """Let a signal raise :class:`Interrupted` in the main thread, once."""
    _handle(_stop)


def _stop(signum: int, _frame: Any) -> None:
    ignore_signals()  # once is enough: a second one must not break the clean-up
    raise Interrupted(signum)


def ignore_signals() -> None:
    """Let none of them do anything any more."""
    _handle(lambda *_: None)  # not SIG_IGN: Python complains of a signal that has come and is ignored meanwhile


@contextlib.contextmanager
def holding_signals() -> Iterator[None]:
    """Let a signal that comes inside the ``with`` block do what it does only at the end of that.

    For work of libraries that must not be left halfway, and is short.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = {number: handler for number in _numbers() if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda signum, _frame: came.append(signum))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _numbers() -> list[int]:
    """The signals that end a run; Windows has no SIGHUP."""
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _handle(handler: Any) -> None:
    """Set what a signal does that ends a run: the first process ends it, and the others with it.

    What was told to ignore a hang-up, as ``nohup`` does, goes on ignoring it.
    """
    for number in _numbers():
        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler if first_process() else signal.SIG_IGN)
