"""What an artifact is, and from what it was made: ``dfkd info PATH``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from dfkd_cli.artifacts import metadata
from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.artifacts.integrity import RUN, RunRecord, intact, made_by, read_run
from dfkd_cli.artifacts.records import read_json
from dfkd_cli.artifacts.shards import MANIFEST, Manifest, ShardReader
from dfkd_cli.errors import ArtifactError, DfkdError
from dfkd_cli.models import directory, exported, generators
from dfkd_cli.models.names import architecture
from dfkd_cli.report.places import where

RECORDS: dict[str, Any] = {
    directory.RECORD: directory.ModelRecord,
    exported.RECORD: exported.ExportRecord,
    MANIFEST: Manifest,
    metadata.RECORD: metadata.MetadataRecord,
    generators.RECORD: generators.GeneratorRecord,
    RUN: RunRecord,
}
WEIGHTS = {directory.RECORD: directory.WEIGHTS, generators.RECORD: generators.WEIGHTS, exported.RECORD: exported.FILE}
LONG = ("shards", "identity", "artifacts", "parents")  # what is left out of them


def describe(path: Path) -> dict[str, Any]:
    """The records of an artifact, by file, and its ``lineage``.

    Raises:
        ArtifactError: The path holds no artifact, or one of which a file is damaged or gone.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such directory", "give a directory that dfkd wrote")
    records = {name: read_json(intact(path / name), kind) for name, kind in RECORDS.items() if (path / name).is_file()}
    if not records:
        raise ArtifactError(f"{path}: no model, shard or metadata directory", "give a directory that dfkd wrote")
    for file, sha256 in hashes(records).items():
        intact(path / file, sha256)
    short = {name: {key: v for key, v in record.items() if key not in LONG} for name, record in records.items()}
    answer: dict[str, Any] = {"path": str(path), **short, "lineage": lineage(path)}
    if made_by(path) is None:
        answer["unverified"] = f"no {RUN}: nothing says whether these files are those that were written"
    return answer


def hashes(records: dict[str, Any]) -> dict[str, str]:
    """The hash of every file of which the records of a directory have one."""
    named = [*records.get(MANIFEST, {}).get("shards", ())]
    named += [{"file": file, **records[name]["weights"]} for name, file in WEIGHTS.items() if name in records]
    if metadata.RECORD in records:
        named.append({"file": metadata.TENSORS, **records[metadata.RECORD]["tensors"]})
    hashes = {Path(item["file"]).name: item["sha256"] for item in named}
    return hashes | {file["path"]: file["sha256"] for file in records.get(RUN, {}).get("artifacts", ())}


def lineage(path: Path, below: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """What a command read to make the artifact, and what that was made from.

    Args:
        path: The artifact.
        below: What was made from it, where that is being described.

    Returns:
        Of each input its ``role``, ``path`` or ``spec``, and ``sha256`` as recorded; of directories that dfkd wrote
        also ``found``: ``same``, ``another`` or ``gone``, and where it is the same its own ``lineage``.
    """
    if path.resolve() in below:
        return []
    chain = (*below, path.resolve())
    origin = made_by(path)
    if origin is not None and origin != path:
        return lineage(origin, chain)
    return [parent | _found(parent, path, chain) for parent in read_run(path).get("parents", [])]


def replaced(run: Path, within: Path) -> list[str]:
    """The roles of images and metadata that a run read outside of a directory, where something else lies now."""
    parents = [p for p in read_run(run).get("parents", []) if p["role"] in ("transfer-set", "metadata") and "path" in p]
    outside = [parent for parent in parents if not Path(parent["path"]).resolve().is_relative_to(within.resolve())]
    return [parent["role"] for parent in outside if _compared(parent, run)[0] == "another"]


def _found(parent: dict[str, Any], child: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    found, place = _compared(parent, child)
    described = {} if found is None else {"found": found}
    return described if place is None else described | {"lineage": lineage(place, chain)}


def _compared(parent: dict[str, Any], child: Path) -> tuple[str | None, Path | None]:
    """What became of an input, None where that cannot be told; and where it is, if it is the same."""
    if "path" not in parent:
        return None, None
    there = [place for place in where(parent, child) if place.exists()]
    if not there:
        return (None if ":" in parent["path"] else "gone"), None  # a SPEC is no place
    artifacts = [place for place in there if any((place / name).is_file() for name in RECORDS)]
    for place in artifacts:
        with contextlib.suppress(DfkdError, OSError, KeyError):  # damaged is not the same either
            if _identity(place, parent["role"]) == parent["sha256"]:
                return "same", place
    return ("another" if artifacts else None), None


def _identity(path: Path, role: str) -> str:
    """The hash by which runs record what lies there."""
    if role == "architecture":
        return architecture(str(path)).parents[0]["sha256"]
    for name, file in WEIGHTS.items():
        if (path / name).is_file():
            record = read_json(intact(path / name), RECORDS[name])
            intact(path / file, record["weights"]["sha256"])
            return generators.identity(record) if name == generators.RECORD else directory.identity(record)
    return ShardReader(path).sha256 if (path / MANIFEST).is_file() else sha256_file(path / metadata.RECORD)
