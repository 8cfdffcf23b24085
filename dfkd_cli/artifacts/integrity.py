"""Files that have a hash on record: whoever reads one asks here for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.artifacts.records import REMAKE, read_json
from dfkd_cli.errors import ArtifactError
from dfkd_cli.trust import CONFIG

RUN = "run.json"


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
    device: NotRequired[str]
    artifacts: NotRequired[list[Artifact]]
    metrics: NotRequired[dict[str, Any]]
    concerns: NotRequired[list[str]]
    error: NotRequired[str | None]
    id: NotRequired[str]
    kept: NotRequired[dict[str, str]]


def read_run(directory: Path) -> dict[str, Any]:
    """The ``run.json`` of a directory, or an empty mapping where it has none.

    Raises:
        ArtifactError: It is damaged.
    """
    if not (directory / RUN).exists():
        return {}
    return {"parents": [], "identity": {}, "artifacts": [], "kept": {}, **read_json(directory / RUN, RunRecord)}


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
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", hint)
    if expected is not None and sha256_file(path) != expected:
        raise ArtifactError(f"{path} is damaged: its sha256 is not the recorded one", hint)
    return path


def present(path: Path) -> Path | None:
    """An intact file; None where there is none, and none is on record.

    Raises:
        ArtifactError: It is damaged or gone.
    """
    return intact(path) if path.exists() or _recorded(path) is not None else None


def _recorded(path: Path) -> str | None:
    """What the run that made a file, or the directory that the file's directory is in, says of it."""
    for directory in (path.parent, path.parent.parent):
        if (directory / RUN).exists() and (directory / CONFIG).exists():
            name = path.relative_to(directory).as_posix()
            run = read_run(directory)
            return next((file["sha256"] for file in run["artifacts"] if file["path"] == name), run["kept"].get(name))
    return None


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
