"""Carries out the commands of a grid, several at a time: here, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfkd_cli.data.access import access
from dfkd_cli.errors import ConfigError, DfkdError, RunFailed
from dfkd_cli.ray_tasks import RayTasks
from dfkd_cli.settings import Settings
from dfkd_cli.stages.grid.commands import Grid, PlannedRun, carry_out, qualified
from dfkd_cli.ui import Terminal
from dfkd_cli.urls import copies
from dfkd_cli.workers import Launcher, Workers


def launcher(settings: Settings) -> Launcher:
    """What carries out the commands of a grid, as ``compare`` was told.

    Raises:
        ConfigError: It was told what does not fit together, or Ray is not installed.
    """
    inputs, how = settings.inputs, settings.run
    if inputs.engine == "local":
        for flag, value in (("address", inputs.address), ("gpus-per-run", inputs.gpus_per_run)):
            if value:
                raise ConfigError(f"--{flag} {value}: only on a Ray cluster", "give --engine ray, or leave it out")
        return Workers(how.devices)
    if settings.sections["grid"] is None:
        raise ConfigError(f"--engine {inputs.engine}: there is no grid to run", "give --recipe with a grid")
    if how.devices > 1:
        hint = "leave it out; --gpus-per-run and --threads say what each takes"
        raise ConfigError(f"--devices {how.devices}: a cluster runs as many commands as it has room for", hint)
    if copies():
        where = "dfkd cp URL DIR, where all nodes see it"
        raise ConfigError(f"--engine ray: nodes have no copy of {next(iter(copies()))}", where)
    return RayTasks(inputs.address, how.threads or 1, inputs.gpus_per_run)


def run_grid(
    grid: Grid, launcher: Launcher, terminal: Terminal, save: Callable[[], None] = lambda: None
) -> tuple[list[dict[str, Any]], set[Path]]:
    """Run what is not finished yet, each command as soon as those that it waits for are.

    Returns what is known of each run that failed, and the directories that were not made for it, whatever an earlier
    call left in them; the others are none the worse. ``save`` is called after every run, so that the time it took is
    known whatever ends the next one.

    Raises:
        DfkdError: A teacher failed.
    """
    failed: list[dict[str, Any]] = []
    lost: dict[Path, PlannedRun] = {}  # what is not made: the run that failed, or one that waits for such a directory
    waiting = dict(enumerate(grid.runs, 1))
    unfinished = {run.out for run in grid.runs}
    silent = terminal.silent or not launcher.alone  # nobody could tell the lines of several commands apart
    with launcher:
        while waiting or launcher.busy:
            for number, run in list(waiting.items()):
                if causes := [lost[out] for out in sorted(run.waits_for) if out in lost]:
                    del waiting[number]
                    unfinished.discard(run.out)  # nobody must wait for it
                    lost[run.out] = cause = causes[0]
                    if run.row != cause.row:  # else it is said already
                        needed = qualified(cause.teacher, cause.label)
                        failed.append(_failure(run, RunFailed(f"not run: it needs {needed}, which failed")))
                        lost[run.out] = run
                elif launcher.free and unfinished.isdisjoint(run.waits_for):
                    del waiting[number]
                    terminal.say(f"[{number}/{len(grid.runs)}] {run}")
                    settings = run.settings
                    reach = access(settings)  # a process that is confined can do nothing else afterwards
                    inside = None if reach is None else reach.confined
                    what = settings.plain(), settings.code.typed, terminal.verbosity, silent, launcher.retries
                    launcher.submit(run, carry_out, *what, inside=inside)
            if not launcher.busy:
                continue  # what was waiting had failed before
            run, error = launcher.next()
            unfinished.discard(run.out)
            if error is None and not launcher.alone:
                done = len(grid.runs) - len(waiting) - launcher.busy
                terminal.say(f"{run}: done, {done} of {len(grid.runs)} have ended")
            if error is not None:
                if not run.row:
                    terminal.say(f"{run} failed")
                    raise error
                terminal.say(f"{run} failed: {error}")
                failed.append(_failure(run, error))
                lost[run.out] = run
            save()
    return failed, set(lost)


def _failure(run: PlannedRun, error: DfkdError) -> dict[str, Any]:
    """What is known of a run that failed."""
    facts = {"teacher": run.teacher, "row": run.label, "seed": run.seed, "command": run.settings.command}
    return facts | {"code": error.code, "message": error.message, "hint": error.hint}
