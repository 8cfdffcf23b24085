"""What finished directories say about themselves: what made them, from what, and how long that took. Nothing is run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfkd_cli.artifacts.files import digest, sha256_file
from dfkd_cli.artifacts.integrity import RUN, present, read_run
from dfkd_cli.artifacts.records import column, read_table
from dfkd_cli.artifacts.shards import MANIFEST, ShardReader
from dfkd_cli.errors import ArtifactError
from dfkd_cli.models.directory import RECORD, identity, read_record
from dfkd_cli.models.names import Location, ModelDirectory
from dfkd_cli.trust import CONFIG, Code

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardSet:
    """A shard directory.

    Attributes:
        path: Where it is.
        sha256: Of its manifest.
        manifest: ``manifest.json``.
        run: ``run.json``, or an empty mapping where it is missing.
    """

    path: Path
    sha256: str
    manifest: Mapping[str, Any]
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
        run: ``run.json``, or an empty mapping where it is missing.
        shards: The shard sets it learned from, or was trained along with, as far as they were found.
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
    run: Mapping[str, Any] = field(default_factory=dict)
    shards: Sequence[ShardSet] = ()
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
        """Equal for repeats over seeds."""
        return self.row or digest(self.settings if self.run else self.sha256)

    @property
    def label(self) -> str:
        """The row's name in a grid, else what the model was made from and how, e.g. ``zskd -> response``."""
        if self.row or not self.run:
            return self.row or str(self.path)
        origins = " + ".join(_name(p, self.shards) for p in self._origins())
        method, objectives = self.run["identity"].get("method", ""), self.run["identity"].get("objective", {})
        how = {"offline": "", "supervised": "supervised"}.get(method, f"{method}: ")
        how += " + ".join(objectives)
        return f"{origins} -> {how}" if origins else how

    @property
    def seconds(self) -> dict[str, float | None]:
        """What the work took: on the shards it learned from, on itself, in all. None where there is none, or unknown.

        A teacher and its metadata are there for every student and count for none.
        """
        synthesis = [shards.run.get("seconds") for shards in self.shards]
        training = [self.run.get("seconds")] if self.run else []  # along with its shards it has no run of its own
        others = [p for p in self._origins() if "spec" not in p and _owner(p, self.shards) is None]
        parts = [*synthesis, *training, *(None for _ in others)]
        return {"synthesis": _sum(synthesis), "training": _sum(training), "total": _sum(parts)}

    def _origins(self) -> list[Mapping[str, Any]]:
        return [p for p in self.run.get("parents", []) if p["role"] == "transfer-set"]

    def curves(self) -> dict[str, list[float]]:
        """The columns of ``metrics.csv``."""
        return read_curves(self.path / "metrics.csv")

    def agreements(self) -> list[float]:
        """After each round the agreement with the teacher, on images that were held out or, in the loop, just made."""
        made = made_beside(self.path) is not None
        return (read_curves(self.path.parent / "metrics.csv") if made else self.curves()).get("agreement", [])


def read_model(location: Location, code: Code) -> Model:
    """Read a model, and find the shard sets that its directory names.

    Raises:
        ArtifactError: Missing, damaged, or not a model.
        ConfigError: A foreign model cannot be built.
    """
    model = location.open(code)
    facts = location, Path(model.path), model.sha256, model.classifier.num_parameters, model.record
    if not isinstance(location, ModelDirectory):
        return Model(*facts)
    path, run = Path(model.path), read_run(Path(model.path))
    beside = made_beside(path)
    if not run and beside is None and (path / CONFIG).exists():  # a model that was copied alone has neither
        LOG.warning("%s: no %s, which says how it was made", path, RUN)
    places = [find(parent, path, MANIFEST) for parent in run.get("parents", [])] if beside is None else [beside]
    return Model(*facts, run, [read_shards(place) for place in places if place is not None])


def read_shards(path: Path) -> ShardSet:
    """Read what a shard directory says about itself.

    Raises:
        ArtifactError: Missing, unfinished or damaged.
    """
    reader = ShardReader(path)
    return ShardSet(path, reader.sha256, reader.manifest, read_run(path))


def made_beside(path: Path) -> Path | None:
    """The shard directory whose run made what lies there too: a student in the loop, or generators. Else None."""
    return path.parent if not (path / RUN).is_file() and (path.parent / MANIFEST).is_file() else None


def where(parent: Mapping[str, Any], child: Path) -> list[Path]:
    """Where a parent of ``child``, as a ``run.json`` names it, may lie; nowhere if it has no path.

    The path is relative to where the command ran: here, or, as a rule, beside the child.
    """
    return [base / parent["path"] for base in (Path(), child.resolve().parent)] if "path" in parent else []


def find(parent: Mapping[str, Any], child: Path, file: str) -> Path | None:
    """The directory that a ``run.json`` names as a parent, if it is still there and still the same.

    Args:
        parent: ``{"path": ..., "sha256": ...}``, other parents are never found.
        child: The directory whose parent it is.
        file: ``manifest.json`` or ``model.json``, whichever makes a directory of that kind.
    """
    for path in where(parent, child):
        with contextlib.suppress(ArtifactError, KeyError):  # what lies there now is something else, or damaged
            if (path / file).is_file() and _sha256(path / file) == parent["sha256"]:
                return path
    return None


def find_teacher(child: Path, sha256: str) -> Path | None:
    """The teacher, by its hash, of a model or shard directory: where its run says, or in ``teacher/``; else None."""
    run = made_beside(child) or child
    recorded = [parent for parent in read_run(run).get("parents", []) if parent["role"] == "teacher"]
    candidates = [parent | {"sha256": sha256} for parent in [*recorded, {"path": "teacher"}]]
    return next(filter(None, (find(parent, run, RECORD) for parent in candidates)), None)


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
    """The settings in a ``run.json``, without seed and parents."""
    return {k: v for k, v in run.get("identity", {}).items() if k not in ("seed", "parents")}


def _sum(seconds: Sequence[float | None]) -> float | None:
    measured = [value for value in seconds if value is not None]
    return sum(measured) if measured and len(measured) == len(seconds) else None


def _sha256(path: Path) -> str:
    """What stands for a directory in its children's records."""
    return identity(read_record(path.parent)) if path.name == RECORD else sha256_file(path)


def _owner(parent: Mapping[str, Any], shards: Sequence[ShardSet]) -> ShardSet | None:
    return next((s for s in shards if s.sha256 == parent.get("sha256")), None)


def _origin(parent: Mapping[str, Any], shards: Sequence[ShardSet]) -> Any:
    """A transfer set but for its seed; one that was not found is only equal to itself."""
    owner = _owner(parent, shards)
    return parent.get("spec") or (owner.settings if owner else parent["sha256"])


def _name(parent: Mapping[str, Any], shards: Sequence[ShardSet]) -> str:
    owner = _owner(parent, shards)
    if owner is not None:
        return owner.manifest["method"]
    return parent["spec"].split()[0] if "spec" in parent else Path(parent["path"]).name
