"""Landlock, with which the Linux kernel refuses a thread, and all that it starts from then on, what is not listed.

A restriction is never lifted again. https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import stat
import sys
from collections.abc import Iterable
from typing import Any

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PR_SET_NO_NEW_PRIVS = 38  # without it, none but root may restrict itself
_TCP, _ABSTRACT_SOCKETS = 0b11, 0b1  # bind and connect; sockets of the same machine that have no file

READ_FILE, LIST, REMOVE_DIR = 1 << 2, 1 << 3, 1 << 4
_WRITE_FILE, _REMOVE_FILE, _MAKE_DIR, _MAKE_FILE, _MAKE_LINK = 1 << 1, 1 << 5, 1 << 7, 1 << 8, 1 << 12
_MOVE, _TRUNCATE = 1 << 13, 1 << 14  # of versions 2 and 3; before, moving to another directory is always refused
READ = READ_FILE | LIST
WRITE = READ | _WRITE_FILE | REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_FILE | _MAKE_LINK | _MOVE | _TRUNCATE
_OF_FILES = READ_FILE | _WRITE_FILE | _TRUNCATE
_OTHERS = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # making devices, sockets and pipes, which nobody is allowed


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scope", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _fields_ = (("allowed", ctypes.c_uint64), ("directory", ctypes.c_int32))


@functools.cache
def version() -> int:
    """The version of Landlock that this kernel has; 0 where it has none."""
    if sys.platform != "linux":
        return 0
    try:
        return _call(_CREATE_RULESET, None, 0, 1)
    except (OSError, AttributeError):  # too old, switched off, or no such C library
        return 0


def restrict(rules: Iterable[tuple[str | os.PathLike[str], int]], sockets: bool) -> None:
    """Let this thread open nothing but what the rules allow.

    Args:
        rules: A file or directory, and what is allowed there and beneath: ``READ``, ``WRITE`` ... What is not there is
            left out.
        sockets: Whether it may listen and connect; else TCP is refused too from version 4 on, abstract sockets from 6.

    Raises:
        OSError: The kernel would not.
    """
    handled = (WRITE | _OTHERS) & ~(_MOVE if version() < 2 else 0) & ~(_TRUNCATE if version() < 3 else 0)
    network, scope = (
        0 if sockets or version() < least else bits for bits, least in ((_TCP, 4), (_ABSTRACT_SOCKETS, 6))
    )
    ruleset = _Ruleset(handled, network, scope)
    with contextlib.ExitStack() as stack:
        rules_fd = _call(_CREATE_RULESET, ctypes.byref(ruleset), ctypes.sizeof(ruleset), 0)
        stack.callback(os.close, rules_fd)
        for path, access in rules:
            with contextlib.suppress(OSError):
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
                try:
                    allowed = access & handled & (-1 if stat.S_ISDIR(os.fstat(place).st_mode) else _OF_FILES)
                    _call(_ADD_RULE, rules_fd, 1, ctypes.byref(_Beneath(allowed, place)), 0)
                finally:
                    os.close(place)
        if ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError("no_new_privs was refused")
        _call(_RESTRICT_SELF, rules_fd, 0)


def _call(number: int, *arguments: Any) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    widened = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    if (answer := libc.syscall(ctypes.c_long(number), *widened)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(answer)
