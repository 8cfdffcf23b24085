"""How long a grid takes, before it is run: its commands are timed on this device, each for a few rounds.

A command that differs from another one in its seed and its directories alone is not timed again. What it reads is not
there yet, so it reads stand-ins. Models and metadata are made by the grid's own commands with all lengths cut: networks
that have hardly learned are as fast as others. Instead of shards it reads as many images of noise.

What counts: the start of a command, its first round, and its other rounds at the speed of those that were done. What
comes after the rounds does not count (the measures of a model, the files), except where a command was over sooner.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dfkd_cli.artifacts.files import digest
from dfkd_cli.artifacts.integrity import read_run
from dfkd_cli.artifacts.shards import ShardReader
from dfkd_cli.data.access import access
from dfkd_cli.errors import ConfigError, DfkdError
from dfkd_cli.options import Assisted
from dfkd_cli.rounds.pilot import piloted
from dfkd_cli.settings import Settings
from dfkd_cli.stages.grid.commands import Grid, PlannedRun, carry_out, qualified
from dfkd_cli.stages.grid.planner import plan
from dfkd_cli.stages.grid.scheduler import run_grid
from dfkd_cli.synthesis_options import ImageOptimization
from dfkd_cli.ui import QUIET, Progress, Terminal
from dfkd_cli.workers import Inside, Launcher, Workers

WORKERS = 1, 2, 8, 64
MOST_ITERATIONS = 50  # inner steps on a batch of images that are timed
TIME = "time.txt"
READ = {"teacher", "transfer_set", "metadata", "model", "calibrate", "check"}  # what commands read, as a grid plans it


def estimate(settings: Settings, grid: Grid, terminal: Terminal) -> dict[str, Any]:
    """Time a grid and say what each row takes, and the whole by so many workers.

    Args:
        settings: Of ``compare``.
        grid: Its plan.
        terminal: Where it is said.

    Returns:
        ``rows``, with the seconds of each; ``makespan``, seconds by the number of workers; ``unknown``, what could not
        be timed, which counts as nothing.
    """
    seconds: dict[Path, float] = {}
    unknown: dict[str, str] = {}
    bar = contextlib.closing(Progress(terminal, "estimate", "commands", len(grid.runs)))
    with bar as progress, tempfile.TemporaryDirectory() as place:
        pilots = _Pilots(Path(place))
        for planned, stand_in in zip(grid.runs, plan(settings, Path(place)).runs, strict=True):
            try:
                seconds[planned.out] = pilots.seconds(stand_in)
            except DfkdError as error:
                seconds[planned.out], unknown[str(planned)] = 0.0, str(error)
            progress.update(len(seconds))
    seconds |= {run.out: 0.0 for run in grid.runs if read_run(run.out).get("status") == "done"}
    makespan = {str(count): round(simulate(grid, count, seconds), 1) for count in WORKERS}
    rows = _rows(grid, seconds)
    for row in rows:
        terminal.answer(f"{row['seconds'] / 3600:8.2f} h  {row['row']}: {row['commands']}")
    for name, why in unknown.items():
        terminal.answer(f"       ? h  {name}: {why}")
    hours = ", ".join(f"{count}: {taken / 3600:.2f} h" for count, taken in makespan.items())
    terminal.answer(f"all of it, by the number of workers, each as fast as this one is alone: {hours}")
    return {"rows": rows, "makespan": makespan, "unknown": unknown}


def simulate(grid: Grid, count: int, seconds: Mapping[Path, float]) -> float:
    """How long a grid takes with so many workers, where each command takes so many seconds."""
    clock = _Clock(count, seconds)
    run_grid(grid, clock, Terminal(silent=True))
    return clock.now


class _Clock(Launcher):
    """Carries out nothing, and tells when it would be done."""

    alone = True

    def __init__(self, count: int, seconds: Mapping[Path, float]) -> None:
        self.count, self.seconds, self.now = count, seconds, 0.0
        self.numbers = itertools.count()
        self.running: list[tuple[float, int, PlannedRun]] = []  # a heap by the time of the end

    def __exit__(self, *_: object) -> None:
        """Nothing has to be stopped."""

    @property
    def busy(self) -> int:
        return len(self.running)

    @property
    def free(self) -> bool:
        return self.busy < self.count

    def submit(self, name: Any, call: Callable[..., Any], *arguments: Any, inside: Inside | None = None) -> None:
        heapq.heappush(self.running, (self.now + self.seconds[name.out], next(self.numbers), name))

    def next(self) -> tuple[Any, DfkdError | None]:
        self.now, _, run = heapq.heappop(self.running)
        return run, None


class _Pilots:
    """Times commands of a grid that is planned below a directory of its own.

    Args:
        place: That directory.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.known: dict[str, tuple[Path, float]] = {}  # of each distinct command where its stand-in is, and its time
        self.numbers = itertools.count()  # of what is timed: one that fails leaves something behind
        self.stand_ins: dict[Path, Path] = {}  # of the directory of each command
        self.images: dict[Path, int] = {}  # how many there would be in each directory of shards

    def seconds(self, run: PlannedRun) -> float:
        """How long a command takes.

        Raises:
            DfkdError: It cannot be told.
        """
        if not run.waits_for <= self.stand_ins.keys():
            raise ConfigError("what it reads is not known")
        settings = self._with_stand_ins(run.settings)
        key = digest({name: value for name, value in settings.plain().items() if name not in ("seed", "out")})
        if key not in self.known:
            if isinstance(_method(settings), Assisted):
                raise ConfigError("the hops of a chain are not timed")
            _carry_out(_at(settings.shortened(), run.out), carry_out)
            self.known[key] = run.out, self._time(settings)
        self.stand_ins[run.out], taken = self.known[key]
        if settings.command == "synthesize":
            per_class = settings.inputs.images_per_class
            classes = ShardReader(self.stand_ins[run.out]).num_classes
            self.images[run.out] = per_class * classes if per_class else settings.inputs.num_images
        return taken

    def _with_stand_ins(self, settings: Settings) -> Settings:
        """The command with what is there now, instead of what it reads."""

        def instead(name: str) -> str:
            if Path(name) in self.images:
                return f"noise:{self.images[Path(name)]}"
            made_by = next((out for out in self.stand_ins if Path(name).is_relative_to(out)), None)
            return name if made_by is None else str(self.stand_ins[made_by] / Path(name).relative_to(made_by))

        changes: dict[str, Any] = {}
        for name in READ & vars(settings.inputs).keys():
            value = getattr(settings.inputs, name)
            changes[name] = tuple(map(instead, value)) if isinstance(value, tuple) else value and instead(value)
        made = [out for out in map(Path, getattr(settings.inputs, "transfer_set", ())) if out in self.images]
        if made and (per_class := settings.inputs.images_per_class):  # of noise nothing is of a class
            count = per_class * ShardReader(self.stand_ins[made[0]]).num_classes
            changes |= {"images_per_class": 0, "num_images": count}
        return settings.replace(**changes)

    def _time(self, settings: Settings) -> float:
        """Let a command do a few rounds. A batch of images is optimised for few inner steps, which stand for all.

        Rounds of a warm-up, in which a student rests, are timed apart from the others.
        """
        warmup = getattr(_method(settings), "warmup_share", 0.0)
        if not 0 < warmup < 1:
            return self._time_alike(settings)
        resting, learning = (self._time_alike(_with_method(settings, warmup_share=share)) for share in (1.0, 0.0))
        return warmup * resting + (1 - warmup) * learning

    def _time_alike(self, settings: Settings) -> float:
        """The same where all rounds are alike."""
        out, method = self.place / "timed" / str(next(self.numbers)), _method(settings)
        simple = isinstance(method, ImageOptimization) and "student" not in settings.method.entry.needs
        parts = 1.0
        if simple and not getattr(method, "coarse_iterations", 0) and method.iterations > MOST_ITERATIONS:
            parts = method.iterations / MOST_ITERATIONS
            settings = _with_method(settings, iterations=MOST_ITERATIONS)
        _carry_out(_at(settings, out), _timed, time.monotonic(), parts)
        return float((out / TIME).read_text())


def _with_method(settings: Settings, **values: Any) -> Settings:
    """The command with other values in its method's configuration."""
    other = dataclasses.replace(settings.method, config=dataclasses.replace(settings.method.config, **values))
    return dataclasses.replace(settings, components={**settings.components, "method": (other,)})


def _method(settings: Settings) -> Any:
    """The configuration of the command's method, None where it has none."""
    return settings.method.config if "method" in settings.components else None


def _at(settings: Settings, out: Path) -> Settings:
    return dataclasses.replace(settings, run=dataclasses.replace(settings.run, out=str(out)))


def _carry_out(settings: Settings, call: Callable[..., None], *more: Any) -> None:
    """Carry out a command as a grid does, in a process of its own.

    Raises:
        DfkdError: It failed.
    """
    reach = access(settings)
    with Workers(1) as workers:
        inside = contextlib.nullcontext if reach is None else reach.confined
        workers.submit(None, call, settings.plain(), settings.code.typed, QUIET, True, *more, inside=inside)
        _, error = workers.next()
    if error is not None:
        raise error


def _timed(
    values: dict[str, Any], typed: frozenset[str], verbosity: int, silent: bool, begun: float, parts: float
) -> None:
    """Carry out a command that began at a time until its rounds are known; write in its directory how long all take.

    A round takes so many times as long as the part of it that is done here.
    """
    with piloted() as pilot:
        carry_out(dict(values), typed, verbosity, silent)
    ended = time.monotonic()
    start = pilot.starts[0] if pilot.starts else ended
    rounds = pilot.seconds() if pilot.left else ended - start
    Path(values["out"], TIME).write_text(str(start - begun + rounds * parts))


def _rows(grid: Grid, seconds: Mapping[Path, float]) -> list[dict[str, Any]]:
    """What each row takes, and its commands: ``2 x distill 31 s``."""
    rows: dict[str, dict[str, list[float]]] = {}
    for run in grid.runs:
        commands = rows.setdefault(qualified(run.teacher, run.row or "teacher"), {})
        commands.setdefault(run.settings.command, []).append(seconds[run.out])
    return [
        {
            "row": row,
            "seconds": round(sum(map(sum, commands.values())), 1),
            "commands": ", ".join(f"{len(each)} x {name} {max(each):.0f} s" for name, each in commands.items()),
        }
        for row, commands in rows.items()
    ]
