"""A directory at a URL: ``files.json`` names every file in it with its hash, and is written when all of them are there.

Files go through fsspec, several at a time where its file system can, and every one is hashed on both ways: one that is
fetched before anybody sees it, one that is sent after it was sent, by fetching it again. What is there already is not
copied again. Records go after what they name, so that nobody ever finds one that names what is not there.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, TypedDict

from dfkd_cli.artifacts.files import json_bytes, sha256_file, write_atomic, writing
from dfkd_cli.artifacts.integrity import RUN
from dfkd_cli.artifacts.records import read_json
from dfkd_cli.errors import FULL, ArtifactError, ConfigError, DfkdError, RunFailed
from dfkd_cli.urls import PROTOCOLS, with_credentials, without_secrets

INDEX = "files.json"
AT_ONCE = 16  # files between which nothing is checked, and which a kill loses
AGAIN = "the same command goes on; what was copied is kept"
NOWHERE = "there is no such place", "make the bucket or repository first"
DAMAGED = "copy the directory there again: dfkd cp DIR URL --overwrite"
Advance = Callable[[int, int], None]  # files that are done, of how many


class Row(TypedDict):
    """What the index says of a file."""

    path: str
    sha256: str
    bytes: int


class Index(TypedDict):
    """``files.json``."""

    schema: Literal[1]
    kind: Literal["files"]
    files: list[Row]


class Part(NamedTuple):
    """A file to send: its hash, its size, and where its content is."""

    sha256: str
    size: int
    content: Path | bytes

    def row(self, name: str) -> Row:
        """What the index says of it, under its path."""
        return {"path": name, "sha256": self.sha256, "bytes": self.size}


def index_of(parts: Mapping[str, Part]) -> bytes:
    """``files.json`` of these files: equal ones give equal bytes."""
    return json_bytes({"schema": 1, "kind": "files", "files": [part.row(name) for name, part in sorted(parts.items())]})


class Server:
    """What lies at a URL.

    Raises:
        ConfigError: fsspec does not know the protocol, or a package is missing.
        RunFailed: The server is down.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        if protocol not in PROTOCOLS:
            raise ConfigError(f"{protocol}: no protocol that dfkd reads", f"one of {', '.join(PROTOCOLS)}")
        if "?" in url:
            raise ConfigError(f"{url.partition('?')[0]}: names no directory with what follows the ?", "leave that out")
        with self._talking():
            import fsspec

            fsspec.config.conf.setdefault("file", {}).setdefault("auto_mkdir", True)  # as other protocols do
            self.fs, root = fsspec.core.url_to_fs(with_credentials(self.url))
            self.root = str(root).rstrip("/")

    # -- reading -------------------------------------------------------------------------------------------------------

    def index(self) -> bytes | None:
        """``files.json``; None where there is none."""
        with self._talking():
            try:
                return bytes(self.fs.cat_file(self._at(INDEX)))
            except FileNotFoundError:
                return None

    def rows(self) -> tuple[str, list[Row]]:
        """The hash that stands for the directory, and what its index says.

        Raises:
            ArtifactError: There is none, or it is damaged.
        """
        said = self.index()
        if said is None:
            hint = "copy one there: dfkd cp DIR URL; until all of it is there, it is none"
            raise ArtifactError(f"{self.url}: no finished directory of dfkd (no {INDEX})", hint)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, INDEX)
            sha256 = write_atomic(path, said)
            try:
                rows = read_json(path, Index, DAMAGED)["files"]
            except ArtifactError as error:
                raise ArtifactError(error.message.replace(scratch, self.url), error.hint) from None
        for name in (row["path"] for row in rows):
            check_name(name, f"{self.url}/{INDEX}")
        return sha256, rows

    def receive(self, rows: Iterable[Row], directory: Path, advance: Advance = lambda *_: None) -> int:
        """Copy files into a directory, each whole or not at all. Returns how many were not there yet.

        Raises:
            ArtifactError: One is damaged or missing. It is not there then, and no record that names it.
            RunFailed: The server fails, or the disk is full.
        """
        said = {row["path"]: row for row in rows}
        missing = [name for name, row in said.items() if not fits(directory / name, row)]
        advance(len(said) - len(missing), len(said))
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        left = len(missing)
        for batch in _in_order(missing):
            with self._fetched(batch, directory) as copies:
                for name, copy in copies.items():
                    if not fits(copy, said[name]):
                        what = f"{self.url}/{name} is damaged: its sha256 is not the recorded one"
                        raise ArtifactError(what, DAMAGED)
                with writing(directory):
                    for name, copy in copies.items():
                        place = directory / name
                        place.parent.mkdir(parents=True, exist_ok=True)
                        copy.replace(place)
            left -= len(batch)
            advance(len(said) - left, len(said))
        return len(missing)

    @contextlib.contextmanager
    def _fetched(self, names: list[str], beside: Path | None = None) -> Iterator[dict[str, Path]]:
        """Copies of files as they come, in a directory that is removed again."""
        with tempfile.TemporaryDirectory(prefix=".fetched-", suffix=".tmp", dir=beside) as scratch:
            copies = {name: Path(scratch, str(number)) for number, name in enumerate(names)}
            with self._talking():
                self.fs.get([self._at(name) for name in names], [str(copy) for copy in copies.values()])
            yield copies

    # -- writing -------------------------------------------------------------------------------------------------------

    def send(self, parts: Mapping[str, Part], overwrite: bool, advance: Advance = lambda *_: None) -> int:
        """Copy files there, and the index when all of them are. Returns how many were not there yet.

        Raises:
            ConfigError: There is something else, and it is not to be overwritten.
            RunFailed: The server fails.
        """
        index, before = index_of(parts), self.index()
        if before is not None and before != index:
            if not overwrite:
                raise ConfigError(f"{self.url} holds another directory", "choose another URL, or give --overwrite")
            with self._talking():
                self.fs.rm_file(self._at(INDEX))
        missing = self._missing(parts, overwrite or before == index)
        if missing and before == index:
            with self._talking():  # it names what is not there
                self.fs.rm_file(self._at(INDEX))
        advance(len(parts) - len(missing), len(parts))
        left = len(missing)
        for batch in _in_order(missing):
            self._send(batch, parts)
            left -= len(batch)
            advance(len(parts) - left, len(parts))
        if missing or before != index:
            self.write(INDEX, index)
        return len(missing)

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        with self._talking():
            return bool(self.fs.exists(self._at(name)))

    def write(self, name: str, content: bytes) -> None:
        """Write one file."""
        with self._talking(NOWHERE):
            self.fs.pipe_file(self._at(name), content)

    def _missing(self, parts: Mapping[str, Part], ours: bool) -> list[str]:
        """The files that are to be sent. What is there and is no beginning of one is not ours, or ``ours``."""
        with self._talking():
            self.fs.invalidate_cache()
            try:
                found = self.fs.find(self.root, detail=True)
            except FileNotFoundError:
                found = {}
        start = len(self.fs._strip_protocol(self.root).rstrip("/")) + 1
        there = {name[start:]: info["size"] for name, info in found.items()}
        missing = [name for name in parts if name not in there]
        for batch in _in_order([name for name in parts if name in there]):
            with self._fetched(batch) as copies:
                for name, copy in copies.items():
                    if fits(copy, parts[name].row(name)):
                        continue
                    missing.append(name)
                    if not ours and not _begins(copy, parts[name].content):
                        hint = "choose another URL, or give --overwrite"
                        raise ConfigError(f"{self.url}/{name} is there and is another one", hint)
        return missing

    def _send(self, names: list[str], parts: Mapping[str, Part]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            contents = [
                part.content if isinstance(part.content, Path) else _written(Path(scratch, str(number)), part.content)
                for number, part in enumerate(parts[name] for name in names)
            ]
            with self._talking(NOWHERE):
                self.fs.put([str(path) for path in contents], [self._at(name) for name in names])
        with self._fetched(names) as copies:
            for name, copy in copies.items():
                if not fits(copy, parts[name].row(name)):
                    raise RunFailed(f"{self.url}/{name}: the server has not what was sent", AGAIN)

    # -- what can go wrong ---------------------------------------------------------------------------------------------

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextlib.contextmanager
    def _talking(self, missing: tuple[str, str] = ("a file in it is missing", DAMAGED)) -> Iterator[None]:
        """The user's view of what fails in the ``with`` block; nothing of it has credentials in it.

        The exceptions of a file system's own libraries have nothing in common: what is not known is the server's.
        """
        hint = "check its name, and the credentials that its protocol takes"
        denied = ArtifactError(f"{self.url}: access is denied", hint)
        try:
            yield
        except DfkdError:
            raise
        except ImportError as error:
            said = re.sub(r"\s+", " ", str(error))
            what = f"{self.url}: a package for this protocol is not installed"
            raise ConfigError(what, f"{said}; pip install 'dfkd[fsspec]' has those of s3, hf and sftp") from None
        except FileNotFoundError:
            raise ArtifactError(f"{self.url}: {missing[0]}", missing[1]) from None
        except PermissionError:
            raise denied from None
        except Exception as error:
            if re.search("auth|credential", type(error).__name__, re.IGNORECASE):
                raise denied from None
            said = re.sub(r"\s+", " ", without_secrets(str(error))) or type(error).__name__
            if isinstance(error, OSError) and error.errno in FULL:
                raise RunFailed("the disk is full", f"free some space: {AGAIN}") from None
            raise RunFailed(f"{self.url}: {said[:300]}", AGAIN) from None


def check_name(name: str, where: str) -> None:
    """Raise :class:`ArtifactError` for the path of a file that would lie outside of its directory, or hidden in it."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or str(pure) != name or re.search(r"[\\:\x00-\x1f]|(^|/)\.", name):
        raise ArtifactError(f"{where} is damaged: {name!r:.80} is no file of a directory", DAMAGED)


def _in_order(names: Iterable[str]) -> Iterator[list[str]]:
    """Batches: first what others name, then records, then what says of a run that it is finished."""

    def stage(name: str) -> int:
        return (name.endswith(".json")) + (PurePosixPath(name).name == RUN)

    for _, group in itertools.groupby(sorted(names, key=lambda name: (stage(name), name)), key=stage):
        rest = list(group)
        while rest:
            yield rest[:AT_ONCE]
            rest = rest[AT_ONCE:]


def fits(path: Path, row: Row) -> bool:
    """Whether a file is the one that the index means."""
    return path.is_file() and path.stat().st_size == row["bytes"] and sha256_file(path) == row["sha256"]


def _begins(copy: Path, content: Path | bytes) -> bool:
    """Whether a file is the beginning of a content, as what was cut off is."""
    size = copy.stat().st_size
    if isinstance(content, bytes):
        return copy.read_bytes() == content[:size]
    with content.open("rb") as whole:
        return copy.read_bytes() == whole.read(size)


def _written(path: Path, content: bytes) -> Path:
    write_atomic(path, content)
    return path
