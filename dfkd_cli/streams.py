"""The standard streams of a process, which may be closed, full, or read by nobody."""

from __future__ import annotations

import io
import os
import signal
import sys

from dfkd_cli.errors import Interrupted, RunFailed


class _Stream(io.TextIOWrapper):
    """Text to a file descriptor that can fail once: what comes after that is dropped, by the interpreter's end too.

    Args:
        number: The file descriptor.
        encoding: Of the text. What it has not is written as an escape, which JSON reads back where it is UTF-8.
    """

    def __init__(self, number: int, encoding: str) -> None:
        binary = open(number, "wb", closefd=False)  # noqa: SIM115  # open as long as the process lives
        super().__init__(binary, encoding, "backslashreplace", line_buffering=number == 2 or binary.isatty())

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        super().flush()


class _Answers(_Stream):
    """stdout: an answer that does not arrive is a failure."""

    def _fail(self, error: OSError) -> None:
        super()._fail(error)
        if isinstance(error, BrokenPipeError):
            raise Interrupted(signal.SIGPIPE) from None
        hint = "give it another place; the same command says it again"
        raise RunFailed(f"the answer cannot be written to stdout ({error.strerror})", hint) from None


def open_streams(as_json: bool) -> None:
    """Give the process all three streams: a closed one leads nowhere, so that no file that is opened takes its number.

    Args:
        as_json: stdout carries JSON, which is UTF-8 everywhere.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the lowest number that is free is the one that is opened
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    spoken = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout = _Answers(1, "utf-8" if as_json else spoken)
    sys.stderr = _Stream(2, getattr(sys.stderr, "encoding", None) or "utf-8")
