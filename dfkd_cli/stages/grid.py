"""A grid: many pipelines in one recipe, planned as the ordinary commands that make them.

    grid:
      seeds: [0, 1, 2]                      every row is run with each of them
      teacher: {recipe: digits}             train-teacher settings, or the path of a teacher; `per_seed: true` for one
                                            teacher per seed
      metadata: {dataset: digits}           collect-metadata settings, or the path of a metadata directory; made only
                                            where a row's method uses metadata, for every teacher
      synthesize: {num_images: 4000}        what every row's synthesize has in common
      student: {recipe: digits}             what every row's distill has in common
      rows:
        zskd: {synthesize: {method: zskd}}                                    shards, then a student from them
        zskd-at: {shards: zskd, distill: {objective: [response, at]}}         another student from the same shards
        real: {distill: {transfer_set: [real]}}                               no shards at all
        growing: {shards: zskd, sizes: [100, 1000, 4000], seeds: [0]}         a curve: a student from the first 100
                                                                              images, from the first 1000, ...
        loop: {synthesize: {method: METHOD}, cotrained: true}                 the student in the method's loop, not
                                                                              one that is distilled afterwards
        second: {taught_by: zskd, shards: zskd}                               a student of the student of another row,
                                                                              measured against the grid's teacher all
                                                                              the same; its seconds are its own alone

A student in the loop has the architecture that the row would distill, unless ``synthesize`` names another.

A mapping of settings may name a ``recipe`` of its command. What the grid itself says wins over every recipe, and a row
over what all have in common.

Several teachers stand side by side in ``teachers`` instead of ``teacher``. Every row is then run with each of them, or
with those alone that it names, and may say for each what is other with it, key by key; each has a directory, a ranking
and metadata of its own. What only one teacher's rows have in common stands under that teacher, and wins over what all
rows have in common:

    grid:
      teachers:
        lenet5: {recipe: mnist}
        resnet: {path: resnet/, student: {student: resnet8}}                  also metadata and synthesize
      student: {recipe: mnist}
      rows:
        zskd: {synthesize: {recipe: zskd-mnist}}
        soft-target: {teachers: [lenet5], synthesize: {method: soft-target}}
        dafl:
          synthesize: {method: dafl}
          teachers: {lenet5: {synthesize: {features: fc1}}, resnet: {}}       also distill

``--rows zskd resnet/noise`` runs and shows these rows alone, and makes what they are made from.

What papers report for the rows, or for the teacher, top-1 in per cent, stands in the recipe's head and is shown beside
what is measured; it decides nothing:

    about:
      published: {teacher: 99.34, zskd: 98.77}                              with several teachers: zskd: {lenet5: 98.77}
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dfkd_cli import catalog, config
from dfkd_cli.artifacts.files import digest
from dfkd_cli.errors import ConfigError, did_you_mean, memory_can_end
from dfkd_cli.resolve import TYPED, Layer, Settings, recipe_layer, resolve
from dfkd_cli.settings import FOREIGN, Run
from dfkd_cli.ui import Terminal
from dfkd_cli.workers import Workers

_COMMON = ("metadata", "synthesize", "student")  # what rows have in common: all of them, or those of one teacher
_KEYS = ("seeds", "teacher", "teachers", *_COMMON, "rows")
_ROW_KEYS = ("teachers", "synthesize", "cotrained", "shards", "taught_by", "distill", "sizes", "seeds")
_OWN = ("teacher", "metadata", "out", "overwrite", "seed")  # what the grid itself decides for every command
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# The flags of `compare` that reach every stage which has them.
_PASSED = ("device", "precision", "logger", "allow_code", "data_dir")
MODELS = ("train-teacher", "distill")  # the commands that make models


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of the grid.

    Attributes:
        row: Empty for a teacher and its metadata.
        seed: The seed.
        settings: The command.
        teacher: The name of its teacher among several; empty for the only one.
        series: The curve that the row is a point of, or None.
        taught_by: The row whose student is the teacher, or empty.
        cotrained: Whether the student that a synthesis trains along is the row's.
        published: What a paper reports as top-1 of the model that is made, a share, or None.
    """

    row: str
    seed: int
    settings: Settings
    teacher: str = ""
    series: str | None = None
    taught_by: str = ""
    cotrained: bool = False
    published: float | None = None

    @property
    def out(self) -> Path:
        """The directory that the command writes."""
        return self.settings.out

    @property
    def model(self) -> Path | None:
        """The directory of the model that it makes for its row."""
        if self.settings.command in MODELS:
            return self.out
        return self.out / "student" if self.cotrained else None

    @property
    def name(self) -> str:
        """The row, or ``teacher``; after its teacher where there are several: ``resnet/zskd``."""
        return qualified(self.teacher, self.row or "teacher")

    @property
    def row_names(self) -> tuple[str, str]:
        """What the row of the recipe is called, of a curve's point too: without and with its teacher."""
        row = self.series or self.row
        return row, qualified(self.teacher, row)

    def waits_for(self, unfinished: Collection[Path]) -> bool:
        """Whether it reads something in one of the directories."""
        inputs = self.settings.inputs
        found = [getattr(inputs, name, None) for name in ("teacher", "metadata")]
        reads = [*filter(None, found), *(getattr(inputs, "transfer_set", None) or ())]
        return any(Path(name).is_relative_to(out) for name in reads for out in unfinished)

    def describe(self) -> str:
        """One line for the user."""
        return f"{self.name}, seed {self.seed}: {self.settings.command} -> {self.out}"


@dataclasses.dataclass(frozen=True)
class Grid:
    """The commands of a grid, in an order in which they can be run.

    Attributes:
        steps: Teacher by teacher: itself, its metadata, then row by row.
        given: The path or SPEC of each teacher that was there before, by its name, which is empty for the only one.
        sha256: Stands for all that decides the tables; where the directories lie does not.
    """

    steps: tuple[Step, ...]
    given: Mapping[str, str]
    sha256: str


def plan(settings: Settings, out: Path) -> Grid:
    """The grid of a ``compare`` recipe as checked settings of ordinary commands.

    Args:
        settings: Of ``compare``; a ``--teacher`` takes the place of the recipe's.
        out: The directory of the comparison; everything is written under ``out / "runs"``, with several teachers under
            ``out / "runs" / TEACHER``.

    Raises:
        ConfigError: Unknown key, bad value, or a row from nothing.
    """
    grid = _mapping(settings.sections["grid"], "grid", _KEYS)
    teachers = _teachers(grid, settings.inputs.teacher)

    def planners(root: Path) -> list[_Planner]:
        return [_Planner(settings, grid, root, name, teachers) for name in teachers]

    def steps(root: Path) -> tuple[Step, ...]:
        found = [step for planner in planners(root) for step in planner.steps()]
        return _only(settings.inputs.rows, list(_published(_mapping(settings.sections["about"], "about"), found)))

    identity, chosen = [], set()
    for step in steps(Path()):
        more = {key: getattr(step, key) for key in ("row", "taught_by", "published") if getattr(step, key)}
        values = step.settings.plain(volatile=False) | more
        values.pop("teacher", None)  # a path: the teacher's hash counts
        identity.append(values)
        chosen.add(step.teacher)
    given = {p.name: p.given for p in planners(out) if p.given is not None and p.name in chosen}
    return Grid(steps(out / "runs"), given, digest(identity))


def _only(rows: Sequence[str] | None, steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps of these rows, by :attr:`Step.row_names`, and those that they wait for; of all rows where None."""
    if rows is None:
        return tuple(steps)
    known = {name for step in steps if step.row for name in step.row_names}
    for row in rows:
        if row not in known:
            raise ConfigError(f"--rows: the grid has no row {row!r}", did_you_mean(row, known))
    chosen: list[Step] = []
    for step in reversed(steps):  # what a step waits for stands before it
        if not {*step.row_names}.isdisjoint(rows) or any(later.waits_for([step.out]) for later in chosen):
            chosen.insert(0, step)
    return tuple(chosen)


def _published(about: Mapping[str, Any], steps: Sequence[Step]) -> Iterator[Step]:
    """The steps with what the recipe's head says that papers report."""
    teachers = tuple({step.teacher for step in steps})
    published = _mapping(about.get("published"), "about.published", ("teacher", *{step.row for step in steps}))
    for step in steps:
        name = step.row or "teacher"
        value, label = published.get(name), f"about.published.{name}"
        if step.teacher:
            value, label = _mapping(value, label, teachers).get(step.teacher), f"{label}.{step.teacher}"
        number = config.convert(value, float | None, label)
        if number is not None and not 0 <= number <= 100:
            raise ConfigError(f"{label}: {number} is out of range", "it is in per cent")
        yield dataclasses.replace(step, published=None if number is None else number / 100)


def _teachers(grid: Mapping[str, Any], typed: str | None) -> dict[str, Any]:
    """What the grid says of each teacher, by its name; the only one of ``teacher`` has an empty name."""
    if "teachers" not in grid:
        return {"": typed or grid.get("teacher", {})}
    teachers = {str(name): value for name, value in _mapping(grid["teachers"], "grid.teachers").items()}
    if "teacher" in grid:
        raise ConfigError("grid: has both teacher and teachers", "choose one")
    if typed is not None:
        hint = "leave it out, or change grid.teachers"
        raise ConfigError(f"--teacher {typed}: the grid has teachers of its own: {', '.join(teachers)}", hint)
    if not teachers:
        raise ConfigError("grid.teachers: needs at least one teacher", "e.g. teachers: {lenet5: {recipe: mnist}}")
    for name in teachers:
        _check_name(name, f"grid.teachers.{name}")
    return teachers


def _check_name(name: str, where: str) -> None:
    """Refuse what cannot be the name of a directory beside those of teacher and metadata."""
    if not _NAME.fullmatch(name) or name in ("teacher", "metadata"):
        hint = "letters, digits, . _ -; not `teacher`, not `metadata`"
        raise ConfigError(f"{where}: not a name for a row or a teacher", hint)


def qualified(teacher: str, row: str) -> str:
    """The name of a row, after its teacher where there are several: ``resnet/zskd``."""
    return f"{teacher}/{row}" if teacher else row


def _mapping(value: Any, where: str, known: tuple[str, ...] | None = None) -> Mapping[str, Any]:
    """``value``, if it is a mapping with no key but the ``known``; nothing at all is an empty mapping."""
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{where}: must be a mapping of keys to values, not {value!r}")
    for key in value or {}:
        if known is not None and key not in known:
            raise ConfigError(f"{where}.{key}: unknown key", did_you_mean(str(key), known))
    return value or {}


def _check_sizes(steps: Sequence[Step]) -> None:
    """Refuse a student from more images than its shards will have, before they are made."""
    made = {str(step.out): step.settings.inputs.num_images for step in steps if step.settings.command == "synthesize"}
    for step in steps:
        wanted, sets = step.settings.inputs.num_images, getattr(step.settings.inputs, "transfer_set", None)
        if not sets or wanted is None or not made.keys() >= set(sets):
            continue
        there = sum(made[name] for name in sets)
        if wanted > there:
            where = qualified(step.teacher, step.series or step.row)
            raise ConfigError(f"row {where}: a student from {wanted} images, of {there}", "synthesize more num_images")


def _with_own(row: Mapping[str, Any], teacher: str, where: str) -> Mapping[str, Any]:
    """A row with what it says for one teacher, which takes the place of the same keys.

    Raises:
        ConfigError: The row has nothing of the kind without it.
    """
    teachers = row.get("teachers")
    own, changed = teachers.get(teacher) if isinstance(teachers, Mapping) else None, {}
    for key, value in _mapping(own, f"{where}.teachers.{teacher}", ("synthesize", "distill")).items():
        if key == "synthesize" and key not in row:
            raise ConfigError(f"{where}.teachers.{teacher}.{key}: the row has none for all", "give it to the row")
        special = _mapping(value, f"{where}.teachers.{teacher}.{key}")
        changed[key] = {**_mapping(row.get(key), f"{where}.{key}"), **special}
    return {**row, **changed}


def _layers(command: str, *sections: tuple[str, Any], own: tuple[str, ...] = _OWN) -> list[Layer]:
    """Mappings of settings as layers: first the recipes they name, then what they say themselves.

    Args:
        command: Whose settings they are.
        sections: Where each stands, for messages, and the mapping.
        own: Keys that they must not have.
    """
    recipes, layers = [], []
    for where, value in sections:
        values = dict(_mapping(value, where))
        for key in own:
            if key in values:
                raise ConfigError(f"{where}.{key}: the grid itself decides this", "leave it out")
        recipe = values.pop("recipe", None)
        if recipe is not None:
            recipes.append(recipe_layer(str(recipe), command))
        layers.append((f"{where}.", values))
    return recipes + layers


class _Planner:
    """The recipe's grid with one of its teachers, checked, and its commands under one directory.

    Args:
        settings: Of ``compare``.
        grid: The recipe's grid.
        root: Where the grid's directories go.
        name: The teacher's name, empty for the only one.
        teachers: What the grid says of each.
    """

    def __init__(
        self, settings: Settings, grid: Mapping[str, Any], root: Path, name: str, teachers: Mapping[str, Any]
    ) -> None:
        self.settings, self.name, self.root = settings, name, root / name
        self.seeds = config.convert(grid.get("seeds", [0]), tuple[int, ...], "grid.seeds")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"grid.seeds: {list(self.seeds)} must be different whole numbers of at least 0")
        where, given = f"grid.teachers.{name}" if name else "grid.teacher", teachers[name]
        teacher = {"path": given} if isinstance(given, str) else dict(_mapping(given, where))
        own = {key: teacher.pop(key) for key in _COMMON if name and key in teacher}
        common = {key: [(f"grid.{key}", grid.get(key)), (f"{where}.{key}", own.get(key))] for key in _COMMON}
        self.synthesize, self.student = common["synthesize"], common["student"]
        self.given = config.convert(teacher.pop("path", None), str | None, f"{where}.path")
        if self.given is not None and teacher:
            raise ConfigError(f"{where}.{next(iter(teacher))}: the teacher is already there", "leave out this or path")
        self.per_seed = config.convert(teacher.pop("per_seed", False), bool, f"{where}.per_seed")
        decided = _OWN if self.per_seed else tuple(key for key in _OWN if key != "seed")
        self.teacher = _layers("train-teacher", (where, teacher), own=decided)
        if name and isinstance(grid.get("metadata"), str):
            raise ConfigError("grid.metadata: a directory belongs to one teacher", f"give it as {where}.metadata")
        paths = [value for _, value in common["metadata"] if isinstance(value, str)]
        self.given_metadata = paths[-1] if paths else None
        metadata = [section for section in common["metadata"] if not isinstance(section[1], str)]
        self.metadata = _layers("collect-metadata", *metadata, own=decided)
        self.rows = self._rows(grid, teachers)

    def _rows(self, grid: Mapping[str, Any], teachers: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """The rows of this teacher, by name."""
        rows = _mapping(grid.get("rows"), "grid.rows")
        if not rows:
            raise ConfigError("grid.rows: needs at least one row", "e.g. rows: {zskd: {synthesize: {method: zskd}}}")
        mine = {}
        for name, value in rows.items():
            where = f"grid.rows.{name}"
            row = _mapping(value, where, _ROW_KEYS)
            _check_name(str(name), where)
            chosen = row.get("teachers", list(teachers))
            chosen = list(chosen) if isinstance(chosen, Mapping) else chosen
            chosen = config.convert(chosen, tuple[str, ...], f"{where}.teachers")
            for unknown in set(chosen) - set(teachers):
                hint = did_you_mean(unknown, teachers) if self.name else "the grid has one: leave it out"
                raise ConfigError(f"{where}.teachers: no teacher {unknown!r}", hint)
            if self.name in chosen:
                mine[str(name)] = _with_own(row, self.name, where)
        if not mine:
            raise ConfigError(f"grid.teachers.{self.name}: no row is run with it", "leave it out, or name it in a row")
        return mine

    def steps(self) -> Iterator[Step]:
        """The commands; rows that use what another row makes come after it."""
        names = sorted(self.rows, key=self._depth)
        rows = [step for name in names for seed in self._seeds(name) for step in self._row(name, seed)]
        _check_sizes(rows)
        uses_metadata = any(step.settings.command == "synthesize" and step.settings.inputs.metadata for step in rows)
        for seed in self.seeds if self.per_seed else self.seeds[:1]:
            more = {"seed": seed} if self.per_seed else {}
            if self.given is None:
                yield self._step("", seed, "train-teacher", self.teacher, {"out": self._teacher(seed), **more})
            if uses_metadata and self.given_metadata is None:
                values = {"teacher": self._teacher(seed), "out": self._metadata(seed), **more}
                yield self._step("", seed, "collect-metadata", self.metadata, values)
        yield from rows

    def _depth(self, name: str, above: tuple[str, ...] = ()) -> int:
        """How many rows stand between this one and a row that uses no other's results."""
        if name in above:
            raise ConfigError(
                f"grid.rows.{name}: rows that wait for each other: {', '.join(above)}", "break the circle"
            )
        sources = [str(self.rows[name][key]) for key in ("shards", "taught_by") if key in self.rows[name]]
        return 1 + max((self._depth(row, (*above, name)) for row in sources if row in self.rows), default=-1)

    def _row(self, name: str, seed: int) -> Iterator[Step]:
        row, where = self.rows[name], f"grid.rows.{name}"
        common: dict[str, Any] = {"teacher": self._teacher(seed), "seed": seed}
        layers = _layers("distill", *self.student, (f"{where}.distill", row.get("distill")))
        shards = None
        if "shards" in row:
            shards = self._place(self._owner(name), seed, "shards")
        elif "synthesize" in row:
            shards = self._place(name, seed, "shards")
            yield self._synthesis(name, seed, {**common, "out": shards}, resolve("distill", layers).inputs.student)
        if self._cotrained(name):
            return
        taught_by = str(row.get("taught_by", ""))
        if taught_by:
            common["teacher"] = self._student(name, taught_by, seed)
        if shards is not None:
            # What the row itself names joins its shards; a transfer set from further away is a default.
            named = layers[-1][1].get("transfer_set", [])
            common["transfer_set"] = [shards, *([named] if isinstance(named, str) else named)]
        elif not any("transfer_set" in layer for _, layer in layers):
            raise ConfigError(f"{where}: nothing to distill from", "give synthesize, shards, or distill.transfer_set")
        points: dict[str, dict[str, Any]] = {name: {}}
        if "sizes" in row:
            sizes = sorted(set(config.convert(row["sizes"], tuple[int, ...], f"{where}.sizes")))
            points = {f"{name}@{size}": {"num_images": size} for size in sizes}
        for point, more in points.items():
            values = {**common, **more, "out": self._place(point, seed, "student")}
            step = self._step(point, seed, "distill", layers, values)
            yield dataclasses.replace(step, series=name if "sizes" in row else None, taught_by=taught_by)

    def _synthesis(self, name: str, seed: int, values: Mapping[str, Any], student: str) -> Step:
        """A row's synthesize, with what its method needs."""
        where = f"grid.rows.{name}.synthesize"
        layers = _layers("synthesize", *self.synthesize, (where, self.rows[name]["synthesize"]))
        step = self._step(name, seed, "synthesize", layers, values)
        inputs, needs = step.settings.inputs, step.settings.method.entry.needs
        given = {"metadata": self._metadata(seed) if "metadata" in needs else None}
        if "student" in needs and inputs.student is None:
            given["student"] = student
        cotrained = self._cotrained(name)
        if cotrained and "student" not in needs:
            raise ConfigError(f"grid.rows.{name}.cotrained: the method trains no student", "leave it out")
        return dataclasses.replace(step, settings=step.settings.replace(**given), cotrained=cotrained)

    def _cotrained(self, name: str) -> bool:
        """Whether the row's student is the one that its synthesis trains along."""
        row, where = self.rows[name], f"grid.rows.{name}"
        cotrained: bool = config.convert(row.get("cotrained", False), bool, f"{where}.cotrained")
        if cotrained and "synthesize" not in row:
            raise ConfigError(f"{where}.cotrained: a student is trained along with a synthesis", "give synthesize")
        for key in ("distill", "sizes", "taught_by"):
            if cotrained and key in row:
                hint = f"another row with `shards: {name}` distills from its shards"
                raise ConfigError(f"{where}: has both cotrained and {key}", hint)
        return cotrained

    def _seeds(self, name: str) -> tuple[int, ...]:
        """The seeds of a row."""
        where = f"grid.rows.{name}.seeds"
        seeds = config.convert(self.rows[name].get("seeds", list(self.seeds)), tuple[int, ...], where)
        if not seeds or not set(seeds) <= set(self.seeds):
            raise ConfigError(f"{where}: {list(seeds)} must be some of grid.seeds {list(self.seeds)}")
        return tuple(seed for seed in self.seeds if seed in seeds)

    def _owner(self, name: str) -> str:
        """The row whose shards the row uses."""
        if "synthesize" in self.rows[name]:
            raise ConfigError(f"grid.rows.{name}: has both synthesize and shards", "choose one")
        owner, owners = str(self.rows[name]["shards"]), [n for n, row in self.rows.items() if "synthesize" in row]
        if owner not in owners:
            hint = did_you_mean(owner, owners) if owners else "no row has synthesize"
            which = f" and teacher {self.name}" if self.name else ""
            raise ConfigError(f"grid.rows.{name}.shards: no row {owner!r} with synthesize{which}", hint)
        if missing := set(self._seeds(name)) - set(self._seeds(owner)):
            hint = f"give `seeds: {list(self._seeds(owner))}` to {name}"
            raise ConfigError(f"grid.rows.{name}.shards: row {owner!r} has no shards of seed {min(missing)}", hint)
        return owner

    def _student(self, name: str, row: str, seed: int) -> str:
        """The directory of the student of ``row``, which teaches the student of row ``name``."""
        where = f"grid.rows.{name}.taught_by"
        if row not in self.rows:
            raise ConfigError(f"{where}: no row {row!r}", did_you_mean(row, self.rows))
        if "sizes" in self.rows[row] or seed not in self._seeds(row):
            raise ConfigError(f"{where}: row {row!r} has no student of seed {seed}", "choose a row with one per seed")
        shards = self._place(row, seed, "shards")
        return str(Path(shards, "student")) if self._cotrained(row) else self._place(row, seed, "student")

    def _place(self, row: str, seed: int, what: str) -> str:
        return str(self.root / row / f"seed{seed}" / what)

    def _teacher(self, seed: int) -> str:
        if self.given is not None:
            return self.given
        return str(self.root / "teacher" / f"seed{seed}" if self.per_seed else self.root / "teacher")

    def _metadata(self, seed: int) -> str:
        if self.given_metadata is not None:
            return self.given_metadata
        return str(self.root / "metadata" / f"seed{seed}" if self.per_seed else self.root / "metadata")

    def _step(self, row: str, seed: int, command: str, layers: list[Layer], values: Mapping[str, Any]) -> Step:
        foreign = self.given is not None and values.get("teacher") == self.given
        layers = [*layers, ("", {**values, "overwrite": False}), (TYPED, self._passed(command, foreign))]
        return Step(row, seed, resolve(command, layers), self.name)

    def _passed(self, command: str, foreign: bool) -> dict[str, Any]:
        """The flags given to ``compare`` that the command has too; of a foreign teacher only where it is the one."""
        known = {*config.hints(catalog.command(command).inputs), *config.hints(Run)}
        values = config.plain(self.settings.inputs) | config.plain(self.settings.run)
        unset = config.defaults(type(self.settings.inputs)) | config.defaults(Run)
        names = _PASSED + FOREIGN if foreign else _PASSED
        return {name: values[name] for name in names if name in known and values[name] != unset[name]}


def run_grid(grid: Grid, terminal: Terminal, save: Callable[[], None], processes: int = 1) -> list[dict[str, Any]]:
    """Run what is not finished yet. Returns the runs that failed; the others are none the worse for it.

    Args:
        grid: What to run.
        terminal: Where progress goes.
        save: Called after every step, so that the time it took is known whatever ends the next one.
        processes: How many commands run at a time.

    Raises:
        DfkdError: A teacher failed.
    """
    failed: dict[tuple[str, int], dict[str, Any]] = {}
    waiting = dict(enumerate(grid.steps, 1))
    unfinished = {step.out for step in grid.steps}
    silent = terminal.silent or processes > 1  # nobody could tell the lines of several commands apart
    with Workers(processes) as workers:
        while waiting or workers.busy:
            for number, step in list(waiting.items()):
                if (step.name, step.seed) in failed:
                    del waiting[number]  # no shards to distill from
                    unfinished.discard(step.out)  # nobody must wait for it
                elif workers.busy < processes and not step.waits_for(unfinished):
                    del waiting[number]
                    terminal.say(f"[{number}/{len(grid.steps)}] {step.describe()}")
                    workers.submit(step, _carry_out, step.settings.plain(), terminal.verbosity, silent)
            if not workers.busy:
                continue  # what was waiting had failed before
            step, error = workers.next()
            unfinished.discard(step.out)
            if error is not None:
                if not step.row:
                    raise error
                terminal.say(f"{step.describe()} failed: {error}")
                facts = {"teacher": step.teacher, "row": step.row, "seed": step.seed, "command": step.settings.command}
                reason = {"code": error.code, "message": error.message, "hint": error.hint}
                failed[step.name, step.seed] = facts | reason
            save()
    return list(failed.values())


def _carry_out(values: dict[str, Any], verbosity: int, silent: bool) -> None:
    """Run a command, perhaps in another process: settings reach it as the plain values of a recipe."""
    command = values.pop("command")
    quiet = Terminal(verbosity, as_json=True, silent=silent)  # stdout is for the comparison
    with memory_can_end():  # of one command: the others go on
        catalog.command(command).load()(resolve(command, [("", values)]), quiet)
