"""Which process of a run this is."""

from __future__ import annotations

import os


def first_process() -> bool:
    """Whether this is the process of a run that writes its records.

    Lightning starts the others of this machine itself and numbers them. Other launchers' numbers mean nothing here:
    several commands, each with one device, may well run under one of them.
    """
    return int(os.environ.get("LOCAL_RANK") or 0) == 0 or "WORLD_SIZE" not in os.environ
