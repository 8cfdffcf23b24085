"""Files that are either whole or absent, and their hashes; all that is written, locked or removed is so here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dfkd_cli.errors import FULL, ArtifactError, ConfigError, RunFailed
from dfkd_cli.urls import named

LOG = logging.getLogger(__name__)


def write_atomic(path: Path, data: bytes) -> str:
    """Write ``data`` so that a reader, or a kill at any moment, sees the whole file or none. Returns its sha256.

    Raises:
        RunFailed: The disk is full; nothing is left behind.
        ConfigError: The directory cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise os_error(error, path) from None
        raise
    return hashlib.sha256(data).hexdigest()


def check_inside(directory: Path) -> None:
    """Check that what is written below a directory stays there. The directory may itself be a link.

    Links to files are harmless: files are replaced, never written into.

    Raises:
        ArtifactError: Another link in it leads out of it.
    """
    for place, *names in os.walk(directory):
        for path in (Path(place, name) for kind in names for name in kind):
            if not path.is_symlink() or path.is_file():
                continue
            if not Path(os.path.realpath(path)).is_relative_to(directory.resolve()):
                raise ArtifactError(f"{path} is a link out of {directory}, where nothing is written", "remove the link")


def take_lock(path: Path) -> BinaryIO | None:
    """Lock a file, whose content is left alone, till it is closed or the process ends. None where another holds it.

    Raises:
        ArtifactError: It is a link.
        ConfigError: It cannot be written.
    """
    file = _open_lock(path)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the system however the process ends
    except ImportError:  # on Windows
        pass
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:  # some file systems of networks
        what = "%s: this file system has no locks (%s); let no other process write here"
        LOG.warning(what, path.parent, error.strerror)
    return file


def _open_lock(path: Path) -> BinaryIO:
    def opener(name: str, _: int) -> int:
        return os.open(name, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)  # Windows has no such flag

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "rb", buffering=0, opener=opener)
    except OSError as error:
        if path.is_symlink():
            raise ArtifactError(f"{path} is a link", "remove the link") from None
        raise os_error(error, path.parent) from None


def remove(path: Path) -> None:
    """Remove a file, a directory with all that is in it, or a link, but not what that leads to.

    Raises:
        ConfigError: It cannot be removed.
    """
    with writing(path):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise the user's view of what fails in the ``with`` block, where something is written to ``path``."""
    try:
        yield
    except OSError as error:
        raise os_error(error, path) from None


def os_error(error: OSError, path: Path) -> ConfigError | RunFailed:
    """The user's view of a failed write to ``path``."""
    if error.errno in FULL:
        return RunFailed(f"{path}: the disk is full", "free some space and run the same command again: it continues")
    return ConfigError(
        f"{path}: cannot be written ({error.strerror})", "choose a place that can be written, as by --out"
    )


def write_text(path: Path, text: str) -> str:
    """Write text atomically, in which URLs stand for their copies. Returns its sha256."""
    return write_atomic(path, utf8(named(text)))


def utf8(text: str) -> bytes:
    """Text as bytes. A name on disk that is not UTF-8 has escapes, which JSON and YAML read back."""
    return text.encode(errors="backslashreplace")


def write_json(path: Path, value: Any) -> str:
    """Write a JSON document atomically, in which URLs stand for their copies. Returns its sha256."""
    return write_atomic(path, json_bytes(named(value)))


def json_bytes(value: Any) -> bytes:
    """A JSON document as it is written."""
    return utf8(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """A hash of plain values that does not depend on the order of keys."""
    return hashlib.sha256(utf8(json.dumps(value, sort_keys=True, ensure_ascii=False))).hexdigest()
