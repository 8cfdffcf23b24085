"""The data-free promise, enforced: while sealed, opening a dataset is an error.

The seal holds for the whole process, all threads and all code, as far as Python sees the file being opened: files
that C++ code opens by itself (``torchvision.io.read_file``, ``torch.from_file``) and child processes escape it.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfkd_cli.errors import ConfigError, DfkdError


class DataSealed(DfkdError):
    """Code that promised to be data-free opened a dataset: a bug in that code."""

    code = "data_sealed"


@dataclass(frozen=True, eq=False)
class _Seal:
    reason: str
    places: tuple[str, ...]  # resolved and as named, each with a final separator


_active: tuple[_Seal, ...] = ()  # replaced, never changed: the hook reads it without a lock
_lock = threading.Lock()


def dataset_roots(data_dir: str | None = None) -> list[Path]:
    """Where datasets are looked for, in this order: ``data_dir``, ``$DFKD_DATA``, the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    roots = [data_dir, os.environ.get("DFKD_DATA"), os.path.join(cache, "dfkd")]
    return [Path(os.path.expanduser(root)) for root in roots if root]


@contextlib.contextmanager
def sealed(reason: str, roots: Iterable[str | os.PathLike[str]] = ()) -> Iterator[None]:
    """Make opening any dataset raise :class:`DataSealed` inside the ``with`` block.

    Args:
        reason: Completes the message "the dataset was opened although ...".
        roots: Further directories that hold real data, beside :func:`dataset_roots` and the bundled digits.
    """
    global _active
    places = [*dataset_roots(), *_bundled_digits(), *roots]
    seal = _Seal(reason, tuple(way for place in places for way in _ways(place)))
    _install_hook()
    with _lock:
        _active = (*_active, seal)
    try:
        yield
    finally:
        with _lock:
            _active = tuple(other for other in _active if other is not seal)


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
    return DataSealed(f"{what} was opened although {seal.reason}", hint)


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
    if event != "open" or not _active or isinstance(args[0], int):
        return
    name = os.fsdecode(args[0])
    for seal, path in itertools.product(_active, _ways(name)):
        for place in seal.places:
            if path.startswith(place):
                raise _misplaced(path, place) or _broken(name, seal)
