"""Files that have a hash on record: whoever reads one asks here for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from dfkd_cli.artifacts.files import digest, sha256_file, write_json
from dfkd_cli.artifacts.records import REMAKE, read_json
from dfkd_cli.errors import ArtifactError
from dfkd_cli.trust import CONFIG
from dfkd_cli.urls import named

RUN = "run.json"
HASHES = ".hashes-"  # of shards that no manifest names yet
SCRATCH = ".scratch"  # in an output: temporary files, also of processes that are to come
LEVELS = 3  # how many directories above a file may have a record that names it: its own, and those that are around it


class Parent(TypedDict):
    """What a command has read."""

    role: str
    path: NotRequired[str]
    spec: NotRequired[str]
    sha256: NotRequired[str]


class Artifact(TypedDict):
    """A file that a command has made."""

    path: str
    sha256: str


class RunRecord(TypedDict):
    """``run.json``, as far as anything is read from it."""

    schema: NotRequired[Literal[1]]
    command: NotRequired[str]
    status: NotRequired[str]
    identity: NotRequired[dict[str, Any]]
    parents: NotRequired[list[Parent]]
    argv: NotRequired[list[str]]
    versions: NotRequired[dict[str, Any]]
    started: NotRequired[str]
    seconds: NotRequired[float]
    within: NotRequired[float]
    device: NotRequired[str]
    artifacts: NotRequired[list[Artifact]]
    metrics: NotRequired[dict[str, Any]]
    concerns: NotRequired[list[str]]
    error: NotRequired[str | None]
    id: NotRequired[str]
    kept: NotRequired[dict[str, str]]
    sha256: NotRequired[str]


def write_run(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the ``run.json`` of a directory, with a hash of all that it says."""
    write_json(directory / RUN, with_hash(named(record)))


def with_hash(record: Mapping[str, Any]) -> dict[str, Any]:
    """A ``run.json`` with a hash of all that it says."""
    return {**record, "sha256": _said(record)}


def _said(record: Mapping[str, Any]) -> str:
    return digest(json.loads(json.dumps({key: value for key, value in record.items() if key != "sha256"})))


def read_run(directory: Path) -> dict[str, Any]:
    """The ``run.json`` of a directory, or an empty mapping where it has none.

    Raises:
        ArtifactError: It is damaged.
    """
    if not (directory / RUN).exists():
        return {}
    record: dict[str, Any] = {**read_json(directory / RUN, RunRecord)}
    if record.pop("sha256", said := _said(record)) != said:
        raise ArtifactError(f"{directory / RUN} is damaged: its sha256 is not the recorded one", REMAKE)
    return {"parents": [], "identity": {}, "artifacts": [], "kept": {}, **record}


def intact(path: Path, sha256: str | None = None, hint: str = REMAKE) -> Path:
    """A file of an artifact, which is what it was when it was made.

    Args:
        path: The file.
        sha256: The hash on record; by default the one in the ``run.json`` of the directory that the file is of, if any.
        hint: What to do where it is not.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    expected = _recorded(path) if sha256 is None else sha256
    if expected is not None or not path.is_file():
        hash_of(path, expected, hint)
    return path


def hash_of(path: Path, expected: str | None = None, hint: str = REMAKE) -> str:
    """The sha256 of a file, which is the expected one, where there is one.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", hint)
    sha256 = sha256_file(path)
    if expected not in (None, sha256):
        raise ArtifactError(f"{path} is damaged: its sha256 is not the recorded one", hint)
    return sha256


def present(path: Path) -> Path | None:
    """An intact file; None where there is none, and none is on record.

    Raises:
        ArtifactError: It is damaged or gone.
    """
    return intact(path) if path.exists() or _recorded(path) is not None else None


def on_record(directory: Path) -> dict[Path, str]:
    """The files in a directory that have a hash on record, with it: its own record, or that of the one it is part of.

    Raises:
        ArtifactError: The record is damaged.
    """
    made, place = _run_around(directory), directory.absolute()
    if made is None:
        return {}
    run = read_run(made)
    hashes = run["kept"] | {file["path"]: file["sha256"] for file in run["artifacts"]}
    files = {made.absolute() / name: sha256 for name, sha256 in hashes.items()}
    return {directory / path.name: sha256 for path, sha256 in files.items() if path.parent == place}


def made_by(directory: Path) -> Path | None:
    """The directory of the run that made what lies in a directory: that itself, or one around it with a record of it.

    Raises:
        ArtifactError: The record is damaged.
    """
    if (directory / RUN).exists():
        return directory
    return _run_around(directory) if on_record(directory) else None


def runs_within(directory: Path) -> list[Path]:
    """The directories of the runs that a run has made in its own directory, such as the hops of a chain."""
    return [run.parent for run in sorted(directory.glob(f"*/*/{RUN}"))]


def _run_around(directory: Path) -> Path | None:
    above = () if directory.is_absolute() else Path.cwd().parents  # of what is named from inside
    places = (directory, *directory.parents, *above)[:LEVELS]
    return next((place for place in places if (place / RUN).exists() and (place / CONFIG).exists()), None)


def _recorded(path: Path) -> str | None:
    return on_record(path.parent).get(path)


def check_finished(directory: Path) -> None:
    """Raise :class:`ArtifactError` for a directory of a run that is not finished, or has lost what it made."""
    run = read_run(directory)
    if "command" in run and run.get("status") != "done":
        raise ArtifactError(f"{directory}: its {run['command']} is not finished", "run the same command again")
    for file in run.get("artifacts", ()):
        if not (directory / file["path"]).exists():
            raise ArtifactError(
                f"{directory / file['path']} is missing", "run the same command again, or copy it again"
            )


def check_foreign(directory: Path) -> None:
    """Raise :class:`ArtifactError` for a directory that a command wrote: whatever it has lost, it is no images."""
    check_finished(directory)
    if "command" in read_run(directory) or any(directory.glob("shard-*.safetensors")):
        hint = "give shards, a generator or a folder of images; if it has lost files, run its command again"
        raise ArtifactError(f"{directory} was made by dfkd and is no transfer set", hint)
