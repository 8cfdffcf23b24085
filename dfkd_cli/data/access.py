"""What a data-free command may read, and a process that can read nothing else. Nothing here imports torch.

The kernel restricts one thread and what it starts from then on. So a process is confined while it has one thread,
before it imports NumPy and torch, which start more.

What it does not keep: names of files beneath directories of code can be listed; UDP and sockets that are files stay
open, and TCP too before version 4 of Landlock, or where several processes work together or a function of the user's
answers, who may ask elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import shutil
import site
import stat
import sys
import tempfile
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfkd_cli import catalog
from dfkd_cli.artifacts.integrity import LEVELS, RUN, SCRATCH
from dfkd_cli.artifacts.records import read_json
from dfkd_cli.config import hints, plain, strip_none
from dfkd_cli.data import landlock, seal
from dfkd_cli.data.landlock import LIST, READ, REMOVE_DIR, WRITE
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.source import LARGE, SETTINGS
from dfkd_cli.options import SeenTeacher
from dfkd_cli.processes import writes_records
from dfkd_cli.settings import Settings
from dfkd_cli.spec import Spec
from dfkd_cli.unimported import PACKAGE
from dfkd_cli.urls import copies

Rule = tuple[str, int]

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/proc", "/sys", "/nix/store")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "nvidia*", "dri", "kfd", "dxg")
_CACHES = ("~/.nv", "/tmp/nvidia-mps")
_MATPLOTLIB = "MPLCONFIGDIR"
_SUFFIXES = tuple(importlib.machinery.all_suffixes())


@dataclass(frozen=True)
class Access:
    """What one command reads and writes.

    Attributes:
        inputs: Files and directories that it names.
        code: Directories of which it may import.
        output: The directory that it writes.
        rehearsed: It writes another one instead, which is thrown away, and only looks whether that could be written; or
            there is none to write.
        processes: Whether several work together, which takes sockets and shared memory.
        asks: Whether a function of the user's is asked, which may take sockets.
        sealed: Where datasets lie: nothing in there is read, whatever names it.
    """

    inputs: tuple[str, ...]
    code: tuple[str, ...]
    output: str
    rehearsed: bool
    processes: bool
    asks: bool
    sealed: tuple[str, ...]

    @contextlib.contextmanager
    def confined(self) -> Iterator[None]:
        """Confine this process for good, where its kernel can and it has one thread; the block is what it does then.

        The output directory is made, as the kernel allows nothing but what is there, and removed if it stays empty.
        """
        made: list[Path] = []
        if len(os.listdir("/proc/self/task")) == 1:
            with contextlib.suppress(OSError):  # no such output can be made: the command will say so
                made = self._confine()
        try:
            yield
        finally:
            if made and writes_records():
                shutil.rmtree(made[0], ignore_errors=True)
                for directory in (made[0].parent, *made[1:]):
                    with contextlib.suppress(OSError):
                        directory.rmdir()

    def _confine(self) -> list[Path]:
        """Returns a directory for temporary files, and those that were made for the output, the innermost first."""
        looked_at: list[Rule] = []
        if self.rehearsed:
            output = Path(tempfile.mkdtemp())
            made = [output]
            looked_at = [(place, rule) for place, rule in ((self.output, LIST), (os.path.join(self.output, RUN), READ))
                         if os.path.exists(place) and not os.path.islink(place)]  # fmt: skip
        else:
            output = Path(self.output).absolute()
            made = [place for place in (output, *output.parents) if not place.exists()]
            output.mkdir(parents=True, exist_ok=True)
        scratch = output / SCRATCH  # torch wants a place for temporary files
        if scratch.is_symlink():  # a link in what was received may lead anywhere
            scratch.unlink()
        if scratch.is_file():
            raise ConfigError(f"{scratch} is a file", "choose another --out")
        scratch.mkdir(exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=scratch))  # a process that is refused the output does not take this one's
        tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
        # One of the user's own may hold anything; where none can be written, Matplotlib warns and leaves one behind.
        if os.environ.get(_MATPLOTLIB) or not all(map(_writable, _of_fonts())):
            os.environ[_MATPLOTLIB] = str(scratch)
        rules = [*self._readable(), *looked_at, (str(output), WRITE)]
        rules += [(str(place.parent), REMOVE_DIR) for place in made[-1:]]
        _drop_open_files()
        landlock.restrict(rules, sockets=self.processes or self.asks)
        seal.keep_by_kernel()
        return [scratch, *made]

    def _readable(self) -> Iterator[Rule]:
        prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, *site.getsitepackages(), site.getusersitepackages()}
        libraries = [os.environ.get(name, "") for name in ("LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH")]
        folders = [folder for folder in ":".join(libraries).split(":") if folder.startswith("/")]
        linked = [
            entry.path for place in self.inputs for entry in _entries(place) if entry.is_symlink() and entry.is_file()
        ]
        # Names of other machines: on many systems the file is a link to where nothing else is read.
        names = [os.path.realpath("/etc/resolv.conf")] if self.asks else []
        whole = [
            *names,
            *_SYSTEM,
            *prefixes,
            *folders,
            str(PACKAGE),
            str(catalog.recipes_directory()),
            *self.inputs,
            *linked,
        ]
        yield from _all_but(whole, self.sealed)
        yield from ((place, READ) for place in self.inputs if place in copies().values())  # datasets lie around them
        for folder in (*sys.path, *self.code):
            if not any(Path(folder).resolve().is_relative_to(prefix) for prefix in prefixes):
                yield from _code(folder or ".", self.sealed)
        yield "/dev", LIST
        devices = [str(path) for name in _DEVICES for path in Path("/dev").glob(name)]
        shared = ["/dev/shm"] if self.processes else []
        own = os.path.realpath("/proc/self")  # where threads write their names
        yield from ((os.path.expanduser(place), WRITE) for place in (*devices, *shared, *_of_fonts(), *_CACHES, own))


def access(settings: Settings, dry_run: bool = False) -> Access | None:
    """What a command may read by its settings; None where it needs data, or the kernel cannot hold it to that."""
    if not landlock.version() or not catalog.command(settings.command).data_free(settings.inputs):
        return None
    inputs: type = type(settings.inputs)
    kinds = hints(inputs)
    values = [value for name, value in plain(settings.inputs).items() if _is_text(kinds[name])]
    names = [
        Spec.read(name).rest for value in values for name in (value if isinstance(value, list) else [value]) if name
    ]
    code = set[str]()
    for name in names:
        code |= _code_of(name)
        with contextlib.suppress(ArtifactError, KeyError):  # the command will say so
            spec = str(read_json(Path(name, "model.json"), dict[str, Any])["spec"])
            if settings.code.may_run(spec := settings.code.locate(spec, Path(name))):
                code |= _code_of(spec)
    asked = isinstance(settings.inputs, SeenTeacher) and settings.inputs.only_asked
    several = settings.run.devices * settings.run.num_nodes > 1
    return Access(
        inputs=tuple(place for name in names for place in (name, *_records_around(name)) if os.path.exists(place)),
        code=tuple(sorted(code)),
        output=str(settings.out),
        rehearsed=dry_run or (settings.run.out is None and catalog.command(settings.command).out is None),
        processes=several,
        asks=asked and any(":" in name for name in settings.inputs.teacher),
        sealed=seal.sealed_places(getattr(settings.inputs, "data_dir", None)),
    )


def _of_fonts() -> list[str]:
    """Where Matplotlib, which torchmetrics imports, and fontconfig, which that asks, write what they find of fonts."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    places = os.path.join(cache, "fontconfig"), os.path.join(cache, "matplotlib"), os.path.join(config, "matplotlib")
    return [os.path.expanduser(place) for place in places]


def _writable(place: str) -> bool:
    """Whether a directory can be written to, made, to stay, if it is not there; of who has no home none below ~ can."""
    if not os.path.isabs(place):
        return False
    with contextlib.suppress(OSError):
        os.makedirs(place, exist_ok=True)
    return os.path.isdir(place) and os.access(place, os.W_OK)


def _is_text(kind: Any) -> bool:
    inner, _ = strip_none(kind)
    return str in (inner, *typing.get_args(inner))


def _records_around(name: str) -> list[str]:
    """The records of the directories that something lies in: they may have hashes of what was made in there."""
    records = [os.path.join(directory, RUN) for directory in Path(os.path.abspath(name)).parents[:LEVELS]]
    return [record for record in records if not os.path.islink(record)]


def _code_of(spec: str) -> set[str]:
    """The directories that the code of a model SPEC is imported from."""
    read = Spec.read(spec)
    if not read.source:
        return set()
    if read.file is not None:
        return {str(read.file.parent), "."}
    with contextlib.suppress(ImportError, ValueError):
        if package := importlib.util.find_spec(read.source.partition(".")[0]):
            return {".", *(package.submodule_search_locations or [os.path.dirname(package.origin or "")])}
    return {"."}


def _all_but(places: Iterable[str], sealed: Iterable[str]) -> Iterator[Rule]:
    """Rules that let everything in ``places`` be read but for what is sealed: around that, each neighbour by itself."""
    closed = [os.path.join(place, "") for place in sealed]
    todo, seen = [os.path.realpath(place) for place in places], set[str]()
    while todo:
        place = todo.pop()
        inside = os.path.join(place, "")
        if place in seen or any(inside.startswith(other) for other in closed):
            continue
        seen.add(place)
        holds = any(other.startswith(inside) for other in closed)
        yield place, LIST if holds else READ
        if holds:
            targets = (os.path.realpath(entry.path) for entry in _entries(place))
            todo += [target for target in targets if not inside.startswith(os.path.join(target, ""))]


def _code(folder: str, sealed: Iterable[str] = (), whole: bool = True, holder: bool = True) -> Iterator[Rule]:
    """Rules that let modules in a directory be imported, and those in its packages, and their settings be read.

    No other file beside them. No package is where datasets lie, whatever its name and files. A directory without
    modules is none either, unless it may be a ``holder`` of packages.
    """
    entries = _entries(folder)
    modules = [entry.path for entry in entries if entry.name.endswith(_SUFFIXES)]
    if not (whole or modules or holder):
        return
    within = [
        rule
        for entry in entries
        if entry.name.isidentifier() and entry.is_dir(follow_symlinks=False)
        and os.path.join(os.path.realpath(entry.path), "") not in sealed
        for rule in _code(entry.path, sealed, whole=False, holder=whole or bool(modules))
    ]  # fmt: skip
    if whole or modules or within:
        yield folder, LIST
        yield from ((file, READ) for file in modules)
        yield from ((entry.path, READ) for entry in entries if _has_settings(entry))
        yield from within


def _has_settings(entry: os.DirEntry[str]) -> bool:
    """Whether a file is small and of a kind that code reads its settings from; not a link, which may lead to data."""
    with contextlib.suppress(OSError):  # it has gone
        return (
            entry.name.endswith(SETTINGS)
            and entry.is_file(follow_symlinks=False)
            and entry.stat(follow_symlinks=False).st_size < LARGE
        )
    return False


def _entries(directory: str) -> list[os.DirEntry[str]]:
    """What a directory holds; nothing of anything else."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError:
        return []


def _drop_open_files() -> None:
    """Close the files that were open when this process started: the kernel only looks when a file is opened."""
    if not sys.stdin or not sys.stdin.isatty():
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listed them
            mode = os.fstat(int(name)).st_mode
            if int(name) > 2 and (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                os.close(int(name))
