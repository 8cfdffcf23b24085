"""What carries out calls for a command: an interface, and processes of this machine."""

from __future__ import annotations

import abc
import contextlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from dfkd_cli.errors import DfkdError, Interrupted, RunFailed
from dfkd_cli.processes import holding_signals, ignore_signals, stop_on_signals

# The message and its hint.
KILLED = "a process was killed", "out of memory? let fewer work at a time; the same command continues"
Inside = Callable[[], contextlib.AbstractContextManager[None]]
_COMMANDS = "train_teacher", "collect_metadata", "synthesize", "distill", "export"  # those of grids
_PRELOADED = [*(f"{__package__}.stages.{name}" for name in _COMMANDS), f"{__package__}.frozen"]


class Launcher(contextlib.AbstractContextManager["Launcher"], abc.ABC):
    """Carries out calls, several at a time.

    However the ``with`` block or this process ends, they are stopped, so that their work is kept as that of any command
    that is stopped.
    """

    alone = False  # whether a call has this process's streams to itself
    retries = False  # whether a call may be begun again elsewhere

    @property
    @abc.abstractmethod
    def busy(self) -> int:
        """How many calls were submitted of which :meth:`next` has not told yet."""

    @property
    @abc.abstractmethod
    def free(self) -> bool:
        """Whether one more may be submitted now."""

    @abc.abstractmethod
    def submit(self, name: Any, call: Callable[..., Any], *arguments: Any, inside: Inside | None = None) -> None:
        """Let a call be carried out.

        Args:
            name: What :meth:`next` calls it; its text is for people.
            call: What is carried out.
            *arguments: What it is called with.
            inside: What is done to its process before anything else: with it, it has one of its own in any case.
        """

    @abc.abstractmethod
    def next(self) -> tuple[Any, DfkdError | None]:
        """Wait for a call to end: its name, and how it failed.

        Raises:
            RuntimeError: A call failed with anything but a :class:`DfkdError`.
        """


class Workers(Launcher):
    """Processes of this machine; of one call at a time, this process does the work.

    They share the threads of this process and take the GPUs that the fewest of them have.

    Args:
        count: How many calls at a time.
        threads: Of each process. None for a share of this one's.
    """

    def __init__(self, count: int, threads: int | None = None) -> None:
        self.count, self.threads, self.alone = count, threads, count == 1
        # By the pipe of its answer: the name of each, its process, and its GPU.
        self.working: dict[Connection, tuple[Any, Any, str | None]] = {}
        self.here: list[tuple[Any, Callable[..., Any], tuple[Any, ...]]] = []

    def __exit__(self, *_: object) -> None:
        processes = [process for _name, process, _gpu in self.working.values()]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()

    @property
    def busy(self) -> int:
        return len(self.working) + len(self.here)

    @property
    def free(self) -> bool:
        return self.busy < self.count

    def submit(self, name: Any, call: Callable[..., Any], *arguments: Any, inside: Inside | None = None) -> None:
        if self.count == 1 and inside is None:
            self.here.append((name, call, arguments))
            return
        import torch

        # What has looked for CUDA cannot be forked. Elsewhere one process imports torch, and all others are its forks.
        fresh = sys.platform != "linux" or torch.cuda.is_available()
        context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
        context.set_forkserver_preload(_PRELOADED)
        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        gpus = gpus or [str(index) for index in range(torch.cuda.device_count())]
        variables, gpu = dict(os.environ), None
        if gpus and self.count > 1:
            used = [gpu for _, _, gpu in self.working.values()]
            gpu = variables["CUDA_VISIBLE_DEVICES"] = min(gpus, key=used.count)
        ours, theirs = context.Pipe(duplex=False)
        threads = self.threads or max(1, torch.get_num_threads() // self.count)
        process = context.Process(target=_work, args=(theirs, call, arguments, inside, variables, threads))
        with holding_signals():  # a process whose start was broken off complains, and nobody could end it
            process.start()
            theirs.close()
            self.working[ours] = name, process, gpu

    def next(self) -> tuple[Any, DfkdError | None]:
        if self.here:
            name, call, arguments = self.here.pop()
            return name, _outcome(call, arguments)
        while not (ready := wait(list(self.working), timeout=1)):
            pass  # an interruption by another thread, as Ray's, waits for Python to come by
        connection: Any = ready[0]
        try:
            failure = connection.recv()
        except (EOFError, ConnectionError):
            failure = RunFailed(*KILLED)
        name, process, _ = self.working.pop(connection)
        process.join()
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


def _work(
    answer: Connection,
    call: Callable[..., Any],
    arguments: tuple[Any, ...],
    inside: Inside | None,
    variables: dict[str, str],
    threads: int,
) -> None:
    """The life of a process."""
    stop_on_signals()
    os.environ.clear()
    os.environ.update(variables)  # torch reads CUDA_VISIBLE_DEVICES when it first uses a GPU
    with contextlib.suppress(Interrupted), inside() if inside else contextlib.nullcontext():
        threading.Thread(target=_stop_with_parent, daemon=True).start()
        import torch

        torch.set_num_threads(threads)
        try:
            outcome: Any = _outcome(call, arguments)
        except Exception:
            outcome = traceback.format_exc()
        with contextlib.suppress(ConnectionError):  # nobody there any more
            answer.send(outcome)
    ignore_signals()


def _stop_with_parent() -> None:
    """A parent that was killed cannot stop its workers: they end as it did, at once, and hold no lock any more."""
    wait([multiprocessing.parent_process().sentinel])  # type: ignore[union-attr]  # a worker has a parent
    os._exit(1)
