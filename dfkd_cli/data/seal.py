"""The data-free promise, enforced: while sealed, opening a dataset is an error.

The seal holds for the whole process, all threads and all code, as far as Python sees the file being opened: files
that C++ code opens by itself (``torchvision.io.read_file``, ``torch.from_file``) and child processes escape it, unless
the kernel keeps it too (:mod:`dfkd_cli.data.access`). What Python saw is remembered, and ends the run even if the code
that tried it swallows the error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dfkd_cli.errors import ConfigError, DfkdError
from dfkd_cli.urls import copies


class DataSealed(DfkdError):
    """Code that promised to be data-free tried to open a dataset: a bug in that code. It read nothing."""

    code = "data_sealed"
    exit_code = 4
    facts = MappingProxyType({"data_free": False})


@dataclass(frozen=True, eq=False)
class _Seal:
    reason: str
    places: tuple[str, ...]  # resolved and as named, each with a final separator
    copies: tuple[str, ...]  # of what dfkd has written elsewhere, which may lie in there
    refused: list[DataSealed] = field(default_factory=list)


_active: tuple[_Seal, ...] = ()  # replaced, never changed: the hook reads it without a lock
_lock = threading.Lock()
_by_kernel = False
# What Python tells of files: how many of an event's first arguments are paths.
_EVENTS = {"open": 1, "os.listdir": 1, "os.scandir": 1, "os.link": 2, "os.rename": 2, "sqlite3.connect": 1}


def dataset_roots(data_dir: str | None = None) -> list[Path]:
    """Where datasets are looked for, in this order: ``data_dir``, ``$DFKD_DATA``, the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    roots = [data_dir, os.environ.get("DFKD_DATA"), os.path.join(cache, "dfkd")]
    return [Path(os.path.expanduser(root)) for root in roots if root]


def sealed_places(data_dir: str | None = None) -> tuple[str, ...]:
    """Where datasets lie, named ones and the bundled digits, resolved and as named, each with a final separator."""
    places = [*dataset_roots(data_dir), *map(Path, _bundled_digits())]
    return tuple(way for place in places for way in _ways(place))


def keep_by_kernel() -> None:
    """Say that from now on the kernel refuses this process what its command does not name."""
    global _by_kernel
    _by_kernel = True


def kept_by() -> str:
    """What keeps a seal in this process: ``landlock``, or ``python`` where the kernel does not."""
    return "landlock" if _by_kernel else "python"


@contextlib.contextmanager
def sealed(reason: str, roots: Iterable[str | os.PathLike[str]] = ()) -> Iterator[None]:
    """Make opening any dataset raise :class:`DataSealed` inside the ``with`` block.

    Args:
        reason: Completes the message "the dataset was opened although ...".
        roots: Further directories that hold real data, beside :func:`dataset_roots` and the bundled digits.
    """
    global _active
    places = (*sealed_places(), *(way for place in roots for way in _ways(place)))
    seal = _Seal(reason, places, tuple(way for copy in copies().values() for way in _ways(copy)))
    _install_hook()
    with _lock:
        _active = (*_active, seal)
    try:
        yield
    finally:
        with _lock:
            _active = tuple(other for other in _active if other is not seal)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """End the ``with`` block with what the seals refused, whatever the code that tried it made of that."""
    try:
        yield
        check_kept()
    except Exception as error:
        check_kept()
        cause = error.__cause__ if isinstance(error, DfkdError) else error
        denied = isinstance(cause, PermissionError) or "Permission denied" in str(cause)
        if denied and _by_kernel and _active:
            hint = (
                "it writes its output alone, and reads what the command names, Python, the system, the directories "
                "that PYTHONPATH names, and of those of its code modules and small JSON, YAML, TOML and INI files"
            )
            raise DataSealed(f"{cause}: refused, as {_active[-1].reason}", hint) from error
        raise


def check_kept() -> None:
    """Raise the first :class:`DataSealed` of the active seals, if there was any, however it was swallowed."""
    for refusal in itertools.chain.from_iterable(seal.refused for seal in _active):
        raise refusal from None


def check(what: str) -> None:
    """Raise :class:`DataSealed` about opening ``what`` if a seal is active."""
    if seals := _active:
        raise _broken(what, seals[-1])


def _misplaced(path: str, place: str) -> ConfigError | None:
    """What to say of a file that is sealed only because datasets lie around the working directory."""
    here = os.path.join(os.path.realpath("."), "")
    if not (here.startswith(place) and path.startswith(here)):
        return None
    hint = "work outside of it, or give datasets a directory of their own: DFKD_DATA, --data-dir"
    return ConfigError(f"{path}: lies in {place}, where datasets are looked for", hint)


def _broken(what: str, seal: _Seal) -> DataSealed:
    hint = "the code that opened it is at fault; a file that is no dataset belongs outside of the data directories"
    refusal = DataSealed(f"{what} was opened although {seal.reason}", hint)
    seal.refused.append(refusal)
    return refusal


def _bundled_digits() -> list[str]:
    """The file behind ``sklearn.datasets.load_digits``, found without importing scikit-learn."""
    package = importlib.util.find_spec("sklearn")
    places = package.submodule_search_locations if package else None
    return [os.path.join(place, "datasets", "data", "digits.csv.gz") for place in places or ()]


def _ways(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """A path resolved and, if that differs, as named: datasets may lie behind links, also inside the directory."""
    return tuple(dict.fromkeys(os.path.join(way(path), "") for way in (os.path.realpath, os.path.abspath)))


@functools.cache
def _install_hook() -> None:
    sys.addaudithook(_on_event)  # cannot be removed again: it does nothing unless a seal is active


def _on_event(event: str, args: tuple[Any, ...]) -> None:
    if event not in _EVENTS or not _active:
        return
    names = [os.fsdecode(name) for name in args[: _EVENTS[event]] if isinstance(name, (str, bytes, os.PathLike))]
    for seal, name in itertools.product(_active, names):
        for path, place in itertools.product(_ways(name), seal.places):
            if path.startswith(place) and not any(
                path.startswith(copy) for copy in seal.copies if copy.startswith(place)
            ):
                raise _misplaced(path, place) or _broken(name, seal)
