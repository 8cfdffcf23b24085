"""Copy a recipe, to change it; or a finished directory to a URL, and back.

dfkd cp NAME FILE.yaml copies a recipe. dfkd cp DIR URL copies a model, shard, metadata, export or comparison
directory to s3://, hf://, sftp:// or other places that fsspec knows, and dfkd cp URL DIR back. Every file's hash is
checked on both ways; the same command goes on where it was stopped, and copies nothing again that is there. Paths of
this machine are left out of the records where they stand alone, not within sentences. A directory is not there until
all of it is: then files.json names every file with its hash. At hf://USER/MODEL each file is a commit, and a model
gets a README.md too.

Wherever a directory is read, its URL may stand: --transfer-set s3://bucket/shards, --teacher hf://user/model. What is
read there is copied to $DFKD_CACHE (default ~/.cache/dfkd) once, by its hash. Servers and credentials are said as their
packages want it, for instance in AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, HF_TOKEN; user:password@ in a URL is never
recorded.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfkd_cli import catalog
from dfkd_cli.artifacts.files import check_inside, write_atomic
from dfkd_cli.artifacts.server import Server, fits
from dfkd_cli.catalog import RECIPES, UNTRAINED, Command
from dfkd_cli.config import option
from dfkd_cli.errors import ConfigError
from dfkd_cli.settings import Settings
from dfkd_cli.ui import Progress, Terminal
from dfkd_cli.urls import is_url


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is copied."""

    source: str | None = option(
        None, "recipe (dfkd ls recipes), finished directory, or URL", argument="SOURCE", typed=True
    )
    dest: str | None = option(None, "file, URL or directory to write", argument="DEST", typed=True)


COMMAND = Command(
    position=80,
    copies=False,
    ignores=("out", "seed", "device", "threads", "allow_code", "code_dir", *UNTRAINED),
    examples=("dfkd cp zskd-digits my.yaml", "dfkd cp shards/ s3://bucket/shards", "dfkd cp student/ hf://user/model"),
    next="give the URL where a directory is read: --transfer-set s3://bucket/shards",
)
CARD = "README.md"


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Copy. A dry run looks whether there is something that can be copied."""
    source, dest = settings.inputs.source, settings.inputs.dest
    if not source or not dest:
        raise ConfigError("cp: from where to where?", "dfkd cp SOURCE DEST")
    if is_url(source) and is_url(dest):
        raise ConfigError(f"{source} and {dest}: both are URLs", "copy it to a directory first")
    if is_url(source):
        return _receive(Server(source), Path(dest), settings.run.overwrite, terminal, dry_run)
    if is_url(dest):
        return _send(Path(source), Server(dest), settings.run.overwrite, terminal, dry_run)
    if Path(source).is_dir():
        raise ConfigError(f"{dest}: no URL", "give one, such as s3://bucket/shards; cp -r copies here")
    return _recipe(source, Path(dest), settings.run.overwrite, terminal, dry_run)


def _recipe(name: str, dest: Path, overwrite: bool, terminal: Terminal, dry_run: bool) -> dict[str, Any]:
    source = catalog.find_recipe(name)
    dest = dest / source.name if dest.is_dir() else dest
    if dest.suffix not in RECIPES:  # by which `--recipe` tells a file from a name
        raise ConfigError(f"{dest}: the file of a recipe ends in {' or '.join(RECIPES)}", f"call it {dest}.yaml")
    if dest.exists() and not overwrite:
        raise ConfigError(f"{dest} exists", "choose another name or give --overwrite")
    if not dry_run:
        write_atomic(dest, source.read_bytes())
    terminal.answer(str(dest))
    return {"artifacts": {"recipe": str(dest)}}


def _send(source: Path, server: Server, overwrite: bool, terminal: Terminal, dry_run: bool) -> dict[str, Any]:
    from dfkd_cli.report.card import model_card  # both import torch, which a recipe needs not
    from dfkd_cli.stages.bundle import bundle, portable

    parts = bundle(source)
    if dry_run:
        return _would_copy(str(source), len(parts), sum(part.size for part in parts.values()), terminal)
    with closing(Progress(terminal, "cp", "files", len(parts))) as progress:
        copied = server.send(parts, overwrite, lambda done, _: progress.update(done))
    # A card that is there may be written by hand.
    wanted = server.url.startswith("hf://") and (overwrite or not server.has(CARD))
    if wanted and (card := model_card(source, server.url, portable)) is not None:
        server.write(CARD, card.encode())
    return _copied(server.url, len(parts), copied, terminal)


def _receive(server: Server, dest: Path, overwrite: bool, terminal: Terminal, dry_run: bool) -> dict[str, Any]:
    _, rows = server.rows()
    said = {row["path"]: row for row in rows}
    if dest.is_file():
        raise ConfigError(f"{dest} is a file", "choose another directory")
    check_inside(dest)
    there = {path.relative_to(dest).as_posix() for path in dest.rglob("*") if path.is_file()}
    strange = [name for name in sorted(there) if name not in said and not name.startswith(".")]
    if strange:
        raise ConfigError(f"{dest} holds something else: {strange[0]}", "choose another directory")
    others = [name for name in sorted(there & said.keys()) if not fits(dest / name, said[name])]
    if others and not overwrite:
        raise ConfigError(f"{dest} holds another {others[0]}", "choose another directory, or give --overwrite")
    if dry_run:
        return _would_copy(server.url, len(rows), sum(row["bytes"] for row in rows), terminal)
    with closing(Progress(terminal, "cp", "files", len(rows))) as progress:
        copied = server.receive(rows, dest, lambda done, _: progress.update(done))
    return _copied(str(dest), len(rows), copied, terminal)


def _would_copy(what: str, files: int, size: int, terminal: Terminal) -> dict[str, Any]:
    terminal.answer(f"{what}: {files} files, {size:,} bytes; nothing was copied")
    return {"dry_run": True, "metrics": {"files": files, "bytes": size}}


def _copied(place: str, files: int, copied: int, terminal: Terminal) -> dict[str, Any]:
    there = f", {files - copied} of them were there" if copied < files else ""
    terminal.answer(f"{place}: {files} files{there}")
    return {"artifacts": {"copy": place}, "metrics": {"files": files, "copied": copied}}
