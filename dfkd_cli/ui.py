"""What a user sees: the answer on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, TextIO

from rich.console import Console

from dfkd_cli.errors import Interrupted, RunFailed
from dfkd_cli.urls import named

QUIET, NORMAL, VERBOSE = -1, 0, 1
INTERVAL = 15  # seconds between plain lines of progress


def _console(stream: TextIO) -> Console:
    """A console that never puts escapes into a file or a pipe, however hard the environment asks for colour."""
    terminal = stream.isatty()
    width = None if terminal else 200  # tables in a pipe are for grep and for files
    return Console(file=stream, force_terminal=terminal, width=width, soft_wrap=True, highlight=False, emoji=False)


class Terminal:
    """The two streams of a command.

    Args:
        verbosity: QUIET prints errors only, VERBOSE adds detail.
        as_json: stdout carries exactly one JSON document.
        silent: Print nothing at all (a process that is not the first of its run).
    """

    def __init__(self, verbosity: int = NORMAL, as_json: bool = False, silent: bool = False) -> None:
        self.verbosity, self.as_json, self.silent = verbosity, as_json, silent
        self.stdout = sys.stdout  # which may be led elsewhere while others' code runs
        self.out = _console(sys.stdout)
        self.err = _console(sys.stderr)
        self.live = sys.stderr.isatty() and verbosity >= NORMAL and not silent

    def say(self, text: str) -> None:
        """A message for the person watching."""
        if self.verbosity >= NORMAL and not self.silent:
            self.err.print(named(text), markup=False)

    def answer(self, text: Any) -> None:
        """The result in words, or a rich table."""
        if not self.as_json and not self.silent:
            self.out.print(named(text), markup=False) if isinstance(text, str) else self.out.print(text)

    def document(self, value: dict[str, Any]) -> None:
        """The one JSON document."""
        if self.as_json and not self.silent:
            document = finite(named({"schema": 1, **value}))  # records of older versions have NaN
            self.stdout.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
            self.stdout.flush()

    def error(self, code: str, message: str, hint: str, answer: Mapping[str, Any] = MappingProxyType({})) -> None:
        """One line on stderr, and the JSON document when asked for, with the results that there are all the same."""
        with contextlib.suppress(RunFailed, Interrupted):  # of the two errors this one counts
            self.document({"ok": False, "error": {"code": code, "message": message, "hint": hint}, **answer})
        if not self.silent:
            self.err.print(named(f"error: {message}" + (f" -- {hint}" if hint else "")), markup=False)


def finite(value: Any) -> Any:
    """Measures as JSON can have them: NaN and infinities, such as the accuracy in a class without images, are None."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


LOGGER = logging.getLogger(__package__)


class Notes(logging.Handler):
    """What parts that have no terminal tell the user: each thing once.

    Args:
        terminal: Where it is said.
    """

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self.terminal, self.said = terminal, set[str]()

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Tell what the package's parts log inside the ``with`` block, and nobody else."""
        before, LOGGER.handlers = LOGGER.handlers, [self]
        try:
            yield
        finally:
            LOGGER.handlers = before

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, unless it has been said."""
        text = record.getMessage()
        if text not in self.said:
            self.said.add(text)
            self.terminal.say(f"note: {text}")


class Progress:
    """Speed and time left: a live bar on a terminal, a plain line at intervals elsewhere.

    Args:
        terminal: Where to show it.
        what: The work's name.
        unit: What is counted, e.g. ``"rounds"``.
        total: Units in all.
        done: Units that an earlier run already did.
    """

    def __init__(self, terminal: Terminal, what: str, unit: str, total: int, done: int = 0) -> None:
        self.terminal, self.what, self.unit, self.total = terminal, what, unit, total
        self.first, self.start, self.last = done, time.monotonic(), 0.0
        self.bar = None
        if terminal.live:
            from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                "{task.description}",
                BarColumn(),
                MofNCompleteColumn(),
                "{task.fields[note]}",
                TimeRemainingColumn(),
            )
            self.bar = RichProgress(*columns, console=terminal.err)
            self.task = self.bar.add_task(what, total=total, completed=done, note="")
            self.bar.start()

    def update(self, done: int, note: str = "") -> None:
        """Show that ``done`` units are finished."""
        now = time.monotonic()
        speed = (done - self.first) / max(now - self.start, 1e-9)
        note = f"{speed:.2f} {self.unit}/s {note}".rstrip()
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=note)
        elif now - self.last >= INTERVAL or done >= self.total:
            self.last = now
            left = timedelta(seconds=round((self.total - done) / speed)) if speed else "-:--:--"
            self.terminal.say(f"{self.what} {done}/{self.total} {note}, {left} left")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()
