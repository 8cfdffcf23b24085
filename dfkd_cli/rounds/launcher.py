"""The further processes of a run on this machine: started by the first one, and ended with it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.errors import RunFailed
from dfkd_cli.processes import STARTED_BY
from dfkd_cli.ui import Terminal
from dfkd_cli.workers import KILLED

LEAVES = 5.0  # seconds that the main thread has to notice by itself that a process is gone


class Launcher(_SubprocessScriptLauncher):
    """Lightning's, of which a process that is killed does not kill the first one, unsaid and unrecorded."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.children: list[subprocess.Popen[bytes]] = []
        self.over = threading.Event()

    def launch(self, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """Lightning's, which would compute with another number of threads than is recorded."""
        threads = torch.get_num_threads()

        def work(*arguments: Any, **named: Any) -> Any:
            torch.set_num_threads(threads)
            return function(*arguments, **named)

        return super().launch(work, *args, **more)

    def _call_children_scripts(self) -> None:
        os.environ[STARTED_BY] = str(os.getpid())
        super()._call_children_scripts()
        del os.environ[STARTED_BY]
        self.children, self.procs = self.procs, []  # what Lightning watches, it answers with SIGKILL

    @contextlib.contextmanager
    def together(self, run: RunDirectory, terminal: Terminal) -> Iterator[None]:
        """While the processes work: where one is lost, the run fails; where this one fails, the others end.

        Raises:
            RunFailed: One was lost.
        """
        threading.Thread(target=self._watch, args=(run, terminal), daemon=True).start()
        try:
            yield
        except BaseException as error:
            for child in self.children:
                child.kill()
            if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
                raise RunFailed(*KILLED) from error
            raise
        finally:
            self.over.set()

    def _watch(self, run: RunDirectory, terminal: Terminal) -> None:
        """End this process where its main thread waits for a lost one inside of a library, where nothing reaches it."""
        while not any(child.poll() for child in self.children):
            if self.over.wait(0.5):
                return
        if not self.over.wait(LEAVES):
            error = RunFailed(*KILLED)
            for child in self.children:
                child.kill()
            run.record_failure(error)
            terminal.error(error.code, error.message, error.hint)
            os._exit(error.exit_code)
