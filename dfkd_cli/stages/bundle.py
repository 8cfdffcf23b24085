"""The files that make a finished directory what it is, as they are sent elsewhere: without this machine's paths.

Only what has a hash on record goes: no checkpoints, no locks, nothing that somebody laid beside it. In records, a path
that leads out of the working directory becomes its last name, as what a directory was made from lies beside it, as a
rule; a hash stands by it all the same. The hashes of changed records are noted anew. What is itself part of a hash by
which others know the directory stays: ``manifest.json``, ``metadata.json`` and the SPEC of a model.
"""

from __future__ import annotations

import functools
import hashlib
import html
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dfkd_cli.artifacts import metadata
from dfkd_cli.artifacts.files import json_bytes, sha256_file, utf8
from dfkd_cli.artifacts.integrity import RUN, check_finished, intact, on_record, read_run, with_hash
from dfkd_cli.artifacts.records import read_json
from dfkd_cli.artifacts.server import Part, check_name
from dfkd_cli.artifacts.shards import MANIFEST
from dfkd_cli.config import dump_yaml, parse_yaml
from dfkd_cli.errors import ArtifactError
from dfkd_cli.report.table import escape
from dfkd_cli.stages.lineage import RECORDS, hashes
from dfkd_cli.trust import CONFIG
from dfkd_cli.urls import each_text

KNOWN_BY_ITS_BYTES = (MANIFEST, metadata.RECORD)
PART_OF_A_HASH = ("spec", "settings", "teacher_input", "weights")  # keys of model.json, generator.json, export.json
Change = Callable[[str], str]
PAGES = (".md", ".html")
_PREFIX = re.compile(r"(?:[\w.+-]{2,}[=:])*")
_ELSEWHERE = re.compile(r"~|/(?!/)|\.\.(?=[/\\]|$)|[A-Za-z]:[\\/]")


def portable(text: str, home: Path | None = None) -> str:
    """A path that leads out of the working directory as its last name, also in ``--out=/x/y``; all else as it is.

    Args:
        text: Any.
        home: A directory: of a path in there, what follows from its name on is left.
    """
    prefix = _PREFIX.match(text)
    assert prefix is not None
    place = text[prefix.end() :]
    for way in {home.absolute(), home.resolve()} if home else ():
        if Path(place).is_relative_to(way):
            return prefix.group() + Path(way.name, Path(place).relative_to(way)).as_posix()
    if not _ELSEWHERE.match(place):
        return text
    return prefix.group() + (re.split(r"[/\\]", place.rstrip("/\\"))[-1] or "/")


def bundle(directory: Path) -> dict[str, Part]:
    """The files of a finished directory, each checked against its hash, by their paths in it.

    Raises:
        ArtifactError: The directory is missing, unfinished, damaged, or was made by something else.
    """
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: no such directory", "give one that dfkd wrote")
    check_finished(directory)
    parts: dict[str, Part] = {}
    change = functools.partial(portable, home=directory)
    runs = [path.parent for path in sorted(directory.rglob(RUN)) if _finished(path, directory)]
    for run in runs if directory in runs else []:
        parts |= _of_run(run, directory, change)
    parts = parts or _of_records(directory, change)
    if not parts:
        hint = "give a finished directory that dfkd wrote"
        raise ArtifactError(f"{directory}: holds nothing that dfkd knows how to copy", hint)
    return parts


def _finished(path: Path, around: Path) -> bool:
    """Whether a record is that of a finished run, which lies nowhere hidden."""
    hidden = any(name.startswith(".") for name in path.relative_to(around).parts)
    return not hidden and read_run(path.parent).get("status") == "done"


def _of_run(run: Path, around: Path, change: Change) -> dict[str, Part]:
    """The files of one run."""
    record = read_run(run)
    recorded = {file["path"]: file["sha256"] for file in record["artifacts"]}
    recorded |= {CONFIG: record["kept"][CONFIG]} if CONFIG in record["kept"] else {}
    for name in recorded:
        check_name(name, str(run / RUN))
    parts = {name: _part(intact(run / name, sha256), change) for name, sha256 in recorded.items()}
    parts |= _of_pages(run, parts, change)
    changed = each_text(record, change)
    changed["artifacts"] = [
        {**file, "sha256": parts[file["path"]].sha256, "bytes": parts[file["path"]].size}
        for file in record["artifacts"]
    ]
    changed["kept"] = {name: parts[name].sha256 for name in record["kept"] if name in parts}
    changed.pop("sha256", None)
    same = changed == {key: value for key, value in record.items() if key != "sha256"}
    parts[RUN] = _content((run / RUN).read_bytes() if same else json_bytes(with_hash(changed)))
    inside = run.relative_to(around)
    return {(inside / name).as_posix(): part for name, part in parts.items()}


def _of_records(directory: Path, change: Change) -> dict[str, Part]:
    """The files of a directory that was made by no run, or is a part of one: those that have a hash in some record."""
    records = {
        name: dict(read_json(intact(directory / name), kind))
        for name, kind in RECORDS.items()
        if name != RUN and (directory / name).is_file()
    }
    named = hashes(records) if records else {}
    recorded = {path.name: sha256 for path, sha256 in on_record(directory).items()} if records else {}
    for name in (*named, *recorded):
        check_name(name, str(directory))
    return {
        name: _part(intact(directory / name, sha256), change)
        for name, sha256 in {**dict.fromkeys(records), **named, **recorded}.items()
    }


def _part(path: Path, change: Change) -> Part:
    """A file as it is sent."""
    content: Path | bytes = path
    if path.name == CONFIG:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        changed = each_text(values, change)
        content = path if changed == values else utf8(dump_yaml(changed))
    elif path.suffix == ".json" and path.name not in KNOWN_BY_ITS_BYTES:
        record = read_json(path, dict[str, Any])
        kept = PART_OF_A_HASH if path.name in RECORDS else ()
        changed = {key: value if key in kept else each_text(value, change) for key, value in record.items()}
        content = path if changed == record else json_bytes(changed)
    return Part(sha256_file(path), path.stat().st_size, path) if isinstance(content, Path) else _content(content)


def _of_pages(run: Path, parts: Mapping[str, Part], change: Change) -> dict[str, Part]:
    """The pages of a comparison, which show what its results say: what was changed there is changed here."""
    changes: dict[str, str] = {}

    def note(text: str) -> str:
        changes[text] = change(text)
        return text

    for name, part in parts.items():
        if isinstance(part.content, bytes) and name.endswith(".json"):
            each_text(json.loads((run / name).read_bytes()), note)
    changes = {old: new for old, new in changes.items() if old != new}
    changed = {}
    for name in parts if changes else ():
        if name.endswith(PAGES):
            text = (run / name).read_text(encoding="utf-8")
            for old in sorted(changes, key=len, reverse=True):
                for shown in (str, html.escape, escape):
                    text = text.replace(shown(old), shown(changes[old]))
            changed[name] = _content(utf8(text))
    return changed


def _content(content: bytes) -> Part:
    return Part(hashlib.sha256(content).hexdigest(), len(content), content)
