"""Processes that work for a command: each carries out one call at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from dfkd_cli.errors import DfkdError, Interrupted, RunFailed
from dfkd_cli.processes import ignore_signals, stop_on_signals

KILLED = "a process was killed", "out of memory? lower --devices; the same command continues"  # message, hint


class Workers(contextlib.AbstractContextManager["Workers"]):
    """Processes that carry out one call at a time each; of one alone, this process does its work.

    They share the threads of this process and take turns in the GPUs. However the ``with`` block or this process ends,
    they are stopped, so that their work is kept as that of any command that is stopped.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.processes: list[Any] = []
        self.idle: list[Connection] = []
        self.working: dict[Connection, Any] = {}
        self.here: list[tuple[Any, Callable[..., Any], tuple[Any, ...]]] = []

    def __enter__(self) -> Workers:
        if self.count > 1:
            import torch

            threads = max(1, torch.get_num_threads() // self.count)
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            gpus = gpus if gpus != [""] else [str(index) for index in range(torch.cuda.device_count())]
            context = multiprocessing.get_context("spawn")
            for index in range(self.count):
                ours, theirs = context.Pipe()
                gpu = gpus[index % len(gpus)] if gpus else None
                process = context.Process(target=_serve, args=(theirs, threads, gpu))
                process.start()
                theirs.close()
                self.processes.append(process)
                self.idle.append(ours)
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        for connection in [*self.idle, *self.working]:
            connection.close()
        if failure is not None:
            for process in self.processes:
                process.terminate()
        for process in self.processes:
            process.join()

    @property
    def busy(self) -> int:
        """How many calls are being carried out."""
        return len(self.working) + len(self.here)

    def submit(self, name: Any, call: Callable[..., Any], *arguments: Any) -> None:
        """Start a call; the caller has seen that fewer than ``count`` are being carried out."""
        if self.count == 1:
            self.here.append((name, call, arguments))
        else:
            connection = self.idle.pop()
            connection.send((call, arguments))
            self.working[connection] = name

    def next(self) -> tuple[Any, DfkdError | None]:
        """Wait for a call to end: its name, and how it failed.

        Raises:
            RunFailed: A process was killed.
            RuntimeError: A call failed with anything but a :class:`DfkdError`.
        """
        if self.here:
            name, call, arguments = self.here.pop()
            return name, _outcome(call, arguments)
        connection: Any = wait(list(self.working))[0]
        self.idle.append(connection)
        name = self.working.pop(connection)
        try:
            failure = connection.recv()
        except (EOFError, ConnectionError):
            raise RunFailed(*KILLED) from None
        if isinstance(failure, str):
            raise RuntimeError(failure)
        return name, failure


def _outcome(call: Callable[..., Any], arguments: tuple[Any, ...]) -> DfkdError | None:
    """How a call failed as users' calls do; None when it did not."""
    try:
        call(*arguments)
    except DfkdError as error:
        return error
    return None


def _serve(calls: Connection, threads: int, gpu: str | None) -> None:
    """The life of a worker."""
    stop_on_signals()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # torch reads it when it first uses a GPU
    import torch

    torch.set_num_threads(threads)
    with contextlib.suppress(Interrupted):
        with contextlib.suppress(EOFError, ConnectionError):  # nobody there any more
            while True:
                call, arguments = calls.recv()
                try:
                    outcome: Any = _outcome(call, arguments)
                except Exception:
                    outcome = traceback.format_exc()
                calls.send(outcome)
        ignore_signals()


def _stop_with_parent() -> None:
    """A parent that was killed cannot stop its workers."""
    wait([multiprocessing.parent_process().sentinel])  # type: ignore[union-attr]  # a worker has a parent
    os.kill(os.getpid(), signal.SIGTERM)
