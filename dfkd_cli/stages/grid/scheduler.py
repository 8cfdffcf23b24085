"""Carries out the commands of a grid on this machine, several at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dfkd_cli.data.access import access
from dfkd_cli.stages.grid.commands import Grid, carry_out
from dfkd_cli.ui import Terminal
from dfkd_cli.workers import Workers


def run_grid(grid: Grid, terminal: Terminal, save: Callable[[], None], processes: int = 1) -> list[dict[str, Any]]:
    """Run what is not finished yet, as many commands at a time as there are ``processes``.

    Returns what is known of each run that failed; the others are none the worse for it. ``save`` is called after every
    run, so that the time it took is known whatever ends the next one.

    Raises:
        DfkdError: A teacher failed.
    """
    failed: dict[tuple[str, str, int], dict[str, Any]] = {}
    waiting = dict(enumerate(grid.runs, 1))
    unfinished = {run.out for run in grid.runs}
    silent = terminal.silent or processes > 1  # nobody could tell the lines of several commands apart
    with Workers(processes) as workers:
        while waiting or workers.busy:
            for number, run in list(waiting.items()):
                if (run.teacher, run.row, run.seed) in failed:
                    del waiting[number]  # no shards to distill from
                    unfinished.discard(run.out)  # nobody must wait for it
                elif workers.busy < processes and unfinished.isdisjoint(run.waits_for):
                    del waiting[number]
                    terminal.say(f"[{number}/{len(grid.runs)}] {run.describe()}")
                    settings = run.settings
                    reach = access(settings)  # a process that is confined can do nothing else afterwards
                    inside = None if reach is None else reach.confined
                    what = settings.plain(), settings.code.typed, terminal.verbosity, silent
                    workers.submit(run, carry_out, *what, inside=inside)
            if not workers.busy:
                continue  # what was waiting had failed before
            run, error = workers.next()
            unfinished.discard(run.out)
            if error is not None:
                if not run.row:
                    raise error
                terminal.say(f"{run.describe()} failed: {error}")
                facts = {"teacher": run.teacher, "row": run.label, "seed": run.seed, "command": run.settings.command}
                reason = {"code": error.code, "message": error.message, "hint": error.hint}
                failed[run.teacher, run.row, run.seed] = facts | reason
            save()
    return list(failed.values())
