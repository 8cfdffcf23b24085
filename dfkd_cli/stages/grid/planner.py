"""Plans a grid: what its recipe says as the ordinary commands that make it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dfkd_cli import catalog, config
from dfkd_cli.artifacts.files import digest
from dfkd_cli.errors import ConfigError
from dfkd_cli.options import Assisted, Several
from dfkd_cli.settings import TYPED, Layer, Settings, resolve
from dfkd_cli.spec import Spec
from dfkd_cli.stages.grid.commands import Grid, PlannedRun, choose_rows, passed_flags, qualified
from dfkd_cli.stages.grid.language import GridRow, GridTeacher, mapping, parse
from dfkd_cli.urls import named


def plan(settings: Settings, out: Path) -> Grid:
    """The grid of a ``compare`` recipe as checked settings of ordinary commands.

    Args:
        settings: Of ``compare``; a ``--teacher`` takes the place of the recipe's.
        out: The directory of the comparison; everything is written under ``out / "runs"``, with several teachers under
            ``out / "runs" / TEACHER``.

    Raises:
        ConfigError: Unknown key, bad value, or a row from nothing.
    """
    teachers, about = parse(settings), mapping(settings.sections["about"], "about")

    def runs_under(root: Path) -> list[PlannedRun]:
        runs = [run for teacher in teachers for run in _Planner(settings, teacher, root).runs()]
        return [dataclasses.replace(run, published=_published(about, runs, run.teacher, run.row)) for run in runs]

    identity = []
    exported = [("model", named(teacher.paths["teacher"])) for teacher in teachers if "teacher" in teacher.paths]
    for run in choose_rows(runs_under(Path()), settings.inputs.rows):
        more = {key: getattr(run, key) for key in ("row", "taught_by", "published") if getattr(run, key)}
        values = run.settings.plain(volatile=False) | more
        # A teacher's path does not count, its hash does.
        identity.append({k: v for k, v in values.items() if k != "teacher" and (k, v) not in exported})
    planned = runs_under(out / "runs")
    runs = choose_rows(planned, settings.inputs.rows)
    used = {run.teacher for run in runs}
    typed = settings.inputs.teacher is not None  # which is not the paper's
    existing = {
        t.name: (t.paths["teacher"], None if typed else _published(about, planned, t.name))
        for t in teachers
        if t.name in used and "teacher" in t.paths
    }
    return Grid(runs, existing, digest(identity), out / "runs")


def _published(about: Mapping[str, Any], runs: Sequence[PlannedRun], teacher: str, row: str = "") -> float | None:
    """What the recipe's head says that a paper reports for a row, or for the teacher, a share."""
    name, rows = row or "teacher", ("teacher", *{run.row for run in runs})
    value, label = mapping(about.get("published"), "about.published", rows).get(name), f"about.published.{name}"
    if teacher:
        value = mapping(value, label, tuple({run.teacher for run in runs})).get(teacher)
        label = f"{label}.{teacher}"
    number = config.convert(value, float | None, label)
    if number is not None and not 0 <= number <= 100:
        raise ConfigError(f"{label}: {number} is out of range", "it is in per cent")
    return None if number is None else number / 100


class _Source(NamedTuple):
    """The value of a setting that says what is read, and the directories of the runs that make it."""

    value: str | list[str] | None
    made_by: tuple[Path, ...] = ()


def _made_for(seed: int, runs: Mapping[tuple[str, int], PlannedRun], row: str) -> PlannedRun:
    """The run of that row which serves the seed: the one with it, or the row's only one."""
    of_row = {other: run for (name, other), run in runs.items() if name == row}
    return of_row[seed] if seed in of_row else next(iter(of_row.values()))


def _trained(settings: Settings) -> list[str]:
    """The SPECs of the networks that a command trains."""
    if not settings.components:
        return []
    config, inputs = settings.method.config, settings.inputs
    named = inputs.model if settings.command == "train-teacher" else inputs.student
    more = (config.students or ()) if isinstance(config, Several) else ()
    more += config.through(named) if isinstance(config, Assisted) else ()
    return [spec for spec in (named, *more) if spec]


class _Planner:
    """Plans what is run for one teacher, with the ``settings`` of ``compare`` and all directories under ``root``."""

    def __init__(self, settings: Settings, teacher: GridTeacher, root: Path) -> None:
        self.settings, self.teacher, self.root = settings, teacher, root / teacher.name
        self.syntheses: dict[tuple[str, int], PlannedRun] = {}  # the run that makes the shards of each row and seed
        self.students: dict[tuple[str, int], PlannedRun] = {}  # the run that makes its student

    def runs(self) -> Iterator[PlannedRun]:
        """The commands, each after those that it waits for."""
        name = self.teacher.name
        rows = [run for row in self.teacher.rows for seed in row.seeds for run in self._row(row, seed)]
        uses_metadata = any("metadata" in run.settings.method.entry.needs for run in self.syntheses.values())
        for seed in self.teacher.seeds:
            teacher, metadata = self._shared("teacher", seed), self._shared("metadata", seed)
            own = {"seed": seed} if self.teacher.per_seed else {}
            for out in teacher.made_by:
                command = self._command("train-teacher", self.teacher.training, {}, out=out, **own)
                yield PlannedRun("", seed, *command, name, out)
            for out in metadata.made_by if uses_metadata else ():
                reads = {"teacher": teacher}
                command = self._command("collect-metadata", self.teacher.metadata, reads, out=out, **own)
                yield PlannedRun("", seed, *command, name)
        yield from rows

    def _row(self, row: GridRow, seed: int) -> Iterator[PlannedRun]:
        """The commands of a row."""
        reads = {"teacher": self._shared("teacher", seed)}
        if row.synthesize:
            self.syntheses[row.name, seed] = self._synthesis(row, seed, reads)
            yield self.syntheses[row.name, seed]
        if row.exports == "teacher":
            sets = () if row.shards is None else (str(_made_for(seed, self.syntheses, row.shards).out),)
            out = self.root / row.name / f"seed{seed}" / "export"
            command = self._export(row, seed, out, reads["teacher"], sets)
            yield PlannedRun(row.name, seed, *command, self.teacher.name, out)
            return
        for run in [self.syntheses[row.name, seed]] if row.cotrained else self._distillations(row, seed, reads):
            self.students[run.row, seed] = run
            if not row.cotrained:
                yield run
            if row.exports:
                sets = (str(run.out),) if row.cotrained else run.settings.inputs.transfer_set
                out = self.root / run.row / f"seed{seed}" / "export"
                settings, waits = self._export(row, seed, out, _Source(str(run.model), (run.out,)), sets)
                yield dataclasses.replace(
                    run, settings=settings, waits_for=waits, model=out, part="export", published=None
                )

    def _distillations(self, row: GridRow, seed: int, reads: dict[str, _Source]) -> Iterator[PlannedRun]:
        """The commands that make a row's student, or those of its curve."""
        images = None
        if row.taught_by:
            sources = [self._student(name, seed) if name != "teacher" else reads["teacher"] for name in row.taught_by]
            made_by = tuple(path for source in sources for path in source.made_by)
            reads["teacher"] = _Source([str(source.value) for source in sources], made_by)
        if row.shards is not None:
            # What the row itself names joins its shards; a transfer set from further away is a default.
            run = _made_for(seed, self.syntheses, row.shards)
            reads["transfer_set"] = _Source([str(run.out), *row.transfer_set], (run.out,))
            made = run.settings.inputs
            images = None if row.transfer_set or made.images_per_class else made.num_images
        points = {f"{row.name}@{size}": {"num_images": size} for size in row.sizes} or {row.name: {}}
        for point, more in points.items():
            out = self.root / point / f"seed{seed}" / "student"
            command = self._command("distill", row.distill, reads, out=out, seed=seed, **more)
            wanted = command[0].inputs.num_images
            if None not in (images, wanted) and wanted > images:  # seen before the shards are made
                where, hint = qualified(self.teacher.name, row.name), "synthesize more num_images"
                raise ConfigError(f"row {where}: a student from {wanted} images, of {images}", hint)
            series, taught_by = row.name if row.sizes else None, " ".join(row.taught_by)
            yield PlannedRun(point, seed, *command, self.teacher.name, out, series, taught_by)

    def _student(self, row: str, seed: int) -> _Source:
        """The student of that row."""
        run = _made_for(seed, self.students, row)
        return _Source(str(run.model), (run.out,))

    def _export(
        self, row: GridRow, seed: int, out: Path, model: _Source, sets: Sequence[str]
    ) -> tuple[Settings, frozenset[Path]]:
        """A row's export of a model, by default on the images that the model learned from; what it waits for."""
        if len(sets) != 1 and not any("calibrate" in layer.values for layer in row.export):
            raise ConfigError(f"grid.rows.{row.name}.export: on which images?", "give export.calibrate")
        images = [Layer("", {"calibrate": sets[0]})] if len(sets) == 1 else []
        made = frozenset(run.out for run in self.syntheses.values() if str(run.out) in sets)
        settings, waits = self._command("export", [*images, *row.export], {"model": model}, out=out, seed=seed)
        return settings, waits | made

    def _synthesis(self, row: GridRow, seed: int, reads: Mapping[str, _Source]) -> PlannedRun:
        """A row's synthesize, with what its method needs."""
        student = resolve("distill", row.distill).inputs.student
        asked = resolve("synthesize", row.synthesize)
        needs = asked.method.entry.needs
        if row.cotrained and "student" not in needs:
            raise ConfigError(f"grid.rows.{row.name}.cotrained: the method trains no student", "leave it out")
        reads = {**reads, "metadata": self._shared("metadata", seed) if "metadata" in needs else _Source(None)}
        more = {"student": student} if "student" in needs and asked.inputs.student is None else {}
        out = self.root / row.name / f"seed{seed}" / "shards"
        command = self._command("synthesize", row.synthesize, reads, out=out, seed=seed, **more)
        return PlannedRun(row.name, seed, *command, self.teacher.name, out / "student" if row.cotrained else None)

    def _shared(self, what: str, seed: int) -> _Source:
        """The teacher or its metadata: what was there before, or is made here for all rows."""
        if what in self.teacher.paths:
            return _Source(self.teacher.paths[what])
        out = self.root / what / f"seed{seed}" if self.teacher.per_seed else self.root / what
        return _Source(str(out), (out,))

    def _command(
        self, command: str, layers: list[Layer], reads: Mapping[str, _Source], **values: Any
    ) -> tuple[Settings, frozenset[Path]]:
        """What the recipe says of a command, with what it reads and more that the grid decides; what it waits for."""
        values |= {name: source.value for name, source in reads.items()}
        read = values.get("teacher", values.get("model", ""))
        foreign = self.teacher.paths.get("teacher") in (read if isinstance(read, list) else [read])
        flags = passed_flags(self.settings, command, foreign)
        kinds = config.hints(catalog.command(command).inputs)  # a path in a list of them may have commas
        values |= {
            key: [value] for key, value in values.items() if isinstance(value, str) and config.is_list(kinds.get(key))
        }
        own = Layer("", {**values, "overwrite": False}, self.settings.code.typed)
        settings = resolve(command, [*layers, own, (TYPED, flags)])
        if settings.run.devices > 1 or settings.run.num_nodes > 1:
            what = f"grid: {command} on {settings.run.devices * settings.run.num_nodes} devices"
            raise ConfigError(f"{what}: each command has one", "several run at a time: dfkd compare --devices N")
        # Here, and not when other rows have taken their hours.
        new = _trained(settings)
        for spec in [*([read] if isinstance(read, str) else read), *new]:
            if not Path(spec).is_dir():
                settings.code.check(spec)
        for name in (Spec.read(spec).rest for spec in new):
            if name and {":", "/"}.isdisjoint(name) and not Path(name).is_dir():
                catalog.listed(name)
        return settings, frozenset(path for source in reads.values() for path in source.made_by)
