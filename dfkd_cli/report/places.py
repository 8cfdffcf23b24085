"""Where the parents of a directory lie, as its run names them, whether it was moved since or not."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.artifacts.integrity import LEVELS, RUN, made_by, read_run
from dfkd_cli.errors import ArtifactError
from dfkd_cli.models.directory import RECORD, identity, read_record
from dfkd_cli.urls import copies


def where(parent: Mapping[str, Any], child: Path) -> list[Path]:
    """Where a parent of ``child``, as a ``run.json`` names it, may lie; nowhere if it has no path.

    The path is relative to where the command ran: here, or, as a rule, beside the child, or beside the run that it is
    a part of.
    """
    around = (child.resolve(), *child.resolve().parents)[:LEVELS]
    beside = [place.parent for place in around if place == around[0] or (place / RUN).exists()]
    return [base / parent["path"] for base in (Path(), *beside)] if "path" in parent else []


def opened(name: str) -> Path:
    """Where a directory lies that a comparison names: what lies at a URL, or in a directory there, in its copy."""
    for url, directory in copies().items():
        place = url.rstrip("/")
        if f"{name}/".startswith(f"{place}/"):
            return Path(directory + name.removeprefix(place))
    return Path(name)


def find(parent: Mapping[str, Any], child: Path, file: str) -> Path | None:
    """The directory that a ``run.json`` names as a parent, if it is still there and still the same.

    Args:
        parent: ``{"path": ..., "sha256": ...}``, other parents are never found.
        child: The directory whose parent it is.
        file: ``manifest.json`` or ``model.json``, whichever makes a directory of that kind.
    """
    for path in where(parent, child):
        with contextlib.suppress(ArtifactError, KeyError):  # what lies there now is something else, or damaged
            if (path / file).is_file() and recorded_as(path / file) == parent["sha256"]:
                return path
    return None


def find_teacher(child: Path, sha256: str) -> Path | None:
    """The teacher, by its hash, of a model or shard directory: where its run says, or in ``teacher/``; else None."""
    run = made_by(child) or child
    recorded = [parent for parent in read_run(run).get("parents", []) if parent["role"] == "teacher"]
    candidates = [parent | {"sha256": sha256} for parent in [*recorded, {"path": "teacher"}]]
    return next(filter(None, (find(parent, run, RECORD) for parent in candidates)), None)


def judged_by(line: Sequence[str], record: Mapping[str, Any]) -> list[str]:
    """The hashes of whom a model is measured against, nearest first; its ``line`` begins with whom it comes from.

    An export is what its model is: it is measured against that one's teacher, and against the model if there is none.
    """
    return [*line[1:], *line[:1]] if record.get("kind") == "export" else [*line]


def recorded_as(path: Path) -> str:
    """What stands for a directory in its children's records."""
    return identity(read_record(path.parent)) if path.name == RECORD else sha256_file(path)
