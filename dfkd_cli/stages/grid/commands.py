"""The commands that a grid comes to: each with those that it waits for, what reaches it, and how it is carried out."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfkd_cli import catalog, config
from dfkd_cli.artifacts.copies import on_this_machine
from dfkd_cli.artifacts.files import take_lock
from dfkd_cli.artifacts.integrity import read_run
from dfkd_cli.artifacts.run import LOCK, check_free
from dfkd_cli.errors import ConfigError, DfkdError, RunFailed, did_you_mean, machine_can_fail
from dfkd_cli.models.names import Architecture
from dfkd_cli.options import FOREIGN, Run
from dfkd_cli.processes import computing_with
from dfkd_cli.settings import Layer, Settings, resolve
from dfkd_cli.spec import Spec
from dfkd_cli.stages.inputs import check_precision, pick_device
from dfkd_cli.stages.lineage import replaced
from dfkd_cli.stages.training import specs
from dfkd_cli.trust import CONFIG
from dfkd_cli.ui import LOGGER, Notes, Terminal

# The flags of `compare` that reach every command which has them.
_PASSED = ("device", "threads", "precision", "logger", "allow_code", "code_dir", "data_dir")
LOST = 90  # seconds; a node of Ray that hears nothing of its cluster ends after 60


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One command of a grid."""

    row: str  # empty for a teacher and its metadata
    seed: int
    settings: Settings
    waits_for: frozenset[Path]  # output directories of the runs that must be finished before this one can start
    teacher: str  # its teacher's name among several, empty for the only one
    model: Path | None = None  # the directory of the model that it makes for its row
    series: str | None = None  # the curve that the row is a point of
    taught_by: str = ""  # the rows whose students are its teachers, or empty
    published: float | None = None  # what a paper reports as top-1 of the model, a share
    part: str = ""  # what it makes of the row's model, in a row of the table of its own: ROW/PART

    @property
    def label(self) -> str:
        """The name of its model's row in the table, of a teacher and its metadata ``teacher``."""
        return "/".join(filter(None, (self.row or "teacher", self.part)))

    @property
    def out(self) -> Path:
        """The directory that the command writes."""
        return self.settings.out

    @property
    def row_names(self) -> set[str]:
        """What the row of the recipe is called, of a curve's point too: without and with its teacher."""
        row = self.series or self.row
        return {row, qualified(self.teacher, row)}

    def __str__(self) -> str:
        """One line for the user."""
        name = qualified(self.teacher, self.label)
        return f"{name}, seed {self.seed}: {self.settings.command} -> {self.out}"


@dataclasses.dataclass(frozen=True)
class Grid:
    """The commands of a grid."""

    runs: tuple[PlannedRun, ...]  # teacher by teacher: itself, its metadata, its rows; each after those it waits for
    existing: Mapping[str, tuple[str, float | None]]  # path or SPEC of teachers that were there, and what is published
    sha256: str  # stands for all that decides the tables; where the directories lie does not
    root: Path  # the directory of their directories

    def made(self, run: PlannedRun) -> bool:
        """Whether a run is finished, of what now lies outside of the grid; else its command has to say what differs."""
        if read_run(run.out).get("status") != "done":
            return False
        try:
            check_free(run.out, run.settings, own_code(run.settings))
        except ConfigError:
            return False
        return not replaced(run.out, self.root)

    def other_sources(self, run: PlannedRun) -> list[str]:
        """What a run that is there read instead of what is planned. Of what lies outside of the grid hashes tell."""
        path, place = run.out / CONFIG, str(run.out.relative_to(self.root))
        recorded = catalog.read_recipe(path) if path.is_file() else {}
        if not str(recorded.get("out")).endswith(place):
            return []
        before, now = str(recorded["out"]).removesuffix(place), str(run.out).removesuffix(place)  # it may have moved
        changed = []
        for name in ("teacher", "transfer_set", "model", "calibrate"):
            planned = getattr(run.settings.inputs, name, None)
            if planned and recorded.get(name):
                then, own = _sources(recorded[name], before), _sources(planned, now)
                if then != own:
                    changed.append(f"{name.replace('_', '-')}: {' '.join(then)} instead of {' '.join(own)}")
        return changed


def own_code(settings: Settings) -> list[dict[str, Any]]:
    """What a command trains, as its parents, where all of that is code of the user's; else nothing."""
    if settings.command not in ("train-teacher", "synthesize", "distill"):
        return []
    named = [getattr(settings.inputs, name, None) for name in ("student", "model")]
    networks = [spec for name in named if isinstance(name, str) for spec in specs(settings, name)]
    if not all((file := Spec.read(spec).file) is not None and Path(file).is_file() for spec in networks):
        return []
    return [parent for spec in networks for parent in Architecture(spec).parents]


def _sources(value: Any, root: str) -> list[str]:
    """What is read: what lies in a grid by its place there, ``real`` and ``NAME:N`` as they are, all else alike."""
    named = re.compile(r"real|[\w-]+:\d+")
    return [
        text.removeprefix(root) if text.startswith(root) or named.fullmatch(text) else "what lies elsewhere"
        for text in ([value] if isinstance(value, str) else map(str, value))
    ]


def qualified(teacher: str, row: str) -> str:
    """The name of a row, after its teacher where there are several: ``resnet/zskd``."""
    return f"{teacher}/{row}" if teacher else row


def choose_rows(runs: Sequence[PlannedRun], rows: Sequence[str] | None) -> tuple[PlannedRun, ...]:
    """The runs of these rows, ``ROW`` or ``TEACHER/ROW``, and all that they wait for; every run where None.

    Raises:
        ConfigError: There is no such row.
    """
    if rows is None:
        return tuple(runs)
    choices = {name for run in runs if run.row for name in run.row_names}
    for row in rows:
        if row not in choices:
            raise ConfigError(f"--rows: the grid has no row {row!r}", did_you_mean(row, choices))
    chosen: list[PlannedRun] = []
    needed: set[Path] = set()
    for run in reversed(runs):
        if run.out in needed or not run.row_names.isdisjoint(rows):
            needed |= run.waits_for
            chosen.insert(0, run)
    return tuple(chosen)


def passed_flags(settings: Settings, command: str, foreign: bool) -> dict[str, Any]:
    """What is typed or set for ``compare`` that the command has too; of a foreign teacher only where it reads that."""
    fields = {*config.hints(catalog.command(command).inputs), *config.hints(Run)}
    values = config.plain(settings.inputs) | config.plain(settings.run)
    unset = config.defaults(type(settings.inputs)) | config.defaults(Run)
    names = _PASSED + FOREIGN if foreign else _PASSED
    said = {name for name in names if name in settings.typed or values.get(name) != unset.get(name)}
    return {name: values[name] for name in names if name in fields & said}


def carry_out(
    values: dict[str, Any], typed: frozenset[str], verbosity: int, silent: bool, retried: bool = False
) -> None:
    """Run a command, perhaps in another process: settings reach it as plain values, and with what the user typed.

    One that is ``retried`` may have been begun elsewhere, on a machine that is given up for lost.

    Raises:
        DfkdError: It failed, by whatever fault: the other commands of a grid go on.
    """
    command = values.pop("command")
    quiet = Terminal(verbosity, as_json=True, silent=silent)  # stdout is for the comparison
    settings = on_this_machine(resolve(command, [Layer("", values, typed)]), quiet, known=True)
    if retried:
        _outwait_lost(settings.out / LOCK)
    if "device" not in catalog.command(command).ignores:
        check_precision(settings.run, pick_device(settings.run.device))
    alone = not LOGGER.handlers  # in a process of its own nobody hears its notes yet
    heard = Notes(quiet).heard() if alone else contextlib.nullcontext()
    try:
        with heard, machine_can_fail(), computing_with(settings.run.threads), contextlib.redirect_stdout(sys.stderr):
            catalog.command(command).load()(settings, quiet)
    except DfkdError:
        raise
    except Exception as error:  # a bug, or what a library or a GPU refuses
        traceback.print_exc()
        said, *_ = traceback.format_exception_only(error)[-1].splitlines()
        raise RunFailed(said, "its traceback is on stderr; please report it with `dfkd info`") from error


def _outwait_lost(lock: Path) -> None:
    """Wait while a directory is held by what ran in it on a lost machine: it soon ends, too."""
    for _ in range(LOST if lock.exists() else 0):
        if (held := take_lock(lock)) is not None:
            held.close()
            return
        time.sleep(1)
