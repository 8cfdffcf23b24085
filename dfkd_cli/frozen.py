"""Imported last by a process of which others are forks: all share what was imported, none looks for garbage in it."""

from __future__ import annotations

from dfkd_cli.processes import keep_imports

keep_imports()
