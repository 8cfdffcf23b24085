"""What an artifact is, and from what it was made: ``dfkd info PATH``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from dfkd_cli.artifacts import metadata
from dfkd_cli.artifacts.files import read_json, sha256_file
from dfkd_cli.artifacts.run import RUN
from dfkd_cli.artifacts.shards import MANIFEST, ShardReader
from dfkd_cli.errors import ArtifactError, DfkdError
from dfkd_cli.models import directory, generators
from dfkd_cli.models.names import architecture
from dfkd_cli.report.entries import made_beside, read_run, where

RECORDS = (directory.RECORD, MANIFEST, metadata.RECORD, generators.RECORD, RUN)
LONG = ("shards", "identity", "artifacts", "parents")  # what is left out of them


def describe(path: Path) -> dict[str, Any]:
    """The records of an artifact, by file, and its ``lineage``.

    Raises:
        ArtifactError: The path holds no artifact.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such directory", "give a directory that dfkd wrote")
    facts: dict[str, Any] = {"path": str(path)}
    for name in RECORDS:
        if (path / name).is_file():
            facts[name] = {key: value for key, value in read_json(path / name).items() if key not in LONG}
    if len(facts) == 1:
        raise ArtifactError(f"{path}: no model, shard or metadata directory", "give a directory that dfkd wrote")
    return facts | {"lineage": lineage(path)}


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
    if (beside := made_beside(path)) is not None:
        return lineage(beside, chain)
    return [parent | _found(parent, path, chain) for parent in read_run(path).get("parents", [])]


def _found(parent: dict[str, Any], child: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if "path" not in parent:
        return {}
    there = [place for place in where(parent, child) if place.exists()]
    if not there:
        return {} if ":" in parent["path"] else {"found": "gone"}  # a SPEC is no place
    artifacts = [place for place in there if any((place / name).is_file() for name in RECORDS)]
    for place in artifacts:
        with contextlib.suppress(DfkdError, OSError, KeyError, TypeError):  # damaged is not the same either
            if _identity(place, parent["role"]) == parent["sha256"]:
                return {"found": "same", "lineage": lineage(place, chain)}
    return {"found": "another"} if artifacts else {}


def _identity(path: Path, role: str) -> str:
    """The hash by which runs record what lies there."""
    if role == "architecture":
        return architecture(str(path)).parents[0]["sha256"]
    for kind in (directory, generators):
        if (path / kind.RECORD).is_file():
            record = read_json(path / kind.RECORD)
            if sha256_file(path / kind.WEIGHTS) != record["weights"]["sha256"]:
                raise ArtifactError(f"{path}: its weights are damaged")
            return kind.identity(record)
    return ShardReader(path).sha256 if (path / MANIFEST).is_file() else sha256_file(path / metadata.RECORD)
