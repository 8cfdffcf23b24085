"""Every error a user can cause: one line that says what to do, with its exit code."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

_LISTED = 3  # names in a message


class DfkdError(Exception):
    """An expected failure. ``code`` is its machine name, ``exit_code`` the process's exit status.

    Args:
        message: What is wrong, with the offending value, in one line.
        hint: What the user can do about it, in one line.
        answer: What there is to say of the results all the same: it goes into the JSON document.
    """

    code = "error"
    exit_code = 1
    facts: Mapping[str, Any] = MappingProxyType({})  # what it makes true of the run that it ended, in run.json

    def __init__(self, message: str, hint: str = "", answer: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.answer = dict(answer or {})
        self.message = " ".join(str(message).split())
        self.hint = " ".join(hint.split())

    def __str__(self) -> str:
        return f"{self.message} -- {self.hint}" if self.hint else self.message


class ConfigError(DfkdError):
    """Usage or configuration: unknown name, bad value, another run in ``--out``."""

    code = "config"
    exit_code = 2


class ArtifactError(DfkdError):
    """An artifact or a dataset is missing, corrupt, or does not fit."""

    code = "artifact"
    exit_code = 3


class RunFailed(DfkdError):
    """The run failed: non-finite loss, out of memory, disk full. What was finished is kept."""

    code = "run_failed"
    exit_code = 4


class GateNotMet(DfkdError):
    """A quality gate (such as ``--min-top1``) was not met. The results are as good as without it."""

    code = "gate"
    exit_code = 5


class Interrupted(BaseException):
    """A signal ended the run. Not an ``Exception``, so that no handler of ordinary failures swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the system says of a disk that is full, or of a file's limit


@contextlib.contextmanager
def machine_can_fail(lower: str = "--batch-size") -> Iterator[None]:
    """Make what the machine refuses an error of the user's: memory on CPU or accelerator, disks, files, handles.

    Args:
        lower: The options that decide how much memory is taken.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has a class of its own for accelerators only
        if isinstance(error, MemoryError) or any(w in str(error) for w in ("out of memory", "can't allocate memory")):
            raise RunFailed("out of memory", f"lower {lower}; what was finished is kept") from None
        raise
    except ImportError as error:
        if "failed to map segment" in str(error):
            hint = "raise the limit of the address space (ulimit -v), or mount where it lies without noexec"
            raise RunFailed(f"a library cannot be loaded: {error}", hint) from None
        raise
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        if name and error.errno not in (*FULL, errno.EMFILE, errno.ENFILE):
            raise ArtifactError(f"{name}{error.strerror}", "check what it is and who may read it") from error
        raise RunFailed(f"{name}{error.strerror}", "what was finished is kept; the same command continues") from error


def did_you_mean(name: str, choices: Iterable[str], otherwise: str | None = None) -> str:
    """A hint naming the closest of the names that there are, several where they are equally close, or all of them.

    Instead of all of them it is what is said ``otherwise``, where that is given.
    """
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=3)
    if not close:
        return otherwise or f"choose from: {', '.join(choices)}"
    alike = [difflib.SequenceMatcher(a=other, b=name).ratio() for other in close]
    best = [repr(other) for other, ratio in zip(close, alike, strict=True) if ratio > alike[0] - 1e-9]
    return f"did you mean {' or '.join(best)}?"


def some(names: Iterable[str]) -> str:
    """The first of names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
