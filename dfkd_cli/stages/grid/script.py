"""A grid as a shell script that hands its commands to SLURM, one job each."""

from __future__ import annotations

import json
import os
import shlex
from typing import Any

from dfkd_cli.config import plain
from dfkd_cli.settings import Settings, assigned_layer, resolve, typed_layer
from dfkd_cli.stages.grid.commands import Grid
from dfkd_cli.urls import named

_HEAD = """#!/bin/sh
# Hands a grid to SLURM: each command is a job that starts when those that it waits for have succeeded, and is cancelled
# when one of them fails. What follows the script's name are options of sbatch for every job:
#   sh {name} --partition=gpu --gpus=1 --cpus-per-task=4
# When all have ended, the dfkd compare that wrote this script, without --dry-run and --script, makes the tables.
set -eu
cd {directory}
"""


def script(grid: Grid, name: str) -> str:
    """The text of the script, which is called so."""
    lines, jobs = [], {}
    for number, run in enumerate(grid.runs, 1):
        jobs[run.out] = f"${{job{number}%%;*}}"  # sbatch may add a cluster's name
        after = ":".join(jobs[out] for out in sorted(run.waits_for, key=list(jobs).index))
        waits = f" --kill-on-invalid-dep=yes --dependency=afterok:{after}" if after else ""
        command = shlex.quote(shlex.join(named(command_line(run.settings))))  # URLs: the copies are this machine's
        title = shlex.quote(str(run).partition(" -> ")[0])
        lines.append(f'job{number}=$(sbatch --parsable --job-name={title}{waits} "$@" --wrap={command})\n')
    return _HEAD.format(name=shlex.quote(name), directory=shlex.quote(os.getcwd())) + "".join(lines)


def command_line(settings: Settings) -> list[str]:
    """What to type for these settings: what differs from the defaults, each said of the part that it belongs to."""
    line, choices = ["dfkd", settings.command], {}
    for flag, chosen in settings.components.items():
        if chosen:
            several = flag != "method"
            choices[flag] = [f"{c.entry.name}={c.weight!r}" if several else c.entry.name for c in chosen]
            line += [f"--{flag}", *choices[flag]]
    bare = resolve(settings.command, [typed_layer(choices), assigned_layer([])])
    pairs = [
        f"{place}.{key}={_text(value)}"
        for (place, said), (_, default) in zip(_parts(settings), _parts(bare), strict=True)
        for key, value in said.items()
        if value != default[key]
    ]
    return [*line, "--set", *pairs] if pairs else line


def _parts(settings: Settings) -> list[tuple[str, dict[str, Any]]]:
    """The values of each part of the settings, by the name that ``--set`` knows it by."""
    components = {f"{flag}.{c.entry.name}": c.config for flag, chosen in settings.components.items() for c in chosen}
    parts = {**components, "inputs": settings.inputs, "run": settings.run}
    return [(name, plain(part)) for name, part in parts.items()]


def _text(value: Any) -> str:
    """A value as ``--set`` reads it."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
