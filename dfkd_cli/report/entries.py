"""What finished directories say about themselves: what made them, from what, and how long that took. Nothing is run.

A run may leave several models: students that learned together, one that was trained along with images, the hops of a
chain. Each is read as what it is, with what its run says.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dfkd_cli.artifacts.files import digest
from dfkd_cli.artifacts.integrity import RUN, made_by, present, read_run, runs_within
from dfkd_cli.artifacts.records import column, read_table
from dfkd_cli.artifacts.shards import MANIFEST, ShardReader
from dfkd_cli.errors import ArtifactError
from dfkd_cli.models.directory import RECORD
from dfkd_cli.models.names import Location, ModelDirectory, made_by_dfkd
from dfkd_cli.report.places import find, recorded_as
from dfkd_cli.trust import CONFIG, Code

LOG = logging.getLogger(__name__)
# Roles of parents that are no teachers and no transfer sets.
_READ = ("architecture", "dataset", "metadata", "weights")


@dataclass(frozen=True)
class ShardSet:
    """A shard directory.

    Attributes:
        path: Where it is.
        sha256: Of its manifest.
        manifest: ``manifest.json``.
        origin: The directory of the run that made it: its own or, of a set that a training left, that one's.
        run: That one's ``run.json``, or an empty mapping where it is missing.
    """

    path: Path
    sha256: str
    manifest: Mapping[str, Any]
    origin: Path
    run: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What made it, but for the seed and what it was made from."""
        return settings_of(self.run) or {k: self.manifest.get(k) for k in ("method", "config", "count")}

    def facts(self) -> dict[str, Any]:
        """For ``results.json``."""
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "method": self.manifest["method"],
            "uses": self.manifest.get("uses", []),
            "seed": self.manifest.get("seed"),
            "count": self.manifest["count"],
            "confidence": self.run.get("metrics", {}).get("confidence"),
            "concerns": self.run.get("concerns", []),
            **{key: self.run.get(key) for key in ("seconds", "device", "sealed", "argv", "versions")},
        }


@dataclass(frozen=True)
class Model:
    """A model directory, or a foreign teacher.

    Attributes:
        location: What opens it.
        path: Where it is; of a foreign teacher its SPEC.
        sha256: Of its weights and their use.
        parameters: Number of them.
        record: ``model.json``.
        origin: The directory of the run that made it: its own or the one that it lies in; None where nobody knows.
        run: That one's ``run.json``, or an empty mapping.
        part: Where it lies in the directory that is called by another model, of the run or the chain; empty elsewhere.
        shards: The shard sets it learned from, or was trained along with, as far as they were found.
        chain: The directory of the chain that it is the last model of, or a hop.
        hops: The seconds of the runs of that chain that came before it, by their directories.
        own_hops: The hashes of the models of that chain that are in its line.
        row: The name of its row in a grid.
        series: The name of the curve over set sizes that it is a point of.
        group: The name of its teacher in a grid, empty for the only one; None outside of grids.
        published: What a paper reports as its top-1, a share.
    """

    location: Location
    path: Path
    sha256: str
    parameters: int
    record: Mapping[str, Any]
    origin: Path | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    part: str = ""
    shards: Sequence[ShardSet] = ()
    chain: Path | None = None
    hops: Mapping[Path, float | None] = field(default_factory=dict)
    own_hops: frozenset[str] = frozenset()
    row: str | None = None
    series: str | None = None
    group: str | None = None
    published: float | None = None

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the model comes from."""
        return self.record.get("provenance", {})

    @property
    def teacher(self) -> str | None:
        """The hash of the teacher it learned from."""
        return self.provenance.get("teacher")

    @property
    def line(self) -> Sequence[str]:
        """The hashes of those that it comes from: its teacher, that one's teacher ..."""
        return self.provenance.get("line") or [sha256 for sha256 in [self.teacher] if sha256 is not None]

    @property
    def is_grid_teacher(self) -> bool:
        """Whether it is a teacher of a grid: it heads a ranking, even if it was itself taught by another model."""
        return self.group is not None and self.row is None

    @property
    def settings(self) -> dict[str, Any]:
        """All that made it, but for seeds and teacher: equal settings are repeats of one another."""
        return {
            "model": self.record.get("spec"),
            **settings_of(self.run),
            "transfer_set": [_origin(p, self.shards) for p in self._origins()],
        }

    @property
    def key(self) -> str:
        """Equal for repeats over seeds; networks that others taught are none."""
        return self.row or digest([self.settings, self.part, self.taught_by] if self.run else self.sha256)

    @property
    def taught_by(self) -> str | None:
        """The hash of who taught it and was there before: a chain's own hops are repeated with it. None of nobody."""
        return next((sha256 for sha256 in self.line if sha256 not in self.own_hops), None)

    @property
    def label(self) -> str:
        """The row's name in a grid, else what the model was made from and how, e.g. ``zskd -> response``."""
        if self.row or not self.run:
            return self.row or str(self.path)
        origins = " + ".join(_name(p, self.shards) for p in self._origins())
        method, objectives = self.run["identity"].get("method", ""), self.run["identity"].get("objective", {})
        how = ": ".join(filter(None, ("" if method == "offline" else method, " + ".join(objectives))))
        whole = f"{origins} -> {how}" if origins else how
        return f"{whole} ({self.part})" if self.part else whole

    @property
    def work(self) -> dict[Path, float | None]:
        """What was done for it: the seconds of each run, by its directory. None where they are unknown.

        A teacher and its metadata are there for every student and count for none.
        """
        took = {shards.origin: shards.run.get("seconds") for shards in self.shards} | dict(self.hops)
        if self.origin is not None and self.origin not in took:
            seconds = self.run.get("seconds")
            within = sum(hop or 0.0 for place, hop in self.hops.items() if place.is_relative_to(self.origin))
            took[self.origin] = None if seconds is None else max(seconds - within, 0.0)  # which its record includes
        return took

    @property
    def seconds(self) -> dict[str, float | None]:
        """What the work took: on the shards it learned from, on itself and the hops before it, in all.

        None where there is none, or unknown.
        """
        work, made = self.work, {shards.origin for shards in self.shards}
        synthesis = [seconds for path, seconds in work.items() if path in made]
        training = [seconds for path, seconds in work.items() if path not in made]
        others = [p for p in self._origins() if "spec" not in p and _owner(p, self.shards) is None]
        parts = [*synthesis, *training, *(None for _ in others)]
        return {"synthesis": _sum(synthesis), "training": _sum(training), "total": _sum(parts)}

    def _origins(self) -> list[Mapping[str, Any]]:
        return [p for p in self.run.get("parents", []) if p["role"] == "transfer-set"]

    def curves(self) -> dict[str, list[float]]:
        """The columns of the ``metrics.csv`` of its run."""
        return read_curves((self.origin or self.path) / "metrics.csv")


def read_model(location: Location, code: Code) -> Model:
    """Read a model, and find the shard sets that it was made from.

    Raises:
        ArtifactError: Missing, damaged, or not a model.
        ConfigError: A foreign model cannot be built.
    """
    model = location.open(code)
    path = Path(model.path)
    one = Model(location, path, model.sha256, model.classifier.num_parameters, model.record)
    if not isinstance(location, ModelDirectory):
        return one
    origin = made_by(path)
    if origin is None:
        if (path / CONFIG).exists():  # a model that was copied alone has neither
            LOG.warning("%s: no %s, which says how it was made", path, RUN)
        return one
    run, place = read_run(origin), path.absolute().relative_to(origin.absolute())
    made = (origin / MANIFEST).is_file()  # along with the model
    places = [origin] if made else [find(parent, origin, MANIFEST) for parent in run["parents"]]
    shards = [read_shards(place) for place in places if place is not None]
    part = "" if path == origin or place in _left_by(run)[:1] else place.as_posix()
    return replace(one, origin=origin, run=run, part=part, shards=shards)


def read_models(directory: Path, code: Code) -> list[Model]:
    """The models that a run has left in its directory: that of the directory, those beside it, the hops on its way.

    A directory within that of a run holds only its own.

    Raises:
        ArtifactError: Missing, damaged, or not a model.
    """
    model = read_model(made_by_dfkd(str(directory)), code)
    if model.origin != directory:
        return [model]
    beside = [directory / place for place in _left_by(model.run) if directory / place != directory]
    took = {place: read_run(place).get("seconds") for place in runs_within(directory)}
    # A search for the best way has tried others too.
    way = {place: sha256 for place in took if (sha256 := recorded_as(place / RECORD)) in model.line}
    own_hops = frozenset(way.values())
    hops = [
        replace(
            hop,
            part=hop.path.relative_to(directory).as_posix(),
            chain=directory,
            hops={place: took[place] for place, sha256 in way.items() if sha256 in hop.line},
            own_hops=own_hops,
        )
        for hop in (read_model(ModelDirectory(str(place)), code) for place in way)
    ]
    last = replace(model, chain=directory, hops=took, own_hops=own_hops) if took else model
    return [last, *(read_model(ModelDirectory(str(place)), code) for place in beside), *hops]


def _left_by(run: Mapping[str, Any]) -> list[Path]:
    """Where a finished run has left models, relative to its directory; the first is the one that is called by that."""
    return [Path(file["path"]).parent for file in run.get("artifacts", ()) if Path(file["path"]).name == RECORD]


def read_shards(path: Path) -> ShardSet:
    """Read what a shard directory says about itself.

    Raises:
        ArtifactError: Missing, unfinished or damaged.
    """
    reader, origin = ShardReader(path), made_by(path) or path
    return ShardSet(path, reader.sha256, reader.manifest, origin, read_run(origin))


def read_curves(path: Path) -> dict[str, list[float]]:
    """The columns of a ``metrics.csv``, ``round`` among them; nothing where there is no file.

    Raises:
        ArtifactError: It is damaged.
    """
    if present(path) is None:
        return {}
    rows = read_table(path)
    try:
        return {name: column(rows, name) for name in (rows[0] if rows else ())}
    except ValueError:
        raise ArtifactError(f"{path} is damaged: not a table of numbers", "make the directory again") from None


def settings_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a ``run.json`` without seed and parents; of some files that they name, the first of the hash."""
    identity = run.get("identity", {})
    read: dict[str, list[str]] = {}
    for parent in identity.get("parents") or ():
        if parent.get("role") in _READ and "sha256" in parent:
            read.setdefault(parent["role"], []).append(parent["sha256"][:12])
    hashes = {f"{role}_sha256": " ".join(each) for role, each in read.items()}
    return {k: v for k, v in identity.items() if k not in ("seed", "parents")} | hashes


def _sum(seconds: Sequence[float | None]) -> float | None:
    measured = [value for value in seconds if value is not None]
    return sum(measured) if measured and len(measured) == len(seconds) else None


def _owner(parent: Mapping[str, Any], shards: Sequence[ShardSet]) -> ShardSet | None:
    return next((s for s in shards if s.sha256 == parent.get("sha256")), None)


def _origin(parent: Mapping[str, Any], shards: Sequence[ShardSet]) -> Any:
    """A transfer set but for its seed; one that was not found, or real images in a directory, only equal to itself."""
    if "spec" in parent:
        spec, sha256 = parent["spec"], parent.get("sha256")
        return spec if sha256 is None else {"spec": spec, "sha256": sha256[:12]}
    owner = _owner(parent, shards)
    return owner.settings if owner else parent["sha256"]


def _name(parent: Mapping[str, Any], shards: Sequence[ShardSet]) -> str:
    owner = _owner(parent, shards)
    if owner is not None:
        return owner.manifest["method"]
    return parent["spec"].split()[0] if "spec" in parent else Path(parent["path"]).name
