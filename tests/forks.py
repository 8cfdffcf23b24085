"""Commands in processes forked from one that has imported what they import, which takes a new process seconds.

Each is a process as any other: with its own files, signals and exit code. Only what happens while a process starts
(what is imported, which variables are read by then) is to be seen in a fresh one alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import multiprocessing
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver, util
from pathlib import Path
from unittest import mock

import torch
from torch.utils.benchmark import Timer

from dfkd_cli import stages

os.fsync = lambda _: None  # no test cuts the power: what is written need not reach the disk
if not torch.cuda.is_available():  # for each kind of device that is not there, it formats a stack trace
    torch.manual_seed = torch.default_generator.manual_seed
# No test reads a latency of milliseconds; measuring it well would take most of the time of a command.
Timer.blocked_autorange = functools.partialmethod(Timer.blocked_autorange, min_run_time=0.01)  # type: ignore

# CUDA cannot be used in a fork of a process that has looked for it, as what is imported beforehand does.
CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
CONTEXT.set_forkserver_preload(["preloaded"])
STAGES = [f"dfkd_cli.stages.{module.name}" for module in pkgutil.iter_modules(stages.__path__)]


def start_server() -> None:
    """Start what forks come from, before a grid in this process does so for itself, with less in it."""
    if CONTEXT.get_start_method() == "forkserver":
        places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, places))):
            forkserver.ensure_running()


class Fork:
    """A command in a forked process, with the methods of ``subprocess.Popen`` that tests use.

    Args:
        arguments: What is typed after ``dfkd``.
        cwd: Where.
        signal_at: A file and a signal: the process sends the signal to itself at the first thing that it does after
            it has written the file, so that no test depends on when another process sees that.
        stdout: Where its stdout goes, instead of to the test.
        **variables: More of its environment.
    """

    def __init__(
        self,
        arguments: list[str],
        cwd: Path,
        signal_at: tuple[Path, int] | None = None,
        stdout: Path | None = None,
        **variables: str,
    ) -> None:
        self.arguments = arguments
        self.outputs = [Path(tempfile.mkstemp(prefix="dfkd-")[1]) for _ in range(2)]
        places = [stdout or self.outputs[0], self.outputs[1]]
        life = arguments, cwd, {**os.environ, **variables}, places, signal_at
        self.process = CONTEXT.Process(target=_run, args=life)
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, signum: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end, also of all that it has started; what was written to stdout and to stderr."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
        with self.outputs[1].open() as errors:
            fcntl.flock(errors, fcntl.LOCK_EX)  # until nobody has it open any more
        out, err = (path.read_text() for path in self.outputs)
        for path in self.outputs:
            path.unlink()
        return out, err


def _run(
    arguments: list[str],
    cwd: Path,
    environment: dict[str, str],
    outputs: list[Path],
    signal_at: tuple[Path, int] | None,
) -> None:
    """The life of a forked process."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    fcntl.flock(2, fcntl.LOCK_EX)  # this process's and its children's, until all of them have closed it
    sys.argv = [str(Path(sys.executable).with_name("dfkd")), *arguments]  # what --devices starts again
    if signal_at is not None:
        _watch(*signal_at)
    if CONTEXT.get_start_method() == "forkserver":
        util.spawnv_passfds = _start  # type: ignore[attr-defined]  # by which the workers of a grid get their server
    from dfkd_cli.__main__ import main

    main()


def _start(_path: str, arguments: Sequence[str], passed: Sequence[int]) -> int:
    """A server of multiprocessing as a fork, which has imported what a new Python would: its process id.

    As after ``exec``, no file is open that was not meant to be passed on, and signals do what they do by default.
    """
    if process := os.fork():
        return process
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, nothing, *passed}:
        with contextlib.suppress(OSError):  # that of the listing
            os.dup2(nothing, number)  # not closed: objects of this process would close what is opened in its place
    for signum in signal.valid_signals():
        if callable(signal.getsignal(signum)):
            signal.signal(signum, signal.SIG_DFL)
    try:
        exec(arguments[arguments.index("-c") + 1], {})
    finally:
        os._exit(0)  # it ends with its work, and does not go on as the command that it comes from


def _watch(path: Path, signum: int) -> None:
    """Send this process a signal once it has written a file."""
    before, waiting, process = _written(path), [True], os.getpid()

    def look(*_: object) -> None:
        if waiting and os.getpid() == process and _written(path) != before:
            waiting.clear()
            os.kill(os.getpid(), signum)

    sys.addaudithook(look)


def _written(path: Path) -> int | None:
    """When a file was last written; None if never."""
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return None
