"""A grid: many pipelines in one recipe, planned as the ordinary commands that make them.

    grid:
      seeds: [0, 1, 2]                      every row is run with each of them
      teacher: {recipe: digits}             train-teacher settings, or the path of a teacher; `per_seed: true` for one
                                            teacher per seed
      metadata: {dataset: digits}           collect-metadata settings, or the path of a metadata directory; made only
                                            where a row's method uses metadata, for every teacher
      synthesize: {num_images: 4000}        what every row's synthesize has in common
      student: {recipe: digits}             what every row's distill has in common
      export: {images: 1000}                what every row's export has in common; its images are the row's
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
        both: {taught_by: [teacher, zskd], shards: zskd}                      a student of the grid's teacher and of
                                                                              that student, together
        small: {shards: zskd, distill: {student: 'w8a8:'}, export: {}}        the student, and in a row of its own the
                                                                              ONNX model that is made of it
        float: {export: {model: teacher, calibrate: 'noise:500'}}             the ONNX model of the teacher itself

What a row of one seed makes, its shards or a teacher, serves other rows' students of every seed, unless each seed has a
teacher of its own; how these differ is then due to the students alone.

A student in the loop has the architecture that the row would distill, unless ``synthesize`` names another. A command
that leaves several models makes several rows of the table: ``kdcl``, ``kdcl/peer-1``; ``takd/assistants/resnet14``. So
does an export: ``small``, ``small/export``.

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
from collections.abc import Mapping
from typing import Any, Literal

from dfkd_cli import config
from dfkd_cli.errors import ConfigError, did_you_mean
from dfkd_cli.settings import Layer, Settings, recipe_layer

_COMMON = ("metadata", "synthesize", "student", "export")  # what rows have in common: all, or those of one teacher
_KEYS = ("seeds", "teacher", "teachers", *_COMMON, "rows")
_ROW_KEYS = ("teachers", "synthesize", "cotrained", "shards", "taught_by", "distill", "sizes", "export", "seeds")
# What the grid itself decides for every command.
_OWN = ("teacher", "metadata", "out", "overwrite", "seed", "deadline", "threads")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_Section = tuple[str, Any]  # where settings stand in the recipe, for messages, and what stands there


@dataclasses.dataclass(frozen=True)
class GridRow:
    """A row as it is run with one of the teachers."""

    name: str
    seeds: tuple[int, ...]  # in the grid's order
    shards: str | None  # the row whose shards its student learns from, perhaps itself
    synthesize: list[Layer]  # the settings of its own shards; empty where it makes none
    cotrained: bool  # whether its student is the one that its synthesis trains along
    taught_by: tuple[str, ...]  # the rows whose students are its teachers, `teacher` for the grid's own; or empty
    distill: list[Layer]  # the settings of its student
    transfer_set: list[str]  # what the row itself lets its student learn from, beside shards
    sizes: list[int]  # the numbers of images of a curve's points, ascending; empty for no curve
    exports: str  # the model that is exported: student; or teacher, and there is no student; empty for none
    export: list[Layer]  # the settings of that


@dataclasses.dataclass(frozen=True)
class GridTeacher:
    """One of the teachers, with its rows; those that use what another row makes come after it."""

    name: str  # empty for the only one
    paths: Mapping[str, str]  # where the teacher, and where its metadata were before, as far as they were
    training: list[Layer]  # the settings of its training
    metadata: list[Layer]  # the settings of collecting its metadata
    per_seed: bool  # whether there is one for each seed
    seeds: tuple[int, ...]  # those seeds; otherwise the first one alone
    rows: tuple[GridRow, ...]


def parse(settings: Settings) -> tuple[GridTeacher, ...]:
    """What the grid of a ``compare`` recipe says, teacher by teacher; a ``--teacher`` takes the place of the recipe's.

    Raises:
        ConfigError: Unknown key, bad value, or a row from nothing. The settings of commands are not checked yet.
    """
    grid = mapping(settings.sections["grid"], "grid", _KEYS)
    teachers = _teachers(grid, settings.inputs.teacher)
    seeds = config.convert(grid.get("seeds", [0]), tuple[int, ...], "grid.seeds")
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"grid.seeds: {list(seeds)} must be different whole numbers of at least 0")
    return tuple(_teacher(name, teachers, grid, seeds) for name in teachers)


def mapping(value: Any, where: str, keys: tuple[str, ...] | None = None) -> Mapping[str, Any]:
    """``value``, if it is a mapping with no key but ``keys``; nothing at all is an empty mapping."""
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{where}: must be a mapping of keys to values, not {value!r}")
    for key in value or {}:
        if keys is not None and key not in keys:
            raise ConfigError(f"{where}.{key}: unknown key", did_you_mean(str(key), keys))
    return value or {}


def _teachers(grid: Mapping[str, Any], typed: str | None) -> Mapping[str, Any]:
    """What the grid says of each teacher, by its name; the only one of ``teacher`` has an empty name."""
    if "teachers" not in grid:
        return {"": typed or grid.get("teacher", {})}
    teachers = _named(grid["teachers"], "grid.teachers")
    if "teacher" in grid:
        raise ConfigError("grid: has both teacher and teachers", "choose one")
    if typed is not None:
        hint = "leave it out, or change grid.teachers"
        raise ConfigError(f"--teacher {typed}: the grid has teachers of its own: {', '.join(teachers)}", hint)
    if not teachers:
        raise ConfigError("grid.teachers: needs at least one teacher", "e.g. teachers: {lenet5: {recipe: mnist}}")
    return teachers


def _named(value: Any, where: str) -> Mapping[str, Any]:
    """A mapping from names that can be those of directories beside teacher and metadata."""
    for name in mapping(value, where):
        if not _NAME.fullmatch(name) or name in ("teacher", "metadata"):
            hint = "at most 200 letters, digits, . _ -; not `teacher`, not `metadata`"
            raise ConfigError(f"{where}.{name}: not a name for a row or a teacher", hint)
    return mapping(value, where)


def _teacher(name: str, teachers: Mapping[str, Any], grid: Mapping[str, Any], seeds: tuple[int, ...]) -> GridTeacher:
    """The teacher of that name."""
    where, value = f"grid.teachers.{name}" if name else "grid.teacher", teachers[name]
    teacher = {"path": value} if isinstance(value, str) else dict(mapping(value, where))
    own = {key: teacher.pop(key) for key in _COMMON if name and key in teacher}
    common = {key: [(f"grid.{key}", grid.get(key)), (f"{where}.{key}", own.get(key))] for key in _COMMON}
    path = config.convert(teacher.pop("path", None), str | None, f"{where}.path")
    if path is not None and teacher:
        raise ConfigError(f"{where}.{next(iter(teacher))}: the teacher is already there", "leave out this or path")
    per_seed = config.convert(teacher.pop("per_seed", False), bool, f"{where}.per_seed")
    decided = _OWN if per_seed else tuple(key for key in _OWN if key != "seed")
    training = _layers("train-teacher", (where, teacher), own=decided)
    if name and isinstance(grid.get("metadata"), str):
        raise ConfigError("grid.metadata: a directory belongs to one teacher", f"give it as {where}.metadata")
    paths = {} if path is None else {"teacher": path}
    for _, value in common["metadata"]:
        if isinstance(value, str):
            paths["metadata"] = value
    sections = [section for section in common["metadata"] if not isinstance(section[1], str)]
    metadata = _layers("collect-metadata", *sections, own=decided)
    said = _rows_of(name, teachers, grid)
    rows = {row: _row(row, said[row], common, seeds) for row in sorted(said, key=lambda row: _depth(row, said))}
    for row in rows.values():
        _check_sources(row, rows, name, per_seed)
    made_for = seeds if per_seed else seeds[:1]
    return GridTeacher(name, paths, training, metadata, per_seed, made_for, tuple(rows.values()))


def _layers(command: str, *sections: _Section, own: tuple[str, ...] = _OWN) -> list[Layer]:
    """Settings of a command as layers: first the recipes they name, then what they say themselves, without ``own``."""
    recipes, layers = [], []
    for where, value in sections:
        values = dict(mapping(value, where))
        for key in own:
            if key in values:
                raise ConfigError(f"{where}.{key}: the grid itself decides this", "leave it out")
        recipe = values.pop("recipe", None)
        if recipe is not None:
            # Whether these are the user's own words the recipe of the grid decides, which named it.
            source, said, _ = recipe_layer(str(recipe), command)
            recipes.append(Layer(source, {key: value for key, value in said.items() if key not in own}))
        layers.append(Layer(f"{where}.", values))
    return recipes + layers


def _rows_of(teacher: str, teachers: Mapping[str, Any], grid: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What the grid says of each row of the teacher, by name."""
    rows = _named(grid.get("rows"), "grid.rows")
    if not rows:
        raise ConfigError("grid.rows: needs at least one row", "e.g. rows: {zskd: {synthesize: {method: zskd}}}")
    mine = {}
    for name, value in rows.items():
        where = f"grid.rows.{name}"
        row = mapping(value, where, _ROW_KEYS)
        chosen = row.get("teachers", list(teachers))
        chosen = list(chosen) if isinstance(chosen, Mapping) else chosen
        chosen = config.convert(chosen, tuple[str, ...], f"{where}.teachers")
        if unknown := [other for other in chosen if other not in teachers]:
            hint = did_you_mean(unknown[0], teachers) if teacher else "the grid has one: leave it out"
            raise ConfigError(f"{where}.teachers: no teacher {unknown[0]!r}", hint)
        if teacher in chosen:
            mine[name] = _with_own(row, teacher, where)
    if not mine:
        raise ConfigError(f"grid.teachers.{teacher}: no row is run with it", "leave it out, or name it in a row")
    return mine


def _with_own(row: Mapping[str, Any], teacher: str, where: str) -> Mapping[str, Any]:
    """A row with what it says for one teacher, which takes the place of the same keys."""
    teachers = row.get("teachers")
    own, changed = teachers.get(teacher) if isinstance(teachers, Mapping) else None, {}
    for key, value in mapping(own, f"{where}.teachers.{teacher}", ("synthesize", "distill")).items():
        if key == "synthesize" and key not in row:
            raise ConfigError(f"{where}.teachers.{teacher}.{key}: the row has none for all", "give it to the row")
        special = mapping(value, f"{where}.teachers.{teacher}.{key}")
        changed[key] = {**mapping(row.get(key), f"{where}.{key}"), **special}
    return {**row, **changed}


def _depth(name: str, rows: Mapping[str, Mapping[str, Any]], above: tuple[str, ...] = ()) -> int:
    """How many rows stand between this one and a row that uses no other's results."""
    if name in above:
        raise ConfigError(f"grid.rows.{name}: rows that wait for each other: {', '.join(above)}", "break the circle")
    sources = [str(rows[name]["shards"])] if "shards" in rows[name] else []
    sources += _teachers_of(name, rows[name])
    return 1 + max((_depth(row, rows, (*above, name)) for row in sources if row in rows), default=-1)


def _teachers_of(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The rows that a row is taught by."""
    where = f"grid.rows.{name}.taught_by"
    return config.convert(row["taught_by"], tuple[str, ...], where) if "taught_by" in row else ()


def _row(name: str, row: Mapping[str, Any], common: Mapping[str, list[_Section]], seeds: tuple[int, ...]) -> GridRow:
    """A row of that name, looked at by itself."""
    where, makes_shards = f"grid.rows.{name}", "synthesize" in row
    chosen = config.convert(row.get("seeds", list(seeds)), tuple[int, ...], f"{where}.seeds")
    if not set(chosen) <= set(seeds):
        raise ConfigError(f"{where}.seeds: {list(chosen)} must be some of grid.seeds {list(seeds)}")
    distill = _layers("distill", *common["student"], (f"{where}.distill", row.get("distill")))
    if makes_shards and "shards" in row:
        raise ConfigError(f"{where}: has both synthesize and shards", "choose one")
    shards = name if makes_shards else str(row["shards"]) if "shards" in row else None
    sections = [*common["synthesize"], (f"{where}.synthesize", row["synthesize"])] if makes_shards else []
    synthesize = _layers("synthesize", *sections)
    cotrained = config.convert(row.get("cotrained", False), bool, f"{where}.cotrained")
    if cotrained and not makes_shards:
        raise ConfigError(f"{where}.cotrained: a student is trained along with a synthesis", "give synthesize")
    for key in ("distill", "sizes", "taught_by"):
        if cotrained and key in row:
            hint = f"another row with `shards: {name}` distills from its shards"
            raise ConfigError(f"{where}: has both cotrained and {key}", hint)
    for place, section in common["export"]:
        if "model" in mapping(section, place):
            raise ConfigError(f"{place}.model: a row says which model it exports", f"give it as {where}.export.model")
    said = mapping(row.get("export"), f"{where}.export")
    exports = config.convert(said.get("model", "student"), Literal["student", "teacher"], f"{where}.export.model")
    exports = exports if "export" in row else ""
    for key in ("distill", "sizes", "taught_by", "cotrained"):
        if exports == "teacher" and key in row:
            raise ConfigError(f"{where}: has both export.model teacher and {key}", "it makes no student")
    export = _layers("export", *common["export"], (f"{where}.export", row.get("export")))
    given = exports == "teacher" or shards is not None or any("transfer_set" in layer.values for layer in distill)
    if not given:
        raise ConfigError(f"{where}: nothing to distill from", "give synthesize, shards, or distill.transfer_set")
    sets, taught_by = distill[-1].values.get("transfer_set", []), _teachers_of(name, row)
    sets = list(config.convert(sets, tuple[str, ...], f"{where}.distill.transfer_set")) if sets else []
    sizes = sorted(set(config.convert(row["sizes"], tuple[int, ...], f"{where}.sizes"))) if "sizes" in row else []
    chosen = tuple(seed for seed in seeds if seed in chosen)
    return GridRow(
        name, chosen, shards, synthesize, cotrained, taught_by, distill, sets, sizes, exports, export if exports else []
    )


def _check_sources(row: GridRow, rows: Mapping[str, GridRow], teacher: str, per_seed: bool) -> None:
    """Refuse a row from what other rows do not make; ``per_seed`` if each seed has a teacher of its own."""

    def unserved(source: GridRow) -> set[int]:
        return set(row.seeds) - set(source.seeds) if len(source.seeds) > 1 or per_seed else set()

    where, owners = f"grid.rows.{row.name}", [name for name, other in rows.items() if other.synthesize]
    if row.shards is not None and row.shards not in owners:
        hint = did_you_mean(row.shards, owners) if owners else "no row has synthesize"
        which = f" and teacher {teacher}" if teacher else ""
        raise ConfigError(f"{where}.shards: no row {row.shards!r} with synthesize{which}", hint)
    if row.shards is not None and (missing := unserved(rows[row.shards])):
        hint = f"give `seeds: {list(rows[row.shards].seeds)}` to {row.name}"
        raise ConfigError(f"{where}.shards: row {row.shards!r} has no shards of seed {min(missing)}", hint)
    for name in row.taught_by:
        if name == "teacher":
            continue
        if name not in rows:
            raise ConfigError(f"{where}.taught_by: no row {name!r}", did_you_mean(name, rows))
        other = rows[name]
        no_student = other.sizes or other.exports == "teacher"
        if missing := set(row.seeds) if no_student else unserved(other):
            message = f"{where}.taught_by: row {name!r} has no student of seed {min(missing)}"
            raise ConfigError(message, "choose a row with one per seed")
